"""`batchserve predict` and `batchserve jobs ...`."""

import json
import sys
import time
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.cli.files import (
    STREAM,
    Decimal,
    Delimiter,
    Directly,
    Encoding,
    Sheet,
    existing,
    predict_many,
    print_left_out,
)
from batchserve.cli.job_list import list_jobs
from batchserve.cli.terminal import AsJson, duration, moment, print_facts, print_json, say, size
from batchserve.client import Client, Job, Result
from batchserve.client.bars import Bars
from batchserve.client.data import format_of, require_format
from batchserve.client.errors import JobError, WaitTimeout
from batchserve.client.inputs import find_inputs
from batchserve.client.names import is_folder, placed, require_other
from batchserve.client.options import JobOptions
from batchserve.client.results import beside
from batchserve.errors import JobNotFound

app = typer.Typer(help="Jobs: one prediction of one input by one model version.", no_args_is_help=True)

JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or the beginning of it.")]
ID_LENGTH = 36
Timeout = Annotated[
    float | None, typer.Option(parser=duration, metavar="DURATION", help="How long to wait, as in 90s, 15m, 2h.")
]


class OnRowError(StrEnum):
    CONTINUE = "continue"
    FAIL = "fail"


def _columns(text: str) -> list[str] | dict[str, str]:
    """The option `--columns`: a list, or a mapping from the model's names to those of the file."""
    if not text.startswith(("{", "[")):
        return text.split(",")
    try:
        columns: list[str] | dict[str, str] = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected A,B or JSON, got {text!r}: {error}") from None
    return columns


