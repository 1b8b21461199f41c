"""The router: FP32 logits from half-precision products, group-limited top-k, and the gradients of both.

Logits. The tokens are half precision, the router's weight is FP32. Split into three BF16 terms, w = w1 + w2 + w3, each the
rounded remainder of the ones before, a weight is exact to 2^-25 of itself; products of BF16 numbers are exact in FP32, so three
BF16 matrix products give what one FP32 product gives, at a tenth of its time. Half-precision weights need one term. FP16 tokens
are no BF16 numbers: both operands then go through TF32 in three products.

Choice. Like `ops.moe.route`, and defined where it is not: experts come in descending order of their biased scores, and of equal
ones the lowest number first; the same rule chooses among groups. A NaN loses against every number.

Gradients. Only the weights carry one, so dlogits is computed from the k chosen scores and written as two BF16 terms: their sum is
exact to 2^-17, which the weight's gradient (a sum over all tokens into FP32) uses; the tokens' gradient, which is rounded to half
precision anyway, uses the first alone.

Twin: `ops.moe.route`. Legend: N tokens, E experts, G groups, S experts per group, k experts per token, M model width, Q terms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from openling.ops.pick import batch_invariant


class RouteSpec(NamedTuple):
    """How experts are chosen; the arguments of `ops.moe.route`."""

    top_k: int
    n_group: int
    topk_group: int
    score_function: str
    norm_topk_prob: bool
    scaling_factor: float


# ---------------------------------------------------------------------------------------------------------------------
# Logits
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _split_kernel(weight, terms_Q, count, TERMS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(weight + at, mask=at < count, other=0.0).to(tl.float32)
    for q in tl.static_range(TERMS):
        term = rest.to(terms_Q.dtype.element_ty)
        tl.store(terms_Q + q * count + at, term, mask=at < count)
        rest -= term.to(tl.float32)


def split_terms(weight_EM: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """The weight as a sum of `terms` tensors of `dtype`, largest first: [Q, E, M]."""
    out = torch.empty((terms, *weight_EM.shape), dtype=dtype, device=weight_EM.device)
    count = weight_EM.numel()
    _split_kernel[(triton.cdiv(count, 1024),)](weight_EM.contiguous(), out, count, terms, 1024)
    return out


@triton.jit
def _logits_kernel(
    x_NM, terms_QEM, logits_NE, N, M, E,
    TERMS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of tokens, block of experts). The terms follow each other along the depth, smallest first."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    x_at = x_NM + n.to(tl.int64)[:, None] * M
    steps = tl.cdiv(M, DEPTH)
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for step in range(TERMS * steps):
        m = (step % steps) * DEPTH + tl.arange(0, DEPTH)
        term = TERMS - 1 - step // steps
        x = tl.load(x_at + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
        w = tl.load(terms_QEM + (term * E + e)[:, None] * M + m[None, :], mask=(e < E)[:, None] & (m < M)[None, :], other=0.0)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    at = logits_NE + n.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(at, total, mask=(n < N)[:, None] & (e < E)[None, :])


class LogitsTile(NamedTuple):
    """Tile of the logits' product, its warps and the loads in flight."""

    tokens: int = 128
    experts: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 4


def logits_tile(tokens: int, experts: int) -> LogitsTile:
    """Whole rows of up to 256 experts, so that tokens are read once; small tiles where there are few tokens.

    In batch-invariant mode one tile for any number of tokens, so that a token's logits do not depend on it.
    """
    width = min(256, max(16, triton.next_power_of_2(experts)))
    if tokens <= 128 * 16 and not batch_invariant():
        return LogitsTile(64, min(32, width), 64, 4, 4)
    return LogitsTile(128, width, 64, 8 if width > 64 else 4, 4)


def logits_candidates() -> list[LogitsTile]:
    """Tiles worth measuring at many tokens and 256 experts."""
    return [
        LogitsTile(),
        LogitsTile(stages=3),
        LogitsTile(128, 128, 64, 8, 4),
        LogitsTile(128, 128, 64, 4, 3),
        LogitsTile(64, 256),
    ]


