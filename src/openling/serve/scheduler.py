"""What the next step computes: decoding sequences first, then chunks of prompts, oldest first, within a budget of tokens.

Memory is taken here as it is needed: from the free pool, then from cached prefixes, then from the youngest sequence, which goes
back to the queue with its tokens and computes them again (preemption). The oldest sequence can always go on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from openling.errors import UserError
from openling.model.paged import PAGE, PagedStore
from openling.serve.engine_config import EngineConfig, QueueFull
from openling.serve.pool import Pool
from openling.serve.radix import Node, RadixTree
from openling.serve.sequence import Sequence
from openling.serve.types import Request

# Tokens of a step unless the user says otherwise. A GPU needs thousands to hide what launching a step costs.
STEP_TOKENS = {"cuda": 8192, "cpu": 2048}
# In deterministic mode a prompt is cut after every so many tokens, whatever else runs.
FIXED_CHUNK = 512
# Waiting requests that are looked at in one step; those behind them wait for the next.
ADMISSION_WINDOW = 64
# A prompt's end this near behind its branch point gets no state of its own.
WORTH_A_STATE = 128
# Pages freed at once when the pool is empty.
EVICTED_AT_ONCE = 16


@dataclass(frozen=True)
class PromptChunk:
    """Tokens start .. end - 1 of a sequence; last: a token is sampled behind them."""

    sequence: Sequence
    start: int
    end: int
    last: bool


@dataclass
class Plan:
    """One step: decoding sequences with `new` tokens each, then chunks."""

    decodes: list[Sequence] = field(default_factory=list)
    new: int = 1
    chunks: list[PromptChunk] = field(default_factory=list)

    @property
    def sampled(self) -> list[Sequence]:
        """Sequences that get a token, in the order of their rows."""
        return [*self.decodes, *(chunk.sequence for chunk in self.chunks if chunk.last)]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Scheduler:
    """Owns queue, running sequences, pools and prefix tree."""

    def __init__(self, config: EngineConfig, store: PagedStore, max_len: int) -> None:
        self.config, self.store, self.max_len = config, store, max_len
        self.step_tokens = config.step_tokens or STEP_TOKENS[store.device.type]
        poison = config.poison
        self.pages = Pool(store.pages, on_take=store.poison_page if poison else None)
        self.slots = Pool(
            store.slots if store.recurrent else 0, on_take=store.clear_slot, on_free=store.poison_slot if poison else None
        )
        self.tree = RadixTree(self.pages, self.slots, recurrent=store.recurrent)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = self.cached_tokens = 0
        self._arrivals = 0
        # Verified drafts and the next ones may stand behind a sequence's end.
        self.spare = 2 * store.drafts
        self.table_width = -(-(max_len + self.spare) // PAGE)
        self.caching = config.prefix_cache and not config.deterministic

    # -- requests ------------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Queue a request. UserError for one that can never run, QueueFull for one too many."""
        prompt, params = len(request.prompt_token_ids), request.params
        if not prompt:
            raise UserError("the prompt is empty", value="0 tokens", expected="at least one token to continue")
        if prompt + params.max_tokens > self.max_len:
            raise UserError(
                "prompt and reply do not fit into the context", where="max_tokens",
                value=f"{prompt} prompt tokens + max_tokens {params.max_tokens} = {prompt + params.max_tokens}",
                expected=f"at most {self.max_len} tokens",
            )  # fmt: skip
        queued = sum(len(s.tokens) for s in self.waiting)
        if len(self.waiting) >= self.config.max_waiting or queued + prompt > self.config.max_waiting_tokens:
            raise QueueFull(f"{len(self.waiting)} requests with {queued} tokens are waiting already", retry_after=1.0)
        self._arrivals += 1
        sequence = Sequence(request, self._arrivals, np.zeros(self.table_width, np.int32))
        self.waiting.append(sequence)
        return sequence

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its memory is free or cached afterwards."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    # -- a step --------------------------------------------------------------------------------------------------------

    def schedule(self, new: int = 1) -> Plan:
        """Choose the work of a step, with `new` tokens for each decoding sequence, and take the memory for it."""
        plan, preempted = Plan(new=new), self.preemptions
        for sequence in list(self.running):
            if (
                sequence.active
                and sequence.decoding
                and self._take_pages(sequence, len(sequence.tokens) + self.spare, preempt=True)
            ):
                plan.decodes.append(sequence)
        budget = max(self.step_tokens - new * len(plan.decodes), 1)
        for sequence in list(self.running):
            if sequence.active and not sequence.decoding:
                budget -= self._add_chunk(plan, sequence, budget, preempt=True)
        for sequence in list(self.waiting)[:ADMISSION_WINDOW]:
            # Who had to leave in this step must not come back in it: the memory is for those that stay.
            if budget < 1 or len(self.running) >= self.config.max_running or self.preemptions > preempted:
                break
            if not sequence.admissible or self._awaits_sibling(sequence):
                continue
            if not self._admit(sequence):
                break
            taken = self._add_chunk(plan, sequence, budget, preempt=False)
            budget -= taken
            if not taken:
                break
        # A chunk may have taken the memory of a sequence that was chosen before it.
        plan.decodes = [s for s in plan.decodes if s.active]
        plan.chunks = [c for c in plan.chunks if c.sequence.active]
        return plan

    def _add_chunk(self, plan: Plan, sequence: Sequence, budget: int, *, preempt: bool) -> int:
        """Add the next chunk of a prompt; how many tokens of the budget it takes, 0 if there is no room."""
        start, end = sequence.computed, len(sequence.tokens)
        if self.config.deterministic:
            end = min(end, (start // FIXED_CHUNK + 1) * FIXED_CHUNK)
            if end - start > budget and plan:
                return 0
        else:
            end = min([start + budget, end, *(cut for cut in sequence.cuts if cut > start)])
        spare = self.spare if end == len(sequence.tokens) else 0
        if budget < 1 or not self._take_pages(sequence, end + spare, preempt=preempt):
            return 0
        plan.chunks.append(PromptChunk(sequence, start, end, last=end == len(sequence.tokens)))
        return end - start

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to cache more of the same prompt than there is now: it then computes it once."""
        if not (self.caching and sequence.shares):
            return False
        keys = sequence.page_keys()[: (len(sequence.tokens) - 1) // PAGE]
        for other in self.running:
            promised = max(other.cuts, default=0) // PAGE if self.store.recurrent else (other.prompt_tokens - 1) // PAGE
            same = other.request.namespace == sequence.request.namespace and other.computed < promised * PAGE
            if same and keys[:promised] == other.keys[:promised] and promised <= len(keys):
                return self.tree.usable(self.tree.match(sequence.request.namespace, keys)) < promised
        return False

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a slot and what is cached of its tokens; False if there is no slot."""
        path: list[Node] = []
        hit = 0
        if self.caching and sequence.shares:
            keys = sequence.page_keys()[: (len(sequence.tokens) - 1) // PAGE]
            path = self.tree.match(sequence.request.namespace, keys)
            hit = self.tree.usable(path)
        # Pages first: from here on nobody evicts what this sequence starts behind.
        for node in path[:hit]:
            self.pages.share(node.page)
        if self.store.recurrent:
            source = path[hit - 1].state if hit else None
            slot = self._take_slot(keep=path[hit - 1] if hit else None)
            if slot is None:
                for node in path[:hit]:
                    self.pages.release(node.page)
                return False
            sequence.slot = slot
            if source is not None:
                self.store.copy_slot(source, slot)
        for node in path[:hit]:
            sequence.hold(node.page)
        sequence.node = path[hit - 1] if hit else None
        sequence.computed = hit * PAGE
        sequence.cuts = self._cuts(sequence, len(path))
        if sequence.cached is None:
            sequence.cached = min(sequence.computed, sequence.prompt_tokens)
            self.cached_tokens += sequence.cached
        self.waiting.remove(sequence)
        # Older first, also when a sequence comes back after a preemption.
        at = next((i for i, other in enumerate(self.running) if other.arrival > sequence.arrival), len(self.running))
        self.running.insert(at, sequence)
        sequence.active = True
        return True

    def _cuts(self, sequence: Sequence, known: int) -> list[int]:
        """Where copies of the state are worth having: where the prompt leaves cached prompts' path, and its last whole page.

        Not that page if the state before it is near: a copy ends a step, and a step more costs more than a few tokens more.
        """
        if not (self.caching and self.store.recurrent and sequence.shares):
            return []
        end, branch = (len(sequence.tokens) - 1) // PAGE * PAGE, known * PAGE
        if branch and end - branch < WORTH_A_STATE:
            end = branch
        return sorted({cut for cut in (branch, end) if cut > sequence.computed})

    # -- after a step --------------------------------------------------------------------------------------------------

    def computed(self, sequence: Sequence, until: int, *, decoded: bool = False) -> None:
        """Note that the first `until` tokens are computed now; cache whole pages and the states worth having.

        Called right after the step: a state is then at hand for any of the tokens that were `decoded`, and for a chunk's last.
        """
        before, sequence.computed = sequence.computed, until
        if not (self.caching and sequence.shares):
            return
        boundary = until // PAGE * PAGE
        prompt_cut = until in sequence.cuts
        sequence.cuts = [cut for cut in sequence.cuts if cut > until]
        if not self.store.recurrent:
            if boundary > before // PAGE * PAGE:
                self._cache_pages(sequence, boundary)
        elif prompt_cut:
            self._cache_state(sequence, until, 0)
        elif decoded and boundary > before:
            self._cache_state(sequence, boundary, boundary - before if sequence.waiting_tokens else 0, rolling=True)

    def _cache_pages(self, sequence: Sequence, until: int) -> Node:
        """Hand the first `until` tokens' pages to the tree; where it has them already the sequence takes over the tree's."""
        first = sequence.node.depth if sequence.node is not None else 0
        keys = sequence.page_keys()[first : until // PAGE]
        pages = sequence.pages[first : until // PAGE]
        sequence.node, kept = self.tree.insert(sequence.request.namespace, keys, pages, sequence.node)
        for i, (own, page) in enumerate(zip(pages, kept, strict=True), start=first):
            if own != page:
                self.pages.share(page)
                self.pages.release(own)
                sequence.pages[i] = sequence.table[i] = page
        return sequence.node

    def _cache_state(self, sequence: Sequence, until: int, fold: int, *, rolling: bool = False) -> None:
        """Put a copy of the state after `until` tokens into the tree; a reply keeps only its newest one."""
        node = self._cache_pages(sequence, until)
        if node.state is not None or sequence.slot is None:
            return
        old = sequence.rolling
        if rolling and old is not None and old.state is not None and old is not node:
            slot: int | None = self.tree.detach(old)
        else:
            slot = self._take_slot(keep=None)
        if slot is None:
            return
        self.store.copy_slot(sequence.slot, slot, fold)
        self.tree.attach(node, slot)
        if rolling:
            sequence.rolling = node

    # -- memory --------------------------------------------------------------------------------------------------------

    def _take_slot(self, *, keep: Node | None) -> int | None:
        """A free slot, if need be that of a cached state other than `keep`'s."""
        if not self.slots.free and not self.tree.evict_state(keep):
            return None
        return self.slots.take()

    def _take_pages(self, sequence: Sequence, tokens: int, *, preempt: bool) -> bool:
        """Make sure the sequence has pages for its first `tokens` tokens; False if it must wait or was itself preempted."""
        missing = -(-tokens // PAGE) - len(sequence.pages)
        while self.pages.free < missing:
            if self.tree.evict_pages(max(missing, EVICTED_AT_ONCE)):
                continue
            victim = self.running[-1] if preempt else None
            if victim is None:
                return False
            self.preempt(victim)
            if victim is sequence:
                return False
        for _ in range(missing):
            sequence.hold(self.pages.take())
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, tokens kept, memory given up."""
        self.running.remove(sequence)
        self._release(sequence)
        at = next((i for i, other in enumerate(self.waiting) if other.arrival > sequence.arrival), len(self.waiting))
        self.waiting.insert(at, sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        for page in sequence.pages:
            self.pages.release(page)
        if sequence.slot is not None:
            self.slots.release(sequence.slot)
        sequence.pages, sequence.slot, sequence.computed, sequence.active = [], None, 0, False
        sequence.node = sequence.rolling = None
        sequence.cuts, sequence.drafts, sequence.waiting_tokens = [], [], 0

    def flush(self) -> None:
        """Forget all that was computed: cached prefixes, and what running sequences hold; these start again."""
        for sequence in reversed(list(self.running)):
            self.preempt(sequence)
        self.forget_cached()

    def forget_cached(self) -> None:
        """Empty the prefix tree; running sequences keep what they hold, but start no new branch of it."""
        self.tree.flush()
        for sequence in self.running:
            sequence.node = sequence.rolling = None

    def check(self) -> None:
        """Raise Failure unless every page and slot is free or has the owners it counts."""
        self.pages.check("pages", [*self.tree.owned_pages(), *(page for s in self.running for page in s.pages)])
        self.slots.check("slots", [*self.tree.owned_slots(), *(s.slot for s in self.running if s.slot is not None)])
