"""What every environment of the suite promises, checked for every registered id and split."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import string
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_envs
from installed import playable_ids
from llm_envs.core.env import TextEnv
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.datasets.records import Document
from same import assert_same

IDS = playable_ids()
SPLITS = ("train", "validation", "test")
WRITING = tuple(id for id in IDS if isinstance(gym.make(id).action_space, gym.spaces.Text))
CHOOSING = tuple(id for id in IDS if id not in WRITING)

each_id = pytest.mark.parametrize("id", IDS)
each_writing = pytest.mark.parametrize("id", WRITING)
each_split = pytest.mark.parametrize("split", SPLITS)

INFO_AFTER_RESET = {"example_id", "turn", "messages"}
INFO_AFTER_STEP = INFO_AFTER_RESET | {"score", "feedback"}
INFO_OF_ID = {  # what DESIGN.md and the docstrings promise beyond that
    "DialogueQA-v0": {"score/f1", "score/exact_match"},
    "Summarization-v0": {"score/rouge_1", "score/rouge_2", "score/rouge_l"},
    "RecommendationClicks-v0": {"score/click", "best_score"},
    "TextBattle-v0": {"score/dealt", "score/kept", "best_score"},
    "TextWorld-v0": {"score/nearer", "score/understood"},
    "CustomerService-v0": {"score/rouge_1", "score/rouge_2", "score/rouge_l"},
}
UNSCORED = {"CustomerService-v0": -0.05}  # the reward of a search, which nothing else may cost
SEARCH = " search: how a file is read"  # of most ids just another wrong answer


def assert_unscored(id: str, result: Any) -> None:
    """Check a step that answers nothing: its declared reward, and not a word of a score."""
    _, reward, terminated, _, info = result
    assert reward == UNSCORED[id]
    assert not terminated
    assert info.keys() == INFO_AFTER_RESET | {"feedback"}


def an_action(env: gym.Env[Any, Any], rng: np.random.Generator) -> Any:
    """Draw an action: of the good and the bad ones, so that rewards vary."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        return int(rng.integers(env.action_space.n))
    right = str(rng.choice(env.unwrapped.references))
    odd = "\x00\ud800 東京 \U0001f642\n"
    _, game, commands = env.unwrapped.episode.observation.rpartition("\nYou can: ")
    wrong = str(rng.choice(re.split(r"; |\.\n", commands)[:-1])) if game else " unknown"
    return [f" {right}", f" {right} and more", wrong, "", odd, SEARCH][rng.integers(6)]


def prompt_of(observation: Any) -> str:
    return observation if isinstance(observation, str) else observation["prompt"]


def play(env: gym.Env[Any, Any], steps: int, *, seed: int = 0, going_on: bool = False) -> list[Any]:
    """Play with actions that only depend on the seed and what is seen; return everything seen."""
    rng = np.random.default_rng(seed)
    seen: list[Any] = [] if going_on else [env.reset(seed=seed)]
    for _ in range(steps):
        result = env.step(an_action(env, rng))
        seen.append(result)
        if result[2]:
            seen.append(env.reset())
    return seen


# --- Gymnasium's own checks ----------------------------------------------------------------------


@each_id
@each_split
def test_gymnasium_accepts_it_without_a_warning(id: str, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(id, split=split).unwrapped)


