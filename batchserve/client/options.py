"""Options of calls, as types."""

import os
from typing import Literal, TypedDict


class ReadOptions(TypedDict, total=False):
    """Options of `POST /v1/upload`: how a file is read."""

    delimiter: str
    decimal: str
    encoding: str
    sheet: str


class JobOptions(ReadOptions, total=False):
    """Options of `POST /v1/predict`; docs/api.md explains each."""

    format: str
    passthrough: str | list[str]
    columns: list[str] | dict[str, str]
    key: str
    on_row_error: str
    max_errors: float
    top_k: int
    inputs: dict[str, bool | int | float | str]
    reuse: bool
    priority: int
    run_after: str
    expires_in: str | float
    metadata: dict[str, str]
    webhook: str


class LocatedOptions(JobOptions, total=False):
    """Further options of `POST /v1/jobs`."""

    table: str
    """Where the rows of the result go: `connection.schema.name`, where the database has the name `connection`."""
    mode: Literal["append", "replace"]


class ValidateOptions(ReadOptions, total=False):
    """Options of `POST /v1/models/{name}/validate`."""

    columns: list[str] | dict[str, str]
    inputs: dict[str, bool | int | float | str]


class OnlineOptions(ValidateOptions, total=False):
    """Options of `POST /v1/models/{name}/predict`."""

    top_k: int


class PredictOptions(JobOptions, total=False):
    """Options of `predict`."""

    output: str | os.PathLike[str] | None
    """Where to save the result of a path."""
    timeout: float | None
    """Seconds to wait for the result."""
    progress: bool | None
    """Whether to show bars; None: on a terminal or in a notebook."""
    direct: bool
    """See `upload`."""


class FilesOptions(JobOptions, total=False):
    """Options of `predict_files`."""

    wait: bool
    """Whether to wait for the results; otherwise the next call saves them."""
    timeout: float | None
    """Seconds to wait for all results."""
    in_flight: int
    """Files in progress at a time; 8 by default."""
    progress: bool | None
    """Whether to show a bar; None: on a terminal or in a notebook."""
    direct: bool
    """See `upload`."""
