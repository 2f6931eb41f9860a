"""The domain as frozen dataclasses. Imports no other module of batchserve but `access`.

States of a job and their legal transitions:

    uploaded -> queued -> running -> completed | failed | cancelled -> expired (uploaded -> expired, too)
                  \\-> cancelled      running -> queued (released, or rescued after a crash)
                                      failed | cancelled -> queued (retry)
"""

import glob
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

from batchserve.access import DEFAULT_TENANT

Content = bytes
"""The bytes of a small object."""


class AdmissionStep(StrEnum):
    """What is done with a model that is to be admitted, in this order."""

    CHECK = "check"
    """Its graph is read, checked and mended."""
    RUN = "run"
    """It is run on a few records, which shows its signature; once more where that fails on one kind of processor."""
    MEASURE = "measure"
    """Its batch size, threads and speed."""
    STORE = "store"


class JobState(StrEnum):
    """State of a job; each is a promise to its client. An end state is written together with its event (jobs.ends)."""

    UPLOADED = "uploaded"
    """The input is stored durably. Nothing runs until a predict."""
    QUEUED = "queued"
    """Accepted durably: a worker will claim it, also after a crash or restart."""
    RUNNING = "running"
    """A worker holds the lease; committed chunks are never scored again."""
    COMPLETED = "completed"
    """The result is complete, has one row for each record, and never changes."""
    FAILED = "failed"
    """`error` says what happened; finished chunks stay downloadable with `partial=true`; retry goes on from there."""
    CANCELLED = "cancelled"
    """Stopped on request; finished chunks stay downloadable with `partial=true`."""
    EXPIRED = "expired"
    """Retention removed the bytes; the row remains."""

    @property
    def finished(self) -> bool:
        return self not in (JobState.UPLOADED, JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)  # without slots, with which a frozen object is pickled by a call for each of its fields
class Chunk:
    """A contiguous range of records: the unit of work, retry and resume.

    `start` and `stop` are positions in the input in the unit of its format: bytes for CSV, NDJSON, JSON and Arrow,
    records for Parquet, npy and npz, bytes of its directory for an archive of images.
    """

    first_record: int
    records: int
    start: int
    stop: int
    input: int = 0
    """Number of its input in the job, counted from 0."""
    inputs: int = 1
    """Beyond 1, so many whole inputs, from that one on, in one chunk: each alone would not be worth a call. `start` and
    `stop` say nothing then."""


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """Limits of a chunk: planning closes it at the first one reached, but never inside a record."""

    bytes: int = 16 * 2**20
    records: int = 131_072


@dataclass(frozen=True, slots=True)
class RowError:
    """One record that could not be scored. `record` counts from 0 in its chunk; an errors list counts in the input."""

    record: int
    code: str
    message: str
    column: str | None = None


@dataclass(frozen=True)  # without slots: see `Chunk`
class Dialect:
    """Properties of a table that its bytes do not specify."""

    delimiter: str = ","
    columns: tuple[str, ...] = ()
    """Names of the values of JSON records that are arrays, in their order. (): column_1, column_2 and so on."""
    decimal: str = "."
    """Between the whole and the fraction of a number in a CSV."""
    arrays: tuple[str, ...] = ()
    """Names of the arrays of an npz that hold the records. (): all of them."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How a client says that an input is to be read. None: as its bytes show, or as most files are."""

    delimiter: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    sheet: str | None = None


UNREAD = "queries/"
"""Begins the key of an input that is the rows of a query, until these are read."""


