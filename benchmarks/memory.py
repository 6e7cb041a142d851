"""How much memory an update needs: ``python -m benchmarks.memory``.

Each case is a process of its own that makes a model of random weights and takes the gradient of
REINFORCE's loss on answers of random tokens, once as the agents do and once as a plain loop does,
with all logits of the whole batch at once. What counts is the most memory that the process had in
hand, less what it had with the model, its gradients and the answers (Linux only).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import track

from benchmarks.tables import Table

PROMPT = 64
"""Tokens before every answer; no two prompts are alike."""


@dataclass(frozen=True)
class Case:
    """One update.

    Attributes:
        vocabulary: Tokens that the model knows.
        answers: How many there are.
        length: Tokens of each.
        way: ``"agents"``; or ``"plain"``, one pass with all its logits.
    """

    vocabulary: int
    answers: int
    length: int
    way: Literal["agents", "plain"] = "agents"

    @property
    def logits_bytes(self) -> int:
        """Size of all logits of the batch in float32, prompts included."""
        return 4 * self.vocabulary * self.answers * (PROMPT + self.length)


CASES = tuple(
    Case(vocabulary, answers, length)
    for vocabulary in (4_096, 49_152)
    for answers, length in ((16, 64), (64, 64), (16, 256))
)


def _peak() -> int:
    """Return the most bytes that this process has had in hand since ``_forget_peak``."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def update(case: Case) -> int:
    """Take one gradient; return the bytes that it needed beyond what was there before."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from agents import objectives
    from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
    from agents.policies.models import TINY
    from agents.sampling import Completion

    torch.manual_seed(0)
    model: Any = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=case.vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
        )
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(1, case.vocabulary, (case.answers, PROMPT + case.length))

    def plain(rows: torch.Tensor) -> torch.Tensor:
        log_probs = model(input_ids=rows).logits[:, PROMPT - 1 : -1].log_softmax(-1)
        found: torch.Tensor = log_probs.gather(-1, rows[:, PROMPT:, None]).flatten()
        return found

    policy = CausalLMPolicy(model, AutoTokenizer.from_pretrained(TINY))
    sequences = []
    for row, tokens in enumerate(ids.tolist()):
        sequence = TokenSequence(row)
        sequence.read(tokens[:PROMPT])
        sequence.wrote(0, Completion(tokens[PROMPT:], [0.0] * case.length, False))
        sequences.append(sequence)
    # A first, small one makes what is made once: threads, workspaces, imports.
    plain(ids[:1, : PROMPT + 2]).sum().backward()  # type: ignore[no-untyped-call]
    policy.score(sequences[:1]).log_probs.sum().backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=False)

    _forget_peak()
    before = _peak()
    groups = [[*range(case.answers)]] if case.way == "plain" else policy.micro_batches(sequences)
    for members in groups:
        if case.way == "plain":
            log_probs = plain(ids)
        else:
            scores = policy.score([sequences[i] for i in members])
            log_probs = scores.log_probs
        loss = objectives.reinforce_loss(log_probs, torch.ones_like(log_probs), case.answers)
        if case.way == "agents":  # they go through the entropies, whatever weighs them
            loss = loss - 0.0 * scores.entropies.sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return _peak() - before


def measured(case: Case) -> int | None:
    """Measure one case in a process of its own; ``None`` if it died (of too much memory)."""
    code = (
        "import json, sys; from benchmarks.memory import Case, update; "
        "print(update(Case(**json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    # Memory that is freed goes back to the system, as it does by default.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC")}
    environment = {**kept, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode > 0:
        raise RuntimeError(ended.stderr[-2000:])
    return int(ended.stdout) if ended.returncode == 0 else None


@dataclass(frozen=True)
class Options:
    """What to print."""

    markdown: bool = False
    """Print Markdown."""


COLUMNS = ("vocabulary", "answers", "tokens of each", "all logits, MB", "agents, MB", "plain, MB")


def rows(cases: Sequence[Case], console: Console) -> list[tuple[str, ...]]:
    """Measure cases both ways; return the table's lines."""
    found = []
    for case in track(cases, "updates", console=console, transient=True):
        ours, plain = (
            measured(Case(case.vocabulary, case.answers, case.length, way))
            for way in ("agents", "plain")
        )
        sizes = (case.logits_bytes, ours, plain)
        numbers = (case.vocabulary, case.answers, case.length)
        found.append(
            (
                *(f"{number:,}" for number in numbers),
                *("out of memory" if size is None else f"{size / 2**20:,.0f}" for size in sizes),
            )
        )
    return found


def main(options: Options) -> None:
    """Measure and print."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("This reads /proc/self/clear_refs, which only Linux has.")
    lines = rows(CASES, Console(stderr=True))
    title = "Memory of one update beyond the model and its gradients"
    table = Table(title, COLUMNS, tuple(lines), numbers=len(COLUMNS))
    if options.markdown:
        print(table.markdown())
    else:
        Console().print(table.rich())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, prog="python -m benchmarks.memory"))
