"""The embedded Python docstrings: counts, schema, splits without leaks, and their builder."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter, defaultdict
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import pytest

FOLDER = resources.files("llm_envs") / "datasets" / "embedded" / "python_docstrings"
SCRIPTS = Path(__file__).parents[2] / "scripts"
SPLITS = ("train", "validation", "test")

MAX_SIMILARITY = 0.2  # of the word trigrams of two texts in different splits (Jaccard)


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
    return import_module("build_python_docstrings")


def test_size_and_licence() -> None:
    packed = (FOLDER / "data.jsonl.gz").read_bytes()
    assert len(packed) <= 1_000_000
    assert packed[4:8] == bytes(4), "The gzip header holds a time, so no build equals another."
    licence = (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


def test_content_is_what_the_card_records(
    content: bytes, records: list[dict[str, Any]], card: str, builder: ModuleType
) -> None:
    assert hashlib.sha256(content).hexdigest() in card
    assert builder.INPUT_SHA256 in card
    rows = dict(re.findall(r"^\| (\w+) \| ([\d,]+ \| [\d,]+) \|$", card, re.MULTILINE))
    for split in SPLITS:
        members = [record for record in records if record["split"] == split]
        units = {record["unit"] for record in members}
        assert rows[split] == f"{len(members):,} | {len(units):,}"


def test_schema(records: list[dict[str, Any]]) -> None:
    assert len({record["id"] for record in records}) == len(records)
    assert len({record["summaries"][0] for record in records}) == len(records)
    for record in records:
        assert list(record) == ["id", "text", "summaries", "unit", "split"]
        signature, empty, explanation = record["text"].split("\n", 2)
        name = re.escape(record["id"])
        assert re.fullmatch(rf"module {name}|class {name}(\(.*\))?|{name}\(.*\)", signature)
        assert empty == ""
        assert 20 <= len(explanation.split()) <= 250
        assert ">>>" not in explanation
        (summary,) = record["summaries"]
        assert 3 <= len(summary.split()) <= 20
        assert re.match(r"[A-Z]", summary)
        assert summary not in explanation


def test_units_hold_whole_modules_and_no_split_resembles_another(
    records: list[dict[str, Any]], builder: ModuleType
) -> None:
    splits_of = defaultdict(set)
    for record in records:
        splits_of[record["unit"]].add(record["split"])
    assert {len(splits) for splits in splits_of.values()} == {1}
    assert any(count > 1 for count in Counter(record["unit"] for record in records).values())
    texts = [record["text"].partition("\n")[2] for record in records]
    similar = list(builder.similar_pairs(texts, MAX_SIMILARITY / 2))
    assert similar
    for i, j, similarity in similar:
        same = records[i]["split"] == records[j]["split"]
        assert same or similarity < MAX_SIMILARITY, (records[i]["id"], records[j]["id"])


def test_the_environment_plays_it(records: list[dict[str, Any]]) -> None:
    env = gym.make("Summarization-v0", dataset="python_docstrings", split="test")
    ids = {record["id"] for record in records if record["split"] == "test"}
    observation, info = env.reset(seed=1)
    assert info["example_id"] in ids
    assert env.unwrapped.references[0] not in observation
    assert env.step(env.unwrapped.references[0])[4]["score"] == 1.0


SOURCE = '''
"""Tools for tests of builders.

They are not to be used.
"""
import sys

if sys.platform:
    class Reader(Base):
        """Reads one thing.

        Then another,  as in:

        >>> Reader().read()
        'a thing'
        or another

        and so on.
        """

        async def read(self, size=-1, *, quick: bool = False):
            """read(size) -> text

            Signatures are no summaries.
            """

        def one_line(self):
            """Has one line."""

        def two_lines(self):
            """Begins with a sentence of
            two lines.

            So it has no summary line.
            """
'''


def test_builder_takes_docstrings_apart(builder: ModuleType) -> None:
    found = list(builder.read_docstrings(SOURCE, "tools"))
    assert [(d.name, d.module, d.summary, d.text) for d in found] == [
        (
            "tools",
            "tools",
            "Tools for tests of builders.",
            "module tools\n\nThey are not to be used.",
        ),
        (
            "tools.Reader",
            "tools",
            "Reads one thing.",
            "class tools.Reader(Base)\n\nThen another,  as in:\n\nand so on.",
        ),
        (
            "tools.Reader.read",
            "tools",
            "read(size) -> text",
            "tools.Reader.read(self, size=-1, *, quick: bool=False)\n\n"
            "Signatures are no summaries.",
        ),
    ]


@pytest.mark.parametrize(
    ("summary", "words", "kept"),
    [
        ("Read the words of a file.", 30, True),
        ("Read the words of a file.", 10, False),
        ("Read the words of a file.", 300, False),
        ("Read words", 30, False),
        ("read(size) -> the words", 30, False),
        ("Read the following words:", 30, False),
        ("Fetch quantum elephants swiftly.", 30, False),
    ],
)
def test_builder_keeps_what_can_fairly_be_asked_for(
    builder: ModuleType, summary: str, words: int, kept: bool
) -> None:
    text = "a.read_words(file)\n\n" + " ".join(["word"] * words)
    assert builder.is_pair(builder.Docstring("a.read_words", "a", summary, text)) == kept


def test_builder_relates_modules_with_similar_texts(builder: ModuleType) -> None:
    common = "f()\n\nwhat these two have in common is a text of many different words"
    docstrings = [
        builder.Docstring("a.f", "a", "A.", common),
        builder.Docstring("b.f", "b", "B.", "g()\n\nsomething else that nobody else has to say"),
        builder.Docstring("c.f", "c", "C.", common + " and an end of its own"),
        builder.Docstring("c.g", "c", "D.", "h()\n\nnothing like anything that was said before"),
    ]
    assert builder.units(docstrings) == ["a", "b", "a", "a"]
    assert [d.name for d in builder.without_duplicates(docstrings)] == ["a.f", "b.f", "c.g"]


def test_builder_refuses_another_library(builder: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    with pytest.raises(SystemExit) as refusal:
        builder.main(tmp_path / "data.jsonl.gz", tmp_path)
    files = builder.library_files(tmp_path)
    assert builder.digest_of(tmp_path, files) in str(refusal.value)
    assert builder.INPUT_SHA256 in str(refusal.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "module.py"]


def test_rebuilding_gives_the_shipped_content(builder: ModuleType, content: bytes) -> None:
    files = builder.library_files(builder.LIBRARY)
    if builder.digest_of(builder.LIBRARY, files) != builder.INPUT_SHA256:
        pytest.skip("this interpreter's library is not that of CPython 3.11.7")
    assert builder.build(builder.LIBRARY, files).encode() == content
