"""The embedded Debian descriptions: counts, schema, splits without leaks, and their builder."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from importlib import import_module, resources
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = resources.files("llm_envs") / "datasets" / "embedded" / "debian_packages"
SCRIPTS = Path(__file__).parents[2] / "scripts"
SPLITS = ("train", "validation", "test")

# Two texts of different splits may share at most this part (Jaccard) of their word trigrams ...
MAX_SIMILARITY = 0.2
# ... and no paragraph of this many words.
PARAGRAPH_WORDS = 20


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def trigrams(text: str) -> set[tuple[str, ...]]:
    sequence = words(text)
    return set(zip(sequence, sequence[1:], sequence[2:], strict=False))


@pytest.fixture(scope="module")
def content() -> bytes:
    return gzip.decompress((FOLDER / "data.jsonl.gz").read_bytes())


@pytest.fixture(scope="module")
def records(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "CARD.md").read_text(encoding="utf-8")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module("build_debian_packages")


def test_size_and_licence(content: bytes) -> None:
    packed = (FOLDER / "data.jsonl.gz").read_bytes()
    assert len(packed) <= 2_500_000
    assert packed[4:8] == bytes(4), "The gzip header holds a time, so no build equals another."
    assert "Debian" in (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")


def test_content_is_what_the_card_records(
    content: bytes, records: list[dict[str, Any]], card: str
) -> None:
    assert hashlib.sha256(content).hexdigest() in card
    rows = dict(re.findall(r"^\| (\w+) \| ([\d,]+ \| [\d,]+) \|$", card, re.MULTILINE))
    for split in SPLITS:
        members = [record for record in records if record["split"] == split]
        units = {record["unit"] for record in members}
        assert rows[split] == f"{len(members):,} | {len(units):,}"


def test_input_hash_is_what_the_card_records(builder: ModuleType, card: str) -> None:
    assert builder.INPUT_SHA256 in card


def test_schema(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 8_000
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["text"] for record in records}) == len(records)
    for record in records:
        assert list(record) == ["id", "text", "summaries", "unit", "split"]
        assert record["split"] in SPLITS
        assert record["unit"]
        assert re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", record["id"])
        assert 40 <= len(record["text"].split()) <= 250
        (summary,) = record["summaries"]
        assert 3 <= len(summary.split()) <= 15
        assert all(line == line.strip() for line in [summary, *record["text"].split("\n")])
        assert (summary + record["text"]).replace("\n", "").isprintable()
        assert "://" not in record["text"]
        assert "\n.\n" not in record["text"]
        assert "\n\n\n" not in record["text"]


def test_split_sizes(records: list[dict[str, Any]]) -> None:
    counts = Counter(record["split"] for record in records)
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert counts[split] / len(records) == pytest.approx(share, abs=0.02)


def test_units_do_not_cross_splits(records: list[dict[str, Any]]) -> None:
    splits_of = defaultdict(set)
    for record in records:
        splits_of[record["unit"]].add(record["split"])
    assert {len(splits) for splits in splits_of.values()} == {1}
    assert any(count > 1 for count in Counter(record["unit"] for record in records).values())


def test_no_synopsis_or_long_paragraph_in_two_splits(records: list[dict[str, Any]]) -> None:
    splits_of = defaultdict(set)
    for record in records:
        paragraphs = map(words, record["text"].split("\n"))
        passages = [tuple(p) for p in paragraphs if len(p) >= PARAGRAPH_WORDS]
        for passage in [*passages, tuple(words(record["summaries"][0]))]:
            splits_of[passage].add(record["split"])
    assert not [" ".join(passage) for passage, splits in splits_of.items() if len(splits) > 1]


def test_no_near_duplicates_in_two_splits(records: list[dict[str, Any]]) -> None:
    sets = [trigrams(record["text"]) for record in records]
    holders = defaultdict(list)
    for i, record in enumerate(records):
        if record["split"] == "train":
            for trigram in sets[i]:
                holders[trigram].append(i)
    for split in ("validation", "test"):
        members = [i for i, record in enumerate(records) if record["split"] == split]
        for j in members:
            shared = Counter(i for trigram in sets[j] for i in holders[trigram])
            for i, common in shared.items():
                similarity = common / (len(sets[i]) + len(sets[j]) - common)
                assert similarity < MAX_SIMILARITY, (records[i]["id"], records[j]["id"])
        for j in members:  # so that test is compared with validation too
            for trigram in sets[j]:
                holders[trigram].append(j)


def test_the_text_tells_what_the_synopsis_says(records: list[dict[str, Any]]) -> None:
    """Most of a synopsis can be found in its text, which a neighbour's text does not tell."""

    def share(summary: str, text: str) -> float:
        long_words = {word for word in words(summary) if len(word) > 3}
        return len(long_words & set(words(text))) / max(len(long_words), 1)

    own = [share(record["summaries"][0], record["text"]) for record in records]
    other = [share(a["summaries"][0], b["text"]) for a, b in pairwise(records)]
    assert sum(own) / len(own) > 0.7
    assert sum(other) / len(other) < 0.3


def test_builder_turns_markup_into_text(builder: ModuleType) -> None:
    description = [
        " A tool that reads",
        " many  lines.",
        " .",
        " It has:",
        "  * one thing, told",
        "    on two lines",
        "  - another",
        " Then goes on.",
        " .",
        " .",
        " Homepage: <https://example.org/>",
    ]
    assert builder.flow(description) == (
        "A tool that reads many lines.\n\nIt has:\n- one thing, told on two lines\n- another\n"
        "Then goes on."
    )
    assert builder.flow([" A table:", "   a | b"]) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("python3-frobnicate", "libfrobnicate2"),
        ("ruby-frobnicate", "frobnicate-utils"),
        ("libfoo-bar-perl", "libfoo-bar-perl"),
    ],
)
def test_builder_sees_families(builder: ModuleType, one: str, other: str) -> None:
    assert builder.family(one) == builder.family(other)
    assert builder.family(one) != builder.family("libfoo-baz-perl")


def test_builder_finds_every_similar_pair(
    builder: ModuleType, records: list[dict[str, Any]]
) -> None:
    texts = [record["text"] for record in records[:150]]
    sets = [builder.trigrams(text) for text in texts]
    expected = {
        (i, j)
        for j in range(len(texts))
        for i in range(j)
        if len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= 0.02
    }
    found = {(i, j) for i, j, _ in builder.similar_pairs(texts, 0.02)}
    assert found
    assert found == expected


def test_builder_refuses_another_input(builder: ModuleType, tmp_path: Path) -> None:
    changed = tmp_path / "Translation-en"
    changed.write_text("Package: a\nDescription-en: b\n c\n", encoding="utf-8")
    found = hashlib.sha256(changed.read_bytes()).hexdigest()
    with pytest.raises(SystemExit) as refusal:
        builder.main(changed, tmp_path / "data.jsonl.gz")
    assert found in str(refusal.value)
    assert builder.INPUT_SHA256 in str(refusal.value)
    assert list(tmp_path.iterdir()) == [changed]


def test_rebuilding_writes_the_same_file(builder: ModuleType, tmp_path: Path) -> None:
    """The writer packs the shipped content into a file of the recorded form, twice alike."""
    data = gzip.decompress((FOLDER / "data.jsonl.gz").read_bytes())[:100_000]
    first, second = tmp_path / "a.gz", tmp_path / "b.gz"
    assert builder.write_gzip(first, data) == builder.write_gzip(second, data)
    assert first.read_bytes() == second.read_bytes()
    assert gzip.decompress(first.read_bytes()) == data
