"""TensorBoard: what it shows is what was logged, whatever happens in between."""

import math
import random
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from agents.tracking import METRICS, Tracker
from agents.tracking_tensorboard import TensorBoardLog

Rows = list[tuple[int, dict[str, float]]]

ABOUT: dict[str, Any] = {
    "config": {}, "env_id": "DialogueQA-v0", "agent": "ppo", "name": "run", "progress": False,
}  # fmt: skip


def tracker(folder: Path, **changes: Any) -> Tracker:
    return Tracker(folder, **{"backends": ("tensorboard",), **ABOUT, **changes})


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Give what TensorBoard shows of a run: metric -> (step, value) in order."""
    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={SCALARS: 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()[SCALARS]
    }


def expected(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in rows:
        for name, value in metrics.items():
            found.setdefault(name, []).append((step, float(np.float32(value))))
    return found


def some_rows(updates: int, seed: int) -> Rows:
    """Rows as training logs them: an update, and now and then an evaluation behind it."""
    r = random.Random(seed)
    rows: Rows = [(0, {"eval/score": r.random()})]
    for i in range(1, updates + 1):
        rows.append((32 * i, {name: r.gauss(0, 1e3) for name in METRICS if name != "eval/score"}))
        if i % 3 == 0:
            rows.append((32 * i, {"eval/score": r.random(), "eval/f1": r.random()}))
    return rows


def log_all(t: Tracker, rows: Rows) -> None:
    for step, metrics in rows:
        t.log(metrics, env_steps=step)


def test_it_shows_every_metric_by_its_name_against_environment_steps(tmp_path: Path) -> None:
    rows = some_rows(10, seed=0)
    with tracker(tmp_path) as t:
        for i in range(len(rows)):
            log_all(t, rows[i : i + 1])
            assert shown(tmp_path) == expected(rows[: i + 1])  # at once, not when the run ends
    assert METRICS.keys() < shown(tmp_path).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def test_numbers_that_are_not_finite_are_shown_as_they_are(tmp_path: Path) -> None:
    with tracker(tmp_path) as t:
        t.log({"train/loss": math.nan, "train/kl": math.inf}, env_steps=1)
    found = shown(tmp_path)
    assert math.isnan(found["train/loss"][0][1])
    assert found["train/kl"] == [(1, math.inf)]


def test_a_resumed_run_is_shown_once(tmp_path: Path) -> None:
    rows = some_rows(12, seed=1)
    at = [i for i, (step, _) in enumerate(rows, 1) if step <= 32 * 6][-1]
    with tracker(tmp_path) as t:
        log_all(t, rows[:at])
        state = t.state()
        log_all(t, some_rows(12, seed=2)[at:])  # after the checkpoint: lost in a crash
    [file] = (tmp_path / "tensorboard").iterdir()
    file.write_bytes(file.read_bytes()[:-7])  # and its last record is cut short
    with tracker(tmp_path, state=state) as t:
        log_all(t, rows[at:])
        finished = t.state()
    assert shown(tmp_path) == expected(rows)
    more = [(32 * i, {"train/loss": float(i)}) for i in range(13, 25)]
    with tracker(tmp_path, state=finished) as t:  # a finished run, prolonged
        log_all(t, more)
    assert shown(tmp_path) == expected(rows + more)


def test_a_run_that_begins_again_is_shown_once(tmp_path: Path) -> None:
    """It was killed before its first checkpoint, and its folder is taken up."""
    for seed in (3, 4):
        with tracker(tmp_path, state={"wandb_id": "abc"}) as t:
            log_all(t, some_rows(4, seed))
    assert shown(tmp_path) == expected(some_rows(4, seed=4))


def test_a_full_disk_costs_one_warning_and_the_rows_before_it_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(20, seed=5)
    written: list[int] = []

    def full(file: Any, data: bytes) -> None:
        written.append(len(data))
        if sum(written) > 5_000:
            raise OSError(28, "No space left on device")
        file.write(data)

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        patch.setattr("agents.tracking_tensorboard.append", full)
        with tracker(tmp_path, backends=("tensorboard", "jsonl")) as t:
            log_all(t, rows)
            t.state()
    [warning] = warned
    assert warning.category is RuntimeWarning
    assert str(warning.message) == (
        "TensorBoard stopped (OSError: [Errno 28] No space left on device). The run goes on."
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(rows)
    kept = len(written) - 3  # two records begin a file, and one failed
    assert 0 < kept < len(rows)
    assert shown(tmp_path) == expected(rows[:kept])


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in its place")
    with pytest.warns(RuntimeWarning, match="TensorBoard stopped") as warned:  # noqa: SIM117
        with tracker(tmp_path) as t:
            log_all(t, some_rows(3, seed=6))
    assert len(warned) == 1


def test_a_missing_package_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # import fails
    with pytest.raises(ImportError, match=r"pip install 'llm-envs\[tensorboard\]'"):
        tracker(tmp_path)
    with tracker(tmp_path, backends=("jsonl",)) as t:  # nobody else needs it
        log_all(t, some_rows(1, seed=7))


def test_the_files_tell_nothing_of_the_machine(tmp_path: Path) -> None:
    import platform

    log = TensorBoardLog(tmp_path / "log")
    log.start()
    log.log({"rollout/score": 0.5}, step=1)
    log.finish()
    [file] = (tmp_path / "log").iterdir()
    assert platform.node() not in file.name
    assert platform.node().encode() not in file.read_bytes()
