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

    row, *_ = robustness.differences(ENV, "chosen", found).rows
    assert row[:4] == ("reinforce − clean", "", "–", "–")
    # Welch (1947): variances of the means add up, degrees of freedom by Satterthwaite.
    clean, wrong = 0.1**2 / 3, (0.1**2 + 0.3**2 + 0.2**2) / 2 / 3
    deviation = (clean + wrong) ** 0.5
    degrees = (clean + wrong) ** 2 / (clean**2 / 2 + wrong**2 / 2)
    half, p = t.ppf(0.975, degrees) * deviation, 2 * t.sf(0.1 / deviation, degrees)
    assert row[4] == f"-0.100 [{-0.1 - half:+.3f}, {-0.1 + half:+.3f}], p {p:.2g}"

    picture = tmp_path / "picture.png"
    monkeypatch.setattr(
        sys, "argv", ["robustness", "--out", str(tmp_path), "--figure", str(picture)]
    )
    robustness.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert row[4] in printed
    assert "(0.200, 0.250, 0.450)" in printed, "what it ended with"


def test_help_is_compared_to_none_under_the_same_condition() -> None:
    found = {}
    for player, condition, score in (
        (REINFORCE, "clean", 0.7),
        (REINFORCE, "delay1", 0.4),
        (PLAYERS[ENV][5], "clean", 0.6),
        (PLAYERS[ENV][5], "delay1", 0.6),
    ):
        for seed in (1, 2, 3):
            found[run_of(ENV, player, condition, seed).name] = score
    rows = {row[0]: row[1:] for row in robustness.differences(ENV, "chosen", found).rows}
    assert rows["reinforce − clean"] == ("", "–", "–", "–", "-0.300")
    assert rows["reinforce, returns − reinforce"] == ("-0.100", "", "", "", "+0.200")
