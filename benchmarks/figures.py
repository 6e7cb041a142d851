"""Charts of a report: what they show, and two ways to draw it.

A :class:`Chart` is data. :func:`plotly_json` makes the interactive form of it for a page,
:func:`save_png` the printed form: both show the same numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from typing import Any, Final, Literal

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
"""Six of Okabe and Ito (2008) and a grey: told apart by colour-blind eyes, on white and black."""
DASHES: Final = (("solid", "-"), ("dash", "--"), ("dot", ":"))
"""Names for plotly and for matplotlib; they change when all colours have been used."""
MOST_BANDS: Final = 6
"""Lines of a picture that have their intervals drawn; of more nobody could tell whose is whose."""
MARKERS: Final = (("circle", "o"), ("square", "s"), ("diamond", "D"))


@dataclass(frozen=True)
class Style:
    """How one variant looks in every chart."""

    colour: str
    dash: tuple[str, Any]
    marker: tuple[str, str]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a look for each name: no two are the same for 21 names."""
    looks = [
        Style(c, dash, marker)
        for dash, marker in zip(DASHES, MARKERS, strict=True)
        for c in COLOURS
    ]
    return dict(zip(names, cycle(looks), strict=False))


@dataclass(frozen=True)
class Series:
    """What a chart shows of one variant.

    Attributes:
        name: The variant.
        x: Positions; in a chart of dots the values.
        y: Values; in a chart of dots what is written beside each.
        low: Lower bounds of an interval around y (of lines) or x (of dots).
        high: Upper bounds.
        points: Single runs behind a dot: their values.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Any]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        name: Names its file and its place on the page.
        title: What it shows.
        x: Label of the x axis.
        y: Label of the y axis.
        kind: Lines over x, or a dot a variant.
        series: What is shown.
        marks: Name -> value of reference lines (level for lines, upright for dots).
    """

    name: str
    title: str
    x: str
    y: str
    kind: Literal["lines", "dots"]
    series: tuple[Series, ...]
    marks: tuple[tuple[str, float], ...] = ()


