"""Texts of a domain, as rows of tokens for language-model training (:mod:`agents.pretraining`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np

from llm_envs.core.registration import bare_id, known_id
from llm_envs.datasets.dialogues import load_dialogues
from llm_envs.datasets.documents import load_documents
from llm_envs.datasets.faqs import load_faqs
from llm_envs.datasets.splits import did_you_mean

DOCUMENTS: Final = ("python_docstrings", "debian_packages")
DIALOGUES: Final = ("countries_wordnet",)
FAQS: Final = ("faqs",)

FEW_TEXTS: Final = 20
"""Of fewer texts pieces are held out, for a single text could be half of all."""

Row = list[int]
"""Token ids."""


Conversation = tuple[tuple[str, str], ...]
"""Role and content of each message, as ``info["messages"]`` has them."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts to read, each once.

    Attributes:
        texts: The texts; conversations too, which are laid out as policies read them.
        end: Whether they are over where they end: what asks for an answer is not.
    """

    texts: tuple[str | Conversation, ...]
    end: bool = True

    @property
    def digest(self) -> str:
        """Tells other texts apart from these."""
        return hashlib.sha256(repr(self.texts).encode()).hexdigest()[:16]


def load_texts(data: str, env_kwargs: Mapping[str, Any] | None = None) -> Texts:
    """Load the texts of a folder, file, embedded set or environment: training splits only.

    Args:
        data: What ``--data`` of :mod:`agents.pretrain` takes.
        env_kwargs: Further arguments of the environment.

    Raises:
        ValueError: It is nothing of that, holds no text, or asks for another split.
        OSError: A file cannot be read.
    """
    path = Path(data).expanduser()
    found: Iterator[str | Conversation]
    if data.startswith("env:"):
        found = _first_observations(data.removeprefix("env:"), env_kwargs or {})
    elif env_kwargs:
        raise ValueError(f"--env-kwargs is for an environment, and --data is {data}. Leave it out.")
    elif data in DOCUMENTS:
        found = (record.text for record in load_documents(data, split="train").records)
    elif data in DIALOGUES:
        found = (record.passage for record in load_dialogues(data, split="train").records)
    elif data in FAQS:
        found = (f"{faq.question}\n{faq.answer}" for faq in load_faqs(data, split="train").records)
    elif path.exists():
        files = [path] if path.is_file() else _files_in(path)
        found = (text for file in files for text in _texts_of(file))
    else:
        embedded = (*DOCUMENTS, *DIALOGUES, *FAQS)
        raise ValueError(
            f"--data {data} is neither a folder or file nor an embedded set "
            f"({', '.join(embedded)}).{did_you_mean(data, embedded)} An environment is named "
            "env:ID, for example env:DialogueQA-v0."
        )
    texts = tuple(
        dict.fromkeys(text for text in found if not isinstance(text, str) or text.strip())
    )
    if not texts:
        raise ValueError(f"--data {data} holds no text. Give files .txt, .md or .jsonl.")
    return Texts(texts, end=not data.startswith("env:"))


def _first_observations(env_id: str, env_kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is said first in every example of the training split."""
    known_id(bare_id(env_id))  # Gymnasium imports the module that it may name
    if env_kwargs.get("split", "train") != "train":
        raise ValueError(
            f"--env-kwargs holds the split {env_kwargs['split']!r}. Leave it out: only the "
            "training split is read, so that the others can be scored on."
        )
    env: Any = gym.make(env_id, disable_env_checker=True, **env_kwargs)
    for example in range(len(env.unwrapped.task.examples)):
        observation, _ = env.reset(seed=example, options={"example": example})
        yield observation if isinstance(observation, str) else observation["prompt"]


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a folder and the folders in it, without hidden ones."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return sorted(
        p for p in found if not any(x.startswith(".") for x in p.relative_to(folder).parts)
    )


def _texts_of(file: Path) -> Iterator[str | Conversation]:
    if file.suffix not in (".txt", ".md", ".jsonl"):
        return
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield from _text_of(line, f"Line {number} of {file}")


