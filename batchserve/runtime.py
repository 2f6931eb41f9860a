"""The resources that API, worker and command line share, opened from the settings."""

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from batchserve.db import closed, migrate
from batchserve.db.connect import Database
from batchserve.engines import Engine, Interactive, open_engine, open_interactive
from batchserve.errors import Unavailable
from batchserve.logs import get_logger
from batchserve.metrics import Metrics
from batchserve.settings import Settings
from batchserve.storage import Storage, check_access, open_storage

log = get_logger()

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
    metrics: Metrics = field(default_factory=Metrics)
    """What this process counts."""

    @classmethod
    @contextmanager
    def open(cls, settings: Settings, metrics: Metrics | None = None) -> Iterator["Runtime"]:
        """Opens all resources, migrating an embedded database first, and closes them. `metrics`: to count in.

        Raises SchemaOutdated (a database that the settings name is migrated by hand), SchemaTooNew, SchemaTooOld, and
        InvalidOptions as `open_reached` does.
        """
        storage = open_reached(settings)
        with open_database(settings) as database:
            database.refill_reserve()
            with closing(open_engine(settings)) as engine, closing(open_interactive(settings)) as interactive:
                yield cls(settings, database, storage, engine, interactive, metrics or Metrics())


def open_reached(settings: Settings) -> Storage:
    """The storage of the settings. Raises InvalidOptions for one that refuses its bucket or credentials. One that does
    not respond is waited for: until then requests that need it get 503, and jobs wait.
    """
    storage = open_storage(settings.storage)
    try:
        check_access(storage)
    except Unavailable as error:
        log.warning("Storage does not respond", action="storage_unavailable", detail=error.detail)
    return storage


@contextmanager
def open_database(settings: Settings) -> Iterator[Database]:
    """The database of the settings, an embedded one migrated first.

    Raises SchemaOutdated, SchemaTooNew or SchemaTooOld, and InvalidOptions for one that was moved.
    """
    database = Database(settings.database_url)
    try:
        if not settings.database:
            database.with_reserve(lambda: migrate.upgrade(database))
        database.with_reserve(lambda: migrate.check(database))  # what frees space must start on a full disk, too
        closed.require_open(database)
        yield database
    finally:
        database.close()
