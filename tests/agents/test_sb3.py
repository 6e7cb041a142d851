"""Stable-Baselines3: a language model as its policy, and its algorithms as agents.

The writing tasks have four tokens: the end of sequence, "a", "b" and all other words.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from agents import CausalLMPolicy, train
from agents.policies.lora import Lora, add_adapter
from agents.policies.models import TINY, load_model
from agents.policies.sb3_causal_lm import CausalLMActorCriticPolicy, longest_rows
from agents.registry import agent_class
from agents.sampling import SamplingConfig
from agents.sb3 import SB3A2C, SB3DQN, SB3PPO
from llm_envs.core.task import ChoosingTask, Episode, Outcome
from llm_envs.wrappers import NumericView, TokenView
from three_tokens import (
    CONTEXT,
    B,
    Bandit,
    Identity,
    Wanted,
    make_model,
    make_tokenizer,
    task_fixture,
)


class Broken(Bandit):
    """Its reward is no number."""

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(None, reward=float("nan")) for _ in answers]


class Pick(ChoosingTask[Wanted]):
    """Choose the one of three candidates that a feature marks, twice."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(3, 2)
        self.examples = tuple(Wanted(f"{split} {i}", "") for i in range(20))

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        episode = Episode(example, rng, messages=({"role": "user", "content": "?"},))
        self._offer(episode)
        return episode

    def _offer(self, episode: Episode[Wanted]) -> None:
        features = episode.rng.random((3, 2)).astype(np.float32)
        features[:, 0] = np.eye(3)[episode.rng.integers(3)]
        candidates = tuple(f" {x:.3f}" for x in features[:, 1])
        episode.observation = {"prompt": "?", "candidates": candidates, "features": features}

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(float(e.observation["features"][a, 0]))
            for e, a in zip(episodes, actions, strict=True)
        ]

    def candidate_scores(self, episode: Episode[Wanted]) -> Any:
        if episode.finished:
            return None
        return episode.observation["features"][:, 0].astype(np.float64)

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        said = episode.observation["candidates"][action]
        episode.finished = episode.turn == 2
        self._offer(episode)
        episode.messages += (
            {"role": "assistant", "content": said},
            {"role": "user", "content": "?"},
        )


TASKS = {"Identity-v8": Identity, "Bandit-v8": Bandit, "Broken-v8": Broken, "Pick-v8": Pick}

_tasks = task_fixture(TASKS)


def chatting() -> CausalLMPolicy:
    """A policy that reads messages."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <end> {% endfor %}"
    return CausalLMPolicy(make_model(), tokenizer, chat=True)


def make_agent(name: str, env: str, seed: int = 0, **settings: Any) -> Any:
    policy: Any = "none"
    if env != "Pick-v8":
        model = make_model(dropout=settings.pop("dropout", 0.0))
        if settings.pop("adapter", False):
            add_adapter(model, Lora(2, 4.0))
        policy = CausalLMPolicy(model, make_tokenizer())
        settings = {"max_new_tokens": 3, "n_steps": 8, **settings}
    return agent_class(name)(policy, env, seed=seed, **{"eval_every": 0, "n_envs": 4, **settings})


def token_envs(count: int, letters: tuple[str, ...] = ("a", "ba", "bab")) -> DummyVecEnv:
    """Dialogues of different lengths, so that a batch has observations of different lengths."""
    return DummyVecEnv(
        [
            lambda: TokenView(
                gym.make("Identity-v8", letters=letters),
                make_tokenizer(),
                max_new_tokens=3,
                context=CONTEXT,
            )
        ]
        * count
    )


def make_ppo(model: Any, **settings: Any) -> stable_baselines3.PPO:
    return stable_baselines3.PPO(
        CausalLMActorCriticPolicy,
        token_envs(4),
        policy_kwargs={"model": model},
        seed=0,
        device="cpu",
        **{"n_steps": 16, "batch_size": 64, "gamma": 1.0, **settings},
    )


def played(ppo: stable_baselines3.PPO) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Collect a rollout without learning; return its observations, actions and log-probs."""
    ppo.lr_schedule = lambda _: 0.0  # type: ignore[assignment]
    ppo.learn(64, log_interval=None)
    [batch] = ppo.rollout_buffer.get()
    return batch.observations, batch.actions.long().flatten(), batch.old_log_prob  # type: ignore[return-value]