@each_id
@each_split
def test_200_random_steps_through_make_give_no_warning(id: str, split: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(id, split=split)
        env.action_space.seed(1)
        env.reset(seed=1)
        for _ in range(200):
            observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert observation in env.observation_space
            assert type(reward) is float
            assert type(terminated) is bool
            assert truncated is False
            if terminated:
                observation, info = env.reset()
                assert observation in env.observation_space
            assert info["turn"] >= 0


@each_id
def test_it_is_made_under_both_names(id: str) -> None:
    for name in (id, f"llm_envs/{id}"):
        env = gym.make(name)
        assert isinstance(env.unwrapped, TextEnv)
        assert env.spec is not None
        assert env.spec.id == name


# --- Chance --------------------------------------------------------------------------------------


@each_id
def test_one_seed_gives_one_trajectory(id: str) -> None:
    assert_same(*(play(gym.make(id), 200, seed=7) for _ in range(2)))


@each_id
def test_spaces_of_two_environments_are_sampled_independently(id: str) -> None:
    a, b = gym.make(id), gym.make(id)
    a.action_space.seed(1)
    alone = [a.action_space.sample() for _ in range(20)]
    a.action_space.seed(1)
    b.action_space.seed(2)
    among_others = []
    for _ in range(20):
        among_others.append(a.action_space.sample())
        b.action_space.sample()
    assert alone == among_others


def drawn(id: str, seed: int, count: int) -> list[str]:
    env = gym.make(id, split="test")
    return [env.reset(seed=seed if i == 0 else None)[1]["example_id"] for i in range(count)]


@each_id
def test_neighbouring_seeds_share_few_episodes(id: str) -> None:
    """Thirty independent draws from N >= 50 examples agree in 8 or more places by chance with a
    probability of at most C(30, 8) 50^-8 < 2e-7; times 30 pairs and lags, < 5e-6."""
    for split in SPLITS:
        assert len(gym.make(id, split=split).unwrapped.task.examples) >= 50
    episodes = {seed: drawn(id, seed, 30) for seed in (0, 1, 2, 3)}
    assert episodes[0] == drawn(id, 0, 30)
    for a, b in itertools.combinations(episodes, 2):
        for lag in range(-2, 3):  # also no shifted copy, which seed + index would give
            pairs = zip(episodes[a][max(0, lag) :], episodes[b][max(0, -lag) :], strict=False)
            assert sum(x == y for x, y in pairs) < 8


@each_id
def test_what_is_done_in_one_episode_does_not_change_the_next_one(id: str) -> None:
    a, b = gym.make(id), gym.make(id)
    observations = [env.reset(seed=5)[0] for env in (a, b)]
    for turn in range(20):
        assert_same(*observations)
        a.step(an_action(a, np.random.default_rng(turn)))
        observations = [env.reset()[0] for env in (a, b)]


@each_id
def test_asking_for_an_example_gives_it_and_changes_no_later_episode(id: str) -> None:
    asked, plain = gym.make(id), gym.make(id)
    last = asked.unwrapped.task.examples[-1]
    index = len(asked.unwrapped.task.examples) - 1
    for wanted in (last.id, index, np.int64(index)):
        plain.reset(seed=3)
        assert asked.reset(seed=3, options={"example": wanted})[1]["example_id"] == last.id
        assert_same(asked.reset(), plain.reset())


# --- Observations and information ----------------------------------------------------------------


@each_id
@each_split
def test_the_prompt_only_grows(id: str, split: str) -> None:
    env = gym.make(id, split=split)
    rng = np.random.default_rng(2)
    before, _ = env.reset(seed=2)
    for _ in range(200):
        assert prompt_of(before).endswith("Assistant:")
        action = an_action(env, rng)
        after, _, terminated, *_ = env.step(action)
        answer = action if isinstance(action, str) else before["candidates"][action]
        assert prompt_of(after).startswith(prompt_of(before) + answer)
        before = env.reset()[0] if terminated else after


@each_id
@each_split
def test_info_has_exactly_the_documented_keys(id: str, split: str) -> None:
    env = gym.make(id, split=split)
    rng = np.random.default_rng(3)
    _, info = env.reset(seed=3)
    assert info.keys() == INFO_AFTER_RESET
    for _ in range(50):
        before = env.unwrapped.references
        result = env.step(an_action(env, rng))
        _, _, terminated, _, info = result
        if "score" not in info:
            assert_unscored(id, result)
        else:
            assert info.keys() == INFO_AFTER_STEP | INFO_OF_ID[id]
        assert not any(type(value) is tuple and value == before for value in info.values())
        if terminated:
            assert env.unwrapped.references == ()
            _, info = env.reset()
            assert info.keys() == INFO_AFTER_RESET
            assert info["turn"] == 0


@each_id
def test_every_key_is_documented_where_the_environment_is(id: str) -> None:
    documented = str(type(gym.make(id).unwrapped.task).__doc__).partition("## Information")[2]
    documented = documented.partition("## Arguments")[0]
    keys = set(re.findall(r"``([a-z_0-9/]+)``", documented))
    assert INFO_AFTER_STEP | INFO_OF_ID[id] <= keys


@each_id
@each_split
def test_messages_are_the_conversation_that_the_prompt_shows(id: str, split: str) -> None:
    """So that nothing, such as the answer that is due, can slip into one of the two alone."""
    env = gym.make(id, split=split)
    rng = np.random.default_rng(4)
    observation, info = env.reset(seed=4)
    terminated = False
    for _ in range(100):
        shown = "\n".join(
            f"{'User' if message['role'] == 'user' else 'Assistant'}: {message['content']}"
            for message in info["messages"]
        )
        shown += "" if terminated else "\nAssistant:"
        assert "".join(prompt_of(observation).split()) == "".join(shown.split())
        if terminated:
            observation, info = env.reset()
            terminated = False
        else:
            observation, _, terminated, _, info = env.step(an_action(env, rng))
            assert info["messages"][-1]["content"].startswith(info["feedback"])


@each_id
def test_what_a_caller_does_to_results_changes_nothing(id: str) -> None:
    spoiled, plain = gym.make(id).unwrapped, gym.make(id).unwrapped
    for _ in range(2):
        rng, same = np.random.default_rng(6), np.random.default_rng(6)
        results = (spoiled.reset(seed=6), plain.reset(seed=6))
        finished = False
        while not finished:
            assert_same(*results)
            observation, info = results[0][0], results[0][-1]
            for message in info["messages"]:
                message.clear()
            info["messages"].clear()
            info.clear()
            if isinstance(observation, dict):
                observation["features"].fill(0.5)
                observation.clear()
            results = (
                spoiled.step(an_action(spoiled, rng)),
                plain.step(an_action(plain, same)),
            )
            finished = results[1][2]


@each_id
@each_split
def test_the_score_lies_in_0_1_and_its_parts_are_finite(id: str, split: str) -> None:
    scores = []
    for result in filter(lambda r: len(r) == 5, play(gym.make(id, split=split), 200, seed=9)):
        _, reward, _, _, info = result
        if "score" not in info:
            assert_unscored(id, result)
            continue
        numbers = [v for k, v in info.items() if k.startswith("score") or k == "best_score"]
        assert all(type(v) is float and 0.0 <= v <= 1.0 for v in numbers)
        assert info["score"] <= info.get("best_score", 1.0)
        assert math.isfinite(reward)
        scores.append(info["score"])
    assert min(scores) == 0.0  # or the play would prove little
    assert max(scores) == 1.0


@each_id
@pytest.mark.parametrize("reward_range", [(-1.0, 1.0), (0, 1), (-0.25, 3.5), (-7.0, -2.0)])
def test_the_reward_is_the_score_mapped_linearly(
    id: str, reward_range: tuple[float, float]
) -> None:
    low, high = reward_range
    rewards = []
    for result in filter(lambda r: len(r) == 5, play(gym.make(id, reward_range=reward_range), 100)):
        _, reward, _, _, info = result
        if "score" not in info:
            assert_unscored(id, result)
            continue
        assert reward == low + (high - low) * info["score"]
        rewards.append(reward)
    assert min(rewards) == low
    assert max(rewards) == high


def test_minus_one_to_one_is_the_default_reward_range() -> None:
    for id in IDS:
        assert gym.make(id).unwrapped.reward_range == (-1.0, 1.0)


@each_writing
@each_split
def test_the_oracle_scores_1_in_every_step(id: str, split: str) -> None:
    env = gym.make(id, split=split)
    env.reset(seed=11)
    for _ in range(100):
        *_, terminated, _, info = env.step(" " + env.unwrapped.references[0])
        assert info["score"] == 1.0
        if terminated:
            env.reset()


@each_writing
@each_split
def test_who_does_what_is_demonstrated_scores_1(id: str, split: str) -> None:
    env = gym.make(id, split=split)
    env.reset(seed=11)
    for _ in range(100):
        result = env.step(" " + env.unwrapped.demonstration)
        *_, terminated, _, info = result
        if "score" in info:
            assert info["score"] == 1.0
        else:
            assert_unscored(id, result)
        if terminated:
            assert env.unwrapped.demonstration is None
            env.reset()


@pytest.mark.parametrize("id", CHOOSING)
@each_split
def test_candidate_scores_tell_every_choice_and_the_best(id: str, split: str) -> None:
    env = gym.make(id, split=split)
    rng = np.random.default_rng(12)
    env.reset(seed=12)
    for _ in range(100):
        scores = env.unwrapped.candidate_scores
        assert scores.shape == (env.action_space.n,)
        action = an_action(env, rng)
        *_, terminated, _, info = env.step(action)
        assert info["score"] == scores[action]
        assert info["best_score"] == scores.max()
        if terminated:
            env.reset()


# --- Splits --------------------------------------------------------------------------------------


def content_hashes(example: Any) -> set[str]:
    """Hash what an example says, its wording but not its spacing or case."""
    said = getattr(example, "passage", None) or getattr(example, "text", None) or example.unit
    texts = [text for f in getattr(example, "questions", ()) for text in (f.question, f.answer)]
    return {
        hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()
        for text in texts or [said]
    }


@each_id
def test_splits_share_neither_content_nor_unit_nor_id(id: str) -> None:
    examples = {split: gym.make(id, split=split).unwrapped.task.examples for split in SPLITS}
    for of in (content_hashes, lambda e: {e.unit}, lambda e: {e.id}):
        keys = {split: set().union(*map(of, examples[split])) for split in SPLITS}
        for a, b in itertools.combinations(SPLITS, 2):
            assert not keys[a] & keys[b], f"{a} and {b} share examples"
    together = gym.make(id, split="all").unwrapped.task.examples
    assert len(together) == sum(map(len, examples.values()))
    assert {e.id for e in together} == {e.id for split in SPLITS for e in examples[split]}


@each_id
def test_train_is_the_default_split(id: str) -> None:
    assert (
        gym.make(id).unwrapped.task.examples == gym.make(id, split="train").unwrapped.task.examples
    )


# --- Copies --------------------------------------------------------------------------------------


@each_id
@pytest.mark.parametrize("steps", [0, 6])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["copy", "pickle"],
)
def test_a_copy_in_mid_episode_goes_on_identically(id: str, steps: int, duplicate: Any) -> None:
    env = gym.make(id)
    play(env, steps, seed=13)
    twin = duplicate(env)
    assert twin.unwrapped.references == env.unwrapped.references
    assert_same(play(env, 60, seed=14, going_on=True), play(twin, 60, seed=14, going_on=True))


