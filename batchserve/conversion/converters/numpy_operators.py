"""NumPy's functions as operators of ONNX, for values that are written down while they are computed."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from batchserve.conversion.converters.tape import Tape, Untraceable, Value

Rule = Callable[..., Any]

_FLOAT_OPERATORS = {
    np.sqrt: "Sqrt", np.exp: "Exp", np.log: "Log", np.sin: "Sin", np.cos: "Cos", np.tan: "Tan", np.arcsin: "Asin",
    np.arccos: "Acos", np.arctan: "Atan", np.sinh: "Sinh", np.cosh: "Cosh", np.tanh: "Tanh", np.arcsinh: "Asinh",
    np.arccosh: "Acosh", np.arctanh: "Atanh", np.rint: "Round", np.floor: "Floor", np.ceil: "Ceil",
    np.reciprocal: "Reciprocal",
}  # fmt: skip
"""Of one number, as floats."""
_PLAIN_OPERATORS = {np.negative: "Neg", np.absolute: "Abs", np.sign: "Sign", np.isnan: "IsNaN", np.isinf: "IsInf"}
_PAIRS = {
    np.add: "Add", np.subtract: "Sub", np.multiply: "Mul", np.maximum: "Max", np.minimum: "Min", np.matmul: "MatMul",
    np.greater: "Greater", np.greater_equal: "GreaterOrEqual", np.less: "Less", np.less_equal: "LessOrEqual",
    np.equal: "Equal",
}  # fmt: skip
_LOGIC = {np.logical_and: "And", np.logical_or: "Or", np.logical_xor: "Xor", np.bitwise_and: "And",
          np.bitwise_or: "Or", np.bitwise_xor: "Xor"}  # fmt: skip


def _truncated(x: Any) -> Any:
    return np.sign(x) * np.floor(np.abs(x))


_COMPOSED: dict[Any, Rule] = {
    np.log1p: lambda x: np.log(x + 1.0),
    np.expm1: lambda x: np.exp(x) - 1.0,
    np.exp2: lambda x: np.exp(x * float(np.log(2))),
    np.log2: lambda x: np.log(x) * float(1 / np.log(2)),
    np.log10: lambda x: np.log(x) * float(1 / np.log(10)),
    np.square: lambda x: x * x,
    np.cbrt: lambda x: np.sign(x) * np.power(np.abs(x), 1 / 3),
    np.positive: lambda x: x,
    np.trunc: _truncated,
    np.deg2rad: lambda x: x * float(np.pi / 180),
    np.radians: lambda x: x * float(np.pi / 180),
    np.rad2deg: lambda x: x * float(180 / np.pi),
    np.degrees: lambda x: x * float(180 / np.pi),
    np.fabs: np.abs,
    np.isfinite: lambda x: ~(np.isnan(x) | np.isinf(x)),
    np.floor_divide: lambda x, y: np.floor(x / y),
    np.remainder: lambda x, y: x - np.floor(x / y) * y,
    np.fmax: lambda x, y: np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.maximum(x, y))),
    np.fmin: lambda x, y: np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.minimum(x, y))),
    np.hypot: lambda x, y: np.sqrt(x * x + y * y),
    np.not_equal: lambda x, y: ~np.equal(x, y),
}


def ufunc(tape: Tape, function: Any, inputs: Sequence[Any]) -> Any:
    """What NumPy's function gives for these values and constants. Raises Untraceable."""
    if function in _COMPOSED:
        return _COMPOSED[function](*inputs)
    values = [_as_value(tape, item) for item in inputs]
    examples = [item.example for item in values]
    with np.errstate(all="ignore"):
        if function in _FLOAT_OPERATORS:
            value = values[0].to("f")
            return tape.node(_FLOAT_OPERATORS[function], value, example=_float32(function(value.example)))
        if function in _PLAIN_OPERATORS:
            value = values[0].to("f") if function in (np.isnan, np.isinf) or values[0].kind == "b" else values[0]
            return tape.node(_PLAIN_OPERATORS[function], value, example=_float32(function(value.example)))
        if function in (np.logical_not, np.invert):
            return tape.node("Not", _truth(values[0]), example=np.logical_not(examples[0]))
        if function in _LOGIC:
            if function.__name__.startswith("bitwise") and {item.kind for item in values} != {"b"}:
                raise Untraceable("it computes with the bits of numbers")
            return tape.node(_LOGIC[function], *map(_truth, values), example=function(*map(np.bool_, examples)))
        if function is np.power or function is np.float_power:
            base, exponent = (item.to("f") for item in values)
            return tape.node("Pow", base, exponent, example=_float32(np.power(base.example, exponent.example)))
        if function is np.true_divide:
            left, right = (item.to("f") for item in values)
            return tape.node("Div", left, right, example=_float32(left.example / right.example))
        if function in _PAIRS:
            left, right = _pair(values)
            return tape.node(_PAIRS[function], left, right, example=_float32(function(left.example, right.example)))
    raise Untraceable(f"it uses np.{function.__name__}")


