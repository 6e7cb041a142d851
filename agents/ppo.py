"""PPO for language models, with credit for every turn; and GRPO, which has no critic.

A rollout is used several times, in minibatches, and a clip keeps the policy near the one that
sampled it:

    L = -(1/D) Σ_i Σ_t min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i),    ρ_it = π / π_old of token t

PPO's advantages A_i are those of whole answers: a critic V on the policy's trunk says what the
conversation before answer i is worth, and GAE runs across the turns of the dialogue. GRPO compares
an answer with the others to the same prompt instead.

Differences from Schulman et al. (2017): time steps of the credit are answers and not tokens, while
the clip works on tokens (or with ``ratio="sequence"`` on whole answers); minibatches hold whole
dialogues where one forward pass serves all turns of one (not a choice's, each a pass of its own,
and not those that outgrew the context). GRPO differs from Shao et al. (2024) in
what later work found better or right: no division by the group's standard deviation unless
``std=True`` and none by the answer's length (Liu et al., 2025, "Dr. GRPO"), and a KL penalty, if
any, that follows the reverse KL of whole answers (their k3 loss follows the forward one of tokens);
exact at the first step of a rollout, later as near as π is to π_old.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from agents import objectives
from agents.policy_agent import Batch, PolicyAgent
from agents.rollout import Rollout
from agents.settings import ClippedConfig, GRPOConfig, PPOConfig

ClippedConfigT = TypeVar("ClippedConfigT", bound=ClippedConfig)


@dataclass(frozen=True, slots=True)
class Credit:
    """What every answer of a rollout is credited with, (D,) each.

    Attributes:
        advantages: A_i.
        values: V(s_i) of the critic when the rollout was played; ``None`` without one.
        returns: What the critic is to predict; ``None`` without one.
    """

    advantages: Tensor
    values: Tensor | None = None
    returns: Tensor | None = None


class ClippedAgent(PolicyAgent[ClippedConfigT], Generic[ClippedConfigT]):
    """The clipped update; where the credit comes from is left open."""

    def credit(self, rollout: Rollout, rewards: Tensor) -> Credit:
        """Return the credit of every answer for its (D,) rewards."""
        raise NotImplementedError

    def loss(self, batch: Batch, credit: Credit, answers: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped loss of a micro-batch out of a minibatch of that many answers."""
        c = self.config
        log_ratios = batch.scores.log_probs - batch.old_log_probs
        of = batch.answer_of_token
        if c.ratio == "sequence":
            log_ratios, of = objectives.answer_log_ratios(log_ratios, of.to(log_ratios.device))
        advantages = credit.advantages.to(log_ratios)[of]
        loss = objectives.ppo_clip_loss(log_ratios, advantages, answers, c.clip)
        clipped = (log_ratios.detach().expm1().abs() > c.clip).to(loss).sum()
        return loss, {"clip_fraction": clipped}

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Take ``epochs`` times ``minibatches`` gradient steps, or fewer if they lead too far."""
        rewards, charged = self.charged_rewards(rollout)
        credit = self.credit(rollout, rewards)
        if self.config.old_log_probs == "recomputed":
            rollout = self.recompute(rollout)
        steps: list[dict[str, float]] = []
        for members in self.minibatches(rollout):
            metrics = self.accumulate_gradients(rollout, credit, members)
            target = self.config.target_kl
            if target is not None and metrics["train/approx_kl"] > target and steps:
                self.optimizer.zero_grad()
                break
            metrics["train/grad_norm"] = self.step_optimizer(metrics["train/loss"])
            steps.append(metrics)
        means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        means |= charged | {"train/updates": float(len(steps))}
        if credit.values is not None and credit.returns is not None:
            explained = objectives.explained_variance(credit.values, credit.returns)
            means["train/explained_variance"] = explained
        self.adapt_kl(means, len(rewards))
        return means

    def accumulate_gradients(
        self, rollout: Rollout, credit: Credit, members: list[int]
    ) -> dict[str, float]:
        """Add the gradient of a minibatch of sequences to the parameters'; return metrics."""
        counted = [rollout.decision_of[i] for i in members]
        answers = int(torch.cat(counted).bincount().count_nonzero())
        tokens = max(1, sum(map(len, counted)))

        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, shares = self.loss(batch, credit, answers)
            with torch.no_grad():
                kls = objectives.kl_k3(batch.old_log_probs, batch.scores.log_probs)
            shares["approx_kl"] = kls.sum() / tokens
            shares["clip_fraction"] = shares["clip_fraction"] / (
                answers if self.config.ratio == "sequence" else tokens
            )
            return loss, shares

        return self.accumulate(rollout, objective, members)

    def minibatches(self, rollout: Rollout) -> Iterator[list[int]]:
        """Deal the sequences out, once an epoch; the order depends on seed and iteration only."""
        count = len(rollout.sequences)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, self.iteration)))
        for _ in range(self.config.epochs):
            order = rng.permutation(count)
            for part in np.array_split(order, min(count, self.config.minibatches)):
                yield sorted(part.tolist())

    def recompute(self, rollout: Rollout) -> Rollout:
        """Return the rollout with the log-probabilities that the update's own forward pass has.

        What another process scores keeps those of its sampler.
        """
        found = dict(enumerate(rollout.old_log_probs))
        for members in self.micro_batches(rollout):
            with torch.no_grad():
                scores = self.policy.score([rollout.sequences[i] for i in members])
            lengths = [len(rollout.decision_of[i]) for i in members]
            found |= zip(members, torch.split(scores.log_probs.cpu(), lengths), strict=True)
        return replace(rollout, old_log_probs=[found[i] for i in range(len(found))])


