"""Transformers of columns: bins, splines, quantiles, functions, imputers, selections."""

import math
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from onnx import TensorProto

from batchserve.conversion.converters.tape import EXAMPLES, Expression, Tape, Untraceable, Value
from batchserve.conversion.estimator import fills_numbers
from batchserve.conversion.estimator import selected as selected_columns
from batchserve.conversion.sample import Array
from batchserve.errors import ConversionFailed


def bins(tape: Tape, model: Any) -> Expression:
    """KBinsDiscretizer: the count of edges, without the outer ones, that are not above the value."""
    x = tape.merged()
    columns = []
    for index, edges in enumerate(model.bin_edges_):
        inner = np.asarray(edges, dtype=np.float64)[1:-1]
        place = (x[:, [index]] >= inner).to("f").sum(axis=1, keepdims=True) if len(inner) else x[:, [index]] * 0.0
        if model.encode == "ordinal":
            columns.append(place)
        else:
            columns.append((np.equal(place, np.arange(model.n_bins_[index], dtype=np.float32))).to("f"))
    return tape.concat(columns)


def spline(tape: Tape, model: Any) -> Expression:
    """SplineTransformer: in each interval between knots a polynomial, and beyond them what `extrapolation` says."""
    x = tape.merged()
    columns = []
    for index, spline_of in enumerate(model.bsplines_):
        columns.append(_spline_column(x[:, [index]], spline_of, model))
    if model.include_bias:
        return tape.concat(columns)
    return tape.concat([column[:, : column.shape[1] - 1] for column in columns])


def _spline_column(x: Expression, curve: Any, model: Any) -> Expression:
    degree, knots = curve.k, np.asarray(curve.t, dtype=np.float64)
    low, high = knots[degree], knots[-degree - 1]
    count = curve.c.shape[1]
    match model.extrapolation:
        case "periodic":
            period = high - low
            x = x - np.floor((x - low) / period) * period
            inner = x
        case "error":
            inner = np.where((x < low) | (x > high), np.nan, x)
        case "constant" | "linear":
            inner = np.clip(x, low, high)
        case _:
            inner = x  # the polynomials of the outer intervals go on
    from scipy.interpolate import PPoly

    pieces = [PPoly.from_spline((knots, curve.c[:, basis], degree)) for basis in range(count)]
    starts = np.arange(degree, len(knots) - degree - 1)
    starts = starts[knots[starts + 1] > knots[starts]]
    result: Any = None
    for order, piece in enumerate(starts):
        offset = inner - knots[piece]
        powers = np.stack([p.c[:, piece] for p in pieces], axis=1)  # [degree + 1, count], the highest first
        value: Any = np.zeros(count)
        for row in powers:
            value = value * offset + row
        result = value if order == 0 else np.where(inner >= knots[piece], value, result)
    if model.extrapolation == "linear":
        result = _straight(x, result, curve, low, high)
    return result


def _straight(x: Expression, result: Expression, curve: Any, low: float, high: float) -> Expression:
    slope_low, slope_high = curve(low, nu=1), curve(high, nu=1)
    return result + (np.minimum(x - low, 0.0) * slope_low) + (np.maximum(x - high, 0.0) * slope_high)


def function(tape: Tape, model: Any) -> Expression:
    """FunctionTransformer: the function is called with a Value, and writes the nodes itself."""
    x = tape.merged()
    names = [str(name) for name in getattr(model, "feature_names_in_", [])] or [
        variable.raw_name for variable in tape.variables
    ]
    if model.func is None:
        return x
    given = Value(tape, x.name, x.example, names if len(names) == x.shape[1] else ())
    called = getattr(model.func, "__name__", str(model.func))
    try:
        result = model.func(given, **(model.kw_args or {}))
        if not isinstance(result, Value):
            raise Untraceable(f"it returns {type(result).__name__}")
        if result.example.shape[:1] != (EXAMPLES,):
            raise Untraceable("it does not return a row for each record")
    except ConversionFailed:
        raise
    except Exception as error:  # whatever a function of strangers raises when it gets no array
        reason = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"
        raise ConversionFailed(
            f"The function {called!r} of a FunctionTransformer cannot be written as a graph: {reason}. Use NumPy's "
            "functions of whole columns (np.log1p, np.where, ...), or apply it before the pipeline."
        ) from error
    return result[:, None] if result.ndim == 1 else result