def _text_of(line: str, place: str) -> Iterator[str | Conversation]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}).") from error
    if isinstance(record, dict) and "messages" in record:
        text: str | Conversation = _conversation(record["messages"], place)
    elif isinstance(record, dict) and isinstance(record.get("text"), str):
        text = record["text"]
    else:
        raise ValueError(
            f'{place} has no "text" and no "messages". Write {{"text": "…"}}, or {{"messages": '
            '[{"role": "user", "content": "…"}, …]}, on every line.'
        )
    if record.keys() & {"summaries", "summary", "turns"}:
        raise ValueError(
            f"{place} is an environment's, and has splits that are scored on. Read it with "
            f'--data env:ID --env-kwargs \'{{"dataset": "FILE"}}\'.'
        )
    if (record.get("split") or "train") == "train":
        yield text


def _conversation(messages: Any, place: str) -> Conversation:
    try:
        found = tuple((m["role"], m["content"]) for m in messages)
    except (TypeError, KeyError):
        found = ()
    known = all(
        role in ("user", "assistant") and isinstance(content, str) for role, content in found
    )
    if not found or not known:
        raise ValueError(
            f'{place} has "messages" that are no conversation. Give a list of {{"role": "user", '
            '"content": "…"} and {"role": "assistant", "content": "…"}.'
        )
    return found


def encode(texts: Texts, tokenizer: Any, max_length: int) -> list[list[Row]]:
    """Encode texts as rollouts encode observations, without special tokens.

    Args:
        texts: The texts.
        tokenizer: Its end-of-sequence token is put where a text is over, and after each answer of
            a conversation. Conversations are laid out by its chat template, if it has one.
        max_length: Tokens of a piece.

    Returns:
        The pieces of each text; those of one token, which predicts nothing, are left out.
    """
    end = [tokenizer.eos_token_id] * texts.end
    written = [text for text in texts.texts if isinstance(text, str)]
    plain: Iterator[Row] = iter(_ids(tokenizer, written) if written else ())
    pieces = []
    for text in texts.texts:
        ids = [*next(plain), *end] if isinstance(text, str) else _encoded(text, tokenizer)
        parts = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        pieces.append([part for part in parts if len(part) > 1])
    return [parts for parts in pieces if parts]


def _ids(tokenizer: Any, text: str | list[str]) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _encoded(text: Conversation, tokenizer: Any) -> Row:
    if tokenizer.chat_template is not None:
        messages = [{"role": role, "content": content} for role, content in text]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        return list(_ids(tokenizer, rendered))
    ids: Row = []
    for role, content in text:
        if role == "user":
            ids += _ids(tokenizer, ("\n" if ids else "") + f"User: {content}")
        else:
            ids += [*_ids(tokenizer, f"\nAssistant: {content}"), tokenizer.eos_token_id]
    return ids


def hold_out(pieces: Sequence[list[Row]], share: float) -> tuple[list[Row], list[Row]]:
    """Divide texts by the hash of their content.

    Args:
        pieces: Those of each text. Of fewer than ``FEW_TEXTS`` texts each piece counts as one.
        share: Of the texts to hold out, at least one.

    Returns:
        The pieces to train on, and those to measure on.

    Raises:
        ValueError: There is nothing to divide.
    """
    few = len(pieces) < FEW_TEXTS
    units = [[part] for parts in pieces for part in parts] if few else list(pieces)
    if len(units) < 2:
        raise ValueError(
            "There is a single short text, and a part has to be held out. Give more texts, or a "
            "smaller --max-length, which cuts it into pieces."
        )
    units.sort(key=lambda parts: hashlib.sha256(repr(parts).encode()).digest())
    held = min(max(1, round(share * len(units))), len(units) - 1)
    train, measured = units[held:], units[:held]
    return [row for parts in train for row in parts], [row for parts in measured for row in parts]


def batches(rows: Sequence[Row], most_tokens: int, seed: Sequence[int]) -> list[list[Row]]:
    """Divide rows into batches of similar lengths, in random order.

    Args:
        rows: Token ids.
        most_tokens: Of a batch, padding included; a longer row is a batch of its own.
        seed: Decides the order, and which rows of one length come together.

    Returns:
        The batches; how many does not depend on the seed.
    """
    rng = np.random.default_rng(seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    made: list[list[Row]] = []
    for row in sorted(shuffled, key=len):
        if not made or (len(made[-1]) + 1) * len(row) > most_tokens:
            made.append([])
        made[-1].append(row)
    return [made[i] for i in rng.permutation(len(made))]