@each_id
def test_copies_do_not_copy_the_data(id: str) -> None:
    env = gym.make(id)
    env.reset(seed=0)
    assert copy.deepcopy(env).unwrapped.task is env.unwrapped.task
    assert len(pickle.dumps(env)) < 100_000


@each_id
def test_the_spec_makes_the_same_environment_again(id: str) -> None:
    env = gym.make(id, split="test", reward_range=(0.0, 2.0), max_turns=1)
    assert env.spec is not None
    saved = EnvSpec.from_json(env.spec.to_json())
    for again in (gym.make(env.spec), gym.make(saved)):
        assert_same(play(env, 30), play(again, 30))
        assert again.unwrapped.reward_range == (0.0, 2.0)


# --- Actions of every kind -----------------------------------------------------------------------


def pieces(text: str) -> set[str]:
    """Whatever an answer could share with a right one: words, with and without punctuation."""
    text = text.lower()
    bare = "".join(c for c in text if c not in string.punctuation)
    cjk = {
        c
        for c in text
        if "\u2e80" <= c <= "\ud7ff" or "\uf900" <= c <= "\uffdc" or c > "\U0001afff"
    }
    return {*bare.split(), *re.findall("[a-z0-9]+", text), *cjk}


def step_once(id: str, action: str) -> None:
    env = gym.make(id, split="test", render_mode="ansi", disable_env_checker=True).unwrapped
    observation, _ = env.reset(seed=len(action))
    references = env.references
    after, reward, _, _, info = env.step(action)
    assert after.startswith(observation + action)
    assert info["messages"][1]["content"] == action.strip()
    assert 0.0 <= info["score"] <= 1.0
    if not any(pieces(action) & pieces(reference) for reference in references):
        assert info["score"] == (0.5 if id == "TextWorld-v0" else 0.0)  # a game goes on as it was
        assert reward == 2 * info["score"] - 1
    env.render().encode()  # which a lone surrogate would break


