"""RecommendationClicks: recommend films to users, one at a time, and see the click at once."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llm_envs.core.task import ChoosingTask, Episode, Outcome, say, whole_number
from llm_envs.datasets.movielens import FilmStatistics, Ratings, load_movielens
from llm_envs.datasets.splits import SPLITS, Split, check_flag
from llm_envs.tasks.simulated_users import (
    FILMS,
    SimulatedUser,
    Visit,
    genre_overlap,
    make_ratings,
    open_visit,
    optimal_choices,
    users_in,
)

SIMULATED: Final = "simulated"
"""The name of the set that `simulated_users` makes up."""

DEFAULT_TURNS: Final = 4
"""Recommendations in a session; each user of the embedded set rated films enough for 4 of 5."""

GENRES: Final = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western"),
)
"""Every genre that MovieLens knows; each has a feature."""

FEATURE_NAMES: Final = (
    "mean_rating",
    "rating_count",
    "year",
    *(f"genre/{genre}" for genre in GENRES),
    "genre_affinity",
    "era_affinity",
)
"""What each column of a choosing observation's ``features`` is; `film_features` and
`taste_features` define them."""

_FIRST_YEAR: Final = 1900  # the years that the feature can tell apart
_LAST_YEAR: Final = 2030
_ERA: Final = 10.0  # years apart at which films are alike by 1/e

Floats = NDArray[np.float64]


# --- texts ---------------------------------------------------------------------------------------

OPENING = "Which film should I watch?"


def opening() -> str:
    """Return the first prompt of every session."""
    return say(OPENING)


def candidate_text(
    title: str, year: int | None, genres: Sequence[str], rating: float, count: int
) -> str:
    """Describe a film as a policy reads it; it begins with a space, as answers do.

    ``rating`` is the mean of the ``count`` ratings that training users gave it.
    """
    named = f" {title} ({year})" if year else f" {title}"
    kinds = f": {', '.join(genres)}." if genres else "."
    return f"{named}{kinds} Rated {rating:.1f} by {count}."


def describe_reply(clicked: bool) -> str:
    """Return what the user says to a recommendation."""
    return "I liked it." if clicked else "I did not like it."


def next_request(clicked: bool) -> str:
    """Return what the user says to a recommendation when another one is to follow."""
    return f"{describe_reply(clicked)} What next?"


def next_prompt(clicked: bool) -> str:
    """Return what follows a recommendation in the prompt of the next one."""
    return "\n" + say(next_request(clicked))


# --- features ------------------------------------------------------------------------------------


def film_features(
    means: Floats, counts: NDArray[np.int64], years: Floats, genres: Floats, training_users: int
) -> Floats:
    """Return the features that tell a film, whatever happened in the session.

    - ``mean_rating``: the smoothed mean rating by other training users (0.5 to 5 stars) / 5.
    - ``rating_count``: log(1 + count of these ratings) / log(1 + number of training users).
    - ``year``: 0 in 1900 to 1 in 2030, clipped; 0 for an unknown year too.
    - ``genre/…``: 1 for each genre of the film, else 0.

    The scales are constants of the set, so that no rating of the served user bends them.

    Args:
        means: (…) stars.
        counts: (…) whole numbers, at most ``training_users``.
        years: (…) years of release, NaN where unknown.
        genres: (…, at least len(GENRES)) ones and zeros, `GENRES` first.
        training_users: How many training users there are.

    Returns:
        (…, 3 + len(GENRES)) in [0, 1].
    """
    scaled = (years - _FIRST_YEAR) / (_LAST_YEAR - _FIRST_YEAR)
    scaled = np.fmin(np.fmax(scaled, 0.0), 1.0)  # fmax makes 0 of NaN
    counted = np.log1p(counts) / np.log1p(max(training_users, 1))
    numbers = np.stack((means / 5.0, counted, scaled), axis=-1)
    return np.concatenate((numbers, genres[..., : len(GENRES)]), axis=-1)


def taste_features(
    genres: Floats, years: Floats, past_genres: Floats, past_years: Floats, clicks: Floats
) -> Floats:
    """Return how well the user took to films like each candidate, in this session.

    For similarities s_j of a candidate with the films j recommended before, and their clicks c_j,

        affinity = (1/2 + Σ_j s_j c_j) / (1 + Σ_j s_j)

    the share of clicks on films like it, drawn towards 1/2 by one film's worth; 1/2 at first.

    - ``genre_affinity``: s_j is the number of shared genres / that of their genres together.
    - ``era_affinity``: s_j is exp(-years apart / 10); 0 where a year is unknown.

    Args:
        genres: (k, g) ones and zeros.
        years: (k,) years of release, NaN where unknown.
        past_genres: (t, g) the same of the films recommended so far.
        past_years: (t,)
        clicks: (t,) ones and zeros.

    Returns:
        (k, 2) strictly between 0 and 1.
    """
    by_genre = genre_overlap(genres, past_genres)
    by_era = np.fmax(np.exp(-np.abs(years[:, None] - past_years) / _ERA), 0.0)  # 0 for NaN
    alike = np.stack((by_genre, by_era), axis=1)  # (k, 2, t)
    affinity: Floats = (0.5 + alike @ clicks) / (1.0 + alike.sum(-1))
    return affinity


def best_mean_choice(observation: Mapping[str, Any]) -> int:
    """Choose the film that other training users rated highest (smoothed): the heuristic to beat.

    Args:
        observation: What a RecommendationClicks environment shows.

    Returns:
        The index of the candidate, the first of equals.
    """
    return int(np.argmax(observation["features"][:, FEATURE_NAMES.index("mean_rating")]))


# --- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Viewer:
    """A user of MovieLens.

    Attributes:
        user: The user id in the data.
        films: How many films they rated.
    """

    user: int
    films: int

    @property
    def id(self) -> str:
        """``user/<user id>``."""
        return f"user/{self.user}"

    @property
    def unit(self) -> str:
        """The user too: sessions of one user depend on each other."""
        return self.id


Served: TypeAlias = Viewer | SimulatedUser


class Replies(Protocol):
    """What a user says in a session; both methods look at the step that is due.

    ``chosen`` is which candidate each step so far recommended, fewer than T.
    """

    def chances(self, chosen: Sequence[int]) -> Floats:
        """Return the probability of a click on each candidate, (k,)."""
        ...

    def clicks(self, chosen: Sequence[int]) -> Floats:
        """Return 1 for each candidate that would be clicked, else 0, (k,)."""
        ...


@dataclass(frozen=True, slots=True)
class LoggedReplies:
    """Replies that are on record: whatever was recommended before, a click is sure or excluded.

    Attributes:
        clicked: (T, k) 1 where the user would click, else 0.
    """

    clicked: Floats

    def chances(self, chosen: Sequence[int]) -> Floats:
        """Return the clicks."""
        return self.clicks(chosen)

    def clicks(self, chosen: Sequence[int]) -> Floats:
        """Return the clicks of the step that is due, (k,)."""
        clicked: Floats = self.clicked[len(chosen)].copy()
        return clicked


@dataclass(frozen=True, slots=True)
class Session:
    """What one session of T recommendations offers, and what was recommended so far.

    Attributes:
        films: (T, k) int64, the rows of the candidates in the film table.
        texts: T times k candidate texts.
        features: (T, k, 3 + len(GENRES)) float64, `film_features` of the candidates.
        replies: What the user says.
        chosen: For each step taken, which candidate was recommended, 0 to k - 1.
        clicked: For each step taken, 1 if the user clicked, else 0.
    """

    films: NDArray[np.int64]
    texts: tuple[tuple[str, ...], ...]
    features: Floats
    replies: Replies
    chosen: tuple[int, ...] = ()
    clicked: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class _Catalogue:
    """A data set as tasks use it; made once for all splits and environments."""

    ratings: Ratings
    statistics: FilmStatistics
    genres: Floats  # (m, g) ones and zeros: GENRES, then the other genres of the set
    years: Floats  # (m,) NaN where unknown
    training_users: int


@lru_cache(maxsize=4)
def _catalogue(ratings: Ratings) -> _Catalogue:
    others = sorted({genre for genres in ratings.genres for genre in genres} - set(GENRES))
    column = {genre: i for i, genre in enumerate((*GENRES, *others))}
    genres = np.zeros((len(ratings.genres), len(column)))
    for film, names in enumerate(ratings.genres):
        genres[film, [column[name] for name in names]] = 1.0
    years = np.array([np.nan if year is None else year for year in ratings.years], np.float64)
    training_users = len(ratings.users_in("train"))
    return _Catalogue(ratings, FilmStatistics.of(ratings), genres, years, training_users)


class RecommendationClicks(ChoosingTask[Served]):
    """Recommend films to a user, one at a time, and see each click at once.

    ## Description
    A session with a real user. Each step offers k films, all of which the user really rated, with
    title, year, genres and how other users rated them; one is recommended. The user clicks if
    they gave it 4 stars or more, so feedback is real and not simulated. What was recommended and
    how the user took it stands in the prompt of the next step.

    What is shown of a film is computed from training users only, and never from the user who is
    being served: their own ratings show in the replies alone. A film that nobody else rated shows
    the mean of all ratings and a count of 0.

    With ``dataset="simulated"`` films and users are made up, without any content of MovieLens, for
    what logged ratings cannot show: any film of a catalogue of 2,000 can be offered, sessions can
    be long, and what was recommended changes what comes, as users tire of what is like the last
    three films, and tastes drift. `llm_envs.tasks.simulated_users` has the model. What is shown of
    a film is computed in the same way, from ratings that simulated training users gave before any
    session.

    ## Action Space
    ``Discrete(k)``: which candidate to recommend.

    ## Observation Space
    ``Dict``:
    - ``prompt``: the conversation so far. It ends in ``Assistant:`` while a recommendation is due
      and is append-only: ``prompt[t+1].startswith(prompt[t] + candidates[t][action])``.
    - ``candidates``: k texts such as `` Heat (1995): Action, Crime, Thriller. Rated 4.0 by 85.``,
      each with a leading space; empty after the last step.
    - ``features``: (k, 24) float32 in [0, 1]. `FEATURE_NAMES` names the columns: the mean rating
      and the number of ratings that the text tells too, the year, the genres, and how the user
      took to recommended films of like genres and like years. Zero after the last step.

    ## Starting State
    A user drawn uniformly from the split (``options={"example": "user/<id>" or index}`` chooses
    one; "simulated/<number>" in the simulated set), and disjoint sets of k of their films drawn
    uniformly, a set for each step; of all films in the simulated set.

    ## Rewards
    The score is 1 for a click, else 0. It is mapped linearly to ``reward_range``. A simulated click
    is drawn with a known probability; everybody who plays an episode meets the same draws.

    ## Episode End
    Terminates after 4 recommendations or ``max_turns``, or before that when the user has fewer
    than k films left (after at least one). Never truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after a step ``score``, ``score/click``, ``best_score``
    (1 if any candidate would have been clicked: regret is exact) and ``feedback`` too.
    ``env.unwrapped.candidate_scores`` has the score of every candidate, for oracles and evaluation.

    In the simulated set the latter two are probabilities of a click, after what was recommended so
    far: nobody can foresee a draw, so regret to the best draw would be luck. Regret is exact in
    expectation, and the regret of a single step can be negative. The oracle of a step is not the
    best player of a session, as users tire: ``env.unwrapped.task.optimal_choices(episode)`` is.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all"; by user.
    - ``dataset``: "movielens_small" (embedded); the path of a folder in either format of
      MovieLens (``ratings.csv`` and ``movies.csv``, or ``u.data`` and ``u.item``); or "simulated".
    - ``dataset_format``: "movielens_csv" or "movielens_100k", for a folder that holds both.
    - ``skip_bad_records``: skip malformed lines with a warning that counts them;
      ``env.unwrapped.task.skipped`` is how many.
    - ``max_turns``: recommend at most this many times in a session (4). ``None`` is 4 too. More
      than 2,000 / k are refused in the simulated set.
    - ``choices``: k, the number of candidates (5). Users with fewer films are left out, with a
      warning that counts them.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Harper and Konstan (2015), The MovieLens Datasets: History and Context,
    https://doi.org/10.1145/2827872. The embedded data may be used for research only; the simulated
    set has no such limits.

    ## Version History
    * v0: initial version.
    """

    episodes_per_example = 5  # a session shows 20 of the films that a user rated, 149 on average

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str | Path = "movielens_small",
        dataset_format: str | None = None,
        skip_bad_records: bool = False,
        max_turns: int | None = None,
        choices: int = 5,
    ) -> None:
        turns = whole_number("max_turns", DEFAULT_TURNS if max_turns is None else max_turns)
        choices = whole_number("choices", choices, least=2)
        if isinstance(dataset, str) and dataset.startswith("hf:"):
            raise ValueError(
                f"Dataset {dataset!r} is a hub set, and ratings are read from folders only. "
                "Download it and give the folder that holds ratings.csv and movies.csv."
            )
        skip = check_flag("skip_bad_records", skip_bad_records)
        self.examples: tuple[Served, ...]
        if dataset == SIMULATED:
            _check_simulated(turns, choices, dataset_format)
            ratings = make_ratings()
            self.examples, self.left_out = users_in(split), 0
        else:
            ratings = load_movielens(
                dataset,
                dataset_format=dataset_format,
                skip_bad_lines=skip,
                others=(SIMULATED,),
            )
            self.examples, self.left_out = _viewers(ratings, split, choices)
        # Only now, as the space of a billion choices would fill the memory.
        super().__init__(choices, len(FEATURE_NAMES))
        self.choices = choices
        self.max_turns = turns
        self.skipped = ratings.skipped_lines
        self._catalogue = _catalogue(ratings)
        if self.left_out:
            warnings.warn(
                f"Left out {self.left_out} user(s) of the split {split!r}, who rated fewer films "
                f"than choices={choices}.",
                stacklevel=2,
            )

    def planned_turns(self, example: Served) -> int:
        """Return the number of recommendations in a session with the user, at least 1."""
        return min(self.max_turns, example.films // self.choices)

    def begin(self, example: Served, rng: np.random.Generator) -> Episode[Served]:
        """Draw what the session offers and open it."""
        known, ratings = self._catalogue, self._catalogue.ratings
        shape = self.planned_turns(example), self.choices
        films, replies = _draw(ratings, example, shape, rng)
        counts, means = known.statistics.for_user(example.user, films)
        told = zip(*(a.ravel().tolist() for a in (films, means, counts)), strict=True)
        texts = [
            candidate_text(ratings.titles[f], ratings.years[f], ratings.genres[f], mean, count)
            for f, mean, count in told
        ]
        session = Session(
            films=films,
            texts=tuple(tuple(texts[i : i + shape[1]]) for i in range(0, len(texts), shape[1])),
            features=film_features(
                means, counts, known.years[films], known.genres[films], known.training_users
            ),
            replies=replies,
        )
        messages = ({"role": "user", "content": OPENING},)
        observation = self._offer(opening(), session)
        return Episode(example, rng, observation, messages, state=session)

    def score(self, episodes: Sequence[Episode[Served]], actions: Sequence[int]) -> list[Outcome]:
        """Return the click on each recommended film."""
        outcomes = []
        for episode, action in zip(episodes, actions, strict=True):
            session: Session = episode.state
            click = float(session.replies.clicks(session.chosen)[action])
            outcomes.append(
                Outcome(
                    score=click,
                    parts={"click": click},
                    feedback=describe_reply(click == 1.0),
                    best_score=float(session.replies.chances(session.chosen).max()),
                )
            )
        return outcomes

    def proceed(self, episode: Episode[Served], action: int, outcome: Outcome) -> None:
        """Write down the film and the reply, and offer the next films or finish."""
        session: Session = episode.state
        film = session.texts[len(session.chosen)][action]
        clicked = outcome.score == 1.0
        session = episode.state = replace(
            session,
            chosen=(*session.chosen, int(action)),
            clicked=(*session.clicked, float(clicked)),
        )
        episode.finished = len(session.chosen) == len(session.texts)
        if episode.finished:
            said, tail = outcome.feedback, f"\nUser: {outcome.feedback}"
        else:
            said, tail = next_request(clicked), next_prompt(clicked)
        episode.observation = self._offer(episode.observation["prompt"] + film + tail, session)
        episode.messages += (
            {"role": "assistant", "content": film.strip()},
            {"role": "user", "content": said},
        )

    def candidate_scores(self, episode: Episode[Served]) -> Floats | None:
        """Return the click on each candidate of the current step, (k,); None when all is over.

        In the simulated set it is the probability of a click.
        """
        if episode.finished:
            return None
        session: Session = episode.state
        return session.replies.chances(session.chosen)

    def optimal_choices(self, episode: Episode[Served]) -> list[int]:
        """Return the choices of a whole session that earn the most clicks in expectation.

        Their player knows the user; see `simulated_users.optimal_choices`. Where clicks are on
        record, it is the best candidate of each step.
        """
        replies = episode.state.replies
        if isinstance(replies, Visit):
            return optimal_choices(replies)
        best: list[int] = replies.clicked.argmax(1).tolist()
        return best

    def _offer(self, prompt: str, session: Session) -> dict[str, Any]:
        """Return the observation of the step that is due, or the one after the last."""
        turn = len(session.chosen)
        if turn == len(session.texts):
            features = np.zeros((self.choices, len(FEATURE_NAMES)), np.float32)
            return {"prompt": prompt, "candidates": ("",) * self.choices, "features": features}
        films, clicks = session.films[turn], np.array(session.clicked)
        past = session.films[np.arange(turn), session.chosen] if turn else session.films[0, :0]
        genres, years = self._catalogue.genres, self._catalogue.years
        taste = taste_features(genres[films], years[films], genres[past], years[past], clicks)
        features = np.concatenate((session.features[turn], taste), axis=1, dtype=np.float32)
        return {"prompt": prompt, "candidates": session.texts[turn], "features": features}


def _draw(
    ratings: Ratings,
    viewer: Served,
    shape: tuple[int, int],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], Replies]:
    """Draw the films that each step offers, (T, k) rows of the film table, and the replies."""
    if isinstance(viewer, SimulatedUser):
        return open_visit(viewer, *shape, rng)
    mine = ratings.rows_of(viewer.user)
    rows = mine.start + rng.choice(viewer.films, size=shape, replace=False)
    return ratings.movies[rows], LoggedReplies(ratings.clicked[rows].astype(np.float64))


def _check_simulated(turns: int, choices: int, dataset_format: str | None) -> None:
    """Refuse what the simulated set cannot serve.

    Raises:
        ValueError: The catalogue has too few films, or there is a format, which it has none of.
    """
    if turns * choices > FILMS:
        raise ValueError(
            f"max_turns={turns} times choices={choices} films are needed, and the simulated "
            f"catalogue has {FILMS:,}. Give fewer turns or choices."
        )
    if dataset_format is not None:
        raise ValueError(
            f"dataset_format is {dataset_format!r}, and the simulated set is read from no file. "
            "Leave it out."
        )


def _viewers(ratings: Ratings, split: Split, choices: int) -> tuple[tuple[Viewer, ...], int]:
    """Return the users of a split who rated enough films for a choice, and how many did not.

    Raises:
        ValueError: There is no such user.
    """
    users = ratings.users_in(split)
    first, end = np.searchsorted(ratings.users, (users, users + 1))
    rated = zip(users.tolist(), (end - first).tolist(), strict=True)
    viewers = tuple(Viewer(user, films) for user, films in rated if films >= choices)
    if not viewers:
        counts = ", ".join(f"{name} {ratings.user_splits.count(name)}" for name in SPLITS)
        raise ValueError(
            f"No user of the split {split!r} rated the choices={choices} films of one step (the "
            f"splits have these users: {counts}). Give fewer choices or more data, or load "
            'split="all".'
        )
    return viewers, len(users) - len(viewers)
