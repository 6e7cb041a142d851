"""A scalar head: a transformer's hidden state of (prompt, candidate) becomes one number.

Any causal language model can wear one, and any BERT-like encoder, which has no likelihood. What
stands for a candidate is

- with a causal model, the state of the candidate's last token. All k candidates are read in one
  row: the prompt once, then the candidates beside each other, each seeing the prompt and itself;
- with an encoder, the mean of the states of the pair's tokens, the pair framed as the encoder's
  tokenizer frames pairs ([CLS] prompt [SEP] candidate [SEP]). The prompt's states depend on the
  candidate here, so each pair is read whole, and short pairs share a row, blind to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from agents.policies.models import (
    Critic,
    Question,
    attention_window,
    branch_mask,
    context_length,
    eval_mode,
    folder_of,
    is_encoder,
    load_model,
    pad_right,
)
from agents.sampling import at_least_float32

HEAD_FILE = "scalar_head.safetensors"

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairFrame:
    """What a tokenizer puts around the two texts of a pair.

    Attributes:
        before: Token ids before the first text.
        between: Token ids between the two.
        after: Token ids after the second.
        types: Token type ids of before, first, between, second and after; ``None`` where the
            encoder has no token types.
    """

    before: Ids
    between: Ids
    after: Ids
    types: tuple[int, int, int, int, int] | None

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> PairFrame:
        """Learn the frame from one pair that the tokenizer frames.

        Args:
            tokenizer: A fast tokenizer.
            config: Configuration of the encoder, which has token types or not.
        """
        encoded = tokenizer("a", "b")
        ids, side = encoded["input_ids"], encoded.sequence_ids(0)
        first, second = side.index(0), side.index(1)
        between = len(side) - side[::-1].index(0)  # where the first text has ended
        after = len(side) - side[::-1].index(1)
        types = None
        if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in encoded:
            told = encoded["token_type_ids"]
            types = (told[0], told[first], told[second - 1], told[second], told[-1])
        before = tuple(ids[:first])
        return cls(before, tuple(ids[between:second]), tuple(ids[after:]), types)

    def __len__(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def ids(self, prompt: Ids, candidate: Ids) -> Ids:
        """Return the token ids of a pair."""
        return (*self.before, *prompt, *self.between, *candidate, *self.after)

    def type_ids(self, prompt: Ids, candidate: Ids) -> Ids:
        """Return the token type ids of a pair; all 0 where there are none."""
        parts = (self.before, prompt, self.between, candidate, self.after)
        types = self.types or (0,) * len(parts)
        return tuple(t for part, t in zip(parts, types, strict=True) for _ in part)


class ScalarModel(nn.Module):
    """A transformer and a linear head that scores each candidate after its prompt.

    score = √hidden · w · state

    The head w begins at zero, so all candidates score alike at first, and has no bias, as a softmax
    over candidates would not see it. Adam moves every weight by about its learning rate, and one
    that suits a pretrained trunk would move the scores too little for hundreds of updates; the
    factor makes the head learn that much faster than the trunk.

    Args:
        model: Any model of ``transformers``; what it has on its trunk is left out.
        tokenizer: Its tokenizer.

    Attributes:
        trunk: The transformer.
        head: (1, hidden) linear, without bias.
        frame: How an encoder reads pairs; ``None`` for a causal model.
        context: Most tokens of a prompt and a candidate together, the frame not counted.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        trunk = model.base_model
        config = trunk.config
        size = config.get_text_config().hidden_size
        self.head = nn.Linear(size, 1, bias=False, device=trunk.device, dtype=trunk.dtype)
        nn.init.zeros_(self.head.weight)
        self.trunk = trunk
        if getattr(trunk, "pooler", None) is not None:
            trunk.pooler.requires_grad_(False)  # of a classifier on the first token; not used here
        self.pad: int = tokenizer.pad_token_id or 0
        self.frame: PairFrame | None = None
        if is_encoder(config):
            self.frame = PairFrame.of(tokenizer, config)
            self.first_position = first_position(trunk, self.pad)
            positions = context_length(trunk) - (self.first_position or 0)
            self.context = min(positions, tokenizer.model_max_length) - len(self.frame)
        else:
            # Within the shortest window of attention all layers see the same.
            self.context = min(context_length(trunk), attention_window(trunk) or 2**31)

    def forward(
        self, questions: Sequence[Question], critic: Critic | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Score every candidate.

        Args:
            questions: (prompt ids, ids of each candidate), each with one candidate or more, or
                none at all.
            critic: Judges the mean of what stands for the candidates of a question: an encoder
                reads no prompt alone.

        Returns:
            (questions, most candidates) scores, -inf where none is, and of a critic (questions,)
            values.
        """
        # The copies of a question, as a group has them, are read once. Where nothing is asked, one
        # is read in vain: every weight is to get a gradient, of 0, as in processes that ask.
        nothing: Question = ((self.pad,), ((self.pad,),))
        place = {question: i for i, question in enumerate(dict.fromkeys(questions or [nothing]))}
        states = self.states(list(place))
        with torch.autocast(states.device.type, enabled=False):  # scores would be too coarse
            scores = self.head(states.to(self.head.weight.dtype))[:, 0]
        scores = at_least_float32(scores) * states.shape[1] ** 0.5
        counts = [len(candidates) for _, candidates in place]
        split = list(torch.split(scores, counts))
        table = pad_sequence(split, batch_first=True, padding_value=-torch.inf)
        asked = torch.tensor([place[q] for q in questions], dtype=torch.long, device=table.device)
        if critic is None:
            return table[asked], None
        means = torch.stack([part.mean(0) for part in torch.split(states, counts)])
        return table[asked], critic(means)[asked]

    def states(self, questions: Sequence[Question]) -> Tensor:
        """Return what stands for every candidate, (Σ candidates, hidden), question by question.

        Args:
            questions: As in ``forward``; one or more.
        """
        if self.frame is None:
            return self._branch_states(questions)
        pairs = [(prompt, c) for prompt, candidates in questions for c in candidates]
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        states = self._pair_states(list(place), self.frame)
        return states[torch.tensor([place[pair] for pair in pairs], device=states.device)]

    def width(self, prompt: Ids, candidates: Sequence[Ids]) -> int:
        """Return how many tokens a question takes, padding between its pairs included."""
        if self.frame is None:
            return len(prompt) + sum(map(len, candidates))
        return len(candidates) * (len(self.frame) + len(prompt) + max(map(len, candidates)))

    def _branch_states(self, questions: Sequence[Question]) -> Tensor:
        """Read each question in one row, its prompt once."""
        ids, positions, branches = [], [], []
        ends: list[tuple[int, int]] = []  # row and place of each candidate's last token
        for row, (prompt, candidates) in enumerate(questions):
            ids.append(list(prompt))
            positions.append(list(range(len(prompt))))
            branches.append([0] * len(prompt))
            for k, candidate in enumerate(candidates, 1):
                ids[-1] += candidate
                positions[-1] += range(len(prompt), len(prompt) + len(candidate))
                branches[-1] += [k] * len(candidate)
                ends.append((row, len(ids[-1]) - 1))
        rows, places = torch.tensor(ends).T
        hidden = self._hidden(
            input_ids=pad_right(ids, self.pad),
            position_ids=pad_right(positions, 0),
            attention_mask=branch_mask(pad_right(branches, -1), self.trunk.dtype, causal=True),
        )
        return hidden[rows.to(hidden.device), places.to(hidden.device)]

    def _pair_states(self, pairs: Sequence[tuple[Ids, Ids]], frame: PairFrame) -> Tensor:
        """Read pairs in rows as wide as the longest pair; those that fit share a row.

        So no row costs more attention than without packing, and there are fewer of them.
        """
        texts = [frame.ids(*pair) for pair in pairs]
        first = self.first_position
        rows = pack([len(text) for text in texts], 0 if first is None else max(map(len, texts)))
        # Texts are numbered from 1, as nobody shares branch 0.
        branch = pad_right([[i + 1 for i in row for _ in texts[i]] for row in rows], -1)
        ids = pad_right([[t for i in row for t in texts[i]] for row in rows], self.pad)
        inputs = {"input_ids": ids}
        if frame.types is not None:
            types = [[t for i in row for t in frame.type_ids(*pairs[i])] for row in rows]
            inputs["token_type_ids"] = pad_right(types, 0)
        if first is None:
            inputs["attention_mask"] = (branch > 0).long()
        else:
            positions = [[first + j for i in row for j in range(len(texts[i]))] for row in rows]
            inputs["position_ids"] = pad_right(positions, first)
            inputs["attention_mask"] = branch_mask(branch, self.trunk.dtype, causal=False)
        hidden = self._hidden(**inputs)
        owner = branch.clamp_min(0).flatten().to(hidden.device)  # padding is gathered in row 0
        sums = hidden.new_zeros(len(texts) + 1, hidden.shape[-1])
        sums = sums.index_add(0, owner, hidden.flatten(0, 1))[1:]
        return sums / torch.tensor([[len(text)] for text in texts]).to(sums)

    def _hidden(self, **inputs: Tensor) -> Tensor:
        """Run the trunk without dropout: what is scored has to be what was sampled."""
        device = self.head.weight.device
        more = {"use_cache": False} if self.frame is None else {}
        with eval_mode(self.trunk):
            found = self.trunk(**{name: t.to(device) for name, t in inputs.items()}, **more)
        return found.last_hidden_state  # type: ignore[no-any-return]

    # --- what policies ask of a model of ``transformers`` ----------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the trunk's weights."""
        return self.trunk.dtype  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """Configuration of the trunk."""
        return self.trunk.config

    @property
    def base_model(self) -> Any:
        """The trunk."""
        return self.trunk

    def get_output_embeddings(self) -> None:
        """Return nothing: it writes no tokens."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trunk, as any model of ``transformers``, and the head beside it."""
        self.trunk.save_pretrained(folder)
        save_file(self.head.state_dict(), Path(folder) / HEAD_FILE)


def load_scalar_model(name: str | Path, device: str, dtype: str) -> tuple[ScalarModel, Any]:
    """Load a model with a scalar head, and its tokenizer.

    Args:
        name: As in :func:`load_model`, any encoder too. Without a saved head it gets a new one.
        device: ``"auto"`` or a torch device.
        dtype: Name of a torch dtype.

    Raises:
        ValueError: See :func:`load_model`; or the head is damaged.
    """
    trunk, tokenizer = load_model(name, device, dtype, writes=False)
    model = ScalarModel(trunk, tokenizer)
    if has_scalar_head(name):
        path = folder_of(name) / HEAD_FILE
        try:
            model.head.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"The scalar head {path} is damaged: {error}") from error
    return model, tokenizer


