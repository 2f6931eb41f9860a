"""The state of a job in the worker that holds its lease."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import uuid_utils

from batchserve.correlation import Correlation
from batchserve.domain import Chunk, ChunkLimits, CommittedChunk, Job, ModelVersion, Options, ScoredChunk, StoredInput
from batchserve.engines import Call
from batchserve.errors import NoRowScored, TooManyRowErrors, UnreadableRow
from batchserve.facts import merge_facts
from batchserve.formats import get_format
from batchserve.inference.matching import with_names
from batchserve.postgres import Place, place_of
from batchserve.scoring.assembly import AssembleTask, Output, outputs_of, stored_parts
from batchserve.scoring.chunks import ChunkTask
from batchserve.scoring.comparison import Compared, CompareTask, compare_inputs
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import MOST_TOGETHER, WHOLE, Planned, PlanTask, plan_chunks
from batchserve.scoring.small import SmallTask, score_small
from batchserve.scoring.tables import QueryTask, read_query
from batchserve.settings import Settings
from batchserve.storage import input_key
from batchserve.worker.limits import SMALL_JOB_BYTES, UNLIMITED, chunk_limits, even_limits

__all__ = ["ActiveJob"]

_PLANNED_AT_ONCE = 64
"""Most chunks that one call plans."""
_INPUTS_AT_ONCE = 2 * MOST_TOGETHER
"""Inputs that one call gets to plan."""


@dataclass(slots=True)
class ActiveJob:
    """A job, its progress, and its running calls."""

    id: str
    attempt: int
    tenant: str
    inputs: tuple[Input, ...]
    stored: tuple[StoredInput, ...]
    """The same as they are stored."""
    sizes: tuple[int, ...]
    """Bytes of each input, as far as they are known."""
    bases: dict[int, int]
    """The number of the first record of each input that begins a chunk, as far as they are planned."""
    model: ModelVersion
    options: Options
    limits: ChunkLimits
    planned: bool
    places: Mapping[str, Place]
    """The databases of others that it reads from and writes to, by their names."""
    is_small: bool
    """Whether to try it in one call: plan, score and assemble."""
    number: int
    """Of the first input that is not planned to its end."""
    is_compared: bool
    """Whether its inputs are known to have the same columns."""
    asked_by: Correlation
    """The request that queued it."""
    upload_traceparent: str | None
    last_planned: Chunk | None
    pending: deque[Chunk]
    rows_planned: int
    rows_done: int
    rows_failed: int
    compared: Compared = field(default_factory=Compared)
    """What is known of its inputs since they were compared."""
    share_planned: float = 0.0
    planning: Call[Any] | None = None
    chunk_calls: dict[int, Call[Any]] = field(default_factory=dict)
    """Running calls by the first record of their chunk."""
    assembling: Call[Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the job that do not come from its chunks."""
    lost_calls: int = 0
    """Planning and assembling calls whose process died."""
    cancelled_at: float | None = None

    @classmethod
    def begin(
        cls,
        job: Job,
        pending: list[Chunk],
        last: Chunk | None,
        bases: dict[int, int],
        settings: Settings,
    ) -> "ActiveJob":
        """`pending`, `last`, `bases`: the chunks left by earlier attempts, the last planned one, and the first record
        of each input. Raises UnreadableRow for a job without the values of a queued one, and LocationRefused for one
        that names a database which its tenant may not use any more.
        """
        if job.model is None or job.options is None:
            raise UnreadableRow(f"the database's row of job {job.id} names no model or no options: remove it")
        limits = chunk_limits(settings, job.model, job.input.format)
        sizes = tuple(UNLIMITED if stored.bytes is None else stored.bytes for stored in job.inputs)
        size = sum(sizes)
        return cls(
            id=job.id,
            attempt=job.attempt,
            tenant=job.tenant,
            inputs=tuple(_input(settings.storage, stored, job.model, job.options) for stored in job.inputs),
            stored=job.inputs,
            sizes=sizes,
            bases=bases,
            model=job.model,
            options=job.options,
            limits=even_limits(limits, job.input.format, size),
            places=_places(job.tenant, job.options, settings),
            planned=job.planned,
            number=0 if last is None else last.input + (last.inputs if last.inputs > 1 else 0),
            # Where all have one result, a later attempt must know the types of its columns again.
            is_compared=len(job.inputs) == 1 or (bool(job.chunks_total) and job.options.is_per_input),
            last_planned=last,
            pending=deque(pending),
            rows_planned=job.rows_planned,
            rows_done=job.rows_done,
            rows_failed=job.rows_failed,
            share_planned=1.0 if job.planned else 0.0,
            facts=merge_facts(job.facts, {"notes": list(job.model.signature.notes)}),
            is_small=_is_small(job, size),
            asked_by=Correlation(job.request_id, job.traceparent),
            upload_traceparent=job.upload_traceparent,
        )

    @property
    def is_per_input(self) -> bool:
        """Whether each input has a result of its own, and so chunks of its own."""
        return self.options.is_per_input

    @property
    def calls(self) -> list[Call[Any]]:
        return [call for call in (self.planning, self.assembling, *self.chunk_calls.values()) if call is not None]

    @property
    def progress(self) -> float:
        """0 to 1 over the whole input; the last hundredth is assembly."""
        return 0.99 * self.share_planned * self.rows_done / max(self.rows_planned, 1)

    def planning_call(self, window: int, settings: Settings) -> tuple[Callable[..., Any], Any, float]:
        """The call that plans the next chunks, or first of all reads the rows of the query, or compares the inputs of
        an earlier attempt's plan: what it takes, and its time limit."""
        query = self.options.query
        if query is not None and self.stored[0].is_unread:
            place, key = self.places[query.connection], input_key(str(uuid_utils.uuid7()))
            read = QueryTask(settings.storage, key, place, query.text, settings.query_timeout, settings.upload_bytes)
            return read_query, read, settings.query_timeout + settings.chunk_timeout
        if self.planned:
            return compare_inputs, self._comparison, settings.chunk_timeout
        task = self.plan_task(window)
        if self.is_small:
            return score_small, self.small_task(task, settings), settings.chunk_timeout
        return plan_chunks, task, settings.chunk_timeout

    def plan_task(self, window: int) -> PlanTask:
        """The task that plans the next chunks. The first one is short, so that scoring begins immediately."""
        number, last = self.number, self.last_planned
        after = last if last is not None and last.input == number else None
        most = _PLANNED_AT_ONCE if last else min(window, _PLANNED_AT_ONCE)
        base = self.bases[number] if after else self.rows_planned
        if len(self.inputs) == 1:
            return PlanTask(self.inputs[number], after, self.limits, most, number, base)
        stop = len(self.inputs) if self.limits == WHOLE else number + _INPUTS_AT_ONCE
        own, *further = self.inputs[number:stop]
        sizes = () if self.is_per_input else self.sizes[number:stop]
        is_last = stop >= len(self.inputs)
        comparison = None if self.is_compared else self._comparison
        known = self.compared.records[number:stop]
        return PlanTask(own, after, self.limits, most, number, base, tuple(further), sizes, is_last, comparison, known)

    def small_task(self, plan: PlanTask, settings: Settings) -> SmallTask:
        return SmallTask(plan, self.id, self.attempt, self.model, self.options, settings.inline_bytes)

    def chunk_task(self, chunk: Chunk) -> ChunkTask:
        own, *further = self._inputs_of(chunk)
        first = self.inputs[0] if len(self.inputs) > 1 or self.options.input_file else None
        base = self.bases[chunk.input]
        known, kinds = self.compared.records[chunk.input : chunk.input + chunk.inputs], self.compared.kinds
        return ChunkTask(
            own, self.id, self.attempt, chunk, self.model, self.options, base, tuple(further), first, known, kinds
        )

    def _empty_task(self, input: Input) -> ChunkTask:
        """Of an input without records, which is not among the chunks."""
        return ChunkTask(
            input, self.id, self.attempt, Chunk(0, 0, 0, 0), self.model, self.options, first=self.inputs[0]
        )

    def _inputs_of(self, chunk: Chunk) -> tuple[Input, ...]:
        return self.inputs[chunk.input : chunk.input + chunk.inputs]

    def halving(self, chunk: Chunk, before: Chunk | None) -> tuple[tuple[Input, ...], Chunk, Chunk | None, int]:
        """What `planning.halve_chunk` takes for a chunk. `before`: the one that is planned before it."""
        after = before if before is not None and before.input == chunk.input else None
        return self._inputs_of(chunk), chunk, after, self.bases[chunk.input]

    def assemble_task(self, storage: str, done: Sequence[CommittedChunk]) -> AssembleTask:
        """`done`: all its chunks, in order."""
        parts, errors = stored_parts(self.id, done)
        target = self.options.target
        outputs: tuple[Output, ...] = ()
        if self.options.is_per_input:
            suffix = get_format(self.options.format).suffix
            names = target.urls(self.stored) if target else [f"{one.stem}{suffix}" for one in self.stored]
            found = outputs_of(names, done, parts)
            pairs = zip(self.inputs, found, strict=True)
            outputs = tuple(one if one.parts else replace(one, empty=self._empty_task(input)) for input, one in pairs)
        elif target is not None:
            outputs = (Output(target.url, parts),)
        dialect = self.inputs[0].dialect
        table = self.options.table
        place = self.places[table.connection] if table is not None else None
        return AssembleTask(
            storage, self.id, self.attempt, self.options.format, dialect, parts, errors, target, outputs, table, place
        )

    def is_planned_by(self, planned: Planned) -> bool:
        """Whether the plan of the whole job is complete with these chunks."""
        return planned.complete and self.number + planned.ended == len(self.inputs)

    @property
    def _comparison(self) -> CompareTask:
        return CompareTask(self.inputs, self.model, self.options)

    def needs_more(self, window: int) -> bool:
        """Whether fewer chunks than the window are ready: more are to be planned, or inputs to be compared before the
        planned ones are scored."""
        if not self.is_compared:
            return not self.planned or bool(self.pending)
        return not self.planned and len(self.pending) < window

    def add_compared(self, compared: Compared) -> None:
        self.compared, self.is_compared = compared, True

    def add_planned(self, planned: Planned | StoredInput) -> None:
        """Chunks; or the rows of its query, which are its input from now on."""
        if isinstance(planned, StoredInput):
            self.stored, self.sizes = (planned,), (planned.bytes or 0,)
            self.inputs = (_input(self.inputs[0].storage, planned, self.model, self.options),)
            return
        self.planned, self.is_compared = self.is_planned_by(planned), True
        self.compared = planned.compared or self.compared
        self.number += planned.ended
        share = 0.0 if planned.complete else planned.share
        self.share_planned = (self.number + share) / len(self.inputs)
        self.pending.extend(planned.chunks)
        self.rows_planned += sum(chunk.records for chunk in planned.chunks)
        for chunk in planned.chunks:
            self.bases.setdefault(chunk.input, chunk.first_record)
            self.last_planned = chunk

    def add_halves(self, halves: Sequence[Chunk]) -> None:
        """The chunks that replace one that crashed."""
        for half in halves:
            self.bases.setdefault(half.input, half.first_record)
        self.pending.extendleft(reversed(halves))

    def add_scored(self, scored: ScoredChunk) -> None:
        self.rows_done += scored.chunk.records
        self.rows_failed += scored.rows_failed

    @property
    def fatal_row_errors(self) -> TooManyRowErrors | NoRowScored | None:
        """The error that ends the job for its failed records: by its own options, or when no record is left."""
        failed, options = self.rows_failed, self.options
        see = "the errors list of the job names them"
        if failed and options.on_row_error == "fail":
            return TooManyRowErrors(f"{failed} record(s) could not be scored and on_row_error is 'fail'; {see}")
        if options.max_errors is None:
            if not (failed and self.planned and failed == self.rows_planned):
                return None
            none = "the only record" if failed == 1 else f"none of the {failed} records"
            verb = "could not" if failed == 1 else "could"
            return NoRowScored(f"{none} {verb} be scored; {see}. The option max_errors={failed} completes such a job")
        most = options.max_errors if options.max_errors >= 1 else options.max_errors * self.rows_planned
        settled = options.max_errors >= 1 or self.planned
        if settled and failed > most:
            return TooManyRowErrors(f"{failed} records could not be scored, max_errors allows {int(most)}; {see}")
        return None


def _is_small(job: Job, size: int) -> bool:
    """Whether one call may do the job: its result goes into the storage, or the database."""
    options = job.options
    is_plain = options is None or (options.target is None and options.table is None and not options.archive)
    return len(job.inputs) == 1 and size <= SMALL_JOB_BYTES and not job.chunks_total and is_plain


def _places(tenant: str, options: Options, settings: Settings) -> dict[str, Place]:
    named = [used.connection for used in (options.table, options.query) if used is not None]
    addresses = {name: address.get_secret_value() for name, address in settings.connections_of(tenant).items()}
    return {name: place_of(name, addresses) for name in named}


def _input(storage: str, stored: StoredInput, model: ModelVersion, options: Options) -> Input:
    """An input as the job reads it. Where an npz is cut depends on which of its arrays the model takes."""
    source = Input.of(storage, stored)
    return replace(source, dialect=with_names(stored.dialect, model, options)) if stored.format == "npz" else source
