"""The safety list: who may ask for what, bounds before work, clients that misbehave or leave, how the server fails and stops."""

import argparse
import asyncio
import hmac
import json
import logging
import socket
import threading
import time

import pytest
from live_server import Client, live
from scripted_engine import hangs, piece, says, scripted_service, silent

from openling.commands import serve as command
from openling.config.serve import LimitsConfig, ServeConfig
from openling.errors import UserError
from openling.serve.auth import Keys, check_binding, read_keys
from openling.serve.server import endpoints
from openling.serve.types import Output
from openling.serve.web import page_files

KEY, OTHER, ADMIN = "key-one", "key-two", "admin-key"
ASK = {"prompt": "ab", "max_tokens": 4}


@pytest.fixture(scope="module")
def tiny():
    with live() as server:
        yield server


@pytest.fixture(scope="module")
def locked():
    with live(scripted_service(says("ok")), keys=Keys((KEY, OTHER), (ADMIN,))) as server:
        yield server


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def raw(port: int, data: bytes, *, wait: float = 10.0) -> bytes:
    """What the server says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as sock:
        sock.sendall(data)
        found = b""
        while part := sock.recv(65536):
            found += part
        return found


# -- who may ask -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_public_addresses_need_a_key_or_an_explicit_flag(host):
    with pytest.raises(UserError, match="no API key"):
        check_binding(host, Keys(), allow_public=False)
    check_binding(host, Keys((KEY,)), allow_public=False)
    check_binding(host, Keys(), allow_public=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.9.9.9"])
def test_this_machine_needs_none(host):
    check_binding(host, Keys(), allow_public=False)


def test_the_default_address_is_this_machine_and_no_flag_takes_a_key():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert parser.parse_args(["folder"]).host == "127.0.0.1"
    flags = {flag for action in parser._actions for flag in action.option_strings if "key" in flag}
    assert flags == {"--api-key-file", "--admin-key-file", "--allow-public-without-key"}


def paths():
    return [(e.method, e.path.replace("{model:path}", "tiny").replace("{name:path}", "x"), e.access) for e in endpoints()]


def test_every_route_but_health_and_the_page_needs_a_key(locked):
    for method, path, access in [*paths(), ("GET", "/nowhere", "api"), ("POST", "/v1/nowhere", "api")]:
        body = {} if method == "POST" else None
        without = locked.client.send(method, path, body)
        wrong = locked.client.send(method, path, body, Authorization="Bearer key-on")
        if access == "open":
            assert (path, without.status) == ("/health", 200)
            continue
        assert without.status == wrong.status == 401, path
        assert b"authentication_error" in without.body
        right = locked.client.send(method, path, body, Authorization=f"Bearer {KEY if access == 'api' else ADMIN}")
        assert right.status not in (401, 403), path
    assert all(locked.client.get(path).status == 200 for path in page_files())


def test_an_api_key_does_not_open_admin_routes_and_without_an_admin_key_nothing_does(locked, tiny):
    for method, path, access in paths():
        if access == "admin":
            body = {} if method == "POST" else None
            assert locked.client.send(method, path, body, Authorization=f"Bearer {KEY}").status == 401
            refused = tiny.client.send(method, path, body)
            assert refused.status == 403
            assert "OPENLING_ADMIN_KEY" in refused.error["message"]


def test_both_header_forms_carry_a_key(locked):
    assert locked.client.get("/v1/models", x_api_key=OTHER).status == 200
    assert locked.client.get("/v1/models", Authorization=f"bearer {KEY}").status == 200
    assert locked.client.get("/v1/models", Authorization=f"Basic {KEY}").status == 401


def test_all_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    same = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or same(a, b))
    Keys((KEY, OTHER, "third")).check({"authorization": f"Bearer {KEY}"}, "api")
    assert compared == [(32, 32)] * 3  # digests of one length, and no early end


def test_keys_come_from_the_environment_or_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# comment\nfrom-file\n\nsecond\n")
    for keys in (read_keys({"OPENLING_API_KEY": "from-file,x"}, None, None), read_keys({}, file, None)):
        assert keys.required
        assert keys.check({"authorization": "Bearer from-file"}, "api").namespace
    for environment, path in (({"OPENLING_API_KEY": ""}, None), ({"OPENLING_API_KEY": "a b"}, None), ({}, tmp_path / "none")):
        with pytest.raises(UserError):
            read_keys(environment, path, None)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys({}, file, None)
    with pytest.raises(UserError, match="also an API key"):
        read_keys({"OPENLING_API_KEY": "same", "OPENLING_ADMIN_KEY": "same"}, None, None)


def test_a_server_without_a_key_answers_to_its_own_name_only():
    with live(scripted_service(says("ok")), local_only=True) as server:
        assert server.client.get("/v1/models").status == 200
        for host in ("localhost", "LOCALHOST:80", "[::1]:8000"):
            assert server.client.get("/v1/models", Host=host).status == 200
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example"):
            assert server.client.get("/v1/models", Host=host).status == 403


def test_foreign_web_pages_cannot_post(tiny):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert tiny.client.post("/v1/completions", ASK, Content_Type=kind).status == 415
    assert "access-control-allow-origin" not in tiny.client.get("/v1/models", Origin="https://evil.example").headers


def test_the_page_loads_nothing_from_elsewhere(tiny):
    policy = tiny.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


# -- bounds before work ----------------------------------------------------------------------------------------------------

SMALL = LimitsConfig(
    body_bytes=20_000,
    header_bytes=2048,
    n=3,
    prompts=3,
    choices=6,
    total_tokens=600,
    stop=2,
    stop_characters=5,
    logprobs=3,
    logit_bias=2,
)
BEYOND = [
    ({"n": 4}, "n"),
    ({"prompt": ["a"] * 4}, "prompt"),
    ({"prompt": ["a"] * 3, "n": 3}, "n"),
    ({"max_tokens": 601}, "max_tokens"),
    ({"n": 2, "max_tokens": 301}, "max_tokens"),
    ({"stop": ["a", "b", "c"]}, "stop"),
    ({"stop": "abcdef"}, "stop"),
    ({"stop": [""]}, None),
    ({"logprobs": 4}, "logprobs"),
    ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"prompt": [1, 258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a" * 1021}, "prompt"),
    ({"prompt": "a" * 19_000}, "prompt"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"cache_salt": "a" * 257}, "cache_salt"),
]


@pytest.fixture(scope="module")
def bounded():
    service = scripted_service(says("ok"))
    service.config = ServeConfig(limits=SMALL)
    with live(service) as server:
        yield server


@pytest.mark.parametrize(("change", "param"), BEYOND)
def test_what_is_beyond_a_bound_is_refused_before_the_engine_hears_of_it(bounded, change, param):
    answer = bounded.client.post("/v1/completions", ASK | change)
    assert (answer.status, answer.error["type"], answer.error["param"]) == (400, "invalid_request_error", param)
    assert bounded.service.engine.requests == []


def test_a_context_overflow_states_the_numbers(bounded):
    message = bounded.client.post("/v1/completions", ASK | {"prompt": "a" * 1021}).error["message"]
    assert all(number in message for number in ("1024", "1021", "4"))


def test_bodies_and_headers_beyond_their_bounds(bounded):
    client = bounded.client
    assert client.post("/v1/completions", b" " * 20_001).status == 413
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(client.port, head + 3 * chunk).startswith(b"HTTP/1.1 413")
    endless = head.replace(b"Transfer-Encoding: chunked", b"Content-Length: 9000000") + b" " * 100_000
    assert raw(client.port, endless).startswith(b"HTTP/1.1 413")
    long_header = b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 5000
    answer = raw(client.port, long_header)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"invalid_http"' in answer


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\\ud800"}', b'{"prompt": "a", "temperature": NaN}', b'{"a":' * 3000]
    + [b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "max_tokens": 1e400}', b'{"prompt": "a", "n": true}'],
)
def test_bodies_that_are_no_request(bounded, body):
    answer = bounded.client.post("/v1/completions", body)
    assert answer.status in (400, 415)
    assert set(answer.error) == {"message", "type", "param", "code"}


def test_the_queue_is_bounded_for_all_and_for_each_key():
    service = scripted_service(
        hangs, limits={"replies": 5, "replies_per_key": 3, "prompt_tokens": 100, "prompt_tokens_per_key": 60}
    )
    with live(service, keys=Keys((KEY, OTHER))) as server:
        mine, theirs = (Client(server.client.port, {"Authorization": f"Bearer {key}"}) for key in (KEY, OTHER))
        assert mine.post("/v1/completions", ASK | {"n": 4}).status == 400
        with Streams(mine, 3):
            refused = mine.post("/v1/completions", ASK)
            assert (refused.status, refused.error["type"], refused.headers["retry-after"]) == (429, "rate_limit_error", "1")
            assert "this key is busy" in refused.error["message"]
            with Streams(theirs, 2):
                busy = theirs.post("/v1/completions", ASK)
                assert busy.status == 429
                assert "the server is busy" in busy.error["message"]
        until(lambda: service.admission.total.replies == 0)
        with Streams(mine, 1, prompt="a" * 50):
            assert mine.post("/v1/completions", ASK | {"prompt": "a" * 20}).status == 429
    assert service.admission.total.prompt_tokens == 0


class Streams:
    """Some open streams whose clients leave at the end."""

    def __init__(self, client: Client, count: int, **changes) -> None:
        self.client, self.count, self.body = client, count, ASK | {"stream": True} | changes
        self.socks: list[socket.socket] = []

    def __enter__(self):
        for _ in range(self.count):
            sock = open_stream(self.client, self.body)
            self.socks.append(sock)
            assert b"200 OK" in sock.recv(100)
        return self

    def __exit__(self, *_):
        for sock in self.socks:
            sock.close()


def open_stream(client: Client, body: dict, *, path: str = "/v1/completions") -> socket.socket:
    data = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in client.headers.items()]
    sock = socket.create_connection(("127.0.0.1", client.port), timeout=20)
    sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
    return sock


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


def test_answers_are_counted_by_route_and_never_by_what_a_client_made_up(tiny):
    for path in ("/", "/v1/models/mine", "/v1/models/tiny", "/made-up", "/weights/made-up"):
        tiny.client.get(path)
    page = tiny.client.get("/metrics").body.decode()
    counted = {line.split('"')[1] for line in page.splitlines() if line.startswith("openling_requests_total")}
    assert {"/", "/v1/models/*", "other", "/weights/*"} <= counted
    assert "made-up" not in page and "mine" not in page
    assert "_created" not in page


def test_a_route_with_few_fields_names_them_all(tiny):
    for field in ("text", "content"):
        assert "takes add_special_tokens" in tiny.client.post("/tokenize", {field: "x"}).error["message"]
    assert "did you mean 'prompt'" in tiny.client.post("/tokenize", {"promt": "x"}).error["message"]


def test_request_ids_come_back(tiny):
    assert tiny.client.get("/health", X_Request_Id="mine-1").headers["x-request-id"] == "mine-1"
    for bad in ("a" * 200, "a b", "x\ty"):
        assert tiny.client.get("/health", X_Request_Id=bad).headers["x-request-id"].startswith("req-")


# -- caches, stopping ------------------------------------------------------------------------------------------------------


def test_keys_and_salts_do_not_share_a_cache():
    service = scripted_service(says("ok"))
    with live(service, keys=Keys((KEY, OTHER))) as server:
        for key, salt in ((KEY, None), (KEY, None), (OTHER, None), (KEY, "s"), (OTHER, "s")):
            body = ASK | ({"cache_salt": salt} if salt else {})
            assert server.client.post("/v1/completions", body, Authorization=f"Bearer {key}").status == 200
        spaces = [request.namespace for request in service.engine.requests]
        assert spaces[0] == spaces[1]
        assert len(set(spaces)) == 4
        assert not any(key in space for key in (KEY, OTHER) for space in spaces)


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


def test_a_schema_that_fails_while_the_reply_is_made_is_the_requests_fault():
    from openling.serve.merged import _failed
    from openling.serve.types import Grammar, Request, SamplingParams

    request = Request("r", (1,), SamplingParams(grammar=Grammar("json_object")))
    error = _failed(request, Output("r", finish_reason="error", error="too complex\nNoExtensionBias"))
    assert (error.status, error.code, "NoExtensionBias" in error.message) == (400, "invalid_grammar", False)


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
