"""Tasks of three tokens, models of a few thousand weights, and what tests ask of both.

The tokens are the end of sequence, "a" and "b" (and a fourth for every other word). Every answer
of at most two tokens can be listed, so expectations are sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gymnasium.envs.registration import registry
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import llm_envs
from agents import CandidatePolicy, CausalLMPolicy
from agents.policies.causal_lm import TokenSequence
from agents.policies.models import eval_mode
from agents.policy_agent import PolicyAgent
from agents.registry import agent_class
from agents.rollout import Rollout, collect
from agents.sampling import Completion
from llm_envs.core import registration
from llm_envs.core.task import ChoosingTask, Episode, Outcome, Task, WritingTask

END, A, B = 0, 1, 2
CONTEXT = 64

# --- tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """What is asked for, turn by turn."""

    id: str
    letters: str

    @property
    def unit(self) -> str:
        return self.id


class Identity(WritingTask[Wanted]):
    """Say the letter that the user says; the episode of two letters has two turns."""

    def __init__(self, split: str = "train", letters: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__()
        self.examples = tuple(Wanted(f"{split} {w}", w) for w in letters)

    def turns(self, example: Wanted) -> int:
        return len(example.letters)

    def ask(self, example: Wanted, turn: int) -> str:
        return example.letters[turn]

    def answers(self, example: Wanted, turn: int) -> tuple[str, ...]:
        return (example.letters[turn],)

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(float(a in r)) for a, r in zip(answers, references, strict=True)]


class Bandit(Identity):
    """The prompt says nothing; "b" is right."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(split, ("b",))

    def ask(self, example: Wanted, turn: int) -> str:
        return "?"


class Pick(ChoosingTask[Wanted]):
    """Choose the candidate that the user says, among two in random order; the feature tells it."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(2, 1)
        self.examples = tuple(Wanted(f"{split} {w}", w) for w in "ab")

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        candidates = tuple("ab" if rng.random() < 0.5 else "ba")
        features = np.array([[c == example.letters] for c in candidates], np.float32)
        seen = {"prompt": example.letters, "candidates": candidates, "features": features}
        return Episode(example, rng, seen, ({"role": "user", "content": example.letters},))

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(float(e.observation["candidates"][a] == e.example.letters))
            for e, a in zip(episodes, actions, strict=True)
        ]

    def candidate_scores(self, episode: Episode[Wanted]) -> npt.NDArray[np.float64]:
        candidates = episode.observation["candidates"]
        return np.array([c == episode.example.letters for c in candidates], np.float64)

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        episode.finished = True
        said = episode.observation["candidates"][action]
        episode.messages += ({"role": "assistant", "content": said},)


class Steps(ChoosingTask[Wanted]):
    """Choose letter by letter; an episode has as many turns as letters."""

    def __init__(self, split: str = "train", letters: tuple[str, ...] = ("ab", "b")) -> None:
        super().__init__(2, 1)
        self.examples = tuple(Wanted(f"{split} {w}", w) for w in letters)

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        return Episode(example, rng, self._ask(example.letters[0], ""))

    def _ask(self, letter: str, said: str) -> dict[str, Any]:
        prompt = " ".join([*said, letter])
        return {"prompt": prompt, "candidates": ("a", "b"), "features": np.zeros((2, 1), "f4")}

    def score(self, episodes: Any, actions: Any) -> list[Outcome]:
        return [
            Outcome(float("ab"[a] == e.example.letters[e.turn]))
            for e, a in zip(episodes, actions, strict=True)
        ]

    def candidate_scores(self, episode: Episode[Wanted]) -> npt.NDArray[np.float64]:
        return np.array([c == episode.example.letters[episode.turn] for c in "ab"], np.float64)

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        letters = episode.example.letters
        episode.finished = episode.turn >= len(letters)
        said = "".join(episode.observation["prompt"].split()) + "ab"[action]
        episode.observation = self._ask("?" if episode.finished else letters[episode.turn], said)


TASKS = {"Identity-v9": Identity, "Bandit-v9": Bandit, "Pick-v9": Pick, "Steps-v9": Steps}


@contextmanager
def registered(tasks: Mapping[str, type[Task[Any]]]) -> Iterator[None]:
    """Register tasks as environments for a while."""
    before = list(registration._IDS)
    for name, task in tasks.items():
        llm_envs.register(name, task)
    try:
        yield
    finally:
        for name in set(registration._IDS) - set(before):
            del registry[name], registry[f"llm_envs/{name}"]
        registration._IDS[:] = before


def task_fixture(tasks: Mapping[str, type[Task[Any]]], *, autouse: bool = True) -> Any:
    """A fixture for all tests of a module: tasks registered as environments, one thread."""

    @pytest.fixture(scope="module", autouse=autouse)
    def registered_tasks() -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with registered(tasks):
            yield
        torch.set_num_threads(threads)

    return registered_tasks


# --- models and agents -------------------------------------------------------------------------


def make_tokenizer(letters: str = "ab") -> Any:
    """One token a letter; the words of the layout are letters too, of one kind."""
    words = {"<end>": END, letters[0]: A, letters[1]: B, "?": 3}
    raw = Tokenizer(models.WordLevel(words, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def make_model(
    family: str = "llama",
    vocabulary: int = 4,
    seed: int = 0,
    dropout: float = 0.0,
    *,
    layers: int = 2,
    inner: int = 32,
    kv_heads: int = 2,
    scale: float | None = None,
) -> Any:
    """A model of width 16 with 2 heads.

    Args:
        family: "llama", "gpt2" (Conv1D; head tied to the embeddings), "qwen" (tied; has kinds of
            layers) or "granite" (scales its logits, so that it cannot be split).
        vocabulary: Number of tokens.
        seed: Seed of the weights.
        dropout: Share of what is dropped in training mode.
        layers: Number of layers.
        inner: Width inside the feed-forward layers; not of GPT-2.
        kv_heads: Heads of keys and values; not of GPT-2.
        scale: Standard deviation of the weights; 0.4 for GPT-2 and 0.25 for others if left out.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": END, "eos_token_id": END}
    if family == "gpt2":
        drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        shape = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": layers, "n_head": 2}
        common |= {**shape, **drops, "initializer_range": scale or 0.4}
        return GPT2LMHeadModel(GPT2Config(**common))
    common |= {
        "hidden_size": 16,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": CONTEXT,
        "attention_dropout": dropout,
        "initializer_range": scale or 0.25,
    }
    if family == "qwen":
        return Qwen3ForCausalLM(Qwen3Config(**common, tie_word_embeddings=True, head_dim=8))
    if family == "granite":
        return GraniteForCausalLM(GraniteConfig(**common, logits_scaling=2.0))
    return LlamaForCausalLM(LlamaConfig(**common))


