"""Every user-visible error, each with a stable code.

BatchserveError
├── BadRequest 400 bad-request
│   └── TruncatedBody 400 truncated-body
├── Unauthorized 401 unauthorized
├── Forbidden 403 forbidden
│   ├── CrossOrigin 403 cross-origin
│   └── LocationRefused 403 location-refused
├── NotFound 404 not-found
│   ├── JobNotFound job-not-found
│   ├── ModelNotFound model-not-found
│   ├── UploadNotFound upload-not-found
│   ├── InputNotFound input-not-found
│   ├── ScheduleNotFound schedule-not-found
│   ├── WebhookNotFound webhook-not-found
│   └── ResultNotReady result-not-ready
├── NotAcceptable 406 not-acceptable
├── RequestTimeout 408 request-timeout
├── Conflict 409 conflict
│   ├── JobConflict job-conflict
│   ├── ModelInUse model-in-use
│   ├── UploadIncomplete upload-incomplete
│   ├── InputChanged input-changed
│   ├── TargetExists target-exists
│   ├── Elsewhere elsewhere
│   ├── UnreadableRow unreadable-row
│   └── IdempotencyInProgress idempotency-in-progress
├── Gone 410 expired
├── PreconditionFailed 412 precondition-failed
├── PayloadTooLarge 413 payload-too-large
├── UnsupportedMedia 415 unsupported-media-type
├── RangeNotSatisfiable 416 range-not-satisfiable
├── MisdirectedRequest 421 misdirected-request
├── Unprocessable 422 unprocessable
│   ├── InvalidInput invalid-input
│   ├── SchemaMismatch schema-mismatch
│   ├── InvalidOptions invalid-options
│   ├── InvalidLocation invalid-location
│   ├── UnlikeInputs unlike-inputs
│   ├── TableMismatch table-mismatch
│   ├── QueryRefused query-refused
│   ├── ModelRefused model-refused
│   ├── ConversionFailed conversion-failed
│   ├── ParityFailed parity-failed
│   ├── DigestMismatch digest-mismatch
│   ├── DirectUploadUnsupported direct-upload-unsupported
│   └── IdempotencyMismatch idempotency-mismatch
├── ScoringFailed 422 scoring-failed
│   ├── ScoringCrashed scoring-crashed
│   ├── ScoringTimeout scoring-timeout
│   ├── WorkerCrashed worker-crashed
│   ├── OutOfMemory out-of-memory
│   ├── TooManyRowErrors too-many-row-errors
│   └── NoRowScored no-row-scored
├── TooManyRequests 429 too-many-requests
│   └── QuotaExceeded quota-exceeded
├── Unavailable 503 unavailable
├── InsufficientStorage 507 insufficient-storage
├── StorageQuotaExceeded 507 storage-quota-exceeded   (of a tenant: there is space)
├── LeaseLost 500 lease-lost               (inside the worker: another attempt owns the job)
└── SchemaOutdated, SchemaTooNew, SchemaTooOld 500   (start-up: the message says what to do)

`detail` says what was wrong, what was expected and what was got. `errors` lists single faults, each a mapping with
any of `row`, `column`, `value`, `expected`, `message`.
"""

import math
from collections.abc import Mapping, Sequence
from reprlib import Repr
from typing import Any, ClassVar


