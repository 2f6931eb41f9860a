"""Lists of jobs, as the API and the pages show them."""

from batchserve.jobs import lists, queries
from batchserve.jobs.lists import NEWEST, JobFilter, JobOrder
from batchserve.service import JobSnapshot, Service
from batchserve.upkeep import retention

__all__ = ["read_slice"]


def read_slice(
    service: Service, tenant: str, wanted: JobFilter, after: str | None, most: int, order: JobOrder = NEWEST
) -> tuple[list[JobSnapshot], bool]:
    """The next jobs of a list, at most so many; and whether there are more. `after`: `lists.cursor_of` the last job
    before. Reads many rows: call it by `Service.calls.read`."""
    runtime = service.runtime
    with runtime.database.read() as connection:
        found = lists.list_page(connection, tenant, wanted, order, after=after, limit=most + 1)
        tried = queries.attempts_of_several(connection, [job.id for job in found if job.attempt])
        now = runtime.database.moment(connection).wall
    places = service.places.of(found, now)
    dated = (retention.dated(job, runtime.settings) for job in found[:most])
    snapshots = [JobSnapshot(job, tried.get(job.id, []), places.get(job.id), now) for job in dated]
    return snapshots, len(found) > most
