"""Traces by OpenTelemetry: spans of requests, and of jobs with their stages.

They are exported where the extra `[otel]` is installed and a variable of OpenTelemetry names a receiver. Otherwise
nothing of it is imported, and there are no spans.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as version_of
from typing import TYPE_CHECKING, Any, Literal

from batchserve.correlation import parsed_traceparent
from batchserve.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

__all__ = ["Span", "begin", "exporting", "is_on"]

log = get_logger()

Kind = Literal["internal", "server", "consumer"]

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_LAST_EXPORT = 5.0
"""Seconds that the end of a process waits for a receiver."""

_tracer: "trace.Tracer | None" = None
"""None: traces are off."""


def is_on() -> bool:
    return _tracer is not None


@contextmanager
def exporting() -> Iterator[None]:
    """Exports the spans of this process while a block runs, if that is configured and installed. What is wrong with
    that is a line of the log: variables of OpenTelemetry are often set for all programs of a host."""
    global _tracer  # noqa: PLW0603 - of this process, as its log is
    provider = _provider() if _is_configured(os.environ) else None
    if provider is None:
        yield
        return
    _tracer = provider.get_tracer("batchserve", version_of("batchserve"))
    try:
        yield
    finally:
        _tracer = None
        # Not for as long as a receiver takes that does not respond.
        last = threading.Thread(target=provider.shutdown, name="last-export", daemon=True)
        last.start()
        last.join(_LAST_EXPORT)


class Span:
    """A span that has begun."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: "trace.Span") -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
        """By which others refer to it."""

    def end(self, *, name: str | None = None, error: str | None = None, **attributes: str | float | None) -> None:
        """`name`: a better one, known by now. `attributes`: those that are None are omitted; a `__` in a name is a
        point."""
        from opentelemetry.trace import StatusCode

        if name is not None:
            self._span.update_name(name)
        self._span.set_attributes(_present(attributes))
        if error is not None:
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


def begin(
    name: str,
    kind: Kind = "internal",
    *,
    parent: str | None = None,
    links: Iterable[str | None] = (),
    **attributes: str | float | None,
) -> Span | None:
    """A new span; None where traces are off. `parent`, `links`: traceparents, of which invalid ones are ignored.
    `attributes`: as those of `Span.end`."""
    if _tracer is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context

    context, above = Context(), _context_of(parent)
    if above is not None:
        context = trace.set_span_in_context(trace.NonRecordingSpan(above), context)
    linked = [trace.Link(found) for found in map(_context_of, dict.fromkeys(links)) if found is not None]
    kinds = {
        "internal": trace.SpanKind.INTERNAL,
        "server": trace.SpanKind.SERVER,
        "consumer": trace.SpanKind.CONSUMER,
    }
    return Span(_tracer.start_span(name, context, kinds[kind], _present(attributes), linked))


def _context_of(traceparent: str | None) -> "trace.SpanContext | None":
    from opentelemetry import trace

    text = parsed_traceparent(traceparent)
    if text is None:
        return None
    _, trace_id, span_id, flags = text.split("-")
    # Only whether it is sampled: further flags say nothing about the spans that follow.
    sampled = trace.TraceFlags(int(flags, 16) & trace.TraceFlags.SAMPLED)
    return trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=sampled)


def _present(attributes: Mapping[str, str | float | None]) -> dict[str, str | float]:
    return {name.replace("__", "."): value for name, value in attributes.items() if value is not None}


def _is_configured(environment: Mapping[str, str]) -> bool:
    """Whether the variables of OpenTelemetry ask for an export of traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip() not in ("", "otlp"):
        return False
    return any(environment.get(name, "").strip() for name in _ENDPOINTS)


def _provider() -> "TracerProvider | None":
    """The spans of a process, sent in batches by a thread. The SDK reads its variables itself."""
    chosen = next((value for name in _PROTOCOLS if (value := os.environ.get(name, "").strip())), _PROTOCOL)
    if chosen != _PROTOCOL:
        log.warning("Traces are not exported", action="tracing_off",
                    reason=f"expected the OTLP protocol {_PROTOCOL}, got {chosen!r}")  # fmt: skip
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("Traces are not exported", action="tracing_off", reason="the extra [otel] is not installed")
        return None
    resource: Any = Resource.create({SERVICE_VERSION: version_of("batchserve")})
    if str(resource.attributes.get(SERVICE_NAME, "unknown_service")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "batchserve"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("Traces are exported", action="tracing_on", service=resource.attributes[SERVICE_NAME])
    return provider
