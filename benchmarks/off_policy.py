"""What a policy would have earned, from the log of another: ``python -m benchmarks.off_policy``.

It reads logs of the Open Bandit Dataset: from what was clicked while items were shown at random it
estimates the click rate of the policy that made the other log (Thompson sampling), and puts that
rate, as it was logged, beside the estimates.

    pip download --no-deps obp==0.4.1 && unzip -q obp-*.whl 'obp/dataset/obd/*'
    python -m benchmarks.off_policy obp/dataset/obd
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tyro
from rich.console import Console
from scipy import optimize, special

from agents.runs import write_json
from agents.settings import at_least
from benchmarks.tables import Table
from llm_envs.datasets.open_bandit import LoggedBandit, load_open_bandit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEWEST_CLICKS = 25
"""Effective clicks below which nothing is concluded: the relative standard error of a weighted
click rate is about one over their root, so that this is 20 %."""
RESAMPLES = 2_000


# --- estimators ----------------------------------------------------------------------------------
# Each returns a term for every impression, whose mean is the estimate.


def importance_weights(target: Floats, actions: Ints, propensities: Floats) -> Floats:
    """How much likelier the target policy shows what was shown, π(a | x) / π₀(a | x).

    Args:
        target: (n, k) probabilities of the target policy.
        actions: (n,) what was shown, in [0, k).
        propensities: (n,) in (0, 1], with what probability.

    Returns:
        (n,)

    Raises:
        ValueError: A row of ``target`` is no distribution, a propensity is not in (0, 1], an
            action is not in [0, k), or lengths differ.
    """
    if target.ndim != 2 or not len(target) == len(actions) == len(propensities):
        raise ValueError(
            f"There are {len(actions)} actions and {len(propensities)} propensities for "
            f"probabilities of shape {target.shape}. Give one of each a row."
        )
    if (target < 0).any() or not np.allclose(target.sum(1), 1.0, atol=1e-6):
        raise ValueError("A row of the target policy is no distribution over the actions.")
    if not ((propensities > 0) & (propensities <= 1)).all():
        raise ValueError(
            "A propensity is not in (0, 1]. What was logged had a probability; one of 0 means "
            "that the log and its propensities do not belong together."
        )
    if not ((actions >= 0) & (actions < target.shape[1])).all():
        raise ValueError(
            f"An action is not in [0, {target.shape[1]}). Number the actions as the columns of the "
            "target policy."
        )
    weights: Floats = target[np.arange(len(actions)), actions] / propensities
    return weights


def ips(weights: Floats, rewards: Floats) -> Floats:
    """Inverse propensity scoring, w r: unbiased where the log shows all that the target would.

    Args:
        weights: (n,) importance weights.
        rewards: (n,)

    Source: Horvitz and Thompson (1952); Strehl et al. (2010).
    """
    return weights * rewards


def snips(weights: Floats, rewards: Floats) -> Floats:
    """Self-normalised IPS, w r / mean(w): a little biased, and unmoved if rewards are shifted.

    Args:
        weights: (n,) importance weights, not all 0.
        rewards: (n,)

    Source: Swaminathan and Joachims (2015).
    """
    found: Floats = weights * rewards / weights.mean()
    return found


def direct_method(target: Floats, expected: Floats) -> Floats:
    """What a model of the rewards expects of the target policy, Σ_a π(a | x) q(x, a).

    Args:
        target: (n, k) probabilities of the target policy.
        expected: (n, k) expected rewards q.

    Source: Beygelzimer and Langford (2009).
    """
    found: Floats = (target * expected).sum(1)
    return found


def doubly_robust(
    weights: Floats, rewards: Floats, actions: Ints, target: Floats, expected: Floats
) -> Floats:
    """The direct method, and IPS of what the model missed: unbiased if either is right.

    Args:
        weights: (n,) importance weights.
        rewards: (n,)
        actions: (n,) what was shown.
        target: (n, k) probabilities of the target policy.
        expected: (n, k) expected rewards q.

    Source: Dudík, Langford, Li (2011).
    """
    missed = rewards - expected[np.arange(len(actions)), actions]
    return direct_method(target, expected) + weights * missed


def effective_size(weights: Floats) -> float:
    """How many impressions of the target policy the weighted ones are worth, (Σw)² / Σw².

    Args:
        weights: (n,) not negative; 0 if all of them are 0.

    Source: Kong (1992).
    """
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0


@dataclass(frozen=True)
class Support:
    """How much a log says of a target policy.

    Attributes:
        impressions: Of the log.
        effective: What they are worth, by Kong's measure.
        effective_clicks: The same of those that were clicked.
        largest_weight: Of an impression.
        mean_weight: Near 1 where the log can show all that the target would and its propensities
            are right: its expectation is the share of the target policy that the log can show.
        unseen: Share of what the target policy would show that the log never shows at its place.
    """

    impressions: int
    effective: float
    effective_clicks: float
    largest_weight: float
    mean_weight: float
    unseen: float

    @property
    def relative_error(self) -> float:
        """Standard error of IPS as a share of the estimate, about; infinite without a click."""
        return self.effective_clicks**-0.5 if self.effective_clicks else float("inf")

    @property
    def problem(self) -> str:
        """Why nothing should be concluded, and the cure; empty if something may be.

        Clicks may be too few (`FEWEST_CLICKS`). Or they are many, and of the wrong items: where the
        log cannot show what the target would, IPS is too low by as much as the mean weight is
        below 1, and its interval cannot know. That is told when it is more than half the width of
        the interval, two standard errors. (`unseen` would not do: what could have been shown and
        by chance was not is part of the standard error already.)
        """
        cure = "Take a longer log, or a target policy nearer to the one that was logged."
        if not self.effective_clicks:
            return f"Nothing that the target policy would show was clicked. {cure}"
        if self.effective_clicks < FEWEST_CLICKS:
            return (
                f"{self.effective_clicks:.1f} effective clicks are too few to conclude from: the "
                f"standard error of an estimate is about {self.relative_error:.0%} of it. {cure}"
            )
        if abs(self.mean_weight - 1) > 2 * self.relative_error:
            return (
                f"The mean weight is {self.mean_weight:.2f} and not near 1: the log cannot show "
                "much of what the target policy would, or its propensities are wrong, and no "
                "interval covers that. Take a log that can show it, or a target policy nearer to "
                "the one that was logged."
            )
        return ""

    @property
    def too_small(self) -> bool:
        """Whether nothing should be concluded."""
        return bool(self.problem)


def support(log: LoggedBandit, target: Floats, weights: Floats) -> Support:
    """Measure how much a log says of a target policy; warn if that is too little.

    Args:
        log: The log.
        target: (n, k) probabilities of the target policy.
        weights: (n,) importance weights.
    """
    shown = np.zeros((log.positions.max() + 1, target.shape[1]), dtype=bool)
    shown[log.positions, log.actions] = True
    found = Support(
        len(log),
        effective_size(weights),
        effective_size(weights[log.clicks > 0]),
        float(weights.max()),
        float(weights.mean()),
        float((target * ~shown[log.positions]).sum(1).mean()),
    )
    if found.problem:
        warnings.warn(found.problem, stacklevel=2)
    return found


# --- a model of the rewards ----------------------------------------------------------------------


def click_model(log: LoggedBandit, *, folds: int = 3, ridge: float = 1.0, seed: int = 0) -> Floats:
    """Expected clicks of every item for every impression, by logistic regression.

    The logit is a sum of parts for the user, the item and the position. An impression is scored by
    a model that has not seen it (cross-fitting), or DR would take noise for knowledge.

    Args:
        log: The log.
        folds: Models; each is fitted to the other folds.
        ridge: Weight of the squared norm of all weights but the intercept.
        seed: Of the folds.

    Returns:
        (n, k) probabilities.

    Raises:
        ValueError: There are fewer impressions than folds, or fewer folds than 2.
    """
    if not 2 <= folds <= len(log):
        raise ValueError(
            f"There are {len(log)} impressions for {folds} folds. Give 2 folds or more, and an "
            "impression for each."
        )
    places = np.eye(int(log.positions.max()) + 1)[log.positions][:, 1:]
    around = np.column_stack([np.ones(len(log)), log.users, places])
    shown = np.column_stack([around, log.items[log.actions]])
    fold = np.random.default_rng(seed).permutation(len(log)) % folds
    expected = np.zeros((len(log), len(log.items)))
    for number in range(folds):
        seen, held_out = fold != number, fold == number
        weights = _logistic(shown[seen], log.clicks[seen], ridge)
        of_user, of_item = weights[: around.shape[1]], weights[around.shape[1] :]
        logits = (around[held_out] @ of_user)[:, None] + (log.items @ of_item)[None]
        expected[held_out] = special.expit(logits)
    return expected


def _logistic(x: Floats, y: Floats, ridge: float) -> Floats:
    """Fit a logistic regression; the first column of x is the intercept's."""

    def loss(weights: Floats) -> tuple[float, Floats]:
        logits = x @ weights
        free = np.append(0.0, weights[1:])
        value = np.logaddexp(0, logits).sum() - y @ logits + ridge / 2 * free @ free
        return float(value), x.T @ (special.expit(logits) - y) + ridge * free

    start = np.zeros(x.shape[1])
    start[0] = special.logit(np.clip(y.mean(), 1e-6, 1 - 1e-6))
    found: Floats = optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x
    return found