def weights(agent: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in agent.model.policy.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# --- the policy ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_the_first_policy_is_the_language_model(family: str) -> None:
    """P16, and P18: an observation alone, unpadded, by hand; dropout would show."""
    model = make_model(family, dropout=0.5)
    ppo = make_ppo(model)
    observations, _, _ = played(ppo)
    lengths = observations["length"].flatten().long().tolist()
    assert len(set(lengths)) > 5, "the test needs observations of different lengths"
    ppo.policy.set_training_mode(True)
    with torch.no_grad():
        found = ppo.policy.get_distribution(observations).distribution.logits
        model.eval()
        for row, length in enumerate(lengths):
            ids = observations["tokens"][row : row + 1, :length].long()
            expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
            assert (found[row] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_p17_the_log_probs_of_the_rollout_are_those_of_the_update(family: str) -> None:
    ppo = make_ppo(make_model(family, dropout=0.5))
    observations, actions, old = played(ppo)
    ppo.policy.set_training_mode(True)
    _, log_probs, entropies = ppo.policy.evaluate_actions(observations, actions)
    assert (log_probs - old).abs().max() < 1e-5
    distribution = ppo.policy.get_distribution(observations).distribution
    assert torch.allclose(entropies, -(distribution.probs * distribution.logits).sum(-1), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_p11_padding_and_batching_change_neither_values_nor_gradients(family: str) -> None:
    ppo = make_ppo(make_model(family))
    torch.nn.init.normal_(ppo.policy.value_net[0].weight)
    observations, actions, _ = played(ppo)
    weight = torch.linspace(-1, 1, len(actions))

    def gradient(parts: Sequence[Tensor]) -> Tensor:
        ppo.policy.zero_grad()
        for rows in parts:
            seen = {k: v[rows] for k, v in observations.items()}
            values, log_probs, _ = ppo.policy.evaluate_actions(seen, actions[rows])
            ((log_probs + 0.3 * values.flatten()) * weight[rows]).sum().backward()
        found = [p.grad.flatten() for p in ppo.policy.parameters() if p.grad is not None]
        return torch.cat(found)

    everything = torch.arange(len(actions))
    whole = gradient([everything])
    assert whole.norm() > 0
    length = observations["length"].long()
    padding = torch.arange(CONTEXT) >= length
    observations["tokens"] = observations["tokens"].masked_fill(padding, float(B))
    for parts in ([everything], everything.split(1), everything.flip(0).split(7)):
        assert (gradient(parts) - whole).norm() < 1e-5 * whole.norm()


def test_longest_rows_are_found_among_any_rows() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        rows = [rng.integers(2, size=rng.integers(1, 5)).tolist() for _ in range(9)]
        kept, owner = longest_rows(rows)
        for row, place in zip(rows, owner, strict=True):
            assert rows[kept[place]][: len(row)] == row
        texts = {tuple(row) for row in rows}
        longest = {t for t in texts if not any(o != t and o[: len(t)] == t for o in texts)}
        assert sorted(tuple(rows[i]) for i in kept) == sorted(longest)


def observed(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    tokens = torch.full((len(rows), CONTEXT), float(B))
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return {"tokens": tokens, "length": torch.tensor([[float(len(ids))] for ids in rows])}


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_p18_what_a_rollout_keeps_changes_nothing(family: str) -> None:
    """Rows go on by some tokens, begin anew, are cut or rewritten, and weights change."""
    policy: Any = make_ppo(make_model(family, dropout=0.5)).policy
    extractor = policy.features_extractor
    assert extractor.reader is not None, "the test needs a model whose keys and values can be kept"
    torch.nn.init.normal_(policy.value_net[0].weight)
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [[] for _ in range(5)]
    for step in range(60):
        for i, row in enumerate(rows):
            goes_on = len(row) < CONTEXT and rng.random() < 0.8
            kept = len(row) if goes_on else int(rng.integers(len(row) + 1))
            added = 1 if rng.random() < 0.7 else int(rng.integers(2, CONTEXT))
            rows[i] = (row[:kept] + rng.integers(3, size=added).tolist())[:CONTEXT]
            if kept == CONTEXT:
                rows[i][-1] = (row[-1] + 1) % 3
        if step % 9 == 8:
            with torch.no_grad():
                next(policy.model.parameters()).mul_(1.1)
        if step % 20 == 19:
            rows.pop()
        seen = observed(rows)
        with torch.no_grad():
            actions, values, log_probs = policy(seen)
            expected, expected_log_probs, _ = policy.evaluate_actions(seen, actions)
        assert (values - expected).abs().max() < 1e-4
        assert (log_probs - expected_log_probs).abs().max() < 1e-4


def test_a_rollout_reads_each_token_once() -> None:
    policy: Any = make_ppo(make_model()).policy
    read = []
    policy.model.model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        policy(observed([[1, 2, 1], [2]]))
        policy(observed([[1, 2, 1, 1], [2, 1]]))
        policy(observed([[1, 2, 1, 1, 2], [1, 1, 1, 1]]))
    # One token of every row at once, then what is left of those that have more; the last row began
    # anew.
    assert read == [2, 2, 2, 2, 3]


def test_rollouts_of_a_model_that_does_not_see_back_to_the_beginning_keep_nothing() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 4, "hidden_size": 16, "intermediate_size": 32, "sliding_window": 4}
    shape |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 2)
    policy: Any = make_ppo(MistralForCausalLM(MistralConfig(**shape))).policy
    assert policy.features_extractor.reader is None
    seen = observed([[1, 2, 1, 2, 1, 2, 1]])
    with torch.no_grad():
        actions, _, log_probs = policy(seen)
        _, expected, _ = policy.evaluate_actions(seen, actions)
    assert torch.equal(log_probs, expected)


def test_the_value_is_a_head_on_the_last_hidden_state_and_begins_as_zero() -> None:
    model = make_model()
    ppo = make_ppo(model)
    observations, _, _ = played(ppo)
    assert not ppo.policy.predict_values(observations).any()
    head = ppo.policy.value_net[0]
    torch.nn.init.normal_(head.weight)
    values = ppo.policy.predict_values(observations)
    assert values.shape == (64, 1)
    length = int(observations["length"][5])
    ids = observations["tokens"][5:6, :length].long()
    hidden = model.model(input_ids=ids).last_hidden_state[0, -1]
    assert values[5].item() == pytest.approx((head.weight[0] @ hidden).item(), abs=1e-5)


def test_every_weight_of_the_language_model_is_trained_once() -> None:
    model = make_model("gpt2")
    ppo = make_ppo(model, n_epochs=1)
    listed = [id(p) for group in ppo.policy.optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert {id(p) for p in model.parameters()} <= set(listed)
    assert len(listed) == len(list(model.parameters())) + 2
    before = [p.detach().clone() for p in model.parameters()]
    ppo.learn(64, log_interval=None)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_embedded_model_writes_and_learns_with_ppo_as_it_comes() -> None:
    model, tokenizer = load_model("tiny", "cpu", "float32")
    env = TokenView(gym.make("Summarization-v0"), TINY, max_new_tokens=4, context=256)
    ppo = stable_baselines3.PPO(
        CausalLMActorCriticPolicy,
        env,
        policy_kwargs={"model": "tiny"},
        n_steps=12,
        batch_size=6,
        n_epochs=1,
        seed=0,
        device="cpu",
    )
    observation, _ = env.reset(seed=1)
    tensors = obs_as_tensor({k: v[None] for k, v in observation.items()}, torch.device("cpu"))
    with torch.no_grad():
        found = ppo.policy.get_distribution(tensors).distribution.logits[0]  # type: ignore[arg-type]
        ids = torch.tensor([observation["tokens"][: observation["length"][0]].tolist()])
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert (found - expected).abs().max() < 1e-5
    ppo.learn(24, log_interval=None)
    changed = ppo.policy.model.state_dict()  # type: ignore[operator]
    assert any(not torch.equal(changed[k], v) for k, v in model.state_dict().items())
    assert isinstance(tokenizer.decode(ppo.predict(observation)[0]), str)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NumericView(gym.make("Pick-v8")), r"reads tokens.*TokenView"),
        (
            lambda: TokenView(gym.make("Bandit-v8"), make_tokenizer(), vocabulary=9),
            r"knows 4 tokens.*9 actions.*vocabulary=4",
        ),
    ],
)
def test_a_model_that_does_not_fit_the_view_is_refused(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        stable_baselines3.PPO(
            CausalLMActorCriticPolicy, make(), policy_kwargs={"model": make_model()}
        )


def test_p28_ppo_of_stable_baselines3_learns_to_write() -> None:
    """As a user would write it, without an agent."""
    model, tokenizer = make_model(seed=1), make_tokenizer()
    ppo = stable_baselines3.PPO(
        CausalLMActorCriticPolicy,
        token_envs(8, ("a", "b")),
        policy_kwargs={"model": model},
        learning_rate=3e-3,
        n_steps=16,
        batch_size=128,
        n_epochs=4,
        gamma=1.0,
        ent_coef=0.05,
        seed=0,
        device="cpu",
    )
    ppo.learn(3_000, log_interval=None)
    player = CausalLMPolicy(model, tokenizer, sampling=SamplingConfig(3, 0.0)).begin()
    asked = {0: "User: a\nAssistant:", 1: "User: b\nAssistant:"}
    assert player.act(asked, 0) == {0: "a", 1: "b"}


# --- agents ----------------------------------------------------------------------------------

ON_ALL_TASKS = [
    ("sb3-ppo", "Pick-v8"),
    ("sb3-a2c", "Pick-v8"),
    ("sb3-dqn", "Pick-v8"),
    ("sb3-ppo", "Identity-v8"),
    ("sb3-a2c", "Identity-v8"),
]
# Few enough that all of it has happened when a run is halved: learning has begun, the exploration
# still falls, the replay buffer runs over between the halves, the target network has been copied.
SMALL: dict[str, dict[str, Any]] = {
    "sb3-ppo": {"ent_coef": 0.01, "batch_size": 16},
    "sb3-a2c": {"ent_coef": 0.01},
    "sb3-dqn": {
        "gamma": 0.5,
        "batch_size": 16,
        "learning_starts": 16,
        "buffer_size": 100,
        "exploration_steps": 200,
        "target_update_interval": 40,
    },
}


@pytest.mark.parametrize(("name", "env"), ON_ALL_TASKS)
def test_p24_a_resumed_run_equals_the_uninterrupted_one(
    name: str, env: str, tmp_path: Path
) -> None:
    settings = dict(SMALL[name])
    if env == "Identity-v8":
        settings |= {"env_kwargs": {"letters": ("a", "ba")}, "dropout": 0.5}
    whole = make_agent(name, env, **settings)
    history = [whole.iterate() for _ in range(6)]
    halved = make_agent(name, env, **settings)
    for _ in range(3):
        halved.iterate()
    halved.save(tmp_path / "checkpoint")
    torch.manual_seed(12345)  # nothing may depend on the global generators
    np.random.seed(12345)  # noqa: NPY002
    resumed: Any = type(halved).load(tmp_path / "checkpoint", device="cpu")
    assert (resumed.env_steps, resumed.iteration) == (halved.env_steps, 3)
    later = [resumed.iterate() for _ in range(3)]
    for mine, its in zip(later, history[3:], strict=True):
        assert {k: v for k, v in mine.items() if "perf/" not in k} == {
            k: v for k, v in its.items() if "perf/" not in k
        }
    assert_same(weights(resumed), weights(whole))
    mine, its = (a.model.policy.optimizer.state_dict()["state"] for a in (resumed, whole))
    assert mine.keys() == its.keys()
    for index in its:
        assert_same(mine[index], its[index])
    assert_same(resumed.memory(), whole.memory())
    assert resumed.counters() == whole.counters()
    assert resumed.env_steps == whole.env_steps
    assert resumed.model.num_timesteps == whole.model.num_timesteps


def test_p24_what_dqn_has_to_remember_has_happened_in_the_test_before() -> None:
    agent = make_agent("sb3-dqn", "Pick-v8", **SMALL["sb3-dqn"])
    for _ in range(3):
        agent.iterate()
    buffer, policy = agent.model.replay_buffer, agent.model.policy
    assert not buffer.full
    assert 0.05 < agent.epsilon < 1.0
    online, target = policy.q_net.state_dict(), policy.q_net_target.state_dict()
    assert any(not torch.equal(online[k], target[k]) for k in online)
    fresh = make_agent("sb3-dqn", "Pick-v8", **SMALL["sb3-dqn"]).model.policy.q_net_target
    assert any(not torch.equal(target[k], v) for k, v in fresh.state_dict().items())
    agent.iterate()
    assert buffer.full


def test_p24_an_adapter_is_trained_alone_and_resumed(tmp_path: Path) -> None:
    agent = make_agent("sb3-ppo", "Identity-v8", adapter=True, learning_rate=1e-2)
    before = weights(agent)
    agent.iterate()
    changed = {k for k, v in weights(agent).items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in name or "value_net" in name for name in changed)
    agent.save(tmp_path / "checkpoint")
    resumed: Any = SB3PPO.load(tmp_path / "checkpoint", device="cpu")
    for each in (agent, resumed):
        each.iterate()
    assert_same(weights(resumed), weights(agent))


def test_p24_a_checkpoint_with_another_model_is_refused(tmp_path: Path) -> None:
    make_agent("sb3-ppo", "Identity-v8").save(tmp_path / "checkpoint")
    CausalLMPolicy(make_model("gpt2"), make_tokenizer()).save_pretrained(
        tmp_path / "checkpoint" / "policy"
    )
    with pytest.raises(ValueError, match=r"trained on the model .* holds .*Put back"):
        SB3PPO.load(tmp_path / "checkpoint", device="cpu")


@pytest.mark.parametrize(("name", "env"), [("sb3-dqn", "Pick-v8"), ("sb3-ppo", "Identity-v8")])
def test_a_checkpoint_holds_no_pickled_code(name: str, env: str, tmp_path: Path) -> None:
    agent = make_agent(name, env)
    agent.iterate()
    agent.save(tmp_path / "checkpoint")
    names = {p.suffix for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()}
    assert names <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(("name", "env"), ON_ALL_TASKS)
def test_p25_one_seed_twice_is_the_same_and_another_is_not(name: str, env: str) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        agent = make_agent(name, env, seed=seed, **SMALL[name])
        for _ in range(2):
            agent.iterate()
        return weights(agent)

    first, again, other = run(3), run(3), run(4)
    assert_same(again, first)
    assert any(not torch.equal(other[k], v) for k, v in first.items())


def test_the_global_generators_are_left_as_they_were() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    agent = make_agent("sb3-ppo", "Pick-v8")
    agent.iterate()
    agent.evaluate("validation", episodes=3)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def test_every_iteration_has_episodes_of_its_own() -> None:
    seen = []
    agent = make_agent("sb3-ppo", "Pick-v8", n_steps=4)
    for _ in range(3):
        agent.iterate()
        seen.append(agent.model.rollout_buffer.observations.copy())
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])
    again = make_agent("sb3-ppo", "Pick-v8", n_steps=4)
    again.iterate()
    assert np.array_equal(again.model.rollout_buffer.observations[0], seen[0][0])


