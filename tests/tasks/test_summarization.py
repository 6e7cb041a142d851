"""Summarization: the length limit, several references, and files of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from llm_envs.scoring.rouge import rouge
from llm_envs.tasks.summarization import Summarization


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    records = [
        {"id": "en", "text": "A shell reads commands.", "summaries": ["a command shell", "shell"]},
        {"id": "zh", "text": "東京は日本の首都です。", "summary": "日本の首都"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def score(path: Path, example: str, answer: str, **arguments: Any) -> dict[str, Any]:
    env = gym.make("Summarization-v0", dataset=path, split="all", **arguments)
    env.reset(options={"example": example})
    _, _, terminated, _, info = env.step(answer)
    assert terminated
    return info


def test_the_score_is_the_mean_of_three_parts_each_the_best_over_the_references(path: Path) -> None:
    info = score(path, "en", " The shell.")
    assert info["score/rouge_1"] == pytest.approx(2 * 1 / (2 + 1))  # with "shell"
    assert info["score/rouge_2"] == 0.0
    assert info["score/rouge_l"] == pytest.approx(2 / 3)
    assert info["score"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)


@pytest.mark.parametrize(
    ("example", "answer", "words", "scored"),
    [
        ("en", "one two\n three  a command shell", 3, "one two three"),
        ("en", "one two\n three  a command shell", 6, "one two three a command shell"),
        ("en", "one-two/three a_command--shell", 3, "one two three"),
        ("en", "one-two/three a_command--shell", 6, "one two three a command shell"),
        ("en", "oneıtwoſthree a_command--shell", 3, "one two three"),
        ("en", "One\u0130two three a command shell", 2, "onei two"),
        ("zh", "東京、大阪。日本の首都", 4, "東京大阪"),
        ("zh", "東京、大阪。日本の首都", 9, "東京大阪日本の首都"),
        ("zh", "Tokyo東京 日本", 2, "Tokyo 東"),
    ],
)
def test_what_exceeds_the_length_limit_earns_nothing(
    path: Path, example: str, answer: str, words: int, scored: str
) -> None:
    """A CJK character is a word, or a text without spaces would have no limit at all."""
    references = {"en": ["a command shell", "shell"], "zh": ["日本の首都"]}[example]
    expected = rouge(scored, references)
    assert score(path, example, answer, max_words=words)["score"] == expected.mean
    assert (expected.mean > 0) == ("shell" in scored or "日本" in scored)


def test_the_limit_is_64_words_by_default(path: Path) -> None:
    assert score(path, "en", "x " * 63 + "shell")["score"] > 0.0
    assert score(path, "en", "x " * 64 + "shell")["score"] == 0.0
    assert score(path, "zh", "大" * 64 + "日本")["score"] == 0.0


def test_stems_are_compared_on_request(path: Path) -> None:
    pytest.importorskip("nltk")
    assert score(path, "en", "commands")["score"] == 0.0
    assert score(path, "en", "commands", use_stemmer=True)["score"] > 0.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_words": 0}, ValueError, "max_words is 0. Give a whole number from 1"),
        ({"max_words": "many"}, TypeError, "max_words is 'many'. Give a whole number from 1"),
        ({"max_words": 2.5}, TypeError, "max_words is 2.5"),
        ({"use_stemmer": "no"}, TypeError, "use_stemmer is 'no'. Give True or False"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gym.make("Summarization-v0", **arguments)


def test_skipped_records_are_counted_where_the_environment_is(path: Path) -> None:
    path.write_text(path.read_text() + '{"id": "bad"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: field 'text' is missing"):
        gym.make("Summarization-v0", dataset=path)
    with pytest.warns(UserWarning, match="skipped 1 bad of 3 records"):
        env = gym.make("Summarization-v0", dataset=path, split="all", skip_bad_records=True)
    assert env.unwrapped.task.skipped == 1


def test_rounding_takes_no_score_beyond_1() -> None:
    weights = {"rouge": 0.1, "naturalness": 3.1}
    for tenths in range(1, 60):
        weights["naturalness"] = tenths / 10
        task = Summarization(score_weights=weights)
        [outcome] = task.score_answers(["a fine summary"], [("a fine summary",)])
        assert outcome.score == pytest.approx(1.0)
        assert outcome.score <= 1.0
