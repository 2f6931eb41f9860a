"""Registration: turns an admitted model into a version."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchserve import registry
from batchserve.db.connect import Database
from batchserve.domain import ModelVersion, Signature
from batchserve.errors import InvalidOptions
from batchserve.storage import Piece, Storage, model_key

__all__ = ["NewModel", "has_artifact", "register", "require_name"]

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
    database: Database, storage: Storage, new: NewModel, require: Callable[[ModelVersion | None], None] | None = None
) -> ModelVersion:
    """Stores the artifact, then adds the row of the next version: a row never lacks its bytes. Equal bytes return the
    existing version. `require` is called with the newest version before the insert, and may raise.
    """
    stored = storage.compose(model_key(new.digest), new.artifact)
    with database.write(exclusive="models") as connection:
        if require is not None:
            require(registry.find_newest(connection, new.name))
        # Of two concurrent registrations of equal bytes, the second finds the first.
        model = registry.find_digest(connection, new.name, new.digest)
        if model is None:
            now = database.moment(connection).wall
            model = registry.add(connection, new.name, new.digest, new.bytes, new.signature, new.metadata, now)
        if not has_artifact(storage, new.digest):  # the last version with these bytes was deleted in between
            storage.compose(model_key(new.digest), new.artifact)
        registry.set_artifact(connection, new.digest, stored.sha256)
        return model


def has_artifact(storage: Storage, digest: str) -> bool:
    try:
        storage.open(model_key(digest)).close()
    except FileNotFoundError:
        return False
    return True
