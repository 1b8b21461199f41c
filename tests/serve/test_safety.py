"""The safety list: who may ask for what, bounds before work, what answers and caches give away."""

import argparse
import hmac

import pytest
from live_server import ASK, Client, Streams, live, raw, until
from scripted_engine import hangs, says, scripted_service

from openling.commands import serve as command
from openling.config.serve import LimitsConfig, ServeConfig
from openling.errors import UserError
from openling.serve.auth import Keys, check_binding, read_keys
from openling.serve.server import endpoints
from openling.serve.web import page_files

KEY, OTHER, ADMIN = "key-one", "key-two", "admin-key"


@pytest.fixture(scope="module")
def locked():
    with live(scripted_service(says("ok")), keys=Keys((KEY, OTHER), (ADMIN,))) as server:
        yield server


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


# -- what an answer gives away ---------------------------------------------------------------------------------------------


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
