"""The environments that can be played with what is installed."""

from __future__ import annotations

import importlib.util

import llm_envs

EXTRAS = {"TextWorld-v0": "textworld"}


def playable_ids() -> tuple[str, ...]:
    """Return the registered ids, without those of extras that are missing.

    ``tests/tasks`` skips what is about one of them, and says which extra it needs.
    """
    return tuple(
        id
        for id in llm_envs.registered_ids()
        if id not in EXTRAS or importlib.util.find_spec(EXTRAS[id])
    )
