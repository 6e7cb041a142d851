"""Chat-templated conversations, against whole renderings and texts written by hand.

The templates are those of well-known families, shortened; models have random weights and a head
that is biased towards a few words and the end of an answer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from agents import Reinforce
from agents.policies.causal_lm import CausalLMPolicy, TokenSequence
from agents.policies.chat import CHAT_FILE, ChatTemplate, as_messages
from agents.policies.models import frozen_copy, load_model
from agents.rollout import collect, play
from agents.sampling import SamplingConfig

Messages = list[dict[str, str]]

# SmolLM2: a default system message. Qwen2.5 and others are alike.
CHATML = """{% for message in messages %}\
{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou are a helpful AI.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """{% for message in messages %}\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' \
+ message['content'] | trim + '<|eot_id|>' %}\
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}\
{% endfor %}{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

# The system message goes into the first user message, and the assistant is called "model".
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{% set before = messages[0]['content'] + '\n\n' %}{% set talk = messages[1:] %}\
{% else %}{% set before = '' %}{% set talk = messages %}{% endif %}\
{% for message in talk %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\n' + (before if loop.first else '') }}\
{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# No generation prompt, and a space before the answer; it knows no system message.
MISTRAL = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}\
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}\
{% endfor %}"""

# The end stands on a line of its own.
LATE = """{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}\
{{ '\n<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"""

# Nothing but words: the end of sequence is the policy's own.
WORDS = """{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""

# Qwen3 and others: what was thought is left out of history.
THINKING = """{% for message in messages %}\
{% set content = message['content'].split('</think>')[-1].lstrip('\n') %}\
{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Newer Mistral: the system message goes into the last user message.
WANDERING = """{% set system = messages[0]['content'] %}{{ bos_token }}\
{% for message in messages[1:] %}{% if message['role'] == 'user' %}{{ '[INST] ' }}\
{% if loop.last %}{{ system + '\n\n' }}{% endif %}{{ message['content'] + ' [/INST]' }}\
{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""

SPECIAL = [
    "<eos>", "<pad>", "<bos>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "</think>",
]  # fmt: skip


class Family(NamedTuple):
    template: str
    eos: str
    end: str
    """What ends an answer."""
    first: str
    """The rendering of a conversation that begins with "What is it?"."""
    rest: str
    """What follows an answer and its end, where the user goes on with "And then?"."""
    closing: str
    """What the template puts after an answer, its end included."""
    space: str = ""
    """What it puts before one."""


FAMILIES = {
    "chatml": Family(
        CHATML,
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>system\nYou are a helpful AI.<|im_end|>\n"
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "llama3": Family(
        LLAMA3,
        "<|eot_id|>",
        "<|eot_id|>",
        "<bos><|start_header_id|>user<|end_header_id|>\n\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>user<|end_header_id|>\n\nAnd then?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "gemma": Family(
        GEMMA,
        "<eos>",
        "<end_of_turn>",
        "<bos><start_of_turn>user\nWhat is it?<end_of_turn>\n<start_of_turn>model\n",
        "\n<start_of_turn>user\nAnd then?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    "mistral": Family(
        MISTRAL,
        "<eos>",
        "<eos>",
        "<bos>[INST] What is it? [/INST]",
        "[INST] And then? [/INST]",
        "<eos>",
        " ",
    ),
    "late": Family(
        LATE,
        "<|im_end|>",
        "<|im_end|>",
        "### user\nWhat is it?\n<|im_end|>\n### assistant\n",
        "\n### user\nAnd then?\n<|im_end|>\n### assistant\n",
        "\n<|im_end|>",
    ),
    "words": Family(
        WORDS,
        "<eos>",
        "<eos>",
        "user: What is it?\nassistant:",
        "\nuser: And then?\nassistant:",
        "",
        " ",
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(template: str | None, eos: str) -> Any:
    """Byte-level BPE with a few words."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = ["user\nWhat is it? And then? It is Lima. Lima is big", "assistant\nLima is it. big"]
    raw.train_from_iterator(text * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, pad_token="<pad>", bos_token="<bos>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_policy(family: Family, *, kind: str = "llama", seed: int = 0, **arguments: Any) -> Any:
    """A policy that likes a few words, and to end; ``likes`` are further tokens and biases.

    ``likes=None`` makes a model that can be saved.
    """
    likes = arguments.pop("likes", {})
    tokenizer = make_tokenizer(family.template, family.eos)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 0}
    model: Any
    if kind == "gpt2":
        shape: dict[str, Any] = {"n_positions": 512, "n_embd": 16, "n_layer": 2, "n_head": 4}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **shape, initializer_range=0.3))
    else:
        sizes |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.25))
    head = torch.nn.Linear(16, len(tokenizer))
    head.weight = model.lm_head.weight
    head.bias.data.zero_()
    for word, bias in {
        "ĠLima": 5.0,
        "Lima": 5.0,
        "Ġis": 5.0,
        family.end: 7.0,
        **(likes or {}),
    }.items():
        head.bias.data[tokenizer.convert_tokens_to_ids(word)] = bias
    if likes is not None:
        model.lm_head = head
    arguments.setdefault("sampling", SamplingConfig(8))
    return CausalLMPolicy(model, tokenizer, **arguments)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def go_on(talk: Messages, answer: str, then: str = "And then?") -> Messages:
    """What an environment makes of an answer."""
    return [*talk, {"role": "assistant", "content": answer.strip()}, user(then)]


