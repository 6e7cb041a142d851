"""PPO, A2C and DQN of Stable-Baselines3 as agents.

The algorithms are Stable-Baselines3's own, unchanged. On choosing tasks they see candidates as
numbers (:class:`~llm_envs.wrappers.NumericView`) and learn a small network; on writing tasks PPO
and A2C choose token by token (:class:`~llm_envs.wrappers.TokenView`), and their actor is a language
model (:mod:`agents.policies.sb3_causal_lm`). They are here to compare with: agents that know that
an answer is made of tokens read a conversation once an update, not once for every minibatch that
holds one of its tokens.

One iteration is one rollout and its update or, for DQN, a number of steps with an update after
each. It begins with new episodes, and all its chance comes from the run's seed and the iteration,
so that a resumed run needs no state of an environment or a generator. A rollout should therefore
be longer than an episode, or the last turns are never seen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.base import Agent
from agents.baselines import ScriptedPlayer
from agents.checkpoints import moments, refuse_another_model, restore_moments
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.int8 import is_int8
from agents.policies.models import model_identity
from agents.rollout import Player, earned
from agents.sampling import SamplingConfig
from agents.settings import OnPolicyConfig, SB3A2CConfig, SB3Config, SB3DQNConfig, SB3PPOConfig
from llm_envs.wrappers import NumericView, TokenView
from llm_envs.wrappers.numeric_view import numeric_observation

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

Floats = npt.NDArray[np.float64]


# --- settings ------------------------------------------------------------------------------------


# --- players -------------------------------------------------------------------------------------


class NumericPlayer(ScriptedPlayer):
    """Chooses by the network of an agent, on the numeric features of the candidates."""

    def __init__(self, agent: SB3Agent[Any], deterministic: bool) -> None:
        super().__init__()
        self.agent = agent
        self.deterministic = deterministic
        self.rng = np.random.default_rng(np.random.SeedSequence((agent.seed, agent.iteration)))

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Choose the likeliest candidate, of equals the first, or draw one."""
        numbers = numeric_observation(observation["features"], self.agent.config.scaling)
        chances = self.agent.chances(numbers, self.deterministic)
        if self.deterministic:
            return int(chances.argmax()), chances
        return int(self.rng.choice(len(chances), p=chances)), chances


# --- agents --------------------------------------------------------------------------------------


SB3ConfigT = TypeVar("SB3ConfigT", bound=SB3Config)
OnPolicyConfigT = TypeVar("OnPolicyConfigT", bound=OnPolicyConfig)


