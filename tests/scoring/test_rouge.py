"""ROUGE: equality with the `rouge-score` package, bounds, scripts without spaces, and time."""

from __future__ import annotations

import gzip
import json
import random
import sys
import time
from importlib import resources
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

from llm_envs.scoring import rouge as rouge_module
from llm_envs.scoring.rouge import RougeScore, rouge, rouge_batch, tokenize

PARTS = ("rouge_1", "rouge_2", "rouge_l")
SCORERS = {
    stem: RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem) for stem in (False, True)
}

# Few distinct words, so that texts overlap; some that stemming changes or must leave alone.
sentences = st.lists(
    st.sampled_from(["the", "cat", "cats", "dying", "flies", "happily", "3d", "ab-cd!", ".", "\t"]),
    max_size=12,
).map(" ".join)
# Everything below the first script that we treat in our own way.
plain_unicode = st.text(st.characters(max_codepoint=0x10FF), max_size=40)
any_unicode = st.text(st.characters(exclude_categories=()), max_size=60)


def expected(prediction: str, references: list[str], use_stemmer: bool) -> list[float]:
    """The F-measures that `rouge-score` gives, in the order of `PARTS`."""
    scores = SCORERS[use_stemmer].score_multi(references, prediction)
    return [float(scores[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")]


def parts(score: RougeScore) -> list[float]:
    return [getattr(score, name) for name in PARTS]


@pytest.fixture(scope="module")
def real_pairs() -> list[tuple[str, list[str]]]:
    """1,000 predictions of several kinds, with the real synopses that they are scored against."""
    folder = resources.files("llm_envs") / "datasets" / "embedded" / "debian_packages"
    lines = gzip.decompress((folder / "data.jsonl.gz").read_bytes()).decode().splitlines()
    rng = random.Random(7)
    records: list[dict[str, Any]] = [json.loads(line) for line in rng.sample(lines, 1001)]
    pairs = []
    for index, (record, other) in enumerate(pairwise(records)):
        text, summaries = record["text"], record["summaries"]
        shuffled = summaries[0].split()
        rng.shuffle(shuffled)
        kinds = (
            text.split(". ")[0],
            " ".join(shuffled),
            other["summaries"][0],
            text,
            " ".join(rng.choices(text.split(), k=12)),
        )
        references = summaries + (other["summaries"] if index % 3 == 0 else [])
        pairs.append((kinds[index % len(kinds)], references))
    return pairs


@pytest.mark.parametrize("use_stemmer", [False, True])
def test_equals_rouge_score_on_real_pairs(
    real_pairs: list[tuple[str, list[str]]], use_stemmer: bool
) -> None:
    predictions, references = map(list, zip(*real_pairs, strict=True))
    ours = rouge_batch(predictions, references, use_stemmer=use_stemmer)
    assert len(ours) == 1000
    theirs = [expected(*pair, use_stemmer) for pair in real_pairs]
    for score, reference in zip(ours, theirs, strict=True):
        assert parts(score) == pytest.approx(reference, rel=0, abs=1e-9)
    # The pairs must exercise every part, or the equality above would say little.
    for column in zip(*theirs, strict=True):
        assert len(set(column)) > 30


@given(sentences, st.lists(sentences, min_size=1, max_size=3), st.booleans())
def test_equals_rouge_score_on_overlapping_texts(
    prediction: str, references: list[str], use_stemmer: bool
) -> None:
    ours = parts(rouge(prediction, references, use_stemmer=use_stemmer))
    assert ours == pytest.approx(expected(prediction, references, use_stemmer), rel=0, abs=1e-9)


@given(plain_unicode, plain_unicode, st.booleans())
def test_equals_rouge_score_on_any_text_below_cjk(a: str, b: str, use_stemmer: bool) -> None:
    ours = parts(rouge(a, [b], use_stemmer=use_stemmer))
    assert ours == pytest.approx(expected(a, [b], use_stemmer), rel=0, abs=1e-9)


@given(any_unicode | sentences, any_unicode | sentences)
def test_bounds_and_symmetry(a: str, b: str) -> None:
    score = rouge(a, [b])
    assert all(0.0 <= part <= 1.0 for part in parts(score))
    assert score.mean == pytest.approx(sum(parts(score)) / 3)
    assert score.rouge_l <= score.rouge_1
    assert score == rouge(b, [a])


@given(any_unicode | sentences)
def test_a_text_equals_itself(text: str) -> None:
    count = len(tokenize(text))
    assert parts(rouge(text, [text])) == [float(count >= 1), float(count >= 2), float(count >= 1)]


@given(sentences, st.lists(sentences, min_size=1, max_size=3))
def test_each_part_is_the_best_over_the_references(prediction: str, references: list[str]) -> None:
    single = [parts(rouge(prediction, [reference])) for reference in references]
    assert parts(rouge(prediction, references)) == [
        max(column) for column in zip(*single, strict=True)
    ]


def test_hand_computed() -> None:
    # Words: c, a, d of 4 and 5 in common. Pairs: only "a d" of 3 and 4. Subsequence: "a d".
    assert parts(rouge("b c a d", ["a d e c f"])) == pytest.approx([6 / 9, 2 / 7, 4 / 9])
    # Repeated words count as often as both have them: "a" twice.
    assert parts(rouge("a a a", ["a a"])) == pytest.approx([4 / 5, 2 / 3, 4 / 5])


def test_short_words_are_not_stemmed() -> None:
    for use_stemmer in (False, True):  # Porter's stem of "gas" is "ga", of "cats" "cat"
        assert rouge("gas", ["ga"], use_stemmer=use_stemmer).rouge_1 == 0.0
        assert rouge("cats", ["cat"], use_stemmer=use_stemmer).rouge_1 == float(use_stemmer)
        assert expected("gas", ["ga"], use_stemmer)[0] == 0.0


@pytest.mark.parametrize("text", ["", " ", "\n", "...!?", "\x00", "é à ñ", "🙂🙂", "\ud800"])
def test_text_without_any_word_scores_zero(text: str) -> None:
    zero = [0.0, 0.0, 0.0]
    assert parts(rouge(text, ["a cat"])) == zero
    assert parts(rouge("a cat", [text])) == zero
    assert parts(rouge(text, [text])) == zero


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("東京は大きい。", ["東", "京", "は", "大", "き", "い"]),
        ("ラーメン・カレー", ["ラ", "ー", "メ", "ン", "カ", "レ", "ー"]),
        ("서울, 대한민국", ["서", "울", "대", "한", "민", "국"]),
        ("Python3で書く", ["python3", "で", "書", "く"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
    ],
)
def test_cjk_is_compared_by_character(text: str, tokens: list[str]) -> None:
    assert tokenize(text) == tokens
    assert tokenize(text, use_stemmer=True) == tokens
    assert parts(rouge(text, [text])) == [1.0, 1.0, 1.0]


def test_cjk_scores_are_those_of_the_spelled_out_tokens() -> None:
    letters = str.maketrans({"東": " a ", "京": " b ", "都": " c ", "北": " d "})
    prediction, reference = "東京都 tokyo", "北京都"
    spelled = expected(prediction.translate(letters), [reference.translate(letters)], False)
    assert parts(rouge(prediction, [reference])) == pytest.approx(spelled, rel=0, abs=1e-9)
    assert spelled[1] > 0


@pytest.mark.parametrize("use_stemmer", [False, True])
@pytest.mark.parametrize(
    "long_text",
    [
        " ".join(str(index) for index in range(18_000)),
        "a " * 50_000,
        "ab " * 25_000 + "ba " * 12_500,
        "x" * 100_000,
        "y" * 99_993 + "ational",
        "!" * 100_000,
        "東京" * 50_000,
    ],
    ids=["distinct", "one letter", "two words", "one word", "one word to stem", "marks", "cjk"],
)
def test_long_answers_cost_little(long_text: str, use_stemmer: bool) -> None:
    begin = time.process_time()
    rouge(long_text, ["a short reference"], use_stemmer=use_stemmer)
    rouge("a short answer", [long_text], use_stemmer=use_stemmer)
    full = rouge(long_text, [long_text[::-1]], use_stemmer=use_stemmer)
    assert time.process_time() - begin < 3.0  # a table of 50,000 x 50,000 would take hours
    assert all(0.0 <= part <= 1.0 for part in parts(full))


def test_batch_keeps_the_order() -> None:
    scores = rouge_batch(["a cat", "a dog", ""], [["a cat"], ["no", "dog a"], ["x"]])
    assert scores == [rouge("a cat", ["a cat"]), rouge("a dog", ["no", "dog a"]), rouge("", ["x"])]
    assert rouge_batch([], []) == []


def test_misuse_is_refused() -> None:
    with pytest.raises(TypeError, match="Pass a list of strings"):
        rouge("a", "a reference")
    with pytest.raises(ValueError, match="references is empty"):
        rouge("a", [])
    with pytest.raises(ValueError, match="2 predictions but 1 sequences"):
        rouge_batch(["a", "b"], [["a"]])


def test_missing_stemmer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    rouge_module._porter_stem.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk.stem.porter", None)  # makes its import fail
    with pytest.raises(ModuleNotFoundError, match="extra 'stemming'"):
        rouge("running", ["a reference that no other test prepares"], use_stemmer=True)
    assert rouge("running", ["running"]).rouge_1 == 1.0
