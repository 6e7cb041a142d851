"""Models that policies are made of, and what policies say of their past decisions."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agents.policies.int8 import is_int8, load_int8, save_int8
from agents.policies.lora import (
    BASE_FOLDER,
    POINTER_FILE,
    AdapterOff,
    Lora,
    add_adapter,
    has_adapter,
    load_adapter,
    merge_adapter,
    read_pointer,
    resolved,
    save_adapter,
)

Question = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Token ids of a prompt, and of each candidate."""


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


@contextmanager
def _forwards(modules: Sequence[Any], wrap: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Replace what modules do when they are called, for a while."""
    for module in modules:
        module.forward = wrap(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # that of the class shows again


@contextmanager
def bfloat16(model: Any, enabled: bool = True) -> Iterator[None]:
    """Run a model under autocast to bfloat16, but its head in the precision of its weights.

    A logit of 30 has neighbours 1/8 away in bfloat16: log-probabilities, and with them ratios,
    would be as coarse.
    """
    if not enabled:
        yield
        return
    head = model.get_output_embeddings()
    device = next(model.parameters()).device.type

    def precise(head: Any) -> Callable[..., Any]:
        forward = head.forward

        def run(hidden: Tensor) -> Any:
            with torch.autocast(device, enabled=False):
                return forward(_as_read_by(head, hidden))

        return run

    heads = [] if head is None else [head]
    with torch.autocast(device, torch.bfloat16), _forwards(heads, precise):
        yield


def _as_read_by(head: Any, hidden: Tensor) -> Tensor:
    return hidden.to(getattr(head, "weight", hidden).dtype)


@contextmanager
def layers_recomputed(model: Any, enabled: bool = True) -> Iterator[None]:
    """Keep of each layer its input only, and compute the layer again in the backward pass.

    The switch that ``transformers`` has for it works in training mode alone, and policies run in
    eval mode: so the layers are wrapped here. They are computed again without dropout too.

    Raises:
        ValueError: The model does not say what its layers are.
    """
    if not (enabled and torch.is_grad_enabled()):
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer  # takes a second

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers that can be computed again. Leave "
            "gradient_checkpointing off; a smaller micro_batch_tokens saves memory too."
        )

    def again(layer: Any) -> Callable[..., Any]:
        forward = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with eval_mode(layer):  # the caller's mode is back when the backward pass comes
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    with _forwards(layers, again):
        yield


def resolve_device(device: str) -> torch.device:
    """Return the device; ``"auto"`` is CUDA, then Apple's MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def bfloat16_wanted(autocast: str, device: torch.device) -> bool:
    """Say whether forward passes are to be in bfloat16.

    Args:
        autocast: ``"bf16"``, ``"none"``, or ``"auto"``: on CUDA devices that compute in it.
        device: Where the model lies.
    """
    if autocast == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return autocast == "bf16"


TINY = Path(__file__).parent / "tiny"


def located(name: str | Path) -> str | Path:
    """Return what transformers loads a model by: a folder, or a hub id, which is no path.

    "tiny" is the embedded one, whatever the working directory holds.
    """
    return TINY if str(name) == "tiny" else name


def folder_of(name: str | Path) -> Path:
    """Return where a model lies, if it is no hub id."""
    return Path(located(name))


def load_model(
    name: str | Path,
    device: str,
    dtype: str,
    *,
    lora: Lora | None = None,
    merge: bool = True,
    writes: bool = True,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``"tiny"`` (embedded), a hub id, or a folder: of a model, of an adapter, or of what
            ``save_model`` wrote.
        device: ``"auto"`` or a torch device.
        dtype: Name of a torch dtype, for example ``"float32"``.
        lora: A new adapter to put on the model.
        merge: Whether an adapter that lies in the folder becomes part of the weights; else it
            stays beside them, trainable.
        writes: Whether it has to write tokens. If not, any model will do, an encoder too, and it
            is loaded without the head that it may have.

    Raises:
        ValueError: The name leads to no model, or to a damaged one, the dtype is none, the
            tokenizer has no end-of-sequence token, or an adapter's base is missing or has changed.
        ImportError: An adapter needs the package ``peft``.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    if not isinstance(precision := getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{dtype!r} is no dtype of torch. Use 'float32' or 'bfloat16'.")
    where = located(name)
    pointer = read_pointer(where)
    model: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        if is_int8(where):
            model = load_int8(where)
        elif pointer is None:
            kind: Any = AutoModelForCausalLM if writes else AutoModel
            model = kind.from_pretrained(where, dtype=precision)
            if has_adapter(model):
                raise ValueError("it is an adapter. Download it, and give its folder.")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"No {'causal language ' if writes else ''}model could be loaded from {str(name)!r}: "
            f"{error}\n"
            "Use 'tiny' (embedded), the path of a folder that holds a model, or a hub id that "
            "this machine can reach."
        ) from error
    if writes and tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {str(name)!r} has no end-of-sequence token.")
    if pointer is not None:
        model = _load_beneath(name, resolved(pointer["name"], where), dtype)
        load_adapter(model, where)
    if merge and has_adapter(model):
        merge_adapter(model)
    if lora is not None and not has_adapter(model):
        add_adapter(model, lora, name=name)
    model = model.to(resolve_device(device))
    for tensor in (*model.parameters(), *model.buffers()):
        # A file's tensors lie in memory as they lie in the file, and on CPUs the rounding of a
        # matrix product depends on the alignment: a resumed run would not be the same.
        tensor.data = tensor.data.clone()
    return model, tokenizer


def _load_beneath(adapter: str | Path, base: str, dtype: str) -> Any:
    try:
        return load_model(base, "cpu", dtype)[0]
    except ValueError as error:
        raise ValueError(
            f"The adapter in {adapter} belongs to the model {base!r}, which cannot be loaded. Say "
            f"in its {POINTER_FILE} where that is now. ({error})"
        ) from error


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a model and its tokenizer; :func:`load_model` reads them.

    Weights are in safetensors. Of a model with an adapter only the adapter is written, with the
    name of the model beneath it, or with that model if it was not loaded by name.
    """
    if has_adapter(model):
        save_adapter(model, folder)
    elif is_int8(model):
        save_int8(model, folder)
    else:
        model.save_pretrained(folder)
    folders = (Path(folder), Path(folder) / BASE_FOLDER)
    for each in folders if folders[1].is_dir() else folders[:1]:
        tokenizer.save_pretrained(each)


Parts = tuple[Any, Any] | None
"""Trunk and head of a model, if it is made of these two and nothing else."""


@dataclass(frozen=True, slots=True)
class Passes:
    """How forward passes are made.

    Attributes:
        bfloat16: In bfloat16 by autocast, all but the head; log-probabilities are float32.
        gradient_checkpointing: Layers are computed again in the backward pass: less memory, about
            a third more time, the same gradients.
        compiled: The sampler's steps are compiled (only of models that read trees).
    """

    bfloat16: bool = False
    gradient_checkpointing: bool = False
    compiled: bool = False


def is_encoder(config: Any) -> bool:
    """Return whether a configuration is a BERT-like encoder's, which has no likelihood.

    The same kind of configuration can be a causal model's (``BertLMHeadModel``): that one says so.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    named = getattr(config, "architectures", None) or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal and not decodes


def names_encoder(name: str | Path) -> bool:
    """Return whether a name, as ``load_model`` takes it, leads to a BERT-like encoder."""
    from transformers import AutoConfig

    try:
        return is_encoder(AutoConfig.from_pretrained(located(name)))
    except (OSError, ValueError):
        return False  # it leads to nothing; ``load_model`` says so better


def split_model(model: Any) -> Parts:
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
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo
        return int(config.window_size)
    if (chunk := getattr(config, "attention_chunk_size", None)) is not None:  # Llama 4
        return int(chunk)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that lets tokens see others.

    Args:
        seen: (rows, width, slots) booleans, or (rows, 1, slots): who sees what.
        dtype: That of the model.

    Returns:
        (rows, 1, width, slots), to be added to attention scores: 0, or the lowest number.
    """
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def branch_mask(branch: Tensor, dtype: torch.dtype, *, causal: bool) -> Tensor:
    """Return the mask of texts beside each other in a row, each blind to the others.

    Args:
        branch: (rows, width) number of the text that each token belongs to. All see branch 0, the
            beginning that the texts of a row share, if there is one; padding is -1.
        dtype: That of the model.
        causal: Whether a token sees as far as itself only.

    Returns:
        (rows, 1, width, width), as :func:`additive_mask`.
    """
    seen = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    return additive_mask(seen.tril() if causal else seen, dtype)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model made of its input, before its vocabulary is brought in.

    Attributes:
        hidden: (rows · width, hidden size) the trunk's last states, with gradients.
        logits: From (n,) indices into rows · width to (n, vocabulary) logits, with gradients.
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]


def read(model: Any, parts: Parts, how: Passes, **inputs: Any) -> Reading:
    """Run a model without dropout.

    Args:
        model: A causal language model.
        parts: What ``split_model`` says of it.
        how: How the pass is made.
        **inputs: Arguments of the model, on its device. With ``past_key_values`` it goes on from
            what they hold, and appends to them.
    """
    inputs["use_cache"] = "past_key_values" in inputs
    with (
        eval_mode(model),
        bfloat16(model, how.bfloat16),
        layers_recomputed(model, how.gradient_checkpointing),
    ):
        if parts is None:
            out = model(**inputs, output_hidden_states=True)
            every = out.logits.flatten(0, 1)
            return Reading(out.hidden_states[-1].flatten(0, 1), lambda places: every[places])
        trunk, head = parts
        hidden = trunk(**inputs).last_hidden_state.flatten(0, 1)
        return Reading(hidden, lambda places: head(_as_read_by(head, hidden[places])))


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


def model_identity(model: nn.Module) -> str:
    """Say what a model is, whatever its weights: class, size, and a digest of names and shapes."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} with {count:,} parameters (digest {digest})"


PolicyT = TypeVar("PolicyT")


def own_copy(policy: PolicyT) -> PolicyT:
    """Return a policy with weights of its own."""
    copied: Any = copy.copy(policy)
    copied.model = copy.deepcopy(copied.model)
    copied.parts = split_model(copied.model)
    return copied  # type: ignore[no-any-return]


def frozen_copy(policy: PolicyT) -> PolicyT:
    """Return a policy whose weights never change: a reference.

    It has weights of its own, or is the same model with its adapter switched off.
    """
    if not has_adapter(policy.model):  # type: ignore[attr-defined]
        frozen: Any = own_copy(policy)
        frozen.model.requires_grad_(False)
    else:
        frozen = copy.copy(policy)
        frozen.model, frozen.parts = without_adapter(frozen.model, frozen.parts)
    return frozen  # type: ignore[no-any-return]


def without_adapter(model: Any, parts: Parts) -> tuple[AdapterOff, Parts]:
    """Return a model with its adapter switched off, and its parts."""
    off = None if parts is None else (AdapterOff(model, parts[0]), AdapterOff(model, parts[1]))
    return AdapterOff(model), off
