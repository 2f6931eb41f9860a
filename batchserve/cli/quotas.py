"""`batchserve quotas ...`: limits of tenants, set in the database directly, as keys are; `batchserve usage` asks the
server."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.access import EVERY_TENANT, Quota
from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_facts, print_json, print_rows, say, size
from batchserve.client import Client
from batchserve.errors import NotFound

app = typer.Typer(help="Quotas: the limits of tenants, and what they use.", no_args_is_help=True)

Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant; * for all that have no quota of their own.")]


@app.command("set")
def set_quota(
    tenant: Tenant,
    jobs: Annotated[int | None, typer.Option(min=0, help="Jobs that are queued or running.")] = None,
    stored: Annotated[
        int | None, typer.Option("--bytes", min=0, help="Bytes of inputs and results that are stored.")
    ] = None,
    rows_per_day: Annotated[int | None, typer.Option(min=0, help="Rows that jobs have in a day (UTC).")] = None,
    requests_per_second: Annotated[
        float | None, typer.Option(min=0.01, help="Requests to each server process.")
    ] = None,
    storage: Storage = None,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Set the limits of a tenant; what is left out is unlimited. In force within a second."""
    from batchserve import keys
    from batchserve.quotas import limits
    from batchserve.runtime import open_database

    quota = Quota(tenant, jobs, stored, rows_per_day, requests_per_second)
    with open_database(settings_of(storage, database)) as opened, opened.write() as connection:
        limits.set_limits(connection, quota, opened.moment(connection).wall, keys.COMMAND)
    if as_json:
        print_json(asdict(quota))
    say(f"The quota of {escape(_named(tenant))} is set.")


@app.command("list")
def list_quotas(storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """List the quotas, and what their tenants use now."""
    from batchserve.quotas import account, limits
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened, opened.read() as connection:
        quotas = limits.list_all(connection)
        usages = account.usages(connection, opened.moment(connection).wall)
    if as_json:
        print_json({"quotas": [asdict(quota) for quota in quotas], "usage": [asdict(usage) for usage in usages]})
        return
    of_all = [quota for quota in quotas if quota.tenant == EVERY_TENANT]
    rows = [_row(quota.tenant, quota, ("", "", "")) for quota in of_all]
    rows += [_row(usage.tenant, usage.quota, (usage.jobs, usage.bytes, usage.rows)) for usage in usages]
    print_rows(("tenant", "jobs", "of", "bytes", "of", "rows today", "of", "requests/s"), rows)


@app.command("rm")
def remove(tenant: Tenant, storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """Remove the quota of a tenant. Those of * limit it from then on, if there are any."""
    from batchserve import keys
    from batchserve.quotas import limits
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened, opened.write() as connection:
        limits.remove(connection, tenant, opened.moment(connection).wall, keys.COMMAND)
    if as_json:
        print_json({"tenant": tenant})
    say(f"The quota of {escape(_named(tenant))} is removed.")


@app.command()
def recount(tenant: Tenant, storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """Count the stored bytes of a tenant anew, where `batchserve doctor` finds that its account differs."""
    from batchserve.quotas import account
    from batchserve.runtime import open_database

    with open_database(settings_of(storage, database)) as opened, opened.write() as connection:
        stored = account.recount(connection, tenant)
    if stored is None:
        raise NotFound(f"the tenant {tenant!r} has no account: only those with a quota have one")
    if as_json:
        print_json({"tenant": tenant, "bytes": stored})
    say(f"The tenant {escape(tenant)} has {size(stored)} stored.")


def usage(
    tenant: Annotated[str | None, typer.Option(help="Another tenant, with an admin key of all tenants.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the tenant of the key uses, and its limits."""
    with Client() as client:
        found = client.quotas.usage(tenant)
    if as_json:
        print_json(found)
        return
    rows = found["rows_per_day"]
    print_facts(
        {
            "tenant": found["tenant"],
            "jobs queued or running": _of(found["jobs"]),
            "bytes stored": _of(found["bytes"]),
            "rows today": _of(rows),
            "rows count from 0 at": rows["resets_at"],
            "requests a second": found["requests_per_second"],
        }
    )


def _named(tenant: str) -> str:
    return "all other tenants" if tenant == EVERY_TENANT else f"the tenant {tenant}"


def _row(tenant: str, quota: Quota | None, used: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    quota = quota or Quota(tenant)
    jobs, stored, rows = used
    return tenant, jobs, quota.jobs, stored, quota.bytes, rows, quota.rows_per_day, quota.requests_per_second


def _of(found: dict[str, Any]) -> str:
    limit = ", unlimited" if found["limit"] is None else f" of {found['limit']:,}"
    return f"{found['used']:,}{limit}"
