"""Errors of the client, besides those that the server names (classes of `batchserve.errors`).

BatchserveError
├── APIError                    the server refused, with a code or a status that has no class of its own
│   └── AuthenticationFailed    401 or 403: the API key is missing, wrong or too weak
├── ConnectionFailed            no answer: nothing listens there, or the connection broke too often
├── JobError                    `job` is the job
│   ├── JobFailed, JobCancelled     it ended so
│   └── WaitTimeout                 it is not finished yet and goes on
└── FilesFailed                 some of many files; `report` says which
"""

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import httpx2

from batchserve import errors
from batchserve.client.views import JobView
from batchserve.errors import BatchserveError

if TYPE_CHECKING:
    from batchserve.client.many import FilesReport

_KINDS: dict[str, type[BatchserveError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BatchserveError) and kind is not BatchserveError
}
_STANDARD = frozenset({"type", "title", "status", "detail", "code", "errors", "instance", "request_id"})


class APIError(BatchserveError):
    """A response with status 4xx or 5xx."""

    code = "api-error"

    @property
    def http_status(self) -> int:
        return int(self.extra["http_status"])

    @property
    def problem(self) -> Mapping[str, Any]:
        """The RFC 9457 problem; empty if the response had none (a proxy's page, for example)."""
        return self.extra["problem"]  # type: ignore[no-any-return]

    @property
    def request_id(self) -> str | None:
        return self.extra["request_id"]  # type: ignore[no-any-return]


class AuthenticationFailed(APIError):
    code = "authentication-failed"


class ConnectionFailed(BatchserveError):
    code = "connection-failed"


class JobError(BatchserveError):
    """The wait for a job ended without a result."""

    @property
    def job(self) -> JobView:
        """The job as last seen."""
        return self.extra["job"]  # type: ignore[no-any-return]


class JobFailed(JobError):
    code = "job-failed"

    @property
    def reason(self) -> str | None:
        """The code of what happened, such as `no-row-scored`."""
        return (self.job.error or {}).get("code")


class JobCancelled(JobError):
    code = "job-cancelled"


class WaitTimeout(JobError, TimeoutError):
    code = "wait-timeout"


class FilesFailed(BatchserveError):
    """Some of many files failed. The results of the others are saved."""

    code = "files-failed"

    @property
    def report(self) -> "FilesReport":
        return self.extra["report"]  # type: ignore[no-any-return]


def error_of(response: httpx2.Response) -> BatchserveError:
    """The error of a response with status 4xx or 5xx. The body must have been read."""
    problem = _problem(response)
    request_id = problem.get("request_id") or response.headers.get("X-Request-ID")
    detail = str(problem.get("detail") or problem.get("title") or _describe(response))
    faults = [fault for fault in problem.get("errors") or () if isinstance(fault, Mapping)]
    refused = response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
    kind = _KINDS.get(str(problem.get("code")))
    if kind is not None and not refused:
        extra = {name: value for name, value in problem.items() if name not in _STANDARD}
        return kind(detail, errors=faults, request_id=request_id, **extra)
    return (AuthenticationFailed if refused else APIError)(
        detail, errors=faults, http_status=response.status_code, problem=problem, request_id=request_id
    )


def refusal_of_store(response: httpx2.Response) -> APIError:
    """The error of an object store, which knows no problems."""
    code = re.search(r"<Code>(\w+)</Code>", response.text)
    detail = f"the object store refuses the bytes: {code[1] if code else _describe(response)}"
    return APIError(detail, http_status=response.status_code, problem={}, request_id=None)


def no_answer(server: str, failure: Exception) -> ConnectionFailed:
    reason = str(failure) or type(failure).__name__
    return ConnectionFailed(f"no response from {server}: {reason}")


def _problem(response: httpx2.Response) -> dict[str, Any]:
    if not response.headers.get("Content-Type", "").startswith(("application/problem+json", "application/json")):
        return {}
    try:
        problem = response.json()
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _describe(response: httpx2.Response) -> str:
    url = response.request.url.copy_with(query=None)
    return f"{response.request.method} {url} returned {response.status_code} {response.reason_phrase}"
