"""Answer scores: the official ones wherever we do not say otherwise, and strict where we do."""

from __future__ import annotations

import re
import string
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_envs.scoring.qa import (
    UNKNOWN,
    QAScore,
    contains_answer,
    exact_match,
    normalize_answer,
    score_answers,
    token_f1,
)
from llm_envs.scoring.text import split_cjk


class Official(NamedTuple):
    """An official implementation: of one prediction against one reference."""

    normalize: Callable[[str], str]
    f1: Callable[[str, str], float]
    exact: Callable[[str, str], float]
    tolerance: float


def by_definition() -> Official:
    """The metric step by step as section 6.1 of the SQuAD paper defines it, and slowly."""

    def normalize(text: str) -> str:
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        for article in ("a", "an", "the"):
            kept = re.sub(rf"\b{article}\b", " ", kept)
        return " ".join(kept.split())

    def f1(prediction: str, reference: str) -> float:
        predicted, gold = normalize(prediction).split(), normalize(reference).split()
        if not predicted or not gold:
            return float(predicted == gold)
        left = list(gold)
        for token in predicted:
            if token in left:
                left.remove(token)
        same = len(gold) - len(left)
        precision, recall = same / len(predicted), same / len(gold)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    def exact(prediction: str, reference: str) -> float:
        return float(normalize(prediction) == normalize(reference))

    return Official(normalize, f1, exact, 1e-12)


def from_torchmetrics() -> Official:
    """The official script as torchmetrics carries it (in single precision)."""
    pytest.importorskip("torchmetrics")
    module: Any = import_module("torchmetrics.functional.text.squad")
    return Official(
        module._normalize_text,
        lambda prediction, reference: float(module._compute_f1_score(prediction, reference)),
        lambda prediction, reference: float(
            module._compute_exact_match_score(prediction, reference)
        ),
        1e-6,
    )


@pytest.fixture(
    scope="module",
    params=[by_definition, from_torchmetrics],
    ids=lambda f: f.__name__,
)
def official(request: pytest.FixtureRequest) -> Official:
    return request.param()  # type: ignore[no-any-return]


REAL = [
    "Paris",
    "the city of Paris",
    "Paris, France",
    "It is Paris.",
    "U.S. dollar",
    "US dollars",
    "the US Dollar (USD)",
    "10th and 11th centuries",
    "in the 10th and 11th centuries",
    "1,234.5",
    "12345",
    "São Tomé and Príncipe",
    "SAO TOME",
    "Côte d’Ivoire",
    "Cote d'Ivoire",
    "A",
    "An apple a day",
    "theatre",
    "the—theatre",
    "a\u00a0b",
    "the\u2028end",
    "x_y",
    "yes",
    "No.",
    "İstanbul",
    "straße STRASSE",
    "Москва",
    "the Москва-река",
    "\u0301accent the",
    "the the the",
    "France France",
    "a\x00the\x00b",
    "  tabs\tand\nlines  ",
    "",
    "!?",
    "🙂 the 🙂",
]

WORDS = st.sampled_from(["the", "a", "An", "Paris", "paris,", "of", "U.S.", "10", "d'Or", "—", "é"])
ANSWERS = st.one_of(
    st.lists(WORDS, max_size=6).map(" ".join),
    st.text(max_size=20),
    st.text(alphabet=st.sampled_from("an the.,-_'\t\n\x00\x1f\u00a0é—"), max_size=20),
)


def is_officially_ours(official: Official, *texts: str) -> bool:
    """Say whether none of our documented differences concerns these texts."""
    normal = [official.normalize(text) for text in texts]
    return all(text and text != UNKNOWN and split_cjk(text) == text for text in normal)


def check_pair(official: Official, prediction: str, reference: str) -> None:
    assert normalize_answer(prediction) == official.normalize(prediction)
    if is_officially_ours(official, prediction, reference):
        f1 = token_f1(prediction, [reference])
        assert abs(f1 - official.f1(prediction, reference)) <= official.tolerance
        assert exact_match(prediction, [reference]) == official.exact(prediction, reference)


def test_every_pair_of_real_answers_scores_officially(official: Official) -> None:
    compared = 0
    for prediction, reference in product(REAL, REAL):
        check_pair(official, prediction, reference)
        compared += is_officially_ours(official, prediction, reference)
    assert compared > 900, "the documented differences excuse too much"


