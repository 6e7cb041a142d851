"""What agents share that train a language-model policy: rollouts, KL penalty, optimizer, state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents import distributed, objectives
from agents.base import Agent
from agents.checkpoints import moments, refuse_another_model, restore_moments
from agents.policies.candidate import NO_ADAPTER_BENEATH_A_HEAD, CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.int8 import is_int8
from agents.policies.lora import (
    Lora,
    adapter_rank,
    add_adapter,
    has_adapter,
    hold_frozen_in_bfloat16,
)
from agents.policies.models import (
    Critic,
    Passes,
    Scores,
    bfloat16_wanted,
    frozen_copy,
    model_identity,
)
from agents.rollout import Player, Rollout, collect, earned, episode_seeds, merge
from agents.sampling import SamplingConfig, compiled_step
from agents.settings import PolicyConfig

Policy = CausalLMPolicy | CandidatePolicy
POLICIES: dict[str, type[Policy]] = {p.family: p for p in (CausalLMPolicy, CandidatePolicy)}


PolicyConfigT = TypeVar("PolicyConfigT", bound=PolicyConfig)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: what the policy says now of what it did in a rollout.

    Attributes:
        scores: Of its N tokens and n answers.
        answer_of_token: (N,) the answer that each token belongs to.
        answer_of_value: (n,) the answer that each value precedes.
        old_log_probs: (N,) of the tokens when they were sampled.
    """

    scores: Scores
    answer_of_token: Tensor
    answer_of_value: Tensor
    old_log_probs: Tensor


Objective = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
"""From a micro-batch to its share of the loss, and its shares of further metrics."""


