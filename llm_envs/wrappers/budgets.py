"""Budgets of an episode: how many tokens its answers may have, and how long they may take.

An episode whose budget is used up is truncated: it could have gone on, so a critic may say what it
was still worth. One that ends with that step by itself is terminated, as ever.

- :class:`TokenBudget`: the answer that goes beyond the budget is cut where it ends, as generation
  would have been, and what is left of it is scored. The policy need not be told what it has left:
  observations hold all that it wrote.
- :class:`TimeBudget`: an answer that comes too late is not heard. The environment is given an
  empty one instead, which scores 0 (on TextWorld ½: it is not understood).

What an episode that a budget ends early did not come to counts as 0 in an evaluation
(`Task.planned_turns`), so that it cannot pay to use a budget up. An agent in training sees the
rewards of the steps that it took alone: with returns (``gamma`` 1) and rewards below 0 it may learn
to end what goes badly. Give a ``reward_range`` from 0 then.

Both have a form for the native vector environment, which is equal row by row. With other vector
forms the single environments are wrapped. ``budget={"tokens": 60}``, or ``{"seconds": 5.0}``, or
both, is an argument of every id.
"""

from __future__ import annotations

import math
import numbers
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from llm_envs.core import play
from llm_envs.core.task import whole_number
from llm_envs.core.vector import TextVectorEnv
from llm_envs.datasets.splits import check_names
from llm_envs.scoring.text import CJK_LETTERS
from llm_envs.wrappers.feedback import is_corrupted
from llm_envs.wrappers.token_view import load_tokenizer
from llm_envs.wrappers.vector_spec import ArgumentVectorWrapper

Clock = Callable[[], float]

_WORDS: Final = re.compile(rf"[{CJK_LETTERS}]|[^\s{CJK_LETTERS}]+")


# --- pure functions ------------------------------------------------------------------------------


def token_ends(texts: Sequence[str], tokenizer: Any = None) -> list[list[int]]:
    """Return where each token of each text ends, in characters.

    Args:
        texts: Any texts.
        tokenizer: A fast tokenizer of ``transformers``; by default tokens are words: what stands
            between white space, and each CJK letter.

    Example:
        >>> token_ends(["It is Lima.", "東京 is it", ""])
        [[2, 5, 11], [1, 2, 5, 8], []]
    """
    if tokenizer is None:
        return [[word.end() for word in _WORDS.finditer(text)] for text in texts]
    # Half a surrogate pair is no text for a tokenizer; "?" is as long.
    encodable = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    encoded = tokenizer(
        encodable, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [[end for _, end in offsets] for offsets in encoded["offset_mapping"]]


def cut(answer: str, ends: Sequence[int], left: int) -> tuple[str, int]:
    """Cut an answer where a budget ends.

    Args:
        answer: What was written.
        ends: Where its tokens end (`token_ends`).
        left: How many tokens it may have, at least 1.

    Returns:
        The answer, or the whole characters of its first ``left`` tokens, and what is left of the
        budget then.

    Example:
        >>> cut(" It is Lima.", [3, 6, 12], 2), cut(" Lima. ", [6], 2)
        ((' It is', 0), (' Lima. ', 1))
    """
    if len(ends) <= left:
        return answer, left - len(ends)
    # A character may be made of several tokens, which end with it: it is whole, or not there.
    whole = [end for end in ends[:left] if end < ends[left]]
    return answer[: whole[-1] if whole else 0], 0


# --- n rows --------------------------------------------------------------------------------------


class _Meter(ABC):
    """What is left of the budgets of n rows.

    Attributes:
        name: What ``info`` calls ``told``.
        told: (n,) what it tells of each row.
    """

    name: str
    told: npt.NDArray[Any]

    @abstractmethod
    def begin(self, rows: Any) -> None:
        """Begin episodes in the rows of an index."""

    @abstractmethod
    def hear(self, answers: Sequence[str]) -> list[str]:
        """Return what the environment hears of an answer a row, and charge it."""

    def replied(self) -> None:
        """Take note that the environment has replied: what it does is not charged."""
        return

    @property
    @abstractmethod
    def used_up(self) -> npt.NDArray[np.bool_]:
        """Whether the answer that each row has given was its last, (n,)."""


class _Tokens(_Meter):
    name = "tokens_left"

    def __init__(self, rows: int, tokens: int, tokenizer: Any) -> None:
        self.tokens = whole_number("tokens", tokens)
        self.tokenizer = None if tokenizer is None else load_tokenizer(tokenizer)
        if self.tokenizer is not None and not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} does not tell where in a text its tokens end. "
                "Give a fast tokenizer of transformers, or leave it out to count words."
            )
        self.told = np.full(rows, self.tokens)

    def begin(self, rows: Any) -> None:
        self.told[rows] = self.tokens

    def hear(self, answers: Sequence[str]) -> list[str]:
        ends = token_ends(answers, self.tokenizer)
        heard = [cut(*row) for row in zip(answers, ends, self.told.tolist(), strict=True)]
        self.told = np.array([left for _, left in heard])
        return [answer for answer, _ in heard]

    @property
    def used_up(self) -> npt.NDArray[np.bool_]:
        used: npt.NDArray[np.bool_] = self.told == 0
        return used


