"""Loaders of dialogues and documents: official formats, splits, and what is refused and how."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_envs.datasets import hub as hub_module
from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.records import Dialogue, Document, Turn
from llm_envs.datasets.splits import SPLITS, check_split, split_of

Json = dict[str, Any]


def dialogue(number: int, **fields: object) -> Json:
    return {
        "id": f"d{number}",
        "passage": f"Passage {number} says {number}.",
        "turns": [
            {"question": "What does it say?", "answers": [str(number), f"the {number}"]},
            {"question": "And why?", "answers": ["unknown"]},
        ],
        **fields,
    }


def document(number: int, **fields: object) -> Json:
    return {"id": f"t{number}", "text": f"Text {number}.", "summaries": [str(number)], **fields}


def write_jsonl(path: Path, records: list[Json]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# The field names of the published files, with real sentences of their kind.
SQUAD_2: Json = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": "The Normans gave their name to Normandy, a region in France.",
                    "qas": [
                        {
                            "question": "In what country is Normandy located?",
                            "id": "56ddde6b9a695914005b9628",
                            "answers": [
                                {"text": "France", "answer_start": 54},
                                {"text": "in France", "answer_start": 51},
                                {"text": "France", "answer_start": 54},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "plausible_answers": [{"text": "Normandy", "answer_start": 31}],
                            "question": "What is France a region of?",
                            "id": "5ad39d53604f3c001a3fe8d1",
                            "answers": [],
                            "is_impossible": True,
                        },
                    ],
                },
                {
                    "context": "They spoke Norman, a dialect of Old French — «le normand».",
                    "qas": [
                        {
                            "question": "Qu’est-ce qu’ils parlaient ?",
                            "id": "56ddde6b9a695914005b9629",
                            "answers": [{"text": "«le normand»", "answer_start": 45}],
                            "is_impossible": False,
                        }
                    ],
                },
            ],
        }
    ],
}
NORMANS = (
    Dialogue(
        "56ddde6b9a695914005b9628",
        "The Normans gave their name to Normandy, a region in France.",
        (
            Turn("In what country is Normandy located?", ("France", "in France")),
            Turn("What is France a region of?", ("unknown",)),
        ),
        "Normans",
    ),
    Dialogue(
        "56ddde6b9a695914005b9629",
        "They spoke Norman, a dialect of Old French — «le normand».",
        (Turn("Qu’est-ce qu’ils parlaient ?", ("«le normand»",)),),
        "Normans",
    ),
)


def span(text: str, turn: int, start: int = 0) -> Json:
    return {
        "span_start": start,
        "span_end": start + 4,
        "span_text": text,
        "input_text": text,
        "turn_id": turn,
    }


COQA: Json = {
    "version": "1.0",
    "data": [
        {
            "source": "mctest",
            "id": "3dr23u6we5exclen4th8uq9rb42tel",
            "filename": "mc160.test.41",
            "story": "Once upon a time, in a barn near a farm house, lived a white kitten.",
            "questions": [
                {"input_text": "What color was it?", "turn_id": 1},
                {"input_text": "Where did it live?", "turn_id": 2},
                {"input_text": "What was its name?", "turn_id": 3},
            ],
            "answers": [span("white", 1), span("in a barn", 2), span("unknown", 3, -1)],
            "additional_answers": {
                "0": [span("white", 1), span("in a barn", 2), span("Unknown", 3, -1)],
                "1": [span("It was white", 1), span("near a farm", 2), span("unknown", 3, -1)],
            },
            "name": "mc160.test.41",
        }
    ],
}
KITTEN = Dialogue(
    "3dr23u6we5exclen4th8uq9rb42tel",
    "Once upon a time, in a barn near a farm house, lived a white kitten.",
    (
        Turn("What color was it?", ("white", "It was white")),
        Turn("Where did it live?", ("in a barn", "near a farm")),
        Turn("What was its name?", ("unknown",)),
    ),
    "3dr23u6we5exclen4th8uq9rb42tel",
)


# --- Splits -----------------------------------------------------------------------------------


def test_the_hash_splits_80_10_10() -> None:
    counts = Counter(split_of(f"key {number}") for number in range(20_000))
    assert counts["train"] / 20_000 == pytest.approx(0.8, abs=0.01)
    assert counts["validation"] / 20_000 == pytest.approx(0.1, abs=0.01)
    assert counts["test"] / 20_000 == pytest.approx(0.1, abs=0.01)


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_any_key_has_one_split(key: str) -> None:
    assert split_of(key) == split_of(key)
    assert split_of(key) in SPLITS


def test_the_hash_is_the_same_in_every_process() -> None:
    code = (
        "from llm_envs.datasets.splits import split_of;"
        "print([split_of(str(number)) for number in range(50)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == str([split_of(str(number)) for number in range(50)])


@pytest.mark.parametrize(
    ("split", "hint"), [("val", "validation"), ("Test", "test"), ("trian", "train")]
)
def test_a_wrong_split_is_refused_with_the_likely_one(split: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"'{split}' .* mean '{hint}'\? Use one of .*'all'"):
        check_split(split)
    with pytest.raises(ValueError, match=f"mean '{hint}'"):
        load_dialogues("anything", split=split)


@pytest.mark.parametrize("split", [None, 3, "", "x" * 10**6, ["train"]], ids=str.__name__.format)
def test_no_split_at_all_is_refused_shortly(split: object) -> None:
    with pytest.raises(ValueError, match="does not exist") as error:
        check_split(split)
    assert len(str(error.value)) < 200


# --- JSONL ------------------------------------------------------------------------------------


def test_a_dialogue_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(1, unit="one"), dialogue(2, note="x")])
    loaded = load_dialogues(path, split="all")

    def turns(n: str) -> tuple[Turn, ...]:
        return (Turn("What does it say?", (n, f"the {n}")), Turn("And why?", ("unknown",)))

    assert loaded.records == (
        Dialogue("d1", "Passage 1 says 1.", turns("1"), "one"),
        Dialogue("d2", "Passage 2 says 2.", turns("2"), "d2"),
    )
    assert (loaded.skipped, loaded.reasons, loaded.source) == (0, (), str(path))


def test_a_document_is_read_with_either_name_of_its_summaries(tmp_path: Path) -> None:
    single = {"id": 7, "text": "Text 7.", "summary": "seven"}
    path = write_jsonl(tmp_path / "data.jsonl", [document(1, unit="one"), single])
    assert load_documents(path, split="all").records == (
        Document("t1", "Text 1.", ("1",), "one"),
        Document("7", "Text 7.", ("seven",), "7"),
    )


# U+2028 and U+0085 end a line for str.splitlines, but not in JSON.
STRANGE = '日本 🙂 é\u2028next\u0085last \x0b\x0c \\ " \x7f'


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n\n \r\n"], ids=ascii)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("zipped", [False, True], ids=["text", "gz"])
@pytest.mark.parametrize("escaped", [False, True], ids=["raw", "escaped"])
def test_the_encodings_of_a_file_make_no_difference(
    tmp_path: Path, newline: str, mark: str, zipped: bool, escaped: bool
) -> None:
    records = [dialogue(n, passage=f"{STRANGE} {n}") for n in range(3)]
    lines = [json.dumps(record, ensure_ascii=escaped) for record in records]
    data = (mark + newline.join(lines)).encode()
    # The content counts, not the name: a gzip file is one without .gz too.
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(data) if zipped else data)
    loaded = load_dialogues(path, split="all").records
    assert [record.passage for record in loaded] == [f"{STRANGE} {n}" for n in range(3)]


def test_a_lone_surrogate_and_nul_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [document(1, text="\ud800 \x00 x", split="test")])
    assert load_documents(path, split="test").records[0].text == "\ud800 \x00 x"


def test_stated_splits_are_kept_and_others_follow_the_content(tmp_path: Path) -> None:
    stated = [dialogue(n, split=SPLITS[n % 3]) for n in range(30)]
    hashed = [dialogue(n) for n in range(30, 330)]
    path = write_jsonl(tmp_path / "data.jsonl", stated + hashed)
    loaded = {split: load_dialogues(path, split=split).records for split in (*SPLITS, "all")}
    ids = {split: [record.id for record in loaded[split]] for split in loaded}
    assert ids["all"] == [f"d{n}" for n in range(330)]
    assert sorted(ids["train"] + ids["validation"] + ids["test"]) == sorted(ids["all"])
    for position, split in enumerate(SPLITS):
        assert ids[split][:10] == [f"d{n}" for n in range(position, 30, 3)]
        for record in loaded[split][10:]:
            assert split_of(record.passage) == split
    # Neither order nor other records move a record.
    again = write_jsonl(tmp_path / "again.jsonl", hashed[::-2])
    assert {record.id for record in load_dialogues(again, split="test").records} <= set(ids["test"])


def test_a_unit_is_never_divided(tmp_path: Path) -> None:
    records = [dialogue(n, unit=f"unit {n % 40}") for n in range(400)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    units = [
        {record.unit for record in load_dialogues(path, split=split).records} for split in SPLITS
    ]
    assert sum(map(len, units)) == 40
    assert all(units)


@pytest.mark.parametrize("same", [{"unit": "France"}, {"passage": "The same text."}])
def test_a_divided_unit_or_content_is_refused(tmp_path: Path, same: Json) -> None:
    records = [dialogue(1, split="train", **same), dialogue(2, split="test", **same)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(ValueError, match=r"line 2: field 'split' is 'test', but line 1.*'train'"):
        load_dialogues(path)


def test_an_empty_split_is_refused_with_the_counts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(n, split="train") for n in range(3)])
    with pytest.raises(
        ValueError, match=r"'test' \(it has train 3, validation 0, test 0\).*\"all\""
    ):
        load_dialogues(path, split="test")


# --- What is refused, and how -----------------------------------------------------------------


def without(record: Json, name: str) -> Json:
    return {key: value for key, value in record.items() if key != name}


def turn(**fields: object) -> Json:
    return dialogue(
        2, turns=[dialogue(2)["turns"][0], {"question": "q", "answers": ["a"], **fields}]
    )


BAD_DIALOGUES: list[tuple[object, str]] = [
    ([1], r"line 2 is a list of 1 instead of a JSON object"),
    ("text", r"line 2 is 'text' instead of a JSON object"),
    (without(dialogue(2), "id"), r"line 2: field 'id' is missing"),
    (dialogue(2, id=""), r"field 'id' is blank"),
    (dialogue(2, id=True), r"field 'id' is true instead of a string"),
    (dialogue(2, id="d1"), r"line 2: field 'id' is 'd1', as in line 1\. Give each record"),
    (without(dialogue(2), "passage"), r"field 'passage' is missing: the record is an object with"),
    ({**without(dialogue(2), "passage"), "pasage": "x"}, r"'passage' is missing.*'pasage' meant"),
    (dialogue(2, passage=None), r"field 'passage' is null instead of a string"),
    (dialogue(2, passage=" \n"), r"field 'passage' is blank"),
    (dialogue(2, turns=[]), r"field 'turns' is an empty list"),
    (dialogue(2, turns={"question": "q"}), r"field 'turns' is an object with 'question' instead"),
    (dialogue(2, turns=["q"]), r"field 'turns\[0\]' is 'q' instead of a JSON object"),
    (turn(question=3), r"field 'turns\[1\]\.question' is the number 3 instead of a string"),
    (turn(answers="a"), r"field 'turns\[1\]\.answers' is 'a' instead of a list\. Write \[\"a\"\]"),
    (turn(answers=[]), r"'turns\[1\]\.answers' is an empty list\. Give .* or \[\"unknown\"\]"),
    (turn(answers=["a", 2]), r"field 'turns\[1\]\.answers\[1\]' is the number 2 instead"),
    (turn(answers=["a", ""]), r"field 'turns\[1\]\.answers\[1\]' is blank"),
    (dialogue(2, unit=5), r"field 'unit' is the number 5 instead of a string"),
    (dialogue(2, split="val"), r"field 'split' is 'val'\. Did you mean 'validation'\? Use one"),
    (dialogue(2, split="all"), r"field 'split' is 'all'"),
    (dialogue(2, split=["train"]), r"field 'split' is a list of 1"),
]
BAD_DOCUMENTS: list[tuple[object, str]] = [
    (
        dialogue(2),
        r"field 'text' is missing: the record is an object with 'id', 'passage', 'turns'",
    ),
    (without(document(2), "summaries"), r"field 'summaries' is missing"),
    (document(2, summary="s"), r"field 'summary' stands beside 'summaries'"),
    (document(2, summaries=[[]]), r"field 'summaries\[0\]' is an empty list instead of a string"),
]
BAD_LINES: list[tuple[bytes, str]] = [
    (b"{", r"line 2 is not JSON \(.*column 2\)"),
    (b'{"id": "\xff"}', r"line 2 is not UTF-8 text \(byte 0xff at position 8\)"),
    (b"[" * 100_000, r"line 2 is not usable JSON"),
    (b"9" * 5_000, r"line 2 is not usable JSON"),
    (b"null", r"line 2 is null instead of a JSON object"),
]


def lines_with(bad: bytes, good: list[Json]) -> bytes:
    first, *others = [json.dumps(record).encode() for record in good]
    return b"\n".join([first, bad, *others])


@pytest.mark.parametrize(
    ("load", "good", "bad", "message"),
    [(load_dialogues, dialogue, json.dumps(bad).encode(), text) for bad, text in BAD_DIALOGUES]
    + [(load_documents, document, json.dumps(bad).encode(), text) for bad, text in BAD_DOCUMENTS]
    + [(load_documents, document, bad, text) for bad, text in BAD_LINES],
)
def test_a_bad_record_is_refused_or_skipped_and_counted(
    tmp_path: Path, load: Any, good: Any, bad: bytes, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines_with(bad, [good(n, split="train") for n in (1, 3, 4)]))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "skip_bad_records=True" in str(error.value)
    with pytest.warns(UserWarning, match=r"skipped 1 bad of 4 records") as warned:
        loaded = load(path, skip_bad_records=True)
    assert [record.id[1:] for record in loaded.records] == ["1", "3", "4"]
    assert loaded.skipped == 1
    assert len(loaded.reasons) == 1
    assert loaded.reasons[0] in str(warned[0].message)
    assert warned[0].filename == __file__, "the warning must point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path, skip_bad_records=True).skipped == 1, "counted again, warned once"


def test_of_many_bad_records_a_few_are_told(tmp_path: Path) -> None:
    records = [dialogue(1, split="train")] + [dialogue(n, turns=[]) for n in range(2, 30)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.warns(UserWarning, match="skipped 28 bad of 29"):
        loaded = load_dialogues(path, skip_bad_records=True)
    assert loaded.skipped == 28
    assert 1 < len(loaded.reasons) < 10


def test_a_source_without_a_good_record_is_refused_even_when_skipping(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(n, turns=[]) for n in range(3)])
    with pytest.raises(ValueError, match=r"no usable dialogue\. All 3 are bad; .*line 1.*turns"):
        load_dialogues(path, skip_bad_records=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \r\n", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n\x00", "not UTF-8 text"),
        (b"question,answer\nq,a\n", "line 1, column 1: the file is not JSON"),
        (json.dumps([dialogue(1)], indent=1).encode(), "not recognised: .* a list of 1"),
        (json.dumps({"data": []}).encode(), "not recognised: .* an object with 'data'"),
        (json.dumps({"data": [{"x": 1}]}).encode(), "not recognised"),
        (json.dumps(dialogue(1), indent=1).encode(), "not recognised.*one dialogue a line"),
        (json.dumps(SQUAD_2, indent=1)[:-40].encode(), r"line \d+, column \d+: .*not JSON"),
        (gzip.compress(b'{"id": 1}' * 1000, mtime=0)[:-12], "gzip file is damaged"),
        (b"\x1f\x8bnonsense", "gzip file is damaged"),
    ],
)
def test_a_file_of_no_known_format_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_dialogues(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("load", "name", "hint"),
    [
        (load_dialogues, "countries_wordnett", "countries_wordnet"),
        (load_dialogues, "countries", "countries_wordnet"),
        (load_documents, "debian-packages", "debian_packages"),
        (load_documents, "nothing like it", None),
        (load_documents, "no/such/file.jsonl", None),
        (load_documents, "nul \x00", None),
        (load_documents, "x" * 5000, None),
        (load_documents, "", None),
        (load_dialogues, os.devnull, None),  # there is such a thing, but neither file nor folder
    ],
)
def test_an_unknown_dataset_is_refused(load: Any, name: str, hint: str | None) -> None:
    with pytest.raises(ValueError, match=r"neither an embedded set .* hf:<repo id>") as error:
        load(name)
    assert (f"Did you mean '{hint}'?" in str(error.value)) == (hint is not None)
    known = "countries_wordnet" if load is load_dialogues else "debian_packages"
    assert f"sets are '{known}'" in str(error.value)
    assert len(str(error.value)) < 500


def test_something_else_than_a_name_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a name or a path, but got the number 3"):
        load_dialogues(3)  # type: ignore[arg-type]


# --- Official files ---------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 1], ids=["one line", "indented"])
@pytest.mark.parametrize("zipped", [False, True], ids=["text", "gz"])
def test_official_files_are_recognised_by_their_content(
    tmp_path: Path, indent: int | None, zipped: bool
) -> None:
    for content, expected in ((SQUAD_2, NORMANS), (COQA, (KITTEN,))):
        data = b"\xef\xbb\xbf" + json.dumps(content, indent=indent, ensure_ascii=False).encode()
        path = tmp_path / "whatever.txt"
        path.write_bytes(gzip.compress(data) if zipped else data)
        assert load_dialogues(path, split="all").records == expected


def test_squad_1_has_no_is_impossible(tmp_path: Path) -> None:
    content = json.loads(json.dumps(SQUAD_2))
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs[0]["qas"].pop()
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            del qa["is_impossible"]
    path = tmp_path / "train-v1.1.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    loaded = load_dialogues(path, split="all").records
    assert loaded[0].turns == NORMANS[0].turns[:1]
    assert loaded[1] == NORMANS[1]


def test_official_files_are_split_by_their_unit(tmp_path: Path) -> None:
    def paragraph(number: int) -> Json:
        qa = {"id": str(number), "question": "q", "answers": [{"text": "a", "answer_start": 0}]}
        return {"context": f"Context {number}.", "qas": [qa]}

    articles = [
        {"title": f"Title {n}", "paragraphs": [paragraph(3 * n + k) for k in range(3)]}
        for n in range(60)
    ]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"version": "1.1", "data": articles}), encoding="utf-8")
    stories = [{**COQA["data"][0], "id": f"s{n}", "story": f"Story {n}."} for n in range(60)]
    coqa = tmp_path / "coqa.json"
    coqa.write_text(json.dumps({"version": "1.0", "data": stories}), encoding="utf-8")
    for path, key in ((squad, "unit"), (coqa, "passage")):
        seen = 0
        for split in SPLITS:
            for record in load_dialogues(path, split=split).records:
                assert split_of(getattr(record, key)) == split
                seen += 1
        assert seen == len(load_dialogues(path, split="all").records)


def changed(content: Json, *steps: str | int, value: object) -> Json:
    """Copy an official file with one place replaced (or removed, with ``...``)."""
    copy: Json = json.loads(json.dumps(content))
    target: Any = copy
    for step in steps[:-1]:
        target = target[step]
    if value is ...:
        del target[steps[-1]]
    else:
        target[steps[-1]] = value
    return copy


P0 = ("data", 0, "paragraphs", 0)
C0 = ("data", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            changed(SQUAD_2, *P0, "qas", 0, "answers", value=[]),
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers is an empty list",
        ),
        (
            changed(SQUAD_2, *P0, "qas", 1, "is_impossible", value="yes"),
            r"paragraphs\[0\]\.qas\[1\]\.is_impossible is 'yes' instead of true or false",
        ),
        (
            changed(SQUAD_2, *P0, "qas", 0, "answers", 1, "text", value=7),
            r"paragraphs\[0\]\.qas\[0\]\.answers\[1\]\.text is the number 7 instead of a string",
        ),
        (
            changed(SQUAD_2, *P0, "qas", 0, "id", value=...),
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.id is missing",
        ),
        (changed(SQUAD_2, *P0, "context", value=...), r"data\[0\]\.paragraphs\[0\]\.context is"),
        (changed(SQUAD_2, *P0, "qas", value=[]), r"data\[0\]\.paragraphs\[0\]\.qas is an empty"),
        (changed(SQUAD_2, *P0, value=None), r": data\[0\]\.paragraphs\[0\] is null instead"),
        (changed(SQUAD_2, "data", 0, "title", value=""), r"data\[0\]\.title is blank"),
        (
            changed(SQUAD_2, "data", 0, "paragraphs", 1, "qas", 0, "id", value=NORMANS[0].id),
            r"data\[0\]\.paragraphs\[1\]\.id is '56ddde6b9a695914005b9628', as in data\[0\]",
        ),
        (changed(COQA, *C0, "story", value=" "), r"data\[0\]\.story is blank"),
        (changed(COQA, *C0, "questions", 2, value=...), r"data\[0\]\.answers has 3 elements, but"),
        (
            changed(COQA, *C0, "answers", 1, "turn_id", value=3),
            r"data\[0\]\.answers\[1\]\.turn_id is the number 3, but .* the number 2",
        ),
        (
            changed(COQA, *C0, "answers", 1, "input_text", value=""),
            r"data\[0\]\.answers\[1\]\.input_text is blank",
        ),
        (
            changed(COQA, *C0, "additional_answers", "1", value=[]),
            r"data\[0\]\.additional_answers\.1 is an empty list",
        ),
        (
            changed(COQA, *C0, "additional_answers", value=[1]),
            r"data\[0\]\.additional_answers is a list of 1 instead of a JSON object",
        ),
    ],
)
def test_a_bad_official_record_is_named_by_its_path(
    tmp_path: Path, content: Json, message: str
) -> None:
    path = tmp_path / "official.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_dialogues(path)
    assert str(path) in str(error.value)
    # A good record beside the bad one is kept on request.
    good = json.loads(json.dumps(content))
    if "paragraphs" in content["data"][0]:
        kept = {"context": "c", "qas": [{"id": "k", "question": "q", "answers": [{"text": "a"}]}]}
        good["data"].append({"title": "Kept", "paragraphs": [kept]})
    else:
        good["data"].append({**COQA["data"][0], "id": "k", "story": "Kept."})
    path.write_text(json.dumps(good), encoding="utf-8")
    with pytest.warns(UserWarning, match="skipped 1 bad"):
        loaded = load_dialogues(path, split="all", skip_bad_records=True)
    assert loaded.records[-1].id == "k"


def test_an_annotator_who_gave_no_answer_costs_nothing(tmp_path: Path) -> None:
    content = changed(COQA, *C0, "additional_answers", "1", 0, "input_text", value="")
    path = tmp_path / "coqa.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load_dialogues(path, split="all").records[0].turns[0].answers == ("white",)


def test_a_format_can_be_forced(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(1, data=[])])
    assert load_dialogues(path, split="all", dataset_format="jsonl").records[0].id == "d1"
    forced = tmp_path / "coqa.json"
    forced.write_text(json.dumps(COQA), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\[0\]\.title is missing"):
        load_dialogues(forced, dataset_format="squad")
    one = write_jsonl(tmp_path / "one.jsonl", [dialogue(2)])
    with pytest.raises(ValueError, match=r"not in the 'coqa' format: .* a list 'data'"):
        load_dialogues(one, dataset_format="coqa")


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_dialogues, "squadd", "Did you mean 'squad'.*'jsonl', 'squad', 'coqa'"),
        (load_documents, "squad", "does not exist for documents.*Use one of 'jsonl'"),
    ],
)
def test_an_unknown_format_is_refused(tmp_path: Path, load: Any, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, dataset_format=name)


# --- Folders ----------------------------------------------------------------------------------


def test_in_a_folder_a_file_name_states_the_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [dialogue(n) for n in range(20)])
    write_jsonl(tmp_path / "my-dev_v2.json", [dialogue(n) for n in range(20, 30)])
    (tmp_path / "coqa-test-v1.0.json").write_text(json.dumps(COQA), encoding="utf-8")
    write_jsonl(tmp_path / ".hidden.jsonl", [dialogue(99)])
    (tmp_path / "CARD.md").write_text("no data", encoding="utf-8")

    def load(split: str) -> tuple[Dialogue, ...]:
        return load_dialogues(tmp_path, split=split).records

    assert [record.id for record in load("train")] == [f"d{n}" for n in range(20)]
    assert [record.id for record in load("validation")] == [f"d{n}" for n in range(20, 30)]
    assert load("test") == (KITTEN,)
    assert len(load("all")) == 31


def test_the_name_of_a_single_file_says_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "test.jsonl", [dialogue(n) for n in range(100)])
    assert len(load_dialogues(path, split="train").records) > 60


def test_in_a_folder_other_names_say_nothing_and_records_decide_first(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "contest.jsonl", [dialogue(n) for n in range(100)])
    write_jsonl(tmp_path / "test.jsonl", [dialogue(100, split="train")])
    assert len(load_dialogues(tmp_path, split="validation").records) < 40
    assert load_dialogues(tmp_path, split="train").records[-1].id == "d100"


def test_a_bad_record_in_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [dialogue(1)])
    write_jsonl(tmp_path / "b.jsonl", [dialogue(2), dialogue(1, passage="Other.")])
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: field 'id' .*a\.jsonl, line 1"):
        load_dialogues(tmp_path)


def test_content_that_published_splits_share_is_told_and_kept(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [dialogue(1, passage="Same."), dialogue(2)])
    write_jsonl(tmp_path / "test.jsonl", [dialogue(3, passage="Same.")])
    with pytest.warns(UserWarning, match="content of 1 records also stands in another split"):
        loaded = load_dialogues(tmp_path, split="test")
    assert len(loaded.records) == 1


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("id,text\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no file that ends in '\.jsonl'"):
        load_documents(tmp_path)


# --- The cache and speed ----------------------------------------------------------------------


def test_environments_share_one_tuple_until_the_file_changes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(n, split="train") for n in range(5)])
    first = load_dialogues(path).records
    assert load_dialogues(str(path)).records is first
    assert load_dialogues(path, split="all").records[0] is first[0]
    write_jsonl(path, [dialogue(n, split="train") for n in range(6)])
    assert len(load_dialogues(path).records) == 6


def test_ten_thousand_records_load_fast(tmp_path: Path) -> None:
    text = "Some words of a description that is as long as they usually are. " * 6
    path = tmp_path / "data.jsonl"

    def seconds(number: int) -> float:
        # Other content each time, so that the cache is no help.
        write_jsonl(path, [document(n, text=f"{text}{n} {number}") for n in range(10_000)])
        start = time.process_time()
        assert len(load_documents(path, split="all").records) == 10_000
        return time.process_time() - start

    assert min(map(seconds, range(3))) < 0.5


def test_loading_needs_no_optional_package(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [dialogue(1)])
    code = (
        "import sys; from llm_envs.datasets.dialogues import load_dialogues;"
        f"load_dialogues({str(path)!r}, split='all');"
        "assert not {'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- The hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The optional library, writing its caches beside the test and asking no network."""
    library: Any = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
    library.disable_progress_bars()
    return library


