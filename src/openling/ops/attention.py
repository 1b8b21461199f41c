"""Causal softmax attention for GQA and MLA layers, and MLA's absorbed form.

Legend: B batch, T new tokens, S keys (cached and new), H query heads, K key/value heads, D head dim of q and k, V of v,
R latent rank, r rotated dims, P pages of S keys, N documents.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openling.ops.cpu import autocast_dtype, blockwise_attention, has_amx
from openling.ops.pick import batch_invariant, kernels_for
from openling.ops.rows import fixed_bmm

# Choosing a backend costs a few microseconds: below this many pairs of a query and a key, torch's own choice stands.
BIG_PAIRS = 512 * 512
# New tokens from which blocks of matrix products are faster on a CPU than torch's kernels; not in BF16 where these use AMX.
BLOCKWISE_TOKENS = 64
BY_PREFERENCE = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# More new tokens than this are no decoding or verifying step: expanding the latents is then cheaper, and kernels end here.
DECODE_TOKENS = 4
# The causal mask of fewer queries than keys, whose last tokens are the same; never in memory where a kernel can do without.
LOWER_RIGHT: Literal["lower right"] = "lower right"
# None is the causal mask of as many queries as keys.
Mask = Tensor | Literal["lower right"] | None


def causal_mask(new: int, total: int, key_mask_BS: Tensor | None, device: torch.device) -> Tensor:
    """Boolean [1 or B, 1, T, S]: True where the T newest of S positions may look; padded keys are hidden.

    A padded query sees itself, so that its softmax stays finite; its output is never used.
    """
    query = torch.arange(total - new, total, device=device)
    key = torch.arange(total, device=device)
    mask = (key[None, :] <= query[:, None])[None, None]
    if key_mask_BS is None:
        return mask
    own = (key[None, :] == query[:, None])[None, None]
    return (mask & key_mask_BS[:, None, None, :].bool()) | own


def softmax_attention(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKV: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of the T newest positions over S keys, [B, T, H, V]. Head h reads K/V head h * K // H."""
    if cu_seqlens is not None:
        return _packed_attention(q_BTHD, k_BSKD, v_BSKV, cu_seqlens, scale)
    new, total, kv_heads = q_BTHD.shape[1], k_BSKD.shape[1], k_BSKD.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKV))
    if new == 1 and key_mask is None:
        # The queries of a group become rows over the same keys: as heads, each would read them again.
        out = F.scaled_dot_product_attention(q_BTHD[:, 0].unflatten(1, (kv_heads, -1)), k, v, scale=scale)
        return out.flatten(1, 2).unsqueeze(1)
    mask: Mask = None
    if new != total and key_mask is None and (q.is_cuda or new >= BLOCKWISE_TOKENS):
        mask = LOWER_RIGHT
    elif new != total or key_mask is not None:
        mask = causal_mask(new, total, key_mask, q.device)
    return _attend(q, k, v, mask, scale).transpose(1, 2)


def _attend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSV: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention [B, H, T, V] in the form that `attention_backend` names; causal where there is no mask."""
    backend, width = attention_backend(q_BHTD, k_BKSD, v_BKSV, mask), v_BKSV.shape[-1]
    if backend == "blockwise":
        return blockwise_attention(q_BHTD, k_BKSD, v_BKSV, scale)
    if backend.endswith("padded values"):
        v_BKSV = F.pad(v_BKSV, (0, q_BHTD.shape[-1] - width))

    if backend == "cudnn, two parts":
        return _in_two_parts(q_BHTD, k_BKSD, v_BKSV, scale)

    def run() -> Tensor:
        gqa = q_BHTD.shape[1] != k_BKSD.shape[1]
        bias = _lower_right(q_BHTD.shape[2], k_BKSD.shape[2]) if isinstance(mask, str) else mask
        return F.scaled_dot_product_attention(
            q_BHTD, k_BKSD, v_BKSV, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=gqa
        )

    if backend == "cudnn":
        with sdpa_kernel(BY_PREFERENCE, set_priority=True):
            return run()
    return run()[..., :width]


def _lower_right(new: int, total: int) -> Tensor:
    """PyTorch's name for LOWER_RIGHT; importing it takes seconds, since it imports the compiler."""
    from torch.nn.attention.bias import causal_lower_right

    bias: Tensor = causal_lower_right(new, total)
    return bias


