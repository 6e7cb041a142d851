"""The rules of a turn-based battle, opponents with a pattern each, and exact best play.

Pure functions of whole numbers; `TextBattle` tells them in words.

Both sides choose one of four moves at once. With the default `Rules`, what the move of a row does
to the other side, against the move of a column:

=================  ======  =====  =====  ======
damage dealt by    strike  heavy  guard  charge
=================  ======  =====  =====  ======
strike                  2      2      0       2
heavy, with energy      6      6      2       6
heavy, without          1      1      0       1
guard                   2      0      0       0
charge                  0      0      0       0
=================  ======  =====  =====  ======

A charge stores 1 energy (at most 3), and a heavy blow spends 1. Every move is always legal. An
opponent chooses before it knows the other move of the round, and is a deterministic function of
what both sides have seen. So the scores of all moves of a round are known exactly, and the best
play of a whole battle is found by dynamic programming.

An episode scores the mean over its rounds of the change in advantage (own health - the opponent's),
mapped from ±heavy to [0, 1]. The changes add up, so after T rounds that is

    score = 1/2 + advantage / (2 · heavy · T)

whatever the way there; this is what `optimal_score`, `bayes_score` and `expected_score` find.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache, lru_cache, partial
from typing import ClassVar, Final, Literal, Protocol


class Move(IntEnum):
    """What a side can do in a round."""

    STRIKE = 0
    HEAVY = 1
    GUARD = 2
    CHARGE = 3

    __hash__ = int.__hash__  # that of enumerations is slow, and memories of battles need many

    @property
    def word(self) -> str:
        """``strike``, ``heavy``, ``guard`` or ``charge``."""
        return self.name.lower()


MOVES: Final = tuple(Move)

# --- the rules -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """The numbers of a battle.

    Attributes:
        rounds: It ends after that many rounds.
        health: What both sides begin with; it ends when a side has none.
        energy: What both sides begin with.
        most_energy: What a side can hold.
        cost: Energy that a heavy blow spends.
        strike: Damage of a strike that meets no guard.
        heavy: Damage of a heavy blow that meets no guard.
        weak: The same when there is too little energy for it.
        pierce: Damage of a heavy blow through a guard.
        riposte: Damage that a guard gives back to a strike.

    Raises:
        ValueError: A number makes no battle, or a heavy blow is not the most that can happen.
    """

    rounds: int = 8
    health: int = 30
    energy: int = 1
    most_energy: int = 3
    cost: int = 1
    strike: int = 2
    heavy: int = 6
    weak: int = 1
    pierce: int = 2
    riposte: int = 2

    def __post_init__(self) -> None:
        """Refuse what makes no battle."""
        if min(self.rounds, self.health, self.cost, self.heavy) < 1:
            raise ValueError(f"{self}: rounds, health, cost and heavy have to be 1 or more.")
        if not 0 <= self.energy <= self.most_energy:
            raise ValueError(f"{self}: energy has to lie between 0 and most_energy.")
        others = self.strike, self.weak, self.pierce, self.riposte
        if min(others) < 0 or max(others) > self.heavy:
            raise ValueError(f"{self}: no damage may be negative or above heavy, which bounds all.")


DEFAULT_RULES: Final = Rules()


@dataclass(frozen=True, slots=True)
class Battle:
    """All that both sides have seen and that matters from here on.

    Attributes:
        health: Own health.
        foe_health: The opponent's.
        energy: Own energy.
        foe_energy: The opponent's.
        turn: Number of rounds fought.
        last: Own move and the opponent's in the last round; ``None`` before the first.
        counts: How often each of `MOVES` was the own move.
    """

    health: int
    foe_health: int
    energy: int
    foe_energy: int
    turn: int = 0
    last: tuple[Move, Move] | None = None
    counts: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def advantage(self) -> int:
        """Own health less the opponent's."""
        return self.health - self.foe_health


def opening(rules: Rules) -> Battle:
    """Return the battle before its first round."""
    return Battle(rules.health, rules.health, rules.energy, rules.energy)


def is_over(rules: Rules, battle: Battle) -> bool:
    """Tell whether the rounds are fought or a side has fallen."""
    return battle.turn >= rules.rounds or battle.health == 0 or battle.foe_health == 0


