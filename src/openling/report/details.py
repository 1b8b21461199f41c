"""What a report says about energies, half-lives, routers, recall, and what each stage took: rows and plots for the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from openling.report import plots, text
from openling.report.schema import Recall, Report, Share


@dataclass(frozen=True)
class Plot:
    """A drawn plot, or why there is none."""

    title: str
    svg: Markup | None
    missing: str = ""


def drawn(title: str, plot: Callable[..., str], *arguments: Any) -> Plot:
    """A plot with its title, which those who cannot see it are read too."""
    if not plots.available():
        return Plot(title, None, "not drawn: matplotlib is not installed (pip install 'openling[demo]')")
    svg = plot(*arguments).replace('aria-label="', f'aria-label="{escape(title)}: ', 1)
    return Plot(title, Markup(svg))  # noqa: S704 - our own SVG, whose texts matplotlib escapes


# ---------------------------------------------------------------------------------------------------------------------
# Energy
# ---------------------------------------------------------------------------------------------------------------------

FACTORS = {"rope energy kept": "RoPE", "kv energy kept": "K and V", "query energy kept": "query"}
PARTS = {"kv": "K and V in one latent", "query": "Query"}


def energy_plots(report: Report) -> list[Plot]:
    """Energy against rank for each factor, and what each layer keeps; of the last stage that has such."""
    out = []
    for part, name in PARTS.items():
        found = [curves for stage in report.stages if (curves := [s for s in stage.spectra if s.part == part])]
        if found:
            out.append(drawn(f"{name}: energy kept against rank", plots.spectrum_plot, found[-1]))
    if series := _kept(report):
        out.append(drawn("What each MLA layer keeps", plots.kept_plot, series))
    return out


def _kept(report: Report) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for stage in report.stages:
        for a in stage.approximations:
            if a.measure in FACTORS and a.layer is not None:
                series.setdefault(FACTORS[a.measure], []).append((a.layer, a.value))
    return series


# ---------------------------------------------------------------------------------------------------------------------
# Heads
# ---------------------------------------------------------------------------------------------------------------------


def heads(report: Report) -> dict[str, Any] | None:
    """Two plots, and in how many heads the teacher looks further back than the half-life reaches."""
    layers = next((stage.heads for stage in report.stages if stage.heads), [])
    if not layers:
        return None
    pairs = [pair for s in layers for pair in zip(s.half_life, s.look_back, strict=True)]
    title = "Heads by half-life, and the teacher's by look-back"
    by_layer = drawn("By layer: range and median over its heads", plots.span_layer_plot, layers)
    return {
        "plots": [drawn(title, plots.span_plot, layers), by_layer],
        "shorter": sum(life < back for life, back in pairs),
        "heads": len(pairs),
        "longest": max(life for life, _ in pairs),
        "window": report.settings.get("text", {}).get("sequence_length"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Routers
# ---------------------------------------------------------------------------------------------------------------------


def routers(report: Report) -> dict[str, Any] | None:
    """The drift by layer as a plot, and a row per stage: mean share changed, worst layer, mean share kept, mean KL."""
    stages = [stage for stage in report.stages if stage.routers]
    if not stages:
        return None
    rows = []
    for stage in stages:
        worst = max(stage.routers, key=lambda r: r.changed)
        means = [statistics.fmean(getattr(r, field) for r in stage.routers) for field in ("changed", "kept", "kl")]
        rows.append((stage.name, *means, worst))
    plot = drawn("Tokens that go to other experts than the teacher's", plots.router_plot, [(s.name, s.routers) for s in stages])
    return {"plot": plot, "rows": rows}


# ---------------------------------------------------------------------------------------------------------------------
# Recall
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell of a recall grid; `shade` in percent of the full colour."""

    text: str
    shade: int = 0


def needle(report: Report) -> dict[str, Any] | None:
    """The recall plot, and for each stage a grid of depth by length, beside it that of one fact of several."""
    stages = [stage for stage in report.stages if stage.needle]
    if not stages:
        return None
    plot = drawn("Share of needles found", plots.recall_plot, [(stage.name, stage.needle) for stage in stages])
    asked = {r.length for stage in stages for r in stage.needle} | {n for stage in stages for n in stage.needle_left_out}
    lengths = sorted(asked)
    grids = []
    for stage in stages:
        grids.append((text.stage_text(stage.name), grid(stage.needle, lengths)))
        if stage.needle_among:
            grids.append((f"{text.stage_text(stage.name)}, one fact of {stage.needle_keys}", grid(stage.needle_among, lengths)))
    return {"plot": plot, "lengths": lengths, "grids": grids}


def grid(recalls: Sequence[Recall], lengths: Sequence[int]) -> list[tuple[str, list[Cell]]]:
    """(depth, cells by length), the last row over all depths."""
    by_length = {r.length: r for r in recalls}
    depths = sorted({d.depth for r in recalls for d in r.depths})
    rows = []
    for depth in depths:
        at = {length: next((d for d in r.depths if d.depth == depth), None) for length, r in by_length.items()}
        rows.append((f"{100 * depth:g} %", [_cell(at.get(length)) for length in lengths]))
    return [*rows, ("all depths", [_cell(by_length.get(length)) for length in lengths])]


def _cell(share: Share | None) -> Cell:
    return Cell("not run") if share is None else Cell(f"{share.found} of {share.n}", round(45 * share.exact))


# ---------------------------------------------------------------------------------------------------------------------
# What it took
# ---------------------------------------------------------------------------------------------------------------------


def took(report: Report) -> list[tuple[str, list[str]]]:
    """(stage, [tokens, bytes read, changed, written, seconds of work, measuring, writing, in all]) where anything is known."""
    rows = []
    for stage in report.converted:
        if all(known is None for known in (stage.tokens, stage.bytes, stage.spent, stage.seconds)):
            continue
        moved, spent = stage.bytes, stage.spent
        cells = [text.count_text(stage.tokens) if stage.tokens is not None else "–"]
        cells += ["–"] * 3 if moved is None else [text.bytes_text(n) for n in (moved.read, moved.changed, moved.written)]
        seconds = [None] * 3 if spent is None else [spent.work, spent.measure, spent.write]
        cells += ["–" if s is None else text.seconds_text(s) for s in (*seconds, stage.seconds)]
        rows.append((stage.name, cells))
    return rows
