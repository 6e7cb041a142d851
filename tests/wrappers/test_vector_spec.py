"""Vector environments that were wrapped are made again from their spec."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

import llm_envs  # noqa: F401 (its ids)
from llm_envs.wrappers import (
    AugmentedVectorText,
    CorruptedVectorFeedback,
    TimeVectorBudget,
    TokenVectorBudget,
)
from same import assert_same

WRAPPED: dict[str, Any] = {
    "text": lambda e: AugmentedVectorText(e, typos=0.5),
    "tokens": lambda e: TokenVectorBudget(e, tokens=5),
    "both budgets": lambda e: TimeVectorBudget(TokenVectorBudget(e, tokens=5), seconds=1e6),
    "feedback": lambda e: CorruptedVectorFeedback(e, flip=1.0, noise=0.5),
    "all": lambda e: CorruptedVectorFeedback(
        TokenVectorBudget(AugmentedVectorText(e, typos=0.5), tokens=5), flip=1.0
    ),
}


def names(envs: Any) -> list[str]:
    found = []
    while envs is not envs.unwrapped:
        found.append(type(envs).__name__)
        envs = envs.env
    return found


def play(envs: Any) -> list[Any]:
    seen = [envs.reset(seed=3)]
    return seen + [envs.step(["the a word", "unknown is it"]) for _ in range(6)]


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_spec_makes_the_same_environments_again(wrap: Any) -> None:
    envs = wrap(gym.make_vec("DialogueQA-v0", 2, max_turns=3))
    again = gym.make_vec(envs.spec)
    assert names(again) == names(envs) != []
    assert_same(play(again), play(envs))
    once_more = gym.make_vec(again.spec)
    assert once_more.spec == again.spec
    assert names(once_more) == names(envs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda: CorruptedVectorFeedback(
            CorruptedVectorFeedback(gym.make_vec("DialogueQA-v0", 2), flip=1.0), flip=1.0
        ),
        lambda: CorruptedVectorFeedback(
            gym.make_vec("DialogueQA-v0", 2, feedback={"bias": 0.1}), flip=1.0
        ),
        lambda: TokenVectorBudget(
            TimeVectorBudget(gym.make_vec("DialogueQA-v0", 2), seconds=1.0), tokens=5
        ),
        lambda: TimeVectorBudget(gym.make_vec("DialogueQA-v0", 2), seconds=1.0, clock=lambda: 0.0),
        lambda: CorruptedVectorFeedback(
            gym.make_vec("DialogueQA-v0", 2, vectorization_mode="sync"), flip=1.0
        ),
        lambda: CorruptedVectorFeedback(
            gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("DialogueQA-v0", 2)), flip=1.0
        ),
    ],
    ids=["twice", "beside the argument", "order", "clock", "other form", "other wrapper"],
)
def test_what_no_arguments_make_has_no_spec(wrap: Any) -> None:
    assert wrap().spec is None
