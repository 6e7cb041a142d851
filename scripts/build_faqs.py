r"""Builds the embedded FAQ set of customer service: questions on Perl, Python and Debian.

The inputs are three packages of Debian 12. Fetch them into a folder of their own, here `debs`:

    mkdir debs && (cd debs && apt-get download perl-doc python3.11-doc debian-faq)
    python scripts/build_faqs.py --input debs \
        --output llm_envs/datasets/embedded/faqs/data.jsonl.gz

(Run it on Debian 12: it needs `dpkg-deb`.) Security updates change the packages now and then;
https://snapshot.debian.org keeps those that the shipped data was built from, and any other is
refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import tyro
from build_common import verify, write_gzip
from build_debian_packages import STOP_WORDS, is_legible, readable, similar_pairs, words

PACKAGES = (
    (
        "perl-doc_5.36.0-7+deb12u4_all.deb",
        "f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
    ),
    (
        "python3.11-doc_3.11.2-6+deb12u9_all.deb",
        "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    ),
    ("debian-faq_11.1_all.deb", "427426e0cfa6888622fc1d72631071cb4b5a1f86ccde722e7820bcef284de5d0"),
)
"""The files of the packages, and the SHA-256 of each."""

MIN_ANSWER_WORDS = 8
SAME_QUESTION = 0.6  # Jaccard similarity of two questions' content words at which they are one unit
SAME_ANSWER = 0.15  # ... and that of their answers' word trigrams
# Words of questions that tell nothing about what is asked, beside STOP_WORDS.
ASKING = frozenset("how what why where which when who do does did i my me should there".split())


class Block(NamedTuple):
    """A piece of a document.

    Attributes:
        kind: "heading", "text" (a paragraph or list item) or "code".
        text: What it says, on one line; nothing of code.
        level: The level of a heading, from 1.
    """

    kind: str
    text: str = ""
    level: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One question of an FAQ with its answer, whose paragraphs and list items are lines."""

    id: str
    topic: str
    question: str
    answer: str


# ------------------------------------------------------------------------------------------ perl

LESS, MORE = "\ue000", "\ue001"  # stand for < and > while markup is taken away
POD_ESCAPES = {"lt": LESS, "gt": MORE, "verbar": "|", "sol": "/", "quot": '"', "amp": "&"}


def read_pod(pod: str) -> Iterator[Block]:
    """Yields the blocks of a pod document."""
    bullet = ""
    for paragraph in re.split(r"\n[ \t]*\n", pod):
        command = re.match(r"\n*=([a-z]+)(\d*)\s*(.*)", paragraph, re.DOTALL)
        if command and command[1] == "head":
            yield Block("heading", pod_text(command[3]), int(command[2]))
        elif command and command[1] == "item":
            bullet = "- "
            label = re.sub(r"^(?:[*o]|\d+[.)]?)(?:\s+|$)", "", pod_text(command[3]))
            if label:
                yield Block("text", bullet + label)
                bullet = ""
        elif not command and paragraph.strip():
            if paragraph.lstrip("\n")[0].isspace():
                yield Block("code")
            elif text := pod_text(paragraph):
                yield Block("text", bullet + text)
                bullet = ""


def pod_text(pod: str) -> str:
    """Returns a pod paragraph without its markup, on one line."""

    def protected(code: re.Match[str]) -> str:
        return f"{code[1]}<{code[3].replace('<', LESS).replace('>', MORE)}>"

    def plain(code: re.Match[str]) -> str:
        letter, inside = code[1], code[2]
        if letter in "XZ":  # an entry of the index, or nothing
            return ""
        if letter == "E":
            return POD_ESCAPES.get(inside, inside)
        if letter == "L":
            shown, bar, target = inside.rpartition("|")
            page = target.split("/")[0] or target.strip('/"')
            return shown if bar else inside if "://" in inside else page
        return inside

    text = re.sub(r"([BCFILSX])(<<+)\s+(.*?)\s+>>+", protected, pod, flags=re.DOTALL)
    while (simpler := re.sub(r"([BCEFILSXZ])<([^<>]*)>", plain, text)) != text:
        text = simpler
    return " ".join(readable(text.replace(LESS, "<").replace(MORE, ">")).split())


