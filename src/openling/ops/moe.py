"""Mixture of experts: FP32 router with group-limited top-k, and the weighted sum of expert outputs.

`moe` is a layer's whole routed part, `route` and `swiglu_experts` its two halves. On GPUs they run as kernels
(`kernels.moe_ops`), which compute in FP32 between half-precision products; FP32 activations under autocast are rounded first,
for the router as well.
Legend: N tokens, E experts, G groups, k experts per token, M model width, F expert width.
Sources: Ling-V2 model code; group-limited "noaux_tc" selection as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openling.ops.norm import stream_kernels
from openling.ops.rows import linear_rows, sigmoid_rows, silu_rows


def route(
    x_NM: Tensor,
    weight_EM: Tensor,
    expert_bias_E: Tensor | None,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score_function: str = "sigmoid",
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Weights float32 [N, k] and expert indices [N, k].

    Scores are FP32 sigmoid or softmax of x @ W^T. The bias shifts the selection only, never the weights. Each group is
    scored by the sum of its two best biased scores; only the best `topk_group` groups compete. The kernels list a token's
    experts from the best score down, equal ones by number; the plain form promises no order and decides ties as topk does.
    """
    fast, half = stream_kernels(x_NM)
    if fast is not None and x_NM.shape[0]:
        how = (top_k, n_group, topk_group, score_function, norm_topk_prob, scaling_factor)
        return fast.route(x_NM.to(half), weight_EM, expert_bias_E, *how)[:2]
    with torch.autocast(x_NM.device.type, enabled=False):
        dtype = torch.float64 if x_NM.dtype == torch.float64 else torch.float32
        logits = linear_rows(x_NM.to(dtype), weight_EM.to(dtype))
        scores = sigmoid_rows(logits) if score_function == "sigmoid" else logits.softmax(-1)
        choice = scores if expert_bias_E is None else scores + expert_bias_E.to(dtype)
        if n_group > 1:
            grouped = choice.unflatten(-1, (n_group, -1))
            group_score = grouped.topk(2, dim=-1).values.sum(-1)
            best = group_score.topk(topk_group, dim=-1, sorted=False).indices
            allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter(-1, best, True)
            choice = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
        index = choice.topk(top_k, dim=-1, sorted=False).indices
        weight = scores.gather(-1, index)
        if norm_topk_prob and top_k > 1:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
        return weight * scaling_factor, index


def combine_experts(
    x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor, num_experts: int, run_expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum of weight * expert(x) over the chosen experts, accumulated in FP32, returned in x's dtype [N, M].

    Tokens are sorted by expert once, so that `run_expert(e, tokens)` sees each expert's tokens as one matrix.
    """
    dtype = torch.float64 if x_NM.dtype == torch.float64 else torch.float32
    flat = index_Nk.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    pieces = _Sent.apply(x_NM, order, places, index_Nk.shape[1]).split(counts)
    found = [run_expert(expert, piece) for expert, piece in enumerate(pieces) if counts[expert]]
    if not found:
        return torch.zeros_like(x_NM)
    rows_NkM = _Returned.apply(torch.cat(found), order, places).unflatten(0, index_Nk.shape)
    return (rows_NkM.to(dtype) * weight_Nk.to(dtype)[..., None]).sum(1).to(x_NM.dtype)


class _Sent(torch.autograd.Function):
    """Rows [N, M] to [N k, M], sorted by expert: `order` holds the N k choices expert by expert, `places` where each of them is.

    Both ways only gather: PyTorch's gradient of an index adds row by row.
    """

    @staticmethod
    def forward(ctx: Any, x_NM: Tensor, order: Tensor, places: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.top_k = top_k
        return x_NM.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Returned(torch.autograd.Function):
    """Rows of `_Sent`, each back at the place of its choice."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


def swiglu_experts(
    x_NM: Tensor, weight_Nk: Tensor, index_Nk: Tensor, gate_EFM: Tensor, up_EFM: Tensor, down_EMF: Tensor
) -> Tensor:
    """Weighted sum of down(silu(gate(x)) * up(x)) over the chosen experts [N, M]; gradients for all but the indices."""
    fast, half = stream_kernels(x_NM)
    if fast is not None and x_NM.shape[0]:
        return fast.experts(x_NM.to(half), weight_Nk, index_Nk, gate_EFM, up_EFM, down_EMF)

    # Unbound at once: the gradient of one expert taken from a stack would be a stack of zeros and that expert, for every expert.
    gates, ups, downs = (w.unbind() for w in (gate_EFM, up_EFM, down_EMF))

    def run(expert: int, x: Tensor) -> Tensor:
        inner = silu_rows(linear_rows(x, gates[expert])) * linear_rows(x, ups[expert])
        return linear_rows(inner, downs[expert])

    return combine_experts(x_NM, weight_Nk, index_Nk, gate_EFM.shape[0], run)


def block_fp8_experts(
    x_NM: Tensor,
    weight_Nk: Tensor,
    index_Nk: Tensor,
    experts: tuple[Tensor, Tensor, Tensor],
    scales: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """`swiglu_experts` for gate, up and down in block FP8, without gradients.

    experts: e4m3 [E, F, M], [E, F, M] and [E, M, F]; scales: FP32, one per 128 x 128 (the checkpoints' `weight_scale_inv`). On
    GPUs more than a few tokens are quantised to e4m3 as well, per 128 columns; the plain form dequantises the weights.
    """
    fast, half = stream_kernels(x_NM)
    if fast is not None and x_NM.shape[0]:
        return fast.block_fp8_experts(x_NM.to(half), weight_Nk, index_Nk, *experts, *scales)
    wide = [dequantize_blocks(w, scale, x_NM.dtype) for w, scale in zip(experts, scales, strict=True)]
    return swiglu_experts(x_NM, weight_Nk, index_Nk, *wide)


def dequantize_blocks(weight_ERC: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight times the scale of its 128 x 128 block, in `dtype`; blocks at the right and lower edge may be smaller."""
    rows, columns = weight_ERC.shape[-2:]
    full = scale.repeat_interleave(128, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :columns]
    return (weight_ERC.to(full.dtype) * full).to(dtype)


def moe(
    x_NM: Tensor,
    router_EM: Tensor,
    expert_bias_E: Tensor | None,
    gate_EFM: Tensor,
    up_EFM: Tensor,
    down_EMF: Tensor,
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    score_function: str = "sigmoid",
    norm_topk_prob: bool = True,
    scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """`swiglu_experts(x, *route(x))` [N, M], and how many tokens chose each expert [E] (integers on x's device).

    The kernels add the tokens' gradients through the experts and through the router in one pass. A few tokens without gradients
    run as a stream of weights, whose tokens are not counted.
    """
    fast, half = stream_kernels(x_NM)
    if fast is not None and x_NM.shape[0]:
        how = (top_k, n_group, topk_group, score_function, norm_topk_prob, scaling_factor)
        return fast.mixture(x_NM.to(half), router_EM, expert_bias_E, gate_EFM, up_EFM, down_EMF, *how)
    weight, index = route(
        x_NM,
        router_EM,
        expert_bias_E,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        score_function=score_function,
        norm_topk_prob=norm_topk_prob,
        scaling_factor=scaling_factor,
    )
    return swiglu_experts(x_NM, weight, index, gate_EFM, up_EFM, down_EMF), count_tokens(index, gate_EFM.shape[0])


def count_tokens(index_Nk: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert, [E]; without the synchronisation of bincount."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=index_Nk.device)
    return counts.scatter_add_(0, index_Nk.flatten(), torch.ones_like(index_Nk.flatten()))
