"""CNN/DailyMail and XSum: their official files and lists of splits, and their rows on the hub."""

from __future__ import annotations

import json
import warnings
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.records import Document
from llm_envs.datasets.splits import SPLITS, split_of

URL = "http://web.archive.org/web/2015id_/http://www.cnn.com/2015/{}/index.html"

STORY = """\
(CNN) -- Voters of Examplia go to the polls on {}.

It is the first time in ten years.

@highlight

Examplia votes on {}

@highlight

First vote in ten years
"""

ARTICLE = """\
[SN]URL[SN]
http://web.archive.org/web/2016/http://www.bbc.co.uk/news/{}

[SN]TITLE[SN]
Bridge opens

[SN]FIRST-SENTENCE[SN]
Bridge {} has opened to traffic.

[SN]RESTBODY[SN]
Share this with
Email
Thousands came to see it.
"We are proud," said the mayor.
"""
SPLIT_FILE = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"


def name_of(day: int) -> str:
    return sha1(URL.format(day).encode()).hexdigest()


def write_stories(folder: Path, days: range, publisher: str = "cnn") -> None:
    stories = folder / publisher / "stories"
    stories.mkdir(parents=True, exist_ok=True)
    for day in days:
        text = STORY.format(f"day {day}", f"day {day}")
        (stories / f"{name_of(day)}.story").write_text(text, encoding="utf-8")


def write_urls(folder: Path, **days: range) -> None:
    folder.mkdir(exist_ok=True)
    for name, listed in days.items():
        urls = "".join(URL.format(day) + "\n" for day in listed)
        (folder / f"all_{name}.txt").write_text(urls, encoding="utf-8")


def story(day: int) -> Document:
    return Document(
        name_of(day),
        f"(CNN) -- Voters of Examplia go to the polls on day {day}.\n"
        "It is the first time in ten years.",
        (f"Examplia votes on day {day}\nFirst vote in ten years",),
        name_of(day),
    )


