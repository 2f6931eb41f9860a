"""Limits of the chunks of a job."""

from dataclasses import replace
from math import ceil

from batchserve.domain import ChunkLimits, ModelVersion
from batchserve.formats import FORMATS
from batchserve.settings import Settings

__all__ = ["SMALL_JOB_BYTES", "UNLIMITED", "chunk_limits", "even_limits"]

UNLIMITED = 2**62
_MIN_CHUNK_BYTES = 4 * 2**20
"""Least bytes of a chunk that justify a separate call and part."""
_IMAGES = 256
"""Most images in a chunk: those of 32 x 32 pixels take a process a tenth of a second, photographs half a second."""
_SLACK = 16 * 2**10
"""Slack of a chunk, which ends before the record that exceeds its limit: the remainders must not add up to another
chunk."""
SMALL_JOB_BYTES = 2**20
"""Input bytes up to which a job is done in one call and one transaction; each more would cost more than its scoring."""


def chunk_limits(settings: Settings, model: ModelVersion, input_format: str) -> ChunkLimits:
    """Chunk limits for a model: slow models get few records, a model that must see all records gets all. Formats that
    take less memory per byte than text get more (`Format.chunk_scale`). Images take much longer to decode than other
    values to read, whatever the model: small chunks of them keep all processes busy.
    """
    if model.signature.mode == "whole":
        return ChunkLimits(bytes=UNLIMITED, records=UNLIMITED)
    times = FORMATS[input_format].chunk_scale
    records = times * settings.chunk_records
    if model.signature.records_per_second is not None:
        records = min(records, max(1, int(model.signature.records_per_second * settings.chunk_seconds)))
    if any(tensor.image is not None for tensor in model.signature.inputs):
        records = min(records, _IMAGES)
    return ChunkLimits(bytes=times * settings.chunk_bytes, records=records)


def even_limits(limits: ChunkLimits, input_format: str, input_bytes: int) -> ChunkLimits:
    """The limits under which a text is cut into chunks of one size, in a number that most numbers of processes divide.

    So all processes end at the same time: with three chunks for two processes, one would idle during the third. A chunk
    is never too small to justify a separate call and part. The chunks depend on nothing but the input and the limits:
    a result in Parquet has a row group for each, and must not depend on where it was made.
    """
    if not FORMATS[input_format].is_text or limits.bytes <= _MIN_CHUNK_BYTES or limits.bytes == UNLIMITED:
        return limits
    even = ceil(input_bytes / _divisible(ceil(input_bytes / (limits.bytes - _SLACK)))) + _SLACK
    return replace(limits, bytes=max(_MIN_CHUNK_BYTES, even))


def _divisible(chunks: int) -> int:
    """The next of 2, 4, 8, 12, 16, 24, 32, 48, 64 and so on. These are a sixth more on average; a call and a part take
    an eighth of the time of a full chunk."""
    power = 1 << max(1, (chunks - 1).bit_length())
    return power * 3 // 4 if power > 8 and chunks <= power * 3 // 4 else power
