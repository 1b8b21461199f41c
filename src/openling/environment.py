"""What a number was measured on: hardware, versions, commit, date."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("openling", "torch", "transformers", "triton", "fla-core", "flash-linear-attention", "torchao")


def hardware() -> str:
    """Processor, usable cores, memory; GPUs where torch is loaded already and sees any."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return ", ".join([f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB", *_gpus()])


def _gpus() -> list[str]:
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def peak_memory() -> int:
    """The most bytes of memory that this program has used; getrusage counts on from what the program that started it had."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):  # which not every kernel tells
            return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def versions() -> dict[str, str]:
    """Python and the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the source tree this runs from, with `+` where it was changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "src"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def now() -> str:
    """The date and time, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def write_results(path: Path, command: str, rows: list[dict[str, Any]], **measured: Any) -> None:
    """A results file: what was run, on what, and one row per figure. `measured` replaces fields (date, commit) of a run past.

    A row needs `name`, `value`, `unit`; `peer`, `peer_value`, `ratio`, `goal`, `met` and `why` where they apply.
    """
    keys = ("name", "value", "unit", "peer", "peer_value", "ratio", "goal", "met")
    full = [{key: row.get(key) for key in keys} | {key: v for key, v in row.items() if key not in keys} for row in rows]
    here = {"command": command, "hardware": hardware(), "versions": versions(), "commit": commit(), "date": now()}
    record = here | measured | {"rows": full}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a run may be killed at any row; what stands there is always whole
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
