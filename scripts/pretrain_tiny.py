"""Pretrain the embedded language model on the training splits' text.

The model learns to read passages and to talk; what the rewards want it is never told. A run is
resumed by starting it again with the same ``--work`` folder.

Run: ``python scripts/pretrain_tiny.py --work WORK --minutes 60``, then
``python scripts/pretrain_tiny.py --work WORK --export llm_envs…`` (see ``--help``).
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from induction_init import wire_induction
from pretraining_text import Drills, Segment, Sessions, Summaries, Talk
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.movielens import FilmStatistics, load_movielens
from llm_envs.tasks.recommendation_clicks import candidate_text

END, PAD = "<|end|>", "<|pad|>"
CONTEXT_WEIGHT = 0.15  # of a token that the environment wrote, beside 1 for the assistant's


@dataclass(frozen=True)
class Arguments:
    """What to train, for how long, and where."""

    work: Path
    """Folder of the tokenizer, checkpoints and log; an existing one is continued."""
    minutes: float = 60.0
    """Training time of the whole run, however often it was interrupted."""
    export: Path | None = None
    """Write the trained model there (fp16 safetensors and tokenizer) and stop."""
    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    intermediate: int = 352
    batch_tokens: int = 3072
    learning_rate: float = 2e-3
    muon: float = 0.02
    """Learning rate of Muon on the weight matrices; 0 trains everything with AdamW."""
    warmup: int = 100
    seed: int = 1
    threads: int = 2


def films() -> list[str]:
    """Return every film as a policy reads it, with what all training users think of it."""
    ratings = load_movielens("movielens_small")
    statistics = FilmStatistics.of(ratings)
    nobody = -1  # of no split: nothing is left out of the figures
    counts, means = statistics.for_user(nobody, range(len(ratings.titles)))
    return [
        candidate_text(*film)
        for film in zip(
            ratings.titles,
            ratings.years,
            ratings.genres,
            means.tolist(),
            counts.tolist(),
            strict=True,
        )
    ]


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


Sampler = Callable[[random.Random], list[Segment]]


def encode(segments: list[Segment], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Tokenise each segment by itself, as rollouts do; return ids and loss weights, (length,)."""
    ids: list[int] = []
    weights: list[float] = []
    end = tokenizer.eos_token_id
    for segment, found in zip(
        segments,
        tokenizer([s.text for s in segments], add_special_tokens=False)["input_ids"],
        strict=True,
    ):
        written = [*found, end] if segment.assistant else found
        ids += written
        weights += [1.0 if segment.assistant else CONTEXT_WEIGHT] * len(written)
    return torch.tensor(ids), torch.tensor(weights)


def batches(
    samplers: list[Sampler],
    mixture: Callable[[], list[float]],
    tokenizer: PreTrainedTokenizerFast,
    batch_tokens: int,
    rng: random.Random,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of similar lengths: ids and weights, both (rows, length)."""
    while True:
        drawn = rng.choices(samplers, mixture(), k=256)
        pool = sorted((encode(s(rng), tokenizer) for s in drawn), key=lambda p: len(p[0]))
        pool = [(i[:640], w[:640]) for i, w in pool]
        groups: list[list[tuple[Tensor, Tensor]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            yield (
                pad_sequence([i for i, _ in group], batch_first=True),
                pad_sequence([w for _, w in group], batch_first=True),
            )


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy; right padding needs no mask in a causal model.

    Logits cost as much as a layer, so only a random part of the environment's tokens gets any:
    a token of weight w < 1 counts in full with probability w.
    """
    chosen = torch.rand(ids[:, 1:].shape) < weights[:, 1:]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[chosen]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][chosen])


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al., 2024).

    ``torch.optim.Muon`` is the same in bfloat16, which most CPUs only emulate.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            shapes = {p.shape for p in group["params"]}
            for shape in sorted(shapes):  # matrices of one shape go through together
                same = [p for p in group["params"] if p.shape == shape]
                for p in same:
                    memory = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    memory.lerp_(p.grad, 1 - group["momentum"])
                x = torch.stack(
                    [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in same]
                )
                wide = shape[0] <= shape[1]
                x = x if wide else x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):  # the quintic Newton-Schulz iteration of the reference
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                size = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(same, x if wide else x.mT, strict=True):
                    p.add_(update, alpha=-group["lr"] * size)


