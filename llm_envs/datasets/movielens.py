"""MovieLens: who rated which film how, read from a folder in either official format.

The data is by GroupLens Research (Harper and Konstan, 2015, https://doi.org/10.1145/2827872) and
may be used for research, not commercially; the terms stand beside the embedded set.

    ratings = load_movielens(EMBEDDED)
    statistics = FilmStatistics.of(ratings)
    user = ratings.users_in("validation")[0]
    films = ratings.movies[ratings.rows_of(user)]
    counts, means = statistics.for_user(user, films)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from operator import index
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_envs.datasets.movielens_files import (
    FORMATS,
    HIGHEST,
    LOWEST,
    STEP,
    find_files,
    read_files,
)
from llm_envs.datasets.splits import SPLITS, Split, check_split, did_you_mean, split_of

__all__ = ["EMBEDDED", "FORMATS", "LIKED_FROM", "FilmStatistics", "Ratings", "load_movielens"]

EMBEDDED: Final[Traversable] = files("llm_envs") / "datasets" / "embedded" / "movielens_small"
"""The folder of the embedded set: MovieLens latest-small of 2016."""

LIKED_FROM: Final = 4.0


@dataclass(frozen=True, eq=False)
class Ratings:
    """Every rating of a MovieLens folder, and the films they are about. Never changes.

    The ratings are ordered by user, then time, then movie id, whatever the order of the file, so
    a user's ratings are one slice: the same history however the file was sorted.

    Attributes:
        users: (n,) int64, the user id of each rating.
        movies: (n,) int64, the film of each rating, a row of the film table below.
        rating: (n,) float32, stars: 0.5 to 5 in steps of 0.5.
        timestamp: (n,) int64, seconds since 1970 (UTC).
        movie_ids: (m,) int64, ascending: MovieLens's own id of each film.
        titles: (m,) without the year, as MovieLens has them ("American President, The").
        years: (m,) year of release, None where the data gives none.
        genres: (m,) the genres of each film; empty for "(no genres listed)" and "unknown".
        sha256: The name of each file that was read and the SHA-256 of its bytes as stored.
        skipped_lines: How many bad lines were left out (0 unless that was asked for).
    """

    users: NDArray[np.int64]
    movies: NDArray[np.int64]
    rating: NDArray[np.float32]
    timestamp: NDArray[np.int64]
    movie_ids: NDArray[np.int64]
    titles: tuple[str, ...]
    years: tuple[int | None, ...]
    genres: tuple[tuple[str, ...], ...]
    sha256: dict[str, str] = field(default_factory=dict)
    skipped_lines: int = 0

    def __post_init__(self) -> None:
        for array in (self.users, self.movies, self.rating, self.timestamp, self.movie_ids):
            array.setflags(write=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ratings:
        """Return itself: it never changes, and environments are copied by the thousand."""
        return self

    @cached_property
    def clicked(self) -> NDArray[np.bool_]:
        """(n,) whether each rating is a click: `LIKED_FROM` stars or more."""
        return self.rating >= LIKED_FROM

    @cached_property
    def user_ids(self) -> NDArray[np.int64]:
        """(u,) the id of each user, ascending."""
        return np.unique(self.users)

    @cached_property
    def user_splits(self) -> tuple[str, ...]:
        """(u,) the split of each user in `user_ids`: by the hash of the id, so it never moves."""
        return tuple(split_of(str(user)) for user in self.user_ids.tolist())

    def users_in(self, split: Split) -> NDArray[np.int64]:
        """Return the ids of a split's users, ascending; every user's for ``"all"``.

        Raises:
            ValueError: There is no such split.
        """
        wanted = SPLITS if check_split(split) == "all" else (split,)
        return self.user_ids[[own in wanted for own in self.user_splits]]

    def rows_of(self, user: SupportsIndex) -> slice:
        """Return where the ratings of a user stand, oldest first.

        Raises:
            KeyError: No rating is by this user.
        """
        user = index(user)
        first, end = np.searchsorted(self.users, (user, user + 1))
        if first == end:
            raise KeyError(f"User {user} rated no film. `user_ids` lists those who did.")
        return slice(int(first), int(end))


# --- what is known of a film ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class FilmStatistics:
    """How training users rated each film, as it may be shown to one user.

    Ratings by validation and test users are never counted, and neither is any rating of the user
    who is being served: with their own rating in it, a training user's figure would give away
    part of the answer. For a user u and a film f that c other training users rated, with mean x̄,

        figure(u, f) = (c · x̄ + s · prior(u)) / (c + s)

    where s is the smoothing, in ratings, and prior(u) is the mean over all ratings (of all films)
    by training users other than u. A film that nobody else rated shows the prior and a count of 0.

    The defaults are the best simple heuristic on training users of the embedded set: choosing the
    film with the highest figure out of 5 earns 0.716 clicks a step, raw mean stars 0.712, and the
    fraction of clicks at its best smoothing 0.712.

    Attributes:
        of_what: What is averaged: ``"stars"`` (0.5 to 5) or ``"clicks"`` (the fraction of
            ratings that are clicks, 0 to 1).
        smoothing: s, how many ratings the prior counts for.
    """

    of_what: Literal["stars", "clicks"]
    smoothing: float
    _users: NDArray[np.int64] = field(repr=False)  # (t + 1,) training users, ascending; sentinel
    _user_counts: NDArray[np.int64] = field(repr=False)  # (t + 1,) 0 for the sentinel, also below
    _user_totals: NDArray[np.int64] = field(repr=False)
    _film_counts: NDArray[np.int64] = field(repr=False)  # (m,)
    _film_totals: NDArray[np.int64] = field(repr=False)  # (m,) in units of _unit, hence exact
    _own_keys: NDArray[np.int64] = field(repr=False)  # (r + 1,) user row · m + film; sentinel
    _own_values: NDArray[np.int64] = field(repr=False)  # (r + 1,)

    @classmethod
    def of(
        cls,
        ratings: Ratings,
        *,
        of_what: Literal["stars", "clicks"] = "stars",
        smoothing: float = 5.0,
    ) -> FilmStatistics:
        """Count the ratings by training users.

        Args:
            ratings: The ratings; those by validation and test users are not looked at.
            of_what: What is averaged, ``"stars"`` or ``"clicks"``.
            smoothing: How many ratings the prior counts for, 0 or more; 0 gives raw means.

        Raises:
            ValueError: An argument is not one of these.
        """
        if of_what not in ("stars", "clicks"):
            raise ValueError(f'of_what is {of_what!r}. Use "stars" or "clicks".')
        if not 0 <= smoothing < np.inf:
            raise ValueError(f"smoothing is {smoothing!r}. Use a finite number, 0 or more.")
        training = ratings.users_in("train")
        mine = np.isin(ratings.users, training)
        rows, films = np.searchsorted(training, ratings.users[mine]), ratings.movies[mine]
        # Whole numbers, so that taking a user's own ratings away again leaves no rounding error.
        stars = np.rint(ratings.rating[mine] / STEP).astype(np.int64)
        values = stars if of_what == "stars" else ratings.clicked[mine].astype(np.int64)
        n_films, n_users = len(ratings.movie_ids), len(training)
        keys = rows * n_films + films
        order = np.argsort(keys)
        return cls(
            of_what=of_what,
            smoothing=float(smoothing),
            _users=np.append(training, np.iinfo(np.int64).max),
            _user_counts=_sums(rows, np.ones_like(values), n_users + 1),
            _user_totals=_sums(rows, values, n_users + 1),
            _film_counts=_sums(films, np.ones_like(values), n_films),
            _film_totals=_sums(films, values, n_films),
            _own_keys=np.append(keys[order], np.iinfo(np.int64).max),
            _own_values=np.append(values[order], 0),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> FilmStatistics:
        """Return itself: it never changes."""
        return self

    def prior(self, user: ArrayLike) -> NDArray[np.float64]:
        """Return the mean over every rating by training users other than ``user``.

        Args:
            user: User ids, of any shape and any split.

        Returns:
            The prior of each, of the shape of ``user``; the middle of the scale if nobody else
            rated anything.
        """
        row, _ = _find(self._users, np.asarray(user, dtype=np.int64))
        count, total = self._all
        counts, totals = count - self._user_counts[row], total - self._user_totals[row]
        middle = (LOWEST + HIGHEST) / 2 if self.of_what == "stars" else 0.5
        return np.where(counts > 0, self._unit * totals / np.maximum(counts, 1), middle)

    def for_user(
        self, user: ArrayLike, movies: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return what may be shown to a user about some films.

        Args:
            user: A user id of any split, or several: broadcast against ``movies``, so that
                (n, 1) ids and (n, k) films serve n users in one call.
            movies: Rows of the film table, 0 to m - 1.

        Returns:
            How many other training users rated each film, and the smoothed mean of what they
            gave it, both of the broadcast shape.
        """
        users, films = np.broadcast_arrays(np.asarray(user, dtype=np.int64), movies)
        row, _ = _find(self._users, users)
        own, rated = _find(self._own_keys, row * len(self._film_counts) + films)
        counts = self._film_counts[films] - rated
        totals = self._film_totals[films] - np.where(rated, self._own_values[own], 0)
        prior = self.prior(user)
        weight = counts + self.smoothing
        smoothed = (self._unit * totals + self.smoothing * prior) / np.where(weight > 0, weight, 1)
        return counts, np.where(counts > 0, smoothed, prior)

    @cached_property
    def _all(self) -> tuple[int, int]:
        return int(self._film_counts.sum()), int(self._film_totals.sum())

    @property
    def _unit(self) -> float:
        return STEP if self.of_what == "stars" else 1.0


