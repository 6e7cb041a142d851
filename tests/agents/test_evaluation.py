"""Evaluation: intervals over units, the same episodes for everybody, exact expectations."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import bootstrap

from agents.evaluation import Evaluation, evaluate, interval
from agents.report import _show_samples
from agents.rollout import collect, play
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.tasks.recommendation_clicks import RecommendationClicks

# --- intervals --------------------------------------------------------------------------------


def test_interval_is_the_percentile_bootstrap_of_scipy() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=60)  # skewed, so that it is no normal one
    low, high = interval(values, [str(i) for i in range(60)])
    expected = bootstrap(
        (values,), np.mean, n_resamples=50_000, batch=5_000, method="percentile"
    ).confidence_interval
    # The error of a 2.5 % quantile of 4,999 draws is about 0.013 widths here; 0.08 is 6 of them.
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.08 * width
    assert abs(high - expected.high) < 0.08 * width


def test_interval_of_many_values_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4_000)
    low, high = interval(values, [str(i) for i in range(4_000)])
    half = 1.96 * values.std() / np.sqrt(4_000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_copies_within_a_unit_are_no_new_evidence() -> None:
    values = np.random.default_rng(2).random(50)
    units = [f"unit {i}" for i in range(50)]
    alone = interval(values, units)
    copied = interval(np.tile(values, 9), units * 9)
    assert copied == pytest.approx(alone)
    # Taken for independent, nine copies would narrow the interval to a third.
    taken = interval(np.tile(values, 9), [str(i) for i in range(450)])
    assert (taken[1] - taken[0]) / (alone[1] - alone[0]) == pytest.approx(1 / 3, rel=0.15)


def test_units_of_different_sizes_weigh_by_their_episodes() -> None:
    # Unit a holds nine episodes of score 1, b one of 0; a resample is aa, ab (half) or bb.
    low, high = interval([1.0] * 9 + [0.0], ["a"] * 9 + ["b"])
    assert (low, high) == (0.0, 1.0)
    # The mean of a resample is over its episodes, however many these are, not over its units.
    values = [0.0] * 30 + [1.0] * 10
    units = ["big"] * 30 + [f"small {i}" for i in range(10)]
    low, high = interval(values, units)
    exact = sorted(_resampled_mean(values, units, seed) for seed in range(4_000))
    assert low == pytest.approx(exact[100], abs=0.03)
    assert high == pytest.approx(exact[3_900], abs=0.03)


def _resampled_mean(values: Sequence[float], units: Sequence[str], seed: int) -> float:
    """Resample units the long way: draw names, list their episodes, take the mean."""
    rng = np.random.default_rng((99, seed))
    names = sorted(set(units))
    drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
    return float(np.mean([v for d in drawn for v, u in zip(values, units, strict=True) if u == d]))


def test_intervals_cover_the_truth() -> None:
    """Of 300 seeded samples of 40 dependent clusters, intervals hold the true mean 0 in most.

    Percentile intervals of 40 units cover a little less than 95 %: 92 % or more. Fewer than 254 of
    300 then has probability below 1e-5. Were episodes taken for independent, they would cover
    about 60 %; 240 or more has probability below 1e-8.
    """
    rng = np.random.default_rng(20)
    held = naive = 0
    for _ in range(300):
        sizes = rng.integers(1, 9, size=40)
        units = np.repeat(np.arange(40), sizes)
        values = rng.normal(size=40)[units] + 0.5 * rng.normal(size=len(units))
        low, high = interval(values, [str(u) for u in units])
        held += low <= 0 <= high
        half = 1.96 * values.std() / np.sqrt(len(values))
        naive += abs(values.mean()) <= half
    assert held >= 254
    assert naive < 240


def test_interval_of_a_single_unit_is_its_mean() -> None:
    assert interval([0.25, 0.75], ["a", "a"]) == (0.5, 0.5)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from("abcde")), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
)
def test_interval_is_deterministic_ordered_and_blind_to_order(
    episodes: list[tuple[float, str]], shuffler: Any
) -> None:
    low, high = interval(*zip(*episodes, strict=True))
    values = [value for value, _ in episodes]
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert interval(*zip(*episodes, strict=True)) == (low, high)
    shuffler.shuffle(episodes)
    assert interval(*zip(*episodes, strict=True)) == pytest.approx((low, high))


def test_seeds_move_the_interval_a_little() -> None:
    values, units = np.random.default_rng(3).random(30), [str(i) for i in range(30)]
    one, other = interval(values, units, seed=1), interval(values, units, seed=2)
    assert one != other
    assert one == pytest.approx(other, abs=0.02)


# --- a toy task with steps that answer nothing ------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A number to double, asked ``turns`` times."""

    id: str
    unit: str
    number: int
    turns: int


