"""The first page: a file is dropped, and becomes a job that waits for its model."""

from urllib.parse import urlencode

import orjson
from fastapi import Request, Response
from starlette.routing import Route

from batchserve.api.auth import caller_of
from batchserve.api.deps import service_of
from batchserve.api.upload import upload
from batchserve.domain import ReadOptions
from batchserve.web.jobs import latest
from batchserve.web.pages import page, see

__all__ = ["ROUTES"]

_LATEST = 5


async def home(request: Request) -> Response:
    """`model`: the one that the file is for, if that is known."""
    bodies = await latest(service_of(request), caller_of(request).tenant, _LATEST)
    return page(request, "home.html", jobs=bodies, model=request.query_params.get("model", ""))


async def receive(request: Request) -> Response:
    """Stores a file as `POST /v1/upload` does, and shows its job."""
    answer = await upload(request, service_of(request), caller_of(request), ReadOptions())
    model = request.query_params.get("model")
    chosen = f"?{urlencode({'model': model})}" if model else ""
    return see(request, f"/jobs/{orjson.loads(bytes(answer.body))['id']}{chosen}")


ROUTES = [Route("/", home), Route("/upload", receive, methods=["POST"])]
