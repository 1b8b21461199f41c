"""Grammars: what is allowed, what is refused, drafts taken back, bad ones failing alone."""

import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detokenize import BYTES, WORDS

from openling.errors import Failure, UserError
from openling.ops.sampling import unpack_bits
from openling.serve.grammar import GrammarCompiler, GrammarLimits
from openling.serve.sampling import Chain, RowMask, Sampler
from openling.serve.types import Grammar, Request, SamplingParams

V = 300  # wider than the tokenizer, as padded embeddings are
EOS = BYTES.eos_token_id
COMPILER = GrammarCompiler(BYTES, vocab_size=V, eos_ids={EOS})
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))


def matcher(grammar):
    return COMPILER.submit(grammar).result(timeout=10)


def ids(text):
    return BYTES(text)["input_ids"]


def allowed(words):
    return [set(row.nonzero()[:, 0].tolist()) for row in unpack_bits(words, V)]


def accepts(grammar, text):
    m = matcher(grammar)
    for id in ids(text):
        if id not in allowed(m.masks())[0]:
            return False
        m.advance([id])
    return m.is_complete


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (JSON, ['{"city": "Oslo", "days": 3}', '{"city":"\u20ac",\n  "days":-1}'], ['{"city": 3', "[", '{"city": "Oslo"}', "x"]),
        (Grammar("json_object"), ["{}", '{"a": [1, {"b": null}]}'], ["[]", "3", '{"a": }']),
        (Grammar("regex", "[ab]+c"), ["abac"], ["c", "abd"]),
        (Grammar("lark", 'start: "say " WORD\nWORD: /[a-z]+/'), ["say hello"], ["say ", "tell"]),
    ],
)
def test_a_grammar_accepts_what_it_says(grammar, good, bad):
    assert all(accepts(grammar, text) for text in good)
    assert not any(accepts(grammar, text) for text in bad)


def test_the_end_is_allowed_when_complete_and_nothing_else_when_finished():
    m = matcher(JSON)
    assert EOS not in allowed(m.masks())[0] and not m.is_complete
    m.advance(ids('{"city": "Oslo", "days": 3'))
    assert not m.is_finished
    m.advance(ids("}"))
    assert m.is_finished and allowed(m.masks()) == [{EOS}]
    m.advance([EOS])
    m.rollback(2)
    assert not m.is_finished and ids("}")[0] in allowed(m.masks())[0]
    with pytest.raises(Failure, match="left its grammar"):
        m.advance([EOS])


def test_a_reply_may_end_before_it_must():
    m = matcher(Grammar("regex", "a+"))
    a = ids("a")[0]
    assert allowed(m.masks([a, EOS, a])) == [{a}, {a, EOS}, set(range(V)), set(range(V))]
    m.advance([a, EOS])
    assert m.is_finished
    m.rollback(1)
    assert not m.is_finished and allowed(m.masks()) == [{a, EOS}]


@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 20), drafts=st.integers(0, 8), wrong=st.booleans())
def test_masks_of_drafts_equal_step_by_step_and_leave_no_trace(start, drafts, wrong):
    text = ids('{"city": "Oslo", "days": 3}')
    m, plain = matcher(JSON), matcher(JSON)
    m.advance(text[:start])
    plain.advance(text[:start])
    before, chain = m.masks(), text[start : start + drafts]
    found = m.masks([*chain, *([0] if wrong else [])])  # token 0 is "!", which only the string allows
    expected = [plain.masks()]
    for id in chain:
        plain.advance([id])
        expected.append(plain.masks())
    torch.testing.assert_close(found[: len(chain) + 1], torch.cat(expected), rtol=0, atol=0)
    torch.testing.assert_close(m.masks(), before, rtol=0, atol=0)
    m.advance(text[start:])
    assert m.is_finished


def test_a_random_model_writes_what_the_schema_says():
    sampler = Sampler(V, eos_ids={EOS})
    for seed in range(8):
        sampler.add(Request(str(seed), (1,), SamplingParams(temperature=1.5, seed=seed)))
        m, reply = matcher(JSON), []
        while not m.is_finished and len(reply) < 200:
            logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1000 * seed + len(reply)))
            token = sampler.sample(logits, [Chain(str(seed), len(reply))], mask=RowMask([0], m.masks())).tokens()[0][0]
            m.advance([token])
            reply.append(token)
        if m.is_finished:
            found = json.loads(BYTES.decode([t for t in reply if t != EOS]))
            assert set(found) == {"city", "days"} and len(found["city"]) <= 8 and isinstance(found["days"], int)


def test_white_space_ends():
    m = matcher(Grammar("json_object"))
    m.advance(ids("{" + "\n" + 24 * " "))
    assert not allowed(m.masks())[0] & set(ids(" \n\t"))
    m = matcher(Grammar("json_object"))
    m.advance(ids("{ "))
    assert not allowed(m.masks())[0] & set(ids(" \n\t"))


def test_words_of_other_tokenizers():
    compiler = GrammarCompiler(WORDS, vocab_size=8, eos_ids={7})
    m = compiler.submit(Grammar("regex", "cat|sat|a")).result(timeout=10)
    assert allowed(m.masks()) == [{0, 1, 2}]


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", '{"type": "obj"}'), "obj"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "cannot be compiled"),
        (Grammar("json_schema", '{"items":' * 100 + "{}" + "}" * 100), "101 levels"),
        (Grammar("json_schema", '{"$ref": "#"}'), "nothing can be written"),
        (Grammar("json_schema", " " * 300_000), "300000 characters"),
        (Grammar("json_schema", '{"type": "string", "minLength": 5, "maxLength": 2}'), "cannot be compiled"),
        (Grammar("regex", "[ab"), "unclosed"),
        (Grammar("regex", "(" * 5000 + "a" + ")" * 5000), "cannot be compiled"),
        (Grammar("lark", 'start: "a'), "cannot be compiled"),
    ],
)
def test_a_bad_grammar_fails_with_its_reason(grammar, message):
    with pytest.raises(UserError, match=message):
        matcher(grammar)


def test_a_slow_grammar_is_given_up_and_others_go_on(monkeypatch):
    compiler = GrammarCompiler(BYTES, vocab_size=V, eos_ids={EOS}, limits=GrammarLimits(seconds=0.2))
    compiler.submit(Grammar("regex", "a")).exception(timeout=10)  # the tokenizer is built
    compile_ = compiler._compile

    def slow(grammar):
        if grammar.text == "slow":
            time.sleep(0.6)
        return compile_(grammar)

    monkeypatch.setattr(compiler, "_compile", slow)
    late, soon = compiler.submit(Grammar("regex", "slow")), compiler.submit(Grammar("regex", "b"))
    assert soon.result(timeout=10).is_complete is False
    with pytest.raises(UserError, match="too long to compile"):
        late.result(timeout=10)


def test_matchers_of_one_grammar_are_independent_and_cached():
    compiler = GrammarCompiler(BYTES, vocab_size=V, eos_ids={EOS}, limits=GrammarLimits(cached=1))
    grammar = Grammar("regex", "ab")
    one = compiler.submit(grammar).result(timeout=10)
    again = compiler.submit(grammar)
    assert again.done()
    one.advance(ids("a"))
    with pytest.raises(Failure, match="left its grammar"):
        one.advance(ids("z"))
    assert allowed(again.result().masks()) == [set(ids("a"))]
    compiler.submit(Grammar("regex", "c")).result(timeout=10)
    assert not compiler.submit(grammar).done()  # the cache holds one
