"""Transcripts: everything is shown, nothing that a terminal obeys, and no sink breaks."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_envs
from installed import playable_ids
from llm_envs.core.rendering import printable, transcript

COLOUR = re.compile("\033\\[\\d+m")
TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "That's right. And then?"},
    {"role": "assistant", "content": "search"},
    {"role": "user", "content": "Found."},
    {"role": "assistant", "content": "Rome"},
]


@given(st.text(st.characters()))
def test_printable_text_holds_nothing_that_a_terminal_obeys_or_a_file_refuses(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in shown if c not in "\n\t")
    if text.replace("\n", "").isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb\x00", "a\\rb\\x00"),
        ("\x9b2J", "\\x9b2J"),
        ("\ud800", "\\ud800"),
        ("\u202eevil\u200b", "\\u202eevil\\u200b"),
        ("\U000e0041", "\\U000e0041"),
        ("naïve 東京 \U0001f642\n\tand so on", "naïve 東京 \U0001f642\n\tand so on"),
    ],
    ids=ascii,
)
def test_escapes_say_which_character_it_was(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_scores_stand_behind_the_answers_they_belong_to() -> None:
    assert transcript(TALK, [1.0, None, 0.256], colour=False).splitlines() == [
        "user: What is it?",
        "assistant: Paris  [1.00]",
        "user: That's right. And then?",
        "assistant: search",
        "user: Found.",
        "assistant: Rome  [0.26]",
    ]


def test_colours_mark_roles_and_add_nothing_else() -> None:
    coloured = transcript(TALK, [1.0, None, 0.256])
    assert COLOUR.sub("", coloured) == transcript(TALK, [1.0, None, 0.256], colour=False)
    names = re.findall("(\033\\[\\d+m)(user|assistant)\033\\[0m: ", coloured)
    assert len(names) == 6
    assert len(set(names)) == 2
    assert coloured.count("\033") == 2 * 6 + 2 * 2  # each of them ends: roles and two scores


def test_what_a_policy_writes_colours_nothing() -> None:
    written = [{"role": "assistant", "content": "\033[31mred\033[0m"}]
    assert transcript(written, []).count("\033") == 2  # those of the role


@pytest.mark.parametrize("id", playable_ids())
def test_human_mode_prints_what_ansi_mode_returns_bit_by_bit(
    id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    human, ansi = (gym.make(id, render_mode=mode) for mode in ("human", "ansi"))
    for seed in (1, 2):
        human.reset(seed=seed)
        ansi.reset(seed=seed)
        printed = capsys.readouterr().out
        ended = False
        while not ended:
            assert printed == f"{ansi.render()}\n"
            action = 0 if isinstance(human.action_space, gym.spaces.Discrete) else " no"
            ended = human.step(action)[2]
            ansi.step(action)
            printed += capsys.readouterr().out
        assert printed == f"{ansi.render()}\n"
        assert re.search(r"\[[01]\.\d\d\]", printed)
        assert human.render() is None
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "gbk", "utf-8"])
def test_human_mode_prints_to_streams_of_any_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    env = gym.make("DialogueQA-v0", render_mode="human")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        env.reset(seed=0)
        env.step(" é 東京 \U0001f642 \ud800 \x1b[2J")
        stream.flush()
    shown = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "\\ud800" in shown
    assert "\\x1b[2J" in shown
    assert ("東京" if encoding in ("gbk", "utf-8") else "\\u6771\\u4eac") in shown


def test_human_mode_survives_the_c_locale() -> None:
    program = (
        "import gymnasium as gym\n"
        "env = gym.make('llm_envs:DialogueQA-v0', render_mode='human')\n"
        "env.reset(seed=0)\n"
        "env.step(' \\u6771\\ud800')\n"
    )
    root = str(Path(llm_envs.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": root, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u6771\\ud800" in done.stdout


def test_no_mode_renders_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make("DialogueQA-v0").unwrapped
    env.reset(seed=0)
    env.step("")
    assert env.render() is None
    assert capsys.readouterr().out == ""
