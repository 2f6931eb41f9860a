"""`batchserve upload`, and `batchserve predict` of many files."""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.cli.terminal import AsJson, print_error, print_json, print_rows, say, worst_code
from batchserve.client import Client, FileOutcome, FilesFailed, FilesReport
from batchserve.client.bars import Bars
from batchserve.client.data import format_of
from batchserve.client.errors import AuthenticationFailed, ConnectionFailed
from batchserve.client.inputs import Found, LeftOut, find_inputs
from batchserve.client.options import JobOptions, ReadOptions
from batchserve.errors import BatchserveError, InvalidInput, presentable

STREAM = "-"
_MOST_LEFT_OUT = 10
_SHOWN = 10_000_000
"""Bytes from which an upload has a bar of its own."""

Delimiter = Annotated[str | None, typer.Option(help="Of a CSV: , ; tab or |; recognised by default.")]
Decimal = Annotated[str | None, typer.Option(help="Decimal mark of a CSV: a point by default, or a comma.")]
Encoding = Annotated[
    str | None, typer.Option(help="Of a text: utf-8 by default, latin-1, windows-1252, utf-16 and others.")
]
Sheet = Annotated[str | None, typer.Option(help="Of an Excel workbook: the first one by default.")]
Directly = Annotated[
    bool, typer.Option("--direct", help="Send the file to the server's object store, not through the server.")
]


def existing(files: Sequence[str]) -> list[Path]:
    """The paths of files and folders. Raises BadParameter for one that is neither."""
    paths = [Path(file) for file in files]
    if (missing := next((path for path in paths if not (path.is_file() or path.is_dir())), None)) is not None:
        raise typer.BadParameter(f"there is no file {str(missing)!r}", param_hint="FILE")
    return paths


def upload(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...|-", help="Files, and folders of tables or images; - reads stdin.")
    ],
    delimiter: Delimiter = None,
    decimal: Decimal = None,
    encoding: Encoding = None,
    sheet: Sheet = None,
    direct: Directly = False,
    as_json: AsJson = False,
) -> None:
    """Upload inputs, which are predicted later. Prints the id of each job."""
    options = {"delimiter": delimiter, "decimal": decimal, "encoding": encoding, "sheet": sheet}
    given: ReadOptions = {name: value for name, value in options.items() if value is not None}  # type: ignore[assignment]
    found = Found() if files == [STREAM] else find_inputs(existing(files))
    uploads = _Uploads(as_json)
    try:
        with Client() as client:
            if files == [STREAM]:
                uploads.send(client, STREAM, sys.stdin.buffer, direct, given)
            elif found.images is not None:
                uploads.send(client, ", ".join(files), found.images, direct, given)
            for number, file in enumerate(found.files, 1):
                if file.fault is not None:
                    uploads.fail(str(file.path), InvalidInput(f"the file {file.fault}"))
                elif not uploads.send(client, str(file.path), file.path, direct, given, file.bytes):
                    uploads.not_tried = len(found.files) - number
                    break
    except KeyboardInterrupt:
        say(f"\nThe upload was interrupted. {uploads.summary}")
        raise typer.Exit(130) from None
    if as_json:
        print_json(presentable({"jobs": uploads.jobs, "failed": uploads.failed, "left_out": _listed(found.left_out)}))
    print_left_out(found.left_out)
    say(uploads.summary)
    if code := worst_code(uploads.errors):
        raise typer.Exit(code)


class _Uploads:
    """The inputs that were sent, and those that failed."""

    def __init__(self, as_json: bool) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.failed: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        self.not_tried = 0
        self._as_json = as_json

    def send(
        self, client: Client, name: str, source: Any, direct: bool, options: ReadOptions, size: int = _SHOWN
    ) -> bool:
        """Whether it makes sense to send others."""
        try:
            with Bars(None if size >= _SHOWN else False) as bars:
                job = client.upload(source, direct=direct, on_upload=bars.upload, **options)
        except (BatchserveError, OSError) as error:
            self.fail(name, error)
            return not isinstance(error, AuthenticationFailed | ConnectionFailed)
        self.jobs.append({"file": name, "job": job.data})
        if not self._as_json:
            print(job.id, flush=True)
        return True

    def fail(self, name: str, error: BatchserveError | OSError) -> None:
        self.errors.append(error)
        self.failed.append({"file": name, "error": _error(error)})
        print_error(error, about=f"{name}: ")

    @property
    def summary(self) -> str:
        return (
            f"{_count(len(self.jobs), 'input')} uploaded"
            + (f", {len(self.failed):,} failed" if self.failed else "")
            + (f", {self.not_tried:,} not tried" if self.not_tried else "")
            + ". Score all uploads: [bold]batchserve predict --all-uploaded --model NAME[/]"
        )


