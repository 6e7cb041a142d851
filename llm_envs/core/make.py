"""What ``gym.make`` and ``gym.make_vec`` call for every registered id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym

from llm_envs.core import play
from llm_envs.core.env import TextEnv
from llm_envs.core.task import Task, make_task
from llm_envs.core.vector import TextVectorEnv
from llm_envs.datasets.splits import check_flag
from llm_envs.wrappers.answer_in_text import ChoosingInText
from llm_envs.wrappers.augmentation import Augmentation, AugmentedText, AugmentedVectorText
from llm_envs.wrappers.budgets import check_budget, with_budget
from llm_envs.wrappers.feedback import CorruptedFeedback, CorruptedVectorFeedback, Corruption


@dataclass(frozen=True)
class Views:
    """How a task is shown and judged: arguments that every id takes.

    Attributes:
        answer_in_text: Whether the choices of a choosing task are written, as
            :class:`~llm_envs.wrappers.ChoosingInText` says.
        observation_text: How questions are perturbed, the arguments of
            :class:`~llm_envs.wrappers.AugmentedText`: ``{"typos": 0.2}``.
        budget: What the answers of an episode may take in all, the arguments of
            :class:`~llm_envs.wrappers.TokenBudget` or :class:`~llm_envs.wrappers.TimeBudget` or
            both: ``{"tokens": 60, "seconds": 5.0}``.
        feedback: How rewards are corrupted, the arguments of
            :class:`~llm_envs.wrappers.CorruptedFeedback`: ``{"flip": 0.2}``.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is impossible.
    """

    answer_in_text: bool = False
    observation_text: Mapping[str, Any] | None = None
    budget: Mapping[str, Any] | None = None
    feedback: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what is impossible, before any data are read."""
        check_flag("answer_in_text", self.answer_in_text)
        if self.observation_text is not None:
            Augmentation.of(self.observation_text)
            if "adversary" in self.observation_text:
                raise TypeError(
                    "An adversary is no plain value, which env.spec could hold. Wrap the "
                    "environment: AugmentedText(env, adversary=…), or AugmentedVectorText."
                )
        if self.budget is not None:
            check_budget(self.budget)
        if self.feedback is not None:
            Corruption.of(self.feedback)

    def of(self, task: Task[Any]) -> Task[Any]:
        """Return the task as it is played."""
        return ChoosingInText(task) if self.answer_in_text else task

    def around(self, env: Any) -> Any:
        """Return an environment, single or native vector, in its wrappers."""
        vector = isinstance(env, gym.vector.VectorEnv)
        if self.observation_text is not None:
            augmented: Any = AugmentedVectorText if vector else AugmentedText
            env = augmented(env, **self.observation_text)
        env = with_budget(env, self.budget)
        if self.feedback is not None:
            corrupted: Any = CorruptedVectorFeedback if vector else CorruptedFeedback
            env = corrupted(env, **self.feedback)
        return env


_VIEWS = tuple(field.name for field in fields(Views))
_OTHERS = ("reward_range", "render_mode", *_VIEWS)


def make_env(
    task: str | type[Task[Any]] | Task[Any],
    *,
    reward_range: play.RewardRange = (-1.0, 1.0),
    render_mode: str | None = None,
    **arguments: Any,
) -> gym.Env[Any, Any]:
    """Make one environment.

    Args:
        task: See :class:`~llm_envs.core.env.TextEnv`.
        reward_range: See there.
        render_mode: See there.
        **arguments: Those of :class:`Views`, and the task's own.
    """
    views, own = _divided(arguments)
    made = views.of(make_task(task, own, _OTHERS))
    env = TextEnv(made, reward_range=reward_range, render_mode=render_mode)
    return views.around(env)  # type: ignore[no-any-return]


def make_vector_env(
    num_envs: int,
    task: str | type[Task[Any]] | Task[Any],
    *,
    group_size: int = 1,
    reward_range: play.RewardRange = (-1.0, 1.0),
    render_mode: str | None = None,
    **arguments: Any,
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Make the native vector form.

    Args:
        num_envs: See :class:`~llm_envs.core.vector.TextVectorEnv`.
        task: See there.
        group_size: See there.
        reward_range: See there.
        render_mode: See there.
        **arguments: Those of :class:`Views`, and the task's own.
    """
    views, own = _divided(arguments)
    made = views.of(make_task(task, own, (*_OTHERS, "group_size")))
    env = TextVectorEnv(
        num_envs, made, group_size=group_size, reward_range=reward_range, render_mode=render_mode
    )
    return views.around(env)  # type: ignore[no-any-return]


def _divided(arguments: Mapping[str, Any]) -> tuple[Views, dict[str, Any]]:
    """Return how a task is to be shown, and the arguments that are its own."""
    views = Views(**{name: arguments[name] for name in _VIEWS if name in arguments})
    return views, {name: value for name, value in arguments.items() if name not in _VIEWS}


def parse_env_kwargs(text: str) -> dict[str, Any]:
    """Return the arguments of an environment that --env-kwargs gives as JSON.

    Raises:
        ValueError: It is no JSON object.
    """
    like = "like '{\"max_turns\": 2}', in single quotes for the shell"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON ({error}): {text}. Write it {like}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--env-kwargs is {text}; it has to be a JSON object of names and values, {like}."
        )
    return found
