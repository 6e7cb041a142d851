"""Conversations of chat models: what a tokenizer's chat template makes of messages, turn by turn.

A template renders a whole conversation. A policy needs less: once it has sampled an answer, only
what *follows* that answer may be encoded, for the answer's own text could be encoded into other
tokens than were sampled. :meth:`ChatTemplate.following` finds that rest by rendering the
conversation with a mark in the answer's place, and makes sure that the template still shows
everything before it as the policy has read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_envs.core.task import Message, say

CHAT_FILE = "chat.json"
"""Beside a saved tokenizer: whether its template is used, and the system message."""

MARK = "\ue000"  # a character for private use, which no template looks for


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation up to an answer.

    Attributes:
        messages: Number of messages before the answer.
        prompt: Their rendering, ready for the answer.
        answer: The answer's text.
    """

    messages: int
    prompt: str
    answer: str


class ChatTemplate:
    """The chat template of a tokenizer, with a system message of one's own before everything.

    Attributes:
        end: Id of the token that ends an answer: the special token that the template puts there
            (which need not be the tokenizer's end of sequence), else the end of sequence.
        closing: Ids of what the template puts after an answer, up to ``end`` and with it; empty if
            the template ends answers with no special token.

    Args:
        tokenizer: A tokenizer with a chat template.
        system: The system message; ``None`` leaves it to the template, which may have its own.

    Raises:
        ValueError: There is no template, or it refuses a plain conversation, for example because
            it knows no system message.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "The tokenizer has no chat template, so conversations cannot be rendered for it. "
                "Set tokenizer.chat_template, or use chat=False."
            )
        self.tokenizer = tokenizer
        self.system = system
        self.end, self.closing = self._find_end()

    def render(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        """Return the template's text for a conversation.

        Args:
            messages: The conversation, without the policy's own system message.
            prompt: Whether the beginning of the next answer is added.

        Raises:
            ValueError: The template refuses the conversation.
        """
        from jinja2 import TemplateError

        own = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [*own, *messages], tokenize=False, add_generation_prompt=prompt
            )
        except TemplateError as error:
            roles = [m["role"] for m in [*own, *messages]]
            raise ValueError(
                f"The chat template refuses a conversation with the roles {roles}: {error}\n"
                "Not every template knows system messages: leave `system` out, or put its text "
                "into the first user message. chat=False uses no template at all."
            ) from error
        return text

    def following(self, said: Said, messages: Sequence[Message], prompt: str) -> str | None:
        """Return what the template puts between an answer and the next one.

        Args:
            said: The conversation as far as it was read, and the answer.
            messages: The conversation now: the same, the answer, and what came after it.
            prompt: The rendering of ``messages``.

        Returns:
            The end of the answer, the new messages and the beginning of the next answer, as text;
            ``None`` if the rendering has changed before that point: the environment has rewritten
            the conversation, or the template does (some drop the thinking of earlier answers).
            White space round the answer is no change: environments and templates strip it.
        """
        n = said.messages
        if len(messages) < n + 2:
            return None
        marked = [*messages[:n], {**messages[n], "content": MARK}, *messages[n + 1 :]]
        before, _, after = self.render(marked).partition(MARK)
        answer = prompt.removeprefix(before).removesuffix(after)
        unchanged = (
            before.rstrip() == said.prompt.rstrip() and answer.strip() == said.answer.strip()
        )
        return after if unchanged else None

    def _find_end(self) -> tuple[int, tuple[int, ...]]:
        eos = self.tokenizer.eos_token_id
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        after = self.render([*talk, {"role": "user", "content": "b"}]).partition(MARK)[2]
        # What begins the user's next message is no end of the answer: the end is there without it.
        alone = self.render(talk, prompt=False).partition(MARK)[2].strip()
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        for length in range(1, len(ids) + 1):
            if text := self.tokenizer.decode(ids[:length]).strip():
                token = ids[length - 1]
                special = token in self.tokenizer.added_tokens_decoder and alone.startswith(text)
                if special or token == eos:
                    return token, tuple(ids[:length])
                break
        return eos, ()


def as_messages(observation: Any) -> list[Message]:
    r"""Return what a chat policy is shown as messages.

    Args:
        observation: Messages, which stay as they are; or a text, which becomes one user message.
            What writing tasks put round their first message (``User: …\nAssistant:``) is taken
            off, so that their first observation gives just the message that ``info["messages"]``
            holds. Later observations do not tell where a message ends: give messages.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(observation, str):
        before, after = say(MARK).split(MARK)
        if observation.startswith(before) and observation.endswith(after):
            observation = observation[len(before) : -len(after)]
        return [{"role": "user", "content": observation}]
    given = observation if isinstance(observation, Sequence) else ()
    if given and all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in given):
        return [dict(m) for m in given]
    raise ValueError(
        f"A chat policy is shown a text or a list of messages, such as info['messages'], but "
        f"{observation!r} came. `predict` takes one text, or a list of conversations: "
        "agent.predict([info['messages']])."
    )
