"""The lists of kept tensors against what autograd really keeps, byte for byte.

"plain": real FP32 models on a CPU. "kernels": the same model code on the meta device, where the kernels' autograd rules and
shapes run as they do on a GPU and nothing is computed.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from openling.config.presets import PRESETS
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import CallContext, Layer, Ling, MtpLayer, Rope, RopeTables
from openling.ops import attention, fused, lightning, norm, rope
from openling.plan.activations import POLICIES, Cut, Rows, copies, layer_bytes, layer_saved, outer_saved, product_outputs

ROWS = Rows(sequences=2, tokens=128)


def tiny(**changes) -> ModelConfig:
    return read_config(PRESETS["tiny"]()).replace(**changes)


class Kept:
    """Distinct storages that autograd was given inside a block, but for those of `others`."""

    def __init__(self, others: list[Tensor]) -> None:
        self.others = {t.untyped_storage()._cdata for t in others}
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.others:
                self.storages[storage._cdata] = storage
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@contextmanager
def kernels_on_meta():
    """BF16 tensors of the meta device take the kernels' way; attention is cuDNN's, which the kernels' GPUs choose."""
    from openling.ops import kernels

    def half(x: Tensor):
        return kernels if x.dtype == torch.bfloat16 else None

    def cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, True, False, scale=scale)[0]

    with ExitStack() as stack:
        for module in (norm, fused, rope, lightning):
            stack.enter_context(mock.patch.object(module, "kernels_for", half))
        stack.enter_context(mock.patch.object(attention, "_attend", cudnn))
        yield


def run_layer(c: ModelConfig, index: int, form: str, policy: str, rows: Rows = ROWS) -> int:
    """Bytes kept by one layer under a policy."""
    device, dtype = ("meta", torch.bfloat16) if form == "kernels" else ("cpu", torch.float32)
    with torch.device(device):
        layer = (MtpLayer if index >= c.num_hidden_layers else Layer)(c, index).to(dtype)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        tables: RopeTables = Rope(c)(torch.zeros(1, rows.tokens, dtype=torch.long), 0, None)
        h = torch.randn(rows.sequences, rows.tokens, c.hidden_size, dtype=dtype).requires_grad_()
        embedded = torch.randn_like(h).requires_grad_()
    # The decays are constants of the layer and kept for good.
    decays = [layer.attention.log_decay(h)] if c.layer_kind(index) == "lightning" else []
    others = [*layer.parameters(), *layer.buffers(), *tables.head, *tables.latent, *decays]
    call = CallContext(tables, None, None)
    with Kept(others) as found:
        if isinstance(layer, MtpLayer):
            out = layer(h, embedded, tables)
        elif policy == "layer":
            out = checkpoint(layer, h, call, use_reentrant=False, preserve_rng_state=False)
        else:
            out = layer(h, call)
    assert out.requires_grad
    return found.bytes


CASES = {
    "lightning, MLP": (tiny(), 0),
    "lightning, experts": (tiny(), 1),
    "lightning with silu, no QK-norm": (tiny(linear_silu=True, use_qk_norm=False), 0),
    "MLA, experts": (tiny(), 3),
    "MLA without query rank, MLP": (tiny(q_lora_rank=None, layer_kinds=("mla",) * 8), 0),
    "GQA with QK-norm": (tiny(layer_kinds=("gqa",) * 8, num_key_value_heads=2, gqa_qk_norm=True), 0),
    "GQA without, experts of one group": (tiny(layer_kinds=("gqa",) * 8, n_group=1, topk_group=1, norm_topk_prob=False), 1),
    "no shared expert": (tiny(num_shared_experts=0, moe_shared_expert_intermediate_size=0), 1),
    "biases": (tiny(use_qkv_bias=True, use_bias=True, mlp_bias=True), 0),
    "MTP": (tiny(), 8),
}


