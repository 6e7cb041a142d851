"""W&B sweeps: what ``wandb agent`` would start is what the command line takes."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from agents import arguments
from agents.settings import SETTINGS
from agents.tracking import METRICS
from benchmarks import search
from benchmarks.search import RANGES, SEARCHED, Options, main, sweep_of

ENVS = {
    "linucb": "RecommendationClicks-v0",
    "thompson": "RecommendationClicks-v0",
    "sb3-dqn": "RecommendationClicks-v0",
}
AGENTS = [agent for agent, names in SEARCHED.items() if names]


def env_of(agent: str) -> str:
    return ENVS.get(agent, "DialogueQA-v0")


def drawn(parameter: dict[str, Any], r: random.Random) -> Any:
    """Draw a value as W&B does."""
    if "values" in parameter:
        return r.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    assert 0 < low < high
    if parameter["distribution"] == "log_uniform_values":
        return math.exp(r.uniform(math.log(low), math.log(high)))
    assert parameter["distribution"] == "uniform"
    return r.uniform(low, high)


def started(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Give the words of the process that ``wandb agent`` starts, by W&B's own functions."""
    macros = wandb_sweeps.create_sweep_command_args(
        {"args": {name: {"value": value} for name, value in values.items()}}
    )
    macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
    words: list[str] = []
    for word in wandb_sweeps.create_sweep_command(list(sweep["command"])):
        words += macros[word[2:-1]] if word.startswith("${") else [word]
    return words


@pytest.fixture(scope="module", params=AGENTS)
def sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The sweep of an agent, read back from its file as ``wandb sweep`` reads it."""
    path = tmp_path_factory.mktemp("sweeps") / "sweep.yaml"
    agent = request.param
    with pytest.MonkeyPatch.context() as patch:
        argv = ["search", "--agent", agent, "--env", env_of(agent), "--steps", "512"]
        patch.setattr(sys, "argv", [*argv, "--out", str(path), "--project", "p"])
        main()
    return agent, wandb_sweeps.load_sweep_config(str(path))


def test_the_command_line_takes_whatever_is_drawn(sweep: tuple[str, dict[str, Any]]) -> None:
    agent, config = sweep
    r = random.Random(0)
    for _ in range(2):
        values = {name: drawn(parameter, r) for name, parameter in config["parameters"].items()}
        words = started(config, values)
        assert words[:4] == ["/usr/bin/env", "python", "-m", "agents.train"]
        found = arguments.parse(words[4:])
        assert {name: getattr(found.settings, name) for name in values} == values
        assert (found.agent, found.env, found.steps) == (agent, env_of(agent), 512)
        assert found.report == "none"  # the test split is not tuned on
        assert "wandb" in found.track.split(",")


def test_the_smallest_and_largest_values_are_possible(sweep: tuple[str, dict[str, Any]]) -> None:
    _, config = sweep
    for end in (min, max):
        values = {
            name: end(p.get("values") or (p["min"], p["max"]))
            for name, p in config["parameters"].items()
        }
        arguments.parse(started(config, values)[4:])


def test_defaults_lie_within_the_ranges(sweep: tuple[str, dict[str, Any]]) -> None:
    agent, config = sweep
    settings = arguments.parse(["--agent", agent, "--env", env_of(agent)]).settings
    for name, parameter in config["parameters"].items():
        default = getattr(settings, name)
        if not default:
            continue  # off, or left to the family of the task
        if "values" in parameter:
            assert default in parameter["values"]
        else:
            assert parameter["min"] < default < parameter["max"]


def test_it_is_a_bayesian_search_for_the_best_validation_score(
    sweep: tuple[str, dict[str, Any]],
) -> None:
    _, config = sweep
    assert (config["method"], config["project"]) == ("bayes", "p")
    assert config["metric"] == {"name": "eval/score", "goal": "maximize"}
    assert config["metric"]["name"] in METRICS
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 4, "eta": 2}
    known = "name project program command method metric early_terminate parameters"
    assert config.keys() == set(known.split())  # W&B refuses any other


def test_every_agent_and_every_setting_is_known() -> None:
    assert SEARCHED.keys() == SETTINGS.keys()
    for agent, names in SEARCHED.items():
        fields = {f for f in vars(SETTINGS[agent]()) if f in RANGES}
        assert set(names) <= fields, agent
    assert set(RANGES) == {name for names in SEARCHED.values() for name in names}


def test_agents_of_stable_baselines3_are_searched_around_the_default_of_the_family() -> None:
    rates = {
        env: sweep_of(Options("sb3-ppo", env))["parameters"]["learning_rate"]
        for env in ("DialogueQA-v0", "RecommendationClicks-v0")
    }
    assert rates["DialogueQA-v0"] == search.log_uniform(6e-5, 6e-3)
    assert rates["RecommendationClicks-v0"] == search.log_uniform(1e-4, 1e-2)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--agent ppoo", ["'ppoo'", "ppo"]),
        ("--agent random", ["random has no settings to search", "reinforce"]),
        ("--env DialogQA-v0", ["'DialogQA-v0'", "Did you mean 'DialogueQA-v0'"]),
        ("--agent linucb", ["linucb cannot play DialogueQA-v0", "numeric features"]),
        ("--steps 0", ["steps is 0"]),
        ("--seed -1", ["seed is -1"]),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: str,
    told: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["search", *argv.split(), "--out", str(tmp_path / "s.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    said = f"{ended.value.code} {capsys.readouterr().err}"
    for words in told:
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("mine")
    monkeypatch.setattr(sys, "argv", ["search", "--out", str(path)])
    with pytest.raises(SystemExit, match="is there already"):
        main()
    assert path.read_text() == "mine"


def test_it_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    monkeypatch.setattr(sys, "argv", ["search", "--out", str(path), "--policy", "some/model"])
    main()
    said = capsys.readouterr().out
    assert f"wandb sweep {path}" in said
    assert "wandb agent ENTITY/llm-envs/ID" in said
    command = yaml.safe_load(path.read_text())["command"]
    assert command[command.index("--policy") + 1] == "some/model"
