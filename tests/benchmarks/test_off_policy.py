"""Off-policy estimators against exact expectations, against each other, and against obp."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import off_policy
from benchmarks.off_policy import (
    Options,
    click_model,
    direct_method,
    doubly_robust,
    effective_size,
    estimates,
    evaluate,
    frequencies,
    importance_weights,
    ips,
    snips,
    support,
    uniform,
)
from llm_envs.datasets.open_bandit import LoggedBandit

CONTEXT = np.array([0.3, 0.7])  # probability of each of two contexts
LOGGED = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
TARGET = np.array([[0.1, 0.8, 0.1], [0.6, 0.3, 0.1]])
CLICK = np.array([[0.2, 0.5, 0.9], [0.4, 0.3, 0.1]])
VALUE = float((CONTEXT[:, None] * TARGET * CLICK).sum())


def everything() -> tuple[Any, ...]:
    """Every impression that can be logged: its probability, context, action and click."""
    rows = list(product(range(2), range(3), (0.0, 1.0)))
    x, a, r = (np.array(column) for column in zip(*rows, strict=True))
    chance = CONTEXT[x] * LOGGED[x, a] * np.where(r == 1, CLICK[x, a], 1 - CLICK[x, a])
    return chance, x, a, r


@pytest.fixture
def exact() -> tuple[Any, ...]:
    chance, x, a, r = everything()
    return chance, x, a, r, importance_weights(TARGET[x], a, LOGGED[x, a])


def test_ips_is_unbiased(exact: tuple[Any, ...]) -> None:
    chance, _, _, r, w = exact
    assert chance @ ips(w, r) == pytest.approx(VALUE, abs=1e-12)
    assert chance @ w == pytest.approx(1, abs=1e-12)


def test_dr_is_unbiased_whatever_its_model_says(exact: tuple[Any, ...]) -> None:
    chance, x, a, r, w = exact
    wrong = np.array([[0.9, 0.0, 0.3], [0.2, 0.7, 0.5]])
    assert chance @ doubly_robust(w, r, a, TARGET[x], wrong[x]) == pytest.approx(VALUE, abs=1e-12)
    assert chance @ direct_method(TARGET[x], wrong[x]) != pytest.approx(VALUE, abs=0.01)


def test_dr_and_dm_are_right_with_the_true_model_and_wrong_propensities(
    exact: tuple[Any, ...],
) -> None:
    chance, x, a, r, _ = exact
    wrong = importance_weights(TARGET[x], a, np.full(len(a), 0.4))
    assert chance @ ips(wrong, r) != pytest.approx(VALUE, abs=0.01)
    assert chance @ doubly_robust(wrong, r, a, TARGET[x], CLICK[x]) == pytest.approx(VALUE)
    assert chance @ direct_method(TARGET[x], CLICK[x]) == pytest.approx(VALUE)


def test_dr_is_dm_where_the_model_misses_nothing(exact: tuple[Any, ...]) -> None:
    _, x, a, _, w = exact
    found = doubly_robust(w, CLICK[x, a], a, TARGET[x], CLICK[x])
    assert found == pytest.approx(direct_method(TARGET[x], CLICK[x]))


def test_snips_moves_with_a_shift_of_rewards_and_ips_does_not(exact: tuple[Any, ...]) -> None:
    _, _, _, r, w = exact
    assert snips(w, r + 5).mean() == pytest.approx(snips(w, r).mean() + 5)
    assert ips(w, r + 5).mean() != pytest.approx(ips(w, r).mean() + 5, abs=0.01)


def test_effective_size_lies_between_one_and_all() -> None:
    assert effective_size(np.full(50, 0.2)) == pytest.approx(50)
    assert effective_size(np.array([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert effective_size(np.zeros(3)) == 0
    weights = np.random.default_rng(0).exponential(size=200)
    assert 1 < effective_size(weights) < 200


@pytest.mark.parametrize(
    ("target", "propensities", "message"),
    [
        (np.full((4, 3), 0.3), np.full(4, 0.5), "no distribution"),
        (np.array([[1.5, -0.5, 0.0]] * 4), np.full(4, 0.5), "no distribution"),
        (np.full((4, 3), 1 / 3), np.array([0.5, 0.0, 0.5, 0.5]), "not in"),
        (np.full((5, 3), 1 / 3), np.full(4, 0.5), "Give one of each a row"),
    ],
)
def test_what_is_no_policy_is_refused(target: Any, propensities: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        importance_weights(target, np.zeros(4, np.int64), propensities)


@pytest.mark.parametrize("action", [-1, 3])
def test_an_action_that_the_policy_does_not_know_is_refused(action: int) -> None:
    with pytest.raises(ValueError, match=r"not in \[0, 3\)"):
        importance_weights(np.full((1, 3), 1 / 3), np.array([action]), np.ones(1))


# --- with a log ----------------------------------------------------------------------------------


def logged(n: int = 20_000, seed: int = 0) -> tuple[LoggedBandit, Any]:
    """A log of the bandit above whose users tell the context; and its target policy."""
    rng = np.random.default_rng(seed)
    x = rng.choice(2, n, p=CONTEXT)
    a = np.array([rng.choice(3, p=LOGGED[i]) for i in x])
    log = LoggedBandit(
        actions=a,
        positions=np.zeros(n, np.int64),
        clicks=(rng.random(n) < CLICK[x, a]).astype(float),
        propensities=LOGGED[x, a],
        users=x[:, None].astype(float),
        items=np.eye(3)[:, 1:],
    )
    return log, TARGET[x]


def test_estimates_are_near_the_truth_and_their_intervals_shrink_with_the_log() -> None:
    log, target = logged()
    model = click_model(log)
    found = {e.name: e for e in estimates(log, target, model)}
    assert set(found) == {"IPS", "SNIPS", "DM", "DR"}
    for name in ("IPS", "SNIPS", "DR"):
        e = found[name]
        assert e.low < e.value < e.high
        # The width is four standard errors: a log of 10,000 is further off. This one is seeded.
        assert abs(e.value - VALUE) < e.high - e.low
    weights = importance_weights(target, log.actions, log.propensities)
    assert found["SNIPS"].value == pytest.approx(snips(weights, log.clicks).mean())
    assert found["IPS"].value == pytest.approx(ips(weights, log.clicks).mean())
    short, short_target = logged(2_000)
    wide = {e.name: e for e in estimates(short, short_target, click_model(short))}
    assert list(wide.values()) == estimates(short, short_target, click_model(short))
    assert list(wide.values()) != estimates(short, short_target, click_model(short), seed=1)
    assert wide["IPS"].high - wide["IPS"].low > 2 * (found["IPS"].high - found["IPS"].low)


def test_intervals_are_as_wide_as_the_standard_error_says() -> None:
    """A percentile interval of a mean of 20,000 terms is 3.92 standard errors wide, within 10 %.

    2,000 resamples leave a standard error of about 2 % of the width.
    """
    log, target = logged()
    terms = ips(importance_weights(target, log.actions, log.propensities), log.clicks)
    found = estimates(log, target, np.zeros_like(target))[0]
    expected = 3.92 * terms.std() / len(terms) ** 0.5
    assert found.high - found.low == pytest.approx(expected, rel=0.1)


def test_the_interval_of_snips_is_that_of_a_ratio() -> None:
    """Where all is clicked, SNIPS is 1 whatever is drawn, and IPS is not."""
    log, target = logged(1_000)
    log = replace(log, clicks=np.ones(1_000))
    found = {e.name: e for e in estimates(log, target, np.zeros_like(target))}
    assert (found["SNIPS"].low, found["SNIPS"].high) == pytest.approx((1, 1))
    assert found["IPS"].high - found["IPS"].low > 0.05


def test_resamples_without_a_weight_are_left_out() -> None:
    """One impression of twenty has a weight, and a resample lacks it with 0.95^20 = 36 %."""
    log, _ = logged(20)
    log = replace(log, actions=np.append(1, np.zeros(19, np.int64)), clicks=np.ones(20))
    target = np.tile([0.0, 1.0, 0.0], (20, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snips_found = estimates(log, target, np.zeros((20, 3)))[1]
    assert (snips_found.low, snips_found.high) == pytest.approx((1, 1))


def test_the_logistic_regression_is_the_minimum_and_its_intercept_is_free() -> None:
    """Newton's method, which needs no value of the loss, comes to the same weights."""
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(400), rng.normal(size=(400, 3))])
    y = (rng.random(400) < 1 / (1 + np.exp(2 - x[:, 1] - x[:, 2]))).astype(float)
    ridge, weights = 20.0, np.zeros(4)
    penalty = np.diag([0.0, ridge, ridge, ridge])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = x.T @ (x * (p * (1 - p))[:, None]) + penalty
        weights = weights - np.linalg.solve(hessian, x.T @ (p - y) + penalty @ weights)
    assert off_policy._logistic(x, y, ridge) == pytest.approx(weights, abs=1e-4)