def talk(policy: Any, rows: int = 16, turns: int = 3) -> tuple[Any, dict[int, Messages], Any]:
    """Play by hand; return the player, what each row came to, and every answer by row and turn."""
    player = policy.begin()
    talks = {row: [user("What is it?")] for row in range(rows)}
    answers: dict[tuple[int, int], str] = {}
    for turn in range(turns):
        said = player.act(talks, turn)
        answers |= {(row, turn): text for row, text in said.items()}
        talks = {row: go_on(talks[row], text) for row, text in said.items()}
    return player, talks, answers


def encode(policy: Any, text: str) -> list[int]:
    ids: list[int] = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def answer_of(made: TokenSequence, turn: int) -> list[int]:
    return [i for i, t in zip(made.ids, made.turns, strict=True) if t == turn]


def naive_log_probs(policy: Any, made: TokenSequence) -> Tensor:
    """Of the sampled tokens, read alone and without a cache."""
    logits = policy.model.eval()(input_ids=torch.tensor([made.ids]), use_cache=False).logits[0]
    log_probs = logits[:-1].log_softmax(-1)
    places = [i for i, t in enumerate(made.turns) if t >= 0]
    found: Tensor = log_probs[[i - 1 for i in places], [made.ids[i] for i in places]]
    return found


def sampled_log_probs(sequences: Sequence[TokenSequence]) -> Tensor:
    pairs = [pair for s in sequences for pair in zip(s.log_probs, s.turns, strict=True)]
    return torch.tensor([log_prob for log_prob, turn in pairs if turn >= 0])


