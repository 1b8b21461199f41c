"""The plots of a report as inline SVG: no fonts, scripts or addresses inside; colours are the page's CSS variables.

Colours are Okabe and Ito's, which the colour-blind can tell apart; lines are labelled at their ends instead of by a legend.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from openling.report.schema import DecodeRow, HeadSpans, LayerError, Recall, RouterDrift, Spectrum
from openling.report.text import KINDS, STAGES, bytes_text, count_text, stage_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib can parse, replaced by CSS variables afterwards: the page's theme decides the real colours.
INK, GRID = "#010101", "#020202"
PALETTE = {"blue": "#030303", "orange": "#040404", "green": "#050505", "purple": "#060606", "red": "#070707", "muted": "#080808"}
KIND_COLOURS = {"lightning": PALETTE["orange"], "mla": PALETTE["blue"], "gqa": PALETTE["muted"]}
STAGE_COLOURS = dict(zip(STAGES, (PALETTE[c] for c in ("muted", "green", "red", "orange", "purple", "blue")), strict=True))
_VARIABLES = {INK: "ink", GRID: "grid", **{value: name for name, value in PALETTE.items()}}
_salt = itertools.count()


def available() -> bool:
    """Whether plots can be drawn here."""
    return find_spec("matplotlib") is not None


def draw(paint: Callable[[Axes], None], label: str, *, width: float = 5.2, height: float = 3.1) -> str:
    """An `<svg>` element painted by `paint`; sizes in inches. `label` is read to those who cannot see it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": f"openling-{next(_salt)}",  # ids of clip paths must differ between the plots of one page
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.labelpad": 7,
        "axes.edgecolor": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "lines.linewidth": 1.8,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    """The bare element: without XML header, metadata, namespaces, fixed size, clashing ids; colours as CSS variables."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:\w+)?|width|height)="[^"]*"', "", svg.split(">", 1)[0]) + ">" + svg.split(">", 1)[1]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"font: ([^;\"]*?)'[^;\"]*", r"font: \1sans-serif", svg)
    for stand_in, name in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names at the right end of lines, (x, y, text, colour), pushed apart where they would overlap."""
    axes.figure.canvas.draw()  # fixes the transforms
    line = 11.0 * axes.figure.dpi / 72
    placed = sorted(
        ((axes.transData.transform((x, y))[1], x, y, text, colour) for x, y, text, colour in ends), key=lambda p: p[0]
    )
    heights = [p[0] for p in placed]
    for i in range(1, len(heights)):
        lines = (placed[i - 1][3].count("\n") + placed[i][3].count("\n")) / 2 + 1
        heights[i] = max(heights[i], heights[i - 1] + lines * line)
    # Recentre, so that a crowd at the bottom does not all move up.
    excess = max(0.0, heights[-1] - axes.bbox.y1) if heights else 0.0
    for (pixel, x, y, text, colour), height in zip(placed, heights, strict=True):
        shift = (height - excess - pixel) * 72 / axes.figure.dpi
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": colour, "annotation_clip": False}
        axes.annotate(text, (x, y), (6, shift), **style)


def curve_plot(rows: Sequence[dict[str, Any]]) -> str:
    """Warm-up losses against tokens: what is minimised, and CE and KL where they are logged besides."""
    names = {"loss": ("loss", "ink"), "ce": ("CE", "blue"), "kl": ("KL", "orange")}

    def paint(axes: Axes) -> None:
        series = {name: [(r["tokens"], r[name]) for r in rows if r.get(name) is not None] for name in names}
        if series["loss"] in (series["ce"], series["kl"]):
            series["loss"] = []  # only one term is trained: once is enough
        ends = []
        for name, points in series.items():
            if points:
                label, colour = names[name][0], PALETTE.get(names[name][1], INK)
                x, y = zip(*points, strict=True)
                axes.plot(x, y, color=colour, linewidth=1.3, marker="o" if len(x) < 3 else None, markersize=4)
                ends.append((x[-1], y[-1], f"{label} {y[-1]:.2f}", colour))
        axes.set_xlabel("tokens")
        axes.set_ylabel("nats per token")
        axes.xaxis.set_major_formatter(lambda value, _: count_text(value))
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        _end_labels(axes, ends)

    return draw(paint, "training loss against tokens")


