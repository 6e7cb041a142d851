"""Models that policies are made of, and what policies say of their past decisions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Scores:
    """What a policy says of its past decisions, flat over all the sampled tokens.

    Attributes:
        log_probs: (tokens,) log-probabilities under the distribution that is sampled.
        entropies: (tokens,) entropies of that distribution, in nats.
        kls: (tokens,) exact KL divergences from the reference model, of the full distributions at
            temperature 1; ``None`` without a reference.
    """

    log_probs: Tensor
    entropies: Tensor
    kls: Tensor | None = None


def resolve_device(device: str) -> torch.device:
    """Return the device; ``"auto"`` is CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


TINY = Path(__file__).parent / "tiny"


def load_model(name: str | Path, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``"tiny"`` (embedded), a hub id, or a folder.
        device: ``"auto"`` or a torch device.
        dtype: Name of a torch dtype, for example ``"float32"``.

    Raises:
        ValueError: The name leads to no model, or the tokenizer has no end-of-sequence token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = TINY if str(name) == "tiny" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No causal language model could be loaded from {str(name)!r}: {error}\n"
            "Use 'tiny' (embedded), the path of a folder that holds a model, or a hub id that "
            "this machine can reach."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {str(name)!r} has no end-of-sequence token.")
    return model.to(resolve_device(device)), tokenizer


def split_model(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """Take a model apart into trunk and head, if head(trunk(x)) is exactly what the model says.

    The head can then be applied where logits are needed, and nowhere else. Some models do more
    between the two (they scale or cap the logits): for those the answer is ``None``.
    """
    trunk, head = model.base_model, model.get_output_embeddings()
    if trunk is model or head is None:
        return None
    probe = torch.tensor([[1, 2, 3, 1]], device=next(model.parameters()).device)
    training = model.training
    model.eval()
    with torch.no_grad():
        same = torch.equal(head(trunk(input_ids=probe).last_hidden_state), model(probe).logits)
    model.train(training)
    return (trunk, head) if same else None


PolicyT = TypeVar("PolicyT")


def frozen_copy(policy: PolicyT) -> PolicyT:
    """Return a policy with weights of its own that never change: a reference."""
    frozen: Any = copy.copy(policy)
    frozen.model = copy.deepcopy(frozen.model).requires_grad_(False)
    frozen.parts = split_model(frozen.model)
    return frozen  # type: ignore[no-any-return]
