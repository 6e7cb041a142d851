"""Many runs: one counts once all of it is there, and those in the queue end with the sweep."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from agents import train
from agents.baselines import Random
from benchmarks import ablation, compare
from benchmarks.experiment import Run, complete, finished, whole


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
    run = Run("DialogueQA-v0", "random", 1, 16, {"episodes": 4})
    env_kwargs = json.dumps({"dataset": str(place / "data.jsonl")})
    argv = [*run.command(place / "run", "test")[3:], "--env-kwargs", env_kwargs, *more]
    train.main([*argv, "--policy", "none", "--threads", "1"])
    return place / "run"


class Scripted(Run):
    """A run whose command is given."""

    script = "pass"

    def command(self, folder: Path, report: str) -> list[str]:
        return [sys.executable, "-c", self.script]


def scripted(number: int, script: str) -> Run:
    made = Scripted("env", "agent", number, 8)
    object.__setattr__(made, "script", script)
    return made


def copying(source: Path, target: Path) -> str:
    return f"import shutil; shutil.copytree({str(source)!r}, {str(target)!r}, dirs_exist_ok=True)"


def test_a_run_that_was_stopped_is_not_done(
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
    assert not whole(stopped)
    assert whole(ended)
    without = tmp_path / "without"
    shutil.copytree(ended, without)
    (without / "result.json").unlink()
    assert not whole(without)

    sources = {1: ended, 2: stopped, 3: without}
    out = tmp_path / "out"
    runs = [
        scripted(n, copying(source, out / f"env-agent-seed{n}")) for n, source in sources.items()
    ]
    folders = complete(runs, out, workers=3, report="test")
    assert [finished(folder) for folder in folders] == [True, False, False]
    assert [(folder / "done").exists() for folder in folders] == [True, False, False]


def test_an_exception_ends_the_queue(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    runs = [
        dataclasses.replace(scripted(1, "pass"), label="no/such/folder"),  # its log cannot be
        scripted(2, "import time; time.sleep(1)"),
        scripted(3, f"open({str(witness)!r}, 'w')"),
    ]
    with pytest.raises(FileNotFoundError):
        complete(runs, tmp_path / "out", workers=1, report="none")
    assert not witness.exists()


def test_tables_leave_out_what_is_not_whole(tmp_path: Path) -> None:
    a = compare.Arguments(out=tmp_path, envs=("DialogueQA-v0",), agents=("random",))
    assert "not run" in compare.markdown(a)
    for run in compare.runs_of("DialogueQA-v0", "random", a):
        (tmp_path / run.name).mkdir()
        (tmp_path / run.name / "done").touch()  # as older versions did after Ctrl-C
        assert ablation.last_score(tmp_path / run.name) == -math.inf
    assert "not run" in compare.markdown(a)
    reading = ablation.READINGS[0]
    for seed in (1, 2, 3):
        name = ablation.run_of(reading, "DialogueQA-v0", reading.rates[0], seed).name
        (tmp_path / name).mkdir()
        (tmp_path / name / "done").touch()
    rows = ablation.table(ablation.Arguments(out=tmp_path, envs=("DialogueQA-v0",)))
    assert {row["missing"] for row in rows} == {3}


def test_names_that_are_none_are_refused_before_any_run() -> None:
    with pytest.raises(ValueError, match=r"'pppo'.* Did you mean 'ppo'"):
        compare.Arguments(agents=("ppo", "pppo"))
    with pytest.raises(ValueError, match=r"'DialogQA-v0'.* Did you mean 'DialogueQA-v0'"):
        compare.Arguments(envs=("DialogQA-v0",))
