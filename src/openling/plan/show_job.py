"""A planned job on a terminal, for a reader who has never laid one out: of `openling plan` and `openling train --dry-run`."""

from __future__ import annotations

import re

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openling.model import count
from openling.plan.devices import GIB
from openling.plan.job import TrainingPlan
from openling.plan.numbers import gib, seconds, short

AXIS_TEXT = {
    "pipeline": "stages of consecutive layers",
    "replicate": "copies of everything, each with its own data",
    "shard": "data ranks that share weights and optimiser states",
    "context": "ranks that share the tokens of a sequence",
    "tensor": "ranks that share heads and widths of a layer",
    "expert": "ranks, of shard x context, with different experts",
}
ADVICE = {
    "matrix products": "the products themselves: nothing to change but the recomputation they include",
    "experts": "the experts' products: less recomputation saves some; nothing else here makes them faster",
    "attention": "softmax attention: fewer or shorter full-attention layers, or context ranks",
    "Lightning": "the Lightning scan, bound by memory",
    "norms, gates, RoPE": "memory traffic between products: less recomputation saves some",
    "LM head and loss": "the last stage: give it fewer layers, or raise tensor",
    "expert all-to-all": "rows sent to experts: keep expert within a node, or raise --network-bandwidth",
    "tensor collectives": "collectives inside layers: lower tensor",
    "context collectives": "states and latents between context ranks: lower context",
    "weights and gradients": "gathering and reducing weights: gather step, larger micro-batches or more stages",
    "pipeline bubble": "idle stages: more micro-batches in a step, or fewer stages",
    "optimiser": "the optimiser's own pass over its states: larger batches make it rarer",
    "teacher": "the teacher's forward pass: nothing here makes it cheaper",
}


def show_job(plan: TrainingPlan, name: str, *, placement: bool = True, console: Console | None = None) -> None:
    """Everything, in the order of the questions people ask: does it fit, how fast, what limits it, where does what lie."""
    console = console or Console(highlight=False)
    _heading(console, plan, name)
    _memory(console, plan)
    _time(console, plan)
    _traffic(console, plan)
    if plan.runners_up:
        _runners_up(console, plan)
    if placement:
        _placement(console, plan)
    _assumptions(console, plan)


def _heading(console: Console, plan: TrainingPlan, name: str) -> None:
    c, s = plan.config, plan.setup
    total, active = count.total_parameters(c, mtp=True), count.active_parameters(c)
    size = f"{short(total)} parameters" + (f", {short(active)} active" if c.moe_layers else "")
    console.print(f"\n[bold]{escape(name)}[/bold] ({size}) on {s.mesh.world:,} x {s.device.name}\n")
    table = Table.grid(padding=(0, 2))
    for axis, text in AXIS_TEXT.items():
        degree = getattr(s.mesh, axis)
        if degree > 1:
            table.add_row(axis, f"[bold]{degree:,}[/bold]", text)
    if s.mesh.world == 1:
        table.add_row("mesh", "[bold]1[/bold]", "one rank")
    table.add_row("", "", f"mesh {s.mesh}" if s.mesh.world > 1 else "")
    table.add_row()
    sequences = s.batch_tokens // s.seq_len
    table.add_row("batch", "", f"{short(s.batch_tokens)} tokens per step: {sequences:,} sequences of {s.seq_len:,}")
    up_to = "up to " if s.seq_len % s.mesh.context else ""
    table.add_row("", "", f"{s.micro_batches:,} micro-batches per rank, {s.micro_batch} x {up_to}{s.rows.tokens:,} tokens each")
    table.add_row("recompute", s.recompute, RECOMPUTE_TEXT[s.recompute])
    table.add_row("gather", s.gather, GATHER_TEXT[s.gather])
    table.add_row("optimiser", s.optimizer, "FP32 master weights, BF16 products")
    console.print(table)


RECOMPUTE_TEXT = {
    "none": "layers keep everything that backward needs",
    "selective": "layers keep results of products and attention",
    "layer": "layers keep their input; backward makes the rest again",
}
GATHER_TEXT = {
    "layer": "whole weights exist only while their layer works",
    "accumulate": "whole gradients stay through a step, whole weights do not",
    "step": "whole weights and gradients stay through a step",
}


def _memory(console: Console, plan: TrainingPlan) -> None:
    s, fullest = plan.setup, plan.fullest
    where = f" (stage {fullest.stage + 1} of {s.mesh.pipeline})" if s.mesh.pipeline > 1 else ""
    console.print(f"\n[bold]Memory of the fullest rank[/bold]{where}, GiB")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    last = ""
    for part in fullest.parts:
        table.add_row(part.kind if part.kind != last else "", gib(part.bytes), part.what)
        last = part.kind
    free = s.device.memory - fullest.total
    table.add_row("[bold]total[/bold]", f"[bold]{gib(fullest.total)}[/bold]", f"of {gib(s.device.memory)}; {gib(free)} free")
    console.print(table)
    if s.mesh.pipeline > 1:
        console.print("Every stage: " + ", ".join(f"{m.total / GIB:.1f}" for m in plan.memory))
    others = "   ".join(f"{policy} {gib(total)}" for policy, total in plan.policies.items())
    console.print(f"The same by recompute: {others}")


