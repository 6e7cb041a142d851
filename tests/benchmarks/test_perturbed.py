"""Perturbed questions: the adversary's harm by hand, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from agents.policies.causal_lm import CausalLMPolicy
from agents.sampling import SamplingConfig
from benchmarks import perturbed
from benchmarks.experiment import Run
from benchmarks.perturbed import Adversary, Arguments, answers
from fake_runs import write_run

ASKED = "User: Peru lies in America. Its capital is Lima. {} is its capital?\nAssistant:"


def test_the_adversary_says_how_unlikely_the_own_answer_becomes() -> None:
    policy = CausalLMPolicy.from_pretrained("tiny", sampling=SamplingConfig(8))
    conversations = [ASKED.format(word) for word in ("What", "Waht", "One thing, please. What")]
    found = Adversary(policy)(conversations)
    (said,) = (
        policy.begin(SamplingConfig(8, temperature=0.0)).act({0: conversations[0]}, 0).values()
    )
    answer = [*policy.tokenizer(said)["input_ids"], policy.end]
    for text, harm in zip(conversations, found, strict=True):
        ids = policy.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = policy.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert harm == pytest.approx(-log_probs.sum().item(), rel=1e-3)
    assert len(set(found)) == 3


def test_every_condition_plays_the_same_episodes() -> None:
    policy = CausalLMPolicy.from_pretrained("tiny", sampling=SamplingConfig(8))
    a = Arguments((Path("x"),), episodes=3)
    found = {c: answers(policy, c, a) for c in ("clean", "typos 0.5", "all, worst of 8")}
    assert len({e.ids for e in found.values()}) == 1
    asked = {c: [t["question"] for t in e.transcripts] for c, e in found.items()}
    assert asked["clean"] != asked["typos 0.5"] != asked["all, worst of 8"]
    assert len(perturbed.cells(found)) == 3


def test_runs_on_another_environment_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path, Run("Summarization-v0", "reinforce", 1, 8))
    for given, cure in ((folder, "Name runs of a language model"), (tmp_path, "holds no config")):
        monkeypatch.setattr(sys, "argv", ["perturbed", str(given)])
        with pytest.raises(SystemExit, match=cure):
            perturbed.main()
