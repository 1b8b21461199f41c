"""Clients that leave at any moment or speak nonsense: nothing stays taken, nothing is answered 500.

The large version, with 10,000 of them and 1,000 streams at once, is `python benchmarks/serving_load.py`.
"""

import json
import random
import socket
import threading

from live_server import live, until

from openling.config.serve import LimitsConfig, ServeConfig

ABUSES = 1000
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
THREADS = 8


def body_of(rng: random.Random) -> bytes:
    ask = {
        "prompt": "x" * rng.randrange(1, 150),
        "max_tokens": rng.randrange(1, 60),
        "ignore_eos": True,
        "n": rng.randrange(1, 4),
    }
    ask["stream"] = rng.random() < 0.7
    return json.dumps(ask).encode()


def broken(rng: random.Random) -> bytes:
    raw = bytearray(body_of(rng))
    for _ in range(rng.randrange(1, 6)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


def abuse(rng: random.Random, port: int) -> bytes:
    """One client; the status line that it saw, if any."""
    kind = rng.choice(["leaves", "leaves", "half", "broken", "garbage"])
    body = broken(rng) if kind == "broken" else body_of(rng)
    whole = rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n" if kind == "garbage" else HEAD % len(body) + body
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        sock.sendall(whole[: rng.randrange(1, len(whole))] if kind == "half" else whole)
        if kind == "half" or (kind == "leaves" and rng.random() < 0.5):
            sock.settimeout(rng.random() * 0.02)
        try:
            return sock.recv(15 if rng.random() < 0.5 else 100_000)[:15]
        except (TimeoutError, ConnectionResetError):
            return b""


def test_a_thousand_rude_clients_leave_nothing_behind():
    config = ServeConfig(model_id="tiny", limits=LimitsConfig(replies=64))
    with live(config=config, max_running=8, pages=256, slots=40) as server:
        seen: list[bytes] = []

        def some(number: int) -> None:
            rng = random.Random(number)
            for _ in range(ABUSES // THREADS):
                seen.append(abuse(rng, server.client.port))

        threads = [threading.Thread(target=some, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()
        statuses = {line.partition(b" ")[2][:3] for line in seen if line.startswith(b"HTTP/1.1 ")}
        assert len(seen) == ABUSES
        assert {b"200", b"400"} <= statuses <= {b"200", b"400", b"415", b"429"}
        until(lambda: server.service.admission.total.replies == 0)
        until(lambda: server.stats().running + server.stats().waiting == 0)
        server.call(server.service.engine.call(lambda engine: (engine.flush_cache(), engine.check_integrity())))
        stats = server.stats()
        assert (stats.pages_free, stats.slots_free) == (stats.pages_total, stats.slots_total)
        assert server.service.active == {}
        answer = server.client.post("/v1/completions", {"prompt": "ab", "max_tokens": 3, "ignore_eos": True})
        assert answer.json["usage"]["completion_tokens"] == 3