# --- token in, token out ---------------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_p21_canonical_answers_make_the_ids_of_the_whole_rendering(
    family: Family, system: str | None
) -> None:
    if family.template == MISTRAL and system:
        pytest.skip("knows no system message")
    likes = {family.space.replace(" ", "Ġ") + "Lima": 11.0, family.end: 11.0}
    policy = make_policy(family, system=system, likes=likes)
    player, talks, answers = talk(policy, rows=96)
    own = [] if system is None else [{"role": "system", "content": system}]
    same = 0
    for row, made in enumerate(player.sequences):
        canonical = all(
            encode(policy, answers[row, turn]) == answer_of(made, turn)[:-1]
            and answers[row, turn] == family.space + answers[row, turn].strip()
            for turn in range(3)
        )
        if not canonical:
            continue
        messages = [*own, *talks[row][:-2]]  # without the last answer
        whole = policy.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        expected = encode(policy, whole) + answer_of(made, 2)
        if family.closing == "\n" + family.end:  # the model did not write the line break
            line = encode(policy, "\n")[0]
            places = [i for i, t in enumerate(made.turns[:-1]) if t >= 0 > made.turns[i + 1]]
            for i in reversed(places):
                made.ids.insert(i, line)
        if not family.closing:  # nor the template its end of sequence
            made.ids[:] = [
                i for i, t in zip(made.ids, made.turns, strict=True)
                if t in (-1, 2) or i != policy.end
            ]  # fmt: skip
        assert made.ids == expected
        same += any(answers[row, turn] for turn in range(2))
    assert same > 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_p21_what_was_sampled_stays_and_only_new_messages_are_encoded(
    family: Family, kind: str
) -> None:
    """The texts between the answers were written by hand."""
    # "is" is one token of the tokenizer, but this policy likes to write it as two; and it likes a
    # byte that begins a character of two.
    likes = {"i": 8.0, "s": 8.0, "Ã": 7.0, family.end: 8.0}
    policy = make_policy(family, kind=kind, likes=likes, sampling=SamplingConfig(4))
    player, _, answers = talk(policy, rows=48, turns=4)
    assert len(player.sequences) == 48
    first, rest, closing = (encode(policy, x) for x in (family.first, family.rest, family.closing))
    broken = others = cut = 0
    for row, made in enumerate(player.sequences):
        pieces = list(first)
        for turn in range(4):
            written = answer_of(made, turn)
            spoken = [i for i in written if i != policy.end]
            pieces += written
            if turn < 3:
                pieces += ([] if written[-1] == policy.end else closing) + rest
            answer = answers[row, turn]
            assert answer == policy.tokenizer.decode(spoken)
            broken += "\ufffd" in answer
            others += "\ufffd" not in answer and encode(policy, answer) != spoken
            cut += written[-1] != policy.end
        assert made.ids == pieces
    assert min(broken, others, cut) > 3
    # What conversations begin with is read once for all of them; the very last token never is.
    prefixes = {tuple(made.ids[:n]) for made in player.sequences for n in range(1, len(made))}
    assert policy.read_tokens == len(prefixes)


def test_p13_an_answer_ends_once_and_what_was_cut_is_ended_by_the_environment(
    family: Family,
) -> None:
    policy = make_policy(family, sampling=SamplingConfig(3), likes={family.end: 5.5})
    player, _, _ = talk(policy)
    cut = 0
    for made in player.sequences:
        for turn in range(2):
            answer = answer_of(made, turn)
            assert answer.count(policy.end) == (answer[-1] == policy.end)
            last = max(i for i, t in enumerate(made.turns) if t == turn)
            after = policy.tokenizer.decode(made.ids[last : last + 3])
            if answer[-1] == policy.end:
                assert made.turns[last + 1] == -1
                assert made.ids[last + 1] != policy.end
            elif family.closing:
                cut += 1
                end = made.ids.index(policy.end, last)
                assert made.turns[last + 1 : end + 1] == [-1] * (end - last), after
                assert not policy.tokenizer.decode(made.ids[last + 1 : end]).strip()
        assert answer_of(made, 2)[-1] == policy.end or len(answer_of(made, 2)) == 3
    assert cut > 3 or not family.closing
    assert player.cut >= cut


def test_the_end_of_an_answer_is_the_templates(family: Family) -> None:
    """Gemma's is not the tokenizer's end of sequence."""
    tokenizer = make_tokenizer(family.template, family.eos)
    template = ChatTemplate(tokenizer)
    assert tokenizer.decode([template.end]) == family.end
    assert tokenizer.decode(list(template.closing)) == family.closing


