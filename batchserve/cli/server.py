"""`batchserve serve`, `worker`, `migrate` and `version`."""

import gc
import ipaddress
import math
import os
import platform
import resource
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchserve.cli.terminal import AsJson, print_json, say

if TYPE_CHECKING:
    from batchserve.runtime import Runtime
    from batchserve.settings import Settings

Storage = Annotated[str | None, typer.Option(help="Storage folder. Default: BATCHSERVE_STORAGE, else storage/.")]
Database = Annotated[
    str | None, typer.Option(help="Address of the database. Default: BATCHSERVE_DATABASE, else in the storage folder.")
]

MOST_FILES = 65_536
FILES_FOR_THE_SERVER = 64
"""Open files for libraries, database, logs and the parts of results that are assembled."""
FILES_OF_A_PROCESS = 8
"""Open files of each scoring process: pipes and inputs; two more processes are interactive."""


def serve(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 chooses a free one.")] = 8000,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Run jobs too, or only accept them.")] = True,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow an address that other hosts can reach.")] = False,
    storage: Storage = None,
    database: Database = None,
    until_stdin_closes: Annotated[
        bool,
        typer.Option("--until-stdin-closes", help="Stop when standard input ends, as with the program that writes it."),
    ] = False,
) -> None:
    """Serve the API, by default with a worker inside."""
    settings = settings_of(storage, database)
    require_local_engine(settings, worker=worker)
    if not (insecure or is_loopback(host) or has_admin_key(settings)):
        raise typer.BadParameter(
            f"{host} can be reached from other hosts, and without keys any client may use it. Create a key first, "
            "with `batchserve keys create NAME --scope admin`; or listen on 127.0.0.1; or pass --insecure if a proxy "
            "in front of it controls access.",
            param_hint="--host",
        )
    import uvicorn

    from batchserve import logs
    from batchserve.app import create_app
    from batchserve.cli import protocol
    from batchserve.runtime import open_reached

    logs.configure(settings.log_format, settings.log_level)
    require_database(settings)

    class Protocol(protocol.Protocol):
        limits = protocol.Limits(
            settings.head_timeout, settings.send_idle, settings.send_bytes, most_connections(settings.processes)
        )

    ticks_between_looks = max(1, min(10, int(settings.send_idle)))  # of a tenth of a second

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            if counter % ticks_between_looks == 0:
                protocol.look_after(self.server_state.connections, Protocol.limits)
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                gc.freeze()  # what was imported stays: full collections need not walk it
                release, url = version_of("batchserve"), url_of(listener)
                say(f"batchserve {release} at {url} (docs: /docs, storage: {settings.storage})")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.state.service.stop()  # now, or the worker's grace time would only start after that of the requests
            await super().shutdown(sockets)

    open_reached(settings)  # a refusal is one line here; the application would report it with a traceback
    listener = listen(host, port, settings.send_idle)
    app = create_app(settings, worker=worker, host=host)
    Protocol.limits.refused = app.state.metrics.count_refusal
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",  # otherwise an Upgrade bypasses these limits
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.grace),
    )
    server = Server(config)
    if until_stdin_closes:
        threading.Thread(target=stop_when_stdin_closes, daemon=True).start()
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        say("Stopped.")
    if not server.started:
        raise typer.Exit(1)


def worker(
    storage: Storage = None,
    database: Database = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow a BATCHSERVE_METRICS_ADDRESS that other hosts can reach.")
    ] = False,
) -> None:
    """Run jobs, next to a `serve --no-worker` on the same database and storage."""
    from batchserve.settings import host_and_port

    settings = settings_of(storage, database)
    metrics = host_and_port(settings.metrics_address)
    if metrics is not None and not (insecure or is_loopback(metrics[0]) or has_admin_key(settings)):
        raise typer.BadParameter(
            f"{metrics[0]} can be reached from other hosts, and without keys any client may read the metrics. Create a "
            "key first, with `batchserve keys create NAME --scope admin`; or listen on 127.0.0.1; or pass --insecure.",
            param_hint="BATCHSERVE_METRICS_ADDRESS",
        )
    from batchserve import logs, tracing
    from batchserve.runtime import Runtime
    from batchserve.schedules.actions import actions_of
    from batchserve.schedules.scheduler import Scheduler
    from batchserve.worker import Worker

    logs.configure(settings.log_format, settings.log_level)
    with tracing.exporting(), Runtime.open(settings) as runtime:
        running = Worker(runtime)
        scheduler = Scheduler(runtime, actions_of(runtime), running.wake)

        def stop(*_: object) -> None:
            running.stop()
            scheduler.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        say(f"batchserve {version_of('batchserve')} worker {running.name} (storage: {settings.storage})")
        keeper = threading.Thread(target=scheduler.run, name="scheduler")
        keeper.start()
        try:
            with _metrics_served(runtime, metrics), runtime.database.listening(running.hear):
                running.run()
        finally:
            scheduler.stop()
            keeper.join()


