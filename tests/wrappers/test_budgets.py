"""Budgets of tokens and time: what is cut, what is late, what ends, and that forms are equal."""

from __future__ import annotations

import copy
import doctest
import json
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import llm_envs
from agents import train
from agents.policies.causal_lm import TokenSequence
from agents.policies.models import TINY
from agents.rollout import episode_seeds
from llm_envs.core.env import TextEnv
from llm_envs.core.task import Outcome, WritingTask
from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.records import Document
from llm_envs.tasks.dialogue_qa import DialogueQA
from llm_envs.wrappers import (
    CorruptedFeedback,
    CorruptedVectorFeedback,
    TimeBudget,
    TimeVectorBudget,
    TokenBudget,
    TokenVectorBudget,
    budgets,
)
from llm_envs.wrappers.budgets import cut, token_ends
from same import assert_same
from three_tokens import TASKS, make_agent, task_fixture

three_token_tasks = task_fixture(TASKS, autouse=False)

WRITING = tuple(
    id for id in llm_envs.registered_ids() if isinstance(gym.make(id).action_space, gym.spaces.Text)
)
SEEDS = [5, 2**40, 9]
N = len(SEEDS)
STEPS = 24

each_writing = pytest.mark.parametrize("id", WRITING)


class Words(WritingTask[Document]):
    """An answer scores the share of its first four words that are "yes"; nothing scores 0."""

    def __init__(self, turns: int = 4) -> None:
        super().__init__(turns)
        self.examples = [Document(f"t{i}", f"text {i}", ("x",), f"t{i}") for i in range(1000)]

    def turns(self, example: Document) -> int:
        return 4

    def ask(self, example: Document, turn: int) -> str:
        return f"{example.text}, turn {turn}"

    def answers(self, example: Document, turn: int) -> tuple[str, ...]:
        return ("yes",)

    def score_answers(self, answers: Any, references: Any) -> list[Outcome]:
        return [Outcome(a.split()[:4].count("yes") / 4) for a in answers]


class Hand:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def an_answer(rng: np.random.Generator) -> str:
    return str(rng.choice(["", " unknown", " It is the one.", " 東京 \ud800 etc", " yes" * 9]))


# --- the pure functions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("", []),
        (" \n\t", []),
        ("It is Lima.", [2, 5, 11]),
        (" a\u00a0b\n", [2, 4]),
        ("東京(Tokyo)です", [1, 2, 9, 10, 11]),
        ("한국", [1, 2]),
        ("\ud800 x", [1, 3]),
    ],
)
def test_words_are_between_white_space_and_cjk_letters_count_by_themselves(
    text: str, ends: list[int]
) -> None:
    assert token_ends([text, "x"]) == [ends, [1]]


@given(st.text(), st.integers(1, 8))
def test_an_answer_that_is_cut_has_the_words_that_were_left(text: str, left: int) -> None:
    [ends] = token_ends([text])
    heard, rest = cut(text, ends, left)
    assert text.startswith(heard)
    [heard_ends] = token_ends([heard])
    assert heard_ends == ends[:left]
    assert rest == left - len(heard_ends)
    assert (heard == text) == (len(ends) <= left)


