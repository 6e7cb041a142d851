"""Corrupted feedback: what each corruption does, that it is seeded, and that forms are equal."""

from __future__ import annotations

import copy
import doctest
import functools
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents import train
from installed import playable_ids
from llm_envs.core.env import TextEnv
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.records import Document
from llm_envs.wrappers import CorruptedFeedback, CorruptedVectorFeedback, Corruption, feedback
from llm_envs.wrappers.feedback import Chance, biased, coarse, drifted, flipped, judge, noisy, paid
from same import assert_same
from three_tokens import (
    ANSWERS,
    TASKS,
    answer_log_probs,
    gradient,
    listed,
    make_agent,
    parameters,
    relative,
    task_fixture,
)

three_token_tasks = task_fixture(TASKS, autouse=False)

IDS = playable_ids()
SEEDS = [5, 2**40, 9]
N = len(SEEDS)
STEPS = 24
RANGE = (-1.0, 1.0)

KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flip": {"flip": 0.4},
    "bias": {"bias": -0.3},
    "noise": {"noise": 0.5},
    "thumbs": {"thumbs": 0.4},
    "missing": {"missing": 0.4},
    "delay": {"delay": 2},
    "drift": {"drift": {"flip": 1.0, "bias": 0.5, "steps": 15}},
    "all": {
        "flip": 0.2,
        "bias": 0.1,
        "noise": 0.3,
        "thumbs": 0.5,
        "missing": 0.2,
        "delay": 1,
        "drift": {"flip": 0.6, "noise": 0.0, "missing": 0.5, "steps": 12},
    },
}

each_id = pytest.mark.parametrize("id", IDS)
each_kind = pytest.mark.parametrize("kind", KINDS)


class Turns(WritingTask[Document]):
    """An answer is a score; "search" is not scored and costs 1/8, and "stop" ends the episode."""

    def __init__(self, max_turns: int | None = None) -> None:
        super().__init__(max_turns)
        self.examples = [Document(f"t{i}", f"text {i}", ("x",), f"t{i}") for i in range(1000)]

    def turns(self, example: Document) -> int:
        return 6

    def ask(self, example: Document, turn: int) -> str:
        return f"{example.text}, turn {turn}"

    def answers(self, example: Document, turn: int) -> tuple[str, ...]:
        return ("1",)

    def score_answers(self, answers: Any, references: Any) -> list[Outcome]:
        return [
            Outcome(None, reward=-0.125)
            if a == "search"
            else Outcome(0.0 if a == "stop" else float(a))
            for a in answers
        ]

    def proceed(self, episode: Any, action: str, outcome: Outcome) -> None:
        super().proceed(episode, action, outcome)
        episode.finished = episode.finished or action == "stop"


def turns(**corruptions: Any) -> CorruptedFeedback:
    return CorruptedFeedback(TextEnv(Turns), **corruptions)


def rewards_of(env: Any, actions: Any, seed: int | None = 0, **options: Any) -> list[float]:
    """The rewards of one episode."""
    env.reset(seed=seed, options=options)
    return [env.step(action)[1] for action in actions]


