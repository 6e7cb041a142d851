"""What an update costs, counted: forward passes, tokens in them, and the largest tensor.

Counts do not depend on the machine, so a slow path cannot creep back unseen. One group plays one
episode here, so all that is computed can be told from what was said: a token is computed once for
each prefix that it ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from largest import LargestTensor
from three_tokens import TASKS, Identity, make_agent, task_fixture


class Spelled(Identity):
    """Two turns, so that the second one reads what the first one has left."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(split, ("ab",))


_tasks = task_fixture({**TASKS, "Spelled-v9": Spelled})


@contextmanager
def counted(*models: Any) -> Iterator[list[tuple[int, bool]]]:
    """Forward passes of the models' trunks: tokens computed, and whether with gradients."""
    passes: list[tuple[int, bool]] = []

    def note(_: Any, __: Any, inputs: Any) -> None:
        passes.append((inputs["input_ids"].numel(), torch.is_grad_enabled()))

    handles = [m.base_model.register_forward_pre_hook(note, with_kwargs=True) for m in models]
    yield passes
    for handle in handles:
        handle.remove()


def prefixes(sequences: Any) -> int:
    """How many distinct beginnings the sequences have."""
    return len({tuple(s.ids[:n]) for s in sequences for n in range(1, len(s) + 1)})


def made(agent: str, **settings: Any) -> Any:
    shape = {"prompts": 1, "group_size": 8, "max_new_tokens": 3}
    return make_agent("Spelled-v9", agent=agent, **{**shape, **settings})


def rollout_of(agent: Any) -> Any:
    with counted(agent.policy.model) as passes:
        rollout = agent.batch = agent.collect()
    return rollout, passes


@pytest.mark.parametrize("seed", range(3))
def test_a_rollout_reads_every_prefix_once(seed: int) -> None:
    agent = made("reinforce", seed=seed)
    rollout, passes = rollout_of(agent)
    # The last token of a conversation is never read.
    needed = len({tuple(s.ids[:n]) for s in rollout.sequences for n in range(1, len(s))})
    assert agent.policy.read_tokens == needed
    assert not any(gradients for _, gradients in passes)
    computed = sum(tokens for tokens, _ in passes)
    assert needed <= computed < 2 * needed  # holes of rows that wait are fewer than rows that go
    longest = [max(s.turns.count(turn) for s in rollout.sequences) for turn in range(2)]
    assert len(passes) == sum(longest)  # one for a prompt, one for every token but the last


EVERY: dict[str, tuple[dict[str, Any], int, int]] = {
    # agent -> settings, forward passes without and with gradients
    "reinforce": ({}, 0, 1),
    "immediate-reward": ({}, 0, 1),
    "rloo": ({"kl_coef": 0.1}, 1, 1),  # the reference, for the charged reward
    "grpo": ({"epochs": 1, "minibatches": 1}, 0, 1),
    "ppo": ({"epochs": 2, "minibatches": 1, "kl_coef": 0.1}, 3, 2),  # values; the reference, twice
}


@pytest.mark.parametrize("name", EVERY)
def test_an_update_reads_every_prefix_once_a_pass(name: str) -> None:
    settings, without, gradients = EVERY[name]
    agent = made(name, **settings)
    rollout, _ = rollout_of(agent)
    reference = [] if agent.reference is None else [agent.reference.model]
    with counted(agent.policy.model, *reference) as passes:
        agent.learn_from(rollout)
    assert sum(with_gradients for _, with_gradients in passes) == gradients
    assert len(passes) == without + gradients
    assert {tokens for tokens, _ in passes} == {prefixes(rollout.sequences)}
    assert prefixes(rollout.sequences) < 0.7 * sum(map(len, rollout.sequences))


@pytest.mark.parametrize("name", EVERY)
def test_the_largest_tensor_of_an_update(name: str) -> None:
    agent = made(name, group_size=32, **EVERY[name][0])
    rollout, _ = rollout_of(agent)
    nodes = prefixes(rollout.sequences)
    with LargestTensor() as seen:
        agent.learn_from(rollout)
    # The mask of the tree, once for all heads: scores of attention are never written down, nor is
    # anything else that grows with the square of a length, and nothing is there once a sequence.
    assert nodes > 100
    assert seen.bytes == 4 * nodes**2
