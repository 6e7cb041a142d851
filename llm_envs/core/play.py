"""The rules of play that single and vector environments share."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

from llm_envs.core.spaces import Text
from llm_envs.core.task import Episode, Outcome, Task
from llm_envs.datasets.splits import did_you_mean

Info = dict[str, Any]
RewardRange = tuple[float, float]


def check_reward_range(reward_range: RewardRange) -> RewardRange:
    """Return the range as two floats.

    Raises:
        ValueError: It is not two finite numbers in ascending order.
    """
    try:
        low, high = (float(r) for r in reward_range)
    except (TypeError, ValueError):
        low, high = math.nan, math.nan
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            f"reward_range is {reward_range!r}, but it has to be two finite numbers, the reward of "
            "score 0 and, above it, that of score 1; for example (-1.0, 1.0)."
        )
    return low, high


def find_example(task: Task[Any], wanted: str | int | None, rng: np.random.Generator) -> Any:
    """Return the example that was asked for, by id or index, or else a random one.

    The generator is drawn from in either case, so that asking for an example changes no later one.
    """
    index = int(rng.integers(len(task.examples)))
    if wanted is None:
        return task.examples[index]
    if isinstance(wanted, str):
        for example in task.examples:
            if example.id == wanted:
                return example
        near = did_you_mean(wanted, [e.id for e in task.examples])
        raise ValueError(f"No example of this split has the id {reprlib.repr(wanted)}.{near}")
    if isinstance(wanted, bool) or not isinstance(wanted, int | np.integer):
        raise ValueError(f"Example {reprlib.repr(wanted)} is neither an id nor an index. Give one.")
    if not 0 <= wanted < len(task.examples):
        raise ValueError(
            f"Example {wanted} does not exist: the split has the examples 0 to "
            f"{len(task.examples) - 1}."
        )
    return task.examples[wanted]


class _Drawn(ISeedSequence):
    """Seeds a generator with numbers drawn from another one, eight times faster than hashing."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.words = rng.bit_generator.random_raw(4)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> npt.NDArray[Any]:
        return self.words


def begin(
    task: Task[Any], rng: np.random.Generator, wanted: str | int | None = None
) -> Episode[Any]:
    """Open a new episode.

    Every reset draws the same from ``rng``, and the episode has a generator of its own: what is
    done in one episode changes none of the later ones.
    """
    example = find_example(task, wanted, rng)
    drawn: Any = _Drawn(rng)  # numpy takes any ISeedSequence, its stub does not say so
    return task.begin(example, np.random.Generator(np.random.PCG64(drawn)))


def check_options(options: Mapping[str, Any] | None, known: tuple[str, ...]) -> Mapping[str, Any]:
    """Return the options of a reset, refusing unknown ones."""
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"The options of reset are {reprlib.repr(options)}. Give a dict, such as "
            '{"example": 0}.'
        )
    for name in options or {}:
        if name not in known:
            raise ValueError(
                f"reset has no option {name!r}.{did_you_mean(name, known)} "
                f"It takes {', '.join(known)}."
            )
    return options or {}


def check_action(space: gym.Space[Any], action: Any) -> Any:
    """Return the action as a plain value of the space.

    Raises:
        ValueError: It lies outside the space.
    """
    if isinstance(space, Text):
        if not isinstance(action, str):
            raise ValueError(
                f"An action of this environment is a string, but {type(action).__name__} came. "
                "Decode token ids to text first."
            )
        if len(action) > space.max_length:
            raise ValueError(
                f"The action has {len(action):,} characters and the limit is "
                f"{space.max_length:,}. Limit the number of generated tokens."
            )
        return str(action)
    if not space.contains(action):
        raise ValueError(f"The action {reprlib.repr(action)} does not lie in {space}.")
    return int(action) if isinstance(space, gym.spaces.Discrete) else action


def apply(task: Task[Any], episode: Episode[Any], action: Any, outcome: Outcome) -> None:
    """Move the episode on by one scored action."""
    episode.turn += 1
    task.proceed(episode, action, outcome)


def reward(outcome: Outcome, reward_range: RewardRange) -> float:
    """Map the score linearly from [0, 1] to the range; an unscored step has its own reward."""
    if outcome.score is None:
        return float(outcome.reward)
    low, high = reward_range
    return low + (high - low) * outcome.score


def info_of(episode: Episode[Any], outcome: Outcome | None = None) -> Info:
    """Return a fresh info dict: where the episode stands and, after a step, what was earned."""
    info: Info = {
        "example_id": episode.example.id,
        "turn": episode.turn,
        "messages": list(map(dict.copy, episode.messages)),
    }
    if outcome is not None:
        if outcome.score is not None:
            info["score"] = float(outcome.score)
            for part, value in outcome.parts.items():
                info[f"score/{part}"] = float(value)
        if outcome.best_score is not None:
            info["best_score"] = float(outcome.best_score)
        info["feedback"] = outcome.feedback
    return info
