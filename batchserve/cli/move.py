"""`batchserve migrate-to`."""

from contextlib import closing
from dataclasses import asdict
from typing import Annotated

import typer
from rich.markup import escape

from batchserve.cli.backup import show_damaged
from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_json, say, size


def migrate_to(
    to_database: Annotated[str, typer.Option(help="Address of the new database, which has no jobs and models.")],
    to_storage: Annotated[str, typer.Option(help="Address of the new storage.")],
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Move an embedded installation to PostgreSQL and a bucket, with its jobs, models and keys. The server may run
    meanwhile: at the end it refuses changes with 503, until you start it at the new place."""
    from batchserve.db import migrate
    from batchserve.db.connect import Database as Connection
    from batchserve.storage import check_access, open_storage
    from batchserve.upkeep.move import move

    settings, new = settings_of(storage, database), settings_of(to_storage, to_database)
    with closing(Connection(settings.database_url)) as source, closing(Connection(new.database_url)) as target:
        migrate.check(source)
        place = open_storage(new.storage)
        check_access(place)
        moved = move(source, open_storage(settings.storage), target, place, say=say)
    if as_json:
        print_json(asdict(moved))
    else:
        what = f"{moved.jobs:,} jobs, {moved.models:,} versions of models and {moved.objects:,} objects"
        say(escape(f"Moved {what} ({size(moved.bytes)}) to {new.storage}."))
        say("Stop the old server and its workers, then start them with the new addresses.")
    show_damaged(moved.damaged)
