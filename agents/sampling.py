"""Token generation: the fast path of every rollout.

Many conversations are sampled side by side, and conversations that are alike so far are one row of
the cache: a prompt is read once for all its answers, and answers are read once for as long as they
go on alike. Where they part, the row is copied. A row that nobody goes on from is dropped; and the
keys and values of a conversation stay, so that the next turn reads only what is new. Slots of the
cache are shared by all rows in lockstep: a row that has nothing to say at a slot leaves a hole
there, which no query attends to and which no position counts.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from agents.policies.models import additive_mask


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


def draw(log_probs: Tensor, uniforms: Tensor, rows: Tensor | None = None) -> Tensor:
    """Draw tokens by inverting distribution functions.

    One uniform number decides a token, so what is drawn depends on its own numbers only. A token of
    probability 0 is never drawn: a number below 1 stays below the sum of all.

    Args:
        log_probs: (rows, vocabulary), normalised.
        uniforms: (draws,) in [0, 1).
        rows: (draws,) the row that each is drawn from; one a row, in order, if left out.

    Returns:
        (draws,) token ids.

    Raises:
        FloatingPointError: A probability is not finite.
    """
    reached = log_probs.exp().cumsum(-1)
    if not reached[:, -1].isfinite().all():
        raise FloatingPointError(
            "The policy's probabilities are not finite: its weights, or what it computes with "
            "them, have become too large. Load an earlier checkpoint, or use float32."
        )
    if rows is not None:
        reached = reached[rows]
    aims = uniforms[:, None] * reached[:, -1:]
    return torch.searchsorted(reached, aims, right=True)[:, 0]


class _GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values in buffers with room to grow, in slots and in rows.

    Appending a token copies that token only, and a row that parts in two is one row more.
    """

    keys: Tensor
    values: Tensor
    buffers: list[Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states and return views of all that is held, (rows, heads, slots, width)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._hold([key_states[..., :0, :], value_states[..., :0, :]], len(key_states), 0)
        held, rows = self.get_seq_length(), len(self.keys)
        total = held + key_states.shape[-2]
        self._reserve(rows, total)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, held:total] = new
        self._hold(self.buffers, rows, total)
        return self.keys, self.values

    def open_slot(self) -> tuple[Tensor, Tensor]:
        """Make room for one token more; return keys and values with all the slots there are."""
        held, rows = self.get_seq_length(), len(self.keys)
        self._reserve(rows, held + 1)
        self._hold(self.buffers, rows, held + 1)
        return self.buffers[0][:rows], self.buffers[1][:rows]

    def extend(self, sources: Tensor) -> None:
        """Append copies of rows."""
        held, rows = self.get_seq_length(), len(self.keys)
        self._reserve(rows + len(sources), held)
        for buffer in self.buffers:
            buffer[rows : rows + len(sources), :, :held] = buffer[sources, :, :held]
        self._hold(self.buffers, rows + len(sources), held)

    @classmethod
    def gathered(cls, pieces: Sequence[tuple[_GrowingLayer, Tensor, Tensor, int]]) -> _GrowingLayer:
        """Return a layer that is put together of rows of others.

        Args:
            pieces: (layer, rows of it, rows here, slots); later slots of it are left out. All end
                in the same slot; those before the beginning of a row are zero.
        """
        new = cls()
        first = pieces[0][0]
        new.lazy_initialization(first.keys, first.values)
        count = sum(len(rows) for _, rows, _, _ in pieces)
        slots = max(slots for *_, slots in pieces)
        new.buffers = [first.buffers[0][:0], first.buffers[1][:0]]
        new._hold(new.buffers, 0, 0)
        new._reserve(count, slots)
        for layer, rows, places, width in pieces:
            for mine, its in zip(new.buffers, (layer.keys, layer.values), strict=True):
                if len(pieces) == 1:  # one copy, and no more
                    torch.index_select(its[..., :slots, :], 0, rows, out=mine[:count, :, :slots])
                else:
                    mine[places, :, slots - width : slots] = its[rows, :, :width]
                    mine[places, :, : slots - width] = 0
        new._hold(new.buffers, count, slots)
        return new

    def _hold(self, buffers: list[Tensor], rows: int, slots: int) -> None:
        self.buffers = buffers
        self.keys, self.values = (buffer[:rows, :, :slots] for buffer in buffers)

    def _reserve(self, rows: int, slots: int) -> None:
        """Make the buffers larger if so many rows and slots have no room; there is more then."""
        there = self.buffers[0].shape
        if rows <= there[0] and slots <= there[2]:
            return
        wanted = there[0] if rows <= there[0] else max(rows, there[0] + there[0] // 2)
        longer = there[2] if slots <= there[2] else slots + max(32, slots // 4)
        held = (self.keys, self.values)
        # Zeros: a compiled step attends to slots without tokens, with weight 0.
        self.buffers = [x.new_zeros(wanted, x.shape[1], longer, x.shape[3]) for x in held]
        for buffer, old in zip(self.buffers, held, strict=True):
            buffer[: len(old), :, : old.shape[2]] = old


class _SlotLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values whose shape stays as tokens come: each is written into a slot."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.slot = keys, values, slot
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of one token a row; return all slots."""
        self.keys.index_copy_(2, self.slot, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.slot, value_states.to(self.values.dtype))
        return self.keys, self.values


def _step(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    slot: Tensor,
    held: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """Read one token a row.

    Args:
        model: A causal language model that takes a mask for every pair of tokens.
        ids: (rows, 1) token ids.
        mask: (rows, slots) booleans, true where a token is attended to.
        positions: (rows, 1) of the tokens.
        slot: (1,) where their keys and values go.
        held: Keys and values of each layer, (rows, heads, slots, width); they are written to.

    Returns:
        (rows, vocabulary) logits.
    """
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=additive_mask(mask[:, None], model.dtype),
        position_ids=positions,
        past_key_values=Cache(layers=[_SlotLayer(k, v, slot) for k, v in held]),
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1]


Step = Callable[..., Tensor]


@functools.cache
def compiled_step(device: str = "cpu") -> Step | None:
    """Return ``_step`` compiled: for one row, and for any other number of rows and slots.

    Args:
        device: Where it will run.

    Returns:
        ``None``, with a warning, where nothing can be compiled: a run that was begun elsewhere can
        still go on, only slower.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(2, device=device))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        warnings.warn(
            f"compile is True, and torch.compile does not work here ({cause}), so that sampling "
            "goes on without. Install a C++ compiler, such as g++ (on a GPU Triton), or leave it "
            "out.",
            stacklevel=2,
        )
        return None
    return torch.compile(_step, dynamic=True)


PASS_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Tokens of prompts, padding included, after which the next ones get a pass of their own.

On a CPU, what is padded to the longest prompt costs more than several passes do: 64 prompts of 92
tokens on average, 157 at most, are read in 0.55 of the time.
"""


def pass_tokens(device: torch.device) -> int:
    """Return how many tokens of prompts are enough for a pass on a device."""
    return PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])


def passes_by_length(lengths: Sequence[int], enough: int) -> list[list[int]]:
    """Split prompts into passes, each of prompts of like length.

    Args:
        lengths: Of each prompt, in tokens.
        enough: A pass that has come to so many tokens, padding included, is full. A prompt by which
            it would come to twice as many begins another.

    Returns:
        Numbers of the prompts of each pass, shorter ones first.
    """
    passes: list[list[int]] = []
    full = True
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if full or (len(passes[-1]) + 1) * lengths[i] > max(2 * enough, lengths[i]):
            passes.append([])
        passes[-1].append(i)
        full = len(passes[-1]) * lengths[i] >= enough
    return passes


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
    def rows(self) -> int:
        """Number of rows."""
        return self.mask.shape[0]

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.mask.shape[1]

    def read(self, model: Any, ids: Tensor, valid: Tensor, step: Step | None = None) -> Tensor:
        """Read new tokens into every row.

        Args:
            model: A causal language model.
            ids: (rows, width) token ids, padded on the left: every row ends in the last column.
            valid: (rows, width) booleans, true where ``ids`` are tokens.
            step: How to read a single column, if not as the model itself does.

        Returns:
            (rows, vocabulary) logits after the last column; those of a row without any valid
            token mean nothing.
        """
        self.mask = torch.cat([self.mask, valid], dim=1)
        read = self.positions[:, None] + valid.cumsum(1)
        positions = (read - 1).clamp_min(0)
        self.positions = read[:, -1]
        if step is not None:
            held = [layer.open_slot() for layer in self.cache.layers]
            mask = functional.pad(self.mask, (0, held[0][0].shape[2] - self.slots))
            slot = torch.tensor([self.slots - 1], device=ids.device)
            return step(model, ids, mask, positions, slot, held)
        logits: Tensor = model(
            input_ids=ids,
            attention_mask=self.mask.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def extend(self, sources: Tensor) -> None:
        """Append copies of rows."""
        self.mask = torch.cat([self.mask, self.mask[sources]])
        self.positions = torch.cat([self.positions, self.positions[sources]])
        for layer in self.cache.layers:
            layer.extend(sources)

    def select(self, rows: Tensor) -> KeyValues:
        """Return a copy that holds the given rows, in their order (repeated ones too)."""
        return _assembled([(self, rows, torch.arange(len(rows), device=rows.device), self.slots)])


@dataclass(frozen=True, slots=True)
class History:
    """What has been read of a conversation: a row of a cache, up to a slot."""

    held: KeyValues
    row: int
    slots: int


def gathered(histories: Sequence[History | None], device: torch.device) -> KeyValues:
    """Return a cache with a row for each history; ``None`` is one of which nothing was read."""
    by_source: dict[tuple[int, int], list[tuple[int, History]]] = {}
    for place, h in enumerate(histories):
        if h is not None:
            by_source.setdefault((id(h.held), h.slots), []).append((place, h))
    if not by_source:
        return KeyValues(len(histories), device)

    def numbers(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    pieces = [
        (of[0][1].held, numbers(h.row for _, h in of), numbers(i for i, _ in of), of[0][1].slots)
        for of in by_source.values()
    ]
    missing = numbers(i for i, h in enumerate(histories) if h is None)
    if len(missing):  # their slots are holes; what stands there only has to be finite
        held, rows, _, slots = pieces[0]
        pieces.append((held, rows[:1].expand(len(missing)), missing, slots))
    new = _assembled(pieces)
    new.mask[missing] = False
    new.positions[missing] = 0
    return new


def _assembled(pieces: Sequence[tuple[KeyValues, Tensor, Tensor, int]]) -> KeyValues:
    """Return a cache that is put together of others: (cache, rows of it, rows here, slots) each."""
    new = KeyValues(sum(len(rows) for _, rows, _, _ in pieces), pieces[0][0].mask.device)
    total = max(slots for *_, slots in pieces)
    new.mask = new.mask.new_zeros(len(new.mask), total)
    # Holes stand before what was read and not after it: where a layer sees so many slots back and
    # no further, they would take the place of tokens.
    for held, rows, places, slots in pieces:
        new.mask[places, total - slots :] = held.mask[rows, :slots]
    new.positions = new.mask.sum(1)
    new.cache.layers = [
        _GrowingLayer.gathered([(held.cache.layers[i], *rest) for held, *rest in pieces])
        for i in range(len(pieces[0][0].cache.layers))
    ]
    return new


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
        step: How single tokens are read, if not as the model itself does: :func:`compiled_step`.
    """

    def __init__(
        self,
        model: Any,
        end: int,
        pad: int,
        generator: torch.Generator,
        step: Step | None = None,
    ) -> None:
        self.model = model
        self.step = step
        self.end = end
        self.pad = pad
        self.generator = generator
        self.device: torch.device = next(model.parameters()).device
        self.histories: dict[int, History] = {}  # of the conversations that may go on
        self.read_tokens = 0  # tokens that went through the model, for throughput figures

    @property
    def slots(self) -> int:
        """Slots that the longest history takes, holes included."""
        return max((h.slots for h in self.histories.values()), default=0)

    def forget(self, rows: Collection[int]) -> None:
        """Begin these conversations anew: their next tokens are read from position 0."""
        for row in rows:
            self.histories.pop(row, None)

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
        names = list(new)
        limit = config.max_new_tokens
        # Greedy draws no number, so that an evaluation leaves the training's chance alone.
        uniforms = (
            torch.rand(len(names), limit, generator=self.generator).to(self.device)
            if config.temperature > 0
            else None
        )
        # Conversations ``going`` are still being written; each stands at a row of the logits,
        # ``at``, and those rows are the rows ``rows`` of the cache.
        held, logits, at = self._read(new)
        rows = torch.arange(len(logits), device=self.device)
        going = torch.arange(len(names), device=self.device)
        steps: list[tuple[Tensor, ...]] = []  # conversations, tokens, log-probabilities, supports
        for step in range(limit):
            scaled, support = sampling_logits(logits, config)
            log_probs = scaled.log_softmax(-1)
            if uniforms is None:
                tokens = log_probs.argmax(-1)[at]
            else:
                tokens = draw(log_probs, uniforms[going, step], at)
            drawn = (going, tokens, log_probs[at, tokens])
            steps.append(drawn if support is None else (*drawn, support[at]))
            over = (tokens == self.end) | (step + 1 == limit)
            for i, row in zip(going[over].tolist(), rows[at[over]].tolist(), strict=True):
                self.histories[names[i]] = History(held, row, held.slots)
            going = going[~over]
            if not len(going):
                break
            # Those who stood at one row and drew one token stand at one row again.
            pairs = at[~over] * logits.shape[-1] + tokens[~over]
            distinct, at = torch.unique(pairs, return_inverse=True)
            sources = rows[distinct // logits.shape[-1]]
            parted = torch.zeros_like(sources, dtype=torch.bool)
            parted[1:] = sources[1:] == sources[:-1]
            more = int(parted.sum())
            if held.rows + more >= 2 * len(sources):  # half of the rows would be idle
                held, rows = held.select(sources), torch.arange(len(sources), device=self.device)
            else:
                rows = sources.clone()
                rows[parted] = torch.arange(held.rows, held.rows + more, device=self.device)
                held.extend(sources[parted])
            ids = torch.full((held.rows, 1), self.pad, device=self.device)
            valid = torch.zeros_like(ids, dtype=torch.bool)
            ids[rows, 0], valid[rows, 0] = distinct % logits.shape[-1], True
            logits = held.read(self.model, ids, valid, self.step)[rows]
            self.read_tokens += len(rows)
        return self._by_row(names, steps)

    def _by_row(
        self, names: Sequence[int], steps: Sequence[tuple[Tensor, ...]]
    ) -> dict[int, Completion]:
        """Sort what was sampled step by step into answers."""
        whose, *columns = (torch.cat(column) for column in zip(*steps, strict=True))
        order = whose.argsort(stable=True)
        lengths = whose.bincount(minlength=len(names)).tolist()
        ids, log_probs, *supports = (torch.split(c[order].cpu(), lengths) for c in columns)
        held = supports[0] if supports else (None,) * len(names)
        return {
            name: Completion(said.tolist(), chances.tolist(), int(said[-1]) != self.end, support)
            for name, said, chances, support in zip(names, ids, log_probs, held, strict=True)
        }

    def _read(self, new: dict[int, list[int]]) -> tuple[KeyValues, Tensor, Tensor]:
        """Read what is new, once for conversations that are alike.

        Returns:
            The cache, the logits after each of its rows, and the row of each conversation.
        """
        known, history = self.histories, None
        alike: dict[Any, int] = {}
        keys: list[tuple[History | None, tuple[int, ...]]] = []
        at: list[int] = []
        for name, ids in new.items():
            history = known.get(name)
            key = (history and (id(history.held), history.row, history.slots), tuple(ids))
            if key not in alike:
                alike[key] = len(keys)
                keys.append((history, key[1]))
            at.append(alike[key])
        fresh = [ids for _, ids in keys]
        places = torch.tensor(at, device=self.device)
        held = gathered([history for history, _ in keys], self.device)
        del known, keys, history  # the caches that this one was made of go before the reading
        self.histories = {}
        if held.slots:
            return held, self._read_padded(held, fresh), places
        return *self._read_prompts(fresh), places

    def _read_prompts(self, new: Sequence[Sequence[int]]) -> tuple[KeyValues, Tensor]:
        """Read conversations from their beginning."""
        passes = passes_by_length([len(ids) for ids in new], pass_tokens(self.device))
        if len(passes) == 1:
            held = KeyValues(len(new), self.device)
            return held, self._read_padded(held, new)
        logits, pieces = [], []
        for members in passes:
            piece = KeyValues(len(members), self.device)
            logits.append(self._read_padded(piece, [new[i] for i in members]))
            places = torch.tensor(members, device=self.device)
            pieces.append((piece, torch.arange(len(members), device=self.device), places))
        held = _assembled([(*piece, piece[0].slots) for piece in pieces])
        order = torch.cat([places for *_, places in pieces]).argsort()
        return held, torch.cat(logits)[order]

    def _read_padded(self, held: KeyValues, new: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, new))
        ids = torch.tensor([[self.pad] * (width - len(x)) + list(x) for x in new])
        lengths = torch.tensor([len(x) for x in new])
        valid = torch.arange(width) >= width - lengths[:, None]
        self.read_tokens += int(lengths.sum())
        return held.read(self.model, ids.to(self.device), valid.to(self.device))