@pytest.mark.parametrize("name", ["sb3-ppo", "sb3-a2c"])
def test_steps_are_answers_and_not_tokens(name: str) -> None:
    agent = make_agent(name, "Identity-v8", n_steps=10, n_envs=3)
    metrics = agent.iterate()
    assert agent.model.num_timesteps == 30
    assert 10 <= agent.env_steps < 30, "an answer has one to three tokens"
    assert metrics["rollout/answer_tokens"] == 30 / agent.env_steps
    ended = agent.model.rollout_buffer.rewards != 0  # a reward is -1 or 1 where an answer ends
    assert agent.env_steps == ended.sum()
    assert metrics["rollout/reward"] == pytest.approx(
        agent.model.rollout_buffer.rewards[ended].mean()
    )
    assert metrics["rollout/score"] == pytest.approx((metrics["rollout/reward"] + 1) / 2)


def test_steps_of_choosing_tasks_are_those_of_the_environments() -> None:
    agent = make_agent("sb3-dqn", "Pick-v8", n_steps=5, n_envs=3)
    agent.learn(31)
    assert agent.env_steps == agent.model.num_timesteps == 45


def test_evaluation_plays_what_was_trained() -> None:
    """The player's answers are those that the policy of Stable-Baselines3 gives token by token."""
    agent = make_agent("sb3-ppo", "Identity-v8", env_kwargs={"letters": ("ab", "ba")})
    agent.learn(100)
    env = agent._view()
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        said = f"User: {info['messages'][0]['content']}\nAssistant:"
        over, answers, player = False, [], agent.player(True)
        while not over:
            action, _ = agent.model.predict(observation, deterministic=True)
            observation, _, over, _, info = env.step(action)
            if info:
                # Of the text, for a message is stripped of its spaces.
                answer = player.act({0: said}, info["turn"] - 1)[0]
                answers.append(answer)
                assert answer.strip() == info["messages"][2 * info["turn"] - 1]["content"]
                said = env.unwrapped.episode.observation
        assert len(answers) == 2


