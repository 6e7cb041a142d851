"""The views of Stable-Baselines3: what they show, what they pay, and that they are Gymnasium."""

from __future__ import annotations

import doctest
import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3.common.env_checker
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env

from agents.policies import CausalLMPolicy
from agents.policies.models import TINY
from agents.rollout import play
from agents.sampling import SamplingConfig
from llm_envs.wrappers import NumericView, TokenView, numeric_view, token_view
from llm_envs.wrappers.numeric_view import numeric_observation

VIEWS = [
    pytest.param(lambda: NumericView(gym.make("RecommendationClicks-v0")), id="numeric"),
    pytest.param(
        lambda: NumericView(gym.make("RecommendationClicks-v0"), scaling="none"), id="numeric-none"
    ),
    pytest.param(lambda: TokenView(gym.make("DialogueQA-v0"), TINY, max_new_tokens=3), id="token"),
    pytest.param(lambda: TokenView(gym.make("Summarization-v0"), TINY, vocabulary=5000), id="more"),
]


@pytest.fixture(scope="module")
def policy() -> CausalLMPolicy:
    return CausalLMPolicy.from_pretrained("tiny", device="cpu", sampling=SamplingConfig(6))


def tokens_of(observation: dict[str, Any]) -> list[int]:
    return observation["tokens"][: observation["length"][0]].tolist()  # type: ignore[no-any-return]


# --- both ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", VIEWS)
def test_both_environment_checkers_find_nothing(make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(make())
        stable_baselines3.common.env_checker.check_env(make())


@pytest.mark.parametrize("make", VIEWS)
def test_the_spec_makes_the_same_environment_again(make: Any) -> None:
    env = make()
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.observation_space == env.observation_space
    assert again.action_space == env.action_space
    env.action_space.seed(0)
    same = [e.reset(seed=7) for e in (env, again)]
    for _ in range(4):
        np.testing.assert_equal(same[0], same[1])
        action = env.action_space.sample()
        same = [e.step(action) for e in (env, again)]
        if same[0][2]:
            break
    np.testing.assert_equal(same[0], same[1])


def test_a_tokenizer_that_was_loaded_stands_in_the_spec(policy: CausalLMPolicy) -> None:
    env = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer, context=300)
    again = gym.make(env.spec)
    np.testing.assert_equal(env.reset(seed=3), again.reset(seed=3))


def test_importing_the_wrappers_imports_no_torch() -> None:
    code = "import sys, llm_envs.wrappers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", [numeric_view, token_view])
