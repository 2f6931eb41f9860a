"""What /metrics shows: what this process has counted, and what concerns the whole service. That is read from the
database at each scrape, so that all processes give the same."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from batchserve import __version__, metrics, registry
from batchserve.db.connect import Moment
from batchserve.jobs import queries, totals, workers
from batchserve.metrics import Family
from batchserve.quotas import account
from batchserve.quotas.limits import LIMITS
from batchserve.runtime import Runtime
from batchserve.storage import free_bytes
from batchserve.upkeep.inspection import UnreadableCount

__all__ = ["Exposition"]


class Exposition:
    """All families of a process."""

    def __init__(self, runtime: Runtime, unreadable: UnreadableCount) -> None:
        self._runtime, self._unreadable = runtime, unreadable

    def text(self, accept: str, sees: Callable[[str], bool]) -> tuple[bytes, str]:
        """The series, in OpenMetrics if the Accept header asks for it, else as Prometheus' text; and the media type.
        `sees`: whether series of a tenant are for the caller. Raises Unavailable when the database does not respond:
        then a scrape fails as a whole."""
        encode, media_type = choose_encoder(accept)
        registry = CollectorRegistry()  # one for each scrape, as callers see different series
        registry.register(_Seen(lambda: self._collect(sees)))
        return encode(registry), media_type

    def _collect(self, sees: Callable[[str], bool]) -> Iterator[Metric]:
        database = self._runtime.database
        with database.read() as connection:
            now = database.moment(connection)
            found = [metric for read in _OF_SERVICE for metric in read(connection, now)]
            found += _quotas(connection, now, sees)
        yield from found
        yield _gauge(metrics.UNREADABLE_ROWS, self._unreadable.count())
        build = metrics.BUILD
        yield InfoMetricFamily(build.name.removesuffix("_info"), build.help, {"version": __version__})
        if (free := free_bytes(self._runtime.storage)) is not None:
            yield _gauge(metrics.FREE_BYTES, free)
            yield _gauge(metrics.REQUIRED_BYTES, self._runtime.settings.free_bytes)
        yield from self._runtime.metrics.collect()


class _Seen(Collector):
    def __init__(self, collect: Callable[[], Iterator[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


# --- of the service: a function for each subject, which reads a snapshot of the database -----------------------------


def _jobs(connection: Connection, now: Moment) -> Iterator[Metric]:
    found = totals.count_all(connection)
    yield _labelled(metrics.JOBS, {state: found.by_state.get(state, 0) for state in queries.STATES})
    yield _labelled(metrics.JOBS_ENDED, found.ended)
    yield _labelled(metrics.ROWS, {"ok": found.rows_ok, "failed": found.rows_failed})
    yield _gauge(metrics.QUEUE_AGE, queries.longest_wait(connection, now.wall))


def _workers(connection: Connection, now: Moment) -> Iterator[Metric]:
    living = workers.living(connection, now)
    yield _gauge(metrics.WORKERS, living.workers)
    yield _gauge(metrics.WORKER_PROCESSES, living.processes)


def _models(connection: Connection, _: Moment) -> Iterator[Metric]:
    names, versions = registry.count(connection)
    yield _gauge(metrics.MODELS, names)
    yield _gauge(metrics.MODEL_VERSIONS, versions)


def _quotas(connection: Connection, now: Moment, sees: Callable[[str], bool]) -> Iterator[Metric]:
    """What tenants with a quota use, and their limits: of those tenants that the caller sees."""
    used = GaugeMetricFamily(metrics.QUOTA_USED.name, metrics.QUOTA_USED.help, labels=metrics.QUOTA_USED.labels)
    limit = GaugeMetricFamily(metrics.QUOTA_LIMIT.name, metrics.QUOTA_LIMIT.help, labels=metrics.QUOTA_LIMIT.labels)
    for usage in account.usages(connection, now.wall):
        if not sees(usage.tenant):
            continue
        for name, count in (("jobs", usage.jobs), ("bytes", usage.bytes), ("rows_per_day", usage.rows)):
            used.add_metric([usage.tenant, name], count)
        for name in LIMITS:
            if (most := getattr(usage.quota, name, None)) is not None:
                limit.add_metric([usage.tenant, name], most)
    yield used
    yield limit


_OF_SERVICE: tuple[Callable[[Connection, Moment], Iterator[Metric]], ...] = (_jobs, _workers, _models)


def _gauge(family: Family, value: float) -> Metric:
    return GaugeMetricFamily(family.name, family.help, value)


def _labelled(family: Family, values: Mapping[str, float]) -> Metric:
    """By the only label of the family."""
    metric: CounterMetricFamily | GaugeMetricFamily
    if family.kind == "counter":
        metric = CounterMetricFamily(family.name, family.help, labels=family.labels)
    else:
        metric = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for label, value in values.items():
        metric.add_metric([label], value)
    return metric
