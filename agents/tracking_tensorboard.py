"""TensorBoard's event files, without torch and without TensorFlow.

``tensorboard --logdir runs`` shows the runs of all agents in the same plots: the names are those of
:data:`agents.tracking.METRICS`, the step is the number of environment steps.
"""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agents.runs import append


class TensorBoardLog:
    """Writes scalars for TensorBoard, one event file each time that a run is started.

    A row is on its way to the disk when `log` returns. Trouble, such as a full disk, costs one
    warning and ends this log, never the training.

    Args:
        folder: Where the event files go; it is made when the log is started.

    Raises:
        ImportError: TensorBoard is not installed.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> log = TensorBoardLog(folder)
        >>> log.start()
        >>> log.log({"rollout/score": 0.5}, step=128)
        >>> log.finish()
        >>> [path.name for path in folder.iterdir()]
        ['events.out.tfevents.0000000000.llm-envs']
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ImportError(
                f"--track tensorboard needs TensorBoard ({error}). Install the extra: "
                "pip install 'llm-envs[tensorboard]'; or leave it out of --track."
            ) from error
        self._folder = folder
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._record_writer: Any = RecordWriter
        self._file: io.FileIO | None = None

    def start(self, *, first_step: int = 0) -> None:
        """Begin an event file.

        Args:
            first_step: The first step that it may hold. TensorBoard forgets what earlier files of
                the folder hold from there on: a resumed run logs it again.
        """
        self._guarded(lambda: self._open(first_step))

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Write one row of scalars, in single precision."""
        value = self._summaries.Summary.Value
        values = [value(tag=name, simple_value=number) for name, number in metrics.items()]
        event = self._events.Event(step=step, summary=self._summaries.Summary(value=values))
        self._guarded(lambda: self._write(event))

    def finish(self) -> None:
        """Close the event file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, first_step: int) -> None:
        self._folder.mkdir(exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        count = len(list(self._folder.glob("events.out.tfevents.*")))
        self._file = io.FileIO(self._folder / f"events.out.tfevents.{count:010}.llm-envs", "x")
        events = self._events
        self._write(events.Event(file_version="brain.Event:2"))
        restart = events.SessionLog(status=events.SessionLog.START)
        self._write(events.Event(step=first_step, session_log=restart))

    def _write(self, event: Any) -> None:
        if self._file is None:
            return
        event.wall_time = time.time()
        record = io.BytesIO()
        self._record_writer(record).write(event.SerializeToString())
        append(self._file, record.getvalue())

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do it; the first failure warns and ends the log."""
        try:
            action()
        except Exception as error:
            cause = " ".join(str(error).split())
            warnings.warn(
                f"TensorBoard stopped ({type(error).__name__}: {cause}). The run goes on.",
                RuntimeWarning,
                stacklevel=3,
            )
            with contextlib.suppress(OSError):
                self.finish()
            self._file = None
