"""Hostile files: each ends in a problem, a failed job or a row error, and no process exceeds its memory limit."""

import io
import json
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx.helper
import onnx.parser
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import FAST, Service
from selection import quick_of

COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
HEADER = ",".join(COLUMNS).encode() + b"\n"
ROW = b"5.1,3.5,1.4,0.2\n"
FLOWER = dict(zip(COLUMNS, (5.1, 3.5, 1.4, 0.2), strict=True))
MEMORY = 700 * 2**20
"""What a scoring process may allocate."""
OVERHEAD = 400 * 2**20
"""Additional memory that it maps: libraries, and files that the system can drop."""
SERVER_GROWTH = 100 * 2**20


@dataclass
class Hosts:
    """A server with small limits, and the largest observed memory of any of its processes, in bytes."""

    url: str
    pid: int
    stopped: threading.Event = field(default_factory=threading.Event)
    largest_child: int = 0

    def watch(self) -> None:
        while not self.stopped.wait(0.01):
            for child in self._children():
                self.largest_child = max(self.largest_child, resident_peak(child))

    def _children(self) -> list[int]:
        found: list[int] = []
        for file in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, file.read_text().split())
        return found

    def predict(self, body: bytes, **query: Any) -> httpx2.Response:
        params = {"model": "iris", "reuse": False, **query}
        headers = {"prefer": "wait=60"}
        return httpx2.post(f"{self.url}/v1/predict", params=params, content=body, headers=headers, timeout=90)


def means(shape: str, image: str | None = None) -> bytes:
    """A model that gives the mean of each record."""
    graph = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] x) => (float[N] mean) '
        "{ mean = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x) }"
    )
    if image is not None:
        onnx.helper.set_model_props(graph, {"batchserve.image": image})
    content: bytes = graph.SerializeToString()
    return content


def resident_peak(pid: int) -> int:
    """The peak resident memory of a process, in bytes; 0 when it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Hosts]:
    limits = {"BATCHSERVE_PROCESS_MEMORY": str(MEMORY), "BATCHSERVE_PROCESSES": "1", "BATCHSERVE_FREE_BYTES": "0",
              "BATCHSERVE_CHUNK_BYTES": "16777216", "BATCHSERVE_LEASE": "30", "BATCHSERVE_HEARTBEAT": "1"}  # fmt: skip
    folder = tmp_path_factory.mktemp("hostile")
    service = Service(folder, "serve", "--port", "0", settings=FAST | limits)
    try:
        url = service.wait_for(r" at (http://\S+) ")[1]
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).is_success
        pictures = '{"resize": "stretch", "size": [4, 4], "order": "gray"}'
        for name, model in (("pictures", means("N,1,4,4", pictures)), ("arrays", means("N,3,128,128"))):
            assert httpx2.put(f"{url}/v1/models/{name}", content=model, timeout=60).is_success
        hosts = Hosts(url, service.process.pid)
        assert hosts.predict(HEADER + ROW).json()["state"] == "completed"
        watching = threading.Thread(target=hosts.watch, daemon=True)
        watching.start()
        yield hosts
        hosts.stopped.set()
        watching.join()
    finally:
        service.end()


@pytest.fixture
def unharmed(hosts: Hosts) -> Iterator[Hosts]:
    """The server. After the test it must be the same process, must not have grown, and must score the next job."""
    before = resident_peak(hosts.pid)
    yield hosts
    assert resident_peak(hosts.pid) - before < SERVER_GROWTH
    assert hosts.largest_child < MEMORY + OVERHEAD
    assert httpx2.get(f"{hosts.url}/livez").is_success
    job = hosts.predict(HEADER + ROW).json()
    assert (job["state"], job["rows"]) == ("completed", {"total": 1, "ok": 1, "failed": 0})


# --- refused files ---------------------------------------------------------------------------------------------------


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, data in members:
            made.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def arrow(table: pa.Table, compression: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def flowers(rows: int, **more: Any) -> pa.Table:
    return pa.table({name: pa.array(np.full(rows, value)) for name, value in FLOWER.items()} | more)


def claiming(shape: str) -> bytes:
    """An npy file whose header declares more bytes than it has."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(80)


def shrunken(data: bytes, claim: int) -> bytes:
    """An archive of one member whose entries claim another size."""
    changed = bytearray(data)
    for mark, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = changed.index(mark) + offset
        changed[at : at + 4] = struct.pack("<I", claim)
    return bytes(changed)


def overlapping(data: bytes, times: int) -> bytes:
    """An archive of members that share the same bytes."""
    one = archive(("0000.png", data))
    start, end = one.index(b"PK\1\2"), one.index(b"PK\5\6")
    entries = b"".join(one[start:end].replace(b"0000", b"%04d" % i) for i in range(times))
    return one[:start] + entries + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, times, times, len(entries), start, 0)