def _time(console: Console, plan: TrainingPlan) -> None:
    step = plan.time
    console.print(
        f"\n[bold]A step takes {seconds(step.seconds)}[/bold], predicted: {short(plan.tokens_per_second)} tokens/s, "
        f"{short(plan.tokens_per_second / plan.setup.mesh.world)} per GPU; MFU {plan.mfu:.1%}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, style="cyan")
    for name, value in sorted(step.parts.items(), key=lambda item: -item[1]):
        share = value / step.seconds
        if share >= 0.0005:
            table.add_row(name, seconds(value), f"{share:.1%}", "█" * round(30 * share))
    console.print(table)
    name = step.bottleneck
    console.print(f"[bold]Bottleneck: {name}.[/bold] {ADVICE[name][0].upper()}{ADVICE[name][1:]}.")
    if plan.setup.mesh.pipeline > 1:
        slow, mean = max(step.stage_seconds), sum(step.stage_seconds) / len(step.stage_seconds)
        console.print(f"Stage {step.slowest + 1} sets the pace, {slow / mean - 1:.0%} slower than the average stage.")


def _traffic(console: Console, plan: TrainingPlan) -> None:
    rows: dict[tuple[str, str, str, str], list[float]] = {}
    for f in plan.time.flows:
        sums = rows.setdefault((f.axis, f.collective, f.what, f.when), [0.0, 0.0])
        sums[0] += f.bytes * f.calls
        sums[1] += f.seconds
    if not rows:
        return
    where = "that stage" if plan.setup.mesh.pipeline > 1 else "the job"
    console.print(f"\n[bold]What a rank of {where} receives per step[/bold]")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("axis", no_wrap=True)
    table.add_column("collective, and of what")
    for title in ("GB", "link time"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for (axis, collective, what, when), (size, time) in sorted(rows.items(), key=lambda item: -item[1][1]):
        amount = f"{size / 1e9:,.0f}" if size >= 1e10 else f"{size / 1e9:.3f}"
        table.add_row(axis, f"{collective}: {what}", amount, seconds(time), when)
    console.print(table)
    console.print("hidden: behind compute, as far as that lasts; exposed: adds to the step; once: at its end", style="dim")


def _runners_up(console: Console, plan: TrainingPlan) -> None:
    console.print(f"\n[bold]Runners-up[/bold] of {plan.tried:,} setups tried")
    for r in plan.runners_up:
        behind = r.tokens_per_second / plan.tokens_per_second - 1
        console.print(str(r.setup.mesh), soft_wrap=True)
        rates = f"{r.bytes / GIB:.1f} GiB, {short(r.tokens_per_second)} tokens/s, {behind:+.0%}"
        console.print(f"  {rates}; recompute {r.setup.recompute}, gather {r.setup.gather}", style="dim")


def _placement(console: Console, plan: TrainingPlan) -> None:
    """Tensors of the same place in every layer are one row."""
    mesh = plan.setup.mesh
    rows: dict[tuple[str, ...], int] = {}
    for t in plan.inventory.tensors:
        p = t.placement(mesh)
        name = re.sub(r"^(model\.)?(layers\.\d+\.)?|\.weight$", "", t.name)
        shapes = ("x".join(map(str, p["shape"])), "x".join(map(str, p["local_shape"])))
        cuts = " ".join(re.sub(r": dim (\d) / \d+", r":\1", cut) for cut in p["cuts"]) or "-"
        key = (name, *shapes, cuts)
        rows[key] = rows.get(key, 0) + 1
    console.print("\n[bold]Placement[/bold]: every tensor, and its part on the fullest rank (cut: axis:dim)")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tensor", no_wrap=True)
    table.add_column("count", justify="right")
    for title in ("shape", "on a rank"):
        table.add_column(title, no_wrap=True)
    table.add_column("cut")
    for (name, shape, local, cuts), number in rows.items():
        table.add_row(name, str(number), shape, local, cuts)
    console.print(table)


def _assumptions(console: Console, plan: TrainingPlan) -> None:
    d = plan.setup.device
    rates = (
        f"{d.matmul / 1e12:,.0f} TFLOP/s ({d.grouped:.0%} of it for experts, {d.attention:.0%} for attention), memory "
        f"{d.bandwidth / 1e12:.2f} TB/s, NVLink {d.nvlink / 1e9:,.0f} GB/s, network {d.network / 1e9:,.0f} GB/s per GPU"
    )
    console.print(
        f"\n[dim]Rates: {rates}. MFU: 3 x forward FLOPs, causal attention, without MTP and recomputation, of "
        f"{d.peak / 1e12:,.0f} TFLOP/s. Not modelled: latency, launches, imbalance of experts, data and checkpoints. "
        "Estimates are marked; docs/plan.md says how each number is made.[/dim]\n"
    )
