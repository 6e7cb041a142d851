"""Estimators against closed forms, brute force, and all actions of a softmax over three."""

from __future__ import annotations

import itertools
from collections.abc import Callable

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


def test_p04_an_answer_that_is_left_alone_has_no_baseline() -> None:
    rewards, groups = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([4, 9, 4])
    found = objectives.leave_one_out_advantage(rewards, groups)
    assert found.tolist() == [0.75, 0.5, -0.75]


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -0.7, 1e-8, 1e8])
@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
def test_p04_a_constant_group_has_no_group_advantage_either(
    reward: float, std: bool, group: int
) -> None:
    rewards = torch.full((2 * group,), reward)
    rewards[group:] = torch.linspace(-1, 1, group)
    groups = torch.arange(2).repeat_interleave(group)
    found = objectives.group_advantage(rewards, groups, std=std)
    assert (found[:group] == 0).all()
    assert (found[group:].abs() > 0).any()


@pytest.mark.parametrize("std", [False, True])
def test_p04_what_a_nearly_constant_group_says_is_bounded(std: bool) -> None:
    rewards = torch.full((8,), 0.1)
    rewards[3] = torch.nextafter(rewards[3], torch.tensor(1.0))
    groups = torch.zeros(8, dtype=torch.long)
    # One step of rounding is 7e-9; over its own deviation, without a floor, it would be 2.5.
    assert objectives.group_advantage(rewards, groups, std=std).abs().max() < 1e-3
    for spread in (1e-6, 1e-3, 1.0, 1e3):
        found = objectives.group_advantage(spread * (torch.arange(8) == 3), groups, std=True)
        assert found.abs().max() <= 7 / 8**0.5  # the most that one of eight can deviate


@pytest.mark.parametrize("std", [False, True])
def test_p04_an_answer_that_is_left_alone_has_no_group_advantage(std: bool) -> None:
    rewards, groups = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([4, 9, 4])
    found = objectives.group_advantage(rewards, groups, std=std)
    assert found[1] == 0
    assert found[0] == -found[2] > 0.3


@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 1e8])
@pytest.mark.parametrize("count", [1, 2, 16, 48, 128])
def test_p04_advantages_that_are_all_alike_are_scaled_to_nothing(value: float, count: int) -> None:
    """In float32 the mean of copies of 0.1 is not 0.1: over the deviation, that would be 0.4."""
    assert (objectives.normalised_advantage(torch.full((count,), value)) == 0).all()


def test_advantages_are_scaled_to_mean_0_and_deviation_1() -> None:
    advantages = np.random.default_rng(4).gamma(1.0, size=50)
    found = objectives.normalised_advantage(torch.tensor(advantages, dtype=torch.float32)).numpy()
    expected = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    nearly = torch.full((16,), 0.1)
    nearly[3] = torch.nextafter(nearly[3], torch.tensor(1.0))
    assert objectives.normalised_advantage(nearly).abs().max() < 1e-3


