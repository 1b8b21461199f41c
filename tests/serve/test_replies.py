"""What ends a reply, the text it makes, and grammars inside the engine, over a tokenizer of single bytes."""

import json

import pytest
import tiny_engine as tiny
from test_detokenize import BYTES
from test_grammar import JSON, SCHEMA

from openling.errors import Failure
from openling.serve.engine import Engine
from openling.serve.engine_config import EngineConfig
from openling.serve.types import Grammar

EOS = BYTES.eos_token_id


def engine(kind="hybrid", **changes):
    m = tiny.model_of(tiny.KINDS[kind].replace(vocab_size=264))
    settings = {"max_running": 8, "step_tokens": 256, "pages": 64, "slots": 24, "poison": True} | changes
    return m, Engine(m, BYTES, EngineConfig(**settings))


def text(outputs):
    return "".join(output.text for output in outputs)


def ids(words):
    return BYTES(words)["input_ids"]


def test_text_is_that_of_the_tokens_and_length_ends_it():
    _, e = engine()
    r = tiny.request(ids("one, two"), max_tokens=30, temperature=1.0, seed=4)
    found = tiny.run(e, [r])[r.id]
    assert text(found) == BYTES.decode(tiny.tokens(found), skip_special_tokens=True)
    assert (found[-1].finish_reason, found[-1].completion_tokens, found[-1].prompt_tokens) == ("length", 30, 8)


@pytest.mark.parametrize("drafts", [0, 3])
def test_stop_strings_stop_tokens_and_end_of_text(drafts):
    m, e = engine("mtp", drafts=drafts, draft_always=True)
    prompt = ids("and so on")
    free = tiny.expected(m, prompt, 30)
    third, words = free[2], BYTES.decode(free[4:7])

    def run(**params):
        r = tiny.request(prompt, max_tokens=30, **params)
        return tiny.run(e, [r])[r.id]

    first = free.index(third)
    by_token = run(stop_token_ids=(third,))
    assert tiny.tokens(by_token) == free[: first + 1]
    assert (by_token[-1].finish_reason, by_token[-1].stop_reason) == ("stop", third)
    later = run(stop_token_ids=(third,), min_tokens=first + 1)
    assert len(tiny.tokens(later)) > first + 1
    whole = BYTES.decode(free)
    by_text = run(stop=(words,))
    assert text(by_text) == whole[: whole.index(words)]
    assert (by_text[-1].finish_reason, by_text[-1].stop_reason) == ("stop", words)
    bias = {EOS: 1000.0}
    ended = run(logit_bias=bias)
    assert (tiny.tokens(ended), ended[-1].finish_reason, text(ended)) == ([EOS], "stop", "")
    assert tiny.tokens(run(logit_bias=bias, ignore_eos=True)) == [EOS] * 30
    assert e.stats().running == 0


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_grammar_shapes_the_reply(drafts):
    _, e = engine("mtp", drafts=drafts, draft_always=True)
    shaped = [tiny.request(ids("weather"), max_tokens=300, temperature=1.0, seed=i, grammar=JSON) for i in range(3)]
    free = tiny.request(ids("weather"), max_tokens=20)
    found = tiny.run_patiently(e, [*shaped, free])
    for r in shaped:
        value = json.loads(text(found[r.id]))
        assert set(value) == set(SCHEMA["required"])
        assert found[r.id][-1].finish_reason == "stop"
    assert len(tiny.tokens(found[free.id])) == 20


def test_a_bad_grammar_fails_its_own_request():
    m, e = engine()
    bad, good = tiny.request(ids("a"), grammar=Grammar("regex", "(")), tiny.request(ids("b"))
    found = tiny.run_patiently(e, [bad, good])
    assert found[bad.id][-1].finish_reason == "error"
    assert found[bad.id][-1].error
    assert tiny.tokens(found[good.id]) == tiny.expected(m, ids("b"), 8)


def test_a_grammar_that_gives_up_in_the_middle_fails_its_own_request(monkeypatch):
    m, e = engine()
    shaped, free = (
        tiny.request(ids("a"), grammar=Grammar("regex", "[a-z]+"), max_tokens=20),
        tiny.request(ids("b"), max_tokens=20),
    )
    for r in (shaped, free):
        e.add(r)
    while not e.scheduler.running or e._compiling:
        e.step()

    def give_up(drafts=()):
        raise Failure("the grammar became too complex")

    e._replies[shaped.id].matcher.masks = give_up
    found = tiny.drain(e)
    assert (found[shaped.id][-1].finish_reason, "too complex" in found[shaped.id][-1].error) == ("error", True)
    assert found[free.id][-1].finish_reason == "length"
