"""Objects as files of one folder. A file appears under its key complete and durable, or not at all."""

import ctypes
import errno
import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchserve.storage import ObjectInfo, Occupied, Piece, Span, Stored, require_key
from batchserve.storage.disk import full_disk_named, make_folder, sync_folder
from batchserve.storage.folders import sync_entries

TEMPORARY = ".partial-"
_BLOCK = 1 << 20
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)
"""Where a file gets no second name."""
_WRITE_BACK = 16 << 20
"""Bytes after which a writer starts writeback."""


class LocalStorage:
    """A folder. Durable put: temporary file beside the target, write, fsync, rename, fsync of the folder."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.root = Path(address)
        self.root.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def create(self, key: str) -> Iterator["FileWriter"]:
        target = self.path(key)
        with full_disk_named():
            writer = self._open_writer(target)
        try:
            yield writer
        finally:
            writer.abandon()

    def open(self, key: str) -> BinaryIO:
        path = self.path(key)
        try:
            return path.open("rb")
        except IsADirectoryError:  # a folder is a key prefix, not an object
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None

    def read(self, key: str, start: int, stop: int) -> bytes:
        with self.open(key) as source:
            source.seek(start)
            return source.read(stop - start)

    def url(self, _key: str) -> None:
        return None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key in sorted(key for key in self._keys(prefix.rpartition("/")[0]) if key.startswith(prefix)):
            with suppress(FileNotFoundError):  # deleted meanwhile
                status = (self.root / key).stat()
                yield ObjectInfo(key, status.st_size, status.st_mtime)

    def delete(self, key: str) -> None:
        path = self.path(key)
        path.unlink(missing_ok=True)
        folder = path.parent
        while folder != self.root:  # an empty folder is removed
            try:
                folder.rmdir()
            except OSError:
                break
            folder = folder.parent

    def compose(self, key: str, pieces: Iterable[Piece]) -> Stored:
        with self.create(key) as writer, full_disk_named():
            for piece in pieces:
                if isinstance(piece, Span):
                    with self.open(piece.key) as source:
                        writer.copy(source, piece.start, piece.stop)
                else:
                    writer.write(piece)
            return writer.commit()

    def link(self, key: str, file: Path) -> bool:
        target = self.path(key)
        make_folder(target.parent)
        try:
            target.hardlink_to(file)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        sync_folder(target.parent)
        return True

    def free_bytes(self) -> int:
        status = os.statvfs(self.root)
        return status.f_bavail * status.f_frsize

    def remove_partials(self, before: float) -> int:
        removed = 0
        for key in self._files(""):
            path = self.root / key
            with suppress(FileNotFoundError):  # its writer has just finished
                if path.name.startswith(TEMPORARY) and path.stat().st_mtime < before:
                    self.delete(key)
                    removed += 1
        return removed

    def _open_writer(self, target: Path) -> "FileWriter":
        while True:
            with suppress(FileNotFoundError):  # a concurrent delete removed the empty folder
                make_folder(target.parent)
                return FileWriter(target)

    def _keys(self, folder: str) -> Iterator[str]:
        return (key for key in self._files(folder) if not key.rpartition("/")[2].startswith(TEMPORARY))

    def _files(self, folder: str) -> Iterator[str]:
        for path, _, names in os.walk(self.path(folder) if folder else self.root, onerror=_unless_missing):
            for name in names:
                yield (Path(path) / name).relative_to(self.root).as_posix()

    def path(self, key: str) -> Path:
        require_key(key)
        return self.root / key


class FileWriter:
    """A file being written. A failed fsync is never retried: the file is discarded (promise D3)."""

    def __init__(self, target: Path, folder: int | None = None, *, replaces: bool = True, mark: str = "") -> None:
        """`folder`: a descriptor of the folder, which stays open; `target` is then a name in it. `replaces`: a file of
        that name; otherwise the commit raises Occupied where there is one. `mark`: in its name until then."""
        self._target, self._folder, self._replaces = target, folder, replaces
        self._temporary = target.parent / f"{TEMPORARY}{mark}{secrets.token_hex(8)}"
        self._fd = os.open(
            self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=self._folder
        )
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._begun = 0  # of them, so many are on their way to the disk
        self._beside: ThreadPoolExecutor | None = None
        self._hashing: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        self._await_hashes()
        self._hash.update(data)
        with full_disk_named():
            view = memoryview(data)
            while view:
                written = os.write(self._fd, view)
                self._bytes += written
                view = view[written:]
        self._write_back()

    def copy(self, source: BinaryIO, start: int, stop: int) -> None:
        """Appends bytes `start` to `stop` of an open file. The operating system copies; a thread reads only to hash,
        while more is copied and synced."""
        position = start
        while position < stop:
            copied = _copy_range(source.fileno(), self._fd, stop - position, position)
            if copied == 0:
                raise EOFError(f"{source.name} ends at byte {position}; {stop} bytes were expected")
            position += copied
        first, self._bytes = self._bytes, self._bytes + stop - start
        self._write_back()
        self._beside = self._beside or ThreadPoolExecutor(1, "hash")  # one, so that the order is kept
        self._hashing.append(self._beside.submit(self._hash_copied, first, self._bytes))

    def commit(self) -> Stored:
        with full_disk_named():
            os.fsync(self._fd)
            self._await_hashes()
            os.close(self._fd)
            self._fd = -1
            self._appear()
            if self._folder is None:
                sync_folder(self._target.parent)
            else:
                sync_entries(self._folder)
        return Stored(self._bytes, self._hash.hexdigest())

    def _appear(self) -> None:
        if not self._replaces:
            try:
                os.link(
                    self._temporary,
                    self._target,
                    src_dir_fd=self._folder,
                    dst_dir_fd=self._folder,
                    follow_symlinks=False,
                )
            except FileExistsError as error:
                raise Occupied(Stored(self._bytes, self._hash.hexdigest())) from error
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                self._require_free()  # the best that such a file system can do
            else:
                os.unlink(self._temporary, dir_fd=self._folder)
                return
        os.rename(self._temporary, self._target, src_dir_fd=self._folder, dst_dir_fd=self._folder)

    def _require_free(self) -> None:
        with suppress(FileNotFoundError):
            os.stat(self._target, dir_fd=self._folder, follow_symlinks=False)
            raise Occupied(Stored(self._bytes, self._hash.hexdigest()))

    def abandon(self) -> None:
        """Removes the file of an uncommitted write; does nothing after a commit."""
        if self._beside is not None:  # it reads the file
            self._beside.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with suppress(FileNotFoundError):
            os.unlink(self._temporary, dir_fd=self._folder)

    def _hash_copied(self, start: int, stop: int) -> None:
        while start < stop:
            block = os.pread(self._fd, min(_BLOCK, stop - start), start)
            if not block:
                raise EOFError(f"{self._temporary} ends at byte {start}; {stop} bytes were copied into it")
            self._hash.update(block)
            start += len(block)

    def _await_hashes(self) -> None:
        for hashing in self._hashing:
            hashing.result()
        self._hashing.clear()

    def _write_back(self) -> None:
        """Starts writeback of new bytes; otherwise a commit would find all of a big file still in the page cache."""
        if self._bytes - self._begun >= _WRITE_BACK:
            _start_write_back(self._fd, self._begun, self._bytes - self._begun)
            self._begun = self._bytes


def _start_write_back(fd: int, offset: int, count: int) -> None:
    """Does not wait and reports no errors, which fsync does. Linux only; elsewhere a no-op."""
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, count, _SYNC_FILE_RANGE_WRITE)


_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def _copy_range(source: int, target: int, count: int, offset: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.write(target, os.pread(source, min(count, _BLOCK), offset))


def _unless_missing(error: OSError) -> None:
    """Folders may vanish while they are listed; any other failure must not look like an empty folder."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error
