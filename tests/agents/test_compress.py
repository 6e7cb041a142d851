"""Compression: each way against plain arithmetic, and the command that measures them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import three_tokens
from agents import CandidatePolicy, CausalLMPolicy, Reinforce
from agents.compress import Arguments, Source, locate, main, weight_files
from agents.distill import (
    DistillConfig,
    conversations,
    distill,
    divergences,
    make_student,
    mean_divergence,
    missed_most,
    shrunk,
)
from agents.policies.int8 import (
    FEW_ROWS,
    WEIGHTS_FILE,
    Int8Embedding,
    Int8Linear,
    is_int8,
    quantize,
    quantize_rows,
)
from agents.policies.lora import Lora, add_adapter, has_adapter, merge_adapter
from agents.policies.models import TINY
from agents.rollout import Rollout, collect
from agents.sampling import SamplingConfig
from llm_envs.core.task import Outcome
from three_tokens import Identity, Pick, Wanted, make_tokenizer, task_fixture

FAMILIES = ("gpt2", "llama", "qwen")  # Conv1D and tied; untied; tied, with kinds of layers


class Spell(Identity):
    """Say two letters that the user says, in one answer."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(split, ("ab", "ba", "aa", "bb"))

    def turns(self, example: Wanted) -> int:
        return 1

    def ask(self, example: Wanted, turn: int) -> str:
        return " ".join(example.letters)

    def answers(self, example: Wanted, turn: int) -> tuple[str, ...]:
        return (" ".join(example.letters),)


class Broken(Spell):
    """Its scores are no numbers."""

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(float("nan"))] * len(answers)


_tasks = task_fixture({"Spell-v9": Spell, "Broken-v9": Broken, "Pick-v9": Pick})

make_model = partial(three_tokens.make_model, layers=4, inner=24, kv_heads=1, scale=0.3)


def make_policy(model: Any) -> CausalLMPolicy:
    return CausalLMPolicy(model, make_tokenizer(), sampling=SamplingConfig(4))


def rollout_of(policy: Any, env: str = "Spell-v9", rows: int = 8, **kwargs: Any) -> Rollout:
    return collect(policy.begin(), gym.make_vec(env, num_envs=rows, **kwargs), seeds=range(rows))


IDS = torch.tensor([[1, 2, 1, 3, 2], [2, 2, 1, 1, 3]])


