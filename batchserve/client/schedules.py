"""Schedules of the server, as `client.schedules`: implemented once as coroutines, like everything in `core`."""

import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from datetime import datetime
from typing import Any, Self, TypedDict, Unpack

from batchserve.client.data import bytes_content
from batchserve.client.transport import Request, Transport, each_now, now, query, segment
from batchserve.client.views import View

__all__ = ["AsyncSchedule", "AsyncSchedules", "Schedule", "ScheduleOptions", "ScheduleView", "Schedules"]

_PAGE = 200
_RUN = 300.0
"""Seconds that a server may take to find the inputs of a run."""


class ScheduleOptions(TypedDict, total=False):
    """Options of `POST /v1/schedules`; docs/schedules.md explains each."""

    time_zone: str
    action: str
    catch_up: str
    catch_up_limit: int
    overlap: str


class ScheduleView(View):
    """A schedule as of the last response."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, cron={self.cron!r}, time_zone={self.time_zone!r})"

    @property
    def name(self) -> str:
        return str(self.data["name"])

    @property
    def cron(self) -> str:
        return str(self.data["cron"])

    @property
    def time_zone(self) -> str:
        return str(self.data["time_zone"])

    @property
    def paused(self) -> bool:
        return bool(self.data["paused"])

    @property
    def next(self) -> list[datetime]:
        """The next five times; none while it is paused."""
        return [datetime.fromisoformat(moment) for moment in self.data["next"]]

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest tick: `at`, `state`, `jobs`, `error` and more."""
        return self.data.get("last")


class AsyncSchedule(ScheduleView):
    """A schedule on the server. Its properties hold the last response; `refresh` updates them."""

    def __init__(self, transport: Transport, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self._transport = transport

    async def refresh(self) -> Self:
        return await self._ask("GET")

    async def pause(self) -> Self:
        """No further tick runs, and those that wait are skipped."""
        return await self._ask("POST", "/pause")

    async def resume(self) -> Self:
        """What was due in between is not caught up."""
        return await self._ask("POST", "/resume")

    async def change(self, **changes: Any) -> Self:
        """Replaces parts of its definition: `name`, `cron`, `request` and the options of `create`."""
        names = ("name", "cron", "request", *ScheduleOptions.__annotations__)
        return await self._ask("PUT", "", {name: self.data[name] for name in names} | changes)

    async def run(self, at: datetime | str | None = None) -> dict[str, Any]:
        """Runs it now, and returns the tick: with its `jobs`, or with the `error` for which there are none. `at`: the
        time whose dates the request has, to repeat a tick."""
        moment = at.isoformat() if isinstance(at, datetime) else at
        request = _request("POST", f"{_path(self.id)}/run", {} if moment is None else {"at": moment}, _RUN)
        return dict(await self._transport.json(request))

    async def ticks(self, *, state: str | None = None) -> AsyncGenerator[dict[str, Any]]:
        """Its history, newest first; further pages are fetched on demand."""
        after = None
        while True:
            params = query({"state": state, "limit": _PAGE, "after": after})
            found = Request(method="GET", path=f"{_path(self.id)}/ticks", params=params)
            page = await self._transport.json(found)
            for tick in page["ticks"]:
                yield tick
            after = page.get("next")
            if after is None:
                return

    async def delete(self) -> None:
        """Deletes it with its history. Its jobs stay."""
        await self._transport.json(Request(method="DELETE", path=_path(self.id)))

    async def _ask(self, method: str, part: str = "", body: Mapping[str, Any] | None = None) -> Self:
        self._data = await self._transport.json(_request(method, _path(self.id) + part, body))
        return self


class AsyncSchedules:
    """The schedules of the server, as `client.schedules`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(
        self, name: str, cron: str, request: Mapping[str, Any], **options: Unpack[ScheduleOptions]
    ) -> AsyncSchedule:
        """Repeats a request at the times of a cron text. An equal one of this name is returned as it is; raises
        Conflict for another one."""
        body = {"name": name, "cron": cron, "request": request, **options}
        return AsyncSchedule(self._transport, await self._transport.json(_request("POST", "/v1/schedules", body)))

    async def get(self, reference: str) -> AsyncSchedule:
        """A schedule by its ID or name."""
        data = await self._transport.json(Request(method="GET", path=_path(reference)))
        return AsyncSchedule(self._transport, data)

    async def list(self) -> AsyncGenerator[AsyncSchedule]:
        """All schedules, in the order of their creation; further pages are fetched on demand."""
        after = None
        while True:
            params = query({"limit": _PAGE, "after": after})
            page = await self._transport.json(Request(method="GET", path="/v1/schedules", params=params))
            for data in page["schedules"]:
                yield AsyncSchedule(self._transport, data)
            after = page.get("next")
            if after is None:
                return

    async def delete(self, reference: str) -> None:
        """Deletes a schedule with its history. Its jobs stay."""
        await self._transport.json(Request(method="DELETE", path=_path(reference)))


class Schedule(ScheduleView):
    """A schedule on the server. Its properties hold the last response; `refresh` updates them."""

    def __init__(self, twin: AsyncSchedule) -> None:
        super().__init__({})
        self._twin = twin

    @property
    def data(self) -> dict[str, Any]:
        return self._twin.data

    def refresh(self) -> Self:
        now(self._twin.refresh())
        return self

    def pause(self) -> Self:
        """No further tick runs, and those that wait are skipped."""
        now(self._twin.pause())
        return self

    def resume(self) -> Self:
        """What was due in between is not caught up."""
        now(self._twin.resume())
        return self

    def change(self, **changes: Any) -> Self:
        """Replaces parts of its definition: `name`, `cron`, `request` and the options of `create`."""
        now(self._twin.change(**changes))
        return self

    def run(self, at: datetime | str | None = None) -> dict[str, Any]:
        """Runs it now, and returns the tick: with its `jobs`, or with the `error` for which there are none. `at`: the
        time whose dates the request has, to repeat a tick."""
        return now(self._twin.run(at))

    def ticks(self, *, state: str | None = None) -> Iterator[dict[str, Any]]:
        """Its history, newest first; further pages are fetched on demand."""
        return each_now(self._twin.ticks(state=state))

    def delete(self) -> None:
        """Deletes it with its history. Its jobs stay."""
        now(self._twin.delete())


class Schedules:
    """The schedules of the server, as `client.schedules`."""

    def __init__(self, twin: AsyncSchedules) -> None:
        self._twin = twin

    def create(self, name: str, cron: str, request: Mapping[str, Any], **options: Unpack[ScheduleOptions]) -> Schedule:
        """Repeats a request at the times of a cron text. An equal one of this name is returned as it is; raises
        Conflict for another one."""
        return Schedule(now(self._twin.create(name, cron, request, **options)))

    def get(self, reference: str) -> Schedule:
        """A schedule by its ID or name."""
        return Schedule(now(self._twin.get(reference)))

    def list(self) -> Iterator[Schedule]:
        """All schedules, in the order of their creation; further pages are fetched on demand."""
        return map(Schedule, each_now(self._twin.list()))

    def delete(self, reference: str) -> None:
        """Deletes a schedule with its history. Its jobs stay."""
        now(self._twin.delete(reference))


def _path(reference: str) -> str:
    return f"/v1/schedules/{segment(reference)}"


def _request(method: str, path: str, body: Mapping[str, Any] | None = None, patience: float = 0.0) -> Request:
    content = None if body is None else bytes_content(json.dumps(body).encode(), "application/json")
    return Request(method=method, path=path, content=content, patience=patience)
