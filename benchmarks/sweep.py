"""Many runs with one command: ``python -m benchmarks.sweep --suite core``.

A suite is a list of runs. Each is a process of ``python -m agents.train`` and a folder; a few go on
side by side, here or on Ray. The same command again does only what is missing, and goes on with
what was cut. A run that fails is tried again, then told with its log; the others go on.

``python -m benchmarks.report FOLDER`` makes a page of what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from agents.runs import locked, read_metrics, write_json
from agents.settings import at_least
from benchmarks import suites
from benchmarks.experiment import (
    Run,
    State,
    Status,
    finished,
    last_words,
    log_file,
    make,
    read_status,
    refuse_another,
    waits_file,
)
from llm_envs.datasets.splits import did_you_mean

NODE_DEATHS = 8
"""Times that Ray begins a run anew because its node died, which is not the run's fault."""


@dataclass(frozen=True)
class Options:
    """What to run, where, and how."""

    suite: str = "smoke"
    """Suite: smoke, core, ablation, robustness, or a file of yours that makes a SUITE."""
    out: Path | None = None
    """Where the run folders lie, by default runs/<suite>. All nodes of a cluster have to see it."""
    launcher: Literal["local", "ray"] = "local"
    """Processes of this machine, or Ray."""
    address: str | None = None
    """Address of the Ray cluster, such as "auto" or "ray-head:6379"; without it Ray is started
    on this machine."""
    workers: int | None = None
    """Runs at a time on this machine; by default as many as there are cores for."""
    threads: int = 1
    """Intra-op threads of a run. The number is a part of the run, as another one rounds otherwise:
    what was cut goes on with its own."""
    cpus_per_run: float | None = None
    """Share of CPUs that a run takes on Ray; by default its threads."""
    gpus_per_run: float = 0.0
    """Share of GPUs that a run takes on Ray, such as 0.25."""
    retries: int = 1
    """Times that a run is tried again if it fails."""
    track: str = "jsonl"
    """Where metrics go: jsonl, and wandb or tensorboard besides, separated by commas."""
    envs: tuple[str, ...] = ()
    """Only these environments of the suite."""
    agents: tuple[str, ...] = ()
    """Only these agents of the suite."""
    seeds: tuple[int, ...] = ()
    """Only these seeds of the suite."""
    dry_run: bool = False
    """Run nothing; print the runs and how far they are."""

    def __post_init__(self) -> None:
        at_least(self, 1, "threads", "workers")
        at_least(self, 0, "retries", "gpus_per_run")
        if "jsonl" not in self.track.split(","):
            raise ValueError(
                f"--track is {self.track}, and the overview and the report read metrics.jsonl. "
                f"Give {self.track},jsonl."
            )

    @property
    def cpus(self) -> float:
        """CPUs that a run takes on Ray."""
        return self.threads if self.cpus_per_run is None else self.cpus_per_run

    @property
    def folder(self) -> Path:
        """Where the run folders lie."""
        return self.out or Path("runs") / Path(self.suite).stem


def chosen(suite: suites.Suite, options: Options) -> tuple[Run, ...]:
    """Return the runs of a suite that the options leave.

    Raises:
        ValueError: An option names what the suite does not have.
    """
    for name in ("env", "agent", "seed"):
        there = dict.fromkeys(getattr(run, name) for run in suite.runs)
        for wanted in getattr(options, f"{name}s"):
            if wanted not in there:
                raise ValueError(
                    f"The suite {suite.name!r} has no {name} {wanted!r}."
                    f"{did_you_mean(str(wanted), map(str, there))} "
                    f"It has: {', '.join(map(str, there))}."
                )
    return tuple(
        run
        for run in suite.runs
        if (not options.envs or run.env in options.envs)
        and (not options.agents or run.agent in options.agents)
        and (not options.seeds or run.seed in options.seeds)
    )


def from_anywhere(run: Run) -> Run:
    """Return a run whose policy, if it is a folder, is found from any working directory."""
    if run.policy in ("", "tiny") or not Path(run.policy).is_dir():
        return run
    return replace(run, policy=str(Path(run.policy).resolve()))


# --- launchers -----------------------------------------------------------------------------------

Make = Callable[[Run], Status]


