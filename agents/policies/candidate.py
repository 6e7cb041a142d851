"""A causal language model or an encoder as a policy that chooses one of k texts."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from agents.objectives import entropy, kl_divergence
from agents.policies.lora import (
    BASE_FOLDER,
    AdapterOff,
    Lora,
    has_adapter,
    read_pointer,
    write_pointer,
)
from agents.policies.models import (
    Critic,
    Parts,
    Passes,
    Question,
    Scores,
    attention_window,
    bfloat16,
    branch_mask,
    context_length,
    folder_of,
    in_chunks,
    is_encoder,
    layers_recomputed,
    load_model,
    names_encoder,
    pad_right,
    read,
    save_model,
    split_model,
    without_adapter,
)
from agents.policies.scalar_head import ScalarModel, has_scalar_head, load_scalar_model
from agents.sampling import at_least_float32, draw
from agents.settings import MICRO_BATCH_TOKENS

REPLY_FILE = "reply.json"
NO_ADAPTER_BENEATH_A_HEAD: Final = (
    "LoRA adapters go on causal language models, and this policy has a scalar head. Leave "
    "lora_rank out: every weight is trained then."
)


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice: what was read, and what was chosen.

    Attributes:
        row: Which episode of the rollout it belongs to.
        turn: Which turn of it.
        prompt: Token ids of the prompt.
        candidates: Token ids of each candidate.
        action: Index of the chosen candidate.
        log_prob: Its log-probability when it was sampled.
        base: What the base model says of each candidate; empty without one.
    """

    row: int
    turn: int
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    action: int
    log_prob: float
    base: tuple[float, ...] = ()

    @property
    def question(self) -> Question:
        """What was to be decided; the members of a group often have the same."""
        return self.prompt, self.candidates

    @property
    def turns(self) -> list[int]:
        """The turn, as a sequence with one decision."""
        return [self.turn]

    @property
    def log_probs(self) -> list[float]:
        """The log-probability, as a sequence with one decision."""
        return [self.log_prob]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.candidates))


