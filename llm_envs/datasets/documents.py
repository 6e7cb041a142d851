"""Documents with summaries: from the embedded set, JSONL and the hub.

The JSONL schema, one record a line (``unit`` and ``split`` may be missing, further fields are
ignored; ``"summary": "…"`` stands for ``"summaries": ["…"]``)::

    {"id": "bash", "text": "Bash is an sh-compatible …", "summaries": ["GNU Bourne Again SHell"],
     "unit": "bash", "split": "train"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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
    identity_of,
    object_of,
    text_of,
    texts_of,
)
from llm_envs.datasets.files import load
from llm_envs.datasets.records import Document

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
        dataset: The embedded set ``"debian_packages"``; the path of a file or folder in JSONL
            (this module's schema), gzipped or not; or ``"hf:<repo id>"`` for a set of the Hugging
            Face hub with a column text, document or article and a column summaries, summary or
            highlights (such as CNN/DailyMail and XSum).
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``. Records that state no split
            are split 80/10/10 by the hash of their unit, or of their text if they name none.
        dataset_format: ``"jsonl"`` to force a file's format.
        skip_bad_records: Leave bad records out, count them in the result and warn, instead of
            refusing the source.

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
    embedded=("debian_packages",),
    parse_line=_parse_jsonl,
    hub=tuple(
        HubSchema(frozenset({text, summary}), _row_reader(text, summary), _parse_jsonl)
        for text, summary in product(_TEXT_COLUMNS, _SUMMARY_COLUMNS)
    ),
)
