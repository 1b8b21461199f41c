"""Counts against published figures and against the real model: its parameters, its cache, its FLOPs, its saved activations."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openling.config.presets import PRESETS
from openling.errors import UserError
from openling.model import count
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import CallContext, Ling
from openling.ops import attention
from openling.ops.lightning import CHUNK


def preset(name: str) -> ModelConfig:
    return read_config(PRESETS[name]())


# Published: Ling-2.6 report and cards (104 B, 7.4 B, 1T, 63 B), GGUF metadata of Ling-1T (999.705 B); digits beyond those
# from the tensor shapes of the released layout. (total, MTP layer, active), in 1e9 parameters.
PUBLISHED = {
    "ling-2.6-flash": (104.187, 3.307, 7.45),
    "ling-2.6-1t": (1012.231, 13.183, 63.58),
    "ling-1t": (999.705, 0.0, 51.05),
    "ling-flash-2.0": (102.890, 0.0, 6.15),
    "ling-mini-2.0": (16.256, 0.0, 1.43),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    total, mtp, active = PUBLISHED[name]
    c = preset(name)
    assert round(count.total_parameters(c) / 1e9, 3) == total
    assert round((count.total_parameters(c, mtp=True) - count.total_parameters(c)) / 1e9, 3) == mtp
    assert round(count.active_parameters(c) / 1e9, 2) == active


@pytest.mark.parametrize(
    ("name", "source", "published"),
    [("ling-2.6-1t", "ling-1t", (335.55, 111.68, 151.00)), ("ling-2.6-flash", "ling-flash-2.0", (83.89, 39.06, 37.75))],
)
def test_published_attention_parameters_per_layer(name, source, published):
    hybrid, teacher = preset(name), preset(source)
    lightning, mla = (count.size(count.mixer_shapes(hybrid, kind)) for kind in ("lightning", "mla"))
    counted = (lightning, mla, count.size(count.mixer_shapes(teacher, "gqa")))
    assert tuple(round(x / 1e6, 2) for x in counted) == published


def real_parameters(c: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Ling(c).parameters())


@pytest.mark.parametrize("name", sorted({make: name for name, make in PRESETS.items()}.values()))
def test_total_equals_the_real_model_for_every_preset(name):
    c = preset(name)
    assert count.total_parameters(c, mtp=True) == real_parameters(c)


@st.composite
def small_configs(draw: st.DrawFn) -> ModelConfig:
    """Any mixture of layer kinds, biases, ties, norms, experts and MTP."""
    flags = {name: draw(st.booleans()) for name in ("tie_word_embeddings", "use_qkv_bias", "use_bias", "mlp_bias", "gqa_qk_norm")}
    layers = draw(st.integers(1, 4))
    kinds = tuple(draw(st.lists(st.sampled_from(("gqa", "lightning", "mla")), min_size=layers, max_size=layers)))
    kv_heads = draw(st.sampled_from((1, 2, 4)))
    return ModelConfig(
        vocab_size=draw(st.integers(10, 40)),
        hidden_size=draw(st.integers(8, 40)),
        intermediate_size=draw(st.integers(1, 50)),
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from((8, 16))),
        layer_kinds=kinds,
        use_qk_norm=draw(st.booleans()),
        group_norm_size=draw(st.sampled_from((1, 2, 4))),
        q_lora_rank=draw(st.sampled_from((None, 12, 20))),
        kv_lora_rank=draw(st.integers(4, 20)),
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=draw(st.sampled_from((8, 12))),
        moe_layers=tuple(i for i in range(layers) if draw(st.booleans())),
        num_experts=4,
        num_experts_per_tok=2,
        num_shared_experts=(shared := draw(st.integers(0, 2))),
        moe_intermediate_size=6,
        moe_shared_expert_intermediate_size=6 * shared,
        moe_router_enable_expert_bias=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        mtp_layer_kind=draw(st.sampled_from(("gqa", "mla"))),
        **flags,
    )


@settings(max_examples=100, deadline=None)
@given(small_configs())
def test_total_equals_the_real_model_for_any_config(c):
    assert count.total_parameters(c, mtp=True) == real_parameters(c)
    without = c.replace(num_nextn_predict_layers=0)
    assert count.total_parameters(c) == real_parameters(without)
    # Active: the same model with no more experts than a token uses, but the router's rows of all of them.
    fewer = without.replace(num_experts=c.num_experts_per_tok)
    dropped_rows = len(c.moe_layers) * (c.num_experts - c.num_experts_per_tok) * c.hidden_size
    assert count.active_parameters(c) == real_parameters(fewer) + dropped_rows


def small(kinds: tuple[str, ...], **changes) -> ModelConfig:
    """Tiny preset with given layer kinds, no MTP."""
    return preset("tiny").replace(
        **{"num_hidden_layers": len(kinds), "layer_kinds": kinds, "moe_layers": (1,), "num_nextn_predict_layers": 0} | changes
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cache_and_state_bytes_equal_the_real_cache(kv_heads):
    c = small(("gqa", "lightning", "mla", "lightning"), num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    model, batch, tokens = Ling(c), 2, 37
    model.init_weights()
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.randint(0, c.vocab_size, (batch, tokens)), cache=cache)
    per_sequence = count.state_bytes_per_sequence(c) + tokens * count.kv_bytes_per_token(c, dtype_bytes=4)
    assert cache.nbytes == batch * per_sequence


def test_break_even_and_cache_at_1t():
    hybrid, source = preset("ling-2.6-1t"), preset("ling-1t")
    assert count.kv_bytes_per_token(source) == 320 * 1024
    assert count.kv_bytes_per_token(hybrid) == 11.25 * 1024
    assert count.state_bytes_per_sequence(hybrid) == 280 * 2**20
    assert count.state_bytes_per_sequence(preset("ling-2.6-flash")) == 56 * 2**20
    assert count.break_even_tokens(hybrid, source) == 929
    assert count.break_even_tokens(hybrid, source, state_dtype_bytes=2) == 464
    assert count.break_even_tokens(source, hybrid) is None  # the cache that grows faster never wins


@pytest.mark.parametrize("kinds", [("gqa", "gqa"), ("mla", "mla"), ("lightning", "lightning"), ("lightning", "mla")])
def test_flops_equal_torch_s_own_count(kinds, monkeypatch):
    """Torch counts attention without the causal half, so T tokens cost T times the token at position T.

    The math backend, because the CPU's fused attention is unknown to the counter, and blocks leave half of it out.
    """
    monkeypatch.setattr(attention, "BLOCKWISE_TOKENS", 10**9)
    c = small(kinds, num_key_value_heads=2)
    model, tokens = Ling(c), 2 * CHUNK
    model.init_weights()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long))
    assert counter.get_total_flops() == tokens * count.forward_flops(c, tokens).total


def test_attention_passes_60_percent_of_flops_beyond_32k_in_the_gqa_model():
    """The report's reason for the hybrid (arXiv 2606.15079, page 2)."""
    share = [f.attention / f.total for f in (count.forward_flops(preset("ling-1t"), t) for t in (4096, 32768, 36000))]
    assert share[0] < 0.4 < 0.59 < share[1] < 0.60 < share[2]
    assert count.LIGHTNING_CHUNK == CHUNK


