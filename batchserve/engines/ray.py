"""Calls in the scoring processes of a Ray cluster's hosts.

Ray places one actor on each host, reaches it and says when it is gone; see `engines.ray_host` for what it does there.
This engine decides which host gets a call, and gives the calls of a host that is lost, or silent, to others: neither
Ray's restarts nor its retries are used. One thread owns all state; another one asks Ray for its nodes, which may take
long when the head is away.
"""

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar
from uuid import uuid4

from batchserve.engines import ray_cluster
from batchserve.engines.ray_cluster import Node, cause
from batchserve.engines.ray_host import deciding_facts
from batchserve.errors import BatchserveError, ScoringCrashed, Unavailable
from batchserve.logs import get_logger
from batchserve.scoring.chunks import warm_up
from batchserve.settings import Settings
from batchserve.storage import open_storage

__all__ = ["RayCall", "RayEngine"]

T = TypeVar("T")

log = get_logger()

_WARM_UP = 60.0
"""Seconds in which a process imports what scoring needs."""
_LOOK = 1.0
"""Seconds between two looks at the nodes, and between two pings of a host."""
_SILENCE = 6.0
"""Seconds without an answer to pings after which the calls of a host are given to others."""
_RETRY = 30.0
"""Seconds until a refused host is asked again."""
_END = 10.0
"""Seconds in which the threads end."""
_ASK = 30.0
"""Seconds after which hosts are asked for again, since another driver that ends asks for none."""
_MARKED = 600.0
"""Seconds after which the object that hosts read is stored again, before a sweep may remove it."""
_MOST_LOSSES = 3
"""Hosts that one call may lose before that counts as a crash of its chunk: a chunk may be what kills them."""


class RayCall(Generic[T]):
    """A call on some host; see `engines.Call`."""

    def __init__(self, engine: "RayEngine", message: bytes, timeout: float, urgent: bool, number: int) -> None:
        self.future: Future[T] = Future()
        self.message, self.timeout, self.urgent, self.number = message, timeout, urgent, number
        self.places: dict[_Host, int] = {}
        """The hosts that are to answer it, each with the number that it has there. A silent one is not, and yet may."""
        self.losses = 0
        self._engine = engine
        self.seconds: float | None = None
        self._sent = 0.0

    def sent(self) -> "RayCall[T]":
        """The call, which goes to a host now: the way there, and a wait for a process, count as work."""
        self._sent = time.monotonic()
        return self

    def kill(self) -> None:
        if self.future.cancel():
            self._engine.forget(self)

    def end(self, outcome: Any, error: BaseException | None) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        if self._sent:
            self.seconds = time.monotonic() - self._sent
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(outcome)


class _Host:
    """A node of Ray with its actor, as this driver knows it."""

    def __init__(self, node: Node, actor: Any, driver: str) -> None:
        self.id, self.name, self.actor, self._driver = node.id, node.name, actor, driver
        self.processes = 0
        """0 until it is admitted."""
        self.calls: dict[int, RayCall[Any]] = {}
        self.moved: list[int] = []
        """The numbers of calls that others have got while it was silent."""
        self.elsewhere = 0
        """Calls of other drivers there, when it last answered."""
        self.seen = self.pinged = time.monotonic()
        self.withdrawn: set[int] = set()
        """Calls that were asked back, and may have begun."""
        self.is_silent = False
        self.is_awaited = False
        """Whether that it has not joined is logged."""
        self.refused: str | None = None

    def tell(self, method: str, *details: Any) -> Any:
        """Calls a method of the actor, whose outcome does not matter."""
        return getattr(self.actor, method).remote(self._driver, *details)

    def warn_if_awaited(self, now: float) -> None:
        if not (self.refused or self.is_awaited) and now - self.seen > _RETRY:
            self.is_awaited = True
            log.warning("Host has not joined: are its resources occupied?", action="host_wait", host=self.name)

    @property
    def is_ready(self) -> bool:
        return self.processes > 0 and not self.is_silent

    @property
    def load(self) -> float:
        return (len(self.calls) + self.elsewhere) / self.processes

    @property
    def last_waiting(self) -> int | None:
        """The last of the calls that may wait for a process there, if there are any."""
        left = self.calls.keys() - self.withdrawn
        return max(left) if left and self.load > 1 else None

    @property
    def room(self) -> int:
        """Most calls that it has at a time: a process that ends one finds the next."""
        return self.processes + 1 + self.processes // 8


