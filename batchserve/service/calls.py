"""Calls in interactive scoring processes, scheduled fairly by tenant."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from batchserve.engines import Call, Interactive
from batchserve.errors import BadRequest, ScoringCrashed, Unavailable
from batchserve.service.turns import Lane, Place, Turn, Turns

__all__ = ["Calls", "Leaving"]

T = TypeVar("T")
Leaving = Callable[[], Awaitable[Any]]
"""Waits until a client has left."""
_QUICK = 0.1
"""Seconds that a call runs before its client is watched for a disconnect."""


class Calls:
    """Interactive work: short calls, long calls, and reads of many rows."""

    def __init__(self, processes: Interactive, most: int, patience: float) -> None:
        """`most`: calls that a tenant may have in each lane. `patience`: seconds that a call waits for a process."""
        self._processes, self._patience = processes, patience
        self._all = Turns(processes.capacity, most)
        self._long = Turns(1, most)
        self._reads = Turns(2, most)
        """One at a time for each tenant, so that reads leave time for the event loop."""

    def place(self, tenant: str, lane: Lane) -> AbstractContextManager[Place]:
        """Admits a call of a tenant. Raises TooManyRequests."""
        return (self._long if lane is Lane.LONG else self._all).place(tenant, lane)

    async def run(
        self, place: Place, function: Callable[..., T], *args: Any, seconds: float, leaving: Leaving | None = None
    ) -> T:
        """Calls a function in an interactive scoring process when the turn of this place comes. Cancels it when the
        server stops, and when the client disconnects, if that can be watched. A call whose process dies is retried
        once: the crash may not be its fault. Raises ScoringCrashed when the second process dies, too, ScoringTimeout
        after `seconds` of running, Unavailable when no process was free in time, and what the function raises.
        """
        try:
            return await self._run(place, function, args, seconds, leaving)
        except ScoringCrashed:
            return await self._run(place, function, args, seconds, leaving)

    async def _run(
        self, place: Place, function: Callable[..., T], args: tuple[Any, ...], seconds: float, leaving: Leaving | None
    ) -> T:
        call = self._begin(await self._turn(self._all, place, self._patience, leaving), function, args, seconds)
        try:
            return await _unless_left(call.future, leaving)
        except (asyncio.CancelledError, BadRequest):
            call.kill()
            raise

    def run_from_thread(self, place: Place, function: Callable[..., T], *args: Any, seconds: float) -> T:
        """The same for callers in a thread, which it blocks."""
        try:
            return self._run_from_thread(place, function, *args, seconds=seconds)
        except ScoringCrashed:
            return self._run_from_thread(place, function, *args, seconds=seconds)

    def _run_from_thread(self, place: Place, function: Callable[..., T], *args: Any, seconds: float) -> T:
        turn = self._all.ask(place)
        try:
            turn.given.result(self._patience)
        except TimeoutError:
            turn.end()
            raise self._busy(place.lane) from None
        return self._begin(turn, function, args, seconds).future.result()

    @asynccontextmanager
    async def long_turn(self, place: Place, wait: float | None = None) -> AsyncIterator[None]:
        """The turn of long calls for a place in the lane LONG, one client at a time. Checks and online predictions use
        the other interactive processes. Raises Unavailable when its turn has not come after `wait` seconds.
        """
        turn = await self._turn(self._long, place, wait)
        try:
            yield
        finally:
            turn.end()

    async def read(self, tenant: str, function: Callable[[], T]) -> T:
        """Reads many rows, in a thread, when it is the tenant's turn. Raises TooManyRequests and Unavailable."""
        with self._reads.place(tenant, Lane.READ) as place:
            turn = await self._turn(self._reads, place, self._patience)
            try:
                return await run_in_threadpool(function)
            finally:
                turn.end()

    def _begin(self, turn: Turn, function: Callable[..., T], args: tuple[Any, ...], seconds: float) -> Call[T]:
        """A running call, which ends its turn when its process is free again."""
        try:
            call: Call[T] = self._processes.submit(function, *args, timeout=seconds)
        except BaseException:
            turn.end()
            raise
        call.future.add_done_callback(lambda _: turn.end())
        return call

    async def _turn(self, turns: Turns, place: Place, wait: float | None, leaving: Leaving | None = None) -> Turn:
        """A turn that has come. Raises Unavailable when it does not within `wait` seconds."""
        turn = turns.ask(place)
        if not turn.given.done():
            try:
                async with asyncio.timeout(wait):
                    await _unless_left(turn.given, leaving)
            except BaseException as left:
                turn.end()
                if isinstance(left, TimeoutError):
                    raise self._busy(place.lane) from None
                raise
        return turn

    def _busy(self, lane: Lane) -> Unavailable:
        seconds = f"{self._patience:g} s; try again in a moment"
        if lane is Lane.READ:
            return Unavailable(f"other lists were read for {seconds}", retry_after=5)
        return Unavailable(f"no scoring process was free for {seconds}", retry_after=5)


async def _unless_left(future: Future[T], leaving: Leaving | None) -> T:
    """The value of a future. Raises BadRequest when the client disconnects first."""
    outcome = asyncio.wrap_future(future)
    if leaving is None or (await asyncio.wait([outcome], timeout=_QUICK))[0]:
        return await outcome
    left = asyncio.ensure_future(leaving())
    try:
        watched: list[asyncio.Future[Any]] = [outcome, left]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return await outcome
        raise BadRequest("the client disconnected before its response was ready")
    finally:
        left.cancel()
        outcome.cancel()