@dataclass(frozen=True, slots=True)
class StoredInput:
    """Bytes that a job reads. Several jobs may reference one object: it is removed with the last of them."""

    key: str
    """Key of the object in the storage, independent of the job."""
    format: str
    dialect: Dialect = Dialect()
    bytes: int | None = None
    """None: unknown until it is read, as is the digest."""
    sha256: str | None = None
    filename: str | None = None
    owned: bool = True
    """False: borrowed. The object is read, but never removed nor backed up."""
    version: str | None = None
    """Of an object that is read where its owner keeps it: tells whether it has been changed since the job was
    queued. Its key is then its address (`storage.locations`)."""
    content: Content | None = field(default=None, repr=False, compare=False)
    """Its bytes, once they are read, where the key is of a row of the database (`storage.is_in_row`)."""

    @property
    def is_unread(self) -> bool:
        """Whether it is the rows of a query that the job has not read yet: there are no bytes."""
        return self.key.startswith(UNREAD)

    @property
    def stem(self) -> str:
        """Its file name as it is shown, without the suffix."""
        return _without_suffix((self.filename or self.key).rpartition("/")[2])

    def stem_at(self, is_file: bool) -> str:
        """Its file name without the suffix, as part of an address of a file or of an object. Of an input that is read
        in place it is every byte of the name, also what is never shown."""
        stem = self.stem
        if self.version is not None:
            name = self.key.rpartition("/")[2]
            if self.key.startswith("file://"):
                stem = _without_suffix(os.fsdecode(unquote_to_bytes(name)))
            else:
                stem = _without_suffix(re.sub(r"\[([*?[])\]", r"\1", name))  # of `glob.escape`
        return quote(os.fsencode(stem)) if is_file else glob.escape(stem)


def _without_suffix(name: str) -> str:
    return name.rpartition(".")[0] or name


@dataclass(frozen=True, slots=True)
class DirectUpload:
    """An input that its client sends to the object store itself."""

    id: str
    """Also of its job, which is created when its bytes are verified."""
    tenant: str
    bytes: int
    """As announced."""
    expires_at: float
    """Seconds since the epoch."""
    multipart: str | None = None
    """The store's ID of its parts; None: it is sent by one request."""


DType = Literal["float16", "float32", "float64", "int8", "int16", "int32", "int64",
                "uint8", "uint16", "uint32", "uint64", "bool", "string"]  # fmt: skip

ColumnType = DType | Literal["image"]
"""What a column holds. An image is the bytes of a JPEG, PNG, WebP or GIF file, in texts as base64 or a data URI."""

Scalar = bool | int | float | str

