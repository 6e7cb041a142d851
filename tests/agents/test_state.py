"""Checkpoints and failures: nothing is lost, nothing wrong is loaded, nothing goes on with NaN."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import llm_envs
from agents import PPO, CandidatePolicy, CausalLMPolicy, Reinforce, replay, runs, train
from agents.batches import read_batch, write_batch
from agents.checkpoints import content, has_checkpoint
from agents.registry import AGENTS, agent_class
from agents.rollout import collect, play
from llm_envs.core.task import ChoosingTask, Episode, Outcome
from runs import rows_in, timeless_rows_in
from three_tokens import Identity, Wanted, make_tokenizer, parameters, registered, task_fixture

# --- tasks, models, agents -----------------------------------------------------------------------


class Letters(Identity):
    """Say the letters that the user says, one a turn; "n" is scored with no number."""

    wrong = math.nan

    def __init__(self, split: str = "train", letters: tuple[str, ...] = ("a", "b")) -> None:
        shown = letters if split == "train" else tuple(word for word in letters if word != "n")
        super().__init__(split, shown)

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [
            Outcome(self.wrong if r == ("n",) else float(a in r))
            for a, r in zip(answers, references, strict=True)
        ]


class Endless(Letters):
    wrong = math.inf


class Mended(Letters):
    wrong = 0.5


class Pick(ChoosingTask[Wanted]):
    """Choose the letter that the user says; "n" is scored with no number."""

    def __init__(self, split: str = "train", letters: tuple[str, ...] = ("a", "b")) -> None:
        super().__init__(2, 1)
        self.examples = tuple(Wanted(f"{split} {word}", word) for word in letters)

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        candidates = tuple("ab" if rng.random() < 0.5 else "ba")
        features = np.array([[float(c == example.letters)] for c in candidates], np.float32)
        seen = {"prompt": example.letters, "candidates": candidates, "features": features}
        return Episode(example, rng, seen, ({"role": "user", "content": example.letters},))

    def candidate_scores(self, episode: Episode[Wanted]) -> Any:
        wanted = episode.example.letters
        return np.array([float(c == wanted) for c in episode.observation["candidates"]])

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [
            Outcome(math.nan if e.example.letters == "n" else self.candidate_scores(e)[a])
            for e, a in zip(episodes, actions, strict=True)
        ]

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        episode.finished = True
        said = episode.observation["candidates"][action]
        episode.messages += ({"role": "assistant", "content": said},)


TASKS = {"Letters-v9": Letters, "Endless-v9": Endless, "Pick-v9": Pick}

_tasks = task_fixture(TASKS)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of new processes
    monkeypatch.chdir(tmp_path)


def make_model(family: str = "llama", width: int = 16) -> Any:
    torch.manual_seed(0)
    ids: dict[str, Any] = {"vocab_size": 4, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**ids, n_positions=64, n_embd=16, n_layer=1, n_head=2))
    return LlamaForCausalLM(
        LlamaConfig(
            **ids,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.25,
        )
    )


def make_agent(name: str = "reinforce", env: str = "Letters-v9", **settings: Any) -> Any:
    cls = agent_class(name)
    policy: Any = CandidatePolicy if env == "Pick-v9" else CausalLMPolicy
    small: dict[str, Any] = {"prompts": 2, "group_size": 2, "max_new_tokens": 3}
    if name.startswith("sb3-"):
        small = {"n_envs": 2, "n_steps": 4}
        small |= {} if env == "Pick-v9" else {"max_new_tokens": 3}
    elif cls.config_class.default_policy == "none":
        small = {"episodes": 4}
    alone = cls.config_class.default_policy == "none" or (
        name.startswith("sb3-") and env == "Pick-v9"
    )
    made = "none" if alone else policy(make_model(), make_tokenizer())
    return cls(made, env, **{**small, "checkpoint_every": 1, "eval_every": 0, **settings})


def everything(folder: Path) -> dict[str, str]:
    """The digest of each file, without what is allowed to differ between two runs."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- commands in processes of their own ----------------------------------------------------------

