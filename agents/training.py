"""A run of training from end to end: begun or taken up, trained, reported.

The command line, :mod:`agents.train`, imports this once its arguments have been parsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gymnasium as gym
import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

import llm_envs
from agents import launch, runs
from agents.arguments import Arguments, arguments_of
from agents.base import Agent
from agents.checkpoints import checkpoint_folder, has_checkpoint
from agents.distributed import World
from agents.flags import check_device, parse_env_kwargs
from agents.registry import agent_class
from agents.report import report
from agents.tracking import Tracker
from llm_envs.core.registration import bare_id, known_id
from llm_envs.core.rendering import printable

# What may differ when a run is resumed: how far it goes, what is only shown, and the device, as
# another machine may not have the same.
_ANEW = ("resume", "steps", "samples", "quiet", "device")


# --- before training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run whose arguments are known to be good: all that training needs."""

    agent: Agent[Any]
    folder: Path
    config: dict[str, Any]
    tracker: Tracker


def prepare(a: Arguments[Any], console: Console, held: contextlib.ExitStack, world: World) -> Run:
    """Make a run, or take up an old one; what can be wrong is found here.

    Args:
        a: The command line.
        console: Where progress is shown.
        held: Keeps the lock on the run folder.
        world: The processes of the run, all of which call this; one writes.

    Raises:
        ValueError: An argument is impossible, or another process trains in the folder.
        TypeError: An argument of the environment or the policy is unknown.
        OSError: The run folder cannot be written, or its disk is too full.
    """
    if a.steps < 1:
        raise ValueError(f"--steps is {a.steps}; it has to be 1 or more.")
    check_device(a.device)
    if a.resume is None:
        return _fresh(a, console, held, world)
    return _resumed(a, a.resume, console, held, world)


def _fresh(a: Arguments[Any], console: Console, held: contextlib.ExitStack, world: World) -> Run:
    known_id(a.env)
    # The number of threads changes rounding, so a resumed run has to have the same one.
    threads = a.settings.threads or torch.get_num_threads()
    a = dataclasses.replace(a, settings=dataclasses.replace(a.settings, threads=threads))
    config = _as_config(a) | {"version": llm_envs.__version__, "processes": world.size}
    _refuse_scoring_what_is_trained_on(config)
    name = f"{config['env']}-{a.agent}-seed{a.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    if of_sweep := os.environ.get("WANDB_RUN_ID"):  # its agents begin runs in the same second
        name += f"-{of_sweep}"
    folder = world.of_main(a.out or Path("runs") / name)
    tracker = _tracker(a, folder, config, console, world, state=None)
    if not world.is_main:
        return Run(_begin(config, world), folder, config, tracker)
    # A run that is killed before its first checkpoint begins again under the same W&B id.
    config["wandb_id"] = tracker.state()["wandb_id"]
    new = runs.make(folder)
    # Nothing is looked at, and nothing taken away, before other processes are kept off.
    held.enter_context(runs.locked(folder))
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run already. Continue it with --resume, or rename it.")
    try:
        runs.prepare(folder, needed_bytes=200 * 2**20)
        agent = _begin(config, world)
        # Two checkpoints with moments, and copies while they are written.
        runs.prepare(folder, needed_bytes=10 * agent.parameters_bytes)
        _check_splits(agent, config)
        runs.write_json(folder / "config.json", config)
    except BaseException:
        if new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
    return Run(agent, folder, config, tracker)


def _resumed(
    a: Arguments[Any], folder: Path, console: Console, held: contextlib.ExitStack, world: World
) -> Run:
    if world.is_main:
        runs.read_config(folder)  # it is a run, so that there is something to lock
        held.enter_context(runs.locked(folder))
    begun = dataclasses.replace(arguments_of(folder), resume=None)
    config, given = runs.read_config(folder) | _as_config(begun), _as_config(a)
    _refuse_changes(given, config, folder)
    if (processes := config.get("processes", 1)) != world.size:
        raise ValueError(
            f"{folder} was begun with {processes} process{'es' * (processes > 1)}, and there "
            f"{'are' if world.size > 1 else 'is'} {world.size} now. Another number of them would "
            "sample other answers: it would no longer be that run. Go on as it began:\n"
            f"  {resume_command(folder, processes)}"
        )
    if world.is_main:
        runs.prepare(folder, needed_bytes=200 * 2**20)
    last = folder / "checkpoints" / "last"
    state: dict[str, Any]
    if has_checkpoint(last):
        try:
            agent = agent_class(a.agent).load(last, device=world.device, world=world)
            stored = json.loads((checkpoint_folder(last) / "state.json").read_text())
            state = stored["tracker"]
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The checkpoint {last} is damaged ({type(error).__name__}: {error}). Move it "
                "away and --resume begins again, or start a new run from other weights with "
                f"--policy {folder}/checkpoints/best/policy."
            ) from error
    else:  # killed before the first checkpoint: begin again, in the same folder
        agent = _begin(config, world)
        state = {"wandb_id": config.get("wandb_id")}
    if a.steps != config["steps"] and a.steps < agent.env_steps:
        raise ValueError(
            f"--steps is {a.steps}, and {folder} has taken {agent.env_steps} steps already. "
            "They are counted from the beginning of the run: give more, or leave it out."
        )
    if any(given[name] != config[name] for name in ("steps", "device")):
        config |= {name: given[name] for name in ("steps", "device")}
        if world.is_main:
            runs.write_json(folder / "config.json", config)
    return Run(agent, folder, config, _tracker(a, folder, config, console, world, state=state))


