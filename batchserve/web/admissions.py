"""The steps of registrations that are under way here, for the page that waits for one."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse
from starlette.routing import Route

from batchserve.access import Caller
from batchserve.api.auth import caller_of

__all__ = ["ROUTES", "UnderWay", "followed"]

UnderWay = dict[tuple[str, UUID], Path]
"""The file with the step of each registration, by its tenant and the ID that its page has chosen."""


def _under_way(request: Request) -> UnderWay:
    found: UnderWay = request.app.admissions
    return found


@contextmanager
def followed(request: Request, caller: Caller) -> Iterator[Path | None]:
    """A file for the steps of a registration, while it lasts; None for a page that does not ask for them, and where no
    file can be made."""
    with ExitStack() as stack:
        file = None
        with suppress(ValueError, OSError):
            key = caller.tenant, UUID(request.query_params.get("admission", ""))
            file = Path(stack.enter_context(TemporaryDirectory(prefix="batchserve-admission-"))) / "step"
            _under_way(request)[key] = file
            stack.callback(_under_way(request).pop, key, None)  # a page may have sent its ID twice
        yield file


async def show(request: Request) -> JSONResponse:
    """The step of a registration; null before the first, and once it has ended."""
    file = _under_way(request).get((caller_of(request).tenant, request.path_params["id"]))
    step = "" if file is None else await run_in_threadpool(_read, file)
    return JSONResponse({"step": step or None}, headers={"cache-control": "no-store"})


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


ROUTES = [Route("/models/admissions/{id:uuid}", show)]
