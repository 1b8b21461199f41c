"""The loss of a part of a batch, as its share of means over the tokens of the whole batch.

    loss = ce_weight ce + kl_weight kl + align_weight mean_l align_l + z_weight z + mtp_weight mean_k mtp_k

Each term is a sum over the tokens that have a target, divided by how many the global batch has: parts, and ranks, add up to the
same step however the batch is cut. MTP step k reads the hidden state at a token and the embedding of the one k places later, and
predicts the next (Ling-2.6 report, section 2); targets never lie in another document.

align_l is the squared distance of student's and teacher's residual streams behind layer l (the last: behind the final norm) over
the square of the teacher's, at a token: hidden-state alignment as in RADLADS (arXiv 2505.03005), all layers at once,
relative so that no layer's scale decides.

With more steps than MTP layers, the layers take turns (one layer: all steps share it). `later` detaches what every step but the
first reads, embeddings and head included: our reading of "gradients of every layer but the first are detached" (table 8).

On a mesh a part is a context rank's slice of its rows: targets are found on the whole rows, then cut. Tensor ranks hold the words
of the head in parts (`ops.loss`), and each forms the hidden states' gradient of its own words: `copy` adds these up.

Legend: N tokens of the flat rows, K of them here with a target, B rows, S tokens of a row, T of them here, M hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from openling.config.train import TrainConfig
from openling.data.batches import NO_TARGET, PackedBatch
from openling.model.ling import Ling
from openling.ops.loss import target_loss
from openling.parallel.apply import inside
from openling.parallel.collectives import copy
from openling.parallel.context import ContextMemory, Slice, slice_of

# The LM head of a model as it is to be multiplied; called while the model's weights are whole.
Head = Callable[[Ling], Tensor]


@dataclass(frozen=True)
class Ahead:
    """What is to be predicted some places ahead: where in the flat tokens, and what."""

    place_K: Tensor
    target_K: Tensor


@dataclass(frozen=True)
class Part:
    """Rows that run through the model at once, or a context rank's slice of them."""

    ids_BT: Tensor
    cu_seqlens: Tensor | None
    """None where every row is one document, and for a slice."""
    next: Ahead
    mtp: tuple[Ahead, ...]
    mtp_ids_BT: tuple[Tensor, ...]
    """The tokens that each MTP step embeds; 0 behind a document's end, where nothing is predicted."""
    slice: Slice | None = None
    memory: ContextMemory | None = None
    """Through which mixers see the other slices; made by `to_device`."""


class Loss(NamedTuple):
    """`loss`: this part's share, to call backward on. Shares of the terms, detached: add up parts for the means."""

    loss: Tensor
    ce: Tensor
    kl: Tensor | None
    z: Tensor | None
    mtp: Tensor | None
    align: Tensor | None = None


def mtp_steps(model: Ling, config: TrainConfig) -> int:
    """How many MTP steps a run trains."""
    return (config.mtp_steps or model.config.num_nextn_predict_layers) if config.mtp else 0


def prepare(batch: PackedBatch, steps: int, context: dist.ProcessGroup | None = None) -> Part:
    """A part from rows of a batch, on the CPU: bounds are looked at here, so that no GPU has to be waited for.

    context: the ranks that share these rows; this one's slice is returned.
    """
    rows, length = batch.ids.shape
    bounds = batch.cu_seqlens.long()
    whole = len(bounds) == rows + 1 and bool((bounds == torch.arange(0, rows * length + 1, length)).all())
    shape = (rows, length) if whole else (1, rows * length)
    documents = None if whole else batch.cu_seqlens
    part = None if context is None else slice_of(shape, documents, context)
    mine = slice(None) if part is None else part.mine

    def cut(x_N: Tensor) -> Tensor:
        return x_N.view(shape)[:, mine]

    target = batch.flat_targets[0]
    found, ids = [_ahead(cut(target))], []
    for _ in range(steps):
        ids.append(cut(target.clamp(min=0)))
        target = torch.cat((target[1:], target.new_full((1,), NO_TARGET)))
        target[bounds[1:] - 1] = NO_TARGET
        found.append(_ahead(cut(target)))
    cu_seqlens = documents if part is None else None
    return Part(cut(batch.flat_ids[0]), cu_seqlens, found[0], tuple(found[1:]), tuple(ids), part)


def _ahead(target_BT: Tensor) -> Ahead:
    flat = target_BT.flatten()
    place = (flat != NO_TARGET).nonzero()[:, 0]
    return Ahead(place, flat[place])


def counts(parts: list[Part]) -> Tensor:
    """Tokens with a target in all parts: of the next token, then of each MTP step."""
    return torch.tensor([[len(a.place_K) for a in (p.next, *p.mtp)] for p in parts]).sum(0)


