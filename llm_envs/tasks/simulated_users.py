"""A simulated audience: made-up films and users, known click probabilities, and exact best play.

Pure functions and frozen arrays; `RecommendationClicks` tells them in words. Nothing in it is
taken from a data set.

User u clicks on film f in step t of a session, after the films f_0, …, f_{t-1}, with probability

    p_t(f) = σ(x_t(f) - w_s Σ_{j=1..m} λ^(j-1) J(f, f_{t-j}))
    x_t(f) = b + w_τ ⟨τ_t, g_f⟩ / √|f| + w_q q_f + w_y exp(-|y_f - y_u| / 20) + w_n n_u (1 - 2 a_f)
    τ_{t+1} = √(1 - δ²) τ_t + δ ξ_t

- taste: g_f flags the |f| genres of the film (1 to 3); τ_0 ~ N(0, I) is the user's own;
- quality: q_f ~ N(0, 1) is what everybody likes;
- era: y_f is the film's year, y_u the year that the user likes best;
- novelty: the film's fame a_f ~ U(0, 1) is how much more of the audience knows it than others;
  the curiosity n_u ~ N(0, 1) is above 0 for users who prefer what few know, in the sense of Vargas
  and Castells (2011);
- saturation: J is the number of genres that two films share / that of their genres together; a
  film that was recommended costs films like it, clicked or not, and is forgotten after m steps, in
  the spirit of Leqi et al. (2021);
- drift: ξ_t ~ N(0, I) moves tastes, so that after many steps they are those of somebody else.

`Habits` holds the weights. The tastes of a session, and a uniform number for each of its
candidates, are drawn before it begins: a candidate is clicked if its number lies below its
probability. So everybody who plays an episode meets the same luck, and the probabilities of a step
depend on the last m choices alone: the best play by somebody who knows the user (and the way of
their taste, but not the luck) is exact, by dynamic programming over k^m states a step, for sessions
of any length.

References:
    Vargas and Castells (2011), "Rank and Relevance in Novelty and Diversity Metrics for Recommender
    Systems". Leqi, Kilinc Karzan, Lipton and Montgomery (2021), "Rebounding Bandits for Modeling
    Satiation Effects". McCullagh (1980), "Regression Models for Ordinal Data", for `make_ratings`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from llm_envs.datasets.movielens import LIKED_FROM, Ratings
from llm_envs.datasets.movielens_files import HIGHEST, LOWEST, STEP
from llm_envs.datasets.splits import SPLITS, Split, check_split, split_of

Floats = NDArray[np.float64]

USERS: Final = 1_000
FILMS: Final = 2_000

GENRE_WEIGHTS: Final[Mapping[str, float]] = {
    **{"Drama": 10, "Comedy": 8, "Thriller": 5, "Romance": 5, "Action": 5, "Crime": 4},
    **{"Adventure": 4, "Sci-Fi": 3, "Horror": 3, "Fantasy": 2, "Mystery": 2, "Children": 2},
    **{"Animation": 2, "War": 1, "Musical": 1, "Documentary": 1, "Western": 1, "Film-Noir": 1},
}
"""How readily a film has each genre."""

ADJECTIVES: Final = (
    *("Amber", "Borrowed", "Brittle", "Careful", "Crooked", "Distant", "Early", "Faithful"),
    *("Folded", "Frozen", "Gentle", "Gilded", "Hollow", "Humble", "Idle", "Jealous", "Late"),
    *("Lucky", "Marble", "Mended", "Narrow", "Nimble", "Patient", "Plain", "Polite", "Restless"),
    *("Rusty", "Scattered", "Seventh", "Sleepless", "Slow", "Spare", "Stubborn", "Tidy"),
    *("Unsent", "Vacant", "Velvet", "Wandering", "Weary", "Winding"),
)
NOUNS: Final = (
    *("Anchor", "Apron", "Attic", "Balcony", "Basket", "Bridge", "Button", "Candle", "Canal"),
    *("Carousel", "Chimney", "Compass", "Courtyard", "Cupboard", "Envelope", "Ferry", "Fiddle"),
    *("Garden", "Glove", "Harbour", "Hinge", "Kettle", "Ladder", "Lantern", "Ledger", "Magpie"),
    *("Meadow", "Mirror", "Needle", "Orchard", "Parcel", "Pebble", "Pilot", "Postcard", "Quarry"),
    *("Rooftop", "Saddle", "Sparrow", "Staircase", "Suitcase", "Teacup", "Thimble", "Umbrella"),
    *("Valley", "Viola", "Walnut", "Windmill", "Workshop"),
)
"""Words that titles are made of, all alike: a title tells nothing."""

_SEED: Final = 20_261_125
_FIRST_YEAR: Final = 1930
_LAST_YEAR: Final = 2020
_ERA: Final = 20.0  # years apart at which a film is worth 1/e of one of the favourite year
_LARGEST_TABLE: Final = 2**24  # numbers that exact play may keep for a step


# --- films and users -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Films:
    """Every film of the catalogue, m of them. Never changes.

    Attributes:
        titles: (m,) all different.
        years: (m,) years of release.
        genres: (m, g) ones and zeros, in the order of `GENRE_WEIGHTS`.
        quality: (m,) q_f, standard normal.
        fame: (m,) a_f, uniform in [0, 1).
    """

    titles: tuple[str, ...]
    years: Floats
    genres: Floats
    quality: Floats
    fame: Floats


@dataclass(frozen=True, slots=True)
class SimulatedUser:
    """A user who was made up.

    Attributes:
        user: Their number, from 1; its hash decides the split.
        films: How many films they could be shown: all.
        taste: (g,) τ_0, in the order of `GENRE_WEIGHTS`.
        favourite_year: y_u.
        curiosity: n_u.
    """

    user: int
    films: int
    taste: tuple[float, ...]
    favourite_year: float
    curiosity: float

    @property
    def id(self) -> str:
        """``simulated/<number>``."""
        return f"simulated/{self.user}"

    @property
    def unit(self) -> str:
        """The user too: sessions of one user depend on each other."""
        return self.id


@cache
def make_films() -> Films:
    """Return the catalogue of `FILMS` films; the same one every time."""
    rng = np.random.default_rng((_SEED, 0))
    titles = [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
    titles += [f"{one} and {other}" for one in NOUNS for other in NOUNS if one != other]
    weights = np.log(list(GENRE_WEIGHTS.values()))
    # Of n perturbed log-weights the highest are n draws without replacement (Gumbel top-k).
    ranks = (-weights - rng.gumbel(size=(FILMS, len(weights)))).argsort(1).argsort(1)
    return Films(
        titles=tuple(titles[i] for i in rng.choice(len(titles), FILMS, replace=False).tolist()),
        years=np.floor(_years(rng.random(FILMS))),
        genres=(ranks < rng.integers(1, 4, size=(FILMS, 1))).astype(np.float64),
        quality=rng.standard_normal(FILMS),
        fame=rng.random(FILMS),
    )


@cache
def make_users() -> tuple[SimulatedUser, ...]:
    """Return all `USERS` users; each has a generator of their own, so that none moves another."""
    users = []
    for user in range(1, USERS + 1):
        rng = np.random.default_rng((_SEED, user))
        taste = tuple(rng.standard_normal(len(GENRE_WEIGHTS)).tolist())
        year, curiosity = float(_years(rng.random())), float(rng.standard_normal())
        users.append(SimulatedUser(user, FILMS, taste, year, curiosity))
    return tuple(users)


def users_in(split: Split) -> tuple[SimulatedUser, ...]:
    """Return the users of a split, by number; all for ``"all"``.

    Raises:
        ValueError: There is no such split.
    """
    wanted = SPLITS if check_split(split) == "all" else (split,)
    return tuple(one for one in make_users() if split_of(str(one.user)) in wanted)


def _years(uniform: Floats | float) -> Floats:
    """Map [0, 1) to years, later ones more likely."""
    years: Floats = _LAST_YEAR - (_LAST_YEAR - _FIRST_YEAR) * np.square(uniform)
    return years


# --- what they like ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Habits:
    """The numbers of the simulator; all weights are in log-odds of a click.

    Attributes:
        base: b, of a film that has nothing for it.
        taste: w_τ, what one standard deviation of taste is worth.
        quality: w_q, what one standard deviation of quality is worth.
        era: w_y, what a film of the favourite year gains.
        novelty: w_n, what an unknown film gains, for one standard deviation of curiosity.
        saturation: w_s, what a film loses if the last one had the same genres.
        fading: λ, by what this is multiplied for each step further back, 0 to 1.
        memory: m, after how many steps a film is forgotten.
        drift: δ, how much of a new taste comes in with each step, 0 to 1.

    Raises:
        ValueError: A number lies outside its range.
    """

    base: float = 0.0
    taste: float = 1.2
    quality: float = 0.8
    era: float = 1.0
    novelty: float = 0.5
    saturation: float = 4.0
    fading: float = 0.8
    memory: int = 3
    drift: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what makes no simulator."""
        weights = self.base, self.taste, self.quality, self.era, self.novelty, self.saturation
        if not np.isfinite(weights).all() or min(weights[1:]) < 0:
            raise ValueError(f"{self}: all weights have to be finite and, but for base, 0 or more.")
        if not (0 <= self.fading <= 1 and 0 <= self.drift <= 1):
            raise ValueError(f"{self}: fading and drift have to lie between 0 and 1.")
        if self.memory < 0:
            raise ValueError(f"{self}: memory has to be 0 or more.")


