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

import csv
import gzip
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable
from operator import index
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, SupportsIndex, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm_envs.datasets.splits import SPLITS, Split, check_split, did_you_mean, split_of

EMBEDDED: Final[Traversable] = files("llm_envs") / "datasets" / "embedded" / "movielens_small"
"""The folder of the embedded set: MovieLens latest-small of 2016."""

LIKED_FROM: Final = 4.0
"""A rating of this many stars or more is a click."""

FORMATS: Final = {
    "movielens_csv": ("ratings.csv", "movies.csv"),
    "movielens_100k": ("u.data", "u.item"),
}
"""The folder formats: the name of each, and the files it is recognised by (or the same + .gz)."""

# The 19 flags at the end of a line of u.item, as the set's own u.genre lists them. "Children's"
# takes the name it has in every later set, so that a genre is one word whatever the folder.
# fmt: off
_FLAGS: Final = (
    "unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)
# fmt: on
_NO_GENRES: Final = ("", "(no genres listed)")
# "(V)" marks films made for video in u.item.
_TITLE_WITH_YEAR: Final = re.compile(r"(.*\S)\s*\((\d{4})\)(?: \(V\))?\s*")
_RELEASE_DATE: Final = re.compile(r"\d{1,2}-[A-Za-z]{3}-(\d{4})")
_STEP: Final = 0.5  # ratings are half stars,
_LOWEST: Final = 0.5  # from half a star
_HIGHEST: Final = 5.0  # to five
_TOO_LARGE: Final = 2**53  # for an id or a time; beyond it, floats of other tools lose digits


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
        stars = np.rint(ratings.rating[mine] / _STEP).astype(np.int64)
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
        middle = (_LOWEST + _HIGHEST) / 2 if self.of_what == "stars" else 0.5
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
        return _STEP if self.of_what == "stars" else 1.0


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


# --- reading a folder ----------------------------------------------------------------------------


def load_movielens(
    folder: str | Path | Traversable,
    *,
    skip_bad_lines: bool = False,
    dataset_format: str | None = None,
) -> Ratings:
    """Read a folder of MovieLens data in either official format, recognised by its files.

    - ``ratings.csv`` and ``movies.csv`` (MovieLens 20M and every later set): UTF-8,
      comma-separated, with a header; the year stands at the end of the title.
    - ``u.data`` and ``u.item`` (MovieLens 100k): Latin-1, tab- and pipe-separated, 19 genre flags
      and a release date. "Children's" becomes "Children", as in the other sets.

    Either file may be gzipped (``.gz`` added to its name); the plain one is read if both are
    there. Films that nobody rated are kept.

    Args:
        folder: The folder, on disk or inside a package or an archive.
        skip_bad_lines: Leave malformed lines out, count them on the result and warn once, instead
            of refusing the file at the first one.
        dataset_format: ``"movielens_csv"`` or ``"movielens_100k"``, for a folder that holds both.

    Raises:
        FileNotFoundError: The folder, or a file of it, is missing.
        ValueError: A line is malformed (the message names file, line, field, cause and cure), or
            no rating is left, or the folder's format cannot be told.
    """
    root = Path(folder) if isinstance(folder, str) else folder
    lines = _BadLines(skip=skip_bad_lines)
    ratings_file, movies_file = _recognise(root, dataset_format)
    is_csv = ratings_file.name.startswith("ratings.csv")

    movies_data, movies_hash = _read(movies_file)
    ratings_data, ratings_hash = _read(ratings_file)
    # Bytes that are not UTF-8 become lone surrogates, and the lines that hold one are refused.
    ratings_text = ratings_data.decode("utf-8", "surrogateescape")
    if is_csv:
        movies_text = movies_data.decode("utf-8", "surrogateescape")
        _check_header(movies_text, movies_file.name, _CSV_FIELDS)
        _check_header(ratings_text, ratings_file.name, _RATING_FIELDS)
        parse, separator = _film_of_csv, ","
    else:
        movies_text = movies_data.decode("latin-1")
        parse, separator = _film_of_item, "\t"

    films = _films(movies_text, movies_file.name, parse, is_csv, lines)
    movie_ids = np.array(sorted(films), dtype=np.int64)
    table = _ratings(ratings_text, ratings_file.name, separator, is_csv, movie_ids, lines)
    lines.warn()
    if not len(table):
        raise ValueError(
            f"{ratings_file.name} holds no good rating. Pass a folder whose ratings file has some."
        )

    users, movies = table["user"].copy(), np.searchsorted(movie_ids, table["movie"])
    times = table["timestamp"].copy()
    order = np.lexsort((movies, times, users))
    ordered = [films[movie] for movie in movie_ids.tolist()]
    return Ratings(
        users=users[order],
        movies=movies[order],
        rating=table["rating"].astype(np.float32)[order],
        timestamp=times[order],
        movie_ids=movie_ids,
        titles=tuple(film.title for film in ordered),
        years=tuple(film.year for film in ordered),
        genres=tuple(film.genres for film in ordered),
        sha256={ratings_file.name: ratings_hash, movies_file.name: movies_hash},
        skipped_lines=lines.count,
    )


def _recognise(
    root: Path | Traversable, dataset_format: str | None
) -> tuple[Path | Traversable, Path | Traversable]:
    """Return the ratings file and the films file of a folder."""
    if dataset_format is not None and dataset_format not in FORMATS:
        raise ValueError(
            f"Dataset format {dataset_format!r} does not exist."
            f"{did_you_mean(dataset_format, FORMATS)} Use one of {', '.join(FORMATS)}."
        )
    expected = " or ".join(f"{ratings} and {movies}" for ratings, movies in FORMATS.values())
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root} is no folder. Pass the folder that holds {expected} (unpack an archive first)."
        )
    found = {
        name: [_plain_or_gzipped(root, part) for part in parts]
        for name, parts in FORMATS.items()
        if dataset_format in (None, name)
    }
    begun = {name: parts for name, parts in found.items() if any(parts)}
    complete = [parts for parts in begun.values() if all(parts)]
    if len(complete) > 1:
        raise ValueError(
            f"{root} holds two data sets, {expected}. "
            f"Pass dataset_format= {' or '.join(map(repr, FORMATS))} to say which."
        )
    if complete:
        ratings, movies = complete[0]
        return cast("tuple[Path, Path]", (ratings, movies))
    for name, parts in begun.items():
        has, lacks = sorted(
            FORMATS[name], key=lambda part: parts[FORMATS[name].index(part)] is None
        )
        raise FileNotFoundError(f"{root} holds {has} but no {lacks}. Put {lacks} beside it.")
    raise FileNotFoundError(f"{root} holds no MovieLens data. Expected are {expected}.")


