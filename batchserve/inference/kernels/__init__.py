"""What computes a model. Each kernel gives a Session; those beside ONNX Runtime were proved to give its answers."""

from typing import Protocol

import numpy as np

__all__ = ["Arrays", "Session"]

Arrays = dict[str, np.ndarray]
"""Inputs or outputs of a run, by name."""


class Session(Protocol):
    """A loaded model. `run` may be called from several threads at once."""

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs by name. Raises ScoringFailed with the reason, and OutOfMemory."""

    def close(self) -> None:
        """Frees the model; runs that are under way end first. Closing twice does no harm."""