def test_any_pair_scores_officially(official: Official) -> None:
    @settings(max_examples=300, deadline=None)
    @given(prediction=ANSWERS, reference=ANSWERS)
    def check(prediction: str, reference: str) -> None:
        check_pair(official, prediction, reference)

    check()


@given(st.text(alphabet=st.characters(max_codepoint=0x7F)))
def test_the_fast_path_for_ascii_equals_the_definition(text: str) -> None:
    assert normalize_answer(text) == by_definition().normalize(text)


@given(prediction=ANSWERS, references=st.lists(ANSWERS, min_size=1, max_size=4))
def test_the_best_reference_counts(prediction: str, references: list[str]) -> None:
    alone = [score_answers([prediction], [[reference]])[0] for reference in references]
    together = QAScore(token_f1(prediction, references), exact_match(prediction, references))
    assert together.f1 == max(score.f1 for score in alone)
    assert together.exact_match == max(score.exact_match for score in alone)


def test_scores_computed_by_hand() -> None:
    # 2 of 3 tokens are right, and 2 of 4 are found: P = 2/3, R = 1/2, F1 = 4/7.
    assert token_f1("red green pink", ["red green blue white"]) == pytest.approx(4 / 7)
    # A repeated token counts as often as the reference has it: P = 1/3, R = 1.
    assert token_f1("Paris Paris Paris", ["Paris"]) == pytest.approx(1 / 2)
    assert exact_match("Paris Paris Paris", ["Paris"]) == 0.0
    assert exact_match("the paris!", ["London", "Paris"]) == 1.0


# --- Where we are stricter --------------------------------------------------------------------


@pytest.mark.parametrize(
    "nothing", ["", " ", "the", "A the an", "?!", "\n\t", "a...", "。", "、the「」"]
)
@pytest.mark.parametrize(
    "references", [("Paris",), ("",), ("the",), ("!", "a"), (UNKNOWN,), ("。",)]
)
def test_an_answer_that_normalises_to_nothing_scores_0(
    nothing: str, references: tuple[str, ...]
) -> None:
    assert score_answers([nothing], [references]) == [QAScore(0.0, 0.0)]
    assert not contains_answer(nothing, references)


def test_an_accepted_answer_that_normalises_to_nothing_is_met_by_none() -> None:
    assert score_answers(["Paris", "the"], [["the"], ["the"]]) == [QAScore(0.0, 0.0)] * 2
    assert not contains_answer("Paris", ["the"])


@pytest.mark.parametrize("right", ["unknown", "Unknown.", " UNKNOWN\n", "the unknown", "'unknown'"])
def test_an_unanswerable_question_accepts_unknown(right: str) -> None:
    assert score_answers([right], [(UNKNOWN,)]) == [QAScore(1.0, 1.0)]


@pytest.mark.parametrize(
    "hedge",
    ["unknown unknown", "it is unknown", "unknown Paris", "unknown, I think", "unknow", "no"],
)
def test_an_unanswerable_question_accepts_nothing_but_unknown(hedge: str) -> None:
    assert score_answers([hedge], [(UNKNOWN,)]) == [QAScore(0.0, 0.0)]


def test_unknown_beside_a_text_is_no_help_to_a_hedge() -> None:
    references = ("Paris Texas", UNKNOWN)
    assert token_f1("unknown", references) == 1.0
    assert token_f1("unknown Paris", references) == token_f1("unknown Paris", ["Paris Texas"])


def test_who_says_yes_and_no_says_neither() -> None:
    """Else "yes no" would pay more than any honest guess that is right less than twice in three."""
    for hedge in ("yes no", "No, yes.", "it is yes or no"):
        assert token_f1(hedge, ("yes",)) == token_f1(hedge, ("no",)) == 0.0
    assert token_f1("yes it is", ("yes",)) == 0.5, "as officially"
    assert token_f1("yes no", ("yes", "yes and no")) == pytest.approx(0.8), "if that is accepted"


# --- CJK --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("東京都", ["東", "京", "都"]),
        ("ひらがな", ["ひ", "ら", "が", "な"]),
        ("コーヒー", ["コ", "ー", "ヒ", "ー"]),
        ("한국어 단어", ["한", "국", "어", "단", "어"]),
        ("佐々木", ["佐", "々", "木"]),
        ("x々々", ["x", "々", "々"]),
        ("東京(Tokyo)、日本。", ["東", "京", "(Tokyo)", "日", "本"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("ｶﾅ", ["ｶ", "ﾅ"]),
        ("GPT４は３．５", ["GPT４", "は", "３", "５"]),
    ],
)
def test_each_cjk_letter_is_a_token(text: str, tokens: list[str]) -> None:
    assert split_cjk(text).split() == tokens