@pytest.mark.parametrize("left", [1, 2, 5, 9, 100])
def test_with_a_tokenizer_its_first_tokens_are_left(left: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = " It is Lima, I think; isn't it? 2,024"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 9
    [ends] = token_ends([text], tokenizer)
    heard, rest = cut(text, ends, left)
    assert heard == tokenizer.decode(ids[:left], clean_up_tokenization_spaces=False)
    assert rest == max(0, left - len(ids))
    assert token_ends(["\ud800", ""], tokenizer) == token_ends(["?", ""], tokenizer)


# --- tokens --------------------------------------------------------------------------------------


def test_an_episode_is_truncated_by_the_answer_that_uses_its_tokens_up() -> None:
    env = TokenBudget(TextEnv(Words), tokens=6)
    _, info = env.reset(seed=0)
    assert info["tokens_left"] == 6
    found = [env.step(answer) for answer in ("yes no", "", "yes yes no yes yes")]
    assert [step[2:4] for step in found] == [(False, False), (False, False), (False, True)]
    assert [step[4]["tokens_left"] for step in found] == [4, 4, 0]
    assert [step[4]["score"] for step in found] == [0.25, 0.0, 0.75], "of what is left of it"
    assert found[-1][4]["messages"][-2]["content"] == "yes yes no yes"
    assert "yes yes no yes\nUser: text" in found[-1][0]
    with pytest.raises(gym.error.ResetNeeded, match=r"used up: call reset\(\)"):
        env.step("more")
    assert env.reset()[1]["tokens_left"] == 6
    assert env.step("yes no no yes yes yes")[3] is True, "at once, and to the word"


def test_an_episode_that_ends_by_itself_is_terminated() -> None:
    for tokens, answer in ((3, "yes no yes"), (3, "yes " * 9), (4, "yes no no")):
        env = TokenBudget(TextEnv(Words, turns=1), tokens=tokens)
        env.reset(seed=0)
        *_, terminated, truncated, info = env.step(answer)
        assert (terminated, truncated) == (True, False)
        assert info["tokens_left"] == tokens - 3
    with pytest.raises(gym.error.ResetNeeded):
        env.step("more")


def test_tokens_are_counted_by_the_tokenizer_that_is_given() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    count = len(tokenizer(" yes, 2024.", add_special_tokens=False)["input_ids"])
    assert count > 4
    for form in (TINY, str(TINY), tokenizer):
        env = TokenBudget(TextEnv(Words), tokens=count + 1, tokenizer=form)
        env.reset(seed=0)
        *_, truncated, info = env.step(" yes, 2024.")
        assert (truncated, info["tokens_left"]) == (False, 1)
        *_, truncated, info = env.step(" yes, 2024.")
        assert (truncated, info["tokens_left"]) == (True, 0)
        first = tokenizer.decode(tokenizer(" yes, 2024.")["input_ids"][:1])
        assert info["messages"][-2]["content"] == first.strip()


# --- time ----------------------------------------------------------------------------------------


def test_an_answer_that_comes_late_is_not_heard_and_truncates() -> None:
    clock = Hand()
    env = TimeBudget(TextEnv(Words), seconds=5.0, clock=clock)
    assert env.reset(seed=0)[1]["late"] is False
    clock.now += 5.0
    _, reward, terminated, truncated, info = env.step("yes yes yes yes")
    assert (reward, terminated, truncated, info["late"]) == (1.0, False, False, False)
    clock.now += 0.001
    observation, reward, terminated, truncated, info = env.step("yes yes yes yes")
    assert (reward, terminated, truncated, info["late"]) == (-1.0, False, True, True)
    assert info["messages"][-2]["content"] == ""
    assert "Assistant:\nUser: text" in observation
    with pytest.raises(gym.error.ResetNeeded):
        env.step("yes")
    clock.now += 99
    env.reset()
    clock.now += 4
    assert env.step("yes yes yes yes")[1] == 1.0
    assert "seconds" not in info


def test_a_late_answer_that_ends_the_episode_terminates_it_and_earns_nothing() -> None:
    clock = Hand()
    env = TimeBudget(TextEnv(Words, turns=1), seconds=1, clock=clock)
    env.reset(seed=0)
    clock.now += 2
    assert env.step("yes")[1:4] == (-1.0, True, False)


def test_the_clock_is_a_real_one_by_default() -> None:
    env = TimeBudget(TextEnv(Words), seconds=1e-9)
    env.reset(seed=0)
    assert env.step("yes")[3] is True
    env = TimeBudget(TextEnv(Words), seconds=3600)
    env.reset(seed=0)
    assert env.step("yes")[3] is False


# --- forms that are equal ------------------------------------------------------------------------


class Form:
    """A budget in single and vector form, by one clock."""

    def __init__(self, kind: str) -> None:
        self.kind, self.clock = kind, Hand()

    def around(self, env: Any) -> Any:
        vector = isinstance(env, gym.vector.VectorEnv)
        if self.kind != "time":
            of_tokens: Any = TokenVectorBudget if vector else TokenBudget
            env = of_tokens(env, tokens=7)
        if self.kind != "tokens":
            of_time: Any = TimeVectorBudget if vector else TimeBudget
            env = of_time(env, seconds=2.5, clock=self.clock)
        return env

    def sync(self, id: str, mode: AutoresetMode, **arguments: Any) -> SyncVectorEnv[Any, Any]:
        return SyncVectorEnv(
            [lambda: self.around(gym.make(id, **arguments))] * N, autoreset_mode=mode
        )


each_kind = pytest.mark.parametrize("kind", ["tokens", "time", "both"])


@each_writing
@each_kind
def test_the_native_form_equals_sync_vector_env_to_the_last_dtype(id: str, kind: str) -> None:
    form, seed = Form(kind), 0 if kind == "both" else SEEDS
    native = form.around(gym.make_vec(id, N))
    expected = form.sync(id, AutoresetMode.SAME_STEP)
    results = [envs.reset(seed=seed) for envs in (native, expected)]
    rng = np.random.default_rng(0)
    ends = np.zeros(2, int)
    for _ in range(STEPS):
        assert_same(*results)
        form.clock.now += rng.choice([0.0, 1.0, 3.0])
        answers = [an_answer(rng) for _ in range(N)]
        results = [envs.step(answers) for envs in (native, expected)]
        ends += [results[0][2].sum(), results[0][3].sum()]
    assert ends.sum() > 3
    assert bool(ends[1]) is (id != "Summarization-v0"), "which has one step"


def singly(form: Form, row: int) -> list[tuple[Any, ...]]:
    """Play one environment, a second or more a step; return each answer and its step."""
    env = form.around(gym.make("DialogueQA-v0"))
    rng = np.random.default_rng(row)
    seen: list[tuple[Any, ...]] = []
    env.reset(seed=SEEDS[row])
    for _ in range(STEPS):
        form.clock.now += 1.0
        answer = an_answer(rng)
        seen.append((answer, *env.step(answer)))
        if seen[-1][3] or seen[-1][4]:
            env.reset()
    assert sum(step[4] for step in seen) > 3, "choose another seed"
    return seen


@each_kind
@pytest.mark.parametrize("mode", [*AutoresetMode, None], ids=str)
def test_a_row_plays_as_a_single_environment_in_every_autoreset_mode(
    kind: str, mode: AutoresetMode | None
) -> None:
    """Without a mode it is the native form. What a reset waits for is not charged."""
    form = Form(kind)
    expected = [singly(form, row) for row in range(N)]
    if mode is None:
        envs = form.around(gym.make_vec("DialogueQA-v0", N))
    else:
        envs = form.sync("DialogueQA-v0", mode)
    mode = envs.metadata["autoreset_mode"]
    envs.reset(seed=SEEDS)
    at, over = [0] * N, np.zeros(N, np.bool_)
    while min(at) < STEPS:
        if mode is AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over.copy()})
            over[:] = False
        asleep = over if mode is AutoresetMode.NEXT_STEP else np.zeros(N, np.bool_)
        form.clock.now += 1.0
        answers = [expected[i][at[i] % STEPS][0] for i in range(N)]
        observations, rewards, terminated, truncated, infos = envs.step(answers)
        over = terminated | truncated
        for i, info in enumerate(step_infos(infos, N)):
            if not asleep[i] and at[i] < STEPS:
                same = mode is AutoresetMode.SAME_STEP and over[i]
                seen = infos["final_obs"][i] if same else observations[i]
                found = (seen, float(rewards[i]), bool(terminated[i]), bool(truncated[i]), info)
                assert_same(found, expected[i][at[i]][1:])
            at[i] += not asleep[i]


