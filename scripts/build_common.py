"""What every builder of embedded data shares: checked inputs and reproducible outputs."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tempfile
from pathlib import Path


def sha256_of(data: bytes) -> str:
    """Returns the SHA-256 of `data` as 64 lowercase hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def verify(path: Path, sha256: str, source: str) -> None:
    """Refuses an input that is not, byte for byte, the one a builder was written for.

    Args:
        path: The input file.
        sha256: The SHA-256 recorded in the builder, 64 hexadecimal digits.
        source: Where the recorded file comes from, in words; it ends the error message.

    Raises:
        SystemExit: The file is missing or its hash differs. The message names both hashes.
    """
    if not path.is_file():
        raise SystemExit(f"There is no file {path}. It is expected to be {source}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{path} is not the file this builder was written for, so nothing was built.\n"
            f"  recorded SHA-256: {sha256}\n"
            f"  found SHA-256:    {found}\n"
            f"The recorded file is {source}. Its publisher has probably released a newer one.\n"
            "To rebuild the shipped data, fetch the recorded version. To move to the new one, "
            "record its hash in the builder, rebuild, and review the counts on the data's card."
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)  # mkstemp makes private files; data is shipped for all to read
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_gzip(path: Path, data: bytes) -> str:
    """Writes `data` gzipped, reproducibly and atomically, and prints both hashes.

    The content's hash is the one to compare across machines: zlib versions may pack the same
    content differently.

    Args:
        path: The file to write, by convention ending in `.gz`.
        data: The content, uncompressed.

    Returns:
        The SHA-256 of the compressed file.
    """
    buffer = io.BytesIO()
    # GzipFile, not gzip.compress: the latter's header names the operating system on Python 3.11.
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, compresslevel=9, mtime=0) as file:
        file.write(data)
    packed = buffer.getvalue()
    write_atomic(path, packed)
    digest = sha256_of(packed)
    print(f"{path}: {len(packed):,} bytes, {len(data):,} uncompressed")
    print(f"  SHA-256 of the file:    {digest}")
    print(f"  SHA-256 of its content: {sha256_of(data)}")
    return digest
