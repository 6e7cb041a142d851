"""From a data set's name, file or folder to its records: what all loaders share.

Finds the data, recognises the format by the content, and caches what it read, so that a thousand
environments share one tuple. In a folder, where ``train.jsonl`` and ``test.jsonl`` mean something,
the name of a file states the split of those of its records that state none. Text files, one record
each, are looked for in all folders of a folder, and the published lists of their splits with them.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, NamedTuple

from llm_envs.datasets.checks import (
    BadRecordError,
    Collector,
    Entry,
    Kind,
    Loaded,
    Parsed,
    Raw,
    T,
    TextFormat,
    listed,
    select,
    shown,
)
from llm_envs.datasets.hub import HUB_PREFIX, parse_hub
from llm_envs.datasets.splits import SPLITS, check_flag, check_split, did_you_mean

_LINES_LOOKED_AT: Final = 20
_EXTENSIONS: Final = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SPLIT_WORDS: Final = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def load(
    kind: Kind[T],
    dataset: str | Path,
    *,
    split: str,
    dataset_format: str | None,
    skip_bad_records: bool,
) -> Loaded[T]:
    """Load the records of one split; the public loaders document the arguments."""
    split = check_split(split)
    check_flag("skip_bad_records", skip_bad_records)
    if dataset_format is not None and dataset_format not in kind.formats:
        raise ValueError(
            f"Dataset format {dataset_format!r} does not exist for {kind.name}s."
            f"{did_you_mean(dataset_format, kind.formats)} Use one of {listed(kind.formats)}, or "
            "leave it out: the format is recognised by the content."
        )
    if isinstance(dataset, str) and dataset.startswith(HUB_PREFIX):
        if dataset_format is not None:
            raise ValueError(
                f"Dataset format {dataset_format!r} is for files, but {dataset!r} is a hub set, "
                "whose columns tell the format. Leave dataset_format out."
            )
        return select(parse_hub(kind, dataset, skip_bad_records=skip_bad_records), split)
    with ExitStack() as stack:
        if isinstance(dataset, str) and dataset in kind.embedded:
            folder = resources.files("llm_envs.datasets") / "embedded" / dataset
            path = stack.enter_context(resources.as_file(folder / "data.jsonl.gz"))
            source = f"embedded set {dataset!r}"
            if not path.is_file():
                raise ValueError(
                    f"The {source} has no data file in this installation. Install llm-envs again."
                )
        else:
            path = _existing_path(kind, dataset)
            source = str(path)
        files, dataset_format = _data_files(kind, path, dataset_format)
        stamps = tuple(map(_stamp, files))
        parsed = _parse_files(kind, stamps, path.is_dir(), dataset_format, skip_bad_records, source)
    return select(parsed, split)


# --- Finding the files ------------------------------------------------------------------------


class _Stamp(NamedTuple):
    """A file as the cache knows it: written again, it is another one."""

    path: str
    modified_ns: int
    size: int


def _stamp(path: str) -> _Stamp:
    status = os.stat(path)
    return _Stamp(path, status.st_mtime_ns, status.st_size)


def _existing_path(kind: Kind[Any], dataset: object) -> Path:
    if not isinstance(dataset, (str, Path)):
        raise TypeError(
            f"dataset= takes a name or a path, but got {shown(dataset)}. Give one of "
            f"{listed(kind.embedded)}, a file or a folder."
        )
    try:
        path = Path(dataset).expanduser()
        if dataset and (path.is_file() or path.is_dir()):  # "" would be the working directory
            return path.resolve()
    except (OSError, ValueError, RuntimeError):
        pass  # No path at all: too long, a NUL inside, the home of nobody.
    raise ValueError(
        f"Dataset {shown(str(dataset))} is neither an embedded set of {kind.name}s nor an existing "
        f"file or folder.{did_you_mean(dataset, kind.embedded)} The embedded sets are "
        f"{listed(kind.embedded)}; the path of a file or folder, or {HUB_PREFIX}<repo id> for a "
        "set on the Hugging Face hub, is taken too."
    )


def _data_files(
    kind: Kind[Any], path: Path, dataset_format: str | None
) -> tuple[list[str], str | None]:
    """Give the files to read, lists of splits among them, and their format if it is known."""
    if path.is_file():
        return [str(path)], dataset_format
    if dataset_format not in kind.texts:
        lists = {name for text_format in kind.texts.values() for name in text_format.lists}
        files = sorted(
            str(file)
            for file in path.iterdir()
            if file.name.endswith(_EXTENSIONS)
            and not file.name.startswith(".")
            and file.name not in lists
            and file.is_file()
        )
        if files:
            return files, dataset_format
    wanted = kind.texts
    if dataset_format is not None:
        wanted = {name: kind.texts[name] for name in kind.texts if name == dataset_format}
    found = {name: files for name in wanted if (files := _text_files(wanted[name], path))}
    if len(found) == 1:
        [(dataset_format, files)] = found.items()
        return files, dataset_format
    if found:
        raise ValueError(
            f"Folder {path} holds files of the formats {listed(found)}. Give the folder of one of "
            "them, or force one with the argument dataset_format=."
        )
    endings = [ending for text_format in wanted.values() for ending in text_format.endings]
    if dataset_format not in kind.texts:
        endings = [*_EXTENSIONS, *endings]
    raise ValueError(
        f"Folder {path} holds no file that ends in {listed(endings)}. Give the folder of "
        f"a {kind.name} set in one of the formats {listed(kind.formats)}, or "
        f"{HUB_PREFIX}{path} for a set of the Hugging Face library."
    )


def _text_files(text_format: TextFormat, folder: Path) -> list[str]:
    """Give the records in a folder and the folders in it, and the lists of splits if there are.

    There may be hundreds of thousands, hence strings.
    """
    found = [
        (root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
        and (name.endswith(text_format.endings) or name in text_format.lists)
    ]
    if all(name in text_format.lists for _, name in found):
        return []
    return [os.path.join(root, name) for root, name in sorted(found)]


def _split_in_name(file: Path) -> str | None:
    """Give the split that a file's name states (``coqa-dev-v1.0.json``: validation), if one."""
    words = re.split("[^a-z]+", file.name.lower())
    stated = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    return stated.pop() if len(stated) == 1 else None


