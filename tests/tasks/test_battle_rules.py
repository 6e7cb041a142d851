"""The rules of battle: what no play can break, and exact values against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_envs.tasks.battle_rules import (
    DEFAULT_RULES,
    FOES,
    KINDS,
    MOVES,
    Aggressive,
    Battle,
    Cautious,
    Cyclic,
    Exploiter,
    Foe,
    Mirror,
    Move,
    Rules,
    after,
    battle_score,
    bayes_score,
    best_answer,
    best_plan,
    best_responses,
    damage,
    energy_after,
    expected_score,
    greedy_policy,
    is_over,
    mean_score,
    move_scores,
    opening,
    optimal_score,
    random_policy,
    resolve,
    response_policy,
    round_score,
    surely,
)

STRIKE, HEAVY, GUARD, CHARGE = MOVES
SMALL = Rules(rounds=4, health=7)  # short enough for brute force, and sides fall in it
moves = st.sampled_from(MOVES)
each_foe = pytest.mark.parametrize("foe", FOES, ids=lambda foe: foe.name)


@st.composite
def all_rules(draw: st.DrawFn) -> Rules:
    heavy = draw(st.integers(1, 9))
    most = draw(st.integers(0, 4))
    less = st.integers(0, heavy)
    return Rules(
        rounds=draw(st.integers(1, 12)),
        health=draw(st.integers(1, 30)),
        energy=draw(st.integers(0, most)),
        most_energy=most,
        cost=draw(st.integers(1, 4)),
        heavy=heavy,
        strike=draw(less),
        weak=draw(less),
        pierce=draw(less),
        riposte=draw(less),
    )


def fight(rules: Rules, own: Sequence[Move], its: Sequence[Move]) -> list[Battle]:
    """Return the battle before each round and at the end."""
    seen = [opening(rules)]
    for a, b in zip(own, its, strict=True):
        if is_over(rules, seen[-1]):
            break
        seen.append(resolve(rules, seen[-1], a, b))
    return seen


# --- rounds --------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(moves, moves), min_size=12, max_size=12)


@given(rules=all_rules(), played=pairs)
def test_no_play_leaves_the_rules(rules: Rules, played: list[tuple[Move, Move]]) -> None:
    seen = fight(rules, *zip(*played, strict=True))
    assert is_over(rules, seen[-1])
    for turn, (before, battle) in enumerate(itertools.pairwise(seen)):
        own, its = played[turn]
        assert not is_over(rules, before)
        assert battle.turn == turn + 1
        assert battle.last == (own, its)
        assert battle.counts == tuple([a for a, _ in played[: turn + 1]].count(m) for m in MOVES)
        for health, earlier in (
            (battle.health, before.health),
            (battle.foe_health, before.foe_health),
        ):
            assert 0 <= health <= earlier <= rules.health
            assert earlier - health <= rules.heavy
        for energy in (battle.energy, battle.foe_energy):
            assert 0 <= energy <= rules.most_energy
    with pytest.raises(ValueError, match="over"):
        resolve(rules, seen[-1], GUARD, GUARD)


@given(rules=all_rules(), played=pairs)
def test_energy_comes_from_charges_and_goes_into_heavy_blows(
    rules: Rules, played: list[tuple[Move, Move]]
) -> None:
    for side in ("energy", "foe_energy"):
        for before, battle in itertools.pairwise(fight(rules, *zip(*played, strict=True))):
            assert battle.last is not None
            move = battle.last[side == "foe_energy"]
            held, left = getattr(before, side), getattr(battle, side)
            stored = int(move == CHARGE and held < rules.most_energy)
            spent = rules.cost if move == HEAVY and held >= rules.cost else 0
            assert left == held + stored - spent


@given(rules=all_rules(), played=pairs)
def test_the_advantage_is_the_sum_of_what_was_dealt_less_what_was_taken(
    rules: Rules, played: list[tuple[Move, Move]]
) -> None:
    seen = fight(rules, *zip(*played, strict=True))
    total, scores = 0, []
    for before, battle in itertools.pairwise(seen):
        assert battle.last is not None
        own, its = battle.last
        dealt = damage(rules, own, before.energy >= rules.cost, its)
        taken = damage(rules, its, before.foe_energy >= rules.cost, own)
        change = min(dealt, before.foe_health) - min(taken, before.health)
        assert battle.advantage - before.advantage == change
        total += change
        scores.append(round_score(rules, before, battle))
        assert 0.0 <= scores[-1] <= 1.0
        assert scores[-1] == pytest.approx((change / rules.heavy + 1) / 2)
    assert seen[-1].advantage == total
    assert battle_score(rules, seen[-1]) == pytest.approx(sum(scores) / len(scores))


@given(rules=all_rules(), played=pairs)
def test_both_sides_have_the_same_rules(rules: Rules, played: list[tuple[Move, Move]]) -> None:
    own, its = zip(*played, strict=True)
    for a, b in zip(fight(rules, own, its), fight(rules, its, own), strict=True):
        assert (a.health, a.foe_health) == (b.foe_health, b.health)
        assert (a.energy, a.foe_energy) == (b.foe_energy, b.energy)


def test_the_table_of_damage_by_hand() -> None:
    table = {
        (STRIKE, True): (2, 2, 0, 2),
        (STRIKE, False): (2, 2, 0, 2),
        (HEAVY, True): (6, 6, 2, 6),
        (HEAVY, False): (1, 1, 0, 1),
        (GUARD, True): (2, 0, 0, 0),
        (GUARD, False): (2, 0, 0, 0),
        (CHARGE, True): (0, 0, 0, 0),
        (CHARGE, False): (0, 0, 0, 0),
    }
    for (move, powered), dealt in table.items():
        assert tuple(damage(DEFAULT_RULES, move, powered, m) for m in MOVES) == dealt
    after_each = [[energy_after(DEFAULT_RULES, e, m) for m in MOVES] for e in range(4)]
    assert after_each == [[0, 0, 0, 1], [1, 0, 1, 2], [2, 1, 2, 3], [3, 2, 3, 3]]


def test_the_bounds_of_the_score_are_reached_exactly() -> None:
    start = opening(DEFAULT_RULES)
    best = resolve(DEFAULT_RULES, start, HEAVY, CHARGE)
    worst = resolve(DEFAULT_RULES, start, CHARGE, HEAVY)
    even = resolve(DEFAULT_RULES, start, HEAVY, HEAVY)
    assert [round_score(DEFAULT_RULES, start, b) for b in (best, worst, even)] == [1.0, 0.0, 0.5]


def test_a_blow_takes_no_more_health_than_there_is() -> None:
    start = replace(opening(DEFAULT_RULES), health=1, foe_health=4)
    end = resolve(DEFAULT_RULES, start, HEAVY, STRIKE)
    assert (end.health, end.foe_health) == (0, 0)
    assert round_score(DEFAULT_RULES, start, end) == 0.5 + 3 / 12
    assert is_over(DEFAULT_RULES, end)


def test_nobody_can_fall_in_the_default_rounds() -> None:
    """A side that only charges takes the most; the best play against it is the most damage."""
    most = 2 * 6 * 8 * (optimal_score(DEFAULT_RULES, Cyclic((CHARGE,))) - 0.5)
    assert round(most) == pytest.approx(most) == 26 < DEFAULT_RULES.health


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0},
        {"health": 0},
        {"cost": 0},
        {"heavy": 0},
        {"energy": 4},
        {"energy": -1},
        {"strike": 7},
        {"riposte": -1},
    ],
    ids=str,
)
def test_rules_that_make_no_battle_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Rules(**wrong)


# --- opponents -----------------------------------------------------------------------------------


def test_there_are_four_different_opponents_of_each_kind() -> None:
    assert KINDS == ("aggressive", "cautious", "cyclic", "mirror", "exploiter")
    assert [[foe.kind for foe in FOES].count(kind) for kind in KINDS] == [4] * 5
    assert len({foe.name for foe in FOES}) == len(FOES) == 20
    played = set()
    for foe in FOES:  # no two fight alike whatever one does
        seen = []
        for own in itertools.product(MOVES, repeat=4):
            battle = opening(DEFAULT_RULES)
            for move in own:
                battle = after(DEFAULT_RULES, foe, battle, move)
                seen.append(battle.last)
        played.add(tuple(seen))
    assert len(played) == 20


@each_foe
@given(played=pairs)
def test_opponents_see_no_more_than_what_happened(
    foe: Foe, played: list[tuple[Move, Move]]
) -> None:
    """The move of a round is fixed before the own move, and hangs on what was seen alone."""
    rules = replace(DEFAULT_RULES, rounds=12)
    battle = opening(rules)
    past: list[tuple[Move, Move]] = []
    for own, _ in played:
        if is_over(rules, battle):
            break
        move = foe.move(rules, battle)
        for other in MOVES:
            assert after(rules, foe, battle, other).last == (other, move)
        battle = after(rules, foe, battle, own)
        past.append((own, move))
        replayed = fight(rules, *zip(*past, strict=True))[-1]
        assert replayed == battle
        if not is_over(rules, battle):
            assert foe.move(rules, replayed) == foe.move(rules, battle)


def against(foe: Foe, own: Sequence[Move], rules: Rules = DEFAULT_RULES) -> list[Move]:
    """Return the moves of an opponent against a sequence."""
    battle, seen = opening(rules), []
    for move in own:
        battle = after(rules, foe, battle, move)
        assert battle.last is not None
        seen.append(battle.last[1])
    return seen


def test_opponents_by_hand() -> None:
    still = [GUARD] * 6
    assert against(Aggressive(3), still) == [HEAVY, STRIKE, CHARGE, HEAVY, STRIKE, CHARGE]
    # One energy makes the wary guard; a heavy blow spends it, and they save up to two.
    own = [GUARD, HEAVY, GUARD, GUARD, GUARD, CHARGE]
    assert against(Cautious(1, 2), own) == [GUARD, GUARD, CHARGE, HEAVY, CHARGE, HEAVY]
    assert against(Cautious(2, 3), own) == [CHARGE, CHARGE, HEAVY, CHARGE, HEAVY, CHARGE]
    assert against(Cyclic((GUARD, CHARGE, HEAVY)), still) == [GUARD, CHARGE, HEAVY] * 2
    own = [CHARGE, HEAVY, GUARD, STRIKE, STRIKE, GUARD]
    assert against(Mirror(STRIKE), own) == [STRIKE, *own[:-1]]
    # It expects a guard, which a heavy blow pierces; it charges when it has no energy for one.
    own = [GUARD, GUARD, CHARGE, CHARGE, STRIKE, STRIKE]
    assert against(Exploiter(STRIKE), own) == [STRIKE, HEAVY, CHARGE, HEAVY, CHARGE, HEAVY]
    assert against(Exploiter(CHARGE), [STRIKE] * 5) == [CHARGE, HEAVY, HEAVY, GUARD, GUARD]


@given(
    counts=st.tuples(*[st.integers(0, 4)] * 4),
    energy=st.integers(0, 3),
    foe_energy=st.integers(0, 3),
)
def test_the_best_answer_is_the_best(counts: Any, energy: int, foe_energy: int) -> None:
    battle = replace(opening(DEFAULT_RULES), counts=counts, energy=energy, foe_energy=foe_energy)
    expected = Move(counts.index(max(counts)))
    answer = best_answer(DEFAULT_RULES, battle)
    advantages = {m: resolve(DEFAULT_RULES, battle, expected, m).advantage for m in MOVES}
    assert advantages[answer] == min(advantages.values())


# --- exact values --------------------------------------------------------------------------------


@cache
def endings(
    foe: Foe, rules: Rules = SMALL
) -> dict[tuple[Move, ...], tuple[float, tuple[Move, ...]]]:
    """Return, for every sequence of own moves, the mean round score and the opponent's moves."""
    found = {}
    for own in itertools.product(MOVES, repeat=rules.rounds):
        battle, scores, seen = opening(rules), [], []
        for move in own:
            if is_over(rules, battle):
                break
            then = after(rules, foe, battle, move)
            assert then.last is not None
            scores.append(round_score(rules, battle, then))
            seen.append(then.last[1])
            battle = then
        found[own] = sum(scores) / len(scores), tuple(seen)
    return found


