"""Make a trained policy smaller or faster for use: ``python -m agents.compress RUN --method int8``.

Three ways, each measured beside the policy that it is made from:

- ``merge``: the LoRA adapter becomes part of the weights. Plain weights, the same answers, and
  nothing more to compute than before training.
- ``int8``: the weights are held in 8 bits, a quarter of the size; the answers change a little.
- ``distill``: a smaller student, made of some of the layers or given with --student, learns the
  distributions of the policy on the policy's own answers to the training split. Writing tasks.

What comes out is a folder that ``CausalLMPolicy.from_pretrained`` (or ``CandidatePolicy``) reads,
with ``compression.json`` in it. Ways combine: compress what came out of another one.

Examples:
  python -m agents.compress runs/my-run --method merge
  python -m agents.compress runs/my-run --method distill --layers 2 --updates 300
  python -m agents.compress runs/my-run/distill --method int8
  python -m agents.compress some/model --method int8 --env DialogueQA-v0
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

import llm_envs
from agents import runs
from agents.base import at_least, checkpoint_folder
from agents.evaluation import evaluate
from agents.objectives import kl_divergence
from agents.policies.candidate import CandidatePolicy
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.policies.int8 import is_int8, quantize
from agents.policies.lora import BASE_FOLDER, has_adapter, read_pointer, resolved
from agents.policies.models import TINY, in_chunks, pad_right, split_model
from agents.policy_agent import POLICIES, Policy
from agents.rollout import Player, collect, episode_seeds, play
from agents.sampling import SamplingConfig, at_least_float32
from llm_envs.core.rendering import printable
from llm_envs.datasets.splits import did_you_mean

REPORT_FILE = "compression.json"


@dataclass(frozen=True)
class DistillConfig:
    """How a student learns (--method distill)."""

    student: str | None = None
    """Student to train: "tiny", a folder, or a hub id, with the policy's vocabulary. By default it
    is made of some layers of the policy."""
    layers: int | None = None
    """Layers of the policy that the student is made of, evenly spaced; None is half of them."""
    updates: int = 200
    """Gradient steps, each on new answers of the policy."""
    prompts: int = 16
    """Different episodes in one of them."""
    group_size: int = 2
    """Times that the policy plays each."""
    learning_rate: float = 1e-3
    """Of AdamW, falling to 0."""
    micro_batch_tokens: int = 8192
    """Most tokens in one forward pass."""

    def __post_init__(self) -> None:
        at_least(self, 1, "updates", "prompts", "group_size", "micro_batch_tokens")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; give more than 0.")
        if self.student is not None and self.layers is not None:
            raise ValueError(
                f"--student {self.student} has its own layers; leave --layers {self.layers} out."
            )


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
    """Folder to write; by default one named after the method, in the run or beside the policy."""
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


@dataclass(frozen=True, slots=True)
class Source:
    """A policy on disk, and how it was trained as far as that is known.

    Attributes:
        policy: What ``from_pretrained`` takes.
        env: Environment id.
        env_kwargs: Its further arguments.
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
        ValueError: It is not said what it plays, or the run has no checkpoint.
    """
    folder, policy, known = Path(a.source), a.source, {}
    if (folder / "checkpoints").is_dir():
        best, last = (folder / "checkpoints" / name for name in ("best", "last"))
        chosen = checkpoint_folder(best if best.exists() else last)
    else:
        chosen = folder
    beside = folder if chosen != folder else folder.parent
    if (chosen / "state.json").is_file():
        known = json.loads((chosen / "state.json").read_text(encoding="utf-8"))
        known |= {"max_new_tokens": known["config"].get("max_new_tokens")}
        policy = str(chosen / "policy")
    elif (chosen / REPORT_FILE).is_file():
        known = json.loads((chosen / REPORT_FILE).read_text(encoding="utf-8"))
    env = a.env or known.get("env")
    if env is None:
        raise ValueError(
            f"{a.source} does not tell what it was trained on. Say --env, for example "
            "--env DialogueQA-v0."
        )
    if env.removeprefix("llm_envs/") not in (ids := llm_envs.registered_ids()):
        raise ValueError(
            f"There is no environment {env!r}.{did_you_mean(env, ids)} There are: {', '.join(ids)}."
        )
    env_kwargs = known.get("env_kwargs", {}) if a.env in (None, known.get("env")) else {}
    if a.env_kwargs is not None:
        env_kwargs = json.loads(a.env_kwargs)
    if not isinstance(env_kwargs, dict):
        raise ValueError(f"--env-kwargs is {a.env_kwargs}; it has to be a JSON object.")
    tokens = a.max_new_tokens or known.get("max_new_tokens") or 24
    where = beside if folder.is_dir() else Path(".")
    return Source(policy, env, env_kwargs, tokens, where)


# --- the three ways ------------------------------------------------------------------------------

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
        ValueError: They are already.
    """
    policy = load(merge=True)
    if is_int8(policy.model):
        raise ValueError("The weights of the policy are held in 8 bits already.")
    quantize(policy.model)
    if isinstance(policy, CandidatePolicy) and policy.base is not None:
        quantize(policy.base)
    return policy


