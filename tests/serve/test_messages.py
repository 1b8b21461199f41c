"""Chat in Anthropic's dialect: what becomes of a request, whole replies and streams, stops, errors."""

import json

from chat_calls import A_TOOLS, CALLS, HI, MESSAGES, ask, say, stream
from scripted_engine import ScriptedEngine, piece

from openling.serve.protocol_anthropic import MessagesRequest, as_chat

ANTHROPIC = {"model": "tiny", "max_tokens": 50}


def test_messages_become_chat():
    body = MessagesRequest.model_validate(
        ANTHROPIC
        | {
            "system": [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "weather?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "text", "text": "looking"},
                        {"type": "tool_use", "id": "t1", "name": "first", "input": {"x": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                        {"type": "text", "text": "and?"},
                    ],
                },
            ],
            "tools": A_TOOLS,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "stop_sequences": ["END"],
            "metadata": {"user_id": "u"},
        }
    )
    chat = as_chat(body)
    assert chat["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "looking",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "first", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": "and?"},
    ]
    assert (chat["tool_choice"], chat["parallel_tool_calls"], chat["stop"]) == ("required", False, ["END"])
    assert chat["chat_template_kwargs"] == {"enable_thinking": True}


def test_messages_whole_and_streamed(scripted):
    say(scripted, "why</think>So:\n", CALLS[4:])
    body = ANTHROPIC | {"tools": A_TOOLS, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    answer = ask(scripted, MESSAGES, **body)
    kinds = [block["type"] for block in answer["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert (answer["content"][2]["name"], answer["content"][2]["input"]) == ("first", {"x": 1})
    assert (answer["stop_reason"], answer["role"], answer["type"]) == ("tool_use", "assistant", "message")
    events = stream(scripted, MESSAGES, **body)
    names = [event["type"] for event in events]
    assert (names[0], names[-2:]) == ("message_start", ["message_delta", "message_stop"])
    blocks = {}
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks[event["index"]] = (event["content_block"]["type"], "")
        if event["type"] == "content_block_delta":
            kind, text = blocks[event["index"]]
            delta = event["delta"]
            blocks[event["index"]] = (
                kind,
                text + (delta.get("text") or delta.get("thinking") or delta.get("partial_json") or ""),
            )
    assert [kind for kind, _ in blocks.values()] == kinds
    assert json.loads(blocks[2][1]) == {"x": 1}
    assert names.count("content_block_start") == names.count("content_block_stop") == 4
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_messages_end_at_a_stop_sequence_and_count_tokens(nano):
    free = ask(nano, MESSAGES, model="nano", max_tokens=40, temperature=0)["content"][0]["text"]
    assert ask(nano, MESSAGES + "/count_tokens", model="nano") == {"input_tokens": 42}
    stop = next(c for c in free[2:] if c.isascii())
    answer = ask(nano, MESSAGES, model="nano", max_tokens=40, temperature=0, stop_sequences=[stop])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["usage"]["input_tokens"] + answer["usage"]["cache_read_input_tokens"] == 42


def test_errors_of_messages_have_anthropics_shape(scripted):
    answer = scripted.client.post(MESSAGES, {"model": "tiny", "messages": HI})
    assert answer.status == 400
    assert answer.json["type"] == "error"
    assert answer.error == {"type": "invalid_request_error", "message": "missing required parameter 'max_tokens'"}

    image = {"type": "image", "source": {"type": "url", "url": "http://x"}}
    answer = scripted.client.post(MESSAGES, ANTHROPIC | {"messages": [{"role": "user", "content": [image]}]})
    assert answer.status == 400
    assert "messages[0].content[0]" in answer.error["message"]
    assert "'image'" in answer.error["message"]

    async def fails(request):
        yield piece(request, "x")
        yield piece(request, "", "error", error="broken")

    scripted.service.engine = ScriptedEngine(fails)
    raw = scripted.client.post(MESSAGES, {"messages": HI, "stream": True} | ANTHROPIC).body
    assert raw.endswith(b"\n\n")
    assert b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"broken"}' in raw
