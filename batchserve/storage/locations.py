"""Locations: files and objects where their owners keep them, outside of the service's storage. Inputs are read there in
place, results are written there, and nothing is ever removed but what a killed writer has left.

An address is `file:///folder/name`, percent-encoded as by `Path.as_uri`, or `s3://bucket/key`, as it is. In a pattern,
`*`, `?` and `[...]` stand for characters within a name, and `**` for any number of folders; they never match a name
that begins with a dot. Links are not followed: where an administrator allows a prefix, a link in it may lead out of it.
"""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote_to_bytes

from batchserve.errors import InputChanged, InputNotFound, InvalidLocation, LocationRefused
from batchserve.storage import CreatesNew, OpensTagged, Storage, Writer, open_storage
from batchserve.storage.disk import full_disk_named
from batchserve.storage.folders import Place, folder_below, list_names, status_of
from batchserve.storage.local import FileWriter
from batchserve.storage.patterns import ANY_FOLDERS, all_match, is_pattern, literal, matches, plain

__all__ = [
    "Found",
    "any_within",
    "as_reached",
    "create_at",
    "exists",
    "find",
    "is_external",
    "is_file",
    "name_of",
    "open_at",
    "read_at",
    "remove_left",
    "require_unchanged",
    "root_of",
]

_FILE, _S3 = "file://", "s3://"
_ESCAPES = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_LONGEST = 2048
_DEEPEST = 100
"""Folders on the way to a file that a pattern finds: each is open while it is listed."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object at the time when it was found."""

    url: str
    bytes: int
    version: str
    """Tells whether it has been changed since."""


@dataclass(frozen=True, slots=True)
class _Address:
    """An address, or a pattern of addresses. `base`: the file system, or a bucket."""

    base: str
    parts: tuple[str, ...]
    """Each may be a pattern; without one it is a name as it is."""

    @classmethod
    def of(cls, url: str) -> "_Address":
        """Raises InvalidLocation."""
        if "\0" in url or len(url) > _LONGEST:
            raise InvalidLocation(f"an address has at most {_LONGEST} characters, and no NUL, got {url[:80]!r}...")
        if url.startswith(_FILE):
            base, rest, expected = _FILE, url.removeprefix(_FILE), "file:///folder/name, an absolute path"
            parts = [_decoded(part) for part in rest.split("/")]
            is_whole = rest.startswith("/")
        elif url.startswith(_S3):
            bucket, slash, rest = url.removeprefix(_S3).partition("/")
            base, parts, expected = f"{_S3}{bucket}", ["", *rest.split("/")], "s3://bucket/key"
            is_whole = bool(bucket and slash) and not set("*?[") & set(bucket)
        else:
            raise InvalidLocation(f"{url!r} is not an address; expected file:///folder/name or s3://bucket/key")
        parts = parts[1:-1] if parts[-1:] == [""] and len(parts) > 1 else parts[1:]
        if not is_whole:
            raise InvalidLocation(f"{url!r} is not an address; expected {expected}")
        for part in parts:
            if part in ("", ".", "..") or "/" in part or "\0" in part:
                raise InvalidLocation(f"{url!r} has the component {part!r}; expected names of folders and of a file")
        return cls(base, tuple(parts))

    @property
    def fixed(self) -> tuple[str, ...]:
        """The parts before the first pattern."""
        for place, part in enumerate(self.parts):
            if is_pattern(part):
                return self.parts[:place]
        return self.parts

    @property
    def path(self) -> str:
        """Of a file without a pattern."""
        return _path(self.parts)

    @property
    def key(self) -> str:
        """Of an object in the storage at `base`; of a file, relative to the root of the file system."""
        return "/".join(literal(part) for part in self.parts)

    def is_within(self, root: "_Address") -> bool:
        """Whether all that it can match lies within a folder, or begins with a prefix and a slash."""
        return self.base == root.base and self.fixed[: len(root.parts)] == root.parts


def _decoded(part: str) -> str:
    """A part of a file's address without percent signs. What was encoded is never a pattern."""
    return _ESCAPES.sub(lambda found: glob.escape(os.fsdecode(unquote_to_bytes(found[0]))), part)


