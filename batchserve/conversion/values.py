"""Parity beyond the sample: for which values of each column the graph answers like its original, and proof of it.

Values that the sample does not have are put into its records, column by column. Where the original raises, the server
must have a row error; where it answers, the answers must be equal. What a column may hold is found first, without any
limit, written into the metadata as `batchserve.domains`, and then proved on the graph with these limits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import onnx

from batchserve.admission.domains import written
from batchserve.conversion.cases import Case, Group, Said, ask_groups, ask_one, cases_of
from batchserve.conversion.categories import Known, known_categories
from batchserve.conversion.check import align, numbers_by_record
from batchserve.conversion.conversion import Conversion, serialize, with_facts
from batchserve.conversion.estimator import Reference
from batchserve.conversion.parity import Answers, flips
from batchserve.conversion.sample import Array, Table
from batchserve.conversion.served import Served, as_polars
from batchserve.domain import Categories, Domain
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.distances import distances
from batchserve.inference.domains import pack

__all__ = ["Unequal", "with_domains"]

Unequal = Literal["refuse", "row-error"]
"""What becomes of values that the graph does not answer like its original: the graph is refused, or they are row
errors."""

_RECORDS = 16
_COLUMNS = 256
"""Of more columns only some are tried, and the others are limited like these."""
_TRIED = 64
_MAX_CATEGORIES = 1_000_000


@dataclass(frozen=True)
class _Column:
    name: str
    table: Table
    nullable: bool
    """False: a missing value cannot be told from another, whatever the answers."""
    known: Known
    unequal: Unequal


@dataclass(frozen=True)
class _Verdict:
    case: Case
    said: Said
    failed: Array
    """bool [records]: row errors of the server."""
    wrong: Array
    """bool [records]: answered, and not as the original does."""
    got: str

    @property
    def is_wrong(self) -> bool:
        """Whether the server makes up an answer."""
        return not bool(self.failed.all()) if self.said.raised is not None else bool(self.wrong.any())

    @property
    def is_answered(self) -> bool:
        return self.said.raised is None and not self.failed.any() and not self.wrong.any()


class _Refused(Exception):
    """A value that the graph does not answer like its original."""

    def __init__(self, verdict: _Verdict) -> None:
        said, case = verdict.said, verdict.case
        original = f"raises ({said.raised})" if said.raised is not None else f"says {_shown(said)}"
        super().__init__(
            f"Beyond the sample they differ: for {case}, the original {original}, and the graph says {verdict.got}. "
            f"{_WAY_OUT}"
        )


def with_domains(
    model: Any,
    conversion: Conversion,
    facts: Mapping[str, Any],
    reference: Reference,
    tolerance: float,
    unequal: Unequal = "refuse",
) -> Conversion:
    """The conversion whose graph says for which values it answers, in the metadata beside these facts.

    Raises ParityFailed, naming the case, where it makes up an answer that no limit of a column prevents.
    """
    trial = _Trial(model, conversion, facts, reference, tolerance, unequal)
    try:
        trial.find()
        trial.prove()
    except _Refused as refused:
        report = replace(conversion.report, passed=False, notes=(*trial.notes, str(refused)))
        raise ParityFailed(str(refused), parity=report.to_json()) from None
    return trial.finished()


class _Trial:
    """One conversion, tried with values that the sample does not have."""

    def __init__(
        self,
        model: Any,
        conversion: Conversion,
        facts: Mapping[str, Any],
        reference: Reference,
        tolerance: float,
        unequal: Unequal,
    ) -> None:
        self._model, self._reference, self._tolerance, self._unequal = model, reference, tolerance, unequal
        self._conversion, self._facts = conversion, dict(facts)
        self._graph = onnx.load_model_from_string(conversion.onnx)
        self._names = [column.name for column in conversion.columns]
        self._inputs = _inputs(self._graph, self._names)
        self._nullable = {column.name: column.dtype != "int64" for column in conversion.columns}
        self._domains = dict.fromkeys(self._names, Domain())
        self.notes = list(conversion.report.notes)
        served = self._served()
        self._table = _records(served, reference, tolerance)
        names = self._names
        few = [names[i] for i in np.linspace(0, len(names) - 1, _TRIED).astype(int)]
        self._tried = names if len(names) <= _COLUMNS else few
        cases = cases_of(reference.table, self._tried)
        self._groups = ask_groups(model, reference.task, self._table, cases)
        self._verdicts = list(self._judged(served))

    def find(self) -> None:
        """What each column may hold, by the answers without any limit. Raises _Refused."""
        known = known_categories(self._model, self._names)
        domains: dict[str, Domain] = {}
        for place, column in enumerate(self._conversion.columns):
            if column.name not in self._tried:
                continue
            # ONNX has no missing text: the sample has shown already where the empty one does not do for it.
            shown = column.dtype == "string" and self._reference.table.without([column.name]).any()
            nullable = column.dtype != "int64" and (column.nullable or not shown)
            about = _Column(column.name, self._reference.table, nullable, known, self._unequal)
            own = [verdict for verdict in self._verdicts if verdict.case.column == self._names[place]]
            domain, self._nullable[column.name], notes = _domain(about, own, partial(self._raises, column.name))
            domains[column.name] = domain
            self.notes += notes
        if len(domains) < len(self._names):
            _spread(self._reference.table, self._names, domains, self._nullable)
        self._domains = domains
        self._facts["finite"] = _finite(self._reference, self._verdicts)
        if self._facts.get("columns") is not None:
            columns = [entry | {"nullable": self._nullable[entry["name"]]} for entry in self._facts["columns"]]
            self._facts["columns"] = columns

    def prove(self) -> None:
        """That the graph with these limits makes up no answer. Raises _Refused."""
        for verdict in self._judged(self._served()):
            if verdict.is_wrong:
                raise _Refused(verdict)

    def finished(self) -> Conversion:
        report = replace(self._conversion.report, notes=tuple(self.notes), values_tried=len(self._verdicts))
        graph = with_facts(self._graph, {**self._facts, "parity": report.to_json()})
        columns = (replace(column, nullable=self._nullable[column.name]) for column in self._conversion.columns)
        return replace(self._conversion, onnx=serialize(graph), report=report, columns=tuple(columns))

    def _served(self) -> Served:
        domains = {
            tensor: [written(self._domains[column], missing=self._nullable[column]) for column in columns]
            for tensor, columns in self._inputs.items()
        }
        self._facts["domains"] = domains
        return Served(serialize(with_facts(self._graph, self._facts)), named=self._reference.table.named)

    def _judged(self, served: Served) -> Iterator[_Verdict]:
        for group in self._groups:
            yield from _judge(served, group, self._reference, len(self._table.frame), self._tolerance)

    def _raises(self, column: str, value: float) -> bool:
        """Whether the original refuses this number."""
        said = ask_one(self._model, self._reference.task, self._table.take(slice(0, 1)), Case(column, "number", value))
        return said.raised is not None


def _inputs(graph: onnx.ModelProto, names: Sequence[str]) -> dict[str, list[str]]:
    """Input of the graph -> its columns."""
    inputs = [tensor.name for tensor in graph.graph.input]
    return {inputs[0]: list(names)} if len(inputs) == 1 else {i: [c] for i, c in zip(inputs, names, strict=True)}


# --- what the server says --------------------------------------------------------------------------------------------


def _records(served: Served, reference: Reference, tolerance: float) -> Table:
    """Some records of the sample that the graph answers like the original. Raises ConversionFailed."""
    rows = np.unique(np.linspace(0, len(reference.rows) - 1, 4 * _RECORDS).astype(int))
    table = reference.table.take(rows)
    labels = None if reference.labels is None else reference.labels[rows]
    said = Said(labels, tuple(array[rows] for array in reference.numbers))
    group = Group((Case("", "number", 0),), (said,), table.frame)
    verdict = next(_judge(served, group, reference, len(table.frame), tolerance))
    good = np.flatnonzero(~verdict.failed & ~verdict.wrong)
    if not len(good):
        raise ConversionFailed(f"A server would answer no record of the sample like the original: {verdict.got}")
    few = max(2, min(_RECORDS, 3000 // len(table.columns)))
    return table.take(good[np.unique(np.linspace(0, len(good) - 1, few).astype(int))])


def _judge(served: Served, group: Group, reference: Reference, records: int, tolerance: float) -> Iterator[_Verdict]:
    scored = served.score(as_polars(group.frame))
    n = len(group.frame)
    answered = np.repeat([said.raised is None for said in group.said], records)
    expected, got = _aligned(group, reference, scored.outputs, n, records)
    nearest = reference.method == "transform"
    wrong = _differ(expected, got, tolerance, nearest) & answered & ~scored.failed
    for place, (case, said) in enumerate(zip(group.cases, group.said, strict=True)):
        rows = slice(place * records, (place + 1) * records)
        if said.tied is not None:
            wrong[rows] &= ~said.tied
        worst = place * records + int(np.argmax(wrong[rows]))
        yield _Verdict(case, said, scored.failed[rows], wrong[rows], _shown_answer(got, worst))


def _aligned(
    group: Group, reference: Reference, outputs: Mapping[str, Array], n: int, records: int
) -> tuple[Answers, Answers]:
    """What both say to all records of a group; where the original raises there are NaN and an empty label."""
    labels = None
    if reference.labels is not None:
        kind = reference.labels.dtype
        labels = np.zeros((n, *reference.labels.shape[1:]), dtype=object if kind.kind in "OUS" else kind)
    numbers = tuple(np.full((n, target.shape[1]), np.nan) for target in reference.numbers)
    for place, said in enumerate(group.said):
        rows = slice(place * records, (place + 1) * records)
        if said.raised is not None:
            continue
        if labels is not None:
            labels[rows] = said.labels
        for target, values in zip(numbers, said.numbers, strict=True):
            target[rows] = values
    full = replace(reference, labels=labels, numbers=numbers)
    ours, blocks = numbers_by_record(outputs, full, n)
    names, expected, got, _ = align(full, blocks)
    return Answers(labels, dict(zip(names, expected, strict=True))), Answers(ours, dict(zip(names, got, strict=True)))


def _differ(expected: Answers, got: Answers, tolerance: float, nearest: bool) -> Array:
    """bool [n]: whether a record has another label, unless the best two are equally good, or another number.

    `nearest`: the numbers are distances, of which the smallest is the best.
    """
    count = len(expected.labels) if expected.labels is not None else len(next(iter(expected.numbers.values())))
    differ = np.zeros(count, dtype=bool)
    tie = np.zeros(count, dtype=bool)
    for name, values in expected.numbers.items():
        differ |= (distances(values, got.numbers[name])[1] > tolerance).any(axis=1)
        if values.shape[1] > 1:
            best = np.sort(-values if nearest else values, axis=1)[:, -2:]
            tie |= best[:, 1] - best[:, 0] <= tolerance
        else:
            tie |= np.abs(values[:, 0]) <= tolerance
            tie |= np.abs(values[:, 0] - 0.5) <= tolerance
    if expected.labels is None or got.labels is None:
        return differ
    return differ | (flips(expected, got) & ~tie)


# --- what a column may hold ------------------------------------------------------------------------------------------


def _domain(
    column: _Column, verdicts: Sequence[_Verdict], raises: Callable[[float], bool]
) -> tuple[Domain, bool, list[str]]:
    """The domain, whether values may be missing, and notes on values that the original answers and the server not."""
    by_sort: dict[str, list[_Verdict]] = {}
    for verdict in verdicts:
        by_sort.setdefault(verdict.case.sort, []).append(verdict)
    notes: list[str] = []

    def takes(sort: str, what: str) -> bool:
        own = by_sort.get(sort, [])
        fine = all(verdict.is_answered for verdict in own)
        if not fine and any(verdict.said.raised is None and verdict.wrong.any() for verdict in own):
            notes.append(f"Column {column.name!r}: the graph does not answer {what} like the original: row errors.")
        return fine

    missing = takes("missing", "missing values") and column.nullable
    domain = Domain(infinite=takes("infinite", "infinite values"), empty=takes("empty", "the empty text"))
    if (categories := _categories(column, by_sort, notes)) is not None:
        return replace(domain, categories=categories, empty=True), missing, notes
    whole = any(verdict.is_wrong for verdict in by_sort.get("fraction", []))
    low, high = _limits(column, by_sort.get("number", []), raises, notes)
    return replace(domain, whole=whole, low=low, high=high), missing, notes


def _categories(column: _Column, by_sort: Mapping[str, list[_Verdict]], notes: list[str]) -> Categories | None:
    """The values that are known, where others are row errors."""
    name, encoded = column.name, column.known.all.get(column.name)
    unseen = by_sort.get("unseen", [])
    if encoded is not None:
        unseen = unseen + by_sort.get("fraction", []) + by_sort.get("number", [])
    if encoded is not None and any(verdict.said.raised is not None for verdict in unseen):
        return _packed(column, column.known.refusing.get(name, encoded))
    wrong = next((verdict for verdict in unseen if verdict.is_wrong), None)
    if wrong is None or (encoded is None and not by_sort.get("unseen")):
        return None
    if column.unequal == "refuse":
        if wrong.case.sort != "unseen":
            return None  # limits may do
        raise _Refused(wrong)
    notes.append(f"Column {name!r}: values that neither the encoder nor the sample knows are row errors.")
    return _packed(column, encoded or sorted(set(column.table.frame[name].dropna().astype(str))))


def _packed(column: _Column, values: Sequence[Any]) -> Categories:
    if len(values) > _MAX_CATEGORIES:
        verdict = f"Column {column.name!r} has {len(values):,} categories, and at most {_MAX_CATEGORIES:,} are kept"
        raise ConversionFailed(f"{verdict}. Use handle_unknown='ignore' or 'use_encoded_value', or encode it yourself.")
    return pack(values)


def _limits(
    column: _Column, verdicts: Sequence[_Verdict], raises: Callable[[float], bool], notes: list[str]
) -> tuple[float | None, float | None]:
    """The least and the largest number that is answered rightly, as far as these end before float32 does."""
    values = np.asarray(column.table.frame[column.name].dropna(), dtype=np.float64) if verdicts else np.zeros(1)
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    least, most = float(values.min()), float(values.max())
    inside = next((v for v in verdicts if least <= v.case.value <= most and v.is_wrong), None)
    if inside is not None:
        raise _Refused(inside)
    limits: list[float | None] = []
    for edge, side in (
        (least, [v for v in reversed(verdicts) if v.case.value < least]),
        (most, [v for v in verdicts if v.case.value > most]),
    ):
        limits.append(_limit(column, edge, most - least, side, raises, notes))
    return limits[0], limits[1]


def _limit(
    column: _Column,
    edge: float,
    span: float,
    side: Sequence[_Verdict],
    raises: Callable[[float], bool],
    notes: list[str],
) -> float | None:
    good = edge
    for verdict in side:
        if not verdict.is_wrong:
            good = float(verdict.case.value)
            continue
        if verdict.said.raised is not None:
            return _last_answered(good, float(verdict.case.value), raises)
        if abs(float(verdict.case.value) - edge) <= max(span, 1.0) and column.unequal == "refuse":
            raise _Refused(verdict)
        notes.append(
            f"Column {column.name!r}: numbers beyond {good:.6g} are row errors, because float32 does not compute them "
            "like the original."
        )
        return good
    return None


def _last_answered(good: float, bad: float, raises: Callable[[float], bool]) -> float:
    """The number next to the first that the original refuses, in float64."""
    for _ in range(80):
        middle = _between(good, bad)
        if middle in (good, bad):
            break
        good, bad = (good, middle) if raises(middle) else (middle, bad)
    return good


def _between(first: float, second: float) -> float:
    """Halfway between two numbers; by their exponents, as long as these differ."""
    small, large = sorted((abs(first), abs(second)))
    if first * second > 0 and large > 4 * small:
        return math.copysign(math.sqrt(small) * math.sqrt(large), first)
    return first / 2 + second / 2


_WAY_OUT = (
    "Where an encoder sees it, handle_unknown='ignore' or 'use_encoded_value' (with a number) converts exactly; with "
    "unequal='row-error' (--unequal row-error) such values become row errors where a limit of the column can tell them."
)


def _spread(table: Table, names: Sequence[str], domains: dict[str, Domain], nullable: dict[str, bool]) -> None:
    """Limits the columns that were not tried like all those that were."""
    tried = list(domains)
    infinite, missing = all(domains[name].infinite for name in tried), all(nullable[name] for name in tried)
    lows = [low for name in tried if (low := domains[name].low) is not None]
    highs = [high for name in tried if (high := domains[name].high) is not None]
    for name in names:
        if name not in domains:
            values = table.frame[name].dropna()
            low = min(max(lows), float(values.min())) if lows else None
            high = max(min(highs), float(values.max())) if highs else None
            domains[name] = Domain(infinite=infinite, whole=all(domains[t].whole for t in tried), low=low, high=high)
            nullable[name] = missing


def _finite(reference: Reference, verdicts: Sequence[_Verdict]) -> bool:
    """Whether the original gives finite numbers for all that is answered."""
    said = [verdict.said.numbers for verdict in verdicts if not verdict.is_wrong and not verdict.failed.any()]
    return all(bool(np.isfinite(array).all()) for numbers in (reference.numbers, *said) for array in numbers)


# --- words -----------------------------------------------------------------------------------------------------------


def _shown(said: Said) -> str:
    labels = None if said.labels is None else said.labels[:1]
    return _shown_answer(Answers(labels, {str(i): target[:1] for i, target in enumerate(said.numbers)}), 0)


def _shown_answer(answers: Answers, row: int) -> str:
    numbers = [np.array2string(values[row], precision=6, threshold=6) for values in answers.numbers.values()]
    label = [] if answers.labels is None else [str(np.atleast_1d(answers.labels[row]).tolist()).strip("[]")]
    return " ".join([*label, *numbers])
