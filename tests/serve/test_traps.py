"""Mistakes that engines of this kind have shipped (SGLang 26474; vLLM 40859, 55766, 53945), each with a test of its own."""

import pytest
import tiny_engine as tiny


def test_every_layer_remembers_in_the_store_of_its_kind():
    """SGLang 26474: linear layers were sent to the cache of full attention."""
    e = tiny.engine(tiny.model_of(tiny.KINDS["half"].replace(num_nextn_predict_layers=1)), drafts=1)
    store, c = e.store, e.model.config
    assert list(store.rows) == [0, 2, 3]  # gqa, mla, and the MTP layer's mla
    assert [rows.dim() for rows in store.rows.values()] == [4, 3, 3]
    assert store.rows[0].shape[2:] == (2 * c.num_key_value_heads, c.head_dim)
    assert store.rows[2].shape[2] == c.kv_lora_rank + c.qk_rope_head_dim
    assert store.lightning == {1: 0}
    assert store.states.shape[1] == 1


def test_prompts_between_decoding_steps_leave_states_alone():
    """vLLM 40859: the order of decoding and prefilling rows corrupted recurrent states, replies repeated newlines."""
    m = tiny.model()
    e = tiny.engine(m, step_tokens=20)
    early = [tiny.request(tiny.prompt(n), max_tokens=40) for n in (3, 9)]
    for r in early:
        e.add(r)
    found = {}
    for _ in range(6):
        for output in e.step():
            found.setdefault(output.request_id, []).append(output)
    late = [tiny.request(tiny.prompt(n), max_tokens=6) for n in (150, 130)]
    for r in late:
        e.add(r)
    for request_id, outputs in tiny.drain(e).items():
        found.setdefault(request_id, []).extend(outputs)
    for r in (*early, *late):
        assert tiny.tokens(found[r.id]) == tiny.expected(m, r.prompt_token_ids, r.params.max_tokens)


@pytest.mark.parametrize("length", [62, 63, 64, 65, 127, 128, 129])
def test_states_at_any_distance_from_a_pages_end(length):
    """vLLM 55766: a state that was not aligned to a block gave NaN."""
    m = tiny.model()
    e, ids = tiny.engine(m), tiny.prompt(length)
    for _ in range(2):
        r = tiny.request(ids, max_tokens=4, logprobs=0)
        outputs = tiny.run(e, [r])[r.id]
        assert tiny.tokens(outputs) == tiny.expected(m, ids, 4)
        assert all(p.logprob <= 0 for output in outputs for p in output.logprobs)  # NaN is not
    assert outputs[0].cached_tokens == (length - 1) // 64 * 64


def test_a_pause_between_drafts_and_their_verdict():
    """vLLM 53945: after resuming, the state stood at the wrong position."""
    m, ids = tiny.model("mtp"), tiny.prompt(50)
    e = tiny.engine(m, drafts=3, draft_always=True)
    r = tiny.request(ids, max_tokens=30)
    e.add(r)
    outputs = [output for _ in range(5) for output in e.step()]
    waiting = e.scheduler.running[0]
    assert waiting.drafts
    assert waiting.waiting_tokens
    e.pause()
    e.resume()
    outputs += [output for _ in range(2) for output in e.step()]
    e.scheduler.preempt(e.scheduler.running[0])
    outputs += tiny.drain(e)[r.id]
    assert tiny.tokens(outputs) == tiny.expected(m, ids, 30)


def test_drafts_switched_off_and_on_in_the_middle():
    """A step that verifies nothing must first fold what waits beside the states."""
    m, ids = tiny.model("mtp"), tiny.prompt(50)
    e = tiny.engine(m, drafts=2)
    turns = iter([True, True, False, False, True, False, True] * 20)
    e._payoff.worth_it = lambda batch: next(turns)
    r = tiny.request(ids, max_tokens=60)
    outputs = tiny.run(e, [r])[r.id]
    assert tiny.tokens(outputs) == tiny.expected(m, ids, 60)
    assert 0 < e.stats().drafted_tokens < 2 * len(outputs)
