"""The figures of docs/results.md from benchmarks/results/migration: how far each arm got in how many tokens.

python benchmarks/figures.py        writes docs/figures/*.svg, prints the tokens to the losses that `paper` reaches
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "migration"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
# Results of the MoE teacher's arms in the order of their names in a figure: file, label, colour, line.
Arms = dict[str, tuple[str, str, str]]
ARMS: Arms = {
    "scratch-0": ("hybrid from random weights", "#999999", "-"),
    "paper-0": ("preset paper", "#d95f02", "-"),
    "pure-linear-0": ("best, no MLA layer", "#e6ab02", "-"),
    "best-without-kl-0": ("best, cross-entropy instead of KL", "#66a61e", "-"),
    "best-0": ("best, 7 Lightning : 1 MLA", "#1b9e77", "-"),
    "groups-of-2-0": ("best, 1 : 1", "#7570b3", "-"),
    "best-all-mixers-50m-0": ("best, all mixers, Muon", "#e7298a", "-"),
    "trained-on-kl-100m-0": ("... then all parameters, KL", "#e7298a", ":"),
    "continued-200m-0": ("teacher, trained on", "#000000", "-"),
}
# The same with 4 x 1024 tokens a step.
FEW_ROWS: Arms = {
    "scratch-rows4-0": ("hybrid from random weights", "#999999", "-"),
    "paper-rows4-0": ("preset paper", "#d95f02", "-"),
    "best-rows4-0": ("best", "#1b9e77", "-"),
    "best-all-mixers-rows4-0": ("best, all mixers, Muon", "#e7298a", "-"),
    "selected-rows4-0": ("... and the layer of highest kl, 4", "#7570b3", "-"),
    "selected-rows4-1": ("... seed 1", "#7570b3", ":"),
}

# SmolLM2's arms on few tokens.
SHORT = ("paper", "scratch", "best", "best-without-kl")


def curves_of(name: str) -> list[list[dict[str, float]]]:
    """A results file's trainings. Their points: tokens, cross-entropy before each step, KL where it was trained on."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row["curve"] for row in rows if "curve" in row]


def joined(name: str) -> list[dict[str, float]]:
    """All points of a results file."""
    return [point for curve in curves_of(name) for point in curve]


def arm(name: str) -> list[dict[str, float]]:
    """All points of an arm of the MoE teacher."""
    return joined(f"ling-moe-{name}")


def tokens_to(points: list[dict[str, float]], level: float) -> float | None:
    """The tokens from which on an arm's means are at or below a loss; None where its last mean is above it."""
    above = max((i for i, p in enumerate(points) if p["ce"] > level), default=-1)
    return points[above + 1]["tokens"] if above + 1 < len(points) else None


def print_tokens_to_levels(curves: dict[str, list[dict[str, float]]], paper: str, levels: list[float]) -> None:
    """How many times fewer tokens than the arm `paper` each other one needs to losses, and to its last one."""
    peer = curves.pop(paper)
    for level in (*levels, peer[-1]["ce"]):
        needed = tokens_to(peer, level)
        if needed:
            found = {name: tokens_to(points, level) for name, points in curves.items()}
            said = ", ".join(f"{name} {n:,} ({needed / n:.0f} times fewer)" for name, n in found.items() if n)
            print(f"{level:.3f} nats: {paper} {needed:,}; {said}")


def losses(axes: Axes, arms: Arms) -> None:
    """Cross-entropy over tokens."""
    for name, (label, colour, style) in arms.items():
        points = arm(name)
        axes.plot([p["tokens"] for p in points], [p["ce"] for p in points], style, color=colour, label=label, linewidth=1.6)
    axes.set(xscale="log", xlabel="tokens trained on", ylabel="nats per token, training text, before each step")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main_arm(axes: Axes) -> None:
    """KL of the SmolLM2 hybrid to its teacher over tokens."""
    linear, mla = curves_of("smollm2-135m-instruct-best-all-mixers-334m-0")
    for part, label, colour in ((linear, "linear warm-up", "#1b9e77"), (mla, "after MLA: MLA warm-up", "#7570b3")):
        axes.plot([p["tokens"] for p in part], [p["kl"] for p in part], color=colour, label=label, linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlabel="tokens trained on", ylabel="KL to the teacher, nats per token, training text")
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
    axes.tick_params(axis="y", which="minor", labelleft=False)
    axes.legend(frameon=False, fontsize=8)


def write(name: str, paint: Callable[[Axes], None]) -> None:
    """One figure as SVG; the same input gives the same bytes."""
    with mpl.rc_context(
        {"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "axes.spines.right": False, "axes.spines.top": False}
    ):
        figure = Figure(figsize=(7.6, 3.8), layout="constrained")
        paint(figure.subplots())
        FIGURES.mkdir(exist_ok=True)
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    write("moe-arms", lambda axes: losses(axes, ARMS))
    write("moe-few-rows", lambda axes: losses(axes, FEW_ROWS))
    write("smollm2-main-arm", main_arm)
    print_tokens_to_levels({name: arm(name) for name in FEW_ROWS}, "paper-rows4-0", [4.6, 4.4, 4.2, 4.0, 3.8, 3.6])
    short = {f"{name}-short-0": joined(f"smollm2-135m-instruct-{name}-short-0") for name in SHORT}
    print_tokens_to_levels(short.copy(), "paper-short-0", [9.0, 8.0, 7.5, 7.0])
    print_tokens_to_levels(short, "scratch-short-0", [])