def test_rows_of_a_group_have_budgets_of_their_own_and_the_same_episodes() -> None:
    envs = TokenVectorBudget(TextVectorEnv(6, Words, group_size=3), tokens=3)
    envs.reset(seed=0)
    rng = np.random.default_rng(1)
    begun: list[list[str]] = [[] for _ in range(6)]
    for _ in range(60):
        answers = rng.choice(["yes", "yes no", "yes no no no", ""], 6).tolist()
        *_, terminated, truncated, infos = envs.step(answers)
        assert not (terminated & truncated).any()
        for i in np.flatnonzero(terminated | truncated):
            begun[i].append(infos["example_id"][i])
            assert infos["tokens_left"][i] == 3
    for row in (0, 3):
        count = min(map(len, begun[row : row + 3]))
        assert count > 10
        assert begun[row][:count] == begun[row + 1][:count] == begun[row + 2][:count]
    assert begun[0] != begun[3]


def test_a_mask_resets_the_budgets_of_its_rows_only() -> None:
    envs = TokenVectorBudget(TextVectorEnv(2, Words), tokens=5)
    envs.reset(seed=0)
    envs.step(["yes yes", "yes"])
    _, infos = envs.reset(options={"reset_mask": np.array([True, False])})
    assert infos["tokens_left"].tolist() == [5, 0]
    assert infos["_tokens_left"].tolist() == [True, False]
    *_, infos = envs.step(["yes", "yes"])
    assert infos["tokens_left"].tolist() == [4, 3]


