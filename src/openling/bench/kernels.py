"""`openling bench kernels`: every operation at its goal's shapes, beside a peer and the machine's own limits.

A case is built when its turn comes and freed after it. A case that fails is a row with its message, and the others go on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from openling import environment
from openling.bench.case import Case, Rates
from openling.bench.table import RowTable
from openling.bench.timing import FULL, QUICK, Device, Times, machine_rates, measure
from openling.errors import UserError, nearest
from openling.ops.pick import kernels_reason

# Modules of openling.bench with `cases(quick)` and OPS, the names of their operations, and what their cases run on.
MODULES: dict[str, Device] = {
    "cases_lightning": "cuda",
    "cases_lightning_decode": "cuda",
    "cases_small": "cuda",
    "cases_mla": "cuda",
    "cases_moe": "cuda",
    "cases_stack": "cuda",
    "cases_cpu": "cpu",
}
QUICK_SECONDS = 50.0  # of the 60 that are promised; starting Python and one last case take the rest


@dataclass
class Row:
    """A case's outcome: times in µs, or the message of what went wrong."""

    case: Case
    us: float | None = None
    peer_us: float | None = None
    floor_us: float | None = None
    met: bool | None = None
    error: str | None = None
    rounds: Times | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the peer."""
        return self.peer_us / self.us if self.us and self.peer_us else None

    @property
    def fraction(self) -> float | None:
        """The share of the floor's rate."""
        return self.floor_us / self.us if self.us and self.floor_us else None

    def record(self) -> dict[str, Any]:
        """As `environment.write_results` takes it."""
        case = self.case
        main = {"name": f"{case.op}, {case.shape}, {case.mode}", "value": self.us, "unit": "us", "peer": case.peer_name}
        judged = {"peer_value": self.peer_us, "ratio": self.ratio, "goal": str(case.goal) if case.goal else None, "met": self.met}
        floor = {"floor_us": self.floor_us, "fraction": self.fraction, "bytes": case.floor.bytes, "flops": case.floor.flops}
        rounds = {"rounds": self.rounds.ours, "peer_rounds": self.rounds.peer} if self.rounds else {}
        return main | judged | floor | rounds | {"why": self.error or case.note}


@dataclass
class Run:
    """One run of the benchmark: what was asked, and what has been measured so far."""

    quick: bool
    op: str | None
    path: Path
    command: str
    table: RowTable
    rates: dict[str, Rates] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        """Whether --quick's time is used up."""
        return self.quick and time.monotonic() - self.started > QUICK_SECONDS

    def wants(self, op: str) -> bool:
        """Whether --op chooses this operation."""
        return self.op is None or self.op.lower() in op.lower()

    def write(self) -> None:
        """The results so far: a run that is cut short keeps what it measured."""
        rates = {device: {"copy_bytes_per_s": r.copy, "matmul_flops_per_s": r.matmul} for device, r in self.rates.items()}
        records = [row.record() for row in self.rows]
        extra = {"ops": kernels_reason(), "rates": rates, "left_out": self.left_out, "broken": self.broken}
        environment.write_results(self.path, self.command, records, **extra)


def bench_kernels(*, quick: bool, op: str | None, path: Path | None, command: str, table: RowTable) -> int:
    """Measure, print and write; exit code 1 if a case failed, 0 otherwise (a missed goal is a result)."""
    path = path or default_path(quick, op)
    _check_writable(path)
    run = Run(quick, op, path, command, table)
    for name, device in MODULES.items():
        if device == "cpu" or torch.cuda.is_available():
            _run_module(run, name, device)
    if not run.rows and not run.broken:
        raise UserError(
            "no operation has this in its name" if op else "no case can run here",
            where="--op" if op else None,
            value=op,
            expected=", ".join(run.seen) or None,
            nearest=nearest(op, run.seen) if op else None,
        )
    run.write()
    _summary(run)
    return 1 if run.broken or any(row.error for row in run.rows) else 0


