"""Compiled tree traversal. Importing this compiles it once for a machine.

A node is two words of 32 bits: its threshold; and from the lowest bit its feature, a bit that sends NaN to the true
child, and where its children stand, counted from the root. The false child stands behind the true one. A leaf has an
infinite threshold and is its own true child: a row that has arrived stays where it is, and no branch is mispredicted.
"""

import math

import numpy as np
from numba import types

from batchserve.compiled import compiled, read_only, written

__all__ = ["decide_many", "decide_two", "traverse", "traverse_sets"]

LANES = 64
"""Rows that descend a tree interleaved: while one waits for its node, the others proceed."""
ROUND = 16
"""Steps between checks whether all rows have reached a leaf: few trees are deeper, so few are checked."""


@compiled(
    types.void(
        *(read_only(types.float32, 2), types.uint64, read_only(types.uint32), read_only(types.float32), types.uint64),
        *(
            read_only(types.uint64),
            read_only(types.int64),
            read_only(types.uint64),
            read_only(types.uint32),
            read_only(types.float32, 2),
        ),
        written(types.float32, 2),
    )
)
def traverse(  # noqa: C901 - as several functions it is a quarter slower
    rows: np.ndarray,
    feature: int,
    words: np.ndarray,
    thresholds: np.ndarray,
    child: int,
    roots: np.ndarray,
    depths: np.ndarray,
    targets: np.ndarray,
    answers: np.ndarray,
    weights: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Adds to `sums` [N, targets] what the trees answer to `rows`, tree by tree as ONNX Runtime does.

    `words` and `thresholds` are the same nodes as integers and as floats; the bits of `feature` say which column of
    `rows` a node looks at, those from `child` on where its children stand. `answers`, by node: with `weights`
    [leaves, targets] the row of a leaf in it; without (no rows) the bits of the one weight of a leaf, and `targets`
    tells which target its tree is about. Indices are unsigned, or each would be checked for being negative.
    """
    values, columns = rows.reshape(-1), np.uint64(rows.shape[1])
    single, one, two = answers.view(np.float32), np.uint64(1), np.uint64(2)
    place = np.empty(LANES, np.uint64)
    for tree in range(len(roots)):
        root, target = roots[tree], targets[tree]
        for first in range(0, len(rows), LANES):
            lanes = min(LANES, len(rows) - first)
            for lane in range(lanes):
                place[lane] = root
            steps = depths[tree]
            while steps > 0:
                for _ in range(min(steps, ROUND)):
                    for lane in range(lanes):
                        node = place[lane] * two
                        word = np.uint64(words[node + one])
                        value = values[np.uint64(first + lane) * columns + (word & feature)]
                        place[lane] = root + (word >> child) + np.uint64(not (value <= thresholds[node]))
                steps -= ROUND
                if steps > 0:
                    moving = np.uint64(0)
                    for lane in range(lanes):
                        moving |= (root + (np.uint64(words[place[lane] * two + one]) >> child)) ^ place[lane]
                    if moving == 0:
                        break
            for lane in range(lanes):
                row = np.uint64(first + lane)
                if len(weights) == 0:
                    sums[row, target] += single[place[lane]]
                else:
                    leaf = np.uint64(answers[place[lane]])
                    for column in range(sums.shape[1]):
                        sums[row, np.uint64(column)] += weights[leaf, np.uint64(column)]


@compiled(
    types.void(
        *(read_only(types.float32, 2), types.uint64, read_only(types.uint32), read_only(types.float32), types.uint64),
        *(
            read_only(types.uint64),
            read_only(types.int64),
            read_only(types.uint64),
            read_only(types.uint32),
            read_only(types.float32, 2),
        ),
        *(read_only(types.uint32, 2), read_only(types.uint32), read_only(types.uint32)),
        written(types.float32, 2),
    )
)
def traverse_sets(  # noqa: C901 - as `traverse`, which is faster without the bits
    rows: np.ndarray,
    feature: int,
    words: np.ndarray,
    thresholds: np.ndarray,
    child: int,
    roots: np.ndarray,
    depths: np.ndarray,
    targets: np.ndarray,
    answers: np.ndarray,
    weights: np.ndarray,
    codes: np.ndarray,
    sets: np.ndarray,
    bits: np.ndarray,
    sums: np.ndarray,
) -> None:
    """`traverse` for trees of which some splits are by sets of categories, whose thresholds are NaN.

    `codes` are `rows` as integers; `sets` says for each node where its bits begin in `bits`, and which bits of a code
    count.
    """
    values, integers, columns = rows.reshape(-1), codes.reshape(-1), np.uint64(rows.shape[1])
    single, one, two = answers.view(np.float32), np.uint64(1), np.uint64(2)
    word_bits, low = np.uint64(5), np.uint64(31)
    place = np.empty(LANES, np.uint64)
    for tree in range(len(roots)):
        root, target = roots[tree], targets[tree]
        for first in range(0, len(rows), LANES):
            lanes = min(LANES, len(rows) - first)
            for lane in range(lanes):
                place[lane] = root
            steps = depths[tree]
            while steps > 0:
                for _ in range(min(steps, ROUND)):
                    for lane in range(lanes):
                        node = place[lane] * two
                        word = np.uint64(words[node + one])
                        at = np.uint64(first + lane) * columns + (word & feature)
                        bit = np.uint64(sets[node]) + np.uint64(integers[at] & sets[node + one])
                        member = (np.uint64(bits[bit >> word_bits]) >> (bit & low)) & one
                        passed = np.uint64(values[at] <= thresholds[node]) | member
                        place[lane] = root + (word >> child) + (passed ^ one)
                steps -= ROUND
                if steps > 0:
                    moving = np.uint64(0)
                    for lane in range(lanes):
                        moving |= (root + (np.uint64(words[place[lane] * two + one]) >> child)) ^ place[lane]
                    if moving == 0:
                        break
            for lane in range(lanes):
                row = np.uint64(first + lane)
                if len(weights) == 0:
                    sums[row, target] += single[place[lane]]
                else:
                    leaf = np.uint64(answers[place[lane]])
                    for column in range(sums.shape[1]):
                        sums[row, np.uint64(column)] += weights[leaf, np.uint64(column)]


@compiled(
    types.void(
        *(read_only(types.float32, 2), types.float32, types.boolean, types.boolean),
        *(written(types.int64), written(types.float32, 2)),
    )
)
def decide_two(
    sums: np.ndarray, base: float, positive: bool, logistic: bool, winners: np.ndarray, scores: np.ndarray
) -> None:
    """The winner of two classes, and their scores [N, 2], from the sum of the weights for the second.

    `positive`: no weight is negative, so the sum is taken for a probability.
    """
    one = np.float32(1)
    for row in range(len(sums)):
        total = sums[row, 0] + base
        winners[row] = total > np.float32(0.5 if positive else 0.0)
        if logistic:
            likelier = one / (one + math.exp(-abs(total)))
            scores[row, 0] = likelier if total <= 0 else one - likelier
            scores[row, 1] = likelier if total >= 0 else one - likelier
        else:
            scores[row, 0] = one - total if positive else -total
            scores[row, 1] = total


@compiled(
    types.void(
        *(written(types.float32, 2), read_only(types.float32), types.boolean, types.boolean),
        written(types.int64),
    )
)
def decide_many(scores: np.ndarray, base: np.ndarray, logistic: bool, softmax: bool, winners: np.ndarray) -> None:
    """The winner among the classes; `scores` [N, classes] are sums before, and what the graph gives after."""
    one = np.float32(1)
    for row in range(len(scores)):
        best = 0
        for column in range(scores.shape[1]):
            scores[row, column] += base[column]
            if scores[row, column] > scores[row, best]:
                best = column
        winners[row] = best
        if logistic:
            for column in range(scores.shape[1]):
                likelier = one / (one + math.exp(-abs(scores[row, column])))
                scores[row, column] = one - likelier if scores[row, column] < 0 else likelier
        elif softmax:
            highest, total = scores[row, best], np.float32(0)
            for column in range(scores.shape[1]):
                scores[row, column] = math.exp(scores[row, column] - highest)
                total += scores[row, column]
            for column in range(scores.shape[1]):
                scores[row, column] /= total
