"""The summary of a run for a terminal, at most 100 columns wide."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from openling.report import text
from openling.report.schema import Stage, parse

# More texts than these do not fit beside each other; the page has them all.
DOMAINS_SHOWN = 2


def summary_table(report: dict[str, Any]) -> Table:
    """One row per stage: tokens, time, then loss (gap to the teacher), KL and top-1 agreement on each text, needle recall.

    report: the contents of `report.json`; UserError where a field is wrong.
    """
    run = parse(report)
    shown = run.domains[:DOMAINS_SHOWN]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=Text(run.title), title_justify="left")
    table.add_column("stage", no_wrap=False)
    for name in ("tokens", "time"):
        table.add_column(name, justify="right")
    for domain in shown:
        table.add_column(Text(f"{domain}\nloss (gap)"), justify="right")
        table.add_column("\nKL", justify="right")
        table.add_column("\ntop-1", justify="right")
    table.add_column("needles\nfound", justify="right")
    for stage in run.stages:
        table.add_row(*_row(stage, shown))
    if left := run.domains[DOMAINS_SHOWN:]:
        table.caption = Text(f"also measured, in the page: {', '.join(left)}")
    return table


def _row(stage: Stage, domains: list[str]) -> list[Text]:
    cells = [text.stage_text(stage.name)]
    cells += [
        "–" if stage.tokens is None else text.count_text(stage.tokens),
        "–" if stage.seconds is None else text.seconds_text(stage.seconds),
    ]
    for domain in domains:
        a = stage.domains.get(domain)
        if a is None:
            cells += ["not run", "", ""]
        elif stage.name == "teacher":
            cells += [f"{a.loss:.3f}", "", ""]
        else:
            cells += [f"{a.loss:.3f} ({a.gap:+.3f})", f"{a.kl:.3f}", f"{100 * a.top1:.0f} %"]
    found, tried = sum(r.found for r in stage.needle), sum(r.n for r in stage.needle)
    cells.append(f"{found} of {tried}" if tried else "not run")
    return [Text(cell) for cell in cells]
