"""`openling plan`: what a migration yields and costs, from config.json alone. Imports neither torch nor transformers.

A GQA model is taken as the teacher and its hybrid is planned; a model that is a hybrid already is described as it is, and
compared with a teacher where `--source` names one.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openling.config.load import override
from openling.config.migrate import MlaLayers, preset
from openling.config.presets import PRESETS
from openling.errors import UserError, nearest
from openling.migrate.layout import layout_reason, target_config
from openling.model import count
from openling.model.config import ModelConfig
from openling.model.families import read_config

CONTEXTS = (4096, 32768, 262144)  # the three context lengths of the published recipe
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Training:
    """A training job to size: mesh, tokens per sequence, sequences per GPU and step, bytes of one GPU."""

    mesh: count.Mesh = count.Mesh()
    seq_len: int = 4096
    micro_batch: int = 1
    gpu_bytes: int = 80_000_000_000


@dataclass(frozen=True)
class Figures:
    """The numbers of one model; the field names are the keys of `plan --json`. None where there is nothing to compare with.

    total_params is without MTP. Cache in BF16, Lightning states in FP32. FLOPs: forward, by context, see `forward_flops`.
    """

    total_params: int
    total_params_with_mtp: int
    active_params: int
    attention_share: float
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    break_even_tokens: int | None
    flops_per_token: dict[str, dict[str, int]]
    conversion_bytes_read: int | None
    conversion_bytes_written: int | None
    training_memory: dict[str, Any]

    def sequence_bytes(self, context: int) -> int:
        """Decoding memory of one sequence of `context` tokens."""
        return self.state_bytes_per_sequence + context * self.kv_bytes_per_token


@dataclass(frozen=True)
class Plan:
    """A model, its numbers, and those of the teacher it comes from (if known). `why` explains the layer groups."""

    config: ModelConfig
    figures: Figures
    source_config: ModelConfig | None
    source: Figures | None
    why: str

    def as_dict(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        names = ("layer_group_size", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "group_norm_size")
        kinds = {kind: self.config.layer_kinds.count(kind) for kind in ("lightning", "mla", "gqa")}
        layout = {"layers": kinds, **{name: getattr(self.config, name) for name in names}, "why": self.why}
        return {**asdict(self.figures), "layout": layout, "source": asdict(self.source) if self.source else None}


def plan(
    model_hf: dict[str, Any],
    source_hf: dict[str, Any] | None = None,
    *,
    training: Training | None = None,
    mla_layers: MlaLayers = "ling",
    group_size: int | None = None,
    kv_lora_rank: int | None = None,
    q_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
) -> Plan:
    """Numbers of the hybrid that `model_hf` (a config.json dict) is or would become.

    source_hf: the teacher of a model that is already a hybrid. The layout and its widths: see `target_config`; GQA models only.
    Raises UserError for configurations that cannot be read, migrated or laid out on the mesh.
    """
    training = training or Training()
    widths = {"kv_lora_rank": kv_lora_rank, "q_lora_rank": q_lora_rank, "qk_rope_head_dim": qk_rope_head_dim}
    layout: dict[str, Any] = {"group_size": group_size} | widths
    given = read_config(model_hf)
    if set(given.layer_kinds) == {"gqa"}:
        if source_hf is not None:
            raise UserError("MODEL is a GQA model, so it is itself the source", where="--source", expected="no --source")
        config = target_config(given, mla_layers=mla_layers, **layout)
        why = layout_reason(config.num_hidden_layers, mla_layers, group_size)
        return _compare(config, given, model_hf, training, why)
    asked = [name for name, value in layout.items() if value is not None] + ["layout"] * (mla_layers != "ling")
    if asked:
        flags = ", ".join("--" + name.replace("_", "-") for name in asked)
        raise UserError("MODEL is already a hybrid: its layout is given", where=flags, expected="a GQA model to plan for")
    why = f"the model's own layout, groups of {given.layer_group_size}" if given.layer_group_size else "the model's own layout"
    if source_hf is None:
        return Plan(given, _figures(given, training), None, None, why)
    source = read_config(source_hf)
    if set(source.layer_kinds) != {"gqa"}:
        raise UserError(
            "the source of a hybrid is a GQA model", where="--source", value=", ".join(sorted(set(source.layer_kinds)))
        )
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if getattr(given, name) != getattr(source, name):
            raise UserError(
                "this cannot be the teacher of that hybrid",
                where=f"--source: {name}",
                value=getattr(source, name),
                expected=getattr(given, name),
            )
    return _compare(given, source, source_hf, training, why)


def _compare(c: ModelConfig, source: ModelConfig, source_hf: dict[str, Any], training: Training, why: str) -> Plan:
    # BF16 where config.json does not say.
    stored_bytes = DTYPE_BYTES.get(str(source_hf.get("dtype") or source_hf.get("torch_dtype")), 2)
    return Plan(c, _figures(c, training, source, stored_bytes), source, _figures(source, training), why)


def _figures(c: ModelConfig, training: Training, source: ModelConfig | None = None, stored_bytes: int = 2) -> Figures:
    """All numbers of `c`; those that compare need `source`."""
    # Only a model of the same outline can be a conversion of the source.
    outline = source and all(
        getattr(c, name) == getattr(source, name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")
    )
    moved = count.conversion_bytes(source, c, stored_bytes) if source and outline else None
    flops = {context: count.forward_flops(c, context) for context in CONTEXTS}
    total = count.total_parameters(c)
    return Figures(
        total_params=total,
        total_params_with_mtp=count.total_parameters(c, mtp=True),
        active_params=count.active_parameters(c),
        attention_share=count.attention_parameters(c) / total,
        kv_bytes_per_token=count.kv_bytes_per_token(c),
        state_bytes_per_sequence=count.state_bytes_per_sequence(c),
        break_even_tokens=count.break_even_tokens(c, source) if source else None,
        flops_per_token={str(context): asdict(f) | {"total": f.total} for context, f in flops.items()},
        conversion_bytes_read=moved.read if moved else None,
        conversion_bytes_written=moved.written if moved else None,
        training_memory=_training_memory(c, training),
    )


def _training_memory(c: ModelConfig, training: Training) -> dict[str, Any]:
    """Bytes per GPU by part, whether they fit, and on how many GPUs of the same kind they would."""
    mesh, sizes = training.mesh, {"seq_len": training.seq_len, "micro_batch": training.micro_batch}
    memory = count.training_memory(c, mesh, **sizes)
    dp = count.smallest_data_parallel(c, mesh, training.gpu_bytes, **sizes)
    return {
        **asdict(mesh),
        **sizes,
        "bytes_per_gpu": asdict(memory) | {"total": memory.total},
        "gpu_bytes": training.gpu_bytes,
        "fits": memory.total <= training.gpu_bytes,
        "fits_from_gpus": dp * mesh.tp * mesh.pp if dp else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, model_optional: bool = False) -> None:
    """Flags of `openling plan` for a migration. model_optional: whether other flags may make MODEL superfluous."""
    known = f"checkpoint folder, config.json, or a preset: {', '.join(PRESETS)}"
    parser.add_argument("model", metavar="MODEL", nargs="?" if model_optional else None, help=known)
    parser.add_argument("--source", metavar="MODEL", help="the GQA teacher to compare with, when MODEL is a hybrid already")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    layout = parser.add_argument_group("layout of the hybrid (default: as Ling-2.6, scaled)")
    layout.add_argument("--layout", default="ling", metavar="ling|selected|none|I,J,..", help="layers that become MLA")
    layout.add_argument("--group-size", type=int, help="layers per group: one MLA layer, the others Lightning")
    layout.add_argument("--kv-lora-rank", type=int, help="width of the cached latent")
    layout.add_argument("--q-lora-rank", type=int, help="rank of the query projection")
    training = parser.add_argument_group("training memory")
    training.add_argument("--dp", type=int, default=1, help="GPUs that share data and shard everything (FSDP)")
    training.add_argument("--tp", type=int, default=1, help="tensor-parallel GPUs")
    training.add_argument("--pp", type=int, default=1, help="pipeline stages")
    training.add_argument("--ep", type=int, default=1, help="expert-parallel GPUs, taken from dp x tp")
    training.add_argument("--seq-len", type=int, default=4096, help="tokens per sequence")
    training.add_argument("--micro-batch", type=int, default=1, help="sequences per GPU at a time")
    training.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU, 1 GB = 10^9 bytes (default: 80)")


def run(args: argparse.Namespace) -> int:
    """Print the plan; the exit code is 0, mistakes are raised as UserError."""
    started = time.perf_counter()
    args.gpu_memory = 80.0 if args.gpu_memory is None else args.gpu_memory
    for name in ("seq_len", "micro_batch", "gpu_memory"):
        if not 0 < getattr(args, name) < float("inf"):
            flag = "--" + name.replace("_", "-")
            raise UserError("this has to be positive", where=flag, value=getattr(args, name), expected="a positive number")
    mesh = count.Mesh(args.dp, args.tp, args.pp, args.ep)
    words = [f"--layout.mla_layers={args.layout}"]
    words += [f"--layout.group_size={args.group_size}"] if args.group_size is not None else []
    result = plan(
        load_config(args.model),
        load_config(args.source) if args.source else None,
        training=Training(mesh, args.seq_len, args.micro_batch, int(args.gpu_memory * 1e9)),
        mla_layers=override(preset("best", stages=("lightning",)), words).layout.mla_layers,
        group_size=args.group_size,
        kv_lora_rank=args.kv_lora_rank,
        q_lora_rank=args.q_lora_rank,
    )
    if args.json:
        print(json.dumps({"model": args.model, **result.as_dict(), "seconds": time.perf_counter() - started}, indent=2))
        return 0
    show(result, args.model, args.source, time.perf_counter() - started)
    return 0


def load_config(model: str) -> dict[str, Any]:
    """The config.json dict of a checkpoint folder, a config.json or a preset; UserError for anything else."""
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError("this folder holds no checkpoint", where=model, expected="a config.json in it")
    elif not path.is_file():
        if model.lower() in PRESETS:
            return PRESETS[model.lower()]()
        raise UserError(
            "no such model",
            value=model,
            expected=f"a checkpoint folder, a config.json, or one of {', '.join(PRESETS)}",
            nearest=nearest(model.lower(), PRESETS),
        )
    try:
        hf = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            "this file cannot be read as JSON", where=path, value=error, expected="a Hugging Face config.json"
        ) from error
    if not isinstance(hf, dict):
        raise UserError("this file holds no configuration", where=path, value=type(hf).__name__, expected="a JSON object")
    return hf


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def show(result: Plan, name: str, source_name: str | None = None, seconds: float = 0.0) -> None:
    """The plan as tables for a reader who has never seen the model."""
    c, console = result.config, Console(highlight=False)
    heading = f"{name} as a hybrid" if result.source and source_name is None else name
    against = f", against its teacher {source_name}" if source_name else ""
    console.print(f"\n[bold]{escape(heading)}[/bold]: {_layers(c)}{escape(against)}")
    console.print(f"[dim]{_layout_line(result)}[/dim]\n")
    console.print(_model_table(result))
    _show_training(console, result.figures.training_memory)
    if result.figures.conversion_bytes_read is not None:
        read, written = (_bytes(x or 0) for x in (result.figures.conversion_bytes_read, result.figures.conversion_bytes_written))
        console.print(f"Conversion reads {read} and writes {written} of tensors; every other tensor stays as it is.")
    if result.source_config and result.source_config.tie_word_embeddings and not c.tie_word_embeddings:
        size = _count(c.vocab_size * c.hidden_size)
        console.print(f"The hybrid's LM head is a copy of the embeddings (+{size}): serving engines cannot share them here.")
    console.print(
        f"[dim]Cache in BF16, states in FP32. FLOPs: forward pass at that position (share of attention). {seconds:.1f} s.[/dim]\n"
    )


def _layers(c: ModelConfig) -> str:
    names = {"lightning": "Lightning", "mla": "MLA", "gqa": "GQA"}
    return " + ".join(f"{c.layer_kinds.count(kind)} {text}" for kind, text in names.items() if kind in c.layer_kinds) + " layers"


def _layout_line(result: Plan) -> str:
    c = result.config
    parts = [result.why[0].upper() + result.why[1:]]
    if "mla" in c.layer_kinds:
        query = f"query rank {c.q_lora_rank}, " if c.q_lora_rank else ""
        parts.append(f"MLA: {query}latent {c.kv_lora_rank} + {c.qk_rope_head_dim} rotated dims per token")
    if "lightning" in c.layer_kinds:
        parts.append(f"Lightning: {c.num_attention_heads} heads, {c.group_norm_size} norm groups")
    return "\n".join(parts)


def _model_table(result: Plan) -> Table:
    """One row per number; teacher, hybrid and their ratio where a teacher is known."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    columns = [result.figures] if result.source is None else [result.source, result.figures]
    if result.source is not None:
        table.add_column("teacher", justify="right")
    table.add_column("hybrid", justify="right", style="bold")
    if result.source is not None:
        table.add_column("hybrid / teacher", justify="right", style="cyan")

    def row(label: str, texts: list[str], values: list[int] | None = None) -> None:
        ratio = [_ratio(*values)] if values and len(values) == 2 else []
        table.add_row(label, *texts, *ratio)

    def bytes_row(label: str, values: list[int]) -> None:
        row(label, [_bytes(value, 1024) if value else "-" for value in values], values)

    total, active = [f.total_params for f in columns], [f.active_params for f in columns]
    with_mtp = [f.total_params_with_mtp for f in columns]
    row("Parameters", [_count(x) for x in total], total)
    if with_mtp != total:
        row("  with multi-token prediction", [_count(x) for x in with_mtp])
    row("  active per token", [_count(x) for x in active], active)
    row("  in attention", [f"{f.attention_share:.1%}" for f in columns])
    table.add_row()
    bytes_row("Cache per token", [f.kv_bytes_per_token for f in columns])
    bytes_row("State per sequence", [f.state_bytes_per_sequence for f in columns])
    for context in CONTEXTS:
        bytes_row(f"One sequence of {context // 1024}K tokens", [f.sequence_bytes(context) for f in columns])
    if result.source is not None:
        at = result.figures.break_even_tokens
        row("  below the teacher's from", ["", "never" if at is None else f"{at:,} tokens"])
    table.add_row()
    for context in CONTEXTS:
        parts = [f.flops_per_token[str(context)] for f in columns]
        texts = [f"{x['total'] / 1e9:,.4g} G ({x['attention'] / x['total']:.0%})" for x in parts]
        row(f"FLOPs per token at {context // 1024}K", texts, [x["total"] for x in parts])
    return table


