"""One training run of an experiment: what it is, where it lies, and how it is made.

A run is a process of ``python -m agents.train`` and a folder. What is there is kept, what was cut
is resumed, and nobody trains in a folder where somebody else does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agents import runs
from agents.checkpoints import checkpoint_folder
from agents.settings import SETTINGS
from llm_envs.core.registration import bare_id

State = Literal["waiting", "blocked", "running", "done", "failed", "stopped"]
"""``blocked``: another process makes the run."""


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
        """Name of the run's folder: letters, digits and . + - _ alone."""
        return re.sub(r"[^\w.+-]+", "-", f"{self.env}-{self.variant}-seed{self.seed}")

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
            elif isinstance(value, list | tuple):
                train += [flag, *map(str, value)]
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


def waits_file(out: Path, name: str, sweep: str) -> Path:
    """Return what is there while a sweep waits for another process that makes a run."""
    return log_file(out, name).with_suffix(f".{sweep}.waits")


def last_words(log: Path, count: int = 3) -> list[str]:
    """Return the last lines of what the last attempt at a run said, without how to go on."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ["its log is not there"]
    said = text.rpartition("\n$ ")[2].splitlines()
    ends = [i for i, line in enumerate(said) if "to go on" in line.lower()]
    kept = [line for line in said[: ends[0] if ends else None] if line.strip()]
    return [line for line in kept[-count:] if not line.startswith("$ ")] or ["it said nothing"]


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

    Where another process makes it (a second sweep, or one that outlived its node), it waits until
    that has ended.

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
    log.touch()
    stop = stop or threading.Event()

    def tell(status: Status) -> Status:
        runs.write_json(log.with_suffix(".json"), asdict(status))
        return status

    status = Status("blocked", sweep)
    with contextlib.ExitStack() as held:
        # Whoever makes a run has its log, and so has the process that trains, which may outlive us.
        # The status is theirs, too: who waits leaves a file of its own.
        waits = waits_file(out, run.name, sweep)
        try:
            mine = _lock(log, held, stop, waits.touch)
        finally:
            waits.unlink(missing_ok=True)
        if mine is None and stop.is_set():
            return replace(status, state="stopped")
        with contextlib.ExitStack() as briefly:  # nor does anybody train there without a sweep
            if folder.is_dir():
                _lock(folder, briefly, stop, lambda: tell(status))
        refuse_another(run, folder)
        for attempt in range(1, retries + 2):
            if finished(folder):
                return tell(replace(status, state="done"))
            if stop.is_set():
                return tell(replace(status, state="stopped"))
            began = time.monotonic()
            tell(Status("running", sweep, attempt))
            command = run.command(folder, threads=threads, track=track)
            code = _train(command, log, threads, stop, mine)
            # It was told to stop, by us or by another; before it trains, the signal ends it.
            stopped = stop.is_set() or code in (0, 130, -signal.SIGINT, -signal.SIGTERM)
            state: State = "stopped" if stopped else "failed"
            if finished(folder):
                state = "done"
            status = tell(Status(state, sweep, attempt, time.monotonic() - began))
            if state != "failed":
                break
    return status


def _lock(
    path: Path, held: contextlib.ExitStack, stop: threading.Event, told: Callable[[], object]
) -> int | None:
    """Lock a path, waiting for whoever has it; tell that it waits.

    Returns:
        The open file that is locked; ``None`` if there are no locks here, or it was to stop.
    """
    while True:
        try:
            return held.enter_context(runs.locked(path))
        except ValueError:
            told()
            if stop.wait(1.0):
                return None


def _train(
    command: list[str], log: Path, threads: int, stop: threading.Event, lock: int | None
) -> int:
    """Run a command whose output goes to the end of a log; return its exit status."""
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=process_environment(threads),
            pass_fds=() if lock is None else (lock,),
            # In a session of its own it is told to stop once, by us: a second signal, such as
            # that of a terminal, would end it before it has saved. (It is SIGTERM, as what is
            # begun by a shell in the background is deaf to SIGINT.)
            start_new_session=True,
        )
        told = False
        try:
            while True:
                if stop.is_set() and not told:
                    process.terminate()
                    told = True
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:  # Ray interrupts a task that is cancelled
            if not told:
                process.terminate()
            process.wait()
            raise


def process_environment(threads: int) -> dict[str, str]:
    """Return the environment of a process that is measured, or trains, with so many threads."""
    # Growing tensors cost page faults where memory goes back to the system each time.
    kept = {"MALLOC_TRIM_THRESHOLD_": "4294967296", "MALLOC_MMAP_MAX_": "0"}
    return {**kept, **os.environ, "OMP_NUM_THREADS": str(threads)}


def refuse_another(run: Run, folder: Path) -> None:
    """Refuse a folder that holds a run of the same name that is not this one.

    Raises:
        ValueError: It differs, and in what. (A damaged one is for training to refuse.)
    """
    try:
        config = runs.read_config(folder)
    except (OSError, ValueError):
        return
    wanted = {
        **{name: getattr(run, name) for name in ("agent", "seed", "steps", "report")},
        "env": bare_id(run.env),
        "env_kwargs": run.env_kwargs,
        "policy": run.policy or SETTINGS[run.agent].default_policy,
    }
    held = {name: config[name] for name in wanted}
    if (
        wanted["policy"] != "tiny" and Path(wanted["policy"]).is_dir()
    ):  # config.json holds it in full
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
