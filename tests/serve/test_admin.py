"""What trainers use: exact tokens with log-probabilities, pauses, weights exchanged under running replies, memory."""

import json
import threading
import time

import pytest
import torch
from live_server import Client, live, open_stream, tiny_loaded, until
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from openling.config.serve import ServeConfig, TimeoutsConfig
from openling.serve import admin_routes, control
from openling.serve.auth import Keys
from openling.weights.export import save

ADMIN = "admin-key"
PROMPT = [1, 2, 3, 4, 5]
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


@pytest.fixture
def server():
    with live(keys=Keys((), (ADMIN,))) as running:
        running.client.headers["Authorization"] = f"Bearer {ADMIN}"
        yield running


def ask(client: Client, path: str, body=None):
    answer = client.post(path, body or {})
    assert answer.status == 200, answer.body
    return answer.json


def generate(client, **changes):
    params = GREEDY | changes.pop("sampling_params", {})
    return ask(client, "/generate", {"prompt_token_ids": PROMPT, "sampling_params": params} | changes)


def test_tokens_in_tokens_out(server):
    reply = generate(server.client, return_logprob=True, top_logprobs=2, prompt_logprobs=True)
    assert len(reply["token_ids"]) == len(reply["logprobs"]) == len(reply["top_logprobs"]) == 6
    assert reply["segments"] == [{"weight_version": "0", "start": 0, "end": 6}]
    assert (reply["finish_reason"], reply["usage"]["prompt_tokens"]) == ("length", 5)
    model = server.service.engine.engine.model
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + reply["token_ids"]]))[0].log_softmax(-1)
    # FP32 over 258 tokens; batch shapes differ, so sums are ordered differently.
    for i, (token, logprob) in enumerate(zip(reply["token_ids"], reply["logprobs"], strict=True)):
        assert logprob == pytest.approx(float(logits[4 + i, token]), abs=1e-4)
        assert reply["top_logprobs"][i][0][0] == token
    assert reply["prompt_logprobs"][0] is None
    for i in range(1, 5):
        assert reply["prompt_logprobs"][i] == pytest.approx(float(logits[i - 1, PROMPT[i]]), abs=1e-4)


def test_sglangs_names_mean_the_same(server):
    ours = generate(server.client, return_logprob=True)
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        "return_logprob": True,
    }
    theirs = ask(server.client, "/generate", body)
    assert theirs["output_ids"] == ours["token_ids"]
    meta = theirs["meta_info"]
    assert [[value, id] for value, id, _ in meta["output_token_logprobs"]] == [
        [value, id] for value, id in zip(ours["logprobs"], ours["token_ids"], strict=True)
    ]
    assert (meta["finish_reason"]["type"], meta["weight_version"]) == ("length", "0")


def test_n_replies_are_a_list_and_seeds_repeat(server):
    params = {"temperature": 1.0, "n": 3, "seed": 5}
    first, again = (generate(server.client, sampling_params=params) for _ in range(2))
    assert [reply["token_ids"] for reply in first] == [reply["token_ids"] for reply in again]
    assert len({tuple(reply["token_ids"]) for reply in first}) == 3


@pytest.mark.parametrize("n", [None, 2])
def test_generate_streams_the_reply_so_far_or_what_is_new(server, n):
    body = {"return_logprob": True, "top_logprobs": 1, "prompt_logprobs": True}
    params = {"temperature": 1.0, "seed": 3, "n": n}
    whole = generate(server.client, sampling_params=params, **body)
    for index, reply in enumerate(whole if n else [whole]):
        changing = ("id", "cached_tokens")  # the whole answer was computed first and cached
        grown = [event for event in streamed(server, params, body) if event["index"] == index]
        assert [len(event["token_ids"]) for event in grown] == sorted({len(event["token_ids"]) for event in grown})
        assert len(grown) > 3 and grown[0]["meta_info"]["finish_reason"] is None
        last = grown[-1]
        for holder in (reply, last):
            for name in changing:
                holder["meta_info"].pop(name, None)
                holder["usage"].pop(name, None)
        assert close(last, reply)
        parts = [event for event in streamed(server, params, body | {"incremental": True}) if event["index"] == index]
        for name in ("token_ids", "output_ids", "logprobs", "top_logprobs"):
            assert close(sum((part.get(name, []) for part in parts), []), reply[name])
        assert "".join(part["text"] for part in parts) == reply["text"]
        assert [part["segments"][0]["start"] for part in parts] == [i for i, _ in enumerate(parts)]
        assert [part["usage"]["completion_tokens"] for part in parts] == [i + 1 for i, _ in enumerate(parts)]
        assert ["prompt_logprobs" in part for part in parts] == [True] + [False] * (len(parts) - 1)


