"""The files of a MovieLens folder, in either official format, and what may be wrong in them.

`llm_envs.datasets.movielens` is the place to load data from; this module reads and checks lines.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from llm_envs.datasets.splits import did_you_mean

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
_WHOLE_NUMBER: Final = re.compile(r"\s*[0-9]+\s*")  # int() takes "1_0" and digits of all scripts
_STARS: Final = re.compile(r"\s*(?:[0-9]+\.?[0-9]*|\.[0-9]+)\s*")
_RELEASE_DATE: Final = re.compile(r"\d{1,2}-[A-Za-z]{3}-(\d{4})")
STEP: Final = 0.5  # ratings are half stars,
LOWEST: Final = 0.5  # from half a star
HIGHEST: Final = 5.0  # to five
_TOO_LARGE: Final = 2**53  # for an id or a time; beyond it, floats of other tools lose digits

RATING: Final = np.dtype(
    [("user", np.int64), ("movie", np.int64), ("rating", np.float64), ("timestamp", np.int64)]
)
"""One rating: who, which film (a MovieLens id), how many stars, when."""


def find_files(
    root: Path | Traversable, dataset_format: str | None
) -> tuple[Path | Traversable, Path | Traversable]:
    """Return the ratings file and the films file of a folder.

    Args:
        root: The folder.
        dataset_format: One of `FORMATS`, for a folder that holds both; ``None`` recognises it.

    Raises:
        FileNotFoundError: The folder, or a file of it, is missing.
        ValueError: There is no such format, or the folder holds both.
    """
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


class Film(NamedTuple):
    """A film: its MovieLens id, its title without the year, the year and the genres."""

    id: int
    title: str
    year: int | None
    genres: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Content:
    """What the two files of a folder hold.

    Attributes:
        films: By ascending id.
        ratings: (n,) records of `RATING`, in the order of the file; every film is in ``films``.
        sha256: The name of each file and the SHA-256 of its bytes as stored.
        skipped_lines: How many bad lines were left out.
        complaint: What to tell the user about them; empty if there are none.
    """

    films: tuple[Film, ...]
    ratings: NDArray[np.void]
    sha256: dict[str, str]
    skipped_lines: int
    complaint: str


def read_files(
    ratings_file: Path | Traversable, movies_file: Path | Traversable, *, skip_bad_lines: bool
) -> Content:
    """Read the ratings and the films of a folder; the name of the former tells the format.

    Raises:
        ValueError: A line is malformed and bad lines are not to be skipped, or a file cannot be
            unpacked, or no rating is left.
    """
    lines = _BadLines(skip=skip_bad_lines)
    is_csv = ratings_file.name.startswith("ratings.csv")
    movies_data, movies_hash = _read(movies_file)
    ratings_data, ratings_hash = _read(ratings_file)
    # Bytes that are not UTF-8 become lone surrogates, and the lines that hold one are refused.
    ratings_text = ratings_data.decode("utf-8", "surrogateescape")
    if is_csv:
        movies_text = movies_data.decode("utf-8", "surrogateescape")
        _check_header(movies_text, str(movies_file), _CSV_FIELDS)
        _check_header(ratings_text, str(ratings_file), _RATING_FIELDS)
        parse, separator = _film_of_csv, ","
    else:
        movies_text = movies_data.decode("latin-1")
        parse, separator = _film_of_item, "\t"

    films = _films(movies_text, str(movies_file), parse, is_csv, lines)
    movie_ids = np.array(sorted(films), dtype=np.int64)
    table = _ratings(ratings_text, str(ratings_file), separator, is_csv, movie_ids, lines)
    if not len(table):
        raise ValueError(
            f"{ratings_file} holds no good rating. Pass a folder whose ratings file has some."
            f"{lines.complaint and ' '}{lines.complaint}"
        )
    return Content(
        films=tuple(films[movie] for movie in movie_ids.tolist()),
        ratings=table,
        sha256={ratings_file.name: ratings_hash, movies_file.name: movies_hash},
        skipped_lines=lines.count,
        complaint=lines.complaint,
    )


def _read(file: Path | Traversable) -> tuple[bytes, str]:
    """Return a file's content, unpacked and without a byte order mark, and its stored hash."""
    stored = file.read_bytes()
    data = stored
    if file.name.endswith(".gz"):
        try:
            data = gzip.decompress(stored)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(
                f"{file} cannot be unpacked ({error}). Fetch or pack the file again."
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
                f"{message} Or pass skip_bad_lines=True (to an environment, skip_bad_records=True) "
                "to leave such lines out and count them."
            ) from None
        self.count += 1
        self.first = self.first or message

    @property
    def complaint(self) -> str:
        return f"Skipped {self.count} bad line(s). The first: {self.first}" if self.count else ""


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
    number = int(text) if len(text) <= 40 and _WHOLE_NUMBER.fullmatch(text) else -1
    if not 0 <= number < _TOO_LARGE:
        raise _MalformedError(name, f"{text[:80]!r} is not a whole number from 0. Write one.")
    return number


