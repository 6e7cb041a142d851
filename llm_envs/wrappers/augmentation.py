"""Questions as people ask them: misspelt, in other words, beside facts that are off the point.

What is perturbed is the text of the user's question, in the observation and in
``info["messages"]`` alike; where a task has no passage, all that the user says. What a right
answer is made of stays as it is: the passage (or the text to summarise), the user's reply to an
answer, the candidates of a choosing task, and all that the policy wrote. So do features, rewards,
scores and episodes. A perturbed question has the same right answers by construction: nothing here
looks at the accepted answers, so that nothing gives them away either, and each perturbation states
the rule that keeps its meaning. The rules are made for English.

:class:`AugmentedText` wraps one environment and :class:`AugmentedVectorText` many; both take the
fields of :class:`Augmentation` as arguments, and show equal texts for equal seeds.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode

from llm_envs.core.play import Info
from llm_envs.core.task import say, whole_number
from llm_envs.datasets.records import Dialogue
from llm_envs.datasets.splits import check_names
from llm_envs.wrappers.feedback import row_seeds
from llm_envs.wrappers.vector_spec import ArgumentVectorWrapper

_STREAM: Final = 0x7E87  # sets the chance of perturbations apart from all else that a seed seeds

# --- typos ---------------------------------------------------------------------------------------

WORDS: Final = tuple(
    """
    What Which Where When How Please Summarize
    again also another any because but called could does each every give given have here
    how its just know known like many more much only other please same say should some tell
    than that the their them then they this those until used very what when where which who whom
    whose why would you your
    """.split()
)
"""What is misspelt: these words and no others. None is a number, a name or a preposition, which
commands are worded with ("take hat from box")."""

_OTHER_WORDS: Final = frozenset(("dose", "juts"))  # English, and no misspellings

_ITEM_OR_WORD: Final = re.compile(
    r"^\d+\. .*$|(?<![\w'’.-])[A-Za-z]+(?![\w'’-]| [A-Z])", re.MULTILINE
)


def misspellings(word: str) -> tuple[str, ...]:
    """Return a word with each two neighbouring letters swapped, the first letter left alone.

    No word of `WORDS` has a misspelling that is another word or a misspelling of another one: who
    reads it knows which word was meant.

    Source: Belinkov and Bisk (2018), "Synthetic and Natural Noise Both Break Neural Machine
    Translation" ("swap"; there the last letter stays too, which would spare "the").
    """
    swapped = (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(1, len(word) - 1))
    return tuple(dict.fromkeys(s for s in swapped if s != word and s not in _OTHER_WORDS))


_MISSPELLINGS: Final = {word: misspellings(word) for word in WORDS}


def misspelt(text: str, rate: float, rng: np.random.Generator) -> str:
    """Misspell each word of a text that is one of `WORDS` with a probability.

    Lines of a list ("1. Heat") stay as they are, for they are choices, which an answer copies; and
    so does a word before a capital, for it may be part of a name ("Republic of the Congo").

    Args:
        text: Any text.
        rate: The probability. What is misspelt at one rate is misspelt alike at a higher one.
        rng: Chance.
    """

    def spelt(match: re.Match[str]) -> str:
        word = match.group()
        if word not in _MISSPELLINGS:
            return word
        chance, which = rng.random(2)
        return _pick(_MISSPELLINGS[word], which) if chance < rate else word

    return _ITEM_OR_WORD.sub(spelt, text)


# --- other words ---------------------------------------------------------------------------------

_ASKED: Final = r"(?:^|(?<=[.!?;] ))"  # where a sentence begins
_END: Final = r"(?=\n|$)"  # where the question ends; what can be answered may be listed below it

REWORDINGS: Final = tuple(
    (re.compile(pattern, re.MULTILINE), others)
    for pattern, others in (
        (r"^What is ", ("What's ",)),
        (r"^What's ", ("What is ",)),
        (r"^What kind of ", ("What sort of ",)),
        (r"^(Of|To) which group ", (r"\1 what group ",)),
        (r"^Of what is (.+) a kind\?" + _END, (r"What is \1 a kind of?",)),
        (
            r"^As what kind of thing does (.+) count\?" + _END,
            (r"What kind of thing does \1 count as?",),
        ),
        (
            r"^By what other name does (.+) go\?" + _END,
            (r"What other name does \1 go by?", r"By which other name does \1 go?"),
        ),
        (r"^To what does (.+) belong as a part\?" + _END, (r"What does \1 belong to as a part?",)),
        (r"^In what do (.+) end\?" + _END, (r"What do \1 end in?",)),
        (r"^It is a member of which group\?" + _END, ("It is a member of what group?",)),
        (r"^Now the same for ", ("And the same for ",)),
        (r"^With which currency ", ("With what currency ",)),
        (r"^To call (.+), what must one dial\?" + _END, (r"What must one dial to call \1?",)),
        (r"^How is it defined\?" + _END, ("What is its definition?",)),
        (r"^Give an example of ", ("Please give an example of ",)),
        (r"^How do I ", ("How can I ", "How would I ")),
        (r"^How can I ", ("How do I ", "How could I ")),
        (r"^Where can I ", ("Where could I ",)),
        (r"^Can I ", ("Could I ", "Is it possible for me to ")),
        (r"^Why (?!not\b)", ("For what reason ",)),
        (r"^Which (?!of\b)", ("What ",)),
        (r"^In which ", ("In what ",)),
        (r"^What about ", ("How about ",)),
        (r"^How about ", ("What about ",)),
        (r"^Can you ", ("Could you ", "Would you be able to ")),
        (r"^Do you know ", ("Do you happen to know ", "Would you know ")),
        (r"^And ", ("And, please, ",)),
        (r"^Please (?:name|say|give) ", ("Please tell me ",)),
        (r"^Name (?=(?:an?|one|the) )", ("Please name ",)),
        (
            r"^Summarize this in one line\." + _END,
            ("Sum this up in one line.", "Say this in one line."),
        ),
        (r"^Which film should I watch\?" + _END, ("Which film would you recommend to me?",)),
        (r"^What next\?" + _END, ("And what next?", "And after that?")),
        (_ASKED + r"What (?:do|will) you do\?" + _END, ("What are you going to do?",)),
        (
            _ASKED + r"(?:Your|What is your|Which) move\?" + _END,
            ("And your move?", "What move is it?"),
        ),
        (_ASKED + r"How do you go on\?" + _END, ("How will you go on?",)),
    )
)
"""Rules that put a question into other words: a pattern, and what can stand in its place."""

OPENINGS: Final = (
    "I have something to ask.",
    "Please help me with this.",
    "Here is what I would like from you.",
    "One thing, please.",
    "Let me ask for one thing.",
)
"""Sentences that go before a question, which asks the same after them."""


def paraphrases(question: str) -> tuple[str, ...]:
    """Return a question or an instruction in every other wording that the rules know.

    Each is the question as one of `REWORDINGS` puts it, by itself or after one of `OPENINGS`; a
    question that no rule knows stands as it was after an opening. A rule exchanges or moves the
    words of its pattern and no others.

    Source: Ribeiro, Singh and Guestrin (2018), "Semantically Equivalent Adversarial Rules for
    Debugging NLP Models" (rules of that kind, there found by machine and judged by people).
    """
    wordings = [
        pattern.sub(other, question, count=1)
        for pattern, others in REWORDINGS
        if pattern.search(question)
        for other in others
    ]
    opened = (f"{opening} {said}" for said in wordings or [question] for opening in OPENINGS)
    return tuple(dict.fromkeys((*wordings, *opened)))


# --- distractors ---------------------------------------------------------------------------------

_TRIES: Final = 64  # for each sentence; where passages are much alike fewer are found

_SENTENCE_END: Final = re.compile(  # no end: "St. Lucia", "A. Smith"
    r"(?<!\b[A-Z]\.)(?<!\b[A-Z][a-z]\.)(?<!\b[A-Z][a-z][a-z]\.)(?<=[.!?])\s+(?=[A-Z])"
)
_PRONOUNS: Final = frozenset(
    "he she it they him her them his hers its their theirs this that these those there here".split()
)
_FUNCTION_WORDS: Final = frozenset(
    "a an and are as at be by for from has have in is of on one or the to was were with".split()
)


def sentences(passage: str) -> tuple[str, ...]:
    """Return the sentences of a passage that can be understood without it: that hold no pronoun."""
    found = _SENTENCE_END.split(passage.strip())
    return tuple(s for s in found if not _PRONOUNS & set(re.findall(r"\w+", s.casefold())))


def topics(texts: Iterable[str]) -> frozenset[str]:
    """Return what texts are about: the first four letters of each word that is no function word.

    The first letters, so that "borders" and "border" are the same.
    """
    words = re.findall(r"\w+", " ".join(texts).casefold())
    return frozenset(word[:4] for word in words if word not in _FUNCTION_WORDS)


def draw_distractors(
    records: Sequence[Dialogue], record: Dialogue, count: int, rng: np.random.Generator
) -> tuple[str, ...]:
    """Draw sentences of other passages that have nothing to do with a dialogue.

    None of their words stands in the passage or in any question, function words aside: they tell
    of nothing that is asked about, and hold no answer that the passage gives.

    Args:
        records: What they are taken from.
        record: The dialogue.
        count: How many; fewer where so many do not turn up.
        rng: Chance.

    Source: Jia and Liang (2017), "Adversarial Examples for Evaluating Reading Comprehension
    Systems"; Shi et al. (2023), "Large Language Models Can Be Easily Distracted by Irrelevant
    Context".
    """
    known = topics((record.passage, *(turn.question for turn in record.turns)))
    found: list[str] = []
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        choices = sentences(records[int(rng.integers(len(records)))].passage)
        sentence = _pick(choices, rng.random()) if choices else ""
        if sentence and sentence not in found and not known & topics((sentence,)):
            found.append(sentence)
    return tuple(found)


# --- all of them ---------------------------------------------------------------------------------

Adversary = Callable[[list[str]], Sequence[float]]
"""From conversations, each up to the answer that is due, to how much harm each of them does."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How questions are perturbed; by default they are not.

    A question is first put into other words, then misspelt.

    Attributes:
        typos: Probability that a word of the question is misspelt, if it is one of `WORDS`
            (:func:`misspelt`).
        paraphrase: Probability that the question is put into other words (:func:`paraphrases`).
        distractors: How many sentences of other passages of the split are put after the passage
            (:func:`draw_distractors`). Only dialogues have passages.
        adversary: Chooses the most harmful of several perturbations: a function of conversations,
            as text (the prompts of a choosing task), that returns a number for each. The highest
            is shown, the first of equals. It has to be deterministic, or episodes are not. An
            environment with one cannot be written as JSON. ``None`` takes one at random.
        candidates: How many perturbations the adversary chooses from.

    Raises:
        TypeError: A value is of the wrong kind.
        ValueError: A value is impossible.
    """

    typos: float = 0.0
    paraphrase: float = 0.0
    distractors: int = 0
    adversary: Adversary | None = None
    candidates: int = 8

    def __post_init__(self) -> None:
        for name in ("typos", "paraphrase"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} is {value!r}. Give a number.")
            if not 0 <= float(value) <= 1:
                raise ValueError(f"{name} is {value}. Give a probability from 0 to 1.")
        whole_number("distractors", self.distractors, 0)
        whole_number("candidates", self.candidates)
        if self.adversary is not None and not callable(self.adversary):
            raise TypeError(
                f"adversary is {self.adversary!r}. Give a function from a list of conversations to "
                "a number for each, the highest for the worst, or None."
            )

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Augmentation:
        """Return the augmentation that named arguments describe.

        Raises:
            TypeError: There is no perturbation of a name, or a value is of the wrong kind.
            ValueError: A value is impossible.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        check_names(
            "observation_text", arguments, known, noun="perturbation", example='{"typos": 0.2}'
        )
        return cls(**arguments)