class PolicyAgent(Agent[PolicyConfigT]):
    """Trains a language-model policy on an environment.

    Args:
        policy: ``"tiny"``, a hub id or a folder; or a policy made before, which from now on samples
            as the agent's configuration and seed say. If it wears an adapter, that one is trained,
            and the reference of a KL penalty is the model beneath.
        *args: See :class:`Agent`.
        **kwargs: See :class:`Agent`.

    Raises:
        ValueError: The policy cannot play the environment, or a setting is impossible.
        TypeError: A setting is unknown.
    """

    config_class: ClassVar[type[PolicyConfig]]

    def __init__(self, policy: str | Path | Policy, *args: Any, **kwargs: Any) -> None:
        name = policy if isinstance(policy, Policy) else str(policy)
        super().__init__(name, *args, **kwargs)
        self.policy: Policy = self._load_policy(name) if isinstance(name, str) else name
        if self.policy.family != self.family:
            raise ValueError(
                f"{self.env_id} is a {self.family} task and {type(self.policy).__name__} is a "
                f"policy for {self.policy.family}. Use {POLICIES[self.family].__name__}."
            )
        if is_int8(self.policy.model):
            raise ValueError(
                "The weights of this model are held in 8 bits, for use; they cannot be trained. "
                "Train the model that it was made from."
            )
        self._wear_adapter()
        self._rule(self.policy)
        self.reference: Any = frozen_copy(self.policy) if self.config.kl_coef else None
        self.kl_coef = self.config.kl_coef
        self.critic: Critic | None = None
        if self.needs_critic:
            width = self.policy.model.config.get_text_config().hidden_size
            self.critic = Critic(width).to(self.policy.device)
        self.shards: distributed.Shards | None = None
        if self.world.size > 1 and self.world.strategy == "fsdp":
            self.shards = distributed.Shards(self.policy, self.critic, self.world)
        self.optimizer = self.make_optimizer()

    def _load_policy(self, name: str) -> Policy:
        given: dict[str, Any] = {"device": self.device, "lora": self.lora}
        if self.family == "choosing":
            head = None if self.config.head == "auto" else self.config.head
            return CandidatePolicy.from_pretrained(name, relative=head is None, head=head, **given)
        if self.config.chat != "auto":
            given["chat"] = self.config.chat == "on"
        if self.config.system is not None:
            given["system"] = self.config.system
        return CausalLMPolicy.from_pretrained(name, **given)

    def _wear_adapter(self) -> None:
        """Put the wanted adapter on the model, if it does not wear it already."""
        model, rank = self.policy.model, self.config.lora_rank
        if has_adapter(model):
            if adapter_rank(model) != rank:
                raise ValueError(
                    f"lora_rank is {rank}, and the policy wears an adapter of rank "
                    f"{adapter_rank(model)}. Give lora_rank={adapter_rank(model)} to train that "
                    "one, or a policy that from_pretrained(folder) merged it into."
                )
        elif self.lora is not None:
            if getattr(self.policy, "scalar", False):
                raise ValueError(NO_ADAPTER_BENEATH_A_HEAD)
            add_adapter(model, self.lora)

    def _rule(self, policy: Policy) -> None:
        """Have the policy play as this agent's configuration and seed say."""
        policy.generator.manual_seed(self.world.seed(self.seed))
        policy.micro_batch_tokens = self.config.micro_batch_tokens
        half = bfloat16_wanted(self.config.autocast, policy.device)
        c = self.config
        policy.passes = Passes(half, c.gradient_checkpointing, c.compile)
        if c.compile and isinstance(policy, CausalLMPolicy):
            compiled_step(policy.device.type)  # warns where nothing can be compiled
            if not policy.can_compile:
                raise ValueError(
                    f"compile is True, and {type(policy.model).__name__} does not see all of a "
                    "conversation at once, or takes no mask for every pair of tokens. Leave it out."
                )
        if half and has_adapter(policy.model):
            hold_frozen_in_bfloat16(policy.model)
        if isinstance(policy, CandidatePolicy):
            policy.temperature = self.config.temperature
        else:
            policy.room(self.sampling)  # refuses an answer that the context has no room for
            policy.sampling = self.sampling

    @property
    def rows(self) -> int:
        """Episodes that this process plays side by side: its share of the prompts."""
        prompts, processes = self.config.prompts, self.world.size
        if prompts % processes:
            raise ValueError(
                f"prompts is {prompts}, and {processes} processes are to play as many each. Give "
                f"a multiple of {processes}."
            )
        return self.config.rows // processes

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn in training."""
        c = self.config
        return SamplingConfig(c.max_new_tokens, c.temperature, c.top_k, c.top_p)

    @property
    def lora(self) -> Lora | None:
        """The adapter that is trained; ``None`` if all weights are."""
        rank, alpha = self.config.lora_rank, self.config.lora_alpha
        return Lora(rank, 2.0 * rank if alpha is None else alpha, self.seed) if rank else None

    @property
    def needs_critic(self) -> bool:
        """Whether a value head is trained."""
        return False

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained; of shards, this process's own."""
        if self.shards is not None:
            return self.shards.parameters
        critic = [] if self.critic is None else list(self.critic.parameters())
        return [p for p in self.policy.model.parameters() if p.requires_grad] + critic

    @property
    def parameters_bytes(self) -> int:
        """Size of what is saved of the model, for the room that checkpoints need."""
        saved = self.parameters if self.lora is not None else self.policy.model.parameters()
        return sum(p.numel() * p.element_size() for p in saved)

    # --- learning --------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy by one rollout; return ``train/…`` metrics."""
        raise NotImplementedError

    def learn_from(self, batch: Rollout) -> dict[str, float]:
        """Update the policy by a rollout whose rewards are finite."""
        self.check_rewards(batch.rewards.tolist())
        return self.update(batch)

    def iterate(self) -> dict[str, float]:
        """Play a batch of episodes and update the policy by it."""
        began = time.perf_counter()
        read_before = self.policy.read_tokens
        rollout = self.batch = self.collect()
        trained = self.learn_from(rollout)
        self.iteration += 1
        self.env_steps += len(rollout.rewards)
        seconds = time.perf_counter() - began
        tokens = self.world.total(self.policy.read_tokens - read_before)
        tokens += sum(map(len, rollout.sequences))
        return {
            **earned(rollout.rewards, rollout.scores, rollout.best_scores),
            "rollout/answer_tokens": rollout.tokens / len(rollout.rewards),
            "rollout/cut": rollout.cut_share,
            **trained,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "perf/tokens_per_second": tokens / seconds,
            "perf/env_steps_per_second": len(rollout.rewards) / seconds,
        }

    def collect(self) -> Rollout:
        """Play the episodes of this iteration."""
        return self.play(self.policy.begin())

    def play(self, player: Any, *, look: bool = False) -> Rollout:
        """Have a player play this iteration; return what was played in all processes.

        Args:
            player: What ``policy.begin()`` returned.
            look: See :func:`agents.rollout.collect`.
        """
        c = self.config
        seeds = episode_seeds(self.seed, self.iteration, c.prompts, c.group_size)
        own = collect(
            player,
            self.envs,
            seeds=self.world.share(seeds),
            options=self.reset_options,
            look=look,
        )
        return merge(self.world.gather(own))

    def micro_batches(
        self, rollout: Rollout, sequences: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Cut up the sequences that are this process's to score: those that it has played.

        Args:
            rollout: What was played.
            sequences: Indices of the sequences to use; all of them if left out.

        Returns:
            Indices of sequences, a micro-batch each.
        """
        chosen = range(len(rollout.sequences)) if sequences is None else sequences
        own = [i for i in chosen if self.world.owns(rollout.sequences[i].row, rollout.episodes)]
        cut = self.policy.micro_batches([rollout.sequences[i] for i in own])
        return [[own[place] for place in places] for places in cut]

    def groups(self, rollout: Rollout) -> Tensor:
        """Number the groups, (answers,): answers to one episode at one turn share a number.

        From the second turn on they may follow different answers, so the others' mean is then a
        baseline of the episode's turn and not of the conversation: no less unbiased.
        """
        return rollout.rows // self.config.group_size + len(rollout.rewards) * rollout.turns

    def accumulate(
        self,
        rollout: Rollout,
        objective: Objective,
        sequences: Sequence[int] | None = None,
        *,
        sampled: bool = True,
    ) -> dict[str, float]:
        """Add the gradient of a loss to the parameters', one micro-batch after the other.

        The entropy bonus and a KL penalty in the loss are added to the objective.

        Args:
            rollout: What was played.
            objective: The agent's own loss. Its shares have to add up to the whole, so it divides
                by the number of answers in all ``sequences`` and not by its own.
            sequences: Indices of the sequences to use; all of them if left out.
            sampled: The policy sampled the answers. If it was told them, what the penalty says of
                its tokens is no reason to say others (:func:`objectives.kl_loss`), and there is no
                ``train/sampler_gap``.

        Returns:
            ``train/loss``, ``train/entropy``, ``train/kl`` and the objective's own, of all
            processes. In bfloat16 also ``train/sampler_gap``, the mean distance between a token's
            log-probability now and in the rollout: rounding alone, until the policy has taken a
            step. The gradient is this process's own until ``step_optimizer``.
        """
        c = self.config
        chosen = list(range(len(rollout.sequences))) if sequences is None else list(sequences)
        tokens = max(1, sum(len(rollout.decision_of[i]) for i in chosen))
        reference = self.reference if c.kl_in == "loss" else None
        totals: dict[str, float] = dict.fromkeys(("loss", "entropy"), 0.0)
        batches = self.micro_batches(rollout, chosen)
        if self.world.size > 1:  # shards are fetched together, and everybody needs a gradient
            most = max(self.world.gather(len(batches)))
            batches += [[] for _ in range(most - len(batches))]
        for members in batches:
            mine = [rollout.sequences[i] for i in members]
            if self.shards is None:
                scores = self.policy.score(mine, reference, self.critic)
            else:
                scores = self.shards.score(mine, reference)
            batch = Batch(
                scores,
                _joined([rollout.decision_of[i] for i in members]),
                _joined([rollout.states_of(i) for i in members]),
                _joined([rollout.old_log_probs[i] for i in members]).to(scores.log_probs),
            )
            loss, shares = objective(batch)
            entropy = scores.entropies.sum() / tokens
            loss = loss - c.entropy_coef * entropy
            if scores.kls is not None:
                kl = scores.kls.sum()
                if sampled:
                    kl = objectives.kl_loss(scores.kls, scores.log_probs, batch.answer_of_token)
                loss = loss + self.kl_coef * kl / tokens
                shares = {**shares, "kl": kl / tokens}
            if sampled and self.policy.passes.bfloat16:
                gap = (scores.log_probs.detach() - batch.old_log_probs).abs().sum() / tokens
                shares = {**shares, "sampler_gap": gap}
            if self.shards is None:
                loss.backward()  # type: ignore[no-untyped-call]
            else:
                self.shards.backward(loss)
            for name, share in {"loss": loss, "entropy": entropy, **shares}.items():
                totals[name] = totals.get(name, 0.0) + share.item()
        everyones = self.world.gather(totals)
        names = dict.fromkeys(name for each in everyones for name in each)
        return {f"train/{n}": sum(each.get(n, 0.0) for each in everyones) for n in names}

    def charged_rewards(self, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
        """Return the rewards, less the KL penalty if it is charged in the reward.

        r_i - β Σ_t (log π(token_t) - log π_ref(token_t)), the sum over the tokens of answer i: its
        policy gradient is that of -β KL(π ‖ π_ref) (:func:`objectives.kl_k1`).

        Returns:
            (answers,) rewards, and ``train/kl``, the mean log-ratio of a token.
        """
        rewards = rollout.rewards
        if self.reference is None or self.config.kl_in != "reward":
            return rewards, {}
        charge = torch.zeros_like(rewards)
        for members in self.micro_batches(rollout):
            mine = [rollout.sequences[i] for i in members]
            with torch.no_grad():
                reference = self.reference.score(mine).log_probs.to(rewards)
            old = torch.cat([rollout.old_log_probs[i] for i in members]).to(rewards)
            answers = torch.cat([rollout.decision_of[i] for i in members])
            charge.index_add_(0, answers, objectives.kl_k1(old, reference))
        charge = self.world.total(charge)
        kl = float(charge.sum()) / max(1, rollout.tokens)
        return rewards - self.kl_coef * charge, {"train/kl": kl}

    @torch.no_grad()
    def bootstrap(self, rollout: Rollout) -> Tensor:
        """Return V of the state that each episode was left in, (episodes,); 0 where it ended."""
        critic = self.critic
        assert critic is not None
        values = rollout.rewards.new_zeros(rollout.episodes)
        rows = [row for row in rollout.left_in if self.world.owns(row, rollout.episodes)]
        left = [rollout.left_in[row] for row in rows]
        for members in self.policy.micro_batches(left):
            found = self.policy.values([left[i] for i in members], critic)
            values[[rows[i] for i in members]] = found.to(values)
        return self.world.total(values)

    def adapt_kl(self, metrics: dict[str, float], answers: int) -> None:
        """Move the weight of the KL penalty towards its target, if it has one."""
        if self.config.kl_target is not None:
            self.kl_coef = objectives.adaptive_kl_coef(
                self.kl_coef,
                metrics["train/kl"],
                self.config.kl_target,
                answers,
                self.config.kl_horizon,
            )

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of ``parameters``."""
        c = self.config
        return torch.optim.AdamW(self.parameters, lr=c.learning_rate, weight_decay=c.weight_decay)

    def step_optimizer(self, loss: float) -> float:
        """Add up and clip the gradient, take one step, clear it; return the norm before clipping.

        Args:
            loss: The value of the loss, averaged over the batch.

        Raises:
            FloatingPointError: Loss or gradient is not finite, and the weights are left as they
                were; or the step made a weight infinite.
        """
        parameters = [p for p in self.parameters if p.grad is not None]
        limit = self.config.max_grad_norm or float("inf")
        self.world.add_gradients(parameters)
        norm = float(distributed.whole(torch.nn.utils.clip_grad_norm_(parameters, limit)))
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                raise FloatingPointError(
                    f"The {what} of update {self.iteration} is {value}. The weights were not "
                    "changed; the last checkpoint is good. Lower the learning rate or look at the "
                    "rewards."
                )
        self.take_step(loss)
        if self.shards is not None:
            self.shards.gather()
        self.optimizer.zero_grad()
        size = float(distributed.whole(torch.nn.utils.get_total_norm(parameters)))
        if not math.isfinite(size):  # found before a checkpoint could hold it
            raise FloatingPointError(
                f"The step of update {self.iteration} made the norm of the weights {size}; the "
                "last checkpoint is good. Lower the learning rate."
            )
        return norm

    def take_step(self, loss: float) -> None:
        """Move the parameters by their gradients."""
        self.optimizer.step()

    # --- playing ---------------------------------------------------------------------------------

    def player(self, deterministic: bool) -> Player:
        """Return the policy at play: greedy, or as in training."""
        if isinstance(self.policy, CandidatePolicy):
            return self.policy.begin(0.0 if deterministic else None)
        greedy = SamplingConfig(self.config.max_new_tokens, temperature=0.0)
        return self.policy.begin(greedy if deterministic else None)

    # --- state -----------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Return what an agent itself has to remember besides, as JSON."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what ``extra_state`` returned."""

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Write the policies, and in ``state.safetensors`` optimizer, critic and generators."""
        generators = self.world.gather(self.policy.generator.get_state())
        tensors = dict(zip(map(_generator, range(len(generators))), generators, strict=True))
        for key, value in moments(self.optimizer).items():
            found = distributed.whole(value)
            if self.world.is_main:
                tensors[f"optimizer/{key}"] = found.cpu()
        if not self.world.is_main:
            return {}
        self.policy.save_pretrained(folder / "policy")
        if self.reference is not None and not has_adapter(self.policy.model):
            self.reference.save_pretrained(folder / "reference")
        if self.critic is not None:
            tensors |= {f"critic/{key}": value for key, value in self.critic.state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
        own = {"model": model_identity(self.policy.model), "kl_coef": self.kl_coef}
        own["dtype"] = str(self.policy.model.dtype).removeprefix("torch.")
        return own | self.extra_state()

    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what ``save_state`` wrote.

        Raises:
            ValueError: The folder holds another model than the one that was trained.
        """
        refuse_another_model(folder, model_identity(self.policy.model), state["model"])
        if self.reference is not None and not has_adapter(self.policy.model):
            load = type(self.policy).from_pretrained
            stored = load(folder / "reference", device=self.device, dtype=state["dtype"])
            self._rule(stored)  # its log-probabilities are those of the same kind of sampling
            self.reference = frozen_copy(stored)
        self.kl_coef = state["kl_coef"]
        self.load_extra_state(state)
        tensors = load_file(folder / "state.safetensors")
        generators = {k: tensors.pop(k) for k in list(tensors) if k.startswith("generator")}
        self.policy.generator.set_state(generators[_generator(self.world.rank)])
        if self.critic is not None:
            names = list(self.critic.state_dict())
            self.critic.load_state_dict({name: tensors.pop(f"critic/{name}") for name in names})
        stored_moments = {key.removeprefix("optimizer/"): t for key, t in tensors.items()}
        if self.shards is None:
            restore_moments(self.optimizer, stored_moments)
            return
        self.shards.spread()
        like, parameters = self.shards.like, self.parameters
        restore_moments(self.optimizer, stored_moments, lambda t, i: like(t, parameters[i]))

    @classmethod
    def stored_policy(cls, folder: Path, state: dict[str, Any], device: str) -> Policy:
        """Return the policy of a checkpoint."""
        return POLICIES[state["family"]].from_pretrained(
            folder / "policy", device=device, dtype=state["own"]["dtype"], merge=False
        )


def _generator(rank: int) -> str:
    """Return the name that a process's generator has in a checkpoint."""
    return f"generator/{rank}" if rank else "generator"


def _joined(tensors: list[Tensor]) -> Tensor:
    """Join flat tensors; of none, an empty one."""
    return torch.cat(tensors) if tensors else torch.zeros(0, dtype=torch.long)
