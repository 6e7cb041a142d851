"""How large tensors become."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes.

    Attributes:
        size: Elements of the largest floating-point one.
        bytes: Bytes of the largest storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.size = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
                if x.is_floating_point():
                    self.size = max(self.size, x.numel())
        return out
