"""Files that appear under their names when they are whole."""

import functools
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from batchserve.client.transport import Wire

__all__ = ["remove_parts", "write_whole"]

_PART = re.compile(r"\.[0-9a-f]{32}\.part")
_ABANDONED = 600.0
"""Seconds without a change after which a file is not being written any more: a download that stalls ends sooner."""


async def write_whole(
    wire: Wire, path: Path, blocks: AsyncIterator[bytes], on_block: Callable[[int], None] | None = None
) -> None:
    """Writes a file, which survives a power cut once it has its name. `on_block`: called with the bytes written so
    far."""
    part, done = path.with_name(f".{uuid.uuid4().hex}.part"), 0
    try:
        with part.open("xb") as file:
            async for block in blocks:
                await wire.call(functools.partial(file.write, block))
                done += len(block)
                if on_block is not None:
                    on_block(done)
            await wire.call(functools.partial(_sync, file))
        part.replace(path)
        await wire.call(functools.partial(_sync_folder, path.parent))
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Removes what a killed process left of files that it was writing."""
    for path in folder.glob(".*.part"):
        if _PART.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    with suppress(PermissionError):  # of Windows, which opens no folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
