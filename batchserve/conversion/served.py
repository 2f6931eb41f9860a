"""What a server would answer: a graph is admitted, and records take the way of a chunk through it."""

import io
from typing import TYPE_CHECKING, Any

import polars as pl

from batchserve.admission import admit
from batchserve.domain import ChunkLimits, ModelVersion, Options, Signature
from batchserve.errors import BatchserveError, ConversionFailed
from batchserve.formats import get_format
from batchserve.inference.answers import Scored, score
from batchserve.inference.matching import match_input
from batchserve.inference.session import open_session

if TYPE_CHECKING:
    import pandas

__all__ = ["Served", "as_polars"]


class Served:
    """A graph as a server runs it. Raises ConversionFailed where that would refuse it."""

    def __init__(self, graph: bytes, *, named: bool = True) -> None:
        self._named = named
        try:
            admitted = admit(graph, tuned=False)
            self._session = open_session(admitted.model)
        except BatchserveError as error:
            raise ConversionFailed(f"A server would refuse the graph: {error.detail}") from error
        self._model = ModelVersion(0, "model", 1, "", len(graph), admitted.signature)

    @property
    def signature(self) -> Signature:
        return self._model.signature

    def score(self, table: pl.DataFrame) -> Scored:
        """The records read as an Arrow file, checked, scored and judged, as in a job."""
        source = io.BytesIO()
        table.rechunk().write_ipc(source)
        format = get_format("arrow")
        match = match_input(
            format.header(source),
            self._model,
            Options("arrow", "none", columns=None if self._named else tuple(table.columns)),
        )
        chunk = next(iter(format.plan(source, None, ChunkLimits(bytes=2**62, records=2**62))))
        reading, _ = match.read(format, source, chunk)
        return score(self._session, match, reading, table.height, lambda: False)


def as_polars(frame: "pandas.DataFrame") -> pl.DataFrame:
    """A frame as a client would send it: a missing value is a null, in whatever column."""
    return pl.DataFrame([_series(str(name), frame[name]) for name in frame.columns])


def _series(name: str, series: "pandas.Series[Any]") -> pl.Series:
    if series.dtype.kind in "iufb" and not hasattr(series.dtype, "numpy_dtype"):
        return pl.Series(name, series.to_numpy(), nan_to_null=True)
    values = series.astype(object).where(series.notna(), None).tolist()
    return pl.Series(name, values, strict=False)
