"""The engine against `openling.model.generate`, whatever runs beside a request and however its prompt is cut."""

import pytest
import tiny_engine as tiny
import torch

LENGTHS = (1, 2, 63, 64, 65, 100, 128, 129, 200)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("cached", [True, False])
def test_greedy_replies_equal_generate(kind, cached):
    m = tiny.model(kind)
    e = tiny.engine(m, prefix_cache=cached, step_tokens=70)
    requests = [tiny.request(tiny.prompt(n), max_tokens=3 + n % 7) for n in LENGTHS]
    found = tiny.run(e, requests)
    for r in requests:
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, r.params.max_tokens)
        assert found[r.id][-1].finish_reason == "length"


@pytest.mark.parametrize("kind", ["hybrid", "gqa", "mtp"])
def test_captures_ahead_touch_no_memory(kind):
    m = tiny.model(kind)
    e = tiny.engine(m, drafts=2 if kind == "mtp" else 0, max_running=5)
    assert e.warm_up() == 0
    e.use_graphs(lambda run: (run(), run)[1])
    states, rows = e.store.states.clone(), {i: x.clone() for i, x in e.store.rows.items()}
    # Sizes 1 to 5 of each length, and 5 numbers of tokens for one sequence and for more.
    assert e.warm_up() == 10 + (5 if kind != "mtp" else 0)
    assert torch.equal(e.store.states[:-1], states[:-1])
    assert all(torch.equal(e.store.rows[i][:-1], x[:-1]) for i, x in rows.items())
    e.check_integrity()
    r = tiny.request(tiny.prompt(70), max_tokens=5)
    assert tiny.tokens(tiny.run(e, [r])[r.id]) == tiny.expected(m, r.prompt_token_ids, 5)


@pytest.mark.parametrize("kind", ["hybrid", "half", "gqa", "mtp"])
def test_steps_over_static_buffers_are_the_same_steps(kind):
    """What a CUDA graph reads and where its padding writes, with a capture that runs once, as a real one."""
    m = tiny.model(kind)
    e = tiny.engine(m, drafts=2 if kind == "mtp" else 0, draft_always=True, max_running=5)
    e.use_graphs(lambda run: (run(), run)[1])
    requests = [tiny.request(tiny.prompt(n), max_tokens=70 + n % 3) for n in (1, 60, 130, 64, 5, 7, 9)]
    found = tiny.run(e, requests)
    turn = tiny.request((*requests[2].prompt_token_ids, *tiny.prompt(40, seed=1)), max_tokens=5)
    found |= tiny.run(e, [turn])
    assert found[turn.id][0].cached_tokens > 0
    for r in (*requests, turn):
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, r.params.max_tokens)
    # Steps of one prompt, and of prompts beside decoding sequences; a drafting engine has none.
    ragged = e.runner.ragged_graphs
    assert {d for _, d in ragged._graphs} == {2, 6} if ragged else kind == "mtp"
    assert (e.stats().drafted_tokens > 0) == (kind == "mtp")
