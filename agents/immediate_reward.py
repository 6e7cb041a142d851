"""The founding document's immediate-reward update as an agent.

Online: every batch of interactions moves the weights once. Each answer is credited with the reward
that it earned itself (γ = 0) against a baseline b that does not depend on it,

    ℓ_t = -(r_t - b) log π(a_t | x_t),

and the weights move by the document's regularised formula, whose open points are the settings of
:class:`agents.optimizers.ImmediateUpdate`:

    θ ← θ + s α (ℓ-term + β u),   u = ∂ℓ/∂θ + λ (θ - θ_a), plain or preconditioned by Adam

The defaults, descent with Adam and without the loss term, are the reading that did best of all
(``python -m benchmarks.ablation``; ``benchmarks/ABLATION.md``). What is left of the formula then is
the pull towards the initial weights: with λ = 0 this is REINFORCE with Adam, and λ > 0 differs from
its weight decay, which pulls towards zero. ``LITERAL`` is the formula to the letter: it climbs the
loss, and unlearns what is rewarded.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from agents.optimizers import ImmediateUpdate
from agents.reinforce import Reinforce
from agents.settings import ImmediateRewardConfig

LITERAL: Final[dict[str, Any]] = {
    "direction": "ascend",
    "loss_term": "broadcast",
    "anchor": "zero",
    "precondition": "sgd",
    "max_grad_norm": 0.0,
}
"""Settings of the formula as it is printed."""


class ImmediateReward(Reinforce):
    """REINFORCE's loss with the document's update; see the module for the equations."""

    name = "immediate-reward"
    config_class = ImmediateRewardConfig
    config: ImmediateRewardConfig

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the document's update."""
        c = self.config
        return ImmediateUpdate(
            self.parameters,
            c.learning_rate,
            beta=c.beta,
            lam=c.lam,
            direction=c.direction,
            loss_term=c.loss_term,
            anchor=c.anchor,
            precondition=c.precondition,
        )

    def take_step(self, loss: float) -> None:
        """Move the parameters; the value of the loss is a term of the update."""
        self.optimizer.step(lambda: loss)
