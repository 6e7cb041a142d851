"""A page of what runs came to: ``python -m benchmarks.report runs/core``.

It reads the folders of a sweep (or of single runs) and writes ``report.html``, one file that opens
without a network, ``report.md`` and PNG pictures beside them. Runs that are missing, cut or damaged
are shown as such, and no figure counts them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console

from agents.evaluation import Evaluation
from agents.runs import write_text
from benchmarks import page
from benchmarks import statistics as st
from benchmarks.figures import MOST_BANDS, Chart, Series, Style, import_plotly, save_png, styles
from benchmarks.reference_scores import measure
from benchmarks.results import Floats, Outcome, read
from benchmarks.sweep import read_suite
from benchmarks.tables import Table, cell
from llm_envs.core.rendering import printable

SAMPLES = 3
"""Episodes of which the answers before and after are shown, for each variant."""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        text: What it says before its charts, a paragraph a line.
        charts: Drawn beside each other.
        tables: Below them.
        transcripts: Heading -> answers before and after, a turn each.
    """

    title: str
    text: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    transcripts: tuple[tuple[str, tuple[Turn, ...]], ...] = ()


@dataclass(frozen=True)
class Turn:
    """One question, what was answered before and after training, and what that earned."""

    question: str
    before: str
    after: str
    scores: tuple[float | None, float | None]


@dataclass(frozen=True)
class Report:
    """All that a report says."""

    title: str
    about: str
    warnings: tuple[str, ...]
    looks: dict[str, Style]
    sections: tuple[Section, ...]


# --- what is compared ----------------------------------------------------------------------------


def arena(outcome: Outcome) -> str:
    """Return what a run is compared on: its environment, with the arguments that change it."""
    kwargs = outcome.run.env_kwargs
    return outcome.run.env + (f" {json.dumps(kwargs, sort_keys=True)}" if kwargs else "")


Grid = dict[str, dict[str, list[Outcome]]]
"""Arena -> variant -> finished runs, a seed each."""


def grid_of(outcomes: Sequence[Outcome]) -> Grid:
    """Return the finished runs by what they are compared on, and by what is compared."""
    counted = [o for o in outcomes if o.score is not None]
    splits: dict[str, set[str]] = {}
    for o in counted:
        splits.setdefault(arena(o), set()).add(o.split)
    found: Grid = {}
    for o in counted:  # scores on different splits are not of one kind
        name = arena(o) + (f", {o.split} split" if len(splits[arena(o)]) > 1 else "")
        found.setdefault(name, {}).setdefault(o.run.variant, []).append(o)
    return found


def scores(outcomes: Sequence[Outcome]) -> Floats:
    """Return the score of each run."""
    return np.array([o.score for o in outcomes], np.float64)


@dataclass(frozen=True)
class Reference:
    """Scores of an arena that others are measured by: of a random player and of the oracle."""

    random: float
    oracle: float


def references(grid: Grid) -> dict[str, Reference]:
    """Play the reference players on every arena that is registered and has an oracle."""
    found = {}
    for name, variants in grid.items():
        first = next(iter(variants.values()))[0]
        split: Any = first.split
        try:
            players = measure(
                first.run.env, split, players=("random", "oracle"), env_kwargs=first.run.env_kwargs
            )
        except (ValueError, TypeError, OSError, ImportError, gym.error.Error):
            continue  # an environment of the user's own, or a data set that is not here
        low, high = (expected_score(players[name]) for name in ("random", "oracle"))
        if low < high:
            found[name] = Reference(low, high)
    return found


def expected_score(evaluation: Evaluation) -> float:
    """Return the exact expectation of the score where it is known, else what was played."""
    return evaluation.part("expected") if "expected" in evaluation.parts else evaluation.score


# --- sections ------------------------------------------------------------------------------------


