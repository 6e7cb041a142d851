"""The comparison page: what it shows is what our runs log. No server is asked."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import llm_envs
from agents.arguments import Arguments
from agents.tracking import METRICS
from benchmarks import workspace
from benchmarks.workspace import SECTIONS, Options, main, spec


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, and a server that would refuse."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "wandb" / name))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def page() -> dict[str, Any]:
    return spec(Options("team", project="p"))


def all_of(key: str, tree: Any) -> Iterator[Any]:
    """Give the values of a key anywhere in JSON."""
    if isinstance(tree, dict):
        yield from (value for name, value in tree.items() if name == key)
    if isinstance(tree, dict | list):
        for below in tree.values() if isinstance(tree, dict) else tree:
            yield from all_of(key, below)


def plotted(tree: Any) -> list[str]:
    configs = [c for c in all_of("config", tree) if isinstance(c, dict) and "metrics" in c]
    assert {c["xAxis"] for c in configs} == {"env_steps"}
    assert all("groupBy" not in c for c in configs)  # the grouping of the runs is that of the plots
    assert {(c["groupAgg"], c["groupArea"]) for c in configs} == {("mean", "stderr")}
    return [metric for c in configs for metric in c["metrics"]]


def test_only_metrics_that_runs_log_are_plotted_against_environment_steps(
    page: dict[str, Any],
) -> None:
    wanted = [metric for metrics in SECTIONS.values() for metric in metrics]
    assert set(wanted) <= METRICS.keys()
    assert len(wanted) == len(set(wanted))
    assert {"eval/score", "rollout/score", "rollout/regret", "train/kl", "train/entropy"} < {
        *wanted
    }
    assert plotted(page["workspace"]) == wanted
    assert plotted(page["report"]) == wanted * len(llm_envs.registered_ids())


def test_the_workspace_has_the_sections_and_their_axis(page: dict[str, Any]) -> None:
    w = page["workspace"]
    assert (w["entity"], w["project"], w["displayName"]) == ("team", "p", "Comparison of agents")
    section = w["spec"]["section"]
    assert section["settings"]["xAxis"] == "env_steps"
    shown = section["panelBankConfig"]["sections"]
    assert [s["name"] for s in shown] == list(SECTIONS)
    assert {s["localPanelSettings"]["xAxis"] for s in shown} == {"env_steps"}
    assert {s["localPanelSettings"]["useRunsTableGroupingInPanels"] for s in shown} == {True}


def test_runs_are_grouped_by_what_they_have(page: dict[str, Any]) -> None:
    """Group and job type are what the tracker gives W&B; the rest are keys of the configuration."""
    [runs] = page["workspace"]["spec"]["section"]["runSets"]
    grouping = [(g["section"], g["name"]) for g in runs["grouping"]]
    assert grouping == [("run", "group"), ("run", "jobType"), ("config", "policy.value")]
    known = {f"{name}.value" for name in Arguments.__dataclass_fields__}
    for by in all_of("grouping", page):
        assert {g["name"] for g in by if g["section"] == "config"} <= known
        assert {g["name"] for g in by if g["section"] == "run"} <= {"group", "jobType"}
    best = [c for c in runs["runFeed"]["columnOrder"] if c.startswith("summary:")]
    assert best == ["summary:eval/score.max", "summary:env_steps"]


def test_the_report_has_plots_and_transcripts_for_each_environment() -> None:
    made = spec(Options("team", envs=("DialogueQA-v0", "Other-v0"), name="Mine"))["report"]
    assert (made["displayName"], made["project"]["entityName"]) == ("Mine", "team")
    grids = [b["metadata"] for b in made["spec"]["blocks"] if b["type"] == "panel-grid"]
    assert len(grids) == 4
    for env, (curves, transcripts) in zip(
        ("DialogueQA-v0", "Other-v0"), (grids[:2], grids[2:]), strict=True
    ):
        for grid in (curves, transcripts):
            [runs] = grid["runSets"]
            [only] = runs["filters"]["filters"]
            assert (only["key"]["name"], only["op"], only["value"]) == ("group", "=", env)
        [by] = all_of("grouping", curves)
        assert [g["name"] for g in by] == ["jobType", "policy.value"]
        places = [(p["layout"]["x"], p["layout"]["y"]) for p in all_panels(curves)]
        assert len(set(places)) == len(places)
        assert '"transcripts"' in json.dumps(transcripts)
    told = json.dumps(made["spec"]["blocks"])
    assert METRICS["rollout/regret"] in told


def all_panels(grid: dict[str, Any]) -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = grid["panelBankSectionConfig"]["panels"]
    return panels


def run(monkeypatch: pytest.MonkeyPatch, *argv: str) -> None:
    monkeypatch.setattr(sys, "argv", ["workspace", *argv])
    main()


def test_a_dry_run_prints_or_writes_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--entity", "team", "--dry-run")
    assert json.loads(capsys.readouterr().out).keys() == {"workspace", "report"}
    out = tmp_path / "page.json"
    run(monkeypatch, "--entity", "team", "--dry-run", "--out", str(out))
    assert capsys.readouterr().out == ""
    assert json.loads(out.read_text())["workspace"]["project"] == "llm-envs"


def test_without_an_account_it_is_shown_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="wandb login"):
        run(monkeypatch, "--entity", "team")
    assert json.loads(capsys.readouterr().out)["workspace"]["entity"] == "team"


def test_with_an_account_both_are_saved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = workspace.library()
    saved: list[str] = []

    def save(self: Any) -> Any:
        saved.append(type(self).__name__)
        return type("Saved", (), {"url": f"https://example.org/{len(saved)}"})

    monkeypatch.setattr(workspace, "has_account", lambda: True)
    monkeypatch.setattr(found.workspaces.Workspace, "save", save)
    monkeypatch.setattr(found.reports.Report, "save", save)
    run(monkeypatch, "--entity", "team")
    assert saved == ["Report", "Workspace"]
    assert capsys.readouterr().out.split() == ["https://example.org/1", "https://example.org/2"]


def test_what_the_server_refuses_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def save(self: Any) -> Any:
        raise wandb.Error("no such entity")

    monkeypatch.setattr(workspace, "has_account", lambda: True)
    monkeypatch.setattr(workspace.library().reports.Report, "save", save)
    with pytest.raises(SystemExit, match=r"W&B did not take it .*no such entity"):
        run(monkeypatch, "--entity", "team")


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--entity", "team", "--dry-run")
    assert "pip install 'llm-envs[workspace]'" in str(ended.value.code)