FLOWERS = npy(np.full((3, 4), 1.0, np.float32))
REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "an archive that leads out of its folder": (lambda: archive(("../x.npy", FLOWERS)), 422, "unsafe name"),
    "an archive with an absolute name": (lambda: archive(("/etc/x.npy", FLOWERS)), 422, "unsafe name"),
    "an archive of 20,000 members": (
        lambda: archive(*((f"{i}.npy", b"") for i in range(20_000))), 422, "at most 16384"),
    "an archive that unpacks 1000 to 1": (
        lambda: archive(("input.npy", npy(np.zeros((25_000_000, 4), np.float32)))), 422, "are refused"),
    "an archive whose member is longer than it says": (
        lambda: shrunken(archive(("input.npy", npy(np.zeros((100_000, 4), np.float32)))), 500), 422, ""),
    "an archive whose member is shorter than it says": (
        lambda: shrunken(archive(("input.npy", FLOWERS)), 2**31), 422, ""),
    "an archive of images that leads out of its folder": (
        lambda: archive(("good.png", b""), ("a/../../x.png", b"")), 422, "unsafe name: 'a/../../x.png'"),
    "an archive of an image that unpacks 1000 to 1": (
        lambda: archive(("good.png", b""), ("x.png", bytes(100_000_000))), 422, "the member 'x.png' unpacks"),
    "an archive of 100 images of one million zeros that are all the same bytes": (
        lambda: overlapping(bytes(2**20), 100), 422, "the archive unpacks"),
    "an archive of images of which two have one name": (
        lambda: archive(("a.png", b""), ("b.png", b"")).replace(b"b.png", b"a.png"), 422, "two members named 'a.png'"),
    "an archive of folders": (lambda: archive(("a/", b""), ("a/b/", b"")), 422, "holds no files"),
    "an array that claims terabytes": (lambda: claiming("(1000000000000, 4)"), 422, "cut off"),
    "an array of a negative shape": (lambda: claiming("(-4, 4)"), 422, ""),
    "an array of more elements than any integer": (lambda: claiming("(9223372036854775807, 9999)"), 422, ""),
    "an array of Python objects": (lambda: npy(np.array([{"a": 1}], object)), 422, "object"),
    "an Arrow batch of 49 kB that unpacks to 1.6 GB": (
        lambda: arrow(pa.table({"x": np.zeros(200_000_000)}), "zstd"), 422, "write record batches of at most"),
    "a Parquet file of 20,000 columns": (
        lambda: parquet(pa.table({f"c{i}": [1.0] for i in range(20_000)})), 422, "at most 16384"),
    "an Arrow file of 20,000 columns": (
        lambda: arrow(pa.table({f"c{i}": [1.0] for i in range(20_000)})), 422, "at most 16384"),
    "a CSV header of 100,000 columns": (
        lambda: b",".join(b"c%d" % i for i in range(100_000)) + b"\n", 422, "at most 16384"),
    "a CSV header of 2 MB": (lambda: b"c" * 2_000_000 + b"\n" + ROW, 422, "longer than 1048576 bytes"),
    "a CSV header with NUL": (lambda: b"a,\0b\n1,2\n", 415, ""),
    "a record of 80 MB": (lambda: HEADER + ROW + b'"' + b"x" * 80_000_000, 422, "longer than 64 MiB"),
    "eight million and one quotation marks": (
        lambda: HEADER + ROW + b'"' * 8_000_001 + b"x\n" + ROW, 422, "never closed"),
    "a record of JSON with 100,000 keys": (
        lambda: json.dumps({f"c{i}": 1 for i in range(100_000)}).encode(), 422, "at most 16384"),
    "a million brackets": (lambda: b"[" * 1_000_000, 422, ""),
    "a million braces": (lambda: b'{"a":' * 1_000_000, 422, ""),
}  # fmt: skip


AT_LENGTH = {
    "an archive that unpacks 1000 to 1",
    "an Arrow file of 20,000 columns",
    "a Parquet file of 20,000 columns",
    "an archive of 20,000 members",
    "eight million quotation marks",
    "a record of 1,000,000 fields",
}
"""Each as long as ten others; the slow tests have them."""


@pytest.mark.parametrize("name", quick_of(REFUSED, REFUSED.keys() - AT_LENGTH))
def test_a_hostile_file_is_refused(unharmed: Hosts, name: str) -> None:
    make, status, said = REFUSED[name]
    answer = unharmed.predict(make())
    if answer.status_code == 200:  # its beginning is valid
        job = answer.json()
        assert job["state"] == "failed", job
        detail = job["error"]["message"]
        assert job["error"]["code"] in ("invalid-input", "schema-mismatch"), job["error"]
    else:
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        detail = answer.json()["detail"]
    assert said in detail
    assert len(detail) < 1000


