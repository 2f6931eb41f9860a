"""Export of an estimator to ONNX: its inputs, and the options of the converters."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import onnx

from batchserve.conversion import converters
from batchserve.conversion.conversion import tidy
from batchserve.conversion.converters.words import token_expression
from batchserve.conversion.estimator import boosters, encoded_columns, has, last_step, package, parts
from batchserve.conversion.refusals import hint, way_out
from batchserve.conversion.sample import INSTALL, Array, Rounds, Table, listed, sentence
from batchserve.errors import ConversionFailed

ML_OPSET = 3
"""Version of the ai.onnx.ml operators that the converters target."""


@dataclass(frozen=True)
class GraphInput:
    """An input of the future graph, [n, k] or [n], filled by these columns."""

    name: str
    dtype: Literal["float32", "float64", "int64", "string"]
    columns: tuple[str, ...]
    flat: bool = False

    def initial_type(self) -> tuple[str, Any]:
        from skl2onnx.common.data_types import (
            DoubleTensorType,
            FloatTensorType,
            Int64TensorType,
            StringTensorType,
        )

        types = {
            "float32": FloatTensorType,
            "float64": DoubleTensorType,
            "int64": Int64TensorType,
            "string": StringTensorType,
        }
        return self.name, types[self.dtype]([None] if self.flat else [None, len(self.columns)])

    def feed(self, table: Table) -> Array:
        cells = table.cells(self.columns, self.dtype)
        return cells[:, 0] if self.flat else cells


def convertible(model: Any, table: Table) -> Any:
    """An equivalent copy with parameters that the converters understand."""
    from sklearn.ensemble import VotingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import FeatureUnion, Pipeline
    from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder
    from sklearn.tree import BaseDecisionTree

    model = copy.deepcopy(model)
    for part in list(parts(model)):
        match part:
            case Pipeline():
                _clear(part, table)
            case FeatureUnion():
                part.transformer_list = [
                    (name, FunctionTransformer() if _passes(step) else step)
                    for name, step in part.transformer_list
                    if step != "drop"
                ]
            case VotingClassifier():
                part.flatten_transform = False  # concerns `transform` alone
            case SimpleImputer() if _fills_texts(part):
                part.missing_values = ""  # ONNX has no other missing text
            case OneHotEncoder() if hasattr(part, "categories_"):
                part.categories_ = [_with_empty_for_missing(categories) for categories in part.categories_]
            case OrdinalEncoder() if hasattr(part, "categories_"):
                part.categories_ = [_with_nan_as_empty(categories) for categories in part.categories_]
            case BaseDecisionTree() if hasattr(part, "tree_"):
                _round_down(part.tree_.threshold)
            case _ if package(part) == "xgboost" and getattr(part, "_Booster", None) is not None:
                part.get_booster().feature_names = None  # the converter requires f0, f1 ... or none
    return model


def _clear(pipeline: Any, table: Table) -> None:
    """Its steps without those that do nothing, and so that each can be converted where it stands."""
    from sklearn.compose import ColumnTransformer
    from sklearn.preprocessing import FunctionTransformer

    from batchserve.conversion.converters.within import Chosen

    steps = [item for item in pipeline.steps if not _passes(item[1])]
    pipeline.steps = steps or [("same", FunctionTransformer())]
    between = [("zeros", step)] if (step := _zeros_missing(pipeline, table)) is not None else []
    *first, last = pipeline.steps
    pipeline.steps = [*((name, _within(step)) for name, step in first), *between, last]
    for part in (inner for _, behind in pipeline.steps[1:] for inner in parts(behind)):
        if isinstance(part, ColumnTransformer):
            part.__class__ = Chosen  # its columns have names in a frame alone (`set_output`)


def _passes(step: Any) -> bool:
    """Whether a step leaves everything as it is."""
    return step is None or (isinstance(step, str) and step == "passthrough")


def _zeros_missing(pipeline: Any, table: Table) -> Any:
    """A step before an estimator of XGBoost that gets a sparse matrix, whose zeros it takes for missing values."""
    from scipy.sparse import issparse

    from batchserve.conversion.converters.within import ZerosMissing

    if package(pipeline.steps[-1][1]) != "xgboost" or len(pipeline.steps) < 2:
        return None
    try:
        given = pipeline[:-1].transform(table.native())
    except Exception:  # noqa: BLE001 - a pipeline within another, which gets something else than the records
        return None
    return ZerosMissing(given.shape[1]) if issparse(given) else None


def _within(step: Any) -> Any:
    """A step that transforms, although it could predict."""
    from sklearn.base import ClassifierMixin, ClusterMixin

    from batchserve.conversion.converters.within import TransformOnly

    known = ("LinearDiscriminantAnalysis", "KMeans", "MiniBatchKMeans", "BisectingKMeans", "Birch")
    predicts = isinstance(step, ClassifierMixin | ClusterMixin) and type(step).__name__ in known
    return TransformOnly(step) if predicts else step


def _round_down(thresholds: Array) -> None:
    """The next float32 that is not above: what is at most the one is at most the other, for all values in float32."""
    near = thresholds.astype(np.float32)
    thresholds[:] = np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)


def _fills_texts(imputer: Any) -> bool:
    """Whether it imputes texts for None or NaN, and not for a text such as "?"."""
    statistics = getattr(imputer, "statistics_", np.empty(0))
    return any(isinstance(item, str) for item in statistics) and not isinstance(imputer.missing_values, str)


def _with_empty_for_missing(categories: Array) -> Array:
    if categories.dtype == object and any(isinstance(item, str) for item in categories):
        return np.array([item if isinstance(item, str) else "" for item in categories], dtype=object)
    return categories


class _Missing(float):
    """NaN that the converter writes as the empty text, and not as the text "nan"."""

    def __str__(self) -> str:
        return ""


def _with_nan_as_empty(categories: Array) -> Array:
    """Texts with NaN as the last category: still NaN, so that it gets the encoded_missing_value."""
    last = categories[-1] if len(categories) else None
    if (
        categories.dtype != object
        or not isinstance(last, float)
        or not all(isinstance(c, str) for c in categories[:-1])
    ):
        return categories
    values = np.empty(len(categories), dtype=object)
    values[:] = [*categories[:-1], _Missing("nan")]
    return values


def layouts(model: object, table: Table) -> Iterator[tuple[GraphInput, ...]]:
    """The inputs that the graph may have, the best first."""
    from sklearn.compose import ColumnTransformer

    columns, kinds = table.columns, {column: table.kind(column) for column in table.columns}
    encoded = {c for c in encoded_columns(model, columns) if kinds.get(c) in ("int", "bool")}
    texts = set(table.texts())
    if table.form == "texts":
        yield (GraphInput("text", "string", columns),)
        yield (GraphInput("text", "string", columns, flat=True),)
    elif table.form == "dicts":
        yield tuple(GraphInput(c, "string" if c in texts else "float32", (c,)) for c in columns)
    elif (has(model, ColumnTransformer) and table.form == "frame") or (texts and len(texts) < len(columns)):
        for exact in (encoded, set()) if encoded else (set(),):
            yield tuple(
                GraphInput(c, "string" if c in texts else "int64" if c in exact else "float32", (c,)) for c in columns
            )
    elif texts:
        yield (GraphInput("input", "string", columns),)
    else:
        if encoded == set(columns):
            yield (GraphInput("input", "int64", columns),)
        yield (GraphInput("input", "float32", columns),)


def widened(layout: Sequence[GraphInput], rounds: Rounds = lambda _: False) -> tuple[GraphInput, ...]:
    """The same inputs, with float64 for float32, unless the estimator `rounds` their columns."""
    return tuple(
        replace(item, dtype="float64") if item.dtype == "float32" and not rounds(item.columns) else item
        for item in layout
    )


def to_onnx(model: Any, layout: Sequence[GraphInput], target_opset: int) -> onnx.ModelProto:
    """Raises ConversionFailed, which names the step that has no converter."""
    return _convert(model, [graph_input.initial_type() for graph_input in layout], target_opset)


def _convert(
    model: Any, initial_types: Sequence[tuple[str, Any]], target_opset: int, raw: bool = False
) -> onnx.ModelProto:
    from skl2onnx import convert_sklearn
    from skl2onnx.common.exceptions import MissingConverter, MissingShapeCalculator

    def convert_part(part: Any, types: Sequence[tuple[str, Any]], raw: bool) -> onnx.ModelProto:
        return _convert(part, types, target_opset, raw)

    try:
        with _registry_restored():
            converters.register(parts(model), convert_part, _register_boosters(model))
            graph: onnx.ModelProto = convert_sklearn(
                model,
                name=type(model).__name__,
                initial_types=list(initial_types),
                options=_options(model, raw),
                target_opset={"": target_opset, "ai.onnx.ml": ML_OPSET},
            )
    except ConversionFailed:
        raise
    except (MissingConverter, MissingShapeCalculator) as error:
        found = re.search(r"<class '([\w.]+)'>", str(error))
        step = found[1].rpartition(".")[2] if found else "A step of the model"
        raise ConversionFailed(f"{step} has no ONNX converter. {way_out(step)}") from error
    except Exception as error:  # converters raise any type
        more = hint(str(error))
        if int(version("protobuf").partition(".")[0]) >= 7:
            more = (
                f" protobuf {version('protobuf')} breaks converters; batchserve[sklearn] needs one below 7. {INSTALL}"
            )
        raise ConversionFailed(f"skl2onnx could not convert the model: {sentence(error)}{more}") from error
    return tidy(graph)


def answer_truth(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Let the label, which is the first output, be False or True, where the converters have 0 and 1."""
    label = graph.graph.output[0]
    number = f"{label.name}__number"
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [number if name == label.name else name for name in names]
    graph.graph.node.append(onnx.helper.make_node("Cast", [number], [label.name], to=onnx.TensorProto.BOOL))
    label.type.tensor_type.elem_type = onnx.TensorProto.BOOL
    return graph


