"""Choosing tasks as writing tasks: the policy names its choice in words.

:class:`ChoosingInText` is a choosing task as a task of its own, which ``answer_in_text=True`` makes
of any id: so it is played by ``TextEnv`` and ``TextVectorEnv`` themselves, and single and vector
form, groups, oracles and evaluation are those of every writing task. :class:`AnswerInText` wraps an
environment that was made before, and plays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from llm_envs.core import play
from llm_envs.core.spaces import MAX_OBSERVATION_LENGTH, Text
from llm_envs.core.task import ChoosingTask, Episode, Message, Outcome, Task, say
from llm_envs.wrappers.feedback import is_corrupted

DEFAULT_CHOICE: Final = 0
"""What is played where an answer names no candidate."""
NOTICE: Final = f"That is none of the choices, so {DEFAULT_CHOICE + 1} was taken."
"""What the user says to such an answer, before the reply to the choice that was played."""
PART: Final = "valid_choice"
"""The named score that tells whether the answer named a candidate: 1 or 0."""


class Conversation(NamedTuple):
    """A conversation as the policy sees it, and as messages."""

    observation: str
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, said: str) -> Conversation:
        """Open it."""
        return cls(say(said), (_user(said),))


def _user(said: str) -> Message:
    return {"role": "user", "content": said}


# --- what is asked and how it is read ------------------------------------------------------------


def parse_choice(answer: str, candidates: Sequence[str]) -> int | None:
    """Return the candidate that an answer names; ``None`` if it names none, or more than one.

    An answer names a candidate by its number ("2"), its text, or both as they are listed
    ("2. Heat (1995)"), and says nothing else. Case, white space around and between words, and one
    full stop at the end do not count. A number means the candidate of that number even where
    another one's text is that number, so every candidate can be named.

    Args:
        answer: What the policy wrote.
        candidates: k texts.

    Returns:
        0 to k - 1, or ``None``.

    Example:
        >>> films = [" Heat (1995).", " Alien (1979)."]
        >>> [parse_choice(a, films) for a in (" 2", "alien (1979)", "2. Alien (1979).")]
        [1, 1, 1]
        >>> [parse_choice(a, films) for a in ("", "3", "Alien", "It is 2.", "1 or 2")]
        [None, None, None, None, None]
    """
    said = _plain(answer)
    numbers = [str(i + 1) for i in range(len(candidates))]
    if said in numbers:
        return numbers.index(said)
    named = [
        i
        for i, (number, text) in enumerate(zip(numbers, candidates, strict=True))
        if said and said in (_plain(text), _plain(f"{number}. {text}"))
    ]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def list_candidates(candidates: Sequence[str]) -> str:
    """Return the candidates by number, one a line, the newline before each included."""
    return "".join(f"\n{i}. {text.strip()}" for i, text in enumerate(candidates, 1))


def best_names(scores: npt.NDArray[np.float64] | None) -> tuple[str, ...]:
    """Return the numbers of the candidates with the best score, none if scores are unknown."""
    if scores is None:
        return ()
    return tuple(str(i + 1) for i in np.flatnonzero(scores == scores.max()))


def asked(messages: Sequence[Message], candidates: Sequence[str]) -> str:
    """Return what the user says to open an episode: the question, and what can be answered.

    Args:
        messages: The conversation of the choosing task so far.
        candidates: k texts.
    """
    how = f"Answer with a number from 1 to {len(candidates)}."
    return f"{_last_said(messages)}{list_candidates(candidates)}\n{how}".lstrip()


def reply(messages: Sequence[Message], candidates: Sequence[str], *, valid: bool) -> str:
    """Return what the user says to an answer, and the next candidates.

    Args:
        messages: The conversation of the choosing task, with the choice that was played.
        candidates: The next ones; empty when the episode is over.
        valid: Whether the answer named a candidate.
    """
    said = _last_said(messages) if valid else f"{NOTICE} {_last_said(messages)}".rstrip()
    return (said + list_candidates(candidates)).lstrip()


def _last_said(messages: Sequence[Message]) -> str:
    """Return what the user said last, nothing if the last word was the policy's."""
    if not messages or messages[-1]["role"] != "user":
        return ""
    return messages[-1]["content"]


