"""The folder of a run: what it holds, and how it is checked before any work is done."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

CONFIG_KEYS: Final = frozenset(
    "agent device env env_kwargs out policy report samples seed settings steps track".split()
)
"""What ``config.json`` holds at least."""

_OTHER_WAY: Final = "A new run can start from its weights: --policy RUN/checkpoints/best/policy."


def make(folder: Path) -> bool:
    """Make a run folder; return whether there was none.

    Raises:
        OSError: It cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        if folder.is_dir():
            return False
        raise _unwritable(folder, error) from error
    return True


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"The run folder {folder} cannot be written ({error.strerror or error}). Nothing was "
        "trained. Choose another one with --out (a run to resume can be moved as a whole)."
    )


def prepare(folder: Path, *, needed_bytes: int) -> Path:
    """Make a run folder, sure that it can be written and has room.

    Raises:
        OSError: It cannot be written, or the disk is too full.
    """
    make(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise _unwritable(folder, error) from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"The disk of {folder} has {free / 2**20:,.0f} MiB free, and a run needs about "
            f"{needed_bytes / 2**20:,.0f} MiB. Nothing was trained. Free some, or choose another "
            "folder with --out (a run to resume can be moved as a whole)."
        )
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Keep other processes off a run folder, or a file.

    The lock is the operating system's and ends with the process, however that ends: none is left
    behind. Where there are no such locks (Windows, some network file systems) nothing is locked.

    Yields:
        The open file that holds the lock: a child process that has it, too, keeps the lock.

    Raises:
        ValueError: Another process trains in the folder.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is training in the run folder {folder} just now. Wait until it "
                "has ended, or stop it with Ctrl-C, which saves; then --resume goes on."
            ) from error
        except OSError:
            pass
        yield handle
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything that follows."""
    if os.name == "nt":
        return  # it does not sync what is open for reading only
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash or a power failure leaves the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(data)
    sync(temporary)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def append(file: io.FileIO, data: bytes) -> None:
    """Write bytes at the end of a file, straight to the operating system.

    Raises:
        OSError: They cannot be written; then none of them is left in the file.
    """
    begin = file.seek(0, os.SEEK_END)
    try:
        while data:
            data = data[file.write(data) :]
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(begin)
        raise


def plain(value: Any) -> Any:
    """Return ``value`` as strict JSON holds it: no NaN, no lone surrogate, text keys."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {plain(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return plain(str(value))


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whatever happens meanwhile, as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of the run in a folder.

    Raises:
        ValueError: The folder holds no run, or its configuration is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a run: it holds no config.json. Name the run folder that training "
            "printed when it began."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {_OTHER_WAY}") from error
    missing = CONFIG_KEYS - config.keys() if isinstance(config, dict) else CONFIG_KEYS
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}. {_OTHER_WAY}")
    return config  # type: ignore[no-any-return]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read ``metrics.jsonl``; a line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def plot_curve(metrics: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the learning curve: scores of the rollouts and on the validation split."""
    from matplotlib.figure import Figure

    def series(name: str) -> tuple[list[int], list[float]]:
        found = [(m["env_steps"], m[name]) for m in metrics if m.get(name) is not None]
        return [s for s, _ in found], [v for _, v in found]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, scores = series("rollout/score")
    axes.plot(steps, scores, color="#9ecae1", linewidth=1, label="rollouts (training, sampled)")
    if len(scores) >= 5:
        window = max(3, len(scores) // 20)
        smooth = np.convolve(scores, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color="#3182bd", label=f"their mean over {window}")
    steps, scores = series("eval/score")
    axes.plot(steps, scores, "o-", color="#e6550d", label="validation (greedy)")
    axes.set(xlabel="environment steps (answers given)", ylabel="score", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    temporary = path.with_name("new-" + path.name)
    figure.savefig(temporary, dpi=144)
    os.replace(temporary, path)
