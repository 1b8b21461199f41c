"""The thread gives the same batches, says how long it kept the model waiting, and passes errors on."""

import threading
import time

import pytest
import torch

from openling.data.batches import BatchSource, MemoryBatches
from openling.data.prefetch import Prefetcher


def source():
    return MemoryBatches([list(range(i, i + 30)) for i in range(20)], length=8, rows=4)


def test_batches_are_those_of_the_source_in_any_order():
    plain = source()
    with Prefetcher(source(), depth=3) as ready:
        assert isinstance(ready, BatchSource) and ready.fingerprint() == plain.fingerprint()
        for step in (0, 1, 2, 7, 8, 3, 3, 4):
            assert torch.equal(ready.batch(step).ids, plain.batch(step).ids)
    assert not any(t.name == "batches" for t in threading.enumerate())


class Slow:
    tokens_per_step = 1

    def __init__(self, seconds, fails_at=None):
        self.seconds, self.fails_at = seconds, fails_at

    def batch(self, step):
        if step == self.fails_at:
            raise OSError("gone")
        time.sleep(self.seconds)
        return source().batch(step)


def test_waiting_is_measured_and_hidden_behind_work():
    with Prefetcher(Slow(0.02)) as ready:
        ready.batch(0)
        assert ready.waited_seconds >= 0.02
        before = ready.waited_seconds
        for step in range(1, 6):
            time.sleep(0.06)  # the model at work: the next batch is there
            ready.batch(step)
        assert ready.waited_seconds - before < 0.05
        assert ready.last_wait_seconds < 0.03


def test_an_error_is_raised_where_its_batch_is_asked_for():
    with Prefetcher(Slow(0, fails_at=2)) as ready:
        ready.batch(0)
        ready.batch(1)
        with pytest.raises(OSError, match="gone"):
            ready.batch(2)
        with pytest.raises(OSError, match="gone"):  # and again: nothing is skipped
            ready.batch(2)
        ready.batch(3)
