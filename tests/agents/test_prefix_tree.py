"""What sequences share is read once, and nothing that a policy says of them changes by it."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from agents.distill import divergences
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.policies.models import Critic, frozen_copy
from agents.policies.prefix_tree import (
    forest,
    reads_trees,
    rows_of,
    sampled_tokens,
    shared_with_previous,
)
from agents.reinforce import Reinforce
from agents.sampling import Completion, SamplingConfig
from three_tokens import make_tokenizer, relative

VOCABULARY = 11
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
    "eos_token_id": 0,
}


def make_model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        shape: dict[str, Any] = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
        config = GPT2Config(vocab_size=VOCABULARY, **shape, initializer_range=0.4)
        return GPT2LMHeadModel(config).double()
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4})).double()
    if family == "granite":  # caps its logits, so trunk and head cannot be taken apart
        return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=2.0)).double()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=20)).double()
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double()


FAMILIES = ("gpt2", "llama", "neox", "granite", "mistral")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()  # of no use here, but every policy has one


def conversation(row: int, *pieces: tuple[int, list[int]], support: Tensor | None = None) -> Any:
    made = TokenSequence(row)
    for turn, ids in pieces:
        if turn < 0:
            made.read(ids)
        else:
            made.wrote(turn, Completion(ids, [0.0] * len(ids), False, support))
    return made


def group() -> list[TokenSequence]:
    """Two episodes, four and two times: answers alike, alike at first, different, none."""
    ask, more = (-1, [5, 6, 7, 8]), (-1, [9, 6])
    return [
        conversation(0, ask, (0, [3, 4, 0]), more, (1, [2, 0])),
        conversation(1, ask, (0, [3, 4, 0]), more, (1, [2, 0])),
        conversation(2, ask, (0, [3, 4, 0]), more, (1, [2, 3])),
        conversation(3, ask, (0, [4, 0]), more, (1, [2, 0])),
        conversation(4, (-1, [5, 9]), (0, [1])),
        conversation(5, (-1, [5, 9]), (0, [1, 0])),
        conversation(6, ask),
    ]


def both(policy: CausalLMPolicy) -> list[dict[str, Tensor]]:
    """What a policy says of the group, and gradients: as trees, and every sequence for itself."""
    reference = frozen_copy(policy)
    with torch.no_grad():
        for index, p in enumerate(policy.model.parameters()):
            p.add_(0.05 * torch.sin(torch.arange(p.numel()) + index).view_as(p).to(p))
    critic = Critic(16).double()
    torch.nn.init.normal_(critic.weight)
    found = []
    for trees in (True, False):
        policy.trees = reference.trees = trees
        policy.model.zero_grad()
        critic.zero_grad()
        scores = policy.score(group(), reference, critic)
        assert scores.kls is not None
        assert scores.values is not None
        columns = (scores.log_probs, scores.entropies, scores.kls, scores.values)
        weights = [
            torch.cos(torch.arange(len(c), dtype=c.dtype) + i) for i, c in enumerate(columns)
        ]
        sum((c * w).sum() for c, w in zip(columns, weights, strict=True)).backward()  # type: ignore[union-attr]
        said = dict(zip(("log_probs", "entropies", "kls", "values"), columns, strict=True))
        named = [*policy.model.named_parameters(), *critic.named_parameters()]
        found.append({**said, **{n: p.grad.clone() for n, p in named if p.grad is not None}})
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_change_neither_scores_nor_gradients(family: str, tokenizer: Any) -> None:
    policy = CausalLMPolicy(make_model(family), tokenizer)
    assert policy.trees
    assert policy.lay_out(group()).forest.until is not None
    trees, plain = both(policy)
    assert trees.keys() == plain.keys()
    for name, expected in plain.items():
        # Norms of the others work in float32, whatever the weights are.
        limit = 1e-12 if family in ("gpt2", "neox") else 1e-6
        assert relative(trees[name], expected) < limit, name


def test_what_could_be_drawn_is_kept_token_by_token(tokenizer: Any) -> None:
    sampling = SamplingConfig(4, temperature=0.7, top_k=3)
    policy = CausalLMPolicy(make_model("llama"), tokenizer, sampling=sampling)
    supports = torch.ones(2, 2, VOCABULARY, dtype=torch.bool)
    supports[0, :, 9], supports[1, :, 8] = False, False  # of one prefix, but not alike
    said = [conversation(i, (-1, [5, 6]), (0, [3, 0]), support=s) for i, s in enumerate(supports)]
    found = []
    for trees in (True, False):
        policy.trees = trees
        scores = policy.score(said)
        found.append(torch.cat([scores.log_probs, scores.entropies]))
    assert relative(found[0], found[1]) < 1e-6
    first, second = found[0][:4].view(2, 2)
    assert (first - second).abs().min() > 1e-3


def test_a_model_that_takes_no_mask_reads_sequences_one_by_one(tokenizer: Any) -> None:
    class Deaf(LlamaForCausalLM):
        """A model whose trunk hears nothing of masks, as a recurrent one would not."""

    model = make_model("llama")
    model.__class__ = Deaf
    forward = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: forward(*args, **kwargs)
    assert not reads_trees(model, None)
    policy = CausalLMPolicy(model, tokenizer)
    assert not policy.trees
    assert not policy.can_compile
    with pytest.raises(ValueError, match="compile is True, and Deaf does not see all"):
        Reinforce(policy, "DialogueQA-v0", compile=True)
    expected = CausalLMPolicy(make_model("llama"), tokenizer)
    assert expected.can_compile
    found, wanted = (made.score(group()).log_probs for made in (policy, expected))
    assert relative(found, wanted) < 1e-6


def test_a_window_of_attention_that_is_too_short_is_left_to_the_model(tokenizer: Any) -> None:
    policy = CausalLMPolicy(make_model("mistral"), tokenizer)
    assert policy.trees
    assert not policy.can_compile
    long = [conversation(i, (-1, [5] * 21), (0, [i, 0])) for i in (1, 2)]
    assert policy.lay_out(long).forest.until is None
    short = [conversation(i, (-1, [5] * 14), (0, [i, 0])) for i in (1, 2)]
    assert policy.lay_out(short).forest.until is not None
    together, alone = (policy.score(said).log_probs[:2] for said in (long, long[:1]))
    assert relative(together, alone) < 1e-6


def test_a_window_that_counts_slots_limits_the_rows(tokenizer: Any) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_heads": 2, "num_layers": 2}
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 24}
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(
        GPTNeoConfig(**sizes, **kinds, max_position_embeddings=64, initializer_range=0.25)
    )
    policy = CausalLMPolicy(model.double(), tokenizer)
    assert policy.window == 24
    said = [conversation(i, (-1, [5] * 8), (0, [i] * 8)) for i in range(6)]
    assert policy.lay_out(said).forest.until is not None
    trees = policy.score(said).log_probs
    policy.trees = False
    assert relative(trees, policy.score(said).log_probs) < 1e-9


def test_what_a_teacher_cannot_read_as_a_tree_is_read_plainly(tokenizer: Any) -> None:
    student = CausalLMPolicy(make_model("llama"), tokenizer)
    teacher = CausalLMPolicy(make_model("mistral"), tokenizer)
    teacher.window = 8
    torch.nn.init.normal_(teacher.model.lm_head.weight)
    said = [conversation(i, (-1, [5] * 10), (0, [i, 0])) for i in (1, 2)]
    assert student.lay_out(said).forest.until is not None
    assert student.lay_out(said, teacher).forest.until is None
    found = divergences(teacher, student, said)
    student.trees = False
    assert relative(found, divergences(teacher, student, said)) < 1e-6  # norms are in float32


# --- the layout ----------------------------------------------------------------------------------


sequences_of = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=300)
@given(sequences_of, st.integers(1, 40))
def test_a_node_sees_its_own_prefix_and_nothing_else(said: list[list[int]], limit: int) -> None:
    rows = rows_of(said, limit=limit)
    assert sorted(i for members, _ in rows for i in members) == list(range(len(said)))
    laid_out = forest(said, [members for members, _ in rows], pad=9)
    height, width = laid_out.ids.shape
    assert width <= max(size for _, size in rows)
    mask = laid_out.mask(torch.float32, torch.device("cpu"))
    if mask is None:
        assert all(len(members) == 1 for members, _ in rows)
        seen = torch.ones(width, width, dtype=torch.bool).tril().expand(height, width, width)
    else:
        assert mask.shape == (height, 1, width, width)
        seen = mask[:, 0] == 0
    assert seen.any(-1).all()
    ids, positions = laid_out.ids.flatten(), laid_out.positions.flatten()
    for s, nodes in zip(said, laid_out.nodes, strict=True):
        assert ids[nodes].tolist() == s
        if mask is not None:
            assert positions[nodes].tolist() == list(range(len(s)))
        for length, node in enumerate(nodes.tolist(), 1):
            at = seen[node // width, node % width].nonzero()[:, 0] + node // width * width
            assert ids[at].tolist() == s[:length]
    for members, size in rows:
        assert len({n for i in members for n in laid_out.nodes[i].tolist()}) <= size
        assert size <= limit or len(members) == 1


@settings(deadline=None, max_examples=100)
@given(sequences_of)
def test_every_distinct_prefix_is_read_once(said: list[list[int]]) -> None:
    said = [[7, 7, 7, *s] for s in said]  # one tree, as of one prompt
    rows = rows_of(said, limit=10**6)
    prefixes = {tuple(s[: n + 1]) for s in said for n in range(len(s))}
    if len(rows) == 1:
        assert rows[0][1] == len(prefixes)
    assert sum(size for _, size in rows) <= sum(map(len, said))
    copies = rows_of([said[0]] * 9, limit=10**6)
    assert [size for _, size in copies] == [len(said[0])]


@settings(deadline=None, max_examples=200)
@given(sequences_of)
def test_shared_beginnings_are_counted(said: list[list[int]]) -> None:
    expected = [0]
    for before, after in itertools.pairwise(said):
        same = [a == b for a, b in zip(before, after, strict=False)]
        expected.append((*same, False).index(False))
    assert shared_with_previous(said) == expected
    assert shared_with_previous([]) == []


@settings(deadline=None, max_examples=200)
@given(sequences_of, st.data())
def test_sampled_tokens_are_found_at_the_prefix_they_follow(
    said: list[list[int]], data: st.DataObject
) -> None:
    said = [[7, *s] for s in said]
    sampled = [
        np.array([False, *data.draw(st.lists(st.booleans(), min_size=n, max_size=n))])
        for n in (len(s) - 1 for s in said)
    ]
    laid_out = forest(said, [members for members, _ in rows_of(said)], pad=9)
    expected = [
        (laid_out.nodes[i][t - 1], s[t])
        for i, s in enumerate(said)
        for t in np.flatnonzero(sampled[i])
    ]
    for distinct in (True, False):
        at = sampled_tokens(laid_out, said, sampled, distinct=distinct)
        places, targets = at.places[at.place_of], at.targets.flatten()[at.slot_of]
        assert list(zip(places.tolist(), targets.tolist(), strict=True)) == expected
        slots = at.slot_of // max(1, at.targets.shape[1])
        assert torch.equal(slots, at.place_of)
    at = sampled_tokens(laid_out, said, sampled)
    assert len(at.places) == len({place for place, _ in expected})
    assert len(set(at.slot_of.tolist())) == len(set(expected))
