"""Registration: turns an admitted model into a version."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from batchserve import audit, registry
from batchserve.access import Action, Caller
from batchserve.db.connect import Database
from batchserve.domain import ModelVersion, ResultChanges, Signature
from batchserve.errors import InvalidOptions
from batchserve.inference.outputs import ResultSchema
from batchserve.logs import get_logger
from batchserve.storage import Piece, Storage, model_key

__all__ = ["NewModel", "has_artifact", "register", "require_name"]

log = get_logger()

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class NewModel:
    """An admitted model that has no version yet."""

    name: str
    digest: str
    """The SHA-256 of the artifact as submitted."""
    bytes: int
    signature: Signature
    metadata: dict[str, str]
    artifact: Sequence[Piece]
    """The graph to run, which may differ from the artifact."""


def require_name(name: str) -> None:
    """Raises InvalidOptions for an invalid model name."""
    if _NAME.fullmatch(name) is None:
        raise InvalidOptions(f"a model's name has letters, digits, '.', '_' and '-' (at most 128), got {name[:200]!r}")


def register(
    database: Database,
    storage: Storage,
    new: NewModel,
    require: Callable[[ModelVersion | None], None] | None = None,
    *,
    by: Caller = Caller(),  # noqa: B008 - it is frozen
) -> ModelVersion:
    """Stores the artifact, then adds the row of the next version: a row never lacks its bytes. Equal bytes return the
    existing version. `require` is called with the newest version before the insert, and may raise.
    """
    stored = storage.compose(model_key(new.digest), new.artifact)
    with database.write(exclusive="models") as connection:
        newest = registry.find_newest(connection, new.name)
        if require is not None:
            require(newest)
        # Of two equal models at the same time, the second finds the first.
        model = registry.find_digest(connection, new.name, new.digest)
        if model is None:
            now = database.moment(connection).wall
            signature = _compared(new, newest)
            model = registry.add(connection, new.name, new.digest, new.bytes, signature, new.metadata, now)
            audit.note_model(connection, by, Action.REGISTER, model.reference, now)
        if not has_artifact(storage, new.digest):  # the last version with these bytes was deleted in between
            storage.compose(model_key(new.digest), new.artifact)
        registry.set_artifact(connection, new.digest, stored.sha256)
        return model


def _compared(new: NewModel, before: ModelVersion | None) -> Signature:
    """The signature, with what its result columns have changed; that is logged, too."""
    if before is None:
        return new.signature
    now, old = (
        {name: str(kind) for name, kind in ResultSchema(signature).columns.items()}
        for signature in (new.signature, before.signature)
    )
    changes = ResultChanges(
        before.version,
        added={name: kind for name, kind in now.items() if name not in old},
        removed={name: kind for name, kind in old.items() if name not in now},
        retyped={name: (old[name], kind) for name, kind in now.items() if old.get(name, kind) != kind},
    )
    if not changes.added and not changes.removed and not changes.retyped:
        return new.signature
    log.warning(
        "Result columns differ from the version before",
        action="model_changes",
        model=new.name,
        before=before.reference,
        added=list(changes.added),
        removed=list(changes.removed),
        retyped=list(changes.retyped),
    )
    notes = (*new.signature.notes, str(changes))
    return replace(new.signature, changes=changes, notes=notes)


def has_artifact(storage: Storage, digest: str) -> bool:
    try:
        storage.open(model_key(digest)).close()
    except FileNotFoundError:
        return False
    return True
