"""Model versions: a row of metadata for each, and an artifact in storage."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, bindparam, exists, func, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.connect import Database, lock
from batchserve.db.tables import jobs, models
from batchserve.db.watcher import Probe
from batchserve.domain import JobState, ModelVersion, Signature
from batchserve.errors import ModelInUse, ModelNotFound, UnreadableRow

_OWN = ("artifact_sha256", "deleted_at")
model_columns = [column.label(f"model_{column.name}") for column in models.c if column.name not in _OWN]
"""The columns of a model version, for a query that joins them to another table."""


def model_from_row(row: rows.Row) -> ModelVersion:
    """The model version in a row that was selected with `model_columns`. Raises UnreadableRow."""
    return rows.model(row, "model_")


def find_digest(connection: Connection, name: str, digest: str) -> ModelVersion | None:
    """The version of this model that holds these bytes."""
    return _one(connection, _OF_DIGEST, {"of_name": name, "of_digest": digest})


def add(
    connection: Connection,
    name: str,
    digest: str,
    size: int,
    signature: Signature,
    metadata: dict[str, str],
    now: float,
) -> ModelVersion:
    """Registers the next version. The artifact is in storage already: a version without its bytes is never visible."""
    lock(connection, "models")
    newest = connection.scalar(select(func.max(models.c.version)).where(models.c.name == name)) or 0
    connection.execute(
        insert(models).values(
            name=name,
            version=newest + 1,
            digest=digest,
            bytes=size,
            signature=rows.signature_adapter.dump_json(signature).decode(),
            metadata=metadata,
            created_at=now,
        )
    )
    return resolve(connection, f"{name}@{newest + 1}")


def count(connection: Connection) -> tuple[int, int]:
    """The number of models, and of their versions."""
    counted = select(func.count(models.c.name.distinct()), func.count()).where(models.c.deleted_at.is_(None))
    names, versions = connection.execute(counted).one()
    return int(names), int(versions)


def find_newest(connection: Connection, name: str) -> ModelVersion | None:
    """The newest version of this model, if it has one."""
    return _one(connection, _NEWEST, {"of_name": name})


async def state(database: Database, reference: str) -> Hashable | None:
    """The version of what `resolve` gives for a reference, for a cache: rows of models only end. See
    `Database.probe`."""
    name, _, version = reference.partition("@")
    if not version:
        return await database.probe(_STATE_OF_NEWEST, of_name=name)
    is_number = version.isascii() and version.isdecimal() and len(version) < 10
    if not is_number:
        return None
    return await database.probe(_STATE_OF_VERSION, of_name=name, of_version=int(version))


def resolve(connection: Connection, reference: str) -> ModelVersion:
    """`name` gives the newest version, `name@version` that one. Raises ModelNotFound, which names the existing ones."""
    name, at, version = reference.partition("@")
    if "\0" in name:
        raise ModelNotFound(f"no model {reference[:200]!r}: a name has letters, digits, '.', '_' and '-'")
    if at and not (version.isascii() and version.isdecimal() and len(version) < 10):
        raise ModelNotFound(f"no model {reference[:200]!r}: the version after @ is a number, as in {name[:200]}@1")
    if at:
        found = _one(connection, _OF_VERSION, {"of_name": name, "of_version": int(version)})
    else:
        found = find_newest(connection, name)
    if found is None:
        raise ModelNotFound(f"no model {reference[:200]!r}; {_alternatives(connection, name)}")
    return found


def _alternatives(connection: Connection, name: str) -> str:
    """The alternatives to a missing model: its other versions, or other models."""
    of_name = (models.c.name == name) & models.c.deleted_at.is_(None)
    numbers = connection.scalars(
        select(models.c.version).where(of_name).order_by(models.c.version.desc()).limit(20)
    ).all()
    if numbers:
        return f"{name} has version{'s' if len(numbers) > 1 else ''} {', '.join(map(str, reversed(numbers)))}"
    known = connection.scalars(
        select(models.c.name).where(models.c.deleted_at.is_(None)).distinct().order_by(models.c.name).limit(20)
    ).all()
    return f"registered are {', '.join(known)}" if known else "none is registered yet: PUT one to /v1/models/<name>"


def newest_versions(connection: Connection) -> list[ModelVersion]:
    """The newest version of every model, by name."""
    return newest_page(connection)[0]


def newest_page(
    connection: Connection, search: str | None = None, after: str = "", limit: int | None = None
) -> tuple[list[ModelVersion], str | None]:
    """The same of the models with a part of their name, behind a name, up to `limit`; and the name of the last one, if
    there are more."""
    guards: list[ColumnElement[bool]] = [models.c.deleted_at.is_(None), models.c.name > after]
    if search:
        guards.append(models.c.name.icontains(search, autoescape=True))
    newest = (
        select(models.c.name, func.max(models.c.version).label("version"))
        .where(*guards)
        .group_by(models.c.name)
        .order_by(models.c.name)
        .limit(None if limit is None else limit + 1)
        .subquery()
    )
    query = select(*model_columns).join(
        newest, (models.c.name == newest.c.name) & (models.c.version == newest.c.version)
    )
    found = connection.execute(query.order_by(models.c.name)).mappings().all()
    more = limit is not None and len(found) > limit
    return _readable(found[:limit]), found[:limit][-1]["model_name"] if more else None


def versions(connection: Connection, name: str) -> list[ModelVersion]:
    """All versions of a model, newest first. Raises ModelNotFound."""
    query = select(*model_columns).where(models.c.name == name, models.c.deleted_at.is_(None))
    found = connection.execute(query.order_by(models.c.version.desc())).mappings().all()
    return _readable(found) if found else [resolve(connection, name)]


def resolve_to_remove(connection: Connection, name: str, version: int) -> ModelVersion:
    """The same for one version. An unreadable one is returned with only what its removal needs. Raises
    ModelNotFound."""
    try:
        return resolve(connection, f"{name}@{version}")
    except UnreadableRow:
        values = {"of_name": name, "of_version": version}
        row = connection.execute(_OF_VERSION, values).mappings().one()
        return ModelVersion(row["model_id"], name, version, str(row["model_digest"]), 0, Signature((), ()))


def delete_if_unused(connection: Connection, model: ModelVersion, now: float) -> None:
    """Removes a version. Raises ModelInUse. The row remains for the jobs that name it."""
    lock(connection, "models")  # the lock that queueing a job for a model shares
    unfinished = (JobState.UPLOADED, JobState.QUEUED, JobState.RUNNING)
    users = connection.scalar(
        select(func.count()).select_from(jobs).where(jobs.c.model_id == model.id, jobs.c.state.in_(unfinished))
    )
    if users:
        raise ModelInUse(f"{model.reference} is used by {users} unfinished job(s): wait for them or cancel them")
    connection.execute(update(models).where(models.c.id == model.id).values(deleted_at=now))


def set_artifact(connection: Connection, digest: str, sha256: str | None) -> None:
    """The SHA-256 of the stored artifact of these bytes, for all versions that share it."""
    connection.execute(update(models).where(models.c.digest == digest).values(artifact_sha256=sha256))


def has_version(connection: Connection, digest: str) -> bool:
    """Whether a version of any model needs the artifact of these bytes."""
    return bool(connection.scalar(select(exists().where(models.c.digest == digest, models.c.deleted_at.is_(None)))))


def unused_digests(connection: Connection) -> set[str]:
    """The digests of deleted versions whose artifact no other version needs."""
    there = select(models.c.digest).where(models.c.deleted_at.is_(None))
    deleted = select(models.c.digest).where(models.c.deleted_at.is_not(None), models.c.digest.not_in(there))
    return set(connection.scalars(deleted))


def _readable(found: Sequence[RowMapping]) -> list[ModelVersion]:
    """Unreadable rows are skipped: they hide no other."""
    readable = []
    for row in found:
        with suppress(UnreadableRow):
            readable.append(model_from_row(row))
    return readable


def _one(connection: Connection, query: Select[Any], values: dict[str, Any]) -> ModelVersion | None:
    row = connection.execute(query, values).mappings().one_or_none()
    return model_from_row(row) if row else None


# Every predict resolves a model. Building a statement costs more than running it: these are built once.
_NEWEST = (
    select(*model_columns)
    .where(models.c.deleted_at.is_(None), models.c.name == bindparam("of_name"))
    .order_by(models.c.version.desc())
    .limit(1)
)
_OF_VERSION = _NEWEST.where(models.c.version == bindparam("of_version"))
_OF_DIGEST = _NEWEST.where(models.c.digest == bindparam("of_digest"))
_STATE_OF_NEWEST = Probe(_NEWEST.with_only_columns(models.c.id))
_STATE_OF_VERSION = Probe(_OF_VERSION.with_only_columns(models.c.id))
