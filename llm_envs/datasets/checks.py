"""From raw records to checked ones by split: what files and hub sets share.

A loader (`dialogues.py`, `documents.py`) says what its records look like (`Kind`); here stand the
checks of fields, the refusal or counting of bad records, and the choice of the split: the one that
the record states, else the one that its file or hub set states, else the one that the hash of its
content gives.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from llm_envs.datasets.splits import SPLITS, Split, did_you_mean, split_of

_EXAMPLES_OF_SKIPPED: Final = 5


class _HasIdentity(Protocol):
    @property
    def id(self) -> str: ...

    @property
    def unit(self) -> str: ...


T = TypeVar("T", bound=_HasIdentity)


@dataclass(frozen=True, slots=True)
class Loaded(Generic[T]):
    """The records of one split, and what was left out on the way.

    Attributes:
        records: The records, in the order of the file; shared by everyone who loads them.
        skipped: How many bad records the whole source held (of any split), with
            ``skip_bad_records=True``; else 0.
        source: Where they come from, as a reader would name it.
        reasons: The first few reasons for skipping, each with its place.
        training: The training records of the source, which may be known in every split.
    """

    records: tuple[T, ...]
    skipped: int
    source: str
    reasons: tuple[str, ...] = ()
    training: tuple[T, ...] = ()


class BadRecordError(Exception):
    """A record that cannot be used; ``field`` is its path inside the record, or ``""``."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def within(self, outer: str) -> BadRecordError:
        """Return the same error, as seen from the object that holds this one at ``outer``."""
        return BadRecordError(f"{outer}.{self.field}" if self.field else outer, self.problem)


class Raw(NamedTuple):
    """A record as it was read, before any check.

    Attributes:
        place: Where it stands in its file (``line 3``, ``data[2].paragraphs[0]``).
        value: What was read there, or the error that kept it from being read.
    """

    place: str
    value: object


class Entry(NamedTuple, Generic[T]):
    """A checked record, with what decides its split.

    Attributes:
        record: The record.
        key: What must stay in one split: the unit, or else the content.
        split: The split that the record states, if it does.
    """

    record: T
    key: str
    split: str | None = None


@dataclass(frozen=True, eq=False)
class OfficialFormat(Generic[T]):
    """A published JSON format: an object whose ``data`` holds the records.

    Attributes:
        marker: The field of each element of ``data`` that tells this format from the others.
        read: Gives the raw records of ``data``.
        parse: Checks one of them.
    """

    marker: str
    read: Callable[[Sequence[object]], Iterator[Raw]]
    parse: Callable[[object], Entry[T]]


@dataclass(frozen=True, eq=False)
class TextFormat:
    """A published format of text files, one record a file, named by the record's id.

    Attributes:
        endings: How the names of such files end.
        markers: The lines, without space around them, one of which tells this format.
        read: Gives the raw record, in the JSONL schema, of an id and a text.
        lists: By the name of a file that states splits: what gives (id, split) from its text. It
            raises `ValueError` with what is wrong in it.
    """

    endings: tuple[str, ...]
    markers: tuple[str, ...]
    read: Callable[[str, str], Raw]
    lists: Mapping[str, Callable[[str], Iterable[tuple[str, str]]]]


@dataclass(frozen=True, eq=False)
class HubSchema(Generic[T]):
    """The columns of a set on the Hugging Face hub.

    Attributes:
        columns: The columns that tell it.
        read: Gives the raw records of its rows; the string is the split's name on the hub.
        parse: Checks one of them.
    """

    columns: frozenset[str]
    read: Callable[[Iterable[Mapping[str, object]], str], Iterator[Raw]]
    parse: Callable[[object], Entry[T]]


@dataclass(frozen=True, eq=False)
class Kind(Generic[T]):
    """What a loader knows about its records.

    Attributes:
        name: What a record is called in messages.
        schema: One record of the JSONL schema, as messages show it.
        embedded: The sets that ship with the package.
        parse_line: Checks one record of the JSONL schema.
        official: The published JSON formats by name.
        hub: The column schemas of hub sets, the first that fits is used.
        texts: The published formats of text files by name.
    """

    name: str
    schema: str
    embedded: tuple[str, ...]
    parse_line: Callable[[object], Entry[T]]
    hub: tuple[HubSchema[T], ...]
    official: Mapping[str, OfficialFormat[T]] = field(default_factory=dict)
    texts: Mapping[str, TextFormat] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[str, ...]:
        """The names that ``dataset_format=`` takes."""
        return ("jsonl", *self.official, *self.texts)


# --- Checking and splitting -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """Every record of a source by split (``"all"`` in the order of the source)."""

    by_split: Mapping[str, tuple[T, ...]]
    skipped: int
    reasons: tuple[str, ...]
    source: str


