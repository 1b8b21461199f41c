"""Streaming conversion of synthetic Ling-2.0-shaped checkpoints: rates beside the disk's own, bytes moved, memory, equality.

    python benchmarks/streaming.py WORK_FOLDER [1|10|40|wide|memory|1t]   # GB, twice that must be free; writes a results file

Weights are made up (one random block, repeated), BF16. At 40 GB the experts of the later half of the layers are zeros, holes in
the files: neither the peer nor we read them, both write them. The peer's rate and ours are medians of `ROUNDS` turns, one after
the other, cold cache for every read. Every conversion runs in a process of its own, whose peak memory it is. `wide` is two dense
layers with the attention of Ling-2.0-1T, of which one becomes Lightning and one MLA: what a fit takes there. `memory` is two MoE
layers of a quarter of its widths: peak memory beside the estimate, by tokens of a batch. `1t` are the headers of Ling-2.0-1T over
holes: what --dry-run says of it, by budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from openling.config.migrate import preset
from openling.config.presets import PRESETS
from openling.environment import peak_memory, write_results
from openling.migrate.estimate import estimate
from openling.migrate.pipeline import WINDOWS_PER_BATCH
from openling.migrate.stream import Job, convert_folder, outline
from openling.model.config import LING_ARCHITECTURE, ModelConfig
from openling.model.ling import Ling
from openling.weights.files import copy_range
from openling.weights.io import CheckpointReader, FolderWriter
from openling.weights.names import bind

RESULTS = Path(__file__).parent / "results" / "migration"
# Layers, routed experts, bytes of a shard.
SIZES = {
    "1": (8, 16, 128 << 20),
    "10": (8, 192, 1 << 30),
    "40": (24, 256, 4 << 30),
    "wide": (2, 8, 1 << 30),
    "memory": (2, 8, 1 << 30),
}
SPARSE_FROM = {"40": 12}  # experts of layers from here on are holes
WIDE = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "first_k_dense_replace": 2}
QUARTER = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "first_k_dense_replace": 0, "n_group": 1}
# Windows, tokens of each, windows of a batch; none: without text.
BATCHES = {"": None, "1024": (4, 512, 2), "4096": (16, 512, 8), "8192": (16, 1024, 8)}
ROUNDS = 3
EMBEDDINGS = 157_184 * 8192 * 2  # bytes of the largest tensor of Ling-2.0-1T
BLOCK = 16 << 20
MEMORY_GOAL = 4 * 2**30
TEXT = {"sequence_length": 512, "calibration_tokens": 8192}


def shape(layers: int, experts: int) -> dict[str, Any]:
    """config.json of a small Ling-2.0: the mini model's widths."""
    return {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "num_experts": experts,
        "num_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "torch_dtype": "bfloat16",
    }


