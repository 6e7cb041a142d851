"""Make a trained policy smaller or faster for use: ``python -m agents.compress RUN --method int8``.

Three ways, each measured beside the policy that it is made from:

- ``merge``: the LoRA adapter becomes part of the weights. Plain weights, the same answers, and
  nothing more to compute than before training.
- ``int8``: the weights are held in 8 bits, a quarter of the size; the answers change a little.
- ``distill``: a smaller student, made of the layers that are missed most or given with --student,
  learns the distributions of the policy on the policy's own answers to the training split.
  Writing tasks.

What comes out is a folder that ``CausalLMPolicy.from_pretrained`` (or ``CandidatePolicy``) reads,
with ``compression.json`` in it. Ways combine: compress what came out of another one.

Examples:
  python -m agents.compress runs/my-run --method merge
  python -m agents.compress runs/my-run --method distill --layers 2 --updates 300
  python -m agents.compress runs/my-run/distill --method int8
  python -m agents.compress some/model --method int8 --env DialogueQA-v0
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import gymnasium as gym
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agents import runs
from agents.checkpoints import checkpoint_folder, replacing
from agents.distill import DistillConfig, conversations, distill, make_student, mean_divergence
from agents.evaluation import evaluate, with_interval
from agents.flags import check_device, parse_env_kwargs
from agents.launch import fail
from agents.policies.candidate import CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.int8 import is_int8, quantize
from agents.policies.lora import BASE_FOLDER, has_adapter, read_pointer, resolved
from agents.policies.models import folder_of
from agents.policy_agent import POLICIES, Policy
from agents.rollout import Player, collect, episode_seeds, play
from agents.sampling import SamplingConfig
from agents.settings import at_least
from llm_envs.core.registration import known_id
from llm_envs.datasets.splits import Split

REPORT_FILE = "compression.json"


@dataclass(frozen=True)
class Arguments:
    """What to compress, how, and what to measure it on."""

    source: tyro.conf.Positional[str]
    """Run folder (its best checkpoint is taken), checkpoint, policy's folder, hub id, or "tiny"."""
    method: Literal["merge", "int8", "distill"]
    """Way to compress."""
    distill: tyro.conf.OmitArgPrefixes[DistillConfig]
    """Settings of --method distill."""
    env: str | None = None
    """Environment to measure (and to distill) on; that of the training, if known."""
    env_kwargs: str | None = None
    """Its further arguments as JSON; those of the training, if known."""
    out: Path | None = None
    """Folder to write, new or empty; by default one named after the method, in the run or beside
    the policy."""
    episodes: int | None = None
    """Episodes of a split to score on, evenly spaced; None for all."""
    test: bool = False
    """Score on the test split too. Once, at the end: choose by validation."""
    max_new_tokens: int | None = None
    """Length limit of an answer; that of the training, if known, else 24."""
    seed: int = 0
    """Seed of the distillation."""
    threads: int | None = None
    """Intra-op threads of torch; None leaves it."""
    device: str = "auto"
    """Device: auto, cpu, cuda, mps."""

    def __post_init__(self) -> None:
        at_least(self, 1, "episodes", "max_new_tokens", "threads")
        at_least(self, 0, "seed")

    @property
    def splits(self) -> tuple[Split, ...]:
        """What is scored."""
        return ("validation", "test") if self.test else ("validation",)


@dataclass(frozen=True, slots=True)
class Source:
    """A policy on disk, and how it was trained as far as that is known.

    Attributes:
        policy: What ``from_pretrained`` takes.
        env: Environment id.
        env_kwargs: Its further arguments, without ``split``.
        max_new_tokens: Length limit of an answer.
        folder: Where results go by default.
    """

    policy: str
    env: str
    env_kwargs: dict[str, Any]
    max_new_tokens: int
    folder: Path


