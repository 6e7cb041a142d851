"""What every agent shares: collection, logging, evaluation, checkpoints.

An agent's own file holds its configuration, its advantage and its update, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium as gym
import torch
from safetensors.torch import load_file, save_file

from agents.evaluation import Evaluation, evaluate
from agents.policies.candidate import CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.models import frozen_copy
from agents.rollout import Rollout, collect, episode_seeds
from agents.sampling import SamplingConfig
from agents.tracking import Tracker
from llm_envs.datasets.splits import Split

Policy = CausalLMPolicy | CandidatePolicy
POLICIES: dict[str, type[Policy]] = {p.family: p for p in (CausalLMPolicy, CandidatePolicy)}


@dataclass(frozen=True)
class AgentConfig:
    """What every agent is configured by."""

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
    kl_coef: float = 0.0
    """Weight of the mean KL divergence, token by token, from the initial policy."""
    micro_batch_tokens: int = 8192
    """Most tokens in one forward pass of the update; changes speed and memory only."""
    eval_every: int = 10
    """Updates between evaluations on the validation split; 0 for none."""
    eval_episodes: int | None = 128
    """Validation episodes of each of them; None for all."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    threads: int | None = None
    """Intra-op threads of torch. It changes rounding, so it is part of a run. None leaves it."""

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "micro_batch_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be 1 or more.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; training needs chance, so give more than 0. "
                "(Evaluation is greedy whatever it is.)"
            )
        for name, nothing in (("eval_episodes", "all of them"), ("threads", "torch's own choice")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be 1 or more, or None ({nothing}).")


ConfigT = TypeVar("ConfigT", bound=AgentConfig)


class Agent(ABC, Generic[ConfigT]):
    """Trains a policy on an environment.

    Args:
        policy: ``"tiny"``, a hub id or a folder; or a policy made before, which from now on samples
            as the agent's configuration and seed say.
        env: Id of an environment; its action space decides how a policy given by name plays.
        config: The agent's configuration; its defaults if left out.
        seed: Seed of the episodes, the sampling and everything else.
        env_kwargs: Arguments of the environment (``dataset``, ``max_turns``, …).
        device: ``"auto"`` or a torch device, for a policy given by name.
        **settings: Single fields of the configuration, instead of ``config``.

    Raises:
        ValueError: The policy cannot play the environment, or a setting is impossible.
        TypeError: A setting is unknown.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[AgentConfig]]

    def __init__(
        self,
        policy: str | Path | Policy,
        env: str,
        *,
        config: ConfigT | None = None,
        seed: int = 0,
        env_kwargs: dict[str, Any] | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        self.config = self._configure(config, settings)
        if seed < 0:
            raise ValueError(f"seed is {seed}; it cannot be negative.")
        self.env_id = env
        self.env_kwargs = dict(env_kwargs or {})
        if self.env_kwargs.get("split", "train") not in ("train", "all"):
            raise ValueError(
                f"The environment's split is {self.env_kwargs['split']!r}, and what is trained on "
                "can no longer be scored honestly. Leave it out: training uses 'train' (or 'all', "
                "for data of your own)."
            )
        self.seed = seed
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.policy_name = "custom" if isinstance(policy, Policy) else str(policy)
        count = self.config.prompts * self.config.group_size
        self.envs: Any = gym.make_vec(env, num_envs=count, **{"split": "train", **self.env_kwargs})
        self.policy = (
            policy if isinstance(policy, Policy) else self._load_policy(str(policy), device)
        )
        choosing = isinstance(self.envs.single_action_space, gym.spaces.Discrete)
        if (self.policy.family == "choosing") != choosing:
            raise ValueError(
                f"{env} is a {'choosing' if choosing else 'writing'} task and "
                f"{type(self.policy).__name__} is a policy for {self.policy.family}. Use "
                f"{'CandidatePolicy' if choosing else 'CausalLMPolicy'}."
            )
        self._rule(self.policy)
        self.reference: Any = frozen_copy(self.policy) if self.config.kl_coef else None
        self.optimizer = torch.optim.AdamW(
            self.policy.model.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
        )
        self.iteration = 0
        self.env_steps = 0
        self.best_score: float | None = None
        self.stop_requested = False

    def _configure(self, config: ConfigT | None, settings: dict[str, Any]) -> ConfigT:
        known = {f.name for f in dataclasses.fields(self.config_class)}
        for setting in settings:
            if setting not in known:
                from llm_envs.datasets.splits import did_you_mean

                raise TypeError(
                    f"{type(self).__name__} has no setting {setting!r}."
                    f"{did_you_mean(setting, known)} It has {', '.join(sorted(known))}."
                )
        made = config if config is not None else self.config_class()
        return dataclasses.replace(made, **settings)  # type: ignore[return-value]

    def _load_policy(self, name: str, device: str) -> Policy:
        if isinstance(self.envs.single_action_space, gym.spaces.Discrete):
            return CandidatePolicy.from_pretrained(name, relative=True, device=device)
        return CausalLMPolicy.from_pretrained(name, device=device)

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

    # --- what an agent is ------------------------------------------------------------------------

    @abstractmethod
    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy by one rollout; return ``train/…`` metrics."""

    def extra_state(self) -> dict[str, Any]:
        """Return what the agent itself has to remember, as JSON."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what ``extra_state`` returned."""

    # --- learning --------------------------------------------------------------------------------

    def learn(
        self,
        total_steps: int,
        *,
        folder: Path | None = None,
        tracker: Tracker | None = None,
    ) -> Agent[ConfigT]:
        """Train until ``total_steps`` environment steps have been taken in all.

        Args:
            total_steps: Answers given by the policy, over the whole life of the agent.
            folder: Where ``checkpoints/last`` and ``checkpoints/best`` go; ``None`` for nowhere.
            tracker: What metrics are logged to.

        Returns:
            The agent itself. ``stop_requested = True`` ends learning after the current update.
        """
        stopping = self.stop_requested
        while self.env_steps < total_steps and not stopping:
            if self.iteration == 0:
                self._validate(folder, tracker)
            metrics = self._iterate()
            last = self.env_steps >= total_steps
            if tracker is not None:
                tracker.log(metrics, env_steps=self.env_steps)
            if self.config.eval_every and (last or self.iteration % self.config.eval_every == 0):
                self._validate(folder, tracker)
            # Stopping adds no validation: the metrics of the run, once it is resumed, have to be
            # those of a run that was not stopped. It is looked at once, and last, because a
            # signal comes at any time: whatever ends the loop has saved before.
            stopping = self.stop_requested
            if folder and (last or stopping or self.iteration % self.config.checkpoint_every == 0):
                state = {} if tracker is None else {"tracker": tracker.state()}
                self.save(folder / "checkpoints" / "last", **state)
        return self

    def _iterate(self) -> dict[str, float]:
        began = time.perf_counter()
        read_before = self.policy.read_tokens
        seeds = episode_seeds(
            self.seed, self.iteration, self.config.prompts, self.config.group_size
        )
        rollout = collect(self.policy.begin(), self.envs, seeds=seeds)
        trained = self.update(rollout)
        self.iteration += 1
        self.env_steps += len(rollout.rewards)
        seconds = time.perf_counter() - began
        read = self.policy.read_tokens - read_before + sum(map(len, rollout.sequences))
        scored = rollout.scores[~rollout.scores.isnan()]
        return {
            "rollout/reward": float(rollout.rewards.mean()),
            "rollout/score": float(scored.mean()) if len(scored) else 0.0,
            "rollout/answer_tokens": rollout.tokens / len(rollout.rewards),
            "rollout/cut": rollout.cut_share,
            **trained,
            "train/learning_rate": self.optimizer.param_groups[0]["lr"],
            "perf/tokens_per_second": read / seconds,
            "perf/env_steps_per_second": len(rollout.rewards) / seconds,
        }

    def _validate(self, folder: Path | None, tracker: Tracker | None) -> None:
        if not self.config.eval_every:
            return
        found = self.evaluate("validation", episodes=self.config.eval_episodes)
        if tracker is not None:
            logged = {"eval/score": found.score}
            logged |= {f"eval/{name}": float(v.mean()) for name, v in found.parts.items()}
            tracker.log(logged, env_steps=self.env_steps)
        if self.best_score is None or found.score > self.best_score:
            self.best_score = found.score
            if folder is not None:
                self.save(folder / "checkpoints" / "best")

    def step_optimizer(self) -> float:
        """Clip the gradient, take one step, clear it; return the norm before clipping.

        Raises:
            FloatingPointError: The gradient is not finite; the weights are left as they were.
        """
        parameters = [p for p in self.policy.model.parameters() if p.grad is not None]
        limit = self.config.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if norm != norm or norm == float("inf"):
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"The gradient of update {self.iteration} is {norm}. The weights were not changed; "
                "the last checkpoint is good. Lower the learning rate or look at the rewards."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    # --- playing ---------------------------------------------------------------------------------

    def predict(self, observation: Any, deterministic: bool = True) -> tuple[Any, None]:
        """Answer one observation, or each of a list; as in Stable-Baselines3.

        Returns:
            The action (or a list of them) and ``None`` for the state that there is not.
        """
        many = isinstance(observation, Sequence) and not isinstance(observation, str)
        rows = dict(enumerate(observation if many else [observation]))
        actions = self._player(deterministic).act(rows, 0)
        return ([actions[i] for i in rows] if many else actions[0]), None

    def evaluate(
        self, split: Split, *, episodes: int | None = None, deterministic: bool = True
    ) -> Evaluation:
        """Play a split once; see :func:`agents.evaluation.evaluate`."""
        return evaluate(
            lambda: self._player(deterministic),
            self.env_id,
            split=split,
            episodes=episodes,
            env_kwargs={k: v for k, v in self.env_kwargs.items() if k != "split"},
        )

    def _player(self, deterministic: bool) -> Any:
        if isinstance(self.policy, CandidatePolicy):
            return self.policy.begin(0.0 if deterministic else None)
        greedy = dataclasses.replace(self.policy.sampling, temperature=0.0)
        return self.policy.begin(greedy if deterministic else None)

    # --- state -----------------------------------------------------------------------------------

    def save(self, folder: str | Path, **more: Any) -> None:
        """Write everything that resuming needs: a crash leaves the old checkpoint or the new one.

        No file holds pickled code.
        """
        folder = Path(folder)
        fresh = folder.with_name(folder.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        self.policy.save_pretrained(fresh / "policy")
        if self.reference is not None:
            self.reference.save_pretrained(fresh / "reference")
        tensors = {"generator": self.policy.generator.get_state()}
        moments = self.optimizer.state_dict()["state"]
        for index, moment in moments.items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in moment.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, fresh / "state.safetensors")
        state = {
            "agent": self.name,
            "env": self.env_id,
            "env_kwargs": self.env_kwargs,
            "policy": self.policy_name,
            "family": self.policy.family,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "best_score": self.best_score,
            "extra": self.extra_state(),
            **more,
        }
        (fresh / "state.json").write_text(json.dumps(state, indent=1, default=str))
        old = folder.with_name(folder.name + ".old")
        if folder.exists():  # else the old one is all there is, left by a crash
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> Agent[ConfigT]:
        """Restore an agent from a checkpoint; it goes on exactly where it was.

        Raises:
            ValueError: There is no checkpoint, or another agent wrote it.
        """
        folder = checkpoint_folder(folder)
        state = json.loads((folder / "state.json").read_text())
        if state["agent"] != cls.name:
            raise ValueError(
                f"The checkpoint {folder} was written by the agent {state['agent']!r} and cannot "
                f"be loaded as {cls.name!r}."
            )
        load_policy = POLICIES[state["family"]].from_pretrained
        agent = cls(
            load_policy(folder / "policy", device=device),
            state["env"],
            config=cls.config_class(**state["config"]),  # type: ignore[arg-type]
            seed=state["seed"],
            env_kwargs=state["env_kwargs"],
        )
        agent.policy_name = state["policy"]
        if agent.reference is not None:
            agent.reference = frozen_copy(load_policy(folder / "reference", device=device))
        agent.iteration, agent.env_steps = state["iteration"], state["env_steps"]
        agent.best_score = state["best_score"]
        agent.load_extra_state(state["extra"])
        tensors = load_file(folder / "state.safetensors")
        agent.policy.generator.set_state(tensors.pop("generator"))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            _, index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
        groups = agent.optimizer.state_dict()["param_groups"]
        agent.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return agent


def checkpoint_folder(folder: str | Path) -> Path:
    """Return the folder of a checkpoint; after a crash between two renames it is the old one.

    Raises:
        ValueError: There is none.
    """
    folder = Path(folder)
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / "state.json").exists():
            return candidate
    raise ValueError(f"{folder} is not a checkpoint: it holds no state.json.")
