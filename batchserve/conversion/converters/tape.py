"""Numbers that are written down as they are computed: what NumPy is asked to do to a Value becomes nodes of a graph.

A Value carries an example beside its name in the graph, so that shapes and types are known while a function runs. The
first axis of a Value is that of the records, and nothing may mix them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from batchserve.conversion.sample import Array

EXAMPLES = 7
"""Records in an example: a number that no size of a model is likely to have."""

Expression: TypeAlias = Any
"""A Value, or what NumPy's functions make of it: their type hints know arrays alone."""

# By the kind of a NumPy array; "d", which is none, only where it is asked for.
_TYPES = {
    "f": TensorProto.FLOAT,
    "i": TensorProto.INT64,
    "u": TensorProto.INT64,
    "b": TensorProto.BOOL,
    "d": TensorProto.DOUBLE,
}
_ARRAYS = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_, "d": np.float64}


class Untraceable(Exception):
    """A function does what a graph cannot: the reason, to be completed to a sentence."""


class Tape:
    """Writes nodes into the graph that skl2onnx is making."""

    def __init__(
        self, scope: Any, container: Any, variables: Sequence[Any] = (), convert_part: Callable[..., Any] | None = None
    ) -> None:
        self.scope, self.container = scope, container
        self.variables = list(variables)
        """The inputs of the estimator that is being converted, as skl2onnx knows them."""
        self._convert_part = convert_part

    def value(self, variable: Any, example: Array | None = None) -> "Value":
        """A variable of skl2onnx: numbers become float32, texts stay; `example` has EXAMPLES records."""
        kind = type(variable.type).__name__
        width = [*variable.type.shape, None, None][1]
        if kind.startswith("String"):
            return Value(self, variable.full_name, np.full((EXAMPLES, width or 1), "", dtype=object))
        shape = (EXAMPLES, width if isinstance(width, int) else 1)
        example = np.ones(shape, np.float32) if example is None else np.asarray(example, dtype=np.float32)
        given = Value(self, variable.full_name, example)
        return given if kind == "FloatTensorType" else given.to("f", force=True)

    def wide(self, variable: Any) -> "Value":
        """A variable of numbers as float64 [N, k]."""
        width = [*variable.type.shape, None, None][1]
        given = Value(self, variable.full_name, np.ones((EXAMPLES, width if isinstance(width, int) else 1)))
        if type(variable.type).__name__ == "DoubleTensorType":
            return given
        return self.node("Cast", given, example=given.example, to=TensorProto.DOUBLE)

    def wide_merged(self) -> "Value":
        """All inputs, of numbers, as one matrix of float64."""
        values = [self.wide(variable) for variable in self.variables]
        if len(values) == 1:
            return values[0]
        return self.node("Concat", *values, example=np.ones((EXAMPLES, sum(v.shape[1] for v in values))), axis=1)

    @property
    def is_wide(self) -> bool:
        """Whether all inputs are float64."""
        return all(type(variable.type).__name__ == "DoubleTensorType" for variable in self.variables)

    def merged(self) -> Expression:
        """All inputs as one matrix of float32; or the only one, if it holds texts."""
        values = [self.value(variable) for variable in self.variables]
        return values[0] if len(values) == 1 else self.concat([item.to("f") for item in values])

    def part(self, model: Any, x: "Value | None" = None, raw: bool = False) -> list[Expression]:
        """What a fitted part answers to x, or to the inputs of the whole: the outputs of its own graph.

        A classifier gives its label [N] and its scores [N, k], a regressor or transformer its numbers [N, k].
        `raw`: scores as `decision_function` gives them, where there are probabilities, too.
        """
        from skl2onnx.common.data_types import FloatTensorType, StringTensorType

        assert self._convert_part is not None
        if x is None:
            types = [(variable.raw_name, variable.type) for variable in self.variables]
            ours = {variable.raw_name: variable.full_name for variable in self.variables}
        else:
            x, kind = (x, StringTensorType) if x.kind == "O" else (x.to("f"), FloatTensorType)
            types, ours = [("X", kind([None, x.shape[1]]))], {"X": x.name}
        graph = self._convert_part(model, types, raw)
        given = [tensor.name for tensor in graph.graph.input]
        names = self.inline(graph, dict(zip(given, ours.values(), strict=True)))
        results = []
        for output in graph.graph.output:
            kind = output.type.tensor_type.elem_type
            sizes = [axis.dim_value for axis in output.type.tensor_type.shape.dim]
            shape = (EXAMPLES, *(size or 1 for size in sizes[1:]))
            dtype = {TensorProto.STRING: object, TensorProto.INT64: np.int64}.get(kind, np.float32)
            results.append(Value(self, names[output.name], np.zeros(shape, dtype)))
        return results

    def node(
        self, kind: str, *inputs: "Value", example: Any, domain: str = "", version: int | None = None, **attributes: Any
    ) -> "Value":
        """The one output of a node."""
        (result,) = self.nodes(kind, *inputs, examples=(example,), domain=domain, version=version, **attributes)
        return result

    def nodes(
        self,
        kind: str,
        *inputs: "Value",
        examples: Sequence[Any],
        domain: str = "",
        version: int | None = None,
        **more: Any,
    ) -> list["Value"]:
        names = [self.scope.get_unique_variable_name(kind.lower()) for _ in examples]
        if version is None:
            version = self.container.target_opset_any_domain(domain)
        self.container.add_node(
            kind,
            [item.name for item in inputs],
            names,
            op_domain=domain,
            op_version=version,
            name=self.scope.get_unique_operator_name(kind),
            **more,
        )
        return [Value(self, name, np.asarray(example)) for name, example in zip(names, examples, strict=True)]

    def rows(self, value: "Value", width: int) -> "Value":
        """[N, width], whatever shape was declared."""
        example = np.zeros((EXAMPLES, width), value.dtype)
        return self.node("Reshape", value, self.constant([0 if value.ndim == 2 else -1, width], "i"), example=example)

    def last_column(self, value: "Value") -> "Value":
        """[N, 1]: of a matrix whose declared width may be wrong, or of a vector."""
        if value.ndim == 1:
            return value[:, None]
        return self.node("Gather", value, self.constant([-1], "i"), example=value.example[:, -1:], axis=1)

    def constant(self, content: Any, kind: str | None = None) -> "Value":
        array = np.asarray(content)
        kind = kind or array.dtype.kind
        if kind in "OUS":
            return self._initializer(array, TensorProto.STRING, [str(text).encode() for text in array.reshape(-1)])
        if kind not in _TYPES:
            raise Untraceable(f"it computes with {array.dtype}")
        array = array.astype(_ARRAYS[kind])
        return self._initializer(array, _TYPES[kind], array.reshape(-1).tolist())

    def _initializer(self, array: Array, kind: int, content: Any) -> "Value":
        name = self.scope.get_unique_variable_name("constant")
        self.container.add_initializer(name, kind, list(array.shape), content)
        return Value(self, name, array)

    def concat(self, values: Sequence[Expression], axis: int = 1) -> "Value":
        values = _alike(values)
        if len(values) == 1:
            return values[0]
        example = np.concatenate([item.example for item in values], axis=axis)
        return self.node("Concat", *values, example=example, axis=axis % example.ndim)

    def inline(self, graph: Any, inputs: Mapping[str, str]) -> dict[str, str]:
        """Writes a whole graph, whose inputs are these names of ours: its outputs -> our names."""
        names = dict(inputs)
        for tensor in graph.graph.initializer:
            names[tensor.name] = self.scope.get_unique_variable_name(tensor.name)
            tensor = _renamed(tensor, names[tensor.name])
            self.container.initializers.append(tensor)
        for opset in graph.opset_import:
            self.container.node_domain_version_pair_sets.add((opset.domain, opset.version))
        for node in graph.graph.node:
            for name in node.output:
                names.setdefault(name, self.scope.get_unique_variable_name(name))
        for node in graph.graph.node:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.input[:] = [names.get(name, name) for name in node.input]
            copy.output[:] = [names.get(name, name) for name in node.output]
            copy.name = self.scope.get_unique_operator_name(node.op_type)
            for attribute in copy.attribute:
                if attribute.HasField("g"):
                    raise Untraceable("a part of it has a graph of its own")
            self.container.nodes.append(copy)
        return {output.name: names[output.name] for output in graph.graph.output}


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


