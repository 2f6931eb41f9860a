"""Converters of our own, for estimators that skl2onnx has none for, or one that answers otherwise.

Each is a function `(tape, estimator)` that computes the answers of the estimator as NumPy would.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from batchserve.conversion.converters.tape import EXAMPLES, Tape, Untraceable, Value

Kind = Literal["classifier", "labels", "clusterer", "regressor", "transformer"]
Write = Callable[[Tape, Any], Any]

ALIAS = "Batchserve"


@dataclass(frozen=True)
class Converter:
    """How one class of estimators becomes nodes."""

    kind: Kind
    """classifier: label and scores; labels: label alone; clusterer: label (a number) and scores."""
    write: Write
    applies: Callable[[Any], bool] = lambda _: True
    """Whether it is for this estimator of the class; the others are left to skl2onnx."""


def register(
    estimators: Iterable[Any], convert_part: Callable[..., Any], of_packages: Mapping[type, str] = MappingProxyType({})
) -> None:
    """Teach skl2onnx those of the estimators that a converter here is for; what a user registered stays.

    `of_packages`: what skl2onnx calls the converters of other packages that were registered for this model.
    """
    from skl2onnx import update_registered_converter
    from skl2onnx._supported_operators import build_sklearn_operator_name_map, sklearn_operator_name_map

    own = {**build_sklearn_operator_name_map(), **of_packages}
    for kind in {type(estimator) for estimator in estimators}:
        converter, known = find(kind), sklearn_operator_name_map.get(kind)
        if converter is None or known not in (None, own.get(kind), ALIAS + kind.__name__):
            continue
        update_registered_converter(
            kind,
            ALIAS + kind.__name__,
            _nothing,
            _convert_function(converter, own.get(kind), convert_part),
            overwrite=True,
            parser=_parser(ALIAS + kind.__name__, converter, own.get(kind)),
            options=_options(converter.kind, own.get(kind)),
        )


def _options(kind: Kind, other: str | None) -> dict[str, Any] | None:
    """Those of skl2onnx's own converter, which may still be the one for some estimators of the class."""
    from skl2onnx.common._registration import get_converter

    options = dict(get_converter(other).get_allowed_options() or {}) if other is not None else {}
    if kind in ("classifier", "labels"):
        options |= {"zipmap": [True, False, "columns"], "nocl": [True, False]}
    return options or None


def find(kind: type) -> Converter | None:
    from batchserve.conversion.converters import registry

    if kind.__module__.partition(".")[0] not in ("sklearn", "batchserve", "lightgbm", "xgboost"):
        return None
    return registry.CONVERTERS.get(kind.__name__)


def _nothing(operator: Any) -> None:
    """The parser knows the shapes."""


def _parser(alias: str, converter: Converter, other: str | None) -> Callable[..., Any]:
    """`other`: what skl2onnx calls its own converter for the class."""
    kind = converter.kind

    def parse(scope: Any, model: Any, inputs: Any, custom_parsers: Any = None) -> Any:
        from skl2onnx._parse import _parse_sklearn_simple_model
        from skl2onnx.common.data_types import (
            DoubleTensorType,
            FloatTensorType,
            Int64TensorType,
            StringTensorType,
        )

        if not converter.applies(model):
            return _parse_sklearn_simple_model(scope, model, inputs, custom_parsers, alias=other)

        operator = scope.declare_local_operator(alias, model)
        operator.inputs = inputs
        types: list[tuple[str, Any]] = []
        if kind in ("classifier", "labels", "clusterer"):
            classes = getattr(model, "classes_", None)
            texts = kind != "clusterer" and classes is not None and are_texts(classes)
            shape: list[Any] = [None]
            if isinstance(classes, list):
                shape = [None, len(classes)]
            types.append(("label", (StringTensorType if texts else Int64TensorType)(shape)))
        if kind != "labels":
            name = {"classifier": "probabilities", "clusterer": "scores"}.get(kind, "variable")
            numbers = DoubleTensorType if getattr(model, "stays", False) else FloatTensorType
            types.append((name, numbers([None, _width(model, kind)])))
        for name, declared in types:
            operator.outputs.append(scope.declare_local_variable(name, declared))
        return operator.outputs

    return parse


def are_texts(classes: Any) -> bool:
    if isinstance(classes, list):
        return are_texts(np.concatenate(classes))
    return np.asarray(classes).dtype.kind in "OUS"


def _width(model: Any, kind: Kind) -> int | None:
    """How many numbers it gives for each record."""
    if kind == "classifier":
        return len(model.classes_) if hasattr(model, "predict_proba") or len(model.classes_) > 2 else 1
    if kind == "transformer":
        try:
            return int(np.asarray(dense(model.transform(np.ones((EXAMPLES, model.n_features_in_))))).shape[1])
        except Exception:  # noqa: BLE001 - an example that it refuses says nothing about its width
            return _named_width(model)
    return None


def _named_width(model: Any) -> int | None:
    try:
        return len(model.get_feature_names_out())
    except Exception:  # noqa: BLE001 - it may have no names
        return None


def dense(array: Any) -> Any:
    return array.toarray() if hasattr(array, "toarray") else array


def _convert_function(converter: Converter, other: str | None, convert_part: Callable[..., Any]) -> Callable[..., None]:
    def convert(scope: Any, operator: Any, container: Any) -> None:
        from skl2onnx.common._registration import get_converter

        if not converter.applies(operator.raw_operator):  # a part that another converter of skl2onnx declared
            get_converter(other)(scope, operator, container)
            return
        tape = Tape(scope, container, operator.inputs, convert_part)
        results = converter.write(tape, operator.raw_operator)
        results = results if isinstance(results, tuple) else (results,)
        for result, variable in zip(results, operator.outputs, strict=True):
            named(tape, result, variable.full_name)

    return convert


def named(tape: Tape, value: Value, name: str) -> None:
    """Gives a value the name that the rest of the graph knows it by."""
    tape.container.add_node(
        "Identity", [value.name], [name], op_version=1, name=tape.scope.get_unique_operator_name("Identity")
    )


__all__ = ["Converter", "Tape", "Untraceable", "Value", "find", "register"]
