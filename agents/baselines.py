"""Players without a language model: chance, and linear bandits on a choice's numeric features."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from agents.base import Agent
from agents.rollout import Player, Step, earned, episode_seeds, play
from agents.settings import BaselineConfig, LinearBanditConfig

Floats = npt.NDArray[np.float64]

MOST_RANDOM_WORDS = 3


# --- players -------------------------------------------------------------------------------------


class ScriptedPlayer(ABC):
    """A player that decides without a language model.

    Attributes:
        chosen_from: (row, turn) -> the probability of each candidate, (k,), on choosing tasks.
    """

    def __init__(self) -> None:
        self.sequences: list[Any] = []
        self.chosen_from: dict[tuple[int, int], Floats] = {}
        self.cut = 0
        self.answers = 0

    @abstractmethod
    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Return the action and, on choosing tasks, the probability of each candidate, (k,)."""

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        """Decide for each row that is still in play."""
        actions: dict[int, Any] = {}
        for row, observation in observations.items():
            actions[row], chances = self.decide(row, observation)
            if chances is not None:
                self.chosen_from[row, turn] = chances
        self.answers += len(observations)
        return actions


class RandomPlayer(ScriptedPlayer):
    """Plays at random.

    Chance depends on the seed and on what is seen alone: neither the order of the episodes nor
    how many are played side by side changes a score.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Draw a span of the conversation, or a candidate."""
        if isinstance(observation, str):
            return random_span(observation, random.Random(repr((self.seed, observation)))), None
        seen = self.seed, observation["prompt"], observation["candidates"]
        k = len(observation["candidates"])
        return random.Random(repr(seen)).randrange(k), np.full(k, 1.0 / k)


def random_span(observation: str, rng: random.Random) -> str:
    """Answer with one to three successive words of the conversation, uniformly drawn."""
    words = [w for w in observation.split() if w not in ("User:", "Assistant:")]
    length = rng.randint(1, MOST_RANDOM_WORDS)
    start = rng.randrange(max(1, len(words) - length + 1))
    return " ".join(words[start : start + length])


# --- agents --------------------------------------------------------------------------------------


BaselineConfigT = TypeVar("BaselineConfigT", bound=BaselineConfig)


class Baseline(Agent[BaselineConfigT]):
    """An agent without a language model: it plays a batch of episodes, then learns from it."""

    config_class: ClassVar[type[BaselineConfig]]

    def learn_from(self, batch: Sequence[Step]) -> dict[str, float]:
        """Learn from what was played, if its rewards are finite."""
        self.check_rewards([step.reward for step in batch])
        return {}

    def iterate(self) -> dict[str, float]:
        """Play a batch of episodes and learn from it."""
        seeds = episode_seeds(self.seed, self.iteration, self.config.episodes, 1)
        steps = self.batch = play(
            self.player(False), self.envs, seeds=seeds, options=self.reset_options
        )
        trained = self.learn_from(steps)
        self.iteration += 1
        self.env_steps += len(steps)
        rewards = [step.reward for step in steps]
        scores, best_scores = (
            [step.info.get(name, np.nan) for step in steps] for name in ("score", "best_score")
        )
        return {**earned(rewards, scores, best_scores), **trained}

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Nothing has to be remembered."""
        return {}

    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Nothing was remembered."""


class Random(Baseline[BaselineConfig]):
    """Any candidate, or a few words of the conversation: the floor of every score."""

    name = "random"
    config_class = BaselineConfig

    def player(self, deterministic: bool) -> Player:
        """Return a random player; it has nothing better to play."""
        return RandomPlayer(self.seed)


class LinearBandit(Baseline[LinearBanditConfig]):
    """One linear model of the reward for all candidates, on their numeric features.

    With x the features of a candidate and a 1, A = ridge · I + Σ x xᵀ and b = Σ r x over what was
    chosen, the reward is estimated as θ·x with θ = A⁻¹ b.
    """

    config_class = LinearBanditConfig
    families = ("choosing",)
    refusal = "it reads the numeric features of candidates, and a writing task has none."

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.envs.single_observation_space["features"].shape[1] + 1
        self.precision = np.eye(width) * self.config.ridge
        self.moment = np.zeros(width)

    def learn_from(self, batch: Sequence[Step]) -> dict[str, float]:
        """Add what was chosen, and what it earned."""
        metrics = super().learn_from(batch)
        chosen = np.stack([with_intercept(s.observation["features"])[s.action] for s in batch])
        self.precision = self.precision + chosen.T @ chosen
        self.moment = self.moment + chosen.T @ np.array([s.reward for s in batch])
        return metrics

    def player(self, deterministic: bool) -> Player:
        """Return what chooses by the estimate, or by the estimate and exploration."""
        covariance = np.linalg.inv(self.precision).astype(np.float64)
        mean = (covariance @ self.moment).astype(np.float64)
        return LinearPlayer(self, mean, None if deterministic else covariance)

    @abstractmethod
    def optimism(self, x: Floats, covariance: Floats, rng: np.random.Generator) -> Floats:
        """Return what exploration adds to the estimated rewards of (k, width) candidates."""

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Write A and b."""
        held = {"precision": self.precision, "moment": self.moment}
        save_file(held, folder / "state.safetensors")
        return {}

    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Read A and b."""
        held = load_file(folder / "state.safetensors")
        self.precision, self.moment = held["precision"], held["moment"]


class LinearPlayer(ScriptedPlayer):
    """Chooses the candidate with the highest estimated reward, exploration included."""

    def __init__(self, bandit: LinearBandit, mean: Floats, covariance: Floats | None) -> None:
        super().__init__()
        self.bandit = bandit
        self.mean = mean
        self.covariance = covariance
        seeds = np.random.SeedSequence((bandit.seed, bandit.iteration))
        self.rng = np.random.default_rng(seeds)

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Choose; of equals the first."""
        x = with_intercept(observation["features"])
        values = x @ self.mean
        if self.covariance is not None:
            values = values + self.bandit.optimism(x, self.covariance, self.rng)
        choice = int(values.argmax())
        return choice, np.eye(len(x))[choice]


class LinUCB(LinearBandit):
    """Adds the width of a confidence bound: θ·x + α √(xᵀ A⁻¹ x).

    Source: Li et al. (2010), "A Contextual-Bandit Approach to Personalized News Article
    Recommendation", with one model for all candidates.
    """

    name = "linucb"

    def optimism(self, x: Floats, covariance: Floats, rng: np.random.Generator) -> Floats:
        """Return the upper confidence bounds' widths."""
        variances: Floats = np.einsum("ki,ij,kj->k", x, covariance, x)
        return self.config.exploration * np.sqrt(variances)


class Thompson(LinearBandit):
    """Draws the weights from their posterior: θ̃ ~ N(θ, v² A⁻¹), once for every choice.

    Source: Agrawal and Goyal (2013), "Thompson Sampling for Contextual Bandits with Linear
    Payoffs".
    """

    name = "thompson"

    def optimism(self, x: Floats, covariance: Floats, rng: np.random.Generator) -> Floats:
        """Return what a draw of the weights says beyond their mean."""
        root = np.linalg.cholesky(covariance)
        drawn: Floats = x @ (root @ rng.standard_normal(len(root)))
        return self.config.exploration * drawn


def with_intercept(features: npt.NDArray[Any]) -> Floats:
    """Return (k, f + 1): the candidates' features and a 1."""
    return np.concatenate([features, np.ones((len(features), 1))], axis=1, dtype=np.float64)
