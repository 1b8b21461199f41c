"""Lightning over the GPUs of one machine, each with a slice of one long row, against one GPU with the whole row.

    torchrun --nproc-per-node 2 benchmarks/context_parallel.py

Forward + backward in both orders (see `openling.ops.context_parallel`) and the all-gather alone. Writes
benchmarks/results/kernels/context-parallel.json.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from openling.environment import write_results
from openling.ops import context_parallel
from openling.ops.context_parallel import context_slice, lightning_context_parallel
from openling.ops.lightning import lightning, log_decay

HEADS, DIM, TURNS = 64, 128, 15
LENGTHS = (16384, 32768, 131072)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time on the slowest rank, all ranks starting together."""
    times = []
    for turn in range(TURNS + 3):
        dist.barrier()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end))
    slowest = torch.tensor(statistics.median(times), device="cuda")
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def both_passes(attend: Callable[..., Any], tokens: int) -> Callable[[], object]:
    """A call of forward and backward over so many local tokens."""
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    dout = torch.randn_like(v)

    def call() -> object:
        return torch.autograd.grad(attend(q, k, v)[0], (q, k, v), dout)

    return call


def cut_row(tokens: int, decay_H: torch.Tensor, rank: int, world: int) -> Callable[[], object]:
    """As `both_passes`, over this rank's slice of a row."""
    held = context_slice([tokens * r // world for r in range(world + 1)], rank, device="cuda")
    return both_passes(lambda q, k, v: lightning_context_parallel(q, k, v, decay_H, held), held.end - held.start)


def main() -> None:
    """Every length; rank 0 prints and writes."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    world = dist.get_world_size()
    decay = log_decay(HEADS, 0, 32).cuda()
    rows: list[dict[str, Any]] = []
    state = torch.randn(1, HEADS, DIM, DIM, device="cuda")
    room = torch.empty(world, HEADS, DIM, DIM, device="cuda")
    alone = milliseconds(lambda: dist.all_gather_into_tensor(room, state))
    rows.append({"name": f"all-gather of one layer's states, {world} GPUs", "value": alone, "unit": "ms"})
    for tokens in LENGTHS:
        whole = milliseconds(both_passes(lambda q, k, v: lightning(q, k, v, decay), tokens))
        for order, waiting in (("waits for the states", world), ("adds what enters afterwards", 0)):
            context_parallel.WAITING_RANKS = waiting
            cut = milliseconds(cut_row(tokens, decay, rank, world))
            row = {"name": f"Lightning forward + backward, 1 x {tokens} on {world} GPUs, {order}", "value": cut, "unit": "ms"}
            rows.append(row | {"peer": "the whole row on one GPU", "peer_value": whole, "ratio": whole / cut})
    if rank == 0:
        for row in rows:
            print(f"{row['name']:80} {row['value']:8.3f} ms  {row.get('ratio') or 0:5.2f}x")
        command = f"torchrun --nproc-per-node {world} benchmarks/context_parallel.py"
        write_results(Path(__file__).parent / "results" / "kernels" / "context-parallel.json", command, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
