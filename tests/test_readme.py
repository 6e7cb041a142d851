"""What the README shows has to work as it stands there."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks import suites
from llm_envs.core import registration

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(part: str) -> str:
    [found] = [b for b in BLOCKS if part in b]
    return str(found)


@pytest.fixture
def registered() -> Iterator[None]:
    before = list(registration._IDS)
    yield
    for name in set(registration._IDS) - set(before):
        del gym.registry[name], gym.registry[f"llm_envs/{name}"]
    registration._IDS[:] = before


def test_the_example_runs_in_a_fresh_process(tmp_path: Path) -> None:
    code = block("agent.learn")
    assert len(code.strip().splitlines()) <= 20
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("User: ")


@pytest.mark.usefixtures("registered")
@pytest.mark.filterwarnings("error")
def test_the_added_environment_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = block("class Sums")
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    (tmp_path / "readme_sums.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    env = importlib.import_module("readme_sums").env
    check_env(env.unwrapped)
    observation, _ = env.reset(seed=0, options={"example": "2+0"})
    assert observation == "User: What is 2 + 0?\nAssistant:"
    _, reward, terminated, _, info = env.step("2")
    assert (reward, terminated, info["score"], info["feedback"]) == (1.0, True, 1.0, "Yes.")
    envs = gym.make_vec("Sums-v0", num_envs=4)
    envs.reset(seed=0)
    assert envs.step(["x"] * 4)[1].tolist() == [-1.0] * 4


def test_the_suite_is_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(block("SUITE = Suite("))
    runs = suites.load(str(tmp_path / "mine.py")).runs
    assert len(runs) == 2 * 2 * 5
    assert {run.settings["clip"] for run in runs} == {0.1, 0.4}


def test_paths_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:agents|scripts|llm_envs|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path
