"""The engine against `openling.model.generate`, whatever runs beside a request and however its prompt is cut."""

import pytest
import tiny_engine as tiny

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
