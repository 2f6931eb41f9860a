"""Functions that tests call in other processes, which import them from this module by name. What only one of them needs
it imports itself: otherwise each process would take several times as long to start."""

import asyncio
import inspect
import os
import pickle
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from batchserve.errors import InvalidInput


def double(value: int) -> int:
    return 2 * value


def niceness() -> int:
    return os.nice(0)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def refuse(detail: str) -> None:
    raise InvalidInput(detail, errors=[{"row": 3, "column": "é"}], records=7)


def fail(detail: str) -> None:
    raise KeyError(detail)


class Stubborn(Exception):
    """An error that cannot be rebuilt in another process."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail_stubbornly() -> None:
    raise Stubborn("this", "that")


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


def die_with_parent() -> None:
    """Kills the process that started this one, and then itself."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(status: int) -> None:
    os._exit(status)


def answer_half(seconds: float) -> None:
    """Sends the beginning of an answer; the rest does not come, and the process ends after a while."""
    os.write(_pipe().fileno(), (1000).to_bytes(4) + bytes(500))
    time.sleep(seconds)
    os._exit(3)


def answer_rubbish() -> None:
    """Sends an answer that is none."""
    _pipe().send_bytes(b"rubbish")
    time.sleep(60)


def answer_twice(value: str) -> str:
    """Sends this value as an answer, and gives it a moment later."""
    _pipe().send_bytes(pickle.dumps((value, None)))
    time.sleep(0.2)
    return value


def hang_up() -> None:
    """Closes the pipe of this process, which continues."""
    os.close(_pipe().fileno())
    time.sleep(60)


def _pipe() -> "Connection[Any, Any]":
    """The pipe between this scoring process and its server."""
    pipes = (one.frame.f_locals.get("pipe") for one in inspect.stack(context=0))
    return next(one for one in pipes if isinstance(one, Connection))


def doubled_together(folder: Path, items: list[int | str]) -> list[int | InvalidInput]:
    """Twice each number; a word is an item that no run survives. Each run leaves a file with its number of items."""
    (folder / f"{time.monotonic_ns()}").write_text(str(len(items)))
    if "die" in items:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stall" in items:
        time.sleep(60)
    if "raise" in items:
        raise KeyError("raise")
    time.sleep(0.2)
    return [2 * item if isinstance(item, int) and item >= 0 else InvalidInput(f"{item} is no number") for item in items]


def length(content: bytes) -> int:
    return len(content)


def allocate(count: int) -> int:
    """Allocates that many bytes and touches each page of them."""
    held = bytearray(count)
    held[::4096] = b"x" * len(held[::4096])
    return len(held)


def kept_after_freeing(count: int, given_back: bool) -> int:
    """The growth of resident memory, in bytes, after that many bytes were allocated in small blocks and freed."""
    from batchserve.inference.session import trim_heap

    before = resident()
    held = [bytes(1000) for _ in range(count // 1000)]
    del held
    if given_back:
        trim_heap()
    return resident() - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def appear(path: Path, seconds: float) -> None:
    """Writes its process ID to `path` and sleeps for a while; creates a `.done` file if it was not killed meanwhile."""
    path.write_text(str(os.getpid()))
    time.sleep(seconds)
    path.with_suffix(".done").touch()


def claim_all(url: str, worker: str) -> list[str]:
    """Claims jobs until none is due; their IDs in the order of the claims."""
    from batchserve.db.connect import Database
    from batchserve.jobs import execution

    database = Database(url)
    claimed: list[str] = []
    try:
        while True:
            with database.write() as connection:
                taken = execution.claim_due(connection, worker, 30.0, database.moment(connection), 2)
            if not taken:
                return claimed
            claimed += [job.id for job in taken]
    finally:
        database.close()


def serve_calls(folder: Path) -> None:
    """An engine in a separate process, with two calls in progress; for tests that kill this process."""
    from batchserve.engines import open_engine, open_interactive
    from batchserve.settings import Settings

    settings = Settings(storage=str(folder), processes=1)
    engine = open_engine(settings)
    engine.start()
    batch = engine.submit(appear, folder / "batch", 30.0, timeout=60.0)
    signal.signal(signal.SIGINT, lambda *_: (folder / "interrupted").touch())
    asyncio.run(open_interactive(settings).run(appear, folder / "interactive", 30.0, seconds=60.0))
    batch.future.result()


if __name__ == "__main__":
    serve_calls(Path(sys.argv[1]))
