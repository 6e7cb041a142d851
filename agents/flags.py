"""What flags of several commands say, checked before any work."""

from __future__ import annotations

from llm_envs.core.make import parse_env_kwargs

__all__ = ["check_device", "parse_env_kwargs"]


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
