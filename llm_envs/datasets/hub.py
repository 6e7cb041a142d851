"""Sets of the Hugging Face hub, through the optional package ``datasets``.

``hf:<repo id>`` names a set of the hub or a local folder in the layouts of that library (JSON or
Parquet files, or what ``save_to_disk`` wrote); ``hf:<repo id>:<configuration>`` chooses one of the
configurations of a set. The splits are those of the hub; none is made up.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from llm_envs.datasets.checks import Collector, HubSchema, Kind, Parsed, listed
from llm_envs.datasets.splits import SPLITS

HUB_PREFIX: Final = "hf:"

_SPLIT_NAMES: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
# Sets that cannot be loaded without a configuration, and the one that everybody means.
_CONFIGURATIONS: Final = {"cnn_dailymail": "3.0.0", "abisee/cnn_dailymail": "3.0.0"}


def parse_hub(kind: Kind[Any], dataset: str, *, skip_bad_records: bool) -> Parsed[Any]:
    """Load every split of a hub set and check its records.

    Args:
        kind: What the records must look like.
        dataset: ``hf:<repo id>``, ``hf:<repo id>:<configuration>`` or ``hf:<local folder>``.
        skip_bad_records: Leave bad records out and count them.

    Raises:
        ImportError: The package ``datasets`` is not installed.
        ValueError: The set cannot be loaded, its columns are not known, or a record is bad.
    """
    repo = dataset.removeprefix(HUB_PREFIX).strip()
    if not repo:
        raise ValueError(
            f"Dataset {dataset!r} names no hub set. Write {HUB_PREFIX}<repo id>, such as "
            f"{HUB_PREFIX}rajpurkar/squad."
        )
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"Dataset {dataset!r} needs the package 'datasets', which is not installed. Install "
            "the extra with: pip install 'llm-envs[hub]'"
        )
    folder = Path(repo).expanduser()
    stamps: tuple[tuple[str, int, int], ...] = ()
    if folder.is_dir():
        repo = str(folder.resolve())
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        stamps = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    return _parse_cached(kind, repo, stamps, skip_bad_records)


@lru_cache(maxsize=8)
def _parse_cached(
    kind: Kind[Any], repo: str, stamps: tuple[object, ...], skip_bad_records: bool
) -> Parsed[Any]:
    source = f"{HUB_PREFIX}{repo}"
    by_hub_name = _load(repo, is_local=bool(stamps))
    collector = Collector(kind, skip_bad_records=skip_bad_records)
    known = False
    for split in SPLITS:
        hub_name = next((name for name in _SPLIT_NAMES[split] if name in by_hub_name), None)
        if hub_name is None:
            continue
        known = True
        rows = by_hub_name[hub_name]
        schema = _schema(kind, list(rows.column_names), source)
        collector.add(source, schema.read(rows, hub_name), schema.parse, split)
    if not known:
        raise ValueError(
            f"{source}: the set has the splits {listed(by_hub_name)}, but none of "
            f"{listed(name for names in _SPLIT_NAMES.values() for name in names)}. Save it as a "
            f'file of {kind.name}s ({kind.schema}) with a field "split", and load that.'
        )
    return collector.parsed(f"{source} (hub splits {listed(by_hub_name)})")


def _load(repo: str, *, is_local: bool) -> dict[str, Any]:
    datasets: Any = importlib.import_module("datasets")  # Optional, and takes a second.
    try:
        if is_local and any(
            (Path(repo) / name).exists() for name in ("dataset_dict.json", "state.json")
        ):
            loaded = datasets.load_from_disk(repo)
        else:
            name, _, configuration = (repo, "", "") if is_local else repo.partition(":")
            configuration = configuration or _CONFIGURATIONS.get(name, "")
            loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # The library raises dozens of types, of its own and of others.
        raise ValueError(
            f"{HUB_PREFIX}{repo}: the set could not be loaded ({type(error).__name__}: {error}). "
            "Check its name on https://huggingface.co/datasets, the network, and whether it wants "
            f"a configuration ({HUB_PREFIX}<repo id>:<configuration>)."
        ) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _schema(kind: Kind[Any], columns: list[str], source: str) -> HubSchema[Any]:
    for schema in kind.hub:
        if schema.columns.issubset(columns):
            return schema
    wanted = " or ".join(f"({listed(sorted(schema.columns))})" for schema in kind.hub)
    raise ValueError(
        f"{source}: the columns {listed(columns)} hold no {kind.name}s that we know. Known are "
        f"{wanted}; save other sets as JSONL, one {kind.name} a line: {kind.schema}."
    )
