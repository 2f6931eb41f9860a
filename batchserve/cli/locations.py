"""`batchserve jobs create`: a job over files, objects or the rows of a query, which the server reads where they are."""

from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from batchserve.cli.files import Decimal, Delimiter
from batchserve.cli.jobs import Key, Model, Passthrough, Timeout, summary, wait_for
from batchserve.cli.terminal import AsJson, print_json, say
from batchserve.client import Client

Urls = Annotated[
    list[str] | None, typer.Argument(metavar="URL...", help="Addresses or patterns: file:///... or s3://...")
]
Query = Annotated[
    str | None, typer.Option(metavar="SELECT", help="Score the rows of a query instead; with --connection.")
]
Connection = Annotated[
    str | None, typer.Option(metavar="NAME", help="The database of the query, by the name that the server has for it.")
]
Output = Annotated[
    str | None,
    typer.Option("--output", "-o", metavar="URL", help="Where the result goes; with {stem}, one for each input."),
]
Table = Annotated[
    str | None, typer.Option(metavar="CONNECTION.SCHEMA.NAME", help="Put the rows of the result into a table.")
]
Mode = Annotated[
    Literal["append", "replace"] | None, typer.Option(help="Of a table: replace removes the rows that it has.")
]
InputFile = Annotated[
    bool, typer.Option("--input-file", help="Add a column with the address of the input of each record.")
]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="KEY", help="A command with the key of an earlier one continues with its job.")
]


def create(
    model: Model,
    urls: Urls = None,
    query: Query = None,
    connection: Connection = None,
    output: Output = None,
    table: Table = None,
    mode: Mode = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    archive: Annotated[bool, typer.Option("--archive", help="Keep one result for each input, in a ZIP.")] = False,
    input_file: InputFile = False,
    format: Annotated[
        str | None, typer.Option(help="Format of the result. Default: by the suffix of --output, or the inputs'.")
    ] = None,
    passthrough: Passthrough = None,
    key: Key = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    idempotency_key: IdempotencyKey = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, or print the job's id.")] = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Score files of the server, objects of buckets, or the rows of a query, where they are."""
    of_urls: dict[str, Any] = {"output": output, "overwrite": overwrite, "archive": archive, "input_file": input_file}
    of_text = {"delimiter": delimiter, "decimal": decimal}
    of_both = {"table": table, "mode": mode, "format": format, "passthrough": passthrough, "key": key}
    options: Any = {name: value for name, value in {**of_both, **of_text}.items() if value is not None}
    with Client() as client:
        if _is_query(query, connection, urls, {**of_urls, **of_text}):
            job = client.submit_query(
                query or "", model, connection=connection or "", idempotency_key=idempotency_key, **options
            )
        else:
            job = client.submit_urls(urls or (), model, idempotency_key=idempotency_key, **of_urls, **options)
        if wait:
            wait_for(job, timeout)
        if as_json:
            print_json(job.data)
        elif not wait:
            print(job.id)
    if wait:
        written = output or table
        where = f"written to [bold]{escape(written)}[/]" if written else f"[bold]batchserve jobs download {job.id}[/]"
        say(f"{summary(job)} Result: {where}")


def _is_query(query: str | None, connection: str | None, urls: list[str] | None, of_urls: dict[str, Any]) -> bool:
    """`of_urls`: options that only jobs over addresses have. Raises BadParameter for what does not go together."""
    if query is None:
        if connection is not None:
            raise typer.BadParameter("it names the database of a query: add --query", param_hint="--connection")
        if not urls:
            raise typer.BadParameter("name what to score: addresses, or a --query", param_hint="URL")
        return False
    if connection is None:
        raise typer.BadParameter("a query needs the name of its database: --connection", param_hint="--query")
    if given := [f"--{name.replace('_', '-')}" for name, value in of_urls.items() if value]:
        raise typer.BadParameter(f"a query does not go with {', '.join(given)}", param_hint="--query")
    if urls:
        raise typer.BadParameter("a query does not go with addresses", param_hint="--query")
    return True