def _plain_or_gzipped(root: Path | Traversable, name: str) -> Path | Traversable | None:
    candidates = (root.joinpath(name), root.joinpath(f"{name}.gz"))
    return next((file for file in candidates if file.is_file()), None)


def _read(file: Path | Traversable) -> tuple[bytes, str]:
    """Return a file's content, unpacked and without a byte order mark, and its stored hash."""
    stored = file.read_bytes()
    data = stored
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(stored)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{file.name} cannot be unpacked ({error}). Fetch or pack the file again."
            ) from error
    return data.removeprefix(b"\xef\xbb\xbf"), hashlib.sha256(stored).hexdigest()


@dataclass
class _BadLines:
    """Refuses malformed lines, or counts them where they are to be skipped."""

    skip: bool
    count: int = 0
    first: str = ""

    def add(self, file: str, number: int, problem: _MalformedError) -> None:
        message = f"{file}, line {number}, field {problem.field}: {problem}"
        if not self.skip:
            raise ValueError(
                f"{message} Or pass skip_bad_lines=True to leave such lines out and count them."
            ) from None
        self.count += 1
        self.first = self.first or message

    def warn(self) -> None:
        if self.count:
            warnings.warn(
                f"Skipped {self.count} bad line(s). The first: {self.first}", stacklevel=3
            )


