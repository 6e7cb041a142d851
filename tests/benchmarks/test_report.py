"""The report: its numbers are those of the run files, and a browser shows them without an error."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from scipy import stats

from agents.runs import locked, write_json
from benchmarks import report as reports
from benchmarks.experiment import Run, log_file
from benchmarks.figures import styles
from benchmarks.reference_scores import measure
from benchmarks.report import Report, markdown, report_of, write
from benchmarks.results import Outcome, read
from benchmarks.suites import Suite, grid
from fake_runs import write_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
STEPS = 64
SCORES = {
    ("DialogueQA-v0", "ppo"): (0.51, 0.62, 0.73),
    ("DialogueQA-v0", "reinforce"): (0.44, 0.45, 0.49),
    ("RecommendationClicks-v0", "ppo"): (0.61, 0.66, 0.68),
    ("RecommendationClicks-v0", "reinforce"): (0.63, 0.64, 0.71),
    ("RecommendationClicks-v0", "linucb"): (0.69, 0.70, 0.72),
}
EVIL = "</script><script>document.title='broken'</script> | <b>"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep: fifteen runs that are whole, and one each that is cut, missing, damaged, failed."""
    out = tmp_path_factory.mktemp("sweep")
    runs = []
    for (env, agent), scores in SCORES.items():
        for seed, score in enumerate(scores, 1):
            run = Run(env, agent, seed, STEPS)
            runs.append(run)
            write_run(
                out,
                run,
                after=score,
                validations=[(0, 0.3), (32, score - 0.1), (64, score)],
                rows=[
                    {"env_steps": s, "rollout/regret": 0.5 / s, "perf/env_steps_per_second": 8.0}
                    | {"perf/tokens_per_second": 100.0}
                    for s in (16, 32, 48, 64)
                ],
                settings={"learning_rate": 0.1 if agent == "ppo" else 0.2, "same": 1},
                transcripts=[
                    {"example_id": f"e{i}", "turn": 0, "question": f"What? {EVIL}", "when": when}
                    | {"answer": f"{when} {i} {EVIL}", "score": 0.5}
                    for when in ("before", "after")
                    for i in range(6)
                ],
            )
    cut, missing, damaged, failed = grid({"DialogueQA-v0": STEPS}, ("grpo",), (1, 2, 3, 4))
    write_run(out, cut, taken=32, validations=[(0, 0.3), (32, 0.4)])
    (write_run(out, damaged) / "result.json").write_text('{"after": {"score": 0.9')
    log_file(out, failed.name).parent.mkdir()
    log_file(out, failed.name).write_text("$ command\nMemoryError: no room\n")
    write_json(log_file(out, failed.name).with_suffix(".json"), {"state": "failed"})
    suite = Suite("fakes", "Which of them?", (*runs, cut, missing, damaged, failed))
    write_json(out / "sweep.json", asdict(suite))
    return out


@pytest.fixture(scope="module")
def outcomes(out: Path) -> list[Outcome]:
    return read(out)


@pytest.fixture(scope="module")
def report(outcomes: list[Outcome]) -> Report:
    return report_of(outcomes, "llm-envs: fakes", "Which of them?")


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(report, tmp_path_factory.mktemp("report"))[0]


# --- reading -------------------------------------------------------------------------------------


def test_what_became_of_each_run_is_read(outcomes: list[Outcome]) -> None:
    states = {o.run.name: (o.state, o.why) for o in outcomes if o.state != "done"}
    assert len(outcomes) == 19
    assert states["DialogueQA-v0-grpo-seed1"] == ("partial", "32 of 64 steps")
    assert states["DialogueQA-v0-grpo-seed2"] == ("missing", "not begun")
    assert states["DialogueQA-v0-grpo-seed3"][0] == "corrupt"
    assert states["DialogueQA-v0-grpo-seed4"] == ("failed", "MemoryError: no room")
    assert len(states) == 4


