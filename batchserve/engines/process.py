"""Setup of a scoring process for any engine: its limits, and its end. The limits are those of the host that scores; an
engine of other hosts takes them from the settings there.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchserve.allowance import Allowance, allow

if TYPE_CHECKING:  # scoring processes import this module, and have no use for pydantic
    from batchserve.settings import Settings

__all__ = ["ProcessLimits", "interactive_limits", "prepare_process", "scoring_limits"]


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Resource limits of a scoring process. `retain_heap`: freed memory is kept for the next chunk."""

    nice: int
    retain_heap: bool
    allowance: Allowance


def scoring_limits(settings: "Settings") -> ProcessLimits:
    """Limits of a process for chunks on the host of the settings, which share its cores."""
    allowance = Allowance(
        settings.sessions, settings.image_pixels, settings.process_threads, memory=settings.process_memory
    )
    return ProcessLimits(settings.process_nice, retain_heap=True, allowance=allowance)


def interactive_limits(settings: "Settings") -> ProcessLimits:
    """Limits of an interactive process: the niceness of the server, and the threads with which a model is fastest."""
    allowance = Allowance(settings.sessions, settings.image_pixels, memory=settings.process_memory)
    return ProcessLimits(nice=0, retain_heap=False, allowance=allowance)


def prepare_process(limits: ProcessLimits) -> None:
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
