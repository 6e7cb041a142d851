"""The settings of every agent, with their defaults and what they mean.

They stand apart from the agents so that the command line can explain them at once: this module
imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import llm_envs
from llm_envs.datasets.splits import did_you_mean
from llm_envs.wrappers.numeric_view import Scaling

Family = Literal["writing", "choosing"]

Strategy = Literal["ddp", "fsdp"]
Direction = Literal["ascend", "descend"]
LossTerm = Literal["broadcast", "step_size", "none"]
Anchor = Literal["zero", "initial"]
Precondition = Literal["sgd", "adam"]

MICRO_BATCH_TOKENS = 2048
"""Most tokens in one forward pass of an update. On a CPU, passes of 8,192 are slower by half on
dialogues and by two fifths on choices."""


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse settings below the least value that makes sense; one that is None is left to others.

    Raises:
        ValueError: One is.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            bound = "it cannot be negative" if least == 0 else f"it has to be {least} or more"
            raise ValueError(f"{name} is {value}; {bound}.")


def finite(config: Any) -> None:
    """Refuse settings that are infinite or no number.

    Raises:
        ValueError: One is.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} is {value}; it has to be a finite number.")


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


def _refuse_a_step_beyond_float32(learning_rate: float) -> None:
    if learning_rate > 1e30:
        raise ValueError(
            f"learning_rate is {learning_rate}; a step of that size is no number in float32. "
            "Learning rates are around 1e-4."
        )


