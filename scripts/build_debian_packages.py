r"""Builds the embedded summarization set: Debian package descriptions and their synopses.

The input is the list of English descriptions of Debian bookworm's `main` archive. Fetch it into a
folder of its own, here `lists`, without touching the system's lists:

    mkdir -p lists/partial cache
    apt-get -o Dir::State::lists="$PWD/lists" -o Dir::Cache="$PWD/cache" \
        -o Acquire::Languages=en -o Acquire::GzipIndexes=false update
    python scripts/build_debian_packages.py \
        --input lists/*_debian_dists_bookworm_main_i18n_Translation-en \
        --output llm_envs/datasets/embedded/debian_packages/data.jsonl.gz

(apt-get takes a relative folder for one under /var, hence `$PWD`. It asks the mirrors of the system
it runs on: run it on Debian 12.) The file changes with every point release; the one
that the shipped data was built from is Debian 12.15's, and any other is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from build_common import verify, write_gzip

INPUT_SHA256 = "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f"
INPUT_SOURCE = (
    "dists/bookworm/main/i18n/Translation-en of Debian 12.15 (2026-07-11), uncompressed; "
    "https://snapshot.debian.org keeps the archive of that day"
)

TEXT_WORDS = range(40, 251)
SYNOPSIS_WORDS = range(3, 16)
MIN_COVERAGE = 2 / 3  # share of the synopsis's content words that the text must contain
MIN_CONTENT_WORDS = 2
NEAR_DUPLICATE = 0.5  # Jaccard similarity of word trigrams at which only one record is kept
SAME_UNIT = 0.15  # ... and at which two records share a unit, hence a split
SHARED_PARAGRAPH_WORDS = 20  # a repeated paragraph this long also makes two records one unit


@dataclass(frozen=True, slots=True)
class Package:
    """One package as people read it: its name, one-line synopsis and long description."""

    name: str
    synopsis: str
    text: str


# ---------------------------------------------------------------------------------------- reading


def read_packages(translation: str) -> Iterator[Package]:
    """Yields the packages of a `Translation-en` file whose description is plain prose and lists.

    Descriptions with preformatted blocks (tables, code) are left out whole: they read badly with
    the block flattened and worse without it.
    """
    for stanza in translation.split("\n\n"):
        lines = [line for line in stanza.split("\n") if line]
        head = dict(line.split(": ", 1) for line in lines if not line.startswith(" "))
        if "Description-en" not in head:
            continue
        text = flow([readable(line) for line in lines if line.startswith(" ")])
        if text is not None:
            yield Package(head["Package"], " ".join(readable(head["Description-en"]).split()), text)


# Typographic variants of ASCII punctuation, which differ between packages for no reason.
PUNCTUATION = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}  # curly quotes
    | {"\u2013": "-", "\u2014": " - ", "\u2026": "..."}  # dashes, ellipsis
    | {"\xa0": " ", "\u2009": " ", "\u200a": " ", "\u200b": None, "\xad": None}  # spaces, hyphen
    | {"\ufb01": "fi", "\ufb02": "fl"}  # ligatures
)
BULLET = re.compile(r" +(?:[*+•-]|o(?= ))\s+(?=\S)")
LINK_ONLY = re.compile(
    r"\W*(?:(?:project |upstream )?(?:home ?page|web ?site|url|see)\s*:?\s*)?<?https?://\S+\W*",
    re.IGNORECASE,
)


def readable(line: str) -> str:
    """Returns `line` in composed Unicode, with plain quotes, dashes and spaces."""
    return unicodedata.normalize("NFC", line).translate(PUNCTUATION)


def flow(lines: Iterable[str]) -> str | None:
    """Turns the lines of a control file's long description into text.

    In control files a line is indented by one space, a lone dot is an empty line, and deeper
    lines are shown as they are: list items mostly, tables and code sometimes.

    Args:
        lines: The description's lines, indented as in the file.

    Returns:
        Paragraphs, each one line, parted by an empty line; a list item is a line that starts with
        "- ". None if a deeper line is neither an item nor the continuation of one.
    """
    result: list[str] = []
    within = ""  # what the line before belongs to: "item", "paragraph" or neither
    for line in lines:
        body = " ".join(line.split())
        if body in ("", "."):
            within = ""
            if result and result[-1]:
                result.append("")
        elif bullet := BULLET.match(line):
            within = "item"
            result.append("- " + " ".join(line[bullet.end() :].split()))
        elif line.startswith("  ") and within != "item":
            return None
        elif line.startswith("  ") or within == "paragraph":
            result[-1] += " " + body
        else:
            within = "paragraph"
            result.append(body)
    kept = [line for line in result if not LINK_ONLY.fullmatch(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


# -------------------------------------------------------------------------------------- filtering

PART_NAME = re.compile(
    r"-(?:dev|docs?|dbg|dbgsym|data|l10n|i18n|help|prof|examples?|tests?|cross|source|headers"
    r"|lang|locales?|msgs|debug|demos?|modules-extra)(?:-|$)"
)
# A qualifier at the end says which part of a family this is, and is not a summary of the text.
PART_SYNOPSIS = re.compile(r"\)$|\s[-:,]+ (?:[\w.+]+ ){0,2}[\w.+]+$|\w-$")
EMPTY_PACKAGE = re.compile(
    r"meta-?\s?packages?\b|transitional|dummy|empty package|virtual package|obsolete|deprecated"
    r"|safely (?:be )?removed|debug(?:ging)? symbols",
    re.IGNORECASE,
)
STOP_WORDS = frozenset(
    "a an and are as at be but by can do for from has have if in into is it its like no not of off"
    " on or other over some than that the their them these this to up use used uses using via was"
    " with within without you your".split()
)


def words(text: str) -> list[str]:
    """Returns the lowercase words of `text`, a plural's final s dropped."""
    found = re.findall(r"\w+", text.lower())
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in found]


