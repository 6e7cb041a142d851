"""Similarity and naturalness against slow, obvious ways, and as parts of Summarization's score."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

import llm_envs
from llm_envs.scoring import learned
from llm_envs.tasks.summarization import INSTRUCTION, Summarization

MINILM = Path(__file__).parents[2] / "models" / "all-MiniLM-L6-v2"
CONTEXT = f"User: {INSTRUCTION}\nAssistant:"
TEXTS = [
    "a shell",
    "GNU Bourne Again SHell",
    "a shell that reads commands from a terminal or from a file, and runs them one by one",
    "日本の首都 \ud800",
    "word " * 300,
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with random weights, that reads bytes."""
    folder = tmp_path_factory.mktemp("encoder")
    special = {"<pad>": 0, "<cls>": 1, "<sep>": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({**special, **{c: i for i, c in enumerate(alphabet, 3)}}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>").save_pretrained(folder)
    config = BertConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=300, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny() -> str:
    return learned.check_model("naturalness_model", "tiny")


def pooled(text: str, folder: str) -> Any:
    """Embed one text as sentence-transformers does: mean pooling by the mask, then unit length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = text.replace("\ud800", "?")
    read = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
    mask = read["attention_mask"].unsqueeze(-1).float()
    with torch.no_grad():
        states = BertModel.from_pretrained(folder)(**read).last_hidden_state
    mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return (mean / mean.norm(dim=1, keepdim=True))[0].numpy()


def test_embeddings_are_those_of_sentence_transformers(encoder: str) -> None:
    expected = np.stack([pooled(text, encoder) for text in TEXTS])
    for texts in (TEXTS, TEXTS[::-1], TEXTS * 9):
        found = learned.embed(texts, encoder)
        rows = np.array([TEXTS.index(text) for text in texts])
        np.testing.assert_allclose(found, expected[rows], atol=1e-5)
    assert np.abs(expected @ expected.T - np.eye(len(TEXTS))).max() > 0.1  # they do differ


def test_similarity_is_the_cosine_with_the_nearest_reference(encoder: str) -> None:
    answers = [TEXTS[0], TEXTS[1], "", " ...!", TEXTS[0]]
    references = [TEXTS[1:3], TEXTS[1:2], TEXTS[:1], TEXTS[:1], [TEXTS[3], TEXTS[0], TEXTS[2]]]
    cosine = {(a, r): float(pooled(a, encoder) @ pooled(r, encoder)) for a in TEXTS for r in TEXTS}
    expected = [max(cosine[TEXTS[0], r] for r in TEXTS[1:3]), 1.0, 0.0, 0.0, 1.0]
    found = learned.similarity(answers, references, encoder)
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(0.0 <= value <= 1.0 for value in found)
    assert learned.similarity([], [], encoder) == []


def test_a_negative_cosine_counts_as_none(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = {"one": [1.0, 0.0], "other": [-1.0, 0.0], "near": [0.6, 0.8]}
    monkeypatch.setattr(
        learned, "embed", lambda texts, model: np.array([vectors[t] for t in texts], np.float32)
    )
    learned._reference.cache_clear()
    found = learned.similarity(["one", "one"], [["other"], ["other", "near"]], "any")
    learned._reference.cache_clear()
    assert found == pytest.approx([0.0, 0.6])


def surprise(text: str, folder: str) -> float:
    """Add up the log-probabilities of the tokens, one forward pass for each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prefix = tokenizer(CONTEXT).input_ids
    ids = tokenizer(" " + text).input_ids[: 256 - len(prefix)]
    logs = []
    with torch.no_grad():
        for t, token in enumerate(ids):
            logits = model(torch.tensor([prefix + ids[:t]])).logits[0, -1]
            logs.append(logits.log_softmax(-1)[token].item())
    return -sum(logs) / len(logs)


def test_surprise_is_the_mean_over_tokens_of_their_log_probabilities(tiny: str) -> None:
    texts = [*TEXTS[:3], "?"]
    expected = [surprise(text, tiny) for text in texts]
    assert learned.surprises(texts, tiny, CONTEXT) == pytest.approx(expected, rel=1e-4)
    again = learned.surprises(texts[::-1] * 7, tiny, CONTEXT)
    assert again == pytest.approx(expected[::-1] * 7, rel=1e-4)


def test_what_is_as_surprising_as_a_reference_is_natural(tiny: str) -> None:
    reference, other = "a tool that shows the weather", "GNU Bourne Again SHell"
    answers = [reference, "", "?!", "the " * 60, "xq zj vk wp", reference, reference]
    references = [*[[reference]] * 5, [other], [other, reference]]
    found = learned.naturalness(answers, references, tiny, CONTEXT)
    distance = abs(surprise(reference, tiny) - surprise(other, tiny))
    assert found[0] == pytest.approx(1.0, abs=1e-4)
    assert found[1:3] == [0.0, 0.0]
    assert found[3] < 0.05, "words said again and again are foreseen, and not natural"
    assert found[4] < 0.9
    assert found[5] == pytest.approx(math.exp(-distance), rel=1e-3)
    assert found[6] == pytest.approx(1.0, abs=1e-4)
    assert learned.naturalness([], [], tiny, CONTEXT) == []


def test_what_was_scored_before_changes_no_bit(encoder: str, tiny: str) -> None:
    answers, references = TEXTS[:3], [[TEXTS[1]], [TEXTS[2], TEXTS[0]], [TEXTS[0]]]

    def scores() -> tuple[Sequence[float], Sequence[float]]:
        return (
            learned.similarity(answers, references, encoder),
            learned.naturalness(answers, references, tiny, CONTEXT),
        )

    learned.similarity([TEXTS[0]], [[TEXTS[2]]], encoder)  # one of them is remembered
    warm = scores()
    learned._reference.cache_clear()
    learned._reference_surprise.cache_clear()
    learned._loaded.cache_clear()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert scores() == warm
    assert torch.equal(torch.get_rng_state(), before), "reading a model drew from torch"


# --- as parts of a score ----------------------------------------------------------------------


def infos(answers: Sequence[str], **arguments: Any) -> list[dict[str, Any]]:
    envs = gym.make_vec("Summarization-v0", len(answers), split="validation", **arguments)
    envs.reset(seed=1)
    *_, info = envs.step(tuple(answers))
    return llm_envs.core.vector.step_infos(info, len(answers))


ANSWERS = ("a package of Debian", "", "utility for the shell", "the the the the")


def test_the_score_is_the_weighted_mean_of_named_parts(encoder: str) -> None:
    weights = {"rouge": 3, "similarity": 1.5, "naturalness": 0.5}
    found = infos(ANSWERS, score_weights=weights, similarity_model=encoder)
    plain = infos(ANSWERS)
    for info, without in zip(found, plain, strict=True):
        rouge = np.mean([info[f"score/rouge_{part}"] for part in "12l"])
        expected = 0.6 * rouge + 0.3 * info["score/similarity"] + 0.1 * info["score/naturalness"]
        assert info["score"] == pytest.approx(expected)
        assert 0.0 <= info["score"] <= 1.0
        assert {name for name in info if name.startswith("score/")} == {
            *(name for name in without if name.startswith("score/")),
            "score/similarity",
            "score/naturalness",
        }
    assert found[1]["score"] == 0.0
    assert found[0]["score/similarity"] != found[2]["score/similarity"]


def test_a_part_without_weight_is_told_and_not_rewarded(encoder: str) -> None:
    found = infos(ANSWERS, score_weights={"rouge": 2, "similarity": 0}, similarity_model=encoder)
    assert [info["score"] for info in found] == [info["score"] for info in infos(ANSWERS)]
    assert found[0]["score/similarity"] > 0.0
    assert "score/naturalness" not in found[0]


def test_the_oracle_still_scores_one(encoder: str) -> None:
    weights = {"similarity": 1, "naturalness": 1}
    env = gym.make("Summarization-v0", score_weights=weights, similarity_model=encoder)
    for seed in range(3):
        env.reset(seed=seed)
        *_, info = env.step(env.unwrapped.references[0])  # type: ignore[attr-defined]
        assert info["score"] == pytest.approx(1.0, abs=1e-4)


def test_a_task_is_pickled_by_its_recipe(
    encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(encoder).parent)
    arguments = {"score_weights": {"similarity": 1.0}, "similarity_model": Path(encoder).name}
    env = gym.make("Summarization-v0", split="validation", **arguments)
    task = env.unwrapped.task  # type: ignore[attr-defined]
    other = pickle.loads(pickle.dumps(task))
    assert other is not task
    monkeypatch.chdir(tmp_path)  # a relative folder was resolved when it was given
    references = [task.examples[0].summaries]
    assert task.score_answers(["a thing"], references) == other.score_answers(
        ["a thing"], references
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score_weights": [1]}, TypeError, r"score_weights is \[1\]\. Give a dict such as"),
        ({"score_weights": {"rogue": 1}}, ValueError, "'rogue'.* Did you mean 'rouge'"),
        ({"score_weights": {"rouge": -1}}, ValueError, "weight of 'rouge' is -1"),
        ({"score_weights": {"rouge": math.nan}}, ValueError, "weight of 'rouge' is nan"),
        ({"score_weights": {"rouge": True}}, TypeError, "weight of 'rouge' is True"),
        ({"score_weights": {"rouge": "1"}}, TypeError, "weight of 'rouge' is '1'"),
        ({"score_weights": {"rouge": 0}}, ValueError, "nothing is scored"),
        ({"score_weights": {}}, ValueError, "nothing is scored"),
        ({"similarity_model": "x"}, ValueError, "score_weights names no 'similarity'"),
        (
            {"score_weights": {"similarity": 1}, "similarity_model": "models/no-such"},
            ValueError,
            r"similarity_model is 'models/no-such', and no model .*no such folder.*fetch_minilm",
        ),
        (
            {"score_weights": {"naturalness": 1}, "naturalness_model": "tests"},
            ValueError,
            r"naturalness_model is '.*tests', and no model can be read there",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    arguments: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(error, match=message):
        Summarization(dataset="no such data set", **arguments)


def test_without_learned_parts_no_torch_is_imported() -> None:
    code = (
        "import sys, gymnasium as gym, llm_envs\n"
        "env = gym.make('Summarization-v0', score_weights={'rouge': 1})\n"
        "env.reset(seed=1)\n"
        "env.step('a')\n"
        "assert not {'torch', 'transformers', 'agents'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not MINILM.is_dir(), reason="scripts/fetch_minilm.py has not been run")
def test_minilm_knows_a_paraphrase_from_another_thing() -> None:
    reference = ["a program that plays music"]
    answers = ["software for listening to songs", "a library of linear algebra"]
    near, far = learned.similarity(answers, [reference] * 2, str(MINILM))
    assert near > 0.5 > 0.3 > far
    expected = pooled(reference[0], str(MINILM))
    np.testing.assert_allclose(learned.embed(reference, str(MINILM))[0], expected, atol=1e-5)
