"""Models whose weights are held in 8 bits: a quarter of the size, for use and not for training.

Each row of a weight matrix, which makes one output, is scaled so that its largest weight is 127
and rounded:

    W ≈ s Q,   s_i = max_j |W_ij| / 127,   Q_ij = round(W_ij / s_i),

so no weight moves by more than s_i / 2. Linear layers, the head and the token embeddings are held
like this, norms and positions as they were.

Inputs are not rounded to 8 bits: with SmolLM2-135M-Instruct that costs eleven times the divergence
that rounding the weights does. A few inputs at a time, as answers are written, are split into two
8-bit digits, so that integer arithmetic reads the small weights as they are; many at a time, as
prompts are read, are multiplied in bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

WEIGHTS_FILE = "model.int8.safetensors"

FEW_ROWS = 256
"""Up to so many inputs integer arithmetic is faster on a CPU (measured on an AMD EPYC)."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, (out, in) int8, and s, (out,) float32, of a weight matrix (out, in)."""
    weight = weight.detach().float()
    # The smallest normal number, not 0: a row of zeros is to stay one.
    scale = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale[:, None]).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer s (Q x) + bias; see the module.

    Args:
        rows: Q, (out, in) int8.
        scale: s, (out,) float32.
        bias: (out,); ``None`` for none.
    """

    rows: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, rows: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out), in the dtype of x."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if flat.device.type == "cpu" and len(flat) <= FEW_ROWS:
            products = self._in_digits(flat)
        else:
            products = F.linear(flat.to(torch.bfloat16), self.rows.to(torch.bfloat16)).float()
        found = products * self.scale
        if self.bias is not None:
            found = found + self.bias
        return found.to(x.dtype).view(*x.shape[:-1], -1)

    def _in_digits(self, x: Tensor) -> Tensor:
        """Return Q x for (n, in) inputs, with x ≈ d (high + low / 254) and d = max |x| / 127.

        What is left over is at most 2^-16 of the largest input.
        """
        d = (x.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        x = x / d
        high = x.round()
        low = (x - high).mul_(254).round_()
        columns = self.rows.T
        sums = torch._int_mm(high.to(torch.int8), columns).float()
        sums.add_(torch._int_mm(low.to(torch.int8), columns), alpha=1 / 254)
        return sums * d


class Int8Embedding(nn.Module):
    """Token embeddings s_i Q_i; a head that is tied to them holds the same tensors.

    Args:
        rows: Q, (vocabulary, width) int8.
        scale: s, (vocabulary,) float32.
    """

    rows: Tensor
    scale: Tensor

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (…, width), float32."""
        return F.embedding(ids, self.rows).float() * self.scale[ids, None]


def is_int8(model: Any) -> bool:
    """Say whether a model, or the one in a folder, is held in 8 bits."""
    if isinstance(model, (str, Path)):
        return (Path(model) / WEIGHTS_FILE).is_file()
    return any(isinstance(m, Int8Linear) for m in model.modules())


def quantize(model: Any) -> None:
    """Hold the weights of a causal language model in 8 bits, in place.

    Raises:
        ValueError: The model has no linear layer.
    """
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = Int8Embedding(*quantize_rows(tokens.weight))
    tied = head is not None and head.weight is tokens.weight
    for name, module in list(model.named_modules()):
        if module is tokens:
            model.set_submodule(name, embedding)
        elif module is head and tied:
            model.set_submodule(name, Int8Linear(embedding.rows, embedding.scale, head.bias))
        elif isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            model.set_submodule(name, Int8Linear(*quantize_rows(weight), module.bias))
    if not is_int8(model):
        raise ValueError(f"{type(model).__name__} has no linear layer to hold in 8 bits.")


def save_int8(model: Any, folder: str | Path) -> None:
    """Write configuration and weights; tensors that are shared are written once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = {name: t.contiguous() for name, t in model.state_dict().items()}
    first = {t.data_ptr(): name for name, t in reversed(weights.items())}
    save_file({n: t for n, t in weights.items() if first[t.data_ptr()] == n}, folder / WEIGHTS_FILE)


def load_int8(folder: str | Path) -> Any:
    """Read what :func:`save_int8` wrote.

    Raises:
        ValueError: The file lacks tensors of the model, or holds others.
    """
    config = AutoConfig.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    quantize(model)  # makes the places; their values come now
    path = Path(folder) / WEIGHTS_FILE
    found, places = load_file(path), model.state_dict()
    loaded = {places[name].data_ptr() for name in found.keys() & places.keys()}
    # A tensor that is shared is in the file once.
    missing = {name for name, place in places.items() if place.data_ptr() not in loaded}
    unknown = found.keys() - places.keys()
    misshapen = {n for n in found.keys() & places.keys() if found[n].shape != places[n].shape}
    for names, fault in (
        (missing, "lacks"),
        (unknown, "also holds"),
        (misshapen, "has other shapes of"),
    ):
        if names:
            raise ValueError(
                f"{path} does not fit the model that its config.json describes: it {fault} "
                f"{', '.join(sorted(names))}. Compress the model again, or copy the whole folder."
            )
    model.load_state_dict(found, strict=False)
    return model.requires_grad_(False).eval()
