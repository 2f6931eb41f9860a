"""Finds the axis of the records in each input by the names of its axes and by what reads it, and puts it first."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, ValueInfoProto

from batchserve.admission import graph
from batchserve.errors import ModelRefused

__all__ = ["RecordAxis", "find_record_axes", "has_named_records", "put_records_first"]

_STEPS = re.compile(r"(^|_)(t|s|l|seq|seqlen|time|steps?|len|length|frames?|tokens?)(_|\d|$)|sequence|timestep|seq_")
"""Names of axes along which one record goes on."""
_LETTERS = re.compile(r"n|b|bs|bsz|records?|examples?")
"""Names of record axes that may mean something else: N is the number of points, too."""
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_BATCHED = (0, 5, 6)
"""Inputs of these operators, records and states: with layout 0 all have the records on axis 1."""
_PLAIN = frozenset({"Cast", "Identity"})


@dataclass(frozen=True, slots=True)
class RecordAxis:
    """Where an input has its records, and how that is known."""

    input: str
    axis: int
    reason: str
    """The name of the axis, or the operator that reads it."""
    sure: bool
    """False: the axis must prove to be one of records."""


def find_record_axes(model: ModelProto, described: Collection[str]) -> list[RecordAxis]:
    """The inputs that have their records on another axis than the first, but for the `described` ones: metadata says
    what their axes are. Raises ModelRefused for an input that has none beside others that have one."""
    entries = [entry for entry in graph.inputs(model) if entry.name not in described]
    own = {entry.name: found for entry in entries if (found := _by_name(entry)) is not None}
    symbols = {_axes(entry)[own[entry.name].axis] for entry in entries if entry.name in own}
    for entry in entries:
        if entry.name in own:
            continue
        linked = [place for place, symbol in enumerate(_axes(entry)) if symbol in symbols]
        if linked:
            symbol = _axes(entry)[linked[0]]
            own[entry.name] = RecordAxis(entry.name, linked[0], symbol, sure=_is_batch(symbol))
    _require_records(entries, own)
    if not own:
        readers = (*_by_output(model, entries), *_by_reader(model, entries))
        own = {found.input: found for found in readers}
    return [found for found in own.values() if found.axis]


def put_records_first(model: ModelProto, axes: Collection[RecordAxis]) -> list[str]:
    """Changes the graph so that the first axis of its inputs is that of the records, and says so."""
    notes = []
    for found in axes:
        graph.move_input(model, found.input, found.axis)
        notes.append(
            f"Input {found.input!r} of the graph has its records on axis {found.axis} ({found.reason}). Here they come "
            "first, as in every file; the graph was changed to take them so."
        )
    return notes


def has_named_records(model: ModelProto) -> bool:
    """Whether the first axis of all inputs is surely that of records by its name."""
    return all(axes and _is_batch(axes[0]) for axes in map(_axes, graph.inputs(model)))


def _by_name(entry: ValueInfoProto) -> RecordAxis | None:
    symbols = _axes(entry)
    if not symbols:
        return None
    batches = [place for place, symbol in enumerate(symbols) if _is_batch(symbol)]
    if batches:
        return RecordAxis(entry.name, batches[0], symbols[batches[0]], sure=True)
    letters = [place for place, symbol in enumerate(symbols) if _LETTERS.fullmatch(symbol.lower())]
    if not letters:
        return None
    place, first = letters[0], entry.type.tensor_type.shape.dim[0]
    steps = _is_steps(symbols[0])
    # Of a matrix [rows, N] and of points [1, N, 3], N is what one record has.
    if place and not steps and (first.dim_value == 1 or (len(symbols) < 3 and not first.dim_value)):
        return None
    return RecordAxis(entry.name, place, symbols[place], sure=steps or not place)


def _is_batch(symbol: str) -> bool:
    return symbol.isidentifier() and "batch" in symbol.lower() and not _is_steps(symbol)


def _is_steps(symbol: str) -> bool:
    return bool(_STEPS.search(symbol.lower()))


def _require_records(entries: list[ValueInfoProto], own: dict[str, RecordAxis]) -> None:
    """Raises ModelRefused for an input whose first axis is, in an input with records, another one."""
    others = {
        symbol: found
        for entry in entries
        if (found := own.get(entry.name)) is not None
        for place, symbol in enumerate(_axes(entry))
        if symbol and place != found.axis
    }
    for entry in entries:
        symbols = _axes(entry)
        if entry.name in own or not symbols or symbols[0] not in others:
            continue
        beside = others[symbols[0]]
        raise ModelRefused(
            f"input {entry.name!r} has no axis of records: its first one, {symbols[0]!r}, is what each record of input "
            f"{beside.input!r} has along it, and records are on axis {beside.axis} there ({beside.reason}). Export the "
            f"model with an axis {beside.reason!r} in {entry.name!r}, or with this input as a constant of the graph"
        )


def _by_output(model: ModelProto, entries: list[ValueInfoProto]) -> Iterator[RecordAxis]:
    """Inputs without names of axes, where an output names its axis of records."""
    named = [(place, symbol) for output in model.graph.output for place, symbol in enumerate(_axes(output))]
    place, symbol = next(((place, symbol) for place, symbol in named if _is_batch(symbol)), (0, ""))
    for entry in entries if place else ():
        sizes = entry.type.tensor_type.shape.dim
        if len(sizes) > place and not sizes[place].dim_value and not any(_axes(entry)):
            yield RecordAxis(entry.name, place, f"{symbol} of an output", sure=False)


def _by_reader(model: ModelProto, entries: list[ValueInfoProto]) -> Iterator[RecordAxis]:
    """Inputs of a fixed number of steps that a recurrent operator reads, and the states that it reads beside them."""
    sources: dict[str, str] = {}
    found: dict[str, str] = {}
    shapes = {entry.name: entry.type.tensor_type.shape.dim for entry in entries}
    for node in model.graph.node:
        if node.op_type in _PLAIN and node.input:
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
        if node.op_type not in _RECURRENT or _layout(node):
            continue
        read = {place: sources.get(name, name) for place, name in enumerate(node.input) if place in _BATCHED and name}
        steps = shapes.get(read.get(0, ""))
        if steps is not None and len(steps) == 3 and steps[0].dim_value > 1:
            found |= {name: node.op_type for name in read.values() if len(shapes.get(name, ())) == 3}
    for name, operator in found.items():
        yield RecordAxis(name, 1, operator, sure=True)


def _layout(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "layout"), 0)


def _axes(entry: ValueInfoProto) -> list[str]:
    """The names of the axes of an input or output; "" for one without."""
    return [size.dim_param for size in entry.type.tensor_type.shape.dim]