class PPO(ClippedAgent[PPOConfig]):
    """Proximal policy optimization; see the module for the equations."""

    name = "ppo"
    config_class = PPOConfig

    @property
    def needs_critic(self) -> bool:
        """Whether a value head is trained."""
        return True

    def credit(self, rollout: Rollout, rewards: Tensor) -> Credit:
        """Return GAE across the turns of each dialogue, and the critic's targets A_i + V(s_i)."""
        c = self.config
        values = self.values(rollout)
        table = objectives.gae(
            rollout.by_turn(rewards),
            rollout.by_turn(values),
            self.bootstrap(rollout),
            rollout.lengths,
            c.gamma,
            c.lam,
        )
        advantages = table[rollout.rows, rollout.turns]
        returns = advantages + values
        if c.normalise_advantages and len(advantages) > 1:
            advantages = objectives.normalised_advantage(advantages)
        return Credit(advantages, values, returns)

    @torch.no_grad()
    def values(self, rollout: Rollout) -> Tensor:
        """Return V of the state before every answer, (D,)."""
        critic = self.critic
        assert critic is not None
        values = torch.zeros_like(rollout.rewards)
        for members in self.micro_batches(rollout):
            found = self.policy.values([rollout.sequences[i] for i in members], critic)
            values[torch.cat([rollout.states_of(i) for i in members])] = found.to(values)
        return self.world.total(values)

    def loss(self, batch: Batch, credit: Credit, answers: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped loss with the critic's."""
        loss, shares = super().loss(batch, credit, answers)
        values = batch.scores.values
        assert values is not None
        assert credit.values is not None
        assert credit.returns is not None
        value_loss = objectives.value_loss(
            values,
            credit.returns.to(values)[batch.answer_of_value],
            answers,
            credit.values.to(values)[batch.answer_of_value],
            self.config.value_clip,
        )
        return loss + self.config.value_coef * value_loss, {**shares, "value_loss": value_loss}


class GRPO(ClippedAgent[GRPOConfig]):
    """Group-relative policy optimization; each answer is credited with its own turn's reward."""

    name = "grpo"
    config_class = GRPOConfig

    def credit(self, rollout: Rollout, rewards: Tensor) -> Credit:
        """Return rewards centred on the mean of their group."""
        groups = self.groups(rollout)
        return Credit(objectives.group_advantage(rewards, groups, std=self.config.std))
