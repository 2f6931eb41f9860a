"""`batchserve backup` and `batchserve restore`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_json, say, size

if TYPE_CHECKING:
    from batchserve.upkeep.backup import CopyReport

MOST_SHOWN = 10
OTHERS = "of a PostgreSQL database, `pg_dump` and `pg_restore` do that, and tools of your storage for its objects"


def backup(
    target: Annotated[Path, typer.Argument(help="The folder to create; preferably on another disk.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy all bytes, even where hard links would do (on the storage's disk).")
    ] = False,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Copy the database and all objects that it references, while the server runs. Exits with 1 if some are damaged."""
    from sqlalchemy import make_url

    from batchserve.db import migrate
    from batchserve.db.connect import Database as Connection
    from batchserve.storage import open_storage
    from batchserve.upkeep.backup import back_up

    settings = settings_of(storage, database)
    if make_url(settings.database_url).get_backend_name() != "sqlite":
        raise typer.BadParameter(f"only an SQLite database can be copied from here: {OTHERS}", param_hint="--database")
    if "://" in settings.storage:
        raise typer.BadParameter(
            f"{settings.storage} is not a folder: protect it by the versioning or replication of its store, and back "
            "up the database with its own tools, such as pg_dump, before the objects",
            param_hint="--storage",
        )
    if not Path(settings.storage).is_dir():
        raise typer.BadParameter(f"{settings.storage} is not a folder", param_hint="--storage")
    connection = Connection(settings.database_url)
    try:
        migrate.check(connection)
        copied = back_up(connection, open_storage(settings.storage), target, link=not copy)
    finally:
        connection.close()
    linked = f", {copied.linked:,} of them as hard links" if copied.linked else ""
    what = f"the database and {copied.objects:,} objects ({size(copied.bytes)}{linked})"
    show(copied, f"Backed up {what} to {target}.", as_json=as_json)


def restore(
    source: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A folder created by `backup`.")],
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Restore a backup into an empty storage, verifying every byte. Then start the server there."""
    from sqlalchemy import make_url

    from batchserve.storage import open_storage
    from batchserve.upkeep.backup import restore as put_back

    settings = settings_of(storage, database)
    url = make_url(settings.database_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise typer.BadParameter(
            f"only an SQLite database can be restored from here: {OTHERS}", param_hint="--database"
        )
    copied = put_back(source, open_storage(settings.storage), Path(url.database).absolute())
    what = f"the database and {copied.objects:,} objects ({size(copied.bytes)})"
    show(copied, f"Restored {what} into {settings.storage}.", as_json=as_json)


def show(copied: "CopyReport", sentence: str, *, as_json: bool) -> None:
    if as_json:
        print_json(asdict(copied))
    else:
        say(escape(sentence))
    show_damaged(copied.damaged)


def show_damaged(damaged: Sequence[str]) -> None:
    """Exits with 1 if there are any."""
    if damaged:
        shown = ", ".join(damaged[:MOST_SHOWN])
        more = f" and {len(damaged) - MOST_SHOWN} more" if len(damaged) > MOST_SHOWN else ""
        say(f"Already damaged or missing: {escape(shown)}{more}. Run [bold]batchserve doctor --deep[/] for the repair.")
        raise typer.Exit(1)
