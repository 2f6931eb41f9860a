"""Files below a folder, reached by descriptors, name by name: no link is followed on the way, at any moment.

A path that is checked and then used would not do: another process may put a link in the place of a folder in between.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from batchserve.storage.disk import make_folder

__all__ = ["KeptFile", "Place", "folder_below", "list_names", "status_of", "sync_entries"]

_DESCRIPTORS = "/proc/self/fd/"
"""Begins the name of a reader that was opened here. It names the opened file itself, whatever its path names by now."""
_HAS_DESCRIPTORS = os.path.isdir(_DESCRIPTORS)  # noqa: PTH112
# A folder that may be passed but not listed can be opened as a path only.
_FOLDER = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # which does not wait for the writer of a pipe


@dataclass(frozen=True)
class Place:
    """A file, or none: `names` of folders and of the file below `base`, a folder whose own path may have links."""

    base: str
    names: tuple[str, ...]

    @cached_property
    def path(self) -> str:
        return "/".join((self.base.rstrip("/"), *self.names))

    @contextmanager
    def folder(self, *, makes: bool = False) -> Iterator[int]:
        """A descriptor of its folder. `makes`: where there is none, durably."""
        if makes:
            make_folder(Path(self.base))
        folder, path = os.open(self.base, _FOLDER), self.base.rstrip("/")
        try:
            for name in self.names[:-1]:
                path = f"{path}/{name}"
                inner = _made(folder, name, path) if makes else folder_below(folder, name, path)
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def open(self) -> BinaryIO:
        with self.folder() as folder:
            try:
                file = os.open(self.names[-1], _READ, dir_fd=folder)
            except OSError as error:
                raise _named(error, self.path) from None
        shown = f"{_DESCRIPTORS}{file}" if _HAS_DESCRIPTORS else self.path
        return open(shown, "rb", opener=lambda _path, _flags: file)

    def status(self) -> os.stat_result:
        """Of the file, or the link."""
        with self.folder() as folder:
            return status_of(folder, self.names[-1], self.path)


class KeptFile:
    """The file of a reader, which `path` names also when the reader is closed."""

    def __init__(self, source: BinaryIO, name: Path) -> None:
        """`name`: of the reader. That of a descriptor says nothing once this is closed."""
        is_descriptor = str(name).startswith(_DESCRIPTORS)
        self._own = os.fdopen(os.dup(source.fileno()), "rb") if is_descriptor else None
        self._name = name

    @property
    def path(self) -> Path:
        return self._name if self._own is None else Path(f"{_DESCRIPTORS}{self._own.fileno()}")


def folder_below(folder: int, name: str, path: str) -> int:
    """A descriptor of a folder in a folder. `path`: as errors name it. Raises OSError with ELOOP for a link."""
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP) and stat.S_ISLNK(status_of(folder, name, path).st_mode):
            raise OSError(errno.ELOOP, "is a link, which is not followed", path) from None
        raise _named(error, path) from None


def status_of(folder: int, name: str, path: str) -> os.stat_result:
    """Of a file in a folder, or of a link."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        raise _named(error, path) from None


def list_names(folder: int, path: str) -> list[str]:
    """In order."""
    try:
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
        try:
            return sorted(os.listdir(listed))  # noqa: PTH208 - of a descriptor
        finally:
            os.close(listed)
    except OSError as error:
        raise _named(error, path) from None


def sync_entries(folder: int) -> None:
    listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(listed)
    finally:
        os.close(listed)


def _made(folder: int, name: str, path: str) -> int:
    try:
        return folder_below(folder, name, path)
    except FileNotFoundError:
        pass
    try:
        os.mkdir(name, dir_fd=folder)
    except FileExistsError:  # made meanwhile
        pass
    except OSError as error:
        raise _named(error, path) from None
    sync_entries(folder)  # or a power cut could take it away
    return folder_below(folder, name, path)


def _named(error: OSError, path: str) -> OSError:
    """The same error with the whole path, in place of a name in a folder."""
    return OSError(error.errno, error.strerror, path)
