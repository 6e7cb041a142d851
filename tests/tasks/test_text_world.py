"""TextWorld: its games and rewards are those of the package, and what is told is what is true."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import llm_envs
from agents.evaluation import evaluate
from benchmarks import reference_scores
from benchmarks.reference_scores import OraclePlayer, RulePlayer, most_told_command
from llm_envs.datasets.splits import SPLITS

textworld = pytest.importorskip("textworld", reason="needs the extra: llm-envs[textworld]")
from textworld.generator.game import Event, GameProgression  # noqa: E402

from llm_envs.tasks import text_world  # noqa: E402
from llm_envs.tasks.text_world import SEEDS, UNKNOWN, Quest, describe, generate, position  # noqa: E402


def quest(seed: int, rooms: int = 2, objects: int = 4, length: int = 3) -> Quest:
    return Quest(f"train/{seed}", seed, rooms, objects, length)


def make_env(**arguments: Any) -> Any:
    return gym.make("TextWorld-v0", **arguments).unwrapped


# --- games ---------------------------------------------------------------------------------------


def test_splits_share_no_seed_and_no_game() -> None:
    every = [seed for split in SPLITS for seed in SEEDS[split]]
    assert len(set(every)) == len(every)
    told = [make_env(split=s).reset(options={"example": i})[0] for s in SPLITS for i in range(12)]
    assert len(set(told)) == len(told)


FRESH = """
import hashlib, json, sys
from llm_envs.tasks.text_world import Quest, position
told = []
for seed in (3, 10_003, 20_003):
    now = position(Quest("x", seed, 3, 6, 4), ())
    told += [now.progress.game.objective, *now.commands, *now.policy]
    now = position(Quest("x", seed, 3, 6, 4), (now.policy[0].casefold(),))
    told += [*now.commands, *now.policy]
print(json.dumps(told))
"""


def test_games_are_the_same_in_every_process_and_folder(tmp_path: Path) -> None:
    (tmp_path / "textworld_data" / "logic").mkdir(parents=True)  # TextWorld would read this
    root = str(Path(llm_envs.__file__).parents[1])
    told = []
    for hash_seed, folder in (("1", root), ("2", tmp_path)):
        code = "import textworld, os; os.chdir(sys.argv[1])"
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}\n{FRESH}", str(folder)],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        told.append(json.loads(done.stdout))
    assert told[0] == told[1]
    assert len(set(told[0])) > 20


@pytest.mark.parametrize("seed", [0, 1, 2, 10_000, 20_000])
def test_commands_and_rewards_are_those_of_textworld_itself(seed: int, tmp_path: Path) -> None:
    """Beside TextWorld's own environment, 40 commands at random or of the way to the end."""
    size = quest(seed, rooms=3, objects=6, length=4)
    generate(size).save(str(tmp_path / "game.json"))
    infos = textworld.EnvInfos(
        intermediate_reward=True, policy_commands=True, admissible_commands=True
    )
    theirs = textworld.start(str(tmp_path / "game.json"), infos)
    rng = random.Random(seed)
    state, path, now = theirs.reset(), (), position(size, ())
    seen = set()
    for _ in range(40):
        assert sorted(wording for wording, _ in now.commands.values()) == state.admissible_commands
        assert list(now.policy) == state.policy_commands
        command = rng.choice([now.policy[0], *state.admissible_commands])
        state, _, done = theirs.step(command)
        path = (*path, command.casefold())
        now = position(size, path)
        assert now.reward == state.intermediate_reward
        assert now.progress.done == done
        seen.add(now.reward)
        if done:
            state, path, now = theirs.reset(), (), position(size, ())
    assert seen == {-1, 0, 1}


def test_the_known_way_wins_every_game() -> None:
    for split in SPLITS:
        found = evaluate(OraclePlayer, "TextWorld-v0", split=split, episodes=8)
        assert {turn["score"] for turn in found.transcripts} == {1.0}
        assert set(found.parts["nearer"]) == set(found.parts["understood"]) == {1.0}


def test_other_sizes_are_made() -> None:
    env = make_env(rooms=1, objects=2, quest_length=1)
    env.reset(seed=0)
    assert len(position(env.episode.example, ()).policy) == 1
    assert env.step(env.references[0])[2]  # terminated
    assert env.task.max_turns == 2
    assert len(position(quest(0, 8, 10, 4), ()).progress.game.world.rooms) == 8


# --- what commands are worth ---------------------------------------------------------------------


def test_rewards_add_up_to_what_the_way_became_shorter() -> None:
    for seed in range(8):
        env = make_env(max_turns=12)
        env.reset(seed=seed)
        rng = random.Random(seed)
        start = len(position(env.episode.example, ()).policy)
        total, finished = 0.0, False
        while not finished:
            commands = [
                w for w, _ in position(env.episode.example, env.episode.state).commands.values()
            ]
            _, reward, finished, _, info = env.step(
                rng.choice([env.references[0], *commands, "jump"])
            )
            assert reward == 2 * info["score"] - 1
            assert info["score/nearer"] == (reward == 1.0)
            total += reward
        end = position(env.episode.example, env.episode.state)
        assert not end.progress.failed
        assert total == start - len(end.policy)


def test_wording_is_exact_but_for_case_spaces_and_a_full_stop() -> None:
    env = make_env()
    for variant in ("{}", " {}", "{}.", "  {}  . ", "{} please", "please {}", "{}{}", "", "."):
        env.reset(options={"example": 5})
        before, command = env.episode.observation, env.references[0]
        action = variant.replace("{}", command.upper())
        observation, reward, *_, info = env.step(action)
        taken = "please" not in variant and variant.count("{}") == 1
        assert (reward, info["score/understood"]) == ((1.0, 1.0) if taken else (0.0, 0.0))
        assert info["feedback"].startswith(f"You {command}." if taken else UNKNOWN)
        assert observation.startswith(before + action)
        if not taken:
            assert env.references == (command,)
            assert env.episode.state == ()


