"""The loop on two GPUs (NCCL, BF16 with the kernels) trains as one GPU does, on every axis.

BF16 rounds each product to 2^-8; sums over ranks are FP32, in another order. So losses of the first step differ by rounding of
partial products alone, and later ones by what an optimiser makes of it: 1 % of the loss is some ten times what comes of it on one
GPU with other kernels, and far below what any missing or doubled term would change.

The norms' eps is 1e-2. A document's first token leaves the recurrence as (q k) v, which may be next to nothing, and the output
norm divides its gradient by that: at eps 1e-6 one such token, where BF16 leaves no digit of q k, decided a norm of 7.7 or 11.4.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packed_training import MIXED, documents, hybrid

from openling.data.batches import MemoryBatches
from openling.parallel.apply import apply
from openling.parallel.mesh import Axes, build
from openling.train.loop import train
from openling.train.ranks import Ranks

SHAPE = {
    "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 128, "group_norm_size": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "rms_norm_eps": 1e-2, "num_experts": 8, "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256,
}  # fmt: skip
AXES = {
    "shard": Axes(),
    "replicate": Axes(data_replicate=2),
    "context": Axes(context=2),
    "expert": Axes(expert=2),
    "tensor": Axes(tensor=2),
}


def go(run, device, axes=None, steps=4):
    config = MIXED(steps=steps, batch_size=8, accumulation=2, sequence_length=512, z=0.0, precision="bf16")
    model = hybrid(**SHAPE).to(device)
    mesh = None if axes is None else build(axes, model.config, "cuda")
    ranks = Ranks(apply(model, mesh, model_dtype=torch.bfloat16))
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_ranks)
    batches = MemoryBatches(documents(1000), length=512, rows=8, rank=rank, world=world)
    options = {"parameters": [""], "run": run, "resume": (run / "train.json").exists(), "progress": False}
    train(model, config, batches, ranks=ranks, **options)


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def everything(rank, folder):
    folder = Path(folder)
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    device = torch.device("cuda", rank)
    for name, axes in AXES.items():
        go(folder / name, device, axes)
    for steps, axes in ((2, Axes()), (4, Axes(tensor=2))):
        go(folder / "resumed", device, axes, steps)
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path):
    mp.spawn(everything, args=(str(tmp_path),), nprocs=2)
    go(tmp_path / "one", torch.device("cuda", 0))
    expected = rows(tmp_path / "one")
    for name in (*AXES, "resumed"):
        for row, wanted in zip(rows(tmp_path / name), expected, strict=True):
            for key in ("loss", "ce", "mtp"):
                assert row[key] == pytest.approx(wanted[key], rel=1e-2), f"{name}, step {row['step']}: {key}"
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-2), f"{name}, step {row['step']}"
