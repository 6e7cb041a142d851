"""CustomerService: answer what customers ask, after a search where one pays."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import bm25s
import numpy as np

from llm_envs.core.task import Episode, Outcome, WritingTask, whole_number
from llm_envs.datasets.faqs import load_faqs
from llm_envs.datasets.records import FAQ
from llm_envs.datasets.splits import Split
from llm_envs.scoring.rouge import rouge_batch
from llm_envs.scoring.text import CJK_LETTERS, split_cjk

QUESTIONS: Final = 3
"""Most questions that one customer asks."""
PASSAGE_WORDS: Final = 30
"""How much of an answer a search shows."""
REFERENCE_WORDS: Final = range(8, 25)
"""How many words of its first sentences the accepted answer has."""
HELPED: Final = 0.5
"""The least score of an answer that helped."""
QUERY_WORDS: Final = 64
"""How much of a query is looked for."""

THANKS: Final = "That helped, thank you."
NO_HELP: Final = "That did not help."
NOTHING_FOUND: Final = "Nothing was found."
_WORD: Final = re.compile(f"[{CJK_LETTERS}]|[^\\s{CJK_LETTERS}]+")
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[^\sa-z])|(?<=[。！？])|\s*\n+\s*")


# --- what is asked, and what is accepted ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Customer:
    """A customer with questions.

    Attributes:
        id: The id of the first question.
        unit: The group of customers who share questions with this one: a topic in a split.
        questions: What is asked, in this order; 1 to ``QUESTIONS``.
    """

    id: str
    unit: str
    questions: tuple[FAQ, ...]


def customers(faqs: Sequence[FAQ], split: str) -> tuple[Customer, ...]:
    """Return one customer for each question, who goes on with the next ones of its topic.

    After the last question of a topic comes its first. A question without a topic is asked alone.

    Args:
        faqs: n questions of one split.
        split: Its name, which the units carry.

    Returns:
        n customers, in the order of their first questions.
    """
    of_topic: dict[str, list[FAQ]] = {}
    for faq in faqs:
        of_topic.setdefault(faq.topic, []).append(faq)
    asked = dict.fromkeys(of_topic, 0)
    result = []
    for faq in faqs:
        if not faq.topic:
            result.append(Customer(faq.id, faq.unit, (faq,)))
            continue
        others, first = of_topic[faq.topic], asked[faq.topic]
        asked[faq.topic] += 1
        count = min(QUESTIONS, len(others))
        questions = [others[(first + k) % len(others)] for k in range(count)]
        result.append(Customer(faq.id, f"{faq.topic} ({split})", tuple(questions)))
    return tuple(result)


def beginning(text: str, most: int) -> str:
    """Return the first words of a text on one line; a CJK character is a word."""
    found = list(islice(_WORD.finditer(text), most))
    return " ".join(text[: found[-1].end()].split()) if found else ""


def reference(answer: str) -> str:
    """Return what is accepted as an answer: the first sentences of the whole one.

    They are as few as have 8 words, cut at 24 (``REFERENCE_WORDS``). In an FAQ they mostly answer
    the question (in 94 of 100 cases; others ask back, or announce what follows), what follows
    explains it, and a small model can write them.
    """
    text = answer.strip().removeprefix("- ")
    ends = [found.start() for found in _SENTENCE_END.finditer(text)]
    long_enough = (end for end in ends if len(_WORD.findall(text, 0, end)) >= REFERENCE_WORDS[0])
    return beginning(text[: next(long_enough, len(text))], REFERENCE_WORDS[-1])


# --- the search ----------------------------------------------------------------------------------


def query_of(action: str) -> str | None:
    """Return what an action looks for, or ``None`` if it is an answer."""
    head, colon, query = action.partition(":")
    return query.strip() if colon and head.strip().lower() == "search" else None


def terms(texts: Sequence[str]) -> list[list[str]]:
    """Return the lowercase words of each text that an index counts, without English stop words."""
    found: list[list[str]] = bm25s.tokenize(
        [split_cjk(text) for text in texts],
        token_pattern=r"(?u)\b\w+\b",
        stopwords="english_plus",
        return_ids=False,
        show_progress=False,
    )
    return found


class Index:
    """Ranks texts by BM25 (Lucene's variant, k₁ = 1.5, b = 0.75).

    A term q that stands in n of N texts adds to a text of l words, where it stands f times,

        ln(1 + (N - n + 0.5) / (n + 0.5)) · f / (f + k₁ (1 - b + b · l / mean l)).

    References:
        Robertson and Zaragoza (2009), "The Probabilistic Relevance Framework: BM25 and Beyond";
        Lù (2024), "BM25S: Orders of magnitude faster lexical search via eager sparse scoring".

    Args:
        texts: What can be found; n texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        found = terms(texts)
        self.size = len(texts)
        self.known = {term for text in found for term in text}
        self.engine = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        if self.known:
            self.engine.index(found, show_progress=False)

    def search(self, queries: Sequence[str], most: int) -> list[list[int]]:
        """Return the places of the best texts for each query, the best first.

        A text that shares no term with a query is not found by it.

        Args:
            queries: m queries, of which the first ``QUERY_WORDS`` words count.
            most: The most texts a query.
        """
        asked = terms([beginning(query, QUERY_WORDS) for query in queries])
        found: list[list[int]] = [[] for _ in queries]
        rows = [row for row, query in enumerate(asked) if not self.known.isdisjoint(query)]
        if rows:
            places, scores = self.engine.retrieve(
                [asked[row] for row in rows],
                k=min(most, self.size),
                show_progress=False,
                backend_selection="numpy",  # others break ties in other ways
            )
            for row, place, score in zip(rows, places, scores, strict=True):
                found[row] = place[score > 0].tolist()
        return found


@lru_cache(maxsize=8)
def index_of(texts: tuple[str, ...]) -> Index:
    """Return the index of some texts, which all environments share."""
    return Index(texts)


# --- the task ------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """Where an episode stands: the question that is open, and the searches it has seen."""

    question: int = 0
    searches: int = 0


class CustomerService(WritingTask[Customer]):
    """Answer a customer's questions, from an FAQ that can be searched.

    ## Description
    A customer has up to three questions on a topic, one after the other. The policy answers, or
    first writes ``search: …`` and is shown the passages that BM25 ranks best: the first 30 words of
    each answer, without the question that it belongs to. Questions are those of real FAQs, worded
    as there. The search of a split finds the answers of the training split and its own, so no
    training observation shows a test answer, and questions of validation and test cannot be
    answered from memory. It finds the answer of a question, searched for as it is worded, among
    the first three passages in about two cases of three, and as the first one in half of them
    (``tests/tasks/test_customer_service.py`` measures it).

    ## Action Space
    ``Text``: an answer, or ``search:`` (in any case) and what to look for; of at most 2**20
    characters.

    ## Observation Space
    ``Text``: the conversation so far. It ends in ``Assistant:`` while an answer is due and is
    append-only: ``obs[t+1].startswith(obs[t] + action)``. Passages are a message of the user.

    ## Starting State
    A customer drawn uniformly from the split (``options={"example": id or index}`` chooses one):
    the topic, how to search, and the first question.

    ## Rewards
    An answer is scored at once: the mean of ROUGE-1, ROUGE-2 and ROUGE-L (F-measure) with the
    first sentences of the FAQ's answer (8 to 24 words). Answers are whole sentences, of which
    ROUGE, unlike the F1 of a bag of tokens, rewards the order of words too. The score is mapped
    linearly from [0, 1] to ``reward_range``. A search is not scored; its reward is
    ``-search_cost``, in units of the reward. What it is good for is earned by the answer after it:
    agents that credit a step with its own reward only (``gamma`` 0) weigh the cost against what an
    answer without it earns, by default against a score of 0.475.

    ## Episode End
    Terminates after the answer to the customer's last question or to the ``max_turns``-th. Never
    truncates. After ``max_searches`` searches on a question a further one is scored as an answer,
    so an episode has at most (1 + ``max_searches``) steps a question.

    ## Information
    ``example_id``, ``turn`` (steps so far, searches included), ``messages``; after a step
    ``feedback`` (the passages, or whether the answer helped) and, unless it was a search,
    ``score``, ``score/rouge_1``, ``score/rouge_2`` and ``score/rouge_l`` too.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all".
    - ``dataset``: "faqs" (embedded), the path of a JSONL file, or "hf:<repo id>".
    - ``dataset_format``: "jsonl" where recognition by content must be overruled.
    - ``skip_bad_records``: skip malformed records with a warning that counts them;
      ``env.unwrapped.task.skipped`` is how many.
    - ``search_cost``: what a search costs, in units of the reward (0.05).
    - ``max_searches``: searches a question (1); with 0 there is no search.
    - ``passages``: how many passages a search shows at most (3).
    - ``max_turns``: ask at most this many questions; searches do not count.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Robertson and Zaragoza (2009), The Probabilistic Relevance Framework: BM25 and Beyond; Lin
    (2004), ROUGE: A Package for Automatic Evaluation of Summaries; Nakano et al. (2021), WebGPT,
    for answers after searches that the policy writes.

    ## Version History
    * v0: initial version.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str | Path = "faqs",
        dataset_format: str | None = None,
        skip_bad_records: bool = False,
        search_cost: float = 0.05,
        max_searches: int = 1,
        passages: int = 3,
        max_turns: int | None = None,
    ) -> None:
        super().__init__(max_turns)
        self.search_cost = check_cost(search_cost)
        self.max_searches = whole_number("max_searches", max_searches, 0)
        self.most_passages = whole_number("passages", passages)
        loaded = load_faqs(
            dataset,
            split=split,
            dataset_format=dataset_format,
            skip_bad_records=skip_bad_records,
        )
        self.examples, self.skipped = customers(loaded.records, split), loaded.skipped
        known = {faq.id: faq for faq in (*loaded.training, *loaded.records)}
        self.index = index_of(tuple(faq.answer for faq in known.values()))
        self.passages = [beginning(faq.answer, PASSAGE_WORDS) for faq in known.values()]

    def turns(self, example: Customer) -> int:
        """Return the number of questions."""
        return len(example.questions)

    def ask(self, example: Customer, turn: int) -> str:
        """Return the question, the first one with how to go about it before it."""
        faq = example.questions[turn]
        if turn:
            return faq.question
        topic = f" on {faq.topic}" if faq.topic else ""
        opening = f"I have questions{topic}. Answer each in a sentence."
        if self.max_searches:
            opening += ' To look something up first, write "search:" and what to look for.'
        return f"{opening}\n{faq.question}"

    def answers(self, example: Customer, turn: int) -> tuple[str, ...]:
        """Return the first sentences of the FAQ's answer."""
        return (reference(example.questions[turn].answer),)

    def begin(self, example: Customer, rng: np.random.Generator) -> Episode[Customer]:
        """Open the conversation with the first question."""
        episode = super().begin(example, rng)
        episode.state = Progress()
        return episode

    def score(self, episodes: Sequence[Episode[Customer]], actions: Sequence[str]) -> list[Outcome]:
        """Score the answers of the batch, and search for its queries."""
        queries = {
            i: query
            for i, (episode, action) in enumerate(zip(episodes, actions, strict=True))
            if episode.state.searches < self.max_searches
            and (query := query_of(action)) is not None
        }
        answered = [i for i in range(len(actions)) if i not in queries]
        outcomes = dict(zip(queries, self.look_up(list(queries.values())), strict=True))
        scored = self.score_answers(
            [actions[i] for i in answered], [self.references(episodes[i]) for i in answered]
        )
        outcomes |= zip(answered, scored, strict=True)
        return [outcomes[i] for i in range(len(actions))]

    def look_up(self, queries: Sequence[str]) -> list[Outcome]:
        """Return the unscored outcome of each search: what was found."""
        if not queries:
            return []
        outcomes = []
        for places in self.index.search(queries, self.most_passages):
            lines = [f"{n}. {self.passages[place]}" for n, place in enumerate(places, start=1)]
            found = "\n".join(lines) or NOTHING_FOUND
            outcomes.append(Outcome(None, feedback=found, reward=-self.search_cost))
        return outcomes

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        """Score by the mean of ROUGE-1, ROUGE-2 and ROUGE-L; the feedback says if it helped."""
        return [
            Outcome(
                score=s.mean,
                parts={"rouge_1": s.rouge_1, "rouge_2": s.rouge_2, "rouge_l": s.rouge_l},
                feedback=THANKS if s.mean >= HELPED else NO_HELP,
            )
            for s in rouge_batch(answers, references)
        ]

    def proceed(self, episode: Episode[Customer], action: str, outcome: Outcome) -> None:
        """Append the passages of a search, or whether the answer helped and the next question."""
        done, searches = episode.state
        if outcome.score is None:
            episode.state = Progress(done, searches + 1)
            self.append(episode, action, outcome.feedback)
            return
        done += 1
        episode.state = Progress(done)
        episode.finished = done >= self.planned_turns(episode.example)
        said = outcome.feedback
        if not episode.finished:
            said = f"{said} {self.ask(episode.example, done)}"
        self.append(episode, action, said)

    def references(self, episode: Episode[Customer]) -> tuple[str, ...]:
        """Return the accepted answers of the open question (none when the episode is over)."""
        return () if episode.finished else self.answers(episode.example, episode.state.question)

    def demonstration(self, episode: Episode[Customer]) -> str | None:
        """Search for the question as it is worded, then give the accepted answer."""
        if episode.finished or episode.state.searches or not self.max_searches:
            return super().demonstration(episode)
        return f"search: {episode.example.questions[episode.state.question].question}"


def search_then_lead(observation: str) -> str:
    """Search for the question, then answer with the first sentences of the first passage."""
    said = re.split(r"\nAssistant:.*?\nUser: ", observation, flags=re.DOTALL)[-1]
    said = said.removesuffix("\nAssistant:")
    if said == NOTHING_FOUND or re.match(r"1\. ", said):
        return reference(said.split("\n")[0].removeprefix("1. "))
    question = said.rpartition("\n")[2].removeprefix(THANKS).removeprefix(NO_HELP)
    return f"search: {question.strip()}"


def check_cost(cost: float) -> float:
    """Return the cost of a search as a float.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.
    """
    if isinstance(cost, bool) or not isinstance(cost, numbers.Real):
        raise TypeError(f"search_cost is {cost!r}. Give a number from 0.")
    if not 0 <= float(cost) < math.inf:
        raise ValueError(f"search_cost is {cost}. Give a finite number from 0; it is taken off.")
    return float(cost)
