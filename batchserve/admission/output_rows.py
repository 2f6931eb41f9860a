"""Rewrites outputs that do not lie record by record, and finds which of their sizes are free."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from onnx import ModelProto, TensorShapeProto

from batchserve.admission import graph
from batchserve.admission.batching import PARTED, Batching
from batchserve.admission.independence import ALONE, QUANTISED, close, without_half
from batchserve.admission.probe_inputs import Feed
from batchserve.domain import InputTensor, OutputTensor
from batchserve.errors import ModelRefused, OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session

__all__ = ["check_rows", "list_outputs", "mend_outputs", "probe_sizes", "sequence_parts", "with_open_sizes"]


def sequence_parts(model: ModelProto, batching: Batching) -> dict[str, int]:
    """Targets of the outputs that were parts of a sequence."""
    names = next(iter(batching.runs.values()))
    sequences = [output.name for output in model.graph.output if output.type.HasField("sequence_type")]
    return {
        name: int(name.removeprefix(f"{sequence}_"))
        for sequence in sequences
        for name in names
        if name.startswith(f"{sequence}_") and name.removeprefix(f"{sequence}_").isdecimal()
    }


def probe_sizes(
    session: Session, model: ModelProto, feed: Feed, inputs: tuple[InputTensor, ...], batching: Batching
) -> list[Arrays]:
    """Outputs of runs whose sizes may differ: the lengths of some follow the values of a record. Raises OutOfMemory."""
    runs = list(batching.runs.values())
    discrete = any(array.ndim > 1 and array.dtype.kind != "f" for array in runs[0].values())
    some = np.arange(batching.batch if batching.mode == "fixed" else 1)
    others = []
    if batching.one_at_a_time and (_has_free_sizes(inputs) or graph.makers(model, graph.VARYING)):
        others += [feed.take(np.array([record])) for record in range(1, min(PARTED, feed.examples()))]
    if (batching.one_at_a_time or discrete) and (smaller := without_half(feed, inputs)) is not None:
        others.append(smaller.take(some))
    for other in others:
        try:
            runs.append(session.run(other))
        except OutOfMemory:
            raise
        except ScoringFailed:  # a record that this model does not take
            continue
    return runs


def mend_outputs(
    model: ModelProto, inputs: tuple[InputTensor, ...], batching: Batching, sizes: Sequence[Arrays], *, moved: bool
) -> tuple[list[str], dict[str, int]]:
    """Rewrites outputs whose records are not on axis 0. Returns the changes made, and the targets of split outputs.
    `moved`: whether the records were not on the first axis of the inputs either."""
    names = {output.name for output in model.graph.output}
    own = [name for name in next(iter(batching.runs.values())) if name in names]
    if batching.one_at_a_time:
        return _give_to_the_record(model, own, sizes, moved), {}
    if batching.mode == "fixed":
        return _mend_of_fixed(model, own, batching), {}
    return _put_records_first(model, own, batching.runs, _has_free_sizes(inputs), moved)


def check_rows(batching: Batching) -> None:
    """Raises ModelRefused for an output that has not one row for each record."""
    for count, run in batching.runs.items():
        for name, array in run.items():
            if array.ndim == 0 or len(array) != count:
                raise ModelRefused(
                    f"output {name!r} has shape {list(array.shape)} for {count} records: each record needs one row"
                )


def with_open_sizes(
    outputs: tuple[OutputTensor, ...], model: ModelProto, inputs: tuple[InputTensor, ...], sizes: Sequence[Arrays]
) -> tuple[OutputTensor, ...]:
    """The outputs without the sizes that came of the probe's guess or of the values of its records."""
    free = _has_free_sizes(inputs)
    lists = list_outputs(model, sizes)

    def opened(output: OutputTensor) -> OutputTensor:
        if output.labels or len(output.shape) == 1:
            return output
        declared = _declared_sizes(model, output.name, len(output.shape))
        shape = (
            None if axis in lists.get(output.name, ()) or (free and known != size) else size
            for axis, (size, known) in enumerate(zip(output.shape[1:], declared[1:], strict=True), start=1)
        )
        return replace(output, shape=(None, *shape))

    return tuple(map(opened, outputs))


def list_outputs(model: ModelProto, sizes: Sequence[Arrays]) -> dict[str, tuple[int, ...]]:
    """Outputs that are a list for each record, as long as its values or its size make it: name -> the axes of it."""
    varying = graph.makers(model, graph.VARYING)
    lists: dict[str, tuple[int, ...]] = {}
    for name, array in sizes[0].items():
        symbols = [size.dim_param for size in graph.declared_axes(model, name)]
        lengths = [{run[name].shape[axis] for run in sizes if run[name].ndim > axis} for axis in range(array.ndim)]
        lists[name] = tuple(
            axis
            for axis in range(1, array.ndim)
            if 0 in lengths[axis]
            or len(lengths[axis]) > 1
            or (name in varying and len(symbols) == array.ndim and symbols[axis])
        )
    return {name: axes for name, axes in lists.items() if axes}


# --- one record at a time --------------------------------------------------------------------------------------------


