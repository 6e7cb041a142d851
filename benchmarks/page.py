"""A report as one HTML file that needs no network: styles, script and plotly are inside."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from benchmarks.figures import Chart, Style, plotly_json
from benchmarks.tables import Table

if TYPE_CHECKING:
    from benchmarks.report import Report, Section, Turn


def html(report: Report) -> str:
    """Return the page.

    Raises:
        ImportError: plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    assets = files("benchmarks") / "assets"
    title = escape(report.title)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{title}</title><link rel="icon" href="data:,">',
            f"<style>{(assets / 'report.css').read_text()}</style></head><body>",
            f"<h1>{title}</h1><p>{escape(report.about)}</p>",
            *(f'<p class="warning">{escape(text)}</p>' for text in report.warnings),
            '<div class="chips" role="group" aria-label="Show or hide agents">',
            *(_chip(name, look) for name, look in report.looks.items()),
            "</div>",
            *(_section(section, report.looks) for section in report.sections),
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{(assets / 'report.js').read_text()}</script></body></html>",
        ]
    )


def _chip(name: str, look: Style) -> str:
    style = {"solid": "solid", "dash": "dashed", "dot": "dotted"}[look.dash[0]]
    line = f'<i style="border-top-color:{look.colour};border-top-style:{style}"></i>'
    variant = escape(name, quote=True)
    return (
        f'<button class="chip" aria-pressed="true" data-variant="{variant}">'
        f"{line}{escape(name)}</button>"
    )


def _section(section: Section, looks: dict[str, Style]) -> str:
    charts = "".join(_chart(chart, looks) for chart in section.charts)
    return "\n".join(
        [
            f"<section><h2>{escape(section.title)}</h2>",
            *(f'<p class="note">{escape(text)}</p>' for text in section.text),
            f'<div class="charts">{charts}</div>' if charts else "",
            *(_table(table) for table in section.tables),
            *(_transcript(heading, turns) for heading, turns in section.transcripts),
            "</section>",
        ]
    )


def _chart(chart: Chart, looks: dict[str, Style]) -> str:
    data = plotly_json(chart, looks).replace("<", "\\u003c")  # it must not end the script
    return (
        f'<div class="card"><h3>{escape(chart.title)}</h3>'
        f'<div class="chart" id="{chart.name}"></div>'
        f'<script type="application/json" id="{chart.name}-data">{data}</script></div>'
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in table.header)
    rows = "".join(_row(row) for row in table.rows)
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    return f'{title}<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'


def _row(row: Iterable[str]) -> str:
    first, *others = row
    cells = "".join(f"<td{_long(text)}>{escape(text)}</td>" for text in (first, *others))
    return f'<tr data-row="{escape(first, quote=True)}">{cells}</tr>'


def _long(text: str) -> str:
    return ' class="long"' if len(text) > 60 else ""


def _transcript(heading: str, turns: Iterable[Turn]) -> str:
    shown = "".join(
        f'<div class="pair"><p>{escape(turn.question)}</p>'
        f"<div>{_scored('before', turn.scores[0])}{escape(turn.before)}</div>"
        f"<div>{_scored('after', turn.scores[1])}{escape(turn.after)}</div></div>"
        for turn in turns
    )
    return f"<details><summary>{escape(heading)}</summary>{shown}</details>"


def _scored(when: str, score: float | None) -> str:
    return f"<i>{when}</i><b>{'–' if score is None else f'{score:.2f}'}</b>"
