"""Tables that are printed in the terminal, as Markdown, or on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table
from rich.markup import escape

from benchmarks.statistics import t_interval


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        title: What it shows.
        header: A text a column.
        rows: A text a column each; the first one names the row.
        numbers: How many columns at the right hold numbers, which stand at the right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int = 0

    def markdown(self) -> str:
        """Return it in Markdown, without the title."""
        rules = ("---",) * (len(self.header) - self.numbers) + ("---:",) * self.numbers
        lines = [self.header, rules, *self.rows]
        escaped = ([text.replace("|", "\\|") for text in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)

    def rich(self) -> rich.table.Table:
        """Return it for the terminal."""
        shown = rich.table.Table(title=escape(self.title) or None)
        for place, text in enumerate(self.header):
            number = place >= len(self.header) - self.numbers
            shown.add_column(escape(text), justify="right" if number else "left")
        for place, row in enumerate(self.rows):
            if place and row[0] and any(not other[0] for other in self.rows):
                shown.add_section()  # rows that name nothing go on with the one before
            shown.add_row(*map(escape, row))
        return shown


def cell(values: Sequence[float]) -> str:
    """Return what runs scored: mean, [95 % t interval over them], (each)."""
    if not len(values):
        return "–"
    each = ", ".join(f"{v:.3f}" for v in values)
    if len(values) == 1:
        return f"({each})"
    i = t_interval(values)
    return f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}] ({each})"
