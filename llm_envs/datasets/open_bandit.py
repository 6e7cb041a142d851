"""Logged recommendations with their propensities: the files of the Open Bandit Dataset.

A folder ``<policy>/<campaign>`` holds ``<campaign>.csv``, an impression a line (which item was
shown at which position, with what probability, to whom, and whether it was clicked), and
``item_context.csv``, an item a line. ``random`` chose items uniformly, ``bts`` by Bernoulli
Thompson sampling. The whole set is 26 million impressions; 10,000 a file come with the PyPI wheel
``obp``.

References:
    Saito, Aihara, Matsutani, Narita (2021), "Open Bandit Dataset and Pipeline: Towards Realistic
    and Reproducible Off-Policy Evaluation", NeurIPS Datasets and Benchmarks. CC BY 4.0.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from llm_envs.datasets.splits import did_you_mean

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

POLICIES: Final = ("random", "bts")
CAMPAIGNS: Final = ("all", "men", "women")
POSITIONS: Final = 3
"""Items that stand side by side: left is 1, right is 3."""


@dataclass(frozen=True, eq=False)
class LoggedBandit:
    """What a policy showed, and what was clicked.

    Attributes:
        actions: (n,) the item that was shown, in [0, k).
        positions: (n,) where it stood, as the file numbers it, from 1 to 3.
        clicks: (n,) 1.0 if it was clicked, else 0.0.
        propensities: (n,) in (0, 1], the probability with which the policy chose the item.
        users: (n, u) whom it was shown to: each category of each user feature, 0 or 1.
        items: (k, f) each category of each item feature, 0 or 1, and its number, standardised.
    """

    actions: Ints
    positions: Ints
    clicks: Floats
    propensities: Floats
    users: Floats
    items: Floats

    def __len__(self) -> int:
        return len(self.actions)


def load_open_bandit(folder: str | Path, policy: str, campaign: str = "all") -> LoggedBandit:
    """Load the log of a policy in a campaign.

    Args:
        folder: Holds ``random/`` and ``bts/``.
        policy: ``"random"`` or ``"bts"``.
        campaign: ``"all"``, ``"men"`` or ``"women"``.

    Raises:
        ValueError: There is no such log, or a line of it is damaged; the file, the line and the
            column are named.
    """
    for what, name, known in (("policy", policy, POLICIES), ("campaign", campaign, CAMPAIGNS)):
        if name not in known:
            raise ValueError(
                f"There is no {what} {name!r} in Open Bandit.{did_you_mean(name, known)} "
                f"There are: {', '.join(known)}."
            )
    place = Path(folder) / policy / campaign
    items_file, log_file = place / "item_context.csv", place / f"{campaign}.csv"
    items = _items(items_file)
    columns: dict[str, list[float]] = {}
    users: list[tuple[str, ...]] = []
    for line in _lines(log_file, ("item_id", "position", "click", "propensity_score")):
        action = line.number("item_id", whole=True)
        if not 0 <= action < len(items):
            raise line.error("item_id", f"there are the items 0 to {len(items) - 1}")
        position = line.number("position", whole=True)
        if not 1 <= position <= POSITIONS:
            raise line.error("position", f"there are the positions 1 to {POSITIONS}")
        click = line.number("click")
        if click not in (0, 1):
            raise line.error("click", "a click is 0 or 1")
        propensity = line.number("propensity_score")
        if not 0 < propensity <= 1:
            raise line.error("propensity_score", "a probability of what was shown is in (0, 1]")
        for name, value in (
            ("action", action),
            ("position", position),
            ("click", click),
            ("propensity", propensity),
        ):
            columns.setdefault(name, []).append(value)
        users.append(line.starting("user_feature"))
    if not users:
        raise ValueError(f"{log_file} holds no impression.")
    return LoggedBandit(
        actions=np.array(columns["action"], np.int64),
        positions=np.array(columns["position"], np.int64),
        clicks=np.array(columns["click"]),
        propensities=np.array(columns["propensity"]),
        users=_one_hot(users),
        items=items,
    )


def _items(path: Path) -> Floats:
    """Return the features of the items, in the order of their ids."""
    known: dict[int, tuple[float, tuple[str, ...]]] = {}
    for line in _lines(path, ("item_id", "item_feature_0")):
        item = int(line.number("item_id", whole=True))
        if item in known:
            raise line.error("item_id", "another line has it, too")
        categories = line.starting("item_feature", but="item_feature_0")
        known[item] = (line.number("item_feature_0"), categories)
    if sorted(known) != list(range(len(known))) or not known:
        raise ValueError(
            f"{path} has {len(known)} items, whose ids are not 0 to {len(known) - 1}. The log "
            "names items by these ids: take the file that belongs to it."
        )
    numbers = np.array([known[i][0] for i in range(len(known))])
    numbers = (numbers - numbers.mean()) / (numbers.std() or 1.0)
    return np.column_stack([numbers, _one_hot([known[i][1] for i in range(len(known))])])


def _one_hot(rows: list[tuple[str, ...]]) -> Floats:
    """Return a column for each category but the first of each feature, (rows, columns)."""
    columns = [
        np.array([row[feature] == category for row in rows], np.float64)
        for feature in range(len(rows[0]))
        for category in sorted({row[feature] for row in rows})[1:]
    ]
    return np.column_stack(columns) if columns else np.zeros((len(rows), 0))


@dataclass(frozen=True, slots=True)
class _Line:
    path: Path
    number_in_file: int
    values: dict[str, str]

    def number(self, column: str, *, whole: bool = False) -> float:
        try:
            value = float(self.values[column])
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value) or (whole and value != int(value)):
            raise self.error(column, f"it has to be a {'whole ' * whole}number")
        return value

    def starting(self, prefix: str, but: str = "") -> tuple[str, ...]:
        return tuple(
            value for name, value in self.values.items() if name.startswith(prefix) and name != but
        )

    def error(self, column: str, why: str) -> ValueError:
        return ValueError(
            f"{self.path}, line {self.number_in_file}: {column} is {self.values.get(column)!r}, "
            f"but {why}. Mend the line, or load the file as it was published."
        )


def _lines(path: Path, needed: tuple[str, ...]) -> Iterator[_Line]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} lacks the columns {', '.join(missing)}. Give a file of the Open "
                    "Bandit Dataset."
                )
            for number, values in enumerate(reader, 2):
                if None in values or None in values.values():
                    raise ValueError(
                        f"{path}, line {number} has more or fewer columns than the first line. "
                        "Mend it, or load the file as it was published."
                    )
                yield _Line(path, number, values)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file ({error}).") from error
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}). Name the folder that holds random/ and "
            "bts/, such as obp/dataset/obd of the wheel obp."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}).") from error
