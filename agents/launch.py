"""How a command begins and fails, also where torchrun starts many; imports no torch by itself."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NoReturn

from rich.console import Console

from llm_envs.core.rendering import printable


def processes() -> int:
    """Return how many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def tells() -> bool:
    """Whether this process is the one that shows help, before the others are known."""
    return processes() == 1 or os.environ.get("RANK") == "0"


def speaks_first() -> bool:
    """Whether no other process has asked this before: what all of them know is told once."""
    if processes() == 1:
        return True
    import torch

    try:
        store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        return store.add(f"llm_envs/spoke/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (RuntimeError, KeyError):  # rank 0 kept the store, and is gone
        return True


def fail(message: str, error: BaseException, *, code: int = 2) -> NoReturn:
    """End the command with a sentence, which one process says for all.

    Args:
        message: The sentence.
        error: What it comes from.
        code: Exit status.
    """
    if speaks_first():
        Console(stderr=True).print(
            printable(message), style="red", markup=False, highlight=False, soft_wrap=True
        )
    raise SystemExit(code) from error
