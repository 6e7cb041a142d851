"""The command that does a failed update again: its help, and what it says of damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents import replay
from agents.batches import write_batch
from three_tokens import make_agent

pytestmark = pytest.mark.usefixtures("three_token_tasks")


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["some/folder", "--help"]])
def test_help_is_no_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    replay.main(words)  # it returns, so the process ends with 0
    said = capsys.readouterr()
    assert "python -m agents.replay RUN/failed" in said.out
    assert said.err == ""


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """An update as a run that failed leaves it, here of an agent that could go on."""
    make_agent().save(tmp_path / "agent")
    write_batch(None, tmp_path)
    return tmp_path


def test_a_damaged_update_is_told_in_a_sentence(failed: Path) -> None:
    replay.failed_update(failed, device="cpu")
    state = failed / "agent" / "state.json"
    held = json.loads(state.read_text())
    weights = failed / "agent" / "policy" / "model.safetensors"
    for path, content in (
        (state, b"{}"),
        (state, b"{"),
        (state, json.dumps({k: v for k, v in held.items() if k != "seed"}).encode()),
        (weights, weights.read_bytes()[:100]),
        (failed / "agent" / "state.safetensors", b""),
        (failed / "batch.safetensors", b""),
        (failed / "batch.json", b'{"$": "Nonsense"}'),
    ):
        whole = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=r"is damaged|could be loaded from") as stopped:
            replay.main([str(failed)])
        assert str(failed) in str(stopped.value)
        path.write_bytes(whole)
    (failed / "batch.json").unlink()
    with pytest.raises(SystemExit, match=r"batch\.json"):
        replay.main([str(failed)])


def test_an_agent_whose_package_is_missing_names_it(
    failed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name} needs a package. Install it.")

    monkeypatch.setattr(replay, "agent_class", missing)
    with pytest.raises(SystemExit, match="reinforce needs a package"):
        replay.main([str(failed)])
