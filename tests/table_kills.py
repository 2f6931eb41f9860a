"""Ends of jobs whose process is killed around one of its exchanges with the database of a table."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import psycopg

import batchserve.postgres.load  # noqa: F401 - imported once, before the processes are forked
from batchserve.scoring.assembly import AssembleTask, assemble_result

When = Literal["before", "sent", "after"]
"""`sent`: the database has the statement, and its answer does not come."""


class Killed(Protocol):
    def __call__(self, task: AssembleTask, number: int, when: When) -> int:
        """Runs the end of a job in a process that is killed at the exchange of this number; returns its exit code."""
        ...


@contextmanager
def forking() -> Iterator[Killed]:
    """The processes are forked from one that has imported everything, and started no thread."""
    processes = get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_fork, args=(theirs,))
    process.start()

    def killed(task: AssembleTask, number: int, when: When) -> int:
        ours.send((task, number, when))
        return os.waitstatus_to_exitcode(ours.recv())

    try:
        yield killed
    finally:
        ours.send(None)
        process.join(30)


def _fork(pipe: "Connection[Any, Any]") -> None:
    while (given := pipe.recv()) is not None:
        child = os.fork()
        if not child:
            _run(*given)
            os._exit(0)
        pipe.send(os.waitpid(child, 0)[1])


def _run(task: AssembleTask, number: int, when: When) -> None:
    exchanges, wait = count(1), psycopg.Connection.wait

    def counted(self: Any, exchange: Any, *more: Any, **named: Any) -> Any:
        is_last = next(exchanges) == number
        if is_last and when == "sent":
            next(exchange, None)
        if is_last and when != "after":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = wait(self, exchange, *more, **named)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer

    psycopg.Connection.wait = counted  # type: ignore[assignment, method-assign]
    assemble_result(task)
