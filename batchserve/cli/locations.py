"""`batchserve jobs create`: a job over inputs that the server reads where they are."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.cli.files import Decimal, Delimiter
from batchserve.cli.jobs import Timeout, summary, wait_for
from batchserve.cli.terminal import AsJson, print_json, say
from batchserve.client import Client


def create(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="Addresses or patterns: file:///... or s3://...")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="NAME[@VERSION]", help="The model to score with.")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="URL", help="Where the result goes; with {stem}, one for each input."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    archive: Annotated[bool, typer.Option("--archive", help="Keep one result for each input, in a ZIP.")] = False,
    input_file: Annotated[
        bool, typer.Option("--input-file", help="Add a column with the address of the input of each record.")
    ] = False,
    format: Annotated[str | None, typer.Option(help="Format of the result. Default: the inputs'.")] = None,
    passthrough: Annotated[
        str | None, typer.Option(metavar="unused|all|none|A,B", help="Input columns that are copied to the result.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column that identifies a record in the errors list.")
    ] = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the end, or print the job's id.")] = True,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Score files of the server, or objects of buckets, where they are."""
    given = {"format": format, "passthrough": passthrough, "key": key, "delimiter": delimiter, "decimal": decimal}
    options: Any = {name: value for name, value in given.items() if value is not None}
    with Client() as client:
        job = client.submit_urls(
            urls, model, output=output, overwrite=overwrite, archive=archive, input_file=input_file, **options
        )
        if wait:
            wait_for(job, timeout)
        if as_json:
            print_json(job.data)
        elif not wait:
            print(job.id)
    if wait:
        where = f"written to [bold]{escape(output)}[/]" if output else f"[bold]batchserve jobs download {job.id}[/]"
        say(f"{summary(job)} Result: {where}")
