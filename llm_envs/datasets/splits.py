"""Which split a record belongs to: decided by its content, so that it never moves.

A split by position or by a seed changes when a file is sorted or grows; a split by the hash of
the content does not, and two copies of one record can never stand on both sides.
"""

from __future__ import annotations

import difflib
import hashlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, cast

Split = Literal["train", "validation", "test", "all"]

SPLITS: Final = ("train", "validation", "test")
"""The splits that a record can belong to; an argument may also be ``"all"``."""

_TRAIN_SHARE: Final = 0.8
_VALIDATION_SHARE: Final = 0.1


def split_of(key: str) -> str:
    """Give the split of a content key: 80 % train, 10 % validation, 10 % test, by SHA-256.

    Args:
        key: What identifies the independent unit (an entity, a title, a whole text). Any string,
            lone surrogates included.

    Returns:
        One of `SPLITS`; always the same one for the same key, on every machine.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < _TRAIN_SHARE:
        return "train"
    return "validation" if position < _TRAIN_SHARE + _VALIDATION_SHARE else "test"


def check_split(split: object) -> Split:
    """Return ``split`` if it is one of `SPLITS` or ``"all"``.

    Raises:
        ValueError: It is anything else; the message names the choices and the likely one.
    """
    choices = (*SPLITS, "all")
    if isinstance(split, str) and split in choices:
        return cast(Split, split)
    listed = ", ".join(repr(choice) for choice in choices)
    raise ValueError(
        f"Split {reprlib.repr(split)} does not exist.{did_you_mean(split, choices)} "
        f"Use one of {listed}."
    )


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is true or false; ``"no"`` and ``"false"`` would count as true.

    Raises:
        TypeError: It is anything else.
    """
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} is {reprlib.repr(value)}. Give True or False.")


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Give the sentence `` Did you mean 'train'?`` (with its leading space), or nothing.

    The nearest choice is looked for without regard to case; a value that starts a choice
    (``"val"``) counts as near.
    """
    if not isinstance(value, str) or not value:
        return ""
    by_folded = {choice.casefold(): choice for choice in choices}
    # A 1 MB "name" is a mistake, and difflib would take minutes over it.
    folded = value.strip().casefold()[:100]
    near = [choice for choice in by_folded if folded and choice.startswith(folded)]
    near = near or difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return f" Did you mean {by_folded[near[0]]!r}?" if near else ""


def check_names(
    argument: str, given: object, known: Sequence[str], *, noun: str, example: str
) -> None:
    """Refuse an argument that is no dict, or has a name in it that means nothing.

    Args:
        argument: Name of the argument.
        given: Its value.
        known: The names that it can hold.
        noun: What these are, such as "corruption".
        example: A right value.

    Raises:
        TypeError: It is no mapping, or one of its names is unknown.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument} is {given!r}. Give a dict of {noun}s ({', '.join(known)}), such as "
            f"{example}."
        )
    for name in given:
        if name not in known:
            raise TypeError(
                f"There is no {noun} {name!r} of {argument}.{did_you_mean(str(name), known)} "
                f"There are {', '.join(known)}."
            )
