"""A discrete simulation of jobs on a cluster: drivers, a database, a store and scoring processes, from measured costs.

Everything waits for what it needs in turn, as in the service: a chunk is read, scored and written by a process, and its
commit occupies the driver of its job, which does one thing at a time, and the database.
"""

from collections.abc import Generator
from dataclasses import dataclass
from math import ceil
from typing import Any

import simpy

__all__ = ["PARTS", "Cluster", "Costs", "Outcome", "simulate"]

PARTS = ("storage", "database", "planning", "assembly", "driver", "scoring")
_PLANNED_AT_ONCE = 64
"""Chunks that one call plans, and one transaction adds."""

_Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, of one chunk unless it says otherwise."""

    driver: float
    """Of the driver alone: it hands the chunk out, and takes its outcome."""
    commit: float
    """Of the transaction, by a driver that finds the database idle."""
    commits: float
    """Most transactions that the database commits in a second, for all drivers together."""
    claim: float
    """Of a job."""
    plan: float
    """In a process, while no other one plans that job."""
    read: float
    score: float
    write: float
    assemble: float
    """Of a part, in one process at the end of its job."""
    bytes: int
    """That are read and written."""


@dataclass(frozen=True, slots=True)
class Cluster:
    hosts: int
    processes: int
    """Of each host."""
    jobs: int = 1
    """Each has an equal share of the chunks, and one driver."""
    drivers: int = 1
    """Each has an equal share of the jobs."""
    bandwidth: float | None = None
    """Bytes per second of the store for all hosts together; None: it serves many as it serves one host."""


@dataclass(frozen=True, slots=True)
class Outcome:
    seconds: float
    """Until the last job is completed."""
    shares: dict[str, float]
    """Of them, by the part that was busy: of a driver, a planning and an assembly the one that was busy for longest."""

    @property
    def bottleneck(self) -> str:
        """What was busiest. A part that waits for another one is busy as well: the other one is named."""
        return max(PARTS, key=lambda name: round(self.shares[name], 2))


class _Part(simpy.PriorityResource):
    """A resource that notes for how long it was busy. What is urgent comes first."""

    def __init__(self, world: simpy.Environment, capacity: int) -> None:
        super().__init__(world, capacity)
        self._world, self._places, self._busy = world, capacity, 0.0

    def hold(self, steps: _Steps, *, urgent: bool = False) -> _Steps:
        """Takes one of its places for these steps."""
        with self.request(priority=0 if urgent else 1) as turn:
            yield turn
            began = self._world.now
            yield from steps
            self._busy += self._world.now - began

    def work(self, seconds: float) -> _Steps:
        yield from self.hold(self._pass(seconds))

    def _pass(self, seconds: float) -> _Steps:
        yield self._world.timeout(seconds)

    def share(self, seconds: float) -> float:
        return self._busy / (self._places * seconds) if seconds else 0.0


class _Site:
    """What all jobs share."""

    def __init__(self, world: simpy.Environment, costs: Costs, cluster: Cluster) -> None:
        self.world, self.costs, self.cluster = world, costs, cluster
        self.processes = _Part(world, cluster.hosts * cluster.processes)
        at_once = max(1, round(costs.commits * costs.commit))
        self.database = _Part(world, at_once)
        self.transaction = at_once / costs.commits
        """Seconds of a transaction, so that the database reaches its rate."""
        self.store = _Part(world, 1)

    def score(self) -> _Steps:
        """The steps of a process."""
        yield from self._move(self.costs.read)
        yield self.world.timeout(self.costs.score)
        yield from self._move(self.costs.write)

    def _move(self, seconds: float) -> _Steps:
        """Half of a chunk's bytes: the store's part of the time in turn, the rest in the process."""
        shared = 0.0 if self.cluster.bandwidth is None else self.costs.bytes / 2 / self.cluster.bandwidth
        if shared:
            yield from self.store.work(shared)
        yield self.world.timeout(max(0.0, seconds - shared))


class _Job:
    def __init__(self, site: _Site, driver: _Part, chunks: int) -> None:
        self._site, self._world, self._costs, self._chunks = site, site.world, site.costs, chunks
        self._driver = driver
        self.planning, self.assembly = _Part(site.world, 1), _Part(site.world, 1)
        window = 2 * site.cluster.hosts * site.cluster.processes
        self._calls = simpy.Resource(site.world, window)
        """Places of the calls that the driver has handed out."""
        self._planned = simpy.Store(site.world, max(window, _PLANNED_AT_ONCE))

    def run(self) -> _Steps:
        yield from self._transaction(self._costs.claim)
        self._world.process(self._plan())
        scored = []
        for _ in range(self._chunks):
            yield self._planned.get()
            place = self._calls.request()
            yield place
            scored.append(self._world.process(self._score(place)))
        yield simpy.AllOf(self._world, scored)
        assembly = self.assembly.work(self._costs.assemble * self._chunks)
        yield from self._site.processes.hold(assembly, urgent=True)
        yield from self._transaction(self._costs.claim)

    def _plan(self) -> _Steps:
        left = self._chunks
        while left:
            now = min(left, _PLANNED_AT_ONCE)
            yield from self._site.processes.hold(self.planning.work(self._costs.plan * now), urgent=True)
            yield from self._transaction(self._costs.commit)
            for _ in range(now):
                yield self._planned.put(None)
            left -= now

    def _score(self, place: Any) -> _Steps:
        yield from self._site.processes.hold(self._site.score())
        yield from self._transaction(self._costs.commit, self._costs.driver)
        self._calls.release(place)

    def _transaction(self, seconds: float, before: float = 0.0) -> _Steps:
        """The driver does something, and waits for the database."""
        yield from self._driver.hold(self._write(seconds, before))

    def _write(self, seconds: float, before: float) -> _Steps:
        yield self._world.timeout(before)
        yield from self._site.database.work(max(self._site.transaction, seconds))


def simulate(chunks: int, costs: Costs, cluster: Cluster) -> Outcome:
    world = simpy.Environment()
    site = _Site(world, costs, cluster)
    drivers = [_Part(world, 1) for _ in range(cluster.drivers)]
    jobs = [_Job(site, drivers[number % len(drivers)], ceil(chunks / cluster.jobs)) for number in range(cluster.jobs)]
    world.run(simpy.AllOf(world, [world.process(job.run()) for job in jobs]))
    planning, assembly = ([getattr(job, name) for job in jobs] for name in ("planning", "assembly"))
    parts = dict(
        zip(PARTS, ([site.store], [site.database], planning, assembly, drivers, [site.processes]), strict=True)
    )
    seconds = float(world.now)
    return Outcome(seconds, {name: max(part.share(seconds) for part in each) for name, each in parts.items()})