class BatchserveError(Exception):
    """Base class; `code` and `status` belong to the class and never change."""

    code: ClassVar[str] = "internal-error"
    status: ClassVar[int] = 500

    def __init__(self, detail: str, *, errors: Sequence[Mapping[str, Any]] = (), **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = [dict(error) for error in errors]
        self.extra = extra

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel from scoring processes to the worker, and the default would drop the keyword arguments.
        return _rebuild, (type(self), self.detail, self.errors, self.extra)

    def to_json(self) -> dict[str, Any]:
        """The error as stored on a job: code, message and, if any, individual faults."""
        body: dict[str, Any] = {"code": self.code, "message": self.detail, **self.extra}
        if self.errors:
            body["errors"] = self.errors
        cleaned: dict[str, Any] = presentable(body)
        return cleaned


def presentable(value: Any, depth: int = 32) -> Any:
    """The value in a form that JSON can encode: an error that quotes odd input must not fail to be reported."""
    if isinstance(value, str):
        if value.isascii() and "\0" not in value:
            return value
        return value.encode(errors="backslashreplace").decode().replace("\0", "\\x00")
    if value is None or isinstance(value, bool) or (isinstance(value, int) and -(2**63) <= value < 2**64):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if depth > 0 and isinstance(value, Mapping):
        return {presentable(str(name)): presentable(part, depth - 1) for name, part in value.items()}
    if depth > 0 and isinstance(value, list | tuple):
        return [presentable(part, depth - 1) for part in value]
    return presentable(_shown.repr(value))


_shown = Repr()  # bounded, unlike `repr`, for values that are deeply nested or long


def _rebuild(
    kind: type[BatchserveError], detail: str, errors: list[dict[str, Any]], extra: dict[str, Any]
) -> BatchserveError:
    return kind(detail, errors=errors, **extra)


class BadRequest(BatchserveError):
    code, status = "bad-request", 400


class TruncatedBody(BadRequest):
    code = "truncated-body"


class Unauthorized(BatchserveError):
    code, status = "unauthorized", 401


class Forbidden(BatchserveError):
    code, status = "forbidden", 403


class CrossOrigin(Forbidden):
    code = "cross-origin"


class LocationRefused(Forbidden):
    code = "location-refused"


class NotFound(BatchserveError):
    code, status = "not-found", 404


class JobNotFound(NotFound):
    code = "job-not-found"


class ModelNotFound(NotFound):
    code = "model-not-found"


class UploadNotFound(NotFound):
    code = "upload-not-found"


class InputNotFound(NotFound):
    code = "input-not-found"


class ScheduleNotFound(NotFound):
    code = "schedule-not-found"


class WebhookNotFound(NotFound):
    code = "webhook-not-found"


class ResultNotReady(NotFound):
    code = "result-not-ready"


class NotAcceptable(BatchserveError):
    code, status = "not-acceptable", 406


class RequestTimeout(BatchserveError):
    code, status = "request-timeout", 408


class Conflict(BatchserveError):
    code, status = "conflict", 409


class JobConflict(Conflict):
    code = "job-conflict"


class ModelInUse(Conflict):
    code = "model-in-use"


class UploadIncomplete(Conflict):
    code = "upload-incomplete"


class InputChanged(Conflict):
    code = "input-changed"


class TargetExists(Conflict):
    code = "target-exists"


class Elsewhere(Conflict):
    """What a request asks for is not kept by the service: the message gives its address."""

    code = "elsewhere"


class UnreadableRow(Conflict):
    """A database row that no release of batchserve writes. It fails alone, and may be removed."""

    code = "unreadable-row"


class IdempotencyInProgress(Conflict):
    code = "idempotency-in-progress"


class Gone(BatchserveError):
    code, status = "expired", 410


class PayloadTooLarge(BatchserveError):
    code, status = "payload-too-large", 413


class UnsupportedMedia(BatchserveError):
    code, status = "unsupported-media-type", 415


class PreconditionFailed(BatchserveError):
    code, status = "precondition-failed", 412


class RangeNotSatisfiable(BatchserveError):
    code, status = "range-not-satisfiable", 416


class MisdirectedRequest(BatchserveError):
    code, status = "misdirected-request", 421


class Unprocessable(BatchserveError):
    code, status = "unprocessable", 422


class InvalidInput(Unprocessable):
    code = "invalid-input"


class SchemaMismatch(Unprocessable):
    code = "schema-mismatch"


class InvalidOptions(Unprocessable):
    code = "invalid-options"


class InvalidLocation(Unprocessable):
    code = "invalid-location"


class UnlikeInputs(Unprocessable):
    code = "unlike-inputs"


class TableMismatch(Unprocessable):
    code = "table-mismatch"


class QueryRefused(Unprocessable):
    code = "query-refused"


class ModelRefused(Unprocessable):
    code = "model-refused"


class ConversionFailed(Unprocessable):
    code = "conversion-failed"


class ParityFailed(Unprocessable):
    code = "parity-failed"


class DigestMismatch(Unprocessable):
    code = "digest-mismatch"


class DirectUploadUnsupported(Unprocessable):
    code = "direct-upload-unsupported"


class IdempotencyMismatch(Unprocessable):
    code = "idempotency-mismatch"


class ScoringFailed(BatchserveError):
    code, status = "scoring-failed", 422


class ScoringCrashed(ScoringFailed):
    code = "scoring-crashed"


class ScoringTimeout(ScoringFailed):
    code = "scoring-timeout"


class WorkerCrashed(ScoringFailed):
    code = "worker-crashed"


class OutOfMemory(ScoringFailed):
    code = "out-of-memory"


class TooManyRowErrors(ScoringFailed):
    code = "too-many-row-errors"


class NoRowScored(ScoringFailed):
    code = "no-row-scored"


class TooManyRequests(BatchserveError):
    code, status = "too-many-requests", 429


class QuotaExceeded(TooManyRequests):
    """`quota`, `limit` and `used` say of what."""

    code = "quota-exceeded"


class Unavailable(BatchserveError):
    code, status = "unavailable", 503


class InsufficientStorage(BatchserveError):
    code, status = "insufficient-storage", 507


class StorageQuotaExceeded(BatchserveError):
    """A tenant may store no more. Not of the kind above, for which jobs wait and the reserve is used."""

    code, status = "storage-quota-exceeded", 507


class LeaseLost(BatchserveError):
    code = "lease-lost"


class SchemaOutdated(BatchserveError):
    code = "schema-outdated"


class SchemaTooNew(BatchserveError):
    code = "schema-too-new"


class SchemaTooOld(BatchserveError):
    code = "schema-too-old"
