"""The ASGI application: routes, errors as problems, health, metrics, and the embedded worker."""

import base64
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve import __version__
from batchserve.api import (
    audit,
    direct_uploads,
    download,
    examples,
    intake,
    models,
    predict,
    problems,
    quotas,
    schedules,
    upload,
    webhooks,
)
from batchserve.api import jobs as job_routes
from batchserve.api.auth import ADMIN, SECURITY_SCHEMES, AuthMiddleware, Keyring, caller_of, is_public
from batchserve.api.cache import AnswerCache, CacheMiddleware
from batchserve.api.deps import PROBLEMS
from batchserve.api.events import job_events
from batchserve.api.links import add_links
from batchserve.api.origin import OriginMiddleware
from batchserve.api.plain import PlainMiddleware
from batchserve.api.schemas.problems import Problem
from batchserve.db.notifications import Hear, Notification
from batchserve.jobs import queries
from batchserve.quotas import account
from batchserve.quotas.limits import LIMITS
from batchserve.runtime import Runtime
from batchserve.schedules.actions import actions_of
from batchserve.schedules.scheduler import Scheduler
from batchserve.service import Service
from batchserve.service.following import Following
from batchserve.service.health import health_of
from batchserve.service.notifier import JobNotifier
from batchserve.settings import Settings
from batchserve.web.site import POLICIES, WebMiddleware
from batchserve.worker import Worker

_ROUTES = (upload, direct_uploads, predict, download, job_routes, intake, schedules, models, webhooks, audit, quotas)
_TAGS = ("upload", "predict", "download", "jobs", "schedules", "models", "webhooks", "audit", "quotas", "health")

DESCRIPTION = """
A file of inputs plus a model gives a file of predictions.

1. **upload** stores an input under a job ID
2. **predict** queues the job and responds at once
3. **download** gives the result, or 404 until it exists
"""


class _Application(FastAPI):
    """FastAPI with our middlewares before its own, which take longer than a plain route or a cached answer."""

    entrance: ASGIApp
    """The first middleware; the last one calls `routed`."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        await self.entrance(scope, receive, send)

    async def routed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """FastAPI alone."""
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"] |= {"Problem": Problem.model_json_schema(), **intake.SCHEMAS}
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if is_public(path) else [{name: []} for name in SECURITY_SCHEMES]
        add_links(document)
        return document


def create_app(settings: Settings | None = None, *, worker: bool = True, host: str = "127.0.0.1") -> FastAPI:
    """The service. With `worker`, a worker runs in this process group; otherwise run `batchserve worker` separately.
    `host`: the address that it listens on, which determines the accepted hosts.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with Runtime.open(settings) as runtime:
            notifier = JobNotifier(has_worker=worker)
            embedded = Worker(runtime, notifier.notify) if worker else None
            wake, stop = (embedded.wake, embedded.stop) if embedded else (_no_worker, _no_worker)
            service = Service(runtime, wake, stop, notifier)
            if embedded:
                service.worker_trouble = lambda: embedded.trouble
                service.limits = embedded.limits  # a change by the API is in force for both at once
            app.state.service = service
            app.state.scheduler = scheduler = Scheduler(runtime, actions_of(runtime), wake)
            app.state.keyring, app.state.answers = Keyring(runtime.database), AnswerCache()
            app.state.following = Following(runtime.database, settings, service.places, service.stopping, job_events)
            hearing = [hear.hear for hear in (notifier, app.state.following, embedded) if hear is not None]
            threads = [threading.Thread(target=scheduler.run, name="scheduler")]
            threads += [threading.Thread(target=embedded.run, name="worker")] if embedded else []
            for thread in threads:
                thread.start()
            try:
                with runtime.database.listening(partial(_tell_all, hearing)) as notifier.hears_others:
                    yield
            finally:
                service.stop()
                scheduler.stop()
                for thread in threads:
                    await run_in_threadpool(thread.join)

    app = _Application(
        title="batchserve", version=__version__, description=DESCRIPTION, lifespan=lifespan,
        openapi_tags=[{"name": name} for name in _TAGS],
        docs_url=None, redoc_url=None,
        redirect_slashes=False,  # a redirect would repeat the Host header
    )  # fmt: skip
    problems.install(app)
    app.add_middleware(problems.ErrorMiddleware)  # here as well: inside of Starlette's, which would answer otherwise
    plain = PlainMiddleware(app.routed, [module.router for module in _ROUTES])
    guarded = AuthMiddleware(CacheMiddleware(plain))
    pages = problems.ErrorMiddleware(WebMiddleware(guarded, app.state))
    app.entrance = OriginMiddleware(pages, settings.allowed_hosts, host, POLICIES | _add_docs(app))
    for module in _ROUTES:
        app.include_router(module.router)
    _add_health(app)
    return app


