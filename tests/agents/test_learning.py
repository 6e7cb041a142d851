"""What the README promises of learning, run again: minutes each, `scripts/test -m slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents import train


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("env", "steps", "least"),
    [
        ("DialogueQA-v0", 4_096, 0.2),
        ("Summarization-v0", 1_536, 0.0),
        ("RecommendationClicks-v0", 2_048, 0.0),
    ],
)
def test_the_embedded_model_learns_by_immediate_reward(
    tmp_path: Path, env: str, steps: int, least: float, seed: int
) -> None:
    out = tmp_path / "run"
    arguments = f"--env {env} --seed {seed} --steps {steps} --report validation --track jsonl"
    train.main([*arguments.split(), "--quiet", "--out", str(out)])
    gain = json.loads((out / "result.json").read_text())["gain"]
    assert gain["score"] >= least
    assert gain["ci95"][0] > 0