class _MalformedError(Exception):
    """A field of a line is not as it should be; the text says what is wrong and the cure."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


def _numbered_lines(text: str, *, skip_rows: int) -> Iterator[tuple[int, str]]:
    """Yield each line that is not blank with its number (the first is 1), after a header.

    Not str.splitlines, which also breaks at characters that can stand in a title.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if number > skip_rows and line.strip():
            yield number, line


def _split(line: str, separator: str, names: tuple[str, ...]) -> list[str]:
    fields = line.split(separator)
    _check_width(fields, names)
    return fields


def _check_width(fields: list[str], names: tuple[str, ...]) -> None:
    if len(fields) != len(names):
        raise _MalformedError(
            names[len(fields)] if len(fields) < len(names) else str(len(names) + 1),
            f"the line has {len(fields)} fields and not {len(names)}. "
            "Complete it, or quote a field that holds the separator.",
        )


def _check_header(text: str, file: str, names: tuple[str, ...]) -> None:
    """Refuse a file whose first line is not its header: its columns could mean anything."""
    first, header = text.partition("\n")[0].strip(), ",".join(names)
    if first != header:
        raise ValueError(
            f"{file}, line 1, field header: {first[:80]!r} is not {header!r}. "
            "Write that header and order the columns by it."
        )


def _whole_number(text: str, name: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < _TOO_LARGE:
        raise _MalformedError(name, f"{text[:80]!r} is not a whole number from 0. Write one.")
    return number


# --- films ---------------------------------------------------------------------------------------


class _Film(NamedTuple):
    id: int
    title: str
    year: int | None
    genres: tuple[str, ...]


_CSV_FIELDS: Final = ("movieId", "title", "genres")
_ITEM_FIELDS: Final = (
    "movie id",
    "movie title",
    "release date",
    "video release date",
    "IMDb URL",
    *(f"flag {genre}" for genre in _FLAGS),
)


def _films(
    text: str, file: str, parse: Callable[[str], _Film], header: bool, lines: _BadLines
) -> dict[int, _Film]:
    """Return the films of a file by their MovieLens id."""
    films: dict[int, _Film] = {}
    for number, line in _numbered_lines(text, skip_rows=int(header)):
        try:
            film = parse(line)
            if film.id in films:
                raise _MalformedError(
                    "movieId", f"film {film.id} was already described above. Keep one of the lines."
                )
            films[film.id] = film
        except _MalformedError as problem:
            lines.add(file, number, problem)
    return films


def _film_of_csv(line: str) -> _Film:
    try:
        # Most titles need no quotes, and a plain split is three times faster.
        fields = next(csv.reader([line], strict=True)) if '"' in line else line.split(",")
    except csv.Error as error:
        raise _MalformedError(
            "title",
            f"its quotes are wrong ({error}). Put the title in quotes, and double those inside it.",
        ) from None
    _check_width(fields, _CSV_FIELDS)
    movie, title, genres = fields
    try:
        line.encode()
    except UnicodeEncodeError:  # a lone surrogate, put there for a byte that could not be decoded
        raise _MalformedError("title", "it is not UTF-8. Save the file as UTF-8.") from None
    listed = () if genres in _NO_GENRES else tuple(genres.split("|"))
    return _Film(_whole_number(movie, "movieId"), *_title_and_year(title, "title"), listed)


def _film_of_item(line: str) -> _Film:
    movie, title, released, _, _, *flags = _split(line, "|", _ITEM_FIELDS)
    for genre, flag in zip(_FLAGS, flags, strict=True):
        if flag not in ("0", "1"):
            raise _MalformedError(f"flag {genre}", f"{flag[:80]!r} is neither 0 nor 1. Write one.")
    genres = tuple(g for g, flag in zip(_FLAGS, flags, strict=True) if flag == "1")
    text, year = _title_and_year(title, "movie title")
    if year is None and (date := _RELEASE_DATE.fullmatch(released)):
        year = int(date[1])
    number = _whole_number(movie, "movie id")
    return _Film(number, text, year, tuple(genre for genre in genres if genre != "unknown"))


def _title_and_year(title: str, name: str) -> tuple[str, int | None]:
    """Split "Heat (1995)" into "Heat" and 1995; a title without a year is kept whole."""
    if not title.strip():
        raise _MalformedError(name, "the film has no title. Write one or remove the line.")
    match = _TITLE_WITH_YEAR.fullmatch(title)
    return (match[1].strip(), int(match[2])) if match else (title.strip(), None)


# --- ratings -------------------------------------------------------------------------------------

_RATING: Final = np.dtype(
    [("user", np.int64), ("movie", np.int64), ("rating", np.float64), ("timestamp", np.int64)]
)
_WHOLE: Final = ("user", "movie", "timestamp")
_RATING_FIELDS: Final = ("userId", "movieId", "rating", "timestamp")


def _ratings(
    text: str,
    file: str,
    separator: str,
    header: bool,
    movie_ids: NDArray[np.int64],
    lines: _BadLines,
) -> NDArray[np.void]:
    """Return (n,) records of `_RATING` in the order of the file."""
    # A hundred thousand lines at C speed if all are well; otherwise find out which are not.
    table = _ratings_at_once(text, separator, skip_rows=int(header))
    if table is not None and _all_good(table, movie_ids):
        return table
    return _ratings_line_by_line(text, file, separator, header, movie_ids, lines)


def _ratings_at_once(text: str, separator: str, *, skip_rows: int) -> NDArray[np.void] | None:
    """Return the table, or None if some line is not four numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy warns of no data, and of 1.5 as a whole number
            return np.loadtxt(
                io.StringIO(text),
                dtype=_RATING,
                delimiter=separator,
                comments=None,
                skiprows=skip_rows,
                ndmin=1,
            )
    except (ValueError, OverflowError, Warning):
        return None


def _all_good(table: NDArray[np.void], movie_ids: NDArray[np.int64]) -> bool:
    """Return whether every check of `_ratings_line_by_line` would pass."""
    if not len(table) or not len(movie_ids):
        return False
    steps = table["rating"] / _STEP
    film = np.minimum(np.searchsorted(movie_ids, table["movie"]), len(movie_ids) - 1)
    user = np.unique(table["user"], return_inverse=True)[1]
    pairs = np.sort(user * len(movie_ids) + film)
    return bool(
        all(table[name].min() >= 0 and table[name].max() < _TOO_LARGE for name in _WHOLE)
        and ((table["rating"] >= _LOWEST) & (table["rating"] <= _HIGHEST)).all()
        and (steps == np.rint(steps)).all()
        and (movie_ids[film] == table["movie"]).all()
        and (pairs[1:] != pairs[:-1]).all()
    )


def _ratings_line_by_line(
    text: str,
    file: str,
    separator: str,
    header: bool,
    movie_ids: NDArray[np.int64],
    lines: _BadLines,
) -> NDArray[np.void]:
    known, seen = set(movie_ids.tolist()), set[tuple[int, int]]()
    good: list[tuple[int, int, float, int]] = []
    for number, line in _numbered_lines(text, skip_rows=int(header)):
        try:
            rating = _rating_of(line, separator, known)
            if rating[:2] in seen:
                raise _MalformedError(
                    "movieId",
                    f"user {rating[0]} rated film {rating[1]} already. Keep one of the lines.",
                )
            seen.add(rating[:2])
            good.append(rating)
        except _MalformedError as problem:
            lines.add(file, number, problem)
    return np.array(good, dtype=_RATING)


def _rating_of(line: str, separator: str, known: set[int]) -> tuple[int, int, float, int]:
    user, movie, stars, timestamp = _split(line, separator, _RATING_FIELDS)
    film = _whole_number(movie, "movieId")
    if film not in known:
        raise _MalformedError(
            "movieId",
            f"film {film} is not in the films file. Describe it there, or remove the line.",
        )
    try:
        value = float(stars)
    except ValueError:
        value = float("nan")
    if not (_LOWEST <= value <= _HIGHEST and (value / _STEP).is_integer()):
        raise _MalformedError(
            "rating", f"{stars[:80]!r} is not 0.5 to 5 in steps of 0.5. Write stars on that scale."
        )
    return (
        _whole_number(user, "userId"),
        film,
        value,
        _whole_number(timestamp, "timestamp"),
    )