Kernel = Literal["onnxruntime", "trees"]
"""What computes a model: ONNX Runtime, or the built-in tree kernel where it gives the same and is faster."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a model takes from a table, under the name that users know.

    `nullable`: the model itself gives an answer for a missing value (it has an imputer, or trees that route NaN).
    A missing number reaches it as NaN, a missing text as "".
    """

    name: str
    dtype: ColumnType
    nullable: bool = False


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes an input tensor, in this order: decode, resize, channels, scale, normalize, layout.

    Stored in a model's metadata as `batchserve.image`. Of a decoded pixel p (0 to 255) of channel i the model gets (p *
    scale - mean[i]) / std[i], where i counts the channels in `order`.
    """

    resize: Literal["stretch", "crop"] | None = None
    """stretch: to `size`. crop: the shortest side to `shortest`, then the centre of `size`. None: as decoded; a model
    with free height and width gets images of one size in each run."""
    size: tuple[int, int] | None = None
    """Height and width."""
    shortest: int | None = None
    """Of a crop; None: the shorter one of `size`."""
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bilinear"
    antialias: bool = True
    """Whether shrinking averages all pixels (Pillow, torchvision). False, bilinear or nearest: as cv2.resize does."""
    order: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    """One number for each channel, or one for all; () is 0."""
    std: tuple[float, ...] = ()
    reverse: bool = False
    """Whether the channels are reversed after normalization."""
    layout: Literal["nchw", "nhwc", "flat"] = "nchw"
    """flat: one row of values for each image, in the order height, width, channel."""
    exif: bool = False
    """Whether an image is first rotated by its EXIF orientation: cv2.imread does that, torchvision does not."""
    draft: bool = False
    """Whether a JPEG much larger than `size` is decoded at a half, a quarter or an eighth of its size: several times as
    fast, and not exactly what Pillow gives. For shrinking by averages (`antialias`), without `exif`."""


@dataclass(frozen=True, slots=True)
class Categories:
    """The values of a column that an encoder in the model knows."""

    count: int
    some: tuple[str | int | float, ...]
    """The first of them, for messages."""
    packed: str
    """All of them: a JSON list of texts or of numbers, compressed by zlib, in base64."""


@dataclass(frozen=True, slots=True)
class Domain:
    """For which values of a column the model answers like its original. Of missing ones, see `nullable`."""

    infinite: bool = True
    empty: bool = True
    """Whether the empty text is a value; otherwise it is a missing one."""
    whole: bool = False
    """Whether numbers must be whole ones."""
    low: float | None = None
    high: float | None = None
    categories: Categories | None = None
    """None: no encoder, or one that knows what to do with others."""

    @property
    def is_plain(self) -> bool:
        """Whether it limits infinite values at most."""
        return self.empty and (self.whole, self.low, self.high, self.categories) == (False, None, None, None)


@dataclass(frozen=True, slots=True)
class InputTensor:
    """One input of the ONNX graph. `shape[0]` is the record axis when `per_record`; None is a free dimension.

    `columns`: the table columns that fill it, in order: one column for [N] and [N, 1], k for [N, k]. None: they have no
    names (any k columns in file order fill [N, k]); one column that holds arrays fills it as well, at any rank.
    """

    name: str
    dtype: DType
    shape: tuple[int | None, ...]
    columns: tuple[Column, ...] | None = None
    per_record: bool = True
    """False: one value for all records, such as a threshold or a sampling rate."""
    nullable: bool = False
    """For an input without column names: whether the model itself gives an answer for NaN anywhere in it."""
    image: Preprocessing | None = None
    """How images fill this input, from one column of type image, or from an uint8 array [N, H, W, C] or [N, H, W]."""
    domains: tuple[Domain, ...] = ()
    """Of its columns, in their order; (): nothing is known, and all values are taken."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output of the ONNX graph, with the shape of a probe run (declared shapes may be wrong)."""

    name: str
    dtype: DType
    shape: tuple[int | None, ...]
    role: Literal["label", "probabilities", "scores", "value"] = "value"
    labels: tuple[str, ...] = ()
    """What the columns of axis 1 mean: classes of probabilities and scores, targets of a label or a value."""
    group: str | None = None
    """The target of a multi-output model that this output predicts; part of the column names."""
    finite: bool = False
    """Whether the original gives finite numbers only: any other answer is a row error."""


