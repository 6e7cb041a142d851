"""Several processes do what one would: real ones, which torchrun starts on this file or a run.

As a script (``torchrun test_distributed.py DATA CHECK``) this file compares, in every process, what
the processes do together with what one does alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import three_tokens
from agents import (
    PPO,
    RLOO,
    CandidatePolicy,
    CausalLMPolicy,
    ImmediateReward,
    Reinforce,
    Supervised,
    distributed,
    replay,
    train,
)
from agents.baselines import Random
from agents.distributed import ALONE, World
from agents.policies.causal_lm import TokenSequence
from agents.policies.models import TINY
from agents.policy_agent import PolicyAgent
from agents.registry import AGENTS, agent_class
from agents.rollout import Rollout, merge
from llm_envs.core.task import Outcome
from runs import assert_same, outcome
from three_tokens import Identity

TESTS = Path(__file__).parents[1]
IMPORTED = (str(TESTS.parent), str(TESTS / "helpers"))
WRITING, CHOOSING = "DialogueQA-v0", "RecommendationClicks-v0"


def write_dialogues(path: Path) -> Path:
    """Write a data set of a few dialogues of different lengths in each split."""
    rows = [
        {
            "id": f"{split}-{i}",
            "passage": f"The capital of {split}{i} is {i}ville." * (i + 1),
            "turns": [{"question": f"Which one? {j}", "answers": [f"{i}ville"]}
                      for j in range(1 + i % 3)],
            "split": split,
        }
        for split in ("train", "validation", "test")
        for i in range(6)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(family: str) -> Any:
    """Return a tiny model with random weights; its embeddings are tied to its head."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2,
    }
    if family == "gpt2":
        shape = {"n_positions": 1024, "n_embd": 16, "n_layer": 2, "n_head": 2}
        return GPT2LMHeadModel(GPT2Config(**common, **shape)), tokenizer
    config = LlamaConfig(
        **common,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


def make_agent(kind: Any, data: str, world: World = ALONE, **settings: Any) -> Any:
    """Return an agent in double precision, away from its reference, whose critic says something."""
    env = settings.pop("env", WRITING)
    made = make_model(settings.pop("family", "llama"))
    if env == CHOOSING:
        policy: Any = CandidatePolicy(*made, head=settings.pop("head", None))
    else:
        policy = CausalLMPolicy(*made)
        settings |= {"max_new_tokens": 4, "env_kwargs": {"dataset": data}}
    defaults = {"prompts": 4, "group_size": 2, "eval_every": 0, "learning_rate": 1e-2}
    agent = kind(policy, env, seed=3, world=world, device="cpu", **{**defaults, **settings})
    agent.policy.model.double()
    torch.manual_seed(1)
    if agent.reference is not None and agent.lora is None:
        with torch.no_grad():
            for p in agent.reference.model.double().parameters():
                p += 0.05 * torch.randn_like(p)
    if agent.critic is not None:
        torch.nn.init.constant_(agent.critic.double().weight, 0.1)
    if agent.shards is not None:  # they were made in single precision
        agent.shards = distributed.Shards(agent.policy, agent.critic, world)
    agent.optimizer = agent.make_optimizer()
    return agent


def weights(agent: Any) -> torch.Tensor:
    critic = [] if agent.critic is None else [*agent.critic.parameters()]
    found = [*agent.policy.model.parameters(), *critic]
    return torch.cat([p.detach().flatten() for p in found])


def gradient(agent: Any) -> torch.Tensor:
    """Return what an optimizer would be given, whole and flat; it is cleared."""
    agent.world.add_gradients(agent.parameters)
    found = [distributed.whole(p.grad).flatten().clone() for p in agent.parameters]
    agent.optimizer.zero_grad()
    return torch.cat(found)


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert expected.norm() > 0, what
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-6, f"{what}: {error}"


# --- what each process does when this file is a script -------------------------------------------

KL = {"kl_coef": 0.1, "entropy_coef": 0.01}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "reinforce": (Reinforce, KL | {"baseline": "critic"}),
    "reinforce, batch mean": (Reinforce, {"baseline": "batch"}),
    "reinforce, moving average": (Reinforce, {"baseline": "moving", "top_p": 0.9}),
    "rloo": (RLOO, {}),
    "ppo": (PPO, KL | {"gamma": 0.9, "minibatches": 3, "old_log_probs": "recomputed"}),
    "immediate-reward": (ImmediateReward, {"loss_term": "broadcast", "lam": 0.1}),
    "adapter": (Reinforce, KL | {"lora_rank": 2, "gradient_checkpointing": True}),
    "choices": (Reinforce, KL | {"env": CHOOSING, "prompts": 2}),
    "choices, scalar head": (Reinforce, {"env": CHOOSING, "prompts": 2, "head": "scalar"}),
    "choices, ppo": (PPO, {"env": CHOOSING, "prompts": 2, "epochs": 1}),
}


