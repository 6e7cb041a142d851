"""What wrong and late feedback costs each agent: ``python -m benchmarks.robustness``.

It reads what ``python -m benchmarks.sweep --suite robustness`` left, prints a table for each
environment and draws how the clean test score falls with the share of wrong feedback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks import statistics as st
from benchmarks.figures import Chart, Series, save_png, styles
from benchmarks.results import read
from benchmarks.suites.robustness import CONDITIONS, FLIPS, PLAYERS, SEEDS, Player, run_of
from benchmarks.tables import Table, cell


@dataclass(frozen=True)
class Arguments:
    """Where the runs lie, and where the figure goes."""

    out: Path = Path("runs/robustness")
    """Where the run folders lie."""
    figure: Path | None = None
    """The picture, by default robustness.png among the runs."""


Scores = Mapping[str, float]
"""Name of a run -> its clean test score."""


def scores_of(env: str, player: Player, condition: str, found: Scores) -> list[float]:
    """Return the scores of the finished runs of a player under a condition, a seed each."""
    names = (run_of(env, player, condition, seed).name for seed in SEEDS)
    return [found[name] for name in names if name in found]


def side_by_side(env: str, found: Scores) -> Table:
    """Return the scores of every player on an environment, conditions beside each other."""
    rows = (
        (
            player.name,
            *(
                cell(scores_of(env, player, c, found)) if c in player.conditions else ""
                for c in CONDITIONS
            ),
        )
        for player in PLAYERS[env]
    )
    header = ("agent", "clean", "10 % wrong", "20 % wrong", "40 % wrong", "a turn late")
    return Table(f"{env}: mean, [95 % t interval over seeds], (each seed)", header, tuple(rows))


def falling(env: str, found: Scores) -> Chart:
    """Return the chart of the score over the share of wrong feedback."""
    series = []
    for player in PLAYERS[env]:
        known = {c: s for c in FLIPS if (s := scores_of(env, player, c, found))}
        if len(known) < 2:
            continue
        intervals = [st.t_interval(scores) for scores in known.values()]
        series.append(
            Series(
                player.name,
                [100 * CONDITIONS[c].get("flip", 0.0) for c in known],
                [i.value for i in intervals],
                [i.low for i in intervals],
                [i.high for i in intervals],
            )
        )
    labels = (env, "wrong feedback, % of answers", "clean score, test split")
    return Chart(env, *labels, "lines", tuple(series))


def main() -> None:
    """Print the tables and draw the figure."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.robustness")
    try:
        found = {o.run.name: o.score for o in read(a.out) if o.score is not None}
    except ValueError as error:
        raise SystemExit(str(error)) from error
    envs = [env for env in PLAYERS if any(name.startswith(env) for name in found)]
    if not envs:
        raise SystemExit(f"No run of the suite in {a.out} is finished. Run benchmarks.sweep first.")
    charts = [falling(env, found) for env in envs]
    looks = styles([s.name for chart in charts for s in chart.series])
    save_png(charts, looks, a.figure or a.out / "robustness.png")
    print_ = Console().print
    for env in envs:
        table = side_by_side(env, found)
        print_(f"\n**{table.title}**\n\n{table.markdown()}", markup=False, highlight=False,
               soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    main()
