"""`openling delta`: a hybrid as what it adds to its teacher, small enough to pass on; and the hybrid made again from both."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  openling delta make TEACHER HYBRID DELTA           # 8-bit integers: about one byte per changed value
  openling delta make TEACHER HYBRID DELTA --exact   # the hybrid itself, twice as large
  openling delta apply TEACHER DELTA OUT
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `openling delta`."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    make = what.add_parser("make", help="what a hybrid has that its teacher lacks", allow_abbrev=False)
    make.add_argument("teacher", type=Path, metavar="TEACHER", help="the folder that was migrated (only read)")
    make.add_argument(
        "hybrid", type=Path, metavar="HYBRID", help="what became of it (only read); HYBRID.run tells how, if it is there"
    )
    make.add_argument("out", type=Path, metavar="OUT", help="new folder for the delta")
    make.add_argument("--exact", action="store_true", help="no rounding: applying gives HYBRID itself, bit for bit")
    apply = what.add_parser("apply", help="the hybrid from its teacher and a delta", allow_abbrev=False)
    apply.add_argument("teacher", type=Path, metavar="TEACHER", help="the same teacher (only read)")
    apply.add_argument("delta", type=Path, metavar="DELTA", help="the delta (only read)")
    apply.add_argument("out", type=Path, metavar="OUT", help="new folder for the hybrid")


def run(args: argparse.Namespace) -> int:
    """Do it; exit code 0."""
    from openling.weights.delta import Form, apply_delta, make_delta
    from openling.weights.export import licence_of
    from openling.weights.io import check_outside

    check_outside(args.out, args.teacher, args.delta if args.what == "apply" else args.hybrid)
    if args.what == "apply":
        print(apply_delta(args.teacher, args.delta, args.out))
        return 0
    about = history(args.hybrid)
    form: Form = "exact" if args.exact else "int8"
    delta = make_delta(args.teacher, args.hybrid, args.out, form=form, about=about, licence=licence_of(args.hybrid))
    size = sum(path.stat().st_size for path in args.out.iterdir())
    error = f", rounding error {delta.about['rounding error']:.2e} of their energy" if form == "int8" else ""
    print(f"{args.out}: {len(delta.changed):,} changed tensors{error}; {size / 1e6:.1f} MB in all")
    return 0


def history(hybrid: Path) -> dict[str, Any]:
    """How a hybrid came to be: from its `openling.json`, and what the report of its run tells where that is still beside it."""
    from openling.migrate.journal import run_folder
    from openling.weights.io import read_json

    record, report = hybrid / "openling.json", run_folder(hybrid.absolute()) / "report.json"
    about: dict[str, Any] = read_json(record) if record.exists() else {}
    found = json.loads(report.read_text()) if report.exists() else {}
    if "stages" not in found:  # `openling convert` measures no losses
        return about
    stages = found["stages"]
    tokens = {stage["name"]: stage["tokens"] for stage in stages if stage.get("tokens")}
    about["tokens"] = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    about["trained tokens"] = sum(count for name, count in tokens.items() if name.endswith("warmup"))
    if texts := found.get("texts"):
        about["data"] = "; ".join(f"{text['name']} ({text['licence']}): {text['role']}" for text in texts)
        about["texts"] = texts
    about["losses"] = {
        stage["name"]: {
            text: {key: a[key] for key in ("loss", "kl", "top1", "tokens")} for text, a in stage.get("domains", {}).items()
        }
        for stage in stages
    }
    names = {"made with": "command", "made on": "date", "commit": "commit", "hardware": "hardware", "recipe": "settings"}
    told = found | {"hardware": found.get("environment", {}).get("hardware")}
    return about | {name: told[key] for name, key in names.items() if told.get(key) is not None}