def optimizers(model: LlamaForCausalLM, a: Arguments) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on everything else."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    chosen = {id(p) for p in matrices} if a.muon else set()
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=a.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    if not a.muon:
        return [adam]
    return [Muon(matrices, lr=a.muon), adam]


def main(a: Arguments) -> None:
    """Train until the time is used up, checkpointing every two minutes."""
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    console = Console()
    a.work.mkdir(parents=True, exist_ok=True)
    dialogues = load_dialogues(split="train").records
    documents = load_documents(split="train").records
    documents = tuple(d for d in documents if len(d.text) < 1200)
    shown = films()
    talk = Talk(dialogues)
    samplers: list[Sampler] = [talk, Summaries(documents), Sessions(shown), Drills(talk)]
    folder = a.work / "tokenizer"
    if folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        texts_rng = random.Random(a.seed)
        texts = [s.text for f in samplers[:3] for _ in range(6_000) for s in f(texts_rng)]
        tokenizer = train_tokenizer(texts, a.vocabulary)
        tokenizer.save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=a.hidden,
            intermediate_size=a.intermediate,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    wire_induction(model, seed=a.seed)
    count = sum(p.numel() for p in model.parameters())
    console.print(f"{count:,} parameters, {len(tokenizer)} tokens, {len(shown)} films")
    optims = optimizers(model, a)
    spent, tokens, step = 0.0, 0, 0
    checkpoint = a.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        spent, tokens, step = state["spent"], state["tokens"], state["step"]
        console.print(f"continuing at step {step}, after {spent / 60:.1f} minutes")
    if a.export:
        model.half().save_pretrained(a.export)
        tokenizer.save_pretrained(a.export)
        console.print(f"wrote {a.export}")
        return

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optims],
            "spent": spent,
            "tokens": tokens,
            "step": step,
        }
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, checkpoint)

    def mixture() -> list[float]:
        # Drills fade from 35 % to 3 % over the first third.
        drills = 0.03 + 0.32 * max(0.0, 1 - 3 * spent / (a.minutes * 60))
        return [*((1 - drills) * share for share in (0.72, 0.20, 0.08)), drills]

    base = [g["lr"] for o in optims for g in o.param_groups]
    rng = random.Random(f"{a.seed}/{step}")
    stream = batches(samplers, mixture, tokenizer, a.batch_tokens, rng)
    smooth, saved_at = 0.0, spent
    while spent < a.minutes * 60:
        began = time.perf_counter()
        # Flat, then linear to zero over the last 40 % of the time; warm-up counts steps.
        progress = spent / (a.minutes * 60)
        scale = min(1.0, (step + 1) / a.warmup, (1.0 - progress) / 0.4)
        groups = [g for o in optims for g in o.param_groups]
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * scale
        ids, weights = next(stream)
        loss = weighted_loss(model, ids, weights)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"The loss is {loss.item()} at step {step}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + ids.numel()
        spent += time.perf_counter() - began
        smooth = loss.item() if step == 1 else 0.98 * smooth + 0.02 * loss.item()
        if step % 25 == 0:
            row = {"step": step, "minutes": spent / 60, "tokens": tokens, "loss": smooth}
            with (a.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            console.print(
                f"step {step}  {spent / 60:.1f} min  {tokens / spent:,.0f} tokens/s  {smooth:.3f}"
            )
        if spent - saved_at > 120:
            save()
            saved_at = spent
    save()
    (a.work / "arguments.json").write_text(json.dumps(asdict(a), default=str, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
