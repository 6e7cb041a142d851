"""Adapt a policy to a domain before it learns by reward: language-model training goes on.

The policy reads texts of the domain and learns to go on with them, token by token; nothing tells it
what a reward wants. Part of the texts is held out, and the weights that find it likeliest are kept.
What comes out is a folder that --policy takes.

--data is one of
- a folder, with all folders in it, or a file: .txt and .md are a text each, .jsonl has a "text" on
  each line, or "messages" ([{"role": "user", "content": "…"}, …]), which are laid out as policies
  read conversations; lines with another "split" than "train" are left out;
- an embedded set of documents or dialogues (python_docstrings, debian_packages,
  countries_wordnet): the texts of its training split, without summaries and questions;
- the embedded faqs: question and whole answer of each of its training split, as an FAQ has them
  (CustomerService-v0 accepts their first sentences: here language modelling is near imitation);
- env:ID, an environment: what is said first in each example of its training split. Accepted
  answers are never read; to imitate them, use --agent supervised of agents.train.

The same command again goes on with what was stopped or killed, bit for bit.

Examples:
  python -m agents.pretrain --data python_docstrings --out models/docstrings
  python -m agents.pretrain --data notes/ --policy models/SmolLM2-135M-Instruct --lora-rank 16
  python -m agents.train --env Summarization-v0 --policy models/docstrings
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from agents.launch import fail
from agents.settings import MICRO_BATCH_TOKENS, at_least


@dataclass(frozen=True)
class Arguments:
    """What to train, on what, and for how long."""

    data: str
    """Folder, file, embedded set, or env:ID; see above."""
    policy: str = "tiny"
    """Language model: "tiny" (embedded), a folder, or a hub id."""
    out: Path = Path("models/adapted")
    """Folder to write, new or empty, or to go on with."""
    epochs: int = 5
    """Times that every text is read."""
    steps: int | None = None
    """Updates, instead of --epochs."""
    learning_rate: float = 5e-4
    """Of AdamW: it rises for a twentieth of the updates, then falls to 0 as a cosine does."""
    weight_decay: float = 0.01
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm."""
    batch_tokens: int = 4096
    """Most tokens of an update, padding included."""
    micro_batch_tokens: int = MICRO_BATCH_TOKENS
    """Most tokens of one forward pass."""
    max_length: int = 512
    """Longer texts are cut into pieces of so many tokens."""
    held_out: float = 0.1
    """Share of the texts to measure on."""
    evaluations: int = 10
    """Measurements, evenly spaced; each writes a checkpoint."""
    env_kwargs: str = "{}"
    """Further arguments of env:ID as JSON, e.g. '{"dataset": "python_docstrings"}'."""
    lora_rank: int = 0
    """Train adapters of this rank only; 0 trains all weights. (Extra: llm-envs[lora].)"""
    autocast: Literal["auto", "bf16", "none"] = "auto"
    """Forward passes in bfloat16; auto: on CUDA devices that have it."""
    gradient_checkpointing: bool = False
    """Less memory, about a third more time."""
    seed: int = 0
    """Seed of the order of the batches."""
    threads: int | None = None
    """Intra-op threads of torch; None leaves it."""
    device: str = "auto"
    """Device: auto, cpu, cuda, mps."""

    def __post_init__(self) -> None:
        at_least(self, 1, "epochs", "batch_tokens", "micro_batch_tokens", "evaluations")
        at_least(self, 1, "steps", "threads")
        at_least(self, 2, "max_length")
        at_least(self, 0, "weight_decay", "lora_rank", "seed")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give more than 0.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; give a share between 0 and 1.")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and adapt; a mistake in it is told in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        a = tyro.cli(Arguments, args=words, description=__doc__, prog="python -m agents.pretrain")
        # They take seconds to import, and who asks for help need not wait for them.
        from transformers.utils import logging

        from agents.pretraining import pretrain

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        result = pretrain(a, Console())
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        fail(str(error), error)
    except KeyboardInterrupt as error:
        fail("Interrupted. The same command goes on from the last measurement.", error, code=130)
    before, after = result["perplexity"]["before"], result["perplexity"]["after"]
    Console().print(
        f"Perplexity of what was held out: {before:.2f} before, {after:.2f} after "
        f"{result['best_step']:,} of {result['steps']:,} updates, the best of all measurements.\n"
        f"To train it by reward: python -m agents.train --policy {a.out} --env …",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
