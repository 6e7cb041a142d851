"""How fast we are, beside the peers: ``python -m benchmarks.throughput``.

Every row measures some contenders in the same minutes on the same work: each lives in a process of
its own, warms up, and then they take turns, round after round. What counts is the ratio within a
round, so that whatever else the machine does meets both sides. The floor is measured in the same
rounds: how fast this machine multiplies matrices and reads memory, and so how long the work must
take at least.

Peers come with ``pip install 'llm-envs[bench]'`` (TRL, rouge-score) and, by hand, GEM
(``gem-llm``); what is not installed is left out with a word.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress

from agents.runs import write_json
from agents.settings import at_least
from benchmarks.contenders import MISSING
from benchmarks.experiment import process_environment
from benchmarks.tables import Table
from llm_envs.datasets.splits import did_you_mean


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        label: Name in the table.
        name: Function of :mod:`benchmarks.contenders`.
        arguments: Its arguments.
    """

    label: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One comparison; ratios are to the first contender's rivals.

    Attributes:
        group: What ``--rows`` calls it.
        title: What is measured.
        unit: What is counted a second.
        contenders: Ours first.
    """

    group: str
    title: str
    unit: str
    contenders: tuple[Contender, ...]


SMOLLM2 = "models/SmolLM2-135M-Instruct"
"""Made by ``scripts/fetch_smollm2.py``."""


def _rows() -> tuple[Row, ...]:
    rows = []
    for work in ("single turns", "dialogues", "long answers"):
        sides = [Contender("llm-envs", "train", {"workload": work})]
        sides += [Contender("nothing shared", "train", {"workload": work, "share": False})]
        sides += [Contender("llm-envs, bf16", "train", {"workload": work, "autocast": "bf16"})]
        if work != "dialogues":
            sides += [Contender("TRL", "train_trl", {"workload": work})]
        rows.append(Row("train", f"training step, {work}", "episodes", tuple(sides)))
    for model, named in (("tiny", "embedded model"), (SMOLLM2, "SmolLM2-135M")):
        for batch, group in ((1, 1), (16, 1), (16, 8), (64, 1), (64, 8)):
            given = {"model": model, "batch": batch, "group": group}
            alike = f", {group} of each prompt" if group > 1 else ""
            sides = [
                Contender("llm-envs", "sample", given),
                Contender("transformers", "sample_transformers", given),
            ]
            if model == "tiny":
                sides += [Contender("llm-envs, compiled", "sample", {**given, "compiled": True})]
            title = f"sampling, {named}, {batch} row{'s' * (batch > 1)}{alike}"
            group_name = "sampling" if model == "tiny" else "large"
            rows.append(Row(group_name, title, "tokens", tuple(sides)))
    for env in ("DialogueQA-v0", "Summarization-v0", "RecommendationClicks-v0"):
        for n in (1, 64, 1024):
            sides = [Contender("llm-envs", "env_steps", {"env": env, "n": n})]
            if n == 64:
                sides += [Contender("sync vector", "env_steps", {"env": env, "n": n, "sync": True})]
            if env == "DialogueQA-v0":
                sides += [Contender("GEM QaEnv", "env_steps_gem")]
            rows.append(Row("envs", f"{env}, {n} side by side", "steps", tuple(sides)))
    rows.append(
        Row(
            "envs",
            "ROUGE-1, -2, -L",
            "pairs",
            (Contender("llm-envs", "rouge"), Contender("rouge-score", "rouge_google")),
        )
    )
    for count in (1, 2, 4, 8, 16):
        rows.append(
            Row(
                "turns",
                f"gradient of {count}-turn dialogues",
                "dialogues",
                (
                    Contender("llm-envs", "turns", {"turns": count}),
                    Contender("history read again", "turns", {"turns": count, "again": True}),
                ),
            )
        )
    rows.append(
        Row(
            "processes",
            "training, whole dialogues, torchrun",
            "answers",
            (
                Contender("2 processes", "train_processes", {"count": 2}),
                Contender("1 process", "train_processes", {"count": 1}),
            ),
        )
    )
    for count in (1, 16):
        sides = [Contender("llm-envs", "latency", {"rows": count})]
        rows.append(
            Row("latency", f"feedback to next answers, {count} at a time", "updates", tuple(sides))
        )
    for title, code in (
        ("import llm_envs", "import llm_envs"),
        ("gym.make", "import gymnasium, llm_envs; gymnasium.make('DialogueQA-v0')"),
        ("--help", "import sys; sys.argv[1:] = ['--help']; import agents.train as t; t.main()"),
        ("python alone", "pass"),
    ):
        sides = [Contender("llm-envs", "startup", {"code": code})]
        rows.append(Row("startup", f"start-up: {title}", "starts", tuple(sides)))
    return tuple(rows)


ROWS = _rows()
GROUPS = tuple(dict.fromkeys(row.group for row in ROWS))


@dataclass(frozen=True)
class Options:
    """What to measure, and how often."""

    rows: tuple[str, ...] = tuple(group for group in GROUPS if group != "large")
    """Groups of rows: train, sampling, large (SmolLM2, once it is fetched), envs, turns, processes,
    latency, startup."""
    rounds: int = 5
    """Rounds that count, after one to warm up."""
    threads: int = 2
    """Intra-op threads of every contender."""
    json: Path | None = None
    """File to write all figures to."""
    markdown: bool = False
    """Print Markdown."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rounds", "threads")
        for name in self.rows:
            if name not in GROUPS:
                raise ValueError(
                    f"There are no rows {name!r}.{did_you_mean(name, GROUPS)} "
                    f"There are: {', '.join(GROUPS)}."
                )


