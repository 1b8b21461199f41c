"""A training step of eight layers, 7 Lightning and 1 MLA, beside the same layers with GQA, and where its time goes.

Layers of a 1B-class model: hidden 2048, 16 heads of 128 (4 key/value heads in GQA), SwiGLU 5632, BF16; activations are
recomputed in the backward pass on both sides. Embedding, head and optimiser are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from openling.bench.case import Case, Floor, Goal
from openling.model.config import LayerKind, ModelConfig
from openling.model.ling import Backbone, CallContext

OPS = ("stack of 8 layers, training step",)
LAYERS = 8
LIGHTNING: LayerKind = "lightning"
MLA: LayerKind = "mla"
GQA: LayerKind = "gqa"
WIDTH = 2048
# Kernel names, or parts of them, by the op they belong to; the first that fits counts.
KERNELS = (
    ("attention (MLA, GQA)", ("cudnn", "flash", "fmha", "sdpa", "mla")),
    ("Lightning", ("scan_kernel", "states_kernel", "fold_kernel", "chunk")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas")),
    ("norms, RoPE, gates, SwiGLU", ("norm", "rope", "gate", "swiglu", "silu", "qkv")),
)


def cases(quick: bool) -> Iterator[Case]:
    """Steps of 32 K tokens as 8 x 4 K and 1 x 32 K, and one of 128 K unless quick."""
    for batch, tokens, ratio in ((8, 4096, None), (1, 32768, 1.5), (1, 131072, 3.0))[: 1 if quick else 3]:
        yield _case(batch, tokens, ratio)


def _case(batch: int, tokens: int, ratio: float | None) -> Case:
    hybrid, teacher = _stack((LIGHTNING,) * 7 + (MLA,)), _stack((GQA,) * LAYERS)
    x = torch.randn(batch, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    ours = partial(_step, hybrid, x)
    mixing = batch * tokens * 16 * (7 * 3.5 * (4 * 64 * 128 + 4 * 128 * 128) + 3.5 * tokens * (192 + 128))
    products = 6 * sum(p.numel() for p in hybrid.layers.parameters() if p.dim() > 1) * batch * tokens
    return Case(
        op="stack of 8 layers, training step",
        shape=f"{batch} x {tokens}",
        ours=ours,
        peer=partial(_step, teacher, x),
        peer_name="the same with GQA (SDPA)",
        floor=Floor(bytes=0, flops=int(mixing + products * 4 / 3)),
        goal=None if ratio is None else Goal(ratio=ratio),
        note=_shares(ours),
    )


def _stack(kinds: tuple[LayerKind, ...]) -> Backbone:
    config = ModelConfig(
        vocab_size=32, hidden_size=WIDTH, intermediate_size=5632, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=4, head_dim=128, layer_kinds=kinds, partial_rotary_factor=0.5, group_norm_size=4, gqa_qk_norm=True,
        q_lora_rank=1024, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Backbone(config).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _step(model: Backbone, x_BTM: Tensor) -> None:
    """Forward and backward of all layers, with recomputation; gradients are made and dropped."""
    ids = torch.zeros(x_BTM.shape[:2], dtype=torch.long, device=x_BTM.device)
    call = CallContext(model.rope(ids, 0, None), None, None)
    h = x_BTM.detach().requires_grad_()
    for layer in model.layers:
        h = checkpoint(layer, h, call, use_reentrant=False)
    h.backward(x_BTM)
    model.zero_grad(set_to_none=True)


def _shares(step: Callable[[], object]) -> str:
    """Share of the GPU's time per op in one step, largest first."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in record.key_averages():
        name = event.key.lower()
        op = next((op for op, parts in KERNELS if any(part in name for part in parts)), "other")
        spent[op] = spent.get(op, 0.0) + event.self_device_time_total
    total = sum(spent.values()) or 1.0
    return ", ".join(f"{op} {100 * us / total:.0f} %" for op, us in sorted(spent.items(), key=lambda item: -item[1]))