def played(agent: Any) -> Rollout:
    """Play, and have two episodes end before their time, so that a critic is asked about them."""
    rollout = agent.collect()
    rollout.rewards += torch.linspace(-1, 1, len(rollout.rewards))
    if agent.family == "choosing":
        return rollout
    for row in (0, 6):
        rollout.left_in[row] = TokenSequence(row)
        rollout.left_in[row].read([5 + row, 7, 9])
    return dataclasses.replace(rollout)


def worlds() -> list[World]:
    """Return the processes under each strategy; they can be joined once only."""
    joined = distributed.join("ddp", "cpu")
    return [joined, dataclasses.replace(joined, strategy="fsdp")]


def check_gradients(data: str) -> None:
    """The gradient of a fixed rollout, before any step, is that of one process."""
    for world, name in itertools.product(worlds(), ("reinforce", "ppo")):
        kind, settings = CASES[name]
        agents = [make_agent(kind, data, w, **settings) for w in (ALONE, world)]
        rollout = played(agents[0])
        found = []
        for agent in agents:
            agent.policy.micro_batch_tokens = 100 + 400 * world.rank  # changes the passes only
            if name == "ppo":
                members = list(range(len(rollout.sequences) - 3))  # more of them on rank 0
                credit = agent.credit(rollout, rollout.rewards)
                metrics = agent.accumulate_gradients(rollout, credit, members)
            else:
                returns = agent.returns(rollout, rollout.rewards)
                advantages = agent.advantages(rollout, returns)
                metrics = agent.accumulate_gradients(rollout, advantages, returns)
            found.append((gradient(agent), metrics))
        counts = world.gather(len(agents[1].micro_batches(rollout)))
        assert len(set(counts)) > 1, "as many passes on each rank prove less"
        (alone, its_metrics), (together, metrics) = found
        assert_near(together, alone, f"{world.strategy} {name}")
        assert metrics == pytest.approx(its_metrics, rel=1e-6)


def check_updates(data: str) -> None:
    """Two whole updates by fixed rollouts: metrics, and where the weights come to.

    (Llama computes parts in single precision whatever it is given, and Adam makes more of that.)
    """
    for world, (name, (kind, settings)) in itertools.product(worlds(), CASES.items()):
        case = f"{world.strategy} {name}"
        alone, together = (
            make_agent(kind, data, w, family="gpt2", **settings) for w in (ALONE, world)
        )
        start = weights(alone)
        for _ in range(2):
            rollout = played(alone)
            for agent in (alone, together):
                agent.policy.micro_batch_tokens = 100 + 400 * world.rank
            expected = alone.update(rollout)
            found = together.update(rollout)
            assert found == pytest.approx(expected, rel=1e-6), case
            alone.iteration = together.iteration = alone.iteration + 1
        assert_near(weights(together) - start, weights(alone) - start, case)
        for other in world.gather(weights(together)):
            assert torch.equal(other, weights(together)), f"{case}: replicas differ"


def check_play(data: str) -> None:
    """The processes play the episodes that one would, each with chance of its own."""
    world = worlds()[0]
    settings: dict[str, Any] = {"top_p": 0.9, "prompts": 6}
    alone, together = (make_agent(Reinforce, data, w, **settings) for w in (ALONE, world))
    assert together.rows == 6
    expected, found = (agent.play(agent.player(True)) for agent in (alone, together))
    order = (found.turns * found.episodes + found.rows).argsort()
    for what in ("rewards", "rows", "turns", "scores"):
        assert torch.equal(getattr(found, what)[order], getattr(expected, what)), what
    assert [s.row for s in found.sequences] == [*range(12)]
    assert found.cut_share == pytest.approx(expected.cut_share)
    assert found.parts == pytest.approx(expected.parts)
    sampled = together.collect()
    everyones = world.gather((sampled.rewards, [s.ids for s in sampled.sequences]))
    assert everyones[0][1] == everyones[1][1]
    assert torch.equal(everyones[0][0], everyones[1][0])
    for s in sampled.sequences:
        assert s.support is not None
        assert len(s.support) == sum(t >= 0 for t in s.turns)
    one, other = world.gather(torch.rand(4, generator=together.policy.generator))
    assert not torch.equal(one, other)
    # Imitation leaves nothing to chance: whole iterations can be compared.
    alone, together = (make_agent(Supervised, data, w) for w in (ALONE, world))
    for _ in range(3):
        expected, found = alone.iterate(), together.iterate()
        for metrics in (expected, found):
            del metrics["perf/tokens_per_second"], metrics["perf/env_steps_per_second"]
        assert found == pytest.approx(expected, rel=1e-6)
    assert_near(weights(together), weights(alone), "imitation")