def test_costs_and_regret_are_added_up(outcomes: list[Outcome]) -> None:
    done = next(o for o in outcomes if o.state == "done")
    assert done.seconds == pytest.approx(64 / 8)
    assert done.tokens == pytest.approx(64 / 8 * 100)
    steps, regrets = done.cumulative_regret
    assert steps.tolist() == [16, 32, 48, 64]
    assert regrets == pytest.approx(np.cumsum([16 * 0.5 / s for s in (16, 32, 48, 64)]))


def test_only_finished_runs_have_scores(outcomes: list[Outcome]) -> None:
    assert all((o.score is None) == (o.state != "done") for o in outcomes)


def test_a_run_without_a_scored_split_counts_by_its_last_validation(tmp_path: Path) -> None:
    run = Run("DialogueQA-v0", "ppo", 1, 64, report="none")
    write_run(tmp_path, run, validations=[(0, 0.1), (64, 0.4)])
    (found,) = read(tmp_path)  # there is no sweep.json: folders are enough
    assert (found.run, found.score, found.initial) == (run, 0.4, 0.1)
    (alone,) = read(tmp_path / run.name)
    assert alone.run.variant == "ppo"


def test_variants_are_read_from_the_names_of_folders(tmp_path: Path) -> None:
    runs = grid({"DialogueQA-v0": 8}, ("ppo",), (1,), policies=("", "Large"), variants={"low": {}})
    for run in (*runs, Run("DialogueQA-v0", "ppo", 2, 8)):
        write_run(tmp_path, run)
    variants = {o.run.variant for o in read(tmp_path)}
    assert variants == {"ppo-low", "ppo-Large-low", "ppo"}


def test_a_line_that_a_crash_cut_short_is_no_damage_and_another_is(tmp_path: Path) -> None:
    run = Run("DialogueQA-v0", "ppo", 1, 64)
    metrics = write_run(tmp_path, run, validations=[(0, 0.1), (64, 0.4)]) / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"env_st')
    assert read(tmp_path)[0].state == "done"
    metrics.write_text('{"env_st\n' + whole)
    (found,) = read(tmp_path)
    assert found.state == "corrupt"
    assert "metrics.jsonl, line 1" in found.why


def test_a_row_without_steps_is_damage_and_a_step_twice_is_none(tmp_path: Path) -> None:
    run = Run("DialogueQA-v0", "ppo", 1, 64)
    metrics = write_run(tmp_path, run, validations=[(0, 0.1), (64, 0.2), (64, 0.4)])
    (found,) = read(tmp_path)
    assert [values.tolist() for values in found.column("eval/score")] == [[0, 64], [0.1, 0.4]]
    report_of([found], "twice")
    (metrics / "metrics.jsonl").write_text('{"eval/score": 0.5}\n\n')
    assert read(tmp_path)[0].state == "corrupt"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"env_steps": 32, "eval/score": 0.3}', "row 3: env_steps goes back from 64 to 32"),
        ('{"env_steps": "96", "eval/score": 0.3}', "env_steps is '96', no number"),
        ('{"env_steps": null, "eval/score": 0.3}', "env_steps is None, no number"),
        ('{"env_steps": 96, "eval/score": "high"}', "eval/score is 'high', no number"),
    ],
)
def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path, line: str, why: str) -> None:
    runs = grid({"Mine-v0": 64}, ("ppo",), (1, 2), report="none")
    for run in runs:
        write_run(tmp_path, run, validations=[(0, 0.1), (64, 0.4)])
    metrics = tmp_path / runs[1].name / "metrics.jsonl"
    metrics.write_text(f"{metrics.read_text()}{line}\n")
    found = read(tmp_path)
    assert [o.state for o in found] == ["done", "corrupt"]
    assert why in found[1].why
    assert why in markdown(report_of(found, "damaged"))


