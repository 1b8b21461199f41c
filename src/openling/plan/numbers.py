"""Numbers as people read them."""

from __future__ import annotations


def short(value: float, unit: str = "", digits: int = 3) -> str:
    """1.23 T, 45.6 B, 789 M, 12.3 K, 4: counts, powers of 1000."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if abs(value) >= 0.9995 * size:
            return f"{_digits(value / size, digits)}{letter}{unit}"
    return f"{_digits(value, digits)}{' ' if unit else ''}{unit}"


def gib(value: float) -> str:
    """Bytes in GiB with two decimals."""
    return f"{value / 2**30:,.2f}" if value >= 0.005 * 2**30 or value == 0 else "< 0.01"


def seconds(value: float) -> str:
    """12.3 s, 45.6 ms, 2.1 h, 3.4 days."""
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if value >= size * (2 if size > 1 else 1):
            return f"{_digits(value / size, 3)} {unit}"
    return f"{_digits(value * 1e6, 3)} µs"


def _digits(value: float, digits: int) -> str:
    """At least `digits` significant digits, never an exponent, no trailing zeros behind the point."""
    if value == 0:
        return "0"
    whole = len(str(int(abs(value))))
    decimals = max(0, digits - whole)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
