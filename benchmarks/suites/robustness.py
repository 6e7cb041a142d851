"""How agents bear feedback that is wrong or late, and what helps.

Every player learns from the same corrupted rewards, each on the environments that it plays; what is
reported is the clean score. Flips mirror a reward in its range, and a delay of 1 pays each answer
with the next one (see :class:`llm_envs.wrappers.Corruption`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from benchmarks.experiment import Run
from benchmarks.suites import Suite

SEEDS = (1, 2, 3)
STEPS = {"DialogueQA-v0": 1536, "RecommendationClicks-v0": 1024}
CONDITIONS: dict[str, dict[str, Any]] = {
    "clean": {},
    "flip10": {"flip": 0.1},
    "flip20": {"flip": 0.2},
    "flip40": {"flip": 0.4},
    "delay1": {"delay": 1},
}
"""Label -> how feedback is corrupted."""
FLIPS = ("clean", "flip10", "flip20", "flip40")


@dataclass(frozen=True)
class Player:
    """An agent, with settings that may help.

    Attributes:
        name: Name in tables and figures.
        agent: Name of the agent.
        settings: Settings that differ from its defaults.
        times: How many times as many answers it is given.
        conditions: The labels of what it is tried under.
    """

    name: str
    agent: str
    settings: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    conditions: tuple[str, ...] = tuple(CONDITIONS)


RETURNS: dict[str, Any] = {"gamma": 1.0}  # credits an answer with all that is paid after it
PLAYERS: dict[str, tuple[Player, ...]] = {
    "DialogueQA-v0": (
        *(Player(a, a) for a in ("reinforce", "rloo", "ppo", "grpo", "immediate-reward")),
        Player("reinforce, returns", "reinforce", RETURNS, conditions=("clean", "delay1")),
        Player("ppo, returns", "ppo", RETURNS, conditions=("clean", "delay1")),
        Player("reinforce, 4 times the answers", "reinforce", times=4, conditions=("flip40",)),
    ),
    "RecommendationClicks-v0": (
        *(Player(a, a) for a in ("linucb", "thompson", "sb3-ppo", "sb3-a2c", "sb3-dqn")),
        *(
            Player(f"{a}, returns", a, RETURNS, conditions=("clean", "delay1"))
            for a in ("sb3-ppo", "sb3-dqn")
        ),
        *(
            Player(f"{a}, 4 times the answers", a, times=4, conditions=("flip40",))
            for a in ("linucb", "thompson", "sb3-ppo")
        ),
    ),
}
"""Environment -> who is tried on it."""


def run_of(env: str, player: Player, condition: str, seed: int) -> Run:
    """Return the run of a player under a condition."""
    helped = player.name.removeprefix(player.agent).strip(", ").replace(" ", "-")
    feedback = CONDITIONS[condition]
    return Run(
        env,
        player.agent,
        seed,
        player.times * STEPS[env],
        player.settings,
        "-".join(filter(None, (helped, condition))),
        env_kwargs={"feedback": feedback} if feedback else {},
    )


SUITE = Suite(
    "robustness",
    "How do agents bear feedback that is wrong or late, and what helps?",
    tuple(
        run_of(env, player, condition, seed)
        for seed, env in product(SEEDS, STEPS)
        for player in PLAYERS[env]
        for condition in player.conditions
    ),
)
