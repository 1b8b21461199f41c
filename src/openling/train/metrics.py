"""What a run says while it works: a line per step in `metrics.jsonl`, and a bar or plain lines for who watches."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from openling.weights.io import write_error
from openling.weights.whole import write_all

PLAIN_LINE_SECONDS = 10.0


def memory_bytes(device: torch.device) -> int:
    """Peak allocated memory of a GPU, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def plain(value: Any) -> Any:
    """As JSON has it: numbers that are not finite become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step(line: str) -> int:
    """The step that a line is about, 0 where it cannot be read."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return 0


class MetricsLog:
    """`metrics.jsonl`, continued after `step`: later lines, left by a run that was killed, are dropped."""

    def __init__(self, path: Path, *, step: int) -> None:
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        # A process that dies can tear the last line only, which is later than any checkpoint; a machine or a disk, any.
        kept = [line for line in lines if line.endswith("\n") and 0 < _step(line) <= step]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(kept))
        whole.replace(path)
        self.last: dict[str, Any] = json.loads(kept[-1]) if kept else {}
        self._path, self._file = path, os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, row: dict[str, Any]) -> None:
        """Append a line; it survives the process from here on."""
        self.last = row
        line = json.dumps({name: plain(value) for name, value in row.items()}) + "\n"
        try:
            write_all(self._file, memoryview(line.encode()))
        except OSError as error:
            resume = "free some space, then the same command with --resume"
            raise write_error(error, self._path, kept="the last checkpoint is kept", resume=resume) from error

    def sync(self) -> None:
        """Make the lines survive the machine too."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def describe(row: dict[str, Any]) -> str:
    """A row of metrics as a line; what does not apply is left out."""
    words = [f"loss {row['loss']:.4f}"]
    if row.get("skipped"):
        words.append("LEFT OUT")
    if row.get("mtp") is not None:
        words.append(f"mtp {row['mtp']:.4f}")
    words += [f"norm {row['grad_norm']:.3g}", f"lr {row['lr']:.3g}", f"{row['tokens_per_s']:,.0f} tokens/s"]
    if row.get("mfu") is not None:
        words.append(f"mfu {row['mfu']:.1%}")
    words.append(f"{row['memory_bytes'] / 2**30:.1f} GiB")
    if row.get("imbalance") is not None:
        words.append(f"load {row['imbalance']:.2f}")
    return "  ".join(words)


class Display:
    """A line per step on stderr: a bar on a terminal, else a line about every `every` seconds; nothing when silent."""

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int,
        silent: bool,
        max_seconds: float | None = None,
        every: float = PLAIN_LINE_SECONDS,
    ) -> None:
        self.every = every
        self.total, self.first, self.max_seconds = total_steps, first_step, max_seconds
        self.silent = silent
        console = Console(stderr=True)
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._bar = (
            Progress(*columns, console=console) if console.is_terminal and not os.environ.get("CI") and not silent else None
        )
        self._task = self._bar.add_task("", total=total_steps, completed=first_step, status="") if self._bar else None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """One line of plain text."""
        if self._bar:
            self._bar.console.print(line)
        elif not self.silent:
            print(line, file=sys.stderr, flush=True)

    def update(self, row: dict[str, Any]) -> None:
        """Show a row of metrics."""
        if self.silent:
            return
        now, done = time.monotonic(), row["step"]
        left = (now - self._started) / (done - self.first) * (self.total - done)
        if self.max_seconds is not None:
            left = min(left, max(0.0, self.max_seconds - row["seconds"]))
        status = f"{describe(row)}  {_clock(left)} left"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, status=status)
            if self.every == 0:
                self.say(f"step {done}/{self.total}  {status}")
        elif now - self._printed >= self.every or done == self.total:
            self._printed = now
            self.say(f"step {done}/{self.total}  {status}")
