"""`openling migrate`: the flags, what the terminal shows while it runs, and the report."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openling.config.load import override
from openling.config.migrate import GATES_AFTER, STAGES, MigrateConfig, preset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling migrate`; any field of the settings can be set too, as --section.field value."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder of the GQA teacher (only read)")
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the hybrid; OUT.run beside it keeps the run")
    parser.add_argument("--preset", default="best", metavar="best|paper", help="ours (default), or the report's procedure")
    parser.add_argument("--stage", metavar="STAGE", help=f"one of {', '.join(STAGES)}; default: all, in this order")
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="the GQA teacher, where MODEL is converted in part")
    parser.add_argument(
        "--tokens",
        type=int,
        default=1_000_000,
        metavar="N",
        help="tokens per warm-up, rounded up to whole steps (default 1,000,000)",
    )
    parser.add_argument("--group-size", type=int, metavar="G", help="layers per MLA layer (default 8, or the nearest divisor)")
    parser.add_argument("--layout", metavar="ling|selected|none|I,J,..", help="layers that become MLA (default: as Ling-2.6)")
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="to calibrate and train on: names, paths, built corpora")
    parser.add_argument("--eval-text", nargs="+", metavar="[NAME=]TEXT", help="held-out text, another domain: the same")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT.run")
    parser.add_argument("--dry-run", action="store_true", help="print every setting and what would be done, and stop")
    parser.epilog = "Any setting that --dry-run prints can be set too, e.g. --linear_warmup.train.lr 1e-4."
    parser.set_defaults(takes_overrides=True)


def settings(args: argparse.Namespace, defaults: Sequence[str] = ()) -> MigrateConfig:
    """The resolved configuration: preset, `defaults`, flags, then `--section.field value` overrides."""
    from openling.errors import UserError, nearest

    if args.stage is not None and args.stage not in STAGES:
        close = nearest(args.stage, STAGES)
        raise UserError("unknown stage", where="--stage", value=args.stage, expected=", ".join(STAGES), nearest=close)
    if args.tokens < 1:
        raise UserError("a warm-up needs tokens", where="--tokens", value=args.tokens, expected="a positive integer")
    stages = (args.stage,) if args.stage else STAGES[:2] if args.layout == "none" else STAGES
    config = preset(args.preset, tokens=args.tokens, stages=stages)
    words = list(defaults)
    if args.layout is not None:
        words += ["--layout.mla_layers", args.layout]
    if args.group_size is not None:
        words += ["--layout.group_size", str(args.group_size)]
    for name, texts in (("calibration", args.text), ("evaluation", args.eval_text)):
        if texts:
            words += [f"--text.{name}", json.dumps(texts)]
    return override(config, [*words, *args.overrides], flags=args.flags)


def outline(config: MigrateConfig, out: Path) -> list[str]:
    """What would be done stage by stage, and what would stop it."""
    lines = [f"The teacher is measured on {', '.join(config.text.evaluation)}; then, measured again after each:"]
    for stage in config.stages:
        if stage in ("lightning", "mla"):
            work = f"new attention, fitted on {config.text.calibration_tokens:,} tokens"
        else:
            train = (config.linear_warmup if stage == "linear-warmup" else config.mla_warmup).train
            tokens = train.tokens or train.total_steps * train.batch_size * train.sequence_length
            work = f"trained on {tokens:,} tokens in {train.total_steps:,} steps, learning rate {train.lr:g}"
        names = [*GATES_AFTER[stage], *(["final_gap"] if stage == config.stages[-1] else [])]
        limits = [f"{name} {limit:g}" for name in names if (limit := getattr(config.gates, name)) is not None]
        lines.append(f"  {stage:<14} {work}; stops outside: {', '.join([*limits, *(['finite'] if config.gates.finite else [])])}")
    if not config.gates.stop:
        lines.append("No gate stops (gates.stop is false): what is outside is said and recorded.")
    return [*lines, f"{out} appears when the last one has passed; {out.name}.run beside it keeps journal, metrics and report."]


def _check(args: argparse.Namespace, config: MigrateConfig) -> None:
    """What a migration refuses before it reads weights: where it would go, its texts."""
    from openling.commands.convert import calibration
    from openling.migrate.journal import is_finished, run_folder
    from openling.migrate.request import Request, check_begun, check_place
    from openling.migrate.texts import evaluation_windows
    from openling.model.device import pick_device

    pick_device(args.device)
    out = args.out.absolute()
    if args.resume and os.path.lexists(out) and is_finished(out, args.model.absolute(), config):
        return
    check_place(args.model, out, args.teacher)
    check_begun(run_folder(out), resume=args.resume)
    asked = Request(args.model, out, config, args.teacher)
    calibration(args.model, config, "cpu")
    evaluation_windows(config.text, asked.tokenizer, vocab_size=asked.found.vocab_size)


def run(args: argparse.Namespace) -> int:
    """Migrate, write the report, print where things are; exit code 0."""
    config = settings(args)
    if args.dry_run:
        print(config.model_dump_json(indent=2))
        print("\n".join(["", *outline(config, args.out), ""]), file=sys.stderr)
        _check(args, config)
        if {"lightning", "mla"} & set(config.stages):
            from openling.commands.convert import dry_run

            print(
                dry_run(args.model, args.out, config, "copy", [config.text.calibration_tokens], streamed=False), file=sys.stderr
            )
        return 0
    from openling.migrate.gates import Tripped
    from openling.migrate.pipeline import migrate, run_folder
    from openling.model.device import pick_device
    from openling.ops.pick import kernels_reason
    from openling.report import build, summary_table

    console = open_console(stderr=True)
    device = pick_device(args.device)
    console.print(f"Ops: {kernels_reason(device)}.", highlight=False)
    try:
        folder = migrate(
            args.model,
            args.out,
            config,
            teacher=args.teacher,
            resume=args.resume,
            device=str(device),
            command=args.command,
            events=terminal_events(console),
        )
    except Tripped:
        page = build(run_folder(args.out.absolute()))
        console.print(f"Report: {page}", highlight=False, markup=False, soft_wrap=True)
        raise
    page = build(folder)
    console.print(summary_table(json.loads((folder / "report.json").read_text())))
    console.print(
        f"\nHybrid: {args.out}\nReport: {page}\nTry:    openling generate {shlex.quote(str(args.out))} 'Once upon a time'",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0


def open_console(*, stderr: bool = False) -> Any:
    """A console that is wide enough for the tables where there is no terminal to ask."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=100)


def terminal_events(console: Any) -> Any:
    """Lines for stages, a counter for layers on a terminal."""
    from openling.migrate.pipeline import Events

    def layer(stage: str, index: int, layers: int) -> None:
        if console.is_terminal:
            console.print(f"  {stage}: layer {index + 1} of {layers}", end="\n" if index + 1 == layers else "\r", highlight=False)

    return Events(say=lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True), layer=layer)
