"""Every kernel takes arrays as files and programs hold them: of any type, order and size, writable or not."""

import io
from collections.abc import Callable, Iterator
from typing import Any, get_args

import numpy as np
import orjson
import polars as pl
import pytest
from onnx import TensorProto, helper
from selection import quick_of
from service import Api, decoded, encoded, running
from sklearn.ensemble import RandomForestRegressor

from batchserve import Client
from batchserve.conversion import convert
from batchserve.domain import DType, Kernel
from batchserve.errors import SchemaMismatch
from batchserve.inference.kernels import Session
from batchserve.inference.session import open_session

RANDOM = np.random.default_rng(3)
X = RANDOM.integers(0, 2, (70, 5)).astype(np.float32)
"""Values that every type holds."""
TRAINING = RANDOM.integers(0, 2, (300, 5)).astype(np.float32)
FORMATS = ("csv", "jsonl", "json", "parquet", "arrow", "arrows", "npy", "npz", "structured npy")
NUMBERS: tuple[DType, ...] = tuple(dtype for dtype in get_args(DType) if dtype != "string")
OF_TREES: tuple[DType, ...] = ("float32", "float64", "int32", "int64", "bool")
CASES: list[tuple[Kernel, DType]] = [
    *(("trees", dtype) for dtype in OF_TREES),
    *(("onnxruntime", dtype) for dtype in NUMBERS),
]


def forest() -> Any:
    """The node of a forest, large enough for a kernel of its own to pay."""
    estimator = RandomForestRegressor(40, random_state=0).fit(TRAINING, TRAINING @ np.arange(1, 6) + TRAINING[:, 0])
    model = helper.make_model(helper.make_graph([], "none", [], []))
    model.ParseFromString(convert(estimator, TRAINING, tolerance=1.0).onnx)
    return next(node for node in model.graph.node if node.op_type == "TreeEnsembleRegressor")


@pytest.fixture(scope="module")
def models() -> Callable[[Kernel, DType], bytes]:
    """A forest of an input of any type; the kernel for trees leaves it alone where something stands behind it."""
    ensemble = forest()
    ensemble.input[0], ensemble.output[0] = "cast", "sum"

    def make(kernel: Kernel, dtype: DType) -> bytes:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        rename = helper.make_node("Identity" if kernel == "trees" else "Neg", ["sum"], ["y"])
        made = helper.make_graph(
            [helper.make_node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT), ensemble, rename],
            "forest",
            [helper.make_tensor_value_info("x", kind, ["N", 5])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
        content: bytes = helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()
        return content

    return make


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("kernels"), chunk_records=40) as api:
        yield api


def saved(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def body(array: np.ndarray, format: str) -> bytes:
    """A matrix in a file of any format."""
    target = io.BytesIO()
    if format == "npy":
        return saved(array)
    if format == "structured npy":
        fields = np.empty(len(array), [(f"x_{column}", array.dtype) for column in range(array.shape[1])])
        for column, name in enumerate(fields.dtype.names or ()):
            fields[name] = array[:, column]
        return saved(fields)
    if format == "npz":
        np.savez(target, x=array)
        return target.getvalue()
    frame = pl.DataFrame({f"x_{column}": values for column, values in enumerate(array.T)})
    return encoded(frame, format)


def answers(content: bytes, format: str) -> list[float]:
    if "np" not in format:
        return listed(decoded(content, format)["prediction"].cast(pl.Float32).to_numpy())
    loaded = np.load(io.BytesIO(content))
    return listed(loaded["y"] if format == "npz" else loaded)


def numbers(records: list[dict[str, Any]]) -> list[float]:
    """The answers in records of JSON, which has the shortest text of a float32."""
    return listed(np.array([record["prediction"] for record in records], np.float32))


def listed(array: np.ndarray) -> list[float]:
    values: list[float] = np.ravel(array).tolist()
    return values


def like(values: list[float]) -> Any:
    """With as many threads as are fastest, ONNX Runtime adds the trees of a forest in another order."""
    return pytest.approx(values, rel=1e-5, abs=1e-5)


BY_DEFAULT: set[tuple[Kernel, DType]] = {("trees", "float32"), ("trees", "bool"), ("onnxruntime", "int64")}


@pytest.mark.parametrize(("kernel", "dtype"), quick_of(CASES, BY_DEFAULT))
def test_a_kernel_scores_its_input_from_a_file_of_any_format(
    service: Api, models: Callable[[Kernel, DType], bytes], kernel: Kernel, dtype: DType
) -> None:
    model = models(kernel, dtype)
    registered = service.register(f"{kernel}-{dtype}", model)
    assert any("tree kernel" in note for note in registered["notes"]) == (kernel == "trees"), registered["notes"]
    given = X.astype(dtype)
    expected = listed(open_session(model).run({"x": given})["y"])
    for format in FORMATS:
        answer = service.http.post(f"/v1/models/{kernel}-{dtype}/predict", content=body(given[:40], format))
        assert answer.status_code == 200, (format, answer.text)
        assert numbers(answer.json()["prediction"]) == like(expected[:40]), format
    for format in FORMATS if dtype == "float32" else ("npy", "npz"):
        job = service.run(body(given, format), f"{kernel}-{dtype}", passthrough="none")
        assert (job["state"], job["rows"]["ok"]) == ("completed", len(X)), (format, job)
        assert answers(service.result(job).content, format) == like(expected), format


@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_a_kernel_gives_an_empty_result_for_a_file_without_records(
    service: Api, models: Callable[[Kernel, DType], bytes], kernel: Kernel
) -> None:
    service.register(f"{kernel}-float32", models(kernel, "float32"))
    for format in set(FORMATS) - {"json", "jsonl"}:  # which name no columns then
        job = service.run(body(X[:0], format), f"{kernel}-float32", passthrough="none")
        assert (job["state"], job["rows"]["total"]) == ("completed", 0), (format, job)
        assert answers(service.result(job).content, format) == [], format


# --- the order of values in memory -----------------------------------------------------------------------------------


def frozen(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)


def unaligned(array: np.ndarray) -> np.ndarray:
    """Behind one byte of something else."""
    values = np.frombuffer(b"x" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)
    assert array.dtype.itemsize == 1 or not values.flags.aligned
    return values


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": np.ascontiguousarray,
    "read-only": frozen,
    "Fortran": np.asfortranarray,
    "every other column": lambda array: np.repeat(array, 2, axis=1)[:, ::2],
    "backwards": lambda array: np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1],
    "broadcast": lambda array: np.broadcast_to(array[:1], array.shape),
    "unaligned": unaligned,
    "one record": lambda array: frozen(array[:1]),
    "no records": lambda array: frozen(array[:0]),
}


