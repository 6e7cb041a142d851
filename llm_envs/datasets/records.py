"""The records that tasks are made of, whatever file they came from.

A record is frozen and holds tuples, so that a thousand environments can share one data set.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a dialogue and every answer that is accepted for it.

    Attributes:
        question: What the user asks.
        answers: The accepted answers, at least one; ``("unknown",)`` when the passage holds none.
    """

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A passage and the questions that are asked about it, in their order.

    Attributes:
        id: Names the record; unique within a data set.
        passage: The text that the answers are found in.
        turns: At least one turn; later ones may need the earlier ones to be understood.
        unit: The independent unit that the record belongs to (an entity, an article): splits
            never divide it, and intervals are bootstrapped over it.
    """

    id: str
    passage: str
    turns: tuple[Turn, ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the summaries that are accepted for it.

    Attributes:
        id: Names the record; unique within a data set.
        text: The text to summarise.
        summaries: At least one reference summary.
        unit: The independent unit that the record belongs to; see `Dialogue`.
    """

    id: str
    text: str
    summaries: tuple[str, ...]
    unit: str


@dataclass(frozen=True, slots=True)
class FAQ:
    """A question that is asked often, and its answer.

    Attributes:
        id: Names the record; unique within a data set.
        topic: What it is about, as a customer would say it; "" where that is not known.
        question: What is asked.
        answer: The whole answer; paragraphs and list items are lines.
        unit: The independent unit that the record belongs to (questions that are nearly the
            same); see `Dialogue`.
    """

    id: str
    topic: str
    question: str
    answer: str
    unit: str
