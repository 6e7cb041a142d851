"""How good an answer is: exact match and token F1, as SQuAD counts them, and strict.

Official part: an answer is lower-cased, loses ASCII punctuation and the articles a, an, the, and
is split at whitespace; exact match compares what is left, F1 is the harmonic mean of precision
and recall over its tokens (Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine
Comprehension of Text", section 6.1; Reddy et al. 2019, "CoQA: A Conversational Question Answering
Challenge", section 5.1).

Of several accepted answers the best counts, as in SQuAD. CoQA's script instead leaves each of them
out in turn and averages the bests, to compare with people: where there are several, as in CoQA's
development set, its figure is lower than ours.

We are stricter than the official scripts in three places, because a policy is trained on these
numbers and finds every gap:

- *Nothing* is never right. An answer of which normalisation leaves nothing ("", "the", "!!")
  scores 0, even if an accepted answer too normalises to nothing; officially such a pair scores 1.
- *unknown* is a verdict, not a text. Against an accepted answer that normalises to "unknown", F1
  is exact match: "unknown unknown" and "it is unknown" score 0, so that a policy cannot hedge.
- *yes and no* is neither. Against an accepted answer that is the one, an answer that also says the
  other scores 0; officially "yes no" earns two thirds of either.

And one place where whitespace tokens make no sense: each CJK character is a token and CJK
punctuation is dropped (`llm_envs.scoring.text.split_cjk`). Against one accepted answer all other
text scores exactly as it does officially.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from llm_envs.scoring.text import split_cjk

UNKNOWN: Final = "unknown"
"""The only accepted answer of a question that the passage does not answer."""

_ARTICLES: Final = frozenset({"a", "an", "the"})
_ARTICLE: Final = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION: Final = re.compile(f"[{re.escape(string.punctuation)}]+")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_OPPOSITES: Final[dict[tuple[str, ...], str]] = {("yes",): "no", ("no",): "yes"}
_ZERO: Final = (0.0, 0.0)
# Policies repeat short answers all the time; a megabyte of babble is not worth remembering.
_LONGEST_CACHED: Final = 256


@dataclass(frozen=True, slots=True)
class QAScore:
    """The score of one answer, each part in [0, 1] and the best over the accepted answers.

    Attributes:
        f1: Token F1.
        exact_match: 1.0 if the normalised answer is an accepted one, else 0.0.
    """

    f1: float
    exact_match: float


@dataclass(frozen=True, slots=True)
class _Reference:
    """An accepted answer, prepared once: its tokens, their counts, and its rule."""

    tokens: tuple[str, ...]
    counts: tuple[tuple[str, int], ...]
    is_verdict: bool
    opposite: str  # an answer that holds it too is none; "" where there is no such word


def normalize_answer(text: str) -> str:
    """Normalise an answer as the official SQuAD and CoQA scripts do.

    Args:
        text: Any string.

    Returns:
        The text in lower case, without ASCII punctuation and without the words a, an, the, its
        tokens separated by single spaces; ``""`` if nothing is left.

    Example:
        >>> normalize_answer("The U.S. dollar, I think!")
        'us dollar i think'
    """
    return " ".join(_official_tokens(text))


def _official_tokens(text: str) -> list[str]:
    if text.isascii() and text.isprintable():
        # Without punctuation only letters, digits and spaces are left here, so that an article
        # is a whole token. This is the usual case, and several times faster.
        words = text.lower().translate(_NO_PUNCTUATION).split()
        return [word for word in words if word not in _ARTICLES]
    return _ARTICLE.sub(" ", _PUNCTUATION.sub("", text.lower())).split()


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the answer equals an accepted one after normalisation, else 0.0.

    Args:
        prediction: The answer.
        references: The accepted answers, at least one.

    Raises:
        ValueError: ``references`` is empty.
        TypeError: ``references`` is one string instead of a sequence of them.
    """
    return _score(prediction, references)[1]


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Return the best token F1 of the answer over the accepted ones, in [0, 1].

    Args:
        prediction: The answer.
        references: The accepted answers, at least one.

    Raises:
        ValueError: ``references`` is empty.
        TypeError: ``references`` is one string instead of a sequence of them.
    """
    return _score(prediction, references)[0]


def score_answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[QAScore]:
    """Score a batch of answers.

    Args:
        predictions: n answers.
        references: For each of them its accepted answers, at least one.

    Returns:
        n scores, in the order of the answers.

    Raises:
        ValueError: The two differ in length, or a list of accepted answers is empty.
        TypeError: One string stands where a list of accepted answers is due.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions but {len(references)} lists of references. "
            "Give one list of accepted answers for each prediction."
        )
    return [
        QAScore(*_score(prediction, accepted))
        for prediction, accepted in zip(predictions, references, strict=True)
    ]


