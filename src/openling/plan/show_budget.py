"""`openling plan --budget`: what the scaling laws say, as a table for a reader who has not read the paper."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from openling.plan.numbers import short
from openling.plan.scaling import SEQUENCE, Budget


def show_budget(moe: Budget, dense: Budget, console: Console | None = None) -> None:
    """Both kinds of model side by side, then what is extrapolated."""
    console = console or Console(highlight=False)
    console.print(f"\n[bold]A budget of {moe.flops:.3g} training FLOPs[/bold], by the Ling scaling laws (arXiv 2507.17702)\n")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column("with experts", justify="right", style="bold")
    table.add_column("dense", justify="right")
    both = (moe, dense)
    table.add_row("Learning rate, AdamW, after warm-up", *(f"{b.learning_rate:.3g}" for b in both))
    table.add_row("Batch", *(f"{short(b.batch_tokens)} tokens" for b in both))
    table.add_row(f"  sequences of {SEQUENCE:,}", *(f"{b.batch_tokens / SEQUENCE:,.0f}" for b in both))
    table.add_row("Train on", *(f"{short(b.tokens)} tokens" for b in both))
    table.add_row("  optimiser steps", *(f"{b.steps:,.0f}" for b in both))
    table.add_row("FLOPs per token, forward and backward", *(f"{b.flops_per_token / 1e9:,.3g} GFLOP" for b in both))
    gain = f"{moe.leverage:.1f}x" if moe.leverage else "-"
    table.add_row("The same loss from a dense model costs", gain, "1x")
    table.add_row()
    shapes = [b.shape.config for b in both]
    table.add_row("A shape of this size", "", "")
    table.add_row("  hidden size, layers", *(f"{c.hidden_size:,}, {c.num_hidden_layers}" for c in shapes))
    table.add_row("  heads", *(f"{c.num_attention_heads} of {c.head_dim}" for c in shapes))
    table.add_row("  Lightning : MLA layers", *(_ratio(b) for b in both))
    table.add_row("  experts, active, shared", _experts(moe), "-")
    table.add_row("  FFN width, of experts", *(_widths(b) for b in both))
    table.add_row("  parameters, active per token", *(_parameters(b) for b in both))
    table.add_row(
        "  its FLOPs per token against the law", *(f"{b.shape.flops_per_token / b.flops_per_token - 1:+.0%}" for b in both)
    )
    console.print(table)
    console.print("\nExtrapolated:")
    listed = Table.grid(padding=(0, 1))
    for said in moe.extrapolated:
        listed.add_row(" -", said)
    console.print(listed)
    console.print(
        "The shape's proportions are ours, after Ling-2.6 flash and 1T. FLOPs per token leave out embeddings and LM head.\n",
        style="dim",
    )


def _ratio(b: Budget) -> str:
    kinds = b.shape.config.layer_kinds
    return f"{kinds.count('lightning')} : {kinds.count('mla')}"


def _experts(b: Budget) -> str:
    c = b.shape.config
    return f"{c.num_experts}, {c.num_experts_per_tok}, {c.num_shared_experts}"


def _widths(b: Budget) -> str:
    c = b.shape.config
    return f"{c.intermediate_size:,}" + (f", {c.moe_intermediate_size:,}" if c.moe_layers else "")


def _parameters(b: Budget) -> str:
    total, active = b.shape.total_parameters, b.shape.active_parameters
    return short(total) if total == active else f"{short(total)}, {short(active)}"
