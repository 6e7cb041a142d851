"""DialogueQA: several questions about one passage, each answer scored at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_envs.core.task import Outcome, WritingTask
from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.records import Dialogue
from llm_envs.datasets.splits import Split
from llm_envs.scoring.qa import score_answers


def reply(correct: bool, answer: str) -> str:
    """Return what the user says to an answer: thanks, or the right one."""
    return "That's right, thank you." if correct else f"The answer is {answer}."


class DialogueQA(WritingTask[Dialogue]):
    """Answer the questions that a user asks about a passage.

    ## Description
    The user shows a passage of facts and asks about it, turn by turn. Later questions lean on
    earlier ones ("And its currency?"), and some ask for what the passage does not say; then the
    only right answer is "unknown". In the embedded set, validation and test dialogues are about
    things of other names than those of training dialogues, and their questions are worded in
    other ways.

    ## Action Space
    ``Text``: the answer, of at most 2**20 characters.

    ## Observation Space
    ``Text``: the conversation so far. It ends in ``Assistant:`` while an answer is due and is
    append-only: ``obs[t+1].startswith(obs[t] + action)``.

    ## Starting State
    A dialogue drawn uniformly from the split (``options={"example": id or index}`` chooses one):
    the passage and the first question.

    ## Rewards
    The score is the SQuAD token F1 of the answer with the best accepted answer, strict: words too
    many cost. It is mapped linearly from [0, 1] to ``reward_range``.

    ## Episode End
    Terminates after the dialogue's last turn or ``max_turns``. Never truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after a step ``score``, ``score/f1``,
    ``score/exact_match`` and ``feedback`` too.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all".
    - ``dataset``: "countries_wordnet" (embedded), the path of a JSONL, SQuAD or CoQA file, or
      "hf:<repo id>".
    - ``dataset_format``: "jsonl", "squad" or "coqa" where recognition by content must be overruled.
    - ``skip_bad_records``: skip malformed records with a warning that counts them;
      ``env.unwrapped.task.skipped`` is how many.
    - ``max_turns``: ask at most this many questions of a dialogue.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Rajpurkar et al. (2016), SQuAD, for the score; Reddy et al. (2019), CoQA, for the form.

    ## Version History
    * v0: initial version.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str | Path = "countries_wordnet",
        dataset_format: str | None = None,
        skip_bad_records: bool = False,
        max_turns: int | None = None,
    ) -> None:
        super().__init__(max_turns)
        loaded = load_dialogues(
            dataset,
            split=split,
            dataset_format=dataset_format,
            skip_bad_records=skip_bad_records,
        )
        self.examples, self.skipped = loaded.records, loaded.skipped

    def turns(self, example: Dialogue) -> int:
        """Return the number of questions of the dialogue."""
        return len(example.turns)

    def ask(self, example: Dialogue, turn: int) -> str:
        """Return the question, the first one with the passage before it."""
        question = example.turns[turn].question
        return f"{example.passage}\n{question}" if turn == 0 else question

    def answers(self, example: Dialogue, turn: int) -> tuple[str, ...]:
        """Return the accepted answers of the turn."""
        return example.turns[turn].answers

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        """Score by token F1; the feedback thanks for an exact match and else tells the answer."""
        return [
            Outcome(
                score=s.f1,
                parts={"f1": s.f1, "exact_match": s.exact_match},
                feedback=reply(s.exact_match == 1.0, accepted[0]),
            )
            for s, accepted in zip(score_answers(answers, references), references, strict=True)
        ]