@dataclass(frozen=True, slots=True)
class ResultChanges:
    """How the result columns of a version differ from those of the one before it."""

    before: int
    """That version."""
    added: dict[str, str]
    """Column -> its type."""
    removed: dict[str, str]
    retyped: dict[str, tuple[str, str]]
    """Column -> the type before and the type now."""

    def __str__(self) -> str:
        changed = [f"{name} is {now} instead of {before}" for name, (before, now) in self.retyped.items()]
        parts = [f"adds {', '.join(self.added)}"] if self.added else []
        parts += [f"lacks {', '.join(self.removed)}"] if self.removed else []
        return f"The result has other columns than that of version {self.before}: {'; '.join(parts + changed)}."


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model version, and how it runs best. Made at admission, stored with the version. It is
    sent with every call into a scoring process, so it is pickled once, and unpickled once by each process.
    """

    inputs: tuple[InputTensor, ...]
    outputs: tuple[OutputTensor, ...]
    task: str = "unknown"
    """classification, regression, clustering, outliers, transform or unknown."""
    mode: Literal["rows", "fixed", "whole"] = "rows"
    """rows: axis 0 may be cut. fixed: every run takes exactly `batch` records. whole: one run for all records."""
    batch: int = 4096
    """Records in one ONNX Runtime call."""
    multiple: int = 1
    """In mode `rows`, runs have a multiple of so many records; the last one is repeated. Some operators give other last
    digits otherwise, and a record has the same answer online, in a small job and in a large one."""
    threads: int = 1
    """Intra-op threads of the session."""
    kernel: Kernel = "onnxruntime"
    """What runs the graph fastest where it was admitted; a host without it takes ONNX Runtime."""
    provider: str = "cpu"
    """The execution provider of ONNX Runtime on which all runs take place."""
    records_per_second: float | None = None
    """Measured at admission, at `batch` and `threads`."""
    sample: tuple[dict[str, Any], ...] = ()
    """A few records that are known to score, for examples and probe runs."""
    notes: tuple[str, ...] = ()
    """What admission changed or noticed, in sentences for the user."""
    changes: ResultChanges | None = None
    """Against the version before; None: its result has the same columns, or there is none."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """All named columns, in the order of the inputs."""
        return tuple(column for tensor in self.inputs for column in tensor.columns or ())

    @property
    def scored_on(self) -> list[str]:
        """The note of a job on its provider; none for the processor."""
        return [] if self.provider == "cpu" else [f"scored on {self.provider}"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_signature, (self._pickled,)

    @cached_property
    def _pickled(self) -> bytes:
        return pickle.dumps({field.name: getattr(self, field.name) for field in fields(self)})


@lru_cache(maxsize=64)
def _unpickled_signature(pickled: bytes) -> Signature:
    return Signature(**pickle.loads(pickled))  # noqa: S301 - from our own process


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A registered version of a model. `digest` is the SHA-256 of the artifact as uploaded."""

    id: int
    name: str
    version: int
    digest: str
    bytes: int
    signature: Signature
    metadata: dict[str, str] = field(default_factory=dict)
    """The `batchserve.*` entries of the graph and its producer."""
    created_at: float = 0.0

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a result is written, outside of the service's storage."""

    url: str
    """Address of the result. With `{stem}` there is one for each input, named after it."""
    root: str
    """The prefix, allowed by an administrator, within which it lies."""
    overwrite: bool = False
    """Whether an object of that name is replaced. Otherwise the job is refused, or fails."""
    partition_by: str | None = None
    """A column of the result: `url` is then a folder, with one of its own for each value."""

    @property
    def mark(self) -> str:
        """Begins the names of files while they are written, after what all such names begin with."""
        return ""

    @property
    def is_per_input(self) -> bool:
        return STEM in self.url

    def urls(self, inputs: "Sequence[StoredInput]") -> list[str]:
        """The address of each result, in the order of the inputs; of the only one."""
        if not self.is_per_input:
            return [self.url]
        is_file = self.url.startswith("file://")
        return [self.url.replace(STEM, one.stem_at(is_file)) for one in inputs]


@dataclass(frozen=True, slots=True)
class AttemptTarget(Target):
    """A target, as an attempt at a job writes into it."""

    job_id: str = ""
    attempt: int = 0

    @property
    def mark(self) -> str:
        return f"{self.job_id}-{self.attempt}-"


STEM = "{stem}"
"""Stands in the address of a target for the name of an input, without its suffix."""

INPUT_FILE = "input_file"
"""The column with the address of the input of each record."""


@dataclass(frozen=True, slots=True)
class TableTarget:
    """A table of a database of others, to which the rows of a result go."""

    connection: str
    """The name that an administrator has given to the database."""
    schema: str
    table: str
    mode: Literal["append", "replace"] = "append"
    """`replace`: in place of all rows that the table has."""

    @property
    def shown(self) -> str:
        return f"{self.connection}.{self.schema}.{self.table}"


