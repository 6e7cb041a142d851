"""The document's update against numbers by hand, torch's own optimizers, and a plain loop."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import ImmediateReward
from agents.immediate_reward import LITERAL
from agents.optimizers import CHOICES, ImmediateUpdate
from three_tokens import (
    gradient,
    make_agent,
    parameters,
    relative,
    rollout_of,
    token_log_probs,
)

pytestmark = pytest.mark.usefixtures("three_token_tasks")

NAMES = tuple(CHOICES)
EVERY = list(itertools.product(*CHOICES.values()))
LETTER = {name: choice for name, choice in LITERAL.items() if name in NAMES}


def move(
    start: list[float], gradients: list[list[float]], losses: list[float], **settings: Any
) -> list[list[float]]:
    """Take steps with given gradients and losses; return the weights after each."""
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = ImmediateUpdate([weights], **settings)
    found = []
    for step, loss in zip(gradients, losses, strict=True):
        weights.grad = torch.tensor(step, dtype=torch.float64)
        assert optimizer.step(lambda loss=loss: loss) == loss
        found.append(weights.tolist())
    return found


def test_p10_literal_is_the_printed_formula_by_hand() -> None:
    """Two weights, two steps of θ + α(ℓ + β(g + λθ)) with α = 0.1, β = 0.5, λ = 0.2.

    First with ℓ = 2, g = (0.5, 1): θ = (1, -2) goes to

        1 + 0.1 (2 + 0.5 (0.5 + 0.2 · 1)) = 1.235,  -2 + 0.1 (2 + 0.5 (1 + 0.2 · -2)) = -1.77.

    Then with ℓ = -1, g = (-1, 0): to

        1.235 + 0.1 (-1 + 0.5 (-1 + 0.247)) = 1.09735,  -1.77 + 0.1 (-1 + 0.5 · -0.354) = -1.8877.
    """
    settings = {"lr": 0.1, "beta": 0.5, "lam": 0.2}
    found = move([1.0, -2.0], [[0.5, 1.0], [-1.0, 0.0]], [2.0, -1.0], **settings, **LETTER)
    assert found[0] == pytest.approx([1.235, -1.77], rel=1e-12)
    assert found[1] == pytest.approx([1.09735, -1.8877], rel=1e-12)
    assert dict(zip(NAMES, ("ascend", "broadcast", "zero", "sgd"), strict=True)) == LETTER
    assert LITERAL["max_grad_norm"] == 0.0


def test_p10_the_loss_may_scale_the_step_by_hand() -> None:
    """θ - α(|ℓ| + β)(g + λ(θ - θ_0)) with α = 0.1, β = 0.5, λ = 2, from θ_0 = 1.

    ℓ = -3, g = 1: 1 - 0.1 · 3.5 · 1 = 0.65;  ℓ = 0.5, g = 2: 0.65 - 0.1 · (2 - 0.7) = 0.52.
    """
    settings = {"lr": 0.1, "beta": 0.5, "lam": 2.0, "loss_term": "step_size", "anchor": "initial"}
    found = move([1.0], [[1.0], [2.0]], [-3.0, 0.5], **settings)
    assert found == [[pytest.approx(0.65)], [pytest.approx(0.52)]]


@pytest.mark.parametrize("choices", EVERY, ids="-".join)
def test_p10_every_combination_equals_a_plain_loop(choices: tuple[str, ...]) -> None:
    direction, loss_term, anchor, precondition = choices
    alpha, beta, lam = 0.03, 0.7, 0.4
    generator = np.random.default_rng(1)
    start = generator.normal(size=5)
    gradients, losses = generator.normal(size=(6, 5)), generator.normal(size=6)
    found = move(
        start.tolist(),
        gradients.tolist(),
        losses.tolist(),
        lr=alpha,
        beta=beta,
        lam=lam,
        **dict(zip(NAMES, choices, strict=True)),
    )
    # One number after the other. Adam's moments are written out as sums over all steps so far.
    theta = start.tolist()
    for t, loss in enumerate(losses.tolist(), start=1):
        for i in range(5):
            seen = [float(g[i]) for g in gradients[:t]]
            u = seen[-1]
            if precondition == "adam":
                m = sum(0.1 * 0.9 ** (t - s) * g for s, g in enumerate(seen, 1)) / (1 - 0.9**t)
                v = sum(0.001 * 0.999 ** (t - s) * g * g for s, g in enumerate(seen, 1))
                u = m / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
            u += lam * (theta[i] - (start[i] if anchor == "initial" else 0.0))
            change = {
                "broadcast": loss + beta * u,
                "step_size": (abs(loss) + beta) * u,
                "none": beta * u,
            }[loss_term]
            theta[i] += alpha * change if direction == "ascend" else -alpha * change
        assert found[t - 1] == pytest.approx(theta, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_p10_descend_none_zero_sgd_is_torchs_sgd(lam: float) -> None:
    generator = np.random.default_rng(2)
    start, gradients = generator.normal(size=4).tolist(), generator.normal(size=(5, 4)).tolist()
    found = move(start, gradients, [9.0] * 5, lr=0.1, beta=0.6, lam=lam)
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=0.1 * 0.6, weight_decay=lam)
    for step, after in zip(gradients, found, strict=True):
        weights.grad = torch.tensor(step, dtype=torch.float64)
        optimizer.step()
        assert after == pytest.approx(weights.tolist(), rel=1e-12)


def test_p10_the_adaptive_step_is_torchs_adam() -> None:
    generator = np.random.default_rng(3)
    start, gradients = generator.normal(size=4).tolist(), generator.normal(size=(20, 4)).tolist()
    found = move(start, gradients, [9.0] * 20, lr=0.1, beta=0.6, precondition="adam")
    weights = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1 * 0.6)
    for step, after in zip(gradients, found, strict=True):
        weights.grad = torch.tensor(step, dtype=torch.float64)
        optimizer.step()
        assert after == pytest.approx(weights.tolist(), rel=1e-9)


@pytest.mark.parametrize("choices", EVERY, ids="-".join)
def test_p10_parameters_without_a_gradient_are_left_alone(choices: tuple[str, ...]) -> None:
    still, moved = (torch.ones(3, requires_grad=True) for _ in "sm")
    settings: dict[str, Any] = dict(zip(NAMES, choices, strict=True))
    optimizer = ImmediateUpdate([still, moved], lr=0.1, lam=0.5, **settings)
    moved.grad = torch.ones(3)
    optimizer.step(lambda: 2.0)
    assert torch.equal(still, torch.ones(3))
    assert (moved != 1.0).all()


@pytest.mark.filterwarnings("error")
def test_p10_the_closure_may_make_the_gradients() -> None:
    weights = torch.tensor([2.0], requires_grad=True)
    optimizer = ImmediateUpdate([weights], lr=0.1, lam=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weights**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    assert optimizer.step(closure) == 4.0
    assert weights.item() == pytest.approx(2.0 - 0.1 * 4.0)
    with torch.no_grad():  # a trainer may have switched gradients off
        assert optimizer.step(closure) == pytest.approx(1.6**2)
    assert weights.item() == pytest.approx(1.6 - 0.1 * 3.2)


def test_p10_each_group_of_parameters_has_its_own_settings() -> None:
    first, second, third = (torch.ones(1, requires_grad=True) for _ in range(3))
    groups = [
        {"params": [first]},
        {"params": [second], "lr": 1.0, "direction": "ascend", "anchor": "initial", "lam": 3.0},
    ]
    optimizer = ImmediateUpdate(groups, lr=0.1, lam=0.5)
    optimizer.add_param_group({"params": [third], "anchor": "initial"})
    for weights in (first, second, third):
        weights.grad = torch.ones(1)
    optimizer.step(lambda: 0.0)
    found = [w.item() for w in (first, second, third)]
    assert found == pytest.approx([1 - 0.1 * 1.5, 2.0, 1 - 0.1])
    with pytest.raises(ValueError, match="direction is 'sideways'; use one of ascend, descend"):
        optimizer.add_param_group({"params": [torch.ones(1)], "direction": "sideways"})


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"beta": -1.0}, "beta -1.0"),
        ({"lam": float("nan")}, "lam nan"),
        ({"direction": "up"}, "direction is 'up'; use one of ascend, descend"),
        ({"loss_term": "add"}, "loss_term is 'add'; use one of broadcast, step_size, none"),
        ({"anchor": "one"}, "anchor is 'one'; use one of zero, initial"),
        ({"precondition": "rms"}, "precondition is 'rms'; use one of sgd, adam"),
    ],
)
def test_p10_impossible_settings_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ImmediateUpdate([torch.ones(1, requires_grad=True)], **{"lr": 0.1, **wrong})


def test_p10_a_step_without_the_loss_is_refused() -> None:
    optimizer = ImmediateUpdate([torch.ones(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        optimizer.step()


# --- the agent around it ---------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["zero", "initial"])
@pytest.mark.parametrize("precondition", ["sgd", "adam"])
def test_p10_p24_its_state_is_taken_back(tmp_path: Path, anchor: str, precondition: str) -> None:
    """The anchor is that of the beginning of all, and not what the loaded weights are."""
    agent = make_agent(agent="immediate-reward", lam=0.5, anchor=anchor, precondition=precondition)
    began = copy.deepcopy(list(agent.policy.model.parameters()))
    agent.learn(48)
    agent.save(tmp_path / "checkpoint")
    again: Any = ImmediateReward.load(tmp_path / "checkpoint", device="cpu")
    mine, its = (a.optimizer.state_dict()["state"] for a in (again, agent))
    held = [*["anchor"] * (anchor == "initial")]
    held += [*("step", "mean", "square")] * (precondition == "adam")
    assert len(began) == 21
    for index, first in enumerate(began):
        assert sorted(its.get(index, {})) == sorted(mine.get(index, {})) == sorted(held)
        for name in held:
            assert torch.equal(mine[index][name], its[index][name]), (index, name)
        if anchor == "initial":
            assert torch.equal(mine[index]["anchor"], first)


def test_p10_the_loss_that_moves_the_weights_is_that_of_the_whole_batch() -> None:
    """ℓ and the step that it scales do not depend on how the batch is split."""
    found = []
    for tokens in (10_000, 12, 1):
        agent = make_agent(
            family="gpt2",  # Llama's norms work in float32, whatever the weights are
            agent="immediate-reward",
            **LITERAL,
            lam=0.1,
            baseline="none",
            beta=0.5,
        )
        agent.policy.model.double()
        agent.optimizer = agent.make_optimizer()
        rollout = rollout_of(agent)
        agent.policy.micro_batch_tokens = tokens
        given: list[float] = []
        step = agent.optimizer.step
        agent.optimizer.step = lambda closure, g=given, s=step: g.append(s(closure))
        metrics = agent.update(rollout)
        assert given == [metrics["train/loss"]]
        found.append((given[0], parameters(agent)))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-9)
        assert relative(weights, found[0][1]) < 1e-12


def test_p10_the_agent_takes_the_documents_step() -> None:
    """ℓ = -(1/D) Σ (r - b) log π and its gradient, by hand, through one update of ``literal``."""
    settings = {"learning_rate": 0.01, "beta": 0.5, "lam": 0.2, "baseline": "none", **LITERAL}
    agent = make_agent(family="gpt2", agent="immediate-reward", **settings)
    agent.policy.model.double()
    agent.optimizer = agent.make_optimizer()
    rollout = rollout_of(agent)
    start = parameters(agent)
    own = torch.stack([token_log_probs(agent.policy.model, q).sum() for q in rollout.sequences])
    loss = -(rollout.rewards.double() * own).mean()
    loss.backward()
    g = gradient(agent)
    agent.update(rollout)
    expected = start + 0.01 * (loss.item() + 0.5 * (g + 0.2 * start))
    torch.testing.assert_close(parameters(agent), expected, rtol=1e-9, atol=1e-9)


def test_p10_what_the_update_has_no_place_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma is 0.5.*reinforce or ppo"):
        make_agent(agent="immediate-reward", gamma=0.5)
    with pytest.raises(ValueError, match=r"weight_decay is 0.1; lam"):
        make_agent(agent="immediate-reward", weight_decay=0.1)
