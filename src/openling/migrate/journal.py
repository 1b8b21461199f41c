"""What a run remembers of itself: settings, source, teacher and texts, so that it resumes as what it was or says why not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from openling.config.migrate import MigrateConfig
from openling.errors import UserError
from openling.weights.files import fingerprint
from openling.weights.io import read_json


def run_folder(out: Path) -> Path:
    """Where the run of a migration to `out` is kept."""
    return out.with_name(out.name + ".run")


def is_finished(out: Path, model: Path, config: MigrateConfig) -> bool:
    """Whether `out` is the result of a run from `model` with these settings; a `UserError` where these were others."""
    run = run_folder(out)
    if not (run / "journal.json").exists():
        return False
    journal = read_json(run / "journal.json")
    _check_same_settings(journal["config"], config, run)
    if journal["source model"] != fingerprint(model):
        raise UserError("that run had another source model", where=model, expected=journal["model"], next="name that model")
    return journal["done"] == list(config.stages) and not (run / "stages" / journal["done"][-1]).exists()


def sweep(run: Path) -> None:
    """Remove what a finished run needs no more; a kill may have kept it from doing so stage by stage."""
    for folder in (run / "stages", *run.glob("*/checkpoints")):
        shutil.rmtree(folder, ignore_errors=True)


def continued(run: Path, new: dict[str, Any], config: MigrateConfig) -> dict[str, Any]:
    """The journal of a run begun earlier; a `UserError` where settings (but gates), models or texts are not those of `new`."""
    old = read_json(run / "journal.json")
    if missing := new.keys() - old.keys():
        raise UserError(
            "an older version began this run", where=run, expected=", ".join(sorted(missing)), next=f"remove {run}, start again"
        )
    _check_same_settings(old["config"], config, run)
    for what in ("source model", "teacher", "texts"):
        if old[what] != new[what]:
            raise UserError(
                f"since this run began, this has changed: {what}",
                where=old["model"] if what == "source model" else None,
                next=f"undo that, or remove {run}",
            )
    old["config"]["gates"] = new["config"]["gates"]
    return old


def _check_same_settings(old: dict[str, Any], config: MigrateConfig, run: Path) -> None:
    """Settings that did not exist when the run began are those of now: nothing that is done read them."""
    before, now = _flat(old), _flat(config.model_dump(mode="json"))
    for name in {**now, **before}:
        known = name in before or any(name.startswith(f"{section}.") for section in before)
        if known and not name.startswith("gates.") and before.get(name) != now.get(name):
            raise UserError(
                "the settings have changed since this run began",
                where=f"--{name}",
                value=now.get(name),
                expected=before.get(name),
                next=f"undo that, or remove {run}",
            )


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for name, value in fields.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out