# --- every agent ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentConfig:
    """What every agent is configured by."""

    eval_every: int = 10
    """Updates between evaluations on the validation split; 0 for none."""
    eval_episodes: int | None = 128
    """Validation episodes of each of them; None for all."""
    checkpoint_every: int = 10
    """Updates between checkpoints."""
    threads: int | None = None
    """Intra-op threads of torch. It changes rounding, so it is part of a run. None leaves it."""

    # What plays if no policy is named; "none" of agents without a language model.
    default_policy: ClassVar[str] = "none"

    @property
    def rows(self) -> int:
        """Episodes that are played side by side."""
        return 1

    def __post_init__(self) -> None:
        finite(self)
        at_least(self, 1, "checkpoint_every")
        at_least(self, 0, "eval_every")
        for name, nothing in (("eval_episodes", "all of them"), ("threads", "torch's own choice")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be 1 or more, or None ({nothing}).")


# --- agents that train a language model -----------------------------------------------------------


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
    """Weight of the KL divergence from the initial policy, KL(π ‖ π_ref)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it is charged. loss: the exact divergence of every token's full distribution at
    temperature 1, a mean over tokens. reward: of each answer the sum of its tokens' log-ratios (k1)
    as they are sampled, at the temperature and within top_k and top_p; the same weight is about as
    many times stronger there as an answer has tokens."""
    kl_target: float | None = None
    """Divergence, in nats a token, that the weight is adapted to; None keeps the weight fixed."""
    kl_horizon: int = 10_000
    """Answers over which an adapted weight may change by a fifth."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Most tokens in one forward pass of the update; changes speed and memory only. A GPU may like
    more."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, about a third more time."""
    autocast: Literal["auto", "bf16", "none"] = "auto"
    """Precision of the forward passes, of sampling too: bfloat16 by autocast (but the head and all
    log-probabilities), or that of the weights. auto is bf16 on CUDA devices that have it."""
    compile: bool = False
    """Compile the sampler's step (torch.compile; needs a C++ compiler). It takes half a minute
    once; benchmarks/THROUGHPUT.md says when they come back. A resumed run may round differently.
    (Writing tasks.)"""
    lora_rank: int = 0
    """Rank of the LoRA adapters on all linear layers, which alone are trained; 0 trains every
    weight. With adapters the KL penalty's reference takes no memory. (Extra: llm-envs[lora].)"""
    lora_alpha: float | None = None
    """Their scale is alpha / rank; None is twice the rank."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether a model that is loaded by name reads messages through its tokenizer's chat template;
    auto does if there is one. (Writing tasks.)"""
    system: str | None = None
    """System message before every conversation; None leaves it to the template. (Chat only.)"""
    head: Literal["auto", "scalar"] = "auto"
    """How a model that is loaded by name scores candidates: scalar by a new linear head; auto by
    the likelihood relative to the initial model, or by a head if it is an encoder. (Choosing.)"""

    default_policy = "tiny"

    @property
    def rows(self) -> int:
        """Episodes that are played side by side."""
        return self.prompts * self.group_size

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of_its_choices(self)
        at_least(self, 1, "prompts", "group_size", "micro_batch_tokens", "kl_horizon")
        at_least(self, 0, "learning_rate", "weight_decay", "max_grad_norm", "kl_coef", "lora_rank")
        _refuse_a_step_beyond_float32(self.learning_rate)
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha is {self.lora_alpha}; give more than 0, or None.")
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


@dataclass(frozen=True)
class ReinforceConfig(PolicyConfig):
    """Settings of REINFORCE."""

    baseline: Literal["none", "batch", "moving", "leave-one-out", "critic"] = "leave-one-out"
    """What rewards are compared with: nothing, the batch's mean, a moving average of earlier
    batches, the other answers to the same prompt, or a learned critic's guess. (Of a single answer
    the mean leaves nothing.)"""
    gamma: float = 0.0
    """Discount over the turns of a dialogue; 0 credits each answer with its own reward only."""
    moving_decay: float = 0.9
    """Decay of the moving average."""
    value_coef: float = 0.1
    """Weight of the critic's loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline == "leave-one-out" and self.group_size < 2:
            raise ValueError(
                f"The leave-one-out baseline compares answers to one prompt, but group_size is "
                f"{self.group_size}. Use 2 or more, or another baseline."
            )
        if not 0 <= self.moving_decay < 1:
            raise ValueError(f"moving_decay is {self.moving_decay}; it lies in [0, 1).")
        at_least(self, 0, "value_coef")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; a discount lies in [0, 1].")


@dataclass(frozen=True)
class RLOOConfig(ReinforceConfig):
    """Settings of RLOO: REINFORCE, leave-one-out, and the KL penalty in the reward."""

    kl_coef: float = 0.03
    kl_in: Literal["loss", "reward"] = "reward"


@dataclass(frozen=True)
class ClippedConfig(PolicyConfig):
    """Settings of the clipped update."""

    epochs: int = 2
    """Times that a rollout is used."""
    minibatches: int = 2
    """Gradient steps of each time."""
    clip: float = 0.2
    """ε: how far a ratio may go before its gradient is cut off."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether ratios are those of tokens or of whole answers."""
    old_log_probs: Literal["sampler", "recomputed"] = "sampler"
    """Where π_old comes from: the sampler kept it, or one more forward pass tells it."""
    target_kl: float | None = None
    """The update stops once the policy is this far from π_old, in nats a token (k3)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs", "minibatches")
        if not self.clip > 0 or (self.target_kl is not None and not self.target_kl > 0):
            raise ValueError(
                f"clip is {self.clip} and target_kl {self.target_kl}; give more than 0."
            )


@dataclass(frozen=True)
class PPOConfig(ClippedConfig):
    """Settings of PPO."""

    gamma: float = 0.0
    """Discount over the turns of a dialogue; 0 credits each answer with its own reward only."""
    lam: float = 0.95
    """λ of GAE: 1 trusts the rewards, 0 the critic."""
    value_coef: float = 0.1
    """Weight of the critic's loss."""
    value_clip: float = 0.0
    """How far a value may move in one update; 0 for any distance."""
    normalise_advantages: bool = True
    """Scale the advantages of a rollout to mean 0 and standard deviation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "value_coef", "value_clip")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it lies in [0, 1].")


@dataclass(frozen=True)
class GRPOConfig(ClippedConfig):
    """Settings of GRPO."""

    std: bool = False
    """Divide by the standard deviation of the group, as the paper does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 2:
            raise ValueError(
                f"GRPO compares answers to one prompt, but group_size is {self.group_size}. Use 2 "
                "or more, or ppo."
            )


@dataclass(frozen=True)
class ImmediateRewardConfig(ReinforceConfig):
    """Settings of the document's update."""

    learning_rate: float = 1e-4
    """α."""
    beta: float = 1.0
    """β: weight of the gradient."""
    lam: float = 0.01
    """λ: strength of the pull towards the anchor."""
    direction: Direction = "descend"
    """Up the loss, as printed, or down, as the document's words say."""
    loss_term: LossTerm = "none"
    """The loss itself: added to every coordinate (as printed), a factor of the step, or unused."""
    anchor: Anchor = "initial"
    """What regularisation pulls towards: zero (as printed) or the initial weights."""
    precondition: Precondition = "adam"
    """The gradient as it is, or Adam's adaptive step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma:
            raise ValueError(
                f"gamma is {self.gamma}; the immediate-reward update credits an answer with its "
                "own reward only. Use reinforce or ppo for returns."
            )
        if self.weight_decay:
            raise ValueError(
                f"weight_decay is {self.weight_decay}; lam is what regularises this update."
            )


@dataclass(frozen=True)
class SupervisedConfig(PolicyConfig):
    """Settings of maximum likelihood."""

    prompts: int = 128
    group_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_coef and self.kl_in == "reward":
            raise ValueError(
                "kl_in is 'reward', and imitation learns from no reward. Use kl_in='loss'."
            )


# --- agents without a language model --------------------------------------------------------------


@dataclass(frozen=True)
class BaselineConfig(AgentConfig):
    """Settings of agents without a language model."""

    episodes: int = 16
    """Episodes that are played side by side, and learned from together."""

    @property
    def rows(self) -> int:
        """Episodes that are played side by side."""
        return self.episodes

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "episodes")


@dataclass(frozen=True)
class LinearBanditConfig(BaselineConfig):
    """Settings of linear bandits."""

    ridge: float = 1.0
    """Precision of the prior on the weights."""
    exploration: float = 0.5
    """LinUCB: width of the confidence bound, in standard deviations. Thompson: factor of the
    posterior's standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "exploration")
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}; give more than 0.")


