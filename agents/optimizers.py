"""The founding document's regularised update as an optimizer, with every open point a choice.

The document prints

    θ_{t+1} = θ_t + α [ ℓ(y_t, M_θ(x_t)) + β ( ∂ℓ/∂θ + λ θ ) ]

with the immediate loss ℓ, the learning rate α and the regularisation strength λ, while its words
say that the loss is *minimised*, with SGD or Adam. The formula adds a number to a vector, climbs
where the words descend, and pulls the weights away from zero when it climbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from agents.settings import Anchor, Direction, LossTerm, Precondition

CHOICES: dict[str, tuple[str, ...]] = {
    "direction": get_args(Direction),
    "loss_term": get_args(LossTerm),
    "anchor": get_args(Anchor),
    "precondition": get_args(Precondition),
}


class ImmediateUpdate(torch.optim.Optimizer):
    """One step of the document's update.

    With g = ∂ℓ/∂θ, the anchor θ_a, d = g + λ(θ - θ_a), s = +1 (``"ascend"``, as printed) or -1
    (``"descend"``, as the words say), and u = d (``"sgd"``) or u = Adam(g) + λ(θ - θ_a)
    (``"adam"``, the adaptive step size):

    - ``loss_term="broadcast"`` (as printed: ℓ is added to every coordinate): θ ← θ + sα(ℓ + βu)
    - ``loss_term="step_size"`` (ℓ scales the step): θ ← θ + sα(|ℓ| + β)u
    - ``loss_term="none"``: θ ← θ + sαβu

    Parameters without a gradient are left alone.

    Args:
        params: Parameters, or groups of them.
        lr: α, above 0.
        beta: β, 0 or more.
        lam: λ, 0 or more.
        direction: Up or down the loss.
        loss_term: What the loss itself does.
        anchor: What regularisation pulls towards: zero (as printed) or the weights that the
            optimizer was given (L2-SP; Li et al., 2018).
        precondition: The gradient as it is, or Adam's (Kingma and Ba, 2015; β₁ = 0.9,
            β₂ = 0.999, ε = 1e-8, with bias correction).

    Raises:
        ValueError: A number or a choice is impossible.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        beta: float = 1.0,
        lam: float = 0.0,
        direction: Direction = "descend",
        loss_term: LossTerm = "none",
        anchor: Anchor = "zero",
        precondition: Precondition = "sgd",
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "beta": beta,
            "lam": lam,
            "direction": direction,
            "loss_term": loss_term,
            "anchor": anchor,
            "precondition": precondition,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, whose settings may be their own; see the class for what is refused."""
        settings = self.defaults | param_group
        lr, beta, lam = settings["lr"], settings["beta"], settings["lam"]
        if not (lr > 0 and beta >= 0 and lam >= 0):
            raise ValueError(
                f"lr is {lr}, beta {beta}, lam {lam}; lr has to be above 0, the others 0 or more."
            )
        for name, known in CHOICES.items():
            if settings[name] not in known:
                raise ValueError(f"{name} is {settings[name]!r}; use one of {', '.join(known)}.")
        super().add_param_group(param_group)
        if settings["anchor"] == "initial" and lam:
            for parameter in self.param_groups[-1]["params"]:
                self.state[parameter]["anchor"] = parameter.detach().clone()

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Returns ℓ, averaged over everything that the gradient is averaged over
                (micro-batches and ranks), or copies of the model drift apart. The gradients are
                there when it returns.

        Returns:
            ℓ.

        Raises:
            ValueError: There is no closure.
        """
        if closure is None:
            raise ValueError("The loss is a term of this update: call step(closure).")
        with torch.enable_grad():
            found = closure()
        loss = float(found.detach() if isinstance(found, Tensor) else found)
        with torch.no_grad():
            for group in self.param_groups:
                sign = 1.0 if group["direction"] == "ascend" else -1.0
                rate, beta = sign * group["lr"], group["beta"]
                for parameter in group["params"]:
                    if parameter.grad is None:
                        continue
                    u = self._direction(parameter, group)
                    if group["loss_term"] == "step_size":
                        parameter.add_(u, alpha=rate * (abs(loss) + beta))
                    else:
                        parameter.add_(u, alpha=rate * beta)
                        if group["loss_term"] == "broadcast":
                            parameter.add_(rate * loss)
        return loss

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return u: the (preconditioned) gradient with the pull away from the anchor."""
        state = self.state[parameter]
        gradient = parameter.grad
        assert gradient is not None
        if group["precondition"] == "adam":
            if "step" not in state:
                state["step"] = torch.zeros(())
                state["mean"], state["square"] = (torch.zeros_like(parameter) for _ in range(2))
            state["step"] += 1
            state["mean"].lerp_(gradient, 0.1)
            state["square"].lerp_(gradient.square(), 0.001)
            step = float(state["step"])
            mean = state["mean"] / (1 - 0.9**step)
            square = state["square"] / (1 - 0.999**step)
            gradient = mean / (square.sqrt() + 1e-8)
        if not group["lam"]:
            return gradient
        away = parameter - state["anchor"] if group["anchor"] == "initial" else parameter
        moved: Tensor = gradient + group["lam"] * away
        return moved
