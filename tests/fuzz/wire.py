"""One request over a new socket, written byte by byte, so that no client library corrects it."""

import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse

from fuzz.case import Step

SECONDS = 75.0
"""Seconds in which any request must be answered."""
RAW_SECONDS = 2.0
MOST = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    """The status; 0: there was no response."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    failure: str = ""
    """The reason why there is no response, or an incomplete one."""

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]


def send(step: Step, port: int, keys: dict[str, str], job: str) -> Answer:
    pieces = _pieces(step, port, keys, job)
    patience = RAW_SECONDS if step.raw else SECONDS
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
            with suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
                for number, piece in enumerate(pieces):
                    if number:
                        time.sleep(0.02)
                    connection.sendall(piece)
            return _read(connection, step)
    except OSError as error:
        return Answer(0, failure=f"{type(error).__name__}: {error}")


def _pieces(step: Step, port: int, keys: dict[str, str], job: str) -> list[bytes]:
    if step.raw:
        return [piece.replace(b"{key}", keys["blue"].encode()) for piece in step.raw]
    target = step.target.replace("{job}", job)
    headers = [("host", f"127.0.0.1:{port}"), ("connection", "close"), *step.headers]
    if step.tenant:
        headers.append(("authorization", f"Bearer {keys[step.tenant]}"))
    if step.body or step.method in ("POST", "PUT"):
        headers.append(("content-length", str(len(step.body))))
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return [f"{step.method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + step.body]


def _method(raw: Sequence[bytes]) -> str:
    """The method of the first of raw requests: the response to HEAD has the length of a body, but no body."""
    return b"".join(raw).lstrip().partition(b" ")[0].decode("latin-1")


def _read(connection: socket.socket, step: Step) -> Answer:
    response = HTTPResponse(connection, method=step.method or _method(step.raw))
    try:
        response.begin()
    except (HTTPException, OSError, ValueError) as error:
        return Answer(0, failure=f"{type(error).__name__}: {error}")
    headers = {name.lower(): value for name, value in response.getheaders()}
    if step.seconds:
        connection.settimeout(step.seconds)
        body = b""
        with suppress(OSError, HTTPException):
            body = response.read1(MOST)
        return Answer(response.status, headers, body)
    try:
        return Answer(response.status, headers, response.read(MOST))
    except (HTTPException, OSError, ValueError) as error:
        return Answer(response.status, headers, failure=f"{type(error).__name__}: {error}")