def streamed(server, params, body):
    body = {"prompt_token_ids": PROMPT, "sampling_params": GREEDY | params, "stream": True} | body
    *events, done = server.client.post("/generate", body).events
    assert done == "[DONE]"
    return events


def close(one, other):
    """The same, numbers to 1e-4: which requests share a step decides how sums are ordered."""
    if isinstance(one, dict):
        return one.keys() - {"index"} == other.keys() and all(close(one[name], other[name]) for name in other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else one == other


def test_a_client_that_leaves_a_stream_of_tokens_frees_its_slot(server):
    body = long_body() | {"stream": True, "rid": "leaving"}
    sock = open_stream(server.client, body, path="/generate")
    until(lambda: server.stats().generated_tokens > 2)
    sock.close()
    until(lambda: server.stats().running == 0 and not server.service.active)


class Asking(threading.Thread):
    """A request that is under way."""

    def __init__(self, client: Client, path: str, body: dict) -> None:
        super().__init__(daemon=True)
        self.client, self.path, self.body = client, path, body
        self.start()

    def run(self) -> None:
        self.answer = self.client.post(self.path, self.body)

    @property
    def reply(self) -> dict:
        self.join(30)
        assert self.answer.status == 200, self.answer.body
        return self.answer.json


def long_generate(server, **changes) -> Asking:
    params = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}
    asking = Asking(server.client, "/generate", {"prompt_token_ids": PROMPT, "sampling_params": params} | changes)
    until(lambda: server.stats().generated_tokens > 2)
    return asking


def test_a_pause_keeps_what_runs(server):
    whole = generate(server.client, sampling_params={"max_tokens": 400})["token_ids"]
    before = server.stats().generated_tokens
    asking = Asking(server.client, "/generate", long_body())
    until(lambda: server.stats().generated_tokens > before + 2)
    assert ask(server.client, "/pause_generation", {"mode": "in_place"})["paused"] == 1
    assert (server.client.get("/ready").status, server.client.get("/health").status) == (503, 200)
    held = server.stats().generated_tokens
    assert server.stats().generated_tokens == held
    assert asking.is_alive()
    assert ask(server.client, "/continue_generation")["paused"] == 0
    assert server.client.get("/ready").status == 200
    assert asking.reply["token_ids"] == whole


def long_body():
    return {"prompt_token_ids": PROMPT, "sampling_params": {"temperature": 0, "max_tokens": 400, "ignore_eos": True}}


def test_a_pause_that_aborts_gives_what_there_is(server):
    asking = long_generate(server)
    ask(server.client, "/pause", {"mode": "abort"})
    assert asking.reply["finish_reason"] == "abort"
    assert 0 < len(asking.reply["token_ids"]) < 400
    ask(server.client, "/resume")
    assert len(generate(server.client)["token_ids"]) == 6


@pytest.mark.parametrize("name", ["rid", "header"])
def test_one_call_is_aborted_by_its_name(server, name):
    other = Client(server.client.port, dict(server.client.headers))
    if name == "header":
        other.headers["X-Request-Id"] = "mine"
    asking = Asking(other, "/generate", long_body() | ({"rid": "mine"} if name == "rid" else {}))
    until(lambda: "mine" in server.service.active and server.stats().generated_tokens > 2)
    assert ask(server.client, "/abort_request", {"rid": "another"}) == {"aborted": 0}
    assert ask(server.client, "/abort", {"request_id": "mine"}) == {"aborted": 1}
    assert asking.reply["finish_reason"] == "abort"
    until(lambda: server.stats().running == 0)
    assert server.service.active == {}


