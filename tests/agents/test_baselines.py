"""Linear bandits against the textbook: one sample at a time, least squares, exact chances."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare, norm

from agents.baselines import RandomPlayer, random_span
from agents.rollout import episode_seeds, play
from llm_envs.core.task import ChoosingTask, Episode, Outcome
from three_tokens import Wanted, make_agent, registered

WEIGHTS = np.array([0.6, 0.05, 0.2, 0.1])  # of three features and 1: a chance of success


class Clicks(ChoosingTask[Wanted]):
    """Four candidates with three features; what is chosen succeeds with a linear chance."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(4, 3)
        self.examples = tuple(Wanted(f"{split} {i}", "a") for i in range(50))

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        features = rng.random((4, 3)).astype(np.float32)
        seen = {"prompt": example.id, "candidates": tuple("abcd"), "features": features}
        return Episode(example, rng, seen, state=rng.random())

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(float(e.state < chances(e.observation["features"])[a]))
            for e, a in zip(episodes, actions, strict=True)
        ]

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        episode.finished = episode.turn == 2
        features = episode.rng.random((4, 3)).astype(np.float32)
        episode.observation = {**episode.observation, "features": features}
        episode.state = episode.rng.random()


def chances(features: np.ndarray) -> np.ndarray:
    found: np.ndarray = features @ WEIGHTS[:3] + WEIGHTS[3]
    return found


@pytest.fixture(scope="module", autouse=True)
def _clicks(three_token_tasks: None) -> Iterator[None]:
    with registered({"Clicks-v9": Clicks}):
        yield


def make(name: str, seed: int = 0, **settings: Any) -> Any:
    return make_agent("Clicks-v9", agent=name, seed=seed, episodes=8, **settings)


def trained(name: str, steps: int = 240, **settings: Any) -> Any:
    return make(name, **settings).learn(steps)


class Textbook:
    """Ridge regression, a sample at a time: A⁻¹ by the formula of Sherman and Morrison."""

    def __init__(self, width: int, ridge: float) -> None:
        self.inverse = np.eye(width) / ridge
        self.b = np.zeros(width)
        self.samples: list[tuple[np.ndarray, float]] = []

    def add(self, x: np.ndarray, reward: float) -> None:
        ax = self.inverse @ x
        self.inverse -= np.outer(ax, ax) / (1 + x @ ax)
        self.b += reward * x
        self.samples.append((x, reward))

    def least_squares(self, ridge: float) -> np.ndarray:
        """The same by numpy, with the prior as further samples."""
        width = len(self.b)
        rows = [*(x for x, _ in self.samples), *np.sqrt(ridge) * np.eye(width)]
        targets = [*(r for _, r in self.samples), *np.zeros(width)]
        found: np.ndarray = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        return found


@pytest.mark.parametrize(("ridge", "alpha"), [(1.0, 0.5), (0.1, 2.0), (5.0, 0.0)])
def test_linucb_is_the_textbook_one(ridge: float, alpha: float) -> None:
    """Every choice of a run: the highest θ·x + α √(xᵀ A⁻¹ x)."""
    agent = make("linucb", ridge=ridge, exploration=alpha)
    book = Textbook(4, ridge)
    for iteration in range(6):
        seeds = episode_seeds(agent.seed, iteration, 8, 1)
        steps = play(agent.player(False), agent.envs, seeds=seeds)
        assert len(steps) == 16
        theta = book.least_squares(ridge)
        np.testing.assert_allclose(book.inverse @ book.b, theta, atol=1e-9)
        for step in steps:
            bounds = []
            for features in step.observation["features"]:
                x = np.array([*map(float, features), 1.0])
                bounds.append(theta @ x + alpha * np.sqrt(x @ book.inverse @ x))
            assert step.action == max(range(4), key=bounds.__getitem__)
        for step in steps:
            chosen = step.observation["features"][step.action]
            book.add(np.array([*map(float, chosen), 1.0]), step.reward)
        agent.learn_from(steps)
        agent.iteration += 1
        np.testing.assert_allclose(np.linalg.inv(agent.precision), book.inverse, atol=1e-9)
        np.testing.assert_allclose(agent.moment, book.b, atol=1e-9)
    best, _ = agent.predict(steps[0].observation)
    x = np.c_[steps[0].observation["features"], np.ones(4)]
    assert best == int((x @ book.least_squares(ridge)).argmax())


