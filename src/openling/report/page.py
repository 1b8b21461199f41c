"""One self-contained HTML page per run: everything inline, nothing fetched, no script; what was not measured says `not run`.

The same figures as a table for the terminal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table
from rich.text import Text

from openling.report import details, plots, shipped, text
from openling.report.details import Plot, drawn
from openling.report.schema import DecodeRow, Report, Stage, Verdict, parse, read_metrics, read_report

# Ling-2.6 report, arXiv 2606.15079, pages 9 and 10.
PUBLISHED_TOKENS = (
    "about 400 billion tokens on the two warm-ups and 8 trillion on continued pre-training (arXiv 2606.15079, pages 9 and 10)"
)
TEMPLATE = "page.html.j2"
SECTIONS = {
    "shipped": "Shipped hybrid",
    "plan": "Plan",
    "stages": "Stages",
    "gates": "Gates",
    "took": "Time and bytes",
    "curves": "Warm-up curves",
    "layers": "Layer errors",
    "energy": "MLA energy",
    "heads": "Half-lives",
    "routers": "Routers",
    "needle": "Recall",
    "decode": "Decoding",
    "samples": "Completions",
    "presets": "Paper against best",
    "approximations": "Approximations",
    "environment": "How to repeat it",
}


def build(run_folder: Path) -> Path:
    """Write `report.html` from `report.json` and the training logs it names; returns its path.

    Raises UserError where there is no report to read, or one with a wrong field.
    """
    run_folder = Path(run_folder)
    report = read_report(run_folder)
    page = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            sections=[(name, title) for name, title in SECTIONS.items() if name != "shipped" or report.shipped],
            headline=headline(report),
            honest=[*at_the_gates(report), *honest(report), *shipped.said(report)],
            shipped=shipped.section(report),
            gates=gates(report),
            finite=[s for s in report.stages if any((v.gate, v.outcome) == ("finite", "passed") for v in s.gates)],
            plan_rows=plan_rows(report),
            curves=curves(report, run_folder),
            took=details.took(report),
            layer_plots=[drawn(text.stage_text(s.name), plots.layer_plot, s.layers) for s in report.converted if s.layers],
            energy=details.energy_plots(report),
            heads=details.heads(report),
            routers=details.routers(report),
            needle=details.needle(report),
            decode_plots=decode_plots(report),
            decode_rows=decode_rows(report),
            samples=samples(report),
            approximations=approximations(report),
        )
    )
    path, unfinished = run_folder / "report.html", run_folder / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(path)
    return path


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("openling.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": text.count_text,
        "bytes": text.bytes_text,
        "seconds": text.seconds_text,
        "ppl": text.perplexity_text,
        "gap": text.gap_text,
        "stage": text.stage_text,
        "kind": lambda name: text.KINDS.get(name, name),
    }
    return environment


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def headline(report: Report) -> list[str]:
    """What was done, in sentences with the key numbers; only what is known."""
    said = []
    if kinds := report.layer_kinds:
        became = [f"{kinds.count(kind)} {name}" for kind, name in text.KINDS.items() if kind in kinds]
        sentence = f"The {len(kinds)} softmax-attention layers of the teacher became {' and '.join(became)} layers"
        if report.plan and report.plan.source:
            new, old = report.plan.kv_bytes_per_token, report.plan.source.kv_bytes_per_token
            less = f", {old / new:.1f} times less" if new else ""
            state = text.bytes_text(report.plan.state_bytes_per_sequence)
            sentence += (
                f": {text.bytes_text(new)} of cache per token instead of {text.bytes_text(old)}{less}, and a state of {state}"
            )
            sentence += " per sequence that does not grow"
        said.append(sentence + ".")
    last = report.last_measured
    if last:
        parts = [f"{a.loss:.3f} on {name} ({text.gap_text(a.gap)} over the teacher)" for name, a in last.domains.items()]
        tokens = report.warm_up_tokens
        after = (
            f"after {text.count_text(tokens)} tokens of warm-up" if tokens else f"after the stage “{text.stage_text(last.name)}”"
        )
        said.append(f"Its loss {after}, in nats per token: {'; '.join(parts)}.")
    return said


def honest(report: Report) -> list[str]:
    """What so few tokens recover, and what they do not."""
    said, last = [], report.last_measured
    if last:
        name, worst = max(last.domains.items(), key=lambda item: item[1].gap)
        if worst.gap >= 0.01:
            said.append(
                f"On {name}, {text.gap_text(worst.gap)} nats mean that the hybrid gives the true next token "
                f"{math.exp(worst.gap):.3g} times less probability than the teacher (geometric mean)."
            )
        said += [sentence for name in last.domains if (sentence := _recovered(report, last, name))]
    if tokens := report.warm_up_tokens:
        said.append(
            f"Ling-2.6 spent {PUBLISHED_TOKENS}; this run trained on {text.count_text(tokens)} tokens. "
            "It shows that the pipeline works and what each step costs, not how good a hybrid can become."
        )
    found = [stage for stage in report.stages if stage.needle]
    if len(found) > 1:
        first, final = found[0].needle[-1], found[-1].needle[-1]
        said.append(
            f"Needles found at {final.length:,} tokens: {first.found} of {first.n} ({text.stage_text(found[0].name)}), "
            f"{final.found} of {final.n} ({text.stage_text(found[-1].name)})."
        )
    return said


def at_the_gates(report: Report) -> list[str]:
    """Where the run was stopped; then where it was let through, or went on unguarded."""
    stopped, passed = [], []
    for stage in report.stages:
        for v in stage.gates:
            name = f"{text.stage_text(stage.name)}: {text.GATES.get(v.gate, v.gate)}, {measured(v)}"
            if v.outcome == "stopped":
                how = f"--resume and --gates.{v.gate} with a wider limit"
                stopped.append(f"Stopped at a gate. {name}; the limit is {bound(v.limit, v)}. To go on all the same: {how}.")
            elif v.outcome == "let through":
                passed.append(f"Outside the usual tolerance and let through. {name}; the usual limit is {bound(v.standard, v)}.")
            elif v.outcome == "warned":
                passed.append(f"Worth a look, and no gate is set for it. {name}. --gates.{v.gate} with a limit stops there.")
    return stopped + passed


def measured(verdict: Verdict) -> str:
    """What a gate saw."""
    if verdict.value is None:
        return "–"
    number = f"{verdict.value:+.3f}" if verdict.unit == "nats" else f"{verdict.value:.4g}"
    return f"{number} {verdict.unit}" + (f" ({verdict.why})" if verdict.why else "")


def bound(limit: float | None, verdict: Verdict) -> str:
    """A limit with its unit."""
    return "none" if limit is None else f"{limit:.4g} {verdict.unit}"


def gates(report: Report) -> list[tuple[str, str, str, str, str, str]]:
    """(stage, what is judged, text, measured, limit, outcome), without gates that are off and values that are all finite."""
    rows = []
    for stage in report.stages:
        for v in stage.gates:
            if v.outcome == "off" or (v.gate, v.outcome) == ("finite", "passed"):
                continue
            limit = bound(v.limit, v) + ("" if v.limit == v.standard else f" (usually {bound(v.standard, v)})")
            outcome = f"{v.outcome}: {v.why}" if v.outcome == "not judged" else v.outcome
            what = text.GATES.get(v.gate, v.gate)
            rows.append((stage.name, f"{what} ({v.gate})", v.text or "–", measured(v), limit, outcome))
    return rows


def _recovered(report: Report, last: Stage, domain: str) -> str | None:
    """How much of the loss that the Lightning conversion cost is won back on one text."""
    start = next((s.domains[domain] for s in report.converted if s.name == "lightning" and domain in s.domains), None)
    end = last.domains[domain]
    if start is None or start.gap <= 0 or last.name == "lightning":
        return None
    share = 100 * (start.loss - end.loss) / start.gap
    return (
        f"On {domain} the swap to Lightning cost {text.gap_text(start.gap)} nats at first; the run ends with {share:.0f} % of "
        f"that recovered and {text.gap_text(end.gap)} nats still missing."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables and plots
# ---------------------------------------------------------------------------------------------------------------------


def plan_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(what, teacher, hybrid, ratio)."""
    plan = report.plan
    if plan is None:
        return []
    source, rows = plan.source, []
    named: list[tuple[str, str, Callable[[float], str]]] = [
        ("Parameters", "total_params", text.count_text),
        ("Active per token", "active_params", text.count_text),
        ("Cache per token", "kv_bytes_per_token", text.bytes_text),
        ("State per sequence", "state_bytes_per_sequence", text.bytes_text),
    ]
    for label, field, show in named:
        new, old = getattr(plan, field), getattr(source, field) if source else None
        ratio = f"{new / old:.3g}" if old else "–"
        rows.append((label, "not run" if old is None else show(old), show(new), ratio))
    even = "never" if plan.break_even_tokens is None else f"{plan.break_even_tokens:,} tokens"
    rows.append(("Break-even context", "–", even if source else "not run", "–"))
    return rows


