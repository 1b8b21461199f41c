"""Training on this machine: tokens per second of the nano recipe on a CPU, checkpoint stall, waiting for data; MFU on a GPU.

    python benchmarks/training.py [--steps N] [--only nano|1b-dense|1b-moe] [--out FILE]
    torchrun --nproc-per-node 2 benchmarks/training.py --only 1b-moe [--shard N] [--context N] [--expert N] [--tensor N]

The loop itself is run, with its checkpoints, its log and its data thread, on the shapes named below; the first steps, in which
memory is asked for and kernels are compiled, are left out of the medians. FLOPs are counted as `openling.train.flops` says; MFU
and memory are the main rank's. Writes benchmarks/results/training/loop-DEVICE.json, with the number of ranks if there are
several.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from openling.config.presets import PRESETS
from openling.config.train import TrainConfig
from openling.data.batches import MemoryBatches
from openling.data.byte_tokenizer import byte_tokenizer
from openling.data.corpus import mixture
from openling.data.pack import tokenise
from openling.environment import write_results
from openling.model import count
from openling.model.config import ModelConfig
from openling.model.families import read_config
from openling.model.ling import Ling
from openling.ops.pick import kernels_reason
from openling.parallel import world as ranks_of
from openling.parallel.apply import apply
from openling.parallel.mesh import Axes, build
from openling.train.flops import training_flops
from openling.train.loop import train
from openling.train.ranks import Ranks

RESULTS = Path(__file__).parent / "results" / "training"
WARM = 4


def dense_1b() -> ModelConfig:
    """A dense hybrid of the 1 B class: 16 layers of 2048, 7 Lightning to 1 MLA."""
    changes = {
        "vocab_size": 32768, "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_kv_heads_for_linear_attn": 16, "intermediate_size": 5632, "num_experts": 0, "num_shared_experts": 0,
        "num_nextn_predict_layers": 0, "max_position_embeddings": 4096,
    }  # fmt: skip
    return read_config(PRESETS["ling-2.6-flash"]() | changes)


def moe_1b() -> ModelConfig:
    """The same with 64 fine-grained experts, 8 of them active."""
    changes = {"vocab_size": 32768, "num_hidden_layers": 8, "num_experts": 64, "moe_intermediate_size": 512}
    changes |= {"moe_shared_expert_intermediate_size": 512, "num_nextn_predict_layers": 0, "max_position_embeddings": 4096}
    return read_config(PRESETS["ling-2.6-mini"]() | changes | {"layer_group_size": 8})


def documents(vocab: int, tokens: int) -> list[np.ndarray]:
    """The built-in texts for a byte vocabulary; noise of their lengths for a larger one: time does not depend on the words."""
    if vocab <= 1024:
        text = tokenise(mixture(("python-docs", "kjv")), byte_tokenizer(), vocab_size=vocab, max_tokens=tokens)
        ends = np.flatnonzero(text == byte_tokenizer().eos_token_id) + 1
        return [part for part in np.split(text, ends) if len(part)]
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.5, 1.0, size=tokens // 1000).astype(int) + 8
    return [rng.integers(vocab, size=n) for n in lengths]


def measure(
    name: str, config: ModelConfig, settings: TrainConfig, device: torch.device, axes: Axes | None, *, packed: bool
) -> dict[str, Any]:
    """Medians of one run of the loop. axes: of a mesh of ranks, all of which call it."""
    with torch.device(device):
        model = Ling(config)
    model.init_weights(torch.Generator(device).manual_seed(0))
    mesh = None if axes is None else build(axes, config, device.type)
    ranks = Ranks(apply(model, mesh, model_dtype=torch.bfloat16 if settings.precision == "bf16" else None))
    length = settings.sequence_length
    texts = documents(config.vocab_size, 40 * settings.batch_size * length)
    if not packed:
        rng = np.random.default_rng(0)
        texts = [rng.integers(config.vocab_size, size=length * settings.batch_size * 40)]
    rank, world = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_ranks)
    batches = MemoryBatches(texts, length=length, rows=settings.batch_size, rank=rank, world=world)
    folder = Path(ranks.told(tempfile.mkdtemp))
    try:
        result = train(model, settings, batches, parameters=[""], run=folder / "run", progress=5.0, ranks=ranks)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][WARM:]
    finally:
        ranks.told(lambda: shutil.rmtree(folder))
    del model, ranks
    gc.collect()
    spans = [settings.batch_size * length / r["tokens_per_s"] for r in rows]
    return {
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rows),
        "best": max(r["tokens_per_s"] for r in rows),
        "mfu": statistics.median(r["mfu"] for r in rows) if rows[0]["mfu"] is not None else None,
        "memory": max(r["memory_bytes"] for r in rows) / 2**30,
        "stall": sum(r["save_seconds"] for r in rows) / sum(spans),
        "data": sum(r["data_seconds"] for r in rows) / sum(spans),
        "loss": (rows[0]["loss"], rows[-1]["loss"]),
        "steps": result.steps,
        "flops": training_flops(config, 1, length / 2, config.num_nextn_predict_layers if settings.mtp else 0),
    }


def row(name: str, value: float, unit: str, goal: str | None = None, met: bool | None = None, **more: Any) -> dict[str, Any]:
    """A line of the results file."""
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met, **more}


def rows_of(name: str, found: dict[str, Any], config: ModelConfig, goal: float | None) -> list[dict[str, Any]]:
    """The figures of one run. goal: tokens per second on a CPU, MFU on a GPU."""
    total, active = count.total_parameters(config, mtp=True), count.active_parameters(config)
    size = f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M active"
    about = {"model": size, "flops_per_token": found["flops"], "steps": found["steps"]}
    speed = row(f"{name}: training, median", found["tokens_per_s"], "tokens/s", **about, best=found["best"])
    lines = [speed]
    if found["mfu"] is not None:
        lines.append(row(f"{name}: MFU", found["mfu"], "share", goal and f">= {goal}", goal and found["mfu"] >= goal))
        missed = lines[-1]
    else:
        speed |= {"goal": goal and f">= {goal:,.0f} tokens/s", "met": goal and found["tokens_per_s"] >= goal}
        missed = speed
    if missed["met"] is False:
        missed["why"] = f"load of the machine while it ran: {os.getloadavg()[0]:.1f} over {len(os.sched_getaffinity(0))} cores"
    lines.append(row(f"{name}: training held up by checkpoints", found["stall"], "share", "< 0.02", found["stall"] < 0.02))
    lines.append(row(f"{name}: waiting for data", found["data"], "share", "< 0.01", found["data"] < 0.01))
    lines.append(row(f"{name}: peak memory", found["memory"], "GiB"))
    lines.append(row(f"{name}: loss of the first and last step counted", found["loss"][1], "nats", first=found["loss"][0]))
    return lines


def main() -> None:
    """Measure what this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", choices=("nano", "1b-dense", "1b-moe"))
    parser.add_argument("--out", type=Path)
    for axis in ("shard", "context", "expert", "tensor"):
        parser.add_argument(
            f"--{axis}", type=int, default=0 if axis == "shard" else 1, help="ranks along this axis, with torchrun"
        )
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not ranks_of.started_by_torchrun():
        return run(args, device, None, speak=True)
    world = ranks_of.join(device)
    with ranks_of.ending_together(world):
        axes = Axes(data_shard=args.shard, context=args.context, expert=args.expert, tensor=args.tensor)
        run(args, world.device, axes, speak=world.main)
    return None