class Side:
    """A contender at work, in a process of its own.

    Args:
        contender: What it does.
        threads: Its intra-op threads.
    """

    def __init__(self, contender: Contender, threads: int) -> None:
        self.contender = contender
        self.rates: list[float] = []
        self.shares: list[float | None] = []
        self.why = ""
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.contenders",
                contender.name,
                json.dumps(contender.arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(threads),
        )

    def wait(self) -> dict[str, float] | None:
        """Return what the repetition under way did; ``None`` if there is no more."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)  # type: ignore[no-any-return]
        assert self.process.stderr is not None
        said = self.process.stderr.read().strip().splitlines()
        missing = self.process.wait() == MISSING
        self.why = ("not installed: " if missing else "failed: ") + (said[-1] if said else "?")
        return None

    def again(self) -> dict[str, float] | None:
        """Have it repeat its work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def measure(row: Row, options: Options, tick: Any = lambda: None) -> list[Side]:
    """Let the contenders of a row take turns."""
    floor = [Side(Contender("floor", name), options.threads) for name in ("gemm", "bandwidth")]
    sides = [Side(c, options.threads) for c in row.contenders]
    try:
        # One after the other begins, each with the machine for itself.
        working = [side for side in sides if side.wait() is not None]
        for side in floor:
            side.wait()
        for _ in range(options.rounds + 1):
            speeds = [side.again() for side in floor]
            flops, moved = (s["units"] / s["seconds"] if s else float("nan") for s in speeds)
            for side in list(working):
                found = side.again()
                if found is None:
                    working.remove(side)
                    continue
                side.rates.append(found["units"] / found["seconds"])
                least = max(found["flops"] / flops, found["bytes"] / moved)
                side.shares.append(least / found["seconds"] if least else None)
            tick()
    finally:
        for side in (*sides, *floor):
            side.close()
    for side in sides:  # the first round is for warming up
        del side.rates[:1], side.shares[:1]
    return sides


def summarise(row: Row, sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Return median, spread, ratio to ours (paired by round) and share of the floor."""
    ours = sides[0].rates
    found = []
    for side in sides:
        line: dict[str, Any] = {"row": row.title, "unit": row.unit, **asdict(side.contender)}
        if side.why:
            line["why"] = side.why
        if side.rates:
            line |= {"rates": side.rates, "median": median(side.rates)}
            ratios = sorted(a / b for a, b in zip(ours, side.rates, strict=False))
            if side is not sides[0] and ratios:
                line["ours"] = {"median": median(ratios), "least": ratios[0], "most": ratios[-1]}
            shares = [s for s in side.shares if s is not None]
            if shares:
                line["floor_share"] = median(shares)
        found.append(line)
    return found


COLUMNS = ("what", "who", "a second, median (least to most)", "ours is", "share of the floor")


def cells(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Lay the figures out as texts, a line a contender."""
    found: list[tuple[str, ...]] = []
    before = None
    for line in lines:
        what = f"{line['row']}, {line['unit']}" if line["row"] != before else ""
        before = line["row"]
        if "rates" not in line:
            found.append((what, line["label"], line.get("why", "?"), "", ""))
            continue
        rates, ratio, share = line["rates"], line.get("ours"), line.get("floor_share")
        speed = f"{_digits(line['median'])} ({_digits(min(rates))} to {_digits(max(rates))})"
        ours = (
            f"{ratio['median']:.2f}x ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else ""
        )
        found.append((what, line["label"], speed, ours, "" if share is None else f"{share:.0%}"))
    return found


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Return the figures as a table."""
    title = "Units a second over the rounds; ratios are taken round by round"
    return Table(title, COLUMNS, tuple(cells(lines)), numbers=3)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(options: Options) -> dict[str, Any]:
    """Say what was measured on."""
    import torch
    import transformers

    return {
        "machine": platform.machine(),
        "threads": options.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main(options: Options, console: Console) -> list[dict[str, Any]]:
    """Measure what was asked for; return its figures."""
    chosen = [row for row in ROWS if row.group in options.rows]
    lines: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("rounds", total=len(chosen) * (options.rounds + 1))
        for row in chosen:
            sides = measure(row, options, lambda: progress.advance(task))
            lines += summarise(row, sides)
            if options.json is not None:  # what is measured is kept, whatever comes
                options.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(options.json, {**machine(options), "lines": lines})
    if options.markdown:
        print(table(lines).markdown())
    else:
        console.print(table(lines).rich())
    return lines


if __name__ == "__main__":
    try:
        arguments = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.throughput")
    except ValueError as error:
        raise SystemExit(str(error)) from error
    main(arguments, Console())
