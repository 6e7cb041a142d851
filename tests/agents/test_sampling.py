"""The sampler against the slow, obvious way: one row at a time, no cache, no padding.

Models have random weights, large enough that distributions are far from uniform, and a head with
a bias towards the end of sequence, so that rows end at different steps.
"""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from agents.reinforce import Reinforce
from agents.sampling import (
    PASS_TOKENS,
    Completion,
    Sampler,
    SamplingConfig,
    compiled_step,
    draw,
    passes_by_length,
    sampling_logits,
)

FAMILIES = ("gpt2", "llama", "llama-gqa")
END, PAD = 0, 1


def make_model(family: str, vocabulary: int = 12, end_bias: float = 2.0, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": END, "eos_token_id": END}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if "gqa" in family else 4,
    }
    model: Any
    if family == "gpt2":
        shape: dict[str, Any] = {"n_positions": 160, "n_embd": 16, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(**shape, **shared, initializer_range=0.4))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        length = {"max_position_embeddings": 160}
        model = LlamaForCausalLM(
            LlamaConfig(**shape, **length, **heads, **shared, initializer_range=0.25)
        )
    head = torch.nn.Linear(16, vocabulary)
    head.weight = model.lm_head.weight
    head.bias.data.zero_()[END] = end_bias
    model.lm_head = head
    return model.eval()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def make_sampler(model: Any, seed: int = 0, pad: int = PAD, end: int = END) -> Sampler:
    return Sampler(model, end, pad, torch.Generator().manual_seed(seed))


