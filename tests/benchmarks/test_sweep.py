"""A sweep: what is missing is made, what fails is told, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents.runs import read_metrics
from benchmarks import suites
from benchmarks.experiment import Run, Status, finished, log_file
from benchmarks.suites import Suite, grid
from benchmarks.sweep import (
    Options,
    Overview,
    _keep_list,
    chosen,
    locally,
    main,
    on_ray,
    read_suite,
    sweep,
)
from fake_runs import write_run

ENVS = {"DialogueQA-v0": 32}
QUICK = {"eval_every": 0, "episodes": 16}


def quick(seeds: tuple[int, ...], **fields: Any) -> tuple[Run, ...]:
    """Runs of a second or two."""
    return grid(ENVS, ("random",), seeds, variants={"": QUICK}, report="none", **fields)


def quietly() -> Console:
    return Console(file=open(os.devnull, "w"))


# --- suites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suites.SHIPPED)
def test_shipped_suites_are_the_same_each_time(name: str) -> None:
    suite = suites.load(name)
    assert suite.runs == suites.load(name).runs
    assert len({run.name for run in suite.runs}) == len(suite.runs)
    assert [run.seed for run in suite.runs] == sorted(run.seed for run in suite.runs)


def test_core_plays_every_agent_where_it_can() -> None:
    from agents.registry import AGENTS, agents_for

    runs = suites.load("core").runs
    assert {run.agent for run in runs} == set(AGENTS)
    for env in ("DialogueQA-v0", "Summarization-v0"):
        assert {r.agent for r in runs if r.env == env} == set(agents_for("writing"))
    choosing = {r.agent for r in runs if r.env == "RecommendationClicks-v0"}
    assert choosing == set(agents_for("choosing"))


def test_a_grid_is_every_combination() -> None:
    runs = grid({"a": 1, "b": 2}, ("ppo", "grpo"), (1, 2), policies=("", "m"), variants={"x": {}})
    assert len(runs) == 16
    assert runs[0] == Run("a", "ppo", 1, 1, {}, "x", "")
    assert {run.steps for run in runs if run.env == "b"} == {2}


def test_suites_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    run = Run("DialogueQA-v0", "ppo", 1, 8)
    with pytest.raises(ValueError, match="has no runs"):
        Suite("s", "", ())
    with pytest.raises(ValueError, match=r"2 runs of the name .*Give variants different labels"):
        Suite("s", "", (run, replace(run, steps=9)))
    with pytest.raises(ValueError, match=r"'pppo'.* Did you mean 'ppo'"):
        Suite("s", "", (replace(run, agent="pppo"),))
    with pytest.raises(ValueError, match="becomes a part of a folder's name"):
        Suite("s", "", (replace(run, label="a/b"),))
    with pytest.raises(ValueError, match="that are not JSON"):
        Suite("s", "", (replace(run, env_kwargs={"dataset": tmp_path}),))
    with pytest.raises(ValueError, match=r"'klip'.* Did you mean 'clip'"):
        Suite("s", "", (replace(run, settings={"klip": 0.1}),))
    with pytest.raises(ValueError, match=r"'smok'.* Did you mean 'smoke'"):
        suites.load("smok")
    with pytest.raises(ValueError, match="There is no file"):
        suites.load(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("SUITE = 1")
    with pytest.raises(ValueError, match="needs a line SUITE"):
        suites.load(str(tmp_path / "mine.py"))


def test_a_suite_of_ones_own_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from benchmarks.suites import Suite, grid\n"
        "SUITE = Suite('mine', 'why', grid({'DialogueQA-v0': 8}, ('ppo',), (1,)))"
    )
    assert suites.load(str(tmp_path / "mine.py")).runs == (Run("DialogueQA-v0", "ppo", 1, 8),)


def test_options_narrow_a_suite_and_refuse_what_it_does_not_have() -> None:
    suite = suites.load("core")
    runs = chosen(suite, Options(agents=("ppo",), envs=("DialogueQA-v0",), seeds=(2,)))
    assert [run.name for run in runs] == ["DialogueQA-v0-ppo-seed2"]
    with pytest.raises(ValueError, match=r"no agent 'pppo'.*Did you mean 'ppo'"):
        chosen(suite, Options(agents=("pppo",)))
    with pytest.raises(ValueError, match="no seed 9"):
        chosen(suite, Options(seeds=(9,)))
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        Options(track="wandb")


# --- here ----------------------------------------------------------------------------------------


def test_what_is_missing_is_made_and_a_failure_stops_nobody(tmp_path: Path) -> None:
    good = quick((1, 2))
    bad = replace(good[0], label="bad", env_kwargs={"dataset": "no/such/file.jsonl"})
    suite = Suite("s", "why", (good[0], bad, good[1]))
    options = Options(out=tmp_path, workers=2, retries=0)
    ended = sweep(suite, options, quietly())
    assert {run: status.state for run, status in ended.items()} == {
        good[0]: "done",
        bad: "failed",
        good[1]: "done",
    }
    assert "no/such/file.jsonl" in log_file(tmp_path, bad.name).read_text()
    listed = read_suite(tmp_path)
    assert listed is not None
    assert (listed.name, listed.about, listed.runs) == ("s", "why", suite.runs)
    before = {run: log_file(tmp_path, run.name).read_text() for run in good}
    again = sweep(Suite("t", "", good), options, quietly())
    assert all(status.state == "done" for status in again.values())
    assert {run: log_file(tmp_path, run.name).read_text() for run in good} == before
    kept = read_suite(tmp_path)
    assert kept is not None
    assert set(kept.runs) == set(suite.runs), "what an earlier sweep was to make was forgotten"


def test_a_folder_of_another_run_is_refused_before_anything_runs(tmp_path: Path) -> None:
    first, second = quick((1, 2))
    write_run(tmp_path, replace(second, steps=64))
    with pytest.raises(ValueError, match="holds a run with steps 64"):
        sweep(Suite("s", "", (first, second)), Options(out=tmp_path), quietly())
    assert not (tmp_path / first.name).exists()


def test_two_sweeps_at_once_make_every_run_once(tmp_path: Path) -> None:
    suite = tmp_path / "mine.py"
    suite.write_text(
        "from benchmarks.suites import Suite, grid\n"
        "SUITE = Suite('mine', '', grid({'DialogueQA-v0': 32}, ('random',), (1, 2),"
        " variants={'': {'eval_every': 0}}, report='none'))"
    )
    command = [sys.executable, "-m", "benchmarks.sweep", "--suite", str(suite)]
    command += ["--out", str(tmp_path / "out"), "--workers", "2", "--retries", "0"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(180) for process in both] == [0, 0]
    for run in suites.load(str(suite)).runs:
        assert finished(tmp_path / "out" / run.name)
        assert log_file(tmp_path / "out", run.name).read_text().count("$ ") == 1


def test_the_command_tells_what_failed_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "mine.py"
    suite.write_text(
        "from benchmarks.suites import Suite, grid\n"
        "SUITE = Suite('mine', '', grid({'DialogueQA-v0': 32}, ('random',), (1,),"
        " env_kwargs={'dataset': 'no/such/file.jsonl'}))"
    )
    argv = ["sweep", "--suite", str(suite), "--out", str(tmp_path / "out"), "--retries", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 1
    printed = capsys.readouterr().out.replace("\n", "")
    assert "0 of 1 runs done" in printed
    assert "failed after 1 attempts" in printed
    assert "no/such/file.jsonl" in printed
    monkeypatch.setattr(sys, "argv", [*argv, "--dry-run"])
    main()
    assert "missing" in capsys.readouterr().out


def test_an_exception_ends_the_queue() -> None:
    made, stop = [], threading.Event()

    def breaking(run: Run) -> Status:
        made.append(run)
        raise OSError("the disk is full")

    runs = quick((1, 2, 3, 4))
    with pytest.raises(OSError, match="disk is full"):
        list(locally(runs, breaking, 1, stop))
    assert len(made) < 4
    assert stop.is_set(), "those under way were not told"


@pytest.fixture
def hearing() -> Iterator[None]:
    """Processes that are begun here hear SIGINT, wherever the tests run: in the background of a
    shell they would inherit its being ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hearing")