SQUAD_ROWS = [
    {
        "id": qa["id"],
        "title": "Normans",
        "context": paragraph["context"],
        "question": qa["question"],
        "answers": {
            "text": [answer["text"] for answer in qa["answers"]],
            "answer_start": [answer["answer_start"] for answer in qa["answers"]],
        },
    }
    for paragraph in SQUAD_2["data"][0]["paragraphs"]
    for qa in paragraph["qas"]
]
COQA_ROW = {
    "source": "mctest",
    "story": KITTEN.passage,
    "questions": [turn.question for turn in KITTEN.turns],
    "answers": {
        "input_text": ["white", "in a barn", "unknown"],
        "answer_start": [0, 0, -1],
        "answer_end": [4, 4, -1],
    },
}


def saved(hub: Any, folder: Path, **splits: list[Json]) -> str:
    sets = {name: hub.Dataset.from_list(rows) for name, rows in splits.items()}
    hub.DatasetDict(sets).save_to_disk(str(folder))
    return f"hf:{folder}"


def test_hub_squad_rows_become_the_dialogues_of_the_file(hub: Any, tmp_path: Path) -> None:
    name = saved(hub, tmp_path / "squad_v2", train=SQUAD_ROWS)
    assert load_dialogues(name).records == NORMANS
    assert load_dialogues(name).records is load_dialogues(name).records


