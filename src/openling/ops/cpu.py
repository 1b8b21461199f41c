"""What makes the plain ops fast on a CPU: BF16 products where the machine has them, causal attention in blocks, few passes.

Legend: B batch, T new tokens, S keys (cached and new), H query heads, K key/value heads, G = H / K, D head dim of q and k,
V of v, C tokens of a block, N = B * K.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openling.ops.pick import batch_invariant

# With AMX or AVX-512 BF16 the products are 3 to 20 times as fast as in FP32, without either slower: nothing lies between.
CLEARLY_FASTER = 1.3
SELF_TEST_TURNS, SELF_TEST_SECONDS = 10, 0.1
# Less than this stays in a processor's cache, in whatever layout.
PACKED_BYTES = 2**26


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype a CPU multiplies matrices of `dtype` fastest without losing more than `dtype` itself has lost."""
    if dtype == torch.bfloat16 and bf16_matmuls_pay():
        return dtype
    return torch.float32 if dtype.itemsize == 2 else dtype


@cache
def bf16_matmuls_pay() -> bool:
    """Whether this CPU multiplies BF16 matrices clearly faster than FP32 ones: a self-test, said once in the log.

    Product by product they take turns and the shortest of each counts: a resumed run must find what the run before it found, and
    on a busy machine some are left in peace. `settle_bf16_matmuls` leaves nothing to chance.
    """
    if _settled is not None:
        return _settled
    bf16, fp32 = _shortest_products()
    pays = fp32 > CLEARLY_FASTER * bf16
    how = f"BF16 products run at {fp32 / bf16:.1f} times the rate of FP32 ones"
    logging.getLogger("openling").info("CPU matrix products in %s: %s", "BF16" if pays else "FP32", how)
    return pays


def half_products(device: torch.device) -> bool:
    """Whether what may be computed in BF16 is, on this device: on GPUs, and on CPUs that multiply it clearly faster than FP32."""
    return device.type != "cpu" or bf16_matmuls_pay()


_settled: bool | None = None


def settle_bf16_matmuls(pay: bool | None) -> None:
    """Take another process's answer of `bf16_matmuls_pay` for this one's (None: test again): parts of a run must round alike."""
    global _settled
    _settled = pay
    bf16_matmuls_pay.cache_clear()


def _shortest_products() -> tuple[float, float]:
    """The shortest seconds of a batch of 64 x 64 matrices, the shape that chunks and blocks have, in BF16 and in FP32."""
    with torch.inference_mode():
        factors = [torch.ones(64, 64, 64, dtype=dtype, device="cpu") for dtype in (torch.bfloat16, torch.float32)]
        shortest, turns, begun = [float("inf")] * len(factors), 0, time.perf_counter()
        while turns < SELF_TEST_TURNS or time.perf_counter() < begun + SELF_TEST_SECONDS:
            for i, a in enumerate(factors):
                start = time.perf_counter()
                torch.bmm(a, a)
                shortest[i] = min(shortest[i], time.perf_counter() - start)
            turns += 1
    return shortest[0], shortest[1]


@cache
def packs_bf16() -> bool:
    """Whether oneDNN has BF16 products for this processor: not before AVX-512 (or AVX-NE-CONVERT)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def has_amx() -> bool:
    """Whether this processor has tiles for BF16 products, which torch's flash attention uses."""
    return bool(torch.cpu._is_amx_tile_supported())


