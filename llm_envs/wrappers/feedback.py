"""Feedback as people give it: wrong, biased, noisy, coarse, missing, late, and drifting.

What is corrupted is the reward, which is what an agent learns from. ``info["score"]``, which
evaluation reads, stays clean, and so do observations: every trajectory is one that the environment
would have played without the wrapper. What the user *says* to an answer (``info["feedback"]``, and
its text in the observation) stays clean too, for only the task knows another wording of it.

:class:`CorruptedFeedback` wraps one environment and :class:`CorruptedVectorFeedback` many; both
take the fields of :class:`Corruption` as arguments, and give equal rewards for equal seeds.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode

from llm_envs.core.play import Info, RewardRange
from llm_envs.core.task import whole_number
from llm_envs.core.vector import step_infos
from llm_envs.datasets.splits import check_names, did_you_mean
from llm_envs.wrappers.vector_spec import ArgumentVectorWrapper

_STREAM: Final = 0xFEEDBAC  # sets the chance of feedback apart from all else that a seed seeds
_DRIFTING: Final = ("flip", "bias", "noise", "missing")


# --- what each corruption does -------------------------------------------------------------------


def flipped(reward: float, reward_range: RewardRange) -> float:
    """Mirror a reward in its range: low + high - r.

    Flipping with probability p makes the expected reward (1 - 2p) r + p (low + high), so that the
    expected policy gradient is (1 - 2p) times the clean one.

    Source: Natarajan et al. (2013), "Learning with Noisy Labels"; Wang, Liu and Li (2020),
    "Reinforcement Learning with Perturbed Rewards".
    """
    low, high = reward_range
    return low + high - reward


def biased(reward: float, shift: float, reward_range: RewardRange) -> float:
    """Shift a reward, and clip it to its range: a user who is too kind (or, below 0, too harsh).

    Where nothing is clipped a baseline cancels it; what it takes away is the difference between
    rewards near the end of the range.
    """
    low, high = reward_range
    return min(max(reward + shift, low), high)


def noisy(reward: float, deviation: float, normal: float) -> float:
    """Add noise with a standard deviation: r + deviation · normal.

    It is not clipped, so that the expected reward is the clean one; it can leave the range.

    Source: Nguyen, Daumé III and Boyd-Graber (2017), "Reinforcement Learning for Bandit Neural
    Machine Translation with Simulated Human Feedback" (there clipped, and less where ratings are
    extreme).
    """
    return reward + deviation * normal


def coarse(reward: float, threshold: float, reward_range: RewardRange) -> float:
    """Turn a reward into thumbs up or down: the high end of the range if r reaches the threshold.

    Args:
        reward: A reward r.
        threshold: As a score: 0 is the low end of the range and 1 the high one.
        reward_range: The rewards of score 0 and score 1.

    Source: Nguyen, Daumé III and Boyd-Graber (2017), as above ("granular" ratings).
    """
    low, high = reward_range
    return high if reward >= low + (high - low) * threshold else low


def neutral(reward_range: RewardRange) -> float:
    """Return what stands for feedback that is missing: the middle of the range.

    Source of the setting: Bouneffouf et al. (2020), "Contextual Bandit with Missing Rewards".
    """
    low, high = reward_range
    return (low + high) / 2


def drifted(start: float, end: float, steps: int, taken: int) -> float:
    """Return a setting on its straight way from start to end, ``taken`` of ``steps`` steps on it.

    Afterwards it stays at the end. Source of the setting: Besbes, Gur and Zeevi (2014),
    "Stochastic Multi-Armed-Bandit Problem with Non-stationary Rewards".
    """
    share = min(1.0, taken / steps)
    return (1.0 - share) * start + share * end


def paid(
    due: Sequence[float], reward: float, delay: int, over: bool
) -> tuple[float, tuple[float, ...]]:
    """Pay what was earned ``delay`` steps ago; the last step of an episode pays all that is due.

    The rewards of an episode sum to the same as without delay. Before anything is due 0 is paid,
    and the last step, with up to ``delay + 1`` rewards in one, can leave the range.

    Args:
        due: What was earned and has not been paid, the oldest first.
        reward: What this step earned.
        delay: Steps from earning to being paid.
        over: Whether this step ended the episode.

    Returns:
        What this step is paid, and what is due after it.

    Source of the setting: Joulani, György and Szepesvári (2013), "Online Learning under Delayed
    Feedback".
    """
    earned = (*due, reward)
    now = len(earned) if over else max(0, len(earned) - delay)
    return math.fsum(earned[:now]), earned[now:]


# --- all of them ---------------------------------------------------------------------------------


class Chance(NamedTuple):
    """What chance says about the feedback to one answer.

    All of it is drawn for every answer, whatever is corrupted: the same answers are flipped with
    and without noise, and those that are flipped at 10 % are flipped at 20 % too.
    """

    flip: float
    """In [0, 1)."""
    missing: float
    """In [0, 1)."""
    normal: float
    """Of mean 0 and variance 1."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Chance:
        """Draw it."""
        return cls(rng.random(), rng.random(), rng.standard_normal())


