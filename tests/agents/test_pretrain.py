"""Adapting a policy to a domain: the loss, what is read and held out, and going on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from agents import CausalLMPolicy, Supervised, pretrain, pretraining
from agents.policies import models
from agents.policies.int8 import quantize
from agents.policies.models import Passes
from agents.pretrain import Arguments
from agents.pretraining import Training, negative_log_likelihood, perplexity, predicted, scale
from agents.rollout import play
from agents.supervised import Teacher
from agents.texts import Row, Texts, batches, encode, hold_out, load_texts
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.faqs import load_faqs
from three_tokens import END, make_model, make_tokenizer, relative

FAMILIES = ("llama", "gpt2", "qwen", "granite")


def words(count: int, seed: int, longest: int = 30) -> list[str]:
    """Texts of the words a and b."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(["a", "b"], rng.integers(1, longest))) for _ in range(count)]


def rows_of(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 4, rng.integers(2, 30)).tolist() for _ in range(count)]


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Arguments]:
    """Arguments for a small model, on 60 texts of two words."""
    policy = CausalLMPolicy(make_model(), make_tokenizer())
    policy.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": text}) for text in words(60, 1)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")

    def make(**given: Any) -> Arguments:
        common = {
            "data": str(tmp_path / "texts.jsonl"),
            "policy": str(tmp_path / "model"),
            "out": tmp_path / "out",
            "batch_tokens": 128,
            "micro_batch_tokens": 64,
            "learning_rate": 1e-2,
            "device": "cpu",
            "evaluations": 4,
            "epochs": 2,
        }
        return Arguments(**{**common, **given})

    return make


def run(a: Arguments) -> dict[str, Any]:
    return pretraining.pretrain(a, Console(quiet=True))


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradient_are_those_of_transformers(family: str) -> None:
    policy = CausalLMPolicy(make_model(family), make_tokenizer())
    rows = rows_of(7, seed=2)
    width = max(map(len, rows))
    ids = torch.tensor([row + [END] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    expected = policy.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.model.parameters())])
        for loss in (expected, negative_log_likelihood(policy, rows) / predicted(rows))
    ]
    assert (negative_log_likelihood(policy, rows) / predicted(rows)).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    assert relative(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_share_a_pass_change_nothing_for_each_other(family: str) -> None:
    policy = CausalLMPolicy(make_model(family).double(), make_tokenizer())
    rows = rows_of(9, seed=3)
    alone = sum(negative_log_likelihood(policy, [row]) for row in rows)
    together = negative_log_likelihood(policy, rows)
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0.0)
    assert perplexity(policy, rows, 40) == pytest.approx(
        math.exp(together.item() / predicted(rows)), rel=1e-12
    )