def layer_plot(rows: Sequence[LayerError]) -> str:
    """Relative error of each layer's attention output: a ring is local, a disc propagated, the colour its kind."""

    def paint(axes: Axes) -> None:
        for row in rows:
            colour, both = KIND_COLOURS[row.kind], [row.local, row.propagated]
            if min(both) > 0:
                axes.plot([row.layer] * 2, both, color=colour, linewidth=1, alpha=0.5)
            if row.propagated > 0:
                axes.plot(row.layer, row.propagated, "o", color=colour, markersize=5)
            if row.local > 0:
                axes.plot(row.layer, row.local, "o", markerfacecolor="none", markeredgecolor=colour, markersize=5)
        _log_axis(axes, [v for row in rows for v in (row.local, row.propagated)] + [1])
        axes.axhline(1, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
        axes.annotate("as far off as writing zeros", (0, 1), (2, 3), **where)
        for i, kind in enumerate(k for k in KINDS if any(row.kind == k for row in rows)):
            axes.annotate(
                KINDS[kind], (0, 1), (70 * i, 4), xycoords="axes fraction", textcoords="offset points", color=KIND_COLOURS[kind]
            )
        axes.annotate("○ local  ● propagated", (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="right")
        axes.set_ylabel("relative squared error")
        _layer_axis(axes, [row.layer for row in rows])

    return draw(paint, "relative error of each layer's attention output", width=5.6)


def spectrum_plot(curves: Sequence[Spectrum]) -> str:
    """Energy kept against rank, a line per MLA layer; the chosen rank is marked, the layers that keep least and most named."""

    def paint(axes: Axes) -> None:
        for curve in curves:
            axes.plot(curve.ranks, [100 * e for e in curve.energy], color=PALETTE["blue"], linewidth=1.2, alpha=0.7)
        least, most = min(curves, key=lambda c: c.kept), max(curves, key=lambda c: c.kept)
        named = [least] if least is most else [most, least]
        for curve in named:
            axes.plot(curve.rank, 100 * curve.kept, "o", color=PALETTE["blue"], markersize=5)
        rank = least.rank
        said = [f"chosen rank {rank:,}", *(f"layer {c.layer}: {100 * c.kept:.3g} %" for c in named)]
        axes.axvline(rank, color=PALETTE["red"], linewidth=1.2, linestyle=(0, (4, 3)))
        note: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right"}
        axes.annotate("\n".join(said), (rank, 0), (-5, 6), color=PALETTE["red"], **note)
        axes.set_xscale("log", base=2)
        top = max(curve.ranks[-1] for curve in curves)
        powers = list(range(math.floor(math.log2(top)) + 1))
        axes.set_xticks([2**p for p in powers[:: math.ceil(len(powers) / 9)]])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_ylim(0, 105)
        axes.set_xlabel("rank")
        axes.set_ylabel("energy kept, %")

    return draw(paint, "energy kept against rank, by MLA layer")


def kept_plot(series: dict[str, Sequence[tuple[int, float]]]) -> str:
    """Share of energy kept in each MLA layer, one series of (layer, share) per factor."""
    colours = {name: PALETTE[colour] for name, colour in (("K and V", "blue"), ("query", "green"), ("RoPE", "orange"))}

    def paint(axes: Axes) -> None:
        ends = []
        for name, points in series.items():
            x, y = zip(*((layer, 100 * share) for layer, share in points), strict=True)
            axes.plot(x, y, "o-", color=colours[name], markersize=5, linewidth=1.2)
            ends.append((x[-1], y[-1], name, colours[name]))
        axes.set_ylim(0, 105)
        axes.set_ylabel("energy kept, %")
        _layer_axis(axes, [layer for points in series.values() for layer, _ in points])
        _end_labels(axes, ends)

    return draw(paint, "energy kept in each MLA layer")


def span_plot(layers: Sequence[HeadSpans]) -> str:
    """Heads by octave: the student's half-lives upwards, the look-back of the teacher's heads in their places downwards."""

    def paint(axes: Axes) -> None:
        sides = ((1, "half_life", "orange", "student: half-life"), (-1, "look_back", "muted", "teacher: look-back"))
        counts = {field: _octaves([v for s in layers for v in getattr(s, field)]) for _, field, _, _ in sides}
        every = [octave for found in counts.values() for octave in found]
        octaves = range(min(every, default=0), max(every, default=0) + 1)
        for sign, field, colour, name in sides:
            found = counts[field]
            axes.bar(list(octaves), [sign * found.count(o) for o in octaves], 0.9, align="edge", color=PALETTE[colour])
            corner: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": PALETTE[colour]}
            axes.annotate(name, (0, 1 if sign > 0 else 0), (4, -11 if sign > 0 else 4), **corner)
        axes.axhline(0, color=INK, linewidth=0.9)
        high = max(abs(v) for v in axes.get_ylim())
        axes.set_ylim(-1.15 * high, 1.15 * high)
        step = math.ceil(len(octaves) / 10)
        axes.set_xticks(
            [*octaves, octaves[-1] + 1][::step], [count_text(2.0**o, 1024) for o in [*octaves, octaves[-1] + 1]][::step]
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_xlabel("tokens")
        axes.set_ylabel("heads")

    return draw(paint, "heads by half-life, and the teacher's by look-back")


def _octaves(values: Sequence[float]) -> list[int]:
    """n for each value from 2^n on and below 2^(n + 1); below 1 counts as 1."""
    return [math.floor(math.log2(max(v, 1.0))) for v in values if math.isfinite(v)]


def span_layer_plot(layers: Sequence[HeadSpans]) -> str:
    """Range and median over the heads of each Lightning layer: half-life and, beside it, the teacher's look-back."""

    def paint(axes: Axes) -> None:
        for shift, field, colour in ((-0.15, "half_life", "orange"), (0.15, "look_back", "muted")):
            for spans in layers:
                values = sorted(getattr(spans, field))
                axes.plot([spans.layer + shift] * 2, [values[0], values[-1]], color=PALETTE[colour], linewidth=2)
                axes.plot(spans.layer + shift, values[len(values) // 2], "o", color=PALETTE[colour], markersize=4)
        _log_axis(axes, [v for s in layers for v in (*s.half_life, *s.look_back)])
        for i, (name, colour) in enumerate((("half-life", "orange"), ("look-back", "muted"))):
            place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "color": PALETTE[colour]}
            axes.annotate(name, (0, 1), (70 * i, 4), **place)
        axes.annotate("dot: median", (1, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="right")
        axes.set_ylabel("tokens")
        _layer_axis(axes, [spans.layer for spans in layers])

    return draw(paint, "half-lives and look-back by layer")


def router_plot(stages: Sequence[tuple[str, Sequence[RouterDrift]]]) -> str:
    """Share of tokens whose set of experts is not the teacher's, by layer, one line per (stage, rows)."""

    def paint(axes: Axes) -> None:
        ends = []
        for name, rows in stages:
            x, y = [r.layer for r in rows], [100 * r.changed for r in rows]
            colour = STAGE_COLOURS.get(name, INK)
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.3)
            ends.append((x[-1], y[-1], stage_text(name), colour))
        axes.set_ylim(0, 105)
        axes.set_ylabel("tokens with other experts, %")
        _layer_axis(axes, [r.layer for _, rows in stages for r in rows])
        _end_labels(axes, ends)

    return draw(paint, "share of tokens whose set of experts changed, by layer", width=5.8)


def _layer_axis(axes: Axes, layers: Sequence[int]) -> None:
    """Whole numbers, with room at both ends even for a single layer."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic height with plain numbers as ticks: at 1, 2 and 5 where it spans little, at powers of ten where much."""
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = [v for v in values if v > 0 and math.isfinite(v)]
    low, high = min(drawn, default=0.1), max(drawn, default=1)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, high * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def recall_plot(stages: Sequence[tuple[str, Sequence[Recall]]]) -> str:
    """Share of needles found, by length, one line per (stage, rows)."""

    def paint(axes: Axes) -> None:
        ends = []
        for name, rows in stages:
            x, y = [r.length for r in rows], [100 * r.exact for r in rows]
            colour = STAGE_COLOURS.get(name, INK)
            axes.plot(x, y, "o-", color=colour, markersize=4, clip_on=False)
            ends.append((x[-1], y[-1], stage_text(name), colour))
        lengths = sorted({r.length for _, rows in stages for r in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_ylim(0, 100)
        axes.set_xlabel("length in tokens")
        axes.set_ylabel("needles found, %")
        _end_labels(axes, ends)

    return draw(paint, "needle recall by length", width=5.8)


def memory_plot(teacher: Sequence[DecodeRow], hybrid: Sequence[DecodeRow], crossing: float | None) -> str:
    """Cache of one sequence against context; `crossing` is the context where both need the same."""

    def paint(axes: Axes) -> None:
        ends = []
        for name, rows, colour in (("teacher", teacher, PALETTE["muted"]), ("hybrid", hybrid, PALETTE["blue"])):
            if rows:
                x, y = [r.context for r in rows], [r.cache_bytes for r in rows]
                axes.plot(x, y, "o-", color=colour, markersize=4)
                ends.append((x[-1], y[-1], f"{name}\n{bytes_text(y[-1])}", colour))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("cache of one sequence")
        axes.yaxis.set_major_formatter(lambda value, _: bytes_text(value))
        _context_axis(axes, [r.context for r in (*teacher, *hybrid)], crossing)
        _end_labels(axes, ends)

    return draw(paint, "decoding memory against context")


def speed_plot(teacher: Sequence[DecodeRow], hybrid: Sequence[DecodeRow]) -> str:
    """Time per decoded token against context."""

    def paint(axes: Axes) -> None:
        ends = []
        for name, rows, colour in (("teacher", teacher, PALETTE["muted"]), ("hybrid", hybrid, PALETTE["blue"])):
            if rows:
                x, y = [r.context for r in rows], [r.ms_per_token for r in rows]
                axes.plot(x, y, "o-", color=colour, markersize=4)
                ends.append((x[-1], y[-1], f"{name}\n{y[-1]:.3g} ms", colour))
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("ms per token, median")
        _context_axis(axes, [r.context for r in (*teacher, *hybrid)], None)
        _end_labels(axes, ends)

    return draw(paint, "time per decoded token against context")


def _context_axis(axes: Axes, contexts: Sequence[int], crossing: float | None) -> None:
    """Powers of two as ticks, at most seven; the break-even context as a marked line."""
    low, high = float(min(contexts)), float(max(contexts))
    if crossing is not None and crossing > 0:
        low, high = min(low, crossing), max(high, crossing)
        axes.axvline(crossing, color=PALETTE["green"], linewidth=1.2, linestyle=(0, (4, 3)))
        label = f"break-even\n{crossing:,.0f} tokens"
        style: dict[str, Any] = {
            "xycoords": ("data", "axes fraction"),
            "textcoords": "offset points",
            "va": "top",
            "color": PALETTE["green"],
        }
        axes.annotate(label, (crossing, 1), (4, 0), **style)
    powers = list(range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1))
    step = math.ceil(len(powers) / 7)
    axes.set_xticks([2**p for p in powers[::step]], [count_text(2**p, 1024) for p in powers[::step]])
    axes.minorticks_off()
    axes.set_xlabel("context in tokens")