# --- films ---------------------------------------------------------------------------------------


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
    text: str, file: str, parse: Callable[[str], Film], header: bool, lines: _BadLines
) -> dict[int, Film]:
    """Return the films of a file by their MovieLens id."""
    films: dict[int, Film] = {}
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


def _film_of_csv(line: str) -> Film:
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
    if not all(map(str.strip, listed)) or len(set(listed)) < len(listed):
        raise _MalformedError(
            "genres", f"{genres[:80]!r} has a blank or repeated genre. Write each once, as A|B."
        )
    return Film(_whole_number(movie, "movieId"), *_title_and_year(title, "title"), listed)


def _film_of_item(line: str) -> Film:
    movie, title, released, _, _, *flags = _split(line, "|", _ITEM_FIELDS)
    for genre, flag in zip(_FLAGS, flags, strict=True):
        if flag not in ("0", "1"):
            raise _MalformedError(f"flag {genre}", f"{flag[:80]!r} is neither 0 nor 1. Write one.")
    genres = tuple(g for g, flag in zip(_FLAGS, flags, strict=True) if flag == "1")
    text, year = _title_and_year(title, "movie title")
    if year is None and (date := _RELEASE_DATE.fullmatch(released)):
        year = int(date[1])
    number = _whole_number(movie, "movie id")
    return Film(number, text, year, tuple(genre for genre in genres if genre != "unknown"))


def _title_and_year(title: str, name: str) -> tuple[str, int | None]:
    """Split "Heat (1995)" into "Heat" and 1995; a title without a year is kept whole."""
    if not title.strip():
        raise _MalformedError(name, "the film has no title. Write one or remove the line.")
    match = _TITLE_WITH_YEAR.fullmatch(title)
    return (match[1].strip(), int(match[2])) if match else (title.strip(), None)


# --- ratings -------------------------------------------------------------------------------------

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
    """Return (n,) records of `RATING` in the order of the file."""
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
                dtype=RATING,
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
    steps = table["rating"] / STEP
    film = np.minimum(np.searchsorted(movie_ids, table["movie"]), len(movie_ids) - 1)
    user = np.unique(table["user"], return_inverse=True)[1]
    pairs = np.sort(user * len(movie_ids) + film)
    return bool(
        all(table[name].min() >= 0 and table[name].max() < _TOO_LARGE for name in _WHOLE)
        and ((table["rating"] >= LOWEST) & (table["rating"] <= HIGHEST)).all()
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
    return np.array(good, dtype=RATING)


def _rating_of(line: str, separator: str, known: set[int]) -> tuple[int, int, float, int]:
    user, movie, stars, timestamp = _split(line, separator, _RATING_FIELDS)
    film = _whole_number(movie, "movieId")
    if film not in known:
        raise _MalformedError(
            "movieId",
            f"film {film} is not in the films file. Describe it there, or remove the line.",
        )
    value = float(stars) if _STARS.fullmatch(stars) else float("nan")
    if not (LOWEST <= value <= HIGHEST and (value / STEP).is_integer()):
        raise _MalformedError(
            "rating", f"{stars[:80]!r} is not 0.5 to 5 in steps of 0.5. Write stars on that scale."
        )
    return (
        _whole_number(user, "userId"),
        film,
        value,
        _whole_number(timestamp, "timestamp"),
    )
