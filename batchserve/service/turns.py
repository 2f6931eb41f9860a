"""Fair scheduling of interactive calls over a few scoring processes, by tenant."""

import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from batchserve.errors import TooManyRequests

__all__ = ["Lane", "Place", "Turn", "Turns"]


class Lane(Enum):
    """The kind of a call. A tenant's calls are limited for each lane, so that none starves another."""

    CHECK = "checks"
    """Checks of inputs to be queued: milliseconds. They precede the tenant's other calls."""
    ONLINE = "online predictions"
    LONG = "long calls"
    READ = "lists"


@dataclass(frozen=True, slots=True)
class Place:
    """An admitted client, which counts while it sends its body, waits or runs."""

    tenant: str
    lane: Lane


class Turn:
    """The wait for a process, and then its use; `end` it, wherever it is."""

    __slots__ = ("_turns", "given", "place")

    def __init__(self, turns: "Turns", place: Place) -> None:
        self._turns, self.place = turns, place
        self.given: Future[None] = Future()

    def end(self) -> None:
        """Leaves the queue, or passes the process on. Idempotent; safe from any thread."""
        self._turns.end(self)


class Turns:
    """`slots` calls run concurrently. The next is of the tenant with the fewest running calls, among equals of the one
    that has waited longest; a tenant's calls run in the order of their arrival, checks first. A tenant never takes the
    last slot while it holds the others: other tenants find a free one, or wait for one call at most. A tenant may have
    `most` calls in each lane.
    """

    def __init__(self, slots: int, most: int) -> None:
        self._free = slots
        self._share = max(1, slots - 1)
        self._most = most
        self._lock = threading.Lock()
        self._places: Counter[Place] = Counter()
        self._running: Counter[str] = Counter()
        self._taken: set[Turn] = set()
        self._waiting: dict[str, tuple[deque[Turn], deque[Turn]]] = {}
        """Checks and other calls of each waiting tenant; the one served last is at the end."""

    @contextmanager
    def place(self, tenant: str, lane: Lane) -> Iterator[Place]:
        """Raises TooManyRequests."""
        place = Place(tenant, lane)
        with self._lock:
            if self._places[place] >= self._most:
                raise TooManyRequests(
                    f"{self._most} {lane.value} of tenant {tenant!r} are in progress, which is the limit: "
                    "wait for their responses",
                    retry_after=1,
                )
            self._places[place] += 1
        try:
            yield place
        finally:
            with self._lock:
                self._places[place] -= 1
                if not self._places[place]:
                    del self._places[place]

    def ask(self, place: Place) -> Turn:
        """A turn whose `given` completes when a slot is assigned: immediately where one is free."""
        turn = Turn(self, place)
        with self._lock:
            checks, others = self._waiting.setdefault(place.tenant, (deque(), deque()))
            (checks if place.lane is Lane.CHECK else others).append(turn)
            given = self._give()
        _tell(given)
        return turn

    def end(self, turn: Turn) -> None:
        given: list[Turn] = []
        with self._lock:
            tenant = turn.place.tenant
            if turn in self._taken:
                self._taken.remove(turn)
                self._running[tenant] -= 1
                if not self._running[tenant]:
                    del self._running[tenant]
                self._free += 1
                if tenant in self._waiting:
                    self._waiting[tenant] = self._waiting.pop(tenant)
                given = self._give()
            elif tenant in self._waiting:
                for queue in self._waiting[tenant]:
                    if turn in queue:
                        queue.remove(turn)
                self._forget_if_empty(tenant)
        _tell(given)

    def _give(self) -> list[Turn]:
        """The turns that come now."""
        given = []
        while self._free and (able := [tenant for tenant in self._waiting if self._running[tenant] < self._share]):
            tenant = min(able, key=lambda name: self._running[name])  # the first of equals
            queues = self._waiting.pop(tenant)
            turn = (queues[0] or queues[1]).popleft()
            self._waiting[tenant] = queues
            self._forget_if_empty(tenant)
            if turn.given.set_running_or_notify_cancel():  # otherwise its waiter is gone
                self._free -= 1
                self._running[tenant] += 1
                self._taken.add(turn)
                given.append(turn)
        return given

    def _forget_if_empty(self, tenant: str) -> None:
        if not any(self._waiting[tenant]):
            del self._waiting[tenant]


def _tell(given: list[Turn]) -> None:
    """Outside of the lock: what waits for a turn may ask for another one."""
    for turn in given:
        turn.given.set_result(None)
