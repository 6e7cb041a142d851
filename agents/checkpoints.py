"""What checkpoints are made of: folders that a crash leaves whole, moments, and whose they are."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from agents.runs import sync


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill; it takes the place of ``folder`` once it is complete.

    A crash or a power failure, at whatever moment, leaves the whole new folder or the whole old
    one, the latter under its name or with ``.old`` behind it (:func:`checkpoint_folder`).

    Raises:
        OSError: It cannot be written; then the old one stays.
    """
    fresh, old = (folder.with_name(folder.name + end) for end in (".new", ".old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except SafetensorError as error:  # its way of saying that the disk is full
        raise OSError(f"{fresh} cannot be written ({error})") from error
    for path in (*fresh.rglob("*"), fresh):
        sync(path)
    if folder.exists():  # else the old one is all there is, left by a crash
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(fresh, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoint_folder(folder: str | Path, holds: str = "state.json") -> Path:
    """Return the folder of a checkpoint; after a crash between two renames it is the old one.

    Args:
        folder: What :func:`replacing` filled.
        holds: A file that it has to hold.

    Raises:
        ValueError: There is none.
    """
    folder = Path(folder)
    for candidate in (folder, folder.with_name(folder.name + ".old")):
        if (candidate / holds).exists():
            return candidate
    raise ValueError(f"{folder} is not a checkpoint: it holds no {holds}.")


def has_checkpoint(folder: Path) -> bool:
    """Whether :func:`checkpoint_folder` finds one."""
    try:
        checkpoint_folder(folder)
    except ValueError:
        return False
    return True


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer remembers: "index of the parameter/name" -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{index}/{name}": value for index, of in state.items() for name, value in of.items()}


def restore_moments(
    optimizer: torch.optim.Optimizer,
    stored: Mapping[str, Tensor],
    place: Callable[[Tensor, int], Tensor] = lambda value, _: value.clone(),
) -> None:
    """Give an optimizer back what :func:`moments` returned.

    Args:
        optimizer: An optimizer of the same parameters.
        stored: What it remembered.
        place: Makes of a tensor, and the index of its parameter, what is kept. By default a copy:
            a tensor lies in memory as it lay in the file, and alignment may change rounding.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in stored.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = place(value, int(index))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def refuse_another_model(folder: Path, found: str, trained: str) -> None:
    """Refuse a checkpoint whose folder holds another model than the one that was trained.

    Raises:
        ValueError: It does.
    """
    if found != trained:
        raise ValueError(
            f"The checkpoint {folder} was trained on the model {trained}, and its folder policy "
            f"holds {found}. Put back the one that was written there."
        )


def content(value: Any) -> str:
    """Return a text of what a value holds, the same one in every process.

    It is ``repr``, but sets have an order in it, arrays are whole, and addresses are left out.
    """
    if value is None or isinstance(value, str | bytes | int | float):
        return repr(value)
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{content(value.tolist())}"
    if isinstance(value, list | tuple):
        return f"({','.join(map(content, value))})"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(map(content, value)))}}}"
    if dataclasses.is_dataclass(value):
        return content([getattr(value, f.name) for f in dataclasses.fields(value)])
    if getattr(type(value), "__repr__", None) is object.__repr__ and hasattr(value, "__dict__"):
        value = vars(value)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{content(k)}:{content(v)}' for k, v in value.items())}}}"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
