"""Perturbed questions: that they mean the same, that they are seeded, and that forms are equal."""

from __future__ import annotations

import copy
import doctest
import functools
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents import train
from agents.evaluation import evaluate
from agents.policies.causal_lm import CausalLMPolicy
from installed import playable_ids
from llm_envs.core.env import TextEnv
from llm_envs.core.task import say
from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.faqs import load_faqs
from llm_envs.datasets.records import Dialogue, Turn
from llm_envs.scoring.qa import contains_answer
from llm_envs.tasks.dialogue_qa import DialogueQA
from llm_envs.tasks.recommendation_clicks import OPENING
from llm_envs.tasks.summarization import INSTRUCTION
from llm_envs.tasks.text_battle import STYLES
from llm_envs.wrappers import (
    Augmentation,
    AugmentedText,
    AugmentedVectorText,
    NumericView,
    augmentation,
)
from llm_envs.wrappers.augmentation import (
    OPENINGS,
    REWORDINGS,
    WORDS,
    draw_distractors,
    misspellings,
    misspelt,
    most_harmful,
    paraphrases,
    passage_of,
    perturbed,
    sentences,
    topics,
)

IDS = playable_ids()
SPLITS = ("train", "validation", "test")
SEEDS = [5, 2**40, 9]
N = len(SEEDS)
STEPS = 12


