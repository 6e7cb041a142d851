"""TextBattle: what is told of a battle, what must not be, and what agents may count on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import llm_envs  # noqa: F401  (registers the ids)
from llm_envs.core import play
from llm_envs.core.task import Episode, Outcome
from llm_envs.datasets.splits import SPLITS
from llm_envs.tasks.battle_rules import (
    DEFAULT_RULES,
    FOES,
    KINDS,
    MOVES,
    Battle,
    Cyclic,
    Mirror,
    Move,
    Rules,
    after,
    battle_score,
    bayes_score,
    best_responses,
    greedy_policy,
    mean_score,
    opening,
    optimal_score,
    random_policy,
    response_policy,
    surely,
)
from llm_envs.tasks.text_battle import (
    FEATURE_NAMES,
    FIRST_MOVE,
    NAMES,
    RESPONSES,
    STYLES,
    Opponent,
    TextBattle,
    battle_features,
    fixed_response,
    make_opponents,
    tell_rules,
)

STRIKE, HEAVY, GUARD, CHARGE = MOVES
STYLE = STYLES["train"][0]
picks = st.lists(st.sampled_from(MOVES), min_size=20, max_size=20)


class Step(NamedTuple):
    observation: Mapping[str, Any]
    scores: Any
    action: int
    outcome: Outcome


def session(
    task: TextBattle, opponent: Opponent, act: Callable[[Mapping[str, Any]], int]
) -> tuple[list[Step], Episode[Opponent]]:
    """Play one battle; return its steps and how it ended."""
    episode = task.begin(opponent, np.random.default_rng(0))
    steps = []
    while not episode.finished:
        observation, scores = episode.observation, task.candidate_scores(episode)
        action = act(observation)
        [outcome] = task.score([episode], [action])
        play.apply(task, episode, action, outcome)
        steps.append(Step(observation, scores, action, outcome))
    return steps, episode


def through(
    task: TextBattle, opponent: Opponent, moves: list[Move]
) -> tuple[list[Step], Episode[Opponent]]:
    """Play a battle with given moves."""
    left = iter(moves)
    return session(task, opponent, lambda observation: next(left))


# --- battles -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    who=st.integers(0, 10**6),
    split=st.sampled_from([*SPLITS, "all"]),
    max_turns=st.none() | st.integers(1, 20),
    moves=picks,
)
def test_any_battle_keeps_the_contract(
    who: int, split: Any, max_turns: int | None, moves: list[Move]
) -> None:
    task = TextBattle(split=split, max_turns=max_turns)
    opponent = task.examples[who % len(task.examples)]
    steps, episode = through(task, opponent, moves)

    rules = Rules(rounds=max_turns or 8)
    battle, total = opening(rules), 0.0
    for step, later in zip(steps, [*steps[1:], None], strict=True):
        observation, scores, action, outcome = step
        assert task.observation_space.contains(observation)
        then = after(rules, opponent.foe, battle, Move(action))
        assert outcome.score == scores[action] == 0.5 + (then.advantage - battle.advantage) / 12
        assert outcome.best_score == scores.max()
        assert outcome.parts["dealt"] == pytest.approx((battle.foe_health - then.foe_health) / 6)
        assert sum(outcome.parts.values()) / 2 == pytest.approx(outcome.score)
        total += outcome.score
        following = later.observation if later else episode.observation
        chosen = observation["candidates"][action]
        assert following["prompt"].startswith(
            f"{observation['prompt']}{chosen}\nUser: {outcome.feedback}"
        )
        assert following["prompt"].endswith("Assistant:") == (later is not None)
        battle = then
    assert episode.state.battle == battle
    assert len(steps) == battle.turn <= rules.rounds
    assert (len(steps) == rules.rounds) or min(battle.health, battle.foe_health) == 0
    assert total / len(steps) == pytest.approx(battle_score(rules, battle))
    assert task.observation_space.contains(episode.observation)
    assert episode.observation["candidates"] == ("",) * 4
    assert not episode.observation["features"].any()
    assert task.candidate_scores(episode) is None
    assert task.references(episode) == ()


def test_the_prompt_tells_rules_rounds_and_how_both_stand() -> None:
    task = TextBattle(max_turns=3)
    opponent = Opponent(Cyclic((HEAVY, HEAVY, STRIKE)), "Ada", STYLE)
    steps, episode = through(task, opponent, [CHARGE, HEAVY, GUARD])
    told = tell_rules(task.rules)
    assert told == (
        "Both move at once. A strike takes 2 health. A heavy blow takes 6, or 2 through a guard, "
        "and costs 1 energy; without it is weak and takes 1. A guard stops strikes and weak blows, "
        "and gives a strike 2 back. A charge stores 1 energy, up to 3. The last round is 3."
    )
    assert episode.observation["prompt"] == (
        f"User: You fight Ada. {told} Round 1. You have 30 health, 1 energy; Ada 30, 1. "
        "What do you do?\n"
        "Assistant: Charge.\n"
        "User: Ada lands a heavy blow. You lose 6, Ada loses 0. Round 2. You have 24 health, "
        "2 energy; Ada 30, 0. What do you do?\n"
        "Assistant: Heavy blow.\n"
        "User: Ada lands a weak blow. You lose 1, Ada loses 6. Round 3. You have 23 health, "
        "1 energy; Ada 24, 0. What do you do?\n"
        "Assistant: Guard.\n"
        "User: Ada strikes. You lose 0, Ada loses 2."
    )
    assert [step.outcome.score for step in steps] == [0.0, 0.5 + 5 / 12, 0.5 + 2 / 12]


def test_a_heavy_blow_without_energy_says_that_it_is_weak() -> None:
    opponent = Opponent(Cyclic((CHARGE,)), "Ada", STYLE)
    steps, _ = through(TextBattle(), opponent, [HEAVY] * 8)
    assert steps[0].observation["candidates"] == (
        *(" Strike.", " Heavy blow.", " Guard.", " Charge."),
    )
    assert steps[1].observation["candidates"][1] == " Heavy blow, weak without energy."
    assert [s.outcome.score for s in steps[:2]] == [1.0, 0.5 + 1 / 12]


def test_a_battle_ends_when_somebody_falls() -> None:
    opponent = Opponent(Cyclic((CHARGE,)), "Ada", STYLE)
    steps, episode = through(TextBattle(max_turns=20), opponent, [HEAVY, CHARGE] * 10)
    assert len(steps) == 9  # the fifth heavy blow takes the last of 30
    assert episode.state.battle.foe_health == 0
    assert episode.finished


def test_many_episodes_are_scored_in_one_call_and_changed_by_none() -> None:
    task = TextBattle()
    rng = np.random.default_rng(0)
    episodes = [task.begin(opponent, rng) for opponent in task.examples[:40]]
    actions = [i % 4 for i in range(40)]
    together = task.score(episodes, actions)
    assert together == [task.score([e], [a])[0] for e, a in zip(episodes, actions, strict=True)]
    assert {0.0, 1.0} <= {outcome.score for outcome in together}
    assert all(e.turn == 0 and e.state.battle == opening(task.rules) for e in episodes)


# --- what must not show --------------------------------------------------------------------------


def shown(observation: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        observation["prompt"],
        observation["candidates"],
        observation["features"].tobytes(),
    )


@settings(max_examples=30, deadline=None)
@given(moves=picks, style=st.sampled_from(STYLES["train"]))
def test_opponents_look_alike_until_they_move_differently(moves: list[Move], style: Any) -> None:
    """Whatever kind it is, and whatever it will do next, the same is shown for the same history."""
    task = TextBattle()
    seen: dict[tuple[Any, ...], set[Any]] = {}
    for foe in FOES:
        steps, episode = through(task, Opponent(foe, "Ada", style), moves)
        history: tuple[Move, ...] = ()
        for step, move in zip(steps, episode.state.foe_moves, strict=True):
            seen.setdefault(history, set()).add(shown(step.observation))
            history = (*history, move)
    assert all(len(observations) == 1 for observations in seen.values())
    assert len(seen[()]) == 1
    assert len(seen) > 20


@pytest.mark.parametrize("split", SPLITS)
def test_no_kind_is_ever_named(split: Any) -> None:
    task = TextBattle(split=split)
    kinds = "|".join((*KINDS, "mirror", "exploit", "aggress", "cautio", "cycl"))
    for opponent in task.examples[::5]:
        steps, episode = through(task, opponent, [CHARGE, HEAVY, STRIKE, GUARD] * 2)
        told = [episode.observation["prompt"], *(m["content"] for m in episode.messages)]
        told += [text for step in steps for text in step.observation["candidates"]]
        assert not re.search(kinds, " ".join(told), re.IGNORECASE)


def test_names_tell_nothing_of_patterns() -> None:
    for split in SPLITS:
        met = {(o.name, o.foe) for o in make_opponents(split)}
        assert met == set(itertools.product(NAMES[split], FOES))
        styles = {o.name: o.style for o in make_opponents(split)}
        assert all(styles[o.name] == o.style for o in make_opponents(split))
        assert set(styles.values()) == set(STYLES[split])


# --- splits --------------------------------------------------------------------------------------


def wordings(split: str) -> set[str]:
    return {
        text
        for style in STYLES[split]
        for text in (style.opens, *style.moves, style.weak, style.toll, style.status, style.asks)
    }


def test_splits_share_no_opponent_no_name_and_no_wording() -> None:
    for a, b in itertools.combinations(SPLITS, 2):
        assert not set(NAMES[a]) & set(NAMES[b])
        assert not wordings(a) & wordings(b)
        assert not {o.id for o in make_opponents(a)} & {o.id for o in make_opponents(b)}  # type: ignore[arg-type]
    for split, names in NAMES.items():
        examples = TextBattle(split=split).examples  # type: ignore[arg-type]
        assert len(examples) == len(names) * len(FOES)
        assert len({o.unit for o in examples}) == len(FOES), "a name changes no score"
        assert len(wordings(split)) == 9 * len(STYLES[split])  # none twice within a split either


def test_evenly_spaced_examples_are_of_every_kind() -> None:
    """Evaluations of a part of a split take these."""
    for split in SPLITS:
        examples = make_opponents(split)
        for step in (2, 3, 4, 5):
            kinds = [o.foe.kind for o in examples[::step]]
            assert min(map(kinds.count, KINDS)) > 0
            assert max(map(kinds.count, KINDS)) < 0.6 * len(kinds)


# --- features ------------------------------------------------------------------------------------


def column(features: Any, name: str) -> list[float]:
    found: list[float] = features[:, FEATURE_NAMES.index(name)].tolist()
    return found


def test_features_by_hand() -> None:
    battle = Battle(15, 24, 2, 0, turn=5, last=(CHARGE, STRIKE), counts=(0, 3, 0, 2))
    features = battle_features(DEFAULT_RULES, battle, (STRIKE, CHARGE, STRIKE, GUARD, STRIKE))
    assert features.shape == (4, len(FEATURE_NAMES)) == (4, 22)
    assert_array_equal(features[:, :4], np.eye(4))
    assert_allclose(column(features, "energy_after"), [2 / 3, 1 / 3, 2 / 3, 1])
    # Own strike, heavy blow (with energy), guard, charge against each move (a heavy one is weak).
    changes = {"strike": [0, 4, 2, -2], "heavy": [1, 5, 0, -1], "guard": [-2, 2, 0, 0]}
    changes["charge"] = [2, 6, 0, 0]
    scores = {move: [0.5 + change / 12 for change in row] for move, row in changes.items()}
    for move, row in scores.items():
        assert_allclose(column(features, f"if/{move}"), row)
    assert_allclose(column(features, "guess/repeat"), scores["strike"])
    assert_allclose(
        column(features, "guess/follow"), scores["guard"]
    )  # after its last strike but one
    assert_allclose(column(features, "guess/copy"), scores["charge"])
    # Heavy blows were most often: guard against them (-2 of 6), as a weak blow takes but 1.
    assert_allclose(column(features, "guess/answer"), scores["guard"])
    for name, value in {
        "foe_last/strike": 1,
        "foe_last/heavy": 0,
        "foe_last/guard": 0,
        "foe_last/charge": 0,
        "health": 1 / 2,
        "foe_health": 4 / 5,
        "energy": 2 / 3,
        "foe_energy": 0,
        "turn": 5 / 8,
    }.items():
        assert_allclose(column(features, name), [value] * 4)


def test_features_before_anything_was_seen() -> None:
    features = battle_features(DEFAULT_RULES, opening(DEFAULT_RULES), ())
    mean = features[:, [FEATURE_NAMES.index(f"if/{m.word}") for m in MOVES]].mean(1)
    for guess in ("repeat", "follow", "copy", "answer"):
        assert_allclose(column(features, f"guess/{guess}"), mean)
    assert not any(any(column(features, f"foe_last/{m.word}")) for m in MOVES)
    once = Battle(30, 28, 1, 1, turn=1, last=(STRIKE, CHARGE), counts=(1, 0, 0, 0))
    features = battle_features(DEFAULT_RULES, once, (CHARGE,))  # nothing has followed it yet
    mean = features[:, [FEATURE_NAMES.index(f"if/{m.word}") for m in MOVES]].mean(1)
    assert_allclose(column(features, "guess/follow"), mean)


@settings(max_examples=60, deadline=None)
@given(moves=picks, foe=st.sampled_from(FOES), max_turns=st.integers(1, 20))
def test_what_an_opponent_does_has_a_column_that_foretold_its_scores(
    moves: list[Move], foe: Any, max_turns: int
) -> None:
    steps, episode = through(TextBattle(max_turns=max_turns), Opponent(foe, "Ada", STYLE), moves)
    for step, move in zip(steps, episode.state.foe_moves, strict=True):
        features = step.observation["features"]
        assert features.dtype == np.float32
        assert 0 <= features.min() <= features.max() <= 1
        assert_allclose(column(features, f"if/{move.word}"), step.scores, rtol=1e-6)
        if foe.kind == "exploiter" and step is not steps[0]:
            assert_allclose(column(features, "guess/answer"), step.scores, rtol=1e-6)
        if foe.kind == "mirror" and step is not steps[0]:
            assert_allclose(column(features, "guess/copy"), step.scores, rtol=1e-6)


# --- reference players ---------------------------------------------------------------------------


def documented() -> dict[str, float]:
    rows = re.findall(r"^ +(\w.*?) +(0\.\d{3})$", str(TextBattle.__doc__), re.MULTILINE)
    return {text: float(number) for text, number in rows}


def test_the_documented_scores_are_exact() -> None:
    rules = DEFAULT_RULES
    single = {move: mean_score(rules, FOES, lambda *_, m=move: surely(m)) for move in MOVES}  # type: ignore[misc]
    assert max(single, key=lambda m: single[m]) == GUARD
    found = {
        "at random": mean_score(rules, FOES, random_policy),
        "one move": single[GUARD],
        "one response": mean_score(rules, FOES, response_policy(FIRST_MOVE, RESPONSES)),
        "the best move of each round": mean_score(rules, FOES, greedy_policy),
        "the best play, the opponent's pattern hidden": bayes_score(rules, FOES),
        "the best play, the opponent's pattern known": sum(
            optimal_score(rules, foe) for foe in FOES
        )
        / len(FOES),
    }
    rows = documented()
    assert len(rows) == len(found)
    for (text, number), (begins, score) in zip(rows.items(), found.items(), strict=True):
        assert text.startswith(begins)
        assert number == round(score, 3)
    assert list(rows.values()) == sorted(rows.values())


@pytest.mark.slow
def test_no_other_fixed_responses_score_better() -> None:
    assert best_responses(DEFAULT_RULES, FOES) == (FIRST_MOVE, RESPONSES)


@pytest.mark.parametrize("split", SPLITS)
def test_the_heuristic_and_the_oracle_score_what_the_rules_say(split: Any) -> None:
    task = TextBattle(split=split)
    found: dict[str, list[float]] = {"response": [], "oracle": []}
    for opponent in task.examples:
        steps, _ = session(task, opponent, fixed_response)
        found["response"].append(float(np.mean([step.outcome.score for step in steps])))
        episode = task.begin(opponent, np.random.default_rng(0))
        scores = []
        while not episode.finished:
            action = int(np.argmax(task.candidate_scores(episode)))  # type: ignore[arg-type]
            [outcome] = task.score([episode], [action])
            play.apply(task, episode, action, outcome)
            scores.append(outcome.score)
        found["oracle"].append(float(np.mean(scores)))  # type: ignore[arg-type]
    rules = DEFAULT_RULES
    responses = mean_score(rules, FOES, response_policy(FIRST_MOVE, RESPONSES))
    assert np.mean(found["response"]) == pytest.approx(responses)
    assert np.mean(found["oracle"]) == pytest.approx(mean_score(rules, FOES, greedy_policy))


# --- arguments -----------------------------------------------------------------------------------


def test_opponents_can_be_chosen() -> None:
    mirrors = TextBattle(opponents="mirror").examples
    assert {o.foe for o in mirrors} == {Mirror(move) for move in MOVES}
    both = TextBattle(opponents=["mirror", "cyclic"]).examples
    assert {o.foe.kind for o in both} == {"mirror", "cyclic"}
    assert TextBattle(opponents=KINDS).examples == TextBattle().examples
    env = gym.make("TextBattle-v0", opponents=["cautious"])
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
    assert {o.foe.kind for o in again.unwrapped.task.examples} == {"cautious"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"opponents": "miror"}, ValueError, "'miror'. Did you mean 'mirror'?"),
        ({"opponents": ["cyclic", "boss"]}, ValueError, "'boss'"),
        ({"opponents": ()}, ValueError, "empty"),
        ({"opponents": 3}, TypeError, "opponents is 3"),
        ({"opponents": [3]}, TypeError, "opponents is [3]"),
        ({"dataset": "duel"}, ValueError, "Did you mean 'duels'?"),
        ({"split": "tests"}, ValueError, "Did you mean 'test'?"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(wrong: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        TextBattle(**wrong)


# --- as environments -----------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"opponents": ("mirror",), "max_turns": 12}], ids=str)
@pytest.mark.filterwarnings("error")
def test_gymnasium_accepts_it(arguments: dict[str, Any]) -> None:
    check_env(gym.make("TextBattle-v0", split="test", **arguments).unwrapped)


def test_rewards_add_up_to_the_final_advantage() -> None:
    env = gym.make("TextBattle-v0", split="validation")
    for seed in range(10):
        env.reset(seed=seed)
        rewards, terminated = [], False
        while not terminated:
            _, reward, terminated, truncated, _ = env.step(seed * len(rewards) % 4)
            assert truncated is False
            rewards.append(reward)
        assert len(rewards) == 8
        battle = env.unwrapped.episode.state.battle  # type: ignore[attr-defined]
        assert sum(map(float, rewards)) == pytest.approx(battle.advantage / 6)


def test_an_episode_hangs_on_the_example_and_the_moves_alone() -> None:
    env = gym.make("TextBattle-v0")
    seen = []
    for seed in (1, 2):
        steps = [env.reset(seed=seed, options={"example": 5})[0]]
        steps += [env.step(turn % 4)[0] for turn in range(8)]
        seen.append([shown(step) for step in steps])
    assert seen[0] == seen[1]
    assert env.reset(seed=1)[1]["example_id"] != env.reset(seed=2)[1]["example_id"]


def test_the_vector_form_plays_the_same() -> None:
    arguments: dict[str, Any] = {"split": "test", "max_turns": 3}
    seeds = [11, 12, 13]
    many = gym.make_vec(
        "TextBattle-v0",
        num_envs=3,
        vectorization_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT,
        **arguments,
    )
    single = [gym.make("TextBattle-v0", **arguments) for _ in seeds]
    together, _ = many.reset(seed=seeds)
    alone = [env.reset(seed=seed)[0] for env, seed in zip(single, seeds, strict=True)]
    rng = np.random.default_rng(0)
    for _ in range(9):
        for i, observation in enumerate(alone):
            assert together["prompt"][i] == observation["prompt"]
            assert tuple(texts[i] for texts in together["candidates"]) == observation["candidates"]
            assert_array_equal(together["features"][i], observation["features"])
        actions = rng.integers(4, size=3)
        together, rewards, terminated, _, _ = many.step(actions)
        for i, env in enumerate(single):
            alone[i], reward, ended, _, _ = env.step(actions[i])
            assert rewards[i] == reward
            assert terminated[i] == ended
            if ended:
                alone[i] = env.reset()[0]