class Doubling(WritingTask[Sum]):
    """Asks to double numbers; "search" is an unscored step that costs a tenth."""

    def __init__(self, split: str, episodes: int = 10, max_turns: int | None = None) -> None:
        super().__init__(max_turns)
        self.examples = tuple(
            Sum(f"{split}/{i}", f"unit {i // 2}", i, 1 + i % 3) for i in range(episodes)
        )

    def turns(self, example: Sum) -> int:
        return example.turns

    def ask(self, example: Sum, turn: int) -> str:
        return f"What is twice {example.number + turn}?"

    def answers(self, example: Sum, turn: int) -> tuple[str, ...]:
        return (str(2 * (example.number + turn)),)

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [
            Outcome(None, reward=-0.1, feedback="Found nothing.")
            if answer == "search"
            else Outcome(float(answer in accepted), {"exact": float(answer in accepted)})
            for answer, accepted in zip(answers, references, strict=True)
        ]


@pytest.fixture
def doubling() -> Iterator[str]:
    gym.register(
        "Doubling-v0",
        vector_entry_point="llm_envs.core.vector:TextVectorEnv",
        kwargs={"task": Doubling},
    )
    yield "Doubling-v0"
    del gym.registry["Doubling-v0"]


@dataclass
class Scripted:
    """Answers by a function of (observation, turn), and remembers what it saw."""

    answer: Any
    sequences: list[Any] = field(default_factory=list)
    cut: int = 0
    answers: int = 0
    seen: list[tuple[int, int, Any]] = field(default_factory=list)

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        self.seen += [(row, turn, o) for row, o in observations.items()]
        self.answers += len(observations)
        return {row: self.answer(o, turn) for row, o in observations.items()}


def double(observation: str, turn: int) -> str:
    return str(2 * int(observation.rsplit("twice ", 1)[1].split("?")[0]))


def test_each_example_is_played_exactly_once(doubling: str) -> None:
    for batch in (1, 4, 10, 128):
        found = evaluate(lambda: Scripted(double), doubling, split="test", batch=batch)
        assert found.ids == tuple(f"test/{i}" for i in range(10))
        assert found.units == tuple(f"unit {i // 2}" for i in range(10))
        turns = Counter(t["example_id"] for t in found.transcripts)
        assert turns == {f"test/{i}": 1 + i % 3 for i in range(10)}
        assert [t["split"] for t in found.transcripts] == ["test"] * len(found.transcripts)
        np.testing.assert_array_equal(found.scores, 1.0)


