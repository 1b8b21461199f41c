"""`openling convert`: a conversion from folder to folder that never holds the model, and a folder's format."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path
from typing import Any, Literal

from openling.commands.migrate import open_console, settings
from openling.config.migrate import MigrateConfig
from openling.errors import UserError, nearest

STAGES = ("lightning", "mla")
FORMATS = ("hybrid", "hf", "dcp")
# Of a migration's settings those that a conversion reads; `stages` are --stage.
READ, UNREAD = ("--layout.", "--conversion.", "--text.", "--seed"), ("--text.evaluation",)
# The one score of layers that reads them one by one, as a conversion does.
DEFAULTS = ("--conversion.layer_score", "local")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling convert`; `seed` and the fields of `layout`, `conversion` and `text` can be set too."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="checkpoint folder (only read)")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder; OUT.run beside it keeps the journal")
    parser.add_argument(
        "--to", default="hybrid", metavar="hybrid|hf|dcp", help="hybrid (default): new attention; hf, dcp: a format"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--copy", action="store_true", help="a folder of its own, clean of replaced tensors (default)")
    how.add_argument("--link", action="store_true", help="share untouched shards with SOURCE; only new attention is written")
    parser.add_argument("--stage", metavar="STAGE", help="lightning or mla; default: both, or what is left")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="fit without text: reads the attention tensors alone, so that NaNs elsewhere stay unseen",
    )
    parser.add_argument("--preset", default="best", metavar="best|paper", help="ours (default), or the report's procedure")
    parser.add_argument("--group-size", type=int, metavar="G", help="layers per MLA layer (default 8, or the nearest divisor)")
    parser.add_argument(
        "--layout", metavar="ling|selected|none|I,J,..",
        help="layers that become MLA (default: as Ling-2.6; selected: those of the largest error as Lightning, by themselves)",
    )  # fmt: skip
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="calibration text: names, paths, built corpora")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument(
        "--memory", type=float, default=4, metavar="GIB",
        help="byte budget (default 4): what a fit leaves of it lets experts be read fewer times",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT.run, or take part in it")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, from the headers, and stop")
    parser.set_defaults(takes_overrides=True, tokens=1, eval_text=None)


def run(args: argparse.Namespace) -> int:
    """Convert; exit code 0."""
    if args.to not in FORMATS:
        close = nearest(args.to, FORMATS)
        raise UserError("unknown format", where="--to", value=args.to, expected=", ".join(FORMATS), nearest=close)
    if args.stage is not None and args.stage not in STAGES:
        close = nearest(args.stage, STAGES)
        raise UserError("unknown stage", where="--stage", value=args.stage, expected=", ".join(STAGES), nearest=close)
    return _hybrid(args) if args.to == "hybrid" else _format(args)


def _flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def _format(args: argparse.Namespace) -> int:
    """The same tensors as safetensors or DCP; a safetensors folder to `hf` becomes a clean copy, with nothing stale."""
    from openling.weights.dcp import METADATA, from_dcp, to_dcp
    from openling.weights.io import check_outside
    from openling.weights.linked import copy_folder

    if unread := [flag for flag in _flags(shlex.split(args.command)) if flag not in ("--to", "--copy", "--")]:
        what, plain = "a change of format takes no such flags", f"openling convert SOURCE OUT --to {args.to}"
        raise UserError(what, where=f"--to {args.to}", value=", ".join(unread), expected=plain)
    check_outside(args.out, args.source)
    if args.to == "dcp":
        out = to_dcp(args.source, args.out)
    else:
        out = (from_dcp if (args.source / METADATA).exists() else copy_folder)(args.source, args.out)
    open_console(stderr=True).print(f"Written: {out}", highlight=False, soft_wrap=True)
    return 0


def _hybrid(args: argparse.Namespace) -> int:
    from openling.migrate.stream import Job, check_place, check_walk, convert_folder
    from openling.model.device import pick_device

    device = pick_device(args.device)
    config = _with_stages(settings(args, DEFAULTS), args)
    if unread := [flag for flag in _flags(args.overrides) if not flag.startswith(READ) or flag.startswith(UNREAD)]:
        expected = ", ".join(name + ("FIELD" if name.endswith(".") else "") for name in READ)
        what = "a conversion does not read these settings"
        raise UserError(what, value=", ".join(unread), expected=expected, next="openling migrate, or leave them out")
    if not 0 < args.memory < 1 << 20:
        raise UserError("this is no amount of memory", where="--memory", value=args.memory, expected="GiB above 0, such as 4")
    memory = int(args.memory * 2**30)
    check_walk(config)
    selects = config.layout.mla_layers == "selected" and "lightning" in config.stages
    if selects:
        _check_selection(config, weights_only=args.weights_only)
    check_place(args.source, args.out, resume=args.resume)
    windows = None if args.weights_only else calibration(args.source, config, device)
    if args.dry_run:
        batches = None if windows is None else [w.numel() for w in windows]
        print(dry_run(args.source, args.out, config, "link" if args.link else "copy", batches, memory=memory))
        return 0
    console = open_console(stderr=True)
    if selects:
        layers = _selected(args, config, windows, device, memory)
        if layers is not None:
            console.print(f"MLA in layers {', '.join(map(str, layers))}", highlight=False)
            config = config.model_copy(update={"layout": config.layout.model_copy(update={"mla_layers": layers})})
    job = Job(args.source, args.out, config, "link" if args.link else "copy", windows, device, memory)
    report = convert_folder(job, resume=args.resume, say=lambda text: console.print(text, highlight=False))
    for name, value in report.items():
        if isinstance(value, (int, float)):
            text = f"{value / 1e9:.3f} GB" if "bytes" in name else f"{value:.1f}"
            console.print(f"{name.removesuffix(' bytes')}: {text}", highlight=False)
    check = f"openling verify {shlex.quote(str(args.source))} {shlex.quote(str(args.out))}"
    console.print(f"\nHybrid: {args.out}\nCheck:  {check}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _check_selection(config: MigrateConfig, *, weights_only: bool) -> None:
    """A UserError where layers cannot be selected from a folder."""
    from openling.migrate.select import check_score

    check_score(config.conversion.layer_score, in_memory=False)
    if weights_only:
        what = "layers are selected by what they do to text"
        raise UserError(what, where="--weights-only", next="leave it out, or --layout I,J,..")


def _selected(
    args: argparse.Namespace, config: MigrateConfig, windows: list[Any] | None, device: Any, memory: int
) -> tuple[int, ...] | None:
    """The most sensitive layers: those that a run to be resumed began with (None: it selected none), or measured in a walk."""
    from openling.migrate.journal import run_folder
    from openling.migrate.layout import target_config
    from openling.migrate.memory import room
    from openling.migrate.select import select_layers
    from openling.migrate.stack import FolderStack
    from openling.migrate.stream import outline
    from openling.ops.cpu import half_products

    begun = run_folder(args.out.absolute()) / "job.json"
    if begun.exists():
        layers = json.loads(begun.read_text())["settings"]["layout"]["mla_layers"]
        return tuple(layers) if isinstance(layers, list) else None
    assert windows is not None
    plan = outline(args.source, config, "copy")
    source = FolderStack(plan.opened, device, room=room(plan, max(w.numel() for w in windows), memory))
    target = target_config(plan.opened.config, **config.layout.model_dump())
    return select_layers(source, target, windows, config.conversion, seed=config.seed, bf16=half_products(device)).layers


def dry_run(
    source: Path,
    out: Path,
    config: MigrateConfig,
    mode: Literal["link", "copy"],
    batches: list[int] | None,
    *,
    streamed: bool = True,
    **budget: int,
) -> str:
    """What a conversion would do, in words. Writes nothing but a short-lived file that measures the disk."""
    from openling.migrate.estimate import estimate, say
    from openling.weights.io import CheckpointReader

    beside = next(folder for folder in out.absolute().parents if folder.is_dir())
    found = estimate(source, config, mode, beside=beside, batches=batches, **budget)
    reader = CheckpointReader(source)
    values = sum(math.prod(reader.shape(name)) for name in reader.names())
    return say(found, streamed=streamed, total_bytes=4 * values)


def _with_stages(config: MigrateConfig, args: argparse.Namespace) -> MigrateConfig:
    """Both stages, the one that was asked for, or the second where the source has been through the first."""
    from openling.model.families import read_config
    from openling.weights.io import read_hf_config

    found = read_config(read_hf_config(args.source), where=args.source / "config.json")
    left = STAGES if set(found.layer_kinds) == {"gqa"} else STAGES[1:]
    left = STAGES[:1] if args.layout == "none" else left
    return config.model_copy(update={"stages": (args.stage,) if args.stage else left})


def calibration(source: Path, config: MigrateConfig, device: Any) -> list[Any]:
    """The calibration text's batches of windows, as `openling migrate` cuts them."""
    import numpy as np
    import torch

    from openling.data.pack import cut_windows
    from openling.migrate.pipeline import WINDOWS_PER_BATCH
    from openling.migrate.texts import training_tokens
    from openling.model.families import read_config
    from openling.weights.folder import load_tokenizer
    from openling.weights.io import read_hf_config

    model, text = read_config(read_hf_config(source)), config.text
    tokenizer = load_tokenizer(source, model)
    if tokenizer is None:
        raise UserError(
            "calibration needs the model's tokenizer",
            where=source,
            expected="tokenizer.json",
            next="copy it there, or --weights-only",
        )
    tokens = training_tokens(text, tokenizer, vocab_size=model.vocab_size, max_tokens=text.calibration_tokens)
    windows = cut_windows(tokens, text.sequence_length, where="calibration text")
    return list(torch.from_numpy(windows.astype(np.int64)).to(device).split(WINDOWS_PER_BATCH))
