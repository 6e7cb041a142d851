"""Train an agent on an environment: ``python -m agents.train --env DialogueQA-v0``.

A run is a folder: configuration, metrics, checkpoints, transcripts, learning curve, result, and
an offline Weights & Biases run. The checkpoint that the validation split likes best is what is
reported. Ctrl-C (or SIGTERM) saves and stops; ``--resume FOLDER`` goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import llm_envs
from agents import runs
from agents.base import Agent, ConfigT
from agents.evaluation import Evaluation
from agents.reinforce import Reinforce
from agents.tracking import Tracker
from llm_envs.core.rendering import printable
from llm_envs.datasets.splits import did_you_mean

AGENTS: dict[str, type[Agent[Any]]] = {"reinforce": Reinforce}

# Settings that suit an environment better than the general defaults; the command line overrules.
PRESETS: dict[str, dict[str, Any]] = {
    "Summarization-v0": {"max_new_tokens": 40},
    "RecommendationClicks-v0": {"prompts": 16, "group_size": 4},
}


@dataclass(frozen=True)
class Arguments(Generic[ConfigT]):
    """What to train, on what, for how long."""

    settings: tyro.conf.OmitArgPrefixes[ConfigT]
    """Settings of the agent."""
    env: str = "DialogueQA-v0"
    """Environment id."""
    agent: str = "reinforce"
    """Agent; its own settings are listed below."""
    policy: str = "tiny"
    """Language model: "tiny" (embedded), a folder, or a hub id."""
    steps: int = 30_000
    """Environment steps (answers given) to train for."""
    seed: int = 0
    """Seed of everything."""
    env_kwargs: str = "{}"
    """Further arguments of the environment as JSON, e.g. '{"max_turns": 2}'."""
    out: Path | None = None
    """Run folder; by default runs/<env>-<agent>-seed<seed>-<time>."""
    resume: Path | None = None
    """Go on with this run; its own arguments are used, except --steps where it is given."""
    track: str = "wandb,jsonl"
    """Where metrics go, separated by commas."""
    report: Literal["test", "validation", "none"] = "test"
    """Split to score before and after training. Tune on validation; use test once, at the end."""
    device: str = "auto"
    """Device: auto, cpu, cuda, mps."""
    samples: int = 3
    """Episodes to print before and after."""
    quiet: bool = False
    """No progress bar."""


def parse(argv: Sequence[str]) -> Arguments[Any]:
    """Parse the command line; its agent decides which settings there are."""
    agent = _peek(argv, "--agent", "reinforce")
    if agent not in AGENTS:
        raise SystemExit(
            f"There is no agent {agent!r}.{did_you_mean(agent, AGENTS)} "
            f"There are: {', '.join(AGENTS)}."
        )
    env = _peek(argv, "--env", "DialogueQA-v0")
    config_class: Any = AGENTS[agent].config_class
    config = config_class(**PRESETS.get(env.removeprefix("llm_envs/"), {}))
    return tyro.cli(
        Arguments[config_class],
        args=list(argv),
        default=Arguments(settings=config),
        description=__doc__,
        prog="python -m agents.train",
    )


def _peek(argv: Sequence[str], flag: str, default: str) -> str:
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return default


def train(a: Arguments[Any], console: Console) -> Path:
    """Run the whole job; return the run folder."""
    agent, folder, tracked = _resumed(a) if a.resume else _fresh(a)
    config = json.loads((folder / "config.json").read_text())
    steps = config["steps"]
    console.print(
        f"[bold]{agent.name}[/] on [bold]{agent.env_id}[/] from policy [bold]{agent.policy_name}[/], "
        f"seed {agent.seed}: {steps:,} steps. Run folder: {escape(str(folder))}"
    )
    tracker = Tracker(
        folder,
        backends=tuple(config["track"].split(",")),
        config=config,
        env_id=agent.env_id,
        agent=agent.name,
        name=f"{agent.name}-{agent.env_id}-seed{agent.seed}",
        state=tracked,
        progress=not a.quiet,
        total_steps=steps,
    )

    def stop(number: int, frame: Any) -> None:
        agent.stop_requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once

    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    with tracker:
        try:
            agent.learn(steps, folder=folder, tracker=tracker)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        runs.plot_curve(
            runs.read_metrics(folder / "metrics.jsonl"),
            folder / "curve.png",
            title=f"{agent.name} on {agent.env_id}, seed {agent.seed}",
        )
        if agent.stop_requested:
            console.print(
                f"Stopped and saved after {agent.env_steps:,} steps. To go on:\n"
                f"  python -m agents.train --resume {folder}"
            )
            return folder
        if config["report"] != "none":
            _report(agent, folder, config, tracker, console, samples=a.samples)
    console.print(tracker.sync_hint())
    return folder


def _fresh(a: Arguments[Any]) -> tuple[Agent[Any], Path, None]:
    if a.env.removeprefix("llm_envs/") not in llm_envs.registered_ids():
        known = llm_envs.registered_ids()
        raise ValueError(
            f"There is no environment {a.env!r}.{did_you_mean(a.env, known)} "
            f"There are: {', '.join(known)}."
        )
    try:
        env_kwargs = json.loads(a.env_kwargs)
    except json.JSONDecodeError as error:
        raise ValueError(f"--env-kwargs is not JSON ({error}): {a.env_kwargs}") from error
    name = f"{a.env.replace('/', '-')}-{a.agent}-seed{a.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = a.out or Path("runs") / name
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a run already. Continue it with --resume, or rename it.")
    runs.prepare(folder, needed_bytes=200 * 2**20)
    agent = AGENTS[a.agent](
        a.policy, a.env, config=a.settings, seed=a.seed, env_kwargs=env_kwargs, device=a.device
    )
    weights = sum(p.numel() * p.element_size() for p in agent.policy.model.parameters())
    runs.prepare(folder, needed_bytes=10 * weights)  # two checkpoints with moments, and copies
    config = dataclasses.asdict(a) | {
        "settings": dataclasses.asdict(a.settings),
        "env_kwargs": env_kwargs,
        "threads": _threads(),
        "version": llm_envs.__version__,
    }
    runs.write_json(folder / "config.json", config)
    return agent, folder, None


def _resumed(a: Arguments[Any]) -> tuple[Agent[Any], Path, dict[str, Any] | None]:
    assert a.resume is not None
    folder = a.resume
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} is not a run: it holds no config.json.")
    config = json.loads((folder / "config.json").read_text())
    runs.prepare(folder, needed_bytes=200 * 2**20)
    if "--steps" in sys.argv:
        config["steps"] = a.steps
        runs.write_json(folder / "config.json", config)
    last = folder / "checkpoints" / "last"
    cls = AGENTS[config["agent"]]
    try:
        agent = cls.load(last, device=config["device"])
    except ValueError:
        if last.exists():
            raise
        # Killed before the first checkpoint: begin again, in the same folder.
        agent = cls(
            config["policy"],
            config["env"],
            config=cls.config_class(**config["settings"]),
            seed=config["seed"],
            env_kwargs=config["env_kwargs"],
            device=config["device"],
        )
        return agent, folder, None
    state = json.loads((last / "state.json").read_text())
    return agent, folder, state.get("tracker")


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _report(
    agent: Agent[Any],
    folder: Path,
    config: dict[str, Any],
    tracker: Tracker,
    console: Console,
    *,
    samples: int,
) -> None:
    """Score the initial policy and the chosen checkpoint on the same episodes; write and show."""
    cls = type(agent)
    split = config["report"]
    console.print(f"Scoring the policy on the {split} split, before and after …")
    initial = cls(
        config["policy"],
        config["env"],
        config=agent.config,
        seed=agent.seed,
        env_kwargs=agent.env_kwargs,
        device=config["device"],
    )
    before = initial.evaluate(split)
    best = folder / "checkpoints" / "best"
    chosen = cls.load(best, device=config["device"]) if best.exists() else agent
    after = chosen.evaluate(split)
    gain, low, high = after.gain_over(before)
    result = {
        "env": agent.env_id,
        "agent": agent.name,
        "policy": agent.policy_name,
        "seed": agent.seed,
        "env_steps": agent.env_steps,
        "chosen_at": chosen.env_steps,
        "before": before.summary(),
        "after": after.summary(),
        "gain": {"score": gain, "ci95": [low, high]},
    }
    runs.write_json(folder / "result.json", result)
    tracker.transcripts(
        [{**t, "when": w} for w, e in (("before", before), ("after", after)) for t in e.transcripts]
    )
    tracker.summary(result)
    _show_samples(before, after, console, samples)
    table = Table(title=f"{agent.env_id}, {split} split, {len(after.ids)} episodes, greedy")
    for column in ("", "before", "after"):
        table.add_column(column)
    table.add_row("score [95 % interval]", _bounds(before), _bounds(after))
    labels = {"contains": "holds a right answer (not rewarded)"}
    for name in after.parts:
        label = labels.get(name, name)
        table.add_row(label, f"{before.part(name):.3f}", f"{after.part(name):.3f}")
    console.print(table)
    console.print(
        f"Paired gain: [bold]{gain:+.3f}[/] [{low:+.3f}, {high:+.3f}]; validation chose the "
        f"checkpoint at {chosen.env_steps:,} steps."
    )
    console.print(f"Written to {escape(str(folder))}:")
    for name in ("config.json", "metrics.jsonl", "result.json", "transcripts.jsonl", "curve.png"):
        console.print(f"  {name}")
    console.print("  checkpoints/best (chosen by validation), checkpoints/last, wandb/")


def _bounds(e: Evaluation) -> str:
    low, high = e.ci95
    return f"{e.score:.3f} [{low:.3f}, {high:.3f}]"


def _show_samples(before: Evaluation, after: Evaluation, console: Console, count: int) -> None:
    ids = list(dict.fromkeys(before.ids))
    for chosen in ids[:: max(1, len(ids) // max(1, count))][:count]:
        console.print(f"\n[bold]{escape(chosen)}[/]")
        pairs = zip(before.transcripts, after.transcripts, strict=True)
        for old, new in pairs:
            if old["example_id"] != chosen:
                continue
            question = printable(new["question"])
            console.print(f"  [cyan]user[/]   {escape(question)}", highlight=False)
            for label, shown in (("before", old), ("after ", new)):
                score = "-" if shown["score"] is None else f"{shown['score']:.2f}"
                answer = escape(printable(shown["answer"]))
                console.print(f"  [yellow]{label}[/] {answer}  [bold]{score}[/]", highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and train; a mistake in it is told in one sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    arguments = parse(sys.argv[1:] if argv is None else argv)
    console = Console()
    try:
        train(arguments, console)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
