"""What every agent of the registry has to be able to: go on, be repeated, and learn.

An agent that is registered and has no settings here fails the first test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from agents.registry import AGENTS, agent_class
from agents.rollout import collect
from agents.settings import SETTINGS
from three_tokens import make_agent, parameters

pytestmark = pytest.mark.usefixtures("three_token_tasks")


def test_the_command_line_knows_the_settings_of_every_agent() -> None:
    assert [*SETTINGS] == [*AGENTS]
    for name, settings in SETTINGS.items():
        assert agent_class(name).config_class is settings
        assert agent_class(name).name == name


# --- state -----------------------------------------------------------------------------------

RATE = {"learning_rate": 1e-2}
STATEFUL: dict[str, tuple[str, dict[str, Any]]] = {
    "reinforce": ("reinforce", {"baseline": "moving", "kl_coef": 0.1, "weight_decay": 0.01}),
    "reinforce, critic": ("reinforce", {"baseline": "critic", "gamma": 0.9, "entropy_coef": 0.1}),
    "rloo, adaptive KL": ("rloo", {"kl_coef": 0.2, "kl_target": 0.01, "kl_horizon": 100}),
    "ppo": ("ppo", {"gamma": 0.9, "minibatches": 3, "kl_coef": 0.1}),
    "grpo": ("grpo", {"std": True, "old_log_probs": "recomputed", "target_kl": 0.02}),
    "immediate-reward": (
        "immediate-reward",
        {"precondition": "adam", "anchor": "initial", "lam": 0.1, "loss_term": "broadcast"},
    ),
    "supervised": ("supervised", {"kl_coef": 0.1, "kl_target": 0.01, "group_size": 1}),
    "random": ("random", {"episodes": 8}),
    "linucb": ("linucb", {"episodes": 8}),
    "thompson": ("thompson", {"episodes": 8}),
}
DIALOGUES = {"letters": ("ab", "b", "aab")}


def playable(kinds: dict[str, Any]) -> list[Any]:
    """Every kind with a writing and a choosing task that its agent can play."""
    return [
        (kind, env)
        for kind, (name, _) in kinds.items()
        for env, family in (("Identity-v9", "writing"), ("Steps-v9", "choosing"))
        if family in agent_class(name).families
    ]


def make(kind: str, env: str, seed: int = 0, **more: Any) -> Any:
    name, settings = STATEFUL[kind]
    if name not in ("random", "linucb", "thompson"):
        settings = {**RATE, "dropout": 0.5, **settings}
        if env == "Identity-v9":
            # What is sampled is not the plain distribution: the reference has to know it, too.
            settings = {"temperature": 0.7, "top_k": 3, **settings}
    return make_agent(env, agent=name, seed=seed, env_kwargs=DIALOGUES, **settings, **more)


def iterate(agent: Any) -> dict[str, float]:
    """One update; its metrics, without what the clock decides."""
    return {k: v for k, v in agent.iterate().items() if not k.startswith("perf/")}


def everything_in(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint, but for what ``transformers`` notes of a tokenizer's origin."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if path.name != "tokenizer_config.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_registered_agent_is_tested_here() -> None:
    here = {
        name for name in AGENTS if not name.startswith("sb3-")
    }  # those have a file of their own
    assert {name for name, _ in STATEFUL.values()} == here
    assert {*SOLVERS, "random"} == here


@pytest.mark.parametrize(("kind", "env"), playable(STATEFUL))
def test_p24_a_resumed_run_equals_the_uninterrupted_one(
    tmp_path: Path, kind: str, env: str
) -> None:
    """To the last bit: metrics of later updates, and every file of a later checkpoint."""
    whole = make(kind, env)
    expected = [iterate(whole) for _ in range(4)]
    halved = make(kind, env)
    assert [iterate(halved) for _ in range(2)] == expected[:2]
    halved.save(tmp_path / "half")
    torch.manual_seed(12345)  # nothing may depend on the global generators
    resumed = type(halved).load(tmp_path / "half", device="cpu")
    assert (resumed.iteration, resumed.env_steps) == (halved.iteration, halved.env_steps)
    assert [iterate(resumed) for _ in range(2)] == expected[2:]
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    mine, its = everything_in(tmp_path / "resumed"), everything_in(tmp_path / "whole")
    assert mine.keys() == its.keys()
    assert [name for name in its if mine[name] != its[name]] == []
    make(kind, env).save(tmp_path / "new")
    new = everything_in(tmp_path / "new")
    learned = [name for name in its if name != "state.json" and its[name] != new[name]]
    assert learned or kind == "random"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("env", ["Identity-v9", "Steps-v9"])
def test_p24_a_resumed_run_computes_in_the_same_precision(
    tmp_path: Path, env: str, dtype: torch.dtype
) -> None:
    agent = make("rloo, adaptive KL", env, family="gpt2")
    agent.policy.model.to(dtype)
    agent.reference.model.to(dtype)
    agent.save(tmp_path / "half")
    resumed = type(agent).load(tmp_path / "half", device="cpu")
    assert resumed.policy.model.dtype == resumed.reference.model.dtype == dtype
    assert iterate(resumed) == iterate(agent)
    assert torch.equal(parameters(resumed), parameters(agent))


# Chance says the letter of an identity task: there is one word in all.
@pytest.mark.parametrize(
    ("kind", "env"), [c for c in playable(STATEFUL) if c != ("random", "Identity-v9")]
)
def test_p25_one_seed_twice_is_the_same_and_another_is_not(
    tmp_path: Path, kind: str, env: str
) -> None:
    found = []
    for place, seed in enumerate((3, 3, 4)):
        agent = make(kind, env, seed)
        metrics = [iterate(agent) for _ in range(2)]
        agent.save(tmp_path / str(place))
        files = everything_in(tmp_path / str(place))
        del files["state.json"]  # it tells the seed
        found.append((metrics, files))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    assert found[0][1] != found[2][1] or not found[0][1], "nothing is kept, or it differs"


@pytest.mark.parametrize("env", ["Bandit-v9", "Pick-v9"])
def test_p25_the_seed_decides_what_is_sampled_too(env: str) -> None:
    """And not the episodes alone: here all of them are made alike."""

    def sampled(seed: int) -> list[list[float]]:
        agent = make_agent(env, seed=seed)
        sequences = collect(agent.policy.begin(), agent.envs, seeds=[7] * 16).sequences
        return [list(s.log_probs) for s in sequences]

    assert sampled(3) == sampled(3) != sampled(4)


# --- learning --------------------------------------------------------------------------------

# (agent's settings, updates for each task)
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
TRAINED = {"learning_rate": 1e-2, "prompts": 8, "group_size": 16, "max_new_tokens": 2}
# Without the bonus a random network says one letter for good before it sees the prompt.
EXPLORING = {**TRAINED, "entropy_coef": 0.3}
ONE_STEP = {"Identity-v9": 20, "Bandit-v9": 6, "Pick-v9": 6}
TWO_STEPS = {"Identity-v9": 16, "Bandit-v9": 4, "Pick-v9": 4}
SOLVERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "reinforce": (EXPLORING, ONE_STEP),
    "rloo": (EXPLORING, ONE_STEP),
    "immediate-reward": (EXPLORING, ONE_STEP),
    "ppo": ({**EXPLORING, "epochs": 2, "minibatches": 1}, TWO_STEPS),
    "grpo": ({**EXPLORING, "epochs": 2, "minibatches": 1}, TWO_STEPS),
    "supervised": (
        {**TRAINED, "prompts": 32, "group_size": 1},
        {"Identity-v9": 15, "Bandit-v9": 8, "Pick-v9": 10},
    ),
    "linucb": ({"episodes": 8}, {"Pick-v9": 4}),
    "thompson": ({"episodes": 8}, {"Pick-v9": 4}),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "env"), [(name, env) for name, (_, tasks) in SOLVERS.items() for env in tasks]
)
def test_p28_it_solves_a_bandit_an_identity_task_and_a_choice(
    name: str, env: str, seed: int
) -> None:
    """Greedy, every example right."""
    settings, updates = SOLVERS[name]
    agent = make_agent(env, agent=name, seed=seed, **settings)
    agent.learn(updates[env] * agent.config.rows)
    assert agent.iteration == updates[env]
    assert agent.evaluate("validation").score == 1.0