class _Scout:
    """Looks at the nodes of Ray, and has an actor on each that has the resources. Runs in a thread of its own."""

    def __init__(self, settings: Settings, hosts: Mapping[str, _Host], found: Callable[..., None]) -> None:
        """`found` is called with the IDs of all suitable nodes that live, and those that are not in `hosts` with their
        actors."""
        self.marker = f"uploads/host-{uuid4().hex}"  # the sweep removes what a killed driver leaves there
        """The object that hosts read to show that they reach the storage."""
        self._settings, self._hosts, self._found = settings, hosts, found
        self._marked: float | None = None
        self._asked: float | None = None

    def run(self, closed: threading.Event) -> None:
        while not closed.wait(_LOOK):
            try:
                self._look()
                self._ask()
            except Exception as error:  # noqa: BLE001 - the head or the storage is away: what runs continues
                log.warning("Hosts cannot be looked for", action="engine_unavailable", reason=cause(error))
                closed.wait(_SILENCE)
        if self._asked is not None:
            with suppress(Exception):  # the head is away, and has forgotten it
                ray_cluster.ask_for(0, self._settings.ray_reserved)

    def _ask(self) -> None:
        hosts = self._settings.ray_hosts
        if hosts and (self._asked is None or time.monotonic() - self._asked > _ASK):
            ray_cluster.ask_for(hosts, self._settings.ray_reserved)
            self._asked = time.monotonic()

    def unmark(self) -> None:
        if self._marked is not None:
            with suppress(BatchserveError, OSError):
                open_storage(self._settings.storage).delete(self.marker)

    def _look(self) -> None:
        reserved = self._settings.ray_reserved
        suitable = {id: node for id, node in ray_cluster.nodes().items() if node.has(reserved)}
        new = [node for id, node in suitable.items() if id not in self._hosts]
        if new and (self._marked is None or time.monotonic() - self._marked > _MARKED):
            with open_storage(self._settings.storage).create(self.marker) as writer:
                writer.write(b"visible")
                writer.commit()
            self._marked = time.monotonic()
        self._found(suitable.keys(), [(node, ray_cluster.actor_on(node, reserved)) for node in new])


