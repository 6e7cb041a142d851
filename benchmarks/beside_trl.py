"""Whether we learn what TRL learns: ``python -m benchmarks.beside_trl``.

Speed is worth nothing if less is learned. This trains the embedded model on the first questions of
DialogueQA with TRL's ``RLOOTrainer`` and with ours: as many prompts a batch, answers a prompt and
tokens, the same rewards, optimizer (AdamW), learning rate and number of updates. Then both are
scored, greedy, on the whole validation split. Each training is a process of its own. (Extra:
``llm-envs[bench]``.)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from agents.settings import at_least
from benchmarks.contenders import TRAIN, questions, rloo_trainer
from benchmarks.experiment import process_environment
from benchmarks.tables import Table, cell

ENV = "DialogueQA-v0"
ONE_TURN = {"max_turns": 1}
SHAPE = TRAIN["single turns"]
Side = Literal["llm-envs", "TRL"]


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        side: Who trains.
        seed: Its seed.
        updates: Gradient steps.
        learning_rate: Of AdamW.
    """

    side: Side
    seed: int
    updates: int
    learning_rate: float


@dataclass(frozen=True)
class Options:
    """How long, and how often."""

    updates: int = 20
    """Gradient steps of each training."""
    learning_rate: float = 3e-4
    """Of AdamW, on both sides."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds; each trains once on both sides."""
    threads: int = 2
    """Intra-op threads."""

    def __post_init__(self) -> None:
        at_least(self, 1, "updates", "threads")


def trained(training: Training) -> dict[str, float]:
    """Train and score; return the seconds of training and the validation score."""
    from agents.policies.models import TINY

    if training.side == "TRL":
        folder = tempfile.mkdtemp()
        needed = SHAPE["prompts"] * training.updates
        prompts, references = questions(needed, first=training.seed * needed, max_turns=1)
        trainer = rloo_trainer(
            prompts,
            references,
            name=str(TINY),
            shape=SHAPE,
            max_steps=training.updates,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant",
            seed=training.seed,
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.save_model(folder)
        agent = _ours(folder, training)
    else:
        agent = _ours("tiny", training)
        began = time.perf_counter()
        for _ in range(training.updates):
            agent.iterate()
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "score": agent.evaluate("validation", episodes=None).score}


def _ours(policy: str, training: Training) -> Any:
    from agents.reinforce import Reinforce

    shape = {name: value for name, value in SHAPE.items() if name != "max_turns"}
    return Reinforce(
        policy,
        ENV,
        env_kwargs=ONE_TURN,
        seed=training.seed,
        device="cpu",
        eval_every=0,
        learning_rate=training.learning_rate,
        **shape,
    )


def run(training: Training, threads: int) -> dict[str, float]:
    """Train in a process of its own.

    Raises:
        SystemExit: It failed, or TRL is not installed.
    """
    code = (
        "import json, sys; from benchmarks.beside_trl import Training, trained; "
        "print(json.dumps(trained(Training(**json.loads(sys.argv[1])))))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asdict(training))],
        capture_output=True,
        text=True,
        check=False,
        env=process_environment(threads),
    )
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["?"]
        hint = (
            " Install the extra: pip install 'llm-envs[bench]'" if "No module" in said[-1] else ""
        )
        raise SystemExit(f"{training.side} failed: {said[-1]}.{hint}")
    return json.loads(ended.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main(options: Options) -> None:
    """Train on both sides and print what came of it."""
    console = Console()
    title = (
        f"{ENV}, first questions, after {options.updates} updates of 128 answers; "
        "validation split, greedy"
    )
    sides: tuple[Side, ...] = ("llm-envs", "TRL")
    untrained = run(Training("llm-envs", 0, 0, 0.0), options.threads)["score"]
    rows = [("(initial policy)", f"{untrained:.3f}", "")]
    found: dict[Side, list[dict[str, float]]] = {side: [] for side in sides}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("trainings", total=2 * len(options.seeds))
        for seed in options.seeds:
            for side in sides:
                training = Training(side, seed, options.updates, options.learning_rate)
                found[side].append(run(training, options.threads))
                progress.advance(task)
    for side, results in found.items():
        seconds = ", ".join(f"{result['seconds']:.0f}" for result in results)
        each = [result["score"] for result in results]
        rows.append((side, cell(each), seconds))
    scores = [[result["score"] for result in found[side]] for side in sides]
    gaps = [ours - theirs for ours, theirs in zip(*scores, strict=True)]
    rows.append(("llm-envs - TRL", cell(gaps), ""))
    header = ("who", "score [95 % t interval over the seeds] (each)", "seconds")
    console.print(Table(title, header, tuple(rows)).rich())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, prog="python -m benchmarks.beside_trl"))
