"""A causal language model as a policy that writes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agents.policies.models import Scores, load_model, split_model
from agents.sampling import Completion, Sampler, SamplingConfig, sampling_logits


@dataclass(slots=True)
class TokenSequence:
    """A conversation as the token ids that were read and sampled, never encoded again.

    Attributes:
        row: Which episode of the rollout it belongs to.
        ids: Token ids, of the environment and of the policy.
        turns: For each token the turn it answers, or -1 where the environment wrote it.
        log_probs: For each token its log-probability when it was sampled (0 where it was not).
        support: For the sampled tokens, what could have been drawn, (sampled, vocabulary)
            booleans; ``None`` where everything could.
    """

    row: int
    ids: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    support: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens that the environment wrote."""
        self.ids += ids
        self.turns += [-1] * len(ids)
        self.log_probs += [0.0] * len(ids)

    def wrote(self, turn: int, completion: Completion) -> None:
        """Append a sampled answer."""
        self.ids += completion.ids
        self.turns += [turn] * len(completion.ids)
        self.log_probs += completion.log_probs
        if completion.support is not None:
            held = [] if self.support is None else [self.support]
            self.support = torch.cat([*held, completion.support])


class CausalLMPolicy:
    """Writes answers by sampling tokens from a causal language model.

    The model stays in eval mode throughout: dropout would make what is scored differ from what
    was sampled.

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its tokenizer.
        sampling: How answers are drawn.
        seed: Seed of the sampling.
        micro_batch_tokens: Most tokens, padding included, in one forward pass of ``score``.
    """

    family = "writing"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        micro_batch_tokens: int = 8192,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.generator = torch.Generator().manual_seed(seed)
        self.micro_batch_tokens = micro_batch_tokens
        self.end: int = tokenizer.eos_token_id
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context: int = getattr(model.config, "max_position_embeddings", 2**31 - 1)
        self.parts = split_model(model)
        self.truncated_prompts = 0
        self.read_tokens = 0
        if self.sampling.max_new_tokens >= self.context:
            raise ValueError(
                f"max_new_tokens {self.sampling.max_new_tokens} leaves no room for a prompt in "
                f"the model's context of {self.context} tokens."
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        device: str = "auto",
        dtype: str = "float32",
        **arguments: Any,
    ) -> CausalLMPolicy:
        """Load a model: ``"tiny"`` (embedded), a hub id, or a folder; see :func:`load_model`."""
        model, tokenizer = load_model(name, device, dtype)
        return cls(model, tokenizer, **arguments)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def begin(self, sampling: SamplingConfig | None = None) -> Conversations:
        """Open a rollout: rows of conversations that grow turn by turn."""
        return Conversations(self, sampling or self.sampling)

    def micro_batches(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Group sequences of similar lengths, each group within ``micro_batch_tokens``."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        groups: list[list[int]] = []
        for i in order:
            # Ascending lengths: the newest member sets the width of the whole group.
            if not groups or (len(groups[-1]) + 1) * len(sequences[i]) > self.micro_batch_tokens:
                groups.append([])
            groups[-1].append(i)
        return groups

    def score(
        self, sequences: Sequence[TokenSequence], reference: CausalLMPolicy | None = None
    ) -> Scores:
        """Score every sampled token of the sequences, in their order, with gradients.

        Args:
            sequences: What was read and sampled.
            reference: Policy to measure the KL divergence from, without gradients.

        Returns:
            Flat scores of all sampled tokens. Padding costs time but changes nothing.
        """
        config = self.sampling
        ids = pad_sequence(
            [torch.tensor(s.ids) for s in sequences], batch_first=True, padding_value=self.pad
        )
        sampled = pad_sequence(
            [torch.tensor(s.turns) >= 0 for s in sequences], batch_first=True, padding_value=False
        )
        # The logits at a token are a guess at the next one.
        guesses = sampled.roll(-1, dims=1)
        guesses[:, -1] = False
        logits = self._logits(ids, guesses)
        support = None
        if config.truncates:
            supports = [s.support for s in sequences if s.support is not None]
            support = torch.cat(supports).to(logits.device)
        log_dist = sampling_logits(logits, config, support)[0].log_softmax(-1)
        targets = ids[sampled].to(logits.device)
        log_probs = log_dist.gather(1, targets[:, None])[:, 0]
        # 0 · -inf is no number; outside the support the product is 0.
        finite = log_dist.masked_fill(log_dist == -torch.inf, 0.0)
        entropies = -(log_dist.exp() * finite).sum(-1)
        kls = None
        if reference is not None:
            with torch.no_grad():
                ref = reference._logits(ids, guesses).float().log_softmax(-1)
            own = logits.float().log_softmax(-1)
            kls = (own.exp() * (own - ref)).sum(-1)
        return Scores(log_probs, entropies, kls)

    def _logits(self, ids: Tensor, chosen: Tensor) -> Tensor:
        """Logits at the chosen places, (chosen, vocabulary); ids are padded on the right.

        Causal attention never looks at padding on the right, so no mask is needed.
        """
        ids, chosen = ids.to(self.device), chosen.to(self.device)
        if self.parts is None:
            every: Tensor = self.model(input_ids=ids, use_cache=False).logits
            return every[chosen]
        trunk, head = self.parts
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state[chosen]
        logits: Tensor = head(hidden)
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer; ``from_pretrained`` reads them."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class Conversations:
    """Rows of conversations in play: token ids in, token ids out.

    Text that the environment adds is encoded by itself and appended; nothing that was sampled is
    ever encoded again.

    Attributes:
        sequences: Every conversation so far; a row has more than one if it had to begin anew.
        cut: Number of answers that the length limit ended.
        answers: Number of answers.
    """

    def __init__(self, policy: CausalLMPolicy, sampling: SamplingConfig) -> None:
        self.policy = policy
        self.sampling = sampling
        self.sampler = Sampler(policy.model, policy.end, policy.pad, policy.generator)
        self.sequences: list[TokenSequence] = []
        self.cut = 0
        self.answers = 0
        self._current: dict[int, TokenSequence] = {}
        self._seen: dict[int, str] = {}  # observation + action, as far as the row has come
        self._unread: dict[int, list[int]] = {}  # sampled, but not yet in the cache

    def act(self, observations: dict[int, str], turn: int) -> dict[int, str]:
        """Answer the observation of each row that is still in play.

        Args:
            observations: Row -> observation. Rows that are left out are over.
            turn: Number of the turn, for all rows.

        Returns:
            Row -> answer, without the end-of-sequence token.
        """
        self._read(observations)
        completions = self.sampler.answer(self._unread, self.sampling)
        self.policy.read_tokens += self.sampler.read_tokens
        self.sampler.read_tokens = 0
        rows = list(completions)
        end = self.policy.end
        written = [[t for t in completions[r].ids if t != end] for r in rows]
        texts = self.policy.tokenizer.batch_decode(written, skip_special_tokens=False)
        for row, text in zip(rows, texts, strict=True):
            completion = completions[row]
            self._current[row].wrote(turn, completion)
            self._seen[row] = observations[row] + text
            self._unread[row] = completion.ids[-1:]  # sampled last, so never read
            self.cut += completion.cut
            self.answers += 1
        return dict(zip(rows, texts, strict=True))

    def _read(self, observations: dict[int, str]) -> None:
        self._unread = {r: self._unread.get(r, []) for r in observations}
        added: dict[int, str] = {}
        for row, observation in observations.items():
            seen = self._seen.get(row)
            if seen is not None and not observation.startswith(seen):
                seen = None  # the conversation was rewritten: begin anew
            if seen is None:
                self._begin(row)
            added[row] = observation[len(seen) :] if seen is not None else observation
        encoded = self.policy.tokenizer(list(added.values()), add_special_tokens=False)
        room = self.policy.context - self.sampling.max_new_tokens
        for row, ids in zip(added, encoded["input_ids"], strict=True):
            if len(self._current[row]) + len(ids) > room:
                ids = self._shorten(row, observations[row], room)
            if not ids and not self._unread[row]:
                raise ValueError(
                    f"The observation {observations[row]!r} holds no token to answer. "
                    "The environment has to ask something."
                )
            self._current[row].read(ids)
            self._unread[row] = self._unread[row] + ids

    def _begin(self, row: int) -> None:
        if row in self._current:
            self.sampler.forget([row])
        self._current[row] = TokenSequence(row)
        self.sequences.append(self._current[row])
        self._unread[row] = []

    def _shorten(self, row: int, observation: str, room: int) -> list[int]:
        """Begin the row anew with the end of its conversation, as much as the context holds."""
        self.policy.truncated_prompts += 1
        if self.policy.truncated_prompts == 1:
            warnings.warn(
                f"A conversation is longer than the model's context of {self.policy.context} "
                "tokens; its beginning is cut off. `policy.truncated_prompts` counts them all.",
                stacklevel=4,
            )
        if len(self._current[row]):
            self._begin(row)
        ids: list[int] = self.policy.tokenizer(observation, add_special_tokens=False)["input_ids"]
        return ids[-room:]
