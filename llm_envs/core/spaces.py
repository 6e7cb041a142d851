"""The text space of every environment."""

from __future__ import annotations

import copy
import string
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.vector.utils import create_shared_memory

MAX_ACTION_LENGTH = 2**20
MAX_OBSERVATION_LENGTH = 2**31 - 1
_SAMPLE_LENGTH = 64
_SAMPLE_CHARACTERS = tuple(string.ascii_letters + string.digits + string.punctuation + " ")


class Text(gym.spaces.Text):
    """Any string of at most ``max_length`` characters, the empty one included.

    Gymnasium's own text space holds alphanumeric strings only and looks at every character of
    every string; language needs all of Unicode, and a check that costs nothing.

    Args:
        max_length: Longest string that belongs to the space, in characters.
        seed: Seed of ``sample``.
    """

    def __init__(
        self, max_length: int = MAX_ACTION_LENGTH, seed: int | np.random.Generator | None = None
    ) -> None:
        super().__init__(max_length, min_length=0, charset=_SAMPLE_CHARACTERS_SET, seed=seed)

    def contains(self, x: Any) -> bool:
        """Return whether ``x`` is a string that is short enough."""
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Return a short random ASCII string (0 to 64 characters).

        ``mask`` and ``probability`` keep the meaning that they have in ``gymnasium.spaces.Text``.
        """
        length = int(self.np_random.integers(0, min(_SAMPLE_LENGTH, self.max_length) + 1))
        if mask is not None or probability is not None:
            # Gymnasium would draw a length of up to ``max_length`` where none is given.
            mask, probability = (
                (length, given[1]) if given is not None and given[0] is None else given
                for given in (mask, probability)
            )
            return super().sample(mask, probability)
        picks = self.np_random.integers(0, len(_SAMPLE_CHARACTERS), size=length)
        return "".join(_SAMPLE_CHARACTERS[i] for i in picks)

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        # The tables of characters never change, and a batched space copies this one n times.
        copied = copy.copy(self)
        copied._np_random = copy.deepcopy(self._np_random, memo)
        return copied

    def __repr__(self) -> str:
        return f"Text(max_length={self.max_length})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Text) and self.max_length == other.max_length


_SAMPLE_CHARACTERS_SET = frozenset(_SAMPLE_CHARACTERS)


@create_shared_memory.register(Text)
def _refuse_shared_memory(space: Text, n: int = 1, ctx: BaseContext | None = None) -> NoReturn:
    # Gymnasium's handler would hand out "000…" in place of every observation, without a word.
    raise ValueError(
        "Text observations have no fixed size and cannot lie in shared memory. "
        "Make the asynchronous environment with vector_kwargs={'shared_memory': False}."
    )