@each_foe
def test_the_optimum_is_that_of_all_sequences(foe: Foe) -> None:
    best = max(score for score, _ in endings(foe).values())
    assert optimal_score(SMALL, foe) == pytest.approx(best)


@each_foe
def test_random_play_has_the_mean_of_all_sequences(foe: Foe) -> None:
    scores = [score for score, _ in endings(foe).values()]
    found = expected_score(SMALL, foe, random_policy)
    assert found == pytest.approx(sum(scores) / len(scores))


@each_foe
def test_greedy_play_is_the_sequence_of_best_rounds(foe: Foe) -> None:
    battle, scores = opening(SMALL), []
    while not is_over(SMALL, battle):
        each = move_scores(SMALL, foe, battle)
        tried = [after(SMALL, foe, battle, m) for m in MOVES]
        assert each == tuple(round_score(SMALL, battle, t) for t in tried)
        scores.append(max(each))
        battle = tried[each.index(max(each))]
    assert expected_score(SMALL, foe, greedy_policy) == pytest.approx(sum(scores) / len(scores))


def hidden_by_brute_force(foes: Sequence[Foe], rules: Rules) -> float:
    """Return the best expected score over all plans, a plan being a tree of own moves."""

    def best(belief: Sequence[Foe], own: tuple[Move, ...]) -> float:
        """Return the sum of the scores of the belief under the best plan from here on."""
        ended = [foe for foe in belief if len(endings(foe, rules)[pad(own)][1]) == len(own)]
        if ended and own:  # the same was seen of all of them
            assert len(ended) == len(belief)
            return sum(endings(foe, rules)[pad(own)][0] for foe in belief)
        totals = []
        for move in MOVES:
            path = (*own, move)
            parts: dict[Move, list[Foe]] = {}
            for foe in belief:
                seen = endings(foe, rules)[pad(path)][1]
                parts.setdefault(seen[len(own)], []).append(foe)
            totals.append(sum(best(part, path) for part in parts.values()))
        return max(totals)

    def pad(own: tuple[Move, ...]) -> tuple[Move, ...]:
        return own + (GUARD,) * (rules.rounds - len(own))

    return best(foes, ()) / len(foes)


