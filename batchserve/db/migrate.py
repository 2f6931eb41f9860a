"""Schema versions. The only module that uses Alembic."""

import threading
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import make_url

from batchserve.db.connect import Database, unbounded
from batchserve.errors import SchemaOutdated, SchemaTooNew, SchemaTooOld

_DEVELOPMENT = ("0001", "0002", "0003", "0004")
"""Versions before the first release, which cannot be migrated."""
_PACKAGE = Path(__file__).resolve().parent.parent
_upgrading = threading.Lock()


def upgrade(database: Database) -> tuple[str | None, str]:
    """Brings the schema to this release's version; returns the versions before and after.

    An existing SQLite file is first copied to the same folder, as `batchserve.db.before-<version>-<time>`. Raises
    SchemaTooNew, and SchemaTooOld.
    """
    before, after = current_version(database), newest_version()
    if before == after:
        return before, after
    _refuse_unknown(database, before)
    if before is not None:
        _copy_sqlite(database, before)
    config = _config()
    # Alembic keeps its state in globals of the process: one thread at a time.
    # A large table may take long to change.
    with _upgrading, database.write(exclusive="schema") as connection, unbounded(connection):
        config.attributes["connection"] = connection
        command.upgrade(config, "head")  # which reads the version again, behind the lock
    database.write_back()  # a disk that becomes full later need not have space for the new tables
    return before, after


def check(database: Database) -> None:
    """Raises SchemaOutdated, SchemaTooNew or SchemaTooOld, with advice, unless the schema is this release's."""
    version = current_version(database)
    _refuse_unknown(database, version)
    if version != newest_version():
        raise SchemaOutdated(
            f"the database is at schema {version or 'none'}, this release needs {newest_version()}: "
            "run `batchserve migrate`"
        )


def current_version(database: Database) -> str | None:
    with database.read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def newest_version() -> str:
    (head,) = ScriptDirectory.from_config(_config()).get_heads()
    return head


def _refuse_unknown(database: Database, version: str | None) -> None:
    if version in _DEVELOPMENT:
        place = make_url(database.url).render_as_string()
        raise SchemaTooOld(
            f"the database {place} is at schema {version}, of a version before the first release, and cannot be "
            "carried over. Download the results that you need with that version, then begin anew: in an empty storage "
            "(BATCHSERVE_STORAGE), or in an empty database (BATCHSERVE_DATABASE)"
        )
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if version is not None and version not in known:
        raise SchemaTooNew(
            f"the database is at schema {version}, newer than this release supports ({newest_version()}): "
            "run `pip install --upgrade batchserve`"
        )


def _config() -> Config:
    inside = _PACKAGE / "migrations"  # in a wheel; in a checkout the folder is next to the package
    config = Config()
    config.set_main_option("script_location", str(inside if inside.is_dir() else _PACKAGE.parent / "migrations"))
    return config


def _copy_sqlite(database: Database, version: str) -> None:
    url = make_url(database.url)
    if url.get_backend_name() != "sqlite" or not url.database or not Path(url.database).exists():
        return
    copy = Path(f"{url.database}.before-{version}-{time.strftime('%Y%m%dT%H%M%S')}")
    database.copy_to(copy)
