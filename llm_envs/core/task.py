"""What a task is: what it asks, how it scores a batch of actions, and what it says back.

A task knows nothing of seeds, resets or batches of environments. ``TextEnv`` plays one episode of
it, ``TextVectorEnv`` plays many in lockstep; both go through the few methods of :class:`Task`.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Generic, Protocol, SupportsIndex, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llm_envs.core.spaces import MAX_OBSERVATION_LENGTH, Text
from llm_envs.datasets.splits import did_you_mean

Message = dict[str, str]


class Example(Protocol):
    """One item of a data set."""

    @property
    def id(self) -> str:
        """Unique name within the data set."""
        ...

    @property
    def unit(self) -> str:
        """What it is independent by (entity, document, user): intervals are drawn over units."""
        ...


ExampleT = TypeVar("ExampleT", bound=Example)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one action earned.

    Attributes:
        score: In [0, 1]; ``None`` for a step that answers nothing (it is not scored).
        parts: The named scores that ``score`` is mixed from, each in [0, 1].
        feedback: What the user says to it.
        reward: The reward of an unscored step; a scored step's reward is its mapped score.
        best_score: The highest score that any action could have had, where that is known; the
            highest expected one where scores are drawn.
    """

    score: float | None
    parts: Mapping[str, float] = field(default_factory=dict)
    feedback: str = ""
    reward: float = 0.0
    best_score: float | None = None


@dataclass(slots=True)
class Episode(Generic[ExampleT]):
    """One episode in play.

    Attributes:
        example: What it is about.
        rng: Generator of all chance within the episode.
        observation: What the policy sees now.
        messages: The same conversation as role/content messages for chat models.
        turn: Number of steps taken.
        finished: Whether the last step ended it.
        state: Whatever else the task keeps.
    """

    example: ExampleT
    rng: np.random.Generator
    observation: Any = ""
    messages: tuple[Message, ...] = ()
    turn: int = 0
    finished: bool = False
    state: Any = None


class Task(ABC, Generic[ExampleT]):
    """One text task over a sequence of examples.

    Subclasses set ``examples``, ``observation_space`` and ``action_space``. A task is never
    changed after it is made, so that many environments can share it.
    """

    examples: Sequence[ExampleT]
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    episodes_per_example: int = 1
    """How often an evaluation plays each example: more where chance decides much of an episode."""
    recipe: tuple[str | type[Task[Any]], dict[str, Any]] | None = None
    """The class and arguments it was made from: what a pickle of it holds."""

    @abstractmethod
    def begin(self, example: ExampleT, rng: np.random.Generator) -> Episode[ExampleT]:
        """Open an episode: its first observation and messages."""

    @abstractmethod
    def score(self, episodes: Sequence[Episode[ExampleT]], actions: Sequence[Any]) -> list[Outcome]:
        """Score one action for each episode, all at once, changing none of them."""

    @abstractmethod
    def proceed(self, episode: Episode[ExampleT], action: Any, outcome: Outcome) -> None:
        """Write the action and what the user says to it into the episode, and ask on or finish.

        ``episode.turn`` already counts the action.
        """

    def planned_turns(self, example: ExampleT) -> int | None:
        """Return how many scored steps an episode has if nothing ends it early.

        An evaluation counts those that a truncated episode did not come to as 0. ``None`` where it
        is not known beforehand: then the steps that were played count alone.
        """
        return None

    def references(self, episode: Episode[ExampleT]) -> tuple[str, ...]:
        """Accepted answers of the current turn, for oracles and supervised learning only."""
        return ()

    def demonstration(self, episode: Episode[ExampleT]) -> str | None:
        """What to write in the current turn, for supervised learning only.

        It is the first accepted answer (``None`` if there is none), but a task whose answers have
        to be prepared by unscored steps shows these steps too.
        """
        return next(iter(self.references(episode)), None)

    def candidate_scores(self, episode: Episode[ExampleT]) -> npt.NDArray[np.float64] | None:
        """Score of every choice, shape (k,), where all are known; expected ones where drawn."""
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Task[ExampleT]:
        return self  # it never changes, and its data set is large

    def __reduce__(self) -> Any:
        if self.recipe is None:
            return super().__reduce__()
        return make_task, self.recipe


