"""Bytes that nobody will ever ask for: what killed processes left behind, removed when it is old enough."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, or_, select

from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.domain import JobState
from batchserve.jobs import named_results
from batchserve.storage import Storage, remove_partials

_LOOKUP = 500
"""Keys asked for in one query."""


@dataclass(frozen=True, slots=True)
class Swept:
    """How many objects were removed, by their kind."""

    partials: int = 0
    """Objects whose writer was killed."""
    uploads: int = 0
    conversions: int = 0
    inputs: int = 0
    parts: int = 0
    results: int = 0

    @property
    def total(self) -> int:
        return self.partials + self.uploads + self.conversions + self.inputs + self.parts + self.results


def sweep(database: Database, storage: Storage, older_than: float, now: float) -> Swept:
    """Removes what was not touched for `older_than` seconds and that no row names. `now`: seconds since the epoch.

    Bytes come before their row, so `older_than` is longer than a request may take. What is older than the oldest job
    stays: a new database, at the address of an old storage, must not empty it.
    """
    before = now - older_than
    with database.read() as connection:
        since = connection.scalar(select(jobs.c.created_at).order_by(jobs.c.id).limit(1))
    orphans = _Orphans(database, storage, since if since is not None else before, before)
    return Swept(
        partials=remove_partials(storage, before),
        uploads=orphans.remove("uploads/", _none_needed),
        conversions=orphans.remove("conversions/", _none_needed),
        inputs=orphans.remove("inputs/", _needed_inputs),
        parts=orphans.remove("parts/", _needed_parts),
        results=orphans.remove("results/", named_results),
    )


@dataclass(frozen=True, slots=True)
class _Orphans:
    database: Database
    storage: Storage
    since: float
    before: float

    def remove(self, prefix: str, needed: Callable[[Connection, list[str]], set[str]]) -> int:
        """Removes the objects under a prefix but for those of which `needed` says that a row names them."""
        removed = 0
        for keys in self._old(prefix):
            with self.database.read() as connection:
                orphans = set(keys) - needed(connection, keys)
            for key in orphans:
                self.storage.delete(key)
            removed += len(orphans)
        return removed

    def _old(self, prefix: str) -> Iterator[list[str]]:
        found = self.storage.list(prefix)
        keys = [entry.key for entry in found if self.since <= entry.modified < self.before]
        for start in range(0, len(keys), _LOOKUP):
            yield keys[start : start + _LOOKUP]


def _none_needed(_: Connection, __: list[str]) -> set[str]:
    """What is under way is removed when it is done, by whoever began it; there are no rows."""
    return set()


def _needed_inputs(connection: Connection, keys: list[str]) -> set[str]:
    owners = {key: key.partition("/")[2] for key in keys}
    kept = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(owners.values()))))
    return {key for key, job_id in owners.items() if job_id in kept}


def _needed_parts(connection: Connection, keys: list[str]) -> set[str]:
    """All but those of completed jobs without failed records: of these, nobody can retry a thing."""
    owners = {key: key.split("/")[1] for key in keys}
    wanted = or_(jobs.c.state != JobState.COMPLETED, jobs.c.rows_failed > 0)
    kept = set(connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(set(owners.values())), wanted)))
    return {key for key, job_id in owners.items() if job_id in kept}