def _give_to_the_record(model: ModelProto, names: list[str], sizes: Sequence[Arrays], moved: bool) -> list[str]:
    """Makes each output the one row of the one record, whatever its axes and lengths are."""
    varying = graph.makers(model, graph.VARYING)
    inputs = {size.dim_param for entry in model.graph.input for size in entry.type.tensor_type.shape.dim}
    done: list[str] = []
    for name in names:
        arrays = [run[name] for run in sizes if name in run]
        first = next(iter(graph.declared_axes(model, name)), None)
        # Found once in each of these records, as the symbol of its axis says: it may be found twice in another.
        counted = name in varying and first is not None and bool(first.dim_param) and first.dim_param not in inputs
        if all(array.ndim and len(array) == 1 for array in arrays) and not counted:
            continue
        ones = [at for at in range(arrays[0].ndim) if all(array.shape[at] == 1 for array in arrays)]
        if moved and len(ones) == 1:
            done.append(_moved(model, name, ones[0], arrays[0].ndim))
            continue
        graph.unsqueeze_output(model, name, arrays[0].ndim)
        done.append(f"Output {name!r} belongs to the one record of a run, whatever its length.")
    return done


# --- records on another axis -----------------------------------------------------------------------------------------


def _mend_of_fixed(model: ModelProto, names: list[str], batching: Batching) -> list[str]:
    """Of a run of several records: puts the only axis first that is as long, and takes away single values about all of
    them, if there are other outputs."""
    done: list[str] = []
    kept = len(names)
    for name in names:
        array = batching.runs[batching.batch][name]
        places = [place for place, size in enumerate(array.shape) if size == batching.batch]
        if len(places) == 1 and places[0]:
            done.append(_moved(model, name, places[0], array.ndim))
        elif array.size == 1 and kept > 1:
            done.append(_left_out(model, name))
            kept -= 1
    return done


def _put_records_first(
    model: ModelProto, names: list[str], runs: dict[int, Arrays], free: bool, moved: bool
) -> tuple[list[str], dict[str, int]]:
    """scikit-learn's converters give [1, N] (discriminant analysis), [N * targets, 1] (networks) and
    [targets, N, classes] (forests with several targets)."""
    done: list[str] = []
    groups: dict[str, int] = {}
    kept = len(names)
    for name in names:
        arrays = {count: run[name] for count, run in runs.items()}
        if all(array.ndim and len(array) == count for count, array in arrays.items()):
            continue
        across = all(array.ndim > 1 and array.shape[1] == count for count, array in arrays.items())
        tall = arrays[1].size and all(array.size == count * arrays[1].size for count, array in arrays.items())
        place = _place_of_records(arrays, graph.declared_axes(model, name), free, moved)
        if place is not None:
            done.append(_moved(model, name, place, arrays[1].ndim))
        elif across and len(arrays[1]) > 1 and len(arrays[1]) == len(arrays[2]):
            parts = graph.split_output(model, name, len(arrays[1]))
            groups |= {part: index for index, part in enumerate(parts)}
            done.append(f"Output {name!r} has its records on axis 1 and was split into {len(parts)}.")
        elif tall and ((across and len(arrays[3]) == 1) or _in_order(arrays)):
            width = arrays[1].size
            graph.reshape_output(model, name, [-1] if width == 1 else [-1, width])
            done.append(f"Output {name!r} was reshaped to one row for each record.")
        elif len({array.shape for array in arrays.values()}) == 1 and kept > 1:
            done.append(_left_out(model, name))
            kept -= 1
    return done, groups


def _place_of_records(
    arrays: dict[int, np.ndarray], declared: Sequence[TensorShapeProto.Dimension], free: bool, moved: bool
) -> int | None:
    """The only axis that is as long as there are records, unless what lies before it is to be split into so many
    outputs. `free`: whether the model has inputs of any size, so that their number may differ."""
    ranks = {array.ndim for array in arrays.values()}
    places = [at for at in range(min(ranks)) if all(array.shape[at] == count for count, array in arrays.items())]
    if len(ranks) > 1 or len(places) != 1 or arrays[1].size <= 1:
        return None
    fixed = [size.dim_value > 0 for at, size in enumerate(declared) if at != places[0]]
    counted = len(declared) == min(ranks) and all(fixed)
    if places[0] > 1:
        return places[0]
    return places[0] if (free and not counted) or (moved and len(arrays[1]) > 1) else None


def _moved(model: ModelProto, name: str, axis: int, rank: int) -> str:
    graph.move_output(model, name, axis, rank)
    return f"Output {name!r} of the graph has its records on axis {axis}; here they come first."


def _left_out(model: ModelProto, name: str) -> str:
    graph.drop_output(model, name)
    return f"Output {name!r} is not per record and was dropped."


def _in_order(arrays: dict[int, np.ndarray]) -> bool:
    """Whether the values for one record come first among those for three."""
    width = arrays[1].size
    return close(arrays[1].reshape(-1), arrays[3].reshape(-1)[:width], ALONE, QUANTISED)


# --- sizes -----------------------------------------------------------------------------------------------------------


def _has_free_sizes(inputs: tuple[InputTensor, ...]) -> bool:
    return any(None in tensor.shape[1:] for tensor in inputs)


def _declared_sizes(model: ModelProto, name: str, rank: int) -> list[int | None]:
    """The declared size of each axis of an output; None where it is free or unknown."""
    declared = [size.dim_value or None for size in graph.declared_axes(model, name)]
    return [*declared, *[None] * rank][:rank]