def test_the_examples_in_the_docstrings_run(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


# --- numbers ---------------------------------------------------------------------------------


def test_the_numbers_are_the_features_of_the_same_episode() -> None:
    inner, env = (
        gym.make("RecommendationClicks-v0"),
        NumericView(gym.make("RecommendationClicks-v0")),
    )
    bare = NumericView(gym.make("RecommendationClicks-v0"), scaling="none")
    text, _ = inner.reset(seed=5)
    seen, told = env.reset(seed=5)
    raw, _ = bare.reset(seed=5)
    for action in (3, 0, 4, 1):
        assert raw.tolist() == text["features"].ravel().tolist()
        features = text["features"].astype(np.float64)
        spread = features.std(0)
        expected = np.where(spread > 0, (features - features.mean(0)) / (spread + (spread == 0)), 0)
        np.testing.assert_allclose(seen.reshape(5, -1), expected, atol=1e-5)
        assert seen in env.observation_space
        text, *_ = inner.step(action)
        seen, reward, terminated, _, told = env.step(action)
        raw, *_ = bare.step(action)
        assert reward == (1.0 if told["score"] else -1.0)
    assert terminated
    assert not seen.any(), "after the last step there are no candidates"


def test_numbers_that_differ_by_rounding_do_not_differ() -> None:
    features = np.full((5, 2), 0.1, np.float32)
    features[0, 0] += np.float32(1e-8)
    assert np.abs(numeric_observation(features)).max() < 0.01


@pytest.mark.parametrize("k", [2, 3, 5, 50])
def test_standardised_numbers_stay_within_their_bound(k: int) -> None:
    rng = np.random.default_rng(0)
    rare = np.zeros((k, 3), np.float32)
    rare[k - 1, :] = 1.0  # the sharpest case: one of k has it
    for features in (rare, rng.random((k, 3), np.float32) ** 9):
        numbers = numeric_observation(features)
        assert np.abs(numbers).max() <= np.float32(np.sqrt(k - 1))
        np.testing.assert_allclose(numbers.reshape(k, 3).std(0), 1.0, rtol=1e-5)


# --- tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1024, 90])
def test_p21_the_tokens_are_those_that_the_policy_read_and_sampled(
    policy: CausalLMPolicy, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dialogue that a policy played is played again token by token: same ids, same rewards.

    In the small context beginnings are cut off, and the answers of 6 tokens meet their limit.
    """
    monkeypatch.setattr(policy, "context", context)
    policy.generator.manual_seed(0)  # the policy is shared: what it drew before must not matter
    seeds = [11, 12, 13, 14]
    player = policy.begin()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A conversation is longer")
        steps = play(player, gym.make_vec("DialogueQA-v0", num_envs=len(seeds)), seeds=seeds)
    assert 0 < player.cut < player.answers, "the test needs answers of both kinds"
    env = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer, max_new_tokens=6, context=context)
    for row, seed in enumerate(seeds):
        observation, info = env.reset(seed=seed)
        assert info["turn"] == 0
        earned: list[tuple[float, str]] = []
        for sequence in (s for s in player.sequences if s.row == row):
            if sequence.turns[0] >= 0 or all(t < 0 for t in sequence.turns):
                continue
            for i, turn in enumerate(sequence.turns):
                if turn < 0:
                    continue
                assert tokens_of(observation) == sequence.ids[:i]
                observation, reward, over, truncated, info = env.step(sequence.ids[i])
                assert not truncated
                if info:
                    earned.append((reward, info["messages"][-2]["content"]))
                else:
                    assert (reward, over) == (0.0, False)
        mine = [s for s in steps if s.row == row]
        assert over
        assert earned == [(s.reward, s.info["messages"][-2]["content"]) for s in mine]
        assert all(s.info["turn"] == s.turn + 1 for s in mine)


def test_p21_what_was_sampled_is_not_encoded_again(policy: CausalLMPolicy) -> None:
    tokenizer = policy.tokenizer
    odd = [t for c in "Lima" for t in tokenizer(c, add_special_tokens=False)["input_ids"]]
    assert odd != tokenizer("Lima", add_special_tokens=False)["input_ids"], (
        "a test needs an odd one"
    )
    env = TokenView(gym.make("DialogueQA-v0"), tokenizer, context=1024)
    start = tokens_of(env.reset(seed=2)[0])
    for token in [*odd, env.end]:
        observation, _, over, _, info = env.step(token)
    assert info["messages"][1]["content"] == "Lima"
    assert tokens_of(observation)[: len(start) + len(odd) + 1] == [*start, *odd, env.end]
    if not over:
        added = tokens_of(observation)[len(start) + len(odd) + 1 :]
        assert tokenizer.decode(added).startswith("\nUser:")


def test_an_answer_that_meets_the_limit_gets_no_forged_end(policy: CausalLMPolicy) -> None:
    env = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer, max_new_tokens=2, context=1024)
    start = tokens_of(env.reset(seed=2)[0])
    [word] = policy.tokenizer(" the", add_special_tokens=False)["input_ids"]
    first = env.step(word)
    assert (first[1], first[4]) == (0.0, {})
    observation, _, _, _, info = env.step(word)
    assert info["messages"][1]["content"] == "the the"
    after = tokens_of(observation)[len(start) :]
    assert after[:2] == [word, word]
    assert env.end not in after


def test_padding_stands_on_the_right_and_a_long_prompt_loses_its_beginning(
    policy: CausalLMPolicy,
) -> None:
    wide = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer, context=1024)
    tight = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer, max_new_tokens=4, context=30)
    whole, _ = wide.reset(seed=1)
    cut, _ = tight.reset(seed=1)
    length = whole["length"][0]
    assert (whole["tokens"][length:] == wide.end).all()
    assert tokens_of(cut) == tokens_of(whole)[-26:]
    for n in range(1, 4):
        observation, *_ = tight.step(5)
        assert tokens_of(observation) == [*tokens_of(cut), *[5] * n]


def test_tokens_need_an_episode_in_play(policy: CausalLMPolicy) -> None:
    env = TokenView(gym.make("Summarization-v0"), policy.tokenizer).unwrapped
    env = TokenView(env, policy.tokenizer)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(5)
    env.reset(seed=0)
    assert env.step(env.end)[2]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(5)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NumericView(gym.make("DialogueQA-v0")), r"no choosing task.*TokenView"),
        (lambda: NumericView(gym.make("CartPole-v1")), r"no choosing task"),
        (
            lambda: NumericView(gym.make("RecommendationClicks-v0"), scaling="all"),  # type: ignore[arg-type]
            "scaling is 'all'",
        ),
        (
            lambda: TokenView(gym.make("RecommendationClicks-v0"), TINY),
            r"no writing task.*NumericView",
        ),
        (
            lambda: TokenView(gym.make("DialogueQA-v0"), TINY, max_new_tokens=9, context=9),
            "max_new_tokens 9 leaves no room.*9 tokens",
        ),
        (lambda: TokenView(gym.make("DialogueQA-v0"), TINY, max_new_tokens=0), "max_new_tokens"),
        (
            lambda: TokenView(gym.make("DialogueQA-v0"), TINY, vocabulary=100),
            "vocabulary is 100.*4096",
        ),
    ],
)
def test_impossible_views_are_refused_by_name(make: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize("action", [-1, 4096, "word", 1.5])
def test_a_token_outside_the_vocabulary_is_refused(policy: CausalLMPolicy, action: Any) -> None:
    env = TokenView(gym.make("DialogueQA-v0"), policy.tokenizer)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="does not lie in"):
        env.step(action)
