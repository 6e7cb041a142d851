"""One episode of a task at a time, as a Gymnasium environment."""

from __future__ import annotations

import copy
import sys
from typing import Any

import gymnasium as gym

from llm_envs.core import play
from llm_envs.core.rendering import transcript
from llm_envs.core.task import Episode, Task, make_task


class TextEnv(gym.Env[Any, Any]):
    """Any :class:`~llm_envs.core.task.Task` as a Gymnasium environment.

    The task's own docstring describes actions, observations and rewards.

    Args:
        task: The task, its class, or ``"module:Class"``.
        reward_range: The rewards of score 0 and score 1.
        render_mode: ``"ansi"`` (``render`` returns the transcript), ``"human"`` (it is printed
            as it grows) or ``None``.
        **task_arguments: The task's own arguments (``split``, ``dataset``, ``max_turns``, …).

    Raises:
        TypeError: An argument is unknown.
        ValueError: An argument has an impossible value.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        task: str | type[Task[Any]] | Task[Any],
        *,
        reward_range: play.RewardRange = (-1.0, 1.0),
        render_mode: str | None = None,
        **task_arguments: Any,
    ) -> None:
        if render_mode not in (None, "ansi", "human"):
            raise ValueError(f"render_mode is {render_mode!r}; use 'ansi', 'human' or None.")
        self.render_mode = render_mode
        self.reward_range = play.check_reward_range(reward_range)
        self.task = make_task(task, task_arguments)
        # Copies: each environment's spaces have a seed of their own, and the task is shared.
        self.observation_space = copy.deepcopy(self.task.observation_space)
        self.action_space = copy.deepcopy(self.task.action_space)
        self._episode: Episode[Any] | None = None
        self._scores: list[float | None] = []
        self._printed = 0

    @property
    def episode(self) -> Episode[Any]:
        """The episode in play."""
        if self._episode is None:
            raise gym.error.ResetNeeded("The environment has not been reset yet: call reset().")
        return self._episode

    @property
    def references(self) -> tuple[str, ...]:
        """Accepted answers of the current turn, for oracles and supervised baselines only."""
        return self.task.references(self.episode)

    @property
    def demonstration(self) -> str | None:
        """What to write in the current turn, for supervised baselines only."""
        return self.task.demonstration(self.episode)

    @property
    def candidate_scores(self) -> Any:
        """Score of every choice of the current turn, shape (k,), or ``None`` if unknown."""
        return self.task.candidate_scores(self.episode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, play.Info]:
        """Open an episode.

        Args:
            seed: Seeds all randomness from now on.
            options: ``{"example": id or index}`` chooses the example.

        Returns:
            The first observation, and ``example_id``, ``turn`` and ``messages``.
        """
        super().reset(seed=seed)
        wanted = play.check_options(options, ("example",)).get("example")
        self._episode = play.begin(self.task, self.np_random, wanted)
        self._scores, self._printed = [], 0
        self._render_human()
        return copy.copy(self._episode.observation), play.info_of(self._episode)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, play.Info]:
        """Score the action and move on; ``truncated`` is always false.

        Raises:
            ValueError: The action lies outside the action space.
            gymnasium.error.ResetNeeded: There is no episode, or it is over.
        """
        episode = self.episode
        if episode.finished:
            raise gym.error.ResetNeeded("The episode is over: call reset() before the next step.")
        action = play.check_action(self.action_space, action)
        [outcome] = self.task.score([episode], [action])
        play.apply(self.task, episode, action, outcome)
        self._scores.append(outcome.score)
        self._render_human()
        return (
            copy.copy(episode.observation),  # what the caller does to a dict stays with the caller
            play.reward(outcome, self.reward_range),
            episode.finished,
            False,
            play.info_of(episode, outcome),
        )

    def render(self) -> str | None:
        """Return the transcript so far ("ansi"); in "human" mode it has been printed already."""
        if self.render_mode != "ansi":
            return None
        return transcript(self.episode.messages, self._scores)

    def _render_human(self) -> None:
        if self.render_mode != "human":
            return
        new = self.episode.messages[self._printed :]
        self._printed = len(self.episode.messages)
        shown = transcript(new, self._scores[-1:])
        encoding = sys.stdout.encoding or "utf-8"
        print(shown.encode(encoding, "backslashreplace").decode(encoding), flush=True)
