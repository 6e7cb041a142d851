"""Build the embedded dialogues of DialogueQA: facts on countries and on WordNet's nouns.

Inputs, each checked against its recorded SHA-256:

- ``pip download --no-deps countryinfo==1.0.1`` (MIT): the facts on countries;
- ``pip download --no-deps babel==2.18.0`` (Unicode licence): English names of the language and
  currency codes that countryinfo uses;
- ``apt-get download wordnet-base`` (WordNet 3.0, Debian package 1:3.0-37), unpacked with
  ``dpkg -x``: the facts on nouns.

No name is in two splits, not even as a country here and a noun there: validation and test
dialogues with such a name are rendered, but left out of the file.

Run: ``python scripts/build_countries_wordnet.py --countryinfo WHEEL --babel WHEEL --wordnet
DATA_NOUN --output llm_envs/datasets/embedded/countries_wordnet``
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from build_common import verify, write_gzip
from dialogue_templates import Entity, render

from llm_envs.datasets.splits import SPLITS, split_of

COUNTRYINFO_SHA256 = "b02f6f534f0a3b9cdc73fba7e08f247e39826acfa54bf080f8e4eba812066350"
BABEL_SHA256 = "e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35"
WORDNET_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"

# Gone, or a second entry for a place that has one already.
NOT_COUNTRIES = {
    "Antarctica",
    "Antilles néerlandaises",
    "Serbia and Montenegro",
    "Palestine, State of",
    "Holy See (Vatican City State)",
    "United States Minor Outlying Islands",
    "Heard Island and McDonald Islands",
    "Bouvet Island",
    "Bonaire, Sint Eustatius and Saba",
}
NOUNS = 4_000
TURNS = 4
DIALOGUES_PER_CLUSTER = {"country": 3, "noun": 1}
TRAIN_REPEATS = 2


@dataclass(frozen=True)
class Arguments:
    """Where the inputs lie and where the data goes."""

    countryinfo: Path
    """countryinfo-1.0.1-py3-none-any.whl"""
    babel: Path
    """babel-2.18.0-py3-none-any.whl"""
    wordnet: Path
    """data.noun of WordNet 3.0 (usr/share/wordnet/data.noun)"""
    output: Path = Path("llm_envs/datasets/embedded/countries_wordnet")


def babel_names(wheel: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return English names of language codes and of currency codes."""
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(wheel).extractall(folder)
        sys.path.insert(0, folder)
        from babel import Locale

        english = Locale("en")
        return dict(english.languages), dict(english.currencies)


def currency_phrase(name: str) -> str:
    """Write a currency as prose does: "Swiss Franc" -> "Swiss franc", "Euro" -> "euro"."""
    words = name.split()
    last = words[-1].lower() if len(words) > 1 or words[-1] == "Euro" else words[-1]
    return " ".join([*words[:-1], last])


def countries(wheel: Path, babel: Path) -> list[Entity]:
    """Read the facts on every country; fields that are missing or irregular are left out."""
    languages, currencies = babel_names(babel)
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("countryinfo/data/")]
        records: list[dict[str, Any]] = [
            json.loads(archive.read(n)) for n in sorted(names) if n.endswith(".json")
        ]
    by_code = {r["ISO"].get("alpha3"): r["name"] for r in records}
    found: dict[str, Entity] = {}
    for r in records:
        name = re.sub(r"\s*\(.*?\)", "", r["name"])
        if r["name"] in NOT_COUNTRIES or name in found:
            continue
        facts: dict[str, tuple[str, ...]] = {}
        capital = r.get("capital")
        if isinstance(capital, list):
            capital = capital[0] if capital else None
        if capital:
            facts["capital"] = (capital,)
        money = [currencies[c] for c in r.get("currencies") or [] if c in currencies]
        money = [currency_phrase(m) for m in money if "(" not in m]
        if money:
            facts["currency"] = (money[0],)
        spoken = [languages[c] for c in r.get("languages") or [] if c in languages]
        if spoken:
            facts["language"] = tuple(spoken[:3])
        near = [by_code[c] for c in r.get("borders") or [] if c in by_code]
        near = [n for n in near if n not in NOT_COUNTRIES and "(" not in n]
        if near:
            facts["neighbour"] = tuple(near[:3])
        if r.get("subregion"):
            facts["region"] = (r["subregion"],)
        demonym = r.get("demonym")
        if demonym and not re.search(r"[,/]", demonym) and demonym != name:
            facts["demonym"] = (demonym,)
        if r.get("population"):
            facts["population"] = (f"{r['population']:,}",)
        codes = r.get("callingCodes") or []
        if codes and codes[0]:
            facts["calling code"] = (codes[0],)
        domains = [d for d in r.get("tld") or [] if re.fullmatch(r"\.[a-z]{2}", d)]
        if domains:
            facts["domain"] = (domains[0],)
        if len(facts) >= 4:
            found[name] = Entity(name, "country", facts)
    return list(found.values())


POINTERS = {
    "@": "kind",
    "@i": "kind",
    "%p": "part",
    "#p": "whole",
    "#m": "group",
    "~": "example",
    "~i": "example",
    "!": "opposite",
}