@pytest.mark.parametrize("name", ["sb3-ppo", "sb3-a2c", "sb3-dqn"])
def test_the_numeric_player_knows_its_own_chances(name: str) -> None:
    agent = make_agent(name, "Pick-v8")
    agent.learn(64)
    features = np.random.default_rng(0).random((3, 2)).astype(np.float32)
    observation = {"prompt": "?", "candidates": ("1", "2", "3"), "features": features}
    greedy, drawn = agent.player(True), agent.player(False)
    [best] = set(greedy.act({i: observation for i in range(20)}, 0).values())
    numbers = NumericView(gym.make("Pick-v8")).observation(observation)
    assert best == agent.model.predict(numbers, deterministic=True)[0]
    counts = np.bincount(list(drawn.act({i: observation for i in range(4000)}, 0).values()))
    chances = drawn.chosen_from[0, 0]
    assert chances.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(np.pad(counts, (0, 3 - len(counts))) / 4000, chances, atol=0.03)
    if name == "sb3-dqn":
        assert greedy.chosen_from[0, 0].tolist() == np.eye(3)[best].tolist()
        assert chances[best] == pytest.approx(1 - agent.epsilon * 2 / 3)
    else:
        distribution = agent.model.policy.get_distribution(torch.from_numpy(numbers)[None])
        np.testing.assert_allclose(chances, distribution.distribution.probs[0].detach(), atol=1e-6)