def test_runs_that_were_not_validated_alike_have_a_report(tmp_path: Path) -> None:
    curves = {
        "ppo": [(0, 0.1), (32, 0.2), (64, 0.4)],
        "grpo": [(0, 0.1), (64, 0.4)],
        "rloo": [(64, 0.4)],
        "reinforce": [(0, 0.1)],
    }
    for agent, validations in curves.items():
        run = Run("Mine-v0", agent, 1, 64)
        write_run(tmp_path, run, after=0.5, validations=validations)
    report = report_of(read(tmp_path), "uneven")
    (section,) = (s for s in report.sections if s.title == "Sample efficiency and cost")
    rows = {row[0]: row[1:4] for row in section.tables[0].rows}
    assert rows["ppo"][1:] == ("32", f"{(0.15 + 0.3) / 2:.3f}")
    assert rows["grpo"][1:] == ("64", "0.250")
    assert rows["rloo"] == rows["reinforce"] == ("–", "–", "–")
    assert section.tables[0].rows[0][4:] == ("–", "–", "–"), "a cost that nobody measured"


def test_numbers_that_are_none_are_not_counted(tmp_path: Path) -> None:
    runs = grid({"Mine-v0": 64}, ("ppo",), (1, 2), report="none")
    write_run(tmp_path, runs[0], validations=[(0, 0.1), (32, 0.9)])
    metrics = tmp_path / runs[0].name / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"env_steps": 64, "eval/score": null}\n')
    write_run(tmp_path, runs[1], validations=[(0, 0.1), (64, 0.4)])
    scored = Run("Mine-v0", "ppo", 3, 64)
    (write_run(tmp_path, scored, after=float("nan"))).is_dir()
    found = {o.run.seed: o for o in read(tmp_path)}
    assert (found[1].state, found[1].score) == ("done", None)
    assert found[2].score == 0.4
    assert found[3].state == "corrupt"
    assert "score after training is nan" in found[3].why
    report = report_of([*found.values()], "odd")
    assert any("1 finished runs have no finite score" in text for text in report.warnings)


def test_copies_and_other_splits_are_not_mixed_in(tmp_path: Path) -> None:
    run = Run("Mine-v0", "ppo", 1, 64)
    folder = write_run(tmp_path, run, after=0.9)
    shutil.copytree(folder, folder.with_name(folder.name + "-backup"))
    write_run(tmp_path, Run("Mine-v0", "grpo", 1, 64, report="validation"), after=0.5)
    grid_found = reports.grid_of(read(tmp_path))
    assert set(grid_found) == {"Mine-v0, test split", "Mine-v0, validation split"}
    assert set(grid_found["Mine-v0, test split"]) == {"ppo", "ppo-backup"}


def test_a_run_that_failed_says_why_and_one_that_goes_on_does_not(tmp_path: Path) -> None:
    run = Run("Mine-v0", "ppo", 1, 64)
    folder = write_run(tmp_path, run, taken=8)
    log_file(tmp_path, run.name).parent.mkdir()
    log_file(tmp_path, run.name).write_text("$ c\nThe loss is nan.\nTo go on:\n  python\n")
    write_json(log_file(tmp_path, run.name).with_suffix(".json"), {"state": "failed"})
    assert read(tmp_path)[0].why == "The loss is nan."
    with locked(folder):
        assert (read(tmp_path)[0].state, read(tmp_path)[0].why) == ("partial", "training just now")
    (folder / "checkpoints" / "last" / "state.json").write_text("{")
    assert read(tmp_path)[0].state == "corrupt"


def test_environments_of_ones_own_and_runs_of_one_seed(tmp_path: Path) -> None:
    run = Run("Mine-v0", "ppo", 1, 64, env_kwargs={"a": 1})
    folder = write_run(tmp_path, run, validations=[(0, 0.1), (64, 0.4)])
    again = folder.with_name("Mine-v0-ppo-seed1-20260101-000000")
    shutil.copytree(folder, again)
    report = report_of(read(tmp_path), "mine")
    assert set(report.looks) == {"ppo", "ppo-20260101-000000"}
    (states,) = (section for section in report.sections if section.title == "Runs")
    assert {row[0] for row in states.tables[0].rows} == {folder.name, again.name}


