"""GQA to MLA: concentrate RoPE in one shared key, compress the rest of K with V into a latent, compress the query.

Sources: TransMLA (arXiv 2502.07864) for RoRoPE, balance and joint PCA; Ling-2.6 report p. 7 for partial RoPE; the
weighted basis, weights of tokens and the regression on normalised latents are ours. All algebra is FP64 on small matrices: the
second moment C = E[x x^T] of the layer input stands for the calibration text. An error of a token's key or value costs in
proportion to the attention that the token receives: keys and values are fitted to A = E[a x x^T], a that attention.

Legend: M1 hidden size + 1 (last column bias, last input 1), H query heads, K key/value heads, D head dim,
p groups of f neighbouring frequencies that are taken as one (folded), j of their components kept; p j = r / 2 pairs are rotated,
R latent rank, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openling.migrate.calibrate import Gram, relative
from openling.model.ling import GroupedQueryAttention, LatentAttention

Balance = Literal["ratio", "weighted"]
LatentNorm = Literal["inverse", "rms", "channel", "refit"]


@dataclass
class Projections:
    """What softmax attention computes from x before RoPE: q [H, D, M1], k and v [K, D, M1], FP64, bias as last column."""

    q: Tensor
    k: Tensor
    v: Tensor

    @staticmethod
    def of(attention: GroupedQueryAttention) -> Projections:
        """The weights of a GQA mixer; its QK-norm is not included."""
        layer = attention.query_key_value
        weight = layer.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
        rows = torch.cat((weight, bias[:, None]), dim=1)
        heads = rows.unflatten(0, (-1, attention.dim))
        return Projections(*heads.split((attention.heads, attention.kv_heads, attention.kv_heads)))

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[0] // self.k.shape[0]


# ---------------------------------------------------------------------------------------------------------------------
# RoPE concentration
# ---------------------------------------------------------------------------------------------------------------------


def pairs(heads_hDM: Tensor, rotary: int, fold: int) -> Tensor:
    """The rotated dims as [2, h, p, f, M1]: real and imaginary halves, `fold` neighbouring frequencies together."""
    return heads_hDM[:, :rotary].unflatten(1, (2, rotary // 2 // fold, fold)).transpose(0, 1)


@dataclass
class Concentration:
    """`down` [p, j, K*f] makes the shared rotated key from the K heads' pairs; `up` [p, j, K*f] is its share in each of them."""

    down: Tensor
    up: Tensor
    energy_kept: float


