"""A causal language model as an actor-critic policy of Stable-Baselines3.

It plays :class:`llm_envs.wrappers.TokenView`: an observation is the tokens so far, an action is
the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from agents.policies.models import Critic, Passes, load_model, pad_right, read, split_model
from agents.sampling import at_least_float32


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

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Return hidden state and logits after the last token, (rows, hidden + vocabulary).

        Args:
            observations: ``tokens`` (rows, context) and ``length`` (rows, 1). Stable-Baselines3
                makes floats of them, which hold every id below 2**24 exactly.
        """
        lengths = observations["length"].flatten().long()
        tokens = observations["tokens"].long().tolist()
        rows = [ids[:n] for ids, n in zip(tokens, lengths.tolist(), strict=True)]
        kept, owner = longest_rows(rows)
        # Padding stands on the right, where causal attention never looks, and positions count from
        # the first token: no mask is needed.
        ids = pad_right([rows[i] for i in kept], 0).to(lengths.device)
        reading = read(self.model, self.parts, Passes(), input_ids=ids)
        places = torch.tensor(owner, device=ids.device) * ids.shape[1] + lengths - 1
        found = (reading.hidden[places], reading.logits(places))
        return torch.cat([at_least_float32(x) for x in found], dim=1)


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

    @property
    def model(self) -> Any:
        """The language model."""
        return self.features_extractor.model

    mlp_extractor: Any
    value_net: Any

    def _build(self, lr_schedule: Schedule) -> None:
        vocabulary = self.model.config.get_text_config().vocab_size
        hidden = self.features_dim - vocabulary
        self.mlp_extractor = _Apart(hidden, vocabulary)
        self.action_net = nn.Identity()
        self.value_net = nn.Sequential(Critic(hidden), nn.Unflatten(0, (-1, 1)))
        make: Any = self.optimizer_class  # the base class of all optimizers takes no lr
        self.optimizer = make(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
