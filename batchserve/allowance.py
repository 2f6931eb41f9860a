"""Resource limits of this process for scoring. The host of a scoring process sets them at its start: tasks carry none,
since they may come from another host with other cores and memory.
"""

from dataclasses import dataclass

from batchserve.errors import OutOfMemory

__all__ = ["IMAGE_PIXELS", "Allowance", "allow", "allowance", "out_of_memory"]

IMAGE_PIXELS = 64 * 2**20
"""Default pixels of the largest image that is decoded."""


@dataclass(frozen=True, slots=True)
class Allowance:
    sessions: int = 8
    """Models that the process keeps loaded."""
    image_pixels: int = IMAGE_PIXELS
    """Pixels of the largest image that it decodes."""
    threads: int | None = None
    """Intra-op threads of a session at most; None: as many as are fastest alone. Where every core has a busy process,
    several threads in each would compete for the cores: ResNet-18 then took 1.17 instead of 1.04 times the limit."""
    memory: int | None = None
    """Bytes that the process may allocate; None: as many as the system gives."""
    providers: tuple[str, ...] = ("cpu",)
    """Execution providers of ONNX Runtime that models may run on, the preferred first."""


_allowances = [Allowance()]


def allow(given: Allowance) -> None:
    """Sets the limits of this process."""
    _allowances[:] = [given]


def allowance() -> Allowance:
    return _allowances[0]


def out_of_memory(what: str, given: Allowance, need: int | None = None) -> OutOfMemory:
    """The error of `what` in a process of that allowance; `need`: bytes that it asked for at last, where they are
    known."""
    limit = "the system gives"
    if given.memory is not None:
        limit = f"the {given.memory:,} bytes of BATCHSERVE_PROCESS_MEMORY, the limit of a scoring process"
    asked = "" if need is None else f"; it asked for {need:,} bytes at once"
    return OutOfMemory(f"{what} needs more memory than {limit}{asked}")
