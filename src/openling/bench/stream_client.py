"""A small HTTP/1.1 client for load: one connection per request, server-sent events with the time at which each came.

Written on asyncio's streams, because a thousand streams must cost the measuring process little, and its clock must be read
where the bytes arrive. Chunked and plain bodies; no redirects, no cookies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from openling.errors import UserError

_LIMIT = 1 << 20  # bytes of one line of a stream, or of headers


class HttpError(Exception):
    """The server answered with another status than 200, or broke the protocol. `status` is 0 for the latter."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}" if status else text)
        self.status = status


@dataclass(frozen=True)
class Server:
    """Where requests go. `prefix`: the path before /v1, without a slash at its end."""

    host: str
    port: int
    prefix: str
    tls: bool
    key: str | None = None

    def head(self, method: str, path: str, length: int) -> bytes:
        """Request line and headers."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Connection: close"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {length}"] if method == "POST" else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def parse_server(url: str, key: str | None = None) -> Server:
    """A `Server` from `http://host:port/prefix`; a `/v1` at the end is left out. Raises UserError for anything else."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UserError("not a server's address", where="--url", value=url, expected="http://HOST:PORT")
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Server(parts.hostname, port or (443 if parts.scheme == "https" else 80), prefix, parts.scheme == "https", key)


@contextlib.asynccontextmanager
async def connection(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """An open connection, closed whatever happens."""
    reader, writer = await asyncio.open_connection(server.host, server.port, ssl=server.tls or None, limit=_LIMIT)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def request(server: Server, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of one answer. Raises HttpError for a status other than 200, OSError when there is no connection."""
    data = json.dumps(body).encode() if body is not None else b""
    async with connection(server) as (reader, writer):
        writer.write(server.head(method, path, len(data)) + data)
        await writer.drain()
        status, headers = await _read_head(reader)
        content = b"".join([piece async for piece in _body(reader, headers)])
    if status != 200:
        raise HttpError(status, content[:300].decode(errors="replace"))
    return json.loads(content)


async def stream(server: Server, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[float, dict[str, Any]]]:
    """(`time.perf_counter()` of arrival, chunk) of a streamed reply. Raises HttpError also for an end without `[DONE]`."""
    data = json.dumps(body).encode()
    async with connection(server) as (reader, writer):
        writer.write(server.head("POST", path, len(data)) + data)
        await writer.drain()
        status, headers = await _read_head(reader)
        if status != 200:
            content = b"".join([piece async for piece in _body(reader, headers)])
            raise HttpError(status, content[:300].decode(errors="replace"))
        rest = b""
        async for piece in _body(reader, headers):
            now = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                event = line[5:].strip()
                if event == b"[DONE]":
                    return
                chunk = json.loads(event)
                if "error" in chunk:
                    raise HttpError(0, str(chunk["error"]))
                yield now, chunk
    raise HttpError(0, "the stream ended without [DONE]")


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
    except (asyncio.IncompleteReadError, IndexError, ValueError) as error:
        raise HttpError(0, "the answer is not HTTP") from error
    lines = head.decode("latin-1").split("\r\n")[1:]
    return status, {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The pieces of a body as they come."""
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
        elif "content-length" in headers:
            yield await reader.readexactly(int(headers["content-length"]))
        else:
            while piece := await reader.read(_LIMIT):
                yield piece
    except (asyncio.IncompleteReadError, ValueError) as error:
        raise HttpError(0, "the answer broke off") from error