def _values(text: str) -> dict[str, Any]:
    """The option `--inputs`."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise typer.BadParameter(f"expected a JSON object, as in '{{\"threshold\": 0.5}}', got {text!r}")
    return values


def _pairs(texts: list[str]) -> dict[str, str]:
    """The option `--metadata`."""
    pairs = dict(text.partition("=")[::2] for text in texts if "=" in text)
    if len(pairs) < len(texts):
        raise typer.BadParameter(f"expected NAME=VALUE, each name once, got {texts}", param_hint="--metadata")
    return pairs


Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME[@VERSION]", help="The model to score with.")]
Passthrough = Annotated[
    str | None, typer.Option(metavar="unused|all|none|A,B", help="Input columns that are copied to the result.")
]
Key = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="The column that identifies a record in the errors list.")
]
Columns = Annotated[
    Any,
    typer.Option(
        parser=_columns,
        metavar="A,B|JSON",
        help='The columns to use for a model without column names, or a mapping: {"model name": "input name"}.',
    ),
]


def predict(
    model: Model,
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE...|-", help="A file, images, or files and folders of tables; - reads stdin."),
    ] = None,
    all_uploaded: Annotated[bool, typer.Option("--all-uploaded", help="Instead of a file: queue all uploads.")] = False,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="OUT|-", help="File for the result, or folder; - is stdout.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Format of the result. Default: the input's, jsonl for images.")
    ] = None,
    wait: Annotated[
        bool | None,
        typer.Option("--wait/--no-wait", help="Wait for the result (default for a file), or print the job's id."),
    ] = None,
    timeout: Timeout = None,
    columns: Columns = None,
    passthrough: Passthrough = None,
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    encoding: Encoding = None,
    sheet: Sheet = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the k most probable classes.")] = None,
    inputs: Annotated[
        Any, typer.Option(parser=_values, metavar="JSON", help="Values of model inputs that all records share.")
    ] = None,
    key: Key = None,
    on_row_error: Annotated[
        OnRowError | None, typer.Option(help="Whether a record that cannot be scored fails the job.")
    ] = None,
    max_errors: Annotated[
        float | None,
        typer.Option(min=0, help="Failed records that the job survives: a count, or below 1 a share of all."),
    ] = None,
    priority: Annotated[int | None, typer.Option(help="-100 to 100; higher ones start first.")] = None,
    run_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not before this time, as in 2026-12-01T02:00:00Z.")
    ] = None,
    expires_in: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Retention after the end, as in 12h or 7d, instead of the server's."),
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Shown with the job; may be repeated.")
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="An address that the server sends the end of the job to.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse/--no-reuse", help="Whether the result of an equal job may be the answer.")
    ] = True,
    direct: Directly = False,
    in_flight: Annotated[
        int, typer.Option(min=1, max=64, help="Of many files: how many are in progress at a time.")
    ] = 8,
    as_json: AsJson = False,
) -> None:
    """Predict a file, images, or many files: upload, score, download. Or queue all uploads."""
    if bool(files) == all_uploaded:
        raise typer.BadParameter("name a file, or pass --all-uploaded", param_hint="FILE")
    options: dict[str, Any] = {
        "format": format,
        "columns": columns,
        "passthrough": passthrough,
        "delimiter": delimiter,
        "decimal": decimal,
        "encoding": encoding,
        "sheet": sheet,
        "top_k": top_k,
        "inputs": inputs,
        "key": key,
        "on_row_error": on_row_error,
        "max_errors": max_errors,
        "priority": priority,
        "run_after": run_after,
        "expires_in": expires_in,
        "metadata": _pairs(metadata) if metadata else None,
        "webhook": webhook,
        "reuse": None if reuse else False,
    }
    given: JobOptions = {name: value for name, value in options.items() if value is not None}  # type: ignore[assignment]
    if files:
        _predict_files(files, model, output, wait is not False, timeout, in_flight, as_json, direct, given)
    elif output or direct or any(name in given for name in ("delimiter", "decimal", "encoding", "sheet")):
        raise typer.BadParameter(
            "--output, --direct, --delimiter, --decimal, --encoding and --sheet are for a file",
            param_hint="--all-uploaded",
        )
    else:
        _predict_uploaded(model, bool(wait), timeout, as_json, given)


def _predict_files(
    files: list[str],
    model: str,
    output: str | None,
    wait: bool,
    timeout: float | None,
    in_flight: int,
    as_json: bool,
    direct: bool,
    options: JobOptions,
) -> None:
    """Several tables, or those in a folder, are a job each; all else is one job."""
    paths = [] if files == [STREAM] else existing(files)
    source: Any = paths[0] if len(paths) == 1 else paths or sys.stdin.buffer
    if len(paths) > 1 or (paths and paths[0].is_dir()):
        found = find_inputs(paths)
        if found.images is None:
            predict_many(found, model, output, wait, timeout, in_flight, as_json, direct, options)
            return
        source = found.images
        print_left_out(found.left_out)
    _predict_one(source, paths, model, output, wait, timeout, as_json, direct, options)


def _predict_one(
    source: Any,
    paths: list[Path],
    model: str,
    output: str | None,
    wait: bool,
    timeout: float | None,
    as_json: bool,
    direct: bool,
    options: JobOptions,
) -> None:
    """`paths`: of the source; none for stdin."""
    piped = not paths
    target = output or (STREAM if piped else None)
    if as_json and target == STREAM and wait:
        raise typer.BadParameter("--json and a result on stdout exclude each other: name a file with -o")
    into_folder = target is not None and target != STREAM and is_folder(target)
    if into_folder and piped:
        raise typer.BadParameter("the result of stdin needs the name of a file, got a folder", param_hint="--output")
    if target and target != STREAM and not into_folder:
        require_other(target, paths)
        require_format(Path(target))
        if by_suffix := format_of(Path(target)):
            options.setdefault("format", by_suffix)
    where = ""
    with Client() as client:
        job = _submit(client, source, model, direct, options)
        if wait:
            wait_for(job, timeout)
            if into_folder or target is None:
                name = beside(paths[0], job.result().suffix)
                target = str(name if target is None else placed(target, name.name))
            with Bars() as bars:
                where = deliver(job.result(), target, bars)
        if as_json:
            print_json(job.data)
        if wait:
            say(summary(job, where))
            return
        if not as_json:
            print(job.id)
        say(f"Job {job.id} is {job.state}. Watch it: [bold]batchserve jobs watch {job.id}[/]")


def _submit(client: Client, source: Any, model: str, direct: bool, options: JobOptions) -> Job:
    try:
        with Bars() as bars:
            return client.submit(source, model, direct=direct, on_upload=bars.upload, **options)
    except KeyboardInterrupt:
        say("\nThe upload was interrupted. Whether its job is queued: [bold]batchserve jobs list[/]")
        raise typer.Exit(130) from None


def _predict_uploaded(model: str, wait: bool, timeout: float | None, as_json: bool, options: JobOptions) -> None:
    """Exits with the code of the first job that did not complete; with 1 when an input was refused."""
    deadline = None if timeout is None else time.monotonic() + timeout
    errors: list[JobError] = []
    with Client() as client:
        queued = client.predict_uploaded(model, **options)
        if as_json:
            facts = {"jobs": [job.id for job in queued.jobs], "completed": queued.completed, "refused": queued.refused}
            print_json(facts)
        else:
            for job in queued.jobs:
                print(job.id)
        say(
            f"{len(queued.jobs) - queued.completed:,} jobs are queued, {queued.completed:,} completed from equal jobs, "
            f"{len(queued.refused):,} refused."
        )
        for refused in queued.refused:
            say(f"  Job {refused['id']} stays uploaded: {escape(refused['problem']['detail'])}")
        for job in queued.jobs if wait else ():
            try:
                wait_for(job, None if deadline is None else max(0.0, deadline - time.monotonic()), shown=False)
            except JobError as error:
                errors.append(error)
                if isinstance(error, WaitTimeout):
                    break
    if wait and queued.jobs:
        say(f"{len(queued.jobs) - len(errors):,} jobs completed, {len(errors):,} did not.")
    if errors:
        raise errors[0]
    if queued.refused:
        raise typer.Exit(1)


app.command("list")(list_jobs)


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show all details of a job."""
    with Client() as client:
        job = find(client, job_id)
    if as_json:
        print_json(job.data)
        return
    input, result = job.data.get("input") or {}, job.data.get("result") or {}
    error = job.error or {}
    print_facts(
        {
            "id": job.id,
            "state": job.state,
            "reason": job.data.get("reason"),
            "model": job.model,
            "input": f"{input.get('filename') or 'no name'}, {input.get('media_type')}, {size(input.get('bytes'))}",
            "rows": job.rows.get("total"),
            "rows ok": job.rows.get("ok"),
            "rows failed": job.rows.get("failed"),
            "progress": f"{job.progress:.0%}",
            "rows/s": job.data.get("rows_per_s"),
            "attempt": job.data.get("attempt"),
            "result": f"{result.get('media_type')}, {size(result.get('bytes'))}" if result else None,
            "reused from": job.data.get("reused_from"),
            "request": job.request_id,
            "error": error.get("message") or error.get("detail"),
            "created": moment(job.data.get("created_at")),
            "started": moment(job.data.get("started_at")),
            "finished": moment(job.data.get("finished_at")),
            "expires": moment(job.data.get("expires_at")),
            "metadata": ", ".join(f"{name}={value}" for name, value in job.metadata.items()) or None,
        }
    )