def coverage(package: Package) -> float:
    """Returns the share of the synopsis's content words that the text contains, in [0, 1]."""
    content = {word for word in words(package.synopsis) if word not in STOP_WORDS}
    if len(content) < MIN_CONTENT_WORDS:
        return 0.0
    return len(content & set(words(package.text))) / len(content)


def is_legible(text: str) -> bool:
    """Whether `text` is printable and written in Latin letters, symbols up to U+024F included."""
    return all(c == "\n" or (c.isprintable() and ord(c) <= 0x24F) for c in text)


def is_pair(package: Package) -> bool:
    """Whether the synopsis can fairly be asked for by someone who has read the text only."""
    opening = package.text.split("\n", 1)[0].rstrip(".:!")
    return (
        not PART_NAME.search(package.name)
        and not PART_SYNOPSIS.search(package.synopsis)
        and not EMPTY_PACKAGE.search(package.synopsis + "\n" + package.text)
        and len(package.text.split()) in TEXT_WORDS
        and len(package.synopsis.split()) in SYNOPSIS_WORDS
        and "://" not in package.text
        and not package.text.endswith(":")  # what it announced was a link, or is missing
        and is_legible(package.text + package.synopsis)
        # A text that opens with the bare synopsis as a heading asks for copying one line.
        and words(opening) != words(package.synopsis)
        and coverage(package) >= MIN_COVERAGE
    )


# ------------------------------------------------------------------------ duplicates and families


def preference(package: Package) -> tuple[float, int, str]:
    """Orders near-equal packages: the best covered synopsis, then the plainest name, first."""
    return (-coverage(package), len(package.name), package.name)


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """Returns the set of three-word windows of `text`."""
    sequence = words(text)
    return frozenset(zip(sequence, sequence[1:], sequence[2:], strict=False))


def similar_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """Yields every pair of texts whose word trigrams have Jaccard similarity >= `threshold`.

    Args:
        texts: n texts.
        threshold: In (0, 1].

    Yields:
        (i, j, similarity) with i < j < n.
    """
    sets = [trigrams(text) for text in texts]
    seen_in: dict[Hashable, list[int]] = defaultdict(list)
    for j, current in enumerate(sets):
        shared = Counter(i for trigram in current for i in seen_in[trigram])
        for i, common in sorted(shared.items()):
            similarity = common / (len(sets[i]) + len(current) - common)
            if similarity >= threshold:
                yield i, j, similarity
        for trigram in current:
            seen_in[trigram].append(j)


def without_duplicates(packages: Iterable[Package]) -> list[Package]:
    """Keeps the preferred package of each name, each first paragraph and each near-equal text."""
    kept: list[Package] = []
    seen: set[str] = set()
    for package in sorted(packages, key=preference):
        first_paragraph = " ".join(words(package.text.split("\n", 1)[0]))
        keys = {"name " + package.name, "text " + first_paragraph}
        if seen.isdisjoint(keys):
            kept.append(package)
        seen |= keys
    dropped: set[int] = set()
    for i, j, _ in similar_pairs([package.text for package in kept], NEAR_DUPLICATE):
        if i not in dropped:  # `kept` is sorted by preference, so i is the better one
            dropped.add(j)
    return [package for index, package in enumerate(kept) if index not in dropped]