def write_articles(folder: Path, numbers: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        text = ARTICLE.format(number, number).replace("Thousands", f"{number} thousands")
        (folder / f"{number}.summary").write_text(text, encoding="utf-8")


def article(number: int) -> Document:
    return Document(
        str(number),
        f'{number} thousands came to see it.\n"We are proud," said the mayor.',
        (f"Bridge {number} has opened to traffic.",),
        str(number),
    )


def load(path: Path, **arguments: Any) -> dict[str, tuple[Document, ...]]:
    """Load every split, with warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {
            split: load_documents(path, split=split, **arguments).records
            for split in (*SPLITS, "all")
        }


def by_id(documents: tuple[Document, ...]) -> list[Document]:
    return sorted(documents, key=lambda document: document.id)


# --- Splits -----------------------------------------------------------------------------------


def test_the_lists_of_urls_split_the_stories_of_both_publishers(tmp_path: Path) -> None:
    write_stories(tmp_path, range(6))
    write_stories(tmp_path, range(6, 10), "dailymail")
    write_urls(tmp_path / "url_lists", train=range(2, 8), val=range(8, 10), test=range(2))
    (tmp_path / "url_lists" / "readme").write_text("no data")
    found = load(tmp_path)
    assert by_id(found["train"]) == by_id(tuple(map(story, range(2, 8))))
    assert by_id(found["validation"]) == by_id((story(8), story(9)))
    assert by_id(found["test"]) == by_id((story(0), story(1)))
    assert len(found["all"]) == 10


def test_the_split_file_splits_the_articles(tmp_path: Path) -> None:
    write_articles(tmp_path / "bbc-summary-data", range(100, 106))
    lists = {"test": ["100"], "validation": ["101", "999"], "train": ["102", "103", "104", "105"]}
    (tmp_path / SPLIT_FILE).write_text(json.dumps(lists))
    found = load(tmp_path)
    assert found["train"] == tuple(map(article, range(102, 106)))
    assert found["validation"] == (article(101),)
    assert found["test"] == (article(100),)


@pytest.mark.parametrize(
    ("write", "key"), [(write_stories, story), (write_articles, article)], ids=["story", "summary"]
)
def test_without_lists_the_content_splits(tmp_path: Path, write: Any, key: Any) -> None:
    write(tmp_path, range(100))
    found = load(tmp_path)
    assert by_id(found["all"]) == by_id(tuple(map(key, range(100))))
    for split in SPLITS:
        assert all(split_of(document.text) == split for document in found[split])


def test_what_no_list_has_is_left_out_and_told(tmp_path: Path) -> None:
    write_stories(tmp_path, range(3))
    write_urls(tmp_path, test=range(2))
    with pytest.warns(
        UserWarning, match=r"1 of 3 records are in none of the lists 'all_test\.txt'"
    ):
        assert len(load_documents(tmp_path, split="all").records) == 2
    write_urls(tmp_path, test=range(7, 9))
    with pytest.raises(ValueError, match=r"none of its 3 records is in the lists 'all_test\.txt'"):
        load_documents(tmp_path, split="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"dev": []}', "it is an object with 'dev' instead of an object with 'train', 'val"),
        ('{"train": "100"}', "'train' is '100' instead of a list"),
        (
            '{"train": ["100"], "test": ["100"]}',
            "record '100' is listed for 'train' and for 'test'",
        ),
    ],
)
def test_a_damaged_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    write_articles(tmp_path, range(100, 101))
    (tmp_path / SPLIT_FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{SPLIT_FILE}: the list .*{message}.*Download it again"):
        load_documents(tmp_path)


def test_a_list_that_changes_is_read_again(tmp_path: Path) -> None:
    write_stories(tmp_path, range(4))
    write_urls(tmp_path, train=range(3), test=range(3, 4))
    assert len(load_documents(tmp_path).records) == 3
    assert load_documents(tmp_path).records is load_documents(tmp_path).records
    write_urls(tmp_path, train=range(2), test=range(2, 4))
    assert len(load_documents(tmp_path).records) == 2


# --- Recognition ------------------------------------------------------------------------------


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=ascii)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_a_single_file_is_recognised_by_its_content(
    tmp_path: Path, newline: str, mark: str
) -> None:
    path = tmp_path / "7.txt"
    for text, expected in (
        (STORY.format("day 7", "day 7"), story(7)),
        (ARTICLE.replace("Thousands", "7 thousands").format(7, 7), article(7)),
    ):
        path.write_bytes((mark + text).replace("\n", newline).encode())
        [found] = load_documents(path, split="all").records
        assert (found.text, found.summaries) == (expected.text, expected.summaries)
        assert found.id == "7"


def test_what_the_scripts_of_xsum_extract_is_read_too(tmp_path: Path) -> None:
    text = ARTICLE.replace("[SN]", "[XSUM]").replace("FIRST-SENTENCE", "INTRODUCTION")
    (tmp_path / "3.data").write_text(text.replace("Thousands", "3 thousands").format(3, 3))
    assert load_documents(tmp_path, split="all").records == (article(3),)


def test_a_folder_of_two_formats_is_refused_unless_one_is_forced(tmp_path: Path) -> None:
    write_stories(tmp_path, range(30))
    write_articles(tmp_path, range(30))
    with pytest.raises(ValueError, match="holds files of the formats 'cnn_dailymail', 'xsum'"):
        load_documents(tmp_path)
    assert load(tmp_path, dataset_format="xsum")["all"][0] == article(0)
    assert len(load(tmp_path, dataset_format="cnn_dailymail")["all"]) == 30


def test_jsonl_files_come_first_unless_a_format_is_forced(tmp_path: Path) -> None:
    record = {"id": "j", "text": "A text.", "summary": "text"}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    write_stories(tmp_path, range(1))
    assert [document.id for document in load_documents(tmp_path, split="all").records] == ["j"]
    forced = load_documents(tmp_path, split="all", dataset_format="cnn_dailymail").records
    assert forced == (story(0),)
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no file that ends in '\.jsonl'"):
        load_documents(tmp_path, dataset_format="jsonl")
    with pytest.raises(ValueError, match=r"holds no file that ends in '\.summary', '\.data'"):
        load_documents(tmp_path, dataset_format="xsum")


# --- What is refused --------------------------------------------------------------------------

BAD: list[tuple[str, str, str]] = [
    ("story", "An article.\n\nNo highlight.\n", r"line 1 begins a story without a line '@highli"),
    ("story", "\n\n@highlight\n\nA highlight\n", r"line 3 is '@highlight', with no article before"),
    ("story", "An article.\n\n@highlight\n\n", r"line 3 is '@highlight', with no highlight after"),
    ("story", "An article.\n\xff\n@highlight\n", r"line 2 is not UTF-8 text \(byte 0xff"),
    ("summary", "A text.\n", r"line 1 begins an article without .*\[SN\]FIRST-SENTENCE\[SN\]"),
    (
        "summary",
        "[SN]FIRST-SENTENCE[SN]\nA sentence.\n",
        r"line 1 begins an article without .*\[SN\]RESTBODY\[SN\]",
    ),
    (
        "summary",
        "[SN]FIRST-SENTENCE[SN]\nA sentence.\n\n[SN]RESTBODY[SN]\nEmail\n",
        r"line 4 is the heading of RESTBODY, with no text under it",
    ),
]


@pytest.mark.parametrize(("ending", "text", "message"), BAD)
def test_a_bad_file_is_named_with_its_line_or_skipped(
    tmp_path: Path, ending: str, text: str, message: str
) -> None:
    good = {"story": (write_stories, story), "summary": (write_articles, article)}
    write, expected = good[ending]
    write(tmp_path, range(1))
    folder = next(tmp_path.rglob(f"*.{ending}")).parent
    (folder / f"bad.{ending}").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        load_documents(tmp_path)
    place = (folder / f"bad.{ending}").relative_to(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: {place}, line")
    assert "skip_bad_records=True" in str(error.value)
    with pytest.warns(UserWarning, match="skipped 1 bad of 2 records"):
        loaded = load_documents(tmp_path, split="all", skip_bad_records=True)
    assert loaded.records == (expected(0),)
    # By itself it is refused with its line too.
    force = {"story": "cnn_dailymail", "summary": "xsum"}[ending]
    with pytest.raises(ValueError, match=message):
        load_documents(folder / f"bad.{ending}", dataset_format=force)


def test_a_story_of_both_publishers_is_one_too_many(tmp_path: Path) -> None:
    write_stories(tmp_path, range(1))
    write_stories(tmp_path, range(1), "dailymail")
    with pytest.raises(ValueError, match=r"dailymail.*field 'id' is .*, as in cnn/stories/"):
        load_documents(tmp_path)


# --- The hub ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "summary", "write", "expected"),
    [
        ("article", "highlights", write_stories, story),
        ("document", "summary", write_articles, article),
    ],
)
def test_hub_rows_become_the_documents_of_the_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    summary: str,
    write: Any,
    expected: Any,
) -> None:
    library: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbers = {"train": range(5), "validation": range(5, 7), "test": range(7, 8)}
    documents = {split: list(map(expected, numbers[split])) for split in numbers}
    sets = {
        split: library.Dataset.from_list(
            [{text: d.text, summary: d.summaries[0], "id": d.id} for d in documents[split]]
        )
        for split in numbers
    }
    library.DatasetDict(sets).save_to_disk(str(tmp_path / "hub"))
    for split in SPLITS:
        found = load_documents(f"hf:{tmp_path / 'hub'}", split=split).records
        assert list(found) == documents[split]
    write(tmp_path / "files", range(8))
    files = load_documents(tmp_path / "files", split="all").records
    assert by_id(files) == by_id(load_documents(f"hf:{tmp_path / 'hub'}", split="all").records)
