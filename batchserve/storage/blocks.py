"""A cache of blocks of objects whose reads are requests, with reading ahead."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["BLOCK", "BlockCache"]

T = TypeVar("T")

BLOCK = 2**20
_LONGEST_RUN = 8
"""Most blocks of one request: those of an object that is read from one end to the other."""
_LARGE = 128 * 2**10
"""Bytes of a read above which it is a request of its own, unless it goes on where another one ended: more than a
`RangedReader` reads ahead."""
_MOST_PLACES = 64
"""Objects of which it is known where they were read."""
_MOST_RUNS = 8
"""Most objects that are read ahead at a time."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks `first` to `stop` of an object, on their way."""

    first: int
    stop: int
    data: "Future[bytes]"


class BlockCache:
    """Small reads share requests of whole blocks. A reader that goes on where its last read ended gets longer ones, and
    of the longest the next is made while it reads the last.

    For objects whose bytes never change. For any number of threads; two that miss the same block both fetch it.
    """

    def __init__(self, fetch: Callable[[str, int, int], bytes], executor: Executor, most: int) -> None:
        """`fetch` gives bytes `start` to `stop` of an object, fewer where it ends. `most`: bytes that are kept."""
        self._fetch, self._executor, self._most = fetch, executor, most
        self._lock = threading.Lock()
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lengths: OrderedDict[str, int] = OrderedDict()
        """How many blocks the last request of an object had."""
        self._places: OrderedDict[str, int] = OrderedDict()
        """Where the last read of an object ended."""
        self._runs: OrderedDict[str, _Run] = OrderedDict()

    def read(self, key: str, start: int, stop: int) -> bytes:
        goes_on = self._goes_on(key, start, stop)
        if stop - start > _LARGE and not goes_on and self._kept(key, start // BLOCK) is None:
            return self._fetch(key, start, stop)  # just what is wanted
        pieces = []
        for number in range(start // BLOCK, -(-stop // BLOCK)):
            block = self._kept(key, number)
            if block is None:
                block = self._missed(key, number, -(-stop // BLOCK), goes_on=goes_on)
            begin = number * BLOCK
            pieces.append(block[max(0, start - begin) : stop - begin])
            if len(block) < BLOCK:  # the object ends
                break
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def add(self, key: str, data: bytes) -> None:
        """The first block of an object, which was read along with something else."""
        self._keep(key, 0, data)

    def forget(self, key: str) -> None:
        """The object was removed or replaced."""
        with self._lock:
            self._lengths.pop(key, None)
            self._places.pop(key, None)
            self._runs.pop(key, None)
            for name in [name for name in self._blocks if name[0] == key]:
                self._bytes -= len(self._blocks.pop(name))

    def _kept(self, key: str, number: int) -> bytes | None:
        with self._lock:
            block = self._blocks.get((key, number))
            if block is not None:
                self._blocks.move_to_end((key, number))
            return block

    def _goes_on(self, key: str, start: int, stop: int) -> bool:
        """Whether a read begins where the last one of this object ended."""
        with self._lock:
            last = self._places.pop(key, None)
            self._places[key] = stop
            _shorten(self._places, _MOST_PLACES)
            return last == start

    def _missed(self, key: str, number: int, stop: int, *, goes_on: bool) -> bytes:
        """Block `number` of an object of which blocks up to `stop` are wanted, with those that follow, as far as they
        are read ahead."""
        with self._lock:
            length = min(2 * self._lengths.get(key, 1), _LONGEST_RUN) if goes_on else 1
            run = self._runs.pop(key, None)
        if run is not None and run.first == number:
            data, until = run.data.result(), run.stop
        else:
            until = number + max(length, min(stop - number, _LONGEST_RUN))
            data = self._fetch(key, number * BLOCK, until * BLOCK)
        self._keep(key, number, data)
        with self._lock:
            self._lengths[key] = length
            self._lengths.move_to_end(key)
            _shorten(self._lengths, _MOST_PLACES)
            # Not before: a chunk would fetch what only the next one needs, which another process may read.
            if length == _LONGEST_RUN and len(data) == (until - number) * BLOCK:
                following = until + _LONGEST_RUN
                ahead = self._executor.submit(self._fetch, key, until * BLOCK, following * BLOCK)
                self._runs[key] = _Run(until, following, ahead)
                _shorten(self._runs, _MOST_RUNS)
        return data[:BLOCK]

    def _keep(self, key: str, number: int, data: bytes) -> None:
        """Blocks from `number` on; those that were used longest ago make room."""
        with self._lock:
            for start in range(0, max(len(data), 1), BLOCK):
                name, block = (key, number + start // BLOCK), data[start : start + BLOCK]
                self._bytes += len(block) - len(self._blocks.get(name, b""))
                self._blocks[name] = block
                self._blocks.move_to_end(name)
            while self._bytes > self._most and len(self._blocks) > 1:
                self._bytes -= len(self._blocks.popitem(last=False)[1])


def _shorten(entries: OrderedDict[str, T], most: int) -> None:
    while len(entries) > most:
        entries.popitem(last=False)
