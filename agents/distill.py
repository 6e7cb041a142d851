"""Distillation: a smaller language model learns the distributions of one that writes.

The student is made of those layers of its teacher that it misses most, or is another model of the
same vocabulary. The command line for it is :mod:`agents.compress`.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor, nn

from agents.objectives import kl_divergence
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.policies.models import in_chunks, split_model
from agents.rollout import collect, episode_seeds
from agents.sampling import SamplingConfig, at_least_float32
from agents.settings import MICRO_BATCH_TOKENS, at_least


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns (--method distill)."""

    student: str | None = None
    """Student to train: "tiny", a folder, or a hub id, with the policy's vocabulary. By default it
    is made of some layers of the policy."""
    layers: int | None = None
    """Layers of the policy that the student is made of, those that are missed most; None is half
    of them."""
    updates: int = 200
    """Gradient steps, each on new answers of the policy."""
    prompts: int = 16
    """Different episodes in one of them."""
    group_size: int = 2
    """Times that the policy plays each."""
    learning_rate: float = 1e-3
    """Of AdamW, falling to 0."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Most tokens in one forward pass."""

    def __post_init__(self) -> None:
        at_least(self, 1, "updates", "prompts", "group_size", "micro_batch_tokens", "layers")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; give more than 0.")
        if self.student is not None and self.layers is not None:
            raise ValueError(
                f"--student {self.student} has its own layers; leave --layers {self.layers} out."
            )


