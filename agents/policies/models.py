"""Models that policies are made of, and what policies say of their past decisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, slots=True)
class Scores:
    """What a policy says of its past decisions, flat over all the sampled tokens.

    Attributes:
        log_probs: (tokens,) log-probabilities under the distribution that is sampled.
        entropies: (tokens,) entropies of that distribution, in nats.
        kls: (tokens,) exact KL divergences from the reference model, of the full distributions at
            temperature 1; ``None`` without a reference.
        values: (decisions,) what the critic expects of the state before each answer, in the order
            of the sequences and of the turns within them; ``None`` without a critic.
    """

    log_probs: Tensor
    entropies: Tensor
    kls: Tensor | None = None
    values: Tensor | None = None


class Critic(nn.Linear):
    """A value head: one number from the trunk's state at the last token before an answer.

    It begins at zero, so that the first advantages are the rewards.

    Args:
        width: Size of the trunk's hidden state.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n,) values of (n, width) states."""
        return super().forward(hidden.to(self.weight.dtype))[:, 0]


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return integer rows as one tensor, filled up on the right.

    It has one row and one column at least: a model cannot read nothing, and an empty batch is to
    have a loss of 0 with a gradient like any other.
    """
    width = max([1, *map(len, rows)])
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows or [[]]])


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and leave every module in the mode it was in.

    What is scored has to be what was sampled, in updates too.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        ValueError: The name leads to no model, the dtype is none, or the tokenizer has no
            end-of-sequence token.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not isinstance(precision := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype of torch. Use 'float32' or 'bfloat16'.")
    where = TINY if str(name) == "tiny" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=precision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No causal language model could be loaded from {str(name)!r}: {error}\n"
            "Use 'tiny' (embedded), the path of a folder that holds a model, or a hub id that "
            "this machine can reach."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {str(name)!r} has no end-of-sequence token.")
    model = model.to(resolve_device(device))
    for tensor in (*model.parameters(), *model.buffers()):
        # A file's tensors lie in memory as they lie in the file, and on CPUs the rounding of a
        # matrix product depends on the alignment: a resumed run would not be the same.
        tensor.data = tensor.data.clone()
    return model, tokenizer


def split_model(model: Any) -> tuple[nn.Module, nn.Module] | None:
    """Take a model apart into trunk and head, if head(trunk(x)) is exactly what the model says.

    The head can then be applied where logits are needed, and nowhere else. Some models do more
    between the two (they scale or cap the logits): for those the answer is ``None``.
    """
    trunk, head = model.base_model, model.get_output_embeddings()
    if trunk is model or head is None:
        return None
    probe = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), eval_mode(model):
        hidden = getattr(trunk(input_ids=probe), "last_hidden_state", None)
        same = hidden is not None and torch.equal(head(hidden), model(input_ids=probe).logits)
    return (trunk, head) if same else None


def context_length(model: Any) -> int:
    """Return the most tokens that a model can read."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31 - 1))


def attention_window(model: Any) -> int | None:
    """Return how many tokens back the most short-sighted layer sees; ``None`` for all of them."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of its input, before its vocabulary is brought in.

    Attributes:
        hidden: (rows · width, hidden size) the trunk's last states, with gradients.
        logits: From (n,) indices into rows · width to (n, vocabulary) logits, with gradients.
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]


def read(model: Any, parts: tuple[nn.Module, nn.Module] | None, **inputs: Any) -> Reading:
    """Run a model without cache or dropout.

    Args:
        model: A causal language model.
        parts: What ``split_model`` says of it.
        **inputs: Arguments of the model, on its device.
    """
    with eval_mode(model):
        if parts is None:
            out = model(**inputs, use_cache=False, output_hidden_states=True)
            every = out.logits.flatten(0, 1)
            return Reading(out.hidden_states[-1].flatten(0, 1), lambda places: every[places])
        trunk, head = parts
        hidden = trunk(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        return Reading(hidden, lambda places: head(hidden[places]))


LOGITS_AT_ONCE = 2**24
"""Most logits that exist at once while sampled tokens are scored; 64 MiB in float32."""


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], *columns: Tensor | None, vocabulary: int
) -> tuple[Tensor, ...]:
    """Apply a function of whole distributions to a few tokens at a time.

    The logits of a long batch never exist at once: those of a chunk are dropped after the forward
    pass and made again in the backward pass.

    Args:
        function: From columns to a tuple of tensors, row by row.
        *columns: (N, …) each; ``None`` stays ``None``.
        vocabulary: Size of a distribution.
    """
    size = max(1, LOGITS_AT_ONCE // vocabulary)
    total = next(len(c) for c in columns if c is not None)
    if total <= size:
        return function(*columns)
    pieces = [
        checkpoint(
            function,
            *(None if c is None else c[start : start + size] for c in columns),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, total, size)
    ]
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


PolicyT = TypeVar("PolicyT")


def frozen_copy(policy: PolicyT) -> PolicyT:
    """Return a policy with weights of its own that never change: a reference."""
    frozen: Any = copy.copy(policy)
    frozen.model = copy.deepcopy(frozen.model).requires_grad_(False)
    frozen.parts = split_model(frozen.model)
    return frozen  # type: ignore[no-any-return]