def _check_writable(path: Path) -> None:
    """Before anything is measured: minutes of figures must not be lost to a path."""
    if path.is_dir():
        raise UserError("the results need a file, and this is a folder", where="--json", value=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UserError(f"the results cannot be written there: {error.strerror}", where="--json", value=path) from error


def default_path(quick: bool, op: str | None) -> Path:
    """benchmarks/results/kernels/ of a source checkout, else the current folder; named after the device and what was left out."""
    root = Path(__file__).resolve().parents[3]
    folder = root / "benchmarks/results/kernels" if (root / "benchmarks").is_dir() and (root / ".git").exists() else Path()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    words = [*device.lower().split(), *(op.lower().split() if op else []), *(["quick"] if quick else [])]
    return folder / ("-".join(words).replace("/", "-") + ".json")


def _run_module(run: Run, name: str, device: Device) -> None:
    if run.over():
        run.left_out.append(name)
        return
    try:
        module = import_module(f"openling.bench.{name}")
        run.seen += module.OPS
        if any(run.wants(op) for op in module.OPS):  # else its cases, which take time to build, are not even built
            _run_cases(run, module.cases(run.quick), name, device)
    except Exception as error:  # the boundary: what a case module does wrong must not cost the other modules their rows
        run.broken.append(f"{name}: {_message(error)}")
        run.table.line(f"{name} stopped: {_message(error)}", style="red")


def _run_cases(run: Run, cases: Iterator[Case], name: str, device: Device) -> None:
    while (case := next(cases, None)) is not None:
        assert case.op in run.seen, f"{case.op} is missing in {name}.OPS"
        if run.wants(case.op):
            if run.over():
                run.left_out.append(f"{name} from {case.op}, {case.shape}")
                return
            if device not in run.rates:
                _start(run, device)
            row = _measure(run, case, device)
            run.rows.append(row)
            run.table.row(row)
            run.write()
        case = None  # the generator alone may still own its tensors when it builds the next one
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _start(run: Run, device: Device) -> None:
    """What it is measured on, before the first row of a device."""
    if not run.rates:
        versions = ", ".join(f"{name} {version}" for name, version in environment.versions().items())
        run.table.line(f"{environment.hardware()}; commit {environment.commit()}\n{versions}\nOps: {kernels_reason()}")
        if not torch.cuda.is_available():
            run.table.line("The Triton kernels need an NVIDIA GPU: only the CPU's cases run here.", style="yellow")
    rates = run.rates[device] = machine_rates(device, QUICK if run.quick else FULL)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    copy, matmul = f"{rates.copy / 1e9:,.1f} GB/s", f"{rates.matmul / 1e12:,.2f} TFLOP/s"
    run.table.line(f"This {device.upper()}: copy {copy}, matmul {matmul}{threads}")


def _measure(run: Run, case: Case, device: Device) -> Row:
    floor_us = case.floor.us(run.rates[device])
    try:
        times = measure(case, device, QUICK if run.quick else FULL)
    except Exception as error:  # the boundary: one broken case is a row of the table
        return Row(case.freed(), floor_us=floor_us, met=False if case.goal else None, error=_message(error))
    us, peer_us = times.ours_us, times.peer_us
    met = case.goal.met(us=us, peer_us=peer_us, floor_us=floor_us) if case.goal else None
    return Row(case.freed(), us, peer_us, floor_us, met, rounds=times)


def _message(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:300]}"


def _summary(run: Run) -> None:
    goals = [row for row in run.rows if row.case.goal]
    say = run.table.line
    say(f"\n{sum(row.met is True for row in goals)} of {len(goals)} goals met; results in {run.path}")
    for row in goals:
        if not row.met and not row.error:
            what = "missed" if row.met is False else "not judged, the peer was not measured"
            note = f" ({row.case.note})" if row.case.note else ""
            say(f"  {what}: {row.case.op}, {row.case.shape}: {row.case.goal}{note}", style="yellow")
    for row in run.rows:
        if row.error:
            say(f"  failed: {row.case.op}, {row.case.shape}: {row.error}", style="red")
    for text in run.broken:
        say(f"  failed: {text}", style="red")
    if run.left_out:
        say(f"  not reached within --quick's time: {', '.join(run.left_out)}", style="yellow")