def attention_backend(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSV: Tensor, mask: Mask = None) -> str:
    """How softmax attention over these runs: "cudnn", "flash" or "default" (torch chooses), with "padded values" or without.

    "blockwise" is `ops.cpu.blockwise_attention`, "two parts" `_in_two_parts`.
    """
    dim, width, new, keys = q_BHTD.shape[-1], v_BKSV.shape[-1], q_BHTD.shape[2], k_BKSD.shape[2]
    if q_BHTD.device.type == "cpu":
        flash = mask is None and autocast_dtype(q_BHTD) == torch.bfloat16 and has_amx()
        if not isinstance(mask, Tensor) and new >= BLOCKWISE_TOKENS and not flash:
            return "blockwise"
        # Values narrower than keys leave torch's flash kernel on a CPU; zeros keep them in it.
        return "default, padded values" if width < dim and new >= BLOCKWISE_TOKENS else "default"
    if not q_BHTD.is_cuda or new * keys < BIG_PAIRS or q_BHTD.element_size() != 2:
        return "default"
    if mask is None:
        return _cuda_backend(q_BHTD.device, dim, width)
    parts = not isinstance(mask, Tensor) and q_BHTD.shape[1] == k_BKSD.shape[1] and not _needs_gradient(q_BHTD, k_BKSD, v_BKSV)
    if parts and _cuda_backend(q_BHTD.device, dim, width) == "cudnn":
        return "cudnn, two parts"
    # Of torch's kernels only flash does without a mask here, and it wants equal dims.
    flash = width <= dim and not isinstance(mask, Tensor)
    return ("flash, padded values" if width < dim else "flash") if flash else "default"


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _in_two_parts(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSV: Tensor, scale: float) -> Tensor:
    """The T newest of S positions over the older keys without a mask and over the new ones causally, [B, H, T, V].

    The parts are joined by their log-sum-exps. No mask is in memory and no pair is computed in vain.
    """
    behind = k_BHSD.shape[2] - q_BHTD.shape[2]
    old, new = slice(behind), slice(behind, None)
    old_BHTV, old_BHT = _with_log_sum(q_BHTD, k_BHSD[:, :, old], v_BHSV[:, :, old], scale, causal=False)
    new_BHTV, new_BHT = _with_log_sum(q_BHTD, k_BHSD[:, :, new], v_BHSV[:, :, new], scale, causal=True)
    share_BHT1 = torch.sigmoid(old_BHT - new_BHT)[..., None]
    return torch.lerp(new_BHTV.float(), old_BHTV.float(), share_BHT1).to(q_BHTD.dtype)


