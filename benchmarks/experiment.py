"""Many runs of ``python -m agents.train``: what is there is kept, what was cut is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from agents.base import checkpoint_folder
from agents.runs import read_config, read_metrics


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        env: Environment id.
        agent: Name of the agent.
        seed: Its seed.
        steps: Environment steps.
        settings: Settings of the agent that differ from its defaults.
        label: Names the variant in the folder's name; settings do not.
    """

    env: str
    agent: str
    seed: int
    steps: int
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    label: str = ""

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return "-".join(filter(None, (self.env, self.agent, self.label, f"seed{self.seed}")))

    def command(self, folder: Path, report: str) -> list[str]:
        """Return the command that makes the run, or goes on with it."""
        train = [sys.executable, "-m", "agents.train", "--quiet", "--samples", "0"]
        if (folder / "config.json").exists():
            return [*train, "--resume", str(folder)]
        train += ["--env", self.env, "--agent", self.agent, "--seed", str(self.seed)]
        train += ["--steps", str(self.steps), "--report", report, "--track", "jsonl"]
        train += ["--threads", "1", "--out", str(folder)]
        for name, value in self.settings.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                train.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                train += [flag, str(value)]
        return train


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that is measured, or trains, with so many threads."""
    # Growing tensors cost page faults where memory goes back to the system each time.
    kept = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_MAX_": "0"}
    return {**kept, **os.environ, "OMP_NUM_THREADS": str(threads)}


def complete(runs: Sequence[Run], out: Path, *, workers: int, report: str) -> list[Path]:
    """Make every run that is not there yet, each in a process with one thread.

    Args:
        runs: What to run.
        out: Where the run folders lie; what a run printed is beside it, in ``<name>.log``.
        workers: Runs at a time.
        report: Split that is scored before and after training, or ``"none"``.

    Returns:
        The folder of each run. One that failed has no ``done`` file; the others go on.

    Raises:
        KeyboardInterrupt: Ctrl-C, which the terminal tells the runs under way too: they save and
            stop. Those in the queue are not begun.
    """
    out.mkdir(parents=True, exist_ok=True)
    environment = process_environment(threads=1)

    def make(run: Run) -> Path:
        folder = out / run.name
        if not finished(folder):
            with (out / f"{run.name}.log").open("a") as log:
                ended = subprocess.run(
                    run.command(folder, report), stdout=log, stderr=log, env=environment
                )
            if ended.returncode == 0 and whole(folder):  # it is 0 after Ctrl-C, too
                (folder / "done").touch()
        return folder

    with Progress() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task("runs", total=len(runs))
        futures = [pool.submit(make, run) for run in runs]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end, and what it left behind is there."""
    return (folder / "done").exists() and whole(folder)


def whole(folder: Path) -> bool:
    """Whether a run has taken all its steps, and has its result if it was to be scored."""
    try:
        config = read_config(folder)
        last = checkpoint_folder(folder / "checkpoints" / "last")
        taken = json.loads((last / "state.json").read_text())["env_steps"]
        scored = config["report"] == "none" or "after" in result(folder)
    except (OSError, ValueError, KeyError):
        return False
    return bool(scored and taken >= config["steps"])


def result(folder: Path) -> dict[str, Any]:
    """Return what ``result.json`` of a finished run holds."""
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def validation_scores(folder: Path) -> list[tuple[int, float]]:
    """Return (environment steps, score) of each validation of a run, in order."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [(row["env_steps"], row["eval/score"]) for row in rows if "eval/score" in row]
