"""The metrics of the service, by Prometheus' rules: every family with its labels and its meaning, and those that each
process counts itself.

`FAMILIES` has all that /metrics shows; docs/metrics.md, the dashboard and the alerts are compared with it. A new family
is added there. What a process counts gets a method of `Metrics`. What concerns the whole service gets a function in
`service/exposition.py`, which reads it from the database, so that every process gives the same; before rows that such a
counter counts are deleted, `jobs/totals.py` notes them. Labels have few values: never an ID, a path as it was sent, or
a name that a client chooses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from batchserve.errors import OutOfMemory, ScoringCrashed, ScoringTimeout

__all__ = ["CRASHES", "FAMILIES", "OTHER", "Family", "Metrics", "Pool", "Stage"]

Stage = Literal["read", "plan", "score", "assemble", "small", "direct", "check", "online"]
Pool = Literal["chunks", "interactive"]

CRASHES = (ScoringCrashed, ScoringTimeout, OutOfMemory)
"""The errors of a call whose process has ended."""
OTHER = "other"
"""The value of a label beyond those that it may have."""
MOST_MODELS = 100
"""Model versions that a process tells apart."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CAUSES = {ScoringCrashed: "crash", ScoringTimeout: "timeout", OutOfMemory: "memory"}

_OF_REQUESTS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_OF_WAITS = (0.01, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14_400.0, 86_400.0)
_OF_STAGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0)
_OF_CHUNKS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 60.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Family:
    """A family of series: the name, which counters and infos have with its suffix, and what its values mean."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Of a histogram: the upper bounds."""
    of: Literal["service", "process"] = "process"
    """Whose values they are. Of the whole service, every process gives the same: a query takes the maximum; those of
    processes are added."""


# --- of the service, from the database -------------------------------------------------------------------------------

JOBS = Family("batchserve_jobs", "gauge", "Stored jobs by state.", ("state",), of="service")
JOBS_ENDED = Family(
    "batchserve_jobs_ended_total",
    "counter",
    "Ends of jobs by outcome (completed, failed, cancelled), also of jobs that were deleted, expired or retried since.",
    ("outcome",),
    of="service",
)
ROWS = Family(
    "batchserve_rows_total",
    "counter",
    "Rows of jobs by outcome (ok, failed), also of jobs that were deleted since, without results that were reused.",
    ("outcome",),
    of="service",
)
QUEUE_AGE = Family(
    "batchserve_queue_oldest_age_seconds", "gauge", "Longest wait of a job that is due, 0 without one.", of="service"
)
WORKERS = Family(
    "batchserve_workers", "gauge", "Workers that have announced themselves within BATCHSERVE_LEASE.", of="service"
)
WORKER_PROCESSES = Family(
    "batchserve_worker_processes", "gauge", "Scoring processes for chunks that these workers have.", of="service"
)
MODELS = Family("batchserve_models", "gauge", "Registered models.", of="service")
MODEL_VERSIONS = Family("batchserve_model_versions", "gauge", "Versions of the registered models.", of="service")
QUOTA_USED = Family(
    "batchserve_quota_used",
    "gauge",
    "What a tenant with a quota uses: jobs, bytes, rows_per_day.",
    ("tenant", "quota"),
    of="service",
)
QUOTA_LIMIT = Family(
    "batchserve_quota_limit",
    "gauge",
    "Limits of tenants with a quota, also of requests_per_second.",
    ("tenant", "quota"),
    of="service",
)
UNREADABLE_ROWS = Family(
    "batchserve_unreadable_rows",
    "gauge",
    "Damaged rows in the latest check of all rows; batchserve doctor lists them.",
    of="service",
)

# --- of a process ----------------------------------------------------------------------------------------------------