@lru_cache(maxsize=4096)
def _address(url: str) -> _Address:
    return _Address.of(url)


def is_external(key: str) -> bool:
    """Whether the key of an input is its address: it is not in the service's storage."""
    return key.startswith((_FILE, _S3))


def is_file(key: str) -> bool:
    return key.startswith(_FILE)


def name_of(url: str) -> str:
    """The file name in an address."""
    return _address(url).key.rstrip("/").rpartition("/")[2]


def root_of(url: str, allowed: Sequence[str]) -> str:
    """The prefix of those that are allowed within which an address, or all that a pattern can match, lies.

    Raises InvalidLocation and LocationRefused.
    """
    address = _address(url)
    for root in allowed:
        if address.is_within(_address(root)):
            return root
    shown = " or ".join(allowed) if allowed else "none: an administrator allows some by a setting"
    raise LocationRefused(f"{url} is not within a location that this tenant may use; expected one within {shown}")


def find(pattern: str, allowed: Sequence[str], most: int) -> list[Found]:
    """The objects at an address, or at all addresses that match a pattern, in the order of their names.

    Raises InvalidLocation and LocationRefused, also for a link, InputNotFound when there is none, or more than `most`,
    and Unavailable for an object store out of reach.
    """
    root, address = _address(root_of(pattern, allowed)), _address(pattern)
    if not address.parts:
        raise InvalidLocation(f"{pattern} names no object; expected a name or a pattern, as in {pattern}*.parquet")
    objects = _files(root, address) if address.base == _FILE else _objects(address)
    found: list[Found] = []
    for one in objects:
        if len(found) == most:
            raise InvalidLocation(f"more than {most} objects match {pattern}; expected at most {most} inputs in a job")
        found.append(one)
    if not found:
        what = "no object matches" if _has_pattern(address) else "there is no object"
        raise InputNotFound(f"{what} {pattern}")
    return found


def _has_pattern(address: _Address) -> bool:
    return len(address.fixed) < len(address.parts)


def _files(root: _Address, address: _Address) -> Iterator[Found]:
    depth = _vouched(root, address)
    fixed = address.fixed if _has_pattern(address) else address.fixed[:-1]
    place = Place(_path(address.parts[:depth]), (*map(literal, address.parts[depth : len(fixed)]), ""))
    with suppress(FileNotFoundError, NotADirectoryError), _refusals_named(), place.folder() as folder:
        listed = _Folder(folder, _path(fixed).rstrip("/"), depth, set())
        yield from _matching_files(listed, plain(address.parts[len(fixed) :]))


@contextmanager
def _refusals_named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise LocationRefused(f"{error.filename} {error.strerror}") from error
        if error.errno == errno.ENAMETOOLONG:
            name = str(error.filename).rpartition("/")[2]
            raise InvalidLocation(f"the name {name[:80]}... is longer than the file system allows") from error
        if isinstance(error, PermissionError):
            raise LocationRefused(f"{error.filename} cannot be read: {error.strerror}") from error
        raise


def _vouched(root: _Address, address: _Address) -> int:
    """How many folders of an address the prefix that allows it names: these may be links, as an administrator has made
    them; the others may not."""
    return min(len(root.parts), len(address.parts) - 1)


def _path(parts: Sequence[str]) -> str:
    return "/" + "/".join(map(literal, parts))


def _place(address: _Address, depth: int) -> Place:
    """Of a file without a pattern."""
    return Place(_path(address.parts[:depth]), tuple(map(literal, address.parts[depth:])))


@dataclass(frozen=True, slots=True)
class _Folder:
    """An open folder whose files are listed. `depth`: see `_vouched`."""

    descriptor: int
    path: str
    depth: int
    seen: set[tuple[str, int]]
    """The folders that were listed, each with the length of the rest of the pattern: several ** reach one in many
    ways."""


@contextmanager
def _entered(folder: _Folder, name: str) -> Iterator[_Folder]:
    path = f"{folder.path}/{name}"
    if path.count("/") > _DEEPEST:
        raise InvalidLocation(f"{path} is more than {_DEEPEST} folders deep")
    descriptor = folder_below(folder.descriptor, name, path)
    try:
        yield _Folder(descriptor, path, folder.depth, folder.seen)
    finally:
        os.close(descriptor)