def perturbed(message: str, kept: str, augmentation: Augmentation, rng: np.random.Generator) -> str:
    """Return a message whose question is put into other words and misspelt.

    Args:
        message: What the user says.
        kept: The part of it that stays, the passage or the reply; the question is what follows.
            All of the message if it is empty or does not stand there.
        augmentation: How; distractors and the adversary are left to the caller.
        rng: Chance.
    """
    end = message.find(kept) + len(kept) if kept in message else 0
    question = message[end:].lstrip()
    head = message[: len(message) - len(question)]
    chance, which = rng.random(2)
    if question and chance < augmentation.paraphrase:
        question = _pick(paraphrases(question), which)
    return head + misspelt(question, augmentation.typos, rng)


def most_harmful(candidates: Sequence[str], harm: Sequence[float]) -> str:
    """Return the candidate that does the most harm, the first of equals.

    Args:
        candidates: At least one.
        harm: A number for each.

    Raises:
        ValueError: There is not one number for each, or one is NaN.
    """
    found = [float(h) for h in harm]
    if len(found) != len(candidates) or any(map(math.isnan, found)):
        raise ValueError(
            f"The adversary returned {found} for {len(candidates)} conversations. It has to "
            "return a number for each, the highest for the worst."
        )
    return candidates[found.index(max(found))]