# --- policies ------------------------------------------------------------------------------------


def uniform(log: LoggedBandit) -> Floats:
    """Any item with the same probability, (n, k)."""
    k = len(log.items)
    return np.full((len(log), k), 1 / k)


def frequencies(made_by: LoggedBandit, log: LoggedBandit) -> Floats:
    """The policy that made a log, for the impressions of another, (n, k).

    Its probabilities are how often it showed an item at a position. Those of Open Bandit's
    policies do not depend on the user. Thompson sampling changed them during the week, and the
    logged propensities tell only those of what was shown: this is its mean over the log, whose
    click rate is the logged one as far as that of an item does not change meanwhile.

    Args:
        made_by: The log that the policy made.
        log: The impressions that it is evaluated on.

    Raises:
        ValueError: The items differ, or ``made_by`` has nothing at a position.
    """
    if len(made_by.items) != len(log.items):
        raise ValueError(
            f"One log has {len(made_by.items)} items and the other {len(log.items)}. Take two logs "
            "of one campaign."
        )
    counts = np.zeros((int(log.positions.max()) + 1, len(log.items)))
    inside = made_by.positions < len(counts)
    np.add.at(counts, (made_by.positions[inside], made_by.actions[inside]), 1.0)
    totals = counts.sum(1, keepdims=True)
    if not totals[log.positions].all():
        raise ValueError("The policy showed nothing at a position of the other log.")
    found: Floats = (counts / np.maximum(totals, 1.0))[log.positions]
    return found


