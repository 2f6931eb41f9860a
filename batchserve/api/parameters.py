"""Query parameters that no route documents are refused: a misspelled filter would select everything."""

from collections.abc import Iterator

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute


def require_documented(request: Request) -> None:
    """Raises RequestValidationError for query parameters that the OpenAPI document does not have for this route."""
    route, given = request.scope["route"], request.query_params
    if (known := _known.get(route.unique_id)) is None:
        known = _known[route.unique_id] = _documented(route)
    unknown = [name for name in given if name not in known]
    if unknown:
        expected = f"expected one of {', '.join(sorted(known))}" if known else "expected none"
        message = f"there is no such parameter, {expected}"
        raise RequestValidationError(
            [{"type": "unknown", "loc": ("query", name), "msg": message, "input": given[name]} for name in unknown]
        )


_known: dict[str, frozenset[str]] = {}
"""The names of the parameters of each route that was called."""


def _documented(route: APIRoute) -> frozenset[str]:
    described = (route.openapi_extra or {}).get("parameters", ())
    return frozenset((*_declared(route.dependant), *(one["name"] for one in described if one["in"] == "query")))


def _declared(dependant: Dependant) -> Iterator[str]:
    yield from (field.alias for field in dependant.query_params)
    for needed in dependant.dependencies:
        yield from _declared(needed)