@each_writing
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_no_text_crashes_or_earns_by_accident(id: str, data: st.DataObject) -> None:
    step_once(id, data.draw(st.text(st.characters())))  # lone surrogates and NUL included


@each_writing
@pytest.mark.parametrize(
    "text",
    [
        "\ud800",
        "\udfff x",
        "\x00",
        "\x1b[2J",
        "\u202e",
        "\U0001f468\u200d\U0001f469",
        "東京",
        "ﬀ",
        "İ",
    ],
    ids=ascii,
)
def test_odd_text_neither_crashes_nor_earns(id: str, text: str) -> None:
    step_once(id, text)


@each_writing
@pytest.mark.parametrize("unit", ["a", "the ", "\ud800", "\x00 ", "漢", "\U0001f642"], ids=ascii)
def test_a_megabyte_neither_crashes_nor_earns(id: str, unit: str) -> None:
    step_once(id, (unit * 2**20)[: 2**20])


@each_writing
def test_longer_actions_are_refused(id: str) -> None:
    env = gym.make(id, disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"1,048,577 characters.*limit is 1,048,576"):
        env.step("a" * (2**20 + 1))


@each_writing
@pytest.mark.parametrize("action", [None, 3, b"Paris", ["Paris"], np.array([1, 2])], ids=repr)
def test_actions_that_are_no_text_are_refused(id: str, action: Any) -> None:
    env = gym.make(id).unwrapped
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=f"string, but {type(action).__name__} came"):
        env.step(action)
    assert env.step("")[0].startswith(before)  # and the episode goes on