@torch.no_grad()
def naive_logits(model: Any, ids: list[int]) -> Tensor:
    """(tokens, vocabulary) logits of one row read alone, as the model itself reads it."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


class Played:
    """Conversations played through a sampler, with every token written down beside it."""

    def __init__(self, model: Any, sampler: Sampler, config: SamplingConfig) -> None:
        self.model, self.sampler, self.config = model, sampler, config
        self.history: dict[int, list[int]] = {}
        self.unread: dict[int, list[int]] = {}
        self.difference = 0.0
        self.read = 0  # tokens that have to be read, those of conversations that are alike once

    def forget(self, rows: list[int]) -> None:
        self.sampler.forget(rows)
        for row in rows:
            self.history.pop(row, None)
            self.unread.pop(row, None)

    def turn(self, added: dict[int, list[int]]) -> dict[int, Completion]:
        new = {row: self.unread.get(row, []) + ids for row, ids in added.items()}
        made = self.sampler.answer(new, self.config)
        before = {row: tuple(self.history.get(row, [])) for row in new}
        self.read += sum(len(ids) for _, ids in {(before[r], tuple(new[r])) for r in new})
        self.read += len(
            {
                (before[row], tuple(new[row]), tuple(c.ids[:length]))
                for row, c in made.items()
                for length in range(1, len(c.ids))
            }
        )
        assert list(made) == list(added)
        self.history = {row: self.history.get(row, []) + ids for row, ids in added.items()}
        self.unread = {}
        for row, completion in made.items():
            known = self.history[row]
            self.history[row] = known + completion.ids
            self.unread[row] = completion.ids[-1:]
            logits = naive_logits(self.model, self.history[row])[len(known) - 1 : -1]
            scaled, _ = sampling_logits(logits, self.config, completion.support)
            expected = scaled.log_softmax(-1)[range(len(completion.ids)), completion.ids]
            gap = (torch.tensor(completion.log_probs) - expected).abs().max().item()
            self.difference = max(self.difference, gap)
        return made


def ids_of(rng: random.Random, most: int = 9) -> list[int]:
    return [rng.randrange(2, 12) for _ in range(rng.randrange(1, most + 1))]


@pytest.mark.parametrize("config", [SamplingConfig(7), SamplingConfig(7, 1.4, 5, 0.8)])
def test_p17_cached_log_probs_are_those_of_the_full_forward(
    model: Any, config: SamplingConfig
) -> None:
    """Shared prompts, ragged turns, rows that end early, leave, begin anew and join."""
    rng = random.Random(3)
    played = Played(model, make_sampler(model), config)
    prompts = [ids_of(rng) for _ in range(3)]
    added = {row: prompts[row // 4] for row in range(12)}
    lengths = set()
    for turn in range(6):
        made = played.turn(added)
        lengths |= {len(c.ids) for c in made.values()}
        if turn == 1:
            played.forget([0, 5])
        if turn == 4:
            played.forget(list(added))  # all at once: prompts are shared again
        stay = [row for row in added if turn not in (0, 2) or row % 3 != turn]
        if turn == 3:
            stay = [*reversed(stay), 20, 21]  # another order, and two that join
        added = {row: ids_of(rng) for row in stay}
        if turn == 4:
            added = {row: prompts[row % 2] for row in stay}
    assert played.difference < 1e-5
    assert played.sampler.read_tokens == played.read
    assert len(lengths) > 3  # else nothing ragged was tried


@given(st.lists(st.integers(1, 200), min_size=1, max_size=80), st.integers(1, 2000))
def test_passes_hold_prompts_of_like_length_and_are_full(lengths: list[int], enough: int) -> None:
    passes = passes_by_length(lengths, enough)
    assert sorted(i for members in passes for i in members) == [*range(len(lengths))]
    held = [[lengths[i] for i in members] for members in passes]
    assert sorted(lengths) == [length for members in held for length in members]
    padded = [len(members) * max(members) for members in held]
    assert all(tokens <= max(2 * enough, max(m)) for tokens, m in zip(padded, held, strict=True))
    for tokens, members, later in zip(padded, held, held[1:], strict=False):
        assert tokens >= enough or (len(members) + 1) * min(later) > 2 * enough
    assert all((len(m) - 1) * sorted(m)[-2] < enough for m in held if len(m) > 1)


def test_prompts_of_many_lengths_are_hardly_padded() -> None:
    model = make_model("llama")
    read: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: read.append(inputs["input_ids"].shape), with_kwargs=True
    )
    prompts = {row: [2] * (5 + row) for row in range(128)}
    make_sampler(model).answer(prompts, SamplingConfig(1))
    tokens = sum(map(len, prompts.values()))
    assert tokens <= sum(rows * width for rows, width in read) < 1.2 * tokens  # in one pass 1.9


def test_p17_holds_when_prompts_are_read_in_several_passes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASS_TOKENS, "cpu", 30)
    rng = random.Random(4)
    played = Played(model, make_sampler(model), SamplingConfig(7))
    prompts = [ids_of(rng, most=20) for _ in range(24)]
    passes = passes_by_length([*map(len, prompts)], 30)
    assert max(map(len, passes)) > 2 < len(passes)
    made = played.turn({row: prompts[row // 2] for row in range(48)})
    played.turn({row: ids_of(rng) for row in made if row % 3})
    assert played.difference < 1e-5
    assert played.sampler.read_tokens == played.read


def test_p17_holds_where_a_layer_sees_only_a_window_of_prompts_in_several_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window counts slots: short prompts may have no holes behind them."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 30)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=12, **sizes, **heads, initializer_range=0.25)
    ).eval()
    played = Played(model, make_sampler(model, end=-1), SamplingConfig(6))
    prompts = {row: [2 + (row + i) % 9 for i in range(4 + 2 * row)] for row in range(12)}
    assert len(passes_by_length([*map(len, prompts.values())], 30)) > 2
    played.turn(prompts)
    assert played.difference < 1e-5


def test_p17_holds_when_the_buffers_have_to_grow(model: Any) -> None:
    played = Played(model, make_sampler(model, end=-1), SamplingConfig(70))
    played.turn({0: [2, 3, 4], 1: [5], 2: [5]})
    played.turn({1: [6, 7], 2: [8]})
    assert played.difference < 1e-5


@pytest.mark.slow  # the compiler takes a minute
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "llama"])
def test_p17_holds_when_steps_are_compiled(family: str) -> None:
    """Rows part, end and begin anew; one row is a shape of its own; buffers grow."""
    model = make_model(family)
    sampler = Sampler(model, END, PAD, torch.Generator().manual_seed(0), compiled_step())
    played = Played(model, sampler, SamplingConfig(40))
    rng = random.Random(3)
    made = played.turn({row: [2, 3, 4, 5][: 2 + row // 8] for row in range(16)})
    played.turn({row: ids_of(rng) for row in made if row % 3})
    played.turn({1: [5, 6]})
    played.turn({1: [7], 2: [8, 9]})
    assert played.difference < 1e-5
    assert played.sampler.read_tokens == played.read


def test_where_nothing_can_be_compiled_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    compiled_step.cache_clear()
    with pytest.warns(UserWarning, match=r"does not work here \(no compiler\), so that sampling"):
        agent = Reinforce("tiny", "DialogueQA-v0", compile=True, prompts=1, group_size=2)
    agent.iterate()
    compiled_step.cache_clear()


def test_buffers_grow_no_rows_that_nobody_needs() -> None:
    sampler = make_sampler(make_model("llama"), end=-1)
    sampler.answer({row: [2, 3] for row in range(16)}, SamplingConfig(150))
    layer = sampler.histories[0].held.cache.layers[0]
    assert layer.buffers[0].shape[0] <= 1.5 * 16


def test_a_shared_prompt_is_read_once_and_history_never_again(model: Any) -> None:
    sampler = make_sampler(model)
    prompts = {row: [2, 3, 4, 5, 6] if row < 8 else [7, 8] for row in range(16)}
    made = sampler.answer(prompts, SamplingConfig(5))

    def prefixes(said: dict[int, tuple[int, ...]]) -> set[tuple[int, ...]]:
        # The last token of an answer has not been read when the answer is complete.
        return {(row // 8, *ids[:n]) for row, ids in said.items() for n in range(1, len(ids))}

    first = {row: tuple(c.ids) for row, c in made.items()}
    assert len(prefixes(first)) < sum(len(ids) - 1 for ids in first.values()), "none begin alike"
    assert sampler.read_tokens == 5 + 2 + len(prefixes(first))
    before = sampler.read_tokens
    again = sampler.answer({row: [c.ids[-1], 9, 9] for row, c in made.items()}, SamplingConfig(5))
    whole = {row: (*first[row], 9, 9, *c.ids) for row, c in again.items()}
    old = {(row // 8, *ids[:-1]) for row, ids in first.items()}
    new = {p for p in prefixes(whole) if not any(p == q[: len(p)] for q in old)}
    assert sampler.read_tokens - before == len(new)


def test_rows_that_have_finished_are_dropped_from_the_batch() -> None:
    model = make_model("llama", end_bias=1.0)
    sizes: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    made = make_sampler(model).answer({row: [2, 3] for row in range(64)}, SamplingConfig(30))
    going = [[c.ids[:n] for c in made.values() if len(c.ids) > n] for n in range(1, len(sizes))]
    alive = [len(set(map(tuple, ids))) for ids in going]
    assert sizes[0] == 1
    assert len(set(sizes[1:])) > 3
    assert all(n <= size < max(2 * n, 2) for n, size in zip(alive, sizes[1:], strict=True))


def test_p11_holes_and_neighbours_change_nothing(model: Any) -> None:
    """Another pad id, and a long neighbour that makes every other row padded."""
    prompts = {0: [2, 3, 4], 1: [5], 2: [5], 3: [9, 8, 7, 6]}
    config = SamplingConfig(6)

    def play(pad: int, neighbours: dict[int, list[int]]) -> list[Completion]:
        sampler = make_sampler(model, pad=pad)
        made = sampler.answer(prompts | neighbours, config)
        more = {row: [made[row].ids[-1], *range(2, 4 + row)] for row in made}
        again = sampler.answer(more, config)
        # A neighbour draws numbers too, so the second turn's are others.
        return [*(made[r] for r in prompts), *(again[r] for r in prompts if not neighbours)]

    plain = play(PAD, {})
    for other in (play(11, {}), play(END, {}), play(PAD, {4: [3] * 40})):
        for a, b in zip(plain, other, strict=False):
            assert a.ids == b.ids
            assert a.log_probs == pytest.approx(b.log_probs, abs=5e-6)


def test_p12_an_answer_ends_with_its_end_of_sequence_and_holds_no_other() -> None:
    for pad in (PAD, END):
        sampler = make_sampler(make_model("gpt2"), pad=pad)
        made = sampler.answer({row: [2, 3 + row % 5] for row in range(64)}, SamplingConfig(8))
        for completion in made.values():
            assert END not in completion.ids[:-1]
            assert (completion.ids[-1] == END) is not completion.cut
            assert len(completion.ids) == len(completion.log_probs)
        assert {c.cut for c in made.values()} == {False, True}


def test_p13_no_end_is_forged_at_the_length_limit(model: Any) -> None:
    made = make_sampler(model).answer({row: [2] for row in range(64)}, SamplingConfig(2))
    for completion in made.values():
        assert completion.cut is (completion.ids[-1] != END)
        assert not completion.cut or len(completion.ids) == 2
    # An answer that ends by itself on its last permitted token is not cut.
    assert any(c.ids[-1] == END and len(c.ids) == 2 for c in made.values())
    never = make_sampler(model, end=-1).answer({0: [2], 1: [3, 4]}, SamplingConfig(4))
    assert all(c.cut and len(c.ids) == 4 for c in never.values())


def brute_force_support(logits: list[float], config: SamplingConfig) -> set[int]:
    """Top-k, then the smallest set of likeliest tokens that reaches top-p, in float64."""
    scaled = np.array(logits) / config.temperature
    order = np.argsort(-scaled, kind="stable")[: config.top_k or None]
    probs = np.exp(scaled[order] - scaled.max())
    probs /= probs.sum()
    count = next(n for n in range(1, len(order) + 1) if probs[:n].sum() >= config.top_p - 1e-9)
    return set(order[:count].tolist())


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=9, unique=True),
    st.sampled_from([0.5, 1.0, 1.7]),
    st.integers(0, 10),
    st.sampled_from([0.013, 0.377, 0.811, 1.0]),
)
def test_p19_support_is_top_k_then_top_p(
    tenths: list[int], temperature: float, top_k: int, top_p: float
) -> None:
    config = SamplingConfig(1, temperature, top_k, top_p)
    logits = torch.tensor([[t / 10 for t in tenths]])
    scaled, support = sampling_logits(logits, config)
    expected = brute_force_support([t / 10 for t in tenths], config)
    finite = set(scaled[0].isfinite().nonzero()[:, 0].tolist())
    assert finite == expected
    assert (support is None) is (not config.truncates)
    assert support is None or set(support[0].nonzero()[:, 0].tolist()) == expected
    inside = sorted(expected)
    assert torch.allclose(scaled[0, inside], logits[0, inside] / temperature)


def test_p19_the_stored_support_is_used_again_even_if_the_nucleus_has_moved() -> None:
    config = SamplingConfig(1, top_p=0.5)
    before, support = sampling_logits(torch.tensor([[3.0, 0.0, 0.0]]), config)
    assert support is not None
    assert support.tolist() == [[True, False, False]]
    after, _ = sampling_logits(torch.tensor([[0.0, 3.0, 0.0]]), config, support)
    assert after.log_softmax(-1)[0, 0] == before.log_softmax(-1)[0, 0] == 0.0


def test_p19_sampled_tokens_lie_in_their_support(model: Any) -> None:
    config = SamplingConfig(6, temperature=1.5, top_k=4, top_p=0.9)
    made = make_sampler(model).answer({row: [2, row % 7] for row in range(40)}, config)
    for completion in made.values():
        assert completion.support is not None
        assert completion.support.shape == (len(completion.ids), 12)
        assert completion.support[range(len(completion.ids)), completion.ids].all()
        assert completion.support.sum(1).max() <= 4
        assert np.isfinite(completion.log_probs).all()


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
    st.sampled_from([0.0, 0.3, 0.5, 1 - 2**-24]),
)
def test_p20_a_token_of_probability_zero_is_never_drawn(
    logits: list[float], banned: set[int], uniform: float
) -> None:
    wide = torch.tensor([logits])
    forbidden = torch.tensor([[i in banned for i in range(len(logits))]])
    if forbidden.all():
        return
    log_probs = wide.masked_fill(forbidden, -torch.inf).log_softmax(-1)
    token = int(draw(log_probs, torch.tensor([uniform])))
    assert token < len(logits)
    assert log_probs[0, token].exp() > 0


@pytest.mark.parametrize(
    "config", [SamplingConfig(2), SamplingConfig(2, temperature=1.5, top_k=5, top_p=0.9)]
)
def test_p20_samples_follow_the_distribution(config: SamplingConfig) -> None:
    """10^4 answers of two tokens against the product of softmaxes.

    A correct sampler fails with probability 10^-4, over seeds; the seed is fixed.
    """
    model = make_model("gpt2", vocabulary=6, end_bias=0.5)
    n, prompt = 10_000, [2, 5, 3]
    made = make_sampler(model, seed=11).answer(dict.fromkeys(range(n), prompt), config)

    def distribution(ids: list[int]) -> Tensor:
        scaled, _ = sampling_logits(naive_logits(model, ids)[-1:], config)
        return scaled[0].double().softmax(-1)

    first = distribution(prompt)
    expected: dict[tuple[int, ...], float] = {(END,): float(first[END])}
    for token in range(1, 6):
        second = distribution([*prompt, token])
        for last in range(6):
            expected[token, last] = float(first[token] * second[last])
    counts = dict.fromkeys(expected, 0)
    for completion in made.values():
        counts[tuple(completion.ids)] += 1
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    assert all(counts[answer] == 0 for answer, p in expected.items() if p == 0)
    likely = [answer for answer, p in expected.items() if p * n >= 5]
    assert len(likely) > 5
    seen = [counts[answer] for answer in likely]
    due = [expected[answer] * n for answer in likely]
    rest = n - sum(seen), n - sum(due)
    if rest[1] >= 5:
        seen, due = [*seen, rest[0]], [*due, rest[1]]
    assert chisquare(seen, np.array(due) * sum(seen) / sum(due)).pvalue > 1e-4


def test_p20_members_of_a_group_draw_independently() -> None:
    """First tokens of neighbours are uncorrelated; a correct sampler fails with chance 10^-4."""
    model = make_model("gpt2", vocabulary=4, end_bias=0.0)
    prompts = {row: [2] for row in range(10_000)}
    made = make_sampler(model, seed=5).answer(prompts, SamplingConfig(1))
    first = np.array([c.ids[0] for c in made.values()])
    table = np.zeros((4, 4))
    np.add.at(table, (first[::2], first[1::2]), 1)
    table = table[table.sum(1) > 50][:, table.sum(0) > 50]
    assert len(table) > 1
    assert chi2_contingency(table).pvalue > 1e-4


def test_p25_one_seed_twice_is_the_same_and_another_is_not(model: Any) -> None:
    prompts = {row: [2, 3] for row in range(16)}

    def ids(seed: int) -> list[list[int]]:
        made = make_sampler(model, seed).answer(prompts, SamplingConfig(8))
        return [c.ids for c in made.values()]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_greedy_is_the_likeliest_token_and_draws_no_number(model: Any) -> None:
    sampler = make_sampler(model)
    state = sampler.generator.get_state()
    config = SamplingConfig(6, temperature=0.0, top_k=2, top_p=0.1)
    prompts = {0: [2, 3], 1: [4], 2: [4]}
    for row, completion in sampler.answer(prompts, config).items():
        ids = list(prompts[row])
        while len(ids) < len(prompts[row]) + 6 and (ids == prompts[row] or ids[-1] != END):
            ids.append(int(naive_logits(model, ids)[-1].argmax()))
        assert completion.ids == ids[len(prompts[row]) :]
        # Scored by the model's own distribution: nothing was truncated.
        assert completion.support is None
        assert -np.inf < min(completion.log_probs) <= max(completion.log_probs) < 0
    assert torch.equal(sampler.generator.get_state(), state)


def test_a_chosen_greedy_answer_does_not_depend_on_its_batch(model: Any) -> None:
    prompts = {row: ids for row, ids in enumerate([[2, 3, 4], [5], [6, 7, 8, 9, 2], [5]])}
    config = SamplingConfig(6, temperature=0.0)
    together = make_sampler(model).answer(prompts, config)
    for order in itertools.islice(itertools.permutations(prompts), 0, None, 7):
        shuffled = make_sampler(model).answer({row: prompts[row] for row in order}, config)
        assert {r: c.ids for r, c in shuffled.items()} == {r: c.ids for r, c in together.items()}
    for row, ids in prompts.items():
        assert make_sampler(model).answer({0: ids}, config)[0].ids == together[row].ids


def test_sampling_leaves_the_weights_alone_and_holds_no_graph(model: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    sampler = make_sampler(model)
    sampler.answer({0: [2, 3]}, SamplingConfig(3))
    layers = sampler.histories[0].held.cache.layers
    assert not any(layer.keys.requires_grad for layer in layers)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused_by_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SamplingConfig(**wrong)