@dataclass(frozen=True, slots=True)
class Corruption:
    """How feedback is corrupted; by default it is not.

    The order is that of the fields: an opinion (wrong, biased, noisy) is put into the form that
    the user has for it (thumbs), if it is given at all (missing), and arrives (late).

    Attributes:
        flip: Probability that the reward is mirrored in its range (:func:`flipped`).
        bias: What is added to it, clipped to the range (:func:`biased`).
        noise: Standard deviation of Gaussian noise, not clipped (:func:`noisy`).
        thumbs: Score from which it is thumbs up, else down (:func:`coarse`); ``None`` for rewards
            as fine as they are.
        missing: Probability that there is no feedback. The step is rewarded with the middle of the
            range (:func:`neutral`) and has ``info["feedback_missing"]``, by which a learner of
            yours can leave it out; the agents here do not look, and learn from a neutral reward.
        delay: After how many further steps of the episode it arrives (:func:`paid`), and with it
            ``info["feedback_missing"]``. Episodes of one step have none.
        drift: What ``flip``, ``bias``, ``noise`` or ``missing`` change to, and within how many
            ``steps`` of the environment: ``{"flip": 0.4, "steps": 1000}`` (:func:`drifted`).

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is impossible.
    """

    flip: float = 0.0
    bias: float = 0.0
    noise: float = 0.0
    thumbs: float | None = None
    missing: float = 0.0
    delay: int = 0
    drift: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in _DRIFTING:
            _check_number(name, getattr(self, name))
        if self.thumbs is not None:
            _check_number("thumbs", self.thumbs)
        whole_number("delay", self.delay, 0)
        if self.drift is not None:
            _check_drift(self.drift)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Corruption:
        """Return the corruption that named arguments describe.

        Raises:
            TypeError: There is no corruption of a name, or a value is of the wrong kind.
            ValueError: A value is impossible.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        check_names("feedback", arguments, known, noun="corruption", example='{"flip": 0.2}')
        return cls(**arguments)

    def at(self, taken: int) -> Corruption:
        """Return the corruption as it is after ``taken`` steps; it drifts no further."""
        if self.drift is None:
            return self
        steps = int(self.drift["steps"])
        now = {
            name: drifted(getattr(self, name), end, steps, taken)
            for name, end in self.drift.items()
            if name != "steps"
        }
        return dataclasses.replace(self, drift=None, **now)  # type: ignore[arg-type]


def judge(
    reward: float, corruption: Corruption, reward_range: RewardRange, chance: Chance
) -> tuple[float, bool]:
    """Return the feedback to an answer, before any delay.

    Args:
        reward: What the answer earned, in the range.
        corruption: As it is now (:meth:`Corruption.at`).
        reward_range: The rewards of score 0 and score 1.
        chance: Everything that is random.

    Returns:
        The corrupted reward, and whether feedback is missing.
    """
    c = corruption
    if chance.missing < c.missing:
        return neutral(reward_range), True
    if chance.flip < c.flip:
        reward = flipped(reward, reward_range)
    if c.bias:
        reward = biased(reward, c.bias, reward_range)
    reward = noisy(reward, c.noise, chance.normal)
    if c.thumbs is not None:
        reward = coarse(reward, c.thumbs, reward_range)
    return reward, False


def _check_number(name: str, value: Any) -> None:
    """Refuse a value that the corruption of this name cannot have."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}. Give a number.")
    number = float(value)
    wanted, good = {
        "bias": ("a finite number", True),
        "noise": ("a standard deviation, from 0", number >= 0),
        "thumbs": ("a score from 0 to 1", 0 <= number <= 1),
    }.get(name, ("a probability from 0 to 1", 0 <= number <= 1))
    if not (good and math.isfinite(number)):
        raise ValueError(f"{name} is {value}. Give {wanted}.")


def _check_drift(drift: Any) -> None:
    example = 'such as {"flip": 0.4, "steps": 1000}'
    if not isinstance(drift, Mapping):
        raise TypeError(f"drift is {drift!r}. Give a dict, {example}.")
    known = (*_DRIFTING, "steps")
    for name, end in drift.items():
        if name not in known:
            raise ValueError(
                f"drift holds {name!r}.{did_you_mean(name, known)} What drifts is one or more of "
                f"{', '.join(_DRIFTING)}, within a number of steps, {example}."
            )
        if name != "steps":
            _check_number(name, end)
    if "steps" not in drift or len(drift) < 2:
        raise ValueError(
            f"drift is {dict(drift)}. It needs what changes and within how many steps, {example}."
        )
    whole_number("steps of drift", drift["steps"])