def rorope_basis(key: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Per frequency, eigenvalues [p, K*f] (descending) and eigenvectors [p, K*f, K*f] of the keys' energy over heads.

    `key` is `pairs(k)`. One real rotation for both halves commutes with RoPE when fold = 1, so that the full basis is exact.
    """
    parts = key.transpose(1, 2).flatten(2, 3)  # [2, p, K*f, M1]
    energy = torch.einsum("cpam,mn,cpbn->pab", parts, moment, parts)
    values, vectors = torch.linalg.eigh(energy)
    return values.flip(-1), vectors.flip(-1)


def concentrate(
    w: Projections, moment: Tensor, rotary: int, fold: int, *, query_weighted: bool, keep: int = 1, attended: Tensor | None = None
) -> Concentration:
    """The `keep` best components per group of frequencies: of key energy (published), or of key energy times query energy.

    moment: C; attended: A, for the keys (None: C too).

    The kept frequencies of a group are every (fold / keep)-th, and the components take them in the order of their own mean
    frequency. With fold = 1 nothing but dropped components is lost; a larger fold (FreqFold of TransMLA, arXiv 2502.07864)
    keeps more energy and turns some of it at a neighbour's frequency.
    """
    key = pairs(w.k, rotary, fold)
    weight = key.new_ones(key.shape[2], key.shape[1] * fold)  # [p, K*f]
    if query_weighted:
        query = pairs(w.q, rotary, fold).unflatten(1, (w.k.shape[0], w.group))
        energy = torch.einsum("ckgpfm,mn,ckgpfn->pkf", query, moment, query).flatten(1)
        weight = energy.clamp(min=1e-12 * float(energy.max()) or 1.0).sqrt()  # queries that are all zero ask for no key first
    scaled = key * weight.unflatten(1, (-1, fold)).transpose(0, 1)[None, ..., None]
    values, vectors = rorope_basis(scaled, moment if attended is None else attended)
    best = vectors[..., :keep].transpose(1, 2)  # [p, j, K*f]
    index = torch.arange(fold, dtype=key.dtype, device=key.device).repeat(w.k.shape[0])
    order = (best.square() @ index).argsort(dim=-1, stable=True)
    best = best.gather(1, order[..., None].expand_as(best))
    weight = weight[:, None]
    return Concentration(best * weight, best / weight, relative(values[:, :keep].sum(), values.sum(), of_nothing=1.0))


def split_rope(w: Projections, basis: Concentration, rotary: int, fold: int) -> tuple[Tensor, Tensor, Tensor]:
    """k_rope [r, M1] and q_rope [H, r, M1] in interleaved order, and what is left of the keys, unrotated, [K, D, M1]."""
    kv_heads = w.k.shape[0]
    down, up = (x.unflatten(-1, (kv_heads, fold)) for x in (basis.down, basis.up))  # [p, j, K, f]
    key = pairs(w.k, rotary, fold)
    shared = torch.einsum("pjkf,ckpfm->cpjm", down, key)
    query = pairs(w.q, rotary, fold).unflatten(1, (kv_heads, w.group))
    q_rope = torch.einsum("pjkf,ckgpfm->ckgpjm", up, query).flatten(1, 2)
    rest = key - torch.einsum("pjkf,cpjm->ckpfm", up, shared)
    left = torch.cat((rest.transpose(0, 1).flatten(1, 3), w.k[:, rotary:]), dim=1)
    interleave = [x.flatten(-3, -2).movedim(0, -2).flatten(-3, -2) for x in (shared, q_rope)]
    return interleave[0], interleave[1], left


# ---------------------------------------------------------------------------------------------------------------------
# Latents
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class LowRank:
    """rows ~ up @ (down @ x): `down` [R, M1], `up` [rows, R]. `spectrum`: squared singular values, descending."""

    down: Tensor
    up: Tensor
    energy_kept: float
    spectrum: Tensor

    def padded(self, rank: int) -> LowRank:
        """The same map with latent dims of zero behind its own."""
        more = rank - self.down.shape[0]
        return LowRank(F.pad(self.down, (0, 0, 0, more)), F.pad(self.up, (0, more)), self.energy_kept, self.spectrum)


def moment_of(inputs: Sequence[Tensor], attention: Sequence[Tensor] | None = None) -> Tensor:
    """C over batches [N, M1]; A with the attention of their tokens, one [N] per batch, 1 on average."""
    gram = Gram()
    for x, weight in zip(inputs, attention or repeat(None), strict=False):
        gram.add(x if weight is None else x * weight[:, None].sqrt())
    return gram.moment


def low_rank(rows_PM: Tensor, moment: Tensor, rank: int, metric_P: Tensor | None = None) -> LowRank:
    """PCA of the activations rows @ x (second moment `moment`) in the metric S: the best rank-R map in |S (rows x - .)|^2.

    metric_P: a symmetric positive matrix S [P, P]; None is the identity. With it, up and down carry S^-1 and S.
    """
    scaled = rows_PM if metric_P is None else metric_P @ rows_PM
    span, rows = _spanned(scaled, rank)
    values, vectors = torch.linalg.eigh(rows @ moment @ rows.T)
    basis = vectors.flip(-1)[:, :rank]
    basis = basis if span is None else span @ basis
    up = basis if metric_P is None else torch.linalg.solve(metric_P, basis)
    spectrum = values.flip(-1)
    return LowRank(basis.T @ scaled, up, relative(spectrum[:rank].sum(), spectrum.sum(), of_nothing=1.0), spectrum)


def _spanned(rows_PM: Tensor, rank: int) -> tuple[Tensor | None, Tensor]:
    """An orthonormal basis Q of what many rows span, and R: rows = Q R, and R C R^T is no larger than C. Few rows stay."""
    outputs, inputs = rows_PM.shape
    return torch.linalg.qr(rows_PM) if outputs > inputs >= rank else (None, rows_PM)


def balance_metric(
    w: Projections, left: Tensor, moment: Tensor, dense: Tensor, balance: Balance, attended: Tensor | None = None
) -> Tensor:
    """The metric [2KD, 2KD] in which K (without its rotated part) and V share the latent.

    ratio: K divided by alpha = |K| / |V| (root mean squares of the activations). weighted: K errors weighted by the
    queries that meet them, V errors by the output projection `dense` [M, H * D]; then balanced in the same way.
    moment: C; attended: A, for the activations of K and V (None: C too).
    """
    kv_heads, dim = left.shape[:2]
    if balance == "ratio":
        blocks = [torch.eye(dim, dtype=left.dtype, device=left.device)] * (2 * kv_heads)
    else:
        q = w.q.unflatten(0, (kv_heads, w.group))
        out = dense.double().unflatten(1, (kv_heads, w.group, dim))
        query = torch.einsum("kgdm,mn,kgen->kde", q, moment, q)
        reader = torch.einsum("mkgd,mkge->kde", out, out)
        blocks = [root for both in (query, reader) for root in _roots(both)]
    metric = torch.block_diag(*blocks)
    rows = metric @ torch.cat((left, w.v)).flatten(0, 1)
    energy = torch.einsum("pm,mn,pn->p", rows, moment if attended is None else attended, rows).unflatten(0, (2, -1)).sum(-1)
    # Keys that went into the shared rotated key whole leave rounding noise, or nothing: that is not to be scaled up to V.
    if energy[1] > 0:  # else there are no values to share the latent with
        metric[: kv_heads * dim] *= (energy[1] / energy[0].clamp(min=1e-12 * float(energy[1]))).sqrt()
    return metric


def matrix_sqrt(symmetric: Tensor, least: float = 0.0) -> Tensor:
    """Square root of a positive semi-definite matrix, its smallest eigenvalues lifted to 1e-6 of the mean, or to `least`."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp(min=1e-6 * float(values.mean()) or least).sqrt()) @ vectors.T


def _roots(by_head: Tensor) -> list[Tensor]:
    """`matrix_sqrt` of each head's; of a head that nothing reads, 1e-6 of what the mean head has: a metric has an inverse."""
    mean = float(by_head.diagonal(dim1=-2, dim2=-1).mean())
    return [matrix_sqrt(x, 1e-6 * mean or 1.0) for x in by_head]


def after_norm(
    factors: LowRank,
    rows: Tensor,
    inputs: Sequence[Tensor],
    eps: float,
    mode: LatentNorm,
    attention: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm weight [R] and up-projection [rows, R] once an RMSNorm stands between down and up.

    inverse: E[1 / rms] (as the public converter has it); rms: E[rms]; channel: least squares per latent channel;
    refit: unit weight, and the up-projection regressed anew from the normalised latents to rows @ x. `attention` as in
    `moment_of`: means and regression count a token by it.
    """
    rank = factors.down.shape[0]
    gram, moments = Gram(), factors.down.new_zeros(4, rank)
    count = 0
    for x, received in zip(inputs, attention or repeat(None), strict=False):
        weight = x.new_ones(len(x), 1) if received is None else received[:, None]
        latent = x @ factors.down.T
        rms = (latent.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        normed = latent / rms
        if mode == "refit":
            gram.add(normed * weight.sqrt(), x @ rows.T * weight.sqrt())
        each = (1 / rms, rms, latent * normed, normed.pow(2))
        moments += torch.stack([(e * weight).sum(0).expand(rank) for e in each])
        count += x.shape[0]
    inverse, root, cross, square = moments / count
    channel = cross / square.clamp(min=1e-300)  # a dim that is not in use is zero
    if mode == "refit":
        return torch.ones_like(channel), gram.ridge(1e-6, factors.up * channel)
    return {"inverse": inverse, "rms": root, "channel": channel}[mode], factors.up


# ---------------------------------------------------------------------------------------------------------------------
# A whole mixer
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """What an MLA mixer keeps of its source: shares of energy by name, and for "kv" and "query" all squared singular values."""

    energy: dict[str, float]
    spectra: dict[str, Tensor]


@torch.no_grad()
def fill_mla(
    target: LatentAttention,
    w: Projections,
    dense: torch.nn.Linear,
    inputs: Sequence[Tensor],
    *,
    rotary: int,
    balance: Balance,
    latent_norm: LatentNorm,
    query_weighted: bool,
    fold: int | None = None,
    rank: int | None = None,
    attention: Sequence[Tensor] | None = None,
) -> Kept:
    """Fill an MLA mixer from the projections of a softmax one (QK-norm already removed).

    fold: neighbouring frequencies taken as one, one of `folds`; None: no more than the target's rotated dims ask for.
    rank: latent dims in use, the target's others stay zero; None: all of them.
    attention: what each token receives (`fold.attention_received`), by which keys and values are fitted; None: all alike.
    `inputs` are batches of layer inputs [N, M1] in FP64; the last column is 1, or 0 where `target` has no biases.
    """
    moment, dim = moment_of(inputs), w.q.shape[1]
    attended = moment if attention is None else moment_of(inputs, attention)
    collapse = rotary // target.rope
    fold = fold or collapse
    keep = fold // collapse
    basis = concentrate(w, moment, rotary, fold, keep=keep, query_weighted=query_weighted, attended=attended)
    k_rope, q_rope, left = split_rope(w, basis, rotary, fold)

    kv_rows = torch.cat((left, w.v)).flatten(0, 1)
    metric = balance_metric(w, left, moment, dense.weight, balance, attended)
    kv = low_rank(kv_rows, attended, rank or target.rank, metric).padded(target.rank)
    norm, up = after_norm(kv, kv_rows, inputs, target.kv_a_layernorm.eps, latent_norm, attention)
    k_up, v_up = (x.unflatten(0, (-1, dim)).repeat_interleave(w.group, 0) for x in up.chunk(2))
    _set(target.kv_a_proj_with_mqa, torch.cat((kv.down, k_rope)))
    target.kv_a_layernorm.weight.copy_(norm)
    target.kv_b_proj.weight.copy_(torch.cat((k_up, v_up), dim=1).flatten(0, 1))

    # MLA divides scores by sqrt(nope + rope), the source by sqrt(D).
    q_rows = (torch.cat((w.q, q_rope), dim=1) * ((target.nope + target.rope) / dim) ** 0.5).flatten(0, 1)
    kept = Kept({"rope energy kept": basis.energy_kept, "kv energy kept": kv.energy_kept}, {"kv": kv.spectrum})
    if target.low_rank_query:
        rank = target.q_a_proj.weight.shape[0]
        q = low_rank(q_rows, moment, rank)
        norm, up = after_norm(q, q_rows, inputs, target.q_a_layernorm.eps, latent_norm)
        _set(target.q_a_proj, q.down)
        target.q_a_layernorm.weight.copy_(norm)
        target.q_b_proj.weight.copy_(up)
        kept.energy["query energy kept"], kept.spectra["query"] = q.energy_kept, q.spectrum
    else:
        _set(target.q_proj, q_rows)
    target.dense.weight.copy_(dense.weight)
    if target.dense.bias is not None:
        target.dense.bias.zero_()
        if dense.bias is not None:
            target.dense.bias.copy_(dense.bias)
    return kept


def kv_spectrum(
    w: Projections,
    dense: Tensor,
    inputs: Sequence[Tensor],
    *,
    rotary: int,
    rope: int,
    balance: Balance,
    query_weighted: bool,
    attention: Sequence[Tensor] | None = None,
) -> Tensor:
    """Squared singular values, descending, of what a latent has to hold, in the metric of `fill_mla` at the least fold."""
    moment, fold = moment_of(inputs), rotary // rope
    attended = moment if attention is None else moment_of(inputs, attention)
    basis = concentrate(w, moment, rotary, fold, query_weighted=query_weighted, attended=attended)
    _, _, left = split_rope(w, basis, rotary, fold)
    scaled = balance_metric(w, left, moment, dense, balance, attended) @ torch.cat((left, w.v)).flatten(0, 1)
    _, rows = _spanned(scaled, rank=1)
    return torch.linalg.eigvalsh(rows @ attended @ rows.T).flip(-1)


def _set(linear: torch.nn.Linear, rows_PM: Tensor) -> None:
    """Weights and, where the layer has one, the bias column."""
    linear.weight.copy_(rows_PM[:, :-1])
    if linear.bias is not None:
        linear.bias.copy_(rows_PM[:, -1])
