"""The metrics of a worker, served by a thread of its own: the worker has no other port."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from batchserve.app import create_metrics_app
from batchserve.cli import protocol
from batchserve.cli.server import listen, url_of
from batchserve.cli.terminal import say
from batchserve.runtime import Runtime

__all__ = ["serving_metrics"]

_CONNECTIONS = 16
_END = 5.0
"""Seconds in which the thread ends."""
_TICKS = 10
"""Of a tenth of a second, between two looks at clients that do not read."""


@contextmanager
def serving_metrics(runtime: Runtime, host: str, port: int) -> Iterator[None]:
    """Serves /metrics and /livez until the end of the block. Raises OSError that says which address is taken."""
    settings = runtime.settings
    listener = listen(host, port, settings.send_idle)

    class Protocol(protocol.Protocol):
        limits = protocol.Limits(
            settings.head_timeout,
            settings.send_idle,
            settings.send_bytes,
            _CONNECTIONS,
            refused=runtime.metrics.count_refusal,
        )

    class Server(uvicorn.Server):
        async def on_tick(self, counter: int) -> bool:
            if counter % _TICKS == 0:
                protocol.look_after(self.server_state.connections, Protocol.limits)
            return await super().on_tick(counter)

    config = uvicorn.Config(
        create_metrics_app(runtime, host),
        http=Protocol,
        ws="none",
        loop="uvloop",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(_END / 2),
    )
    server = Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="metrics", daemon=True)
    thread.start()
    say(f"metrics at {url_of(listener)}/metrics")
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_END)
