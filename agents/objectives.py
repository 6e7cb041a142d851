"""Estimators and losses, each a pure function with its equation and its source.

Flat tensors of *decisions* run over the answers of a batch (D of them); flat tensors of *tokens*
over everything that was sampled in them (N); ``decision_N`` says to which answer a token belongs.
A choice among candidates is an answer of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reinforce_loss(log_probs: Tensor, advantages: Tensor, decisions: int) -> Tensor:
    """Policy-gradient loss, whose gradient is that of minus the expected reward.

    L = -(1/D) Σ_i A_i log π(a_i | s_i), with log π(a | s) = Σ_t log π(token_t | s, tokens before).
    D is the number of answers in the whole batch, so that the sum over micro-batches is the same
    however they are cut. An empty micro-batch gives 0.

    Args:
        log_probs: (N,) log-probabilities of sampled tokens, with gradient.
        advantages: (N,) the advantage of the answer that each token belongs to, no gradient.
        decisions: D, at least 1.

    Source: Williams (1992), REINFORCE; Sutton et al. (2000).
    """
    return -(log_probs * advantages.detach()).sum() / decisions


def batch_mean_advantage(rewards: Tensor) -> Tensor:
    """Centre rewards on their mean: A_i = r_i - (1/D) Σ_j r_j.

    The mean holds each sample's own reward, so the gradient's expectation is (D-1)/D of the true
    one; :func:`leave_one_out_advantage` is the unbiased form.

    Args:
        rewards: (D,), at least one.
    """
    return rewards - rewards.mean()


def leave_one_out_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """Leave-one-out advantage within each group: A_i = r_i - mean of the others' rewards.

    Equals G/(G-1) · (r_i - group mean) for a group of G. A group whose rewards are all alike has
    exactly zero advantage.

    Args:
        rewards: (D,).
        groups: (D,) integers; answers with the same number share a prompt and a turn.

    Raises:
        ValueError: A group has a single member.

    Source: Kool et al. (2019); Ahmadian et al. (2024), RLOO.
    """
    _, place, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    if int(sizes.min()) < 2:
        raise ValueError(
            "A group has a single answer, so there are no others to compare it with. Sample at "
            "least 2 answers of each prompt (group_size), or use another baseline."
        )
    zeros = rewards.new_zeros(len(sizes))
    low = zeros.scatter_reduce(0, place, rewards, "amin", include_self=False)
    high = zeros.scatter_reduce(0, place, rewards, "amax", include_self=False)
    sums = zeros.index_add(0, place, rewards)
    others = (sums[place] - rewards) / (sizes[place] - 1)
    # Rounding must not teach anything where there is nothing to tell apart.
    return torch.where((low == high)[place], torch.zeros_like(rewards), rewards - others)


def moving_average(previous: float | None, rewards: Tensor, decay: float) -> float:
    """Exponential moving average of the batch means, used as baseline of the *next* batch.

    b_{t+1} = decay · b_t + (1 - decay) · mean(r_t); the first batch starts it.

    Args:
        previous: b_t, or ``None`` before the first batch.
        rewards: (D,) rewards of this batch.
        decay: In [0, 1).
    """
    mean = float(rewards.mean())
    return mean if previous is None else decay * previous + (1 - decay) * mean


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Return-to-go of each turn: R_t = r_t + γ R_{t+1}; γ = 0 leaves the immediate reward.

    Args:
        rewards: (episodes, turns); zero after an episode's last turn.
        gamma: Discount γ in [0, 1].

    Source: Sutton & Barto (2018), eq. 3.8.
    """
    returns = rewards.clone()
    for t in range(rewards.shape[1] - 2, -1, -1):
        returns[:, t] += gamma * returns[:, t + 1]
    return returns
