"""Values read from the database, cached while they are valid."""

import math
import threading
import time
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["ALWAYS", "VersionedCache"]

K = TypeVar("K")
V = TypeVar("V")

ALWAYS = 0
"""The version of values that no commit invalidates."""


class VersionedCache(Generic[K, V]):
    """The latest `size` values by key, each until the database has another version, or for `max_age` seconds.

    A version is that of the whole database (`Database.version`), or what a probe of a table finds (`Database.probe`).
    A value is put with the version that the database had before the value was read: so a commit is never missed.
    Without a version (None) nothing is cached: such a database does not report commits.
    Thread-safe.
    """

    def __init__(self, size: int, max_age: float = math.inf) -> None:
        self._size, self._max_age = size, max_age
        self._kept: dict[K, tuple[V, Hashable, float]] = {}
        self._putting = threading.Lock()

    def get(self, key: K, version: Hashable | None) -> V | None:
        """`version`: the current one of the database."""
        kept = self._kept.get(key)
        if kept is None or kept[1] != version or (kept[2] != math.inf and kept[2] < time.monotonic()):
            return None
        return kept[0]

    def take(self, key: K) -> V | None:
        """Removes a value, whatever its version, and returns it."""
        kept = self._kept.pop(key, None)
        return None if kept is None else kept[0]

    def put(self, key: K, version: Hashable | None, value: V) -> None:
        """`version`: of the database before the value was read."""
        if version is None:
            return
        with self._putting:
            self._kept.pop(key, None)
            self._kept[key] = value, version, time.monotonic() + self._max_age
            if len(self._kept) > self._size:
                del self._kept[next(iter(self._kept))]  # the oldest
