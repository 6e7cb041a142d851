"""A batch on the disk, so that an update that went wrong can be looked at and done again.

``batch.json`` holds what was played, ``batch.safetensors`` its tensors and arrays: no pickled code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.policies.candidate import Decision
from agents.policies.causal_lm import TokenSequence
from agents.rollout import Rollout, Step

KINDS: Final[dict[str, type[Any]]] = {
    c.__name__: c for c in (Rollout, TokenSequence, Decision, Step)
}
"""The classes that a batch is made of."""


def write_batch(batch: Any, folder: Path) -> None:
    """Write a :class:`Rollout`, a list of :class:`Step`, or ``None`` if nothing was played.

    Raises:
        TypeError: It holds something that is neither of ``KINDS`` nor a plain value.
    """
    tensors: dict[str, Tensor] = {}
    plain = _plain(batch, tensors)
    (folder / "batch.json").write_text(json.dumps(plain, indent=1), encoding="utf-8")
    save_file(tensors, folder / "batch.safetensors")


def read_batch(folder: Path) -> Any:
    """Read what :func:`write_batch` wrote; every number is the same to the last bit."""
    plain = json.loads((folder / "batch.json").read_text(encoding="utf-8"))
    return _restored(plain, load_file(folder / "batch.safetensors"))


# Lists and plain values are themselves in JSON; anything else is an object with its kind under "$".


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return [_plain(v, tensors) for v in value]
    if isinstance(value, tuple):
        return {"$": "tuple", "items": [_plain(v, tensors) for v in value]}
    if isinstance(value, dict):
        items = [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]
        return {"$": "dict", "items": items}
    if isinstance(value, Tensor | np.ndarray):
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(value).detach().clone().contiguous()
        return {"$": "array" if isinstance(value, np.ndarray) else "tensor", "name": name}
    kind = type(value).__name__
    if KINDS.get(kind) is not type(value):
        raise TypeError(f"a {kind} cannot be written; known are {', '.join(KINDS)}")
    fields = dataclasses.fields(KINDS[kind])
    held = {f.name: _plain(getattr(value, f.name), tensors) for f in fields}
    return {"$": kind, **held}


def _restored(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_restored(v, tensors) for v in plain]
    if not isinstance(plain, dict):
        return plain
    kind = plain.pop("$")
    if kind in ("tensor", "array"):
        tensor = tensors[plain["name"]]
        return tensor if kind == "tensor" else tensor.numpy()
    if kind in ("tuple", "dict"):
        items = _restored(plain["items"], tensors)
        return tuple(items) if kind == "tuple" else dict(items)
    return KINDS[kind](**{name: _restored(v, tensors) for name, v in plain.items()})
