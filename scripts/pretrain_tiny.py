"""Pretrain the embedded language model on the training splits' text.

The model learns to read passages and to talk; what the rewards want it is never told. A run is
resumed by starting it again with the same ``--work`` folder.

Small transformers copy soon and find out late, often never within an hour, *where* an answer
stands. So one head is told: while a value is said, it has to look at the place of the next token
in the passage, by a cross-entropy on its attention (as Liu et al., 2016, "Neural Machine
Translation with Supervised Attention", did for alignments). Nothing else of the model is special.

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
from typing import NamedTuple

import torch
import tyro
from pretraining_text import Segment, Sessions, Summaries, Talk
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.movielens import FilmStatistics, load_movielens
from llm_envs.tasks.recommendation_clicks import candidate_text

END, PAD = "<|end|>", "<|pad|>"
WEIGHTS = {"environment": 0.1, "manner": 0.3, "value": 1.0, "slip": 0.0}  # of a token in the loss
MIXTURE = (0.62, 0.30, 0.08)  # dialogues, summaries, film sessions
LONGEST = 640  # tokens of a sample; what follows is cut off


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
    hidden: int = 192
    layers: int = 4
    heads: int = 3
    intermediate: int = 512
    pointer_layer: int = 2
    """The layer whose first head is told where values stand."""
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


class Encoded(NamedTuple):
    """A conversation in tokens.

    Attributes:
        ids: (length,) token ids.
        weights: (length,) their weights in the loss.
        pointers: (pairs, 2): a position that guesses a value's next token, and a place where
            that token stands in the first segment.
    """

    ids: Tensor
    weights: Tensor
    pointers: Tensor


def encode(segments: list[Segment], tokenizer: PreTrainedTokenizerFast) -> Encoded:
    """Tokenise each segment by itself, as rollouts do."""
    ids: list[int] = []
    weights: list[float] = []
    pointers: list[tuple[int, int]] = []
    found = tokenizer([s.text for s in segments], add_special_tokens=False)["input_ids"]
    passage, before = found[0], ""
    for segment, tokens in zip(segments, found, strict=True):
        if segment.kind == "value":
            width = len(tokens)
            starts = [k for k in range(len(passage)) if passage[k : k + width] == tokens]
            first = len(ids) - 1
            pointers += [(first + j, k + j) for j in range(width) for k in starts]
        written = [*tokens, tokenizer.eos_token_id] if segment.ends else tokens
        ids += written
        weights += [WEIGHTS[segment.kind]] * len(written)
        if segment.kind in ("manner", "value") and before == "environment":
            weights[-len(written)] = 1.0  # or bare values would be overheard most
        before = segment.kind
    kept = [p for p in pointers if p[0] < LONGEST - 1]
    return Encoded(
        torch.tensor(ids[:LONGEST]),
        torch.tensor(weights[:LONGEST]),
        torch.tensor(kept, dtype=torch.long).view(-1, 2),
    )


def pad_together(group: list[Encoded]) -> Encoded:
    """Make one batch: ids and weights (rows, length), pointers (pairs, 3) with the row first."""
    rows = [torch.full((len(e.pointers), 1), i) for i, e in enumerate(group)]
    return Encoded(
        pad_sequence([e.ids for e in group], batch_first=True),
        pad_sequence([e.weights for e in group], batch_first=True),
        torch.cat([torch.cat([r, e.pointers], 1) for r, e in zip(rows, group, strict=True)]),
    )


def batches(
    samplers: list[Sampler],
    tokenizer: PreTrainedTokenizerFast,
    batch_tokens: int,
    rng: random.Random,
) -> Iterator[Encoded]:
    """Yield batches of similar lengths."""
    while True:
        drawn = rng.choices(samplers, MIXTURE, k=256)
        pool = sorted((encode(s(rng), tokenizer) for s in drawn), key=lambda e: len(e.ids))
        groups: list[list[Encoded]] = [[]]
        for encoded in pool:
            if (len(groups[-1]) + 1) * len(encoded.ids) > batch_tokens:
                groups.append([])
            groups[-1].append(encoded)
        rng.shuffle(groups)
        yield from map(pad_together, groups)


def losses(model: Qwen3ForCausalLM, batch: Encoded, layer: int) -> tuple[Tensor, Tensor]:
    """Return the weighted cross-entropy, and that of the pointing head's attention.

    Right padding needs no mask in a causal model. Logits cost as much as a layer, so a token of
    weight w counts in full with probability w, and gets no logits otherwise.
    """
    ids = batch.ids
    chosen = torch.rand(ids[:, 1:].shape) < batch.weights[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model(input_ids=ids[:, :-1], use_cache=False, output_attentions=True)
        logits = model.lm_head(out.last_hidden_state[chosen])
    said = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][chosen])
    row, at, place = batch.pointers.T
    if not len(row):
        return said, said.new_zeros(())
    # A value that stands in several places may be looked up in any of them.
    _, owner = torch.unique(row * LONGEST + at, return_inverse=True)
    attention = out.attentions[layer][row, 0, at, place].float()
    pointed = attention.new_zeros(int(owner.max()) + 1).index_add(0, owner, attention)
    return said, -pointed.clamp_min(1e-6).log().mean()


@torch.no_grad()
def lookup_accuracy(model: Qwen3ForCausalLM, batches: list[Encoded]) -> float:
    """Share of the value tokens told in passages that the model finds likeliest after those before.

    The pointers say which tokens these are; weights would not, for the first token of a manner
    weighs as much.
    """
    right = count = 0
    for batch in batches:
        row, at = batch.pointers[:, :2].unique(dim=0).T
        guessed = model(batch.ids).logits.argmax(-1)
        right += int((guessed[row, at] == batch.ids[row, at + 1]).sum())
        count += len(row)
    return right / count


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


def optimizers(model: Qwen3ForCausalLM, a: Arguments) -> list[torch.optim.Optimizer]:
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
    samplers: list[Sampler] = [talk, Summaries(documents), Sessions(shown)]
    folder = a.work / "tokenizer"
    if folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        texts_rng = random.Random(a.seed)
        texts = [s.text for f in samplers for _ in range(6_000) for s in f(texts_rng)]
        tokenizer = train_tokenizer(texts, a.vocabulary)
        tokenizer.save_pretrained(folder)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=a.hidden,
            intermediate_size=a.intermediate,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
            num_key_value_heads=a.heads,
            head_dim=64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
    )
    model.set_attn_implementation("eager")  # the only one that shows its attention
    count = sum(p.numel() for p in model.parameters())
    console.print(f"{count:,} parameters, {len(tokenizer)} tokens, {len(shown)} films")
    optims = optimizers(model, a)
    base = [g["lr"] for o in optims for g in o.param_groups]  # a checkpoint holds decayed ones
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

    rng = random.Random(f"{a.seed}/{step}")
    stream = batches(samplers, tokenizer, a.batch_tokens, rng)
    unseen = Talk(load_dialogues(split="validation").records)
    shown_once = [unseen.retell(d, random.Random(i)) for i, d in enumerate(unseen.dialogues)]
    watched = [pad_together([encode(s, tokenizer)]) for s in shown_once]
    smooth, saved_at = math.nan, spent
    while spent < a.minutes * 60:
        began = time.perf_counter()
        # Flat, then linear to zero over the last 40 % of the time; warm-up counts steps.
        progress = spent / (a.minutes * 60)
        scale = min(1.0, (step + 1) / a.warmup, (1.0 - progress) / 0.4)
        groups = [g for o in optims for g in o.param_groups]
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * scale
        batch = next(stream)
        said, pointed = losses(model, batch, a.pointer_layer)
        loss = said + pointed
        if not math.isfinite(loss.item()):
            raise SystemExit(f"The loss is {loss.item()} at step {step}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad()
        step, tokens = step + 1, tokens + batch.ids.numel()
        spent += time.perf_counter() - began
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        if step % 25 == 0:
            row = {
                "step": step,
                "minutes": spent / 60,
                "tokens": tokens,
                "loss": smooth,
                "pointer": pointed.item(),
            }
            if step % 500 == 0:
                row["lookup_validation"] = lookup_accuracy(model, watched)
            with (a.work / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            console.print(" ".join(f"{k} {v:,.3f}" for k, v in row.items()), soft_wrap=True)
        if spent - saved_at > 120:
            save()
            saved_at = spent
    save()
    (a.work / "arguments.json").write_text(json.dumps(asdict(a), default=str, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
