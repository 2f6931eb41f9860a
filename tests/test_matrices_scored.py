"""A chunk that is read into matrices gives the part, the errors list and the notes that it gives by polars."""

import json
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import pytest
from selection import quick_of

from batchserve.admission import admit
from batchserve.domain import ChunkLimits, Dialect, ModelVersion, Options
from batchserve.formats import matrices
from batchserve.inference import matching
from batchserve.scoring.chunks import ChunkTask, score_chunk
from batchserve.scoring.inputs import Input, header_of
from batchserve.scoring.planning import PlanTask, plan_chunks
from batchserve.storage import errors_part_key, input_key, model_key, open_storage, part_key

RECORDS = 3000
MODELS = {
    "matrix": "float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }",
    "columns": (
        "float[N, 1] a, int64[N, 1] n, double[N] d, string[N, 1] city) => (float[N, 1] y, string[N, 1] place) "
        "{ b = Cast <to = 1> (n) c = Add(a, b) e = Cast <to = 1> (d) one = Constant <value_ints = [1]> () "
        "f = Unsqueeze(e, one) y = Add(c, f) place = Identity(city) }"
    ),
}


def plain() -> dict[str, list[str]]:
    random = np.random.default_rng(3)
    return {
        "id": [f"row {number}" for number in range(RECORDS)],
        "a": [repr(value) for value in random.standard_normal(RECORDS).tolist()],
        "n": [str(value) for value in random.integers(-1000, 1000, RECORDS)],
        "d": [f"{value:.9g}" for value in random.standard_normal(RECORDS).tolist()],
        "city": [["Bern", "Zürich", "東京", "= 1"][number % 4] for number in range(RECORDS)],
    }


def with_faults() -> dict[str, list[str]]:
    """Values that are missing, of another type, too large, not a number, and written in odd ways."""
    table = plain()
    for step, (name, text) in enumerate([
        *(("a", ""), ("n", ""), ("d", ""), ("city", ""), ("a", "x"), ("n", "1.5"), ("n", "3.0"), ("d", "1e400")),
        *(("a", "nan"), ("a", "inf"), ("a", " 1"), ("n", "99999999999999999999"), ("a", "1e39"), ("id", "")),
        *(("a", "True"), ("n", "false"), ("d", "TRUE")),
    ]):  # fmt: skip
        for record in range(step * 7, RECORDS, 311):
            table[name][record] = text
    return table


