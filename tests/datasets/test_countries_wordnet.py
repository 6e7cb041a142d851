"""The embedded dialogues: counts, splits of entities and wordings, answers, and their builder."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.splits import SPLITS
from llm_envs.scoring.qa import UNKNOWN, token_f1

FOLDER = resources.files("llm_envs") / "datasets" / "embedded" / "countries_wordnet"
SCRIPTS = Path(__file__).parents[2] / "scripts"
INPUTS = ("countryinfo", "babel", "wordnet")

Record = dict[str, Any]


@pytest.fixture(scope="module")
def content() -> bytes:
    return gzip.decompress((FOLDER / "data.jsonl.gz").read_bytes())


@pytest.fixture(scope="module")
def records(content: bytes) -> list[Record]:
    return [json.loads(line) for line in content.decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "CARD.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scripts() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield patch


@pytest.fixture(scope="module")
def templates(scripts: pytest.MonkeyPatch) -> ModuleType:
    return import_module("dialogue_templates")


@pytest.fixture(scope="module")
def builder(scripts: pytest.MonkeyPatch) -> ModuleType:
    return import_module("build_countries_wordnet")


def domain_and_names(record: Record) -> tuple[str, list[str]]:
    domain, _, names = record["unit"].partition("/")
    return domain, names.split("+")


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# --- What a question asks: read off its words, without the code that wrote it -----------------


@dataclass(frozen=True)
class Asked:
    """A turn, understood: which relation of which entity its question is about."""

    record: Record
    number: int
    form: str  # "full", "follow_up" or "switch"
    entity: str
    relation: str
    answers: tuple[str, ...]


def understand(record: Record, templates: ModuleType, split: str) -> list[Asked]:
    """Understand the questions of a dialogue by the wordings of a split, each from the last."""
    domain, names = domain_and_names(record)
    understood: list[Asked] = []
    for number, turn in enumerate(record["turns"]):
        last = understood[-1] if understood else None
        found = set()
        for relation, texts in templates.RELATIONS[domain].items():
            wordings = texts.questions[split]
            for name in names:
                if turn["question"] in [sentence(w.format(e=name)) for w in wordings.full]:
                    found.add(("full", name, relation))
            if last and turn["question"] in wordings.follow_up:
                found.add(("follow_up", last.entity, relation))
        for name in names:
            if last and turn["question"] in [w.format(e=name) for w in templates.SWITCH[split]]:
                found.add(("switch", name, last.relation))
        assert len(found) == 1, (record["id"], turn["question"], found)
        understood.append(Asked(record, number, *found.pop(), tuple(turn["answers"])))
    return understood


@pytest.fixture(scope="module")
def asked(records: list[Record], templates: ModuleType) -> list[Asked]:
    """Every turn of the set; that each has exactly one meaning is checked on the way."""
    return [turn for r in records for turn in understand(r, templates, r["split"])]


# --- The file ---------------------------------------------------------------------------------


def test_size_and_licences(content: bytes) -> None:
    packed = (FOLDER / "data.jsonl.gz").read_bytes()
    assert len(packed) <= 1_000_000
    assert packed[4:8] == bytes(4), "The gzip header holds a time, so no build equals another."
    licence = (FOLDER / "LICENSE.txt").read_text(encoding="utf-8")
    for owner in ("Porimol Chandro", "Princeton University", "Unicode, Inc."):
        assert owner in licence


def test_content_is_what_the_card_records(
    content: bytes, records: list[Record], asked: list[Asked], card: str
) -> None:
    assert hashlib.sha256(content).hexdigest() in card
    lines = zip(content.splitlines(keepends=True), records, strict=True)
    training = b"".join(line for line, record in lines if record["split"] == "train")
    assert hashlib.sha256(training).hexdigest() in card
    every = {(d, n) for r in records for d, names in [domain_and_names(r)] for n in names}
    totals = [f"{sum(d == domain for d, _ in every):,}" for domain in ("country", "noun")]
    assert "{} countries and territories, {} English nouns".format(*totals) in card
    for split in SPLITS:
        members = [r for r in records if r["split"] == split]
        things = {(d, n) for r in members for d, names in [domain_and_names(r)] for n in names}
        turns = [a for a in asked if a.record["split"] == split]
        unanswerable = sum(a.answers == (UNKNOWN,) for a in turns) / len(turns)
        leaning = sum(a.form != "full" for a in turns) / len(turns)
        cells = [
            split,
            f"{len(members):,}",
            f"{len({r['unit'] for r in members}):,}",
            *(f"{sum(d == domain for d, _ in things):,}" for domain in ("country", "noun")),
            f"{len(turns):,}",
            f"{unanswerable:.1%}".replace("%", " %"),
            f"{leaning:.1%}".replace("%", " %"),
        ]
        assert f"| {' | '.join(cells)} |" in card


def test_input_hashes_are_what_the_card_records(builder: ModuleType, card: str) -> None:
    for name in INPUTS:
        assert getattr(builder, f"{name.upper()}_SHA256") in card


def test_the_loader_gives_every_record(records: list[Record]) -> None:
    for split in SPLITS:
        loaded = load_dialogues("countries_wordnet", split=split).records
        members = [r for r in records if r["split"] == split]
        assert [d.id for d in loaded] == [r["id"] for r in members]
        assert [d.unit for d in loaded] == [r["unit"] for r in members]
        assert [[(t.question, list(t.answers)) for t in d.turns] for d in loaded] == [
            [(t["question"], t["answers"]) for t in r["turns"]] for r in members
        ]


def test_ids_and_dialogues_are_unique(records: list[Record]) -> None:
    assert len({r["id"] for r in records}) == len(records)
    assert len({json.dumps([r["passage"], r["turns"]]) for r in records}) == len(records)


# --- Splits -----------------------------------------------------------------------------------


def test_entities_do_not_cross_units_or_splits(records: list[Record]) -> None:
    home: dict[tuple[str, str], tuple[str, str]] = {}
    for record in records:
        domain, names = domain_and_names(record)
        for name in names:
            here = (record["split"], record["unit"])
            assert home.setdefault((domain, name), here) == here
    assert len({domain for domain, _ in home}) == 2


def test_names_do_not_cross_splits(records: list[Record]) -> None:
    splits = defaultdict(set)
    for record in records:
        for name in domain_and_names(record)[1]:
            splits[name.casefold()].add(record["split"])
    assert not [name for name, where in splits.items() if len(where) > 1]
    assert {split for where in splits.values() for split in where} == set(SPLITS)


def test_no_passage_is_in_two_splits(records: list[Record]) -> None:
    splits = defaultdict(set)
    for record in records:
        splits[record["passage"]].add(record["split"])
    assert {len(where) for where in splits.values()} == {1}


def test_wordings_of_splits_are_disjoint(templates: ModuleType) -> None:
    """Not even case, punctuation or the entity's name tells two wordings of two splits apart."""

    def bare(wording: str) -> str:
        return " ".join(re.findall(r"[a-z]+", wording.replace("{e}", " ").lower()))

    wordings: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for relations in templates.RELATIONS.values():
            for relation in relations.values():
                texts = relation.questions[split]
                wordings[split] |= {bare(w) for w in (*texts.full, *texts.follow_up)}
        wordings[split] |= {bare(w) for w in templates.SWITCH[split]}
        assert len(wordings[split]) >= 60
    assert not wordings["train"] & wordings["validation"]
    assert not wordings["train"] & wordings["test"]
    assert not wordings["validation"] & wordings["test"]


