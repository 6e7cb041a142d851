"""Language-model training of a policy from end to end, on texts of a domain.

The command line, :mod:`agents.pretrain`, imports this once its arguments have been parsed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

import llm_envs
from agents import runs
from agents.checkpoints import (
    checkpoint_folder,
    has_checkpoint,
    moments,
    replacing,
    restore_moments,
)
from agents.flags import check_device, parse_env_kwargs
from agents.policies.causal_lm import CausalLMPolicy
from agents.policies.lora import Lora
from agents.policies.models import Passes, bfloat16_wanted, in_chunks, pad_right, read
from agents.sampling import at_least_float32
from agents.texts import Row, batches, encode, hold_out, load_texts

if TYPE_CHECKING:
    from agents.pretrain import Arguments

ARGUMENTS_FILE, RESULT_FILE = "pretraining.json", "result.json"


def negative_log_likelihood(policy: CausalLMPolicy, rows: Sequence[Row]) -> Tensor:
    """Return -Σ log p(x_t | x_<t) over all tokens of all rows but the first of each, a scalar.

    Rows are filled up on the right. That needs no mask in a causal model: no token sees what comes
    after it, and what was filled up is no target.
    """
    ids = pad_right(rows, policy.pad).to(policy.device)
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    real = torch.arange(1, ids.shape[1], device=policy.device) < lengths[:, None]
    reading = read(policy.model, policy.parts, policy.passes, input_ids=ids[:, :-1])

    def losses(places: Tensor, targets: Tensor) -> tuple[Tensor]:
        logits = at_least_float32(reading.logits(places))
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none"),)

    places, targets = real.flatten().nonzero()[:, 0], ids[:, 1:][real]
    return in_chunks(losses, places, targets, vocabulary=policy.vocabulary)[0].sum()


def predicted(rows: Sequence[Row]) -> int:
    """Return the number of tokens that the likelihood of rows is a product over."""
    return sum(len(row) - 1 for row in rows)


@torch.no_grad()
def perplexity(policy: CausalLMPolicy, rows: Sequence[Row], most_tokens: int) -> float:
    """Return exp of the mean negative log-likelihood of a token."""
    parts = batches(rows, most_tokens, [0])
    total = sum(negative_log_likelihood(policy, part).item() for part in parts)
    return math.exp(total / predicted(rows))


def scale(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then a cosine to 0."""
    warmup = math.ceil(steps / 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


class Training:
    """A policy in training.

    Args:
        a: The arguments.
        checkpoint: Where to go on, what ``save`` wrote; ``None`` begins.
    """

    def __init__(self, a: Arguments, checkpoint: Path | None) -> None:
        self.a = a
        lora = Lora(a.lora_rank, 2.0 * a.lora_rank, a.seed) if a.lora_rank else None
        name, start = (checkpoint / "policy", None) if checkpoint else (a.policy, lora)
        self.policy = CausalLMPolicy.from_pretrained(
            name, device=a.device, lora=start, merge=lora is None
        )
        in_bfloat16 = bfloat16_wanted(a.autocast, self.policy.device)
        self.policy.passes = Passes(in_bfloat16, a.gradient_checkpointing)
        self.parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                f"--policy {a.policy} has no weights that can be trained (those in 8 bits cannot). "
                "Give the policy that it was made from."
            )
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=a.learning_rate, betas=(0.9, 0.98), weight_decay=a.weight_decay
        )
        self.state: dict[str, Any] = {"step": 0, "before": None, "best": None, "best_step": 0}
        if checkpoint is None:
            return
        self.state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        restore_moments(self.optimizer, load_file(checkpoint / "moments.safetensors"))

    def update(self, batch: list[Row], steps: int) -> dict[str, float]:
        """Take one of so many steps on the mean loss of a batch's tokens.

        Raises:
            FloatingPointError: The loss or its gradient is not finite.
        """
        total = 0.0
        self.optimizer.zero_grad()
        for rows in batches(batch, self.a.micro_batch_tokens, [0]):
            loss = negative_log_likelihood(self.policy, rows) / predicted(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.a.max_grad_norm).item()
        if not math.isfinite(total + norm):
            raise FloatingPointError(
                f"At step {self.state['step']} the loss is {total} and its gradient's norm {norm}. "
                "Begin anew in another --out, with a smaller --learning-rate or --autocast none."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.a.learning_rate * scale(self.state["step"], steps)
        self.optimizer.step()
        self.state["step"] += 1
        return {"train/loss": total, "train/grad_norm": norm}

    def measure(self, held: Sequence[Row], best: Path) -> dict[str, float]:
        """Measure on what is held out; the best policy so far is written."""
        found = perplexity(self.policy, held, self.a.micro_batch_tokens)
        if not math.isfinite(found):
            raise FloatingPointError(
                f"At step {self.state['step']} the perplexity on what is held out is {found}. "
                "Look at the policy's weights, or give --autocast none."
            )
        if self.state["best"] is None or found < self.state["best"]:
            with replacing(best) as fresh:
                self.policy.save_pretrained(fresh)
            self.state |= {"best": found, "best_step": self.state["step"]}
        return {"eval/perplexity": found}

    def save(self, folder: Path) -> None:
        """Write all that resuming needs; a crash leaves the old checkpoint or the new one."""
        stored = {key: t.contiguous().cpu() for key, t in moments(self.optimizer).items()}
        with replacing(folder) as fresh:
            self.policy.save_pretrained(fresh / "policy")
            save_file(stored, fresh / "moments.safetensors")
            runs.write_json(fresh / "state.json", self.state)


def pretrain(a: Arguments, console: Console) -> dict[str, Any]:
    """Do the whole job, or what is left of it; return what ``result.json`` holds.

    Raises:
        ValueError: An argument is impossible, or the folder holds something else.
        OSError: The folder cannot be written.
        FloatingPointError: The loss or its gradient is not finite.
    """
    check_device(a.device)
    if a.threads is not None:
        torch.set_num_threads(a.threads)
    texts = load_texts(a.data, parse_env_kwargs(a.env_kwargs))
    runs.make(a.out)
    with runs.locked(a.out):
        _claim(a, texts.digest)
        if (done := a.out / RESULT_FILE).is_file():
            return json.loads(done.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        last, best = (a.out / "training" / name for name in ("last", "best"))
        training = Training(a, checkpoint_folder(last) if has_checkpoint(last) else None)
        policy, state = training.policy, training.state
        pieces = encode(texts, policy.tokenizer, min(a.max_length, policy.context))
        rows, held = hold_out(pieces, a.held_out)
        written = training.parameters if a.lora_rank else policy.model.parameters()
        runs.prepare(a.out, needed_bytes=10 * sum(p.nbytes for p in written))
        per_epoch = len(batches(rows, a.batch_tokens, [a.seed]))
        steps = a.steps or a.epochs * per_epoch
        due = {round(steps * k / a.evaluations) for k in range(1, a.evaluations + 1)}
        log = a.out / "metrics.jsonl"
        if state["step"] == 0:
            metrics = [{"step": 0, **training.measure(held, best)}]
            state["before"] = state["best"]
        else:  # what was logged after the checkpoint is made again
            metrics = [m for m in runs.read_metrics(log) if m["step"] <= state["step"]]
        runs.write_text(log, "".join(json.dumps(m) + "\n" for m in metrics))
        order: list[list[Row]] = []
        with log.open("ab", buffering=0) as file, Progress(console=console, transient=True) as bars:
            bar = bars.add_task("Reading", total=steps, completed=state["step"])
            for step in range(state["step"], steps):
                epoch, place = divmod(step, per_epoch)
                if place == 0 or not order:
                    order = batches(rows, a.batch_tokens, [a.seed, epoch])
                row = {"step": step + 1, **training.update(order[place], steps)}
                if measured := step + 1 in due:
                    row |= training.measure(held, best)
                runs.append(file, (json.dumps(row) + "\n").encode())
                if measured:
                    training.save(last)
                bars.update(bar, completed=step + 1, description=f"Best {state['best']:.2f}")
        shutil.copytree(checkpoint_folder(best, "tokenizer_config.json"), a.out, dirs_exist_ok=True)
        result = {
            "version": llm_envs.__version__,
            "texts": len(pieces),
            "trained_tokens": predicted(rows),
            "held_out_tokens": predicted(held),
            "steps": steps,
            "best_step": state["best_step"],
            "perplexity": {"before": state["before"], "after": state["best"]},
        }
        runs.write_json(done, result)
        shutil.rmtree(a.out / "training")
        return result


def _claim(a: Arguments, digest: str) -> None:
    """Write into a new folder what is done there; refuse one that holds something else.

    Raises:
        ValueError: It does, or the run there was begun with other arguments.
    """
    path = a.out / ARGUMENTS_FILE
    given = dataclasses.asdict(a) | {"out": None, "device": None, "texts": digest}
    given["threads"] = torch.get_num_threads()  # it changes rounding
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if changed := sorted(name for name in given if given[name] != begun.get(name)):
            name = changed[0]
            raise ValueError(
                f"{a.out} was begun with {name} {begun.get(name)!r}, and now it is "
                f"{given[name]!r}. To go on, give the same; else choose another --out."
            )
    elif any(a.out.iterdir()):
        raise ValueError(f"{a.out} is not empty, and holds no run. Choose another --out.")
    else:
        runs.write_json(path, given)