def test_hub_coqa_rows_become_dialogues(hub: Any, tmp_path: Path) -> None:
    other = {**COQA_ROW, "story": "Other."}
    name = saved(
        hub, tmp_path / "coqa", train=[COQA_ROW, other], validation=[COQA_ROW | {"story": "V"}]
    )
    first, second = load_dialogues(name).records
    assert [turn.answers for turn in first.turns] == [("white",), ("in a barn",), ("unknown",)]
    assert first.passage == KITTEN.passage
    assert second.passage == "Other."
    assert [record.passage for record in load_dialogues(name, split="validation").records] == ["V"]
    assert len(load_dialogues(name, split="all").records) == 3


def test_hub_coqa_with_additional_answers_equals_the_file(hub: Any, tmp_path: Path) -> None:
    def columns(spans: list[Json]) -> Json:
        return {key: [one[key] for one in spans] for key in spans[0]}

    source = COQA["data"][0]
    row = {
        "id": source["id"],
        "story": source["story"],
        "questions": columns(source["questions"]),
        "answers": columns(source["answers"]),
        "additional_answers": {
            name: columns(spans) for name, spans in source["additional_answers"].items()
        },
    }
    assert load_dialogues(saved(hub, tmp_path / "coqa", test=[row]), split="test").records == (
        KITTEN,
    )


