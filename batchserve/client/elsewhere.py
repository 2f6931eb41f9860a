"""Requests of jobs over inputs that the server reads where they are: addresses, and the rows of queries."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["of_query", "of_urls"]


def of_urls(
    urls: str | Sequence[str],
    model: str,
    output: str | None,
    options: Mapping[str, Any],
    *,
    overwrite: bool,
    archive: bool,
) -> dict[str, Any]:
    """The body of a job over addresses."""
    rest = dict(options)
    source: dict[str, Any] = {name: rest.pop(name) for name in ("delimiter", "decimal") if name in rest}
    body = _of({"urls": [urls] if isinstance(urls, str) else list(urls), **source}, model, rest)
    if output is not None:
        body["output"] = {"url": output, "overwrite": overwrite}
    elif archive:
        body["output"] = {"archive": True}
    return body


def of_query(query: str, connection: str, model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a job over the rows of a query."""
    return _of({"query": query, "connection": connection}, model, dict(options))


def _of(source: dict[str, Any], model: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options`: with those of the table."""
    target = {name: options.pop(name) for name in ("table", "mode") if name in options}
    return {"input": source, "model": model, **options, **({"output": target} if target else {})}
