"""The report of a run: what it came to, before and after, on episodes that it was not trained on.

On the test split nothing was chosen. On the validation split the checkpoint is the best of several
looks at (some of) the same episodes, so its score, gain and intervals are flattered; the result and
what is shown say so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors import SafetensorError

from agents import runs
from agents.base import Agent
from agents.checkpoints import has_checkpoint
from agents.evaluation import Evaluation, with_interval
from agents.tracking import Tracker
from llm_envs.core.rendering import printable


def report(
    agent: Agent[Any],
    begin: Callable[[], Agent[Any]],
    folder: Path,
    *,
    split: Literal["test", "validation"],
    tracker: Tracker,
    console: Console,
    samples: int,
) -> None:
    """Score the initial policy and the chosen checkpoint on the same episodes; write and show.

    Args:
        agent: The agent after training, which is chosen if there was no validation.
        begin: Makes the agent as it was before.
        folder: The run folder.
        split: What is scored.
        tracker: Takes transcripts and summary.
        console: Where it is shown.
        samples: Episodes to show.

    Raises:
        OSError: What is to be scored cannot be read, or the result cannot be written.
    """
    console.print(f"Scoring the policy on the {split} split, before and after …")
    with _readable(f"The policy {agent.policy_name} that the run began from", "Put it back."):
        initial = begin()
    before = initial.evaluate(split)
    del initial  # memory may not hold one more model
    best = folder / "checkpoints" / "best"
    validated, chosen = has_checkpoint(best), agent
    if validated:
        cure = "Move it away, and the last checkpoint is scored in its place."
        with _readable(f"The checkpoint {best}", cure):
            chosen = type(agent).load(best, device=agent.device)
    after = chosen.evaluate(split)
    gain, *bounds = after.gain_over(before)
    result = {
        "env": agent.env_id,
        "agent": agent.name,
        "policy": agent.policy_name,
        "seed": agent.seed,
        "env_steps": agent.env_steps,
        "chosen_at": chosen.env_steps,
        "chosen_on": "validation" if validated else None,
        "before": before.summary(),
        "after": after.summary(),
        "gain": {"score": gain, "ci95": bounds},
    }
    runs.write_json(folder / "result.json", result)
    tracker.transcripts(
        [{**t, "when": w} for w, e in (("before", before), ("after", after)) for t in e.transcripts]
    )
    tracker.summary(result)
    _show_samples(before, after, console, samples)
    _show_scores(before, after, result, console)
    _list_files(folder, console)


def _show_scores(
    before: Evaluation, after: Evaluation, result: dict[str, Any], console: Console
) -> None:
    split, validated = after.split, result["chosen_on"] is not None
    table = Table(title=f"{result['env']}, {split} split, {len(after.ids)} episodes, greedy")
    for column in ("", "before", "after"):
        table.add_column(column)
    table.add_row(
        "score [95 % interval]", *(with_interval(result[when]) for when in ("before", "after"))
    )
    labels = {"contains": "holds a right answer (not rewarded)"}
    for name in after.parts:
        label = labels.get(name, name)
        table.add_row(label, f"{before.part(name):.3f}", f"{after.part(name):.3f}")
    console.print(table)
    gain, (low, high) = result["gain"]["score"], result["gain"]["ci95"]
    console.print(
        f"Paired gain: [bold]{gain:+.3f}[/] [{low:+.3f}, {high:+.3f}]; "
        f"{'validation chose' if validated else 'without validation it is'} the checkpoint at "
        f"{result['chosen_at']:,} steps."
    )
    if validated and split == "validation":
        console.print(
            "It was chosen by its score on episodes of this very split, which flatters these "
            "figures; --report test scores others."
        )


def _list_files(folder: Path, console: Console) -> None:
    console.print(f"Written to {escape(str(folder))}:", soft_wrap=True)
    chosen_by = {"checkpoints/best": " (chosen by validation)"}
    for name in (
        "config.json metrics.jsonl result.json transcripts.jsonl curve.png checkpoints/best "
        "checkpoints/last wandb tensorboard"
    ).split():
        if (folder / name).exists():
            console.print(f"  {name}{chosen_by.get(name, '')}", highlight=False)


def _show_samples(before: Evaluation, after: Evaluation, console: Console, count: int) -> None:
    sides = [_by_episode(e) for e in (before, after)]
    episodes = list(sides[0])
    for episode in episodes[:: max(1, len(episodes) // max(1, count))][:count]:
        console.print(f"\n[bold]{escape(episode[0])}[/]")
        # An episode may be longer with other answers.
        for old, new in zip_longest(*(side[episode] for side in sides)):
            question = printable((old or new)["question"])
            console.print(f"  [cyan]user[/]   {escape(question)}", highlight=False)
            for label, shown in (("before", old), ("after ", new)):
                if shown is None:
                    console.print(f"  [yellow]{label}[/] (was over)", highlight=False)
                    continue
                score = "-" if shown["score"] is None else f"{shown['score']:.2f}"
                answer = escape(printable(shown["answer"]))
                console.print(f"  [yellow]{label}[/] {answer}  [bold]{score}[/]", highlight=False)


def _by_episode(evaluation: Evaluation) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return the turns of each episode: by its example, and the how manieth of it it is."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    times: Counter[str] = Counter()
    for turn in evaluation.transcripts:
        example = turn["example_id"]
        times[example] += turn["turn"] == 0
        found.setdefault((example, times[example]), []).append(turn)
    return found


@contextlib.contextmanager
def _readable(what: str, cure: str) -> Iterator[None]:
    """Tell why something cannot be loaded, whatever it is that has been damaged."""
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise OSError(
            f"{what} cannot be loaded ({type(error).__name__}: {error}). Nothing that was trained "
            f"is lost, and nothing was scored. {cure}"
        ) from error