def test_wrong_actions_are_charged_to_nobody() -> None:
    envs = TokenVectorBudget(TextVectorEnv(2, Words), tokens=5)
    env = TokenBudget(TextEnv(Words), tokens=5)
    envs.reset(seed=0)
    env.reset(seed=0)
    for wrong in (["yes", 1], ["yes"], "yes"):
        with pytest.raises(ValueError, match="came"):
            envs.step(wrong)
    with pytest.raises(ValueError, match="came"):
        env.step(1)  # type: ignore[arg-type]
    assert envs.step(["yes", ""])[4]["tokens_left"].tolist() == [4, 5]
    assert env.step("yes")[4]["tokens_left"] == 4


def test_what_was_due_before_the_first_reset_ends_no_episode() -> None:
    clock = Hand()
    envs = TimeVectorBudget(TextVectorEnv(2, Words), seconds=5, clock=clock)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(["", ""])
    envs.reset(seed=0)
    assert not envs.step(["", ""])[3].any()


def test_late_rewards_are_paid_when_the_budget_is_used_up() -> None:
    env = CorruptedFeedback(TokenBudget(TextEnv(Words), tokens=2), delay=3)
    envs = CorruptedVectorFeedback(TokenVectorBudget(TextVectorEnv(2, Words), tokens=2), delay=3)
    env.reset(seed=0)
    envs.reset(seed=0)
    for answer, reward in (("yes", 0.0), ("no", -1.5)):
        assert env.step(answer)[1] == reward
        assert envs.step([answer] * 2)[1].tolist() == [reward] * 2


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"]
)
@each_kind
def test_a_copy_in_mid_episode_goes_on_identically(kind: str, duplicate: Any) -> None:
    for env, answers in (
        (gym.make("DialogueQA-v0"), [" yes no", " yes no no", " yes no no"]),
        (gym.make_vec("DialogueQA-v0", 2), [["a b", "a"], ["", "a b c"], ["a b c d e f", "a"]]),
    ):
        made = Form(kind).around(env)
        made.reset(seed=0)
        made.step(answers[0])
        twin = duplicate(made)
        for answer in answers[1:]:
            assert_same(made.step(answer), twin.step(answer))


# --- Gymnasium -----------------------------------------------------------------------------------


