"""TextBattle: a battle told in text, against an opponent whose pattern has to be found out."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llm_envs.core.task import ChoosingTask, Episode, Outcome, say, whole_number
from llm_envs.datasets.splits import SPLITS, Split, check_split, did_you_mean
from llm_envs.tasks.battle_rules import (
    DEFAULT_RULES,
    FOES,
    KINDS,
    MOVES,
    Battle,
    Foe,
    Move,
    Rules,
    after,
    best_answer,
    best_plan,
    energy_after,
    is_over,
    move_scores,
    opening,
    resolve,
    round_score,
)

DATASET: Final = "duels"
"""The name of the embedded set; it is made here, of `FOES`, `NAMES` and `STYLES`."""

FEATURE_NAMES: Final = (
    *(f"move/{move.word}" for move in MOVES),
    "energy_after",
    *(f"if/{move.word}" for move in MOVES),
    "guess/repeat",
    "guess/follow",
    "guess/copy",
    "guess/answer",
    *(f"foe_last/{move.word}" for move in MOVES),
    "health",
    "foe_health",
    "energy",
    "foe_energy",
    "turn",
)
"""What each column of a choosing observation's ``features`` is; `battle_features` defines them."""

FIRST_MOVE: Final = Move.CHARGE
RESPONSES: Final = (Move.GUARD, Move.HEAVY, Move.HEAVY, Move.GUARD)
"""The fixed responses that score best over all opponents (`best_responses` finds them): the first
move, and what to do after the opponent's strike, heavy blow, guard and charge."""

Floats = NDArray[np.float64]


# --- texts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Style:
    """One way to tell a battle.

    Attributes:
        opens: How it begins.
        moves: What is said of the opponent's strike, heavy blow, guard and charge.
        weak: What is said of its heavy blow without energy.
        toll: What both lost.
        status: How both stand.
        asks: The question.
    """

    opens: str
    moves: tuple[str, str, str, str]
    weak: str
    toll: str
    status: str
    asks: str


STYLES: Final[Mapping[str, tuple[Style, ...]]] = {
    "train": (
        Style(
            "You fight {foe}.",
            ("{foe} strikes.", "{foe} lands a heavy blow.", "{foe} guards.", "{foe} charges."),
            "{foe} lands a weak blow.",
            "You lose {taken}, {foe} loses {dealt}.",
            "You have {health} health, {energy} energy; {foe} {foe_health}, {foe_energy}.",
            "What do you do?",
        ),
        Style(
            "{foe} stands before you.",
            ("A strike by {foe}.", "A heavy blow by {foe}.", "A guard by {foe}.", "{foe} charged."),
            "A weak blow by {foe}.",
            "It cost you {taken} and {foe} {dealt}.",
            "Health {health}, energy {energy}; {foe} has {foe_health}, {foe_energy}.",
            "Your move?",
        ),
        Style(
            "A fight with {foe} begins.",
            ("{foe} struck.", "{foe} struck heavily.", "{foe} kept guard.", "{foe} took a charge."),
            "{foe} struck weakly.",
            "Your loss is {taken}, that of {foe} {dealt}.",
            "You are at {health} and energy {energy}, {foe} at {foe_health} and {foe_energy}.",
            "What now?",
        ),
        Style(
            "Your opponent is called {foe}.",
            ("It is a strike.", "It is a heavy blow.", "It is a guard.", "It is a charge."),
            "It is a weak blow.",
            "You are hit for {taken}, {foe} for {dealt}.",
            "Left: {health} health, {energy} energy to you, {foe_health}, {foe_energy} to {foe}.",
            "And you?",
        ),
    ),
    "validation": (
        Style(
            "You meet {foe} in the ring.",
            (
                "{foe} did strike.",
                "{foe} dealt a heavy blow.",
                "{foe} stood on guard.",
                "{foe} did charge.",
            ),
            "{foe} dealt a weak blow.",
            "{taken} is your loss, {dealt} that of {foe}.",
            "You hold {health} health and {energy} energy, {foe} {foe_health} and {foe_energy}.",
            "What is your move?",
        ),
        Style(
            "It is you against {foe}.",
            ("A strike it was.", "A heavy blow it was.", "A guard it was.", "A charge it was."),
            "A weak blow it was.",
            "That took {taken} from you and {dealt} from {foe}.",
            "Yours: {health} health, {energy} energy. That of {foe}: {foe_health}, {foe_energy}.",
            "What will you do?",
        ),
    ),
    "test": (
        Style(
            "{foe} has come to fight you.",
            (
                "{foe} chose a strike.",
                "{foe} chose a heavy blow.",
                "{foe} chose a guard.",
                "{foe} chose a charge.",
            ),
            "{foe} chose a weak blow.",
            "You paid {taken}, {foe} paid {dealt}.",
            "Now you own {health} health and {energy} energy, {foe} {foe_health} and {foe_energy}.",
            "How do you go on?",
        ),
        Style(
            "There is a battle between you and {foe}.",
            (
                "The other did strike.",
                "The other gave a heavy blow.",
                "The other was on guard.",
                "The other used a charge.",
            ),
            "The other gave a weak blow.",
            "Down by {taken} for you, by {dealt} for {foe}.",
            "Health: you {health}, {foe} {foe_health}. Energy: you {energy}, {foe} {foe_energy}.",
            "Which move?",
        ),
    ),
}
"""How battles are told, by split: no wording of one stands in another."""

NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": (
        *("Ada", "Bern", "Cora", "Dag", "Edda", "Finn", "Greta", "Hugo", "Ines", "Jon", "Kaya"),
        *("Lars", "Mona", "Nils", "Olga", "Per", "Rosa", "Sven", "Tara", "Ulf", "Vera", "Wim"),
        *("Yara", "Zeno"),
    ),
    "validation": ("Anton", "Britta", "Carl", "Dora", "Emil", "Frida", "Gustav", "Hanna"),
    "test": ("Iris", "Jakob", "Karin", "Leo", "Marta", "Noah", "Petra", "Ruben"),
}
"""Names of opponents, by split; each has one style, and fights in the pattern of every foe."""


def candidate_texts(rules: Rules, battle: Battle) -> tuple[str, ...]:
    """Return `MOVES` as a policy reads them; each begins with a space, as answers do."""
    heavy = " Heavy blow." if battle.energy >= rules.cost else " Heavy blow, weak without energy."
    return " Strike.", heavy, " Guard.", " Charge."


def tell_rules(rules: Rules) -> str:
    """Return the rules in words."""
    return (
        f"Both move at once. A strike takes {rules.strike} health. A heavy blow takes "
        f"{rules.heavy}, or {rules.pierce} through a guard, and costs {rules.cost} energy; without "
        f"it is weak and takes {rules.weak}. A guard stops strikes and weak blows, and gives a "
        f"strike {rules.riposte} back. A charge stores 1 energy, up to {rules.most_energy}. The "
        f"last round is {rules.rounds}."
    )


def tell_round(rules: Rules, name: str, style: Style, before: Battle, battle: Battle) -> str:
    """Return what happened in a round: the opponent's move and what both lost."""
    assert battle.last is not None
    move = battle.last[1]
    weak = move == Move.HEAVY and before.foe_energy < rules.cost
    return f"{style.weak if weak else style.moves[move]} {style.toll}".format(
        foe=name,
        taken=before.health - battle.health,
        dealt=before.foe_health - battle.foe_health,
    )


def ask(name: str, style: Style, battle: Battle) -> str:
    """Return how both stand, and the question."""
    return f"Round {battle.turn + 1}. {style.status} {style.asks}".format(
        foe=name,
        health=battle.health,
        energy=battle.energy,
        foe_health=battle.foe_health,
        foe_energy=battle.foe_energy,
    )


# --- features ------------------------------------------------------------------------------------


