"""Interactive processes whose calls and crashes are counted."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from batchserve.engines import Interactive
from batchserve.metrics import CRASHES, Metrics, Stage
from batchserve.scoring.checks import check_input
from batchserve.scoring.direct import score_directly
from batchserve.scoring.online import predict_online, predict_together

__all__ = ["Counted"]

T = TypeVar("T")

_STAGES: dict[Callable[..., Any], Stage] = {
    check_input: "check",
    score_directly: "direct",
    predict_online: "online",
    predict_together: "online",
}
"""What the metrics call the frequent functions."""


class Counted:
    """See `engines.Interactive`."""

    def __init__(self, processes: Interactive, metrics: Metrics) -> None:
        self.capacity = processes.capacity
        self._processes, self._metrics = processes, metrics

    async def run(self, function: Callable[..., T], *args: Any, seconds: float) -> T:
        began = time.perf_counter()
        try:
            outcome = await self._processes.run(function, *args, seconds=seconds)
        except CRASHES as error:
            self._metrics.count_crash("interactive", error)
            raise
        if (stage := _STAGES.get(function)) is not None:
            self._metrics.observe_stage(stage, time.perf_counter() - began)
        return outcome

    def close(self) -> None:
        self._processes.close()
