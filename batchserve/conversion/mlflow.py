"""Model folders of MLflow, read without MLflow: a file MLmodel says what lies beside it, and names the columns."""

import hashlib
import json
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from batchserve.conversion.conversion import Conversion, serialize, tidy, with_facts
from batchserve.conversion.files import Loaded, load
from batchserve.conversion.parity import Parity
from batchserve.conversion.sample import INSTALL, as_frame, listed, sentence
from batchserve.errors import ConversionFailed

if TYPE_CHECKING:
    import pandas


def load_folder(folder: Path) -> Loaded:
    """A model as `mlflow.sklearn.save_model` and the like write it; MLflow itself is not needed."""
    described = folder / "MLmodel"
    if not described.is_file():
        raise ConversionFailed(
            f"{folder} is a folder without an MLmodel file. Name a model file, or a folder of MLflow."
        )
    if find_spec("yaml") is None:
        raise ConversionFailed(f"A folder of MLflow needs PyYAML. {INSTALL}")
    import yaml

    try:
        facts = yaml.safe_load(described.read_text(encoding="utf-8"))
        flavors = dict(facts["flavors"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ConversionFailed(f"{described} is not as MLflow writes it: {sentence(error)}") from error
    known = [name for name in _FLAVORS if name in flavors]
    if not known:
        raise ConversionFailed(f"{folder} has the flavors {listed(sorted(flavors))}, and {listed(_FLAVORS)} are taken.")
    flavor = flavors[known[0]]
    path = _inside(folder, flavor.get("pickled_model") or flavor.get("data") or "model.pkl")
    if path.is_dir():  # MLflow puts some models into a folder of their own
        path = next(iter(sorted(path.iterdir())), path)
    loaded = _load_onnx(path) if known[0] == "onnx" else _with_class(load(path), flavor, path)
    names = [column["name"] for column in _signature(facts) if "name" in column]
    return replace(loaded, columns=names or None, example=_example(folder, facts))


_FLAVORS = ("sklearn", "lightgbm", "xgboost", "catboost", "onnx")


def _load_onnx(path: Path) -> Loaded:
    """A graph that is in ONNX already."""
    data = path.read_bytes()
    return Loaded(onnx.load(str(path)), hashlib.sha256(data).hexdigest())


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        raise ConversionFailed(f"{folder / 'MLmodel'} names the file {name!r}, which is not in the folder.")
    return path


def _with_class(loaded: Loaded, flavor: dict[str, Any], path: Path) -> Loaded:
    """A Booster whose file stands for an estimator of scikit-learn's interface."""
    kind = str(flavor.get("model_class", "")).rpartition(".")[2]
    if type(loaded.model).__name__ == "Booster" and kind.startswith("XGB"):
        estimator = getattr(import_module("xgboost"), kind)()
        estimator.load_model(str(path))
        return Loaded(estimator, loaded.digest, loaded.notes)
    return loaded


def _signature(facts: dict[str, Any]) -> list[dict[str, Any]]:
    text = (facts.get("signature") or {}).get("inputs")
    columns = json.loads(text) if text else []
    return [column for column in columns if isinstance(column, dict)]


def _example(folder: Path, facts: dict[str, Any]) -> "pandas.DataFrame | None":
    """The input example, where MLflow stored one as a table."""
    import pandas

    info = facts.get("saved_input_example_info") or {}
    path = folder / str(info.get("artifact_path", ""))
    if info.get("type") != "dataframe" or not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if not {"columns", "data"} <= set(content):
        return None
    return pandas.DataFrame(content["data"], columns=content["columns"])


def sample_of(loaded: Loaded, sample: Any) -> "tuple[pandas.DataFrame, bool]":
    """The sample as a frame with the columns that the model's folder names, and whether they have names."""
    if sample is None:
        if loaded.example is None:
            raise ConversionFailed("Pass a sample: some records as the model takes them, a thousand or so.")
        return loaded.example, True
    frame, named = as_frame(sample)
    names = loaded.columns
    if names is None:
        return frame, named
    if not named and frame.shape[1] == len(names):
        return frame.set_axis(names, axis=1), True
    if missing := [name for name in names if name not in frame.columns]:
        raise ConversionFailed(f"The sample lacks columns of the signature: {listed(missing)}.")
    return frame[names], True


_DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.DOUBLE: "float64", onnx.TensorProto.INT64: "int64",
    onnx.TensorProto.INT32: "int32", onnx.TensorProto.STRING: "string", onnx.TensorProto.BOOL: "bool",
}  # fmt: skip


def name_columns(loaded: Loaded, output: Path | str | None) -> Conversion:
    """A graph that is in ONNX already, with the columns that its folder names."""
    graph = tidy(loaded.model)
    inputs, names = list(graph.graph.input), loaded.columns or []
    columns = None
    if len(inputs) == len(names) > 1 or (len(inputs) == 1 and len(names) > 0):
        given = inputs * len(names) if len(inputs) == 1 else inputs
        columns = [
            {"name": name, "dtype": _DTYPES.get(tensor.type.tensor_type.elem_type, "float32"), "input": tensor.name}
            for name, tensor in zip(names, given, strict=True)
        ]
    report = Parity(0, 0, (), (), 0.0, passed=True, notes=("The model is in ONNX already: nothing was compared.",))
    conversion = Conversion(serialize(with_facts(graph, {"columns": columns})), report, (), None)
    if output is not None:
        conversion.save(output)
    return conversion
