"""The requests of clients and what was acknowledged, in a file outside of the system under test."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

ACKNOWLEDGED = ("stored", "queued", "cancelled", "deleted", "retried", "read", "ran")


class History:
    """Lines of JSON, each written when its response has arrived and before anything else is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def tell(self, event: str, **what: Any) -> None:
        with self._lock:
            self._file.write(orjson.dumps({"event": event, **what}) + b"\n")

    def close(self) -> None:
        self._file.close()


def events(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            yield orjson.loads(line)
