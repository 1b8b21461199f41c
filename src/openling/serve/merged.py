"""The outputs of one call's replies, merged as they come: started together, stopped together, timed for the metrics."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from openling.errors import Failure, UserError
from openling.serve.engine_config import QueueFull
from openling.serve.problems import ApiError, bad, overloaded, unavailable
from openling.serve.sse import cancel
from openling.serve.types import Output, Request

if TYPE_CHECKING:
    from openling.serve.async_engine import AsyncEngine


LOOK_AGAIN = 0.02


class Timings(Protocol):
    """Who is told how long replies took, in seconds."""

    def first_token(self, seconds: float) -> None:
        """From the request to its first token."""

    def between_tokens(self, seconds: float, tokens: int) -> None:
        """Between two outputs, and how many tokens the later one held."""

    def finished(self, seconds: float, output: Output) -> None:
        """From the request to the end of one reply."""


@dataclass
class _Clock:
    began: float
    last: float = 0.0


class Replies:
    """An asynchronous iterator of (which reply, output); `aclose` frees what is still running, within an engine step."""

    def __init__(self, engine: AsyncEngine, requests: Sequence[Request], *, seconds: float, timings: Timings) -> None:
        self._engine, self._requests, self._timings = engine, requests, timings
        self._queue: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue()
        self._deadline = time.monotonic() + seconds - engine.paused_seconds
        self._tasks: list[asyncio.Task[None]] = []
        self._clocks = [_Clock(time.monotonic()) for _ in requests]
        self._open = len(requests)
        self._last: dict[int, Output] = {}

    async def start(self, patience: float = 0.05) -> None:
        """Hand the requests to the engine. A refusal within `patience` seconds is raised here, while HTTP can still say so."""
        self._tasks = [asyncio.create_task(self._run(i, request)) for i, request in enumerate(self._requests)]
        try:
            async with asyncio.timeout(patience):
                first = await self._queue.get()
        except TimeoutError:
            return
        if isinstance(first[1], Exception):
            await self.aclose()
            raise as_api_error(first[1])
        self._pushed_back = first

    _pushed_back: tuple[int, Output | Exception] | None = None

    def __aiter__(self) -> Replies:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if not self._open:
            raise StopAsyncIteration
        index, output = await self._next()
        if isinstance(output, Exception):
            raise as_api_error(output)
        self._time(index, output)
        if output.finish_reason == "error":
            raise _failed(self._requests[index], output)
        self._open -= output.finish_reason is not None
        return index, output

    def abort(self) -> None:
        """End every reply that still runs: its next output says "abort"."""
        for i, (task, request) in enumerate(zip(self._tasks, self._requests, strict=True)):
            if not task.done():
                task.cancel()
                last = self._last.get(i) or Output(request.id, prompt_tokens=len(request.prompt_token_ids))
                self._queue.put_nowait((i, _end_of(last)))

    async def aclose(self) -> None:
        """Stop whatever still runs."""
        await cancel(*self._tasks)

    async def _next(self) -> tuple[int, Output | Exception]:
        if self._pushed_back is not None:
            first, self._pushed_back = self._pushed_back, None
            return first
        while True:
            try:
                async with asyncio.timeout(self._left()):
                    return await self._queue.get()
            except TimeoutError:
                if self._left() <= 0:
                    raise ApiError(408, "the reply was not complete before this server's deadline", code="timeout") from None
                await asyncio.sleep(LOOK_AGAIN)  # paused since: what little is left must not keep the loop busy

    def _left(self) -> float:
        """Seconds until the deadline, which a paused engine puts off."""
        return self._deadline + self._engine.paused_seconds - time.monotonic()

    async def _run(self, index: int, request: Request) -> None:
        try:
            async for output in self._engine.generate(request):
                self._last[index] = output
                self._queue.put_nowait((index, output))
        except Exception as error:  # told to whoever waits for this reply
            self._queue.put_nowait((index, error))

    def _time(self, index: int, output: Output) -> None:
        clock, now = self._clocks[index], time.monotonic()
        if output.token_ids:
            if not clock.last:
                self._timings.first_token(now - clock.began)
            else:
                self._timings.between_tokens(now - clock.last, len(output.token_ids))
            clock.last = now
        if output.finish_reason is not None:
            self._timings.finished(now - clock.began, output)


def _failed(request: Request, output: Output) -> ApiError:
    """Why a reply could not be finished. A grammar that compiled and then failed is of the request's making."""
    reason = (output.error or "the engine could not finish this reply").partition("\n")[0]
    if request.params.grammar is not None:
        return bad(f"the grammar of this reply failed: {reason}", "response_format", "invalid_grammar")
    return ApiError(500, reason, code="engine_error")


def _end_of(last: Output) -> Output:
    """An output that adds nothing but the end."""
    return Output(
        last.request_id,
        weight_version=last.weight_version,
        finish_reason="abort",
        prompt_tokens=last.prompt_tokens,
        cached_tokens=last.cached_tokens,
        completion_tokens=last.completion_tokens,
    )


def as_api_error(error: Exception) -> ApiError:
    """What an engine's refusal means to a client; other exceptions are raised again."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return overloaded("the waiting queue is full", max(1, math.ceil(error.retry_after)))
    if isinstance(error, UserError):
        expected = error.parts["expected"]
        return bad(error.what + (f"; expected {expected}" if expected is not None else ""))
    if isinstance(error, Failure):
        return unavailable("the engine has stopped")
    raise error
