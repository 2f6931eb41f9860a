"""Damaged files raise a named error in checking, planning and scoring, and never an unexpected one."""

import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchserve.admission import admit
from batchserve.domain import ChunkLimits, Dialect, ModelVersion, Options, RowError
from batchserve.errors import BatchserveError, InvalidInput
from batchserve.formats import get_format
from batchserve.formats.wire import thrift
from batchserve.scoring.checks import check_input
from batchserve.scoring.chunks import ChunkTask, score_chunk
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask, plan_chunks
from batchserve.scoring.results import error_lines
from batchserve.storage import input_key, model_key, open_storage

RECORDS = 300


# --- files -----------------------------------------------------------------------------------------------------------


def table(*, nested: bool) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "a": pa.array(np.arange(RECORDS, dtype="f8")),
        "b": pa.array([None if n % 5 == 0 else n for n in range(RECORDS)], pa.int32()),
        "text": pa.array([f"t{n % 7}" for n in range(RECORDS)]),
        "flag": pa.array([n % 3 == 0 for n in range(RECORDS)]),
    }
    if nested:
        columns |= {
            "list": pa.array([[1.0, 2.0]] * RECORDS),
            "category": pa.array([f"k{n % 4}" for n in range(RECORDS)]).dictionary_encode(),
            "time": pa.array(range(RECORDS), pa.timestamp("us")),
            "file": pa.array([{"bytes": b"x", "path": "p"}] * RECORDS),
            "decimal": pa.array([1] * RECORDS, pa.decimal128(9, 2)),
        }
    return pa.table(columns)


def parquet(compression: str, *, nested: bool = True) -> bytes:
    file = io.BytesIO()
    pq.write_table(table(nested=nested), file, row_group_size=100, compression=compression)
    return file.getvalue()


def polars_parquet() -> bytes:
    file = io.BytesIO()
    frame().write_parquet(file)
    return file.getvalue()


def frame() -> pl.DataFrame:
    made = pl.from_arrow(table(nested=False))
    assert isinstance(made, pl.DataFrame)
    return made


def arrow(open_writer: Callable[..., Any], compression: str | None, *, nested: bool) -> bytes:
    file, whole = io.BytesIO(), table(nested=nested)
    with open_writer(file, whole.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(whole, max_chunksize=100)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(save: Callable[..., Any]) -> bytes:
    file = io.BytesIO()
    save(file, x=np.arange(2.0 * RECORDS, dtype="f4").reshape(RECORDS, 2))
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        for number in range(6):
            writer.writestr(f"d/{number}.png", b"\x89PNG" + bytes(200))
    return file.getvalue()


FIELDS = [("a", "f8"), ("b", "i4"), ("text", "U4")]
FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "parquet": ("parquet", lambda: parquet("none")),
    "parquet with zstd": ("parquet", lambda: parquet("zstd")),
    "parquet of polars": ("parquet", polars_parquet),
    "arrow": ("arrow", lambda: arrow(pa.ipc.new_file, None, nested=True)),
    "arrow with lz4": ("arrow", lambda: arrow(pa.ipc.new_file, "lz4", nested=True)),
    "flat arrow": ("arrow", lambda: arrow(pa.ipc.new_file, None, nested=False)),
    "arrows": ("arrows", lambda: arrow(pa.ipc.new_stream, None, nested=True)),
    "flat arrows": ("arrows", lambda: arrow(pa.ipc.new_stream, None, nested=False)),
    "npy": ("npy", lambda: npy(np.arange(2.0 * RECORDS, dtype="f4").reshape(RECORDS, 2))),
    "npy with fields": ("npy", lambda: npy(np.array([(1.5, 3, "x")] * RECORDS, FIELDS))),
    "npz": ("npz", lambda: npz(np.savez)),
    "compressed npz": ("npz", lambda: npz(np.savez_compressed)),
    "zip": ("zip", archive),
    "csv": ("csv", lambda: frame().write_csv(quote_style="non_numeric").encode()),
    "jsonl": ("jsonl", lambda: frame().write_ndjson().encode()),
    "json": ("json", lambda: frame().write_json().encode()),
}


def head(format: str, data: bytes) -> tuple[int, int]:
    """The range of the bytes that describe the others: the header or the footer."""
    match format:
        case "parquet":
            return len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)
        case "arrow":
            return len(data) - 10 - int.from_bytes(data[-10:-6], "little"), len(data)
        case "npz" | "zip":
            return max(0, len(data) - 500), len(data)
        case "npy":
            return 0, 128
        case _:
            return 0, 1500


