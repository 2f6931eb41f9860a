"""A backup: a snapshot of the database, and the bytes that its rows reference.

The database is copied first, for bytes never change; a deletion hold keeps them while they are copied. A backup is a
folder with the layout of a storage and a file `SHA256SUMS` for `sha256sum -c`. It is renamed to its target when it is
complete.
"""

import hashlib
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import delete

from batchserve.db import tables
from batchserve.db.connect import Database
from batchserve.errors import DigestMismatch, InvalidOptions
from batchserve.storage import OnDisk, Storage, Stored, local_path, open_storage
from batchserve.storage.disk import sync_folder
from batchserve.upkeep import holds
from batchserve.upkeep.objects import named_objects

DATABASE = "batchserve.db"
SUMS = "SHA256SUMS"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class CopyReport:
    """The outcome of a backup or a restore. `linked` of the objects are hard links, which take no space. `damaged`:
    keys of objects that were already missing, or differ from their rows.
    """

    objects: int
    bytes: int
    linked: int
    damaged: tuple[str, ...]


def back_up(database: Database, storage: Storage, target: Path, *, link: bool = True) -> CopyReport:
    """Makes a backup while a server runs, which only delays its deletions.

    `link`: by hard links where `target` is on the file system of the storage. Raises InvalidOptions when the target
    exists, or is in the storage.
    """
    target = target.resolve()
    if target.exists():
        raise InvalidOptions(f"{target} already exists: name a new folder")
    if isinstance(storage, OnDisk) and target.is_relative_to(storage.root.resolve()):
        raise InvalidOptions(f"{target} is in the storage: name a folder elsewhere, preferably on another disk")
    partial = target.parent / f".partial-{target.name}-{secrets.token_hex(4)}"
    try:
        filled = _fill(partial, database, storage, link=link)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(target.parent)
    return filled


def restore(source: Path, storage: Storage, database: Path) -> CopyReport:
    """Puts a backup into an empty storage, and its database at a path. Every byte is compared with `SHA256SUMS`.

    The database comes last: without it the rest is invisible. Raises InvalidOptions when the storage is not empty, or
    the source is not a backup; DigestMismatch when the backup is damaged, and then removes what it copied.
    """
    sums = _read_sums(source)
    if database.exists() or next(iter(storage.list("")), None) is not None:
        raise InvalidOptions(f"{storage.address} is not empty: restore into a new folder")
    backup = open_storage(str(source))
    restored: dict[str, Stored] = {}
    try:
        for key, sha256 in sums.items():
            if key != DATABASE:
                restored[key] = _verified(backup, key, sha256, storage, key)
        _verified(backup, DATABASE, sums[DATABASE], open_storage(str(database.parent)), database.name)
    except BaseException:
        for key in restored:
            storage.delete(key)
        raise
    opened = Database(f"sqlite:///{database}")
    try:
        damaged = {key for key, sha256 in named_objects(opened) if differs(restored.get(key), sha256)}
    finally:
        opened.close()
    size = sum(stored.bytes for stored in restored.values())
    return CopyReport(len(restored), size, 0, tuple(sorted(damaged)))


def _fill(folder: Path, database: Database, storage: Storage, *, link: bool) -> CopyReport:
    target = open_storage(str(folder))
    taken: dict[str, Stored] = {}
    damaged: set[str] = set()
    linked = 0
    with holds.held(database):
        database.copy_to(folder / DATABASE)
        for key, sha256 in _named_in_copy(folder / DATABASE):
            if key in taken:
                continue
            try:
                with storage.open(key) as source:
                    file = local_path(storage, key) if link else None
                    is_linked = file is not None and isinstance(target, OnDisk) and target.link(key, file)
                    taken[key] = _stored(source) if is_linked else copied(source, target, key)
                    linked += is_linked
            except FileNotFoundError:
                damaged.add(key)
                continue
            if differs(taken[key], sha256):
                damaged.add(key)
    with (folder / DATABASE).open("rb") as copy:
        sums = {DATABASE: _stored(copy), **taken}
    lines = "".join(f"{stored.sha256}  {key}\n" for key, stored in sums.items())
    with target.create(SUMS) as writer:
        writer.write(lines.encode())
        writer.commit()
    return CopyReport(len(taken), sum(stored.bytes for stored in taken.values()), linked, tuple(sorted(damaged)))


def _named_in_copy(path: Path) -> Iterator[tuple[str, str | None]]:
    """The objects that a copied database references. Removes this backup's hold from the copy."""
    copy = Database(f"sqlite:///{path}")
    try:
        with copy.write() as connection:
            connection.execute(delete(tables.holds))
        yield from named_objects(copy)
    finally:
        copy.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")  # one file, without a log


def _read_sums(source: Path) -> dict[str, str]:
    try:
        lines = (source / SUMS).read_text().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidOptions(f"{source} is not a backup: it has no {SUMS}") from None
    sums = {key: sha256 for sha256, _, key in (line.partition("  ") for line in lines)}
    if DATABASE not in sums:
        raise DigestMismatch(f"{source / SUMS} names no {DATABASE}: the backup is incomplete")
    return sums


def _verified(backup: Storage, key: str, sha256: str, target: Storage, name: str) -> Stored:
    """Copies an object out of a backup. Raises DigestMismatch when it has changed."""
    try:
        with backup.open(key) as source:
            stored = copied(source, target, name)
    except FileNotFoundError:
        raise DigestMismatch(f"{key} is missing in the backup") from None
    except ValueError as error:
        raise DigestMismatch(f"{SUMS} is damaged: {error}") from None
    if stored.sha256 != sha256:
        target.delete(name)
        raise DigestMismatch(f"{key} is damaged in the backup: expected SHA-256 {sha256}, got {stored.sha256}")
    return stored


def copied(source: BinaryIO, target: Storage, key: str) -> Stored:
    """The rest of an open file as an object."""
    with target.create(key) as writer:
        while block := source.read(_BLOCK):
            writer.write(block)
        return writer.commit()


def _stored(file: BinaryIO) -> Stored:
    digest, size = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        digest.update(block)
        size += len(block)
    return Stored(size, digest.hexdigest())


def differs(stored: Stored | None, sha256: str | None) -> bool:
    """Whether an object is missing, or has another digest than its row says, if that says one."""
    return stored is None or (sha256 is not None and stored.sha256 != sha256)