def locate(a: Arguments) -> Source:
    """Find the policy, and what it plays.

    Raises:
        ValueError: It is not said what it plays, the run has no checkpoint, or what it says of
            itself is damaged.
    """
    folder, policy = Path(a.source), a.source
    known: dict[str, Any] = {}
    chosen = _checkpoint(folder)
    beside = folder if (folder / "checkpoints").is_dir() else folder.parent
    if (chosen / "state.json").is_file():
        known = _read(chosen / "state.json", env=str, env_kwargs=dict, config=dict)
        known["max_new_tokens"] = known["config"].get("max_new_tokens")
        policy = str(chosen / "policy")
    elif (chosen / REPORT_FILE).is_file():
        known = _read(chosen / REPORT_FILE, env=str, env_kwargs=dict, max_new_tokens=int)
    env = a.env or known.get("env")
    if env is None:
        raise ValueError(
            f"{a.source} does not tell what it was trained on. Say --env, for example "
            "--env DialogueQA-v0."
        )
    env = known_id(env)
    env_kwargs = known.get("env_kwargs", {}) if env == known.get("env") else {}
    # What was trained on is not what is scored here.
    env_kwargs = {name: value for name, value in env_kwargs.items() if name != "split"}
    if a.env_kwargs is not None:
        env_kwargs = _parsed(a.env_kwargs)
    tokens = a.max_new_tokens or known.get("max_new_tokens") or 24
    where = beside if folder.is_dir() else Path(".")
    return Source(policy, env, env_kwargs, tokens, where)


def _checkpoint(folder: Path) -> Path:
    """Return the best checkpoint of a run, else its last; a folder that is no run, as it is."""
    if not (folder / "checkpoints").is_dir():
        with contextlib.suppress(ValueError):  # it may lie under its old name, after a crash
            return checkpoint_folder(folder)
        return folder
    with contextlib.suppress(ValueError):
        return checkpoint_folder(folder / "checkpoints" / "best")
    return checkpoint_folder(folder / "checkpoints" / "last")


def _read(path: Path, **needed: type) -> dict[str, Any]:
    """Read a JSON file that has to hold some names, with values of some types."""
    cure = "Give the folder that holds the weights, and say --env; move the damaged file away."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}). {cure}") from error
    held = found if isinstance(found, dict) else {}
    if lacking := [n for n, kind in needed.items() if not isinstance(held.get(n), kind)]:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(lacking)}. {cure}")
    return held


def _parsed(env_kwargs: str) -> dict[str, Any]:
    """Return what --env-kwargs says."""
    found = parse_env_kwargs(env_kwargs)
    for name in ("split", "num_envs"):
        if name in found:
            raise ValueError(
                f"--env-kwargs holds {name}, and that is not free here: a student learns on the "
                "training split, validation (and test, with --test) is scored. Leave it out."
            )
    return found


# --- before any work -----------------------------------------------------------------------------


