"""A causal language model as an actor-critic policy of Stable-Baselines3.

It plays :class:`llm_envs.wrappers.TokenView`: an observation is the tokens so far, an action is
the next token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from agents.policies.models import (
    Critic,
    Parts,
    Passes,
    additive_mask,
    attention_window,
    load_model,
    pad_right,
    read,
    split_model,
)
from agents.policies.prefix_tree import reads_trees
from agents.sampling import at_least_float32, pass_tokens, passes_by_length


def longest_rows(rows: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Find the rows that no other row continues: what has to be read to have read them all.

    What a causal model makes of a prefix does not depend on what follows. The observations of one
    dialogue are prefixes of each other, so a batch of them is read at the price of the longest.

    Args:
        rows: Token ids.

    Returns:
        Indices of the rows to read, and for each row the place among them of one that begins
        with it.
    """
    kept: list[int] = []
    owner = [0] * len(rows)
    # In order, what begins with a row stands right behind it; so go from the end, looking back.
    behind: list[int] = []
    for i in sorted(range(len(rows)), key=rows.__getitem__, reverse=True):
        if not kept or behind[: len(rows[i])] != rows[i]:
            kept.append(i)
        owner[i] = len(kept) - 1
        behind = rows[i]
    return kept, owner


class _RowLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of rows that are not equally long: each token is put where its row ends."""

    keys: Tensor
    values: Tensor

    def __init__(self, reader: RolloutReader) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reader = reader
        self.buffers: list[Tensor] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Put the states of a pass in their slots; return those that the pass can see."""
        reader, new = self.reader, (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, slots = reader.tokens.shape
            self.buffers = [x.new_zeros(rows, x.shape[1], slots, x.shape[3]) for x in new]
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[reader.members[:, None], :, reader.slots] = states.transpose(1, 2)
        everyone = len(reader.members) == len(reader.tokens)  # in order, and needs no copy
        held = (x[:, :, : reader.seen] for x in self.buffers)
        self.keys, self.values = (x if everyone else x[reader.members] for x in held)
        return self.keys, self.values


class RolloutReader:
    """Reads the observations of a rollout, of each only what the last one there did not hold.

    Stable-Baselines3 shows a policy the whole conversation for every token of it. Where an
    observation begins as the one before it in its environment did, keys and values are kept; a
    change of the weights forgets them all.

    Args:
        model: A causal language model that takes a mask for every pair of tokens
            (:func:`agents.policies.prefix_tree.reads_trees`) and sees back to the beginning.
        parts: What ``split_model`` says of it.
        context: Most tokens of an observation.
    """

    def __init__(self, model: Any, parts: Parts, context: int) -> None:
        self.model, self.parts, self.context = model, parts, context
        self.weights: list[tuple[int, int]] = []  # as of the last reading
        self.tokens = torch.empty(0, context)  # what was read, up to lengths
        self.lengths = torch.empty(0)
        self.cache: Any = None
        # Of the pass that is made: its rows, where its tokens are put, how many slots it sees.
        self.members = self.slots = self.lengths
        self.seen = 0

    def read(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return what follows each row: (rows, hidden) last states and (rows, vocabulary) logits.

        Args:
            tokens: (rows, context) ids; behind the end of a row they mean nothing.
            lengths: (rows,) at least 1.
        """
        known = self._known(tokens, lengths)
        self.tokens, self.lengths = tokens, known  # so much is true even if a pass fails
        rows = torch.arange(len(tokens), device=tokens.device)
        # Within an answer a row has one new token. So one token of all rows is read at once, and
        # then the rest of those that have more: padding to the longest would cost many times that.
        hidden, logits = self._pass(rows, known, torch.ones_like(known))
        rest = lengths - known - 1
        longer = rest.nonzero()[:, 0]
        for members in passes_by_length(rest[longer].tolist(), pass_tokens(tokens.device)):
            of = longer[sorted(members)]
            hidden[of], logits[of] = self._pass(of, known[of] + 1, rest[of])
        self.lengths = lengths
        return hidden, logits

    def _known(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return how many first tokens of each row have been read, at most all but the last."""
        weights = [(p.data_ptr(), p._version) for p in self.model.parameters()]
        if weights != self.weights or tokens.shape != self.tokens.shape:
            self.weights = weights
            make_layer: Any = functools.partial(_RowLayer, self)
            self.cache = Cache(layer_class_to_replicate=make_layer)
            return torch.zeros_like(lengths)
        same = (tokens == self.tokens).long().cumprod(1).sum(1)
        return torch.minimum(torch.minimum(same, self.lengths), lengths - 1)

    def _pass(self, members: Tensor, starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Read ``counts`` tokens of some rows; return last states and logits after the last one."""
        width = torch.arange(int(counts.max()), device=starts.device)
        # Padding goes behind the end of its row, where nothing looks before a token is put there;
        # what would go beyond the last slot is the token of that slot over again.
        self.members = members
        self.slots = (starts[:, None] + width).clamp_max(self.context - 1)
        self.seen = int(self.slots.max()) + 1
        seen = torch.arange(self.seen, device=starts.device) <= self.slots[:, :, None]
        reading = read(
            self.model,
            self.parts,
            Passes(),
            input_ids=self.tokens[members[:, None], self.slots],
            attention_mask=additive_mask(seen, self.model.dtype),
            position_ids=self.slots,
            past_key_values=self.cache,
        )
        ends = torch.arange(len(members), device=starts.device) * len(width) + counts - 1
        return reading.hidden[ends], reading.logits(ends)


class CausalLMExtractor(BaseFeaturesExtractor):
    """Reads the tokens of an observation.

    Its features are the language model's last hidden state and its logits of the next token. The
    model reads in eval mode whatever mode the policy is in: with dropout, what is scored would
    not be what was sampled.

    Args:
        observation_space: That of a ``TokenView``.
        model: A causal language model of ``transformers``.
    """

    def __init__(self, observation_space: gym.Space[Any], model: Any) -> None:
        config = model.config.get_text_config()
        super().__init__(observation_space, config.hidden_size + config.vocab_size)
        self.model = model
        self.parts = split_model(model)
        self.going_on = False
        context = observation_space["tokens"].shape[0]  # type: ignore[index]
        window = attention_window(model)
        sees_all = window is None or window >= context
        keeps = sees_all and reads_trees(model, self.parts)
        self.reader = RolloutReader(model, self.parts, context) if keeps else None

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Within it observations follow those of the last time, and only what is new is read."""
        self.going_on = not torch.is_grad_enabled()  # what is kept has no gradients
        try:
            yield
        finally:
            self.going_on = False

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Return hidden state and logits after the last token, (rows, hidden + vocabulary).

        Args:
            observations: ``tokens`` (rows, context) and ``length`` (rows, 1). Stable-Baselines3
                makes floats of them, which hold every id below 2**24 exactly.
        """
        tokens, lengths = observations["tokens"].long(), observations["length"].flatten().long()
        if self.going_on and self.reader is not None:
            found = self.reader.read(tokens, lengths)
        else:
            found = self._read(tokens, lengths)
        return torch.cat([at_least_float32(x) for x in found], dim=1)

    def _read(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read any observations, each beginning that they share once."""
        pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
        rows = [ids[:length] for ids, length in pairs]
        kept, owner = longest_rows(rows)
        # Padding stands on the right, where causal attention never looks, and positions count from
        # the first token: no mask is needed.
        ids = pad_right([rows[i] for i in kept], 0).to(lengths.device)
        reading = read(self.model, self.parts, Passes(), input_ids=ids)
        places = torch.tensor(owner, device=ids.device) * ids.shape[1] + lengths - 1
        return reading.hidden[places], reading.logits(places)


class _Apart(nn.Module):
    """Gives the logits to the actor and the hidden state to the critic."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.latent_dim_pi, self.latent_dim_vf = vocabulary, hidden

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return features[:, self.latent_dim_vf :]

    def forward_critic(self, features: Tensor) -> Tensor:
        return features[:, : self.latent_dim_vf]


class CausalLMActorCriticPolicy(ActorCriticPolicy):
    """An actor that is a language model, and a critic that reads its last hidden state.

    The logits of the actions are the model's own next-token logits: the first policy is the
    language model. The value is a linear function of the last hidden state and begins as 0.

    Args:
        observation_space: That of a ``TokenView``.
        action_space: That of the same ``TokenView``, with as many tokens as the model knows.
        lr_schedule: The learning rate.
        model: A causal language model of ``transformers``, or a name that
            :func:`agents.policies.models.load_model` knows, such as ``"tiny"``.
        use_sde: Stable-Baselines3 always gives it; tokens have no such noise.
        optimizer_class: The optimizer.
        optimizer_kwargs: Its arguments, except for the learning rate.

    Raises:
        ValueError: The model and the spaces do not fit together.

    Example:
        >>> env = TokenView(gym.make("Summarization-v0"), TINY, context=1024)
        >>> PPO(CausalLMActorCriticPolicy, env, policy_kwargs={"model": "tiny"}).learn(10_000)
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        lr_schedule: Schedule,
        *,
        model: Any,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        names = set(getattr(observation_space, "spaces", ()))
        if names != {"tokens", "length"} or not isinstance(action_space, gym.spaces.Discrete):
            raise ValueError(
                f"A causal language model reads tokens, but the observations are "
                f"{observation_space}. Wrap the environment in llm_envs.wrappers.TokenView."
            )
        if isinstance(model, str | Path):
            model, _ = load_model(model, "cpu", "float32")
        known = model.config.get_text_config().vocab_size
        if action_space.n != known:
            raise ValueError(
                f"The model knows {known} tokens and the environment has {action_space.n} actions. "
                f"Make the TokenView with the model's own tokenizer and vocabulary={known}."
            )
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            use_sde=use_sde,
            features_extractor_class=CausalLMExtractor,
            features_extractor_kwargs={"model": model},
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    features_extractor: Any
    mlp_extractor: Any
    value_net: Any

    @property
    def model(self) -> Any:
        """The language model."""
        return self.features_extractor.model

    def forward(self, obs: Any, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next token of every environment, its value and its log-probability."""
        with self.features_extractor.rollout():
            return super().forward(obs, deterministic)

    def _build(self, lr_schedule: Schedule) -> None:
        vocabulary = self.model.config.get_text_config().vocab_size
        hidden = self.features_dim - vocabulary
        self.mlp_extractor = _Apart(hidden, vocabulary)
        self.action_net = nn.Identity()
        self.value_net = nn.Sequential(Critic(hidden), nn.Unflatten(0, (-1, 1)))
        make: Any = self.optimizer_class  # the base class of all optimizers takes no lr
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