def selected(tape: Tape, model: Any) -> Expression:
    """Selectors of columns."""
    return tape.merged()[:, np.flatnonzero(model.get_support())]


def selects_the_first(model: Any) -> bool:
    """Of the first column alone, skl2onnx makes none."""
    return list(model.get_support(indices=True)) == [0]


def quantiles(tape: Tape, model: Any) -> Expression:
    """QuantileTransformer: two interpolations, from below and from above, whose mean is taken."""
    x = tape.merged()
    references = np.asarray(model.references_, dtype=np.float64)
    columns = []
    for index in range(x.shape[1]):
        grid = np.asarray(model.quantiles_[:, index], dtype=np.float64)
        column = x[:, [index]]
        rising = interpolated(column, grid, references)
        falling = interpolated(column * -1.0, -grid[::-1], -references[::-1])
        middle = (rising - falling) * 0.5
        if model.output_distribution == "normal":
            middle = np.where(column - 1e-7 < grid[0], 0.0, np.where(column + 1e-7 > grid[-1], 1.0, middle))
            columns.append(_normal_quantile(middle))
            continue
        middle = np.where(np.equal(column, grid[-1]), 1.0, middle)
        columns.append(np.where(np.equal(column, grid[0]), 0.0, middle))
    return tape.concat(columns)


def interpolated(x: Expression, xs: Array, ys: Array) -> Expression:
    """np.interp, as a sum of what each interval adds; one without a width adds all at once."""
    xs, ys = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    result: Expression = x * 0.0 + float(ys[0])
    widths, rises = np.diff(xs), np.diff(ys)
    wide = widths > 0
    if wide.any():
        share = np.clip((x - xs[:-1][wide]) / widths[wide], 0.0, 1.0)
        result = result + (share * rises[wide]).sum(axis=1, keepdims=True)
    if not wide.all():
        result = result + ((x >= xs[1:][~wide]).to("f") * rises[~wide]).sum(axis=1, keepdims=True)
    return result


def _normal_quantile(p: Expression) -> Expression:
    """The inverse of the normal distribution: Acklam's rational approximation, cut as scikit-learn cuts."""
    from scipy import stats

    low, high = stats.norm.ppf(1e-7 - np.spacing(1)), stats.norm.ppf(1 - (1e-7 - np.spacing(1)))
    a = [-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02, 1.383577518672690e02,
         -3.066479806614716e01, 2.506628277459239e00]  # fmt: skip
    b = [-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02, 6.680131188771972e01,
         -1.328068155288572e01, 1.0]  # fmt: skip
    c = [-7.784894002430293e-03, -3.223964580411365e-01, -2.400758277161838e00, -2.549732539343734e00,
         4.374664141464968e00, 2.938163982698783e00]  # fmt: skip
    d = [7.784695709041462e-03, 3.224671290700398e-01, 2.445134137142996e00, 3.754408661907416e00, 1.0]
    q = p - 0.5
    r = q * q
    middle = _polynomial(r, a) * q / _polynomial(r, b)
    tail = np.sqrt(np.log(np.maximum(np.minimum(p, 1.0 - p), 1e-12)) * -2.0)
    outer = _polynomial(tail, c) / _polynomial(tail, d)
    value = np.where(np.abs(q) <= 0.47575, middle, np.where(q < 0, outer, outer * -1.0))
    return np.clip(value, low, high)


def normal_cdf(x: Expression) -> Expression:
    return (x.tape.node("Erf", x * float(np.sqrt(0.5)), example=x.example) + 1.0) * 0.5


def _polynomial(x: Expression, coefficients: list[float]) -> Any:
    value: Any = coefficients[0]
    for coefficient in coefficients[1:]:
        value = x * value + coefficient
    return value


def iterative_imputer(tape: Tape, model: Any) -> Expression:
    """Fills in by the initial imputer, and then column by column with the fitted regressors, round by round."""
    if model.sample_posterior or model.add_indicator or isinstance(model.missing_values, str | int):
        raise ConversionFailed(
            "IterativeImputer converts with sample_posterior=False, add_indicator=False and NaN for missing values."
        )
    x = tape.merged()
    absent = np.isnan(x)
    statistics = np.asarray(model.initial_imputer_.statistics_, dtype=np.float64)
    if np.isnan(statistics).any():
        raise ConversionFailed("IterativeImputer was fitted on a column that is all missing. Drop that column.")
    filled = np.where(absent, statistics, x)
    columns = [filled[:, [index]] for index in range(x.shape[1])]
    low, high = model._min_value, model._max_value
    for step in model.imputation_sequence_:
        others = tape.concat([columns[index] for index in step.neighbor_feat_idx])
        guess = tape.part(step.estimator, others)[-1].reshape(-1, 1)
        guess = np.clip(guess, float(low[step.feat_idx]), float(high[step.feat_idx]))
        columns[step.feat_idx] = np.where(absent[:, [step.feat_idx]], guess, columns[step.feat_idx])
    return tape.concat(columns)


