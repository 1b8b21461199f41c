"""Gates: after each stage its measurements are held against the limits of the configuration; outside them the run stops.

A verdict is a function of what `report.json` holds, so a run that is killed at a gate meets it again. The journal keeps every
verdict that let a stage pass, and with it how: a later resume does not ask again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from openling.config.migrate import Gates, MigrateConfig, preset
from openling.errors import Failure
from openling.model.ling import Ling
from openling.train.checkpoint import write_json

Outcome = Literal["passed", "stopped", "let through", "warned", "off", "not judged"]

# What a teacher does not find itself cannot be lost: recall counts where it finds more of the needles than this.
TEACHER_RECALLS = 0.95
# Share of the needles whose loss is said although no limit is set: no loss and no layer error shows it.
WORTH_A_WARNING = 0.05


@dataclass(frozen=True)
class Verdict:
    """One gate after one stage. `value` and `limit` are in `unit`; `standard` is the preset's limit; `text`: or layer.

    passed: within the limit. stopped: outside it. let through: outside the preset's limit, and a setting said to go on.
    warned: there is no limit, and the value is one to look at. off: there is no limit. not judged: `why` says what was missing;
    else it says what the value was computed from.
    """

    gate: str
    outcome: Outcome
    unit: str
    value: float | None = None
    limit: float | None = None
    standard: float | None = None
    text: str | None = None
    why: str = ""


class Tripped(Failure):
    """A stage measured outside its tolerance; its work is kept, and `--resume` with the flag that is named goes on."""


def broken_tensors(model: Ling) -> list[str]:
    """Names of all weights and buffers that hold a NaN or an infinity."""
    return [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]


def broken_numbers(measured: Any, path: str = "") -> list[str]:
    """Where a NaN or an infinity stands in nested results, as dotted names."""
    if isinstance(measured, dict):
        return [name for key, value in measured.items() for name in broken_numbers(value, f"{path}.{key}" if path else str(key))]
    if isinstance(measured, (list, tuple)):
        return [name for i, value in enumerate(measured) for name in broken_numbers(value, f"{path}.{i}")]
    # A perplexity beyond the largest float belongs to a loss that is finite.
    bad = isinstance(measured, float) and not math.isfinite(measured) and not path.endswith(".perplexity")
    return [path] if bad else []


def judge(
    stage: dict[str, Any],
    before: dict[str, Any] | None,
    gates: Gates,
    standard: Gates,
    *,
    vocabulary: int,
    last: bool,
    teacher: dict[str, Any] | None = None,
) -> list[Verdict]:
    """Every gate of one measured stage of a report; `last`: it ends the run.

    before: the measurement that the stage started from. teacher: the teacher's, which alone says what it recalls.
    """
    name, domains = stage["name"], stage["domains"]
    found = [_finite(stage, gates, standard)]
    guess = math.log(vocabulary)
    better = {text: a for text, a in domains.items() if a["teacher_loss"] < guess}
    clueless = "the teacher itself is no better than guessing" if domains and not better else ""
    if name == "lightning":
        values = {text: (a["loss"] / guess, f"{a['loss']:.3f} nats") for text, a in better.items()}
        found.append(_verdict("lightning_loss", "x the loss of guessing", values, gates, standard, clueless))
    if name in ("mla", "linear-warmup", "mla-warmup"):
        start = before["domains"] if before else {}
        values = {
            text: (a["loss"] - start[text]["loss"], f"from {start[text]['loss']:.3f} to {a['loss']:.3f}")
            for text, a in domains.items()
            if text in start
        }
        why = "the loss before it was not measured" if domains and not values else ""
        found.append(_verdict("mla_step" if name == "mla" else "warmup_rise", "nats", values, gates, standard, why))
    if name in ("lightning", "mla"):
        rows = [] if clueless else [row for row in stage.get("layers", ()) if row["kind"] == name]
        values = {f"layer {row['layer']}": (row["propagated"], "propagated") for row in rows}
        why = clueless or "no layer was measured"
        found.append(_verdict("layer_error", "x the teacher's squared output", values, gates, standard, why))
    if name in ("linear-warmup", "mla-warmup"):
        found.append(_recall(stage, teacher or {}, gates, standard))
    if last:
        values = {text: (a["gap"], f"{a['loss']:.3f} against {a['teacher_loss']:.3f}") for text, a in domains.items()}
        found.append(_verdict("final_gap", "nats", values, gates, standard, ""))
    return found


def _finite(stage: dict[str, Any], gates: Gates, standard: Gates) -> Verdict:
    names = [*stage.get("nonfinite", []), *broken_numbers({k: v for k, v in stage.items() if k != "gates"})]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    why = f"NaN or infinite: {', '.join(names[:3])}{more}" if names else ""
    limit, usual = (0.0 if on else None for on in (gates.finite, standard.finite))
    return Verdict("finite", _outcome(len(names), limit, usual, gates.stop), "values", float(len(names)), limit, usual, why=why)


def _recall(stage: dict[str, Any], teacher: dict[str, Any], gates: Gates, standard: Gates) -> Verdict:
    """Needles that the teacher finds, less those of the stage, over the whole grid: at one length there are too few to judge."""
    own = {row["length"]: row for row in stage.get("needle", ())}
    rows = [row for row in teacher.get("needle", ()) if row["length"] in own]
    asked, theirs, found = sum(row["n"] for row in rows), needles_found(rows), needles_found([own[row["length"]] for row in rows])
    values, why = {}, "no needle was asked for"
    if asked and theirs / asked > TEACHER_RECALLS:
        where = f"needles in {', '.join(str(row['length']) for row in rows)} tokens"
        values = {where: ((theirs - found) / asked, f"teacher {theirs} of {asked}, student {found} of {asked}")}
    elif asked:
        why = f"the teacher itself finds {theirs} of {asked} needles, not more than {TEACHER_RECALLS:.0%}"
    verdict = _verdict("recall_drop", "of the needles lost", values, gates, standard, why)
    lost = verdict.outcome == "off" and verdict.value is not None and verdict.value > WORTH_A_WARNING
    return replace(verdict, outcome="warned") if lost else verdict


def needles_found(rows: list[dict[str, Any]]) -> int:
    """Needles found over all lengths: a count, so that a drop of one in twenty is 0.05 to the bit."""
    return sum(round(row["exact"] * row["n"]) for row in rows)


def _verdict(gate: str, unit: str, values: dict[str, tuple[float, str]], gates: Gates, standard: Gates, why: str) -> Verdict:
    """The verdict where it is worst; `values` are numbers by text or layer, and what each was computed from."""
    limit, usual = getattr(gates, gate), getattr(standard, gate)
    if not values:
        return Verdict(gate, "not judged", unit, None, limit, usual, why=why or "no loss was measured")
    worst = max(values, key=lambda where: math.inf if math.isnan(values[where][0]) else values[where][0])
    value, why = values[worst]
    return Verdict(gate, _outcome(value, limit, usual, gates.stop), unit, value, limit, usual, worst, why)


def _outcome(value: float, limit: float | None, usual: float | None, stop: bool) -> Outcome:
    if limit is not None and not value <= limit:  # a NaN is in no limit
        return "stopped" if stop else "let through"
    if usual is not None and not value <= usual:
        return "let through"
    return "passed" if limit is not None else "off"


class Gatekeeper:
    """The gates of one run: judges each stage once, notes it in report and journal, raises `Tripped`."""

    def __init__(self, config: MigrateConfig, run: Path, journal: dict[str, Any], *, vocabulary: int) -> None:
        self.config, self.run, self.journal, self.vocabulary = config, run, journal, vocabulary

    def check(self, name: str, report: dict[str, Any], say: Callable[[str], None]) -> None:
        """Let the measured stage `name` of the report pass or stop the run; one that has passed is not asked again."""
        known = self.journal["gates"].get(name)
        if known is not None and not any(v["outcome"] == "stopped" for v in known):
            return
        names = [stage["name"] for stage in report["stages"]]
        at = names.index(name)
        before = report["stages"][at - 1] if at else None
        usual, last = preset(self.config.preset).gates, name == self.config.stages[-1]
        stage = report["stages"][at]
        teacher = next((one for one in report["stages"] if one["name"] == "teacher"), None)
        found = judge(stage, before, self.config.gates, usual, vocabulary=self.vocabulary, last=last, teacher=teacher)
        stage["gates"] = self.journal["gates"][name] = [asdict(v) for v in found]
        write_json(self.run / "report.json", report)
        write_json(self.run / "journal.json", self.journal)
        for verdict in found:
            if verdict.outcome == "let through":
                say(f"  gate {verdict.gate}: {_said(verdict)}, usual limit {_number(verdict.standard)}: let through")
            elif verdict.outcome == "warned":
                flag = f"--gates.{verdict.gate} {WORTH_A_WARNING:g}"
                say(f"  warning: {_said(verdict)}; no gate is set for it, {flag} would stop here")
        stopped = [v for v in found if v.outcome == "stopped"]
        if stopped:
            raise self._tripped(name, stopped)

    def _tripped(self, name: str, stopped: list[Verdict]) -> Tripped:
        first = stopped[0]
        flags = " ".join(f"--gates.{v.gate} {_wider(v)}" for v in stopped)
        return Tripped(
            f"stage {name} is outside its tolerance: {' and '.join(v.gate for v in stopped)}",
            where=first.text,
            value="; ".join(_said(v) for v in stopped),
            expected="; ".join("none" if v.gate == "finite" else f"at most {_number(v.limit)} {v.unit}" for v in stopped),
            next=f"look at the report; to go on all the same: --resume {flags}, or past every gate: --resume --gates.stop false",
        )


def _said(verdict: Verdict) -> str:
    return verdict.why if verdict.gate == "finite" else f"{_number(verdict.value)} {verdict.unit} ({verdict.why}, {verdict.text})"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _wider(verdict: Verdict) -> str:
    """A setting that would let this value through: the next whole hundredth, or off."""
    if verdict.gate == "finite":
        return "false"
    if verdict.value is None or not math.isfinite(verdict.value):
        return "null"
    return f"{math.floor(100 * verdict.value + 1) / 100:g}"
