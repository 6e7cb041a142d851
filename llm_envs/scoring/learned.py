"""Scores that a model gives: similarity of meaning, and naturalness.

Models are read when they are first needed, once a process, and compute on the CPU in float32, so
that rewards do not depend on the device of the policy. Importing this module imports no torch.

A policy that is trained on one of them alone will game it: the words of a reference in any order
are nearly as similar as the reference, and whatever is as surprising as people's sentences counts
as natural. With the embedded model and 100 documents of Summarization's validation split, the one
word "library" is as natural as 0.58, the summary of another document as 0.49 and the text's own
first sentence as 0.32. Mix them with a score that compares words, and let that weigh most.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

MOST_TOKENS = 256
"""Tokens of a text that are read, as sentence-transformers has it for all-MiniLM-L6-v2."""

_MOST_CHARACTERS = 10_000  # what is cut off could not be read anyway, and takes time to tokenise
_PASS_TOKENS = 2048  # most tokens in one forward pass, padding included


def check_model(argument: str, name: str | Path) -> str:
    """Return the folder or hub id of a model, sure that there is one; its weights are not read.

    Args:
        argument: What the model was given as, for messages.
        name: A folder that holds a model of ``transformers``, a hub id, or ``"tiny"`` for the
            language model that comes with the package ``agents``.

    Raises:
        ValueError: There is no such model.
    """
    from transformers import AutoConfig

    if name == "tiny":
        found = importlib.util.find_spec("agents")
        if found is None or not found.submodule_search_locations:
            raise ValueError(
                f"{argument} is 'tiny', the model of the package agents, which is not installed. "
                "Give the folder of a model or its hub id."
            )
        name = Path(found.submodule_search_locations[0], "policies", "tiny")
    first, *others = Path(name).parts or ("",)
    try:
        if Path(name).is_dir():
            name = Path(name).resolve()  # the working directory may change
        elif others and (first == "models" or Path(first).is_dir()):
            raise OSError("there is no such folder")  # the hub need not be asked
        AutoConfig.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument} is {str(name)!r}, and no model can be read there "
            f"({str(error).splitlines()[0]}). Give the folder of a model or its hub id. "
            "(scripts/fetch_minilm.py makes the folder models/all-MiniLM-L6-v2.)"
        ) from error
    return str(name)


# --- similarity ---------------------------------------------------------------------------------


def similarity(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: str
) -> list[float]:
    """Compare the meaning of n answers with that of their references.

    The cosine of the two embeddings, at least 0, with the reference that is nearest. An embedding
    is the mean of an encoder's last hidden states over a text's tokens. An answer without a letter
    or digit has similarity 0. Texts that have nothing in common reach 0.1 or so, not 0.

    Args:
        answers: n texts.
        references: n sequences of at least one text.
        model: Folder or hub id of the encoder.

    Returns:
        n numbers in [0, 1].

    Source: Reimers and Gurevych (2019), "Sentence-BERT: Sentence Embeddings using Siamese
    BERT-Networks".
    """
    if not answers:
        return []
    texts = list(dict.fromkeys(answers))
    row = {text: i for i, text in enumerate(texts)}
    counts = [len(accepted) for accepted in references]
    theirs = np.stack([_reference(model, r) for r in chain.from_iterable(references)])
    ours = embed(texts, model)[np.repeat([row[answer] for answer in answers], counts)]
    cosines = (ours * theirs).sum(1)
    nearest = np.maximum.reduceat(cosines, np.cumsum([0, *counts[:-1]]))
    values: list[float] = np.clip(nearest, 0.0, 1.0).astype(float).tolist()
    return [value if _says(answer) else 0.0 for answer, value in zip(answers, values, strict=True)]


def embed(texts: Sequence[str], model: str) -> Floats:
    """Return the unit vectors (n, width) of n texts: the mean of their tokens' last states.

    Args:
        texts: n texts, of which the first ``MOST_TOKENS`` tokens are read.
        model: Folder or hub id of the encoder.
    """
    import torch

    tokenizer, encoder = _loaded(model, "AutoModel")
    most = _most_tokens(encoder)
    rows = tokenizer(list(map(_readable, texts)), truncation=True, max_length=most).input_ids
    vectors = np.empty((len(rows), encoder.config.hidden_size), np.float32)
    for chosen in _passes(list(map(len, rows))):
        ids, mask = _padded([rows[i] for i in chosen])
        with torch.inference_mode():
            states = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            sums = (states * mask[:, :, None]).sum(1)  # the mean's divisor cancels out
            vectors[chosen] = torch.nn.functional.normalize(sums, dim=1).numpy()
    return vectors


@lru_cache(maxsize=16_384)
def _reference(model: str, text: str) -> Floats:
    # By itself: what is remembered must not change a bit of what is computed.
    vector: Floats = embed([text], model)[0]
    return vector


# --- naturalness --------------------------------------------------------------------------------


def naturalness(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: str, context: str
) -> list[float]:
    """Compare how surprising n answers and their references are to a language model.

    exp(-|s(y) - s(y*)|), with s(y) = -1/T Σ_t log p(y_t | context, y_<t) the mean surprise of the
    T tokens, in nats, and y* the reference whose surprise is nearest: 1 for what is as surprising
    as what people wrote. The probability itself, exp(-s(y)), would be the wrong thing to reward.
    It is highest where words are said again and again, and people's own sentences have little of
    it (Holtzman et al. 2020, Meister et al. 2022).

    The context is the same for all answers: this is about language and not about truth. An answer
    without a letter or digit has naturalness 0.

    Args:
        answers: n texts; one token's space goes before each.
        references: n sequences of at least one text.
        model: Folder or hub id of the causal language model.
        context: What stands before an answer.

    Returns:
        n numbers in [0, 1].
    """
    if not answers:
        return []
    texts = list(dict.fromkeys(answers))
    ours = dict(zip(texts, surprises(texts, model, context), strict=True))
    return [
        max(math.exp(-abs(ours[answer] - _reference_surprise(model, context, r))) for r in accepted)
        if _says(answer)
        else 0.0
        for answer, accepted in zip(answers, references, strict=True)
    ]


def surprises(texts: Sequence[str], model: str, context: str) -> list[float]:
    """Return the mean surprise of the tokens of n texts, in nats; see :func:`naturalness`.

    Args:
        texts: n texts; of context and text the first ``MOST_TOKENS`` tokens are read.
        model: Folder or hub id of the causal language model.
        context: What stands before a text.
    """
    import torch

    tokenizer, lm = _loaded(model, "AutoModelForCausalLM")
    prefix = tokenizer(context).input_ids
    begin = len(prefix)
    rows = tokenizer(
        [" " + _readable(text) for text in texts],
        add_special_tokens=False,
        truncation=True,
        max_length=_most_tokens(lm) - begin,
    ).input_ids
    means = np.empty(len(rows))
    for chosen in _passes([begin + len(row) for row in rows]):
        ids, mask = _padded([prefix + rows[i] for i in chosen])
        with torch.inference_mode():
            logits = lm(input_ids=ids, attention_mask=mask).logits[:, begin - 1 : -1].float()
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, begin:], reduction="none"
            )
            said = mask[:, begin:]
            means[chosen] = ((losses * said).sum(1) / said.sum(1).clamp(min=1)).numpy()
    surprise: list[float] = means.tolist()
    return surprise


@lru_cache(maxsize=16_384)
def _reference_surprise(model: str, context: str, text: str) -> float:
    return surprises([text], model, context)[0]


# --- what both share ----------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _loaded(model: str, kind: str) -> tuple[Any, Any]:
    """Read tokenizer and model; nothing else that is drawn at random notices."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        loaded = getattr(transformers, kind).from_pretrained(model, dtype=torch.float32)
    return tokenizer, loaded.eval()


def _most_tokens(model: Any) -> int:
    return min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))


def _says(text: str) -> bool:
    return any(map(str.isalnum, text))


def _readable(text: str) -> str:
    """Return a text that any tokenizer takes: of some length, without lone surrogates."""
    return text[:_MOST_CHARACTERS].encode("utf-8", "replace").decode()


def _passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Give the rows of each forward pass: of similar lengths, few enough with their padding."""
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chosen and lengths[i] * (len(chosen) + 1) > _PASS_TOKENS:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Return ids and mask, (n, longest), filled up with zeros on the right."""
    import torch

    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids, (torch.arange(length) < lengths).long()