@pytest.mark.parametrize("form", ["plain", "kernels"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_layer_keeps_what_is_listed(case, form):
    c, index = CASES[case]
    with ExitStack() as stack:
        if form == "kernels":
            stack.enter_context(kernels_on_meta())
        measured = run_layer(c, index, form, "none")
    listed = layer_saved(c, index, ROWS, form=form)
    assert measured == sum(s.bytes for s in listed), "\n".join(f"{s.bytes:9d} {s.name}" for s in listed)


@pytest.mark.parametrize("tokens", [64, 65, 200])
def test_lightning_chunks_are_padded_in_the_plain_form(tokens):
    rows = Rows(1, tokens)
    assert run_layer(tiny(), 0, "plain", "none", rows) == sum(s.bytes for s in layer_saved(tiny(), 0, rows, form="plain"))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_checkpointed_layer_keeps_its_input(index):
    with kernels_on_meta():
        measured = run_layer(tiny(), index, "kernels", "layer")
    found = layer_bytes(tiny(), index, ROWS, "layer")
    assert measured == found.kept == ROWS.total * 64 * 2
    assert found.recomputed == sum(s.bytes for s in layer_saved(tiny(), index, ROWS))


class Products(TorchDispatchMode):
    """Bytes that come out of matrix products and attention: what a selective checkpoint keeps."""

    KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_dot_product_cudnn_attention.default)

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.KEPT:
            found = [out] if isinstance(out, Tensor) else out
            self.bytes += sum(t.nbytes for t in found if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("case", [name for name in CASES if "bias" not in name])
def test_a_selective_checkpoint_keeps_products_and_attention(case):
    c, index = CASES[case]
    with kernels_on_meta(), Products() as products:
        run_layer(c, index, "kernels", "none")
    assert products.bytes == product_outputs(c, index, ROWS)


@pytest.mark.parametrize("index", range(9))
def test_policies_in_their_order_keep_less_and_lose_nothing(index):
    found = [layer_bytes(tiny(), index, ROWS, policy) for policy in POLICIES]
    assert found[0].kept > found[1].kept > found[2].kept
    assert all(f.kept + f.recomputed >= found[0].kept for f in found)


def test_ranks_share_what_they_can():
    """Heads and widths over tensor ranks, tokens over context ranks; the residual stream stays whole, keys are those of all."""
    c, rows = read_config(PRESETS["ling-2.6-1t"]()), Rows(1, 4096)
    alone = {s.name: s.bytes for s in layer_saved(c, 7, rows)}
    tensor = {s.name: s.bytes for s in layer_saved(c, 7, rows, cut=Cut(tensor=4))}
    context = {s.name: s.bytes for s in layer_saved(c, 7, rows, cut=Cut(context=4))}
    for name, ratio in (
        ("q rotated", 4),
        ("k without rotation, v", 4),
        ("residual stream before the mixer", 1),
        ("query latent", 1),
    ):
        assert alone[name] == ratio * tensor[name], name
    assert context["k without rotation, v"] == 4 * alone["k without rotation, v"]
    assert context["q rotated"] == alone["q rotated"]


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_a_token_travels_once_to_every_rank_that_it_needs(ranks):
    """Against draws: 4 of 8 groups, then 8 experts in them."""
    c = read_config(PRESETS["ling-2.6-1t"]())
    torch.manual_seed(0)
    tokens = 4000
    groups = torch.rand(tokens, 8).topk(4).indices
    allowed = torch.zeros(tokens, 8, dtype=torch.bool).scatter(1, groups, True).repeat_interleave(32, 1)
    experts = torch.rand(tokens, 256).masked_fill(~allowed, -1).topk(8).indices
    owners = torch.zeros(tokens, ranks, dtype=torch.bool).scatter(1, experts // (256 // ranks), True)
    # Experts are drawn without replacement, the formula draws ranks with it: 3 % at most here.
    assert copies(c, ranks) == pytest.approx(owners.sum(1).float().mean().item(), rel=0.03)
    assert copies(c, ranks) <= min(ranks, 8)


@pytest.mark.parametrize(("name", "index"), [("ling-2.6-1t", 0), ("ling-2.6-1t", 7), ("ling-2.6-flash", 5), ("ling-1t", 0)])
def test_layers_of_published_size_on_the_meta_device(name, index):
    c, rows = read_config(PRESETS[name]()), Rows(2, 4096)
    with kernels_on_meta():
        assert run_layer(c, index, "kernels", "none", rows) == sum(s.bytes for s in layer_saved(c, index, rows))


def test_a_whole_model_keeps_its_layers_and_little_else():
    c = tiny(num_nextn_predict_layers=0)
    torch.manual_seed(0)
    model = Ling(c)
    model.init_weights()
    ids = torch.randint(0, c.vocab_size, (ROWS.sequences, ROWS.tokens))
    tables = model.model.rope(ids, 0, None)
    with Kept([*model.parameters(), *model.buffers()]) as found:
        model.model(ids)
    listed = outer_saved(c, ROWS, form="plain") + [s for i in range(8) for s in layer_saved(c, i, ROWS, form="plain")]
    rotation = sum(t.nbytes for t in {id(t): t for t in (*tables.head, *tables.latent)}.values())
    assert found.bytes == sum(s.bytes for s in listed) + rotation