@pytest.mark.parametrize(
    ("text", "summary", "value"),
    [
        ("article", "highlights", "short"),
        ("document", "summary", "short"),
        ("text", "summary", "short"),
        ("text", "summaries", ["short", "brief"]),
    ],
)
def test_hub_documents_have_several_column_names(
    hub: Any, tmp_path: Path, text: str, summary: str, value: object
) -> None:
    rows = [{"id": f"x{n}", text: f"Long {n}.", summary: value} for n in range(2)]
    loaded = load_documents(saved(hub, tmp_path / "set", train=rows)).records
    summaries = tuple(value) if isinstance(value, list) else (value,)
    assert loaded == tuple(Document(f"x{n}", f"Long {n}.", summaries, f"x{n}") for n in range(2))


def test_a_local_folder_of_json_files_loads_through_the_library(hub: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [dialogue(1), dialogue(2)])
    write_jsonl(folder / "test.jsonl", [dialogue(3)])
    assert load_dialogues(f"hf:{folder}", split="test").records == (
        load_dialogues(folder, split="test").records
    )


def test_a_split_that_the_hub_lacks_is_named(hub: Any, tmp_path: Path) -> None:
    name = saved(hub, tmp_path / "squad", train=SQUAD_ROWS)
    with pytest.raises(ValueError, match=r"hub splits 'train'\): .*'test' \(it has train 2, val"):
        load_dialogues(name, split="test")