ROOT = Path(__file__).parents[2]
IMPORTED = (str(ROOT), str(ROOT / "tests" / "helpers"))
WORKER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_state", {__file__!r})
here = sys.modules["test_state"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
import llm_envs
for name, task in here.TASKS.items():
    llm_envs.register(name, task)
"""


def process(script: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that knows the tasks of this file as ``here``."""
    return subprocess.run(
        [sys.executable, "-c", WORKER + script, *argv],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTED)},
    )


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    CausalLMPolicy(make_model(), make_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def command(policy_folder: Path) -> list[str]:
    """Arguments of a run of 6 updates of 4 answers."""
    return shlex.split(
        f"--env Letters-v9 --policy {policy_folder} --steps 24 --prompts 2 --group-size 2 "
        "--max-new-tokens 3 --eval-every 2 --checkpoint-every 1 --threads 1 --seed 3 "
        "--report none --track jsonl --device cpu --quiet"
    )


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said to a command that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# --- a crash at any moment -----------------------------------------------------------------------


def snapshots(watched: Path, kept: Path, action: Any) -> list[Path]:
    """Do something and copy a folder before every system call in it, wherever it has changed.

    What is in the folder then is what a process that is killed there leaves behind.
    """
    found: list[Path] = []
    seen: Any = None

    def look(frame: Any, event: str, called: Any) -> None:
        nonlocal seen
        owner = type(getattr(called, "__self__", None)).__module__  # of a file's methods
        modules = f"{getattr(called, '__module__', '')} {owner}"
        if event != "c_call" or not any(m in modules for m in ("posix", "_io", "safetensors")):
            return
        now = sorted((str(p), p.stat().st_size, p.stat().st_ino) for p in watched.rglob("*"))
        if now != seen:
            seen = now
            found.append(kept / f"{len(found):03}")
            shutil.copytree(watched, found[-1])

    sys.setprofile(look)
    try:
        action()
    finally:
        sys.setprofile(None)
    found.append(kept / "end")
    shutil.copytree(watched, found[-1])
    return found


@pytest.mark.parametrize("left", ["nothing", "an old one", "only one that was moved away"])
def test_p24_a_crash_at_any_system_call_of_save_leaves_a_whole_checkpoint(
    tmp_path: Path, left: str
) -> None:
    """Every moment at which the process can die is looked at, none left to chance."""
    agent = make_agent("ppo", kl_coef=0.1)
    folder = tmp_path / "checkpoints" / "last"
    folder.parent.mkdir()
    if left != "nothing":
        agent.learn(8)
        agent.save(folder)
        if "moved" in left:
            folder.rename(folder.with_name("last.old"))
    before, expected = agent.env_steps, {agent.env_steps: parameters(agent)}
    agent.learn(16)
    expected[16] = parameters(agent)
    found = snapshots(folder.parent, tmp_path / "kept", lambda: agent.save(folder))
    assert len(found) > 20, "the calls were not seen"
    agent.learn(24)
    steps = []
    for crashed in found:
        try:
            restored = PPO.load(crashed / "last", device="cpu")
        except ValueError:
            steps.append(0)
            assert left == "nothing", crashed
        else:
            steps.append(restored.env_steps)
            assert torch.equal(parameters(restored), expected[restored.env_steps])
        agent.save(crashed / "last")  # and it is no obstacle to the next one
        assert PPO.load(crashed / "last", device="cpu").env_steps == 24
        assert [p.name for p in crashed.iterdir()] == ["last"]
    assert steps == sorted(steps), "it went back"
    assert set(steps) == {before, 16}


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    missing: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noted(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(old: Any, new: Any) -> None:
        if Path(new) == tmp_path / "last":
            held = [Path(old), *Path(old).rglob("*")]
            missing.extend(str(p) for p in held if p.stat().st_ino not in synced)
            synced.clear()
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    make_agent().save(tmp_path / "last")
    assert missing == []
    assert tmp_path.stat().st_ino in synced, "the new name may be lost"


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_old_one(tmp_path: Path) -> None:
    agent = make_agent()
    agent.save(tmp_path / "last")
    first = parameters(agent)
    agent.learn(4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            agent.save(tmp_path / "last")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(parameters(Reinforce.load(tmp_path / "last", device="cpu")), first)


def kill_at_random(argv: list[str], run: str, kept: str, count: int) -> None:
    """Train in processes that are killed at random moments; keep what each of them leaves.

    A fork of this process, which has computed nothing yet, begins at once.
    """
    folder, rng = Path(run), random.Random(count)
    for k in range(count):
        begun = (folder / "config.json").exists()
        rows = len(rows_in(folder)) + rng.randrange(8)
        child = os.fork()
        if not child:
            train.main(["--resume", run] if begun else [*argv, "--out", run])
            os._exit(0)
        while not (folder / "config.json").exists() or len(rows_in(folder)) < rows:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0) == (child, signal.SIGKILL), "it ended by itself"
        shutil.copytree(folder, Path(kept) / str(k))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_p24_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    tmp_path: Path, command: list[str], kills: int
) -> None:
    whole, run, kept = tmp_path / "whole", tmp_path / "run", tmp_path / "kept"
    command += shlex.split(
        f"--agent ppo --kl-coef 0.1 --checkpoint-every 2 --steps {64 * kills}"  # 16 updates a kill
    )
    arguments = json.dumps([command, str(run), str(kept), kills])
    ended = process("import json\nhere.kill_at_random(*json.loads(sys.argv[1]))", arguments)
    assert ended.returncode == 0, ended.stderr
    reached = []
    for k in range(kills):
        seen = max([0, *(row["env_steps"] for row in rows_in(kept / str(k)))]) // 4
        # Every second update is saved, and its row is written before.
        reached.append(max(0, (seen - 1) // 2 * 2))
        if reached[-1]:
            found = PPO.load(kept / str(k) / "checkpoints" / "last", device="cpu")
            assert found.iteration >= reached[-1]
    assert reached == sorted(reached), "a checkpoint was lost"
    assert reached[-1], "choose another seed: no checkpoint was ever needed"
    train.main(["--resume", str(run)])
    train.main([*command, "--out", str(whole)])
    for part in ("checkpoints/last", "checkpoints/best"):
        mine, its = everything(run / part), everything(whole / part)
        for held in (mine, its):
            del held["state.json"]  # the id of the W&B run is in it
        assert mine == its
    assert timeless_rows_in(run) == timeless_rows_in(whole)
    assert rows_in(run)[-1]["env_steps"] == 64 * kills


def test_two_processes_cannot_train_in_one_folder(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main([*command, "--out", str(run)])
    before = everything(run)
    holds = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print()\ntime.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-uc", holds, str(run)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    said = told(capsys, "--resume", str(run), "--steps", "32")
    assert f"Another process is training in the run folder {run}" in said
    assert everything(run) == before
    other.kill()  # leaves nothing that would have to be cleared away
    other.wait()
    other.stdout.close()
    train.main(["--resume", str(run), "--steps", "32"])
    assert rows_in(run)[-1]["env_steps"] == 32


def test_a_run_that_begins_is_locked_too(
    tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    refused: list[str] = []
    update = Reinforce.update

    def meanwhile(self: Any, rollout: Any) -> Any:
        with pytest.raises(ValueError, match="Another process"), runs.locked(run):
            pass
        refused.append("yes")
        return update(self, rollout)

    monkeypatch.setattr(Reinforce, "update", meanwhile)
    train.main([*command, "--out", str(run)])
    assert len(refused) == 6
    with runs.locked(run):
        pass


@pytest.mark.parametrize("other", ["has just begun", "has ended"])
def test_a_folder_that_another_process_took_meanwhile_is_left_to_it(
    other: str,
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    original = runs.locked

    with contextlib.ExitStack() as held:

        def locked(folder: Path) -> Any:
            """Have the other process come first."""
            if other == "has just begun":
                held.enter_context(original(folder))
            else:
                (folder / "config.json").write_text("{}")
            return original(folder)

        monkeypatch.setattr(runs, "locked", locked)
        said = told(capsys, *command, "--out", str(run))
    if other == "has just begun":
        assert "Another process is training in the run folder" in said
        assert run.is_dir()
    else:
        assert f"{run} holds a run already" in said
        assert everything(run).keys() == {"config.json"}


# --- what may be loaded --------------------------------------------------------------------------

PLAYABLE = [
    (name, env)
    for name in AGENTS
    for env in ("Letters-v9", "Pick-v9")
    if ("choosing" if env == "Pick-v9" else "writing") in agent_class(name).families
]


@pytest.mark.parametrize(("name", "env"), PLAYABLE)
def test_no_checkpoint_holds_or_loads_pickled_code(
    name: str, env: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(name, env)
    agent.learn(8, folder=tmp_path)
    last = tmp_path / "checkpoints" / "last"
    for path in last.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.is_file():
            json.loads(path.read_text("utf-8"))  # raises where it is anything else

    def poisoned(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("it unpickles")

    for place in ("pickle.load", "pickle.loads", "pickle.Unpickler", "_pickle.loads", "torch.load"):
        monkeypatch.setattr(place, poisoned)
    found: Any = agent_class(name).load(last, device="cpu")
    assert (found.iteration, found.env_steps) == (agent.iteration, agent.env_steps) != (0, 0)
    if hasattr(agent, "policy"):
        assert torch.equal(parameters(found), parameters(agent))


def test_code_that_was_put_into_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "hacked"

    class Exploit:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    make_agent().save(tmp_path / "last")
    (tmp_path / "last" / "policy" / "model.safetensors").unlink()
    file = tmp_path / "last" / "policy" / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"weight": Exploit()}))
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            Reinforce.load(tmp_path / "last", device="cpu")
        assert not witness.exists()
        torch.save({"weight": Exploit()}, file)
    torch.load(file, weights_only=False)  # else this proves nothing
    assert witness.exists()
    witness.unlink()
    file.write_bytes(pickle.dumps({"weight": Exploit()}))
    with file.open("rb") as opened:
        pickle.load(opened)
    assert witness.exists()


def test_p24_a_checkpoint_of_another_agent_is_refused(tmp_path: Path) -> None:
    make_agent("grpo").save(tmp_path / "last")
    with pytest.raises(ValueError, match=r"by the agent 'grpo' and cannot be loaded as 'ppo'"):
        PPO.load(tmp_path / "last")


def test_p24_a_checkpoint_of_another_version_of_the_environment_is_refused(tmp_path: Path) -> None:
    with registered({"Versioned-v0": Letters}):
        make_agent(env="Versioned-v0").save(tmp_path / "last")
    with (
        registered({"Versioned-v1": Letters}),
        pytest.raises(ValueError, match=r"Versioned-v0, .* not registered.*Versioned-v1"),
    ):
        Reinforce.load(tmp_path / "last")


def test_p24_a_checkpoint_trained_on_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_agent().save(tmp_path / "last")

    class More(Letters):
        def __init__(self, split: str = "train") -> None:
            super().__init__(split, ("a", "b", "ab"))

    with registered({"More-v9": More}):
        state = tmp_path / "last" / "state.json"
        state.write_text(state.read_text().replace("Letters-v9", "More-v9"))
        with pytest.raises(ValueError, match=r"with 2 examples \(digest .*\), and here .* 3 exam"):
            Reinforce.load(tmp_path / "last")


def test_p24_a_checkpoint_trained_on_the_same_ids_with_other_content_is_refused(
    tmp_path: Path,
) -> None:
    make_agent().save(tmp_path / "last")

    class Rewritten(Letters):
        def __init__(self, split: str = "train") -> None:
            super().__init__(split)
            self.examples = tuple(Wanted(e.id, "b") for e in self.examples)

    with registered({"Rewritten-v9": Rewritten}):
        state = tmp_path / "last" / "state.json"
        state.write_text(state.read_text().replace("Letters-v9", "Rewritten-v9"))
        with pytest.raises(ValueError, match=r"with 2 examples \(digest .*\), and here .* 2 exam"):
            Reinforce.load(tmp_path / "last")


def test_what_an_example_holds_reads_the_same_in_every_process() -> None:
    class Custom:  # shown by its address
        def __init__(self, *values: Any) -> None:
            self.values = values

    one, other = ({0, 8}, {8, 0})  # their order in a set is that in which they came
    assert repr(one) != repr(other)
    assert content(one) == content(other)
    assert content(Custom("é", one)) == content(Custom("é", other))
    assert content(Wanted("1", "a")) == content(Wanted("1", "a"))
    assert " at 0x" in repr(Custom.__init__)
    assert " at 0x" not in content(Custom.__init__)
    long = np.arange(5000)  # repr leaves its middle out
    other_long = long.copy()
    other_long[2000] = 0
    differing = [
        long, other_long, Wanted("1", "a"), Wanted("1", "b"), Custom("a"), Custom("b"), {"a": 1},
        {"a": 2}, ("a", "b"), ("ab",), "1", 1, None,
    ]  # fmt: skip
    assert len({content(value) for value in differing}) == len(differing)


@pytest.mark.parametrize("given", ["llm_envs:Letters-v9", "llm_envs/Letters-v9"])
def test_a_checkpoint_of_an_id_with_a_module_can_be_loaded(given: str, tmp_path: Path) -> None:
    agent = make_agent(env=given, eval_every=1, eval_episodes=1)
    agent.learn(8, folder=tmp_path)
    found = Reinforce.load(tmp_path / "checkpoints" / "best", device="cpu")
    assert found.env_id == agent.env_id == "Letters-v9"
    assert found.evaluate("validation").ids


@pytest.mark.parametrize(
    ("family", "width", "named"),
    [
        ("gpt2", 16, "the model Llama.* holds GPT2"),
        ("llama", 8, r"holds Llama.*digest"),
    ],
)
def test_p24_a_checkpoint_with_another_model_is_refused(
    tmp_path: Path, family: str, width: int, named: str
) -> None:
    make_agent().save(tmp_path / "last")
    shutil.rmtree(tmp_path / "last" / "policy")
    other = CausalLMPolicy(make_model(family, width), make_tokenizer())
    other.save_pretrained(tmp_path / "last" / "policy")
    with pytest.raises(ValueError, match=named):
        Reinforce.load(tmp_path / "last", device="cpu")


def test_p24_settings_that_came_later_have_their_defaults_and_unknown_ones_are_refused(
    tmp_path: Path,
) -> None:
    make_agent(kl_in="reward").save(tmp_path / "last")
    path = tmp_path / "last" / "state.json"
    state = json.loads(path.read_text())
    assert state["version"] == llm_envs.__version__
    del state["config"]["kl_in"]
    path.write_text(json.dumps(state | {"version": "0.0.1"}))
    assert Reinforce.load(tmp_path / "last", device="cpu").config.kl_in == "loss"
    state["config"] |= {"momentum": 0.9, "nesterov": True}
    path.write_text(json.dumps(state | {"version": "0.0.1"}))
    with pytest.raises(ValueError, match=r"llm-envs 0\.0\.1 with .* reinforce .*: momentum, nest"):
        Reinforce.load(tmp_path / "last")


def test_a_run_of_another_version_is_resumed_with_defaults_for_what_it_does_not_know(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main([*command, "--out", str(run), "--steps", "8"])
    for file, key in (("config.json", "settings"), ("checkpoints/last/state.json", "config")):
        held = json.loads((run / file).read_text())
        del held[key]["gradient_checkpointing"]
        held.pop("distributed", None)
        (run / file).write_text(json.dumps(held))
    said = told(capsys, "--resume", str(run), "--gradient-checkpointing")
    assert "with --gradient-checkpointing false, and --gradient-checkpointing true" in said
    said = told(capsys, "--resume", str(run), "--distributed", "fsdp")
    assert "with --distributed ddp, and --distributed fsdp was given" in said
    train.main(["--resume", str(run), "--steps", "16"])
    assert rows_in(run)[-1]["env_steps"] == 16


def test_a_resumed_run_stays_what_it_is(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.main([*command, "--out", str(run)])
    before = everything(run)
    for given, named in (
        ("--agent ppo", "begun with --agent reinforce, and --agent ppo was given"),
        ("--policy tiny", "and --policy tiny was given"),
        ("--env Pick-v9", "begun with --env Letters-v9, and --env Pick-v9 was given"),
        ("--gamma 0.5", "begun with --gamma 0.0, and --gamma 0.5 was given"),
        ("""--env-kwargs '{"letters": ["a"]}'""", "--env-kwargs"),
    ):
        assert named in told(capsys, "--resume", str(run), *shlex.split(given))
    assert everything(run) == before
    config = json.loads((run / "config.json").read_text())
    config["settings"]["momentum"] = 0.9
    (run / "config.json").write_text(json.dumps(config))
    said = told(capsys, "--resume", str(run))
    assert f"{run} was written by llm-envs {llm_envs.__version__} with settings that" in said
    assert "does not have here" in said
    assert ": momentum." in said


def test_a_run_goes_on_in_another_working_directory_and_on_another_device(
    tmp_path: Path,
    command: list[str],
    policy_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(policy_folder.parent)
    given = ["--policy", policy_folder.name, "--report", "test", "--out", str(run)]
    train.main([*command, *given, "--steps", "8"])
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(run), "--steps", "16"])
    assert json.loads((run / "result.json").read_text())["env_steps"] == 16

    if torch.cuda.is_available():
        return
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"device": "cuda"}))
    assert "Use auto, or cpu" in told(capsys, "--resume", str(run), "--steps", "24")
    train.main(["--resume", str(run), "--steps", "24", "--device", "cpu"])
    train.main(["--resume", str(run)])  # it stays there
    assert rows_in(run)[-1]["env_steps"] == 24


@pytest.mark.parametrize("damaged", ["checkpoints/best", "the initial policy"])
def test_damage_that_the_report_meets_is_told_with_how_to_go_on(
    damaged: str,
    tmp_path: Path,
    command: list[str],
    policy_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, policy = tmp_path / "run", tmp_path / "policy"
    shutil.copytree(policy_folder, policy)
    train.main([*command, "--policy", str(policy), "--out", str(run), "--steps", "8"])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"report": "test"}))
    folder = run / damaged / "policy" if damaged == "checkpoints/best" else policy
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    before = everything(run / "checkpoints" / "last")
    said = told(capsys, "--resume", str(run))
    assert f"{run}/checkpoints/best cannot be loaded (" in said or f"{policy} that the run" in said
    assert "Nothing that was trained is lost" in said
    assert f"--resume {run}" in said
    assert everything(run / "checkpoints" / "last") == before
    if damaged == "checkpoints/best":
        (run / damaged).rename(run / "checkpoints" / "away")  # as it says
    else:
        weights.write_bytes(whole)
    train.main(["--resume", str(run)])
    assert json.loads((run / "result.json").read_text())["env_steps"] == 8


def test_what_is_trained_on_is_not_scored(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--env-kwargs", '{"split": "all"}', "--out", str(tmp_path / "run"), "--steps", "8"]
    for given in ("--eval-every 1 --report none", "--eval-every 0 --report test"):
        said = told(capsys, *command, *shlex.split(given))
        assert "Leave the split out, or score nothing: --eval-every 0 --report none." in said
    assert not (tmp_path / "run").exists()
    train.main([*command, "--eval-every", "0", "--report", "none"])
    assert rows_in(tmp_path / "run")[-1]["env_steps"] == 8
    agent = make_agent("reinforce", env_kwargs={"split": "all"})
    for split in ("validation", "test"):
        with pytest.raises(ValueError, match=f"the {split} split was trained on"):
            agent.evaluate(split)
    with pytest.raises(ValueError, match=r"split is 'all'.*eval_every=0"):
        make_agent("reinforce", env_kwargs={"split": "all"}, eval_every=1).learn(8)


def test_a_folder_keeps_the_best_checkpoint_of_its_own(tmp_path: Path) -> None:
    """What the agent came to before, elsewhere, keeps no checkpoint out of it."""
    agent = make_agent("reinforce", eval_every=1)
    agent.learn(8, folder=tmp_path / "one")
    agent.best_score = 1.1  # that nobody comes to
    agent.learn(16, folder=tmp_path / "one")
    assert agent.best_score == 1.1
    agent.learn(24, folder=tmp_path / "other")
    assert has_checkpoint(tmp_path / "other" / "checkpoints" / "best")


# --- numbers that are none -----------------------------------------------------------------------


def same(one: Any, other: Any) -> bool:
    """Whether two batches are alike to the last bit; NaN equals itself."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor | np.ndarray):
        mine, its = torch.as_tensor(one), torch.as_tensor(other)
        return mine.dtype == its.dtype and torch.equal(mine.nan_to_num(7.5), its.nan_to_num(7.5))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if dataclasses.is_dataclass(one):
        names = [f.name for f in dataclasses.fields(one)]
        return all(same(getattr(one, n), getattr(other, n)) for n in names)
    return bool(one == other or (one != one and other != other))


@pytest.mark.parametrize("env", ["Letters-v9", "Pick-v9"])
def test_a_batch_is_read_as_it_was_written(env: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {} if env == "Pick-v9" else {"top_k": 2}
    agent = make_agent(env=env, env_kwargs={"letters": ("a", "b", "ab")}, **more)
    rollout = agent.collect()
    rollout.rewards[0] = math.nan
    rollout.left_in = {3: rollout.sequences[0]}
    steps = play(agent.policy.begin(), agent.envs, seeds=[2] * 4, look=True)
    steps[1] = dataclasses.replace(steps[1], action="\ud800 é\n", reward=math.inf)
    for batch in (rollout, steps, None):
        write_batch(batch, tmp_path)
        assert same(read_batch(tmp_path), batch)
        assert not same(read_batch(tmp_path), steps[1:])
    with pytest.raises(TypeError, match="a Letters cannot be written"):
        write_batch([Letters()], tmp_path)


NEVER = 400
OURS = [(name, env) for name, env in PLAYABLE if not name.startswith("sb3-")]


@pytest.mark.parametrize(("name", "env"), [*OURS, ("reinforce", "Endless-v9")])
def test_a_reward_that_is_no_number_stops_the_run_and_its_batch_is_kept(
    name: str, env: str, tmp_path: Path
) -> None:
    cls = agent_class(name)
    few: Any = {"episodes": 1} if cls.config_class.default_policy == "none" else {"prompts": 1}
    agent = make_agent(name, env, env_kwargs={"letters": ["a", "b", "n"]}, seed=2, **few)
    with pytest.raises(FloatingPointError) as stopped:
        agent.learn(NEVER, folder=tmp_path)
    said, update = str(stopped.value), agent.iteration
    assert update > 0, "choose another seed: there is no checkpoint yet"
    number = "inf" if env == "Endless-v9" else "nan"
    assert f"The reward of answer 0 of update {update} is {number}" in said
    assert f"began after {agent.env_steps} environment steps" in said
    assert said.endswith(f"Replay: python -m agents.replay {tmp_path}/failed")

    failed, batch = replay.failed_update(tmp_path / "failed", device="cpu")
    assert same(batch, agent.batch)
    last = cls.load(tmp_path / "checkpoints" / "last", device="cpu")
    for found in (failed, last):
        assert (found.iteration, found.env_steps) == (update, agent.env_steps)
        if hasattr(agent, "policy"):
            assert torch.equal(parameters(found), parameters(agent))
    with pytest.raises(FloatingPointError, match=f"The reward of answer 0 of update {update} is"):
        failed.learn_from(batch)
    if hasattr(batch, "rewards"):
        batch.rewards[:] = torch.linspace(-1, 1, len(batch.rewards))
    else:
        batch[:] = [dataclasses.replace(step, reward=0.5) for step in batch]
    failed.learn_from(batch)  # the reward was all that was wrong


@pytest.mark.parametrize(
    ("name", "env"), [(name, env) for name, env in PLAYABLE if name.startswith("sb3-")]
)
def test_an_agent_that_learns_while_it_plays_stops_too(name: str, env: str, tmp_path: Path) -> None:
    agent = make_agent(name, env, env_kwargs={"letters": ["a"] * 20 + ["n"]}, seed=1)
    with pytest.raises(FloatingPointError) as stopped:
        agent.learn(NEVER, folder=tmp_path)
    assert f"Update {agent.iteration} began after {agent.env_steps} env" in str(stopped.value)
    assert agent.iteration > 0, "choose another seed: there is no checkpoint yet"
    last = agent_class(name).load(tmp_path / "checkpoints" / "last", device="cpu")
    assert (last.iteration, last.env_steps) == (agent.iteration, agent.env_steps)
    failed, batch = replay.failed_update(tmp_path / "failed", device="cpu")
    assert batch is None
    wrong = rf"The reward of answer \d+ of update {agent.iteration} is nan"
    with pytest.raises(FloatingPointError, match=wrong):
        failed.iterate()


def spoiled_at(update: int, agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a weight become infinite before an update, after its batch was played."""
    original = type(agent).update

    def spoil(self: Any, rollout: Any) -> Any:
        if self.iteration == update:
            next(self.policy.model.parameters()).data[1] = math.inf
        return original(self, rollout)

    monkeypatch.setattr(type(agent), "update", spoil)


@pytest.mark.parametrize("name", ["reinforce", "ppo", "immediate-reward"])
def test_a_loss_that_is_no_number_stops_the_run_and_its_batch_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent(name)
    with monkeypatch.context() as patch:
        spoiled_at(3, agent, patch)
        with pytest.raises(FloatingPointError, match=r"The loss of update 3 is nan.*after 12 env"):
            agent.learn(NEVER, folder=tmp_path)
    failed, batch = replay.failed_update(tmp_path / "failed", device="cpu")
    assert same(batch, agent.batch)
    assert parameters(failed).isinf().any()
    with pytest.raises(FloatingPointError, match="The loss of update 3 is nan"):
        failed.learn_from(batch)
    last = agent_class(name).load(tmp_path / "checkpoints" / "last", device="cpu")
    assert last.iteration == 3
    last.learn(20)
    whole = make_agent(name)
    whole.learn(20)
    assert torch.equal(parameters(last), parameters(whole))


def test_what_is_kept_of_ppo_is_the_agent_before_the_step_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = make_agent("ppo", minibatches=2, learning_rate=1e-2, seed=1, normalise_advantages=False)
    steps: list[Tensor] = []
    original = PPO.step_optimizer

    def spoil(self: Any, loss: float) -> float:
        steps.append(parameters(self))
        if len(steps) == 6:  # the second of update 1, of which there are four
            next(self.policy.model.parameters()).grad.fill_(math.nan)
        return original(self, loss)

    monkeypatch.setattr(PPO, "step_optimizer", spoil)
    with pytest.raises(FloatingPointError, match="The gradient of update 1 is nan"):
        agent.learn(NEVER, folder=tmp_path)
    failed, _ = replay.failed_update(tmp_path / "failed", device="cpu")
    assert torch.equal(parameters(failed), steps[5])
    last = PPO.load(tmp_path / "checkpoints" / "last", device="cpu")
    assert torch.equal(parameters(last), steps[4])
    assert not torch.equal(steps[4], steps[5])


def test_weights_that_a_step_made_infinite_are_never_in_a_checkpoint(tmp_path: Path) -> None:
    agent = make_agent(learning_rate=1e30, baseline="none", eval_every=1)
    with pytest.raises(FloatingPointError, match="step of update 0 made the norm of the weights"):
        agent.learn(NEVER, folder=tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["best"]
    best = Reinforce.load(tmp_path / "checkpoints" / "best", device="cpu")
    assert best.iteration == 0
    assert parameters(best).isfinite().all()


@pytest.mark.parametrize("env", ["Letters-v9", "Pick-v9"])
def test_a_policy_whose_probabilities_are_no_numbers_is_told_so(env: str, tmp_path: Path) -> None:
    agent = make_agent(env=env)
    next(agent.policy.model.parameters()).data[:] = math.nan
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        agent.learn(NEVER, folder=tmp_path)
    failed, batch = replay.failed_update(tmp_path / "failed", device="cpu")
    assert batch is None
    with pytest.raises(FloatingPointError, match="probabilities are not finite"):
        failed.iterate()


def test_a_score_that_is_no_number_ends_an_evaluation() -> None:
    agent = make_agent(env="Pick-v9", env_kwargs={"letters": ["a", "n"]})
    with pytest.raises(FloatingPointError, match=r"example 'validation n' .* is nan at turn 0"):
        agent.evaluate("validation")


def test_a_validation_that_fails_keeps_the_agent(tmp_path: Path) -> None:
    agent = make_agent(
        env="Pick-v9", env_kwargs={"letters": ["a", "n"]}, eval_every=1, eval_episodes=2, prompts=1
    )
    with pytest.raises(FloatingPointError, match=r"validation split is nan") as stopped:
        agent.learn(NEVER, folder=tmp_path)
    kept = tmp_path / "failed" / "agent"
    assert str(stopped.value).endswith(
        f"0 environment steps; the agent as it was is kept in {kept}."
    )
    assert torch.equal(parameters(Reinforce.load(kept, device="cpu")), parameters(agent))


def test_a_failure_that_cannot_be_kept_is_told_all_the_same(tmp_path: Path) -> None:
    agent = make_agent(env_kwargs={"letters": ["n"]}, checkpoint_every=100)
    (tmp_path / "failed.new").write_text("in the way")
    with pytest.raises(FloatingPointError, match=r"is nan.*could not be kept \(.*failed.new"):
        agent.learn(NEVER, folder=tmp_path)


def test_the_command_stops_at_a_reward_that_is_no_number_and_goes_on_once_it_is_mended(
    tmp_path: Path, command: list[str]
) -> None:
    run, whole = tmp_path / "a run", tmp_path / "whole"
    command += ["--seed", "1", "--env-kwargs", '{"letters": ["a", "b", "ab", "aab", "n"]}']
    stopped = process("from agents import train\ntrain.main()", *command, "--out", str(run))
    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    last = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert 0 < last["env_steps"] < 24, "choose another seed"
    cause = f"of update {last['iteration']} is nan; nothing was learned"
    said = stopped.stderr.splitlines()
    assert cause in said[0]
    assert f"after {last['env_steps']} environment steps" in said[0]
    assert said[0].endswith(f"Replay: python -m agents.replay {shlex.quote(str(run / 'failed'))}")
    assert shlex.split(said[2])[-2:] == ["--resume", str(run)]
    with pytest.raises(SystemExit, match=f"It fails again: The reward of .* {cause}"):
        replay.main([str(run / "failed")])

    llm_envs.register("Letters-v9", Mended)
    train.main(["--resume", str(run)])
    train.main([*command, "--out", str(whole)])
    llm_envs.register("Letters-v9", Letters)
    for file in ("policy/model.safetensors", "state.safetensors"):
        mine, its = (f / "checkpoints" / "last" / file for f in (run, whole))
        assert mine.read_bytes() == its.read_bytes()


def test_replay_says_what_it_takes_and_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, named in (
        ([], "python -m agents.replay RUN/failed"),
        ([str(tmp_path)], f"{tmp_path} is not a checkpoint: it holds no agent/state.json"),
    ):
        with pytest.raises(SystemExit, match=named):
            replay.main(argv)
    agent = make_agent()
    agent.save(tmp_path / "agent")
    write_batch(collect(agent.policy.begin(), agent.envs, seeds=[1, 1, 2, 2]), tmp_path)
    replay.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("It does not fail here: {")
    assert "train/loss" in said