def curves(report: Report, folder: Path) -> list[Plot]:
    """The training curve of every stage that names a log."""
    out = []
    for stage in report.stages:
        if stage.metrics is None:
            continue
        name, rows = text.stage_text(stage.name), read_metrics(folder, stage.metrics)
        if not rows:
            out.append(Plot(name, None, f"not run: {stage.metrics} is {'missing' if rows is None else 'empty'}"))
            continue
        first, last = rows[0], rows[-1]
        amount = f"{last['step']:,} steps, {text.count_text(last['tokens'])} tokens"
        caption = f"{name}: {amount}, loss {first['loss']:.2f} → {last['loss']:.2f}"
        out.append(drawn(caption, plots.curve_plot, rows))
    return out


def decode_plots(report: Report) -> list[Plot]:
    """Memory and time against context."""
    teacher, hybrid = report.decode.teacher, report.decode.hybrid
    if not teacher and not hybrid:
        return []
    memory = drawn("Cache of one sequence", plots.memory_plot, teacher, hybrid, crossing(teacher, hybrid))
    return [memory, drawn("Time per decoded token", plots.speed_plot, teacher, hybrid)]


def crossing(teacher: Sequence[DecodeRow], hybrid: Sequence[DecodeRow]) -> float | None:
    """Context from which the hybrid's cache is the smaller one: where the straight lines through the measured sizes meet."""
    if min(len(teacher), len(hybrid)) < 2:
        return None

    def line(rows: Sequence[DecodeRow]) -> tuple[float, float]:
        a, b = rows[0], rows[-1]
        slope = (b.cache_bytes - a.cache_bytes) / (b.context - a.context)
        return slope, a.cache_bytes - slope * a.context

    (teacher_slope, teacher_base), (hybrid_slope, hybrid_base) = line(teacher), line(hybrid)
    if teacher_slope <= hybrid_slope:
        return None
    return max(0.0, (hybrid_base - teacher_base) / (teacher_slope - hybrid_slope))