@pytest.mark.parametrize("id", CHOOSING)
@settings(max_examples=50, deadline=None)
@given(
    action=st.one_of(
        st.text(), st.none(), st.floats(), st.integers(max_value=-1), st.integers(min_value=5)
    )
)
def test_actions_that_are_no_choice_are_refused(id: str, action: Any) -> None:
    env = gym.make(id).unwrapped
    env.reset(seed=0)
    refusal = f"does not lie in Discrete({env.action_space.n})"
    with pytest.raises(ValueError, match=re.escape(refusal)):
        env.step(action)


@pytest.mark.parametrize("id", CHOOSING)
def test_numpy_choices_are_plain_choices(id: str) -> None:
    a, b = gym.make(id).unwrapped, gym.make(id).unwrapped
    a.reset(seed=1)
    b.reset(seed=1)
    assert_same(a.step(3), b.step(np.int64(3)))


# --- Order and length ----------------------------------------------------------------------------


@each_id
def test_a_step_needs_a_reset_before_it_and_an_episode_that_goes_on(id: str) -> None:
    env = gym.make(id).unwrapped
    action = env.action_space.sample()
    for use in (lambda: env.step(action), lambda: env.references, lambda: env.candidate_scores):
        with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
            use()
    env.reset(seed=0)
    while not env.step(action)[2]:
        pass
    with pytest.raises(ResetNeeded, match=r"over: call reset\(\)"):
        env.step(action)
    env.reset()
    env.step(action)


