"""A person plays in the terminal: every environment, commands, mistakes, and ends."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from rich.console import Console

import llm_envs
from llm_envs import play


def run(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm_envs.play", *arguments],
        input=said,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


class Main:
    """The command, run in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str, said: str | io.StringIO = "") -> tuple[int, str, str]:
        """Give the exit code, and what was printed on the two streams."""
        typed = io.StringIO(said) if isinstance(said, str) else said
        self.monkeypatch.setattr(sys, "stdin", typed)
        code: Any = 0
        try:
            play.main(arguments)
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            pytest.fail("Ctrl-C came through.")
        return code, *self.capsys.readouterr()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    return Main(monkeypatch, capsys)


def played(monkeypatch: pytest.MonkeyPatch, env: Any, *lines: str, **reset: Any) -> tuple[str, Any]:
    """Play one episode in this process; give what was printed and the score, or None."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    console = Console(file=io.StringIO(), width=200, highlight=False)
    try:
        score = play.play_episode(env, console, **reset)
    except play.Quit:
        score = None
    return console.file.getvalue(), score  # type: ignore[attr-defined]


class Recorded(gym.Wrapper[Any, Any, Any, Any]):
    """Remembers what was done and what it earned."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.actions: list[Any] = []
        self.scores: list[Any] = []

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.actions.append(action)
        self.scores.append(result[4].get("score"))
        return result


