"""Which reading of the founding document's update works: ``python -m benchmarks.ablation``.

Every reading of the printed formula (direction, loss term, precondition, anchor; see
``agents.optimizers``) trains the embedded model on every environment. Learning rates are tuned
equally: each reading gets the same number of them, with one seed, and the one whose *last*
validation score is the highest is run with the other seeds. The test split is not touched.

What it finds stands in ``benchmarks.suites.ablation``. Runs that are there are kept and runs that
were cut go on; ``--only-show`` prints what there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from agents.settings import at_least
from benchmarks.experiment import Run
from benchmarks.results import Outcome, read
from benchmarks.suites import Suite
from benchmarks.suites.ablation import STEPS, TUNED, Reading, run_of, tuned
from benchmarks.sweep import Options, sweep
from benchmarks.tables import Table
from llm_envs.datasets.splits import did_you_mean

RATES = {
    ("broadcast", "sgd"): (1e-4, 1e-3, 1e-2),
    ("broadcast", "adam"): (1e-5, 1e-4, 1e-3),
    ("", "sgd"): (1e-2, 1e-1, 1.0),
    ("", "adam"): (1e-4, 3e-4, 1e-3),
}
"""Learning rates: as many for each reading, of a size that suits it. A loss that is added to every
coordinate moves all of them by α times the loss, and a gradient of norm 1 the typical one by much
less; Adam's steps are of another size again."""


def rates_of(reading: Reading) -> tuple[float, ...]:
    """Return the learning rates to try."""
    return RATES["broadcast" if reading.loss_term == "broadcast" else "", reading.precondition]


@dataclass(frozen=True)
class Arguments:
    """What to run, and where."""

    out: Path = Path("runs/ablation")
    """Where the run folders lie."""
    envs: tuple[str, ...] = tuple(STEPS)
    """Environments."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds; the first one tunes the learning rates."""
    workers: int = 2
    """Runs at a time, each with one thread."""
    only_show: bool = False
    """Run nothing; print what there is."""

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        for env in self.envs:
            if env not in STEPS:
                raise ValueError(
                    f"--envs holds {env!r}, and the ablation is of {', '.join(STEPS)}."
                    f"{did_you_mean(env, STEPS)}"
                )
        if not (self.envs and self.seeds):
            raise ValueError("Give one or more of --envs and of --seeds.")


def tried(reading: Reading, env: str, rate: float, seed: int) -> Run:
    """Return the run of a reading at one of the learning rates that are tried."""
    return run_of(reading, env, rate, seed, f"{reading.name}-{rate:g}")


def last_score(outcome: Outcome | None) -> float:
    """Return the validation score after training; -inf of a run that is not there or broke off."""
    return -math.inf if outcome is None or outcome.score is None else outcome.score


def outcomes(out: Path) -> dict[str, Outcome]:
    """Return what there is, by the names of the folders."""
    return {o.folder.name: o for o in read(out)} if any(out.glob("*/config.json")) else {}


def made(
    found: Mapping[str, Outcome], reading: Reading, env: str, rate: float, seed: int
) -> Outcome | None:
    """Return a run that is there: ours, or the same one of the suite ``ablation``."""
    ours = found.get(tried(reading, env, rate, seed).name)
    if ours is None and rate == tuned(reading, env):
        return found.get(run_of(reading, env, rate, seed).name)
    return ours


def best_rate(reading: Reading, env: str, a: Arguments, found: Mapping[str, Outcome]) -> float:
    """Return the learning rate that did best with the first seed; of equals the smallest.

    Where none was tried, it is the one that was found before.
    """
    scores = {r: last_score(made(found, reading, env, r, a.seeds[0])) for r in rates_of(reading)}
    if all(score == -math.inf for score in scores.values()):
        return tuned(reading, env)
    return max(scores, key=lambda r: (scores[r], -r))


def table(a: Arguments) -> list[dict[str, Any]]:
    """Return what every reading came to, one row a reading and environment."""
    found = outcomes(a.out)
    rows = []
    for env, reading in product(a.envs, TUNED):
        rate = best_rate(reading, env, a, found)
        whole = [made(found, reading, env, rate, seed) for seed in a.seeds]
        gains = [
            o.score - o.initial
            for o in whole
            if o is not None and o.score is not None and o.initial is not None
        ]
        rows.append(
            {
                "env": env,
                **asdict(reading),
                "learning_rate": rate,
                "gains": gains,
                "mean": float(np.mean(gains)) if gains else math.nan,
                "missing": len(whole) - len(gains),
            }
        )
    return rows


def side_by_side(rows: list[dict[str, Any]]) -> Table:
    """Return the rows as a table, environments beside each other."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    lines: list[tuple[str, ...]] = []
    for reading in TUNED:
        cells = []
        for env in envs:
            (row,) = (
                r
                for r in rows
                if r["env"] == env and Reading(*(r[k] for k in asdict(reading))) == reading
            )
            if not row["gains"]:
                cells.append("not run, or not finite")
                continue
            low, high = min(row["gains"]), max(row["gains"])
            note = f", {row['missing']} missing" if row["missing"] else ""
            cells.append(
                f"{row['mean']:+.3f} ({low:+.3f} … {high:+.3f}; α {row['learning_rate']:g}{note})"
            )
        lines.append((*asdict(reading).values(), *cells))
    header = ("direction", "loss term", "precondition", "anchor", *envs)
    return Table("", header, tuple(lines))


def complete(name: str, wanted: Sequence[tuple[Reading, str, float, int]], a: Arguments) -> None:
    """Make the runs that are missing."""
    found = outcomes(a.out)
    there = {key for key in wanted if (o := made(found, *key)) and o.state == "done"}
    runs = tuple(tried(*key) for key in wanted if key not in there)
    if runs:
        suite = Suite(name, "Which reading of the founding document's update learns?", runs)
        sweep(suite, Options(out=a.out, workers=a.workers, retries=0), Console())


def run_all(a: Arguments) -> None:
    """Tune each reading with the first seed, and run what did best with the others."""
    for env in a.envs:
        complete("tuning", [(r, env, x, a.seeds[0]) for r in TUNED for x in rates_of(r)], a)
        found = outcomes(a.out)
        best = {reading: best_rate(reading, env, a, found) for reading in TUNED}
        complete("chosen", [(r, env, x, s) for s in a.seeds[1:] for r, x in best.items()], a)


def main() -> None:
    """Tune, run, show; a mistake on the command line is told in one sentence."""
    try:
        a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.ablation")
        if not a.only_show:
            run_all(a)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    rows = table(a)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "ablation.json").write_text(json.dumps(rows, indent=1))
    Console().print(side_by_side(rows).markdown(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
