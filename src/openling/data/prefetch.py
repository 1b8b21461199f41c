"""Batches made ready by a thread while the model works on earlier ones, and how long the model waited for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from openling.data.batches import BatchSource, PackedBatch


class Prefetcher:
    """A `BatchSource` that keeps the `depth` batches behind the last one asked for ready. Close it, or use it in a `with`.

    Steps are expected one after the other; another step is right too, and only waits. `prepare` runs in the thread
    (`PackedBatch.pin_memory`, say). An error while reading is raised where its batch is asked for.
    """

    def __init__(
        self, source: BatchSource, *, depth: int = 4, prepare: Callable[[PackedBatch], PackedBatch] = lambda batch: batch
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth must be 1 or more, got {depth}")
        self.source, self.depth, self._prepare = source, depth, prepare
        self.waited_seconds = 0.0
        """Time that `batch` has waited, all calls together."""
        self.last_wait_seconds = 0.0
        """Time that the last call waited."""
        self._next: int | None = None
        self._thread: threading.Thread | None = None
        self._ready: queue.Queue[PackedBatch | BaseException] = queue.Queue()
        self._stop = threading.Event()

    @property
    def tokens_per_step(self) -> int:
        """That of the source."""
        return self.source.tokens_per_step

    def fingerprint(self) -> str:
        """That of the source."""
        return self.source.fingerprint()

    def batch(self, step: int) -> PackedBatch:
        """This rank's rows of batch `step`; the thread goes on with those behind it."""
        began = time.monotonic()
        if step != self._next:
            self.close()
            self._begin(step)
        found = self._ready.get()
        self._next = step + 1
        self.last_wait_seconds = time.monotonic() - began
        self.waited_seconds += self.last_wait_seconds
        if isinstance(found, BaseException):
            self.close()
            raise found
        return found

    def _begin(self, step: int) -> None:
        # The thread holds one batch in hand while the queue is full.
        ready: queue.Queue[PackedBatch | BaseException] = queue.Queue(self.depth - 1 or 1)
        stop = threading.Event()
        self._ready, self._stop = ready, stop

        def read() -> None:
            number = step
            while not stop.is_set():
                item: PackedBatch | BaseException
                try:
                    item = self._prepare(self.source.batch(number))
                except BaseException as error:  # goes to whoever asks for this batch
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.1)
                        break
                    except queue.Full:
                        continue
                if isinstance(item, BaseException):
                    return
                number += 1

        self._thread = threading.Thread(target=read, name="batches", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._next = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
