"""The hybrid that ships with the package beside teacher and run: where a longer training leads. For the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from openling.report import details, text
from openling.report.schema import DecodeRow, Report, Stage, parse

# What of a card the page shows, in this order.
CARD = ("preset", "stages", "tokens", "hardware", "data", "made on", "commit", "openling_version")


@dataclass(frozen=True)
class Column:
    """One of the models that are compared: its name, what it was trained on, and what was measured."""

    name: str
    trained: str
    stage: Stage
    decode: Sequence[DecodeRow]


def columns(report: Report) -> list[Column]:
    """Teacher, this run as its last stage left it, shipped hybrid: those that are there."""
    if report.shipped is None:
        return []
    found = [Column("teacher", "", stage, report.decode.teacher) for stage in report.stages if stage.name == "teacher"]
    if report.last_measured:
        here = _trained(report.warm_up_tokens or None, report.environment.get("hardware"))
        found.append(Column("this run", here, report.last_measured, report.decode.hybrid))
    there = _trained(report.shipped.tokens, report.shipped.hardware)
    return [*found, Column("shipped", there, report.shipped.stage, report.shipped.decode)]


def _trained(tokens: int | None, hardware: str | None) -> str:
    amount = "" if tokens is None else f"{text.count_text(tokens)} tokens"
    place = "" if hardware is None else f"on {text.device_text(hardware)}"
    return " ".join(part for part in (amount, place) if part)


def title(report: Report) -> str:
    """What is compared."""
    return "Minutes here, and where it leads" if report.last_measured else "The shipped hybrid beside its teacher"


def rows(report: Report) -> list[tuple[str, list[str]]]:
    """(what, a cell for each of `columns`)."""
    models = columns(report)
    out = []
    for domain in report.domains:
        found = [model.stage.domains.get(domain) for model in models]
        out.append((f"loss on {domain}", ["not run" if a is None else f"{a.loss:.3f}" for a in found]))
        gaps = [
            "–" if a is None or model.name == "teacher" else text.gap_text(a.gap) for model, a in zip(models, found, strict=True)
        ]
        out.append(("  over the teacher", gaps))
    for length in sorted({recall.length for model in models for recall in model.stage.needle}):
        asked = [next((r for r in model.stage.needle if r.length == length), None) for model in models]
        out.append((f"needles found, {length:,} tokens", ["not run" if r is None else f"{r.found} of {r.n}" for r in asked]))
    longest = max((row.context for model in models for row in model.decode), default=None)
    if longest is not None:
        decoded = [next((row for row in model.decode if row.context == longest), None) for model in models]
        caches = ["not run" if row is None else text.bytes_text(row.cache_bytes) for row in decoded]
        times = ["not run" if row is None else f"{row.ms_per_token:.3g} ms" for row in decoded]
        out += [(f"cache at {longest:,} tokens", caches), ("  time per token there", times)]
    return out


def prompts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(model, completion)])."""
    models = columns(report)
    asked = dict.fromkeys(sample.prompt for model in models for sample in model.stage.samples)
    return [
        (prompt, [(model.name, s.completion) for model in models for s in model.stage.samples if s.prompt == prompt])
        for prompt in asked
    ]


def said(report: Report) -> list[str]:
    """The sentence that sets the shipped hybrid against this run."""
    if report.shipped is None or not report.shipped.stage.domains:
        return []
    trained = _trained(report.shipped.tokens, report.shipped.hardware)
    found = report.shipped.stage.domains.items()
    losses = "; ".join(f"{a.loss:.3f} on {name} ({text.gap_text(a.gap)} over the teacher)" for name, a in found)
    where = "Where it leads: the" if report.last_measured else "The"
    return [f"{where} hybrid that ships with openling{f', {trained},' if trained else ''} has {losses}."]


def section(report: Report) -> dict[str, Any] | None:
    """What the page shows."""
    if report.shipped is None:
        return None
    models = columns(report)
    lengths = sorted({r.length for model in models for r in model.stage.needle})
    card = report.shipped.about | ({"hardware": report.shipped.hardware} if report.shipped.hardware else {})
    return {
        "title": title(report),
        "columns": models,
        "rows": rows(report),
        "lengths": lengths,
        "grids": [(model.name, details.grid(model.stage.needle, lengths)) for model in models if model.stage.needle],
        "prompts": prompts(report),
        "card": [(key, card[key]) for key in CARD if key in card],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------------------------------


def side_by_side(report: dict[str, Any]) -> Table:
    """The models for a terminal, a column each. report: the contents of `report.json`, with `shipped`."""
    run = parse(report)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=title(run), title_justify="left")
    table.add_column("")
    for model in columns(run):
        table.add_column(Text(f"{model.name}\n{model.trained}".strip()), justify="right", overflow="fold")
    for label, cells in rows(run):
        table.add_row(*map(Text, (label, *cells)))
    return table


def completions(report: dict[str, Any]) -> str:
    """What the models write, prompt by prompt, below each other."""
    out = []
    for prompt, answers in prompts(parse(report)):
        out.append(f"“{prompt.rstrip()}” goes on, greedily:")
        for name, completion in answers:
            out.append(f"  {name + ':':<10}" + (completion.strip() or "(ends at once)").replace("\n", "\n" + " " * 12))
        out.append("")
    return "\n".join(out)
