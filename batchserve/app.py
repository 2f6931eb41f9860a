"""The ASGI application: routes, errors as problems, health, metrics, and the embedded worker."""

import base64
import hashlib
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from batchserve import __version__, tracing
from batchserve.api import (
    audit,
    direct_uploads,
    download,
    examples,
    intake,
    job_list,
    models,
    predict,
    predict_uploaded,
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
from batchserve.api.measured import MeasuringMiddleware, templates_of
from batchserve.api.origin import OriginMiddleware
from batchserve.api.plain import PlainMiddleware
from batchserve.api.requests import RequestMiddleware
from batchserve.api.schemas.health import HealthBody, ReadinessBody
from batchserve.api.schemas.problems import Problem
from batchserve.db.notifications import Hear, Notification
from batchserve.metrics import Metrics
from batchserve.quotas.limits import Limits
from batchserve.runtime import Runtime
from batchserve.schedules.actions import actions_of
from batchserve.schedules.scheduler import Scheduler
from batchserve.service import Service
from batchserve.service.exposition import Exposition
from batchserve.service.following import Following
from batchserve.service.health import health_of
from batchserve.service.notifier import JobNotifier
from batchserve.settings import Settings
from batchserve.upkeep.inspection import UnreadableCount
from batchserve.web.site import POLICIES, ROUTES, WebMiddleware
from batchserve.worker import Worker

_ROUTES = (
    upload, direct_uploads, predict, predict_uploaded, download, job_list, job_routes, intake, schedules, models,
    webhooks, audit, quotas,
)  # fmt: skip
_TAGS = ("upload", "predict", "download", "jobs", "schedules", "models", "webhooks", "audit", "quotas", "health")
_READ = Callable[[Request], Awaitable[tuple[bytes, str]]]
"""Reads what /metrics shows, and its media type."""
_METRICS = {
    "content": {
        "text/plain": {"example": examples.METRICS},
        "application/openmetrics-text": {"schema": {"type": "string"}},
    }
}

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
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with tracing.exporting(), Runtime.open(settings, metrics) as runtime:
            notifier = JobNotifier(has_worker=worker)
            embedded = Worker(runtime, notifier.notify) if worker else None
            wake, stop = (embedded.wake, embedded.stop) if embedded else (_no_worker, _no_worker)
            service = Service(runtime, wake, stop, notifier)
            if embedded:
                service.worker_trouble = lambda: embedded.trouble
                service.limits = embedded.limits  # a change by the API is in force for both at once
            app.state.service, app.state.limits = service, service.limits
            app.state.scheduler = scheduler = Scheduler(runtime, actions_of(runtime), wake)
            app.state.exposition = Exposition(runtime, service.unreadable)
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
    app.state.metrics = metrics
    problems.install(app)
    app.add_middleware(problems.ErrorMiddleware)  # here as well: inside of Starlette's, which would answer otherwise
    plain = PlainMiddleware(app.routed, [module.router for module in _ROUTES])
    pages = problems.ErrorMiddleware(WebMiddleware(AuthMiddleware(CacheMiddleware(plain)), app.state))
    guarded = OriginMiddleware(pages, settings.allowed_hosts, host, POLICIES | _add_docs(app))
    for module in _ROUTES:
        app.include_router(module.router)
    _add_livez(app)
    _add_readyz(app)
    _add_metrics(app, _read_in_turn)
    measured = MeasuringMiddleware(guarded, metrics, templates_of([*app.routes, *ROUTES]))
    app.entrance = RequestMiddleware(measured, settings.access_log, settings.log_level)
    return app


def create_metrics_app(runtime: Runtime, host: str) -> FastAPI:
    """What a worker without a server answers: that it lives, and its metrics. For the same keys and hosts as a server.
    `host`: as for `create_app`.
    """
    settings = runtime.settings
    app = _Application(
        title="batchserve worker", version=__version__, openapi_url=None, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    problems.install(app)
    app.add_middleware(problems.ErrorMiddleware)
    app.state.keyring, app.state.limits = Keyring(runtime.database), Limits(runtime.database)
    app.state.exposition = Exposition(runtime, UnreadableCount(runtime.database))
    _add_livez(app)
    _add_metrics(app, _read_in_a_thread)
    guarded = problems.ErrorMiddleware(AuthMiddleware(app.routed))
    origin = OriginMiddleware(guarded, settings.allowed_hosts, host)
    measured = MeasuringMiddleware(origin, runtime.metrics, templates_of(app.routes))
    app.entrance = RequestMiddleware(measured, settings.access_log, settings.log_level)
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


def _add_livez(app: FastAPI) -> None:
    @app.head("/livez", include_in_schema=False)
    @app.get(
        "/livez", tags=["health"], operation_id="get_liveness", summary="The process responds",
        response_model=HealthBody,
        responses={200: _shown(examples.HEALTH)},
    )  # fmt: skip
    async def livez() -> dict[str, str]:
        return {"status": "ok", "version": __version__}


def _add_readyz(app: FastAPI) -> None:
    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz", tags=["health"], operation_id="get_readiness", summary="Database and storage respond",
        response_model=ReadinessBody,
        responses={
            200: _shown(examples.READINESS),
            503: {
                "model": ReadinessBody,
                "description": "Database or storage fails; see `checks`.",
                **_shown(examples.UNREADINESS),
            },
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


def _add_metrics(app: FastAPI, read: _READ) -> None:
    @app.head("/metrics", include_in_schema=False, dependencies=ADMIN)
    @app.get(
        "/metrics", tags=["health"], operation_id="get_metrics", summary="Prometheus metrics",
        response_class=PlainTextResponse, responses={200: _METRICS, **PROBLEMS},
        dependencies=ADMIN,
    )  # fmt: skip
    async def metrics(request: Request) -> Response:
        text, media_type = await read(request)
        return Response(text, media_type=media_type)


async def _read_in_turn(request: Request) -> tuple[bytes, str]:
    """In the turn of the caller: what the database is asked for takes as long as a list."""
    service: Service = request.app.state.service
    return await service.calls.read(caller_of(request).tenant, partial(_read, request))


async def _read_in_a_thread(request: Request) -> tuple[bytes, str]:
    return await run_in_threadpool(_read, request)


def _read(request: Request) -> tuple[bytes, str]:
    exposition: Exposition = request.app.state.exposition
    return exposition.text(request.headers.get("accept", ""), caller_of(request).administers)


def _shown(example: object) -> dict[str, Any]:
    return {"content": {"application/json": {"example": example}}}
