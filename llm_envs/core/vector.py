"""Many episodes of a task in lockstep, in one process."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from llm_envs.core import play
from llm_envs.core.rendering import transcript
from llm_envs.core.task import Episode, Task, make_task


class TextVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """``num_envs`` episodes side by side: all actions of a step are scored in one call.

    It plays exactly the trajectories of ``num_envs`` single environments with the same seeds
    (where a model scores, to its rounding, which hangs on what is read side by side), and lays out
    observations and infos exactly as ``gymnasium.vector.SyncVectorEnv`` does in
    same-step autoreset: the info of a row's last step stands under ``infos["final_info"]``
    (:func:`step_infos` reads both places).

    Args:
        num_envs: Number of episodes n.
        task: The task, its class, or ``"module:Class"``.
        group_size: Each ``group_size`` neighbours play the same episodes, for group baselines;
            it divides ``num_envs``.
        reward_range: The rewards of score 0 and score 1.
        render_mode: ``"ansi"`` or ``None``.
        **task_arguments: The task's own arguments.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (an instance variable, says the base class)
        "render_modes": ["ansi"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int,
        task: str | type[Task[Any]] | Task[Any],
        *,
        group_size: int = 1,
        reward_range: play.RewardRange = (-1.0, 1.0),
        render_mode: str | None = None,
        **task_arguments: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; at least one environment is needed.")
        if group_size < 1 or num_envs % group_size:
            raise ValueError(
                f"group_size {group_size} does not divide num_envs {num_envs}. "
                "Every group needs the same number of environments."
            )
        if render_mode not in (None, "ansi"):
            raise ValueError(f"render_mode is {render_mode!r}; vector forms know 'ansi' and None.")
        self.num_envs = num_envs
        self.group_size = group_size
        self.render_mode = render_mode
        self.reward_range = play.check_reward_range(reward_range)
        self.task = make_task(task, task_arguments, ("group_size", "reward_range", "render_mode"))
        self.single_observation_space = copy.deepcopy(self.task.observation_space)
        self.single_action_space = copy.deepcopy(self.task.action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        fresh = [seeding.np_random() for _ in range(num_envs)]
        self._rngs, self._seeds = [rng for rng, _ in fresh], [seed for _, seed in fresh]
        self._episodes: list[Episode[Any]] = []
        self._scores: list[list[float | None]] = []
        self._ending = np.zeros(num_envs, np.bool_)

    @property
    def episodes(self) -> Sequence[Episode[Any]]:
        """The episodes in play, one a row."""
        if not self._episodes:
            raise gym.error.ResetNeeded("The environment has not been reset yet: call reset().")
        return self._episodes

    @property
    def references(self) -> list[tuple[str, ...]]:
        """Accepted answers of each row's current turn."""
        return [self.task.references(e) for e in self.episodes]

    @property
    def demonstrations(self) -> list[str | None]:
        """What to write in each row's current turn, for supervised baselines only."""
        return [self.task.demonstration(e) for e in self.episodes]

    @property
    def candidate_scores(self) -> list[Any]:
        """Score of every choice of each row's current turn."""
        return [self.task.candidate_scores(e) for e in self.episodes]

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of each row, as in Gymnasium's own vector environments."""
        return tuple(self._rngs)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each row's generator."""
        return tuple(self._seeds)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, play.Info]:
        """Open an episode in every row.

        Args:
            seed: An int s gives row i the seed s + i (s + i // group_size in groups); a list gives
                each row its own; ``None`` goes on.
            options: ``{"example": …}``, an id or index for all rows or a list with one for each;
                ``{"reset_mask": bool array (n,)}`` opens new episodes in those rows only.
                In a list or a mask the rows of a group have the same value.

        Returns:
            The batched first observations and infos.
        """
        known = play.check_options(options, ("example", "reset_mask"))
        rows = self._masked(known.get("reset_mask"))
        wanted = self._each("example", known.get("example"))
        self._seed(seed, rows)
        opened = {i: play.begin(self.task, self._rngs[i], wanted[i]) for i in rows}
        self._episodes = [opened.get(i) or self._episodes[i] for i in range(self.num_envs)]
        self._scores = [[] if i in opened else self._scores[i] for i in range(self.num_envs)]
        self._ending[rows] = False
        infos = {i: play.info_of(episode) for i, episode in opened.items()}
        return self._observations(), _lay_out(infos, self.num_envs)

    def step(
        self, actions: Any
    ) -> tuple[
        Any,
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        play.Info,
    ]:
        """Score all actions at once and move every row on; a finished row opens a new episode.

        ``truncated`` is false unless :meth:`truncate` was called.
        """
        checked = self.check_actions(actions)
        outcomes = self.task.score(self.episodes, checked)
        rewards = np.array([play.reward(o, self.reward_range) for o in outcomes], np.float64)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        truncated, self._ending = self._ending, np.zeros(self.num_envs, np.bool_)
        infos: dict[int, play.Info] = {}
        final_infos: dict[int, play.Info] = {}
        final_obs = _nones(self.num_envs)
        for i, (episode, action, outcome) in enumerate(
            zip(self._episodes, checked, outcomes, strict=True)
        ):
            play.apply(self.task, episode, action, outcome)
            self._scores[i].append(outcome.score)
            infos[i] = play.info_of(episode, outcome)
            terminated[i], truncated[i] = episode.finished, truncated[i] and not episode.finished
            if terminated[i] or truncated[i]:
                final_obs[i], final_infos[i] = episode.observation, infos[i]
                self._episodes[i] = play.begin(self.task, self._rngs[i])
                self._scores[i] = []
                infos[i] = play.info_of(self._episodes[i])
        batched = _lay_out(infos, self.num_envs)
        if final_infos:
            batched["final_obs"], batched["_final_obs"] = final_obs, terminated | truncated
            batched["final_info"] = _lay_out(final_infos, self.num_envs)
            batched["_final_info"] = terminated | truncated
        return self._observations(), rewards, terminated, truncated, batched

    def check_actions(self, actions: Any) -> list[Any]:
        """Return the actions of a step as plain values of the space, one a row.

        Raises:
            ValueError: There are more or fewer than rows, or one lies outside the space.
        """
        if isinstance(actions, str) or len(actions) != self.num_envs:
            came = "One string" if isinstance(actions, str) else f"A batch of {len(actions)}"
            raise ValueError(f"{came} came for {self.num_envs} environments. Give one action each.")
        return [play.check_action(self.single_action_space, a) for a in actions]

    def truncate(self, rows: npt.NDArray[np.bool_]) -> None:
        """Have the next step end the episodes of some rows, for wrappers that limit an episode.

        A row whose task ends with that step is terminated and not truncated.

        Args:
            rows: (n,) whether it is a row's last step.
        """
        self._ending |= rows

    def render(self) -> tuple[str, ...] | None:
        """Return the transcript of each row ("ansi")."""
        if self.render_mode is None:
            return None
        return tuple(
            transcript(e.messages, s) for e, s in zip(self.episodes, self._scores, strict=True)
        )

    def _masked(self, mask: Any) -> list[int]:
        """Return the rows that a reset opens, whole groups only."""
        chosen = np.ones(self.num_envs, np.bool_) if mask is None else np.asarray(mask)
        if chosen.shape != (self.num_envs,) or chosen.dtype != np.bool_ or not chosen.any():
            raise ValueError(
                f"reset_mask has to be a boolean array of shape ({self.num_envs},) with a true "
                f"value, but is {mask!r}."
            )
        if not chosen.all() and not self._episodes:
            raise gym.error.ResetNeeded("The first reset cannot leave rows out.")
        self._each("reset_mask", chosen)
        rows: list[int] = np.flatnonzero(chosen).tolist()
        return rows

    def _each(self, name: str, values: Any) -> list[Any]:
        """Return the value of every row, from one for all or a sequence with one for each."""
        if isinstance(values, np.ndarray):
            values = values.tolist()
        if isinstance(values, str) or not isinstance(values, Sequence):
            return [values] * self.num_envs
        if len(values) != self.num_envs:
            raise ValueError(
                f"{name} has {len(values)} values for {self.num_envs} environments. "
                "Give one value for each."
            )
        if any(value != values[i - i % self.group_size] for i, value in enumerate(values)):
            raise ValueError(
                f"{name} differs within a group, but the {self.group_size} rows of a group play "
                "the same episodes. Repeat each value for its whole group."
            )
        return list(values)

    def _seed(self, seed: Any, rows: Sequence[int]) -> None:
        """Seed rows as Gymnasium does; a group goes on together from its first row's generator."""
        if isinstance(seed, int | np.integer):
            seeds: list[Any] = [int(seed) + i // self.group_size for i in range(self.num_envs)]
        else:
            seeds = self._each("seed", seed)
            seeds = [int(s) if isinstance(s, np.integer) else s for s in seeds]
        for i in rows:
            leader = i - i % self.group_size
            if i != leader:
                self._rngs[i] = copy.deepcopy(self._rngs[leader])
                self._seeds[i] = self._seeds[leader]
            elif seeds[i] is not None:
                self._rngs[i], self._seeds[i] = seeding.np_random(seeds[i])

    def _observations(self) -> Any:
        space = self.single_observation_space
        out: Any = create_empty_array(space, n=self.num_envs)
        return concatenate(space, [e.observation for e in self._episodes], out)


def _lay_out(infos: Mapping[int, play.Info], num_envs: int) -> play.Info:
    """Batch the infos of some rows: what ``VectorEnv._add_info`` makes, a key at a time."""
    batched: play.Info = {}
    for key in dict.fromkeys(chain.from_iterable(infos.values())):
        rows = [i for i, info in infos.items() if key in info]
        kind = type(infos[rows[0]][key])
        column = np.zeros(num_envs, kind) if kind in (int, float) else _nones(num_envs)
        for i in rows:
            column[i] = infos[i][key]
        mask = np.zeros(num_envs, np.bool_)
        mask[rows] = True
        batched[key], batched[f"_{key}"] = column, mask
    return batched


def _nones(num_envs: int) -> npt.NDArray[Any]:
    return np.empty(num_envs, object)


def step_infos(infos: play.Info, num_envs: int) -> list[play.Info]:
    """Take batched infos apart: the info of each row's step, wherever autoreset has put it.

    Args:
        infos: What ``step`` (or ``reset``) of any Gymnasium vector environment returned.
        num_envs: Number of rows n.

    Returns:
        n dicts of plain values: the final info of a row whose episode has just ended, else its
        plain info.
    """
    rows = _rows(infos, num_envs)
    if "final_info" in infos:
        finals = _rows(infos["final_info"], num_envs)
        for i in np.flatnonzero(infos["_final_info"]).tolist():
            rows[i] = finals[i]
    return rows


def _rows(infos: play.Info, num_envs: int) -> list[play.Info]:
    rows: list[play.Info] = [{} for _ in range(num_envs)]
    for key, column in infos.items():
        if key.startswith("_") or key in ("final_info", "final_obs"):
            continue
        values = _rows(column, num_envs) if isinstance(column, dict) else column.tolist()
        # Wrappers of vector environments add entries without a mask, for all rows.
        mask = infos.get(f"_{key}", np.ones(num_envs, dtype=np.bool_))
        for i in np.flatnonzero(mask).tolist():
            rows[i][key] = values[i]
    return rows
