"""A real server over a tiny random model, on loopback in a thread of its own, a plain client for it, and one that leaves."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tiny_engine
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openling.config.serve import ServeConfig
from openling.model.ling import Ling
from openling.serve.auth import Keys
from openling.serve.engine_config import EngineConfig
from openling.serve.server import Server, bind, build_app
from openling.serve.service import Service
from openling.serve.start import build_service
from openling.weights.folder import Loaded

TEMPLATE = (
    "{% for m in messages %}<role>{{ m.role }}</role>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}</tool_call>{% endfor %}<|role_end|>{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|role_end|>"]
ASK = {"prompt": "ab", "max_tokens": 4}


def byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, then two that end replies."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|role_end|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def tiny_loaded(seed: int = 0, **changes) -> Loaded:
    config = tiny_engine.BASE.replace(vocab_size=258, eos_token_id=256, **changes)
    model = Ling(config).to(torch.float32)
    model.init_weights(torch.Generator().manual_seed(seed))
    return Loaded(model.eval(), config, byte_tokenizer(), Path("tiny"), {})


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.json["error"]

    @property
    def events(self) -> list:
        """The data of every event of a stream, decoded; `[DONE]` stays a string."""
        found = []
        for block in self.body.decode().split("\n\n"):
            lines = [line[6:] for line in block.split("\n") if line.startswith("data: ")]
            found += [line if line == "[DONE]" else json.loads(line) for line in lines]
        return found


@dataclass
class Client:
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def send(self, method: str, path: str, body=None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        given = ({"Content-Type": "application/json"} if raw is not None else {}) | self.headers
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, raw, given)
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, **headers)

    def post(self, path: str, body, **headers: str) -> Reply:
        return self.send("POST", path, body, **headers)


@dataclass
class Live:
    service: Service
    client: Client
    loop: asyncio.AbstractEventLoop
    server: Server
    stop: asyncio.Event
    thread: threading.Thread

    def call(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def stats(self):
        return self.call(self.service.stats())

    def shut_down(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def live(service: Service | None = None, *, keys: Keys | None = None, local_only: bool = False, config=None, **engine):
    """A running server. Without `service`: a tiny model, whose engine's books must be in order at the end."""
    if service is None:
        sizes = {"max_running": 8, "step_tokens": 256, "pages": 96, "slots": 24} | engine
        service = build_service(tiny_loaded(), EngineConfig(**sizes), config or ServeConfig(model_id="tiny"))
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    up = threading.Event()
    box: list[Live] = []

    async def main() -> None:
        server = Server(service, build_app(service, keys or Keys(), local_only=local_only), [sock])
        stop = asyncio.Event()
        service.engine.start()
        box.append(Live(service, Client(port), asyncio.get_running_loop(), server, stop, threading.current_thread()))
        running = asyncio.create_task(server.run(stop))
        while not server.uvicorn.started and not running.done():
            await asyncio.sleep(0.005)
        up.set()
        await running

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server", daemon=True)
    thread.start()
    assert up.wait(60)
    try:
        yield box[0]
    finally:
        if thread.is_alive():
            box[0].shut_down()


def until(condition, seconds=10.0):
    """Wait for it; an AssertionError where it does not happen in time."""
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
