"""What the tests of the agents share."""

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from three_tokens import TASKS, task_fixture


def _wandb_records(path: Path) -> Iterator[Any]:
    """Read a ``.wandb`` file, a LevelDB-style log, without W&B's own reader.

    After a header of 7 bytes come blocks of 32 KiB. A block is a row of fragments (CRC-32 of type
    and data, uint16 length, uint8 type, data), its last bytes are padding if no fragment fits. A
    record is one fragment of type 1, or one of type 2, any number of 3, and one of 4.

    Yields:
        One ``wandb.proto.wandb_internal_pb2.Record`` after the other, as they were written.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, at)
        fragment = data[at + 7 : at + 7 + length]
        assert zlib.crc32(data[at + 6 : at + 7 + length]) == crc, f"damaged at byte {at}"
        at += 7 + length
        record = fragment if kind in (1, 2) else record + fragment
        if kind in (1, 4):
            yield Record.FromString(record)


@pytest.fixture(scope="session")
def read_wandb() -> Callable[[Path], list[Any]]:
    """The function that gives all records of a ``.wandb`` file."""
    return lambda path: list(_wandb_records(path))


three_token_tasks = task_fixture(TASKS, autouse=False)
