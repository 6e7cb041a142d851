"""What agents share that train a language-model policy: rollouts, KL penalty, optimizer, state."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents import objectives
from agents.base import Agent, AgentConfig, at_least
from agents.policies.candidate import CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.models import Critic, Scores, frozen_copy
from agents.rollout import Player, Rollout, collect, episode_seeds
from agents.sampling import SamplingConfig
from llm_envs.datasets.splits import did_you_mean

Policy = CausalLMPolicy | CandidatePolicy
POLICIES: dict[str, type[Policy]] = {p.family: p for p in (CausalLMPolicy, CandidatePolicy)}


@dataclass(frozen=True)
class PolicyConfig(AgentConfig):
    """What every agent that trains a language model is configured by."""

    prompts: int = 16
    """Different episodes in one update."""
    group_size: int = 8
    """Times that each of them is played."""
    learning_rate: float = 1e-4
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm; 0 leaves it."""
    temperature: float = 1.0
    """Of the sampling."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 for all. (Writing tasks.)"""
    top_p: float = 1.0
    """Sample from the nucleus of this probability only. (Writing tasks.)"""
    max_new_tokens: int = 24
    """Length limit of an answer. (Writing tasks.)"""
    entropy_coef: float = 0.0
    """Weight of the bonus on the mean entropy of the sampled tokens' distributions."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the initial policy."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it is charged: in the loss, as the exact mean divergence of the distributions that
    were sampled from; or in the reward of each answer, as the log-ratio of its tokens (k1)."""
    kl_target: float | None = None
    """Divergence, in nats a token, that the weight is adapted to; None keeps the weight fixed."""
    kl_horizon: int = 10_000
    """Answers over which an adapted weight may change by a fifth."""
    micro_batch_tokens: int = 8192
    """Most tokens in one forward pass of the update; changes speed and memory only."""

    @property
    def rows(self) -> int:
        """Episodes that are played side by side."""
        return self.prompts * self.group_size

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of_its_choices(self)
        at_least(self, 1, "prompts", "group_size", "micro_batch_tokens", "kl_horizon")
        at_least(self, 0, "learning_rate", "weight_decay", "max_grad_norm", "kl_coef")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; training needs chance, so give more than 0. "
                "(Evaluation is greedy whatever it is.)"
            )
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coef > 0):
            raise ValueError(
                f"kl_target is {self.kl_target} and kl_coef {self.kl_coef}; the weight is adapted "
                "by factors, so both have to be above 0."
            )