def locally(
    todo: Sequence[Run], make: Make, workers: int, stop: threading.Event
) -> Iterator[tuple[Run, Status]]:
    """Make runs in processes of this machine; yield each as it ends.

    Args:
        todo: The runs.
        make: Makes one.
        workers: Runs at a time.
        stop: Set where this is interrupted; it tells ``make`` to save and stop.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(make, run): run for run in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def on_ray(todo: Sequence[Run], make: Make, options: Options) -> Iterator[tuple[Run, Status]]:
    """Make runs on a Ray cluster; yield each as it ends.

    A run whose node dies is begun on another one, where it goes on from its last checkpoint.
    """
    ray = import_ray()
    mine = not ray.is_initialized()
    address = options.address or os.environ.get("RAY_ADDRESS")  # so it is in a job of a cluster
    if mine:
        cpus = {} if address else {"num_cpus": max(os.cpu_count() or 1, options.threads)}
        # Workers of a cluster do not have our environment; runs track as we would.
        told = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="error",
            runtime_env={"env_vars": told},
            **cpus,
        )

    def attempt(run: Run) -> Status:  # Ray takes plain functions
        return make(run)

    shares = {"num_cpus": options.cpus, "num_gpus": options.gpus_per_run}
    waiting: dict[Any, Run] = {}
    try:
        _refuse_shares(ray, options, cluster=not mine or address is not None)
        task = ray.remote(**shares, max_retries=NODE_DEATHS)(attempt)
        waiting |= {task.remote(run): run for run in todo}
        while waiting:
            for ended in ray.wait(list(waiting), timeout=1)[0]:
                run = waiting.pop(ended)
                try:
                    yield run, ray.get(ended)
                except ray.exceptions.RayError as error:
                    if isinstance(error, ray.exceptions.RayTaskError):
                        raise  # a mistake of ours, or a folder that cannot be written
                    status = Status("failed", attempts=NODE_DEATHS)
                    yield run, note_failure(options.folder, run, status, str(error))
    except BaseException:
        for task_of_run in waiting:
            ray.cancel(task_of_run)  # it saves, and stops
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
        raise
    finally:
        if mine:
            ray.shutdown()


def _refuse_shares(ray: Any, options: Options, *, cluster: bool) -> None:
    """Refuse a share that this machine does not have; warn of one that no node of a cluster has.

    Raises:
        ValueError: This machine has less.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for what, share in (("CPU", options.cpus), ("GPU", options.gpus_per_run)):
        most = max((node.get(what, 0.0) for node in nodes), default=0.0)
        if share <= most:
            continue
        lacks = f"A run is to have {share:g} {what}, and the largest node has {most:g}."
        if not cluster:
            raise ValueError(f"{lacks} Give less, or the --address of a cluster.")
        warnings.warn(f"{lacks} Runs wait until a node joins that has as many.", stacklevel=2)


