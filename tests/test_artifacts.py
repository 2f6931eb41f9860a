"""The cache of models on a host whose storage is elsewhere."""

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import seaweed
from proxy import Proxy
from remote import RemoteStorage

from batchserve.errors import Unavailable
from batchserve.scoring import artifacts
from batchserve.scoring.artifacts import read_artifact
from batchserve.storage import model_key, open_storage

DIGEST = "0" * 64


class TaggedStorage(RemoteStorage):
    """Its tags are its objects' times and lengths."""

    def tag(self, key: str) -> str:
        for entry in self.list(key):
            return f"{entry.modified} {entry.bytes}"
        raise FileNotFoundError(key)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp" / f"batchserve-models-{os.getuid()}"


@pytest.fixture
def storage(tmp_path: Path) -> TaggedStorage:
    made = TaggedStorage(str(tmp_path / "store"))
    made.compose(model_key(DIGEST), [b"a model"])
    return made


def fetched(storage: TaggedStorage, digest: str = DIGEST) -> int:
    return storage.fetched[model_key(digest)]


def test_a_model_is_fetched_once(storage: TaggedStorage, cache: Path) -> None:
    for _ in range(3):
        assert read_artifact(storage, DIGEST) == b"a model"
    assert fetched(storage) == len(b"a model")
    assert cache.stat().st_mode & 0o777 == 0o700


def test_processes_that_want_a_model_at_the_same_time_wait_for_the_first(storage: TaggedStorage) -> None:
    begun = threading.Barrier(8)

    def read(_: int) -> bytes:
        begun.wait(20)
        return read_artifact(storage, DIGEST)

    with ThreadPoolExecutor(8) as readers:
        assert set(readers.map(read, range(8))) == {b"a model"}
    assert fetched(storage) == len(b"a model")


def test_a_model_that_was_replaced_is_fetched_again(storage: TaggedStorage) -> None:
    read_artifact(storage, DIGEST)
    storage.compose(model_key(DIGEST), [b"another model"])
    assert read_artifact(storage, DIGEST) == b"another model"


def test_a_model_that_was_removed_is_missing(storage: TaggedStorage) -> None:
    read_artifact(storage, DIGEST)
    storage.delete(model_key(DIGEST))
    with pytest.raises(FileNotFoundError):
        read_artifact(storage, DIGEST)
    storage.outage = Unavailable("the storage does not respond")
    with pytest.raises(Unavailable):
        read_artifact(storage, DIGEST)


def test_the_models_that_were_used_longest_ago_make_room(
    storage: TaggedStorage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "_MOST", 25)
    digests = [str(number) * 64 for number in range(1, 4)]
    left = cache / "x.partial-1"
    for number, digest in enumerate(digests):
        storage.compose(model_key(digest), [bytes(10)])
        read_artifact(storage, digest)
        if number == 0:
            left.write_bytes(b"of a killed process")
            os.utime(left, (1000, 1000))
        if number == 1:  # the first one again, later than the second
            time.sleep(0.02)
            read_artifact(storage, digests[0])
    before = [fetched(storage, digest) for digest in digests]
    for digest in (digests[0], digests[2]):
        read_artifact(storage, digest)
    assert [fetched(storage, digest) for digest in digests] == before
    read_artifact(storage, digests[1])
    assert fetched(storage, digests[1]) == before[1] + 10
    assert not left.exists()


def test_a_folder_that_others_could_write_is_not_used(storage: TaggedStorage, cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o777)
    assert read_artifact(storage, DIGEST) == read_artifact(storage, DIGEST) == b"a model"
    assert list(cache.iterdir()) == []
    cache.rmdir()
    cache.symlink_to(cache.parent)
    assert read_artifact(storage, DIGEST) == b"a model"
    assert list(cache.parent.iterdir()) == [cache]


def test_a_full_disk_keeps_no_model_from_being_read(storage: TaggedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "_write", full)
    assert read_artifact(storage, DIGEST) == read_artifact(storage, DIGEST) == b"a model"


def test_a_folder_storage_needs_no_cache(tmp_path: Path, cache: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    storage.compose(model_key(DIGEST), [b"a model"])
    assert read_artifact(storage, DIGEST) == b"a model"
    assert not cache.exists()


@pytest.fixture
def proxy(s3_server: seaweed.Server, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: ARG001
    with closing(Proxy(s3_server.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.s3
def test_a_model_in_a_bucket_is_fetched_once_for_a_host(s3_address: str, proxy: Proxy) -> None:
    open_storage(s3_address).compose(model_key(DIGEST), [bytes(5_000_000)])
    asked = []
    for _ in range(3):  # as if by other processes
        with proxy.counted() as counted:
            assert read_artifact(open_storage(s3_address), DIGEST) == bytes(5_000_000)
        asked.append([request.split()[0] for request in counted.requests])
    assert asked[0].count("GET") >= 1
    assert asked[1:] == [["HEAD"], ["HEAD"]]