# --- records that fail alone -----------------------------------------------------------------------------------------


def line(**values: Any) -> bytes:
    return json.dumps(FLOWER | values).encode() + b"\n"


FAILING: dict[str, tuple[bytes, str]] = {
    "a record of 1,000,000 fields": (HEADER + ROW + b"," * 1_000_000 + b"\n" + ROW, "wrong-field-count"),
    "a number of a million digits": (HEADER + ROW + b"1" * 1_000_000 + b",1,1,1\n" + ROW, "wrong-type"),
    "bytes that are not UTF-8": (HEADER + ROW + b"\xff\xfe,1,1,1\n" + ROW, "invalid-utf8"),
    "eight million quotation marks": (HEADER + ROW + b'"' * 8_000_002 + b"x\n" + ROW, "malformed-quote"),
    "a number beyond all floats": (line() + line().replace(b"5.1", b"1e999") + line(), "wrong-type"),
    "a number of 5,000 digits": (line() + line().replace(b"5.1", b"9" * 5000) + line(), "wrong-type"),
    "a duplicate key": (line() + b'{"%b": 1, %b' % (COLUMNS[0].encode(), line()[1:]) + line(), "duplicate-key"),
    "a value of 100,000 brackets": (line() + line(x=0).replace(b"0}", b"[" * 100_000 + b"]" * 100_000 + b"}") + line(),
                                    "invalid-json"),
    "half a character": (line() + line(x=0).replace(b"0}", b'"\\ud800"}') + line(), "invalid-json"),
    "JSON that is not UTF-8": (line() + line(x=0).replace(b"0}", b'"\xff"}') + line(), "invalid-json"),
}  # fmt: skip


@pytest.mark.parametrize("name", quick_of(FAILING, FAILING.keys() - AT_LENGTH))
def test_a_hostile_record_fails_alone(unharmed: Hosts, name: str) -> None:
    body, code = FAILING[name]
    answer = unharmed.predict(body)
    assert answer.status_code == 200, answer.text[:500]
    job = answer.json()
    assert job["state"] == "completed", job["error"]
    errors = [json.loads(entry) for entry in httpx2.get(unharmed.url + job["links"]["errors"]).text.splitlines()]
    assert {(error["record"], error["code"]) for error in errors} == {(1, code)}
    assert all(len(error["message"]) < 500 for error in errors)


def png(width: int, height: int, *more: tuple[bytes, bytes]) -> bytes:
    """A gray PNG whose header declares this size, with the pixels of a 4 x 4 image."""
    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", size), *more, (b"IDAT", zlib.compress(bytes(20))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


LONG = zlib.compress(bytes(200_000_000), 9)
HURTING: dict[str, tuple[Callable[[], bytes], str]] = {
    "an image of one pixel by sixty million": (lambda: png(1, 60_000_000), "out-of-memory"),
    "an image of more pixels than the earth has people": (lambda: png(2**31 - 1, 2**31 - 1), "image-too-large"),
    "an image with a text that unpacks 1000 to 1": (lambda: png(4, 4, (b"zTXt", b"k\0\0" + LONG)), "invalid-image"),
    "an image with a profile that unpacks 1000 to 1": (lambda: png(4, 4, (b"iCCP", b"k\0\0" + LONG)), "invalid-image"),
    "an image with 200 texts of 0.9 MB": (
        lambda: png(4, 4, *[(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 900_000))] * 200), "invalid-image"),
}  # fmt: skip


@pytest.mark.parametrize("name", HURTING)
def test_a_hostile_image_fails_alone(unharmed: Hosts, name: str) -> None:
    make, code = HURTING[name]
    body = archive(("a.png", png(4, 4)), ("b.png", make()), ("c.png", png(4, 4)))
    job = unharmed.predict(body, model="pictures").json()
    assert (job["state"], job["rows"]) == ("completed", {"total": 3, "ok": 2, "failed": 1}), job["error"]
    (error,) = httpx2.get(unharmed.url + job["links"]["errors"]).text.splitlines()
    assert (json.loads(error)["record"], json.loads(error)["code"]) == (1, code)


def test_records_without_an_array_take_no_memory_for_one(unharmed: Hosts) -> None:
    body = line(x=np.zeros((3, 128, 128), int).tolist()) + b'{"x": "none"}\n' * 9000
    job = unharmed.predict(body, model="arrays").json()
    assert (job["state"], job["rows"]) == ("completed", {"total": 9001, "ok": 1, "failed": 9000}), job["error"]


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_lists_in_lists_in_lists_fail_their_record(unharmed: Hosts, depth: int) -> None:
    body = line(x=np.zeros((3, 128, 128), int).tolist()) + b'{"x": ' + b"[" * depth + b"]" * depth + b"}\n"
    job = unharmed.predict(body, model="arrays").json()
    assert (job["state"], job["rows"]) == ("completed", {"total": 2, "ok": 1, "failed": 1}), job["error"]
    (error,) = httpx2.get(unharmed.url + job["links"]["errors"]).text.splitlines()
    assert json.loads(error)["code"] == "invalid-json"


