"""Causal softmax attention for GQA and MLA layers, and MLA's absorbed form.

Legend: B batch, T new tokens, S keys (cached and new), H query heads, K key/value heads, D head dim, R latent rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    v_BSKD: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Causal attention of the T newest positions over S keys, [B, T, H, Dv]. Head h reads K/V head h * K // H."""
    if cu_seqlens is not None:
        bounds = [int(x) for x in cu_seqlens]
        parts = [
            softmax_attention(q_BTHD[:, a:b], k_BSKD[:, a:b], v_BSKD[:, a:b], scale=scale)
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]
        return torch.cat(parts, dim=1)
    new, total, heads = q_BTHD.shape[1], k_BSKD.shape[1], q_BTHD.shape[2]
    repeat = heads // k_BSKD.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BSKD, v_BSKD))
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    if new == total and key_mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, scale=scale)
    else:
        mask = None if new == 1 and key_mask is None else causal_mask(new, total, key_mask, q.device)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2)


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
    """MLA read straight from the latents, [B, T, H, Dv]: the up-projections move to the query and the output.

    q_nope . (W_k c) = (W_k^T q_nope) . c, and sum p (W_v c) = W_v (sum p c): DeepSeek-V2, arXiv 2405.04434, section 2.1.2.
    `kv_b_HDR` is kv_b_proj per head, rows [nope | v].
    """
    w_k_HDR, w_v_HDR = kv_b_HDR[:, :nope_dim], kv_b_HDR[:, nope_dim:]
    query_BTHR = torch.einsum("bthd,hdr->bthr", q_nope_BTHD, w_k_HDR)
    score = torch.einsum("bthr,bsr->bhts", query_BTHR, latent_BSR) + torch.einsum("bthr,bsr->bhts", q_rope_BTHr, k_rope_BSr)
    new, total = q_nope_BTHD.shape[1], latent_BSR.shape[1]
    wide = torch.float64 if score.dtype == torch.float64 else torch.float32
    score = score.to(wide) * scale
    if new > 1 or key_mask is not None:
        score = score.masked_fill(~causal_mask(new, total, key_mask, score.device), float("-inf"))
    probability = score.softmax(-1).to(latent_BSR.dtype)
    context_BTHR = torch.einsum("bhts,bsr->bthr", probability, latent_BSR)
    return torch.einsum("bthr,hdr->bthd", context_BTHR, w_v_HDR)


def absorbed_is_cheaper(new: int, rank: int, nope_dim: int, value_dim: int) -> bool:
    """Whether reading the latents costs fewer FLOPs than expanding them again for `new` queries.

    Per key and head: absorbed new * 2R, expanded new * (nope + v) + R * (nope + v), the rope part being common.
    """
    return new * (2 * rank - nope_dim - value_dim) < rank * (nope_dim + value_dim)