def run(args: argparse.Namespace, device: torch.device, axes: Axes | None, *, speak: bool) -> None:
    """Every case that was asked for. speak: whether to print and to write the file."""
    gpu = device.type == "cuda"
    if not gpu and axes is None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    if speak:
        print(f"Ops: {kernels_reason(device)}.", flush=True)
    shared: dict[str, Any] = {"steps": args.steps, "warmup_steps": 10, "checkpoint_steps": 20, "checkpoint_seconds": None}
    nano = TrainConfig(
        **shared, batch_size=32, sequence_length=256, lr=2e-3, mtp=0.1, bias_rate=1e-2, precision="bf16" if gpu else "fp32"
    )
    large = TrainConfig(**shared, batch_size=16, accumulation=4, sequence_length=4096, lr=3e-4, bias_rate=1e-3)
    cases = {"nano": (read_config(PRESETS["nano"]()), nano, None if gpu else 5000.0, True)}
    if gpu:
        cases |= {"1b-dense": (dense_1b(), large, 0.45, False), "1b-moe": (moe_1b(), large, 0.35, False)}
    lines: list[dict[str, Any]] = []
    ranks = f"-x{dist.get_world_size()}" if axes else ""
    out = args.out or RESULTS / f"loop-{torch.cuda.get_device_name().replace(' ', '-').lower() if gpu else 'cpu'}{ranks}.json"
    for name, (config, settings, goal, packed) in cases.items():
        if args.only in (None, name):
            found = measure(name, config, settings, device, axes, packed=packed)
            if speak:
                print(name, json.dumps(found), flush=True)
                lines += rows_of(name, found, config, goal)
                starter = f"torchrun --nproc-per-node {dist.get_world_size()}" if axes else "python"
                write_results(out, shlex.join([*starter.split(), *sys.argv]), lines)


if __name__ == "__main__":
    main()
