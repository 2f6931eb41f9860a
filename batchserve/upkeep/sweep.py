"""Removes unreferenced bytes, the leftovers of killed processes, once they are old enough."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from uuid import UUID

from sqlalchemy import Connection, and_, or_, select

from batchserve import registry
from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.domain import JobState
from batchserve.jobs import uploads
from batchserve.jobs.queries import named_inputs, named_results
from batchserve.storage import ObjectInfo, Storage, digest_of_model, input_key, remove_partials, sent_key
from batchserve.upkeep import holds, retention

_LOOKUP = 500
"""Keys looked up in one query."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """Number of removed objects by kind."""

    partials: int = 0
    """Files of killed writers."""
    uploads: int = 0
    conversions: int = 0
    inputs: int = 0
    parts: int = 0
    results: int = 0
    models: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


def sweep(database: Database, storage: Storage, older_than: float, now: float) -> SweepReport:
    """Removes objects that no row references and that were not touched for `older_than` seconds. `now`: seconds since
    the epoch.

    Bytes come before their row, so `older_than` is longer than a request may take. Objects older than the oldest job
    stay: a new database must not empty an old storage. While a hold is in force, only objects that never had a row are
    removed.
    """
    before = now - older_than
    orphans = _Orphans(database, storage, _since(database, before), before)
    expired = _remove_expired_uploads(database, storage, before)
    return SweepReport(
        partials=remove_partials(storage, before),
        uploads=orphans.remove("uploads/") + expired,
        conversions=orphans.remove("conversions/"),
        inputs=orphans.remove("inputs/"),
        parts=orphans.remove("parts/"),
        results=orphans.remove("results/"),
        models=_remove_models(database, storage, before),
    )


def find_orphans(database: Database, storage: Storage, older_than: float, now: float) -> Iterator[ObjectInfo]:
    """The objects that `sweep` would remove, except files of killed writers."""
    before = now - older_than
    orphans = _Orphans(database, storage, _since(database, before), before)
    for prefix in _NEEDED:
        yield from orphans.find(prefix)
    yield from _unused_models(database, storage, before)


def _since(database: Database, before: float) -> float:
    """The creation of the oldest job; `before`, so that nothing is an orphan, if there is none."""
    with database.read() as connection:
        oldest = connection.scalars(select(jobs.c.id).order_by(jobs.c.id).limit(_LOOKUP))
        for job_id in oldest:
            with suppress(ValueError):  # not an ID of batchserve
                return _made_at(job_id)
    return before


@dataclass(frozen=True, slots=True)
class _Orphans:
    database: Database
    storage: Storage
    since: float
    before: float

    def find(self, prefix: str) -> Iterator[ObjectInfo]:
        """The unneeded objects under a prefix."""
        for entries in self._old(prefix):
            keys = [entry.key for entry in entries]
            with self.database.read() as connection:
                needed = _NEEDED[prefix](connection, keys)
                if prefix in _PROTECTED_BY_HOLDS and holds.any_in_force(connection, self.database.moment(connection)):
                    continue
            yield from (entry for entry in entries if entry.key not in needed)

    def remove(self, prefix: str) -> int:
        removed = 0
        for orphan in self.find(prefix):
            self.storage.delete(orphan.key)
            removed += 1
        return removed

    def _old(self, prefix: str) -> Iterator[list[ObjectInfo]]:
        old = [entry for entry in self.storage.list(prefix) if self.since <= entry.modified < self.before]
        for start in range(0, len(old), _LOOKUP):
            yield old[start : start + _LOOKUP]


def _remove_expired_uploads(database: Database, storage: Storage, before: float) -> int:
    """Ends the direct uploads that expired before a moment: one that is completed since then may go on. The row first:
    what a crash leaves in between is an orphan."""
    removed = 0
    while expired := database.write_freeing(lambda connection: uploads.end_expired(connection, before, _LOOKUP)):
        retention.remove_sent(storage, expired)
        removed += len(expired)
    return removed


def _none_needed(_: Connection, __: list[str]) -> set[str]:
    """Conversions under way have no rows; their request removes them."""
    return set()


def _needed_uploads(connection: Connection, keys: list[str]) -> set[str]:
    """What was sent for direct uploads that are not completed. Models under way have no rows."""
    pending = uploads.pending(connection, [key.removeprefix("uploads/") for key in keys])
    return {sent_key(upload_id) for upload_id in pending}


def _needed_inputs(connection: Connection, keys: list[str]) -> set[str]:
    """Those of jobs, and of direct uploads whose parts are joined."""
    pending = uploads.pending(connection, [key.removeprefix("inputs/") for key in keys])
    return named_inputs(connection, keys) | {input_key(upload_id) for upload_id in pending}


def _needed_parts(connection: Connection, keys: list[str]) -> set[str]:
    """All but the parts of expired jobs, and of completed ones without failed records to retry."""
    owners = {key: key.split("/")[1] for key in keys}
    unfinished_or_stopped = jobs.c.state.not_in((JobState.COMPLETED, JobState.EXPIRED))
    retriable = and_(jobs.c.state == JobState.COMPLETED, jobs.c.rows_failed > 0, jobs.c.input_removed_at.is_(None))
    query = select(jobs.c.id).where(jobs.c.id.in_(set(owners.values())), or_(unfinished_or_stopped, retriable))
    kept = set(connection.scalars(query))
    return {key for key, job_id in owners.items() if job_id in kept}


def _remove_models(database: Database, storage: Storage, before: float) -> int:
    """Removes artifacts of versions deleted while a hold was in force, or just before a crash."""
    removed = 0
    for artifact in _unused_models(database, storage, before):
        with database.write(exclusive="models") as connection:  # no concurrent registration of these bytes
            held = holds.any_in_force(connection, database.moment(connection))
            if not held and not registry.has_version(connection, digest_of_model(artifact.key)):
                storage.delete(artifact.key)
                removed += 1
    return removed


def _unused_models(database: Database, storage: Storage, before: float) -> list[ObjectInfo]:
    """Only digests known to this database: others may belong to another one."""
    with database.read() as connection:
        unused = registry.unused_digests(connection)
    listed = storage.list("models/") if unused else ()
    return [entry for entry in listed if entry.modified < before and digest_of_model(entry.key) in unused]


def _made_at(job_id: str) -> float:
    """When the ID of a job (UUIDv7) was generated, before the first byte of its input; one second earlier, since file
    times are coarse.
    """
    return (UUID(job_id).int >> 80) / 1000 - 1.0


_NEEDED: dict[str, Callable[[Connection, list[str]], set[str]]] = {
    "uploads/": _needed_uploads,
    "conversions/": _none_needed,
    "inputs/": _needed_inputs,
    "parts/": _needed_parts,
    "results/": named_results,
}
"""For each prefix, the query for the needed ones of some objects."""
_PROTECTED_BY_HOLDS = ("inputs/", "parts/", "results/")
"""Prefixes whose objects are not removed while a hold is in force."""
