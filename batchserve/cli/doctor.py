"""`batchserve doctor`: checks everything that a server needs, with advice for each fault."""

import asyncio
import math
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_json, say, size, table, with_reason
from batchserve.errors import BatchserveError, SchemaOutdated, SchemaTooNew, SchemaTooOld, Unavailable

if TYPE_CHECKING:
    from batchserve.db.connect import Database as Connection
    from batchserve.settings import Settings
    from batchserve.storage import ObjectInfo
    from batchserve.upkeep.inspection import Fault

LITTLE_SPACE = 2 * 2**30
SLOW_FSYNC, SLOW_PUT = 0.1, 1.0
CLOCK_SKEW = 60.0
LONG_SILENCE = 3600.0
"""Seconds for which deliveries of webhooks may fail before that is reported."""
MOST_SHOWN = 10
"""Most faults of one check in the text output; `--json` has them all."""
Status = Literal["ok", "warn", "fail"]
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The finding of a check. `advice` is the repair, if one is needed; each of the `faults` has its own."""

    check: str
    status: Status
    detail: str
    advice: str = ""
    faults: "Sequence[Fault]" = field(default=(), kw_only=True)


def doctor(
    storage: Storage = None,
    database: Database = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare the digests of all stored bytes, however long it takes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this installation: storage, database, jobs and scoring. Changes nothing; exits with 1 if something needs
    repair."""
    settings = settings_of(storage, database)
    checks: dict[str, Callable[[Settings], Finding]] = {**CHECKS, "stored bytes": partial(stored_bytes, deep=deep)}
    findings = [examine(name, check, settings) for name, check in checks.items()]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        show(findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def mend(storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """Remove unreadable rows, which `doctor` lists. A server may be running."""
    from batchserve.runtime import open_database
    from batchserve.storage import open_storage
    from batchserve.upkeep.inspection import mend_unreadable

    settings = settings_of(storage, database)
    with open_database(settings) as opened:
        mended = mend_unreadable(opened, open_storage(settings.storage))
    if as_json:
        print_json([asdict(row) for row in mended])
    for row in mended:
        say(escape(f"{row.fault.place}: {row.reason}"))
    say(f"{len(mended):,} unreadable row(s) removed.")


def examine(name: str, check: "Callable[[Settings], Finding]", settings: "Settings") -> Finding:
    """The finding of a check; an exception becomes a finding, too."""
    try:
        return check(settings)
    except (BatchserveError, OSError, ImportError) as error:
        told = with_reason(error) if isinstance(error, BatchserveError) else error
        return Finding(name, "fail", str(told), "Repair this first, then check again.")


def show(findings: list[Finding]) -> None:
    made = table(("", "check", "found", "what to do"), [])
    for finding in findings:
        style = _STYLES[finding.status]
        mark = f"[{style}]{finding.status}[/]"
        made.add_row(mark, finding.check, escape(finding.detail), escape(finding.advice))
    console = Console(highlight=False)
    console.print(made)
    for finding in findings:
        for fault in finding.faults[:MOST_SHOWN]:
            place, expected, found, mend = (escape(text) for text in asdict(fault).values())
            style = _STYLES[finding.status]
            console.print(f"\n[{style}]{place}[/]: expected {expected}, found {found}\n  {mend}", soft_wrap=True)
        if len(finding.faults) > MOST_SHOWN:
            console.print(f"\nand {len(finding.faults) - MOST_SHOWN:,} more; --json has them all")


def packages(_: "Settings") -> Finding:
    python = ".".join(map(str, sys.version_info[:3]))
    try:
        found = [f"{name} {version(name)}" for name in ("onnxruntime", "polars", "numpy")]
    except PackageNotFoundError as missing:
        return Finding("packages", "fail", f"{missing.name} is not installed", "pip install --upgrade batchserve")
    return Finding("packages", "ok", ", ".join([f"batchserve {version('batchserve')}", f"Python {python}", *found]))


def storage(settings: "Settings") -> Finding:
    """Writes an object as durably as an upload is written."""
    from batchserve.storage import open_storage

    if (missing := _missing_folder(settings)) is not None:
        above = next(folder for folder in missing.absolute().parents if folder.exists())
        if not (above.is_dir() and os.access(above, os.W_OK)):
            return Finding("storage", "fail", f"{missing} cannot be created in {above}", "Choose another folder.")
        return Finding("storage", "ok", f"{missing} does not exist; the first `batchserve serve` creates it")
    store = open_storage(settings.storage)
    key = f"inputs/doctor-{uuid.uuid4()}"
    started = time.perf_counter()
    try:
        with store.create(key) as writer:
            writer.write(b"batchserve doctor")
            writer.commit()
        elapsed = time.perf_counter() - started
        behind = time.time() - max(entry.modified for entry in store.list(key))
    finally:
        store.delete(key)
    detail = f"{settings.storage} takes writes, a durable one in {elapsed * 1000:.1f} ms"
    is_bucket = "://" in settings.storage
    if abs(behind) > CLOCK_SKEW:
        said = f"{detail}; its clock is {abs(behind):,.0f} s {'behind' if behind > 0 else 'ahead'}"
        return Finding("storage", "warn", said, "Set the clocks by NTP: a store refuses requests of another time.")
    if elapsed > (SLOW_PUT if is_bucket else SLOW_FSYNC):
        better = "a store in the same region" if is_bucket else "a local SSD"
        return Finding("storage", "warn", detail, f"Slow: uploads and chunks wait for it. Prefer {better}.")
    return Finding("storage", "ok", detail)


def _missing_folder(settings: "Settings") -> Path | None:
    """The folder of the storage, if there is none: a check creates nothing."""
    folder = Path(settings.storage)
    return None if "://" in settings.storage or folder.exists() else folder


def free_space(settings: "Settings") -> Finding:
    if "://" in settings.storage:
        rule = "it should have a lifecycle rule that aborts incomplete uploads, which is not visible from here"
        return Finding("free space", "ok", f"{settings.storage} is not a folder of this host; {rule}")
    if (missing := _missing_folder(settings)) is not None:
        return Finding("free space", "ok", f"unknown: {missing} does not exist")
    free = shutil.disk_usage(settings.storage).free
    detail = f"{size(free)} free, uploads leave {size(settings.free_bytes)}"
    if free < settings.free_bytes:
        return Finding("free space", "fail", detail, "Free some space: uploads are refused (507) until then.")
    if free < LITTLE_SPACE:
        return Finding(
            "free space", "warn", detail, "A job needs its input and its result twice while it is assembled."
        )
    return Finding("free space", "ok", detail)


def schema(settings: "Settings") -> Finding:
    from sqlalchemy import make_url

    from batchserve.db import migrate

    shown = make_url(settings.database_url).render_as_string(hide_password=True)
    with _database(settings) as connection:
        if connection is None:
            return Finding("database", "ok", f"{shown} is created by the first `batchserve serve`")
        try:
            migrate.check(connection)
        except SchemaOutdated as error:
            status: Status = "fail" if settings.database else "warn"
            return Finding("database", status, str(error), "batchserve migrate (an embedded database: serve does it)")
    return Finding("database", "ok", f"{shown} is at schema {migrate.newest_version()}")


def database_file(settings: "Settings") -> Finding:
    from batchserve.upkeep.inspection import inspect_database

    with _database(settings) as connection:
        if connection is None:
            return Finding("database file", "ok", "none yet")
        if not connection.is_inline:
            with connection.look():  # it responds
                pass
            return Finding("database file", "ok", "of a server, which checks its pages itself: see pg_amcheck")
        faults = inspect_database(connection)
    return _finding("database file", faults, "fail", "pages, indexes and references are intact")


def stored_bytes(settings: "Settings", *, deep: bool = False) -> Finding:
    """Checks that referenced objects exist unchanged."""
    from batchserve.storage import open_storage
    from batchserve.upkeep import inspection

    budget = (math.inf, math.inf) if deep else (inspection.BUDGET_BYTES, inspection.BUDGET_SECONDS)
    with _current_database(settings) as connection:
        if connection is None:
            return Finding("stored bytes", "ok", _NOT_YET)
        store = open_storage(settings.storage)
        found = inspection.inspect_objects(connection, store, most_bytes=budget[0], seconds=budget[1])
    well = f"{found.objects:,} objects exist, with the lengths in their rows"
    if found.skipped:
        well += f"; the digests of {found.skipped:,} were not compared: --deep does"
    elif found.objects:
        well += ", with their digests"
    return _finding("stored bytes", found.faults, "fail", well)


def orphans(settings: "Settings") -> Finding:
    """Reports what a worker's sweep would remove now."""
    from batchserve.storage import open_storage
    from batchserve.upkeep.sweep import find_orphans

    now = time.time()
    with _current_database(settings) as connection:
        if connection is None:
            return Finding("orphans", "ok", _NOT_YET)
        found = list(find_orphans(connection, open_storage(settings.storage), settings.sweep_age, now))
    if not found:
        return Finding("orphans", "ok", "no old unreferenced bytes")
    oldest = min(found, key=lambda entry: entry.modified)
    taken = size(sum(entry.bytes for entry in found))
    detail = f"{len(found):,} unreferenced object(s) take {taken}; the oldest, {oldest.key}, is {_age(oldest, now)} old"
    return Finding("orphans", "warn", detail, "A worker removes them at startup and every hour: batchserve worker")


def unreadable_rows(settings: "Settings") -> Finding:
    """Checks that each row can be read."""
    from batchserve.upkeep.inspection import find_unreadable

    with _current_database(settings) as connection:
        if connection is None:
            return Finding("rows", "ok", _NOT_YET)
        faults = [row.fault for row in find_unreadable(connection)]
    return _finding("rows", faults, "fail", "all can be read")


def stuck_jobs(settings: "Settings") -> Finding:
    from batchserve.upkeep import inspection

    planned = settings.lease + settings.rescue + settings.poll
    with _current_database(settings) as connection:
        if connection is None:
            return Finding("jobs", "ok", _NOT_YET)
        faults = inspection.inspect_jobs(connection, patience=planned + inspection.PATIENCE)
    return _finding("jobs", faults, "warn", "none is stuck")


def webhooks(settings: "Settings") -> Finding:
    from batchserve.upkeep.inspection import inspect_webhooks

    with _current_database(settings) as connection:
        if connection is None:
            return Finding("webhooks", "ok", _NOT_YET)
        faults = inspect_webhooks(connection, patience=LONG_SILENCE)
    return _finding("webhooks", faults, "warn", "deliveries arrive")


def accounts(settings: "Settings") -> Finding:
    from batchserve.upkeep.inspection import inspect_accounts

    with _current_database(settings) as connection:
        if connection is None:
            return Finding("quotas", "ok", _NOT_YET)
        faults = inspect_accounts(connection)
    return _finding("quotas", faults, "warn", "accounts of bytes are those that are stored")


def clock(settings: "Settings") -> Finding:
    from batchserve.upkeep.inspection import inspect_clock

    with _current_database(settings) as connection:
        if connection is None:
            return Finding("clock", "ok", _NOT_YET)
        faults = inspect_clock(connection, time.time())
    return _finding("clock", faults, "warn", "not behind the times in the database")


_NOT_YET = "not checked: no database of this schema exists yet"


@contextmanager
def _database(settings: "Settings") -> "Iterator[Connection | None]":
    """The database; None for a missing SQLite file, which is not created."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import DatabaseError

    from batchserve.db.connect import Database as Connection

    url = make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        yield None
        return
    connection = Connection(settings.database_url)
    try:
        yield connection
    except DatabaseError as error:
        raise Unavailable(f"{url.render_as_string(hide_password=True)}: {error.orig}") from error
    finally:
        connection.close()


@contextmanager
def _current_database(settings: "Settings") -> "Iterator[Connection | None]":
    """The database; None also when it has another schema than this release."""
    from batchserve.db import migrate

    with _database(settings) as connection:
        try:
            if connection is not None:
                migrate.check(connection)
        except (SchemaOutdated, SchemaTooNew, SchemaTooOld):
            connection = None
        yield connection


def _finding(check: str, faults: "Sequence[Fault]", status: Status, well: str) -> Finding:
    if not faults:
        return Finding(check, "ok", well)
    count = "1 fault" if len(faults) == 1 else f"{len(faults):,} faults"
    return Finding(check, status, count, "Each is listed with the command that repairs it.", faults=faults)


def _age(entry: "ObjectInfo", now: float) -> str:
    minutes = (now - entry.modified) / 60
    return f"{minutes / 60:.1f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def memory(settings: "Settings") -> Finding:
    wanted = settings.processes * settings.process_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{settings.processes} scoring processes may take {size(wanted)} of {size(there)}"
    if wanted > there:
        return Finding("memory", "warn", detail, "Lower BATCHSERVE_PROCESSES or BATCHSERVE_PROCESS_MEMORY.")
    return Finding("memory", "ok", detail)


def scoring(settings: "Settings") -> Finding:
    """Starts a scoring process and lets it score."""
    from batchserve.engines import open_interactive

    async def score() -> list[float]:
        with closing(open_interactive(settings)) as processes:
            return await processes.run(score_tiny_model, [1.0, 2.0, 3.0], seconds=60.0)

    started = time.perf_counter()
    scored = asyncio.run(score())
    if scored != [2.0, 3.0, 4.0]:
        return Finding(
            "scoring", "fail", f"expected [2, 3, 4], got {scored}", "pip install --force-reinstall onnxruntime"
        )
    return Finding("scoring", "ok", f"a scoring process started and scored in {time.perf_counter() - started:.1f} s")


def server(_: "Settings") -> Finding:
    import httpx2

    from batchserve.client.aio import settings_of as address_of

    url, headers = address_of(None, None)
    try:
        answer = httpx2.get(f"{url.rstrip('/')}/readyz", headers=headers, timeout=5.0)
    except httpx2.TransportError:
        return Finding("server", "ok", f"no server responds at {url}", "batchserve serve")
    if answer.is_success:
        return Finding("server", "ok", f"ready at {url}")
    return Finding("server", "fail", f"{url}/readyz responds {answer.status_code}: {answer.text[:200]}", "See its log.")


def score_tiny_model(values: list[float]) -> list[float]:
    """Computes x + 1 with ONNX Runtime, in a scoring process."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper

    from batchserve.inference.session import open_session

    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    model: onnx.ModelProto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    outputs = open_session(model.SerializeToString()).run({"x": np.array(values, dtype=np.float32)})
    return [float(value) for value in outputs["y"]]


CHECKS: "dict[str, Callable[[Settings], Finding]]" = {
    "packages": packages,
    "storage": storage,
    "free space": free_space,
    "database": schema,
    "database file": database_file,
    "rows": unreadable_rows,
    "stored bytes": stored_bytes,
    "orphans": orphans,
    "jobs": stuck_jobs,
    "webhooks": webhooks,
    "quotas": accounts,
    "clock": clock,
    "memory": memory,
    "scoring": scoring,
    "server": server,
}