def longest(texts: list[str]) -> list[float]:
    """An adversary that wants long texts, and finds many of them equally long."""
    return [float(len(text) // 20) for text in texts]


ALL: dict[str, Any] = {"typos": 0.5, "paraphrase": 0.7, "distractors": 2}
KINDS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "typos": {"typos": 0.5},
    "paraphrase": {"paraphrase": 0.7},
    "all": ALL,
    "adversary": {**ALL, "adversary": longest, "candidates": 3},
}

each_id = pytest.mark.parametrize("id", IDS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def settings_of(id: str, kind: str) -> dict[str, Any]:
    """The perturbations of a kind that an environment takes: only dialogues have passages."""
    left_out = () if id == "DialogueQA-v0" else ("distractors",)
    return {name: value for name, value in KINDS[kind].items() if name not in left_out}


def plain(value: Any) -> Any:
    """Nested structures as what can be compared, types and dtypes included."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value).__name__, [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, plain(value.tolist())
    return type(value).__name__, value


def an_action(env: gym.Env[Any, Any], rng: np.random.Generator) -> Any:
    """Draw a right, a nearly right or a wrong action."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        return int(rng.integers(env.action_space.n))
    right = rng.choice(env.unwrapped.references)  # type: ignore[attr-defined]
    return [f" {right}", f" {right} and more", " unknown", ""][rng.integers(4)]


def text_of(observation: Any) -> str:
    found: str = observation["prompt"] if isinstance(observation, dict) else observation
    return found


def questions(split: str) -> set[str]:
    """What is asked in a split of the embedded dialogues and FAQs, and in the battles of it."""
    asked = {t.question for r in load_dialogues(split=split).records for t in r.turns}
    asked |= {faq.question for faq in load_faqs(split=split).records}
    return asked | {style.asks for style in STYLES[split]}


# --- typos ---------------------------------------------------------------------------------------


def test_a_misspelling_is_read_as_the_word_that_was_meant() -> None:
    """It has the word's letters, two of them swapped, and no other word is misspelt like it."""
    assert len(MEANT) == sum(len(misspellings(word)) for word in WORDS)
    for wrong, word in MEANT.items():
        assert wrong[0] == word[0]
        assert sorted(wrong) == sorted(word)
        assert sum(a != b for a, b in zip(wrong, word, strict=True)) == 2
    assert all(misspellings(word) and word.isalpha() for word in WORDS)
    assert misspellings("does") == ("deos",)  # and not "dose"
    passages = " ".join(r.passage for r in load_dialogues(split="all").records).casefold()
    assert not {wrong.casefold() for wrong in MEANT} & {*re.findall(r"\w+", passages), *WORDS}


MEANT = {wrong: word for word in WORDS for wrong in misspellings(word)}


def corrected(text: str) -> str:
    return re.sub(r"[A-Za-z]+", lambda match: MEANT.get(match.group(), match.group()), text)


def test_typos_can_be_undone_and_touch_listed_words_only() -> None:
    rng = np.random.default_rng(0)
    changed = 0
    for split in SPLITS:
        for question in questions(split):
            wrong = misspelt(question, 1.0, rng)
            assert corrected(wrong) == question
            parts = (re.split(r"[\s/]+", text) for text in (question, wrong))
            for before, after in zip(*parts, strict=True):
                assert before == after or before.strip(".,?!()") in WORDS
            changed += wrong != question
    assert changed > 1000


def test_names_choices_and_parts_of_words_are_never_misspelt() -> None:
    rng = np.random.default_rng(0)
    kept = (
        "the Congo the-the it's what's 3the the3 .the you_\n1. Give them the other\n12. what\nThe"
    )
    assert misspelt(kept, 1.0, rng) == kept
    assert misspelt("the congo", 1.0, rng) == "teh congo"
    assert misspelt("1.5 the\n(the) 'the'", 1.0, rng) == "1.5 teh\n(teh) 'the'"


def test_the_share_of_typos_is_their_probability_and_grows_on_the_same_words() -> None:
    """Of 10,000 a share is off by 5 standard deviations with a probability of less than 6e-7."""
    text = " ".join(["the which"] * 5000)
    found = {rate: misspelt(text, rate, np.random.default_rng(0)).split() for rate in (0.2, 0.6, 1)}
    wrong = {
        rate: np.array([a != b for a, b in zip(words, text.split(), strict=True)])
        for rate, words in found.items()
    }
    for rate in (0.2, 0.6):
        assert abs(wrong[rate].mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / 10_000)
    assert wrong[1].all()
    assert (np.array(found[0.2]) == np.array(found[0.6]))[wrong[0.2]].all()
    assert set(found[1]) == {"teh", *misspellings("which")}
    assert misspelt(text, 0.0, np.random.default_rng(0)) == text


# --- other words ---------------------------------------------------------------------------------


def unopened(text: str) -> str:
    """Take the opening away."""
    for opening in OPENINGS:
        text = text.removeprefix(f"{opening} ")
    return text


@pytest.mark.parametrize("split", SPLITS)
def test_a_paraphrase_keeps_every_word_but_those_of_its_rule(split: str) -> None:
    of_rules = set(re.findall(r"\w+", " ".join(o for _, others in REWORDINGS for o in others)))
    of_rules |= set(re.findall(r"\w+", " ".join(pattern.pattern for pattern, _ in REWORDINGS)))
    of_rules = {word.casefold() for word in of_rules} - {"an", "a", "of", "the"}
    for question in sorted(questions(split))[::3]:
        found = paraphrases(question)
        assert len(found) == len(set(found)) >= len(OPENINGS)
        assert question not in found
        reworded = {text for text in found if unopened(text) == text}
        for wording in reworded or {question}:
            assert {f"{opening} {wording}" for opening in OPENINGS} <= set(found)
        for other in map(unopened, found):
            kept = [
                sorted(w for w in re.findall(r"\w+|\?", t.casefold()) if w not in of_rules)
                for t in (question, other)
            ]
            assert kept[0] == kept[1], (question, other)


def test_no_wording_of_one_split_becomes_that_of_another() -> None:
    """Questions of validation and test are worded as no training question is, nor any rewording."""
    asked = {split: questions(split) for split in SPLITS}
    for split in SPLITS:
        others = set().union(*(asked[other] for other in SPLITS if other != split))
        assert not others & {p for question in asked[split] for p in paraphrases(question)}


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("What is its capital?", "What's its capital?"),
        ("Which city is its capital?", "What city is its capital?"),
        ("In which region is it?", "In what region is it?"),
        ("What about its kind?", "How about its kind?"),
        ("How about Peru?", "What about Peru?"),
        ("Can you tell me its region?", "Would you be able to tell me its region?"),
        ("Do you know its region?", "Do you happen to know its region?"),
        ("And for Peru?", "And, please, for Peru?"),
        ("Please name its capital.", "Please tell me its capital."),
        ("Name a part of it.", "Please name a part of it."),
        (INSTRUCTION, "Sum this up in one line."),
        ("Of what is Samoa a kind?", "What is Samoa a kind of?"),
        (
            "As what kind of thing does a sermon count?",
            "What kind of thing does a sermon count as?",
        ),
        ("By what other name does it go?", "What other name does it go by?"),
        ("To what does a jag belong as a part?", "What does a jag belong to as a part?"),
        ("In what do its web sites end?", "What do its web sites end in?"),
        ("To call there, what must one dial?", "What must one dial to call there?"),
        ("To which group does it belong?", "To what group does it belong?"),
        ("How do I sort a hash?", "How can I sort a hash?"),
        ("Questions on Perl.\nHow can I sort?", "Questions on Perl.\nHow do I sort?"),
        ("Why can't I sort?", "For what reason can't I sort?"),
        (OPENING, "Which film would you recommend to me?"),
        ("What next?", "And what next?"),
        ("You lose 2. What do you do?", "You lose 2. What are you going to do?"),
        ("Zeno 4, 1. Your move?", "Zeno 4, 1. And your move?"),
        ("Leo 4, 1. How do you go on?", "Leo 4, 1. How will you go on?"),
    ],
)
def test_each_rule_says_the_same_in_other_words(question: str, other: str) -> None:
    assert other in paraphrases(question)
    assert f"{OPENINGS[0]} {other}" in paraphrases(question)


