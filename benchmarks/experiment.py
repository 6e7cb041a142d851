"""One training run of an experiment: what it is, where it lies, and how it is made.

A run is a process of ``python -m agents.train`` and a folder. What is there is kept, what was cut
is resumed, and nobody trains in a folder where somebody else does.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from agents import runs
from agents.base import checkpoint_folder
from agents.settings import SETTINGS

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        env: Environment id.
        agent: Name of the agent.
        seed: Its seed.
        steps: Environment steps.
        settings: Settings of the agent that differ from its defaults.
        label: Names the variant; settings do not stand in a folder's name.
        policy: Language model to begin with: a name, folder or hub id; "" is the agent's default.
        env_kwargs: Further arguments of the environment.
        report: Split that is scored before and after training.
    """

    env: str
    agent: str
    seed: int
    steps: int
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    label: str = ""
    policy: str = ""
    env_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    report: Literal["test", "validation", "none"] = "test"

    @property
    def variant(self) -> str:
        """What is compared: the agent and, where they differ, its policy and label."""
        model = Path(self.policy).name if self.policy else ""
        return "-".join(filter(None, (self.agent, model, self.label)))

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.env}-{self.variant}-seed{self.seed}"

    def command(self, folder: Path, *, threads: int = 1, track: str = "jsonl") -> list[str]:
        """Return the command that makes the run, or goes on with it.

        Args:
            folder: The run's folder.
            threads: Its intra-op threads.
            track: Where its metrics go, as ``agents.train --track`` says it.
        """
        train = [sys.executable, "-m", "agents.train", "--quiet", "--samples", "0"]
        if (folder / "config.json").exists():
            return [*train, "--resume", str(folder)]
        train += ["--env", self.env, "--agent", self.agent, "--seed", str(self.seed)]
        train += ["--steps", str(self.steps), "--report", self.report, "--track", track]
        train += ["--threads", str(threads), "--out", str(folder)]
        if self.policy:
            train += ["--policy", self.policy]
        if self.env_kwargs:
            train += ["--env-kwargs", json.dumps(self.env_kwargs)]
        for name, value in self.settings.items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                train.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                train += [flag, str(value)]
        return train


@dataclass(frozen=True)
class Status:
    """How far a run has come; a file beside the run folders, for whoever watches.

    Attributes:
        state: What it is doing.
        sweep: Names the sweep that makes it.
        attempts: Times that this sweep has begun it or gone on with it.
        seconds: What the last attempt took, if it has ended.
    """

    state: State
    sweep: str = ""
    attempts: int = 0
    seconds: float = 0.0


def log_file(out: Path, name: str) -> Path:
    """Return where what a run prints is kept."""
    return out / "logs" / f"{name}.log"


def read_status(out: Path, name: str) -> Status:
    """Return what is known of a run; that it waits if nothing is."""
    try:
        return Status(**json.loads(log_file(out, name).with_suffix(".json").read_text()))
    except (OSError, ValueError, TypeError):
        return Status("waiting")


def make(
    run: Run,
    out: Path,
    *,
    sweep: str = "",
    threads: int = 1,
    track: str = "jsonl",
    retries: int = 0,
    stop: threading.Event | None = None,
) -> Status:
    """Make a run in a process of its own, or go on with it; one that is finished is left alone.

    Where another process trains in its folder (a second sweep, or one that outlived its node), it
    waits until that has ended.

    Args:
        run: The run.
        out: Where the run folders lie.
        sweep: Names who makes it.
        threads: Its intra-op threads.
        track: Where its metrics go.
        retries: Times that it is tried again if it fails.
        stop: Once it is set, the run saves and stops.

    Returns:
        ``done``, ``failed``, or ``stopped``.

    Raises:
        ValueError: The folder holds another run.
        OSError: The log cannot be written.
    """
    folder, log = out / run.name, log_file(out, run.name)
    log.parent.mkdir(parents=True, exist_ok=True)

    def tell(status: Status) -> Status:
        runs.write_json(log.with_suffix(".json"), asdict(status))
        return status

    status = Status("done", sweep)
    for attempt in range(1, retries + 2):
        wait_until_free(folder)
        refuse_another(run, folder)
        if finished(folder):
            return tell(Status("done", sweep, status.attempts, status.seconds))
        began = time.monotonic()
        status = tell(Status("running", sweep, attempt))
        command = run.command(folder, threads=threads, track=track)
        stopped = _train(command, log, threads, stop or threading.Event()) == 0
        ended: State = "done" if finished(folder) else "stopped" if stopped else "failed"
        status = tell(Status(ended, sweep, attempt, time.monotonic() - began))
        if ended != "failed":
            break
    return status