def test_folds_are_checked() -> None:
    log, _ = logged(300)
    for folds in (1, 301):
        with pytest.raises(ValueError, match=f"300 impressions for {folds} folds"):
            click_model(log, folds=folds)


def test_the_click_model_is_right_where_it_can_be_and_has_not_seen_what_it_scores() -> None:
    rng = np.random.default_rng(0)
    n = 6_000
    users = rng.integers(0, 2, (n, 1)).astype(float)
    items = np.eye(3)[:, 1:]
    actions = rng.integers(0, 3, n)
    logits = -1.0 + 1.5 * users[:, 0] + np.array([0.0, 1.0, -1.0])[actions]
    clicks = (rng.random(n) < 1 / (1 + np.exp(-logits))).astype(float)
    log = LoggedBandit(actions, np.zeros(n, np.int64), clicks, np.full(n, 1 / 3), users, items)
    found = click_model(log, ridge=1e-3)
    true = 1 / (1 + np.exp(-(-1.0 + 1.5 * users + np.array([[0.0, 1.0, -1.0]]))))
    assert np.abs(found - true).max() < 0.05  # four standard errors of a cell of 1,000
    # Turning one impression's click changes what others are scored with, and not its own score.
    turned = replace(log, clicks=np.where(np.arange(n) == 7, 1 - clicks, clicks))
    changed = np.abs(click_model(turned, ridge=1e-3) - found).max(1)
    assert changed[7] == 0
    assert (changed > 0).sum() > n / 2