# --- Stable-Baselines3 ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SB3Config(AgentConfig):
    """Settings of every agent of Stable-Baselines3, by its own names."""

    n_envs: int = 16
    """Environments that are played side by side."""
    n_steps: int | None = None
    """Steps of each environment in one iteration: answers, or on writing tasks tokens."""
    learning_rate: float | None = None
    """Of the optimizer."""
    gamma: float | None = None
    """Discount of one step. None is 0 on choosing tasks, where rewards are immediate, and 1 on
    writing tasks, where the reward of an answer comes with its last token."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of each network. (Choosing tasks.)"""
    scaling: Scaling = "choice"
    """How features are scaled: over the candidates of a choice, or not at all. (Choosing tasks.)"""

    family_defaults: ClassVar[dict[Family, dict[str, Any]]] = {}
    """What a setting is where it is None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "hidden", tuple(self.hidden))  # it comes from JSON as a list
        at_least(self, 1, "n_envs", "n_steps")
        at_least(self, 0, "max_grad_norm", "learning_rate")
        _refuse_a_step_beyond_float32(self.learning_rate or 0.0)
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma is {self.gamma}; a discount lies in [0, 1].")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden is {self.hidden}; a layer has a width of 1 or more.")


@dataclass(frozen=True)
class OnPolicyConfig(SB3Config):
    """Settings of PPO and A2C."""

    gae_lambda: float = 0.95
    """λ of generalised advantage estimation; with gamma 0 it changes nothing."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_new_tokens: int = 24
    """Length limit of an answer. (Writing tasks.)"""
    context: int = 1024
    """Most tokens of a conversation that are seen, and at most the model's own. (Writing tasks.)"""

    default_policy = "tiny"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "ent_coef", "vf_coef")
        at_least(self, 1, "max_new_tokens")
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"gae_lambda is {self.gae_lambda}; it lies in [0, 1].")


def _refuse_a_single_advantage(config: SB3Config, normalise: bool) -> None:
    if normalise and config.n_steps == config.n_envs == 1:
        raise ValueError(
            "n_steps and n_envs are 1, and a single advantage has no standard deviation to be "
            "scaled by. Give one of them 2 or more, or leave advantages as they are: "
            "normalize_advantage=False."
        )


