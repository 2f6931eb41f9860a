"""The inputs of one job are compared by their beginnings, before anything is scored."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import polars as pl

from batchserve.domain import ModelVersion, Options
from batchserve.errors import InvalidInput, SchemaMismatch, UnlikeInputs
from batchserve.formats.protocol import FilesReader, Header, Outline
from batchserve.inference.matching import Match, match_input, require_folders, with_names
from batchserve.scoring.blank import is_blank
from batchserve.scoring.faults import by_name, of_input
from batchserve.scoring.inputs import Input, header_of
from batchserve.scoring.passing import Kinds, Seen, common_kinds, seen_in
from batchserve.storage.locations import is_file

_AT_ONCE = 8
"""Beginnings that are read at a time: in an object store each is a request."""
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class CompareTask:
    inputs: tuple[Input, ...]
    model: ModelVersion
    options: Options


@dataclass(frozen=True)  # without slots: see `Chunk`
class Compared:
    """What a comparison has found about the inputs of a job."""

    records: tuple[int | None, ...] = ()
    """Of each input that surely has the layout of the first, in formats that outline themselves; None for the
    others."""
    kinds: Kinds = field(default_factory=dict)
    """The types of the columns that pass through to the one result of all."""


@dataclass(frozen=True, slots=True)
class _Found:
    """The same about one input, and what of it is unlike the first."""

    records: int | None = None
    seen: Mapping[str, Seen] = field(default_factory=dict)
    faults: Sequence[str] = ()


@by_name
def compare_inputs(task: CompareTask) -> Compared:
    """Raises UnlikeInputs, which names each input that lacks a column, or has another type in it, that the model or the
    result takes from the first one; and each that the model does not fit.
    """
    first = match_named(task.inputs[0], task.model, task.options)
    like = outline_of(task.inputs[0])
    compare = partial(_compared, task, first, b"" if like is None else like.layout)
    if is_file(task.inputs[0].key):
        found = list(map(compare, task.inputs[1:]))
    else:
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            found = list(threads.map(compare, task.inputs[1:]))
    names = () if task.options.is_per_input else first.own_types(task.inputs[0].reader.family)
    seen = [seen_in(first.header, names), *(one.seen for one in found)]
    kinds, faults = common_kinds(zip((one.key for one in task.inputs), seen, strict=True))
    told = [
        (one, one_found.faults or faults.get(one.key, ()))
        for one, one_found in zip(task.inputs[1:], found, strict=True)
    ]
    unlike = [(one, what) for one, what in told if what]
    if unlike:
        shown = "; ".join(f"{one.key} {', '.join(what)}" for one, what in islice(unlike, 3))
        more = f"; and {len(unlike) - 3} more" if len(unlike) > 3 else ""
        raise UnlikeInputs(
            f"{len(unlike)} of {len(task.inputs)} inputs are unlike the first, {task.inputs[0].key}: {shown}{more}",
            errors=[{"input": one.key, "message": ", ".join(what)} for one, what in unlike[:_SHOWN]],
        )
    column = None if task.options.target is None else task.options.target.partition_by
    if column is not None and column in kinds:
        require_folders(column, kinds[column])
    own = None if like is None else like.records
    return Compared((own, *(one.records for one in found)), kinds)


def outline_of(input: Input, like: bytes = b"") -> Outline | None:
    """None in a format that does not outline its files."""
    format = input.reader
    if not isinstance(format, FilesReader):
        return None
    with input.open() as source:
        return format.outline(source, like)


def match_named(input: Input, model: ModelVersion, options: Options) -> Match:
    """Raises SchemaMismatch and InvalidInput, which name the input."""
    with of_input(input):
        return match_input(header_of(replace(input, dialect=with_names(input.dialect, model, options))), model, options)


def _compared(task: CompareTask, first: Match, layout: bytes, input: Input) -> _Found:
    try:
        outline = outline_of(input, layout)
    except InvalidInput as error:
        return _Found(faults=[f"does not fit: {error.detail}"])
    if outline is not None and outline.layout == layout:
        return _Found(outline.records)
    return _differences(task, first, input)


def _differences(task: CompareTask, first: Match, input: Input) -> _Found:
    faults: list[str] = []
    try:
        own = header_of(replace(input, dialect=with_names(input.dialect, task.model, task.options)))
        if not _is_same(own, first.header):
            match = match_input(own, task.model, task.options)
            if task.options.is_per_input:
                match.require_writable()
            else:
                faults += unlike(first, match)
    except (SchemaMismatch, InvalidInput) as error:
        return _Found() if is_blank(input) else _Found(faults=[f"does not fit: {error.detail}"])
    if task.options.is_per_input:
        return _Found()
    return _Found(None, seen_in(own, first.own_types(input.reader.family)), faults)


def _is_same(own: Header, first: Header) -> bool:
    """Whether two beginnings surely are alike, without a match."""
    return own.columns == first.columns and list(own.columns) == list(first.columns) and _arrays(own) == _arrays(first)


def _arrays(header: Header) -> Mapping[str, Any]:
    return {name: (array.dtype, array.shape[1:]) for name, array in header.arrays.items()}


def unlike(first: Match, own: Match) -> Iterator[str]:
    """What of the columns that pass through to the result differs between two inputs."""
    lacking, extra = _without(first.passed, own.passed), _without(own.passed, first.passed)
    if lacking:
        yield f"lacks {', '.join(map(repr, lacking))}"
    if extra:
        yield f"has {', '.join(map(repr, extra))}, too"
    for name in own.passed:
        if name not in extra and (fault := _unlike_type(first, own, name)):
            yield fault


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]


def _unlike_type(first: Match, own: Match, name: str) -> str | None:
    """None for columns without types, and for one that is empty in one of the inputs."""
    if own.header.arrays:
        known, found = _arrays(first.header)[name], _arrays(own.header)[name]
        shown = f"has {found[0]} {list(found[1])} in {name!r} instead of {known[0]} {list(known[1])}"
        return None if known == found else shown
    before, after = first.header.columns[name], own.header.columns[name]
    if before == after or None in (before, after) or pl.Null() in (before, after):
        return None
    return f"has {after} in {name!r} instead of {before}"
