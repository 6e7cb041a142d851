"""Policies against the slow, obvious way: one row, no padding, no cache, all logits.

Models have random weights and a head with a bias towards the end of sequence; the tokenizer is a
byte-level BPE with few merges, so that text can be written in several ways.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from agents.objectives import kl_divergence
from agents.policies.candidate import CandidatePolicy, Decision
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.policies.models import (
    attention_window,
    eval_mode,
    frozen_copy,
    load_model,
    split_model,
)
from agents.rollout import Rollout, collect
from agents.sampling import Completion, SamplingConfig, sampling_logits
from largest import LargestTensor
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.core.vector import TextVectorEnv
from three_tokens import relative

FAMILIES = ("gpt2", "llama", "llama-gqa")
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.25,
}


def make_model(
    family: str,
    vocabulary: int,
    *,
    context: int = 256,
    dropout: float = 0.0,
    end_bias: float = 4.0,
    seed: int = 0,
) -> Any:
    torch.manual_seed(seed)
    common: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {**common, **SMALL, "max_position_embeddings": context}
    model: Any
    if family == "gpt2":
        shape: dict[str, Any] = {"n_positions": context, "n_embd": 16, "n_layer": 2, "n_head": 4}
        drops: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        model = GPT2LMHeadModel(GPT2Config(**common, **shape, **drops, initializer_range=0.4))
    elif family == "granite":
        model = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=2.0))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=24))
    else:
        sizes |= {"num_key_value_heads": 2 if "gqa" in family else 4, "attention_dropout": dropout}
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    head = torch.nn.Linear(16, vocabulary)
    head.weight = model.lm_head.weight
    head.bias.data.zero_()[0] = end_bias
    model.lm_head = head
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(pad: str | None = "<pad>") -> Any:
    """Byte-level BPE: the end of sequence is 0, then (with ``pad``) padding, then 256 bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        special_tokens=["<end>", *([pad] if pad else [])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = ["User: What is its capital?\nAssistant: Its capital is Lima. What is that then?"]
    raw.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token=pad)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_policy(family: str, tokenizer: Any, **arguments: Any) -> CausalLMPolicy:
    of_model = ("context", "dropout", "end_bias")
    shape = {name: arguments.pop(name) for name in of_model if name in arguments}
    model = make_model(family, len(tokenizer), **shape)
    arguments.setdefault("sampling", SamplingConfig(8))
    return CausalLMPolicy(model, tokenizer, **arguments)


def sequence(*pieces: tuple[int, Sequence[int]], row: int = 0) -> TokenSequence:
    """A conversation of (turn, ids); turn -1 is the environment's."""
    made = TokenSequence(row)
    for turn, ids in pieces:
        if turn < 0:
            made.read(ids)
        else:
            made.wrote(turn, Completion(list(ids), [0.0] * len(ids), cut=ids[-1] != 0))
    return made


RAGGED = [
    sequence((-1, [5, 6, 7]), (0, [8, 9, 0]), (-1, [10, 11]), (1, [12, 0])),
    sequence((-1, [5]), (0, [6])),
    sequence((-1, list(range(20, 50))), (0, [3, 4, 5, 6, 7, 0])),
    sequence((-1, [9, 9]), (0, [0]), (-1, [2]), (1, [0]), (-1, [2]), (2, [7, 7])),
]


def naive_log_dists(model: Any, made: TokenSequence) -> Tensor:
    """(sampled, vocabulary) log-distributions of one conversation, read alone."""
    logits = model(input_ids=torch.tensor([made.ids]), use_cache=False).logits[0]
    at = [i - 1 for i, turn in enumerate(made.turns) if turn >= 0]
    log_dists: Tensor = logits[at].float().log_softmax(-1)
    return log_dists


def naive_log_probs(model: Any, made: TokenSequence) -> Tensor:
    targets = [i for i, turn in zip(made.ids, made.turns, strict=True) if turn >= 0]
    return naive_log_dists(model, made)[range(len(targets)), targets]


def sampled_log_probs(sequences: Sequence[TokenSequence]) -> Tensor:
    """What the sampler said of every token when it drew it."""
    pairs = [pair for s in sequences for pair in zip(s.log_probs, s.turns, strict=True)]
    return torch.tensor([log_prob for log_prob, turn in pairs if turn >= 0])


def answer_of(made: TokenSequence, turn: int) -> list[int]:
    return [i for i, t in zip(made.ids, made.turns, strict=True) if t == turn]