@dataclass(frozen=True)
class SB3PPOConfig(OnPolicyConfig):
    """Settings of PPO. Where a default is None, it depends on the family of the task."""

    batch_size: int | None = None
    """Steps in a minibatch."""
    n_epochs: int = 4
    """Times that a rollout is used."""
    clip_range: float = 0.2
    """How far a ratio may go before its gradient is cut off."""
    normalize_advantage: bool = True
    """Whether the advantages of a minibatch are standardised."""
    target_kl: float | None = None
    """The update stops at 1.5 times this divergence from the policy that sampled."""

    family_defaults = {  # noqa: RUF012 (annotated as a class variable above)
        "choosing": {"n_steps": 8, "learning_rate": 1e-3, "gamma": 0.0, "batch_size": 64},
        "writing": {"n_steps": 64, "learning_rate": 6e-4, "gamma": 1.0, "batch_size": 512},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "n_epochs")
        at_least(self, 2, "batch_size")
        _refuse_a_single_advantage(self, self.normalize_advantage)
        if not self.clip_range > 0:
            raise ValueError(f"clip_range is {self.clip_range}; give more than 0.")


@dataclass(frozen=True)
class SB3A2CConfig(OnPolicyConfig):
    """Settings of A2C. Where a default is None, it depends on the family of the task."""

    normalize_advantage: bool = False
    """Whether the advantages of a rollout are standardised."""
    use_rms_prop: bool = False
    """RMSProp, the optimizer of the original, in place of Adam."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_a_single_advantage(self, self.normalize_advantage)

    family_defaults = {  # noqa: RUF012
        "choosing": {"n_steps": 4, "learning_rate": 2e-3, "gamma": 0.0},
        "writing": {"n_steps": 32, "learning_rate": 6e-4, "gamma": 1.0},
    }


@dataclass(frozen=True)
class SB3DQNConfig(SB3Config):
    """Settings of DQN. Where a default is None, it is that of choosing tasks."""

    max_grad_norm: float = 10.0
    """The gradient is scaled down to this norm."""
    batch_size: int = 128
    """Remembered answers in a gradient step."""
    gradient_steps: int = 1
    """Gradient steps after each step of the environments."""
    buffer_size: int = 20_000
    """Answers that are remembered."""
    learning_starts: int = 256
    """Answers given at random before learning begins."""
    target_update_interval: int = 512
    """Answers between updates of the target network; with gamma 0 it is not used."""
    exploration_initial_eps: float = 1.0
    """Share of random answers at the beginning."""
    exploration_final_eps: float = 0.05
    """Share of random answers at the end."""
    exploration_steps: int = 2048
    """Answers over which the share falls, linearly; it does not depend on how long a run is."""

    family_defaults = {  # noqa: RUF012
        "choosing": {"n_steps": 8, "learning_rate": 1e-3, "gamma": 0.0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self,
            1,
            *("batch_size", "gradient_steps", "buffer_size", "target_update_interval"),
            "exploration_steps",
        )
        at_least(self, 0, "learning_starts")
        for name in ("exploration_initial_eps", "exploration_final_eps"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share lies in [0, 1].")


SETTINGS: dict[str, type[AgentConfig]] = {
    "reinforce": ReinforceConfig,
    "rloo": RLOOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "immediate-reward": ImmediateRewardConfig,
    "supervised": SupervisedConfig,
    "random": BaselineConfig,
    "linucb": LinearBanditConfig,
    "thompson": LinearBanditConfig,
    "sb3-ppo": SB3PPOConfig,
    "sb3-a2c": SB3A2CConfig,
    "sb3-dqn": SB3DQNConfig,
}
"""Name of an agent -> its settings."""


def settings_class(agent: str) -> type[AgentConfig]:
    """Return the settings of the agent of that name.

    Raises:
        ValueError: There is none.
    """
    if agent not in SETTINGS:
        raise ValueError(
            f"There is no agent {agent!r}.{did_you_mean(agent, SETTINGS)} "
            f"There are: {', '.join(SETTINGS)}."
        )
    return SETTINGS[agent]


ConfigT = TypeVar("ConfigT", bound=AgentConfig)


def stored_settings(
    kind: type[ConfigT], agent: str, stored: Mapping[str, Any], origin: str
) -> ConfigT:
    """Return the settings of an agent that a file holds.

    A setting that the file does not know came after it was written: it has its default.

    Args:
        kind: Their class.
        agent: Name of the agent, for the error.
        stored: Its settings, as the file holds them.
        origin: What was written, and by which version, for the error.

    Raises:
        ValueError: It holds a setting that the agent does not have.
    """
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(
            f"{origin} with settings that {agent} does not have here "
            f"({llm_envs.__version__}): {', '.join(unknown)}. Use that version."
        )
    return kind(**stored)
