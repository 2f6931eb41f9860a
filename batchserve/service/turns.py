"""Fair scheduling of interactive calls over a few scoring processes, by tenant."""

import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import NamedTuple

from batchserve.errors import TooManyRequests

__all__ = ["Lane", "Place", "Turn", "Turns"]


class Lane(StrEnum):
    """The kind of a call. A tenant's calls are limited for each lane, so that none starves another."""

    CHECK = "checks"
    """Checks of inputs to be queued: milliseconds. They precede the tenant's other calls."""
    ONLINE = "online predictions"
    LONG = "long calls"
    READ = "lists"
    VERIFY = "verifications of direct uploads"


class Place(NamedTuple):
    """An admitted client, which counts while it sends its body, waits or runs."""

    tenant: str
    lane: Lane


class Turn:
    """The wait for a process, and then its use; `end` it, wherever it is."""

    __slots__ = ("_act", "_turns", "has_come", "place")

    def __init__(self, turns: "Turns", place: Place) -> None:
        self._turns, self.place = turns, place
        self.has_come = False
        self._act: Callable[[], None] | None = None

    def then(self, act: Callable[[], None]) -> None:
        """Acts when the turn comes, which may then end and ask for turns."""
        self._act = act

    def come(self) -> None:
        """Called by its Turns."""
        self.has_come = True
        if self._act is not None:
            self._act()

    def end(self) -> None:
        """Leaves the queue, or passes the process on. Idempotent."""
        self._turns.end(self)


class _Admission:  # a generator would take longer than what it does
    """A place, from entering to leaving the block."""

    __slots__ = ("_place", "_turns")

    def __init__(self, turns: "Turns", place: Place) -> None:
        self._turns, self._place = turns, place

    def __enter__(self) -> Place:
        self._turns.enter(self._place)
        return self._place

    def __exit__(self, *_: object) -> None:
        self._turns.leave(self._place)


class Turns:
    """`slots` calls run concurrently. The next is of the tenant with the fewest running calls, among equals of the one
    that has waited longest; a tenant's calls run in the order of their arrival, checks first. A tenant never takes the
    last slot while it holds the others: other tenants find a free one, or wait for one call at most. A tenant may have
    `most` calls in each lane.

    For one event loop; only places may be left from other threads.
    """

    def __init__(self, slots: int, most: int) -> None:
        self._free = slots
        self._share = max(1, slots - 1)
        self._most = most
        self._lock = threading.Lock()
        self._places: dict[Place, int] = {}
        self._running: Counter[str] = Counter()
        self._taken: set[Turn] = set()
        self._waiting: dict[str, tuple[deque[Turn], deque[Turn]]] = {}
        """Checks and other calls of each waiting tenant; the one served last is at the end."""

    def place(self, tenant: str, lane: Lane) -> AbstractContextManager[Place]:
        """Raises TooManyRequests when it is entered."""
        return _Admission(self, Place(tenant, lane))

    def enter(self, place: Place) -> None:
        """Raises TooManyRequests."""
        with self._lock:
            taken = self._places.get(place, 0)
            if taken >= self._most:
                raise TooManyRequests(
                    f"{self._most} {place.lane.value} of tenant {place.tenant!r} are in progress, which is the limit: "
                    "wait for their responses",
                    retry_after=1,
                )
            self._places[place] = taken + 1

    def leave(self, place: Place) -> None:
        with self._lock:
            left = self._places[place] - 1
            if left:
                self._places[place] = left
            else:
                del self._places[place]

    def ask(self, place: Place) -> Turn:
        """A turn that comes when a slot is assigned: immediately where one is free."""
        turn = Turn(self, place)
        if self._free and not self._waiting and self._running.get(place.tenant, 0) < self._share:
            self._take(turn)
            return turn
        checks, others = self._waiting.setdefault(place.tenant, (deque(), deque()))
        (checks if place.lane is Lane.CHECK else others).append(turn)
        self._give()
        return turn

    def end(self, turn: Turn) -> None:
        tenant = turn.place.tenant
        if turn in self._taken:
            self._taken.remove(turn)
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]
            self._free += 1
            if tenant in self._waiting:
                self._waiting[tenant] = self._waiting.pop(tenant)
            self._give()
        elif tenant in self._waiting:
            for queue in self._waiting[tenant]:
                if turn in queue:
                    queue.remove(turn)
            self._forget_if_empty(tenant)

    def _give(self) -> None:
        while self._free and (able := [tenant for tenant in self._waiting if self._running[tenant] < self._share]):
            tenant = min(able, key=lambda name: self._running[name])  # the first of equals
            queues = self._waiting.pop(tenant)
            turn = (queues[0] or queues[1]).popleft()
            self._waiting[tenant] = queues
            self._forget_if_empty(tenant)
            self._take(turn)

    def _take(self, turn: Turn) -> None:
        self._free -= 1
        self._running[turn.place.tenant] += 1
        self._taken.add(turn)
        turn.come()

    def _forget_if_empty(self, tenant: str) -> None:
        if not any(self._waiting[tenant]):
            del self._waiting[tenant]
