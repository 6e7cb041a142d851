"""MovieLens: both official folder formats, refusals, user splits, statistics that leak nothing."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import hashlib
import importlib
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from llm_envs.datasets.movielens import EMBEDDED, FilmStatistics, Ratings, load_movielens
from llm_envs.datasets.splits import SPLITS, split_of

# The same three users and seven films in the two formats. User 2 rates out of order.
MOVIES_CSV = """\
movieId,title,genres
1,Toy Story (1995),Animation|Children|Comedy
2,"American President, The (1995)",Comedy|Drama|Romance
3,"11'09""01 - September 11 (2002)",Drama
5,"Cité des enfants perdus, La (1995)",Adventure|Sci-Fi
7,unknown,(no genres listed)
9,1900 (Novecento) (1976),Drama|War
11,"Land Before Time III, The (1995)",Animation
"""
RATINGS_CSV = """\
userId,movieId,rating,timestamp
1,1,4.0,881250949
1,2,3.0,881250950
2,5,5.0,900000002
2,3,1.0,900000001
2,1,2.0,900000003
30,7,4.0,900000003
"""
U_ITEM = """\
1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/1|0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0
2|American President, The (1995)|01-Jan-1995|||0|0|0|0|0|1|0|0|1|0|0|0|0|0|1|0|0|0|0
3|11'09"01 - September 11|01-Jan-2002|||0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|0|0
5|Cité des enfants perdus, La (1995)|01-Jan-1995|||0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0|0
7|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0
9|1900 (Novecento) (1976)|01-Jan-1976|||0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|1|0
11|Land Before Time III, The (1995) (V)|01-Jan-1995|||0|0|0|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0
"""


def write_csv(
    folder: Path, ratings: str = RATINGS_CSV, movies: str = MOVIES_CSV, newline: str = "\n"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("ratings.csv", ratings), ("movies.csv", movies)):
        data = text.replace("\n", newline).encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(data)
    return folder


def write_100k(folder: Path, item: str = U_ITEM) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = reversed(RATINGS_CSV.replace(".0,", ",").splitlines()[1:])  # u.data has no order
    (folder / "u.data").write_text("\n".join(lines).replace(",", "\t") + "\n")
    (folder / "u.item").write_bytes(item.encode("latin-1"))
    return folder


def assert_same(one: Ratings, other: Ratings) -> None:
    for name in ("users", "movies", "rating", "timestamp", "movie_ids"):
        assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("titles", "years", "genres", "skipped_lines"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.fixture(scope="module")
def embedded() -> Ratings:
    return load_movielens(EMBEDDED)


# --- formats -------------------------------------------------------------------------------------


def test_a_csv_folder_is_read(tmp_path: Path) -> None:
    ratings = load_movielens(write_csv(tmp_path))
    assert ratings.titles == (
        "Toy Story",
        "American President, The",
        "11'09\"01 - September 11",
        "Cité des enfants perdus, La",
        "unknown",
        "1900 (Novecento)",
        "Land Before Time III, The",
    )
    assert ratings.years == (1995, 1995, 2002, 1995, None, 1976, 1995)
    assert ratings.genres[0] == ("Animation", "Children", "Comedy")
    assert ratings.genres[4] == ()
    assert ratings.movie_ids.tolist() == [1, 2, 3, 5, 7, 9, 11]
    user_2 = ratings.rows_of(2)
    assert ratings.movies[user_2].tolist() == [2, 3, 0]  # oldest first
    assert ratings.rating[user_2].tolist() == [1.0, 5.0, 2.0]
    assert ratings.clicked[user_2].tolist() == [False, True, False]
    assert ratings.clicked[ratings.rows_of(1)].tolist() == [True, False]  # 4 stars are a click
    assert ratings.user_ids.tolist() == [1, 2, 30]
    with pytest.raises(KeyError, match="User 3 rated no film"):
        ratings.rows_of(3)


def test_both_formats_give_the_same(tmp_path: Path) -> None:
    assert_same(
        load_movielens(write_csv(tmp_path / "csv")), load_movielens(write_100k(tmp_path / "100k"))
    )


@pytest.mark.parametrize("newline", ["\r\n", "\n\n"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path, newline: str) -> None:
    plain = load_movielens(write_csv(tmp_path / "plain"))
    other = write_csv(tmp_path / "other", newline=newline)
    for file in other.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert_same(plain, load_movielens(other))


def test_a_separator_of_lines_inside_a_title_ends_no_line(tmp_path: Path) -> None:
    movies = MOVIES_CSV.replace("Toy Story", "Toy\u2028Story\x85")
    assert load_movielens(write_csv(tmp_path, movies=movies)).titles[0] == "Toy\u2028Story"


def test_gzipped_files_and_archives_are_read(tmp_path: Path) -> None:
    plain = load_movielens(str(write_csv(tmp_path / "plain")))
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("ratings.csv", "movies.csv"):
        (packed / f"{name}.gz").write_bytes(gzip.compress((tmp_path / "plain" / name).read_bytes()))
    assert_same(plain, load_movielens(packed))
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as archive:
        for file in packed.iterdir():
            archive.write(file, f"ml/{file.name}")
    assert_same(plain, load_movielens(zipfile.Path(tmp_path / "ml.zip", "ml/")))


def test_the_hash_of_each_file_is_recorded(tmp_path: Path) -> None:
    folder = write_csv(tmp_path)
    expected = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    assert load_movielens(folder).sha256 == expected


def test_one_folder_may_hold_both_formats(tmp_path: Path) -> None:
    write_100k(write_csv(tmp_path))
    with pytest.raises(ValueError, match=r"two data sets.*dataset_format="):
        load_movielens(tmp_path)
    read = load_movielens(tmp_path, dataset_format="movielens_100k")
    assert set(read.sha256) == {"u.data", "u.item"}
    with pytest.raises(ValueError, match="Did you mean 'movielens_100k'"):
        load_movielens(tmp_path, dataset_format="movielens_100")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder.*ratings\.csv"):
        load_movielens(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no MovieLens data"):
        load_movielens(tmp_path)
    (write_csv(tmp_path) / "movies.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds ratings\.csv but no movies\.csv"):
        load_movielens(tmp_path)


# --- malformed lines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "field", "cause"),
    [
        ("one,1,4.0,5", "userId", "'one' is not a whole number"),
        ("-1,1,4.0,5", "userId", "'-1' is not a whole number"),
        ("9,1.5,4.0,5", "movieId", "'1.5' is not a whole number"),
        ("9,8,4.0,5", "movieId", "film 8 is not in the films file"),
        ("1,1,4.0,5", "movieId", "user 1 rated film 1 already"),
        ("9,1,4.2,5", "rating", "'4.2' is not 0.5 to 5 in steps of 0.5"),
        ("9,1,nan,5", "rating", "'nan' is not"),
        ("9,1,0,5", "rating", "'0' is not"),
        ("9,1,5.5,5", "rating", "'5.5' is not"),
        ("9,1,4.0,99999999999999999999", "timestamp", "is not a whole number"),
        ("9,1,4.0", "timestamp", "3 fields and not 4"),
        ("9,1,4.0,5,6", "5", "5 fields and not 4"),
        ("9;1;4.0;5", "movieId", "1 fields and not 4"),
        ("9_0,1,4.0,5", "userId", "'9_0' is not a whole number"),
        ("\u0669,1,4.0,5", "userId", "is not a whole number"),
        ("9,1,0_5,5", "rating", "'0_5' is not"),
        (f"9,1,4.0,{'9' * 5000}", "timestamp", "is not a whole number"),
    ],
)
def test_a_bad_rating_is_refused_or_skipped_and_counted(
    tmp_path: Path, line: str, field: str, cause: str
) -> None:
    good = load_movielens(write_csv(tmp_path / "good"))
    folder = write_csv(tmp_path / "bad", ratings=f"{RATINGS_CSV}{line}\n")
    with pytest.raises(ValueError, match=cause) as refusal:
        load_movielens(folder)
    message = str(refusal.value)
    assert message.startswith(f"{folder / 'ratings.csv'}, line 8, field {field}: ")
    assert "skip_bad_lines=True" in message

    with pytest.warns(UserWarning, match=r"Skipped 1 bad line.*line 8") as record:
        skipped = load_movielens(folder, skip_bad_lines=True)
    assert len(record) == 1
    assert skipped.skipped_lines == 1
    assert_same(dataclasses.replace(skipped, skipped_lines=0), good)


@pytest.mark.parametrize(
    ("line", "field", "cause"),
    [
        ("x,Heat (1995),Action", "movieId", "'x' is not a whole number"),
        ("1,Heat (1995),Action", "movieId", "film 1 was already described"),
        ("99, ,Action", "title", "no title"),
        ('99,"Heat (1995),Action', "title", "quotes are wrong"),
        ("99,Heat (1995)", "genres", "2 fields and not 3"),
        ("99,Heat, The (1995),Action", "4", "4 fields and not 3"),
        ("99,\udce9t\udce9 (1995),Action", "title", "not UTF-8"),
        ("99,Heat (1995),Action||Crime", "genres", "blank or repeated genre"),
        ("99,Heat (1995),|", "genres", "blank or repeated genre"),
        ("99,Heat (1995),Action|Action", "genres", "blank or repeated genre"),
    ],
)
def test_a_bad_film_is_refused_or_skipped_and_counted(
    tmp_path: Path, line: str, field: str, cause: str
) -> None:
    folder = write_csv(tmp_path, movies=f"{MOVIES_CSV}{line}\n")
    with pytest.raises(
        ValueError, match=rf"movies\.csv, line 9, field {field}: .*{cause}"
    ) as error:
        load_movielens(folder)
    assert str(error.value).startswith(f"{folder / 'movies.csv'}, ")
    with pytest.warns(UserWarning, match="Skipped 1 bad line"):
        assert len(load_movielens(folder, skip_bad_lines=True).titles) == 7


def test_a_bad_flag_names_the_genre(tmp_path: Path) -> None:
    folder = write_100k(tmp_path, item=U_ITEM.replace("M/1|0|0|0|1", "M/1|0|0|0|yes"))
    with pytest.raises(ValueError, match=r"/u\.item, line 1, field flag Animation: 'yes'"):
        load_movielens(folder)


def test_every_bad_line_is_counted_and_one_warning_given(tmp_path: Path) -> None:
    bad = RATINGS_CSV.replace("1,2,3.0", "1,2,three").replace("30,7", "30,70")
    folder = write_csv(tmp_path, ratings=bad, movies=MOVIES_CSV + "12\n")
    with pytest.warns(UserWarning, match="Skipped 3 bad line") as record:
        ratings = load_movielens(folder, skip_bad_lines=True)
    assert (ratings.skipped_lines, len(ratings.users), len(record)) == (3, 4, 1)


def test_files_without_their_header_are_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ratings\.csv, line 1, field header"):
        load_movielens(
            write_csv(tmp_path / "a", ratings=RATINGS_CSV.partition("\n")[2]), skip_bad_lines=True
        )
    with pytest.raises(ValueError, match=r"movies\.csv, line 1, field header"):
        load_movielens(write_csv(tmp_path / "b", movies="id,title\n"), skip_bad_lines=True)


def test_no_rating_and_broken_gzip_are_refused(tmp_path: Path) -> None:
    header = "userId,movieId,rating,timestamp\n"
    with pytest.raises(ValueError, match=r"ratings\.csv holds no good rating"):
        load_movielens(write_csv(tmp_path / "empty", ratings=header))
    folder = write_csv(tmp_path / "cut")
    data = (folder / "movies.csv").read_bytes()
    (folder / "movies.csv").unlink()
    (folder / "movies.csv.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(ValueError, match=r"movies\.csv\.gz cannot be unpacked"):
        load_movielens(folder)


# --- the embedded set ----------------------------------------------------------------------------


def test_the_embedded_set_is_what_its_card_says(embedded: Ratings) -> None:
    card = (EMBEDDED / "CARD.md").read_text(encoding="utf-8")
    assert len(embedded.sha256) == 2
    for name, digest in embedded.sha256.items():
        assert f"| `{name}` |" in card
        assert digest in card
    for split in (*SPLITS, "all"):
        users = embedded.users_in(split)
        mine = np.isin(embedded.users, users)
        clicks = f"{100 * embedded.clicked[mine].mean():.1f} %"
        assert f"| {split} | {len(users)} | {mine.sum():,} | {clicks} |" in card
    assert f"{len(embedded.titles):,} films" in card
    assert None not in embedded.years
    assert (min(embedded.years), max(embedded.years)) == (1902, 2016)  # type: ignore[type-var]
    assert sum(not genres for genres in embedded.genres) == 15
    assert np.bincount(embedded.users)[embedded.user_ids].min() == 20
    assert "commercial" in (EMBEDDED / "LICENSE.txt").read_text(encoding="utf-8")


def test_embedded_films_read_as_in_movielens(embedded: Ratings) -> None:
    films = {
        id_: (title, year)
        for id_, title, year in zip(
            embedded.movie_ids.tolist(), embedded.titles, embedded.years, strict=True
        )
    }
    assert films[6] == ("Heat", 1995)
    assert films[11] == ("American President, The", 1995)
    assert films[7789] == ("11'09\"01 - September 11", 2002)
    assert films[51372] == ('"Great Performances" Cats', 1998)
    assert films[1176] == ("Double Life of Veronique, The (Double Vie de Véronique, La)", 1991)


def test_the_splits_divide_the_users(embedded: Ratings) -> None:
    parts = [set(embedded.users_in(split).tolist()) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(embedded.user_ids)
    assert all(split_of(str(user)) == "test" for user in parts[2])
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        embedded.users_in("val")  # type: ignore[arg-type]


def test_ratings_never_change_and_are_shared_by_copies(embedded: Ratings) -> None:
    assert copy.deepcopy(embedded) is embedded
    with pytest.raises(ValueError, match="read-only"):
        embedded.rating[0] = 1.0
    assert_same(pickle.loads(pickle.dumps(embedded)), embedded)


def test_the_builder_writes_what_the_loader_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("tyro")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    builder = importlib.import_module("build_movielens_small")
    table = pandas.DataFrame(
        {
            "movieId": [11, 6, 11],
            "title": ['Say "Hi", The  Film ', "Léon", 'Say "Hi", The  Film '],
            "year": [1995.0, 1994.0, 1995.0],
            "genres": ["Comedy|Drama", "(no genres listed)", "Comedy|Drama"],
            "userId": [2, 1, 1],
            "rating": [3.5, 5.0, 4.0],
            "timestamp": [7, 8, 9],
        }
    )
    (tmp_path / "ratings.csv").write_bytes(builder.ratings_csv(table))
    (tmp_path / "movies.csv").write_bytes(builder.movies_csv(table))
    ratings = load_movielens(tmp_path)
    assert ratings.titles == ("Léon", 'Say "Hi", The Film')
    assert ratings.years == (1994, 1995)
    assert ratings.genres == ((), ("Comedy", "Drama"))
    assert list(zip(ratings.users, ratings.movies, ratings.rating, strict=True)) == [
        (1, 0, 5.0),
        (1, 1, 4.0),
        (2, 1, 3.5),
    ]
    other = tmp_path / "other.whl"
    other.write_bytes(b"another wheel")
    with pytest.raises(SystemExit, match=hashlib.sha256(b"another wheel").hexdigest()):
        builder.main(builder.Arguments(input=other, output=tmp_path))


# --- statistics ----------------------------------------------------------------------------------


def made_up(seed: int, n_users: int = 40, n_films: int = 12) -> Ratings:
    """Ratings of about half of all pairs, at random; the last film is rated by nobody."""
    rng = np.random.default_rng(seed)
    users, movies = np.nonzero(rng.random((n_users, n_films - 1)) < 0.5)
    return Ratings(
        users=users + 1,
        movies=movies,
        rating=(rng.integers(1, 11, len(users)) / 2).astype(np.float32),
        timestamp=np.zeros(len(users), dtype=np.int64),
        movie_ids=np.arange(n_films),
        titles=("",) * n_films,
        years=(None,) * n_films,
        genres=((),) * n_films,
    )


def perturbed(ratings: Ratings, rows: NDArray[np.bool_]) -> Ratings:
    """The same with every rating in `rows` turned upside down."""
    return dataclasses.replace(
        ratings, rating=np.where(rows, 5.5 - ratings.rating, ratings.rating).astype(np.float32)
    )


def without(ratings: Ratings, rows: NDArray[np.bool_]) -> Ratings:
    """The same without the ratings in `rows`."""
    kept = {
        name: getattr(ratings, name)[~rows] for name in ("users", "movies", "rating", "timestamp")
    }
    return dataclasses.replace(ratings, **kept)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    of_what=st.sampled_from(["stars", "clicks"]),
    smoothing=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_statistics_equal_the_definition(
    seed: int, of_what: Literal["stars", "clicks"], smoothing: float
) -> None:
    ratings = made_up(seed)
    statistics = FilmStatistics.of(ratings, of_what=of_what, smoothing=smoothing)
    films = np.arange(len(ratings.movie_ids))
    values = ratings.rating if of_what == "stars" else ratings.clicked
    for user in ratings.user_ids[:8].tolist():
        others = [
            (film, float(value))
            for by, film, value in zip(ratings.users, ratings.movies, values, strict=True)
            if by != user and split_of(str(by)) == "train"
        ]
        prior = sum(value for _, value in others) / len(others)
        counts, means = statistics.for_user(user, films)
        for film in films:
            seen = [value for rated, value in others if rated == film]
            assert counts[film] == len(seen)
            weight = len(seen) + smoothing
            expected = (sum(seen) + smoothing * prior) / weight if seen else prior
            assert means[film] == pytest.approx(expected, abs=1e-12)


def test_validation_and_test_users_never_count(embedded: Ratings) -> None:
    held_out = np.isin(
        embedded.users, [*embedded.users_in("validation"), *embedded.users_in("test")]
    )
    films = np.arange(len(embedded.titles))
    before = FilmStatistics.of(embedded)
    after = FilmStatistics.of(perturbed(embedded, held_out))
    control = FilmStatistics.of(perturbed(embedded, ~held_out))
    for split in SPLITS:
        user = embedded.users_in(split)[0]
        for one, other in zip(
            before.for_user(user, films), after.for_user(user, films), strict=True
        ):
            assert_array_equal(one, other)
        assert (before.for_user(user, films)[1] != control.for_user(user, films)[1]).any()


@pytest.mark.parametrize("of_what", ["stars", "clicks"])
def test_the_served_user_never_counts(
    embedded: Ratings, of_what: Literal["stars", "clicks"]
) -> None:
    """Not how they rated a film, not how they rate on average, not even which films they saw."""
    films = np.arange(len(embedded.titles))
    before = FilmStatistics.of(embedded, of_what=of_what)
    neighbour = embedded.users_in("train")[5]
    for user in embedded.users_in("train")[:5]:
        own = embedded.users == user
        for changed in (perturbed(embedded, own), without(embedded, own)):
            after = FilmStatistics.of(changed, of_what=of_what)
            for one, other in zip(
                before.for_user(user, films), after.for_user(user, films), strict=True
            ):
                assert_array_equal(one, other)
            shown = before.for_user(neighbour, films)[1]
            assert (shown != after.for_user(neighbour, films)[1]).any()


def test_films_without_ratings_show_the_prior_and_a_count_of_zero() -> None:
    ratings = made_up(3)
    for smoothing in (0, 5):
        statistics = FilmStatistics.of(ratings, smoothing=smoothing)
        for user in (1, 2, 10_000):
            counts, means = statistics.for_user(user, [11])
            assert counts.tolist() == [0]
            assert means[0] == statistics.prior(user)


def test_without_other_training_users_the_prior_is_the_middle_of_the_scale() -> None:
    ratings = made_up(0, n_users=1)
    for of_what, middle in (("stars", 2.75), ("clicks", 0.5)):
        statistics = FilmStatistics.of(ratings, of_what=of_what)  # type: ignore[arg-type]
        counts, means = statistics.for_user(1, np.arange(12))
        assert counts.sum() == 0
        assert_array_equal(means, np.full(12, middle))


def test_many_users_are_served_in_one_call(embedded: Ratings) -> None:
    statistics = FilmStatistics.of(embedded)
    users = np.concatenate([embedded.users_in(split)[:4] for split in SPLITS])
    films = np.stack([embedded.movies[embedded.rows_of(user)][:5] for user in users])
    counts, means = statistics.for_user(users[:, None], films)
    assert counts.shape == means.shape == (12, 5)
    for i, user in enumerate(users):
        one = statistics.for_user(user, films[i])
        assert_array_equal(one[0], counts[i])
        assert_allclose(one[1], means[i], rtol=0, atol=0)


def test_leaving_the_own_rating_in_would_inflate_the_heuristic(embedded: Ratings) -> None:
    """The trap that the leave-one-out rule avoids is real on this data, and it is avoided."""
    train = np.isin(embedded.users, embedded.users_in("train"))
    size = len(embedded.titles)
    total = np.bincount(embedded.movies[train], embedded.rating[train], minlength=size)
    own_in = total / np.maximum(np.bincount(embedded.movies[train], minlength=size), 1)
    statistics = FilmStatistics.of(embedded, smoothing=0)
    rng = np.random.default_rng(0)
    chosen, leaked, random = [], [], []
    for user in np.repeat(embedded.users_in("train"), 10):
        rows = embedded.rows_of(user)
        five = rows.start + rng.choice(rows.stop - rows.start, 5, replace=False)
        clicks, films = embedded.clicked[five], embedded.movies[five]
        chosen.append(clicks[statistics.for_user(user, films)[1].argmax()])
        leaked.append(clicks[own_in[films].argmax()])
        random.append(clicks[0])
    error = 0.5 / len(chosen) ** 0.5
    assert np.mean(chosen) - np.mean(random) > 5 * error
    assert np.mean(leaked) - np.mean(chosen) > 2 * error


def test_unusable_arguments_are_refused() -> None:
    ratings = made_up(0)
    with pytest.raises(ValueError, match="of_what is 'likes'"):
        FilmStatistics.of(ratings, of_what="likes")  # type: ignore[arg-type]
    for smoothing in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="smoothing is"):
            FilmStatistics.of(ratings, smoothing=smoothing)


def test_good_files_load_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_movielens(write_csv(tmp_path / "csv"))
        load_movielens(write_100k(tmp_path / "100k"))
