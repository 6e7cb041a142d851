"""Maximum likelihood on accepted answers: the imitation line, which needs to be told them.

The policy is led through each episode by what its task demonstrates, the first accepted answer or
the search before it, and learns to say it (of what is longer than ``max_new_tokens`` the start),

    L = -(1/D) Σ_i log π(a*_i | s_i),

which is REINFORCE with advantage 1 on the oracle's answers. It is no competitor of the agents that
learn by reward but a line to compare them with: it is given what they have to find out.

On choosing tasks the accepted answer is a candidate with the best score.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents import objectives
from agents.policies.candidate import Choices
from agents.policies.causal_lm import Conversations
from agents.policy_agent import Batch, PolicyAgent
from agents.rollout import MessageReader, Rollout
from agents.settings import SupervisedConfig


class Supervised(PolicyAgent[SupervisedConfig]):
    """Imitates the accepted answers; see the module."""

    name = "supervised"
    config_class = SupervisedConfig

    def collect(self) -> Rollout:
        """Play the episodes of this iteration with the accepted answers."""
        seeds = np.random.SeedSequence((self.world.seed(self.seed), self.iteration))
        return self.play(Teacher(self.policy.begin(), np.random.default_rng(seeds)), look=True)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Take one gradient step towards the accepted answers."""
        answers = len(rollout.rewards)

        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            log_probs = batch.scores.log_probs
            return objectives.reinforce_loss(log_probs, torch.ones_like(log_probs), answers), {}

        metrics = self.accumulate(rollout, objective, sampled=False)
        metrics["train/grad_norm"] = self.step_optimizer(metrics["train/loss"])
        self.adapt_kl(metrics, answers)
        return metrics


class Teacher:
    """Plays what the environment accepts, in the policy's own tokens.

    Args:
        policy: The policy's player; it writes down what is said, as if it had said it.
        rng: Chooses among candidates that are equally good.
    """

    def __init__(self, policy: Conversations | Choices, rng: np.random.Generator) -> None:
        self.policy = policy
        self.rng = rng
        self.demonstrations: list[str | None] = []
        self.candidate_scores: list[Any] = []
        if isinstance(policy, MessageReader):
            self.reads_messages = True

    @property
    def sequences(self) -> list[Any]:
        """What was read and said."""
        return self.policy.sequences

    @property
    def cut(self) -> int:
        """Answers that were longer than the policy may write."""
        return self.policy.cut

    @property
    def answers(self) -> int:
        """Number of answers."""
        return self.policy.answers

    def state_of(self, row: int, observation: Any) -> Any:
        """Return the state that a row is in."""
        return self.policy.state_of(row, observation)

    def peek(self, envs: Any) -> None:
        """Look at what is accepted."""
        self.demonstrations, self.candidate_scores = envs.demonstrations, envs.candidate_scores

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        """Give an accepted answer to each row's observation.

        Raises:
            ValueError: The environment accepts none, or does not tell.
        """
        if isinstance(self.policy, Conversations):
            said = {row: _told(self.demonstrations[row], turn) for row in observations}
            return self.policy.act(observations, turn, said=said)
        chosen = {}
        for row in observations:
            scores = np.asarray(_told(self.candidate_scores[row], turn))
            chosen[row] = int(self.rng.choice(np.flatnonzero(scores == scores.max())))
        return self.policy.act(observations, turn, said=chosen)


def _told(accepted: Any, turn: int) -> Any:
    if accepted is None or not np.size(accepted):
        raise ValueError(
            f"The environment tells no accepted answer at turn {turn}, so there is nothing to "
            "imitate. Its task has to give references or candidate_scores."
        )
    return accepted
