"""The figures of docs/results.md from benchmarks/results/migration: how far each arm got in how many tokens.

python benchmarks/figures.py        writes docs/figures/*.svg, prints the tokens to the losses that `paper` reaches
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "migration"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
# Arms in the order of their names in the figure: label, colour.
ARMS = {
    "scratch": ("hybrid from random weights", "#999999"),
    "paper": ("preset paper", "#d95f02"),
    "pure-linear": ("best, no MLA layer", "#e6ab02"),
    "best-without-kl": ("best, cross-entropy instead of KL", "#66a61e"),
    "best": ("best, 7 Lightning : 1 MLA", "#1b9e77"),
    "groups-of-2": ("best, 1 : 1", "#7570b3"),
    "best-all-mixers-50m": ("best, all mixers, Muon", "#e7298a"),
    "trained-on-kl-100m": ("... then all parameters, KL", "#e7298a"),
    "continued-200m": ("teacher, trained on", "#000000"),
}
# The same with 4 x 1024 tokens a step: results file, label, colour, line.
FEW_ROWS = {
    "scratch-rows4-0": ("hybrid from random weights", "#999999", "-"),
    "paper-rows4-0": ("preset paper", "#d95f02", "-"),
    "best-rows4-0": ("best", "#1b9e77", "-"),
    "best-all-mixers-rows4-0": ("best, all mixers, Muon", "#e7298a", "-"),
    "selected-rows4-0": ("... and the layer of least loss", "#7570b3", "-"),
    "selected-rows4-1": ("... seed 1", "#7570b3", ":"),
}


def rows_of(name: str) -> list[dict[str, Any]]:
    """The lines of a results file."""
    rows: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return rows


def curve_of(name: str) -> list[dict[str, float]]:
    """An arm's points: tokens, cross-entropy before each step, KL where it was trained on."""
    return [point for row in rows_of(name) for point in row.get("curve", [])]


def tokens_to(points: list[dict[str, float]], level: float) -> float | None:
    """The tokens from which on an arm's means are at or below a loss; None where its last mean is above it."""
    above = max((i for i, p in enumerate(points) if p["ce"] > level), default=-1)
    return points[above + 1]["tokens"] if above + 1 < len(points) else None


def print_tokens_to_levels() -> None:
    """For losses that `paper` reaches, how many times fewer tokens each arm needs to it, at 4 x 1024 tokens a step."""
    curves = {name: curve_of(f"ling-moe-{name}") for name in FEW_ROWS}
    paper = curves.pop("paper-rows4-0")
    for level in (*(round(4.6 - 0.2 * i, 1) for i in range(6)), paper[-1]["ce"]):
        needed = tokens_to(paper, level)
        if needed:
            found = {name: tokens_to(points, level) for name, points in curves.items()}
            said = ", ".join(f"{name} {n:,} ({needed / n:.0f} times fewer)" for name, n in found.items() if n)
            print(f"{level:.3f} nats: paper {needed:,}; {said}")


def arms(axes: Axes) -> None:
    """Cross-entropy over tokens of every arm of the MoE teacher."""
    for arm, (label, colour) in ARMS.items():
        points = curve_of(f"ling-moe-{arm}-0")
        style = ":" if label.startswith("...") else "-"
        axes.plot([p["tokens"] for p in points], [p["ce"] for p in points], style, color=colour, label=label, linewidth=1.6)
    axes.set(xscale="log", xlabel="tokens trained on", ylabel="nats per token, training text, before each step")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def few_rows(axes: Axes) -> None:
    """Cross-entropy over tokens with 4 x 1024 tokens a step."""
    for name, (label, colour, style) in FEW_ROWS.items():
        points = curve_of(f"ling-moe-{name}")
        axes.plot([p["tokens"] for p in points], [p["ce"] for p in points], style, color=colour, label=label, linewidth=1.6)
    axes.set(xscale="log", xlabel="tokens trained on", ylabel="nats per token, training text, before each step")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main_arm(axes: Axes) -> None:
    """KL of the SmolLM2 hybrid to its teacher over tokens."""
    points = curve_of("smollm2-135m-instruct-best-all-mixers-334m-0")
    half = max(i for i, p in enumerate(points[:-1]) if points[i + 1]["tokens"] - p["tokens"] < 1e5 and p["tokens"] > 1e7)
    for part, label, colour in (
        (points[:half], "linear warm-up", "#1b9e77"),
        (points[half:], "after MLA: MLA warm-up", "#7570b3"),
    ):
        axes.plot([p["tokens"] for p in part], [p["kl"] for p in part], color=colour, label=label, linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlabel="tokens trained on", ylabel="KL to the teacher, nats per token, training text")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.tick_params(axis="y", which="minor", labelleft=False)
    axes.legend(frameon=False, fontsize=8)


def write(name: str, paint: Any) -> None:
    """One figure as SVG; the same input gives the same bytes."""
    with mpl.rc_context(
        {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "axes.spines.right": False, "axes.spines.top": False}
    ):
        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        paint(figure.subplots())
        FIGURES.mkdir(exist_ok=True)
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    write("moe-arms", arms)
    write("moe-few-rows", few_rows)
    write("smollm2-main-arm", main_arm)
    print_tokens_to_levels()