def test_what_can_be_done_is_listed_and_can_be_left_out() -> None:
    listing, silent = make_env(), make_env(list_commands=False)
    shown, bare = (env.reset(options={"example": 7})[0] for env in (listing, silent))
    listed = shown.rpartition("\nYou can: ")[2].removesuffix(".\nAssistant:").split("; ")
    assert shown == bare.replace("\nAssistant:", f"\nYou can: {'; '.join(listed)}.\nAssistant:")
    for command in listed:
        listing.reset(options={"example": 7})
        assert listing.step(command)[-1]["score/understood"] == 1.0
    known = position(listing.episode.example, ()).commands
    looks = {"look", "inventory", *(c for c in known if c.startswith("examine "))}
    assert {c.casefold() for c in listed} == known.keys() - looks


def test_the_rule_to_beat_gives_the_command_that_the_quest_speaks_of() -> None:
    told = "User: Then, recover the onion from the desk.\nYou are in the den. {}\nAssistant:"
    listed = told.format("\nYou can: go west; put key on desk; take onion from desk.")
    assert most_told_command(listed) == "take onion from desk"
    later = f"{listed} take onion from desk\nUser: Taken.\nYou can: go west; put onion on desk; "
    assert most_told_command(f"{later}take onion from desk.\nAssistant:") == "put onion on desk"
    for anything in ("", "User: \nAssistant:", told.format("")):
        assert isinstance(most_told_command(anything), str)
    found = evaluate(
        lambda: RulePlayer(most_told_command), "TextWorld-v0", split="test", episodes=8
    )
    assert set(found.parts["understood"]) == {1.0}


# --- what is told --------------------------------------------------------------------------------


@pytest.fixture
def house() -> Any:
    """Two rooms with a door between them, a third one, and a thing of every kind."""
    maker = textworld.GameMaker()
    den, hall, attic = (maker.new_room(name) for name in ("den", "hall", "attic"))
    maker.set_player(den)
    path = maker.connect(den.east, hall.west)
    door = maker.new_door(path, name="oak gate")
    door.add_property("locked")
    maker.connect(den.north, attic.south)
    box, safe, desk, apple, key, hat = (
        maker.new(kind, name=name)
        for kind, name in zip(
            "ccsfko", ("box", "iron safe", "desk", "apple", "key", "hat"), strict=True
        )
    )
    box.add_property("open")
    safe.add_property("closed")
    den.add(box, safe, desk, key)
    box.add(apple)
    maker.inventory.add(hat)
    walk = GameProgression(maker.build(validate=False))
    names = {name: info.name for name, info in walk.game.infos.items()}
    actions = []
    for command in ("take apple from box", "put apple on desk"):
        named = {action.format_command(names): action for action in walk.valid_actions}
        actions.append(named[command])
        walk.update(named[command])
    maker.quests = [textworld.generator.Quest([Event(actions)])]
    return maker.build(validate=False)


def test_all_that_is_seen_is_told(house: Any) -> None:
    assert describe(house, house.world.state.facts) == (
        "You are in the den. There is an open box with an apple in it. There is a desk with "
        "nothing on it. There is a closed iron safe. On the floor: a key. To the east is a locked "
        "oak gate. The way is free to the north. You carry a hat."
    )


def test_a_quest_that_can_no_longer_be_done_is_lost(
    house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_world, "generate", lambda _: house)
    env = make_env(split="validation", rooms=77)  # no game of this size has been made
    env.reset(options={"example": 0})
    assert env.step("take apple from box")[1] == 1.0
    observation, reward, terminated, _, info = env.step("eat apple")
    assert (reward, terminated, info["score"]) == (-1.0, True, 0.0)
    assert observation.endswith("eat apple\nUser: You eat apple. Now it cannot be done.")
    env.reset(options={"example": 0})
    for command, reward, said in (
        ("take apple from box", 1.0, "You take apple from box. You are in the den."),
        ("examine desk", 0.0, "You look around. You are in the den."),
        ("insert apple into box", -1.0, "You insert apple into box."),
        ("take apple from box", 1.0, "You carry an apple and a hat."),
        ("put apple on desk", 1.0, "You put apple on desk. You did it!"),
    ):
        observation, earned, *_ = env.step(command)
        assert earned == reward
        assert said in observation.rpartition("User: ")[2]


# --- without the extra ---------------------------------------------------------------------------


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    monkeypatch.delitem(sys.modules, "llm_envs.tasks.text_world")
    for make in (gym.make, lambda id: gym.make_vec(id, num_envs=2)):
        with pytest.raises(ImportError, match=r"pip install 'llm-envs\[textworld\]'"):
            make("TextWorld-v0")
    arguments = reference_scores.Arguments(
        env=("TextWorld-v0", "TextBattle-v0"), split=("validation",), episodes=2
    )
    reference_scores.main(arguments)
    printed = capsys.readouterr()
    assert "TextWorld-v0 is left out." in printed.err
    assert "llm-envs[textworld]" in printed.err
    assert "TextBattle" in printed.out


def test_importing_the_package_does_not_import_textworld() -> None:
    code = "import llm_envs, agents, sys; assert 'textworld' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_sizes_that_are_impossible_are_refused() -> None:
    for name in ("rooms", "objects", "quest_length"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            make_env(**{name: 0})
    with pytest.raises(TypeError, match="list_commands is 'no'"):
        make_env(list_commands="no")