def test_every_rule_is_used_and_every_task_is_reworded() -> None:
    said = [OPENING, "What next?", INSTRUCTION]
    asked = [*said, *(q for split in SPLITS for q in sorted(questions(split)))]
    for pattern, _ in REWORDINGS:
        assert any(pattern.search(text) for text in asked), pattern
    for question in (*said, *(s.asks for split in SPLITS for s in STYLES[split][:1])):
        assert any(unopened(p) != question for p in paraphrases(question)), question
    assert not any(p.startswith("What of") for p in paraphrases("Which of them?"))
    assert unopened(paraphrases("Why not sort?")[0]) == "Why not sort?"


@pytest.mark.parametrize("split", SPLITS)
def test_most_questions_of_writing_tasks_are_reworded(split: str) -> None:
    """And the others only stand after another sentence."""
    faqs = {faq.question for faq in load_faqs(split=split).records}
    for asked in (questions(split) - faqs, faqs):
        assert np.mean([unopened(paraphrases(q)[0]) != q for q in asked]) > 0.5


# --- distractors ---------------------------------------------------------------------------------


def test_sentences_that_lean_on_others_are_left_out() -> None:
    passage = (
        "St. Lucia borders none. It is small. Mr. A. Roy rules here. Its web ends in .lc. Rain!"
    )
    assert sentences(passage) == ("St. Lucia borders none.", "Rain!")
    assert sentences("") == ("",)


def test_topics_are_beginnings_of_content_words() -> None:
    assert topics(["The borders of Peru.", "A border-line, in 1821"]) == {
        "bord",
        "peru",
        "line",
        "1821",
    }


