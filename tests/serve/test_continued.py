"""A last message of the assistant that the model writes on: /v1/messages by itself, chat completions where they ask for it."""

import pytest
from live_server import live
from scripted_engine import piece, says, scripted_service

from openling.serve.protocol_anthropic import MessagesRequest, as_chat

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
HI = {"role": "user", "content": "hi"}
ANTHROPIC = {"model": "tiny", "max_tokens": 5}
CONTINUE = {"continue_final_message": True}


@pytest.fixture(scope="module")
def server():
    with live(scripted_service(says(" there"))) as running:
        yield running


def begun(content) -> dict:
    return {"role": "assistant", "content": content}


def prompt(server) -> str:
    return server.service.text.full(server.service.engine.requests[-1].prompt_token_ids)


@pytest.mark.parametrize(
    ("path", "body"), [(CHAT, CONTINUE), (CHAT, CONTINUE | {"add_generation_prompt": False}), (MESSAGES, ANTHROPIC)]
)
def test_the_prompt_ends_where_the_message_does(server, path, body):
    answer = server.client.post(path, {"messages": [HI, begun("Hello")]} | body)
    assert answer.status == 200, answer.body
    assert prompt(server) == "<role>user</role>hi<|role_end|><role>assistant</role>Hello"
    said = answer.json["content"][0]["text"] if path == MESSAGES else answer.json["choices"][0]["message"]["content"]
    assert said == " there"  # only what is new, its space with it


def test_without_the_flag_a_chat_reply_is_a_turn_of_its_own(server):
    assert server.client.post(CHAT, {"messages": [HI, begun("Hello")]}).status == 200
    assert prompt(server).endswith("Hello<|role_end|><role>ASSISTANT</role>")


def test_a_last_message_without_text_is_none(server):
    for content in ("", " \n", []):
        assert server.client.post(MESSAGES, ANTHROPIC | {"messages": [HI, begun(content)]}).status == 200
        assert prompt(server) == "<role>user</role>hi<|role_end|><role>ASSISTANT</role>"


def test_thinking_is_continued_with_what_follows_it():
    blocks = [{"type": "thinking", "thinking": "hm", "signature": ""}]
    chat = as_chat(MessagesRequest(**ANTHROPIC, messages=[HI, begun(blocks)]))
    assert (chat["messages"][-1]["reasoning_content"], chat["continue_final_message"]) == ("hm", True)


def test_tokens_are_counted_as_they_are_sent(server):
    body = {"model": "tiny", "messages": [HI, begun("Hello")]}
    server.client.post(MESSAGES, ANTHROPIC | body)
    sent = len(server.service.engine.requests[-1].prompt_token_ids)
    assert server.client.post(f"{MESSAGES}/count_tokens", body).json == {"input_tokens": sent}


TOOL_USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
SCHEMA = {"type": "object"}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        (MESSAGES, ANTHROPIC | {"messages": [HI, begun("Hello ")]}, "white space"),
        (MESSAGES, ANTHROPIC | {"messages": [HI, begun([TOOL_USE])]}, "tool_result"),
        (
            MESSAGES,
            ANTHROPIC | {"messages": [HI, begun("{")], "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            "schema",
        ),
        (CHAT, CONTINUE | {"messages": [HI]}, "assistant"),
        (CHAT, CONTINUE | {"messages": [HI, CALL]}, "assistant"),
        (CHAT, CONTINUE | {"prompt_token_ids": [1]}, "assistant"),
        (CHAT, CONTINUE | {"messages": [HI, begun("a")], "response_format": {"type": "json_object"}}, "schema"),
        (CHAT, CONTINUE | {"messages": [HI, begun("a")], "tools": [TOOL], "tool_choice": "required"}, "tool"),
        (CHAT, CONTINUE | {"messages": [HI, begun("a")], "add_generation_prompt": True}, "add_generation_prompt"),
        (CHAT, {"messages": [HI], "add_generation_prompt": False}, "continue_final_message"),
    ],
)
def test_what_cannot_be_continued_is_refused(server, path, body, says):
    answer = server.client.post(path, body)
    assert answer.status == 400, answer.body
    assert says in answer.error["message"]


def test_a_stream_counts_cached_tokens_from_its_beginning():
    async def script(request):
        yield piece(request, "a", prompt_tokens=9, cached_tokens=4)
        yield piece(request, "b", "stop", prompt_tokens=9, cached_tokens=4, completion_tokens=2)

    with live(scripted_service(script)) as server:
        events = server.client.post(MESSAGES, ANTHROPIC | {"messages": [HI], "stream": True}).events
    first, last = events[0]["message"]["usage"], events[-2]["usage"]
    assert (first["input_tokens"], first["cache_read_input_tokens"], first["output_tokens"]) == (5, 4, 1)
    assert last == first | {"output_tokens": 2}
