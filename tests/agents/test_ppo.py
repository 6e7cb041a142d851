"""PPO and GRPO against REINFORCE, plain loops, and every way in which an episode can be cut off."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from agents import objectives
from agents.policies.models import eval_mode
from agents.ppo import Credit
from agents.rollout import Rollout, collect, episode_seeds
from three_tokens import (
    Steps,
    gradient,
    make_agent,
    registered,
    relative,
    rollout_of,
    token_log_probs,
)

DIALOGUES = {"letters": ("ab", "b", "aab")}
ONCE: dict[str, Any] = {"epochs": 1, "minibatches": 1}

pytestmark = pytest.mark.usefixtures("three_token_tasks")


def double(agent: Any) -> Any:
    """The agent in float64, for exact comparisons."""
    agent.policy.model.double()
    for other in (agent.critic, agent.reference and agent.reference.model):
        if other is not None:
            other.double()
    return agent


def make(env: str = "Identity-v9", agent: str = "ppo", **settings: Any) -> Any:
    """An agent whose critic, if there is one, says something."""
    made = make_agent(env, agent=agent, **settings)
    if made.critic is not None:
        torch.manual_seed(5)
        torch.nn.init.normal_(made.critic.weight, std=0.5)
        torch.nn.init.constant_(made.critic.bias, 0.2)
    return made


def everything(rollout: Rollout) -> list[int]:
    return list(range(len(rollout.sequences)))


def update_gradient(agent: Any, rollout: Rollout) -> Tensor:
    """The gradient that the (only) step of one update is made with."""
    found: list[Tensor] = []
    agent.config = dataclasses.replace(agent.config, max_grad_norm=0.0)  # its size counts, too
    agent.take_step = lambda loss: found.append(gradient(agent))
    agent.update(rollout)
    [only] = found
    return only


# --- the clipped loss ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("agent", ["ppo", "grpo"])
@pytest.mark.parametrize(
    ("env", "family"), [("Identity-v9", "llama"), ("Identity-v9", "gpt2"), ("Steps-v9", "gpt2")]
)
def test_p02_on_what_was_just_sampled_the_gradient_is_that_of_reinforce(
    env: str, family: str, agent: str, ratio: str
) -> None:
    # With dropout in updates, ratios would be anything.
    kwargs = {"letters": ("ab", "b")}
    shared: dict[str, Any] = {"family": family, "dropout": 0.5, "env_kwargs": kwargs}
    clipped = double(make(env, agent, ratio=ratio, old_log_probs="recomputed", **ONCE, **shared))
    plain = double(make(env, "reinforce", baseline="none", **shared))
    assert clipped.policy.model.train().training
    rollout = rollout_of(clipped)
    advantages = torch.randn(len(rollout.rewards), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(advantages)
    if agent == "ppo":  # the critic's loss has a gradient of its own
        clipped.config = dataclasses.replace(clipped.config, value_coef=0.0)
    credit = Credit(advantages, zeros, zeros)
    clipped.accumulate_gradients(clipped.recompute(rollout), credit, everything(rollout))
    plain.accumulate_gradients(rollout, advantages)
    expected = gradient(plain)
    assert expected.norm() > 0.01
    assert relative(gradient(clipped), expected) < 1e-9


@pytest.mark.parametrize("old", ["sampler", "recomputed"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_p02_one_update_with_raw_advantages_is_one_of_reinforce(ratio: str, old: str) -> None:
    shared: dict[str, Any] = {"dropout": 0.5, "family": "gpt2", "env_kwargs": DIALOGUES}
    clipped = make_agent(
        agent="ppo",
        ratio=ratio,
        old_log_probs=old,
        normalise_advantages=False,
        value_coef=0.0,
        **ONCE,
        **shared,
    )
    # A critic that begins at 0 leaves the rewards as they are.
    plain = make_agent(agent="reinforce", baseline="none", **shared)
    rollout = rollout_of(clipped)
    expected = update_gradient(plain, rollout)
    assert relative(update_gradient(clipped, rollout), expected) < 1e-5


@pytest.mark.parametrize("agent", ["ppo", "grpo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    ("env", "family", "sampling"),
    [
        ("Identity-v9", "gpt2", {}),
        ("Identity-v9", "llama", {"temperature": 0.7, "top_k": 3}),
        ("Steps-v9", "gpt2", {"temperature": 1.6}),
    ],
)
def test_p02_the_first_ratio_is_1(
    monkeypatch: pytest.MonkeyPatch,
    env: str,
    family: str,
    sampling: dict[str, Any],
    ratio: str,
    agent: str,
) -> None:
    """To 1e-5 with the sampler's log-probabilities, and exactly with the update's own."""
    seen: list[Tensor] = []
    loss = objectives.ppo_clip_loss

    def spy(log_ratios: Tensor, *others: Any) -> Tensor:
        seen.append(log_ratios.detach().exp())
        return loss(log_ratios, *others)

    monkeypatch.setattr(objectives, "ppo_clip_loss", spy)
    for old, tolerance in (("sampler", 1e-5), ("recomputed", 0.0)):
        seen.clear()
        made = make(
            env,
            agent,
            family=family,
            dropout=0.5,
            ratio=ratio,
            old_log_probs=old,
            micro_batch_tokens=60,  # several forward passes
            env_kwargs={"letters": ("ab", "b", "bba")},
            **ONCE,
            **sampling,
        )
        rollout = rollout_of(made)
        metrics = made.update(rollout)
        assert len(seen) > 1
        ratios = torch.cat(seen)
        assert len(ratios) == (rollout.tokens if ratio == "token" else len(rollout.rewards))
        assert (ratios - 1).abs().max() <= tolerance
        assert metrics["train/approx_kl"] <= tolerance**2
        assert metrics["train/clip_fraction"] == 0.0
        assert made.policy.model.training, "the caller's mode was changed"


@pytest.mark.parametrize("members", [range(6), (1, 4, 5)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_clipped_update_equals_a_plain_loop(ratio: str, members: Sequence[int]) -> None:
    """Loss, gradient and metrics with log-probabilities that have moved, answer by answer."""
    settings = {"prompts": 3, "group_size": 2, "env_kwargs": DIALOGUES, "value_clip": 0.1}
    coefs = {"entropy_coef": 0.3, "kl_coef": 0.2}
    agent = double(make(agent="ppo", ratio=ratio, **coefs, **settings))
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator())
    rollout = rollout_of(agent, seed=9)
    generator = torch.Generator().manual_seed(3)
    moved = [token_log_probs(agent.policy.model, s).detach() for s in rollout.sequences]
    rollout.old_log_probs = [
        x + 0.3 * torch.randn(len(x), dtype=x.dtype, generator=generator) for x in moved
    ]
    D = len(rollout.rewards)
    advantages, returns, old_values = torch.randn(3, D, dtype=torch.float64, generator=generator)
    metrics = agent.accumulate_gradients(
        rollout, Credit(advantages, old_values, returns), list(members)
    )
    found = gradient(agent)
    surrogate, clipped, kl, entropies, pulls, answers = [], [], [], [], [], []
    for i in members:
        s, of, old = rollout.sequences[i], rollout.decision_of[i], rollout.old_log_probs[i]
        new = token_log_probs(agent.policy.model, s)
        kl.append((new - old).exp() - 1 - (new - old))
        own, reference = (distributions(m, s) for m in (agent.policy.model, agent.reference.model))
        entropies.append(own.entropy())
        divergences = torch.distributions.kl_divergence(own, reference)
        for d in sorted(set(of.tolist())):
            answers.append(d)
            chosen = [n for n in range(len(of)) if of[n] == d]
            for k, n in enumerate(chosen):  # what it brings about counts as its cost
                later = divergences[chosen[k + 1 :]].sum().detach()
                pulls.append(divergences[n] + later * (new[n] - new[n].detach()))
            ratios = (new - old)[of == d].exp()
            for rho in [ratios.prod()] if ratio == "sequence" else ratios:
                near = min(max(rho, torch.tensor(0.8).double()), torch.tensor(1.2).double())
                surrogate.append(torch.minimum(rho * advantages[d], near * advantages[d]))
                clipped.append(abs(rho.item() - 1) > 0.2)
    D, N = len(answers), len(pulls)
    values, old_values, returns = (
        x[answers] for x in (naive_values(agent, rollout), old_values, returns)
    )
    near = old_values + (values - old_values).clamp(-0.1, 0.1)
    value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum() / 2 / D
    loss = -torch.stack(surrogate).sum() / D + 0.1 * value_loss
    loss += 0.2 * torch.stack(pulls).sum() / N - 0.3 * torch.cat(entropies).sum() / N
    loss.backward()  # type: ignore[no-untyped-call]
    assert relative(found, gradient(agent)) < 1e-6
    expected = {
        "train/loss": loss.item(),
        "train/value_loss": value_loss.item(),
        "train/clip_fraction": np.mean(clipped),
        "train/approx_kl": torch.cat(kl).mean().item(),
        "train/entropy": torch.cat(entropies).mean().item(),
        "train/kl": torch.stack(pulls).mean().item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert metrics["train/kl"] > 0.01
    assert 0.1 < metrics["train/clip_fraction"] < 0.9


def distributions(model: Any, sequence: Any) -> torch.distributions.Categorical:
    """Of the tokens that were sampled."""
    with eval_mode(model):
        logits = model(input_ids=torch.tensor([sequence.ids])).logits[0]
    sampled = [i - 1 for i, turn in enumerate(sequence.turns) if turn >= 0]
    return torch.distributions.Categorical(logits=logits[sampled])


def test_reinforce_with_a_critic_equals_a_plain_loop() -> None:
    settings = {"baseline": "critic", "value_coef": 0.3, "gamma": 0.5, "env_kwargs": DIALOGUES}
    agent = double(make(agent="reinforce", **settings))
    rollout = rollout_of(agent)
    D = len(rollout.rewards)
    returns = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    agent.accumulate_gradients(rollout, agent.advantages(rollout, returns), returns)
    found = torch.cat([gradient(agent), agent.critic.weight.grad[0]])
    agent.critic.zero_grad()
    values = naive_values(agent, rollout)
    loss = 0.3 * ((values - returns) ** 2).sum() / 2 / D
    for s, of in zip(rollout.sequences, rollout.decision_of, strict=True):
        credit = (returns - values.detach())[of]
        loss = loss - (credit * token_log_probs(agent.policy.model, s)).sum() / D
    loss.backward()
    assert relative(found, torch.cat([gradient(agent), agent.critic.weight.grad[0]])) < 1e-6


@pytest.mark.parametrize("agent", ["ppo", "grpo"])
def test_the_old_policy_is_recomputed_once_a_rollout(agent: str) -> None:
    """Before every minibatch, all ratios would be 1, and nothing would ever be clipped."""
    made = make(agent=agent, old_log_probs="recomputed", epochs=3, learning_rate=0.05)
    rollout = rollout_of(made)
    rollout.rewards = torch.linspace(-1, 1, len(rollout.rewards))
    metrics = made.update(rollout)
    assert metrics["train/updates"] == 6
    assert metrics["train/approx_kl"] > 1e-3
    assert metrics["train/clip_fraction"] > 0


class Faller(Steps):
    """A wrong choice ends the episode, so that members of a group leave it at different turns."""

    def proceed(self, episode: Any, action: Any, outcome: Any) -> None:
        super().proceed(episode, action, outcome)
        episode.finished = episode.finished or outcome.score == 0


@pytest.mark.parametrize("agent", ["reinforce", "rloo", "ppo", "grpo", "immediate-reward"])
def test_p28_episodes_whose_length_hangs_on_the_choices_are_learned(agent: str) -> None:
    with registered({"Faller-v9": Faller}):
        made = make_agent(
            "Faller-v9",
            agent=agent,
            learning_rate=0.005,
            env_kwargs={"letters": ("abb",)},
        )
        alone = [made.groups(rollout_of(made, seed)) for seed in range(3)]
        assert any((groups.unique(return_counts=True)[1] == 1).any() for groups in alone)
        made.learn(2000)
        found = collect(made.player(deterministic=True), made.envs, seeds=[0] * 16)
        assert found.scores.tolist() == [1.0] * 3 * 16


def test_minibatches_hold_whole_dialogues_and_each_of_them_once_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent = make(agent="ppo", epochs=3, minibatches=5, env_kwargs=DIALOGUES)
    rollout = rollout_of(agent)
    used: list[tuple[list[int], list[int]]] = []
    accumulate = agent.accumulate

    def spy(rollout: Rollout, objective: Any, sequences: list[int]) -> dict[str, float]:
        answers: list[int] = []

        def watched(batch: Any) -> Any:
            answers.extend(batch.answer_of_token.unique().tolist())
            return objective(batch)

        found: dict[str, float] = accumulate(rollout, watched, sequences)
        used.append((list(sequences), sorted(answers)))
        return found

    monkeypatch.setattr(agent, "accumulate", spy)
    assert agent.update(rollout)["train/updates"] == 15
    assert len(used) == 15
    for members, answers in used:
        assert len(members) in (3, 4)  # 16 dialogues in 5 parts
        rows = {rollout.sequences[i].row for i in members}
        assert answers == [d for d, row in enumerate(rollout.rows.tolist()) if row in rows]
    epochs = [used[i : i + 5] for i in (0, 5, 10)]
    for epoch in epochs:
        assert sorted(itertools.chain(*(members for members, _ in epoch))) == list(range(16))
    assert epochs[0] != epochs[1], "every epoch is dealt out anew"


def test_more_minibatches_than_dialogues_leave_none_empty() -> None:
    agent = make(agent="grpo", prompts=1, group_size=2, epochs=1, minibatches=50)
    assert agent.update(rollout_of(agent))["train/updates"] == 2


@pytest.mark.parametrize("agent", ["ppo", "grpo"])
def test_the_update_stops_once_it_has_gone_far_enough(agent: str) -> None:
    def update(target: float | None) -> tuple[dict[str, float], Any]:
        settings = {"epochs": 4, "minibatches": 2, "learning_rate": 0.02, "target_kl": target}
        made = make(agent=agent, **settings)
        rollout = rollout_of(made)
        rollout.rewards = torch.linspace(-1, 1, len(rollout.rewards))
        return made.update(rollout), made

    free, _ = update(None)
    assert free["train/updates"] == 8
    assert free["train/approx_kl"] > 1e-3
    held, stopped = update(1e-6)
    assert held["train/updates"] == 1, "the first step is always taken; after it, it is too far"
    assert gradient(stopped).abs().max() == 0, "what was not used is thrown away"
    assert update(1e6)[0] == free
    made = make(agent=agent, target_kl=1e-6)
    rollout = rollout_of(made)
    rollout.old_log_probs = [x - 0.5 for x in rollout.old_log_probs]
    assert made.update(rollout)["train/updates"] == 1, "too far from the start, it moves once"


# --- credit ----------------------------------------------------------------------------------


def naive_values(agent: Any, rollout: Rollout) -> Tensor:
    """V before every answer, (D,): each prefix is read alone, by the trunk, without dropout."""
    found: dict[int, Tensor] = {}
    for s, of in zip(rollout.sequences, rollout.decision_of, strict=True):
        if hasattr(s, "prompt"):
            found[int(of[0])] = value_after(agent, s.prompt)
            continue
        answers = iter(of.tolist())
        for i, turn in enumerate(s.turns):
            d = next(answers) if turn >= 0 else -1
            if turn >= 0 and d not in found:
                found[d] = value_after(agent, s.ids[:i])
    return torch.stack([found[d] for d in range(len(rollout.rewards))])


def value_after(agent: Any, ids: Any) -> Tensor:
    with eval_mode(agent.policy.model):
        trunk = agent.policy.model.base_model
        hidden = trunk(input_ids=torch.tensor([list(ids)])).last_hidden_state[0, -1]
    value: Tensor = hidden @ agent.critic.weight[0] + agent.critic.bias[0]
    return value


@pytest.mark.parametrize("agent", ["ppo", "reinforce"])
@pytest.mark.parametrize(
    ("env", "family"), [("Identity-v9", "gpt2"), ("Identity-v9", "llama"), ("Steps-v9", "llama")]
)
def test_the_critics_values_are_those_of_each_prefix_read_alone(
    env: str, family: str, agent: str
) -> None:
    """Value, gradient and place of every turn; dropout is off, micro-batches change nothing."""
    kwargs: dict[str, Any] = {"letters": ("ab", "b", "aab")}
    made = double(make(env, agent, family=family, dropout=0.5, env_kwargs=kwargs, **(
        {} if agent == "ppo" else {"baseline": "critic"}
    )))  # fmt: skip
    made.policy.micro_batch_tokens = 50
    rollout = rollout_of(made)
    expected = naive_values(made, rollout)
    assert expected.std() > 0.05
    weights = torch.linspace(-1, 2, len(expected), dtype=torch.float64)
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    slope = gradient(made)
    made.critic.zero_grad()
    for members in made.policy.micro_batches(rollout.sequences):
        mine = [rollout.sequences[i] for i in members]
        places = torch.cat([rollout.states_of(i) for i in members])
        for values in (
            made.policy.score(mine, None, made.critic).values,
            made.policy.values(mine, made.critic),
        ):
            torch.testing.assert_close(values, expected[places], rtol=0, atol=1e-6)
        (values * weights[places]).sum().backward()
    assert relative(gradient(made), slope) < 1e-6
    if agent == "ppo":
        torch.testing.assert_close(made.values(rollout), expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("env", ["Identity-v9", "Steps-v9"])
@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.95), (0.9, 0.8), (1.0, 1.0)])
def test_p08_the_agents_credit_is_gae_across_the_turns_of_each_dialogue(
    env: str, gamma: float, lam: float
) -> None:
    settings = {"gamma": gamma, "lam": lam, "env_kwargs": DIALOGUES}
    agent = make(env, normalise_advantages=False, **settings)
    rollout = rollout_of(agent, seed=8)
    assert set(rollout.lengths.tolist()) == {1, 2, 3}
    rewards = torch.randn(len(rollout.rewards), generator=torch.Generator().manual_seed(1))
    credit = agent.credit(rollout, rewards)
    values = naive_values(agent, rollout).detach()
    for row in range(rollout.episodes):
        mine = (rollout.rows == row).nonzero()[:, 0]
        mine = mine[rollout.turns[mine].argsort()]
        following, advantage, expected = 0.0, 0.0, []
        for d in reversed(mine.tolist()):
            delta = float(rewards[d] + gamma * following - values[d])
            advantage = delta + gamma * lam * advantage
            expected.append(advantage)
            following = float(values[d])
        expected.reverse()
        assert credit.advantages[mine].tolist() == pytest.approx(expected, abs=1e-5)
        returns = np.array(expected) + values[mine].numpy()
        assert credit.returns is not None
        np.testing.assert_allclose(credit.returns[mine], returns, atol=1e-5)
    scaled = make(env, **settings).credit(rollout, rewards)
    torch.testing.assert_close(
        scaled.advantages, objectives.normalised_advantage(credit.advantages), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(scaled.returns, credit.returns)


def test_p04_a_batch_that_all_earned_alike_teaches_ppo_nothing() -> None:
    agent = make_agent("Bandit-v9", agent="ppo", value_coef=0.0, **ONCE)
    rollout = rollout_of(agent)
    rollout.rewards[:] = 0.1  # its mean over 16 is not 0.1 in float32
    assert update_gradient(agent, rollout).abs().max() == 0


@pytest.mark.parametrize("std", [False, True])
def test_p05_grpos_credit_is_that_of_each_group_and_turn(std: bool) -> None:
    agent = make(agent="grpo", std=std, env_kwargs=DIALOGUES)
    rollout = rollout_of(agent)
    rewards = torch.randn(len(rollout.rewards), generator=torch.Generator().manual_seed(2))
    expected = np.zeros(len(rewards))
    for group, turn in itertools.product(range(4), range(3)):
        mine = ((rollout.rows // 4 == group) & (rollout.turns == turn)).numpy()
        if mine.any():
            assert mine.sum() == 4, "members of a group play the same episode"
            own = rewards.numpy()[mine].astype(np.float64)
            scale = own.std(ddof=1) + 1e-4 if std else 1.0
            expected[mine] = (own - own.mean()) / scale
    np.testing.assert_allclose(agent.credit(rollout, rewards).advantages, expected, atol=1e-5)


def test_p04_grpo_refuses_a_group_of_one_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"group_size is 1.*2 or more, or ppo"):
        make(agent="grpo", group_size=1)


# --- micro-batches and order -----------------------------------------------------------------

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", {"gamma": 0.9, "value_clip": 0.1}),
    "ppo, sequence": ("ppo", {"ratio": "sequence", "kl_coef": 0.3}),
    "grpo": ("grpo", {"std": True, "entropy_coef": 0.1}),
    "grpo, recomputed": ("grpo", {"old_log_probs": "recomputed", "kl_coef": 0.3}),
    "rloo": ("rloo", {"kl_coef": 0.3}),
    "critic": ("reinforce", {"baseline": "critic", "gamma": 0.9, "kl_coef": 0.3}),
}


def shuffled(rollout: Rollout) -> Rollout:
    order = torch.randperm(len(rollout.sequences), generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(
        rollout,
        sequences=[rollout.sequences[i] for i in order],
        decision_of=[rollout.decision_of[i] for i in order],
        old_log_probs=[rollout.old_log_probs[i] for i in order],
    )


@pytest.mark.parametrize("env", ["Identity-v9", "Steps-v9"])
@pytest.mark.parametrize("kind", KINDS)
def test_p23_micro_batches_and_row_order_change_nothing(env: str, kind: str) -> None:
    name, settings = KINDS[kind]
    if name in ("ppo", "grpo"):
        settings = {**settings, **ONCE}

    def update(tokens: int, shuffle: bool) -> tuple[dict[str, float], Tensor]:
        shape = {"prompts": 3, "group_size": 3, "max_grad_norm": 0.0, "env_kwargs": DIALOGUES}
        agent = make(env, name, **shape, **settings)
        rollout = rollout_of(agent, seed=9)
        torch.manual_seed(1)
        rollout.rewards = torch.randn(len(rollout.rewards))
        with torch.no_grad():  # away from the reference and from what was sampled
            for p in agent.policy.model.parameters():
                p += 0.05 * torch.randn_like(p)
        double(agent)
        agent.policy.micro_batch_tokens = tokens
        assert (len(agent.policy.micro_batches(rollout.sequences)) > 1) is (tokens < 8192)
        found: list[Tensor] = []

        def take(loss: float) -> None:
            critic = [] if agent.critic is None else agent.critic.parameters()
            found.append(torch.cat([gradient(agent), *(p.grad.flatten() for p in critic)]))

        agent.take_step = take
        metrics = agent.update(shuffled(rollout) if shuffle else rollout)
        [only] = found
        return metrics, only

    whole, expected = update(8192, shuffle=False)
    assert expected.norm() > 1e-3
    for tokens, shuffle in ((1, False), (40, True), (8192, True)):
        metrics, found = update(tokens, shuffle)
        assert relative(found, expected) < 1e-6
        assert metrics == pytest.approx(whole, rel=1e-6, abs=1e-12)


# --- episodes that were cut off --------------------------------------------------------------


class Patience(gym.Wrapper[Any, Any, Any, Any]):
    """Truncates episodes after one turn or two, as the first letter has it: rows differ."""

    def reset(self, **arguments: Any) -> Any:
        self.taken = 0
        return self.env.reset(**arguments)

    def step(self, action: Any) -> Any:
        self.taken += 1
        observation, reward, terminated, _, info = self.env.step(action)
        letters = self.env.unwrapped.episode.example.letters  # type: ignore[attr-defined]
        over = self.taken >= (1 if letters[0] == "a" else 2) and not terminated
        return observation, reward, terminated, over, info


# (letters, turns that are played, whether that is the end)
LIMIT = {"ab": (2, True), "b": (1, True), "aab": (2, False), "bbbb": (2, False)}
PATIENCE = {"ab": (1, False), "b": (1, True), "aab": (1, False), "bbbb": (2, False)}


def truncating(
    kind: str, mode: AutoresetMode, env: str = "Identity-v9", agent: str = "ppo", **settings: Any
) -> tuple[Any, dict[str, tuple[int, bool]]]:
    """An agent whose episodes are cut off, and how many turns of each there are to be."""
    kwargs: dict[str, Any] = {"letters": tuple(LIMIT), "vectorization_mode": "sync"}
    kwargs["vector_kwargs"] = {"autoreset_mode": mode}
    kwargs |= {"max_episode_steps": 2} if kind == "limit" else {"wrappers": [Patience]}
    made = make(env, agent, env_kwargs=kwargs, **{"prompts": 8, "group_size": 1, **settings})
    return made, LIMIT if kind == "limit" else PATIENCE


MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", ["limit", "patience"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("env", ["Identity-v9", "Steps-v9"])
def test_p26_truncation_bootstraps_the_value_of_the_last_observation(
    env: str, mode: AutoresetMode, kind: str, rows: int
) -> None:
    """By hand: V of the stored tokens and of what the user said last, never of a new episode."""
    gamma, lam = 0.9, 0.8
    settings = {"gamma": gamma, "lam": lam, "prompts": rows, "normalise_advantages": False}
    agent, expected = truncating(kind, mode, env, **settings)
    rollout = agent.collect()
    seeds = agent_seeds(agent)
    rewards = torch.randn(len(rollout.rewards), generator=torch.Generator().manual_seed(1))
    credit = agent.credit(rollout, rewards)
    values = naive_values(agent, rollout).tolist()
    played = set()
    for row in range(rows):
        letters, last = replay(agent, seeds[row], rollout, row)
        length, ended = expected[letters]
        mine = (rollout.rows == row).nonzero()[:, 0]
        assert rollout.turns[mine].tolist() == list(range(length)), "one episode, from its start"
        assert (row in rollout.left_in) is not ended
        played.add(letters)
        following = 0.0 if ended else value_after(agent, last).item()
        advantage = 0.0
        for d in reversed(mine.tolist()):
            delta = float(rewards[d] + gamma * following - values[d])
            advantage = delta + gamma * lam * advantage
            assert credit.advantages[d].item() == pytest.approx(advantage, abs=1e-5)
            following = values[d]
    assert rows == 1 or played == set(expected), "choose another seed"


def agent_seeds(agent: Any) -> list[int]:
    c = agent.config
    return episode_seeds(agent.seed, agent.iteration, c.prompts, c.group_size)


def replay(agent: Any, seed: int, rollout: Rollout, row: int) -> tuple[str, list[int]]:
    """Play a row again, alone and without limit; return its letters and the last state's tokens.

    Checks the rewards on the way: those of an autoreset are none of them.
    """
    kwargs = {k: v for k, v in agent.env_kwargs.items() if k == "letters"}
    env = gym.make(agent.env_id, split="train", **kwargs)
    observation, _ = env.reset(seed=seed)
    letters = env.unwrapped.episode.example.letters  # type: ignore[attr-defined]
    mine = (rollout.rows == row).nonzero()[:, 0].tolist()
    tokenizer = agent.policy.tokenizer
    ids: list[int] = []
    seen = ""
    for turn, d in enumerate(mine):
        [sequence] = [s for s in rollout.sequences if s.row == row and turn in s.turns]
        action: Any
        if isinstance(observation, str):
            said = [t for t, of in zip(sequence.ids, sequence.turns, strict=True) if of == turn]
            ids += tokenizer(observation[len(seen) :])["input_ids"]
            assert sequence.ids[: len(ids)] == ids
            ids += said
            action = tokenizer.decode([t for t in said if t != agent.policy.end])
            seen = observation + action
        else:
            action = sequence.action
        observation, reward, *_ = env.step(action)
        assert rollout.rewards[d].item() == pytest.approx(reward)
    if isinstance(observation, str):
        return letters, ids + tokenizer(observation[len(seen) :])["input_ids"]
    return letters, tokenizer(observation["prompt"])["input_ids"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["limit", "patience"])
def test_p26_returns_with_a_critic_go_on_after_a_truncation(mode: AutoresetMode, kind: str) -> None:
    agent, expected = truncating(kind, mode, agent="reinforce", gamma=0.9, baseline="critic")
    rollout = agent.collect()
    seeds = agent_seeds(agent)
    found = agent.returns(rollout, rollout.rewards)
    for row in range(rollout.episodes):
        letters, last = replay(agent, seeds[row], rollout, row)
        following = 0.0 if expected[letters][1] else value_after(agent, last).item()
        for d in reversed((rollout.rows == row).nonzero()[:, 0].tolist()):
            following = float(rollout.rewards[d]) + 0.9 * following
            assert found[d].item() == pytest.approx(following, abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_p26_nothing_is_trained_on_autoreset_steps(mode: AutoresetMode) -> None:
    agent, _ = truncating("patience", mode, **ONCE)
    rollout = agent.collect()
    answers = int(rollout.lengths.sum())
    assert len(rollout.rewards) == answers < 2 * rollout.episodes, "as many as were played"
    # What was said to rows that were over is in no sequence, and no sequence is longer.
    assert sum(len(set(s.turns) - {-1}) for s in rollout.sequences) == answers
    assert len(rollout.sequences) == rollout.episodes
    steps = agent.env_steps
    agent.iterate()
    assert agent.env_steps - steps == answers
