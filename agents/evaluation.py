"""Evaluation: the same episodes for everybody, greedy, with intervals over independent units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from agents.rollout import Player, Step, play
from llm_envs.datasets.splits import Split
from llm_envs.scoring.qa import contains_answer

Floats = npt.NDArray[np.float64]

RESAMPLES = 4_999


def interval(
    values: Sequence[float] | Floats, units: Sequence[str], *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean, resampling whole units.

    Args:
        values: One value an episode.
        units: What each episode is independent by; episodes of one unit stay together.
        seed: Seed of the 4,999 resamples.

    Returns:
        Low and high percentile bounds; the mean itself, twice, where there is a single unit.

    References:
        Efron and Tibshirani (1993), "An Introduction to the Bootstrap", 13.3 (percentiles) and 8
        (resampling what is independent).
    """
    _, place = np.unique(np.asarray(units, dtype=object).astype(str), return_inverse=True)
    sums = np.bincount(place, weights=np.asarray(values, dtype=np.float64))
    counts = np.bincount(place).astype(np.float64)
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    at_once = max(1, 2**20 // len(sums))  # so that thousands of units need no gigabyte
    for start in range(0, RESAMPLES, at_once):
        drawn = rng.integers(len(sums), size=(min(at_once, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy scored on every episode.

    Attributes:
        split: The split that was played.
        ids: Example ids, one an episode.
        units: Independent units, one an episode.
        scores: (episodes,) mean score of each episode's scored steps, in [0, 1].
        parts: Name -> (episodes,) mean of that part over each episode's scored steps, 0 where it
            has none. ``contains`` (not rewarded) is the share of answers that hold a right
            answer; ``expected`` is the exact expectation of the score over the policy's choices;
            ``best`` is the best score that could have been had.
        transcripts: What was asked, answered and earned, turn by turn.
    """

    split: str
    ids: tuple[str, ...]
    units: tuple[str, ...]
    scores: Floats
    parts: dict[str, Floats]
    transcripts: tuple[dict[str, Any], ...] = field(repr=False)

    @property
    def score(self) -> float:
        """Mean over episodes."""
        return float(self.scores.mean())

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % bootstrap interval of ``score``, over units."""
        return interval(self.scores, self.units)

    def part(self, name: str) -> float:
        """Mean of a part over episodes."""
        return float(self.parts[name].mean())

    def gain_over(self, other: Evaluation) -> tuple[float, float, float]:
        """Return the mean paired gain over another evaluation, and its 95 % interval.

        Raises:
            ValueError: The two did not play the same episodes.
        """
        if self.ids != other.ids:
            raise ValueError(
                "The two evaluations did not play the same episodes, so their gains are not "
                "paired. Give both the same environment, split and number of episodes."
            )
        gains = self.scores - other.scores
        return (float(gains.mean()), *interval(gains, self.units))

    def summary(self) -> dict[str, Any]:
        """Return what ``result.json`` holds."""
        return {
            "split": self.split,
            "score": self.score,
            "ci95": list(self.ci95),
            "episodes": len(self.ids),
            "parts": {name: float(v.mean()) for name, v in self.parts.items()},
        }


def with_interval(summary: Mapping[str, Any]) -> str:
    """Return the score of a summary with its 95 % interval, to be shown."""
    low, high = summary["ci95"]
    return f"{summary['score']:.3f} [{low:.3f}, {high:.3f}]"


def evaluate(
    begin: Callable[[], Player],
    env_id: str,
    *,
    split: Split,
    episodes: int | None = None,
    env_kwargs: dict[str, Any] | None = None,
    batch: int = 128,
    wrap: Callable[[Any], Any] | None = None,
) -> Evaluation:
    """Play a split, or ``episodes`` evenly spaced ones of it.

    Each example is played as often as its task says (``episodes_per_example``). Chance within an
    episode comes from a seed of its own that depends on the example and the count alone: every
    policy meets the same episodes.

    An episode scores the mean of its scored steps. One that is truncated, by a budget, scores 0 in
    those that it did not come to, or who ends early what goes badly would gain.

    Args:
        begin: Returns a new player for each batch.
        env_id: Id of the environment.
        split: The split; there is no default, for nobody should test by accident.
        episodes: How many; ``None`` for all (:func:`episode_numbers`).
        env_kwargs: Further arguments of the environment; a split among them does not count.
        batch: Episodes played side by side.
        wrap: Puts a vector environment into wrappers that no argument makes.

    Raises:
        ValueError: ``episodes`` or ``batch`` is less than 1.
        FloatingPointError: A score is not finite.
    """
    if batch < 1 or (episodes is not None and episodes < 1):
        raise ValueError(f"episodes is {episodes} and batch is {batch}; give 1 or more.")
    arguments = {**(env_kwargs or {}), "split": split}
    with closing(gym.make_vec(env_id, num_envs=1, **arguments)) as probe:
        task = probe.unwrapped.task  # type: ignore[attr-defined]
    examples = task.examples
    numbers = episode_numbers(len(examples), task.episodes_per_example, episodes)
    played: list[list[Step]] = []
    for start in range(0, len(numbers), batch):
        some = numbers[start : start + batch]
        envs = gym.make_vec(env_id, num_envs=len(some), **arguments)
        with closing(wrap(envs) if wrap else envs) as wrapped:
            played += _played(begin(), wrapped, some, len(examples))
    chosen = [examples[i % len(examples)] for i in numbers]
    for example, steps in zip(chosen, played, strict=True):
        _refuse_what_is_no_number(steps, f"{example.id!r} of the {split} split")
    planned = [
        task.planned_turns(example) or 0 if steps[-1].truncated else 0
        for example, steps in zip(chosen, played, strict=True)
    ]
    scores = [_mean_of(steps, "score", n) for steps, n in zip(played, planned, strict=True)]
    parts = [_parts(steps, n) for steps, n in zip(played, planned, strict=True)]
    names = dict.fromkeys(name for found in parts for name in found)
    return Evaluation(
        split=str(split),
        ids=tuple(example.id for example in chosen),
        units=tuple(example.unit for example in chosen),
        scores=np.array(scores),
        parts={name: np.array([found.get(name, 0.0) for found in parts]) for name in names},
        transcripts=tuple(_shown(s, str(split)) for steps in played for s in steps),
    )


def episode_numbers(examples: int, times: int, episodes: int | None = None) -> list[int]:
    """Return which episodes are played: i is a time of the example i % examples.

    Args:
        examples: Number of examples.
        times: How often each is played.
        episodes: How many episodes; ``None`` for all. Each example is played as often as fits, and
            those that are played once more are evenly spaced.
    """
    if episodes is None or episodes >= examples * times:
        return list(range(examples * times))
    whole, rest = divmod(episodes, examples)
    more = np.linspace(0, examples - 1, rest).astype(int)
    return [*range(whole * examples), *(int(whole * examples + i) for i in more)]


def _played(player: Player, envs: Any, numbers: Sequence[int], examples: int) -> list[list[Step]]:
    """Play the numbered episodes side by side; return the steps of each."""
    seeds = [int(np.random.SeedSequence((20_160_515, i)).generate_state(1)[0]) for i in numbers]
    options = {"example": [i % examples for i in numbers]}
    steps = play(player, envs, seeds=seeds, options=options, look=True)
    probabilities = getattr(player, "chosen_from", {})
    episodes: list[list[Step]] = [[] for _ in numbers]
    for step in steps:
        episodes[step.row].append(_with_expected(step, probabilities))
    return episodes


def _refuse_what_is_no_number(steps: Sequence[Step], example: str) -> None:
    for step in steps:
        if not math.isfinite(step.info.get("score", 0.0)):
            raise FloatingPointError(
                f"The score of example {example} is {step.info['score']} at turn {step.turn}. "
                "Look at what the environment scores."
            )


def _mean(values: Iterable[float], count: int = 0) -> float:
    """Mean of values, to which zeros are added until they are ``count``; 0 where there is none."""
    listed = list(values)
    return float(np.sum(listed)) / (max(len(listed), count) or 1)


def _mean_of(steps: Sequence[Step], key: str, count: int = 0) -> float:
    """Mean of an info key over the steps that have it, as ``_mean``."""
    return _mean((s.info[key] for s in steps if key in s.info), count)


def _with_expected(step: Step, probabilities: dict[tuple[int, int], Any]) -> Step:
    """Add the exact expected score where the player's probabilities and all outcomes are known."""
    chances = probabilities.get((step.row, step.turn))
    if chances is None or step.candidate_scores is None:
        return step
    expected = float(np.dot(np.asarray(chances, np.float64), step.candidate_scores))
    return replace(step, info={**step.info, "score/expected": expected})


def _parts(steps: list[Step], planned: int) -> dict[str, float]:
    """Mean of every named score over an episode's steps, or the steps that were planned."""
    keys = dict.fromkeys(k for s in steps for k in s.info if k.startswith("score/"))
    found = {key.removeprefix("score/"): _mean_of(steps, key, planned) for key in keys}
    if any("best_score" in s.info for s in steps):
        found["best"] = _mean_of(steps, "best_score")
    answered = [s for s in steps if s.references and "score" in s.info]
    if answered:
        held = (contains_answer(s.action, s.references) for s in answered)
        found["contains"] = _mean(held, planned)
    return found


def _shown(step: Step, split: str) -> dict[str, Any]:
    messages = step.info["messages"]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    asked = messages[answers[-1] - 1]["content"]
    return {
        "example_id": step.info["example_id"],
        "split": split,
        "turn": step.turn,
        "question": asked,
        "answer": messages[answers[-1]]["content"],
        "references": list(step.references),
        "score": step.info.get("score"),
    }
