"""RecommendationClicks: real films and clicks, what is shown of them, and what must not show."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import llm_envs  # noqa: F401  (registers the ids)
from llm_envs.core import play
from llm_envs.core.task import Episode, Outcome
from llm_envs.datasets.movielens import FilmStatistics, load_movielens
from llm_envs.datasets.splits import SPLITS, split_of
from llm_envs.tasks.recommendation_clicks import (
    FEATURE_NAMES,
    GENRES,
    RecommendationClicks,
    Viewer,
    best_mean_choice,
    film_features,
    taste_features,
)

Stars = dict[tuple[int, int], float]  # (user, film) -> stars

# --- a small set whose every number the tests know -----------------------------------------------

KINDS = ("Drama", "Comedy", "IMAX", "Western", "Wuxia")  # Wuxia: no genre of MovieLens
FILMS = range(1, 61)


def genres_of(film: int) -> tuple[str, ...]:
    return tuple(kind for i, kind in enumerate(KINDS) if film >> i & 1)


def year_of(film: int) -> int | None:
    return None if film % 10 == 0 else 1950 + film


def make_stars() -> Stars:
    """50 users with 2 to 40 films each; film 60 has one rating, so that somebody sees a prior."""
    rng = np.random.default_rng(7)
    stars: Stars = {}
    for user in range(1, 51):
        n = 2 if user == 50 else int(rng.integers(5, 41))
        for film in rng.choice(59, size=n, replace=False) + 1:
            stars[user, int(film)] = float(rng.integers(1, 11)) / 2
    stars[1, 60] = 3.0
    return stars


STARS = make_stars()


def write_csv(folder: Path, stars: Stars = STARS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    ratings = [f"{user},{film},{value},{user + film}" for (user, film), value in stars.items()]
    films = [
        f"{film},Film {film}{f' ({year})' if (year := year_of(film)) else ''},"
        f"{'|'.join(genres_of(film)) or '(no genres listed)'}"
        for film in FILMS
    ]
    head = "userId,movieId,rating,timestamp\n"
    (folder / "ratings.csv").write_text(head + "\n".join(ratings) + "\n")
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(films) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("movielens"))


def make(folder: Path | str, **arguments: Any) -> RecommendationClicks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of users with too few films, tested by itself
        return RecommendationClicks(dataset=folder, **arguments)


class Step(NamedTuple):
    observation: Mapping[str, Any]
    scores: Any
    action: int
    outcome: Outcome


def session(
    task: RecommendationClicks,
    viewer: Viewer,
    seed: int,
    act: Callable[[Mapping[str, Any]], int] = lambda observation: 0,
) -> tuple[list[Step], Episode[Viewer]]:
    """Play one session; return its steps and how it ended."""
    episode = task.begin(viewer, np.random.default_rng(seed))
    steps = []
    while not episode.finished:
        observation, scores = episode.observation, task.candidate_scores(episode)
        action = act(observation)
        [outcome] = task.score([episode], [action])
        play.apply(task, episode, action, outcome)
        steps.append(Step(observation, scores, action, outcome))
    return steps, episode


SHOWN = re.compile(r" Film (\d+)(?: \((\d{4})\))?(?:: ([^.]+))?\. Rated (\d\.\d) by (\d+)\.")


def film_in(text: str) -> int:
    match = SHOWN.fullmatch(text)
    assert match is not None, text
    return int(match[1])


def by_name(task: RecommendationClicks, user: int) -> Viewer:
    return next(viewer for viewer in task.examples if viewer.user == user)


def column(observation: Mapping[str, Any], name: str) -> Any:
    return observation["features"][:, FEATURE_NAMES.index(name)]


# --- sessions ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    who=st.integers(0, 10**6),
    split=st.sampled_from([*SPLITS, "all"]),
    max_turns=st.none() | st.integers(1, 12),
    choices=st.integers(2, 12),
    picks=st.lists(st.integers(0, 10**6), min_size=30, max_size=30),
)
def test_any_session_keeps_the_contract(
    folder: Path,
    seed: int,
    who: int,
    split: Any,
    max_turns: int | None,
    choices: int,
    picks: list[int],
) -> None:
    task = make(folder, split=split, max_turns=max_turns, choices=choices)
    viewer = task.examples[who % len(task.examples)]
    rated = {film for user, film in STARS if user == viewer.user}
    left = iter(picks)
    steps, episode = session(task, viewer, seed, lambda observation: next(left) % choices)

    assert viewer.id == viewer.unit == f"user/{viewer.user}"
    assert split in ("all", split_of(str(viewer.user)))
    assert 1 <= len(steps) == min(max_turns or 4, len(rated) // choices)
    offered = [film_in(text) for step in steps for text in step.observation["candidates"]]
    assert len(set(offered)) == len(offered) == len(steps) * choices
    assert set(offered) <= rated

    for step, later in zip(steps, [*steps[1:], None], strict=True):
        observation, scores, action, outcome = step
        assert task.observation_space.contains(observation)
        films = [film_in(text) for text in observation["candidates"]]
        clicks = [float(STARS[viewer.user, film] >= 4) for film in films]
        assert scores.dtype == np.float64
        assert scores.tolist() == clicks
        assert outcome.score == clicks[action]
        assert outcome.parts == {"click": clicks[action]}
        assert outcome.best_score == max(clicks)
        following = later.observation if later else episode.observation
        chosen = observation["candidates"][action]
        assert following["prompt"].startswith(observation["prompt"] + chosen + "\nUser: I ")
        assert following["prompt"].endswith("Assistant:") == (later is not None)
    assert task.observation_space.contains(episode.observation)
    assert episode.observation["candidates"] == ("",) * choices
    assert not episode.observation["features"].any()
    assert task.candidate_scores(episode) is None
    assert task.references(episode) == ()


def test_the_prompt_tells_films_and_replies(folder: Path) -> None:
    task = make(folder, max_turns=3, choices=2)
    steps, episode = session(task, by_name(task, 1), seed=3, act=lambda observation: 1)
    said = {1.0: "I liked it.", 0.0: "I did not like it."}
    one, two, three = (step.observation["candidates"][1] for step in steps)
    first, second, third = (said[STARS[1, film_in(text)] >= 4] for text in (one, two, three))
    assert steps[0].observation["prompt"] == "User: Which film should I watch?\nAssistant:"
    assert episode.observation["prompt"] == (
        f"User: Which film should I watch?\nAssistant:{one}\n"
        f"User: {first} What next?\nAssistant:{two}\n"
        f"User: {second} What next?\nAssistant:{three}\n"
        f"User: {third}"
    )
    assert [step.outcome.feedback for step in steps] == [first, second, third]
    assert [(message["role"], message["content"]) for message in episode.messages] == [
        ("user", "Which film should I watch?"),
        ("assistant", one.strip()),
        ("user", f"{first} What next?"),
        ("assistant", two.strip()),
        ("user", f"{second} What next?"),
        ("assistant", three.strip()),
        ("user", third),
    ]


def test_the_generator_alone_decides_what_is_offered(folder: Path) -> None:
    task = make(folder)
    viewer = by_name(task, 1)

    def slates(seed: int, action: int) -> list[tuple[str, ...]]:
        steps, _ = session(task, viewer, seed, lambda observation: action)
        return [step.observation["candidates"] for step in steps]

    assert slates(1, 0) == slates(1, 0) == slates(1, 4)
    assert slates(1, 0) != slates(2, 0)
    before = task.begin(viewer, np.random.default_rng(1))
    state = before.rng.bit_generator.state
    [outcome] = task.score([before], [0])
    play.apply(task, before, 0, outcome)
    assert before.rng.bit_generator.state == state


def test_every_film_is_offered_at_every_place_equally_often(folder: Path) -> None:
    task = make(folder, max_turns=1, choices=3)
    viewer = min(task.examples, key=lambda one: one.films)
    drawn = 3000
    rng = np.random.default_rng(0)
    places = np.zeros((61, 3))
    for _ in range(drawn):
        for place, text in enumerate(task.begin(viewer, rng).observation["candidates"]):
            places[film_in(text), place] += 1
    rated = sorted(film for user, film in STARS if user == viewer.user)
    expected = drawn / len(rated)
    chi2 = ((places[rated] - expected) ** 2 / expected).sum(0)
    degrees = len(rated) - 1
    assert (chi2 < degrees + 4 * math.sqrt(2 * degrees)).all()


def test_many_episodes_are_scored_in_one_call(folder: Path) -> None:
    task = make(folder)
    episodes = [task.begin(task.examples[i], np.random.default_rng(i)) for i in range(8)]
    actions = [i % 5 for i in range(8)]
    together = task.score(episodes, actions)
    alone = [task.score([e], [a])[0] for e, a in zip(episodes, actions, strict=True)]
    assert together == alone
    assert {outcome.score for outcome in together} == {0.0, 1.0}
    assert all(episode.turn == 0 and not episode.state.chosen for episode in episodes)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_goes_on_alike(folder: Path, copied: Callable[[Any], Any]) -> None:
    task = make(folder)
    episode = task.begin(task.examples[0], np.random.default_rng(5))
    [outcome] = task.score([episode], [2])
    play.apply(task, episode, 2, outcome)
    other = copied(episode)
    for e in (episode, other):
        [outcome] = task.score([e], [1])
        play.apply(task, e, 1, outcome)
    assert other.observation["prompt"] == episode.observation["prompt"]
    assert other.observation["candidates"] == episode.observation["candidates"]
    assert_array_equal(other.observation["features"], episode.observation["features"])


# --- what is shown of a film ---------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_shown_is_computed_from_other_training_users(folder: Path, split: Any) -> None:
    task = make(folder, split=split)
    training = {user for user, _ in STARS if split_of(str(user)) == "train"}
    priors_shown = 0
    for viewer in task.examples:
        others = {key: value for key, value in STARS.items() if key[0] in training - {viewer.user}}
        prior = sum(others.values()) / len(others)
        steps, _ = session(task, viewer, seed=viewer.user)
        for step in steps:
            for i, text in enumerate(step.observation["candidates"]):
                film = film_in(text)
                rated = [value for (_, other), value in others.items() if other == film]
                mean = (sum(rated) + 5 * prior) / (len(rated) + 5)
                year, genres = year_of(film), genres_of(film)
                priors_shown += not rated
                match = SHOWN.fullmatch(text)
                assert match is not None
                assert match[2] == (str(year) if year else None)
                assert match[3] == (", ".join(genres) or None)
                assert match[4] == f"{mean:.1f}"
                assert match[5] == str(len(rated))
                row = dict(zip(FEATURE_NAMES, step.observation["features"][i], strict=True))
                expected = {
                    "mean_rating": mean / 5,
                    "rating_count": math.log(1 + len(rated)) / math.log(1 + len(training)),
                    "year": (year - 1900) / 130 if year else 0,
                } | {f"genre/{genre}": float(genre in genres) for genre in GENRES}
                assert_allclose([row[name] for name in expected], list(expected.values()), 1e-6)
    if split == "train":  # film 60 was rated by user 1 alone
        steps, _ = session(make(folder, max_turns=20, choices=2), by_name(task, 1), 0)
        texts = [text for step in steps for text in step.observation["candidates"]]
        priors_shown += sum("Film 60" in text and text.endswith("by 0.") for text in texts)
        assert priors_shown


def flipped(stars: Stars, whose: Callable[[int], bool]) -> Stars:
    return {(u, f): 5.5 - value if whose(u) else value for (u, f), value in stars.items()}


def observations(task: RecommendationClicks, viewer: Viewer) -> list[Any]:
    steps, episode = session(task, viewer, seed=1)
    return [*(step.observation for step in steps), episode.observation]


def test_no_rating_of_the_served_user_or_of_another_split_shows(tmp_path: Path) -> None:
    plain = make(write_csv(tmp_path / "plain"), split="all")
    unseen = make(
        write_csv(tmp_path / "unseen", flipped(STARS, lambda u: split_of(str(u)) != "train")),
        split="all",
    )
    for viewer in plain.examples:
        own = flipped(STARS, lambda u, user=viewer.user: u == user)  # type: ignore[misc]
        served = make(write_csv(tmp_path / f"own{viewer.user}", own), split="all")
        before, after = observations(plain, viewer)[0], observations(served, viewer)[0]
        assert after["candidates"] == before["candidates"]
        assert_array_equal(after["features"], before["features"])
        in_training = split_of(str(viewer.user)) == "train"
        shown = list(zip(observations(plain, viewer), observations(unseen, viewer), strict=True))
        for one, other in shown if in_training else shown[:1]:  # else the replies differ
            assert one["prompt"] == other["prompt"]
            assert one["candidates"] == other["candidates"]
            assert_array_equal(one["features"], other["features"])


def test_ratings_that_were_not_recommended_do_not_show_later_either(tmp_path: Path) -> None:
    plain = make(write_csv(tmp_path / "plain"))
    viewer = by_name(plain, 1)
    steps, _ = session(plain, viewer, seed=1)
    chosen = {film_in(step.observation["candidates"][0]) for step in steps}
    changed = {
        (u, f): 5.5 - value if u == 1 and f not in chosen else value
        for (u, f), value in STARS.items()
    }
    served = make(write_csv(tmp_path / "changed", changed))
    for one, other in zip(observations(plain, viewer), observations(served, viewer), strict=True):
        assert one["prompt"] == other["prompt"]
        assert_array_equal(one["features"], other["features"])


def test_ratings_of_other_training_users_do_show(tmp_path: Path) -> None:
    plain = make(write_csv(tmp_path / "plain"))
    others = make(write_csv(tmp_path / "others", flipped(STARS, lambda u: u != 1)))
    viewer = by_name(plain, 1)
    before, after = observations(plain, viewer)[0], observations(others, viewer)[0]
    assert (column(before, "mean_rating") != column(after, "mean_rating")).all()


def test_film_features_by_hand() -> None:
    genres = np.zeros((4, len(GENRES) + 1))
    genres[1, 0] = genres[1, -1] = 1
    features = film_features(
        means=np.array([5.0, 2.5, 0.5, 3.0]),
        counts=np.array([7, 0, 1, 3]),
        years=np.array([1965.0, np.nan, 1874.0, 2099.0]),
        genres=genres,
        training_users=7,
    )
    assert features.shape == (4, 3 + len(GENRES))
    assert_allclose(features[:, 0], [1.0, 0.5, 0.1, 0.6])
    assert_allclose(features[:, 1], [1.0, 0.0, 1 / 3, 2 / 3])  # log 8, 1, 2, 4 by log 8
    assert_allclose(features[:, 2], [0.5, 0.0, 0.0, 1.0])
    assert features[:, 3:].sum() == features[1, 3] == 1  # a genre without a feature leaves none


def test_taste_features_by_hand() -> None:
    genres = np.array([[1.0, 1, 0], [0, 0, 1], [0, 0, 0]])
    years = np.array([2000.0, 1990.0, np.nan])
    past_genres = np.array([[1.0, 0, 0], [1, 1, 0]])  # liked, then not
    past_years = np.array([2000.0, np.nan])
    taste = taste_features(genres, years, past_genres, past_years, np.array([1.0, 0.0]))
    # Candidate 0 shares 1 of 2 genres with the film liked, and 2 of 2 with the other.
    assert_allclose(taste[:, 0], [(0.5 + 0.5) / (1 + 1.5), 0.5, 0.5])
    alike = math.exp(-1)
    assert_allclose(taste[:, 1], [1.5 / 2, (0.5 + alike) / (1 + alike), 0.5])
    nothing_yet = taste_features(genres, years, past_genres[:0], past_years[:0], np.zeros(0))
    assert_allclose(nothing_yet, 0.5)


def test_taste_follows_the_replies(folder: Path) -> None:
    task = make(folder, choices=2, max_turns=20)
    for viewer in task.examples[:5]:
        steps, _ = session(task, viewer, seed=9, act=lambda observation: 1)
        assert (steps[0].observation["features"][:, -2:] == 0.5).all()
        films: list[int] = []
        clicks: list[float] = []
        for step in steps:
            for i, text in enumerate(step.observation["candidates"]):
                mine = set(genres_of(film_in(text)))
                alike = [
                    len(mine & theirs) / max(len(mine | theirs), 1)
                    for theirs in (set(genres_of(film)) for film in films)
                ]
                liked = sum(s * c for s, c in zip(alike, clicks, strict=True))
                expected = (0.5 + liked) / (1 + sum(alike))
                found = column(step.observation, "genre_affinity")[i]
                assert found == pytest.approx(expected, rel=1e-6)
            films.append(film_in(step.observation["candidates"][step.action]))
            clicks.append(step.scores[step.action])


# --- the embedded set ----------------------------------------------------------------------------


def expected_click(figures: Any, clicked: Any, k: int) -> float:
    """Return the exact chance of a click on the highest figure of k films drawn uniformly.

    Films of equal figures are chosen equally often. There are comb(n - i, k) slates without the
    i films of the highest figures.
    """
    order = np.argsort(-figures, kind="stable")
    values, liked, n = figures[order], clicked[order].astype(float), len(figures)
    total, i = 0.0, 0
    while i < n:
        j = i + int(np.searchsorted(-values[i:], -values[i], side="right"))
        total += (comb(n - i, k) - comb(n - j, k)) / comb(n, k) * liked[i:j].mean()
        i = j
    return total


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_heuristic_earns_what_the_data_says(split: Any) -> None:
    ratings = load_movielens("movielens_small")
    statistics = FilmStatistics.of(ratings)
    task = RecommendationClicks(split=split)
    assert [viewer.user for viewer in task.examples] == ratings.users_in(split).tolist()
    assert task.left_out == 0
    gained, sure, by_chance = [], [], []
    for viewer in task.examples:
        rows = ratings.rows_of(viewer.user)
        _, figures = statistics.for_user(viewer.user, ratings.movies[rows])
        clicked = ratings.clicked[rows]
        sure.append(expected_click(figures.astype(np.float32), clicked, 5))
        played = [session(task, viewer, seed, best_mean_choice)[0] for seed in range(12)]
        gained.append(np.mean([step.outcome.score for steps in played for step in steps]))
        by_chance.append(clicked.mean())
        assert all(len(steps) == 4 for steps in played)
    difference = np.array(gained) - np.array(sure)
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert abs(difference.mean()) < 3.5 * error
    assert error < 0.02
    assert np.mean(sure) > np.mean(by_chance) + 0.1


def test_splits_share_no_user() -> None:
    users = [{v.user for v in RecommendationClicks(split=split).examples} for split in SPLITS]
    assert not users[0] & users[1] | users[0] & users[2] | users[1] & users[2]
    everyone = RecommendationClicks(split="all").examples
    assert {viewer.user for viewer in everyone} == set.union(*users)


def test_the_heuristic_takes_the_highest_figure() -> None:
    features = np.zeros((3, len(FEATURE_NAMES)), np.float32)
    features[:, 0] = [0.7, 0.9, 0.8]
    features[2, 1:] = 1
    assert best_mean_choice({"features": features}) == 1


# --- as environments -----------------------------------------------------------------------------


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("arguments", [{}, {"choices": 2, "max_turns": 7}])
@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_it(split: str, arguments: dict[str, int]) -> None:
    env = gym.make("RecommendationClicks-v0", split=split, **arguments)  # type: ignore[arg-type]
    check_env(env.unwrapped)


def test_infos_and_rewards() -> None:
    env = gym.make("RecommendationClicks-v0", split="validation", reward_range=(-3.0, 5.0))
    _, info = env.reset(seed=4, options={"example": 7})
    plain: Any = env.unwrapped
    assert info["example_id"] == plain.task.examples[7].id
    for turn in range(1, 5):
        scores = plain.candidate_scores
        _, reward, terminated, truncated, info = env.step(turn % 5)
        assert info["score"] == info["score/click"] == scores[turn % 5]
        assert info["best_score"] == scores.max()
        assert reward == (5.0 if info["score"] else -3.0)
        assert (terminated, truncated) == (turn == 4, False)
    assert plain.candidate_scores is None


def test_the_vector_form_plays_the_same() -> None:
    arguments: dict[str, Any] = {"split": "test", "max_turns": 3}
    seeds = [11, 12, 13]
    many = gym.make_vec(
        "RecommendationClicks-v0",
        num_envs=3,
        vectorization_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
        **arguments,
    )
    single = [gym.make("RecommendationClicks-v0", **arguments) for _ in seeds]
    together, _ = many.reset(seed=seeds)
    alone = [env.reset(seed=seed)[0] for env, seed in zip(single, seeds, strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(9):
        for i, observation in enumerate(alone):
            assert together["prompt"][i] == observation["prompt"]
            assert tuple(texts[i] for texts in together["candidates"]) == observation["candidates"]
            assert_array_equal(together["features"][i], observation["features"])
        actions = rng.integers(0, 5, size=3)
        together, rewards, terminated, _, _ = many.step(actions)
        for i, (env, action) in enumerate(zip(single, actions, strict=True)):
            alone[i], reward, done, _, _ = env.step(action)
            assert (rewards[i], terminated[i]) == (reward, done)
            if done:
                alone[i], _ = env.reset()


# --- data sets and arguments ---------------------------------------------------------------------


def write_100k(folder: Path) -> Path:
    """Write STARS in the other format, which knows neither IMAX nor Wuxia, nor half stars."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ("unknown", *(genre for genre in GENRES if genre != "IMAX"))
    items = [
        "|".join(
            [
                str(film),
                f"Film {film}" + (f" ({year_of(film)})" if year_of(film) else ""),
                "",
                "",
                "",
            ]
            + [str(int(genre in genres_of(film))) for genre in flags]
        )
        for film in FILMS
    ]
    data = [f"{u}\t{f}\t{math.ceil(value)}\t{u + f}" for (u, f), value in STARS.items()]
    (folder / "u.item").write_text("\n".join(items) + "\n", encoding="latin-1")
    (folder / "u.data").write_text("\n".join(data) + "\n", encoding="latin-1")
    return folder


