"""Every agent on every environment at equal steps: ``python -m benchmarks.compare``.

Each run trains from the embedded model with the presets of ``agents.train``; validation chooses
the checkpoint, and the test split is scored once a run. Runs that are there are kept and runs that
were cut go on; ``--only-show`` prints what there is. ``compare.png``
beside the run folders shows the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from scipy import stats

from agents.registry import AGENTS, agents_for
from agents.settings import SETTINGS, settings_class
from benchmarks.experiment import Run, complete, finished, result
from llm_envs.datasets.splits import did_you_mean

STEPS = {"DialogueQA-v0": 3072, "Summarization-v0": 1024, "RecommendationClicks-v0": 1024}
CHOOSING = ("RecommendationClicks-v0",)
INITIAL = "(initial policy)"


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
            settings_class(agent)  # refuses a name that is none
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


def scores_of(env: str, agent: str, a: Arguments, when: str = "after") -> list[float]:
    """Return the test score of each finished run of an agent, before or after training."""
    folders = [a.out / run.name for run in runs_of(env, agent, a)]
    return [result(f)[when]["score"] for f in folders if finished(f)]


def rows(a: Arguments) -> dict[str, dict[str, list[float]]]:
    """Return the scores by row of the table and environment; the first is the untrained model's."""
    learners = [agent for agent in a.agents if SETTINGS[agent].default_policy != "none"]
    first = {
        env: [s for x in learners for s in scores_of(env, x, a, "before")[:1]] for env in a.envs
    }
    table = {agent: {env: scores_of(env, agent, a) for env in a.envs} for agent in a.agents}
    return {INITIAL: {env: scores[:1] for env, scores in first.items()}, **table}


def cell(scores: Sequence[float], wanted: int) -> str:
    """Return a cell of the table: mean, 95 % t interval over seeds, and the seeds themselves."""
    if not scores:
        return "not run" if wanted else "cannot play it"
    if wanted < 2:
        return f"{scores[0]:.3f}"
    each = ", ".join(f"{score:.3f}" for score in scores)
    missing = f"; {wanted - len(scores)} missing" if len(scores) < wanted else ""
    if len(scores) == 1:
        return f"({each}{missing})"
    half = stats.sem(scores) * stats.t.ppf(0.975, len(scores) - 1)
    mean = np.mean(scores)
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}] ({each}{missing})"


def markdown(a: Arguments) -> str:
    """Return a table of test scores, agents below each other and environments beside."""
    heads = [f"{env}, {STEPS[env]:,} answers" for env in a.envs]
    lines = ["| agent | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    for name, scores in rows(a).items():
        wanted = {env: 1 if name == INITIAL else len(runs_of(env, name, a)) for env in a.envs}
        cells = [cell(scores[env], wanted[env]) for env in a.envs]
        lines.append(f"| {name if name == INITIAL else f'`{name}`'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(a: Arguments, path: Path) -> None:
    """Draw the table: a dot a seed, a line at the mean, and the untrained model's score."""
    from matplotlib.figure import Figure

    table = rows(a)
    names = [name for name in reversed(table) if name != INITIAL]
    figure = Figure(figsize=(3.6 * len(a.envs), 0.9 + 0.3 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(a.envs), squeeze=False, sharey=True)[0]
    for env, axes in zip(a.envs, panels, strict=True):
        for y, name in enumerate(names):
            scores = table[name][env]
            axes.plot(scores, [y] * len(scores), "o", color="#3182bd", alpha=0.6, markersize=5)
            if scores:
                axes.plot([np.mean(scores)] * 2, [y - 0.35, y + 0.35], color="#e6550d", linewidth=2)
        for initial in table[INITIAL][env]:
            axes.axvline(initial, color="grey", linestyle=":")
        axes.set(title=env, xlabel="test score", ylim=(-0.6, len(names) - 0.4))
        axes.grid(axis="x", alpha=0.3)
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    figure.suptitle("dot: a seed; bar: their mean; dotted: the initial policy", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)


def main() -> None:
    """Run what is missing, and show what there is."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.compare")
    if not a.only_show:
        runs = [run for env in a.envs for agent in a.agents for run in runs_of(env, agent, a)]
        runs.sort(key=lambda run: run.seed)  # a comparison that is cut has fewer seeds, not agents
        complete(runs, a.out, workers=a.workers, report="test")
    Console().print(markdown(a), markup=False, highlight=False, soft_wrap=True)
    plot(a, a.out / "compare.png")


if __name__ == "__main__":
    main()
