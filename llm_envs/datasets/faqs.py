"""Questions that are asked often, with their answers: from the embedded set, JSONL and the hub.

The JSONL schema, one record a line (``topic``, ``unit`` and ``split`` may be missing, further
fields are ignored)::

    {"id": "returns-1", "topic": "returns", "question": "Can I send it back?",
     "answer": "Yes, within 30 days. …", "unit": "returns", "split": "train"}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from llm_envs.datasets.checks import (
    Entry,
    HubSchema,
    Kind,
    Loaded,
    Raw,
    identity_of,
    object_of,
    text_of,
)
from llm_envs.datasets.files import load
from llm_envs.datasets.records import FAQ

SCHEMA: Final = '{"id": "1", "topic": "…", "question": "…", "answer": "…"}'

_TOPIC_COLUMNS: Final = ("topic", "category")


def load_faqs(
    dataset: str | Path = "faqs",
    *,
    split: str = "train",
    dataset_format: str | None = None,
    skip_bad_records: bool = False,
) -> Loaded[FAQ]:
    """Load the questions of one split; loading them again costs nothing.

    Args:
        dataset: The embedded set ``"faqs"``; the path of a file or folder in JSONL (this module's
            schema), gzipped or not; or ``"hf:<repo id>"`` for a set of the Hugging Face hub with
            the columns question and answer (and topic or category, if there is one).
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``. Records that state no split
            are split 80/10/10 by the hash of their unit, or of their question if they name none.
        dataset_format: ``"jsonl"`` to force a file's format.
        skip_bad_records: Leave bad records out, count them in the result and warn, instead of
            refusing the source.

    Returns:
        The questions in the order of the source; ``training`` holds those of the training split.

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


def _parse_jsonl(value: object) -> Entry[FAQ]:
    record = object_of(value)
    question = text_of(record, "question")
    record_id, unit, key, split = identity_of(record, question)
    topic = "" if record.get("topic") is None else text_of(record, "topic")
    return Entry(FAQ(record_id, topic, question, text_of(record, "answer"), unit), key, split)


def _row_reader(
    topic: str | None,
) -> Callable[[Iterable[Mapping[str, object]], str], Iterator[Raw]]:
    """Give the reader of a hub set that calls its column of topics ``topic``."""

    def read(rows: Iterable[Mapping[str, object]], split: str) -> Iterator[Raw]:
        for number, row in enumerate(rows):
            record = {
                "id": row.get("id", f"{split}-{number}"),
                "topic": row[topic] if topic else None,
                "question": row["question"],
                "answer": row["answer"],
                "unit": row.get("unit"),
            }
            yield Raw(f"{split}[{number}]", record)

    return read


_KIND: Final[Kind[FAQ]] = Kind(
    name="FAQ",
    schema=SCHEMA,
    embedded=("faqs",),
    parse_line=_parse_jsonl,
    hub=tuple(
        HubSchema(
            frozenset({"question", "answer"} | ({topic} if topic else set())),
            _row_reader(topic),
            _parse_jsonl,
        )
        for topic in (*_TOPIC_COLUMNS, None)
    ),
)
