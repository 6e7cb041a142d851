"""What ``spec`` says of wrapped vector environments.

Gymnasium's vector wrappers pass on the spec of what they wrap, so that ``gym.make_vec(envs.spec)``
would make it without them. Those of the suite stand for an argument of every id, and write it into
the spec.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy.typing as npt
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils import RecordConstructorArgs

from llm_envs.core.vector import TextVectorEnv


class ArgumentVectorWrapper(
    gym.vector.VectorWrapper[Any, Any, Any, Any, npt.NDArray[Any]], RecordConstructorArgs
):
    """A wrapper of vector environments that an argument of ``gym.make_vec`` makes, too.

    Attributes:
        argument: Name of the argument; its value are the wrapper's own arguments.
        place: Wrappers of lower places are inside of it when arguments make them.
    """

    argument: ClassVar[str]
    place: ClassVar[int]

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]  # Gymnasium overrides it so too
        """What makes this environment again.

        ``None`` where no arguments do: around other wrappers or forms, in another order, or with
        arguments that are no plain values.
        """
        inner, below = self.env.spec, self.env
        while below is not below.unwrapped:
            if not (isinstance(below, ArgumentVectorWrapper) and below.place < self.place):
                return None
            below = below.env
        own = {name: value for name, value in self._saved_kwargs.items() if value is not None}
        if inner is None or not isinstance(below, TextVectorEnv) or not _is_plain(own):
            return None
        merged = {**(inner.kwargs.get(self.argument) or {}), **own}
        return replace(inner, kwargs={**inner.kwargs, self.argument: merged})


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
