"""Direct uploads: an input in the parts that the object store takes."""

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

from batchserve.client.data import bytes_content
from batchserve.client.transport import BLOCK, Content, OnUpload
from batchserve.errors import InvalidInput

__all__ = ["parts_of", "with_digest"]


def with_digest(content: Content, files: ExitStack) -> tuple[Content, str]:
    """The content, repeatable and of known length, and its SHA-256. What can be read only once is copied to a temporary
    file, which is among `files`. Raises InvalidInput for a compressed content, which the server would have to
    decompress, and for an empty one."""
    if content.encoding is not None:
        raise InvalidInput(
            f"a direct upload is stored as it is sent, and {content.filename!r} is compressed: decompress it, or do "
            "without direct"
        )
    if not content.repeatable:
        content = _in_file(content, files.enter_context(tempfile.TemporaryFile()))  # noqa: SIM115 - `files` closes it
    digest, size = hashlib.sha256(), 0
    for block in content.blocks():
        digest.update(block)
        size += len(block)
    if not size:
        raise InvalidInput("there is nothing to upload: expected a file with a header or records, got 0 bytes")
    return replace(content, length=size), digest.hexdigest()


def _in_file(content: Content, file: BinaryIO) -> Content:
    file.writelines(content.blocks())

    def blocks() -> Iterator[bytes]:
        file.seek(0)
        while block := file.read(BLOCK):
            yield block

    return replace(content, blocks=blocks, repeatable=True)


def parts_of(
    content: Content, begun: Mapping[str, Any], on_upload: OnUpload | None
) -> Iterator[tuple[str, Content, OnUpload | None]]:
    """Each URL of an upload that was begun, with what is sent to it, and what is called with the bytes sent so far. A
    part is in memory where there are several."""
    urls, size, done = begun["urls"], begun["part_bytes"], 0
    if len(urls) == 1:
        yield urls[0], content, on_upload
        return
    blocks, held = content.blocks(), bytearray()
    for url in urls:
        while len(held) < size and (block := next(blocks, b"")):
            held += block
        part, held = bytes(held[:size]), held[size:]
        yield url, bytes_content(part, content.media_type), on_upload and partial(_add, on_upload, done, content.length)
        done += len(part)


def _add(on_upload: OnUpload, before: int, total: int | None, done: int, _: int | None) -> None:
    on_upload(before + done, total)