def _begin(config: dict[str, Any], world: World) -> Agent[Any]:
    """Make the agent of a run, as it is before training."""
    cls = agent_class(config["agent"])
    return cls(
        config["policy"],
        config["env"],
        config=cls.config_class(**config["settings"]),
        seed=config["seed"],
        env_kwargs=config["env_kwargs"],
        device=world.device,
        world=world,
    )


def _tracker(
    a: Arguments[Any],
    folder: Path,
    config: dict[str, Any],
    console: Console,
    world: World,
    *,
    state: dict[str, Any] | None,
) -> Tracker:
    backends = tuple(backend.strip() for backend in a.track.split(","))
    if a.wandb_checkpoint and "wandb" not in backends:
        raise ValueError(
            f"--wandb-checkpoint uploads to W&B, and --track is {a.track}. Give --track "
            f"wandb,{a.track}, or leave --wandb-checkpoint out."
        )
    return Tracker(
        folder,
        backends=backends if world.is_main else (),
        config=config,
        env_id=config["env"],
        agent=a.agent,
        name=f"{a.agent}-{config['env']}-seed{a.seed}",
        state=state,
        tags=_tags(config),
        progress=world.is_main and not a.quiet,
        total_steps=a.steps,
        console=console,
    )


def _tags(config: dict[str, Any]) -> list[str]:
    """Return the W&B tags of a run: what is trained, how and by which version."""
    policy = Path(config["policy"]).name  # without the folders of this machine
    return [config["env"], config["agent"], policy, f"llm-envs {llm_envs.__version__}"]


def _as_config(a: Arguments[Any]) -> dict[str, Any]:
    """Return the arguments as ``config.json`` holds them."""
    env_kwargs = parse_env_kwargs(a.env_kwargs)
    if "num_envs" in env_kwargs:
        raise ValueError(
            "--env-kwargs holds num_envs; how many episodes are played side by side is --prompts "
            "times --group-size."
        )
    config = dataclasses.asdict(a) | {"env": bare_id(a.env), "env_kwargs": env_kwargs}
    if a.policy != "tiny" and Path(a.policy).is_dir():  # to be found from any working directory
        config["policy"] = str(Path(a.policy).resolve())
    return json.loads(json.dumps(config, default=str))  # type: ignore[no-any-return]