def test_the_100k_format_is_read(tmp_path: Path) -> None:
    task = make(write_100k(tmp_path / "100k"), split="all")
    whole = {key: float(math.ceil(value)) for key, value in STARS.items()}
    other = make(write_csv(tmp_path / "csv", whole), split="all")
    assert task.examples == other.examples
    for viewer in task.examples:
        one, two = (session(t, viewer, seed=2)[0] for t in (task, other))
        for a, b in zip(one, two, strict=True):
            assert_array_equal(a.scores, b.scores)
            assert_array_equal(a.observation["features"][:, :3], b.observation["features"][:, :3])
            assert [film_in(text) for text in a.observation["candidates"]] == [
                film_in(text) for text in b.observation["candidates"]
            ]


def test_a_folder_of_both_formats_needs_the_format(tmp_path: Path) -> None:
    write_csv(write_100k(tmp_path))
    with pytest.raises(ValueError, match=r"holds two data sets.*dataset_format="):
        make(tmp_path)
    for name, has_wuxia in {"movielens_csv": True, "movielens_100k": False}.items():
        task = make(tmp_path, dataset_format=name)
        rng = np.random.default_rng(0)
        shown = [task.begin(viewer, rng).observation["candidates"] for viewer in task.examples]
        assert any("Wuxia" in text for texts in shown for text in texts) == has_wuxia
    with pytest.raises(ValueError, match="Did you mean 'movielens_csv'"):
        make(tmp_path, dataset_format="movielens_cvs")


