"""Token sequences as trees of their prefixes: what sequences share is read once.

The members of a group begin alike, and go on alike for as long as they answer alike. What a causal
model says at a token depends on the tokens before it alone, so a forward pass over the *distinct*
prefixes of a batch holds all that there is to know. Trees lie side by side in rows, in depth-first
order: a token sees itself and its ancestors, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agents.policies.models import Parts, Passes, additive_mask, pad_right, read

TREE_TOKENS = 512
"""Most distinct tokens of a tree of several sequences: attention costs the square of it."""
ROW_TOKENS = 256
"""Rows are filled up to so many tokens with smaller trees, so that little padding is read."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Forest:
    """Sequences laid out in rows, each distinct prefix once.

    Attributes:
        ids: (rows, width) token of each node, filled up with padding.
        positions: (rows, width) number of tokens before it.
        until: (rows, width) one past the last node of its subtree, within the row; ``None`` if
            every row is one plain sequence.
        nodes: For each sequence the (length,) places of its tokens in the flattened rows.
    """

    ids: Tensor
    positions: Tensor
    until: Tensor | None
    nodes: list[Ints]

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return (rows, 1, width, width) as :func:`agents.policies.models.additive_mask`.

        ``None`` if causal attention needs no mask.
        """
        if self.until is None:
            return None
        until = self.until.to(device)
        place = torch.arange(until.shape[1], device=device)
        seen = (place[:, None] >= place) & (place[:, None] < until[:, None, :])
        return additive_mask(seen, dtype)


def shared_with_previous(ordered: Sequence[Sequence[int]]) -> list[int]:
    """Return how many first tokens each sequence shares with the one before it."""
    if not ordered:
        return []
    width = max(map(len, ordered))
    table = np.full((len(ordered), width + 1), -1)  # the last column never differs
    for row, ids in zip(table, ordered, strict=True):
        row[: len(ids)] = ids
    differs = table[1:] != table[:-1]
    first = np.where(differs.any(1), differs.argmax(1), [len(s) for s in ordered[1:]])
    return [0, *first.tolist()]


def rows_of(
    sequences: Sequence[Sequence[int]], *, limit: int = TREE_TOKENS
) -> list[tuple[list[int], int]]:
    """Distribute sequences over rows so that what they share lies in one row.

    Args:
        sequences: Token ids.
        limit: Most distinct tokens of a row; a longer sequence has a row for itself.

    Returns:
        For each row the indices of its sequences, in the order of a depth-first walk, and the most
        nodes that they have.
    """
    order = sorted(range(len(sequences)), key=lambda i: list(sequences[i]))
    shared = shared_with_previous([sequences[i] for i in order])
    trees: list[list[int]] = []
    sizes: list[int] = []
    for i, known in zip(order, shared, strict=True):
        length = len(sequences[i])
        # A few tokens that all prompts begin with do not make them one tree.
        if trees and 4 * known >= length and sizes[-1] + length - known <= limit:
            trees[-1].append(i)
            sizes[-1] += length - known
        else:
            trees.append([i])
            sizes.append(length)
    room = min(limit, ROW_TOKENS)
    rows: list[list[int]] = []
    filled: list[int] = []
    for tree in sorted(range(len(trees)), key=lambda t: -sizes[t]):  # the longest first, first fit
        size = sizes[tree]
        row = next((r for r, held in enumerate(filled) if held + size <= room), len(rows))
        if row == len(rows):
            rows.append([])
            filled.append(0)
        rows[row] += trees[tree]
        filled[row] += size
    return list(zip(rows, filled, strict=True))


def forest(sequences: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], pad: int) -> Forest:
    """Lay sequences out.

    Args:
        sequences: Token ids, each of at least one.
        rows: What :func:`rows_of` says: sequences that share a prefix are neighbours.
        pad: Token id to fill rows up with.
    """
    tokens: list[list[int]] = []
    positions: list[list[int]] = []
    until: list[list[int]] = []
    nodes: list[Ints] = [np.zeros(0, np.int64)] * len(sequences)
    for row in rows:
        ids: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        path = np.zeros(0, np.int64)
        shared = shared_with_previous([sequences[i] for i in row])
        for i, known in zip(row, shared, strict=True):
            for node in path[known:].tolist():
                ends[node] = len(ids)  # nothing that comes now goes on from there
            new = len(sequences[i]) - known
            path = np.concatenate([path[:known], np.arange(len(ids), len(ids) + new)])
            nodes[i] = path
            ids += sequences[i][known:]
            depths += range(known, known + new)
            ends += [-1] * new
        tokens.append(ids)
        positions.append(depths)
        until.append([len(ids) if end < 0 else end for end in ends])
    width = max([1, *map(len, tokens)])
    for number, row in enumerate(rows):
        for i in row:
            nodes[i] = nodes[i] + number * width
        # What fills a row up sees itself, so that no query sees nothing.
        until[number] += range(len(until[number]) + 1, width + 1)
    plain = all(len(row) <= 1 for row in rows)
    return Forest(
        pad_right(tokens, pad),
        pad_right(positions, 0),
        None if plain else torch.tensor(until),
        nodes,
    )


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """The N sampled tokens of some sequences, by the U distinct prefixes that they follow.

    Attributes:
        places: (U,) flattened places at which the guesses stand.
        targets: (U, K) the distinct tokens that followed each, filled up with 0.
        place_of: (N,) which of the U each token was guessed at.
        slot_of: (N,) where each token stands in the flattened ``targets``.
    """

    places: Tensor
    targets: Tensor
    place_of: Tensor
    slot_of: Tensor


def sampled_tokens(
    laid_out: Forest,
    sequences: Sequence[Sequence[int]],
    sampled: Sequence[NDArray[np.bool_]],
    *,
    distinct: bool = True,
) -> SampledTokens:
    """Find the sampled tokens in a forest.

    Args:
        laid_out: The forest of the sequences.
        sequences: Token ids.
        sampled: Whether each was sampled; the first one of a sequence never is.
        distinct: Whether tokens after the same prefix share its place; else U is N and K is 1.
    """
    where = [np.flatnonzero(s) for s in sampled]
    parents = joined([nodes[at - 1] for nodes, at in zip(laid_out.nodes, where, strict=True)])
    ids = joined([np.asarray(s)[at] for s, at in zip(sequences, where, strict=True)])
    everyone = np.arange(len(parents))
    if not distinct:
        columns = (parents, ids[:, None], everyone, everyone)
        return SampledTokens(*map(torch.from_numpy, columns))
    # A token after a prefix is a node; those of one prefix take slots 0, 1, … of its row.
    children = joined([nodes[at] for nodes, at in zip(laid_out.nodes, where, strict=True)])
    _, first, child_of = np.unique(children, return_index=True, return_inverse=True)
    places, place_of = np.unique(parents, return_inverse=True)
    row_of_child = place_of[first]
    order = np.argsort(row_of_child, kind="stable")
    begins = np.searchsorted(row_of_child[order], row_of_child[order])
    slot = np.empty(len(order), np.int64)
    slot[order] = np.arange(len(order)) - begins
    targets = np.zeros((len(places), 1 + int(slot.max(initial=0))), np.int64)
    targets[row_of_child, slot] = ids[first]
    slot_of = (row_of_child * targets.shape[1] + slot)[child_of]
    return SampledTokens(*map(torch.from_numpy, (places, targets, place_of, slot_of)))


def joined(arrays: Sequence[Ints]) -> Ints:
    """Join integer arrays, perhaps none."""
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def reads_trees(model: Any, parts: Parts) -> bool:
    """Say whether a model reads branches beside each other as it reads each alone.

    A model has to take positions and a mask for every pair of tokens; some kinds of attention, and
    recurrent layers, do not.

    Args:
        model: A causal language model.
        parts: What ``split_model`` says of it.
    """
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    branches = [[token % vocabulary for token in ids] for ids in ((1, 2, 3, 4), (1, 2, 5, 6))]
    tree = forest(branches, [[0, 1]], pad=0)
    try:
        with torch.no_grad():
            apart = read(model, parts, Passes(), input_ids=torch.tensor(branches, device=device))
            together = read(
                model,
                parts,
                Passes(),
                input_ids=tree.ids.to(device),
                attention_mask=tree.mask(model.dtype, device),
                position_ids=tree.positions.to(device),
            )
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return False
    # The end of the second branch is what another reading would get wrong.
    expected = apart.hidden[-2:].float()
    found = together.hidden[torch.from_numpy(tree.nodes[1][-2:]).to(device)].float()
    rounding = 1e-4 if model.dtype in (torch.float32, torch.float64) else 0.05
    return bool((found - expected).abs().mean() <= rounding * expected.abs().mean())
