"""What random, simple and perfect players score on every environment and split.

Run: ``python -m benchmarks.reference_scores [--env ID …] [--split NAME …] [--markdown]``

Every player meets the same episodes, those of ``agents.evaluation.evaluate``; the intervals are
95 % bootstrap intervals over independent units.

- random: on writing tasks one to three successive words of the conversation; on choosing tasks
  any candidate.
- heuristic: ``HEURISTICS`` says which rule plays which environment. It reads what a policy reads.
- oracle: the accepted answer, or the candidate, that scores best in expectation.
- optimum: the choices that score best over a whole episode, where the task tells them. The oracle,
  who looks at one step, has less where a choice changes what comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import gymnasium as gym
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

import llm_envs
from agents.baselines import RandomPlayer, ScriptedPlayer
from agents.evaluation import Evaluation, Floats, evaluate, interval
from agents.rollout import Player
from benchmarks.tables import Table
from llm_envs.core.registration import known_id
from llm_envs.core.task import Task
from llm_envs.datasets.splits import SPLITS, Split
from llm_envs.tasks.customer_service import search_then_lead
from llm_envs.tasks.recommendation_clicks import SIMULATED, best_mean_choice
from llm_envs.tasks.text_battle import fixed_response

Rule = Callable[[Any], Any]
"""From an observation to an action."""

# Words that tell nothing about what is asked: they make no sentence similar.
FUNCTION_WORDS = frozenset(
    "a about also an and are as at be by called can do does for from has have how in is it its me "
    "name of on one or please say tell that the there they thing this to was were what where which "
    "who with would you".split()
)


# --- rules: pure functions of an observation -----------------------------------------------------


def read_conversation(observation: str) -> tuple[str, list[str]]:
    """Take a writing observation apart.

    Returns:
        The text that the first message opens with (all but its last line), and what was said
        after it, by both sides and in order; the last is the user's, who waits for an answer.
    """
    opened, *others = re.split(r"\nAssistant:", observation.removeprefix("User: "))
    text, _, question = opened.rpartition("\n")
    said = [question]
    for part in others[:-1]:
        answer, _, message = part.partition("\nUser: ")
        said += [answer, message]
    return text, said


def sentences(text: str) -> list[str]:
    """Split a text at line breaks, and after ".", "!" or "?" where space follows."""
    found = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [s.strip() for s in found if s.strip()]


def lead_sentence(observation: str) -> str:
    """Answer with the first sentence of the text; the classical baseline of summarization."""
    text, _ = read_conversation(observation)
    return next(iter(sentences(text)), "")


def most_similar_span(observation: str) -> str:
    """Answer with what the sentence that is most like the question says beyond it.

    The sentence is the one that shares the most words with the question, the last sentence that
    the user said; of equals, the one that shares the most with the conversation before it; of
    these the first. The answer is its last run of words that the conversation (but for the text
    itself) has not used. Words are the same if their first four letters are, so that "means" is
    like "meaning"; ``FUNCTION_WORDS`` are like nothing, and no run begins or ends with one.
    """
    text, said = read_conversation(observation)
    question = words_of(sentences(said[-1])[-1]) if said[-1].strip() else set()
    before = words_of(" ".join(said[:-1]))

    def similarity(sentence: str) -> tuple[int, int]:
        words = words_of(sentence)
        return len(words & question), len(words & before)

    sentence = max(sentences(text), key=similarity, default="")
    return last_new_run(sentence, question | before) or last_new_run(sentence, question)


def most_told_command(observation: str) -> str:
    """Give the command that the quest speaks of most: the highest share of its words in the quest.

    It is one of those that the last message lists and that were not given yet, if there is one; of
    equals the first.
    """
    text, said = read_conversation(observation)
    quest = words_of(text.partition("\n")[0])
    given = {answer.strip() for answer in said[1::2]}

    def likeness(command: str) -> tuple[bool, float]:
        words = words_of(command)
        return command not in given, len(words & quest) / max(1, len(words))

    listed = said[-1].rpartition("You can: ")[2].removesuffix(".").split("; ")
    return max(listed, key=likeness)


def last_new_run(sentence: str, known: set[str]) -> str:
    """Return the last run of words that are not known, function words at its ends cut off."""
    run: list[str] = []
    for word in reversed(sentence.rstrip(".!?").split()):
        if root(word) in known and run:
            break
        if root(word) not in known and (run or root(word)):
            run.append(word)
    while run and not root(run[-1]):
        run.pop()
    return " ".join(reversed(run)).rstrip(",;:")


def words_of(text: str) -> set[str]:
    """Return the roots of a text's words."""
    return {root(word) for word in text.split()} - {""}


def root(word: str) -> str:
    """Return what tells a word: its first four letters in lower case; "" of a function word."""
    plain = word.lower().strip(".,;:!?\"'()").removesuffix("'s")
    return "" if plain in FUNCTION_WORDS else plain[:4]


@dataclass(frozen=True)
class Heuristic:
    """A simple rule, and what it is called."""

    name: str
    rule: Rule


HEURISTICS = {
    "DialogueQA-v0": Heuristic("most similar span", most_similar_span),
    "Summarization-v0": Heuristic("lead sentence", lead_sentence),
    "RecommendationClicks-v0": Heuristic("best training mean", best_mean_choice),
    "TextBattle-v0": Heuristic("best fixed response", fixed_response),
    "CustomerService-v0": Heuristic("search, then the lead of the first passage", search_then_lead),
    "TextWorld-v0": Heuristic("the command that the quest speaks of most", most_told_command),
}


VARIANTS: Final[Mapping[str, tuple[dict[str, Any], ...]]] = {
    "RecommendationClicks-v0": (
        {},
        {"dataset": SIMULATED},
        {"dataset": SIMULATED, "max_turns": 50},
    ),
}
"""The arguments to play an environment with, where the defaults are not all."""


# --- players: what evaluate() plays --------------------------------------------------------------


class RulePlayer(ScriptedPlayer):
    """Plays by a rule of one observation."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Apply the rule."""
        return _surely(self.rule(observation), observation)


class OraclePlayer(ScriptedPlayer):
    """Plays the candidate, or the accepted answer, that scores best."""

    def __init__(self) -> None:
        super().__init__()
        self.best: list[Any] = []

    def peek(self, envs: Any) -> None:
        """Find the best action of every row, by the environment's own scores."""
        rows = zip(envs.episodes, envs.candidate_scores, envs.references, strict=True)
        self.best = [self._best(envs.task, *row) for row in rows]

    @staticmethod
    def _best(task: Task[Any], episode: Any, scores: Any, references: Sequence[str]) -> Any:
        if not references and scores is not None:
            return int(np.argmax(scores))
        if not references:
            raise ValueError(
                f"{type(task).__name__} tells neither references nor candidate scores, so there is "
                "no oracle for it. Give the task `references` or `candidate_scores`."
            )
        outcomes = task.score([episode] * len(references), references)
        return references[int(np.argmax([o.score or 0.0 for o in outcomes]))]

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Play what was found to be best."""
        return _surely(self.best[row], observation)


class OptimalPlayer(ScriptedPlayer):
    """Plays the choices that score best over whole episodes, as the task tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[int, Iterator[int]] = {}

    def peek(self, envs: Any) -> None:
        """Ask for the plan of every row when its episode begins."""
        for row, episode in enumerate(envs.episodes):
            if row not in self.plans:
                self.plans[row] = iter(envs.task.optimal_choices(episode))

    def decide(self, row: int, observation: Any) -> tuple[Any, Floats | None]:
        """Play the next choice of the plan."""
        return _surely(next(self.plans[row]), observation)


def _surely(action: Any, observation: Any) -> tuple[Any, Floats | None]:
    if isinstance(observation, str):
        return action, None
    return action, np.eye(len(observation["candidates"]))[action]


# --- measuring and showing -----------------------------------------------------------------------

PLAYERS: Final = ("random", "heuristic", "oracle", "optimum")


def measure(
    env_id: str,
    split: Split,
    *,
    episodes: int | None = None,
    players: Sequence[str] = PLAYERS,
    env_kwargs: dict[str, Any] | None = None,
) -> dict[str, Evaluation]:
    """Evaluate reference players on one split.

    Args:
        env_id: A registered id.
        split: The split.
        episodes: How many episodes; ``None`` for every example once.
        players: Which of ``PLAYERS``.
        env_kwargs: Further arguments of the environment.

    Returns:
        Player -> evaluation, all on the same episodes; no "heuristic" where none is stated, and no
        "optimum" where the task tells none.
    """
    begin: dict[str, Callable[[], Player]] = {"random": RandomPlayer, "oracle": OraclePlayer}
    if env_id in HEURISTICS:
        begin["heuristic"] = partial(RulePlayer, HEURISTICS[env_id].rule)
    envs: Any = gym.make_vec(env_id, num_envs=1, **{**(env_kwargs or {}), "split": split})
    if hasattr(envs.unwrapped.task, "optimal_choices"):
        begin["optimum"] = OptimalPlayer
    return {
        player: evaluate(
            begin[player], env_id, split=split, episodes=episodes, env_kwargs=env_kwargs
        )
        for player in players
        if player in begin
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """The evaluations of one environment and split."""

    env_id: str
    split: Split
    players: dict[str, Evaluation]
    env_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The id, and the arguments if there are any."""
        return " ".join((self.env_id, *(f"{k}={v}" for k, v in self.env_kwargs.items())))

    @property
    def episodes(self) -> int:
        """Number of episodes that each player played."""
        return len(self.players["oracle"].ids)

    @property
    def units(self) -> int:
        """Number of independent units among them."""
        return len(set(self.players["oracle"].units))


def score_table(measured: Sequence[Measured]) -> Table:
    """Lay out scores with their intervals."""
    rows = []
    for m in measured:
        cells = [
            f"{e.score:.3f} [{e.ci95[0]:.3f}, {e.ci95[1]:.3f}]" if e else "-"
            for e in map(m.players.get, PLAYERS)
        ]
        rows.append((m.name, m.split, f"{m.episodes:,}", f"{m.units:,}", *cells))
    return Table("", ("environment", "split", "episodes", "units", *PLAYERS), tuple(rows))


def expectation_table(measured: Sequence[Measured]) -> Table:
    """Lay out what is exact where all outcomes are known: expected scores, and regrets to the best.

    There is no row if nothing is known. Regret is to the best choice of each step on a player's own
    way. Where choices change what later steps offer, ways differ, and what a player has and what it
    misses do not add up to what anybody could have.
    """
    rows = []
    for m in measured:
        if "expected" not in m.players["oracle"].parts:
            continue
        cells = [
            f"{e.part('expected'):.3f}, {_regret(e)}" if e else "-"
            for e in map(m.players.get, PLAYERS)
        ]
        rows.append((m.name, m.split, f"{m.players['oracle'].part('best'):.3f}", *cells))
    expected = (f"{player}: expected, regret" for player in PLAYERS)
    return Table(
        "", ("environment", "split", "best of each step (oracle's way)", *expected), tuple(rows)
    )


def _regret(e: Evaluation) -> str:
    regrets = e.parts["best"] - e.parts["expected"]
    low, high = interval(regrets, e.units)
    return f"{regrets.mean():.3f} [{low:.3f}, {high:.3f}]"


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    env: tuple[str, ...] = ()
    """Environment ids; all registered ones by default. ``VARIANTS`` says with which arguments."""
    split: tuple[Literal["train", "validation", "test", "all"], ...] = SPLITS
    """Splits."""
    episodes: int | None = None
    """Episodes a split, evenly spaced over it; all of them by default."""
    markdown: bool = False
    """Print Markdown, as it stands in the README."""


def main(arguments: Arguments) -> None:
    """Measure and print.

    Raises:
        SystemExit: An environment is not registered.
    """
    try:
        ids = [*map(known_id, arguments.env)] or list(llm_envs.registered_ids())
    except ValueError as error:
        raise SystemExit(str(error)) from error
    ids = [env_id for env_id in ids if _can_be_made(env_id)]
    todo = [
        (env_id, split, env_kwargs)
        for env_id in ids
        for env_kwargs in VARIANTS.get(env_id, ({},))
        for split in arguments.split
    ]
    # Progress goes to the error stream, so that the table can be piped.
    progress = track(todo, "Playing", console=Console(stderr=True), transient=True)
    measured = [
        Measured(e, s, measure(e, s, episodes=arguments.episodes, env_kwargs=kwargs), kwargs)
        for e, s, kwargs in progress
    ]
    stated = "; ".join(f"{i}: {HEURISTICS[i].name}" for i in ids if i in HEURISTICS)
    console = Console()
    for table in (score_table(measured), expectation_table(measured)):
        if not table.rows:
            continue
        if arguments.markdown:
            print(table.markdown() + "\n")
        else:
            console.print(table.rich())
    print(f"Scores with 95 % bootstrap intervals over units. Heuristics: {stated or 'none'}.")


def _can_be_made(env_id: str) -> bool:
    """Return whether an environment's extra is installed, and say so if it is not."""
    try:
        gym.make(env_id, disable_env_checker=True).close()
    except ImportError as error:
        Console(stderr=True).print(f"{env_id} is left out. {error}", markup=False, soft_wrap=True)
        return False
    return True


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__, prog="python -m benchmarks.reference_scores"))