def shrunk(model: Any, kept: Sequence[int]) -> Any:
    """Return a model made of some layers of another, in their order.

    Args:
        model: A causal language model.
        kept: Numbers of the layers, rising, from 0.

    Raises:
        ValueError: It is not known where its layers are.
    """
    config = copy.deepcopy(model.config)
    depth = config.num_hidden_layers
    found = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth and type(m[0]) is type(m[-1])
    ]
    if not found:
        raise ValueError(
            f"No student can be made of the layers of {type(model).__name__}: it is not known "
            "where they are. Give a --student."
        )
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    small = type(model)(config)
    prefix = found[0] + "."
    place = {f"{prefix}{old}.": f"{prefix}{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = weight
        elif (layer := prefix + name[len(prefix) :].split(".")[0] + ".") in place:
            weights[place[layer] + name.removeprefix(layer)] = weight
    small.load_state_dict(weights)
    return small.to(device=model.device, dtype=model.dtype)


def made_of(teacher: CausalLMPolicy, kept: Sequence[int]) -> CausalLMPolicy:
    """Return the policy that some layers of a policy make (see :func:`shrunk`)."""
    student = copy.copy(teacher)
    student.model = shrunk(teacher.model, kept)
    student.parts = split_model(student.model)
    return student


def missed_most(
    teacher: CausalLMPolicy, layers: int, sequences: Sequence[TokenSequence]
) -> list[int]:
    """Return the layers that are left when those that are missed least go, one after another.

    Each time goes the layer without which the divergence from the teacher is the smallest. That
    costs about D²/2 readings of the conversations for D layers. What a layer changes of the hidden
    state is cheaper to know and no guide: a last layer may change much that no answer shows.

    Source: the greedy pruning of Gromov et al. (2024), "The Unreasonable Ineffectiveness of the
    Deeper Layers", with the divergence of the output in place of their angle between states.

    Args:
        teacher: Policy of D layers.
        layers: How many are left.
        sequences: Conversations of the teacher.

    Raises:
        ValueError: The teacher has fewer.
    """
    depth = teacher.model.config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(
            f"A student of {layers} layers cannot be made of {type(teacher.model).__name__}, "
            f"which has {depth}. Give --layers of at most that, or a --student."
        )
    kept = list(range(depth))
    while len(kept) > layers:

        def without(layer: int, kept: list[int] = kept) -> float:
            student = made_of(teacher, [k for k in kept if k != layer])
            return mean_divergence(teacher, student, sequences)

        kept.remove(min(kept, key=without))
    return kept


def divergences(
    teacher: CausalLMPolicy, student: CausalLMPolicy, sequences: Sequence[TokenSequence]
) -> Tensor:
    """Return KL(teacher ‖ student) of the next token wherever one was sampled, at temperature 1.

    Args:
        teacher: Its distributions are what is to be learned.
        student: Has the same vocabulary; the gradients are its.
        sequences: Conversations, N sampled tokens in all.

    Returns:
        (N,) in nats.
    """
    found = student.lay_out(sequences, teacher)
    with torch.no_grad():
        taught = teacher.read(found.forest)
    learned = student.read(found.forest)

    def at(places: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            target = at_least_float32(taught.logits(places)).log_softmax(-1)
        return (kl_divergence(target, at_least_float32(learned.logits(places)).log_softmax(-1)),)

    (kls,) = in_chunks(at, found.sampled.places, vocabulary=teacher.vocabulary)
    return kls[found.sampled.place_of]


def mean_divergence(
    teacher: CausalLMPolicy,
    student: CausalLMPolicy,
    sequences: Sequence[TokenSequence],
    *,
    learn: bool = False,
) -> float:
    """Return the mean of :func:`divergences`; ``learn`` adds its gradient to the student's."""
    tokens = max(1, sum(t >= 0 for s in sequences for t in s.turns))
    total = 0.0
    for members in student.micro_batches(sequences):
        with torch.set_grad_enabled(learn):
            share = divergences(teacher, student, [sequences[i] for i in members]).sum() / tokens
        if learn:
            share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    return total


def conversations(
    teacher: CausalLMPolicy,
    env: str,
    config: DistillConfig,
    *,
    env_kwargs: dict[str, Any] | None = None,
    max_new_tokens: int,
    seed: int,
) -> Iterator[list[TokenSequence]]:
    """Let a policy play the training split, batch after batch without end.

    Args:
        teacher: Plays, at temperature 1.
        env: Id of the environment.
        config: Size of a batch.
        env_kwargs: Further arguments of the environment; a split among them does not count.
        max_new_tokens: Length limit of an answer.
        seed: Seed of episodes and answers.
    """
    rows = config.prompts * config.group_size
    envs: Any = gym.make_vec(env, num_envs=rows, **{**(env_kwargs or {}), "split": "train"})
    teacher.generator.manual_seed(seed)
    try:
        for batch in itertools.count():
            seeds = episode_seeds(seed, batch, config.prompts, config.group_size)
            sampling = SamplingConfig(max_new_tokens)
            # No name holds the player while the student learns: its caches go.
            yield list(collect(teacher.begin(sampling), envs, seeds=seeds).sequences)
    finally:
        envs.close()


def make_student(
    teacher: CausalLMPolicy,
    config: DistillConfig,
    device: str,
    sequences: Sequence[TokenSequence],
) -> CausalLMPolicy:
    """Return the student before it learns.

    Args:
        teacher: Policy that it will learn from.
        config: What it is.
        device: Where it is.
        sequences: Conversations of the teacher, by which the layers are chosen.

    Raises:
        ValueError: Its vocabulary is another one.
    """
    if config.student is None:
        depth = teacher.model.config.num_hidden_layers
        student = made_of(
            teacher, missed_most(teacher, config.layers or max(1, depth // 2), sequences)
        )
    else:
        student = CausalLMPolicy.from_pretrained(config.student, device=device)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"--student {config.student} has another vocabulary than the policy, so its "
            "distributions cannot be compared. Leave --student out to make one of the policy's "
            "layers."
        )
    student.micro_batch_tokens = config.micro_batch_tokens
    return student


def distill(
    teacher: CausalLMPolicy,
    student: CausalLMPolicy,
    batches: Iterable[Sequence[TokenSequence]],
    config: DistillConfig,
    *,
    progress: Callable[[int, float], None] = lambda update, kl: None,
) -> None:
    """Train a student to have its teacher's distributions where the teacher goes.

    L = (1/N) Σ_t KL(p_teacher(· | x_t) ‖ p_student(· | x_t)) over the N tokens of answers that the
    teacher samples on the training split: the forward divergence, which covers all that it says.

    Source: Hinton et al. (2015), "Distilling the Knowledge in a Neural Network"; Kim and Rush
    (2016), "Sequence-Level Knowledge Distillation".

    Args:
        teacher: Its distributions are learned.
        student: Is trained, in place.
        batches: Conversations of the teacher (see :func:`conversations`), one batch an update.
        config: How long, how fast.
        progress: Told the number of each update and its mean divergence.
    """
    parameters = list(student.model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    for update, sequences in enumerate(itertools.islice(batches, config.updates)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - update / config.updates)
        kl = mean_divergence(teacher, student, sequences, learn=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(update + 1, kl)