def gradients(model: Any, loss: Tensor) -> Tensor:
    """All gradients in one vector."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
         for p in model.parameters()]
    )  # fmt: skip


def perturb(model: Any, scale: float = 0.3) -> None:
    """What an update does, only more so."""
    torch.manual_seed(99)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)


# --- a task whose episodes differ in length --------------------------------------------------


@dataclass(frozen=True)
class Talk:
    id: str
    questions: tuple[str, ...]

    @property
    def unit(self) -> str:
        return self.id


class Talks(WritingTask[Talk]):
    """Episodes of one to four turns; the longer the answer, the better."""

    examples = tuple(
        Talk(str(n), tuple(f"What is {'its ' * (3 * n % 5)}capital {t}? ñ…" for t in range(n)))
        for n in range(1, 5)
    )

    def turns(self, example: Talk) -> int:
        return len(example.questions)

    def ask(self, example: Talk, turn: int) -> str:
        return example.questions[turn]

    def answers(self, example: Talk, turn: int) -> tuple[str, ...]:
        return ("Lima",)

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        return [Outcome(min(1.0, len(a) / 10), {"length": 0.5}, "That is it.") for a in answers]


def play(policy: CausalLMPolicy, group: int = 3) -> tuple[Rollout, Any]:
    """Play each example ``group`` times side by side."""
    count = group * len(Talks.examples)
    envs = TextVectorEnv(count, Talks())
    player = policy.begin()
    original = envs.reset

    def reset(**arguments: Any) -> Any:
        chosen = [i // group for i in range(count)]
        return original(**{**arguments, "options": {"example": chosen}})

    envs.reset = reset  # type: ignore[method-assign]
    return collect(player, envs, seeds=list(range(count))), player


# --- scores ----------------------------------------------------------------------------------


def test_p14_gradients_are_those_of_the_naive_loop(family: str, tokenizer: Any) -> None:
    """Of sampled tokens only: nothing that the environment wrote is in the naive sum."""
    policy = make_policy(family, tokenizer)
    weights = torch.linspace(-1, 2, sum(t >= 0 for s in RAGGED for t in s.turns))
    found = policy.score(RAGGED).log_probs
    expected = torch.cat([naive_log_probs(policy.model, s) for s in RAGGED])
    assert torch.allclose(found, expected, atol=1e-5)
    ours = gradients(policy.model, (found * weights).sum())
    naive = gradients(policy.model, (expected * weights).sum())
    assert relative(ours, naive) < 1e-5


def test_p14_the_head_is_applied_to_nothing_but_sampled_tokens(tokenizer: Any) -> None:
    policy = make_policy("llama", tokenizer)
    seen: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda _, x, __: seen.append(len(x[0])))
    policy.score(RAGGED)
    assert seen == [sum(t >= 0 for s in RAGGED for t in s.turns)]


def test_p12_the_end_of_sequence_has_gradient_and_what_follows_has_none(family: str) -> None:
    """With padding of its own and where padding is the end of sequence."""
    for pad in ("<pad>", None):
        policy = make_policy(family, make_tokenizer(pad))
        assert (policy.pad == policy.end) is (pad is None)
        short, long = sequence((-1, [5, 6]), (0, [7, 0])), RAGGED[2]
        scores = policy.score([short, long])
        assert len(scores.log_probs) == len(scores.entropies) == 2 + 6
        ours = gradients(policy.model, scores.log_probs[:2].sum())
        naive = gradients(policy.model, naive_log_probs(policy.model, short).sum())
        without = gradients(policy.model, naive_log_probs(policy.model, short)[:1].sum())
        assert relative(ours, naive) < 1e-5
        assert relative(ours, without) > 0.1


def test_p11_padding_changes_neither_score_nor_gradient(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    reference = frozen_copy(policy)
    perturb(policy.model, 0.05)
    for model in (policy.model, reference.model):  # in float32 the shape of a batch is rounding
        model.double()
    padded = [*RAGGED, sequence((-1, list(range(2, 122))))]  # adds columns and no sampled token
    found: list[Tensor] = []
    for pad, rows in ((1, RAGGED), (0, RAGGED), (7, RAGGED), (1, padded), (7, padded)):
        policy.pad = reference.pad = pad
        scores = policy.score(rows, reference)
        assert scores.kls is not None
        total = (scores.log_probs + 0.3 * scores.entropies + 0.2 * scores.kls).sum()
        values = torch.cat([scores.log_probs, scores.entropies, scores.kls]).detach()
        found.append(torch.cat([values, gradients(policy.model, total)]))
    for other in found[1:]:
        assert relative(other, found[0]) < 1e-12


@pytest.mark.parametrize("config", [SamplingConfig(8), SamplingConfig(8, top_k=5, top_p=0.9)])
def test_p15_nothing_sampled_gives_a_finite_zero_loss(
    family: str, tokenizer: Any, config: SamplingConfig
) -> None:
    policy = make_policy(family, tokenizer, sampling=config)
    prompts = [sequence((-1, [5, 6, 7])), sequence((-1, [8]))]
    for rows in ([], prompts, [sequence()]):
        scores = policy.score(rows, frozen_copy(policy))
        assert scores.kls is not None
        assert len(scores.log_probs) == len(scores.entropies) == len(scores.kls) == 0
        loss = (scores.log_probs + scores.entropies + scores.kls).sum() / 4
        assert loss.item() == 0.0
        assert not gradients(policy.model, loss).any()
    assert policy.micro_batches([]) == []


def test_p16_left_right_and_no_padding_agree(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    model = policy.model.eval()
    right = policy.score(RAGGED).log_probs
    unpadded = torch.cat([naive_log_probs(model, s) for s in RAGGED])
    width = max(map(len, RAGGED)) + 3
    ids = torch.tensor([[1] * (width - len(s)) + s.ids for s in RAGGED])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in RAGGED])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    log_dists = logits.log_softmax(-1)
    left = [
        log_dists[i, width - len(s) + j - 1, s.ids[j]]
        for i, s in enumerate(RAGGED)
        for j in range(len(s))
        if s.turns[j] >= 0
    ]
    assert torch.allclose(right, unpadded, atol=1e-5)
    assert torch.allclose(right, torch.stack(left), atol=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 10_000])
def test_p23_micro_batches_hold_everything_once(tokenizer: Any, micro_batch_tokens: int) -> None:
    policy = make_policy("gpt2", tokenizer, micro_batch_tokens=micro_batch_tokens)
    rows = [copy.copy(s) for s in RAGGED * 3]
    groups = policy.micro_batches(rows)
    assert sorted(itertools.chain(*groups)) == list(range(len(rows)))
    for group in groups:
        read = policy.lay_out([rows[i] for i in group]).forest.ids
        assert len(read) == 1 or read.numel() <= micro_batch_tokens
    split = torch.cat([policy.score([rows[i] for i in g]).log_probs for g in groups])
    whole = torch.cat([policy.score([rows[i]]).log_probs for g in groups for i in g])
    assert torch.allclose(split, whole, atol=1e-5)


# --- chunks ----------------------------------------------------------------------------------


def largest(policy: Any, sampled: Sequence[Any], reference: Any, at_once: int | None) -> int:
    """The largest tensor of a forward and backward pass with that many logits at once."""
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as seen:
        if at_once is not None:
            patch.setattr("agents.policies.models.LOGITS_AT_ONCE", at_once)
        scores = policy.score(sampled, reference)
        total = (scores.log_probs + scores.entropies + scores.kls).sum()
        total.backward()
    return seen.size


CHUNKED = [
    SamplingConfig(8),
    SamplingConfig(8, temperature=0.7),
    SamplingConfig(8, temperature=1.4, top_k=9, top_p=0.9),
]


@pytest.mark.parametrize(("config", "at_once"), zip(CHUNKED, (1, 5, 2), strict=True))
def test_p22_scores_in_chunks_are_the_naive_ones(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    tokenizer: Any,
    config: SamplingConfig,
    at_once: int,
) -> None:
    """Log-probabilities, entropies and divergences, forward and backward, in float64."""
    policy = make_policy(family, tokenizer, sampling=config, end_bias=0.0)
    reference = frozen_copy(policy)
    played = play(policy, group=1)[0].sequences
    perturb(policy.model, 0.1)
    for model in (policy.model, reference.model):
        model.double()
    heads: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda _, x, __: heads.append(len(x[0])))
    monkeypatch.setattr("agents.policies.models.LOGITS_AT_ONCE", at_once * len(tokenizer) + 1)
    found = policy.score(played, reference)
    assert found.kls is not None
    assert max(heads) == at_once, "a chunk that is larger than was allowed"
    heads.clear()
    naive: list[tuple[Tensor, Tensor, Tensor]] = []
    policy.model.eval()
    for made in played:
        at = [i for i, turn in enumerate(made.turns) if turn >= 0]
        ids = torch.tensor([made.ids])
        logits = policy.model(input_ids=ids).logits[0, [i - 1 for i in at]]
        other = reference.model(input_ids=ids).logits[0, [i - 1 for i in at]].log_softmax(-1)
        inside = logits / config.temperature
        if made.support is not None:
            inside = inside.masked_fill(~made.support, -1e300)
        dist = inside.log_softmax(-1)
        own = logits.log_softmax(-1)
        log_probs = dist[range(len(at)), [made.ids[i] for i in at]]
        entropies = -(dist.exp() * dist).sum(-1)
        naive.append((log_probs, entropies, (own.exp() * (own - other)).sum(-1)))
    expected = [torch.cat(column) for column in zip(*naive, strict=True)]
    assert len(expected[0]) > 2 * at_once
    for mine, its in zip((found.log_probs, found.entropies, found.kls), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)
    weights = torch.linspace(-1, 2, len(expected[0]), dtype=torch.float64)
    for k in range(3):  # each of the three has a gradient of its own
        mine = (found.log_probs, found.entropies, found.kls)[k]
        ours = gradients_of(policy.model, (mine * weights).sum())
        theirs = gradients_of(policy.model, (expected[k] * weights).sum())
        assert relative(ours, theirs) < 1e-6


def gradients_of(model: Any, loss: Tensor) -> Tensor:
    """As ``gradients``, of one of several losses of the same forward pass."""
    model.zero_grad()
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("config", CHUNKED)
def test_p22_the_logits_of_a_batch_never_exist_at_once(
    tokenizer: Any, config: SamplingConfig
) -> None:
    """Neither forward nor backward; and unchunked they do, so this would see them."""
    policy = make_policy("llama", tokenizer, sampling=config, end_bias=0.0)
    # Plain rows: the masks of trees are larger than the logits of so small a vocabulary.
    policy.trees = False
    reference = frozen_copy(policy)
    said = [sequence((-1, [5, 6]), (0, range(20, 100 + i))) for i in range(4)]
    whole = sum(len(s) - 2 for s in said) * len(tokenizer)
    assert largest(policy, said, reference, None) >= whole
    # Larger than the logits of ten tokens are the weights and hidden states alone.
    others = max(16 * len(tokenizer), 32 * 4 * max(map(len, said)))
    assert largest(policy, said, reference, 10 * len(tokenizer)) <= others < whole / 5


# --- rollouts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(8),
        SamplingConfig(8, temperature=1.3),
        SamplingConfig(8, temperature=0.8, top_k=40),
        SamplingConfig(8, temperature=1.5, top_k=30, top_p=0.8),
    ],
)
def test_p17_p19_what_was_sampled_is_what_is_scored(
    family: str, tokenizer: Any, config: SamplingConfig
) -> None:
    policy = make_policy(family, tokenizer, sampling=config)
    rollout, player = play(policy)
    assert rollout.episodes == len(rollout.sequences) == 12
    assert [max(s.turns) + 1 for s in rollout.sequences] == [n for n in (1, 2, 3, 4) for _ in "abc"]
    scores = policy.score(rollout.sequences)
    sampled = sampled_log_probs(rollout.sequences)
    assert torch.allclose(scores.log_probs, sampled, atol=1e-5)
    # And that is the distribution which temperature, top-k and top-p describe, entropy too.
    for made in rollout.sequences[::4]:
        with torch.no_grad():
            scaled, support = sampling_logits(naive_log_dists(policy.model.eval(), made), config)
        log_dist = scaled.log_softmax(-1)
        targets = [i for i, t in zip(made.ids, made.turns, strict=True) if t >= 0]
        mine = policy.score([made])
        assert torch.allclose(mine.log_probs, log_dist[range(len(targets)), targets], atol=1e-5)
        naive = torch.distributions.Categorical(logits=log_dist).entropy()
        assert torch.allclose(mine.entropies, naive, atol=1e-4)
        assert (support is None) is (made.support is None)
    # One answer a step: rollout and sequences tell the same.
    assert rollout.tokens == len(sampled)
    assert len(rollout.rewards) == sum(n * 3 for n in (1, 2, 3, 4))
    belongs = torch.cat(rollout.decision_of)
    assert torch.equal(belongs.unique(), torch.arange(len(rollout.rewards)))
    for made, decisions in zip(rollout.sequences, rollout.decision_of, strict=True):
        assert (rollout.rows[decisions] == made.row).all()
        assert rollout.turns[decisions].tolist() == [t for t in made.turns if t >= 0]
    assert player.answers == len(rollout.rewards)


def test_p13_an_answer_at_the_limit_is_marked_and_no_end_is_forged(tokenizer: Any) -> None:
    policy = make_policy("gpt2", tokenizer, sampling=SamplingConfig(3), end_bias=2.0)
    rollout, player = play(policy)
    cut = 0
    for made in rollout.sequences:
        for turn in range(max(made.turns) + 1):
            answer = answer_of(made, turn)
            cut += answer[-1] != policy.end
            assert len(answer) == 3 or answer[-1] == policy.end
    assert 0 < cut < len(rollout.rewards)
    assert player.cut == cut
    assert rollout.cut_share == cut / len(rollout.rewards)


def test_p19_the_sampled_support_is_used_again_after_an_update(family: str, tokenizer: Any) -> None:
    config = SamplingConfig(8, top_k=20, top_p=0.6)
    policy = make_policy(family, tokenizer, sampling=config)
    rollout, _ = play(policy)
    perturb(policy.model)
    scores = policy.score(rollout.sequences)
    moved = 0
    for made, log_probs in zip(
        rollout.sequences,
        scores.log_probs.split([sum(t >= 0 for t in s.turns) for s in rollout.sequences]),
        strict=True,
    ):
        targets = [i for i, t in zip(made.ids, made.turns, strict=True) if t >= 0]
        log_dists = naive_log_dists(policy.model, made)
        assert made.support is not None
        inside = log_dists.masked_fill(~made.support, -torch.inf).log_softmax(-1)
        assert torch.allclose(log_probs, inside[range(len(targets)), targets], atol=1e-4)
        fresh = sampling_logits(log_dists, config)[0][range(len(targets)), targets]
        moved += int(fresh.isinf().sum())
    assert moved > 0  # tokens did leave the nucleus, or nothing was shown
    assert scores.log_probs.isfinite().all()
    assert scores.entropies.isfinite().all()
    assert gradients(policy.model, scores.log_probs.sum() + scores.entropies.sum()).isfinite().all()


def test_p19_answers_drawn_from_everything_stay_so_when_scored_by_a_nucleus(tokenizer: Any) -> None:
    """Sequences that another configuration sampled: what they say of their support holds."""
    policy = make_policy("gpt2", tokenizer, sampling=SamplingConfig(8, top_k=3))
    player = policy.begin(SamplingConfig(8))
    player.act({0: "User: What?", 1: "User: Its capital?"}, 0)
    found = policy.score(player.sequences).log_probs
    expected = torch.cat([naive_log_probs(policy.model.eval(), s) for s in player.sequences])
    assert torch.allclose(found, expected, atol=1e-5)
    everything = make_policy("gpt2", tokenizer, sampling=SamplingConfig(8))
    narrow = policy.begin()
    narrow.act({0: "User: What?", 1: "User: Its capital?"}, 0)
    assert torch.allclose(
        everything.score(narrow.sequences).log_probs,
        sampled_log_probs(narrow.sequences),
        atol=1e-5,
    )


def test_p18_dropout_is_off_and_the_callers_mode_is_restored(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer, dropout=0.5)
    policy.model.train()
    next(iter(policy.model.base_model.children())).eval()  # some modules may be in eval mode
    modes = [m.training for m in policy.model.modules()]
    assert {True, False} == set(modes)
    rollout, _ = play(policy)
    first, second = policy.score(rollout.sequences), policy.score(rollout.sequences)
    sampled = sampled_log_probs(rollout.sequences)
    assert torch.equal(first.log_probs, second.log_probs)
    assert torch.allclose(first.log_probs, sampled, atol=1e-5)
    one = gradients(policy.model, first.log_probs.sum())
    assert torch.equal(one, gradients(policy.model, second.log_probs.sum()))
    assert [m.training for m in policy.model.modules()] == modes
    with pytest.raises(IndexError):
        policy.score([sequence((-1, [5]), (0, [10_000]))])
    assert [m.training for m in policy.model.modules()] == modes
    # Or else the test could not fail: dropout does something.
    policy.model.train()
    ids = torch.tensor([rollout.sequences[-1].ids])
    assert not torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)


def test_p21_token_in_token_out(tokenizer: Any) -> None:
    """Scored are the sampled ids and each added text's own, though the text encodes otherwise."""
    policy = make_policy("gpt2", tokenizer, sampling=SamplingConfig(6), end_bias=4.0, seed=4)
    # "is" is one token of the tokenizer, but this policy likes to write it as two; and it likes a
    # byte that begins a character of two.
    for token, bias in (("i", 7.0), ("s", 7.0), ("Ã", 5.0)):
        policy.model.lm_head.bias.data[tokenizer.convert_tokens_to_ids(token)] = bias
    player = policy.begin()
    observations = {row: "User: What is its capital?\nAssistant:" for row in range(12)}
    pieces: dict[int, list[int]] = {row: [] for row in observations}
    added = dict(observations)
    broken = others = 0
    for turn in range(3):
        answers = player.act(observations, turn)
        for row, answer in answers.items():
            made = player.sequences[row]
            written = answer_of(made, turn)
            pieces[row] += tokenizer(added[row])["input_ids"] + written
            assert made.ids == pieces[row]
            spoken = [i for i in written if i != policy.end]
            assert answer == tokenizer.decode(spoken)
            if "\ufffd" in answer:  # bytes that are no UTF-8
                broken += 1
            else:  # good text whose own encoding is another
                others += tokenizer(answer)["input_ids"] != spoken
            added[row] = "\nUser: That is it. ñ What then?\nAssistant:"
            observations[row] += answer + added[row]
    assert broken > 3
    assert others > 3
    assert len(player.sequences) == 12
    sampled = sampled_log_probs(player.sequences)
    assert torch.allclose(policy.score(player.sequences).log_probs, sampled, atol=1e-5)


