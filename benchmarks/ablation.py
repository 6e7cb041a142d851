"""Which reading of the founding document's update works: ``python -m benchmarks.ablation``.

Every reading of the printed formula (direction, loss term, precondition, anchor; see
``agents.optimizers``) trains the embedded model on every environment. Learning rates are tuned
equally: each reading gets the same number of them, with one seed, and the one whose *last*
validation score is the highest is run with the other seeds. The test split is not touched.

Runs that are there are kept and runs that were cut go on; ``--only-show`` prints what there is.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks.experiment import Run, complete, finished, validation_scores

RATES = {
    ("broadcast", "sgd"): (1e-4, 1e-3, 1e-2),
    ("broadcast", "adam"): (1e-5, 1e-4, 1e-3),
    ("", "sgd"): (1e-2, 1e-1, 1.0),
    ("", "adam"): (1e-4, 3e-4, 1e-3),
}
"""Learning rates: as many for each reading, of a size that suits it. A loss that is added to every
coordinate moves all of them by α times the loss, and a gradient of norm 1 the typical one by much
less; Adam's steps are of another size again."""
STEPS = {"DialogueQA-v0": 1024, "Summarization-v0": 512, "RecommendationClicks-v0": 256}
EPISODES = {"DialogueQA-v0": 96, "Summarization-v0": 96, "RecommendationClicks-v0": 48}
"""Validation episodes, played before and after training."""
COMMON: dict[str, Any] = {
    "prompts": 4,
    "group_size": 4,
    "lam": 0.01,
    "eval_every": 1_000_000,  # at the beginning and at the end
    "checkpoint_every": 1_000_000,
}


@dataclass(frozen=True)
class Reading:
    """One way to read the formula."""

    direction: str
    loss_term: str
    precondition: str
    anchor: str

    @property
    def name(self) -> str:
        """Name in tables and folders."""
        return "-".join(asdict(self).values())

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to try."""
        return RATES["broadcast" if self.loss_term == "broadcast" else "", self.precondition]

    def settings(self, env: str, rate: float) -> dict[str, Any]:
        """Return the agent's settings; the formula as it is printed clips no gradient."""
        printed = (self.direction, self.loss_term, self.precondition, self.anchor)
        own = {
            "eval_episodes": EPISODES[env],
            "learning_rate": rate,
            "max_grad_norm": 0.0 if printed == ("ascend", "broadcast", "sgd", "zero") else 1.0,
        }
        return {**COMMON, **asdict(self), **own}


READINGS = [
    *(
        Reading(direction, loss_term, precondition, "zero")
        for direction, loss_term, precondition in product(
            ("ascend", "descend"), ("broadcast", "step_size", "none"), ("sgd", "adam")
        )
    ),
    *(Reading("descend", "none", precondition, "initial") for precondition in ("sgd", "adam")),
    Reading("descend", "step_size", "adam", "initial"),
]


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


def run_of(reading: Reading, env: str, rate: float, seed: int) -> Run:
    """Return the run of a reading at a learning rate."""
    label = f"{reading.name}-{rate:g}"
    return Run(env, "immediate-reward", seed, STEPS[env], reading.settings(env, rate), label)


def last_score(folder: Path) -> float:
    """Return the validation score after training; -inf of a run that is not there or broke off."""
    scores = validation_scores(folder)
    return scores[-1][1] if finished(folder) and len(scores) > 1 else -math.inf


def best_rate(reading: Reading, env: str, a: Arguments) -> float:
    """Return the learning rate that did best with the first seed; of equals the smallest."""
    return max(
        reading.rates,
        key=lambda r: (last_score(a.out / run_of(reading, env, r, a.seeds[0]).name), -r),
    )


def table(a: Arguments) -> list[dict[str, Any]]:
    """Return what every reading came to, one row a reading and environment."""
    rows = []
    for env, reading in product(a.envs, READINGS):
        rate = best_rate(reading, env, a)
        folders = [a.out / run_of(reading, env, rate, seed).name for seed in a.seeds]
        gains = [last_score(f) - validation_scores(f)[0][1] for f in folders if finished(f)]
        rows.append(
            {
                "env": env,
                **asdict(reading),
                "learning_rate": rate,
                "gains": gains,
                "mean": float(np.mean(gains)) if gains else math.nan,
                "missing": len(folders) - len(gains),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, environments beside each other."""
    envs = list(dict.fromkeys(row["env"] for row in rows))
    lines = [
        "| direction | loss term | precondition | anchor | " + " | ".join(envs) + " |",
        "| --- " * (4 + len(envs)) + "|",
    ]
    for reading in READINGS:
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
        lines.append(
            f"| {reading.direction} | {reading.loss_term} | {reading.precondition} | "
            f"{reading.anchor} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """Tune, run, show."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.ablation")
    if not a.only_show:
        for env in a.envs:
            tuning = [
                run_of(reading, env, rate, a.seeds[0])
                for reading in READINGS
                for rate in reading.rates
            ]
            complete(tuning, a.out, workers=a.workers, report="none")
            chosen = [
                run_of(reading, env, best_rate(reading, env, a), seed)
                for seed in a.seeds[1:]
                for reading in READINGS
            ]
            complete(chosen, a.out, workers=a.workers, report="none")
    rows = table(a)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "ablation.json").write_text(json.dumps(rows, indent=1))
    Console().print(markdown(rows), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
