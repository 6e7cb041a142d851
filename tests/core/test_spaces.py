"""The text space: all of Unicode, a cheap check, short samples, and Gymnasium's manners."""

from __future__ import annotations

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from hypothesis import given
from hypothesis import strategies as st

from llm_envs.core.spaces import MAX_ACTION_LENGTH, MAX_OBSERVATION_LENGTH, Text


@given(st.text(st.characters()))
def test_every_short_enough_string_belongs_to_it(text: str) -> None:
    assert text in Text()
    assert (text in Text(5)) == (len(text) <= 5)


def test_the_bounds_belong_to_it_and_nothing_beyond() -> None:
    assert MAX_ACTION_LENGTH == 2**20
    assert MAX_OBSERVATION_LENGTH == 2**31 - 1
    assert "" in Text()
    assert "\ud800" * 2**20 in Text()
    assert "a" * (2**20 + 1) not in Text()
    assert "a" * (2**20 + 1) in Text(MAX_OBSERVATION_LENGTH)


@pytest.mark.parametrize("value", [None, 1, b"text", ["t"], ("t",), np.array(["t"])], ids=repr)
def test_nothing_but_strings_belongs_to_it(value: object) -> None:
    assert value not in Text()


def test_numpy_strings_are_strings() -> None:
    assert np.str_("text") in Text()


@pytest.mark.parametrize("max_length", [0, 1, 10, 64, 2**20, 2**31 - 1])
def test_samples_are_short_printable_ascii_of_every_length(max_length: int) -> None:
    space = Text(max_length, seed=0)
    samples = [space.sample() for _ in range(2000)]
    assert all(sample in space and sample.isascii() and sample.isprintable() for sample in samples)
    assert {len(sample) for sample in samples} == set(range(min(max_length, 64) + 1))


def test_a_mask_allows_characters_and_fixes_the_length() -> None:
    space = Text(seed=0)
    mask = np.zeros(len(space.character_list), np.int8)
    mask[[space.character_index("x"), space.character_index("y")]] = 1
    assert len(space.sample(mask=(7, None))) == 7
    assert len(space.sample(probability=(7, None))) == 7
    for given_mask in ((None, mask), (9, mask)):
        samples = [space.sample(mask=given_mask) for _ in range(50)]
        assert set("".join(samples)) == {"x", "y"}
        assert max(map(len, samples)) <= 64
    shares = mask / mask.sum()
    assert set(space.sample(probability=(500, shares))) == {"x", "y"}
    with pytest.raises(ValueError, match="Only one of"):
        space.sample(mask=(None, mask), probability=(None, shares))


def test_a_seed_gives_the_same_samples_and_another_one_others() -> None:
    a, b = Text(seed=1), Text()
    b.seed(1)
    first = [a.sample() for _ in range(10)]
    assert first == [b.sample() for _ in range(10)]
    b.seed(2)
    assert first != [b.sample() for _ in range(10)]


def test_spaces_are_equal_by_their_length_alone() -> None:
    assert Text(5, seed=1) == Text(5, seed=2)
    assert Text(5) != Text(6)
    assert Text(5) != gym.spaces.Text(5)
    assert gym.spaces.Text(5) != Text(5)
    assert Text(5) != "Text(max_length=5)"


def test_repr_is_short() -> None:
    assert repr(Text(7)) == "Text(max_length=7)"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_samples_on_identically_and_by_itself(duplicate: object) -> None:
    space = Text(9, seed=3)
    space.sample()
    twin = duplicate(space)  # type: ignore[operator]
    assert twin == space
    assert twin.character_set == space.character_set
    samples = [twin.sample() for _ in range(10)]  # before the original moves on
    assert samples == [space.sample() for _ in range(10)]


def test_a_copy_of_an_unseeded_space_has_chance_of_its_own() -> None:
    space = Text()
    twin = copy.deepcopy(space)
    assert [space.sample() for _ in range(10)] != [twin.sample() for _ in range(10)]


def test_it_is_batched_as_a_tuple_of_independent_spaces() -> None:
    space = Text(9, seed=3)
    batched = batch_space(space, 4)
    assert batched == gym.spaces.Tuple([Text(9)] * 4)
    again = batch_space(Text(9, seed=3), 4)
    sample = batched.sample()
    assert sample == again.sample()
    assert sample in batched
    assert len(set(sample)) == 4
    assert tuple(iterate(batched, sample)) == sample
    assert concatenate(space, sample, create_empty_array(space, 4)) == sample


def test_a_thousand_are_batched_at_once() -> None:
    """Copying the tables of characters would make a dozen copies a row: see Text.__deepcopy__."""
    space = Text()
    copies = [copy.deepcopy(space) for _ in range(1000)]
    assert all(twin.character_list is space.character_list for twin in copies)
    assert len({id(twin) for twin in copies}) == 1000


def test_gymnasium_takes_it_in_dicts_and_json() -> None:
    space = gym.spaces.Dict(prompt=Text(), number=gym.spaces.Discrete(3))
    sample = space.sample()
    assert sample in space
    assert space.from_jsonable(space.to_jsonable([sample])) == [sample]
