"""Where each preset starts: SmolLM2-135M after both conversions, no warm-up, same teacher and same text.

    python benchmarks/starts.py WORK_FOLDER

Writes benchmarks/results/migration/starts.json: loss on held-out text (nats per token) and its gap to the teacher, for the
bare Lightning conversion and for the whole hybrid, presets `best` and `paper`, on two domains.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from openling.config.migrate import Text, preset
from openling.environment import write_results
from openling.migrate.pipeline import Events, migrate, run_folder
from openling.weights.gguf import import_gguf, smollm2_gguf

RESULTS = Path(__file__).parent / "results" / "migration" / "starts.json"
TEXT = Text(calibration_tokens=16384, evaluation_tokens=8192)


def main() -> None:
    """Convert twice, write the results."""
    work = Path(sys.argv[1])
    teacher = work / "teacher"
    if not teacher.exists():
        import_gguf(smollm2_gguf(), teacher)
    reports = {}
    for name in ("best", "paper"):
        out = work / name
        migrate(teacher, out, preset(name, stages=("lightning", "mla"), text=TEXT), events=Events(say=print))
        reports[name] = json.loads((run_folder(out) / "report.json").read_text())
    rows = []
    for stage in ("lightning", "mla"):
        for domain in ("python-docs", "kjv"):
            found = {name: _stage(report, stage)["domains"][domain] for name, report in reports.items()}
            best, paper = (found[name]["loss"] for name in ("best", "paper"))
            rows.append(
                {
                    "name": f"loss after {stage}, {domain}, preset best",
                    "value": best,
                    "unit": "nats per token",
                    "peer": "preset paper",
                    "peer_value": paper,
                    "ratio": best / paper,
                    "goal": "below paper",
                    "met": best < paper,
                    "teacher": found["best"]["teacher_loss"],
                    "gap": {name: found[name]["gap"] for name in found},
                    "kl": {name: found[name]["kl"] for name in found},
                    "top1": {name: found[name]["top1"] for name in found},
                }
            )
    write_results(RESULTS, shlex.join(["python", *sys.argv]).replace(str(work), "WORK_FOLDER"), rows)
    print(RESULTS.read_text())


def _stage(report: dict, name: str) -> dict:
    return next(stage for stage in report["stages"] if stage["name"] == name)


if __name__ == "__main__":
    main()
