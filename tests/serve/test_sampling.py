"""The sampler: rows alone against rows in batches, filters against the scalar definition, draws against exact distributions."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openling.errors import UserError
from openling.ops import sampling as ops
from openling.ops.sampling import UNIT_BITS, draw, filter_logits, to_units, unpack_bits
from openling.serve.sampling import Chain, RowMask, Sampler, prompt_logprobs, uniform
from openling.serve.types import Request, SamplingParams

V = 37
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, params=["", "deterministic"] if DEVICE == "cuda" else [""])
def device(request):
    """On a GPU where there is one; there also with only deterministic operations allowed, as batch-invariant serving wants."""
    if DEVICE == "cuda":
        torch.set_default_device(DEVICE)
    torch.use_deterministic_algorithms(request.param == "deterministic")
    yield
    torch.use_deterministic_algorithms(False)
    if DEVICE == "cuda":
        torch.set_default_device(None)


def logits(rows, seed=0, width=V):
    return 3 * torch.randn(rows, width, generator=torch.Generator("cpu").manual_seed(seed), device="cpu").to(DEVICE)


def sampler_of(*params, width=V, eos_ids=(), prompt=(1, 2, 3)):
    """A sampler with requests "0", "1", ..."""
    sampler = Sampler(width, eos_ids=eos_ids, device=DEVICE)
    for i, p in enumerate(params):
        sampler.add(Request(str(i), prompt, p))
    return sampler


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 30, 99]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.5]),
    logit_bias=st.sampled_from([{}, {3: 5.0, 7: -100.0}]),
    seed=st.integers(-5, 2**64),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 0, 2]),
)


def one_by_one(params, steps, seed):
    """Each request in a sampler of its own."""
    found = []
    for i, p in enumerate(params):
        sampler = sampler_of(p, eos_ids=(0,))
        found.append([])
        for t in range(steps):
            drawn = sampler.sample(logits(len(params), seed + t)[i : i + 1], [Chain("0", t)])
            found[-1].append((drawn.tokens()[0][0], drawn.token_logprobs()[0]))
    return found


@settings(max_examples=40, deadline=None)
@given(params=st.lists(PARAMS, min_size=1, max_size=5), seed=st.integers(0, 9), order=st.randoms())
def test_a_row_does_not_see_its_batch(params, seed, order):
    expected = one_by_one(params, 3, seed)
    sampler = sampler_of(*params, eos_ids=(0,))
    found = [[] for _ in params]
    for t in range(3):
        rows = list(range(len(params)))
        order.shuffle(rows)
        drawn = sampler.sample(logits(len(params), seed + t)[rows], [Chain(str(i), t) for i in rows])
        for i, tokens, logprobs in zip(rows, drawn.tokens(), drawn.token_logprobs(), strict=True):
            found[i].append((tokens[0], logprobs))
    assert [[token for token, _ in row] for row in found] == [[token for token, _ in row] for row in expected]
    for row, alone in itertools.chain(*(zip(a, b, strict=True) for a, b in zip(found, expected, strict=True))):
        assert (row[1] is None) == (alone[1] is None)
        if row[1] is not None:
            assert row[1][0].logprob == pytest.approx(alone[1][0].logprob, abs=1e-6)
            assert row[1][0].sampled == pytest.approx(alone[1][0].sampled, abs=1e-6)
            assert [id for id, _ in row[1][0].top] == [id for id, _ in alone[1][0].top]


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1.0),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_filters_equal_those_of_transformers(temperature, top_k, top_p, min_p, seed):
    x = logits(3, seed)
    expected = x / temperature
    for on, warper in (
        (top_k, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1, lambda: TopPLogitsWarper(top_p)),
        (min_p, lambda: MinPLogitsWarper(min_p)),
    ):
        expected = warper()(None, expected) if on else expected
    p = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = sampler_of(p, p, p).distribution(x, [Chain("0", 0), Chain("1", 0), Chain("2", 0)])
    # FP32 logits of size 10 carry 1e-6, probabilities as much.
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-5, atol=1e-6)


def test_enough_candidates_give_the_answer_of_all():
    x = logits(4, width=500)
    settings_ = {
        "temperature_B": torch.tensor([1.0, 0.5, 2.0, 1.0]),
        "top_k_B": torch.tensor([5, 40, 0, 1]),
        "top_p_B": torch.tensor([0.7, 1.0, 1.0, 0.2]),
        "min_p_B": torch.tensor([0.0, 0.1, 0.05, 0.0]),
    }
    found = [filter_logits(x, **settings_, candidates=n) for n in (40, 41, 300, None)]
    assert all(torch.equal(one, found[0]) for one in found)
    assert (found[0] > -torch.inf).sum(-1).tolist()[3] == 1


def test_few_candidates_give_the_answer_of_a_sort(monkeypatch):
    """On a CPU; rows for which few are enough, and rows for which they are not."""
    x = logits(6, width=400)
    x[3:] = x[3:] / 30  # nearly flat: top_p takes hundreds
    rows = {
        "temperature_B": torch.ones(6),
        "top_k_B": torch.tensor([0, 300, 0, 0, 0, 5]),
        "top_p_B": torch.tensor([0.3, 0.9, 1.0, 0.9, 1.0, 0.5]),
        "min_p_B": torch.zeros(6),
    }
    expected = filter_logits(x, **rows)
    for few in (1, 10, 390):
        monkeypatch.setattr(ops, "FEW", few)
        for part in (slice(0, 1), slice(2, 3), slice(4, 6), slice(0, 6)):
            found = filter_logits(x[part], **{name: row[part] for name, row in rows.items()})
            assert torch.equal(found, expected[part])


def test_equal_logits_share_their_fate():
    x = torch.tensor([[2.0, 2.0, 1.0, 2.0]])
    for changes in ({"top_k_B": torch.tensor([1])}, {"top_p_B": torch.tensor([0.1])}):
        rows = {f"{name}_B": torch.tensor([value]) for name, value in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0))}
        kept = filter_logits(x, **({"top_k_B": torch.tensor([0])} | rows | changes))
        assert torch.isfinite(kept).tolist() == [[True, True, False, True]]


def test_draws_are_exact_intervals():
    units = torch.tensor([[1, 0, 2, 1]])
    at = [0.0, 0.24, 0.25, 0.74, 0.75, 1 - 2**-53]
    found = draw(units.expand(6, -1), torch.tensor(at, dtype=torch.float64))
    assert found.tolist() == [0, 0, 2, 2, 3, 3]
    assert int(to_units(torch.tensor([0.5]))) == 1 << (UNIT_BITS - 1)


def test_random_numbers_are_uniform_and_independent():
    n = 200_000
    u = uniform(np.full(n, 7, dtype=np.uint64), range(n), 0)
    v = uniform(np.full(n, 7, dtype=np.uint64), range(n), 1)
    w = uniform(np.arange(n, dtype=np.uint64), [3] * n, 0)
    for x in (u, v, w):
        # 100 cells of 2000: chi-square has mean 99 and deviation sqrt(2 * 99) = 14; five of them.
        count = np.bincount((x * 100).astype(int), minlength=100)
        assert abs(((count - n / 100) ** 2 / (n / 100)).sum() - 99) < 70
    for a, b in ((u, v), (u[1:], u[:-1]), (w[1:], w[:-1]), (u, w)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5, "top_p": 0.8}, {"top_k": 4}])
def test_draws_follow_the_distribution(changes):
    n, x = 20_000, logits(1, 3, width=12)
    sampler = sampler_of(SamplingParams(seed=11, **changes), width=12)
    tokens = sampler.sample(x.expand(n, -1), [Chain("0", t) for t in range(n)]).token_R
    expected = sampler.distribution(x, [Chain("0", 0)])[0].double()
    share = tokens.bincount(minlength=12) / n
    # A share's deviation is sqrt(p (1 - p) / n); five of them, and nothing at all where p is 0.
    assert bool(((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all())


def test_unseeded_requests_differ_and_seeded_ones_repeat():
    flat = torch.zeros(2, 4096)
    draws = []
    for _ in range(2):
        sampler = sampler_of(SamplingParams(), SamplingParams(seed=5), width=4096)
        draws.append([tokens[0] for tokens in sampler.sample(flat, [Chain("0", 0), Chain("1", 0)]).tokens()])
    assert draws[0][1] == draws[1][1]
    assert draws[0][0] != draws[1][0]  # equal once in 4096 runs


def test_penalties_equal_the_formulas():
    p = SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7)
    sampler, x = sampler_of(p, prompt=(4, 4, 9)), logits(3)
    reply = []
    for t in range(3):
        reply += sampler.sample(x[t : t + 1], [Chain("0", t)]).tokens()[0]
    counts = torch.tensor(reply).bincount(minlength=V)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[4, 9, *reply]]), x[:1].clone())
    expected = expected - 0.4 * (counts > 0) - 0.7 * counts
    torch.testing.assert_close(sampler.distribution(x[:1], [Chain("0", 3)]), expected.softmax(-1))
    sampler.remove("0")
    sampler.add(Request("new", (5,), p))  # takes over the row of counts
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[5]]), x[:1].clone())
    torch.testing.assert_close(sampler.distribution(x[:1], [Chain("new", 0)]), expected.softmax(-1))


def test_bias_min_tokens_and_masks():
    x = torch.zeros(3, V)
    x[:, 5] = 9.0
    params = SamplingParams(temperature=0, logit_bias={8: 20.0}), SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(5,))
    sampler = sampler_of(*params, SamplingParams(temperature=0), eos_ids=(0,))
    words = torch.zeros(1, 2, dtype=torch.int32)
    words[0, 1] = 1 << 3  # token 35 only
    chains = [Chain("0", 0), Chain("1", 1), Chain("2", 0)]
    first = sampler.sample(x, chains, mask=RowMask([2], words))
    assert first.token_R[[0, 2]].tolist() == [8, 35] and int(first.token_R[1]) not in (0, 5)
    assert sampler.sample(x, [Chain("0", 1), Chain("1", 2), Chain("2", 1)]).token_R.tolist() == [8, 5, 5]
    assert x[:, 5].tolist() == [9.0] * 3 and float(x.sum()) == 27.0  # the caller's logits are left alone


def test_bits_unpack_lowest_first():
    words = torch.tensor([[5, -(2**31)]], dtype=torch.int32)
    found = unpack_bits(words, 70)
    assert found.nonzero()[:, 1].tolist() == [0, 2, 63] and found.shape == (1, 70)


def test_logprobs_before_and_at_temperature():
    x = logits(2)
    params = SamplingParams(temperature=0.5, top_k=3, logprobs=2, logit_bias={1: 4.0}, seed=1), SamplingParams(seed=1)
    drawn = sampler_of(*params).sample(x, [Chain("0", 0), Chain("1", 0)])
    found, none = drawn.token_logprobs()
    assert none is None
    biased = x[0] + 4.0 * torch.nn.functional.one_hot(torch.tensor(1), V)
    token = drawn.tokens()[0][0]
    assert found[0].logprob == pytest.approx(float(x[0].log_softmax(-1)[token]), abs=1e-6)
    assert found[0].sampled == pytest.approx(float((biased / 0.5).log_softmax(-1)[token]), abs=1e-6)
    values, ids = x[0].log_softmax(-1).topk(2)
    assert [id for id, _ in found[0].top] == ids.tolist()
    assert [value for _, value in found[0].top] == pytest.approx(values.tolist(), abs=1e-6)


def test_prompt_logprobs_in_chunks():
    hidden, head, ids = torch.randn(10, 4), torch.randn(4, V), torch.arange(10)
    seen = []

    def logits_of(h):
        seen.append(len(h))
        return h @ head

    found = [row for part in prompt_logprobs(logits_of, hidden, ids, top=1, temperature=2.0, chunk=4) for row in part]
    assert seen == [4, 4, 2]
    expected = (hidden @ head).log_softmax(-1)[torch.arange(10), ids]
    assert [row.logprob for row in found] == pytest.approx(expected.tolist(), abs=1e-5)
    tempered = (hidden @ head / 2).log_softmax(-1)[torch.arange(10), ids]
    assert [row.sampled for row in found] == pytest.approx(tempered.tolist(), abs=1e-5)
    assert [row.top[0][0] for row in found] == (hidden @ head).argmax(-1).tolist()


def test_ids_outside_the_vocabulary_are_refused():
    for params in (SamplingParams(logit_bias={V: 1.0}), SamplingParams(stop_token_ids=(-1,))):
        with pytest.raises(UserError, match=f"0 to {V - 1}"):
            sampler_of(params)


def test_broken_logits_do_not_break_the_batch():
    x = logits(2)
    x[0] = float("nan")
    params = SamplingParams(seed=1, logprobs=0)
    drawn = sampler_of(params, params).sample(x, [Chain("0", 0), Chain("1", 0)])
    assert 0 <= drawn.tokens()[0][0] < V and np.isnan(drawn.token_logprobs()[0][0].logprob)
    assert drawn.tokens()[1] == sampler_of(params).sample(x[1:], [Chain("0", 0)]).tokens()[0]


# Speculation


def target(prefix, width):
    """Logits that depend on the tokens before."""
    return logits(1, 1000 + sum((i + 1) * (t + 1) for i, t in enumerate(prefix)), width)


def chain_logits(drafts, width):
    return torch.cat([target(drafts[:k], width) for k in range(len(drafts) + 1)])


@settings(max_examples=30, deadline=None)
@given(params=PARAMS, drafts=st.lists(st.integers(0, 4), max_size=4), seed=st.integers(0, 9))
def test_checked_drafts_give_the_reply_without_drafts(params, drafts, seed):
    """Without q the tokens are those of plain sampling, penalties included, whatever was drafted."""
    plain = sampler_of(params, width=9)
    reply = []
    for t in range(len(drafts) + 1):
        reply += plain.sample(target(reply, 9), [Chain("0", t)]).tokens()[0]
    spec = sampler_of(params, params, width=9)
    # A second chain that is right all the way, so that chains of different lengths share the batch.
    right = tuple(reply[:-1])
    drawn = spec.sample(
        torch.cat((chain_logits(tuple(drafts), 9), chain_logits(right, 9))), [Chain("0", 0, tuple(drafts)), Chain("1", 0, right)]
    )
    accepted = next((k for k, (a, b) in enumerate(zip(drafts, reply, strict=False)) if a != b), len(drafts))
    assert drawn.tokens() == [reply[: accepted + 1], reply]
    # And what they counted: the next distributions agree.
    after = target(reply, 9)
    torch.testing.assert_close(
        spec.distribution(after, [Chain("1", len(reply))]), plain.distribution(after, [Chain("0", len(reply))])
    )


def test_rejection_sampling_is_exact():
    """The first two tokens of chains with random drafts, against p of every pair by enumeration."""
    width, n = 4, 40_000
    params = SamplingParams(seed=3, temperature=1.0, top_k=3)
    sampler = sampler_of(params, width=width)
    q_logits = logits(1, 77, width), logits(1, 78, width)
    # A position per trial makes them independent; a step of 3 keeps the numbers of trials apart.
    starts = range(0, 3 * n, 3)
    d1, q1 = sampler.draft(q_logits[0].expand(n, -1), [Chain("0", t) for t in starts])
    d2, q2 = sampler.draft(q_logits[1].expand(n, -1), [Chain("0", t + 1) for t in starts])
    table = {pair: chain_logits(pair, width) for pair in itertools.product(range(width), repeat=2)}
    drafts = list(zip(d1.tolist(), d2.tolist(), strict=True))
    rows = torch.cat([table[pair] for pair in drafts])
    q = torch.stack((q1, q2), 1).flatten(0, 1)
    drawn = sampler.sample(rows, [Chain("0", t, pair) for t, pair in zip(starts, drafts, strict=True)], draft_probability_DV=q)
    p1 = sampler.distribution(target((), width), [Chain("0", 0)])[0].double()
    q1 = q1[0].double()
    tokens = drawn.tokens()
    first = torch.tensor([chain[0] for chain in tokens])
    share = first.bincount(minlength=width) / n
    assert bool(((share - p1).abs() <= 5 * (p1 * (1 - p1) / n).sqrt()).all())
    # Accepted as often as the theory says: sum of min(p, q).
    rate, theory = float((drawn.accepted_C > 0).double().mean()), float(torch.minimum(p1, q1).sum())
    assert abs(rate - theory) <= 5 * (theory * (1 - theory) / n) ** 0.5
    for a in range(width):
        second = torch.tensor([chain[1] for chain in tokens if len(chain) > 1 and chain[0] == a], dtype=torch.long)
        if len(second) < 500:
            continue
        p2 = sampler.distribution(target((a,), width), [Chain("0", 0)])[0].double()
        share = second.bincount(minlength=width) / len(second)
        assert bool(((share - p2).abs() <= 5 * (p2 * (1 - p2) / len(second)).sqrt()).all())


def test_rejection_in_a_mixed_batch():
    """Greedy chains ignore q, chains without drafts sample, a draft with p = 0 is never accepted, one with p = q always is."""
    width = 6
    params = SamplingParams(temperature=0), SamplingParams(seed=2), SamplingParams(seed=4, top_k=1), SamplingParams(seed=5)
    sampler = sampler_of(*params, width=width)
    x = logits(7, 9, width)
    best = x.argmax(-1).tolist()
    wrong = (best[3] + 1) % width
    chains = [Chain("0", 0, (best[0],)), Chain("1", 0), Chain("2", 0, (wrong,)), Chain("3", 0, (2,))]
    q = torch.full((3, width), 1 / width)
    q[2] = x[5].softmax(-1)
    drawn = sampler.sample(x, chains, draft_probability_DV=q)
    assert drawn.accepted_C.tolist() == [1, 0, 0, 1]
    assert [len(tokens) for tokens in drawn.tokens()] == [2, 1, 1, 2]
    assert drawn.tokens()[0] == best[:2] and drawn.tokens()[2] == [best[3]]
    assert drawn.tokens()[1] == sampler_of(*params, width=width).sample(x[2:3], [Chain("1", 0)]).tokens()[0]