class SB3Agent(Agent[SB3ConfigT]):
    """An algorithm of Stable-Baselines3.

    Args:
        policy: On writing tasks ``"tiny"``, a hub id or a folder, or a policy made before. On
            choosing tasks a small network plays, and there is nothing to choose.
        *args: See :class:`Agent`.
        **kwargs: See :class:`Agent`.

    Raises:
        ImportError: Stable-Baselines3 is not installed.
        ValueError: The agent cannot play the environment, or a setting is impossible.
        TypeError: A setting is unknown.
    """

    config_class: ClassVar[type[SB3Config]]

    def __init__(self, policy: str | Path | CausalLMPolicy, *args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec("stable_baselines3") is None:
            raise ImportError(
                f"The agent {self.name} needs the package 'stable-baselines3', which is not "
                "installed. Install the extra with: pip install 'llm-envs[sb3]'"
            )
        given = policy if isinstance(policy, CausalLMPolicy) else str(policy)
        super().__init__(given, *args, **kwargs)
        defaults = self.config.family_defaults[self.family]
        unset = {k: v for k, v in defaults.items() if getattr(self.config, k) is None}
        self.config = dataclasses.replace(self.config, **unset)
        self.writer: CausalLMPolicy | None = None
        if self.family == "writing":
            self.writer = self._writer(given)
        elif self.policy_name not in ("none", self.config.default_policy):
            raise ValueError(
                f"{self.name} plays {self.env_id} with a small network on numbers, and the policy "
                f"{self.policy_name!r} was given. Use 'none'."
            )
        else:
            self.policy_name = "none"
        self.model = self._make_model()

    def _writer(self, policy: str | CausalLMPolicy) -> CausalLMPolicy:
        """Have a language model write as the settings say, if they leave room to answer."""
        c: Any = self.config
        if c.n_steps < c.max_new_tokens:
            raise ValueError(
                f"n_steps is {c.n_steps} and max_new_tokens {c.max_new_tokens}: a rollout of so "
                "few tokens may hold no whole answer. Give n_steps as much or more."
            )
        sampling = SamplingConfig(c.max_new_tokens)
        if isinstance(policy, str):
            policy = CausalLMPolicy.from_pretrained(
                policy, device=self.device, sampling=sampling, chat=False
            )
        if policy.chat is not None:
            raise ValueError(
                f"{self.name} writes token by token on the observation's text (TokenView), and the "
                "policy reads messages by a chat template. Make it with chat=False."
            )
        if is_int8(policy.model):
            raise ValueError(
                "The weights of this model are held in 8 bits, for use; they cannot be trained. "
                "Train the model that it was made from."
            )
        policy.sampling = sampling
        policy.context = min(policy.context, c.context)
        policy.room(sampling)
        policy.generator.manual_seed(self.seed)
        return policy

    def _make_model(self) -> BaseAlgorithm:
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.vec_env import DummyVecEnv

        c, writer = self.config, self.writer
        if writer is None:
            policy: Any = "MlpPolicy"
            policy_kwargs: dict[str, Any] = {"net_arch": list(c.hidden)}
            device: Any = "cpu"  # a small network is slower anywhere else
        else:
            from agents.policies.sb3_causal_lm import CausalLMActorCriticPolicy

            policy, policy_kwargs = CausalLMActorCriticPolicy, {"model": writer.model}
            device = writer.device
        with self._chance():
            model = self.make_algorithm(
                policy,
                DummyVecEnv([self._view] * c.n_envs),
                learning_rate=c.learning_rate,
                gamma=c.gamma,
                max_grad_norm=c.max_grad_norm,
                policy_kwargs=policy_kwargs,
                device=device,
            )
        model.set_logger(Logger(folder=None, output_formats=[]))
        return model

    def _view(self) -> gym.Env[Any, Any]:
        """Make one environment as the algorithm sees it."""
        env = gym.make(self.env_id, **{"split": "train", **self.env_kwargs})
        if self.writer is None:
            return NumericView(env, self.config.scaling)
        return TokenView(
            env,
            self.writer.tokenizer,
            max_new_tokens=self.writer.sampling.max_new_tokens,
            context=self.writer.context,
            vocabulary=self.writer.model.config.get_text_config().vocab_size,
        )

    @abstractmethod
    def make_algorithm(self, policy: Any, env: Any, **common: Any) -> BaseAlgorithm:
        """Return the algorithm; ``common`` are the settings that all of them have."""

    @abstractmethod
    def chances(self, numbers: npt.NDArray[np.float32], deterministic: bool) -> Floats:
        """Return the probability of each candidate, (k,), for a numeric observation."""

    @property
    def parameters_bytes(self) -> int:
        """Size of the networks, for the room that checkpoints need."""
        return sum(p.numel() * p.element_size() for p in self.model.policy.parameters())

    # --- learning --------------------------------------------------------------------------------

    @contextmanager
    def _chance(self, *iteration: int) -> Iterator[None]:
        """Seed the global generators, which Stable-Baselines3 draws from, and put them back after.

        The seeds depend on the run's seed and the iteration only.
        """
        sequence = np.random.SeedSequence(self.seed, spawn_key=iteration)
        seed, episodes, actions = (int(s) for s in sequence.generate_state(3, np.uint64))
        held = np.random.get_state()  # noqa: NPY002 (it is this generator that is drawn from)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            if iteration:
                assert self.model.env is not None
                self.model.action_space.seed(actions % 2**32)
                # Row i has the seed episodes + i, far from those of any other iteration.
                self.model.env.seed(episodes)
                self.model.env.set_options(self.reset_options)
            try:
                yield
            finally:
                np.random.set_state(held)  # noqa: NPY002

    def iterate(self) -> dict[str, float]:
        """Have the algorithm learn for ``n_steps`` of every environment, from new episodes."""
        began = time.perf_counter()
        c, model = self.config, self.model
        assert c.n_steps is not None
        assert model.env is not None
        learn: Any = model.learn  # its base class does not know that log_interval may be None
        rewards: list[float] = []
        scores: list[float] = []
        best_scores: list[float] = []

        def look(held: dict[str, Any], _: dict[str, Any]) -> bool:
            known = len(rewards)
            for reward, info in zip(held["rewards"], held["infos"], strict=True):
                if "feedback" not in info:  # a token within an answer
                    continue
                rewards.append(float(reward))
                scores.append(info.get("score", np.nan))
                best_scores.append(info.get("best_score", np.nan))
            self.check_rewards(rewards[known:], first=known)
            return True

        model.set_env(model.env)  # has the next call of learn begin with a reset
        model.logger.name_to_value.clear()
        steps = c.n_steps * c.n_envs
        with self._chance(self.iteration):
            try:
                learn(steps, callback=look, log_interval=None, reset_num_timesteps=False)
            except ValueError:  # what torch says of a distribution over no numbers
                if self._finite:
                    raise
        if not self._finite:
            raise FloatingPointError(
                f"Weights are no numbers any more after update {self.iteration}; the last "
                "checkpoint is good. Lower the learning rate or look at the rewards."
            )
        self.iteration += 1
        self.env_steps += len(rewards)
        seconds = time.perf_counter() - began
        metrics = {
            **earned(rewards, scores, best_scores),
            **_metrics(model.logger.name_to_value),
            "perf/env_steps_per_second": len(rewards) / seconds,
        }
        if self.writer is not None:
            metrics["rollout/answer_tokens"] = steps / len(rewards)
        return metrics

    @property
    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self.model.policy.parameters())

    # --- playing ---------------------------------------------------------------------------------

    def player(self, deterministic: bool) -> Player:
        """Return the language model or the network at play: greedy, or as in training."""
        if self.writer is None:
            return NumericPlayer(self, deterministic)
        limit = self.writer.sampling.max_new_tokens
        return self.writer.begin(SamplingConfig(limit, temperature=0.0 if deterministic else 1.0))

    # --- state -----------------------------------------------------------------------------------

    def save_state(self, folder: Path) -> dict[str, Any]:
        """Write the language model, and in ``state.safetensors`` everything else that is learned.

        Of the environments and generators nothing is needed: an iteration begins them anew.
        """
        tensors = {f"policy/{name}": value for name, value in self._own_weights().items()}
        remembered = moments(self.model.policy.optimizer)
        tensors |= {f"optimizer/{key}": value for key, value in remembered.items()}
        tensors |= {f"memory/{name}": value for name, value in self.memory().items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
        played = {"model": model_identity(self.model.policy)}
        if self.writer is not None:
            self.writer.save_pretrained(folder / "policy")
            played["dtype"] = str(self.writer.model.dtype).removeprefix("torch.")
        return {**played, "num_timesteps": self.model.num_timesteps, **self.counters()}

    def load_state(self, folder: Path, state: dict[str, Any]) -> None:
        """Take back what ``save_state`` wrote; the language model has been loaded before.

        Raises:
            ValueError: The folder holds another model than the one that was trained.
        """
        refuse_another_model(folder, model_identity(self.model.policy), state["model"])
        parts: dict[str, dict[str, Tensor]] = {"policy": {}, "optimizer": {}, "memory": {}}
        for key, value in load_file(folder / "state.safetensors").items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        policy: Any = self.model.policy
        policy.load_state_dict({**policy.state_dict(), **parts["policy"]})
        restore_moments(policy.optimizer, parts["optimizer"])
        self.model.num_timesteps = state["num_timesteps"]
        self.remember(parts["memory"], state)

    def _own_weights(self) -> dict[str, Tensor]:
        """Return the weights that are not the language model's, which has a folder of its own."""
        weights: dict[str, Tensor] = self.model.policy.state_dict()
        return {name: w for name, w in weights.items() if "features_extractor." not in name}

    def memory(self) -> dict[str, Tensor]:
        """Return what an algorithm remembers besides weights and moments."""
        return {}

    def counters(self) -> dict[str, Any]:
        """Return what an algorithm counts, as JSON."""
        return {}

    def remember(self, memory: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take back what ``memory`` and ``counters`` returned."""

    @classmethod
    def stored_policy(cls, folder: Path, state: dict[str, Any], device: str) -> Any:
        """Return the language model; a small network is made anew."""
        if state["family"] == "choosing":
            return "none"
        return CausalLMPolicy.from_pretrained(
            folder / "policy",
            device=device,
            dtype=state["own"].get("dtype", "float32"),  # older ones do not tell
            chat=False,
            merge=False,
        )


class OnPolicyAgent(SB3Agent[OnPolicyConfigT]):
    """What PPO and A2C share."""

    def _on_policy(self) -> dict[str, Any]:
        c = self.config
        names = ("n_steps", "gae_lambda", "ent_coef", "vf_coef")
        return {name: getattr(c, name) for name in names}

    def chances(self, numbers: npt.NDArray[np.float32], deterministic: bool) -> Floats:
        """Return the policy's own probabilities."""
        policy: Any = self.model.policy
        with torch.no_grad():
            logits = policy.get_distribution(torch.from_numpy(numbers)[None]).distribution.logits
        chances: Floats = logits[0].double().softmax(-1).numpy()
        return chances


class SB3PPO(OnPolicyAgent[SB3PPOConfig]):
    """PPO. Source: Schulman et al. (2017), "Proximal Policy Optimization Algorithms"."""

    name = "sb3-ppo"
    config_class = SB3PPOConfig

    def make_algorithm(self, policy: Any, env: Any, **common: Any) -> BaseAlgorithm:
        """Return Stable-Baselines3's PPO."""
        from stable_baselines3 import PPO

        c = self.config
        assert c.batch_size is not None
        return PPO(
            policy,
            env,
            batch_size=c.batch_size,
            n_epochs=c.n_epochs,
            clip_range=c.clip_range,
            normalize_advantage=c.normalize_advantage,
            target_kl=c.target_kl,
            **self._on_policy(),
            **common,
        )


class SB3A2C(OnPolicyAgent[SB3A2CConfig]):
    """A2C: one gradient step a rollout.

    Source: Mnih et al. (2016), "Asynchronous Methods for Deep Reinforcement Learning", made
    synchronous.
    """

    name = "sb3-a2c"
    config_class = SB3A2CConfig

    def make_algorithm(self, policy: Any, env: Any, **common: Any) -> BaseAlgorithm:
        """Return Stable-Baselines3's A2C."""
        from stable_baselines3 import A2C

        c = self.config
        return A2C(
            policy,
            env,
            normalize_advantage=c.normalize_advantage,
            use_rms_prop=c.use_rms_prop,
            **self._on_policy(),
            **common,
        )


class SB3DQN(SB3Agent[SB3DQNConfig]):
    """DQN. Source: Mnih et al. (2015), "Human-level control through deep reinforcement learning".

    With gamma 0 a value is the expected reward of a candidate.
    """

    name = "sb3-dqn"
    config_class = SB3DQNConfig
    families = ("choosing",)
    refusal = (
        "it explores by choosing at random, and random tokens are no answer; nor does a language "
        "model tell what a token is worth."
    )
    model: Any

    def make_algorithm(self, policy: Any, env: Any, **common: Any) -> BaseAlgorithm:
        """Return Stable-Baselines3's DQN, with an exploration that counts answers."""
        from stable_baselines3 import DQN

        c = self.config
        model = DQN(
            policy,
            env,
            batch_size=c.batch_size,
            gradient_steps=c.gradient_steps,
            buffer_size=c.buffer_size,
            learning_starts=c.learning_starts,
            target_update_interval=c.target_update_interval,
            train_freq=1,
            **common,
        )
        # Its own schedule goes by the share of a call of learn, and every iteration is a call.
        model.exploration_schedule = lambda _: self.epsilon
        return model

    @property
    def epsilon(self) -> float:
        """Share of random answers now."""
        c = self.config
        done = min(1.0, int(self.model.num_timesteps) / c.exploration_steps)
        return c.exploration_initial_eps + done * (
            c.exploration_final_eps - c.exploration_initial_eps
        )

    def iterate(self) -> dict[str, float]:
        """Play and learn; the exploration is what it was when the last iteration ended."""
        self.model.exploration_rate = self.epsilon
        return super().iterate()

    def chances(self, numbers: npt.NDArray[np.float32], deterministic: bool) -> Floats:
        """Return 1 for the candidate of the highest value; in training others get their share."""
        with torch.no_grad():
            values = self.model.q_net(torch.from_numpy(numbers)[None])[0]
        greedy: Floats = np.eye(len(values))[int(values.argmax())]
        epsilon = 0.0 if deterministic else self.epsilon
        return epsilon / len(values) + (1 - epsilon) * greedy

    _REMEMBERED = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

    def memory(self) -> dict[str, Tensor]:
        """Return the replay buffer, as far as it is filled."""
        buffer = self.model.replay_buffer
        return {
            name: torch.from_numpy(getattr(buffer, name)[: buffer.size()])
            for name in self._REMEMBERED
        }

    def counters(self) -> dict[str, Any]:
        """Return where the replay buffer is written next, and the steps of the environments."""
        buffer = self.model.replay_buffer
        return {"pos": buffer.pos, "full": buffer.full, "n_calls": self.model._n_calls}

    def remember(self, memory: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take back the replay buffer and the counters."""
        buffer = self.model.replay_buffer
        for name, held in memory.items():
            getattr(buffer, name)[: len(held)] = held.numpy()
        buffer.pos, buffer.full = state["pos"], state["full"]
        self.model._n_calls = state["n_calls"]


_SAME: dict[str, tuple[str, float]] = {
    "train/loss": ("train/loss", 1.0),
    "train/learning_rate": ("train/learning_rate", 1.0),
    "train/entropy_loss": ("train/entropy", -1.0),
    "train/approx_kl": ("train/approx_kl", 1.0),
    "train/clip_fraction": ("train/clip_fraction", 1.0),
    "train/value_loss": ("train/value_loss", 0.5),
}
"""Metric of Stable-Baselines3 -> its name here, and what it is multiplied by."""


def _metrics(told: dict[str, Any]) -> dict[str, float]:
    """Return what Stable-Baselines3 logged, by the names that all agents use."""
    return {
        name: float(told[theirs]) * factor
        for theirs, (name, factor) in _SAME.items()
        if theirs in told
    }