@each_id
@pytest.mark.parametrize("max_turns", [1, 2, 3])
def test_max_turns_ends_an_episode_as_terminated(id: str, max_turns: int) -> None:
    env, full = (gym.make(id, max_turns=turns).unwrapped for turns in (max_turns, None))
    lengths = []
    for seed in range(10):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        env.reset(seed=seed)
        full.reset(seed=seed)
        ended, ended_full, length = False, False, 0
        while not ended:
            result = env.step(an_action(env, rng))
            _, _, ended, truncated, info = result
            ended_full = full.step(an_action(full, same))[2]
            assert truncated is False
            if "score" in info:
                length += 1
            else:
                assert_unscored(id, result)
        assert length == max_turns or ended_full
        lengths.append(length)
    assert max(lengths) == (1 if id == "Summarization-v0" else max_turns)


# --- Wrong arguments -----------------------------------------------------------------------------

WRONG = [
    ({"splitt": "test"}, TypeError, ["'splitt'", "Did you mean 'split'?", "max_turns"]),
    ({"reward_rnge": (0, 1)}, TypeError, ["'reward_rnge'", "Did you mean 'reward_range'?"]),
    ({"quux": 1}, TypeError, ["'quux'", "It takes split,"]),
    ({"group_size": 4}, TypeError, ["'group_size'"]),
    ({"split": "tset"}, ValueError, ["'tset'", "Did you mean 'test'?", "'validation'"]),
    ({"split": "dev"}, ValueError, ["'dev'", "'validation'"]),
    ({"split": None}, ValueError, ["None", "'validation'"]),
    ({"dataset": "no_such_set"}, ValueError, ["no_such_set"]),
    ({"reward_range": (1.0, -1.0)}, ValueError, ["(1.0, -1.0)", "above"]),
    ({"reward_range": (1.0, 1.0)}, ValueError, ["(1.0, 1.0)", "(-1.0, 1.0)"]),
    ({"reward_range": 3.0}, ValueError, ["3.0", "two finite numbers"]),
    ({"reward_range": (0.0, math.inf)}, ValueError, ["inf", "two finite numbers"]),
    ({"reward_range": (math.nan, 1.0)}, ValueError, ["nan", "two finite numbers"]),
    ({"reward_range": (-1e308, 1e308)}, ValueError, ["1e+308", "two finite numbers"]),
    ({"reward_range": (0.0, 1.0, 2.0)}, ValueError, ["2.0", "two finite numbers"]),
    ({"render_mode": "rgb_array"}, ValueError, ["'rgb_array'", "'ansi', 'human' or None"]),
    ({"max_turns": 0}, ValueError, ["max_turns is 0", "1"]),
    ({"max_turns": -2}, ValueError, ["max_turns is -2", "1"]),
    ({"max_turns": "3"}, TypeError, ["max_turns is '3'", "whole number from 1"]),
    ({"max_turns": 1.5}, TypeError, ["max_turns is 1.5", "whole number from 1"]),
    ({"max_turns": True}, TypeError, ["max_turns is True", "whole number from 1"]),
    ({"skip_bad_records": "no"}, TypeError, ["skip_bad_records is 'no'", "True or False"]),
    ({"dataset": ""}, ValueError, ["Dataset ''", "embedded set"]),
]


