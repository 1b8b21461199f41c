"""Repetition, presence and frequency penalties: which tokens each request holds, counted on the device.

Only requests that ask for a penalty take memory: a row of V counts and V flags each.

Legend: S rows of the pool, P rows of logits whose request has a penalty, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openling.ops.sampling import on_device, penalise_repetition
from openling.serve.types import Request, SamplingParams

if TYPE_CHECKING:
    from openling.serve.sampling import Chain


class Penalties:
    """A pool of counts that grows by doubling."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._prompt_SV = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._reply_SV = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[str, tuple[int, SamplingParams]] = {}
        self._free: list[int] = []

    def add(self, request: Request) -> None:
        """Mark the tokens of the prompt, if the request has a penalty."""
        params = request.params
        if params.repetition_penalty == 1 and not params.presence_penalty and not params.frequency_penalty:
            return
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._prompt_SV[slot] = False
        self._reply_SV[slot] = 0
        self._prompt_SV[slot, on_device(list(request.prompt_token_ids), self.device, torch.long)] = True
        self._slots[request.id] = slot, params

    def remove(self, request_id: str) -> None:
        """Give a request's row back."""
        if request_id in self._slots:
            self._free.append(self._slots.pop(request_id)[0])

    def apply(self, logits_RV: Tensor, chains: Sequence[Chain]) -> Tensor:
        """Logits with penalties; the rows of a chain's drafts count the drafts before them. The argument stays as it is."""
        rows: list[int] = []
        slots: list[int] = []
        params: list[tuple[float, float, float]] = []
        pending: list[tuple[int, int]] = []
        for row, _, chain, k in _rows(chains):
            if chain.request_id in self._slots:
                slot, p = self._slots[chain.request_id]
                pending += [(len(rows), token) for token in chain.drafts[:k]]
                rows.append(row)
                slots.append(slot)
                params.append((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        if not rows:
            return logits_RV
        slot_P, row_P = on_device([slots, rows], self.device)
        reply_PV = self._reply_SV[slot_P]
        if pending:
            where, ids = on_device(pending, self.device).unbind(-1)
            reply_PV.index_put_((where, ids), torch.ones_like(ids, dtype=torch.int32), accumulate=True)
        repetition_P1, presence_P1, frequency_P1 = on_device(params, self.device).T[:, :, None]
        x_PV, said_PV = logits_RV[row_P], reply_PV > 0
        if any(repetition != 1 for repetition, _, _ in params):
            x_PV = penalise_repetition(x_PV, self._prompt_SV[slot_P] | said_PV, repetition_P1)
        if any(presence for _, presence, _ in params):
            x_PV = x_PV - presence_P1 * said_PV
        if any(frequency for _, _, frequency in params):
            x_PV = x_PV - frequency_P1 * reply_PV
        return logits_RV.index_copy(0, row_P, x_PV)

    def count(self, chains: Sequence[Chain], token_R: Tensor, accepted_C: Tensor) -> None:
        """Add what a step drew: the first accepted_C + 1 rows of each chain."""
        places = [
            (self._slots[chain.request_id][0], row, k, c) for row, c, chain, k in _rows(chains) if chain.request_id in self._slots
        ]
        if places:
            slot_P, row_P, k_P, chain_P = on_device(places, self.device).unbind(-1)
            drawn_P = (k_P <= accepted_C[chain_P]).int()
            self._reply_SV.index_put_((slot_P, token_R[row_P]), drawn_P, accumulate=True)

    def _grow(self) -> None:
        have = len(self._reply_SV)
        more = max(have, 4)
        self._prompt_SV = torch.cat((self._prompt_SV, self._prompt_SV.new_zeros(more, self._prompt_SV.shape[1])))
        self._reply_SV = torch.cat((self._reply_SV, self._reply_SV.new_zeros(more, self._reply_SV.shape[1])))
        self._free.extend(range(have, have + more))


def _rows(chains: Sequence[Chain]) -> Iterator[tuple[int, int, Chain, int]]:
    """Every row of logits: its number, its chain's number, its chain, and how many drafts stand before it."""
    row = 0
    for c, chain in enumerate(chains):
        for k in range(len(chain.drafts) + 1):
            yield row, c, chain, k
            row += 1
