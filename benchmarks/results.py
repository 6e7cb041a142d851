"""What runs left behind, read from their folders: whole, cut, missing and damaged ones."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agents import runs
from agents.settings import SETTINGS
from benchmarks.experiment import (
    Run,
    finished,
    last_words,
    log_file,
    read_status,
    result,
    steps_taken,
)
from benchmarks.sweep import read_suite

Floats = npt.NDArray[np.float64]
State = Literal["done", "partial", "missing", "corrupt", "failed"]


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        run: The run.
        folder: Where it lies.
        state: ``done``; ``partial``, cut or still going; ``missing``, not begun; ``corrupt``, a
            file of it cannot be read; ``failed``.
        why: What is wrong with it.
        config: Its ``config.json``.
        metrics: Rows of its ``metrics.jsonl``.
        result: Its ``result.json``; empty if it was not scored.
        transcripts: Rows of its ``transcripts.jsonl``.
    """

    run: Run
    folder: Path
    state: State
    why: str = ""
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    metrics: list[dict[str, Any]] = field(default_factory=list, repr=False)
    result: dict[str, Any] = field(default_factory=dict, repr=False)
    transcripts: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def column(self, name: str) -> tuple[Floats, Floats]:
        """Return the environment steps at which a metric was logged, and its values."""
        found = {m["env_steps"]: m[name] for m in self.metrics if m.get(name) is not None}
        return np.array([*found], np.float64), np.array([*found.values()], np.float64)

    @cached_property
    def split(self) -> str:
        """The split that the score is from."""
        return str(self.result["after"]["split"]) if self.result else "validation"

    @cached_property
    def score(self) -> float | None:
        """The score that is compared: of the chosen checkpoint on the split that is reported.

        A run that reports none is compared by its last validation. ``None`` unless it is done, and
        of one whose last validation was not finite.
        """
        if self.state != "done":
            return None
        if self.result:
            return float(self.result["after"]["score"])
        logged = [m["eval/score"] for m in self.metrics if "eval/score" in m]
        return None if not logged or logged[-1] is None else float(logged[-1])

    @cached_property
    def initial(self) -> float | None:
        """The same of the policy that the run began with."""
        if self.result:
            return float(self.result["before"]["score"])
        steps, scores = self.column("eval/score")
        return float(scores[0]) if len(steps) and steps[0] == 0 else None

    @cached_property
    def seconds(self) -> float | None:
        """Seconds of training: rollouts and updates, without validation; ``None`` if not timed."""
        steps, rates = self.column("perf/env_steps_per_second")
        if not len(steps):
            return None
        return float((np.diff(steps, prepend=0.0) / np.maximum(rates, 1e-9)).sum())

    @cached_property
    def tokens(self) -> float | None:
        """Tokens read and written in training; ``None`` of an agent that counts none."""
        steps, rates = self.column("perf/env_steps_per_second")
        steps_too, tokens = self.column("perf/tokens_per_second")
        if not len(tokens) or len(tokens) != len(rates) or (steps != steps_too).any():
            return None
        return float((np.diff(steps, prepend=0.0) / np.maximum(rates, 1e-9) * tokens).sum())

    @cached_property
    def cumulative_regret(self) -> tuple[Floats, Floats]:
        """Environment steps, and the score lost to the best choices in training up to them."""
        steps, regrets = self.column("rollout/regret")
        return steps, np.cumsum(np.diff(steps, prepend=0.0) * regrets)


def read(out: Path) -> list[Outcome]:
    """Return what became of every run that a folder holds, or was to hold.

    Args:
        out: A folder of run folders, or one run folder.

    Raises:
        ValueError: There is no run in it, or the list of its sweep is damaged.
    """
    if (out / "config.json").exists():
        return [_read(_run_of(out), out)]
    suite = read_suite(out)
    listed = {run.name: run for run in suite.runs} if suite else {}
    others = sorted(path.parent for path in out.glob("*/config.json"))
    found = [_read(run, out / name) for name, run in listed.items()]
    for folder in others:
        if folder.name in listed:
            continue
        run = _run_of(folder)
        if any(o.run.name == run.name for o in found):  # a copy, or another run with that seed
            rest = folder.name.removeprefix(run.name).strip("-")
            run = replace(run, label="-".join(filter(None, (run.label, rest))))
        found.append(_read(run, folder))
    if not found:
        raise ValueError(
            f"{out} holds no run. Name the folder of a sweep, or of python -m agents.train."
        )
    return found


