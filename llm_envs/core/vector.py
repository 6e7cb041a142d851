"""Many episodes of a task in lockstep, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array

from llm_envs.core import play
from llm_envs.core.rendering import transcript
from llm_envs.core.task import Episode, Task


class TextVectorEnv(gym.vector.VectorEnv[Any, Any, Any]):
    """``num_envs`` episodes side by side: all actions of a step are scored in one call.

    It plays exactly the trajectories of ``num_envs`` single environments with the same seeds, and
    lays out observations and infos exactly as ``gymnasium.vector.SyncVectorEnv`` does in
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

    metadata: ClassVar[dict[str, Any]] = {
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
        self.task = play.make_task(task, task_arguments)
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []
        self._episodes: list[Episode[Any]] = []
        self._scores: list[list[float | None]] = []

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
    def candidate_scores(self) -> list[Any]:
        """Score of every choice of each row's current turn."""
        return [self.task.candidate_scores(e) for e in self.episodes]

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

        Returns:
            The batched first observations and infos.
        """
        known = play.check_options(options, ("example", "reset_mask"))
        mask = np.asarray(known.get("reset_mask", np.ones(self.num_envs, dtype=np.bool_)))
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise ValueError(
                f"reset_mask has to be a boolean array of shape ({self.num_envs},) with a true "
                f"value, but is {mask!r}."
            )
        if not mask.all() and not self._episodes:
            raise gym.error.ResetNeeded("The first reset cannot leave rows out.")
        for i, s in enumerate(self._seeds(seed)):
            if s is not None and mask[i]:
                self._rngs[i] = np.random.default_rng(np.random.SeedSequence(s))
        wanted = known.get("example")
        each = wanted if isinstance(wanted, Sequence) and not isinstance(wanted, str) else None
        if each is None:
            each = [wanted] * self.num_envs
        if len(each) != self.num_envs:
            raise ValueError(f"{len(each)} examples came for {self.num_envs} environments.")
        self._episodes = self._episodes or [None] * self.num_envs  # type: ignore[list-item]
        self._scores = self._scores or [[] for _ in range(self.num_envs)]
        infos: play.Info = {}
        for i in np.flatnonzero(mask).tolist():
            self._episodes[i] = play.begin(self.task, self._rngs[i], each[i])
            self._scores[i] = []
            infos = self._add_info(infos, play.info_of(self._episodes[i]), i)
        return self._observations(), infos

    def step(
        self, actions: Any
    ) -> tuple[
        Any,
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        play.Info,
    ]:
        """Score all actions at once and move every row on; a finished row opens a new episode."""
        if len(actions) != self.num_envs:
            raise ValueError(f"{len(actions)} actions came for {self.num_envs} environments.")
        checked = [play.check_action(self.single_action_space, a) for a in actions]
        outcomes = self.task.score(self.episodes, checked)
        rewards = np.array([play.reward(o, self.reward_range) for o in outcomes], np.float64)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        infos: play.Info = {}
        for i, (episode, action, outcome) in enumerate(
            zip(self._episodes, checked, outcomes, strict=True)
        ):
            play.apply(self.task, episode, action, outcome)
            self._scores[i].append(outcome.score)
            info = play.info_of(episode, outcome)
            if episode.finished:
                terminated[i] = True
                final = {"final_obs": episode.observation, "final_info": info}
                infos = self._add_info(infos, final, i)
                self._episodes[i] = play.begin(self.task, self._rngs[i])
                self._scores[i] = []
                info = play.info_of(self._episodes[i])
            infos = self._add_info(infos, info, i)
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        return self._observations(), rewards, terminated, truncated, infos

    def render(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Return the transcript of each row ("ansi")."""
        if self.render_mode is None:
            return None
        return tuple(
            transcript(e.messages, s) for e, s in zip(self.episodes, self._scores, strict=True)
        )

    def _seeds(self, seed: int | Sequence[int | None] | None) -> Sequence[int | None]:
        if isinstance(seed, Sequence):
            if len(seed) != self.num_envs:
                raise ValueError(f"{len(seed)} seeds came for {self.num_envs} environments.")
            seeds = list(seed)
        elif seed is None:
            seeds = [None] * self.num_envs
        else:
            seeds = [int(seed) + i // self.group_size for i in range(self.num_envs)]
        if not self._rngs:
            fresh = np.random.SeedSequence().generate_state(self.num_envs // self.group_size)
            self._rngs = [
                np.random.default_rng(int(fresh[i // self.group_size]))
                for i in range(self.num_envs)
            ]
        return seeds

    def _observations(self) -> Any:
        space = self.single_observation_space
        out = create_empty_array(space, n=self.num_envs)
        return concatenate(space, [e.observation for e in self._episodes], out)


def step_infos(infos: play.Info, num_envs: int) -> list[play.Info]:
    """Take batched infos apart: the info of each row's step, wherever autoreset has put it.

    Args:
        infos: What ``step`` (or ``reset``) of any Gymnasium vector environment returned.
        num_envs: Number of rows n.

    Returns:
        n dicts: the final info of a row whose episode has just ended, else its plain info.
    """
    final = infos.get("final_info", {})
    ended = infos.get("_final_info", np.zeros(num_envs, dtype=np.bool_))
    return [_row(final if ended[i] else infos, i) for i in range(num_envs)]


def _row(infos: play.Info, i: int) -> play.Info:
    return {
        key: value[i]
        for key, value in infos.items()
        if not key.startswith("_") and key not in ("final_info", "final_obs") and infos[f"_{key}"][i]
    }