@pytest.mark.parametrize("env_id", llm_envs.registered_ids())
def test_every_environment_is_played_from_a_pipe(env_id: str) -> None:
    done = run(env_id, "--seed", "3", "--episodes", "1", said="1\n" * 60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "user: " in done.stdout
    assert "reward " in done.stdout
    assert "score of the episode: " in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 episode, mean score ")


def test_right_answers_earn_the_reward_and_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Recorded(gym.make("DialogueQA-v0", split="validation"))
    env.reset(seed=5)
    turns = env.unwrapped.episode.example.turns  # type: ignore[attr-defined]
    answers = [turn.answers[0] for turn in turns]
    printed, score = played(monkeypatch, env, *answers[:-1], "no idea", seed=5)
    assert env.actions == [*answers[:-1], "no idea"]
    assert score == pytest.approx(np.mean(env.scores))
    assert printed.count("reward +1.00  score 1.00 (f1 1.00, exact_match 1.00)") == len(turns) - 1
    assert printed.count("reward -1.00  score 0.00") == 1
    for turn in turns:
        assert turn.question in printed
    assert printed.count("user: ") == len(turns) + 1, "each message is shown once"
    table = printed.splitlines()[-4 - len(turns) + 2 :]
    assert any("no idea" in line and answers[-1] in line for line in table)
    assert f"score of the episode: {score:.2f}" in printed


def test_candidates_are_numbered_and_bad_numbers_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = Recorded(gym.make("RecommendationClicks-v0"))
    observation, _ = env.reset(seed=2)
    lines = ["0", "6", "two", "", "٥x", "2", " 5 "]
    printed, score = played(monkeypatch, env, *lines, seed=2)
    assert score is None  # the input ended within the episode
    assert env.actions == [1, 4]
    for number, candidate in enumerate(observation["candidates"], start=1):
        assert f"  {number}  {candidate.strip()}\n" in printed
    assert printed.count("is no candidate. Give a number from 1 to 5") == 5
    assert printed.count("\nreward ") == 2
    assert "best possible" in printed
    assert "accepted" in printed  # what was played is reviewed all the same


@pytest.mark.parametrize("env_id", ["DialogueQA-v0", "RecommendationClicks-v0"])
def test_a_hint_helps_and_tells_nothing(monkeypatch: pytest.MonkeyPatch, env_id: str) -> None:
    for seed in range(20):
        env = Recorded(gym.make(env_id))
        observation, _ = env.reset(seed=seed)
        printed, _ = played(monkeypatch, env, ":hint", ":quit", "1", seed=seed)
        assert env.actions == []
        [said] = [line for line in printed.splitlines() if "hint" in line or "mistake" in line
                  or "begins with" in line if line != "> " and ":hint" not in line]  # fmt: skip
        if isinstance(observation, str):
            [*words] = env.unwrapped.references[0].split()  # type: ignore[attr-defined]
            assert f"{len(words)} word" in said
            assert said.endswith(f"begins with {words[0][0]!r}.")
        elif "mistake" in said:
            scores = env.unwrapped.candidate_scores  # type: ignore[attr-defined]
            assert scores[int(said.split()[0]) - 1] == min(scores) < max(scores)


def test_a_misspelt_command_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    env = Recorded(gym.make("Summarization-v0"))
    printed, score = played(monkeypatch, env, ":hnit", ":", " :-) [red]\x1b[31m", seed=1)
    assert "There is no command ':hnit'. Did you mean ':hint'? Use :hint or :quit." in printed
    assert env.actions == [" :-) [red]\x1b[31m"]
    assert score == 0.0
    assert ":-) [red]\\x1b[31m" in printed, "markup and escapes are shown, not obeyed"
    assert "\x1b" not in printed


def test_episodes_go_on_until_the_input_ends_and_the_seed_decides_them(main: Main) -> None:
    code, out, _ = main("Summarization-v0", "--seed", "1", said="a\nb\nc\n")
    assert code == 0
    assert out.count("score of the episode: ") == 3
    assert out.splitlines()[-1].startswith("3 episodes, mean score 0.0")
    assert len({line for line in out.splitlines() if line.startswith("───")}) == 4
    assert main("Summarization-v0", "--seed", "1", said="a\nb\nc\n")[1] == out
    assert main("Summarization-v0", "--seed", "2", said="a\nb\nc\n")[1] != out


def test_arguments_reach_the_environment(main: Main) -> None:
    kwargs = '{"max_turns": 1, "reward_range": [0, 5], "split": "test"}'
    arguments = ("DialogueQA-v0", "--env-kwargs", kwargs, "--episodes", "2")
    code, out, _ = main(*arguments, said="x\n" * 5)
    assert code == 0
    assert out.count("reward +0.00  score 0.00") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DialogQA"], "no environment 'DialogQA'. Did you mean 'DialogueQA-v0'? There are: "),
        (["no_such_module:DialogueQA-v0"], "No module named 'no_such_module'"),
        (["DialogueQA-v0", "--env-kwargs", "{"], "--env-kwargs is not JSON"),
        (["DialogueQA-v0", "--env-kwargs", '{"turns": 1}'], "no argument 'turns'"),
        (["DialogueQA-v0", "--env-kwargs", '{"dataset": "x"}'], "neither an embedded set"),
        (["DialogueQA-v0", "--episodes", "0"], "--episodes is 0; it has to be 1 or more"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(main: Main, arguments: list[str], message: str) -> None:
    code, out, err = main(*arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys\nfrom llm_envs import play\n"
        "try:\n    play.main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'agents', 'wandb'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--env-kwargs" in done.stdout


class Interrupted(io.StringIO):
    """Input in whose end somebody presses Ctrl-C."""

    def readline(self, size: int | None = -1) -> str:
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


def test_ctrl_c_ends_cleanly(main: Main) -> None:
    code, out, err = main("Summarization-v0", said=Interrupted("a\n"))
    assert code == 0
    assert err == ""
    assert out.splitlines()[-1].startswith("1 episode, mean score ")


def test_an_environment_of_ones_own_is_imported_first(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import llm_envs\n"
        "from llm_envs.tasks.summarization import Summarization\n"
        "llm_envs.register('Mine-v0', Summarization)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "llm_envs.play", "mine:Mine-v0", "--episodes", "1"],
        input="a\n",
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert "score of the episode: " in done.stdout