def test_some_episodes_are_spaced_evenly(doubling: str) -> None:
    found = evaluate(lambda: Scripted(double), doubling, split="test", episodes=4, batch=3)
    assert found.ids == ("test/0", "test/3", "test/6", "test/9")
    more = evaluate(lambda: Scripted(double), doubling, split="test", episodes=99)
    assert len(more.ids) == 10
    for wrong in ({"episodes": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="give 1 or more"):
            evaluate(lambda: Scripted(double), doubling, split="test", **wrong)


def test_examples_of_chance_are_played_several_times(
    doubling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = evaluate(lambda: Scripted(double), doubling, split="test")
    monkeypatch.setattr(Doubling, "episodes_per_example", 3)
    found = evaluate(lambda: Scripted(double), doubling, split="test", batch=7)
    assert found.ids == once.ids * 3
    assert found.units == once.units * 3
    few = evaluate(lambda: Scripted(double), doubling, split="test", episodes=4)
    assert len(set(few.ids)) == 4
    many = evaluate(lambda: Scripted(double), doubling, split="test", episodes=12)
    assert many.ids == (*once.ids, once.ids[0], once.ids[-1])
    assert set(Counter(many.ids).values()) == {1, 2}, "nobody is left out for another's third time"


def test_sessions_with_one_user_differ() -> None:
    seen: list[Scripted] = []

    def begin() -> Scripted:
        seen.append(Scripted(lambda observation, turn: 0))
        return seen[-1]

    found = evaluate(begin, "RecommendationClicks-v0", split="validation")
    users = len(found.ids) // RecommendationClicks.episodes_per_example
    assert found.ids == found.ids[:users] * RecommendationClicks.episodes_per_example
    offered = [o["candidates"] for s in seen for _, turn, o in s.seen if turn == 0]
    assert len(set(offered)) == len(found.ids)


def test_env_kwargs_reach_the_environment(doubling: str) -> None:
    found = evaluate(
        lambda: Scripted(double), doubling, split="test", env_kwargs={"episodes": 3, "max_turns": 1}
    )
    assert len(found.ids) == len(found.transcripts) == 3


def test_the_split_that_is_asked_for_is_played(doubling: str) -> None:
    found = evaluate(
        lambda: Scripted(double), doubling, split="test", env_kwargs={"split": "train"}
    )
    assert found.ids[0] == "test/0"


def test_an_episode_scores_the_mean_of_its_scored_steps(doubling: str) -> None:
    def searcher(observation: str, turn: int) -> str:
        return "search" if turn == 0 else double(observation, turn) if turn == 1 else "?"

    found = evaluate(lambda: Scripted(searcher), doubling, split="test")
    # One turn: nothing but a search. Two: search, right. Three: search, right, wrong.
    expected = np.array([(0.0, 1.0, 0.5)[i % 3] for i in range(10)])
    np.testing.assert_array_equal(found.scores, expected)
    np.testing.assert_array_equal(found.parts["exact"], expected)
    # A search is no answer, so it cannot lack the right one.
    np.testing.assert_array_equal(found.parts["contains"], expected)
    for turn in found.transcripts:
        assert (turn["score"] is None) == (turn["answer"] == "search") == (turn["turn"] == 0)


@pytest.mark.parametrize("env_id", ["DialogueQA-v0", "TextBattle-v0"])
def test_what_a_budget_cuts_off_counts_as_nothing(env_id: str) -> None:
    """Or it would pay to use the budget up once the best answers are given."""

    class Padding(Peeking):
        def __init__(self, padding: str) -> None:
            super().__init__(None)
            self.padding = padding

        def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
            answers = super().act(observations, turn)
            if turn:
                return dict.fromkeys(answers, "unknown")
            return {row: answer + self.padding for row, answer in answers.items()}

    def scores(padding: str) -> Any:
        return evaluate(
            lambda: Padding(padding),
            env_id,
            split="validation",
            episodes=40,
            env_kwargs={"budget": {"tokens": 12}, "answer_in_text": env_id == "TextBattle-v0"},
        )

    short, padded = scores(""), scores(" the" * 20)
    assert short.score > 0
    if env_id == "DialogueQA-v0":  # articles do not count, and the first answer is right
        turns = [len(e.turns) for e in gym.make(env_id, split="validation").unwrapped.task.examples]  # type: ignore[attr-defined]
        assert padded.score == pytest.approx(
            np.mean([1 / turns[i] for i in np.linspace(0, len(turns) - 1, 40).astype(int)])
        )
        assert padded.parts["contains"].mean() == pytest.approx(padded.score)
    assert (padded.scores <= short.scores + 1e-12).all()


def test_if_nothing_is_scored_the_result_is_zero(doubling: str) -> None:
    found = evaluate(lambda: Scripted(lambda o, t: "search"), doubling, split="test")
    assert found.score == 0.0
    assert found.parts == {}
    assert found.ci95 == (0.0, 0.0)


def test_parts_have_a_value_for_every_episode(doubling: str) -> None:
    found = evaluate(
        lambda: Scripted(lambda o, t: "search" if "twice 0" in o else double(o, t)),
        doubling,
        split="test",
    )
    for values in found.parts.values():
        assert len(values) == len(found.ids)
    np.testing.assert_array_equal(found.parts["exact"], found.scores)


def test_contains_tells_reading_from_form(doubling: str) -> None:
    verbose = evaluate(
        lambda: Scripted(lambda o, t: f"I think it is {double(o, t)}."), doubling, split="test"
    )
    assert verbose.score == 0.0
    assert verbose.part("contains") == 1.0
    inside = evaluate(lambda: Scripted(lambda o, t: f"1{double(o, t)}"), doubling, split="test")
    assert inside.part("contains") == 0.0


def test_summary_is_what_result_json_holds(doubling: str) -> None:
    found = evaluate(lambda: Scripted(double), doubling, split="validation")
    summary = json.loads(json.dumps(found.summary()))
    assert summary == {
        "split": "validation",
        "score": 1.0,
        "ci95": [1.0, 1.0],
        "episodes": 10,
        "parts": {"exact": 1.0, "contains": 1.0},
    }


# --- gains ------------------------------------------------------------------------------------


def evaluation(scores: Any, units: Sequence[str] | None = None) -> Evaluation:
    scores = np.asarray(scores, np.float64)
    ids = tuple(str(i) for i in range(len(scores)))
    return Evaluation("test", ids, tuple(units or ids), scores, {}, ())


def test_gains_are_paired() -> None:
    rng = np.random.default_rng(4)
    before = rng.random(80)
    after = before + 0.05 + 0.02 * rng.random(80)
    gain, low, high = evaluation(after).gain_over(evaluation(before))
    assert gain == pytest.approx((after - before).mean())
    assert low < gain < high
    # Unpaired, the spread of the episodes would drown the gain.
    assert evaluation(before).ci95[1] > evaluation(after).ci95[0]
    assert low > 0.05
    assert evaluation(before).gain_over(evaluation(after)) == pytest.approx((-gain, -high, -low))


def test_gains_are_drawn_over_units() -> None:
    gains = np.random.default_rng(5).normal(size=40)
    units = [f"unit {i // 8}" for i in range(40)]
    gain = evaluation(gains, units).gain_over(evaluation(np.zeros(40), units))
    assert gain[1:] == interval(gains, units)
    assert gain[1:] != interval(gains, [str(i) for i in range(40)])


def test_gains_over_other_episodes_are_refused(doubling: str) -> None:
    few, all_, other = (
        evaluate(lambda: Scripted(double), doubling, split=split, episodes=episodes)
        for split, episodes in (("test", 5), ("test", None), ("validation", None))
    )
    for one, two in itertools.permutations((few, all_, other), 2):
        with pytest.raises(ValueError, match="did not play the same episodes"):
            one.gain_over(two)
    reordered = replace(all_, ids=all_.ids[::-1])
    with pytest.raises(ValueError, match="did not play the same episodes"):
        all_.gain_over(reordered)


# --- choosing: the same episodes, exact expectations ------------------------------------------

CLICKS = "RecommendationClicks-v0"


def chances(observation: Any) -> Any:
    """Prefer films by their features: a policy that does not look at the history."""
    logits = 3.0 * observation["features"][:, :3].astype(np.float64).sum(axis=1)
    odds = np.exp(logits - logits.max())
    return odds / odds.sum()


class Preferring(Scripted):
    """Takes the choice of a script, and tells the chances it would have sampled from."""

    def __init__(self, script: Sequence[int]) -> None:
        super().__init__(lambda o, turn: script[turn])
        self.chosen_from: dict[tuple[int, int], Any] = {}

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        self.chosen_from |= {(row, turn): chances(o) for row, o in observations.items()}
        return super().act(observations, turn)


def test_everybody_meets_the_same_episodes() -> None:
    """What a session offers depends on neither the player nor the batch."""
    offers = []
    for script, batch in (((0, 0, 0, 0), 64), ((4, 3, 2, 1), 64), ((1, 1, 1, 1), 5)):
        players: list[Scripted] = []

        def begin(script: Any = script, players: Any = players) -> Scripted:
            players.append(Scripted(lambda o, turn: script[turn]))
            return players[-1]

        found = evaluate(begin, CLICKS, split="validation", episodes=12, batch=batch)
        offers.append([o["candidates"] for p in players for _, _, o in sorted_by_row(p.seen)])
        assert len(found.ids) == 12
    assert offers[0] == offers[1] == offers[2]
    assert len(set(offers[0])) == len(offers[0]) == 48


def sorted_by_row(seen: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    return sorted(seen, key=lambda entry: entry[:2])


def test_the_expected_score_is_exact() -> None:
    """Against the sum over all 25 ways to make two choices, each by its probability."""
    arguments = {"split": "validation", "episodes": 10, "env_kwargs": {"max_turns": 2}}
    expected = np.zeros(10)
    total = np.zeros(10)
    for script in itertools.product(range(5), repeat=2):
        players: list[Preferring] = []

        def begin(script: Any = script, players: Any = players) -> Preferring:
            players.append(Preferring(script))
            return players[-1]

        found = evaluate(begin, CLICKS, **arguments)
        [player] = players
        weights = [
            np.prod([player.chosen_from[row, turn][a] for turn, a in enumerate(script)])
            for row in range(10)
        ]
        total += weights
        expected += weights * found.scores
        told = found.parts["expected"]
    np.testing.assert_allclose(total, 1.0)
    np.testing.assert_allclose(told, expected)
    assert (found.parts["best"] >= told).all()
    assert len(set(told.round(6))) > 5


def test_without_probabilities_nothing_is_expected() -> None:
    found = evaluate(lambda: Scripted(lambda o, t: 0), CLICKS, split="validation", episodes=4)
    assert "expected" not in found.parts
    assert "best" in found.parts
    assert "contains" not in found.parts


# --- oracles ----------------------------------------------------------------------------------


class Peeking(Scripted):
    """Answers what it peeked at, and counts how often it was let."""

    peeked = 0

    def peek(self, envs: Any) -> None:
        self.peeked += 1
        self.right = [references[0] for references in envs.references]

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        self.answer = None
        self.answers += len(observations)
        return {row: self.right[row] for row in observations}


def test_oracles_peek_before_every_turn(doubling: str) -> None:
    players = []
    found = evaluate(lambda: players.append(Peeking(None)) or players[-1], doubling, split="test")
    assert players[0].peeked == 3
    assert found.score == 1.0


def test_nobody_peeks_in_training(doubling: str) -> None:
    envs = gym.make_vec(doubling, num_envs=4, split="train")
    for run in (collect, play):
        player = Peeking(None)
        with pytest.raises(AttributeError, match="right"):
            run(player, envs, seeds=range(4))
        assert player.peeked == 0


def test_samples_pair_episodes_whose_length_hangs_on_the_answers() -> None:
    def played(answers: dict[str, list[str]]) -> Evaluation:
        turns = [
            {
                "example_id": name,
                "turn": i,
                "question": f"{name} {i}?",
                "answer": said,
                "score": 0.5,
            }
            for name, episode in answers.items()
            for i, said in enumerate(episode)
        ]
        ids = tuple(answers)
        return Evaluation("validation", ids, ids, np.zeros(len(ids)), {}, tuple(turns))

    before = played({"a": ["one"], "b": ["two", "three"]})
    after = played({"a": ["four", "five"], "b": ["six"]})
    console = Console(width=80, record=True, file=io.StringIO())
    _show_samples(before, after, console, 2)
    told = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert told == [
        *("a", "user   a 0?", "before one  0.50", "after  four  0.50"),
        *("user   a 1?", "before (was over)", "after  five  0.50"),
        *("b", "user   b 0?", "before two  0.50", "after  six  0.50"),
        *("user   b 1?", "before three  0.50", "after  (was over)"),
    ]