def test_too_little_support_is_warned_of() -> None:
    log, target = logged(200)
    weights = importance_weights(target, log.actions, log.propensities)
    with pytest.warns(UserWarning, match="effective clicks are too few to conclude from"):
        found = support(log, target, weights)
    assert found.too_small
    large, target = logged()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = importance_weights(target, large.actions, large.propensities)
        assert not support(large, target, weights).too_small


def test_many_clicks_of_the_wrong_items_are_warned_of() -> None:
    """A log of one item only says nothing of the others, however often it was clicked."""
    n, k = 2_000, 50
    rng = np.random.default_rng(0)
    clicks = (rng.random(n) < 0.3).astype(float)
    one = np.zeros(n, np.int64)
    log = LoggedBandit(one, one + 1, clicks, np.ones(n), np.zeros((n, 0)), np.eye(k)[:, 1:])
    weights = importance_weights(uniform(log), log.actions, log.propensities)
    with pytest.warns(UserWarning, match=r"mean weight is 0\.02 and not near 1"):
        found = support(log, uniform(log), weights)
    assert found.effective_clicks > 500
    assert found.unseen == pytest.approx(0.98)
    assert found.too_small


def test_what_chance_left_unseen_is_no_lack_of_support() -> None:
    """As many items as impressions: 37 % are not seen, and IPS of a uniform policy is the mean."""
    n = 1_000
    rng = np.random.default_rng(0)
    actions, clicks = rng.integers(n, size=n), (rng.random(n) < 0.5).astype(float)
    ones = np.ones(n, np.int64)
    log = LoggedBandit(actions, ones, clicks, np.full(n, 1 / n), np.zeros((n, 0)), np.eye(n))
    weights = importance_weights(uniform(log), log.actions, log.propensities)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = support(log, uniform(log), weights)
    assert 0.3 < found.unseen < 0.45
    assert not found.too_small


def test_without_a_click_no_error_is_told() -> None:
    log, target = logged(200)
    weights = importance_weights(target, log.actions, log.propensities)
    with pytest.warns(UserWarning, match="Nothing that the target policy would show was clicked"):
        assert support(replace(log, clicks=np.zeros(200)), target, weights).too_small


def test_what_was_never_shown_is_counted() -> None:
    log, target = logged(500)
    kept = log.actions != 1
    fields = ("actions", "positions", "clicks", "propensities", "users")
    without = replace(log, **{name: getattr(log, name)[kept] for name in fields})
    weights = importance_weights(target[kept], without.actions, without.propensities)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = support(without, target[kept], weights)
    assert found.unseen == pytest.approx(target[kept][:, 1].mean())


def test_policies_are_distributions() -> None:
    log, _ = logged(300)
    assert uniform(log).sum(1) == pytest.approx(1)
    own = frequencies(log, log)
    assert own.sum(1) == pytest.approx(1)
    assert own[0] == pytest.approx(np.bincount(log.actions) / 300)
    apart = replace(log, positions=np.where(np.arange(300) < 150, 1, 3))
    other = replace(log, positions=np.where(np.arange(300) < 150, 1, 2))
    with pytest.raises(ValueError, match="nothing at a position"):
        frequencies(other, apart)
    elsewhere = np.eye(3)[np.where(log.actions == 0, 1, 0)]
    with pytest.raises(ValueError, match="nothing that the target policy would"):
        estimates(log, elsewhere, uniform(log))
    with pytest.raises(ValueError, match="Take two logs of one campaign"):
        frequencies(replace(log, items=np.eye(4)), log)


# --- against obp, where it is installed ----------------------------------------------------------


