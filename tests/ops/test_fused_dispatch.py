"""The ops in their places: a whole model through the kernels, torch.compile, CUDA graphs, autocast."""

import pytest
import torch

pytest.importorskip("triton")

import openling.ops.fused as fused
import openling.ops.norm as norm
import openling.ops.rope as rope
from openling.model.config import ModelConfig
from openling.model.ling import Ling
from openling.ops import kernels
from openling.ops.rope import rope_frequencies, rope_tables

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOKENS = 9 if CUDA else 5  # Triton's interpreter takes milliseconds a row

on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")

HYBRID = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    layer_kinds=("gqa", "lightning", "mla"),
    gqa_qk_norm=True,
    group_norm_size=2,
    kv_lora_rank=10,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    partial_rotary_factor=0.5,
)


@pytest.mark.parametrize("changes", [{}, {"linear_silu": True, "gqa_qk_norm": False, "use_qkv_bias": True, "q_lora_rank": None}])
def test_a_model_through_the_kernels_equals_the_plain_one(monkeypatch, changes):
    """Logits and all gradients in FP32. Twice the roundings of three layers: 1e-5 of the largest value."""
    torch.manual_seed(0)
    model = Ling(HYBRID.replace(**changes))
    model.init_weights()
    model.to(DEVICE)
    ids = torch.randint(37, (2, TOKENS), device=DEVICE)

    def run():
        model.zero_grad()
        logits = model(ids)
        logits.square().sum().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}

    plain, plain_grads = run()
    called = []
    for module in (fused, norm, rope):
        monkeypatch.setattr(module, "kernels_for", lambda x: called.append(1) or kernels)
    found, grads = run()
    assert len(called) >= 16  # at the least 8 norms and adds, 3 splits and latents, 1 rotation, 1 gate, 3 feed-forwards
    assert (found - plain).abs().max() < 1e-5 * plain.abs().max()
    for name, grad in grads.items():
        assert (grad - plain_grads[name]).abs().max() <= 1e-5 * plain_grads[name].abs().max(), name


@pytest.mark.parametrize("silu", [False, True])
def test_decoding_through_the_kernels_gives_the_plain_logits(monkeypatch, silu):
    """Prefill of a padded batch, single tokens of which one is padding too, a batch that grows: limit as above."""
    torch.manual_seed(0)
    model = Ling(HYBRID.replace(linear_silu=silu))
    model.init_weights()
    model.to(DEVICE)
    ids, mask = torch.randint(37, (3, 9), device=DEVICE), torch.ones(3, 9, dtype=torch.bool, device=DEVICE)
    mask[1, :2] = mask[2, 5] = False

    def decode() -> list[torch.Tensor]:
        cache = model.new_cache()
        logits = [model(ids[:, :4], cache=cache, attention_mask=mask[:, :4])[mask[:, :4]]]
        for t in range(4, 9):
            if t == 7:
                cache.reorder(torch.tensor([2, 0, 2, 1], device=DEVICE))
            rows = slice(None) if t < 7 else [2, 0, 2, 1]
            states = cache.layers[1].state
            logits.append(model(ids[rows, t : t + 1], cache=cache, attention_mask=mask[rows, t : t + 1])[mask[rows, t]])
            in_place.append(cache.layers[1].state is states)
            if in_place[-1]:
                assert not cache.layers[1].counting[0].any()
        return logits

    in_place: list[bool] = []
    with torch.inference_mode():
        plain = decode()
        for module in (fused, norm, rope):
            monkeypatch.setattr(module, "kernels_for", lambda x: kernels)
        found = decode()
    assert in_place == 5 * [False] + 5 * [True]
    for a, b in zip(found, plain, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_gradients_through_a_cache_do_not_meet_the_decode_kernel(monkeypatch):
    model = Ling(HYBRID).to(DEVICE)
    for module in (fused, norm, rope):
        monkeypatch.setattr(module, "kernels_for", lambda x: kernels)
    cache = model.new_cache()
    for _ in range(2):
        logits = model(torch.zeros(1, 1, dtype=torch.long, device=DEVICE), cache=cache)
    assert cache.layers[1].counting is None
    assert logits.requires_grad


def every_op(x_BTC, weight_D, weight_C, h_BTM, q, kv, shared, tables):
    """A scalar through all kernels: two heads of 16 dims, C = 96."""
    a, b, v = kernels.split_norm_rope(x_BTC, (weight_D, weight_D * 2), tables, 2, 2, 1e-6, False)
    gated = kernels.gated_group_norm(torch.cat((a, b, v), 2).flatten(2), x_BTC, weight_C, 1e-6, 3)
    h, y = kernels.add_rms_norm(h_BTM, gated, weight_C, 1e-6, h_BTM.dtype)
    y = kernels.rms_norm(kernels.swiglu(y, h), weight_C, 1e-6, h_BTM.dtype)
    packed = kernels.swiglu_packed(torch.cat((y, h), -1))
    parts = kernels.latent_qkv(q, kv, shared, tables)
    turned = kernels.apply_rope(v, *tables, False)
    return packed.float().mean() + sum(p.float().square().mean() for p in (*parts, turned))


def inputs(tokens, dtype):
    g = torch.Generator().manual_seed(0)
    shapes = ((2, tokens, 96), (16,), (96,), (2, tokens, 96), (2, tokens, 2, 24), (2, tokens, 2, 32), (2, tokens, 8))
    tensors = [torch.randn(*s, generator=g).to(DEVICE, dtype).requires_grad_() for s in shapes]
    turns = rope_tables(torch.arange(tokens)[None], *rope_frequencies(8, 1e4))
    return [*tensors, tuple(x.to(DEVICE) for x in turns)]


def test_compiles_without_a_graph_break_to_the_same_bits():
    call = inputs(3, torch.float32)
    expected = every_op(*call)
    expected_grads = torch.autograd.grad(expected, call[:-1])
    found = torch.compile(every_op, backend="aot_eager", fullgraph=True)(*call)
    grads = torch.autograd.grad(found, call[:-1])
    assert torch.equal(found, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.equal(a, b)


@on_gpu
def test_a_cuda_graph_replays_forward_and_backward():
    call = inputs(33, torch.bfloat16)

    def step():
        return torch.autograd.grad(every_op(*call), call[:-1])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in call[:-1]:
            x.copy_(x.flip(0))
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert torch.equal(a, b)


@on_gpu
def test_an_fp32_stream_under_autocast_is_normed_into_bf16():
    x, weight = torch.randn(2, 5, 64, device="cuda"), torch.ones(64, device="cuda")
    assert norm.rms_norm(x, weight, 1e-6).dtype == torch.float32
    with torch.autocast("cuda", torch.bfloat16):
        assert norm.rms_norm(x, weight, 1e-6).dtype == torch.bfloat16
        h, y = fused.add_rms_norm(x, x.bfloat16(), weight, 1e-6)
        assert (h.dtype, y.dtype) == (torch.float32, torch.bfloat16)


def test_without_a_gpu_or_in_fp32_the_plain_form_runs():
    x = torch.randn(2, 5, 64, device=DEVICE)
    assert norm.stream_kernels(x) == (None, torch.float32)
    assert fused.kernels_for(x) is None