@pytest.mark.parametrize("split", SPLITS)
def test_distractors_are_of_other_passages_and_hold_no_answer(split: str) -> None:
    """Internet domains aside, for as a word ".to" is no more than the "to" of any sentence."""
    records = load_dialogues(split=split).records
    told = {s for record in records for s in sentences(record.passage)}
    for record in records[:: len(records) // 150]:
        found = draw_distractors(records, record, 3, np.random.default_rng(1))
        assert len(set(found)) == 3
        assert found == draw_distractors(records, record, 3, np.random.default_rng(1))
        assert set(found) <= told
        for sentence in found:
            assert not topics([sentence]) & topics([record.passage])
            for turn in record.turns:
                assert not topics([sentence]) & topics([turn.question])
                answers = tuple(a for a in turn.answers if not a.startswith("."))
                assert not answers or not contains_answer(sentence, answers)


def test_where_nothing_is_unrelated_fewer_are_found() -> None:
    ask = (Turn("Who flies?", ("unknown",)),)
    cats = Dialogue("a", "Cats purr. Birds fly away.", ask, "a")
    dogs = Dialogue("b", "Dogs bark. Birds flying high.", ask, "b")
    rng = np.random.default_rng(0)
    assert draw_distractors([cats], cats, 3, rng) == ()
    assert draw_distractors([cats, dogs], cats, 3, rng) == ("Dogs bark.",)


# --- a message -----------------------------------------------------------------------------------


def test_only_the_question_of_a_message_is_perturbed() -> None:
    full = Augmentation(typos=1.0, paraphrase=1.0)
    rng = np.random.default_rng(0)
    head, _, question = perturbed("Give the that.\n\nthe this", "the that.", full, rng).rpartition(
        "\n"
    )
    assert head == "Give the that.\n"
    assert "teh" in question
    assert unopened(corrected(question)) == "the this" != corrected(question)
    for reply in ("The answer is the one that you know.", ""):
        assert perturbed(reply, reply, full, rng) == reply
    assert perturbed("the", "no such part", Augmentation(typos=1.0), rng) == "teh"


def test_the_same_is_asked_with_and_without_distractors() -> None:
    def asked(**settings: Any) -> list[str]:
        env = AugmentedText(gym.make("DialogueQA-v0"), **settings)
        firsts = [env.reset(seed=seed)[1]["messages"][0]["content"] for seed in range(20)]
        return [text.rpartition("\n")[2] for text in firsts]

    assert asked(**ALL) == asked(**{**ALL, "distractors": 0})


def test_the_most_harmful_is_shown_the_first_of_equals() -> None:
    assert most_harmful(["a", "b", "c"], [1.0, 3.0, 3.0]) == "b"
    assert most_harmful(["a", "b"], np.array([-math.inf, -5.0])) == "b"
    for harm in ([1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match=r"for 2 conversations. It has to return a number"):
            most_harmful(["a", "b"], harm)


# --- an environment ------------------------------------------------------------------------------


@functools.cache
def played(id: str, kind: str, row: int, **arguments: Any) -> list[tuple[Any, ...]]:
    """Play a wrapped environment beside an unwrapped one; return each action and its step.

    Everything but the text is compared on the way, and how the text grows.
    """
    env = AugmentedText(gym.make(id, **arguments), **settings_of(id, kind))
    clean = gym.make(id, **arguments)
    rng = np.random.default_rng(row)
    seen: list[tuple[Any, ...]] = []

    def shown(observation: Any, info: Any, expected: Any, clean_info: Any) -> str:
        text = text_of(observation)
        told = {**info, "messages": clean_info["messages"]}
        assert plain(told) == plain({**clean_info, "clean_text": text_of(expected)})
        if isinstance(observation, dict):
            assert plain({**observation, "prompt": ""}) == plain({**expected, "prompt": ""})
        for message, before in zip(info["messages"], clean_info["messages"], strict=True):
            assert message.keys() == before.keys()
            assert message["role"] == before["role"]
            assert message["role"] == "user" or message == before
            assert message["role"] != "user" or f"User: {message['content']}" in text
        return text

    observation, info = env.reset(seed=SEEDS[row])
    text = shown(observation, info, *clean.reset(seed=SEEDS[row]))
    for _ in range(STEPS):
        action = an_action(clean, rng)
        said = action if isinstance(action, str) else observation["candidates"][action]
        observation, reward, terminated, truncated, info = env.step(action)
        expected = clean.step(action)
        assert plain((reward, terminated, truncated)) == plain(expected[1:4])
        grown = shown(observation, info, expected[0], expected[4])
        assert grown.startswith(text + said)
        assert terminated or grown.endswith(say(info["messages"][-1]["content"]))
        assert info["feedback"] in grown[len(text + said) :]
        seen.append((action, observation, reward, terminated, info))
        text = grown
        if terminated:
            observation, info = env.reset()
            text = shown(observation, info, *clean.reset())
    return seen


@each_id
@each_kind
def test_only_texts_change_and_they_only_grow(id: str, kind: str) -> None:
    steps = [step for row in range(N) for step in played(id, kind, row)]
    changed = sum(text_of(o) != info["clean_text"] for _, o, _, _, info in steps)
    assert changed == 0 if kind == "nothing" else changed > len(steps) / 3


@each_id
def test_no_accepted_answer_loses_its_support(id: str) -> None:
    """What the clean conversation holds word for word, the perturbed one holds too."""
    settings = {**settings_of(id, "all"), "typos": 1.0, "paraphrase": 1.0}
    for split in SPLITS:
        env = AugmentedText(gym.make(id, split=split), **settings)
        examples = env.unwrapped.task.examples  # type: ignore[attr-defined]
        supported = 0
        for index in range(0, len(examples), -(-len(examples) // 15)):
            observation, info = env.reset(seed=index, options={"example": index})
            assert passage_of(examples[index]) in text_of(observation)
            over = False
            while not over:
                known = env.unwrapped.references  # type: ignore[attr-defined]
                for answer in known:
                    assert answer in text_of(observation) or answer not in info["clean_text"]
                    supported += answer in info["clean_text"]
                observation, _, over, _, info = env.step(f" {known[0]}" if known else 0)
        assert supported > 10 or id not in ("DialogueQA-v0", "TextWorld-v0")


def test_distractors_follow_the_passage_as_many_as_were_wanted() -> None:
    env = AugmentedText(gym.make("DialogueQA-v0"), distractors=2)
    told = {s for r in env.unwrapped.task.examples for s in sentences(r.passage)}  # type: ignore[attr-defined]
    found = set()
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        before, _, after = info["clean_text"].rpartition("\nAssistant:")[0].rpartition("\n")
        added = observation.removeprefix(before + " ").partition("\n")[0]
        assert observation == f"{before} {added}\n{after}\nAssistant:"
        pairs = [added[: i + 1] for i, letter in enumerate(added) if letter == "."]
        assert any(first in told and added.removeprefix(first + " ") in told for first in pairs)
        found.add(added)
    assert len(found) == 20


def test_accepted_answers_are_not_looked_at(tmp_path: Path) -> None:
    """Other answers to the same questions: every text is the same."""
    records = load_dialogues(split="test").records[:60]
    seen = []
    for name, answers in (("right", None), ("other", ["the other one", "what"])):
        path = tmp_path / f"{name}.jsonl"
        lines = (
            {
                "id": r.id,
                "passage": r.passage,
                "unit": r.unit,
                "split": "train",
                "turns": [
                    {"question": t.question, "answers": answers or list(t.answers)} for t in r.turns
                ],
            }
            for r in records
        )
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        env = AugmentedText(TextEnv(DialogueQA(dataset=path)), **ALL)
        seen.append([env.reset(seed=seed)[0] for seed in range(60)])
    assert seen[0] == seen[1]


def test_a_question_is_perturbed_alike_whatever_was_answered() -> None:
    def asked(answer: str) -> list[str]:
        env = AugmentedText(gym.make("DialogueQA-v0"), **ALL)
        found = []
        for seed in range(10):
            _, info = env.reset(seed=seed)
            over = False
            while not over:
                replied = info.get("feedback", "")
                found.append(info["messages"][-1]["content"].removeprefix(replied))
                _, _, over, _, info = env.step(answer)
        return found

    assert asked("unknown") == asked("Peru")
    assert len(set(asked("unknown"))) > 20


def test_neighbouring_and_large_seeds_are_independent() -> None:
    env = AugmentedText(gym.make("RecommendationClicks-v0"), typos=0.5, paraphrase=0.9)
    seeds = [*range(40), *(2**32 + s for s in range(40))]
    shown = [env.reset(seed=seed)[0]["prompt"] for seed in seeds]
    assert shown == [env.reset(seed=seed)[0]["prompt"] for seed in seeds]
    assert shown[:40] != shown[40:]
    assert len(set(shown)) > 10
    again = [env.reset()[0]["prompt"] for _ in range(40)]
    assert len(set(again)) > 10


def test_an_adversary_is_shown_what_could_be_shown_and_chooses_the_worst() -> None:
    asked: list[list[str]] = []

    def adversary(texts: list[str]) -> list[float]:
        asked.append(texts)
        return [float(len(text)) for text in texts]

    single = AugmentedText(gym.make("DialogueQA-v0"), **ALL)
    worst = AugmentedText(gym.make("DialogueQA-v0"), **ALL, adversary=adversary, candidates=6)
    for seed in range(5):
        one, _ = single.reset(seed=seed)
        observation, _ = worst.reset(seed=seed)
        over = False
        assert asked[-1][0] == one, "the first is what is shown without an adversary"
        while not over:
            assert len(asked[-1]) == 6
            assert len(set(asked[-1])) > 1
            assert observation == max(asked[-1], key=len)
            observation, _, over, _, _ = worst.step("no idea")
    assert all(text.endswith("\nAssistant:") for texts in asked for text in texts)


# --- forms that are equal ------------------------------------------------------------------------


def sync(id: str, mode: AutoresetMode, **settings: Any) -> SyncVectorEnv[Any, Any]:
    def make() -> gym.Env[Any, Any]:
        env = gym.make(id)
        return AugmentedText(env, **settings) if settings else env

    return SyncVectorEnv([make] * N, autoreset_mode=mode)


FORMS: dict[str, Callable[..., Any]] = {
    "native": lambda id, s: AugmentedVectorText(gym.make_vec(id, N), **s),
    "by id": lambda id, s: gym.make_vec(id, N, observation_text=s),
    "sync by id": lambda id, s: gym.make_vec(id, N, vectorization_mode="sync", observation_text=s),
    "sync, same step": lambda id, s: AugmentedVectorText(sync(id, AutoresetMode.SAME_STEP), **s),
    "sync, next step": lambda id, s: AugmentedVectorText(sync(id, AutoresetMode.NEXT_STEP), **s),
    "sync, disabled": lambda id, s: AugmentedVectorText(sync(id, AutoresetMode.DISABLED), **s),
}


@each_id
@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_shown_what_a_single_environment_with_its_seed_is_shown(
    id: str, form: str
) -> None:
    for kind in KINDS if form == "native" else ("all",):
        expected = [played(id, kind, row) for row in range(N)]
        envs = FORMS[form](id, settings_of(id, kind))
        mode = envs.metadata["autoreset_mode"]
        observations, _ = envs.reset(seed=SEEDS)
        at, over = [0] * N, np.zeros(N, np.bool_)
        while min(at) < STEPS:
            if mode is AutoresetMode.DISABLED and over.any():
                before = text_of(observations)
                observations, _ = envs.reset(options={"reset_mask": over.copy()})
                for i in np.flatnonzero(~over):
                    assert text_of(observations)[i] == before[i]
                over[:] = False
            asleep = over if mode is AutoresetMode.NEXT_STEP else np.zeros(N, np.bool_)
            actions = [expected[i][at[i] % STEPS][0] for i in range(N)]
            observations, _, terminated, truncated, infos = envs.step(actions)
            over = terminated | truncated
            for i, info in enumerate(step_infos(infos, N)):
                if asleep[i]:
                    assert text_of(observations)[i].endswith(say(info["messages"][-1]["content"]))
                elif at[i] < STEPS:
                    last = mode is AutoresetMode.SAME_STEP and over[i]
                    one = infos["final_obs"][i] if last else None
                    text = text_of(one) if last else text_of(observations)[i]
                    _, observation, _, ended, told = expected[i][at[i]]
                    assert text == text_of(observation)
                    assert plain((info, bool(terminated[i]))) == plain((told, ended))
                    if last:
                        assert plain(one) == plain(observation)
                at[i] += not asleep[i]


@each_id
def test_observations_and_infos_are_laid_out_as_gymnasium_does(id: str) -> None:
    settings = settings_of(id, "all")
    native = AugmentedVectorText(gym.make_vec(id, N), **settings)
    expected = sync(id, AutoresetMode.SAME_STEP, **settings)
    around = AugmentedVectorText(sync(id, AutoresetMode.SAME_STEP), **settings)
    forms = native, expected, around
    results: list[Any] = [envs.reset(seed=7) for envs in forms]
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        for result in results:
            assert plain(result) == plain(results[1])
        actions: Any = [an_action(env, rng) for env in expected.envs]
        if isinstance(native.single_action_space, gym.spaces.Discrete):
            actions = np.array(actions)
        results = [envs.step(actions) for envs in forms]


def test_a_row_that_is_reset_after_its_last_step_is_asked_on_in_its_next_one() -> None:
    def make() -> gym.Env[Any, Any]:
        return TextEnv(DialogueQA, max_turns=2)

    envs = AugmentedVectorText(SyncVectorEnv([make] * 2), **ALL)
    envs.reset(seed=SEEDS[:2])
    for _ in range(2):
        envs.step(["a", "b"])
    one = AugmentedText(make(), **ALL)
    one.reset(seed=SEEDS[0])
    observations, _ = envs.reset(options={"reset_mask": np.array([True, False])})
    assert observations[0] == one.reset()[0]
    observations, *_ = envs.step(["c", "d"])
    assert observations[0] == one.step("c")[0]


@pytest.mark.parametrize("seed", [3, None, [7] * 3 + [8] * 3])
def test_rows_of_a_group_are_asked_alike_whatever_they_answer(seed: Any) -> None:
    envs = AugmentedVectorText(gym.make_vec("DialogueQA-v0", 6, group_size=3), **ALL)

    def check(infos: Any) -> None:
        feedback = infos.get("feedback", [""] * 6)
        asked = [
            messages[-1]["content"].removeprefix(feedback[i] or "")
            for i, messages in enumerate(infos["messages"])
        ]
        for group in (asked[:3], asked[3:]):
            assert len(set(group)) == 1
        assert asked[0] != asked[3]

    for _ in range(4):
        observations, infos = envs.reset(seed=seed)
        assert len(set(observations[:3])) == len(set(observations[3:])) == 1
        for _ in range(6):
            check(infos)
            _, _, _, _, infos = envs.step([str(i) for i in range(6)])
        mask = np.arange(6) < 3
        observations, infos = envs.reset(options={"reset_mask": mask})
        assert len(set(observations[:3])) == 1
    assert observations[0] != infos["clean_text"][0]


def test_seeds_of_all_forms_are_understood() -> None:
    def shown(envs: Any, *seeds: Any) -> list[Any]:
        wrapped = AugmentedVectorText(envs, **ALL)
        return [wrapped.reset(seed=seed)[0] for seed in seeds]

    def native(**arguments: Any) -> TextVectorEnv:
        return TextVectorEnv(4, DialogueQA, split="test", **arguments)

    one = shown(native(), 4, None)
    assert one == shown(native(), np.array([4, 5, 6, 7]), [None] * 4)
    assert one == shown(SyncVectorEnv([lambda: TextEnv(DialogueQA, split="test")] * 4), 4, None)
    assert one[0] != one[1]
    grouped = shown(native(group_size=2), 4, None)
    assert [g[i] for g in grouped for i in (0, 2)] == [s[i] for s in one for i in (0, 1)]


@each_id
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))],
    ids=["copy", "pickle"],
)
def test_a_copy_in_mid_episode_goes_on_identically(id: str, duplicate: Any) -> None:
    env = AugmentedText(gym.make(id), **settings_of(id, "adversary"))
    env.reset(seed=0)
    for _ in range(STEPS):
        action = an_action(env, np.random.default_rng(0))
        twin = duplicate(env)
        found = env.step(action)
        assert plain(found) == plain(twin.step(action))
        if found[2]:
            assert plain(env.reset()) == plain(twin.reset())