@given(st.text(alphabet=st.characters(max_codepoint=0x10FF)))
@example("naïve — «Москва» \u05d0 ไทย \ud800")
def test_other_text_is_left_alone(text: str) -> None:
    assert split_cjk(text) == text


def test_cjk_answers_are_scored_by_character() -> None:
    assert token_f1("東京都", ["東京"]) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert score_answers(["「東京」。"], [["東京"]]) == [QAScore(1.0, 1.0)]
    assert exact_match("京東", ["東京"]) == 0.0
    assert token_f1("大阪", ["東京"]) == 0.0
    assert contains_answer("首都は東京です", ["東京"])
    assert not contains_answer("東の京", ["東京"])


# --- Containment ------------------------------------------------------------------------------


def test_containment_is_of_whole_tokens_in_order() -> None:
    assert contains_answer("I think that it is the U.S. Dollar.", ["euro", "US dollar"])
    assert not contains_answer("dollar us", ["US dollar"])
    assert not contains_answer("Parisian", ["Paris"])
    assert contains_answer("It is unknown to me", [UNKNOWN])


@given(before=ANSWERS, answer=ANSWERS, after=ANSWERS)
def test_an_answer_between_other_words_is_contained(before: str, answer: str, after: str) -> None:
    scores = exact_match(answer, [answer])
    assert contains_answer(f"{before} {answer} {after}", [answer]) == (scores == 1.0)


# --- Robustness -------------------------------------------------------------------------------


ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()), max_size=60)


@given(prediction=ANY_TEXT, reference=ANY_TEXT)
@example("\ud800", "\ud800")
@example("\x00", "\x00")
def test_no_text_breaks_a_score(prediction: str, reference: str) -> None:
    score = score_answers([prediction], [[reference]])[0]
    assert 0.0 <= score.exact_match <= score.f1 <= 1.0
    mirrored = score_answers([reference], [[prediction]])[0]
    assert score.exact_match == mirrored.exact_match
    assert contains_answer(prediction, [reference]) in (True, False)


@pytest.mark.parametrize(
    "piece", ["a", "a ", "東", "東、", "\ud800", "\x00", "🙂 ", "!", "İ", "the—", "x1 "], ids=ascii
)
def test_a_megabyte_is_scored_in_good_time(piece: str) -> None:
    answer = piece * (2**20 // len(piece))
    start = time.process_time()
    score = score_answers([answer], [["Paris", "the capital 東京"]])[0]
    contains_answer(answer, ["Paris"])
    assert time.process_time() - start < 10  # Some hundred ms; quadratic time would be hours.
    assert score.f1 < 1e-4
    assert score.exact_match == 0.0


def test_a_batch_is_scored_as_its_answers_are() -> None:
    predictions = [prediction for prediction in REAL for _ in range(2)]
    references = [[REAL[index % 7], REAL[index % 11]] for index in range(len(predictions))]
    batch = score_answers(predictions, references)
    assert batch == [
        QAScore(token_f1(prediction, accepted), exact_match(prediction, accepted))
        for prediction, accepted in zip(predictions, references, strict=True)
    ]
    assert len(Counter(batch)) > 3


def test_the_batch_is_fast() -> None:
    predictions = [f"It is the city number {index % 997}." for index in range(20_000)]
    references = [(f"city number {index % 499}", "Paris") for index in range(20_000)]

    def rates() -> Iterator[float]:
        for _ in range(5):
            start = time.process_time()
            score_answers(predictions, references)
            yield len(predictions) / (time.process_time() - start)

    assert max(rates()) > 50_000


@pytest.mark.parametrize("score", [exact_match, token_f1, contains_answer])
def test_wrong_references_are_refused(score: Callable[[str, Sequence[str]], float]) -> None:
    with pytest.raises(TypeError, match=r"one string .*'Paris'.* list"):
        score("Paris", "Paris")
    with pytest.raises(ValueError, match="at least one accepted answer"):
        score("Paris", [])


def test_a_batch_of_unequal_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="2 predictions but 1 lists"):
        score_answers(["a", "b"], [["a"]])