def test_questions_use_the_wordings_of_their_split_only(
    records: list[Record], asked: list[Asked], templates: ModuleType
) -> None:
    # `asked` has found exactly one meaning in the split's own wordings for every question.
    assert len(asked) == sum(len(r["turns"]) for r in records)
    for record in records[::20]:
        for other in set(SPLITS) - {record["split"]}:
            with pytest.raises(AssertionError):
                understand(record, templates, other)


# --- Questions and answers --------------------------------------------------------------------


def test_every_dialogue_has_four_turns_and_begins_with_a_name(asked: list[Asked]) -> None:
    turns = Counter(a.record["id"] for a in asked)
    assert set(turns.values()) == {4}
    assert {a.form for a in asked if a.number == 0} == {"full"}


def test_no_turn_repeats_an_earlier_one(asked: list[Asked]) -> None:
    """Else the user's reply to the first would have told the answer to the second."""
    counts = Counter((a.record["id"], a.entity, a.relation) for a in asked)
    assert max(counts.values()) == 1


def states(passage: str, turn: Asked, value: str, templates: ModuleType) -> bool:
    """Whether a passage states a value of a turn's relation and entity, by any statement."""
    domain, _ = domain_and_names(turn.record)
    return any(
        sentence(statement.format(e=mention, v=value)) in passage
        for statement in templates.RELATIONS[domain][turn.relation].statements
        for mention in (turn.entity, "it")
    )


