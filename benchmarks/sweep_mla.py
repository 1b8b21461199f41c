"""MLA decoding on one GPU: the form for Hopper and every tile of the portable one, at the goal's shapes, in CUDA graphs.

    python benchmarks/sweep_mla.py [--portable]

Prints µs, the share of the machine's own copy rate, and the largest error against FP64 over the bound that
`tests/ops/test_mla_decode.py` derives (1 is the bound). A form that fails is a line with its message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from openling.bench.timing import QUICK, machine_rates
from openling.ops.kernels import mla

RANK, ROPE, PAGE, SCALE = 512, 64, 64, 192**-0.5
# B, keys, new tokens, heads, split_tokens
SHAPES = [
    (32, 32768, 1, 64, 0),
    (128, 4096, 1, 64, 0),
    (1, 32768, 1, 64, 0),
    (8, 32768, 1, 64, 0),
    (32, 4096, 1, 64, 0),
    (32, 32768, 1, 32, 0),
    (32, 32768, 2, 64, 0),
    (32, 32768, 1, 64, 2048),
    (128, 4096, 1, 64, 2048),
]


def main() -> None:
    """One line per shape and form."""
    rate = machine_rates("cuda", QUICK).copy
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s")
    forms: list[tuple[str, dict[str, object]]] = [("chosen", {})]
    if "--portable" in sys.argv:
        forms += [(str(config), {"config": config}) for config in mla.portable_candidates(RANK)]
    for batch, keys, new, heads, split in SHAPES:
        size = batch * keys * (RANK + ROPE) * 2
        pools = [_pool(batch, keys) for _ in range(max(1, min(8, int(2.5e8 / size))))]
        q = [torch.randn(batch, new, heads, d, device="cuda", dtype=torch.bfloat16) for d in (RANK, ROPE)]
        lengths = torch.full((batch,), keys, device="cuda", dtype=torch.int32)
        for name, options in forms:
            turns = cycle(pools)

            def call(
                turns: Any = turns, q: Any = q, lengths: Tensor = lengths, split: int = split, options: Any = options
            ) -> Tensor:
                pages, table = next(turns)
                return mla.run_decode(q[0], q[1], pages[..., :RANK], pages[..., RANK:], table, lengths, SCALE, split, **options)

            what = f"B{batch} S{keys} T{new} H{heads} split {split}: {name}"
            try:
                error = _error(call, pools[0], q)
                us = _graph_us(call)
                print(f"{what}: {us:.1f} µs, {size / us * 1e6 / rate:.1%}, error {error:.2f}")
            except Exception as problem:  # the boundary: the other forms are still worth a line
                print(f"{what}: {type(problem).__name__}: {str(problem)[:200]}")


def _pool(batch: int, keys: int) -> tuple[Tensor, Tensor]:
    count = batch * keys // PAGE
    pages = torch.empty(count, PAGE, RANK + ROPE, device="cuda", dtype=torch.bfloat16).normal_()
    return pages, torch.randperm(count, device="cuda", dtype=torch.int32).view(batch, -1)


def _error(call: Callable[[], Tensor], pool: tuple[Tensor, Tensor], q: list[Tensor]) -> float:
    """Of the first and the last sequence, over 1.1 * 2^-9 (sum of p |c| + |out|)."""
    found, (pages, table) = call().double(), pool
    worst, new = 0.0, q[0].shape[1]
    for b in (0, found.shape[0] - 1):
        rows = pages[table[b].long()].flatten(0, 1).double()
        for t in range(new):
            seen = rows[: rows.shape[0] - new + 1 + t]
            p = (SCALE * torch.cat((q[0][b, t], q[1][b, t]), dim=-1).double() @ seen.T).softmax(-1)
            out, size = p @ seen[:, :RANK], p @ seen[:, :RANK].abs()
            worst = max(worst, float(((found[b, t] - out).abs() / (1.1 * 2**-9 * (size + out.abs()))).max()))
    return worst


def _graph_us(call: Callable[[], Tensor], calls: int = 16) -> float:
    """Median µs of a call over 20 replays of a graph of 16."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    taken = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1000 * start.elapsed_time(end) / calls)
    return sorted(taken)[len(taken) // 2]


if __name__ == "__main__":
    main()
