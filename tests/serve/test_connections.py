"""Clients that are slow or leave, deadlines, failures, and how the server stops."""

import asyncio
import logging
import socket
import threading
import time

import pytest
from live_server import ASK, Client, Streams, live, open_stream, raw, until
from scripted_engine import hangs, piece, says, scripted_service, silent

from openling.serve.types import Output

# -- clients that are slow or leave ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(tiny, stream):
    sock = open_stream(tiny.client, ASK | {"max_tokens": 900, "ignore_eos": True, "stream": stream})
    until(lambda: tiny.stats().running == 1)
    sock.close()
    until(lambda: tiny.service.admission.total.replies == 0)
    steps = tiny.stats().steps
    assert tiny.stats().running == 0
    assert tiny.stats().steps <= steps + 1
    tiny.call(tiny.service.engine.call(lambda engine: engine.check_integrity()))


def test_all_replies_of_a_call_end_with_its_client():
    service = scripted_service(hangs)
    with live(service) as server:
        with Streams(server.client, 1, n=3):
            assert service.engine.running == 3
        until(lambda: service.engine.running == 0)
        assert len(service.engine.left) == 3
        assert service.active == {}


def test_slow_headers_and_slow_bodies_are_cut_off():
    with live(scripted_service(says("ok"), timeouts={"headers": 0.2, "body": 0.2})) as server:
        port = server.client.port
        assert raw(port, b"") == b""
        assert raw(port, b"GET /health HTTP/1.1\r\nHos") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        assert raw(port, head).startswith(b"HTTP/1.1 408")
        after = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"
        assert raw(port, after).count(b"HTTP/1.1 200") == 1  # the second request on the connection has the same time


def test_connections_are_counted():
    service = scripted_service(says("ok"), limits={"connections": 2})
    with live(service) as server:
        held = [socket.create_connection(("127.0.0.1", server.client.port)) for _ in range(2)]
        time.sleep(0.05)
        assert raw(server.client.port, b"") == b""
        for sock in held:
            sock.close()
        until(lambda: answers(server.client))


def answers(client):
    try:
        return client.get("/health").status == 200
    except OSError:
        return False


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_beyond_the_deadline_is_408(stream):
    with live(scripted_service(silent, timeouts={"reply": 0.2})) as server:
        answer = server.client.post("/v1/completions", ASK | {"stream": stream})
        error = answer.events[-1]["error"] if stream else answer.error
        assert answer.status == (200 if stream else 408)
        assert (error["type"], error["code"]) == ("timeout_error", "timeout")
        assert service_is_idle(server)


def test_a_pause_puts_the_deadline_off_and_no_more():
    with live(scripted_service(silent, timeouts={"reply": 0.5})) as server:
        began = time.monotonic()
        threading.Timer(0.2, lambda: setattr(server.service.engine, "paused_seconds", 0.7)).start()
        assert server.client.post("/v1/completions", ASK).status == 408
        assert 1.2 <= time.monotonic() - began < 5


def service_is_idle(server):
    until(lambda: server.service.engine.running == 0 and server.service.admission.total.replies == 0)
    return True


def test_silent_streams_carry_comments():
    with live(scripted_service(says("a", "b", pause=0.5), timeouts={"comment": 0.1})) as server:
        answer = server.client.post("/v1/completions", ASK | {"stream": True})
        assert answer.body.count(b": keep-alive\n\n") >= 2
        assert answer.events[-1] == "[DONE]"


def test_a_client_that_takes_nothing_does_not_hold_its_slot():
    async def endless(request):
        while True:
            yield Output(request.id, text="x" * 200_000)
            await asyncio.sleep(0)

    with live(scripted_service(endless, timeouts={"write": 0.3})) as server:
        sock = open_stream(server.client, ASK | {"stream": True})
        until(lambda: len(server.service.engine.left) == 1)
        sock.close()


# -- failures --------------------------------------------------------------------------------------------------------------


SECRET = "-".join(("a", "secret"))  # the log shows source lines, which must not hold it


