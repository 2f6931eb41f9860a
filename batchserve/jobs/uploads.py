"""Direct uploads: each has a row until its job is created under the same ID, which no client sees before."""

from collections.abc import Collection

from sqlalchemy import Connection, delete, insert, select

from batchserve import rows
from batchserve.access import EVERY_TENANT
from batchserve.db.tables import direct_uploads
from batchserve.domain import DirectUpload
from batchserve.errors import UploadNotFound
from batchserve.quotas import account
from batchserve.storage import input_key, sent_key


def begin(connection: Connection, upload: DirectUpload) -> None:
    """Stores it; its bytes are to be charged."""
    values = {name: getattr(upload, name) for name in DirectUpload.__dataclass_fields__}
    connection.execute(insert(direct_uploads).values(values))


def get(connection: Connection, upload_id: str, tenant: str) -> DirectUpload:
    """Raises UploadNotFound, also for one of another tenant, and UnreadableRow."""
    query = select(direct_uploads).where(direct_uploads.c.id == upload_id)
    row = None if "\0" in upload_id else connection.execute(query).mappings().one_or_none()
    if row is None or tenant not in (row["tenant"], EVERY_TENANT):
        raise UploadNotFound(f"no upload {upload_id!r}")
    return rows.direct_upload(row)


def sent_object(upload: DirectUpload) -> str:
    """The key of what its client has sent; of parts when they are joined, which then no client can change."""
    return sent_key(upload.id) if upload.multipart is None else input_key(upload.id)


def end(connection: Connection, upload_id: str) -> None:
    """Deletes it. Raises UploadNotFound when it was ended before: the second of two concurrent ends waits for the
    first."""
    ended = delete(direct_uploads).where(direct_uploads.c.id == upload_id)
    found = connection.execute(ended.returning(direct_uploads.c.tenant, direct_uploads.c.bytes)).all()
    if not found:
        raise UploadNotFound(f"no upload {upload_id!r}")
    _give_back(connection, [(row.tenant, row.bytes) for row in found])


def end_expired(connection: Connection, before: float, most: int) -> list[DirectUpload]:
    """Deletes up to `most` of those that expired before a moment; returns them."""
    query = select(direct_uploads).where(direct_uploads.c.expires_at < before).order_by(direct_uploads.c.id).limit(most)
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    found = connection.execute(query.with_for_update(skip_locked=True)).mappings().all()
    connection.execute(delete(direct_uploads).where(direct_uploads.c.id.in_([row["id"] for row in found])))
    _give_back(connection, [(row["tenant"], row["bytes"]) for row in found])
    return [DirectUpload(**row) for row in found]


def _give_back(connection: Connection, ended: Collection[tuple[str, int]]) -> None:
    """Subtracts the announced bytes from the accounts of their tenants."""
    if not ended:
        return
    freed = dict.fromkeys(account.locked(connection, {tenant for tenant, _ in ended}), 0)
    for tenant, size in ended:
        if tenant in freed:
            freed[tenant] += size
    account.give_back(connection, freed)


def pending(connection: Connection, upload_ids: Collection[str]) -> set[str]:
    """Those of these IDs that have a row."""
    return set(connection.scalars(select(direct_uploads.c.id).where(direct_uploads.c.id.in_(upload_ids))))
