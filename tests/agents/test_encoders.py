"""Choosing with a scalar head, on encoders and on causal models, against the slow, obvious way.

The obvious way of an encoder is what ``transformers`` itself makes of ``tokenizer(prompt, text)``;
that of a causal model is one row a candidate.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from agents import PPO, CandidatePolicy, Reinforce
from agents.policies.candidate import Decision
from agents.policies.models import Critic, eval_mode, frozen_copy, is_encoder
from agents.policies.scalar_head import HEAD_FILE, PairFrame, ScalarModel, pack
from agents.rollout import Rollout, collect
from three_tokens import relative

pytestmark = pytest.mark.usefixtures("three_token_tasks")

PAD, CLS, SEP, END = 0, 1, 2, 3
CONTEXT = 128

# RoBERTa counts positions from the padding's id + 1, DistilBERT has no token types, and some layers
# of ModernBERT see through a window, so that its pairs cannot share a row.
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
FAMILIES = (*ENCODERS, "llama", "gpt2")


def make_tokenizer() -> Any:
    """Bytes, and pairs as BERT has them."""
    special = {"<pad>": PAD, "<cls>": CLS, "<sep>": SEP, "<end>": END}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({**special, **{c: i for i, c in enumerate(alphabet, 4)}}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[("<cls>", CLS), ("<sep>", SEP)],
    )
    names = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "eos_token": "<end>"}
    reads = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_input_names=reads, **names)


VOCABULARY = 260


def make_model(
    family: str,
    *,
    vocabulary: int = VOCABULARY,
    context: int = CONTEXT,
    dropout: float = 0.0,
    seed: int = 0,
) -> Any:
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "pad_token_id": PAD, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": context,
        "initializer_range": 0.25,
    }  # fmt: skip
    drops: Any = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if family == "bert":
        return BertModel(BertConfig(**common, **drops))
    if family == "roberta":
        common |= {"max_position_embeddings": context + 1, "type_vocab_size": 1, **drops}
        return RobertaModel(RobertaConfig(**common), add_pooling_layer=False)
    if family == "distilbert":
        sizes: Any = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": dropout}
        return DistilBertModel(DistilBertConfig(**{**common, **sizes}))
    if family == "modernbert":
        named = {"bos_token_id": CLS, "cls_token_id": CLS, "eos_token_id": SEP, "sep_token_id": SEP}
        common |= {"local_attention": 8, "mlp_dropout": dropout, "attention_dropout": dropout}
        return ModernBertModel(ModernBertConfig(**common, **named))
    if family == "gpt2":
        names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        shape: Any = {"n_positions": context, "n_embd": 16, "n_layer": 2, "n_head": 2}
        shape |= {"initializer_range": 0.4, "bos_token_id": END, "eos_token_id": END}
        config = GPT2Config(vocab_size=vocabulary, **shape, **dict.fromkeys(names, dropout))
        return GPT2LMHeadModel(config)
    return LlamaForCausalLM(LlamaConfig(**common, attention_dropout=dropout, eos_token_id=END))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_policy(family: str, tokenizer: Any, *, learned: bool = True, **arguments: Any) -> Any:
    """A policy with dropout, in training mode; ``learned`` gives its head other weights than 0."""
    shape = {name: arguments.pop(name) for name in ("context", "seed") if name in arguments}
    model = make_model(family, dropout=0.5, **shape).train()
    policy = CandidatePolicy(model, tokenizer, head="scalar", **arguments)
    if learned:
        torch.nn.init.normal_(policy.model.head.weight, std=0.2)
    return policy


PROMPT = "User: Its capital?\nAssistant:"
CANDIDATES = (" Lima.", " It is Lima, then.", " ñ", " What?", " Lima.", " That is it")
OTHERS = (("User: It?", (" Lima", " is")), ("User: " + "capital " * 9, (" it", " Lima it", " W")))


def pooled(policy: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean state of each row of what the tokenizer made of pairs."""
    with eval_mode(policy.model):
        hidden = policy.model.trunk(**batch).last_hidden_state
    weights = batch["attention_mask"][:, :, None].to(hidden)
    return (hidden * weights).sum(1) / weights.sum(1)


def score(policy: Any, states: Tensor) -> Tensor:
    """What the head makes of (…, hidden) states."""
    scores: Tensor = states @ policy.model.head.weight[0] * states.shape[-1] ** 0.5
    return scores