def imputed(tape: Tape, model: Any) -> Expression:
    """SimpleImputer of numbers with an indicator: the columns filled in, and which values were missing."""
    x = tape.merged()
    absent = np.isnan(x)
    kept = ~np.isnan(np.asarray(model.statistics_, dtype=np.float64))
    filled = np.where(absent, np.nan_to_num(model.statistics_.astype(np.float64)), x)
    columns = [filled if kept.all() or model.keep_empty_features else filled[:, np.flatnonzero(kept)]]
    if model.indicator_ is not None:
        columns.append(absent.to("f")[:, np.asarray(model.indicator_.features_)])
    return tape.concat(columns)


def fills_numbers_and_indicates(model: Any) -> bool:
    return bool(model.add_indicator) and fills_numbers(model)


def chosen(tape: Tape, model: Any) -> Expression:
    """A ColumnTransformer that gets one matrix."""
    x = tape.rows(tape.merged(), model.n_features_in_)
    names = [str(name) for name in getattr(model, "feature_names_in_", range(model.n_features_in_))]
    made = []
    for _, step, columns in model.transformers_:
        places = [names.index(name) for name in selected_columns(columns, names)]
        if not places or (isinstance(step, str) and step == "drop"):
            continue
        part = x[:, places]
        if not isinstance(step, str):
            part = tape.rows(tape.part(step, part)[-1], len(step.get_feature_names_out()))
        made.append(part)
    return tape.concat(made)


def marks_nan(model: Any) -> bool:
    return isinstance(model.missing_values, float) and math.isnan(model.missing_values)


def indicated(tape: Tape, model: Any) -> Expression:
    """MissingIndicator of NaN."""
    missing: Expression = np.isnan(tape.rows(tape.merged(), model.n_features_in_)[:, np.asarray(model.features_)])
    return missing.to("f")


def zeros_missing(tape: Tape, model: Any) -> Expression:  # noqa: ARG001 - has nothing to say
    x = tape.merged()
    return np.where(np.equal(x, 0.0), np.nan, x)


def scaled(tape: Tape, model: Any) -> Expression:
    """A StandardScaler that computes in float64 and rounds each step, as scikit-learn does before 1.8: trees behind it
    split otherwise where all is float32."""
    x = tape.merged()
    x = _in_double(tape, "Sub", x, model.mean_) if model.with_mean else x
    return _in_double(tape, "Div", x, model.scale_) if model.with_std else x


def scales_in_double() -> bool:
    """Whether the scikit-learn that is installed does so."""
    return tuple(int(part) for part in version("scikit-learn").split(".")[:2]) < (1, 8)


def _in_double(tape: Tape, operator: str, x: Expression, numbers: Array) -> Expression:
    example = np.asarray(x.example, np.float64)
    wide = tape.node("Cast", x, example=example, to=TensorProto.DOUBLE)
    result = tape.node(operator, wide, tape.constant(numbers, "d"), example=example)
    return tape.node("Cast", result, example=x.example, to=TensorProto.FLOAT)


def in_double(tape: Tape, model: Any) -> Expression:
    """The steps of an `InDouble` as scikit-learn computes them in float64; for trees then float32, as they take it."""
    x = tape.wide_merged()
    for step in model.steps:
        x = _stepped(tape, x, step, rounds=model.rounds)
    if model.stays:
        return x
    return tape.node("Cast", x, example=x.example.astype(np.float32), to=TensorProto.FLOAT)