def _show_training(console: Console, memory: dict[str, Any]) -> None:
    """What one GPU holds while every parameter trains."""
    parts = {name: value for name, value in memory["bytes_per_gpu"].items() if value}
    gpus = memory["dp"] * memory["tp"] * memory["pp"]
    shape = ", ".join(f"{axis} {memory[axis]}" for axis in ("dp", "tp", "pp", "ep") if memory[axis] > 1)
    on = f"{gpus:,} GPUs ({shape})" if gpus > 1 else "1 GPU"
    console.print(
        f"\n[bold]Training[/bold] all parameters, {memory['micro_batch']} x {memory['seq_len']:,} tokens on {on}, per GPU"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row(*map(_bytes, parts.values()))
    console.print(table)
    size = _bytes(memory["gpu_bytes"])
    if memory["fits"]:
        console.print(f"[green]Fits[/green] in {size}.\n")
    elif memory["fits_from_gpus"]:
        console.print(f"[red]Does not fit[/red] in {size}; with --dp raised, it does from {memory['fits_from_gpus']:,} GPUs.\n")
    else:
        console.print(
            f"[red]Does not fit[/red] in {size}, whatever --dp: split the layers (--pp) or what is in them (--tp, --ep).\n"
        )


def _count(value: int) -> str:
    return f"{value / 1e9:,.3f} B" if value >= 1e9 else f"{value / 1e6:,.3f} M"


def _bytes(value: float, base: int = 1000) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"] if base == 1024 else ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= base and len(units) > 1:
        value, units = value / base, units[1:]
    return f"{value:,.4g} {units[0]}"


def _ratio(old: int, new: int) -> str:
    if not old or not new:
        return ""
    return f"{old / new:.1f}x less" if new < 0.95 * old else f"{new / old:.2f}x"
