"""Drafts by the MTP layer, and when they pay.

The MTP layer reads a position's final hidden state and the token behind it, and expects the token behind that one; its own output
stands in for the hidden state of a token that is not verified yet, so it chains. Its latents lie in the same pages as those of
the other layers. A step verifies a sequence's drafts in one pass of the model (`new` = drafts + 1 tokens); Lightning's states do
not see them: accepted tokens wait in a ring beside the state and enter it in a later step (`ops.lightning_decode`).

Drafts are the layer's likeliest tokens, and a draft is accepted if sampling draws that very token. With a draft that is certain
this is rejection sampling (arXiv 2211.17192), so the distribution is exact; a seeded reply is the same with and without drafts.
A prefix taken over from another request may lack the MTP row of its last token: that can cost a draft, never change a reply.

Legend: N tokens of the step, R sequences that get drafts, T tokens of a decoding sequence, M model width.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from openling.model.paged import PAGE, RaggedBatch
from openling.serve.graphs import DecodeGraphs, Mirror, Replay
from openling.serve.runner import Forward, Runner
from openling.serve.scheduler import Plan
from openling.serve.sequence import Sequence


class Drafter:
    """Keeps the MTP layer's rows up to date and proposes `depth` tokens per sequence."""

    def __init__(self, runner: Runner, depth: int, *, most: int) -> None:
        self.runner, self.depth = runner, depth
        model = runner.model.model
        self._layer = model.mtp_layers()[0]
        self._memory = runner.cache.layers[model.config.num_hidden_layers]
        self._buffers: dict[int, Mirror] = {}
        self._chain = Mirror((most, depth, 2), torch.int64, runner.device)
        self._graphs: dict[tuple[int, int], Replay] = {}

    @torch.inference_mode()
    def follow(self, plan: Plan, forward: Forward, added: Many[int], *, propose: bool) -> None:
        """Read what a step made: plan.sampled[i] got added[i] tokens, which it has already. Sets `drafts` if asked to."""
        if forward.logits_NV is not None and self.runner.graphs is not None:
            self._follow_in_graph(self.runner.graphs, plan, added, propose=propose)
            return
        runner, batch = self.runner, forward.batch
        batch.ids = runner.to_device(np.array(_next_ids(plan, added), dtype=np.int64))[None]
        h_NM = self._run(batch, forward.hidden_NM[None])[0]
        going = [i for i, s in enumerate(plan.sampled) if not s.done]
        for s in plan.sampled:
            s.drafts = []
        if not propose or not going:
            return
        sequences = [plan.sampled[i] for i in going]
        decodes = len(plan.decodes)
        rows = [forward.first_rows[i] + (added[i] - 1 if i < decodes else 0) for i in going]
        h_RM = h_NM[runner.to_device(np.array(rows, dtype=np.int64))]
        drafts = [self.runner.model.logits(h_RM).argmax(-1)]
        for step in range(1, self.depth):
            h_RM = self._run(self._single(sequences, step - 1, drafts[-1]), h_RM[None])[0]
            drafts.append(self.runner.model.logits(h_RM).argmax(-1))
        _propose(sequences, torch.stack(drafts, dim=1).tolist())

    def _follow_in_graph(self, graphs: DecodeGraphs, plan: Plan, added: Many[int], *, propose: bool) -> None:
        """The same for a step that ran as a graph; sequences that are done get drafts too, which nobody reads."""
        count, new = len(plan.decodes), plan.new
        size = graphs.size_of(count)
        follow = self._buffers.setdefault(new, Mirror((graphs.most, new + 1), torch.int64, self.runner.device))
        follow.host[:size] = 0
        follow.host[:count, :new] = np.array(_next_ids(plan, added), dtype=np.int64).reshape(count, new)
        follow.host[:, new] = np.arange(graphs.most) * new
        follow.host[:count, new] += np.array(added, dtype=np.int64) - 1
        follow.send(size)
        chain = self._chain
        chain.host[:size] = (0, self.runner.store.pages * PAGE)
        for i, s in enumerate(plan.decodes):
            at = np.arange(s.computed, s.computed + self.depth)
            chain.host[i, :, 0] = at
            chain.host[i, :, 1] = s.table[at // PAGE].astype(np.int64) * PAGE + at % PAGE
        chain.send(size)
        if (size, new) not in self._graphs:
            self._graphs[size, new] = graphs.capture(lambda: self._draft(graphs, follow.device, size, new))
        drafts_BK = self._graphs[size, new]()
        for s in plan.decodes:
            s.drafts = []
        if propose:
            _propose(plan.decodes, drafts_BK[:count].tolist())

    def _draft(self, graphs: DecodeGraphs, follow_BX: Tensor, size: int, new: int) -> Tensor:
        """Drafts [B, K] from the hidden states and buffers of a captured step."""
        batch = graphs.batch(size, new)
        batch.ids = follow_BX[:size, :new].reshape(1, size * new)
        h_BM = self._run(batch, graphs.hidden(size, new)[None])[0][follow_BX[:size, new]]
        drafts = [self.runner.model.logits(h_BM).argmax(-1)]
        for step in range(self.depth - 1):
            positions, rows = self._chain.device[:size, step].unbind(1)
            lengths = (positions + 1).int()
            single = RaggedBatch(drafts[-1][None], positions[None], rows, size, 1, batch.slots, batch.table, lengths)
            h_BM = self._run(single, h_BM[None])[0]
            drafts.append(self.runner.model.logits(h_BM).argmax(-1))
        return torch.stack(drafts, dim=1)

    def _run(self, batch: RaggedBatch, h_1NM: Tensor) -> Tensor:
        """The MTP layer's output [1, N, M] for hidden states and the tokens behind them."""
        model, cache = self.runner.model.model, self.runner.cache
        cache.batch = batch
        out: Tensor = self._layer(h_1NM, model.word_embeddings(batch.ids), model.rope.at(batch.positions), self._memory)
        return out

    def _single(self, sequences: Many[Sequence], ahead: int, ids_R: Tensor) -> RaggedBatch:
        """One token for each sequence, `ahead` positions behind its last computed one."""
        at = np.array([s.computed + ahead for s in sequences], dtype=np.int64)
        pages = np.array([s.pages[p // PAGE] for s, p in zip(sequences, at, strict=True)], dtype=np.int64)
        packed = self.runner.to_device(np.stack((at, pages * PAGE + at % PAGE)))
        batch = RaggedBatch(ids_R[None], packed[0][None], packed[1])
        self.runner.add_decodes(batch, sequences, 1, ahead=ahead)
        return batch


def _propose(sequences: Many[Sequence], drafts: list[list[int]]) -> None:
    """Keep as many drafts of each sequence as its reply may still take."""
    for s, proposed in zip(sequences, drafts, strict=True):
        s.drafts = proposed[: max(0, s.request.params.max_tokens - s.reply_tokens - 1)]


def _next_ids(plan: Plan, added: Many[int]) -> list[int]:
    """The token behind each of the step's tokens; 0 where it is not known, behind refused drafts."""
    ids: list[int] = []
    for s, count in zip(plan.decodes, added, strict=False):
        ids += s.tokens[len(s.tokens) - count :] + [0] * (plan.new - count)
    for chunk in plan.chunks:
        known = chunk.sequence.tokens[chunk.start + 1 : chunk.end + 1]
        ids += known + [0] * (chunk.end - chunk.start - len(known))
    return ids
