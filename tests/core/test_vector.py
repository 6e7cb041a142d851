"""Episodes in lockstep: exactly what single environments and Gymnasium's own vector forms give."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import create_shared_memory

from installed import playable_ids
from llm_envs.core.env import TextEnv
from llm_envs.core.spaces import Text
from llm_envs.core.task import Episode, Outcome, WritingTask
from llm_envs.core.vector import TextVectorEnv, step_infos
from llm_envs.datasets.records import Document
from same import assert_same

IDS = playable_ids()
N = 4
STEPS = 60
SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}

each_id = pytest.mark.parametrize("id", IDS)
each_seed = pytest.mark.parametrize("seed", [5, [9, 2, 2**40, 9]], ids=["int", "list"])


def make(id: str, mode: str, n: int = N, **arguments: Any) -> Any:
    vector_kwargs = None if mode == "vector_entry_point" else dict(SAME_STEP)
    if mode == "async" and vector_kwargs is not None:
        vector_kwargs["shared_memory"] = False
    return gym.make_vec(
        id, num_envs=n, vectorization_mode=mode, vector_kwargs=vector_kwargs, **arguments
    )


def some_actions(vec: Any, references: Sequence[Any], rng: np.random.Generator) -> Any:
    """Draw one action a row: right, nearly right and wrong ones, and a search."""
    if isinstance(vec.single_action_space, gym.spaces.Discrete):
        return rng.integers(vec.single_action_space.n, size=vec.num_envs)
    kinds = rng.integers(5, size=vec.num_envs)
    return tuple(
        [f" {r[0]}", f" {r[0]} and more", " unknown", "\ud800", " search: how a file is read"][kind]
        for r, kind in zip(references, kinds, strict=True)
    )


def play(vec: Any, steps: int, *, seed: Any = None, chance: int = 0) -> list[Any]:
    """Reset (unless the seed is None) and step; return everything seen."""
    rng = np.random.default_rng(chance)
    seen = [] if seed is None else [vec.reset(seed=seed)]
    for _ in range(steps):
        references = (
            vec.references if isinstance(vec, TextVectorEnv) else vec.get_attr("references")
        )
        seen.append(vec.step(some_actions(vec, references, rng)))
    return seen


# --- A task with everything that makes rows differ -----------------------------------------------


class Uneven(WritingTask[Document]):
    """Episodes whose length depends on the actions, with unscored steps and known best scores.

    "search" is not scored, "stop" ends the episode, everything else scores 1/3.
    """

    def __init__(self, max_turns: int | None = None) -> None:
        super().__init__(max_turns)
        self.examples = [Document(f"t{i}", f"text {i}", ("x",), f"t{i}") for i in range(1000)]

    def turns(self, example: Document) -> int:
        return 5

    def ask(self, example: Document, turn: int) -> str:
        return f"{example.text}, turn {turn}"

    def answers(self, example: Document, turn: int) -> tuple[str, ...]:
        return (f"{example.id}/{turn}",)

    def score_answers(self, answers: Any, references: Any) -> list[Outcome]:
        return [
            Outcome(None, reward=-0.125, feedback="found")
            if answer == "search"
            else Outcome(1 / 3, {"part": 1 / 3}, best_score=1.0 if answer == "best" else None)
            for answer in answers
        ]

    def proceed(self, episode: Episode[Document], action: str, outcome: Outcome) -> None:
        super().proceed(episode, action, outcome)
        if action == "stop":
            episode.finished = True
        if not episode.finished:
            episode.observation += f" {episode.rng.random()}"  # chance within the episode


def uneven_actions(rng: np.random.Generator, n: int) -> list[str]:
    return rng.choice(["search", "stop", "best", "other"], size=n, p=[0.3, 0.1, 0.3, 0.3]).tolist()


# --- Exactness -----------------------------------------------------------------------------------


@each_id
@each_seed
def test_native_form_equals_sync_vector_env_to_the_last_dtype(id: str, seed: Any) -> None:
    native, sync = (make(id, mode) for mode in ("vector_entry_point", "sync"))
    assert isinstance(native, TextVectorEnv)
    assert isinstance(sync, SyncVectorEnv)
    seen, expected = (play(vec, STEPS, seed=seed) for vec in (native, sync))
    for a, b in zip(seen, expected, strict=True):
        assert_same(a, b)
    assert sum("final_info" in result[-1] for result in seen) > 5  # autoreset was seen
    assert_same(native.reset(), sync.reset())  # and a reset without a seed goes on alike
    assert native.action_space == sync.action_space
    assert native.observation_space == sync.observation_space


@each_id
@each_seed
def test_native_form_plays_the_trajectories_of_single_environments(id: str, seed: Any) -> None:
    vec = make(id, "vector_entry_point")
    envs = [gym.make(id).unwrapped for _ in range(N)]
    seeds = [seed + i for i in range(N)] if isinstance(seed, int) else seed
    observations, infos = vec.reset(seed=seed)
    single = [env.reset(seed=s) for env, s in zip(envs, seeds, strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        assert_same(step_infos(infos, N), [s[-1] for s in single])
        for i in range(N):
            if isinstance(observations, tuple):
                assert observations[i] == envs[i].episode.observation
            else:
                assert observations["prompt"][i] == envs[i].episode.observation["prompt"]
        actions = some_actions(vec, vec.references, rng)
        assert vec.references == [env.references for env in envs]
        assert vec.demonstrations == [env.demonstration for env in envs]
        assert_same(vec.candidate_scores, [env.candidate_scores for env in envs])
        observations, rewards, terminated, truncated, infos = vec.step(actions)
        single = [env.step(action) for env, action in zip(envs, actions, strict=True)]
        assert rewards.tolist() == [s[1] for s in single]
        assert terminated.tolist() == [s[2] for s in single]
        assert not truncated.any()
        assert_same(step_infos(infos, N), [s[-1] for s in single])
        final = [s[0] if s[2] else None for s in single]
        assert_same(infos.get("final_obs", np.full(N, None)).tolist(), final)
        single = [env.reset() if s[2] else s for env, s in zip(envs, single, strict=True)]
        infos = vec._add_info({}, single[0][-1], 0)  # Gymnasium's own layout, read back above
        for i in range(1, N):
            infos = vec._add_info(infos, single[i][-1], i)


@each_seed
def test_rows_whose_infos_differ_are_laid_out_as_gymnasium_does(seed: Any) -> None:
    native = TextVectorEnv(N, Uneven)
    sync = SyncVectorEnv([lambda: TextEnv(Uneven)] * N, **SAME_STEP)
    assert_same(native.reset(seed=seed), sync.reset(seed=seed))
    rng = np.random.default_rng(0)
    unscored_rows = set()
    for _ in range(300):
        actions = uneven_actions(rng, N)
        result = native.step(actions)
        assert_same(result, sync.step(actions))
        unscored_rows.add(tuple(result[-1].get("_score", np.zeros(N)).tolist()))
        for info, action in zip(step_infos(result[-1], N), actions, strict=True):
            assert ("score" in info) == (action != "search")
            assert ("best_score" in info) == (action == "best")
    assert len(unscored_rows) > 10


@each_id
@pytest.mark.parametrize("seed", [0, 7, [3, 1, 4, 1], [5, None, 5, None]], ids=str)
def test_rows_have_the_generators_of_single_environments(id: str, seed: Any) -> None:
    vec = make(id, "vector_entry_point")
    envs = [gym.make(id).unwrapped for _ in range(N)]
    vec.reset(seed=[11, 12, 13, 14])
    for s, env in zip([11, 12, 13, 14], envs, strict=True):
        env.reset(seed=s)
    seeds = [seed + i for i in range(N)] if isinstance(seed, int) else seed
    vec.reset(seed=seed)
    for rng, env, s in zip(vec.np_random, envs, seeds, strict=True):
        env.reset(seed=s)
        assert rng.bit_generator.state == env.np_random.bit_generator.state


@each_id
def test_a_step_scores_all_rows_in_one_call(id: str) -> None:
    vec = make(id, "vector_entry_point", 16)
    calls = []
    score = vec.task.score
    vec.task.score = lambda episodes, actions: (
        calls.append(len(actions)) or score(episodes, actions)
    )
    play(vec, 3, seed=0)
    assert calls == [16, 16, 16]


@each_id
def test_results_are_new_objects_in_every_step(id: str) -> None:
    vec, twin = make(id, "vector_entry_point"), make(id, "vector_entry_point")
    rng, same = np.random.default_rng(0), np.random.default_rng(0)
    results = vec.reset(seed=1), twin.reset(seed=1)
    for _ in range(10):
        assert_same(*results)
        observation, *arrays, infos = results[0]
        for array in arrays:
            array.fill(0)
        for message in (m for messages in infos["messages"] for m in messages):
            message.clear()
        for value in infos.values():
            if isinstance(value, np.ndarray):
                value.fill(0)
        infos.clear()
        if isinstance(observation, dict):
            observation["features"].fill(9)
            observation.clear()
        results = (
            vec.step(some_actions(vec, vec.references, rng)),
            twin.step(some_actions(twin, twin.references, same)),
        )


# --- Every way of making one ---------------------------------------------------------------------


@each_id
def test_make_vec_takes_the_native_form_unless_told_otherwise(id: str) -> None:
    for name in (id, f"llm_envs/{id}"):
        vec = gym.make_vec(name, num_envs=2)
        assert type(vec) is TextVectorEnv
        assert vec.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    again = gym.make_vec(vec.spec)
    assert again.num_envs == 2
    assert_same(play(again, 5, seed=1), play(vec, 5, seed=1))


@each_id
def test_async_form_equals_the_native_one(id: str) -> None:
    asynchronous = make(id, "async", 2)
    try:
        seen = play(asynchronous, 12, seed=3)
    finally:
        asynchronous.close()
    expected = play(make(id, "vector_entry_point", 2), 12, seed=3)
    for a, b in zip(seen, expected, strict=True):
        assert_same(a[0], b[0])
        assert_same(a[1:-1], b[1:-1])
        assert_same(step_infos(a[-1], 2), step_infos(b[-1], 2))


@each_id
def test_shared_memory_is_refused_with_the_cure(id: str) -> None:
    cure = r"vector_kwargs=\{'shared_memory': False\}"
    with pytest.raises(ValueError, match=cure):
        create_shared_memory(Text(5))  # first a small one: the real one would take all memory
    with pytest.raises(ValueError, match=cure):
        gym.make_vec(id, num_envs=2, vectorization_mode="async")


@each_id
@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_arguments_reach_the_rows(id: str, mode: str) -> None:
    arguments = {"max_searches": 0} if id == "CustomerService-v0" else {}  # each step is scored
    vec = make(id, mode, 2, split="test", reward_range=(0.0, 4.0), max_turns=1, **arguments)
    tests = {e.id for e in gym.make(id, split="test").unwrapped.task.examples}
    for _, rewards, terminated, _, infos in play(vec, 10, seed=0)[1:]:
        assert terminated.all()
        assert set(infos["example_id"]) <= tests
        assert_same(rewards, infos["final_info"]["score"] * 4.0)


# --- Copies --------------------------------------------------------------------------------------


@each_id
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda vec: pickle.loads(pickle.dumps(vec))],
    ids=["copy", "pickle"],
)
def test_a_copy_goes_on_identically(id: str, duplicate: Callable[[Any], Any]) -> None:
    vec = make(id, "vector_entry_point", 6, group_size=2)
    play(vec, 7, seed=1)
    twin = duplicate(vec)
    assert_same(play(vec, 40), play(twin, 40))
    assert_same(vec.reset(), twin.reset())


# --- Seeds ---------------------------------------------------------------------------------------


def episodes_of(vec: Any, seed: Any, rounds: int) -> list[tuple[str, ...]]:
    """Return, for each row, the examples of its first episodes."""
    drawn = [vec.reset(seed=seed if r == 0 else None)[1]["example_id"] for r in range(rounds)]
    return list(zip(*drawn, strict=True))


@each_id
def test_spawned_seeds_share_few_episodes(id: str) -> None:
    """Of two rows of 12 draws from N >= 50 examples, 7 agree in place by chance with a
    probability of at most C(12, 7) 50^-7 < 2e-9; times 120 pairs of 16 rows, < 2e-7."""
    vec = make(id, "vector_entry_point", 8)
    assert len(vec.task.examples) >= 50
    rows = [
        row
        for s in (1, 2)
        for row in episodes_of(vec, np.random.SeedSequence(s).generate_state(8).tolist(), 12)
    ]
    for i in range(16):
        for j in range(i):
            assert sum(a == b for a, b in zip(rows[i], rows[j], strict=True)) < 7


@each_id
def test_int_seeds_count_up_as_in_gymnasium(id: str) -> None:
    vec = make(id, "vector_entry_point", 8)
    one, two = (episodes_of(vec, seed, 3) for seed in (1, 2))
    assert one[1:] == two[:-1]  # which is why our own runner spawns its seeds
    assert one[0] not in two


def test_without_a_seed_rows_and_runs_differ() -> None:
    rows = [
        row for _ in range(2) for row in episodes_of(make(IDS[0], "vector_entry_point"), None, 5)
    ]
    assert len(set(rows)) == 2 * N  # by chance alone with a probability of 1 - 28 N^-5, N > 4000


# --- Groups --------------------------------------------------------------------------------------


@each_id
@pytest.mark.parametrize("seed", [0, [3, 3, 3, 8, 8, 8], None], ids=str)
def test_a_group_plays_the_same_episodes_whatever_its_rows_do(id: str, seed: Any) -> None:
    vec = make(id, "vector_entry_point", 6, group_size=3)
    first = vec.reset(seed=seed)[0]
    begun: list[list[Any]] = [[] for _ in range(6)]
    rng = np.random.default_rng(0)
    rewards = []
    for _ in range(50):
        _, reward, terminated, *_ = vec.step(some_actions(vec, vec.references, rng))
        rewards.append(reward)
        for i in np.flatnonzero(terminated):
            begun[i].append(copy.deepcopy(vec.episodes[i].observation))
    shown = first
    if isinstance(first, dict):  # one of the two differs from the first step on
        shown = list(zip(first["prompt"], *first["candidates"], strict=True))
    for row in (0, 3):
        count = min(len(begun[row + i]) for i in range(3))
        assert count > 5
        assert shown[row] == shown[row + 1] == shown[row + 2]
        assert_same(begun[row][:count], begun[row + 1][:count])
        assert_same(begun[row][:count], begun[row + 2][:count])
    # Six equal draws in a row, of 335 examples or more, have a probability below 1e-15.
    assert [str(b) for b in (shown[0], *begun[0])] != [str(b) for b in (shown[3], *begun[3])]
    assert any(reward[0] != reward[1] for reward in rewards)  # they did differ in what they did


def test_chance_within_an_episode_does_not_part_a_group() -> None:
    vec = TextVectorEnv(6, Uneven, group_size=3)
    vec.reset(seed=0)
    rng = np.random.default_rng(1)
    begun: list[list[str]] = [[] for _ in range(6)]
    for _ in range(100):
        *_, terminated, _, _ = vec.step(uneven_actions(rng, 6))
        for i in np.flatnonzero(terminated):
            begun[i].append(vec.episodes[i].example.id)
    for row in (0, 3):
        count = min(map(len, begun[row : row + 3]))
        assert count > 10
        assert begun[row][:count] == begun[row + 1][:count] == begun[row + 2][:count]
    assert begun[0] != begun[3]


def test_a_group_is_together_again_after_a_reset() -> None:
    vec = TextVectorEnv(6, Uneven, group_size=3)
    vec.reset(seed=0)
    vec.step(["stop", "best", "best"] * 2)
    vec.step(["stop", "stop", "best"] * 2)
    assert len({e.example.id for e in vec.episodes[:3]}) == 3  # rows are episodes apart
    vec.reset()
    assert len({e.example.id for e in vec.episodes[:3]}) == 1
    assert len({e.example.id for e in vec.episodes}) == 2
    for _ in range(5):
        vec.step(["best"] * 6)
    assert len({e.observation for e in vec.episodes[:3]}) == 1  # chance within episodes too


@each_id
def test_a_group_has_the_episodes_of_one_environment_with_its_seed(id: str) -> None:
    grouped = make(id, "vector_entry_point", 6, group_size=2)
    plain = make(id, "vector_entry_point", 3)
    for seed in (4, None):
        a, b = grouped.reset(seed=seed)[1], plain.reset(seed=seed)[1]
        assert a["example_id"].tolist() == b["example_id"].repeat(2).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 1, 1, 2]}, r"seed differs within a group.*2 rows.*Repeat"),
        ({"options": {"example": [0, 1, 2, 2]}}, r"example differs within a group.*Repeat"),
        (
            {"options": {"reset_mask": np.array([True, False, True, True])}},
            r"reset_mask differs within a group.*Repeat",
        ),
    ],
    ids=["seed", "example", "reset_mask"],
)
def test_what_would_part_a_group_is_refused(arguments: dict[str, Any], message: str) -> None:
    vec = make(IDS[0], "vector_entry_point", 4, group_size=2)
    vec.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        vec.reset(**arguments)


# --- Options -------------------------------------------------------------------------------------


@each_id
def test_examples_are_chosen_for_all_rows_or_for_each(id: str) -> None:
    vec = make(id, "vector_entry_point", 3)
    ids = [e.id for e in vec.task.examples]
    for wanted, expected in (
        (2, [ids[2]] * 3),
        (ids[5], [ids[5]] * 3),
        ([1, ids[0], 4], [ids[1], ids[0], ids[4]]),
        (np.array([3, 2, 1]), [ids[3], ids[2], ids[1]]),
        ([None, 7, None], [None, ids[7], None]),
    ):
        _, infos = vec.reset(seed=0, options={"example": wanted})
        _, plain = vec.reset(seed=0)
        for got, drawn, want in zip(
            infos["example_id"], plain["example_id"], expected, strict=True
        ):
            assert got == (want or drawn)


@each_id
def test_a_mask_resets_some_rows_as_sync_vector_env_does(id: str) -> None:
    native, sync = (make(id, mode) for mode in ("vector_entry_point", "sync"))
    mask = np.array([False, True, False, True])
    for seed in (None, 8, [1, 2, 3, 4]):
        results = []
        for vec in (native, sync):
            play(vec, 2, seed=6)
            results.append(vec.reset(seed=seed, options={"reset_mask": mask.copy()}))
            results[-1] = (results[-1], play(vec, 10))
        assert_same(*results)
        assert_same(results[0][0][1]["_turn"], mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": [1, 2]}, "seed has 2 values for 4 environments"),
        ({"options": {"example": [1, 2, 3]}}, "example has 3 values for 4 environments"),
        ({"options": {"example": -1}}, "Example -1 does not exist"),
        ({"options": {"exampl": 1}}, "'exampl'.*Did you mean 'example'"),
        ({"options": {"reset_mask": np.ones(3, np.bool_)}}, r"boolean array of shape \(4,\)"),
        ({"options": {"reset_mask": np.zeros(4, np.bool_)}}, "with a true value"),
        ({"options": {"reset_mask": [1, 0, 1, 0]}}, "boolean array"),
    ],
    ids=str,
)
def test_wrong_resets_are_refused_and_change_no_episode(
    arguments: dict[str, Any], message: str
) -> None:
    vec = make(IDS[0], "vector_entry_point")
    vec.reset(seed=0)
    before = [e.observation for e in vec.episodes]
    with pytest.raises(ValueError, match=message):
        vec.reset(**arguments)
    assert [e.observation for e in vec.episodes] == before


@pytest.mark.parametrize("seed", [-1, [1, 2, 3, -4], 1.5, [1, 2, 3, "4"]], ids=str)
def test_seeds_that_gymnasium_refuses_are_refused(seed: Any) -> None:
    with pytest.raises(gym.error.Error, match="Seed must be"):
        make(IDS[0], "vector_entry_point").reset(seed=seed)


def test_the_seeds_of_rows_are_told_as_sync_vector_env_tells_them() -> None:
    native, sync = (make(IDS[0], mode) for mode in ("vector_entry_point", "sync"))
    assert len(set(native.np_random_seed)) == len(native.np_random) == N
    for seed in (7, [4, 2, 2**40, 4], [1, None, None, 3], None):
        native.reset(seed=seed)
        sync.reset(seed=seed)
        assert native.np_random_seed == sync.np_random_seed
    assert native.np_random_seed == (1, 2, 2**40, 3)
    grouped = make(IDS[0], "vector_entry_point", group_size=2)
    grouped.reset(seed=7)
    assert grouped.np_random_seed == (7, 7, 8, 8)


def test_numpy_seeds_are_taken_as_the_numbers_they_are() -> None:
    vec = make(IDS[0], "vector_entry_point")
    seeds = np.random.SeedSequence(0).generate_state(N)
    assert_same(vec.reset(seed=seeds), vec.reset(seed=seeds.tolist()))
    assert_same(vec.reset(seed=list(seeds)), vec.reset(seed=seeds.tolist()))
    assert_same(vec.reset(seed=np.int64(3)), vec.reset(seed=3))


def test_the_first_reset_cannot_leave_rows_out_and_a_step_needs_one() -> None:
    vec = make(IDS[0], "vector_entry_point")
    with pytest.raises(ResetNeeded, match="cannot leave rows out"):
        vec.reset(options={"reset_mask": np.array([True, False, True, True])})
    with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
        vec.step([""] * N)
    with pytest.raises(ResetNeeded, match=r"call reset\(\)"):
        _ = vec.references


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("abcd", "One string came for 4 environments"),
        (["a", "b", "c"], "A batch of 3 came for 4 environments"),
        (["a", "b", "c", 4], "string, but int came"),
        (["a", "b", "c", "d" * (2**20 + 1)], "1,048,577 characters"),
    ],
    ids=["string", "short", "type", "long"],
)
def test_wrong_actions_are_refused_and_change_no_row(actions: Any, message: str) -> None:
    vec = make("DialogueQA-v0", "vector_entry_point")
    before, _ = vec.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        vec.step(actions)
    assert tuple(e.observation for e in vec.episodes) == before


@each_id
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_envs": 0}, ValueError, "num_envs is 0"),
        ({"num_envs": 6, "group_size": 4}, ValueError, "group_size 4 does not divide num_envs 6"),
        ({"num_envs": 6, "group_size": 0}, ValueError, "group_size 0"),
        ({"num_envs": 6, "groupsize": 2}, TypeError, "'groupsize'.*Did you mean 'group_size'"),
        ({"num_envs": 6, "render_mode": "human"}, ValueError, "'human'.*'ansi'"),
        ({"num_envs": 6, "reward_range": (2, 1)}, ValueError, "two finite numbers"),
        ({"num_envs": 6, "split": "trian"}, ValueError, "Did you mean 'train'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_cause_and_cure(
    id: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gym.make_vec(id, **arguments)


# --- Infos, taken apart --------------------------------------------------------------------------


@each_id
@pytest.mark.parametrize("mode", ["sync", "vector_entry_point"])
def test_step_infos_are_plain_and_those_of_the_step(id: str, mode: str) -> None:
    for result in play(make(id, mode), 20, seed=0):
        for i, info in enumerate(step_infos(result[-1], N)):
            assert type(info["turn"]) is int
            assert type(info["messages"]) is list
            if len(result) == 5 and "score" in info:
                assert type(info["score"]) is float
                assert result[1][i] == 2 * info["score"] - 1
            elif len(result) == 5:
                assert id == "CustomerService-v0"
                assert info.keys() == {"example_id", "turn", "messages", "feedback"}
                assert result[1][i] == -0.05
            else:
                assert info.keys() == {"example_id", "turn", "messages"}


def test_step_infos_keep_what_wrappers_add() -> None:
    vec = gym.wrappers.vector.RecordEpisodeStatistics(make(IDS[0], "vector_entry_point"))
    vec.reset(seed=0)
    infos: dict[str, Any] = {}
    while "final_info" not in infos:
        *_, infos = vec.step([""] * N)
    assert "episode" in infos
    infos = {key: value for key, value in infos.items() if "final" not in key}
    for row, ended in zip(step_infos(infos, N), infos["_episode"], strict=True):
        assert ("episode" in row) == ended
        if ended:
            assert row["episode"]["r"] == -row["episode"]["l"]


# --- Rendering and spaces ------------------------------------------------------------------------


@each_id
def test_each_row_renders_as_a_single_environment_does(id: str) -> None:
    native = make(id, "vector_entry_point", render_mode="ansi")
    single = gym.make(id, render_mode="ansi")
    native.reset(seed=2)
    single.reset(seed=2)
    rng = np.random.default_rng(0)
    for _ in range(20):
        shown = native.render()
        assert len(shown) == N
        assert shown[0] == single.render()
        actions = some_actions(native, native.references, rng)
        native.step(actions)
        if single.step(actions[0])[2]:
            single.reset()
    assert make(id, "vector_entry_point").render() is None


def test_spaces_of_two_vector_environments_are_sampled_independently() -> None:
    a, b = (make(IDS[0], "vector_entry_point") for _ in range(2))
    a.single_action_space.seed(1)
    alone = [a.single_action_space.sample() for _ in range(5)]
    a.single_action_space.seed(1)
    b.single_action_space.seed(2)
    assert alone == [a.single_action_space.sample() for _ in range(5)]


@each_id
def test_observations_lie_in_the_batched_space(id: str) -> None:
    vec = make(id, "vector_entry_point")
    vec.action_space.seed(0)
    assert vec.reset(seed=0)[0] in vec.observation_space
    for _ in range(5):
        assert vec.step(vec.action_space.sample())[0] in vec.observation_space
