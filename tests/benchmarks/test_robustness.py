"""The robustness study: what it runs, and the table and figure of what came of it."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import pytest
from scipy.stats import t

import llm_envs  # noqa: F401 (registers the environments)
from benchmarks import robustness
from benchmarks.results import read
from benchmarks.suites.robustness import CONDITIONS, PLAYERS, SUITE, Player, run_of
from fake_runs import write_run

ENV = "DialogueQA-v0"
REINFORCE = Player("reinforce", "reinforce")


def test_only_feedback_and_help_tell_the_runs_of_an_agent_apart() -> None:
    names = {run.name for run in SUITE.runs}
    clean = run_of(ENV, REINFORCE, "clean", 1)
    wrong = run_of(ENV, REINFORCE, "flip20", 1)
    assert {clean.name, wrong.name} <= names
    assert (clean.env_kwargs, wrong.env_kwargs) == ({}, {"feedback": {"flip": 0.2}})
    assert (clean.settings, clean.steps, clean.seed) == (wrong.settings, wrong.steps, wrong.seed)
    assert all(run.report == "test" for run in SUITE.runs)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_environments_know_the_conditions(condition: str) -> None:
    run = run_of(ENV, REINFORCE, condition, 1)
    env = gym.make(run.env, **run.env_kwargs)
    env.reset(seed=1)
    assert ("clean_reward" in env.step("unknown")[4]) == (condition != "clean")


def test_table_and_chart_have_each_players_mean_and_interval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"clean": (0.6, 0.7, 0.8), "flip40": (0.4, 0.5, 0.9)}
    for condition, scores in told.items():
        for seed, score in enumerate(scores, 1):
            run = run_of(ENV, REINFORCE, condition, seed)
            looks = [(0, 0.2), (run.steps // 2, score), (run.steps, score / 2)]
            write_run(tmp_path, run, after=score, validations=looks)
    cut = run_of(ENV, REINFORCE, "flip10", 1)
    write_run(tmp_path, cut, after=0.1, taken=cut.steps - 1)
    found = {o.run.name: o.score for o in read(tmp_path) if o.score is not None}

    (line,) = robustness.falling(ENV, found).series
    assert (line.name, list(line.x)) == ("reinforce", [0.0, 40.0])
    assert line.y == pytest.approx([0.7, 0.6])
    half = t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert line.low is not None
    assert line.low[0] == pytest.approx(0.7 - half)

    row, *others = robustness.side_by_side(ENV, "chosen", found).rows
    assert row[0] == "reinforce"
    assert row[1].startswith("0.700 [")
    assert row[2] == row[3] == "–"  # one run was cut, others are missing
    assert row[4].endswith("(0.400, 0.500, 0.900)")
    assert len(others) == len(PLAYERS[ENV]) - 1

    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["robustness", "--out", str(tmp_path), "--figure", str(picture)]
    )
    robustness.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert row[4] in printed
    assert "(0.200, 0.250, 0.450)" in printed, "what it ended with"
