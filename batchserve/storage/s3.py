"""Objects of a bucket: of Amazon S3, or of another store that speaks its protocol."""

import errno
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from batchserve.errors import InsufficientStorage, InvalidOptions, PayloadTooLarge, Unavailable
from batchserve.storage import ObjectInfo, Parts, Piece, Span, Stored, require_key
from batchserve.storage.blocks import BLOCK, BlockCache
from batchserve.storage.ranged import RangedObject
from batchserve.storage.s3_uploads import SignedBucket
from batchserve.storage.streamed import Data, StreamedWriter

if TYPE_CHECKING:
    from obstore import ObjectMeta

__all__ = ["S3Storage"]

_Content = bytes | bytearray | Iterator[Data]

_ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", re.ASCII)
_PART = 8 * 2**20
"""Bytes of a request that sends or fetches a piece of a large object."""
_PARTS = 9_000
"""Most parts of an object; S3 allows 10,000."""
_SMALL = 4 * 2**20
"""Bytes of a read below which it goes through the blocks that are kept."""
_MOST_COMING = 8
"""Most objects that are fetched before they are opened."""
_AHEAD = 4
"""Requests at a time for one object."""
_KEPT = 64 * 2**20
"""Bytes of blocks that a process keeps."""
_URL_LIFE = timedelta(minutes=15)
_ONE_REQUEST = 5 * 2**30
"""Most bytes that S3 takes by a PUT, or copies."""
_SENT_PART = 64 * 2**20
"""Bytes of a part that a client sends, at least."""
_SENT_PARTS = 1_000
"""Most such parts: each has a URL."""
_LONGEST_UPLOAD = 86_400.0
# Together at most about 20 s for a call: the defaults of the library take up to 3 minutes.
_CLIENT = {"connect_timeout": timedelta(seconds=3), "timeout": timedelta(seconds=20), "allow_http": True}
_COPYING = _CLIENT | {"timeout": timedelta(minutes=10)}
"""The store copies a large object before it answers."""
_RETRIES = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}
# The library reports statuses and codes in its texts alone, which tell times, addresses and keys, too.
_STATUS = re.compile(r" - Server returned non-2xx status code: (\d{3})\b")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_FULL = {"507", "QuotaExceeded", "StorageFull", "InsufficientStorage", "XMinioStorageFull"}
_REFUSED = {"401", "403", "NoSuchBucket"}
_BEYOND = {"416", "InvalidRange"}
_UNCONDITIONAL = {"501", "NotImplemented"}
"""Of a store that takes no condition with an object."""


@dataclass(frozen=True, slots=True)
class _NewObjects:
    """Puts objects of names that no object has."""

    store: S3Store
    put: Callable[[str, _Content, int], None]
    requests: ThreadPoolExecutor
    failures_named: Callable[[], AbstractContextManager[None]]

    def __call__(self, path: str, content: _Content, part: int) -> None:
        """Raises FileExistsError."""
        if isinstance(content, bytes | bytearray) and self._put_small(path, content):
            return
        found = False

        def unless_there() -> Iterator[Data]:
            nonlocal found
            yield from [content] if isinstance(content, bytes | bytearray) else content
            # In another thread: the client makes no request in one that asks for a part.
            if found := self.requests.submit(self._has, path).result():
                raise _exists(path)

        try:
            self.put(path, unless_there(), part)
        except Exception as error:
            if found:
                raise _exists(path) from error
            raise

    def _put_small(self, path: str, content: bytes | bytearray) -> bool:
        """False: the store takes no condition with an object."""
        with self.failures_named():
            try:
                obstore.put(self.store, path, content, use_multipart=False, mode="create")
            except AlreadyExistsError as error:
                raise _exists(path) from error
            except BaseError as error:
                if not _says(error, _UNCONDITIONAL):
                    raise
                return False
        return True

    def _has(self, path: str) -> bool:
        try:
            with self.failures_named():
                obstore.head(self.store, path)
        except FileNotFoundError:
            return False
        return True


