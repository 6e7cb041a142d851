"""Summarization: one text, one summary, scored by ROUGE."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from llm_envs.core.task import Outcome, WritingTask, say, whole_number
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.records import Document
from llm_envs.datasets.splits import Split, check_flag, did_you_mean
from llm_envs.scoring import learned
from llm_envs.scoring.rouge import first_words, rouge_batch

INSTRUCTION = "Summarize this in one line."

PARTS: Final = ("rouge", "similarity", "naturalness")
"""What a score can be mixed from."""

MODELS: Final = {"similarity": "models/all-MiniLM-L6-v2", "naturalness": "tiny"}
"""The models that the learned parts use if none is named."""


def request(text: str) -> str:
    """Return the user's message: the text, then the instruction."""
    return f"{text}\n{INSTRUCTION}"


def check_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return the weights of the parts of a score, of sum 1; those of ROUGE alone if there are none.

    Raises:
        TypeError: They are no mapping from names to numbers.
        ValueError: A part does not exist, a weight is negative or not finite, or all are 0.
    """
    if weights is None:
        return {"rouge": 1.0}
    like = 'such as {"rouge": 0.9, "similarity": 0.1}'
    if not isinstance(weights, Mapping):
        raise TypeError(f"score_weights is {weights!r}. Give a dict {like}.")
    for name, weight in weights.items():
        if name not in PARTS:
            raise ValueError(
                f"score_weights has the part {name!r}, which does not exist."
                f"{did_you_mean(name, PARTS)} Use {', '.join(PARTS)}."
            )
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"The weight of {name!r} is {weight!r}. Give a number from 0.")
        if not 0 <= float(weight) < math.inf:
            raise ValueError(f"The weight of {name!r} is {weight}. Give a finite number from 0.")
    total = sum(map(float, weights.values()))
    if not 0 < total < math.inf:
        raise ValueError(f"score_weights is {dict(weights)}: nothing is scored. Give one {like}.")
    return {name: float(weight) / total for name, weight in weights.items()}


class Summarization(WritingTask[Document]):
    """Summarize a text in one line.

    ## Description
    The user shows a text and asks for a summary in one line. The embedded texts are descriptions
    of Debian packages; the reference is the synopsis that the package's maintainer wrote. Others
    are docstrings of Python's standard library, the reference being their first line.

    ## Action Space
    ``Text``: the summary, of at most 2**20 characters.

    ## Observation Space
    ``Text``: the request, ending in ``Assistant:``; after the step, the summary appended to it.

    ## Starting State
    A document drawn uniformly from the split (``options={"example": id or index}`` chooses one).

    ## Rewards
    The score is the mean of ROUGE-1, ROUGE-2 and ROUGE-L (F-measure). Of a summary longer than
    ``max_words`` only the first ``max_words`` words are scored. With ``score_weights`` it is the
    weighted mean of that and of parts that models give: ``similarity``, the cosine of the
    embeddings of summary and reference, and ``naturalness``, whether the summary is as surprising
    as the reference to a language model that sees the instruction without the text
    (``llm_envs.scoring.learned`` has the formulas, and what can be had without a summary). It is
    mapped linearly from [0, 1] to ``reward_range``.

    ## Episode End
    Terminates after the first step. Never truncates.

    ## Information
    ``example_id``, ``turn``, ``messages``; after the step ``score``, ``score/rouge_1``,
    ``score/rouge_2``, ``score/rouge_l``, the parts that ``score_weights`` names, and ``feedback``
    too.

    ## Arguments
    - ``split``: "train" (default), "validation", "test" or "all".
    - ``dataset``: "debian_packages" or "python_docstrings" (embedded), the path of a JSONL file or
      of the official files of CNN/DailyMail or XSum, or "hf:<repo id>". Highlights of
      CNN/DailyMail are several lines; ROUGE-L sees them as one.
    - ``dataset_format``: "jsonl", "cnn_dailymail" or "xsum" where recognition by content must be
      overruled.
    - ``skip_bad_records``: skip malformed records with a warning that counts them;
      ``env.unwrapped.task.skipped`` is how many.
    - ``max_words``: the length limit, in words as ROUGE counts them (64): a hyphen parts two, and
      a CJK character is one.
    - ``use_stemmer``: compare Porter stems (extra ``stemming``).
    - ``score_weights``: weights of the parts of the score, relative to one another, such as
      ``{"rouge": 0.8, "similarity": 0.1, "naturalness": 0.1}``; a part of weight 0 is told, and
      not rewarded. None scores by ROUGE alone.
    - ``similarity_model``: folder or hub id of a sentence encoder ("models/all-MiniLM-L6-v2",
      which ``scripts/fetch_minilm.py`` makes).
    - ``naturalness_model``: folder or hub id of a causal language model ("tiny", the embedded one
      that agents begin with).
    - ``max_turns``: 1 or more, or None; there is one turn whatever it is.
    - ``reward_range``, ``render_mode``: as in every environment of the suite.

    ## References
    Lin (2004), ROUGE: A Package for Automatic Evaluation of Summaries. See et al. (2017), for
    CNN/DailyMail; Narayan et al. (2018), for XSum. Reimers and Gurevych (2019), Sentence-BERT, for
    the similarity.

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
        score_weights: Mapping[str, float] | None = None,
        similarity_model: str | Path | None = None,
        naturalness_model: str | Path | None = None,
        max_turns: int | None = None,
    ) -> None:
        super().__init__(max_turns)
        self.max_words = whole_number("max_words", max_words)
        self.use_stemmer = check_flag("use_stemmer", use_stemmer)
        self.weights = check_weights(score_weights)
        self.models: dict[str, str] = {}
        named = {"similarity": similarity_model, "naturalness": naturalness_model}
        for part, name in named.items():
            if part in self.weights:
                model = MODELS[part] if name is None else name
                self.models[part] = learned.check_model(f"{part}_model", model)
            elif name is not None:
                raise ValueError(
                    f"{part}_model is {str(name)!r}, but score_weights names no {part!r}. Give it "
                    f'a weight, such as score_weights={{"rouge": 0.9, "{part}": 0.1}}.'
                )
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
        """Score by the mean of ROUGE-1, ROUGE-2 and ROUGE-L, and by what the weights name."""
        most = self.max_words  # also of words between spaces, for scripts that ROUGE does not see
        limited = [first_words(" ".join(a.split(maxsplit=most)[:most]), most) for a in answers]
        rouges = rouge_batch(limited, references, use_stemmer=self.use_stemmer)
        values = {"rouge": [s.mean for s in rouges]}
        if "similarity" in self.models:
            values["similarity"] = learned.similarity(
                limited, references, self.models["similarity"]
            )
        if "naturalness" in self.models:
            values["naturalness"] = learned.naturalness(
                limited, references, self.models["naturalness"], say(INSTRUCTION)
            )
        return [
            Outcome(
                score=min(  # rounded, the weights may add up to a little more than 1
                    1.0, sum(weight * values[part][i] for part, weight in self.weights.items())
                ),
                parts={"rouge_1": s.rouge_1, "rouge_2": s.rouge_2, "rouge_l": s.rouge_l}
                | {part: values[part][i] for part in self.models},
            )
            for i, s in enumerate(rouges)
        ]