@each_id
@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's own word on a render mode
@pytest.mark.parametrize(("arguments", "error", "words"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_arguments_are_refused_with_cause_and_cure(
    id: str, arguments: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    if "skip_bad_records" in arguments and id in ("TextBattle-v0", "TextWorld-v0"):
        words = ["no argument 'skip_bad_records'", "It takes split,"]  # it reads no records
    with pytest.raises(error) as raised:
        gym.make(id, **arguments)
    for word in words:
        assert word in str(raised.value)


@each_id
def test_a_dataset_that_is_nearly_right_is_named(id: str) -> None:
    default = {
        "DialogueQA-v0": "countries_wordnet",
        "Summarization-v0": "debian_packages",
        "RecommendationClicks-v0": "movielens_small",
        "TextBattle-v0": "duels",
        "TextWorld-v0": "houses",
        "CustomerService-v0": "faqs",
    }[id]
    with pytest.raises((ValueError, FileNotFoundError), match=f"Did you mean '{default}'"):
        gym.make(id, dataset=default[:-1])


@each_id
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exampel": 1}, ["'exampel'", "Did you mean 'example'?"]),
        ({"example": "no such id"}, ["'no such id'"]),
        ({"example": -1}, ["-1", "0 to "]),
        ({"example": 10**9}, [str(10**9), "0 to "]),
        ({"example": 1.5}, ["1.5", "id nor an index"]),
        ({"example": True}, ["True", "id nor an index"]),
        ({"example": [1]}, ["[1]", "id nor an index"]),
    ],
    ids=str,
)
def test_wrong_options_are_refused_with_cause_and_cure(
    id: str, options: dict[str, Any], words: list[str]
) -> None:
    env = gym.make(id)
    with pytest.raises(ValueError) as raised:
        env.reset(seed=0, options=options)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("options", [5, "x", [1], [("example", 1)]], ids=str)
def test_options_that_are_no_dict_are_refused(options: Any) -> None:
    for env in (gym.make(IDS[0]), gym.make_vec(IDS[0], num_envs=2)):
        with pytest.raises(TypeError, match=r"The options of reset are .* Give a dict"):
            env.reset(options=options)


@each_id
def test_an_id_that_is_nearly_right_is_named(id: str) -> None:
    env = gym.make(id)
    known = env.unwrapped.task.examples[0].id
    with pytest.raises(ValueError, match="Did you mean"):
        env.reset(options={"example": known.upper() + "x"})


# --- Tasks of one's own --------------------------------------------------------------------------


class Echo(WritingTask[Document]):
    """Repeat the text."""

    def __init__(self, *, texts: int = 3, max_turns: int | None = None) -> None:
        super().__init__(max_turns)
        self.examples = [Document(f"t{i}", f"text {i}", ("x",), f"t{i}") for i in range(texts)]

    def turns(self, example: Document) -> int:
        return 1

    def ask(self, example: Document, turn: int) -> str:
        return example.text

    def answers(self, example: Document, turn: int) -> tuple[str, ...]:
        return (example.text,)

    def score_answers(self, answers: Any, references: Any) -> list[Outcome]:
        return [Outcome(float(a == r[0])) for a, r in zip(answers, references, strict=True)]


def test_a_task_of_ones_own_is_registered_with_its_class() -> None:
    class Local(Echo):
        """A class that cannot be imported by a name."""

    for task in (Echo, Local):
        name = f"{task.__name__}Test-v0"
        try:
            llm_envs.register(name, task)
            assert name in llm_envs.registered_ids()
            env = gym.make(f"llm_envs/{name}", texts=1)
            env.reset(seed=0)
            assert env.step("text 0")[1] == 1.0
            with pytest.raises(TypeError, match="Did you mean 'texts'"):
                gym.make(name, text=1)
        finally:
            from llm_envs.core import registration

            registration._IDS.remove(name)
            del gym.registry[name], gym.registry[f"llm_envs/{name}"]


def test_a_finished_task_is_taken_as_it_is_and_takes_no_arguments() -> None:
    task = Echo()
    assert TextEnv(task).task is task
    with pytest.raises(TypeError, match="texts"):
        TextEnv(task, texts=2)
    with pytest.raises(ValueError, match="no example"):
        TextEnv(Echo, texts=0)


# --- A fresh process -----------------------------------------------------------------------------

FRESH = """
import json, sys
import gymnasium as gym
ids = json.loads(sys.argv[1])
for id in ids:
    for name in (f"llm_envs:{id}", f"llm_envs:llm_envs/{id}"):
        env = gym.make(name)
        env.reset(seed=0)
        env.step(env.action_space.sample())
    vec = gym.make_vec(id, num_envs=2)
    vec.reset(seed=0)
    vec.step(vec.action_space.sample())
heavy = {"torch", "transformers", "pandas", "datasets", "wandb", "matplotlib", "agents"}
print(json.dumps(sorted(heavy & {name.partition(".")[0] for name in sys.modules})))
"""


def test_a_fresh_process_makes_all_of_them_and_imports_nothing_heavy() -> None:
    root = str(Path(llm_envs.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH, json.dumps(IDS)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
