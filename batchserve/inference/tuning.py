"""Measures in which batches and with how many threads a model scores fastest on this machine."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from time import perf_counter

from batchserve.domain import Signature
from batchserve.errors import ScoringFailed
from batchserve.inference.feed import EXAMPLES, PROBE_BYTES, Feed
from batchserve.inference.session import Arrays, Session, open_session

__all__ = ["BATCHES", "tune"]

BATCHES = (64, 1024, 4096, 16384)
SMALL_BATCHES = (1, 8)
TUNING_SECONDS = 1.0
SINGLE_THREAD_BONUS = 1.1
"""Several scoring processes share the machine: a second thread must be worth more than this."""


def tune(signature: Signature, content: bytes, session: Session, feed: Feed, spent: float) -> Signature:
    """The signature with the batch and the threads that score fastest, measured within about a second."""
    best: tuple[float, int, int] | None = None
    deadline = perf_counter() + TUNING_SECONDS
    for threads in (1, 2):
        if threads > (os.cpu_count() or 1) or (threads > 1 and spent > TUNING_SECONDS):
            break
        if threads > 1:
            session.close()
            session = open_session(content, threads)
            deadline = perf_counter() + TUNING_SECONDS / 2
        for batch, rate in _rates(signature, session, feed, deadline):
            weighed = rate * SINGLE_THREAD_BONUS if threads == 1 else rate
            if best is None or weighed > best[0]:
                best = weighed, batch, threads
                signature = replace(signature, batch=batch, threads=threads, records_per_second=rate)
    session.close()
    return signature


def _rates(signature: Signature, session: Session, feed: Feed, deadline: float) -> Iterator[tuple[int, float]]:
    """Batch sizes and the records scored in a second with each, as far as time and memory reach."""
    if signature.mode == "fixed":
        yield signature.batch, _measure(session, feed.first(signature.batch), signature.batch, deadline)
        return
    if signature.mode == "whole":
        yield signature.batch, _measure(session, feed.first(EXAMPLES), EXAMPLES, deadline)
        return
    records = _records_to_time(session, feed)
    per_record = 0.0
    for batch in (*SMALL_BATCHES, *BATCHES):
        left = deadline - perf_counter()
        too_much = batch * feed.bytes_per_record() > PROBE_BYTES or batch * per_record * 2 > left
        if batch > 1 and too_much:
            return
        rate = _measure(session, records(batch), batch, deadline)
        per_record = 1 / rate
        yield batch, rate


def _records_to_time(session: Session, feed: Feed) -> Callable[[int], Arrays]:
    """Varied records, unless the model refuses what the variation made of them (a category written as a number)."""
    try:
        session.run(feed.varied(EXAMPLES if feed.bytes_per_record() * EXAMPLES < PROBE_BYTES else 1))
    except ScoringFailed:
        return feed.first
    return feed.varied


def _measure(session: Session, inputs: Arrays, records: int, deadline: float) -> float:
    """Records in a second: the best of at most five runs, and of one when time is short."""
    best = float("inf")
    for _ in range(5):
        started = perf_counter()
        session.run(inputs)
        best = min(best, max(perf_counter() - started, 1e-9))
        if perf_counter() + best > deadline:
            break
    return records / best
