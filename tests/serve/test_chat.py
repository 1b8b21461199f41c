"""Chat in OpenAI's dialect: streams equal whole replies, tools, schemas, thinking, log-probabilities; any body on any route."""

import json

import pytest
from chat_calls import A_TOOLS, CALLS, CHAT, HI, MESSAGES, SCHEMA, TOOLS, ask, say, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine, piece

from openling.serve.chat import template_kwargs
from openling.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from openling.serve.protocol_anthropic import MessagesRequest


def joined(events):
    """A stream's first choice put together, as clients do."""
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in events[:-1]:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


# -- streams and whole replies ---------------------------------------------------------------------------------------------


def test_a_stream_has_role_deltas_finish_usage_and_done(nano):
    same = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    whole = ask(nano, **same)
    events = stream(nano, **same, stream_options={"include_usage": True})
    chunks = events[:-1]
    assert events[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined([*chunks[:-1], "[DONE]"])["content"] == whole["choices"][0]["message"]["content"]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert (reasons[-1], set(reasons[:-1])) == ("length", {None})
    assert chunks[-1]["choices"] == []
    assert {k: v for k, v in chunks[-1]["usage"].items() if k != "prompt_tokens_details"} == {
        k: v for k, v in whole["usage"].items() if k != "prompt_tokens_details"
    }
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_usage_can_come_with_every_chunk(nano):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(nano, temperature=0, max_tokens=5, ignore_eos=True, stream_options=options)[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_the_fingerprint_is_the_weights_version(scripted):
    say(scripted, "x")
    assert ask(scripted)["system_fingerprint"] == "7"


def test_n_replies_differ_repeat_and_count_the_prompt_once(nano):
    same = {"n": 3, "seed": 3, "max_tokens": 8, "ignore_eos": True}
    first, again = (ask(nano, **same) for _ in range(2))
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert len(set(texts)) == 3
    assert (first["usage"]["prompt_tokens"], first["usage"]["completion_tokens"]) == (42, 24)
    events = stream(nano, **same)
    assert {choice["index"] for chunk in events[:-1] for choice in chunk["choices"]} == {0, 1, 2}


def test_logprobs_name_tokens_and_their_bytes(nano):
    same = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": True, "top_logprobs": 3}
    choice = ask(nano, **same)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert len(entries) == 6
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]  # greedy
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] <= 0
    raw = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert raw.decode(errors="replace") == choice["message"]["content"]
    chunks = stream(nano, **same)[:-1]
    streamed = [e for chunk in chunks for c in chunk["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def test_token_ids_go_in_and_out(nano):
    same = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    by_text = ask(nano, **same)
    answer = nano.client.post(CHAT, {"prompt_token_ids": by_text["prompt_token_ids"]} | same).json
    assert answer["choices"][0]["token_ids"] == by_text["choices"][0]["token_ids"]
    assert len(by_text["choices"][0]["token_ids"]) == 6
    assert nano.client.post("/tokenize", {"messages": HI}).json["tokens"] == by_text["prompt_token_ids"]
    chunks = stream(nano, **same)[:-1]
    assert chunks[0]["prompt_token_ids"] == by_text["prompt_token_ids"]
    ids = [id for chunk in chunks for choice in chunk["choices"] for id in choice.get("token_ids", [])]
    assert ids == by_text["choices"][0]["token_ids"]


def test_stop_strings_end_a_reply(nano):
    free = ask(nano, temperature=0, max_tokens=40, ignore_eos=True)["choices"][0]["message"]["content"]
    stop = next(c for c in free[3:] if c.isascii() and free.count(c) and free.index(c) >= 3)
    choice = ask(nano, temperature=0, max_tokens=40, ignore_eos=True, stop=[stop])["choices"][0]
    assert choice["message"]["content"] == free[: free.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_the_prompt_cache_is_reported(nano):
    long = [{"role": "user", "content": "word " * 80}]
    counts = [
        ask(nano, messages=long, max_tokens=2, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert counts[0] == 0
    assert counts[1] > 200
    assert ask(nano, messages=long, max_tokens=2, cache_salt="other")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# -- tools, schemas, thinking ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 400])
def test_tool_calls_are_read_from_the_reply(scripted, cut):
    say(scripted, *(CALLS[i : i + cut] for i in range(0, len(CALLS), cut)))
    choice = ask(scripted, tools=TOOLS)["choices"][0]
    calls = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in choice["message"]["tool_calls"]]
    assert calls == [("first", {"x": 1}), ("second", {})]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("So:", "tool_calls")
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == 2
    events = stream(scripted, tools=TOOLS)
    put_together = joined(events)
    assert [(call["name"], json.loads(call["arguments"])) for call in put_together["tool_calls"]] == calls
    assert put_together["content"] == "So:"
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


def test_one_call_where_parallel_calls_are_off_and_none_where_tools_are(scripted):
    say(scripted, CALLS)
    assert len(ask(scripted, tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1
    for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = ask(scripted, **body)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALLS, "stop")
        assert "tool_calls" not in choice["message"]


def valid(arguments):
    return set(arguments) == {"x", "y"} and arguments["x"] in range(10) and arguments["y"] in ("a", "b")


# Nano's noise is fond of white space, of which a grammar allows much.
COMPACT = {str(id): -30 for id in (197, 198, 201, 220)}


@pytest.mark.parametrize("seed", range(3))
def test_a_required_tool_is_called_with_valid_arguments(nano, seed):
    same = {"tools": TOOLS, "parallel_tool_calls": False, "seed": seed, "max_tokens": 200, "logit_bias": COMPACT}
    calls = ask(nano, tool_choice="required", **same)["choices"][0]["message"]["tool_calls"]
    assert len(calls) == 1
    assert valid(json.loads(calls[0]["function"]["arguments"]))
    named = {"type": "function", "function": {"name": "second"}}
    choice = ask(nano, tool_choice=named, **same)["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["second"]
    assert choice["finish_reason"] == "tool_calls"


def test_a_call_that_max_tokens_cuts_is_a_call_so_far_or_nothing(nano):
    same = {"tools": TOOLS, "tool_choice": "required", "seed": 0, "logit_bias": COMPACT, "parallel_tool_calls": False}
    whole = ask(nano, **same, max_tokens=200)["choices"][0]["message"]["tool_calls"][0]["function"]
    seen = set()
    for count in (1, 2, 3, 5, 8, 12, 17, 23, 30, 38):
        choice = ask(nano, **same, max_tokens=count)["choices"][0]
        if choice["finish_reason"] != "length":
            break
        message = choice["message"]
        assert not message["content"]
        for call in message.get("tool_calls", ()):
            assert call["function"]["name"] == whole["name"]
            assert whole["arguments"].startswith(call["function"]["arguments"])
        seen.add("tool_calls" in message)
        events = nano.client.post(CHAT, {"messages": HI, **same, "max_tokens": count, "stream": True}).events[:-1]
        deltas = [event["choices"][0]["delta"] for event in events]
        assert not any(delta.get("content") for delta in deltas)
        parts = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
        assert "".join(part["arguments"] for part in parts) == "".join(
            call["function"]["arguments"] for call in message.get("tool_calls", ())
        )
        assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert seen == {False, True}


def test_half_a_tag_at_the_end_is_text_unless_max_tokens_cut_there(scripted):
    for end, shown in (("length", "Sure. "), ("stop", "Sure. <tool_ca")):

        async def script(request, end=end):
            yield piece(request, "Sure. <tool_ca", end)

        scripted.service.engine = ScriptedEngine(script)
        assert ask(scripted, tools=TOOLS)["choices"][0]["message"]["content"] == shown


@pytest.mark.parametrize("thinks", [False, True])
def test_a_reply_obeys_its_schema(nano, thinks):
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
    # The noise that nano thinks hardly ever closes by itself: its closing tag is made likely.
    close = nano.service.text.encode("</think>", special=False)
    bias = COMPACT | ({str(close[0]): 12} if thinks else {})
    body = {"chat_template_kwargs": {"enable_thinking": thinks}, "logit_bias": bias}
    message = ask(nano, response_format=wanted, max_tokens=900, seed=1, **body)["choices"][0]["message"]
    assert valid(json.loads(message["content"]))
    answer = ask(nano, response_format={"type": "json_object"}, max_tokens=300, seed=2, logit_bias=COMPACT | {"92": 9})
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"]), dict)


def test_bad_schemas_and_grammars_are_the_requests_fault(nano):
    def refused(schema):
        body = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
        return ask(nano, status=400, **body)["error"]

    deep: dict = {}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    assert "levels" in refused(deep)["message"]
    assert "$ref" in refused({"$ref": "http://elsewhere/schema"})["message"]
    assert "pattern" in refused({"type": "string", "pattern": "a" * 3000})["message"]
    assert "bytes" in refused({"enum": ["a" * 70_000]})["message"]
    assert refused({"type": "nonsense"})["code"] == "invalid_grammar"
    assert refused({"type": "string", "pattern": "("})["code"] == "invalid_grammar"
    assert ask(nano, max_tokens=2)["choices"]


def test_thinking_is_kept_apart(scripted):
    say(scripted, "wh", "y</thi", "nk>\n\nbecause")
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = ask(scripted, **thinking)["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["reasoning"]) == ("because", "why", "why")
    events = stream(scripted, **thinking)
    assert joined(events)["reasoning_content"] == "why"
    hidden = ask(scripted, **thinking, include_reasoning=False)["choices"][0]["message"]
    assert "reasoning_content" not in hidden


@pytest.mark.parametrize(
    ("body", "kwargs"),
    [
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high", "enable_thinking": True}),
        ({"chat_template_kwargs": {"reasoning_effort": "xhigh"}}, {"reasoning_effort": "xhigh"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "xhigh", "enable_thinking": False}},
            {"reasoning_effort": "xhigh", "enable_thinking": False},
        ),
    ],
)
def test_effort_reaches_the_template(body, kwargs):
    assert template_kwargs(ChatRequest(messages=HI, **body)) == kwargs


IMAGE = {"type": "image_url", "image_url": {"url": "http://x"}}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "x" * 99}}, "chat_template_kwargs"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"tool_choice": "required"}, None),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"top_logprobs": 2}, None),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "messages"),
        ({"functions": []}, "functions"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_what_is_wrong_is_named(scripted, body, param):
    answer = scripted.client.post(CHAT, {"messages": HI} | body)
    assert answer.status == (404 if param == "model" else 400)
    assert answer.error["param"] == param


@pytest.mark.parametrize("name, instead", [("functions", "tools"), ("function_call", "tool_choice"), ("modalities", "text")])
def test_what_is_not_supported_says_what_to_do_instead(scripted, name, instead):
    error = scripted.client.post(CHAT, {"messages": HI, name: []}).error
    assert error["code"] == "unsupported_parameter"
    assert f"'{name}' is not supported" in error["message"]
    assert instead in error["message"]
    assert "did you mean" not in error["message"]


def test_harmless_parameters_of_hosted_services_are_ignored(scripted):
    say(scripted, "x")
    ask(scripted, user="me", store=True, metadata={"a": "b"}, service_tier="auto", safety_identifier="x", prompt_cache_key="k")


def test_clients_may_send_back_what_they_got(scripted):
    say(scripted, CALLS)
    message = ask(scripted, tools=TOOLS)["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "42"} for call in message["tool_calls"]]
    ask(scripted, messages=[*HI, message, *results], tools=TOOLS)
    prompt = bytes(id for id in scripted.service.engine.requests[-1].prompt_token_ids if id < 256)
    assert len(prompt) > 100


# -- anything at all -------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
MODELS = (ChatRequest, CompletionRequest, MessagesRequest, TokenizeRequest, DetokenizeRequest)
FIELDS = sorted({name for model in MODELS for name in model.model_fields})
GOOD = {"messages": HI, "max_tokens": 2, "prompt": "a", "model": "tiny", "tokens": [1], "stream": True, "n": 2}
FORMATS = [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}]
KNOWN = [HI, TOOLS, A_TOOLS, SCHEMA, {"type": "any"}, "required", "none", {"include_usage": True}, [1, 2], "a", *FORMATS]
VALUE = JSON | st.sampled_from(KNOWN)


PLAIN = (True, 0, -1.5, "x", [], {}, [True], {"x": None}, [[]])


ROUTES = {
    CHAT: (ChatRequest, "messages", "max_tokens"),
    MESSAGES: (MessagesRequest, "messages", "max_tokens", "model"),
    "/v1/completions": (CompletionRequest, "prompt"),
    "/tokenize": (TokenizeRequest, "prompt"),
    "/detokenize": (DetokenizeRequest, "tokens"),
}


@pytest.mark.parametrize("path", ROUTES)
def test_no_single_field_breaks_the_server(scripted, compiler, path):
    """Every parameter of a route with a value of every kind; chance finds but some of them."""
    scripted.service.engine = ScriptedEngine(fine, compiler)
    model, *names = ROUTES[path]
    needed = {name: GOOD[name] for name in names}
    assert scripted.client.post(path, needed).status == 200
    for name in model.model_fields:
        for value in PLAIN:
            answer = scripted.client.post(path, needed | {name: value})
            assert answer.status in (200, 400, 404), (name, value, answer.body)
            alone = scripted.client.post(path, {name: value})
            assert alone.status in (200, 400, 404), (name, value, alone.body)


@settings(max_examples=250, deadline=None)
@given(
    path=st.sampled_from([CHAT, MESSAGES, MESSAGES + "/count_tokens", "/v1/completions", "/tokenize", "/detokenize"]),
    good=st.sets(st.sampled_from(sorted(GOOD))),
    other=st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=3),
)
def test_no_body_breaks_the_server(scripted, compiler, path, good, other):
    if scripted.service.engine.script is not fine:
        scripted.service.engine = ScriptedEngine(fine, compiler)
    answer = scripted.client.post(path, {name: GOOD[name] for name in good} | other)
    assert answer.status in (200, 400, 404), answer.body
    if answer.status != 200:
        assert answer.error["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert all(b.startswith((b"data: ", b"event: ", b": ")) for b in answer.body.removesuffix(b"\n\n").split(b"\n\n"))
        assert "error" not in str(answer.events[-1])
    assert scripted.service.engine.running == 0


async def fine(request):
    yield piece(request, "<tool_call>\n{")
    yield piece(request, '"name": "first"', "stop")


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from('a\n\r\x00\u2028\u2029é😀\\"<&\x85 '), max_size=20))
def test_any_text_survives_the_stream(scripted, text):
    say(scripted, *text)
    assert joined(stream(scripted))["content"] == text