def many(n: int, answer: str = "1", *, rows: int = 50, **corruptions: Any) -> np.ndarray[Any, Any]:
    """The rewards of n equal answers in episodes of one turn, (n / rows, rows)."""
    envs = CorruptedVectorFeedback(TextVectorEnv(rows, Turns, max_turns=1), **corruptions)
    envs.reset(seed=1)
    return np.stack([envs.step([answer] * rows)[1] for _ in range(n // rows)])


def an_action(env: gym.Env[Any, Any], rng: np.random.Generator) -> Any:
    """Draw a right, a nearly right or a wrong action."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        return int(rng.integers(env.action_space.n))
    right = rng.choice(env.unwrapped.references)
    return [f" {right}", f" {right} and more", " unknown", ""][rng.integers(4)]


# --- the pure functions --------------------------------------------------------------------------


@pytest.mark.parametrize("reward_range", [(-1.0, 1.0), (0.0, 1.0), (-7.0, -2.0)])
def test_each_corruption_is_its_definition(reward_range: tuple[float, float]) -> None:
    low, high = reward_range
    width = high - low
    assert [flipped(r, reward_range) for r in (low, high)] == [high, low]
    assert flipped(low + width / 4, reward_range) == high - width / 4
    assert flipped(flipped(low + 0.1, reward_range), reward_range) == pytest.approx(low + 0.1)
    assert biased(low + width / 2, width / 4, reward_range) == low + 3 * width / 4
    assert [biased(low, s, reward_range) for s in (-width, 9 * width)] == [low, high]
    assert noisy(high, 0.5, 2.0) == high + 1.0
    scores = (0.0, 0.25, 0.5, 0.75, 1.0)
    given = [coarse(low + width * s, 0.5, reward_range) for s in scores]
    assert given == [low, low, high, high, high]
    assert feedback.neutral(reward_range) == low + width / 2


def test_opinions_are_corrupted_before_they_are_made_coarse_and_before_they_are_left_out() -> None:
    calm, bad = Chance(0.5, 0.5, 0.0), Chance(0.0, 0.5, 0.0)
    c = Corruption(flip=0.2, bias=0.5, noise=0.25, thumbs=0.5)
    assert judge(-1.0, c, RANGE, calm) == (-1.0, False)  # -0.5, and thumbs down
    assert judge(-1.0, c, RANGE, bad) == (1.0, False)
    assert judge(-0.5, c, RANGE, calm) == (1.0, False)  # 0 is good enough
    assert judge(-0.5, c, RANGE, calm._replace(normal=-1.0)) == (-1.0, False)
    fine = Corruption(flip=0.2, bias=0.5, noise=0.25)
    assert judge(-0.25, fine, RANGE, bad._replace(normal=1.0)) == (1.0, False)  # 0.25 + 0.5 + 0.25
    assert judge(-0.9, fine, RANGE, bad._replace(normal=1.0)) == (
        1.25,
        False,
    )  # clipped, then noise
    gone = Corruption(flip=1.0, bias=0.5, thumbs=0.5, missing=0.6)
    assert judge(1.0, gone, RANGE, calm) == (0.0, True)
    assert judge(1.0, gone, RANGE, calm._replace(missing=0.6)) == (-1.0, False)


def test_a_drift_is_straight_and_ends() -> None:
    assert [drifted(0.2, 0.6, 4, n) for n in (0, 2, 4, 5, 1000)] == [0.2, 0.4, 0.6, 0.6, 0.6]
    c = Corruption(flip=0.1, bias=1.0, missing=0.3, drift={"flip": 0.5, "bias": -1.0, "steps": 10})
    assert c.at(0) == Corruption(flip=0.1, bias=1.0, missing=0.3)
    assert c.at(5) == Corruption(flip=0.3, bias=0.0, missing=0.3)
    assert c.at(10) == c.at(99) == Corruption(flip=0.5, bias=-1.0, missing=0.3)


def test_late_rewards_are_paid_in_order_and_all_at_the_end() -> None:
    due: tuple[float, ...] = ()
    found = []
    for i, reward in enumerate((1.0, 2.0, 4.0, 8.0, 16.0)):
        now, due = paid(due, reward, 2, i == 4)
        found.append(now)
    assert found == [0.0, 0.0, 1.0, 2.0, 28.0]
    assert due == ()
    assert paid((), 3.0, 0, False) == (3.0, ())
    assert paid((), 3.0, 9, True) == (3.0, ())


# --- an environment ------------------------------------------------------------------------------


def test_the_share_of_flips_is_their_probability() -> None:
    """Of 10,000 a share is off by 5 standard deviations with a probability of less than 6e-7."""
    rewards = many(10_000, flip=0.2)
    assert set(rewards.ravel()) == {-1.0, 1.0}
    assert abs((rewards < 0).mean() - 0.2) < 5 * math.sqrt(0.2 * 0.8 / 10_000)
    assert (many(500, flip=1.0) == -1.0).all()
    assert (many(500, answer="0.25", flip=1.0) == 0.5).all()


def test_the_share_of_missing_feedback_is_its_probability_and_each_is_marked() -> None:
    """As above."""
    envs = CorruptedVectorFeedback(TextVectorEnv(50, Turns, max_turns=1), missing=0.3)
    envs.reset(seed=1)
    marks = []
    for _ in range(200):
        _, rewards, _, _, infos = envs.step(["1"] * 50)
        final = infos["final_info"]
        assert final["feedback_missing"].dtype == np.bool_
        assert final["_feedback_missing"].all()
        assert rewards.tolist() == np.where(final["feedback_missing"], 0.0, 1.0).tolist()
        marks.append(final["feedback_missing"])
    assert abs(np.mean(marks) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 10_000)


def test_noise_has_its_deviation_and_no_mean() -> None:
    """Mean and variance of 10,000 draws are off by 5 deviations with less than 6e-7 each."""
    noise = many(10_000, noise=0.5) - 1.0
    assert abs(noise.mean()) < 5 * 0.5 / 100
    assert abs(noise.var() - 0.25) < 5 * 0.25 * math.sqrt(2 / 10_000)
    assert noise.max() > 0.5, "it is not clipped"


def test_without_noise_rewards_of_steps_stay_in_their_range() -> None:
    for kind in ("flip", "bias", "thumbs", "missing"):
        for answer in ("0", "0.3", "1"):
            assert np.abs(many(200, answer, **KINDS[kind])).max() <= 1.0


def test_thumbs_are_one_of_two_values() -> None:
    answers = ["0", "0.3", "0.39", "0.4", "0.7", "1"]
    assert rewards_of(turns(thumbs=0.4), answers) == [-1, -1, -1, 1, 1, 1]
    assert set(many(500, "0.6", noise=1.0, thumbs=0.5).ravel()) == {-1.0, 1.0}


def test_chance_is_the_same_whatever_else_is_corrupted() -> None:
    """Who compares two probabilities of a flip compares them on the same answers."""
    few, more = many(2000, flip=0.1) < 0, many(2000, flip=0.3) < 0
    assert (few <= more).all()
    assert few.sum() < more.sum()
    assert (few == (many(2000, flip=0.1, bias=-0.5) < 0)).all()
    noise = many(2000, noise=0.1)
    np.testing.assert_allclose(many(2000, noise=0.2) - 1, 2 * (noise - 1), atol=1e-12)
    unflipped = ~few & (many(2000, missing=0.5) != 0)
    both = many(2000, flip=0.1, noise=0.1, missing=0.5)
    np.testing.assert_array_equal(both[unflipped], noise[unflipped])


@pytest.mark.parametrize("delay", [0, 1, 3, 5, 6, 50])
def test_a_delay_moves_rewards_and_keeps_their_sum(delay: int) -> None:
    clean = [2 * s - 1 for s in (0.0, 0.25, 0.5, 0.75, 1.0, 0.25)]
    late = rewards_of(turns(delay=delay), ["0", "0.25", "0.5", "0.75", "1", "0.25"])
    assert late[:5] == ([0.0] * delay + clean)[:5]
    assert sum(late) == sum(clean)


@pytest.mark.parametrize("delay", [1, 2, 4])
@each_id
def test_every_episode_is_paid_its_sum(id: str, delay: int) -> None:
    env = CorruptedFeedback(gym.make(id), delay=delay)
    rng = np.random.default_rng(0)
    for episode in range(12):
        env.reset(seed=3 if episode == 0 else None)
        late, clean, over = [], [], False
        while not over:
            _, reward, over, _, info = env.step(an_action(env, rng))
            late.append(reward)
            clean.append(info["clean_reward"])
        assert math.fsum(late) == pytest.approx(math.fsum(clean), abs=1e-12)
        assert late[:-1] == ([0.0] * delay + clean)[: len(late) - 1]


def test_what_is_due_is_lost_with_the_episode_that_is_left() -> None:
    env = turns(delay=2)
    rewards_of(env, ["1", "1", "1"])
    assert rewards_of(env, ["0", "0", "0"]) == [0.0, 0.0, -1.0]
    envs = CorruptedVectorFeedback(TextVectorEnv(2, Turns), delay=2)
    envs.reset(seed=0)
    envs.step(["1", "1"])
    envs.reset(options={"reset_mask": np.array([True, False])})
    found = [envs.step(["0", "1"])[1].tolist() for _ in range(3)]
    assert found == [[0.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]


def test_a_truncated_episode_is_paid_too() -> None:
    env = CorruptedFeedback(gym.wrappers.TimeLimit(TextEnv(Turns), 2), delay=5)
    assert rewards_of(env, ["1", "1"]) == [0.0, 2.0]


def test_steps_that_nobody_judges_pass_and_count() -> None:
    for kind in ("flip", "bias", "noise", "thumbs", "missing"):
        env = turns(**KINDS[kind])
        env.reset(seed=0)
        _, reward, _, _, info = env.step("search")
        assert reward == info["clean_reward"] == -0.125
        assert info["feedback_missing"] is False
    late = rewards_of(turns(delay=1), ["1", "search", "0", "search", "search", "stop"])
    assert late == [0.0, 1 - 0.125, 0.0, -1 - 0.125, -0.125, -1.0]
    drift = turns(drift={"bias": -1.0, "steps": 2})
    assert rewards_of(drift, ["1", "search", "1"]) == [1.0, -0.125, 0.0]


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_what_is_missing_is_told_where_it_would_have_arrived(delay: int) -> None:
    """The middle of this range is ½, which no answer here earns."""
    env = CorruptedFeedback(TextEnv(Turns, reward_range=(0.0, 1.0)), missing=0.5, delay=delay)
    seen = set()
    for seed in range(20):
        env.reset(seed=seed)
        for turn, answer in enumerate(("1", "0", "1", "0")):
            _, reward, _, _, info = env.step(answer)
            assert info["feedback_missing"] is (reward == 0.5)
            seen.add((turn < delay, info["feedback_missing"]))
    assert seen >= {(False, False), (False, True)}
    assert (True, True) not in seen, "nothing has arrived, and nothing is missing"


def test_a_drift_goes_by_steps_over_all_episodes() -> None:
    """A probability of 0 never strikes and one of 1 always."""
    env = turns(drift={"bias": -1.0, "steps": 8})
    found = rewards_of(env, ["1"] * 6) + rewards_of(env, ["1"] * 6, seed=None)
    assert found == [1 - min(n, 8) / 8 for n in range(12)]
    assert rewards_of(env, ["1"]) == [1.0], "a seed decides all that follows"
    assert rewards_of(env, ["1"], feedback_steps=4) == [0.5]
    assert rewards_of(env, ["1"], seed=None, feedback_steps=2) == [0.75]
    flips = many(10_000, rows=10, drift={"flip": 1.0, "steps": 500}).mean(1)
    assert flips[0] == 1.0
    assert (flips[500:] == -1.0).all()
    # 1,250 flips at a mean probability of 1/8 and of 7/8; 5 standard deviations, as above.
    for quarter, p in ((slice(0, 125), 1 / 8), (slice(375, 500), 7 / 8)):
        assert abs(flips[quarter].mean() - (1 - 2 * p)) < 5 * 2 * math.sqrt(p * (1 - p) / 1250)


def test_rewards_that_are_no_numbers_are_passed_on() -> None:
    """Agents refuse them: thumbs, or a missing answer, must not hide them."""
    for kind in ("thumbs", "all"):
        env = turns(**{**KINDS[kind], "missing": 1.0})
        assert math.isnan(rewards_of(env, ["nan"])[0])
        assert rewards_of(env, ["inf"])[0] == math.inf


# --- what stays as it is, and forms that are equal -----------------------------------------------


@functools.cache
def played(id: str, kind: str, row: int) -> list[tuple[Any, ...]]:
    """Play a wrapped environment beside an unwrapped one; return each action and its step."""
    env, plain = CorruptedFeedback(gym.make(id), **KINDS[kind]), gym.make(id)
    rng = np.random.default_rng(row)
    seen: list[tuple[Any, ...]] = []
    assert_same(env.reset(seed=SEEDS[row]), plain.reset(seed=SEEDS[row]))
    for _ in range(STEPS):
        action = an_action(plain, rng)
        observation, reward, terminated, truncated, info = env.step(action)
        clean = plain.step(action)
        told = {"clean_reward": clean[1], "feedback_missing": info["feedback_missing"]}
        assert_same(
            (observation, terminated, truncated, info),
            (clean[0], *clean[2:4], {**clean[4], **told}),
        )
        assert type(reward) is float
        assert type(info["feedback_missing"]) is bool
        seen.append((action, reward, terminated, info))
        if terminated:
            assert_same(env.reset(), plain.reset())
    return seen


@each_id
@each_kind
def test_observations_scores_and_chance_of_the_environment_are_untouched(
    id: str, kind: str
) -> None:
    """And rewards are not."""
    steps = [step for row in range(N) for step in played(id, kind, row)]
    changed = sum(reward != info["clean_reward"] for _, reward, _, info in steps)
    one_step = all(over for _, _, over, _ in steps)
    binary = {info["score"] for *_, info in steps} <= {0.0, 1.0}
    if kind == "nothing" or (kind == "thumbs" and binary) or (kind == "delay" and one_step):
        assert changed == 0
    else:
        assert changed > 5


def sync(id: str, mode: AutoresetMode, **corruptions: Any) -> SyncVectorEnv[Any, Any]:
    def make() -> gym.Env[Any, Any]:
        env = gym.make(id)
        return CorruptedFeedback(env, **corruptions) if corruptions else env

    return SyncVectorEnv([make] * N, autoreset_mode=mode)


FORMS: dict[str, Callable[..., Any]] = {
    "native": lambda id, c: CorruptedVectorFeedback(gym.make_vec(id, N), **c),
    "by id": lambda id, c: gym.make_vec(id, N, feedback=c),
    "sync by id": lambda id, c: gym.make_vec(id, N, vectorization_mode="sync", feedback=c),
    "sync, same step": lambda id, c: CorruptedVectorFeedback(
        sync(id, AutoresetMode.SAME_STEP), **c
    ),
    "sync, next step": lambda id, c: CorruptedVectorFeedback(
        sync(id, AutoresetMode.NEXT_STEP), **c
    ),
    "sync, disabled": lambda id, c: CorruptedVectorFeedback(sync(id, AutoresetMode.DISABLED), **c),
}


@each_id
@pytest.mark.parametrize("form", FORMS)
def test_a_row_has_the_feedback_of_a_single_environment_with_its_seed(id: str, form: str) -> None:
    for kind in KINDS if form == "native" else ("all",):
        expected = [played(id, kind, row) for row in range(N)]
        envs = FORMS[form](id, KINDS[kind])
        mode = envs.metadata["autoreset_mode"]
        envs.reset(seed=SEEDS)
        at, over = [0] * N, np.zeros(N, np.bool_)
        while min(at) < STEPS:
            if mode is AutoresetMode.DISABLED and over.any():
                envs.reset(options={"reset_mask": over.copy()})
                over[:] = False
            asleep = over if mode is AutoresetMode.NEXT_STEP else np.zeros(N, np.bool_)
            actions = [expected[i][at[i] % STEPS][0] for i in range(N)]
            _, rewards, terminated, truncated, infos = envs.step(actions)
            for i, info in enumerate(step_infos(infos, N)):
                if asleep[i]:
                    assert rewards[i] == 0.0
                    assert "clean_reward" not in info
                elif at[i] < STEPS:
                    found = (float(rewards[i]), bool(terminated[i]), info)
                    assert_same(found, expected[i][at[i]][1:])
                at[i] += not asleep[i]
            over = terminated | truncated


def test_a_row_that_is_reset_after_its_last_step_is_judged_in_its_next_one() -> None:
    envs = CorruptedVectorFeedback(SyncVectorEnv([lambda: TextEnv(Turns)] * 2), flip=1.0)
    envs.reset(seed=0)
    assert envs.step(["stop", "1"])[1].tolist() == [1.0, -1.0]
    envs.reset(options={"reset_mask": np.array([True, False])})
    _, rewards, _, _, infos = envs.step(["1", "1"])
    assert rewards.tolist() == [-1.0, -1.0]
    assert infos["clean_reward"].tolist() == [1.0, 1.0]


@each_id
def test_infos_are_laid_out_as_gymnasium_does(id: str) -> None:
    native = CorruptedVectorFeedback(gym.make_vec(id, N), **KINDS["all"])
    expected = sync(id, AutoresetMode.SAME_STEP, **KINDS["all"])
    around = CorruptedVectorFeedback(sync(id, AutoresetMode.SAME_STEP), **KINDS["all"])
    rngs = [np.random.default_rng(0) for _ in range(3)]
    results = [envs.reset(seed=7) for envs in (native, expected, around)]
    for _ in range(STEPS):
        assert_same(results[0], results[1])
        assert_same(results[2], results[1])
        results = []
        for envs, rng in zip((native, expected, around), rngs, strict=True):
            inner = expected if envs is expected else around.unwrapped
            actions = [an_action(env, rng) for env in inner.envs]
            if isinstance(envs.single_action_space, gym.spaces.Discrete):
                actions = np.array(actions)
            results.append((actions, envs))
        actions = results[1][0]
        results = [envs.step(actions) for _, envs in results]


@pytest.mark.parametrize("mode", ["int", "None"])
def test_seeds_of_all_forms_are_understood(mode: str) -> None:
    """An int counts up, in groups by group; None goes on."""
    answers = ["1"] * 6

    def found(envs: Any, seeds: list[Any]) -> list[Any]:
        wrapped = CorruptedVectorFeedback(envs, noise=1.0)
        rewards = []
        for seed in seeds:
            wrapped.reset(seed=seed)
            rewards.append([wrapped.step(answers)[1].tolist() for _ in range(3)])
        return rewards

    int_or_none: Any = 4 if mode == "int" else None
    plain = found(TextVectorEnv(6, Turns), [4, int_or_none])
    assert plain == found(
        TextVectorEnv(6, Turns),
        [[4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9] if mode == "int" else [None] * 6],
    )
    assert (plain[0] == plain[1]) == (mode == "int")
    assert plain == found(SyncVectorEnv([lambda: TextEnv(Turns)] * 6), [4, int_or_none])
    grouped = found(TextVectorEnv(6, Turns, group_size=3), [4, int_or_none])
    listed_seeds: Any = [4, 4, 4, 5, 5, 5]
    again = listed_seeds if mode == "int" else [None] * 6
    assert grouped == found(TextVectorEnv(6, Turns), [np.array(listed_seeds), again])
    assert [r[0] for r in grouped[0]] == [r[0] for r in plain[0]]  # the first of a group
    assert [r[3] for r in grouped[0]] == [r[1] for r in plain[0]]


def test_rows_of_a_group_are_judged_independently() -> None:
    """Two rows agree in 1,200 flips of 1/2 with a share of 1/2; 5 deviations, as above."""
    for envs, seed in (
        (TextVectorEnv(6, Turns, group_size=3), 0),
        (TextVectorEnv(6, Turns), [8, 8, 8, 11, 11, 11]),
    ):
        wrapped = CorruptedVectorFeedback(envs, flip=0.5)
        observations, _ = wrapped.reset(seed=seed)
        assert observations[0] == observations[1] == observations[2] != observations[3]
        flips = np.stack([wrapped.step(["1"] * 6)[1] for _ in range(1200)])
        for i in range(6):
            for j in range(i):
                agree = (flips[:, i] == flips[:, j]).mean()
                assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(1200), (i, j)


def test_neighbouring_and_large_seeds_are_independent() -> None:
    """Nor is a copy of one seed the first row of another one."""
    env = turns(noise=1.0)
    seeds = [0, 1, 2, 2**32, 2**33, 2**32 + 1, 2**64 - 1]
    firsts = [rewards_of(env, ["1"], seed=s)[0] for s in seeds]
    envs = CorruptedVectorFeedback(TextVectorEnv(4, Turns), noise=1.0)
    for seed in (0, 1):
        envs.reset(seed=[seed] * 4)
        firsts += envs.step(["1"] * 4)[1].tolist()[1:]
    assert len(set(firsts)) == len(firsts)


def test_the_steps_of_a_drift_are_set_for_all_forms() -> None:
    drift = {"bias": -2.0, "steps": 8}
    for envs in (
        CorruptedVectorFeedback(TextVectorEnv(2, Turns), drift=drift),
        CorruptedVectorFeedback(SyncVectorEnv([lambda: TextEnv(Turns)] * 2), drift=drift),
        SyncVectorEnv([lambda: turns(drift=drift)] * 2),
    ):
        options: dict[str, Any] = {"feedback_steps": 3}
        envs.reset(seed=0, options=options)
        assert options == {"feedback_steps": 3}, "options belong to the caller"
        assert envs.step(["1", "1"])[1].tolist() == [0.25, 0.25]
        envs.reset()
        assert envs.step(["1", "1"])[1].tolist() == [0.0, 0.0]
        envs.reset(seed=[None, 1])
        assert envs.step(["1", "1"])[1].tolist() == [-0.25, 1.0]


@each_id
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["copy", "pickle"],
)
def test_a_copy_in_mid_episode_goes_on_identically(id: str, duplicate: Any) -> None:
    env = CorruptedFeedback(gym.make(id), **{**KINDS["all"], "thumbs": None})
    env.reset(seed=0)
    for _ in range(30):
        action = an_action(env, np.random.default_rng(0))
        twin = duplicate(env)
        found = env.step(action)
        assert_same(found, twin.step(action))
        if found[2]:
            assert_same(env.reset(), twin.reset())


# --- Gymnasium -----------------------------------------------------------------------------------


@each_id
@each_kind
def test_gymnasium_accepts_it(id: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(CorruptedFeedback(gym.make(id).unwrapped, **KINDS[kind]))


@each_id
@pytest.mark.parametrize(
    "make",
    [
        lambda id, c: CorruptedFeedback(gym.make(id, max_turns=3), **c),
        lambda id, c: gym.make(id, max_turns=3, feedback=c),
    ],
    ids=["wrapper", "argument"],
)
def test_the_spec_makes_the_same_environment_again(id: str, make: Any) -> None:
    corruptions = {**KINDS["all"], "thumbs": None}
    env = make(id, corruptions)
    assert str(env).count("CorruptedFeedback") == 1
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        again = gym.make(spec)
        assert str(again).count("CorruptedFeedback") == 1
        assert again.get_wrapper_attr("corruption") == Corruption(**corruptions)
        env = make(id, corruptions)
        assert_same(env.reset(seed=3), again.reset(seed=3))
        rng = np.random.default_rng(0)
        for _ in range(12):
            action = an_action(env, rng)
            found = env.step(action)
            assert_same(found, again.step(action))
            if found[2]:
                assert_same(env.reset(), again.reset())


def test_the_spec_of_the_native_form_makes_it_again() -> None:
    envs = gym.make_vec(IDS[0], 4, feedback={"flip": 0.5, "noise": 0.1}, group_size=2)
    again = gym.make_vec(envs.spec)
    assert type(again) is CorruptedVectorFeedback
    for each in (envs, again):
        each.reset(seed=2)
    assert_same(envs.step([""] * 4), again.step([""] * 4))


def test_without_feedback_nothing_is_wrapped() -> None:
    assert isinstance(gym.make_vec(IDS[0], 2), TextVectorEnv)
    assert "CorruptedFeedback" not in str(gym.make(IDS[0]))


def test_the_examples_in_the_docstrings_run() -> None:
    found = doctest.testmod(feedback)
    assert found.attempted
    assert not found.failed


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corruptions", "error", "message"),
    [
        ({"flip": 1.1}, ValueError, "flip is 1.1. Give a probability from 0 to 1"),
        ({"flip": -0.1}, ValueError, "flip is -0.1"),
        ({"flip": math.nan}, ValueError, "flip is nan"),
        ({"flip": "0.2"}, TypeError, "flip is '0.2'. Give a number"),
        ({"flip": True}, TypeError, "flip is True. Give a number"),
        ({"missing": 2}, ValueError, "missing is 2. Give a probability"),
        ({"noise": -1}, ValueError, "noise is -1. Give a standard deviation, from 0"),
        ({"noise": math.inf}, ValueError, "noise is inf"),
        ({"bias": math.inf}, ValueError, "bias is inf. Give a finite number"),
        ({"thumbs": 1.5}, ValueError, "thumbs is 1.5. Give a score from 0 to 1"),
        ({"thumbs": "up"}, TypeError, "thumbs is 'up'"),
        ({"delay": -1}, ValueError, "delay is -1. Give a whole number from 0"),
        ({"delay": 1.5}, TypeError, "delay is 1.5. Give a whole number from 0"),
        ({"drift": 0.5}, TypeError, "drift is 0.5. Give a dict"),
        ({"drift": {"flip": 0.5}}, ValueError, "within how many steps"),
        ({"drift": {"steps": 5}}, ValueError, "It needs what changes"),
        ({"drift": {"flip": 0.5, "steps": 0}}, ValueError, "steps of drift is 0"),
        ({"drift": {"flip": 2, "steps": 5}}, ValueError, "flip is 2. Give a probability"),
        ({"drift": {"nois": 1, "steps": 5}}, ValueError, "Did you mean 'noise'"),
        ({"drift": {"delay": 1, "steps": 5}}, ValueError, "drift holds 'delay'"),
        ({"flipp": 0.2}, TypeError, "no corruption 'flipp'.*Did you mean 'flip'.*There are flip"),
    ],
    ids=str,
)
def test_impossible_corruptions_are_refused_by_name(
    corruptions: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CorruptedFeedback(TextEnv(Turns), **corruptions)
    with pytest.raises(error, match=message):
        CorruptedVectorFeedback(TextVectorEnv(2, Turns), **corruptions)
    for make in (gym.make, gym.make_vec):
        with pytest.raises(error, match=message):
            make(IDS[0], feedback=corruptions)  # type: ignore[operator]


def test_feedback_that_is_no_dict_and_a_misspelt_argument_are_refused() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(TypeError, match=r"feedback is 'flip'. Give a dict"):
            make(IDS[0], feedback="flip")  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"'feedbak'.*Did you mean 'feedback'"):
            make(IDS[0], feedbak={"flip": 0.2})  # type: ignore[operator]


def test_environments_without_a_range_of_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="has no reward_range"):
        CorruptedFeedback(gym.make("CartPole-v1"), flip=0.2)
    with pytest.raises(ValueError, match="has no reward_range"):
        CorruptedVectorFeedback(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"), flip=0.2)


@pytest.mark.parametrize(("steps", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_impossible_steps_are_refused(steps: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="feedback_steps is"):
        turns().reset(options={"feedback_steps": steps})


def test_unknown_options_are_refused_by_the_environment() -> None:
    with pytest.raises(ValueError, match="no option 'exampl'"):
        turns(flip=0.2).reset(options={"exampl": 1})


# --- agents --------------------------------------------------------------------------------------

NOISY = {"flip": 0.1, "noise": 0.2, "delay": 1, "drift": {"flip": 0.9, "steps": 60}}


@pytest.mark.usefixtures("three_token_tasks")
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("missing", [0.0, 0.25])
def test_the_expected_gradient_under_flips_is_1_minus_2p_times_the_clean_one(
    p: float, missing: float
) -> None:
    """Summed exactly over all answers and all that can happen to their feedback."""
    agent = make_agent()
    model = agent.policy.model.double().eval()
    rewards = torch.linspace(-1, 1, len(ANSWERS), dtype=torch.float64)
    probabilities = answer_log_probs(model).exp()
    (probabilities * rewards).sum().backward()
    clean = gradient(agent)
    corruption = Corruption(flip=p, missing=missing)
    expected = torch.zeros_like(clean)
    for k, reward in enumerate(rewards.tolist()):
        for flip, flip_chance in ((0.0, p), (p, 1 - p)):
            for gone, gone_chance in ((0.0, missing), (missing, 1 - missing)):
                given, _ = judge(reward, corruption, RANGE, Chance(flip, gone, 0.0))
                rollout = listed(rewards, [k])
                agent.accumulate_gradients(rollout, torch.tensor([given], dtype=torch.float64))
                weight = probabilities[k].item() * flip_chance * gone_chance
                expected -= weight * gradient(agent)
    scale = (1 - missing) * (1 - 2 * p)
    assert (expected - scale * clean).norm() < 1e-6 * clean.norm()
    if scale == 1:
        assert relative(expected, clean) < 1e-6


def agent_of(name: str, **corruptions: Any) -> Any:
    env = "Steps-v9" if name in ("linucb", "sb3-ppo") else "Identity-v9"
    settings: dict[str, Any] = {
        "linucb": {"episodes": 7},
        "sb3-ppo": {"n_envs": 3, "n_steps": 16, "batch_size": 8},
    }.get(name, {"learning_rate": 1e-2})
    letters = ("ab", "b", "aab")
    kwargs = {"letters": letters, "feedback": corruptions or None}
    return make_agent(env, agent=name, env_kwargs=kwargs, **settings)


def iterate(agent: Any) -> dict[str, float]:
    return {k: v for k, v in agent.iterate().items() if not k.startswith("perf/")}


@pytest.mark.usefixtures("three_token_tasks")
@pytest.mark.parametrize("name", ["reinforce", "supervised", "linucb", "sb3-ppo"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole = agent_of(name, **NOISY)
    expected = [iterate(whole) for _ in range(4)]
    halved = agent_of(name, **NOISY)
    assert [iterate(halved) for _ in range(2)] == expected[:2]
    halved.save(tmp_path / "half")
    resumed = type(halved).load(tmp_path / "half", device="cpu")
    assert [iterate(resumed) for _ in range(2)] == expected[2:]


@pytest.mark.usefixtures("three_token_tasks")
@pytest.mark.parametrize("name", ["reinforce", "supervised", "linucb", "sb3-ppo"])
def test_feedback_drifts_over_the_updates_of_a_run(name: str) -> None:
    """Only the first step of the run, in every row, comes before the end of this drift.

    Rows are odd in number, so that what these steps earn does not cancel.
    """
    agent = agent_of(name, drift={"flip": 1.0, "steps": 1})
    first, second = iterate(agent), iterate(agent)
    assert first["rollout/reward"] != pytest.approx(1 - 2 * first["rollout/score"])
    assert second["rollout/reward"] == pytest.approx(1 - 2 * second["rollout/score"])


@pytest.mark.usefixtures("three_token_tasks")
def test_training_sees_corrupted_rewards_and_evaluation_clean_scores() -> None:
    clean, wrong = agent_of("reinforce"), agent_of("reinforce", flip=1.0)
    assert wrong.evaluate("train").scores.tolist() == clean.evaluate("train").scores.tolist()
    found, expected = iterate(wrong), iterate(clean)
    assert found["rollout/score"] == expected["rollout/score"]
    assert expected["rollout/reward"] == pytest.approx(2 * expected["rollout/score"] - 1)
    assert found["rollout/reward"] == pytest.approx(1 - 2 * found["rollout/score"])
    assert not torch.equal(parameters(wrong), parameters(clean))


def test_the_command_line_trains_under_corrupted_feedback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--env RecommendationClicks-v0 --agent linucb --steps 40 --episodes 4 --quiet"
    common += " --track jsonl --report validation --eval-every 0 --samples 0"
    results = []
    for name, kwargs in (("wrong", {"feedback": {"flip": 1.0}}), ("clean", {})):
        out = tmp_path / name
        train.main([*common.split(), "--env-kwargs", json.dumps(kwargs), "--out", str(out)])
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        sign = -1 if kwargs else 1
        rollouts = [line for line in lines if "rollout/reward" in line]
        assert rollouts
        for line in rollouts:
            expected = sign * (2 * line["rollout/score"] - 1)
            assert line["rollout/reward"] == pytest.approx(expected)
        results.append(json.loads((out / "result.json").read_text()))
    assert results[0]["before"] == results[1]["before"]
    assert results[0]["after"] != results[1]["after"]
    with pytest.raises(SystemExit):
        train.main([*common.split(), "--env-kwargs", '{"feedback": {"flp": 1}}'])
    assert "Did you mean 'flip'" in capsys.readouterr().err
