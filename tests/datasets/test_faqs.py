"""FAQs: the embedded set, its builder, and files and hub sets of one's own."""

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

import pytest

from llm_envs.datasets.faqs import load_faqs
from llm_envs.datasets.records import FAQ
from llm_envs.datasets.splits import SPLITS, split_of

FOLDER = resources.files("llm_envs") / "datasets" / "embedded" / "faqs"
SCRIPTS = Path(__file__).parents[2] / "scripts"


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
    return import_module("build_faqs")


# --- the embedded set ----------------------------------------------------------------------------


def test_the_licence_of_every_source_is_there(records: list[dict[str, Any]]) -> None:
    text = " ".join((FOLDER / "LICENSE.txt").read_text(encoding="utf-8").split())
    for source, terms in {
        "perl/": 'The "Artistic License"',
        "python/": "PSF LICENSE AGREEMENT FOR PYTHON 3.11.2",
        "debian/": "Permission is granted to copy and distribute modified versions",
    }.items():
        assert source in text
        assert terms in text
    assert {record["id"].split("/")[0] + "/" for record in records} == {
        "perl/",
        "python/",
        "debian/",
    }


def test_content_is_what_the_card_records(
    content: bytes, records: list[dict[str, Any]], card: str, builder: ModuleType
) -> None:
    assert hashlib.sha256(content).hexdigest() in card
    assert all(sha256 in card for _, sha256 in builder.PACKAGES)
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (\w+) \| (\d+) \| (\d+)", card, re.M)}
    for split in SPLITS:
        members = [record for record in records if record["split"] == split]
        assert rows[split] == (str(len(members)), str(len({r["unit"] for r in members})))
    for source in ("perl", "python", "debian"):
        mine = [record for record in records if record["id"].startswith(source)]
        train = sum(record["split"] == "train" for record in mine)
        assert rows[source] == (str(len(mine)), str(train))


def test_schema(records: list[dict[str, Any]]) -> None:
    assert len({record["id"] for record in records}) == len(records) == 472
    for record in records:
        assert list(record) == ["id", "topic", "question", "answer", "unit", "split"]
        assert record["split"] in SPLITS
        assert "?" in record["question"]
        assert re.match("(Perl|Python|Debian): .", record["topic"])
        assert len(record["answer"].split()) >= 8
        lines = [record["question"], record["topic"], *record["answer"].split("\n")]
        assert all(line == line.strip() and line.isprintable() and line for line in lines)


def test_no_markup_is_left(records: list[dict[str, Any]]) -> None:
    """Pod's formatting codes, reStructuredText's roles, HTML's tags and entities."""
    markup = re.compile(
        r"[BCFILSXZ]<[^>]|E<[a-z]+>|^=\w+|:[a-z]+:`|</\w+>|<(?:p|li|code|a|em|b)\b|&[a-z]+;|¶"
    )
    found = [(r["id"], markup.findall(r["question"] + "\n" + r["answer"])) for r in records]
    assert [pair for pair in found if pair[1]] == []


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_near_duplicates_do_not_cross_splits(records: list[dict[str, Any]]) -> None:
    """The same words in a question, or a fifth of the three-word windows of an answer."""
    splits_of_unit = defaultdict(set)
    for record in records:
        splits_of_unit[record["unit"]].add(record["split"])
    assert {len(splits) for splits in splits_of_unit.values()} == {1}
    assert any(count > 1 for count in Counter(record["unit"] for record in records).values())
    asked = [frozenset(words(record["question"])) for record in records]
    windows = []
    for record in records:
        sequence = words(record["answer"])
        windows.append(set(zip(sequence, sequence[1:], sequence[2:], strict=False)))
    for j in range(len(records)):
        for i in range(j):
            if records[i]["split"] != records[j]["split"]:
                assert asked[i] != asked[j]
                shared = len(windows[i] & windows[j])
                apart = len(windows[i]) + len(windows[j]) - shared
                assert shared < 0.2 * apart, (records[i], records[j])


def test_shares_of_the_splits(records: list[dict[str, Any]]) -> None:
    """Hashes of 457 units: a share of 0.15 is off by 4 deviations (0.067) with chance 6e-5."""
    counts = Counter(record["split"] for record in records)
    for split, share in zip(SPLITS, (0.7, 0.15, 0.15), strict=True):
        assert abs(counts[split] / len(records) - share) < 0.067


def test_the_loader_gives_what_is_shipped(records: list[dict[str, Any]]) -> None:
    for split in SPLITS:
        loaded = load_faqs(split=split)
        assert [faq.id for faq in loaded.records] == [
            record["id"] for record in records if record["split"] == split
        ]
        assert loaded.training == load_faqs().records
    assert len(load_faqs(split="all").records) == len(records)


# --- the builder ---------------------------------------------------------------------------------

POD = """\
=head1 NAME

perlfaq0 - Things

=head2 How do I C<< print <x> >>, B<today>?
X<print> X<output>

(contributed by Some Body)

Use F<print> as in L<perlfunc/print>, see L<the docs|perlop> or L<http://x.org/>.
It is 3 E<lt> 4.

    print "code";

=over 4

=item *

the first thing

=item second

=back

=head2 What is only code?

    print;

And more than enough words for an answer of this.

=head2 What does the code say?

Like this, which is announced in more than eight words:

    print;

=head2 No question

But more than enough words for an answer of this.

=head2 Too short?

Yes.
"""