def damaged(data: bytes, chance: random.Random, where: tuple[int, int]) -> bytes:
    """The bytes with some cut off, changed, taken out or put in; mostly among those that describe the others."""
    wrong = bytearray(data)
    if chance.random() > 0.7:
        where = (0, len(data))
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(where[0], min(where[1], len(wrong)))
        match chance.randrange(6):
            case 0:
                del wrong[max(at, 1) :]
                break
            case 1:
                wrong[at] = chance.randrange(256)
            case 2:
                wrong[at] ^= 1 << chance.randrange(8)
            case 3:
                value = chance.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\x80" * 8, b"\xff" * 8, b"\x01"))
                wrong[at : at + len(value)] = value
            case 4:
                del wrong[at : at + chance.randrange(1, 16)]
            case _:
                wrong[at:at] = chance.randbytes(chance.randrange(1, 16))
        if len(wrong) <= where[0] + 1:
            break
    return bytes(wrong)


# --- a service without processes -------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Checks, plans and scores inputs in this process, with the tasks of the worker."""

    address: str
    models: dict[str, ModelVersion]
    inputs: int = 0

    def register(self, name: str, graph: bytes) -> None:
        digest = sha256(graph).hexdigest()
        admitted = admit(graph)
        with open_storage(self.address).create(model_key(digest)) as writer:
            writer.write(admitted.model)
            writer.commit()
        self.models[name] = ModelVersion(1, name, 1, digest, len(graph), admitted.signature)

    def score(self, data: bytes, format: str, model: str, limits: ChunkLimits, result: str = "jsonl") -> int:
        """The number of scored records. Raises any exception of the three steps."""
        self.inputs += 1
        job = str(self.inputs)
        store, key = open_storage(self.address), input_key(job)
        with store.create(key) as writer:
            writer.write(data)
            writer.commit()
        task = Input(self.address, key, format, Dialect())
        version, options = self.models[model], Options(result)
        try:
            check_input(task, version, options)
            planned = plan_chunks(PlanTask(task, None, limits, 10_000))
            done = [score_chunk(ChunkTask(task, job, 1, chunk, version, options)) for chunk in planned.chunks]
        finally:
            for stored in list(store.list("")):
                if not stored.key.startswith("models/"):
                    store.delete(stored.key)
        return sum(scored.chunk.records for scored in done)


