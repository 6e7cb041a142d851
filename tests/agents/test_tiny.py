"""The embedded model is what its card says."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import Reinforce
from agents.policies.models import TINY

CARD = (TINY / "MODEL_CARD.md").read_text()
SCORES = {
    row[0]: float(row[1]) for row in re.findall(r"^\| ([\w-]+-v0) \| (0\.\d+)", CARD, re.MULTILINE)
}


@pytest.mark.parametrize(
    "env",
    [
        "DialogueQA-v0",
        pytest.param("Summarization-v0", marks=pytest.mark.slow),
        pytest.param("RecommendationClicks-v0", marks=pytest.mark.slow),
    ],
)
def test_greedy_scores_are_those_of_the_card(env: str) -> None:
    settings = {"max_new_tokens": 40} if env == "Summarization-v0" else {}
    found = Reinforce("tiny", env, device="cpu", **settings).evaluate("validation")
    # Another processor rounds otherwise and may say another word now and then.
    assert found.score == pytest.approx(SCORES[env], abs=0.01)
    if env == "DialogueQA-v0":
        assert found.part("contains") >= 0.6, "it does not read"
        assert found.score <= 0.8, "nothing is left to learn"


def test_it_is_loaded_as_any_model_is() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert f"{model.num_parameters():,} parameters" in CARD
    assert len(tokenizer) == model.config.vocab_size
    text = "User: 1987 ist schön…\nAssistant:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1987")["input_ids"]) == 4
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()


def test_it_is_small() -> None:
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 12 * 2**20