def test_nul_far_from_the_beginning_fails_its_record(unharmed: Hosts) -> None:
    job = unharmed.predict(HEADER + ROW * 100_000 + b"\0,1,1,1\n" + ROW).json()
    assert (job["state"], job["rows"]) == ("completed", {"total": 100_002, "ok": 100_001, "failed": 1})
    (error,) = httpx2.get(unharmed.url + job["links"]["errors"]).text.splitlines()
    assert json.loads(error)["record"] == 100_000


def test_a_deep_value_next_to_the_records_is_refused(unharmed: Hosts) -> None:
    body = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b',"data":[' + line().strip() + b"]}"
    answer = httpx2.post(
        f"{unharmed.url}/v1/predict?model=iris", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 422, answer.text[:300]
    assert "malformed JSON at byte 5" in answer.json()["detail"]


# --- expansion -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_parquet_file_of_strings_that_unpacks_beyond_the_limit_fails_its_job(unharmed: Hosts) -> None:
    strings = pa.array(["x" * 2_000_000] * 800)
    body = parquet(flowers(800, note=strings), compression="zstd", use_dictionary=False)
    assert len(body) < 300_000
    answer = unharmed.predict(body, passthrough="all")
    if answer.status_code == 200:
        assert answer.json()["state"] == "failed", answer.json()
        assert answer.json()["error"]["code"] in ("out-of-memory", "scoring-crashed", "invalid-input")
    else:
        assert answer.status_code in (413, 422), answer.text


@pytest.mark.slow
def test_a_parquet_file_of_fifty_million_equal_records_is_read_in_pieces(unharmed: Hosts) -> None:
    body = parquet(flowers(50_000_000), row_group_size=50_000_000, compression="zstd")
    assert len(body) < 5_000_000
    upload = httpx2.post(f"{unharmed.url}/v1/predict", params={"model": "iris"}, content=body, timeout=60)
    assert upload.status_code == 202, upload.text
    url = unharmed.url + upload.json()["links"]["self"]
    deadline = time.monotonic() + 60
    while (job := httpx2.get(url).json())["chunks"]["done"] < 3:
        assert job["state"] in ("queued", "running"), job
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert httpx2.post(f"{url}/cancel").is_success
    while httpx2.get(url).json()["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx2.delete(url).status_code == 204


# --- requests around the file ----------------------------------------------------------------------------------------


def test_a_form_of_many_parts_is_refused(unharmed: Hosts) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n1\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx2.post(f"{unharmed.url}/v1/upload", content=part * 100_000 + b"--b--\r\n", headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_the_files_of_a_large_form_do_not_add_up_in_memory(unharmed: Hosts) -> None:
    part = b'--b\r\ncontent-disposition: form-data; name="x"; filename="%d.png"\r\n\r\n'

    def body() -> Iterator[bytes]:
        for number in range(150):
            yield part % number + bytes(800_000) + b"\r\n"
        yield b"--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = httpx2.post(f"{unharmed.url}/v1/upload", content=body(), headers=headers, timeout=60)
    assert answer.status_code == 201, answer.text
    assert answer.json()["input"]["bytes"] > 120_000_000
    assert httpx2.delete(unharmed.url + answer.json()["links"]["self"]).status_code == 204


@pytest.mark.parametrize("depth", [100, 500, 1000, 100_000])
def test_deep_options_are_refused(unharmed: Hosts, depth: int) -> None:
    upload = httpx2.post(f"{unharmed.url}/v1/upload", content=HEADER + ROW).json()
    options = b'{"model": "iris", "metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}"
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{unharmed.url}/v1/predict/{upload['id']}", content=options, headers=headers)
    assert answer.status_code in (400, 422), answer.text[:300]
    assert answer.headers["content-type"] == "application/problem+json"
    query = {"model": "iris", "columns": "[" * 5000}
    answer = httpx2.post(f"{unharmed.url}/v1/predict/{upload['id']}", params=query)
    assert answer.status_code == 422, answer.text[:300]


def test_a_request_for_many_ranges_is_cheap(unharmed: Hosts) -> None:
    job = unharmed.predict(HEADER + ROW).json()
    ranges = "bytes=" + ",".join(f"{n}-{n}" for n in range(1200))
    began = time.monotonic()
    answer = httpx2.get(unharmed.url + job["links"]["result"], headers={"range": ranges})
    assert answer.status_code in (200, 206, 400, 416)
    assert time.monotonic() - began < 20