def leaderboard(grid: Grid, variants: Sequence[str], known: dict[str, Reference]) -> Section:
    """Scores by environment and variant."""
    charts, rows = [], []
    for place, (name, found) in enumerate(grid.items()):
        runs = [o for group in found.values() for o in group]
        marks = {"random": known[name].random} if name in known else {}
        marks |= initial_policies(runs)
        series = []
        for variant, group in found.items():
            each = scores(group)
            i = st.t_interval(each)
            bounds = {} if len(each) < 2 else {"low": [i.low], "high": [i.high]}
            series.append(Series(variant, [i.value], [variant], points=each.tolist(), **bounds))
        split = runs[0].split
        charts.append(
            Chart(
                chart_id("scores", place, name), name, f"score, {split} split", "", "dots",
                tuple(series), tuple(marks.items()),
            )
        )  # fmt: skip
    for variant in variants:
        cells = [cell(scores(found.get(variant, [])).tolist()) for found in grid.values()]
        rows.append((variant, *cells))
    table = Table("Mean, [95 % t interval over seeds], (each seed)", ("agent", *grid), tuple(rows))
    text = "Greedy score of the checkpoint that validation chose. Faint: single runs."
    runs = [o for found in grid.values() for group in found.values() for o in group]
    if not all(o.result for o in runs):
        text += " Runs that report no split count by their last validation."
    middle = interquartile_means(grid, variants)
    return Section("Scores", (text,), tuple(charts), (table, *([middle] if middle else [])))


def interquartile_means(grid: Grid, variants: Sequence[str]) -> Table | None:
    """Interquartile means by environment and variant; of fewer than 4 runs they are the means."""
    if all(len(scores(group)) < 4 for found in grid.values() for group in found.values()):
        return None

    def text(name: str, variant: str) -> str:
        each = scores(grid[name].get(variant, []))
        if len(each) < 4:
            return "–"
        i = st.stratified_bootstrap(st.iqm, {name: each})
        return f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]"

    return Table(
        "Interquartile mean of 4 seeds or more, [95 % bootstrap interval over seeds]",
        ("agent", *grid),
        tuple((variant, *(text(name, variant) for name in grid)) for variant in variants),
    )


