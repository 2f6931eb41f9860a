"""A scoring process for any engine: its start, its limits, its main loop and its end. The limits are those of the host
that scores; an engine of other hosts takes them from the settings there.
"""

import ctypes
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from batchserve.allowance import Allowance, allow

if TYPE_CHECKING:  # scoring processes import this module, and have no use for pydantic
    from batchserve.settings import Settings

__all__ = ["ProcessLimits", "answer_of", "cause_of_end", "interactive_limits", "scoring_limits", "start_process"]


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Resource limits of a scoring process. `retain_heap`: freed memory is kept for the next chunk."""

    nice: int
    retain_heap: bool
    allowance: Allowance


def scoring_limits(settings: "Settings") -> ProcessLimits:
    """Limits of a process for chunks on the host of the settings, which share its cores."""
    allowance = Allowance(
        settings.sessions,
        settings.image_pixels,
        settings.process_threads,
        settings.process_memory,
        settings.execution_providers,
    )
    return ProcessLimits(settings.process_nice, retain_heap=True, allowance=allowance)


def interactive_limits(settings: "Settings") -> ProcessLimits:
    """Limits of an interactive process: the niceness of the server, and the threads with which a model is fastest."""
    allowance = Allowance(
        settings.sessions, settings.image_pixels, None, settings.process_memory, settings.execution_providers
    )
    return ProcessLimits(nice=0, retain_heap=False, allowance=allowance)


def start_process(limits: ProcessLimits) -> "tuple[BaseProcess, Connection[Any, Any]]":
    """A new scoring process, and the server's end of its pipe."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    try:
        process = spawn.Process(target=_answer_calls, args=(theirs, limits), name="scoring", daemon=True)
        process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()  # or the pipe would stay open after the process has ended
    return process, ours


def cause_of_end(exitcode: int | None) -> str:
    """How a process ended, to be read after "it died"."""
    if exitcode is None:
        return "for an unknown cause"
    if exitcode < 0:
        named = -exitcode in set(signal.Signals)
        return f"by signal {signal.Signals(-exitcode).name if named else -exitcode}"
    return f"with exit code {exitcode}"


def _answer_calls(pipe: "Connection[Any, Any]", limits: ProcessLimits) -> None:
    """The main loop of a scoring process: answers calls until the server closes the pipe."""
    _prepare(limits)
    frozen = False
    with suppress(EOFError, OSError):
        while True:
            message = pipe.recv_bytes()
            outcome, error = None, None
            try:
                function, arguments = pickle.loads(message)  # noqa: S301 - from our own server
                outcome = function(*arguments)
            except Exception as raised:  # noqa: BLE001 - sent to the waiter
                error = raised
            pipe.send_bytes(answer_of(outcome, error))
            if not frozen:  # what the first call has imported stays: full collections need not walk it
                gc.freeze()
                frozen = True


def answer_of(outcome: Any, error: Exception | None) -> bytes:
    """The outcome or the error of a call, to be unpickled elsewhere."""
    try:
        answer = pickle.dumps((outcome, error))
        if error is not None:
            pickle.loads(answer)  # noqa: S301 - an error may pickle and yet not come back
    except Exception as unfit:  # noqa: BLE001 - one that cannot be pickled is sent as text
        told = error or unfit
        return pickle.dumps((None, RuntimeError(f"{type(told).__name__}: {told}")))
    return answer


def _prepare(limits: ProcessLimits) -> None:
    """Turns this process into a scoring process. Runs before the imports of polars and onnxruntime, which read the
    limits."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C, and ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    allow(limits.allowance)
    os.nice(limits.nice)
    if sys.platform == "linux":
        if limits.retain_heap:
            _retain_heap()
        if (memory := limits.allowance.memory) is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _retain_heap() -> None:
    """Otherwise each chunk would request the pages again that the previous one released: a tenth of the time of a CSV
    chunk. glibc keeps blocks of up to 32 MiB (its maximum); other C libraries have no mallopt."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((mmap_threshold, 32), (trim_threshold, 64), (top_pad, 1)):
            mallopt(option, size * 2**20)


def _end_with_parent() -> None:
    """Ends this process when its server is killed: its results could not be read."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
