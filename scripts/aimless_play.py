"""Write conversations of aimless play: text of a domain for ``python -m agents.pretrain``.

In training games of TextWorld somebody does what can be done, whatever it is good for: each command
is drawn from those that the game lists. It shows how commands are worded and what they lead to, and
nothing of what is wanted.

    python scripts/aimless_play.py --out runs/aimless.jsonl
    python -m agents.pretrain --data runs/aimless.jsonl --out models/aimless
    python -m agents.train --env TextWorld-v0 --policy models/aimless
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import llm_envs  # noqa: F401 (registers the environments)
from agents.runs import write_text

LISTED = "You can: "
"""What stands before the commands, which semicolons divide and a full stop ends."""


@dataclass(frozen=True)
class Arguments:
    """How much is played, and where it goes."""

    out: Path
    """JSONL to write: a conversation a line, as "messages"."""
    times: int = 3
    """Times that each training game is played."""
    seed: int = 0
    """Decides the commands."""


def commands(message: str) -> list[str]:
    """Return the commands that a message lists."""
    return message.rpartition(LISTED)[2].removesuffix(".").split("; ")


def aimless(env: gym.Env[Any, Any], game: int, rng: np.random.Generator) -> list[dict[str, str]]:
    """Play a game to its end; return the conversation."""
    _, info = env.reset(options={"example": game})
    over = False
    while not over:
        command = str(rng.choice(commands(info["messages"][-1]["content"])))
        _, _, terminated, truncated, info = env.step(f" {command}")
        over = terminated or truncated
    messages: list[dict[str, str]] = info["messages"]
    return messages


def main() -> None:
    """Play and write."""
    a = tyro.cli(Arguments, description=__doc__)
    env = gym.make("TextWorld-v0")
    games = len(env.unwrapped.task.examples)  # type: ignore[attr-defined]
    rng = np.random.default_rng(a.seed)
    todo = [game for _ in range(a.times) for game in range(games)]
    played = [aimless(env, game, rng) for game in track(todo, "Playing", console=Console())]
    a.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(a.out, "".join(json.dumps({"messages": m}) + "\n" for m in played))
    print(f"{len(played):,} conversations of {games} games are in {a.out}.")


if __name__ == "__main__":
    main()