# --- Reading the files ------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _parse_files(
    kind: Kind[Any],
    stamps: tuple[_Stamp, ...],
    in_folder: bool,
    dataset_format: str | None,
    skip_bad_records: bool,
    source: str,
) -> Parsed[Any]:
    collector = Collector(kind, skip_bad_records=skip_bad_records)
    if in_folder and dataset_format is not None and dataset_format in kind.texts:
        files = [Path(stamp.path) for stamp in stamps]
        _add_texts(collector, kind, kind.texts[dataset_format], files, source)
        return collector.parsed(source)
    for stamp in stamps:
        path = Path(stamp.path)
        name = str(path) if in_folder else source
        parse, raws = _open(kind, path, name, dataset_format)
        default_split = _split_in_name(path) if in_folder else None
        collector.add(name, raws, parse, default_split)
    return collector.parsed(source)


def _open(
    kind: Kind[T], path: Path, name: str, dataset_format: str | None
) -> tuple[Callable[[object], Entry[T]], Iterator[Raw]]:
    """Read a file: give its parser, by its format, and its raw records."""
    data = _bytes_of(path, name)
    document: object = None
    if dataset_format is None:
        dataset_format, document = _recognise(kind, data, name)
    if dataset_format == "jsonl":
        return kind.parse_line, _lines(data)
    if dataset_format in kind.texts:
        return kind.parse_line, iter([_text_record(kind.texts[dataset_format], path.stem, data)])
    if document is None:
        document = _whole_document(data, name)
    elements = _elements(document)
    if elements is None:
        raise ValueError(
            f"{name}: the file is not in the {dataset_format!r} format: it holds "
            f"{shown(document)} instead of an object with a list 'data'. Leave dataset_format out "
            "to have the format recognised."
        )
    official = kind.official[dataset_format]
    return official.parse, official.read(elements)


def _add_texts(
    collector: Collector[T],
    kind: Kind[T],
    text_format: TextFormat,
    files: Sequence[Path],
    source: str,
) -> None:
    """Add the records of a folder; where lists state splits, what none of them has is left out."""
    records = [file for file in files if file.name not in text_format.lists]
    lists = [file for file in files if file.name in text_format.lists]
    splits = _listed_splits(text_format, lists)
    by_split: dict[str | None, list[Path]] = {split: [] for split in (None, *SPLITS)}
    for file in records:
        by_split[splits.get(file.stem)].append(file)
    if lists:
        unlisted = by_split.pop(None)
        names = listed(dict.fromkeys(file.name for file in lists))
        if len(unlisted) == len(records):
            raise ValueError(
                f"{source}: none of its {len(records)} records is in the lists {names}. Give the "
                "lists that were published with the records, or take them away to have the "
                "records split by the hash of their content."
            )
        if unlisted:
            warnings.warn(
                f"{source}: {len(unlisted)} of {len(records)} records are in none of the lists "
                f"{names} and are left out, {unlisted[0].name} among them.",
                stacklevel=5,
            )

    def read(file: Path) -> Raw:
        data = _bytes_of(file, str(file))
        place, value = _text_record(text_format, file.stem, data)
        return Raw(f"{file.relative_to(source)}, {place}", value)

    for split, members in by_split.items():
        collector.add(source, map(read, members), kind.parse_line, split)


