"""The arguments of ``python -m agents.train``; imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from agents import launch, runs
from agents.settings import ConfigT, PolicyConfig, Strategy, settings_class, stored_settings
from llm_envs.core.registration import bare_id

# Settings with which language models learn an environment better than with the general defaults;
# the command line overrules.
PRESETS: dict[str, dict[str, Any]] = {
    "DialogueQA-v0": {"prompts": 8, "group_size": 4, "learning_rate": 6e-4},
    "Summarization-v0": {
        "prompts": 8,
        "group_size": 4,
        "learning_rate": 6e-4,
        "max_new_tokens": 40,
    },
    "RecommendationClicks-v0": {"prompts": 4, "group_size": 4, "learning_rate": 3e-4},
    "CustomerService-v0": {
        "prompts": 8,
        "group_size": 4,
        "learning_rate": 6e-4,
        "max_new_tokens": 48,
    },
    "TextBattle-v0": {"prompts": 4, "group_size": 2, "entropy_coef": 0.03},
    "TextWorld-v0": {"prompts": 8, "group_size": 4, "learning_rate": 6e-4},
}
# The same for one agent, on any environment.
AGENT_PRESETS: dict[str, dict[str, Any]] = {
    "supervised": {"prompts": 32, "group_size": 1},  # one answer is accepted: no need of several
}


def _joined(words: Sequence[str]) -> str:
    """Return names that commas or spaces separate, separated by commas."""
    return ",".join(" ".join(words).replace(",", " ").split())


Names = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME,…",
        instance_from_str=_joined,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
"""Names separated by commas; the command line takes several words as well."""


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
    """Language model: "tiny" (embedded), a folder, or a hub id; "none" for agents without one."""
    steps: int = 4_096
    """Environment steps (answers given) to train for, in all."""
    seed: int = 0
    """Seed of everything."""
    env_kwargs: str = "{}"
    """Further arguments of the environment as JSON, e.g. '{"max_turns": 2}'."""
    out: Path | None = None
    """Run folder; by default runs/<env>-<agent>-seed<seed>-<time>."""
    resume: Path | None = None
    """Go on with the run in this folder. It keeps its arguments; only --steps, --samples, --quiet
    and --device (on another one numbers are rounded differently) may be given anew."""
    track: Names = "wandb,jsonl"
    """Where metrics go: wandb, jsonl, tensorboard, separated by commas or spaces. (Extra of
    tensorboard: llm-envs[tensorboard].)"""
    wandb_checkpoint: bool = False
    """Make the chosen checkpoint an artifact of the W&B run; wandb sync uploads it with the
    run."""
    report: Literal["test", "validation", "none"] = "test"
    """Split to score before and after training. Tune on validation; use test once, at the end."""
    device: str = "auto"
    """Device: auto, cpu, cuda, mps."""
    distributed: Strategy = "ddp"
    """How processes that torchrun starts share the model: each has all of it, or its shard."""
    samples: int = 3
    """Episodes to print before and after."""
    quiet: bool = False
    """No progress bar."""


def parse(argv: Sequence[str], description: str | None = None) -> Arguments[Any]:
    """Parse the command line; its agent, or the run to resume, decides what the defaults are.

    Args:
        argv: Its words.
        description: What the help begins with.

    Raises:
        ValueError: The agent is unknown, or there is no run to resume.
    """
    resumed = _peek(argv, "--resume", "")
    default = (
        arguments_of(Path(resumed))
        if resumed
        else _defaults(
            _peek(argv, "--agent", "reinforce"), bare_id(_peek(argv, "--env", "DialogueQA-v0"))
        )
    )
    kind: Any = Arguments[type(default.settings)]  # type: ignore[misc]
    parsed: Arguments[Any] = tyro.cli(
        kind,
        args=list(argv),
        default=default,
        description=description,
        prog="python -m agents.train",
        console_outputs=launch.tells(),
    )
    return parsed


def _defaults(agent: str, env: str) -> Arguments[Any]:
    kind: Any = settings_class(agent)
    preset = PRESETS.get(env, {}) if issubclass(kind, PolicyConfig) else {}
    settings = kind(**{**preset, **AGENT_PRESETS.get(agent, {})})
    return Arguments(settings=settings, policy=kind.default_policy)


def arguments_of(folder: Path) -> Arguments[Any]:
    """Return the arguments that a run was begun with; those that came later have their defaults."""
    config = runs.read_config(folder)
    kind = settings_class(config["agent"])
    origin = f"{folder} was written by llm-envs {config.get('version')}"
    same = {f.name: config[f.name] for f in dataclasses.fields(Arguments) if f.name in config}
    changed = {
        "settings": stored_settings(kind, config["agent"], config["settings"], origin),
        "env_kwargs": json.dumps(config["env_kwargs"]),
        "out": None if config["out"] is None else Path(config["out"]),
        "resume": folder,
    }
    return Arguments(**{**same, **changed})


def _peek(argv: Sequence[str], flag: str, default: str) -> str:
    """Return the value of a flag before the command line is parsed; the last one counts."""
    found = default
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found