@pytest.mark.parametrize("rules", [Rules(rounds=3, health=7), Rules(rounds=4)], ids=["3", "4"])
@pytest.mark.parametrize(
    "foes",
    [FOES[:4], FOES[::3], (Mirror(STRIKE), Exploiter(STRIKE), Cyclic((STRIKE, CHARGE)))],
    ids=["aggressive", "mixed", "alike at first"],
)
def test_hidden_opponents_are_played_as_well_as_any_plan(
    rules: Rules, foes: tuple[Foe, ...]
) -> None:
    if rules.health == 7:  # falling at different times is told apart by what was seen
        assert any(len(seen) < 3 for foe in FOES for _, seen in endings(foe, rules).values())
    assert bayes_score(rules, foes) == pytest.approx(hidden_by_brute_force(foes, rules))


@each_foe
def test_who_knows_more_and_looks_further_scores_more(foe: Foe) -> None:
    at_random = expected_score(DEFAULT_RULES, foe, random_policy)
    greedy = expected_score(DEFAULT_RULES, foe, greedy_policy)
    optimal = optimal_score(DEFAULT_RULES, foe)
    assert at_random + 0.02 < greedy <= optimal


def test_hidden_and_known_opponents_bound_each_other() -> None:
    """A hidden kind costs something, and one that is told as it is nothing."""
    foes = FOES[::2]
    known = sum(optimal_score(SMALL, foe) for foe in foes) / len(foes)
    assert mean_score(SMALL, foes, random_policy) < bayes_score(SMALL, foes) < known
    assert bayes_score(SMALL, foes[:1]) == optimal_score(SMALL, foes[0])
    assert bayes_score(SMALL, foes[:1] * 3) == pytest.approx(optimal_score(SMALL, foes[0]))


def test_the_best_responses_are_the_best_of_all() -> None:
    rules = Rules(rounds=3)
    foes = FOES[::5]
    first, responses = best_responses(rules, foes)
    best = mean_score(rules, foes, response_policy(first, responses))
    for table in itertools.product(MOVES, repeat=5):
        assert mean_score(rules, foes, response_policy(table[0], table[1:])) <= best
    assert best > mean_score(rules, foes, lambda *_: surely(first))


@pytest.mark.parametrize("foe", FOES, ids=lambda foe: foe.name)
def test_the_best_plan_comes_to_the_optimal_score(foe: Foe) -> None:
    battle = opening(DEFAULT_RULES)
    for move in best_plan(DEFAULT_RULES, foe):
        battle = after(DEFAULT_RULES, foe, battle, move)
    assert is_over(DEFAULT_RULES, battle)
    assert battle_score(DEFAULT_RULES, battle) == pytest.approx(optimal_score(DEFAULT_RULES, foe))