@pytest.fixture(scope="module")
def kernels(models: Callable[[Kernel, DType], bytes]) -> dict[tuple[Kernel, DType], Session]:
    return {
        (kernel, dtype): open_session(models(kernel, dtype), kernel=kernel)
        for kernel in get_args(Kernel)
        for dtype in OF_TREES
    }


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_the_order_of_an_array_in_memory_does_not_matter_to_a_kernel(
    kernels: dict[tuple[Kernel, DType], Session], kernel: Kernel, order: str
) -> None:
    for dtype in OF_TREES:
        given = ORDERS[order](X.astype(dtype))
        plain = np.array(given, order="C")
        result = kernels[kernel, dtype].run({"x": given})["y"]
        assert result.tolist() == kernels[kernel, dtype].run({"x": plain})["y"].tolist()
        assert len(result) == len(given)


# --- the Python client -----------------------------------------------------------------------------------------------

FROM_MEMORY = [*NUMBERS, ">f4", ">f8", ">i4", ">i8", ">u2"]


@pytest.fixture(scope="module")
def client(server: str, models: Callable[[Kernel, DType], bytes]) -> Iterator[Client]:
    with Client(server) as client:
        for kernel in get_args(Kernel):
            client.models.add(models(kernel, "float32"), name=f"order-{kernel}")
        yield client


def given_back(result: Any) -> list[float]:
    """One number for each record, of whatever the client gives."""
    return listed(result["y"] if isinstance(result, dict) else result["prediction"])


@pytest.mark.parametrize("dtype", quick_of(FROM_MEMORY, {"float32", ">f4"}))
@pytest.mark.parametrize("kernel", get_args(Kernel))
def test_the_client_sends_arrays_of_every_type_and_order(
    client: Client, kernels: dict[tuple[Kernel, DType], Session], kernel: Kernel, dtype: str
) -> None:
    session, name = kernels[kernel, "float32"], f"order-{kernel}"
    for order, arrange in ORDERS.items():
        given = arrange(X.astype(np.dtype(dtype)))
        expected = listed(session.run({"x": np.array(given, np.float32, order="C")})["y"])
        if not np.can_cast(given.dtype, np.float32, "same_kind"):
            with pytest.raises(SchemaMismatch, match=f"expected float32, got {given.dtype}"):
                client.predict(given, model=name)
            continue
        for data in (given, {"x": given}):
            assert numbers(client.models.predict(name, data)) == like(expected), order
            if "f4" in given.dtype.str or order in ("read-only", "no records"):
                assert given_back(client.predict(data, model=name)) == like(expected), order


def test_an_array_of_more_axes_in_fortran_order_is_scored_as_any(service: Api) -> None:
    made = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negated",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2, 3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2, 3, 4])],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    service.register("negated", model.SerializeToString())
    cubes = RANDOM.standard_normal((90, 2, 3, 4)).astype(np.float32)
    job = service.run(saved(np.asfortranarray(cubes)), "negated")
    assert job["state"] == "completed", orjson.dumps(job)
    assert np.array_equal(np.load(io.BytesIO(service.result(job).content)), -cubes)