def _grouped(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of groups of 2 to 6 in no order."""
    generator = np.random.default_rng(seed)
    groups = np.repeat([7, 2, 11, 5], [2, 6, 3, 4])
    generator.shuffle(groups)
    return generator.normal(0.3, 2.0, size=len(groups)), groups


@pytest.mark.parametrize("std", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p05_group_advantages_match_a_float64_reference(std: bool, dtype: torch.dtype) -> None:
    rewards, groups = _grouped(5)
    expected = np.empty_like(rewards)
    for g in set(groups):
        mine = rewards[groups == g]
        mean = sum(mine) / len(mine)
        deviation = (sum((r - mean) ** 2 for r in mine) / (len(mine) - 1)) ** 0.5
        expected[groups == g] = (mine - mean) / (deviation + 1e-4 if std else 1.0)
    given = torch.tensor(rewards, dtype=dtype)
    found = objectives.group_advantage(given, torch.tensor(groups), std=std)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_p05_division_by_the_deviation_is_off_by_default() -> None:
    rewards, groups = map(torch.tensor, _grouped(6))
    plain = objectives.group_advantage(rewards, groups)
    assert torch.equal(plain, objectives.group_advantage(rewards, groups, std=False))
    # And then it is the leave-one-out advantage, but for the own share.
    sizes = torch.stack([(groups == g).sum() for g in groups])
    other = objectives.leave_one_out_advantage(rewards, groups)
    torch.testing.assert_close(plain, (sizes - 1) / sizes * other)


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


# --- KL --------------------------------------------------------------------------------------

REFERENCE = torch.tensor([-0.4, 0.9, 0.1], dtype=torch.float64).log_softmax(0)


def gradient_of(function: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradient, at LOGITS, of a function of the log-probabilities of all three actions."""
    logits = LOGITS.clone().requires_grad_()
    function(logits.log_softmax(0)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return logits.grad


def mean_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean gradient of a loss of one sampled action, each action by its probability."""
    chances = LOGITS.softmax(0)
    return sum(  # type: ignore[return-value]
        chances[a] * gradient_of(lambda p, a=a: loss(p[a : a + 1], REFERENCE[a : a + 1]).sum())
        for a in range(3)
    )


REVERSE = gradient_of(lambda p: (p.exp() * (p - REFERENCE)).sum())
FORWARD = gradient_of(lambda p: (REFERENCE.exp() * (REFERENCE - p)).sum())


def test_p06_at_the_optimum_of_a_charged_reward_every_sample_has_no_gradient() -> None:
    beta = 0.7
    optimum = (REFERENCE + REWARDS / beta).log_softmax(0)  # π* ∝ π_ref · exp(r / β)
    for action in range(3):
        logits = optimum.clone().requires_grad_()
        chosen = logits.log_softmax(0)[action : action + 1]
        charge = objectives.kl_k1(chosen.detach(), REFERENCE[action : action + 1])
        charged = REWARDS[action] - beta * charge
        value = beta * (REFERENCE + REWARDS / beta).logsumexp(0)  # β log Z, the same for all
        objectives.reinforce_loss(chosen, charged - value, 1).backward()  # type: ignore[no-untyped-call]
        assert logits.grad is not None
        assert logits.grad.abs().max() < 1e-12


def test_p07_k1_in_the_reward_follows_the_reverse_kl() -> None:
    def loss(log_prob: Tensor, reference: Tensor) -> Tensor:
        reward = -objectives.kl_k1(log_prob.detach(), reference)
        return objectives.reinforce_loss(log_prob, reward, 1)

    torch.testing.assert_close(mean_gradient(loss), REVERSE, rtol=0, atol=1e-12)


def test_p07_k1_as_a_loss_has_no_mean_gradient() -> None:
    assert mean_gradient(objectives.kl_k1).abs().max() < 1e-12


def test_p07_k2_as_a_loss_follows_the_reverse_kl() -> None:
    torch.testing.assert_close(mean_gradient(objectives.kl_k2), REVERSE, rtol=0, atol=1e-12)


def test_p07_k3_as_a_loss_follows_the_forward_kl() -> None:
    torch.testing.assert_close(mean_gradient(objectives.kl_k3), FORWARD, rtol=0, atol=1e-12)
    assert (FORWARD - REVERSE).abs().max() > 0.1, "the two cannot be told apart here"


def test_p07_the_exact_divergence_has_the_reverse_kl_gradient() -> None:
    found = gradient_of(lambda p: objectives.kl_divergence(p, REFERENCE))
    torch.testing.assert_close(found, REVERSE, rtol=0, atol=1e-12)


def test_p07_the_divergence_in_the_loss_follows_that_of_whole_answers() -> None:
    """Two tokens: the second's distribution, and its reference's, hang on the first."""
    generator = torch.Generator().manual_seed(4)
    logits, others = (torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in "ab")
    logits.requires_grad_()  # a distribution for the first token, and one for what follows each
    references = others.log_softmax(-1)
    own = logits.log_softmax(-1)
    whole, reference = ((table[0][:, None] + table[1:]).flatten() for table in (own, references))
    objectives.kl_divergence(whole, reference).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    exact, logits.grad = logits.grad, None
    found, unseen = torch.zeros_like(exact), torch.zeros_like(exact)
    for first, second in itertools.product(range(3), repeat=2):
        own = logits.log_softmax(-1)
        visited = [0, first + 1]
        kls = objectives.kl_divergence(own[visited], references[visited])
        chosen = own[visited, [first, second]]
        chance = chosen.sum().exp().detach()
        # Beside another answer, whose tokens are none of its own.
        loss = objectives.kl_loss(kls.repeat(2), chosen.repeat(2), torch.tensor([3, 3, 5, 5])) / 2
        assert loss.item() == pytest.approx(kls.sum().item(), rel=1e-12)
        found += chance * torch.autograd.grad(loss, logits, retain_graph=True)[0]
        unseen += chance * torch.autograd.grad(kls.sum(), logits)[0]
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    assert (unseen - exact).abs().max() > 1e-2, "prefixes do not matter here"


def test_p07_as_values_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    own = LOGITS.log_softmax(0)
    exact = (own.exp() * (own - REFERENCE)).sum()
    means = [
        float((own.exp() * kl(own, REFERENCE)).sum())
        for kl in (objectives.kl_k1, objectives.kl_k2, objectives.kl_k3)
    ]
    assert means[0] == pytest.approx(float(exact), abs=1e-12)
    assert means[2] == pytest.approx(float(exact), abs=1e-12)
    assert abs(means[1] - float(exact)) > 1e-3
    assert (objectives.kl_k1(own, REFERENCE) < 0).any()
    assert (objectives.kl_k3(own, REFERENCE) > 0).all()
    assert objectives.kl_k3(own, own).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("kl", "samples", "factor"),
    [
        (0.05, 100, 1.0),  # at the target
        (0.0525, 100, 1 + 0.05 * 0.1),
        (0.045, 100, 1 - 0.1 * 0.1),
        (9.0, 100, 1 + 0.2 * 0.1),  # at most a fifth over the horizon
        (-3.0, 100, 1 - 0.2 * 0.1),
        (9.0, 5_000, 1.2),  # and at most a fifth at once, or the weight could change its sign
        (-3.0, 5_000, 0.8),
    ],
)
def test_p07_the_adapted_weight_is_that_of_ziegler(kl: float, samples: int, factor: float) -> None:
    found = objectives.adaptive_kl_coef(0.3, kl, target=0.05, samples=samples, horizon=1_000)
    assert found == pytest.approx(0.3 * factor, rel=1e-12)


def test_entropy_and_divergence_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(8)
    logits, others = (torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in "ab")
    own, other = (torch.distributions.Categorical(logits=x) for x in (logits, others))
    torch.testing.assert_close(objectives.entropy(logits.log_softmax(-1)), own.entropy())
    found = objectives.kl_divergence(logits.log_softmax(-1), others.log_softmax(-1))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(own, other))


def test_what_is_impossible_adds_no_entropy_and_no_gradient_that_is_none() -> None:
    logits = torch.tensor([1.0, -torch.inf, 0.5], dtype=torch.float64, requires_grad=True)
    found = objectives.entropy(logits.log_softmax(0))
    p = torch.tensor([1.0, 0.5], dtype=torch.float64).softmax(0)
    assert found.item() == pytest.approx(-float((p * p.log()).sum()), abs=1e-12)
    found.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[1] == 0


# --- credit across turns ---------------------------------------------------------------------


def _episodes(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, bootstrap values and lengths of ragged episodes; some were truncated."""
    generator = np.random.default_rng(seed)
    lengths = generator.permutation([1, 2, 3, 4, 5, 5, 3, 1])
    shape = len(lengths), max(lengths)
    rewards, values = (torch.tensor(generator.normal(size=shape)) for _ in "rv")
    bootstrap = torch.tensor(generator.normal(size=shape[0]) * generator.integers(0, 2, shape[0]))
    return rewards, values, bootstrap, torch.tensor(lengths)


def brute_force_gae(
    rewards: list[float], values: list[float], end: float, gamma: float, lam: float
) -> list[float]:
    """The mean of all n-step advantages, weighted by λ: Schulman et al. (2016), eq. 16, left."""
    total = len(rewards)
    found = []
    for t in range(total):

        def n_step(n: int, t: int = t) -> float:
            seen = sum(gamma**k * rewards[t + k] for k in range(n))
            return seen + gamma**n * (values[t + n] if t + n < total else end) - values[t]

        most = total - t
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, most)] + [lam ** (most - 1)]
        found.append(sum(w * n_step(n) for n, w in enumerate(weights, start=1)))
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_p08_gae_equals_brute_force(gamma: float, lam: float, seed: int) -> None:
    rewards, values, bootstrap, lengths = _episodes(seed)
    found = objectives.gae(rewards, values, bootstrap, lengths, gamma, lam)
    for i, n in enumerate(lengths.tolist()):
        expected = brute_force_gae(
            rewards[i, :n].tolist(), values[i, :n].tolist(), float(bootstrap[i]), gamma, lam
        )
        assert found[i, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert (found[i, n:] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_p08_without_discount_it_is_the_advantage_of_the_immediate_reward(lam: float) -> None:
    rewards, values, bootstrap, lengths = _episodes(9)
    found = objectives.gae(rewards, values, bootstrap, lengths, 0.0, lam)
    played = torch.arange(rewards.shape[1]) < lengths[:, None]
    assert torch.equal(found[played], (rewards - values)[played])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_p08_with_lambda_1_it_is_the_return_less_the_value(gamma: float) -> None:
    rewards, values, _, lengths = _episodes(10)
    rewards = rewards * (torch.arange(rewards.shape[1]) < lengths[:, None])
    found = objectives.gae(rewards, values, torch.zeros(len(rewards)), lengths, gamma, 1.0)
    expected = objectives.discounted_returns(rewards, gamma) - values
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[i, :n], expected[i, :n])


def test_p08_a_truncated_episode_goes_on_and_one_that_ended_does_not() -> None:
    rewards, values = torch.zeros(2, 2), torch.zeros(2, 2)
    lengths, bootstrap = torch.tensor([2, 2]), torch.tensor([4.0, 0.0])
    found = objectives.gae(rewards, values, bootstrap, lengths, 0.5, 0.5)
    # δ_1 = 0.5 · 4 = 2, δ_0 = 0, A_0 = δ_0 + 0.5 · 0.5 · 2 = 0.5
    assert found.tolist() == [[0.5, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("garbage", [0.0, 7.0, float("nan"), float("inf")])
def test_p08_turns_that_were_not_played_are_transparent(garbage: float) -> None:
    rewards, values, bootstrap, lengths = _episodes(11)
    expected = objectives.gae(rewards, values, bootstrap, lengths, 0.9, 0.8)
    absent = torch.arange(rewards.shape[1]) >= lengths[:, None]
    wider = [
        torch.cat([x.masked_fill(absent, garbage), torch.full((len(x), 2), garbage)], dim=1)
        for x in (rewards, values)
    ]
    found = objectives.gae(*wider, bootstrap, lengths, 0.9, 0.8)
    assert torch.equal(found[:, :5], expected)
    assert (found[:, 5:] == 0).all()


# --- PPO's losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        # inside the clip both terms are the same, and the gradient is A ρ
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (0.9, -2.0, -1.8, -1.8),
        # A > 0: beyond 1 + ε nothing more is gained; below 1 - ε the way back is open
        (1.5, 2.0, 2.4, 0.0),
        (0.5, 2.0, 1.0, 1.0),
        # A < 0: below 1 - ε nothing more is gained; beyond 1 + ε the way back is open
        (0.5, -2.0, -1.6, 0.0),
        (1.5, -2.0, -3.0, -3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_is_that_of_a_worked_table(
    ratio: float, advantage: float, objective: float, slope: float
) -> None:
    log_ratios = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss = objectives.ppo_clip_loss(log_ratios, advantages, decisions=4, clip=0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(-objective / 4)
    assert log_ratios.grad is not None
    assert log_ratios.grad.item() == pytest.approx(-slope / 4)


def test_p02_where_all_ratios_are_1_the_clipped_loss_has_the_gradient_of_reinforce() -> None:
    generator = torch.Generator().manual_seed(12)
    advantages = torch.randn(9, dtype=torch.float64, generator=generator)
    found = []
    for loss in (
        lambda x: objectives.ppo_clip_loss(x - x.detach(), advantages, 3, 0.2),
        lambda x: objectives.reinforce_loss(x, advantages, 3),
    ):
        log_probs = -torch.rand(9, dtype=torch.float64, generator=generator).requires_grad_()
        log_probs.retain_grad()
        loss(log_probs).backward()
        found.append(log_probs.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-15)


def test_the_ratio_of_an_answer_is_the_product_of_its_tokens() -> None:
    log_ratios = torch.tensor([0.1, 0.2, -0.4, 1.0, 0.3], dtype=torch.float64, requires_grad=True)
    found, numbers = objectives.answer_log_ratios(log_ratios, torch.tensor([8, 2, 8, 5, 2]))
    assert numbers.tolist() == [2, 5, 8]
    assert found.tolist() == pytest.approx([0.5, 1.0, -0.3])
    (found * torch.tensor([1.0, 10.0, 100.0])).sum().backward()  # type: ignore[no-untyped-call]
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == [100.0, 1.0, 100.0, 10.0, 1.0]


@pytest.mark.parametrize(
    ("value", "old", "clip", "loss", "slope"),
    [
        (3.0, 1.0, 0.0, 2.0, 2.0),  # (3 - 1)² / 2
        (1.2, 1.1, 0.5, 0.02, 0.2),  # it has not moved far: as without a clip
        (3.0, 4.0, 0.5, 3.125, 0.0),  # towards the target too far: V_old - ε = 3.5, (2.5)² / 2
        (3.0, 1.0, 0.5, 2.0, 2.0),  # away from the target: (3 - 1)² > (1.5 - 1)²
    ],
)
def test_the_value_loss_is_that_of_a_worked_table(
    value: float, old: float, clip: float, loss: float, slope: float
) -> None:
    values = torch.tensor([value, 0.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    before = torch.tensor([old, 0.0], dtype=torch.float64)
    found = objectives.value_loss(values, returns, 2, before, clip)
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(loss / 2)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([slope / 2, 0.0])
    assert returns.grad is None


def test_p15_losses_of_nothing_are_zero_and_have_a_gradient() -> None:
    for loss in (
        lambda x: objectives.ppo_clip_loss(x, torch.zeros(0), 4, 0.2),
        lambda x: objectives.value_loss(x, torch.zeros(0), 4),
        lambda x: objectives.answer_log_ratios(x, torch.zeros(0, dtype=torch.long))[0].sum(),
    ):
        nothing = torch.zeros(0, requires_grad=True)
        found = loss(nothing)
        found.backward()
        assert found.item() == 0.0
        assert nothing.grad is not None


def test_the_explained_variance_is_that_of_the_returns() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert objectives.explained_variance(returns + 3, returns) == 1.0
    assert objectives.explained_variance(torch.zeros(4), returns) == 0.0
    assert objectives.explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert objectives.explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert objectives.explained_variance(returns, torch.ones(4)) == 0.0
