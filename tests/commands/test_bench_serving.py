"""`openling bench serving` against a scripted server whose times are known, and its formulas on made-up arrivals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from openling.bench.serving import Load, Reply, lines, percentile, run_load, summarise
from openling.bench.stream_client import HttpError, Server, parse_server, request, stream
from openling.cli import main
from openling.errors import Failure, UserError


def event(tokens: int, prompt: int = 5, cached: int = 2) -> bytes:
    usage = {"completion_tokens": tokens, "prompt_tokens": prompt, "prompt_tokens_details": {"cached_tokens": cached}}
    return b"data: " + json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode() + b"\n\n"


def chunked(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


class Scripted:
    """Answers as told; counts how many requests were open at once."""

    def __init__(self, reply: Callable[[asyncio.StreamWriter], object] | None = None) -> None:
        self.reply = reply or self.three_tokens
        self.bodies: list[dict[str, object]] = []
        self.open = self.most = 0

    async def three_tokens(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for tokens in (1, 2, 3):
            await asyncio.sleep(0.02)
            whole = chunked(event(tokens))
            writer.write(whole[:9])  # a chunk may come in two packets
            await writer.drain()
            writer.write(whole[9:])
        writer.write(chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        found = [line for line in head.split("\r\n") if line.lower().startswith("content-length")]
        body = await reader.readexactly(int(found[0].split(":")[1])) if found else b""
        path = head.split()[1]
        if path.endswith("/v1/completions"):
            self.bodies.append(json.loads(body))
            self.open += 1
            self.most = max(self.most, self.open)
            await self.reply(writer)
            self.open -= 1
        else:
            answer = {"data": [{"id": "nano"}]} if path.endswith("models") else {"tokens": [7, 8, 9]}
            text = json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def serving(scripted: Scripted) -> AsyncIterator[Server]:
    server = await asyncio.start_server(scripted.handle, "127.0.0.1", 0)
    async with server:
        yield parse_server(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/base/v1")


def test_formulas() -> None:
    replies = [
        Reply([1.0, 1.5, 3.0], prompt_tokens=10, cached_tokens=4, output_tokens=5),
        Reply([2.0], prompt_tokens=10, output_tokens=1),
        Reply(error="500: broken"),
    ]
    rows = {row["name"]: row for row in summarise(replies, 4.0)}
    assert rows["requests failed"]["value"] == 1
    assert rows["requests failed"]["met"] is False
    assert rows["output rate"]["value"] == 6 / 4
    assert rows["input and output rate"]["value"] == 26 / 4
    assert rows["mean concurrency"]["value"] == 5 / 4
    assert rows["TTFT mean"]["value"] == 1500
    assert rows["TPOT mean"]["value"] == 500  # (3 - 1) / (5 - 1); one token has no TPOT
    assert rows["ITL p50"]["value"] == 1000  # gaps 0.5 and 1.5
    assert rows["E2E p99"]["value"] == pytest.approx(2990)
    assert lines(list(rows.values()))[-1].startswith("E2E")


def test_percentiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).normal(size=37))
    for percent in (0, 1, 50, 90, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-12)


def test_a_run() -> None:
    scripted = Scripted()

    async def go() -> tuple[list[Reply], float]:
        async with serving(scripted) as server:
            return await run_load(server, Load(requests=6, concurrency=2, input_len=4, shared_prefix=3, output_len=3))

    replies, seconds = asyncio.run(go())
    assert [reply.error for reply in replies] == [None] * 6
    assert [(r.output_tokens, r.prompt_tokens, r.cached_tokens, len(r.arrivals)) for r in replies] == [(3, 5, 2, 3)] * 6
    assert scripted.most == 2
    assert seconds >= 3 * 0.06  # three turns of two
    assert min(reply.ttft for reply in replies) >= 0.02
    assert all(min(reply.gaps) >= 0.015 for reply in replies)
    prompts = [body["prompt"] for body in scripted.bodies]
    assert {len(prompt) for prompt in prompts} == {7}
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) > 1


async def no_room(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nbusy")


async def breaks_off(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(event(1)) + b"ff\r\ndata:")


async def no_done(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + event(1))


async def says_error(writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "gone"}}\n\n')


@pytest.mark.parametrize(
    ("reply", "error"), [(no_room, "429: busy"), (breaks_off, "broke off"), (no_done, "without"), (says_error, "gone")]
)
def test_failures_are_counted(reply: Callable[[asyncio.StreamWriter], object], error: str) -> None:
    async def go() -> list[Reply]:
        async with serving(Scripted(reply)) as server:
            return (await run_load(server, Load(requests=2, input_len=1)))[0]

    assert [error in (reply.error or "") for reply in asyncio.run(go())] == [True, True]


def test_no_server_is_a_failure() -> None:
    with pytest.raises(Failure, match="cannot be asked"):
        asyncio.run(run_load(parse_server("http://127.0.0.1:1"), Load(requests=1)))


def test_an_error_answer_is_raised() -> None:
    async def go() -> None:
        async with serving(Scripted(no_room)) as server:
            assert await request(server, "GET", "/v1/models") == {"data": [{"id": "nano"}]}
            async for _ in stream(server, "/v1/completions", {}):
                pass

    with pytest.raises(HttpError) as error:
        asyncio.run(go())
    assert error.value.status == 429


@pytest.mark.parametrize("flags", [["--url", "ftp://x"], ["--url", "http://h:0"], ["--requests", "0"], ["--rate", "-1"]])
def test_bad_flags(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_the_verb_writes_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def fake(server: Server, load: Load) -> tuple[list[Reply], float]:
        assert (server.key, load.requests) == ("secret", 3)
        return [Reply([0.1, 0.2], 4, 0, 2)] * 3, 1.0

    monkeypatch.setattr("openling.bench.serving.run_load", fake)
    monkeypatch.setenv("OPENLING_API_KEY", "secret")
    path = tmp_path / "results" / "serving.json"
    assert main(["bench", "serving", "--requests", "3", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert {row["name"]: row["value"] for row in record["rows"]}["TTFT p50"] == pytest.approx(100)
    out = capsys.readouterr().out
    assert "secret" not in out + path.read_text()


def test_loads_are_checked() -> None:
    with pytest.raises(UserError, match="too small"):
        Load(concurrency=0)
