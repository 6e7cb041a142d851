"""What a rollout earned, as every agent logs it."""

import math
from typing import Any

import pytest
import torch

from agents.registry import agent_class
from agents.rollout import collect, earned, episode_seeds, merge, play
from agents.tracking import METRICS

NAN = math.nan


def test_regret_is_what_the_best_choice_had_earned_more() -> None:
    found = earned([1.0, -1.0, 0.0, 1.0], [1.0, 0.0, NAN, 0.5], [1.0, 1.0, NAN, NAN])
    assert found == {
        "rollout/reward": pytest.approx(0.25),
        "rollout/score": pytest.approx(0.5),  # of the three scored steps
        "rollout/regret": pytest.approx(0.5),  # of the two whose best score is known
    }
    assert found.keys() < METRICS.keys()


def test_no_best_score_no_regret() -> None:
    assert earned([0.5, 1.5], [NAN, 1.0], [NAN, NAN]) == {
        "rollout/reward": 1.0,
        "rollout/score": 1.0,
    }
    assert earned([0.5], [NAN], [NAN]) == {"rollout/reward": 0.5, "rollout/score": 0.0}


SMALL: dict[str, dict[str, Any]] = {
    "reinforce": {"prompts": 2, "group_size": 2, "eval_every": 0},
    "linucb": {"episodes": 4, "eval_every": 0},
    "sb3-ppo": {"n_envs": 4, "eval_every": 0},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_agent_logs_the_regret_of_choices(name: str) -> None:
    cls: Any = agent_class(name)
    agent = cls(
        cls.config_class.default_policy,
        "RecommendationClicks-v0",
        seed=1,
        device="cpu",
        **SMALL[name],
    )
    found = agent.iterate()
    # A click is worth 1: the best scores are 0 or 1, and so is the regret of each choice.
    assert 0 < found["rollout/regret"] <= 1 - found["rollout/score"]


def test_writing_tasks_have_no_regret() -> None:
    cls: Any = agent_class("random")
    agent = cls("none", "DialogueQA-v0", seed=1, episodes=4)
    assert "rollout/regret" not in agent.iterate()


def test_rollouts_keep_the_best_scores_of_their_steps() -> None:
    cls: Any = agent_class("reinforce")
    agent = cls("tiny", "RecommendationClicks-v0", seed=2, device="cpu", **SMALL["reinforce"])
    seeds = episode_seeds(2, 0, 2, 2)
    rollout = collect(agent.player(False), agent.envs, seeds=seeds)
    assert rollout.best_scores.shape == rollout.scores.shape
    assert (rollout.best_scores >= rollout.scores).all()
    both = merge([rollout, rollout])
    assert torch.equal(both.best_scores, torch.cat([rollout.best_scores] * 2))
    steps = play(agent.player(True), agent.envs, seeds=seeds)
    assert all("best_score" in step.info for step in steps)