def test_the_interquartile_mean_of_each_environment_is_shown_where_it_is_not_the_mean(
    tmp_path: Path,
) -> None:
    each = [0.1, 0.5, 0.52, 0.56, 0.9]
    for seed, score in enumerate(each, 1):
        write_run(tmp_path, Run("DialogueQA-v0", "ppo", seed, 64), after=score)
    for seed in (1, 2, 3):
        write_run(tmp_path, Run("DialogueQA-v0", "rloo", seed, 64), after=0.5)
    scores = report_of(read(tmp_path), "runs", "").sections[0]
    of = {row[0]: row[1] for row in scores.tables[1].rows}
    value, low, high = map(float, re.findall(r"\d\.\d+", of["ppo"]))
    assert value == pytest.approx(stats.trim_mean(each, 0.25), abs=5e-4)
    assert min(each) <= low < value < high <= max(each)
    assert of["rloo"] == "–"


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        read(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep.json is damaged"):
        read(tmp_path)


# --- what it says --------------------------------------------------------------------------------


class Tables(HTMLParser):
    """Collects the rows of all tables of a page, and what it would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v and v != "data:,"]

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def read_page(path: Path) -> Tables:
    tables = Tables()
    tables.feed(path.read_text())
    return tables


def test_the_numbers_on_the_page_are_those_of_the_run_files(page: Path, out: Path) -> None:
    tables = read_page(page)
    assert tables.fetched == [], "the page does not open without a network"
    header = next(row for row in tables.rows if row[:2] == ["agent", "DialogueQA-v0"])
    start = tables.rows.index(header)
    board = {row[0]: row[1:] for row in tables.rows[start + 1 : start + 4]}
    assert set(board) == {"ppo", "reinforce", "linucb"}
    for (env, agent), _ in SCORES.items():
        folders = [out / f"{env}-{agent}-seed{seed}" for seed in (1, 2, 3)]
        each = [json.loads((f / "result.json").read_text())["after"]["score"] for f in folders]
        text = board[agent][header.index(env) - 1]
        assert text.endswith(f"({', '.join(f'{score:.3f}' for score in each)})")
        assert text.startswith(f"{np.mean(each):.3f} [")
    assert board["linucb"][0] == "–"
    runs = {row[0]: row for row in tables.rows if row and row[0].endswith(tuple("1234"))}
    assert runs["DialogueQA-v0-grpo-seed1"][1:3] == ["partial", "32 of 64"]
    assert runs["DialogueQA-v0-grpo-seed4"][1:5:3] == ["failed", "MemoryError: no room"]
    assert runs["DialogueQA-v0-ppo-seed1"][3] == "0.510"


def test_aggregates_are_normalised_and_leave_out_who_did_not_play(report: Report) -> None:
    (section,) = (s for s in report.sections if s.title == "All environments together")
    assert "linucb" in section.text[1]
    mean = next(chart for chart in section.charts if chart.name == "mean")
    known = reports.references(reports.grid_of([o for o in read_all(report)]))
    drawn = measure("RecommendationClicks-v0", "test", players=("random",))["random"]
    exact = drawn.part("expected")
    assert known["RecommendationClicks-v0"].random == exact != pytest.approx(drawn.score)
    for series in mean.series:
        expected = np.mean(
            [
                (np.mean(SCORES[env, series.name]) - r.random) / (r.oracle - r.random)
                for env, r in known.items()
            ]
        )
        assert series.x[0] == pytest.approx(expected)
        assert series.low is not None
        assert series.high is not None
        assert series.low[0] <= series.x[0] <= series.high[0]
    assert {s.name for s in mean.series} == {"ppo", "reinforce"}
    assert known["DialogueQA-v0"].oracle == 1.0
    table = section.tables[0].rows
    assert table[0][0] == "ppo"
    assert table[0][2].startswith("0.72 [")  # 9/9 on DialogueQA, 4/9 on the clicks


def read_all(report: Report) -> list[Outcome]:
    """Finished runs that hold the scores above, as the report saw them."""
    return [
        Outcome(
            Run(env, agent, seed, STEPS),
            Path(),
            "done",
            config={"policy": "tiny"},
            result={"after": {"score": score, "split": "test"}, "before": {"score": 0.25}},
        )
        for (env, agent), scores in SCORES.items()
        for seed, score in enumerate(scores, 1)
    ]


def test_curves_are_means_over_seeds(report: Report) -> None:
    (section,) = (s for s in report.sections if s.title == "Learning curves")
    chart = next(c for c in section.charts if c.title == "DialogueQA-v0")
    ppo = next(s for s in chart.series if s.name == "ppo")
    mean = np.mean(SCORES["DialogueQA-v0", "ppo"])
    assert ppo.x == [0, 32, 64]
    assert ppo.y == pytest.approx([0.3, mean - 0.1, mean])
    assert "grpo" not in [s.name for s in chart.series], "an unfinished run was counted"


def test_curves_of_other_steps_are_joined_where_all_have_been() -> None:
    first = (np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.0, 2.0]))
    second = (np.array([0.0, 16.0]), np.array([0.0, 3.2]))
    series = reports.banded("x", [first, second])
    assert series.x == [0, 10, 16]
    assert series.y == pytest.approx([0, (1 + 2) / 2, (1.6 + 3.2) / 2])


def test_efficiency_says_when_a_threshold_was_reached(report: Report) -> None:
    (section,) = (s for s in report.sections if s.title.startswith("Sample efficiency"))
    table = section.tables[0]
    # ppo goes from 0.3 to 0.62 on average, so that the threshold is 0.588: seeds 2 and 3 reach it.
    assert "threshold 0.588" in table.title
    rows = {row[0]: row for row in table.rows}
    assert rows["ppo"][1] == "64 (2 of 3)"
    assert rows["reinforce"][1] == "not reached (0 of 3)"
    assert rows["ppo"][2] == "32"
    assert rows["ppo"][4:] == ("8", "800", "8.0")


def test_what_is_too_little_or_incomplete_is_said(report: Report) -> None:
    told = "Of 19 runs 15 are done: 1 partial, 1 missing, 1 corrupt, 1 failed."
    assert report.warnings[0] == told
    assert any("3 runs are too few" in text for text in report.warnings)


def test_configuration_shows_what_differs_alone(report: Report) -> None:
    (section,) = (s for s in report.sections if s.title == "Configuration")
    settings = {row[0]: row[1:] for row in section.tables[0].rows}
    assert "same" not in settings
    assert set(settings["learning_rate"]) >= {"0.1", "0.2"}


def test_markdown_and_pictures_show_the_same(report: Report, page: Path) -> None:
    text = (page.parent / "report.md").read_text()
    assert text == markdown(report)
    named = re.findall(r"\]\((.*?\.png)\)", text)
    assert len(named) >= 4
    for name in named:
        assert (imread(page.parent / name)[..., :3] < 0.5).any(), f"{name} is empty"
    board = next(line for line in text.splitlines() if line.startswith("| ppo | 0.6"))
    assert "(0.510, 0.620, 0.730)" in board


def test_more_variants_than_looks_are_said(tmp_path: Path) -> None:
    for number in range(22):
        write_run(tmp_path, Run("Mine-v0", "ppo", 1, 64, label=f"v{number}"), after=0.5)
    found = read(tmp_path)
    assert any("22 variants are too many" in text for text in report_of(found, "many").warnings)
    assert not any("variants" in text for text in report_of(found[:21], "few").warnings)


def test_looks_differ_for_all_agents() -> None:
    names = [f"agent {i}" for i in range(21)]
    assert len({(s.colour, s.dash) for s in styles(names).values()}) == 21


def test_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    write_run(tmp_path, Run("DialogueQA-v0", "ppo", 1, 64), taken=8)
    report = report_of(read(tmp_path), "cut")
    assert [section.title for section in report.sections] == ["Runs"]
    write(report, tmp_path / "report")


def test_without_plotly_the_extra_is_named(
    out: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.setattr(sys, "argv", ["report", str(out), "--out", str(tmp_path / "report")])
    with pytest.raises(SystemExit, match=r"llm-envs\[report\]"):
        reports.main()
    assert not (tmp_path / "report").exists()


# --- in a browser --------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

PROBE = """
<script>addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".chart")];
  const visible = () => charts.map((c) => c.data.filter((t) => t.visible !== false).length);
  const found = {
    title: document.title,
    drawn: charts.map((c) => c.querySelectorAll(".trace").length),
    data: Object.fromEntries(charts.map((c) => [c.id, c.data.map((t) => ({
      name: t.name, x: [...(t.x || [])], y: [...(t.y || [])]}))])),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    before: visible(),
    ground: getComputedStyle(document.body).backgroundColor,
  };
  document.querySelector('.chip[data-variant="ppo"]').click();
  found.after = visible();
  found.rows = [...document.querySelectorAll('[data-row="ppo"]')].map((r) => r.hidden);
  const told = document.createElement("pre");
  told.id = "told"; told.textContent = JSON.stringify(found); document.body.append(told);
}, 1500))</script>
"""


def browse(page: Path, place: Path, *flags: str) -> tuple[dict[str, Any], str]:
    """Open a page in headless Chromium; return what the probe found, and the console's errors."""
    assert CHROMIUM is not None
    probed = place / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    quiet = "--no-sandbox --disable-gpu --no-first-run --disable-sync --disable-quic".split()
    quiet += ["--disable-background-networking", "--disable-component-update"]
    command = [CHROMIUM, "--headless", *quiet, f"--user-data-dir={place / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=15000", "--dump-dom", *flags]
    ended = subprocess.run(
        [*command, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    told = re.search(r'<pre id="told">(.*?)</pre>', ended.stdout, re.S)
    said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
    assert told, f"the page's script did not come to its end: {said}"
    return json.loads(html.unescape(told[1])), "\n".join(said)


@needs_browser
@pytest.mark.parametrize(
    "flags",
    [("--window-size=1400,1000",), ("--window-size=500,900", "--force-dark-mode")],
    ids=["desk, light", "narrow, dark"],
)
def test_a_browser_shows_it(page: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    found, console = browse(page, tmp_path, *flags)
    assert console == ""
    dark = "--force-dark-mode" in flags
    assert found["ground"] == ("rgb(16, 20, 24)" if dark else "rgb(255, 255, 255)")
    assert found["title"] == "llm-envs: fakes", "text of a run was taken for code"
    assert all(found["drawn"]), "a chart is empty"
    assert found["wide"] <= 0, "the page is wider than its window"
    curve = next(
        t
        for t in found["data"]["curves-0-dialogueqa-v0"]
        if t["name"] == "ppo" and t["y"][0] == 0.3
    )
    assert curve["x"] == [0, 32, 64]
    dots = [t for t in found["data"]["scores-0-dialogueqa-v0"] if t["name"] == "ppo"]
    assert dots[0]["x"] == list(SCORES["DialogueQA-v0", "ppo"])
    assert dots[1]["x"] == pytest.approx([np.mean(SCORES["DialogueQA-v0", "ppo"])])
    # The switch hides an agent in every chart and in every table.
    assert all(a < b for a, b in zip(found["after"], found["before"], strict=True))
    assert found["rows"]
    assert all(found["rows"])
