"""Packed runs: the report that can be made of them is the report of the runs themselves."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import pack
from benchmarks.experiment import Run
from benchmarks.report import markdown, report_of, shown_episodes, turns_of
from benchmarks.results import read
from fake_runs import write_run


def transcript(example: int, when: str) -> dict[str, object]:
    said = {"question": f"Question {example}?", "answer": f"{when} {example}", "score": 0.5}
    return {"example_id": str(example), "turn": 0, "when": when, **said}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    out = tmp_path / "study"
    for seed, after in ((1, 0.5), (2, 0.7)):
        run = Run("DialogueQA-v0", "reinforce", seed, 64)
        talk = [transcript(e, when) for when in ("before", "after") for e in range(20)]
        write_run(out, run, after=after, validations=[(0, 0.2), (64, after)], transcripts=talk)
    write_run(out, Run("DialogueQA-v0", "reinforce", 3, 64), taken=32)
    return out


def unpacked(archive: Path, where: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(where, filter="data")
    (folder,) = where.iterdir()
    return folder


def test_the_report_of_packed_runs_is_that_of_the_finished_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "study.tar.xz"
    monkeypatch.setattr(sys, "argv", ["pack", str(runs), str(archive)])
    pack.main()
    kept = read(unpacked(archive, tmp_path / "elsewhere"))
    finished = [o for o in read(runs) if o.state == "done"]
    assert [o.run for o in kept] == [o.run for o in finished]
    assert markdown(report_of(kept, "a")) == markdown(report_of(finished, "a"))
    for a, b in zip(kept, finished, strict=True):
        assert turns_of(a) == turns_of(b)
        assert {row["example_id"] for row in a.transcripts} == set(shown_episodes(b))


def test_it_tells_no_place_and_is_the_same_bytes_again(runs: Path) -> None:
    folder = next(path.parent for path in runs.glob("*/config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "out": "/somewhere/else"}))
    (outcome,) = (o for o in read(runs) if o.folder == folder)
    files = pack.files_of(outcome)
    assert b"/somewhere/else" not in b"".join(files.values())
    assert pack.pack(runs) == pack.pack(runs)


def test_nothing_finished_is_nothing_to_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, Run("DialogueQA-v0", "ppo", 1, 64), taken=32)
    monkeypatch.setattr(sys, "argv", ["pack", str(tmp_path), str(tmp_path / "x.tar.xz")])
    with pytest.raises(SystemExit, match=r"No run in .* is finished"):
        pack.main()
    assert not (tmp_path / "x.tar.xz").exists()