def test_what_begins_a_users_message_is_no_end_of_an_answer() -> None:
    """A template that ends answers with nothing, between special tokens."""
    tokenizer = make_tokenizer(MISTRAL.replace(" + eos_token", ""), "<eos>")
    template = ChatTemplate(tokenizer)
    assert (template.end, template.closing) == (tokenizer.eos_token_id, ())


def test_only_the_end_of_an_answer_is_left_out() -> None:
    """A template that ends answers before what users say, and not before what tools say."""
    template = """{% for message in messages %}{{ message['role'] + '\n' + message['content'] }}\
{% if loop.last or messages[loop.index]['role'] != 'tool' %}{{ '<|im_end|>' }}{% endif %}\
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"""
    policy = make_policy(Family(template, "<|im_end|>", "<|im_end|>", "", "", ""))
    player = policy.begin()
    talks = {row: [user("What is it?")] for row in range(8)}
    answers = player.act(talks, 0)
    found = {"role": "tool", "content": "It is Lima."}
    player.act({r: [*go_on(talks[r], a)[:-1], found] for r, a in answers.items()}, 1)
    rest = encode(policy, "\ntool\nIt is Lima.<|im_end|>\nassistant\n")
    for made in player.sequences:
        prompt = whole_ids(policy, talks[made.row])
        assert made.ids == prompt + answer_of(made, 0) + rest + answer_of(made, 1)


def test_a_default_system_message_is_there_once() -> None:
    policy = make_policy(FAMILIES["chatml"])
    player, _, _ = talk(policy)
    for made in player.sequences:
        assert policy.tokenizer.decode(made.ids).count("You are a helpful AI.") == 1
    own = make_policy(FAMILIES["chatml"], system="Be brief.")
    for made in talk(own)[0].sequences:
        text = own.tokenizer.decode(made.ids)
        assert "You are a helpful AI." not in text
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat")
        assert text.count("Be brief.") == 1


# --- log-probabilities and gradients ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_p14_p17_scores_over_turns_are_those_of_the_sampler_and_of_the_naive_loop(
    family: Family, kind: str
) -> None:
    policy = make_policy(family, kind=kind)
    player, _, _ = talk(policy, rows=6)
    found = policy.score(player.sequences).log_probs
    naive = torch.cat([naive_log_probs(policy, s) for s in player.sequences])
    assert torch.allclose(found, sampled_log_probs(player.sequences), atol=1e-5)
    assert torch.allclose(found, naive, atol=1e-5)
    gradients: list[Tensor] = []
    for loss in (found.sum(), naive.sum()):
        policy.model.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


# --- conversations that are rendered otherwise later ------------------------------------------


def whole_ids(policy: Any, messages: Messages) -> list[int]:
    text = policy.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return encode(policy, text)


@pytest.mark.parametrize(("template", "eos"), [(THINKING, "<|im_end|>"), (WANDERING, "<eos>")])
def test_p21_a_template_that_rewrites_history_is_read_from_the_beginning(
    template: str, eos: str
) -> None:
    """Each answer stays where it was sampled; the history is the template's, without gradient."""
    family = Family(template, eos, eos, "", "", eos)
    system = "Be brief." if template == WANDERING else None
    policy = make_policy(family, likes={"</think>": 9.0, eos: 8.0}, system=system)
    own = [{"role": "system", "content": system}] if system else []
    player = policy.begin()
    talks = {row: [user("What is it?")] for row in range(16)}
    held: dict[int, TokenSequence] = {}
    anew = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for turn in range(3):
            begun = len(player.sequences)
            answers = player.act(talks, turn)
            for made in player.sequences[begun:]:
                prompt = whole_ids(policy, [*own, *talks[made.row]])
                assert made.ids == prompt + answer_of(made, turn)
                assert made.turns[: len(prompt)] == [-1] * len(prompt)
                anew += turn > 0
                held[made.row] = made
            for row in answers:
                assert answer_of(held[row], turn)
            if turn < 2 and template == THINKING:
                thought = {row for row, text in answers.items() if "</think>" in text.strip()}
                assert 0 < len(thought) < 16
            talks = {row: go_on(talks[row], text) for row, text in answers.items()}
    told = [w for w in warned if "rendered otherwise now" in str(w.message)]
    assert len(told) == 1
    assert policy.changed_conversations == anew == len(player.sequences) - 16
    assert anew == 32 or template == THINKING
    turns = sorted(t for s in player.sequences for t in {*s.turns} - {-1})
    assert turns == sorted([*range(3)] * 16)
    found = policy.score(player.sequences).log_probs
    assert torch.allclose(found, sampled_log_probs(player.sequences), atol=1e-5)