def test_a_shared_prompt_is_read_once_and_history_never_again(tokenizer: Any) -> None:
    policy = make_policy("llama", tokenizer)
    rollout, _ = play(policy, group=4)
    first = [
        len(tokenizer(f"User: {talk.questions[0]}\nAssistant:")["input_ids"])
        for talk in Talks.examples
    ]
    # A group's first prompt is read once. Of all the rest only the very last token of a row,
    # which nothing follows, is never read.
    rest = sum(len(s) - 1 - first[s.row // 4] for s in rollout.sequences)
    assert policy.read_tokens == sum(first) + rest


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_p17_a_conversation_longer_than_the_context_begins_anew(
    family: str, tokenizer: Any
) -> None:
    """Its last tokens stay, as they are; what was sampled before is scored where it was."""
    policy = make_policy(family, tokenizer, context=48, sampling=SamplingConfig(6), end_bias=2.0)
    player = policy.begin()
    text = {0: "User: What?", 1: "User: What is its capital then? " * 2, 2: "User: It."}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for turn in range(6):
            answers = player.act(text, turn)
            said = {row: "\nUser: What is that then?"[: 9 + 5 * row] for row in answers}
            text = {row: text[row] + answer + said[row] for row, answer in answers.items()}
            if turn == 3:
                text.pop(2)
    assert ["longer than the model's context of 48" in str(w.message) for w in warned] == [True]
    assert policy.truncated_prompts > 3
    assert len(player.sequences) > 5
    by_row = [[s for s in player.sequences if s.row == row] for row in range(3)]
    for sequences in by_row:
        for before, after in itertools.pairwise(sequences):
            # The stored ids go on, the end of sequence among them; none is encoded again.
            start = after.turns.index(next(t for t in after.turns if t >= 0))
            assert start == policy.context - 6
            kept = next(n for n in range(start, 0, -1) if after.ids[:n] == before.ids[-n:])
            assert kept >= start - len(tokenizer("\nUser: What is that then?")["input_ids"])
    assert all(len(s) <= policy.context for s in player.sequences)
    turns = sorted(t for s in player.sequences for t in {*s.turns} - {-1})
    assert turns == sorted([*range(6), *range(6), *range(4)])
    scores = policy.score(player.sequences)
    sampled = sampled_log_probs(player.sequences)
    assert torch.allclose(scores.log_probs, sampled, atol=1e-5)


def test_p17_a_rewritten_conversation_begins_anew(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    player = policy.begin()
    one = player.act(dict.fromkeys(range(4), "User: What is it?"), 0)
    added = {row: f"User: What is it?{one[row]}\nUser: Then?" for row in range(4)}
    added[1] = "User: Something else."
    two = player.act(added, 1)
    three = player.act({row: added[row] + two[row] + "!" for row in (0, 1, 3)}, 2)
    # A row that had left comes back, whatever it says: its cache is gone, so all of it is read.
    again = {2: added[2] + two[2] + "!", 1: added[1] + two[1] + "!" + three[1] + "?"}
    player.act(again, 3)
    assert [s.row for s in player.sequences] == [0, 1, 2, 3, 1, 2]
    assert player.sequences[1].turns[-1] == 0
    assert player.sequences[5].ids[: len(player.sequences[5].turns)].count(policy.end) <= 1
    sampled = sampled_log_probs(player.sequences)
    assert torch.allclose(policy.score(player.sequences).log_probs, sampled, atol=1e-5)


def test_p17_holds_with_a_sliding_window_of_attention(tokenizer: Any) -> None:
    """The window of 24 tokens is outgrown, with holes between the tokens."""
    policy = make_policy("mistral", tokenizer, end_bias=2.0)
    assert policy.window == attention_window(policy.model) == 24
    rollout, _ = play(policy)
    assert max(map(len, rollout.sequences)) > 3 * 24
    sampled = sampled_log_probs(rollout.sequences)
    scores = policy.score(rollout.sequences)
    assert torch.allclose(scores.log_probs, sampled, atol=1e-5)


def test_p25_one_seed_twice_plays_the_same(tokenizer: Any) -> None:
    def played(seed: int) -> list[list[int]]:
        return [s.ids for s in play(make_policy("llama", tokenizer, seed=seed))[0].sequences]

    assert played(1) == played(1)
    assert played(1) != played(2)


def test_greedy_is_deterministic_and_leaves_the_chance_alone(tokenizer: Any) -> None:
    policy = make_policy("llama", tokenizer)
    state = policy.generator.get_state()
    greedy = SamplingConfig(8, temperature=0.0)
    prompts = {0: "User: What?", 1: "User: Its capital?", 2: "User: What?"}
    one, two = policy.begin(greedy).act(prompts, 0), policy.begin(greedy).act(prompts, 0)
    assert one == two
    assert one[0] == one[2]
    assert torch.equal(policy.generator.get_state(), state)


def test_a_question_without_tokens_and_an_answer_without_room_are_refused(tokenizer: Any) -> None:
    policy = make_policy("gpt2", tokenizer, context=32)
    with pytest.raises(ValueError, match="holds no token to answer"):
        policy.begin().act({0: ""}, 0)
    with pytest.raises(ValueError, match="max_new_tokens 32 leaves no room"):
        policy.begin(SamplingConfig(32))
    with pytest.raises(ValueError, match="context of 32"):
        make_policy("gpt2", tokenizer, context=32, sampling=SamplingConfig(40))


# --- models ----------------------------------------------------------------------------------


def test_the_fast_path_is_the_full_forward_or_is_refused(family: str, tokenizer: Any) -> None:
    model = make_model(family, len(tokenizer), dropout=0.5).train()
    parts = split_model(model)
    assert parts is not None
    assert model.training
    ids = torch.randint(2, 200, (3, 40))
    with torch.no_grad(), eval_mode(model):
        assert torch.equal(
            parts[1](parts[0](input_ids=ids).last_hidden_state), model(input_ids=ids).logits
        )


def test_the_fast_path_is_refused_where_logits_are_scaled_and_scores_stay_right(
    tokenizer: Any,
) -> None:
    policy = make_policy("granite", tokenizer)
    assert policy.parts is None
    rollout, _ = play(policy)
    found = policy.score(rollout.sequences).log_probs
    sampled = sampled_log_probs(rollout.sequences)
    expected = torch.cat([naive_log_probs(policy.model, s) for s in rollout.sequences])
    assert torch.allclose(found, sampled, atol=1e-5)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (
        relative(gradients(policy.model, found.sum()), gradients(policy.model, expected.sum()))
        < 1e-5
    )


def test_p27_a_frozen_copy_never_changes(tokenizer: Any) -> None:
    policy = make_policy("llama", tokenizer)
    reference = frozen_copy(policy)
    before = policy.score(RAGGED, reference)
    assert before.kls is not None
    assert before.kls.abs().max() < 1e-6
    old = reference.score(RAGGED).log_probs
    perturb(policy.model)
    after = policy.score(RAGGED, reference)
    assert after.kls is not None
    assert after.kls.min() > 0.01
    assert torch.equal(reference.score(RAGGED).log_probs, old)
    gradients(policy.model, after.kls.sum())
    assert not any(p.requires_grad or p.grad is not None for p in reference.model.parameters())


def test_kl_is_the_enumerated_divergence_of_all_answers(family: str) -> None:
    """Summed over the answers by their probability, per-token KLs are the sequences' own KL."""
    tokenizer = make_tokenizer()
    # Temperature and top-k change what is sampled; the KL stays that of the models.
    policy = make_policy(family, tokenizer, sampling=SamplingConfig(2, 1.7, 3))
    policy.model = make_model(family, 5, end_bias=0.5)
    policy.parts = split_model(policy.model)
    reference = frozen_copy(policy)
    perturb(policy.model, 0.15)
    answers = [(0,), *((a, b) for a in range(1, 5) for b in range(5))]
    rows = [sequence((-1, [1, 3, 2]), (0, answer)) for answer in answers]
    own = torch.stack([naive_log_probs(policy.model, s).sum() for s in rows])
    ref = torch.stack([naive_log_probs(reference.model, s).sum() for s in rows]).detach()
    assert own.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    enumerated = (own.exp() * (own - ref)).sum()
    kls = policy.score(rows, reference).kls
    assert kls is not None
    summed = torch.stack([k.sum() for k in kls.split([len(a) for a in answers])])
    assert enumerated.item() > 0.05
    assert (own.exp() * summed).sum().item() == pytest.approx(enumerated.item(), abs=1e-5)
    # For answers of one token the gradient is the enumerated one as well.
    dists = [naive_log_dists(m, rows[0])[0] for m in (policy.model, reference.model)]
    expected = gradients(policy.model, (dists[0].exp() * (dists[0] - dists[1])).sum())
    one = policy.score(rows[:1], reference).kls
    assert one is not None
    assert relative(gradients(policy.model, one.sum()), expected) < 1e-5


def test_kl_of_distributions_with_impossible_values() -> None:
    p = torch.tensor([0.25, 0.75, 0.0]).log().requires_grad_()
    q = torch.tensor([0.5, 0.5, 0.0]).log()
    found = kl_divergence(p, q)
    assert found.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    found.backward()  # type: ignore[no-untyped-call]
    assert p.grad is not None
    assert p.grad.isfinite().all()


def test_a_saved_policy_is_loaded_again_and_says_the_same(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL)
    policy = CausalLMPolicy(LlamaForCausalLM(config), tokenizer)
    policy.save_pretrained(tmp_path)
    again = CausalLMPolicy.from_pretrained(tmp_path, device="cpu")
    assert (again.end, again.pad, again.context) == (0, 1, 64)
    assert torch.equal(again.score(RAGGED).log_probs, policy.score(RAGGED).log_probs)
    choosing = CandidatePolicy.from_pretrained(tmp_path, device="cpu", reply="Lima")
    assert choosing.reply == tuple(tokenizer("Lima")["input_ids"])
    choosing.save_pretrained(tmp_path / "choosing")
    again = CandidatePolicy.from_pretrained(tmp_path / "choosing", device="cpu")
    assert again.reply == choosing.reply


def test_what_cannot_be_loaded_is_refused_with_a_cure(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="No causal language model could be loaded from"):
        load_model(tmp_path / "nothing", "cpu", "float32")
    with pytest.raises(ValueError, match="'float33' is no dtype of torch"):
        load_model(tmp_path, "cpu", "float33")
    config = LlamaConfig(vocab_size=len(tokenizer), **SMALL)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        load_model(tmp_path, "cpu", "float32")


# --- choosing --------------------------------------------------------------------------------

PROMPT = "User: What is its capital?\nAssistant:"
CANDIDATES = (" Lima.", " Its capital is Lima, then.", " ñ", " What?", " Lima.", " That is it")
OTHERS = (("User: It?", (" Lima", " is")), ("User: " + "capital " * 9, (" it", " Lima it", " W")))


def make_chooser(
    family: str, tokenizer: Any, *, scoring: str = "mean", **arguments: Any
) -> CandidatePolicy:
    # The candidates' lengths differ, so a preference for the end of sequence would hide much.
    model, other = (
        make_model(family, len(tokenizer), end_bias=0.0, dropout=0.5, seed=s).train()
        for s in (0, 1)
    )
    ways = {"mean": {}, "reply": {"reply": "\nUser: That is it."}, "base": {"base": other}}
    return CandidatePolicy(model, tokenizer, **ways[scoring], **arguments)


def naive_candidate_logits(policy: CandidatePolicy, prompt: str, texts: Sequence[str]) -> Tensor:
    """Candidate by candidate, each as one plain row."""
    found = []
    for text in texts:
        head, tail = (policy.tokenizer(t)["input_ids"] for t in (prompt, text))
        read = [*head, *tail] if policy.reply else head
        judged = list(policy.reply) or tail
        log_probs = _continued(policy.model, read, judged)
        if policy.base is not None:
            log_probs = log_probs - _continued(policy.base, read, judged)
        found.append(log_probs.sum() if policy.reply or policy.base else log_probs.mean())
    return torch.stack(found)


def _continued(model: Any, read: list[int], judged: list[int]) -> Tensor:
    """Log-probabilities of the tokens that follow."""
    ids = [*read, *judged]
    with eval_mode(model):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    log_probs: Tensor = logits.log_softmax(-1)[range(len(read) - 1, len(ids) - 1), judged]
    return log_probs


def ask(policy: CandidatePolicy, prompt: str, texts: Sequence[str], action: int = 0) -> Decision:
    return Decision(0, 0, *policy.encode(prompt, texts), action, 0.0)


@pytest.mark.parametrize("scoring", ["mean", "reply", "base"])
def test_p29_logits_are_those_of_each_candidate_alone(
    family: str, tokenizer: Any, scoring: str
) -> None:
    policy = make_chooser(family, tokenizer, scoring=scoring)
    expected = naive_candidate_logits(policy, PROMPT, CANDIDATES)
    question = policy.encode(PROMPT, CANDIDATES)
    others = [policy.encode(*other) for other in OTHERS]
    # Alone; beside rows of other lengths and counts; and with copies of itself.
    for questions in (
        [question],
        [others[0], question, others[1]],
        [question, others[1], question],
    ):
        found = policy.candidate_logits(questions)[questions.index(question)]
        assert torch.allclose(found[:6], expected, atol=1e-5)
        ours = gradients(policy.model, (found[:6] * torch.arange(6)).sum())
        naive = naive_candidate_logits(policy, PROMPT, CANDIDATES)
        assert relative(ours, gradients(policy.model, (naive * torch.arange(6)).sum())) < 1e-5
    table = policy.candidate_logits([others[0], question])
    assert table[0].isinf().tolist() == [False, False, True, True, True, True]
    # The order of candidates changes the order of logits and nothing else.
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        shuffled = policy.encode(PROMPT, [CANDIDATES[i] for i in order])
        assert torch.allclose(policy.candidate_logits([shuffled])[0], expected[order], atol=1e-5)


@pytest.mark.parametrize("scoring", ["mean", "reply", "base"])
@pytest.mark.parametrize("micro_batch_tokens", [1, 150, 10_000])
def test_p29_p17_chunks_and_padding_change_no_choice(
    tokenizer: Any, scoring: str, micro_batch_tokens: int
) -> None:
    policy = make_chooser(
        "gpt2", tokenizer, scoring=scoring, temperature=0.7, micro_batch_tokens=micro_batch_tokens
    )
    asked = [(PROMPT, CANDIDATES), *OTHERS, (PROMPT, CANDIDATES)]
    observations = {
        row: {"prompt": asked[row % 4][0], "candidates": asked[row % 4][1]} for row in range(12)
    }
    player = policy.begin()
    actions = player.act(observations, 0)
    assert list(actions) == list(range(12))
    for row, decision in enumerate(player.sequences):
        prompt, texts = asked[row % 4]
        dist = (naive_candidate_logits(policy, prompt, texts) / 0.7).log_softmax(-1)
        assert decision.action == actions[row]
        assert decision.log_prob == pytest.approx(dist[decision.action].item(), abs=1e-5)
        chances = player.chosen_from[row, 0]
        assert torch.allclose(chances, dist.exp(), atol=1e-5)
    scores = policy.score(player.sequences)
    assert torch.allclose(
        scores.log_probs, torch.tensor([d.log_prob for d in player.sequences]), atol=1e-5
    )
    groups = policy.micro_batches(player.sequences)
    assert sorted(itertools.chain(*groups)) == list(range(12))
    # One number a row decides, so the choices are those of any other chunking.
    other = make_chooser("gpt2", tokenizer, scoring=scoring, temperature=0.7, micro_batch_tokens=77)
    assert other.begin().act(observations, 0) == actions


@pytest.mark.parametrize("scoring", ["mean", "reply", "base"])
def test_p22_choices_in_chunks_are_the_naive_ones(
    monkeypatch: pytest.MonkeyPatch, family: str, tokenizer: Any, scoring: str
) -> None:
    policy = make_chooser(family, tokenizer, scoring=scoring, temperature=0.7)
    reference = frozen_copy(policy)
    perturb(policy.model, 0.1)
    heads: list[int] = []
    policy.model.lm_head.register_forward_hook(lambda _, x, __: heads.append(len(x[0])))
    monkeypatch.setattr("agents.policies.models.LOGITS_AT_ONCE", 3 * len(tokenizer))
    decisions = [ask(policy, PROMPT, CANDIDATES, 2), ask(policy, *OTHERS[0], 1)]
    found = policy.score(decisions, reference)
    assert max(heads) == 3
    expected: list[list[Tensor]] = [[], [], []]
    for decision, (prompt, texts) in zip(decisions, ((PROMPT, CANDIDATES), OTHERS[0]), strict=True):
        logits = naive_candidate_logits(policy, prompt, texts)
        other = naive_candidate_logits(reference, prompt, texts).detach()
        dist = torch.distributions.Categorical(logits=logits / 0.7)
        expected[0].append(dist.log_prob(torch.tensor(decision.action)))
        expected[1].append(dist.entropy())
        own = torch.distributions.Categorical(logits=logits)
        other_dist = torch.distributions.Categorical(logits=other)
        expected[2].append(torch.distributions.kl_divergence(own, other_dist))
    assert found.kls is not None
    weights = torch.tensor([1.0, -0.4])
    for mine, its in zip((found.log_probs, found.entropies, found.kls), expected, strict=True):
        torch.testing.assert_close(mine, torch.stack(its), rtol=0, atol=1e-4)
        ours = gradients_of(policy.model, (mine * weights).sum())
        theirs = gradients_of(policy.model, (torch.stack(its) * weights).sum())
        assert relative(ours, theirs) < 1e-3


def test_p22_the_logits_of_all_candidates_never_exist_at_once(tokenizer: Any) -> None:
    policy = make_chooser("llama", tokenizer, scoring="mean")
    reference = frozen_copy(policy)
    asked = [(f"{PROMPT} {i}", [f" {i} capital is Lima {j}" for j in range(9)]) for i in range(9)]
    decisions = [ask(policy, *question, 1) for question in asked]
    judged = sum(len(c) for d in decisions for c in d.candidates)
    whole = judged * len(tokenizer)
    assert largest(policy, decisions, reference, None) >= whole
    width = max(map(len, decisions))
    others = 9 * width * max(32, width)  # hidden states, and the masks of all branches
    assert largest(policy, decisions, reference, 10 * len(tokenizer)) <= others < whole


def test_candidates_of_a_group_are_read_once(tokenizer: Any) -> None:
    policy = make_chooser("llama", tokenizer)
    sizes: list[int] = []
    policy.model.base_model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    question = {"prompt": PROMPT, "candidates": CANDIDATES}
    policy.begin().act(dict.fromkeys(range(8), question), 0)
    once = sum(len(ids) for ids in tokenizer([PROMPT, *CANDIDATES])["input_ids"])
    assert sizes == [once]
    assert policy.read_tokens == once


def test_p18_choices_are_scored_without_dropout(tokenizer: Any) -> None:
    policy = make_chooser("gpt2", tokenizer)
    decisions = [ask(policy, PROMPT, CANDIDATES, a) for a in range(6)]
    first, second = policy.score(decisions), policy.score(decisions)
    assert torch.equal(first.log_probs, second.log_probs)
    assert all(m.training for m in policy.model.modules())


@pytest.mark.parametrize("scoring", ["mean", "base"])
def test_p15_no_decision_gives_a_finite_zero_loss(
    family: str, tokenizer: Any, scoring: str
) -> None:
    policy = make_chooser(family, tokenizer, scoring=scoring)
    scores = policy.score([], frozen_copy(policy))
    assert scores.kls is not None
    assert len(scores.log_probs) == len(scores.entropies) == len(scores.kls) == 0
    assert not gradients(policy.model, scores.log_probs.sum() + scores.kls.sum()).any()
    assert policy.begin().act({}, 0) == {}


def test_choices_have_exact_entropy_and_divergence(tokenizer: Any) -> None:
    policy = make_chooser("llama-gqa", tokenizer, temperature=0.5)
    reference = frozen_copy(policy)
    perturb(policy.model, 0.1)
    decisions = [ask(policy, PROMPT, CANDIDATES, 2), ask(policy, *OTHERS[0], 1)]
    scores = policy.score(decisions, reference)
    assert scores.kls is not None
    for i, (prompt, texts) in enumerate(((PROMPT, CANDIDATES), OTHERS[0])):
        logits = naive_candidate_logits(policy, prompt, texts)
        theirs = naive_candidate_logits(reference, prompt, texts)
        own = torch.distributions.Categorical(logits=logits)
        kl = torch.distributions.kl_divergence(own, torch.distributions.Categorical(logits=theirs))
        sampled = torch.distributions.Categorical(logits=logits / 0.5)
        assert scores.kls[i].item() == pytest.approx(kl.item(), abs=1e-5)
        assert scores.entropies[i].item() == pytest.approx(sampled.entropy().item(), abs=1e-5)
        expected = sampled.log_prob(torch.tensor(decisions[i].action))
        assert scores.log_probs[i].item() == pytest.approx(expected.item(), abs=1e-5)
    total = scores.log_probs.sum() + scores.entropies.sum() + scores.kls.sum()
    assert gradients(policy.model, total).isfinite().all()


def test_p20_choices_follow_the_softmax(tokenizer: Any) -> None:
    """10^4 choices; a correct policy fails with chance 10^-4 over seeds; the seed is fixed."""
    policy = make_chooser("gpt2", tokenizer, seed=3, temperature=0.8)
    question = {"prompt": PROMPT, "candidates": CANDIDATES}
    actions = policy.begin().act(dict.fromkeys(range(10_000), question), 0)
    counts = torch.tensor(list(actions.values())).bincount(minlength=6)
    logits = naive_candidate_logits(policy, PROMPT, CANDIDATES).detach().double() / 0.8
    assert chisquare(counts.numpy(), 10_000 * logits.softmax(-1).numpy()).pvalue > 1e-4


def test_relative_to_itself_a_model_begins_uniform_and_its_base_stays(
    tmp_path: Path, tokenizer: Any
) -> None:
    CausalLMPolicy(make_chooser("llama", tokenizer).model, tokenizer).save_pretrained(
        tmp_path / "model"
    )
    policy = CandidatePolicy.from_pretrained(tmp_path / "model", device="cpu", relative=True)
    question = policy.encode(PROMPT, CANDIDATES)
    assert policy.candidate_logits([question]).abs().max() < 1e-5
    before = policy.base_log_likelihoods([question])
    perturb(policy.model)
    logits = policy.candidate_logits([question])
    assert logits.std() > 0.1
    assert policy.base_log_likelihoods([question]) == before
    gradients(policy.model, logits[0, 0])
    assert policy.base is not None
    assert all(p.grad is None for p in policy.base.parameters())
    policy.save_pretrained(tmp_path / "trained")
    again = CandidatePolicy.from_pretrained(tmp_path / "trained", device="cpu", relative=True)
    assert torch.equal(again.candidate_logits([question]), logits)


@pytest.mark.parametrize("scoring", ["mean", "reply", "base"])
def test_who_goes_on_with_a_chooser_goes_on_with_its_scoring(
    scoring: str, tmp_path: Path, tokenizer: Any
) -> None:
    """``relative`` is for models that do not say how they score, as agents find them by name."""
    policy = make_chooser("llama", tokenizer, scoring=scoring)
    policy.save_pretrained(tmp_path)
    again = CandidatePolicy.from_pretrained(tmp_path, device="cpu", relative=True)
    question = [policy.encode(PROMPT, CANDIDATES)]
    assert torch.equal(again.candidate_logits(question), policy.candidate_logits(question))


def test_the_base_is_not_read_again_in_updates(tokenizer: Any) -> None:
    policy = make_chooser("llama", tokenizer, scoring="base")
    player = policy.begin()
    player.act({0: {"prompt": PROMPT, "candidates": CANDIDATES}}, 0)
    assert policy.base is not None
    policy.base.register_forward_pre_hook(lambda *_: pytest.fail("it was read"))
    policy.score(player.sequences)


def test_two_ways_of_scoring_are_refused(tokenizer: Any) -> None:
    policy = make_chooser("llama", tokenizer)
    with pytest.raises(ValueError, match="give one of them"):
        CandidatePolicy(policy.model, tokenizer, reply="Yes.", base=policy.model)


def test_the_best_candidate_is_taken_without_chance(tokenizer: Any) -> None:
    policy = make_chooser("gpt2", tokenizer)
    state = policy.generator.get_state()
    player = policy.begin(0.0)
    question = {"prompt": PROMPT, "candidates": CANDIDATES}
    best = int(naive_candidate_logits(policy, PROMPT, CANDIDATES).argmax())
    assert player.act({3: question, 5: question}, 2) == {3: best, 5: best}
    assert torch.equal(policy.generator.get_state(), state)
    assert set(player.chosen_from) == {(3, 2), (5, 2)}


def test_a_long_prompt_is_cut_on_the_left_and_an_empty_candidate_refused(tokenizer: Any) -> None:
    model = make_model("gpt2", len(tokenizer), context=24)
    policy = CandidatePolicy(model, tokenizer, reply=" is")
    ids, _ = policy.encode("capital " * 20, [" Lima", " is"])
    whole = tokenizer("capital " * 20)["input_ids"]
    room = 24 - max(len(i) for i in tokenizer([" Lima", " is"])["input_ids"]) - len(policy.reply)
    assert list(ids) == whole[-room:]
    assert policy.truncated_prompts == 1
    assert policy.candidate_logits([policy.encode("capital " * 20, [" Lima"])]).isfinite().all()
    with pytest.raises(ValueError, match="holds no token"):
        policy.encode("User:", ["", " is"])
    with pytest.raises(ValueError, match="longer than the context of 24"):
        policy.encode("User:", [" capital" * 30])
    with pytest.raises(ValueError, match="temperature is -1"):
        CandidatePolicy(model, tokenizer, temperature=-1)
