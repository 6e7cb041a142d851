"""Tracking: what was logged is what can be read back, whatever happens in between."""

import contextlib
import io
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agents import tracking
from agents.tracking import METRICS, Tracker
from runs import history, nested, of_kind, rows_in, strict

Read = Callable[[Path], list[Any]]

CONFIG = {"seed": 3, "env_kwargs": {"max_turns": 2}, "betas": [0.9, 0.999], "out": None, "名": "值"}
ABOUT = {"config": CONFIG, "env_id": "DialogueQA-v0", "agent": "reinforce", "name": "a run"}


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No account, no settings of the user's, no files outside; a fresh W&B for each test."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in _environment(tmp_path_factory.mktemp("wandb")).items():
        monkeypatch.setenv(name, value)
    yield
    end_wandb()


def end_wandb() -> None:
    """Do what the end of the process does; ``finish`` leaves the last bytes to a service."""
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()


def _environment(folder: Path) -> dict[str, str]:
    places = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "NETRC")
    return {n: str(folder / n) for n in places} | {"WANDB_ERROR_REPORTING": "false"}


def tracker(folder: Path, **changes: Any) -> Tracker:
    return Tracker(folder, **({"backends": ("jsonl",), "progress": False} | ABOUT | changes))


def some_rows(count: int, seed: int) -> list[dict[str, float]]:
    """Rows as training logs them: an update, now and then an evaluation at the same step."""
    r = random.Random(seed)
    rows: list[dict[str, float]] = []
    for i in range(count):
        rows.append({"env_steps": 128 * i, "eval/score": r.random(), "eval/f1": r.gauss(0, 1e-9)})
        if i % 3:
            names = r.sample([m for m in METRICS if not m.startswith("eval/")], 5)
            rows[-1] = {"env_steps": 128 * i} | {name: r.gauss(0, 1e6) for name in names}
            rows.append({"env_steps": 128 * i, "eval/score": float(i)})
    return rows


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let nobody, services started meanwhile included, write a file beyond ``size`` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def log_all(t: Tracker, rows: list[dict[str, float]]) -> None:
    for row in rows:
        metrics = dict(row)
        t.log(metrics, env_steps=int(metrics.pop("env_steps")))


# --- metrics.jsonl, transcripts.jsonl ------------------------------------------------------------


def test_each_row_can_be_read_at_once(tmp_path: Path) -> None:
    rows = some_rows(10, seed=0)
    with tracker(tmp_path) as t:
        for i, row in enumerate(rows):
            log_all(t, [row])
            assert rows_in(tmp_path) == rows[: i + 1]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    import numpy as np
    import torch

    with tracker(tmp_path) as t:
        t.log({"train/loss": math.nan, "train/kl": -math.inf, "eval/f1": 1}, env_steps=1)
        t.log({"train/loss": np.float32(0.5), "train/kl": torch.tensor(2.0)}, env_steps=np.int64(2))
    assert rows_in(tmp_path) == [
        {"env_steps": 1, "train/loss": None, "train/kl": None, "eval/f1": 1.0},
        {"env_steps": 2, "train/loss": 0.5, "train/kl": 2.0},
    ]


@pytest.mark.parametrize("name", ["rollout/rewards", "train/Loss", "loss", "eval/", ""])
def test_unknown_metrics_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    with tracker(tmp_path) as t, pytest.raises(ValueError, match="There is no metric"):
        t.log({"rollout/score": 0.5, name: 1.0}, env_steps=1)
    assert rows_in(tmp_path) == []


def test_refusals_name_the_likely_choice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        tracker(tmp_path, backends=("wanbd",))
    with tracker(tmp_path) as t:
        with pytest.raises(ValueError, match="Did you mean 'rollout/reward'"):
            t.log({"rollout/rewards": 1.0}, env_steps=1)
        t.log({}, env_steps=5)
        with pytest.raises(ValueError, match="env_steps is 4 after 5"):
            t.log({}, env_steps=4)