def note_failure(out: Path, run: Run, status: Status, why: str) -> Status:
    """Write down that a run failed where no process of it could; return its status."""
    log = log_file(out, run.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        print(why, file=file)
    write_json(log.with_suffix(".json"), asdict(status))
    return status


def import_ray() -> Any:
    """Import Ray.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--launcher ray needs Ray. Install the extra: pip install 'llm-envs[ray]'"
        ) from error
    return ray


# --- the overview --------------------------------------------------------------------------------


class Overview:
    """What all runs are doing, read from their files: it is the same wherever they run.

    Args:
        runs: The runs.
        out: Where their folders lie.
        sweep: Names the sweep; what others left is not counted as running.
    """

    def __init__(self, runs: Sequence[Run], out: Path, sweep: str) -> None:
        self.runs, self.out, self.sweep = runs, out, sweep
        self.ended = {run: Status("done") for run in runs if finished(out / run.name)}

    def state(self, run: Run) -> Status:
        """Return what a run is doing."""
        if run in self.ended:
            return self.ended[run]
        if waits_file(self.out, run.name, self.sweep).exists():
            return Status("blocked", self.sweep)
        status = read_status(self.out, run.name)
        ours = status.sweep == self.sweep and status.state in ("running", "blocked")
        return status if ours else Status("waiting")

    def seconds_left(self) -> float | None:
        """Guess the time that is left, from the runs of the same kind that have ended.

        Returns:
            Seconds; ``None`` until a run has ended.
        """
        took = {run: s.seconds for run, s in self.ended.items() if s.seconds and s.state == "done"}
        if not took:
            return None
        anything = sum(took.values()) / len(took)
        left, side_by_side = 0.0, 0
        for run in self.runs:
            if run in self.ended:
                continue
            alike = [s for r, s in took.items() if (r.env, r.agent) == (run.env, run.agent)]
            expected = sum(alike) / len(alike) if alike else anything
            running = self.state(run).state == "running"
            side_by_side += running
            left += expected * (1 - (self.progress(run)[0] / run.steps if running else 0))
        return left / max(1, side_by_side)

    def progress(self, run: Run) -> tuple[int, float | None]:
        """Return the steps that a run has taken, and its last validation score."""
        try:
            rows = read_metrics(self.out / run.name / "metrics.jsonl")
        except OSError:
            return 0, None
        scores = [row["eval/score"] for row in rows if row.get("eval/score") is not None]
        return (rows[-1]["env_steps"] if rows else 0), scores[-1] if scores else None

    def line(self) -> str:
        """Return the counts and the time left in one line."""
        counts = Counter(self.state(run).state for run in self.runs)
        told = [f"{counts['done']} of {len(self.runs)} runs done"]
        others: tuple[State, ...] = ("running", "blocked", "failed", "stopped")
        told += [f"{counts[s]} {s}" for s in others if counts[s]]
        left = self.seconds_left()
        if left is not None and counts["done"] < len(self.runs):
            told.append(f"about {max(1, round(left / 60)):,} min left")
        return ", ".join(told)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for column in ("running", "steps", "validation score"):
            table.add_column(column)
        for run in self.runs:
            if self.state(run).state == "running":
                steps, score = self.progress(run)
                shown = "" if score is None else f"{score:.3f}"
                table.add_row(escape(run.name), f"{steps:,}/{run.steps:,}", shown)
        told = [self.line()]
        for run in self.runs:
            state = self.state(run).state
            if state == "failed":
                told.append(f"failed: {run.name}")
            if state == "blocked":
                told.append(f"blocked, another process makes it: {run.name}")
        return Group(Text("\n".join(told)), table)


def listing(runs: Sequence[Run], out: Path) -> Table:
    """Return the runs and how far they are, as a table."""
    table = Table(title=f"{len(runs)} runs in {out}")
    for column in ("run", "steps", "state"):
        table.add_column(column)
    overview = Overview(runs, out, "")
    for run in runs:
        steps, _ = overview.progress(run)
        state = "done" if run in overview.ended else "cut" if steps else "missing"
        try:
            refuse_another(run, out / run.name)
        except ValueError:
            state = "another run"
        table.add_row(escape(run.name), f"{steps:,}/{run.steps:,}", state)
    return table


# --- the sweep -----------------------------------------------------------------------------------


def sweep(suite: suites.Suite, options: Options, console: Console) -> dict[Run, Status]:
    """Make every run of a suite that is not there yet.

    Args:
        suite: The suite.
        options: How.
        console: Where the overview is shown.

    Returns:
        Every run and how it ended.

    Raises:
        ValueError: A folder holds another run of the same name, or an option is impossible.
        ImportError: Ray is asked for and is not installed.
        OSError: A folder cannot be written.
        KeyboardInterrupt: Ctrl-C. Runs under way save and stop; the others are not begun.
    """
    out = options.folder.resolve()
    runs = tuple(map(from_anywhere, chosen(suite, options)))
    for run in runs:
        refuse_another(run, out / run.name)
    if options.launcher == "ray":
        import_ray()
    out.mkdir(parents=True, exist_ok=True)
    _keep_list(suite, runs, out)
    token = secrets.token_hex(4)
    overview = Overview(runs, out, token)
    todo = [run for run in runs if run not in overview.ended]
    settled = partial(
        make,
        out=out,
        sweep=token,
        threads=options.threads,
        track=options.track,
        retries=options.retries,
    )
    stop = threading.Event()
    workers = options.workers or max(1, (os.cpu_count() or 1) // options.threads)
    endings = (
        on_ray(todo, settled, options)
        if options.launcher == "ray"
        else locally(todo, partial(settled, stop=stop), workers, stop)
    )
    with Live(overview, console=console, refresh_per_second=1, transient=True) as live:
        for run, status in endings if todo else ():
            overview.ended[run] = status
            if not console.is_terminal:
                line = f"{run.name}: {status.state}. {overview.line()}."
                live.console.print(line, soft_wrap=True, highlight=False, markup=False)
    return overview.ended


@dataclass(frozen=True)
class Listed:
    """What sweeps were to make in a folder; settings that there are no longer do not matter."""

    name: str
    about: str
    runs: tuple[Run, ...]


def _keep_list(suite: suites.Suite, runs: Sequence[Run], out: Path) -> None:
    """Write down what was to be run, for the report; what earlier sweeps were to make is kept."""
    with contextlib.ExitStack() as held:
        while True:  # another sweep may write it just now
            try:
                held.enter_context(locked(out))
                break
            except ValueError:
                time.sleep(0.1)
        earlier = read_suite(out)
        known = {run.name: run for run in (*(earlier.runs if earlier else ()), *runs)}
        # In the order of the suite, whatever part of it was begun first: reports have it, too.
        first = {run.name: known[run.name] for run in suite.runs if run.name in known}
        listed = Listed(suite.name, suite.about, tuple({**first, **known}.values()))
        write_json(out / "sweep.json", asdict(listed))


def read_suite(out: Path) -> Listed | None:
    """Return what sweeps were to make in a folder; ``None`` if there was no sweep.

    Raises:
        ValueError: The file that says it is damaged.
    """
    path = out / "sweep.json"
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        return Listed(held["name"], held["about"], tuple(Run(**fields) for fields in held["runs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Take it away, and start the "
            "sweep again: runs that are there are kept."
        ) from error


def main() -> None:
    """Run what is missing; tell what failed."""
    console = Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does
    try:
        options = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.sweep")
        suite = suites.load(options.suite)
        if options.dry_run:
            console.print(listing(chosen(suite, options), options.folder))
            return
        ended = sweep(suite, options, console)
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit("Stopped; runs under way have saved. The same command goes on.") from None
    counts = Counter(status.state for status in ended.values())
    console.print(f"{counts['done']} of {len(ended)} runs done in {options.folder}.", markup=False)
    for run, status in ended.items():
        if status.state == "done":
            continue
        log = log_file(options.folder, run.name)
        told = f"{status.state} after {status.attempts} attempts: {log}"
        console.print(told, style="red", markup=False, soft_wrap=True)
        for line in last_words(log):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"To see them: python -m benchmarks.report {options.folder}", soft_wrap=True)
    if counts["done"] < len(ended):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
