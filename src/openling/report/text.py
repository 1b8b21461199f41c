"""Names and numbers as readers see them, shared by page, plots and terminal table."""

from __future__ import annotations

STAGES = {
    "teacher": "teacher",
    "source": "as given",
    "lightning": "Lightning conversion",
    "linear-warmup": "linear warm-up",
    "mla": "MLA conversion",
    "mla-warmup": "MLA warm-up",
}
KINDS = {"lightning": "Lightning", "mla": "MLA", "gqa": "GQA"}
GATES = {
    "finite": "NaN and infinite values",
    "lightning_loss": "loss after the Lightning conversion",
    "layer_error": "squared error of the worst new layer",
    "mla_step": "loss that the MLA conversion adds",
    "warmup_rise": "loss at the end of the warm-up over its start",
    "recall_drop": "recall below the teacher's",
    "final_gap": "loss above the teacher's in the end",
}


def stage_text(name: str) -> str:
    """A stage as readers know it; other names as they are."""
    return STAGES.get(name, name)


def count_text(value: float, base: int = 1000) -> str:
    """1234567 as 1.23M (base 1024: 65536 as 64K), three digits at most."""
    for power, unit in ((4, "T"), (3, "B" if base == 1000 else "G"), (2, "M"), (1, "K")):
        # 999.6 thousand rounds to a million.
        if abs(value) >= base**power * 0.9995:
            return f"{value / base**power:.3g}{unit}"
    return f"{value:.3g}"


def bytes_text(value: float) -> str:
    """Bytes in binary units."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return f"{value / 1024**power:.4g} {unit}"
    return f"{value:.4g} B"


def seconds_text(value: float) -> str:
    """Seconds, or minutes and seconds from two minutes on."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def perplexity_text(value: float) -> str:
    """Perplexity to about four digits, large ones in powers of ten."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def gap_text(value: float) -> str:
    """A difference in nats with its sign."""
    return f"{value:+.3f}"


def device_text(hardware: str) -> str:
    """The GPUs of a machine that `environment.hardware` described; of one without any, the processor and its cores."""
    machine, _, gpus = hardware.partition(" GiB, ")
    if not gpus:
        return machine.rsplit(", ", 1)[0]
    names = gpus.split(", ")
    return " and ".join(f"{n} x {name}" if (n := names.count(name)) > 1 else f"one {name}" for name in dict.fromkeys(names))
