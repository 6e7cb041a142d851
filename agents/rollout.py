"""Rollouts: a policy plays whole episodes of a vector environment, and every answer is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
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


@runtime_checkable
class MessageReader(Protocol):
    """A player that is shown each row's conversation, ``info["messages"]``, as its observation.

    Chat templates are made for messages; :func:`play` looks for the attribute alone.
    """

    reads_messages: bool


@runtime_checkable
class StateTeller(Protocol):
    """A player that can tell the state which a truncated episode was left in, for a critic."""

    def state_of(self, row: int, observation: Any) -> Any:
        """Return the state of a row as a sequence without an answer."""
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
        best_scores: (D,) float32, the highest score that each answer could have had; NaN where it
            is not known, and everywhere if left out.
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
    best_scores: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not len(self.best_scores):
            self.best_scores = torch.full_like(self.scores, torch.nan)
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


def merge(rollouts: Sequence[Rollout]) -> Rollout:
    """Lay rollouts side by side as one: their rows and answers are numbered on.

    Args:
        rollouts: At least one, of as many different rows each as it has episodes.
    """
    if len(rollouts) == 1:
        return rollouts[0]
    rows = np.cumsum([0, *(r.episodes for r in rollouts)]).tolist()
    answers = np.cumsum([0, *(len(r.rewards) for r in rollouts)]).tolist()
    scored = [int((~r.scores.isnan()).sum()) for r in rollouts]
    placed = list(zip(rollouts, rows[:-1], answers[:-1], scored, strict=True))
    names = dict.fromkeys(name for r in rollouts for name in r.parts)
    return Rollout(
        sequences=[replace(s, row=s.row + row) for r, row, _, _ in placed for s in r.sequences],
        decision_of=[d + answer for r, _, answer, _ in placed for d in r.decision_of],
        rewards=torch.cat([r.rewards for r in rollouts]),
        rows=torch.cat([r.rows + row for r, row, _, _ in placed]),
        turns=torch.cat([r.turns for r in rollouts]),
        scores=torch.cat([r.scores for r in rollouts]),
        parts={
            name: sum(r.parts.get(name, 0.0) * n for r, _, _, n in placed) / max(1, sum(scored))
            for name in names
        },
        episodes=rows[-1],
        cut_share=sum(r.cut_share * len(r.rewards) for r in rollouts) / answers[-1],
        left_in={
            number + row: replace(state, row=number + row)
            for r, row, _, _ in placed
            for number, state in r.left_in.items()
        },
        old_log_probs=[p for r in rollouts for p in r.old_log_probs],
        best_scores=torch.cat([r.best_scores for r in rollouts]),
    )


def earned(
    rewards: npt.ArrayLike, scores: npt.ArrayLike, best_scores: npt.ArrayLike
) -> dict[str, float]:
    """Return what a rollout earned, as ``rollout/…`` metrics.

    Args:
        rewards: (D,) what each answer earned.
        scores: (D,) their scores; NaN where a step was not scored.
        best_scores: (D,) the highest scores that they could have had; NaN where that is unknown.

    Returns:
        The mean reward, the mean score (0 if nothing was scored) and, if a best score is known,
        the mean regret.
    """
    score = np.asarray(scores, np.float64)
    regret = np.asarray(best_scores, np.float64) - score
    scored, known = score[~np.isnan(score)], regret[~np.isnan(regret)]
    metrics = {
        "rollout/reward": float(np.mean(np.asarray(rewards, np.float64))),
        "rollout/score": float(scored.mean()) if len(scored) else 0.0,
    }
    return metrics | ({"rollout/regret": float(known.mean())} if len(known) else {})


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
    left_in: Any = None  # the last state, if the episode was truncated
    truncated: bool = False


def row_of(observations: Any, i: int) -> Any:
    """Take row i out of batched observations (text, tuples and dicts of them, arrays)."""
    if isinstance(observations, dict):
        return {
            key: tuple(v[i] for v in value) if key == "candidates" else value[i]
            for key, value in observations.items()
        }
    return observations[i]


def _messages(info: dict[str, Any]) -> Any:
    if "messages" not in info:
        raise ValueError(
            "The policy reads messages (it uses a chat template), and the environment gives no "
            "info['messages']. Add them to its info, or make the policy with chat=False."
        )
    return info["messages"]


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
        player: Answers observations, or messages (:class:`MessageReader`).
        envs: A vector environment with n rows that resets them itself, in the same or next step.
        seeds: n seeds, one a row.
        options: Options of the reset.
        look: Ask the environment for references and candidate scores too, and let an
            :class:`Oracle` see it (native form only).

    Returns:
        Every step, turn by turn.

    Raises:
        ValueError: The player reads messages, and the environment gives none.
    """
    n = envs.num_envs
    observations, infos = envs.reset(seed=list(seeds), options=options)
    each = step_infos(infos, n)
    idle = "" if isinstance(envs.single_action_space.sample(), str) else 0
    active = list(range(n))
    steps: list[Step] = []
    turn = 0
    while active:
        references = envs.unwrapped.references if look else [()] * n
        known = envs.unwrapped.candidate_scores if look else [None] * n
        if look and isinstance(player, Oracle):
            player.peek(envs.unwrapped)
        if isinstance(player, MessageReader):
            seen = {r: _messages(each[r]) for r in active}
        else:
            seen = {r: row_of(observations, r) for r in active}
        actions = player.act(seen, turn)
        observations, rewards, terminated, truncated, infos = envs.step(
            [actions.get(r, idle) for r in range(n)]
        )
        each = step_infos(infos, n)
        for r in active:
            # A time limit may strike at the very step that ends the episode: there is no future.
            cut_off = bool(truncated[r] and not terminated[r])
            left_in = None
            if cut_off and isinstance(player, StateTeller):
                final = (
                    _messages(each[r])
                    if isinstance(player, MessageReader)
                    else _final_observation(observations, infos, r)
                )
                left_in = player.state_of(r, final)
            steps.append(
                Step(
                    row=r,
                    turn=turn,
                    action=actions[r],
                    reward=float(rewards[r]),
                    info=each[r],
                    references=references[r],
                    candidate_scores=known[r],
                    observation=seen[r],
                    left_in=left_in,
                    truncated=cut_off,
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


def collect(
    player: Any,
    envs: Any,
    *,
    seeds: Sequence[int],
    options: dict[str, Any] | None = None,
    look: bool = False,
) -> Rollout:
    """Play one episode in every row and lay out what was sampled and earned.

    Args:
        player: What ``policy.begin()`` returned.
        envs: A vector environment.
        seeds: One a row; rows with the same seed play the same episode.
        options: Options of the reset.
        look: Let an :class:`Oracle` see the accepted answers.
    """
    steps = play(player, envs, seeds=seeds, options=options, look=look)
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
        left_in={s.row: s.left_in for s in steps if s.left_in is not None},
        best_scores=torch.tensor([float(s.info.get("best_score", np.nan)) for s in steps]),
    )


def episode_seeds(seed: int, iteration: int, prompts: int, group_size: int) -> list[int]:
    """Return the seeds of one iteration's rows: ``prompts`` groups of ``group_size`` alike.

    They depend on the run's seed and the iteration alone, so a resumed run sees what the
    uninterrupted one would have seen.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(iteration,))
    drawn = sequence.generate_state(prompts, np.uint64)
    return [int(s) for s in drawn for _ in range(group_size)]
