"""Weights & Biases, whose troubles cost one warning and never the training.

A run is kept offline, in its folder, where there is no account. The names are those of
:data:`agents.tracking.METRICS`.
"""

from __future__ import annotations

import contextlib
import io
import netrc
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from agents.runs import plain

# What W&B is told. No prompts, no output of its own, no capture of the terminal, of the code or of
# the machine's name and paths; system metrics stay. Waiting is bounded: what was not uploaded in
# time lies in the run folder. An environment variable (WANDB_INIT_TIMEOUT, …) overrules each.
_SETTINGS: Final[Mapping[str, Any]] = {
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


class WandbRun:
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
        """Begin the run: as the user wants it, else offline."""
        # W&B's report of its own errors to its makers would hold up the exit for 20 s offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        refused: BaseException | None = None
        try:
            with _silence():
                mode = _mode()
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
        """Log a row of metrics."""
        if self._run is not None and not self._broken:
            self._guarded("stopped", lambda: self._run.log(dict(row), step=step, commit=True))

    def log_table(
        self, name: str, rows: Sequence[Mapping[str, Any]], env_steps: int, step: int
    ) -> None:
        """Log transcripts as a table."""

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
        """Make a checkpoint an artifact; its files are linked as they are now."""

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
        """Add a result to the summary."""
        if self._run is not None and not self._broken:
            self._guarded("lost the summary", lambda: self._run.summary.update(dict(result)))

    def finish(self, *, failed: bool) -> None:
        """End the run, and wait a bounded time for its upload."""
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
        """Return where the run is to be seen, or how to look at it and to upload it."""
        if self._to_sync is None:
            return "" if self._url is None else f"Weights & Biases run: {self._url}"
        # A resumed run has one folder for each time it was started (with -1 behind the id if two
        # fell into one second); they are synced in order.
        folders = sorted((self._folder / "wandb").glob(f"offline-run-*-{self._id}*"))
        if self._to_sync not in folders:
            folders.append(self._to_sync)
        command, paths = _command(), [shlex.quote(_relative(f)) for f in folders]
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
            for name, value in _SETTINGS.items()
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


def wandb_tags(ours: Sequence[str]) -> list[str]:
    """Return our tags and those of ``WANDB_TAGS``, which W&B would leave out beside ours."""
    both = (*ours, *os.environ.get("WANDB_TAGS", "").split(","))
    tags = (str(plain(tag)).strip()[:_LONGEST_TAG] for tag in both)
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


def _mode() -> str:
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


def _command() -> str:
    """Return what starts the ``wandb`` of this Python in the user's shell."""
    if shutil.which("wandb"):
        return "wandb"
    return f"{shlex.quote(_relative(Path(sys.executable)))} -m wandb"


def _relative(path: Path) -> str:
    """Return ``path`` from the working directory if it lies below, else in full."""
    path = Path(os.path.abspath(path))  # not resolve(): a venv's Python is a symbolic link
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