def shrunk(model: Any, layers: int) -> Any:
    """Return a model made of some layers of another: evenly spaced, the first and last with them.

    Args:
        model: A causal language model.
        layers: How many.

    Raises:
        ValueError: The model has fewer, or it is not known where they are.
    """
    config = copy.deepcopy(model.config)
    depth = config.num_hidden_layers
    found = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth and type(m[0]) is type(m[-1])
    ]
    if not 1 <= layers <= depth or not found:
        raise ValueError(
            f"A student of {layers} layers cannot be made of {type(model).__name__}, which has "
            f"{depth}. Give --layers of at most that, or a --student."
        )
    kept = np.linspace(0, depth - 1, layers).round().astype(int).tolist()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    small = type(model)(config)
    prefix = found[0] + "."
    place = {f"{prefix}{old}.": f"{prefix}{new}." for new, old in enumerate(kept)}
    weights = {}
    for name, weight in model.state_dict().items():
        if not name.startswith(prefix):
            weights[name] = weight
        elif (layer := prefix + name[len(prefix) :].split(".")[0] + ".") in place:
            weights[place[layer] + name.removeprefix(layer)] = weight
    small.load_state_dict(weights)
    return small.to(device=model.device, dtype=model.dtype)


def divergences(
    teacher: CausalLMPolicy, student: CausalLMPolicy, sequences: Sequence[TokenSequence]
) -> Tensor:
    """Return KL(teacher ‖ student) of the next token wherever one was sampled, at temperature 1.

    Args:
        teacher: Its distributions are what is to be learned.
        student: Has the same vocabulary; the gradients are its.
        sequences: Conversations, N sampled tokens in all.

    Returns:
        (N,) in nats.
    """
    ids = pad_right([s.ids for s in sequences], teacher.pad)
    sampled = pad_right([s.turns for s in sequences], -1) >= 0
    places = (sampled.flatten().nonzero()[:, 0] - 1).to(teacher.device)
    with torch.no_grad():
        taught = teacher.read(ids)
    learned = student.read(ids)

    def at(places: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            target = at_least_float32(taught.logits(places)).log_softmax(-1)
        return (kl_divergence(target, at_least_float32(learned.logits(places)).log_softmax(-1)),)

    vocabulary = teacher.model.config.get_text_config().vocab_size
    return in_chunks(at, places, vocabulary=vocabulary)[0]


def mean_divergence(
    teacher: CausalLMPolicy,
    student: CausalLMPolicy,
    sequences: Sequence[TokenSequence],
    *,
    learn: bool = False,
) -> float:
    """Return the mean of :func:`divergences`; ``learn`` adds its gradient to the student's."""
    tokens = max(1, sum(t >= 0 for s in sequences for t in s.turns))
    total = 0.0
    for members in student.micro_batches(sequences):
        with torch.set_grad_enabled(learn):
            share = divergences(teacher, student, [sequences[i] for i in members]).sum() / tokens
        if learn:
            share.backward()  # type: ignore[no-untyped-call]
        total += float(share.detach())
    return total


def make_student(teacher: CausalLMPolicy, config: DistillConfig, device: str) -> CausalLMPolicy:
    """Return the student before it learns.

    Raises:
        ValueError: Its vocabulary is another one.
    """
    if config.student is None:
        depth = teacher.model.config.num_hidden_layers
        model = shrunk(teacher.model, config.layers or max(1, depth // 2))
        student = copy.copy(teacher)
        student.model, student.parts = model, split_model(model)
    else:
        student = CausalLMPolicy.from_pretrained(config.student, device=device)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise ValueError(
            f"--student {config.student} has another vocabulary than the policy, so its "
            "distributions cannot be compared. Leave --student out to make one of the policy's "
            "layers."
        )
    student.micro_batch_tokens = config.micro_batch_tokens
    return student


def distill(
    teacher: CausalLMPolicy,
    student: CausalLMPolicy,
    source: Source,
    config: DistillConfig,
    *,
    seed: int,
    progress: Callable[[int, float], None] = lambda update, kl: None,
) -> None:
    """Train a student to have its teacher's distributions where the teacher goes.

    L = (1/N) Σ_t KL(p_teacher(· | x_t) ‖ p_student(· | x_t)) over the N tokens of answers that the
    teacher samples on the training split: the forward divergence, which covers all that it says.

    Source: Hinton et al. (2015), "Distilling the Knowledge in a Neural Network"; Kim and Rush
    (2016), "Sequence-Level Knowledge Distillation".

    Args:
        teacher: Plays.
        student: Is trained, in place.
        source: Says what is played.
        config: How long, how fast.
        seed: Seed of episodes and answers.
        progress: Told the number of each update and its mean divergence.
    """
    rows = config.prompts * config.group_size
    envs: Any = gym.make_vec(source.env, num_envs=rows, **{**source.env_kwargs, "split": "train"})
    teacher.generator.manual_seed(seed)
    parameters = list(student.model.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    sampling = SamplingConfig(source.max_new_tokens)
    for update in range(config.updates):
        seeds = episode_seeds(seed, update, config.prompts, config.group_size)
        rollout = collect(teacher.begin(sampling), envs, seeds=seeds)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - update / config.updates)
        kl = mean_divergence(teacher, student, rollout.sequences, learn=True)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(update + 1, kl)
    envs.close()


# --- measuring -----------------------------------------------------------------------------------


def weight_files(name: str | Path) -> set[Path]:
    """Return the files that hold the weights of a policy, those of a model beneath it too."""
    folder = TINY if str(name) == "tiny" else Path(name)
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
    """
    source = locate(a)
    if a.threads:
        torch.set_num_threads(a.threads)
    out = a.out or source.folder / a.method
    if (out / REPORT_FILE).exists():
        raise ValueError(f"{out} holds a compressed policy already. Choose another --out.")
    envs = gym.make_vec(source.env, num_envs=1, **{**source.env_kwargs, "split": "validation"})
    choosing = isinstance(envs.single_action_space, gym.spaces.Discrete)
    envs.close()
    kind: Any = POLICIES["choosing" if choosing else "writing"]
    if choosing and a.method == "distill":
        raise ValueError(
            f"{source.env} is a choosing task, and distilling learns from written answers. Use "
            "merge or int8."
        )

    def load(name: str | Path = source.policy, *, merge: bool) -> Policy:
        policy: Policy = kind.from_pretrained(name, device=a.device, merge=merge)
        return policy

    original = load(merge=False)
    before = sum(p.stat().st_size for p in weight_files(source.policy))
    runs.prepare(out, needed_bytes=2 * before)
    began = time.perf_counter()
    if a.method == "distill":
        assert isinstance(original, CausalLMPolicy)
        teacher = load(merge=True)
        assert isinstance(teacher, CausalLMPolicy)
        student = make_student(teacher, a.distill, a.device)
        try:
            distill(
                teacher, student, source, a.distill, seed=a.seed, progress=_progress(a, console)
            )
        except KeyboardInterrupt:
            console.print("Stopped; the student is kept as it is.")
        student.save_pretrained(out)
    else:
        {"merge": merged, "int8": in_int8}[a.method](load).save_pretrained(out)
    seconds = time.perf_counter() - began
    small = load(out, merge=True)  # what is measured is what lies on the disk
    console.print(f"Written to {escape(str(out))}; measuring it beside the original …")
    fast = speeds([original, small], source)
    report: dict[str, Any] = {
        "source": a.source,
        "method": a.method,
        "env": source.env,
        "env_kwargs": source.env_kwargs,
        "max_new_tokens": source.max_new_tokens,
        "seconds": seconds,
        "kl": measure_divergence(original, small, source),
    }
    if a.method == "distill":
        report["distill"] = asdict(a.distill)
    files = {"original": weight_files(source.policy), "compressed": weight_files(out)}
    for (which, paths), speed in zip(files.items(), fast, strict=True):
        size = sum(p.stat().st_size for p in paths)
        report[which] = {"bytes": size, "tokens_per_second": speed}
    splits: list[Any] = ["validation", "test"] if a.test else ["validation"]
    for split in splits:
        old, new = (
            evaluate(
                lambda policy=policy: player(policy, source.max_new_tokens),  # type: ignore[misc]
                source.env,
                split=split,
                episodes=a.episodes,
                env_kwargs=source.env_kwargs,
            )
            for policy in (original, small)
        )
        gain, low, high = new.gain_over(old)
        report["original"][split], report["compressed"][split] = old.summary(), new.summary()
        report[f"{split}_gain"] = {"score": gain, "ci95": [low, high]}
    runs.write_json(out / REPORT_FILE, report)
    return report


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
            table.add_row(name, *(_bounds(side[split]) for side in (old, new)))
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


def _bounds(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"]
    return f"{summary['score']:.3f} [{low:.3f}, {high:.3f}]"


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
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True).print(
            printable(str(error)), style="red", markup=False, highlight=False, soft_wrap=True
        )
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
