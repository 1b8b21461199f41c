"""The demo as a results file: losses after every stage, decoding memory and speed, time and memory of the whole command.

    python benchmarks/demo.py WORK_FOLDER

Runs `openling demo --out WORK_FOLDER` unless that folder holds a finished demo, and writes
benchmarks/results/migration/demo.json.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from openling.cli import main as openling
from openling.environment import write_results

RESULTS = Path(__file__).parent / "results" / "migration" / "demo.json"
LIMIT_SECONDS = 600


def stage_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss of every stage by domain, beside the teacher's."""
    rows = []
    for stage in report["stages"][1:]:
        for domain, found in stage["domains"].items():
            rows.append(
                {
                    "name": f"loss after {stage['name']}, {domain}",
                    "value": found["loss"],
                    "unit": "nats per token",
                    "peer": "teacher",
                    "peer_value": found["teacher_loss"],
                    "ratio": found["loss"] / found["teacher_loss"],
                    "stderr": found["loss_stderr"],
                    "kl": found["kl"],
                    "top1": found["top1"],
                    "tokens": stage["tokens"],
                    "seconds": stage["seconds"],
                }
            )
    return rows


def start_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Where preset `best` starts beside `paper`: loss right after the Lightning conversion."""
    losses = {(row["preset"], row["domain"]): row["loss"] for row in report["presets"]}
    rows = []
    for domain in report["stages"][0]["domains"]:
        best, paper = losses["best", domain], losses["paper", domain]
        pair = {"value": best, "unit": "nats per token", "peer": "preset paper", "peer_value": paper, "ratio": best / paper}
        rows.append({"name": f"start of preset best, {domain}", "goal": "below paper", "met": best < paper} | pair)
    return rows


def shipped_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses of the shipped hybrid, where there is one, beside the teacher's."""
    if "shipped" not in report:
        return []
    shipped, rows = report["shipped"], []
    for domain, found in shipped["stage"]["domains"].items():
        pair = {"peer": "teacher", "peer_value": found["teacher_loss"], "ratio": found["loss"] / found["teacher_loss"]}
        row = {"name": f"loss of the shipped hybrid, {domain}", "value": found["loss"], "unit": "nats per token"} | pair
        more = {"stderr": found["loss_stderr"], "kl": found["kl"], "top1": found["top1"]}
        rows.append(row | more | {"tokens": shipped["tokens"], "hardware": shipped["hardware"]})
    return rows


def decode_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Cache bytes and milliseconds per token at every context, hybrid beside teacher."""
    rows = []
    for teacher, hybrid in zip(report["decode"]["teacher"], report["decode"]["hybrid"], strict=True):
        for key, unit in (("cache_bytes", "bytes"), ("ms_per_token", "ms")):
            name = f"decoding at {teacher['context']} tokens of context, {key}"
            pair = {"value": hybrid[key], "peer": "teacher", "peer_value": teacher[key], "ratio": hybrid[key] / teacher[key]}
            rows.append({"name": name, "unit": unit} | pair)
    return rows


def main() -> int:
    """Run the demo if need be, write its results."""
    work = Path(sys.argv[1])
    path = work / "SmolLM2-135M-hybrid.run" / "report.json"
    if not path.exists() and (code := openling(["demo", "--out", str(work)])):
        return code
    report = json.loads(path.read_text())
    peak = max(row["peak_bytes"] for rows in report["decode"].values() for row in rows)
    whole = [
        {
            "name": "time",
            "value": report["seconds"],
            "unit": "s",
            "goal": LIMIT_SECONDS,
            "met": report["seconds"] < LIMIT_SECONDS,
        },
        {"name": "resident memory at the end", "value": peak, "unit": "bytes", "goal": 8 * 2**30, "met": peak < 8 * 2**30},
    ]
    rows = whole + start_rows(report) + stage_rows(report) + shipped_rows(report) + decode_rows(report)
    command = shlex.join(["python", *sys.argv]).replace(str(work), "WORK_FOLDER")
    versions = dict(report["environment"])
    hardware = versions.pop("hardware")
    write_results(RESULTS, command, rows, date=report["date"], commit=report["commit"], hardware=hardware, versions=versions)
    print(RESULTS.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