@contextmanager
def packed_linears(module: nn.Module) -> Iterator[bool]:
    """Inside the block the weights lie as single rows read them fastest, from PACKED_BYTES of weights on; else as they are.

    FP32 matrices with more rows than columns lie column by column, in their own memory: BLAS then streams them at 1.2 to 1.9
    times the rate. BF16 rows meet a copy, twice PyTorch's speed, where BF16 products pay. Yields whether there are copies, which
    a change of the weights leaves stale.
    """
    linears = [m for m in module.modules() if type(m) is nn.Linear and m.weight.device.type == "cpu"]
    wide = [m for m in linears if m.weight.dtype == torch.float32]
    half = [m for m in linears if m.weight.dtype == torch.bfloat16]
    wide = wide if sum(m.weight.nbytes for m in wide) > PACKED_BYTES else []
    half = half if sum(m.weight.nbytes for m in half) > PACKED_BYTES and packs_bf16() and bf16_matmuls_pay() else []
    for m in half:
        m.__dict__["forward"] = _PackedLinear(m)
    for m in wide:
        if m.out_features > m.in_features:
            _lie(m, by_columns=True)
    try:
        yield bool(half)
    finally:
        for m in half:
            del m.__dict__["forward"]
        for m in wide:
            _lie(m, by_columns=False)


def _lie(linear: nn.Linear, *, by_columns: bool) -> None:
    """Order a weight's memory. Not an inference tensor's: the model may be trained afterwards."""
    with torch.inference_mode(False), torch.no_grad():
        weight = linear.weight.data
        linear.weight.data = weight.t().contiguous().t() if by_columns else weight.contiguous()


