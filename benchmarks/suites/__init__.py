"""Suites: lists of runs that answer one question.

A suite is a small file that makes a ``SUITE``; those of `SHIPPED` are here, and
``python -m benchmarks.sweep --suite mine.py`` takes one of yours.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Final

from agents.settings import settings_class
from benchmarks.experiment import Run
from llm_envs.datasets.splits import did_you_mean

SHIPPED: Final = ("smoke", "core", "ablation", "robustness")


@dataclass(frozen=True)
class Suite:
    """A list of runs.

    Attributes:
        name: Its name.
        about: The question that it answers.
        runs: The runs, in the order in which they are begun.

    Raises:
        ValueError: There is no run, two have one name, one has an agent or a setting that there is
            not, or a label or argument that cannot be
            written down.
    """

    name: str
    about: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"The suite {self.name!r} has no runs.")
        name, count = Counter(run.name for run in self.runs).most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"The suite {self.name!r} has {count} runs of the name {name!r}, and each needs a "
                "folder of its own. Give variants different labels."
            )
        for run in self.runs:
            if not re.fullmatch(r"[\w.+-]*", run.label):
                raise ValueError(
                    f"The label {run.label!r} becomes a part of a folder's name. Make it of "
                    "letters, digits and . + - _ alone."
                )
            try:
                json.dumps([run.env_kwargs, run.settings])
            except TypeError as error:
                raise ValueError(
                    f"{run.name} has arguments or settings that are not JSON ({error})."
                ) from error
            known = [f.name for f in fields(settings_class(run.agent))]
            for setting in run.settings:
                if setting not in known:
                    raise ValueError(
                        f"{run.name} is to have the setting {setting!r}, and {run.agent} has none "
                        f"of that name.{did_you_mean(setting, known)} "
                        f"It has: {', '.join(known)}."
                    )


def grid(
    envs: Mapping[str, int],
    agents: Sequence[str],
    seeds: Sequence[int],
    *,
    policies: Sequence[str] = ("",),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    **of_all: Any,
) -> tuple[Run, ...]:
    """Return every combination, seeds outermost: what is cut has fewer seeds, not fewer agents.

    Args:
        envs: Environment id -> environment steps.
        agents: Names of agents.
        seeds: Seeds.
        policies: Language models; "" is the agent's default.
        variants: Label -> settings; one variant without settings if left out.
        **of_all: Further fields of every :class:`~benchmarks.experiment.Run`.
    """
    found = product(seeds, envs.items(), agents, policies, (variants or {"": {}}).items())
    return tuple(
        Run(env, agent, seed, steps, dict(settings), label, policy, **of_all)
        for seed, (env, steps), agent, policy, (label, settings) in found
    )


def seed_by_seed(*grids: Sequence[Run]) -> tuple[Run, ...]:
    """Return the runs of several grids, the first seed of all of them first."""
    return tuple(sorted((run for runs in grids for run in runs), key=lambda run: run.seed))


def load(name: str) -> Suite:
    """Return a suite by its name, or by the file that makes it.

    Raises:
        ValueError: There is none, or the file makes none.
    """
    if name in SHIPPED:
        found = importlib.import_module(f"benchmarks.suites.{name}")
    elif not name.endswith(".py"):
        raise ValueError(
            f"There is no suite {name!r}.{did_you_mean(name, SHIPPED)} There are: "
            f"{', '.join(SHIPPED)}; or name a file, such as mine.py."
        )
    else:
        spec = importlib.util.spec_from_file_location(Path(name).stem, name)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(found)
        except FileNotFoundError as error:
            if Path(name).exists():
                raise  # it looked for another one
            raise ValueError(f"There is no file {name}, which --suite names.") from error
    suite = getattr(found, "SUITE", None)
    if not isinstance(suite, Suite):
        raise ValueError(f"{name} makes no suite: it needs a line SUITE = Suite(…).")
    return suite
