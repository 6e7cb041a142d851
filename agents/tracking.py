"""Where a run's numbers go: ``metrics.jsonl``, Weights & Biases, TensorBoard, a progress bar.

Everything is logged against environment steps, under one fixed set of names (`METRICS`), so that
runs of different agents on different environments lie in one plot. A resumed run goes on in the
same file and under the same W&B id, without a row twice or missing. Trouble in W&B (no network,
a full disk, a broken installation) or in TensorBoard costs one warning and never the training.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, SupportsFloat

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from agents.runs import append, plain
from agents.tracking_tensorboard import TensorBoardLog
from agents.tracking_wandb import WandbRun, wandb_tags
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
            WandbRun(
                self.folder,
                id=self._wandb_id,
                group=env_id,
                job_type=agent,
                name=name,
                config=plain(config),
                tags=wandb_tags(tags),
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
        self._transcripts += [plain(row) for row in rows]
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
            self._wandb.summarize(plain(result))

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


def _write_line(file: io.FileIO, row: Mapping[str, Any], path: Path) -> None:
    """Append one JSON object as one line, straight to the operating system.

    Raises:
        OSError: It cannot be written; then nothing of it is left in the file.
    """
    line = json.dumps(plain(row), ensure_ascii=False, allow_nan=False).translate(_ESCAPED)
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