def _metrics_served(runtime: "Runtime", address: tuple[str, int] | None) -> AbstractContextManager[None]:
    if address is None:
        return nullcontext()
    from batchserve.cli.metrics import serving_metrics

    return serving_metrics(runtime, *address)


def migrate(database: Database = None, as_json: AsJson = False) -> None:
    """Migrate the database to the schema of this release. An SQLite file is copied first."""
    from batchserve.db import migrate as schema
    from batchserve.db.connect import Database as Connection

    connection = Connection(settings_of(None, database).database_url)
    try:
        before, after = schema.upgrade(connection)
    finally:
        connection.close()
    if as_json:
        print_json({"before": before, "after": after})
    elif before == after:
        say(f"The database is at schema {after} already.")
    else:
        say(f"The database was at schema {before or 'none'} and is at {after} now.")


def version(as_json: AsJson = False) -> None:
    """Print the versions of batchserve and its dependencies."""
    names = ("batchserve", "onnxruntime", "onnx", "polars", "numpy", "fastapi", "uvicorn", "sqlalchemy")
    versions = {name: version_of(name) for name in names} | {"python": platform.python_version()}
    if as_json:
        print_json(versions)
    else:
        sys.stdout.writelines(f"{name} {number}\n" for name, number in versions.items())


def settings_of(storage: str | None, database: str | None) -> "Settings":
    """The settings of the environment, overridden by the command line."""
    from pydantic import ValidationError

    from batchserve.settings import Settings

    given: dict[str, Any] = {"storage": storage, "database": database}
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise typer.BadParameter("; ".join(map(_fault, error.errors()))) from None


def _fault(fault: Mapping[str, Any]) -> str:
    """One fault of the settings. One that is about no single setting names its variables itself."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    place = "_".join(map(str, fault["loc"])).upper()
    return f"BATCHSERVE_{place}: {message}" if place else message


def require_local_engine(settings: "Settings", *, worker: bool) -> None:
    """A server's own worker uses this host alone: other hosts are driven by processes without an API."""
    if worker and settings.engine != "local":
        raise typer.BadParameter(
            f"chunks run on {settings.engine}, which a server does not drive: pass --no-worker, and run `batchserve "
            "worker` beside it.",
            param_hint="--worker",
        )


def stop_when_stdin_closes() -> None:
    """Waits for the end of standard input, then asks this process to stop."""
    while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def require_database(settings: "Settings") -> None:
    """Raises what prevents the use of a database that the settings name, such as its password or an old schema: when
    the application starts, uvicorn would print a stack trace."""
    if settings.database:
        from batchserve.runtime import open_database

        with open_database(settings):
            pass


def has_admin_key(settings: "Settings") -> bool:
    """Whether every request needs a key, and an admin key exists. Does not create the database."""
    from sqlalchemy import make_url

    url = make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        return False

    from batchserve import keys
    from batchserve.db import migrate
    from batchserve.db.connect import Database as Connection
    from batchserve.errors import SchemaOutdated

    connection = Connection(settings.database_url)
    try:
        migrate.check(connection)
        with connection.read() as transaction:
            return keys.has_admin(transaction)
    except SchemaOutdated:
        return False  # of a release without keys, or not yet migrated
    finally:
        connection.close()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int, send_idle: float) -> socket.socket:
    """A bound socket. Raises OSError that says which address is taken.

    Its connections end when sent bytes are not acknowledged for `send_idle` seconds: they are in the kernel, invisible
    to the protocol.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(send_idle * 1000))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}. Is another server running? Choose a port with --port."
        ) from None
    listener.set_inheritable(False)
    return listener


def most_connections(processes: int) -> int:
    """The connections that the limit on open files allows, each with a file that it reads or writes. Raises the soft
    limit first: the usual 1,024 is for programs that use select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # some systems allow fewer than the hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    files = MOST_FILES if soft == resource.RLIM_INFINITY else min(soft, MOST_FILES)
    return max(8, (files - FILES_FOR_THE_SERVER - FILES_OF_A_PROCESS * (processes + 2)) // 2)


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