def make_agent(
    env: str = "Identity-v9",
    family: str = "llama",
    seed: int = 0,
    agent: str = "reinforce",
    **settings: Any,
) -> Any:
    """An agent with a tiny model, or without one if it needs none."""
    made = agent_class(agent)
    dropout = settings.pop("dropout", 0.0)
    defaults: dict[str, Any] = {"eval_every": 0}
    policy: Any = "none"
    if issubclass(made, PolicyAgent):
        choosing = isinstance(gym.make(env).action_space, gym.spaces.Discrete)
        chosen = CandidatePolicy if choosing else CausalLMPolicy
        policy = chosen(make_model(family, dropout=dropout), make_tokenizer())
        defaults |= {"prompts": 4, "group_size": 4, "max_new_tokens": 3}
    return made(policy, env, seed=seed, **{**defaults, **settings})


def gradient(agent: Any) -> Tensor:
    """All gradients in one vector; they are cleared."""
    found = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
        for p in agent.policy.model.parameters()
    ]
    agent.policy.model.zero_grad()
    return torch.cat(found)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


def parameters(agent: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()])


def rollout_of(agent: Any, seed: int = 5) -> Rollout:
    seeds = np.repeat(np.arange(agent.config.prompts), agent.config.group_size) + seed
    return collect(agent.policy.begin(), agent.envs, seeds=seeds.tolist())


def token_log_probs(model: Any, sequence: TokenSequence, temperature: float = 1.0) -> Tensor:
    """Log-probability of every sampled token of a sequence, read alone."""
    with eval_mode(model):
        logits = model(input_ids=torch.tensor([sequence.ids])).logits[0]
    log_dists = (logits / temperature).log_softmax(-1)
    sampled = [i for i, turn in enumerate(sequence.turns) if turn >= 0]
    return torch.stack([log_dists[i - 1, sequence.ids[i]] for i in sampled])


# --- all answers of at most two tokens ---------------------------------------------------------

PROMPT = [3, A, 3]
# Every answer of at most two tokens, the fourth token of the vocabulary included.
ANSWERS = [[END], *([first, last] for first in (A, B, 3) for last in (END, A, B, 3))]


def listed(rewards: Tensor, chosen: Sequence[int]) -> Rollout:
    """A rollout of the given answers to one prompt."""
    sequences = []
    for row, index in enumerate(chosen):
        ids = ANSWERS[index]
        sequences.append(TokenSequence(row))
        sequences[-1].read(PROMPT)
        sequences[-1].wrote(0, Completion(ids, [0.0] * len(ids), cut=ids[-1] != END))
    count = len(chosen)
    return Rollout(
        sequences=sequences,
        decision_of=[torch.full((len(ANSWERS[k]),), row) for row, k in enumerate(chosen)],
        rewards=rewards[list(chosen)],
        rows=torch.arange(count),
        turns=torch.zeros(count, dtype=torch.long),
        scores=rewards[list(chosen)],
        parts={},
        episodes=count,
        cut_share=0.0,
    )


def answer_log_probs(model: Any) -> Tensor:
    """(answers,) log π of every answer, one forward pass each, by hand."""
    found = []
    for ids in ANSWERS:
        logits = model(input_ids=torch.tensor([PROMPT + ids])).logits[0].log_softmax(-1)
        found.append(sum(logits[len(PROMPT) - 1 + i, t] for i, t in enumerate(ids)))
    return torch.stack(found)  # type: ignore[arg-type]
