"""`batchserve audit`: the audit log, read from the database directly, as keys are."""

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated

import typer

from batchserve.access import EVERY_TENANT, Action
from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, moment, print_json, print_rows


def audit(
    tenant: Annotated[str, typer.Option(help="Only entries about this tenant, and about models.")] = EVERY_TENANT,
    action: Annotated[list[Action] | None, typer.Option(help="Only this; may be repeated.")] = None,
    subject: Annotated[
        str | None, typer.Option(metavar="ID|NAME", help="Only about this job, NAME@VERSION of a model, or key.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="NAME", help="Only by this API key.")] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Not before this, as in 7d.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Only before this.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most entries to list.")] = 30,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """List who cancelled, retried, deleted, registered, revoked or set what, newest first."""
    from batchserve.api.schemas.filters import moments
    from batchserve.audit import AuditFilter, list_page
    from batchserve.runtime import open_database

    times = {name: text for name, text in (("since", since), ("until", until)) if text is not None}
    with open_database(settings_of(storage, database)) as opened, opened.read() as connection:
        dated = moments(times, opened.moment(connection).wall)
        wanted = AuditFilter(actions=tuple(action or ()), subject=subject, key=key, **dated)
        entries = [
            asdict(entry) | {"at": datetime.fromtimestamp(entry.at, UTC).isoformat()}
            for entry in list_page(connection, tenant, wanted, limit=limit)
        ]
    if as_json:
        print_json(entries)
        return
    columns = ("at", "tenant", "key", "action", "kind", "subject")
    print_rows(columns, [(moment(entry["at"]), *(entry[name] for name in columns[1:])) for entry in entries])
