"""`batchserve audit`: the audit log, read from the database directly, as keys are."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from batchserve.access import EVERY_TENANT
from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, moment, print_json, print_rows


def audit(
    tenant: Annotated[str, typer.Option(help="Only entries about this tenant, and about models.")] = EVERY_TENANT,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most entries to list.")] = 30,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """List who cancelled, retried, deleted, registered, revoked or set what, newest first."""
    from batchserve.audit import list_page
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened, opened.read() as connection:
        entries = [
            asdict(entry) | {"at": datetime.fromtimestamp(entry.at, UTC).isoformat()}
            for entry in list_page(connection, tenant, limit=limit)
        ]
    if as_json:
        print_json(entries)
        return
    columns = ("at", "tenant", "key", "action", "kind", "subject")
    print_rows(columns, [(moment(entry["at"]), *(entry[name] for name in columns[1:])) for entry in entries])
