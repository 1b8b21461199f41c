"""Server-sent events: framing, comments that keep a silent stream open, errors after the stream has begun, clients that leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from openling.config.serve import TimeoutsConfig
from openling.serve.guard import ClientGone, log_failure
from openling.serve.problems import ApiError

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
COMMENT = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def dumps(value: Any) -> bytes:
    """Compact UTF-8 JSON; characters that have no UTF-8 form become question marks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def event(value: Any, name: str | None = None) -> bytes:
    """One event. JSON has no line breaks outside strings and escapes those inside, so one `data:` line holds it."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + dumps(value) + b"\n\n"


class EventStream:
    """An ASGI answer that sends `events` as they come and closes them, whatever happens, when the client leaves."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        close: Callable[[], Awaitable[None]],
        timeouts: TimeoutsConfig,
        request_id: str,
        error_event: Callable[[ApiError], bytes],
    ) -> None:
        self._events, self._close, self._timeouts = events, close, timeouts
        self._request_id, self._error_event = request_id, error_event
        self._last = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream (ASGI)."""
        pump = asyncio.create_task(self._pump(send))
        watch = asyncio.create_task(wait_for_disconnect(receive))
        comments = asyncio.create_task(self._comments(send))
        try:
            await asyncio.wait({pump, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                raise ClientGone
            pump.result()
        finally:
            await cancel(pump, watch, comments)
            await self._events.aclose()
            await self._close()  # `events` may never have begun

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        try:
            async for chunk in self._events:
                await self._write(send, chunk)
        except ApiError as error:
            await self._write(send, self._error_event(error))
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:
            log_failure(error, self._request_id)
            await self._write(send, self._error_event(ApiError(500, "something went wrong in the server", code="internal")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, chunk: bytes) -> None:
        self._last = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._timeouts.write):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except TimeoutError:
            raise ClientGone from None  # it takes nothing: a reply must not wait for it

    async def _comments(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        while True:
            await asyncio.sleep(max(self._last + self._timeouts.comment - loop.time(), 0.01))
            if loop.time() - self._last >= self._timeouts.comment:
                await self._write(send, COMMENT)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left."""
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled (ClientGone) when the client leaves before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await cancel(task, gone)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; what they raise then is nobody's."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task