def _options(model: object, raw: bool) -> dict[int, dict[str, Any]]:
    """Converter options for each part: tensors instead of ZipMap, plain scores, a locale that every host has.

    Scalers divide as scikit-learn does: multiplying by 1/scale rounds differently, and later trees then split
    otherwise.
    """
    from skl2onnx._supported_operators import sklearn_operator_name_map
    from skl2onnx.common._registration import get_converter
    from sklearn.base import is_classifier
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.pipeline import Pipeline

    options: dict[int, dict[str, Any]] = {}
    for part in parts(model):
        if isinstance(part, Pipeline):
            continue  # skl2onnx would pass its options to the last step, even if that does not accept them
        alias = sklearn_operator_name_map.get(type(part))
        allowed = (get_converter(alias).get_allowed_options() or {}) if alias else {}
        if raw and part is last_step(model) and hasattr(part, "predict_proba") and "raw_scores" not in allowed:
            raise ConversionFailed(
                f"The graph of {type(part).__name__} gives probabilities, and its scores are needed."
            )
        chosen: dict[str, Any] = {"zipmap": False} if is_classifier(part) and "zipmap" in allowed else {}
        if "raw_scores" in allowed and (not hasattr(part, "predict_proba") or (raw and part is last_step(model))):
            chosen["raw_scores"] = True
        if "div" in allowed:
            chosen["div"] = "div"
        if isinstance(part, CountVectorizer):
            chosen |= {"locale": "C.UTF-8", "tokenexp": token_expression(part)}
        if chosen:
            options[id(part)] = chosen
    return options


