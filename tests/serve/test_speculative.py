"""Drafts change the speed, not the reply: right ones, wrong ones, and what a page's end or a preemption finds half verified."""

import random

import pytest
import tiny_engine as tiny
import torch

from openling.serve.payoff import FIRST_STEPS, TRY_AGAIN, Payoff

ALWAYS = {"drafts": 3, "draft_always": True}


def oracle(e, replies, right: float, seed=0):
    """Replace the MTP layer's drafts by tokens of the known replies, each wrong with some probability."""
    follow, rng = e._drafter.follow, random.Random(seed)

    def follow_and_correct(plan, forward, added, *, propose):
        follow(plan, forward, added, propose=propose)
        for s in plan.sampled:
            ahead = replies[s.prompt_tokens][s.reply_tokens :][: len(s.drafts)]
            s.drafts = [t if rng.random() < right else (t + 1) % tiny.VOCAB for t in ahead]

    e._drafter.follow = follow_and_correct


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_greedy_replies_with_the_layers_own_drafts(drafts):
    m = tiny.model("mtp")
    e = tiny.engine(m, drafts=drafts, draft_always=True, step_tokens=70)
    requests = [tiny.request(tiny.prompt(n), max_tokens=12) for n in (1, 60, 64, 100)]
    found = tiny.run(e, requests)
    for r in requests:
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, 12)
    assert e.stats().drafted_tokens > 0


@pytest.mark.parametrize("right", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_replies_whatever_is_accepted(right, cached):
    m = tiny.model("mtp")
    e = tiny.engine(m, prefix_cache=cached, **ALWAYS)
    prompts = {n: tiny.prompt(n) for n in (3, 50, 61, 130)}
    replies = {n: tiny.expected(m, ids, 84) for n, ids in prompts.items()}
    oracle(e, replies, right)
    requests = [tiny.request(ids, max_tokens=80 + n % 3) for n, ids in prompts.items()]
    found = tiny.run(e, requests)
    for r in requests:
        assert tiny.tokens(found[r.id]) == replies[len(r.prompt_token_ids)][: r.params.max_tokens]
    last = found[requests[0].id][-1]
    assert last.accepted_tokens <= last.drafted_tokens
    if right == 1.0:
        # All but the first token came in fours: one certain, three accepted.
        assert len(found[requests[0].id]) == 1 + -(-79 // 4)
    if right == 0.0:
        assert e.stats().accepted_tokens == 0


@pytest.mark.parametrize("right", [0.5, 1.0])
def test_the_state_cached_in_the_middle_of_accepted_drafts_is_the_state_there(right):
    m = tiny.model("mtp")
    e = tiny.engine(m, **ALWAYS)
    ids = tiny.prompt(61)
    replies = {61: tiny.expected(m, ids, 100)}
    oracle(e, replies, right)
    first = tiny.request(ids, max_tokens=90)
    tiny.run(e, [first])
    turn = (*ids, *replies[61][:80])
    replies[len(turn)] = replies[61][80:]
    second = tiny.request(turn, max_tokens=10)
    found = tiny.run(e, [second])[second.id]
    assert found[0].cached_tokens == 128
    assert tiny.tokens(found) == replies[61][80:90]


def test_memory_runs_out_in_the_middle():
    m = tiny.model("mtp")
    e = tiny.engine(m, pages=9, slots=5, **ALWAYS)
    prompts = {n: tiny.prompt(n) for n in (100, 120, 140)}
    replies = {n: tiny.expected(m, ids, 140) for n, ids in prompts.items()}
    oracle(e, replies, 0.7)
    requests = [tiny.request(ids, max_tokens=130) for ids in prompts.values()]
    found = tiny.run(e, requests)
    assert e.stats().preemptions > 0
    for r in requests:
        assert tiny.tokens(found[r.id]) == replies[len(r.prompt_token_ids)][:130]


def test_seeded_replies_are_the_same_with_and_without_drafts():
    m, ids = tiny.model("mtp"), tiny.prompt(30)
    plain = tiny.request(ids, max_tokens=60, temperature=1.0, seed=3, top_p=0.9)
    expected = tiny.tokens(tiny.run(tiny.engine(m), [plain])[plain.id])
    e = tiny.engine(m, **ALWAYS)
    oracle(e, {30: expected}, 0.8)
    again = tiny.request(ids, max_tokens=60, temperature=1.0, seed=3, top_p=0.9)
    assert tiny.tokens(tiny.run(e, [again])[again.id]) == expected
    assert e.stats().accepted_tokens > 10


def test_accepted_and_replaced_tokens_follow_the_target_distribution():
    """Chi-squared over the second token of 1200 replies, whose draft is always the same token."""
    m, ids = tiny.model("mtp"), tiny.prompt(5)
    e = tiny.engine(m, max_running=250, pages=400, slots=300, max_waiting=1300, **ALWAYS)
    first = tiny.expected(m, ids, 1)[0]
    with torch.no_grad():
        p = (m(torch.tensor([[*ids, first]]))[0, -1] / 2).softmax(-1)
    favourite = int(p.argmax())
    follow = e._drafter.follow

    def always_the_favourite(plan, forward, added, *, propose):
        follow(plan, forward, added, propose=propose)
        for s in plan.sampled:
            s.drafts = [favourite]

    e._drafter.follow = always_the_favourite
    params = {"temperature": 2.0, "logit_bias": {}, "max_tokens": 2}
    requests = [tiny.request((*ids, first), seed=i, **params) for i in range(1200)]
    # The drafts of a reply's first step are verified in its second: count what stands there, given the first.
    found = tiny.run(e, requests)
    pairs = [tiny.tokens(found[r.id]) for r in requests]
    counts = torch.bincount(torch.tensor([a for a, _ in pairs]), minlength=tiny.VOCAB).double()
    assert chi_squared(counts, p) < 1.0
    top = int(counts.argmax())
    with torch.no_grad():
        q = (m(torch.tensor([[*ids, first, top]]))[0, -1] / 2).softmax(-1)
    second = torch.bincount(torch.tensor([b for a, b in pairs if a == top]), minlength=tiny.VOCAB).double()
    assert chi_squared(second, q) < 1.0
    assert e.stats().accepted_tokens > 0


def chi_squared(counts, p):
    """The statistic over its 99.99 % point (Wilson and Hilferty); cells that expect fewer than 5 are one."""
    expected = p * counts.sum()
    small = expected < 5
    seen = torch.cat((counts[~small], counts[small].sum()[None]))
    wanted = torch.cat((expected[~small], expected[small].sum()[None]))
    keep = wanted > 0
    statistic = ((seen[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    d = max(int(keep.sum()) - 1, 1)
    return float(statistic) / (d * (1 - 2 / (9 * d) + 3.72 * (2 / (9 * d)) ** 0.5) ** 3)


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again():
    payoff = Payoff()
    rates = {True: 90.0, False: 100.0}
    chosen = []
    for _ in range(4 * TRY_AGAIN):
        drafted = payoff.worth_it(3)
        chosen.append(drafted)
        payoff.add(3, drafted=drafted, tokens=int(rates[drafted]), seconds=1.0)
    assert all(chosen[:FIRST_STEPS])
    settled = chosen[2 * FIRST_STEPS :]
    assert 1 <= sum(settled) <= 4
    rates[True] = 300.0
    late = []
    for _ in range(40 * TRY_AGAIN):
        drafted = payoff.worth_it(3)
        late.append(drafted)
        payoff.add(3, drafted=drafted, tokens=int(rates[drafted]), seconds=1.0)
    assert sum(late[-TRY_AGAIN:]) >= TRY_AGAIN - 2
