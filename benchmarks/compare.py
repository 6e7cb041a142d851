"""Every agent on every environment at equal steps: ``python -m benchmarks.compare``.

Each run trains from the embedded model with the presets of ``agents.train``; validation chooses
the checkpoint, and the test split is scored once a run. Runs that are there are kept and runs that
were cut go on; ``--only-show`` prints what there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from scipy import stats

from agents.registry import AGENTS, agent_class, agents_for
from benchmarks.experiment import Run, complete, finished, result
from llm_envs.datasets.splits import did_you_mean

STEPS = {"DialogueQA-v0": 3072, "Summarization-v0": 1024, "RecommendationClicks-v0": 1024}
CHOOSING = ("RecommendationClicks-v0",)


@dataclass(frozen=True)
class Arguments:
    """What to run, and where."""

    out: Path = Path("runs/compare")
    """Where the run folders lie."""
    envs: tuple[str, ...] = tuple(STEPS)
    """Environments."""
    agents: tuple[str, ...] = tuple(AGENTS)
    """Agents; each plays the environments that it can."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds."""
    workers: int = 2
    """Runs at a time, each with one thread."""
    only_show: bool = False
    """Run nothing; print what there is."""

    def __post_init__(self) -> None:
        for agent in self.agents:
            agent_class(agent)  # refuses a name that is none
        for env in self.envs:
            if env not in STEPS:
                raise ValueError(
                    f"There is no comparison on {env!r}.{did_you_mean(env, STEPS)} "
                    f"There are: {', '.join(STEPS)}."
                )


def runs_of(env: str, agent: str, a: Arguments) -> list[Run]:
    """Return the runs of an agent on an environment; none if it cannot play it."""
    if agent not in agents_for("choosing" if env in CHOOSING else "writing"):
        return []
    return [Run(env, agent, seed, STEPS[env]) for seed in a.seeds]


def interval_of_mean(values: list[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean over seeds; infinite of a single one."""
    if len(values) < 2:
        return -math.inf, math.inf
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values) - half), float(np.mean(values) + half)


def markdown(a: Arguments) -> str:
    """Return a table of test scores, agents below each other and environments beside."""
    lines = ["| agent | " + " | ".join(a.envs) + " |", "| --- " * (1 + len(a.envs)) + "|"]
    for agent in a.agents:
        cells = []
        for env in a.envs:
            folders = [a.out / run.name for run in runs_of(env, agent, a)]
            scores = [result(f)["after"]["score"] for f in folders if finished(f)]
            if not folders:
                cells.append("cannot play it")
            elif not scores:
                cells.append("not run")
            else:
                low, high = interval_of_mean(scores)
                missing = len(folders) - len(scores)
                note = f"; {missing} missing" if missing else ""
                each = ", ".join(f"{score:.3f}" for score in scores)
                cells.append(f"{np.mean(scores):.3f} [{low:.3f}, {high:.3f}] ({each}{note})")
        lines.append(f"| `{agent}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and show what there is."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.compare")
    if not a.only_show:
        runs = [run for env in a.envs for agent in a.agents for run in runs_of(env, agent, a)]
        runs.sort(key=lambda run: run.seed)  # a comparison that is cut has fewer seeds, not agents
        complete(runs, a.out, workers=a.workers, report="test")
    Console().print(markdown(a), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
