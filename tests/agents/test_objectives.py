"""Estimators against closed forms, brute force, and all actions of a softmax over three."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import objectives

LOGITS = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)
REWARDS = torch.tensor([1.0, -1.0, 0.25], dtype=torch.float64)


def exact_gradient() -> Tensor:
    """∇ Σ_a π(a) r(a) of the softmax policy, by autograd."""
    logits = LOGITS.clone().requires_grad_()
    (logits.softmax(0) * REWARDS).sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


def expected_gradient(group: int, advantage: object) -> Tensor:
    """Expectation of the estimator over all 3^G groups of actions, each by its probability."""
    total = torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=group):
        logits = LOGITS.clone().requires_grad_()
        chosen = logits.log_softmax(0)[list(actions)]
        advantages = advantage(REWARDS[list(actions)])  # type: ignore[operator]
        loss = objectives.reinforce_loss(chosen, advantages, decisions=group)
        loss.backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        total -= chosen.sum().exp().detach() * logits.grad
    return total


def leave_one_out(rewards: Tensor) -> Tensor:
    return objectives.leave_one_out_advantage(rewards, torch.zeros(len(rewards), dtype=torch.long))


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_p01_the_expected_estimate_is_the_gradient_of_the_expected_reward(baseline: float) -> None:
    found = expected_gradient(1, lambda rewards: rewards - baseline)
    torch.testing.assert_close(found, exact_gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_p03_leave_one_out_is_unbiased(group: int) -> None:
    found = expected_gradient(group, leave_one_out)
    torch.testing.assert_close(found, exact_gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [2, 3, 5])
def test_p03_the_shared_mean_is_biased_by_its_own_share(group: int) -> None:
    found = expected_gradient(group, objectives.batch_mean_advantage)
    expected = (group - 1) / group * exact_gradient()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("group", [2, 3, 8])
def test_p03_leave_one_out_equals_its_closed_form(group: int) -> None:
    rewards = torch.randn(
        group, dtype=torch.float64, generator=torch.Generator().manual_seed(group)
    )
    expected = group / (group - 1) * (rewards - rewards.mean())
    torch.testing.assert_close(leave_one_out(rewards), expected)


def test_p03_groups_are_told_apart_whatever_their_order_and_size() -> None:
    generator = np.random.default_rng(3)
    groups = np.repeat([7, 2, 11], [2, 5, 3])
    generator.shuffle(groups)
    rewards = generator.normal(size=len(groups))
    others = [
        rewards[(groups == g) & (np.arange(len(groups)) != i)].mean() for i, g in enumerate(groups)
    ]
    found = objectives.leave_one_out_advantage(torch.tensor(rewards), torch.tensor(groups))
    np.testing.assert_allclose(found.numpy(), rewards - np.array(others))


# 0.1 in float32 sums to what is not a multiple of it: rounding alone would leave an advantage.
@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e-8, 1e8])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_p04_a_constant_group_has_no_advantage_at_all(reward: float, group: int) -> None:
    rewards = torch.full((2 * group,), reward)
    rewards[group:] = torch.linspace(-1, 1, group)  # the other group has one
    groups = torch.arange(2).repeat_interleave(group)
    found = objectives.leave_one_out_advantage(rewards, groups)
    assert (found[:group] == 0).all()
    assert (found[group:].abs() > 0).any()


def test_p04_a_nearly_constant_group_stays_bounded_by_its_spread() -> None:
    rewards = torch.full((8,), 0.1)
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(1.0))
    assert leave_one_out(rewards).abs().max() < 1e-6


def test_p04_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"single answer.*at least 2"):
        objectives.leave_one_out_advantage(torch.ones(3), torch.tensor([0, 0, 1]))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_discounted_returns_equal_the_double_sum(gamma: float) -> None:
    rewards = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = rewards.clone()
    expected = torch.zeros_like(rewards)
    for i, t in itertools.product(range(5), range(4)):
        expected[i, t] = sum(gamma ** (k - t) * rewards[i, k] for k in range(t, 4))
    torch.testing.assert_close(objectives.discounted_returns(rewards, gamma), expected)
    assert torch.equal(rewards, kept), "the rewards themselves were changed"


def test_the_moving_average_is_the_textbook_one() -> None:
    average: float | None = None
    batches = [torch.tensor([1.0, 3.0]), torch.tensor([0.0]), torch.tensor([4.0, 4.0, 1.0])]
    found = []
    for batch in batches:
        average = objectives.moving_average(average, batch, 0.75)
        found.append(average)
    # 2; 0.75 · 2 + 0.25 · 0 = 1.5; 0.75 · 1.5 + 0.25 · 3 = 1.875
    assert found == pytest.approx([2.0, 1.5, 1.875])


def test_p15_an_empty_micro_batch_has_a_loss_of_zero() -> None:
    log_probs = torch.zeros(0, requires_grad=True)
    loss = objectives.reinforce_loss(log_probs, torch.zeros(0), decisions=4)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0


def test_advantages_get_no_gradient() -> None:
    advantages = torch.ones(2, requires_grad=True)
    log_probs = torch.zeros(2, requires_grad=True)
    objectives.reinforce_loss(log_probs, advantages, decisions=2).backward()  # type: ignore[no-untyped-call]
    assert advantages.grad is None
    assert log_probs.grad is not None