@dataclass(frozen=True, slots=True)
class Query:
    """A SELECT in a database of others, whose rows are the input of a job. They are read once, when the job runs."""

    connection: str
    text: str


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a prediction, fixed when its job is queued. docs/api.md describes each for users."""

    format: str
    """Format of the result."""
    passthrough: Literal["unused", "all", "none"] | tuple[str, ...] = "unused"
    columns: tuple[str, ...] | dict[str, str] | None = None
    key: str | None = None
    on_row_error: Literal["continue", "fail"] = "continue"
    max_errors: float | None = None
    """At least 1: a count. Below 1: a share of the records."""
    top_k: int | None = None
    inputs: dict[str, Scalar] | None = None
    """Values of the inputs that are one for all records, by name."""
    input_file: bool = False
    """Whether the result has a column `input_file` with the address of the input of each record."""
    target: Target | None = None
    """None: the storage of the service."""
    archive: bool = False
    """Whether the result is a ZIP of one file for each input, named after it."""
    table: TableTarget | None = None
    query: Query | None = None

    @property
    def is_per_input(self) -> bool:
        """Whether each input has a result of its own."""
        return self.archive or (self.target is not None and self.target.is_per_input)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a job, by one worker."""

    number: int
    worker: str
    started_at: float
    finished_at: float | None = None
    outcome: str | None = None
    error: dict[str, Any] | None = None
    rows_before: int = 0
    """Rows that were done at its start."""


@dataclass(frozen=True, slots=True)
class Job:
    """A prediction of inputs by one model version, as stored in the database. Times: seconds since the epoch."""

    id: str
    state: JobState
    inputs: tuple[StoredInput, ...]
    """In the order of their records in the result; only the first, unless the job was read whole
    (`queries.get_whole`)."""
    created_at: float
    reason: str | None = None
    model: ModelVersion | None = None
    options: Options | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    priority: int = 0
    run_after: float | None = None
    webhook: str | None = None
    """The address that its end is sent to."""
    attempt: int = 0
    worker: str | None = None
    cancel_requested_at: float | None = None
    planned: bool = False
    rows_planned: int = 0
    rows_ok: int = 0
    rows_failed: int = 0
    chunks_total: int = 0
    chunks_done: int = 0
    progress: float = 0.0
    result: "Result | None" = None
    """Of a completed job."""
    reused_from: str | None = None
    request_digest: str | None = None
    error: dict[str, Any] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts about its rows besides their counts, merged from its chunks by `facts.merge_facts`."""
    queued_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    input_removed_at: float | None = None
    inputs_total: int = 1
    inputs_bytes: int | None = None
    """Of all inputs together; None: unknown before they are read."""
    tenant: str = DEFAULT_TENANT
    expires_in: float | None = None
    """Its own retention after its end, in seconds; a shorter one of the settings counts."""
    request_id: str | None = None
    """Of the request that queued it: its predict, or the latest retry."""
    upload_traceparent: str | None = None
    traceparent: str | None = None
    """The spans of its upload, and of the request that queued it."""

    @property
    def has_input(self) -> bool:
        """Whether there are the bytes of its inputs: retention has left them, and they are not to be read yet."""
        left = self.input_removed_at is None and self.state is not JobState.EXPIRED
        return left and not self.input.is_unread

    @property
    def input(self) -> StoredInput:
        """The first input; of most jobs, the only one."""
        return self.inputs[0]

    @property
    def dialect(self) -> Dialect:
        """Delimiter of the result, where its format has one."""
        return self.input.dialect

    @property
    def rows_done(self) -> int:
        return self.rows_ok + self.rows_failed

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for its user, in sentences."""
        return tuple(self.facts.get("notes", ()))


@dataclass(frozen=True)  # without slots: see `Chunk`
class ScoredChunk:
    """A scored chunk: its part has a row for each record, `rows_failed` of them null rows with an error."""

    chunk: Chunk
    rows_failed: int
    part_bytes: int
    part_sha256: str
    errors_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts about its rows: `notes`, and the `model_seconds` that they took. See `facts.merge_facts`."""


@dataclass(frozen=True, slots=True)
class CommittedChunk:
    """A chunk with its committed part, of exactly one attempt."""

    chunk: Chunk
    attempt: int
    part_bytes: int
    rows_failed: int
    errors_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)  # without slots: see `Chunk`
class Result:
    """An assembled result and its list of failed records (None when none failed).

    `sha256`: None where the storage does not know it (`Storage.compose`).
    """

    key: str
    bytes: int
    sha256: str | None
    errors_key: str | None
    errors_bytes: int
