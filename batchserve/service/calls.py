"""Calls in interactive scoring processes, scheduled fairly by tenant."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from batchserve.engines import Interactive
from batchserve.errors import BadRequest, BatchserveError, ScoringCrashed, Unavailable
from batchserve.service.groups import GroupFailed, Groups
from batchserve.service.turns import Lane, Place, Turn, Turns

__all__ = ["Calls", "Leaving"]

T = TypeVar("T")
S = TypeVar("S")
X = TypeVar("X")
Leaving = Callable[[], Awaitable[Any]]
"""Waits until a client has left."""
_QUICK = 0.1
"""Seconds that a call runs before its client is watched for a disconnect."""


class Calls:
    """Interactive work: short calls, long calls, and reads of many rows."""

    def __init__(self, processes: Interactive, most: int, patience: float) -> None:
        """`most`: calls that a tenant may have in each lane. `patience`: seconds that a call waits for a process."""
        self._processes, self._patience = processes, patience
        self._loop = asyncio.get_running_loop()
        self._all = Turns(processes.capacity, most)
        self._groups = Groups(processes, self._all, patience, self._busy)
        self._long = Turns(1, most)
        self._reads = Turns(2, most)
        """One at a time for each tenant, so that reads leave time for the event loop."""
        self._verifications = Turns(2, most)

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
        with _Watch(self._loop, leaving):
            return await self._retried(place, function, args, seconds)

    async def _retried(self, place: Place, function: Callable[..., T], args: tuple[Any, ...], seconds: float) -> T:
        try:
            return await self._run(place, function, args, seconds)
        except ScoringCrashed:
            return await self._run(place, function, args, seconds)

    async def _run(self, place: Place, function: Callable[..., T], args: tuple[Any, ...], seconds: float) -> T:
        turn = await self._turn(self._all, place, self._patience)
        try:
            return await self._processes.run(function, *args, seconds=seconds)
        finally:
            turn.end()

    async def together(
        self,
        place: Place,
        function: Callable[[S, list[X]], Sequence[T | BatchserveError]],
        shared: S,
        item: X,
        *,
        size: int,
        seconds: float,
        leaving: Leaving | None = None,
    ) -> T:
        """What `function(shared, [item])` gives for this item; in a group with those of others.

        Items that wait for the same function and an equal `shared` (a model version and its options, say) go in one
        message and one run: those that arrive together, that come while the processes work, or until a quick run of
        their kind ends. A group has at most `GROUP_ITEMS` of them, and `GROUP_BYTES` by the `size` that each states.
        It takes one of each tenant in turn, and one turn; each tenant with waiting items asks for turns, as for any
        other call, so that none waits for the many items of another.

        The function, of a module, returns for each item a value, or the BatchserveError that is raised here: so one
        item affects no other. If a run of several fails as a whole, because its process dies, takes longer than the
        `seconds` of any of its items, or raises something, each is run alone, and the one at fault fails alone. For an
        item alone, and for disconnects, everything is as for `run`; a group is killed when nothing waits for it.
        """
        with _Watch(self._loop, leaving):
            try:
                value: T = await self._groups.outcome(place, function, shared, item, size=size, seconds=seconds)
                return value
            except GroupFailed:
                outcomes = await self._retried(place, function, (shared, [item]), seconds)
            except ScoringCrashed:
                outcomes = await self._run(place, function, (shared, [item]), seconds)
            [outcome] = outcomes
            if isinstance(outcome, BatchserveError):
                raise outcome
            return outcome

    def run_from_thread(self, place: Place, function: Callable[..., T], *args: Any, seconds: float) -> T:
        """The same for callers in a thread, which it blocks."""
        running = self.run(place, function, *args, seconds=seconds)
        return asyncio.run_coroutine_threadsafe(running, self._loop).result()

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
        return await self._in_thread(self._reads, Place(tenant, Lane.READ), function, self._patience)

    async def verify(self, tenant: str, function: Callable[[], T]) -> T:
        """Reads a whole object, in a thread, when it is the tenant's turn. Raises TooManyRequests."""
        return await self._in_thread(self._verifications, Place(tenant, Lane.VERIFY), function, None)

    async def _in_thread(self, turns: Turns, place: Place, function: Callable[[], T], wait: float | None) -> T:
        with turns.place(*place):
            turn = await self._turn(turns, place, wait)
            try:
                return await run_in_threadpool(function)
            finally:
                turn.end()

    async def _turn(self, turns: Turns, place: Place, wait: float | None) -> Turn:
        """A turn that has come. Raises Unavailable when it does not within `wait` seconds."""
        turn = turns.ask(place)
        if not turn.has_come:
            come = asyncio.Event()
            turn.then(come.set)
            try:
                async with asyncio.timeout(wait):
                    await come.wait()
            except BaseException as left:
                turn.end()
                if isinstance(left, TimeoutError):
                    raise self._busy(place) from None
                raise
        return turn

    def _busy(self, place: Place) -> Unavailable:
        seconds = f"{self._patience:g} s; try again in a moment"
        if place.lane is Lane.READ:
            return Unavailable(f"other lists were read for {seconds}", retry_after=5)
        return Unavailable(f"no scoring process was free for {seconds}", retry_after=5)


class _Watch:
    """Ends what runs inside when its client disconnects: it raises BadRequest."""

    def __init__(self, loop: asyncio.AbstractEventLoop, leaving: Leaving | None) -> None:
        self._loop, self._leaving = loop, leaving
        self._task = asyncio.current_task(loop)
        self._cancels = self._task.cancelling() if self._task else 0
        self._timer: asyncio.TimerHandle | None = None
        self._left: asyncio.Future[Any] | None = None
        self._has_left = False

    def __enter__(self) -> None:
        if self._leaving is not None:
            self._timer = self._loop.call_later(_QUICK, self._begin, self._leaving)

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: object) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._left is not None:
            self._left.cancel()
        if self._has_left and task is not None:
            cancels = task.uncancel()
            if kind is asyncio.CancelledError and cancels <= self._cancels:  # for no other reason
                raise BadRequest("the client disconnected before its response was ready")

    def _begin(self, leaving: Leaving) -> None:
        self._left = asyncio.ensure_future(leaving())
        self._left.add_done_callback(self._end)

    def _end(self, left: "asyncio.Future[Any]") -> None:
        if self._task is not None and not left.cancelled():
            self._has_left = True
            self._task.cancel()
