"""Token generation: the fast path of every rollout.

Many conversations are sampled side by side. Rows that begin alike are read once and share the
result; a row that has finished its answer is dropped; and the keys and values of a conversation
stay, so that the next turn reads only what is new. Slots of the cache are shared by all rows in
lockstep: a row that has nothing to say at a slot leaves a hole there, which no query attends to
and which no position counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are drawn; what is drawn from is also what is scored.

    Attributes:
        max_new_tokens: Length limit of an answer, in tokens.
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_k: Draw from the k likeliest tokens only; 0 for all.
        top_p: Draw from the smallest set of likeliest tokens whose probability reaches this; 1.0
            for all.
    """

    max_new_tokens: int = 24
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; an answer needs 1 or more.")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or more.")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 (all tokens) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; use a share in (0, 1].")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that the support has to be kept."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


def at_least_float32(x: Tensor) -> Tensor:
    """Return x, in float32 if it is less precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sampling_logits(
    logits: Tensor, config: SamplingConfig, support: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Turn a model's logits into those of the distribution that is sampled.

    Args:
        logits: (…, vocabulary).
        config: Temperature, top-k, top-p. Greedy leaves the model's own distribution.
        support: (…, vocabulary) booleans to use again, whatever top-k and top-p would say now:
            after an update, a token that was sampled may have left the nucleus.

    Returns:
        Logits, float32 at least, -inf outside the support; and the support (``None`` if it is
        everything).
    """
    logits = at_least_float32(logits)
    if config.temperature > 0 and config.temperature != 1.0:
        logits = logits / config.temperature
    if support is None and not config.truncates:
        return logits, None
    if support is None:
        support = torch.ones_like(logits, dtype=torch.bool)
        if 0 < config.top_k < logits.shape[-1]:
            kept = logits.topk(config.top_k, dim=-1).indices
            support = torch.zeros_like(support).scatter_(-1, kept, True)
        if config.top_p < 1.0:
            inside = logits.masked_fill(~support, -torch.inf)
            probs, order = inside.softmax(-1).sort(dim=-1, descending=True)
            # A token stays if those before it have not yet reached top_p; the first always does.
            kept_sorted = probs.cumsum(-1) - probs < config.top_p
            support &= torch.zeros_like(support).scatter_(-1, order, kept_sorted)
    return logits.masked_fill(~support, -torch.inf), support