def _matching_files(folder: _Folder, parts: Sequence[str]) -> Iterator[Found]:
    """Depth first, in the order of the names."""
    if (folder.path, len(parts)) in folder.seen:
        return
    folder.seen.add((folder.path, len(parts)))
    part, rest = parts[0], parts[1:]
    if part == ANY_FOLDERS:
        yield from _matching_files(folder, rest)
    elif not is_pattern(part):
        yield from _below(folder, literal(part), rest)
        return
    for name in list_names(folder.descriptor, folder.path or "/"):
        if part == ANY_FOLDERS:
            if not name.startswith(".") and _is_folder(folder, name):
                yield from _below(folder, name, parts)
        elif matches(name, part):
            yield from _below(folder, name, rest, is_listed=True)


def _is_folder(folder: _Folder, name: str) -> bool:
    try:
        return stat.S_ISDIR(status_of(folder.descriptor, name, f"{folder.path}/{name}").st_mode)
    except (FileNotFoundError, NotADirectoryError):  # removed meanwhile
        return False


def _below(folder: _Folder, name: str, rest: Sequence[str], *, is_listed: bool = False) -> Iterator[Found]:
    """What matches in a folder, or the file of that name. `is_listed`: among others that match, where a folder is no
    fault."""
    path = f"{folder.path}/{name}"
    try:
        if rest:
            with _entered(folder, name) as inner:
                yield from _matching_files(inner, rest)
            return
        status = status_of(folder.descriptor, name, path)
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(status.st_mode):
        raise LocationRefused(f"{path} is a link, which is not followed")
    if stat.S_ISREG(status.st_mode):
        yield Found(_FILE + quote(os.fsencode(path)), status.st_size, _version(status, folder.depth))
    elif stat.S_ISDIR(status.st_mode):
        if is_listed:
            return
        raise InvalidLocation(f"{path} is a folder; expected a file, or a pattern, as in {_FILE}{path}/*")
    else:
        raise LocationRefused(f"{path} is not a file")


def _version(status: os.stat_result, depth: int) -> str:
    """`depth`: see `_vouched`. Who opens the file later knows by it where links begin to be refused."""
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}/{depth}"


def _depth(version: str) -> int:
    depth = version.rpartition("/")[2]
    return int(depth) if depth.isdecimal() and "/" in version else 0


def _objects(address: _Address) -> Iterator[Found]:
    bucket = _bucket(address.base)
    if not _has_pattern(address):
        try:
            tag = bucket.tag(address.key)
        except FileNotFoundError:
            return
        yield Found(f"{address.base}/{glob.escape(address.key)}", int(tag.rpartition(" ")[2]), tag)
        return
    prefix, parts = "/".join(map(literal, address.fixed)), plain(address.parts)
    for found in bucket.list(f"{prefix}/" if prefix else ""):
        names = found.key.split("/")
        if found.tag is not None and "" not in names and all_match(names, parts):
            yield Found(f"{address.base}/{glob.escape(found.key)}", found.bytes, found.tag)


@lru_cache(maxsize=8)
def _opened(address: str) -> Storage:
    return open_storage(address)


def _bucket(address: str) -> OpensTagged:
    bucket = _opened(address)
    assert isinstance(bucket, OpensTagged), address
    return bucket


def open_at(url: str, version: str) -> BinaryIO:
    """A seekable reader of the object that was found in this version. Raises InputChanged for any other, or none."""
    address = _address(url)
    if address.base == _FILE:
        return _open_file(url, address, version)
    try:
        return _bucket(address.base).open_tagged(address.key, version)
    except FileNotFoundError:
        raise _changed(url) from None


def _open_file(url: str, address: _Address, version: str) -> BinaryIO:
    with _missing_is_changed(url):
        source = _place(address, _depth(version)).open()
    if _version(os.fstat(source.fileno()), _depth(version)) != version:
        source.close()
        raise _changed(url)
    return source


