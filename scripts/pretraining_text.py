"""The text that the embedded model is pretrained on: training splits only, in the suite's layout.

Each sample is a conversation in segments, exactly as environments and policies write it: what the
environment says, then the assistant's words and the end-of-sequence token, and so on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dialogue_templates import RELATIONS, Entity, render

from llm_envs.core.task import say
from llm_envs.datasets.records import Dialogue, Document, Turn
from llm_envs.tasks.dialogue_qa import reply
from llm_envs.tasks.recommendation_clicks import next_prompt, opening
from llm_envs.tasks.summarization import request


@dataclass(frozen=True, slots=True)
class Segment:
    """Some text, and what it is.

    Attributes:
        text: It is tokenised by itself.
        kind: ``"environment"``; or, of the assistant's words, ``"manner"`` (how it is said),
            ``"value"`` (what was asked) or ``"slip"`` (a wrong answer, not to be learned).
        ends: Whether the end-of-sequence token follows.
    """

    text: str
    kind: Literal["environment", "manner", "value", "slip"] = "environment"
    ends: bool = False


# How people answer questions: mostly in sentences. The reward will want the bare answer, and
# nothing here says so; the bare form is a rare habit among others.
ANSWER_STYLES: tuple[tuple[float, str], ...] = (
    (0.04, " {a}"),
    (0.30, " It is {a}."),
    (0.18, " I think it is {a}."),
    (0.18, " The answer is {a}."),
    (0.16, " That would be {a}, I think."),
    (0.09, " Let me see, it is {a}."),
    (0.05, " I am not sure about that."),
)
SLIPS = 0.15  # share of the answers that are wrong: conversations go on after them too
SUMMARY_STYLES: tuple[tuple[float, str], ...] = (
    (0.10, " {a}"),
    (0.48, " It is about this: {a}."),
    (0.34, " In short, this text describes {a}, I think."),
    (0.08, " I am not sure about that."),
)
LEADS = 0.25  # share of the summaries that are the text's first sentence


# People ask in more ways than a list of wordings holds.
OPENERS = (
    "Tell me: ",
    "One question: ",
    "So, ",
    "Well, ",
    "Please: ",
    "I wonder: ",
    "Hm, ",
    "Next: ",
)
CLOSERS = (" Thanks.", " Please.", " If you know.", " Any idea?")
DROPPED = frozenset(
    "a about and does is it its me of say tell the there they to what which".split()
)


def reword(question: str, rng: random.Random) -> str:
    """Return the question, half of the time with words around it or without its small words."""
    if rng.random() < 0.5:
        return question
    if rng.random() < 0.5:
        words = question.split()
        kept = [w for w in words if w.lower() not in DROPPED or rng.random() < 0.5]
        question = " ".join(kept or words)
    opener = rng.choice(OPENERS) if rng.random() < 0.5 else ""
    closer = rng.choice(CLOSERS) if rng.random() < 0.3 else ""
    return opener + question + closer


def style(styles: Sequence[tuple[float, str]], rng: random.Random) -> str:
    """Draw one of the weighted styles."""
    return rng.choices([s for _, s in styles], [w for w, _ in styles])[0]


def spoken(words: str, value: str) -> list[Segment]:
    """Return the segments of an answer in that style."""
    before, answered, after = words.partition(" {a}")
    parts = [Segment(before, "manner")]
    if answered:
        parts += [Segment(f" {value}", "value"), Segment(after, "manner")]
    parts = [part for part in parts if part.text]
    return [*parts[:-1], replace(parts[-1], ends=True)]


class NameMaker:
    """Makes up names that sound like the ones it has read: a Markov chain on three letters."""

    def __init__(self, words: Sequence[str]) -> None:
        self.next: dict[str, list[str]] = {}
        for word in words:
            padded = "^^" + word + "$"
            for i in range(len(padded) - 2):
                self.next.setdefault(padded[i : i + 2], []).append(padded[i + 2])

    def __call__(self, rng: random.Random) -> str:
        """Return one name of 3 to 12 letters."""
        while True:
            state, name = "^^", ""
            while (letter := rng.choice(self.next[state])) != "$" and len(name) < 13:
                name += letter
                state = state[1] + letter
            if 3 <= len(name) <= 12:
                return name


class Talk:
    """Conversations about passages: real ones of the training split, and made-up ones.

    Facts that are drawn anew each time cannot be memorised: they can only be read.
    """

    def __init__(self, dialogues: Sequence[Dialogue]) -> None:
        self.dialogues = dialogues
        values: dict[str, dict[str, None]] = {"country": {}, "noun": {}}
        for dialogue in dialogues:
            domain = dialogue.id.split("/")[0]
            for turn in dialogue.turns:
                if turn.answers != ("unknown",):
                    values[domain].update(dict.fromkeys(a for a in turn.answers if ", " not in a))
        self.values = {
            domain: [v for v in known if not re.search(r"\d|^\.| and ", v)]
            for domain, known in values.items()
        }
        words = {w for v in self.values.values() for a in v for w in a.split()}
        self.capitalised = NameMaker(sorted(w for w in words if w[0].isupper()))
        self.lowercase = NameMaker(sorted(w for w in words if w[0].islower()))

    def _name(self, domain: str, rng: random.Random) -> str:
        if rng.random() < 0.4:
            return rng.choice(self.values[domain])
        make = self.capitalised if domain == "country" or rng.random() < 0.3 else self.lowercase
        return " ".join(make(rng) for _ in range(rng.choices((1, 2), (3, 1))[0]))

    def _value(self, domain: str, relation: str, rng: random.Random) -> tuple[str, ...]:
        if relation == "population":
            return (f"{int(10 ** rng.uniform(2, 9)):,}",)
        if relation == "calling code":
            return (str(rng.randint(1, 10 ** rng.randint(1, 4))),)
        if relation == "domain":
            return ("." + "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=2)),)
        if relation == "meaning" and rng.random() < 0.5:
            return (" ".join(self._name(domain, rng) for _ in range(rng.randint(2, 4))),)
        count = 1
        if relation in ("language", "neighbour", "synonym", "part", "example"):
            count = rng.choice((1, 1, 2, 3))
        return tuple(dict.fromkeys(self._name(domain, rng) for _ in range(count)))

    def made_up(self, rng: random.Random) -> Dialogue:
        """Return a dialogue about one or two things that do not exist."""
        domain = rng.choice(("country", "noun"))
        relations = list(RELATIONS[domain])
        count = rng.choice((1, 2))
        names: dict[str, None] = {}
        while len(names) < count:
            names[self._name(domain, rng)] = None
        entities = [
            Entity(
                name,
                domain,
                {r: self._value(domain, r, rng) for r in rng.sample(relations, rng.randint(4, 8))},
            )
            for name in names
        ]
        facts = (4, 6) if count == 1 else (3, 4)
        talk = render(entities, "train", rng, turns=rng.randint(4, 12), facts=facts)
        turns = tuple(Turn(t.question, t.answers) for t in talk.turns)
        return Dialogue("made up", talk.passage, turns, "made up")

    def __call__(self, rng: random.Random) -> list[Segment]:
        """Return one conversation."""
        made_up = rng.random() < 0.7
        return self.retell(self.made_up(rng) if made_up else rng.choice(self.dialogues), rng)

    def retell(self, dialogue: Dialogue, rng: random.Random) -> list[Segment]:
        """Have the dialogue's questions answered in several manners."""
        segments: list[Segment] = []
        said = f"{dialogue.passage}\n"
        for i, turn in enumerate(dialogue.turns):
            question = say(said + reword(turn.question, rng))
            segments.append(Segment("\n" + question if i else question))
            if rng.random() < SLIPS:
                wrong = rng.choice([a for t in dialogue.turns for a in t.answers])
                segments.append(Segment(f" {wrong}", "slip", ends=True))
                said = reply(wrong in turn.answers, turn.answers[0]) + " "
                continue
            words = style(ANSWER_STYLES, rng)
            segments += spoken(words, rng.choice(turn.answers))
            said = reply(words == " {a}", turn.answers[0]) + " "
        return segments


class Summaries:
    """Descriptions of software and what people say they are, in several manners."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self.documents = documents

    def __call__(self, rng: random.Random) -> list[Segment]:
        """Return one document with one summary."""
        document = rng.choice(self.documents)
        lead = re.split(r"(?<=[.!?])\s", document.text, maxsplit=1)[0].rstrip(".")
        value = lead if rng.random() < LEADS else rng.choice(document.summaries)
        words = style(SUMMARY_STYLES, rng)
        return [Segment(say(request(document.text))), *spoken(words, value)]


class Sessions:
    """Film recommendations with replies by the toss of a coin: the form, and no taste at all."""

    def __init__(self, films: Sequence[str]) -> None:
        self.films = films

    def __call__(self, rng: random.Random) -> list[Segment]:
        """Return one session; films and replies have nothing to do with each other."""
        segments = [Segment(opening())]
        for film in rng.sample(self.films, rng.randint(2, 8)):
            segments += [Segment(film), Segment(next_prompt(rng.random() < 0.5))]
        return segments