MODELS = {
    "table": "float[N] a, float[N] b) => (float[N] y) { y = Add(a, b) }",
    "matrix": "float[N, 2] x) => (float[N, 2] y) { y = Add(x, x) }",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(str(tmp_path_factory.mktemp("bench")), {})
    for name, graph in MODELS.items():
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({graph}')
        made.register(name, model.SerializeToString())
    return made


def model_for(name: str) -> str:
    return "matrix" if name in ("npy", "npz", "compressed npz") else "table"


def unforeseen(bench: Bench, name: str, seed: str, count: int) -> list[str]:
    """The outcomes of mutants of a file that are neither a named error nor a complete score."""
    format, make = FILES[name]
    data = make()
    found = []
    for number in range(count):
        chance = random.Random(f"{seed} {name} {number}")
        wrong = damaged(data, chance, head(format, data))
        limits = chance.choice((ChunkLimits(), ChunkLimits(records=37), ChunkLimits(bytes=500)))
        try:
            bench.score(wrong, format, model_for(name), limits)
        except (BatchserveError, MemoryError):
            continue
        except BaseException as error:  # noqa: BLE001 - a panic of Rust is not an Exception
            found.append(f"{number}: {type(error).__name__}: {error}"[:200])
    return found


@pytest.mark.parametrize("name", FILES)
def test_an_undamaged_file_is_scored(bench: Bench, name: str) -> None:
    format, make = FILES[name]
    if format == "zip":
        with pytest.raises(BatchserveError):  # the models take no images
            bench.score(make(), format, model_for(name), ChunkLimits())
        return
    for limits in (ChunkLimits(), ChunkLimits(records=37), ChunkLimits(bytes=500)):
        assert bench.score(make(), format, model_for(name), limits) == RECORDS


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_raises_a_named_error(bench: Bench, name: str) -> None:
    assert unforeseen(bench, name, "first", 10) == []


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", FILES)
def test_thousands_of_damaged_files_raise_named_errors(bench: Bench, name: str) -> None:
    assert unforeseen(bench, name, "first", 40) == []
    assert unforeseen(bench, name, "second", 400) == []


# --- valid files with rare values ------------------------------------------------------------------------------------

EXTREMES = {
    "milliseconds": pl.Datetime("ms"),
    "microseconds": pl.Datetime("us"),
    "microseconds in a zone": pl.Datetime("us", "Europe/Zurich"),
    "durations": pl.Duration("ms"),
    "dates": pl.Date(),
}


@pytest.mark.parametrize("result", ["csv", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("name", EXTREMES)
def test_times_beyond_the_calendar_pass_through_or_fail_the_job_with_a_named_error(
    bench: Bench, name: str, result: str
) -> None:
    kind = EXTREMES[name]
    numbers = pl.Series(
        [2**31 - 1] if kind == pl.Date() else [2**62], dtype=pl.Int32 if kind == pl.Date() else pl.Int64
    )
    odd = pl.DataFrame({"a": [1.0], "b": [2.0], "odd": numbers.cast(kind)})
    file = io.BytesIO()
    odd.write_parquet(file)
    unwritable = result in ("csv", "jsonl") and name in ("milliseconds", "dates")
    if not unwritable:
        assert bench.score(file.getvalue(), "parquet", "table", ChunkLimits(), result) == 1
        return
    with pytest.raises(InvalidInput, match="a value of the input can be neither read nor written: "):
        bench.score(file.getvalue(), "parquet", "table", ChunkLimits(), result)


def test_a_key_with_a_time_that_python_cannot_represent_is_null_in_the_errors_list() -> None:
    moments = pl.Series("key", [2**62, 0], dtype=pl.Int64).cast(pl.Datetime("us"))
    errors = [RowError(record, "wrong-type", "m", "a") for record in (0, 1)]
    lines = error_lines(errors, moments, 0).splitlines()
    assert [json.loads(line)["key"] for line in lines] == [None, "1970-01-01T00:00:00"]


# --- files that mutation found, and similar ones ---------------------------------------------------------------------


def with_footer(footer: bytes) -> bytes:
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def footer_with(field: int, value: tuple[int, Any]) -> bytes:
    data = parquet("none")
    length = int.from_bytes(data[-8:-4], "little")
    struct = thrift.load(data[-8 - length : -8])
    return data[: -8 - length] + with_footer(thrift.dump({**struct, field: value}))[4:]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(with_footer(b"\x19" * 100_000), id="lists in lists"),
        pytest.param(with_footer(b"\x1c" * 100_000), id="structs in structs"),
        pytest.param(with_footer(b"\x1b\x01\xbb" * 50_000), id="maps in maps"),
        pytest.param(with_footer(b"\x19\xf5" + b"\xff" * 8 + b"\x01"), id="a list of 2^56"),
        pytest.param(with_footer(b""), id="nothing"),
        pytest.param(footer_with(3, (thrift.LIST, (thrift.I64, [1]))), id="a list as the number of rows"),
        pytest.param(footer_with(3, (thrift.I64, -RECORDS)), id="negative rows"),
        pytest.param(footer_with(3, (thrift.I64, 2**62)), id="too many rows"),
        pytest.param(footer_with(4, (thrift.I64, 3)), id="a number as the row groups"),
        pytest.param(footer_with(4, (thrift.LIST, (thrift.I64, [1, 2]))), id="numbers as row groups"),
        pytest.param(footer_with(2, (thrift.LIST, (thrift.STRUCT, []))), id="no schema"),
        pytest.param(footer_with(2, (thrift.I64, 3)), id="a number as the schema"),
    ],
)
def test_an_invalid_footer_is_refused(bench: Bench, data: bytes) -> None:
    with pytest.raises(InvalidInput):
        bench.score(data, "parquet", "table", ChunkLimits())


@pytest.mark.parametrize("code", [0x110000, 0xFFFFFFFF, 0xD800, 0xDFFF])
@pytest.mark.parametrize("fields", [False, True])
def test_a_string_with_an_invalid_code_point_is_refused(code: int, fields: bool) -> None:
    array = np.array([("ab", 1.0)] * 3, [("text", "U2"), ("a", "f4")]) if fields else np.array(["ab"] * 3)
    data = npy(array).replace("b".encode("utf-32-le"), code.to_bytes(4, "little"), 1)
    with pytest.raises(InvalidInput, match=f"holds {code:#x}, which is not a character"):
        get_format("npy").header(io.BytesIO(data))