def test_conversion_moves_attention_only():
    """Published arithmetic at 1T: 12.1 B of teacher attention in BF16 read, 24.6 B of new attention written."""
    moved = count.conversion_bytes(preset("ling-1t"), preset("ling-2.6-1t"))
    assert (round(moved.read / 1e9, 1), round(moved.written / 1e9, 1)) == (24.2, 49.2)
    c = small(("gqa", "gqa"), tie_word_embeddings=True)
    untied = count.conversion_bytes(c, c.replace(tie_word_embeddings=False))
    assert untied.read == untied.written == 2 * c.vocab_size * c.hidden_size


@pytest.mark.parametrize("kind", ["gqa", "lightning", "mla"])
@pytest.mark.parametrize("layer", [0, 1])
def test_block_activations_are_what_autograd_saves(kind, layer):
    """A stated estimate, so a wide band: 40 % either way, on widths in the proportions of the released models (BF16)."""
    c = small(
        (kind, kind),
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=1536,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        num_experts=16,
        num_experts_per_tok=8,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=128,
    )
    torch.manual_seed(0)
    model, tokens = Ling(c).bfloat16(), 256
    model.init_weights()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    h = torch.randn(1, tokens, c.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    call = CallContext(model.model.rope(torch.zeros(1, tokens, dtype=torch.long), 0, None), None, None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model.layers[layer](h, call)
    assert out.requires_grad
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) / tokens
    assert 0.6 < measured / count.block_activation_bytes(c, layer) < 1.4


def test_training_memory_of_one_gpu_is_18_bytes_per_parameter():
    c = preset("smollm2-135m")
    memory = count.training_memory(c, count.Mesh(), seq_len=1024, micro_batch=2)
    assert memory.parameters + memory.gradients + memory.optimizer == 18 * real_parameters(c)
    assert memory.logits == 10 * 2048 * c.vocab_size
    assert memory.gathered == 0
    assert memory.total == sum(dataclasses.astuple(memory))


@pytest.mark.parametrize("mesh", [count.Mesh(dp=8), count.Mesh(dp=4, tp=2, ep=8), count.Mesh(dp=2, tp=2, pp=4, ep=4)])
def test_sharding_divides_the_states_and_loses_none(mesh):
    """The fullest of pp equal-depth stages holds at least its share, and all states at most on every GPU."""
    c = preset("ling-2.6-flash")
    memory = count.training_memory(c, mesh)
    states, everything = memory.parameters + memory.gradients + memory.optimizer, 18 * count.total_parameters(c, mtp=True)
    assert everything / mesh.world <= states + 18  # + 18: rounding up to one parameter
    assert states < 1.3 * everything / mesh.world  # the last stage carries the head and the MTP layer besides its layers


def test_smallest_data_parallel_is_the_first_that_fits():
    c, sizes, budget = preset("ling-2.6-flash"), {"seq_len": 4096, "micro_batch": 1}, 80 * 10**9
    dp = count.smallest_data_parallel(c, count.Mesh(), budget, **sizes)
    assert count.training_memory(c, count.Mesh(dp=dp), **sizes).total <= budget
    assert count.training_memory(c, count.Mesh(dp=dp // 2), **sizes).total > budget
    assert count.smallest_data_parallel(preset("ling-1t"), count.Mesh(), budget, **sizes) is None


@pytest.mark.parametrize(
    ("mesh", "where"),
    [
        (count.Mesh(dp=0), "--dp"),
        (count.Mesh(tp=5), "--tp"),
        (count.Mesh(tp=8), "--tp"),  # divides the 32 heads, but cuts the 4 norm groups
        (count.Mesh(pp=33), "--pp"),
        (count.Mesh(dp=3, ep=3), "--ep"),
        (count.Mesh(dp=2, ep=4), "--ep"),
    ],
)
def test_impossible_meshes_are_refused(mesh, where):
    with pytest.raises(UserError) as caught:
        count.training_memory(preset("ling-2.6-flash"), mesh)
    assert caught.value.parts["where"] == where