def draw(log_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token for each row by inverting its distribution function.

    One uniform number decides a token, so what a row draws depends on its own numbers only. A
    token of probability 0 is never drawn: a number below 1 stays below the sum of all.

    Args:
        log_probs: (rows, vocabulary), normalised.
        uniforms: (rows,) in [0, 1).

    Returns:
        (rows,) token ids.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    reached = log_probs.exp().cumsum(-1)
    if not reached[:, -1].isfinite().all():
        raise FloatingPointError(
            "The policy's probabilities are not finite: its weights, or what it computes with "
            "them, have become too large. Load an earlier checkpoint, or use float32."
        )
    aims = uniforms[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, aims, right=True)[:, 0]


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in buffers with room to grow: appending a token copies that token only."""

    keys: Tensor
    values: Tensor

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states and return views of all that is held, (rows, heads, slots, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [key_states[..., :0, :], value_states[..., :0, :]]
        held = self.get_seq_length()
        total = held + key_states.shape[-2]
        for i, new in enumerate((key_states, value_states)):
            if self.buffers[i].shape[-2] < total:
                larger = _buffer(new, len(new), total)
                larger[..., :held, :] = self.buffers[i][..., :held, :]
                self.buffers[i] = larger
            self.buffers[i][..., held:total, :] = new
        self.keys, self.values = (buffer[..., :total, :] for buffer in self.buffers)
        return self.keys, self.values

    def select(self, rows: Tensor) -> _GrowingLayer:
        """Return a copy that holds the given rows, and has room again."""
        new = _GrowingLayer()  # type: ignore[no-untyped-call]
        held = self.get_seq_length()
        new.lazy_initialization(self.keys, self.values)
        new.buffers = [_buffer(states, len(rows), held) for states in (self.keys, self.values)]
        new.keys, new.values = (buffer[..., :held, :] for buffer in new.buffers)
        torch.index_select(self.keys, 0, rows, out=new.keys)
        torch.index_select(self.values, 0, rows, out=new.values)
        return new


def _buffer(like: Tensor, rows: int, slots: int) -> Tensor:
    """Return a buffer with that many slots and some more."""
    return like.new_empty(rows, like.shape[1], slots + max(32, slots // 4), like.shape[3])


class KeyValues:
    """What a model has read: its cache, and which slots hold tokens of which row.

    Attributes:
        mask: (rows, slots) booleans; false slots are holes.
        positions: (rows,) the number of tokens each row has read.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.cache: Any = Cache(layer_class_to_replicate=_GrowingLayer)
        self.mask = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.positions = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.mask.shape[1]

    def read(self, model: Any, ids: Tensor, valid: Tensor) -> Tensor:
        """Read new tokens into every row.

        Args:
            model: A causal language model.
            ids: (rows, width) token ids, padded on the left: every row ends in the last column.
            valid: (rows, width) booleans, true where ``ids`` are tokens.

        Returns:
            (rows, vocabulary) logits after the last column; those of a row without any valid
            token mean nothing.
        """
        self.mask = torch.cat([self.mask, valid], dim=1)
        read = self.positions[:, None] + valid.cumsum(1)
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=(read - 1).clamp_min(0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self.positions = read[:, -1]
        return logits[:, -1]

    def select(self, rows: Tensor) -> KeyValues:
        """Return a copy that holds the given rows, in their order (repeated ones too)."""
        new = KeyValues(0, self.mask.device)
        new.mask, new.positions = self.mask[rows], self.positions[rows]
        new.cache.layers = [layer.select(rows) for layer in self.cache.layers]
        return new

    def write_back(self, part: KeyValues, rows: Tensor) -> None:
        """Take over, for the given rows, the slots that ``part`` (their copy) has added since."""
        old, new = self.slots, part.slots
        self.positions[rows] = part.positions
        blank = self.mask.new_zeros(len(self.mask), new - old)
        self.mask = torch.cat([self.mask, blank], dim=1)
        self.mask[rows, old:] = part.mask[:, old:]
        for mine, theirs in zip(self.cache.layers, part.cache.layers, strict=True):
            keys, values = (
                x.new_zeros(len(self.mask), *x.shape[1:]).index_copy_(0, rows, x)
                for x in (theirs.keys[..., old:, :], theirs.values[..., old:, :])
            )
            mine.update(keys, values)


@dataclass(slots=True)
class Completion:
    """One sampled answer.

    Attributes:
        ids: Sampled token ids; the last one is the end of sequence unless ``cut``.
        log_probs: Log-probability of each token under the distribution it was drawn from.
        cut: Whether the length limit ended the answer; no end of sequence is forged.
        support: (tokens, vocabulary) booleans where top-k or top-p was in force.
    """

    ids: list[int]
    log_probs: list[float]
    cut: bool
    support: Tensor | None = None


class Sampler:
    """Samples answers for rows of growing conversations.

    Args:
        model: A causal language model, in eval mode.
        end: Id of the end-of-sequence token.
        pad: Id to fill holes with; it is never attended to.
        generator: Source of randomness, on the CPU.
    """

    def __init__(self, model: Any, end: int, pad: int, generator: torch.Generator) -> None:
        self.model = model
        self.end = end
        self.pad = pad
        self.generator = generator
        self.device: torch.device = next(model.parameters()).device
        self.held: KeyValues | None = None
        self.rows: list[int] = []  # which conversation each row of the cache belongs to
        self.read_tokens = 0  # tokens that went through the model, for throughput figures

    def forget(self, rows: Collection[int]) -> None:
        """Begin these conversations anew: their next tokens are read from position 0."""
        if self.held is not None:
            forgotten = torch.tensor([r in rows for r in self.rows], device=self.device)
            self.held.mask[forgotten] = False
            self.held.positions[forgotten] = 0

    @torch.no_grad()
    def answer(self, new: dict[int, list[int]], config: SamplingConfig) -> dict[int, Completion]:
        """Read what is new in each conversation and sample its answer.

        Args:
            new: Conversation -> token ids not read yet, at least one. Conversations that were
                there before and are missing now are over and are dropped; one that was not there
                the last time begins.
            config: How to sample.

        Returns:
            Conversation -> its answer.
        """
        rows = list(new)
        logits = self._read(rows, list(new.values()))
        assert self.held is not None
        limit = config.max_new_tokens
        # Greedy draws no number, so that an evaluation leaves the training's chance alone.
        uniforms = (
            torch.rand(len(rows), limit, generator=self.generator).to(self.device)
            if config.temperature > 0
            else None
        )
        # ``work`` holds the rows ``places`` of ``held``; its rows ``alive`` are being written.
        work, places = self.held, torch.arange(len(rows), device=self.device)
        alive = places
        whose: list[Tensor] = []  # for each step: rows, tokens, log-probabilities, supports
        tokens: list[Tensor] = []
        chances: list[Tensor] = []
        supports: list[Tensor] = []
        for step in range(limit):
            scaled, support = sampling_logits(logits, config)
            log_probs = scaled.log_softmax(-1)
            whose.append(places[alive])
            if uniforms is None:
                tokens.append(log_probs.argmax(-1))
            else:
                tokens.append(draw(log_probs, uniforms[whose[-1], step]))
            chances.append(log_probs.gather(1, tokens[-1][:, None])[:, 0])
            if support is not None:
                supports.append(support)
            going = tokens[-1] != self.end
            alive = alive[going]
            if not len(alive) or step + 1 == limit:
                break
            if len(alive) <= len(places) // 2:  # copying pays once half of the rows are idle
                if work is not self.held:
                    self.held.write_back(work, places)
                work = work.select(alive)
                places, alive = places[alive], torch.arange(len(alive), device=self.device)
            ids = torch.full((len(places), 1), self.pad, device=self.device)
            valid = torch.zeros_like(ids, dtype=torch.bool)
            ids[alive, 0], valid[alive, 0] = tokens[-1][going], True
            logits = work.read(self.model, ids, valid)[alive]
            self.read_tokens += len(alive)
        if work is not self.held:
            self.held.write_back(work, places)
        return self._by_row(rows, whose, tokens, chances, supports)

    def _by_row(
        self,
        rows: list[int],
        whose: list[Tensor],
        tokens: list[Tensor],
        chances: list[Tensor],
        supports: list[Tensor],
    ) -> dict[int, Completion]:
        """Sort what was sampled step by step into answers."""
        places = torch.cat(whose)
        order = places.argsort(stable=True)
        lengths = places.bincount(minlength=len(rows)).tolist()

        def split(steps: list[Tensor]) -> tuple[Tensor, ...]:
            return torch.split(torch.cat(steps)[order].cpu(), lengths)

        held = split(supports) if supports else (None,) * len(rows)
        return {
            row: Completion(ids.tolist(), log_probs.tolist(), int(ids[-1]) != self.end, support)
            for row, ids, log_probs, support in zip(
                rows, split(tokens), split(chances), held, strict=True
            )
        }

    def _read(self, rows: list[int], new: list[list[int]]) -> Tensor:
        """Read what is new and return the logits after it, (rows, vocabulary)."""
        if self.held is not None and rows != self.rows:
            place = {r: i for i, r in enumerate(self.rows)}
            kept = torch.tensor([place.get(r, 0) for r in rows], device=self.device)
            self.held, self.rows = self.held.select(kept), rows
            self.forget(set(rows) - set(place))
        if self.held is not None and self.held.mask.any():
            return self._read_padded(self.held, new)
        # All begin: the copies of a prompt are read once.
        unique = {ids: i for i, ids in enumerate(dict.fromkeys(map(tuple, new)))}
        self.held, self.rows = KeyValues(len(unique), self.device), rows
        logits = self._read_padded(self.held, list(unique))
        if len(unique) == len(rows):
            return logits
        index = torch.tensor([unique[tuple(ids)] for ids in new], device=self.device)
        self.held = self.held.select(index)
        return logits[index]

    def _read_padded(self, held: KeyValues, new: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, new))
        ids = torch.tensor([[self.pad] * (width - len(x)) + list(x) for x in new])
        lengths = torch.tensor([len(x) for x in new])
        valid = torch.arange(width) >= width - lengths[:, None]
        self.read_tokens += int(lengths.sum())
        return held.read(self.model, ids.to(self.device), valid.to(self.device))
