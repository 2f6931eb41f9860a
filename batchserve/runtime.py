"""The resources that API, worker and command line share, opened from the settings."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from batchserve.db import migrate
from batchserve.db.connect import Database
from batchserve.engines import Engine, Interactive, open_engine, open_interactive
from batchserve.settings import Settings
from batchserve.storage import Storage, open_storage

_LONGEST_NAME = 64
"""Most characters of a worker's name in the database."""


def process_name() -> str:
    """The name of this process in attempts. Host names differ at their end."""
    return f"{socket.gethostname()}-{os.getpid()}"[-_LONGEST_NAME:]


@dataclass(frozen=True, slots=True)
class Runtime:
    settings: Settings
    database: Database
    storage: Storage
    engine: Engine
    """Runs the chunks of jobs."""
    interactive: Interactive
    """Runs interactive calls: always on this host."""

    @classmethod
    @contextmanager
    def open(cls, settings: Settings) -> Iterator["Runtime"]:
        """Opens all resources, migrating an embedded database first, and closes them.

        Raises SchemaOutdated (a database that the settings name is migrated by hand), SchemaTooNew or SchemaTooOld.
        """
        storage = open_storage(settings.storage)
        with open_database(settings) as database:
            database.refill_reserve()
            with closing(open_engine(settings)) as engine, closing(open_interactive(settings)) as interactive:
                yield cls(settings, database, storage, engine, interactive)


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database of the settings, an embedded one migrated first.

    Raises SchemaOutdated, SchemaTooNew or SchemaTooOld.
    """
    database = Database(settings.database_url)
    try:
        if not settings.database:
            database.with_reserve(lambda: migrate.upgrade(database))
        database.with_reserve(lambda: migrate.check(database))  # what frees space must start on a full disk, too
        yield database
    finally:
        database.close()
