"""Play an environment in the terminal: ``python -m llm_envs.play DialogueQA-v0``.

Answer what is asked, or choose a candidate by its number, and see what each answer earns. ``:hint``
helps, ``:quit`` (or Ctrl-D) ends; an answer that begins with a colon needs a space before it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_envs.core.make import parse_env_kwargs
from llm_envs.core.registration import bare_id, known_id
from llm_envs.core.rendering import printable
from llm_envs.core.task import Message
from llm_envs.datasets.splits import Split, did_you_mean

COMMANDS = (":hint", ":quit")


@dataclass(frozen=True)
class Arguments:
    """What to play."""

    env: Annotated[str, tyro.conf.Positional]
    """Environment id, or module:id of one that a module of yours registers."""
    split: Split = "train"
    """Split whose examples are played; what a person has seen of test is no longer unseen."""
    seed: int | None = None
    """Seed of the episodes; other ones every time by default."""
    episodes: int | None = None
    """Number of episodes; until you quit by default."""
    env_kwargs: str = "{}"
    """Further arguments of the environment as JSON, e.g. '{"max_turns": 2}'."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One step that was played.

    Attributes:
        action: What the person said or chose.
        accepted: What would have been best; empty if that is not known, or if nothing was.
        score: In [0, 1]; ``None`` for an unscored step.
    """

    action: str
    accepted: tuple[str, ...]
    score: float | None


class Quit(Exception):  # noqa: N818 (no error)
    """The person has had enough."""


# --- what is known of a turn: pure functions ------------------------------------------------------


def texts(candidates: Sequence[str]) -> list[str]:
    """Return candidates as people read them."""
    return [candidate.strip() for candidate in candidates]


def accepted(env: Any, observation: Any) -> tuple[str, ...]:
    """Return the accepted answers of the current turn, or the candidates that beat others."""
    if isinstance(observation, str):
        return tuple(env.references)
    scores = env.candidate_scores
    if scores is None or np.min(scores) == np.max(scores):
        return ()
    best = np.flatnonzero(np.asarray(scores) == np.max(scores))
    return tuple(texts([observation["candidates"][i] for i in best]))


def hint(env: Any, observation: Any) -> str:
    """Say something that helps, and does not tell the answer."""
    scores = env.candidate_scores
    if scores is None and isinstance(observation, str):
        words = env.references[0].split() if env.references else []
        if not words or len(words[0]) == 1:  # its first letter would be all of it
            return "There is no hint."
        count = "1 word" if len(words) == 1 else f"{len(words)} words"
        return f"An accepted answer has {count} and begins with {words[0][0]!r}."
    if scores is None or np.min(scores) == np.max(scores):
        return "There is no hint: all candidates are alike."
    return f"{int(np.argmin(scores)) + 1} would be a mistake."


def choice(line: str, candidates: int) -> int:
    """Return the index of the candidate whose number was given.

    Raises:
        ValueError: It is no number of a candidate.
    """
    try:
        number = int(line)
    except ValueError:
        number = 0
    if not 1 <= number <= candidates:
        raise ValueError(
            f"{line.strip()!r} is no candidate. Give a number from 1 to {candidates}, or one of "
            f"{', '.join(COMMANDS)}."
        )
    return number - 1


def earned(reward: float, info: dict[str, Any]) -> str:
    """Say what a step earned: the reward, the score and its parts, the best that was possible."""
    said = f"reward {reward:+.2f}"
    if "score" in info:
        parts = [
            f"{name.removeprefix('score/')} {value:.2f}"
            for name, value in info.items()
            if name.startswith("score/")
        ]
        said += f"  score {info['score']:.2f}" + (f" ({', '.join(parts)})" if parts else "")
    if "best_score" in info:
        said += f"  best possible {info['best_score']:.2f}"
    return said


# --- playing --------------------------------------------------------------------------------------


def play_episode(env: gym.Env[Any, Any], console: Console, *, seed: int | None = None) -> float:
    """Play one episode with whoever sits at the terminal, and return its score.

    Raises:
        Quit: The person ends it, by command or by the end of the input.
    """
    observation, info = env.reset(seed=seed)
    console.rule(printable(info["example_id"]))
    turns: list[Turn] = []
    shown, finished = 0, False
    try:
        while not finished:
            show_messages(console, info["messages"][shown:])
            shown = len(info["messages"])
            best = accepted(env.unwrapped, observation)
            action = ask(env.unwrapped, observation, console)
            said = action if isinstance(observation, str) else observation["candidates"][action]
            observation, reward, terminated, truncated, info = env.step(action)
            finished = terminated or truncated
            turns.append(Turn(said.strip(), best, info.get("score")))
            console.print(Text(earned(float(reward), info), style="bold"))
        show_messages(console, info["messages"][shown:])
    finally:
        if turns:
            console.print()
            console.print(review(turns))
    scores = [turn.score for turn in turns if turn.score is not None]
    score = float(np.mean(scores)) if scores else 0.0
    console.print(Text(f"score of the episode: {score:.2f}", style="bold"))
    return score


def ask(env: Any, observation: Any, console: Console) -> Any:
    """Return the next action, asking again until there is one.

    Raises:
        Quit: There will be none.
    """
    if not isinstance(observation, str):
        for number, candidate in enumerate(texts(observation["candidates"]), start=1):
            console.print(Text(f"  {number}  {printable(candidate)}"))
    while True:
        try:
            line = console.input("> ", markup=False)
        except EOFError:
            raise Quit from None
        except UnicodeDecodeError as error:
            console.print(Text(f"That cannot be read ({error}). Write UTF-8.", style="red"))
            continue
        if not sys.stdin.isatty():
            console.print(Text(printable(line)))  # a terminal has shown it
        if line == ":quit":
            raise Quit
        if line == ":hint":
            console.print(Text(printable(hint(env, observation)), style="magenta"))
        elif line.startswith(":"):
            problem = f"There is no command {line!r}.{did_you_mean(line, COMMANDS)}"
            console.print(Text(f"{problem} Use {' or '.join(COMMANDS)}.", style="red"))
        elif isinstance(observation, str):
            return line
        else:
            try:
                return choice(line, len(observation["candidates"]))
            except ValueError as error:
                console.print(Text(printable(str(error)), style="red"))


def show_messages(console: Console, messages: Sequence[Message]) -> None:
    """Print what was said, but for what the person has just typed."""
    for message in messages:
        if message["role"] != "assistant":
            console.print(Text(f"{message['role']}: ", style="cyan"), end="")
            console.print(Text(printable(message["content"])))


def review(turns: Sequence[Turn]) -> Table:
    """Lay out an episode: what was said, what it scored, what would have been accepted."""
    table = Table("you", "score", "accepted")
    for turn in turns:
        scored = "-" if turn.score is None else f"{turn.score:.2f}"
        cells = printable(turn.action), scored, printable(" / ".join(turn.accepted) or "-")
        table.add_row(*map(Text, cells))
    return table


def make(arguments: Arguments) -> gym.Env[Any, Any]:
    """Make the environment that the command line names.

    Raises:
        ValueError: There is no such environment, or an argument is wrong.
        TypeError: An argument is unknown.
        ImportError: The module before the id cannot be imported.
    """
    if arguments.episodes is not None and arguments.episodes < 1:
        raise ValueError(f"--episodes is {arguments.episodes}; it has to be 1 or more.")
    module, _, _ = arguments.env.rpartition(":")
    if module:
        importlib.import_module(module)
    env_id = known_id(bare_id(arguments.env))
    return gym.make(env_id, **{"split": arguments.split, **parse_env_kwargs(arguments.env_kwargs)})


def main(argv: Sequence[str] | None = None) -> None:
    """Play until the episodes are played or the person ends it; a mistake is told in a sentence."""
    console = Console(highlight=False)
    scores: list[float] = []
    try:
        arguments = tyro.cli(
            Arguments, args=argv, description=__doc__, prog="python -m llm_envs.play"
        )
        try:
            env = make(arguments)
        except (ValueError, TypeError, OSError, ImportError) as error:
            _fail(str(error), error)
        seed = arguments.seed
        while arguments.episodes is None or len(scores) < arguments.episodes:
            scores.append(play_episode(env, console, seed=seed))
            seed = None  # the generator goes on
    except (Quit, KeyboardInterrupt):
        console.print()
    if scores:
        episodes = "1 episode" if len(scores) == 1 else f"{len(scores)} episodes"
        console.print(Text(f"{episodes}, mean score {np.mean(scores):.2f}"))


def _fail(message: str, error: BaseException) -> NoReturn:
    Console(stderr=True, highlight=False).print(
        Text(printable(message), style="red"), soft_wrap=True
    )
    raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
