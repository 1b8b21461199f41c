"""Prefix reuse and scarce memory: what is cached, when, for whom, and that replies never notice."""

import random

import pytest
import tiny_engine as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

M = {kind: tiny.model(kind) for kind in tiny.KINDS}


@pytest.mark.parametrize("kind", ["hybrid", "gqa"])
def test_a_second_turn_starts_behind_the_first(kind):
    m, e = M[kind], tiny.engine(M[kind])
    first = tiny.request(tiny.prompt(100), max_tokens=60)
    reply = tiny.tokens(tiny.run(e, [first])[first.id])
    turn = (*first.prompt_token_ids, *reply, *tiny.prompt(30))
    second = tiny.request(turn, max_tokens=5)
    found = tiny.run(e, [second])[second.id]
    # 160 tokens lie in pages, the newest of them was sampled but never computed: two whole pages.
    assert found[0].cached_tokens == 128
    assert tiny.tokens(found) == tiny.expected(m, turn, 5)


def test_equal_prompts_are_computed_once():
    e, ids = tiny.engine(M["hybrid"]), tiny.prompt(200)
    requests = [tiny.request(ids, max_tokens=4) for _ in range(6)]
    found = tiny.run(e, requests)
    assert [found[r.id][0].cached_tokens for r in requests] == [0] + 5 * [192]
    assert e.stats().prompt_tokens == 200 + 5 * 8
    assert len({tuple(tiny.tokens(found[r.id])) for r in requests}) == 1


def test_a_branch_gets_a_state_when_it_is_met_again():
    e, shared = tiny.engine(M["hybrid"]), tiny.prompt(128)
    a, b, c = (tiny.request((*shared, *tiny.prompt(70, seed=i)), max_tokens=2) for i in range(3))
    hits = [tiny.run(e, [r])[r.id][0].cached_tokens for r in (a, b, c)]
    # The first leaves a state at its prompt's end only; the second finds pages without one and leaves it there.
    assert hits == [0, 0, 128]


@pytest.mark.parametrize(("tail", "steps"), [(100, 1), (200, 2)])
def test_a_short_tail_behind_a_cached_state_is_one_step(tail, steps):
    e, shared = tiny.engine(M["hybrid"]), tiny.prompt(256)
    for i in range(2):
        tiny.run(e, [tiny.request((*shared, *tiny.prompt(tail, seed=i)), max_tokens=1)])
    e.add(tiny.request((*shared, *tiny.prompt(tail, seed=2)), max_tokens=1))
    taken = 0
    while e.has_work():
        e.step()
        taken += 1
    assert taken == steps


def test_namespaces_do_not_see_each_other():
    e, ids = tiny.engine(M["hybrid"]), tiny.prompt(130)
    for namespace, cached in (("a", 0), ("b", 0), ("a", 128)):
        r = tiny.request(ids, namespace=namespace)
        assert tiny.run(e, [r])[r.id][0].cached_tokens == cached


def test_without_the_prefix_cache_nothing_is_kept():
    e, ids = tiny.engine(M["hybrid"], prefix_cache=False), tiny.prompt(130)
    for _ in range(2):
        r = tiny.request(ids)
        assert tiny.run(e, [r])[r.id][0].cached_tokens == 0
    stats = e.stats()
    assert (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total)


@pytest.mark.parametrize("kind", ["hybrid", "gqa", "half"])
def test_replies_survive_preemption(kind):
    m = M[kind]
    e = tiny.engine(m, pages=7, slots=4)
    requests = [tiny.request(tiny.prompt(n), max_tokens=70) for n in (100, 90, 80, 110)]
    found = tiny.run(e, requests)
    assert e.stats().preemptions > 0
    for r in requests:
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, 70)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["hybrid", "half", "mtp"]))
def test_anything_at_any_moment(seed, kind):
    """Requests with shared prefixes come and go, memory is scarce, caches are flushed: replies equal those of a lone request."""
    rng, m = random.Random(seed), M[kind]
    e = tiny.engine(
        m, pages=rng.randint(6, 16), slots=rng.randint(3, 9), max_running=rng.randint(1, 5), step_tokens=rng.randint(8, 150),
        drafts=rng.choice([0, 2]) if kind == "mtp" else 0, draft_always=True,
    )  # fmt: skip
    stems = [tiny.prompt(n) for n in (64, 130, 200)]
    live, found = {}, {}
    for _ in range(45):
        if rng.random() < 0.25:
            ids = (*rng.choice(stems)[: rng.choice([1, 64, 128, 190])], *tiny.prompt(rng.randint(0, 20), seed=rng.randint(0, 2)))
            r = tiny.request(ids, max_tokens=rng.randint(1, 25), namespace=rng.choice(["", "x"]))
            e.add(r)
            live[r.id] = r
        if live and rng.random() < 0.05:
            gone = rng.choice(list(live))
            e.abort(gone)
            del live[gone]
        if rng.random() < 0.03:
            e.flush_cache()
        for output in e.step():
            found.setdefault(output.request_id, []).append(output)
        e.check_integrity()
    for request_id, outputs in tiny.drain(e).items():
        found.setdefault(request_id, []).extend(outputs)
    for r in live.values():
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, r.params.max_tokens)
