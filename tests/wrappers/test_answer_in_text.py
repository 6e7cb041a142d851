"""Choosing tasks that are played in writing: what names a choice, and that all forms are equal."""

from __future__ import annotations

import copy
import doctest
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given
from hypothesis import strategies as st

import llm_envs
from agents import CausalLMPolicy, Reinforce
from llm_envs.core.env import TextEnv
from llm_envs.core.task import ChoosingTask, Episode, Outcome
from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.records import Document
from llm_envs.wrappers import AnswerInText, ChoosingInText, answer_in_text, parse_choice
from llm_envs.wrappers.answer_in_text import NOTICE
from same import assert_same
from three_tokens import Pick, make_model, make_tokenizer, task_fixture

three_token_tasks = task_fixture({"Pick-v9": Pick}, autouse=False)

IDS = tuple(
    id
    for id in llm_envs.registered_ids()
    if isinstance(gym.make(id).action_space, gym.spaces.Discrete)
)
SEEDS = [5, 2**40, 9]
N = len(SEEDS)
STEPS = 24

each_id = pytest.mark.parametrize("id", IDS)


class Silent(ChoosingTask[Document]):
    """Two turns in which the user says nothing; the second choice costs 1/8 and is not scored."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.examples = [Document(f"t{i}", f"text {i}", ("x",), f"t{i}") for i in range(5)]

    def begin(self, example: Document, rng: np.random.Generator) -> Episode[Document]:
        return Episode(example, rng, self._observe("ab"))

    def _observe(self, names: str) -> dict[str, Any]:
        candidates = (f" {names[0]}", f" {names[1]}", " c")
        return {"prompt": "", "candidates": candidates, "features": np.zeros((3, 1), np.float32)}

    def score(self, episodes: Any, actions: Any) -> list[Outcome]:
        return [Outcome(None, reward=-0.125) if a == 1 else Outcome(0.75) for a in actions]

    def proceed(self, episode: Episode[Document], action: int, outcome: Outcome) -> None:
        episode.finished = episode.turn == 2
        episode.observation = self._observe("de")


def in_text(id: str, **arguments: Any) -> gym.Env[Any, Any]:
    return gym.make(id, answer_in_text=True, **arguments)


def task_of(id: str) -> ChoosingInText:
    task: ChoosingInText = in_text(id).unwrapped.task  # type: ignore[attr-defined]
    return task


def some_answer(candidates: Any, rng: np.random.Generator) -> tuple[str, int | None]:
    """Draw an answer, and the choice that it names."""
    choice = int(rng.integers(len(candidates)))
    text = candidates[choice].strip()
    valid = [f" {choice + 1}", f"{choice + 1}.", f" {choice + 1}. {text}", f"  {text.upper()}\n"]
    odd = ["", " 0", f" {len(candidates) + 1}", f" It is {choice + 1}.", "\x00\ud800 東京"]
    answer = [*valid, *odd][rng.integers(len(valid) + len(odd))]
    same = [plain for plain in candidates if plain.strip().upper() == text.upper()]
    named = answer in valid[:3] or (answer == valid[3] and len(same) == 1)
    return answer, choice if named else None


# --- what names a choice -------------------------------------------------------------------------

FILMS = (" Heat (1995): Action. Rated 4.0 by 85.", " 1.", " 7 (1995).", " heat", " Heat", " É")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("1", 0),  # and not the candidate whose text it is
        (" 6 ", 5),
        ("4.", 3),
        ("2. 1.", 1),
        ("Heat (1995): Action. Rated 4.0 by 85.", 0),
        ("1.  heat (1995):\taction. rated 4.0 by 85", 0),
        ("\n7 (1995)\n", 2),
        ("é", 5),
        ("4. Heat", 3),
        ("heat", None),  # two are called that
        ("Heat (1995)", None),
        ("7", None),
        ("0", None),
        ("-1", None),
        ("1.0", None),
        ("01", None),
        ("１", None),
        ("1..", None),
        ("1 2", None),
        ("It is 1.", None),
        ("Answer: 1", None),
        ("5. Heat (1995): Action. Rated 4.0 by 85.", None),  # another one's number
        ("", None),
        (".", None),
        (" \n", None),
        ("\ud800", None),
    ],
)
def test_an_answer_is_a_number_a_text_or_both_and_nothing_else(
    answer: str, expected: int | None
) -> None:
    assert parse_choice(answer, FILMS) == expected


def test_an_answer_of_nothing_names_nothing() -> None:
    assert parse_choice(" ", (" .", "x")) is None


texts = st.lists(st.text(), min_size=1, max_size=30)


@given(texts, st.data())
def test_every_candidate_can_be_named_by_its_number(candidates: list[str], data: Any) -> None:
    choice = data.draw(st.integers(0, len(candidates) - 1))
    assert parse_choice(f" {choice + 1}.", candidates) == choice


@given(texts, st.text())
def test_what_is_read_names_what_was_said(candidates: list[str], answer: str) -> None:
    choice = parse_choice(answer, candidates)
    if choice is not None:
        assert any(
            " ".join(answer.split()).casefold().removesuffix(".")
            == " ".join(named.split()).casefold().removesuffix(".")
            for named in (
                str(choice + 1),
                candidates[choice],
                f"{choice + 1}. {candidates[choice]}",
            )
        )


# --- a choosing task in writing ------------------------------------------------------------------


@functools.cache
def played(id: str, seed: int) -> list[tuple[Any, ...]]:
    """Play a task in writing beside the choosing task; return each answer and its step."""
    env, plain = in_text(id), gym.make(id)
    rng = np.random.default_rng(seed % 1000)
    observation, info = env.reset(seed=seed)
    offered, expected = plain.reset(seed=seed)
    assert {**info, "messages": 0} == {**expected, "messages": 0}
    seen: list[tuple[Any, ...]] = []
    for _ in range(STEPS):
        assert observation.endswith("\nAssistant:")
        for i, text in enumerate(offered["candidates"], 1):
            assert f"\n{i}.{text}\n" in observation
        before = env.unwrapped.candidate_scores  # type: ignore[attr-defined]
        assert_same(before, plain.unwrapped.candidate_scores)  # type: ignore[attr-defined]
        answer, choice = some_answer(offered["candidates"], rng)
        last = observation
        observation, reward, terminated, truncated, info = env.step(answer)
        offered, clean, over, _, expected = plain.step(choice or 0)
        assert observation.startswith(last + answer)
        assert (terminated, truncated) == (over, False)
        expected |= {"messages": info["messages"], "score/valid_choice": float(choice is not None)}
        if choice is None:
            clean = -1.0
            expected |= {key: 0.0 for key in info if key.startswith("score")}
            expected["feedback"] = f"{NOTICE} {expected['feedback']}"
        assert_same((reward, info), (clean, expected))
        seen.append((answer, observation, reward, terminated, info))
        if terminated:
            assert not observation.endswith("Assistant:")
            observation, info = env.reset()
            offered, _ = plain.reset()
    assert len({info["score/valid_choice"] for *_, info in seen}) == 2, "choose another seed"
    return seen


@each_id
@pytest.mark.parametrize("seed", SEEDS)
def test_the_choosing_task_is_played_and_an_invalid_answer_scores_0(id: str, seed: int) -> None:
    played(id, seed)


@each_id
def test_the_messages_are_the_conversation(id: str) -> None:
    said: list[str] = []
    for answer, observation, _, terminated, info in played(id, SEEDS[0]):
        said.append(answer)
        answers, text = iter(said), ""
        for message in info["messages"]:
            if message["role"] == "user":
                text += f"{text and chr(10)}User: {message['content']}\nAssistant:"
            else:
                text += next(answers)
                assert text.strip().endswith(message["content"])
        assert observation == (text.removesuffix("\nAssistant:") if terminated else text)
        if terminated:
            said.clear()


@each_id
def test_an_invalid_answer_earns_no_more_than_the_same_move_by_its_number(id: str) -> None:
    invalid, named = in_text(id), in_text(id)
    scores = []
    for env, answer in ((invalid, "Let me think."), (named, "1")):
        env.reset(seed=0)
        over, earned = False, []
        while not over:
            _, _, over, _, info = env.step(answer)
            earned.append(info["score"])
        scores.append(earned)
    assert len(scores[0]) == len(scores[1])
    assert set(scores[0]) == {0.0}
    assert sum(scores[1]) > 0


def test_the_user_may_be_silent_and_a_choice_unscored() -> None:
    env = TextEnv(ChoosingInText(Silent()))
    how = "\nAnswer with a number from 1 to 3."
    assert env.reset(seed=0)[0] == f"User: 1. a\n2. b\n3. c{how}\nAssistant:"
    observation, reward, _, _, info = env.step("2")
    assert reward == -0.125
    assert not {"score", "score/valid_choice"} & info.keys()
    assert observation.endswith("Assistant:2\nUser: 1. d\n2. e\n3. c\nAssistant:")
    observation, reward, terminated, _, info = env.step("f")
    assert (reward, terminated, info["score"], info["score/valid_choice"]) == (-1.0, True, 0.0, 0.0)
    assert observation.endswith(f"Assistant:f\nUser: {NOTICE}")
    env.reset()
    env.step("1")
    assert env.step("3")[0].endswith("Assistant:3"), "nothing more is said"
    assert env.references == ()


# --- forms that are equal ------------------------------------------------------------------------


def wrapped(id: str) -> gym.Env[Any, Any]:
    return AnswerInText(gym.make(id))


@each_id
@pytest.mark.parametrize("seed", SEEDS)
def test_the_wrapper_equals_the_argument(id: str, seed: int) -> None:
    env, twin = wrapped(id), in_text(id)
    assert_same(env.reset(seed=seed), twin.reset(seed=seed))
    for answer, *expected in played(id, seed):
        assert env.references == twin.unwrapped.references  # type: ignore[attr-defined]
        twin.step(answer)
        observation, reward, terminated, truncated, info = env.step(answer)
        assert truncated is False
        assert_same([observation, reward, terminated, info], expected)
        if terminated:
            assert_same(env.reset(), twin.reset())


def test_the_wrapper_equals_the_argument_where_the_user_is_silent() -> None:
    one, two = AnswerInText(TextEnv(Silent())), TextEnv(ChoosingInText(Silent()))
    for answers in ("2f", "13", "f2"):
        assert_same(one.reset(seed=0), two.reset(seed=0))
        for answer in answers:
            assert_same(one.step(answer), two.step(answer))


def sync(make: Callable[[], Any], mode: AutoresetMode) -> SyncVectorEnv[Any, Any]:
    return SyncVectorEnv([make] * N, autoreset_mode=mode)


FORMS: dict[str, Callable[[str], Any]] = {
    "native": lambda id: gym.make_vec(id, N, answer_in_text=True),
    "sync by id": lambda id: gym.make_vec(id, N, vectorization_mode="sync", answer_in_text=True),
    "sync, wrapped": lambda id: gym.make_vec(
        id, N, vectorization_mode="sync", wrappers=[AnswerInText]
    ),
    **{
        f"{mode.value}, {name}": (lambda id, mode=mode, make=make: sync(lambda: make(id), mode))
        for mode in AutoresetMode
        for name, make in (("wrapped", wrapped), ("by id", in_text))
    },
}


@each_id
@pytest.mark.parametrize("form", FORMS)
def test_a_row_plays_as_a_single_environment_with_its_seed(id: str, form: str) -> None:
    expected = [played(id, seed) for seed in SEEDS]
    envs = FORMS[form](id)
    mode = envs.metadata["autoreset_mode"]
    envs.reset(seed=SEEDS)
    at, over = [0] * N, np.zeros(N, np.bool_)
    while min(at) < STEPS:
        if mode is AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over.copy()})
            over[:] = False
        asleep = over if mode is AutoresetMode.NEXT_STEP else np.zeros(N, np.bool_)
        answers = [expected[i][at[i] % STEPS][0] for i in range(N)]
        observations, rewards, terminated, truncated, infos = envs.step(answers)
        for i, info in enumerate(step_infos(infos, N)):
            if not asleep[i] and at[i] < STEPS:
                same = mode is AutoresetMode.SAME_STEP and terminated[i]
                observation = infos["final_obs"][i] if same else observations[i]
                found = (observation, float(rewards[i]), bool(terminated[i]), info)
                assert_same(found, expected[i][at[i]][1:])
            at[i] += not asleep[i]
        over = terminated | truncated


@each_id
def test_the_native_form_equals_sync_vector_env_to_the_last_dtype(id: str) -> None:
    native = gym.make_vec(id, N, answer_in_text=True)
    assert type(native) is TextVectorEnv
    others = [
        sync(functools.partial(make, id), AutoresetMode.SAME_STEP) for make in (in_text, wrapped)
    ]
    results = [envs.reset(seed=7) for envs in (native, *others)]
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        assert_same(results[0], results[1])
        assert_same(results[0], results[2])
        offered = [e.state.observation["candidates"] for e in native.episodes]
        answers = [some_answer(c, rng)[0] for c in offered]
        results = [envs.step(answers) for envs in (native, *others)]


@each_id
def test_the_oracle_names_a_best_candidate_and_a_group_plays_one_episode(id: str) -> None:
    envs: Any = gym.make_vec(id, 4, answer_in_text=True, group_size=2)
    observations, _ = envs.reset(seed=0)
    assert observations[0] == observations[1] != observations[2] == observations[3]
    for _ in range(STEPS):
        references = envs.references
        for names, scores in zip(references, envs.candidate_scores, strict=True):
            best = (np.flatnonzero(scores == scores.max()) + 1).tolist()
            assert list(map(int, names)) == best
        *_, infos = envs.step([names[-1] for names in references])
        for info in step_infos(infos, 4):
            assert info["score/valid_choice"] == 1.0
            assert info["score"] == info["best_score"]


@each_id
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"]
)
def test_a_copy_in_mid_episode_goes_on_identically(id: str, duplicate: Any) -> None:
    for env in (in_text(id), wrapped(id)):
        env.reset(seed=0)
        env.step("1")
        twin = duplicate(env)
        for answer in ("2", "what?", "1"):
            assert_same(env.step(answer), twin.step(answer))
        assert_same(env.reset(), twin.reset())
    assert len(pickle.dumps(task_of(id))) < 2000, "its data are read again, and not written"


# --- Gymnasium -----------------------------------------------------------------------------------


@each_id
def test_gymnasium_accepts_it_without_a_warning(id: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(in_text(id).unwrapped)
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(AnswerInText(gym.make(id).unwrapped))


@each_id
@pytest.mark.parametrize("make", [wrapped, in_text])
def test_the_spec_makes_the_same_environment_again(id: str, make: Any) -> None:
    env = make(id)
    for spec in (env.spec, EnvSpec.from_json(env.spec.to_json())):
        again = gym.make(spec)
        assert str(again).count("AnswerInText") == str(env).count("AnswerInText")
        assert_same(env.reset(seed=3), again.reset(seed=3))
        for answer in ("2", "none", "1"):
            assert_same(env.step(answer), again.step(answer))
    envs = gym.make_vec(id, 4, answer_in_text=True, group_size=2)
    assert_same(envs.reset(seed=1), gym.make_vec(envs.spec).reset(seed=1))


def test_the_examples_in_the_docstrings_run() -> None:
    found = doctest.testmod(answer_in_text)
    assert found.attempted
    assert not found.failed


# --- refusals ------------------------------------------------------------------------------------


def test_what_is_no_choosing_task_is_refused() -> None:
    for make in (gym.make, gym.make_vec):
        with pytest.raises(ValueError, match=r"DialogueQA is no choosing task.*Leave"):
            make("DialogueQA-v0", answer_in_text=True)  # type: ignore[operator]
        with pytest.raises(TypeError, match=r"answer_in_text is 'yes'\. Give True or False"):
            make(IDS[0], answer_in_text="yes")  # type: ignore[operator]
        with pytest.raises(TypeError, match="Did you mean 'answer_in_text'"):
            make(IDS[0], answer_in_txt=True)  # type: ignore[operator]
    for id in ("DialogueQA-v0", "CartPole-v1"):
        with pytest.raises(ValueError, match="is no choosing task: its observations are"):
            AnswerInText(gym.make(id))
    with pytest.raises(ValueError, match="no choosing task"):
        AnswerInText(in_text(IDS[0]))


@each_id
@pytest.mark.parametrize("make", [wrapped, in_text])
def test_an_action_that_is_no_text_is_refused_and_changes_nothing(id: str, make: Any) -> None:
    env, twin = make(id), make(id)
    assert_same(env.reset(seed=1), twin.reset(seed=1))
    with pytest.raises(ValueError, match="string, but int came"):
        env.unwrapped.step(1) if make is in_text else env.step(1)
    assert_same(env.step("2"), twin.step("2"))


# --- agents --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_token_tasks")
def test_an_agent_that_writes_learns_to_name_the_right_choice_by_reward() -> None:
    """It begins with answers that name nothing in most cases; naming one at random scores 1/2."""
    agent = Reinforce(
        CausalLMPolicy(make_model(), make_tokenizer()),
        "Pick-v9",
        env_kwargs={"answer_in_text": True},
        **{"learning_rate": 1e-2, "prompts": 8, "max_new_tokens": 2, "eval_every": 0},
    )
    assert agent.family == "writing"
    before = agent.collect()
    for _ in range(30):
        agent.iterate()
    after = agent.collect()
    assert before.parts["valid_choice"] < 0.5
    assert after.parts["valid_choice"] > 0.9
    assert after.scores.mean() > 0.75


def test_it_stands_inside_corrupted_feedback() -> None:
    with pytest.raises(ValueError, match="Wrap it in AnswerInText first"):
        AnswerInText(gym.make("TextBattle-v0", feedback={"flip": 0.2}))


def test_the_reference_players_write_their_choices() -> None:
    from benchmarks.reference_scores import measure

    arguments = {"answer_in_text": True}
    written = measure("TextBattle-v0", "test", players=("oracle",), env_kwargs=arguments)["oracle"]
    assert written.score == measure("TextBattle-v0", "test", players=("oracle",))["oracle"].score
