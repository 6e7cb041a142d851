"""What wrong and late feedback costs each agent: ``python -m benchmarks.robustness``.

It reads what ``python -m benchmarks.sweep --suite robustness`` left, prints for each environment
what players score and by how much that differs from learning from clean feedback, and draws how the
clean test score falls with the share of wrong feedback.

The checkpoint of that score was chosen by clean validation, which a user with wrong feedback alone
does not have: it hides how far an agent fell later, and may choose the policy that training began
with. So the score that each run ended with is told beside it, on the validation split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import tyro
from rich.console import Console
from scipy.stats import ttest_ind

from benchmarks import statistics as st
from benchmarks.figures import Chart, Series, save_png, styles
from benchmarks.results import Outcome, read
from benchmarks.suites.robustness import CONDITIONS, FLIPS, PLAYERS, SEEDS, Player, run_of
from benchmarks.tables import Table, cell


@dataclass(frozen=True)
class Arguments:
    """Where the runs lie, and where the figure goes."""

    out: Path = Path("runs/robustness")
    """Where the run folders lie."""
    figure: Path | None = None
    """The picture, by default robustness.png among the runs."""


TITLES: Final = dict(
    zip(CONDITIONS, ("clean", "10 % wrong", "20 % wrong", "40 % wrong", "a turn late"), strict=True)
)
"""Condition -> what a column is called."""

Scores = Mapping[str, float]
"""Name of a run -> a clean score of it."""


def scores_of(env: str, player: Player, condition: str, found: Scores) -> list[float]:
    """Return the scores of the finished runs of a player under a condition, a seed each."""
    names = (run_of(env, player, condition, seed).name for seed in SEEDS)
    return [found[name] for name in names if name in found]


def last_validation(outcome: Outcome) -> float | None:
    """Return the clean validation score that a finished run ended with."""
    _, scores = outcome.column("eval/score")
    return float(scores[-1]) if outcome.state == "done" and len(scores) else None


def side_by_side(env: str, what: str, found: Scores) -> Table:
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
    header = ("agent", *TITLES.values())
    title = f"{env}, {what}: mean, [95 % t interval over seeds], (each seed)"
    return Table(title, header, tuple(rows))


def difference(scores: list[float], others: list[float]) -> str:
    """Return how much more scores are on average than others, with Welch's 95 % interval and p."""
    if min(len(scores), len(others)) < 2:
        return "–"
    more = np.mean(scores) - np.mean(others)
    if np.ptp(scores) == np.ptp(others) == 0:  # the policy that training began with, each time
        return f"{more:+.3f}"
    test = ttest_ind(scores, others, equal_var=False)
    interval = test.confidence_interval()
    return f"{more:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}], p {test.pvalue:.2g}"


def differences(env: str, what: str, found: Scores) -> Table:
    """Return what each condition costs each player, and what settings or more answers give back.

    A player is compared to itself with clean feedback, and one that has help (returns, more
    answers) to the same agent without it, under the same condition.
    """
    plain = {player.agent: player for player in PLAYERS[env] if player.name == player.agent}
    rows = []
    for player in PLAYERS[env]:
        other = plain[player.agent]
        cells = [
            difference(
                scores_of(env, player, condition, found),
                scores_of(env, other, "clean" if player is other else condition, found),
            )
            if condition in player.conditions and (player is not other or condition != "clean")
            else ""
            for condition in CONDITIONS
        ]
        rows.append((f"{player.name} − {'clean' if player is other else other.name}", *cells))
    title = f"{env}, {what}: difference of means, [95 % interval] and p of Welch's t test"
    return Table(title, ("", *TITLES.values()), tuple(rows))


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
        outcomes = read(a.out)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    found = {o.run.name: o.score for o in outcomes if o.score is not None}
    ends = {o.run.name: e for o in outcomes if (e := last_validation(o)) is not None}
    envs = [env for env in PLAYERS if any(name.startswith(env) for name in found)]
    if not envs:
        raise SystemExit(f"No run of the suite in {a.out} is finished. Run benchmarks.sweep first.")
    charts = [falling(env, found) for env in envs]
    looks = styles([s.name for chart in charts for s in chart.series])
    save_png(charts, looks, a.figure or a.out / "robustness.png")
    print_ = Console().print
    for env in envs:
        chosen = "chosen policy, test split"
        tables = (
            side_by_side(env, chosen, found),
            differences(env, chosen, found),
            side_by_side(env, "last, validation", ends),
        )
        for table in tables:
            text = f"\n**{table.title}**\n\n{table.markdown()}"
            print_(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
