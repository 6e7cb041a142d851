"""A causal language model as a policy that writes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.objectives import entropy, kl_divergence
from agents.policies.chat import CHAT_FILE, ChatTemplate, Said, as_messages
from agents.policies.lora import Lora
from agents.policies.models import (
    Critic,
    Passes,
    Reading,
    Scores,
    attention_window,
    bfloat16,
    context_length,
    eval_mode,
    folder_of,
    in_chunks,
    load_model,
    read,
    save_model,
    split_model,
)
from agents.policies.prefix_tree import (
    TREE_TOKENS,
    Forest,
    SampledTokens,
    forest,
    joined,
    reads_trees,
    rows_of,
    sampled_tokens,
)
from agents.sampling import (
    Completion,
    Sampler,
    SamplingConfig,
    at_least_float32,
    compiled_step,
    sampling_logits,
)
from agents.settings import MICRO_BATCH_TOKENS


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

    @property
    def states(self) -> list[int]:
        """Places of the last token before each answer; of the last of all where there is none."""
        turns = np.array(self.turns)
        begins = (turns[1:] >= 0) & (turns[1:] != turns[:-1])
        return np.flatnonzero(begins).tolist() or [len(self) - 1]

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


@dataclass(frozen=True, slots=True)
class LaidOut:
    """Some sequences, laid out to be read.

    Attributes:
        forest: Their distinct prefixes.
        sampled: Their sampled tokens, on the model's device.
    """

    forest: Forest
    sampled: SampledTokens


class CausalLMPolicy:
    """Writes answers by sampling tokens from a causal language model.

    The model samples and is scored in eval mode, whatever mode the caller keeps it in: dropout
    would make what is scored differ from what was sampled.

    Args:
        model: A causal language model of ``transformers``.
        tokenizer: Its tokenizer.
        sampling: How answers are drawn.
        seed: Seed of the sampling.
        micro_batch_tokens: Most tokens, padding included, in one forward pass of ``score``.
        chat: Whether conversations are read as messages, rendered by the tokenizer's chat
            template, and not as the observation's text. ``None``: if it has a template.
        system: A system message before every conversation (chat only); ``None`` leaves it to the
            template.

    Attributes:
        passes: How forward passes are made, of sampling and of ``score``.
        trees: Whether the model can read what sequences share once (:func:`reads_trees`).

    Raises:
        ValueError: ``chat`` without a template, a template that refuses the system message, or
            ``system`` without chat.
    """

    family = "writing"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
        micro_batch_tokens: int = MICRO_BATCH_TOKENS,
        chat: bool | None = None,
        system: str | None = None,
    ) -> None:
        if chat is None:
            chat = bool(tokenizer.chat_template)
        if system is not None and not chat:
            raise ValueError(
                "A system message belongs to a chat template, and this policy uses none. Leave "
                "`system` out, or give a model whose tokenizer has a chat template."
            )
        self.chat = ChatTemplate(tokenizer, system) if chat else None
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.generator = torch.Generator().manual_seed(seed)
        self.micro_batch_tokens = micro_batch_tokens
        self.passes = Passes()
        self.end: int = tokenizer.eos_token_id if self.chat is None else self.chat.end
        self.pad: int = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.context = context_length(model)
        self.window = attention_window(model)
        self.parts = split_model(model)
        self.trees = reads_trees(model, self.parts)
        self.truncated_prompts = 0
        self.changed_conversations = 0
        self.read_tokens = 0
        self.room(self.sampling)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "tiny",
        *,
        device: str = "auto",
        dtype: str = "float32",
        lora: Lora | None = None,
        merge: bool = True,
        **arguments: Any,
    ) -> CausalLMPolicy:
        """Load a model: ``"tiny"`` (embedded), a hub id, or a folder; see :func:`load_model`.

        A folder that ``save_pretrained`` wrote tells ``chat`` and ``system`` too.
        """
        model, tokenizer = load_model(name, device, dtype, lora=lora, merge=merge)
        if (settings := folder_of(name) / CHAT_FILE).exists():
            arguments = json.loads(settings.read_text(encoding="utf-8")) | arguments
        return cls(model, tokenizer, **arguments)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def can_compile(self) -> bool:
        """Whether the sampler's steps can be compiled: they say themselves who sees what."""
        return self.trees and (self.window is None or self.window >= self.context)

    def room(self, sampling: SamplingConfig) -> int:
        """Return how many tokens a conversation may have before an answer.

        Raises:
            ValueError: The answer leaves no room.
        """
        if sampling.max_new_tokens >= self.context:
            raise ValueError(
                f"max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt in "
                f"the model's context of {self.context} tokens."
            )
        return self.context - sampling.max_new_tokens

    def begin(self, sampling: SamplingConfig | None = None) -> Conversations:
        """Open a rollout: rows of conversations that grow turn by turn."""
        if self.chat is not None:
            return ChatConversations(self, sampling or self.sampling, self.chat)
        return Conversations(self, sampling or self.sampling)

    def micro_batches(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Group sequences, each group within ``micro_batch_tokens``.

        What begins alike stays together (:mod:`agents.policies.prefix_tree`), and rows of similar
        widths do.
        """
        rows = self._rows([s.ids for s in sequences])
        groups: list[list[int]] = []
        count = 0
        for row, width in sorted(rows, key=lambda found: found[1]):
            # Ascending widths: the newest row sets the width of the whole group.
            count += 1
            if not groups or count * width > self.micro_batch_tokens:
                groups.append([])
                count = 1
            groups[-1] += row
        return groups

    def _rows(
        self, sequences: Sequence[Sequence[int]], other: CausalLMPolicy | None = None
    ) -> list[tuple[list[int], int]]:
        """Distribute sequences over rows; return the members of each and its width."""
        longest = max(map(len, sequences), default=0)
        readers = [self] if other is None else [self, other]
        if any(not p.trees or (p.window is not None and longest > p.window) for p in readers):
            return [([i], len(ids)) for i, ids in enumerate(sequences)]
        # Some windows count slots, so that a row must not be longer than they are either.
        windows = [p.window for p in readers if p.window is not None]
        return rows_of(sequences, limit=min(TREE_TOKENS, self.micro_batch_tokens, *windows))

    def score(
        self,
        sequences: Sequence[TokenSequence],
        reference: CausalLMPolicy | None = None,
        critic: Critic | None = None,
    ) -> Scores:
        """Score every sampled token of the sequences, in their order, with gradients.

        Args:
            sequences: What was read and sampled.
            reference: Policy to measure the KL divergence from, without gradients.
            critic: Says what the state before each answer is worth.

        Returns:
            Flat scores of all sampled tokens. Padding costs time but changes nothing: it stands on
            the right, where neither causal attention nor the mask of a tree lets anybody look.
        """
        support = self._support(sequences)
        found = self.lay_out(sequences, reference, distinct=support is None)
        own = self.read(found.forest)
        with torch.no_grad():
            other = None if reference is None else reference.read(found.forest)

        def scored(
            places: Tensor, targets: Tensor, support: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits = own.logits(places)
            log_dist = sampling_logits(logits, self.sampling, support)[0].log_softmax(-1)
            kls = torch.zeros(0)
            if other is not None:
                with torch.no_grad():
                    ref = at_least_float32(other.logits(places)).log_softmax(-1)
                kls = kl_divergence(at_least_float32(logits).log_softmax(-1), ref)
            return log_dist.gather(1, targets), entropy(log_dist), kls

        at = found.sampled
        log_probs, entropies, kls = in_chunks(
            scored, at.places, at.targets, support, vocabulary=self.vocabulary
        )
        return Scores(
            log_probs.flatten()[at.slot_of],
            entropies[at.place_of],
            None if reference is None else kls[at.place_of],
            None if critic is None else critic(own.hidden[self._states(sequences, found.forest)]),
        )

    def values(self, sequences: Sequence[TokenSequence], critic: Critic) -> Tensor:
        """Return what the critic says of the state before each answer, in their order.

        A sequence without an answer has one state, that after its last token.
        """
        found = self.lay_out(sequences)
        states = self._states(sequences, found.forest)
        values: Tensor = critic(self.read(found.forest).hidden[states])
        return values

    def _states(self, sequences: Sequence[TokenSequence], laid_out: Forest) -> Tensor:
        """Return the flattened places of the sequences' states, one sequence after the other."""
        found = [nodes[s.states] for nodes, s in zip(laid_out.nodes, sequences, strict=True)]
        return torch.from_numpy(joined(found)).to(self.device)

    def lay_out(
        self,
        sequences: Sequence[TokenSequence],
        other: CausalLMPolicy | None = None,
        *,
        distinct: bool = True,
    ) -> LaidOut:
        """Lay sequences out for ``read``, each distinct prefix once.

        Args:
            sequences: What was read and sampled.
            other: Another policy that will read the same, if its model can.
            distinct: See :func:`sampled_tokens`.
        """
        ids = [s.ids for s in sequences]
        laid_out = forest(ids, [members for members, _ in self._rows(ids, other)], self.pad)
        sampled = [np.array(s.turns) >= 0 for s in sequences]
        at = sampled_tokens(laid_out, ids, sampled, distinct=distinct)
        device = self.device
        return LaidOut(
            laid_out,
            SampledTokens(
                *(t.to(device) for t in (at.places, at.targets, at.place_of, at.slot_of))
            ),
        )

    def read(self, laid_out: Forest) -> Reading:
        """Read every node of a forest once."""
        device = self.device
        inputs = {"input_ids": laid_out.ids.to(device)}
        mask = laid_out.mask(self.model.dtype, device)
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": laid_out.positions.to(device)}
        return read(self.model, self.parts, self.passes, **inputs)

    @property
    def vocabulary(self) -> int:
        """Size of the model's vocabulary."""
        return int(self.model.config.get_text_config().vocab_size)

    def _support(self, sequences: Sequence[TokenSequence]) -> Tensor | None:
        """What each sampled token was drawn from; ``None`` where that was always everything."""
        if not self.sampling.truncates and all(s.support is None for s in sequences):
            return None
        everything = torch.ones(1, self.vocabulary, dtype=torch.bool)
        supports = [
            everything.expand(sum(t >= 0 for t in s.turns), -1) if s.support is None else s.support
            for s in sequences
        ]
        return torch.cat([everything[:0], *supports]).to(self.device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model (safetensors) and tokenizer; ``from_pretrained`` reads them."""
        save_model(self.model, self.tokenizer, folder)
        if self.tokenizer.chat_template:
            system = None if self.chat is None else self.chat.system
            settings = json.dumps({"chat": self.chat is not None, "system": system}, indent=1)
            (Path(folder) / CHAT_FILE).write_text(settings, encoding="utf-8")


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
        self.room = policy.room(sampling)
        device = policy.device.type
        step = compiled_step(device) if policy.passes.compiled else None
        self.sampler = Sampler(policy.model, policy.end, policy.pad, policy.generator, step)
        self.sequences: list[TokenSequence] = []
        self.cut = 0
        self.answers = 0
        self._current: dict[int, TokenSequence] = {}
        self._seen: dict[int, Any] = {}  # how far the row has come: observation + action
        self._unread: dict[int, list[int]] = {}  # sampled, but not yet in the cache

    def act(
        self, observations: dict[int, Any], turn: int, *, said: dict[int, str] | None = None
    ) -> dict[int, str]:
        """Answer the observation of each row that is still in play.

        Args:
            observations: Row -> observation. Rows that are left out are over; if one comes back,
                it begins anew.
            turn: Number of the turn, for all rows.
            said: Row -> an answer to write down instead of sampling one, as a teacher gives it.

        Returns:
            Row -> answer, without the end-of-sequence token.
        """
        self._read(observations)
        if said is not None:
            completions = self._completions(said)
        else:
            model = self.policy.model
            with eval_mode(model), bfloat16(model, self.policy.passes.bfloat16):
                completions = self.sampler.answer(self._unread, self.sampling)
        self.policy.read_tokens += self.sampler.read_tokens
        self.sampler.read_tokens = 0
        rows = list(completions)
        end = self.policy.end
        written = [[t for t in completions[r].ids if t != end] for r in rows]
        texts = self.policy.tokenizer.batch_decode(written, clean_up_tokenization_spaces=False)
        for row, text in zip(rows, texts, strict=True):
            completion = completions[row]
            self._current[row].wrote(turn, completion)
            self._remember(row, observations[row], text)
            self._unread[row] = completion.ids[-1:]  # sampled last, so never read
            self.cut += completion.cut
            self.answers += 1
        return dict(zip(rows, texts, strict=True))

    def _completions(self, said: dict[int, str]) -> dict[int, Completion]:
        """Encode answers as if they had been sampled, with the end of sequence if it has room."""
        texts = [self._worded(answer) for answer in said.values()]
        encoded = self.policy.tokenizer(texts, add_special_tokens=False)["input_ids"]
        limit = self.sampling.max_new_tokens
        completions = {}
        for row, ids in zip(said, encoded, strict=True):
            ids = [*ids, self.policy.end][:limit]
            completions[row] = Completion(ids, [0.0] * len(ids), ids[-1] != self.policy.end)
        return completions

    def _worded(self, answer: str) -> str:
        """Return an answer as a policy would write it: words that follow a colon have a space.

        Without it they would be other tokens than where they are read, as in the passage.
        """
        return answer if answer[:1].isspace() else f" {answer}"

    def state_of(self, row: int, observation: Any) -> TokenSequence:
        """Return the conversation of a row that is over, for a critic; nothing is answered."""
        known = len(self.sequences)
        added = self._encode({row: self._added(row, observation)})[row]
        del self.sequences[known:]  # of a conversation that was rewritten, which begins anew
        sequence = TokenSequence(row)
        sequence.read((self._current[row].ids + added)[-self.policy.context :])
        return sequence

    def _remember(self, row: int, observation: Any, answer: str) -> None:
        self._seen[row] = observation + answer

    def _added(self, row: int, observation: Any) -> str:
        """Return what the row has not read yet: all of it, if it is new or was rewritten."""
        seen = self._seen.get(row)
        if seen is None or not observation.startswith(seen):
            self._begin(row)
            seen = ""
        return observation[len(seen) :]  # type: ignore[no-any-return]

    def _encode(self, added: dict[int, str]) -> dict[int, list[int]]:
        """Encode what was added to each row, by itself."""
        encoded = self.policy.tokenizer(list(added.values()), add_special_tokens=False)
        return dict(zip(added, encoded["input_ids"], strict=True))

    def _read(self, observations: dict[int, Any]) -> None:
        """Encode what each row has not read yet."""
        for row in observations.keys() - self._unread.keys():
            self._seen.pop(row, None)  # it was left out the last time, so it begins anew
        self._unread = {r: self._unread.get(r, []) for r in observations}
        added = {row: self._added(row, observation) for row, observation in observations.items()}
        for row, ids in self._encode(added).items():
            if len(self._current[row]) + len(ids) > self.room:
                ids = self._cut(row, ids)
            if not ids and not self._unread[row]:
                raise ValueError(
                    f"The observation {observations[row]!r} holds no token to answer. "
                    "The environment has to ask something."
                )
            self._current[row].read(ids)
            self._unread[row] = self._unread[row] + ids
        self._keep_in_window()

    def _keep_in_window(self) -> None:
        """Read whole conversations again before the cache outgrows a window of attention.

        Such a window counts slots, and would count the holes between a row's tokens too.
        """
        window = self.policy.window
        if window is None:
            return
        longest = max(map(len, self._unread.values()))
        if self.sampler.slots + longest + self.sampling.max_new_tokens > window:
            self.sampler.forget(self._unread)
            self._unread = {r: list(self._current[r].ids) for r in self._unread}

    def _begin(self, row: int) -> None:
        self.sampler.forget([row])
        self._current[row] = TokenSequence(row)
        self.sequences.append(self._current[row])
        self._unread[row] = []

    def _cut(self, row: int, ids: list[int]) -> list[int]:
        """Begin the row anew with the end of its tokens, as many as the context holds."""
        self.policy.truncated_prompts += 1
        if self.policy.truncated_prompts == 1:
            warnings.warn(
                f"A conversation is longer than the model's context of {self.policy.context} "
                "tokens; its beginning is cut off. `policy.truncated_prompts` counts them all.",
                stacklevel=4,
            )
        held = self._current[row].ids
        if held:
            self._begin(row)
        return (held + ids)[-self.room :]


class ChatConversations(Conversations):
    """Conversations that are read as messages, in the layout of a chat template.

    A turn reads what the template puts after the last answer, and nothing else. The token that
    ends an answer is there once: as it was sampled, or, where the length limit cut the answer, as
    the environment's.
    """

    reads_messages = True

    def __init__(
        self, policy: CausalLMPolicy, sampling: SamplingConfig, template: ChatTemplate
    ) -> None:
        super().__init__(policy, sampling)
        self.template = template
        self._prompts: dict[int, str] = {}

    def act(
        self, observations: dict[int, Any], turn: int, *, said: dict[int, str] | None = None
    ) -> dict[int, str]:
        """Answer each row: its messages, or a text that stands for one user message."""
        messages = {row: as_messages(o) for row, o in observations.items()}
        return super().act(messages, turn, said=said)

    def _worded(self, answer: str) -> str:
        return answer  # templates put what they want before it

    def _remember(self, row: int, observation: Any, answer: str) -> None:
        self._seen[row] = Said(len(observation), self._prompts[row], answer)

    def _added(self, row: int, observation: Any) -> str:
        said = self._seen.get(row)
        prompt = self._prompts[row] = self.template.render(observation)
        if said is not None:
            added = self.template.following(said, observation, prompt)
            if added is not None:
                return added
            self._warn_of_change()
        self._begin(row)
        return prompt

    def _encode(self, added: dict[int, str]) -> dict[int, list[int]]:
        """Encode what was added, without the end of an answer that the policy ended itself."""
        encoded = super()._encode(added)
        closing = list(self.template.closing)
        for row, ids in encoded.items():
            if self._unread[row] == [self.policy.end] and ids[: len(closing)] == closing:
                encoded[row] = ids[len(closing) :]
        return encoded

    def _warn_of_change(self) -> None:
        self.policy.changed_conversations += 1
        if self.policy.changed_conversations == 1:
            warnings.warn(
                "What was said before is rendered otherwise now: the chat template rewrites "
                "earlier messages (some leave out old thinking), or the environment does. Such a "
                "conversation is read again from its beginning, which is right but slower. "
                "`policy.changed_conversations` counts them all.",
                stacklevel=2,
            )