ECOSYSTEM = re.compile(
    r"^(?:python3?|pypy3?|ruby|node|golang-github|golang|php|r-cran|r-bioc|r-other|elpa|gir1\.2"
    r"|libghc|librust|libjs|fonts|xfonts|webext|xul-ext|gnome-shell-extension|qml-module"
    r"|libapache2-mod|postgresql|lua|cl|erlang|octave|gap|pd|texlive|fcitx5?|ibus|tesseract-ocr"
    r"|aspell|hunspell|myspell|mythes|hyphen|dict|puppet-module|munin|nagios|bash|zsh|vim|emacs"
    r"|task|linux|debian|gnome|kde|xfce4|mate|lib)-(?=.)"
)


def family(name: str) -> str:
    """Returns what related packages' names share: `python3-foo-utils`, `libfoo2` -> `foo`.

    Perl's `libfoo-bar-perl` keeps `foo-bar`, since its first part is only a namespace.
    """
    if perl := re.fullmatch(r"lib(.+)-perl", name):
        return perl[1]
    if java := re.fullmatch(r"lib(.+)-java", name):
        return re.split(r"[-.]", java[1])[0]
    stem = ECOSYSTEM.sub("", name)
    stem = stem.removeprefix("lib") if len(stem) > 5 else stem
    stem = next((part for part in re.split(r"[-.+]", stem) if len(part) > 2), stem)
    return re.sub(r"\d+$", "", stem) if len(stem.rstrip("0123456789")) > 2 else stem


def units(packages: Sequence[Package]) -> list[str]:
    """Groups related packages, so that a split can keep each group on one side.

    Two packages are related if their names share a family, their synopses are equal, they share
    a paragraph of `SHARED_PARAGRAPH_WORDS` words, or their texts' trigrams have a Jaccard
    similarity of at least `SAME_UNIT`; and so are the relations of relations.

    Args:
        packages: n packages.

    Returns:
        n names of units; a unit is named after its shortest package name.
    """
    parent = list(range(len(packages)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[tuple[str, str], int] = {}
    for i, package in enumerate(packages):
        marks = [("family", family(package.name)), ("synopsis", " ".join(words(package.synopsis)))]
        for paragraph in package.text.split("\n"):
            content = words(paragraph)
            if len(content) >= SHARED_PARAGRAPH_WORDS:
                marks.append(("paragraph", " ".join(content)))
        for mark in marks:
            parent[root(i)] = root(first_with.setdefault(mark, i))
    for i, j, _ in similar_pairs([package.text for package in packages], SAME_UNIT):
        parent[root(j)] = root(i)

    names: dict[int, str] = {}
    for i, package in enumerate(packages):
        best = names.get(root(i), package.name)
        names[root(i)] = min(best, package.name, key=lambda name: (len(name), name))
    return [names[root(i)] for i in range(len(packages))]


def split_of(unit: str) -> str:
    """Returns the split that `unit` falls into by its hash: train 80 %, the others 10 % each."""
    bucket = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big") % 10
    return ("validation", "test")[bucket - 8] if bucket >= 8 else "train"


# ---------------------------------------------------------------------------------------- writing


def build(translation: str) -> str:
    """Returns the data set as JSON lines, sorted by package name."""
    packages = without_duplicates(p for p in read_packages(translation) if is_pair(p))
    packages.sort(key=lambda package: package.name)
    lines = []
    for package, unit in zip(packages, units(packages), strict=True):
        record = {
            "id": package.name,
            "text": package.text,
            "summaries": [package.synopsis],
            "unit": unit,
            "split": split_of(unit),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def main(input: Path, output: Path) -> None:
    """Builds `output` from the recorded `input`; a different input is refused.

    Args:
        input: Debian 12.15's `main` Translation-en, uncompressed.
        output: The `data.jsonl.gz` to write.
    """
    verify(input, INPUT_SHA256, INPUT_SOURCE)
    data = build(input.read_text(encoding="utf-8"))
    records = [json.loads(line) for line in data.splitlines()]
    for split, count in sorted(Counter(record["split"] for record in records).items()):
        members = {record["unit"] for record in records if record["split"] == split}
        print(f"{split}: {count:,} records, {len(members):,} units")
    write_gzip(output, data.encode())


if __name__ == "__main__":
    tyro.cli(main)
