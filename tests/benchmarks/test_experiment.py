"""One run: what its command is, when it is finished, and that nobody trains beside another."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from agents import train
from agents.baselines import Random
from agents.runs import locked, write_json
from benchmarks import ablation
from benchmarks.experiment import (
    Run,
    Status,
    finished,
    last_words,
    log_file,
    make,
    read_status,
    refuse_another,
)
from benchmarks.suites import load
from benchmarks.suites.ablation import STEPS, TUNED
from benchmarks.sweep import Overview
from fake_runs import write_run


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that came to its end, with a result."""
    return trained(tmp_path_factory.mktemp("ended"))


def trained(place: Path, *more: str) -> Path:
    turns = [{"question": "Who?", "answers": ["I"]}]
    rows = [
        json.dumps({"id": split, "split": split, "passage": f"I {split}.", "turns": turns})
        for split in ("train", "validation", "test")
    ]
    (place / "data.jsonl").write_text("\n".join(rows))
    env_kwargs = {"dataset": str(place / "data.jsonl")}
    run = Run("DialogueQA-v0", "random", 1, 16, {"episodes": 4}, env_kwargs=env_kwargs)
    train.main([*run.command(place / "run")[3:], *more])
    return place / "run"


class Scripted(Run):
    """A run whose command is given."""

    script = "pass"

    def command(self, folder: Path, *, threads: int = 1, track: str = "jsonl") -> list[str]:
        return [sys.executable, "-c", self.script]


def scripted(number: int, script: str, **fields: Any) -> Run:
    made = Scripted("DialogueQA-v0", "random", number, 16, **fields)
    object.__setattr__(made, "script", script)
    return made


def copying(source: Path, target: Path) -> str:
    return f"import shutil; shutil.copytree({str(source)!r}, {str(target)!r}, dirs_exist_ok=True)"


def test_names_tell_variants_apart() -> None:
    plain = Run("DialogueQA-v0", "ppo", 3, 16)
    assert plain.name == "DialogueQA-v0-ppo-seed3"
    other = dataclasses.replace(plain, policy="models/Large", label="low")
    assert other.variant == "ppo-Large-low"
    assert other.name == "DialogueQA-v0-ppo-Large-low-seed3"
    assert dataclasses.replace(plain, env="my/Env-v0").name == "my-Env-v0-ppo-seed3"


def test_the_command_says_all_of_the_run(tmp_path: Path) -> None:
    run = Run(
        *("DialogueQA-v0", "ppo", 3, 16),
        {"clip": 0.1, "normalise_advantages": False},
        policy="models/large",
        env_kwargs={"max_turns": 2},
        report="validation",
    )
    words = run.command(tmp_path / "no", threads=2, track="wandb,jsonl")
    for flag, value in {
        "--env": "DialogueQA-v0",
        "--agent": "ppo",
        "--seed": "3",
        "--steps": "16",
        "--clip": "0.1",
        "--policy": "models/large",
        "--env-kwargs": '{"max_turns": 2}',
        "--report": "validation",
        "--threads": "2",
        "--track": "wandb,jsonl",
    }.items():
        assert words[words.index(flag) + 1] == value
    assert "--no-normalise-advantages" in words
    wide = Run("DialogueQA-v0", "sb3-ppo", 1, 16, {"hidden": (32, 16)}).command(tmp_path / "no")
    assert wide[-3:] == ["--hidden", "32", "16"]
    (tmp_path / "config.json").touch()
    assert run.command(tmp_path)[-2:] == ["--resume", str(tmp_path)]


def test_a_run_that_was_stopped_is_not_finished(
    tmp_path: Path, ended: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = Random.iterate, []

    def signalled(self: Any) -> Any:
        calls.append(0)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Random, "iterate", signalled)
        stopped = trained(tmp_path)  # and it ends as one does that came to its end
    assert not finished(stopped)
    assert finished(ended)
    without = tmp_path / "without"
    shutil.copytree(ended, without)
    (without / "result.json").unlink()
    assert not finished(without)


