"""Many sequences written at once, each in a lane of its own, with nothing on the host between two steps.

Tokens, positions, ends and random numbers lie on the device; a step reads and moves them there, so that on a GPU a step is one
graph launch however many lanes there are. The host looks every few steps: it takes what has ended and fills the lane again.
Prompts go the same way, one token per step: they are short here. For serving, with long prompts that are shared, there is the
engine, which keeps books of every sequence in every step.

Legend: B lanes, L tokens of a lane, W pages of a lane, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openling.model.capture import Capture, Replay
from openling.model.ling import Ling
from openling.model.paged import PAGE, PagedCache, PagedStore, RaggedBatch, Sizes
from openling.ops.sampling import draw_in_blocks, units_of

# Columns of the state: the newest token's place, how many tokens are given, how many there may be, whether the lane runs.
PLACE, KNOWN, LIMIT, ALIVE = range(4)


@dataclass(frozen=True)
class Start:
    """Tokens that are given from place `at` of a lane on; what follows is drawn, up to `limit` tokens of the lane in all.

    uniform [L]: the lane's random numbers by place, for a new sequence; None goes on with the sequence that the lane holds.
    """

    lane: int
    at: int
    tokens: Sequence[int]
    limit: int
    uniform: np.ndarray | None = None


@dataclass(frozen=True)
class Ended:
    """A lane that stopped: its tokens, the last of which ended it or came at the limit."""

    lane: int
    tokens: list[int]


def lane_bytes(model: Ling, room: int) -> int:
    """Device memory of a lane, the rows of logits included that sampling makes."""
    sizes = Sizes.of(model.config, model.lm_head.weight.dtype, 0)
    return sizes.slot + -(-room // PAGE) * sizes.page + 16 * room + 40 * model.config.vocab_size


class Lanes:
    """`count` lanes of `room` tokens. stops: tokens that end a sequence. capture: makes a graph of a step, where one can be."""

    def __init__(
        self, model: Ling, *, count: int, room: int, temperature: float, stops: Collection[int], capture: Capture | None = None
    ) -> None:
        self.model, self.count, self.room, self.temperature = model, count, room, temperature
        weight = model.lm_head.weight
        self.device = weight.device
        self.width = -(-room // PAGE)
        self.store = PagedStore(
            model.config, pages=count * self.width, slots=count, drafts=0, dtype=weight.dtype, device=self.device
        )
        self._cache = PagedCache(self.store)
        self._lane_B = torch.arange(count, device=self.device)
        self._table_BW = torch.arange(count * self.width, dtype=torch.int32, device=self.device).view(count, self.width)
        self._stops = torch.tensor(sorted(stops), device=self.device)
        self._state_B4 = torch.zeros(count, 4, dtype=torch.long, device=self.device)
        self._tokens_BL = torch.zeros(count, room + 1, dtype=torch.long, device=self.device)
        self._uniform_BL = torch.zeros(count, room, dtype=torch.float64, device=self.device)
        self._running: set[int] = set()
        self._capture, self._replay = capture, None if capture else self._step

    @property
    def free(self) -> list[int]:
        """Lanes that hold nothing."""
        return [lane for lane in range(self.count) if lane not in self._running]

    @torch.inference_mode()
    def start(self, starts: Sequence[Start]) -> None:
        """Let these lanes run with what is given."""
        if not starts:
            return
        new = [s for s in starts if s.uniform is not None]
        if new:
            lanes = self._send([s.lane for s in new])
            self._uniform_BL[lanes] = self._send(np.stack([s.uniform for s in new if s.uniform is not None]))
            if self.store.recurrent:
                self.store.states[lanes] = 0
        given = [(s.lane, s.at + i, token) for s in starts for i, token in enumerate(s.tokens)]
        lane, place, token = self._send(given).unbind(1)
        self._tokens_BL[lane, place] = token
        states = [(s.at, s.at + len(s.tokens), s.limit, 1) for s in starts]
        self._state_B4[self._send([s.lane for s in starts])] = self._send(states)
        self._running |= {s.lane for s in starts}

    @torch.inference_mode()
    def run(self, steps: int) -> None:
        """Compute steps; on a GPU they are under way when this returns."""
        if self._replay is None:
            assert self._capture is not None
            # A capture runs the step beforehand: on lanes that stand still, since a state must not take a token twice.
            state = self._state_B4.clone()
            self._state_B4.zero_()
            self._replay = self._capture(self._step)
            self._state_B4.copy_(state)
        replay: Replay = self._replay
        for _ in range(steps):
            replay()

    @torch.inference_mode()
    def ended(self) -> list[Ended]:
        """The lanes that have stopped since they were started; waits for the device. They are free then."""
        state = self._state_B4.cpu().numpy()
        lanes = [lane for lane in sorted(self._running) if not state[lane, ALIVE]]
        if not lanes:
            return []
        rows = self._tokens_BL[self._send(lanes)].cpu().numpy()
        self._running -= set(lanes)
        return [Ended(lane, row[: state[lane, PLACE] + 1].tolist()) for lane, row in zip(lanes, rows, strict=True)]

    def _step(self) -> None:
        """One token more in every lane that runs; a lane that stands still computes for nobody's page."""
        place, known, limit, running = self._state_B4.unbind(1)
        alive, lane = running.bool(), self._lane_B
        ids = self._tokens_BL.gather(1, place[:, None])[:, 0]
        rows = (lane * (self.width * PAGE) + place).masked_fill(~alive, self.store.pages * PAGE)
        lengths = (place * running + 1).int()
        slots = lane.masked_fill(~alive, -1)
        self._cache.batch = RaggedBatch(ids[None], place[None], rows, self.count, 1, slots, self._table_BW, lengths)
        drawn = self._draw(self.model.model(ids[None], cache=self._cache)[0], place)
        then = place + 1
        given = self._tokens_BL.gather(1, then[:, None])[:, 0]
        free = then >= known
        token = torch.where(alive & free, drawn, given)
        self._tokens_BL.scatter_(1, then[:, None], token[:, None])
        over = free & ((token[:, None] == self._stops).any(1) | (then + 1 >= limit))
        place.add_(running)
        running.mul_((~over).long())

    def _draw(self, h_BM: Tensor, place_B: Tensor) -> Tensor:
        logits_BV = self.model.logits(h_BM)
        if self.temperature != 1:
            logits_BV = logits_BV / self.temperature
        uniform_B = self._uniform_BL.gather(1, place_B[:, None])[:, 0]
        return draw_in_blocks(units_of(logits_BV), uniform_B)

    def _send(self, values: Sequence[object] | np.ndarray) -> Tensor:
        """Numbers on the device; nobody waits for them to arrive."""
        tensor = torch.as_tensor(np.asarray(values))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