@app.command()
def watch(job_id: JobId, timeout: Timeout = None, as_json: AsJson = False) -> None:
    """Follow a job to its end. The exit code gives the outcome."""
    with Client() as client:
        job = find(client, job_id)
        wait_for(job, timeout)
    if as_json:
        print_json(job.data)
    say(summary(job))


@app.command()
def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job. Its finished chunks are kept."""
    with Client() as client:
        job = find(client, job_id).cancel()
    report(job, as_json)


@app.command()
def retry(
    job_id: JobId,
    failed_rows: Annotated[
        bool, typer.Option("--failed-rows", help="Score the failed records of a completed job again, as a new job.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Resume a failed or cancelled job where it stopped."""
    with Client() as client:
        job = find(client, job_id)
        report(job.retry_failed_rows() if failed_rows else job.retry(), as_json)


@app.command()
def download(
    job_id: JobId,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="OUT|-", help="Output file, or folder; default and -: stdout."),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Convert to this format.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="The finished rows of an unfinished job.")] = False,
    errors: Annotated[bool, typer.Option("--errors", help="The records that could not be scored, as JSON.")] = False,
) -> None:
    """Download the result of a job."""
    with Client() as client:
        job = find(client, job_id)
        if errors:
            print_json(job.errors())
        else:
            with Bars() as bars:
                where = deliver(job.result(format, partial=partial), output or STREAM, bars)
            if where:
                say(where.strip())


