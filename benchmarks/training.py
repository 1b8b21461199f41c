"""Training on this machine: tokens per second of the nano recipe on a CPU, checkpoint stall, waiting for data; MFU on GPUs.

    python benchmarks/training.py [--steps N] [--only nano 1b-dense 1b-moe 1b-moe-fp8 128k] [--out FILE]
    python benchmarks/training.py --steps 200 --no-checkpoints --only text-moe text-moe-fp8 --out FILE
    torchrun --nproc-per-node 2 benchmarks/training.py --only 1b-dense 1b-moe --alone FILE [--gather step]

The loop itself is run, with its checkpoints, its log and its data thread, on the shapes named below; the first steps, in which
memory is asked for and kernels are compiled, are left out of the medians. FLOPs are counted as `openling.train.flops` says. 128k
is the dense hybrid beside the same model with GQA. Cases ending in -fp8 have their routed experts in rowwise FP8 and are compared
with the same in BF16, in speed and loss; their MFU is of the BF16 rate too, and what they keep is in no plan. They and those
on text run where --only names them. Under torchrun the ranks share weights and a batch (FSDP), and FILE, of one rank, is what
they are compared with. Writes benchmarks/results/training/loop-DEVICE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from openling.parallel.apply import apply
from openling.parallel.mesh import Axes, build
from openling.parallel.recompute import Recompute
from openling.parallel.world import ending_together, join, started_by_torchrun
from openling.plan.job import plan_training
from openling.plan.mesh import GATHERS, Gather
from openling.train.flops import training_flops
from openling.train.loop import train
from openling.train.ranks import Ranks

RESULTS = Path(__file__).parent / "results" / "training"
WARM = 4
# Seconds between checkpoints unless a recipe says otherwise.
INTERVAL = TrainConfig.model_fields["checkpoint_seconds"].default
GOAL_STALL = f"< 0.02 of the {INTERVAL:.0f} s between two"


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


@dataclass(frozen=True)
class Case:
    """What one run of the loop trains, and how."""

    config: ModelConfig
    settings: TrainConfig
    goal: float | None = None
    packed: bool = False
    recompute: Recompute = "none"
    gather: Gather = "step"
    asked: bool = False  # runs where --only names it


def batches_of(case: Case, rank: int, world: int) -> MemoryBatches:
    """Packed documents of many lengths, or one document, which ends in one row of all."""
    length, rows = case.settings.sequence_length, case.settings.batch_size
    if case.packed:
        texts = documents(case.config.vocab_size, 40 * rows * length)
    else:
        assert case.settings.steps is not None
        tokens = (case.settings.steps + 1) * rows * length
        texts = [np.random.default_rng(0).integers(case.config.vocab_size, size=tokens)]
    return MemoryBatches(texts, length=length, rows=rows, rank=rank, world=world)


def measure(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """Medians of one run of the loop."""
    gc.collect()  # layers that recompute refer to themselves: without this the model of the case before would be counted here
    config, settings = case.config, case.settings
    world = dist.get_world_size() if dist.is_initialized() else 1
    with torch.device(device):
        model = Ling(config)
    model.init_weights(torch.Generator(device).manual_seed(0))
    mesh = build(Axes(), config, device.type) if world > 1 else None
    half = torch.bfloat16 if world > 1 else None
    ranks = Ranks(apply(model, mesh, recomputing=case.recompute, model_dtype=half, gather=case.gather))
    batches = batches_of(case, ranks.number, world)
    with ExitStack() as stack:
        folder = ranks.told(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = train(model, settings, batches, parameters=[""], run=Path(folder) / "run", progress=5.0, ranks=ranks)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        steps = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
        ranks.summed(torch.zeros(1, device=device))  # nobody removes the folder before all have read it
    rows = steps[WARM:]
    spans = [settings.batch_size * settings.sequence_length / r["tokens_per_s"] for r in rows]
    found = {
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in rows),
        "best": max(r["tokens_per_s"] for r in rows),
        "mfu": statistics.median(r["mfu"] for r in rows) if rows[0]["mfu"] is not None else None,
        "memory": max(r["memory_bytes"] for r in rows) / 2**30,
        "planned": None if peak is None or settings.fp8_experts != "none" else planned(case, world) / 2**30,
        "stalls": [r["save_seconds"] for r in steps if r["save_seconds"]],
        "data": sum(r["data_seconds"] for r in rows) / sum(spans),
        "loss": (rows[0]["loss"], rows[-1]["loss"]),
        "losses": [r["loss"] for r in rows],
        "steps": result.steps,
        "flops": training_flops(config, 1, settings.sequence_length / 2, config.num_nextn_predict_layers if settings.mtp else 0),
    }
    found["memory"] = found["memory"] if peak is None else peak / 2**30
    if ranks.main:
        print(name, json.dumps(found), flush=True)
    return found


def planned(case: Case, world: int) -> int:
    """Bytes of the peak that `openling plan --world` predicts, without its reserve."""
    c = case.settings
    job = plan_training(
        case.config, world=world, mesh=f"shard={world}", seq_len=c.sequence_length, batch_tokens=c.batch_size * c.sequence_length,
        micro_batch=c.part_size // world, recompute=case.recompute, gather="layer" if world == 1 else case.gather, reserve=0,
    )  # fmt: skip
    return job.fullest.total


def row(name: str, value: float, unit: str, goal: str | None = None, met: bool | None = None, **more: Any) -> dict[str, Any]:
    """A line of the results file."""
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": met, **more}


def rows_of(name: str, found: dict[str, Any], case: Case, alone: float | None = None) -> list[dict[str, Any]]:
    """The figures of one run. alone: tokens per second of one rank, where several ran."""
    config, goal = case.config, case.goal
    total, active = count.total_parameters(config, mtp=True), count.active_parameters(config)
    size = f"{total / 1e6:,.1f} M parameters, {active / 1e6:,.1f} M active"
    about = {"model": size, "flops_per_token": found["flops"], "steps": found["steps"], "recompute": case.recompute}
    if alone is not None:
        about["gather"] = case.gather
    speed = row(f"{name}: training, median", found["tokens_per_s"], "tokens/s", **about, best=found["best"])
    lines = [speed]
    if found["mfu"] is not None:
        wanted = {"goal": f">= {goal}", "met": found["mfu"] >= goal} if goal else {}
        lines.append(row(f"{name}: MFU", found["mfu"], "share", **wanted))
        lines.append(peak_memory(name, found))
    else:
        speed |= {"goal": goal and f">= {goal:,.0f} tokens/s", "met": goal and found["tokens_per_s"] >= goal}
        if speed["met"] is False:
            speed["why"] = f"load of the machine while it ran: {os.getloadavg()[0]:.1f} over {len(os.sched_getaffinity(0))} cores"
        lines.append(row(f"{name}: resident memory", found["memory"], "GiB"))
    # The first one also asks for the pinned memory that all others use again.
    for which, place in (("first", 0), ("last", -1))[: len(found["stalls"])]:
        seconds = found["stalls"][place]
        share = seconds / INTERVAL
        lines.append(row(f"{name}: held up by the {which} checkpoint", seconds, "s", GOAL_STALL, share < 0.02, share=share))
    lines.append(row(f"{name}: waiting for data", found["data"], "share", "< 0.01", found["data"] < 0.01))
    first, last = found["loss"]
    lines.append(row(f"{name}: loss of the first and last step counted", last, "nats", first=first, losses=found["losses"]))
    if alone is not None:
        ratio = found["tokens_per_s"] / alone
        beside = {"peer": "one rank", "peer_value": alone, "ratio": ratio}
        speed |= beside | {"goal": ">= 1.85 of one rank", "met": ratio >= 1.85}
    return lines


def peak_memory(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """The most that was held at once, beside the plan where there is one."""
    if found["planned"] is None:
        return row(f"{name}: peak memory", found["memory"], "GiB")
    near = found["memory"] / found["planned"]
    memory = {"peer": "openling plan, without its reserve", "peer_value": found["planned"], "ratio": near}
    return row(f"{name}: peak memory", found["memory"], "GiB", "within 5 % of the plan", abs(near - 1) <= 0.05) | memory


def cases_for(gpu: bool, steps: int, saving: bool) -> dict[str, Case]:
    """What this machine can run, by name."""
    # By the clock, as soon as the disk has taken in the one before.
    seconds = (5.0 if gpu else 1.0) if saving else None
    shared: dict[str, Any] = {"steps": steps, "warmup_steps": 10, "checkpoint_seconds": seconds}
    nano = TrainConfig(
        **shared, batch_size=32, sequence_length=256, lr=2e-3, mtp=0.1, bias_rate=1e-2, precision="bf16" if gpu else "fp32"
    )
    found = {"nano": Case(read_config(PRESETS["nano"]()), nano, None if gpu else 5000.0, packed=True)}
    if not gpu:
        return found
    world = dist.get_world_size() if dist.is_initialized() else 1
    large = TrainConfig(
        **shared, batch_size=32, accumulation=max(1, 8 // world), sequence_length=4096, lr=3e-4, bias_rate=1e-3
    )  # rows per rank and part do not depend on how many ranks there are
    row_of_128k = TrainConfig(
        **shared | {"checkpoint_seconds": None}, batch_size=world, accumulation=1, sequence_length=131072, lr=3e-4
    )
    long = dense_1b().replace(max_position_embeddings=131072)
    gqa = long.replace(layer_kinds=("gqa",) * long.num_hidden_layers, num_key_value_heads=4)
    return found | {
        "1b-dense": Case(dense_1b(), large, 0.45),
        "1b-moe": Case(moe_1b(), large, 0.35),
        "1b-moe-fp8": Case(moe_1b(), in_fp8(large), asked=True),
        "text-moe": Case(moe_1b().replace(vocab_size=512), large, packed=True, asked=True),
        "text-moe-fp8": Case(moe_1b().replace(vocab_size=512), in_fp8(large), packed=True, asked=True),
        "128k": Case(long, row_of_128k, recompute="layer"),
        "128k of the GQA model": Case(gqa, row_of_128k, recompute="layer"),
    }


def in_fp8(settings: TrainConfig) -> TrainConfig:
    """The same with the routed experts in FP8."""
    return settings.model_copy(update={"fp8_experts": "rowwise"})


def compared(lines: list[dict[str, Any]]) -> None:
    """Say how much faster the hybrid is at 128K, and experts in FP8; and how far the loss of the second half is from BF16's."""
    speed = {line["name"]: line for line in lines}
    for name in ("1b-moe", "text-moe"):
        for what in ("training, median", "loss of the first and last step counted"):
            ours, theirs = (speed.get(f"{case}: {what}") for case in (f"{name}-fp8", name))
            if ours and theirs:
                ours |= {"peer": "experts in BF16", "peer_value": theirs["value"], "ratio": ours["value"] / theirs["value"]}
            if ours and theirs and "losses" in ours:
                both = min(len(ours["losses"]), len(theirs["losses"]))  # a run may have been stopped
                late, before = (statistics.mean(line["losses"][both // 2 : both]) for line in (ours, theirs))
                ours |= {"goal": "second half within 0.25 % of BF16", "gap": late / before - 1}
                ours |= {"met": abs(late / before - 1) <= 0.0025, "steps_compared": both}
    ours, theirs = (speed.get(f"{name}: training, median") for name in ("128k", "128k of the GQA model"))
    if ours and theirs:
        ratio = ours["value"] / theirs["value"]
        ours |= {"peer": "the same with GQA, 4 of 16 heads", "peer_value": theirs["value"], "ratio": ratio}
        ours |= {"goal": ">= 3 times", "met": ratio >= 3}


def main() -> None:
    """Measure what this machine can run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--no-checkpoints", action="store_true", help="none but the last")
    parser.add_argument("--alone", type=Path, help="results of one rank, to compare several with")
    parser.add_argument("--gather", choices=GATHERS, default="step", help="how long several ranks keep gathered weights")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.steps <= WARM:
        parser.error(f"--steps: more than {WARM}, which are left out")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    with ExitStack() as stack:
        main_rank, count_of = True, 1
        if started_by_torchrun():
            world = join(device)
            stack.enter_context(ending_together(world))
            device, main_rank, count_of = world.device, world.main, world.size
        alone = {r["name"]: r["value"] for r in json.loads(args.alone.read_text())["rows"]} if args.alone else {}
        name_of = f"{count_of}x-" * (count_of > 1) + torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu"
        out = args.out or RESULTS / f"loop-{name_of}.json"
        if main_rank:
            print(f"Ops: {kernels_reason(device)}.", flush=True)
        lines: list[dict[str, Any]] = []
        for name, case in cases_for(gpu, args.steps, not args.no_checkpoints).items():
            if not any(name == o or name.startswith(f"{o} of") for o in args.only) if args.only else case.asked:
                continue
            case = replace(case, gather=args.gather)
            found = measure(name, case, device)
            lines += rows_of(name, found, case, alone.get(f"{name}: training, median"))
            compared(lines)
            if main_rank:
                launcher = ["torchrun", "--nproc-per-node", str(count_of)] if count_of > 1 else ["python"]
                write_results(out, shlex.join([*launcher, *sys.argv]), lines)


if __name__ == "__main__":
    main()