def test_weights_from_a_folder_change_the_rest_of_a_running_reply(server, tmp_path):
    new = tiny_loaded(seed=1)
    save(new.model, tmp_path / "new")
    asking = long_generate(server)
    ask(server.client, "/pause")
    answer = ask(server.client, "/update_weights_from_disk", {"model_path": str(tmp_path / "new"), "weight_version": "step-1"})
    assert answer["success"]
    ask(server.client, "/resume")
    first, second = asking.reply["segments"]
    assert (first["weight_version"], second["weight_version"]) == ("0", "step-1")
    assert (first["start"], first["end"], second["end"]) == (0, second["start"], 400)
    assert server.client.get("/v1/models").json["data"][0]["weight_version"] == "step-1"
    assert server.client.get("/weights/checksum").json == {"sha256": control.checksum(new.model), "weight_version": "step-1"}
    with live_of(new) as fresh:
        assert generate(server.client)["token_ids"] == generate(fresh.client)["token_ids"]
    server.call(server.service.engine.call(lambda engine: engine.check_integrity()))


def live_of(loaded):
    from openling.config.serve import ServeConfig
    from openling.serve.engine_config import EngineConfig
    from openling.serve.start import build_service

    service = build_service(loaded, EngineConfig(max_running=8, step_tokens=256, pages=96, slots=24), ServeConfig())

    class _Open:
        def __enter__(self):
            self.manager = live(service, keys=Keys((), (ADMIN,)))
            running = self.manager.__enter__()
            running.client.headers["Authorization"] = f"Bearer {ADMIN}"
            return running

        def __exit__(self, *error):
            return self.manager.__exit__(*error)

    return _Open()


def pieces_of(loaded):
    weights = control.weights(loaded.model)
    names = sorted(weights)
    half = len(names) // 2
    hashes = {name: control.tensor_hash(weights[name]) for name in names}
    return [save_tensors({n: weights[n].contiguous() for n in part}) for part in (names[:half], names[half:])], hashes


def upload(client, raw):
    return client.send("POST", "/update_weights/stream", raw, Content_Type="application/octet-stream")


def test_weights_in_pieces_are_used_all_at_once(server):
    client, new = server.client, tiny_loaded(seed=2)
    pieces, hashes = pieces_of(new)
    before = client.get("/weights/checksum").json["sha256"]
    assert upload(client, pieces[0]).status == 409
    ask(client, "/update_weights/begin", {"version": "2"})
    assert upload(client, pieces[0]).status == 200
    missing = client.post("/update_weights/commit", {"hashes": hashes})
    assert (missing.status, "have not arrived" in missing.error["message"]) == (400, True)
    assert upload(client, pieces[1]).status == 200
    damaged = client.post("/update_weights/commit", {"hashes": hashes | {"lm_head.weight": "0" * 64}})
    assert (damaged.status, "lm_head.weight" in damaged.error["message"]) == (400, True)
    assert client.get("/weights/checksum").json == {"sha256": before, "weight_version": "0"}
    ask(client, "/update_weights/commit", {"hashes": hashes})
    assert client.get("/weights/checksum").json == {"sha256": control.checksum(new.model), "weight_version": "2"}
    assert client.post("/update_weights/commit", {"hashes": hashes}).status == 409


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"nonsense": torch.zeros(2)}, "no weight"),
        ({"lm_head.weigth": torch.zeros(2)}, "nearest are lm_head.weight"),
        ({"lm_head.weight": torch.zeros(2)}, "expected"),
        ({"lm_head.weight": torch.zeros(258, 32, dtype=torch.float16)}, "expected"),
    ],
)
def test_weights_that_do_not_fit_are_refused_as_they_arrive(server, tensors, says):
    ask(server.client, "/update_weights/begin", {"version": "2"})
    answer = upload(server.client, save_tensors(tensors))
    assert (answer.status, says in answer.error["message"]) == (400, True)