def check_out(out: Path, policy: str) -> None:
    """Refuse a folder to write that holds something: the source, a model, an earlier result.

    Args:
        out: The folder, absolute.
        policy: What is compressed.

    Raises:
        ValueError: It does, or the source lies where the folder is made.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(
            f"{out} is there already and is not an empty folder; nothing is written over. Choose "
            "another --out, or move it away."
        )
    for end in (".new", ".old"):  # see agents.checkpoints.replacing
        if Path(policy).resolve().is_relative_to(out.with_name(out.name + end)):
            raise ValueError(f"{out}{end} is cleared while {out} is made. Choose another --out.")


# --- merging, and eight bits ---------------------------------------------------------------------

PolicyT = TypeVar("PolicyT", bound=Policy)


def merged(load: Callable[..., PolicyT]) -> PolicyT:
    """Return the policy with its adapter in its weights.

    Raises:
        ValueError: It has none.
    """
    if not has_adapter(load(merge=False).model):
        raise ValueError("The policy holds no adapter that could be merged.")
    return load(merge=True)


def in_int8(load: Callable[..., PolicyT]) -> PolicyT:
    """Return the policy with all its weights in 8 bits, those of a base that it has too.

    Raises:
        ValueError: They are already, or the policy has a scalar head.
    """
    policy = load(merge=True)
    if isinstance(policy, CandidatePolicy) and policy.scalar:
        raise ValueError(
            "The policy has a scalar head (an encoder always has one), and only causal language "
            "models without one can be held in 8 bits. Use it as it is."
        )
    if is_int8(policy.model):
        raise ValueError("The weights of the policy are held in 8 bits already.")
    quantize(policy.model)
    if isinstance(policy, CandidatePolicy) and policy.base is not None:
        quantize(policy.base)
    return policy


# --- measuring -----------------------------------------------------------------------------------


def weight_files(name: str | Path) -> set[Path]:
    """Return the files that hold the weights of a policy, those of a model beneath it too."""
    folder = folder_of(name)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        folder = Path(str(cached_file(str(name), "config.json"))).parent
    found: set[Path] = set()
    for part in (folder, folder / "base", folder / BASE_FOLDER):
        found |= {
            p.resolve() for ending in ("safetensors", "bin") for p in part.glob(f"*.{ending}")
        }
        if (pointer := read_pointer(part)) is not None:
            found |= weight_files(resolved(pointer["name"], part))
    return found


def player(policy: Policy, max_new_tokens: int) -> Player:
    """Return the policy at play, greedy."""
    if isinstance(policy, CandidatePolicy):
        return policy.begin(0.0)
    return policy.begin(SamplingConfig(max_new_tokens, temperature=0.0))


def speeds(policies: Sequence[Policy], source: Source, *, episodes: int = 32) -> list[float]:
    """Return tokens a second of policies that play some validation episodes, the best of three.

    Counted is every token that goes through the model, of prompts and of answers. The policies
    take turns, so that other work on the machine meets all of them.
    """
    arguments = {**source.env_kwargs, "split": "validation"}
    envs: Any = gym.make_vec(source.env, num_envs=episodes, **arguments)
    seeds = episode_seeds(0, 0, episodes, 1)
    best = [0.0] * len(policies)
    for _ in range(3):
        for i, policy in enumerate(policies):
            before, began = policy.read_tokens, time.perf_counter()
            play(player(policy, source.max_new_tokens), envs, seeds=seeds)
            passed = policy.read_tokens - before
            best[i] = max(best[i], passed / (time.perf_counter() - began))
    envs.close()
    return best


def measure_divergence(original: Policy, small: Policy, source: Source) -> float | None:
    """Return the mean divergence from the original on its own validation answers, nats a token.

    ``None`` on choosing tasks.
    """
    if not (isinstance(original, CausalLMPolicy) and isinstance(small, CausalLMPolicy)):
        return None
    arguments = {**source.env_kwargs, "split": "validation"}
    envs: Any = gym.make_vec(source.env, num_envs=64, **arguments)
    original.generator.manual_seed(0)
    sampling = SamplingConfig(source.max_new_tokens)
    rollout = collect(original.begin(sampling), envs, seeds=episode_seeds(0, 0, 64, 1))
    envs.close()
    return mean_divergence(original, small, rollout.sequences)


def compress(a: Arguments, console: Console) -> dict[str, Any]:
    """Do the whole job; return what ``compression.json`` holds.

    Raises:
        ValueError: An argument is impossible, or the policy cannot be compressed like this.
        OSError: The folder cannot be written.
        FloatingPointError: A score is not finite.
    """
    source = locate(a)
    out = (a.out or source.folder / a.method).resolve()
    check_out(out, source.policy)
    check_device(a.device)
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    load = partial(_policy_class(a, source).from_pretrained, device=a.device)
    original = load(source.policy, merge=False)
    if isinstance(original, CausalLMPolicy):
        original.room(SamplingConfig(source.max_new_tokens))
    before = sum(p.stat().st_size for p in weight_files(source.policy))
    runs.prepare(out.parent, needed_bytes=2 * before)
    began = time.perf_counter()
    small = _compressed(a, source, partial(load, source.policy), console)
    report: dict[str, Any] = {
        "source": a.source,
        "method": a.method,
        "env": source.env,
        "env_kwargs": source.env_kwargs,
        "max_new_tokens": source.max_new_tokens,
        "seconds": time.perf_counter() - began,
    }
    if a.method == "distill":
        report["distill"] = asdict(a.distill)
    with replacing(out) as fresh:
        small.save_pretrained(fresh)
        runs.write_json(fresh / REPORT_FILE, report)  # of use, even if it is never measured
    small = load(out, merge=True)  # what is measured is what lies on the disk
    console.print(f"Written to {escape(str(out))}; measuring it beside the original …")
    files = (weight_files(source.policy), weight_files(out))
    report |= _compared((original, small), files, source, a.splits, a.episodes)
    runs.write_json(out / REPORT_FILE, report)
    return report


def _policy_class(a: Arguments, source: Source) -> type[Policy]:
    """Return what plays the environment, sure that the splits which will be needed are there."""
    choosing = False
    for split in (*a.splits, *(["train"] if a.method == "distill" else [])):
        envs = gym.make_vec(source.env, num_envs=1, **{**source.env_kwargs, "split": split})
        choosing = isinstance(envs.single_action_space, gym.spaces.Discrete)
        envs.close()
    if choosing and a.method == "distill":
        raise ValueError(
            f"{source.env} is a choosing task, and distilling learns from written answers. Use "
            "merge, or int8 for a policy without a scalar head."
        )
    return POLICIES["choosing" if choosing else "writing"]


def _compressed(
    a: Arguments, source: Source, load: Callable[..., Policy], console: Console
) -> Policy:
    """Return the small policy; a distillation that is interrupted keeps what it has."""
    if a.method != "distill":
        return {"merge": merged, "int8": in_int8}[a.method](load)
    teacher = load(merge=True)
    assert isinstance(teacher, CausalLMPolicy)
    batches = conversations(
        teacher,
        source.env,
        a.distill,
        env_kwargs=source.env_kwargs,
        max_new_tokens=source.max_new_tokens,
        seed=a.seed,
    )
    student = make_student(teacher, a.distill, a.device, next(batches))
    try:
        distill(teacher, student, batches, a.distill, progress=_progress(a, console))
    except KeyboardInterrupt:
        console.print("Stopped; the student is kept as it is.")
    return student


def _compared(
    policies: tuple[Policy, Policy],
    files: tuple[set[Path], set[Path]],
    source: Source,
    splits: Sequence[Split],
    episodes: int | None,
) -> dict[str, Any]:
    """Measure original and compressed beside each other; return it as the report holds it."""
    found: dict[str, Any] = {"kl": measure_divergence(*policies, source)}
    sides = ("original", "compressed")
    for side, paths, speed in zip(sides, files, speeds(policies, source), strict=True):
        size = sum(p.stat().st_size for p in paths)
        found[side] = {"bytes": size, "tokens_per_second": speed}
    for split in splits:
        old, new = (
            evaluate(
                partial(player, policy, source.max_new_tokens),
                source.env,
                split=split,
                episodes=episodes,
                env_kwargs=source.env_kwargs,
            )
            for policy in policies
        )
        gain, *bounds = new.gain_over(old)
        found["original"][split], found["compressed"][split] = old.summary(), new.summary()
        found[f"{split}_gain"] = {"score": gain, "ci95": bounds}
    return found


def _progress(a: Arguments, console: Console) -> Callable[[int, float], None]:
    every = max(1, a.distill.updates // 20)

    def show(update: int, kl: float) -> None:
        if update % every == 0 or update == 1:
            console.print(f"  {update:>5}/{a.distill.updates}  KL to the policy {kl:.4f}")

    return show


def show(report: dict[str, Any], console: Console) -> None:
    """Print what was measured as a table."""
    old, new = report["original"], report["compressed"]
    table = Table(title=f"{report['method']} of {report['source']}, on {report['env']}, greedy")
    for column in ("", "original", "compressed"):
        table.add_column(column)
    for split in ("validation", "test"):
        if split in old:
            name = f"{split} score [95 % interval], {old[split]['episodes']} episodes"
            table.add_row(name, *(with_interval(side[split]) for side in (old, new)))
    table.add_row("weights on disk, MB", *(f"{side['bytes'] / 1e6:,.1f}" for side in (old, new)))
    table.add_row("tokens a second", *(f"{side['tokens_per_second']:,.0f}" for side in (old, new)))
    if report["kl"] is not None:
        table.add_row("KL from the original, nats a token", "0", f"{report['kl']:.4f}")
    console.print(table)
    for split in ("validation", "test"):
        if f"{split}_gain" in report:
            gain = report[f"{split}_gain"]
            low, high = gain["ci95"]
            console.print(
                f"Paired change on {split}: {gain['score']:+.3f} [{low:+.3f}, {high:+.3f}]"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and compress; a mistake in it is told in one sentence."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    try:
        a = tyro.cli(
            Arguments,
            args=list(sys.argv[1:] if argv is None else argv),
            description=__doc__,
            prog="python -m agents.compress",
        )
        show(compress(a, console), console)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        fail(str(error), error)
    except KeyboardInterrupt as error:
        fail("Interrupted.", error, code=130)


if __name__ == "__main__":
    main()
