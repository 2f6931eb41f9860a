"""`batchserve schedules ...`."""

import json
import sys
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.cli.terminal import AsJson, moment, print_facts, print_json, print_rows, say
from batchserve.client import Client, Schedule
from batchserve.errors import Conflict
from batchserve.recurring import ActionKind, CatchUp, Overlap, TickState

app = typer.Typer(help="Schedules: requests that are repeated at the times of a cron text.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(metavar="SCHEDULE", help="The schedule's name or id.")]


class Order(StrEnum):
    """How the table of a tick names its kind."""

    DUE = "on time"
    LATE = "caught up"
    RUN = "on request"


@app.command("list")
def list_schedules(as_json: AsJson = False) -> None:
    """List all schedules, with their next and last tick."""
    with Client() as client:
        found = list(client.schedules.list())
    if as_json:
        print_json([schedule.data for schedule in found])
        return
    print_rows(
        ("name", "cron", "time zone", "state", "next", "last", "outcome"),
        [
            (
                schedule.name,
                schedule.cron,
                schedule.time_zone,
                "paused" if schedule.paused else "active",
                moment(next(iter(schedule.data["next"]), None)),
                moment(schedule.last["at"]) if schedule.last else None,
                schedule.last["state"] if schedule.last else None,
            )
            for schedule in found
        ],
    )


@app.command()
def show(reference: Reference, as_json: AsJson = False) -> None:
    """Show a schedule, with its next five times."""
    with Client() as client:
        schedule = client.schedules.get(reference)
    _print(schedule, as_json)


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '.', '_' and '-'.")],
    cron: Annotated[
        str, typer.Option(metavar="'M H D M W'", help="Five fields: minute, hour, day of month, month, day of week.")
    ],
    request: Annotated[
        str | None,
        typer.Option(metavar="JSON|@FILE|-", help="The request of a tick, with {date} in its texts; - reads stdin."),
    ] = None,
    url: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Instead of --request: inputs to score; may be repeated.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME[@VERSION]", help="The model to score them with.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="URL", help="Where the results go.")] = None,
    uploaded: Annotated[bool, typer.Option("--uploaded", help="Score all that was uploaded.")] = False,
    time_zone: Annotated[str, typer.Option(metavar="ZONE", help="Its IANA name, as Europe/Zurich.")] = "UTC",
    catch_up: Annotated[CatchUp, typer.Option(help="Which missed ticks run later.")] = CatchUp.LAST,
    catch_up_limit: Annotated[int, typer.Option(min=1, help="Most ticks that --catch-up all runs later.")] = 100,
    overlap: Annotated[
        Overlap, typer.Option(help="What becomes of a tick while a job of an earlier one is unfinished.")
    ] = Overlap.SKIP,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a schedule of this name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Create a schedule, and show its next times."""
    options: dict[str, Any] = {
        "time_zone": time_zone,
        "action": ActionKind.UPLOADED if uploaded else ActionKind.JOB,
        "catch_up": catch_up,
        "catch_up_limit": catch_up_limit,
        "overlap": overlap,
    }
    body = _request_of(request, url, model, output, uploaded=uploaded)
    with Client() as client:
        try:
            schedule = client.schedules.create(name, cron, body, **options)
        except Conflict:
            if not replace:
                raise
            schedule = client.schedules.get(name).change(cron=cron, request=body, **options)
    _print(schedule, as_json)


@app.command()
def pause(reference: Reference) -> None:
    """Pause a schedule. Its ticks that wait are skipped."""
    with Client() as client:
        schedule = client.schedules.get(reference).pause()
    say(f"Schedule [bold]{escape(schedule.name)}[/] is paused.")


@app.command()
def resume(reference: Reference) -> None:
    """Resume a paused schedule. What was due in between is not caught up."""
    with Client() as client:
        schedule = client.schedules.get(reference).resume()
    say(f"Schedule [bold]{escape(schedule.name)}[/] is active. Next: {moment(next(iter(schedule.data['next']), None))}")


@app.command()
def run(
    reference: Reference,
    at: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="The time whose dates the request has, as in 2026-12-01T02:00:00Z."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a schedule now, and print the id of its job. Exits with 1 when none is queued."""
    with Client() as client:
        tick = client.schedules.get(reference).run(at)
    if as_json:
        print_json(tick)
    else:
        for job in tick["jobs"]:
            print(job["id"])
    if tick["error"] is not None:
        say(f"The tick is {tick['state']}: {escape(_reason(tick))}")
    if not tick["jobs"]:
        raise typer.Exit(1)


@app.command()
def ticks(
    reference: Reference,
    state: Annotated[TickState | None, typer.Option(help="Only ticks in this state.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most ticks to list.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List the history of a schedule, newest first."""
    with Client() as client:
        found = list(islice(client.schedules.get(reference).ticks(state=state), limit))
    if as_json:
        print_json(found)
        return
    print_rows(
        ("at", "kind", "outcome", "jobs", "job", "reason"),
        [
            (
                moment(tick["at"]),
                Order[tick["kind"].upper()],
                _states(tick) or tick["state"],
                tick["jobs_total"],
                tick["jobs"][0]["id"] if tick["jobs"] else None,
                _reason(tick),
            )
            for tick in found
        ],
    )


@app.command("rm")
def remove(reference: Reference) -> None:
    """Delete a schedule with its history. Its jobs stay."""
    with Client() as client:
        client.schedules.delete(reference)
    say(f"Schedule {escape(reference)} is deleted.")


def _request_of(
    text: str | None, urls: list[str] | None, model: str | None, output: str | None, *, uploaded: bool
) -> dict[str, Any]:
    """The request of a tick: as it is given, or made from the options."""
    if text is not None:
        if urls or model or output:
            raise typer.BadParameter("--request excludes --url, --model and --output", param_hint="--request")
        return _parsed(text)
    if model is None or bool(urls) == uploaded or (output is not None and uploaded):
        raise typer.BadParameter("pass --request, or --model with --url or --uploaded", param_hint="--request")
    body: dict[str, Any] = {"model": model}
    if urls:
        body["input"] = {"urls": urls}
    if output is not None:
        body["output"] = {"url": output}
    return body


def _parsed(text: str) -> dict[str, Any]:
    source = sys.stdin.read() if text == "-" else Path(text[1:]).read_text() if text.startswith("@") else text
    try:
        value = json.loads(source)
    except ValueError as error:
        raise typer.BadParameter(f"expected JSON: {error}", param_hint="--request") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("expected a JSON object", param_hint="--request")
    return value


def _print(schedule: Schedule, as_json: bool) -> None:
    data = schedule.data
    if as_json:
        print_json(data)
        return
    print_facts(
        {
            "name": schedule.name,
            "id": schedule.id,
            "cron": f"{schedule.cron} ({data['meaning']})" if data["meaning"] else schedule.cron,
            "time zone": schedule.time_zone,
            "state": "paused" if schedule.paused else "active",
            "action": data["action"],
            "request": json.dumps(data["request"], ensure_ascii=False),
            "catch-up": f"all, at most {data['catch_up_limit']}" if data["catch_up"] == "all" else data["catch_up"],
            "overlap": data["overlap"],
            "next": ", ".join(str(text) for text in data["next"]) or None,
            "last": f"{schedule.last['at']} {schedule.last['state']}" if schedule.last else None,
            "reason": _reason(schedule.last) or None if schedule.last else None,
        }
    )


def _states(tick: dict[str, Any]) -> str:
    return ", ".join(f"{count} {state}" for state, count in tick["job_states"].items())


def _reason(tick: dict[str, Any]) -> str:
    error = tick["error"] or {}
    return str(error.get("message", ""))