DEFAULT_HABITS: Final = Habits()


def drifting_tastes(
    habits: Habits, taste: Sequence[float], steps: int, rng: np.random.Generator
) -> Floats:
    """Return (T, g) the tastes of each step: a stationary autoregression of the first order."""
    tastes = rng.standard_normal((steps, len(taste)))
    tastes[0] = taste
    for step in range(1, steps):
        kept = np.sqrt(1 - habits.drift**2) * tastes[step - 1]
        tastes[step] = kept + habits.drift * tastes[step]
    return tastes


def liking(
    habits: Habits,
    films: Films,
    rows: NDArray[np.int64],
    tastes: Floats,
    favourite_year: Floats | float,
    curiosity: Floats | float,
) -> Floats:
    """Return x: the log-odds of a click on films when nothing was recommended before.

    Args:
        habits: The numbers of the simulator.
        films: The catalogue.
        rows: (n, k) rows of the catalogue.
        tastes: (n, g) τ.
        favourite_year: y_u, a number or (n, 1).
        curiosity: n_u, a number or (n, 1).

    Returns:
        (n, k)
    """
    genres = films.genres[rows]
    tasted = np.einsum("ng,nkg->nk", tastes, genres) / np.sqrt(genres.sum(-1))
    era = np.exp(-np.abs(films.years[rows] - favourite_year) / _ERA)
    novelty = curiosity * (1 - 2 * films.fame[rows])
    odds: Floats = habits.base + habits.taste * tasted + habits.quality * films.quality[rows]
    odds += habits.era * era + habits.novelty * novelty
    return odds


