r"""Builds the embedded set of Python docstrings: what a docstring explains, and its summary line.

The input is the standard library of CPython 3.11.7, as it lies beside an interpreter of that
version (or in the folder `Lib` of its source, https://www.python.org/downloads/release/python-3117):

    python3.11 scripts/build_python_docstrings.py \
        --output llm_envs/datasets/embedded/python_docstrings/data.jsonl.gz

Modules are parsed, never imported. Another version's library is refused.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from build_common import write_gzip
from build_debian_packages import STOP_WORDS, is_legible, similar_pairs, split_of

INPUT_SHA256 = "eb4d5ce7c32002b4778582d76ee94c36fe9839738863d3bd5898ec3d8c4f8179"
INPUT_SOURCE = "the standard library of CPython 3.11.7"
LIBRARY = Path(sysconfig.get_path("stdlib"))

# Tests, applications, and what is made for one machine or added to it: no documented library.
LEFT_OUT = frozenset(
    "__pycache__ ensurepip idlelib lib2to3 pydoc_data site-packages test tests turtledemo".split()
)

TEXT_WORDS = range(20, 251)
SUMMARY_WORDS = range(3, 21)
MIN_COVERAGE = 1 / 2  # share of the summary's content words that the text must contain
NEAR_DUPLICATE = 0.5  # Jaccard similarity of word trigrams at which only one record is kept
SAME_UNIT = 0.15  # ... and at which the modules of two records share a unit, hence a split


@dataclass(frozen=True, slots=True)
class Docstring:
    """One docstring, taken apart as PEP 257 has it.

    Attributes:
        name: The full name of what it documents; also its attribution.
        module: The module that holds it.
        summary: Its first line.
        text: The signature, and what follows the summary.
    """

    name: str
    module: str
    summary: str
    text: str


# ---------------------------------------------------------------------------------------- reading


def library_files(folder: Path) -> list[Path]:
    """Returns the modules of a standard library, sorted by their path in it."""
    found = [
        path
        for path in folder.rglob("*.py")
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def digest_of(folder: Path, files: Sequence[Path]) -> str:
    """Returns the SHA-256 over the names and the contents of `files`, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def read_docstrings(source: str, module: str) -> Iterator[Docstring]:
    """Yields the docstrings of a module that have a summary line and go on after it."""
    for name, node in documented(ast.parse(source), module):
        lines = (ast.get_docstring(node) or "").split("\n")
        if len(lines) > 2 and not lines[1]:  # PEP 257: the summary is one line, then a blank one
            text = "\n".join([signature(name, node), "", *lines[2:]])
            yield Docstring(name, module, " ".join(lines[0].split()), without_sessions(text))


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """Yields a definition with its full name, then all definitions within it."""
    yield name, node
    pending: list[ast.AST] = list(reversed(node.body))
    while pending:
        child = pending.pop()
        if isinstance(child, Documented):
            yield from documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            pending += reversed(list(ast.iter_child_nodes(child)))


def signature(name: str, node: Documented) -> str:
    """Returns how a definition is written, without its body."""
    match node:
        case ast.Module():
            return f"module {name}"
        case ast.ClassDef():
            bases = ", ".join(map(ast.unparse, node.bases))
            return f"class {name}({bases})" if bases else f"class {name}"
        case _:
            return f"{name}({ast.unparse(node.args)})"


def without_sessions(text: str) -> str:
    """Returns a docstring's text without interpreter sessions, which show and do not tell.

    A session runs from `>>>` to the next blank line, as doctest has it. Blank lines that would
    follow one another become one, and space at the ends of lines goes.
    """
    text = re.sub(r"^[ \t]*>>>.*\n(?:.*\S.*(?:\n|\Z))*", "", text + "\n", flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()


# -------------------------------------------------------------------------------------- filtering

# The summary line of old docstrings is a signature or a rule of a grammar.
NO_SENTENCE = re.compile(r"->|\w\(|::|\s=\s|[:,;]$|^\W|^[a-z]")
SECTION_AT_END = re.compile(r"(?:::?|\b(?:follows|example))\s*$")


def words(text: str) -> list[str]:
    """Returns the lowercase words of `text`, those within identifiers too, by rough stems.

    "Returns", "return" and "get_return" share a word: endings in s, ed and ing are dropped.
    """
    found = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)
    return [re.sub(r"(?<=\w{3})(?:e?s|ed|ing|e)$", "", word.lower()) for word in found]