def _refuse_changes(given: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """Refuse an argument that a run was not begun with: it would no longer be that run."""
    new, old = ({**held, **held["settings"]} for held in (given, config))
    for name in new:
        if new[name] != old[name] and name not in ("settings", *_ANEW):
            raise ValueError(
                f"{folder} was begun with {_shown(name, old[name])}, and {_shown(name, new[name])} "
                "was given. A resumed run keeps its arguments, except --steps, --samples, --quiet "
                "and --device. Leave it out, or begin a new run without --resume."
            )


def _shown(name: str, value: Any) -> str:
    return f"--{name.replace('_', '-')} {value if isinstance(value, str) else json.dumps(value)}"


def _refuse_scoring_what_is_trained_on(config: dict[str, Any]) -> None:
    if config["env_kwargs"].get("split") != "all":
        return
    if config["settings"]["eval_every"] or config["report"] != "none":
        raise ValueError(
            "--env-kwargs holds the split 'all', so the validation and test splits are trained on, "
            "and their scores would say nothing of new data. Leave the split out, or score "
            "nothing: --eval-every 0 --report none."
        )


def _check_splits(agent: Agent[Any], config: dict[str, Any]) -> None:
    """Open the splits that will be scored: a data set without them is to be refused now."""
    wanted = {"validation"} if agent.config.eval_every else set()
    for split in sorted((wanted | {config["report"]}) - {"none"}):
        gym.make_vec(agent.env_id, num_envs=1, **{**agent.env_kwargs, "split": split}).close()


# --- training ------------------------------------------------------------------------------------


def train(run: Run, console: Console, *, samples: int = 3) -> None:
    """Do the whole job; what is left of it can be resumed at any time.

    Raises:
        OSError: The run folder can no longer be written.
        FloatingPointError: A reward, the loss, the gradient or a weight is not finite.
    """
    agent, folder, config = run.agent, run.folder, run.config
    world = agent.world
    shared = f" {world.size} processes ({world.strategy})." if world.size > 1 else ""
    console.print(
        f"[bold]{agent.name}[/] on [bold]{agent.env_id}[/] from policy "
        f"[bold]{escape(agent.policy_name)}[/], seed {agent.seed}: {config['steps']:,} steps."
        f"{shared} Run folder: {escape(str(folder))}",
        soft_wrap=True,
    )
    learning = True

    def stop() -> None:
        if not learning:
            raise KeyboardInterrupt  # nothing is lost, and scoring takes long
        if lost := world.lost():  # then it is torchrun that ends those who are left
            _end_without(lost, world, folder)
        agent.stop_requested = True
        if not world.is_main:
            return
        with contextlib.suppress(OSError):  # not print: the signal may have come during one
            if console.is_terminal:
                os.write(1, b"\x1b[?25h")  # the cursor that the progress bar hides
            os.write(2, b"\nStopping after this update. Once more ends at once.\n")

    with _first_signal(stop):
        try:
            with run.tracker:
                with _noticing_deaths(world, folder):
                    agent.learn(config["steps"], folder=folder, tracker=run.tracker)
                learning = False
                if not world.is_main:
                    return
                _finish(run, console, samples)
        except KeyboardInterrupt:
            agent.stop_requested = True
            console.print(f"Stopped before the {config['report']} split was scored.")
    for text in (
        f"To go on:\n  {resume_command(folder, world.size)}" if agent.stop_requested else "",
        run.tracker.sync_hint(),
    ):
        if text:  # a command has to stay on one line to be copied
            console.print(text, markup=False, highlight=False, soft_wrap=True)


def _finish(run: Run, console: Console, samples: int) -> None:
    """Draw the learning curve; of a run that was not stopped also score, and keep the policy."""
    agent, folder, config = run.agent, run.folder, run.config
    metrics = folder / "metrics.jsonl"
    if metrics.exists():
        runs.plot_curve(
            runs.read_metrics(metrics),
            folder / "curve.png",
            title=f"{agent.name} on {agent.env_id}, seed {agent.seed}",
        )
    if agent.stop_requested:
        console.print(f"Stopped and saved after {agent.env_steps:,} steps.")
        return
    if config["report"] != "none":
        report(
            agent,
            lambda: _begin(config, World(device=agent.device)),
            folder,
            split=config["report"],
            tracker=run.tracker,
            console=console,
            samples=samples,
        )
    if config["wandb_checkpoint"]:
        run.tracker.checkpoint(_chosen(folder))


def _chosen(folder: Path) -> Path:
    """Return the checkpoint that validation chose; the last one if there was no validation."""
    best, last = (folder / "checkpoints" / name for name in ("best", "last"))
    return checkpoint_folder(best if has_checkpoint(best) else last)


@contextlib.contextmanager
def _first_signal(action: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM do something the first time; the second one ends the process at once.

    The second is left to the operating system: it works whatever the process is stuck in.
    """
    stopping = (signal.SIGINT, signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        for each in stopping:
            signal.signal(each, signal.SIG_DFL)
        action()

    before = {each: signal.signal(each, handle) for each in stopping}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _noticing_deaths(world: World, folder: Path) -> Iterator[None]:
    """Take an error for what it comes from, if that is the death of another process."""
    try:
        yield
    except RuntimeError as error:
        if world.size > 1:
            lost = world.lost(patience=3.0)
            if lost or "by peer" in str(error):
                _end_without(lost, world, folder)
        raise


def _end_without(lost: Sequence[int], world: World, folder: Path) -> NoReturn:
    """End this process because others died: these, or unknown ones on another machine.

    It ends at once: torchrun waits, and an exception could be swallowed where a signal comes.
    """
    if launch.speaks_first():
        dead = f"{', '.join(map(str, lost))} of {world.size}" if lost else "on another machine"
        said = (
            f"Process {dead} died, and the run cannot go on without it. Nothing before the last "
            f"checkpoint is lost. To go on:\n  {resume_command(folder, world.size)}"
        )
        os.write(2, f"\n{printable(said)}\n".encode())
    os._exit(1)


def resume_command(folder: Path, processes: int) -> str:
    """Return what the user types to go on, with the Python that runs now."""
    python = Path(sys.executable)
    if shutil.which("python") == str(python):
        python = Path("python")
    elif python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    start: list[str] = []
    if processes > 1:
        here = processes
        if processes == launch.processes():
            here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        nodes = ["--nnodes", str(processes // here)] if here < processes else []
        start = ["-m", "torch.distributed.run", *nodes, "--nproc-per-node", str(here)]
    return shlex.join([str(python), *start, "-m", "agents.train", "--resume", str(folder)])