# --- the evaluation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A click rate with its 95 % bootstrap interval over impressions."""

    name: str
    value: float
    low: float
    high: float


def estimates(
    log: LoggedBandit, target: Floats, expected: Floats, *, seed: int = 0
) -> list[Estimate]:
    """Estimate the click rate of a target policy in every way.

    Args:
        log: What another policy showed.
        target: (n, k) probabilities of the target policy.
        expected: (n, k) expected clicks; see :func:`click_model`. They and the target policy are
            taken as given: the intervals do not hold what estimating them again would change.
        seed: Of the resamples.

    Raises:
        ValueError: The target policy shows nothing that was logged.
    """
    weights = importance_weights(target, log.actions, log.propensities)
    if not weights.any():
        raise ValueError("The log shows nothing that the target policy would ever show.")
    terms = {
        "IPS": ips(weights, log.clicks),
        "DM": direct_method(target, expected),
        "DR": doubly_robust(weights, log.clicks, log.actions, target, expected),
    }
    found = [_estimate(name, each, seed=seed) for name, each in terms.items()]
    found.insert(1, _estimate("SNIPS", ips(weights, log.clicks), weights, seed=seed))
    return found


def _estimate(name: str, terms: Floats, over: Floats | None = None, *, seed: int) -> Estimate:
    """Mean of the terms, over the mean of ``over`` if given, and its bootstrap interval.

    A resample whose ``over`` are all 0 has no ratio and is left out.
    """
    over = np.ones_like(terms) if over is None else over
    rng = np.random.default_rng(seed)
    n = len(terms)
    # Counting how often each impression is drawn is resampling, in the memory of one resample.
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        counts = np.bincount(rng.integers(n, size=n), minlength=n)
        total = counts @ over
        means[i] = (counts @ terms) / total if total else np.nan
    low, high = np.nanquantile(means, (0.025, 0.975))
    return Estimate(name, float(terms.mean() / over.mean()), float(low), float(high))