def test_learning_is_one_batch_after_the_other() -> None:
    agent = trained("linucb", 64)
    assert (agent.iteration, agent.env_steps) == (4, 64)
    assert np.trace(agent.precision) > 4 + 64  # each sample adds its squares and a 1
    other = make("linucb")
    rewards = [other.iterate()["rollout/reward"] for _ in range(4)]
    assert np.array_equal(agent.precision, other.precision)
    assert np.array_equal(agent.moment, other.moment)
    assert agent.moment[3] == pytest.approx(16 * sum(rewards))  # of the 1: the rewards' sum


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_thompsons_weights_have_the_posteriors_mean_and_covariance(scale: float) -> None:
    """20,000 draws; each of 14 figures within 4.5 standard errors: chance of failing 10^-4."""
    agent = trained("thompson", 64, exploration=scale)
    covariance = np.linalg.inv(agent.precision)
    rng = np.random.default_rng(1)
    # On the unit vectors, the bonus is the drawn weights themselves, less their mean.
    drawn = np.array([agent.optimism(np.eye(4), covariance, rng) for _ in range(20_000)])
    expected = scale**2 * covariance
    deviations = np.sqrt(np.diag(expected))
    assert (np.abs(drawn.mean(0)) < 4.5 * deviations / np.sqrt(len(drawn))).all()
    # Var of a sample covariance: (σ_ii σ_jj + σ_ij²) / n.
    found = drawn.T @ drawn / len(drawn)
    error = np.sqrt((np.outer(deviations, deviations) ** 2 + expected**2) / len(drawn))
    assert (np.abs(found - expected) < 4.5 * error).all()


def test_thompson_chooses_with_the_chance_that_a_candidate_is_the_best() -> None:
    """Of two candidates, exactly; 4,000 choices, each with a draw of its own."""
    agent = trained("thompson", 64, exploration=2.0)
    player = agent.player(False)
    rng = np.random.default_rng(2)
    features = rng.random((2, 3)).astype(np.float32)
    observation = {"prompt": "", "candidates": ("a", "b"), "features": features}
    covariance = np.linalg.inv(agent.precision)
    mean = covariance @ agent.moment
    difference = np.r_[features[0] - features[1], 0.0].astype(np.float64)
    spread = 2.0 * np.sqrt(difference @ covariance @ difference)
    chance = norm.cdf(difference @ mean / spread)
    assert 0.1 < chance < 0.9
    actions = [player.act({0: observation}, 0)[0] for _ in range(4_000)]
    assert binomtest(actions.count(0), 4_000, chance).pvalue > 1e-4
    greedy = agent.player(True)
    assert {greedy.act({0: observation}, 0)[0] for _ in range(50)} == {int(chance < 0.5)}


@pytest.mark.parametrize("name", ["linucb", "thompson"])
@pytest.mark.parametrize("seed", range(3))
def test_p28_they_learn_a_linear_task(name: str, seed: int) -> None:
    """Regret of the greedy choice in chance of success; picking at random has 0.2."""
    agent = trained(name, 800, seed=seed)
    rng = np.random.default_rng(3)
    regrets = []
    for _ in range(500):
        features = rng.random((4, 3)).astype(np.float32)
        seen = {"prompt": "", "candidates": tuple("abcd"), "features": features}
        action, _ = agent.predict(seen)
        regrets.append(chances(features).max() - chances(features)[action])
    assert np.mean(regrets) < 0.03
    # And it explores less and less: the later batches earn more than the first.
    later = make(name, seed=seed)
    rewards = [later.iterate()["rollout/reward"] for _ in range(50)]
    assert np.mean(rewards[-25:]) > np.mean([make("random", s).iterate()["rollout/reward"]
                                             for s in range(25)]) + 0.15  # fmt: skip


def test_bandits_refuse_what_they_cannot_play() -> None:
    for name in ("linucb", "thompson"):
        with pytest.raises(ValueError, match=r"writing task.*numeric features.*reinforce"):
            make_agent("Identity-v9", agent=name)
    with pytest.raises(ValueError, match=r"ridge is 0.0"):
        make("linucb", ridge=0.0)
    with pytest.raises(ValueError, match="exploration is -1"):
        make("thompson", exploration=-1.0)
    with pytest.raises(ValueError, match="episodes is 0"):
        make_agent("Clicks-v9", agent="random", episodes=0)


def test_chance_is_uniform_and_depends_on_seed_and_observation_alone() -> None:
    """2,000 different questions; a fair player fails with chance 10^-4 over seeds."""
    asked = [
        {"prompt": str(i), "candidates": tuple("abcd"), "features": np.zeros((4, 3))}
        for i in range(2_000)
    ]
    actions = RandomPlayer(5).act(dict(enumerate(asked)), 0)
    counts = np.bincount(list(actions.values()), minlength=4)
    assert chisquare(counts).pvalue > 1e-4
    backwards = RandomPlayer(5)
    for i in reversed(range(2_000)):
        assert backwards.act({7: asked[i]}, 3)[7] == actions[i]
    assert RandomPlayer(6).act(dict(enumerate(asked)), 0) != actions
    assert make("random", seed=5).predict(asked[9])[0] == actions[9]


def test_a_random_answer_is_a_span_of_the_words_that_were_said() -> None:
    """Length first, then place, each uniform: "a b c" has 3 + 2 + 1 spans."""
    import random

    rng = random.Random(1)
    spans = [random_span("User: a b c\nAssistant:", rng) for _ in range(9_000)]
    names = ["a", "b", "c", "a b", "b c", "a b c"]
    expected = [1_000] * 3 + [1_500] * 2 + [3_000]
    assert chisquare([spans.count(n) for n in names], expected).pvalue > 1e-4
