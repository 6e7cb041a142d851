"""REINFORCE as an agent: its gradient against enumeration, its state, and that it learns.

The task has three tokens: the end of sequence, "a" and "b". Every answer of at most two tokens can
be listed, so expectations are sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.registration import registry
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import llm_envs
from agents import CandidatePolicy, CausalLMPolicy, Reinforce
from agents.policies.causal_lm import TokenSequence
from agents.rollout import Rollout, collect
from agents.sampling import Completion, SamplingConfig
from llm_envs.core import registration
from llm_envs.core.task import ChoosingTask, Episode, Outcome, WritingTask

END, A, B = 0, 1, 2
CONTEXT = 64


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
    """Choose the candidate that the user says, among two in random order."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(2, 1)
        self.examples = tuple(Wanted(f"{split} {w}", w) for w in "ab")

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        candidates = tuple("ab" if rng.random() < 0.5 else "ba")
        features = np.zeros((2, 1), np.float32)
        seen = {"prompt": example.letters, "candidates": candidates, "features": features}
        return Episode(example, rng, seen, ({"role": "user", "content": example.letters},))

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(float(e.observation["candidates"][a] == e.example.letters))
            for e, a in zip(episodes, actions, strict=True)
        ]

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        episode.finished = True
        said = episode.observation["candidates"][action]
        episode.messages += ({"role": "assistant", "content": said},)


@pytest.fixture(scope="module", autouse=True)
def _tasks() -> Iterator[None]:
    before, threads = list(registration._IDS), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, task in (("Identity-v9", Identity), ("Bandit-v9", Bandit), ("Pick-v9", Pick)):
        llm_envs.register(name, task)
    yield
    torch.set_num_threads(threads)
    for name in set(registration._IDS) - set(before):
        del registry[name], registry[f"llm_envs/{name}"]
    registration._IDS[:] = before


def make_tokenizer() -> Any:
    """One token a letter; the words of the layout are letters too, of one kind."""
    raw = Tokenizer(models.WordLevel({"<end>": END, "a": A, "b": B, "?": 3}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")


def make_model(
    family: str = "llama", vocabulary: int = 4, seed: int = 0, dropout: float = 0.0
) -> Any:
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": END, "eos_token_id": END}
    if family == "gpt2":
        drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        shape = {"n_positions": CONTEXT, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**common, **shape, **drops, initializer_range=0.4))  # type: ignore[arg-type]
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            attention_dropout=dropout,
            initializer_range=0.25,
        )
    )


def make_agent(
    env: str = "Identity-v9", family: str = "llama", seed: int = 0, **settings: Any
) -> Any:
    chosen = CandidatePolicy if env == "Pick-v9" else CausalLMPolicy
    policy = chosen(make_model(family, dropout=settings.pop("dropout", 0.0)), make_tokenizer())
    defaults: dict[str, Any] = {
        "prompts": 4,
        "group_size": 4,
        "eval_every": 0,
        "max_new_tokens": 3,
    }
    return Reinforce(policy, env, seed=seed, **{**defaults, **settings})


def gradient(agent: Any) -> Tensor:
    """All gradients in one vector; they are cleared."""
    found = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
        for p in agent.policy.model.parameters()
    ]
    agent.policy.model.zero_grad()
    return torch.cat(found)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def parameters(agent: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()])


def rollout_of(agent: Any, seed: int = 5) -> Rollout:
    seeds = np.repeat(np.arange(agent.config.prompts), agent.config.group_size) + seed
    return collect(agent.policy.begin(), agent.envs, seeds=seeds.tolist())


# --- the gradient ----------------------------------------------------------------------------

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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("baseline", [0.0, 0.7, -2.0])
def test_p01_expected_updates_follow_the_gradient_of_the_expected_reward(
    family: str, baseline: float
) -> None:
    agent = make_agent(family=family)
    model = agent.policy.model.double().eval()
    rewards = torch.linspace(-1, 1, len(ANSWERS), dtype=torch.float64)
    probabilities = answer_log_probs(model).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-9), "an answer is missing"
    (probabilities * rewards).sum().backward()
    exact = gradient(agent)
    expected = torch.zeros_like(exact)
    for k in range(len(ANSWERS)):
        rollout = listed(rewards, [k])
        agent.accumulate_gradients(rollout, rollout.rewards - baseline)
        expected -= probabilities[k].item() * gradient(agent)
    assert relative(expected, exact) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("coefficients", [(0.0, 0.0), (0.3, 0.2)])