def has_scalar_head(name: str | Path) -> bool:
    """Return whether a name is that of a folder in which a scalar head was saved."""
    return (folder_of(name) / HEAD_FILE).is_file()


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put texts into rows, the longest first, each into the first row that has room for it.

    Args:
        lengths: Tokens of each text.
        room: Tokens that a row holds; a text that is longer has a row of its own.

    Returns:
        The indices of the texts in each row.
    """
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, free in enumerate(left) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(i)
        left[row] -= lengths[i]
    return rows


@torch.no_grad()
def first_position(trunk: Any, pad: int) -> int | None:
    """Return the position id of a text's first token where texts can share a row, else ``None``.

    Most encoders count positions from 0, RoBERTa and its kin from the padding's id + 1; some take
    no such mask, or see through a window that counts places. So two texts are read in one row and
    each alone, and the states compared.
    """
    if attention_window(trunk) is not None:
        return None
    a, b, c = (i for i in range(4) if i != pad) if pad < 4 else range(3)
    device = next(trunk.parameters()).device
    ids = torch.tensor([[a, b, c], [c, a, a]], device=device)
    with eval_mode(trunk):
        alone = trunk(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        branch = torch.tensor([[1, 1, 1, 2, 2, 2]], device=device)
        mask = branch_mask(branch, trunk.dtype, causal=False)
        for first in (0, pad + 1):
            positions = torch.arange(first, first + 3, device=device).repeat(1, 2)
            try:
                row = trunk(
                    input_ids=ids.view(1, 6), attention_mask=mask, position_ids=positions
                ).last_hidden_state
            except Exception:  # whatever a model says that does not take them
                return None
            if torch.allclose(row.view_as(alone), alone, rtol=1e-4, atol=1e-4):
                return first
    return None
