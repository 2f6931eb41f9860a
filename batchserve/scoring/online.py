"""The records of one request body are scored or checked while its client waits."""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

from batchserve.allowance import allowance
from batchserve.domain import Chunk, ChunkLimits, Dialect, ModelVersion, Options, RowError
from batchserve.errors import BatchserveError, PayloadTooLarge, ScoringFailed
from batchserve.formats import get_format
from batchserve.formats.protocol import Reading, Records
from batchserve.inference.answers import in_order, score
from batchserve.inference.images import Images
from batchserve.inference.inputs import build_inputs
from batchserve.inference.matching import Match, match_input, with_names
from batchserve.scoring import plain_records
from batchserve.scoring.faults import by_name
from batchserve.scoring.results import result_of
from batchserve.scoring.sessions import keep_only, session_for


@dataclass(frozen=True)
class OnlineModel:
    """What requests have in common. It is sent with all of them, so it is pickled once, and unpickled once by each
    process: those that travel together take it as `pickled`."""

    storage: str
    model: ModelVersion
    options: Options
    records: int
    """Most records in one request."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.pickled,)

    @cached_property
    def pickled(self) -> bytes:
        return pickle.dumps((self.storage, self.model, self.options, self.records))


@lru_cache(maxsize=64)
def _unpickled(pickled: bytes) -> OnlineModel:
    return OnlineModel(*pickle.loads(pickled))  # noqa: S301 - from our own process


@dataclass(frozen=True, slots=True)
class OnlineTask:
    common: OnlineModel
    body: bytes
    format: str
    dialect: Dialect

    @property
    def may_travel(self) -> bool:
        """Whether the request may go with others in one run: its records may be few and plain."""
        is_short = self.format in ("json", "jsonl") and len(self.body) <= plain_records.MOST_BYTES
        return is_short and plain_records.plan_of(self.common.model.signature, self.common.options) is not None


OnlineBody = tuple[bytes, str]
"""The body of a request that may travel, and its format. Of JSON all else is known from the model."""


class Online(NamedTuple):
    """The answer to an online request: one record for each of the request, and the errors of failed ones."""

    records: bytes
    """Inputs and outputs of each, as a JSON array."""
    errors: tuple[RowError, ...]
    inference_ms: float
    """Time in the model alone; of requests in one run that of the run."""


OnlineAnswer = tuple[bytes, tuple[RowError, ...], float]
"""An `Online`. As a plain tuple it is pickled in a fraction of the time."""


def predict_together(pickled: bytes, bodies: Sequence[OnlineBody]) -> list[OnlineAnswer | BatchserveError]:
    """The answers to several requests. Records that are plain in all respects are scored in one run; the others by
    `predict_online`, which gives them the same answers. `pickled`: what they have in common."""
    common = _unpickled(pickled)
    plan = plain_records.plan_of(common.model.signature, common.options)
    answers: list[OnlineAnswer | None] = [None] * len(bodies)
    if plan is not None:
        answers = _answers_of_plain(common, plan, bodies)
    return [answer or _answer_alone(common, body) for answer, body in zip(answers, bodies, strict=True)]


def _answers_of_plain(
    common: OnlineModel, plan: plain_records.Plan, bodies: Sequence[OnlineBody]
) -> list[OnlineAnswer | None]:
    requests = [plain_records.parsed(body, format, common.records) for body, format in bodies]
    if not any(requests):
        return [None] * len(bodies)
    try:
        session = session_for(common.storage, common.model)
        answered = plain_records.score_plain(session, plan, requests, partial(keep_only, session))
    except ScoringFailed:  # each request finds out whether by itself
        return [None] * len(bodies)
    return [None if records is None else (records, (), answered.milliseconds) for records in answered.bodies]


def _answer_alone(common: OnlineModel, body: OnlineBody) -> OnlineAnswer | BatchserveError:
    try:
        return predict_online(OnlineTask(common, *body, Dialect()))
    except BatchserveError as error:
        return error


@by_name
def predict_online(task: OnlineTask) -> Online:
    """Scores the records of one request body. The same code as for a chunk, hence the same answers."""
    match, reading, passed, chunk = _online_input(task)
    session = session_for(task.common.storage, task.common.model)
    scored = score(session, match, reading, chunk.records, partial(keep_only, session))
    jsonl = get_format("jsonl")
    lines = jsonl.write(result_of(jsonl, scored, passed, match)).splitlines()
    return Online(b"[%b]" % b",".join(lines), tuple(scored.errors), 1000 * scored.model_seconds)


@by_name
def validate_online(task: OnlineTask) -> tuple[RowError, ...]:
    """Reads and checks the records of one request body against the model's signature, without scoring them.

    One error for each value that does not fit, where a job would stop at the first of a record."""
    match, reading, _, _ = _online_input(task)
    pixels = allowance().image_pixels
    inputs, _, missing = build_inputs(match.signature, match.binding, reading.records, pixels, reading.matrices)
    undecoded = [error for array in inputs.values() if isinstance(array, Images) for error in array.check()]
    unread = {(error.record, error.column) for error in reading.errors}  # what could not be read is missing too
    errors = [error for error in missing + undecoded if (error.record, error.column) not in unread]
    return tuple(in_order(reading.errors + errors))


def _online_input(task: OnlineTask) -> tuple[Match, Reading, Records, Chunk]:
    """The checked binding of a request's records to the model; the records, the passed-through columns, and their
    chunk."""
    source = io.BytesIO(task.body)
    common = task.common
    format = get_format(task.format, with_names(task.dialect, common.model, common.options))
    match = match_input(format.header(source), common.model, common.options)
    match.check()
    chunks = format.plan(source, None, ChunkLimits(bytes=2**62, records=common.records))
    chunk, more = next(chunks), next(chunks, None)
    if more is not None:
        raise PayloadTooLarge(
            f"an online request may hold {common.records} records; upload the file and predict it as a job"
        )
    return match, *match.read(format, source, chunk), chunk