def test_users_with_too_few_films_are_left_out_and_counted(folder: Path) -> None:
    films = {user: sum(u == user for u, _ in STARS) for user, _ in STARS}
    few = [user for user, n in films.items() if n < 20]
    assert 50 in few
    with pytest.warns(UserWarning, match=rf"^Left out {len(few)} user\(s\) of the split 'all'"):
        task = RecommendationClicks(dataset=folder, split="all", choices=20)
    assert task.left_out == len(few)
    assert {v.user: v.films for v in task.examples} == {u: n for u, n in films.items() if n >= 20}
    assert {task.planned_turns(viewer) for viewer in task.examples} == {1, 2}


def test_a_split_without_a_user_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No user of the split 'train' rated the choices=41"):
        make(folder, choices=41)
    lonely = {(u, f): value for (u, f), value in STARS.items() if u == 1}
    with pytest.raises(ValueError, match=r"train 1, validation 0, test 0.*split=\"all\""):
        make(write_csv(tmp_path, lonely), split="test")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_turns": 0}, ValueError, "max_turns is 0. Give a whole number from 1."),
        ({"max_turns": 2.5}, TypeError, "max_turns is 2.5. Give a whole number from 1."),
        ({"choices": 1}, ValueError, "choices is 1. Give a whole number from 2."),
        ({"choices": "5"}, TypeError, "choices is '5'. Give a whole number from 2."),
        # Refused before a space of so many candidates fills the memory.
        ({"choices": 10**12}, ValueError, "No user of the split 'train' rated the choices=10"),
        ({"split": "val"}, ValueError, "Did you mean 'validation'?"),
        ({"dataset": "movielens"}, ValueError, "Did you mean 'movielens_small'?"),
        ({"dataset": "nowhere/at\0all"}, ValueError, "neither an embedded set of ratings nor"),
        ({"dataset": "x" * 5000}, ValueError, "neither an embedded set of ratings nor"),
        ({"dataset": "hf:some/set"}, ValueError, "Download it and give the folder"),
        ({"dataset": 3}, TypeError, "A data set is a name or a folder, but 3 came."),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        RecommendationClicks(**arguments)
    with pytest.raises(error, match=re.escape(message)):
        gym.make("RecommendationClicks-v0", **arguments)


def test_bad_lines_are_named_and_skipped_on_request(tmp_path: Path) -> None:
    with (write_csv(tmp_path) / "ratings.csv").open("a") as file:
        file.write("1,2,nine,5\n")
    number = len(STARS) + 2
    with pytest.raises(ValueError, match=rf"ratings\.csv, line {number}, field rating") as refusal:
        make(tmp_path)
    assert "skip_bad_records=True" in str(refusal.value)
    for _ in range(2):  # the second time, from the cache, too
        with pytest.warns(UserWarning, match="Skipped 1 bad line"):
            task = RecommendationClicks(dataset=tmp_path, skip_bad_records=True, choices=2)
        assert task.skipped == 1


def test_a_folder_that_changed_is_read_again(tmp_path: Path) -> None:
    first = make(write_csv(tmp_path), split="all")
    assert make(str(tmp_path), split="train")._catalogue is first._catalogue
    write_csv(tmp_path, flipped(STARS, lambda u: True))
    later = (tmp_path / "ratings.csv").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "ratings.csv", ns=(later, later))
    second = make(tmp_path, split="all")
    one, two = (session(task, by_name(task, 1), 0)[0][0].scores for task in (first, second))
    assert (one != two).any()