def damage(rules: Rules, move: Move, powered: bool, against: Move) -> int:
    """Return what a move does to a side that has plenty of health.

    Args:
        rules: The rules.
        move: The move.
        powered: Whether there is the energy for a heavy blow.
        against: What the other side does in the same round.
    """
    guarded = against == Move.GUARD
    if move == Move.STRIKE:
        return 0 if guarded else rules.strike
    if move == Move.HEAVY and powered:
        return rules.pierce if guarded else rules.heavy
    if move == Move.HEAVY:
        return 0 if guarded else rules.weak
    if move == Move.GUARD:
        return rules.riposte if against == Move.STRIKE else 0
    return 0


def energy_after(rules: Rules, energy: int, move: Move) -> int:
    """Return what a side holds after its move: a charge stores 1, a heavy blow spends its cost."""
    if move == Move.CHARGE:
        return min(energy + 1, rules.most_energy)
    return energy - rules.cost if move == Move.HEAVY and energy >= rules.cost else energy


def resolve(rules: Rules, battle: Battle, move: Move, foe_move: Move) -> Battle:
    """Return the battle after a round in which both sides moved at once.

    Raises:
        ValueError: The battle is over.
    """
    if is_over(rules, battle):
        raise ValueError(f"The battle is over: {battle}.")
    dealt = damage(rules, move, battle.energy >= rules.cost, foe_move)
    taken = damage(rules, foe_move, battle.foe_energy >= rules.cost, move)
    counts = battle.counts
    return Battle(
        health=max(battle.health - taken, 0),
        foe_health=max(battle.foe_health - dealt, 0),
        energy=energy_after(rules, battle.energy, move),
        foe_energy=energy_after(rules, battle.foe_energy, foe_move),
        turn=battle.turn + 1,
        last=(move, foe_move),
        counts=(*counts[:move], counts[move] + 1, *counts[move + 1 :]),  # type: ignore[arg-type]
    )


def round_score(rules: Rules, before: Battle, after: Battle) -> float:
    """Return the change in advantage of a round, mapped from ±heavy to [0, 1]."""
    return 0.5 + (after.advantage - before.advantage) / (2 * rules.heavy)


def battle_score(rules: Rules, battle: Battle) -> float:
    """Return the mean of `round_score` over the rounds fought, at least one."""
    return 0.5 + battle.advantage / (2 * rules.heavy * battle.turn)


# --- opponents -----------------------------------------------------------------------------------


Memory = Literal["last", "counts"]
"""What of a `Battle` an opponent can look at, beside how both stand and the round."""


