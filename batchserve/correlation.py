"""By what a line of the log, a span and a job are brought together: the ID of a request, and its place in a trace.

A request has its correlation in a context variable. It is passed on explicitly to what runs elsewhere: transactions
that several requests share, jobs, threads of the worker.
"""

import re
from contextvars import ContextVar
from dataclasses import dataclass

import uuid_utils

__all__ = ["NONE", "Correlation", "current", "enter", "parsed_traceparent", "request_id_of"]

LONGEST_ID = 128
_REQUEST_ID = re.compile(rb"[!-~]{1,%d}" % LONGEST_ID)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_LENGTH = len(f"00-{0:032x}-{0:016x}-00")


@dataclass(frozen=True, slots=True)
class Correlation:
    request_id: str | None = None
    traceparent: str | None = None
    """A span as the header of W3C Trace Context names it."""


NONE = Correlation()
"""Of what no request has asked for."""
_current: ContextVar[Correlation] = ContextVar("correlation", default=NONE)


def current() -> Correlation:
    """That of the request that is being answered."""
    return _current.get()


def enter(correlation: Correlation) -> None:
    """Sets it for the rest of a task, and for what the task starts."""
    _current.set(correlation)


def request_id_of(given: bytes | None) -> str:
    """The ID that a client gives to its request if it is well-formed: 1 to 128 visible ASCII characters. Otherwise a
    new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return str(uuid_utils.uuid7())


def parsed_traceparent(text: str | None) -> str | None:
    """The header in the form of its version 00; None for one that is invalid. A later version may have more fields."""
    if text is None or not _TRACEPARENT.match(text):
        return None
    if len(text) != _LENGTH and (text.startswith("00") or text[_LENGTH] != "-"):
        return None
    return f"00{text[2:_LENGTH]}"