# --- one row -------------------------------------------------------------------------------------


class _Row:
    """Where the feedback of one row stands: its chance, its time, and what is due."""

    def __init__(self, corruption: Corruption, reward_range: RewardRange) -> None:
        self.corruption = corruption
        self.reward_range = reward_range
        self.rng = np.random.default_rng()
        self.taken = 0
        self.due: tuple[float, ...] = ()
        self.given: tuple[bool | None, ...] = ()  # whether what is due was judged; None: nothing to

    def begin(self, seed: int | None = None, copy: int = 0, taken: int | None = None) -> None:
        """Begin an episode: nothing is due. Without a seed, chance and time go on."""
        self.due, self.given = (), ()
        if seed is not None:
            self.taken = 0
            self.rng = np.random.default_rng(
                np.random.SeedSequence(int(seed), spawn_key=(_STREAM, copy))
            )
        if taken is not None:
            self.taken = taken

    def feedback(self, clean: float, scored: bool, over: bool) -> tuple[float, Info]:
        """Return the reward of a step and what is told about it."""
        now = self.corruption.at(self.taken)
        self.taken += 1
        judged, given = 0.0, None
        # Agents refuse rewards that are no numbers, so thumbs must not make a number of them.
        if scored := scored and math.isfinite(clean):
            judged, missing = judge(clean, now, self.reward_range, Chance.draw(self.rng))
            given = not missing
        reward, self.due = paid(self.due, judged, now.delay, over)
        earned = (*self.given, given)
        count = len(earned) - len(self.due)
        arrived, self.given = earned[:count], earned[count:]
        told = {"clean_reward": clean, "feedback_missing": False in arrived and True not in arrived}
        return (reward if scored else clean + reward), told


def _split_options(options: Any) -> tuple[Any, int | None]:
    """Return the options of the environment, and ``feedback_steps``."""
    if not isinstance(options, Mapping) or "feedback_steps" not in options:
        return options, None
    taken = whole_number("feedback_steps", options["feedback_steps"], 0)
    return {k: v for k, v in options.items() if k != "feedback_steps"}, taken


def _no_range(env: Any) -> ValueError:
    return ValueError(
        f"{env} has no reward_range, so it is not known what a wrong or a neutral reward is. "
        "Feedback is corrupted on environments of llm_envs, and others with a reward_range and an "
        "info['score']."
    )


# --- the wrappers --------------------------------------------------------------------------------