def test_a_copy_shares_the_data() -> None:
    env = AugmentedText(gym.make("DialogueQA-v0"), **ALL)
    assert copy.deepcopy(env)._row.source is env._row.source
    assert len(pickle.dumps(env)) < 50_000


# --- Gymnasium -----------------------------------------------------------------------------------


@each_id
@each_kind
def test_gymnasium_accepts_it(id: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(AugmentedText(gym.make(id).unwrapped, **settings_of(id, kind)))


@each_id
@pytest.mark.parametrize(
    "make",
    [
        lambda id, s: AugmentedText(gym.make(id, max_turns=3), **s),
        lambda id, s: gym.make(id, max_turns=3, observation_text=s, feedback={"flip": 0.5}),
    ],
    ids=["wrapper", "argument"],
)
def test_the_spec_makes_the_same_environment_again(id: str, make: Any) -> None:
    env = make(id, settings_of(id, "all"))
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        again = gym.make(spec)
        assert str(again).count("AugmentedText") == str(env).count("AugmentedText") == 1
        assert again.get_wrapper_attr("augmentation") == Augmentation(**settings_of(id, "all"))
        assert plain(env.reset(seed=3)) == plain(again.reset(seed=3))
        rng = np.random.default_rng(0)
        for _ in range(STEPS):
            action = an_action(env, rng)
            found = env.step(action)
            assert plain(found) == plain(again.step(action))
            if found[2]:
                assert plain(env.reset()) == plain(again.reset())


def test_the_spec_holds_the_adversary_itself() -> None:
    env = AugmentedText(gym.make(IDS[0]), adversary=longest)
    assert env.spec is not None
    again: Any = gym.make(env.spec)
    assert again.get_wrapper_attr("augmentation").adversary is longest


def test_the_spec_of_the_native_form_makes_it_again() -> None:
    envs = gym.make_vec("DialogueQA-v0", 4, observation_text=ALL, group_size=2)
    assert envs.spec is not None
    again = gym.make_vec(envs.spec)
    assert type(again) is AugmentedVectorText
    assert plain(envs.reset(seed=2)) == plain(again.reset(seed=2))
    assert plain(envs.step([""] * 4)) == plain(again.step([""] * 4))


def test_without_the_argument_nothing_is_wrapped() -> None:
    assert isinstance(gym.make_vec(IDS[0], 2), TextVectorEnv)
    assert "AugmentedText" not in str(gym.make(IDS[0]))


def test_a_choosing_task_that_is_answered_in_text_keeps_its_choices() -> None:
    for id in ("RecommendationClicks-v0", "TextBattle-v0"):
        settings = {"typos": 1.0, "paraphrase": 1.0}
        envs = [
            gym.make(id, answer_in_text=True, **kw) for kw in ({"observation_text": settings}, {})
        ]
        for seed in range(5):
            shown, clean = (text_of(env.reset(seed=seed)[0]) for env in envs)
            over = False
            while not over:
                assert shown != clean
                assert re.findall(r"^\d\. .*$", shown, re.MULTILINE) == re.findall(
                    r"^\d\. .*$", clean, re.MULTILINE
                )
                (shown, _, over, _, _), (clean, *_) = (env.step(" 2") for env in envs)


def test_the_examples_in_the_docstrings_run() -> None:
    found = doctest.testmod(augmentation)
    assert found.attempted
    assert not found.failed


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"typos": 1.1}, ValueError, "typos is 1.1. Give a probability from 0 to 1"),
        ({"typos": math.nan}, ValueError, "typos is nan"),
        ({"typos": "0.2"}, TypeError, "typos is '0.2'. Give a number"),
        ({"paraphrase": True}, TypeError, "paraphrase is True. Give a number"),
        ({"paraphrase": -0.5}, ValueError, "paraphrase is -0.5"),
        ({"distractors": -1}, ValueError, "distractors is -1. Give a whole number from 0"),
        ({"distractors": 0.5}, TypeError, "distractors is 0.5. Give a whole number from 0"),
        ({"candidates": 0}, ValueError, "candidates is 0. Give a whole number from 1"),
        ({"adversary": "worst"}, TypeError, "adversary is 'worst'. Give a function"),
        ({"typo": 0.2}, TypeError, "no perturbation 'typo'.*Did you mean 'typos'.*There are typos"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        AugmentedText(TextEnv(DialogueQA), **settings)
    with pytest.raises(error, match=message):
        AugmentedVectorText(TextVectorEnv(2, DialogueQA), **settings)
    for make in (gym.make, gym.make_vec):
        with pytest.raises(error, match=message):
            make(IDS[0], observation_text=settings)  # type: ignore[operator]


def test_what_is_no_dict_a_misspelt_argument_and_tasks_without_passages_are_refused() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(TypeError, match=r"observation_text is 'typos'. Give a dict"):
            make(IDS[0], observation_text="typos")  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"Did you mean 'observation_text'"):
            make(IDS[0], observation_texts={"typos": 0.2})  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"distractors is 2.*has no passages.*Leave"):
            make("Summarization-v0", observation_text={"distractors": 2})  # type: ignore[operator]