@pytest.fixture(scope="module")
def obp() -> Iterator[Any]:
    """The estimators of the package obp; its other parts need more than they do."""
    spec = importlib.util.find_spec("obp")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("obp is not installed (pip install --no-deps obp scikit-learn threadpoolctl)")
    place = Path(spec.submodule_search_locations[0])
    others = set(sys.modules)
    for name, folder in (("obp", place), ("obp.ope", place / "ope")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    try:
        yield importlib.import_module("obp.ope.estimators")
    except ImportError as error:
        pytest.skip(f"obp's estimators need more: {error}")
    finally:
        for name in set(sys.modules) - others:
            if name.partition(".")[0] == "obp":
                del sys.modules[name]


@pytest.mark.parametrize("seed", range(5))
def test_estimates_are_those_of_obp(seed: int, obp: Any) -> None:
    rng = np.random.default_rng(seed)
    n, k = 500, 7
    behaviour, target = rng.dirichlet(np.ones(k), n), rng.dirichlet(np.ones(k), n)
    actions = np.array([rng.choice(k, p=p) for p in behaviour])
    propensities = behaviour[np.arange(n), actions]
    rewards, expected = (rng.random(n) < 0.3).astype(float), rng.random((n, k))
    weights = importance_weights(target, actions, propensities)
    policy = {"action_dist": target[:, :, None], "position": np.zeros(n, int)}
    log = {"reward": rewards, "action": actions, "pscore": propensities}
    model = {"estimated_rewards_by_reg_model": expected[:, :, None]}
    for ours, theirs, given in (
        (ips(weights, rewards), "InverseProbabilityWeighting", log),
        (snips(weights, rewards), "SelfNormalizedInverseProbabilityWeighting", log),
        (direct_method(target, expected), "DirectMethod", model),
        (
            doubly_robust(weights, rewards, actions, target, expected),
            "DoublyRobust",
            {**log, **model},
        ),
    ):
        value = getattr(obp, theirs)().estimate_policy_value(**policy, **given)
        assert ours.mean() == pytest.approx(value, abs=1e-12)


# --- the command ---------------------------------------------------------------------------------


def write_logs(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for policy, chances in (("random", [0.25] * 4), ("bts", [0.7, 0.1, 0.1, 0.1])):
        place = folder / policy / "all"
        place.mkdir(parents=True)
        items = "".join(f"{i},{i}.0,{'ab'[i % 2]}\n" for i in range(4))
        (place / "item_context.csv").write_text(f"item_id,item_feature_0,item_feature_1\n{items}")
        rows = ["item_id,position,click,propensity_score,user_feature_0"]
        for _ in range(3000):
            item = rng.choice(4, p=chances)
            click = int(rng.random() < (0.3, 0.1, 0.1, 0.1)[item])
            rows.append(
                f"{item},{rng.integers(1, 4)},{click},{chances[item]},{'xy'[rng.integers(2)]}"
            )
        (place / "all.csv").write_text("\n".join(rows))
    return folder


def test_the_command_puts_what_was_logged_beside_the_estimates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_logs(tmp_path)
    file = tmp_path / "figures.json"
    off_policy.main(Options(folder, json=file))
    printed = capsys.readouterr().out
    told = {e["name"]: e for e in json.loads(file.read_text())["estimates"]}
    assert list(told) == ["IPS", "SNIPS", "DM", "DR", "logged of bts"]
    for name in ("IPS", "SNIPS", "DR", "logged of bts"):
        # 0.7 · 0.3 + 0.3 · 0.1; the standard error is 0.012 of IPS, 0.008 of the log
        assert told[name]["value"] == pytest.approx(0.24, abs=0.05)
        assert f"{told[name]['value']:.3%}" in printed
    assert "3,000 impressions are worth" in printed
    assert "too few" not in printed
    assert json.loads(file.read_text())["support"]["too_small"] is False


def test_the_command_says_when_nothing_can_be_concluded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_logs(tmp_path)
    log = folder / "random" / "all" / "all.csv"
    log.write_text("\n".join(log.read_text().split("\n")[:61]))
    off_policy.main(Options(folder, json=tmp_path / "figures.json"))
    assert "effective clicks are too few" in " ".join(capsys.readouterr().out.split())
    told = json.loads((tmp_path / "figures.json").read_text())["support"]
    assert told["too_small"] is True
    assert "too few" in told["problem"]


def test_the_command_estimates_a_policy_without_a_log(tmp_path: Path) -> None:
    found, _ = evaluate(Options(write_logs(tmp_path), behaviour="bts", target="uniform"))
    values = {e.name: e.value for e in found}
    assert values["IPS"] == pytest.approx(0.15, abs=0.06)  # four standard errors of 0.014
    assert len(found) == 4