class _Time(_Meter):
    name = "late"

    def __init__(self, rows: int, seconds: float, clock: Clock | None) -> None:
        self.seconds = check_seconds(seconds)
        self.clock: Clock = time.monotonic if clock is None else clock
        self.ends: npt.NDArray[np.float64] = np.zeros(rows)
        self.heard = 0.0
        self.told = np.zeros(rows, np.bool_)

    def begin(self, rows: Any) -> None:
        self.ends[rows] = self.clock() + self.seconds
        self.told[rows] = False

    def hear(self, answers: Sequence[str]) -> list[str]:
        self.heard = self.clock()
        self.told = self.heard > self.ends
        return ["" if late else a for a, late in zip(answers, self.told, strict=True)]

    def replied(self) -> None:
        self.ends += self.clock() - self.heard

    @property
    def used_up(self) -> npt.NDArray[np.bool_]:
        return self.told


def check_seconds(seconds: float) -> float:
    """Return a time as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is not a finite number of more than 0.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, numbers.Real):
        raise TypeError(f"seconds is {seconds!r}. Give a number of seconds.")
    if not (float(seconds) > 0 and math.isfinite(float(seconds))):
        raise ValueError(f"seconds is {seconds}. Give a finite number of more than 0.")
    return float(seconds)


# --- one environment -----------------------------------------------------------------------------


class _Budget(gym.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    def __init__(self, env: gym.Env[Any, Any], meter: _Meter) -> None:
        gym.Wrapper.__init__(self, env)
        _check_answers(env, env.action_space)
        self._meter = meter

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, play.Info]:
        """Open an episode, with the whole budget; see the environment's own ``reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._meter.begin(0)
        return observation, info | self._told()

    def step(self, action: str) -> tuple[Any, float, bool, bool, play.Info]:
        """Take the environment's step with what it hears of the answer.

        Raises:
            ValueError: The answer is no text.
            gymnasium.error.ResetNeeded: There is no episode, or it is over.
        """
        if self._meter.used_up[0]:
            raise gym.error.ResetNeeded("The budget is used up: call reset() before the next step.")
        [heard] = self._meter.hear([play.check_action(self.action_space, action)])
        observation, reward, terminated, truncated, info = self.env.step(heard)
        self._meter.replied()
        truncated = not terminated and (truncated or bool(self._meter.used_up[0]))
        return observation, float(reward), terminated, truncated, info | self._told()

    def _told(self) -> play.Info:
        return {self._meter.name: self._meter.told[0].item()}