def make_task(
    task: str | type[Task[Any]] | Task[Any],
    arguments: Mapping[str, Any],
    others: Sequence[str] = ("reward_range", "render_mode"),
) -> Task[Any]:
    """Return the task, making it from ``"module:Class"`` or a class where need be.

    Args:
        task: The task, its class, or where to import the class from.
        arguments: The task's arguments.
        others: The arguments that the environment takes itself, for messages.

    Raises:
        TypeError: An argument is unknown to the task; the message lists the known ones.
        ValueError: The data set is empty.
    """
    if isinstance(task, Task):
        if arguments:
            raise TypeError(f"A finished task takes no arguments, but {sorted(arguments)} came.")
        return task
    cls = task
    if isinstance(cls, str):
        module, _, name = cls.partition(":")
        cls = getattr(importlib.import_module(module), name)
    known = [p for p in inspect.signature(cls).parameters if p != "self"]
    for name in arguments:
        if name not in known:
            choices = [*known, *others]
            raise TypeError(
                f"{cls.__name__} has no argument {name!r}.{did_you_mean(name, choices)} "
                f"It takes {', '.join(choices)}."
            )
    made = cls(**arguments)
    made.recipe = (task, dict(arguments))
    if not len(made.examples):
        raise ValueError(f"{cls.__name__} has no example for the arguments {dict(arguments)}.")
    return made


def whole_number(name: str, value: SupportsIndex, least: int = 1) -> int:
    """Return an argument as a plain int.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is less than ``least``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}. Give a whole number from {least}.") from None
    if number < least:
        raise ValueError(f"{name} is {number}. Give a whole number from {least}.")
    return number


def say(user: str) -> str:
    """Lay out one user message: what the environment writes before the policy answers.

    The policy's answer follows the colon directly, so a natural answer begins with a space.
    """
    return f"User: {user}\nAssistant:"


class WritingTask(Task[ExampleT]):
    """A task whose actions are text that the policy writes.

    The observation is the whole conversation so far and only ever grows:
    ``obs[t+1].startswith(obs[t] + action)``. Subclasses say what is asked, accepted and scored.
    """

    observation_space = Text(MAX_OBSERVATION_LENGTH)
    action_space = Text()

    def __init__(self, max_turns: int | None = None) -> None:
        # None: as many as the example has.
        self.max_turns = None if max_turns is None else whole_number("max_turns", max_turns)

    @abstractmethod
    def turns(self, example: ExampleT) -> int:
        """Return the number of turns of the example, at least 1."""

    def planned_turns(self, example: ExampleT) -> int:
        """Return the number of turns that are played: all, or ``max_turns``."""
        turns = self.turns(example)
        return min(turns, self.max_turns or turns)

    @abstractmethod
    def ask(self, example: ExampleT, turn: int) -> str:
        """Return what the user says to open turn ``turn`` (0 is the first)."""

    @abstractmethod
    def answers(self, example: ExampleT, turn: int) -> tuple[str, ...]:
        """Return the accepted answers of the turn."""

    @abstractmethod
    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        """Score a batch of answers, each against its accepted answers."""

    def begin(self, example: ExampleT, rng: np.random.Generator) -> Episode[ExampleT]:
        """Open the conversation with the first question."""
        question = self.ask(example, 0)
        return Episode(example, rng, say(question), ({"role": "user", "content": question},))

    def score(self, episodes: Sequence[Episode[ExampleT]], actions: Sequence[str]) -> list[Outcome]:
        """Score each action against the accepted answers of its episode's current turn."""
        return self.score_answers(actions, [self.references(e) for e in episodes])

    def proceed(self, episode: Episode[ExampleT], action: str, outcome: Outcome) -> None:
        """Append the answer, the user's feedback and, unless it was the last, the next question."""
        episode.finished = episode.turn >= self.planned_turns(episode.example)
        said = outcome.feedback
        if not episode.finished:
            said = f"{said} {self.ask(episode.example, episode.turn)}".lstrip()
        self.append(episode, action, said)

    @staticmethod
    def append(episode: Episode[ExampleT], action: str, said: str) -> None:
        """Append the action and what the user says to it to the conversation."""
        tail = f"\nUser: {said}" if episode.finished else "\n" + say(said)
        episode.observation = episode.observation + action + (tail if said else "")
        episode.messages += ({"role": "assistant", "content": action.strip()},)
        if said:
            episode.messages += ({"role": "user", "content": said},)

    def references(self, episode: Episode[ExampleT]) -> tuple[str, ...]:
        """Return the accepted answers of the current turn (none when the episode is over)."""
        if episode.finished:
            return ()
        return self.answers(episode.example, episode.turn)


class ChoosingTask(Task[ExampleT]):
    """A task whose actions pick one of k texts.

    Args:
        choices: The number k of candidates a step.
        features: The number f of numeric features a candidate; each lies in [0, 1].
    """

    def __init__(self, choices: int, features: int) -> None:
        self.action_space = gym.spaces.Discrete(choices)
        text = Text(MAX_OBSERVATION_LENGTH)
        self.observation_space = gym.spaces.Dict(
            prompt=text,
            candidates=gym.spaces.Tuple([text] * choices),
            features=gym.spaces.Box(0.0, 1.0, (choices, features), np.float32),
        )