def decode_rows(report: Report) -> list[tuple[int, DecodeRow | None, DecodeRow | None]]:
    """(context, teacher, hybrid)."""
    teacher, hybrid = ({r.context: r for r in rows} for rows in (report.decode.teacher, report.decode.hybrid))
    return [(context, teacher.get(context), hybrid.get(context)) for context in sorted({*teacher, *hybrid})]


def samples(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """(prompt, [(stage, completion)])."""
    prompts = dict.fromkeys(sample.prompt for stage in report.stages for sample in stage.samples)
    return [
        (prompt, [(stage.name, s.completion) for stage in report.stages for s in stage.samples if s.prompt == prompt])
        for prompt in prompts
    ]


def approximations(report: Report) -> list[dict[str, Any]]:
    """One row per stage, step and measure: how often, median, smallest and largest value with their layers."""
    groups: dict[tuple[str, str, str], list[tuple[float, int | None]]] = {}
    for stage in report.stages:
        for a in stage.approximations:
            groups.setdefault((stage.name, a.step, a.measure), []).append((a.value, a.layer))
    rows = []
    for (stage_name, step, measure), found in groups.items():
        (low, low_layer), (high, high_layer) = min(found, key=lambda pair: pair[0]), max(found, key=lambda pair: pair[0])
        median = statistics.median(value for value, _ in found)
        row = {"stage": stage_name, "step": step, "measure": measure, "count": len(found), "median": median}
        rows.append(row | {"low": low, "low_layer": low_layer, "high": high, "high_layer": high_layer})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------------------------------


def summary_table(report: dict[str, Any]) -> Table:
    """The stages for a terminal of 100 columns, a row per stage and text.

    report: the contents of `report.json`; UserError where a field is wrong.
    """
    run = parse(report)
    title = run.title if run.seconds is None else f"{run.title} ({text.seconds_text(run.seconds)})"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title=Text(title), title_justify="left")
    for name in ("stage", "tokens", "text", "loss", "gap", "ppl", "KL", "top-1", "needles"):
        # Only a text's name, which can be the user's, may take more than one line.
        table.add_column(name, justify="left" if name in ("stage", "text") else "right", no_wrap=name != "text", overflow="fold")
    for stage in run.stages:
        for row in _summary_rows(stage):
            table.add_row(*map(Text, row))
    return table


def _summary_rows(stage: Stage) -> list[list[str]]:
    found, tried = sum(r.found for r in stage.needle), sum(r.n for r in stage.needle)
    first = [text.stage_text(stage.name), "–" if stage.tokens is None else text.count_text(stage.tokens)]
    rows = []
    for name, a in stage.domains.items():
        cells = [name, f"{a.loss:.3f}", text.gap_text(a.gap), text.perplexity_text(a.perplexity)]
        cells += [f"{a.kl:.3f}", f"{100 * a.top1:.1f} %"]
        if stage.name == "teacher":
            cells[2] = cells[4] = cells[5] = "–"
        rows.append(cells)
    rows = rows or [["not run", *[""] * 5]]
    needles = f"{found} of {tried}" if tried else "not run"
    return [[*(first if i == 0 else ["", ""]), *row, needles if i == 0 else ""] for i, row in enumerate(rows)]