class Collector(Generic[T]):
    """Takes raw records, keeps the good ones by split, and refuses or counts the bad ones."""

    def __init__(self, kind: Kind[T], *, skip_bad_records: bool) -> None:
        self._kind = kind
        self._skip = skip_bad_records
        self._by_split: dict[str, list[T]] = {name: [] for name in (*SPLITS, "all")}
        self._place_of_id: dict[str, tuple[str, str]] = {}
        self._split_of_key: dict[str, tuple[str, tuple[str, str]]] = {}
        self._skipped = 0
        self._divided = 0
        self._reasons: list[str] = []

    def add(
        self,
        name: str,
        raws: Iterable[Raw],
        parse: Callable[[object], Entry[T]],
        default_split: str | None,
    ) -> None:
        """Check the records of one file and sort them into their splits.

        Raises:
            ValueError: A record is bad and bad records are not to be skipped.
        """
        with _paused_garbage_collection():
            for place, value in raws:
                try:
                    if isinstance(value, BadRecordError):
                        raise value
                    self._keep(parse(value), default_split, (name, place))
                except BadRecordError as bad:
                    self._refuse(_reason(name, place, bad))

    def _refuse(self, reason: str) -> None:
        if not self._skip:
            raise ValueError(
                f"{reason} (skip_bad_records=True leaves such records out and counts them.)"
            ) from None
        self._skipped += 1
        if len(self._reasons) < _EXAMPLES_OF_SKIPPED:
            self._reasons.append(reason)

    def _keep(self, entry: Entry[T], default_split: str | None, place: tuple[str, str]) -> None:
        record, key, stated = entry
        earlier = self._place_of_id.get(record.id)
        if earlier is not None:
            raise BadRecordError(
                "id",
                f"is {shown(record.id)}, as in {_relative(earlier, place)}. Give each record an id "
                "of its own.",
            )
        split = stated or default_split or split_of(key)
        split_before, place_before = self._split_of_key.setdefault(key, (split, place))
        if split_before != split and stated is None and default_split is not None:
            # A published split: its scores stay comparable, but its users are told.
            self._divided += 1
        elif split_before != split:
            raise BadRecordError(
                "split",
                f"is {split!r}, but {_relative(place_before, place)}, of the same unit or content "
                f"({shown(key)}), is in {split_before!r}: the one would be evaluated after "
                "training on the other. "
                "Give both the same split.",
            )
        self._place_of_id[record.id] = place
        self._by_split[split].append(record)
        self._by_split["all"].append(record)

    def parsed(self, source: str) -> Parsed[T]:
        """Give what was kept, with one warning if anything was skipped.

        Raises:
            ValueError: Nothing was kept.
        """
        kept = len(self._by_split["all"])
        if not kept:
            because = f" All {self._skipped} are bad; {self._reasons[0]}" if self._reasons else ""
            raise ValueError(
                f"{source}: there is no usable {self._kind.name}.{because} "
                f"A {self._kind.name} is {self._kind.schema}."
            )
        if self._skipped:
            warnings.warn(
                f"{source}: skipped {self._skipped} bad of {self._skipped + kept} records. "
                f"The first: {self._reasons[0]}",
                stacklevel=5,
            )
        if self._divided:
            warnings.warn(
                f"{source}: the unit or content of {self._divided} records also stands in another "
                "split of this published data. They are kept, so that scores stay comparable, but "
                "an evaluation on them is not on unseen data.",
                stacklevel=5,
            )
        by_split = {name: tuple(records) for name, records in self._by_split.items()}
        return Parsed(by_split, self._skipped, tuple(self._reasons), source)


@contextmanager
def _paused_garbage_collection() -> Iterator[None]:
    # Records hold no cycles, but every few hundred of them start a walk over all objects there
    # are, which doubles the time of loading.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _relative(place: tuple[str, str], seen_from: tuple[str, str]) -> str:
    return place[1] if place[0] == seen_from[0] else ", ".join(place)


def _reason(name: str, place: str, bad: BadRecordError) -> str:
    if not bad.field:
        return f"{name}: {place} {bad.problem}"
    # In official files the place and the field join to one JSON path.
    where = f"{place}.{bad.field}" if place.endswith("]") else f"{place}: field {bad.field!r}"
    return f"{name}, {where} {bad.problem}"


