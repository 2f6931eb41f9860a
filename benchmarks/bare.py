"""The least that a status route could do: what polls are compared with."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def status(_request: Request) -> JSONResponse:
    return JSONResponse({"id": "01a1f7d8-3678-70be-97ac-ec0093b12b30", "state": "running", "progress": 0.5})


app = Starlette(routes=[Route("/status", status), Route("/predict", status, methods=["POST"])])
