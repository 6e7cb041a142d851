"""ROUGE-1, ROUGE-2 and ROUGE-L F-measures, equal to the `rouge-score` package and much faster.

The speed comes from three places: a reference is prepared once and kept, everything that cannot
match the reference is dropped before anything is compared, and the longest common subsequence is
found by rapidfuzz's bit-parallel algorithm instead of a table.

We differ from `rouge-score` in one way: it drops every character but a-z and 0-9, which leaves
nothing of a Chinese, Japanese or Korean text. Here each Han, Kana or Hangul character is a token.
Text without such characters is tokenised exactly as there.

References:
    Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries".
    https://github.com/google-research/google-research/tree/master/rouge
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import TypeVar, cast

from rapidfuzz.distance import LCSseq

from llm_envs.scoring.text import _HAN, _HANGUL, _KANA

_Item = TypeVar("_Item")
_TOKEN = re.compile(f"[a-z0-9]+|[{_HAN}{_KANA}{_HANGUL}]")
_SHORTEST_STEMMED = 4  # rouge-score leaves words of up to three letters alone
_LONGEST_CACHED = 32  # stems of longer "words" are computed anew, so that junk fills no memory


@dataclass(frozen=True, slots=True)
class RougeScore:
    """F-measures of one prediction, each in [0, 1].

    Attributes:
        rouge_1: Overlap of words.
        rouge_2: Overlap of pairs of neighbouring words.
        rouge_l: Longest common subsequence of words.
    """

    rouge_1: float
    rouge_2: float
    rouge_l: float

    @property
    def mean(self) -> float:
        """The mean of the three parts, in [0, 1]."""
        return (self.rouge_1 + self.rouge_2 + self.rouge_l) / 3


def tokenize(text: str, *, use_stemmer: bool = False) -> list[str]:
    """Splits `text` into the tokens that ROUGE compares.

    Args:
        text: Any text.
        use_stemmer: Whether words of more than three letters are cut to their Porter stem.

    Returns:
        Lowercase runs of a-z and 0-9, and single CJK characters, in the text's order.

    Raises:
        ModuleNotFoundError: `use_stemmer` is set and nltk is not installed.
    """
    tokens = _TOKEN.findall(text.lower())
    if not use_stemmer:
        return tokens
    stem = _porter_stem()
    return [stem(token) if len(token) >= _SHORTEST_STEMMED else token for token in tokens]


def first_words(text: str, most: int) -> str:
    """Return the beginning of a text that holds at most so many words, as ROUGE counts them.

    A chain such as "a-b-c" is three words, whatever it is called: a limit that counts what stands
    between spaces could be got round with hyphens.

    Args:
        text: Any text.
        most: Most words that are left, 1 or more.
    """
    lower = text.lower()
    beyond = next(islice(_TOKEN.finditer(lower), most, None), None)
    if beyond is None:
        return text
    # Only where a letter has no small form of its own length do places differ.
    return (text if len(text) == len(lower) else lower)[: beyond.start()]


def rouge(prediction: str, references: Sequence[str], *, use_stemmer: bool = False) -> RougeScore:
    """Scores one prediction against its references.

    With several references each part is the best over them, whichever reference gives it, as
    `rouge-score`'s `score_multi` does. A text without any token scores 0.

    Args:
        prediction: The summary to score.
        references: At least one accepted summary.
        use_stemmer: Whether words are compared by their Porter stem; needs the `stemming` extra.

    Returns:
        The three F-measures.

    Raises:
        TypeError: `references` is a single string.
        ValueError: `references` is empty.
        ModuleNotFoundError: `use_stemmer` is set and nltk is not installed.

    Example:
        >>> rouge("the cat sat", ["the cat sat down"]).rouge_1
        0.8571428571428571
    """
    if isinstance(references, str):
        raise TypeError(
            f"references is the string {references[:40]!r}; each of its characters would be taken "
            "for a summary. Pass a list of strings."
        )
    if not references:
        raise ValueError(
            "references is empty, so there is nothing to compare with. Pass at least one."
        )
    tokens = tokenize(prediction, use_stemmer=use_stemmer)
    scores = [_score(tokens, _prepare(reference, use_stemmer)) for reference in references]
    if len(scores) == 1:
        return scores[0]
    return RougeScore(
        rouge_1=max(score.rouge_1 for score in scores),
        rouge_2=max(score.rouge_2 for score in scores),
        rouge_l=max(score.rouge_l for score in scores),
    )


def rouge_batch(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    use_stemmer: bool = False,
) -> list[RougeScore]:
    """Scores n predictions, each against its own references.

    Args:
        predictions: n summaries.
        references: n sequences of at least one accepted summary.
        use_stemmer: As in `rouge`.

    Returns:
        n scores, in the order of `predictions`.

    Raises:
        ValueError: The lengths differ, or a prediction has no reference.
        TypeError: A prediction's references are a single string.
        ModuleNotFoundError: `use_stemmer` is set and nltk is not installed.
    """
    if len(predictions) != len(references):
        raise ValueError(
            f"There are {len(predictions)} predictions but {len(references)} sequences of "
            "references. Pass one sequence of references for each prediction."
        )
    return [
        rouge(prediction, accepted, use_stemmer=use_stemmer)
        for prediction, accepted in zip(predictions, references, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Reference:
    """A reference, ready to be compared: its tokens numbered, its words and pairs counted.

    Attributes:
        number: Numbers the distinct tokens from 0.
        sequence: The tokens' numbers.
        unigrams: How often each token occurs.
        bigrams: How often each pair of neighbouring tokens occurs.
    """

    number: dict[str, int]
    sequence: list[int]
    unigrams: Counter[str]
    bigrams: Counter[tuple[str, str]]


@lru_cache(maxsize=4096)
def _prepare(reference: str, use_stemmer: bool) -> _Reference:
    tokens = tokenize(reference, use_stemmer=use_stemmer)
    unigrams = Counter(tokens)
    number = {token: index for index, token in enumerate(unigrams)}
    return _Reference(
        number=number,
        sequence=[number[token] for token in tokens],
        unigrams=unigrams,
        bigrams=Counter(pairwise(tokens)),
    )


def _score(tokens: list[str], reference: _Reference) -> RougeScore:
    """Scores a prediction's tokens against one reference, in time linear in their number."""
    shared = [token for token in tokens if token in reference.number]
    if not shared:
        return RougeScore(0.0, 0.0, 0.0)
    shared_pairs = [pair for pair in pairwise(tokens) if pair in reference.bigrams]
    # Tokens that the reference lacks can be no part of a common subsequence.
    subsequence = LCSseq.similarity(
        [reference.number[token] for token in shared], reference.sequence
    )
    size = len(tokens) + len(reference.sequence)
    return RougeScore(
        rouge_1=2 * _overlap(shared, reference.unigrams) / size,
        rouge_2=2 * _overlap(shared_pairs, reference.bigrams) / (size - 2) if shared_pairs else 0.0,
        rouge_l=2 * subsequence / size,
    )


def _overlap(found: Sequence[_Item], counts: Counter[_Item]) -> int:
    """Returns the size of the multiset intersection of `found` and `counts`.

    F = 2PR / (P + R), with P = h / n and R = h / m, is 2h / (n + m): h is what this returns.

    Args:
        found: Items that all have a count.
        counts: How often each occurs in the other text.
    """
    if len(set(found)) == len(found):  # the usual case: each occurs in the other at least once
        return len(found)
    return sum(min(count, counts[item]) for item, count in Counter(found).items())


@lru_cache(maxsize=1)
def _porter_stem() -> Callable[[str], str]:
    """Returns the stemming function that rouge-score uses, with a memory for common words."""
    try:
        porter = importlib.import_module("nltk.stem.porter")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "use_stemmer=True needs the Porter stemmer of nltk, which is not installed. Install "
            "this package with its extra 'stemming' (or run `pip install nltk`), or score with "
            "use_stemmer=False.",
            name=error.name,
        ) from error
    stem = cast(Callable[[str], str], porter.PorterStemmer().stem)
    remembered = lru_cache(maxsize=65536)(stem)
    return lambda word: remembered(word) if len(word) <= _LONGEST_CACHED else stem(word)
