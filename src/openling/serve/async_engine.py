"""The engine in its own thread, for an event loop: requests go in as coroutines, outputs come back as they are made.

The thread alone touches the engine. What others want of it waits in a queue and is done between two steps.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from openling.errors import Failure, UserError
from openling.serve.engine import Engine
from openling.serve.types import Output, Request

T = TypeVar("T")
# How long the thread sleeps while all requests wait for a grammar; the least time between two checks of an idle engine's books.
BLOCKED_SECONDS = 0.002
CHECK_SECONDS = 10.0
log = logging.getLogger("openling")


class AsyncEngine:
    """`Engine` behind coroutines of one event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, asyncio.Queue[Output | BaseException]] = {}
        self._calls: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._checked = -CHECK_SECONDS
        self._failure: BaseException | None = None

    @property
    def healthy(self) -> bool:
        """Whether the stepping thread runs."""
        return self._thread is not None and self._thread.is_alive() and self._failure is None

    @property
    def paused(self) -> bool:
        """Whether the engine stands still, so that new requests would wait."""
        return self.engine.pauses.on

    @property
    def paused_seconds(self) -> float:
        """How long the engine has stood still so far."""
        return self.engine.pauses.seconds

    def start(self) -> None:
        """Start stepping; call from the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Wait up to so long for running requests, abort the rest, end the thread."""
        deadline = time.monotonic() + drain_seconds
        while self.healthy and self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.healthy:
            for output in await self.call(lambda engine: engine.pause("abort")):
                self._publish([output])
        self._stopping = True
        self._work.put(lambda: None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """`function(engine)` between two steps; its result or its exception."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                value = function(self.engine)
            except Exception as error:  # a boundary: it belongs to the caller, not to the engine's thread
                self._tell(_settle, result, None, error)
            else:
                self._tell(_settle, result, value, None)

        self._calls.add(result)
        result.add_done_callback(self._calls.discard)
        self._submit(work)
        return await result

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """The request's outputs; closing the iterator aborts it within a step.

        Raises UserError or QueueFull before the first output, Failure if the engine dies.
        """
        if request.id in self._streams:
            raise UserError("a request of this id is running", where="id", value=request.id, expected="a new id")
        stream: asyncio.Queue[Output | BaseException] = asyncio.Queue()
        self._streams[request.id] = stream
        done = False
        try:
            await self.call(lambda engine: engine.add(request))
            while not done:
                output = await stream.get()
                if isinstance(output, BaseException):
                    raise output
                done = output.finish_reason is not None
                yield output
        finally:
            del self._streams[request.id]
            if not done and self.healthy:
                self._work.put(lambda: self.engine.abort(request.id))

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                idle = not self.engine.has_work()
                if idle:
                    self._check_when_idle()
                self._do_waiting_work(block=idle)
                outputs = self.engine.step()
                if outputs:
                    self._tell(self._publish, outputs)
                elif self.engine.blocked:
                    time.sleep(BLOCKED_SECONDS)
        except BaseException as error:
            log.exception("the engine's thread died")
            self._failure = error
            self._tell(self._fail)

    def _check_when_idle(self) -> None:
        """Leaked memory would show as an engine that slowly fills up: better that it refuses to go on."""
        if time.monotonic() - self._checked > CHECK_SECONDS:
            self.engine.check_integrity()
            self._checked = time.monotonic()

    def _do_waiting_work(self, *, block: bool) -> None:
        """Everything in the queue; with nothing to step, wait for the first of it."""
        try:
            self._work.get(block=block)()
            while True:
                self._work.get_nowait()()
        except queue.Empty:
            return

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        """Run something in the event loop, if that still runs."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # -- the event loop ------------------------------------------------------------------------------------------------

    def _submit(self, work: Callable[[], None]) -> None:
        if not self.healthy:
            raise Failure("the engine does not run", value=repr(self._failure), next="restart the server; its log has the reason")
        self._work.put(work)

    def _publish(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put_nowait(output)

    def _fail(self) -> None:
        died = Failure("the engine's thread died", value=repr(self._failure))
        for stream in self._streams.values():
            stream.put_nowait(died)
        for call in list(self._calls):
            _settle(call, None, died)


def _settle(future: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
    if future.done():  # its caller has left
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)
