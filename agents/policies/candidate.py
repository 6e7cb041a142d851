"""A causal language model as a policy that chooses one of k texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agents.policies.models import Scores, load_model, split_model


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
    """

    row: int
    turn: int
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    action: int
    log_prob: float

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
    """Chooses among texts by what a causal language model thinks of each.

    The logit of a candidate is read off the model in one of two ways:

    - with ``reply``, log p(reply | prompt, candidate): how likely the model thinks it that the
      user answers this candidate with that reply ("I liked it.");
    - without, the mean log-probability of the candidate's own tokens after the prompt.

    All k candidates are read in one row: the prompt once, then the candidates beside each other,
    each seeing the prompt and itself only and taking the positions that follow the prompt. The
    order of the candidates therefore changes nothing.

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its tokenizer.
        reply: What the user would say to a good candidate.
        temperature: Divides the logits when sampling; 0 takes the best candidate.
        seed: Seed of the sampling.
        micro_batch_tokens: Most tokens, padding included, in one forward pass.
    """

    family = "choosing"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        reply: str | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        micro_batch_tokens: int = 8192,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; use 0 (the best candidate) or more.")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.generator = torch.Generator().manual_seed(seed)
        self.micro_batch_tokens = micro_batch_tokens
        self.reply: tuple[int, ...] = tuple(self._encode([reply])[0]) if reply else ()
        self.parts = split_model(model)
        self.pad: int = tokenizer.pad_token_id or 0
        self.context: int = getattr(model.config, "max_position_embeddings", 2**31 - 1)
        self.truncated_prompts = 0
        self.read_tokens = 0

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        device: str = "auto",
        dtype: str = "float32",
        **arguments: Any,
    ) -> CandidatePolicy:
        """Load a model: ``"tiny"`` (embedded), a hub id, or a folder."""
        model, tokenizer = load_model(name, device, dtype)
        return cls(model, tokenizer, **arguments)

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

    def encode(self, prompt: str, candidates: Sequence[str]) -> tuple[Any, Any]:
        """Encode the prompt, cut on the left to fit the context, and each candidate."""
        prompt_ids, *candidate_ids = self._encode([prompt, *candidates])
        if not prompt_ids or not all(candidate_ids):
            raise ValueError(
                "A prompt or a candidate holds no token, so it has no likelihood. "
                f"Prompt: {prompt!r}; candidates: {list(candidates)!r}."
            )
        room = self.context - len(self.reply) - max(map(len, candidate_ids))
        if room < 1:
            raise ValueError(f"A candidate is longer than the context of {self.context} tokens.")
        self.truncated_prompts += len(prompt_ids) > room
        return tuple(prompt_ids[-room:]), tuple(map(tuple, candidate_ids))

    def micro_batches(self, decisions: Sequence[Decision]) -> list[list[int]]:
        """Group decisions of similar lengths, each group within ``micro_batch_tokens``."""
        order = sorted(range(len(decisions)), key=lambda i: len(decisions[i]))
        groups: list[list[int]] = []
        for i in order:
            width = len(decisions[i]) + len(self.reply) * len(decisions[i].candidates)
            if not groups or (len(groups[-1]) + 1) * width > self.micro_batch_tokens:
                groups.append([])
            groups[-1].append(i)
        return groups

    def score(
        self, decisions: Sequence[Decision], reference: CandidatePolicy | None = None
    ) -> Scores:
        """Score every decision, in their order, with gradients; see :class:`Scores`."""
        raw = self.candidate_logits([(d.prompt, d.candidates) for d in decisions])
        log_dist = (raw / (self.temperature or 1.0)).log_softmax(-1)
        actions = torch.tensor([d.action for d in decisions], device=log_dist.device)
        log_probs = log_dist.gather(1, actions[:, None])[:, 0]
        finite = log_dist.masked_fill(log_dist == -torch.inf, 0.0)
        entropies = -(log_dist.exp() * finite).sum(-1)
        kls = None
        if reference is not None:
            with torch.no_grad():
                ref = reference.candidate_logits([(d.prompt, d.candidates) for d in decisions])
            ref = ref.log_softmax(-1).masked_fill(ref == -torch.inf, 0.0)
            own = raw.log_softmax(-1)
            kls = (own.exp() * (own.masked_fill(own == -torch.inf, 0.0) - ref)).sum(-1)
        return Scores(log_probs, entropies, kls)

    def candidate_logits(
        self, questions: Sequence[tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]]
    ) -> Tensor:
        """Return the logit of every candidate, (questions, most candidates); -inf where none is.

        Args:
            questions: (prompt ids, ids of each candidate), each with one candidate or more.
        """
        rows = [self._lay_out(prompt, candidates) for prompt, candidates in questions]
        ids = pad_sequence([r.ids for r in rows], batch_first=True, padding_value=self.pad)
        positions = pad_sequence([r.positions for r in rows], batch_first=True)
        branch = pad_sequence([r.branch for r in rows], batch_first=True, padding_value=-1)
        width = ids.shape[1]
        earlier = torch.ones(width, width, dtype=torch.bool).tril()
        # Branch 0 is the prompt; a token sees the prompt and its own branch, as far as itself.
        seen = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
        mask = torch.zeros(seen.shape).masked_fill(~(seen & earlier), torch.finfo(torch.float32).min)
        hidden_at = torch.cat([r.sources + i * width for i, r in enumerate(rows)])
        targets = torch.cat([r.targets for r in rows])
        device = self.device
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": mask[:, None].to(device, self.model.dtype),
            "position_ids": positions.to(device),
            "use_cache": False,
        }
        if self.parts is None:
            logits = self.model(**inputs).logits.flatten(0, 1)[hidden_at.to(device)]
        else:
            trunk, head = self.parts
            logits = head(trunk(**inputs).last_hidden_state.flatten(0, 1)[hidden_at.to(device)])
        log_probs = logits.float().log_softmax(-1).gather(1, targets.to(device)[:, None])[:, 0]
        most = max(len(candidates) for _, candidates in questions)
        place = torch.cat([r.owners + i * most for i, r in enumerate(rows)]).to(device)
        zeros = torch.zeros(len(rows) * most, device=device)
        sums = zeros.index_add(0, place, log_probs)
        counts = zeros.index_add(0, place, torch.ones_like(log_probs))
        # A reply is the same for every candidate; texts of their own are compared by the mean.
        logits = sums if self.reply else sums / counts.clamp_min(1)
        return logits.masked_fill(counts == 0, -torch.inf).view(len(rows), most)

    def _lay_out(self, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> _Row:
        ids, branch = list(prompt), [0] * len(prompt)
        positions = list(range(len(prompt)))
        sources: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for k, candidate in enumerate(candidates):
            path = [*candidate, *self.reply]
            judged = range(len(candidate), len(path)) if self.reply else range(len(candidate))
            for i in judged:
                # The token before: in this branch or, for a branch's first, the prompt's last.
                sources.append(len(ids) + i - 1 if i else len(prompt) - 1)
                targets.append(path[i])
                owners.append(k)
            ids += path
            branch += [k + 1] * len(path)
            positions += range(len(prompt), len(prompt) + len(path))
        return _Row(*(torch.tensor(x) for x in (ids, positions, branch, sources, targets, owners)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer; ``from_pretrained`` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt with its candidates, laid out in one row."""

    ids: Tensor
    positions: Tensor
    branch: Tensor
    sources: Tensor  # where the guess at each judged token stands
    targets: Tensor  # the judged tokens
    owners: Tensor  # the candidate that each belongs to


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

    @torch.no_grad()
    def act(self, observations: dict[int, Any], turn: int) -> dict[int, int]:
        """Choose for each row that is still in play.

        Args:
            observations: Row -> ``{"prompt": text, "candidates": k texts, …}``.
            turn: Number of the turn, for all rows.

        Returns:
            Row -> index of the chosen candidate.
        """
        policy = self.policy
        rows = list(observations)
        read = [policy.encode(o["prompt"], o["candidates"]) for o in observations.values()]
        asked = [Decision(r, turn, p, c, 0, 0.0) for r, (p, c) in zip(rows, read, strict=True)]
        actions: dict[int, int] = {}
        decided: dict[int, Decision] = {}
        for group in policy.micro_batches(asked):
            raw = policy.candidate_logits([read[i] for i in group])
            log_probs = (raw / (self.temperature or policy.temperature or 1.0)).log_softmax(-1).cpu()
            if self.temperature == 0:
                drawn = log_probs.argmax(-1)
            else:
                drawn = torch.multinomial(log_probs.exp(), 1, generator=policy.generator)[:, 0]
            for i, action, dist in zip(group, drawn.tolist(), log_probs, strict=True):
                actions[rows[i]] = action
                self.chosen_from[rows[i], turn] = dist.exp()
                prompt, candidates = read[i]
                chosen = float(dist[action])
                decided[rows[i]] = Decision(rows[i], turn, prompt, candidates, action, chosen)
            policy.read_tokens += sum(len(asked[i]) for i in group)
        self.sequences += [decided[r] for r in rows]
        self.answers += len(rows)
        return {r: actions[r] for r in rows}
