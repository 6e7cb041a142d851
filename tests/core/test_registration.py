"""By which names an environment is known."""

from __future__ import annotations

import pytest

from llm_envs.core.registration import bare_id, known_id


@pytest.mark.parametrize(
    "name", ["DialogueQA-v0", "llm_envs/DialogueQA-v0", "llm_envs:DialogueQA-v0"]
)
def test_an_environment_is_known_by_each_of_its_names(name: str) -> None:
    assert known_id(name) == bare_id(name) == "DialogueQA-v0"


def test_an_unknown_one_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"'DialogQA'\. Did you mean 'DialogueQA-v0'\? There are:"):
        known_id("DialogQA")


def test_one_of_another_module_is_refused_and_not_taken_for_ours() -> None:
    with pytest.raises(ValueError, match=r"names the module 'mine'.*not imported here"):
        known_id("mine:DialogueQA-v0")