def initial_policies(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return what each language model scored before it was trained; their seeds' median."""
    found: dict[str, list[float]] = {}
    for o in outcomes:
        if o.initial is not None and o.config["policy"] != "none":
            found.setdefault(str(o.config["policy"]), []).append(o.initial)
    medians = {policy: float(np.median(each)) for policy, each in found.items()}
    if len(medians) == 1:
        return {"initial policy": next(iter(medians.values()))}
    return {f"initial {Path(policy).name}": value for policy, value in medians.items()}


def learning(grid: Grid) -> Section:
    """Validation scores over environment steps."""
    charts = []
    for place, (name, found) in enumerate(grid.items()):
        series = [
            s for variant, group in found.items() if (s := curve(variant, group, "eval/score"))
        ]
        if series:
            name_of = chart_id("curves", place, name)
            labels = (name, "environment steps", "validation score")
            charts.append(Chart(name_of, *labels, "lines", tuple(series)))
    text = (
        "Mean over seeds; bands: 95 % t intervals over seeds, where there are two or more. "
        f"(Pictures of more than {MOST_BANDS} lines leave them out.)"
    )
    return Section("Learning curves", (text,), tuple(charts))


def curve(variant: str, group: Sequence[Outcome], metric: str) -> Series | None:
    """Return the mean of a metric over runs, at the steps of all, with its interval."""
    columns = [c for o in group if len((c := o.column(metric))[0])]
    if not columns:
        return None
    return banded(variant, columns)


def banded(variant: str, columns: Sequence[tuple[Floats, Floats]]) -> Series:
    """Return the mean of curves with its 95 % t interval.

    Runs are validated at steps that differ a little; between them a curve is taken for straight.
    Nothing is said of steps that a run has not come to.
    """
    last = min(steps[-1] for steps, _ in columns)
    first = max(steps[0] for steps, _ in columns)
    at = np.unique(np.concatenate([steps for steps, _ in columns]))
    at = at[(at >= first) & (at <= last)]
    values = np.stack([np.interp(at, steps, found) for steps, found in columns])
    intervals = [st.t_interval(column) for column in values.T]
    bounds: dict[str, Any] = {}
    if len(columns) > 1:
        bounds = {"low": [i.low for i in intervals], "high": [i.high for i in intervals]}
    return Series(variant, at.tolist(), [i.value for i in intervals], **bounds)


def together(grid: Grid, known: dict[str, Reference], variants: Sequence[str]) -> Section | None:
    """Aggregates over environments, of the variants that have runs on all of them."""
    arenas = [name for name in grid if name in known]
    everywhere = [v for v in variants if all(v in grid[name] for name in arenas)]
    if len(arenas) < 2 or len(everywhere) < 2:
        return None
    strata = {
        v: {
            name: st.normalised(scores(grid[name][v]), known[name].random, known[name].oracle)
            for name in arenas
        }
        for v in everywhere
    }
    charts = []
    for name, title, statistic in (
        ("mean", "Mean", st.mean),
        ("iqm", "Interquartile mean", st.iqm),
        ("gap", "Optimality gap (less is better)", st.optimality_gap),
    ):
        series = []
        for v in everywhere:
            i = st.stratified_bootstrap(statistic, strata[v])
            series.append(Series(v, [i.value], [v], [i.low], [i.high]))
        charts.append(Chart(name, title, "normalised score", "", "dots", tuple(series)))
    thresholds = np.linspace(0, 1, 41)
    profiles = []
    for v in everywhere:
        p = st.performance_profile(strata[v], thresholds)
        profiles.append(
            Series(v, thresholds.tolist(), p.values.tolist(), p.low.tolist(), p.high.tolist())
        )
    charts.append(
        Chart(
            "profiles", "Performance profiles", "normalised score τ",
            "share of runs above τ", "lines", tuple(profiles),
        )
    )  # fmt: skip
    better: dict[tuple[str, str], str] = {}
    for place, a in enumerate(everywhere):
        for b in everywhere[place + 1 :]:
            i = st.stratified_bootstrap(st.probability_of_improvement, strata[a], strata[b])
            better[a, b] = likely(i.value, i.low, i.high)
            better[b, a] = likely(1 - i.value, 1 - i.high, 1 - i.low)
    rows = [(a, *(better.get((a, b), "") for b in everywhere)) for a in everywhere]
    left = [v for v in variants if v not in everywhere]
    return Section(
        "All environments together",
        (
            f"Scores on {len(arenas)} environments, so that a random player has 0 and the oracle 1 "
            "(Agarwal et al. 2021); 95 % bootstrap intervals, stratified by environment. "
            f"(Pictures of more than {MOST_BANDS} profiles leave theirs out.)",
            *([f"Not on every environment, and so not here: {', '.join(left)}."] if left else []),
        ),
        tuple(charts),
        (
            Table(
                "How likely a run of the row scores more than one of the column",
                ("agent", *everywhere),
                tuple(rows),
            ),
        ),
    )


def likely(value: float, low: float, high: float) -> str:
    """Return a probability with its interval, if there is one."""
    return f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) else "")


def regret(grid: Grid) -> Section | None:
    """Cumulative regret in training, where the best choice is known."""
    charts = []
    for place, (name, found) in enumerate(grid.items()):
        series = []
        for variant, group in found.items():
            columns = [c for o in group if len((c := o.cumulative_regret)[0])]
            if columns:
                series.append(banded(variant, columns))
        if series:
            name_of = chart_id("regret", place, name)
            labels = (name, "environment steps", "cumulative regret")
            charts.append(Chart(name_of, *labels, "lines", tuple(series)))
    if not charts:
        return None
    text = (
        "Score lost to the best possible choices while training: what learning cost the users. "
        "Imitation is shown the best choices, and has none."
    )
    return Section("Cumulative regret", (text,), tuple(charts))


