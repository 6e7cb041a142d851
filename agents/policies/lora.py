"""Adapters: few trainable weights beside a large model that stays as it is (LoRA).

The adapter is put into the model in place, so that a model with one is used like any other; with
the adapter switched off it is the model that training began with, and no copy has to be kept.

Source: Hu et al. (2022), "LoRA: Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

ADAPTER_FILE = "adapter_config.json"
"""What peft writes beside the weights of an adapter."""

POINTER_FILE = "base_model.json"
"""Beside a saved adapter: the name and the digest of the model that it belongs to."""

BASE_FOLDER = "adapter_base"
"""Beside a saved adapter: that model itself, if it has no name that it could be loaded by."""


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter is like.

    Attributes:
        rank: Rank r of the update ΔW = (alpha / r) B A of every linear layer but the head.
        alpha: Scale of the update.
        seed: Seed of A; B begins at 0, so that the model begins unchanged.
    """

    rank: int
    alpha: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(
                f"The rank of an adapter is {self.rank} and its alpha {self.alpha}; the rank has "
                "to be 1 or more, alpha above 0."
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "Adapters (LoRA) need the package peft. Install it with: pip install 'llm-envs[lora]'"
        ) from error
    return peft


def has_adapter(model: Any) -> bool:
    """Say whether a model holds an adapter."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_rank(model: Any) -> int:
    """Return the rank of the adapter that a model holds."""
    return int(model.peft_config[model.active_adapters()[0]].r)


def add_adapter(model: Any, lora: Lora, *, name: str | Path | None = None) -> None:
    """Put a new adapter on all linear layers of a model, but its head; only that is trainable then.

    Args:
        model: A causal language model without an adapter; it is changed in place, its outputs are
            not.
        lora: The adapter.
        name: What the model as it is can be loaded by. Without a name, its weights are written
            beside those of the adapter.

    Raises:
        ImportError: The package ``peft`` is missing.
    """
    config = _peft().LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    model.adapter_base = {"name": None if name is None else _lasting(name), "digest": digest(model)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        model.add_adapter(config)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)


def _lasting(name: str | Path) -> str:
    """Return a name that means the same from every working directory."""
    own = str(name) == "tiny"  # the embedded model, whatever the working directory holds
    return str(Path(name).resolve()) if Path(name).is_dir() and not own else str(name)


def digest(model: Any) -> str:
    """Return a digest of some numbers of every weight, so that the wrong model is noticed."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.flatten()
        # Rounded, so that a model that is loaded in lower precision is still the same.
        some = flat[:: max(1, len(flat) // 256)].to(torch.bfloat16).float().cpu()
        found.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]


# --- the adapter switched off --------------------------------------------------------------------


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Make a model compute what it would without its adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    trainable = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)  # peft makes all of them trainable, frozen ones too
        for parameter in trainable:
            parameter.requires_grad_(True)


class AdapterOff:
    """The model beneath an adapter, without a copy: it shares the weights, and never changes.

    Args:
        model: A model with an adapter.
        part: The module of it that is called; the model itself if left out.
    """

    def __init__(self, model: Any, part: Any = None) -> None:
        self.model = model
        self.part = model if part is None else part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the part with the adapter off, and without gradients."""
        with torch.no_grad(), adapter_off(self.model):
            return self.part(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "part"):  # not there yet, as while a copy is being made
            raise AttributeError(name)
        return getattr(self.part, name)


# --- merging, saving, loading --------------------------------------------------------------------


def merge_adapter(model: Any) -> None:
    """Add the adapter to the weights, in place, and take it out: W ← W + (alpha / r) B A."""
    _take_out(model, merge=True)


def _take_out(model: Any, *, merge: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        if merge:
            layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    for leftover in ("peft_config", "adapter_base"):
        model.__dict__.pop(leftover, None)
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter in the format of peft, and where the model beneath it is to be found."""
    folder = Path(folder)
    model.save_pretrained(folder)
    write_pointer(model, folder)
    if model.adapter_base["name"] is None:
        plain = copy.deepcopy(model)
        _take_out(plain, merge=False)
        plain.save_pretrained(folder / BASE_FOLDER)


def write_pointer(model: Any, folder: Path, unnamed: str = f"./{BASE_FOLDER}") -> None:
    """Write which model lies beneath an adapter.

    Args:
        model: A model with an adapter.
        folder: Where to.
        unnamed: Where the model beneath it is written, relative to there, if it has no name.

    Raises:
        ValueError: It is not known, as with an adapter that peft itself has put on.
    """
    base = getattr(model, "adapter_base", None)
    if base is None:
        raise ValueError(
            "The adapter of this model was put on elsewhere, so the model beneath it is not known. "
            "Put it on with from_pretrained(…, lora=…) or add_adapter, or merge it first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    pointer = json.dumps({**base, "name": base["name"] or unnamed}, indent=1)
    (folder / POINTER_FILE).write_text(pointer + "\n", encoding="utf-8")


def read_pointer(folder: str | Path) -> dict[str, Any] | None:
    """Return name and digest of the model that a folder points at; ``None`` if it does not.

    An adapter that others have written names its model too, without a digest.
    """
    path, theirs = Path(folder) / POINTER_FILE, Path(folder) / ADAPTER_FILE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if theirs.is_file():
        config = json.loads(theirs.read_text(encoding="utf-8"))
        return {"name": config["base_model_name_or_path"], "digest": None}
    return None


def resolved(name: str, folder: str | Path) -> str:
    """Return the name that a folder points with as one that can be loaded from anywhere."""
    return str((Path(folder) / name).resolve()) if name.startswith(".") else name


def load_adapter(model: Any, folder: str | Path) -> None:
    """Put the adapter that lies in a folder, if any, on the model that the folder points at.

    Raises:
        ImportError: The package ``peft`` is missing.
        ValueError: The model is not the one that was meant, or the adapter's weights are damaged.
    """
    base = read_pointer(folder)
    assert base is not None
    now = digest(model)
    if base["digest"] not in (None, now):
        raise ValueError(
            f"{folder} belongs to the model {resolved(base['name'], folder)!r} with the digest "
            f"{base['digest']}, and what is there now has {now}: its weights have changed. Put "
            f"back the old ones, or say in {POINTER_FILE} where they are."
        )
    if not (Path(folder) / ADAPTER_FILE).is_file():
        return
    peft = _peft()
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    path = Path(folder) / "adapter_model.safetensors"
    try:
        weights = load_file(path, device=str(model.device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"The adapter's weights {path} cannot be read: {error}") from error
    # Not model.load_adapter: a model that has been through it is saved under other names.
    model.add_adapter(config)
    peft.set_peft_model_state_dict(model, weights)
    # A model that lies beside its adapter goes where the adapter goes.
    name = None if base["name"].startswith(".") else base["name"]
    model.adapter_base = {"name": name, "digest": now}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)


def hold_frozen_in_bfloat16(model: Any) -> None:
    """Round the frozen weights of the linear layers once, and not at each use under autocast.

    The outputs under autocast stay the same; memory halves. The head is left in float32 (see
    :func:`agents.policies.models.bfloat16`).
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            weight = module.weight
            if not weight.requires_grad and weight.dtype == torch.float32:
                weight.data = weight.data.to(torch.bfloat16)
