"""Simulated users: probabilities by hand, exact play against brute force, and the environment."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import llm_envs  # noqa: F401  (registers the ids)
from agents.baselines import LinUCB
from llm_envs.core import play
from llm_envs.datasets.movielens import load_movielens
from llm_envs.datasets.splits import SPLITS, split_of
from llm_envs.tasks.recommendation_clicks import (
    FEATURE_NAMES,
    GENRES,
    RecommendationClicks,
    best_mean_choice,
)
from llm_envs.tasks.simulated_users import (
    DEFAULT_HABITS,
    FILMS,
    GENRE_WEIGHTS,
    USERS,
    Habits,
    Visit,
    drifting_tastes,
    expected_score,
    liking,
    make_films,
    make_ratings,
    make_users,
    open_visit,
    optimal_choices,
    optimal_score,
    random_score,
    users_in,
)

STEADY = replace(DEFAULT_HABITS, drift=0.0)
each_split = pytest.mark.parametrize("split", SPLITS)


def draw_visit(
    seed: int, steps: int, choices: int, habits: Habits = DEFAULT_HABITS
) -> tuple[Any, Any, Visit]:
    """Return a user, the films that are offered to them, and the session."""
    rng = np.random.default_rng(seed)
    user = make_users()[int(rng.integers(USERS))]
    return user, *open_visit(user, steps, choices, rng, habits)


def myopic_choices(visit: Visit) -> list[int]:
    chosen: list[int] = []
    for _ in visit.liking:
        chosen.append(int(visit.chances(chosen).argmax()))
    return chosen


# --- probabilities -------------------------------------------------------------------------------

NAMES = tuple(GENRE_WEIGHTS)


def genres_of(film: int) -> set[str]:
    return {name for name, flag in zip(NAMES, make_films().genres[film], strict=True) if flag}


def chance_by_hand(habits: Habits, user: Any, film: int, past: Sequence[int]) -> float:
    """Return the probability of a click without drift, after the films of ``past``."""
    films, genres = make_films(), genres_of(film)
    taste = dict(zip(NAMES, user.taste, strict=True))
    odds = habits.base
    odds += habits.taste * sum(taste[name] for name in genres) / math.sqrt(len(genres))
    odds += habits.quality * films.quality[film]
    odds += habits.era * math.exp(-abs(films.years[film] - user.favourite_year) / 20)
    odds += habits.novelty * user.curiosity * (1 - 2 * films.fame[film])
    for j, other in enumerate(reversed(past[max(len(past) - habits.memory, 0) :])):
        alike = len(genres & genres_of(other)) / len(genres | genres_of(other))
        odds -= habits.saturation * habits.fading**j * alike
    return 1 / (1 + math.exp(-odds))


weights = st.floats(0, 5)
steady_habits = st.builds(
    Habits,
    base=st.floats(-3, 3),
    taste=weights,
    quality=weights,
    era=weights,
    novelty=weights,
    saturation=weights,
    fading=st.floats(0, 1),
    memory=st.integers(0, 4),
    drift=st.just(0.0),
)


@settings(max_examples=60, deadline=None)
@given(
    habits=steady_habits,
    seed=st.integers(0, 2**32),
    chosen=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_probabilities_are_those_of_the_formula(
    habits: Habits, seed: int, chosen: list[int]
) -> None:
    user, rows, visit = draw_visit(seed, 6, 3, habits)
    past: list[int] = []
    for step, choice in enumerate(chosen):
        by_hand = [chance_by_hand(habits, user, int(film), past) for film in rows[step]]
        found = visit.chances(chosen[:step])
        assert_allclose(found, by_hand, rtol=1e-9, atol=1e-12)
        h = min(step, habits.memory)
        history = tuple(chosen[step - h : step])
        assert_allclose(visit.chances_by_history(step)[history], by_hand, rtol=1e-9, atol=1e-12)
        assert_array_equal(visit.clicks(chosen[:step]), visit.draws[step] < found)
        past.append(int(rows[step, choice]))


def test_users_tire_of_what_was_recommended_and_forget_it() -> None:
    for seed in range(20):
        _, rows, visit = draw_visit(seed, 5, 4)
        steadfast = Visit(
            replace(visit.habits, saturation=0.0), visit.liking, visit.genres, visit.draws
        )
        for last in range(4):
            before, after = steadfast.chances([last]), visit.chances([last])
            for i, film in enumerate(rows[1]):
                alike = bool(genres_of(int(film)) & genres_of(int(rows[0, last])))
                assert (after[i] < before[i]) == alike
        assert_array_equal(visit.chances([0, 1, 2, 3]), visit.chances([3, 1, 2, 3]))  # forgotten
    assert any(
        (visit.chances([0, 1, 2]) != visit.chances([3, 1, 2])).any()
        for _, _, visit in (draw_visit(seed, 5, 4) for seed in range(20))
    )


def test_novelty_is_what_the_curious_seek() -> None:
    films = make_films()
    rows, taste = np.arange(FILMS)[None], np.zeros((1, len(NAMES)))
    known = replace(films, fame=np.ones(FILMS))
    unknown = replace(films, fame=np.zeros(FILMS))
    for curiosity in (-1.5, 0.0, 2.0):
        low, high = (
            liking(DEFAULT_HABITS, f, rows, taste, 1990.0, curiosity) for f in (known, unknown)
        )
        assert_allclose(high - low, 2 * DEFAULT_HABITS.novelty * curiosity, atol=1e-12)


def test_tastes_drift_and_stay_those_of_a_population() -> None:
    """Means over 50,000 products of normals: 6 standard errors are missed by chance in 2e-9."""
    n, steps = 50_000, 4
    taste = np.random.default_rng(0).standard_normal(n)
    for drift in (0.0, 0.3, 1.0):
        tastes = drifting_tastes(
            Habits(drift=drift), taste.tolist(), steps, np.random.default_rng(1)
        )
        assert_array_equal(tastes[0], taste)
        for lag in range(steps):
            error = 6 * math.sqrt(2 / n)
            kept = (1 - drift**2) ** (lag / 2)
            assert abs((tastes[lag] * tastes[0]).mean() - kept) < error
            assert abs((tastes[lag] ** 2).mean() - 1) < error
    still = drifting_tastes(STEADY, taste.tolist(), steps, np.random.default_rng(1))
    assert_array_equal(still, np.broadcast_to(taste, still.shape))


def test_drift_changes_all_steps_but_the_first() -> None:
    _, rows, visit = draw_visit(3, 6, 5)
    _, same_rows, steady = draw_visit(3, 6, 5, STEADY)
    assert_array_equal(rows, same_rows)
    assert_array_equal(visit.draws, steady.draws)
    assert_array_equal(visit.liking[0], steady.liking[0])
    assert (visit.liking[1:] != steady.liking[1:]).all()


# --- exact values --------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), memory=st.integers(0, 6), steps=st.integers(1, 5))
def test_exact_values_are_those_of_all_plans(seed: int, memory: int, steps: int) -> None:
    _, _, visit = draw_visit(seed, steps, 3, replace(DEFAULT_HABITS, memory=memory))
    scores = [expected_score(visit, plan) for plan in itertools.product(range(3), repeat=steps)]
    assert optimal_score(visit) == pytest.approx(max(scores), abs=1e-12)
    assert random_score(visit) == pytest.approx(np.mean(scores), abs=1e-12)


def test_a_plan_earns_the_mean_of_its_probabilities() -> None:
    user, rows, visit = draw_visit(8, 4, 5, STEADY)
    plan = [4, 0, 2, 2]
    films = [int(rows[step, choice]) for step, choice in enumerate(plan)]
    by_hand = [chance_by_hand(STEADY, user, f, films[:step]) for step, f in enumerate(films)]
    assert expected_score(visit, plan) == pytest.approx(np.mean(by_hand))


@pytest.mark.parametrize(("steps", "sessions"), [(4, 30), (40, 5)])
def test_who_knows_more_and_looks_further_scores_more(steps: int, sessions: int) -> None:
    found = []
    for seed in range(sessions):
        _, _, visit = draw_visit(seed, steps, 5)
        optimum, myopic = optimal_score(visit), expected_score(visit, myopic_choices(visit))
        blind = expected_score(visit, visit.liking.argmax(1).tolist())  # knows no saturation
        assert optimum >= max(myopic, blind) - 1e-12
        plan = optimal_choices(visit)
        for step, choice in itertools.product(range(0, steps, 9), range(5)):
            other = [*plan[:step], choice, *plan[step + 1 :]]
            assert expected_score(visit, other) <= optimum + 1e-12
        found.append((random_score(visit), blind, myopic, optimum))
    at_random, blind, myopic, optimum = np.mean(found, axis=0)
    assert at_random + 0.1 < blind + 0.01 < myopic < optimum - 0.01


def test_exact_play_refuses_what_fills_the_memory() -> None:
    _, _, visit = draw_visit(0, 4, 65)
    with pytest.raises(ValueError, match=r"65\^4 histories a step.*Give fewer choices"):
        optimal_choices(visit)
    _, _, visit = draw_visit(0, 3, 65)
    assert len(optimal_choices(visit)) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"taste": -1.0}, "0 or more"),
        ({"base": math.nan}, "finite"),
        ({"fading": 1.1}, "between 0 and 1"),
        ({"drift": -0.1}, "between 0 and 1"),
        ({"memory": -1}, "memory has to be 0 or more"),
    ],
)
def test_habits_that_make_no_simulator_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Habits(**wrong)


# --- films and users -----------------------------------------------------------------------------


def test_everything_is_made_alike_every_time() -> None:
    again, films = make_films.__wrapped__(), make_films()
    assert again.titles == films.titles
    for name in ("years", "genres", "quality", "fame"):
        assert_array_equal(getattr(again, name), getattr(films, name))
    assert make_users.__wrapped__() == make_users()
    once, twice = make_ratings.__wrapped__(), make_ratings()
    assert_array_equal(once.users, twice.users)
    assert_array_equal(once.movies, twice.movies)
    assert_array_equal(once.rating, twice.rating)


def test_splits_share_no_user() -> None:
    users = {split: users_in(split) for split in SPLITS}
    assert sum(map(len, users.values())) == USERS == len(users_in("all"))
    assert len({user.id for split in SPLITS for user in users[split]}) == USERS
    for split in SPLITS:
        assert len(users[split]) >= 50
        assert {split_of(str(user.user)) for user in users[split]} == {split}


def test_users_are_drawn_from_the_distributions_that_are_told() -> None:
    """Each bound is 6 standard errors: missed by chance in 2e-9 of seeds."""
    tastes = np.array([user.taste for user in make_users()])
    curiosity = np.array([user.curiosity for user in make_users()])
    for drawn in (tastes, curiosity):
        assert abs(drawn.mean()) < 6 / math.sqrt(drawn.size)
        assert abs(drawn.var() - 1) < 6 * math.sqrt(2 / drawn.size)
    between = np.corrcoef(tastes.T)[~np.eye(len(NAMES), dtype=bool)]
    assert abs(between).max() < 6 / math.sqrt(USERS)


def test_films_are_ours_and_readable() -> None:
    films, ratings = make_films(), make_ratings()
    plain = {re.sub(r"[^a-z ]|, the$|, a$|^the |^a ", "", t.lower()) for t in films.titles}
    theirs = load_movielens("movielens_small").titles
    assert not plain & {re.sub(r"[^a-z ]|, the$|, a$|^the |^a ", "", t.lower()) for t in theirs}
    assert len(set(films.titles)) == FILMS
    assert set(films.genres.sum(1)) == {1.0, 2.0, 3.0}
    assert set(NAMES) <= set(GENRES)
    for film in range(0, FILMS, 97):
        assert set(ratings.genres[film]) == genres_of(film)
    assert films.years.min() >= 1930
    assert films.years.max() <= 2020


def test_only_training_users_rated_and_as_the_model_says() -> None:
    """|z| < 5 is missed by chance in 6e-7."""
    ratings, films = make_ratings(), make_films()
    assert set(ratings.users.tolist()) == {user.user for user in users_in("train")}
    by = [make_users()[user - 1] for user in ratings.users.tolist()]
    odds = liking(
        DEFAULT_HABITS,
        films,
        ratings.movies[:, None],
        np.array([user.taste for user in by]),
        np.array([[user.favourite_year] for user in by]),
        np.array([[user.curiosity] for user in by]),
    )
    p = 1 / (1 + np.exp(-odds[:, 0]))
    for part in (p < 0.3, (p >= 0.3) & (p < 0.7), p >= 0.7):
        z = (ratings.clicked[part] - p[part]).sum() / math.sqrt((p * (1 - p))[part].sum())
        assert abs(z) < 5
    known = np.bincount(ratings.movies, minlength=FILMS) / len(users_in("train"))
    told = 0.01 + 0.2 * films.fame**3
    z = (known - told).sum() / math.sqrt((told * (1 - told)).sum() / len(users_in("train")))
    assert abs(z) < 5
    assert set(np.unique(ratings.rating)) == set(np.arange(1, 11) / 2)


# --- the environment -----------------------------------------------------------------------------


def make(**arguments: Any) -> Any:
    return gym.make("RecommendationClicks-v0", dataset="simulated", **arguments)


@each_split
@pytest.mark.parametrize("arguments", [{}, {"choices": 2, "max_turns": 30}])
@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_it(split: str, arguments: dict[str, int]) -> None:
    env = make(split=split, **arguments)
    check_env(env.unwrapped)
    assert len(env.unwrapped.task.examples) >= 50


@each_split
def test_a_session_keeps_the_contract(split: str) -> None:
    env = make(split=split, max_turns=12)
    rng = np.random.default_rng(2)
    for _ in range(5):
        before, info = env.reset(seed=int(rng.integers(2**32)))
        offered: list[str] = []
        terminated = False
        while not terminated:
            chances, action = env.unwrapped.candidate_scores, int(rng.integers(5))
            assert chances.shape == (5,)
            assert ((chances > 0) & (chances < 1)).all()
            offered += before["candidates"]
            after, reward, terminated, _, info = env.step(action)
            assert after in env.observation_space
            assert info["score"] == info["score/click"] in (0.0, 1.0)
            assert reward == 2 * info["score"] - 1
            assert info["best_score"] == chances.max()
            assert info["feedback"] == ("I liked it." if info["score"] else "I did not like it.")
            said = before["prompt"] + before["candidates"][action] + "\nUser: " + info["feedback"]
            assert after["prompt"].startswith(said)
            before = after
        assert info["turn"] == 12
        assert env.unwrapped.candidate_scores is None
        assert len(set(offered)) == len(offered) == 60  # no film twice


TOLD = re.compile(r" ([A-Z].+) \((\d{4})\): ([^.]+)\. Rated (\d\.\d) by (\d+)\.")


@each_split
def test_what_is_told_of_a_film_comes_from_other_training_users(split: str) -> None:
    env, ratings = make(split=split), make_ratings()
    for seed in range(5):
        observation, info = env.reset(seed=seed)
        user = int(info["example_id"].removeprefix("simulated/"))
        others = ratings.users != user
        assert others.all() == (split != "train")
        prior = ratings.rating[others].mean(dtype=np.float64)
        for text, features in zip(observation["candidates"], observation["features"], strict=True):
            match = TOLD.fullmatch(text)
            assert match is not None
            film = ratings.titles.index(match[1])
            assert int(match[2]) == make_films().years[film]
            assert set(match[3].split(", ")) == genres_of(film)
            stars = ratings.rating[others & (ratings.movies == film)]
            mean = (stars.sum(dtype=np.float64) + 5 * prior) / (len(stars) + 5)
            assert features[FEATURE_NAMES.index("mean_rating")] == pytest.approx(mean / 5)
            assert (float(match[4]), int(match[5])) == (round(mean, 1), len(stars))


def test_clicks_come_as_often_as_they_are_likely() -> None:
    """|z| < 5 is missed by chance in 6e-7, for each of three parts and two players."""
    task = RecommendationClicks(dataset="simulated", max_turns=10)
    rng = np.random.default_rng(0)
    for act in (lambda e: int(rng.integers(5)), lambda e: best_mean_choice(e.observation)):
        chances, clicks = [], []
        for example in task.examples[:100]:
            episode = task.begin(example, rng)
            while not episode.finished:
                action = act(episode)
                chances.append(task.candidate_scores(episode)[action])  # type: ignore[index]
                [outcome] = task.score([episode], [action])
                clicks.append(outcome.score)
                play.apply(task, episode, action, outcome)
        p, c = np.array(chances), np.array(clicks, np.float64)
        for part in (p < 0.3, (p >= 0.3) & (p < 0.7), p >= 0.7):
            assert abs((c - p)[part].sum() / math.sqrt((p * (1 - p))[part].sum())) < 5


def test_everybody_meets_the_same_luck() -> None:
    task = RecommendationClicks(dataset="simulated", max_turns=5)
    one, other = (task.begin(task.examples[0], np.random.default_rng(4)) for _ in range(2))
    assert_array_equal(one.state.replies.draws, other.state.replies.draws)
    for e, action in ((one, 0), (other, 1)):
        state = e.rng.bit_generator.state
        [outcome] = task.score([e], [action])
        play.apply(task, e, action, outcome)
        assert e.rng.bit_generator.state == state
    assert one.observation["candidates"] == other.observation["candidates"]


def test_the_vector_form_plays_the_same_and_groups_share_episodes() -> None:
    arguments: dict[str, Any] = {"dataset": "simulated", "split": "test", "max_turns": 7}
    seeds = [5, 6]
    many = gym.make_vec("RecommendationClicks-v0", num_envs=4, group_size=2, **arguments)
    single = [gym.make("RecommendationClicks-v0", **arguments) for _ in range(4)]
    together, _ = many.reset(seed=[5, 5, 6, 6])
    alone = [env.reset(seed=seeds[i // 2])[0] for i, env in enumerate(single)]
    rng = np.random.default_rng(0)
    for _ in range(14):
        for i, observation in enumerate(alone):
            assert together["prompt"][i] == observation["prompt"]
            assert tuple(texts[i] for texts in together["candidates"]) == observation["candidates"]
            assert_array_equal(together["features"][i], observation["features"])
        assert together["candidates"][0][0] == together["candidates"][0][1]
        actions = rng.integers(0, 5, size=4)
        together, rewards, terminated, _, _ = many.step(actions)
        for i, (env, action) in enumerate(zip(single, actions, strict=True)):
            alone[i], reward, done, _, _ = env.step(action)
            assert (rewards[i], terminated[i]) == (reward, done)
            if done:
                alone[i], _ = env.reset()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_goes_on_alike(copied: Any) -> None:
    env = make(max_turns=6)
    env.reset(seed=1)
    for action in (3, 1):
        env.step(action)
    twin = copied(env)
    for action in (0, 4, 4, 2):
        (one, *rest), (two, *others) = env.step(action), twin.step(action)
        assert rest == others
        assert one["prompt"] == two["prompt"]
        assert_array_equal(one["features"], two["features"])
    assert len(pickle.dumps(env)) < 100_000


def test_a_session_lasts_as_long_as_the_catalogue() -> None:
    env = make(max_turns=FILMS // 5, split="validation")
    observation, info = env.reset(seed=0, options={"example": 3})
    assert info["example_id"] == users_in("validation")[3].id
    plain = env.unwrapped
    plan = plain.task.optimal_choices(plain.episode)
    chances, terminated = [], False
    while not terminated:
        chances.append(plain.candidate_scores[plan[len(chances)]])
        observation, _, terminated, _, info = env.step(plan[len(chances) - 1])
    assert len(plan) == len(chances) == info["turn"] == 400
    assert not observation["features"].any()
    visit = plain.episode.state.replies
    assert np.mean(chances) == pytest.approx(optimal_score(visit))
    assert np.mean(chances) > expected_score(visit, myopic_choices(visit))


def test_on_record_the_best_plan_is_the_best_of_each_step() -> None:
    task = RecommendationClicks(split="validation")
    episode = task.begin(task.examples[0], np.random.default_rng(0))
    for choice in task.optimal_choices(episode):
        scores = task.candidate_scores(episode)
        assert scores is not None
        assert choice == scores.argmax()
        [outcome] = task.score([episode], [choice])
        play.apply(task, episode, choice, outcome)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_turns": 401}, "max_turns=401 times choices=5 films are needed"),
        ({"choices": 501}, "the simulated catalogue has 2,000. Give fewer turns or choices."),
        ({"choices": 10**12}, "Give fewer turns or choices."),
        ({"dataset_format": "movielens_csv"}, "the simulated set is read from no file"),
        ({"dataset": "simulate"}, "Did you mean 'simulated'?"),
        ({"split": "val"}, "Did you mean 'validation'?"),
        ({"max_turns": 0}, "max_turns is 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        gym.make("RecommendationClicks-v0", **{"dataset": "simulated", **arguments})


def test_a_checkpoint_goes_on_with_the_same_users_only(tmp_path: Path) -> None:
    kwargs = {"dataset": "simulated", "max_turns": 3}
    agent = LinUCB("none", "RecommendationClicks-v0", env_kwargs=kwargs, episodes=4, eval_every=0)
    agent.learn(24)
    agent.save(tmp_path / "saved")
    again = LinUCB.load(tmp_path / "saved")
    for one in (agent, again):
        one.learn(24)
    assert_array_equal(again.moment, agent.moment)
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["env_kwargs"] = {"max_turns": 3}
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match="was trained on RecommendationClicks-v0 with 820 examples"
    ):
        LinUCB.load(tmp_path / "saved")
