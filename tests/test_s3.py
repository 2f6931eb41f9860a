"""The storage in a bucket, beyond the contract of all storages: parts, caches, and every way to not reach it."""

import hashlib
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import obstore
import pytest
import seaweed
from commands import in_a_process
from obstore.store import S3Store
from proxy import Mode, Proxy
from waiting import until

from batchserve import storage as storages
from batchserve.errors import BatchserveError, InsufficientStorage, InvalidOptions, Unavailable
from batchserve.settings import Settings
from batchserve.storage import (
    Piece,
    Span,
    Storage,
    delete_objects,
    free_bytes,
    local_path,
    open_storage,
    remove_partials,
    scratch_folder,
)
from batchserve.storage import s3 as module
from batchserve.storage.blocks import BLOCK, BlockCache
from batchserve.storage.streamed import StreamedWriter

MB = 2**20
NOISE = random.Random(1).randbytes(33 * MB)


@pytest.fixture
def storage(s3_address: str) -> Storage:
    return open_storage(s3_address)


@pytest.fixture
def proxy(s3_server: seaweed.Server, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: ARG001
    """On the way of this process to the server."""
    with closing(Proxy(s3_server.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def put(storage: Storage, key: str, *blocks: bytes) -> None:
    with storage.create(key) as writer:
        for block in blocks:
            writer.write(block)
        writer.commit()


def parts_of(storage: Storage, key: str) -> int:
    """The number of parts of an object, 0 for one that was written whole."""
    bucket, _, prefix = storage.address.removeprefix("s3://").partition("/")
    tag = str(obstore.head(S3Store(bucket, client_options={"allow_http": True}), f"{prefix}/{key}")["e_tag"])
    return int(tag.strip('"').partition("-")[2] or 0)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("blocks", [1, 33, 400], ids=["one write", "as an upload", "small writes"])
def test_a_large_object_is_sent_in_parts_while_it_is_written(storage: Storage, blocks: int) -> None:
    size = -(-len(NOISE) // blocks)
    with storage.create("inputs/a") as writer:
        for start in range(0, len(NOISE), size):
            writer.write(NOISE[start : start + size])
        stored = writer.commit()
    assert (stored.bytes, stored.sha256) == (len(NOISE), hashlib.sha256(NOISE).hexdigest())
    assert storage.read("inputs/a", 0, len(NOISE)) == NOISE
    assert parts_of(storage, "inputs/a") == 5


@pytest.mark.s3
def test_a_small_object_is_one_request(storage: Storage, proxy: Proxy) -> None:
    storage = open_storage(storage.address)
    with proxy.counted() as counted:
        put(storage, "inputs/a", b"123")
    assert [request.split()[0] for request in counted.requests] == ["PUT"]


@pytest.mark.s3
def test_a_large_object_that_is_broken_off_leaves_no_parts(storage: Storage, proxy: Proxy) -> None:
    storage = open_storage(storage.address)

    def break_off() -> None:
        with storage.create("inputs/a") as writer:
            for start in range(0, len(NOISE), MB):
                writer.write(NOISE[start : start + MB])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert list(storage.list("")) == []
    until(lambda: any(request.startswith("DELETE") for request in proxy.requests))  # the upload that was begun
    assert sum(request.startswith("POST") for request in proxy.requests) == 1, "no upload is completed"
    assert list(storage.list("")) == []


@pytest.mark.s3
def test_a_composed_object_has_few_enough_parts_and_its_digest(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(storage, "parts/a", NOISE)
    monkeypatch.setattr(module, "_PARTS", 2)
    pieces: list[Piece] = [b"head", Span("parts/a", 5, len(NOISE)), Span("parts/a", 0, 3 * MB), b"tail"]
    whole = b"head" + NOISE[5:] + NOISE[: 3 * MB] + b"tail"
    composed = storage.compose("results/a", pieces)
    assert (composed.bytes, composed.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert storage.read("results/a", 0, len(whole)) == whole
    assert parts_of(storage, "results/a") == 2


def test_a_writer_that_is_faster_than_the_store_waits() -> None:
    """At most one part is held, and few are queued, however much is written."""
    taken: list[int] = []
    proceed = threading.Event()

    def store(content: object, _part: int) -> None:
        proceed.wait(20)
        assert isinstance(content, Iterator)
        taken.extend(len(part) for part in content)

    writer = StreamedWriter(store, 10, 4)
    written: list[int] = []

    def write() -> None:
        for number in range(100):
            writer.write(bytes(10))
            written.append(number)

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(0.5)
    assert len(written) <= 4
    proceed.set()
    thread.join(20)
    assert writer.commit().bytes == sum(taken) == 1000


def test_to_leave_a_writer_waits_for_nothing() -> None:
    """An event loop may do it, while the store does not answer."""
    proceed, ended = threading.Event(), threading.Event()

    def store(content: object, _part: int) -> None:
        assert isinstance(content, Iterator)
        try:
            for _ in content:
                proceed.wait(20)
        finally:
            ended.set()

    for parts in (1, 3):
        writer = StreamedWriter(store, 10, 4)
        for _ in range(parts):
            writer.write(bytes(10))
        began = time.monotonic()
        writer.abandon()
        assert time.monotonic() - began < 0.5
        proceed.set()
        assert ended.wait(20)
        proceed.clear()
        ended.clear()


def test_an_error_of_the_store_ends_a_writer_at_any_moment() -> None:
    def fail_at(part: int, *, commits: bool) -> None:
        def store(content: object, _part: int) -> None:
            assert isinstance(content, Iterator)
            for number, _ in enumerate(content):
                if number == part:
                    raise Unavailable("the store is gone")

        writer = StreamedWriter(store, 10, 4)
        try:
            for _ in range(20 if commits else 10_000):
                writer.write(bytes(10))
            if commits:
                writer.commit()
        finally:
            writer.abandon()

    for part in (0, 1, 10, 19):
        with pytest.raises(Unavailable):
            fail_at(part, commits=True)
        with pytest.raises(Unavailable):  # not only at the end, which may be far
            fail_at(part, commits=False)


# --- reading ---------------------------------------------------------------------------------------------------------


class Objects:
    """An object, the requests for it, and a cache of its blocks."""

    def __init__(self, executor: ThreadPoolExecutor, size: int, most: int = 64 * MB) -> None:
        self.data = (NOISE * 4)[:size]
        self.requests: list[tuple[int, int]] = []
        self.cache = BlockCache(self.fetch, executor, most)

    def fetch(self, _key: str, start: int, stop: int) -> bytes:
        self.requests.append((start, min(stop, len(self.data))))
        return self.data[start:stop]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def test_small_reads_share_the_requests_of_their_blocks(executor: ThreadPoolExecutor) -> None:
    objects = Objects(executor, 10 * MB)
    for place in range(5 * MB, 6 * MB, 1000):
        assert objects.cache.read("a", place, place + 100) == objects.data[place : place + 100]
    assert len(objects.requests) <= 2
    chance = random.Random(2)
    for _ in range(500):
        start = chance.randrange(11 * MB)
        stop = start + chance.choice((1, 100, 70_000, 2 * MB))
        assert objects.cache.read("a", start, stop) == objects.data[start:stop]


def test_an_object_that_is_read_to_its_end_takes_few_requests_and_each_byte_once(executor: ThreadPoolExecutor) -> None:
    objects = Objects(executor, 100 * MB + 5)
    found = b"".join(objects.cache.read("a", start, start + 131_072) for start in range(0, 101 * MB, 131_072))
    assert found == objects.data
    assert len(objects.requests) <= 18
    assert sum(max(0, stop - start) for start, stop in objects.requests) == len(objects.data)


def test_a_cache_keeps_no_more_than_its_limit(executor: ThreadPoolExecutor) -> None:
    objects = Objects(executor, 30 * MB, most=4 * MB)
    for number in range(0, 30, 2):
        objects.cache.read("a", number * MB, number * MB + 1)
    before = len(objects.requests)
    objects.cache.read("a", 28 * MB, 28 * MB + 1)
    assert len(objects.requests) == before
    objects.cache.read("a", 0, 1)
    assert len(objects.requests) == before + 1


def test_what_was_forgotten_is_read_anew(executor: ThreadPoolExecutor) -> None:
    objects = Objects(executor, 3 * MB)
    assert objects.cache.read("a", 0, 3) == objects.data[:3]
    objects.data = b"other bytes"
    objects.cache.forget("a")
    assert objects.cache.read("a", 0, 5) == b"other"


def test_threads_read_an_object_at_the_same_time(executor: ThreadPoolExecutor) -> None:
    objects = Objects(executor, 20 * MB, most=6 * MB)

    def read(seed: int) -> bool:
        chance = random.Random(seed)
        places = [chance.randrange(20 * MB) for _ in range(300)]
        return all(objects.cache.read("a", at, at + 9000) == objects.data[at : at + 9000] for at in places)

    with ThreadPoolExecutor(8) as readers:
        assert all(readers.map(read, range(8)))


@pytest.mark.s3
def test_a_reader_takes_one_request_for_a_small_object(storage: Storage, proxy: Proxy) -> None:
    put(storage, "models/a", NOISE[:1000])
    storage = open_storage(storage.address)
    with proxy.counted() as counted, storage.open("models/a") as source:
        assert source.read() == NOISE[:1000]
    assert len(counted.requests) == 1


@pytest.mark.s3
def test_a_large_object_is_read_in_few_requests(storage: Storage, proxy: Proxy) -> None:
    put(storage, "inputs/a", NOISE)
    storage = open_storage(storage.address)
    with proxy.counted() as counted, storage.open("inputs/a") as source:
        found = bytearray()
        while block := source.read(50_000):
            found += block
    assert found == NOISE
    assert len(counted.requests) <= 9
    assert counted.sent < 1.1 * len(NOISE)
    with proxy.counted() as counted:
        assert storage.read("inputs/a", 3, 20 * MB) == NOISE[3 : 20 * MB]
    assert len(counted.requests) == 3
    assert BLOCK == MB


@pytest.mark.s3
def test_anybody_can_fetch_an_object_by_its_url(storage: Storage) -> None:
    put(storage, "results/a", NOISE[: 2 * MB])
    url = storage.url("results/a")
    assert url is not None
    assert httpx2.get(url).content == NOISE[: 2 * MB]
    part = httpx2.get(url, headers={"range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, NOISE[5:10])
    assert httpx2.get(url.partition("?")[0]).status_code == 403


@pytest.mark.s3
def test_many_objects_are_removed_by_one_request(storage: Storage, proxy: Proxy) -> None:
    keys = [f"parts/a/{number}" for number in range(50)]
    for key in keys:
        storage.compose(key, [b"1"])
    storage = open_storage(storage.address)
    with proxy.counted() as counted:
        delete_objects(storage, [*keys[1:], "parts/a/none"])
        delete_objects(storage, [])
    assert len(counted.requests) == 1
    assert [entry.key for entry in storage.list("")] == keys[:1]


@pytest.mark.s3
def test_a_bucket_is_no_disk(storage: Storage) -> None:
    assert (local_path(storage, "a"), free_bytes(storage), scratch_folder(storage)) == (None, None, None)
    assert remove_partials(storage, 0) == 0


KILLED = """
import os, sys, time
from batchserve.storage import open_storage

with open_storage(sys.argv[1]).create(sys.argv[2]) as writer:
    for _ in range(40):
        writer.write(os.urandom(2**20))
    print("written", flush=True)
    time.sleep(100)
"""


@pytest.mark.s3
def test_uploads_of_killed_writers_are_aborted_after_a_day(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    other = open_storage(f"{storage.address}-of-others")
    for address, key in (
        (storage.address, "inputs/ä b+c"),
        (storage.address, "results/1"),
        (other.address, "inputs/1"),
    ):
        with subprocess.Popen([sys.executable, "-c", KILLED, address, key], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"written\n"
            process.kill()
    put(storage, "inputs/1", NOISE[: 20 * MB])
    day, now = 86_400.0, time.time()
    assert remove_partials(storage, now + day - 60) == 0, "one may still be under way"
    with monkeypatch.context() as role:
        role.delenv("AWS_SECRET_ACCESS_KEY")
        assert remove_partials(storage, now + day + 60) == 0, "a host with a role leaves it to a rule of the bucket"
    assert remove_partials(storage, now + day + 60) == 2
    assert remove_partials(storage, now + day + 60) == 0
    assert storage.read("inputs/1", 0, 20 * MB) == NOISE[: 20 * MB]
    assert remove_partials(other, now + day + 60) == 1


# --- not reaching it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["s3://", "s3://B", "s3://x", "s3:///jobs", "s3://bucket/a//b", "s3://bucket/../x", "gs://bucket/x"]
)
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(InvalidOptions, match="expected"):
        open_storage(address)


def failures(storage: Storage, key: str = "inputs/a") -> Iterator[tuple[float, BatchserveError]]:
    """What every method raises, and after how many seconds."""

    def write(size: int) -> None:
        put(storage, f"{key}-b", NOISE[:size])

    for act in (
        lambda: storage.open(key),
        lambda: storage.read(key, 0, 3),
        lambda: storage.read(key, 0, 9 * MB),
        lambda: list(storage.list(key)),
        lambda: storage.delete(key),
        lambda: write(3),
        lambda: write(20 * MB),
        lambda: storage.compose("results/a", [Span(key, 0, 3)]),
    ):
        began = time.monotonic()
        with pytest.raises((Unavailable, InsufficientStorage)) as caught:
            act()
        yield time.monotonic() - began, caught.value


@pytest.mark.s3
@pytest.mark.parametrize("mode", ["away", "broken"])
def test_every_method_reports_an_outage_soon_and_works_after_it(storage: Storage, proxy: Proxy, mode: Mode) -> None:
    put(storage, "inputs/a", NOISE[: 9 * MB])
    storage = open_storage(storage.address)
    proxy.turn(mode)
    for seconds, error in failures(storage):
        assert seconds < 15
        assert error.code == "unavailable"
        assert "does not respond" in error.detail
        assert "127.0.0.1" not in error.detail
    proxy.turn("through")
    assert storage.read("inputs/a", 0, 9 * MB) == NOISE[: 9 * MB]
    put(storage, "inputs/b", NOISE[: 20 * MB])


@pytest.mark.s3
@pytest.mark.parametrize("key", ["inputs/507 InsufficientStorage", "inputs/416 InvalidRange"])
def test_a_key_that_reads_like_an_answer_of_the_store_is_not_one(storage: Storage, proxy: Proxy, key: str) -> None:
    put(storage, key, NOISE[: 9 * MB])
    storage = open_storage(storage.address)
    proxy.turn("away")
    assert {(error.code, "does not respond" in error.detail) for _, error in failures(storage, key)} == {
        ("unavailable", True)
    }


@pytest.mark.s3
def test_a_store_without_space_is_named(storage: Storage, proxy: Proxy) -> None:
    proxy.turn("full")
    with pytest.raises(InsufficientStorage, match="no space"):
        put(open_storage(storage.address), "inputs/a", b"123")


@pytest.mark.s3
@pytest.mark.slow
def test_a_store_that_never_answers_is_given_up(storage: Storage, proxy: Proxy) -> None:
    put(storage, "inputs/a", b"123")
    storage = open_storage(storage.address)
    proxy.turn("silent")
    began = time.monotonic()
    with pytest.raises(Unavailable):
        storage.read("inputs/a", 0, 3)
    assert time.monotonic() - began < 45


@pytest.mark.s3
def test_a_write_of_unknown_outcome_can_be_repeated(storage: Storage, proxy: Proxy) -> None:
    storage = open_storage(storage.address)
    proxy.turn("unanswered")
    for content in (b"123", NOISE[: 20 * MB]):
        with pytest.raises(Unavailable):
            put(storage, "inputs/a", content)
    proxy.turn("through")
    for content in (b"123", NOISE[: 20 * MB]):
        put(storage, "inputs/a", content)
        assert storage.read("inputs/a", 0, len(content)) == content


@pytest.mark.s3
def test_a_short_outage_is_not_noticed(storage: Storage, proxy: Proxy) -> None:
    put(storage, "inputs/a", b"123")
    storage = open_storage(storage.address)
    proxy.turn("broken")
    threading.Timer(0.3, proxy.turn, ["through"]).start()
    assert storage.read("inputs/a", 0, 3) == b"123"


@pytest.mark.s3
@pytest.mark.parametrize(
    ("variable", "value", "bucket", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", seaweed.BUCKET, "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "unknown", seaweed.BUCKET, "InvalidAccessKeyId"),
        ("AWS_REGION", "us-east-1", "missing", "NoSuchBucket"),
    ],
    ids=["a wrong secret", "an unknown key", "a missing bucket"],
)
def test_a_store_that_refuses_is_named_at_the_start_and_never_looks_empty(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, bucket: str, said: str
) -> None:
    put(storage, "inputs/a", b"123")
    monkeypatch.setenv(variable, value)
    storage = open_storage(storage.address.replace(seaweed.BUCKET, bucket))
    with pytest.raises(InvalidOptions, match=f"refuses access to {storage.address}: {said}. Check the bucket"):
        storage.check()  # type: ignore[attr-defined]
    for act in (lambda: storage.open("inputs/a"), lambda: storage.read("inputs/a", 0, 3), lambda: storage.list("")):
        with pytest.raises(Unavailable, match="refuses access"):
            act()


@pytest.mark.s3
@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("worker",)], ids=["serve", "worker"])
def test_a_start_with_wrong_credentials_ends_with_one_line(
    s3_address: str, sqlite_template: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    shutil.copy(sqlite_template, tmp_path)
    database = f"sqlite:///{tmp_path / sqlite_template.name}"
    environment = {"BATCHSERVE_STORAGE": s3_address, "BATCHSERVE_DATABASE": database, "AWS_SECRET_ACCESS_KEY": "wrong"}
    done = in_a_process(tmp_path, *command, **environment)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "refuses access" in line
    assert "AWS_SECRET_ACCESS_KEY" in line


def test_a_bucket_without_the_extra_is_refused_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "find_spec", lambda _name: None)
    with pytest.raises(InvalidOptions, match=r"pip install 'batchserve\[s3\]'"):
        open_storage("s3://bucket/jobs")


def test_uploads_that_no_object_could_hold_are_refused_as_a_setting() -> None:
    bucket: dict[str, Any] = {"storage": "s3://bucket/jobs", "database": "sqlite:///x.db"}
    assert Settings(**bucket).upload_bytes == Settings().upload_bytes
    with pytest.raises(ValueError, match="too long for an object store"):
        Settings(**bucket, upload_bytes=2**40)
    assert Settings(upload_bytes=2**40).upload_bytes == 2**40