def genre_overlap(genres: Floats, others: Floats) -> Floats:
    """Return (k, n) J: the genres that films share / those that they have together.

    Args:
        genres: (k, g) ones and zeros.
        others: (n, g) the same.
    """
    shared = genres @ others.T
    together = genres.sum(1)[:, None] + others.sum(1) - shared
    overlap: Floats = shared / np.maximum(together, 1.0)
    return overlap


# --- sessions ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class Visit:
    """One session of T steps with k candidates each, and all of its chance.

    Attributes:
        habits: The numbers of the simulator.
        liking: (T, k) log-odds of a click without saturation.
        genres: (T, k, g) ones and zeros.
        draws: (T, k) in [0, 1): a candidate is clicked if this lies below its probability.
    """

    habits: Habits
    liking: Floats
    genres: Floats
    draws: Floats

    def chances(self, chosen: Sequence[int]) -> Floats:
        """Return the probability of a click on each candidate of the step that is due, (k,).

        Args:
            chosen: Which candidate each step so far recommended, fewer than T.
        """
        step = len(chosen)
        costs = self._costs(step)
        past = np.arange(step - len(costs), step)
        last = self.genres[past, np.array(chosen, np.int64)[past]]
        overlap = genre_overlap(self.genres[step], last)
        chances: Floats = expit(self.liking[step] - overlap @ costs)
        return chances

    def clicks(self, chosen: Sequence[int]) -> Floats:
        """Return 1 for each candidate of that step that would be clicked, else 0, (k,)."""
        clicked: Floats = (self.draws[len(chosen)] < self.chances(chosen)).astype(np.float64)
        return clicked

    def chances_by_history(self, step: int) -> Floats:
        """Return the probabilities of a click after every history that matters in a step.

        Args:
            step: 0 to T - 1.

        Returns:
            h + 1 axes of length k, where h = min(step, memory): the choices of the last h steps,
            the oldest first, and the candidate.

        Raises:
            ValueError: These are too many numbers.
        """
        costs = self._costs(step)
        k, h = self.liking.shape[1], len(costs)
        if k ** (h + 1) > _LARGEST_TABLE:
            raise ValueError(
                f"Exact play looks at {k}^{h + 1} histories a step, and {_LARGEST_TABLE:,} is the "
                "limit. Give fewer choices, or habits of a shorter memory."
            )
        odds = self.liking[step]
        for axis, cost in enumerate(costs):
            overlap = genre_overlap(self.genres[step - h + axis], self.genres[step])
            odds = odds - cost * overlap.reshape(k, *(1,) * (h - axis - 1), k)
        chances: Floats = expit(odds)
        return chances

    def _costs(self, step: int) -> Floats:
        """Return what each of the last films costs one of the same genres, (h,), oldest first."""
        back = np.arange(min(step, self.habits.memory), dtype=np.float64)[::-1]
        costs: Floats = self.habits.saturation * self.habits.fading**back
        return costs


