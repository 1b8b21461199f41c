"""Replies taken apart: as the templates wrote them, however they are cut, whatever garbage they hold."""

import itertools
import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.data.messages import MARKS
from openling.data.template import LocalTemplate, builtin_template
from openling.errors import Failure, UserError
from openling.serve.grammar import GrammarCompiler
from openling.serve.parsers import Parsed, ReplyParser, choose
from openling.serve.types import Grammar


def byte_tokenizer(marks):
    """One token per byte; marks that are special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", additional_special_tokens=marks)


NO_MARKS, ALL_MARKS = byte_tokenizer([]), byte_tokenizer(sorted(MARKS))

JSON_CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
XML_CALL = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"


def parser(**options):
    count = itertools.count()
    return ReplyParser(new_id=lambda: f"id{next(count)}", **options)


def whole(text, *, cut=False, **options):
    """content, reasoning, [(name, arguments)] of a text fed at once."""
    reader = parser(**options)
    reader.feed(text)
    reader.finish(cut=cut)
    return outline(reader.parsed)


def outline(parsed):
    return parsed.content, parsed.reasoning, [(call.name, call.arguments) for call in parsed.tool_calls]


# What models write, good and bad, to be put together at random.
PIECES = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        *("{", "}", "[", "]", '"', ":", ",", "\\", "\n", " ", "<", "f", "\u20ac", "null", "3", "e"),
        *('{"name": "f", "arguments": ', '"arguments": {"a": "</tool_call>"}', '{"a": [1, {"b": "\\""}]}'),
        *(JSON_CALL, XML_CALL, "<think>\nhm\n</think>\n\n"),
    ]
)
TEXTS = st.lists(PIECES, max_size=14).map("".join)
OPTIONS = st.fixed_dictionaries(
    {
        "thinking": st.booleans(),
        "opened": st.booleans(),
        "tools": st.sampled_from([None, "json", "xml"]),
        "schemas": st.sampled_from([{}, {"f": {"properties": {"a": {"type": "string"}}}}, {"f": {"properties": None}}]),
    }
)


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, options=OPTIONS, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_no_cut_changes_what_is_found(text, options, cuts):
    reader, seen = parser(**options), Parsed()
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    for start, end in itertools.pairwise(places):
        for delta in reader.feed(text[start:end]):
            assert delta.content or delta.reasoning or delta.arguments or delta.name  # no empty deltas
            assert (delta.id is None) == (delta.name is None)
            seen.add(delta)
    for delta in reader.finish():
        seen.add(delta)
    assert reader.finish() == [] and seen == reader.parsed
    assert outline(seen) == whole(text, **options)
    assert [call.id for call in seen.tool_calls] == sorted({call.id for call in seen.tool_calls}, key=lambda id: int(id[2:]))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60) | TEXTS)
def test_without_parsers_text_is_content(text):
    assert whole(text) == (text, "", [])


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(blacklist_characters="<"), max_size=40))
def test_plain_text_is_content_for_every_parser(text):
    for tools in ("json", "xml"):
        assert whole(text, thinking=True, tools=tools) == (text, "", [])


NAMES = st.from_regex(r"[a-z_][a-z0-9_.-]{0,12}", fullmatch=True)
# The text of JSON strings: with what could be taken for structure, without what the formats reserve.
STRINGS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "}", "\\", "{\n", "a<b", "</x>", "3"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS | st.just("</tool_call>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=6,
)
CONTENT = st.text(st.characters(blacklist_characters="<", blacklist_categories=["Cs"]), max_size=12).map(str.strip)


def written(name, message):
    """What the assistant wrote of `message`, by our template."""
    variables = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **message}], "add_generation_prompt": False}
    rendered = LocalTemplate(builtin_template(name)).render(variables, track=True)
    start, end = rendered.spans[0]
    return rendered.text[start:end].removesuffix("<|role_end|>")


@settings(max_examples=60, deadline=None)
@given(
    content=CONTENT,
    reasoning=CONTENT,
    calls=st.lists(st.tuples(NAMES, st.dictionaries(STRINGS, VALUES, max_size=3)), max_size=3),
)
def test_ling_reads_what_its_template_writes(content, reasoning, calls):
    tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    text = written("ling", {"content": content, "reasoning_content": reasoning, "tool_calls": tool_calls})
    found = whole(text, thinking=True, tools="json")
    assert found[:2] == (content, reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls


KEYS = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    content=CONTENT, reasoning=CONTENT, calls=st.lists(st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=3)), max_size=3)
)
def test_ring_reads_what_its_template_writes(content, reasoning, calls):
    assume("</arg_value>" not in json.dumps(calls))  # ends a value whatever stands around it: the format has no way out
    tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    text = written("ring", {"content": content, "reasoning_content": reasoning, "tool_calls": tool_calls})
    properties = {key: {"type": "string"} for _, arguments in calls for key, value in arguments.items() if isinstance(value, str)}
    loose = {key for _, arguments in calls for key, value in arguments.items() if not isinstance(value, str)}
    schemas = {name: {"properties": {k: s for k, s in properties.items() if k not in loose}} for name, _ in calls}
    # A key that is text in one call and JSON in another: no schema says so.
    assume(not any(isinstance(a.get(key), str) for _, a in calls for key in loose))
    found = whole(text, thinking=True, opened=True, tools="xml", schemas=schemas)
    assert found[:2] == (content, reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Look.\n{JSON_CALL}\n{JSON_CALL}\n", ("Look.", "", [("f", '{"a": 1}')] * 2)),
        ('<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", "{}")])),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", "", [("f", '{"a": 1}')])),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\\\\\"\\"}"}</tool_call>', ("", "", [("f", '{"a": "\\""}')])),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", "", [("f", "{}")])),
        ('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', ("", "", [("f", '{"a": "x\\ny"}')])),
        (
            '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>!',
            ("!", "", [("f", '{"a": "</tool_call>"}')]),
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": 1', ("", "", [("f", '{"a": 1')])),
        ('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>x', ("x", "", [("f", '{"a": 1')])),
        (f'<tool_call>{{"name": "f"}}\n{JSON_CALL}', ("", "", [("f", "{}"), ("f", '{"a": 1}')])),
        ('a <tool_call>{"na', ("a", "", [])),
        ('a <tool_call> is a tag {"name": "f"}', ('a <tool_call> is a tag {"name": "f"}', "", [])),
        ('<tool_call>{"x": 1}</tool_call>', ('<tool_call>{"x": 1}</tool_call>', "", [])),
        (f'<tool_call>{{"x"}} {JSON_CALL}', ('<tool_call>{"x"}', "", [("f", '{"a": 1}')])),
        (f"<think>{JSON_CALL}</think>no", ("no", JSON_CALL, [])),
        (f" \n<think>\nhm\n\n</think>\n\n{JSON_CALL}", ("", "hm", [("f", '{"a": 1}')])),
        ("a <think>b</think>", ("a <think>b</think>", "", [])),
        ("<think>cut", ("", "cut", [])),
        (" <thin", (" <thin", "", [])),
        ("a\n\n", ("a\n\n", "", [])),
    ],
)
def test_json_calls_and_thinking(text, expected):
    assert whole(text, thinking=True, tools="json") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"Look.\n{XML_CALL}\n{XML_CALL}", ("Look.", "", [("f", '{"a": 1}')] * 2)),
        ("<tool_call>f\n</tool_call>", ("", "", [("f", "{}")])),
        ("<tool_call>f</tool_call>", ("", "", [("f", "{}")])),
        (XML_CALL.replace("1", "Oslo"), ("", "", [("f", '{"a": "Oslo"}')])),
        (XML_CALL.replace("1", "NaN"), ("", "", [("f", '{"a": "NaN"}')])),
        (XML_CALL.replace(">a<", ">s<"), ("", "", [("f", '{"s": "1"}')])),
        (XML_CALL.replace(">a<", ">s<").replace("1", '"\n<b>'), ("", "", [("f", '{"s": "\\"\\n<b>"}')])),
        ("<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>cut", ("", "", [("f", '{"s": "cut')])),
        ("<tool_call>f\n<arg_key>a</arg_key>\n<arg_key>s</arg_key>\n<arg_value>x</arg_value>", ("", "", [("f", '{"s": "x"')])),
        (f"<tool_call>f\n{XML_CALL}", ("", "", [("f", "{}"), ("f", '{"a": 1}')])),
        ("<tool_call> is a tag\nof mine", ("<tool_call> is a tag\nof mine", "", [])),
        ("<tool_call>f\nwords</tool_call>", ("<tool_call>f\nwords</tool_call>", "", [])),
        ("<tool_call>f", ("", "", [])),
        ("<tool_call>bad</tool_call>", ("", "", [("bad", "{}")])),
    ],
)
def test_xml_calls(text, expected):
    assert whole(text, tools="xml", schemas={"f": {"properties": {"s": {"type": "string"}}}}) == expected


CALLS = {
    "json": '{"name": "weather", "arguments": {"city": "Oslo"}}\n',
    "xml": "weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n",
}


@pytest.mark.parametrize("opening", ["", "<think>\nhm\n</think>\n\n", "Look.\n"])
@pytest.mark.parametrize("tools", ["json", "xml"])
def test_a_call_that_is_cut_shows_no_markup(tools, opening):
    """At every place: with its whole name it is a call whose arguments are a beginning of the whole ones, else nothing."""
    text = (
        f"{opening}<tool_call>\n{CALLS[tools]}</tool_call>"
        if tools == "json"
        else f"{opening}<tool_call>{CALLS[tools]}</tool_call>"
    )
    schemas = {"weather": {"properties": {"city": {"type": "string"}}}}
    options = {"thinking": True, "tools": tools, "schemas": schemas}
    ((_, arguments),) = whole(text, **options)[2]
    named = text.index("weather") + len("weather")
    for end in range(len(text)):
        content, reasoning, calls = whole(text[:end], cut=True, **options)
        assert "<" not in content + reasoning
        if end > named:
            ((name, part),) = calls
            assert name == "weather" and arguments.startswith(part)
        else:
            assert calls == []


def test_only_a_cut_leaves_half_a_tag_out():
    for text in ("if a <", "the tag <tool_ca", "<thin"):
        assert whole(text, thinking=True, tools="json") == (text, "", [])
        assert whole(text, thinking=True, tools="json", cut=True)[0] == text.partition("<")[0]
    assert whole("hm</thi", thinking=True, opened=True, cut=True) == ("", "hm", [])
    assert whole("if a <", cut=True) == ("if a <", "", [])  # nothing is looked for
    assert whole("<tool_call>f\nwords", tools="xml", cut=True) == ("", "", [])
    wrapped = '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"x'
    assert whole(wrapped, tools="json", cut=True) == ("", "", [("f", '{"a": "x')])


def test_deltas_stream():
    reader = parser(thinking=True, opened=True, tools="json")
    feed = [
        "hm",
        "</think>\n\nLook",
        ".\n<tool",
        '_call>\n{"name": "f',
        '", "arguments": {"city": "Os',
        'lo"}}',
        "\n</tool_call>",
    ]
    found = [[(d.content, d.reasoning, d.call, d.id, d.name, d.arguments) for d in reader.feed(text)] for text in feed]
    assert found == [
        [("", "hm", None, None, None, "")],
        [("Look", "", None, None, None, "")],
        [(".", "", None, None, None, "")],
        [],
        [("", "", 0, "id0", "f", '{"city": "Os')],
        [("", "", 0, None, None, 'lo"}')],
        [],
    ]
    assert reader.finish() == []
    with pytest.raises(ValueError, match="finished"):
        reader.feed("x")


def test_ids_are_made_once_and_differ():
    reader = ReplyParser(tools="json")
    reader.feed(JSON_CALL * 2)
    reader.finish()
    one, two = (call.id for call in reader.parsed.tool_calls)
    assert one != two and one.startswith("call_")


def test_formats_are_read_off_the_template():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"s": {"type": "string"}}}}}
    ling, ring = choose(builtin_template("ling")), choose(builtin_template("ring"))
    assert (ling.tools, ling.thinking, ring.tools, ring.thinking) == ("json", True, "xml", True)
    assert choose(None) == choose("{{ messages }}") and choose(None).tools is None and not choose(None).thinking
    assert choose(None, tool_parser="hermes", reasoning_parser="think") == choose(builtin_template("ling"))
    assert choose(builtin_template("ring"), tool_parser="none", reasoning_parser="none") == choose(None)
    with pytest.raises(UserError, match="qwen"):
        choose(None, tool_parser="qwen25")
    with pytest.raises(UserError, match="think"):
        choose(None, reasoning_parser="thinking")
    reader = ring.parser("<role>ASSISTANT</role>\n<think>", [tool])
    reader.feed("\nhm\n</think>\n\n" + XML_CALL.replace(">a<", ">s<"))
    reader.finish()
    assert outline(reader.parsed) == ("", "hm", [("f", '{"s": "1"}')])
    no_tools = ling.parser("<role>ASSISTANT</role>")
    no_tools.feed(JSON_CALL)
    no_tools.finish()
    assert outline(no_tools.parsed) == (JSON_CALL, "", [])
    closed = ring.parser("<think>\n\n</think>\n\n")
    closed.feed("answer")
    assert closed.parsed.content == "answer"


@pytest.mark.parametrize("tools", ["json", "xml"])
def test_long_garbage_takes_linear_time(tools):
    """Every character is read a bounded number of times, also where text that looked like a call is read again."""
    for piece in (
        "<tool_call>",
        '<tool_call>{"',
        '<tool_call>{"name": "f", "arguments": [',
        "<tool_call>f\n<arg_key>",
        "<tool_call",
    ):
        text, reads = piece * 300, 0
        reader = parser(tools=tools)
        pop = reader._source.next

        def counted():
            nonlocal reads
            reads += 1
            return pop()  # noqa: B023

        reader._source.next = counted
        reader.feed(text)
        reader.finish()
        assert reads < 12 * len(text)


WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
}
OFFERED = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER}}, {"function": {"name": "now"}}]
JSON_GOOD = '<tool_call>\n{"name": "weather", "arguments": {"city": "Os<lo", "days": 3}}\n</tool_call>'
JSON_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML_GOOD = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Os<lo</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)


@pytest.mark.parametrize(("tokens", "special"), [(ALL_MARKS, MARKS), (NO_MARKS, ())])
@pytest.mark.parametrize(
    ("template", "good", "now"),
    [
        ("ling", JSON_GOOD, JSON_NOW),
        ("ring", XML_GOOD, "<tool_call>now\n</tool_call>"),
    ],
)
def test_a_reply_that_must_call_a_tool(tokens, special, template, good, now):
    compiler = GrammarCompiler(tokens, vocab_size=300, eos_ids={tokens.eos_token_id})
    format = choose(builtin_template(template))

    def accepts(grammar, text):
        matcher = compiler.submit(grammar).result(timeout=10)
        try:
            matcher.advance(tokens(text)["input_ids"])
        except Failure:
            return False
        return matcher.is_complete

    one = format.tool_grammar("x", OFFERED, parallel=False, special=special)
    assert accepts(one, good) and accepts(one, now)
    bad = (good.replace("weather", "whether"), good.replace("3", "x"), good.replace("city", "town"), "hi", f"{good}\n{now}")
    assert not any(accepts(one, text) for text in bad)
    several = format.tool_grammar("<think>", OFFERED, parallel=True, special=special)
    assert accepts(several, f"hm </ \n</think>\n\n{good}\n{now}") and not accepts(several, good)
    answer = format.answer_grammar("<think>", Grammar("json_schema", json.dumps(WEATHER)), special=special)
    assert accepts(answer, 'hm</think>\n\n{"city": "x"}') and not accepts(answer, '{"city": "x"}')
    assert not accepts(answer, "hm</think>[]")
    assert format.answer_grammar("x", Grammar("json_object"), special=special) == Grammar("json_object")
    found = format.parser("x", OFFERED)
    found.feed(f"{good}\n{now}")
    found.finish()
    calls = [(call.name, json.loads(call.arguments)) for call in found.parsed.tool_calls]
    assert calls == [("weather", {"city": "Os<lo", "days": 3}), ("now", {})]


def test_a_model_without_tools_cannot_be_made_to_call_one():
    with pytest.raises(UserError, match="no format"):
        choose(None).tool_grammar("", OFFERED, parallel=True, special=())