def test_environments_that_show_no_conversation_are_refused() -> None:
    for env in (gym.make("CartPole-v1"), NumericView(gym.make("TextBattle-v0"))):
        with pytest.raises(ValueError, match="shows no conversation"):
            AugmentedText(env, typos=0.2)
    with pytest.raises(ValueError, match="shows no conversation"):
        AugmentedVectorText(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"), typos=0.2)


def test_a_conversation_that_is_laid_out_otherwise_or_rewritten_is_refused() -> None:
    class Other(gym.ObservationWrapper[Any, Any, Any]):
        turn = 0

        def observation(self, observation: Any) -> Any:
            self.turn += 1
            return observation.upper() if self.turn == self.wrong else observation

    for wrong in (1, 2):
        inner = Other(TextEnv(DialogueQA))
        inner.wrong = wrong  # type: ignore[attr-defined]
        env = AugmentedText(inner, typos=0.2)
        refused = pytest.raises(ValueError, match="text cannot be perturbed")
        if wrong == 1:
            with refused:
                env.reset(seed=1)
        else:
            env.reset(seed=1)
            with refused:
                env.step(" a")


# --- agents --------------------------------------------------------------------------------------


def test_evaluation_is_of_perturbed_questions_and_every_policy_meets_the_same() -> None:
    class Player:
        sequences: tuple[Any, ...] = ()
        cut = answers = 0

        def __init__(self) -> None:
            self.seen: list[str] = []

        def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
            self.seen += observations.values()
            return dict.fromkeys(observations, "unknown")

    players: list[Player] = []

    def begin() -> Any:
        players.append(Player())
        return players[-1]

    kwargs: list[Any] = [{}, {"observation_text": ALL}, {"observation_text": ALL}]
    for each in kwargs:
        evaluate(begin, "DialogueQA-v0", split="validation", episodes=8, env_kwargs=each)
    clean, shown, again = (player.seen for player in players)
    assert shown == again
    assert len(shown) == len(clean)
    assert sum(a != b for a, b in zip(shown, clean, strict=True)) > len(clean) / 2


@pytest.mark.parametrize("chat", [False, True])
def test_a_policy_reads_what_is_shown_and_keeps_what_it_has_read(chat: bool) -> None:
    policy = CausalLMPolicy.from_pretrained("tiny", device="cpu")
    if chat:
        policy.tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        )
        policy = CausalLMPolicy(policy.model, policy.tokenizer)
    settings = {**ALL, "typos": 1.0}
    envs: Any = gym.make_vec("DialogueQA-v0", 3, max_turns=2, observation_text=settings)
    from agents.rollout import play

    player = policy.begin()
    steps = play(player, envs, seeds=[1, 1, 2])
    assert policy.changed_conversations == 0
    for sequence in player.sequences:
        last = [step for step in steps if step.row == sequence.row][-1]
        read = policy.tokenizer.decode(sequence.ids, skip_special_tokens=True)
        asked = [m["content"] for m in last.info["messages"] if m["role"] == "user"][
            : last.turn + 1
        ]
        assert all(text in read for text in asked)