def _tell_all(hearing: Iterable[Hear], notification: Notification) -> None:
    for hear in hearing:
        hear(notification)


def _no_worker() -> None:
    """Workers of other processes poll, and stop, independently."""


def _add_docs(app: FastAPI) -> dict[str, str]:
    """Swagger at /docs with locally served files, so that it works offline. Returns its content security policy."""
    files = Path(fastapi_offline.__file__).parent / "static"
    app.mount("/docs/static", StaticFiles(directory=files), name="docs-static")

    page = get_swagger_ui_html(
        openapi_url=str(app.openapi_url),
        title=f"{app.title} {__version__}",
        swagger_js_url="/docs/static/swagger-ui-bundle.js",
        swagger_css_url="/docs/static/swagger-ui.css",
        swagger_favicon_url="/docs/static/favicon.png",
    )

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page

    return {"/docs": _docs_policy(bytes(page.body).decode())}


def _docs_policy(html: str) -> str:
    """Only local scripts and the inline one; requests only to this server; no frames."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    own = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src 'self' {own}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_health(app: FastAPI) -> None:
    @app.head("/livez", include_in_schema=False)
    @app.get(
        "/livez", tags=["health"], operation_id="livez", summary="The process responds",
        responses={200: _shown(examples.HEALTH)},
    )  # fmt: skip
    async def livez() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz", tags=["health"], operation_id="readyz", summary="Database and storage respond",
        responses={
            200: _shown(examples.READINESS),
            503: {"description": "Database or storage fails; see `checks`.", **_shown(examples.UNREADINESS)},
        },
    )  # fmt: skip
    async def readyz(request: Request) -> Response:
        service: Service = request.app.state.service
        checks = await run_in_threadpool(health_of, service)
        ready = all(state == "ok" for state in checks.values())
        body: dict[str, Any] = {"status": "ok" if ready else "unavailable", "version": __version__, "checks": checks}
        if checks["database"] == "ok":
            body["unreadable_rows"] = await run_in_threadpool(service.unreadable.count)
        return JSONResponse(body, 200 if ready else 503)

    @app.head("/metrics", include_in_schema=False, dependencies=ADMIN)
    @app.get(
        "/metrics", tags=["health"], operation_id="metrics", summary="Prometheus metrics",
        response_class=PlainTextResponse, responses={200: _shown(examples.METRICS, "text/plain"), **PROBLEMS},
        dependencies=ADMIN,
    )  # fmt: skip
    async def metrics(request: Request) -> Response:
        registry = CollectorRegistry()
        service: Service = request.app.state.service
        registry.register(_JobMetrics(service))
        text = await service.calls.read(caller_of(request).tenant, lambda: generate_latest(registry))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _shown(example: object, media_type: str = "application/json") -> dict[str, Any]:
    return {"content": {media_type: {"example": example}}}


class _JobMetrics(Collector):
    """Read from the database at each scrape, so that all processes report the same."""

    def __init__(self, service: Service) -> None:
        self._runtime, self._unreadable = service.runtime, service.unreadable

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("batchserve_build", "The running release.", {"version": __version__})
        with self._runtime.database.read() as connection:
            by_state = queries.count_by_state(connection)
            rows_ok, rows_failed = queries.count_rows(connection)
            now = self._runtime.database.moment(connection).wall
            age = queries.longest_wait(connection, now)
            usages = account.usages(connection, now)
        states = GaugeMetricFamily("batchserve_jobs", "Jobs by state.", labels=["state"])
        for state in queries.STATES:
            states.add_metric([state], by_state.get(state, 0))
        yield states
        rows = GaugeMetricFamily("batchserve_rows", "Rows of all stored jobs, by outcome.", labels=["outcome"])
        rows.add_metric(["ok"], rows_ok)
        rows.add_metric(["failed"], rows_failed)
        yield rows
        yield from quota_metrics(usages)
        yield GaugeMetricFamily("batchserve_queue_oldest_age_seconds", "Longest wait of a job that is due.", age)
        yield GaugeMetricFamily(
            "batchserve_unreadable_rows", "Damaged rows, which batchserve doctor lists.", self._unreadable.count()
        )


def quota_metrics(usages: Iterable[account.Usage]) -> Iterator[Metric]:
    """What tenants with a quota use, and their limits."""
    used = GaugeMetricFamily("batchserve_quota_used", "What a tenant with a quota uses.", labels=["tenant", "quota"])
    limit = GaugeMetricFamily("batchserve_quota_limit", "Limits of tenants.", labels=["tenant", "quota"])
    for usage in usages:
        for name, count in (("jobs", usage.jobs), ("bytes", usage.bytes), ("rows_per_day", usage.rows)):
            used.add_metric([usage.tenant, name], count)
        for name in LIMITS:
            if (most := getattr(usage.quota, name, None)) is not None:
                limit.add_metric([usage.tenant, name], most)
    yield used
    yield limit
