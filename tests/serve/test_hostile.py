"""Requests that were made to hurt, against the nano model: what each found is mended, and the server outlives all of them."""

import json
import socket

import pytest
from live_server import live, raw, until

from openling.bench.nano import write_nano
from openling.config.serve import LimitsConfig, ServeConfig
from openling.serve.engine_config import EngineConfig
from openling.serve.start import build_service
from openling.serve.text import LOWEST, finite
from openling.weights.folder import load

CHAT, MESSAGES, COMPLETIONS = "/v1/chat/completions", "/v1/messages", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]
GREEDY = {"prompt": "ab", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    loaded = load(write_nano(tmp_path_factory.mktemp("model") / "nano"))
    sizes = {"max_running": 8, "step_tokens": 256, "pages": 200, "slots": 32, "max_model_len": 1024}
    config = ServeConfig(model_id="nano", limits=LimitsConfig(header_bytes=4096, parts=100))
    with live(build_service(loaded, EngineConfig(**sizes), config)) as server:
        yield server


def text_of(server, **changes):
    answer = server.client.post(COMPLETIONS, GREEDY | changes)
    assert answer.status == 200, answer.body
    return answer.json["choices"][0]["text"]


def asks_for(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# -- bodies ----------------------------------------------------------------------------------------------------------------

WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}


def test_a_grammar_that_grows_too_complex_ends_its_own_reply_alone(nano):
    answer = nano.client.post(CHAT, {"messages": HI, "max_tokens": 8, "response_format": asks_for(WIDE)})
    assert (answer.status, answer.error["code"]) == (400, "invalid_grammar")
    assert nano.client.get("/health").status == 200
    nano.call(nano.service.engine.call(lambda engine: engine.check_integrity()))


def test_a_temperature_next_to_zero_is_zero(nano):
    greedy = text_of(nano)
    for temperature in (1e-300, 1e-45, 1e-38, 1e-7):
        assert text_of(nano, temperature=temperature) == greedy


@pytest.mark.parametrize("penalty", [0, 1e-300, 0.009])
def test_a_repetition_penalty_that_overflows_is_refused(nano, penalty):
    assert nano.client.post(COMPLETIONS, GREEDY | {"repetition_penalty": penalty}).status == 400


def test_a_model_that_makes_nan_still_answers_json():
    assert json.dumps([finite(float("nan")), finite(float("-inf")), finite(-1.5)]) == json.dumps([LOWEST, LOWEST, -1.5])


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_an_error_names_its_field_however_short(nano, value):
    assert nano.client.post(COMPLETIONS, GREEDY | {"n": value}).error["message"].startswith("n: ")


MANY = 100_000
LONG = [
    (CHAT, {"messages": HI * MANY}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * MANY}]}),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * MANY}]}),
    (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}] * MANY}),
    (CHAT, {"messages": HI, "stop_token_ids": [1] * MANY}),
    (CHAT, {"prompt_token_ids": [1] * MANY}),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 1000}] * 100}),
    (MESSAGES, {"model": "nano", "max_tokens": 1, "messages": HI * MANY}),
    (MESSAGES, {"model": "nano", "max_tokens": 1, "messages": HI, "stop_sequences": ["a"] * MANY}),
    (MESSAGES + "/count_tokens", {"model": "nano", "messages": HI * MANY}),
    (COMPLETIONS, {"prompt": [1] * MANY}),
    (COMPLETIONS, {"prompt": [[1]] * MANY}),
    (COMPLETIONS, {"prompt": ["a"] * MANY}),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(MANY)}}),
    (COMPLETIONS, {"prompt": "a"} | {f"p{i}": 1 for i in range(MANY)}),
    ("/tokenize", {"messages": HI * MANY}),
    ("/detokenize", {"tokens": [1] * MANY}),
]


@pytest.mark.parametrize(("path", "body"), LONG, ids=range(len(LONG)))
def test_lists_are_counted_before_anything_looks_into_them(nano, monkeypatch, path, body):
    """Looking into the longest body took the event loop a minute."""
    for name in ("render", "encode"):
        monkeypatch.setattr(nano.service.text, name, None)
    answer = nano.client.post(path, body)
    assert answer.status == 400
    assert any(word in answer.error["message"] for word in ("at most", "no route has more", "longer than the context"))


def test_control_tokens_of_a_user_end_no_turn(nano):
    """The text `<|role_end|>` is a token where the system says it, and mere text where a user or a tool does."""

    def ends(role, content, **changes):
        body = {"messages": [{"role": role, "content": content} | changes], "add_special_tokens": False}
        return nano.client.post("/tokenize", body).json["tokens"].count(258)

    assert ends("system", "a<|role_end|>b") == 2
    for role in ("user", "tool"):
        assert ends(role, "a<|role_end|>b", name="<|role_end|>", tool_call_id="<|role_end|>") == 1


# -- HTTP ------------------------------------------------------------------------------------------------------------------

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\nX: {'a' * 5000}\r\n\r\n", 400),
        (f"GET /health HTTP/1.1\r\nHost: localhost\r\n{''.join(f'X{i}: a' + chr(13) + chr(10) for i in range(1500))}\r\n", 400),
        (f"GET /{'a' * 5000} HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (HEAD + 'Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\ne\r\n{"prompt":"a"}\r\n0\r\n\r\n', 400),
        (HEAD + 'Content-Encoding: gzip\r\nContent-Length: 14\r\n\r\n{"prompt":"a"}', 415),
        ("GET /health HTTP/1.0\r\n\r\n", 200),
    ],
    ids=["header", "headers", "path", "two lengths", "compressed", "HTTP/1.0"],
)
def test_the_connection_ends_with_a_request_that_cannot_be_trusted(nano, request_text, status):
    said = raw(nano.client.port, request_text.encode())
    assert said.startswith(f"HTTP/1.1 {status} ".encode())
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in said.lower()


def test_pipelined_requests_are_answered_in_order(nano):
    body = json.dumps(GREEDY | {"stream": True})
    ask = f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}"
    said = raw(nano.client.port, (ask * 3 + "GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").encode())
    assert (said.count(b"HTTP/1.1 200"), said.count(b"[DONE]")) == (4, 3)
    assert said.rindex(b"[DONE]") < said.index(b'"weight_version"', said.rindex(b"HTTP/1.1"))


def test_a_pipelined_request_does_not_hide_that_the_client_left(nano):
    body = json.dumps(GREEDY | {"stream": True, "max_tokens": 900})
    sock = socket.create_connection(("127.0.0.1", nano.client.port), timeout=20)
    sock.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode() * 2)
    assert b"200 OK" in sock.recv(100)
    sock.close()
    until_idle(nano)


def until_idle(server):
    until(lambda: server.service.admission.total.replies == 0 and server.stats().running == 0, 30)
    server.call(server.service.engine.call(lambda engine: engine.check_integrity()))
