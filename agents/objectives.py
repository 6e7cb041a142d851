"""Estimators and losses, each a pure function with its equation and its source.

Flat tensors of *decisions* run over the answers of a batch (D of them); flat tensors of *tokens*
over everything that was sampled in them (N); ``decision_N`` says to which answer a token belongs.
A choice among candidates is an answer of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor

# --- distributions -------------------------------------------------------------------------------


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of distributions, H = -Σ_v p_v log p_v; a probability of 0 adds nothing.

    Args:
        log_probs: (…, vocabulary), normalised; -inf is allowed.
    """
    return -(log_probs.exp() * _finite(log_probs)).sum(-1)


def kl_divergence(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Exact KL divergence in nats from a reference, KL(p ‖ q) = Σ_v p_v (log p_v - log q_v).

    Args:
        log_probs: (…, vocabulary), normalised; -inf is allowed.
        reference: The same of the reference, which is -inf only where ``log_probs`` is.
    """
    return (log_probs.exp() * (_finite(log_probs) - _finite(reference))).sum(-1)


def _finite(log_probs: Tensor) -> Tensor:
    # 0 · -inf is no number, neither forward nor backward; 0 · 0 is what is meant.
    return log_probs.masked_fill(log_probs == -torch.inf, 0.0)


def kl_loss(kls: Tensor, log_probs: Tensor, answer_of_token: Tensor) -> Tensor:
    """Sum over answers of KL(p ‖ q), as a loss whose mean gradient is that of the whole answers'.

    By the chain rule KL(p ‖ q) = E Σ_t KL_t, with KL_t the exact divergence of token t after what
    was sampled before it. A token also decides which prefixes come after it, and autograd does not
    see that: the divergence of all later tokens of the answer is a cost of having sampled it,

        ∇ Σ KL(p ‖ q) = E Σ_t [ ∇KL_t + (Σ_{t'>t} KL_{t'}) ∇log p(token_t) ].

    Exact where the tokens were sampled from p itself.

    Args:
        kls: (N,) KL_t, with gradient.
        log_probs: (N,) of the sampled tokens, with gradient.
        answer_of_token: (N,) the answer of each; the tokens of an answer stand together, in order.

    Returns:
        The sum of ``kls``; only the gradient is another one.
    """
    if not len(kls):
        return kls.sum()
    so_far = kls.detach().double().cumsum(0)
    last = torch.ones_like(answer_of_token, dtype=torch.bool)
    last[:-1] = answer_of_token[1:] != answer_of_token[:-1]
    ends = last.nonzero()[:, 0].to(kls.device)
    lengths = torch.diff(ends, prepend=ends.new_tensor([-1]))
    to_come = (so_far[ends].repeat_interleave(lengths) - so_far).to(log_probs)
    return kls.sum() + ((log_probs - log_probs.detach()) * to_come).sum()


# --- KL from samples -----------------------------------------------------------------------------
# All three estimate KL(p ‖ q) from x ~ p. As *values* k1 and k3 are unbiased, and k3 is never
# negative. Their *gradients* are another matter, and decide where each may be used.


def kl_k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """k1 = log p(x) - log q(x): unbiased; **for the reward**, never as a loss.

    A reward of -β k1 gives the policy gradient of -β KL(p ‖ q). As a loss its gradient is ∇log p,
    whose mean is zero whatever q is: it adds noise and nothing else.

    Args:
        log_probs: (N,) of what was sampled.
        reference: (N,) of the same under the reference.

    Source: Schulman (2020), "Approximating KL Divergence".
    """
    return log_probs - reference


def kl_k2(log_probs: Tensor, reference: Tensor) -> Tensor:
    """k2 = (log p(x) - log q(x))² / 2: biased as a value; **as a loss** right where x ~ p.

    Its gradient (log p - log q) ∇log p has the mean ∇KL(p ‖ q).

    Args:
        log_probs: (N,) of what was sampled.
        reference: (N,) of the same under the reference.

    Source: Schulman (2020), "Approximating KL Divergence".
    """
    return (log_probs - reference).square() / 2


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """k3 = q(x)/p(x) - 1 - log(q(x)/p(x)): unbiased, never negative; **for measuring**.

    As a loss its gradient (1 - q/p) ∇log p has the mean ∇KL(q ‖ p), that of the *forward* KL.

    Args:
        log_probs: (N,) of what was sampled.
        reference: (N,) of the same under the reference.

    Source: Schulman (2020), "Approximating KL Divergence"; a loss in Shao et al. (2024), GRPO.
    """
    log_ratio = reference - log_probs
    return log_ratio.expm1() - log_ratio


def adaptive_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Move the weight of a KL penalty so that the divergence comes to its target.

    β ← β · (1 + clip(KL / target - 1, -0.2, 0.2) · min(samples / horizon, 1))

    Args:
        coef: β.
        kl: The divergence that was measured, in nats.
        target: The divergence that is wanted, in nats, above 0.
        samples: Answers that it was measured on.
        horizon: Answers over which β may change by a fifth; in one go it never changes by more,
            or a large batch could turn the penalty into a reward.

    Source: Ziegler et al. (2019), "Fine-Tuning Language Models from Human Preferences", 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(samples / horizon, 1))


# --- losses --------------------------------------------------------------------------------------


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


def ppo_clip_loss(log_ratios: Tensor, advantages: Tensor, decisions: int, clip: float) -> Tensor:
    """PPO's clipped surrogate loss.

    L = -(1/D) Σ_n min(ρ_n A_n, clip(ρ_n, 1-ε, 1+ε) A_n), with ρ = π/π_old; n runs over tokens, or
    over answers where the ratio is that of whole answers (:func:`answer_log_ratios`). Where all
    ρ are 1 its gradient is that of :func:`reinforce_loss`.

    Args:
        log_ratios: (N,) log π - log π_old, with gradient.
        advantages: (N,) the advantage of the answer that each belongs to, no gradient.
        decisions: D, the number of answers in the whole batch, at least 1.
        clip: ε.

    Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms", eq. 7.
    """
    ratios, advantages = log_ratios.exp(), advantages.detach()
    clipped = ratios.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratios * advantages, clipped * advantages).sum() / decisions


def answer_log_ratios(log_ratios: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the tokens' log-ratios of each answer: log ρ_i = Σ_t (log π_t - log π_old,t).

    This is the exact importance weight of the answer as one action.

    Args:
        log_ratios: (N,).
        answers: (N,) integers; tokens with the same number are one answer.

    Returns:
        (answers,) log-ratios, and the (answers,) number that each stands for, ascending.
    """
    numbers, place = torch.unique(answers, return_inverse=True)
    return log_ratios.new_zeros(len(numbers)).index_add(0, place, log_ratios), numbers


def value_loss(
    values: Tensor,
    returns: Tensor,
    decisions: int,
    old_values: Tensor | None = None,
    clip: float = 0.0,
) -> Tensor:
    """Squared error of a critic: L = (1/D) Σ_i ½ (V(s_i) - R_i)².

    With a clip the larger one of this and of (V_old + clip(V - V_old, -ε, ε) - R)²/2 counts.

    Args:
        values: (n,) V(s_i) of this micro-batch, with gradient.
        returns: (n,) what they are to predict, no gradient.
        decisions: D, the number of answers in the whole batch.
        old_values: (n,) V(s_i) when the batch was sampled; needed for clipping only.
        clip: ε; 0 for none.

    Source: Schulman et al. (2017), eq. 9; the clip is that of OpenAI's baselines.
    """
    error = (values - returns.detach()).square()
    if clip and old_values is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns.detach()).square())
    return error.sum() / 2 / decisions