class Foe(Protocol):
    """An opponent: a pure function of what both sides have seen."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        ...

    @property
    def remembers(self) -> tuple[Memory, ...]:
        """What it looks at beside how both stand and the round."""
        ...

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        ...

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Aggressive:
    """Always attacks, as heavily as it can, and takes a breath in every few rounds.

    Attributes:
        breath: It charges in each ``breath``-th round in which it has no energy.
    """

    kind: ClassVar[str] = "aggressive"
    remembers: ClassVar[tuple[Memory, ...]] = ()
    breath: int

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        return f"{self.kind}-{self.breath}"

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        if battle.foe_energy >= rules.cost:
            return Move.HEAVY
        return Move.CHARGE if (battle.turn + 1) % self.breath == 0 else Move.STRIKE


@dataclass(frozen=True, slots=True)
class Cautious:
    """Guards against energy that could hit it, and saves until it has enough itself.

    Attributes:
        wary: It guards once the other side holds that much energy,
        reserve: unless it holds that much itself; then it spends it.
    """

    kind: ClassVar[str] = "cautious"
    remembers: ClassVar[tuple[Memory, ...]] = ()
    wary: int
    reserve: int

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        return f"{self.kind}-{self.wary}-{self.reserve}"

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        if battle.foe_energy >= self.reserve:
            return Move.HEAVY
        return Move.GUARD if battle.energy >= self.wary else Move.CHARGE


@dataclass(frozen=True, slots=True)
class Cyclic:
    """Goes through the same moves again and again.

    Attributes:
        cycle: The moves.
    """

    kind: ClassVar[str] = "cyclic"
    remembers: ClassVar[tuple[Memory, ...]] = ()
    cycle: tuple[Move, ...]

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        return "-".join((self.kind, *(move.word for move in self.cycle)))

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        return self.cycle[battle.turn % len(self.cycle)]


@dataclass(frozen=True, slots=True)
class Mirror:
    """Does what the other side did in the last round.

    Attributes:
        first: Its first move.
    """

    kind: ClassVar[str] = "mirror"
    remembers: ClassVar[tuple[Memory, ...]] = ("last",)
    first: Move

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        return f"{self.kind}-{self.first.word}"

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        return self.first if battle.last is None else battle.last[0]


@dataclass(frozen=True, slots=True)
class Exploiter:
    """Answers what the other side has done most often as well as it can.

    Attributes:
        first: Its first move.
    """

    kind: ClassVar[str] = "exploiter"
    remembers: ClassVar[tuple[Memory, ...]] = ("counts",)
    first: Move

    @property
    def name(self) -> str:
        """The kind and its parameters."""
        return f"{self.kind}-{self.first.word}"

    def move(self, rules: Rules, battle: Battle) -> Move:
        """Return its move of the round that is due."""
        return best_answer(rules, battle) if battle.turn else self.first


def best_answer(rules: Rules, battle: Battle) -> Move:
    """Return the opponent's best move against the own move that was made most often.

    It looks at damage of this round alone; of equals it takes the one that leaves it the most
    energy, then the first. Of own moves that were made equally often it expects the first.
    """
    expected = Move(max(MOVES, key=lambda move: battle.counts[move]))
    powered, foe_powered = battle.energy >= rules.cost, battle.foe_energy >= rules.cost

    def worth(answer: Move) -> tuple[int, int]:
        dealt = damage(rules, answer, foe_powered, expected)
        taken = damage(rules, expected, powered, answer)
        return dealt - taken, energy_after(rules, battle.foe_energy, answer)

    return max(MOVES, key=worth)


_S, _H, _G, _C = MOVES

FOES: Final[tuple[Foe, ...]] = (
    *(Aggressive(breath) for breath in (2, 3, 4, 5)),
    *(Cautious(wary, reserve) for wary in (1, 2) for reserve in (2, 3)),
    *(Cyclic(cycle) for cycle in ((_C, _H), (_S, _G), (_G, _C, _H), (_S, _C, _H, _G))),
    *(Mirror(first) for first in MOVES),
    *(Exploiter(first) for first in MOVES),
)
"""Every opponent that there is: four of each kind."""

KINDS: Final = tuple(dict.fromkeys(foe.kind for foe in FOES))
"""Every kind of opponent."""


# --- exact values --------------------------------------------------------------------------------

Policy = Callable[[Rules, Foe, Battle], Sequence[float]]
"""From a battle to the probability of each of `MOVES`; only oracles look at the opponent."""


def after(rules: Rules, foe: Foe, battle: Battle, move: Move) -> Battle:
    """Return the battle after a round against an opponent."""
    return resolve(rules, battle, move, foe.move(rules, battle))


def move_scores(rules: Rules, foe: Foe, battle: Battle) -> tuple[float, ...]:
    """Return the score that each of `MOVES` has in the round that is due."""
    return tuple(round_score(rules, battle, after(rules, foe, battle, move)) for move in MOVES)


def optimal_score(rules: Rules, foe: Foe) -> float:
    """Return the score of the best play by somebody who knows the opponent: an upper bound.

    By dynamic programming over battles, whose payoff is `battle_score` at their end.
    """
    return bayes_score(rules, (foe,))


@lru_cache(maxsize=1024)
def best_plan(rules: Rules, foe: Foe) -> tuple[Move, ...]:
    """Return the moves of a whole battle that come to `optimal_score`, the first of equals.

    Opponents are deterministic, so that all of them can be planned before the first.
    """

    @cache
    def value(battle: Battle) -> float:
        if is_over(rules, battle):
            return battle_score(rules, battle)
        return max(map(partial(ahead, battle), MOVES))

    def ahead(battle: Battle, move: Move) -> float:
        return value(remembered((foe,), after(rules, foe, battle, move)))

    plan: list[Move] = []
    battle = opening(rules)
    while not is_over(rules, battle):
        plan.append(max(MOVES, key=partial(ahead, battle)))
        battle = after(rules, foe, battle, plan[-1])
    return tuple(plan)


def bayes_score(rules: Rules, foes: Sequence[Foe]) -> float:
    """Return the best expected score against one of the opponents, drawn uniformly and hidden.

    Opponents are deterministic, so the belief is the set of those that would have moved as was
    seen, all equally likely. By dynamic programming over belief and battle:

        V(B, s) = max_a Σ_m |B_m| / |B| · V(B_m, s'(s, a, m))

    with B_m the opponents of B that move m in the battle s.
    """

    @cache
    def value(belief: tuple[Foe, ...], battle: Battle) -> float:
        if is_over(rules, battle):
            return battle_score(rules, battle)
        parts: Mapping[Move, list[Foe]] = defaultdict(list)
        for foe in belief:
            parts[foe.move(rules, battle)].append(foe)
        return max(
            sum(len(part) * ahead(tuple(part), battle, own, its) for its, part in parts.items())
            / len(belief)
            for own in MOVES
        )

    def ahead(belief: tuple[Foe, ...], battle: Battle, own: Move, its: Move) -> float:
        return value(belief, remembered(belief, resolve(rules, battle, own, its)))

    return value(tuple(foes), opening(rules))


def remembered(foes: Sequence[Foe], battle: Battle) -> Battle:
    """Return the battle without what none of the opponents looks at; it has the same value."""
    kept = {memory for foe in foes for memory in foe.remembers}
    return replace(
        battle,
        last=battle.last if "last" in kept else None,
        counts=battle.counts if "counts" in kept else (0, 0, 0, 0),
    )


def expected_score(rules: Rules, foe: Foe, policy: Policy) -> float:
    """Return the exact expected score of a policy against an opponent."""

    @cache
    def value(battle: Battle) -> float:
        if is_over(rules, battle):
            return battle_score(rules, battle)
        chances = policy(rules, foe, battle)
        return sum(
            chance * value(after(rules, foe, battle, move))
            for move, chance in zip(MOVES, chances, strict=True)
            if chance
        )

    return value(opening(rules))


def mean_score(rules: Rules, foes: Sequence[Foe], policy: Policy) -> float:
    """Return the mean of `expected_score` over opponents."""
    return sum(expected_score(rules, foe, policy) for foe in foes) / len(foes)


def surely(move: Move) -> tuple[float, ...]:
    """Return the probabilities of somebody who makes that move."""
    return tuple(float(move == other) for other in MOVES)


def random_policy(rules: Rules, foe: Foe, battle: Battle) -> Sequence[float]:
    """Move at random."""
    return (1 / len(MOVES),) * len(MOVES)


def greedy_policy(rules: Rules, foe: Foe, battle: Battle) -> Sequence[float]:
    """Make the move of the highest score in this round, the first of equals.

    It thinks of no later round: what an oracle of immediate rewards does.
    """
    scores = move_scores(rules, foe, battle)
    return surely(MOVES[scores.index(max(scores))])


def response_policy(first: Move, responses: Sequence[Move]) -> Policy:
    """Return the policy that answers each last move of the opponent in one fixed way.

    Args:
        first: Its first move.
        responses: For each of `MOVES`, its move after the opponent made that one.
    """

    def policy(rules: Rules, foe: Foe, battle: Battle) -> Sequence[float]:
        return surely(first if battle.last is None else responses[battle.last[1]])

    return policy


def best_responses(rules: Rules, foes: Sequence[Foe]) -> tuple[Move, tuple[Move, ...]]:
    """Return the first move and the fixed responses that score best over the opponents.

    All 4^5 of them are tried.
    """
    tables = itertools.product(MOVES, repeat=1 + len(MOVES))
    first, *responses = max(
        tables, key=lambda table: mean_score(rules, foes, response_policy(table[0], table[1:]))
    )
    return first, tuple(responses)
