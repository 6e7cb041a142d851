"""REINFORCE as an agent: its gradient against enumeration, its state, and that it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agents import CausalLMPolicy, Reinforce
from agents.policies.causal_lm import TokenSequence
from agents.rollout import Rollout
from agents.sampling import Completion, SamplingConfig
from three_tokens import (
    ANSWERS,
    CONTEXT,
    END,
    PROMPT,
    A,
    B,
    answer_log_probs,
    gradient,
    listed,
    make_agent,
    make_model,
    make_tokenizer,
    parameters,
    relative,
    rollout_of,
    token_log_probs,
)

pytestmark = pytest.mark.usefixtures("three_token_tasks")

# --- the gradient ----------------------------------------------------------------------------


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


def moved(agent: Any, scale: float = 0.2) -> Any:
    """The agent in float64, its policy away from the reference, or there is no divergence."""
    agent.policy.model.double()
    agent.reference.model.double()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p += scale * torch.randn_like(p)
    return agent


def charged(agent: Any, rewards: Tensor, k: int) -> tuple[Rollout, Tensor]:
    """One listed answer as if it had been sampled, and its reward less the KL penalty."""
    rollout = listed(rewards, [k])
    model = agent.policy.model
    rollout.old_log_probs = [token_log_probs(model, s).detach() for s in rollout.sequences]
    return rollout, agent.charged_rewards(rollout)[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_p06_at_the_known_optimum_no_sample_has_a_gradient(family: str, name: str) -> None:
    """π* ∝ π_ref exp(r / β): any policy is the optimum for r = β log(π / π_ref) + c."""
    beta, c = 0.4, 0.3
    settings = {"kl_in": "reward", "kl_coef": beta, "max_new_tokens": 2}
    agent = moved(make_agent(family=family, agent=name, **settings))
    own, reference = (answer_log_probs(p.model.eval()) for p in (agent.policy, agent.reference))
    rewards = (beta * (own - reference) + c).detach()
    assert rewards.std() > 0.1
    for k in range(len(ANSWERS)):
        rollout, value = charged(agent, rewards, k)
        agent.accumulate_gradients(rollout, value - c)  # β log Z = c is the state's value
        assert gradient(agent).abs().max() < 1e-6
        agent.accumulate_gradients(rollout, rollout.rewards - c)  # it is not for lack of a slope
        assert gradient(agent).abs().max() > 1e-3 * (rollout.rewards - c).abs()


@pytest.mark.parametrize("env", ["Identity-v9", "Steps-v9"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ["rloo", "grpo", "ppo"])
def test_p06_holds_for_what_the_agent_samples_itself(
    env: str, temperature: float, name: str
) -> None:
    """In float32, with whatever temperature: its KL is that of what is sampled."""
    settings = {"kl_in": "reward", "kl_coef": 0.5, "temperature": temperature}
    once: dict[str, Any] = {} if name == "rloo" else {"epochs": 1, "minibatches": 1}
    if name == "ppo":
        once |= {"value_coef": 0.0, "normalise_advantages": False}
    agent = make_agent(env, agent=name, env_kwargs={"letters": ("ab", "b")}, **settings, **once)
    if name == "ppo":  # which says what the state is worth
        torch.nn.init.constant_(agent.critic.bias, 0.3)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p += 0.2 * torch.randn_like(p)
    rollout = rollout_of(agent)
    rewards = torch.zeros(len(rollout.rewards))
    for sequence, of in zip(rollout.sequences, rollout.decision_of, strict=True):
        own, reference = (
            token_log_probs(p.model, sequence, temperature)
            if env == "Identity-v9"
            else choice_log_prob(p.model, sequence, temperature)
            for p in (agent.policy, agent.reference)
        )
        rewards.index_add_(0, of, 0.5 * (own - reference).detach())
    rollout.rewards = rewards + 0.3
    assert rewards.std() > 0.05
    found, metrics = agent.charged_rewards(rollout)
    assert (found - 0.3).abs().max() < 1e-5
    assert metrics["train/kl"] == pytest.approx(rewards.sum().item() / 0.5 / rollout.tokens, 1e-4)
    assert agent.update(rollout)["train/grad_norm"] < 1e-4
    rollout.rewards = torch.randn(len(rewards))
    assert agent.update(rollout)["train/grad_norm"] > 1e-2


def choice_log_prob(model: Any, decision: Any, temperature: float) -> Tensor:
    """Of a choice among texts of one token: what the model says of them after the prompt."""
    logits = model.eval()(input_ids=torch.tensor([decision.prompt])).logits[0, -1].log_softmax(-1)
    firsts = [candidate[0] for candidate in decision.candidates]
    return (logits[firsts] / temperature).log_softmax(-1)[[decision.action]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_p07_k1_in_the_reward_has_the_gradient_of_the_enumerated_divergence(family: str) -> None:
    """Of KL(π ‖ π_ref) over all whole answers, and not of a token's only."""
    beta = 0.4
    settings = {"kl_in": "reward", "kl_coef": beta, "max_new_tokens": 2, "baseline": "none"}
    agent = moved(make_agent(family=family, **settings))
    own, reference = (answer_log_probs(p.model.eval()) for p in (agent.policy, agent.reference))
    probabilities = own.exp()
    divergence = (probabilities * (own - reference.detach())).sum()
    assert divergence.item() > 0.1
    (beta * divergence).backward()
    exact = gradient(agent)
    expected = torch.zeros_like(exact)
    for k in range(len(ANSWERS)):
        rollout, value = charged(agent, torch.zeros(len(ANSWERS), dtype=torch.float64), k)
        agent.accumulate_gradients(rollout, value)
        expected += probabilities[k].item() * gradient(agent)
    assert relative(expected, exact) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_p07_the_divergence_in_the_loss_is_the_enumerated_one_of_a_token(family: str) -> None:
    """Exact, so whichever answer was sampled: it has no variance."""
    beta = 0.4
    agent = moved(make_agent(family=family, kl_coef=beta, max_new_tokens=1, baseline="none"))
    own, reference = (
        p.model.eval()(input_ids=torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        for p in (agent.policy, agent.reference)
    )
    divergence = (own.exp() * (own - reference.detach())).sum()
    assert divergence.item() > 0.05
    (beta * divergence).backward()
    exact = gradient(agent)
    for token in (END, A, B, 3):
        sequence = TokenSequence(0)
        sequence.read(PROMPT)
        sequence.wrote(0, Completion([token], [0.0], cut=token != END))
        rollout = dataclasses.replace(
            listed(torch.zeros(len(ANSWERS), dtype=torch.float64), [0]), sequences=[sequence]
        )
        metrics = agent.accumulate_gradients(rollout, rollout.rewards)
        assert relative(gradient(agent), exact) < 1e-6
        assert metrics["train/kl"] == pytest.approx(divergence.item(), rel=1e-6)
        assert metrics["train/loss"] == pytest.approx(beta * divergence.item(), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_p07_the_divergence_in_the_loss_has_the_gradient_of_whole_answers(family: str) -> None:
    beta = 0.4
    agent = moved(make_agent(family=family, kl_coef=beta, max_new_tokens=2, baseline="none"))
    own, reference = (answer_log_probs(p.model.eval()) for p in (agent.policy, agent.reference))
    probabilities = own.exp()
    (beta * (probabilities * (own - reference.detach())).sum()).backward()
    exact = gradient(agent)
    expected = torch.zeros_like(exact)
    for k, ids in enumerate(ANSWERS):
        rollout, _ = charged(agent, torch.zeros(len(ANSWERS), dtype=torch.float64), k)
        agent.accumulate_gradients(rollout, rollout.rewards)  # a mean over the answer's tokens
        expected += probabilities[k].item() * len(ids) * gradient(agent)
    assert relative(expected, exact) < 1e-6


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_p07_the_adapted_weight_is_the_one_that_is_charged(kl_in: str) -> None:
    """Only the penalty pulls, as there is no reward; twice the weight is twice the pull."""
    settings = {"kl_in": kl_in, "kl_coef": 0.3, "baseline": "none", "max_grad_norm": 0.0}
    agent = moved(make_agent(**settings))
    rollout = rollout_of(agent)
    rollout.rewards = torch.zeros(len(rollout.rewards), dtype=torch.float64)
    found = []
    for weight in (0.3, 0.6):
        agent.kl_coef = weight
        charge = agent.charged_rewards(rollout)[0]
        agent.accumulate_gradients(rollout, charge)
        found.append(gradient(agent))
    assert found[0].norm() > 1e-3
    assert relative(found[1], 2 * found[0]) < 1e-9


@pytest.mark.parametrize("kl_in", ["loss", "reward"])
@pytest.mark.parametrize("name", ["reinforce", "rloo", "ppo", "grpo", "immediate-reward"])
def test_p07_the_weight_is_adapted_to_what_was_measured(name: str, kl_in: str) -> None:
    settings = {"kl_in": kl_in, "kl_coef": 0.3, "kl_target": 0.1, "kl_horizon": 50}
    agent = make_agent(agent=name, **settings)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p += 0.2 * torch.randn_like(p)
    coef = 0.3
    for _ in range(3):
        metrics = agent.update(rollout_of(agent))
        error = min(max(metrics["train/kl"] / 0.1 - 1, -0.2), 0.2)
        coef *= 1 + error * 16 / 50
        assert agent.kl_coef == pytest.approx(coef, rel=1e-9)
    assert coef != pytest.approx(0.3)


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
    for reward, advantage, average in ((1.0, 1.0, 1.0), (3.0, 2.0, 2.0)):
        rollout.rewards[:] = reward
        assert agent.advantages(rollout).tolist() == [advantage] * len(rollout.rewards)
        agent.update(rollout)
        assert agent.average == average
    rollout.rewards[0] = float("nan")
    with pytest.raises(FloatingPointError):  # what was not learned from is not remembered
        agent.update(rollout)
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

STEPS = 16  # of one update


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

    for moment in ("agents.policy_agent.save_file", "agents.checkpoints.os.replace"):
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


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["none", "batch", "moving", "leave-one-out", "critic"])
def test_p28_every_baseline_solves_the_bandit(baseline: str) -> None:
    settings = {"learning_rate": 1e-2, "prompts": 8, "group_size": 16, "entropy_coef": 0.3}
    agent = make_agent("Bandit-v9", baseline=baseline, max_new_tokens=2, **settings)
    agent.learn(10 * 128)
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
        ({"entropy_coef": float("nan")}, "entropy_coef is nan"),
        ({"kl_coef": float("inf")}, "kl_coef is inf"),
        ({"moving_decay": 1.0}, "moving_decay is 1.0"),
        ({"value_coef": -1.0}, "value_coef is -1.0"),
        ({"agent": "ppo", "value_coef": -1.0}, "value_coef is -1.0"),
        ({"agent": "ppo", "value_clip": -0.2}, "value_clip is -0.2"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"learning_rate": 1e38}, r"learning_rate is 1e\+38.*float32"),
        ({"temperature": 0.0}, "temperature is 0.0.*chance"),
        ({"max_new_tokens": CONTEXT}, "leaves no room"),
        ({"env_kwargs": {"split": "test"}}, "split is 'test'"),
        ({"baseline": "leave_one_out"}, "baseline is 'leave_one_out'.*leave-one-out"),
        ({"kl_in": "rewards"}, "kl_in is 'rewards'.*Use one of loss, reward"),
        ({"agent": "ppo", "ratio": "answer"}, "ratio is 'answer'.*Use one of token, sequence"),
        ({"agent": "grpo", "old_log_probs": "own"}, "old_log_probs is 'own'.*sampler, recomputed"),
        ({"agent": "immediate-reward", "anchor": "one"}, "anchor is 'one'.*zero, initial"),
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
