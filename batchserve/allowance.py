"""What this process may use of its host to score.

A scoring process is told when it starts, by the host that it runs on: tasks may come from another host, whose cores and
memory say nothing of this one's, so they carry none of it.
"""

from dataclasses import dataclass

__all__ = ["IMAGE_PIXELS", "Allowance", "allow", "allowance"]

IMAGE_PIXELS = 64 * 2**20
"""Of the largest image that is decoded, unless the settings say otherwise."""


@dataclass(frozen=True, slots=True)
class Allowance:
    sessions: int = 8
    """Models that the process keeps loaded."""
    image_pixels: int = IMAGE_PIXELS
    """Of the largest image that it decodes."""
    threads: int | None = None
    """Intra-op threads of a session at most; None: as many as are fastest alone. Where every core has a process at
    work, several threads in each would take turns at the cores: ResNet-18 then took 1.17 instead of 1.04 times the
    limit."""


_allowances = [Allowance()]


def allow(given: Allowance) -> None:
    """From now on this process has these."""
    _allowances[:] = [given]


def allowance() -> Allowance:
    return _allowances[0]