def grown(conversation: Conversation, answer: str, said: str, *, over: bool) -> Conversation:
    """Return the conversation with an answer and what the user said to it."""
    observation, messages = conversation
    tail = f"\nUser: {said}" if over else "\n" + say(said)
    messages = (*messages, {"role": "assistant", "content": answer.strip()})
    if not said:
        return Conversation(observation + answer, messages)
    return Conversation(observation + answer + tail, (*messages, _user(said)))


# --- a task --------------------------------------------------------------------------------------


class ChoosingInText(Task[Any]):
    """A choosing task whose answers are written.

    ## Action Space
    ``Text``: the candidate's number, its text, or both (`parse_choice`).

    ## Observation Space
    ``Text``: the conversation so far, each choice with its candidates by number. It ends in
    ``Assistant:`` while an answer is due and is append-only:
    ``obs[t+1].startswith(obs[t] + action)``.

    ## Rewards
    The score of the candidate that was named. An answer that names none scores 0, in all parts,
    whatever comes of it: the first candidate is played, and the user says so. So an episode has
    the turns that it has as a choosing task, and never gains by an invalid answer, for the same
    move can be had by its number. ``best_score`` is the choosing task's.

    ## Information
    That of the choosing task; ``score/valid_choice`` is 1 if the answer named a candidate, else 0.
    ``references`` are the numbers of the best candidates, where all outcomes are known.

    Args:
        task: The choosing task; its examples, turns and chance are what is played.

    Raises:
        ValueError: It is no choosing task.
    """

    observation_space = Text(MAX_OBSERVATION_LENGTH)
    action_space = Text()

    def __init__(self, task: Task[Any]) -> None:
        if not isinstance(task, ChoosingTask):
            raise ValueError(
                f"{type(task).__name__} is no choosing task: its answers are written already. "
                "Leave answer_in_text out."
            )
        self.task = task
        self.examples = task.examples
        self.episodes_per_example = task.episodes_per_example

    def planned_turns(self, example: Any) -> int | None:
        """Return the choosing task's."""
        return self.task.planned_turns(example)

    def begin(self, example: Any, rng: np.random.Generator) -> Episode[Any]:
        """Open the choosing task's episode, which is the state of this one."""
        inner = self.task.begin(example, rng)
        seen = Conversation.of(asked(inner.messages, _candidates(inner)))
        return Episode(example, rng, seen.observation, seen.messages, state=inner)

    def score(self, episodes: Sequence[Episode[Any]], actions: Sequence[str]) -> list[Outcome]:
        """Score the candidate that each answer names."""
        inner = [episode.state for episode in episodes]
        choices = [parse_choice(a, _candidates(e)) for e, a in zip(inner, actions, strict=True)]
        outcomes = self.task.score(inner, [DEFAULT_CHOICE if c is None else c for c in choices])
        return [_judged(o, c is not None) for o, c in zip(outcomes, choices, strict=True)]

    def proceed(self, episode: Episode[Any], action: str, outcome: Outcome) -> None:
        """Play the choice, and write down the answer and the reply."""
        inner = episode.state
        named = parse_choice(action, _candidates(inner))
        choice = DEFAULT_CHOICE if named is None else named
        if named is None:  # the choice that was played earned something, the answer did not
            [outcome] = self.task.score([inner], [choice])
        play.apply(self.task, inner, choice, outcome)
        episode.finished = inner.finished
        offered = () if inner.finished else _candidates(inner)
        said = reply(inner.messages, offered, valid=named is not None)
        seen = Conversation(episode.observation, episode.messages)
        episode.observation, episode.messages = grown(seen, action, said, over=inner.finished)

    def references(self, episode: Episode[Any]) -> tuple[str, ...]:
        """Return the numbers of the best candidates."""
        return best_names(self.candidate_scores(episode))

    def candidate_scores(self, episode: Episode[Any]) -> npt.NDArray[np.float64] | None:
        """Return the score of every candidate, (k,), where they are all known."""
        return self.task.candidate_scores(episode.state)

    def __reduce__(self) -> Any:
        return type(self), (self.task,)


