"""How long a call takes: medians, ours and the peer in turn, and what the machine itself reaches in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch

from openling.bench.case import Case, Rates

Device = Literal["cuda", "cpu"]
Call = Callable[[], object]
# Calls in one CUDA graph: enough that a replay's own launch vanishes, few enough to capture in an instant.
GRAPH_CALLS = 64
GRAPH_MS = 20.0


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds in which ours and the peer take turns, the length of a turn in ms, fewest calls on a CPU."""

    rounds: int
    warmup_ms: float
    cuda_ms: float
    cpu_ms: float
    cpu_calls: int


FULL = Effort(rounds=3, warmup_ms=25, cuda_ms=100, cpu_ms=400, cpu_calls=3)
QUICK = Effort(rounds=2, warmup_ms=5, cuda_ms=20, cpu_ms=60, cpu_calls=1)


@dataclass(frozen=True)
class Times:
    """The median µs of every round; `peer` is empty where there is none."""

    ours: list[float]
    peer: list[float]

    @property
    def ours_us(self) -> float:
        """The median over the rounds."""
        return median(self.ours)

    @property
    def peer_us(self) -> float | None:
        """The peer's, None where there is none."""
        return median(self.peer) if self.peer else None


def measure(case: Case, device: Device, effort: Effort) -> Times:
    """Times ours and the peer alternately, so that a machine that slows down or warms up does so for both."""
    ours = _turn(case.ours, case.mode, device, effort)
    peer = _turn(case.peer, case.mode, device, effort) if case.peer else None
    times = Times([], [])
    for _ in range(effort.rounds):
        times.ours.append(ours())
        if peer:
            times.peer.append(peer())
    return times


def machine_rates(device: Device, effort: Effort) -> Rates:
    """Copy bandwidth (2 GiB tensors on a GPU, 256 MiB on a CPU) and the rate of a square matmul (8192 or 1024)."""
    size, side = (2**30, 8192) if device == "cuda" else (2**27, 1024)
    copy = _copy_us(size, device, effort)
    matmul = min(_matmul_us(side, dtype, device, effort) for dtype in _matmul_dtypes(device))
    return Rates(copy=2 * 2 * size / (copy * 1e-6), matmul=2 * side**3 / (matmul * 1e-6))


def _copy_us(size: int, device: Device, effort: Effort) -> float:
    source = torch.ones(size, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return _turn(lambda: target.copy_(source), "eager", device, effort)()


def _matmul_dtypes(device: Device) -> tuple[torch.dtype, ...]:
    # A CPU without matrix units for BF16 is faster in FP32.
    return (torch.bfloat16,) if device == "cuda" else (torch.bfloat16, torch.float32)


def _matmul_us(side: int, dtype: torch.dtype, device: Device, effort: Effort) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return _turn(lambda: a @ b, "eager", device, effort)()


def _turn(call: Call, mode: str, device: Device, effort: Effort) -> Callable[[], float]:
    """A function that measures `call` once more and gives its median in µs; the first call, which may compile, is over."""
    call()
    if device == "cpu":
        return lambda: _cpu_us(call, effort)
    torch.cuda.synchronize()
    if mode == "eager":
        if _single_us(call) > 500 * effort.cuda_ms:  # long calls, one a turn: the bench would make eight of it
            return lambda: _single_us(call)
        return lambda: _cuda_us(call, effort)
    replay, calls = _graph(call)
    return lambda: _cuda_us(replay, effort) / calls


def _single_us(call: Call) -> float:
    """One call between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1000 * start.elapsed_time(end)


def _cuda_us(call: Call, effort: Effort) -> float:
    from triton.testing import do_bench

    return 1000 * do_bench(call, warmup=effort.warmup_ms, rep=effort.cuda_ms, return_mode="median")


def _graph(call: Call) -> tuple[Call, int]:
    """A CUDA graph of many calls, as one call, and how many they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side):  # a capture must find all workspaces and compiled kernels in place
        call()
        start.record()
        for _ in range(3):
            call()
        end.record()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    calls = max(4, min(GRAPH_CALLS, int(3 * GRAPH_MS / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay, calls


def _cpu_us(call: Call, effort: Effort) -> float:
    """Every call timed alone."""
    taken: list[float] = []
    while len(taken) < effort.cpu_calls or sum(taken) < effort.cpu_ms * 1e-3:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * median(taken)
