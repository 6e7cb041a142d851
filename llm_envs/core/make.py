"""What ``gym.make`` and ``gym.make_vec`` call for every registered id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from llm_envs.core import play
from llm_envs.core.env import TextEnv
from llm_envs.core.task import Task, make_task
from llm_envs.core.vector import TextVectorEnv
from llm_envs.wrappers.feedback import CorruptedFeedback, CorruptedVectorFeedback, Corruption

_OTHERS = ("reward_range", "render_mode", "feedback")


def make_env(
    task: str | type[Task[Any]] | Task[Any],
    *,
    reward_range: play.RewardRange = (-1.0, 1.0),
    render_mode: str | None = None,
    feedback: Mapping[str, Any] | None = None,
    **task_arguments: Any,
) -> gym.Env[Any, Any]:
    """Make one environment.

    Args:
        task: See :class:`~llm_envs.core.env.TextEnv`.
        reward_range: See there.
        render_mode: See there.
        feedback: How rewards are corrupted, the arguments of
            :class:`~llm_envs.wrappers.CorruptedFeedback`: ``{"flip": 0.2}``.
        **task_arguments: The task's own arguments.
    """
    if feedback is not None:
        Corruption.of(feedback)  # refuses what is impossible before any data are read
    made = make_task(task, task_arguments, _OTHERS)
    env = TextEnv(made, reward_range=reward_range, render_mode=render_mode)
    return env if feedback is None else CorruptedFeedback(env, **feedback)


def make_vector_env(
    num_envs: int,
    task: str | type[Task[Any]] | Task[Any],
    *,
    group_size: int = 1,
    reward_range: play.RewardRange = (-1.0, 1.0),
    render_mode: str | None = None,
    feedback: Mapping[str, Any] | None = None,
    **task_arguments: Any,
) -> gym.vector.VectorEnv[Any, Any, Any]:
    """Make the native vector form.

    Args:
        num_envs: See :class:`~llm_envs.core.vector.TextVectorEnv`.
        task: See there.
        group_size: See there.
        reward_range: See there.
        render_mode: See there.
        feedback: See :func:`make_env`.
        **task_arguments: The task's own arguments.
    """
    if feedback is not None:
        Corruption.of(feedback)
    made = make_task(task, task_arguments, (*_OTHERS, "group_size"))
    env = TextVectorEnv(
        num_envs, made, group_size=group_size, reward_range=reward_range, render_mode=render_mode
    )
    return env if feedback is None else CorruptedVectorFeedback(env, **feedback)
