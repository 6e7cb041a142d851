"""DialogueQA: official files and JSONL, played through ``gym.make`` turn by turn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

PASSAGE = "Normandy is a region in France. Its people are the Normans."
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Normans",
            "paragraphs": [
                {
                    "context": PASSAGE,
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where is Normandy?",
                            "answers": [
                                {"text": "France", "answer_start": 24},
                                {"text": "in France", "answer_start": 21},
                            ],
                            "is_impossible": False,
                        },
                        {
                            "id": "q2",
                            "question": "What is its capital?",
                            "answers": [],
                            "plausible_answers": [{"text": "France", "answer_start": 24}],
                            "is_impossible": True,
                        },
                    ],
                }
            ],
        }
    ],
}
COQA = {
    "version": "1.0",
    "data": [
        {
            "id": "c1",
            "source": "wikipedia",
            "story": PASSAGE,
            "questions": [
                {"input_text": "Where is Normandy?", "turn_id": 1},
                {"input_text": "What is its capital?", "turn_id": 2},
            ],
            "answers": [
                {"input_text": "France", "turn_id": 1, "span_text": "in France"},
                {"input_text": "unknown", "turn_id": 2, "span_text": "unknown"},
            ],
            "additional_answers": {
                "0": [
                    {"input_text": "in France", "turn_id": 1, "span_text": "in France"},
                    {"input_text": "unknown", "turn_id": 2, "span_text": "unknown"},
                ]
            },
        }
    ],
}
JSONL = {
    "id": "j1",
    "passage": PASSAGE,
    "turns": [
        {"question": "Where is Normandy?", "answers": ["France", "in France"]},
        {"question": "What is its capital?", "answers": ["unknown"]},
    ],
}


@pytest.fixture(params=["squad", "coqa", "jsonl"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    content = {"squad": SQUAD, "coqa": COQA, "jsonl": JSONL}[request.param]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(content))
    return file


def make(path: Path, **arguments: Any) -> gym.Env[Any, Any]:
    env = gym.make("DialogueQA-v0", dataset=path, split="all", **arguments)
    env.reset(seed=0)
    return env


def test_a_dialogue_of_every_format_is_played_to_its_end(path: Path) -> None:
    env = make(path)
    observation, info = env.reset()
    assert observation == f"User: {PASSAGE}\nWhere is Normandy?\nAssistant:"
    assert env.unwrapped.references == ("France", "in France")

    observation, reward, terminated, _, info = env.step(" In France, I think.")
    assert info["score/exact_match"] == 0.0
    assert info["score"] == info["score/f1"] == pytest.approx(2 * 2 / (4 + 2))
    assert reward == pytest.approx(2 * info["score"] - 1)
    assert info["feedback"] == "The answer is France."
    assert observation.endswith(
        " In France, I think.\nUser: The answer is France. What is its capital?\nAssistant:"
    )
    assert not terminated

    assert env.unwrapped.references == ("unknown",)
    observation, reward, terminated, _, info = env.step(" Unknown.")
    assert (reward, terminated) == (1.0, True)
    assert info["feedback"] == "That's right, thank you."
    assert observation.endswith(" Unknown.\nUser: That's right, thank you.")


@pytest.mark.parametrize(
    "answer",
    ["", " France", " it is unknown", " unknown unknown", " unknown, or France", " I do not know"],
)
def test_an_unanswerable_question_accepts_only_unknown(path: Path, answer: str) -> None:
    env = make(path)
    env.step(" France")
    _, reward, _, _, info = env.step(answer)
    assert (reward, info["score"], info["feedback"]) == (-1.0, 0.0, "The answer is unknown.")


def test_max_turns_asks_fewer_questions(path: Path) -> None:
    env = make(path, max_turns=1)
    assert env.step(" France")[2]


def test_skipped_records_are_counted_where_the_environment_is(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(JSONL) + '\n{"id": "bad"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: field 'passage' is missing"):
        make(path)
    with pytest.warns(UserWarning, match="skipped 1 bad of 2 records"):
        env = make(path, skip_bad_records=True)
    assert env.unwrapped.task.skipped == 1


def test_a_hub_set_without_the_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for id in ("DialogueQA-v0", "Summarization-v0"):
        with pytest.raises(ImportError, match=r"pip install 'llm-envs\[hub\]'"):
            gym.make(id, dataset="hf:some/set")