def test_answers_are_stated_in_the_passage(asked: list[Asked], templates: ModuleType) -> None:
    for turn in asked:
        passage = turn.record["passage"]
        assert len(set(turn.answers)) == len(turn.answers)
        if turn.answers == (UNKNOWN,):
            continue
        assert UNKNOWN not in turn.answers
        # A sentence may begin with an answer, so case does not count.
        assert all(answer.lower() in passage.lower() for answer in turn.answers)
        assert all(token_f1(answer, turn.answers) == 1.0 for answer in turn.answers)
        # The last accepted answer is the whole list of values: the one that the passage writes.
        assert states(passage, turn, turn.answers[-1], templates), (turn.record["id"], turn)


def test_unknown_is_right_only_where_the_passage_is_silent(
    asked: list[Asked], templates: ModuleType
) -> None:
    """Facts that other dialogues about the same thing tell are not in this passage."""
    facts = {
        (a.record["unit"], a.entity, a.relation): a.answers[-1]
        for a in asked
        if a.answers != (UNKNOWN,)
    }
    checked = 0
    for turn in asked:
        value = facts.get((turn.record["unit"], turn.entity, turn.relation))
        if turn.answers == (UNKNOWN,) and value is not None:
            checked += 1
            assert not states(turn.record["passage"], turn, value, templates)
    assert checked > 100


def test_facts_agree_between_dialogues(asked: list[Asked]) -> None:
    facts = defaultdict(set)
    for turn in asked:
        if turn.answers != (UNKNOWN,):
            facts[turn.record["unit"], turn.entity, turn.relation].add(turn.answers)
    assert {len(answers) for answers in facts.values()} == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_unanswerable_questions_are_some(asked: list[Asked], split: str) -> None:
    turns = [a for a in asked if a.record["split"] == split]
    share = sum(a.answers == (UNKNOWN,) for a in turns) / len(turns)
    assert 0.1 < share < 0.25


@pytest.mark.parametrize("split", SPLITS)
def test_follow_ups_need_the_history(asked: list[Asked], split: str) -> None:
    """Of a question about "it", or "And France?", the passage holds a wrong reading with an answer.

    Shown by dialogues in which the same relation of the other thing, or another relation of the
    same thing, is asked too, and has another answer.
    """
    dialogues = defaultdict(list)
    for turn in asked:
        if turn.record["split"] == split and "+" in turn.record["unit"]:
            dialogues[turn.record["id"]].append(turn)

    def misleads(turn: Asked, other: Asked) -> bool:
        return UNKNOWN not in other.answers and token_f1(other.answers[0], turn.answers) < 1.0

    by_thing = by_relation = 0
    for turns in dialogues.values():
        by_thing += any(
            a.form == "follow_up"
            and any(
                b.relation == a.relation and b.entity != a.entity and misleads(a, b) for b in turns
            )
            for a in turns
        )
        by_relation += any(
            a.form == "switch"
            and any(
                b.entity == a.entity and b.relation != a.relation and misleads(a, b) for b in turns
            )
            for a in turns
        )
    assert by_thing > 0.1 * len(dialogues)
    assert by_relation > 0.1 * len(dialogues)


# --- The builder ------------------------------------------------------------------------------

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "it": "Italian", "rm": "Romansh"}
CURRENCIES = {"CHF": "Swiss Franc", "EUR": "Euro", "OLD": "Old Franc (1900–1920)"}


def land(name: str, alpha3: str, **fields: Any) -> Record:
    """Return a record in countryinfo's form with four good facts, and changes to it."""
    plain = {"capital": "Town", "region": "x", "subregion": "South", "population": 1234567}
    return {"name": name, "ISO": {"alpha3": alpha3}, **plain, "currencies": ["CHF"], **fields}