def route_logits(x_NM: Tensor, terms_QEM: Tensor, tile: LogitsTile | None = None) -> Tensor:
    """x @ (sum of terms)^T in FP32 accumulation, [N, E]."""
    tokens, width = x_NM.shape
    terms, experts, _ = terms_QEM.shape
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x_NM.device)
    t = tile or logits_tile(tokens, experts)
    precision = "tf32x3" if x_NM.dtype == torch.float16 else "ieee"
    if x_NM.dtype == torch.float16:
        x_NM = x_NM.float()
        t = LogitsTile(64, 64, 32, 4, 2)
    if tokens:
        _logits_kernel[(triton.cdiv(tokens, t.tokens), triton.cdiv(experts, t.experts))](
            x_NM, terms_QEM, out, tokens, width, experts, terms, t.tokens, t.experts, t.depth, precision,
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out


def weight_terms(weight_EM: Tensor, dtype: torch.dtype) -> Tensor:
    """The terms that `route_logits` needs for tokens of `dtype`: three for FP32 weights, one for BF16 ones."""
    if dtype == torch.bfloat16:
        return split_terms(weight_EM, 1 if weight_EM.dtype == torch.bfloat16 else 3, torch.bfloat16)
    return weight_EM.float()[None]


# ---------------------------------------------------------------------------------------------------------------------
# Choice
# ---------------------------------------------------------------------------------------------------------------------


TAKEN = tl.constexpr(-(2**31))  # below the key of every number


@triton.jit
def _ordered(x):
    """Integers in the order of the floats x, equal for equal ones."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _winner(key, number, NONE: tl.constexpr):
    """The lowest number among those with the highest key, along axis 1."""
    return tl.min(tl.where(key == tl.max(key, 1)[:, None], number, NONE), 1)


@triton.jit
def choose_block(
    logits_NE, bias_E, n, N, E, scaling,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """Weights and expert numbers [TOKENS, CHOICES] of the tokens n; scores lie as [tokens, groups, experts of the group].

    All extents are padded to powers of two. Choices from TOP_K on have weight 0 and number -1.
    """
    n64 = n.to(tl.int64)
    size = E // GROUPS
    group, member = tl.arange(0, G), tl.arange(0, S)
    expert = group[:, None] * size + member[None, :]
    real = (group < GROUPS)[:, None] & (member < size)[None, :]
    mask = (n < N)[:, None, None] & real[None, :, :]
    logit = tl.load(logits_NE + n64[:, None, None] * E + expert[None, :, :], mask=mask, other=float("-inf"))
    top = tl.zeros((TOKENS,), tl.float32)
    total = top + 1.0
    if SIGMOID:
        choice = 1.0 / (1.0 + tl.exp(-logit))
    else:
        top = tl.max(tl.max(logit, 2), 1)
        choice = tl.exp(logit - top[:, None, None])
        total = tl.sum(tl.sum(choice, 2), 1)
        choice /= total[:, None, None]
    if BIASED:
        choice += tl.load(bias_E + expert, mask=real, other=0.0)[None, :, :]
    choice = tl.where(real[None, :, :] & (choice == choice), choice, float("-inf"))
    key = tl.where(real[None, :, :], _ordered(choice), TAKEN)
    if KEPT < GROUPS:
        first = tl.max(choice, 2)
        best = tl.min(tl.where(choice == first[:, :, None], member[None, None, :], S), 2)
        second = tl.max(tl.where(member[None, None, :] == best[:, :, None], float("-inf"), choice), 2)
        group_key = tl.where((group < GROUPS)[None, :], _ordered(first + second), TAKEN)
        for _ in tl.static_range(KEPT):
            group_key = tl.where(group[None, :] == _winner(group_key, group[None, :], G)[:, None], TAKEN, group_key)
        lost = (group_key != TAKEN)[:, :, None] & real[None, :, :]
        key = tl.where(lost, _ordered(tl.full((1, 1, 1), float("-inf"), tl.float32)), key)
    key = tl.reshape(key, (TOKENS, G * S))
    slot = tl.arange(0, G * S)
    number = (slot // S) * size + slot % S
    column = tl.arange(0, CHOICES)
    weight = tl.zeros((TOKENS, CHOICES), tl.float32)
    index = tl.full((TOKENS, CHOICES), -1, tl.int32)
    for j in tl.static_range(TOP_K):
        winner = _winner(key, number[None, :], G * S)
        key = tl.where(number[None, :] == winner[:, None], TAKEN, key)
        # The score from its logit, which the cache still holds: cheaper than to carry all scores along.
        logit_j = tl.load(logits_NE + n64 * E + winner, mask=n < N, other=0.0)
        score = 1.0 / (1.0 + tl.exp(-logit_j)) if SIGMOID else tl.exp(logit_j - top) / total
        weight = tl.where(column[None, :] == j, score[:, None], weight)
        index = tl.where(column[None, :] == j, winner[:, None], index)
    if NORM and TOP_K > 1:
        weight /= (tl.sum(weight, 1) + 1e-20)[:, None]
    return weight * scaling, index


@triton.jit
def _choose_kernel(
    logits_NE, bias_E, weight_Nk, index_Nk, N, E, scaling,
    TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIGMOID: tl.constexpr, NORM: tl.constexpr,
    BIASED: tl.constexpr, TOKENS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    weight, index = choose_block(
        logits_NE, bias_E, n, N, E, scaling, TOP_K, GROUPS, KEPT, SIGMOID, NORM, BIASED, TOKENS, G, S, CHOICES
    )
    column = tl.arange(0, CHOICES)
    at = n.to(tl.int64)[:, None] * TOP_K + column[None, :]
    mask = (n < N)[:, None] & (column < TOP_K)[None, :]
    tl.store(weight_Nk + at, weight, mask=mask)
    tl.store(index_Nk + at, index.to(index_Nk.dtype.element_ty), mask=mask)


def padded_groups(experts: int, groups: int) -> tuple[int, int]:
    """Groups and experts per group as powers of two."""
    return triton.next_power_of_2(groups), max(2, triton.next_power_of_2(experts // groups))


CHOOSE = (1024, 1)  # scores of a program, warps: one warp needs no shared memory for its reductions


def choose(
    logits_NE: Tensor, bias_E: Tensor | None, spec: RouteSpec, tile: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Weights float32 [N, k] and expert numbers int64 [N, k]."""
    scores, warps = tile or CHOOSE
    tokens, experts = logits_NE.shape
    weight = torch.empty(tokens, spec.top_k, dtype=torch.float32, device=logits_NE.device)
    index = torch.empty(tokens, spec.top_k, dtype=torch.int64, device=logits_NE.device)
    groups, members = padded_groups(experts, spec.n_group)
    block = max(1, scores // (groups * members))
    if tokens:
        _choose_kernel[(triton.cdiv(tokens, block),)](
            logits_NE, logits_NE if bias_E is None else bias_E.float(), weight, index, tokens, experts, spec.scaling_factor,
            TOP_K=spec.top_k, GROUPS=spec.n_group, KEPT=spec.topk_group, SIGMOID=spec.score_function == "sigmoid",
            NORM=spec.norm_topk_prob, BIASED=bias_E is not None, TOKENS=block, G=groups, S=members,
            CHOICES=triton.next_power_of_2(spec.top_k), num_warps=warps,
        )  # fmt: skip
    return weight, index


# ---------------------------------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _dlogits_softmax_kernel(
    logits_NE, index_Nk, dweight_Nk, high_NE, low_NE, N, E, scaling,
    TOP_K: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Softmax: every logit of a token moves all of its scores."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    n64 = n.to(tl.int64)
    mask = (n < N)[:, None] & (e < E)[None, :]
    logit = tl.load(logits_NE + n64[:, None] * E + e[None, :], mask=mask, other=float("-inf"))
    score = tl.exp(logit - tl.max(logit, 1)[:, None])
    score /= tl.sum(score, 1)[:, None]
    # weight_j = scaling * s_j / total: ds_j = scaling * (dweight_j / total - sum_i dweight_i s_i / total^2).
    dscore = tl.zeros((TOKENS, EXPERTS), tl.float32)
    chosen = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for j in tl.static_range(TOP_K):
        expert = tl.load(index_Nk + n64 * TOP_K + j, mask=n < N, other=-1).to(tl.int32)
        dweight = tl.load(dweight_Nk + n64 * TOP_K + j, mask=n < N, other=0.0) * scaling
        hit = e[None, :] == expert[:, None]
        dscore += tl.where(hit, dweight[:, None], 0.0)
        chosen += tl.where(hit, 1.0, 0.0)
    if NORM and TOP_K > 1:
        total = tl.sum(score * chosen, 1) + 1e-20
        pull = tl.sum(score * dscore, 1) / total
        dscore = (dscore - chosen * pull[:, None]) / total[:, None]
    dlogit = score * (dscore - tl.sum(score * dscore, 1)[:, None])
    at = n64[:, None] * E + e[None, :]
    high = dlogit.to(high_NE.dtype.element_ty)
    tl.store(high_NE + at, high, mask=mask)
    tl.store(low_NE + at, (dlogit - high.to(tl.float32)).to(low_NE.dtype.element_ty), mask=mask)


@triton.jit
def _dlogits_sigmoid_kernel(
    logits_NE, index_Nk, dweight_Nk, high_NE, low_NE, N, E, scaling,
    TOP_K: tl.constexpr, NORM: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """A sigmoid's gradient stays with its own logit: zeros everywhere, then the k chosen ones."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e, j = tl.arange(0, EXPERTS), tl.arange(0, CHOICES)
    row = n.to(tl.int64)[:, None]
    everywhere = (n < N)[:, None] & (e < E)[None, :]
    zeros = tl.zeros((TOKENS, EXPERTS), high_NE.dtype.element_ty)
    tl.store(high_NE + row * E + e[None, :], zeros, mask=everywhere)
    tl.store(low_NE + row * E + e[None, :], zeros, mask=everywhere)
    mask = (n < N)[:, None] & (j < TOP_K)[None, :]
    expert = tl.load(index_Nk + row * TOP_K + j[None, :], mask=mask, other=0).to(tl.int32)
    dscore = tl.load(dweight_Nk + row * TOP_K + j[None, :], mask=mask, other=0.0) * scaling
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits_NE + row * E + expert, mask=mask, other=float("-inf"))))
    if NORM and TOP_K > 1:
        total = tl.sum(score, 1)[:, None] + 1e-20
        dscore = (dscore - tl.sum(score * dscore, 1)[:, None] / total) / total
    dlogit = dscore * score * (1.0 - score)
    high = dlogit.to(high_NE.dtype.element_ty)
    tl.debug_barrier()  # the zeros come first
    tl.store(high_NE + row * E + expert, high, mask=mask)
    tl.store(low_NE + row * E + expert, (dlogit - high.to(tl.float32)).to(low_NE.dtype.element_ty), mask=mask)


def route_dlogits(dweight_Nk: Tensor, logits_NE: Tensor, index_Nk: Tensor, spec: RouteSpec, dtype: torch.dtype) -> Tensor:
    """Gradient of the logits as the sum of two terms of `dtype`: [2, N, E]."""
    tokens, experts = logits_NE.shape
    out = torch.empty((2, tokens, experts), dtype=dtype, device=logits_NE.device)
    padded = triton.next_power_of_2(experts)
    if tokens and spec.score_function == "sigmoid":
        block = max(1, 8192 // padded)
        _dlogits_sigmoid_kernel[(triton.cdiv(tokens, block),)](
            logits_NE, index_Nk, dweight_Nk.contiguous(), *out, tokens, experts, spec.scaling_factor,
            spec.top_k, spec.norm_topk_prob, block, padded, triton.next_power_of_2(spec.top_k), num_warps=4,
        )  # fmt: skip
    elif tokens:
        block = max(1, 2048 // padded)
        _dlogits_softmax_kernel[(triton.cdiv(tokens, block),)](
            logits_NE, index_Nk, dweight_Nk.contiguous(), *out, tokens, experts, spec.scaling_factor,
            spec.top_k, spec.norm_topk_prob, block, padded,
        )  # fmt: skip
    return out


@triton.jit
def _dweight_kernel(
    high_NE, low_NE, x_NM, partial_PEM, N, M, E, share,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of experts, block of columns, share of the tokens): dlogits^T @ x over that share."""
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    m = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(2)
    begin = part * share
    end = tl.minimum(begin + share, N)
    total = tl.zeros((EXPERTS, COLUMNS), tl.float32)
    for first in range(begin, end, DEPTH):
        n = (first + tl.arange(0, DEPTH)).to(tl.int64)
        live = n < end
        x = tl.load(x_NM + n[:, None] * M + m[None, :], mask=live[:, None] & (m < M)[None, :], other=0.0)
        mask = live[:, None] & (e < E)[None, :]
        low = tl.load(low_NE + n[:, None] * E + e[None, :], mask=mask, other=0.0)
        high = tl.load(high_NE + n[:, None] * E + e[None, :], mask=mask, other=0.0)
        total = tl.dot(low.T, x, total, input_precision=PRECISION)
        total = tl.dot(high.T, x, total, input_precision=PRECISION)
    at = partial_PEM + (part.to(tl.int64) * E + e)[:, None] * M + m[None, :]
    tl.store(at, total, mask=(e < E)[:, None] & (m < M)[None, :])


DWEIGHT_PARTS = 8  # 2048 columns and 256 experts make 32 tiles of 128 x 128: 256 programs for 132 processors


def route_dweight(dlogits_2NE: Tensor, x_NM: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the router's weight [E, M]: FP32 sums over shares of the tokens, added in ascending order."""
    tokens, width = x_NM.shape
    experts = dlogits_2NE.shape[-1]
    share = triton.cdiv(max(tokens, 1), DWEIGHT_PARTS)
    partial = torch.empty(DWEIGHT_PARTS, experts, width, dtype=torch.float32, device=x_NM.device)
    precision = "ieee" if x_NM.dtype == torch.float32 else "tf32"
    block = min(128, max(16, triton.next_power_of_2(experts)))
    _dweight_kernel[(triton.cdiv(experts, block), triton.cdiv(width, 128), DWEIGHT_PARTS)](
        *dlogits_2NE, x_NM, partial, tokens, width, experts, share, block, 128, 64, precision, num_warps=8, num_stages=4
    )
    return partial.sum(0).to(dtype)