class CandidatePolicy:
    """Chooses among texts by what a causal language model or an encoder thinks of each.

    The logit of a candidate is read off the model in one of four ways:

    - with ``reply``, log p(reply | prompt, candidate): how likely the model thinks it that the
      user answers this candidate with that reply ("I liked it.");
    - with a ``base``, log p(candidate | prompt) - log p_base(candidate | prompt): how much likelier
      than a model that never changes. The model that training begins with as the base makes the
      first policy uniform, and what is learned shows in every token of a text: the implicit
      reward of Rafailov et al. (2023), "Direct Preference Optimization", eq. 5;
    - with a scalar ``head``, a number that a linear layer makes of the hidden state: learned from
      zero, so that the first policy is uniform. BERT-like encoders, which have no likelihood, are
      scored in this way alone, pair by pair; see :mod:`agents.policies.scalar_head`;
    - without any, the mean log-probability of the candidate's own tokens after the prompt.

    All k candidates are read in one row: the prompt once, then the candidates beside each other,
    each seeing the prompt and itself only and taking the positions that follow the prompt. The
    order of the candidates therefore changes nothing.

    Args:
        model: A causal language model or an encoder of ``transformers``, or a ``ScalarModel``.
        tokenizer: Its tokenizer.
        reply: What the user would say to a good candidate.
        base: A causal language model with the same tokenizer; or the model itself with its adapter
            switched off.
        head: ``"scalar"`` puts a scalar head on the model's trunk. An encoder gets one anyway.
        temperature: Divides the logits when sampling; 0 takes the best candidate.
        seed: Seed of the sampling.
        micro_batch_tokens: Most tokens, padding included, in one forward pass.

    Attributes:
        passes: How forward passes are made.
    """

    family = "choosing"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        reply: str | None = None,
        base: Any = None,
        head: Literal["scalar"] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    ) -> None:
        if head not in (None, "scalar"):
            raise ValueError(f"head is {head!r}; there is 'scalar', or None.")
        self.scalar = head == "scalar" or isinstance(model, ScalarModel) or is_encoder(model.config)
        if sum((bool(reply), base is not None, self.scalar)) > 1:
            raise ValueError(
                "A reply, a base and a scalar head are three ways of scoring; give one of them. "
                "(An encoder has no likelihood, so it always has the head.)"
            )
        if base is model:
            raise ValueError(
                "The base is the very model that is to be trained, so no candidate could ever be "
                "told from another. Give a copy of it: copy.deepcopy(model)."
            )
        if self.scalar and not isinstance(model, ScalarModel):
            model = ScalarModel(model, tokenizer)
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; use 0 (the best candidate) or more.")
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.micro_batch_tokens = micro_batch_tokens
        self.reply_text = reply
        self.reply: tuple[int, ...] = tuple(self._encode([reply])[0]) if reply else ()
        self.parts = split_model(model)
        self.passes = Passes()
        self.base = base
        self.base_parts: Parts = None
        if isinstance(base, AdapterOff):
            self.base, self.base_parts = without_adapter(model, self.parts)
        elif base is not None:
            self.base_parts = split_model(base.requires_grad_(False))
        self.pad: int = tokenizer.pad_token_id or 0
        # Within the shortest window of attention all layers see the same.
        self.context: int = (
            model.context
            if self.scalar
            else min(context_length(model), attention_window(model) or 2**31)
        )
        self.truncated_prompts = 0
        self.read_tokens = 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        device: str = "auto",
        dtype: str = "float32",
        relative: bool = False,
        lora: Lora | None = None,
        merge: bool = True,
        head: Literal["scalar"] | None = None,
        **arguments: Any,
    ) -> CandidatePolicy:
        """Load a model: ``"tiny"`` (embedded), a hub id, or a folder.

        Args:
            name: What to load. A folder that ``save_pretrained`` wrote tells base, reply and head
                too.
            device: ``"auto"`` or a torch device.
            dtype: Name of a torch dtype.
            relative: Whether the model as it is now becomes the base, if the folder does not tell
                how candidates are scored.
            lora: A new adapter to put on the model.
            merge: What becomes of an adapter in the folder; see :func:`load_model`.
            head: ``"scalar"`` for a scalar head on a causal model; an encoder has one anyway.
            **arguments: Arguments of the policy.

        Raises:
            ValueError: An adapter is wanted beneath a scalar head.
        """
        if head == "scalar" or has_scalar_head(name) or names_encoder(name):
            if lora is not None:
                raise ValueError(NO_ADAPTER_BENEATH_A_HEAD)
            model, tokenizer = load_scalar_model(name, device, dtype)
            return cls(model, tokenizer, **arguments)
        model, tokenizer = load_model(name, device, dtype, lora=lora, merge=merge)
        folder = folder_of(name)
        if (folder / "base").is_dir():
            if not merge and read_pointer(folder / "base"):
                arguments["base"] = AdapterOff(model)
            else:
                arguments["base"], _ = load_model(folder / "base", device, dtype)
        elif (folder / REPLY_FILE).exists():
            arguments.setdefault("reply", json.loads((folder / REPLY_FILE).read_text()))
        elif relative:
            arguments["base"] = AdapterOff(model) if has_adapter(model) else copy.deepcopy(model)
        return cls(model, tokenizer, head=head, **arguments)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def begin(self, temperature: float | None = None) -> Choices:
        """Open a rollout of choices."""
        return Choices(self, self.temperature if temperature is None else temperature)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def encode(self, prompt: str, candidates: Sequence[str]) -> Question:
        """Encode the prompt, cut on the left to fit the context, and each candidate."""
        prompt_ids, *candidate_ids = self._encode([prompt, *candidates])
        if not prompt_ids or not all(candidate_ids):
            raise ValueError(
                "A prompt or a candidate holds no token, so there is nothing to judge. "
                f"Prompt: {prompt!r}; candidates: {list(candidates)!r}."
            )
        room = self.context - len(self.reply) - max(map(len, candidate_ids))
        if room < 1:
            raise ValueError(f"A candidate is longer than the context of {self.context} tokens.")
        if len(prompt_ids) > room:
            self.truncated_prompts += 1
            if self.truncated_prompts == 1:
                warnings.warn(
                    f"A prompt with a candidate is longer than the model's context of "
                    f"{self.context} tokens; its beginning is cut off. "
                    "`policy.truncated_prompts` counts them all.",
                    stacklevel=3,
                )
        return tuple(prompt_ids[-room:]), tuple(map(tuple, candidate_ids))

    def micro_batches(self, decisions: Sequence[Decision]) -> list[list[int]]:
        """Group decisions of similar lengths, each group within ``micro_batch_tokens``."""
        widths = [
            self.model.width(*d.question)
            if self.scalar
            else len(d) + len(self.reply) * len(d.candidates)
            for d in decisions
        ]
        groups: list[list[int]] = []
        for i in sorted(range(len(decisions)), key=widths.__getitem__):
            # Ascending lengths: the newest member sets the width of the whole group.
            if not groups or (len(groups[-1]) + 1) * widths[i] > self.micro_batch_tokens:
                groups.append([])
            groups[-1].append(i)
        return groups

    def score(
        self,
        decisions: Sequence[Decision],
        reference: CandidatePolicy | None = None,
        critic: Critic | None = None,
    ) -> Scores:
        """Score every decision, in their order, with gradients; see :class:`Scores`."""
        questions = [d.question for d in decisions]
        base = [d.base for d in decisions]
        logits, values = self._judge(questions, base, critic)
        log_dist = (logits / (self.temperature or 1.0)).log_softmax(-1)
        actions = torch.tensor([d.action for d in decisions], dtype=torch.long)
        log_probs = log_dist.gather(1, actions[:, None].to(log_dist.device))[:, 0]
        kls = None
        if reference is not None:
            with torch.no_grad():
                ref = reference.candidate_logits(questions, base).log_softmax(-1)
            kls = kl_divergence(logits.log_softmax(-1), ref)
        return Scores(log_probs, entropy(log_dist), kls, values)

    def values(self, decisions: Sequence[Decision], critic: Critic) -> Tensor:
        """Return what the critic says of the state before each decision."""
        questions = [d.question for d in decisions]
        _, values = self._judge(questions, None, critic)
        assert values is not None
        return values

    def candidate_logits(
        self, questions: Sequence[Question], base: Sequence[Sequence[float]] | None = None
    ) -> Tensor:
        """Return the logit of every candidate, (questions, most candidates); -inf where none is.

        Args:
            questions: (prompt ids, ids of each candidate), each with one candidate or more.
            base: What ``base_log_likelihoods`` said of each, if it has been asked before.
        """
        return self._judge(questions, base)[0]

    def _judge(
        self,
        questions: Sequence[Question],
        base: Sequence[Sequence[float]] | None,
        critic: Critic | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the candidates' logits and, of a critic, the value of each prompt."""
        if self.scalar:
            with (
                bfloat16(self.model, self.passes.bfloat16),
                layers_recomputed(self.model.trunk, self.passes.gradient_checkpointing),
            ):
                return self.model(questions, critic)  # type: ignore[no-any-return]
        mean = self.base is None and not self.reply
        found, values = self._likelihoods(self.model, self.parts, questions, critic, mean=mean)
        if self.base is None:
            return found, values
        said = base if base and all(base) else self.base_log_likelihoods(questions)
        table = [[*row, *[0.0] * (found.shape[1] - len(row))] for row in said]
        known = torch.tensor(table, dtype=found.dtype).view(found.shape).to(found.device)
        return found - known, values

    @torch.no_grad()
    def base_log_likelihoods(self, questions: Sequence[Question]) -> list[tuple[float, ...]]:
        """Return the log-likelihood of every candidate under the base; nothing without one."""
        if self.base is None:
            return [()] * len(questions)
        table = self._likelihoods(self.base, self.base_parts, questions)[0].tolist()
        return [tuple(row[: len(texts)]) for row, (_, texts) in zip(table, questions, strict=True)]

    def _likelihoods(
        self,
        model: Any,
        parts: Any,
        questions: Sequence[Question],
        critic: Critic | None = None,
        *,
        mean: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the log-likelihood of every candidate or of the reply to it; -inf where none is.

        Args:
            model: Reads the questions.
            parts: What ``split_model`` says of it.
            questions: As in ``candidate_logits``.
            critic: Judges the state after each prompt, before any candidate.
            mean: Divide by the number of tokens.
        """
        # The copies of a question, as a group has them, are read once.
        unique = {question: i for i, question in enumerate(dict.fromkeys(questions))}
        rows = [self._lay_out(*question) for question in unique]
        device = self.device
        ids, positions = pad_right([r.ids for r in rows], self.pad), [r.positions for r in rows]
        width = ids.shape[1]
        # Branch 0 is the prompt; a token sees the prompt and its own branch, as far as itself.
        branch = pad_right([r.branch for r in rows], -1).to(device)
        sources = [s + i * width for i, r in enumerate(rows) for s in r.sources]
        reading = read(
            model,
            parts,
            self.passes,
            input_ids=ids.to(device),
            attention_mask=branch_mask(branch, model.dtype, causal=True),
            position_ids=pad_right(positions, 0).to(device),
        )

        def scored(places: Tensor, targets: Tensor) -> tuple[Tensor]:
            log_dists = at_least_float32(reading.logits(places)).log_softmax(-1)
            return (log_dists.gather(1, targets[:, None])[:, 0],)

        (log_probs,) = in_chunks(
            scored,
            torch.tensor(sources, dtype=torch.long, device=device),
            torch.tensor([t for r in rows for t in r.targets], dtype=torch.long, device=device),
            vocabulary=model.config.get_text_config().vocab_size,
        )
        most = max((len(candidates) for _, candidates in unique), default=1)
        owners = [o + i * most for i, r in enumerate(rows) for o in r.owners]
        place = torch.tensor(owners, dtype=torch.long, device=device)
        zeros = log_probs.new_zeros(len(rows) * most)
        sums = zeros.index_add(0, place, log_probs)
        counts = zeros.index_add(0, place, torch.ones_like(log_probs))
        found = sums / counts.clamp_min(1) if mean else sums
        table = found.masked_fill(counts == 0, -torch.inf).view(len(rows), most)
        asked = torch.tensor([unique[q] for q in questions], dtype=torch.long, device=device)
        if critic is None:
            return table[asked], None
        ends = [len(prompt) - 1 + i * width for i, (prompt, _) in enumerate(unique)]
        states = torch.tensor(ends, dtype=torch.long, device=device)
        return table[asked], critic(reading.hidden[states])[asked]

    def _lay_out(self, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> _Row:
        row = _Row(list(prompt), list(range(len(prompt))), [0] * len(prompt), [], [], [])
        for k, candidate in enumerate(candidates):
            path = [*candidate, *self.reply]
            for i in range(len(candidate) if self.reply else 0, len(path)):
                # The token before: in this branch or, for a branch's first, the prompt's last.
                row.sources.append(len(row.ids) + i - 1 if i else len(prompt) - 1)
                row.targets.append(path[i])
                row.owners.append(k)
            row.ids += path
            row.positions += range(len(prompt), len(prompt) + len(path))
            row.branch += [k + 1] * len(path)
        return row

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors), tokenizer and how candidates are scored.

        ``from_pretrained`` reads them: a folder ``base``, a scalar head, or ``reply.json``, which
        holds null where there is no reply either.
        """
        save_model(self.model, self.tokenizer, folder)
        if self.base is None and not self.scalar:
            (Path(folder) / REPLY_FILE).write_text(json.dumps(self.reply_text))
        if isinstance(self.base, AdapterOff):
            write_pointer(self.model, Path(folder) / "base", f"../{BASE_FOLDER}")
            self.tokenizer.save_pretrained(Path(folder) / "base")
        elif self.base is not None:
            save_model(self.base, self.tokenizer, Path(folder) / "base")


@dataclass(slots=True)
class _Row:
    """One prompt with its candidates, laid out in one row."""

    ids: list[int]
    positions: list[int]
    branch: list[int]
    sources: list[int]  # where the guess at each judged token stands
    targets: list[int]  # the judged tokens
    owners: list[int]  # the candidate that each belongs to


class Choices:
    """Rows of choices in play.

    Attributes:
        sequences: Every decision so far.
        chosen_from: (row, turn) -> the policy's probability of each candidate, (k,), at its own
            temperature even where the best candidate is taken.
    """

    def __init__(self, policy: CandidatePolicy, temperature: float) -> None:
        self.policy = policy
        self.temperature = temperature
        self.sequences: list[Decision] = []
        self.chosen_from: dict[tuple[int, int], Tensor] = {}
        self.cut = 0
        self.answers = 0

    def state_of(self, row: int, observation: Any) -> Decision:
        """Return the choice that a row stands before, for a critic; nothing is chosen."""
        question = self.policy.encode(observation["prompt"], observation["candidates"])
        return Decision(row, -1, *question, 0, 0.0)

    @torch.no_grad()
    def act(
        self, observations: dict[int, Any], turn: int, *, said: dict[int, int] | None = None
    ) -> dict[int, int]:
        """Choose for each row that is still in play.

        Args:
            observations: Row -> ``{"prompt": text, "candidates": k texts, …}``.
            turn: Number of the turn, for all rows.
            said: Row -> a choice to write down instead of drawing one, as a teacher makes it.

        Returns:
            Row -> index of the chosen candidate.
        """
        policy = self.policy
        temperature = self.temperature or policy.temperature or 1.0
        # Greedy draws no number. One number a row: how rows are batched changes no choice.
        uniforms = (
            torch.rand(len(observations), generator=policy.generator) if self.temperature else None
        )
        asked = [
            Decision(row, turn, *policy.encode(o["prompt"], o["candidates"]), 0, 0.0)
            for row, o in observations.items()
        ]
        decided = list(asked)
        for group in policy.micro_batches(asked):
            questions = [asked[i].question for i in group]
            base = policy.base_log_likelihoods(questions)
            logits = policy.candidate_logits(questions, base)
            policy.read_tokens += sum(len(p) + sum(map(len, c)) for p, c in set(questions))
            log_dist = (logits / temperature).log_softmax(-1).cpu()
            drawn = log_dist.argmax(-1) if uniforms is None else draw(log_dist, uniforms[group])
            if said is not None:
                drawn = torch.tensor([said[asked[i].row] for i in group])
            for i, action, dist, known in zip(group, drawn.tolist(), log_dist, base, strict=True):
                decided[i] = replace(
                    asked[i], action=action, log_prob=float(dist[action]), base=known
                )
                chances = dist.exp()[: len(asked[i].candidates)]
                self.chosen_from[asked[i].row, turn] = chances
        self.sequences += decided
        self.answers += len(decided)
        return {d.row: d.action for d in decided}