BUILD = Family("batchserve_build_info", "info", "The release that this process runs.", ("version",))
FREE_BYTES = Family(
    "batchserve_storage_free_bytes", "gauge", "Free space for objects on this host; not of a storage in a bucket."
)
REQUIRED_BYTES = Family(
    "batchserve_storage_required_bytes",
    "gauge",
    "Free space (BATCHSERVE_FREE_BYTES) below which uploads are refused; not of a storage in a bucket.",
)
HTTP_REQUESTS = Family(
    "batchserve_http_requests_total",
    "counter",
    "Requests by route, method and class of the status; none without an answer.",
    ("route", "method", "status"),
)
HTTP_SECONDS = Family(
    "batchserve_http_request_duration_seconds",
    "histogram",
    "Time from the head of a request to the end of its answer, with the time that the client takes and waits.",
    ("route", "method"),
    _OF_REQUESTS,
)
HTTP_RECEIVED = Family(
    "batchserve_http_request_bytes_total", "counter", "Bytes of request bodies, as sent.", ("route", "method")
)
HTTP_SENT = Family(
    "batchserve_http_response_bytes_total", "counter", "Bytes of response bodies, as sent.", ("route", "method")
)
HTTP_UNDER_WAY = Family("batchserve_http_requests_in_progress", "gauge", "Requests without a complete answer.")
HTTP_REFUSALS = Family(
    "batchserve_http_refusals_total",
    "counter",
    "Requests and connections that were refused before they reached a route: malformed, too large, too many.",
    ("status",),
)
QUEUE_WAIT = Family(
    "batchserve_queue_wait_seconds",
    "histogram",
    "Time from when a job was due to its first claim, by the worker that has claimed it. Jobs that are scored within "
    "the call that submits them do not wait.",
    buckets=_OF_WAITS,
)
STAGE_SECONDS = Family(
    "batchserve_stage_duration_seconds",
    "histogram",
    "Time of a scoring process for one call, by stage: plan, score (one chunk), assemble; small (all three, of a small "
    "job); direct (the same within the calls that submit the jobs, of several at once), check (of an input), online.",
    ("stage",),
    _OF_STAGES,
)
CHUNK_SECONDS = Family(
    "batchserve_chunk_duration_seconds",
    "histogram",
    "Time of a scoring process for one chunk, by model version.",
    ("model",),
    _OF_CHUNKS,
)
CRASHED = Family(
    "batchserve_scoring_crashes_total",
    "counter",
    "Scoring processes that ended within a call, by pool (chunks, interactive) and cause: crash, timeout, memory.",
    ("pool", "cause"),
)
RESCUED = Family(
    "batchserve_jobs_rescued_total", "counter", "Jobs of workers that were lost, by the worker that has found them."
)
TICKS = Family(
    "batchserve_schedule_ticks_total",
    "counter",
    "Ticks of schedules by outcome (queued, skipped, failed), by the process that has ended them.",
    ("outcome",),
)
WEBHOOKS = Family(
    "batchserve_webhook_attempts_total",
    "counter",
    "Attempts to deliver webhooks by outcome: delivered, failed (it is tried again), given-up (the last one failed).",
    ("outcome",),
)

FAMILIES: tuple[Family, ...] = (
    JOBS, JOBS_ENDED, ROWS, QUEUE_AGE, WORKERS, WORKER_PROCESSES, MODELS, MODEL_VERSIONS,
    QUOTA_USED, QUOTA_LIMIT, UNREADABLE_ROWS,
    BUILD, FREE_BYTES, REQUIRED_BYTES,
    HTTP_REQUESTS, HTTP_SECONDS, HTTP_RECEIVED, HTTP_SENT, HTTP_UNDER_WAY, HTTP_REFUSALS,
    QUEUE_WAIT, STAGE_SECONDS, CHUNK_SECONDS, CRASHED, RESCUED, TICKS, WEBHOOKS,
)  # fmt: skip
"""All families, in the order of /metrics."""