def test_p23_micro_batches_and_row_order_change_nothing(
    family: str, coefficients: tuple[float, float]
) -> None:
    entropy, kl = coefficients
    settings = {
        "entropy_coef": entropy,
        "kl_coef": kl,
        "env_kwargs": {"letters": ("ab", "b", "aab")},
    }
    agent = make_agent(family=family, **settings)
    agent.policy.model.double()
    if agent.reference is not None:
        agent.reference.model.double()
        with torch.no_grad():  # away from the reference, or there is no KL
            for p in agent.policy.model.parameters():
                p += 0.1 * torch.randn_like(p)
    rollout = rollout_of(agent)
    advantages = torch.randn(len(rollout.rewards), dtype=torch.float64)
    whole = agent.accumulate_gradients(rollout, advantages)
    expected = gradient(agent)
    assert expected.norm() > 0
    lengths = [len(s) for s in rollout.sequences]
    for tokens in (1, 2 * max(lengths), 5 * max(lengths)):
        agent.policy.micro_batch_tokens = tokens
        assert len(agent.policy.micro_batches(rollout.sequences)) > 1
        split = agent.accumulate_gradients(rollout, advantages)
        assert relative(gradient(agent), expected) < 1e-6
        assert split == pytest.approx(whole, rel=1e-6)
    order = torch.randperm(len(rollout.sequences), generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        rollout,
        sequences=[rollout.sequences[i] for i in order],
        decision_of=[rollout.decision_of[i] for i in order],
    )
    assert agent.accumulate_gradients(shuffled, advantages) == pytest.approx(whole, rel=1e-6)
    assert relative(gradient(agent), expected) < 1e-6


@pytest.mark.parametrize("baseline", ["none", "leave-one-out"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("turn", [0, 1, 2])
def test_p09_a_reward_teaches_its_own_turn_and_those_before(
    baseline: str, gamma: float, turn: int
) -> None:
    agent = make_agent(baseline=baseline, gamma=gamma, env_kwargs={"letters": ("aba", "bab")})
    rollout = rollout_of(agent)
    row = 0
    before = agent.advantages(rollout)
    place = int(((rollout.rows == row) & (rollout.turns == turn)).nonzero()[0])
    rollout.rewards[place] += 1.0
    change = agent.advantages(rollout) - before
    changed = set(rollout.turns[change.abs() > 1e-6].tolist())
    assert changed == ({turn} if gamma == 0 else set(range(turn + 1)))
    own = change[(rollout.rows == row) & (rollout.turns <= turn)]
    discounts = [gamma ** (turn - t) for t in range(turn + 1)]
    assert own.tolist() == pytest.approx(discounts, abs=1e-5)


def test_p09_the_gradient_of_other_turns_stays() -> None:
    agent = make_agent(baseline="none", env_kwargs={"letters": ("ab", "ba")})
    agent.policy.model.double()
    rollout = rollout_of(agent)
    rewards = rollout.rewards.double()
    agent.accumulate_gradients(rollout, rewards)
    before = gradient(agent)
    bumped = rewards.clone()
    bumped[rollout.turns == 1] += 1.0
    agent.accumulate_gradients(rollout, bumped)
    change = gradient(agent) - before
    agent.accumulate_gradients(rollout, (rollout.turns == 1).double())
    assert relative(change, gradient(agent)) < 1e-6


def test_p04_members_of_a_group_that_all_earn_alike_teach_nothing() -> None:
    agent = make_agent()
    rollout = rollout_of(agent)
    rollout.rewards[:] = 0.1
    start = parameters(agent)
    metrics = agent.update(rollout)
    assert metrics["train/grad_norm"] == 0.0
    assert torch.equal(parameters(agent), start)


def test_p04_a_group_of_one_is_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"group_size is 1.*2 or more"):
        make_agent(group_size=1)


def test_the_moving_average_compares_with_earlier_batches_only() -> None:
    agent = make_agent(baseline="moving", moving_decay=0.5)
    rollout = rollout_of(agent)
    rollout.rewards[:] = 1.0
    assert agent.advantages(rollout).tolist() == [1.0] * len(rollout.rewards)
    rollout.rewards[:] = 3.0
    assert agent.advantages(rollout).tolist() == [2.0] * len(rollout.rewards)
    assert agent.average == 2.0


def test_a_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights() -> None:
    agent = make_agent(baseline="none")
    rollout = rollout_of(agent)
    rollout.rewards[0] = float("nan")
    start = parameters(agent)
    with pytest.raises(FloatingPointError, match="last checkpoint is good"):
        agent.update(rollout)
    assert torch.equal(parameters(agent), start)


def test_the_gradient_is_clipped_and_its_own_norm_is_told() -> None:
    agent = make_agent(max_grad_norm=1e-3, baseline="none")
    rollout = rollout_of(agent)
    rollout.rewards[:] = 1.0
    agent.accumulate_gradients(rollout, agent.advantages(rollout))
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in agent.policy.model.parameters() if p.grad is not None]
    ).item()
    taken: list[float] = []
    step = agent.optimizer.step

    def look() -> None:
        grads = [p.grad for p in agent.policy.model.parameters() if p.grad is not None]
        taken.append(torch.nn.utils.get_total_norm(grads).item())
        step()

    agent.optimizer.step = look
    assert agent.step_optimizer(0.0) == pytest.approx(norm, rel=1e-6)
    assert taken == [pytest.approx(1e-3, rel=1e-3)]


# --- state -----------------------------------------------------------------------------------

EVERYTHING = {
    "baseline": "moving",
    "kl_coef": 0.1,
    "entropy_coef": 0.01,
    "learning_rate": 1e-2,
    "weight_decay": 0.01,
    "env_kwargs": {"letters": ("ab", "b")},
}
STEPS = 24  # of one update: 16 rows, of one or two turns