def _as_value(tape: Tape, item: Any) -> Value:
    if isinstance(item, Value):
        return item
    return tape.constant(np.asarray(item))


def _pair(values: Sequence[Value]) -> tuple[Value, Value]:
    kinds = {item.kind for item in values}
    if kinds == {"O"} or kinds & {"U", "O"}:
        raise Untraceable("it computes with texts")
    kind = "f" if "f" in kinds else "i"
    return values[0].to(kind), values[1].to(kind)


def _truth(value: Value) -> Value:
    return value if value.kind == "b" else ufunc(value.tape, np.not_equal, (value, 0))


def _float32(array: Any) -> Any:
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def function(tape: Tape, called: Any, args: Sequence[Any], options: dict[str, Any]) -> Any:
    """What one of NumPy's functions beyond the ufuncs gives. Raises Untraceable."""
    if called in _OF_SEVERAL:
        return _OF_SEVERAL[called](tape, *args, **options)
    if called in _OF_ONE and isinstance(args[0], Value):
        return _OF_ONE[called](*args, **options)
    raise Untraceable(f"it uses np.{called.__name__}")


def _where(tape: Tape, condition: Any, yes: Any = None, no: Any = None) -> Value:
    if yes is None or no is None:
        raise Untraceable("it picks records, not columns")
    truth = _truth(_as_value(tape, condition))
    left, right = _pair([_as_value(tape, yes), _as_value(tape, no)])
    example = np.where(truth.example, left.example, right.example)
    return tape.node("Where", truth, left, right, example=example)


def _stack(tape: Tape, columns: Sequence[Any], *_: Any, **__: Any) -> Value:
    values = [_as_value(tape, item) for item in columns]
    return tape.concat([item[:, None] if item.ndim == 1 else item for item in values])


def _concatenate(tape: Tape, values: Sequence[Any], axis: int = 0, **_: Any) -> Value:
    values = [_as_value(tape, item) for item in values]
    if axis % values[0].ndim == 0:
        raise Untraceable("it mixes its records")
    return tape.concat(values, axis)


def _stacked(tape: Tape, values: Sequence[Any], axis: int = 0, **_: Any) -> Value:
    if axis not in (1, -1) or any(_as_value(tape, item).ndim != 1 for item in values):
        raise Untraceable("it mixes its records")
    return _stack(tape, values)


def _horizontal(tape: Tape, values: Sequence[Any], **_: Any) -> Value:
    if any(_as_value(tape, item).ndim == 1 for item in values):
        raise Untraceable("it mixes its records")
    return tape.concat([_as_value(tape, item) for item in values])


def _nan_to_num(x: Value, nan: float = 0.0, posinf: Any = None, neginf: Any = None, **_: Any) -> Any:
    most, least = float(np.finfo(np.float32).max), float(np.finfo(np.float32).min)
    filled = np.where(np.isnan(x), nan, x)
    filled = np.where(np.isinf(filled) & (filled > 0), most if posinf is None else posinf, filled)
    return np.where(np.isinf(filled) & (filled < 0), least if neginf is None else neginf, filled)


def _spread(x: Value, axis: Any = None, ddof: int = 0, keepdims: bool = False, **_: Any) -> Any:
    centred = x.to("f") - x.mean(axis=axis, keepdims=True)
    return (centred * centred).sum(axis=axis, keepdims=keepdims) / float(x.shape[axis] - ddof)


def _difference(x: Value, n: int = 1, axis: int = -1) -> Any:
    if n != 1 or axis not in (1, -1) or x.ndim != 2:
        raise Untraceable("it mixes its records")
    return x[:, 1:] - x[:, :-1]


_OF_SEVERAL: dict[Any, Rule] = {
    np.where: _where,
    np.column_stack: _stack,
    np.concatenate: _concatenate,
    np.hstack: _horizontal,
    np.stack: _stacked,
}
_OF_ONE: dict[Any, Rule] = {
    np.clip: lambda x, a_min=None, a_max=None, **_: x.clip(a_min, a_max),
    np.sum: lambda x, axis=None, **options: x.sum(axis, **options),
    np.mean: lambda x, axis=None, **options: x.mean(axis, **options),
    np.max: lambda x, axis=None, **options: x.max(axis, **options),
    np.min: lambda x, axis=None, **options: x.min(axis, **options),
    np.var: _spread,
    np.std: lambda x, **options: np.sqrt(_spread(x, **options)),
    np.linalg.norm: lambda x, axis=None, keepdims=False: np.sqrt((x * x).sum(axis, keepdims)),
    np.argmax: lambda x, axis=None: x.argmax(axis),
    np.round: lambda x, decimals=0: x.round(decimals),
    np.nan_to_num: _nan_to_num,
    np.reshape: lambda x, shape, **_: x.reshape(shape),
    np.ravel: lambda x, **_: x.ravel(),
    np.squeeze: lambda x, axis=-1: x.squeeze(axis),
    np.dot: np.matmul,
    np.copy: lambda x, **_: x,
    np.zeros_like: lambda x, **_: x * 0,
    np.ones_like: lambda x, **_: x * 0 + 1,
    np.diff: _difference,
}
