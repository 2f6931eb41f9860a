"""Removes what jobs without an end have left in databases of others: their staging tables."""

from uuid import UUID

from sqlalchemy import select

from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.domain import JobState
from batchserve.errors import BatchserveError
from batchserve.logs import get_logger
from batchserve.postgres import place_of
from batchserve.settings import Settings

__all__ = ["sweep_staging"]

log = get_logger()

_FOREIGN = 7 * 86400.0
"""Seconds after which the staging table of a job that this service does not know is removed: another may know it."""


def sweep_staging(database: Database, settings: Settings, now: float) -> int:
    """Removes the staging tables of jobs that have ended; returns how many. A database out of reach is left to the next
    sweep. `now`: seconds since the epoch."""
    removed = 0
    for name, address in _addresses(settings):
        try:
            place = place_of(name, {name: address})
            from batchserve.postgres.load import drop_staging, staged_jobs  # psycopg is an extra

            if found := staged_jobs(place):
                removed += drop_staging(place, _ended(database, found, now))
        except BatchserveError as error:
            log.warning("Staging tables are left to the next sweep", action="staging_left", detail=error.detail)
    return removed


def _addresses(settings: Settings) -> list[tuple[str, str]]:
    """Each database once, with a name of it."""
    named = (connection for connections in settings.tables.values() for connection in connections.items())
    return [(name, address) for address, name in {value.get_secret_value(): name for name, value in named}.items()]


def _ended(database: Database, found: list[str], now: float) -> list[str]:
    with database.read() as connection:
        known = connection.execute(select(jobs.c.id, jobs.c.state).where(jobs.c.id.in_(found))).all()
    states = {row.id: row.state for row in known}
    going_on = (JobState.QUEUED, JobState.RUNNING)
    return [
        job_id for job_id in found
        if (states[job_id] not in going_on if job_id in states else now - _made_at(job_id) > _FOREIGN)
    ]  # fmt: skip


def _made_at(job_id: str) -> float:
    """When the ID (UUIDv7) was generated."""
    return (UUID(job_id).int >> 80) / 1000
