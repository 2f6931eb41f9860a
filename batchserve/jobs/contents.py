"""Small inputs and results, whose bytes are in rows of the database. They are written with the rows of their job, and
removed with the last row that references them, each in one transaction: none is ever without an owner.
"""

import errno
import io
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import BinaryIO

from sqlalchemy import Connection, bindparam, delete, insert, select

from batchserve.db.connect import Database
from batchserve.db.prepared import Prepared
from batchserve.db.tables import contents, jobs
from batchserve.domain import Job, StoredInput
from batchserve.errors import JobNotFound
from batchserve.jobs.queries import get_whole, named_inputs, named_results
from batchserve.jobs.statements import JOBS, Owned, job_from_row
from batchserve.quotas import account
from batchserve.storage import Storage, is_in_row, key_in_storage


def add(connection: Connection, added: Mapping[str, bytes]) -> None:
    """Adds contents by their keys."""
    _ADD.send(connection, *({"key": key, "content": content} for key, content in added.items()))


def find(connection: Connection, key: str) -> bytes:
    """Raises FileNotFoundError."""
    content = _CONTENT.scalar(connection, {"its_key": key})
    if content is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
    return bytes(content)


def with_content(connection: Connection, stored: StoredInput) -> StoredInput:
    """The input with its content, if that is in a row. One whose row is lost stays as it is: to open it raises
    FileNotFoundError, as for a lost file."""
    if stored.content is not None or not is_in_row(stored.key):
        return stored
    return replace(stored, content=_CONTENT.scalar(connection, {"its_key": stored.key}))


def get_with_inputs(connection: Connection, job_id: str) -> tuple[Job, tuple[StoredInput, ...]]:
    """A job and its inputs, the first with its content if that is in a row and was not removed. Raises JobNotFound."""
    job = get_whole(connection, job_id)
    if job.input_removed_at is not None:
        return job, job.inputs
    return job, (with_content(connection, job.input), *job.inputs[1:])


def get_with_result(connection: Connection, job_id: str) -> tuple[Job, bytes | None]:
    """A job and its result, where that is in a row. Raises JobNotFound."""
    row = _WITH_RESULT.row(connection, {"job_id": job_id})
    if row is None:
        raise JobNotFound(f"no job {job_id!r}")
    content = row["result_content"]
    return job_from_row(row), None if content is None else bytes(content)


def opened(database: Database, storage: Storage, key: str) -> BinaryIO:
    """A reader of an object in a row or in the storage. Raises FileNotFoundError."""
    if not is_in_row(key):
        return storage.open(key)
    with database.read() as connection:
        return io.BytesIO(find(connection, key))


def release(connection: Connection, removed: Collection[Owned]) -> None:
    """Deletes the contents that these jobs referenced, and gives the bytes of all their objects back to the accounts of
    their tenants, unless another job references them."""
    if not removed:
        return
    with_account = account.locked(connection, {job.tenant for job in removed})
    keys = {key for job in removed for key in (*job.inputs, job.result_key, job.errors_key) if key and is_in_row(key)}
    known = [job for job in removed if job.tenant in with_account]
    sizes = {key: (job.tenant, size) for job in known for key, size in job.sizes.items()}
    if keys or sizes:
        asked = keys | sizes.keys()
        of_results = {key for key in asked if key_in_storage(key).startswith("results/")}
        unnamed = asked - named_inputs(connection, asked - of_results) - named_results(connection, of_results)
        _delete(connection, unnamed & keys)
        freed: Counter[str] = Counter()
        for tenant, size in (sizes[key] for key in unnamed & sizes.keys()):
            freed[tenant] += size
        account.give_back(connection, freed)


def _delete(connection: Connection, keys: Collection[str]) -> None:
    connection.execute(delete(contents).where(contents.c.key.in_(keys)))


_ADD = Prepared(insert(contents))
_WITH_RESULT = Prepared(
    JOBS.add_columns(contents.c.content.label("result_content"))
    .outerjoin(contents, contents.c.key == jobs.c.result_key)
    .where(jobs.c.id == bindparam("job_id"))
)
_CONTENT = Prepared(select(contents.c.content).where(contents.c.key == bindparam("its_key")))