def to_device(part: Part, device: torch.device) -> Part:
    """The same part where the model is, with the memory of a slice."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    def ahead(a: Ahead) -> Ahead:
        return Ahead(move(a.place_K), move(a.target_K))

    bounds = None if part.cu_seqlens is None else move(part.cu_seqlens)
    memory = None if part.slice is None else part.slice.memory(device)
    ahead_ids = tuple(map(move, part.mtp_ids_BT))
    return Part(move(part.ids_BT), bounds, ahead(part.next), tuple(map(ahead, part.mtp)), ahead_ids, part.slice, memory)


def own_head(model: Ling) -> Tensor:
    """The head as the model holds it."""
    return model.lm_head.weight


def objective(
    model: Ling,
    part: Part,
    counts: Tensor,
    config: TrainConfig,
    *,
    head: Head = own_head,
    teacher: Ling | None = None,
    tensor: dist.ProcessGroup | None = None,
) -> Loss:
    """This part's share of the batch's loss; `counts` are those of the whole batch, of all parts and ranks.

    tensor: the ranks that hold the other words of both heads. On a mesh it is called through `Parallel.run`.
    """
    streams: tuple[list[Tensor], list[Tensor]] | None = ([], []) if teacher is not None and config.align else None
    own, theirs = streams or (None, None)
    h = model.model(part.ids_BT, cache=part.memory, cu_seqlens=part.cu_seqlens, hidden_states=own)
    followed = None
    if teacher is not None:
        with torch.no_grad():
            followed = inside(teacher, lambda: _followed(teacher, part, head, theirs))
    loss = objective_of(h, model, part, counts, config, head=head, followed=followed, tensor=tensor)
    if streams is None:
        return loss
    align = alignment(*streams, part.next.place_K, max(1, int(counts[0])))
    return loss._replace(loss=loss.loss + config.align * align, align=align.detach())


def objective_of(
    h_BTM: Tensor,
    model: Ling,
    part: Part,
    counts: Tensor,
    config: TrainConfig,
    *,
    head: Head = own_head,
    followed: tuple[Tensor, Tensor] | None = None,
    tensor: dist.ProcessGroup | None = None,
) -> Loss:
    """The same from the output of the final norm, but for alignment: of the model it needs embeddings, head and MTP layers.

    followed: the teacher's hidden states where a next token is predicted, and its head.
    """
    denominators = [max(1, int(n)) for n in counts]
    main = target_loss(
        _rows(h_BTM, part.next.place_K, tensor),
        head(model),
        part.next.target_K,
        teacher=followed if config.kl else None,
        ce_weight=config.ce,
        kl_weight=config.kl if followed is not None else 0.0,
        z_weight=config.z,
        denominator=denominators[0],
        group=tensor,
    )
    if not part.mtp:
        return Loss(main.loss, main.ce, main.kl, main.z, None)
    shares = mtp_losses(model, part, h_BTM, head(model), denominators[1:], config.mtp_detach, tensor)
    mtp = torch.stack(shares).mean()
    return Loss(main.loss + config.mtp * mtp, main.ce, main.kl, main.z, mtp.detach())


def alignment(student: list[Tensor], teacher: list[Tensor], place_K: Tensor, denominator: int) -> Tensor:
    """The share of the mean over layers of |student - teacher|^2 / |teacher|^2 by token; streams [B, T, M], the embeddings first.

    Every tensor rank holds whole streams and forms their whole gradient: nothing is added up over them.
    """
    shares = []
    for own, theirs in zip(student[1:], teacher[1:], strict=True):
        wide = torch.promote_types(own.dtype, torch.float32)
        a, b = _rows(own, place_K).to(wide), _rows(theirs, place_K).to(wide)
        shares.append(((a - b).square().sum(-1) / b.square().sum(-1).clamp(min=1e-12)).sum() / denominator)
    return torch.stack(shares).mean()


def _followed(teacher: Ling, part: Part, head: Head, streams: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """The teacher's hidden states where a next token is predicted, and its head; `streams` receives the streams behind layers."""
    h = teacher.model(part.ids_BT, cache=part.memory, cu_seqlens=part.cu_seqlens, hidden_states=streams)
    return _rows(h, part.next.place_K), head(teacher)


def mtp_losses(
    model: Ling,
    part: Part,
    h: Tensor,
    head: Tensor,
    denominators: list[int],
    detach: str,
    tensor: dist.ProcessGroup | None = None,
) -> list[Tensor]:
    """The share of each MTP step's mean cross-entropy."""
    layers, shares, memory = model.model.mtp_layers(), [], part.memory
    for k, (ahead, ids) in enumerate(zip(part.mtp, part.mtp_ids_BT, strict=True)):
        embedded, weight = model.model.word_embeddings(ids), head
        if detach == "all" or (detach == "later" and k):
            h, embedded, weight = h.detach(), embedded.detach(), weight.detach()
        tables = model.model.rope(ids, 0, part.cu_seqlens) if memory is None else model.model.rope.at(memory.positions_1T)
        seen = None if memory is None else memory.layers[0]
        h = layers[k % len(layers)](h, embedded, tables, seen, cu_seqlens=part.cu_seqlens)
        rows = _rows(h, ahead.place_K, tensor)
        shares.append(target_loss(rows, weight, ahead.target_K, denominator=denominators[k], group=tensor).loss)
    return shares


def _rows(h_BTM: Tensor, place_K: Tensor, tensor: dist.ProcessGroup | None = None) -> Tensor:
    flat = h_BTM.flatten(0, 1)
    rows = flat if len(place_K) == flat.shape[0] else flat.index_select(0, place_K)
    return rows if tensor is None else copy(rows, tensor)