def _sums(index: NDArray[np.int64], values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return (size,) the sum of the values that stand at each index."""
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, index, values)
    return sums


def _find(
    ascending: NDArray[np.int64], wanted: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where each wanted number stands (the sentinel's place if nowhere), and if it does."""
    place = np.searchsorted(ascending, wanted)
    found = ascending[place] == wanted
    return np.where(found, place, len(ascending) - 1), found


# --- loading -------------------------------------------------------------------------------------


def load_movielens(
    folder: str | Path | Traversable,
    *,
    skip_bad_lines: bool = False,
    dataset_format: str | None = None,
    others: Sequence[str] = (),
) -> Ratings:
    """Load a folder of MovieLens data in either official format, recognised by its files.

    - ``ratings.csv`` and ``movies.csv`` (MovieLens 20M and every later set): UTF-8,
      comma-separated, with a header; the year stands at the end of the title.
    - ``u.data`` and ``u.item`` (MovieLens 100k): Latin-1, tab- and pipe-separated, 19 genre flags
      and a release date. "Children's" becomes "Children", as in the other sets.

    Either file may be gzipped (``.gz`` added to its name); the plain one is read if both are
    there. Films that nobody rated are kept. A folder is read once a process, unless its files
    change.

    Args:
        folder: ``"movielens_small"``, the embedded set; or a folder, on disk or inside a package
            or an archive.
        skip_bad_lines: Leave malformed lines out, count them on the result and warn of them,
            instead of refusing the file at the first one.
        dataset_format: ``"movielens_csv"`` or ``"movielens_100k"``, for a folder that holds both.
        others: The names of other sets that the caller takes, for messages.

    Raises:
        FileNotFoundError: The folder, or a file of it, is missing.
        ValueError: A line is malformed (the message names file, line, field, cause and cure), or
            no rating is left, or the folder's format cannot be told, or there is no set of this
            name.
    """
    one, other = find_files(_folder(folder, others), dataset_format)
    if isinstance(one, Path) and isinstance(other, Path):
        ratings, complaint = _load_once(_stamped(one), _stamped(other), skip_bad_lines)
    else:  # inside an archive, where no time of change is known
        ratings, complaint = _load(one, other, skip_bad_lines)
    if complaint:
        warnings.warn(complaint, stacklevel=2)
    return ratings


def _folder(folder: str | Path | Traversable, others: Sequence[str]) -> Path | Traversable:
    """Return the folder that is meant; `find_files` sees whether it is one."""
    if isinstance(folder, (Path, Traversable)):
        return folder
    if not isinstance(folder, str):
        raise TypeError(
            f"A data set is a name or a folder, but {folder!r} came. Give {EMBEDDED.name!r} or "
            "the path of a folder."
        )
    if folder == EMBEDDED.name:
        return EMBEDDED
    try:
        path = Path(folder).expanduser()
        if folder and path.exists():  # "" would be the working directory
            return path
    except (OSError, ValueError, RuntimeError):
        pass  # No path at all: too long, a NUL inside, the home of nobody.
    names = (EMBEDDED.name, *others)
    raise ValueError(
        f"Dataset {folder[:80]!r} is neither an embedded set of ratings nor an existing folder."
        f"{did_you_mean(folder, names)} There is {' and '.join(map(repr, names))}; the path of a "
        f"folder that holds {' or '.join(' and '.join(parts) for parts in FORMATS.values())} is "
        "taken too."
    )


class _Stamped(NamedTuple):
    """A file as the cache knows it: written again, it is another one."""

    path: Path
    modified_ns: int
    size: int


def _stamped(file: Path) -> _Stamped:
    status = file.stat()
    return _Stamped(file.absolute(), status.st_mtime_ns, status.st_size)


def _load(
    ratings_file: Path | Traversable, movies_file: Path | Traversable, skip_bad_lines: bool
) -> tuple[Ratings, str]:
    """Return the ratings and what is to be said of skipped lines."""
    content = read_files(ratings_file, movies_file, skip_bad_lines=skip_bad_lines)
    table, films = content.ratings, content.films
    movie_ids = np.array([film.id for film in films], dtype=np.int64)
    movies = np.searchsorted(movie_ids, table["movie"])
    order = np.lexsort((movies, table["timestamp"], table["user"]))
    ratings = Ratings(
        users=table["user"][order],
        movies=movies[order],
        rating=table["rating"].astype(np.float32)[order],
        timestamp=table["timestamp"][order],
        movie_ids=movie_ids,
        titles=tuple(film.title for film in films),
        years=tuple(film.year for film in films),
        genres=tuple(film.genres for film in films),
        sha256=content.sha256,
        skipped_lines=content.skipped_lines,
    )
    return ratings, content.complaint


@lru_cache(maxsize=4)
def _load_once(
    ratings_file: _Stamped, movies_file: _Stamped, skip_bad_lines: bool
) -> tuple[Ratings, str]:
    return _load(ratings_file.path, movies_file.path, skip_bad_lines)
