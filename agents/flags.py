"""What flags of several commands say, checked before any work."""

from __future__ import annotations

import json
from typing import Any


def check_device(device: str) -> None:
    """Refuse a device that cannot be computed on.

    Args:
        device: What --device says; ``"auto"`` is always right.

    Raises:
        ValueError: It cannot.
    """
    if device == "auto":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(
            f"--device {device} cannot be used here ({cause}). Use auto, or cpu."
        ) from error


def parse_env_kwargs(text: str) -> dict[str, Any]:
    """Return the arguments of an environment that --env-kwargs gives as JSON.

    Raises:
        ValueError: It is no JSON object.
    """
    like = "like '{\"max_turns\": 2}', in single quotes for the shell"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON ({error}): {text}. Write it {like}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--env-kwargs is {text}; it has to be a JSON object of names and values, {like}."
        )
    return found
