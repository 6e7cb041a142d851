"""Conversations as people read them in a terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from llm_envs.core.task import Message

_USER, _ASSISTANT, _SCORE, _RESET = "\033[36m", "\033[33m", "\033[1m", "\033[0m"


def printable(text: str) -> str:
    """Escape what a terminal or a file cannot show: control characters and lone surrogates.

    Environments keep text verbatim; every sink passes it through here.
    """
    odd = (c for c in set(text) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cf", "Cs"))
    return text.translate({ord(c): ascii(c)[1:-1] for c in odd})


def transcript(
    messages: Sequence[Message], scores: Sequence[float | None], *, colour: bool = True
) -> str:
    """Lay out a conversation, the score of each answered turn behind it.

    Args:
        messages: Role/content messages.
        scores: One score for each assistant message, in [0, 1]; ``None`` for an unscored step.
        colour: Whether to mark roles by ANSI colours.
    """
    lines: list[str] = []
    left = iter(scores)
    for message in messages:
        role = message["role"]
        mark = _ASSISTANT if role == "assistant" else _USER
        score = next(left, None) if role == "assistant" else None
        name = f"{mark}{role}{_RESET}" if colour else role
        line = f"{name}: {printable(message['content'])}"
        if score is not None:
            line += f"  {_SCORE}[{score:.2f}]{_RESET}" if colour else f"  [{score:.2f}]"
        lines.append(line)
    return "\n".join(lines)
