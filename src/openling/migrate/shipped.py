"""The hybrid that ships with the package, as a delta: applied to its teacher, and measured as the stages of a run are."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from openling.config.migrate import MigrateConfig
from openling.errors import UserError
from openling.migrate.measure import decode_profile
from openling.migrate.measurer import Measurer
from openling.migrate.texts import evaluation_windows
from openling.ops.cpu import half_products
from openling.weights.delta import RECORD, apply_delta, first_other, read_delta
from openling.weights.files import file_hash
from openling.weights.folder import load

# Deltas that are part of the package, one folder each.
PLACE = Path(str(files("openling"))) / "shipped"
NAME = "SmolLM2-135M-hybrid"


def find_delta() -> Path | None:
    """The folder of the package's delta; None where this installation has none."""
    return PLACE / NAME if (PLACE / NAME).exists() else None


def applied(teacher: Path, delta: Path, out: Path) -> Path:
    """The hybrid of `teacher` and `delta` in the folder `out`, made unless it is there, its files checked either way."""
    if not out.exists():
        return apply_delta(teacher, delta, out)
    if (path := first_other(read_delta(delta), out)) is not None:
        raise UserError("this folder is not what the shipped delta makes", where=path, next=f"remove {out}, and try again")
    return out


def measurer(teacher: Path, config: MigrateConfig, device: torch.device) -> Measurer:
    """What a run with these settings measures its stages with."""
    loaded = load(teacher, device=device)
    windows = evaluation_windows(config.text, loaded.tokenizer, vocab_size=loaded.config.vocab_size)
    model = loaded.model.float()
    return Measurer(model, loaded.tokenizer, windows, recall=config.recall, bf16=half_products(device))


def decoding(folder: Path, contexts: tuple[int, ...], device: torch.device) -> list[dict[str, Any]]:
    """Cache bytes and milliseconds per token by context, in the dtype the folder stores."""
    return [dict(row) for row in decode_profile(load(folder, device=device).model, contexts)]


def measured(measure: Measurer, hybrid: Path, device: torch.device) -> dict[str, Any]:
    """The `stage` of a report that an applied delta is."""
    begun = time.monotonic()
    stage = measure.stage(load(hybrid, device=device).model.float(), walk=False)
    return stage | {"name": "shipped hybrid", "seconds": time.monotonic() - begun}


def identity(delta: Path) -> str:
    """A hash that another delta does not have: whether what was measured is still what is there."""
    return file_hash(delta / RECORD)


def card(delta: Path) -> dict[str, Any]:
    """What a delta says of itself, as the `shipped` of a report."""
    about = read_delta(delta).about
    words = {key: value for key, value in about.items() if isinstance(value, str)}
    return {"delta": identity(delta), "tokens": about.get("trained tokens"), "hardware": about.get("hardware"), "about": words}
