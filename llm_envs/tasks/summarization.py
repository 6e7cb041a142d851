"""Summarization: one text, one summary, scored by ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm_envs.core.task import Outcome, WritingTask, whole_number
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.records import Document
from llm_envs.datasets.splits import Split, check_flag
from llm_envs.scoring.rouge import rouge_batch
from llm_envs.scoring.text import split_cjk

INSTRUCTION = "Summarize this in one line."


def request(text: str) -> str:
    """Return the user's message: the text, then the instruction."""
    return f"{text}\n{INSTRUCTION}"


class Summarization(WritingTask[Document]):
    """Summarize a text in one line.

    ## Description
    The user shows a text and asks for a summary in one line. The embedded texts are descriptions
    of Debian packages; the reference is the synopsis that the package's maintainer wrote.

    ## Action Space
    ``Text``: the summary, of at most 2**20 characters.

    ## Observation Space
    ``Text``: the request, ending in ``Assistant:``; after the step, the summary appended to it.

    ## Starting State
    A document drawn uniformly from the split (``options={"example": id or index}`` chooses one).

    ## Rewards
    The score is the mean of ROUGE-1, ROUGE-2 and ROUGE-L (F-measure). Of a summary longer than
    ``max_words`` only the first ``max_words`` words are scored. It is mapped linearly from [0, 1]
    to ``reward_range``.

    ## Episode End
    Terminates after the first step. Never truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after the step ``score``, ``score/rouge_1``,
    ``score/rouge_2``, ``score/rouge_l`` and ``feedback`` too.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all".
    - ``dataset``: "debian_packages" (embedded), the path of a JSONL file, or "hf:<repo id>".
    - ``dataset_format``: "jsonl" where recognition by content must be overruled.
    - ``skip_bad_records``: skip malformed records with a warning that counts them;
      ``env.unwrapped.task.skipped`` is how many.
    - ``max_words``: the length limit, in words (64); a CJK character is a word.
    - ``use_stemmer``: compare Porter stems (extra ``stemming``).
    - ``max_turns``: 1 or more, or None; there is one turn whatever it is.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries.

    ## Version History
    * v0: initial version.
    """

    def __init__(
        self,
        *,
        split: Split = "train",
        dataset: str | Path = "debian_packages",
        dataset_format: str | None = None,
        skip_bad_records: bool = False,
        max_words: int = 64,
        use_stemmer: bool = False,
        max_turns: int | None = None,
    ) -> None:
        super().__init__(max_turns)
        self.max_words = whole_number("max_words", max_words)
        self.use_stemmer = check_flag("use_stemmer", use_stemmer)
        loaded = load_documents(
            dataset,
            split=split,
            dataset_format=dataset_format,
            skip_bad_records=skip_bad_records,
        )
        self.examples, self.skipped = loaded.records, loaded.skipped

    def turns(self, example: Document) -> int:
        """Return 1."""
        return 1

    def ask(self, example: Document, turn: int) -> str:
        """Return the text and the instruction."""
        return request(example.text)

    def answers(self, example: Document, turn: int) -> tuple[str, ...]:
        """Return the reference summaries."""
        return example.summaries

    def score_answers(
        self, answers: Sequence[str], references: Sequence[tuple[str, ...]]
    ) -> list[Outcome]:
        """Score by the mean of ROUGE-1, ROUGE-2 and ROUGE-L."""
        most = self.max_words
        limited = [" ".join(split_cjk(a).split(maxsplit=most)[:most]) for a in answers]
        return [
            Outcome(
                score=s.mean,
                parts={"rouge_1": s.rouge_1, "rouge_2": s.rouge_2, "rouge_l": s.rouge_l},
            )
            for s in rouge_batch(limited, references, use_stemmer=self.use_stemmer)
        ]
