"""The next tokens of a mixed batch: every request by its own SamplingParams, without waiting for the GPU.

A request that speculates checks its drafts here too. `Chain.drafts` K tokens long takes K + 1 rows of logits, and as many of the
drafts are accepted as the target distribution allows. Two ways, both exact in distribution:

- without `draft_probability` each row is sampled as if there were no draft, and a draft is accepted if it is that token. The
  reply to a seeded request is then the same with and without speculation. The best there is for the likeliest tokens as drafts.
- with it (drafts drawn from q by `Sampler.draft`): accepted with probability min(1, p / q), else replaced by a draw from
  max(p - q, 0) (arXiv 2211.17192). Accepts more of drafts that were drawn at a temperature.

Legend: C chains, R rows (K + 1 per chain), D drafts of all chains, V vocabulary, N alternatives, W words of 32 tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openling.errors import UserError
from openling.ops.sampling import draw, filter_logits, on_device, to_units, units_of, unpack_bits
from openling.serve.penalties import Penalties
from openling.serve.types import Request, SamplingParams, TokenLogprob

# Independent random numbers of one (seed, position).
TOKEN, ACCEPT, RESIDUAL, DRAFT = range(4)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Chain:
    """One request's share of a step. position: reply tokens before its first row; drafts: what it may say from there on."""

    request_id: str
    position: int
    drafts: tuple[int, ...] = ()


class RowMask(NamedTuple):
    """Tokens that grammars allow: row rows[i] of the logits keeps the set bits of words_NW[i] (int32, lowest bit first)."""

    rows: Sequence[int]
    words_NW: Tensor


@dataclass(frozen=True)
class Sampled:
    """What a step drew, on the device. Of chain c the first accepted_C[c] + 1 rows count: accepted drafts and one token more."""

    token_R: Tensor
    accepted_C: Tensor
    chains: tuple[Chain, ...]
    logprobs: RowLogprobs | None

    def tokens(self) -> list[list[int]]:
        """New tokens of every chain; waits for the device."""
        tokens, accepted = self.token_R.tolist(), self.accepted_C.tolist()
        starts = first_rows(self.chains)
        return [tokens[start : start + count + 1] for start, count in zip(starts, accepted, strict=True)]

    def token_logprobs(self) -> list[list[TokenLogprob] | None]:
        """Log-probabilities beside `tokens()`, None for requests that did not ask; waits for the device."""
        if self.logprobs is None:
            return [None] * len(self.chains)
        rows, accepted = self.logprobs.lists(self.token_R), self.accepted_C.tolist()
        found: list[list[TokenLogprob] | None] = []
        for start, count in zip(first_rows(self.chains), accepted, strict=True):
            chain = rows[start : start + count + 1]
            found.append(None if chain[0] is None else [row for row in chain if row is not None])
        return found


class RowLogprobs(NamedTuple):
    """Of each row's token; wanted[r]: alternatives that row r's request asked for, None if it wants no log-probabilities."""

    logprob_R: Tensor
    sampled_R: Tensor
    top_ids_RN: Tensor
    top_logprobs_RN: Tensor
    wanted: tuple[int | None, ...]

    def lists(self, token_R: Tensor) -> list[TokenLogprob | None]:
        """One entry per row."""
        columns = (token_R, self.logprob_R, self.sampled_R, self.top_ids_RN, self.top_logprobs_RN)
        rows = zip(*(column.tolist() for column in columns), self.wanted, strict=True)
        return [
            None if n is None else TokenLogprob(token, logprob, sampled, tuple(zip(ids[:n], tops[:n], strict=True)))
            for token, logprob, sampled, ids, tops, n in rows
        ]


@dataclass(frozen=True)
class _State:
    """What the sampler knows of one request."""

    params: SamplingParams
    seed: int
    bias_ids: Tensor
    bias_values: Tensor
    ends: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """Settings of every row as tensors: the same from step to step while the batch is."""

    states: tuple[_State, ...]
    seed_R: np.ndarray
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    greedy_R: Tensor | None
    all_greedy: bool
    candidates: int | None
    bias: tuple[Tensor, Tensor, Tensor] | None
    draft_row_D: Tensor
    chain_shape: tuple[Tensor, int]