def nouns(data: Path) -> list[Entity]:
    """Read the nouns of WordNet that have enough facts of their own."""
    words: dict[str, list[str]] = {}
    lines: list[tuple[str, list[tuple[str, str]], str]] = []
    for line in data.read_text("utf-8").splitlines():
        if line.startswith("  "):  # the licence, at the head of the file
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        count = int(fields[3], 16)
        words[fields[0]] = [fields[4 + 2 * i].replace("_", " ") for i in range(count)]
        rest = fields[4 + 2 * count :]
        pointers = [
            (rest[1 + 4 * i], rest[2 + 4 * i])
            for i in range(int(rest[0]))
            if rest[3 + 4 * i] == "n"
        ]
        lines.append((fields[0], pointers, gloss.strip()))

    def short(word: str) -> bool:
        return len(word.split()) <= 2 and re.fullmatch(r"[A-Za-z' -]{3,24}", word) is not None

    found: dict[str, Entity] = {}
    for offset, pointers, gloss in lines:
        name, *others = words[offset]
        # Scientific names come in thousands and are all alike.
        taxonomic = any(
            re.match(r"(genus|family|order|class|phylum|suborder|sub\w+) ", w) for w in others
        )
        if not short(name) or taxonomic or name in found:
            continue
        values: dict[str, list[str]] = defaultdict(list)
        values["synonym"] = [w for w in others if short(w) and w.lower() != name.lower()]
        for symbol, target in pointers:
            if symbol in POINTERS and short(words[target][0]):
                values[POINTERS[symbol]].append(words[target][0])
        meaning = re.split(r"[;:(\"]", gloss)[0].strip()
        if 2 <= len(meaning.split()) <= 8 and name.lower() not in meaning.lower():
            values["meaning"] = [meaning]
        facts = {
            relation: tuple(dict.fromkeys(v))[:3]
            for relation, v in values.items()
            if any(w != name for w in v)
        }
        facts = {r: tuple(w for w in v if w != name) for r, v in facts.items()}
        # A value that answers two relations of one noun would make questions ambiguous.
        spread = Counter(w for v in facts.values() for w in v)
        facts = {r: v for r, v in facts.items() if all(spread[w] == 1 for w in v)}
        if len(facts) >= 4 and "kind" in facts:
            found[name] = Entity(name, "noun", facts)
    # Chosen by hash: an even sample of the alphabet, the same one every time.
    chosen = sorted(found, key=lambda n: hashlib.sha256(n.encode()).digest())[:NOUNS]
    return [found[n] for n in sorted(chosen)]


def clusters(entities: list[Entity], rng: random.Random) -> Iterator[tuple[str, list[Entity]]]:
    """Group the entities of each split by one or two: a cluster is an independent unit."""
    for split in SPLITS:
        left = [e for e in entities if split_of(f"{e.domain}/{e.name}") == split]
        rng.shuffle(left)
        while left:
            size = 2 if len(left) > 1 and rng.random() < 0.5 else 1
            yield split, [left.pop() for _ in range(size)]


def records(entities: list[Entity]) -> Iterator[dict[str, Any]]:
    """Render every dialogue of the set."""
    for domain in ("country", "noun"):
        rng = random.Random(f"countries_wordnet/{domain}")
        of_domain = [e for e in entities if e.domain == domain]
        for split, cluster in clusters(of_domain, rng):
            unit = f"{domain}/" + "+".join(e.name for e in cluster)
            repeats = DIALOGUES_PER_CLUSTER[domain] * (TRAIN_REPEATS if split == "train" else 1)
            for i in range(repeats):
                facts = (4, 6) if len(cluster) == 1 else (3, 4)
                talk = render(cluster, split, rng, turns=TURNS, facts=facts)
                yield {
                    "id": f"{unit}/{i + 1}",
                    "unit": unit,
                    "split": split,
                    "passage": talk.passage,
                    "turns": [{"question": t.question, "answers": t.answers} for t in talk.turns],
                }


def without_shared_names(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out every dialogue with a name, of either domain, that an earlier split has too.

    Training dialogues all stay; validation gives way to training, and test to both. Case does not
    count. A unit stays or goes as a whole. Leaving dialogues out after all are rendered, instead
    of things before, keeps what the random numbers make of the others.
    """

    def names(row: dict[str, Any]) -> set[str]:
        return set(row["unit"].partition("/")[2].casefold().split("+"))

    taken: set[str] = set()
    kept: set[str] = set()
    for split in SPLITS:
        new = [r for r in rows if r["split"] == split and taken.isdisjoint(names(r))]
        taken.update(*map(names, new))
        kept.update(r["id"] for r in new)
    return [r for r in rows if r["id"] in kept]


def main(arguments: Arguments) -> None:
    """Check the inputs, build, write, and say what came out."""
    verify(arguments.countryinfo, COUNTRYINFO_SHA256, "countryinfo 1.0.1, wheel from PyPI")
    verify(arguments.babel, BABEL_SHA256, "babel 2.18.0, wheel from PyPI")
    verify(arguments.wordnet, WORDNET_SHA256, "data.noun of WordNet 3.0 (Debian wordnet-base)")
    entities = countries(arguments.countryinfo, arguments.babel) + nouns(arguments.wordnet)
    rendered = list(records(entities))
    rows = without_shared_names(rendered)
    lines = (json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
    write_gzip(arguments.output / "data.jsonl.gz", ("\n".join(lines) + "\n").encode())
    print("entities:", dict(Counter(e.domain for e in entities)))
    print("dialogues:", dict(Counter(r["split"] for r in rows)))
    print("left out:", len(rendered) - len(rows))
    print("units:", dict(Counter(s for s, _ in {(r["split"], r["unit"]) for r in rows})))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