@pytest.fixture
def countries(builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give the builder's ``countries`` on a wheel with the records of a test."""

    def read(*lands: Record) -> dict[str, dict[str, tuple[str, ...]]]:
        wheel = tmp_path / "countryinfo.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for i, record in enumerate(lands):
                archive.writestr(f"countryinfo/data/{i}.json", json.dumps(record))
            archive.writestr("countryinfo/data/notes.txt", "not JSON")
            archive.writestr("countryinfo/data_no_iso/x.json", "{}")
        monkeypatch.setattr(builder, "babel_names", lambda _: (LANGUAGES, CURRENCIES))
        return {e.name: dict(e.facts) for e in builder.countries(wheel, tmp_path / "babel.whl")}

    return read


def test_builder_reads_a_country(countries: Any) -> None:
    found = countries(
        land(
            "Aland",
            "AAA",
            languages=["de", "fr", "it", "rm"],
            borders=["BBB", "ZZZ", "CCC"],
            demonym="Alandic",
            callingCodes=["12", "34"],
            tld=[".aland", ".al"],
        ),
        land("Beland", "BBB"),
        land("Celand", "CCC"),
    )
    assert found["Aland"] == {
        "capital": ("Town",),
        "currency": ("Swiss franc",),
        "language": ("German", "French", "Italian"),  # three at most
        "neighbour": ("Beland", "Celand"),  # ZZZ is no country that is known
        "region": ("South",),
        "demonym": ("Alandic",),
        "population": ("1,234,567",),
        "calling code": ("12",),
        "domain": (".al",),
    }
    assert list(found) == ["Aland", "Beland", "Celand"]


@pytest.mark.parametrize(
    ("fields", "fact", "expected"),
    [
        ({"capital": ["First", "Second"]}, "capital", ("First",)),
        ({"capital": []}, "capital", None),
        ({"capital": None}, "capital", None),
        ({"currencies": ["XXX", "OLD", "EUR"]}, "currency", ("euro",)),
        ({"currencies": None}, "currency", None),
        ({"languages": ["xx"]}, "language", None),
        ({"borders": ["GON", "BRA"]}, "neighbour", None),
        ({"borders": None}, "neighbour", None),
        ({"demonym": "One, Other"}, "demonym", None),
        ({"demonym": "Aland"}, "demonym", None),
        ({"demonym": ""}, "demonym", None),
        ({"callingCodes": [""]}, "calling code", None),
        ({"callingCodes": []}, "calling code", None),
        ({"tld": ["", ".long"]}, "domain", None),
        ({"population": 0}, "population", None),
    ],
)
def test_builder_leaves_irregular_fields_out(
    countries: Any, fields: Record, fact: str, expected: tuple[str, ...] | None
) -> None:
    found = countries(
        # One fact more than it takes, so that leaving one out does not leave the country out.
        land("Aland", "AAA", **{"languages": ["en"], **fields}),
        land("Antarctica", "GON"),
        land("Land (bracketed)", "BRA"),
    )
    assert found["Aland"].get(fact) == expected
    assert "Antarctica" not in found
    assert "Land" in found


def test_builder_wants_four_facts_and_one_entry_a_place(countries: Any) -> None:
    found = countries(
        land("Full", "FUL"),
        land("Poor", "POO", capital=None),
        land("Full (again)", "AGA", capital="Elsewhere"),
    )
    assert list(found) == ["Full"]
    assert found["Full"]["capital"] == ("Town",)


def synset(
    offset: int, words: str, pointers: list[tuple[str, int, str]], gloss: str = "x (y)"
) -> str:
    """Write a line of WordNet's data.noun: see wndb(5WN)."""
    names = [f"{word} 0" for word in words.split()]
    targets = [f"{symbol} {target:08d} {part} 0000" for symbol, target, part in pointers]
    counted = f"{len(names):02x} {' '.join(names)} {len(targets):03d} {' '.join(targets)}"
    return f"{offset:08d} 03 n {counted} | {gloss}  "


DOG_POINTERS = [("@", 2, "n"), ("#m", 3, "n"), ("%p", 4, "n"), ("~", 5, "n"), ("+", 6, "v")]
NOUN_LINES = [
    "  1 This software and database is being provided to you | a licence  ",
    synset(1, "dog domestic_dog Canis_familiaris", DOG_POINTERS, 'a tame wolf; "the dog barked"'),
    synset(2, "canine canid", []),
    synset(3, "pack", []),
    synset(4, "flag", []),
    synset(5, "puppy", []),
    synset(6, "chase_after_all_of_it", []),
]


@pytest.fixture
def nouns(builder: ModuleType, tmp_path: Path) -> Any:
    """Give the builder's ``nouns`` on a data.noun with the lines of a test."""

    def read(lines: list[str]) -> dict[str, dict[str, tuple[str, ...]]]:
        path = tmp_path / "data.noun"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {e.name: dict(e.facts) for e in builder.nouns(path)}

    return read


def test_builder_reads_a_noun(nouns: Any) -> None:
    assert nouns(NOUN_LINES) == {
        "dog": {
            "synonym": ("domestic dog", "Canis familiaris"),
            "kind": ("canine",),
            "group": ("pack",),
            "part": ("flag",),
            "example": ("puppy",),
            "meaning": ("a tame wolf",),
        }
    }


@pytest.mark.parametrize(
    ("words", "pointers", "gloss", "left"),
    [
        # A value in two relations would make questions ambiguous.
        (
            "dog",
            [*DOG_POINTERS, ("#p", 5, "n")],
            "a tame wolf",
            {"kind", "group", "part", "meaning"},
        ),
        # A meaning that uses the noun, or of one word, tells nothing.
        ("dog", DOG_POINTERS, "a dog of men", {"kind", "group", "part", "example"}),
        ("dog", DOG_POINTERS, "wolf", {"kind", "group", "part", "example"}),
        # Without a kind, with three facts, with too long a name, or as a scientific name: none.
        ("dog pooch", DOG_POINTERS[1:], "a tame wolf", None),
        ("dog", DOG_POINTERS[:2], "a tame wolf", None),
        ("dog_of_war", DOG_POINTERS, "a tame wolf", None),
        ("Canis genus_Canis", DOG_POINTERS, "a tame wolf", None),
    ],
)
def test_builder_leaves_nouns_and_facts_out(
    nouns: Any, words: str, pointers: list[tuple[str, int, str]], gloss: str, left: set[str] | None
) -> None:
    found = nouns([NOUN_LINES[0], synset(1, words, pointers, gloss), *NOUN_LINES[2:]])
    assert [set(facts) for facts in found.values()] == ([left] if left else [])


def test_builder_chooses_nouns_whatever_their_order(
    nouns: Any, builder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"noun{letter}" for letter in "abcdefghij"]
    many = [synset(10 + i, name, DOG_POINTERS, "a tame wolf") for i, name in enumerate(names)]
    monkeypatch.setattr(builder, "NOUNS", 4)
    found = nouns(NOUN_LINES[2:] + many)
    assert len(found) == 4
    assert list(found) == sorted(found)
    assert nouns(NOUN_LINES[2:] + many[::-1]) == found
    # One noun more in the source displaces one at most.
    more = nouns([*NOUN_LINES[2:], *many, synset(99, "newcomer", DOG_POINTERS, "a tame wolf")])
    assert len(set(found) & set(more)) >= 3


def test_builder_leaves_shared_names_out_of_the_later_split(builder: ModuleType) -> None:
    def row(split: str, unit: str, number: int = 1) -> Record:
        return {"id": f"{unit}/{number}", "unit": unit, "split": split}

    kept = [
        row("train", "country/Yemen", 1),
        row("train", "country/Yemen", 2),
        row("validation", "country/Peru+Chad"),
        row("validation", "noun/yemeni"),  # another name than Yemen
        row("validation", "noun/Angel"),
        row("train", "noun/cat+Cuba"),
        row("train", "noun/Yemen"),  # both are training
        row("test", "noun/Fiji"),  # shared only with a dialogue that is left out itself
    ]
    left_out = [
        row("validation", "country/Fiji+Cuba", 1),
        row("validation", "country/Fiji+Cuba", 2),
        row("test", "noun/dog+YEMEN"),
        row("test", "noun/chad"),
        row("test", "noun/angel+halo"),
    ]
    # Test first: what a split gives way to does not depend on the order of the lines.
    for rows in (left_out + kept, (kept + left_out)[::-1]):
        assert builder.without_shared_names(rows) == [r for r in rows if r in kept]


@pytest.mark.parametrize("changed", INPUTS)
def test_builder_refuses_another_input(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    files = {name: tmp_path / name for name in INPUTS}
    for name, path in files.items():
        path.write_bytes(name.encode())
        if name != changed:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            monkeypatch.setattr(builder, f"{name.upper()}_SHA256", digest)
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as refusal:
        builder.main(builder.Arguments(**files, output=output))
    message = str(refusal.value)
    assert hashlib.sha256(changed.encode()).hexdigest() in message
    assert getattr(builder, f"{changed.upper()}_SHA256") in message
    assert not output.exists()