# ----------------------------------------------------------------------------- python and debian


class PageReader(HTMLParser):
    """Collects the blocks of an HTML page in ``blocks``."""

    FLOW = frozenset({"p", "li", "dt", "dd", "h1", "h2", "h3", "h4"})
    IGNORED = frozenset({"pre", "head", "script", "style", "table", "sup"})
    IGNORED_CLASSES = frozenset(
        {"related", "sphinxsidebar", "contents", "headerlink", "footer"}  # Sphinx
        | {"navheader", "toc", "footnotes", "navfooter"}  # DocBook
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self.text: list[str] = []
        self.level = 0
        self.bullet = ""
        self.ignored: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens an element, or ignores all of it."""
        classes = (dict(attrs).get("class") or "").split()
        if self.ignored:
            if tag == self.ignored[0]:
                self.ignored.append(tag)
        elif tag in self.IGNORED or not self.IGNORED_CLASSES.isdisjoint(classes):
            self.ignored.append(tag)
            if tag == "pre":
                self.close_block()
                self.blocks.append(Block("code"))
        elif tag in self.FLOW:
            self.close_block()
            self.level = int(tag[1]) if tag[0] == "h" else 0
            self.bullet = "- " if tag in ("li", "dt") else self.bullet

    def handle_endtag(self, tag: str) -> None:
        """Closes an element."""
        if self.ignored:
            if tag == self.ignored[0]:
                self.ignored.pop()
        elif tag in self.FLOW:
            self.close_block()
            if tag in ("li", "dt"):
                self.bullet = ""

    def handle_data(self, data: str) -> None:
        """Keeps a piece of text."""
        if not self.ignored:
            self.text.append(data)

    def close_block(self) -> None:
        """Makes a block of the text since the last one."""
        text = " ".join(readable("".join(self.text)).split())
        self.text.clear()
        if not text:
            return
        if self.level:
            self.blocks.append(Block("heading", text, self.level))
        else:
            self.blocks.append(Block("text", self.bullet + text))
        self.bullet, self.level = "", 0


def read_html(page: str) -> list[Block]:
    """Returns the blocks of an HTML page."""
    reader = PageReader()
    reader.feed(page)
    reader.close()
    return reader.blocks


# ------------------------------------------------------------------------------------- selecting

CREDIT = re.compile(r"[(\[][^()\[\]]*contributed by [^()\[\]]*[)\]]\s*", re.IGNORECASE)
"""What says who wrote an answer; LICENSE.txt says it for all of them."""


def entries(product: str, topic: str, blocks: Iterable[Block]) -> Iterator[Entry]:
    """Yields the questions of a document that a customer could be told the answer of.

    A question is a heading with a question mark; its answer is the text up to the next heading.

    Args:
        product: What it is about, "Perl".
        topic: What of it, "Programming Tools".
        blocks: The document.
    """
    question = ""
    answer: list[str] = []
    for block in [*blocks, Block("heading")]:
        if block.kind == "heading":
            text = "\n".join(answer)
            if is_pair(question, text):
                slug = "-".join(re.findall(r"[a-z0-9]+", question.lower())[:10])
                yield Entry(f"{product.lower()}/{slug}", f"{product}: {topic}", question, text)
            question = re.sub(r"^[\d.]+\s+", "", block.text)
            answer = []
        elif block.kind == "text":
            if text := CREDIT.sub("", block.text, count=1):
                answer.append(text)
        elif not answer or (len(answer) == 1 and answer[0].endswith(":")):
            question = ""  # what answers it is code


def is_pair(question: str, answer: str) -> bool:
    """Whether a heading asks a question and the text under it answers by itself."""
    return (
        "?" in question
        and len(answer.split()) >= MIN_ANSWER_WORDS
        and not re.match(r"See (?:the )?(?:next|previous|above|below|question)", answer)
        and is_legible(question + answer)
    )


def documents(folder: Path) -> Iterator[tuple[str, str, list[Block]]]:
    """Yields the product, the topic and the blocks of every document of the three packages."""
    for name, page in sorted(pages(folder).items()):
        if name.endswith(".pod"):
            blocks = list(read_pod(page))
            title = next(block.text for block in blocks if block.kind == "text")
            yield "Perl", title.partition(" - ")[2], blocks
        else:
            blocks = read_html(page)
            title = next((block.text for block in blocks if block.level == 1), "")
            product = "Python" if "/python" in name else "Debian"
            yield product, re.sub(r"^Chapter \d+\. | FAQ$", "", title), blocks


PAGE = re.compile(
    r"\./usr/share/(?:perl/[\d.]+/pod/perlfaq\d\.pod|doc/debian/FAQ/[a-z-]+\.en\.html"
    r"|doc/python3\.11/html/faq/\w+\.html)"
)


def pages(folder: Path) -> dict[str, str]:
    """Returns the documents of the recorded packages by their path; others are refused."""
    found = {}
    for package, sha256 in PACKAGES:
        verify(folder / package, sha256, f"the Debian package {package}")
        unpack = ["dpkg-deb", "--fsys-tarfile", str(folder / package)]
        data = subprocess.run(unpack, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for member in archive:
                if PAGE.fullmatch(member.name) and (file := archive.extractfile(member)):
                    found[member.name] = file.read().decode("utf-8")
    return found


# --------------------------------------------------------------------------------------- writing


def with_unique_ids(found: Sequence[Entry]) -> list[Entry]:
    """Numbers the ids of questions that are worded alike from the second on."""
    count: Counter[str] = Counter()
    result = []
    for entry in found:
        count[entry.id] += 1
        number = f"-{count[entry.id]}" if count[entry.id] > 1 else ""
        result.append(dataclasses.replace(entry, id=entry.id + number))
    return result


def units(found: Sequence[Entry]) -> list[str]:
    """Groups questions that are nearly the same, so that a split can keep each group on one side.

    Two are if their content words have a Jaccard similarity of at least `SAME_QUESTION`, or their
    answers' word trigrams one of at least `SAME_ANSWER`; and so are the relations of relations.

    Args:
        found: n entries.

    Returns:
        n names of units; a unit is named after its first entry.
    """
    name = list(range(len(found)))
    asked = [frozenset(words(entry.question)) - STOP_WORDS - ASKING for entry in found]
    pairs = {(i, j) for i, j, _ in similar_pairs([e.answer for e in found], SAME_ANSWER)}
    for j, one in enumerate(asked):
        for i, other in enumerate(asked[:j]):
            if one and len(one & other) / len(one | other) >= SAME_QUESTION:
                pairs.add((i, j))
    for i, j in sorted(pairs):
        old, new = max(name[i], name[j]), min(name[i], name[j])
        name = [new if n == old else n for n in name]
    return [found[i].id for i in name]


def split_of(unit: str) -> str:
    """Returns the split that `unit` falls into by its hash: train 70 %, the others 15 % each."""
    bucket = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big") % 20
    return "train" if bucket < 14 else "validation" if bucket < 17 else "test"


def build(folder: Path) -> str:
    """Returns the data set as JSON lines, in the order of the documents."""
    found = with_unique_ids([e for document in documents(folder) for e in entries(*document)])
    lines = []
    for entry, unit in zip(found, units(found), strict=True):
        record = {**dataclasses.asdict(entry), "unit": unit, "split": split_of(unit)}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def main(input: Path, output: Path) -> None:
    """Builds `output` from the recorded packages; others are refused.

    Args:
        input: The folder that they were downloaded into.
        output: The `data.jsonl.gz` to write.
    """
    data = build(input)
    records = [json.loads(line) for line in data.splitlines()]
    for product in ("perl", "python", "debian"):
        mine = [record for record in records if record["id"].startswith(product)]
        print(f"{product}: {len(mine)}", dict(Counter(record["split"] for record in mine)))
    for split, count in sorted(Counter(record["split"] for record in records).items()):
        members = {record["unit"] for record in records if record["split"] == split}
        print(f"{split}: {count:,} questions, {len(members):,} units")
    write_gzip(output, data.encode())


if __name__ == "__main__":
    tyro.cli(main)
