"""CustomerService: what a search finds, costs and may know, and how answers are scored."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.faqs import load_faqs
from llm_envs.datasets.records import FAQ
from llm_envs.scoring.rouge import rouge
from llm_envs.tasks.customer_service import (
    NO_HELP,
    NOTHING_FOUND,
    PASSAGE_WORDS,
    QUERY_WORDS,
    REFERENCE_WORDS,
    THANKS,
    CustomerService,
    Index,
    beginning,
    customers,
    query_of,
    reference,
    search_then_lead,
)
from llm_envs.wrappers import CorruptedFeedback

ID = "CustomerService-v0"
SPLITS = ("train", "validation", "test")
RECORDS: list[dict[str, str]] = [
    {
        "id": "back",
        "topic": "returns",
        "question": "Can I send it back?",
        "answer": "Yes, parcels are taken back for thirty days. Keep the receipt.",
        "split": "train",
    },
    {
        "id": "money",
        "topic": "returns",
        "question": "When will you refund me?",
        "answer": "A refund reaches your bank within five working days.",
        "split": "test",
    },
    {
        "id": "broken",
        "topic": "returns",
        "question": "It arrived in pieces. What now?",
        "answer": "Broken goods are replaced at once, please send us a picture.",
        "split": "test",
    },
    {
        "id": "hours",
        "question": "When are you open?",
        "answer": "Our shops open at nine and close at six on weekdays.",
        "split": "validation",
    },
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "faqs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def make(path: Path, split: str = "test", **arguments: Any) -> Any:
    return gym.make(ID, dataset=path, split=split, **arguments).unwrapped


def begun(path: Path, example: str = "money", **arguments: Any) -> Any:
    env = make(path, **arguments)
    env.reset(seed=0, options={"example": example})
    return env


# --- BM25 ----------------------------------------------------------------------------------------

WORDS = "apple brick cloud drum eagle flute grape horse igloo jelly".split()


def bm25(documents: list[list[str]], query: list[str]) -> list[float]:
    """The sum over the query's terms of Lucene's formula, as it is printed."""
    n, k1, b = len(documents), 1.5, 0.75
    average = sum(map(len, documents)) / n
    scores = []
    for document in documents:
        counts = Counter(document)
        norm = k1 * (1 - b + b * len(document) / average)
        score = 0.0
        for term in query:
            holding = sum(term in d for d in documents)
            idf = math.log(1 + (n - holding + 0.5) / (holding + 0.5))
            score += idf * counts[term] / (counts[term] + norm)
        scores.append(score)
    return scores


@pytest.mark.parametrize("seed", range(8))
def test_the_ranking_is_that_of_the_formula(seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [rng.choice(WORDS, size=rng.integers(1, 30)).tolist() for _ in range(20)]
    queries = [rng.choice(WORDS, size=rng.integers(1, 5), replace=False).tolist() for _ in range(9)]
    index = Index([" ".join(d) for d in documents])
    for query, found in zip(queries, index.search(list(map(" ".join, queries)), 6), strict=True):
        exact = bm25(documents, query)
        best = sorted((s for s in exact if s > 0), reverse=True)[:6]
        assert len(set(found)) == len(found) == len(best)
        # Of equal texts either may come first, so scores are compared and not places.
        np.testing.assert_allclose([exact[i] for i in found], best, rtol=1e-5)


def test_words_are_found_in_any_case_and_without_their_punctuation() -> None:
    index = Index(["The APPLE, of course.", "a brick", "clouds"])
    assert index.search(["Apple?", "brick!", "cloud", "CLOUDS"], 3) == [[0], [1], [], [2]]


def test_a_query_without_a_known_word_finds_nothing() -> None:
    index = Index(["an apple", "the brick"])
    assert index.search(["", "  ", "!?", "the", "how do I", "zebra", "\ud800", "brick"], 2) == [
        *[[]] * 7,
        [1],
    ]
    assert Index(["!!!", "the"]).search(["the", "!!!"], 2) == [[], []]
    assert index.search([], 2) == []


def test_cjk_characters_are_words() -> None:
    index = Index(["東京は日本の首都です。", "大阪は大きい。", "Kyoto"])
    assert index.search(["首都", "大"], 1) == [[0], [1]]


def test_of_a_query_only_its_first_words_count() -> None:
    index = Index(["apple", "brick"])
    words = ["cloud"] * (QUERY_WORDS - 1)
    assert index.search([" ".join([*words, "apple"])], 1) == [[0]]
    assert index.search([" ".join([*words, "cloud", "apple"])], 1) == [[]]
    assert index.search(["apple " * 2**17], 1) == [[0]]


# --- what is asked and accepted ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "query"),
    [
        (" search: a refund", "a refund"),
        ("SEARCH : two\nlines ", "two\nlines"),
        ("Search:", ""),
        ("search a refund", None),
        ("I search: it", None),
        ("research: it", None),
        ("", None),
        (":", None),
    ],
)
def test_what_is_a_search(action: str, query: str | None) -> None:
    assert query_of(action) == query


LONG = "One two three four five six seven eight."


@pytest.mark.parametrize(
    ("answer", "accepted"),
    [
        (f"{LONG} More.", LONG),
        (f"Yes. {LONG} More.", f"Yes. {LONG}"),
        ("Too short. By far.", "Too short. By far."),
        (
            "Yes.\nOne two three\nfour five six seven. More.",
            "Yes. One two three four five six seven.",
        ),
        (f"- {LONG}\n- And more.", LONG),
        (
            "See e.g. version 3.5 of it, i.e. of that. Or not.",
            "See e.g. version 3.5 of it, i.e. of that.",
        ),
        ("word " * 40, " ".join(["word"] * 24)),
        ("東京は日本の首都です。大きいです。", "東京は日本の首都です。"),
    ],
    ids=str,
)
def test_the_first_sentences_of_an_answer_are_accepted(answer: str, accepted: str) -> None:
    assert reference(answer) == accepted


def test_words_are_cut_where_they_end() -> None:
    assert beginning(" One,  two\nthree ", 2) == "One, two"
    assert beginning("東京 is 大きい", 3) == "東京 is"
    assert beginning(" ", 3) == ""


def test_a_customer_goes_on_with_the_next_questions_of_the_topic() -> None:
    faqs = [FAQ(f"{t}{i}", t, f"q{i}", "a", f"u{t}{i}") for i in range(4) for t in ("x", "y")]
    faqs += [FAQ("z0", "z", "q", "a", "u"), FAQ("none", "", "q", "a", "alone")]
    found = {c.id: c for c in customers(faqs, "test")}
    assert list(found) == [f.id for f in faqs]
    asked = {id: [f.id for f in c.questions] for id, c in found.items()}
    assert asked["x0"] == ["x0", "x1", "x2"]
    assert asked["x3"] == ["x3", "x0", "x1"]
    assert asked["y2"] == ["y2", "y3", "y0"]
    assert asked["z0"] == ["z0"]
    assert asked["none"] == ["none"]
    assert {c.unit for c in found.values()} == {"x (test)", "y (test)", "z (test)", "alone"}


# --- the embedded set ----------------------------------------------------------------------------


def test_a_passage_holds_the_accepted_answer_and_not_the_question() -> None:
    for faq in load_faqs(split="all").records:
        passage = beginning(faq.answer, PASSAGE_WORDS)
        assert reference(faq.answer) in passage
        assert faq.question.lower() not in passage.lower()
        assert len(reference(faq.answer).split()) <= REFERENCE_WORDS[-1]


@pytest.mark.parametrize("split", SPLITS)
def test_how_often_the_search_finds_the_answer(split: str) -> None:
    """What the class says of it: half of the cases at the first place, two thirds in three."""
    task = CustomerService(split=split)  # type: ignore[arg-type]
    faqs = [c.questions[0] for c in task.examples]
    found = task.index.search([faq.question for faq in faqs], 3)
    shown = [[task.passages[place] for place in places] for places in found]
    right = [
        beginning(faq.answer, PASSAGE_WORDS) in passages
        for faq, passages in zip(faqs, shown, strict=True)
    ]
    first = [
        beginning(faq.answer, PASSAGE_WORDS) in passages[:1]
        for faq, passages in zip(faqs, shown, strict=True)
    ]
    assert 0.45 < np.mean(first) < 0.55
    assert 0.62 < np.mean(right) < 0.72


def test_training_knows_no_answer_of_another_split() -> None:
    tasks = {split: CustomerService(split=split) for split in SPLITS}  # type: ignore[arg-type]
    own = {
        split: {beginning(c.questions[0].answer, PASSAGE_WORDS) for c in task.examples}
        for split, task in tasks.items()
    }
    for split, task in tasks.items():
        assert set(task.passages) == own["train"] | own[split]
        assert task.index.size == len(task.passages)
    assert not own["train"] & (own["validation"] | own["test"])
    assert not own["validation"] & own["test"]


def test_a_training_observation_shows_no_test_answer() -> None:
    """Searching for every question of test, word by word, where policies train."""
    told = {reference(faq.answer) for faq in load_faqs(split="test").records}
    envs = TextVectorEnv(37, CustomerService(split="train"))
    questions = [faq.question for faq in load_faqs(split="test").records]
    assert len(questions) == 74
    for half in (questions[:37], questions[37:]):
        envs.reset(seed=0)
        observations = envs.step([f"search: {question}" for question in half])[0]
        assert all("\nUser: 1. " in o or NOTHING_FOUND in o for o in observations)
        assert not [t for t in told for o in observations if t in o]


def test_the_index_is_built_once_for_all_environments() -> None:
    first, second = (gym.make(ID, split="test").unwrapped.task for _ in range(2))
    assert first is not second
    assert first.index is second.index
    assert first.index is not gym.make(ID, split="validation").unwrapped.task.index


# --- an episode ----------------------------------------------------------------------------------


def test_a_search_costs_shows_passages_and_is_not_scored(path: Path) -> None:
    env = begun(path, search_cost=0.25, reward_range=(0.0, 1.0))
    before, references = env.episode.observation, env.references
    after, reward, terminated, _, info = env.step(" search: refund, bank or parcels?")
    assert reward == -0.25
    assert not terminated
    assert info["feedback"] == (
        "1. A refund reaches your bank within five working days.\n"
        "2. Yes, parcels are taken back for thirty days. Keep the receipt."
    )
    assert not [key for key in info if key.startswith("score")]
    assert info["turn"] == 1
    assert info["messages"][-1] == {"role": "user", "content": info["feedback"]}
    assert (
        after == f"{before} search: refund, bank or parcels?\nUser: {info['feedback']}\nAssistant:"
    )
    assert env.references == references == ("A refund reaches your bank within five working days.",)


def test_passages_are_as_many_as_asked_for(path: Path) -> None:
    query = "search: refund parcels broken goods"
    lengths = []
    for most in (1, 2, 9):
        info = begun(path, passages=most).step(query)[-1]
        lengths.append(len(info["feedback"].split("\n")))
    assert lengths == [1, 2, 3]
    assert begun(path).step("search: zebra")[-1]["feedback"] == NOTHING_FOUND
    assert begun(path).step("search:")[-1]["feedback"] == NOTHING_FOUND


@pytest.mark.parametrize("most", [0, 1, 2, 5])
def test_after_the_most_searches_one_is_scored_as_an_answer(path: Path, most: int) -> None:
    env = begun(path, max_searches=most)
    action = "search: A refund reaches your bank"
    for _ in range(2):  # the count begins anew with each question
        for _ in range(most):
            assert "score" not in env.step(action)[-1]
        accepted = env.references
        *_, terminated, _, info = env.step(action)
        assert info["score"] == rouge(action, accepted).mean
    assert terminated
    assert info["turn"] == 2 * (most + 1)


def test_the_policy_is_told_of_the_search_where_there_is_one(path: Path) -> None:
    assert begun(path).episode.observation == (
        "User: I have questions on returns. Answer each in a sentence. To look something up first, "
        'write "search:" and what to look for.\nWhen will you refund me?\nAssistant:'
    )
    assert begun(path, max_searches=0).episode.observation == (
        "User: I have questions on returns. Answer each in a sentence.\nWhen will you refund me?\n"
        "Assistant:"
    )
    hours = make(path, "validation").reset()[0]
    assert hours.startswith("User: I have questions. Answer")


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("A refund reaches your bank within five working days.", THANKS),
        ("a refund reaches your bank within a week", THANKS),
        ("I do not know your refund.", NO_HELP),
        ("", NO_HELP),
    ],
)
def test_the_customer_says_whether_it_helped_and_asks_on(
    path: Path, answer: str, reply: str
) -> None:
    env = begun(path)
    observation, reward, _, _, info = env.step(answer)
    expected = rouge(answer, ["A refund reaches your bank within five working days."])
    assert info["score"] == expected.mean
    assert info["score/rouge_1"] == expected.rouge_1
    assert info["score/rouge_2"] == expected.rouge_2
    assert info["score/rouge_l"] == expected.rouge_l
    assert reward == 2 * expected.mean - 1
    assert info["feedback"] == reply
    assert (reply == THANKS) == (expected.mean >= 0.5)
    assert observation.endswith(f"\nUser: {reply} It arrived in pieces. What now?\nAssistant:")
    *_, terminated, _, info = env.step(
        "Broken goods are replaced at once, please send us a picture."
    )
    assert terminated
    assert info["messages"][-1]["content"] == THANKS
    assert env.references == ()
    assert env.demonstration is None


def test_max_turns_counts_questions(path: Path) -> None:
    env = begun(path, max_turns=1)
    assert env.step("search: bank")[2] is False
    assert env.step("no idea")[2] is True


def test_a_batch_is_scored_as_its_rows_and_searched_at_once(path: Path) -> None:
    actions = ["search: bank", "your bank", "search: pieces of goods", "", "search: x", "search"]
    task = make(path).task
    envs = TextVectorEnv(len(actions), task)
    calls: list[int] = []
    task.index = copy.copy(task.index)  # the index itself is shared by all tests
    search = task.index.search
    task.index.search = lambda queries, most: calls.append(len(queries)) or search(queries, most)
    envs.reset(seed=0, options={"example": "money"})
    _, rewards, _, _, infos = envs.step(actions)
    assert calls == [3]
    for action, reward, info in zip(actions, rewards, step_infos(infos, len(actions)), strict=True):
        _, expected, _, _, alone = begun(path).step(action)
        assert reward == expected
        assert info == alone


def test_the_demonstration_searches_and_then_answers(path: Path) -> None:
    env = begun(path)
    said, rewards = [], []
    while not env.episode.finished:
        said.append(env.demonstration)
        rewards.append(env.step(said[-1])[1])
    assert said == [
        "search: When will you refund me?",
        "A refund reaches your bank within five working days.",
        "search: It arrived in pieces. What now?",
        "Broken goods are replaced at once, please send us a picture.",
    ]
    assert rewards == [-0.05, 1.0, -0.05, 1.0]
    assert begun(path, max_searches=0).demonstration == said[1]
    assert begun(path, max_searches=3).demonstration == said[0]


def test_the_heuristic_searches_and_answers_with_the_first_passage(path: Path) -> None:
    env = begun(path)
    observation = env.episode.observation
    said = []
    while not env.episode.finished:
        said.append(search_then_lead(observation))
        observation, *_ = env.step(said[-1])
    assert said == [
        "search: When will you refund me?",
        "A refund reaches your bank within five working days.",
        "search: It arrived in pieces. What now?",
        "Nothing was found.",
    ]


def test_corrupted_feedback_lets_the_cost_of_a_search_pass(path: Path) -> None:
    for corruption in ({"flip": 1.0}, {"bias": 1.0}, {"noise": 1.0}, {"missing": 1.0}):
        env = CorruptedFeedback(make(path), **corruption)
        env.reset(seed=0)
        _, reward, _, _, info = env.step("search: bank")
        assert reward == info["clean_reward"] == -0.05
        assert info["feedback_missing"] is False


# --- arguments and files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"search_cost": -0.1}, ValueError, "search_cost is -0.1. Give a finite number from 0"),
        ({"search_cost": math.inf}, ValueError, "search_cost is inf"),
        ({"search_cost": math.nan}, ValueError, "search_cost is nan"),
        ({"search_cost": "free"}, TypeError, "search_cost is 'free'. Give a number"),
        ({"search_cost": True}, TypeError, "search_cost is True"),
        ({"max_searches": -1}, ValueError, "max_searches is -1. Give a whole number from 0"),
        ({"max_searches": 1.5}, TypeError, "max_searches is 1.5"),
        ({"passages": 0}, ValueError, "passages is 0. Give a whole number from 1"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gym.make(ID, **arguments)


def test_a_file_needs_no_training_split(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"train"' not in line))
    assert make(path).task.passages == [RECORDS[1]["answer"], RECORDS[2]["answer"]]
    with pytest.raises(ValueError, match="no record is in the split 'train'"):
        make(path, "train")


def test_skipped_records_are_counted_where_the_environment_is(path: Path) -> None:
    path.write_text(path.read_text() + '{"id": "bad", "question": "Why?"}\n')
    with pytest.raises(ValueError, match=r"faqs\.jsonl, line 5: field 'answer' is missing"):
        make(path)
    with pytest.warns(UserWarning, match="skipped 1 bad of 5 records"):
        assert make(path, skip_bad_records=True).task.skipped == 1