@contextmanager
def _registry_restored() -> Iterator[None]:
    """What skl2onnx knows afterwards is what it knew before: the program may also use it without batchserve."""
    from skl2onnx._parse import sklearn_parsers_map
    from skl2onnx._supported_operators import sklearn_operator_name_map

    before = [(known, dict(known)) for known in (sklearn_operator_name_map, sklearn_parsers_map)]
    try:
        yield
    finally:
        for known, entries in before:
            known.clear()
            known.update(entries)


def _register_boosters(model: object) -> dict[type, str]:
    """Register onnxmltools' converters of the model's LightGBM and XGBoost estimators with skl2onnx: their names."""
    packages, names = boosters(model), dict[type, str]()
    if not packages:
        return names
    if find_spec("onnxmltools") is None:
        raise ConversionFailed(f"Converting a model of {listed(sorted(packages))} needs onnxmltools. {INSTALL}")
    from skl2onnx import update_registered_converter
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    classifier = {"shape_fct": calculate_linear_classifier_output_shapes}
    classifier_options = {"nocl": [True, False], "zipmap": [True, False, "columns"]}
    regressor = {"shape_fct": calculate_linear_regressor_output_shapes}
    if "lightgbm" in packages:
        from lightgbm import LGBMClassifier, LGBMRegressor
        from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm

        lightgbm = {"convert_fct": convert_lightgbm, "overwrite": True}
        update_registered_converter(
            LGBMClassifier, "LightGbmLGBMClassifier", options=classifier_options, **classifier, **lightgbm
        )
        update_registered_converter(
            LGBMRegressor, "LightGbmLGBMRegressor", options={"split": None}, **regressor, **lightgbm
        )
        names |= {LGBMClassifier: "LightGbmLGBMClassifier", LGBMRegressor: "LightGbmLGBMRegressor"}
    if "xgboost" in packages:
        from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost
        from xgboost import XGBClassifier, XGBRegressor

        xgboost = {"convert_fct": convert_xgboost, "overwrite": True}
        update_registered_converter(
            XGBClassifier, "XGBoostXGBClassifier", options=classifier_options, **classifier, **xgboost
        )
        update_registered_converter(XGBRegressor, "XGBoostXGBRegressor", **regressor, **xgboost)
        names |= {XGBClassifier: "XGBoostXGBClassifier", XGBRegressor: "XGBoostXGBRegressor"}
    return names