def _with_log_sum(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's output, and the log of every query's sum of exponentials in FP32 [B, H, T]."""
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, log_sum.reshape(out.shape[:3])


@cache
def _cuda_backend(device: torch.device, dim: int, width: int) -> str:
    """The fastest backend for half-precision heads of these widths, said once in the log.

    cuDNN takes unequal widths and is 1.7 to 2.3 times as fast as flash 2 on Hopper (transformers PR 48163). On Hopper it goes
    to 256 columns, elsewhere to 128.
    """
    capability, version = torch.cuda.get_device_capability(device), torch.backends.cudnn.version() or 0
    limit = 256 if capability == (9, 0) else 128
    cudnn = capability >= (9, 0) and version >= 91000 and max(dim, width) <= limit and dim % 8 == width % 8 == 0
    flash = "flash" if dim == width else "flash, padded values" if width < dim <= 256 else "default"
    backend = "cudnn" if cudnn else flash
    logging.getLogger("openling").info(
        "attention %d/%d: %s (cuDNN %d, compute capability %s)", dim, width, backend, version, capability
    )
    return backend


def _packed_attention(q_BTHD: Tensor, k_BTKD: Tensor, v_BTKV: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """The documents of one packed row, each by itself, [1, T, H, V]."""
    tokens, heads, kv_heads, width = *q_BTHD.shape[1:3], k_BTKD.shape[2], v_BTKV.shape[3]
    if kernels_for(q_BTHD) is not None and width <= q_BTHD.shape[3] <= 256:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = q_BTHD[0], *(x[0].repeat_interleave(heads // kv_heads, dim=1) for x in (k_BTKD, v_BTKV))
        bounds = cu_seqlens.to(q.device, torch.int32)
        # Where the lengths are on the device, all tokens bound them: waiting for the longest would cost more.
        longest = tokens if cu_seqlens.is_cuda else int(cu_seqlens.diff().max())
        v = F.pad(v, (0, q.shape[-1] - width))
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
        assert isinstance(out, Tensor)
        return out[..., :width].unsqueeze(0)
    # Split, not sliced: the gradient of every slice would be as large as the row.
    lengths = cu_seqlens.diff().tolist()
    documents = zip(*(x.split(lengths, dim=1) for x in (q_BTHD, k_BTKD, v_BTKV)), strict=True)
    return torch.cat([softmax_attention(q, k, v, scale=scale) for q, k, v in documents], dim=1)


def absorbed_attention(
    q_nope_BTHD: Tensor,
    q_rope_BTHr: Tensor,
    latent_BSR: Tensor,
    k_rope_BSr: Tensor,
    kv_b_HDR: Tensor,
    nope_dim: int,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Tensor:
    """MLA read straight from the latents, [B, T, H, V]: the up-projections move to the query and the output.

    q_nope . (W_k c) = (W_k^T q_nope) . c, and sum p (W_v c) = W_v (sum p c): DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
    `kv_b_HDR` is kv_b_proj per head, rows [nope | v].
    """
    query_BTHR = _per_head(q_nope_BTHD, kv_b_HDR[:, :nope_dim])
    new, total = q_nope_BTHD.shape[1], latent_BSR.shape[1]
    fast = _decode_kernels(query_BTHR, latent_BSR) if key_mask is None else None
    if fast is not None:
        context_BTHR = fast.mla_decode(query_BTHR, q_rope_BTHr, latent_BSR, k_rope_BSr, None, None, scale, 0)
    else:
        mask = causal_mask(new, total, key_mask, latent_BSR.device) if new > 1 or key_mask is not None else None
        context_BTHR = latent_context(query_BTHR, q_rope_BTHr, latent_BSR, k_rope_BSr, mask, scale)
    return _per_head(context_BTHR, kv_b_HDR[:, nope_dim:].transpose(1, 2))


def paged_absorbed_attention(
    q_nope_BTHD: Tensor,
    q_rope_BTHr: Tensor,
    pages_PSX: Tensor,
    table_BP: Tensor,
    lengths_B: Tensor,
    kv_b_HDR: Tensor,
    nope_dim: int,
    *,
    scale: float,
    split_tokens: int = 0,
) -> Tensor:
    """`absorbed_attention` of T <= 4 new tokens per sequence over pages of latents, [B, T, H, V].

    pages [P, S, R + r] hold a token's latent and rotated row side by side, S a multiple of 64; page i of sequence b is
    table[b, i] (int32). lengths (int32) count the keys with the new ones; behind them a page may hold anything. Token t sees
    the first length - T + 1 + t keys; where that is none, its context is zero.
    split_tokens > 0 cuts sequences after every so many tokens (a multiple of 64), which makes a sequence's result the same
    bit for bit in any batch; 0 cuts them as suits the batch, and is faster for small ones.
    """
    rank = kv_b_HDR.shape[-1]
    query_BTHR = _per_head(q_nope_BTHD, kv_b_HDR[:, :nope_dim])
    fast = _decode_kernels(query_BTHR, pages_PSX)
    if fast is not None:
        rows = pages_PSX[..., :rank], pages_PSX[..., rank:]
        context_BTHR = fast.mla_decode(query_BTHR, q_rope_BTHr, *rows, table_BP, lengths_B, scale, split_tokens)
    elif batch_invariant() and len(lengths_B) > 1:
        # A padded sequence's sums would be cut otherwise than those of the sequence alone.
        widths = (-(-lengths_B // pages_PSX.shape[1])).clamp(min=1).tolist()
        parts = []
        for b, width in enumerate(widths):
            one = slice(b, b + 1)
            of_b = (q_nope_BTHD[one], q_rope_BTHr[one], pages_PSX, table_BP[one, :width], lengths_B[one], kv_b_HDR, nope_dim)
            parts.append(paged_absorbed_attention(*of_b, scale=scale, split_tokens=split_tokens))
        return torch.cat(parts)
    else:
        new, keys = query_BTHR.shape[1], table_BP.shape[1] * pages_PSX.shape[1]
        key = torch.arange(keys, device=pages_PSX.device)
        live = key < lengths_B[:, None]
        rows_BSX = pages_PSX[table_BP.long()].flatten(1, 2).masked_fill(~live[..., None], 0)
        seen_BT = lengths_B[:, None] - new + 1 + torch.arange(new, device=pages_PSX.device)
        mask = (key < seen_BT[..., None])[:, None]
        context_BTHR = latent_context(query_BTHR, q_rope_BTHr, rows_BSX[..., :rank], rows_BSX[..., rank:], mask, scale)
        context_BTHR = context_BTHR.masked_fill((seen_BT <= 0)[..., None, None], 0)
    return _per_head(context_BTHR, kv_b_HDR[:, nope_dim:].transpose(1, 2))


def paged_attention(
    q_BTHD: Tensor, k_pages_PSKD: Tensor, v_pages_PSKD: Tensor, table_BP: Tensor, lengths_B: Tensor, *, scale: float
) -> Tensor:
    """`softmax_attention` of T new tokens per sequence over pages of keys and values, [B, T, H, D].

    Pages, table and lengths as in `paged_absorbed_attention`. A sequence's result does not depend on the others.
    """
    fast = kernels_for(q_BTHD)
    if fast is not None:
        return fast.paged_attention(q_BTHD, k_pages_PSKD, v_pages_PSKD, table_BP, lengths_B, scale)
    new, size = q_BTHD.shape[1], k_pages_PSKD.shape[1]
    lengths, tables = lengths_B.tolist(), table_BP.tolist()
    parts = []
    for b, length in enumerate(lengths):
        if not length:
            parts.append(torch.zeros_like(q_BTHD[:1]))
            continue
        pages, seen = tables[b][: -(-length // size)], min(new, length)
        k, v = (_page_rows(x, pages)[None, :length] for x in (k_pages_PSKD, v_pages_PSKD))
        out = softmax_attention(q_BTHD[b : b + 1, -seen:], k, v, scale=scale)
        parts.append(out if seen == new else F.pad(out, (0, 0, 0, 0, new - seen, 0)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _page_rows(pages_PSKD: Tensor, numbers: list[int]) -> Tensor:
    """The rows of some pages in order, [S * pages, K, D]: where the pages lie in order, and most do, without a copy.

    A copy always where sums must not depend on where things lie.
    """
    first, count = numbers[0], len(numbers)
    if numbers == list(range(first, first + count)) and not batch_invariant():
        return pages_PSKD[first : first + count].flatten(0, 1)
    return pages_PSKD[torch.tensor(numbers, device=pages_PSKD.device)].flatten(0, 1)


def latent_context(
    query_BTHR: Tensor, q_rope_BTHr: Tensor, latent_BSR: Tensor, k_rope_BSr: Tensor, mask_B1TS: Tensor | None, scale: float
) -> Tensor:
    """Latents weighted by the softmax of the scores, [B, T, H, R]; the twin of `kernels.mla_decode`."""
    batch, new, heads, _ = query_BTHR.shape
    q, q_rope = (x.reshape(batch, new * heads, -1) for x in (query_BTHR, q_rope_BTHr))
    score = torch.baddbmm(torch.bmm(q_rope, k_rope_BSr.transpose(1, 2)), q, latent_BSR.transpose(1, 2))
    wide = torch.float64 if score.dtype == torch.float64 else torch.float32
    score = score.to(wide) * scale
    if mask_B1TS is not None:
        score = score.unflatten(1, (new, heads)).masked_fill(~mask_B1TS.transpose(1, 2), float("-inf")).flatten(1, 2)
    context = torch.bmm(score.softmax(-1).to(latent_BSR.dtype), latent_BSR)
    return context.unflatten(1, (new, heads))


def _per_head(x_BTHD: Tensor, w_HDE: Tensor) -> Tensor:
    """Each head times its own matrix, [B, T, H, E]; one batched product over heads, none of them copied."""
    batch, new, heads, dim = x_BTHD.shape
    rows = x_BTHD.permute(2, 0, 1, 3).reshape(heads, batch * new, dim)
    out = fixed_bmm(rows, w_HDE) if batch_invariant() else torch.bmm(rows, w_HDE)
    return out.unflatten(1, (batch, new)).permute(1, 2, 0, 3)


def _decode_kernels(query_BTHR: Tensor, rows_BSX: Tensor) -> ModuleType | None:
    """The kernels where they serve: few new tokens, one dtype, and no gradient to compute."""
    if query_BTHR.shape[1] > DECODE_TOKENS or query_BTHR.dtype != rows_BSX.dtype or rows_BSX.stride(-1) != 1:
        return None
    if torch.is_grad_enabled() and (query_BTHR.requires_grad or rows_BSX.requires_grad):
        return None
    return kernels_for(query_BTHR)


def absorbed_is_cheaper(new: int, rank: int, nope_dim: int, value_dim: int) -> bool:
    """Whether reading the latents costs fewer FLOPs than expanding them again for `new` queries.

    Per key and head: absorbed new * 2R, expanded new * (nope + v) + R * (nope + v), the rope part being common.
    """
    return new * (2 * rank - nope_dim - value_dim) < rank * (nope_dim + value_dim)