async def breaks(request):
    yield piece(request, "x")
    await asyncio.sleep(0.1)
    raise RuntimeError(SECRET)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_failure_or_a_prompt_leaves_the_server(stream, caplog):
    caplog.set_level(logging.DEBUG)
    with live(scripted_service(breaks)) as server:
        answer = server.client.post("/v1/completions", ASK | {"prompt": SECRET, "stream": stream})
        error = answer.events[-1]["error"] if stream else answer.error
        assert error == {"message": "something went wrong in the server", "type": "api_error", "param": None, "code": "internal"}
        assert b"[DONE]" not in answer.body
        assert service_is_idle(server)
    said = caplog.text + answer.body.decode()
    assert SECRET not in said
    assert "Traceback" not in answer.body.decode()
    assert "RuntimeError" in caplog.text
    assert answer.headers["x-request-id"] in caplog.text


def test_a_failing_reply_is_an_error_event_and_the_end():
    async def fails(request):
        yield piece(request, "x")
        yield piece(request, "", "error", error="the reply left its grammar")

    with live(scripted_service(fails)) as server:
        whole = server.client.post("/v1/completions", ASK)
        assert (whole.status, whole.error["message"]) == (500, "the reply left its grammar")
        streamed = server.client.post("/v1/completions", ASK | {"stream": True}).events
        assert streamed[0]["choices"][0]["text"] == "x"
        assert streamed[-1]["error"]["code"] == "engine_error"


def test_an_engine_that_dies_is_seen_in_health(caplog):
    with live() as server:
        assert server.client.get("/health").status == 200

        def die(engine):
            engine.step = engine.has_work = None

        server.call(server.service.engine.call(die))
        until(lambda: server.client.get("/health").status == 503)
        assert server.client.get("/ready").status == 503
        answer = server.client.post("/v1/completions", ASK)
        assert (answer.status, answer.error["type"]) == (503, "overloaded_error")
        assert "retry-after" in answer.headers
        assert server.client.get("/metrics").status == 200


def test_a_schema_that_fails_while_the_reply_is_made_is_the_requests_fault():
    from openling.serve.merged import _failed
    from openling.serve.types import Grammar, Request, SamplingParams

    request = Request("r", (1,), SamplingParams(grammar=Grammar("json_object")))
    error = _failed(request, Output("r", finish_reason="error", error="too complex\nNoExtensionBias"))
    assert (error.status, error.code, "NoExtensionBias" in error.message) == (400, "invalid_grammar", False)


# -- stopping --------------------------------------------------------------------------------------------------------------


def test_stopping_lets_replies_finish_and_takes_no_new_ones():
    service = scripted_service(says("a", "b", "c", pause=0.3), timeouts={"drain": 20})
    with live(service) as server:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(server.client.post("/v1/completions", ASK)))
        asking.start()
        until(lambda: service.engine.running == 1)
        server.loop.call_soon_threadsafe(server.stop.set)
        until(lambda: server.client.get("/ready").status == 503)
        assert server.client.get("/health").status == 200
        refused = server.client.post("/v1/completions", ASK)
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        asking.join(20)
        server.thread.join(20)
        assert not server.thread.is_alive()
    assert answers[0].json["choices"][0]["text"] == "abc"


def test_stopping_does_not_wait_beyond_the_deadline():
    service = scripted_service(hangs, timeouts={"drain": 0.2})
    with live(service) as server:
        sock = open_stream(server.client, ASK | {"stream": True})
        until(lambda: service.engine.running == 1)
        server.shut_down()
        sock.close()
    assert service.engine.left


def test_sigterm_lets_the_reply_finish_and_the_process_exits_with_0(tmp_path):
    from server_process import served_nano

    with served_nano(tmp_path / "nano", "--timeouts.idle", "1") as server:
        client = Client(int(server.url.rpartition(":")[2]))
        sock = open_stream(client, {"prompt": "ab", "max_tokens": 60, "ignore_eos": True, "stream": True})
        found = sock.recv(65536)
        assert found.startswith(b"HTTP/1.1 200")
        server.process.terminate()
        while part := sock.recv(65536):
            found += part
        assert b"[DONE]" in found
        assert found.count(b'"finish_reason":"length"') == 1
        assert server.process.wait(30) == 0
        assert not any("Traceback" in line for line in server.log)
