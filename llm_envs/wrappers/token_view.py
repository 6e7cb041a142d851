"""Writing tasks one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs

from llm_envs.core import play
from llm_envs.core.task import whole_number

TokenObservation = dict[str, npt.NDArray[np.int64]]


class TokenView(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """A writing task whose actions are tokens, for agents that choose one of n actions.

    ## Action Space
    ``Discrete(vocabulary)``: the next token of the answer. The end-of-sequence token, or the
    ``max_new_tokens``-th token, hands the answer to the environment.

    ## Observation Space
    ``Dict``:
    - ``tokens``: (context,) int64, the conversation so far, padded on the right.
    - ``length``: (1,) int64, how many of them are tokens.

    It is token in, token out: what was chosen is never encoded again, the text that the
    environment adds is encoded by itself and appended, and an end token that was chosen stays. A
    conversation that leaves no room for an answer loses its beginning before the answer starts, so
    that within an answer tokens are only ever appended.

    ## Rewards
    The environment's reward in the step that hands over the answer, 0 before. Then the dialogue
    goes on with its next turn, token by token.

    ## Information
    The environment's ``info`` after ``reset`` and after a step that hands over an answer; else
    empty.

    Args:
        env: A writing task.
        tokenizer: A tokenizer of ``transformers``, or the folder or hub id to load it from (then
            ``env.spec`` holds plain values only).
        max_new_tokens: Length limit of an answer, in tokens.
        context: Most tokens of an observation, the answer included.
        vocabulary: Number of actions. A model may know more token ids than its tokenizer; by
            default it is the tokenizer's.

    Raises:
        ValueError: It is not a writing task, an answer leaves no room in the context, or the
            vocabulary has no end token or less tokens than the tokenizer.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from agents.policies.models import TINY
        >>> from llm_envs.wrappers import TokenView
        >>> env = TokenView(gym.make("Summarization-v0"), TINY, context=1024)
        >>> observation, info = env.reset(seed=1)
        >>> observation["tokens"].shape, env.action_space
        ((1024,), Discrete(4096))
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        tokenizer: Any,
        *,
        max_new_tokens: int = 24,
        context: int = 512,
        vocabulary: int | None = None,
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            _disable_deepcopy=True,  # a tokenizer is large, and is only read
            tokenizer=str(tokenizer) if isinstance(tokenizer, Path) else tokenizer,
            max_new_tokens=max_new_tokens,
            context=context,
            vocabulary=vocabulary,
        )
        gym.Wrapper.__init__(self, env)
        text = gym.spaces.Text
        if not (isinstance(env.action_space, text) and isinstance(env.observation_space, text)):
            raise ValueError(
                f"{env} is no writing task: its actions are {env.action_space}, and tokens make "
                "text. Use NumericView for a choosing task."
            )
        self.tokenizer = load_tokenizer(tokenizer)
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        self.context = whole_number("context", context)
        self.room = self.context - self.max_new_tokens
        if self.room < 1:
            raise ValueError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt in a context of "
                f"{context} tokens."
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has no end-of-sequence token, so no answer would end.")
        self.end: int = self.tokenizer.eos_token_id
        known = len(self.tokenizer)
        count = known if vocabulary is None else whole_number("vocabulary", vocabulary)
        if count < known:
            raise ValueError(
                f"vocabulary is {count}, and the tokenizer makes {known} different tokens. Give "
                f"{known} or more, or leave it out."
            )
        self.action_space = gym.spaces.Discrete(count)
        self.observation_space = gym.spaces.Dict(
            tokens=gym.spaces.Box(0, count - 1, (self.context,), np.int64),
            length=gym.spaces.Box(1, self.context, (1,), np.int64),
        )
        self._ids: list[int] = []  # the conversation, as much of it as is shown
        self._written = 0  # how many of them the answer has so far
        self._seen = ""  # the observation that is being answered
        self._playing = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TokenObservation, dict[str, Any]]:
        """Open an episode; see the environment's own ``reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._ids, self._playing = [], True
        self._read(observation, observation)
        return self._observe(), info

    def step(self, action: Any) -> tuple[TokenObservation, float, bool, bool, dict[str, Any]]:
        """Append a token to the answer; the last one has the answer scored.

        Raises:
            ValueError: The action lies outside the vocabulary.
            gymnasium.error.ResetNeeded: There is no episode, or it is over.
        """
        if not self._playing:
            raise gym.error.ResetNeeded("There is no episode in play: call reset().")
        token = play.check_action(self.action_space, action)
        self._ids.append(token)
        self._written += 1
        if token != self.end and self._written < self.max_new_tokens:
            return self._observe(), 0.0, False, False, {}
        answer = [t for t in self._ids[-self._written :] if t != self.end]
        text = self.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        observation, reward, terminated, truncated, info = self.env.step(text)
        self._playing = not (terminated or truncated)
        held = self._seen + text
        if observation.startswith(held):
            self._read(observation, observation[len(held) :])
        else:  # the conversation was rewritten
            self._ids = []
            self._read(observation, observation)
        return self._observe(), float(reward), terminated, truncated, info

    def _read(self, observation: str, added: str) -> None:
        """Append what the environment added, and make room for an answer."""
        new = self.tokenizer([added], add_special_tokens=False)["input_ids"][0] if added else []
        self._ids = (self._ids + list(new))[-self.room :]
        if not self._ids:
            raise ValueError(
                f"The observation {observation!r} holds no token to answer. The environment has "
                "to ask something."
            )
        self._seen, self._written = observation, 0

    def _observe(self) -> TokenObservation:
        tokens = np.full(self.context, self.end, np.int64)  # any id would do as padding
        tokens[: len(self._ids)] = self._ids
        return {"tokens": tokens, "length": np.array([len(self._ids)], np.int64)}


def load_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer of ``transformers``, loading it from a folder or by its hub id."""
    if callable(tokenizer):
        return tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer)
