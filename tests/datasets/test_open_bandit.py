"""The loader of the Open Bandit files, on files that are written here."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_envs.datasets.open_bandit import load_open_bandit

ITEMS = [
    {"": 1, "item_id": 1, "item_feature_0": 3.0, "item_feature_1": "b", "item_feature_2": "x"},
    {"": 0, "item_id": 0, "item_feature_0": 1.0, "item_feature_1": "a", "item_feature_2": "x"},
]
LOG = [
    {"item_id": i % 2, "position": 1 + i % 3, "click": int(i == 4), "propensity_score": 0.5}
    | {"user_feature_0": "uvw"[i % 3], "user_feature_1": "k", "user-item_affinity_0": 0.0}
    for i in range(6)
]


def write(folder: Path, log: list[dict[str, Any]], items: list[dict[str, Any]] = ITEMS) -> Path:
    place = folder / "random" / "all"
    place.mkdir(parents=True, exist_ok=True)
    for name, rows in (("all.csv", log), ("item_context.csv", items)):
        with (place / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["item_id"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_a_log_is_arrays(tmp_path: Path) -> None:
    log = load_open_bandit(write(tmp_path, LOG), "random")
    assert len(log) == 6
    assert log.actions.tolist() == [0, 1, 0, 1, 0, 1]
    assert log.positions.tolist() == [1, 2, 3, 1, 2, 3]
    assert log.clicks.tolist() == [0, 0, 0, 0, 1, 0]
    assert log.propensities.tolist() == [0.5] * 6
    # Of u, v, w a column each but for the first; a feature with one category tells nothing.
    assert log.users.tolist() == [[0, 0], [1, 0], [0, 1], [0, 0], [1, 0], [0, 1]]
    # Items in the order of their ids: the number standardised, then whether feature 1 is b.
    assert log.items.tolist() == [[-1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"click": 2}, r"all\.csv, line 3: click is '2', but a click is 0 or 1"),
        ({"click": ""}, "click is '', but it has to be a number"),
        ({"propensity_score": 0}, "propensity_score is '0', but a probability"),
        ({"propensity_score": 1.5}, "propensity_score is '1.5'"),
        ({"propensity_score": "nan"}, "propensity_score is 'nan'"),
        ({"item_id": 2}, "item_id is '2', but there are the items 0 to 1"),
        ({"item_id": 0.5}, "item_id is '0.5', but it has to be a whole number"),
        ({"position": 0}, "position is '0', but there are the positions 1 to 3"),
        ({"position": 10**12}, "position is '1000000000000', but there are the positions 1 to 3"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    log = [LOG[0], {**LOG[1], **change}, *LOG[2:]]
    with pytest.raises(ValueError, match=message):
        load_open_bandit(write(tmp_path, log), "random")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read .*holds random/ and"):
        load_open_bandit(tmp_path, "random")
    with pytest.raises(ValueError, match=r"no policy 'bt'.* Did you mean 'bts'"):
        load_open_bandit(tmp_path, "bt")
    with pytest.raises(ValueError, match=r"no campaign 'man'.* Did you mean 'men'"):
        load_open_bandit(tmp_path, "bts", "man")
    without = [{k: v for k, v in row.items() if k != "click"} for row in LOG]
    with pytest.raises(ValueError, match="lacks the columns click"):
        load_open_bandit(write(tmp_path, without), "random")


@pytest.mark.parametrize("line", ["0,1,0,0.5,u,k", "0,1,0,0.5,u,k,0.0,9", '0,1,0,0.5,"u'])
def test_a_line_of_another_length_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, LOG) / "random" / "all" / "all.csv"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"all\.csv, line 8 has more or fewer columns"):
        load_open_bandit(tmp_path, "random")


def test_an_item_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"item_id is '1', but another line has it"):
        load_open_bandit(write(tmp_path, LOG, [*ITEMS, ITEMS[0]]), "random")


def test_items_without_an_id_and_empty_logs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whose ids are not 0 to 0"):
        load_open_bandit(write(tmp_path, LOG, ITEMS[:1]), "random")
    header = write(tmp_path, LOG) / "random" / "all" / "all.csv"
    header.write_text(header.read_text().splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds no impression"):
        load_open_bandit(tmp_path, "random")
    header.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        load_open_bandit(tmp_path, "random")


def test_columns_are_known_by_their_names(tmp_path: Path) -> None:
    turned = [dict(reversed(item.items())) for item in ITEMS]
    log = load_open_bandit(write(tmp_path, LOG, turned), "random")
    assert log.items.tolist() == [[-1, 0], [1, 1]]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    file = write(tmp_path, LOG) / "random" / "all" / "all.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as spreadsheets write UTF-8
    assert load_open_bandit(tmp_path, "random").actions.tolist() == [0, 1, 0, 1, 0, 1]


def test_items_alike_in_their_number_stay_finite(tmp_path: Path) -> None:
    items = [{**item, "item_feature_0": 2.0} for item in ITEMS]
    assert np.isfinite(load_open_bandit(write(tmp_path, LOG, items), "random").items).all()
