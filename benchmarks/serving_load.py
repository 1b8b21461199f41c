"""The server's goals under load on a CPU: `python benchmarks/serving_load.py [--json PATH]`.

Starts `openling serve` on a random nano hybrid, then: 1,000 concurrent streams; 10,000 clients that leave or speak nonsense;
SIGTERM. Nothing may fail, no slot may stay taken, the server's memory must stay flat, and it must still answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from openling import environment
from openling.bench.nano import write_nano
from openling.bench.serving import Load, lines, run_load, summarise
from openling.bench.stream_client import HttpError, Server, request, stream

ADMIN_KEY = "load-test-admin-key"
FLAT_MIB = 24  # one arena of the allocator, not a leak of 4 KiB per client


def main() -> int:
    """Run all phases; exit code 1 if a goal was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--abuses", type=int, default=10_000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/serving/load.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(write_nano(Path(scratch) / "nano"), args.streams, args.abuses)
    environment.write_results(args.json, shlex.join(["python", *sys.argv]), rows)
    for row in rows:
        met = {True: "met", False: "MISSED", None: ""}[row.get("met")]
        print(f"{row['name']:<52} {row['value']:>14,.2f} {row['unit']:<10} {row.get('goal') or '':<8} {met}")
    return 0 if all(row.get("met") is not False for row in rows) else 1


def measure(model: Path, streams: int, abuses: int) -> list[dict[str, Any]]:
    """Rows of the results file."""
    port = free_port()
    begun = time.perf_counter()
    log = model.parent / "server.log"
    command = [sys.executable, "-m", "openling.cli", "serve", str(model), "--port", str(port), "--max-running", "64"]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | {"OPENLING_ADMIN_KEY": ADMIN_KEY})
    try:
        server = Server("127.0.0.1", port, "", False)
        asyncio.run(until_up(server, process))
        rows = [goal("server up, nano on CPU", time.perf_counter() - begun, "s", "< 10", lambda value: value < 10)]
        rows += asyncio.run(load_phase(server, streams))
        rows += asyncio.run(abuse_phase(server, psutil.Process(process.pid), abuses))
        process.send_signal(signal.SIGTERM)
        begun = time.perf_counter()
        code = process.wait(60)
        rows.append(goal("exit code after SIGTERM", code, "", "0", lambda value: value == 0))
        rows.append({"name": "SIGTERM to exit, idle", "value": time.perf_counter() - begun, "unit": "s"})
        return rows
    except BaseException:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
        raise
    finally:
        process.kill()
        process.wait()