@pytest.mark.parametrize("env", ["Identity-v9", "Pick-v9"])
def test_p24_a_resumed_run_equals_the_uninterrupted_one(env: str, tmp_path: Path) -> None:
    settings = {k: v for k, v in EVERYTHING.items() if env == "Identity-v9" or k != "env_kwargs"}
    whole = make_agent(env, dropout=0.5, **settings)
    whole.learn(5 * STEPS)
    halved = make_agent(env, dropout=0.5, **settings)
    halved.learn(2 * STEPS)
    halved.save(tmp_path / "checkpoint")
    torch.manual_seed(12345)  # nothing may depend on the global generators
    resumed = Reinforce.load(tmp_path / "checkpoint", device="cpu")
    assert resumed.env_steps == halved.env_steps
    resumed.learn(5 * STEPS)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert resumed.env_steps == whole.env_steps
    assert resumed.extra_state() == whole.extra_state()
    mine, its = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    for index, moments in its["state"].items():
        for name, value in moments.items():
            assert torch.equal(mine["state"][index][name], value), (index, name)
    drawn = [torch.rand(4, generator=a.policy.generator) for a in (resumed, whole)]
    assert torch.equal(*drawn)


def test_p24_another_agents_checkpoint_is_refused(tmp_path: Path) -> None:
    make_agent().save(tmp_path / "checkpoint")
    state = tmp_path / "checkpoint" / "state.json"
    state.write_text(state.read_text().replace('"reinforce"', '"ppo"'))
    with pytest.raises(ValueError, match=r"'ppo'.*'reinforce'"):
        Reinforce.load(tmp_path / "checkpoint")


def test_p24_a_crash_while_saving_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent()
    agent.save(tmp_path / "last")
    first = parameters(agent)
    agent.learn(STEPS)

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    for moment in ("agents.policy_agent.save_file", "agents.base.os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(moment, crash)
            with pytest.raises(KeyboardInterrupt):
                agent.save(tmp_path / "last")
        found = Reinforce.load(tmp_path / "last", device="cpu")
        assert torch.equal(parameters(found), first)
    agent.save(tmp_path / "last")
    assert torch.equal(
        parameters(Reinforce.load(tmp_path / "last", device="cpu")), parameters(agent)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_p25_one_seed_twice_is_the_same_and_another_is_not() -> None:
    found = [parameters(make_agent(seed=s).learn(2 * STEPS)) for s in (3, 3, 4)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("env", ["Bandit-v9", "Identity-v9", "Pick-v9"])
def test_p28_it_solves_a_bandit_an_identity_task_and_a_choice(env: str, seed: int) -> None:
    # Without the bonus a random network says one letter for good before it sees the prompt.
    agent = make_agent(env, seed=seed, learning_rate=3e-3, group_size=8, entropy_coef=0.2)
    before = agent.evaluate("validation").score
    agent.learn((80 if env == "Identity-v9" else 25) * 32)
    after = agent.evaluate("validation").score
    assert after == 1.0, f"{before} before"


@pytest.mark.parametrize("baseline", ["none", "batch", "moving", "leave-one-out"])
def test_p28_every_baseline_solves_the_bandit(baseline: str) -> None:
    agent = make_agent("Bandit-v9", baseline=baseline, learning_rate=3e-3, entropy_coef=0.2)
    agent.learn(60 * 16)
    assert agent.evaluate("validation").score == 1.0


# --- being used ------------------------------------------------------------------------------


def test_predict_answers_one_observation_and_many() -> None:
    agent = make_agent()
    one, state = agent.predict("User: a\nAssistant:")
    many, _ = agent.predict(["User: a\nAssistant:", "User: b\nAssistant:"])
    assert state is None
    assert one == many[0]
    assert isinstance(one, str)
    assert len(many) == 2


def test_predict_chooses(tmp_path: Path) -> None:
    agent = make_agent("Pick-v9")
    observation = {"prompt": "a", "candidates": ("a", "b"), "features": np.zeros((2, 1))}
    action, _ = agent.predict(observation)
    assert action in (0, 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rat": 1e-3}, "learning_rat'.*learning_rate"),
        ({"prompts": 0}, "prompts is 0"),
        ({"gamma": 1.5}, "gamma is 1.5"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0.*chance"),
        ({"max_new_tokens": CONTEXT}, "leaves no room"),
        ({"env_kwargs": {"split": "test"}}, "split is 'test'"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        make_agent(**settings)


def test_the_agents_settings_rule_a_policy_made_before() -> None:
    agent = make_agent(max_new_tokens=5, temperature=0.7, top_k=2, micro_batch_tokens=99)
    assert agent.policy.sampling == SamplingConfig(5, 0.7, 2)
    assert agent.policy.micro_batch_tokens == 99
    assert make_agent("Pick-v9", temperature=0.7).policy.temperature == 0.7


def test_a_policy_of_the_other_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"choosing task.*CandidatePolicy"):
        Reinforce(CausalLMPolicy(make_model(), make_tokenizer()), "Pick-v9")
