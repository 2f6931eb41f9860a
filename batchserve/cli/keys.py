"""`batchserve keys ...`: API keys are created and revoked in the database directly, never over HTTP."""

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.access import DEFAULT_TENANT, EVERY_TENANT, ApiKey, Scope
from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, moment, print_json, print_rows, say

app = typer.Typer(help="API keys: access to the server, and to the jobs of a tenant.", no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for display.")],
    scope: Annotated[
        Scope, typer.Option(help="`user`; `admin`, which also registers models; `reader`, which changes nothing.")
    ] = Scope.USER,
    tenant: Annotated[
        str, typer.Option(help="The tenant whose jobs it creates and sees; * (admin only) sees all.")
    ] = DEFAULT_TENANT,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it, only this once. From the first key on, every request needs one."""
    from sqlalchemy import make_url

    from batchserve import keys
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened:
        where = make_url(opened.url).render_as_string(hide_password=True)
        with opened.read() as connection:
            first = not keys.exist(connection)
        with opened.write() as connection:
            key, text = keys.create(connection, name, scope, tenant, opened.moment(connection).wall)
    if as_json:
        print_json(_shown(key) | {"key": text})
    else:
        sys.stdout.write(f"{text}\n")
    whose = "of all tenants" if key.tenant == EVERY_TENANT else f"of the tenant {key.tenant}"
    say(f"Key [bold]{escape(key.name)}[/] ({key.scope}) {escape(whose)} is in {escape(where)}.")
    say("Keep the key: it is not stored, and not shown again.")
    if first:
        say("From now on every request needs a key. Commands read it from BATCHSERVE_API_KEY.")


@app.command("list")
def list_keys(
    tenant: Annotated[str | None, typer.Option(help="Only keys of this tenant.")] = None,
    scope: Annotated[Scope | None, typer.Option(help="Only keys of this scope.")] = None,
    in_force: Annotated[bool, typer.Option("--in-force", help="Without revoked keys.")] = False,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """List all keys, with their first characters only."""
    from batchserve import keys
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened, opened.read() as connection:
        found = [
            _shown(key)
            for key in keys.list_all(connection)
            if (tenant is None or key.tenant == tenant)
            and (scope is None or key.scope is scope)
            and not (in_force and key.revoked_at is not None)
        ]
    if as_json:
        print_json(found)
        return
    columns = ("id", "name", "scope", "tenant", "begins", "created", "revoked")
    print_rows(
        columns,
        [
            (
                key["id"],
                key["name"],
                key["scope"],
                key["tenant"],
                key["prefix"],
                moment(key["created_at"]),
                moment(key["revoked_at"]),
            )
            for key in found
        ],
    )


@app.command()
def revoke(
    reference: Annotated[str, typer.Argument(metavar="ID|NAME", help="The key.")],
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key, immediately and permanently. Its jobs continue."""
    from batchserve import keys
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened:
        key = opened.write_freeing(
            lambda connection: keys.revoke(connection, reference, opened.moment(connection).wall)
        )
    if as_json:
        print_json(_shown(key))
    say(f"Key [bold]{escape(key.name)}[/] ({key.prefix}...) is revoked.")


def _shown(key: ApiKey) -> dict[str, Any]:
    def rfc3339(seconds: float | None) -> str | None:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()

    return asdict(key) | {"created_at": rfc3339(key.created_at), "revoked_at": rfc3339(key.revoked_at)}
