"""The benchmark's table, a row at a time: columns of fixed width, 120 together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from openling.bench.kernels import Row

WIDTH = 120
COLUMNS = {
    "op": 20,
    "shape": 21,
    "ours µs": 8,
    "peer": 17,
    "peer µs": 8,
    "ratio": 6,
    "floor µs": 8,
    "floor": 5,
    "goal": 12,
    "met": 4,
}
TEXT = ("op", "shape", "peer", "goal", "met")


class RowTable:
    """Prints rows as they come; `line` puts a line of text between them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._header_due = True

    def line(self, text: str, *, style: str = "") -> None:
        """One line outside the table; a header follows before the next row."""
        self.console.print(Text(text, style=style))
        self._header_due = True

    def row(self, row: Row) -> None:
        """One case."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=self._header_due, header_style="bold")
        for name, width in COLUMNS.items():
            table.add_column(name, width=width, justify="left" if name in TEXT else "right", overflow="fold")
        table.add_row(*_cells(row))
        if self._header_due:
            self.console.print()
        self.console.print(table)
        self._header_due = False
        if row.error:
            self.console.print(Text(f"  {row.error}", style="red"))


def _cells(row: Row) -> list[Text]:
    case = row.case
    op = f"{case.op} (graph)" if case.mode == "graph" else case.op
    ratio = "–" if row.ratio is None else f"{row.ratio:.2f}x"
    fraction = "–" if row.fraction is None else f"{row.fraction:.0%}"
    goal = str(case.goal).replace(", ", "\n") if case.goal else "–"
    ours = Text("failed", style="red") if row.error else Text(_us(row.us), style="bold")
    met = {True: Text("yes", style="green"), False: Text("no", style="red"), None: Text("–")}[row.met]
    texts = [case.peer_name or "–", _us(row.peer_us), ratio, _us(row.floor_us), fraction, goal]
    return [Text(op), Text(case.shape), ours, *map(Text, texts), met]


def _us(value: float | None) -> str:
    """Microseconds with three digits or more."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