def open_visit(
    user: SimulatedUser,
    steps: int,
    choices: int,
    rng: np.random.Generator,
    habits: Habits = DEFAULT_HABITS,
) -> tuple[NDArray[np.int64], Visit]:
    """Draw a session: films, none twice, tastes on their way, and luck.

    Args:
        user: The user.
        steps: T, 1 or more.
        choices: k; T · k is at most `FILMS`.
        rng: All chance comes from it.
        habits: The numbers of the simulator.

    Returns:
        (T, k) the films that each step offers, rows of `make_films`, and the session.
    """
    films = make_films()
    rows = rng.choice(len(films.titles), size=(steps, choices), replace=False)
    tastes = drifting_tastes(habits, user.taste, steps, rng)
    odds = liking(habits, films, rows, tastes, user.favourite_year, user.curiosity)
    return rows, Visit(habits, odds, films.genres[rows], rng.random((steps, choices)))


# --- exact values --------------------------------------------------------------------------------


def optimal_choices(visit: Visit) -> list[int]:
    """Return the choices that earn the most clicks in expectation, T of them.

    Their player knows the user and the way of their taste, and not the luck. Clicks change nothing
    of what is to come, so the best plan is made before the first step. By dynamic programming,
    with h the last m choices:

        V_t(h) = max_a p_t(a | h) + V_{t+1}(h without its first, a)

    Raises:
        ValueError: There are too many choices for it (from 65 of them with the default habits).
    """
    best: list[NDArray[np.int64]] = []
    value: Floats | float = 0.0
    for step in reversed(range(len(visit.liking))):
        # V_{t+1} has no axis for what is forgotten by then, and is the same whatever that was.
        total = visit.chances_by_history(step) + value
        best.append(total.argmax(-1))
        value = total.max(-1)
    chosen: list[int] = []
    for step, table in enumerate(reversed(best)):
        chosen.append(int(table[tuple(chosen[max(step - visit.habits.memory, 0) :])]))
    return chosen


def expected_score(visit: Visit, choices: Sequence[int]) -> float:
    """Return the expected clicks a step of a plan: T choices made before the first step."""
    chances = [visit.chances(choices[:step])[choice] for step, choice in enumerate(choices)]
    return float(np.mean(chances))


def optimal_score(visit: Visit) -> float:
    """Return the expected clicks a step of `optimal_choices`: no policy has more."""
    return expected_score(visit, optimal_choices(visit))


def random_score(visit: Visit) -> float:
    """Return the expected clicks a step of somebody who chooses uniformly at random."""
    value: Floats | float = 0.0
    for step in reversed(range(len(visit.liking))):
        value = (visit.chances_by_history(step) + value).mean(-1)
    return float(value) / len(visit.liking)


# --- what is known of films ----------------------------------------------------------------------


@cache
def make_ratings() -> Ratings:
    """Return what training users gave films before any session; the same every time.

    Who knows a film is chance: it is 0.01 + 0.2 a_f³, whatever they think of it. Their stars are an
    ordered logit whose threshold of a click is that of the data, 4 stars: with x the log-odds of a
    click without saturation and drift, and ε from the logistic distribution,

        stars = 4 + ⌊x + ε⌋ / 2, kept within 0.5 to 5

    so that 4 stars or more have the probability σ(x). Every training user rated some film.
    """
    films, training = make_films(), users_in("train")
    rng = np.random.default_rng((_SEED, 0, 1))
    by, rows = np.nonzero(rng.random((len(training), FILMS)) < 0.01 + 0.2 * films.fame**3)
    odds = liking(
        DEFAULT_HABITS,
        films,
        rows[:, None],
        np.array([user.taste for user in training])[by],
        np.array([user.favourite_year for user in training])[by, None],
        np.array([user.curiosity for user in training])[by, None],
    )
    half_stars = np.floor(odds[:, 0] + rng.logistic(size=len(by)))
    names = tuple(GENRE_WEIGHTS)
    return Ratings(
        users=np.array([user.user for user in training])[by],
        movies=rows,
        rating=np.clip(LIKED_FROM + STEP * half_stars, LOWEST, HIGHEST).astype(np.float32),
        timestamp=np.zeros(len(by), np.int64),
        movie_ids=np.arange(1, FILMS + 1),
        titles=films.titles,
        years=tuple(int(year) for year in films.years),
        genres=tuple(
            tuple(sorted(names[i] for i in np.flatnonzero(flags))) for flags in films.genres
        ),
    )