class TokenBudget(_Budget):
    """An environment whose episodes end when the policy has written so many tokens.

    The answer that reaches the budget is the last one, cut at it before the environment sees and
    scores it. ``info["tokens_left"]``, from ``reset`` on, is what is left.

    Args:
        env: An environment whose actions are text.
        tokens: The budget of an episode.
        tokenizer: What counts them: a fast tokenizer of ``transformers``, or the folder or hub id
            to load it from (then ``env.spec`` holds plain values only). By default it counts words
            and CJK letters.

    Raises:
        TypeError: ``tokens`` is no whole number.
        ValueError: It is less than 1, actions are no text, or the tokenizer does not tell where
            its tokens end.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import TokenBudget
        >>> env = TokenBudget(gym.make("DialogueQA-v0"), tokens=4)
        >>> observation, info = env.reset(seed=1)
        >>> for answer in ("It is", "I think it is"):
        ...     _, _, terminated, truncated, info = env.step(answer)
        ...     print(terminated, truncated, info["tokens_left"], info["messages"][-2]["content"])
        False False 2 It is
        False True 0 I think
    """

    def __init__(self, env: gym.Env[Any, Any], *, tokens: int, tokenizer: Any = None) -> None:
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, tokens=tokens, tokenizer=_plain(tokenizer)
        )
        super().__init__(env, _Tokens(1, tokens, tokenizer))


class TimeBudget(_Budget):
    """An environment whose episodes end when the policy has taken too long.

    Time runs from the end of ``reset``, and stands still while the environment scores. An answer
    that comes after the budget is not heard: the environment is given an empty one, and
    ``info["late"]`` is true. Two runs with one seed can differ by that.

    Args:
        env: An environment whose actions are text.
        seconds: The budget of an episode.
        clock: Returns seconds; ``time.monotonic`` by default.

    Raises:
        TypeError: ``seconds`` is no number.
        ValueError: It is not a finite number of more than 0, or actions are no text.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import TimeBudget
        >>> now = 0.0
        >>> env = TimeBudget(gym.make("DialogueQA-v0"), seconds=5.0, clock=lambda: now)
        >>> observation, info = env.reset(seed=1)
        >>> answer = env.unwrapped.references[0]
        >>> now = 6.0
        >>> observation, reward, terminated, truncated, info = env.step(answer)
        >>> reward, terminated, truncated, info["late"]
        (-1.0, False, True, True)
    """

    def __init__(
        self, env: gym.Env[Any, Any], *, seconds: float, clock: Clock | None = None
    ) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, seconds=seconds, clock=clock)
        super().__init__(env, _Time(1, seconds, clock))


# --- the native vector environment ---------------------------------------------------------------


class _VectorBudget(ArgumentVectorWrapper):
    argument = "budget"

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], meter: _Meter) -> None:
        gym.vector.VectorWrapper.__init__(self, env)
        if not isinstance(env.unwrapped, TextVectorEnv):
            raise ValueError(
                f"{env} is not the native vector form, so its rows cannot be ended one by one. "
                'Wrap its single environments, or make it with budget={"tokens": …}.'
            )
        _check_answers(env, env.single_action_space)
        self._native = env.unwrapped
        self._meter = meter

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, play.Info]:
        """Open an episode in every row, or in those of a ``reset_mask``."""
        inner: Any = self.env  # the base class knows no seeds of single rows
        observations, infos = inner.reset(seed=seed, options=options)
        mask = (options or {}).get("reset_mask")
        opened = np.ones(self.num_envs, np.bool_) if mask is None else np.asarray(mask)
        self._meter.begin(opened)
        self._tell(infos, opened)
        return observations, infos

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], play.Info]:
        """Take the environment's step with what it hears of the answers."""
        heard = self._meter.hear(self._native.check_actions(actions))
        self._native.truncate(self._meter.used_up)
        observations, rewards, terminated, truncated, infos = self.env.step(heard)
        self._meter.replied()
        over = terminated | truncated
        if over.any():
            self._tell(infos["final_info"], over)
            self._meter.begin(over)
        self._tell(infos, np.ones(self.num_envs, np.bool_))
        return observations, rewards, terminated, truncated, infos

    def _tell(self, infos: play.Info, rows: npt.NDArray[np.bool_]) -> None:
        name, told = self._meter.name, self._meter.told
        infos[name], infos[f"_{name}"] = np.where(rows, told, told.dtype.type(0)), rows.copy()