class Metrics(Collector):
    """What one process has counted since its start. Safe from any thread, except `count_request`, which is for one
    event loop."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests_under_way = 0
        under_way = Gauge(HTTP_UNDER_WAY.name, HTTP_UNDER_WAY.help, registry=self._registry)
        under_way.set_function(lambda: self.requests_under_way)
        self._exchanges: dict[tuple[str, str, int | None], _Exchanges] = {}
        self._requests, self._request_seconds = self._counter(HTTP_REQUESTS), self._histogram(HTTP_SECONDS)
        self._received, self._sent = self._counter(HTTP_RECEIVED), self._counter(HTTP_SENT)
        self._refusals = self._counter(HTTP_REFUSALS)
        self._queue_wait = self._histogram(QUEUE_WAIT)
        stages, crashes = self._histogram(STAGE_SECONDS), self._counter(CRASHED)
        self._stages = {stage: stages.labels(stage) for stage in get_args(Stage)}
        self._chunks, self._models = self._histogram(CHUNK_SECONDS), _Bounded(MOST_MODELS)
        self._crashes = {(p, kind): crashes.labels(p, cause) for p in get_args(Pool) for kind, cause in _CAUSES.items()}
        self._rescued, ticks = self._counter(RESCUED), self._counter(TICKS)
        webhooks = self._counter(WEBHOOKS)
        self._webhooks = {outcome: webhooks.labels(outcome) for outcome in ("delivered", "failed", "given-up")}
        self._ticks = {outcome: ticks.labels(outcome) for outcome in ("queued", "skipped", "failed")}
        ProcessCollector(registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            # When a series began is of no use to Prometheus, which sees it at its first scrape.
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def count_request(
        self, route: str, method: str, status: int | None, seconds: float, received: int, sent: int
    ) -> None:
        """A request that has ended. `route`: the template of its path. `status`: None without an answer."""
        exchanges = self._exchanges.get((route, method, status)) or self._new_exchanges(route, method, status)
        exchanges.requests.inc()
        exchanges.seconds.observe(seconds)
        if received:
            exchanges.received.inc(received)
        if sent:
            exchanges.sent.inc(sent)

    def count_refusal(self, status: int) -> None:
        self._refusals.labels(str(status)).inc()

    def observe_queue_wait(self, seconds: float) -> None:
        self._queue_wait.observe(max(0.0, seconds))

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        self._stages[stage].observe(seconds)

    def observe_chunk(self, model: str, seconds: float) -> None:
        """`model`: the reference of its version."""
        self._chunks.labels(self._models.value_of(model)).observe(seconds)

    def count_crash(self, pool: Pool, error: BaseException) -> None:
        """A call that has ended with one of `CRASHES`."""
        for kind in _CAUSES:
            if isinstance(error, kind):
                self._crashes[pool, kind].inc()

    def count_rescued(self, jobs: int) -> None:
        self._rescued.inc(jobs)

    def count_tick(self, outcome: str) -> None:
        self._ticks[outcome].inc()

    def count_webhook(self, outcome: str) -> None:
        self._webhooks[outcome].inc()

    def _counter(self, family: Family) -> Counter:
        return Counter(family.name, family.help, family.labels, registry=self._registry)

    def _histogram(self, family: Family) -> Histogram:
        return Histogram(family.name, family.help, family.labels, registry=self._registry, buckets=family.buckets)

    def _new_exchanges(self, route: str, method: str, status: int | None) -> "_Exchanges":
        """Kept for methods of HTTP: a client may send any other word."""
        named, answered = method if method in _METHODS else OTHER, f"{status // 100}xx" if status else "none"
        exchanges = _Exchanges(
            self._requests.labels(route, named, answered),
            self._request_seconds.labels(route, named),
            self._received.labels(route, named),
            self._sent.labels(route, named),
        )
        if named != OTHER:
            self._exchanges[route, named, status] = exchanges
        return exchanges


@dataclass(frozen=True, slots=True)
class _Exchanges:
    """The series of requests with one route, method and status, found once: finding them takes longer than counting."""

    requests: Counter
    seconds: Histogram
    received: Counter
    sent: Counter


class _Bounded:
    """The values of a label: the first `most` ones, and OTHER for all that come later."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, None] = {}

    def value_of(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known[value] = None
        return value
