"""Runs a model over many records: in batches of equal size, isolating records that make it fail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from batchserve.allowance import allowance, out_of_memory
from batchserve.domain import RowError, Signature
from batchserve.errors import OutOfMemory, ScoringFailed
from batchserve.formats.protocol import Tensors
from batchserve.formats.schema import numpy_type
from batchserve.inference.inputs import Batchwise, Inputs
from batchserve.inference.kernels import Session
from batchserve.inference.outputs import check_count

__all__ = ["BATCH_BYTES", "VARIES", "RunResult", "run", "varies"]

VARIES = "The last digits of a result may depend on the other records that are scored in one run."
"""The note of a signature of which that is true."""

BATCH_BYTES = 64 * 2**20
"""Most bytes of a batch's inputs, unless one record has more; where the size of records is free."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outputs of a model for every record. A record on which it failed has a row of zeros and is in `errors`."""

    outputs: Tensors
    errors: list[RowError]
    seconds: float
    """Time in the model, without decoding and preparing its inputs."""


@dataclass(slots=True)
class _Batch:
    """Records `start` to `stop` in run order, and their inputs once built."""

    start: int
    stop: int
    inputs: Tensors | None = None


def varies(signature: Signature) -> bool:
    """Whether the answer of a record may depend on the others of its run: then records of several inputs do not go in
    one."""
    return VARIES in signature.notes


def run(
    session: Session,
    signature: Signature,
    inputs: Inputs,
    records: int,
    make_room: Callable[[], bool] = lambda: False,
    failed: np.ndarray | None = None,
) -> RunResult:
    """Runs the model over all records, batch by batch; a batch that fails is bisected to name its bad records.

    Records of different sizes are grouped for it; outputs return in the order of the records. `make_room` is called
    when memory is short, and returns whether it freed any. A model that must see all records gets none that `failed`
    already: their harmless values would change the results of the others. Raises ScoringFailed when it fails.
    """
    order, pending = _plan(signature, inputs, records, failed)
    pending.reverse()
    errors: list[RowError] = []
    blocks: list[Tensors] = []
    seconds = 0.0
    while pending:
        batch = pending.pop()
        started = perf_counter()
        try:
            if batch.inputs is None:
                rows = slice(batch.start, batch.stop)
                batch.inputs = _take(signature, inputs, rows if order is None else order[rows])
                started = perf_counter()
            outputs = _run_batch(session, signature, batch.inputs, batch.stop - batch.start)
        except ScoringFailed as failure:
            if signature.mode == "whole":
                raise
            if isinstance(failure, OutOfMemory) and make_room():
                pending.append(batch)  # other models held the memory, not this record
            elif batch.stop - batch.start == 1:
                record = batch.start if order is None else int(order[batch.start])
                errors.append(RowError(record, failure.code, failure.detail))
                blocks.append({})
            else:
                pending += _halves(signature, batch)
        else:
            blocks.append(outputs)
        finally:
            seconds += perf_counter() - started
    joined = _joined(blocks, signature, records if order is None else len(order))
    return RunResult(joined if order is None else _put_back(joined, order, records), errors, seconds)


# --- batches ---------------------------------------------------------------------------------------------------------