@pytest.mark.parametrize("way", ["of a terminal", pytest.param("by kill", marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path: Path, way: str) -> None:
    suite = tmp_path / "mine.py"
    suite.write_text(
        "from benchmarks.suites import Suite, grid\n"
        "SUITE = Suite('mine', '', grid({'DialogueQA-v0': 2048}, ('random',), (1,),"
        " variants={'': {'eval_every': 0, 'episodes': 8, 'checkpoint_every': 1}}, report='none'))"
    )
    command = [sys.executable, "-m", "benchmarks.sweep", "--suite", str(suite)]
    command += ["--out", str(tmp_path / "out"), "--workers", "1"]
    name = suites.load(str(suite)).runs[0].name
    metrics = tmp_path / "out" / name / "metrics.jsonl"
    with subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        if way == "by kill":
            process.terminate()
        else:
            os.killpg(process.pid, signal.SIGINT)  # to all processes of its group
        assert process.wait(60) == 1
    assert not finished(tmp_path / "out" / name)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert finished(tmp_path / "out" / name)
    steps = [row["env_steps"] for row in read_metrics(metrics)]
    assert steps == sorted(set(steps)), "a row was logged twice"
    log = log_file(tmp_path / "out", name).read_text()
    assert log.count("$ ") == 2
    assert "--resume" in log
    assert "Stopped and saved" in log


# --- the overview --------------------------------------------------------------------------------


def test_the_overview_counts_and_guesses_the_time_left(tmp_path: Path) -> None:
    runs = quick((1, 2, 3, 4))
    overview = Overview(runs, tmp_path, "ours")
    assert overview.line() == "0 of 4 runs done"
    assert overview.seconds_left() is None
    overview.ended[runs[0]] = Status("done", "ours", 1, 120.0)
    overview.ended[runs[1]] = Status("failed", "ours", 2, 1.0)
    write_run(tmp_path, runs[2], taken=16, rows=[{"env_steps": 16, "rollout/score": 0.5}])
    log_file(tmp_path, "x").parent.mkdir()
    told = {"state": "running", "sweep": "ours", "attempts": 1, "seconds": 0.0}
    log_file(tmp_path, runs[2].name).with_suffix(".json").write_text(json.dumps(told))
    # One has half of its 120 seconds before it, one all of them, and one goes on at a time.
    assert overview.seconds_left() == pytest.approx(180)
    assert overview.line() == "1 of 4 runs done, 1 running, 1 failed, about 3 min left"
    other = Overview(runs, tmp_path, "another sweep")
    assert other.state(runs[2]).state == "waiting", "it runs for somebody else, or is dead"
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(overview)
    shown = console.export_text()
    assert f"failed: {runs[1].name}" in shown
    assert "16/32" in shown


# --- Ray -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_every_run_is_made_once(tmp_path: Path) -> None:
    """Three nodes, one of which is killed while its runs are under way."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    settings = {"eval_every": 0, "episodes": 8, "checkpoint_every": 1}
    runs = grid(
        {"DialogueQA-v0": 4096}, ("random",), (1, 2, 3, 4), variants={"": settings}, report="none"
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    doomed, _ = cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        unfinished = []

        def kill() -> None:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                if all((tmp_path / r.name / "metrics.jsonl").exists() for r in runs):
                    break
                time.sleep(0.1)
            unfinished.extend(r for r in runs if not finished(tmp_path / r.name))
            cluster.remove_node(doomed, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        options = Options(out=tmp_path, launcher="ray")
        ended = sweep(Suite("s", "", runs), options, quietly())
        killer.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len(unfinished) > 2, "the node died after its runs had ended"
    assert {status.state for status in ended.values()} == {"done"}
    assert all(finished(tmp_path / run.name) for run in runs)
    for run in runs:
        rows = read_metrics(tmp_path / run.name / "metrics.jsonl")
        steps = [row["env_steps"] for row in rows]
        assert steps == sorted(set(steps)), "a part of a run was made twice"
        assert steps[-1] == 4096


@pytest.mark.slow
def test_ray_on_this_machine_makes_runs_and_tells_failures(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    good = quick((1,))[0]
    bad = replace(good, label="bad", env_kwargs={"dataset": "no/such/file.jsonl"})
    options = Options(out=tmp_path, launcher="ray", retries=0)
    ended = sweep(Suite("s", "", (good, bad)), options, quietly())
    assert {run: status.state for run, status in ended.items()} == {good: "done", bad: "failed"}


@pytest.mark.slow
def test_a_share_that_no_node_has_is_refused_here_and_warned_of_on_a_cluster(
    tmp_path: Path,
) -> None:
    ray = pytest.importorskip("ray")
    options = Options(out=tmp_path, launcher="ray", gpus_per_run=999)
    with pytest.raises(ValueError, match="999 GPU, and the largest node has"):
        list(on_ray((), lambda run: Status("done"), options))
    ray.init(num_cpus=1, log_to_driver=False)  # a cluster of somebody else's
    try:
        with pytest.warns(UserWarning, match="wait until a node joins"):
            list(on_ray((), lambda run: Status("done"), options))
    finally:
        ray.shutdown()


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    suite = Suite("s", "", quick((1,)))
    with pytest.raises(ImportError, match=r"llm-envs\[ray\]"):
        sweep(suite, Options(out=tmp_path / "out", launcher="ray"), quietly())
    assert not (tmp_path / "out").exists()


def test_what_was_to_be_run_is_listed_in_the_order_of_the_suite(tmp_path: Path) -> None:
    runs = grid({"DialogueQA-v0": 8}, ("ppo", "grpo", "rloo"), (1,))
    other = Suite("other", "", grid({"DialogueQA-v0": 8}, ("random",), (1,)))
    suite = Suite("mine", "", runs)
    _keep_list(other, other.runs, tmp_path)
    _keep_list(suite, runs[2:], tmp_path)
    _keep_list(suite, runs[:2], tmp_path)
    listed = read_suite(tmp_path)
    assert listed is not None
    assert listed.runs == (*runs, *other.runs)