# --- advantages ----------------------------------------------------------------------------------


def batch_mean_advantage(rewards: Tensor) -> Tensor:
    """Centre rewards on their mean: A_i = r_i - (1/D) Σ_j r_j.

    The mean holds each sample's own reward, so the gradient's expectation is (D-1)/D of the true
    one; :func:`leave_one_out_advantage` is the unbiased form. Rewards that are all alike have
    exactly zero advantage.

    Args:
        rewards: (D,), at least one.
    """
    return torch.where(rewards.min() == rewards.max(), 0.0, rewards - rewards.mean())


def normalised_advantage(advantages: Tensor) -> Tensor:
    """Scale the advantages of a batch to mean 0 and standard deviation 1.

    Â_i = (A_i - mean) / (std + 1e-4), std that of the sample (D-1). Advantages that are all alike
    become exactly zero: what rounding leaves of them must not be blown up.

    Args:
        advantages: (D,), at least one.

    Source: Huang et al. (2022), "The 37 Implementation Details of PPO", detail 7.
    """
    if advantages.min() == advantages.max():
        return torch.zeros_like(advantages)
    centred = advantages - advantages.mean()
    return centred / (advantages.std() + 1e-4)


def leave_one_out_advantage(rewards: Tensor, groups: Tensor) -> Tensor:
    """Leave-one-out advantage within each group: A_i = r_i - mean of the others' rewards.

    Equals G/(G-1) · (r_i - group mean) for a group of G. A group whose rewards are all alike has
    exactly zero advantage; an answer that has no others, because their episodes are over, has the
    baseline 0.

    Args:
        rewards: (D,).
        groups: (D,) integers; answers with the same number share a prompt and a turn.

    Source: Kool et al. (2019); Ahmadian et al. (2024), RLOO.
    """
    place, sizes, constant = _groups(rewards, groups)
    sums = rewards.new_zeros(len(sizes)).index_add(0, place, rewards)
    others = (sums[place] - rewards) / (sizes[place] - 1).clamp_min(1)
    return torch.where((constant & (sizes > 1))[place], 0.0, rewards - others)


