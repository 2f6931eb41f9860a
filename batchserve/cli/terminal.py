"""Output of the command line: tables and JSON on stdout, messages on stderr."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from batchserve.client.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    JobCancelled,
    JobError,
    JobFailed,
    WaitTimeout,
)
from batchserve.errors import BatchserveError, NoRowScored

MOST_FAULTS = 10
EXIT_CODES: dict[type[BatchserveError], int] = {
    JobFailed: 3,
    AuthenticationFailed: 4,
    WaitTimeout: 5,
    JobCancelled: 6,
}
NO_ROW_SCORED = 7
_WORST = (4, 1, 3, 7, 6, 5)
"""The exit codes of errors, the worst first."""

_wants_json = False


def _note_json(wanted: bool) -> bool:
    global _wants_json  # noqa: PLW0603 - of the one command of this process
    _wants_json = wanted
    return wanted


def wants_json() -> bool:
    """Whether the command was called with --json: then its error is JSON, too."""
    return _wants_json


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_note_json)]


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `15m`, `2h` or `1d`."""
    from batchserve.settings import seconds_of

    try:
        return seconds_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def with_reason(error: BatchserveError) -> BatchserveError:
    """An error of the database with what the database itself says, which clients of the API are not told."""
    reason = getattr(error.__cause__, "orig", None)
    return error if reason is None else type(error)(f"{error.detail} ({str(reason).splitlines()[0]})", **error.extra)


def say(text: str, *, style: str | None = None) -> None:
    """A sentence for the user, on stderr. May hold rich markup."""
    Console(stderr=True, highlight=False).print(text, style=style, soft_wrap=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on a terminal; elsewhere lines of tab-separated values, without a header, for cut and xargs."""
    console = Console(highlight=False)
    lines = [[_cell(value) for value in row] for row in rows]
    if console.is_terminal:
        console.print(table(columns, lines))
    else:
        sys.stdout.writelines("\t".join(line) + "\n" for line in lines)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    for column in columns:
        # An ID is there to be copied: on a narrow terminal the other columns give way.
        made.add_column(column, overflow="fold", no_wrap=column == "id", min_width=36 if column == "id" else None)
    for row in rows:
        made.add_row(*(escape(_cell(value)) for value in row))
    return made


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one pair per line. None is omitted."""
    print_rows(("", ""), [(name, value) for name, value in facts.items() if value is not None])


def exit_code(error: Exception) -> int:
    if isinstance(error, JobFailed) and error.reason == NoRowScored.code:
        return NO_ROW_SCORED
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), 1)


def worst_code(errors: Iterable[Exception]) -> int:
    """The exit code of several errors; 0 without any."""
    codes = {exit_code(error) for error in errors}
    return next((code for code in _WORST if code in codes), 0)


def print_error(error: Exception, *, about: str = "") -> None:
    """Prints an error, its individual faults, and advice."""
    say(f"[bold red]Error:[/] {escape(about + str(error))}")
    if isinstance(error, BatchserveError):
        for fault in error.errors[:MOST_FAULTS]:
            say(f"  {escape(_fault(fault))}")
        if len(error.errors) > MOST_FAULTS:
            say(f"  and {len(error.errors) - MOST_FAULTS:,} more")
    if isinstance(error, JobError) and error.extra["job"] is not None:
        say(_next_step(error))
    if isinstance(error, ConnectionFailed):
        say("Start a server with [bold]batchserve serve[/], or set BATCHSERVE_URL.")


def _next_step(error: JobError) -> str:
    """The command to go on with."""
    job = error.job
    if isinstance(error, WaitTimeout):
        return f"Follow it: [bold]batchserve jobs watch {job.id}[/]"
    if job.rows.get("failed"):
        return f"Why records failed: [bold]batchserve jobs download {job.id} --errors[/]"
    return f"All about it: [bold]batchserve jobs show {job.id}[/]"


def moment(text: str | None) -> str | None:
    """An RFC 3339 time in this host's time zone."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else None


def size(count: float | None) -> str | None:
    """A number of bytes in readable units."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def _fault(fault: Mapping[str, Any]) -> str:
    place = ", ".join(
        f"{name} {fault[name]}" for name in ("parameter", "row", "record", "column") if fault.get(name) is not None
    )
    message = fault.get("message") or ", ".join(f"{name} {value}" for name, value in fault.items())
    return f"{place}: {message}" if place else str(message)


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if Console().is_terminal else str(value)
        case float():
            return f"{value:.6g}"
    # A tab or a newline would be another cell or row, and an escape sequence would be carried out by a terminal.
    text = str(value)
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