class _PackedLinear:
    """`nn.Linear.forward` of one row by oneDNN's own layout, of more rows as before."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if x.numel() != x.shape[-1] or x.dtype != torch.bfloat16:
            return F.linear(x, self.linear.weight, self.linear.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.linear.bias, "none", [], "")
        return out


def blockwise_attention(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSV: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of the T newest of S positions, [B, H, T, V]; widths D and V are free.

    Block by block of queries: scores over the keys so far, softmax (in FP32 whatever the dtype), product with the values. The
    scores of a block are in memory, a triangle is never computed, and backward computes them again. In BF16 a score is rounded
    before its softmax, which the flash kernel avoids: 4e-3 of the output instead of 2e-3, for a third of its time.
    """
    batch, heads, new, dim = q_BHTD.shape
    kv_heads, dtype = k_BKSD.shape[1], matmul_dtype(autocast_dtype(q_BHTD))
    q = q_BHTD.to(dtype).reshape(batch * kv_heads, heads // kv_heads, new, dim)
    k, v = (x.to(dtype).reshape(batch * kv_heads, *x.shape[2:]) for x in (k_BKSD, v_BKSV))
    out: Tensor = _Blockwise.apply(q, k, v, scale)
    return out.view(batch, heads, new, v.shape[-1]).to(autocast_dtype(q_BHTD))


class _Blockwise(torch.autograd.Function):
    """q [N, G, T, D], k [N, S, D], v [N, S, V] to [N, G, T, V]; the queries of a group are rows over the same keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        out = q.new_empty(*q.shape[:3], v.shape[2])
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(q, k):
                _, weight = _weights(q, k, block, scale)
                out[:, :, block[0] : block[1]] = torch.bmm(weight, v[:, : block[2]]).unflatten(1, (q.shape[1], -1))
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast("cpu", enabled=False):
            for start, end, keys in _blocks(q, k):
                rows, weight = _weights(q, k, (start, end, keys), ctx.scale)
                pull = dout[:, :, start:end].reshape(rows.shape[0], rows.shape[1], -1).to(q.dtype)
                dv[:, :keys] += torch.bmm(weight.transpose(1, 2), pull)
                dweight = torch.bmm(pull, v[:, :keys].transpose(1, 2))
                dscore = torch._softmax_backward_data(dweight, weight, -1, weight.dtype)
                dq[:, :, start:end] = _scaled(dscore, k[:, :keys], ctx.scale).unflatten(1, (q.shape[1], -1))
                dk[:, :keys] += _scaled(dscore.transpose(1, 2), rows, ctx.scale)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q_NGTD: Tensor, k_NSD: Tensor) -> list[tuple[int, int, int]]:
    """First and last query of every block, and how many keys its last query sees."""
    new, behind = q_NGTD.shape[2], k_NSD.shape[1] - q_NGTD.shape[2]
    size = 64 if q_NGTD.shape[1] > 1 else 128  # rows enough for a fast product, few enough to stay in the cache
    return [(i, min(i + size, new), behind + min(i + size, new)) for i in range(0, new, size)]


def _weights(q_NGTD: Tensor, k_NSD: Tensor, block: tuple[int, int, int], scale: float) -> tuple[Tensor, Tensor]:
    """The queries of a block as rows [N, G * C, D], and their softmax weights [N, G * C, keys]."""
    start, end, keys = block
    rows = q_NGTD[:, :, start:end].flatten(1, 2)
    score = _scaled(rows, k_NSD[:, :keys].transpose(1, 2), scale)
    future = torch.ones(end - start, end - start, dtype=torch.bool, device=score.device).triu(1)
    score.unflatten(1, (q_NGTD.shape[1], -1))[..., keys - (end - start) :].masked_fill_(future, float("-inf"))
    return rows, score.softmax(-1)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b in one product."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product will read x: autocast's where that is on, else x's own."""
    low = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if low else x.dtype


def norms_in_one_pass(x: Tensor) -> bool:
    """Whether `root_mean_square_norm` serves x: in training on a CPU. A half-precision model's own norms round twice."""
    training = x.dtype == torch.float32 and x.requires_grad
    return x.device.type == "cpu" and (training or torch.is_autocast_enabled("cpu"))


def root_mean_square_norm(x: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """x / rms(x) in each of `groups` blocks of the last dim, times weight: in FP32, rounded once to `autocast_dtype`."""
    out: Tensor = _RootMeanSquareNorm.apply(x, weight, eps, groups, autocast_dtype(x))
    return out


def norms_one_row(x: Tensor) -> bool:
    """Whether `one_row_norm` serves x: the token of one sequence that decodes on a CPU, where the number of calls is the cost."""
    return x.device.type == "cpu" and x.numel() == x.shape[-1] and not torch.is_grad_enabled() and not batch_invariant()


def one_row_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.norm.rms_norm` of a single row in a third of its calls: the scale is a number, not a tensor."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    flat = wide.view(-1)
    scale = (float(torch.dot(flat, flat)) / flat.shape[0] + eps) ** -0.5
    return weight * (wide * scale).to(x.dtype)


class _RootMeanSquareNorm(torch.autograd.Function):
    """With y = x / rms(x): dx = (dy - y mean(dy y)) / rms(x), half the passes that autograd makes over the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, groups: int, dtype: torch.dtype) -> Tensor:
        rows = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (groups, -1))
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).flatten(-2).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        groups, wide = scale.shape[-2], scale.dtype
        y, dout = (x.to(wide).unflatten(-1, (groups, -1)) * scale).flatten(-2), dout.to(wide)
        dweight = (dout * y).sum_to_size(weight.shape).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dy, y = (dout * weight).unflatten(-1, (groups, -1)), y.unflatten(-1, (groups, -1))
        pull = torch.linalg.vecdot(dy, y).div_(y.shape[-1]).unsqueeze(-1)
        return dy.sub_(y.mul_(pull)).mul_(scale).flatten(-2).to(x.dtype), dweight, None, None, None


def rotate(x_BTHD: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`ops.rope.apply_rope` in half its passes: both pairings, in FP32."""
    if not torch.is_grad_enabled():
        return _turned(x_BTHD, cos, sin, interleaved, 1)
    out: Tensor = _Rotate.apply(x_BTHD, cos, sin, interleaved)
    return out


class _Rotate(torch.autograd.Function):
    """The gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turned(x, cos, sin, interleaved, 1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(dout, cos, sin, ctx.interleaved, -1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: int) -> Tensor:
    """Pairs of dims (2j, 2j + 1), or (j, j + r/2), turned by their angle, or back by it."""
    half = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    out = torch.empty_like(wide)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    torch.mul(wide[..., first], cos, out=out[..., first]).addcmul_(wide[..., second], sin, value=-sign)
    torch.mul(wide[..., second], cos, out=out[..., second]).addcmul_(wide[..., first], sin, value=sign)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = wide[..., 2 * half :]
    return out.to(x.dtype)
