"""What the service does not keep, and so does not send: inputs that are read in place, results that are written
elsewhere."""

from batchserve.domain import Job
from batchserve.errors import Elsewhere, ResultNotReady
from batchserve.storage import is_elsewhere
from batchserve.storage.locations import is_external


def require_own_input(job: Job) -> None:
    """Raises Elsewhere, with the address, for an input that is read in place; ResultNotReady for the rows of a query
    that the job has not read yet."""
    if job.input.is_unread:
        raise ResultNotReady(f"job {job.id} has not read the rows of its query yet")
    if is_external(job.input.key):
        raise Elsewhere(f"job {job.id} reads its input in place, from {job.input.key}: get it there")


def require_own_result(job: Job) -> None:
    """Raises Elsewhere, with the address or the table, for a result that was written elsewhere."""
    if job.result is None or not is_elsewhere(job.result.key):
        return
    where, options = "its target", job.options
    if options is not None and options.table is not None:
        where = options.table.shown
    elif options is not None and options.target is not None:
        where = options.target.url
    raise Elsewhere(f"the result of job {job.id} was written to {where}: get it there")
