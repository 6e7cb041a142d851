"""Agents that train language-model policies with immediate rewards."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.immediate_reward import ImmediateReward
    from agents.policies import CandidatePolicy, CausalLMPolicy
    from agents.ppo import GRPO, PPO
    from agents.reinforce import RLOO, Reinforce
    from agents.supervised import Supervised

__all__ = [
    "GRPO",
    "PPO",
    "RLOO",
    "CandidatePolicy",
    "CausalLMPolicy",
    "ImmediateReward",
    "Reinforce",
    "Supervised",
]

_MODULES = {
    "GRPO": "ppo",
    "PPO": "ppo",
    "RLOO": "reinforce",
    "CandidatePolicy": "policies",
    "CausalLMPolicy": "policies",
    "ImmediateReward": "immediate_reward",
    "Reinforce": "reinforce",
    "Supervised": "supervised",
}


def __getattr__(name: str) -> Any:
    """Import an agent when it is asked for: torch takes seconds, and ``--help`` needs none."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