def efficiency(grid: Grid) -> Section:
    """Steps to a threshold, area under the curve, and what training cost."""
    tables = []
    for name, found in grid.items():
        looks = {v: [o.column("eval/score") for o in group] for v, group in found.items()}
        ends = [steps[-1] for each in looks.values() for steps, _ in each if len(steps) > 1]
        budget = min(ends, default=0.0)
        columns = {
            v: curves
            for v, each in looks.items()
            if (curves := [(x, y) for x, y in each if len(x) and x[0] < budget <= x[-1]])
        }
        if not columns:  # nobody was validated after training had begun
            continue
        threshold = threshold_of(list(columns.values()))
        rows = []
        for v, group in found.items():
            learned = ("–", "–", "–")
            if v in columns:
                at = st.reaching([st.steps_to_threshold(*c, threshold) for c in columns[v]])
                areas = [st.area_under_curve(*c, budget) for c in columns[v]]
                gap = max(float(np.diff(steps).max()) for steps, _ in columns[v])
                reached = f"{steps_or_never(at.median)} ({at.reached} of {at.runs})"
                learned = (reached, f"{gap:,.0f}", f"{np.mean(areas):.3f}")
            rows.append((v, *learned, *costs(group)))
        tables.append(
            Table(
                f"{name}: threshold {threshold:.3f}, area up to {budget:,.0f} steps",
                (
                    "agent",
                    "median steps to the threshold (reached by)",
                    "steps between validations",
                    "mean validation score on the way",
                    "seconds a run",
                    "tokens a run",
                    "answers a second",
                ),
                tuple(rows),
            )
        )
    return Section(
        "Sample efficiency and cost",
        (
            "The threshold lies nine tenths of the way from where the best agent begins to where "
            "it ends, on the validation split; it is seen to be reached at a validation, so the "
            "steps to it are known no better than those are apart. Seconds are those of rollouts "
            "and updates; compare them only if the runs had the machine alike.",
        ),
        (),
        tuple(tables),
    )


def costs(group: Sequence[Outcome]) -> tuple[str, str, str]:
    """Return seconds and tokens a run, and answers a second, as far as they were measured."""
    tokens = [o.tokens for o in group if o.tokens is not None]
    timed = [(o.seconds, o.metrics[-1]["env_steps"]) for o in group if o.seconds]
    if not timed:
        return "–", "–", "–"
    seconds, steps = np.array(timed, np.float64).T
    return (
        f"{seconds.mean():,.0f}",
        f"{np.mean(tokens):,.0f}" if tokens else "–",
        f"{steps.sum() / seconds.sum():,.1f}",
    )


def steps_or_never(steps: float) -> str:
    """Return a number of steps for people."""
    return f"{steps:,.0f}" if math.isfinite(steps) else "not reached"


def threshold_of(columns: Sequence[Sequence[tuple[Floats, Floats]]]) -> float:
    """Return nine tenths of the way of the variant whose mean last validation is the best."""
    ways = [
        (float(np.mean([v[-1] for _, v in c])), float(np.mean([v[0] for _, v in c])))
        for c in columns
    ]
    last, first = max(ways)
    return first + 0.9 * (last - first)


def parts(grid: Grid) -> Section | None:
    """The named scores that a score is mixed from, before and after training."""
    tables = []
    for name, found in grid.items():
        names = list(
            dict.fromkeys(
                part
                for group in found.values()
                for o in group
                if o.result
                for part in o.result["after"].get("parts", {})
            )
        )
        rows = []
        for variant, group in found.items():
            scored = [o for o in group if o.result]
            if scored and names:
                cells = (" → ".join(part_means(scored, part)) for part in names)
                rows.append((variant, *cells))
        if rows:
            tables.append(Table(f"{name}: before → after", ("agent", *names), tuple(rows)))
    if not tables:
        return None
    return Section("Parts of the score", ("Means over the seeds.",), (), tuple(tables))


def part_means(outcomes: Sequence[Outcome], part: str) -> tuple[str, str]:
    """Return the mean of a part over runs before and after training; of runs that have it."""
    shown = []
    for when in ("before", "after"):
        values = [o.result[when]["parts"].get(part) for o in outcomes]
        known = [value for value in values if value is not None]
        shown.append(f"{np.mean(known):.3f}" if known else "–")
    return shown[0], shown[1]


