"""Do a failed update again: ``python -m agents.replay RUN/failed``.

A run whose reward, loss or gradient is not finite stops and leaves there the agent as it was then
and the batch that it was learning from. In Python, :func:`failed_update` gives both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from agents.base import Agent
from agents.batches import read_batch
from agents.checkpoints import checkpoint_folder
from agents.registry import agent_class


def failed_update(folder: str | Path, *, device: str = "auto") -> tuple[Agent[Any], Any]:
    """Return the agent and the batch of an update that failed.

    ``agent.learn_from(batch)`` does it again. The batch is ``None`` if it failed while it was
    played, or of an agent that learns while it plays; then ``agent.iterate()`` does.

    Raises:
        ValueError: The folder holds no failed update, a damaged one, or one whose agent cannot be
            loaded here.
        ImportError: The agent needs a package that is missing.
    """
    folder = checkpoint_folder(folder, "agent/state.json")
    try:
        state = json.loads((folder / "agent" / "state.json").read_text(encoding="utf-8"))
        agent = agent_class(state["agent"]).load(folder / "agent", device=device)
        return agent, read_batch(folder)
    except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(
            f"The failed update in {folder} is damaged ({type(error).__name__}: {error}), or "
            "another version of llm-envs wrote it. Let the run fail again: --resume goes on from "
            "its last checkpoint."
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    """Do the failed update again and say what came of it."""
    words = sys.argv[1:] if argv is None else argv
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return
    if len(words) != 1 or words[0].startswith("-"):
        raise SystemExit(f"{__doc__}")
    try:
        agent, batch = failed_update(words[0])
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error
    try:
        metrics = agent.iterate() if batch is None else agent.learn_from(batch)
    except FloatingPointError as error:
        raise SystemExit(f"It fails again: {error}") from error
    print("It does not fail here:", json.dumps(metrics))


if __name__ == "__main__":
    main()
