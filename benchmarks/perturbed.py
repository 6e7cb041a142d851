"""What perturbed questions cost a policy: ``python -m benchmarks.perturbed RUN …``.

The policies are those that runs of ``agents.train`` on DialogueQA ended with (the checkpoint that
validation chose), and the one that they began with. Each answers the same episodes, as they are and
perturbed; differences are paired. The adversary of the last column sees the policy: of 8
perturbations it takes the one that makes the policy's own greedy answer least likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track

from agents.evaluation import Evaluation, evaluate
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.runs import read_config
from agents.sampling import Completion, SamplingConfig
from agents.settings import at_least
from benchmarks.tables import Table
from llm_envs.wrappers import AugmentedVectorText

ENV: Final = "DialogueQA-v0"
ALL: Final = {"typos": 0.5, "paraphrase": 1.0, "distractors": 2}
CONDITIONS: Final[dict[str, dict[str, Any]]] = {
    "clean": {},
    "typos 0.5": {"typos": 0.5},
    "paraphrase 1": {"paraphrase": 1.0},
    "distractors 2": {"distractors": 2},
    "all three": ALL,
    "all, worst of 8": {**ALL, "candidates": 8},
}
"""Column -> how questions are perturbed."""


@dataclass(frozen=True)
class Arguments:
    """Whom to ask, and how often."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    split: Literal["validation", "test"] = "validation"
    """Split that is played."""
    episodes: int = 100
    """Episodes, evenly spaced over the split."""
    threads: int = 1
    """Intra-op threads of torch."""

    def __post_init__(self) -> None:
        at_least(self, 1, "episodes", "threads")
        if not self.runs:
            raise ValueError("Name one or more run folders of python -m agents.train.")


class Adversary:
    """Says how unlikely conversations make a policy's own answer; the more, the worse.

    Args:
        policy: A policy that reads text as it stands.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.policy = policy
        self.greedy = SamplingConfig(policy.sampling.max_new_tokens, temperature=0.0)

    @torch.no_grad()
    def __call__(self, conversations: Sequence[str]) -> list[float]:
        """Return -log p(answer | conversation), the answer being the greedy one to the first."""
        answer = self.policy.begin(self.greedy).act({0: conversations[0]}, 0)[0]
        texts = [*conversations, answer]
        *asked, said = self.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
        said = [*said, self.policy.end]
        sequences = []
        for row, ids in enumerate(asked):
            sequence = TokenSequence(row)
            sequence.read(ids[-(self.policy.context - len(said)) :])
            sequence.wrote(0, Completion(said, [0.0] * len(said), cut=False))
            sequences.append(sequence)
        log_probs = self.policy.score(sequences).log_probs
        return (-log_probs.view(len(asked), len(said)).sum(1)).tolist()


def answers(policy: CausalLMPolicy, condition: str, a: Arguments) -> Evaluation:
    """Return what a policy scores, greedy, under a condition."""
    perturbations = CONDITIONS[condition]
    if "candidates" in perturbations:
        perturbations = {**perturbations, "adversary": Adversary(policy)}
    greedy = SamplingConfig(policy.sampling.max_new_tokens, temperature=0.0)
    return evaluate(
        lambda: policy.begin(greedy),
        ENV,
        split=a.split,
        episodes=a.episodes,
        wrap=(lambda envs: AugmentedVectorText(envs, **perturbations)) if perturbations else None,
    )


def cells(found: dict[str, Evaluation]) -> list[str]:
    """Return scores, and beside those of perturbed questions the paired difference to clean."""
    told = [f"{found['clean'].score:.3f}"]
    for condition, evaluation in found.items():
        if condition != "clean":
            gain, low, high = evaluation.gain_over(found["clean"])
            told.append(f"{evaluation.score:.3f} ({gain:+.3f} [{low:+.3f}, {high:+.3f}])")
    return told


def policies(runs: Sequence[Path]) -> dict[str, tuple[str | Path, int]]:
    """Return who is asked: name -> folder or name of the policy, and how long its answers may be.

    Raises:
        ValueError: A folder holds no run, or one on another environment.
    """
    found: dict[str, tuple[str | Path, int]] = {}
    for run in runs:
        config = read_config(run)
        if config["env"] != ENV or "max_new_tokens" not in config["settings"]:
            raise ValueError(
                f"{run} is a run of {config['agent']} on {config['env']}. Name runs of a language "
                f"model on {ENV}."
            )
        length = int(config["settings"]["max_new_tokens"])
        found.setdefault(f"(initial: {Path(config['policy']).name})", (config["policy"], length))
        found[run.resolve().name] = (run / "checkpoints" / "best" / "policy", length)
    return found


def main() -> None:
    """Ask, and print."""
    try:
        a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.perturbed")
        known = policies(a.runs)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    torch.set_num_threads(a.threads)
    console = Console(stderr=True)
    found: dict[str, dict[str, Evaluation]] = {}
    for name, (folder, length) in known.items():
        policy = CausalLMPolicy.from_pretrained(str(folder), sampling=SamplingConfig(length))
        conditions = track(CONDITIONS, f"Asking {name}", console=console, transient=True)
        found[name] = {condition: answers(policy, condition, a) for condition in conditions}
    rows = [(name, *cells(each)) for name, each in found.items()]
    learned = [each for name, each in found.items() if not name.startswith("(")]
    if len(learned) > 1:
        means = (np.mean([each[c].score for each in learned]) for c in CONDITIONS)
        rows.append(("mean of the runs", *(f"{mean:.3f}" for mean in means)))
    title = f"{ENV}, {a.split} split, {a.episodes} episodes, greedy"
    table = Table(title, ("policy", *CONDITIONS), tuple(rows))
    Console().print(table.markdown(), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