def answers(grid: Grid) -> Section | None:
    """What was answered before and after training, on the same questions."""
    found = []
    for name, variants in grid.items():
        for variant, group in variants.items():
            turns = turns_of(group[0])
            if turns:
                found.append((f"{name}, {variant}, seed {group[0].run.seed}", turns))
    if not found:
        return None
    return Section("Answers before and after", transcripts=tuple(found))


def shown_episodes(outcome: Outcome) -> list[str]:
    """Return the ids of a few evenly spaced episodes that a run played before and after."""
    played: dict[str, dict[str, None]] = {"before": {}, "after": {}}
    for row in outcome.transcripts:
        if row["when"] in played:
            played[row["when"]][row["example_id"]] = None
    both = [example for example in played["before"] if example in played["after"]]
    return both[:: max(1, len(both) // SAMPLES)][:SAMPLES]


def turns_of(outcome: Outcome) -> tuple[Turn, ...]:
    """Return what was answered in the episodes that are shown, before beside after."""
    sides: dict[str, dict[tuple[str, int], dict[str, Any]]] = {"before": {}, "after": {}}
    for row in outcome.transcripts:
        if row["when"] in sides:
            sides[row["when"]].setdefault((row["example_id"], row["turn"]), row)
    both = [key for key in sides["before"] if key in sides["after"]]
    shown = shown_episodes(outcome)
    return tuple(
        Turn(
            printable(str(sides["before"][key]["question"])),
            printable(str(sides["before"][key]["answer"])),
            printable(str(sides["after"][key]["answer"])),
            (sides["before"][key]["score"], sides["after"][key]["score"]),
        )
        for key in both
        if key[0] in shown
    )


def configuration(outcomes: Sequence[Outcome]) -> Section | None:
    """The settings in which variants differ."""
    named = {"env", "agent", "seed", "out", "wandb_id", "resume", "settings"}
    values: dict[str, dict[str, dict[str, None]]] = {}
    for o in outcomes:
        flat = {k: v for k, v in o.config.items() if k not in named}
        for key, value in {**flat, **o.config.get("settings", {})}.items():
            of_variant = values.setdefault(key, {}).setdefault(o.run.variant, {})
            of_variant[json.dumps(value)] = None
    variants = list(dict.fromkeys(o.run.variant for o in outcomes if o.config))
    rows = []
    for key, found in values.items():
        cells = tuple(" or ".join(found.get(v, {"": None})) for v in variants)
        if len({c for c in cells if c}) > 1 or any(" or " in c for c in cells):
            rows.append((key, *cells))
    if not rows:
        return None
    text = "Settings that are alike in all runs are left out; an empty cell has no such setting."
    return Section("Configuration", (text,), (), (Table("", ("setting", *variants), tuple(rows)),))


def states(outcomes: Sequence[Outcome]) -> Section:
    """Every run and what became of it; those that are not done first."""
    ordered = sorted(outcomes, key=lambda o: o.state == "done")
    rows = []
    for o in ordered:
        taken = o.metrics[-1]["env_steps"] if o.metrics else 0
        shown = "" if o.score is None else f"{o.score:.3f}"
        rows.append((o.folder.name, o.state, f"{taken:,} of {o.run.steps:,}", shown, o.why))
    table = Table("", ("run", "state", "steps", "score", ""), tuple(rows))
    return Section("Runs", (), (), (table,))


# --- the whole -----------------------------------------------------------------------------------


def report_of(outcomes: Sequence[Outcome], title: str, about: str = "") -> Report:
    """Return all that can be said of some runs."""
    grid = grid_of(outcomes)
    variants = list(dict.fromkeys(v for found in grid.values() for v in found))
    counts = Counter(o.state for o in outcomes)
    told = [f"{counts[s]} {s}" for s in ("partial", "missing", "corrupt", "failed") if counts[s]]
    warned = []
    if told:
        warned.append(f"Of {len(outcomes)} runs {counts['done']} are done: {', '.join(told)}.")
    if grid:
        fewest, where, who = min(
            (len(group), name, variant)
            for name, found in grid.items()
            for variant, group in found.items()
        )
        if caveat := st.caveat(fewest):
            warned.append(f"{where}, {who}, for one: {caveat}")
        for name, variants_of in grid.items():
            for variant, group in variants_of.items():
                if len({o.run.seed for o in group}) < len(group):
                    warned.append(f"{name}, {variant}: several runs have one seed.")
                if len({o.run.steps for o in group}) > 1:
                    warned.append(f"{name}, {variant}: runs have different numbers of steps.")
    looks = styles(variants)
    if len(set(looks.values())) < len(looks):
        warned.append(
            f"{len(variants)} variants are too many to look different; the tables tell them apart. "
            "Report on parts of the sweep, each in a folder of its own."
        )
    if unscored := sum(o.state == "done" and o.score is None for o in outcomes):
        warned.append(f"{unscored} finished runs have no finite score, and are not counted.")
    known = references(grid)
    found: list[Section | None] = [states(outcomes)]
    if grid:
        found = [
            leaderboard(grid, variants, known),
            together(grid, known, variants),
            learning(grid),
            regret(grid),
            efficiency(grid),
            parts(grid),
            answers(grid),
            configuration(outcomes),
            states(outcomes),
        ]
    sections = tuple(section for section in found if section)
    return Report(title, about, tuple(warned), looks, sections)


def chart_id(kind: str, place: int, name: str) -> str:
    """Return a name for a chart that no other one has, whatever its environment is called."""
    return f"{kind}-{place}-{slug(name)}"


def slug(text: str) -> str:
    """Return a text as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def markdown(report: Report) -> str:
    """Return the report in Markdown, with its pictures beside it."""
    lines = [f"# {report.title}", "", report.about, ""]
    lines += [f"> {warning}\n" for warning in report.warnings]
    for section in report.sections:
        if section.transcripts:
            continue  # they are for the page
        lines += [f"## {section.title}", "", *(f"{text}\n" for text in section.text)]
        lines += [f"![{t}]({name})\n" for name, t, _ in pictures(section)]
        for table in section.tables:
            lines += [f"**{table.title}**\n" if table.title else "", table.markdown(), ""]
    return "\n".join(lines)


def pictures(section: Section) -> list[tuple[str, str, list[Chart]]]:
    """Return the PNG files of a section: name, title, and the charts that are in it."""
    found = []
    for kind in ("dots", "lines"):
        charts = [chart for chart in section.charts if chart.kind == kind]
        if charts:
            found.append((f"{slug(section.title)}-{kind}.png", section.title, charts))
    return found


def write(report: Report, out: Path) -> list[Path]:
    """Write the page, the Markdown and the pictures; return their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "report.html", out / "report.md"]
    write_text(paths[0], page.html(report))
    write_text(paths[1], markdown(report))
    for section in report.sections:
        for name, _, charts in pictures(section):
            save_png(charts, report.looks, out / name)
            paths.append(out / name)
    return paths


@dataclass(frozen=True)
class Arguments:
    """What to report on, and where to write it."""

    folder: tyro.conf.Positional[Path]
    """Folder of a sweep, or of one run."""
    out: Path | None = None
    """Where the report is written; by default FOLDER/report."""


def main() -> None:
    """Read, write, and tell where."""
    a = tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.report")
    try:
        import_plotly()
        outcomes = read(a.folder)
        suite = read_suite(a.folder)
        name, about = (suite.name, suite.about) if suite else (a.folder.resolve().name, "")
        report = report_of(outcomes, f"llm-envs: {name}", about)
        paths = write(report, a.out or a.folder / "report")
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(str(error)) from error
    console = Console()
    for warning in report.warnings:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)
    console.print("Written: " + ", ".join(map(str, paths)), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