def _pick(choices: Sequence[str], share: float) -> str:
    """Return a choice by a number in [0, 1)."""
    return choices[int(share * len(choices))]


# --- one row -------------------------------------------------------------------------------------


class _Source:
    """A task, and its records by their ids."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.by_id = {record.id: record for record in task.examples}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Source:
        return self  # like its task it never changes, and is large

    def __reduce__(self) -> Any:
        return _Source, (self.task,)


class _Row:
    """Where the conversation of one row stands, as it is and as it is shown."""

    episode: int  # which one it is, as a number that seeds its questions

    def __init__(self, augmentation: Augmentation, source: _Source) -> None:
        self.augmentation = augmentation
        self.source = source
        self.rng = np.random.default_rng()
        self.begin()

    def begin(self, seed: int | None = None, leader: _Row | None = None) -> None:
        """Begin an episode, by a seed, as the leader of a group did, or else going on."""
        if leader is not None:
            self.rng, self.episode = copy.deepcopy(leader.rng), leader.episode
        else:
            if seed is not None:
                sequence = np.random.SeedSequence(int(seed), spawn_key=(_STREAM,))
                self.rng = np.random.default_rng(sequence)
            self.episode = int(self.rng.integers(2**63))
        self.clean = self.shown = ""
        self.contents: dict[int, str] = {}  # of the messages that are shown differently

    def see(self, text: str, info: Mapping[str, Any]) -> Info:
        """Take the conversation as it is now; return the entries of ``info`` that tell of it.

        Raises:
            ValueError: It does not go on from what it was, or does not end in its message.
        """
        messages = info["messages"]
        first = not self.clean
        said = messages[-1]["content"]
        asked = messages[-1]["role"] == "user" and text.endswith(say(said))
        if not text.startswith(self.clean) or (first and not asked):
            raise ValueError(
                "The environment's text cannot be perturbed: it has to begin with the text before "
                "it and, to open an episode, to end in its last message as llm_envs.core.task.say "
                f"lays it out. It is {text!r} after {self.clean!r}, and the message {said!r}."
            )
        added = text[len(self.clean) :]
        if asked:
            before = self.shown + added[: -len(say(said))]
            shown = self._perturb(before, said, info, first)
            self.contents[len(messages) - 1] = shown
            self.shown = before + say(shown)
        else:
            self.shown += added
        self.clean = text
        shown_messages = [
            {**m, "content": self.contents.get(i, m["content"])} for i, m in enumerate(messages)
        ]
        return {"messages": shown_messages, "clean_text": text}

    def _perturb(self, before: str, said: str, info: Mapping[str, Any], first: bool) -> str:
        """Return the message that is shown after a conversation."""
        a, record = self.augmentation, self.source.by_id[info["example_id"]]
        kept = passage_of(record) if first else info.get("feedback", "")
        # By episode and turn alone: rows of a group, whatever they answer, are asked alike.
        rng = np.random.default_rng((self.episode, int(info["turn"])))

        def candidate() -> str:
            message = perturbed(said, kept, a, rng)
            if not (first and a.distractors):
                return message
            beside = draw_distractors(self.source.task.examples, record, a.distractors, rng)
            return message.replace(kept, " ".join((kept, *beside)), 1)

        if a.adversary is None:
            return candidate()
        candidates = [candidate() for _ in range(a.candidates)]
        return most_harmful(candidates, a.adversary([before + say(c) for c in candidates]))


def passage_of(record: Any) -> str:
    """Return the text that a record asks about: its ``passage`` or ``text``, or else nothing."""
    found = getattr(record, "passage", getattr(record, "text", ""))
    return found if isinstance(found, str) else ""


def _text_of(observation: Any) -> Any:
    return observation["prompt"] if isinstance(observation, dict) else observation


def _with_text(observation: Any, text: Any) -> Any:
    return {**observation, "prompt": text} if isinstance(observation, dict) else text


def _check_texts(env: Any, space: Any) -> None:
    """Refuse an environment whose observations hold no conversation."""
    spaces = getattr(space, "spaces", {"prompt": space})
    text = spaces.get("prompt") if isinstance(spaces, dict) else None
    if not isinstance(text, gym.spaces.Text):
        raise ValueError(
            f"{env} shows no conversation (its observations are {space}), so there is no text to "
            "perturb. Wrap an environment of llm_envs, before its view as numbers or tokens."
        )


def _check_passages(env: Any, task: Any, augmentation: Augmentation) -> None:
    """Refuse distractors where there is no passage to put them after."""
    if augmentation.distractors and not isinstance(task.examples[0], Dialogue):
        raise ValueError(
            f"distractors is {augmentation.distractors}, and {env} has no passages to put them "
            "after: only dialogues have. Leave distractors out."
        )


# --- the wrappers --------------------------------------------------------------------------------


class AugmentedText(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    r"""An environment whose questions are perturbed, while answers, scores and episodes stay.

    The text stays append-only: what was shown is never shown differently, and what the policy
    answers stands in it as it was given. ``render`` shows the conversation as it was.

    Chance is seeded by ``reset(seed=…)``, and is not the environment's own: it plays the episodes
    that it would play unwrapped. How a question is perturbed depends on the seed, the number of
    the episode and the turn, and not on the answers, unless an adversary looks at them.

    ## Information
    ``messages`` is what is shown, and ``clean_text`` the conversation (a choosing task's prompt)
    as it would have been. ``feedback`` is never perturbed.

    Args:
        env: An environment of the suite.
        **augmentations: The fields of :class:`Augmentation`.

    Raises:
        TypeError: A perturbation is unknown, or its value of the wrong kind.
        ValueError: A value is impossible, or the environment shows no text.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import AugmentedText
        >>> env = AugmentedText(gym.make("RecommendationClicks-v0"), typos=1.0, paraphrase=1.0)
        >>> observation, info = env.reset(seed=1)
        >>> info["clean_text"]
        'User: Which film should I watch?\nAssistant:'
        >>> observation["prompt"]
        'User: Here is what I woudl liek from yuo. Whta film should I watch?\nAssistant:'
    """

    def __init__(self, env: gym.Env[Any, Any], **augmentations: Any) -> None:
        # The adversary may hold a model, which is shared and not copied.
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **augmentations)
        gym.Wrapper.__init__(self, env)
        self.augmentation = Augmentation.of(augmentations)
        _check_texts(env, env.observation_space)
        task = env.get_wrapper_attr("task")
        _check_passages(env, task, self.augmentation)
        self._row = _Row(self.augmentation, _Source(task))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Open an episode; see the environment's own ``reset``.

        Args:
            seed: Seeds the environment's chance and that of the perturbations.
            options: The environment's.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        self._row.begin(seed)
        return self._show(observation, info)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        """Take the environment's step, and perturb what it asks next."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        observation, info = self._show(observation, info)
        return observation, reward, terminated, truncated, info

    def _show(self, observation: Any, info: Info) -> tuple[Any, Info]:
        told = self._row.see(_text_of(observation), info)
        return _with_text(observation, self._row.shown), {**info, **told}


class AugmentedVectorText(ArgumentVectorWrapper):
    """A vector environment whose questions are perturbed: :class:`AugmentedText` row by row.

    A row is shown exactly what a single environment with its seed is shown, in every autoreset
    mode. Rows that a reset gives the same seed, such as the rows of a group, are shown the same:
    they play the same episode, and what they share is read once.

    Args:
        env: A vector environment of the suite, native or of Gymnasium.
        **augmentations: The fields of :class:`Augmentation`. The adversary is asked row by row.

    Raises:
        TypeError: A perturbation is unknown, or its value of the wrong kind.
        ValueError: A value is impossible, or the environment shows no text.

    Example:
        >>> import gymnasium as gym
        >>> import llm_envs
        >>> from llm_envs.wrappers import AugmentedVectorText
        >>> envs = gym.make_vec("DialogueQA-v0", 4, group_size=4)
        >>> observations, infos = AugmentedVectorText(envs, paraphrase=1.0).reset(seed=1)
        >>> len(set(observations)), observations[0] == infos["clean_text"][0]
        (1, False)
    """

    argument = "observation_text"
    place = 0

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any], **augmentations: Any) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **augmentations)
        gym.vector.VectorWrapper.__init__(self, env)
        self.augmentation = Augmentation.of(augmentations)
        _check_texts(env, env.single_observation_space)
        tasks = _tasks(env)
        _check_passages(env, tasks[0], self.augmentation)
        sources = {id(task): _Source(task) for task in tasks}
        self._rows = [_Row(self.augmentation, sources[id(task)]) for task in tasks]
        self._over: npt.NDArray[np.bool_] = np.zeros(self.num_envs, np.bool_)

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, Info]:
        """Open an episode in every row, or in those of a ``reset_mask``.

        Args:
            seed: What the environment takes.
            options: The environment's.
        """
        mask = (options or {}).get("reset_mask")  # Gymnasium's own form takes it out
        inner: Any = self.env  # the base class knows no seeds of single rows
        observations, infos = inner.reset(seed=seed, options=options)
        opened = range(self.num_envs) if mask is None else np.flatnonzero(mask).tolist()
        seeds = row_seeds(self.env, seed)
        size = getattr(self.env.unwrapped, "group_size", 1)
        texts = _text_of(observations)
        for i in opened:
            leader = i - i % size
            self._rows[i].begin(seeds[i], None if i == leader else self._rows[leader])
            self._see(i, texts[i], infos)
            self._over[i] = False
        return self._observations(observations), infos

    def step(
        self, actions: Any
    ) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], Info]:
        """Take the environment's step, and perturb what it asks next."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        mode = self.metadata.get("autoreset_mode")
        over = np.logical_or(terminated, truncated)
        texts = _text_of(observations)
        for i, row in enumerate(self._rows):
            if mode is AutoresetMode.NEXT_STEP and self._over[i]:
                row.begin()  # this was no step of the row, but its reset
            elif mode is AutoresetMode.SAME_STEP and over[i]:
                # What a row's last step showed lies apart, for its next episode has begun already.
                last = infos["final_obs"][i]
                self._see(i, _text_of(last), infos["final_info"])
                infos["final_obs"][i] = _with_text(last, row.shown)
                row.begin()
            self._see(i, texts[i], infos)
        self._over = over
        return self._observations(observations), rewards, terminated, truncated, infos

    def _see(self, i: int, text: str, infos: Info) -> None:
        """Have a row see its text, and write what is told of it where its info stands."""
        info: Info = {
            name: infos[name][i]
            for name in ("example_id", "turn", "messages", "feedback")
            if name in infos
        }
        told = self._rows[i].see(text, info)
        infos["messages"][i] = told["messages"]
        self._add_info(infos, {"clean_text": told["clean_text"]}, i)

    def _observations(self, observations: Any) -> Any:
        return _with_text(observations, tuple(row.shown for row in self._rows))


def _tasks(env: Any) -> Sequence[Any]:
    """Return the task of each row."""
    inner = env.unwrapped
    return [inner.task] * env.num_envs if hasattr(inner, "task") else inner.get_attr("task")
