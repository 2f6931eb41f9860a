"""Structured logs: a sentence for people, fields (`action`, `job_id`, ...) for machines.

Each line of a request has its `request_id`, and so has each of a job that the request has queued.
"""

import logging
import sys
from contextlib import suppress
from typing import Any

import structlog

from batchserve import correlation


def get_logger() -> structlog.typing.FilteringBoundLogger:
    """The product's logger. `log.info("Job is completed", action="complete", job_id=...)`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


def logger_of_job(job_id: str, request_id: str | None) -> structlog.typing.FilteringBoundLogger:
    """The same for lines about one job. `request_id`: of the request that has queued it."""
    fields = {"job_id": job_id} if request_id is None else {"job_id": job_id, "request_id": request_id}
    return get_logger().bind(**fields)


def configure(format: str, level: str) -> None:
    """Sends the logs of this process to stderr: `json` lines, `console` text, or `auto`: text on a terminal."""
    as_json = format == "json" or (format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        _with_request,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    # Not through `logging`, which takes most of the time of a line: a small job has one.
    structlog.configure(
        processors=[*shared, renderer],
        logger_factory=_Lines,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _with_request(_logger: object, _method: str, fields: structlog.typing.EventDict) -> structlog.typing.EventDict:
    request_id = correlation.current().request_id
    if request_id is not None:
        fields.setdefault("request_id", request_id)
    return fields


class _Lines(structlog.WriteLogger):
    """Lines on stderr. One that cannot be written is lost, and affects nothing else."""

    def __init__(self, *_: Any) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            super().msg(message)

    debug = info = warning = error = critical = msg
