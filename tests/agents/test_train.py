"""The train command: what a run leaves behind, and that stopping, killing and mistakes are safe."""

import ast
import collections
import dataclasses
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import arguments, train
from agents.base import Agent
from agents.registry import AGENTS
from agents.reinforce import Reinforce
from agents.settings import AgentConfig, ReinforceConfig
from installed import playable_ids
from runs import assert_same, checkpoint, history, of_kind, outcome, rows_in

TESTS = Path(__file__).parent

# Eight updates of eight answers. Entropy and KL make every gradient differ from zero, whatever the
# embedded model can do; validation, checkpoints and the end never fall on every update.
SMALL = shlex.split(
    "--steps 64 --prompts 4 --group-size 2 --max-new-tokens 4 --eval-episodes 4 --eval-every 2 "
    "--checkpoint-every 3 --entropy-coef 0.01 --kl-coef 0.01 --learning-rate 1e-3 --seed 5 "
    "--device cpu --quiet"
)
RUN_FOLDER = {
    "config.json", "metrics.jsonl", "result.json", "transcripts.jsonl", "curve.png", "checkpoints",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """No account, no files outside; the signal handlers are left as they were found."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    folder = tmp_path_factory.mktemp("world")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(folder / name))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of new processes
    monkeypatch.chdir(folder)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a data set of a few dialogues in each split, so that scoring takes no time."""
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    rows = [
        {
            "id": f"{split}-{i}",
            "passage": f"The capital of {name} is {name}ville.",
            "turns": [{"question": f"What is the capital of {name}?", "answers": ["It is", name]}],
            "split": split,
        }
        for split in ("train", "validation", "test")
        for i, name in enumerate(f"{split}{letter}".capitalize() for letter in "abcdef")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--env-kwargs", json.dumps({"dataset": str(path), "max_turns": 1})]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dialogues: list[str]) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.main([*SMALL, *dialogues, "--track", "jsonl", "--out", str(folder)])
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Give what is said to a command that is refused before any training."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert told.out == ""
    return told.err


def command(*argv: str, script: str = "", **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own; a script is run before, in the same process."""
    code = f"{script}\nfrom agents import train\ntrain.main()"
    start = ["-c", code] if script else ["-m", "agents.train"]
    return subprocess.run(
        [sys.executable, *start, *argv],
        **{"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 600}
        | changes,
    )


def at_call(number: int, method: str, action: str) -> str:
    """A script that does something as a method of agents is entered for the n-th time."""
    return f"""
import os, signal
from agents.reinforce import Reinforce
original, calls = Reinforce.{method}, []
def counted(self, *arguments, **named):
    calls.append(0)
    if len(calls) == {number}:
        {action}
    return original(self, *arguments, **named)
Reinforce.{method} = counted
"""


# --- a complete run ------------------------------------------------------------------------------


def test_a_complete_run_writes_the_run_folder(
    tmp_path: Path, dialogues: list[str], read_wandb: Callable[[Path], list[Any]]
) -> None:
    folder = tmp_path / "a run [1]"  # neither the shell nor rich may stumble over it
    ended = command(*SMALL, *dialogues, "--out", str(folder), env={**os.environ, "COLUMNS": "60"})
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert {p.name for p in folder.iterdir()} == RUN_FOLDER | {"wandb"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", "best"}

    config = json.loads((folder / "config.json").read_text())
    fields = {f.name for f in dataclasses.fields(arguments.Arguments)}
    assert config.keys() == fields | {"version", "processes", "wandb_id"}
    assert config["settings"].keys() == {f.name for f in dataclasses.fields(ReinforceConfig)}
    assert config["settings"]["threads"] == torch.get_num_threads()
    assert (config["steps"], config["seed"], config["env_kwargs"]["max_turns"]) == (64, 5, 1)

    result = json.loads((folder / "result.json").read_text())
    assert {"env", "agent", "policy", "seed", "env_steps", "before", "after"} <= result.keys()
    assert (result["env"], result["agent"]) == ("DialogueQA-v0", "reinforce")
    assert (result["policy"], result["seed"], result["env_steps"]) == ("tiny", 5, 64)
    for when in ("before", "after"):
        scored = result[when]
        low, high = scored["ci95"]
        assert 0 <= low <= scored["score"] <= high <= 1
        assert (scored["split"], scored["episodes"]) == ("test", 6)

    transcripts = [json.loads(t) for t in (folder / "transcripts.jsonl").read_text().splitlines()]
    count = collections.Counter((t["when"], t["split"]) for t in transcripts)
    assert count == {("before", "test"): 6, ("after", "test"): 6}

    from PIL import Image

    with Image.open(folder / "curve.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.getcolors(maxcolors=2**24) or []) > 10  # something is drawn

    rows = rows_in(folder)
    assert [r["env_steps"] for r in rows if "train/loss" in r] == [*range(8, 65, 8)]
    assert [r["env_steps"] for r in rows if "eval/score" in r] == [0, 16, 32, 48, 64]
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    *logged, table = history(read_wandb(file)).values()
    assert logged == rows
    assert "transcripts" in str(table)

    for said in ("Paired gain", "Scoring the policy on the test split", "before", "after"):
        assert said in ended.stdout
    for name in RUN_FOLDER:
        assert name in ended.stdout
    [sync] = [line for line in ended.stdout.splitlines() if " sync " in line]
    assert Path(shlex.split(sync)[-1]) == file.parent  # can be copied from a narrow terminal


def test_p25_one_seed_twice_is_the_same_run_and_another_is_not(
    tmp_path: Path, dialogues: list[str], whole: Path
) -> None:
    for name, seed in (("again", "5"), ("other", "6")):
        train.main(
            [*SMALL, *dialogues, "--track=jsonl", "--out", str(tmp_path / name), "--seed", seed]
        )
    assert_same(outcome(tmp_path / "again"), outcome(whole))
    mine, its = (checkpoint(f / "checkpoints" / "last") for f in (tmp_path / "other", whole))
    weights = "policy/model.safetensors"
    assert any(not torch.equal(mine[weights][k], its[weights][k]) for k in its[weights])
    assert not torch.equal(*(c["state.safetensors"]["generator"] for c in (mine, its)))


def test_track_decides_what_is_written(
    tmp_path: Path, dialogues: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {p.name for p in whole.iterdir()} == RUN_FOLDER
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = tmp_path / "run"
    train.main([*SMALL, *dialogues, "--steps=8", "--track=wandb", "--out", str(out)])
    written = {p.name for p in out.iterdir()} - {"wandb"}
    assert written == {"config.json", "result.json", "checkpoints"}


def test_a_run_in_tensorboard_and_with_its_checkpoint_in_wandb(
    tmp_path: Path, dialogues: list[str], whole: Path, read_wandb: Callable[[Path], list[Any]]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    ended = command(
        *SMALL, *dialogues, "--track", "wandb", "tensorboard,jsonl", "--wandb-checkpoint",
        "--out", str(out), env={**os.environ, "WANDB_TAGS": "mine"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert json.loads((out / "config.json").read_text())["track"] == "wandb,tensorboard,jsonl"
    assert "  tensorboard\n" in ended.stdout  # among what was written
    assert_same(outcome(out), outcome(whole))

    rows = rows_in(out)
    read = EventAccumulator(str(out / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == {name for row in rows for name in row} - {"env_steps"}
    for name in read.Tags()["scalars"]:
        logged = [(row["env_steps"], row[name]) for row in rows if name in row]
        assert [(e.step, pytest.approx(e.value)) for e in read.Scalars(name)] == logged

    [file] = (out / "wandb").glob("offline-run-*/*.wandb")
    records = read_wandb(file)
    [run, *_] = of_kind(records, "run")
    assert list(run.tags) == ["DialogueQA-v0", "reinforce", "tiny", "llm-envs 0.1.0", "mine"]
    [artifact] = [a for a in of_kind(records, "artifact") if a.type == "model"]
    held = {entry.path: Path(entry.local_path).read_bytes() for entry in artifact.manifest.contents}
    best = out / "checkpoints" / "best"
    assert held == {
        str(path.relative_to(best)): path.read_bytes() for path in best.rglob("*") if path.is_file()
    }


def test_a_run_of_a_sweep_has_the_id_that_the_sweep_gave_it(
    tmp_path: Path, dialogues: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "sweep1d")
    train.main([*SMALL, *dialogues, "--steps=8", "--track=jsonl", "--report=none"])
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-sweep1d")
    assert json.loads((folder / "config.json").read_text())["wandb_id"] == "sweep1d"


@pytest.mark.parametrize(
    "given", ["wandb,jsonl", "wandb jsonl", "wandb, jsonl", "'wandb jsonl'", "wandb , jsonl,"]
)
def test_track_takes_commas_and_spaces(given: str) -> None:
    words = shlex.split(f"--seed=1 --track {given} --agent ppo")
    assert arguments.parse(words).track == "wandb,jsonl"


def test_a_split_that_chose_the_checkpoint_is_said_to_flatter_it(
    tmp_path: Path, dialogues: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, *dialogues, "--track=jsonl", "--steps=8"]
    for split in ("validation", "test"):
        train.main([*arguments, f"--report={split}", "--out", str(tmp_path / split)])
        said = " ".join(capsys.readouterr().out.split())
        assert ("which flatters these figures" in said) == (split == "validation")
        result = json.loads((tmp_path / split / "result.json").read_text())
        assert result["chosen_on"] == "validation"


def test_without_validation_the_last_checkpoint_is_reported(
    tmp_path: Path, dialogues: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, *dialogues, "--track=jsonl", "--steps=16", "--eval-every=0"]
    train.main([*arguments, "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "without validation it is the checkpoint at 16 steps" in " ".join(said.split())
    assert "checkpoints/best" not in said
    assert json.loads((tmp_path / "run" / "result.json").read_text())["chosen_at"] == 16


# --- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "method", "call", "stopped_at"),
    [
        (signal.SIGTERM, "update", 5, 40),
        (signal.SIGINT, "update", 8, 64),  # the last one: only the scoring is left
        (signal.SIGTERM, "evaluate", 1, 8),  # before the first update
        (signal.SIGINT, "evaluate", 3, 32),  # after an update that needs no checkpoint
        (signal.SIGTERM, "save", 1, 32),  # while a checkpoint of update 3 is written
    ],
)
def test_p24_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path,
    dialogues: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    method: str,
    call: int,
    stopped_at: int,
) -> None:
    folder = tmp_path / "a run"
    calls: list[int] = []
    original = getattr(Reinforce, method)

    def signalled(self: Agent[Any], *arguments: Any, **named: Any) -> Any:
        if arguments != (folder / "checkpoints" / "best",):  # how often depends on the model
            calls.append(0)
            if len(calls) == call:
                signal.raise_signal(number)
                for each in (signal.SIGINT, signal.SIGTERM):  # the next one ends the process
                    assert signal.getsignal(each) == signal.SIG_DFL
        return original(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Reinforce, method, signalled)
        train.main([*SMALL, *dialogues, "--track", "jsonl", "--out", str(folder)])
    said, noted = capfd.readouterr()
    assert f"Stopped and saved after {stopped_at} steps" in said
    assert "Once more ends at once" in noted
    assert not (folder / "result.json").exists()
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert state["env_steps"] == stopped_at

    [told] = [line for line in said.splitlines() if "--resume" in line]
    words = shlex.split(told)
    assert words[1:3] == ["-m", "agents.train"]
    assert Path(shutil.which(words[0]) or "").samefile(sys.executable)
    train.main(words[3:])
    assert_same(outcome(folder), outcome(whole))


def test_p24_a_run_stopped_while_it_is_scored_has_its_result_later(
    tmp_path: Path,
    dialogues: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = Reinforce.evaluate

    def signalled(self: Agent[Any], split: Any, **named: Any) -> Any:
        if split == "test":
            signal.raise_signal(signal.SIGTERM)
        return original(self, split, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Reinforce, "evaluate", signalled)
        train.main([*SMALL, *dialogues, "--track", "jsonl", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "Stopped before the test split was scored" in said
    assert f"--resume {tmp_path / 'run'}" in said
    assert not (tmp_path / "run" / "result.json").exists()
    train.main(["--resume", str(tmp_path / "run")])
    assert_same(outcome(tmp_path / "run"), outcome(whole))


def test_p24_ctrl_c_stops_the_process_and_wandb_goes_on_under_the_same_id(
    tmp_path: Path,
    dialogues: list[str],
    whole: Path,
    read_wandb: Callable[[Path], list[Any]],
) -> None:
    folder = tmp_path / "run"
    # A terminal sends Ctrl-C to the whole group of processes, W&B's service included.
    script = at_call(5, "update", "os.killpg(0, signal.SIGINT)")
    stopped = command(
        *SMALL, *dialogues, "--out", str(folder), script=script, start_new_session=True
    )
    assert stopped.returncode == 0, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "RuntimeWarning" not in stopped.stderr
    assert f"--resume {folder}" in stopped.stdout
    resumed = command("--resume", str(folder))
    assert resumed.returncode == 0, resumed.stderr
    assert_same(outcome(folder), outcome(whole))

    files = sorted(
        (folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime
    )
    assert len(files) == 2
    assert len({f.name for f in files}) == 1  # run-<id>.wandb
    first, second = (list(history(read_wandb(f)).values()) for f in files)
    assert first + second[:-1] == rows_in(folder)
    assert "transcripts" in str(second[-1])


@pytest.mark.parametrize(
    ("script", "kept"),
    [
        (at_call(2, "update", "os.kill(os.getpid(), signal.SIGKILL)"), None),
        pytest.param(
            at_call(6, "update", "os.kill(os.getpid(), signal.SIGKILL)"),
            24,
            marks=pytest.mark.slow,  # test_state kills at random moments
        ),
        (
            # The second time that a checkpoint "last" is moved out of the way, before the new one
            # takes its place.
            """
import os, signal
original = os.replace
def replace(old, new):
    original(old, new)
    if str(new).endswith("last.old"):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
""",
            24,
        ),
    ],
    ids=["before the first checkpoint", "between checkpoints", "between two renames"],
)
def test_p24_a_killed_run_goes_on_from_its_last_checkpoint(
    tmp_path: Path, dialogues: list[str], whole: Path, script: str, kept: int | None
) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, *dialogues, "--track", "jsonl", "--out", str(folder)]
    assert command(*arguments, script=script).returncode == -signal.SIGKILL
    wandb_id = json.loads((folder / "config.json").read_text())["wandb_id"]
    if kept is None:
        assert not any((folder / "checkpoints").glob("last*"))
    else:
        assert Reinforce.load(folder / "checkpoints" / "last", device="cpu").env_steps == kept
    train.main(["--resume", str(folder)])
    assert_same(outcome(folder), outcome(whole))
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", "best"}
    state = json.loads((folder / "checkpoints" / "last" / "state.json").read_text())
    assert state["tracker"]["wandb_id"] == wandb_id


def test_a_second_signal_ends_at_once(tmp_path: Path, dialogues: list[str]) -> None:
    twice = "[os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]"
    arguments = [*SMALL, *dialogues, "--track", "jsonl", "--out", str(tmp_path / "run")]
    ended = command(*arguments, script=at_call(2, "update", twice))
    assert ended.returncode == -signal.SIGTERM
    assert len(rows_in(tmp_path / "run")) == 2  # not even the update was ended
    assert "Traceback" not in ended.stderr


def test_p24_a_resumed_run_computes_with_the_same_number_of_threads(
    tmp_path: Path, dialogues: list[str]
) -> None:
    before = torch.get_num_threads()
    arguments = [*SMALL, *dialogues, "--track=jsonl", "--report=none", "--steps=8"]
    train.main([*arguments, "--out", str(tmp_path / "run")])
    try:
        torch.set_num_threads(before + 1)  # another machine
        train.main(["--resume", str(tmp_path / "run"), "--steps=16"])
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("given", [["--steps", "64"], ["--steps=64"]])
def test_a_run_that_ended_goes_on_further(
    tmp_path: Path,
    dialogues: list[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, *dialogues, "--track", "jsonl", "--report", "none", "--steps", "32"]
    train.main([*arguments, "--out", str(folder)])
    state = folder / "checkpoints" / "last" / "state.json"
    assert json.loads(state.read_text())["env_steps"] == 32
    monkeypatch.setattr(sys, "argv", ["pytest"])  # what main was given counts, and nothing else
    train.main(["--resume", str(folder), *given])
    assert json.loads((folder / "config.json").read_text())["steps"] == 64
    assert_same(
        checkpoint(folder / "checkpoints" / "last"), checkpoint(whole / "checkpoints" / "last")
    )
    monkeypatch.setattr(sys, "argv", ["train", "--steps", "8"])  # somebody else's
    train.main(["--resume", str(folder)])
    assert json.loads((folder / "config.json").read_text())["steps"] == 64


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        ("--agent reinforc", ["'reinforc'", "Did you mean 'reinforce'"]),
        ("--agent=ppoo", ["'ppoo'", "There are: reinforce"]),
        ("--env DialogQA-v0", ["'DialogQA-v0'", "Did you mean 'DialogueQA-v0'", "Summarization"]),
        ("--env=Nope", ["'Nope'", "There are: DialogueQA-v0"]),
        ("--learning-rat 1", ["--learning-rat", "--learning-rate"]),
        ("--steps many", ["--steps", "many"]),
        ("--steps 0", ["--steps is 0", "1 or more"]),
        ("--seed -1", ["seed is -1", "cannot be negative"]),
        ("--prompts 0", ["prompts is 0", "1 or more"]),
        ("--group-size 1", ["group_size is 1", "Use 2 or more"]),
        ("--eval-episodes 0", ["eval_episodes is 0", "1 or more"]),
        ("--threads 0", ["threads is 0", "1 or more"]),
        ("--temperature -1", ["temperature is -1", "0"]),
        ("--env-kwargs {max_turns:2}", ["--env-kwargs is not JSON", "{max_turns:2}", "quotes"]),
        ("--env-kwargs [1]", ["--env-kwargs is [1]", "JSON object"]),
        ("""--env-kwargs '{"turns": 2}'""", ["'turns'", "max_turns"]),
        ("""--env-kwargs '{"num_envs": 2}'""", ["num_envs", "--prompts"]),
        ("""--env-kwargs '{"dataset": "no/such/file"}'""", ["no/such/file", "embedded"]),
        ("--policy no/such/folder/here", ["no/such/folder/here", "'tiny'"]),
        ("--device nonsense", ["--device nonsense", "auto"]),
        ("--device cuda:99", ["--device cuda:99", "auto"]),
        ("--track jsnl", ["'jsnl'", "jsonl"]),
        ("--track ''", ["''", "wandb, jsonl"]),
        ("--track jsonl --wandb-checkpoint", ["--track is jsonl", "--track wandb,jsonl"]),
        ("--report train", ["--report", "train", "validation"]),
        ("--resume no/such/run", ["no/such/run is not a run", "config.json"]),
    ],
)
def test_mistakes_are_told_in_a_sentence_and_leave_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, told: list[str]
) -> None:
    said = refusal(capsys, "--out", str(tmp_path / "run"), *shlex.split(argv))
    for words in told:
        assert words in " ".join(said.replace("│", "").split())
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_without_a_split_that_is_needed_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"question": "Who?", "answers": ["I"]}]
    row = {"id": "1", "passage": "I am.", "turns": turns, "split": "train"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    argv = ["--env-kwargs", json.dumps({"dataset": str(path)}), "--out", str(tmp_path / "run")]
    assert "validation" in refusal(capsys, *argv)
    assert "test" in refusal(capsys, *argv, "--eval-every", "0")
    assert not (tmp_path / "run").exists()


def test_a_mistake_ends_the_process_with_a_sentence_on_standard_error(tmp_path: Path) -> None:
    ended = command("--agent", "nobody", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == f"There is no agent 'nobody'. There are: {', '.join(AGENTS)}.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["below a file", "a file", "read only"])
def test_a_folder_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").mkdir(mode=0o500)
    if place == "read only" and os.access(tmp_path / "closed", os.W_OK):
        pytest.skip("root may write everywhere")
    folder = (
        tmp_path / {"below a file": "file/run", "a file": "file", "read only": "closed/run"}[place]
    )
    said = refusal(capsys, "--out", str(folder), "--track", "jsonl")
    assert f"The run folder {folder} cannot be written (" in said
    assert "Nothing was trained" in said
    assert "--out" in said


def test_a_full_disk_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 3 * 2**20))
    said = refusal(capsys, "--out", str(tmp_path / "run"))
    assert "has 3 MiB free" in said
    assert "200 MiB" in said
    assert not (tmp_path / "run").exists()
    before = sorted(whole.rglob("*"))
    assert "has 3 MiB free" in refusal(capsys, "--resume", str(whole), "--steps", "128")
    assert sorted(whole.rglob("*")) == before
    assert json.loads((whole / "config.json").read_text())["steps"] == 64
    # Room for a small run, and not for the checkpoints of this model.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 201 * 2**20))
    monkeypatch.setattr(torch.nn.Parameter, "element_size", lambda self: 2**16, raising=False)
    assert "has 201 MiB free" in refusal(capsys, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_later_ends_the_run_with_how_to_go_on(
    tmp_path: Path,
    dialogues: list[str],
    whole: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agents.policy_agent.save_file", full)
        with pytest.raises(SystemExit) as ended:
            train.main([*SMALL, *dialogues, "--track=jsonl", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "No space left on device" in said
    assert f"--resume {tmp_path / 'run'}" in said
    train.main(["--resume", str(tmp_path / "run")])
    assert_same(outcome(tmp_path / "run"), outcome(whole))


def test_a_folder_that_holds_a_run_is_refused(
    capsys: pytest.CaptureFixture[str], whole: Path
) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    said = refusal(capsys, "--out", str(whole))
    assert f"{whole} holds a run already" in said
    assert "--resume" in said
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_a_mistake_leaves_a_folder_that_was_there_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal(capsys, "--out", str(tmp_path), "--policy", "no/such/folder/here")
    assert tmp_path.is_dir()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--seed 6", ["--seed 5", "--seed 6"]),
        ("--learning-rate=0.5", ["--learning-rate 0.001", "--learning-rate 0.5"]),
        ("--env Summarization-v0", ["--env DialogueQA-v0", "--env Summarization-v0"]),
        ("--track wandb", ["--track jsonl", "--track wandb"]),
        ("--steps 8", ["--steps is 8", "64 steps already"]),
    ],
)
def test_a_resumed_run_keeps_its_arguments(
    capsys: pytest.CaptureFixture[str], whole: Path, given: str, told: list[str]
) -> None:
    before = outcome(whole)
    said = refusal(capsys, "--resume", str(whole), *shlex.split(given))
    for words in told:
        assert words in said
    assert_same(outcome(whole), before)
    assert json.loads((whole / "config.json").read_text())["steps"] == 64


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("config.json", "{", ["config.json is damaged", "not JSON"]),
        ("config.json", "[]", ["config.json is damaged", "lacks agent"]),
        ("config.json", None, ["is not a run"]),
        ("checkpoints/last/state.json", "{", ["last is damaged", "--policy"]),
        ("checkpoints/last/state.json", "{}", ["last is damaged", "'agent'"]),
        ("checkpoints/last/state.safetensors", "{}", ["last is damaged", "--policy"]),
    ],
)
def test_a_damaged_run_is_refused_with_the_file_and_a_cure(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    whole: Path,
    file: str,
    content: str | None,
    told: list[str],
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / file
    path.unlink() if content is None else path.write_text(content)
    said = refusal(capsys, "--resume", str(tmp_path / "run"))
    for words in told:
        assert words in said


# --- help and presets ----------------------------------------------------------------------------


def documented(cls: type) -> dict[str, str]:
    """Give the docstring under each field of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        [definition] = ast.parse(inspect.getsource(base)).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                found[field.target.id] = ast.literal_eval(below.value)
    return found


def shown_help(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main([*argv, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", "").split())


def test_help_tells_what_each_setting_means(capsys: pytest.CaptureFixture[str]) -> None:
    shown = shown_help(capsys)
    documentation = documented(arguments.Arguments) | documented(ReinforceConfig)
    fields = {f.name for c in (arguments.Arguments, ReinforceConfig) for f in dataclasses.fields(c)}
    assert documentation.keys() == fields
    assert {f.name for f in dataclasses.fields(AgentConfig)} < fields
    for name, meaning in documentation.items():
        if name != "settings":
            assert f"--{name.replace('_', '-')} " in shown.replace(",", " "), name
            assert " ".join(meaning.split()) in shown, name


@pytest.mark.parametrize(
    "given",
    ["--env Summarization-v0", "--env=Summarization-v0", "--env llm_envs/Summarization-v0",
     "--env=llm_envs:Summarization-v0", "--env DialogueQA-v0 --env Summarization-v0"],
)  # fmt: skip
def test_an_environment_brings_its_settings_and_the_command_line_overrules(given: str) -> None:
    a = arguments.parse(shlex.split(given))
    assert a.env.endswith("Summarization-v0")
    assert a.settings.max_new_tokens == arguments.PRESETS["Summarization-v0"]["max_new_tokens"]
    given_more = [*shlex.split(given), "--max-new-tokens", "7"]
    assert arguments.parse(given_more).settings.max_new_tokens == 7
    defaults = ReinforceConfig(**arguments.PRESETS["DialogueQA-v0"])
    assert arguments.parse(["--agent=reinforce"]).settings == defaults


@pytest.mark.parametrize("words", [["--help"], ["--agent", "sb3-ppo", "--help"], ["--stepps", "3"]])
def test_the_command_line_is_answered_without_torch(words: list[str]) -> None:
    said = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "agents.train", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "--max-grad-norm" in said.stdout if "--help" in words else "--steps" in said.stderr
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in said.stderr.split("\n")
    }
    assert "tyro" in imported
    assert not imported & {"torch", "transformers", "stable_baselines3", "wandb", "matplotlib"}


def test_help_shows_the_settings_of_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert "(default: 40)" in shown_help(capsys, "--env=Summarization-v0")
    assert "(default: 40)" not in shown_help(capsys)


@pytest.mark.parametrize("env", sorted({*arguments.PRESETS} & {*playable_ids()}))
def test_presets_suit_their_environment(tmp_path: Path, env: str) -> None:
    train.main(
        [*SMALL, "--env", env, "--steps=8", "--eval-every=0", "--report=none", "--track=jsonl",
         "--out", str(tmp_path / "run")]
    )  # fmt: skip
    [row] = rows_in(tmp_path / "run")
    assert row["train/loss"] is not None