def contains_answer(prediction: str, references: Sequence[str]) -> bool:
    """Say whether an accepted answer stands in the prediction, as a run of whole tokens.

    This tells a policy that reads but rambles from one that does not read. It is for reports and
    is never rewarded: a policy that lists every candidate would always be right.

    Args:
        prediction: The answer.
        references: The accepted answers, at least one.

    Raises:
        ValueError: ``references`` is empty.
        TypeError: ``references`` is one string instead of a sequence of them.
    """
    # Tokens hold no spaces, so a run of tokens is a substring between spaces.
    tokens = f" {' '.join(_tokens(prediction))} "
    return any(
        reference.tokens and f" {' '.join(reference.tokens)} " in tokens
        for reference in _prepare(references)
    )


def _score(prediction: str, references: Sequence[str]) -> tuple[float, float]:
    """Give ``(f1, exact_match)``, the best over the accepted answers."""
    prepared = _prepare(references)
    tokens = _tokens(prediction)
    if not tokens:
        return _ZERO
    if any(tokens == reference.tokens for reference in prepared):
        return (1.0, 1.0)
    count = tokens.count if len(tokens) <= 16 else Counter(tokens).__getitem__
    best = 0.0
    for reference in prepared:
        if reference.is_verdict or (reference.opposite and reference.opposite in tokens):
            continue
        same = 0
        for token, occurrences in reference.counts:
            same += min(count(token), occurrences)
        if same:
            # Written as the official script does, so that the floats are equal to the last bit.
            precision = same / len(tokens)
            recall = same / len(reference.tokens)
            best = max(best, 2 * precision * recall / (precision + recall))
    return (best, 0.0)


def _prepare(references: Sequence[str]) -> tuple[_Reference, ...]:
    if isinstance(references, str):
        raise TypeError(
            f"References are one string ({references[:80]!r}), whose characters would each count "
            "as an accepted answer. Give a sequence of strings, such as a list with one element."
        )
    if not references:
        raise ValueError(
            "There is no reference to compare the answer with. Give at least one accepted answer; "
            f"for a question that cannot be answered give ({UNKNOWN!r},)."
        )
    return _prepare_tuple(tuple(references))


@lru_cache(maxsize=2**14)
def _prepare_tuple(references: tuple[str, ...]) -> tuple[_Reference, ...]:
    # Accepted answers that normalise alike are compared once.
    return tuple(
        _Reference(
            tokens,
            tuple(Counter(tokens).items()),
            is_verdict=tokens == (UNKNOWN,),
            opposite=_OPPOSITES.get(tokens, ""),
        )
        for tokens in dict.fromkeys(map(_tokens, references))
    )


def _tokens(text: str) -> tuple[str, ...]:
    return _tokens_cached(text) if len(text) <= _LONGEST_CACHED else _tokenize(text)


def _tokenize(text: str) -> tuple[str, ...]:
    if text.isascii():
        return tuple(_official_tokens(text))
    return tuple(split_cjk(normalize_answer(text)).split())


_tokens_cached = lru_cache(maxsize=2**14)(_tokenize)