def test_pod_becomes_text(builder: ModuleType) -> None:
    [entry] = builder.entries("Perl", "Things", builder.read_pod(POD))
    assert entry == builder.Entry(
        "perl/how-do-i-print-x-today",
        "Perl: Things",
        "How do I print <x>, today?",
        "Use print as in perlfunc, see the docs or http://x.org/. It is 3 < 4.\n"
        "- the first thing\n- second",
    )


PAGE = """\
<html><head><title>Things FAQ</title></head><body><div class="related"><ul><li>index</li></ul></div>
<h1>Things FAQ<a class="headerlink" href="#x">&#182;</a></h1><div class="toc"><p>Is it?</p></div>
<h2>3.1. Is it &lsquo;so&rsquo;?<a class="headerlink">&#182;</a></h2>
<p>It <em>is</em> so, says <a href="y">the
page</a><sup>[1]</sup> &amp; all.</p><pre>code <b>x</b></pre>
<ul><li><p>one thing</p></li><li>another</li></ul><dl><dt>Term</dt><dd>what it means</dd></dl>
<div class="footnotes"><p>[1] a note</p></div><div class="footer">Copyright</div></body></html>
"""


def test_html_becomes_text(builder: ModuleType) -> None:
    blocks = builder.read_html(PAGE)
    assert blocks[0] == builder.Block("heading", "Things FAQ", 1)
    [entry] = builder.entries("Debian", "Things", blocks)
    assert entry == builder.Entry(
        "debian/is-it-so",
        "Debian: Things",
        "Is it 'so'?",
        "It is so, says the page & all.\n- one thing\n- another\n- Term\nwhat it means",
    )


def test_nearly_equal_questions_are_one_unit(builder: ModuleType) -> None:
    long = "the quick brown fox jumps over the lazy dog and runs away from it"
    found = [
        builder.Entry("a", "t", "How do I copy a file?", "one answer to it"),
        builder.Entry("b", "t", "How can I copy files?", long),
        builder.Entry("c", "t", "Where do foxes run?", f"{long} today"),
        builder.Entry("d", "t", "How do I delete a file?", "another answer to that"),
    ]
    assert builder.units(found) == ["a", "a", "a", "d"]
    twins = builder.with_unique_ids([found[0], found[3], found[0]])
    assert [entry.id for entry in twins] == ["a", "d", "a-2"]


def test_units_and_splits_are_those_of_the_shipped_data(
    builder: ModuleType, records: list[dict[str, Any]]
) -> None:
    found = [builder.Entry(*(r[k] for k in ("id", "topic", "question", "answer"))) for r in records]
    assert builder.units(found) == [record["unit"] for record in records]
    assert [builder.split_of(r["unit"]) for r in records] == [r["split"] for r in records]


def test_another_package_is_refused(builder: ModuleType, tmp_path: Path) -> None:
    name, sha256 = builder.PACKAGES[0]
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(SystemExit) as refusal:
        builder.main(tmp_path, tmp_path / "data.jsonl.gz")
    assert sha256 in str(refusal.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(refusal.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


# --- files and hub sets --------------------------------------------------------------------------


def faq(number: int, **fields: object) -> dict[str, object]:
    return {"id": number, "question": f"Why {number}?", "answer": f"For {number}.", **fields}


def write(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        faq(1, topic="numbers", unit="u", split="test", more="ignored"),
        faq(2, topic=None),
        *(faq(n) for n in range(3, 200)),
    )
    loaded = load_faqs(path, split="all")
    assert loaded.records[0] == FAQ("1", "numbers", "Why 1?", "For 1.", "u")
    assert loaded.records[1] == FAQ("2", "", "Why 2?", "For 2.", "2")
    for split in SPLITS:
        for record in load_faqs(path, split=split).records[1:]:
            assert split == split_of(record.question)
    assert load_faqs(path, split="test").training == load_faqs(path).records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"answer": "x", "id": 1}, "field 'question' is missing"),
        (faq(1, answer=" "), "field 'answer' is blank"),
        (faq(1, answer=["x"]), "field 'answer' is a list of 1 instead of a string"),
        (faq(1, topic=3), "field 'topic' is the number 3 instead of a string"),
        (faq(1, topic=""), "field 'topic' is blank"),
        (faq(1, split="dev"), "field 'split' is 'dev'"),
    ],
)
def test_a_bad_record_is_refused(tmp_path: Path, record: dict[str, object], message: str) -> None:
    path = write(tmp_path / "mine.jsonl", faq(0), record)
    with pytest.raises(ValueError, match=rf"mine\.jsonl, line 2: {re.escape(message)}"):
        load_faqs(path, split="all")
    with pytest.warns(UserWarning, match="skipped 1 bad of 2"):
        assert load_faqs(path, split="all", skip_bad_records=True).skipped == 1


@pytest.mark.parametrize("topic", ["topic", "category", None])
def test_hub_sets_have_questions_and_answers(tmp_path: Path, topic: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [
        {"question": f"q{n}", "answer": f"a{n}"} | ({topic: "t"} if topic else {}) for n in (0, 1)
    ]
    saved = {
        split: datasets.Dataset.from_list(rows[i : i + 1])
        for i, split in enumerate(("train", "test"))
    }
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "set")
    loaded = load_faqs(f"hf:{tmp_path / 'set'}", split="test")
    assert loaded.records == (FAQ("test-0", "t" if topic else "", "q1", "a1", "test-0"),)
    assert [record.question for record in loaded.training] == ["q0"]
