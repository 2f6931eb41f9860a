"""What makes a process a scoring process, whichever engine starts it: its limits, and what becomes of it at the end.

The limits are those of the host that scores. An engine of other hosts takes them from the settings there.
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
    """What a scoring process may take of its host. `keeps_freed`: of memory, also what it has freed; for chunk after
    chunk."""

    memory: int
    nice: int
    keeps_freed: bool
    allowance: Allowance


def scoring_limits(settings: "Settings") -> ProcessLimits:
    """Of a process for chunks on the host of the settings: its cores are shared among all that work."""
    allowance = Allowance(settings.sessions, settings.image_pixels, settings.process_threads)
    return ProcessLimits(settings.process_memory, settings.process_nice, keeps_freed=True, allowance=allowance)


def interactive_limits(settings: "Settings") -> ProcessLimits:
    """Of a process for clients that wait: as nice as the server, with as many threads as a model is fastest with."""
    allowance = Allowance(settings.sessions, settings.image_pixels)
    return ProcessLimits(settings.process_memory, nice=0, keeps_freed=False, allowance=allowance)


def prepare_process(limits: ProcessLimits) -> None:
    """Makes this process a scoring process. Runs before polars and onnxruntime are imported: they read it then."""
    os.environ["POLARS_MAX_THREADS"] = "1"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's business, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    allow(limits.allowance)
    os.nice(limits.nice)
    if sys.platform == "linux":
        if limits.keeps_freed:
            _keep_freed_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_freed_memory() -> None:
    """Chunks follow each other, and each would ask the system anew for the pages that the one before gave back: a
    tenth of the time of a CSV chunk. glibc keeps blocks of up to 32 MiB (its most) instead; others have no mallopt."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((mmap_threshold, 32), (trim_threshold, 64), (top_pad, 1)):
            mallopt(option, size * 2**20)


def _end_with_parent() -> None:
    """A server that was killed takes its scoring processes along: nobody would ever read what they score."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