def coverage(docstring: Docstring) -> float:
    """Returns the share of the summary's content words that the text contains, in [0, 1]."""
    content = {word for word in words(docstring.summary) if word not in STOP_WORDS}
    return len(content & set(words(docstring.text))) / max(len(content), 1)


def is_pair(docstring: Docstring) -> bool:
    """Whether the summary can fairly be asked for by someone who has read the text only."""
    told = " ".join(words(explanation(docstring)))
    return (
        not NO_SENTENCE.search(docstring.summary)
        and not SECTION_AT_END.search(docstring.text)
        and len(docstring.summary.split()) in SUMMARY_WORDS
        and len(explanation(docstring).split()) in TEXT_WORDS
        and " ".join(words(docstring.summary)) not in told  # it would ask for copying
        and is_legible(docstring.summary + docstring.text.replace("\t", " "))
        and coverage(docstring) >= MIN_COVERAGE
    )


# ------------------------------------------------------------------------ duplicates and families


def preference(docstring: Docstring) -> tuple[bool, float, str]:
    """Orders near-equal docstrings: public names, then the best covered summary, first."""
    is_private = any(re.match(r"_[^_]", part) for part in docstring.name.split("."))
    return (is_private, -coverage(docstring), docstring.name)


def without_duplicates(docstrings: Sequence[Docstring]) -> list[Docstring]:
    """Keeps the preferred docstring of each summary and of each near-equal text, by name."""
    kept: dict[str, Docstring] = {}
    for docstring in sorted(docstrings, key=preference):
        kept.setdefault(" ".join(words(docstring.summary)), docstring)
    ordered = list(kept.values())
    dropped: set[int] = set()
    for i, j, _ in similar_pairs([explanation(d) for d in ordered], NEAR_DUPLICATE):
        if i not in dropped:  # `ordered` is sorted by preference, so i is the better one
            dropped.add(j)
    return sorted((d for i, d in enumerate(ordered) if i not in dropped), key=lambda d: d.name)


def explanation(docstring: Docstring) -> str:
    """Returns the text without its signature."""
    return docstring.text.partition("\n")[2]


def units(docstrings: Sequence[Docstring]) -> list[str]:
    """Groups modules, so that a split can keep each group on one side.

    Two modules are related if docstrings of theirs have trigrams of a Jaccard similarity of at
    least `SAME_UNIT`; and so are the relations of relations.

    Args:
        docstrings: n docstrings.

    Returns:
        n names of units; a unit is named after the first of its modules.
    """
    parent = {docstring.module: docstring.module for docstring in docstrings}

    def root(module: str) -> str:
        while parent[module] != module:
            module = parent[module]
        return module

    for i, j, _ in similar_pairs([explanation(d) for d in docstrings], SAME_UNIT):
        first, second = sorted((root(docstrings[i].module), root(docstrings[j].module)))
        parent[second] = first
    return [root(docstring.module) for docstring in docstrings]


# ---------------------------------------------------------------------------------------- writing


def build(folder: Path, files: Sequence[Path]) -> str:
    """Returns the data set as JSON lines, sorted by name."""
    found: list[Docstring] = []
    for path in files:
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        source = path.read_text(encoding="utf-8")
        found += read_docstrings(source, module.removesuffix(".__init__"))
    docstrings = without_duplicates([docstring for docstring in found if is_pair(docstring)])
    lines = []
    for docstring, unit in zip(docstrings, units(docstrings), strict=True):
        record = {
            "id": docstring.name,
            "text": docstring.text,
            "summaries": [docstring.summary],
            "unit": unit,
            "split": split_of(unit),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def main(output: Path, input: Path = LIBRARY) -> None:
    """Builds `output` from the recorded library; a different one is refused.

    Args:
        output: The `data.jsonl.gz` to write.
        input: The folder of the library; by default that of this interpreter.
    """
    files = library_files(input)
    found = digest_of(input, files)
    if found != INPUT_SHA256 or sys.version_info[:2] != (3, 11):
        raise SystemExit(
            f"{input} is not the library this builder was written for, or this is not Python 3.11, "
            "so nothing was built.\n"
            f"  recorded SHA-256: {INPUT_SHA256}\n"
            f"  found SHA-256:    {found} ({len(files)} files)\n"
            f"The recorded one is {INPUT_SOURCE}."
        )
    data = build(input, files)
    records = [json.loads(line) for line in data.splitlines()]
    for split, count in sorted(Counter(record["split"] for record in records).items()):
        members = {record["unit"] for record in records if record["split"] == split}
        print(f"{split}: {count:,} records, {len(members):,} units")
    write_gzip(output, data.encode())


if __name__ == "__main__":
    tyro.cli(main)
