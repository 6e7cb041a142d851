"""Rollouts: a policy plays whole episodes of a vector environment, and every answer is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from llm_envs.core.vector import step_infos


class Player(Protocol):
    """What plays the rows of a rollout; a policy's ``begin`` returns one."""

    sequences: list[Any]
    cut: int
    answers: int

    def act(self, observations: dict[int, Any], turn: int) -> dict[int, Any]:
        """Answer the observation of each row that is still in play."""
        ...


@runtime_checkable
class Oracle(Protocol):
    """A player that is shown what no policy may see: for upper bounds of a score, and only there.

    ``play(…, look=True)`` calls ``peek`` before each turn.
    """

    def peek(self, envs: Any) -> None:
        """Look at the vector environment, with the references of every row."""
        ...


@dataclass(slots=True)
class Rollout:
    """Whole episodes with what every answer earned; D answers ("decisions") in N sampled tokens.

    Attributes:
        sequences: What the policy read and sampled, for ``policy.score``.
        decision_of: For each sequence the answer that each of its sampled tokens belongs to.
        rewards: (D,) float32.
        rows: (D,) the episode of each answer, 0 to n - 1.
        turns: (D,) the turn of each answer.
        scores: (D,) float32; NaN where a step was not scored.
        parts: Mean of each named score.
        episodes: Number of episodes n.
        cut_share: Share of the answers that the length limit ended.
        left_in: Row -> the state that a *truncated* episode was left in, for a critic: its future
            would have gone on.
        old_log_probs: For each sequence the log-probabilities of its tokens when they were
            sampled; the sampler's own if left out.
    """

    sequences: list[Any]
    decision_of: list[Tensor]
    rewards: Tensor
    rows: Tensor
    turns: Tensor
    scores: Tensor
    parts: dict[str, float]
    episodes: int
    cut_share: float
    left_in: dict[int, Any] = field(default_factory=dict)
    old_log_probs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.old_log_probs:
            self.old_log_probs = [
                torch.tensor([p for p, t in zip(s.log_probs, s.turns, strict=True) if t >= 0])
                for s in self.sequences
            ]

    @property
    def tokens(self) -> int:
        """Number N of sampled tokens."""
        return sum(map(len, self.decision_of))

    @property
    def lengths(self) -> Tensor:
        """Number of turns of each episode, (episodes,)."""
        return self.rows.bincount(minlength=self.episodes)

    def by_turn(self, values: Tensor) -> Tensor:
        """Lay (D,) values out as (episodes, most turns), zero where there was no turn."""
        table = values.new_zeros(self.episodes, int(self.turns.max()) + 1)
        table[self.rows, self.turns] = values
        return table

    def states_of(self, sequence: int) -> Tensor:
        """Return the answers of a sequence, in the order of its states."""
        answers: Tensor = self.decision_of[sequence].unique_consecutive()  # type: ignore[no-untyped-call]
        return answers


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one row, as an observer sees it."""

    row: int
    turn: int
    action: Any
    reward: float
    info: dict[str, Any]
    references: tuple[str, ...] = ()
    candidate_scores: Any = None
    observation: Any = None
    left_in: Any = None  # the last observation, if the episode was truncated


def row_of(observations: Any, i: int) -> Any:
    """Take row i out of batched observations (text, tuples and dicts of them, arrays)."""
    if isinstance(observations, dict):
        return {
            key: tuple(v[i] for v in value) if key == "candidates" else value[i]
            for key, value in observations.items()
        }
    return observations[i]


def play(
    player: Player,
    envs: Any,
    *,
    seeds: Sequence[int],
    options: dict[str, Any] | None = None,
    look: bool = False,
) -> list[Step]:
    """Play one whole episode in every row of a vector environment.

    Rows whose episode is over are left alone: whatever autoreset does with them is ignored, so
    that nothing of the next episodes is trained on.

    Args:
        player: Answers observations.
        envs: A vector environment with n rows that resets them itself, in the same or next step.
        seeds: n seeds, one a row.
        options: Options of the reset.
        look: Ask the environment for references and candidate scores too, and let an
            :class:`Oracle` see it (native form only).

    Returns:
        Every step, turn by turn.
    """
    n = envs.num_envs
    observations, _ = envs.reset(seed=list(seeds), options=options)
    idle = "" if isinstance(envs.single_action_space.sample(), str) else 0
    active = list(range(n))
    steps: list[Step] = []
    turn = 0
    while active:
        references = envs.references if look else [()] * n
        known = envs.candidate_scores if look else [None] * n
        if look and isinstance(player, Oracle):
            player.peek(envs)
        seen = {r: row_of(observations, r) for r in active}
        actions = player.act(seen, turn)
        observations, rewards, terminated, truncated, infos = envs.step(
            [actions.get(r, idle) for r in range(n)]
        )
        each = step_infos(infos, n)
        for r in active:
            # A time limit may strike at the very step that ends the episode: there is no future.
            cut_off = truncated[r] and not terminated[r]
            left_in = _final_observation(observations, infos, r) if cut_off else None
            reward = float(rewards[r])
            steps.append(
                Step(
                    r, turn, actions[r], reward, each[r], references[r], known[r], seen[r], left_in
                )
            )
        active = [r for r in active if not (terminated[r] or truncated[r])]
        turn += 1
    return steps


def _final_observation(observations: Any, infos: dict[str, Any], row: int) -> Any:
    """Return what a finished row saw last: same-step autoreset keeps it apart."""
    kept = infos.get("_final_obs")
    if kept is not None and kept[row]:
        return infos["final_obs"][row]
    return row_of(observations, row)


def collect(player: Any, envs: Any, *, seeds: Sequence[int], look: bool = False) -> Rollout:
    """Play one episode in every row and lay out what was sampled and earned.

    Args:
        player: What ``policy.begin()`` returned.
        envs: A vector environment.
        seeds: One a row; rows with the same seed play the same episode.
        look: Let an :class:`Oracle` see the accepted answers.
    """
    steps = play(player, envs, seeds=seeds, look=look)
    number = {(s.row, s.turn): i for i, s in enumerate(steps)}
    parts: dict[str, list[float]] = {}
    for step in steps:
        for key, value in step.info.items():
            if key.startswith("score/"):
                parts.setdefault(key.removeprefix("score/"), []).append(float(value))
    return Rollout(
        sequences=player.sequences,
        decision_of=[
            torch.tensor([number[s.row, t] for t in s.turns if t >= 0], dtype=torch.long)
            for s in player.sequences
        ],
        rewards=torch.tensor([s.reward for s in steps]),
        rows=torch.tensor([s.row for s in steps]),
        turns=torch.tensor([s.turn for s in steps]),
        scores=torch.tensor([float(s.info.get("score", np.nan)) for s in steps]),
        parts={part: float(np.mean(values)) for part, values in parts.items()},
        episodes=envs.num_envs,
        cut_share=player.cut / max(1, player.answers),
        left_in={s.row: player.state_of(s.row, s.left_in) for s in steps if s.left_in is not None},
    )


def episode_seeds(seed: int, iteration: int, prompts: int, group_size: int) -> list[int]:
    """Return the seeds of one iteration's rows: ``prompts`` groups of ``group_size`` alike.

    They depend on the run's seed and the iteration alone, so a resumed run sees what the
    uninterrupted one would have seen.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(iteration,))
    drawn = sequence.generate_state(prompts, np.uint64)
    return [int(s) for s in drawn for _ in range(group_size)]
