"""Search an agent's settings with Weights & Biases: ``python -m benchmarks.search --agent ppo``.

It writes a W&B sweep: Bayesian search for the settings with the best ``eval/score``, in ranges
around the agent's defaults on that environment. Runs that fall behind are stopped early. They are
tuned on the validation split; the test split is not touched. Then::

    wandb sweep sweep.yaml          # prints the id of the sweep
    wandb agent ENTITY/PROJECT/ID   # as often and on as many machines as you like

The file is yours: change ranges, or add flags of ``agents.train`` to its command.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import tyro
import yaml

from agents import arguments
from agents.registry import agent_class
from agents.settings import Family, at_least
from llm_envs.core.registration import bare_id, known_id

Parameter = dict[str, Any]
"""A parameter of a W&B sweep: its distribution and its bounds."""


# --- ranges --------------------------------------------------------------------------------------


def log_uniform(low: float, high: float) -> Parameter:
    """Return a parameter whose logarithm is uniform between two bounds, of three digits each."""
    bounds = {"min": float(f"{low:.3g}"), "max": float(f"{high:.3g}")}
    return {"distribution": "log_uniform_values", **bounds}


def magnitude(default: float) -> Parameter:
    """Search a tenth to ten times the default."""
    return log_uniform(default / 10, default * 10)


def penalty(default: float) -> Parameter:
    """Search the weight of a penalty or bonus, which may be off by default."""
    return magnitude(default) if default else log_uniform(1e-3, 1e-1)


def bound(default: float) -> Parameter:
    """Search half to twice the default, uniformly."""
    return {"distribution": "uniform", "min": default / 2, "max": default * 2}


def count(default: int) -> Parameter:
    """Search half the default, the default, and twice the default."""
    return {"values": [default // 2, default, default * 2]}


RANGES: Final[Mapping[str, Callable[[Any], Parameter]]] = {
    "learning_rate": magnitude,
    "kl_coef": penalty,
    "entropy_coef": penalty,
    "ent_coef": penalty,
    "clip": bound,
    "clip_range": bound,
    "epochs": count,
    "n_epochs": count,
    "batch_size": count,
    "value_coef": magnitude,
    "vf_coef": magnitude,
    "lam": magnitude,
    "ridge": magnitude,
    "exploration": magnitude,
    "exploration_final_eps": magnitude,
}
"""Setting -> its range, made from its default."""

_REINFORCE: Final = ("learning_rate", "kl_coef", "entropy_coef")
SEARCHED: Final[Mapping[str, tuple[str, ...]]] = {
    "reinforce": _REINFORCE,
    "rloo": _REINFORCE,
    "ppo": (*_REINFORCE, "clip", "epochs", "value_coef"),
    "grpo": (*_REINFORCE, "clip", "epochs"),
    "immediate-reward": (*_REINFORCE, "lam"),
    "supervised": ("learning_rate", "kl_coef"),
    "random": (),
    "linucb": ("ridge", "exploration"),
    "thompson": ("ridge", "exploration"),
    "sb3-ppo": ("learning_rate", "ent_coef", "clip_range", "n_epochs"),
    "sb3-a2c": ("learning_rate", "ent_coef", "vf_coef"),
    "sb3-dqn": ("learning_rate", "batch_size", "exploration_final_eps"),
}
"""Agent -> the settings that are worth a search: each changes what is learned by default."""

EARLY_STOPPING: Final = {"type": "hyperband", "min_iter": 4, "eta": 2}
"""After 4, 8, 16, … evaluations the better half of the runs goes on."""


# --- the sweep -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What to search, and where the sweep is written."""

    agent: str = "ppo"
    """Agent."""
    env: str = "DialogueQA-v0"
    """Environment id."""
    policy: str | None = None
    """Language model of the runs; by default the agent's own."""
    steps: int = 4_096
    """Environment steps of a run."""
    seed: int = 0
    """Seed of every run. Confirm what is found with others."""
    project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT", "llm-envs"))
    """W&B project."""
    out: Path = Path("sweep.yaml")
    """Where the sweep is written."""

    def __post_init__(self) -> None:
        at_least(self, 1, "steps")
        at_least(self, 0, "seed")


def sweep_of(o: Options) -> dict[str, Any]:
    """Return a W&B sweep, as its YAML file holds it.

    Raises:
        ValueError: The agent or the environment is unknown, they do not go together, or the agent
            has no settings to search.
    """
    fixed = ["--agent", o.agent, "--env", o.env, "--steps", str(o.steps), "--seed", str(o.seed)]
    fixed += [] if o.policy is None else ["--policy", o.policy]
    default = arguments.parse(fixed)
    family = family_of(o.env)
    cls = agent_class(o.agent)
    if family not in cls.families:
        raise ValueError(f"{o.agent} cannot play {o.env}, a {family} task: {cls.refusal}")
    if not SEARCHED[o.agent]:
        raise ValueError(
            f"The agent {o.agent} has no settings to search. Choose one of "
            f"{', '.join(agent for agent, names in SEARCHED.items() if names)}."
        )
    settings = {name: getattr(default.settings, name) for name in SEARCHED[o.agent]}
    # Stable-Baselines3's agents have defaults that depend on the family of the task.
    unset: Mapping[str, Any] = getattr(default.settings, "family_defaults", {}).get(family, {})
    settings |= {name: unset[name] for name, value in settings.items() if value is None}
    flags = [*fixed, "--report", "none", "--track", "wandb,jsonl", "--quiet"]
    return {
        "name": f"{o.agent} on {bare_id(o.env)}",
        "project": o.project,
        "program": "agents/train.py",  # what the W&B page shows; the command says how it is run
        "command": ["${env}", "${interpreter}", "-m", "agents.train", *flags, "${args}"],
        "method": "bayes",
        "metric": {"name": "eval/score", "goal": "maximize"},
        "early_terminate": dict(EARLY_STOPPING),
        "parameters": {name: RANGES[name](value) for name, value in settings.items()},
    }


def family_of(env: str) -> Family:
    """Return the family of an environment.

    Raises:
        ValueError: It is unknown.
    """
    known_id(bare_id(env))  # Gymnasium imports the module that it may name
    made = gym.make(env)
    try:
        choosing = isinstance(made.action_space, gym.spaces.Discrete)
    finally:
        made.close()
    return "choosing" if choosing else "writing"


def main() -> None:
    """Write the sweep; tell how it is started."""
    try:
        o = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.search")
        text = yaml.safe_dump(sweep_of(o), sort_keys=False)
        with o.out.open("x", encoding="utf-8") as file:  # it may hold changes of the user's
            file.write(f"# Written by python -m benchmarks.search, for wandb sweep.\n{text}")
    except FileExistsError as error:
        raise SystemExit(f"{o.out} is there already. Give another --out, or move it.") from error
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"Written to {o.out}. To start the search:\n  wandb sweep {o.out}")
    print(
        f"  wandb agent ENTITY/{o.project}/ID   # with the id that it prints; as often as you like"
    )


if __name__ == "__main__":
    main()