def select(parsed: Parsed[T], split: Split) -> Loaded[T]:
    """Give the records of one split.

    Raises:
        ValueError: There is none.
    """
    records = parsed.by_split[split]
    if not records:
        counts = ", ".join(f"{name} {len(parsed.by_split[name])}" for name in SPLITS)
        raise ValueError(
            f"{parsed.source}: no record is in the split {split!r} (it has {counts}). Records "
            'without a field "split" are split by the hash of their content, so that a small file '
            'may leave a split empty: give the records a "split", or load split="all".'
        )
    training = parsed.by_split["train"]
    return Loaded(records, parsed.skipped, parsed.source, parsed.reasons, training)


# --- Checking fields --------------------------------------------------------------------------

V = TypeVar("V")


def each_of(values: Sequence[object], name: str, parse: Callable[[object], V]) -> list[V]:
    """Parse the elements of the list ``name``; an error in one tells its index.

    Raises:
        BadRecordError: ``parse`` raised it.
    """
    parsed = []
    for index, value in enumerate(values):
        try:
            parsed.append(parse(value))
        except BadRecordError as bad:
            raise bad.within(f"{name}[{index}]") from None
    return parsed


def object_of(value: object) -> dict[str, object]:
    """Return ``value`` if it is a JSON object.

    Raises:
        BadRecordError: It is not.
    """
    if isinstance(value, dict):
        return value
    raise BadRecordError("", f"is {shown(value)} instead of a JSON object.")


def list_of(record: Mapping[str, object], name: str) -> list[object]:
    """Return the field ``name``, a list with at least one element.

    Raises:
        BadRecordError: It is missing, of another type, or empty.
    """
    value = record.get(name)
    if isinstance(value, list) and value:
        return value
    _require(record, name)
    if isinstance(value, list):
        raise BadRecordError(name, "is an empty list. Give at least one element.")
    cure = f" Write [{json.dumps(value)[:60]}]." if isinstance(value, str) else ""
    raise BadRecordError(name, f"is {shown(value)} instead of a list.{cure}")


def text_of(record: Mapping[str, object], name: str) -> str:
    """Return the field ``name``, a string with more in it than whitespace.

    Raises:
        BadRecordError: It is missing, of another type, or blank.
    """
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        return value
    _require(record, name)
    raise BadRecordError(name, _text_problem(value))


def texts_of(record: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Return the field ``name``, a list of strings, each once, in their order.

    Raises:
        BadRecordError: It is missing, of another type, empty, or holds something but texts.
    """
    values = list_of(record, name)
    try:
        # Without a Python loop: large files hold a hundred thousand answers.
        if all(map(str.strip, values)):  # type: ignore[arg-type]
            return tuple(dict.fromkeys(values))  # type: ignore[arg-type]
    except TypeError:
        pass  # An element is no string; which one is said below.
    for index, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise BadRecordError(f"{name}[{index}]", _text_problem(value))
    raise AssertionError("Texts were refused although each of them is good.")


def identity_of(record: Mapping[str, object], content: str) -> tuple[str, str, str, str | None]:
    """Return the id, the unit, the key and the split of a record of a JSONL schema.

    ``id`` is a string or an integer; ``unit`` (default: the id) and ``split`` may be missing. The
    key is the unit if the record names one, else its content.

    Raises:
        BadRecordError: One of them is of another type, or the split does not exist.
    """
    number = record.get("id")
    is_number = isinstance(number, int) and not isinstance(number, bool)
    record_id = str(number) if is_number else text_of(record, "id")
    unit = text_of(record, "unit") if record.get("unit") is not None else None
    split = record.get("split")
    if split is not None and (not isinstance(split, str) or split not in SPLITS):
        raise BadRecordError(
            "split",
            f"is {shown(split)}.{did_you_mean(split, SPLITS)} Use one of {listed(SPLITS)}, or "
            "leave it out.",
        )
    return record_id, unit or record_id, unit or content, split


def shown(value: object) -> str:
    """Say what a JSON value is, shortly: ``the number 3``, ``an object with 'id', 'text'``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"{value[:57]!r}…"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        names = ", ".join(repr(name)[:40] for name in list(value)[:8])
        return f"an object with {names}" if names else "an empty object"
    return f"an object of the type {type(value).__name__}"


def _require(record: Mapping[str, object], name: str) -> None:
    if name in record:
        return
    near = next((other for other in record if did_you_mean(other, [name])), None)
    hint = f" Is {near!r} meant for it?" if near is not None else ""
    raise BadRecordError(name, f"is missing: the record is {shown(dict(record))}.{hint}")


def _text_problem(value: object) -> str:
    if isinstance(value, str):
        return "is blank. Give a text, or leave the record out."
    return f"is {shown(value)} instead of a string."


def listed(names: Iterable[str]) -> str:
    """Give names as a message lists them: quoted, with commas."""
    return ", ".join(repr(name) for name in names)