class CorruptedFeedback(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """An environment whose rewards are corrupted, while what is scored and seen stays as it is.

    Steps that are not scored (``info`` has no ``score``) are judged by nobody: their reward, which
    the task declares, passes as it is. They count as steps of a delay and of a drift.

    Chance is seeded by ``reset(seed=…)``, and is not the environment's own: it plays the episodes
    that it would play unwrapped. A drift goes by the steps taken since the last reset with a seed,
    over all episodes: a seed decides all that follows, as Gymnasium wants it. Who seeds every
    episode says how far the drift is with ``reset(seed=…, options={"feedback_steps": n})``. What
    is due when an episode is left before its end is lost; also where a limit around this wrapper
    cuts it, as ``gym.make(…, max_episode_steps=n)`` puts one. ``max_turns`` limits the task itself.

    ## Information
    After a step also ``clean_reward``, what the step earned uncorrupted, and ``feedback_missing``,
    whether nobody judged the answer, or none of the answers, whose feedback arrived with the step.

    Args:
        env: An environment of the suite, or another with a ``reward_range`` and an
            ``info["score"]``.
        **corruptions: The fields of :class:`Corruption`.

    Raises:
        TypeError: A corruption is unknown, or its value of the wrong kind.
        ValueError: A value is impossible, or the environment has no range of rewards.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import CorruptedFeedback
        >>> env = CorruptedFeedback(gym.make("DialogueQA-v0"), flip=1.0)
        >>> observation, info = env.reset(seed=1)
        >>> observation, reward, terminated, truncated, info = env.step("no idea")
        >>> reward, info["clean_reward"], info["score"]
        (1.0, -1.0, 0.0)
    """

    def __init__(self, env: gym.Env[Any, Any], **corruptions: Any) -> None:
        RecordConstructorArgs.__init__(self, **corruptions)
        gym.Wrapper.__init__(self, env)
        self.corruption = Corruption.of(corruptions)
        try:
            self._row = _Row(self.corruption, env.get_wrapper_attr("reward_range"))
        except AttributeError as error:
            raise _no_range(env) from error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Open an episode; see the environment's own ``reset``.

        Args:
            seed: Seeds the environment's chance and that of its feedback.
            options: The environment's; ``{"feedback_steps": n}`` has a drift go on from n steps.
        """
        options, taken = _split_options(options)
        result = self.env.reset(seed=seed, options=options)
        self._row.begin(seed, taken=taken)
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Info]:
        """Take the environment's step, and corrupt its reward."""
        observation, clean, terminated, truncated, info = self.env.step(action)
        over = terminated or truncated
        reward, told = self._row.feedback(float(clean), "score" in info, over)
        return observation, reward, terminated, truncated, {**info, **told}


class CorruptedVectorFeedback(ArgumentVectorWrapper):
    """A vector environment whose rewards are corrupted: :class:`CorruptedFeedback` row by row.

    A row has exactly the feedback of a single environment with its seed, in every autoreset mode.
    But rows that a reset gives the same seed, such as the rows of a group, play the same episode
    and are judged independently: with the same flips in all of them a group's baseline would
    cancel what it is there to withstand. The first row of a seed is the single environment's.

    Args:
        env: A vector environment, native or of Gymnasium.
        **corruptions: The fields of :class:`Corruption`.

    Raises:
        TypeError: A corruption is unknown, or its value of the wrong kind.
        ValueError: A value is impossible, or the environment has no range of rewards.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import CorruptedVectorFeedback
        >>> envs = CorruptedVectorFeedback(gym.make_vec("DialogueQA-v0", 2), bias=0.5)
        >>> observations, infos = envs.reset(seed=1)
        >>> envs.step(["no idea", "none"])[1]
        array([-0.5, -0.5])
    """

    argument = "feedback"
    place = 3

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], **corruptions: Any) -> None:
        RecordConstructorArgs.__init__(self, **corruptions)
        gym.vector.VectorWrapper.__init__(self, env)
        self.corruption = Corruption.of(corruptions)
        self._rows = [_Row(self.corruption, r) for r in _reward_ranges(env)]
        self._over: npt.NDArray[np.bool_] = np.zeros(self.num_envs, np.bool_)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, Info]:
        """Open an episode in every row, or in those of a ``reset_mask``.

        Args:
            seed: What the environment takes.
            options: The environment's; ``{"feedback_steps": n}`` has a drift go on from n steps.
        """
        options, taken = _split_options(options)
        mask = (options or {}).get("reset_mask")  # Gymnasium's own form takes it out
        inner: Any = self.env  # the base class knows no seeds of single rows
        result = inner.reset(seed=seed, options=options)
        opened = range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist()
        seeds = row_seeds(self.env, seed)
        seen: Counter[int | None] = Counter()
        for i in opened:
            self._rows[i].begin(seeds[i], copy=seen[seeds[i]], taken=taken)
            seen[seeds[i]] += 1
            self._over[i] = False
        return result  # type: ignore[no-any-return]

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Info]:
        """Take the environment's step, and corrupt its rewards."""
        observations, clean, terminated, truncated, infos = self.env.step(actions)
        mode = self.metadata.get("autoreset_mode")
        over = np.logical_or(terminated, truncated)
        rewards = np.array(clean, np.float64)
        for i, info in enumerate(step_infos(infos, self.num_envs)):
            if mode is AutoresetMode.NEXT_STEP and self._over[i]:
                continue  # this was no step of the row, but its reset
            ended = bool(over[i])
            rewards[i], told = self._rows[i].feedback(float(clean[i]), "score" in info, ended)
            # The info of a row's last step lies apart where its next episode has begun already.
            final = ended and mode is AutoresetMode.SAME_STEP
            self._add_info(infos["final_info"] if final else infos, told, i)
        self._over = over
        return observations, rewards, terminated, truncated, infos


def row_seeds(envs: gym.vector.VectorEnv[Any, Any, Any], seed: Any) -> list[int | None]:
    """Return the seed of every row, as a vector environment understands what ``reset`` is given."""
    if seed is None:
        return [None] * envs.num_envs
    if isinstance(seed, int | np.integer):
        size = getattr(envs.unwrapped, "group_size", 1)
        return [int(seed) + i // size for i in range(envs.num_envs)]
    return [None if s is None else int(s) for s in seed]


def _reward_ranges(env: Any) -> Sequence[RewardRange]:
    """Return the range of each row."""
    inner = env.unwrapped
    try:
        if hasattr(inner, "reward_range"):
            return [inner.reward_range] * env.num_envs
        ranges: Sequence[RewardRange] = inner.get_attr("reward_range")
    except AttributeError as error:
        raise _no_range(env) from error
    return ranges


def is_corrupted(env: Any) -> bool:
    """Whether feedback is corrupted somewhere inside an environment, single or vector."""
    while env is not env.unwrapped:
        if isinstance(env, CorruptedFeedback | CorruptedVectorFeedback):
            return True
        env = env.env
    return False