class Value(np.lib.mixins.NDArrayOperatorsMixin):
    """A tensor of the graph, which NumPy's functions and operators take as they take an array."""

    __array_priority__ = 1000

    def __init__(self, tape: Tape, name: str, example: Any, columns: Sequence[str] = ()) -> None:
        self.tape, self.name = tape, name
        self.example: Array = np.asarray(example)
        self._columns = list(columns)

    # --- as an array --------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.example.shape)

    @property
    def ndim(self) -> int:
        return self.example.ndim

    @property
    def dtype(self) -> Any:
        return self.example.dtype

    @property
    def kind(self) -> str:
        return "f" if self.dtype.kind == "f" else "i" if self.dtype.kind in "iu" else self.dtype.kind

    @property
    def values(self) -> "Value":
        return self

    @property
    def T(self) -> "Value":  # noqa: N802 - NumPy's name
        raise Untraceable("it transposes its records")

    @property
    def columns(self) -> list[str]:
        return self._columns

    def to_numpy(self, *_: Any, **__: Any) -> "Value":
        return self

    def copy(self, *_: Any, **__: Any) -> "Value":
        return self

    def __len__(self) -> int:
        raise Untraceable("it counts its records")

    def __bool__(self) -> bool:
        raise Untraceable("it decides by the values of the records (use np.where)")

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable("it goes over the records one by one")

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise Untraceable("it uses a function that is not one of those of NumPy that are known")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Untraceable(f"it uses .{name}")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        from batchserve.conversion.converters import numpy_operators

        if method != "__call__" or set(options) - {"dtype"}:
            raise Untraceable(f"it uses np.{ufunc.__name__}.{method}" if method != "__call__" else "it writes in place")
        return numpy_operators.ufunc(self.tape, ufunc, inputs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        from batchserve.conversion.converters import numpy_operators

        return numpy_operators.function(self.tape, function, args, kwargs)

    def __getitem__(self, key: Any) -> "Value":
        if isinstance(key, str) or (isinstance(key, list) and key and all(isinstance(k, str) for k in key)):
            return self._named(key)
        if not isinstance(key, tuple):
            key = (key,)
        if key and key[0] is Ellipsis and self.ndim == len(key):
            key = (slice(None), *key[1:])
        if not key or key[0] != slice(None) or len(key) > 2:
            raise Untraceable("it picks records, not columns")
        if len(key) == 1:
            return self
        if key[1] is None:
            return self.reshape(-1, 1)
        if self.ndim != 2:
            raise Untraceable("it picks columns of what has none")
        example = self.example[:, key[1]]
        picked = np.atleast_1d(np.arange(self.shape[1])[key[1]])
        if example.ndim == 1:
            return self.tape.node("Gather", self, self.tape.constant(int(picked[0])), example=example, axis=1)
        return self.tape.node("Gather", self, self.tape.constant(picked.astype(np.int64)), example=example, axis=1)

    def _named(self, key: str | list[str]) -> "Value":
        missing = [name for name in ([key] if isinstance(key, str) else key) if name not in self._columns]
        if missing:
            raise Untraceable(f"it takes the column {missing[0]!r}, which has no name here")
        if isinstance(key, str):
            return self[:, self._columns.index(key)]
        picked = self[:, [self._columns.index(name) for name in key]]
        return Value(self.tape, picked.name, picked.example, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise Untraceable("it writes into its argument")

    # --- as NumPy's methods -------------------------------------------------------------------------------------------

    def to(self, kind: str, force: bool = False) -> "Value":
        """The same numbers as floats (f), integers (i) or truth values (b)."""
        if self.kind == kind and not force:
            return self
        if self.kind not in _TYPES:
            raise Untraceable("it computes with texts")
        return self.tape.node("Cast", self, example=self.example.astype(_ARRAYS[kind]), to=_TYPES[kind])

    def astype(self, dtype: Any, *_: Any, **__: Any) -> "Value":
        kind = np.dtype(dtype).kind
        if kind not in _TYPES:
            raise Untraceable(f"it makes {np.dtype(dtype)} of its numbers")
        return self.to("i" if kind == "u" else kind)

    def reshape(self, *shape: Any) -> "Value":
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        example = self.example.reshape(sizes)
        if not len(example) == EXAMPLES or not self.ndim:
            raise Untraceable("it reshapes its records")
        target = [-1, *example.shape[1:]]
        return self.tape.node("Reshape", self, self.tape.constant(target, "i"), example=example)

    def sum(self, axis: Any = None, keepdims: bool = False, **_: Any) -> "Value":
        return self.reduced("ReduceSum", np.sum, axis, keepdims)

    def mean(self, axis: Any = None, keepdims: bool = False, **_: Any) -> "Value":
        return self.to("f").reduced("ReduceMean", np.mean, axis, keepdims)

    def max(self, axis: Any = None, keepdims: bool = False, **_: Any) -> "Value":
        return self.reduced("ReduceMax", np.max, axis, keepdims)

    def min(self, axis: Any = None, keepdims: bool = False, **_: Any) -> "Value":
        return self.reduced("ReduceMin", np.min, axis, keepdims)

    def reduced(self, kind: str, function: Callable[..., Any], axis: Any, keepdims: bool) -> "Value":
        if axis is None or axis % self.ndim == 0:
            raise Untraceable("it mixes its records")
        value = self.to("f") if self.kind == "b" else self
        example = function(value.example, axis=axis, keepdims=keepdims)
        if kind == "ReduceSum":  # takes its axes as an input
            axes = self.tape.constant([axis % self.ndim], "i")
            return self.tape.node(kind, value, axes, example=example, keepdims=int(keepdims))
        if self.tape.container.target_opset_any_domain("") >= 18:
            axes = self.tape.constant([axis % self.ndim], "i")
            return self.tape.node(kind, value, axes, example=example, keepdims=int(keepdims))
        return self.tape.node(kind, value, example=example, axes=[axis % self.ndim], keepdims=int(keepdims))

    def argmax(self, axis: int = 1) -> "Value":
        example = np.argmax(self.example, axis=axis)
        return self.tape.node("ArgMax", self, example=example, axis=axis % self.ndim, keepdims=0)

    def clip(self, least: Any = None, most: Any = None, **_: Any) -> Expression:
        value: Any = self
        value = value if least is None else np.maximum(value, least)
        return value if most is None else np.minimum(value, most)

    def round(self, decimals: int = 0, **_: Any) -> Expression:
        if decimals:
            return (self * 10.0**decimals).round() / 10.0**decimals
        return self.tape.node("Round", self.to("f"), example=np.round(self.to("f").example))

    def fillna(self, value: Any) -> Any:
        return np.where(np.isnan(self), value, self)

    def isna(self) -> Any:
        return np.isnan(self)

    def squeeze(self, axis: int = -1) -> "Value":
        if self.ndim != 2 or self.shape[1] != 1 or axis not in (1, -1):
            raise Untraceable("it squeezes its records")
        return self[:, 0]

    def ravel(self, *_: Any) -> "Value":
        return self if self.ndim == 1 else self.squeeze()

    def dot(self, other: Any) -> Any:
        return self @ other


def _alike(values: Sequence[Value]) -> list[Value]:
    """All of one type."""
    kinds = {item.kind for item in values}
    if len(kinds) == 1:
        return list(values)
    kind = "f" if "f" in kinds else "i"
    return [item.to(kind) for item in values]