def reads(policy: Any) -> Sequence[str]:
    """Names of what the encoder reads."""
    with_types = getattr(policy.model.config, "type_vocab_size", 0) > 1
    return ("input_ids", "attention_mask", *(["token_type_ids"] if with_types else []))


def naive_states(policy: Any, prompt: str, texts: Sequence[str]) -> Tensor:
    """What stands for each candidate, (candidates, hidden); each is one plain row."""
    found = []
    for text in texts:
        if is_encoder(policy.model.config):
            batch = policy.tokenizer(prompt, text, return_tensors="pt")
            found.append(pooled(policy, {name: batch[name] for name in reads(policy)})[0])
            continue
        ids = policy.tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
        with eval_mode(policy.model):
            hidden = policy.model.trunk(
                input_ids=torch.tensor([[*ids[0], *ids[1]]])
            ).last_hidden_state
        found.append(hidden[0, -1])
    return torch.stack(found)


def naive_logits(policy: Any, prompt: str, texts: Sequence[str]) -> Tensor:
    """Candidate by candidate."""
    return score(policy, naive_states(policy, prompt, texts))


def gradients(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([g.flatten().clone() for g in grads])


def ask(policy: Any, prompt: str, texts: Sequence[str], action: int = 0) -> Decision:
    return Decision(0, 0, *policy.encode(prompt, texts), action, 0.0)


# --- the numbers are right -------------------------------------------------------------------


def test_pairs_are_framed_as_the_tokenizer_frames_them(encoder: str, tokenizer: Any) -> None:
    config = make_model(encoder).config
    frame = PairFrame.of(tokenizer, config)
    prompt, text = (tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in "Xy")
    expected = tokenizer("X", "y")
    assert list(frame.ids(prompt, text)) == expected["input_ids"]
    assert len(frame) == 3
    if encoder == "bert":
        assert list(frame.type_ids(prompt, text)) == expected["token_type_ids"] == [0, 0, 0, 1, 1]
    else:
        assert frame.types is None


def test_a_tokenizer_without_a_frame_sets_the_texts_side_by_side() -> None:
    raw = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain = PreTrainedTokenizerFast(tokenizer_object=raw)
    frame = PairFrame.of(plain, make_model("roberta").config)
    assert frame == PairFrame((), (), (), None)
    assert frame.ids((1, 0), (1,)) == (1, 0, 1)


def test_p16_left_right_no_padding_and_packed_agree(encoder: str, tokenizer: Any) -> None:
    policy = make_policy(encoder, tokenizer)
    pairs = [(p, t) for p, texts in ((PROMPT, CANDIDATES), *OTHERS) for t in texts]
    questions = [policy.encode(p, texts) for p, texts in ((PROMPT, CANDIDATES), *OTHERS)]
    unpadded = torch.cat([naive_logits(policy, p, [t]) for p, t in pairs])
    ours = policy.candidate_logits(questions)
    assert torch.allclose(ours[ours.isfinite()], unpadded, atol=1e-5)
    # Pairs did share rows, where they can; without that it is the same.
    first = policy.model.first_position
    assert first == {"bert": 0, "roberta": PAD + 1, "distilbert": 0, "modernbert": None}[encoder]
    shapes: list[tuple[int, ...]] = []
    policy.model.trunk.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    policy.candidate_logits(questions)
    policy.model.first_position = None
    alone = policy.candidate_logits(questions)
    assert torch.allclose(alone[alone.isfinite()], unpadded, atol=1e-5)
    distinct = len(set(pairs))
    assert shapes[1][0] == distinct
    assert shapes[0][0] == distinct if first is None else shapes[0][0] < distinct - 2
    assert shapes[0][1] == shapes[1][1]
    for side in ("right", "left"):
        other = make_tokenizer()
        other.padding_side = side
        batch = other([p for p, _ in pairs], [t for _, t in pairs], padding=True)
        batch = {name: torch.tensor(batch[name]) for name in reads(policy)}
        if side == "left" and first is not None:
            positions = batch["attention_mask"].cumsum(1) - 1 + first
            batch["position_ids"] = positions.clamp_min(0)
        assert torch.allclose(score(policy, pooled(policy, batch)), unpadded, atol=1e-5)


def test_p29_logits_are_those_of_each_candidate_alone(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    expected = naive_logits(policy, PROMPT, CANDIDATES)
    assert expected.std() > 0.01
    question = policy.encode(PROMPT, CANDIDATES)
    others = [policy.encode(*other) for other in OTHERS]
    # Alone; beside questions of other lengths and counts; and with copies of itself.
    for questions in (
        [question],
        [others[0], question, others[1]],
        [question, others[1], question],
    ):
        found = policy.candidate_logits(questions)[questions.index(question)]
        assert torch.allclose(found[:6], expected, atol=1e-5)
        ours = gradients(policy.model, (found[:6] * torch.arange(6)).sum())
        naive = naive_logits(policy, PROMPT, CANDIDATES)
        assert relative(ours, gradients(policy.model, (naive * torch.arange(6)).sum())) < 1e-5
    table = policy.candidate_logits([others[0], question])
    assert table[0].isinf().tolist() == [False, False, True, True, True, True]
    # The order of candidates changes the order of logits and nothing else.
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        shuffled = policy.encode(PROMPT, [CANDIDATES[i] for i in order])
        assert torch.allclose(policy.candidate_logits([shuffled])[0], expected[order], atol=1e-5)


def test_a_critic_judges_the_mean_of_what_stands_for_the_candidates(
    family: str, tokenizer: Any
) -> None:
    policy = make_policy(family, tokenizer)
    torch.manual_seed(1)
    critic = Critic(16)
    torch.nn.init.normal_(critic.weight)
    asked = [OTHERS[0], (PROMPT, CANDIDATES), OTHERS[1], OTHERS[0]]
    decisions = [ask(policy, *question) for question in asked]

    def naive() -> Tensor:
        return torch.cat([critic(naive_states(policy, *q).mean(0, keepdim=True)) for q in asked])

    values = policy.values(decisions, critic)
    assert values.std() > 0.01
    assert torch.allclose(values, naive(), atol=1e-5)
    scored = policy.score(decisions, critic=critic).values
    assert scored is not None
    weights = torch.arange(1.0, 5)
    for model in (policy.model, critic):
        expected = gradients(model, naive() @ weights)
        assert expected.norm() > 0
        loss = policy.score(decisions, critic=critic).values @ weights
        assert relative(gradients(model, loss), expected) < 1e-5


@pytest.mark.parametrize("micro_batch_tokens", [1, 700, 10_000])
def test_p29_p17_chunks_and_padding_change_no_choice(
    family: str, tokenizer: Any, micro_batch_tokens: int
) -> None:
    arguments = {"temperature": 0.7, "seed": 0}
    policy = make_policy(family, tokenizer, micro_batch_tokens=micro_batch_tokens, **arguments)
    asked = [
        (f"{row} {prompt}", texts)
        for row, (prompt, texts) in enumerate(
            [(PROMPT, CANDIDATES), *OTHERS, (PROMPT, OTHERS[1][1])]
        )
    ] * 2
    observations = {
        row: {"prompt": prompt, "candidates": texts} for row, (prompt, texts) in enumerate(asked)
    }
    sizes: list[int] = []
    policy.model.trunk.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    player = policy.begin()
    actions = player.act(observations, 0)
    widest = max(policy.model.width(*d.question) for d in player.sequences)
    assert max(sizes) <= max(micro_batch_tokens, widest)
    for row, decision in enumerate(player.sequences):
        dist = (naive_logits(policy, *asked[row]) / 0.7).log_softmax(-1)
        assert decision.action == actions[row]
        assert decision.log_prob == pytest.approx(dist[decision.action].item(), abs=1e-5)
        assert torch.allclose(player.chosen_from[row, 0], dist.exp(), atol=1e-5)
    sampled = torch.tensor([d.log_prob for d in player.sequences])
    groups = policy.micro_batches(player.sequences)
    assert sorted(itertools.chain(*groups)) == list(range(len(asked)))
    for group in groups:
        scores = policy.score([player.sequences[i] for i in group])
        assert torch.allclose(scores.log_probs, sampled[group], atol=1e-5)
    # One number a row decides, so the choices are those of any other chunking.
    other = make_policy(family, tokenizer, micro_batch_tokens=177, **arguments)
    other.model.load_state_dict(policy.model.state_dict())
    assert other.begin().act(observations, 0) == actions


def test_forward_passes_hold_no_more_than_they_may(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    sizes: list[int] = []
    policy.model.trunk.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    decisions = [
        ask(policy, f"{i} " + "long " * (i % 5), [" Lima"] * 2 + [f" {i}"]) for i in range(40)
    ]
    for policy.micro_batch_tokens in (200, 1000):
        sizes.clear()
        for group in policy.micro_batches(decisions):
            policy.candidate_logits([decisions[i].question for i in group])
        assert 0.5 * policy.micro_batch_tokens < max(sizes) <= policy.micro_batch_tokens


def test_copies_of_a_question_are_read_once(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    texts: list[int] = []
    policy.model.trunk.register_forward_pre_hook(
        lambda _, __, inputs: texts.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    question = policy.encode(PROMPT, CANDIDATES)
    policy.candidate_logits([question] * 8)
    policy.candidate_logits([question])
    assert texts[0] == texts[1]


def test_rows_hold_every_text_once_and_no_more_than_they_can() -> None:
    lengths = torch.randint(1, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = pack(lengths, 40)
    assert sorted(itertools.chain(*rows)) == list(range(200))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    assert len(rows) <= 1.1 * sum(lengths) / 40
    assert pack([5, 7, 5], 0) == [[1], [0], [2]]
    assert pack([], 10) == []


def test_the_first_policy_is_uniform(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer, learned=False)
    assert policy.candidate_logits([policy.encode(PROMPT, CANDIDATES)]).tolist() == [[0.0] * 6]


def test_p18_dropout_is_off_and_the_mode_is_restored(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    decisions = [ask(policy, PROMPT, CANDIDATES, a) for a in range(6)]
    first, second = policy.score(decisions), policy.score(decisions)
    assert torch.equal(first.log_probs, second.log_probs)
    assert all(m.training for m in policy.model.modules())


def test_p15_no_decision_gives_a_finite_zero_loss(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    scores = policy.score([], frozen_copy(policy))
    assert scores.kls is not None
    assert len(scores.log_probs) == len(scores.entropies) == len(scores.kls) == 0
    assert not gradients(policy.model, scores.log_probs.sum() + scores.kls.sum()).any()
    assert policy.begin().act({}, 0) == {}


def test_gradients_reach_the_trunk_and_the_head(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    policy.score([ask(policy, PROMPT, CANDIDATES, 1)]).log_probs.sum().backward()
    # Whatever is added to all keys shifts all scores alike, and a softmax does not see it.
    unseen = ("key.bias", "k_lin.bias")
    for name, p in policy.model.named_parameters():
        if not p.requires_grad:
            assert name.startswith("trunk.pooler.")
            continue
        assert p.grad is not None, name
        assert p.grad.any() or name.endswith(unseen), name


# --- long prompts ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_long_prompt_is_cut_on_the_left(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer, context=24)
    frame = 0 if family == "llama" else 3
    prompt, texts = "0123456789" * 4, (" Lima", " is")
    question = policy.encode(prompt, texts)
    room = 24 - frame - 5
    assert list(question[0]) == tokenizer(prompt, add_special_tokens=False)["input_ids"][-room:]
    assert policy.truncated_prompts == 1
    found = policy.candidate_logits([question])[0]
    assert torch.allclose(found, naive_logits(policy, prompt[-room:], texts), atol=1e-5)
    policy.encode(prompt[:room], texts)
    assert policy.truncated_prompts == 1
    with pytest.raises(ValueError, match=f"longer than the context of {24 - frame} tokens"):
        policy.encode("User:", ["x" * (24 - frame)])
    with pytest.raises(ValueError, match="holds no token"):
        policy.encode("User:", ["", " is"])


def test_the_tokenizers_limit_counts_too(tokenizer: Any) -> None:
    shorter = copy.deepcopy(tokenizer)
    shorter.model_max_length = 20
    assert CandidatePolicy(make_model("bert"), shorter).context == 17


# --- made, saved, copied ---------------------------------------------------------------------


def test_an_encoder_has_the_head_by_itself_and_no_other_way_of_scoring(tokenizer: Any) -> None:
    bert, llama = make_model("bert"), make_model("llama")
    assert CandidatePolicy(bert, tokenizer).scalar
    assert not CandidatePolicy(llama, tokenizer).scalar
    for refused in ({"reply": "Yes."}, {"base": llama}):
        for model in (bert, llama):
            with pytest.raises(ValueError, match="give one of them"):
                CandidatePolicy(model, tokenizer, head="scalar", **refused)
        with pytest.raises(ValueError, match="encoder has no likelihood"):
            CandidatePolicy(bert, tokenizer, **refused)
    with pytest.raises(ValueError, match="head is 'linear'"):
        CandidatePolicy(llama, tokenizer, head="linear")  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [None, "scalar"])
def test_a_saved_policy_is_loaded_again_and_says_the_same(
    family: str, head: Any, tokenizer: Any, tmp_path: Path
) -> None:
    policy = make_policy(family, tokenizer)
    policy.save_pretrained(tmp_path)
    again = CandidatePolicy.from_pretrained(tmp_path, device="cpu", relative=True, head=head)
    assert again.scalar
    assert again.base is None
    question = policy.encode(PROMPT, CANDIDATES)
    assert again.encode(PROMPT, CANDIDATES) == question
    assert torch.equal(again.candidate_logits([question]), policy.candidate_logits([question]))
    # Others find a plain model in the folder.
    plain = AutoModel.from_pretrained(tmp_path)
    theirs, ours = plain.state_dict(), policy.model.trunk.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_folder_of_an_encoder_needs_no_words(tokenizer: Any, tmp_path: Path) -> None:
    masked = BertForMaskedLM(make_model("bert").config)
    masked.save_pretrained(tmp_path)
    nameless = copy.deepcopy(tokenizer)
    nameless.eos_token = None  # BERT has none
    nameless.save_pretrained(tmp_path)
    policy = CandidatePolicy.from_pretrained(tmp_path, device="cpu", relative=True)
    assert isinstance(policy.model.trunk, BertModel)
    assert policy.candidate_logits([policy.encode(PROMPT, CANDIDATES)]).tolist() == [[0.0] * 6]
    agent = Reinforce(str(tmp_path), "RecommendationClicks-v0", device="cpu", eval_every=0)
    assert isinstance(agent.policy.model, ScalarModel)


def test_a_causal_model_is_scored_by_likelihood_unless_asked_otherwise(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a network the hub would be tried for half a minute each time.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = make_model("bert").config
    config.is_decoder = True
    for name, model in (("llama", make_model("llama")), ("bert", BertLMHeadModel(config))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        policy = CandidatePolicy.from_pretrained(tmp_path / name, device="cpu", relative=True)
        assert not policy.scalar
        assert policy.base is not None
        headed = CandidatePolicy.from_pretrained(tmp_path / name, device="cpu", head="scalar")
        assert headed.model.frame is None
    with pytest.raises(ValueError, match="No model could be loaded from 'nowhere'"):
        CandidatePolicy.from_pretrained("nowhere", head="scalar")
    with pytest.raises(ValueError, match="No causal language model could be loaded"):
        CandidatePolicy.from_pretrained("nowhere")


def test_a_damaged_head_is_named(tokenizer: Any, tmp_path: Path) -> None:
    make_policy("bert", tokenizer).save_pretrained(tmp_path)
    for content in (b"damaged", (tmp_path / HEAD_FILE).read_bytes()[:-8]):
        (tmp_path / HEAD_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"scalar head .*{HEAD_FILE} is damaged"):
            CandidatePolicy.from_pretrained(tmp_path)


def test_the_embedded_model_is_not_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / HEAD_FILE).write_bytes(b"")
    (tmp_path / "tiny/reply.json").write_text('"I like it."')
    monkeypatch.chdir(tmp_path)
    policy = CandidatePolicy.from_pretrained("tiny")
    assert not policy.scalar
    assert policy.reply_text is None


def test_the_head_lies_in_safetensors_beside_the_model(tokenizer: Any, tmp_path: Path) -> None:
    make_policy("bert", tokenizer).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {HEAD_FILE, "model.safetensors", "config.json"}
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.p*t*"))


def test_p27_a_frozen_copy_never_changes(family: str, tokenizer: Any) -> None:
    policy = make_policy(family, tokenizer)
    reference = frozen_copy(policy)
    decisions = [ask(policy, PROMPT, CANDIDATES, 2), ask(policy, *OTHERS[0], 1)]
    before = reference.candidate_logits([d.question for d in decisions])
    assert not before.requires_grad
    same = policy.score(decisions, reference)
    assert same.kls is not None
    assert same.kls.abs().max() < 1e-6
    with torch.no_grad():
        for p in policy.model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    scores = policy.score(decisions, reference)
    assert scores.kls is not None
    for i, (prompt, texts) in enumerate(((PROMPT, CANDIDATES), OTHERS[0])):
        own = naive_logits(policy, prompt, texts).log_softmax(-1)
        theirs = before[i, : len(texts)].log_softmax(-1)
        expected = (own.exp() * (own - theirs)).sum().item()
        assert expected > 1e-3
        assert scores.kls[i].item() == pytest.approx(expected, abs=1e-5)
    gradients(policy.model, scores.kls.sum() + scores.entropies.sum())
    assert all(p.grad is None for p in reference.model.parameters())
    assert torch.equal(reference.candidate_logits([d.question for d in decisions]), before)


# --- as an agent's policy --------------------------------------------------------------------


def make_agent(tokenizer: Any, family: str = "bert", seed: int = 0, **settings: Any) -> Any:
    policy = CandidatePolicy(make_model(family, dropout=0.1), tokenizer, head="scalar")
    shape = {"prompts": 4, "group_size": 4, "eval_every": 0}
    return Reinforce(policy, "Pick-v9", seed=seed, **{**shape, **settings})


def parameters(agent: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in agent.policy.model.parameters()])


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_p23_micro_batches_and_row_order_change_nothing(family: str, tokenizer: Any) -> None:
    agent = make_agent(tokenizer, family, entropy_coef=0.3, kl_coef=0.2, prompts=6)
    agent.policy.model.double()
    agent.reference.model.double()
    with torch.no_grad():  # away from the reference, or there is no KL
        for p in agent.policy.model.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    rollout = collect(agent.policy.begin(), agent.envs, seeds=list(range(24)))

    def loss_of(rollout: Rollout, advantages: Tensor) -> tuple[Tensor, dict[str, float]]:
        metrics = agent.accumulate_gradients(rollout, advantages)
        grads = [p.grad for p in agent.policy.model.parameters() if p.grad is not None]
        found = torch.cat([g.flatten() for g in grads])
        agent.policy.model.zero_grad()
        return found, metrics

    advantages = torch.linspace(-1, 1, 24, dtype=torch.float64)
    expected, metrics = loss_of(rollout, advantages)
    assert expected.norm() > 0
    for tokens in (1, 30, 70):
        agent.policy.micro_batch_tokens = tokens
        assert len(agent.policy.micro_batches(rollout.sequences)) > 1
        found, split = loss_of(rollout, advantages)
        assert relative(found, expected) < 1e-6
        assert split == pytest.approx(metrics, rel=1e-6)
    rollout.sequences.reverse()
    rollout.decision_of.reverse()
    found, split = loss_of(rollout, advantages)
    assert relative(found, expected) < 1e-6
    assert split == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_p24_a_resumed_run_equals_the_uninterrupted_one(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    settings = {"learning_rate": 1e-2, "kl_coef": 0.1}
    whole = make_agent(tokenizer, family, **settings)
    start = parameters(whole)
    whole.learn(5 * 16)
    halved = make_agent(tokenizer, family, **settings)
    halved.learn(2 * 16)
    halved.save(tmp_path / "checkpoint")
    resumed = Reinforce.load(tmp_path / "checkpoint", device="cpu")
    resumed.learn(5 * 16)
    assert torch.equal(parameters(resumed), parameters(whole))
    reference = torch.cat([p.flatten() for p in resumed.reference.model.parameters()])
    assert torch.equal(reference, start)
    assert not torch.equal(parameters(whole), start)


def test_a_setting_puts_a_scalar_head_on_a_causal_model() -> None:
    agent = Reinforce("tiny", "RecommendationClicks-v0", head="scalar")
    assert isinstance(agent.policy.model, ScalarModel)
    assert not isinstance(Reinforce("tiny", "RecommendationClicks-v0").policy.model, ScalarModel)


def test_ppo_learns_a_choice_and_its_value(tokenizer: Any) -> None:
    policy = CandidatePolicy(make_model("bert", dropout=0.1), tokenizer, head="scalar")
    agent = PPO(
        policy, "Pick-v9", seed=0, prompts=4, group_size=8, eval_every=0, learning_rate=3e-3
    )
    agent.learn(40 * 32)
    assert agent.evaluate("validation").score == 1.0
    assert agent.critic is not None
    decisions = [ask(policy, letter, ("a", "b")) for letter in "ab"]
    with torch.no_grad():  # who always chooses right is rewarded with 1
        assert policy.values(decisions, agent.critic).tolist() == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_p28_it_solves_a_choice(family: str, seed: int, tokenizer: Any) -> None:
    agent = make_agent(tokenizer, family, seed, learning_rate=3e-3, group_size=8)
    agent.learn(40 * 32)
    assert agent.evaluate("validation").score == 1.0