def _train(command: list[str], log: Path, threads: int, stop: threading.Event) -> int:
    """Run a command whose output goes to the end of a log; return its exit status."""
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        # In a session of its own it is told to stop once, by us: a second signal, such as that of
        # a terminal, would end it before it has saved.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            env=process_environment(threads),
        )  # fmt: skip
        told = False
        try:
            while True:
                if stop.is_set() and not told:
                    process.send_signal(signal.SIGINT)
                    told = True
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:  # Ray interrupts a task that is cancelled
            if not told:
                process.send_signal(signal.SIGINT)
            process.wait()
            raise


def wait_until_free(folder: Path, *, every: float = 1.0) -> None:
    """Wait until no other process trains in a folder."""
    while folder.is_dir():
        try:
            with runs.locked(folder):
                return
        except ValueError:
            time.sleep(every)


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that is measured, or trains, with so many threads."""
    # Growing tensors cost page faults where memory goes back to the system each time.
    kept = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_MAX_": "0"}
    return {**kept, **os.environ, "OMP_NUM_THREADS": str(threads)}


def refuse_another(run: Run, folder: Path) -> None:
    """Refuse a folder that holds a run of the same name that is not this one.

    Raises:
        ValueError: It differs, and in what.
    """
    if not (folder / "config.json").exists():
        return
    config = runs.read_config(folder)
    wanted = {
        **{name: getattr(run, name) for name in ("env", "agent", "seed", "steps", "report")},
        "env_kwargs": run.env_kwargs,
        "policy": run.policy or SETTINGS[run.agent].default_policy,
    }
    held = {name: config[name] for name in wanted}
    if Path(wanted["policy"]).is_dir():  # config.json holds it in full
        wanted["policy"] = str(Path(wanted["policy"]).resolve())
    wanted |= run.settings
    held |= {name: config["settings"].get(name) for name in run.settings}
    for name, value in wanted.items():
        if json.loads(json.dumps(value)) != held[name]:
            raise ValueError(
                f"{folder} holds a run with {name} {held[name]!r}, and it is to be made with "
                f"{value!r}. Choose another folder with --out, or give the variant another label."
            )


def finished(folder: Path) -> bool:
    """Whether a run has taken all its steps, and has its result if it was to be scored."""
    try:
        config = runs.read_config(folder)
        scored = config["report"] == "none" or "after" in result(folder)
        return bool(scored and steps_taken(folder) >= config["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def steps_taken(folder: Path) -> int:
    """Return the environment steps at the last checkpoint of a run."""
    last = checkpoint_folder(folder / "checkpoints" / "last")
    return int(json.loads((last / "state.json").read_text())["env_steps"])


def result(folder: Path) -> dict[str, Any]:
    """Return what ``result.json`` of a finished run holds."""
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def validation_scores(folder: Path) -> list[tuple[int, float]]:
    """Return (environment steps, score) of each validation of a run, in order."""
    path = folder / "metrics.jsonl"
    rows = runs.read_metrics(path) if path.exists() else []
    return [(row["env_steps"], row["eval/score"]) for row in rows if "eval/score" in row]
