"""Forms with files: `multipart/form-data` on its way into storage."""

import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import PurePosixPath
from tempfile import SpooledTemporaryFile
from typing import TypeGuard

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from batchserve.api.bodies import BLOCK, Body
from batchserve.errors import BadRequest, InvalidOptions, TruncatedBody
from batchserve.formats.wire.archive import StoredMember, stored_archive
from batchserve.storage import Piece, Storage, scratch_folder
from batchserve.storage.disk import full_disk_named

__all__ = ["MAX_FILES", "Form", "FormFile", "disposition_filename", "form_file", "is_form", "only_file", "open_form"]

MAX_FILES = 10_000
"""In one form: more come as a zip."""
_MAX_FIELDS = 64
_FIELD_BYTES = 256 * 2**10
"""Of all fields that are not files."""
_IN_MEMORY = 1 << 20
_UNSAFE = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(slots=True)
class FormFile:
    """One file of a form, in bytes `start` to `start + bytes` of the spool."""

    name: str
    content_type: str | None
    start: int
    bytes: int = 0
    crc: int = 0


class Form:
    """The files of a form, in their order, and its few other fields. All files are spooled to one temporary file in
    `folder`, of which 1 MiB may be in memory."""

    def __init__(self, boundary: bytes, folder: str | None) -> None:
        self.files: list[FormFile] = []
        self._values: list[tuple[str, bytearray]] = []
        self._spool = SpooledTemporaryFile(max_size=_IN_MEMORY, dir=folder)  # noqa: SIM115 - `close` closes it
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._field,
                "on_header_value": self._value,
                "on_header_end": self._header,
                "on_headers_finished": self._begin_content,
                "on_part_data": self._data,
                "on_end": self._end,
            },
        )
        self._begin()
        self._file: FormFile | None = None
        self._ended = False

    async def receive(self, blocks: AsyncIterator[bytes]) -> None:
        """Raises as `open_form` does."""
        with _named_faults():
            async for block in blocks:
                await run_in_threadpool(self._parser.write, block)
        if not self._ended:
            raise TruncatedBody(f"the form is truncated: no closing boundary after {len(self.files)} files")
        # A browser sends one without name and bytes for an empty field.
        self.files = [file for file in self.files if file.name or file.bytes]

    @property
    def fields(self) -> dict[str, str]:
        """The values of the fields that are no files; of a name that came several times the last."""
        return {name: value.decode(errors="replace") for name, value in self._values}

    async def blocks(self, file: FormFile) -> AsyncGenerator[bytes]:
        """The bytes of a file."""
        pieces = self._contents(file)
        while block := await run_in_threadpool(next, pieces, b""):
            yield block

    async def archive(self) -> AsyncGenerator[bytes]:
        """A zip of all files, stored, each under its own name."""
        names = member_names(file.name for file in self.files)
        members = (
            StoredMember(name, file.bytes, file.crc, self._contents(file))
            for name, file in zip(names, self.files, strict=True)
        )
        blocks = _gathered(stored_archive(members))
        while block := await run_in_threadpool(next, blocks, b""):
            yield block

    def close(self) -> None:
        self._spool.close()

    def _contents(self, file: FormFile) -> Iterator[bytes]:
        for start in range(file.start, file.start + file.bytes, BLOCK):
            self._spool.seek(start)
            yield self._spool.read(min(BLOCK, file.start + file.bytes - start))

    # Callbacks of the parser, in the order in which they come.

    def _begin(self) -> None:
        self._headers: dict[str, bytes] = {}
        self._header_name = self._header_value = b""

    def _field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _begin_content(self) -> None:
        disposition = self._headers.get("content-disposition", b"")
        name = _file_name(disposition)
        self._file = None
        if name is None:
            if len(self._values) == _MAX_FIELDS:
                raise BadRequest(f"the form has more than {_MAX_FIELDS} fields that are not files")
            self._values.append((_field_name(disposition), bytearray()))
            return
        if len(self.files) == MAX_FILES:
            raise BadRequest(f"the form has more than {MAX_FILES} files: send them as a zip")
        media_type = self._headers.get("content-type")
        self._file = FormFile(name, media_type.decode("latin-1") if media_type else None, self._spool.tell())
        self.files.append(self._file)

    def _data(self, data: bytes, start: int, end: int) -> None:
        content = memoryview(data)[start:end]
        if self._file is None:
            _, value = self._values[-1]
            value += content
            if sum(len(one) for _, one in self._values) > _FIELD_BYTES:
                raise BadRequest(f"the fields of a form that are not files may have {_FIELD_BYTES:,} bytes in all")
            return
        self._spool.write(content)
        self._file.bytes += len(content)
        self._file.crc = zlib.crc32(content, self._file.crc)

    def _end(self) -> None:
        self._ended = True