class TokenVectorBudget(_VectorBudget):
    """:class:`TokenBudget` of every row of the native vector environment.

    Args:
        env: What ``gym.make_vec`` makes, of a task whose actions are text.
        tokens: The budget of an episode.
        tokenizer: See there.

    Raises:
        TypeError: ``tokens`` is no whole number.
        ValueError: See there; or the environment is another vector form.
    """

    place = 1

    def __init__(
        self, env: gym.vector.VectorEnv[Any, Any, Any], *, tokens: int, tokenizer: Any = None
    ) -> None:
        RecordConstructorArgs.__init__(
            self, _disable_deepcopy=True, tokens=tokens, tokenizer=_plain(tokenizer)
        )
        super().__init__(env, _Tokens(env.num_envs, tokens, tokenizer))


class TimeVectorBudget(_VectorBudget):
    """:class:`TimeBudget` of every row of the native vector environment.

    The answers of a step arrive together, so each row is charged the time of all of them.

    Args:
        env: What ``gym.make_vec`` makes, of a task whose actions are text.
        seconds: The budget of an episode.
        clock: See there.

    Raises:
        TypeError: ``seconds`` is no number.
        ValueError: See there; or the environment is another vector form.
    """

    place = 2

    def __init__(
        self,
        env: gym.vector.VectorEnv[Any, Any, Any],
        *,
        seconds: float,
        clock: Clock | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, seconds=seconds, clock=clock)
        super().__init__(env, _Time(env.num_envs, seconds, clock))


# --- by argument ---------------------------------------------------------------------------------

_KNOWN: Final = ("tokens", "tokenizer", "seconds")


def check_budget(budget: Any) -> None:
    """Refuse a ``budget`` argument that says nothing, or what it cannot.

    Raises:
        TypeError: It is no dict, or a name in it is unknown.
        ValueError: No budget is given.
    """
    check_names("budget", budget, _KNOWN, noun="limit", example='{"tokens": 60}')
    if "tokens" in budget:
        whole_number("tokens", budget["tokens"])
    if "seconds" in budget:
        check_seconds(budget["seconds"])
    if not isinstance(budget.get("tokenizer"), str | Path | None):
        raise TypeError(
            f"The tokenizer of a budget is a {type(budget['tokenizer']).__name__}. Give the folder "
            "or hub id to load it from, or wrap the environment in TokenBudget."
        )
    if "tokens" not in budget and ("seconds" not in budget or "tokenizer" in budget):
        raise ValueError(
            f"budget is {dict(budget)}. Give tokens (with a tokenizer, if they are not words), "
            'seconds or both, such as {"tokens": 60}.'
        )


EnvT = TypeVar("EnvT", gym.Env[Any, Any], gym.vector.VectorEnv[Any, Any, Any])


def with_budget(env: EnvT, budget: Mapping[str, Any] | None) -> EnvT:
    """Wrap an environment, single or native vector, as a ``budget`` argument says."""
    if budget is None:
        return env
    vector = isinstance(env, gym.vector.VectorEnv)
    wrapped: Any = env
    if "tokens" in budget:
        of_tokens: Any = TokenVectorBudget if vector else TokenBudget
        wrapped = of_tokens(wrapped, **{k: v for k, v in budget.items() if k != "seconds"})
    if "seconds" in budget:
        of_time: Any = TimeVectorBudget if vector else TimeBudget
        wrapped = of_time(wrapped, seconds=budget["seconds"])
    return wrapped  # type: ignore[no-any-return]


def _plain(tokenizer: Any) -> Any:
    return str(tokenizer) if isinstance(tokenizer, Path) else tokenizer


def _check_answers(env: Any, space: gym.Space[Any]) -> None:
    if is_corrupted(env):
        raise ValueError(
            f"{env} has corrupted feedback inside, which would not learn that an episode is "
            "truncated, and what is due would be lost. Give the budget first, then the feedback."
        )
    if not isinstance(space, gym.spaces.Text):
        raise ValueError(
            f"{env} has no written answers to limit: its actions are {space}. Make a choosing task "
            "with answer_in_text=True."
        )