@app.command("rm")
def remove(
    job_ids: Annotated[list[str], typer.Argument(metavar="JOB...", help="The jobs' ids, or their beginnings.")],
) -> None:
    """Remove jobs with their inputs and results."""
    with Client() as client:
        for job_id in job_ids:
            # By its whole id also a job that cannot be shown any more.
            found = job_id if len(job_id) >= ID_LENGTH else find(client, job_id).id
            client.jobs.delete(found)
            say(f"Job {found} is removed.")


def find(client: Client, reference: str) -> Job:
    """The job of an id, or of the beginning of one. Raises JobNotFound, and BadParameter for no text, and when several
    begin so."""
    if not reference:
        raise typer.BadParameter("expected the id of a job or its beginning, got an empty text", param_hint="JOB")
    if len(reference) >= ID_LENGTH:
        return client.jobs.get(reference)
    found = list(islice((job for job in client.jobs.list(q=reference) if job.id.startswith(reference)), 4))
    if not found:
        raise JobNotFound(f"there is no job whose id begins with {reference!r}")
    if len(found) > 1:
        ids = ", ".join(job.id for job in found[:3]) + (", ..." if len(found) > 3 else "")
        raise typer.BadParameter(f"the ids of several jobs begin with {reference!r}: {ids}", param_hint="JOB")
    return found[0].refresh()


def wait_for(job: Job, timeout: float | None, *, shown: bool | None = None) -> None:
    """Waits with a bar. Ctrl-C ends the command and not the job, and says so below the bar."""
    try:
        with Bars(shown) as bars:
            job.wait(timeout, on_progress=bars.scoring)
    except KeyboardInterrupt:
        say(f"\nJob {job.id} continues. Follow it with:\n[bold]batchserve jobs watch {job.id}[/]")
        raise typer.Exit(130) from None


def report(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.data)
    say(f"Job {job.id} is {job.state}.")


def summary(job: Job, where: str = "") -> str:
    """Summarizes a completed job, and `where` its result is. The command to copy comes last."""
    total, failed = job.rows.get("total") or 0, job.rows.get("failed") or 0
    speed = job.data.get("rows_per_s")
    text = f"{total:,} row{'' if total == 1 else 's'}, {total - failed:,} ok, {failed:,} failed" + (
        f", {speed:,.0f} rows/s." if speed else "."
    )
    if job.data.get("reused_from"):
        text += f" Reused the result of the equal job {job.data['reused_from']}."
    return text + where + (f" Why rows failed: [bold]batchserve jobs download {job.id} --errors[/]" if failed else "")


def deliver(result: Result, target: str, bars: Bars) -> str:
    """Downloads to a file or to stdout, and reports the path."""
    if target != STREAM:
        return f" Result: [bold]{escape(str(result.save(target, on_download=bars.download)))}[/]"
    for block in result.iter_bytes():
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()
    return ""
