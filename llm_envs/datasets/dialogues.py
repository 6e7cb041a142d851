"""Dialogues about passages: from the embedded set, JSONL, SQuAD, CoQA and the hub.

The JSONL schema, one record a line (``unit`` and ``split`` may be missing, further fields are
ignored)::

    {"id": "france-1", "passage": "France is a country …", "unit": "France", "split": "train",
     "turns": [{"question": "What is its capital?", "answers": ["Paris", "the city of Paris"]}]}

SQuAD (https://rajpurkar.github.io/SQuAD-explorer, v1.1 and v2.0) has independent questions about
the paragraphs of an article: a paragraph becomes a dialogue with its questions as turns, the
article is the unit. CoQA (https://stanfordnlp.github.io/coqa) has conversations about a story.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

from llm_envs.datasets.checks import (
    BadRecordError,
    Entry,
    HubSchema,
    Kind,
    Loaded,
    OfficialFormat,
    Raw,
    each_of,
    identity_of,
    list_of,
    object_of,
    shown,
    text_of,
    texts_of,
)
from llm_envs.datasets.files import load
from llm_envs.datasets.records import Dialogue, Turn
from llm_envs.scoring.qa import UNKNOWN

SCHEMA: Final = '{"id": "1", "passage": "…", "turns": [{"question": "…", "answers": ["…"]}]}'


def load_dialogues(
    dataset: str | Path = "countries_wordnet",
    *,
    split: str = "train",
    dataset_format: str | None = None,
    skip_bad_records: bool = False,
) -> Loaded[Dialogue]:
    """Load the dialogues of one split; loading them again costs nothing.

    Args:
        dataset: The embedded set ``"countries_wordnet"``; the path of a file or folder in JSONL
            (this module's schema), SQuAD or CoQA JSON, gzipped or not, recognised by content; or
            ``"hf:<repo id>"`` for a set of the Hugging Face hub with the columns of SQuAD, CoQA
            or our schema.
        split: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``. Records that state no split
            are split 80/10/10 by the hash of their unit, or of their passage if they name none.
        dataset_format: ``"jsonl"``, ``"squad"`` or ``"coqa"`` to force a file's format.
        skip_bad_records: Leave bad records out, count them in the result and warn, instead of
            refusing the source. In SQuAD a record is a paragraph, in CoQA a conversation.

    Returns:
        The dialogues in the order of the source.

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


def _parse_jsonl(value: object) -> Entry[Dialogue]:
    record = object_of(value)
    passage = text_of(record, "passage")
    record_id, unit, key, split = identity_of(record, passage)
    turns = tuple(each_of(list_of(record, "turns"), "turns", _parse_turn))
    return Entry(Dialogue(record_id, passage, turns, unit), key, split)


def _parse_turn(value: object) -> Turn:
    turn = object_of(value)
    if turn.get("answers") == []:
        raise BadRecordError(
            "answers",
            f'is an empty list. Give an answer, or ["{UNKNOWN}"] if the passage holds none.',
        )
    return Turn(text_of(turn, "question"), texts_of(turn, "answers"))


# --- SQuAD ------------------------------------------------------------------------------------


def _read_squad(articles: Sequence[object]) -> Iterator[Raw]:
    for number, value in enumerate(articles):
        place = f"data[{number}]"
        try:
            article = object_of(value)
            title = text_of(article, "title")
            paragraphs = list_of(article, "paragraphs")
        except BadRecordError as bad:
            yield Raw(place, bad)
            continue
        for index, paragraph in enumerate(paragraphs):
            yield Raw(f"{place}.paragraphs[{index}]", (title, paragraph))


def _parse_squad(value: object) -> Entry[Dialogue]:
    assert isinstance(value, tuple)  # Our own readers yield (title, paragraph).
    title, raw = value
    paragraph = object_of(raw)
    passage = text_of(paragraph, "context")
    questions = list_of(paragraph, "qas")
    turns = tuple(each_of(questions, "qas", _parse_squad_question))
    # The questions' ids are official and unique, so the first one names the paragraph.
    first_id = each_of(questions[:1], "qas", lambda qa: text_of(object_of(qa), "id"))[0]
    return Entry(Dialogue(first_id, passage, turns, title), title)


def _parse_squad_question(value: object) -> Turn:
    qa = object_of(value)
    question = text_of(qa, "question")
    impossible = qa.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise BadRecordError("is_impossible", f"is {shown(impossible)} instead of true or false.")
    if impossible:
        return Turn(question, (UNKNOWN,))
    answers = each_of(
        list_of(qa, "answers"), "answers", lambda answer: text_of(object_of(answer), "text")
    )
    return Turn(question, tuple(dict.fromkeys(answers)))


def _read_squad_rows(rows: Iterable[Mapping[str, object]], split: str) -> Iterator[Raw]:
    """Put the rows of a hub set, one a question, together to paragraphs again.

    The set does not say which questions are impossible, but these have no answers.
    """
    for (title, context), group in groupby(
        enumerate(rows), key=lambda pair: (pair[1].get("title"), pair[1]["context"])
    ):
        numbered = list(group)
        place = f"{split}[{numbered[0][0]}]"
        unit = title if isinstance(title, str) and title.strip() else context
        try:
            qas = [_squad_question(row, f"{split}-{number}") for number, row in numbered]
        except BadRecordError as bad:
            yield Raw(place, bad)
        else:
            yield Raw(place, (unit, {"context": context, "qas": qas}))


def _squad_question(row: Mapping[str, object], default_id: str) -> dict[str, object]:
    texts = _column(row, "answers", "text")
    return {
        "id": str(row.get("id", default_id)),
        "question": row["question"],
        "is_impossible": not texts,
        "answers": [{"text": text} for text in texts],
    }


# --- CoQA -------------------------------------------------------------------------------------


def _read_coqa(conversations: Sequence[object]) -> Iterator[Raw]:
    for number, value in enumerate(conversations):
        yield Raw(f"data[{number}]", value)


def _parse_coqa(value: object) -> Entry[Dialogue]:
    record = object_of(value)
    story = text_of(record, "story")
    record_id = text_of(record, "id")
    questions = each_of(
        list_of(record, "questions"),
        "questions",
        lambda question: (text_of(object_of(question), "input_text"), _turn_id(question)),
    )
    turn_ids = [turn_id for _, turn_id in questions]
    annotators = [_coqa_answers(record, "answers", turn_ids)]
    try:
        additional = object_of(record.get("additional_answers") or {})
        annotators += [_coqa_answers(additional, name, turn_ids) for name in additional]
    except BadRecordError as bad:
        raise bad.within("additional_answers") from None
    turns = tuple(
        Turn(question, tuple(dict.fromkeys(answer for answer in answers if answer)))
        for (question, _), *answers in zip(questions, *annotators, strict=True)
    )
    return Entry(Dialogue(record_id, story, turns, record_id), story)


def _coqa_answers(record: Mapping[str, object], name: str, turn_ids: Sequence[object]) -> list[str]:
    """Give one annotator's answers; ``""`` where an additional annotator gave none."""

    def parse(value: object) -> tuple[str, object]:
        answer = object_of(value)
        if name != "answers" and answer.get("input_text") == "":
            return "", _turn_id(answer)
        text = text_of(answer, "input_text")
        return UNKNOWN if text.strip().lower() == UNKNOWN else text, _turn_id(answer)

    answers = each_of(list_of(record, name), name, parse)
    if len(answers) != len(turn_ids):
        raise BadRecordError(
            name,
            f"has {len(answers)} elements, but there are {len(turn_ids)} questions. Give one "
            "answer for each question.",
        )
    for index, ((_, turn_id), expected) in enumerate(zip(answers, turn_ids, strict=True)):
        if turn_id != expected:
            raise BadRecordError(
                f"{name}[{index}].turn_id",
                f"is {shown(turn_id)}, but the question's is {shown(expected)}. Put questions and "
                "answers in the same order.",
            )
    return [text for text, _ in answers]


def _turn_id(value: object) -> object:
    return value.get("turn_id") if isinstance(value, dict) else None


def _read_coqa_rows(rows: Iterable[Mapping[str, object]], split: str) -> Iterator[Raw]:
    for number, row in enumerate(rows):
        value: object
        try:
            additional = row.get("additional_answers")
            others = additional if isinstance(additional, Mapping) else {}
            value = {
                "id": str(row.get("id", f"{split}-{number}")),
                "story": row["story"],
                "questions": _coqa_column(row, "questions"),
                "answers": _coqa_column(row, "answers"),
                # The hub's training rows carry empty columns for annotators who were not asked.
                "additional_answers": {
                    name: texts for name in others if (texts := _coqa_column(others, name))
                },
            }
        except BadRecordError as bad:
            value = bad
        yield Raw(f"{split}[{number}]", value)


def _coqa_column(row: Mapping[str, object], column: str) -> list[dict[str, object]]:
    return [{"input_text": text} for text in _column(row, column, "input_text")]


def _column(row: Mapping[str, object], column: str, name: str) -> list[object]:
    """Give a nested column: a list of texts, a struct of lists, or a list of structs."""
    value = row[column]
    if isinstance(value, Mapping):
        value = value.get(name)
    if not isinstance(value, list):
        raise BadRecordError(column, f"is {shown(row[column])} instead of a list of {name!r}.")
    return [item.get(name) if isinstance(item, Mapping) else item for item in value]


# --- Our schema on the hub --------------------------------------------------------------------


def _read_rows(rows: Iterable[Mapping[str, object]], split: str) -> Iterator[Raw]:
    for number, row in enumerate(rows):
        # The split is the hub's; a column of that name is not ours.
        yield Raw(f"{split}[{number}]", {"id": f"{split}-{number}", **row, "split": None})


_KIND: Final[Kind[Dialogue]] = Kind(
    name="dialogue",
    schema=SCHEMA,
    embedded=("countries_wordnet",),
    parse_line=_parse_jsonl,
    official={
        "squad": OfficialFormat("paragraphs", _read_squad, _parse_squad),
        "coqa": OfficialFormat("story", _read_coqa, _parse_coqa),
    },
    hub=(
        HubSchema(frozenset({"passage", "turns"}), _read_rows, _parse_jsonl),
        HubSchema(frozenset({"context", "question", "answers"}), _read_squad_rows, _parse_squad),
        HubSchema(frozenset({"story", "questions", "answers"}), _read_coqa_rows, _parse_coqa),
    ),
)