def test_logits_in_chunks_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CausalLMPolicy(make_model().double(), make_tokenizer())
    rows = rows_of(5, seed=4)
    found = []
    for at_once in (2**20, 12):
        monkeypatch.setattr(models, "LOGITS_AT_ONCE", at_once)
        loss = negative_log_likelihood(policy, rows)
        found.append(torch.autograd.grad(loss, policy.model.lm_head.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_layers_that_are_computed_again_give_the_same_gradient() -> None:
    policy = CausalLMPolicy(make_model(), make_tokenizer())
    rows = rows_of(5, seed=8)
    found = []
    for again in (False, True):
        policy.passes = Passes(gradient_checkpointing=again)
        loss = negative_log_likelihood(policy, rows)
        found.append(torch.autograd.grad(loss, policy.model.lm_head.weight)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_weights_in_8_bits_are_refused(arguments: Callable[..., Arguments], tmp_path: Path) -> None:
    policy = CausalLMPolicy(make_model(), make_tokenizer())
    quantize(policy.model)
    policy.save_pretrained(tmp_path / "int8")
    with pytest.raises(ValueError, match="no weights that can be trained"):
        run(arguments(policy=str(tmp_path / "int8")))


def test_micro_batches_change_no_update(arguments: Callable[..., Arguments]) -> None:
    updated = []
    for most in (64, 10_000):
        training = Training(arguments(micro_batch_tokens=most), None)
        training.policy.model.double()
        training.update(rows_of(20, seed=5), 10)
        updated.append(torch.cat([p.detach().flatten() for p in training.parameters]))
    torch.testing.assert_close(*updated, rtol=1e-9, atol=1e-12)


def test_the_learning_rate_rises_and_falls() -> None:
    assert [scale(step, 40) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert scale(21, 40) == pytest.approx(0.5)
    assert 0.0 < scale(39, 40) < 0.002
    assert scale(0, 1) == 1.0


# --- texts ---------------------------------------------------------------------------------------


def test_folders_are_read_and_other_splits_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "in" / "b.md").write_text("second")
    (tmp_path / "in" / "same.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "c.csv").write_text("not read")
    splits = (None, "train", "validation", "test")
    lines = [{"text": f"of {split}"} | ({"split": split} if split else {}) for split in splits]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = load_texts(str(tmp_path))
    assert found == Texts(("first", "of None", "of train", "second"))


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ('{"text": "x", "summaries": ["y"]}', r"--data env:ID --env-kwargs"),
        ('{"text": "x", "turns": []}', r"--data env:ID --env-kwargs"),
        ('{"txt": "x"}', r'Line 1 of .* has no "text"'),
        ("[1]", r'Line 1 of .* has no "text"'),
        ('{"messages": []}', r"Line 1 of .* are no conversation"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', r"are no conversation. Give a list"),
        ('{"messages": "hello"}', r"are no conversation"),
        ("{", r"Line 1 of .* is not JSON"),
    ],
)
def test_lines_of_something_else_are_refused(tmp_path: Path, line: str, cure: str) -> None:
    (tmp_path / "x.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=cure):
        load_texts(str(tmp_path))


def test_environments_and_embedded_sets_give_their_training_split_only() -> None:
    found = load_texts("env:Summarization-v0", {"dataset": "python_docstrings"})
    env = gym.make("Summarization-v0", dataset="python_docstrings").unwrapped
    assert not found.end  # an answer is due
    assert found.texts == tuple(env.reset(options={"example": e.id})[0] for e in env.task.examples)
    embedded = load_texts("python_docstrings")
    others = {
        record.text
        for split in ("validation", "test")
        for record in load_documents("python_docstrings", split=split).records
    }
    assert embedded.end
    assert not others & set(embedded.texts)
    assert not any(text in read for read in found.texts for text in others)
    assert load_texts("env:TextBattle-v0").texts[0].endswith("Assistant:")
    asked = {split: load_faqs(split=split).records for split in ("train", "validation", "test")}
    faqs = load_texts("faqs")
    assert faqs.texts == tuple(f"{faq.question}\n{faq.answer}" for faq in asked["train"])
    for faq in (*asked["validation"], *asked["test"]):
        assert not any(faq.question in text and faq.answer in text for text in faqs.texts)


@pytest.mark.parametrize(
    ("data", "kwargs", "cure"),
    [
        ("env:Summarization-v0", {"split": "test"}, "only the training split is read"),
        ("env:Summarization-v0", {"split": "all"}, "only the training split is read"),
        ("env:Sumarization-v0", {}, "Did you mean 'Summarization-v0'"),
        ("python_docstring", {}, "Did you mean 'python_docstrings'"),
        ("python_docstrings", {"split": "train"}, "--env-kwargs is for an environment"),
    ],
)
def test_wrong_data_is_refused(data: str, kwargs: dict[str, Any], cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        load_texts(data, kwargs)


def test_texts_are_cut_into_pieces_and_end() -> None:
    texts = Texts(("a b a b a", "b", ""))
    tokenizer = make_tokenizer()
    assert encode(texts, tokenizer, 4) == [[[1, 2, 1, 2], [1, END]], [[2, END]]]
    asked = dataclasses.replace(texts, end=False)
    assert encode(asked, tokenizer, 4) == [[[1, 2, 1, 2]]]  # single tokens predict nothing


def test_a_conversation_is_laid_out_as_the_policy_reads_its_own(tmp_path: Path) -> None:
    """Token for token what rollouts hold, with the end after each answer; feedback has none."""
    agent = Supervised("tiny", "DialogueQA-v0", prompts=3, group_size=1, eval_every=0)
    player = Teacher(agent.policy.begin(), np.random.default_rng(0))
    steps = play(player, agent.envs, seeds=[1, 2, 3], look=True)
    file = tmp_path / "played.jsonl"
    lasts = {step.row: step.info["messages"] for step in steps}
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in lasts.values()))
    pieces = encode(load_texts(str(file)), agent.policy.tokenizer, 10**6)
    for (ids,), sequence, messages in zip(pieces, player.sequences, lasts.values(), strict=True):
        said = agent.policy.tokenizer(f"\nUser: {messages[-1]['content']}")["input_ids"]
        assert ids == sequence.ids + said


def test_a_conversation_of_a_chat_model_is_laid_out_by_its_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    [[ids]] = encode(Texts(((("user", "a"), ("assistant", "b")),)), tokenizer, 10)
    assert ids == tokenizer("a b ")["input_ids"]


def test_no_piece_of_a_text_that_is_held_out_is_trained_on() -> None:
    pieces = [[[i, j] for j in range(3)] for i in range(50)]
    train, held = hold_out(pieces, 0.2)
    assert {row[0] for row in train}.isdisjoint(row[0] for row in held)
    assert len(held) == 3 * 10
    assert sorted(train + held) == sorted(row for parts in pieces for row in parts)
    again = hold_out(pieces[::-1], 0.2)
    assert [sorted(part) for part in again] == [sorted(train), sorted(held)]


def test_of_a_single_text_pieces_are_held_out() -> None:
    train, held = hold_out([[[i, i] for i in range(10)]], 0.3)
    assert len(held) == 3
    assert len(train) == 7
    with pytest.raises(ValueError, match="single short text"):
        hold_out([[[1, 2]]], 0.1)


def test_batches_hold_every_row_once_and_their_number_is_the_same() -> None:
    rows = rows_of(101, seed=6)
    made = [batches(rows, 100, [1, epoch]) for epoch in range(3)]
    for epoch in made:
        assert sorted(row for batch in epoch for row in batch) == sorted(rows)
        assert all(len(batch) * max(map(len, batch)) <= 100 for batch in epoch)
    assert len({len(epoch) for epoch in made}) == 1
    assert made[0] != made[1]
    assert batches(rows, 1, [0]) != rows  # each by itself
    assert {len(batch) for batch in batches(rows, 1, [0])} == {1}


# --- the job -------------------------------------------------------------------------------------


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_learns_a_text_by_heart(tmp_path: Path, arguments: Callable[..., Arguments]) -> None:
    (tmp_path / "text.txt").write_text("a a b " * 200)
    a = arguments(data=str(tmp_path / "text.txt"), max_length=30, epochs=20)
    result = run(a)
    before, after = result["perplexity"]["before"], result["perplexity"]["after"]
    assert before > 2.0  # worse than a guess between two words
    assert after < 1.1
    policy = CausalLMPolicy.from_pretrained(a.out, device="cpu")
    _, held = hold_out(encode(load_texts(a.data), policy.tokenizer, 30), a.held_out)
    assert perplexity(policy, held, 64) == pytest.approx(after, rel=1e-6)


def test_what_is_held_out_is_never_trained_on_and_the_best_is_kept(
    arguments: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Row] = []
    update = Training.update

    def watched(self: Training, batch: list[Row], steps: int) -> dict[str, float]:
        seen.extend(batch)
        return update(self, batch, steps)

    monkeypatch.setattr(Training, "update", watched)
    a = arguments(learning_rate=0.1, epochs=12, evaluations=12)  # it soon knows them too well
    result = run(a)
    policy = CausalLMPolicy.from_pretrained(a.out, device="cpu")
    train, held = hold_out(encode(load_texts(a.data), policy.tokenizer, 64), a.held_out)
    assert {*map(tuple, seen)} == {*map(tuple, train)}
    assert not {*map(tuple, seen)} & {*map(tuple, held)}
    rows = [json.loads(line) for line in (a.out / "metrics.jsonl").read_text().splitlines()]
    measured = {m["step"]: m["eval/perplexity"] for m in rows if "eval/perplexity" in m}
    best = min(measured, key=measured.__getitem__)
    assert best == result["best_step"] < result["steps"]
    assert [m["step"] for m in rows] == list(range(result["steps"] + 1))
    assert perplexity(policy, held, 64) == pytest.approx(measured[best], rel=1e-6)


@pytest.mark.parametrize("stopped_at", [2, 11])
def test_a_stopped_run_goes_on_bit_for_bit(
    arguments: Callable[..., Arguments],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stopped_at: int,
) -> None:
    whole = arguments(out=tmp_path / "whole")
    expected = run(whole)
    assert expected["steps"] > 12
    with monkeypatch.context() as patched:
        update = Training.update

        def stopping(self: Training, batch: list[Row], steps: int) -> dict[str, float]:
            found = update(self, batch, steps)
            if self.state["step"] == stopped_at:
                raise KeyboardInterrupt
            return found

        patched.setattr(Training, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(arguments())
    assert run(arguments()) == expected
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (whole.out / name).read_bytes()
    assert not (tmp_path / "out" / "training").exists()
    assert run(arguments()) == expected  # there is nothing left to do


def test_a_crash_while_the_result_is_written_loses_nothing(
    arguments: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = run(arguments(out=tmp_path / "whole"))
    with monkeypatch.context() as patched:

        def full(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        patched.setattr(pretraining.shutil, "copytree", full)
        with pytest.raises(OSError, match="No space"):
            run(arguments())
    assert run(arguments()) == expected


def test_adapters_are_trained_alone_and_resumed(
    arguments: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = run(arguments(lora_rank=2, out=tmp_path / "whole"))
    assert expected["perplexity"]["after"] < expected["perplexity"]["before"]
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    with monkeypatch.context() as patched:
        save = Training.save

        def once(self: Training, folder: Path) -> None:
            save(self, folder)
            raise KeyboardInterrupt

        patched.setattr(Training, "save", once)
        with pytest.raises(KeyboardInterrupt):
            run(arguments(lora_rank=2))
    assert run(arguments(lora_rank=2)) == expected
    CausalLMPolicy.from_pretrained(tmp_path / "out", device="cpu")


def test_a_folder_of_something_else_is_refused(
    arguments: Callable[..., Arguments], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"not empty, and holds no run. Choose another --out"):
        run(arguments(out=tmp_path / "model"))
    run(arguments())
    for changed in ({"seed": 1}, {"epochs": 3}):
        [(name, value)] = changed.items()
        with pytest.raises(ValueError, match=f"begun with {name} .*, and now it is {value}"):
            run(arguments(**changed))
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}\n{"text": "b a"}\n')
    with pytest.raises(ValueError, match="begun with texts"):
        run(arguments())


def test_a_loss_that_is_not_finite_stops_the_run(
    arguments: Callable[..., Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pretraining,
        "negative_log_likelihood",
        lambda policy, rows: negative_log_likelihood(policy, rows) * math.inf,
    )
    training = Training(arguments(), None)
    before = [p.clone() for p in training.parameters]
    with pytest.raises(FloatingPointError, match=r"At step 0 the loss is inf.*--learning-rate"):
        training.update(rows_of(3, seed=7), 4)
    for old, new in zip(before, training.parameters, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"max_length": 1}, "max_length is 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"held_out": math.nan}, "held_out is nan"),
    ],
)
def test_impossible_arguments_are_refused(wrong: dict[str, Any], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Arguments("x", **wrong)


def test_the_command_line_tells_what_to_do_next(
    arguments: Callable[..., Arguments], capsys: pytest.CaptureFixture[str]
) -> None:
    a = arguments()
    argv = ["--data", a.data, "--policy", a.policy, "--out", str(a.out), "--steps", "3"]
    pretrain.main(argv)
    assert f"python -m agents.train --policy {a.out}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*argv, "--seed", "5"])
    assert ended.value.code == 2
    assert "was begun with seed 0, and now it is 5" in capsys.readouterr().err


def test_hidden_files_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.md").write_text("hidden")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (tmp_path / "b.jsonl").write_text('{"text": "one", "split": null}\n\n{"text": "two"}\n')
    assert load_texts(str(tmp_path)).texts == ("with a byte order mark", "one", "two")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8 text"):
        load_texts(str(tmp_path))