class S3Storage:
    """A bucket, or what begins with a prefix in it. Endpoint, region and credentials are those of the environment of
    each host (`AWS_*`), or of its role. Small objects are written by one request, larger ones in parts while they come.

    In the storage of a service no object is created on condition that it is missing: a key names the job, and the
    attempt that writes it. In the buckets of others, `create_new` is for that.
    """

    def __init__(self, address: str) -> None:
        """Raises InvalidOptions for an address of another form, and for settings in the environment that the client
        does not take."""
        self.address = address
        bucket, prefix = _parsed(address)
        self._prefix = f"{prefix}/" if prefix else ""
        try:
            self._store, self._copying = (
                S3Store(bucket, client_options=options, retry_config=_RETRIES)  # type: ignore[arg-type]
                for options in (_CLIENT, _COPYING)
            )
        except (BaseError, ValueError) as error:
            raise InvalidOptions(f"the storage {address} cannot be opened: {_first_line(error)}") from error
        self._requests = ThreadPoolExecutor(_AHEAD, thread_name_prefix="s3")
        # Separate threads: those of requests may wait for what is read ahead.
        ahead = ThreadPoolExecutor(2, thread_name_prefix="s3-ahead")
        self._blocks = BlockCache(self._fetch, ahead, _KEPT)
        self._coming: OrderedDict[str, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises InvalidOptions where the store refuses this bucket or these credentials, Unavailable where it does not
        respond."""
        try:
            with self._failures_named():
                next(iter(obstore.list(self._store, f"{self._prefix}models")), None)
        except Unavailable as error:
            if not _is_refusal(error.__cause__):
                raise
            raise InvalidOptions(
                f"{error.detail}. Check the bucket in BATCHSERVE_STORAGE, and AWS_ENDPOINT_URL, AWS_REGION, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role of this host"
            ) from error

    @contextmanager
    def create(self, key: str) -> Iterator[StreamedWriter]:
        with self._writing(key, _PART) as writer:
            yield writer

    @contextmanager
    def create_new(self, key: str) -> Iterator[StreamedWriter]:
        """An object of several parts is looked for just before they are joined: the client joins them without a
        condition."""
        put = _NewObjects(self._store, self._put, self._requests, self._failures_named)
        with self._writing(key, _PART, put) as writer:
            yield writer

    def read_ahead(self, key: str, size: int) -> None:
        if 0 < size < _SMALL:
            with self._lock:
                self._coming[self._path(key)] = self._requests.submit(_whole, self._fetch, self._path(key), 0, size)
                while len(self._coming) > _MOST_COMING:
                    self._coming.popitem(last=False)

    def open(self, key: str) -> BinaryIO:
        path = self._path(key)
        with self._lock:
            coming = self._coming.pop(path, None)
        if coming is not None:
            data = coming.result()
            self._blocks.add(path, data)
            return RangedObject(self, key, len(data)).open()
        with self._failures_named():
            try:
                beginning = obstore.get(self._store, path, options={"range": (0, BLOCK)})
                size, data = beginning.meta["size"], bytes(beginning.bytes())
            except BaseError as error:
                if not _says(error, _BEYOND):
                    raise
                size, data = obstore.head(self._store, path)["size"], b""  # it is empty
        self._blocks.add(path, data)
        return RangedObject(self, key, size).open()

    def tag(self, key: str) -> str:
        with self._failures_named():
            found = obstore.head(self._store, self._path(key))
        return _tag(found["e_tag"], found["size"])

    def open_tagged(self, key: str, tag: str) -> BinaryIO:
        if self.tag(key) != tag:
            raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)} in this version", key)
        self._blocks.forget(self._path(key))  # perhaps of another version
        return RangedObject(self, key, int(tag.rsplit(maxsplit=1)[-1])).open()

    def read(self, key: str, start: int, stop: int) -> bytes:
        path = self._path(key)
        if stop - start < _SMALL:
            return self._blocks.read(path, start, stop)
        fetches = (partial(self._fetch, path, *piece) for piece in _pieces(start, stop))
        return b"".join(_in_order(self._requests, fetches))

    def url(self, key: str) -> str:
        with self._failures_named():
            return obstore.sign(self._store, "GET", self._path(key), _URL_LIFE)

    def upload_url(self, key: str, size: int, seconds: float) -> str:
        if size > _ONE_REQUEST:
            raise PayloadTooLarge(f"the object store takes at most {_ONE_REQUEST} bytes in one request, not {size}")
        with self._failures_named():
            return obstore.sign(self._store, "PUT", self._path(key), timedelta(seconds=seconds))

    def begin_parts(self, key: str, size: int, seconds: float) -> Parts | None:
        if size <= _SENT_PART or (bucket := self._signed()) is None:
            return None
        path, part = self._path(key), max(_SENT_PART, -(-size // _SENT_PARTS))
        upload_id = bucket.begin(path)
        numbers = range(1, -(-size // part) + 1)
        return Parts(upload_id, part, tuple(bucket.part_url(path, upload_id, number, seconds) for number in numbers))

    def join_parts(self, key: str, parts_id: str, size: int) -> int:
        bucket, path = self._signed(), self._path(key)
        if bucket is None:
            raise Unavailable("this host has no secret key to join the parts of an object")
        parts = bucket.parts(path, parts_id)
        if parts:
            if (found := sum(part.bytes for part in parts)) != size:
                return found
            bucket.join(path, parts_id, parts)
        with self._failures_named():
            return obstore.head(self._store, path)["size"]

    def abort_parts(self, key: str, parts_id: str) -> None:
        if (bucket := self._signed()) is not None:
            bucket.abort(self._path(key), parts_id)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # The store lists what is below a folder, and not always in the order of the keys.
        folder = f"{self._prefix}{prefix}".rpartition("/")[0]
        with self._failures_named():
            found = sorted(
                (entry["path"].removeprefix(self._prefix), *_described(entry))
                for page in obstore.list(self._store, folder or None)
                for entry in page
            )
        return (ObjectInfo(*entry) for entry in found if entry[0].startswith(prefix))

    def delete(self, key: str) -> None:
        self.delete_many([key])

    def delete_many(self, keys: Sequence[str]) -> None:
        paths = [self._path(key) for key in keys]
        for path in paths:
            self._blocks.forget(path)
        with self._failures_named():
            try:
                obstore.delete(self._store, paths)
            except FileNotFoundError as error:
                if _is_refusal(error):
                    raise

    def copy(self, source: str, target: str) -> None:
        """At most 5 GiB, as S3 allows."""
        with self._failures_named():
            obstore.copy(self._copying, self._path(source), self._path(target))
        self._blocks.forget(self._path(target))

    def compose(self, key: str, pieces: Iterable[Piece]) -> Stored:
        """The bytes pass through this process: S3 would copy no span of less than 5 MiB, and report no digest."""
        pieces = list(pieces)
        size = sum(piece.stop - piece.start if isinstance(piece, Span) else len(piece) for piece in pieces)
        with self._writing(key, max(_PART, -(-size // _PARTS))) as writer:
            for data in _in_order(self._requests, self._contents(pieces)):
                writer.write(data)
            return writer.commit()

    def remove_partials(self, before: float) -> int:
        """Aborts uploads of killed writers that were begun a day before `before`: a large one may take hours, and its
        parts have no times. Does nothing on a host without a secret key.
        """
        if (bucket := self._signed()) is None:
            return 0
        left = [upload for upload in bucket.pending(self._prefix) if upload.begun < before - _LONGEST_UPLOAD]
        for upload in left:
            bucket.abort(upload.path, upload.upload_id)
        return len(left)

    def _signed(self) -> SignedBucket | None:
        with self._failures_named():
            return SignedBucket.of(obstore.sign(self._store, "GET", "probe", _URL_LIFE))

    @contextmanager
    def _writing(self, key: str, part: int, put: Callable[..., None] | None = None) -> Iterator[StreamedWriter]:
        path = self._path(key)
        writer = StreamedWriter(partial(put or self._put, path), part, _AHEAD)
        try:
            yield writer
        finally:
            writer.abandon()
            self._blocks.forget(path)

    def _put(self, path: str, content: _Content, part: int) -> None:
        is_small = isinstance(content, bytes | bytearray)
        with self._failures_named():
            obstore.put(self._store, path, content, use_multipart=not is_small, chunk_size=part, max_concurrency=_AHEAD)

    def _contents(self, pieces: Iterable[Piece]) -> Iterator[Callable[[], bytes]]:
        for piece in pieces:
            if isinstance(piece, Span):
                path = self._path(piece.key)
                fetch = self._blocks.read if piece.stop - piece.start < _SMALL else self._fetch
                yield from (partial(_whole, fetch, path, *part) for part in _pieces(piece.start, piece.stop))
            else:
                yield partial(bytes, piece)

    def _fetch(self, path: str, start: int, stop: int) -> bytes:
        """Bytes of an object by one request, fewer only where it ends."""
        if start >= stop:
            return b""
        with self._failures_named():
            try:
                return bytes(obstore.get(self._store, path, options={"range": (start, stop)}).bytes())
            except BaseError as error:
                if _says(error, _BEYOND):
                    return b""
                raise

    def _path(self, key: str) -> str:
        require_key(key)
        return f"{self._prefix}{key}"

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        """Raises Unavailable, or InsufficientStorage, for what the store or the network reports. A bucket that is not
        there must not look like a missing object: jobs would lose their bytes to it."""
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            if isinstance(error, FileNotFoundError) and not _is_refusal(error):
                raise
            code = _code_of(error)
            if _is_refusal(error):
                raise Unavailable(f"the object store refuses access to {self.address}: {code}") from error
            if _says(error, _FULL):
                raise InsufficientStorage(f"the object store has no space for {self.address}: {code}") from error
            raise Unavailable(f"the object store does not respond for {self.address}: {code}") from error


def _in_order(requests: ThreadPoolExecutor, fetches: Iterable[Callable[[], bytes]]) -> Iterator[bytes]:
    """What the fetches give, some of them made ahead."""
    under_way: deque[Future[bytes]] = deque()
    try:
        for fetch in fetches:
            under_way.append(requests.submit(fetch))
            if len(under_way) == _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _described(entry: "ObjectMeta") -> tuple[int, float, str]:
    """Size, time and tag of an entry of a listing."""
    return entry["size"], entry["last_modified"].timestamp(), _tag(entry["e_tag"], entry["size"])


def _tag(e_tag: str | None, size: int) -> str:
    return f"{e_tag} {size}"


def _whole(fetch: Callable[[str, int, int], bytes], path: str, start: int, stop: int) -> bytes:
    data = fetch(path, start, stop)
    if len(data) < stop - start:
        raise EOFError(f"{path} ends before its byte {stop}")
    return data


def _exists(path: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether the store says that it will not serve this bucket, or not with these credentials."""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return True
    return isinstance(error, FileNotFoundError | BaseError) and _says(error, _REFUSED)


def _says(error: BaseException, answers: set[str]) -> bool:
    """Whether the status of the response, or the code of S3 in it, is one of these."""
    text = str(error)
    return any(match and match[1] in answers for match in (_STATUS.search(text), _CODE.search(text)))


def _code_of(error: BaseException) -> str:
    """What the store said, by its own code if there is one, without addresses and tokens."""
    code = _CODE.search(str(error))
    return code[1] if code else _first_line(error)


def _first_line(error: BaseException) -> str:
    """Without the request and its address, which the library puts in front."""
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return first.rpartition(" - ")[2][:200]


def _pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + _PART, stop)) for begin in range(start, stop, _PART))


def _parsed(address: str) -> tuple[str, str]:
    """Bucket and prefix of an address."""
    found = _ADDRESS.fullmatch(address)
    prefix = (found[2] or "").rstrip("/") if found else ""
    if found is None or (prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/"))):
        raise InvalidOptions(f"the storage is {address!r}; expected s3://bucket or s3://bucket/prefix")
    return found[1], prefix