def test_unknown_columns_and_splits_are_named(hub: Any, tmp_path: Path) -> None:
    name = saved(hub, tmp_path / "a", train=[{"prompt": "p", "answer": "a"}])
    with pytest.raises(ValueError, match=r"columns 'prompt', 'answer' hold no dialogues.*'story'"):
        load_dialogues(name)
    name = saved(hub, tmp_path / "b", extra=[document(1)])
    with pytest.raises(ValueError, match=r"the splits 'extra', but none of 'train'"):
        load_documents(name)


def test_bad_hub_rows_are_named_and_skipped(hub: Any, tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "document": text, "summary": "s"} for n, text in enumerate(["a", " ", "c"])
    ]
    name = saved(hub, tmp_path / "set", train=rows)
    with pytest.raises(ValueError, match=r"train\[1\]\.text is blank"):
        load_documents(name)
    with pytest.warns(UserWarning, match="skipped 1 bad of 3"):
        assert len(load_documents(name, skip_bad_records=True).records) == 2


def test_hub_answers_of_another_form_are_not_taken_for_none(hub: Any, tmp_path: Path) -> None:
    row = {"context": "c", "question": "q", "answers": "a"}
    with pytest.raises(ValueError, match=r"train\[0\]\.answers is 'a' instead of a list"):
        load_dialogues(saved(hub, tmp_path / "set", train=[row]))