def generate(folder: Path, size: str) -> None:
    """Write the checkpoint."""
    from openling.model.families import read_config

    layers, experts, shard_bytes = SIZES[size]
    hf = shape(layers, experts) | {"wide": WIDE, "memory": QUARTER | {"topk_group": 1}}.get(size, {})
    config: ModelConfig = read_config(hf)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Ling(config).state_dict().items()}
    block = (0.02 * torch.randn((1 << 24) + 997, generator=torch.Generator().manual_seed(0))).bfloat16()
    offset = 0
    with FolderWriter(folder, shard_bytes=shard_bytes) as writer:
        for binding in bind(LING_ARCHITECTURE, config, shapes):
            for name, piece in zip(binding.theirs, binding.piece_shapes(shapes[binding.ours]), strict=True):
                if ".experts." in name and int(name.split(".")[2]) >= SPARSE_FROM.get(size, layers):
                    writer.add(name, torch.zeros(piece, dtype=torch.bfloat16))
                    continue
                count = piece.numel()
                offset = (offset + 104729) % 997
                values = block[offset : offset + (1 << 24)].repeat(-(-count // (1 << 24)))[:count].view(piece)
                writer.add(name, (1 + values if "norm" in name else values).clone())
        writer.add_file("config.json", json.dumps(hf))
    if size in SPARSE_FROM:
        for shard in folder.glob("*.safetensors"):
            subprocess.run(["fallocate", "--dig-holes", shard], check=True)


def headers(folder: Path) -> None:
    """Ling-2.0-1T's shards of 10 GB: headers, and holes for the values."""
    from openling.model.families import read_config

    hf = PRESETS["ling-1t"]()
    config = read_config(hf)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Ling(config).state_dict().items()}
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for binding in bind(LING_ARCHITECTURE, config, shapes):
        for name, piece in zip(binding.theirs, binding.piece_shapes(shapes[binding.ours]), strict=True):
            begin, end = (0 if end > 10**10 else end), (0 if end > 10**10 else end) + 2 * piece.numel()
            if not begin and shards[-1]:
                shards.append({})
            shards[-1][name] = {"dtype": "BF16", "shape": list(piece), "data_offsets": [begin, end]}
    folder.mkdir()
    for i, tensors in enumerate(shards):
        text = json.dumps(tensors).encode()
        with (folder / f"model-{i:05d}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(t["data_offsets"][1] for t in tensors.values()))
    index = {name: f"model-{i:05d}.safetensors" for i, tensors in enumerate(shards) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(hf))


def dry_rows(source: Path) -> list[dict[str, Any]]:
    """What is said of 1T, at the default calibration text, by budget."""
    rows: list[dict[str, Any]] = []
    config = preset("best", stages=("lightning", "mla"))
    batch = WINDOWS_PER_BATCH * config.text.sequence_length
    for gib in (4, 16, 64):
        begun = time.perf_counter()
        batches = [batch] * (config.text.calibration_tokens // batch)
        said = estimate(source, config, "link", beside=source, batches=batches, memory=gib << 30)
        seconds = time.perf_counter() - begun
        rows += [
            {"name": f"--memory {gib}: read for the fits", "value": said.read_for_fits, "unit": "bytes", "seconds": seconds},
            {"name": f"--memory {gib}: peak memory", "value": said.peak_memory, "unit": "bytes"},
        ]
    return [*rows, {"name": "new attention", "value": said.written, "unit": "bytes"}]


def name_of(size: str) -> str:
    """As files are named: 1gb, wide."""
    return f"{size}gb" if size.isdecimal() else size


def forget(folder: Path) -> None:
    """Drop the folder's files from the system's cache, so that they are read from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk(source: Path, place: Path) -> dict[str, float]:
    """Bytes per second of the disk: a sequential write, and a cold read of all shards."""
    shards = sorted(source.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in shards)
    data = os.urandom(BLOCK)
    begun = time.perf_counter()
    with (place / "written").open("wb") as file:
        for _ in range(total // BLOCK):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    write = total / (time.perf_counter() - begun)
    (place / "written").unlink()
    forget(source)
    begun = time.perf_counter()
    for path in shards:
        with path.open("rb", buffering=0) as file:
            while file.readinto(bytearray(BLOCK)):
                pass
    return {"write": write, "read": total / (time.perf_counter() - begun)}


def plain_copy(source: Path, place: Path) -> float:
    """Bytes per second of `dd`, one shard after the other."""
    forget(source)
    begun, total = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["dd", f"if={path}", f"of={place / 'copied'}", "bs=16M", "conv=fsync"], check=True, capture_output=True)
        total += path.stat().st_size
    (place / "copied").unlink()
    return total / (time.perf_counter() - begun)


def moved_alone(source: Path, place: Path) -> float:
    """Bytes per second of our copying, hashes included, fits not, one file after the other."""
    forget(source)
    begun, total = time.perf_counter(), 0
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file, (place / "moved").open("w+b") as out:
            size = path.stat().st_size
            copy_range(file.fileno(), out.fileno(), 0, size, hashlib.sha256(), path)
            os.fsync(out.fileno())
            total += size
    (place / "moved").unlink()
    return total / (time.perf_counter() - begun)


def settings() -> Any:
    """Preset `best`, a little calibration."""
    return preset("best", stages=("lightning", "mla"), text=TEXT)


def windows(count: int = 2, length: int = 256, batch: int = 1) -> list[torch.Tensor]:
    """Calibration token ids."""
    ids = torch.randint(32000, (count, length), generator=torch.Generator().manual_seed(0))
    return list(ids.split(batch))


def io_bytes() -> dict[str, int]:
    """What this process has read and written by system calls."""
    pairs = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def part(source: Path, out: Path, mode: str, text: str) -> None:
    """One conversion; prints its report. Runs in a process of its own."""
    before, resting = io_bytes(), peak_memory()
    shape = BATCHES.get(text) or ()
    job = Job(source, out, settings(), "link" if mode == "link" else "copy", windows(*shape) if shape or text == "text" else None)
    report = convert_folder(job, resume=False)
    after = io_bytes()
    report |= {"bytes read": after["rchar"] - before["rchar"], "bytes written": after["wchar"] - before["wchar"]}
    report["resting bytes"] = resting
    report.pop("approximations")
    print(json.dumps(report))


def converted(source: Path, out: Path, mode: str, text: str = "no text") -> dict[str, Any]:
    """`part` in its own process, cold."""
    for folder in (out, out.with_name(out.name + ".run")):
        shutil.rmtree(folder, ignore_errors=True)
    forget(source)
    words = [sys.executable, __file__, "--part", str(source), str(out), mode, text]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def equal_to_memory(source: Path, out: Path) -> bool:
    """Whether the streamed result with calibration text is that of the whole model in memory, bit for bit."""
    from openling.migrate.convert import to_lightning, to_mla
    from openling.migrate.layout import lightning_stage, mla_stage
    from openling.migrate.touched import round_to
    from openling.ops.cpu import half_products
    from openling.weights.folder import load

    config = settings()
    loaded, layout = load(source), config.layout.model_dump()
    model = loaded.model.float()
    quiet: dict[str, Any] = {"on_layer": lambda i: None, "bf16": half_products(torch.device("cpu"))}
    model, _ = to_lightning(model, lightning_stage(loaded.config, layout), windows(), config.conversion, seed=0, **quiet)
    round_to(model, torch.bfloat16)
    model, _ = to_mla(model, mla_stage(model.config, layout), windows(), config.conversion, **quiet)
    state, reader = model.state_dict(), CheckpointReader(out)
    new = outline(source, config, "copy").new
    return all(torch.equal(state[name].bfloat16(), reader.read(name)) for name in new)


def plan_seconds() -> float:
    """`openling plan ling-1t`, start of Python included."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "openling.cli", "plan", "ling-1t"], check=True, capture_output=True)
    return time.perf_counter() - begun


def at_least(name: str, value: float, unit: str, goal: float, **more: Any) -> dict[str, Any]:
    """A row whose goal is a lower bound."""
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": value >= goal, **more}


def at_most(name: str, value: float, unit: str, goal: float, **more: Any) -> dict[str, Any]:
    """A row whose goal is an upper bound."""
    return {"name": name, "value": value, "unit": unit, "goal": goal, "met": value <= goal, **more}


def memory_rows(source: Path, out: Path) -> Iterator[list[dict[str, Any]]]:
    """Peak memory beside what `--dry-run` says, by tokens of a batch."""
    for tokens, shape in BATCHES.items():
        batches = None if shape is None else [w.numel() for w in windows(*shape)]
        said = estimate(source, settings(), "link", beside=out.parent, batches=batches).peak_memory
        done = converted(source, out, "link", tokens)
        value = done["peak memory bytes"] - done["resting bytes"]
        name = f"peak memory beyond Python and torch, batches of {tokens} tokens" if tokens else "the same without text"
        yield [{"name": name, "value": value, "unit": "bytes", "peer": "--dry-run", "peer_value": said, "ratio": value / said}]


def measure(work: Path, size: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of one size, a few at a time."""
    source, out = work / f"ling-{name_of(size)}", work / "out"
    if not source.exists():
        (headers(source) if size == "1t" else generate(source, size))
    if size == "1t":
        yield dry_rows(source)
        return
    if size == "memory":
        yield from memory_rows(source, out)
        return
    if size == "wide":
        linked = converted(source, out, "link")
        yield [
            {"name": "link mode without text, time", "value": linked["seconds"], "unit": "s"},
            at_most("link mode without text, peak memory", linked["peak memory bytes"], "bytes", MEMORY_GOAL + 2 * EMBEDDINGS),
        ]
        return
    yield [{"name": f"disk, sequential {name}", "value": rate, "unit": "bytes/s"} for name, rate in disk(source, work).items()]
    turns = [(plain_copy(source, work), converted(source, out, "copy")) for _ in range(ROUNDS)]
    peer = statistics.median(plain for plain, _ in turns)
    rates = [(c["bytes copied"] + c["bytes of new layers"]) / c["seconds"] for _, c in turns]
    rate = statistics.median(rates)
    beside: dict[str, Any] = {"peer": "dd bs=16M conv=fsync of the same shards", "peer_value": peer, "ratio": rate / peer}
    beside |= {"turns": [[plain, ours] for (plain, _), ours in zip(turns, rates, strict=True)]}
    yield [at_least("copy mode, fits included", rate, "bytes/s", 0.85 * peer, **beside)]
    alone = moved_alone(source, work)
    beside = {"peer": beside["peer"], "peer_value": peer, "ratio": alone / peer}
    yield [at_least("copying of copy mode alone, with hashes", alone, "bytes/s", 0.85 * peer, **beside)]
    yield [at_most("copy mode, peak memory", max(c["peak memory bytes"] for _, c in turns), "bytes", MEMORY_GOAL)]
    linked = converted(source, out, "link")
    both = linked["bytes of old attention"] + linked["bytes of new layers"]
    total = linked["bytes read"] + linked["bytes written"]
    about = {"peer": "old + new attention", "peer_value": both, "ratio": total / both}
    yield [
        {"name": "link mode, time", "value": linked["seconds"], "unit": "s"},
        at_most("link mode without text, bytes read and written", total, "bytes", 1.1 * both, **about),
        at_most("link mode without text, peak memory", linked["peak memory bytes"], "bytes", MEMORY_GOAL),
    ]
    walked = converted(source, out, "link", "text")
    yield [
        {"name": "link mode with 512 tokens of text, time", "value": walked["seconds"], "unit": "s"},
        at_most("link mode with text, peak memory", walked["peak memory bytes"], "bytes", MEMORY_GOAL),
    ]
    if size == "1":
        yield [at_least("streamed and in-memory results equal bit for bit", equal_to_memory(source, out), "", 1)]
    yield [at_most("plan for 1T", plan_seconds(), "s", 10)]


def main() -> int:
    """Measure one size and write its results."""
    if sys.argv[1] == "--part":
        part(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
        return 0
    work, size = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "1"
    work.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"streaming-{name_of(size)}.json"
    rows: list[dict[str, Any]] = []
    for more in measure(work, size):
        rows += more
        for row in more:
            print(row, flush=True)
        write_results(path, f"python benchmarks/streaming.py WORK_FOLDER {size}", rows)
    for name in (f"ling-{name_of(size)}", "out", "out.run"):
        shutil.rmtree(work / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