class Sampler:
    """Draws tokens for the requests it was told of. vocab_size: width of the logits; eos_ids: what `min_tokens` holds back."""

    def __init__(self, vocab_size: int, *, eos_ids: Collection[int] = (), device: torch.device | str = "cpu") -> None:
        self.vocab_size = vocab_size
        self.eos_ids = tuple(eos_ids)
        self.device = torch.device(device)
        self._states: dict[str, _State] = {}
        self._penalties = Penalties(vocab_size, self.device)
        self._plan_key: tuple[tuple[str, int], ...] = ()
        self._plan: _Plan | None = None

    def add(self, request: Request) -> None:
        """Take a request on. Raises UserError for ids outside the vocabulary."""
        params = request.params
        for id in (*params.logit_bias, *params.stop_token_ids):
            if not 0 <= id < self.vocab_size:
                raise UserError(
                    "no such token", where="logit_bias or stop_token_ids", value=id, expected=f"0 to {self.vocab_size - 1}"
                )
        self._states[request.id] = _State(
            params=params,
            seed=(secrets.randbits(64) if params.seed is None else params.seed) % 2**64,
            bias_ids=on_device(list(params.logit_bias), self.device, torch.long),
            bias_values=on_device(list(params.logit_bias.values()), self.device, torch.float32),
            ends=(*params.stop_token_ids, *(() if params.ignore_eos else self.eos_ids)),
        )
        self._plan_key = ()
        self._penalties.add(request)

    def remove(self, request_id: str) -> None:
        """Forget a request; one that is unknown is no error."""
        if self._states.pop(request_id, None) is not None:
            self._plan_key = ()
            self._penalties.remove(request_id)

    @torch.inference_mode()
    def sample(
        self,
        logits_RV: Tensor,
        chains: Sequence[Chain],
        *,
        mask: RowMask | None = None,
        draft_probability_DV: Tensor | None = None,
    ) -> Sampled:
        """Draw (and count, for penalties) the tokens of a step from FP32 logits; NaN logits give a NaN logprob and some token.

        A row with a grammar ends when the grammar says so: min_tokens does not apply to it.
        """
        plan = self._planned(chains)
        processed_RV = self._processed(logits_RV, plan, chains, mask)
        token_R = processed_RV.argmax(-1)
        units_RV = None
        if not plan.all_greedy:
            units_RV = self._units(processed_RV, plan)
            drawn_R = draw(units_RV, self._uniform(plan.seed_R, _positions(chains), TOKEN))
            token_R = drawn_R if plan.greedy_R is None else torch.where(plan.greedy_R, token_R, drawn_R)
        accepted_C = torch.zeros(len(chains), dtype=torch.long, device=self.device)
        if len(plan.draft_row_D):
            draft_D = on_device([token for chain in chains for token in chain.drafts], self.device)
            accept_D = token_R[plan.draft_row_D] == draft_D
            if draft_probability_DV is not None and units_RV is not None:
                token_R, accept_D = self._reject(token_R, accept_D, draft_D, units_RV, draft_probability_DV, plan, chains)
            accepted_C = _accepted(accept_D, *plan.chain_shape)
        self._penalties.count(chains, token_R, accepted_C)
        return Sampled(token_R, accepted_C, tuple(chains), self._logprobs(logits_RV, processed_RV, token_R, plan))

    @torch.inference_mode()
    def distribution(self, logits_RV: Tensor, chains: Sequence[Chain], *, mask: RowMask | None = None) -> Tensor:
        """The distribution each row is sampled from, [R, V], FP32; greedy rows are one-hot."""
        plan = self._planned(chains)
        return self._probability(self._processed(logits_RV, plan, chains, mask), plan)

    @torch.inference_mode()
    def draft(self, logits_CV: Tensor, chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
        """Draw a draft for each chain, to stand at its position: ids [C] and the distribution q [C, V] that they were drawn from.

        By the request's temperature and filters, from logits of a draft head, with random numbers that `sample` does not use.
        `chains` hold no drafts here; `position` counts those drafted before.
        """
        plan = self._planned(chains)
        q_CV = self._probability(logits_CV, plan)
        return draw(to_units(q_CV), self._uniform(plan.seed_R, _positions(chains), DRAFT)), q_CV

    def _processed(self, logits_RV: Tensor, plan: _Plan, chains: Sequence[Chain], mask: RowMask | None) -> Tensor:
        """Logits after bias, penalties and masks, before the temperature; the argument itself stays as it is."""
        x_RV = logits_RV
        if plan.bias is not None:
            rows, ids, values = plan.bias
            x_RV = x_RV.index_put((rows, ids), values, accumulate=True)
        x_RV = self._penalties.apply(x_RV, chains)
        masked = {} if mask is None else {row: i for i, row in enumerate(mask.rows)}
        held = [
            (row, id)
            for row, (state, position) in enumerate(zip(plan.states, _positions(chains), strict=True))
            if position < state.params.min_tokens and row not in masked
            for id in state.ends
        ]
        if held:
            rows, ids = on_device(held, self.device).unbind(-1)
            x_RV = x_RV.index_put((rows, ids), x_RV.new_full((), float("-inf")))
        if mask is not None and mask.rows:
            rows = on_device(mask.rows, self.device)
            allowed_NV = unpack_bits(on_device(mask.words_NW, self.device), self.vocab_size)
            x_RV = x_RV.index_copy(0, rows, x_RV[rows].masked_fill(~allowed_NV, float("-inf")))
        return x_RV

    def _units(self, processed_RV: Tensor, plan: _Plan) -> Tensor:
        filtered_RV = filter_logits(
            processed_RV,
            temperature_B=plan.temperature_R,
            top_k_B=plan.top_k_R,
            top_p_B=plan.top_p_R,
            min_p_B=plan.min_p_R,
            candidates=plan.candidates,
        )
        return units_of(filtered_RV)

    def _probability(self, processed_RV: Tensor, plan: _Plan) -> Tensor:
        one_hot_RV = torch.zeros_like(processed_RV).scatter_(-1, processed_RV.argmax(-1, keepdim=True), 1.0)
        if plan.all_greedy:
            return one_hot_RV
        p_RV = _normalised(self._units(processed_RV, plan))
        return p_RV if plan.greedy_R is None else torch.where(plan.greedy_R[:, None], one_hot_RV, p_RV)

    def _reject(
        self,
        token_R: Tensor,
        match_D: Tensor,
        draft_D: Tensor,
        units_RV: Tensor,
        q_DV: Tensor,
        plan: _Plan,
        chains: Sequence[Chain],
    ) -> tuple[Tensor, Tensor]:
        """Rejection sampling at the rows of drafts: each row's token (draft or draw from the residual); what is accepted."""
        rows_D = plan.draft_row_D
        p_DV = _normalised(units_RV[rows_D])
        seed_D = np.repeat([self._states[c.request_id].seed for c in chains], [len(c.drafts) for c in chains]).astype(np.uint64)
        position_D = [c.position + k for c in chains for k in range(len(c.drafts))]
        p_D, q_D = (x.gather(-1, draft_D[:, None])[:, 0] for x in (p_DV, q_DV))
        accept_D = self._uniform(seed_D, position_D, ACCEPT) * q_D < p_D
        residual_DV = to_units((p_DV - q_DV).clamp_(min=0))
        empty_D1 = residual_DV.sum(-1, keepdim=True) == 0  # p = q but for rounding: nothing to put right
        residual_DV = torch.where(empty_D1, units_RV[rows_D], residual_DV)
        replaced_D = draw(residual_DV, self._uniform(seed_D, position_D, RESIDUAL))
        if plan.greedy_R is not None:
            accept_D = torch.where(plan.greedy_R[rows_D], match_D, accept_D)
            replaced_D = torch.where(plan.greedy_R[rows_D], token_R[rows_D], replaced_D)
        return token_R.index_copy(0, rows_D, torch.where(accept_D, draft_D, replaced_D)), accept_D

    def _logprobs(self, logits_RV: Tensor, processed_RV: Tensor, token_R: Tensor, plan: _Plan) -> RowLogprobs | None:
        wanted = tuple(state.params.logprobs for state in plan.states)
        if all(n is None for n in wanted):
            return None
        tempered_RV = processed_RV / plan.temperature_R[:, None]
        return row_logprobs(logits_RV, tempered_RV, token_R, wanted)

    def _uniform(self, seeds: np.ndarray, positions: Sequence[int], stream: int) -> Tensor:
        return on_device(uniform(seeds, positions, stream), self.device)

    def _planned(self, chains: Sequence[Chain]) -> _Plan:
        """The settings of a batch, kept while it stays the same."""
        key = tuple((chain.request_id, len(chain.drafts)) for chain in chains)
        if self._plan is None or key != self._plan_key:
            self._plan, self._plan_key = self._make_plan(chains), key
        return self._plan

    def _make_plan(self, chains: Sequence[Chain]) -> _Plan:
        states = tuple(self._states[chain.request_id] for chain in chains for _ in range(len(chain.drafts) + 1))
        params = [state.params for state in states]
        greedy = [p.temperature == 0 for p in params]
        drawn = [p for p in params if p.temperature > 0]
        floats = on_device(
            [(p.temperature or 1.0, p.min_p, *((0, 1.0) if p.temperature == 0 else (p.top_k, p.top_p))) for p in params],
            self.device,
            torch.float64,
        )
        temperature_R, min_p_R, top_k_R, top_p_R = floats.unbind(-1)
        drafts = [len(chain.drafts) for chain in chains]
        chain_row = [c for c, count in enumerate(drafts) for _ in range(count)]
        draft_rows = [start + k for start, count in zip(first_rows(chains), drafts, strict=True) for k in range(count)]
        return _Plan(
            states=states,
            seed_R=np.array([state.seed for state in states], dtype=np.uint64),
            temperature_R=temperature_R.float(),
            top_k_R=top_k_R.long(),
            top_p_R=top_p_R,
            min_p_R=min_p_R.float(),
            greedy_R=on_device(greedy, self.device) if any(greedy) else None,
            all_greedy=all(greedy),
            candidates=_candidates(drawn),
            bias=self._bias(states),
            draft_row_D=on_device(draft_rows, self.device, torch.long),
            chain_shape=(on_device(chain_row, self.device, torch.long), len(chains)),
        )

    def _bias(self, states: Sequence[_State]) -> tuple[Tensor, Tensor, Tensor] | None:
        biased = [(row, state) for row, state in enumerate(states) if len(state.bias_ids)]
        if not biased:
            return None
        rows = on_device([row for row, state in biased for _ in range(len(state.bias_ids))], self.device)
        return rows, torch.cat([state.bias_ids for _, state in biased]), torch.cat([state.bias_values for _, state in biased])


def uniform(seeds: np.ndarray, positions: Sequence[int], stream: int) -> np.ndarray:
    """FP64 numbers in [0, 1) that depend on (seed, position, stream) alone: the splitmix64 sequence that starts at hash(seed)."""
    start = _mix(seeds + np.array([stream], dtype=np.uint64) * _GOLDEN)
    h = _mix(start + np.asarray(positions, dtype=np.uint64) * _GOLDEN)
    return (h >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014); arithmetic modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def first_rows(chains: Sequence[Chain]) -> list[int]:
    """Where each chain's rows begin."""
    starts = [0]
    for chain in chains[:-1]:
        starts.append(starts[-1] + len(chain.drafts) + 1)
    return starts[: len(chains)]


def _positions(chains: Sequence[Chain]) -> list[int]:
    return [chain.position + k for chain in chains for k in range(len(chain.drafts) + 1)]


def _candidates(drawn: Sequence[SamplingParams]) -> int | None:
    """How many of the likeliest tokens `filter_logits` must look at."""
    if any(p.top_p < 1 and p.top_k == 0 for p in drawn):
        return None
    return max((p.top_k for p in drawn), default=0)


def _normalised(units_RV: Tensor) -> Tensor:
    return (units_RV.double() / units_RV.sum(-1, keepdim=True)).float()


def _accepted(accept_D: Tensor, chain_D: Tensor, chains: int) -> Tensor:
    """Drafts of each chain before the first that was refused, [C]. chain_D: the chain of each draft, ascending."""
    refused_D = (~accept_D).long()
    before_C = torch.zeros(chains + 1, dtype=torch.long, device=accept_D.device)
    before_C[1:] = torch.zeros_like(before_C[1:]).index_add(0, chain_D, refused_D).cumsum(0)
    kept_D = refused_D.cumsum(0) - before_C[chain_D] == 0
    return torch.zeros(chains, dtype=torch.long, device=accept_D.device).index_add(0, chain_D, kept_D.long())


def row_logprobs(logits_RV: Tensor, tempered_RV: Tensor, token_R: Tensor, wanted: tuple[int | None, ...]) -> RowLogprobs:
    """Log-probabilities of token_R: of the model's own logits, and of the distribution at temperature."""
    log_sum_R1 = logits_RV.logsumexp(-1, keepdim=True)
    most = max((n for n in wanted if n is not None), default=0)
    top_RN, ids_RN = logits_RV.topk(min(most, logits_RV.shape[-1]))
    token_R1 = token_R[:, None]
    return RowLogprobs(
        logprob_R=(logits_RV.gather(-1, token_R1) - log_sum_R1)[:, 0],
        sampled_R=(tempered_RV.gather(-1, token_R1) - tempered_RV.logsumexp(-1, keepdim=True))[:, 0],
        top_ids_RN=ids_RN,
        top_logprobs_RN=top_RN - log_sum_R1,
        wanted=wanted,
    )


@torch.inference_mode()
def prompt_logprobs(
    logits_of: Callable[[Tensor], Tensor],
    hidden_TM: Tensor,
    next_ids_T: Tensor,
    *,
    top: int = 0,
    temperature: float = 1.0,
    chunk: int = 64,
) -> Iterator[list[TokenLogprob]]:
    """Log-probabilities of next_ids_T[t] after hidden state t, in pieces of `chunk`, whose logits [chunk, V] exist one at a time.

    logits_of: final hidden states to FP32 logits; top: alternatives per token; `sampled` is at `temperature` (0 counts as 1).
    """
    for start in range(0, len(next_ids_T), chunk):
        part = slice(start, start + chunk)
        logits_RV, ids_R = logits_of(hidden_TM[part]), next_ids_T[part]
        found = row_logprobs(logits_RV, logits_RV / (temperature or 1.0), ids_R, (top,) * len(ids_R))
        yield [row for row in found.lists(ids_R) if row is not None]