CHECKS = {"gradients": check_gradients, "updates": check_updates, "play": check_play}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in sys.argv[2:]:
        CHECKS[check](sys.argv[1])
    print(f"rank {os.environ['RANK']} agrees")
    distributed.join("ddp", "cpu").leave()
    sys.exit()


# --- tests ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK", *(n for n in os.environ if "WANDB" in n)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl"))


def torchrun(*argv: str) -> list[str]:
    """Return the command that starts two processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *argv]


def environment() -> dict[str, str]:
    """The environment of new processes, which import the packages beside these tests."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTED)}


@pytest.mark.parametrize(
    "checks", ["gradients play", pytest.param("updates", marks=pytest.mark.slow)]
)
def test_p23_two_processes_do_what_one_does(data: str, checks: str) -> None:
    command = torchrun(__file__, data, *checks.split())
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert sorted(re.findall("rank . agrees", ended.stdout)) == ["rank 0 agrees", "rank 1 agrees"]


def test_merging_numbers_rows_and_answers_on(data: str) -> None:
    agent = make_agent(Reinforce, data, top_p=0.9)
    rollouts = [played(agent), played(agent)]
    found = merge(rollouts)
    assert found.episodes == 16
    assert found.rows.tolist() == [*rollouts[0].rows, *(rollouts[1].rows + 8)]
    assert torch.equal(found.lengths, torch.cat([r.lengths for r in rollouts]))
    assert sorted(torch.cat(found.decision_of).unique()) == [*range(len(found.rewards))]
    for sequence, decisions in zip(found.sequences, found.decision_of, strict=True):
        assert set(found.rows[decisions].tolist()) == {sequence.row}
    assert sorted(found.left_in) == [0, 6, 8, 14]
    assert all(state.row == row for row, state in found.left_in.items())
    assert merge(rollouts[:1]) is rollouts[0]


def test_what_cannot_be_shared_is_refused(data: str, tmp_path: Path) -> None:
    world = World(rank=1, size=3)
    make_agent(Reinforce, data).save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"written by 1 processes.*by 3"):
        Reinforce.load(tmp_path / "checkpoint", world=world)
    others = [kind for kind in map(agent_class, AGENTS) if not issubclass(kind, PolicyAgent)]
    assert Random in others
    for kind in others:
        refusal = rf"{kind.name} trains no .*torchrun started 3.*without"
        with pytest.raises(ValueError, match=refusal):
            kind(kind.config_class.default_policy, WRITING, world=world)
    with pytest.raises(ValueError, match=r"prompts is 4, and 3 processes.*multiple of 3"):
        make_agent(Reinforce, data, world)


def test_ranks_share_evenly_and_have_seeds_of_their_own() -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    assert [list(w.share(range(6))) for w in worlds] == [[0, 1], [2, 3], [4, 5]]
    assert [[w.owns(row, 6) for row in range(6)] for w in worlds] == [
        [r // 2 == w.rank for r in range(6)] for w in worlds
    ]
    seeds = [w.seed(s) for w in worlds for s in range(3)]
    assert seeds[:3] == [0, 1, 2]
    assert len(set(seeds)) == 9


def test_one_process_needs_no_accelerate_and_several_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert distributed.join() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.join() == ALONE  # a variable of that name alone is not torchrun's
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit) as ended:
        train.main(["--env", WRITING])
    assert ended.value.code == 2
    assert "pip install 'llm-envs[distributed]'" in capsys.readouterr().err


def test_a_device_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"device is 'cuda:1'.*'cuda' \(each"):
        distributed.join(device="cuda:1")


def test_a_process_that_is_gone_is_noticed() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = os.uname().nodename
    world = World(0, 3, peers=((here, os.getpid()), (here, ended.pid), ("elsewhere", ended.pid)))
    assert world.lost() == [1]


