"""The contract of a storage, for every backend; then the promises that only a folder makes."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from remote import RemoteStorage

from batchserve.storage import Piece, Span, Storage, Stored, free_bytes, local_path, open_storage, remove_partials

BLOCK = bytes(range(256)) * 4096  # 1 MiB that shows when its parts are exchanged


def folder_storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def remote_storage(tmp_path: Path) -> Storage:
    return RemoteStorage(str(tmp_path / "store"))


@pytest.fixture(params=["folder", "remote", pytest.param("s3", marks=pytest.mark.s3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage of each kind; a new backend is added here."""
    match request.param:
        case "folder":
            return folder_storage(tmp_path)
        case "remote":
            return remote_storage(tmp_path)
        case _:
            return open_storage(request.getfixturevalue("s3_address"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The root of a folder storage, for tests of the files themselves."""
    path = tmp_path / "store"
    path.mkdir()
    return path


def put(storage: Storage, key: str, *blocks: bytes) -> Stored:
    with storage.create(key) as writer:
        for block in blocks:
            writer.write(block)
        return writer.commit()


def get(storage: Storage, key: str) -> bytes:
    with storage.open(key) as source:
        return source.read()


def keys(storage: Storage, prefix: str = "") -> list[str]:
    return [entry.key for entry in storage.list(prefix)]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- writing ---


@pytest.mark.parametrize("blocks", [(), (b"",), (b"one", b"two"), (BLOCK, b"x", BLOCK)], ids=len)
def test_an_object_holds_the_written_bytes_and_reports_their_length_and_digest(
    storage: Storage, blocks: tuple[bytes, ...]
) -> None:
    whole = b"".join(blocks)
    assert put(storage, "inputs/a", *blocks) == Stored(len(whole), sha256(whole))
    assert get(storage, "inputs/a") == whole


def test_a_memoryview_can_be_written(storage: Storage) -> None:
    with storage.create("inputs/a") as writer:
        writer.write(memoryview(BLOCK)[3:70_000])
        assert writer.commit() == Stored(69_997, sha256(BLOCK[3:70_000]))
    assert get(storage, "inputs/a") == BLOCK[3:70_000]


def test_nothing_is_visible_before_the_commit(storage: Storage) -> None:
    with storage.create("inputs/a") as writer:
        writer.write(BLOCK)
        assert keys(storage) == []
        with pytest.raises(FileNotFoundError):
            storage.open("inputs/a")
        writer.commit()
        assert keys(storage) == ["inputs/a"]


def test_an_object_that_is_not_committed_leaves_nothing(storage: Storage) -> None:
    with storage.create("inputs/a") as writer:
        writer.write(b"half")
    assert keys(storage) == []


def test_an_exception_leaves_nothing(storage: Storage) -> None:
    def break_off() -> None:
        with storage.create("inputs/a") as writer:
            writer.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert keys(storage) == []


def test_an_exception_after_the_commit_keeps_the_object(storage: Storage) -> None:
    def break_off() -> None:
        with storage.create("inputs/a") as writer:
            writer.write(b"whole")
            writer.commit()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        break_off()
    assert get(storage, "inputs/a") == b"whole"


def test_an_object_is_replaced_as_a_whole(storage: Storage) -> None:
    put(storage, "inputs/a", b"the first and longer one")
    with storage.open("inputs/a") as reading:
        put(storage, "inputs/a", b"second")
        assert reading.read() in (b"the first and longer one", b"second")
    assert get(storage, "inputs/a") == b"second"
    assert keys(storage) == ["inputs/a"]


def test_a_replacement_that_is_not_committed_changes_nothing(storage: Storage) -> None:
    put(storage, "inputs/a", b"first")
    with storage.create("inputs/a") as writer:
        writer.write(b"second")
    assert get(storage, "inputs/a") == b"first"


# --- reading ---


def test_any_range_can_be_read(storage: Storage) -> None:
    put(storage, "inputs/a", BLOCK, BLOCK)
    with storage.open("inputs/a") as source:
        assert source.seek(0, os.SEEK_END) == 2 * len(BLOCK)
        for start, count in [(0, 1), (5, 1000), (len(BLOCK) - 7, 14), (2 * len(BLOCK) - 1, 100)]:
            source.seek(start)
            assert source.read(count) == (BLOCK + BLOCK)[start : start + count]
        source.seek(2 * len(BLOCK))
        assert source.read(1) == b""


def test_an_object_that_does_not_exist_cannot_be_opened(storage: Storage) -> None:
    put(storage, "inputs/a/b", b"1")
    for key in ("inputs/z", "elsewhere/a", "inputs/a"):
        with pytest.raises(FileNotFoundError):
            storage.open(key)


def test_a_range_is_read_without_the_rest_and_ends_with_the_object(storage: Storage) -> None:
    put(storage, "inputs/a", BLOCK, b"tail")
    size = len(BLOCK) + 4
    for start, stop in [(0, 1), (5, 1000), (size - 6, size), (size - 1, size + 100), (size, size + 1), (3, 3)]:
        assert storage.read("inputs/a", start, stop) == (BLOCK + b"tail")[start:stop]
    with pytest.raises(FileNotFoundError):
        storage.read("inputs/z", 0, 1)


# --- listing ---


def test_a_listing_is_in_order_of_the_keys(storage: Storage) -> None:
    names = ["a-b", "a/b", "a/c/d", "a.b", "b", "a/b-1", "parts/x/2", "parts/x/10", "é/1"]
    for name in names:
        put(storage, name, name.encode())
    assert keys(storage) == sorted(names)
    sizes = {entry.key: entry.bytes for entry in storage.list("")}
    assert sizes == {name: len(name.encode()) for name in names}


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("parts/x/", ["parts/x/1", "parts/x/2"]),
        ("parts/x", ["parts/x/1", "parts/x/2", "parts/xy/1"]),
        ("parts/x/1", ["parts/x/1"]),
        ("par", ["parts/x/1", "parts/x/2", "parts/xy/1", "parts/y/1"]),
        ("parts/z/", []),
        ("none/at/all", []),
    ],
)
def test_a_prefix_is_any_beginning_of_a_key(storage: Storage, prefix: str, found: list[str]) -> None:
    for key in ("parts/x/1", "parts/x/2", "parts/xy/1", "parts/y/1", "inputs/x"):
        put(storage, key, b"1")
    assert keys(storage, prefix) == found


def test_a_listing_has_the_time_of_each_object(storage: Storage) -> None:
    put(storage, "inputs/a", b"1")
    put(storage, "inputs/b", b"1")
    first, second = storage.list("inputs/")
    assert 0 < first.modified <= second.modified < first.modified + 60


# --- deleting ---


def test_deleting_twice_is_no_error(storage: Storage) -> None:
    put(storage, "parts/x/1", b"1")
    put(storage, "parts/y/1", b"1")
    for _ in range(2):
        storage.delete("parts/x/1")
    storage.delete("never/was")
    assert keys(storage) == ["parts/y/1"]


# --- composing ---


def test_an_object_is_composed_of_bytes_and_spans(storage: Storage) -> None:
    put(storage, "parts/x/1", BLOCK)
    put(storage, "parts/x/2", b"0123456789")
    pieces: list[Piece] = [
        b"head\n",
        Span("parts/x/1", 10, len(BLOCK)),
        Span("parts/x/2", 0, 10),
        b"",
        Span("parts/x/2", 4, 4),
        Span("parts/x/2", 9, 10),
        b"tail",
    ]
    whole = b"head\n" + BLOCK[10:] + b"0123456789" + b"9" + b"tail"
    composed = storage.compose("results/x", iter(pieces))
    assert (composed.bytes, composed.sha256) in ((len(whole), sha256(whole)), (len(whole), None))
    assert get(storage, "results/x") == whole


def test_nothing_composes_to_an_empty_object(storage: Storage) -> None:
    assert storage.compose("results/x", []).bytes == 0
    assert get(storage, "results/x") == b""


@pytest.mark.parametrize("missing", [Span("parts/none", 0, 1), Span("parts/x", 2, 4)], ids=["object", "bytes"])
def test_a_composition_of_missing_objects_leaves_nothing(storage: Storage, missing: Span) -> None:
    put(storage, "parts/x", b"123")
    with pytest.raises((FileNotFoundError, EOFError)):
        storage.compose("results/x", [b"head", missing])
    assert keys(storage) == ["parts/x"]


# --- keys ---


@pytest.mark.parametrize(
    "key", ["", ".", "..", "/", "/etc/passwd", "../x", "a/../../x", "a/..", "a//b", "a/", "a/./b", "./a", "a\0b"]
)
def test_a_key_that_could_leave_the_storage_is_refused(storage: Storage, key: str) -> None:
    with pytest.raises(ValueError, match="storage key"), storage.create(key):
        pass
    with pytest.raises(ValueError, match="storage key"):
        storage.open(key)
    with pytest.raises(ValueError, match="storage key"):
        storage.delete(key)
    with pytest.raises(ValueError, match="storage key"):
        storage.compose(key, [])


# --- concurrency ---


def test_concurrent_creators_and_deleters_lose_nothing(storage: Storage) -> None:
    """Deleters remove a folder with its last object just when a creator needs it."""
    stop = threading.Event()

    def come_and_go(name: int) -> None:
        for turn in range(60):
            key = f"parts/x/y/{name}"
            data = f"{name}-{turn}".encode()
            put(storage, key, data)
            assert get(storage, key) == data
            storage.delete(key)
        put(storage, f"parts/x/y/{name}", str(name).encode())

    def look() -> None:
        while not stop.is_set():
            assert all(key.startswith("parts/x/y/") for key in keys(storage))

    with ThreadPoolExecutor(5) as pool:
        looking = pool.submit(look)
        working = [pool.submit(come_and_go, name) for name in range(4)]
        try:
            for future in working:
                future.result(60)
        finally:
            stop.set()
        looking.result(60)
    assert {key: get(storage, key) for key in keys(storage)} == {f"parts/x/y/{n}": str(n).encode() for n in range(4)}


# --- a folder ---


def test_a_folder_gives_a_real_file(folder: Path) -> None:
    storage = open_storage(str(folder))
    put(storage, "inputs/a", b"123")
    assert local_path(storage, "inputs/a") == folder / "inputs" / "a"
    assert storage.url("inputs/a") is None
    with storage.open("inputs/a") as source:
        assert Path(source.name) == folder / "inputs" / "a"
        assert os.fstat(source.fileno()).st_size == 3


def test_no_temporary_file_outlives_its_writer(folder: Path) -> None:
    storage = open_storage(str(folder))
    put(storage, "inputs/a", b"123")
    with storage.create("inputs/b") as writer:
        writer.write(b"1")
        assert len(list((folder / "inputs").iterdir())) == 2
    with pytest.raises(ZeroDivisionError), storage.create("inputs/c"):
        raise ZeroDivisionError
    assert [path.name for path in (folder / "inputs").iterdir()] == ["a"]


def test_what_killed_writers_left_is_removed_when_it_is_old(folder: Path) -> None:
    storage = open_storage(str(folder))
    put(storage, "inputs/a", b"123")
    left = [folder / "inputs" / ".partial-1", folder / "parts" / "x" / ".partial-2"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (1000, 1000))
    os.utime(folder / "inputs" / "a", (1000, 1000))
    with storage.create("inputs/b") as writer:
        writer.write(b"on its way")
        assert remove_partials(storage, 1000) == 0
        assert remove_partials(storage, 2000) == 2
        writer.commit()
    assert keys(storage) == ["inputs/a", "inputs/b"]
    assert not any(path.exists() for path in (*left, folder / "parts"))


def test_a_folder_reports_the_digest_of_what_it_composed(folder: Path) -> None:
    storage = open_storage(str(folder))
    put(storage, "parts/x/1", BLOCK)
    whole = b"head\n" + BLOCK[10:]
    composed = storage.compose("results/x", [b"head\n", Span("parts/x/1", 10, len(BLOCK))])
    assert composed == Stored(len(whole), sha256(whole))


def test_a_folder_reports_its_free_space(folder: Path) -> None:
    free = free_bytes(open_storage(str(folder)))
    assert free is not None
    assert 0 < free <= shutil.disk_usage(folder).total


def test_an_empty_folder_is_removed_with_its_last_object(folder: Path) -> None:
    storage = open_storage(str(folder))
    put(storage, "parts/x/1", b"1")
    storage.delete("parts/x/1")
    assert list(folder.iterdir()) == []


FULL = """
import resource, sys
from batchserve.errors import InsufficientStorage
from batchserve.storage import Span, open_storage

storage = open_storage(sys.argv[1])
with storage.create("parts/small") as writer:
    writer.write(bytes(60_000))
    writer.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def write():
    with storage.create("inputs/big") as writer:
        for _ in range(10):
            writer.write(bytes(30_000))
        writer.commit()

def compose():
    storage.compose("results/big", [Span("parts/small", 0, 60_000)] * 2)

for action in (write, compose):
    try:
        action()
    except InsufficientStorage as error:
        print(error.code)
print([entry.key for entry in storage.list("")])
"""


def test_a_full_disk_is_named_and_leaves_nothing(folder: Path) -> None:
    printed = subprocess.check_output([sys.executable, "-c", FULL, str(folder)], text=True, timeout=60)
    assert printed.splitlines() == ["insufficient-storage", "insufficient-storage", "['parts/small']"]
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["small"]


COMMIT = """
import sys
from batchserve.storage import open_storage

storage = open_storage(sys.argv[1])
with storage.create("inputs/deep/a") as writer:
    writer.write(b"123")
    writer.commit()
print("acknowledged", flush=True)
"""


def test_bytes_and_names_are_on_the_disk_before_a_commit_returns(folder: Path, tmp_path: Path) -> None:
    """The order that survives a power cut: folders created and synced, bytes synced, renamed, the name synced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    calls = "trace=/mkdir,/rename,fsync,write"
    command = ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", COMMIT, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    temporary = r"inputs/deep/\.partial-\w+"
    steps = [
        rf'mkdir\w*\(.*"{folder}/inputs"',
        rf"fsync\(\d+<{folder}>\)",
        rf'mkdir\w*\(.*"{folder}/inputs/deep"',
        rf"fsync\(\d+<{folder}/inputs>\)",
        rf'write\(\d+<{folder}/{temporary}>, "123"',
        rf"fsync\(\d+<{folder}/{temporary}>\)",
        rf'rename\w*\(.*"{folder}/{temporary}".*"{folder}/inputs/deep/a"',
        rf"fsync\(\d+<{folder}/inputs/deep>\)",
        r'write\(1<.*"acknowledged',
    ]
    seen = trace.read_text().splitlines()
    lines = [line for line in seen if (str(folder) in line or "acknowledged" in line) and "EEXIST" not in line]
    assert len(lines) == len(steps), lines
    for step, line in zip(steps, lines, strict=True):
        assert re.search(step, line), f"{step} is not {line}"


WRITE = """
import sys
from batchserve.storage import open_storage

storage = open_storage(sys.argv[1])
with storage.create("inputs/a") as writer:
    for _ in range(40):
        writer.write(bytes(1 << 20))
    writer.commit()
"""


def test_a_big_object_is_flushed_to_disk_in_pieces_before_the_commit(folder: Path, tmp_path: Path) -> None:
    """Every 16 MiB, without gaps; fsync still confirms at the end that everything is on disk."""
    if shutil.which("strace") is None or sys.platform != "linux":
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    calls = "trace=sync_file_range,fsync"
    command = ["strace", "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", WRITE, str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    seen = re.findall(r"(\w+)\(\d+<.*/\.partial-\w+>(?:, (\d+), (\d+), (\w+))?\) *= 0", trace.read_text())
    block, flag = str(16 << 20), "SYNC_FILE_RANGE_WRITE"
    assert seen == [
        ("sync_file_range", "0", block, flag),
        ("sync_file_range", block, block, flag),
        ("fsync", "", "", ""),
    ]


def test_a_failed_fsync_is_never_retried(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure, the system may have discarded the bytes and report success."""
    storage = open_storage(str(folder))
    put(storage, "inputs/a", b"first")
    synced = []

    def broken_disk(fd: int) -> None:
        synced.append(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken_disk)
    with pytest.raises(OSError, match="Input/output"):
        put(storage, "inputs/a", b"second")
    monkeypatch.undo()
    assert len(synced) == 1
    assert get(storage, "inputs/a") == b"first"
    assert keys(storage) == ["inputs/a"]