def battle_features(rules: Rules, battle: Battle, foe_moves: Sequence[Move]) -> Floats:
    """Return what is known of each move, from the rules and what was seen.

    - ``move/…``: 1 for the move that it is, else 0.
    - ``energy_after``: own energy after it / the most.
    - ``if/…``: its score in this round if the opponent makes that move.
    - ``guess/…``: its score if the opponent

      - ``repeat``: does again what it did last;
      - ``follow``: does what it did after it had last made its last move before;
      - ``copy``: does what was done to it last;
      - ``answer``: makes its best answer to the own move that was made most often;

      and where nothing was seen yet that would tell, the mean over its moves.
    - ``foe_last/…``: 1 for the opponent's last move; ``health``, ``foe_health``, ``energy``,
      ``foe_energy`` and ``turn`` as shares of the most: the same for all moves.

    Args:
        rules: The rules.
        battle: How it stands; it is not over.
        foe_moves: Every move of the opponent so far.

    Returns:
        (4, len(FEATURE_NAMES)) in [0, 1].
    """
    scores = np.array(
        [
            [round_score(rules, battle, resolve(rules, battle, own, its)) for its in MOVES]
            for own in MOVES
        ]
    )
    guesses: list[Move | None] = [None] * 4
    last = np.zeros(len(MOVES))
    if battle.last is not None:
        own_last, foe_last = battle.last
        followed = [b for a, b in pairwise(foe_moves) if a == foe_last]
        guesses = [foe_last, followed[-1] if followed else None, own_last, None]
        guesses[3] = best_answer(rules, battle)
        last[foe_last] = 1.0
    guessed = [scores.mean(1) if guess is None else scores[:, guess] for guess in guesses]
    energies = [energy_after(rules, battle.energy, move) for move in MOVES]
    most = max(rules.most_energy, 1)
    shared = (
        *last,
        battle.health / rules.health,
        battle.foe_health / rules.health,
        battle.energy / most,
        battle.foe_energy / most,
        battle.turn / rules.rounds,
    )
    return np.column_stack(
        (
            np.eye(len(MOVES)),
            np.array(energies) / most,
            scores,
            *guessed,
            np.tile(shared, (len(MOVES), 1)),
        )
    )


def fixed_response(observation: Mapping[str, Any]) -> int:
    """Answer the opponent's last move with `RESPONSES`: the heuristic to beat.

    Args:
        observation: What a TextBattle environment shows.

    Returns:
        The index of the candidate.
    """
    first = FEATURE_NAMES.index(f"foe_last/{MOVES[0].word}")
    last = observation["features"][0, first : first + len(MOVES)]
    return int(RESPONSES[int(np.argmax(last))] if last.any() else FIRST_MOVE)


# --- the task ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opponent:
    """Somebody to fight.

    Attributes:
        foe: How they fight.
        name: What they are called.
        style: How a battle with them is told.
        part: The split that has such names and styles.
    """

    foe: Foe
    name: str
    style: Style
    part: str = "train"

    @property
    def id(self) -> str:
        """``<foe>/<name>``."""
        return f"{self.foe.name}/{self.name}"

    @property
    def unit(self) -> str:
        """The pattern, in a split: whatever it is called, the same moves come to the same."""
        return f"{self.foe.name} ({self.part})"


@dataclass(frozen=True, slots=True)
class Session:
    """A battle in play.

    Attributes:
        battle: How it stands.
        foe_moves: Every move of the opponent so far.
    """

    battle: Battle
    foe_moves: tuple[Move, ...] = ()


class TextBattle(ChoosingTask[Opponent]):
    """Fight an opponent whose pattern has to be found out from what it does.

    ## Description
    A battle of 8 rounds. In each both sides choose at once: a strike, a heavy blow that
    spends energy, a guard that stops strikes and gives them back, or a charge that stores energy.
    `llm_envs.tasks.battle_rules` has the rules, and the prompt tells them. Each opponent fights in
    a pattern of one of five kinds, which is never told:

    - aggressive: attacks as heavily as it can, with a breath in every few rounds;
    - cautious: guards against stored energy, and saves its own;
    - cyclic: goes through the same moves again and again;
    - mirror: does what you did in the last round;
    - exploiter: answers what you have done most often.

    There are four patterns of each kind. The same twenty meet the policy in every split, each
    under every name of the split, so that a name tells nothing. No name and no wording of what
    happens stands in two splits.

    ## Action Space
    ``Discrete(4)``: strike, heavy blow, guard, charge. All of them are always legal; a heavy blow
    without energy is weak, and its text says so.

    ## Observation Space
    ``Dict``:
    - ``prompt``: the conversation so far: rules, all earlier rounds, and how both stand. It ends in
      ``Assistant:`` while a move is due and is append-only:
      ``prompt[t+1].startswith(prompt[t] + candidates[t][action])``.
    - ``candidates``: four texts such as `` Guard.``, each with a leading space; empty after the
      last round.
    - ``features``: (4, 22) float32 in [0, 1]. `FEATURE_NAMES` names the columns: the move, what it
      scores against each move of the opponent and against simple guesses of its next one, and how
      both stand. Zero after the last round.

    ## Starting State
    An opponent drawn uniformly from the split (``options={"example": id or index}`` chooses one).
    Both sides begin with 30 health and 1 energy. From there on nothing is left to chance.

    ## Rewards
    The score is the change in advantage (own health - the opponent's) in the round, mapped
    linearly from [-6, 6] to [0, 1]: a round in which both lose as much scores 0.5. It is mapped
    linearly to ``reward_range``.

    All rounds together cost a side 26 health at most, so by default nobody falls, and the rewards
    of an episode add up to its final advantage / 6, whatever the way there.

    The move that scores best in a round is not the best of the battle: a charge pays a round
    later, and opponents that adapt can be led on. So agents gain from ``gamma`` > 0, and regret to
    ``best_score`` knows nothing of later rounds. Exact mean scores of a battle, over all opponents:

    ===================================================  =====
    at random                                            0.474
    one move, always (the best of the four, a guard)     0.476
    one response to each last move of the opponent       0.526
    the best move of each round, foreseen: the oracle    0.561
    the best play, the opponent's pattern hidden         0.607
    the best play, the opponent's pattern known          0.620
    ===================================================  =====

    `mean_score`, `bayes_score` and `optimal_score` of `battle_rules` compute them.

    ## Episode End
    Terminates after 8 rounds or ``max_turns``, or when a side has no health left, which takes more
    than 8 rounds. Never truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after a step ``score``, ``score/dealt`` (health that
    the opponent lost / 6), ``score/kept`` (1 - own health lost / 6; the score is the mean of the
    two), ``best_score`` (of this round) and ``feedback`` too. ``env.unwrapped.candidate_scores``
    has the score of every move of the round, for oracles and evaluation.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all".
    - ``dataset``: "duels" (embedded) is all that there is.
    - ``max_turns``: the number of rounds (8), which the prompt tells. ``None`` is 8 too.
    - ``opponents``: a kind, or several, of the opponents to meet; ``None`` (default) for all.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Brown (1951), Iterative Solution of Games by Fictitious Play, for the exploiter.

    ## Version History
    * v0: initial version.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str = DATASET,
        max_turns: int | None = None,
        opponents: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__(len(MOVES), len(FEATURE_NAMES))
        turns = DEFAULT_RULES.rounds if max_turns is None else whole_number("max_turns", max_turns)
        if dataset != DATASET:
            raise ValueError(
                f"Dataset {reprlib.repr(dataset)} does not exist."
                f"{did_you_mean(dataset, (DATASET,))} The only embedded set of opponents is "
                f"{DATASET!r}, and files are not taken."
            )
        self.rules = replace(DEFAULT_RULES, rounds=turns)
        self.examples = make_opponents(check_split(split), _check_kinds(opponents))

    def begin(self, example: Opponent, rng: np.random.Generator) -> Episode[Opponent]:
        """Tell the rules and ask for the first move."""
        battle = opening(self.rules)
        first = example.style.opens.format(foe=example.name)
        said = f"{first} {tell_rules(self.rules)} {ask(example.name, example.style, battle)}"
        session = Session(battle)
        observation = self._observe(say(said), session)
        messages = ({"role": "user", "content": said},)
        return Episode(example, rng, observation, messages, state=session)

    def score(self, episodes: Sequence[Episode[Opponent]], actions: Sequence[int]) -> list[Outcome]:
        """Return the change in advantage that each move brings."""
        return [
            self._outcome(episode, Move(action))
            for episode, action in zip(episodes, actions, strict=True)
        ]

    def proceed(self, episode: Episode[Opponent], action: int, outcome: Outcome) -> None:
        """Write down the round, and ask for the next move or finish."""
        before, opponent = episode.state, episode.example
        battle = after(self.rules, opponent.foe, before.battle, Move(action))
        assert battle.last is not None
        session = episode.state = Session(battle, (*before.foe_moves, battle.last[1]))
        episode.finished = is_over(self.rules, battle)
        said = outcome.feedback
        if not episode.finished:
            said = f"{said} {ask(opponent.name, opponent.style, battle)}"
        tail = "\n" + (f"User: {said}" if episode.finished else say(said))
        move = episode.observation["candidates"][action]
        episode.observation = self._observe(episode.observation["prompt"] + move + tail, session)
        episode.messages += (
            {"role": "assistant", "content": move.strip()},
            {"role": "user", "content": said},
        )

    def optimal_choices(self, episode: Episode[Opponent]) -> list[int]:
        """Return the moves of the whole battle that score best, by one who knows the pattern."""
        return [int(move) for move in best_plan(self.rules, episode.example.foe)]

    def planned_turns(self, example: Opponent) -> int:
        """Return the number of rounds."""
        return self.rules.rounds

    def candidate_scores(self, episode: Episode[Opponent]) -> Floats | None:
        """Return the score of each move of the round that is due, (4,); None when all is over."""
        if episode.finished:
            return None
        return np.array(move_scores(self.rules, episode.example.foe, episode.state.battle))

    def _outcome(self, episode: Episode[Opponent], move: Move) -> Outcome:
        opponent, before = episode.example, episode.state.battle
        battle = after(self.rules, opponent.foe, before, move)
        return Outcome(
            score=round_score(self.rules, before, battle),
            parts={
                "dealt": (before.foe_health - battle.foe_health) / self.rules.heavy,
                "kept": 1.0 - (before.health - battle.health) / self.rules.heavy,
            },
            feedback=tell_round(self.rules, opponent.name, opponent.style, before, battle),
            best_score=max(move_scores(self.rules, opponent.foe, before)),
        )

    def _observe(self, prompt: str, session: Session) -> dict[str, Any]:
        """Return the observation of the round that is due, or the one after the last."""
        if is_over(self.rules, session.battle):
            features = np.zeros((len(MOVES), len(FEATURE_NAMES)), np.float32)
            return {"prompt": prompt, "candidates": ("",) * len(MOVES), "features": features}
        known = battle_features(self.rules, session.battle, session.foe_moves)
        return {
            "prompt": prompt,
            "candidates": candidate_texts(self.rules, session.battle),
            "features": known.astype(np.float32),
        }


def make_opponents(split: Split, kinds: Sequence[str] = KINDS) -> tuple[Opponent, ...]:
    """Return the opponents of a split: every foe of the kinds under every name."""
    made = [
        Opponent(foe, name, STYLES[part][i % len(STYLES[part])], part)
        for part in (SPLITS if split == "all" else (split,))
        for i, name in enumerate(NAMES[part])
        for foe in FOES
        if foe.kind in kinds
    ]
    # Evaluations take evenly spaced examples: in any regular order these would all be of one kind.
    made.sort(key=lambda opponent: hashlib.sha256(opponent.id.encode()).digest())
    return tuple(made)


def _check_kinds(opponents: object) -> tuple[str, ...]:
    """Return the kinds of opponents that an argument names.

    Raises:
        TypeError: It is no text and no sequence of texts.
        ValueError: It names no kind, or one that does not exist.
    """
    if opponents is None:
        return KINDS
    named = (opponents,) if isinstance(opponents, str) else opponents
    listed = ", ".join(map(repr, KINDS))
    if not isinstance(named, Sequence) or not all(isinstance(kind, str) for kind in named):
        raise TypeError(f"opponents is {opponents!r}. Give some of {listed}, or None for all.")
    for kind in named:
        if kind not in KINDS:
            raise ValueError(
                f"There is no kind of opponents {kind!r}.{did_you_mean(kind, KINDS)} "
                f"Use some of {listed}."
            )
    if not named:
        raise ValueError(f"opponents is empty. Give some of {listed}, or None for all.")
    return tuple(named)
