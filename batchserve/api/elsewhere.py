"""What the service does not keep, and so does not send: inputs that are read in place, results that are written
elsewhere."""

from batchserve.domain import Job
from batchserve.errors import Elsewhere
from batchserve.storage import is_elsewhere
from batchserve.storage.locations import is_external


def require_own_input(job: Job) -> None:
    """Raises Elsewhere, with the address, for an input that is read in place."""
    if is_external(job.input.key):
        raise Elsewhere(f"job {job.id} reads its input in place, from {job.input.key}: get it there")


def require_own_result(job: Job) -> None:
    """Raises Elsewhere, with the address, for a result that was written elsewhere."""
    target = job.options.target if job.options is not None else None
    if job.result is not None and is_elsewhere(job.result.key):
        raise Elsewhere(
            f"the result of job {job.id} was written to {target.url if target else 'its target'}: get it there"
        )
