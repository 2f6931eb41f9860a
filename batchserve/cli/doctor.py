"""`batchserve doctor`: does everything work here that a server needs, and if not, what to do."""

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console
from rich.markup import escape

from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_json, size, table
from batchserve.errors import BatchserveError, SchemaOutdated

if TYPE_CHECKING:
    from batchserve.settings import Settings

LITTLE_SPACE = 2 * 2**30
SLOW_FSYNC = 0.1
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check has found. `advice` says what to do unless all is well."""

    check: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def doctor(storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """Check this installation, its storage, its database and scoring. Exits with 1 if something has to be mended."""
    settings = settings_of(storage, database)
    findings = [examine(check, settings) for check in CHECKS]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        show(findings)
    if any(finding.status == "fail" for finding in findings):
        raise typer.Exit(1)


def examine(check: "Callable[[Settings], Finding]", settings: "Settings") -> Finding:
    """The finding of a check; whatever it stumbles over is one."""
    try:
        return check(settings)
    except (BatchserveError, OSError, ImportError) as error:
        return Finding(check.__name__.replace("_", " "), "fail", str(error), "Mend this first, then look again.")


def show(findings: list[Finding]) -> None:
    made = table(("", "check", "found", "what to do"), [])
    for finding in findings:
        style = _STYLES[finding.status]
        mark = f"[{style}]{finding.status}[/]"
        made.add_row(mark, finding.check, escape(finding.detail), escape(finding.advice))
    Console(highlight=False).print(made)


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

    store = open_storage(settings.storage)
    key = f"inputs/doctor-{uuid.uuid4()}"
    started = time.perf_counter()
    try:
        with store.create(key) as writer:
            writer.write(b"batchserve doctor")
            writer.commit()
        elapsed = time.perf_counter() - started
    finally:
        store.delete(key)
    detail = f"{settings.storage} takes writes, a durable one in {elapsed * 1000:.1f} ms"
    if elapsed > SLOW_FSYNC:
        return Finding("storage", "warn", detail, "Slow: uploads and chunks wait for it. Prefer a local SSD.")
    return Finding("storage", "ok", detail)


def free_space(settings: "Settings") -> Finding:
    if "://" in settings.storage:
        return Finding("free space", "ok", f"{settings.storage} is no folder of this host")
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
    from batchserve.db.connect import Database as Connection

    url = make_url(settings.database_url)
    shown = url.render_as_string(hide_password=True)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        return Finding("database", "ok", f"{shown} is made by the first `batchserve serve`")
    connection = Connection(settings.database_url)
    try:
        migrate.check(connection)
    except SchemaOutdated as error:
        status: Literal["warn", "fail"] = "fail" if settings.database else "warn"
        return Finding("database", status, str(error), "batchserve migrate (an embedded database: serve does it)")
    finally:
        connection.close()
    return Finding("database", "ok", f"{shown} is at schema {migrate.newest_version()}")


def memory(settings: "Settings") -> Finding:
    wanted = settings.processes * settings.process_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    detail = f"{settings.processes} scoring processes may take {size(wanted)} of {size(there)}"
    if wanted > there:
        return Finding("memory", "warn", detail, "Lower BATCHSERVE_PROCESSES or BATCHSERVE_PROCESS_MEMORY.")
    return Finding("memory", "ok", detail)


def scoring(settings: "Settings") -> Finding:
    """Starts a scoring process and lets it score."""
    from batchserve.engines import open_engine

    engine = open_engine(settings)
    started = time.perf_counter()
    try:
        scored = engine.submit_interactive(score_tiny_model, [1.0, 2.0, 3.0], timeout=60.0).future.result()
    finally:
        engine.close()
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
        return Finding("server", "ok", f"none answers at {url}", "batchserve serve")
    if answer.is_success:
        return Finding("server", "ok", f"ready at {url}")
    return Finding("server", "fail", f"{url}/readyz answers {answer.status_code}: {answer.text[:200]}", "See its log.")


def score_tiny_model(values: list[float]) -> list[float]:
    """x + 1 by ONNX Runtime. Runs in a scoring process."""
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


CHECKS: "tuple[Callable[[Settings], Finding], ...]" = (
    packages, storage, free_space, schema, memory, scoring, server,
)  # fmt: skip