@dataclass(frozen=True)
class Options:
    """What to evaluate, on what."""

    folder: tyro.conf.Positional[Path]
    """Folder of the Open Bandit files, which holds random/ and bts/."""
    campaign: Literal["all", "men", "women"] = "all"
    """Campaign."""
    behaviour: Literal["random", "bts"] = "random"
    """Policy whose log is read."""
    target: Literal["bts", "random", "uniform"] = "bts"
    """Policy whose click rate is estimated; of bts and random the log is known, too."""
    folds: int = 3
    """Folds of the click model's cross-fitting."""
    seed: int = 0
    """Seed of folds and resamples."""
    json: Path | None = None
    """File to write the figures to."""

    def __post_init__(self) -> None:
        at_least(self, 2, "folds")


def evaluate(options: Options) -> tuple[list[Estimate], Support]:
    """Estimate the click rate of a policy; what was logged of it comes last.

    Raises:
        ValueError: A log cannot be read.
    """
    log = load_open_bandit(options.folder, options.behaviour, options.campaign)
    logged = None
    if options.target == "uniform":
        target = uniform(log)
    else:
        logged = load_open_bandit(options.folder, options.target, options.campaign)
        target = frequencies(logged, log)
    expected = click_model(log, folds=options.folds, seed=options.seed)
    found = estimates(log, target, expected, seed=options.seed)
    if logged is not None:
        found.append(_estimate(f"logged of {options.target}", logged.clicks, seed=options.seed))
    weights = importance_weights(target, log.actions, log.propensities)
    return found, support(log, target, weights)


def main(options: Options) -> None:
    """Evaluate and print."""
    if options.json is not None:  # before the work, or it would be lost
        options.json.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, known = evaluate(options)
    rows = [(e.name, f"{e.value:.3%}", f"{e.low:.3%} to {e.high:.3%}") for e in found]
    title = f"Click rate of {options.target}, from the log of {options.behaviour}"
    header = ("estimator", "click rate", "95 % bootstrap interval")
    console.print(Table(title, header, tuple(rows), numbers=2).rich())
    worth = (
        f"{known.impressions:,} impressions are worth {known.effective:,.0f} of the target policy, "
        f"their clicks {known.effective_clicks:.1f}"
    )
    unseen = f"{known.unseen:.1%} of what it would show was never shown"
    console.print(
        f"{worth}; the largest weight is {known.largest_weight:.1f}, their mean "
        f"{known.mean_weight:.2f}, and {unseen}. "
        "DM's interval leaves out that its model may be wrong."
    )
    for warning in caught:
        console.print(str(warning.message), style="yellow")
    if options.json is not None:
        told: dict[str, Any] = {
            "estimates": [asdict(e) for e in found],
            "support": asdict(known) | {"too_small": known.too_small, "problem": known.problem},
        }
        write_json(options.json, told)


if __name__ == "__main__":
    try:
        arguments = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.off_policy")
        main(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