def _candidates(episode: Episode[Any]) -> tuple[str, ...]:
    found: tuple[str, ...] = episode.observation["candidates"]
    return found


def _judged(outcome: Outcome, valid: bool) -> Outcome:
    """Return what an answer earned by the choice that was played."""
    if valid:
        return replace(outcome, parts={**outcome.parts, PART: 1.0})
    return replace(
        outcome,
        score=0.0,
        parts={**dict.fromkeys(outcome.parts, 0.0), PART: 0.0},
        feedback=f"{NOTICE} {outcome.feedback}".rstrip(),
    )


# --- a wrapper -----------------------------------------------------------------------------------


class AnswerInText(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """An environment of a choosing task, played in writing as :class:`ChoosingInText` says.

    It equals ``gym.make(id, answer_in_text=True)`` step by step. That is what agents train on, and
    the way to a vector form; ``gym.make_vec`` takes this wrapper too, with
    ``vectorization_mode="sync", wrappers=[AnswerInText]``. ``render`` shows the choices.

    Args:
        env: An environment of a choosing task.

    Raises:
        ValueError: It is no choosing task, or its feedback is corrupted already.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import AnswerInText
        >>> env = AnswerInText(gym.make("TextBattle-v0"))
        >>> observation, info = env.reset(seed=1)
        >>> print(observation[-91:])
        1. Strike.
        2. Heavy blow.
        3. Guard.
        4. Charge.
        Answer with a number from 1 to 4.
        Assistant:
        >>> observation, reward, terminated, truncated, info = env.step(" Run!")
        >>> reward, info["score/valid_choice"], info["feedback"][:44]
        (-1.0, 0.0, 'That is none of the choices, so 1 was taken.')
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        spaces = getattr(env.observation_space, "spaces", {})
        if not (isinstance(spaces, dict) and "candidates" in spaces):
            raise ValueError(
                f"{env} is no choosing task: its observations are {env.observation_space} and hold "
                "no candidates."
            )
        if is_corrupted(env):
            raise ValueError(
                f"{env} has corrupted feedback inside, and answers that name nothing are judged by "
                "it too. Wrap it in AnswerInText first, then in CorruptedFeedback."
            )
        self._lowest = env.get_wrapper_attr("reward_range")[0]
        self.observation_space = Text(MAX_OBSERVATION_LENGTH)
        self.action_space = Text()
        self._candidates: tuple[str, ...] = ()
        self._seen = Conversation("", ())

    @property
    def references(self) -> tuple[str, ...]:
        """Numbers of the best candidates of the current turn, for oracles."""
        return best_names(self.env.get_wrapper_attr("candidate_scores"))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, play.Info]:
        """Open an episode; see the environment's own ``reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._candidates = observation["candidates"]
        self._seen = Conversation.of(asked(info["messages"], self._candidates))
        return self._seen.observation, info | self._told()

    def step(self, action: str) -> tuple[str, float, bool, bool, play.Info]:
        """Take the step of the candidate that is named.

        Raises:
            ValueError: The answer is no text.
            gymnasium.error.ResetNeeded: There is no episode, or it is over.
        """
        answer = play.check_action(self.action_space, action)
        named = parse_choice(answer, self._candidates)
        observation, reward, terminated, truncated, info = self.env.step(
            DEFAULT_CHOICE if named is None else named
        )
        self._candidates = () if terminated else observation["candidates"]
        said = reply(info["messages"], self._candidates, valid=named is not None)
        self._seen = grown(self._seen, answer, said, over=terminated)
        if named is None:
            parts = {key: 0.0 for key in info if key.startswith("score/")}
            told = f"{NOTICE} {info['feedback']}".rstrip()
            earned = {"score": 0.0, **parts, "feedback": told}
            info, reward = info | earned, self._lowest
        if "score" in info:
            info[f"score/{PART}"] = float(named is not None)
        return self._seen.observation, float(reward), terminated, truncated, info | self._told()

    def _told(self) -> play.Info:
        return {"messages": list(map(dict.copy, self._seen.messages))}
