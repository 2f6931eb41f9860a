"""Structured logs: a sentence for people, fields (`action`, `job_id`, ...) for machines."""

import logging
import sys

import structlog


def get_logger() -> structlog.stdlib.BoundLogger:
    """The product's logger. `log.info("Job is completed", action="complete", job_id=...)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger("batchserve")
    return logger


def configure(format: str, level: str) -> None:
    """Sends the logs of this process to stderr: `json` lines, `console` text, or `auto`: text on a terminal."""
    as_json = format == "json" or (format == "auto" and not sys.stderr.isatty())
    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("batchserve").setLevel(level.upper())
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
