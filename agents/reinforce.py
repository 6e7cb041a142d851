"""REINFORCE with immediate rewards: the plain policy gradient, one update a batch.

For every answer a_i to a conversation s_i with reward r_i,

    ∇J ≈ (1/D) Σ_i A_i ∇ log π(a_i | s_i),    A_i = R_i - b_i,

where R_i is the reward of that very turn (γ = 0, the default) or the discounted return from it
on, and the baseline b_i does not depend on a_i. Differences from the textbook: D counts answers,
not episodes, and an entropy bonus and a KL penalty to the initial policy can be added.

RLOO is REINFORCE with the leave-one-out baseline and the KL penalty in the reward.

Source: Williams (1992); Kool et al. (2019); Ahmadian et al. (2024), "Back to Basics" (RLOO).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents import objectives
from agents.policy_agent import Batch, PolicyAgent
from agents.rollout import Rollout
from agents.settings import ReinforceConfig, RLOOConfig


class Reinforce(PolicyAgent[ReinforceConfig]):
    """The policy gradient; see the module for the equation, :class:`PolicyAgent` for arguments."""

    name = "reinforce"
    config_class = ReinforceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.average: float | None = None
        super().__init__(*args, **kwargs)

    @property
    def needs_critic(self) -> bool:
        """Whether a value head is trained."""
        return self.config.baseline == "critic"

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Take one gradient step on the whole rollout."""
        rewards, charged = self.charged_rewards(rollout)
        returns = self.returns(rollout, rewards)
        advantages = self.advantages(rollout, returns)
        metrics = self.accumulate_gradients(rollout, advantages, returns) | charged
        metrics["train/grad_norm"] = self.step_optimizer(metrics["train/loss"])
        self.adapt_kl(metrics, len(rewards))
        if self.config.baseline == "moving":
            decay = self.config.moving_decay
            self.average = objectives.moving_average(self.average, returns, decay)
        return metrics

    def returns(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        """Return R_i of every answer, (D,).

        The last turn of a truncated episode is followed by what a critic expects; without one, by
        nothing.
        """
        gamma = self.config.gamma
        table = rollout.by_turn(rewards)
        if gamma and self.critic is not None:
            rows = torch.arange(rollout.episodes)
            table[rows, rollout.lengths - 1] += gamma * self.bootstrap(rollout).to(table)
        return objectives.discounted_returns(table, gamma)[rollout.rows, rollout.turns]

    def advantages(self, rollout: Rollout, returns: Tensor | None = None) -> Tensor:
        """Return R_i - b_i of every answer, (D,); of a critic's baseline R_i, as b_i comes later.

        Args:
            rollout: D answers.
            returns: (D,) R_i; from the rollout's own rewards if left out.
        """
        c = self.config
        returns_D = self.returns(rollout, rollout.rewards) if returns is None else returns
        if c.baseline == "leave-one-out":
            return objectives.leave_one_out_advantage(returns_D, self.groups(rollout))
        if c.baseline == "batch":
            return objectives.batch_mean_advantage(returns_D)
        if c.baseline == "moving":
            return returns_D - (self.average or 0.0)
        return returns_D

    def accumulate_gradients(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor | None = None
    ) -> dict[str, float]:
        """Add the gradient of the loss to the parameters', in micro-batches; return metrics.

        Args:
            rollout: D answers.
            advantages: (D,) the advantage of each; a critic's values are taken from it here.
            returns: (D,) what a critic is to predict.
        """
        answers = len(rollout.rewards)

        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            log_probs, values = batch.scores.log_probs, batch.scores.values
            advantage_D, value_loss = advantages.to(log_probs), torch.zeros(())
            if values is not None and returns is not None:
                target = returns.to(values)[batch.answer_of_value]
                value_loss = objectives.value_loss(values, target, answers)
                advantage_D = advantage_D.index_add(
                    0, batch.answer_of_value.to(values.device), -values.detach().to(log_probs)
                )
            loss = objectives.reinforce_loss(log_probs, advantage_D[batch.answer_of_token], answers)
            if values is None:
                return loss, {}
            return loss + self.config.value_coef * value_loss, {"value_loss": value_loss}

        return self.accumulate(rollout, objective)

    def extra_state(self) -> dict[str, Any]:
        """Return the moving average."""
        return {"average": self.average}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take the moving average back."""
        self.average = state["average"]


class RLOO(Reinforce):
    """REINFORCE leave-one-out, as its paper sets it."""

    name = "rloo"
    config_class = RLOOConfig
