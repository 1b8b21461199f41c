"""The loss of a part of a batch, as its share of means over the tokens of the whole batch.

    loss = ce_weight ce + kl_weight kl + z_weight z + mtp_weight mean_k mtp_k

Each term is a sum over the tokens that have a target, divided by how many the global batch has: parts, and ranks, add up to the
same step however the batch is cut. MTP step k reads the hidden state at a token and the embedding of the one k places later, and
predicts the next (Ling-2.6 report, section 2); targets never lie in another document.

With more steps than MTP layers, the layers take turns (one layer: all steps share it). `later` detaches what every step but the
first reads, embeddings and head included: our reading of "gradients of every layer but the first are detached" (table 8).

Legend: N tokens of the flat rows, K of them with a target, B rows, T tokens of a row, M hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openling.config.train import TrainConfig
from openling.data.batches import NO_TARGET, PackedBatch
from openling.model.ling import Ling
from openling.ops.loss import target_loss


@dataclass(frozen=True)
class Ahead:
    """What is to be predicted some places ahead: where in the flat tokens, and what."""

    place_K: Tensor
    target_K: Tensor


@dataclass(frozen=True)
class Part:
    """Rows that run through the model at once."""

    ids_BT: Tensor
    cu_seqlens: Tensor | None
    """None where every row is one document."""
    next: Ahead
    mtp: tuple[Ahead, ...]
    mtp_ids_BT: tuple[Tensor, ...]
    """The tokens that each MTP step embeds; 0 behind a document's end, where nothing is predicted."""


@dataclass(frozen=True)
class Loss:
    """`loss`: this part's share, to call backward on. Shares of the terms, detached: add up parts for the means."""

    loss: Tensor
    ce: Tensor
    kl: Tensor | None
    z: Tensor | None
    mtp: Tensor | None
    agreement: Tensor | None = None


def mtp_steps(model: Ling, config: TrainConfig) -> int:
    """How many MTP steps a run trains."""
    return (config.mtp_steps or model.config.num_nextn_predict_layers) if config.mtp else 0


def prepare(batch: PackedBatch, steps: int) -> Part:
    """A part from rows of a batch, on the CPU: bounds are looked at here, so that no GPU has to be waited for."""
    rows, length = batch.ids.shape
    bounds = batch.cu_seqlens.long()
    whole = len(bounds) == rows + 1 and bool((bounds == torch.arange(0, rows * length + 1, length)).all())
    target, found, ids = batch.flat_targets[0], [], []
    found.append(_ahead(target))
    for _ in range(steps):
        ids.append(target.clamp(min=0).view(rows, length) if whole else target.clamp(min=0)[None])
        target = torch.cat((target[1:], target.new_full((1,), NO_TARGET)))
        target[bounds[1:] - 1] = NO_TARGET
        found.append(_ahead(target))
    first = batch.ids if whole else batch.flat_ids
    return Part(first, None if whole else batch.cu_seqlens, found[0], tuple(found[1:]), tuple(ids))


def _ahead(target_N: Tensor) -> Ahead:
    place = (target_N != NO_TARGET).nonzero()[:, 0]
    return Ahead(place, target_N[place])


def counts(parts: list[Part]) -> Tensor:
    """Tokens with a target in all parts: of the next token, then of each MTP step."""
    return torch.tensor([[len(a.place_K) for a in (p.next, *p.mtp)] for p in parts]).sum(0)


def to_device(part: Part, device: torch.device) -> Part:
    """The same part where the model is."""
    if device.type == "cpu":
        return part

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    def ahead(a: Ahead) -> Ahead:
        return Ahead(move(a.place_K), move(a.target_K))

    bounds = None if part.cu_seqlens is None else move(part.cu_seqlens)
    return Part(move(part.ids_BT), bounds, ahead(part.next), tuple(map(ahead, part.mtp)), tuple(map(move, part.mtp_ids_BT)))


def objective(
    model: Ling,
    part: Part,
    counts: Tensor,
    config: TrainConfig,
    *,
    head: Tensor,
    teacher: tuple[Ling, Tensor] | None = None,
) -> Loss:
    """This part's share of the batch's loss; `counts` are those of the whole batch, of all parts and ranks.

    head, teacher: LM heads as the caller wants them multiplied.
    """
    denominators = [max(1, int(n)) for n in counts]
    h = model.model(part.ids_BT, cu_seqlens=part.cu_seqlens)
    followed = None
    if teacher is not None:
        with torch.no_grad():
            followed = (_rows(teacher[0].model(part.ids_BT, cu_seqlens=part.cu_seqlens), part.next.place_K), teacher[1])
    main = target_loss(
        _rows(h, part.next.place_K),
        head,
        part.next.target_K,
        teacher=followed,
        ce_weight=config.ce,
        kl_weight=config.kl if teacher is not None else 0.0,
        z_weight=config.z,
        denominator=denominators[0],
    )
    if not part.mtp:
        return Loss(main.loss, main.ce, main.kl, main.z, None)
    shares = mtp_losses(model, part, h, head, denominators[1:], config.mtp_detach)
    mtp = torch.stack(shares).mean()
    return Loss(main.loss + config.mtp * mtp, main.ce, main.kl, main.z, mtp.detach())


def mtp_losses(model: Ling, part: Part, h: Tensor, head: Tensor, denominators: list[int], detach: str) -> list[Tensor]:
    """The share of each MTP step's mean cross-entropy."""
    layers, shares = model.model.mtp_layers(), []
    for k, (ahead, ids) in enumerate(zip(part.mtp, part.mtp_ids_BT, strict=True)):
        embedded, weight = model.model.word_embeddings(ids), head
        if detach == "all" or (detach == "later" and k):
            h, embedded, weight = h.detach(), embedded.detach(), weight.detach()
        tables = model.model.rope(ids, 0, part.cu_seqlens)
        h = layers[k % len(layers)](h, embedded, tables, cu_seqlens=part.cu_seqlens)
        shares.append(target_loss(_rows(h, ahead.place_K), weight, ahead.target_K, denominator=denominators[k]).loss)
    return shares


def _rows(h_BTM: Tensor, place_K: Tensor) -> Tensor:
    flat = h_BTM.flatten(0, 1)
    return flat if len(place_K) == flat.shape[0] else flat.index_select(0, place_K)
