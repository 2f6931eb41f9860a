"""Lists: their filters as queries, and their pages."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypedDict

from batchserve.client.transport import Request, Transport, query

Moment = datetime | timedelta | str
"""A time; an age, as a timedelta or a text such as 7d; a date."""
_TIMES = ("since", "until", "finished_since", "finished_until")


class JobFilters(TypedDict, total=False):
    """Parameters of `GET /v1/jobs`; docs/api.md explains each. None is no filter."""

    state: str | Sequence[str] | None
    """One or several."""
    model: str | None
    q: str | None
    since: Moment | None
    until: Moment | None
    finished_since: Moment | None
    finished_until: Moment | None


def jobs_query(wanted: Mapping[str, Any]) -> dict[str, Any]:
    states: Any = wanted.get("state")
    several = states is not None and not isinstance(states, str)
    times = {name: _moment(wanted[name]) for name in _TIMES if wanted.get(name) is not None}
    return query({**wanted, "state": ",".join(states) if several else states, **times})


async def each_item(
    transport: Transport, path: str, params: Mapping[str, Any], name: str
) -> AsyncGenerator[dict[str, Any]]:
    """What all pages of a list have under this name; each page is fetched when it is needed."""
    after = None
    while True:
        page = await transport.json(Request(method="GET", path=path, params={**params, **query({"after": after})}))
        for item in page[name]:
            yield item
        after = page.get("next")
        if after is None:
            return


def _moment(value: Moment) -> str:
    """Without a zone, a time is of this machine's."""
    if isinstance(value, timedelta):
        return f"{max(0, round(value.total_seconds()))}s"
    return value.astimezone().isoformat() if isinstance(value, datetime) else value
