"""The nodes of a tree ensemble, checked, and as arrays that `traversal` wants.

Splits by sets of categories come as rows of equalities that share one way; each becomes one test of a bit.
"""

from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto

__all__ = ["Attributes", "Forest", "Members", "Unknown", "beside", "read_forest", "require"]

_IDS_PER_NODE = 4
"""Numbers of nodes may have gaps, as long as a table of them is at most this many times as long as the nodes."""
_MOST_BITS = 2**28
"""Of the sets of all splits together: 32 MB."""
_CODED = 2**23
"""A category is this number and its code: in float32 its lowest bits are those of the code."""


@dataclass(frozen=True, slots=True)
class Members:
    """The splits by sets of categories."""

    codes: dict[int, np.ndarray]
    """Feature -> its categories in float32, ascending; the place of one is its code. Then come one code for any other
    number, and one for NaN."""
    nodes: np.ndarray
    """uint32, two words for each node: where its bits begin, and which bits of a value are its code: none where the
    split is by a threshold, and the bit is 0."""
    bits: np.ndarray
    """uint32: for each code of the feature of a node whether it goes to the true child."""

    def coded(self, rows: np.ndarray) -> np.ndarray:
        """A copy in which categories are coded as `nodes` wants them."""
        rows = rows.copy()
        for feature, values in self.codes.items():
            column = rows[:, feature]
            places = np.searchsorted(values, column)
            known = values[np.minimum(places, len(values) - 1)] == column
            rows[:, feature] = _CODED + np.where(known, places, len(values) + np.isnan(column))
        return rows


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees as `traversal.traverse` wants them, which also says what the arrays hold."""

    words: np.ndarray
    feature_bits: int
    roots: np.ndarray
    depths: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    weights: np.ndarray
    members: Members | None
    """None: all splits are by thresholds."""

    @property
    def splits(self) -> tuple[np.ndarray, np.ndarray]:
        """Feature and threshold of every inner node with one."""
        links, thresholds = self.words[1::2], self.words[0::2].view(np.float32)
        roots = self.roots.astype(np.int64)
        position = np.arange(len(links)) - np.repeat(roots, np.diff(roots, append=len(links)))
        inner = (links >> np.uint32(self.feature_bits + 1) != position) & ~np.isnan(thresholds)
        features = links & np.uint32((1 << self.feature_bits) - 1)
        return features[inner].astype(np.int64), thresholds[inner]


class Unknown(Exception):
    """The graph is not exactly known to this kernel."""


def require(known: object) -> None:
    if not known:
        raise Unknown


@dataclass(frozen=True, slots=True)
class Attributes:
    """The attributes of a node as arrays; missing ones are empty."""

    found: dict[str, AttributeProto]

    def ints(self, name: str) -> np.ndarray:
        values = self.found[name].ints if name in self.found else ()
        return np.fromiter(values, np.int64, len(values))

    def floats(self, name: str) -> np.ndarray:
        values = self.found[name].floats if name in self.found else ()
        array = np.fromiter(values, np.float32, len(values))
        require(not np.isnan(array).any())
        return array

    def strings(self, name: str) -> list[bytes]:
        return list(self.found[name].strings) if name in self.found else []

    def text(self, name: str, default: str) -> str:
        return self.found[name].s.decode(errors="replace") if name in self.found else default


def beside(values: np.ndarray, towards: np.ndarray | np.float32) -> np.ndarray:
    """The numbers next to these."""
    with np.errstate(over="ignore"):  # next to the largest number lies infinity
        numbers: np.ndarray = np.nextafter(values, towards)
    return numbers


@dataclass(slots=True)
class _Nodes:
    """The nodes of the graph, each with the positions of its children (0 for leaves)."""

    leaf: np.ndarray
    less: np.ndarray
    equal: np.ndarray
    features: np.ndarray
    thresholds: np.ndarray
    missing: np.ndarray
    true: np.ndarray
    false: np.ndarray

    def take(self, kept: np.ndarray) -> None:
        """Only these nodes, of whose children none may be left out."""
        places = np.cumsum(kept) - 1
        for children in (self.true, self.false):
            require(kept[children[kept & ~self.leaf]].all())
            children[~self.leaf] = places[children[~self.leaf]]
        for name in self.__slots__:
            setattr(self, name, getattr(self, name)[kept])


def read_forest(attributes: Attributes, kind: str, values: np.ndarray, width: int, columns: int) -> Forest:
    """The forest of these attributes. Raises Unknown where anything about it is not as the kernel knows it."""
    numbers, nodes = _read_nodes(attributes, columns)
    leaves = numbers.find(attributes.ints(f"{kind}_treeids"), attributes.ints(f"{kind}_nodeids"))
    ids = attributes.ints(f"{kind}_ids")
    require(len(leaves) == len(ids) == len(values) and np.isfinite(values).all())
    require(nodes.leaf[leaves].all() and (ids >= 0).all() and (ids < width).all())
    chains = _Chains(nodes) if nodes.equal.any() else None
    starts, rank = numbers.starts, numbers.rank
    if chains:
        kept = chains.first
        require(kept[starts].all())
        nodes.false = np.where(nodes.leaf, 0, nodes.false[chains.last])
        nodes.take(kept)
        places = np.cumsum(kept) - 1
        starts, rank, leaves = places[starts], rank[kept], places[leaves]
    order, depths = _breadth_first(starts, rank, nodes)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))

    leaf, count = nodes.leaf, len(order)
    feature_bits = int(nodes.features[~leaf].max(initial=0)).bit_length()
    children = place[np.where(leaf, np.arange(count), nodes.true)] - starts[rank]
    require(int(children.max()) < 1 << (31 - feature_bits))
    # x < t is x <= the number before t; no number is at most NaN.
    thresholds = np.where(nodes.less, beside(nodes.thresholds, np.float32(-np.inf)), nodes.thresholds)
    thresholds = np.where(leaf, np.float32(np.inf), np.where(nodes.equal, np.float32(np.nan), thresholds))
    words = np.empty((count, 2), np.uint32)
    words[:, 0] = thresholds.astype(np.float32)[order].view(np.uint32)
    missing = (leaf | nodes.missing & ~nodes.equal).astype(np.int64)
    links = np.where(leaf, 0, nodes.features) | missing << feature_bits | children << (feature_bits + 1)
    words[:, 1] = links[order]
    targets, answers, weights = _answers(rank, leaf, leaves, ids, values, width)
    return Forest(
        words=words.reshape(-1),
        feature_bits=feature_bits,
        roots=starts.astype(np.uint64),
        depths=depths,
        targets=targets,
        answers=answers[order],
        weights=weights,
        members=chains.members(nodes, order) if chains else None,
    )


def _read_nodes(attributes: Attributes, columns: int) -> "tuple[_Numbers, _Nodes]":
    modes = np.fromiter(attributes.strings("nodes_modes"), "S12")
    features, thresholds = attributes.ints("nodes_featureids"), attributes.floats("nodes_values")
    missing = attributes.ints("nodes_missing_value_tracks_true")
    leaf, less, equal = modes == b"LEAF", modes == b"BRANCH_LT", modes == b"BRANCH_EQ"
    count = len(modes)
    require(count and (leaf | less | equal | (modes == b"BRANCH_LEQ")).all())
    require(len(features) == len(thresholds) == count and len(missing) in (0, count))
    require((features[~leaf] >= 0).all() and (features[~leaf] < columns).all())
    require(not np.isneginf(thresholds[less]).any())
    numbers = _Numbers(attributes.ints("nodes_treeids"), attributes.ints("nodes_nodeids"), count)
    true, false = numbers.children(attributes, ~leaf)
    routed = missing == 1 if len(missing) else np.zeros(count, bool)
    return numbers, _Nodes(leaf, less, equal, features, thresholds, routed, true, false)


class _Chains:
    """Equalities one behind the other, with one way where any of them holds: the tests for the members of a set."""

    def __init__(self, nodes: _Nodes) -> None:
        count = len(nodes.leaf)
        everything, following = np.arange(count), nodes.false
        linked = nodes.equal & nodes.equal[following] & (following != everything)
        for part in (nodes.features, nodes.true, nodes.missing):
            linked &= part == part[following]
        heads = np.flatnonzero(linked)
        tails = following[heads]
        require(len(np.unique(tails)) == len(tails))  # or two chains share their end
        before, self.last = everything.copy(), everything.copy()
        before[tails], self.last[heads] = heads, tails
        for _ in range(count.bit_length()):
            before, self.last = before[before], self.last[self.last]
        self.first = np.ones(count, bool)
        self.first[tails] = False
        require(self.first[before].all())  # or a chain ends in itself
        self._equal = np.flatnonzero(nodes.equal)
        self._heads = before[self._equal]
        self._features, self._values = nodes.features[self._equal], nodes.thresholds[self._equal]

    def members(self, nodes: _Nodes, order: np.ndarray) -> Members:
        """The sets; `nodes` are without the equalities behind the first of each chain."""
        codes = {int(name): np.unique(self._values[self._features == name]) for name in np.unique(self._features)}
        require(not np.isin(nodes.features[~nodes.leaf & ~nodes.equal], list(codes)).any())
        require(max(map(len, codes.values())) < _CODED - 2)
        places = np.cumsum(self.first) - 1
        sets = np.flatnonzero(nodes.equal)
        known = np.array([len(codes[feature]) for feature in nodes.features[sets].tolist()])
        starts = np.zeros(len(nodes.leaf), np.int64)
        starts[sets] = 1 + np.cumsum(known + 2) - (known + 2)  # the bit before all is that of the thresholds
        total = 1 + int((known + 2).sum())
        require(total <= _MOST_BITS)
        through = [starts[sets[nodes.missing[sets]]] + known[nodes.missing[sets]] + 1]
        for feature, values in codes.items():
            here = self._features == feature
            through.append(starts[places[self._heads[here]]] + np.searchsorted(values, self._values[here]))
        bits = np.zeros(total // 32 + 1, np.uint32)
        found = np.concatenate(through)
        np.bitwise_or.at(bits, found >> 5, np.uint32(1) << (found & 31).astype(np.uint32))
        words = np.stack([starts, np.where(nodes.equal, _CODED - 1, 0)], axis=1).astype(np.uint32)
        return Members(codes, words[order].reshape(-1), bits)


class _Numbers:
    """Finds nodes by the numbers of tree and node. The nodes of a tree stand together, its root first."""

    def __init__(self, trees: np.ndarray, nodes: np.ndarray, count: int) -> None:
        require(len(trees) == len(nodes) == count)
        first = np.append(True, trees[1:] != trees[:-1])
        self.starts = np.flatnonzero(first)
        self.rank = np.cumsum(first) - 1
        """The tree of each node, in order."""
        self._sorted = np.argsort(trees[self.starts])
        self._trees = trees[self.starts][self._sorted]
        require((np.diff(self._trees) > 0).all() and (nodes >= 0).all())
        self._sizes = np.maximum.reduceat(nodes, self.starts) + 1
        require((self._sizes <= _IDS_PER_NODE * count).all() and self._sizes.sum() <= _IDS_PER_NODE * count)
        self._offsets = np.cumsum(self._sizes) - self._sizes
        self._table = np.full(int(self._sizes.sum()), -1, np.int64)
        self._table[self._offsets[self.rank] + nodes] = np.arange(count)
        require((self._table >= 0).sum() == count)

    def find(self, trees: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Positions of these nodes."""
        require(len(trees) == len(nodes))
        nearest = np.minimum(np.searchsorted(self._trees, trees), len(self._trees) - 1)
        require((self._trees[nearest] == trees).all())
        return self._within(self._sorted[nearest], nodes)

    def children(self, attributes: Attributes, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the true and the false child of each node; 0 for leaves."""
        both = []
        for name in ("nodes_truenodeids", "nodes_falsenodeids"):
            nodes = attributes.ints(name)
            require(len(nodes) == len(inner))
            places = np.zeros(len(inner), np.int64)
            places[inner] = self._within(self.rank[inner], nodes[inner])
            both.append(places)
        return both[0], both[1]

    def _within(self, rank: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        require((nodes >= 0).all() and (nodes < self._sizes[rank]).all())
        places: np.ndarray = self._table[self._offsets[rank] + nodes]
        require((places >= 0).all())
        return places


def _breadth_first(starts: np.ndarray, rank: np.ndarray, nodes: _Nodes) -> tuple[np.ndarray, np.ndarray]:
    """The nodes tree by tree and level by level, a false child behind its true one; and the depth of each tree."""
    inner = ~nodes.leaf
    depths = np.zeros(len(starts), np.int64)
    levels, seen = [starts], len(starts)
    while True:
        parents = levels[-1][inner[levels[-1]]]
        if not len(parents):
            break
        levels.append(np.stack([nodes.true[parents], nodes.false[parents]], axis=1).reshape(-1))
        depths[rank[parents]] += 1
        seen += len(levels[-1])
        require(seen <= len(inner))  # or a node has two parents, and may be its own ancestor
    everything = np.concatenate(levels)
    require(seen == len(inner) and (np.bincount(everything, minlength=seen) == 1).all())
    return everything[np.argsort(rank[everything], kind="stable")], depths


def _answers(
    rank: np.ndarray, leaf: np.ndarray, leaves: np.ndarray, ids: np.ndarray, values: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`targets`, `answers` and `weights` of a Forest; the answers still in the order of the graph."""
    answers = np.zeros(len(leaf), np.uint32)
    targets = np.zeros(int(rank[-1]) + 1, np.uint64)
    each = np.bincount(leaves, minlength=len(leaf))[leaf]
    if (each == 1).all():
        targets[rank[leaves]] = ids
        require((targets[rank[leaves]] == ids).all())
        answers[leaves] = values.view(np.uint32)
        return targets, answers, np.zeros((0, width), np.float32)
    require(width > 1 and (each == width).all())
    answers[leaf] = np.arange(leaf.sum())
    weights = np.full((int(leaf.sum()), width), np.nan, np.float32)
    weights[answers[leaves], ids] = values
    require(not np.isnan(weights).any())  # or a leaf has two weights for one target
    return targets, answers, weights