anything = st.text(
    st.characters(codec=None) | st.sampled_from('\n\r\u2028\x85\x00\ud800\udfff\x9b"')
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.fixed_dictionaries({"question": anything, "answer": anything}), max_size=4))
def test_transcripts_of_any_text_are_one_line_of_json_each(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with tracker(folder) as t:
        t.transcripts([r | {"score": math.nan} for r in rows[:2]])
        t.transcripts([r | {"score": 0.5} for r in rows[2:]])
    lines = (folder / "transcripts.jsonl").read_bytes().decode("utf-8").splitlines()
    assert len(lines) == len(rows)
    for i, (line, row) in enumerate(zip(lines, rows, strict=True)):
        assert "Cc" not in map(unicodedata.category, line)  # nothing in it steers a terminal
        found = strict(line)
        assert found.pop("score") == (None if i < 2 else 0.5)
        for key, text in row.items():
            kept = "".join(c if not 0xD800 <= ord(c) < 0xE000 else ascii(c)[1:-1] for c in text)
            assert found[key] == kept


@pytest.mark.parametrize("torn", [b"", b'{"env_steps": 99', b'{"env_steps": 1}', b"\x00" * 9])
@pytest.mark.parametrize("at", [0, 1, 7, 12])
def test_a_resumed_run_has_every_row_once(tmp_path: Path, at: int, torn: bytes) -> None:
    rows = some_rows(12, seed=1)
    with tracker(tmp_path) as t:
        log_all(t, rows[:at])
        state = json.loads(json.dumps(t.state()))
        log_all(t, rows[at : at + 3])  # also a second row of the checkpoint's own step
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    with tracker(tmp_path, state=state) as t:
        assert rows_in(tmp_path) == rows[:at]
        log_all(t, rows[at:])
        assert t.state() | {"rows": 0, "env_steps": 0} == state | {"rows": 0, "env_steps": 0}
    assert rows_in(tmp_path) == rows


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for seed in (2, 3):
        with tracker(tmp_path) as t:
            log_all(t, some_rows(3, seed))
    assert rows_in(tmp_path) == some_rows(3, seed=3)


def test_lost_rows_are_told(tmp_path: Path) -> None:
    rows = some_rows(9, seed=4)
    with tracker(tmp_path) as t:
        log_all(t, rows)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.warns(RuntimeWarning, match=f"1 of the {len(rows)} rows"):  # noqa: SIM117
        with tracker(tmp_path, state=t.state()) as t:
            log_all(t, rows[-1:])
    assert rows_in(tmp_path) == [rows[0], rows[-1]]


def test_a_full_disk_is_told_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    rows = some_rows(100, seed=5)

    def run() -> None:
        with tracker(tmp_path) as t, files_of_at_most(1000):
            log_all(t, rows)

    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"):
        run()
    written = rows_in(tmp_path)
    assert 0 < len(written) < len(rows)
    assert written == rows[: len(written)]
    with tracker(tmp_path, state={"rows": 2, "env_steps": 128}) as t:
        log_all(t, rows[2:])
    assert rows_in(tmp_path) == rows


# --- Weights & Biases ----------------------------------------------------------------------------


def wandb_runs(folder: Path) -> list[Path]:
    """Give the files of all runs in a run folder, in order of their start."""
    end_wandb()
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


TRANSCRIPTS = [
    {
        "example_id": f"e{i}",
        "split": "test",
        "when": when,
        "turn": i,
        "question": "Qué? 首都\u2028\x00",
        "answer": "\ud800 <b>x</b>" * i,
        "references": ["Bern", "Berne"][:i],
        "score": None if i == 2 else i / 2,
        "note": 1 if i else "mixed",
    }
    for when in ("before", "after")
    for i in range(3)
]


def test_an_offline_run_holds_what_metrics_jsonl_holds(
    tmp_path: Path, read_wandb: Read, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = some_rows(400, seed=6)  # several 32 KiB blocks
    result = {"before": {"score": 0.25, "ci95": [0.2, 0.3]}, "bad": math.inf}
    with tracker(tmp_path, backends=("wandb", "jsonl"), tags=["tiny"]) as t:
        log_all(t, rows)
        t.log({"train/loss": math.nan}, env_steps=10**9)
        t.transcripts(TRANSCRIPTS[:3])
        t.transcripts(TRANSCRIPTS[3:])
        t.summary(result)
    assert capfd.readouterr() == ("", "")

    [file] = wandb_runs(tmp_path)
    records = read_wandb(file)
    logged = history(records)
    *steps, table_step = sorted(logged)
    assert logged.pop(table_step).keys() == {"env_steps", "transcripts"}
    nan = logged[steps[-1]]
    assert math.isnan(nan["train/loss"])
    nan["train/loss"] = None
    assert [logged[s] for s in steps] == rows_in(tmp_path)
    assert rows_in(tmp_path)[:-1] == rows

    [run, *_] = of_kind(records, "run")
    assert (run.run_group, run.job_type, run.display_name) == (
        "DialogueQA-v0",
        "reinforce",
        "a run",
    )
    assert (run.run_id, run.project, list(run.tags)) == (
        t.state()["wandb_id"],
        "llm-envs",
        ["tiny"],
    )
    assert nested(run.config.update) == CONFIG | {"_wandb": {}}

    metrics = of_kind(records, "metric")
    assert [(m.name or m.glob_name, m.step_metric, m.summary.max) for m in metrics[:3]] == [
        ("env_steps", "", False),
        ("*", "env_steps", False),
        ("eval/score", "env_steps", True),
    ]
    summary = nested(u for s in of_kind(records, "summary") for u in s.update)
    assert summary["before"] == result["before"]
    assert summary["bad"] is None
    assert summary["eval/score"] == {"max": max(r["eval/score"] for r in rows if "eval/score" in r)}

    [table] = file.parent.glob("files/media/table/*.table.json")
    found = strict(table.read_text("utf-8"))
    escaped = [{**r, "answer": r["answer"].replace("\ud800", "\\ud800")} for r in TRANSCRIPTS]
    assert [dict(zip(found["columns"], row, strict=True)) for row in found["data"]] == escaped
    lines = (tmp_path / "transcripts.jsonl").read_text("utf-8").splitlines()
    assert [strict(line) for line in lines] == escaped

    # Nothing of the machine goes along.
    for secret in (os.getcwd(), sys.executable, platform.node() + '"'):
        assert secret.encode() not in file.read_bytes()


def test_resumed_runs_together_hold_what_metrics_jsonl_holds(
    tmp_path: Path, read_wandb: Read
) -> None:
    rows = some_rows(20, seed=7)
    both = {"backends": ("wandb", "jsonl")}
    with tracker(tmp_path, **both) as t:
        log_all(t, rows[:8])
        state = t.state()
        log_all(t, rows[8:11])  # after the checkpoint: lost in a crash, logged again
    with tracker(tmp_path, **both, state=state) as t:
        log_all(t, rows[8:15])
        finished = t.state()
        t.transcripts(TRANSCRIPTS)
    with tracker(tmp_path, **both, state=finished) as t:  # a finished run, prolonged
        log_all(t, rows[15:])
        t.transcripts(TRANSCRIPTS)
    assert rows_in(tmp_path) == rows

    files = wandb_runs(tmp_path)
    assert len(files) == 3
    union: dict[int, dict[str, Any]] = {}
    for file in files:
        records = read_wandb(file)
        assert {r.run_id for r in of_kind(records, "run")} == {state["wandb_id"]}
        for step, row in history(records).items():
            assert union.setdefault(step, row) == row  # whichever of the two W&B keeps
    tables = [step for step, row in union.items() if "transcripts" in row]
    assert len(tables) == 2
    assert [union[s] for s in sorted(union) if s not in tables] == rows

    # W&B itself takes the folders of the hint.
    *_, look, upload = t.sync_hint().splitlines()
    assert shlex.split(look)[-2] == "leet"
    assert [Path(p) for p in shlex.split(upload) if "offline-run" in p] == [f.parent for f in files]
    told = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *shlex.split(upload)[-3:]],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert all(f.parent.name in told.stdout + told.stderr for f in files)


def test_tags_of_the_user_stand_beside_ours(
    tmp_path: Path, read_wandb: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_TAGS", "night, tiny,paper")
    with tracker(tmp_path, backends=("wandb",), tags=["tiny", "x" * 100, ""]) as t:
        t.log({}, env_steps=0)
    [file] = wandb_runs(tmp_path)
    [run, *_] = of_kind(read_wandb(file), "run")
    assert list(run.tags) == ["tiny", "x" * 64, "night", "paper"]


def test_a_checkpoint_is_an_artifact_that_sync_finds_as_it_was(
    tmp_path: Path, read_wandb: Read, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "checkpoints" / "best"
    (saved / "policy").mkdir(parents=True)
    contents = {"state.json": b"{}", "policy/model.safetensors": b"\0" * 1000}
    for name, data in contents.items():
        (saved / name).write_bytes(data)
    with tracker(tmp_path, backends=("wandb",)) as t:
        log_all(t, some_rows(3, seed=12))
        t.checkpoint(saved)
    assert capfd.readouterr() == ("", "")
    for name in contents:  # a new checkpoint takes its place before anybody syncs
        (saved / name).unlink()
        (saved / name).write_bytes(b"another")
    [file] = wandb_runs(tmp_path)
    [artifact] = of_kind(read_wandb(file), "artifact")
    assert (artifact.type, artifact.name) == ("model", f"checkpoint-{t.state()['wandb_id']}")
    assert artifact.finalize
    held = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert {name: path.read_bytes() for name, path in held.items()} == contents
    assert all(path.is_relative_to(file.parent.resolve()) for path in held.values())
    assert list(Path(os.environ["WANDB_DATA_DIR"]).rglob("*model*")) == []  # no second copy


def test_a_checkpoint_that_is_not_there_costs_one_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with tracker(tmp_path, backends=("wandb", "jsonl")) as t:
            t.log({}, env_steps=0)
            t.checkpoint(tmp_path / "nowhere")
    [warning] = warned
    assert "Weights & Biases lost the checkpoint (FileNotFoundError" in str(warning.message)
    with tracker(tmp_path) as t:  # without W&B there is nothing to do
        t.checkpoint(tmp_path / "nowhere")


def test_two_runs_at_once_are_two_runs(tmp_path: Path, read_wandb: Read) -> None:
    rows = {name: some_rows(4, seed) for seed, name in enumerate("ab")}
    for name in rows:
        (tmp_path / name).mkdir()
    with (
        tracker(tmp_path / "a", backends=("wandb",)) as a,
        tracker(tmp_path / "b", backends=("wandb",)) as b,
    ):
        for row_a, row_b in zip(rows["a"], rows["b"], strict=True):
            log_all(a, [row_a])
            log_all(b, [row_b])
    for name, expected in rows.items():
        [file] = wandb_runs(tmp_path / name)
        assert list(history(read_wandb(file)).values()) == expected


def run_warned(folder: Path, rows: list[dict[str, float]], halfway: Callable[[], Any]) -> Tracker:
    """Do a whole run; W&B breaks at the latest halfway. Exactly one warning, everything on disk."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with tracker(folder, backends=("wandb", "jsonl")) as t:
            log_all(t, rows[: len(rows) // 2])
            halfway()
            log_all(t, rows[len(rows) // 2 :])
            t.transcripts(TRANSCRIPTS)
            t.summary({"score": 1.0})
    assert [w.category for w in warned] == [RuntimeWarning], [str(w.message) for w in warned]
    assert "Weights & Biases" in str(warned[0].message)
    assert rows_in(folder) == rows
    assert (folder / "transcripts.jsonl").exists()
    return t


def test_a_missing_wandb_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails
    t = run_warned(tmp_path, some_rows(5, seed=8), lambda: None)
    assert t.sync_hint() == ""


def test_a_broken_wandb_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise SystemExit("broken")

    monkeypatch.setattr(wandb, "init", fail)
    run_warned(tmp_path, some_rows(5, seed=8), lambda: None)


def children() -> Iterator[int]:
    """Give the ids of this process's wandb-core processes."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        pid, name, _, parent, *_ = status.read_text().split()
        if name == "(wandb-core)" and int(parent) == os.getpid():
            yield int(pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_death_of_its_service_costs_one_warning(tmp_path: Path) -> None:
    def kill() -> None:
        [service] = children()
        os.kill(service, 9)
        os.waitpid(service, 0)

    run_warned(tmp_path, some_rows(30, seed=9), kill)
    with tracker(tmp_path, backends=("wandb",)) as t:  # the next run finds a new service
        log_all(t, some_rows(3, seed=9))
    assert len(wandb_runs(tmp_path)) == 2


def test_a_disk_that_is_full_for_wandb_is_survived(tmp_path: Path) -> None:
    import wandb

    with files_of_at_most(40_000):
        wandb.setup()  # starts the service, which keeps the limit
    rows = some_rows(400, seed=10)
    began = time.monotonic()
    with tracker(tmp_path, backends=("wandb", "jsonl")) as t:
        log_all(t, rows)
    assert time.monotonic() - began < 20
    assert rows_in(tmp_path) == rows
    [file] = wandb_runs(tmp_path)
    assert file.stat().st_size <= 40_000


OFFLINE_SCRIPT = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("tracking", sys.argv[1])  # without importing torch
tracking = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tracking)
about = dict(config={}, env_id="E-v0", agent="a", name="n", progress=False)
with tracking.Tracker(sys.argv[2], backends=("jsonl",), **about) as t:
    t.log({"rollout/score": 0.5}, env_steps=1)
assert "wandb" not in sys.modules and "torch" not in sys.modules
began = time.monotonic()
with tracking.Tracker(sys.argv[2], **about) as t:
    print("started after", time.monotonic() - began, file=sys.stderr)
    for i in range(5):
        t.log({"rollout/score": i / 8}, env_steps=i)
print(t.sync_hint())
"""


@pytest.mark.parametrize("key", ["a" * 40, None])
def test_no_network_costs_one_warning_and_little_time(
    tmp_path: Path, key: str | None, read_wandb: Read
) -> None:
    """Asked to be online, with a server that refuses, or without a key (it must not be asked)."""
    told = {
        **os.environ,
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "2",
    }
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", OFFLINE_SCRIPT, tracking.__file__, str(tmp_path)],
        env=told | ({"WANDB_API_KEY": key} if key else {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,  # ends when wandb-core, which inherits the pipes, has ended as well
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - began < 30
    assert ended.stderr.count("RuntimeWarning") == 1
    assert "could not connect, so the run is kept offline" in ended.stderr
    assert ("wandb login" in ended.stderr) == (key is None)
    expected = [{"env_steps": i, "rollout/score": i / 8} for i in range(5)]
    assert rows_in(tmp_path) == expected
    [file] = wandb_runs(tmp_path)
    assert list(history(read_wandb(file)).values()) == expected
    assert ended.stdout.count(str(file.parent)) == 2


def test_disabled_means_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracker(tmp_path, backends=("wandb", "jsonl")) as t:
        log_all(t, some_rows(3, seed=11))
        t.transcripts(TRANSCRIPTS)
        t.summary({"score": 1.0})
        with warnings.catch_warnings(action="error"):
            t.checkpoint(tmp_path / "nowhere")  # nothing is copied
    assert wandb_runs(tmp_path) == []
    assert t.sync_hint() == ""


# --- progress ------------------------------------------------------------------------------------


def shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, terminal: bool, thousands: int = 60
) -> list[str]:
    """Log a row every 4,000 s of a made-up clock, 10,000 steps each; 60,000 are planned."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock.now))
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    with tracker(tmp_path, progress=True, console=console, total_steps=60_000, name="[b]") as t:
        t.log({"eval/score": 0.0}, env_steps=0)
        for i in range(10, thousands + 1, 10):
            clock.now += 4_000
            metrics = {
                "rollout/reward": -0.1,
                "rollout/score": i / 100,
                "perf/tokens_per_second": 12_345.6,
            }
            t.log(metrics, env_steps=1000 * i)
            t.log({"eval/score": 0.9}, env_steps=1000 * i)
    return out.getvalue().splitlines()


def test_without_a_terminal_progress_is_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = shown(monkeypatch, tmp_path, terminal=False)
    assert len(lines) == 7
    assert lines[0] == "[b]: 0/60,000"
    line = "[b]: 20,000/60,000, reward -0.100, score 0.200, 12,346 tok/s, 4:26:40 left"
    assert lines[2] == line
    assert lines[-1].endswith(" 0:00 left")


def test_lines_are_ten_seconds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock.now))
    out = io.StringIO()
    with tracker(tmp_path, progress=True, console=Console(file=out), total_steps=100) as t:
        for i in range(8):
            t.log({}, env_steps=i)
            clock.now += 4
        t.log({}, env_steps=100)  # the last step is always shown
        t.log({"eval/score": 1.0}, env_steps=100)
    steps = [line.split()[2].split("/")[0] for line in out.getvalue().splitlines()]
    assert steps == ["0", "3", "6", "100"]


@pytest.mark.parametrize(("thousands", "left"), [(20, "4:26:40 left"), (60, "0:00 left")])
def test_on_a_terminal_progress_is_a_live_bar_within_80_columns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thousands: int, left: str
) -> None:
    lines = shown(monkeypatch, tmp_path, terminal=True, thousands=thousands)
    last = "".join(lines).split("\x1b[2K")[-1]
    assert (
        f"{thousands},000/60,000, reward -0.100, score 0.{thousands}0, 12,346 tok/s, {left}" in last
    )


def test_no_progress_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with tracker(tmp_path, progress=False, total_steps=10) as t:
        t.log({"rollout/score": 1.0}, env_steps=10)
    assert capfd.readouterr() == ("", "")