def test_bytes_that_are_no_weights(server):
    ask(server.client, "/update_weights/begin", {"version": "2"})
    assert upload(server.client, b"\x80\x04pickle").status == 400
    assert server.client.post("/update_weights/stream", {}).status == 415
    for path in ("/nowhere", "0" * 4000, "a\0b"):
        answer = server.client.post("/update_weights", {"path": path, "version": "1"})
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


def test_weights_are_read_for_one_update_at_a_time(server, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(admin_routes, "load", lambda path, dtype: go.wait(20) and tiny_loaded(seed=3))
    first = Asking(server.client, "/update_weights", {"path": "somewhere", "version": "a"})
    until(lambda: server.service.reading)
    answer = server.client.post("/update_weights", {"path": "elsewhere", "version": "b"})
    assert (answer.status, answer.error["code"]) == (409, "update_under_way")
    go.set()
    assert first.reply["weight_version"] == "a"
    assert not server.service.reading


@pytest.mark.parametrize("version", ["", "a\nb", "a\0", "x" * 129])
def test_a_version_is_one_line_of_text(server, version):
    assert server.client.post("/update_weights/begin", {"version": version}).status == 400
    assert server.client.post("/update_weights", {"path": "somewhere", "version": version}).status == 400


def test_sampling_that_only_the_whole_shows_to_be_wrong_is_refused(server):
    answer = server.client.post("/generate", {"prompt_token_ids": PROMPT, "sampling_params": {"stop": [""]}})
    assert (answer.status, "stop string" in answer.error["message"]) == (400, True)


def test_one_weight_can_be_read(server):
    answer = server.client.get("/weights/lm_head.weight")
    (tensor,) = load_tensors(answer.body).values()
    assert torch.equal(tensor, server.service.engine.engine.model.lm_head.weight)
    assert answer.headers["x-sha256"] == control.tensor_hash(tensor)
    assert "lm_head.weight" in server.client.get("/weights/lm_head.weigh").error["message"]


def test_a_paused_reply_outlives_its_deadline():
    config = ServeConfig(model_id="tiny", timeouts=TimeoutsConfig(reply=1.0))
    with live(keys=Keys((), (ADMIN,)), config=config) as server:
        server.client.headers["Authorization"] = f"Bearer {ADMIN}"
        ask(server.client, "/pause")
        asking = Asking(server.client, "/generate", {"prompt_token_ids": PROMPT, "sampling_params": GREEDY})
        time.sleep(1.5)
        assert asking.is_alive()
        ask(server.client, "/resume")
        assert len(asking.reply["token_ids"]) == 6


def test_memory_is_released_and_taken_back(server):
    before = generate(server.client)["token_ids"]
    ask(server.client, "/release_memory_occupation")
    assert server.client.post("/resume", {}).status == 400
    ask(server.client, "/resume_memory_occupation")
    ask(server.client, "/resume")
    assert generate(server.client)["token_ids"] == before


def test_a_flush_forgets_prefixes(server):
    body = {"prompt_token_ids": list(range(200)), "sampling_params": {"temperature": 0, "max_tokens": 2}}
    ask(server.client, "/generate", body)
    assert ask(server.client, "/generate", body)["usage"]["cached_tokens"] > 0
    assert server.client.get("/flush_cache").status == 200
    assert ask(server.client, "/generate", body)["usage"]["cached_tokens"] == 0


def test_streams_end_when_everything_is_aborted(server):
    sock = open_stream(server.client, {"prompt": "ab", "max_tokens": 900, "ignore_eos": True, "stream": True})
    until(lambda: server.stats().running == 1)
    assert ask(server.client, "/abort", {"abort_all": True}) == {"aborted": 1}
    found = b""
    while b"[DONE]" not in found:
        found += sock.recv(65536)
    events = [json.loads(line[6:]) for line in found.decode().split("\r\n") if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "abort"
    sock.close()
