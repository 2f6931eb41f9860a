"""What all routes under /v1 do before their function is called."""

from collections.abc import Callable, Coroutine, Iterator
from functools import cached_property
from typing import Any

from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute


class Route(APIRoute):
    """Refuses query parameters that it does not document: a misspelled filter would select everything.

    Raises RequestValidationError.
    """

    @cached_property
    def query_parameters(self) -> frozenset[str]:
        """The names of those in the OpenAPI document."""
        described = (self.openapi_extra or {}).get("parameters", ())
        in_query = (one["name"] for one in described if one["in"] == "query")
        return frozenset((*_declared(self.dependant), *in_query))

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_documented(request: Request) -> Response:
            if request.scope["query_string"]:
                self._require_documented(request)
            return await handle(request)

        return handle_documented

    def _require_documented(self, request: Request) -> None:
        given = request.query_params
        unknown = [name for name in given if name not in self.query_parameters]
        if unknown:
            names = ", ".join(sorted(self.query_parameters))
            known = f"expected one of {names}" if names else "expected none"
            message = f"there is no such parameter, {known}"
            raise RequestValidationError(
                [{"type": "unknown", "loc": ("query", name), "msg": message, "input": given[name]} for name in unknown]
            )


def _declared(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for needed in dependant.dependencies:
        yield from _declared(needed)
