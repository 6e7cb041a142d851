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

from dataclasses import dataclass
from typing import Any, Final

import torch

from agents.optimizers import Anchor, Direction, ImmediateUpdate, LossTerm, Precondition
from agents.reinforce import Reinforce, ReinforceConfig

LITERAL: Final[dict[str, Any]] = {
    "direction": "ascend",
    "loss_term": "broadcast",
    "anchor": "zero",
    "precondition": "sgd",
    "max_grad_norm": 0.0,
}
"""Settings of the formula as it is printed."""


@dataclass(frozen=True)
class ImmediateRewardConfig(ReinforceConfig):
    """Settings of the document's update."""

    learning_rate: float = 1e-4
    """α."""
    beta: float = 1.0
    """β: weight of the gradient."""
    lam: float = 0.01
    """λ: strength of the pull towards the anchor."""
    direction: Direction = "descend"
    """Up the loss, as printed, or down, as the document's words say."""
    loss_term: LossTerm = "none"
    """The loss itself: added to every coordinate (as printed), a factor of the step, or unused."""
    anchor: Anchor = "initial"
    """What regularisation pulls towards: zero (as printed) or the initial weights."""
    precondition: Precondition = "adam"
    """The gradient as it is, or Adam's adaptive step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma:
            raise ValueError(
                f"gamma is {self.gamma}; the immediate-reward update credits an answer with its "
                "own reward only. Use reinforce or ppo for returns."
            )
        if self.weight_decay:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; lam is what regularises this update."
            )


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