def test_the_command_line_trains_and_evaluates_on_perturbed_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--env RecommendationClicks-v0 --agent random --steps 20 --quiet --track jsonl"
    common += " --report validation --eval-every 0 --samples 4"
    kwargs = {"observation_text": {"typos": 1.0, "paraphrase": 1.0}}
    out = tmp_path / "run"
    train.main([*common.split(), "--env-kwargs", json.dumps(kwargs), "--out", str(out)])
    lines = (out / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines
    assert OPENING not in {json.loads(line)["question"] for line in lines}
    with pytest.raises(SystemExit):
        train.main([*common.split(), "--env-kwargs", '{"observation_text": {"typo": 1}}'])
    assert "Did you mean 'typos'" in capsys.readouterr().err


def test_an_adversary_is_no_argument_of_an_id() -> None:
    with pytest.raises(TypeError, match=r"Wrap the environment: AugmentedText\(env, adversary"):
        gym.make("DialogueQA-v0", observation_text={"adversary": len})


def test_what_is_asked_above_a_list_of_choices_is_reworded() -> None:
    asked = "Which film should I watch?\n1. Heat (1995).\nAnswer with a number from 1 to 1."
    assert any(
        p.startswith("Which film would you recommend to me?\n1. ") for p in paraphrases(asked)
    )
