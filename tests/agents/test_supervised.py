"""Imitation against torch's cross-entropy on conversations that are put together by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import cross_entropy

from agents.policies.models import eval_mode
from agents.rollout import Rollout
from llm_envs.core.task import ChoosingTask, Episode, Outcome
from three_tokens import END, A, B, Wanted, gradient, make_agent, registered, relative


class Ties(ChoosingTask[Wanted]):
    """Of three candidates the first and the last are equally good."""

    scores: np.ndarray | None = np.array([1.0, 0.25, 1.0])

    def __init__(self, split: str = "train") -> None:
        super().__init__(3, 1)
        self.examples = (Wanted(split, "a"),)

    def begin(self, example: Wanted, rng: np.random.Generator) -> Episode[Wanted]:
        features = np.zeros((3, 1), np.float32)
        return Episode(
            example, rng, {"prompt": "a", "candidates": ("a", "b", "a b"), "features": features}
        )

    def score(self, episodes: Sequence[Episode[Wanted]], actions: Sequence[Any]) -> list[Outcome]:
        return [Outcome((1.0, 0.25, 1.0)[a]) for a in actions]

    def candidate_scores(self, episode: Episode[Wanted]) -> Any:
        return self.scores

    def proceed(self, episode: Episode[Wanted], action: Any, outcome: Outcome) -> None:
        episode.finished = True


class Silent(Ties):
    """It does not tell what is good."""

    scores = None


@pytest.fixture(scope="module", autouse=True)
def _ties(three_token_tasks: None) -> Iterator[None]:
    with registered({"Ties-v9": Ties, "Silent-v9": Silent}):
        yield


def make(env: str = "Identity-v9", **settings: Any) -> Any:
    unclipped = {"group_size": 1, "max_grad_norm": 0.0}
    agent = make_agent(env, agent="supervised", dropout=0.5, **unclipped, **settings)
    agent.policy.model.double()
    return agent


def taught(agent: Any) -> tuple[Rollout, dict[str, float], Tensor]:
    """One update that moves nothing: what was played, its metrics, and its gradient."""
    rollouts: list[Rollout] = []
    found: list[Tensor] = []
    update = agent.update
    agent.update = lambda rollout: rollouts.append(rollout) or update(rollout)
    agent.take_step = lambda loss: found.append(gradient(agent))
    metrics = agent.iterate()
    return rollouts[0], metrics, found[0]


LETTER = {"a": A, "b": B}


def by_hand(letters: str, limit: int) -> tuple[list[int], list[bool]]:
    """The tokens of a dialogue of right answers, and which of them are the policy's.

    "User: a\nAssistant:" has five words; an answer is its letter and the end of sequence.
    """
    ids: list[int] = []
    own: list[bool] = []
    for letter in letters:
        asked = [3, 3, LETTER[letter], 3, 3]
        said = [LETTER[letter], END][:limit]
        ids += asked + said
        own += [False] * len(asked) + [True] * len(said)
    return ids, own


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("limit", [3, 2, 1])
def test_the_gradient_is_that_of_cross_entropy_on_the_accepted_answers(
    family: str, limit: int
) -> None:
    """The end of sequence is learned too where it has room; what the user said is not."""
    letters = ("ab", "b", "aab")
    agent = make(family=family, max_new_tokens=limit, env_kwargs={"letters": letters}, prompts=9)
    agent.policy.micro_batch_tokens = 40
    rollout, metrics, found = taught(agent)
    assert rollout.rewards.tolist() == [1.0] * len(rollout.rewards)
    assert rollout.cut_share == (1.0 if limit == 1 else 0.0)
    played = [len(s.states) for s in rollout.sequences]
    assert {1, 2, 3} == set(played)
    total, answers = torch.zeros((), dtype=torch.float64), 0
    for s, count in zip(rollout.sequences, played, strict=True):
        ids, own = by_hand({len(w): w for w in letters}[count], limit)
        assert s.ids == ids
        with eval_mode(agent.policy.model):
            logits = agent.policy.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor([i if mine else -100 for i, mine in zip(ids, own, strict=True)])
        total = total + cross_entropy(logits, targets[1:], reduction="sum")
        answers += count
    (total / answers).backward()  # type: ignore[no-untyped-call]
    assert relative(found, gradient(agent)) < 1e-6
    assert metrics["train/loss"] == pytest.approx(total.item() / answers, rel=1e-6)


def test_what_a_task_demonstrates_is_learned_before_what_it_accepts() -> None:
    agent = make(max_new_tokens=3, env_kwargs={"letters": ("aa",)}, prompts=2)
    agent.envs.task.demonstration = lambda episode: "ab"[episode.turn]
    rollout, _, _ = taught(agent)
    ids, _ = by_hand("aa", 3)
    ids[-2] = B  # of the second answer, after which comes the end
    assert [s.ids for s in rollout.sequences] == [ids] * 2
    assert rollout.rewards.tolist() == [1.0, 1.0, -1.0, -1.0]


def test_the_gradient_of_a_choice_is_that_of_cross_entropy_on_the_best_candidate() -> None:
    agent = make("Steps-v9", env_kwargs={"letters": ("ab", "b")}, prompts=6)
    rollout, metrics, found = taught(agent)
    assert rollout.rewards.tolist() == [1.0] * len(rollout.rewards)
    total = torch.zeros((), dtype=torch.float64)
    for decision in rollout.sequences:
        assert decision.action == (A, B).index(decision.prompt[-1]), "the letter that is asked"
        with eval_mode(agent.policy.model):
            logits = agent.policy.model(input_ids=torch.tensor([decision.prompt])).logits[0, -1]
        chosen = torch.tensor([decision.action])
        total = total + cross_entropy(logits.log_softmax(-1)[[A, B]][None], chosen)
    (total / len(rollout.rewards)).backward()  # type: ignore[no-untyped-call]
    assert relative(found, gradient(agent)) < 1e-6
    assert metrics["train/loss"] == pytest.approx(total.item() / len(rollout.rewards), rel=1e-6)


def test_of_candidates_that_are_equally_good_any_is_chosen() -> None:
    """400 choices; fair ones fail with chance 10^-4 over seeds."""
    agent = make("Ties-v9", prompts=400)
    counts = np.bincount([d.action for d in agent.collect().sequences], minlength=3)
    assert counts[1] == 0
    assert chisquare(counts[[0, 2]]).pvalue > 1e-4
    again = np.bincount([d.action for d in agent.collect().sequences], minlength=3)
    assert (again == counts).all(), "by the seed and the update alone"
    agent.iteration += 1
    assert [d.action for d in agent.collect().sequences] != [
        d.action for d in make("Ties-v9", prompts=400).collect().sequences
    ]


def test_what_cannot_be_imitated_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no accepted answer at turn 0.*candidate_scores"):
        make("Silent-v9").iterate()
    agent = make("Identity-v9")
    agent.envs.task.answers = lambda example, turn: ()
    with pytest.raises(ValueError, match=r"no accepted answer at turn 0.*references"):
        agent.iterate()
    with pytest.raises(ValueError, match=r"kl_in is 'reward'.*Use kl_in='loss'"):
        make(kl_coef=0.1, kl_in="reward")


def test_its_divergence_is_that_of_tokens_after_what_it_was_told() -> None:
    """Told tokens are no choice of the policy's: what diverges later does not make them bad."""
    beta, letters = 0.4, ("aab", "b")
    settings = {"max_new_tokens": 3, "env_kwargs": {"letters": letters}, "prompts": 6}
    agent = make(kl_coef=beta, **settings)
    agent.reference.model.double()
    torch.manual_seed(3)
    with torch.no_grad():
        for p in agent.policy.model.parameters():
            p += 0.2 * torch.randn_like(p)
    rollout, metrics, found = taught(agent)
    loss, divergence = torch.zeros((2,), dtype=torch.float64)
    tokens = 0
    for s in rollout.sequences:
        ids, own = by_hand({len(w): w for w in letters}[len(s.states)], 3)
        places = torch.tensor(own)[1:].nonzero()[:, 0]
        with eval_mode(agent.policy.model), eval_mode(agent.reference.model):
            log_p, log_q = (
                p.model(input_ids=torch.tensor([ids])).logits[0, places].log_softmax(-1)
                for p in (agent.policy, agent.reference)
            )
        loss = loss - log_p[torch.arange(len(places)), torch.tensor(ids)[1 + places]].sum()
        divergence = divergence + (log_p.exp() * (log_p - log_q.detach())).sum()
        tokens += len(places)
    assert divergence / tokens > 0.05
    (loss / len(rollout.rewards) + beta * divergence / tokens).backward()
    assert relative(found, gradient(agent)) < 1e-6
    assert metrics["train/kl"] == pytest.approx(divergence.item() / tokens, rel=1e-6)


def test_the_weight_of_its_divergence_is_adapted() -> None:
    agent = make(kl_coef=0.3, kl_target=0.1, kl_horizon=100, learning_rate=0.01)
    agent.reference.model.double()
    metrics = [agent.update(agent.collect()) for _ in range(2)]
    coef = 0.3
    for found in metrics:
        coef *= 1 + min(max(found["train/kl"] / 0.1 - 1, -0.2), 0.2) * 4 / 100
    assert agent.kl_coef == pytest.approx(coef, rel=1e-9)