def plotly_json(chart: Chart, looks: Mapping[str, Style]) -> str:
    """Return a chart as the JSON of a plotly figure: ``data`` and ``layout``.

    Raises:
        ImportError: plotly is not installed.
    """
    go = import_plotly()
    figure = go.Figure()
    draw = _plotly_lines if chart.kind == "lines" else _plotly_dots
    for series in chart.series:
        for trace in draw(go, series, looks[series.name]):
            figure.add_trace(trace)
    for label, value in chart.marks:
        add = figure.add_hline if chart.kind == "lines" else figure.add_vline
        add(value, line={"dash": "dot", "color": "#888", "width": 1}, annotation_text=label)
    rows = len(chart.series)
    figure.update_layout(
        xaxis={"title": chart.x, "zeroline": False},
        yaxis={"title": chart.y, "zeroline": False, "automargin": True},
        height=max(240, 90 + 34 * rows) if chart.kind == "dots" else 340,
        margin={"l": 56, "r": 12, "t": 20, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        dragmode=False,  # a finger that scrolls the page over a chart would zoom into it
        hovermode="x unified" if chart.kind == "lines" else "closest",
        template="none",
    )
    if chart.kind == "dots":
        names = [series.name for series in chart.series]
        figure.update_yaxes(
            autorange="reversed", type="category", tickvals=names, ticktext=[*map(in_lines, names)]
        )
    return str(figure.to_json())


def in_lines(name: str, width: int = 18) -> str:
    """Return a long name broken at its hyphens, for a narrow margin."""
    lines = [""]
    for part in re.split(r"(?<=-)", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "<br>".join(map(escape, lines))


def _plotly_lines(go: Any, s: Series, look: Style) -> list[Any]:
    shared = {"x": list(s.x), "legendgroup": s.name, "name": s.name}
    traces = []
    if s.low is not None and s.high is not None:
        edge = {**shared, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        traces.append(go.Scatter(y=list(s.low), **edge))
        band = f"rgba{(*_rgb(look.colour), 0.15)}"
        traces.append(go.Scatter(y=list(s.high), fill="tonexty", fillcolor=band, **edge))
    mode = "lines" if len(s.x) > 30 else "lines+markers"
    line = {"color": look.colour, "dash": look.dash[0], "width": 2}
    marker = {"symbol": look.marker[0], "size": 6, "color": look.colour}
    hover = "%{y:.3f}"
    traces.append(
        go.Scatter(y=list(s.y), mode=mode, line=line, marker=marker, hovertemplate=hover, **shared)
    )
    return traces


def _plotly_dots(go: Any, s: Series, look: Style) -> list[Any]:
    shared = {"legendgroup": s.name, "name": s.name, "mode": "markers"}
    bars = None
    if s.low is not None and s.high is not None:
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [h - x for h, x in zip(s.high, s.x, strict=True)],
            "arrayminus": [x - low for low, x in zip(s.low, s.x, strict=True)],
        }
    faint = {"color": look.colour, "size": 6, "opacity": 0.45}
    runs = go.Scatter(
        x=list(s.points), y=[s.name] * len(s.points), marker=faint,
        hovertemplate="a run: %{x:.3f}", **shared,
    )  # fmt: skip
    marker = {"color": look.colour, "symbol": look.marker[0], "size": 10}
    dot = go.Scatter(
        x=list(s.x), y=list(s.y), error_x=bars, marker=marker, hovertemplate="%{x:.3f}", **shared
    )
    return [runs, dot]


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def import_plotly() -> Any:
    """Import plotly's graph objects.

    Raises:
        ImportError: They are not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError(
            "A report needs plotly. Install the extra: pip install 'llm-envs[report]'"
        ) from error
    return go


def save_png(charts: Sequence[Chart], looks: Mapping[str, Style], path: Path) -> None:
    """Draw charts beside each other into one picture, with one legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    dots = charts[0].kind == "dots"
    rows = max(len(chart.series) for chart in charts)
    size = (4.4 * len(charts), max(2.4, 0.9 + 0.28 * rows) if dots else 3.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(charts), squeeze=False, sharey=dots)[0]
    for chart, axes in zip(charts, panels, strict=True):
        bands = len(chart.series) <= MOST_BANDS
        for s in chart.series:
            look = looks[s.name]
            if dots:
                _matplotlib_dots(axes, s, look)
            else:
                _matplotlib_lines(axes, s, look, bands=bands)
        low, high = axes.get_xlim() if dots else axes.get_ylim()
        for i, (name, value) in enumerate(chart.marks):
            beside = sum(abs(value - v) < 0.05 * (high - low) for _, v in chart.marks[:i])
            _matplotlib_mark(axes, name, value, beside, upright=dots)
        axes.set(title=chart.title, xlabel=chart.x, ylabel=chart.y)
        axes.title.set_fontsize("medium")
        axes.grid(axis="x" if dots else "both", alpha=0.3)
    if dots:
        panels[0].invert_yaxis()
    else:
        names = dict.fromkeys(s.name for chart in charts for s in chart.series)
        handles = [
            Line2D([], [], color=looks[n].colour, linestyle=looks[n].dash[1], label=n)
            for n in names
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2 * len(charts), fontsize="small"
        )
    figure.savefig(path, dpi=144)


def _matplotlib_mark(axes: Any, name: str, value: float, beside: int, *, upright: bool) -> None:
    along = 0.02 + 0.25 * beside  # marks may lie upon each other, and their names may not
    shared = {"color": "grey", "fontsize": "x-small"}
    if upright:
        axes.axvline(value, color="grey", linestyle=":", lw=1)
        look = {"rotation": 90, "ha": "right", "va": "bottom"}
        axes.text(value, along, name, transform=axes.get_xaxis_transform(), **look, **shared)
    else:
        axes.axhline(value, color="grey", linestyle=":", lw=1)
        look = {"ha": "right", "va": "bottom"}
        axes.text(1 - along, value, name, transform=axes.get_yaxis_transform(), **look, **shared)


def _matplotlib_lines(axes: Any, s: Series, look: Style, *, bands: bool) -> None:
    marker = look.marker[1] if len(s.x) <= 30 else ""
    axes.plot(
        s.x, s.y, color=look.colour, linestyle=look.dash[1], marker=marker, markersize=3, lw=1.5
    )
    if s.low is not None and bands:
        axes.fill_between(s.x, s.low, s.high, color=look.colour, alpha=0.15, linewidth=0)


def _matplotlib_dots(axes: Any, s: Series, look: Style) -> None:
    axes.plot(s.points, [s.name] * len(s.points), "o", color=look.colour, alpha=0.4, markersize=4)
    for x, name, low, high in zip(s.x, s.y, s.low or s.x, s.high or s.x, strict=True):
        axes.plot([low, high], [name, name], color=look.colour, lw=1.5)
        axes.plot([x], [name], look.marker[1], color=look.colour, markersize=7)
