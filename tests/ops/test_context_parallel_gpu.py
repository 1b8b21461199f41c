"""Context-parallel Lightning on two GPUs (NCCL, BF16 kernels), in both orders, against the chunk form in FP64 on the whole.

Tolerances as in test_lightning_kernel.py: four BF16 roundings in quadrature, 2 * 2.3e-3 of the RMS; where what enters is added
afterwards, the result is rounded once more.
"""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from openling.ops import context_parallel
from openling.ops.context_parallel import context_slice, lightning_context_parallel
from openling.ops.lightning import lightning_chunk, log_decay

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

TOKENS, HEADS = 2500, 4
DOCUMENTS = (None, [0, 300, 300, 1900, 2500])
ROUNDING = 2**-8 / math.sqrt(3)


def on_every_rank(rank, world, rendezvous):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        for dim in (64, 128):
            for documents in DOCUMENTS:
                for waiting in (world, 0):
                    context_parallel.WAITING_RANKS = waiting
                    check(rank, world, dim, documents, tolerance=(2 if waiting else math.sqrt(5)) * ROUNDING)
    finally:
        dist.destroy_process_group()


def check(rank, world, dim, documents, tolerance):
    generator = torch.Generator().manual_seed(dim)
    q, k, v, dout = (torch.randn(1, TOKENS, HEADS, dim, generator=generator).bfloat16().cuda() for _ in range(4))
    decay = log_decay(HEADS, 0, 4).cuda()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    cut = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    wanted, _ = lightning_chunk(*exact, decay.double(), cu_seqlens=None if cut is None else cut.cuda())
    wanted.backward(dout.double())
    bounds = [0, 1100, TOKENS] if world == 2 else [TOKENS * r // world for r in range(world + 1)]
    held = context_slice(bounds, rank, cu_seqlens=cut, device="cuda")
    mine = slice(held.start, held.end)
    local = [x[:, mine].clone().requires_grad_() for x in (q, k, v)]
    out, _ = lightning_context_parallel(*local, decay, held)
    out.backward(dout[:, mine])
    for got, whole in zip((out, *(x.grad for x in local)), (wanted, *(x.grad for x in exact)), strict=True):
        error = got.double() - whole[:, mine]
        assert error.square().mean().sqrt() <= tolerance * whole.square().mean().sqrt()


def test_two_gpus_equal_one(tmp_path):
    mp.spawn(on_every_rank, args=(2, str(tmp_path / "rendezvous")), nprocs=2)
