"""How an environment gets its id."""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from llm_envs.core.task import Task
from llm_envs.datasets.splits import did_you_mean

_IDS: list[str] = []


def register(id: str, task: str | type[Task[Any]]) -> None:
    """Register a task as a Gymnasium environment, under ``id`` and ``llm_envs/<id>``.

    Args:
        id: Name and version, for example ``"DialogueQA-v0"``.
        task: The task's class or ``"module:Class"``, which is imported when first used.
    """
    if isinstance(task, type) and task.__module__ != "__main__" and "." not in task.__qualname__:
        task = f"{task.__module__}:{task.__qualname__}"  # a spec of plain values can be saved
    for name in (id, f"llm_envs/{id}"):
        gym.register(
            id=name,
            entry_point="llm_envs.core.make:make_env",
            vector_entry_point="llm_envs.core.make:make_vector_env",
            kwargs={"task": task},
        )
    if id not in _IDS:
        _IDS.append(id)


def registered_ids() -> tuple[str, ...]:
    """Return the bare ids of every registered environment of the suite, in order."""
    return tuple(_IDS)


def bare_id(env: str) -> str:
    """Return the registered id of an environment, without a module to import and a namespace.

    ``llm_envs:DialogueQA-v0`` and ``llm_envs/DialogueQA-v0`` are ``DialogueQA-v0``.
    """
    return env.rpartition(":")[2].removeprefix("llm_envs/")


def known_id(env: str) -> str:
    """Return the bare id of an environment of the suite (:func:`bare_id`).

    Raises:
        ValueError: There is none of that name, or it names a module, which would be left out.
    """
    module, env_id, known = env.rpartition(":")[0], bare_id(env), registered_ids()
    if module not in ("", "llm_envs"):
        raise ValueError(
            f"{env!r} names the module {module!r}, which is not imported here. Give the id alone; "
            "environments of your own are played from a script that imports them."
        )
    if env_id not in known:
        raise ValueError(
            f"There is no environment {env!r}.{did_you_mean(env_id, known)} "
            f"There are: {', '.join(known)}."
        )
    return env_id
