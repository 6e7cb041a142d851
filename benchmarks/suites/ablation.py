"""Every reading of the founding document's update, at the learning rate that suits it best.

The rates are those that ``python -m benchmarks.ablation`` found by validation, with as many tries
for each reading. The test split is not touched.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from benchmarks.experiment import Run
from benchmarks.suites import Suite

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

    def settings(self, env: str, rate: float) -> dict[str, Any]:
        """Return the agent's settings; the formula as it is printed clips no gradient."""
        printed = (self.direction, self.loss_term, self.precondition, self.anchor)
        own = {
            "eval_episodes": EPISODES[env],
            "learning_rate": rate,
            "max_grad_norm": 0.0 if printed == ("ascend", "broadcast", "sgd", "zero") else 1.0,
        }
        return {**COMMON, **asdict(self), **own}


TUNED: dict[Reading, tuple[float, float, float]] = {
    Reading("ascend", "broadcast", "sgd", "zero"): (1e-4, 1e-4, 1e-3),
    Reading("ascend", "broadcast", "adam", "zero"): (1e-5, 1e-5, 1e-4),
    Reading("ascend", "step_size", "sgd", "zero"): (1e-2, 1e-2, 1.0),
    Reading("ascend", "step_size", "adam", "zero"): (1e-4, 1e-4, 1e-4),
    Reading("ascend", "none", "sgd", "zero"): (1e-2, 1e-2, 1.0),
    Reading("ascend", "none", "adam", "zero"): (1e-4, 1e-4, 3e-4),
    Reading("descend", "broadcast", "sgd", "zero"): (1e-4, 1e-4, 1e-2),
    Reading("descend", "broadcast", "adam", "zero"): (1e-3, 1e-4, 1e-5),
    Reading("descend", "step_size", "sgd", "zero"): (1e-1, 1e-1, 1e-1),
    Reading("descend", "step_size", "adam", "zero"): (1e-3, 1e-4, 3e-4),
    Reading("descend", "none", "sgd", "zero"): (1.0, 1e-2, 1e-1),
    Reading("descend", "none", "adam", "zero"): (1e-3, 1e-3, 1e-4),
    Reading("descend", "none", "sgd", "initial"): (1.0, 1.0, 1e-1),
    Reading("descend", "none", "adam", "initial"): (1e-3, 1e-3, 1e-4),
    Reading("descend", "step_size", "adam", "initial"): (3e-4, 3e-4, 3e-4),
}
"""Reading -> the learning rate on each environment of ``STEPS``."""


def tuned(reading: Reading, env: str) -> float:
    """Return the learning rate that suits a reading on an environment."""
    return dict(zip(STEPS, TUNED[reading], strict=True))[env]


def run_of(reading: Reading, env: str, rate: float, seed: int, label: str = "") -> Run:
    """Return the run of a reading at a learning rate; its label is the reading, if not given."""
    settings = reading.settings(env, rate)
    named = label or reading.name
    return Run(env, "immediate-reward", seed, STEPS[env], settings, named, report="none")


SUITE = Suite(
    "ablation",
    "Which reading of the founding document's update learns?",
    tuple(
        run_of(reading, env, rate, seed)
        for seed, (reading, rates) in product((1, 2, 3), TUNED.items())
        for env, rate in zip(STEPS, rates, strict=True)
    ),
)