def test_p17_a_conversation_that_the_environment_rewrites_begins_anew(family: Family) -> None:
    policy = make_policy(family)
    player = policy.begin()
    talks = {row: [user("What is it?")] for row in range(5)}
    answers = player.act(talks, 0)
    changed = {row: go_on(talks[row], text) for row, text in answers.items()}
    changed[1] = [user("Something else."), *changed[1][1:]]
    changed[2] = go_on(talks[2], answers[2] + " Lima")
    changed[3] = [user("Something else.")]
    with pytest.warns(UserWarning, match="rendered otherwise now"):
        player.act(changed, 1)
    assert [s.row for s in player.sequences] == [0, 1, 2, 3, 4, 1, 2, 3]
    for made in player.sequences[5:]:
        assert made.ids == whole_ids(policy, changed[made.row]) + answer_of(made, 1)
    found = policy.score(player.sequences).log_probs
    assert torch.allclose(found, sampled_log_probs(player.sequences), atol=1e-5)


def test_rows_that_are_over_leave_and_may_come_back(family: Family) -> None:
    policy = make_policy(family)
    player, talks, _ = talk(policy, rows=4, turns=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        player.act({row: talks[row] for row in (0, 3)}, 2)
        player.act({1: talks[1]}, 3)
    assert [s.row for s in player.sequences] == [0, 1, 2, 3, 1]
    found = policy.score(player.sequences).log_probs
    assert torch.allclose(found, sampled_log_probs(player.sequences), atol=1e-5)


# --- choosing whether and how -----------------------------------------------------------------


def test_the_tokenizer_says_whether_there_is_a_chat(family: Family) -> None:
    policy = make_policy(family)
    model, tokenizer = policy.model, policy.tokenizer
    assert policy.chat is not None
    assert policy.end == tokenizer.convert_tokens_to_ids(family.end)
    plain = CausalLMPolicy(model, tokenizer, chat=False)
    assert plain.chat is None
    assert plain.end == tokenizer.eos_token_id
    player = plain.begin()
    player.act({0: "User: What is it?\nAssistant:"}, 0)
    [made] = player.sequences
    assert made.ids[: made.turns.index(0)] == encode(policy, "User: What is it?\nAssistant:")
    with pytest.raises(ValueError, match="system message belongs to a chat template"):
        CausalLMPolicy(model, tokenizer, chat=False, system="Be brief.")


def test_a_tokenizer_without_a_template_has_no_chat() -> None:
    model, tokenizer = load_model("tiny", "cpu", "float32")
    assert CausalLMPolicy(model, tokenizer).chat is None
    with pytest.raises(ValueError, match="no chat template"):
        CausalLMPolicy(model, tokenizer, chat=True)
    with pytest.raises(ValueError, match="system message belongs"):
        CausalLMPolicy(model, tokenizer, system="Be brief.")


def test_a_template_that_refuses_says_what_and_why() -> None:
    with pytest.raises(ValueError, match=r"'system'.*Only user and assistant roles.*(?s:.*)system"):
        make_policy(FAMILIES["mistral"], system="Be brief.")
    policy = make_policy(FAMILIES["gemma"])
    with pytest.raises(ValueError, match=r"\['user', 'user'\].*must alternate"):
        policy.begin().act({0: [user("One"), user("Two")]}, 0)


def test_a_text_stands_for_one_user_message(family: Family) -> None:
    assert as_messages("What is it?") == [user("What is it?")]
    assert as_messages("User: What is it?\nAssistant:") == [user("What is it?")]
    given = [user("What is it?")]
    assert as_messages(given) == given
    for wrong in ([], {"role": "user", "content": "x"}, None, [{"role": "user"}], ["x"], 3):
        with pytest.raises(ValueError, match="text or a list of messages"):
            as_messages(wrong)
    greedy = SamplingConfig(8, temperature=0.0)
    policy = make_policy(family)
    shown = ["What is it?", "User: What is it?\nAssistant:", given]
    assert len({policy.begin(greedy).act({0: o}, 0)[0] for o in shown}) == 1


# --- with environments and agents -------------------------------------------------------------


def test_rollouts_show_messages_to_a_chat_policy(family: Family) -> None:
    """The ids of a real environment's dialogues are those of its messages."""
    policy = make_policy(family, sampling=SamplingConfig(4))
    envs = gym.make_vec("DialogueQA-v0", num_envs=6, split="train", max_turns=3)
    rollout = collect(policy.begin(), envs, seeds=[1, 1, 2, 2, 3, 3])
    assert len(rollout.sequences) == 6
    assert int(rollout.turns.max()) == 2
    steps = play(policy.begin(), envs, seeds=[4, 5, 6, 7, 8, 9])
    assert {s.turn for s in steps} == {0, 1, 2}
    env = gym.make("DialogueQA-v0", split="train", max_turns=3)
    for made, seed in zip(rollout.sequences, [1, 1, 2, 2, 3, 3], strict=True):
        _, info = env.reset(seed=seed)
        ids = whole_ids(policy, info["messages"])
        for turn in range(max(made.turns) + 1):
            assert made.ids[: len(ids)] == ids
            written = answer_of(made, turn)
            spoken = [i for i in written if i != policy.end]
            *_, info = env.step(policy.tokenizer.decode(spoken))
            rest = encode(policy, family.rest.replace("And then?", info["messages"][-1]["content"]))
            ended = written[-1] == policy.end
            ids += written + ([] if ended else encode(policy, family.closing)) + rest
    found = policy.score(rollout.sequences).log_probs
    assert torch.allclose(found, sampled_log_probs(rollout.sequences), atol=1e-5)


def test_an_environment_without_messages_is_refused() -> None:
    class Silent(gym.vector.VectorWrapper):  # type: ignore[type-arg]
        def reset(self, **arguments: Any) -> Any:
            observations, infos = super().reset(**arguments)
            return observations, {k: v for k, v in infos.items() if "messages" not in k}

    envs = Silent(gym.make_vec("DialogueQA-v0", num_envs=2, split="train"))
    with pytest.raises(ValueError, match=r"gives no info\['messages'\].*chat=False"):
        play(make_policy(FAMILIES["chatml"]).begin(), envs, seeds=[1, 2])
    assert play(make_policy(FAMILIES["chatml"], chat=False).begin(), envs, seeds=[1, 2])


@pytest.mark.parametrize("settings", [{}, {"system": "Bé brief."}, {"chat": False}])
def test_p24_a_checkpoint_keeps_the_chat(settings: dict[str, Any], tmp_path: Path) -> None:
    def agent() -> Any:
        return Reinforce(
            make_policy(FAMILIES["gemma"], likes=None, **settings),
            "DialogueQA-v0",
            prompts=2,
            group_size=2,
            max_new_tokens=4,
            eval_every=0,
            kl_coef=0.1,
            seed=3,
            env_kwargs={"max_turns": 2},
        )

    whole, half = agent().learn(16), agent().learn(8)
    half.save(tmp_path / "last")
    again = Reinforce.load(tmp_path / "last", device="cpu")
    assert isinstance(again.policy, CausalLMPolicy)
    assert (again.policy.chat is not None) is settings.get("chat", True)
    if again.policy.chat is not None:
        assert again.policy.chat.system == settings.get("system")
        assert again.reference.chat.system == settings.get("system")
    again.learn(16)
    for one, two in zip(
        whole.policy.model.state_dict().values(),
        again.policy.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(one, two)
    # What is asked for comes before what was saved.
    other = CausalLMPolicy.from_pretrained(tmp_path / "last/policy", chat=True, system="Else.")
    assert other.chat is not None
    assert other.chat.system == "Else."


def test_settings_say_how_a_model_that_is_named_is_talked_to(tmp_path: Path) -> None:
    make_policy(FAMILIES["chatml"], likes=None).save_pretrained(tmp_path / "model")

    def agent(**settings: Any) -> Any:
        return Reinforce(tmp_path / "model", "DialogueQA-v0", max_new_tokens=4, **settings)

    assert agent().policy.chat.system is None
    assert agent(chat="off").policy.chat is None
    told = agent(system="Be brief.")
    assert told.policy.chat.system == "Be brief."
    told.save(tmp_path / "last")
    again = Reinforce.load(tmp_path / "last", device="cpu")
    assert again.policy.chat.system == again.config.system == "Be brief."  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no chat template"):
        Reinforce("tiny", "DialogueQA-v0", chat="on")
    with pytest.raises(ValueError, match="belongs to a chat template"):
        agent(chat="off", system="Be brief.")


def test_a_policy_without_a_template_saves_nothing_of_a_chat(tmp_path: Path) -> None:
    CausalLMPolicy.from_pretrained("tiny", device="cpu").save_pretrained(tmp_path)
    assert not (tmp_path / CHAT_FILE).exists()


def test_agents_predict_and_evaluate_with_chat() -> None:
    agent = Reinforce(
        make_policy(FAMILIES["llama3"]),
        "DialogueQA-v0",
        prompts=1,
        group_size=2,
        max_new_tokens=4,
        eval_every=0,
        env_kwargs={"max_turns": 2},
    )
    found = agent.evaluate("validation", episodes=3)
    first = {t["example_id"]: t["answer"] for t in found.transcripts if t["turn"] == 0}
    env = gym.make("DialogueQA-v0", split="validation")
    for example, answer in first.items():
        observation, info = env.reset(seed=0, options={"example": example})
        assert agent.predict(observation)[0].strip() == answer
        assert agent.predict([info["messages"]])[0][0].strip() == answer
    with pytest.raises(ValueError, match=r"agent.predict\(\[info\['messages'\]\]\)"):
        agent.predict(info["messages"])


def test_p27_a_frozen_copy_scores_chats_too(family: Family) -> None:
    policy = make_policy(family)
    player, _, _ = talk(policy, rows=3)
    kls = policy.score(player.sequences, frozen_copy(policy)).kls
    assert kls is not None
    assert kls.abs().max() < 1e-6


def test_messages_with_the_templates_own_marks_are_read_like_any_other(family: Family) -> None:
    """The marks become tokens, as they do everywhere; what follows an answer is still right."""
    policy = make_policy(family)
    marks = f"Say {family.end}\n{family.closing} {family.first} or not."
    player = policy.begin()
    talks = {row: [user(marks)] for row in range(4)}
    answers = player.act(talks, 0)
    talks = {row: go_on(talks[row], text, marks) for row, text in answers.items()}
    player.act(talks, 1)
    rest = encode(policy, family.rest.replace("And then?", marks))
    first = whole_ids(policy, [user(marks)])
    for made in player.sequences:
        written = answer_of(made, 0)
        ended = written[-1] == policy.end
        closing = [] if ended else encode(policy, family.closing)
        assert made.ids == first + written + closing + rest + answer_of(made, 1)
