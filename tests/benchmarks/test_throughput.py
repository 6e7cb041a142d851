"""The measuring itself: contenders take turns in processes of their own, and are counted right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import throughput
from benchmarks.contenders import CONTENDERS
from benchmarks.throughput import (
    ROWS,
    Contender,
    Options,
    Row,
    Side,
    main,
    measure,
    summarise,
    table,
)

SMALL = Contender("small", "gemm", {"size": 64})
LARGE = Contender("large", "gemm", {"size": 128})


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    row = Row("train", "matrices", "operations", (SMALL, LARGE))
    ticks: list[None] = []
    sides = measure(row, Options(rounds=2, threads=1), lambda: ticks.append(None))
    assert len(ticks) == 3
    assert [len(side.rates) for side in sides] == [2, 2]
    assert all(rate > 1e6 for side in sides for rate in side.rates)
    assert all(side.process.poll() is not None for side in sides), "a process was left behind"


@pytest.mark.slow
def test_what_is_not_installed_or_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A package of that name that is none: as if TRL were missing, wherever this runs.
    (tmp_path / "trl.py").write_text("raise ImportError('No module named trl')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = Row(
        "train",
        "matrices",
        "operations",
        (
            SMALL,
            Contender("missing", "train_trl", {"workload": "single turns"}),
            Contender("wrong", "gemm", {"dtype": "float31"}),
        ),
    )
    sides = measure(row, Options(rounds=1, threads=1))
    lines = summarise(row, sides)
    assert len(lines[0]["rates"]) == 1
    assert lines[1]["why"].startswith("not installed: ")
    assert "float31" in lines[2]["why"]
    assert lines[2]["why"].startswith("failed: ")
    assert "rates" not in lines[1]


def side_of(label: str, rates: list[float], shares: list[float | None]) -> Any:
    made: Any = object.__new__(Side)
    made.contender, made.rates, made.shares, made.why = Contender(label, "gemm"), rates, shares, ""
    return made


def test_ratios_are_taken_round_by_round() -> None:
    row = Row("train", "title", "unit", (SMALL, LARGE))
    ours = side_of("ours", [10.0, 40.0, 90.0], [0.5, 0.25, 0.75])
    theirs = side_of("theirs", [5.0, 10.0, 10.0], [None] * 3)
    first, second = summarise(row, [ours, theirs])
    assert first["median"] == 40.0
    assert first["floor_share"] == 0.5
    assert "ours" not in first
    assert second["ours"] == {"median": 4.0, "least": 2.0, "most": 9.0}
    assert "floor_share" not in second
    third = {"row": "title", "label": "third", "why": "not installed: x"}
    shown = table([first, second, third]).markdown()
    assert shown.splitlines()[2:] == [
        "| title, unit | ours | 40 (10 to 90) |  | 50% |",
        "|  | theirs | 10 (5 to 10) | 4.00x (2.00 to 9.00) |  |",
        "|  | third | not installed: x |  |  |",
    ]


def test_figures_are_written_and_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = Row("latency", "matrices", "operations", (SMALL, LARGE))
    monkeypatch.setattr(throughput, "ROWS", (row, replace(row, group="train")))
    console = Console(width=120, record=True)
    file = tmp_path / "a" / "figures.json"
    lines = main(Options(rows=("latency",), rounds=1, threads=1, json=file), console)
    assert json.loads(file.read_text())["lines"] == json.loads(json.dumps(lines))
    assert [line["label"] for line in lines] == ["small", "large"]
    shown = console.export_text()
    assert "matrices, operations" in shown
    assert "x (" in shown


def test_every_row_names_contenders_that_exist() -> None:
    for row in ROWS:
        assert all(c.name in CONTENDERS for c in row.contenders)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        Options(rows=("trian",))
    with pytest.raises(ValueError, match="rounds is 0"):
        Options(rounds=0)
