"""What the engine asks of Ray: to be let in, which nodes it has, an actor on each, and what its errors mean.

The only module that imports Ray, and only in functions: a worker with another engine never loads it.
"""

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from batchserve.engines.ray_host import ScoringHost
from batchserve.errors import InvalidOptions, Unavailable

__all__ = [
    "Node",
    "actor_on",
    "ask_for",
    "cause",
    "is_gone",
    "is_unreachable",
    "join",
    "leave",
    "nodes",
    "place_of",
    "wait_for",
]

_PORT = 6379
_CONNECT = 5.0
_JOIN = 30.0
"""Seconds in which Ray lets a driver in."""
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # otherwise whoever reaches a port of Ray may run code there
    "RAY_NUM_REDIS_GET_RETRIES": "5",  # seconds for which Ray tries a token that the head refuses
}
"""What Ray reads when it is imported, where the environment does not say otherwise."""
_SAID = 400
_users: list[str] = []
"""The engines of this process, which share its connection."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of Ray that lives."""

    id: str
    name: str
    resources: Mapping[str, float]

    def has(self, reserved: Mapping[str, float]) -> bool:
        return all(self.resources.get(name, 0) >= amount for name, amount in reserved.items())


def place_of(address: str) -> tuple[str, int]:
    """Host and port of `ray://host:port`. Raises InvalidOptions."""
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.scheme == "ray" and parts.hostname and not (parts.path or parts.query or parts.username):
            return parts.hostname, parts.port or _PORT
    raise InvalidOptions(f"BATCHSERVE_ENGINE is {address!r}; expected ray://HOST:PORT, the address of Ray's head")


def join(host: str, port: int) -> None:
    """Makes this process a driver, until `leave` was called as often. Raises InvalidOptions without Ray, or without a
    token, and Unavailable."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise InvalidOptions("the engine ray:// needs Ray: pip install 'batchserve[ray]'") from None
    if os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
        raise InvalidOptions(
            "there is no token for Ray: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of its head (`ray "
            "get-auth-token`), here and on all hosts; RAY_AUTH_MODE=disabled goes without, where no one else has access"
        )
    place = f"{host}:{port}"
    try:
        socket.create_connection((host, port), _CONNECT).close()  # Ray itself would wait for minutes
    except OSError as error:
        raise Unavailable(f"no head of Ray answers at {place}: {error}") from None
    if not ray.is_initialized():
        _enter(place)
        _take_back_sigterm()
    _users.append(place)


def leave() -> None:
    """Ends what `join` began: Ray's threads must not outlive the interpreter."""
    import ray

    _users.pop()
    if not _users:
        ray.shutdown()


def _enter(place: str) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    outcome: Future[None] = Future()

    def enter() -> None:
        try:
            ray.init(
                place,
                namespace="batchserve",
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
            outcome.set_result(None)
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            outcome.set_exception(error)

    # In a thread of its own, because it may wait for ever, and because in the main one it would take over SIGTERM.
    threading.Thread(target=enter, name="ray-join", daemon=True).start()
    try:
        outcome.result(_JOIN)
    except TimeoutError:
        raise Unavailable(f"Ray at {place} does not let this process in for {_JOIN:g} s") from None
    except Exception as error:
        raise Unavailable(
            f"Ray at {place} cannot be joined ({cause(error)}). Is the token that of the head, has it Ray "
            f"{ray.__version__}, and is a node of it running on this host (`ray start --address={place}`)?"
        ) from error


def _take_back_sigterm() -> None:
    """Ray's handler would abort the process 3 s after the signal, in the middle of the grace time of a worker."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def nodes() -> dict[str, Node]:
    """The nodes that live. May wait for long, or raise any error, when the head is away."""
    import ray

    listed: Any = ray.nodes
    return {
        found["NodeID"]: Node(
            found["NodeID"], f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']})", found["Resources"]
        )
        for found in listed()
        if found["Alive"]
    }


def actor_on(node: Node, reserved: Mapping[str, float]) -> Any:
    """The actor of a node, which all drivers share: made by the first one, with these resources."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others = {name: amount for name, amount in reserved.items() if name not in ("CPU", "GPU")}
    remote = ray.remote(ScoringHost).options(
        name=f"scoring-{node.id}",
        namespace="batchserve",
        get_if_exists=True,
        lifetime="detached",
        max_restarts=0,
        max_task_retries=0,
        num_cpus=reserved.get("CPU", 0),
        num_gpus=reserved.get("GPU", 0),
        resources=others,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
    )
    return remote.remote(int(node.resources.get("CPU", 0)) or os.cpu_count() or 1)


def ask_for(hosts: int, reserved: Mapping[str, float]) -> None:
    """Asks Ray's autoscaler for so many hosts with these resources. Replaces what any driver has asked for before."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(reserved)] * hosts)


def wait_for(answers: Sequence[Any], seconds: float) -> None:
    """Waits for answers whose outcome does not matter."""
    import ray

    with suppress(Exception):
        ray.wait(list(answers), num_returns=len(answers), timeout=seconds)


def is_unreachable(error: BaseException) -> bool:
    """Whether an actor could not be reached, and may yet live."""
    from ray.exceptions import ActorUnavailableError

    return isinstance(error, ActorUnavailableError)


def is_gone(error: BaseException) -> bool:
    """Whether an actor has ended, or never began."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) and not is_unreachable(error)


def cause(error: BaseException) -> str:
    """What an error of Ray says, on one line: its end, since it may begin with the traceback of another process."""
    said = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
    return f"{type(error).__name__}: {said if len(said) <= _SAID else f'... {said[-_SAID:]}'}"


def _has_token() -> bool:
    named = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()
