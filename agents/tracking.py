"""Where a run's numbers go: ``metrics.jsonl``, Weights & Biases, TensorBoard, a progress bar.

Everything is logged against environment steps, under one fixed set of names (`METRICS`), so that
runs of different agents on different environments lie in one plot. A resumed run goes on in the
same file and under the same W&B id, without a row twice or missing. Trouble in W&B (no network,
a full disk, a broken installation) or in TensorBoard costs one warning and never the training.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import netrc
import os
import secrets
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, SupportsFloat
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agents.runs import append
from agents.tracking_tensorboard import TensorBoardLog
from llm_envs.datasets.splits import did_you_mean

BACKENDS: Final = ("wandb", "jsonl", "tensorboard")
"""What a `Tracker` can write to."""

METRICS: Final[Mapping[str, str]] = {
    "rollout/reward": "mean reward of a step, in the environment's reward range",
    "rollout/score": "mean score of a scored step, in [0, 1]",
    "rollout/regret": "mean of best_score - score of a step, where the best is known; 0 is best",
    "rollout/answer_tokens": "mean length of an answer in tokens",
    "rollout/cut": "share of answers that the length limit cut off, in [0, 1]",
    "eval/score": "mean over validation episodes of an episode's score, in [0, 1]",
    "train/loss": "value of the minimised loss",
    "train/entropy": "mean entropy of the policy where it chose, in nats",
    "train/kl": "mean KL divergence from the initial policy, in nats",
    "train/approx_kl": "mean KL divergence of the updated policy from the one that sampled (k3)",
    "train/explained_variance": "share of the returns' variance that the critic foresaw, at most 1",
    "train/clip_fraction": "share of the ratios beyond the clip, in [0, 1]",
    "train/value_loss": "half the mean squared error of the critic",
    "train/sampler_gap": "mean distance of a token's log-probability from the sampler's (bfloat16)",
    "train/updates": "gradient steps taken on a rollout",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/learning_rate": "learning rate of the optimizer",
    "perf/tokens_per_second": "tokens read and written a second, the update included",
    "perf/env_steps_per_second": "environment steps a second, the update included",
}
"""Every metric and its meaning; ``eval/<part>`` (the parts of a score) may be logged besides."""

# What W&B is told. No prompts, no output of its own, no capture of the terminal, of the code or of
# the machine's name and paths; system metrics stay. Waiting is bounded: what was not uploaded in
# time lies in the run folder. An environment variable (WANDB_INIT_TIMEOUT, …) overrules each.
_WANDB_SETTINGS: Final[Mapping[str, Any]] = {
    "silent": True,
    "reinit": "create_new",
    "console": "off",
    "save_code": False,
    "disable_git": True,
    "x_disable_meta": True,
    "host": "",
    "x_transaction_log_flush_interval": 1.0,  # a killed run loses a second, not fifteen
    "init_timeout": 20.0,
    "finish_timeout": 60.0,
    "finish_timeout_raises": True,
}

_TRANSCRIPT_COLUMNS: Final = (
    "example_id", "split", "when", "turn", "question", "answer", "references", "score",
)  # fmt: skip
_LONGEST_TAG: Final = 64  # W&B takes no longer one

# Legal inside JSON, but they end a line for `str.splitlines` or steer a terminal.
_ESCAPED: Final = {c: f"\\u{c:04x}" for c in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class Tracker:
    r"""Writes metrics, transcripts and results of one run; a context manager.

    Args:
        folder: The run folder, which exists. ``metrics.jsonl``, ``transcripts.jsonl``, ``wandb/``
            and ``tensorboard/`` are written in it.
        backends: Any of `BACKENDS`.
        config: The whole configuration, as JSON.
        env_id: Environment id: the W&B group.
        agent: Name of the agent: the W&B job type.
        name: Name of the run.
        state: What `state` returned when the checkpoint was written from which the run is
            resumed. Without it the run is a new one, and an old ``metrics.jsonl`` is overwritten.
        tags: W&B tags, besides those of ``WANDB_TAGS``.
        progress: Whether to show progress: a live bar on a terminal, else a line now and then.
        total_steps: Environment steps at which the run is complete; ``None`` if unknown.
        console: Where progress is shown; standard output if left out.

    Raises:
        ValueError: A backend is unknown.
        ImportError: TensorBoard is asked for and is not installed.

    W&B uploads while the run goes on if an account is configured (``wandb login``), else it
    writes an offline run; ``WANDB_MODE`` and ``WANDB_PROJECT`` are obeyed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> about = dict(config={}, env_id="DialogueQA-v0", agent="reinforce", name="run")
        >>> with Tracker(folder, backends=("jsonl",), progress=False, **about) as tracker:
        ...     tracker.log({"rollout/score": 0.5}, env_steps=128)
        >>> (folder / "metrics.jsonl").read_text()
        '{"env_steps": 128, "rollout/score": 0.5}\n'
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        backends: Sequence[str] = ("wandb", "jsonl"),
        config: Mapping[str, Any],
        env_id: str,
        agent: str,
        name: str,
        state: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        progress: bool = True,
        total_steps: int | None = None,
        console: Console | None = None,
    ) -> None:
        for backend in backends:
            if backend not in BACKENDS:
                raise ValueError(
                    f"There is no tracking backend {backend!r}.{did_you_mean(backend, BACKENDS)} "
                    f"Use any of {', '.join(BACKENDS)}."
                )
        self.folder = Path(folder)
        state = state or {}
        self._rows = int(state.get("rows", 0))
        self._env_steps = int(state.get("env_steps", 0))
        # A sweep agent of W&B decides the id of the runs that it starts.
        self._wandb_id = (
            state.get("wandb_id") or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        )
        self._file: io.FileIO | None = None
        self._transcripts: list[dict[str, Any]] = []
        self._jsonl = "jsonl" in backends
        self._wandb = (
            _WandbRun(
                self.folder,
                id=self._wandb_id,
                group=env_id,
                job_type=agent,
                name=name,
                config=_plain(config),
                tags=_wandb_tags(tags),
            )
            if "wandb" in backends
            else None
        )
        self._tensorboard = (
            TensorBoardLog(self.folder / "tensorboard") if "tensorboard" in backends else None
        )
        self._progress = _Progress(name, total_steps, console or Console()) if progress else None

    def __enter__(self) -> Tracker:
        if self._jsonl:
            self._file = _continue_rows(
                self.folder / "metrics.jsonl", rows=self._rows, env_steps=self._env_steps
            )
        if self._wandb is not None:
            self._wandb.start()
        if self._tensorboard is not None:
            # Training logs nothing more at the step of a checkpoint once it is written.
            self._tensorboard.start(first_step=self._env_steps + 1 if self._rows else 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._wandb is not None:
            if self._transcripts:
                self._wandb.log_table(
                    "transcripts", self._transcripts, self._env_steps, step=2 * self._rows - 1
                )
            self._wandb.finish(failed=kind is not None)
        if self._tensorboard is not None:
            self._tensorboard.finish()
        if self._file is not None:
            self._file.close()
            self._file = None

    def log(self, metrics: Mapping[str, SupportsFloat], *, env_steps: int) -> None:
        """Log one row; it is on its way to the disk when this returns.

        Args:
            metrics: Names of `METRICS`, or ``eval/<part>``, and their values. A value that is not
                finite is ``null`` in ``metrics.jsonl`` and stays itself in W&B and TensorBoard.
            env_steps: Environment steps taken so far, never fewer than before.

        Raises:
            ValueError: A name is unknown, or ``env_steps`` goes back.
            OSError: ``metrics.jsonl`` cannot be written.
        """
        for name in metrics:
            if name not in METRICS and not (name.startswith("eval/") and name != "eval/"):
                raise ValueError(
                    f"There is no metric {name!r}.{did_you_mean(name, METRICS)} "
                    "The names are fixed so that runs compare: use one of "
                    f"{', '.join(METRICS)}, or eval/<part>, or add it to agents.tracking.METRICS."
                )
        if env_steps < self._env_steps:
            raise ValueError(
                f"env_steps is {env_steps} after {self._env_steps}; rows are logged in order. "
                "A resumed run needs the tracker's state of the same checkpoint."
            )
        # W&B drops a row whose step it has seen. Row n is its step 2n, so a row that a resumed run
        # logs again is stored once; the table of transcripts takes the odd step behind the last
        # row, and so no row's place when a finished run is prolonged.
        row = {"env_steps": int(env_steps)} | {k: float(v) for k, v in metrics.items()}
        if self._file is not None:
            _write_line(self._file, row, self.folder / "metrics.jsonl")
        if self._wandb is not None:
            self._wandb.log(row, step=2 * self._rows)
        if self._tensorboard is not None:
            self._tensorboard.log({name: row[name] for name in metrics}, step=int(env_steps))
        self._rows += 1
        self._env_steps = int(env_steps)
        if self._progress is not None:
            self._progress.update(row)

    def transcripts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add transcripts to ``transcripts.jsonl`` and to the table that ends the W&B run.

        Args:
            rows: What was asked and answered, a turn each: ``example_id``, ``split``, ``when``
                (``"before"`` or ``"after"`` training), ``turn``, ``question``, ``answer``,
                ``references``, ``score``, and whatever else.
        """
        self._transcripts += [_plain(row) for row in rows]
        if self._jsonl:
            path = self.folder / "transcripts.jsonl"
            fresh = path.with_name(path.name + ".new")
            with io.FileIO(fresh, "w") as file:
                for row in self._transcripts:
                    _write_line(file, row, path)
            os.replace(fresh, path)

    def summary(self, result: Mapping[str, Any]) -> None:
        """Put the run's result into the W&B summary."""
        if self._wandb is not None:
            self._wandb.summarize(_plain(result))

    def checkpoint(self, folder: Path) -> None:
        """Make a checkpoint an artifact of the W&B run, of type ``model``.

        Args:
            folder: The checkpoint. The W&B run keeps its files as they are now: an offline run is
                uploaded later, when the checkpoint may have been replaced.
        """
        if self._wandb is not None:
            self._wandb.log_checkpoint(folder)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON, to be kept in the checkpoint.

        The rows logged so far are on the disk when this returns.
        """
        if self._file is not None:
            os.fsync(self._file.fileno())
        return {"wandb_id": self._wandb_id, "rows": self._rows, "env_steps": self._env_steps}

    def sync_hint(self) -> str:
        """Return how to look at the W&B run, for people; nothing if there is none."""
        return "" if self._wandb is None else self._wandb.hint()


# --- files ---------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return ``value`` as strict JSON holds it: no NaN, no lone surrogate, text keys."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return _plain(str(value))


def _write_line(file: io.FileIO, row: Mapping[str, Any], path: Path) -> None:
    """Append one JSON object as one line, straight to the operating system.

    Raises:
        OSError: It cannot be written; then nothing of it is left in the file.
    """
    line = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
    try:
        append(file, line.encode() + b"\n")
    except OSError as error:
        raise OSError(
            error.errno,
            f"{path} cannot be written ({error.strerror}). The last checkpoint is good: make room "
            "and resume the run",
        ) from error


def _continue_rows(path: Path, *, rows: int, env_steps: int) -> io.FileIO:
    """Open ``metrics.jsonl`` behind the rows that it held when the checkpoint was written.

    Rows that were logged later, and a line that a crash cut short, are cut off: the resumed run
    logs them again.
    """
    kept = held = 0
    if rows and path.exists():
        with path.open("rb") as old:
            for line in old:
                if held == rows or not line.endswith(b"\n") or _steps_of(line) > env_steps:
                    break
                kept, held = kept + len(line), held + 1
    if held < rows:
        warnings.warn(
            f"{path} holds {held} of the {rows} rows that were logged before the checkpoint; the "
            "others are lost. The run goes on.",
            RuntimeWarning,
            stacklevel=3,
        )
    file = io.FileIO(path, "a")
    file.truncate(kept)
    return file


def _steps_of(line: bytes) -> float:
    """Return ``env_steps`` of a row; infinity for a line that is none."""
    try:
        return int(json.loads(line)["env_steps"])
    except (ValueError, KeyError, TypeError):
        return math.inf


# --- Weights & Biases ----------------------------------------------------------------------------


class _WandbRun:
    """A W&B run whose troubles cost one warning.

    Args:
        folder: Where ``wandb/`` is made.
        id: The run's id; resuming takes the same one.
        about: Further arguments of ``wandb.init``.
    """

    _live: ClassVar[set[str]] = set()  # ids of the runs that this process writes just now

    def __init__(self, folder: Path, *, id: str, **about: Any) -> None:
        self._folder = folder
        self._id = id
        self._about = about
        self._run: Any = None
        self._broken = False
        self._to_sync: Path | None = None  # what has to be uploaded by hand
        self._url: str | None = None

    def start(self) -> None:
        # W&B's report of its own errors to its makers would hold up the exit for 20 s offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        refused: BaseException | None = None
        try:
            with _silence():
                mode = _wandb_mode()
                if mode != "offline":
                    try:
                        self._init(mode)
                    except (Exception, SystemExit) as error:
                        refused = error
                        self._forget()
                if self._run is None:
                    self._init("offline")
        except (Exception, SystemExit) as error:  # wandb.teardown may call sys.exit
            self._warn("could not be started", refused or error)
        else:
            if refused is not None:
                self._warn("could not connect, so the run is kept offline", refused)
            self._live.add(self._id)

    def log(self, row: Mapping[str, Any], step: int) -> None:
        if self._run is not None and not self._broken:
            self._guarded("stopped", lambda: self._run.log(dict(row), step=step, commit=True))

    def log_table(
        self, name: str, rows: Sequence[Mapping[str, Any]], env_steps: int, step: int
    ) -> None:
        def log() -> None:
            import wandb

            columns: list[str | int] = [*_TRANSCRIPT_COLUMNS]
            columns += dict.fromkeys(key for row in rows for key in row if key not in columns)
            data: list[Iterable[Any]] = [
                [row.get(str(column)) for column in columns] for row in rows
            ]
            table = wandb.Table(columns=columns, data=data, allow_mixed_types=True)
            self._run.log({"env_steps": env_steps, name: table}, step=step, commit=True)

        if self._run is not None and not self._broken:
            self._guarded("lost the transcripts", log)

    def log_checkpoint(self, folder: Path) -> None:
        def log() -> None:
            import wandb

            if self._run.disabled:
                return
            kept = Path(self._run.dir).resolve().parent / "checkpoint"
            shutil.copytree(folder, kept, copy_function=_link)
            artifact = wandb.Artifact(f"checkpoint-{self._id}", type="model")
            with _silence():
                # Not copied once more to where W&B keeps files of all runs, outside of this one.
                artifact.add_dir(str(kept), policy="immutable", skip_cache=True)
                self._run.log_artifact(artifact)

        if self._run is not None and not self._broken:
            self._guarded("lost the checkpoint", log)

    def summarize(self, result: Mapping[str, Any]) -> None:
        if self._run is not None and not self._broken:
            self._guarded("lost the summary", lambda: self._run.summary.update(dict(result)))

    def finish(self, *, failed: bool) -> None:
        if self._run is None:
            return
        folder = Path(self._run.dir).parent

        def finish() -> None:
            with _silence():
                self._run.finish(exit_code=int(failed))

        if not self._guarded("could not upload everything", finish):
            self._to_sync = folder
        self._run = None
        self._live.discard(self._id)
        if self._broken:
            with contextlib.suppress(Exception, SystemExit):
                self._forget()  # or a dead service would complain again when the process ends

    def hint(self) -> str:
        if self._to_sync is None:
            return "" if self._url is None else f"Weights & Biases run: {self._url}"
        # A resumed run has one folder for each time it was started (with -1 behind the id if two
        # fell into one second); they are synced in order.
        folders = sorted((self._folder / "wandb").glob(f"offline-run-*-{self._id}*"))
        if self._to_sync not in folders:
            folders.append(self._to_sync)
        command, paths = _wandb_command(), [shlex.quote(_relative(f)) for f in folders]
        return (
            "Weights & Biases run. See it in the terminal, or upload it:\n"
            f"  {command} leet {paths[-1]}\n"
            f"  {command} sync {' '.join(paths)}"
        )

    def _init(self, mode: str) -> None:
        import wandb

        if mode == "online" and not has_account():
            raise ValueError("WANDB_MODE is 'online' and no API key is known; run `wandb login`")
        known = wandb.Settings.model_fields
        settings = {
            name: value
            for name, value in _WANDB_SETTINGS.items()
            if name in known and f"WANDB_{name.upper()}" not in os.environ
        }
        run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            dir=str(self._folder),
            project=os.environ.get("WANDB_PROJECT", "llm-envs"),
            id=self._id,
            resume="allow",
            settings=wandb.Settings(**settings),
            **self._about,
        )
        run.define_metric("env_steps")
        run.define_metric("*", step_metric="env_steps")
        run.define_metric("eval/score", step_metric="env_steps", summary="max")
        self._run = run
        self._url = run.url
        self._to_sync = Path(run.dir).parent if run.offline and not run.disabled else None

    def _forget(self) -> None:
        """End W&B's service, which holds on to what failed, unless that would end other runs."""
        import wandb

        if wandb.run is None and not self._live:
            wandb.teardown()

    def _guarded(self, trouble: str, action: Callable[[], object]) -> bool:
        """Do it and return whether it went well; the first failure warns and ends the tracking."""
        try:
            action()
        except (Exception, SystemExit) as error:
            if not self._broken:
                self._warn(trouble, error)
            self._broken = True
            return False
        return True

    def _warn(self, trouble: str, error: BaseException) -> None:
        cause = " ".join(str(error).split())
        warnings.warn(
            f"Weights & Biases {trouble} ({type(error).__name__}: {cause}). The run goes on.",
            RuntimeWarning,
            stacklevel=2,
        )


def _wandb_tags(ours: Sequence[str]) -> list[str]:
    """Return our tags and those of ``WANDB_TAGS``, which W&B would leave out beside ours."""
    both = (*ours, *os.environ.get("WANDB_TAGS", "").split(","))
    tags = (str(_plain(tag)).strip()[:_LONGEST_TAG] for tag in both)
    return [tag for tag in dict.fromkeys(tags) if tag]


def _link(source: str, target: str) -> None:
    """Link a file, which takes no room, else copy it. Files of checkpoints are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Swallow what W&B prints, and with it any question: it asks on terminals only."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _wandb_mode() -> str:
    """Return the mode that the user asked for, else online where there is an account."""
    import wandb

    settings = wandb.setup().settings
    mode = os.environ.get("WANDB_MODE") or str(settings.mode)
    asked = "WANDB_MODE" in os.environ
    if mode == "dryrun" or (mode == "online" and not asked and not has_account()):
        return "offline"
    return mode


def has_account() -> bool:
    """Whether W&B finds credentials without asking."""
    import wandb

    settings = wandb.setup().settings
    named = (settings.api_key, getattr(settings, "identity_token_file", None))
    if any(named) or os.environ.get("WANDB_API_KEY"):
        return True
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return bool({urlsplit(settings.base_url).netloc, "api.wandb.ai"} & hosts.keys())


def _wandb_command() -> str:
    """Return what starts the ``wandb`` of this Python in the user's shell."""
    if shutil.which("wandb"):
        return "wandb"
    return f"{shlex.quote(_relative(Path(sys.executable)))} -m wandb"


def _relative(path: Path) -> str:
    """Return ``path`` from the working directory if it lies below, else in full."""
    path = Path(os.path.abspath(path))  # not resolve(): a venv's Python is a symbolic link
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


# --- progress ------------------------------------------------------------------------------------


class _Progress:
    """A live bar on a terminal; elsewhere a line every ten seconds. It ends with the last step.

    Args:
        name: What stands before a line.
        total: Environment steps in all.
        console: Where to show it.
    """

    seconds_between_lines: Final = 10.0

    def __init__(self, name: str, total: int | None, console: Console) -> None:
        self._name = name
        self._total = total
        self._console = console
        self._seen: dict[str, float] = {}
        self._began: tuple[float, int] | None = None  # clock and steps of the first row
        self._printed = -math.inf
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._done = False

    def update(self, row: Mapping[str, float]) -> None:
        if self._done:
            return
        now, steps = time.monotonic(), int(row["env_steps"])
        self._began = self._began or (now, steps)
        self._seen |= row
        complete = self._total is not None and steps >= self._total
        if self._console.is_terminal:
            self._show(steps, self._text(now, steps))
        elif complete or now - self._printed >= self.seconds_between_lines:
            line = f"{self._name}: {self._text(now, steps)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._printed = now
        if complete:
            self.stop()

    def stop(self) -> None:
        self._done = True
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, steps: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                BarColumn(bar_width=8),  # the whole fits 80 columns
                TextColumn("{task.description}", markup=False),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(text, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=steps, description=text)

    def _text(self, now: float, steps: int) -> str:
        """Return steps, reward, score, speed and time left, as far as they are known."""
        known = [f"{steps:,}" if self._total is None else f"{steps:,}/{self._total:,}"]
        for metric, form in (
            ("rollout/reward", "reward {:+.3f}"),
            ("rollout/score", "score {:.3f}"),
            ("perf/tokens_per_second", "{:,.0f} tok/s"),
        ):
            if metric in self._seen:
                known.append(form.format(self._seen[metric]))
        assert self._began is not None
        seconds, taken = now - self._began[0], steps - self._began[1]
        if self._total is not None and taken > 0:
            left = round(max(0, self._total - steps) * seconds / taken)
            hours, minutes = left // 3600, left // 60 % 60
            clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
            known.append(f"{clock}:{left % 60:02} left")
        return ", ".join(known)
