"""Choosing tasks for agents that read vectors."""

from __future__ import annotations

from typing import Any, Final, Literal

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

Scaling = Literal["choice", "none"]

_LEAST_SPREAD: Final = 1e-6  # features that differ by less are equal up to rounding


def numeric_observation(
    features: npt.NDArray[np.floating[Any]], scaling: Scaling = "choice"
) -> npt.NDArray[np.float32]:
    """Flatten the features of k candidates, candidate by candidate, into one vector.

    Args:
        features: (k, f).
        scaling: What :class:`NumericView` says.

    Returns:
        (k · f,) float32; with ``"choice"`` within ±√(k - 1), and 0 where all candidates are alike.
    """
    if scaling == "none":
        return features.astype(np.float32).ravel()
    wide = features.astype(np.float64)
    centred = wide - wide.mean(0)
    scores: npt.NDArray[np.float64] = centred / np.maximum(centred.std(0), _LEAST_SPREAD)
    bound = np.sqrt(len(features) - 1)
    return scores.clip(-bound, bound).astype(np.float32).ravel()


class NumericView(
    gym.ObservationWrapper[npt.NDArray[np.float32], Any, dict[str, Any]], RecordConstructorArgs
):
    """A choosing task as a vector of numbers, for agents that cannot read.

    The observation is the ``features`` of the candidates, flattened, and the action stays
    ``Discrete(k)``: PPO, A2C and DQN of Stable-Baselines3 train on it unchanged. The prompt and
    the candidates' texts are not shown; they stay in ``info["messages"]``.

    A feature lies in [0, 1], but what tells the candidates of one choice apart may be a hundredth
    of that: the mean ratings of RecommendationClicks differ by 0.07, its genre flags by 0.4, and
    the first tell six times as much. So each feature is standardised over the k candidates of the
    choice, which needs no statistics of other episodes and bounds it by ±√(k - 1). What all
    candidates share is lost by that, and cannot tell which of them to choose.

    Args:
        env: A choosing task.
        scaling: ``"choice"`` standardises each feature over the candidates of the choice;
            ``"none"`` leaves it in [0, 1].

    Raises:
        ValueError: It is not a choosing task, or the scaling is unknown.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import NumericView
        >>> env = NumericView(gym.make("RecommendationClicks-v0"))
        >>> env.observation_space
        Box(-2.0, 2.0, (120,), float32)
        >>> env.action_space
        Discrete(5)
    """

    def __init__(self, env: gym.Env[Any, Any], scaling: Scaling = "choice") -> None:
        RecordConstructorArgs.__init__(self, scaling=scaling)
        gym.ObservationWrapper.__init__(self, env)
        if scaling not in ("choice", "none"):
            raise ValueError(f"scaling is {scaling!r}; use 'choice' or 'none'.")
        spaces = getattr(env.observation_space, "spaces", {})
        features = spaces.get("features") if isinstance(spaces, dict) else None
        if not isinstance(env.action_space, gym.spaces.Discrete) or features is None:
            raise ValueError(
                f"{env} is no choosing task: it has no candidates with features (its observations "
                f"are {env.observation_space}, its actions {env.action_space}). Use TokenView for "
                "a writing task."
            )
        self.scaling: Scaling = scaling
        k, f = features.shape
        low, high = (-np.sqrt(k - 1), np.sqrt(k - 1)) if scaling == "choice" else (0.0, 1.0)
        self.observation_space = gym.spaces.Box(low, high, (k * f,), np.float32)

    def observation(self, observation: dict[str, Any]) -> npt.NDArray[np.float32]:
        """Return the scaled features of the candidates, (k · f,)."""
        return numeric_observation(observation["features"], self.scaling)
