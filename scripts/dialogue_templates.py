"""How facts become passages, and passages become dialogues with follow-up questions.

The builder of ``countries_wordnet`` renders real facts with it; pretraining renders made-up ones.
Every question has its own wordings for each split: a test question is worded as no training
question is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

UNKNOWN = ("unknown",)


@dataclass(frozen=True, slots=True)
class Wordings:
    """Ways to ask one thing: ``full`` names the entity, ``follow_up`` leans on the history."""

    full: tuple[str, ...]
    follow_up: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact: how a passage states it ({e} entity, {v} value), how each split asks it."""

    statements: tuple[str, ...]
    questions: Mapping[str, Wordings]


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing with its facts: relation name -> values, each of them a right answer."""

    name: str
    domain: str
    facts: Mapping[str, tuple[str, ...]]


def _relation(
    statements: tuple[str, ...],
    train: tuple[tuple[str, ...], tuple[str, ...]],
    validation: tuple[tuple[str, ...], tuple[str, ...]],
    test: tuple[tuple[str, ...], tuple[str, ...]],
) -> Relation:
    return Relation(
        statements,
        {
            "train": Wordings(*train),
            "validation": Wordings(*validation),
            "test": Wordings(*test),
        },
    )


RELATIONS: dict[str, dict[str, Relation]] = {
    "country": {
        "capital": _relation(
            (
                "The capital of {e} is {v}.",
                "{v} is the capital of {e}.",
                "{e} has its capital at {v}.",
            ),
            (
                (
                    "What is the capital of {e}?",
                    "Which city is the capital of {e}?",
                    "What is {e}'s capital?",
                    "Please name the capital of {e}.",
                ),
                ("And its capital?", "What is its capital?", "Which city is its capital?"),
            ),
            (
                ("Do you know the capital of {e}?", "The capital of {e} is which city?"),
                ("What about its capital?", "Do you know its capital?"),
            ),
            (
                ("Can you tell me {e}'s capital city?", "What is the name of the capital of {e}?"),
                ("And what is the capital there?", "What is the name of its capital?"),
            ),
        ),
        "currency": _relation(
            (
                "The currency of {e} is the {v}.",
                "{e} uses the {v} as its currency.",
                "In {e} the currency is the {v}.",
            ),
            (
                (
                    "What is the currency of {e}?",
                    "Which currency does {e} use?",
                    "What is {e}'s currency?",
                    "Please name the currency of {e}.",
                ),
                ("And its currency?", "What is its currency?", "Which currency does it use?"),
            ),
            (
                ("Do you know the currency of {e}?", "What currency is used in {e}?"),
                ("What about its currency?", "What currency is used there?"),
            ),
            (
                ("Can you tell me {e}'s currency?", "With which currency do people in {e} pay?"),
                ("And what is the currency there?", "With which currency do people pay there?"),
            ),
        ),
        "language": _relation(
            (
                "The languages of {e} include {v}.",
                "In {e} people speak {v}.",
                "People in {e} speak {v}.",
            ),
            (
                (
                    "Which language is spoken in {e}?",
                    "What is the language of {e}?",
                    "Which language do people speak in {e}?",
                    "Please name a language of {e}.",
                ),
                ("And its language?", "Which language is spoken there?", "What is its language?"),
            ),
            (
                ("Do you know a language of {e}?", "What language is used in {e}?"),
                ("What about its language?", "What language do people use there?"),
            ),
            (
                (
                    "Can you tell me which language {e} speaks?",
                    "A language spoken in {e} is called what?",
                ),
                ("And what is the language there?", "What language would one speak there?"),
            ),
        ),
        "neighbour": _relation(
            (
                "{e} borders {v}.",
                "{e} shares a border with {v}.",
                "The neighbours of {e} include {v}.",
            ),
            (
                (
                    "Which country borders {e}?",
                    "Name a neighbour of {e}.",
                    "What country shares a border with {e}?",
                    "Please name a country that borders {e}.",
                ),
                (
                    "And one of its neighbours?",
                    "Which country borders it?",
                    "Name a neighbour of it.",
                ),
            ),
            (
                ("Do you know a neighbour of {e}?", "What is a country that borders {e}?"),
                ("What about a neighbour of it?", "Do you know a country that borders it?"),
            ),
            (
                ("Can you tell me a neighbour of {e}?", "{e} shares a border with which country?"),
                ("And what is a neighbour of it?", "It shares a border with which country?"),
            ),
        ),
        "region": _relation(
            ("{e} lies in the region of {v}.", "{e} is in {v}.", "The region of {e} is {v}."),
            (
                (
                    "In which region is {e}?",
                    "What is the region of {e}?",
                    "Where is {e}?",
                    "Please name the region of {e}.",
                ),
                ("And its region?", "Where is it?", "In which region is it?"),
            ),
            (
                ("Do you know the region of {e}?", "In what region does {e} lie?"),
                ("What about its region?", "In what region does it lie?"),
            ),
            (
                ("Can you tell me the region of {e}?", "Which region is {e} part of?"),
                ("And what is the region?", "Which region is it in?"),
            ),
        ),
        "demonym": _relation(
            (
                "A person from {e} is called {v}.",
                "The people of {e} are called {v}.",
                "Somebody from {e} is called {v}.",
            ),
            (
                (
                    "What is a person from {e} called?",
                    "What are the people of {e} called?",
                    "What do you call somebody from {e}?",
                    "Please say what people from {e} are called.",
                ),
                (
                    "And its people, what are they called?",
                    "What are its people called?",
                    "What is a person from there called?",
                ),
            ),
            (
                (
                    "Do you know what a person from {e} is called?",
                    "People from {e} are called what?",
                ),
                (
                    "What about its people, what are they called?",
                    "People from there are called what?",
                ),
            ),
            (
                (
                    "Can you tell me what people from {e} are called?",
                    "How is a person from {e} called?",
                ),
                ("And what are people called there?", "How is a person from there called?"),
            ),
        ),
        "population": _relation(
            (
                "{e} has a population of {v}.",
                "The population of {e} is {v}.",
                "{v} people live in {e}.",
            ),
            (
                (
                    "What is the population of {e}?",
                    "How many people live in {e}?",
                    "What is {e}'s population?",
                    "Please give the population of {e}.",
                ),
                ("And its population?", "How many people live there?", "What is its population?"),
            ),
            (
                ("Do you know the population of {e}?", "How large is the population of {e}?"),
                ("What about its population?", "How large is its population?"),
            ),
            (
                ("Can you tell me {e}'s population?", "How many people are there in {e}?"),
                ("And what is the population there?", "How many people are there in it?"),
            ),
        ),
        "calling code": _relation(
            (
                "The calling code of {e} is {v}.",
                "To call {e} one dials {v}.",
                "{e} has the calling code {v}.",
            ),
            (
                (
                    "What is the calling code of {e}?",
                    "Which calling code does {e} have?",
                    "What does one dial to call {e}?",
                    "Please give the calling code of {e}.",
                ),
                (
                    "And its calling code?",
                    "What is its calling code?",
                    "What does one dial to call it?",
                ),
            ),
            (
                ("Do you know the calling code of {e}?", "What calling code is used for {e}?"),
                ("What about its calling code?", "What calling code is used for it?"),
            ),
            (
                ("Can you tell me {e}'s calling code?", "To call {e}, what must one dial?"),
                ("And what is the calling code there?", "To call there, what must one dial?"),
            ),
        ),
        "domain": _relation(
            (
                "The internet domain of {e} is {v}.",
                "Web sites in {e} end in {v}.",
                "{e} has the internet domain {v}.",
            ),
            (
                (
                    "What is the internet domain of {e}?",
                    "Which internet domain does {e} have?",
                    "In what do web sites in {e} end?",
                    "Please give the internet domain of {e}.",
                ),
                (
                    "And its internet domain?",
                    "What is its internet domain?",
                    "In what do its web sites end?",
                ),
            ),
            (
                ("Do you know the internet domain of {e}?", "What internet domain is used in {e}?"),
                ("What about its internet domain?", "What internet domain is used there?"),
            ),
            (
                ("Can you tell me {e}'s internet domain?", "How do web sites in {e} end?"),
                ("And what is the internet domain there?", "How do web sites end there?"),
            ),
        ),
    },
    "noun": {
        "kind": _relation(
            ("{e} is a kind of {v}.", "{e} is a type of {v}.", "{e} belongs to the kind {v}."),
            (
                (
                    "What kind of thing is {e}?",
                    "{e} is a kind of what?",
                    "Of what is {e} a kind?",
                    "Please say what kind of thing {e} is.",
                ),
                (
                    "And what kind of thing is it?",
                    "What kind of thing is it?",
                    "Of what is it a kind?",
                ),
            ),
            (
                ("Do you know what kind of thing {e} is?", "What is {e} a type of?"),
                ("What about its kind?", "What is it a type of?"),
            ),
            (
                (
                    "Can you tell me what kind of thing {e} is?",
                    "As what kind of thing does {e} count?",
                ),
                ("And what is its kind?", "As what kind of thing does it count?"),
            ),
        ),
        "synonym": _relation(
            (
                "Other words for {e} include {v}.",
                "{e} is also called {v}.",
                "{e} also goes by {v}.",
            ),
            (
                (
                    "What is another word for {e}?",
                    "What is {e} also called?",
                    "Which other name does {e} have?",
                    "Please give another word for {e}.",
                ),
                (
                    "And another word for it?",
                    "What is it also called?",
                    "Which other name does it have?",
                ),
            ),
            (
                ("Do you know another word for {e}?", "What other word is there for {e}?"),
                ("What about another word for it?", "What other word is there for it?"),
            ),
            (
                ("Can you tell me another word for {e}?", "By what other name does {e} go?"),
                ("And what is another word?", "By what other name does it go?"),
            ),
        ),
        "part": _relation(
            ("The parts of {e} include {v}.", "{e} has {v} as a part.", "Parts of {e} are {v}."),
            (
                (
                    "What is a part of {e}?",
                    "Which part does {e} have?",
                    "Name a part of {e}.",
                    "Please name a part of {e}.",
                ),
                ("And a part of it?", "What is a part of it?", "Which part does it have?"),
            ),
            (
                ("Do you know a part of {e}?", "What does {e} have as a part?"),
                ("What about a part of it?", "What does it have as a part?"),
            ),
            (
                ("Can you tell me a part of {e}?", "Which thing is a part of {e}?"),
                ("And what is a part?", "Which thing is a part of it?"),
            ),
        ),
        "whole": _relation(
            ("{e} is part of {v}.", "{e} is found as part of {v}.", "{v} contains {e}."),
            (
                (
                    "What is {e} part of?",
                    "Of what is {e} a part?",
                    "What contains {e}?",
                    "Please say what {e} is part of.",
                ),
                ("And what is it part of?", "Of what is it a part?", "What contains it?"),
            ),
            (
                ("Do you know what {e} is part of?", "{e} is part of what?"),
                ("What about the thing it is part of?", "It is part of what?"),
            ),
            (
                ("Can you tell me what {e} is part of?", "To what does {e} belong as a part?"),
                ("And what contains it?", "To what does it belong as a part?"),
            ),
        ),
        "group": _relation(
            (
                "{e} is a member of {v}.",
                "{e} belongs to the group {v}.",
                "{e} is counted among {v}.",
            ),
            (
                (
                    "Of which group is {e} a member?",
                    "What is {e} a member of?",
                    "To which group does {e} belong?",
                    "Please name the group of {e}.",
                ),
                (
                    "And its group?",
                    "Of which group is it a member?",
                    "To which group does it belong?",
                ),
            ),
            (
                ("Do you know the group of {e}?", "Which group includes {e}?"),
                ("What about its group?", "Which group includes it?"),
            ),
            (
                ("Can you tell me the group of {e}?", "{e} is a member of which group?"),
                ("And what is the group?", "It is a member of which group?"),
            ),
        ),
        "example": _relation(
            (
                "Examples of {e} include {v}.",
                "{e} includes {v}.",
                "Among the examples of {e} one finds {v}.",
            ),
            (
                (
                    "What is an example of {e}?",
                    "Give an example of {e}.",
                    "Which example of {e} is there?",
                    "Please give an example of {e}.",
                ),
                ("And an example of it?", "What is an example of it?", "Give an example of it."),
            ),
            (
                ("Do you know an example of {e}?", "What would be an example of {e}?"),
                ("What about an example of it?", "What would be an example of it?"),
            ),
            (
                ("Can you tell me an example of {e}?", "Which thing is an example of {e}?"),
                ("And what is an example?", "Which thing is an example of it?"),
            ),
        ),
        "opposite": _relation(
            (
                "The opposite of {e} is {v}.",
                "{e} is the opposite of {v}.",
                "{e} has the opposite {v}.",
            ),
            (
                (
                    "What is the opposite of {e}?",
                    "Name the opposite of {e}.",
                    "Which word is the opposite of {e}?",
                    "Please give the opposite of {e}.",
                ),
                ("And its opposite?", "What is its opposite?", "Which word is its opposite?"),
            ),
            (
                ("Do you know the opposite of {e}?", "What would be the opposite of {e}?"),
                ("What about its opposite?", "What would be its opposite?"),
            ),
            (
                ("Can you tell me the opposite of {e}?", "{e} has what opposite?"),
                ("And what is the opposite?", "It has what opposite?"),
            ),
        ),
        "meaning": _relation(
            ("{e} means {v}.", "The meaning of {e} is {v}.", "{e} is defined as {v}."),
            (
                (
                    "What does {e} mean?",
                    "What is the meaning of {e}?",
                    "How is {e} defined?",
                    "Please give the meaning of {e}.",
                ),
                ("And its meaning?", "What does it mean?", "How is it defined?"),
            ),
            (
                ("Do you know the meaning of {e}?", "What meaning does {e} have?"),
                ("What about its meaning?", "What meaning does it have?"),
            ),
            (
                ("Can you tell me what {e} means?", "What would {e} mean?"),
                ("And what is the meaning?", "What would it mean?"),
            ),
        ),
    },
}

SWITCH: dict[str, tuple[str, ...]] = {
    "train": ("And {e}?", "And for {e}?", "What about {e}?"),
    "validation": ("How about {e}?", "The same for {e}?"),
    "test": ("Now the same for {e}?", "And in the case of {e}?"),
}


def enumerate_values(values: Sequence[str]) -> str:
    """Join values as prose does: "a", "a and b", "a, b and c"."""
    if len(values) == 1:
        return values[0]
    return ", ".join(values[:-1]) + " and " + values[-1]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn: what is asked, which answers are right, about which entity and relation."""

    question: str
    answers: tuple[str, ...]
    entity: str
    relation: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A passage and the turns asked about it."""

    passage: str
    turns: tuple[Asked, ...]


def render(
    entities: Sequence[Entity],
    split: str,
    rng: random.Random,
    *,
    turns: int,
    facts: tuple[int, int],
    unanswerable: float = 0.08,
) -> Conversation:
    """Write a passage about one or two entities of one domain, and ask ``turns`` questions.

    Args:
        entities: One or two things of the same domain.
        split: Whose wordings to ask with.
        rng: Source of every choice.
        turns: Number of questions.
        facts: Smallest and largest number of facts stated of each entity.
        unanswerable: Share of the questions about something that the passage does not say.

    Returns:
        The conversation. After the first question most of them lean on the history: they speak of
        the last entity as "it", or carry the last question over to the other entity.
    """
    relations = RELATIONS[entities[0].domain]
    told: dict[str, dict[str, tuple[str, ...]]] = {}
    blocks: list[list[str]] = []
    for entity in entities:
        known = list(entity.facts)
        chosen = rng.sample(known, min(rng.randint(*facts), len(known)))
        told[entity.name] = {r: entity.facts[r] for r in chosen}
        sentences = []
        for i, relation in enumerate(chosen):
            statement = rng.choice(relations[relation].statements)
            mention = (
                "it" if i and statement.startswith("{e}") and rng.random() < 0.3 else entity.name
            )
            value = enumerate_values(entity.facts[relation])
            sentences.append(_sentence(statement.format(e=mention, v=value)))
        blocks.append(sentences)
    passage = " ".join(sentence for block in blocks for sentence in block)

    asked: list[Asked] = []
    done: set[tuple[str, str]] = set()
    while len(asked) < turns:
        last = asked[-1] if asked else None
        style = rng.random() if last else 1.0
        if last and style < 0.35 and len(entities) > 1:  # carry the question over
            entity = next(e for e in entities if e.name != last.entity)
            relation = last.relation
            wordings = SWITCH[split]
        else:
            follow_up = last is not None and style < 0.8
            entity = (
                next(e for e in entities if e.name == last.entity)
                if follow_up and last
                else rng.choice(list(entities))
            )
            relation = rng.choice(list(told[entity.name]))
            if rng.random() < unanswerable:
                relation = rng.choice([r for r in relations if r not in told[entity.name]])
            questions = relations[relation].questions[split]
            wordings = questions.follow_up if follow_up else questions.full
        if (entity.name, relation) in done:
            # Facts can run out; then a repeated question is better than no end.
            if len(done) < sum(len(t) for t in told.values()):
                continue
            done.clear()
        done.add((entity.name, relation))
        values = told[entity.name].get(relation)
        answers = UNKNOWN if values is None else values
        if len(answers) > 1:
            answers = (*answers, enumerate_values(answers))
        question = _sentence(rng.choice(wordings).format(e=entity.name))
        asked.append(Asked(question, answers, entity.name, relation))
    return Conversation(passage, tuple(asked))