def test_what_became_of_a_run_is_told(tmp_path: Path, ended: Path) -> None:
    env_kwargs = json.loads((ended / "config.json").read_text())["env_kwargs"]
    whole = scripted(1, "", env_kwargs=env_kwargs)
    object.__setattr__(whole, "script", copying(ended, tmp_path / whole.name))
    told = make(whole, tmp_path, sweep="s")
    assert (told.state, told.sweep, told.attempts) == ("done", "s", 1)
    assert read_status(tmp_path, whole.name) == told
    assert "shutil.copytree" in log_file(tmp_path, whole.name).read_text()
    assert make(whole, tmp_path).attempts == 0, "what is finished was begun again"
    assert make(scripted(2, "pass"), tmp_path).state == "stopped"  # it ended well, before its end
    assert read_status(tmp_path, "no such run") == Status("waiting")


def test_a_run_that_fails_is_tried_again_and_keeps_what_it_said(tmp_path: Path) -> None:
    run = scripted(1, "raise SystemExit('no luck')")
    told = make(run, tmp_path, retries=2)
    assert (told.state, told.attempts) == ("failed", 3)
    assert log_file(tmp_path, run.name).read_text().count("\nno luck") == 3


def test_nobody_begins_where_another_trains(tmp_path: Path, ended: Path) -> None:
    """An orphan of a dead node goes on: its run is waited for, and not begun twice."""
    env_kwargs = json.loads((ended / "config.json").read_text())["env_kwargs"]
    run = scripted(1, "raise SystemExit('begun beside it')", env_kwargs=env_kwargs)
    folder = tmp_path / run.name
    folder.mkdir()
    code = (
        "import shutil, sys, time; from pathlib import Path; from agents.runs import locked\n"
        f"with locked(Path({str(folder)!r})):\n"
        "    print('locked', flush=True); time.sleep(2)\n"
        f"    {copying(ended, folder).removeprefix('import shutil; ')}"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as orphan:
        assert orphan.stdout is not None
        orphan.stdout.readline()
        with pytest.raises(ValueError, match="Another process"), locked(folder):
            pass
        told = make(run, tmp_path)
    assert told.state == "done"
    assert told.attempts == 0


def test_an_orphan_keeps_its_run_when_who_began_it_is_killed(tmp_path: Path) -> None:
    settings = {"eval_every": 0, "episodes": 8, "checkpoint_every": 1}
    run = Run("DialogueQA-v0", "random", 1, 3072, settings, report="none")
    code = (
        "import sys; from pathlib import Path; from benchmarks.experiment import Run, make\n"
        f"make({run!r}, Path({str(tmp_path)!r}))"
    )
    metrics = tmp_path / run.name / "metrics.jsonl"
    with subprocess.Popen([sys.executable, "-c", code]) as maker:
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        maker.kill()
    assert not finished(tmp_path / run.name)
    told = make(run, tmp_path, sweep="second")
    assert (told.state, told.attempts) == ("done", 0)
    assert log_file(tmp_path, run.name).read_text().count("$ ") == 1, "it was begun twice"


def test_who_waits_for_another_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    run = scripted(1, "pass")
    log_file(tmp_path, run.name).parent.mkdir()
    log_file(tmp_path, run.name).touch()
    stop = threading.Event()
    owner = Status("running", "owner", 1)
    write_json(log_file(tmp_path, run.name).with_suffix(".json"), dataclasses.asdict(owner))
    with locked(log_file(tmp_path, run.name)), ThreadPoolExecutor() as pool:
        waiting = {
            sweep: pool.submit(make, run, tmp_path, sweep=sweep, stop=stop) for sweep in "abc"
        }
        deadline = time.monotonic() + 30
        seen = {sweep: Overview([run], tmp_path, sweep) for sweep in waiting}
        while time.monotonic() < deadline:
            if all(o.state(run).state == "blocked" for o in seen.values()):
                break
            time.sleep(0.05)
        time.sleep(2.5)  # they look again every second, all at once
        assert [o.state(run).state for o in seen.values()] == ["blocked"] * 3
        stop.set()
        assert [w.result(timeout=30).state for w in waiting.values()] == ["stopped"] * 3
    assert read_status(tmp_path, run.name) == owner, "who waits has nothing to say of the run"
    assert [o.state(run).state for o in seen.values()] == ["waiting"] * 3


def test_what_is_told_to_stop_before_it_listens_is_not_tried_again(tmp_path: Path) -> None:
    """While Python imports, Ctrl-C ends it with another status than once it trains."""
    run = scripted(1, "import time; time.sleep(60)")
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        making = pool.submit(make, run, tmp_path, retries=3, stop=stop)
        while not log_file(tmp_path, run.name).exists():
            time.sleep(0.05)
        time.sleep(1)
        stop.set()
        told = making.result(timeout=30)
    assert (told.state, told.attempts) == ("stopped", 1)
    again = make(run, tmp_path, stop=stop)
    assert (again.state, again.attempts) == ("stopped", 0)


def test_the_last_words_of_a_run_are_why_it_failed(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert last_words(log) == ["its log is not there"]
    log.write_text("$ first\nold trouble\n$ second\nthe loss is nan\nTo go on:\n  python -m x\n")
    assert last_words(log, 1) == ["the loss is nan"]
    log.write_text("$ first\n")
    assert last_words(log) == ["it said nothing"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 32}, "steps 16"),
        ({"settings": {"clip": 0.1}}, "clip 0.2"),
        ({"env_kwargs": {"max_turns": 1}}, "env_kwargs {}"),
        ({"policy": "models/large"}, "policy 'tiny'"),
        ({"report": "none"}, "report 'test'"),
        ({"seed": 2}, "seed 1"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run = Run("DialogueQA-v0", "ppo", 1, 16, {"clip": 0.2})
    folder = write_run(tmp_path, run)
    refuse_another(run, folder)
    refuse_another(dataclasses.replace(run, env="llm_envs:DialogueQA-v0"), folder)
    with pytest.raises(ValueError, match="Choose another folder with --out") as caught:
        refuse_another(dataclasses.replace(run, **change), folder)
    assert named in str(caught.value)


def test_the_ablation_leaves_out_what_is_not_whole(tmp_path: Path) -> None:
    reading = next(iter(TUNED))
    rates = ablation.rates_of(reading)
    a = ablation.Arguments(out=tmp_path, envs=("DialogueQA-v0",))
    for seed in (1, 2, 3):
        run = ablation.tried(reading, "DialogueQA-v0", rates[0], seed)
        write_run(tmp_path, run, validations=[(0, 0.2), (4, 0.3)], taken=4)
    assert {row["missing"] for row in ablation.table(a)} == {3}
    for seed in (1, 2):
        run = ablation.tried(reading, "DialogueQA-v0", rates[1], seed)
        write_run(tmp_path, run, validations=[(0, 0.2), (run.steps, 0.2 + seed / 10)])
    assert ablation.best_rate(reading, "DialogueQA-v0", a, ablation.outcomes(tmp_path)) == rates[1]
    row = ablation.table(a)[0]
    assert (row["gains"], row["missing"]) == (pytest.approx([0.1, 0.2]), 1)


def test_the_ablation_reads_the_runs_of_its_suite_and_makes_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every run of the suite, 135, is found; only the other learning rates are left to be tried."""
    for run in load("ablation").runs:
        write_run(tmp_path, run, validations=[(0, 0.2), (run.steps, 0.2 + run.seed / 10)])
    a = ablation.Arguments(out=tmp_path)
    for row in ablation.table(a):
        assert (row["gains"], row["missing"]) == (pytest.approx([0.1, 0.2, 0.3]), 0)
    todo: list[Run] = []
    monkeypatch.setattr(ablation, "sweep", lambda suite, *_: todo.extend(suite.runs))
    ablation.run_all(a)
    rates = {run.settings["learning_rate"] for run in todo}
    assert len(todo) == len(TUNED) * len(STEPS) * 2, "two other rates of each, with seed 1"
    assert len(rates) > 2
    assert {run.seed for run in todo} == {1}


def test_an_environment_that_is_not_ablated_is_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'Summarization-v0'"):
        ablation.Arguments(envs=("Sumarization-v0",))