def group_advantage(rewards: Tensor, groups: Tensor, *, std: bool = False) -> Tensor:
    """Centre rewards on the mean of their group: A_i = r_i - mean, over the std if that is wanted.

    The mean holds the reward itself: (G-1)/G times :func:`leave_one_out_advantage`. Division by
    the standard deviation (of the sample, G-1) gives questions that are nearly always or nearly
    never answered a large weight, a bias that Liu et al. (2025, "Dr. GRPO") found harmful: it is
    off unless asked for. A group whose rewards are all alike has exactly zero advantage, and so has
    an answer that has no others, because their episodes are over.

    Args:
        rewards: (D,).
        groups: (D,) integers; answers with the same number share a prompt and a turn.
        std: Divide by the group's standard deviation, plus 1e-4.

    Source: Shao et al. (2024), "DeepSeekMath", 4.1 (GRPO, which divides).
    """
    place, sizes, constant = _groups(rewards, groups)
    zeros = rewards.new_zeros(len(sizes))
    centred = rewards - (zeros.index_add(0, place, rewards) / sizes)[place]
    if std:
        variance = zeros.index_add(0, place, centred.square()) / (sizes - 1).clamp_min(1)
        # The small number bounds what a nearly constant group can say.
        centred = centred / (variance.sqrt() + 1e-4)[place]
    return torch.where(constant[place], 0.0, centred)


def _groups(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each answer's group, the groups' sizes, and which of them have one reward only.

    Rounding must not teach anything where there is nothing to tell apart.
    """
    _, place, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(sizes))
    low = zeros.scatter_reduce(0, place, rewards, "amin", include_self=False)
    high = zeros.scatter_reduce(0, place, rewards, "amax", include_self=False)
    return place, sizes, low == high


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that a critic foresees: 1 - Var(R - V) / Var(R), at most 1.

    0 is what a constant explains, and what returns that are all alike leave to explain.

    Args:
        values: (D,) V.
        returns: (D,) R.
    """
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance else 0.0


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


def gae(
    rewards: Tensor, values: Tensor, bootstrap: Tensor, lengths: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimation across the turns of each episode.

    δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1}; V after an episode's last turn is its
    bootstrap value. γ = 0 leaves r_t - V_t, the advantage of an immediate reward.

    Args:
        rewards: (episodes, turns) r_t; what stands after an episode's last turn is ignored.
        values: (episodes, turns) V(s_t), likewise.
        bootstrap: (episodes,) V of the state that a *truncated* episode was left in; 0 where the
            episode came to its end.
        lengths: (episodes,) turns that each episode had.
        gamma: Discount γ in [0, 1].
        lam: λ in [0, 1]; 1 gives returns less values, 0 the one-turn error δ.

    Returns:
        (episodes, turns) advantages, 0 after an episode's last turn.

    Source: Schulman et al. (2016), "High-Dimensional Continuous Control Using GAE", eq. 16.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(bootstrap)
    for t in range(rewards.shape[1] - 1, -1, -1):
        last, played = lengths == t + 1, lengths > t
        after = values[:, t + 1] if t + 1 < values.shape[1] else bootstrap
        after = torch.where(last, bootstrap, after)
        delta = rewards[:, t] + gamma * after - values[:, t]
        following = torch.where(last, delta, delta + gamma * lam * following)
        following = torch.where(played, following, 0.0)
        advantages[:, t] = following
    return advantages