WRITE = {"n_envs": 8, "n_steps": 16, "ent_coef": 0.05}
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "env", "answers", "settings"),
    [
        ("sb3-ppo", "Bandit-v8", 600, {**WRITE, "learning_rate": 3e-3, "batch_size": 128}),
        ("sb3-ppo", "Identity-v8", 1200, {**WRITE, "learning_rate": 3e-3, "batch_size": 128}),
        ("sb3-a2c", "Bandit-v8", 1200, {**WRITE, "learning_rate": 1e-2}),
        ("sb3-a2c", "Identity-v8", 2400, {**WRITE, "learning_rate": 1e-2, "ent_coef": 0.1}),
        ("sb3-ppo", "Pick-v8", 900, {"n_envs": 8, "learning_rate": 3e-3}),
        ("sb3-a2c", "Pick-v8", 900, {"n_envs": 8, "learning_rate": 1e-2}),
        ("sb3-dqn", "Pick-v8", 900, {"n_envs": 8, "exploration_steps": 1000}),
    ],
)
def test_p28_it_solves_a_bandit_an_identity_task_and_a_choice(
    name: str, env: str, answers: int, settings: dict[str, Any], seed: int
) -> None:
    agent = make_agent(name, env, seed=seed, **settings)
    agent.learn(answers)
    assert agent.evaluate("validation").score == 1.0