@torch.no_grad()
def log_dists(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits.log_softmax(-1)
    return found


# --- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_say_what_the_adapter_said(family: str) -> None:
    model = make_model(family)
    names = set(model.state_dict())
    add_adapter(model, Lora(2, 4.0))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    with torch.no_grad():
        beneath = make_model(family).eval()(input_ids=IDS).logits
        expected = model.eval()(input_ids=IDS).logits
        merge_adapter(model)
        found = model(input_ids=IDS).logits
    assert (found - expected).abs().max() < 1e-5
    assert (expected - beneath).abs().max() > 0.1
    assert not has_adapter(model)
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any("lora" in type(m).__module__ for m in model.modules())


# --- eight bits ----------------------------------------------------------------------------------


def test_no_weight_moves_by_more_than_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 30) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0.0
    rows, scale = quantize_rows(weight)
    assert rows.dtype == torch.int8
    assert (rows.abs().amax(1) == torch.tensor([127, 127, 127, 0, 127, 127, 127])).all()
    error = (rows * scale[:, None] - weight).abs()
    assert (error <= scale[:, None] / 2 * (1 + 1e-5)).all()
    assert torch.equal(rows[3] * scale[3], weight[3])


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 1000])
@pytest.mark.parametrize("shape", [(48, 64), (3, 5), (1, 1)])
def test_a_layer_multiplies_with_its_rounded_weights(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(rows, shape[1])
    quantized, scale = quantize_rows(weight)
    found = Int8Linear(quantized, scale, bias)(x[None])
    expected = x @ (quantized * scale[:, None]).T + bias
    assert found.shape == (1, rows, shape[0])
    assert found.dtype == torch.float32
    # Two digits of 8 bits; bfloat16 keeps one, of the inputs and of the products.
    bound = 2**-14 if rows <= FEW_ROWS else 2**-8
    assert (found[0] - expected).norm() / expected.norm() < bound
    halves = Int8Linear(quantized, scale)(x.bfloat16())
    assert halves.dtype == torch.bfloat16


def test_embeddings_are_their_rounded_rows() -> None:
    weight = torch.randn(10, 6)
    rows, scale = quantize_rows(weight)
    ids = torch.tensor([[3, 3], [9, 0]])
    found = Int8Embedding(rows, scale)(ids)
    assert torch.equal(found, (rows * scale[:, None])[ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_eight_bits_is_near_and_comes_back_as_it_was(
    family: str, tmp_path: Path
) -> None:
    model = make_model(family)
    exact = log_dists(model)
    quantize(model)
    near = log_dists(model)
    kl = (exact.exp() * (exact - near)).sum(-1)
    assert 0 < kl.mean() < 0.02
    policy = make_policy(model)
    policy.save_pretrained(tmp_path)
    again = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    assert is_int8(again.model)
    assert is_int8(tmp_path)
    assert torch.equal(log_dists(again.model), near)
    tied = family != "llama"
    embedding, head = again.model.get_input_embeddings(), again.model.get_output_embeddings()
    assert torch.equal(embedding.rows, head.rows) == tied
    # Sampled is what is scored, as with any model, but for bfloat16.
    rollout = rollout_of(again)
    found = again.score(rollout.sequences).log_probs
    assert (found - torch.cat(rollout.old_log_probs)).abs().max() < 0.1
    floats = sum(p.numel() for m in model.modules() for p in m.parameters(recurse=False))
    assert floats == sum(p.numel() for n, p in make_model(family).named_parameters()
                         if "norm" in n or "ln_" in n or "wpe" in n)  # fmt: skip


def test_the_embedded_model_becomes_a_quarter_and_stays_itself(tmp_path: Path) -> None:
    policy = CausalLMPolicy.from_pretrained("tiny", device="cpu")
    size = sum(p.numel() * 4 for p in policy.model.parameters())
    rollout = rollout_of(policy, "DialogueQA-v0", rows=4, max_turns=1)
    quantized = CausalLMPolicy.from_pretrained("tiny", device="cpu")
    quantize(quantized.model)
    quantized.save_pretrained(tmp_path)
    found = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    assert sum(p.stat().st_size for p in weight_files(tmp_path)) < 0.27 * size
    assert mean_divergence(policy, found, rollout.sequences) < 0.005


def test_a_choosing_policy_in_eight_bits_keeps_its_base(tmp_path: Path) -> None:
    policy = CandidatePolicy.from_pretrained("tiny", relative=True, device="cpu")
    for model in (policy.model, policy.base):
        quantize(model)
    policy.save_pretrained(tmp_path)
    found = CandidatePolicy.from_pretrained(tmp_path, device="cpu")
    assert is_int8(found.base)
    question = found.encode("I liked:", [" Heat", " Casino"])
    assert found.candidate_logits([question]).abs().max() < 1e-6  # as at the beginning
    assert weight_files(tmp_path) == {p.resolve() for p in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_eight_bits_that_does_not_fit_is_refused_by_name(
    family: str, tmp_path: Path
) -> None:
    policy = make_policy(make_model(family))
    quantize(policy.model)
    policy.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    whole = load_file(path)
    name = next(n for n in whole if n.endswith(".rows"))
    for weights, told in (
        ({n: w for n, w in whole.items() if n != name}, rf"lacks .*{re.escape(name)}\b"),
        ({**whole, "more": torch.zeros(1)}, r"also holds more\."),
        ({**whole, name: whole[name][:-1].clone()}, rf"has other shapes of {re.escape(name)}\."),
    ):
        save_file(weights, path)
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} does not fit.*{told}"):
            CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    save_file(whole, path)
    CausalLMPolicy.from_pretrained(tmp_path, device="cpu")


def test_eight_bits_are_not_trained() -> None:
    policy = make_policy(make_model())
    quantize(policy.model)
    with pytest.raises(ValueError, match=r"held in 8 bits.*cannot be trained"):
        Reinforce(policy, "Spell-v9", eval_every=0)


# --- distilling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_a_model_make_the_model_again(family: str) -> None:
    model = make_model(family)
    assert torch.equal(log_dists(shrunk(model, range(4))), log_dists(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smaller_model_is_made_of_some_layers(family: str) -> None:
    model = make_model(family)
    small = shrunk(model, [0, 3])
    lists = [next(m for m in x.modules() if isinstance(m, nn.ModuleList)) for x in (model, small)]
    assert len(lists[1]) == 2
    for new, old in ((0, 0), (1, 3)):
        its, own = lists[0][old].state_dict(), lists[1][new].state_dict()
        assert all(torch.equal(own[n], its[n]) for n in its)
        own[next(iter(own))].add_(1.0)  # a copy: the teacher stays
        assert not torch.equal(own[next(iter(own))], its[next(iter(its))])
    # The cache counts the layers anew.
    policy = make_policy(small)
    rollout = rollout_of(policy)
    found = policy.score(rollout.sequences).log_probs
    assert (found - torch.cat(rollout.old_log_probs)).abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_are_missed_least_go(family: str) -> None:
    teacher = make_policy(make_model(family))
    layers = next(m for m in teacher.model.modules() if isinstance(m, nn.ModuleList))
    for layer in (0, 2):  # these add nothing to the hidden state, so nobody misses them
        for name, weight in layers[layer].named_parameters():
            if any(end in name for end in ("o_proj", "down_proj", "c_proj")):
                nn.init.zeros_(weight)
    sequences = rollout_of(teacher).sequences
    assert missed_most(teacher, 4, sequences) == [0, 1, 2, 3]
    assert missed_most(teacher, 2, sequences) == [1, 3]
    # The next to go is the one without which the divergence is smaller.
    alone = {k: make_policy(shrunk(teacher.model, [k])) for k in (1, 3)}
    divergence = {k: mean_divergence(teacher, student, sequences) for k, student in alone.items()}
    assert missed_most(teacher, 1, sequences) == [min(divergence, key=divergence.__getitem__)]


def test_a_student_that_cannot_be_made_is_refused() -> None:
    for layers in (0, 5):
        with pytest.raises(ValueError, match=f"A student of {layers} layers"):
            missed_most(make_policy(make_model()), layers, [])
    model = make_model()
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="not known where they are"):
        shrunk(model, [0])


def test_divergences_equal_the_slow_way() -> None:
    teacher, student = make_policy(make_model()), make_policy(shrunk(make_model(), [0, 3]))
    rollout = rollout_of(teacher)
    expected = []
    for s in rollout.sequences:
        p, q = (
            x.model(input_ids=torch.tensor([s.ids])).logits[0].log_softmax(-1)
            for x in (teacher, student)
        )
        at = [i - 1 for i, turn in enumerate(s.turns) if turn >= 0]
        expected += [(p[i].exp() * (p[i] - q[i])).sum() for i in at]
    found = divergences(teacher, student, rollout.sequences)
    assert (found - torch.stack(expected)).abs().max() < 1e-6
    assert found.min() >= 0
    mean = torch.stack(expected).mean()
    gradient = torch.autograd.grad(mean, student.model.lm_head.weight)[0]
    student.micro_batch_tokens = 20  # several micro-batches
    found_mean = mean_divergence(teacher, student, rollout.sequences, learn=True)
    assert found_mean == pytest.approx(float(mean.detach()), abs=1e-6)
    assert (student.model.lm_head.weight.grad - gradient).abs().max() < 1e-6
    assert all(p.grad is None for p in teacher.model.parameters())


def test_distilling_brings_a_student_near_its_teacher_on_answers_it_has_not_seen() -> None:
    teacher = make_policy(make_model())
    config = DistillConfig(layers=2, updates=60, prompts=8, group_size=2, learning_rate=1e-2)
    batches = conversations(teacher, "Spell-v9", config, max_new_tokens=4, seed=1)
    student = make_student(teacher, config, "cpu", next(batches))
    weights = {n: w.clone() for n, w in teacher.model.state_dict().items()}
    held_out = rollout_of(teacher, split="validation").sequences
    before = mean_divergence(teacher, student, held_out)
    told: list[tuple[int, float]] = []
    distill(teacher, student, batches, config, progress=lambda *found: told.append(found))
    after = mean_divergence(teacher, student, held_out)
    assert after < before / 3
    assert [update for update, _ in told] == list(range(1, 61))
    assert all(torch.equal(teacher.model.state_dict()[n], w) for n, w in weights.items())


def test_p25_one_seed_distils_one_student() -> None:
    config = DistillConfig(layers=1, updates=2, prompts=4, group_size=1)
    found = []
    for seed in (1, 1, 2):
        teacher = make_policy(make_model())
        batches = conversations(teacher, "Spell-v9", config, max_new_tokens=4, seed=seed)
        student = make_student(teacher, config, "cpu", next(batches))
        distill(teacher, student, batches, config)
        found.append(torch.cat([p.flatten() for p in student.model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_student_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    CausalLMPolicy(make_model(), make_tokenizer("ba")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another vocabulary"):
        make_student(make_policy(make_model()), DistillConfig(student=str(tmp_path)), "cpu", [])
    CausalLMPolicy(make_model(layers=1), make_tokenizer()).save_pretrained(tmp_path)
    make_student(make_policy(make_model()), DistillConfig(student=str(tmp_path)), "cpu", [])
    with pytest.raises(ValueError, match="leave --layers 2 out"):
        DistillConfig(student="tiny", layers=2)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _tasks: None) -> Path:
    """A run with an adapter, as training leaves it behind."""
    from agents.train import main as train

    folder = tmp_path_factory.mktemp("large")
    make_policy(make_model("qwen")).save_pretrained(folder / "model")
    train(
        f"--env Spell-v9 --policy {folder / 'model'} --lora-rank 2 --learning-rate 0.01 --steps 64 "
        "--prompts 4 --group-size 4 --eval-every 1 --max-new-tokens 4 --report none --quiet "
        f"--samples 0 --track jsonl --threads 1 --out {folder / 'run'}".split()
    )
    return folder / "run"


@pytest.mark.parametrize("method", ["merge", "int8", "distill"])
def test_a_run_is_compressed_and_measured(
    run: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / method
    more = "--updates 3 --prompts 4 --test".split() if method == "distill" else []
    main([str(run), "--method", method, "--out", str(out), "--device", "cpu", *more])
    report = json.loads((out / "compression.json").read_text())
    assert report["env"] == "Spell-v9"
    assert report["method"] == method
    old, new = report["original"], report["compressed"]
    assert old["validation"]["episodes"] == new["validation"]["episodes"] == 4
    assert ("test" in new) == (method == "distill")
    base = run.parent / "model" / "model.safetensors"
    adapter = run / "checkpoints/best/policy/adapter_model.safetensors"
    assert old["bytes"] == base.stat().st_size + adapter.stat().st_size
    weights = list(out.glob("*.safetensors"))
    assert new["bytes"] == sum(p.stat().st_size for p in weights)
    assert min(old["tokens_per_second"], new["tokens_per_second"]) > 0
    assert (new["bytes"] < old["bytes"]) or method == "merge"
    limit = {"merge": 1e-6, "int8": 0.02, "distill": 10.0}[method]
    assert -1e-6 < report["kl"] < limit
    policy = CausalLMPolicy.from_pretrained(out, device="cpu")
    assert not has_adapter(policy.model)
    assert is_int8(policy.model) == (method == "int8")
    if method == "distill":
        assert policy.model.config.num_hidden_layers == 2
        assert report["distill"]["updates"] == 3
    if method == "merge":
        assert new["validation"]["score"] == old["validation"]["score"]
    shown = capsys.readouterr().out
    assert "tokens a second" in shown
    assert "validation score" in shown


def test_ways_combine(run: Path, tmp_path: Path) -> None:
    main([str(run), "--method", "merge", "--out", str(tmp_path / "a"), "--device", "cpu"])
    main([str(tmp_path / "a"), "--method", "int8", "--device", "cpu"])  # beside it, by default
    report = json.loads((tmp_path / "int8" / "compression.json").read_text())
    assert (report["env"], report["max_new_tokens"]) == ("Spell-v9", 4)
    assert report["original"]["bytes"] > report["compressed"]["bytes"]


@pytest.mark.parametrize("method", ["merge", "int8"])
def test_a_choosing_policy_is_compressed_with_its_base(method: str, tmp_path: Path) -> None:
    make_policy(make_model("qwen")).save_pretrained(tmp_path / "model")
    agent = Reinforce(
        str(tmp_path / "model"),
        "Pick-v9",
        prompts=4,
        group_size=2,
        eval_every=0,
        lora_rank=2,
        learning_rate=1e-2,
        device="cpu",
    )
    for _ in range(3):
        agent.iterate()
    agent.save(tmp_path / "checkpoint")
    main(
        [str(tmp_path / "checkpoint"), "--method", method, "--out", str(tmp_path / "out"),
         "--device", "cpu"]
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert report["kl"] is None
    original = CandidatePolicy.from_pretrained(tmp_path / "checkpoint/policy", device="cpu")
    found = CandidatePolicy.from_pretrained(tmp_path / "out", device="cpu")
    assert not has_adapter(found.model)
    assert is_int8(found.model) == is_int8(found.base) == (method == "int8")
    asked = [original.encode("a", ["a", "b"]), original.encode("b", ["a b", "b"])]
    logits = [p.candidate_logits(asked).detach() for p in (original, found)]
    assert logits[0].abs().max() > 0.01
    assert (logits[0] - logits[1]).abs().max() < (1e-5 if method == "merge" else 0.1)


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that something is wrong with, or that have to stay as they are."""
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("mine")
    policy = make_policy(make_model())
    CandidatePolicy(make_model(), make_tokenizer(), head="scalar").save_pretrained(
        folder / "scalar"
    )
    policy.save_pretrained(folder / "damaged")
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    quantize(policy.model)
    policy.save_pretrained(folder / "small")
    policy.save_pretrained(folder / "small" / "model.new")
    for name, state in (("empty", "{}"), ("cut", '{"env": ')):
        (folder / name).mkdir()
        (folder / name / "state.json").write_text(state)
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("{run} --method merge --env Nope-v0", "Nope"),
        ("{run} --method merge --out {taken}", "taken is there already"),
        ("{small} --method int8 --env Spell-v9 --out {small}", "small is there already"),
        ("{small} --method merge --env Spell-v9 --out {small}/config.json", "not an empty folder"),
        ("{small}/model.new --method int8 --env Spell-v9 --out {small}/model", "is cleared while"),
        ("{run} --method merge --episodes 0", "episodes is 0; it has to be 1 or more"),
        ("{run} --method merge --max-new-tokens 0", "max_new_tokens is 0"),
        ("{run} --method merge --max-new-tokens 64", "leaves no room for a prompt"),
        ("{run} --method merge --threads 0", "threads is 0"),
        ("{run} --method merge --threads -1", "threads is -1"),
        ("{run} --method distill --seed -1", "seed is -1; it cannot be negative"),
        ("{run} --method distill --layers 0", "layers is 0"),
        ("{run} --method merge --device nonsense", "--device nonsense cannot be used here"),
        ("{run} --method merge --env-kwargs {{x}}", "--env-kwargs is not JSON"),
        ('{run} --method merge --env-kwargs {{"split":"train"}}', "--env-kwargs holds split"),
        ('{run} --method merge --env-kwargs {{"num_envs":2}}', "--env-kwargs holds num_envs"),
        ('{run} --method merge --env-kwargs {{"nonsense":2}}', "nonsense"),
        ("{run} --method merge --env Broken-v9", "The score of example"),
        ("{empty} --method merge", "state.json is damaged: it lacks env, env_kwargs, config"),
        ("{cut} --method merge", "state.json is damaged: it is not JSON"),
        ("{damaged} --method int8 --env Spell-v9", "No causal language model could be loaded"),
        ("{scalar} --method int8 --env Pick-v9", "has a scalar head"),
        ("{plain} --method merge", "does not tell what it was trained on"),
        ("{plain} --method merge --env Spell-v9", "no adapter that could be merged"),
        ("{small} --method int8 --env Spell-v9", "held in 8 bits already"),
        ("{plain} --method distill --env Pick-v9", "is a choosing task"),
        ("{plain} --method distill --env Spell-v9 --layers 9", "A student of 9 layers"),
        ("{plain} --method distill --env Spell-v9 --updates 0", "updates is 0"),
        ("{plain} --method int8 --env Spell-v9 --env-kwargs 3", "has to be a JSON object"),
        ("{plain}/nothing --method int8 --env Spell-v9", "No causal language model"),
    ],
)
def test_mistakes_are_told_in_one_sentence(
    run: Path,
    mistaken: Path,
    tmp_path: Path,
    words: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        p: p.read_bytes() for p in (*run.parent.rglob("*"), *mistaken.rglob("*")) if p.is_file()
    }
    places = {"run": run, "plain": run.parent / "model"}
    places |= {p.name: p for p in mistaken.iterdir()}
    given = words.format(**places).split()
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    if "--device" not in given:
        given += ["--device", "cpu"]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
    # Nothing was written, and nothing written over; a score shows only after compression.
    assert (tmp_path / "out").exists() == ("Broken" in words)
    kept = {
        p: p.read_bytes() for p in (*run.parent.rglob("*"), *mistaken.rglob("*")) if p.is_file()
    }
    assert kept == files


def test_the_default_folder_is_not_written_over_either(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run.parent / "model", tmp_path / "model")
    shutil.copytree(run.parent / "model", tmp_path / "int8")
    with pytest.raises(SystemExit):
        main(f"{tmp_path / 'model'} --method int8 --env Spell-v9 --device cpu".split())
    assert "int8 is there already" in capsys.readouterr().err
    assert not is_int8(tmp_path / "int8")


def test_a_compression_that_is_killed_leaves_all_of_a_policy_or_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    words = f"{run} --method merge --out {out} --device cpu".split()
    for where, left in (("agents.policies.causal_lm.save_model", False),
                        ("agents.compress.speeds", True)):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, killed)
            with pytest.raises(SystemExit) as stopped:
                main(words)
        assert stopped.value.code == 130
        assert "Interrupted." in capsys.readouterr().err
        assert out.exists() == left
    assert json.loads((out / "compression.json").read_text())["env"] == "Spell-v9"
    CausalLMPolicy.from_pretrained(out, device="cpu")


def test_a_checkpoint_is_found_as_training_or_a_crash_left_it(run: Path, tmp_path: Path) -> None:
    def found() -> Source:
        return locate(Arguments(str(tmp_path / "run"), "merge", DistillConfig()))

    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(run, tmp_path / "run")
    assert found().policy == str(checkpoints / "best/policy")
    os.rename(checkpoints / "best", checkpoints / "best.old")  # killed between two renames
    assert found().policy == str(checkpoints / "best.old/policy")
    shutil.rmtree(checkpoints / "best.old")
    assert found().policy == str(checkpoints / "last/policy")
    state = json.loads((checkpoints / "last/state.json").read_text())
    state["env_kwargs"] = {"split": "all", "letters": "a"}
    (checkpoints / "last/state.json").write_text(json.dumps(state))
    assert found().env_kwargs == {"letters": "a"}  # what was trained on is not validated on
    source = str(tmp_path / "run")
    same = locate(Arguments(source, "merge", DistillConfig(), env="llm_envs:Spell-v9"))
    assert (same.env, same.env_kwargs) == ("Spell-v9", {"letters": "a"}), "by any of its names"
    assert found().folder == tmp_path / "run"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("merge", "int8", "distill", "python -m agents.compress runs/my-run", "--layers"):
        assert word in shown


def test_the_weights_of_a_name_are_found() -> None:
    assert weight_files("tiny") == {(TINY / "model.safetensors").resolve()}
