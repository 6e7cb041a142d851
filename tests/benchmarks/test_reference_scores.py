"""Reference scores: players that need no model, on the episodes that every policy meets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_envs
from agents.baselines import RandomPlayer, random_span
from agents.evaluation import Evaluation, evaluate
from agents.rollout import play
from benchmarks import reference_scores
from benchmarks.reference_scores import (
    HEURISTICS,
    VARIANTS,
    Measured,
    OptimalPlayer,
    OraclePlayer,
    RulePlayer,
    expectation_table,
    lead_sentence,
    measure,
    most_similar_span,
    read_conversation,
    score_table,
    sentences,
)
from installed import playable_ids
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.datasets.splits import SPLITS
from llm_envs.scoring.qa import token_f1
from llm_envs.tasks import battle_rules
from llm_envs.tasks.recommendation_clicks import SIMULATED
from llm_envs.tasks.simulated_users import optimal_score

EPISODES = 24


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Evaluation]]:
    """All players on some validation episodes of every environment."""
    return {i: measure(i, "validation", episodes=EPISODES) for i in playable_ids()}


# --- players ----------------------------------------------------------------------------------


def test_every_registered_environment_has_a_heuristic() -> None:
    assert set(llm_envs.registered_ids()) <= set(HEURISTICS)


@pytest.mark.parametrize("env_id", ["DialogueQA-v0", "Summarization-v0", "CustomerService-v0"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_is_right_in_every_turn(env_id: str, split: Any) -> None:
    found = evaluate(OraclePlayer, env_id, split=split, episodes=EPISODES)
    assert len(found.transcripts) >= EPISODES
    assert {turn["score"] for turn in found.transcripts} == {1.0}
    assert found.score == 1.0
    assert found.ci95 == (1.0, 1.0)


@pytest.mark.parametrize("env_id", ["RecommendationClicks-v0", "TextBattle-v0"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_oracle_takes_the_best_candidate(env_id: str, split: Any) -> None:
    found = evaluate(OraclePlayer, env_id, split=split, episodes=EPISODES)
    np.testing.assert_array_equal(found.scores, found.parts["best"])
    np.testing.assert_array_equal(found.scores, found.parts["expected"])
    assert found.score < 1.0  # some steps offer nothing that would be clicked


@pytest.mark.parametrize("env_id", playable_ids())
def test_heuristics_lie_between_chance_and_the_oracle(
    measured: dict[str, dict[str, Evaluation]], env_id: str
) -> None:
    found = measured[env_id]
    assert len({e.ids for e in found.values()}) == 1
    _, low, _ = found["heuristic"].gain_over(found["random"])
    assert low > 0
    _, low, _ = found["oracle"].gain_over(found["heuristic"])
    assert low > 0


@pytest.mark.parametrize("env_id", playable_ids())
def test_scores_are_the_same_each_time_and_in_any_batch(
    measured: dict[str, dict[str, Evaluation]], env_id: str
) -> None:
    players = {
        "random": RandomPlayer,
        "heuristic": lambda: RulePlayer(HEURISTICS[env_id].rule),
        "oracle": OraclePlayer,
        "optimum": OptimalPlayer,
    }
    for name in measured[env_id]:
        again = evaluate(players[name], env_id, split="validation", episodes=EPISODES, batch=7)
        np.testing.assert_array_equal(again.scores, measured[env_id][name].scores)
        assert again.transcripts == measured[env_id][name].transcripts


@pytest.mark.parametrize("max_turns", [4, 15])
def test_the_optimum_of_simulated_sessions_is_exact(max_turns: int) -> None:
    """Its expected score is that of the plan; what it earned lies within 6 standard errors."""
    arguments = {"dataset": SIMULATED, "max_turns": max_turns}
    found = measure("RecommendationClicks-v0", "validation", episodes=30, env_kwargs=arguments)
    envs: Any = gym.make_vec(
        "RecommendationClicks-v0", num_envs=30, split="validation", **arguments
    )
    chosen = [int(i) for i in np.linspace(0, len(envs.task.examples) - 1, 30)]
    seeds = [int(np.random.SeedSequence((20_160_515, i)).generate_state(1)[0]) for i in chosen]
    envs.reset(seed=seeds, options={"example": chosen})
    exact = [optimal_score(episode.state.replies) for episode in envs.episodes]
    np.testing.assert_allclose(found["optimum"].parts["expected"], exact)
    expected = {name: e.part("expected") for name, e in found.items()}
    assert expected["random"] < expected["heuristic"] < expected["oracle"] < expected["optimum"]
    for e in found.values():
        assert abs(e.score - e.part("expected")) < 6 * 0.5 / np.sqrt(30 * max_turns)
    oracle = found["oracle"]  # it knows the probabilities, and foresees no click
    np.testing.assert_allclose(oracle.parts["expected"], oracle.parts["best"])
    assert oracle.score < 0.9


def test_the_optimum_is_the_oracle_where_clicks_are_on_record(
    measured: dict[str, dict[str, Evaluation]],
) -> None:
    found = measured["RecommendationClicks-v0"]
    np.testing.assert_array_equal(found["optimum"].scores, found["oracle"].scores)
    told = {"RecommendationClicks-v0", "TextBattle-v0"}
    assert {i for i in measured if "optimum" in measured[i]} == told & set(measured)


def test_the_optimum_of_battles_is_exact(measured: dict[str, dict[str, Evaluation]]) -> None:
    found = measured["TextBattle-v0"]["optimum"]
    foes = {foe.name: foe for foe in battle_rules.FOES}
    rules = battle_rules.DEFAULT_RULES
    exact = [battle_rules.optimal_score(rules, foes[i.split("/")[0]]) for i in found.ids]
    np.testing.assert_allclose(found.scores, exact, atol=1e-12)
    assert (found.scores >= measured["TextBattle-v0"]["oracle"].scores - 1e-12).all()


def test_seeds_of_the_random_player_differ() -> None:
    one, other = (
        evaluate(
            lambda seed=seed: RandomPlayer(seed), "DialogueQA-v0", split="validation", episodes=8
        )
        for seed in (0, 1)
    )
    same = sum(
        a["answer"] == b["answer"] for a, b in zip(one.transcripts, other.transcripts, strict=True)
    )
    assert same < len(one.transcripts) / 4


def test_random_choices_are_even() -> None:
    envs = gym.make_vec("RecommendationClicks-v0", num_envs=200, split="train")
    player = RandomPlayer()
    steps = play(player, envs, seeds=range(200))
    # 800 draws of 5: a count beyond 6 standard deviations of its mean has probability 1e-8.
    counts = np.bincount([s.action for s in steps], minlength=5)
    assert len(counts) == 5
    assert np.abs(counts - 160).max() < 6 * np.sqrt(800 * 0.2 * 0.8)
    first = np.bincount([s.action for s in steps if s.turn == 0], minlength=5)
    assert first.max() < 100  # the first prompt is always the same; the choice is not
    assert set(player.chosen_from) == {(s.row, s.turn) for s in steps}
    np.testing.assert_allclose(list(player.chosen_from.values()), 0.2)


@dataclass(frozen=True)
class Question:
    id: str
    answers: tuple[str, ...]

    @property
    def unit(self) -> str:
        return self.id


class Capitals(WritingTask[Question]):
    """Accepts two answers, the first of which earns nothing ("the" is no word of an answer)."""

    def __init__(self, split: str = "train", references: Sequence[str] = ("the", "Paris")) -> None:
        super().__init__()
        self.examples = (Question("france", tuple(references)),)

    def turns(self, example: Question) -> int:
        return 1

    def ask(self, example: Question, turn: int) -> str:
        return "What is the capital of France?"

    def answers(self, example: Question, turn: int) -> tuple[str, ...]:
        return example.answers

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(token_f1(a, r)) for a, r in zip(answers, references, strict=True)]


@pytest.fixture
def capitals() -> Iterator[str]:
    gym.register(
        "Capitals-v0",
        vector_entry_point="llm_envs.core.vector:TextVectorEnv",
        kwargs={"task": Capitals},
    )
    yield "Capitals-v0"
    del gym.registry["Capitals-v0"]


def test_the_oracle_finds_the_best_of_several_references(capitals: str) -> None:
    found = evaluate(OraclePlayer, capitals, split="test")
    assert found.transcripts[0]["answer"] == "Paris"
    assert found.score == 1.0


def test_the_oracle_says_where_there_is_none(capitals: str) -> None:
    with pytest.raises(ValueError, match="Capitals tells neither references nor candidate"):
        evaluate(OraclePlayer, capitals, split="test", env_kwargs={"references": ()})


def test_without_a_heuristic_the_column_is_empty(capitals: str) -> None:
    found = Measured(capitals, "test", measure(capitals, "test"))
    assert list(found.players) == ["random", "oracle"]
    table = score_table([found])
    header, (row,) = table.header, table.rows
    assert row[header.index("heuristic")] == row[header.index("optimum")] == "-"
    assert not expectation_table([found]).rows


# --- rules ------------------------------------------------------------------------------------

PASSAGE = (
    "Aland borders Beland. The capital of Aland is New Town. Old Harbour is the capital of Bela."
)
FIRST = f"User: {PASSAGE}\nWhat is the capital of Aland?\nAssistant:"


def test_a_conversation_is_read_as_the_environment_wrote_it() -> None:
    env = gym.make("DialogueQA-v0", split="validation")
    observation, info = env.reset(seed=3)
    over = False
    while not over:
        text, said = read_conversation(observation)
        contents = [m["content"] for m in info["messages"]]
        assert f"{text}\n{said[0]}" == contents[0]
        assert [s.strip() for s in said[1:]] == contents[1:]
        observation, _, over, _, info = env.step(" an answer\nof two lines ")


@pytest.mark.parametrize(
    ("observation", "span"),
    [
        (FIRST, "New Town"),
        # The other capital: its sentence shares as many words with "the capital of Bela".
        (FIRST.replace("of Aland?", "of Bela?"), "Old Harbour"),
        # A follow-up leans on the words before it, and what the user says to an answer is no
        # question, however much it is like a sentence.
        (f"{FIRST} x\nUser: The answer is New Town. And its capital?\nAssistant:", "New Town"),
        (f"{FIRST} x\nUser: The answer is New Town. What does it border?\nAssistant:", "Beland"),
        ("User: \n\nAssistant:", ""),
        ("", ""),
    ],
)
def test_most_similar_span(observation: str, span: str) -> None:
    assert most_similar_span(observation) == span


def test_lead_sentence_is_the_first_one() -> None:
    assert lead_sentence(FIRST) == "Aland borders Beland."
    assert lead_sentence("User: A title\nMore. Yet more.\nSummarize this.\nAssistant:") == "A title"
    assert sentences("One 1.5 e.g.x! Two?\n\n- three") == ["One 1.5 e.g.x!", "Two?", "- three"]


@given(st.text(), st.text(), st.lists(st.text(), max_size=3))
def test_rules_answer_anything(text: str, question: str, later: list[str]) -> None:
    observation = f"User: {text}\n{question}\nAssistant:"
    for message in later:
        observation += f" x\nUser: {message}\nAssistant:"
    for rule in (most_similar_span, lead_sentence):
        assert " ".join(rule(observation).split()) in " ".join(observation.split())


@given(st.text(alphabet="ab \n", max_size=30), st.integers(0, 1000))
def test_random_spans_are_short_and_from_the_conversation(text: str, seed: int) -> None:
    span = random_span(f"User: {text}\nAssistant:", random.Random(seed))
    assert len(span.split()) <= 3
    assert bool(span) == bool(text.split())
    assert span in " ".join(text.split())


def test_random_spans_are_of_every_length_and_place() -> None:
    rng = random.Random(0)
    spans = {random_span("User: a b c d\nAssistant:", rng) for _ in range(500)}
    assert spans == {"a", "b", "c", "d", "a b", "b c", "c d", "a b c", "b c d"}


# --- the command ------------------------------------------------------------------------------


def test_the_tables_tell_what_was_measured(measured: dict[str, dict[str, Evaluation]]) -> None:
    found = [Measured(env_id, "validation", players) for env_id, players in measured.items()]
    table = score_table(found)
    for (env_id, players), row in zip(measured.items(), table.rows, strict=True):
        cells = dict(zip(table.header, row, strict=True))
        assert cells["environment"] == env_id
        assert cells["episodes"] == str(EPISODES)
        for name, e in players.items():
            low, high = e.ci95
            assert cells[name] == f"{e.score:.3f} [{low:.3f}, {high:.3f}]"
            assert low <= e.score <= high
    table = expectation_table(found)
    choosing = ["RecommendationClicks-v0", "TextBattle-v0"]
    assert [row[0] for row in table.rows] == choosing
    for row in table.rows:
        cells = dict(zip(table.header, row, strict=True))
        # An oracle regrets nothing.
        assert cells["oracle: expected, regret"].endswith("0.000 [0.000, 0.000]")
        players = measured[row[0]]
        regret = players["random"].part("best") - players["random"].part("expected")
        assert f", {regret:.3f} [" in row[table.header.index("random: expected, regret")]


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = reference_scores.Arguments(
        env=("llm_envs/Summarization-v0",), split=("test",), episodes=4, markdown=True
    )
    reference_scores.main(arguments)
    printed = capsys.readouterr().out
    assert "| Summarization-v0 | test | 4 | 4 |" in printed
    assert "lead sentence" in printed
    assert "DialogueQA" not in printed


def test_the_command_plays_all_variants(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = reference_scores.Arguments(
        env=("RecommendationClicks-v0",), split=("validation",), episodes=2, markdown=True
    )
    reference_scores.main(arguments)
    rows = [line for line in capsys.readouterr().out.splitlines() if " | validation | 2 |" in line]
    names = [row.split("|")[1].strip() for row in rows]
    assert len(names) == len(VARIANTS["RecommendationClicks-v0"])
    assert names[0] == "RecommendationClicks-v0"
    assert names[-1] == "RecommendationClicks-v0 dataset=simulated max_turns=50"


def test_the_command_refuses_an_unknown_environment() -> None:
    with pytest.raises(SystemExit, match="Did you mean 'DialogueQA-v0'"):
        reference_scores.main(reference_scores.Arguments(env=("DialogQA-v0",)))
