"""Documents with summaries: from the embedded sets, JSONL, CNN/DailyMail, XSum and the hub.

The JSONL schema, one record a line (``unit`` and ``split`` may be missing, further fields are
ignored; ``"summary": "…"`` stands for ``"summaries": ["…"]``)::

    {"id": "bash", "text": "Bash is an sh-compatible …", "summaries": ["GNU Bourne Again SHell"],
     "unit": "bash", "split": "train"}

CNN/DailyMail (https://github.com/abisee/cnn-dailymail) has a ``.story`` a file, named by the SHA-1
of its URL: paragraphs, then highlights, each after a line ``@highlight``; together they are the
summary, one a line. ``all_train.txt``, ``all_val.txt`` and ``all_test.txt`` list the URLs of the
splits. XSum (https://github.com/EdinburghNLP/XSum) has a ``.summary`` (or, by its own scripts, a
``.data``) a file, named by the article's number: sections under headings such as
``[SN]RESTBODY[SN]``, the first sentence being the summary of the rest.
``XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json`` lists the numbers of the splits. The lists may lie
anywhere in the folder that is loaded. A paragraph stays a line: the hub's CNN/DailyMail joins them
by spaces and adds full stops.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha1
from itertools import product
from pathlib import Path
from typing import Final

from llm_envs.datasets.checks import (
    BadRecordError,
    Entry,
    HubSchema,
    Kind,
    Loaded,
    Raw,
    TextFormat,
    identity_of,
    listed,
    object_of,
    shown,
    text_of,
    texts_of,
)
from llm_envs.datasets.files import load
from llm_envs.datasets.records import Document
from llm_envs.datasets.splits import SPLITS

SCHEMA: Final = '{"id": "1", "text": "…", "summaries": ["…"]}'

_TEXT_COLUMNS: Final = ("text", "document", "article")
_SUMMARY_COLUMNS: Final = ("summaries", "summary", "highlights")


def load_documents(
    dataset: str | Path = "debian_packages",
    *,
    split: str = "train",
    dataset_format: str | None = None,
    skip_bad_records: bool = False,
) -> Loaded[Document]:
    """Load the documents of one split; loading them again costs nothing.

    Args:
        dataset: The embedded set ``"debian_packages"`` or ``"python_docstrings"``; the path of a
            file or folder in JSONL (this module's schema), gzipped or not, or of the files of
            CNN/DailyMail or XSum; or ``"hf:<repo id>"`` for a set of the Hugging Face hub with a
            column text, document or article and a column summaries, summary or highlights, such
            as ``"hf:abisee/cnn_dailymail"`` and ``"hf:EdinburghNLP/xsum"``.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``. Records that neither state
            a split nor are listed for one are split 80/10/10 by the hash of their unit, or of
            their text if they name none. Where there are lists, other records are left out.
        dataset_format: ``"jsonl"``, ``"cnn_dailymail"`` or ``"xsum"`` to force a format.
        skip_bad_records: Leave bad records out, count them in the result and warn, instead of
            refusing the source. (Of the stories of CNN/DailyMail 114 hold no article.)

    Returns:
        The documents in the order of the source.

    Raises:
        ValueError: An argument is wrong, the source cannot be read, a record is bad, or the split
            is empty; the message names the place, the cause and the cure.
        ImportError: ``hf:`` without the package ``datasets``.
    """
    return load(
        _KIND,
        dataset,
        split=split,
        dataset_format=dataset_format,
        skip_bad_records=skip_bad_records,
    )


def _parse_jsonl(value: object) -> Entry[Document]:
    record = object_of(value)
    text = text_of(record, "text")
    record_id, unit, key, split = identity_of(record, text)
    if "summary" not in record:
        summaries = texts_of(record, "summaries")
    elif "summaries" not in record:
        summaries = (text_of(record, "summary"),)
    else:
        raise BadRecordError("summary", "stands beside 'summaries'. Keep one of the two.")
    return Entry(Document(record_id, text, summaries, unit), key, split)


# --- CNN/DailyMail ----------------------------------------------------------------------------

_HIGHLIGHT: Final = "@highlight"


def _read_story(record_id: str, text: str) -> Raw:
    lines = [line.strip() for line in text.split("\n")]
    first = next((n for n, line in enumerate(lines) if line == _HIGHLIGHT), None)
    if first is None:
        return _bad_text(
            "line 1",
            f"begins a story without a line {_HIGHLIGHT!r}. Put one before every highlight.",
        )
    article = [line for line in lines[:first] if line]
    highlights = [line for line in lines[first:] if line not in ("", _HIGHLIGHT)]
    if not article or not highlights:
        missing = "no highlight after" if article else "no article before"
        return _bad_text(
            f"line {first + 1}",
            f"is {_HIGHLIGHT!r}, with {missing} it. Leave the story out, or download it again.",
        )
    return _text_document(record_id, article, highlights)


def _listed_stories(split: str, urls: str) -> Iterator[tuple[str, str]]:
    for url in filter(None, map(str.strip, urls.split("\n"))):
        yield sha1(url.encode()).hexdigest(), split


# --- XSum -------------------------------------------------------------------------------------

_HEADING: Final = re.compile(r"\[(SN|XSUM)\]([A-Z-]+)\[\1\]")
_SUMMARY_HEADINGS: Final = ("FIRST-SENTENCE", "INTRODUCTION")  # of .summary, of .data
# What the web page's buttons left in the text; the set on the hub is without it, too.
_BUTTONS: Final = frozenset(
    "Share this with|Email|Facebook|Messenger|Twitter|Pinterest|WhatsApp|Linkedin|LinkedIn|"
    "Copy this link|These are external links and will open in a new window".split("|")
)


def _read_article(record_id: str, text: str) -> Raw:
    sections: dict[str, tuple[int, list[str]]] = {}
    current: list[str] = []
    for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
        if heading := _HEADING.fullmatch(line):
            current = []
            sections[heading[2]] = number, current
        elif line and line not in _BUTTONS:
            current.append(line)
    parts = []
    for names in (_SUMMARY_HEADINGS, ("RESTBODY",)):
        name = next((name for name in names if name in sections), None)
        if name is None:
            return _bad_text(
                "line 1",
                f"begins an article without the heading [SN]{names[0]}[SN]. Add the section, or "
                "download the file again.",
            )
        number, lines = sections[name]
        if not lines:
            return _bad_text(
                f"line {number}",
                f"is the heading of {name}, with no text under it. Leave the article out, or "
                "download the file again.",
            )
        parts.append(lines)
    summary, article = parts
    return _text_document(record_id, article, summary)


def _listed_articles(text: str) -> Iterator[tuple[str, str]]:
    lists = json.loads(text)
    if not isinstance(lists, dict) or not set(lists) <= set(SPLITS):
        raise ValueError(f"it is {shown(lists)} instead of an object with {listed(SPLITS)}")
    for split, numbers in lists.items():
        if not isinstance(numbers, list):
            raise ValueError(f"{split!r} is {shown(numbers)} instead of a list")
        yield from ((str(number), split) for number in numbers)


def _text_document(record_id: str, text: list[str], summary: list[str]) -> Raw:
    record = {"id": record_id, "text": "\n".join(text), "summary": "\n".join(summary)}
    return Raw("line 1", record)


def _bad_text(place: str, problem: str) -> Raw:
    return Raw(place, BadRecordError("", problem))


# --- The hub ----------------------------------------------------------------------------------


def _row_reader(
    text: str, summary: str
) -> Callable[[Iterable[Mapping[str, object]], str], Iterator[Raw]]:
    """Give the reader of a hub set that calls its columns ``text`` and ``summary``."""

    def read(rows: Iterable[Mapping[str, object]], split: str) -> Iterator[Raw]:
        for number, row in enumerate(rows):
            field = "summaries" if summary == "summaries" else "summary"
            record = {
                "id": row.get("id", f"{split}-{number}"),
                "text": row[text],
                field: row[summary],
                "unit": row.get("unit"),
            }
            yield Raw(f"{split}[{number}]", record)

    return read


_KIND: Final[Kind[Document]] = Kind(
    name="document",
    schema=SCHEMA,
    embedded=("debian_packages", "python_docstrings"),
    parse_line=_parse_jsonl,
    hub=tuple(
        HubSchema(frozenset({text, summary}), _row_reader(text, summary), _parse_jsonl)
        for text, summary in product(_TEXT_COLUMNS, _SUMMARY_COLUMNS)
    ),
    texts={
        "cnn_dailymail": TextFormat(
            endings=(".story",),
            markers=(_HIGHLIGHT,),
            read=_read_story,
            lists={
                "all_train.txt": partial(_listed_stories, "train"),
                "all_val.txt": partial(_listed_stories, "validation"),
                "all_test.txt": partial(_listed_stories, "test"),
            },
        ),
        "xsum": TextFormat(
            endings=(".summary", ".data"),
            markers=("[SN]RESTBODY[SN]", "[XSUM]RESTBODY[XSUM]"),
            read=_read_article,
            lists={"XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json": _listed_articles},
        ),
    },
)