def predict_many(
    found: Found,
    model: str,
    output: str | None,
    wait: bool,
    timeout: float | None,
    in_flight: int,
    as_json: bool,
    direct: bool,
    options: JobOptions,
) -> None:
    """Predicts files into a folder. Exits with the code of the worst error."""
    folder = _folder(output)
    try:
        with Client() as client:
            report = client.predict_files(
                found, model, folder, wait=wait, timeout=timeout, in_flight=in_flight, direct=direct, **options
            )
    except FilesFailed as error:
        report = error.report
    except KeyboardInterrupt:
        say("\nInterrupted. Jobs that were sent continue. To continue here, run the same command again.")
        raise typer.Exit(130) from None
    except (BatchserveError, OSError):
        if folder.is_dir():
            say("What is done is kept. To continue, run the same command again.")
        raise
    _print_report(report, folder, as_json)
    if code := worst_code(file.error for file in report.failed if file.error is not None):
        raise typer.Exit(code)


def _folder(output: str | None) -> Path:
    if output is None:
        raise typer.BadParameter(
            "each of several tables has a result of its own: name a folder for them with -o", param_hint="--output"
        )
    folder = Path(output)
    is_file = not (output.endswith("/") or folder.is_dir()) and format_of(folder) is not None
    if output == STREAM or is_file or (folder.exists() and not folder.is_dir()):
        raise typer.BadParameter(f"the results of several tables need a folder, got {output!r}", param_hint="--output")
    return folder


def _print_report(report: FilesReport, folder: Path, as_json: bool) -> None:
    if as_json:
        facts = {"model": report.model, "files": [_facts(file) for file in report.files]}
        print_json(presentable(facts | {"left_out": _listed(report.left_out), "notes": report.notes}))
    else:
        columns = ("file", "state", "rows", "failed", "result", "errors")
        print_rows(columns, [[presentable(value) for value in _row(file)] for file in report.files])
    for note in report.notes:
        say(escape(note))
    print_left_out(report.left_out)
    for file in report.failed:
        assert file.error is not None
        print_error(file.error, about=f"{file.path}: ")
        if file.result is not None:
            say(f"  {escape(str(file.result))} is an earlier result: of other bytes, another model or other options.")
    states = Counter(file.state for file in report.files)
    counts = ", ".join(f"{count:,} {state}" for state, count in states.items())
    rows, failed = report.rows, report.rows_failed
    say(
        f"{_count(len(report.files), 'file')} by {report.model}: {counts or 'nothing to do'}. "
        f"{_count(rows, 'row')}, {rows - failed:,} ok, {failed:,} failed. Results: [bold]{escape(str(folder))}[/]"
    )


def _row(file: FileOutcome) -> list[Any]:
    result = None if file.error is not None or file.result is None else str(file.result)
    errors = file.errors if file.error is None else _error(file.error)["code"]
    return [str(file.path), file.state, file.rows, file.failed, result, None if errors is None else str(errors)]


def _facts(file: FileOutcome) -> dict[str, Any]:
    return {
        "file": str(file.path),
        "state": file.state,
        "job": file.job,
        "result": None if file.error is not None or file.result is None else str(file.result),
        "errors": None if file.errors is None else str(file.errors),
        "rows": {"total": file.rows, "ok": file.rows - file.failed, "failed": file.failed},
        "error": None if file.error is None else _error(file.error),
    }


def _error(error: BatchserveError | OSError) -> dict[str, Any]:
    code = error.code if isinstance(error, BatchserveError) else "not-readable"
    faults = {"errors": error.errors} if isinstance(error, BatchserveError) and error.errors else {}
    return {"code": code, "message": str(error), **faults}


def print_left_out(left_out: Sequence[LeftOut]) -> None:
    for one in left_out[:_MOST_LEFT_OUT]:
        say(f"Left out: {escape(str(one.path))} ({one.reason})")
    if len(left_out) > _MOST_LEFT_OUT:
        say(f"  and {len(left_out) - _MOST_LEFT_OUT:,} more")


def _listed(left_out: Sequence[LeftOut]) -> list[dict[str, str]]:
    return [{"file": str(one.path), "reason": one.reason} for one in left_out]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
