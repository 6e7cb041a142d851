"""Keep the runs of a sweep in one small file: ``python -m benchmarks.pack runs/core core.tar.xz``.

It holds what ``benchmarks.report`` reads, so that every figure can be made again without a run:
configurations, metrics, results, and the transcripts that a report shows. Weights and logs are left
out, and so is the place where a run lay. The same runs make the same bytes.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from agents.checkpoints import checkpoint_folder
from agents.runs import write_bytes
from benchmarks.report import shown_episodes
from benchmarks.results import Outcome, read


@dataclass(frozen=True)
class Arguments:
    """What to keep, and where."""

    folder: tyro.conf.Positional[Path]
    """Folder of a sweep."""
    file: tyro.conf.Positional[Path]
    """The file, which tar unpacks: FILE.tar.xz."""


def files_of(outcome: Outcome) -> dict[str, bytes]:
    """Return the files of a finished run that a report reads, by their names in its folder."""
    folder, shown = outcome.folder, shown_episodes(outcome)
    last = checkpoint_folder(folder / "checkpoints" / "last")
    found = {
        "config.json": _json({**outcome.config, "out": f"runs/{folder.parent.name}/{folder.name}"}),
        "metrics.jsonl": (folder / "metrics.jsonl").read_bytes(),
        "transcripts.jsonl": b"".join(
            _json(row) for row in outcome.transcripts if row["example_id"] in shown
        ),
        "checkpoints/last/state.json": (last / "state.json").read_bytes(),
    }
    if outcome.result:
        found["result.json"] = (folder / "result.json").read_bytes()
    return found


def _json(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def pack(out: Path) -> bytes:
    """Return a compressed tar archive of the finished runs in a folder.

    Raises:
        ValueError: There is none.
    """
    done = [o for o in read(out) if o.state == "done"]
    if not done:
        raise ValueError(f"No run in {out} is finished. Let benchmarks.sweep end first.")
    members = {f"{o.folder.name}/{name}": data for o in done for name, data in files_of(o).items()}
    if (listed := out / "sweep.json").exists():
        members["sweep.json"] = listed.read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in sorted(members.items()):
            entry = tarfile.TarInfo(f"{out.resolve().name}/{name}")  # of nobody, from 1970
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return lzma.compress(buffer.getvalue(), preset=9)


def main() -> None:
    """Write the file, and tell its size."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.pack")
    try:
        packed = pack(a.folder)
        write_bytes(a.file, packed)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    Console().print(f"Written: {a.file}, {len(packed) / 1000:,.0f} kB", markup=False)


if __name__ == "__main__":
    main()