def _plan(
    signature: Signature, inputs: Inputs, records: int, failed: np.ndarray | None
) -> tuple[np.ndarray | None, list[_Batch]]:
    """The order in which to run the records (None: as they come), and the batches, each of records of one size."""
    varied = {name: array for name, array in inputs.items() if not isinstance(array, np.ndarray)}
    if signature.mode == "whole":
        return _whole(list(varied.values()), np.zeros(records, bool) if failed is None else failed)
    if not varied:
        size = signature.batch
        return None, [_Batch(begin, min(begin + size, records)) for begin in range(0, records, size)]
    order, starts = _by_size(list(varied.values()), records)
    batches = []
    for start, stop in zip(starts, [*starts[1:], records], strict=True):
        size = signature.batch
        if signature.mode == "rows" and records:
            first = start if order is None else int(order[start])
            size = max(1, min(size, BATCH_BYTES // max(1, _bytes(signature, varied, first))))
        batches += [_Batch(begin, min(begin + size, stop)) for begin in range(start, stop, size)]
    return order, batches


def _whole(varied: Sequence[Batchwise], failed: np.ndarray) -> tuple[np.ndarray | None, list[_Batch]]:
    """One batch of all records but those that failed."""
    good = np.flatnonzero(~failed)
    if any((array.shapes[good] != array.shapes[good[:1]]).any() for array in varied):
        raise ScoringFailed("the model must see all records in one run, and these differ in size")
    return good if failed.any() else None, [_Batch(0, len(good))] if len(good) else []


def _by_size(varied: Sequence[Batchwise], records: int) -> tuple[np.ndarray | None, list[int]]:
    """An order that groups records by size (None: all have the same), and where each group starts."""
    if not records:
        return None, [0]
    shapes = np.hstack([array.shapes for array in varied])
    if (shapes == shapes[0]).all():
        return None, [0]
    _, sizes = np.unique(shapes, axis=0, return_inverse=True)
    order = np.argsort(sizes, kind="stable")
    return order, [0, *(np.flatnonzero(np.diff(sizes[order])) + 1).tolist()]


def _bytes(signature: Signature, varied: dict[str, Batchwise], record: int) -> int:
    dtypes = {tensor.name: numpy_type(tensor.dtype) for tensor in signature.inputs}
    return sum(int(array.shapes[record].prod()) * dtypes[name].itemsize for name, array in varied.items())


def _per_record(signature: Signature) -> set[str]:
    return {tensor.name for tensor in signature.inputs if tensor.per_record}


def _take(signature: Signature, inputs: Inputs, chosen: np.ndarray | slice) -> Tensors:
    """The inputs of these records; those of a slice are not copied. Raises OutOfMemory."""
    per_record = _per_record(signature)
    batch: Tensors = {}
    try:
        for name, array in inputs.items():
            if not isinstance(array, np.ndarray):
                one_by_one = np.arange(chosen.start, chosen.stop) if isinstance(chosen, slice) else chosen
                batch[name] = array.take(one_by_one)
            elif name not in per_record:
                batch[name] = array
            else:
                batch[name] = array[chosen]
    except MemoryError as error:
        raise out_of_memory("the input of the model", allowance()) from error
    return batch


def _halves(signature: Signature, batch: _Batch) -> list[_Batch]:
    """The second half and the first: the last one is run next. Decoded images are kept."""
    per_record = _per_record(signature)
    middle = (batch.start + batch.stop) // 2
    first = middle - batch.start
    if (inputs := batch.inputs) is None:
        return [_Batch(middle, batch.stop), _Batch(batch.start, middle)]
    upper, lower = (
        {name: array[half] if name in per_record else array for name, array in inputs.items()}
        for half in (slice(first, None), slice(first))
    )
    return [_Batch(middle, batch.stop, upper), _Batch(batch.start, middle, lower)]


def _run_batch(session: Session, signature: Signature, batch: Tensors, records: int) -> Tensors:
    """Runs as many records as the graph takes or has the same answers for: the last one is repeated."""
    multiple = {"rows": signature.multiple, "fixed": signature.batch, "whole": 1}[signature.mode]
    wanted = -(-records // multiple) * multiple
    if wanted > records:
        per_record = _per_record(signature)
        batch = {name: _padded(array, wanted) if name in per_record else array for name, array in batch.items()}
    outputs = session.run(batch)
    check_count(outputs, wanted)
    return outputs if wanted == records else {name: array[:records] for name, array in outputs.items()}


def _padded(array: np.ndarray, wanted: int) -> np.ndarray:
    if len(array) == 1:
        return array.repeat(wanted, axis=0)
    return np.concatenate([array, np.repeat(array[-1:], wanted - len(array), axis=0)])


# --- outputs ---------------------------------------------------------------------------------------------------------


def _joined(blocks: Sequence[Tensors], signature: Signature, records: int) -> Tensors:
    """One array for each output. A block without outputs is one record that failed: a row of zeros, nulled later."""
    if len(blocks) == 1 and blocks[0]:
        return blocks[0]
    known = {name: array for block in blocks for name, array in block.items()} or _no_outputs(signature)
    joined = {}
    for name, like in known.items():
        arrays = [block[name] if block else _blank(like, 1) for block in blocks]
        if len({array.shape[1:] for array in arrays}) > 1:
            joined[name] = _lists(arrays, records)
        else:
            joined[name] = np.concatenate(arrays) if arrays else np.zeros((records, *like.shape[1:]), like.dtype)
    return joined


def _lists(arrays: Sequence[np.ndarray], records: int) -> np.ndarray:
    """Outputs whose size follows that of the records, as lists."""
    lists = np.empty(records, dtype=object)
    for record, row in enumerate(row for array in arrays for row in array):
        lists[record] = row.tolist()
    return lists


def _no_outputs(signature: Signature) -> Tensors:
    return {
        output.name: np.zeros((0, *(size or 1 for size in output.shape[1:])), numpy_type(output.dtype))
        for output in signature.outputs
    }


def _put_back(outputs: Tensors, order: np.ndarray, records: int) -> Tensors:
    """The outputs in the order of the records; one that was not run has a row of zeros."""
    placed = {name: _blank(array, records) for name, array in outputs.items()}
    for name, array in outputs.items():
        placed[name][order] = array
    return placed


def _blank(like: np.ndarray, records: int) -> np.ndarray:
    """Rows of zeros, or of empty texts."""
    return np.full((records, *like.shape[1:]), "" if like.dtype.kind in "OU" else 0, like.dtype)