def _stepped(tape: Tape, x: Value, step: Any, *, rounds: bool) -> Value:
    """What a step, with all that it is made of, makes of numbers."""
    match type(step).__name__:
        case "str" | "FunctionTransformer":  # which leave all as it is
            return x
        case "Pipeline":
            for _, part in step.steps:
                x = _stepped(tape, x, part, rounds=rounds)
            return x
        case "FeatureUnion":
            return _beside(tape, [_stepped(tape, x, part, rounds=rounds) for _, part in step.transformer_list])
        case "ColumnTransformer" | "Chosen":
            made = [_stepped(tape, x[:, own], part, rounds=rounds) for part, own in _members(step)]
            return _beside(tape, made)
        case "SimpleImputer":
            return _filled(tape, x, step)
        case "PCA" | "TruncatedSVD":
            return _projected(tape, x, step, rounds=rounds)
        case "PolynomialFeatures":
            return _products(tape, x, step, rounds=rounds)
    return _rescaled(tape, x, step, rounds=rounds)


def _rescaled(tape: Tape, x: Value, step: Any, *, rounds: bool) -> Value:
    """By one of the scalers; or by a selection, which leaves some columns."""
    each = partial(_each, tape, rounds=rounds)
    match type(step).__name__:
        case "StandardScaler":
            kind = np.float32 if rounds and not scales_in_double() else np.float64
            x = each("Sub", x, step.mean_.astype(kind)) if step.with_mean else x
            x = each("Div", x, step.scale_.astype(kind)) if step.with_std else x
        case "RobustScaler":
            x = each("Sub", x, step.center_) if step.with_centering else x
            x = each("Div", x, step.scale_) if step.with_scaling else x
        case "MaxAbsScaler":
            x = each("Div", x, step.scale_)
            x = _clipped(tape, x, -1.0, 1.0) if getattr(step, "clip", False) else x
        case "MinMaxScaler":
            x = each("Add", each("Mul", x, step.scale_), step.min_)
            x = _clipped(tape, x, *step.feature_range) if step.clip else x
        case _:
            x = x[:, np.flatnonzero(step.get_support())]
    return x


def _members(columns: Any) -> list[tuple[Any, list[int]]]:
    """The parts of a ColumnTransformer that get columns, and the places of these."""
    names = [str(name) for name in getattr(columns, "feature_names_in_", range(columns.n_features_in_))]
    made = [(part, selected_columns(own, names)) for _, part, own in columns.transformers_]
    return [(part, [names.index(name) for name in own]) for part, own in made if own]


def _beside(tape: Tape, parts: list[Value]) -> Value:
    if len(parts) == 1:
        return parts[0]
    return tape.node("Concat", *parts, example=np.hstack([part.example for part in parts]), axis=1)


def _each(tape: Tape, operator: str, x: Value, numbers: Array, *, rounds: bool) -> Value:
    """With a number for each column."""
    x = tape.node(operator, x, tape.constant(np.reshape(numbers, (1, -1)), "d"), example=x.example)
    return _rounded(tape, x) if rounds else x


def _rounded(tape: Tape, x: Value) -> Value:
    """To float32."""
    rounded = tape.node("Cast", x, example=x.example, to=TensorProto.FLOAT)
    return tape.node("Cast", rounded, example=x.example, to=TensorProto.DOUBLE)


def _projected(tape: Tape, x: Value, step: Any, *, rounds: bool) -> Value:
    """PCA and TruncatedSVD."""
    axes = np.asarray(step.components_, np.float64).T
    x = tape.node("MatMul", x, tape.constant(axes, "d"), example=x.example @ axes)
    x = _rounded(tape, x) if rounds else x
    if getattr(step, "mean_", None) is not None:
        x = _each(tape, "Sub", x, np.asarray(step.mean_, np.float64) @ axes, rounds=rounds)
    if getattr(step, "whiten", False):
        least = np.finfo(np.float64).eps
        x = _each(tape, "Div", x, np.maximum(np.sqrt(step.explained_variance_), least), rounds=rounds)
    return x


def _products(tape: Tape, x: Value, features: Any, *, rounds: bool) -> Value:
    """PolynomialFeatures, which multiplies by one column after the other, the last one first."""
    factors = [np.repeat(np.arange(len(powers)), powers)[::-1] for powers in features.powers_]
    found = []
    for degree in sorted({len(each) for each in factors}):
        columns = np.array([each for each in factors if len(each) == degree])
        if degree == 0:
            ones = np.ones((len(x.example), len(columns)))
            zero = tape.node("Mul", x[:, [0]], tape.constant([[0.0]], "d"), example=ones)
            found.append(tape.node("Add", zero, tape.constant([[1.0]], "d"), example=ones))
            continue
        product = x[:, columns[:, 0]]
        for place in range(1, degree):
            factor = x[:, columns[:, place]]
            product = tape.node("Mul", product, factor, example=product.example * factor.example)
            product = _rounded(tape, product) if rounds else product
        found.append(product)
    if len(found) == 1:
        return found[0]
    return tape.node("Concat", *found, example=np.hstack([each.example for each in found]), axis=1)