@each_writing
def test_gymnasium_accepts_it_without_a_warning(id: str) -> None:
    """A step that is truncated at once is no step for Gymnasium's check."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(TokenBudget(gym.make(id).unwrapped, tokens=1000))
        check_env(TimeBudget(gym.make(id).unwrapped, seconds=1000.0, clock=Hand()))


MAKES: dict[str, Callable[[str], Any]] = {
    "wrappers": lambda id: TimeBudget(
        TokenBudget(gym.make(id), tokens=9, tokenizer=TINY), seconds=1000.0
    ),
    "argument": lambda id: gym.make(
        id, budget={"tokens": 9, "tokenizer": str(TINY), "seconds": 1000.0}
    ),
}


@each_writing
@pytest.mark.parametrize("make", MAKES)
def test_the_spec_makes_the_same_environment_again(id: str, make: str) -> None:
    env = MAKES[make](id)
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        again = gym.make(spec)
        assert str(again).count("TokenBudget") == str(again).count("TimeBudget") == 1
        assert_same(env.reset(seed=3), again.reset(seed=3))
        rng = np.random.default_rng(0)
        for _ in range(12):
            answer = an_answer(rng)
            found = env.step(answer)
            assert_same(found, again.step(answer))
            if found[2] or found[3]:
                assert_same(env.reset(), again.reset())


def test_the_argument_equals_the_wrappers_in_all_forms() -> None:
    budget = {"tokens": 5, "seconds": 1000.0}
    native = gym.make_vec("DialogueQA-v0", 2, budget=budget)
    assert str(native).count("TokenVectorBudget") == str(native).count("TimeVectorBudget") == 1
    others = [
        gym.make_vec("DialogueQA-v0", 2, budget=budget, vectorization_mode="sync"),
        gym.make_vec(native.spec),
    ]
    first = native.reset(seed=0)
    for other in others:
        assert_same(other.reset(seed=0), first)
    answers = ["It is Lima.", "one two three four five six"]
    _, rewards, _, truncated, infos = native.step(answers)
    for other in others:
        _, other_rewards, _, other_truncated, other_infos = other.step(answers)
        assert other_rewards.tolist() == rewards.tolist()
        assert other_truncated.tolist() == truncated.tolist() == [False, True]
        assert step_infos(other_infos, 2) == step_infos(infos, 2)


def test_choices_that_are_written_have_budgets_too() -> None:
    env = gym.make("TextBattle-v0", answer_in_text=True, budget={"tokens": 3}, feedback={"bias": 1})
    env.reset(seed=0)
    *_, truncated, info = env.step("1")
    assert (truncated, info["tokens_left"], info["score/valid_choice"]) == (False, 2, 1.0)
    *_, truncated, info = env.step("3. Guard. And more")
    assert (truncated, info["tokens_left"], info["score/valid_choice"]) == (True, 0, 1.0)


def test_the_examples_in_the_docstrings_run() -> None:
    found = doctest.testmod(budgets)
    assert found.attempted
    assert not found.failed


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tokens": 0}, ValueError, "tokens is 0. Give a whole number from 1"),
        ({"tokens": 1.5}, TypeError, "tokens is 1.5. Give a whole number"),
        ({"tokens": True}, TypeError, "tokens is True"),
        ({"seconds": 0}, ValueError, "seconds is 0. Give a finite number of more than 0"),
        ({"seconds": -1.0}, ValueError, "seconds is -1.0"),
        ({"seconds": math.inf}, ValueError, "seconds is inf"),
        ({"seconds": math.nan}, ValueError, "seconds is nan"),
        ({"seconds": "5"}, TypeError, "seconds is '5'. Give a number of seconds"),
        ({"seconds": True}, TypeError, "seconds is True"),
    ],
    ids=str,
)
def test_impossible_budgets_are_refused_by_name(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    single, vector = (
        (TokenBudget, TokenVectorBudget)
        if "tokens" in arguments
        else (TimeBudget, TimeVectorBudget)
    )
    with pytest.raises(error, match=message):
        single(TextEnv(Words), **arguments)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        vector(TextVectorEnv(2, Words), **arguments)  # type: ignore[arg-type]
    for make in (gym.make, gym.make_vec):
        with pytest.raises(error, match=message):
            make("DialogueQA-v0", budget=arguments)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        (60, TypeError, r"budget is 60. Give a dict of limits \(tokens, tokenizer, seconds\)"),
        ({}, ValueError, r"budget is \{\}. Give tokens .*seconds or both"),
        ({"tokenizer": "x"}, ValueError, "Give tokens .*seconds or both"),
        ({"tokenizer": "x", "seconds": 1}, ValueError, "Give tokens .*seconds or both"),
        ({"token": 60}, TypeError, "no limit 'token' of budget.*Did you mean 'tokens'"),
    ],
    ids=str,
)
def test_a_budget_that_says_nothing_is_refused(
    budget: Any, error: type[Exception], message: str
) -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(error, match=message):
            make("DialogueQA-v0", budget=budget)  # type: ignore[operator]


def test_what_writes_no_text_and_other_vector_forms_are_refused() -> None:
    for wrap in (lambda e: TokenBudget(e, tokens=3), lambda e: TimeBudget(e, seconds=3)):
        for id in ("RecommendationClicks-v0", "CartPole-v1"):
            with pytest.raises(ValueError, match=r"has no written answers.*answer_in_text=True"):
                wrap(gym.make(id))
    with pytest.raises(ValueError, match="has no written answers"):
        gym.make_vec("TextBattle-v0", 2, budget={"tokens": 3})
    with pytest.raises(ValueError, match=r"is not the native vector form.*Wrap its single"):
        TokenVectorBudget(SyncVectorEnv([lambda: TextEnv(Words)] * 2), tokens=3)


def test_a_tokenizer_that_does_not_tell_where_tokens_end_is_refused() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str) -> Any: ...

    with pytest.raises(ValueError, match=r"Slow does not tell where.*Give a fast tokenizer"):
        TokenBudget(TextEnv(Words), tokens=3, tokenizer=Slow())


# --- agents --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_token_tasks")
@pytest.mark.parametrize("agent", ["ppo", "reinforce"])
def test_p26_a_critic_says_what_a_truncated_episode_was_worth(agent: str) -> None:
    """Of the state with the answer as the environment heard it, and never of the next episode."""
    settings: dict[str, Any] = {"gamma": 0.9, "prompts": 8, "group_size": 1, "max_new_tokens": 3}
    settings |= {"baseline": "critic"} if agent == "reinforce" else {"lam": 1.0}
    letters = ("ab", "b", "aab", "bbbb")
    kwargs = {"letters": letters, "budget": {"tokens": 2}}
    made = make_agent("Identity-v9", agent=agent, env_kwargs=kwargs, **settings)
    torch.nn.init.normal_(made.critic.weight)  # it begins at 0, and so would every value
    rollout = made.collect()
    bootstrap = made.bootstrap(rollout)
    tokenizer, cases = made.policy.tokenizer, set()
    for row, seed in enumerate(episode_seeds(made.seed, made.iteration, 8, 1)):
        [sequence] = [s for s in rollout.sequences if s.row == row]
        env = gym.make("Identity-v9", **kwargs)
        observation, _ = env.reset(seed=seed)
        for turn in range(int(rollout.lengths[row])):
            said = [t for t, of in zip(sequence.ids, sequence.turns, strict=True) if of == turn]
            answer = tokenizer.decode([t for t in said if t != made.policy.end])
            seen = observation + answer
            observation, _, terminated, truncated, _ = env.step(answer)
        assert terminated or truncated
        assert (row in rollout.left_in) is truncated
        if terminated:
            assert bootstrap[row] == 0.0
            continue
        state = TokenSequence(row)
        if whole := observation.startswith(seen):
            state.read(sequence.ids + tokenizer(observation[len(seen) :])["input_ids"])
        else:  # the answer was cut, so that the conversation is another one
            state.read(tokenizer(observation)["input_ids"])
        cases.add(whole)
        value = made.policy.values([state], made.critic)
        assert bootstrap[row].item() == pytest.approx(value.item(), abs=1e-5)
    assert len(rollout.left_in) < 8
    assert cases == {True, False}, "choose another seed"


@pytest.mark.parametrize("agent", ["ppo", "reinforce"])
def test_the_command_line_trains_under_a_budget(agent: str, tmp_path: Path) -> None:
    kwargs = json.dumps({"budget": {"tokens": 6, "tokenizer": str(TINY)}, "max_turns": 3})
    common = f"--env DialogueQA-v0 --agent {agent} --steps 12 --prompts 2 --group-size 2 --quiet"
    common += " --track jsonl --report none --eval-every 0 --samples 0 --max-new-tokens 8"
    out = tmp_path / "run"
    train.main([*common.split(), "--env-kwargs", kwargs, "--out", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    [first, *_] = [line["env_steps"] for line in lines if "train/loss" in line]
    assert 4 <= first < 12, "of 4 episodes of 3 turns some are cut off"


@pytest.mark.parametrize("rows", [0, 3])
def test_the_time_that_the_environment_takes_is_not_charged(rows: int) -> None:
    """Scoring takes 6 seconds an answer, the policy none, and later 5.5."""
    now = 0.0

    class Slow(DialogueQA):
        def score(self, episodes: Any, actions: Any) -> Any:
            nonlocal now
            now += 6.0 * len(actions)
            return super().score(episodes, actions)

    env: Any = TimeBudget(TextEnv(Slow), seconds=5.0, clock=lambda: now)
    if rows:
        env = TimeVectorBudget(TextVectorEnv(rows, Slow), seconds=5.0, clock=lambda: now)
    answers = ["unknown"] * rows if rows else "unknown"
    env.reset(seed=1)
    assert not np.any(env.step(answers)[3])
    assert not np.any(env.step(answers)[3])
    now += 5.5
    assert np.all(env.step(answers)[3])


def test_an_answer_is_cut_between_characters() -> None:
    # Two characters of three tokens each, which end together.
    assert cut("東京!", [1, 1, 1, 2, 2, 2, 3], 4) == ("東", 0)
    assert cut("東京!", [1, 1, 1, 2, 2, 2, 3], 2) == ("", 0)
    assert cut("東京!", [1, 1, 1, 2, 2, 2, 3], 6) == ("東京", 0)


def test_feedback_is_corrupted_outside_a_budget() -> None:
    with pytest.raises(ValueError, match="Give the budget first, then the feedback"):
        TokenBudget(gym.make("DialogueQA-v0", feedback={"delay": 1}), tokens=5)
    with pytest.raises(ValueError, match="Give the budget first, then the feedback"):
        TokenVectorBudget(gym.make_vec("DialogueQA-v0", 2, feedback={"delay": 1}), tokens=5)


def test_a_tokenizer_that_env_spec_could_not_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="The tokenizer of a budget is a object"):
        gym.make("DialogueQA-v0", budget={"tokens": 5, "tokenizer": object()})


def test_every_row_may_be_reset_by_no_mask() -> None:
    envs = gym.make_vec("DialogueQA-v0", 2, budget={"tokens": 5})
    infos = envs.reset(seed=1, options={"reset_mask": None})[1]
    assert infos["tokens_left"].tolist() == [5, 5]


@each_writing
def test_every_task_knows_how_many_steps_a_budget_can_take_away(id: str) -> None:
    """Else an evaluation would count the steps that were taken alone, and to stop could pay."""
    task: Any = gym.make(id).unwrapped.task
    for example in (task.examples[0], task.examples[-1]):
        assert task.planned_turns(example) >= 1
