"""What a run leaves behind, read back so that two runs can be compared to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

# --- run folders -------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """Parse JSON as the standard has it: no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; none if it is not there."""
    path = folder / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [strict(line) for line in lines]


def timeless_rows_in(folder: Path) -> list[dict[str, Any]]:
    """The rows without what the clock decides."""
    return [{k: v for k, v in r.items() if not k.startswith("perf/")} for r in rows_in(folder)]


def checkpoint(folder: Path) -> dict[str, Any]:
    """Everything in a checkpoint, files of its model included, by name."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): load_file(path)
        if path.suffix == ".safetensors"
        else json.loads(path.read_text("utf-8"))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    found["state.json"].get("tracker", {}).pop("wandb_id", None)
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run comes to, without what the clock decides."""
    return {
        "metrics": timeless_rows_in(folder),
        "result": json.loads((folder / "result.json").read_text("utf-8")),
        "transcripts": (folder / "transcripts.jsonl").read_bytes(),
        "last": checkpoint(folder / "checkpoints" / "last"),
        "best": checkpoint(folder / "checkpoints" / "best"),
    }


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare to the last bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


# --- W&B ---------------------------------------------------------------------------------------


def nested(items: Any) -> dict[str, Any]:
    """Put together what W&B keeps item by item."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        at = found
        for name in path:
            at = at.setdefault(name, {})
        at[last] = json.loads(item.value_json)
    return found


def history(records: list[Any]) -> dict[int, dict[str, Any]]:
    """Give step -> what was logged, without W&B's own entries."""
    found: dict[int, dict[str, Any]] = {}
    for record in of_kind(records, "history"):
        row = nested(record.item)
        step = row.pop("_step")
        assert step not in found
        found[step] = {k: v for k, v in row.items() if k not in ("_runtime", "_timestamp")}
    return found


def of_kind(records: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]
