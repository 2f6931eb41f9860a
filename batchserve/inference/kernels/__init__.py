"""Kernels that run a model. Each gives a Session; all are verified against ONNX Runtime."""

from typing import Protocol

import numpy as np

__all__ = ["Arrays", "Session"]

Arrays = dict[str, np.ndarray]
"""Inputs or outputs of a run, by name."""


class Session(Protocol):
    """A loaded model. `run` may be called from several threads concurrently."""

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs by name. Raises ScoringFailed with the reason, and OutOfMemory."""

    def close(self) -> None:
        """Frees the model after running calls have ended. Idempotent."""