def one_of_its_choices(config: Any) -> None:
    """Refuse a setting that is none of the words it may be.

    Raises:
        ValueError: One is.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, choices = getattr(config, name), get_args(kind)
        if get_origin(kind) is Literal and value not in choices:
            near = did_you_mean(str(value), choices)
            raise ValueError(f"{name} is {value!r}.{near} Use one of {', '.join(choices)}.")


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
            as the agent's configuration and seed say.
        *args: See :class:`Agent`.
        **kwargs: See :class:`Agent`.

    Raises:
        ValueError: The policy cannot play the environment, or a setting is impossible.
        TypeError: A setting is unknown.
    """

    config_class: ClassVar[type[PolicyConfig]]
    default_policy = "tiny"

    def __init__(self, policy: str | Path | Policy, *args: Any, **kwargs: Any) -> None:
        name = policy if isinstance(policy, Policy) else str(policy)
        super().__init__(name, *args, **kwargs)
        self.policy: Policy = self._load_policy(name) if isinstance(name, str) else name
        if self.policy.family != self.family:
            raise ValueError(
                f"{self.env_id} is a {self.family} task and {type(self.policy).__name__} is a "
                f"policy for {self.policy.family}. Use {POLICIES[self.family].__name__}."
            )
        self._rule(self.policy)
        self.reference: Any = frozen_copy(self.policy) if self.config.kl_coef else None
        self.kl_coef = self.config.kl_coef
        self.critic: Critic | None = None
        if self.needs_critic:
            width = self.policy.model.config.get_text_config().hidden_size
            self.critic = Critic(width).to(self.policy.device)
        self.optimizer = self.make_optimizer()

    def _load_policy(self, name: str) -> Policy:
        if self.family == "choosing":
            return CandidatePolicy.from_pretrained(name, relative=True, device=self.device)
        return CausalLMPolicy.from_pretrained(name, device=self.device)

    def _rule(self, policy: Policy) -> None:
        """Have the policy play as this agent's configuration and seed say."""
        policy.generator.manual_seed(self.seed)
        policy.micro_batch_tokens = self.config.micro_batch_tokens
        if isinstance(policy, CandidatePolicy):
            policy.temperature = self.config.temperature
        else:
            policy.room(self.sampling)  # refuses an answer that the context has no room for
            policy.sampling = self.sampling

    @property
    def sampling(self) -> SamplingConfig:
        """How answers are drawn in training."""
        c = self.config
        return SamplingConfig(c.max_new_tokens, c.temperature, c.top_k, c.top_p)

    @property
    def needs_critic(self) -> bool:
        """Whether a value head is trained."""
        return False

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained."""
        critic = [] if self.critic is None else list(self.critic.parameters())
        return [p for p in self.policy.model.parameters() if p.requires_grad] + critic

    @property
    def parameters_bytes(self) -> int:
        """Size of the model, for the room that checkpoints need."""
        return sum(p.numel() * p.element_size() for p in self.policy.model.parameters())

    # --- learning --------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy by one rollout; return ``train/…`` metrics."""
        raise NotImplementedError

    def iterate(self) -> dict[str, float]:
        """Play a batch of episodes and update the policy by it."""
        began = time.perf_counter()
        read_before = self.policy.read_tokens
        rollout = self.collect()
        wrong = (~rollout.rewards.isfinite()).nonzero()
        if len(wrong):
            raise FloatingPointError(
                f"The reward of answer {int(wrong[0])} of update {self.iteration} is "
                f"{float(rollout.rewards[wrong[0]])}; nothing was learned from it. Look at what "
                "the environment scores."
            )
        trained = self.update(rollout)
        self.iteration += 1
        self.env_steps += len(rollout.rewards)
        seconds = time.perf_counter() - began
        tokens = self.policy.read_tokens - read_before + sum(map(len, rollout.sequences))
        scored = rollout.scores[~rollout.scores.isnan()]
        return {
            "rollout/reward": float(rollout.rewards.mean()),
            "rollout/score": float(scored.mean()) if len(scored) else 0.0,
            "rollout/answer_tokens": rollout.tokens / len(rollout.rewards),
            "rollout/cut": rollout.cut_share,
            **trained,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "perf/tokens_per_second": tokens / seconds,
            "perf/env_steps_per_second": len(rollout.rewards) / seconds,
        }

    def collect(self) -> Rollout:
        """Play the episodes of this iteration."""
        c = self.config
        seeds = episode_seeds(self.seed, self.iteration, c.prompts, c.group_size)
        return collect(self.policy.begin(), self.envs, seeds=seeds)

    def groups(self, rollout: Rollout) -> Tensor:
        """Number the groups, (answers,): answers to one prompt at one turn share a number."""
        return rollout.rows // self.config.group_size + len(rollout.rewards) * rollout.turns

    def accumulate(
        self, rollout: Rollout, objective: Objective, sequences: Sequence[int] | None = None
    ) -> dict[str, float]:
        """Add the gradient of a loss to the parameters', one micro-batch after the other.

        The entropy bonus and a KL penalty in the loss are added to the objective.

        Args:
            rollout: What was played.
            objective: The agent's own loss. Its shares have to add up to the whole, so it divides
                by the number of answers in all ``sequences`` and not by its own.
            sequences: Indices of the sequences to use; all of them if left out.

        Returns:
            ``train/loss``, ``train/entropy``, ``train/kl`` and the objective's own.
        """
        c = self.config
        chosen = list(range(len(rollout.sequences))) if sequences is None else list(sequences)
        tokens = max(1, sum(len(rollout.decision_of[i]) for i in chosen))
        reference = self.reference if c.kl_in == "loss" else None
        totals: dict[str, float] = dict.fromkeys(("loss", "entropy"), 0.0)
        for places in self.policy.micro_batches([rollout.sequences[i] for i in chosen]):
            members = [chosen[place] for place in places]
            mine = [rollout.sequences[i] for i in members]
            scores = self.policy.score(mine, reference, self.critic)
            batch = Batch(
                scores,
                torch.cat([rollout.decision_of[i] for i in members]),
                torch.cat([rollout.states_of(i) for i in members]),
                torch.cat([rollout.old_log_probs[i] for i in members]).to(scores.log_probs),
            )
            loss, shares = objective(batch)
            entropy = scores.entropies.sum() / tokens
            loss = loss - c.entropy_coef * entropy
            if scores.kls is not None:
                kl = scores.kls.sum() / tokens
                loss = loss + self.kl_coef * kl
                shares = {**shares, "kl": kl}
            loss.backward()  # type: ignore[no-untyped-call]
            for name, share in {"loss": loss, "entropy": entropy, **shares}.items():
                totals[name] = totals.get(name, 0.0) + share.item()
        return {f"train/{name}": value for name, value in totals.items()}

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
        for members in self.policy.micro_batches(rollout.sequences):
            mine = [rollout.sequences[i] for i in members]
            with torch.no_grad():
                reference = self.reference.score(mine).log_probs.to(rewards)
            old = torch.cat([rollout.old_log_probs[i] for i in members]).to(rewards)
            answers = torch.cat([rollout.decision_of[i] for i in members])
            charge.index_add_(0, answers, objectives.kl_k1(old, reference))
        kl = float(charge.sum()) / max(1, rollout.tokens)
        return rewards - self.kl_coef * charge, {"train/kl": kl}

    @torch.no_grad()
    def bootstrap(self, rollout: Rollout) -> Tensor:
        """Return V of the state that each episode was left in, (episodes,); 0 where it ended."""
        critic = self.critic
        assert critic is not None
        values = rollout.rewards.new_zeros(rollout.episodes)
        rows, left = list(rollout.left_in), list(rollout.left_in.values())
        for members in self.policy.micro_batches(left):
            found = self.policy.values([left[i] for i in members], critic)
            values[[rows[i] for i in members]] = found.to(values)
        return values

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
        """Clip the gradient, take one step, clear it; return the norm before clipping.

        Args:
            loss: The value of the loss, averaged over the batch.

        Raises:
            FloatingPointError: Loss or gradient is not finite; the weights are left as they were.
        """
        parameters = [p for p in self.parameters if p.grad is not None]
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        for what, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value):
                self.optimizer.zero_grad()
                raise FloatingPointError(
                    f"The {what} of update {self.iteration} is {value}. The weights were not "
                    "changed; the last checkpoint is good. Lower the learning rate or look at the "
                    "rewards."
                )
        self.take_step(loss)
        self.optimizer.zero_grad()
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
        """Write the policies, and in ``state.safetensors`` optimizer, critic and generator."""
        self.policy.save_pretrained(folder / "policy")
        if self.reference is not None:
            self.reference.save_pretrained(folder / "reference")
        tensors = {"generator": self.policy.generator.get_state()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
        if self.critic is not None:
            tensors |= {f"critic/{key}": value for key, value in self.critic.state_dict().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
        dtype = str(self.policy.model.dtype).removeprefix("torch.")
        own = {"model": self._model(), "dtype": dtype, "kl_coef": self.kl_coef}
        return own | self.extra_state()

    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what ``save_state`` wrote.

        Raises:
            ValueError: The folder holds another model than the one that was trained.
        """
        if (now := self._model()) != state["model"]:
            raise ValueError(
                f"The checkpoint {folder} was trained on the model {state['model']}, and its "
                f"folder policy holds {now}. Put back the one that was written there."
            )
        if self.reference is not None:
            load = type(self.policy).from_pretrained
            stored = load(folder / "reference", device=self.device, dtype=state["dtype"])
            self._rule(stored)  # its log-probabilities are those of the same kind of sampling
            self.reference = frozen_copy(stored)
        self.kl_coef = state["kl_coef"]
        self.load_extra_state(state)
        tensors = load_file(folder / "state.safetensors")
        self.policy.generator.set_state(tensors.pop("generator"))
        if self.critic is not None:
            names = list(self.critic.state_dict())
            self.critic.load_state_dict({name: tensors.pop(f"critic/{name}") for name in names})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    @classmethod
    def stored_policy(cls, folder: Path, state: dict[str, Any], device: str) -> Policy:
        """Return the policy of a checkpoint."""
        load = POLICIES[state["family"]].from_pretrained
        return load(folder / "policy", device=device, dtype=state["own"]["dtype"])

    def _model(self) -> str:
        """Say what is trained: class, size, and a digest of names and shapes."""
        model = self.policy.model
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
        count = sum(p.numel() for p in model.parameters())
        return f"{type(model).__name__} with {count:,} parameters (digest {digest})"
