"""Run folders that are written by hand, so that what they hold is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.runs import CONFIG_KEYS
from benchmarks.experiment import Run


def write_run(
    out: Path,
    run: Run,
    *,
    before: float = 0.25,
    after: float = 0.5,
    validations: Sequence[tuple[int, float]] = (),
    rows: Sequence[dict[str, Any]] = (),
    taken: int | None = None,
    settings: dict[str, Any] | None = None,
    transcripts: Sequence[dict[str, Any]] = (),
) -> Path:
    """Write the folder of a run that has taken so many steps (all, if not said otherwise)."""
    folder = out / run.name
    taken = run.steps if taken is None else taken
    config = dict.fromkeys(CONFIG_KEYS) | {
        **{name: getattr(run, name) for name in ("env", "agent", "seed", "steps", "report")},
        "env_kwargs": run.env_kwargs,
        "policy": run.policy or "tiny",
        "settings": {**run.settings, **(settings or {})},
    }
    metrics = [{"env_steps": s, "eval/score": v} for s, v in validations] + list(rows)
    metrics.sort(key=lambda row: row["env_steps"])
    scored = {
        when: {"split": run.report, "score": score, "parts": {"f1": score}, "ci95": [0.0, 1.0]}
        for when, score in (("before", before), ("after", after))
    }
    files: dict[str, str] = {
        "config.json": json.dumps(config),
        "checkpoints/last/state.json": json.dumps({"env_steps": taken}),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in metrics),
        "transcripts.jsonl": "".join(json.dumps(row) + "\n" for row in transcripts),
    }
    if run.report != "none" and taken >= run.steps:
        files["result.json"] = json.dumps(scored)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder
