"""TextWorld: quests in generated houses, each command scored at once.

The games, what commands they take, and what these are worth are those of the package ``textworld``
(extra ``textworld``). Inform 7, which that package compiles its games with, is not needed: the
house is told here, from the facts of the game's state.
"""

from __future__ import annotations

import copy
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from llm_envs.core.spaces import MAX_OBSERVATION_LENGTH, Text
from llm_envs.core.task import Episode, Outcome, Task, WritingTask, say, whole_number
from llm_envs.datasets.splits import SPLITS, Split, check_flag, check_split, did_you_mean

try:
    from textworld import GameOptions
    from textworld.generator import make_game
    from textworld.generator.chaining import QuestGenerationError
    from textworld.generator.data import BUILTIN_DATA_PATH, KnowledgeBase
    from textworld.generator.game import Game, GameProgression
except ImportError as error:
    raise ImportError(
        f"TextWorld-v0 needs the package textworld ({error}). Install the extra with: "
        "pip install 'llm-envs[textworld]'"
    ) from error

DATASET: Final = "houses"
"""The name of the generated set of games."""

SEEDS: Final[Mapping[str, range]] = {
    "train": range(200),
    "validation": range(10_000, 10_100),
    "test": range(20_000, 20_100),
}
"""The seeds of the games, by split."""

CAN: Final = "You can: "
"""What the list of commands begins with; ``"; "`` stands between them."""

UNKNOWN: Final = "That cannot be done here."
"""What is said to a command that the game does not take."""

_DIRECTIONS = ("north", "east", "south", "west")
_LOOKS = ("look", "inventory", "examine")  # rules that change nothing


# --- games ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Quest:
    """A game: TextWorld makes it of these numbers, when it is first opened.

    Attributes:
        id: ``<split>/<seed>``.
        seed: Seed of map, objects, quest and wording.
        rooms: Number of rooms.
        objects: Number of objects, at least; the quest may need more.
        length: Number of commands that the quest was made of; now and then a shorter way leads
            to its end.
    """

    id: str
    seed: int
    rooms: int
    objects: int
    length: int

    @property
    def unit(self) -> str:
        """The game too: no other has its seed."""
        return self.id


@lru_cache(maxsize=1)
def _knowledge() -> Any:
    # By default TextWorld would prefer a folder ``textworld_data`` of the working directory.
    return KnowledgeBase.load(BUILTIN_DATA_PATH)


def generate(quest: Quest) -> Any:
    """Make the game of a quest, a ``textworld.Game``; always the same one.

    Raises:
        ValueError: TextWorld finds no such quest.
    """
    options = GameOptions()
    options.kb = _knowledge()
    options.seeds = quest.seed
    options.nb_rooms, options.nb_objects = quest.rooms, quest.objects
    options.quest_length = quest.length
    try:
        return make_game(options)
    except (QuestGenerationError, ValueError) as error:
        raise ValueError(
            f"TextWorld makes no quest of length {quest.length} in {quest.rooms} rooms with "
            f"{quest.objects} objects ({error}). Ask for a shorter quest, for more rooms or for "
            "fewer objects."
        ) from error


@dataclass(frozen=True, slots=True)
class Position:
    """Where a game stands; it never changes.

    Attributes:
        progress: TextWorld's own account of it.
        commands: What the game takes here, by its case-folded wording: wording and action.
        policy: The commands that TextWorld knows to lead to the end, none if it is reached.
        reward: Its intermediate reward for the last command: -1, 0 or 1.
    """

    progress: Any
    commands: Mapping[str, tuple[str, Any]]
    policy: tuple[str, ...]
    reward: int = 0


@lru_cache(maxsize=2048)
def position(quest: Quest, path: tuple[str, ...]) -> Position:
    """Return where commands lead.

    Args:
        quest: The game.
        path: Case-folded commands from its beginning on, each taken by it.
    """
    if not path:
        return _look_up(GameProgression(generate(quest)), None)
    before = position(quest, path[:-1])
    # Its own ``copy`` computes all actions anew, which takes longer than the command.
    progress = copy.copy(before.progress)
    progress.state = progress.state.copy()
    progress.quest_progressions = [q.copy() for q in progress.quest_progressions]
    progress.update(before.commands[path[-1]][1])
    return _look_up(progress, before)


def _look_up(progress: Any, before: Position | None) -> Position:
    names = {name: info.name for name, info in progress.game.infos.items()}
    commands: dict[str, tuple[str, Any]] = {}
    for action in progress.valid_actions:  # of actions of one wording the first is meant
        wording = action.format_command(names)
        commands.setdefault(wording.casefold(), (wording, action))
    policy = tuple(action.format_command(names) for action in progress.winning_policy or ())
    reward = 0 if before is None else intermediate_reward(before.policy, policy, progress)
    return Position(progress, commands, policy, reward)


def intermediate_reward(before: Sequence[str], after: Sequence[str], progress: Any) -> int:
    """Return what TextWorld pays for a command.

    Args:
        before: The commands that were left to the end of the quest.
        after: Those that are left now.
        progress: The ``GameProgression`` that the command led to.

    Returns:
        1 for the end of the quest, or if fewer commands are left; -1 if it can no longer be
        done, or if more are left; else 0.

    Source: ``textworld.envs.TextWorldEnv``, "intermediate_reward".
    """
    if progress.completed:
        return 1
    if progress.failed:
        return -1
    return int(np.sign(len(before) - len(after)))


# --- texts ---------------------------------------------------------------------------------------


def describe(game: Game, facts: Iterable[Any]) -> str:
    """Tell all that can be seen from where the player stands, and what is carried.

    Args:
        game: The ``textworld.Game``, for names.
        facts: The propositions that are true now.
    """
    names = {name: info.name for name, info in game.infos.items()}
    inside: dict[str, list[str]] = defaultdict(
        list
    )  # a room, container or supporter: what is there
    states: dict[str, str] = {}
    neighbours: dict[tuple[str, str], str] = {}
    doors: dict[tuple[str, str], str] = {}
    for fact in facts:
        rule, of = str(fact.name), [variable.name for variable in fact.arguments]
        if rule in ("at", "in", "on"):
            inside[of[1]].append(of[0])
        elif rule in ("open", "closed", "locked"):
            states[of[0]] = rule
        elif rule == "link":
            doors[of[0], of[2]] = of[1]
        elif rule.endswith("_of"):
            neighbours[of[1], rule.removesuffix("_of")] = of[0]
    here = next(room for room, things in inside.items() if "P" in things)

    def listed(things: Iterable[str]) -> str:
        return _and([_a(name) for name in sorted(names[thing] for thing in things)]) or "nothing"

    said = [f"You are in the {names[here]}."]
    floor = []
    for thing in sorted(inside[here], key=lambda thing: (names[thing] or "", thing)):
        kind, state = game.infos[thing].type, states.get(thing, "")
        if kind == "c":
            holds = f" with {listed(inside[thing])} in it" if state == "open" else ""
            said.append(f"There is {_a(f'{state} {names[thing]}')}{holds}.")
        elif kind == "s":
            said.append(f"There is {_a(names[thing])} with {listed(inside[thing])} on it.")
        elif thing != "P":
            floor.append(thing)
    if floor:
        said.append(f"On the floor: {listed(floor)}.")
    free = []
    for direction in _DIRECTIONS:
        if (there := neighbours.get((here, direction))) is None:
            continue
        if (door := doors.get((here, there))) is None:
            free.append(direction)
        else:
            said.append(f"To the {direction} is {_a(f'{states[door]} {names[door]}')}.")
    if free:
        said.append(f"The way is free to the {_and(free)}.")
    said.append(f"You carry {listed(inside['I'])}.")
    return " ".join(said)


def _a(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


# --- the task ------------------------------------------------------------------------------------


class TextWorld(Task[Quest]):
    """Do what is asked in a house, by commands in words.

    ## Description
    TextWorld makes a house of rooms, doors, furniture and things, and a quest in it: a chain of
    commands such as "go north", "unlock box with key", "open box", "take hat from box". The user
    words the quest, and tells after each command what can be seen and what can be done.

    Games are made of fixed seeds when they are first opened, which takes about a tenth of a
    second at the default size, and seconds with ten rooms. Another version of ``textworld`` may
    make others of them. The quest is worded by TextWorld; what is seen is told in short sentences
    here, not in the prose of a compiled game.

    ## Action Space
    ``Text``: the command, of at most 2**20 characters. Case, repeated spaces and a full stop at
    its end mean nothing; otherwise it has to be worded exactly as the game words it.

    ## Observation Space
    ``Text``: the conversation so far. It ends in ``Assistant:`` while a command is due and is
    append-only: ``obs[t+1].startswith(obs[t] + action)``.

    ## Starting State
    A game drawn uniformly from the split (``options={"example": id or index}`` chooses one), as
    it begins.

    ## Rewards
    TextWorld's intermediate reward r: 1 if the command shortens the known way to the end of the
    quest or ends it, -1 if it makes the way longer or the end unreachable, 0 if it does neither or
    is not understood. The score is (1 + r) / 2, so that with the default ``reward_range`` the
    reward is r itself.

    What is done can be undone: going to and fro earns 1 and -1 in turn, and the rewards of an
    episode add up to the commands that the way to the end has become shorter.

    ## Episode End
    Terminates when the quest is done or can no longer be done, or after ``max_turns``. Never
    truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after a step ``score``, ``score/nearer`` (1 if r is 1),
    ``score/understood`` (1 if the game takes the command) and ``feedback`` too.
    ``env.unwrapped.references`` has the next command of the way that TextWorld knows.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all"; their seeds differ.
    - ``dataset``: "houses" (generated) is all that there is.
    - ``rooms``, ``objects``, ``quest_length``: the size of a game (2, 4, 3).
    - ``list_commands``: say what can be done (True); commands that only look are left out.
    - ``max_turns``: the most commands of an episode; ``None`` (default) is twice ``quest_length``.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Côté et al. (2018), TextWorld: A Learning Environment for Text-based Games.

    ## Version History
    * v0: initial version.
    """

    observation_space = Text(MAX_OBSERVATION_LENGTH)
    action_space = Text()

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str = DATASET,
        rooms: int = 2,
        objects: int = 4,
        quest_length: int = 3,
        list_commands: bool = True,
        max_turns: int | None = None,
    ) -> None:
        if dataset != DATASET:
            raise ValueError(
                f"Dataset {reprlib.repr(dataset)} does not exist."
                f"{did_you_mean(dataset, (DATASET,))} The only embedded set of games is "
                f"{DATASET!r}, and files are not taken."
            )
        sizes = (
            whole_number("rooms", rooms),
            whole_number("objects", objects),
            whole_number("quest_length", quest_length),
        )
        self.list_commands = check_flag("list_commands", list_commands)
        self.max_turns = whole_number("max_turns", 2 * sizes[2] if max_turns is None else max_turns)
        parts = SPLITS if check_split(split) == "all" else (split,)
        self.examples = tuple(
            Quest(f"{part}/{seed}", seed, *sizes) for part in parts for seed in SEEDS[part]
        )

    def begin(self, example: Quest, rng: np.random.Generator) -> Episode[Quest]:
        """Word the quest and tell where it begins; the state is the commands that were taken."""
        start = position(example, ())
        said = f"{' '.join(start.progress.game.objective.split())}\n{self._tell(start)}"
        messages = ({"role": "user", "content": said},)
        return Episode(example, rng, say(said), messages, state=())

    def planned_turns(self, example: Quest) -> int:
        """Return the most commands of an episode: one that a budget ends could have had them."""
        return self.max_turns

    def score(self, episodes: Sequence[Episode[Quest]], actions: Sequence[str]) -> list[Outcome]:
        """Score each command by TextWorld's intermediate reward."""
        return [self._outcome(*pair) for pair in zip(episodes, actions, strict=True)]

    def proceed(self, episode: Episode[Quest], action: str, outcome: Outcome) -> None:
        """Write the command down, and tell where it led or finish."""
        episode.state = _path_after(episode, action)
        now = position(episode.example, episode.state)
        episode.finished = now.progress.done or episode.turn >= self.max_turns
        said = outcome.feedback
        if not episode.finished:
            said = f"{said} {self._tell(now)}"
        WritingTask.append(episode, action, said)

    def references(self, episode: Episode[Quest]) -> tuple[str, ...]:
        """Return the next command of the known way to the end."""
        if episode.finished:
            return ()
        return position(episode.example, episode.state).policy[:1]

    def _outcome(self, episode: Episode[Quest], action: str) -> Outcome:
        path = _path_after(episode, action)
        if path == episode.state:
            return Outcome(0.5, {"nearer": 0.0, "understood": 0.0}, UNKNOWN)
        wording, taken = position(episode.example, episode.state).commands[path[-1]]
        after = position(episode.example, path)
        feedback = f"You {wording}." if _changes(taken) else "You look around."
        if after.progress.done:
            feedback += " You did it!" if after.progress.completed else " Now it cannot be done."
        parts = {"nearer": float(after.reward > 0), "understood": 1.0}
        return Outcome((1 + after.reward) / 2, parts, feedback)

    def _tell(self, now: Position) -> str:
        seen = describe(now.progress.game, now.progress.state.facts)
        if not self.list_commands:
            return seen
        can = sorted(wording for wording, action in now.commands.values() if _changes(action))
        return f"{seen}\n{CAN}{'; '.join(can)}."


def _path_after(episode: Episode[Quest], action: str) -> tuple[str, ...]:
    """Return the commands that were taken with this one, which is left out if it is not."""
    path: tuple[str, ...] = episode.state
    command = " ".join(action.split()).removesuffix(".").rstrip().casefold()
    taken = position(episode.example, path).commands
    return (*path, command) if command in taken else path


def _changes(action: Any) -> bool:
    return not str(action.name).startswith(_LOOKS)