def goal(name: str, value: float, unit: str, text: str, met: Callable[[float], bool]) -> dict[str, Any]:
    """A row with a goal."""
    return {"name": name, "value": value, "unit": unit, "goal": text, "met": met(value)}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until_up(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Wait until /health answers."""
    for _ in range(1200):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            await request(server, "GET", "/ready")
            return
        except (OSError, HttpError, ValueError):
            await asyncio.sleep(0.05)
    raise RuntimeError("the server did not come up within a minute")


async def gauges(server: Server) -> dict[str, float]:
    """The engine's figures in /metrics."""
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(server.host, server.port)
        writer.write(server.head("GET", "/metrics", 0))
        text = (await reader.read(-1)).decode()
        writer.close()
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("openling_") and "{" not in name:
            found[name.removeprefix("openling_")] = float(value)
    return found


async def idle(server: Server, seconds: float = 30) -> dict[str, float]:
    """The engine's figures once nothing runs or waits any more, the cache emptied."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        now = await gauges(server)
        if now["running"] == now["waiting"] == 0:
            break
        await asyncio.sleep(0.05)
    admin = Server(server.host, server.port, server.prefix, server.tls, ADMIN_KEY)
    await request(admin, "POST", "/flush_cache", {})
    return await gauges(server)


def leaks(name: str, now: dict[str, float]) -> list[dict[str, Any]]:
    """Rows: what is still taken when nobody is there."""
    taken = {"state slots": now["slots_total"] - now["slots_free"], "cache pages": now["pages_total"] - now["pages_free"]}
    taken |= {"replies": now["running"] + now["waiting"]}
    return [goal(f"{what} left taken after {name}", value, "", "0", lambda value: value == 0) for what, value in taken.items()]


async def load_phase(server: Server, streams: int) -> list[dict[str, Any]]:
    """All streams at once."""
    await run_load(server, Load(requests=8, input_len=16, output_len=8))
    replies, seconds = await run_load(server, Load(requests=streams, input_len=32, output_len=32))
    rows = summarise(replies, seconds)
    print("\n".join(lines(rows)), flush=True)
    for error, count in Counter(reply.error for reply in replies if reply.error).items():
        print(f"failed {count} times: {error}", flush=True)
    short = sum(reply.output_tokens != 32 for reply in replies if reply.error is None)
    rows.append(goal("replies of another length than asked", short, "requests", "0", lambda value: value == 0))
    for row in rows:
        row["name"] = f"{streams} streams: {row['name']}"
    return rows + leaks("the streams", await idle(server))


# ---------------------------------------------------------------------------------------------------------------------
# Clients that leave or speak nonsense
# ---------------------------------------------------------------------------------------------------------------------


def chat(**changes: Any) -> bytes:
    """A chat request that would be answered for long."""
    body = {"messages": [{"role": "user", "content": "hello " * 8}], "max_tokens": 400, "ignore_eos": True, "stream": True}
    return json.dumps(body | changes).encode()


def post(server: Server, body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """A whole request."""
    return server.head("POST", path, len(body)) + body


def nonsense(rng: random.Random, server: Server) -> bytes:
    """Bytes that must be refused, or understood, but never break anything."""
    wrong: list[Any] = [None, True, -1, 1e400, 2**70, "x", [], {}, [[]], "\ud800", "a" * 5000]
    field = rng.choice(("messages", "model", "max_tokens", "n", "stop", "tools", "seed", "top_p", "logit_bias"))
    ids = [rng.randrange(-5, 500) for _ in range(9)]
    schema: dict[str, Any] = {}
    for _ in range(rng.randrange(1, 400)):
        schema = {"type": "array", "items": schema}
    options: list[Callable[[], bytes]] = [
        lambda: post(server, chat(**{field: rng.choice(wrong)})),
        lambda: post(server, chat()[: rng.randrange(60)]),
        lambda: post(server, rng.randbytes(rng.randrange(400))),
        lambda: post(server, b"[" * rng.randrange(1, 5000)),
        lambda: post(server, chat(response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})),
        lambda: post(server, json.dumps({"prompt": ids, "max_tokens": 2}).encode(), "/v1/completions"),
        lambda: post(server, chat(), "/" + rng.randbytes(8).hex()),
        lambda: rng.randbytes(rng.randrange(1, 300)) + b"\r\n\r\n",
        lambda: b"GET / HTTP/9.9\r\n\r\n",
        lambda: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        lambda: b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}",
        lambda: b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * rng.randrange(1, 4000) + b"\r\n",
    ]
    return rng.choice(options)()


async def abuse(rng: random.Random, server: Server) -> str:
    """One client; returns what became of it: a status, or how it left."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    try:
        kind = rng.choice(["nonsense", "nonsense", "half", "at once", "mid-stream", "mid-stream"])
        if kind == "nonsense":
            writer.write(nonsense(rng, server))
            await writer.drain()
            return (await reader.readline()).decode("latin-1").strip()[:40] or "closed"
        options = {"max_tokens": rng.randrange(1, 2000), "stream": rng.random() < 0.8}
        completion = json.dumps({"prompt": "hello", "ignore_eos": True} | options).encode()
        whole = rng.choice((post(server, chat(**options)), post(server, completion, "/v1/completions")))
        writer.write(whole[: rng.randrange(len(whole))] if kind == "half" else whole)
        await writer.drain()
        if kind == "mid-stream":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() / 2):
                    while await reader.readline():
                        pass
        return kind
    except ConnectionError:
        return "closed"
    finally:
        writer.transport.abort() if rng.random() < 0.5 else writer.close()


async def abuse_phase(server: Server, process: psutil.Process, abuses: int) -> list[dict[str, Any]]:
    """Many abusers, 64 at a time. Memory is compared between a fifth of the way, when every path has been walked, and the end."""
    rng = random.Random(0)
    room = asyncio.Semaphore(64)
    seen: Counter[str] = Counter()

    async def one() -> None:
        async with room:
            try:
                async with asyncio.timeout(60):
                    seen[await abuse(rng, server)] += 1
            except TimeoutError:
                seen["no answer within a minute"] += 1

    async def batch(count: int) -> float:
        await asyncio.gather(*(one() for _ in range(count)))
        await idle(server)
        return process.memory_info().rss / 2**20

    begun = time.perf_counter()
    early = await batch(abuses // 5)
    late = await batch(abuses - abuses // 5)
    print(f"{abuses} abuses in {time.perf_counter() - begun:.0f} s: {dict(seen.most_common())}", flush=True)
    broken = sum(count for what, count in seen.items() if what.startswith("HTTP/1.1 5") and " 503" not in what)
    rows = [
        goal("abuses answered 500", broken, "requests", "0", lambda value: value == 0),
        goal("abuses without an answer", seen["no answer within a minute"], "requests", "0", lambda value: value == 0),
        {"name": "server memory after a fifth of the abuses", "value": early, "unit": "MiB"},
        goal("growth of it until the end", late - early, "MiB", f"< {FLAT_MIB}", lambda value: value < FLAT_MIB),
    ]
    tokens = 0
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "ignore_eos": True, "stream": True}
    async for _, chunk in stream(server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}):
        tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    rows.append(goal("tokens of a reply afterwards", tokens, "tokens", "8", lambda value: value == 8))
    return rows + leaks("the abuses", await idle(server))


if __name__ == "__main__":
    sys.exit(main())
