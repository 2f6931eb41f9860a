"""The faults of a response, or of the outcome of a job. Every sentence is a finding."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from batchserve.web.site import is_page
from fuzz import account
from fuzz.case import Case, Claim, Step
from fuzz.wire import Answer

Job = Mapping[str, Any]
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT")
ENDED = ("completed", "failed", "cancelled", "expired")
_CODE = re.compile(r"[a-z]+(-[a-z0-9]+)*")
_OURS = ("internal-error", "lease-lost", "schema-outdated", "schema-too-new", "schema-too-old")
_SECRETS = (b"Traceback (most", b"site-packages", b"sqlalchemy", b"[SQL:")
_BUSY = {503: "unavailable", 507: "insufficient-storage"}


def of_answer(step: Step, answer: Answer) -> Iterator[str]:
    if not answer.status:
        if not step.raw:
            yield f"no answer ({answer.failure})"
        return
    if answer.failure:
        yield f"the answer is cut off ({answer.failure})"
    if step.must and answer.status not in (*step.must, 500, 503):
        yield f"{answer.status}, and {' or '.join(map(str, step.must))} is right"
    if answer.status >= 400:
        yield from _of_problem(step, answer)
    elif answer.media_type == "application/json" and "/download/" not in step.target:
        yield from _of_body(answer)
    yield from (f"the answer tells {secret.decode()!r}" for secret in _SECRETS if secret in answer.body)


def _of_problem(step: Step, answer: Answer) -> Iterator[str]:
    problem = parsed(answer.body) if answer.media_type == "application/problem+json" else None
    code = problem.get("code") if isinstance(problem, dict) else None
    if answer.status >= 500:
        if not _is_by_the_book(step, answer, code):
            yield f"{answer.status} {code}"
        return
    if step.method == "HEAD" or step.raw:  # an invalid head is not answered by the application
        return
    if answer.media_type.startswith("text/html") and is_page(urlsplit(step.target).path):
        if b"<h1>" not in answer.body:
            yield f"{answer.status} with an unfinished page: {answer.body[-200:]!r}"
        return
    if not isinstance(problem, dict) or problem.get("status") != answer.status or not problem.get("detail"):
        yield f"{answer.status} without a problem: {answer.media_type} {answer.body[:200]!r}"
    elif not isinstance(code, str) or not _CODE.fullmatch(code) or code in _OURS:
        yield f"an error without a name: {code}"


def _is_by_the_book(step: Step, answer: Answer, code: object) -> bool:
    if answer.status in _BUSY:
        return "retry-after" in answer.headers and (step.method == "HEAD" or code == _BUSY[answer.status])
    if answer.status == 501:
        return bool(step.raw) or step.method not in METHODS
    return answer.status == 505 and bool(step.raw)


def _of_body(answer: Answer) -> Iterator[str]:
    """The response must be JSON that strict readers can read, without an error of the server."""
    try:
        body = json.loads(answer.body, parse_constant=account._refuse)  # noqa: SLF001
        json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        if answer.body:
            yield f"the JSON of the answer cannot be read: {error}"
        return
    for entry in body.get("errors") or () if isinstance(body, dict) else ():
        yield from _of_error(entry)


def _of_error(error: Any) -> Iterator[str]:
    code = error.get("code") if isinstance(error, dict) else None
    if code is not None and (code in _OURS or not _CODE.fullmatch(str(code))):
        yield f"a record's error is {code}: {str(error.get('message'))[:200]}"


def of_online(claim: Claim, answer: Answer) -> Iterator[str]:
    """The counts of an online prediction."""
    if answer.status != 200:
        if not claim.refusable and answer.status != 503:
            yield f"refused, and its records are good: {answer.status} {answer.body[:300]!r}"
        return
    body = parsed(answer.body) or {}
    rows, errors = body.get("prediction", []), body.get("errors", [])
    if claim.total is not None and len(rows) != claim.total:
        yield f"{len(rows)} records are answered, {claim.total} were sent"
    yield from _of_failed(claim, {error["record"] for error in errors})
    yield from _of_rows(claim, rows)


def of_job(case: Case, job: Job, sent: bytes, result: Answer | None, errors: Answer | None) -> Iterator[str]:
    """The counts of a job that has ended, with its input and its downloads."""
    claim = case.claim or Claim()
    if job["state"] == "failed":
        code = (job["error"] or {}).get("code")
        if not isinstance(code, str) or not _CODE.fullmatch(code) or code in (*_OURS, "worker-crashed"):
            yield f"the job failed by {code}: {str(job['error'])[:300]}"
        if not claim.refusable and claim.total is not None:
            yield f"the job failed, and its records are good: {str(job['error'])[:300]}"
    if job["state"] != "completed":
        return
    rows = job["rows"]
    if rows["total"] is None or rows["ok"] + rows["failed"] != rows["total"]:
        yield f"the account does not add up: {rows}"
    yield from _of_total(claim, job, sent)
    if job["result"]["rows"] != rows["total"]:
        yield f"the result has {job['result']['rows']} rows by its resource, the job {rows['total']}"
    if errors is not None and errors.status == 200:
        yield from _of_errors(claim, job, errors)
    if result is not None and result.status == 200:
        yield from _of_result(claim, job, result)
    elif result is not None:
        yield f"the result of a completed job: {result.status} {result.failure} {result.body[:200]!r}"


def _of_total(claim: Claim, job: Job, sent: bytes) -> Iterator[str]:
    total, format = job["rows"]["total"], job["input"]["format"]
    if claim.total is not None and total != claim.total:
        yield f"{total} records by the job, {claim.total} were sent"
    counted = account.count(format, sent, claim.delimiter) if sent else None
    if counted == account.UNREADABLE:
        yield f"completed with {total} records, and the input ends within quotation marks"
    elif counted is not None and counted != total:
        yield f"{total} records by the job, {counted} in the {format} input"


def _of_errors(claim: Claim, job: Job, answer: Answer) -> Iterator[str]:
    errors = [json.loads(line) for line in answer.body.splitlines()]
    failed = {error["record"] for error in errors}
    if len(failed) != job["rows"]["failed"]:
        yield f"{len(failed)} records in the errors, {job['rows']['failed']} failed by the job"
    if any(not 0 <= record < job["rows"]["total"] for record in failed):
        yield f"an error of a record that is not there: {max(failed)}"
    yield from _of_failed(claim, failed)
    for error in errors:
        yield from _of_error(error)


def _of_failed(claim: Claim, failed: set[int]) -> Iterator[str]:
    if claim.failed is not None and failed != set(claim.failed):
        missed, more = sorted(set(claim.failed) - failed), sorted(failed - set(claim.failed))
        yield f"records {missed[:5]} had to fail and did not, {more[:5]} failed and are good"


def _of_result(claim: Claim, job: Job, answer: Answer) -> Iterator[str]:
    total, format = job["rows"]["total"], job["result"]["format"]
    try:
        rows = account.rows_of(format, answer.body, claim.delimiter)
    except Exception as error:  # noqa: BLE001 - readers of six formats have as many ways to say no
        yield f"the {format} result cannot be read: {type(error).__name__}: {error}"
        return
    number = rows if isinstance(rows, int) else len(rows)
    if number != total and not (number == 0 and not isinstance(rows, int) and not answer.body):
        yield f"{number} rows in the {format} result, {total} records by the job"
    if not isinstance(rows, int):
        yield from _of_rows(claim, rows)


def _of_rows(claim: Claim, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Every record must be in its place, with its own prediction, or none if it failed."""
    failed = set(claim.failed or ())
    if not claim.answers or len(rows) != claim.total:
        return
    for place, row in enumerate(rows):
        said = row.get("prediction")
        if place in failed:
            if said not in (None, ""):
                yield f"record {place} failed and has an answer: {said}"
                return
            continue
        identity = str(row.get("id"))
        if identity != str(place) or claim.answers.get(identity) != said:
            yield f"row {place}: {said!r} for id {identity}, and {claim.answers.get(str(place))!r} is right"
            return


def parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
