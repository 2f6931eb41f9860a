"""Measures the batch size, threads and kernel with which a model scores fastest on this machine."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from time import perf_counter

import numpy as np
from onnx import ModelProto

from batchserve.admission.probe_inputs import EXAMPLES, PROBE_BYTES, Feed, run_within_memory
from batchserve.domain import Signature
from batchserve.errors import OutOfMemory, ScoringFailed
from batchserve.inference.kernels import Arrays, Session, trees
from batchserve.inference.session import open_session

__all__ = ["BATCHES", "identical", "tune", "tune_kernel"]

BATCHES = (64, 1024, 4096, 16384)
SMALL_BATCHES = (1, 8)
TUNING_SECONDS = 1.0
PASSES_SECONDS = 0.05
"""For further passes over the records of a batch size."""
MEASURED_RECORDS = 512
MEASURED_BYTES = 4 * 2**20
"""Different records that are timed, also in small batches: a processor learns the branches that trees take for a few
records by heart, and small batches looked three times as fast as they are."""
HARD_RECORDS = 4096
"""Records on which the tree kernel must agree with ONNX Runtime."""
AGREEMENT = 1e-6
"""Tolerated difference of their numbers, relative to max(1, |expected|)."""
SINGLE_THREAD_BONUS = 1.1
"""Several scoring processes share the machine: a second thread must be worth more than this."""
COMPARED = (1, 3, 64, 1024)
"""Records in the runs in which several threads must give the answers of one."""
COMPARED_SECONDS = 0.1
"""For each of these runs; so long, at the rate that is known."""


def tune(signature: Signature, content: bytes, session: Session, feed: Feed, spent: float) -> Signature:
    """The signature with the batch and the threads that score fastest, measured within about a second.

    Several threads are taken only where they give the answers of one, to the last bit: hosts differ in their cores for
    each process, and a call online has more than a chunk. ONNX Runtime 1.32 shares the trees of a forest out among the
    threads and adds in another order then: 228 of 2,048 probabilities of the demo's boosted trees differ.
    """
    tuned = _fastest(signature, session, feed, TUNING_SECONDS)
    if (os.cpu_count() or 1) > 1 and spent <= TUNING_SECONDS:
        with suppress(OutOfMemory):
            alone = list(_answers(tuned, session, feed))
            session.close()
            session = open_session(content, 2, provider=signature.provider)
            if all(map(identical, alone, _answers(tuned, session, feed))):
                shared = _fastest(replace(signature, threads=2), session, feed, TUNING_SECONDS / 2)
                tuned = max(shared, tuned, key=_worth)
    session.close()
    return tuned


def _fastest(signature: Signature, session: Session, feed: Feed, seconds: float) -> Signature:
    """The signature with the batch that scores fastest, and its rate. Raises OutOfMemory when no run is possible."""
    rates = _rates(signature, session, feed, perf_counter() + seconds)
    batch, rate = max(rates, key=lambda pair: pair[1])
    return replace(signature, batch=batch, records_per_second=rate)


def _worth(tuned: Signature) -> float:
    return (tuned.records_per_second or 0.0) * (SINGLE_THREAD_BONUS if tuned.threads == 1 else 1)


def _answers(signature: Signature, session: Session, feed: Feed) -> Iterator[Arrays]:
    """Of runs of several sizes, as far as time and memory reach."""
    if signature.mode in ("fixed", "whole"):
        yield session.run(feed.first(_fixed_count(signature, session, feed)))
        return
    records = _records_to_time(session, feed)
    for count in COMPARED:
        too_long = count > (signature.records_per_second or 0.0) * COMPARED_SECONDS
        if count == 1 or not (too_long or count * feed.bytes_per_record() > PROBE_BYTES):
            yield session.run(records(count))


def identical(results: Arrays, expected: Arrays) -> bool:
    """Whether all results are those expected, to the last bit."""
    return all(
        np.array_equal(array, expected[name], equal_nan=array.dtype.kind == "f") for name, array in results.items()
    )


def tune_kernel(signature: Signature, model: ModelProto, content: bytes, feed: Feed) -> Signature:
    """The signature with the tree kernel, if the model is made of trees, and it is proved equal and faster here."""
    ensemble = trees.load_trees(model) if signature.mode == "rows" else None
    session = trees.open_trees(ensemble) if ensemble else None
    if ensemble is None or session is None:
        return signature
    records = min(HARD_RECORDS, max(1, PROBE_BYTES // feed.bytes_per_record()))
    if not _agree(session, open_session(content), trees.hard_records(ensemble, feed.varied(records))):
        return signature
    tuned = _fastest(signature, session, feed, TUNING_SECONDS)
    rate = tuned.records_per_second or 0.0
    ratio = rate / (signature.records_per_second or rate)
    if ratio <= 1:
        return signature
    note = f"Scored by the tree kernel: the same results, {ratio:.1f} x as fast as ONNX Runtime here."
    return replace(tuned, threads=1, kernel="trees", provider="cpu", notes=(*signature.notes, note))


def _agree(session: Session, reference: Session, inputs: Arrays) -> bool:
    """Whether two sessions give the same labels, and the same numbers up to the last digits of a float32."""
    results, expected = session.run(inputs), reference.run(inputs)
    return list(results) == list(expected) and all(_equal(results[name], array) for name, array in expected.items())


def _equal(result: np.ndarray, expected: np.ndarray) -> bool:
    if result.dtype != expected.dtype or result.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool((result == expected).all())
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, which cannot be compared
        return bool((np.abs(result - expected) <= AGREEMENT * np.maximum(1, np.abs(expected))).all())


def _rates(signature: Signature, session: Session, feed: Feed, deadline: float) -> Iterator[tuple[int, float]]:
    """Batch sizes and the records scored in a second with each, as far as time and memory reach."""
    if signature.mode in ("fixed", "whole"):
        count = _fixed_count(signature, session, feed)
        yield signature.batch, _measure(session, [feed.first(count)], count, deadline)
        return
    records = _records_to_time(session, feed)
    per_record = 0.0
    for batch in (*SMALL_BATCHES, *BATCHES):
        left = deadline - perf_counter()
        too_much = batch * feed.bytes_per_record() > PROBE_BYTES or batch * per_record * 2 > left
        if batch > 1 and too_much:
            return
        different = min(MEASURED_RECORDS, MEASURED_BYTES // feed.bytes_per_record())
        inputs = records(max(batch, different // batch * batch))
        try:
            rate = _measure(session, list(_cut(inputs, feed, batch)), batch, deadline)
        except OutOfMemory:
            if batch == SMALL_BATCHES[0]:
                raise
            return
        per_record = 1 / rate
        yield batch, rate


def _fixed_count(signature: Signature, session: Session, feed: Feed) -> int:
    """The records of a run where their number is not free."""
    return signature.batch if signature.mode == "fixed" else run_within_memory(session, feed, EXAMPLES)[0]


def _cut(inputs: Arrays, feed: Feed, batch: int) -> Iterator[Arrays]:
    """The records of a run, in runs of `batch`."""
    count = min((len(inputs[name]) for name in feed.arrays), default=batch)
    for start in range(0, count, batch):
        yield {name: array[start : start + batch] if name in feed.arrays else array for name, array in inputs.items()}


def _records_to_time(session: Session, feed: Feed) -> Callable[[int], Arrays]:
    """Varied records, unless the model refuses what the variation made of them (a category written as a number)."""
    for count in (EXAMPLES, 1) if feed.bytes_per_record() * EXAMPLES < PROBE_BYTES else (1,):
        try:
            session.run(feed.varied(count))
        except OutOfMemory:
            continue
        except ScoringFailed:
            return feed.first
        break
    return feed.varied


def _measure(session: Session, runs: list[Arrays], records: int, deadline: float) -> float:
    """Records in a second, `records` in each of the runs: the best of at most five passes over these, and of the
    beginning of one when time is short."""
    enough = min(deadline, perf_counter() + PASSES_SECONDS)
    best = _seconds_per_run(session, runs, deadline)
    for _ in range(4):
        if perf_counter() + best * len(runs) > enough:
            break
        best = min(best, _seconds_per_run(session, runs, deadline))
    return records / best


def _seconds_per_run(session: Session, runs: list[Arrays], deadline: float) -> float:
    done = 0
    started = perf_counter()
    for inputs in runs:
        session.run(inputs)
        done += 1
        if perf_counter() > deadline:
            break
    return max(perf_counter() - started, 1e-9) / done
