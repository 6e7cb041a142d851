"""The comparison page on Weights & Biases: ``python -m benchmarks.workspace --entity NAME``.

It makes a workspace (one line for each environment, agent and policy, its seeds averaged) and a
report (the same plots for each environment, and what was asked and answered). ``--dry-run`` prints
both as JSON, and needs neither an account nor a server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import tyro

import llm_envs
from agents.tracking import METRICS
from agents.tracking_wandb import has_account

SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Validation": ("eval/score",),
    "Rollouts": ("rollout/score", "rollout/regret", "rollout/reward", "rollout/answer_tokens"),
    "KL and entropy": ("train/kl", "train/approx_kl", "train/entropy"),
    "Optimisation": ("train/loss", "train/grad_norm", "train/learning_rate"),
    "Throughput": ("perf/tokens_per_second", "perf/env_steps_per_second"),
}
"""Section -> the metrics that it plots."""

X_AXIS: Final = "env_steps"
GROUP: Final = "Group"
JOB_TYPE: Final = "JobType"
POLICY: Final = "policy"
"""What runs are grouped by: W&B's group (the environment), job type (the agent), and a key of the
configuration. Runs that agree in all of them differ in their seeds, and are averaged."""


@dataclass(frozen=True)
class Options:
    """Where the page is made, and of what."""

    entity: str
    """W&B user or team."""
    project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT", "llm-envs"))
    """W&B project."""
    envs: tuple[str, ...] = ()
    """Environments of the report; by default all."""
    name: str = "Comparison of agents"
    """Name of the workspace and title of the report."""
    dry_run: bool = False
    """Save nothing; print the workspace and the report as JSON."""
    out: Path | None = None
    """Where the JSON goes in place of the terminal."""


def library() -> Any:
    """Import wandb-workspaces.

    Returns:
        Its modules ``workspaces``, ``reports`` and ``expr``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        from wandb_workspaces import expr, workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise ImportError(
            f"The comparison page needs wandb-workspaces ({error}). Install the extra: "
            "pip install 'llm-envs[workspace]'"
        ) from error
    return SimpleNamespace(workspaces=workspaces, reports=v2, expr=expr)


def plots(metrics: Sequence[str]) -> list[Any]:
    """Return a learning curve of each metric: of a group its mean and standard error."""
    wr = library().reports
    return [
        wr.LinePlot(
            title=metric,
            x=X_AXIS,
            y=[metric],
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for metric in metrics
    ]


def workspace(o: Options) -> Any:
    """Return the workspace, which nothing but its ``save`` sends to a server."""
    found = library()
    ws, expr = found.workspaces, found.expr
    return ws.Workspace(
        entity=o.entity,
        project=o.project,
        name=o.name,
        sections=[
            ws.Section(
                name=section,
                panels=plots(metrics),
                is_open=True,
                panel_settings=ws.SectionPanelSettings(x_axis=X_AXIS),
            )
            for section, metrics in SECTIONS.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=X_AXIS, max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric(GROUP), expr.Metric(JOB_TYPE), expr.Config(POLICY)],
            pinned_columns=["summary:eval/score.max", "summary:env_steps"],
        ),
    )


def report(o: Options) -> Any:
    """Return the report, which nothing but its ``save`` sends to a server."""
    wr = library().reports
    metrics = [metric for section in SECTIONS.values() for metric in section]
    blocks = [
        wr.P(
            "One line for each agent and policy, with the mean and the standard error of its seeds."
        ),
        wr.UnorderedList([f"{metric}: {METRICS[metric]}" for metric in metrics]),
    ]
    for env in o.envs or llm_envs.registered_ids():
        # A run set without a project is of the project that the report lies in.
        runs: dict[str, Any] = {"name": env, "filters": f"Metric({GROUP!r}) == {env!r}"}
        grouped = wr.Runset(**runs, groupby=["run.jobType", f"config.{POLICY}"])
        transcripts = wr.WeavePanelSummaryTable(
            table_name="transcripts", layout=wr.Layout(w=24, h=12)
        )
        blocks += [
            wr.H2(env),
            wr.PanelGrid(runsets=[grouped], panels=plots(metrics)),
            wr.H3("What was asked and answered"),
            wr.PanelGrid(runsets=[wr.Runset(**runs)], panels=[transcripts]),
        ]
    return wr.Report(
        entity=o.entity,
        project=o.project,
        title=o.name,
        description="Written by python -m benchmarks.workspace.",
        blocks=blocks,
        width="fluid",
    )


def spec(o: Options) -> dict[str, Any]:
    """Return the workspace and the report as W&B's server takes them, as JSON."""
    return {
        name: made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, made in (("workspace", workspace(o)), ("report", report(o)))
    }


def main() -> None:
    """Make the page; without an account show what it would be, and say so."""
    try:
        o = tyro.cli(Options, description=__doc__, prog="python -m benchmarks.workspace")
        library()
        if o.dry_run or not has_account():
            text = json.dumps(spec(o), indent=1) + "\n"
            if o.out is None:
                print(text, end="")
            else:
                o.out.write_text(text, encoding="utf-8")
            if not o.dry_run:
                raise SystemExit(
                    "No W&B account is known, so nothing was saved. Run `wandb login`, then the "
                    "same command."
                )
            return
        import wandb

        try:
            for made in (report(o), workspace(o)):  # the report makes the project if there is none
                print(made.save().url)
        except wandb.Error as error:
            raise OSError(f"W&B did not take it ({type(error).__name__}: {error}).") from error
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
