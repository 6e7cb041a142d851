"""Statistics over runs and environments: by hand, against scipy, and what must always hold.

Everything is seeded. Where a bound is one of Monte-Carlo error, the probability that another seed
would break it stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from benchmarks.statistics import (
    COVERAGE,
    Interval,
    Reached,
    area_under_curve,
    caveat,
    iqm,
    mean,
    normalised,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    reaching,
    steps_to_threshold,
    stratified_bootstrap,
    t_interval,
)

AGGREGATES = (mean, iqm, optimality_gap)

# Scores that are sums of powers of two, so that ties occur and sums are exact.
runs = st.lists(st.integers(-8, 24).map(lambda i: i / 16), min_size=1, max_size=7)
matrices = st.dictionaries(st.sampled_from("abcd"), runs, min_size=1)


def random_scores(seed: int, *counts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"env {i}": rng.gamma(2.0, 0.3, size=n) for i, n in enumerate(counts)}


# --- scores ---------------------------------------------------------------------------------------


@given(st.floats(-5, 5), st.floats(0.01, 5))
def test_random_is_0_and_the_oracle_1(low: float, width: float) -> None:
    high = low + width
    found = normalised([low, high, low - width, (low + high) / 2], low, high)
    assert found == pytest.approx([0.0, 1.0, -1.0, 0.5], abs=1e-9)
    assert found[:2].tolist() == [0.0, 1.0]


def test_normalised_keeps_the_shape() -> None:
    assert normalised([[0.2, 0.35], [0.5, 0.8]], 0.2, 0.5) == pytest.approx(
        np.array([[0.0, 0.5], [1.0, 2.0]])
    )


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.6, 0.5), (math.nan, 1), (0, math.inf)])
def test_an_oracle_that_is_not_better_than_random_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="oracle"):
        normalised([0.5], low, high)


# --- aggregates -----------------------------------------------------------------------------------


def test_the_mean_weighs_environments_equally() -> None:
    # (0.5 + (0.1 + 0.2 + 0.3 + 0.6) / 4) / 2 = (0.5 + 0.3) / 2
    assert mean({"a": [0.5], "b": [0.1, 0.2, 0.3, 0.6]}) == pytest.approx(0.4)


def test_the_interquartile_mean_by_hand() -> None:
    assert iqm({"a": [9.0, 1.0, 2.0, -7.0]}) == 1.5
    assert iqm({"a": [9.0, 1.0, 2.0, 3.0, -7.0]}) == 2.0  # one of five falls out a side
    assert iqm({"a": [9.0, 1.0, 2.0]}) == 4.0  # none of three does
    assert iqm({"a": [5.0]}) == 5.0
    assert iqm({"a": [9.0, 1.0], "b": [2.0, -7.0]}) == 1.5


@pytest.mark.parametrize("n", range(1, 14))
def test_the_interquartile_mean_is_the_trimmed_mean_of_scipy(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(5, n))
    expected = stats.trim_mean(values, 0.25, axis=-1)
    np.testing.assert_allclose(iqm({"a": values}), expected, atol=1e-12)
    halves = {"a": values[:, : n // 2], "b": values[:, n // 2 : n // 2 * 2]}
    if n > 1:
        expected = stats.trim_mean(values[:, : n // 2 * 2], 0.25, axis=-1)
        np.testing.assert_allclose(iqm(halves), expected, atol=1e-12)


def test_the_interquartile_mean_of_unequal_numbers_weighs_environments_equally() -> None:
    # The pool is 0 0 0 0 0 0 | 1 1 1 2 2 2: a quarter is three, so 0 0 0 1 1 1 are left.
    assert iqm({"a": [0.0], "b": [1.0, 2.0]}) == 0.5
    # The pool is 8 times 0, 9 times 1, 4 times 3, 3 times 5; without six a side 2, 9, 1 and 0.
    assert iqm({"a": [0.0, 0.0, 3.0], "b": [1.0, 1.0, 1.0, 5.0]}) == pytest.approx((9 + 3) / 12)
    found = random_scores(0, 2, 3, 5, 6)
    laid_out = np.concatenate([np.repeat(v, 30 // len(v)) for v in found.values()])
    assert iqm(found) == pytest.approx(stats.trim_mean(laid_out, 0.25), abs=1e-12)
    assert iqm(random_scores(1, 83, 89, 97, 101)) > 0  # which would be 4 · 72 million runs


def test_the_optimality_gap_by_hand() -> None:
    assert optimality_gap({"a": [0.5, 3.0], "b": [0.75]}) == pytest.approx(0.25)
    assert optimality_gap({"a": [0.5, 3.0], "b": [0.75]}, target=2.0) == pytest.approx(1.0)
    assert optimality_gap({"a": [1.0, 7.0]}) == 0.0


@pytest.mark.parametrize("statistic", AGGREGATES)
def test_resamples_stand_in_front(statistic: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    found = {"a": rng.random((6, 3)), "b": rng.random((6, 4))}
    one_by_one = [statistic({env: v[i] for env, v in found.items()}) for i in range(6)]
    np.testing.assert_allclose(statistic(found), one_by_one, atol=1e-15)


@given(matrices, st.randoms(use_true_random=False))
def test_neither_the_order_of_runs_nor_of_environments_matters(
    scores: dict[str, list[float]], random: Any
) -> None:
    names = list(scores)
    random.shuffle(names)
    shuffled = {name: random.sample(scores[name], len(scores[name])) for name in names}
    for statistic in AGGREGATES:
        assert statistic(shuffled) == pytest.approx(statistic(scores), abs=1e-12)
        one = stratified_bootstrap(statistic, scores, resamples=20)
        other = stratified_bootstrap(statistic, shuffled, resamples=20)
        for bound in ("low", "high"):
            expected = pytest.approx(getattr(one, bound), abs=1e-12, nan_ok=True)
            assert getattr(other, bound) == expected


@given(matrices, st.integers(0, 3), st.integers(1, 16))
def test_a_better_run_makes_no_aggregate_worse(
    scores: dict[str, list[float]], which: int, by: int
) -> None:
    env = sorted(scores)[which % len(scores)]
    better = {**scores, env: [scores[env][0] + by / 16, *scores[env][1:]]}
    assert mean(better) > mean(scores)
    assert iqm(better) >= iqm(scores) - 1e-12
    assert optimality_gap(better) <= optimality_gap(scores) + 1e-12
    assert probability_of_improvement(better, scores) >= 0.5


@given(matrices)
def test_aggregates_lie_between_the_worst_and_the_best_run(
    scores: dict[str, list[float]],
) -> None:
    pool = [s for values in scores.values() for s in values]
    for statistic in (mean, iqm):
        assert min(pool) - 1e-12 <= statistic(scores) <= max(pool) + 1e-12
    assert optimality_gap(scores) >= 0


# --- probability of improvement -------------------------------------------------------------------


def test_the_probability_of_improvement_by_hand() -> None:
    # Of (3, 1) against (2, 1, 0): 3 beats three; 1 loses, draws and wins. (3 + 0 + ½ + 1) / 6
    assert probability_of_improvement({"a": [3, 1]}, {"a": [2, 1, 0]}) == pytest.approx(0.75)
    a, b = {"a": [3, 1], "b": [0]}, {"b": [9], "a": [2, 1, 0]}
    assert probability_of_improvement(a, b) == pytest.approx(0.375)


@given(runs, runs)
def test_the_probability_of_improvement_is_the_u_statistic(x: list[float], y: list[float]) -> None:
    u = stats.mannwhitneyu(x, y, method="asymptotic").statistic
    found = probability_of_improvement({"a": x}, {"a": y})
    assert found == pytest.approx(u / (len(x) * len(y)), abs=1e-12)


@given(matrices, matrices)
def test_to_improve_and_to_be_improved_upon_sum_to_1(
    a: dict[str, list[float]], b: dict[str, list[float]]
) -> None:
    b = {env: b.get(env, [0.5]) for env in a}
    there, back = probability_of_improvement(a, b), probability_of_improvement(b, a)
    assert there + back == pytest.approx(1.0)
    assert 0 <= there <= 1
    assert probability_of_improvement(a, a) == pytest.approx(0.5)


def test_other_environments_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="only one of them has b, c"):
        probability_of_improvement({"a": [1], "b": [1]}, {"a": [1], "c": [1]})


# --- intervals ------------------------------------------------------------------------------------


def close(found: Interval, expected: Any, *, resamples: int) -> None:
    """Assert that the bounds are those that scipy finds with ten times as many resamples.

    A q-quantile of B draws of a normal has the error √(q(1-q)/B) / φ(z_q) standard deviations:
    2.67 / √B at q = 0.025. With ten times as many for the other it is 2.8 / √B, of an interval of
    3.92 deviations. Five times that is allowed: a bound fails by chance once in two million.
    """
    low, high = expected.confidence_interval
    allowed = 5 * 2.8 / math.sqrt(resamples) / 3.92 * (high - low)
    assert found.low == pytest.approx(low, abs=allowed)
    assert found.high == pytest.approx(high, abs=allowed)


def scipy_bootstrap(samples: list[np.ndarray], statistic: Callable[..., Any]) -> Any:
    return stats.bootstrap(
        samples, statistic, n_resamples=100_000, batch=5_000, method="percentile",
        rng=np.random.default_rng(7), vectorized=True,
    )  # fmt: skip


@pytest.mark.parametrize("statistic", AGGREGATES)
def test_intervals_are_those_of_scipy(statistic: Callable[..., Any]) -> None:
    # Independent samples of scipy are resampled each by itself: strata.
    scores = random_scores(3, 12, 9, 15)

    def of_samples(*samples: np.ndarray, axis: int) -> Any:
        assert axis == -1
        return statistic(dict(zip(scores, samples, strict=True)))

    expected = scipy_bootstrap(list(scores.values()), of_samples)
    close(stratified_bootstrap(statistic, scores, resamples=10_000), expected, resamples=10_000)


def test_the_interval_of_the_probability_of_improvement_is_that_of_scipy() -> None:
    a, b = random_scores(3, 24, 30), random_scores(4, 33, 28)

    def of_samples(w: Any, x: Any, y: Any, z: Any, axis: int) -> Any:
        assert axis == -1
        return probability_of_improvement({"0": w, "1": x}, {"0": y, "1": z})

    expected = scipy_bootstrap([*a.values(), *b.values()], of_samples)
    found = stratified_bootstrap(probability_of_improvement, a, b, resamples=10_000)
    close(found, expected, resamples=10_000)
    assert found.value == probability_of_improvement(a, b)
    assert found.runs == 24


def test_environments_are_resampled_each_by_itself() -> None:
    # Nothing varies within an environment: resampling across them would give an interval.
    found = stratified_bootstrap(mean, {"a": [0.0] * 5, "b": [1.0] * 3})
    assert found == Interval(0.5, 0.5, 0.5, runs=3)
    # Two equal environments are no paired one: the variance of their mean is half of one's.
    values = np.random.default_rng(0).normal(size=40)
    one = stratified_bootstrap(mean, {"a": values}, resamples=20_000)
    two = stratified_bootstrap(mean, {"a": values, "b": values}, resamples=20_000)
    ratio = (two.high - two.low) / (one.high - one.low)
    assert ratio == pytest.approx(
        math.sqrt(0.5), rel=0.05
    )  # 5 standard errors: once in two million


def test_two_runs_give_an_interval_from_one_to_the_other() -> None:
    assert stratified_bootstrap(mean, {"a": [0.2, 0.6]}) == Interval(0.4, 0.2, 0.6, 2)
    # Resamples have the mean 0.2, 0.4 and 0.6 in ¼, ½ and ¼ of cases. (Not once in 10^6.)
    assert stratified_bootstrap(mean, {"a": [0.2, 0.6]}, level=0.4) == Interval(0.4, 0.4, 0.4, 2)


def test_the_seed_decides() -> None:
    scores = random_scores(5, 6, 7)
    first = stratified_bootstrap(iqm, scores, seed=1)
    assert stratified_bootstrap(iqm, scores, seed=1) == first
    assert stratified_bootstrap(iqm, scores, seed=2) != first
    assert stratified_bootstrap(iqm, scores, seed=2).value == first.value
    assert stratified_bootstrap(iqm, scores, seed=1, resamples=1_999) != first
    profile = performance_profile(scores, [0.5], seed=1)
    assert performance_profile(scores, [0.5], seed=1).low == profile.low


def test_a_single_run_has_no_interval() -> None:
    scores = {"a": [0.3], "b": [0.1, 0.5]}
    found = stratified_bootstrap(mean, scores)
    assert (found.value, found.runs) == (pytest.approx(0.3), 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    profile = performance_profile(scores, [0.2, 0.4])
    assert profile.values.tolist() == [0.75, 0.25]
    assert np.isnan([profile.low, profile.high]).all()
    assert profile.low.shape == profile.high.shape == (2,)
    alone = t_interval([0.3])
    assert (alone.value, alone.runs) == (0.3, 1)
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


def test_equal_runs_have_an_interval_without_width() -> None:
    scores = {"a": [0.3] * 4, "b": [0.7] * 4}
    for statistic in AGGREGATES:
        found = stratified_bootstrap(statistic, scores)
        assert [found.low, found.high] == pytest.approx([found.value] * 2, abs=1e-12)
    found = stratified_bootstrap(probability_of_improvement, scores, scores)
    assert found == Interval(0.5, 0.5, 0.5, 4)
    assert t_interval([0.25] * 4) == Interval(0.25, 0.25, 0.25, 4)


def test_many_runs_are_resampled_in_batches() -> None:
    # Of 300,000 runs three resamples go into a batch; the mean of a fair coin is ± 1.96 · ½ / √n.
    coin = np.arange(300_000) % 2
    found = stratified_bootstrap(mean, {"a": coin}, resamples=100)
    half = 1.96 * 0.5 / math.sqrt(300_000)
    # 5 standard errors of a bound of 100 resamples, 0.267 deviations each: once in 10^6.
    assert found.low == pytest.approx(0.5 - half, abs=5 * 0.267 / 1.96 * half)
    assert found.high == pytest.approx(0.5 + half, abs=5 * 0.267 / 1.96 * half)
    assert found.low < 0.5 < found.high


def test_the_t_interval_by_hand_and_of_scipy() -> None:
    # 4.3027 (97.5 % of Student's t, 2 degrees of freedom) · 0.1 / √3 = 0.2484
    found = t_interval([0.1, 0.2, 0.3])
    assert (found.value, found.runs) == (pytest.approx(0.2), 3)
    assert [found.low, found.high] == pytest.approx([-0.0484, 0.4484], abs=5e-5)
    values = np.random.default_rng(0).normal(size=11)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.8)
    found = t_interval(values, level=0.8)
    assert [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1e-12)


# --- performance profiles -------------------------------------------------------------------------


def test_the_profile_by_hand() -> None:
    found = performance_profile({"a": [0.5], "b": [0.2, 0.5, 0.8, 0.9]}, [0.0, 0.2, 0.5, 0.85, 1.0])
    # A run at the threshold is not above it. (1 + ¾) / 2, (0 + ½) / 2, (0 + ¼) / 2
    assert found.values.tolist() == [1.0, 0.875, 0.25, 0.125, 0.0]
    assert found.thresholds.tolist() == [0.0, 0.2, 0.5, 0.85, 1.0]
    assert found.runs == 1


@given(matrices)
def test_the_profile_falls_from_1_to_0_and_lies_in_its_band(
    scores: dict[str, list[float]],
) -> None:
    scores = {env: [*values, 0.0] for env, values in scores.items()}  # two runs or more
    found = performance_profile(scores, np.linspace(-1, 2, 13), resamples=50)
    for line in (found.values, found.low, found.high):
        assert (np.diff(line) <= 1e-12).all()
        assert (line[0], line[-1]) == (1.0, 0.0)
    assert (found.low <= found.high).all()


def test_the_band_is_the_interval_of_the_share() -> None:
    scores = random_scores(6, 8, 10)
    found = performance_profile(scores, [0.4, 0.6], seed=3, level=0.8)
    for i, tau in enumerate((0.4, 0.6)):
        above = {env: values > tau for env, values in scores.items()}
        expected = stratified_bootstrap(mean, above, seed=3, level=0.8)
        one = Interval(found.values[i], found.low[i], found.high[i], found.runs)
        assert one == expected
        assert one.low < one.value < one.high


# --- too few seeds --------------------------------------------------------------------------------


def test_too_few_runs_are_said() -> None:
    assert caveat(0).startswith("0 runs: there is no interval")
    assert caveat(1).startswith("1 run: there is no interval")
    assert caveat(3).startswith("3 runs are too few")
    assert "75% of the time" in caveat(3)
    assert all(caveat(n) for n in range(10))
    assert caveat(10) == caveat(1_000) == ""
    assert list(COVERAGE.values()) == sorted(COVERAGE.values())


@pytest.mark.parametrize(
    "n",
    [n if n in (2, 3, 9) else pytest.param(n, marks=pytest.mark.slow) for n in sorted(COVERAGE)],
)
def test_the_coverage_that_is_told_is_the_true_one(n: int) -> None:
    def interval_of(x: np.ndarray, seed: int) -> Interval:
        # Of one seed all would have the same luck with their resamples.
        return stratified_bootstrap(mean, {"a": x}, resamples=1_000, seed=seed)

    experiments = np.random.default_rng(n).normal(size=(1_000, n))
    boot = [interval_of(x, i) for i, x in enumerate(experiments)]
    held = np.mean([i.low <= 0 <= i.high for i in boot])
    # Standard error at most 0.016; 4 of them: fails by chance once in 16,000.
    error = math.sqrt(COVERAGE[n] * (1 - COVERAGE[n]) / 1_000)
    assert held == pytest.approx(COVERAGE[n], abs=4 * error)
    student = np.mean([i.low <= 0 <= i.high for i in map(t_interval, experiments)])
    assert student == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 1_000))


# --- sample efficiency ----------------------------------------------------------------------------


def test_the_first_step_at_the_threshold() -> None:
    steps, scores = [0, 256, 512, 768], [0.1, 0.4, 0.3, 0.5]
    assert steps_to_threshold(steps, scores, 0.4) == 256  # at it is enough, and later is no matter
    assert steps_to_threshold(steps, scores, 0.45) == 768
    assert steps_to_threshold(steps, scores, 0.05) == 0
    assert steps_to_threshold(steps, scores, 0.51) is None
    assert isinstance(steps_to_threshold(np.array(steps), scores, 0.4), int)


@pytest.mark.filterwarnings("error")
def test_runs_that_never_reach_it_are_later_than_any() -> None:
    assert reaching([512, None, 256]) == Reached(runs=3, reached=2, median=512)
    assert reaching([512, None, 256, None]) == Reached(4, 2, math.inf)
    assert reaching([None, None]) == Reached(2, 0, math.inf)
    assert reaching([0, 256]) == Reached(2, 2, 128)
    with pytest.raises(ValueError, match="no run"):
        reaching([])


def test_the_area_under_the_curve_by_hand() -> None:
    # (100 · 0.5 + 300 · 1) / 400; cut at 200: (100 · 0.5 + 100 · 1) / 200
    assert area_under_curve([0, 100, 400], [0.0, 1.0, 1.0], 400) == pytest.approx(0.875)
    assert area_under_curve([0, 100, 400], [0.0, 1.0, 1.0], 200) == pytest.approx(0.75)
    assert area_under_curve([0, 100, 400], [0.0, 1.0, 1.0], 100) == pytest.approx(0.5)
    assert area_under_curve([0, 100, 400], [0.0, 1.0, 1.0], 50) == pytest.approx(0.25)
    assert area_under_curve([50, 150], [0.2, 0.4], 150) == pytest.approx(0.3)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9), st.floats(0.01, 1))
def test_the_area_is_a_mean_that_rises_with_the_curve(scores: list[float], share: float) -> None:
    steps = 64 * np.arange(len(scores))
    found = area_under_curve(steps, scores, share * steps[-1])
    assert min(scores) - 1e-9 <= found <= max(scores) + 1e-9
    better = area_under_curve(steps, [s + 0.5 for s in scores], share * steps[-1])
    assert better == pytest.approx(found + 0.5)


@pytest.mark.parametrize("budget", [0, -1, 401, math.nan])
def test_nothing_is_extrapolated(budget: float) -> None:
    with pytest.raises(ValueError, match="goes from step 0 to 400"):
        area_under_curve([0, 100, 400], [0.0, 1.0, 1.0], budget)


@pytest.mark.parametrize(
    ("steps", "scores", "cause"),
    [
        ([], [], "shape"),
        ([0, 1], [0.5], "shape"),
        ([[0, 1]], [[0.5, 0.6]], "shape"),
        ([0, 1], [0.5, math.nan], "not finite"),
        ([0, math.inf], [0.5, 0.5], "not finite"),
        ([0, 2, 1], [0.5, 0.5, 0.5], "do not rise"),
        ([0, 1, 1], [0.5, 0.5, 0.5], "do not rise"),
    ],
)
def test_what_is_no_curve_is_refused(steps: Any, scores: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        steps_to_threshold(steps, scores, 0.5)
    with pytest.raises(ValueError, match=cause):
        area_under_curve(steps, scores, 1)


def test_a_threshold_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold is nan"):
        steps_to_threshold([0], [0.5], math.nan)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "cause"),
    [
        ({}, "no environment"),
        ({"a": [0.5], "b": []}, "b has no runs"),
        ({"a": 0.5}, "a has no runs"),
        ({"a": [0.5], "b": [0.5, math.nan]}, "A score of b is not finite"),
        ({"a": [math.inf]}, "A score of a is not finite"),
    ],
)
def test_what_are_no_scores_is_refused(scores: Any, cause: str) -> None:
    for call in (
        *AGGREGATES,
        lambda s: probability_of_improvement(s, s),
        lambda s: stratified_bootstrap(mean, s),
        lambda s: performance_profile(s, [0.5]),
    ):
        with pytest.raises(ValueError, match=cause):
            call(scores)


def test_other_refusals() -> None:
    scores = {"a": [0.1, 0.2]}
    for values in ([], [0.1, math.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="sample"):
            t_interval(values)
    with pytest.raises(ValueError, match="one number a run"):
        stratified_bootstrap(mean, {"a": [[0.1, 0.2]]})
    with pytest.raises(ValueError, match="resamples is 0"):
        stratified_bootstrap(mean, scores, resamples=0)
    for level in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="level is"):
            stratified_bootstrap(mean, scores, level=level)
        with pytest.raises(ValueError, match="level is"):
            t_interval([0.1, 0.2], level=level)
    with pytest.raises(ValueError, match="reduce the last axis"):
        stratified_bootstrap(lambda s: np.mean(s["a"]), scores)
    for thresholds in (0.5, [[0.5]], [0.5, math.nan]):
        with pytest.raises(ValueError, match="list of finite numbers"):
            performance_profile(scores, thresholds)