def _clipped(tape: Tape, x: Value, least: float, most: float) -> Value:
    x = tape.node("Max", x, tape.constant([[least]], "d"), example=x.example)
    return tape.node("Min", x, tape.constant([[most]], "d"), example=x.example)


def _filled(tape: Tape, x: Value, imputer: Any) -> Value:
    """SimpleImputer, and behind its columns which values were missing, where it says so."""
    statistics = np.asarray(imputer.statistics_, dtype=np.float64)
    kept = ~np.isnan(statistics)
    absent = tape.node("IsNaN", x, example=np.isnan(x.example))
    content = tape.constant(np.nan_to_num(statistics).reshape(1, -1), "d")
    filled = tape.node("Where", absent, content, x, example=x.example)
    filled = filled if kept.all() or imputer.keep_empty_features else filled[:, np.flatnonzero(kept)]
    if imputer.indicator_ is None:
        return filled
    marks = tape.node("Cast", absent, example=x.example, to=TensorProto.DOUBLE)[:, imputer.indicator_.features_]
    return tape.node("Concat", filled, marks, example=np.hstack([filled.example, marks.example]), axis=1)


def encodes_beyond_skl2onnx(encoder: Any) -> bool:
    """Whether a OneHotEncoder may put several categories into one, which skl2onnx does for some inputs alone; or knows
    True and False in a column with missing values, which is one of floats, and skl2onnx cuts these to integers."""
    groups = encoder._infrequent_enabled or encoder.handle_unknown in ("infrequent_if_exist", "warn")
    objects = [item for categories in encoder.categories_ if categories.dtype == object for item in categories]
    return bool(groups) or any(isinstance(item, bool | np.bool_) for item in objects)


def one_hot(tape: Tape, encoder: Any) -> Expression:
    """OneHotEncoder: an unknown category is that of the rare ones, where it says so and a column has any; else none."""
    groups_unknown = encoder.handle_unknown in ("infrequent_if_exist", "warn")
    columns = [column for variable in tape.variables for column in _single(_as_given(tape, variable))]
    parts = []
    for place, (column, categories) in enumerate(zip(columns, encoder.categories_, strict=True)):
        groups = encoder._default_to_infrequent_mappings[place] if encoder._infrequent_enabled else None
        groups = np.arange(len(categories)) if groups is None else np.asarray(groups)
        count = int(groups.max()) + 1
        rare = groups_unknown and encoder._infrequent_enabled and encoder._infrequent_indices[place] is not None
        code = _code(tape, column, categories, groups, float(count - 1) if rare else math.nan)
        dropped = encoder._drop_idx_after_grouping[place] if encoder._drop_idx_after_grouping is not None else None
        kept = [float(number) for number in range(count) if number != dropped]
        if kept:
            equal: Expression = np.equal(code, np.array(kept, np.float32))
            parts.append(equal.to("f"))
    return tape.concat(parts)


def _as_given(tape: Tape, variable: Any) -> Value:
    """Integers stay integers, so that all their digits count."""
    value = tape.value(variable)
    if type(variable.type).__name__ != "Int64TensorType":
        return value
    return Value(tape, variable.full_name, value.example.astype(np.int64))


def _single(value: Value) -> list[Value]:
    width = value.shape[1] if value.ndim == 2 else 1
    return [value] if width == 1 else [value[:, [place]] for place in range(width)]


def _code(tape: Tape, column: Value, categories: Any, groups: Any, unknown: float) -> Expression:
    """[N, 1]: the group of a category."""
    known = [(item, float(group)) for item, group in zip(categories, groups, strict=True) if item == item]
    kind = {"O": "strings", "f": "floats"}.get(column.kind, "int64s")
    convert = {"strings": str, "floats": float, "int64s": int}[kind]
    code = tape.node(
        "LabelEncoder", column, example=np.zeros((EXAMPLES, 1), np.float32), domain="ai.onnx.ml", version=2,
        values_floats=[group for _, group in known], default_float=unknown,
        **{f"keys_{kind}": [convert(item) for item, _ in known]},
    )  # fmt: skip
    missing = [float(group) for item, group in zip(categories, groups, strict=True) if item != item]
    return np.where(np.isnan(column), missing[0], code) if missing and kind == "floats" else code