@contextmanager
def _missing_is_changed(url: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise LocationRefused(f"{url} cannot be read: {error.strerror}") from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _changed(url) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _changed(url) from None
        raise


def require_unchanged(url: str, version: str) -> None:
    """Raises InputChanged unless the object is still in this version: what was read of it is one state of it."""
    address = _address(url)
    with _missing_is_changed(url):
        if address.base == _FILE:
            depth = _depth(version)
            now = _version(_place(address, depth).status(), depth)
        else:
            now = _bucket(address.base).tag(address.key)
    if now != version:
        raise _changed(url)


def _changed(url: str) -> InputChanged:
    return InputChanged(f"{url} was changed or removed after the job was queued: submit it again")


def create_at(url: str, root: str, *, replaces: bool, mark: str = "") -> AbstractContextManager[Writer]:
    """A writer of an object, which appears under its address whole and durable, or not at all. `replaces`: one that is
    there; otherwise the commit raises Occupied. `mark`: in the name of a file until then. Raises OSError with ELOOP for
    a link on the way from `root`, the prefix which allows it."""
    address = _address(url)
    if address.base == _FILE:
        return _create_file(address, root, replaces, mark)
    bucket = _opened(address.base)
    assert isinstance(bucket, CreatesNew), address
    return bucket.create(address.key) if replaces else bucket.create_new(address.key)


@contextmanager
def _create_file(address: _Address, root: str, replaces: bool, mark: str) -> Iterator[Writer]:
    place = _place_below(address, root)
    with full_disk_named(), place.folder(makes=True) as folder:
        writer = FileWriter(Path(place.names[-1]), folder, replaces=replaces, mark=mark)
        try:
            yield writer
        finally:
            writer.abandon()


def _place_below(address: _Address, root: str) -> Place:
    return _place(address, _vouched(_address(root), address))


def as_reached(urls: Iterable[str]) -> list[str]:
    """Addresses of which equal ones are those of one object, also through links in the prefixes that allow them."""
    folders: dict[str, str] = {}
    found = []
    for address in map(_address, urls):
        if address.base != _FILE:
            found.append(f"{address.base}/{address.key}")
            continue
        folder, _, name = address.path.rpartition("/")
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        found.append(f"{folders[folder]}/{name}")
    return found


def exists(url: str, root: str) -> bool:
    """Whether there is an object, or a link. `root`: the prefix which allows the address, as in all that follow."""
    address = _address(url)
    with suppress(FileNotFoundError, NotADirectoryError), _refusals_named():
        if address.base == _FILE:
            _place_below(address, root).status()
        else:
            _bucket(address.base).tag(address.key)
        return True
    return False


def remove_left(folder: str, root: str, is_left: Callable[[str], bool], beginning: str | None = None) -> None:
    """Removes what killed writers have left in a folder of files; where it cannot be removed, it stays. `beginning`: it
    is in folders of that folder whose names begin so."""
    address = _address(folder)
    if address.base != _FILE:
        return
    place = _place_below(replace(address, parts=(*address.parts, "any")), root)
    with suppress(OSError), place.folder() as descriptor:
        listed = _Folder(descriptor, address.path, 0, set())
        if beginning is None:
            _remove_in(listed, is_left)
            return
        for name in list_names(descriptor, listed.path):
            if name.startswith(beginning):
                with suppress(OSError), _entered(listed, name) as inner:
                    _remove_in(inner, is_left)


def _remove_in(folder: _Folder, is_left: Callable[[str], bool]) -> None:
    for name in list_names(folder.descriptor, folder.path):
        if is_left(name):
            with suppress(OSError):
                os.unlink(name, dir_fd=folder.descriptor)


def any_within(url: str, root: str) -> bool:
    """Whether a folder has anything in it, or a bucket anything below a prefix."""
    address = _address(url)
    if address.base == _FILE:
        place = _place_below(replace(address, parts=(*address.parts, "any")), root)
        with suppress(FileNotFoundError, NotADirectoryError), _refusals_named(), place.folder() as folder:
            return bool(list_names(folder, address.path))
        return False
    return next(iter(_opened(address.base).list(f"{address.key}/")), None) is not None


def read_at(url: str, root: str) -> BinaryIO:
    """A reader of an object in whatever version it is. Raises FileNotFoundError."""
    address = _address(url)
    if address.base == _FILE:
        return _place_below(address, root).open()
    return _opened(address.base).open(address.key)