def is_form(content_type: str | None) -> TypeGuard[str]:
    return content_type is not None and content_type.lower().startswith("multipart/form-data")


@asynccontextmanager
async def open_form(content_type: str, body: Body, storage: Storage) -> AsyncIterator[Form]:
    """The files of a form, for the time of the block. The limits of the body apply to the form. Raises BadRequest for
    an invalid form, TruncatedBody for an incomplete one, InvalidOptions for one without a file, InsufficientStorage
    when the storage is full, in whose folder the files wait.
    """
    _, options = parse_options_header(content_type)
    if not options.get(b"boundary"):
        raise BadRequest("the form cannot be read: its Content-Type names no boundary")
    with _named_faults():
        form = Form(options[b"boundary"], scratch_folder(storage))
    try:
        await form.receive(body.blocks())
        if not form.files:
            raise InvalidOptions(
                "the form needs one file or more, got none: a file has a name, as curl -F file=@photo.jpg gives it one"
            )
        yield form
    finally:
        form.close()


async def form_file(content_type: str, body: Body, storage: Storage) -> tuple[bytes, str | None, str]:
    """The one file of a small form: its bytes (decompressed), its media type and its name. Raises InvalidOptions for
    several."""
    async with open_form(content_type, body, storage) as form:
        file = only_file(form, "send several as a zip, or as a job")
        return b"".join([block async for block in body.decoded(form.blocks(file))]), file.content_type, file.name


def only_file(form: Form, instead: str) -> FormFile:
    """Raises InvalidOptions for several, which says what to do `instead`."""
    if len(form.files) > 1:
        raise InvalidOptions(f"expected a form with one file, got {len(form.files)}: {instead}")
    (file,) = form.files
    return file


def disposition_filename(header: str) -> str | None:
    """The file name in a Content-Disposition; None where there is no valid one."""
    message = Message()
    try:
        message["content-disposition"] = header
        return message.get_filename()
    except (ValueError, LookupError, TypeError):  # an unknown encoding, a truncated parameter
        return None


def member_names(names: Iterable[str]) -> Iterator[str]:
    """Names for members of an archive: no path leads out of it, and none is repeated (`a.jpg`, `a-2.jpg`)."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    for given in names:
        parts = _UNSAFE.sub("", given).replace("\\", "/").split("/")
        wanted = name = "/".join(part[-255:] for part in parts if part not in ("", ".", "..")) or "file"
        while name in taken:
            counts[wanted] = counts.get(wanted, 1) + 1
            path = PurePosixPath(wanted)
            name = str(path.with_name(f"{path.stem}-{counts[wanted]}{path.suffix}"))
        taken.add(name)
        yield name


def _file_name(disposition: bytes) -> str | None:
    """The file name of a part; None for a field that is not a file."""
    _, options = parse_options_header(disposition)
    if b"filename" in options:
        return options[b"filename"].decode(errors="replace")
    # The standard forbids `filename*` in forms; some clients send nothing else for names beyond ASCII.
    return disposition_filename(disposition.decode("latin-1"))


def _field_name(disposition: bytes) -> str:
    _, options = parse_options_header(disposition)
    return options.get(b"name", b"").decode(errors="replace")


@contextmanager
def _named_faults() -> Iterator[None]:
    try:
        with full_disk_named():
            yield
    except FormParserError as error:
        raise BadRequest(f"the form cannot be read: {error}") from None


def _gathered(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """Blocks of about 1 MiB: many files are small."""
    gathered = bytearray()
    for piece in pieces:
        assert isinstance(piece, bytes)  # not a Span: nothing of a form is in storage yet
        gathered += piece
        if len(gathered) >= BLOCK:
            yield bytes(gathered)
            gathered.clear()
    if gathered:
        yield bytes(gathered)