# --- refusals --------------------------------------------------------------------------------


def test_dqn_refuses_to_write_and_names_who_can() -> None:
    with pytest.raises(ValueError, match=r"sb3-dqn cannot play Bandit-v8.*random.*sb3-ppo"):
        SB3DQN("none", "Bandit-v8")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SB3PPO("gpt2", "Pick-v8"), r"small network.*'gpt2' was given.*'none'"),
        (lambda: SB3DQN("tiny", "Pick-v8"), "no language model"),
        (
            lambda: make_agent("sb3-ppo", "Bandit-v8", n_steps=2),
            r"n_steps is 2 and max_new_tokens 3",
        ),
        (
            lambda: make_agent("sb3-a2c", "Bandit-v8", max_new_tokens=60, n_steps=99, context=60),
            r"max_new_tokens 60 leaves no room.*60",
        ),
        (lambda: SB3A2C(chatting(), "Bandit-v8"), r"chat template.*chat=False"),
        (lambda: make_agent("sb3-ppo", "Pick-v8", batch_size=1), "batch_size is 1"),
        (lambda: make_agent("sb3-ppo", "Pick-v8", n_steps=1, n_envs=1), "single advantage"),
        (
            lambda: make_agent("sb3-a2c", "Pick-v8", n_steps=1, n_envs=1, normalize_advantage=True),
            "single advantage",
        ),
        (
            lambda: make_agent("sb3-ppo", "Pick-v8", learning_rate=float("inf")),
            "learning_rate is inf",
        ),
        (
            lambda: make_agent("sb3-ppo", "Pick-v8", learning_rate=1e38),
            r"learning_rate is 1e\+38.*float32",
        ),
        (lambda: make_agent("sb3-ppo", "Pick-v8", gamma=2.0), "gamma is 2.0"),
        (lambda: make_agent("sb3-ppo", "Pick-v8", n_envs=0), "n_envs is 0"),
        (lambda: make_agent("sb3-ppo", "Pick-v8", hidden=(8, 0)), "hidden is"),
        (lambda: make_agent("sb3-a2c", "Pick-v8", gae_lambda=-1), "gae_lambda is -1"),
        (
            lambda: make_agent("sb3-dqn", "Pick-v8", exploration_final_eps=2.0),
            "exploration_final_eps is 2.0",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


def test_a_reward_that_is_no_number_stops_the_run_and_leaves_the_weights() -> None:
    agent = make_agent("sb3-ppo", "Broken-v8")
    before = weights(agent)
    with pytest.raises(FloatingPointError, match=r"reward of answer \d of update 0 is nan"):
        agent.learn(64)
    assert_same(weights(agent), before)


def test_weights_that_are_no_numbers_stop_the_run() -> None:
    agent = make_agent("sb3-ppo", "Pick-v8")
    agent.model.lr_schedule = lambda left: float("inf")
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        agent.learn(64)


# --- the train command -----------------------------------------------------------------------


def test_help_needs_no_stable_baselines3_and_a_run_without_it_names_the_extra() -> None:
    code = (
        "import contextlib, sys\nfrom agents import train\n"
        "with contextlib.suppress(SystemExit):\n    train.main(['--agent', 'sb3-ppo', '--help'])\n"
        "assert 'stable_baselines3' not in sys.modules\n"
        "sys.modules['stable_baselines3'] = None\n"
        "train.main(['--agent', 'sb3-dqn', '--env', 'RecommendationClicks-v0'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert "--gae-lambda" in ended.stdout
    assert "pip install 'llm-envs[sb3]'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 2


@pytest.mark.parametrize("name", ["sb3-ppo", pytest.param("sb3-dqn", marks=pytest.mark.slow)])
def test_the_train_command_trains_resumes_and_reports(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--agent", name, "--env", "RecommendationClicks-v0", "--seed", "3"]
    arguments += ["--track", "jsonl", "--quiet", "--report", "validation", "--eval-episodes", "16"]
    arguments += ["--eval-every", "2"]
    train.main([*arguments, "--steps", "512", "--out", "whole"])
    train.main([*arguments, "--steps", "256", "--out", "halved"])
    train.main(["--resume", "halved", "--steps", "512"])
    results = [json.loads((tmp_path / f / "result.json").read_text()) for f in ("whole", "halved")]
    assert results[0] == results[1]
    assert results[0]["agent"] == name
    assert results[0]["policy"] == "none"
    assert results[0]["env_steps"] == 512
    assert "expected" in results[0]["after"]["parts"]
    last = tmp_path / "whole" / "metrics.jsonl"
    rows = [json.loads(line) for line in last.read_text().splitlines()]
    assert any("train/loss" in row for row in rows)


@pytest.mark.slow
def test_the_train_command_teaches_to_choose() -> None:
    """Random choices of the validation split score 0.59 expected."""
    for cls in (SB3PPO, SB3A2C, SB3DQN):
        agent: Any = cls(
            cls.config_class.default_policy, "RecommendationClicks-v0", seed=1, eval_every=0
        )
        agent.learn(4096)
        assert agent.evaluate("validation").score > 0.64


def test_each_reward_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent("sb3-a2c", "Bandit-v8", n_steps=32)
    checked: list[int] = []
    original = SB3A2C.check_rewards

    def noted(self: Any, rewards: Sequence[float], first: int = 0) -> None:
        checked.extend(range(first, first + len(rewards)))
        original(self, rewards, first)

    monkeypatch.setattr(SB3A2C, "check_rewards", noted)
    agent.iterate()
    assert agent.env_steps > 4, "the test needs answers to more than one step"
    assert checked == list(range(agent.env_steps))


def test_a_checkpoint_keeps_the_precision_of_the_language_model(tmp_path: Path) -> None:
    policy = CausalLMPolicy(make_model().bfloat16(), make_tokenizer())
    agent = SB3A2C(policy, "Bandit-v8", n_envs=2, n_steps=4, max_new_tokens=3, eval_every=0)
    agent.save(tmp_path / "last")
    found: Any = SB3A2C.load(tmp_path / "last", device="cpu")
    assert found.writer.model.dtype == torch.bfloat16
    assert_same(weights(found), weights(agent))