TABLES: dict[str, Callable[[], dict[str, list[str]]]] = {"plain": plain, "with faults": with_faults}
OPTIONS: dict[str, dict[str, Any]] = {
    "csv": {},
    "csv with all": {"passthrough": "all"},
    "csv with none": {"passthrough": "none"},
    "csv with a key": {"key": "id"},
    "csv with a key that the model takes": {"key": "n"},
    "jsonl": {},
    "jsonl with all": {"passthrough": "all"},
    "parquet with all": {"passthrough": "all"},
    "arrow": {},
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="module")
def versions(storage: str) -> dict[str, ModelVersion]:
    found = {}
    for name, body in MODELS.items():
        graph = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g ({body}').SerializeToString()
        digest, admitted = sha256(graph).hexdigest(), admit(graph)
        with open_storage(storage).create(model_key(digest)) as writer:
            writer.write(admitted.model)
            writer.commit()
        found[name] = ModelVersion(1, name, 1, digest, len(graph), admitted.signature, admitted.metadata)
    return found


def encoded(columns: dict[str, list[str]], format: str) -> bytes:
    rows = zip(*columns.values(), strict=True)
    if format == "csv":
        return "".join(",".join(row) + "\n" for row in [tuple(columns), *rows]).encode()
    names = [json.dumps(name) for name in columns]
    return "".join(
        "{" + ",".join(f"{name}:{in_json(text)}" for name, text in zip(names, row, strict=True)) + "}\n" for row in rows
    ).encode()


def in_json(text: str) -> str:
    if not text:
        return "null"
    return (
        text if re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", text) else json.dumps(text, ensure_ascii=False)
    )


def stored(storage: str, data: bytes, format: str = "csv") -> Input:
    key = input_key(sha256(data).hexdigest())
    with open_storage(storage).create(key) as writer:
        writer.write(data)
        writer.commit()
    header_of.cache_clear()
    return Input(storage, key, format, Dialect())


def scored(task: Input, version: ModelVersion, options: Options) -> tuple[bytes, bytes, dict[str, Any]]:
    """The part of the only chunk, its errors, and what is noted of it."""
    chunk = plan_chunks(PlanTask(task, None, ChunkLimits(), 10)).chunks[0]
    assert chunk.records == RECORDS
    done = score_chunk(ChunkTask(task, "job", 1, chunk, version, options))
    with open_storage(task.storage).open(part_key("job", 0, 1)) as part:
        result = part.read()
    errors = b""
    if done.errors_bytes:
        with open_storage(task.storage).open(errors_part_key("job", 0, 1)) as part:
            errors = part.read()
    return result, errors, {"failed": done.rows_failed, "notes": done.facts["notes"]}


@pytest.mark.parametrize("format", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "options", quick_of(OPTIONS, {"csv", "csv with all", "csv with a key", "jsonl with all", "arrow"})
)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("table", TABLES)
def test_a_chunk_has_the_same_part_and_errors_as_by_polars(
    table: str,
    model: str,
    options: str,
    format: str,
    storage: str,
    versions: dict[str, ModelVersion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns = TABLES[table]()
    if model == "matrix":
        columns = {name: columns[name] for name in ("id", "a", "n", "d")}
    task = stored(storage, encoded(columns, format), format)
    columns_taken = ("a", "n", "d") if model == "matrix" else None
    given = Options(options.partition(" ")[0], columns=columns_taken, **OPTIONS[options])
    version = versions[model]
    slow = scored(task, version, given)
    used: list[bool] = []
    honest = matrices.read_layout

    def read_layout(*arguments: Any) -> Any:
        fields = honest(*arguments)
        used.append(fields is not None)
        return fields

    for name in ("csv", "json"):
        monkeypatch.setattr(f"batchserve.formats.{name}_matrices.read_layout", read_layout)
    monkeypatch.setattr(matching, "FEWEST_BYTES", 0)
    assert scored(task, version, given) == slow
    typed = "all" in options and not options.startswith(format)  # what passes through has the types of the model
    mixed = (format, table, options) == ("jsonl", "with faults", "jsonl with all")  # so they pass through as JSON text
    key_is_taken = options == "csv with a key that the model takes"
    if typed or mixed or (model == "matrix" and key_is_taken):
        assert used == []
    else:  # faults in a key with a type are left to polars
        assert used == [(format, table, key_is_taken) != ("jsonl", "with faults", True)]
    assert slow[2]["failed"] == 0 or table == "with faults"


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_every_error_names_the_column_of_the_input(
    format: str, storage: str, versions: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one of the model, also where an option or blanks around it tell them apart."""
    renamed = {"a": "w", "n": " n", "city": "Ort"}
    columns = {renamed.get(name, name): texts for name, texts in with_faults().items()}
    task = stored(storage, encoded(columns, format), format)
    given = Options("csv", columns={"a": "w", "city": "Ort"})
    slow = scored(task, versions["columns"], given)
    monkeypatch.setattr(matching, "FEWEST_BYTES", 0)
    assert scored(task, versions["columns"], given) == slow
    errors = [json.loads(line) for line in slow[1].splitlines()]
    assert {error["column"] for error in errors} == {"w", " n", "d", "Ort"}
    assert {error["code"] for error in errors} == {"wrong-type", "missing-value"}
    assert all(repr(error["column"]) in error["message"] for error in errors if error["code"] == "missing-value")


def test_small_chunks_do_not_load_the_compiled_reading(
    storage: str, versions: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take longer than reading them."""
    monkeypatch.setattr("batchserve.formats.csv_matrices.read_layout", None)  # a call would fail
    data = "a,b,c\n" + "1.5,2.5,3.5\n" * RECORDS
    assert len(data) < matrices.FEWEST_BYTES
    result, _, _ = scored(stored(storage, data.encode()), versions["matrix"], Options("csv"))
    assert result.splitlines()[1] == b"3.0,5.0,7.0"


def test_a_negative_zero_that_passes_through_json_is_0_as_by_polars(
    storage: str, versions: dict[str, ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"id": [str(n) for n in range(RECORDS)]} | {name: ["1.5"] * RECORDS for name in ("a", "n", "d")}
    columns["a"][7] = columns["d"][RECORDS - 1] = "-0"
    task = stored(storage, encoded(columns, "jsonl"), "jsonl")
    given = Options("jsonl", columns=("a", "n", "d"), passthrough="all")
    slow = scored(task, versions["matrix"], given)
    monkeypatch.setattr(matching, "FEWEST_BYTES", 0)
    assert scored(task, versions["matrix"], given) == slow
    assert b'"a":0.0' in slow[0]
