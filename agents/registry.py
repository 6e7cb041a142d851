"""The agents, by the names that the command line knows them by."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agents.settings import settings_class

if TYPE_CHECKING:
    from agents.base import Agent
    from agents.settings import Family

AGENTS: dict[str, str] = {
    "reinforce": "agents.reinforce:Reinforce",
    "rloo": "agents.reinforce:RLOO",
    "ppo": "agents.ppo:PPO",
    "grpo": "agents.ppo:GRPO",
    "immediate-reward": "agents.immediate_reward:ImmediateReward",
    "supervised": "agents.supervised:Supervised",
    "random": "agents.baselines:Random",
    "linucb": "agents.baselines:LinUCB",
    "thompson": "agents.baselines:Thompson",
    "sb3-ppo": "agents.sb3:SB3PPO",
    "sb3-a2c": "agents.sb3:SB3A2C",
    "sb3-dqn": "agents.sb3:SB3DQN",
}
"""Name -> "module:Class"; a module is imported when its agent is asked for."""


def agent_class(name: str) -> type[Agent[Any]]:
    """Return the agent of that name.

    Raises:
        ValueError: There is none.
    """
    settings_class(name)
    module, cls = AGENTS[name].split(":")
    return getattr(import_module(module), cls)  # type: ignore[no-any-return]


def agents_for(family: Family) -> list[str]:
    """Return the names of the agents that can play a family of tasks."""
    return [name for name in AGENTS if family in agent_class(name).families]
