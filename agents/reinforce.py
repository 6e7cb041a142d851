"""REINFORCE with immediate rewards: the plain policy gradient, one update a batch.

For every answer a_i to a conversation s_i with reward r_i,

    ∇J ≈ (1/D) Σ_i A_i ∇ log π(a_i | s_i),    A_i = R_i - b_i,

where R_i is the reward of that very turn (γ = 0, the default) or the discounted return from it
on, and the baseline b_i does not depend on a_i. Differences from the textbook: D counts answers,
not episodes, and an entropy bonus and a KL penalty to the initial policy can be added.

Source: Williams (1992); with ``leave-one-out``, Kool et al. (2019) and Ahmadian et al. (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from agents import objectives
from agents.base import Agent, AgentConfig
from agents.rollout import Rollout


@dataclass(frozen=True)
class ReinforceConfig(AgentConfig):
    """Settings of REINFORCE."""

    baseline: Literal["none", "batch", "moving", "leave-one-out"] = "leave-one-out"
    """What rewards are compared with: nothing, the batch's mean, a moving average of earlier
    batches, or the other answers to the same prompt."""
    gamma: float = 0.0
    """Discount over the turns of a dialogue; 0 credits each answer with its own reward only."""
    moving_decay: float = 0.9
    """Decay of the moving average."""
    entropy_coef: float = 0.0
    """Weight of the bonus on the mean entropy of the sampled tokens' distributions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave-one-out" and self.group_size < 2:
            raise ValueError(
                f"The leave-one-out baseline compares answers to one prompt, but group_size is "
                f"{self.group_size}. Use 2 or more, or another baseline."
            )
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; a discount lies in [0, 1].")


class Reinforce(Agent[ReinforceConfig]):
    """The policy gradient; see the module for the equation, :class:`Agent` for the arguments."""

    name = "reinforce"
    config_class = ReinforceConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.average: float | None = None

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of every answer, (D,)."""
        c = self.config
        returns = objectives.discounted_returns(rollout.rewards_by_turn(), c.gamma)
        returns_D = returns[rollout.rows, rollout.turns]
        if c.baseline == "leave-one-out":
            # The members of a group are neighbours, and are compared turn by turn.
            prompts = rollout.rows // c.group_size
            groups = prompts * (int(rollout.turns.max()) + 1) + rollout.turns
            return objectives.leave_one_out_advantage(returns_D, groups)
        if c.baseline == "batch":
            return objectives.batch_mean_advantage(returns_D)
        if c.baseline == "moving":
            centred = returns_D - (self.average or 0.0)
            self.average = objectives.moving_average(self.average, returns_D, c.moving_decay)
            return centred
        return returns_D

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Take one gradient step on the whole rollout."""
        metrics = self.accumulate_gradients(rollout, self.advantages(rollout))
        return {**metrics, "train/grad_norm": self.step_optimizer()}

    def accumulate_gradients(self, rollout: Rollout, advantages: Tensor) -> dict[str, float]:
        """Add the gradient of the loss to the parameters', in micro-batches; return metrics.

        Args:
            rollout: D answers.
            advantages: (D,) the advantage of each.
        """
        c = self.config
        total = dict.fromkeys(("loss", "entropy", "kl"), 0.0)
        for batch in self.policy.micro_batches(rollout.sequences):
            decision = torch.cat([rollout.decision_of[i] for i in batch])
            scores = self.policy.score([rollout.sequences[i] for i in batch], self.reference)
            advantage = advantages[decision].to(scores.log_probs)
            loss = objectives.reinforce_loss(
                scores.log_probs, advantage, decisions=len(rollout.rewards)
            )
            entropy = scores.entropies.sum() / rollout.tokens
            loss = loss - c.entropy_coef * entropy
            if scores.kls is not None:
                kl = scores.kls.sum() / rollout.tokens
                loss = loss + c.kl_coef * kl
                total["kl"] += kl.item()
            loss.backward()  # type: ignore[no-untyped-call]
            total["loss"] += loss.item()
            total["entropy"] += entropy.item()
        return {f"train/{name}": value for name, value in total.items()}

    def extra_state(self) -> dict[str, Any]:
        """Return the moving average."""
        return {"average": self.average}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take the moving average back."""
        self.average = state["average"]
