"""Inputs at the edge of what makes sense: they work as they should, or are refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents import CandidatePolicy, CausalLMPolicy, objectives
from agents.registry import AGENTS, agent_class
from agents.rollout import Rollout
from llm_envs.core.task import ChoosingTask, Episode, Outcome, WritingTask
from three_tokens import END, A, B, make_tokenizer, registered

OTHER = 3
CONTEXT = 32


@dataclass(frozen=True)
class Given:
    """What is shown first, and how often the policy is asked."""

    id: str
    text: str
    turns: int = 1
    unit: str = "one"


class Echo(WritingTask[Given]):
    """Whatever is shown, as it stands; an "a" is worth a half and everything else nothing."""

    def __init__(self, split: str = "train", text: str = "a", turns: int = 1) -> None:
        super().__init__()
        self.examples = (Given(f"{split}", text, turns),)

    def begin(self, example: Given, rng: np.random.Generator) -> Episode[Given]:
        return Episode(example, rng, example.text, ({"role": "user", "content": example.text},))

    def turns(self, example: Given) -> int:
        return example.turns

    def ask(self, example: Given, turn: int) -> str:
        return example.text

    def answers(self, example: Given, turn: int) -> tuple[str, ...]:
        return ("a",)

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(0.55 * answer.count("a")) for answer in answers]


class Offer(ChoosingTask[Given]):
    """Choose among the candidates that are given; the first one is worth 0.55."""

    def __init__(
        self, split: str = "train", text: str = "a", candidates: Sequence[str] = ("a", "b")
    ) -> None:
        super().__init__(len(candidates), 1)
        self.examples = (Given(split, text),)
        self.candidates = tuple(candidates)

    def begin(self, example: Given, rng: np.random.Generator) -> Episode[Given]:
        features = np.zeros((len(self.candidates), 1), np.float32)
        seen = {"prompt": example.text, "candidates": self.candidates, "features": features}
        return Episode(example, rng, seen, ({"role": "user", "content": example.text},))

    def candidate_scores(self, episode: Episode[Given]) -> Any:
        return np.array([0.55, *[0.0] * (len(self.candidates) - 1)])

    def score(self, episodes: Sequence[Episode[Given]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(self.candidate_scores(e)[a]) for e, a in zip(episodes, actions, strict=True)
        ]

    def proceed(self, episode: Episode[Given], action: Any, outcome: Outcome) -> None:
        episode.finished = True
        said = self.candidates[action]
        episode.messages += ({"role": "assistant", "content": said},)


@pytest.fixture(scope="module", autouse=True)
def _tasks() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with registered({"Echo-v9": Echo, "Offer-v9": Offer}):
        yield
    torch.set_num_threads(threads)


def make_agent(name: str, env: str = "Echo-v9", says: int | None = None, **settings: Any) -> Any:
    """Make an agent; ``says`` is the only token that its policy says, by a bias of its head."""
    cls = agent_class(name)
    given: dict[str, Any] = {"eval_every": 0, **settings}
    given["env_kwargs"] = {
        key: given.pop(key) for key in ("text", "turns", "candidates") if key in given
    }
    if cls.config_class.default_policy == "none":
        return cls("none", env, **{"episodes": 4, **given})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=END,
        eos_token_id=END,
        initializer_range=0.25,
    )
    model: Any = LlamaForCausalLM(config)
    if says is not None:
        head = torch.nn.Linear(16, 4)
        head.weight = model.lm_head.weight
        head.bias.data = torch.nn.functional.one_hot(torch.tensor(says), 4) * 60.0
        model.lm_head = head
    policy = CandidatePolicy if env == "Offer-v9" else CausalLMPolicy
    few = {"prompts": 2, "group_size": 3, "max_new_tokens": 4}
    return cls(policy(model, make_tokenizer()), env, **{**few, **given})


def learned(agent: Any) -> tuple[Rollout, dict[str, float], float]:
    """Let an agent learn once; return what it played, its metrics, and how far weights moved."""
    before = [p.detach().clone() for p in agent.parameters]
    collect, played = agent.collect, []
    agent.collect = lambda: played.append(collect()) or played[-1]
    metrics = agent.iterate()
    assert all(np.isfinite(v) for v in metrics.values()), metrics
    moved = max(
        float((p.detach() - old).abs().max())
        for p, old in zip(agent.parameters, before, strict=True)
    )
    assert np.isfinite(moved)
    return played[0], metrics, moved


# Everything that could divide by nothing or take the logarithm of it.
FULL = {"entropy_coef": 0.1, "kl_coef": 0.1, "learning_rate": 1e-3}
BY_REWARD = ["reinforce", "rloo", "ppo", "grpo", "immediate-reward"]
WRITERS = [*BY_REWARD, "supervised"]


@pytest.mark.parametrize("name", WRITERS)
def test_empty_answers(name: str) -> None:
    agent = make_agent(name, says=END, turns=2, **FULL)
    rollout, metrics, _ = learned(agent)
    if name == "supervised":
        return  # it says what it is told
    assert metrics["rollout/answer_tokens"] == 1  # the end of sequence, which is sampled too
    assert metrics["rollout/reward"] == -1
    assert metrics["rollout/cut"] == 0
    for sequence in rollout.sequences:
        said = [t for t, turn in zip(sequence.ids, sequence.turns, strict=True) if turn >= 0]
        assert said == [END, END]
    assert agent.predict("a")[0] == ""
    assert agent.evaluate("validation").score == 0


@pytest.mark.parametrize("env", ["Echo-v9", "Offer-v9"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("reinforce", {}),
        ("reinforce", {"baseline": "batch"}),
        ("rloo", {"kl_coef": 0.0}),
        ("ppo", {"value_coef": 0.0}),
        ("ppo", {"value_coef": 0.0, "prompts": 1, "group_size": 7}),
        ("grpo", {"std": True}),
        ("immediate-reward", {}),
    ],
)
def test_all_answers_alike(name: str, settings: dict[str, Any], env: str) -> None:
    alike: dict[str, Any] = {"says": A} if env == "Echo-v9" else {"candidates": ["a"]}
    agent = make_agent(name, env, **alike, learning_rate=1e-3, max_new_tokens=1, **settings)
    rollout, metrics, moved = learned(agent)
    [reward] = set(rollout.rewards.tolist())
    assert reward == pytest.approx(0.1)
    assert metrics["train/grad_norm"] == 0
    assert moved == 0


@pytest.mark.parametrize("size", [2, 3, 7, 48])
@pytest.mark.parametrize("reward", [0.1, -0.9, 1 / 3])
def test_rewards_all_alike_have_no_advantage(size: int, reward: float) -> None:
    """Rounding must not teach anything: (0.1 - mean) / std of seven 0.1 would be -0.41."""
    rewards, group = torch.full((size,), reward), torch.zeros(size, dtype=torch.long)
    for advantages in (
        objectives.batch_mean_advantage(rewards),
        objectives.normalised_advantage(rewards),
        objectives.leave_one_out_advantage(rewards, group),
        objectives.group_advantage(rewards, group, std=True),
    ):
        assert advantages.tolist() == [0.0] * size


@pytest.mark.parametrize("name", WRITERS)
def test_one_token_prompts(name: str) -> None:
    agent = make_agent(name, text="a", **FULL)
    rollout, _, _ = learned(agent)
    assert all(s.ids[0] == A and s.turns[:2] == [-1, 0] for s in rollout.sequences)
    assert all(s.states == [0] for s in rollout.sequences)


@pytest.mark.parametrize("name", BY_REWARD)
def test_a_support_of_one_token(name: str) -> None:
    """With top_k = 1 nothing is left to chance: log-probability, entropy and gradient are 0."""
    agent = make_agent(name, top_k=1, entropy_coef=0.1, learning_rate=1e-3)
    rollout, metrics, moved = learned(agent)
    assert {p for s in rollout.sequences for p in s.log_probs} == {0.0}
    assert metrics["train/entropy"] == 0
    assert metrics["train/grad_norm"] == 0 or name == "ppo"  # whose critic has learned
    assert moved == 0 or name == "ppo"
    learned(make_agent(name, top_k=1, **FULL))  # the KL divergence is that of full distributions


@pytest.mark.parametrize("name", WRITERS)
def test_prompts_beyond_the_context_window(name: str) -> None:
    text = " ".join(["b"] * CONTEXT + ["a"] * 20)
    agent = make_agent(name, text=text, **FULL)
    with pytest.warns(UserWarning, match=f"longer than the model's context of {CONTEXT} tok") as w:
        rollout, _, _ = learned(agent)
    assert len(w) == 1
    assert agent.policy.truncated_prompts == 6  # counted one by one, told once
    room = CONTEXT - 4
    for sequence in rollout.sequences:
        assert len(sequence) <= CONTEXT
        assert sequence.ids[:room] == [B] * (room - 20) + [A] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(agent)
    assert agent.policy.truncated_prompts == 12


@pytest.mark.parametrize("name", WRITERS)
def test_choosing_prompts_beyond_the_context_window(name: str) -> None:
    text = " ".join(["b"] * CONTEXT + ["a"] * 20)
    agent = make_agent(name, "Offer-v9", text=text, candidates=["a", "b b b"], **FULL)
    with pytest.warns(UserWarning, match=f"longer than the model's context of {CONTEXT} tok") as w:
        rollout, _, _ = learned(agent)
    assert len(w) == 1
    assert agent.policy.truncated_prompts == 6
    room = CONTEXT - 3
    for decision in rollout.sequences:
        assert decision.prompt == (B,) * (room - 20) + (A,) * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(agent)
    assert agent.policy.truncated_prompts == 12


def test_a_candidate_beyond_the_context_window_is_refused() -> None:
    agent = make_agent("reinforce", "Offer-v9", candidates=["a", "b " * CONTEXT])
    with pytest.raises(ValueError, match=f"longer than the context of {CONTEXT} tokens"):
        agent.learn(1)


@pytest.mark.parametrize("name", BY_REWARD)
def test_answers_that_fill_the_context(name: str) -> None:
    text = " ".join(["a"] * (CONTEXT - 4))
    agent = make_agent(name, says=B, text=text, **FULL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout, metrics, _ = learned(agent)
    assert metrics["rollout/cut"] == 1
    assert {len(s) for s in rollout.sequences} == {CONTEXT}
    assert agent.policy.truncated_prompts == 0
    # A second turn has no room left behind them: the conversation begins anew with its end.
    agent = make_agent(name, says=B, text=text, turns=2, **FULL)
    with pytest.warns(UserWarning, match="longer than the model's context"):
        rollout, _, _ = learned(agent)
    assert {len(s) for s in rollout.sequences} == {CONTEXT}
    assert len(rollout.sequences) == 12


@pytest.mark.parametrize("env", ["Echo-v9", "Offer-v9"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("reinforce", {"baseline": "none"}),
        ("reinforce", {"baseline": "batch"}),
        ("reinforce", {"baseline": "moving"}),
        ("reinforce", {"baseline": "critic"}),
        ("immediate-reward", {"baseline": "moving"}),
        ("ppo", {}),
        ("supervised", {}),
    ],
)
def test_a_batch_of_one(name: str, settings: dict[str, Any], env: str) -> None:
    agent = make_agent(name, env, prompts=1, group_size=1, **FULL, **settings)
    rollout, _, moved = learned(agent)
    assert len(rollout.rewards) == 1
    assert moved > 0


@pytest.mark.parametrize("name", ["random", "linucb", "thompson"])
def test_a_batch_of_one_without_a_model(name: str) -> None:
    agent = make_agent(name, "Offer-v9", episodes=1)
    agent.learn(2)
    assert agent.env_steps == 2


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo"])
def test_a_group_of_one_is_refused_where_groups_are_compared(name: str) -> None:
    with pytest.raises(ValueError, match=r"group_size is 1.*2 or more"):
        make_agent(name, group_size=1)


@pytest.mark.parametrize("text", ["", " \n"])
@pytest.mark.parametrize(
    ("env", "said"), [("Echo-v9", "holds no token to answer"), ("Offer-v9", "holds no token, so")]
)
def test_an_episode_that_begins_with_empty_text_is_refused(env: str, text: str, said: str) -> None:
    agent = make_agent("reinforce", env, text=text)
    with pytest.raises(ValueError, match=said):
        agent.learn(1)
    assert agent.env_steps == 0


def test_an_empty_candidate_is_refused() -> None:
    agent = make_agent("reinforce", "Offer-v9", candidates=["a", ""])
    with pytest.raises(ValueError, match=r"a candidate holds no token.*\['a', ''\]"):
        agent.learn(1)


@pytest.mark.parametrize("name", WRITERS)
def test_identical_candidates(name: str) -> None:
    agent = make_agent(name, "Offer-v9", candidates=["a", "a", "a"], prompts=8, **FULL)
    rollout, metrics, _ = learned(agent)
    assert len({d.action for d in rollout.sequences}) > 1 or name == "supervised"
    assert metrics["train/entropy"] == pytest.approx(np.log(3), abs=1e-5)
    player = agent.policy.begin()
    player.act({0: {"prompt": "b", "candidates": ("a", "a", "a")}}, 0)
    assert player.chosen_from[0, 0].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)


CHOOSERS = [
    name
    for name in AGENTS
    if "choosing" in agent_class(name).families and not name.startswith("sb3-")
]


@pytest.mark.parametrize("name", CHOOSERS)
def test_a_single_candidate(name: str) -> None:
    agent = make_agent(name, "Offer-v9", candidates=["a"])
    if name not in WRITERS:
        agent.learn(8)
    else:
        rollout, metrics, _ = learned(agent)
        assert {d.log_prob for d in rollout.sequences} == {0.0}
        assert metrics["train/entropy"] == 0
        assert metrics["train/grad_norm"] == 0 or name == "ppo"
    assert agent.evaluate("validation").score == pytest.approx(0.55)