class RayEngine:
    """See `engines.Engine`. Does nothing before `start`: a server that only accepts jobs never joins Ray."""

    def __init__(self, settings: Settings) -> None:
        """Raises InvalidOptions for an address that is none."""
        self._address, self._storage = ray_cluster.place_of(settings.engine), settings.storage
        self._own_facts = deciding_facts(settings)
        self._id = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        self._numbers = count()
        self._events: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._waiting: list[tuple[bool, int, RayCall[Any]]] = []
        self._hosts: dict[str, _Host] = {}
        self._scout = _Scout(settings, self._hosts, lambda *found: self._events.put(partial(self._join, *found)))
        self._capacity = 0
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- what other threads call ---

    @property
    def capacity(self) -> int:
        return self._capacity

    def start(self) -> None:
        ray_cluster.join(*self._address)
        for target, details in ((self._drive, []), (self._scout.run, [self._closed])):
            self._threads.append(threading.Thread(target=target, args=details, name="ray", daemon=True))
            self._threads[-1].start()

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> RayCall[T]:
        if self._closed.is_set():
            raise Unavailable("the server is stopping")
        message = pickle.dumps((function, args))
        call: RayCall[T] = RayCall(self, message, timeout, urgent, next(self._numbers))
        self._events.put(partial(self._enqueue, call))
        return call

    def forget(self, call: RayCall[Any]) -> None:
        """Kills a cancelled call where it runs."""
        self._events.put(partial(self._kill, call))

    def close(self) -> None:
        self._closed.set()
        self._events.put(_nothing)
        for thread in self._threads:
            thread.join(_END)  # the scout may wait for a head that is gone
        if self._threads:
            self._scout.unmark()
            ray_cluster.leave()

    # --- the thread that owns the state ---

    def _drive(self) -> None:
        looked = time.monotonic()
        while not self._closed.is_set():
            with suppress(Empty):
                self._guarded(self._events.get(timeout=_LOOK / 4))
            if time.monotonic() - looked >= _LOOK / 4:
                looked = time.monotonic()
                self._guarded(self._ping)
                self._guarded(self._balance)
        while not self._events.empty():  # what was submitted and not yet seen
            self._guarded(self._events.get())
        self._guarded(self._end)

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            log.exception("Engine continues after an error", action="engine_error")
        self._capacity = sum(host.processes for host in self._hosts.values() if host.is_ready)

    def _enqueue(self, call: RayCall[Any]) -> None:
        heappush(self._waiting, (not call.urgent, call.number, call))
        self._place()

    def _place(self) -> None:
        """Gives waiting calls to the hosts with the most room; an urgent one to any, since it is the next one there."""
        while self._waiting:
            call = self._waiting[0][2]
            ready = [host for host in self._hosts.values() if host.is_ready]
            free = [host for host in ready if call.urgent or len(host.calls) < host.room]
            if not (free or call.future.cancelled()):
                return
            heappop(self._waiting)
            if not call.future.cancelled():
                self._send(call, min(free, key=lambda host: host.load))

    def _send(self, call: RayCall[Any], host: _Host) -> None:
        number = call.places[host] = next(self._numbers)
        host.calls[number] = call.sent()
        try:
            answer = host.actor.run.remote(self._id, number, call.message, call.timeout, call.urgent)
        except Exception as error:  # noqa: BLE001 - Ray has ended its connection, say
            self._lose(host, cause(error))
            return
        self._then(answer, partial(self._returned, host, number, call))

    def _returned(self, host: _Host, number: int, call: RayCall[Any], answer: "Future[bytes | None]") -> None:
        """The first answer of several counts."""
        is_expected = host.calls.pop(number, None) is not None
        if is_expected:
            del call.places[host]
        error = answer.exception()
        message = answer.result() if error is None else None
        if error is not None:
            self._doubt(host, error)
        elif message is not None and not call.future.done():
            call.end(*_outcome(message))
            self._kill(call)
        if is_expected and not call.future.done() and not call.places:
            if error is not None:
                self._lost(call)
            else:  # withdrawn
                self._enqueue(call)
        self._place()

    def _balance(self) -> None:
        """Withdraws a call that waits on one host while another has an idle process: calls may take long."""
        ready = [host for host in self._hosts.values() if host.is_ready]
        if not self._waiting and any(host.load < 1 for host in ready):
            for host in ready:
                if (number := host.last_waiting) is not None:
                    host.withdrawn = (host.withdrawn & host.calls.keys()) | {number}
                    host.tell("withdraw", number)
                    return

    def _lost(self, call: RayCall[Any]) -> None:
        """Gives a call to another host, unless it may be what ends them."""
        call.losses += 1
        if call.losses > _MOST_LOSSES:
            call.end(None, ScoringCrashed(f"{call.losses} hosts were lost while they worked on it"))
        elif not call.future.cancelled():
            heappush(self._waiting, (not call.urgent, call.number, call))

    def _kill(self, call: RayCall[Any]) -> None:
        for host, number in call.places.items():
            del host.calls[number]
            host.tell("kill", [number])
        call.places.clear()
        self._place()

    # --- hosts ---

    def _join(self, living: Set[str], joined: Iterable[tuple[Node, Any]]) -> None:
        """`living`: all nodes. `joined`: new ones, with their actors."""
        for id in self._hosts.keys() - living:
            self._lose(self._hosts[id], "Ray says that it is gone")
        for node, actor in joined:
            if node.id not in self._hosts:
                host = self._hosts[node.id] = _Host(node, actor, self._id)
                self._then(actor.about.remote(self._id), partial(self._check, host))
        for host in [host for host in self._hosts.values() if host.refused and time.monotonic() - host.seen > _RETRY]:
            del self._hosts[host.id]

    def _check(self, host: _Host, about: "Future[tuple[int, dict[str, str]]]") -> None:
        """Refuses a host whose results could differ, then has it read an object."""
        if (error := about.exception()) is not None:
            self._refuse(host, f"its actor cannot start: {cause(error)}")
            return
        processes, there = about.result()
        if differing := _difference(self._own_facts, there):
            self._refuse(host, f"it has {differing}")
            return
        self._then(host.actor.reads.remote(self._storage, self._scout.marker), partial(self._admit, host, processes))

    def _admit(self, host: _Host, processes: int, reads: "Future[str]") -> None:
        reason = cause(error) if (error := reads.exception()) is not None else reads.result()
        if reason:
            self._refuse(host, f"it cannot read the storage {self._storage}, which all hosts must reach ({reason})")
        elif self._hosts.get(host.id) is host:
            host.processes, host.seen = processes, time.monotonic()
            log.info("Host has joined", action="host_join", host=host.name, processes=processes)
            message = pickle.dumps((warm_up, ()))
            for _ in range(processes):
                self._send(RayCall(self, message, _WARM_UP, False, next(self._numbers)), host)
            self._place()

    def _refuse(self, host: _Host, reason: str) -> None:
        if self._hosts.get(host.id) is host:
            host.refused, host.seen = reason, time.monotonic()
            log.error("Host is refused", action="host_refuse", host=host.name, reason=reason)

    def _ping(self) -> None:
        now = time.monotonic()
        for host in list(self._hosts.values()):
            if not host.processes:
                host.warn_if_awaited(now)
                continue
            if now - host.pinged >= (_LOOK if host.is_ready else _SILENCE):
                host.pinged = now
                self._then(host.actor.ping.remote(self._id), partial(self._pong, host))
            if host.is_ready and now - host.seen > _SILENCE:
                self._mute(host)

    def _pong(self, host: _Host, answer: "Future[int]") -> None:
        if (error := answer.exception()) is not None:
            self._doubt(host, error)
            return
        host.seen, host.elsewhere = time.monotonic(), answer.result()
        if host.is_silent and self._hosts.get(host.id) is host:
            host.is_silent = False
            log.info("Host answers again", action="host_join", host=host.name, processes=host.processes)
            host.tell("kill", host.moved)
            host.moved = []
            self._place()

    def _doubt(self, host: _Host, error: BaseException) -> None:
        if self._hosts.get(host.id) is not host:
            return
        if host.is_ready and ray_cluster.is_unreachable(error):  # perhaps only the network
            self._mute(host)
        elif ray_cluster.is_gone(error):
            self._lose(host, cause(error))
        elif not ray_cluster.is_unreachable(error):
            log.error("Host could not run a call", action="host_error", host=host.name, reason=cause(error))

    def _mute(self, host: _Host) -> None:
        """Gives the calls of a silent host to others. It continues with them, and may be the first to answer."""
        host.is_silent = True
        log.warning("Host is silent: others get its calls", action="host_silent", host=host.name, calls=len(host.calls))
        self._move(host)

    def _lose(self, host: _Host, reason: str) -> None:
        del self._hosts[host.id]
        if host.processes:
            log.warning("Host is lost: others get its calls", action="host_lost", host=host.name, reason=reason)
        self._move(host)

    def _move(self, host: _Host) -> None:
        for number, call in host.calls.items():
            del call.places[host]
            host.moved.append(number)
            if not call.future.done() and not call.places:
                self._lost(call)
        host.calls.clear()
        self._place()

    def _then(self, reference: Any, then: Callable[[Future[Any]], None]) -> None:
        """Handles an outcome in the thread that owns the state."""
        reference.future().add_done_callback(lambda future: self._events.put(partial(then, future)))

    def _end(self) -> None:
        for call in [call for _, _, call in self._waiting]:
            call.kill()
        for host in self._hosts.values():
            for call in list(host.calls.values()):
                call.kill()
        left = [host.tell("leave") for host in self._hosts.values() if host.is_ready]
        ray_cluster.wait_for(left, 2.0)


def _difference(own: Mapping[str, str], there: Mapping[str, str]) -> str:
    """How a host differs; empty when it does not."""
    return "; ".join(
        f"{name} {there.get(name)}, not {value}" for name, value in own.items() if there.get(name) != value
    )


def _outcome(message: bytes) -> tuple[Any, BaseException | None]:
    try:
        outcome, error = pickle.loads(message)  # noqa: S301 - from our own hosts
    except Exception as damaged:  # noqa: BLE001 - the call must end
        return None, ScoringCrashed(f"the answer of a host cannot be read ({damaged})")
    return outcome, error


def _nothing() -> None:
    """An event that only wakes the thread."""