def _run_of(folder: Path) -> Run:
    """Return the run that a folder holds, by its configuration, and else by its name."""
    try:
        c = runs.read_config(folder)
    except ValueError:
        return Run(folder.name, "?", 0, 0)
    plain = Run(c["env"], c["agent"], c["seed"], c["steps"], report=c["report"])
    default = SETTINGS[c["agent"]].default_policy if c["agent"] in SETTINGS else ""
    policy = "" if c["policy"] == default else c["policy"]
    # What stands between agent and seed names the variant, as sweeps name their folders.
    label = folder.name.removeprefix(f"{plain.env}-{plain.agent}").rpartition(f"-seed{plain.seed}")
    named = label[0].strip("-") if folder.name.startswith(f"{plain.env}-{plain.agent}-") else ""
    named = named.removeprefix(Path(policy).name).strip("-")
    return replace(plain, label=named, policy=policy, env_kwargs=c["env_kwargs"])


def _read(run: Run, folder: Path) -> Outcome:
    failed = read_status(folder.parent, run.name).state == "failed"
    if not (folder / "config.json").exists():
        if failed:
            return Outcome(run, folder, "failed", _why(folder, run))
        return Outcome(run, folder, "missing", "not begun")
    held: dict[str, Any] = {}
    try:
        held["config"] = runs.read_config(folder)
        held["metrics"] = _measured(_rows(folder / "metrics.jsonl", "env_steps"))
        if (folder / "result.json").exists():
            held["result"] = _checked(result(folder))
        held["transcripts"] = _rows(folder / "transcripts.jsonl", *TRANSCRIPT)
        if (folder / "checkpoints" / "last").exists():
            steps_taken(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        held.pop("result", None)
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Outcome(run, folder, "corrupt", why, **held)
    if finished(folder):
        return Outcome(run, folder, "done", **held)
    held.pop("result", None)
    if _training(folder):
        return Outcome(run, folder, "partial", "training just now", **held)
    if failed:
        return Outcome(run, folder, "failed", _why(folder, run), **held)
    taken = held["metrics"][-1]["env_steps"] if held["metrics"] else 0
    why = f"{taken:,} of {run.steps:,} steps" + ("" if taken < run.steps else ", not scored")
    return Outcome(run, folder, "partial", why, **held)


TRANSCRIPT = ("example_id", "turn", "when", "question", "answer", "score")
"""What a row of ``transcripts.jsonl`` holds at least."""


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """Return a result if its numbers are numbers."""
    for when in ("before", "after"):
        side = found[when]
        for name, value in {"score": side["score"], **side["parts"]}.items():
            if not math.isfinite(value):
                raise ValueError(f"result.json: {name} {when} training is {value}")
        str(side["split"])
    return found


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics if they are numbers, logged in order.

    Raises:
        ValueError: Something is no number, or steps go back: two processes wrote the file.
    """
    before = 0
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            missing = value is None and name != "env_steps"  # what was not finite is null
            if not missing and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"metrics.jsonl, row {number}: {name} is {value!r}, no number")
        if row["env_steps"] < before:
            raise ValueError(
                f"metrics.jsonl, row {number}: env_steps goes back from {before} to "
                f"{row['env_steps']}"
            )
        before = row["env_steps"]
    return rows


def _training(folder: Path) -> bool:
    """Whether a process trains in a folder just now."""
    try:
        with runs.locked(folder):
            return False
    except ValueError:
        return True


def _why(folder: Path, run: Run) -> str:
    return last_words(log_file(folder.parent, run.name), 1)[-1]


def _rows(path: Path, *needed: str) -> list[dict[str, Any]]:
    """Read a file of JSON lines; none if it is not there. A crash may have cut the last line.

    Args:
        path: The file.
        needed: What every row has to hold.

    Raises:
        ValueError: Another line is damaged.
    """
    if not path.exists():
        return []
    found = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not row.keys() >= set(needed):
                raise ValueError(f"no object with {', '.join(needed) or 'names'}")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path.name}, line {number} is damaged ({error})") from error
        found.append(row)
    return found