def test_a_hub_set_that_cannot_be_loaded_is_refused(hub: Any) -> None:
    with pytest.raises(ValueError, match=r"hf:no/such-set: the set could not be loaded .*network"):
        load_dialogues("hf:no/such-set")
    with pytest.raises(ValueError, match="names no hub set"):
        load_dialogues("hf:")
    with pytest.raises(ValueError, match="is for files"):
        load_dialogues("hf:squad", dataset_format="squad")


class Rows(list[Json]):
    """Rows as the library hands them out, for where it is not installed."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])


def test_hub_sets_are_read_through_whatever_the_library_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None]] = []
    news = [{"article": f"Long {n}.", "highlights": "short", "id": str(n)} for n in range(2)]
    sets = {
        "squad": {"train": Rows(SQUAD_ROWS)},
        "coqa": {"validation": Rows([COQA_ROW])},
        "abisee/cnn_dailymail": {"test": Rows(news)},
        "ours": {"train": Rows([dialogue(1), dialogue(2, turns=[])])},
    }

    def load_dataset(name: str, configuration: str | None) -> Json:
        asked.append((name, configuration))
        return sets[name]

    library: Any = ModuleType("datasets")
    library.__spec__ = ModuleSpec("datasets", None)
    library.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", library)
    hub_module._parse_cached.cache_clear()

    assert load_dialogues("hf:squad").records == NORMANS
    [kitten] = load_dialogues("hf:coqa", split="validation").records
    assert [turn.answers for turn in kitten.turns] == [("white",), ("in a barn",), ("unknown",)]
    assert len(load_documents("hf:abisee/cnn_dailymail", split="test").records) == 2
    with pytest.raises(ValueError, match=r"hf:ours, train\[1\]\.turns is an empty list"):
        load_dialogues("hf:ours")
    with pytest.warns(UserWarning, match="skipped 1 bad of 2"):
        assert load_dialogues("hf:ours:small", skip_bad_records=True).skipped == 1
    with pytest.raises(ValueError, match=r"hf:no/such: the set could not be loaded \(KeyError"):
        load_dialogues("hf:no/such")
    assert asked[2:4] == [("abisee/cnn_dailymail", "3.0.0"), ("ours", None)]
    assert asked[4] == ("ours", "small")
    hub_module._parse_cached.cache_clear()


def test_without_the_library_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['datasets'] = None\n"  # As if it were not installed.
        "from llm_envs.datasets.dialogues import load_dialogues\n"
        "load_dialogues('hf:squad')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode != 0
    assert "pip install 'llm-envs[hub]'" in process.stderr