def _listed_splits(text_format: TextFormat, lists: Sequence[Path]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for file in lists:
        try:
            for record_id, split in text_format.lists[file.name](_bytes_of(file, "").decode()):
                if splits.setdefault(record_id, split) != split:
                    raise ValueError(
                        f"the record {record_id!r} is listed for {splits[record_id]!r} and for "
                        f"{split!r}"
                    )
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
            raise ValueError(
                f"{file}: the list of splits cannot be used ({error}). Download it again, or take "
                "it away to have the records split by the hash of their content."
            ) from error
    return splits


def _text_record(text_format: TextFormat, record_id: str, data: bytes) -> Raw:
    try:
        return text_format.read(record_id, data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"is not UTF-8 text ({_byte(error)}). Save the file as UTF-8."
        return Raw(f"line {line}", BadRecordError("", problem))


def _bytes_of(path: Path, name: str) -> bytes:
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{name}: the gzip file is damaged ({error}). Copy or download it again."
            ) from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _lines(data: bytes) -> Iterator[Raw]:
    # Not str.splitlines: it also splits at U+2028 and others, which stand unescaped in JSON.
    try:
        lines: Sequence[str | bytes] = data.decode().split("\n")
    except UnicodeDecodeError:
        lines = data.split(b"\n")  # One bad byte must not cost the other lines.
    for number, line in enumerate(lines, start=1):
        if line and not line.isspace():
            yield Raw(f"line {number}", _json_line(line))


def _json_line(line: str | bytes) -> object:
    try:
        return json.loads(line if isinstance(line, str) else line.decode())
    except UnicodeDecodeError as error:
        return BadRecordError("", f"is not UTF-8 text ({_byte(error)}). Save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return BadRecordError(
            "", f"is not JSON ({error.msg}, column {error.colno}). Write one JSON object a line."
        )
    except (ValueError, RecursionError) as error:
        return BadRecordError("", f"is not usable JSON ({error}). Write one JSON object a line.")


def _byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at position {error.start}"


def _whole_document(data: bytes, name: str) -> object:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: the file is not UTF-8 text ({_byte(error)}). Save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}, line {error.lineno}, column {error.colno}: the file is not JSON "
            f"({error.msg}). Correct it, or download it again if it was cut off."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the file is not usable JSON ({error}).") from error


def _elements(document: object) -> list[object] | None:
    """Give the list ``data`` that every official format has, or None."""
    elements = document.get("data") if isinstance(document, dict) else None
    return elements if isinstance(elements, list) else None


def _recognise(kind: Kind[Any], data: bytes, name: str) -> tuple[str, object]:
    """Tell the format by the content; give the document too if it had to be parsed for that."""
    head = [line for line in data.lstrip().split(b"\n", _LINES_LOOKED_AT) if line.strip()]
    if not head:
        raise ValueError(f"{name}: the file is empty. Write one {kind.name} a line: {kind.schema}.")
    # A first line may be an official file as a whole, tens of megabytes long.
    is_one_line = not data.strip().count(b"\n")
    if not is_one_line and any(
        isinstance(_json_line(line), dict) for line in head[:_LINES_LOOKED_AT]
    ):
        return "jsonl", None
    for format_name, text_format in kind.texts.items():
        markers = {marker.encode() for marker in text_format.markers}
        if not markers.isdisjoint(map(bytes.strip, data.split(b"\n"))):
            return format_name, None
    document = _whole_document(data, name)
    for element in _elements(document) or ():
        for format_name, official in kind.official.items():
            if isinstance(element, dict) and official.marker in element:
                return format_name, document
    if is_one_line and isinstance(document, dict) and "data" not in document:
        return "jsonl", None
    formats = " or ".join(
        [f"one {kind.name} a line ({kind.schema})"]
        + [
            f"the official {format_name!r} JSON (a list 'data' of objects with {official.marker!r})"
            for format_name, official in kind.official.items()
        ]
        + [
            f"a text of the {format_name!r} set (with a line {text_format.markers[0]!r})"
            for format_name, text_format in kind.texts.items()
        ]
    )
    raise ValueError(
        f"{name}: the format is not recognised: the file holds {shown(document)}. It must be "
        f"{formats}. The argument dataset_format= forces one."
    )