def in_two_threads(monkeypatch: pytest.MonkeyPatch, learn: Any) -> list[str]:
    """Have two ranks learn, each in a thread, and return what each of them says in the end."""
    mine, both, sent = threading.local(), threading.Barrier(2, timeout=20), [[], []]

    def gather_object(items: list[Any]) -> list[Any]:
        sent[mine.rank] = items
        both.wait()
        found = [*sent[0], *sent[1]]
        both.wait()
        return found

    def run(rank: int) -> str:
        mine.rank = rank
        try:
            learn(World(rank, 2))
        except FloatingPointError as error:
            return str(error)
        except threading.BrokenBarrierError:
            return "waited in vain"
        return "nothing"

    monkeypatch.setattr("accelerate.utils.gather_object", gather_object)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


class Spoilt(Identity):
    """Its validation scores are no numbers."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(split)
        self.score_of = math.nan if split == "validation" else 1.0

    def score_answers(self, answers: Any, references: Any) -> list[Outcome]:
        return [Outcome(self.score_of) for _ in answers]


@pytest.mark.parametrize("cause", ["a validation score", "a model of rank 1"])
@pytest.mark.parametrize("kept", [True, False])
def test_what_one_process_fails_at_all_of_them_tell(
    cause: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        (tmp_path / "failed.new").write_text("in the way")
    validates = cause == "a validation score"

    def learn(world: World) -> None:
        agent = three_tokens.make_agent("Spoilt-v9", world=world, eval_every=int(validates))
        if not validates and world.rank == 1:
            next(agent.policy.model.parameters()).data[:] = math.nan
        agent.learn(64, folder=tmp_path)

    with three_tokens.registered({"Spoilt-v9": Spoilt}):
        one, other = in_two_threads(monkeypatch, learn)
        assert one == other
        assert "is nan at turn 0" in one if validates else "probabilities are not finite" in one
        if not kept:
            assert "could not be kept" in one
            assert "failed.new" in one
            return
        assert f"{tmp_path}/failed" in one
        agent, batch = replay.failed_update(tmp_path / "failed", device="cpu")
        assert batch is None
        assert agent.iteration == agent.env_steps == 0
        json.loads((tmp_path / "failed" / "agent" / "state.json").read_text())


# --- whole runs ----------------------------------------------------------------------------------

RUN = shlex.split(
    "--steps 160 --prompts 4 --group-size 2 --max-new-tokens 4 --eval-episodes 4 --eval-every 4 "
    "--checkpoint-every 3 --entropy-coef 0.01 --kl-coef 0.01 --learning-rate 1e-3 --seed 5 "
    "--device cpu --track jsonl --quiet"
)


def arguments(data: str, folder: Path, *more: str) -> list[str]:
    return [*RUN, "--env-kwargs", json.dumps({"dataset": data}), "--out", str(folder), *more]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, data: str) -> dict[str, Path]:
    """Folders of runs that nothing interrupted."""
    folders = {s: tmp_path_factory.mktemp("whole") / s for s in ("ddp", "fsdp")}
    for strategy, folder in folders.items():
        ended = subprocess.run(
            torchrun("-m", "agents.train", *arguments(data, folder, "--distributed", strategy)),
            env=environment() | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-6000:]
        assert ended.stdout.count("Run folder") == 1
        assert ended.stdout.count("Paired gain") == 1
        assert f"2 processes ({strategy})" in ended.stdout
    return folders


@pytest.mark.slow
def test_one_process_writes_and_one_process_can_read(wholes: dict[str, Path]) -> None:
    for folder in wholes.values():
        assert [f.name for f in folder.parent.iterdir()] == [folder.name]
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"last", "best"}
        rows = [json.loads(r) for r in (folder / "metrics.jsonl").read_text().splitlines()]
        steps = [r["env_steps"] for r in rows if "train/loss" in r]
        assert len(set(steps)) == len(steps) > 8
        agent = Reinforce.load(folder / "checkpoints" / "best", device="cpu")
        report = json.loads((folder / "result.json").read_text())
        assert agent.evaluate("test").score == report["after"]["score"]
    # The same rollouts come first; then only rounding differs.
    first = [json.loads((f / "metrics.jsonl").read_text().splitlines()[1]) for f in wholes.values()]
    for name in ("rollout/reward", "train/loss", "train/grad_norm", "train/entropy"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-4)


@pytest.mark.slow
def test_another_number_of_processes_does_not_go_on(
    wholes: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--resume", str(wholes["ddp"])])
    told = capsys.readouterr().err
    assert "begun with 2 processes, and there is 1 now" in told
    assert "torch.distributed.run --nproc-per-node 2 -m agents.train --resume" in told


def workers(torchrun_pid: int) -> dict[int, int]:
    """Return rank -> process id of what torchrun has started."""
    found = {}
    for pid in Path(f"/proc/{torchrun_pid}/task/{torchrun_pid}/children").read_text().split():
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "victim"), [("ddp", "rank 1"), ("ddp", "rank 0"), ("ddp", "none"),
                             ("fsdp", "rank 1")]
)  # fmt: skip
def test_p24_an_interrupted_run_says_so_and_goes_on_bit_for_bit(
    strategy: str, victim: str, tmp_path: Path, data: str, wholes: dict[str, Path]
) -> None:
    folder = tmp_path / "run"
    begun = subprocess.Popen(
        torchrun("-m", "agents.train", *arguments(data, folder, "--distributed", strategy)),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "metrics.jsonl"
    while begun.poll() is None and (
        not metrics.exists() or metrics.read_text().count("train/loss") < 7
    ):
        time.sleep(0.01)
    assert begun.poll() is None, begun.communicate()
    if victim == "none":
        begun.send_signal(signal.SIGINT)
    else:
        os.kill(workers(begun.pid)[int(victim[-1])], signal.SIGKILL)
    out, err = begun.communicate(timeout=60)
    assert begun.returncode != 0
    if victim == "none":
        assert err.count("Stopping after this update") == 1
        assert out.count("Stopped and saved after") == 1
        said = out
    else:
        assert err.count("and the run cannot go on without it") == 1, err
        assert f"Process {victim[-1]} of 2 died" in err
        said = err
    [command] = re.findall(r"To go on:\n  (.*)", said)
    assert len(metrics.read_text().splitlines()) < len(
        (wholes[strategy] / "metrics.jsonl").read_text().splitlines()
    ), "there was nothing left to do"
    if strategy == "fsdp":  # what is in the folder is all that is needed
        shutil.move(folder, tmp_path / "moved")
        command = command.replace(str(folder), str(tmp_path / "moved"))
        folder = tmp_path / "moved"
    ended = subprocess.run(
        shlex.split(command), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    assert_same(outcome(folder), outcome(wholes[strategy]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_failed_update_is_told_once_and_can_be_replayed(
    strategy: str, data: str, tmp_path: Path
) -> None:
    argv = arguments(data, tmp_path / "run", "--learning-rate", "1e30", "--distributed", strategy)
    command = torchrun("-m", "agents.train", *argv)
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode != 0
    [replay] = re.findall("Replay: python (.*)", ended.stderr)
    assert ended.stderr.count("Once its cause is mended, to go on") == 1
    ended = subprocess.run(
        [sys.executable, *shlex.split(replay)], env=environment(), capture_output=True, text=True
    )
    assert "It fails again" in ended.stderr


@pytest.mark.slow
def test_a_death_is_told_while_the_first_process_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It waits for nobody then, and W&B lets no exception out.
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / name))
    argv = shlex.split("--eval-episodes 335 --report none --device cpu")
    begun = subprocess.Popen(
        torchrun("-m", "agents.train", *argv, "--out", str(tmp_path / "run")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert begun.stdout is not None
    assert "Run folder" in begun.stdout.readline()
    time.sleep(1.0)
    os.kill(workers(begun.pid)[1], signal.SIGKILL)
    _, err = begun.communicate(timeout=25)  # torchrun kills all of them after 30 seconds
    assert err.count("Process 1 of 2 died") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--prompts 3", "prompts is 3, and 2 processes"),
        ("--agent random --policy none", "random trains no language model"),
        ("--steps 0", "--steps is 0"),
        ("--stepz 3", "Unrecognized options: --stepz"),
    ],
)
def test_a_mistake_is_told_once(argv: str, expected: str, tmp_path: Path) -> None:
    train = torchrun("-m", "agents.train", *shlex.split(argv), "--out", str(tmp_path / "run"))
    ended = subprocess.run(train, env=environment(), capture_output=True, text=True)
    assert ended.returncode != 0
    assert ended.stderr.count(expected) + ended.stdout.count(expected) == 1
    assert not (tmp_path / "run").exists()
