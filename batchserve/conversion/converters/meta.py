"""Estimators made of estimators: thresholds, chains, votes, stacks, calibration, transformed targets."""

from typing import Any

import numpy as np

from batchserve.conversion.converters.algebra import label_of, sigmoid, squared_distances
from batchserve.conversion.converters.ensembles import side_by_side
from batchserve.conversion.converters.tape import Expression, Tape, Value
from batchserve.conversion.converters.transforms import interpolated, normal_cdf
from batchserve.conversion.converters.within import with_scores
from batchserve.errors import ConversionFailed


def _probabilities(tape: Tape, model: Any, x: Expression | None = None) -> Expression:
    return _matrix(tape.part(model, x)[-1], _count(model))


def _count(model: Any) -> int:
    classes = getattr(model, "classes_", None)
    return 1 if classes is None else len(classes)


def _matrix(value: Expression, width: int) -> Expression:
    return value.tape.rows(value, width)


def _vector(value: Expression) -> Expression:
    example = np.zeros(len(value.example), value.dtype)
    return value.tape.node("Reshape", value, value.tape.constant([-1], "i"), example=example)


def _decision(tape: Tape, model: Any, x: Expression | None = None) -> Expression:
    """What `decision_function` gives: [N, classes], or [N, 1] for two of them."""
    count = _count(model)
    if (answering := with_scores(model)) is not None:
        return _matrix(tape.part(answering, x)[-1], 1 if count == 2 else count)
    scores = tape.part(model, x, raw=True)[-1]
    return tape.last_column(scores) if count == 2 else _matrix(scores, count)


def threshold(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """FixedThresholdClassifier and TunedThresholdClassifierCV: the label by the threshold, the numbers as they are."""
    inner = model.estimator_
    limit = getattr(model, "best_threshold_", None)
    if limit is None:
        limit = model.threshold
    method = _response(model, inner)
    scores = _scores(tape, inner, method)
    classes = list(inner.classes_)
    if limit == "auto":
        limit = 0.5 if method == "predict_proba" else 0.0
    positive = classes.index(model.pos_label) if getattr(model, "pos_label", None) is not None else 1
    value = scores[:, [positive]][:, 0] if scores.shape[1] == 2 else scores[:, 0] * (1.0 if positive else -1.0)
    index: Expression = np.where(value >= float(limit), positive, 1 - positive)
    shown = scores
    if method != "predict_proba" and hasattr(model, "predict_proba"):
        shown = _probabilities(tape, inner)  # the threshold is on scores, the result has probabilities
    return label_of(tape, classes, index.to("i")), shown


def _response(model: Any, inner: Any) -> str:
    if model.response_method != "auto":
        return str(model.response_method)
    return "predict_proba" if hasattr(inner, "predict_proba") else "decision_function"


def _scores(tape: Tape, inner: Any, method: str) -> Expression:
    """[N, 2] of probabilities, or [N, 1] of a decision function."""
    if method == "predict_proba":
        return _probabilities(tape, inner)
    return _decision(tape, inner)


def classifier_chain(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """Each estimator gets the columns and the labels (or chances) that those before it gave."""
    x = tape.merged()
    order = list(model.order_)
    labels: dict[int, Expression] = {}
    chances: dict[int, Expression] = {}
    given: list[Expression] = [x]
    chain_method = getattr(model, "chain_method_", None) or getattr(model, "chain_method", "predict")
    for target, estimator in zip(order, model.estimators_, strict=True):
        parts = tape.part(estimator, tape.concat(given))
        label = _matrix(parts[0].to("f"), 1)
        chance = (
            _matrix(parts[-1], _count(estimator))[:, [1]]
            if hasattr(estimator, "predict_proba")
            else tape.last_column(parts[-1])
        )
        labels[target], chances[target] = label, chance
        given.append(label if chain_method == "predict" else chance)
    together = tape.concat([labels[index] for index in sorted(labels)]).to("i")
    return together, tape.concat([chances[index] for index in sorted(chances)])


def regressor_chain(tape: Tape, model: Any) -> Expression:
    given = [tape.merged()]
    numbers: dict[int, Expression] = {}
    for target, estimator in zip(model.order_, model.estimators_, strict=True):
        number = _matrix(tape.part(estimator, tape.concat(given))[-1], 1)
        numbers[target] = number
        given.append(number)
    return tape.concat([numbers[index] for index in sorted(numbers)])


def transformed_target(tape: Tape, model: Any) -> Expression:
    """The regressor's number, and the inverse of what was done to the target."""
    inner = tape.part(model.regressor_)[-1]
    transformer = model.transformer_
    kind = type(transformer).__name__
    width = int(getattr(transformer, "n_features_in_", 0) or 1)
    y = _matrix(inner, width)
    match kind:
        case "FunctionTransformer":
            if transformer.inverse_func is None:
                return y
            return inverse_function(y, transformer)
        case "StandardScaler":
            y = y * transformer.scale_ if transformer.with_std else y
            return y + transformer.mean_ if transformer.with_mean else y
        case "MinMaxScaler":
            return (y - transformer.min_) / transformer.scale_
        case "MaxAbsScaler":
            return y * transformer.scale_
        case "RobustScaler":
            y = y * transformer.scale_ if transformer.with_scaling else y
            return y + transformer.center_ if transformer.with_centering else y
        case "QuantileTransformer":
            if transformer.output_distribution == "normal":
                y = normal_cdf(y)
            return tape.concat(
                [interpolated(y[:, [i]], transformer.references_, transformer.quantiles_[:, i]) for i in range(width)]
            )
        case "PowerTransformer":
            return _inverse_power(y, transformer)
    raise ConversionFailed(
        f"TransformedTargetRegressor(transformer={kind}) has no ONNX converter. Use a scaler, a PowerTransformer, "
        "a QuantileTransformer, or func and inverse_func."
    )


def inverse_function(y: Expression, transformer: Any) -> Expression:
    called = getattr(transformer.inverse_func, "__name__", str(transformer.inverse_func))
    try:
        result = transformer.inverse_func(y, **(transformer.inv_kw_args or {}))
    except Exception as error:  # whatever a function of strangers raises when it gets no array
        raise ConversionFailed(
            f"inverse_func {called!r} of a TransformedTargetRegressor cannot be written as a graph: {error}. Use "
            "NumPy's functions of whole columns (np.expm1, np.exp, ...)."
        ) from error
    assert isinstance(result, Value)
    return result


def _inverse_power(y: Expression, transformer: Any) -> Expression:
    lambdas = transformer.lambdas_
    if transformer.standardize:
        scaler = transformer._scaler
        y = y * scaler.scale_ + scaler.mean_
    columns = []
    for index, power in enumerate(lambdas):
        column = y[:, [index]]
        if transformer.method == "box-cox":
            columns.append(np.exp(column) if abs(power) < 1e-19 else (column * power + 1.0) ** (1 / power))
            continue
        positive = (
            np.exp(column) - 1.0 if abs(power) < 1e-19 else np.maximum(column * power + 1.0, 0.0) ** (1 / power) - 1.0
        )
        other = 2 - power
        negative = (
            1.0 - np.exp(column * -1.0)
            if abs(other) < 1e-19
            else 1.0 - np.maximum(column * -other + 1.0, 0.0) ** (1 / other)
        )
        columns.append(np.where(column >= 0, positive, negative))
    return y.tape.concat(columns)


def calibrated(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """The mean over the folds of calibrated scores, which sum to 1."""
    total: Any = None
    count = len(model.classes_)
    for part in model.calibrated_classifiers_:
        inner = part.estimator
        if part.method == "temperature":
            raise ConversionFailed("CalibratedClassifierCV(method='temperature') has no ONNX converter. Use 'sigmoid'.")
        scores = _calibration_scores(tape, inner)
        columns = []
        positions = [0] if scores.shape[1] == 1 else range(scores.shape[1])
        for position, calibrator in zip(positions, part.calibrators, strict=True):
            score = scores[:, [position]]
            if hasattr(calibrator, "a_"):
                columns.append(sigmoid(score * -float(calibrator.a_) - float(calibrator.b_)))
            else:
                clipped = np.clip(score, float(calibrator.X_min_), float(calibrator.X_max_))
                columns.append(interpolated(clipped, calibrator.X_thresholds_, calibrator.y_thresholds_))
        if count == 2:
            chances: Expression = tape.concat([1.0 - columns[0], columns[0]])
        else:
            chances = tape.concat(columns)
            sums = chances.sum(axis=1, keepdims=True)
            chances = np.where(sums == 0, 1.0 / count, chances / np.where(sums == 0, 1.0, sums))
        total = chances if total is None else total + chances
    mean = total / float(len(model.calibrated_classifiers_))
    return label_of(tape, model.classes_, mean.argmax()), mean


def _calibration_scores(tape: Tape, inner: Any) -> Expression:
    """What is calibrated: the decision function, or without it the probabilities; one column for two classes."""
    if hasattr(inner, "decision_function"):
        return _decision(tape, inner)
    chances = _probabilities(tape, inner)
    return chances[:, [1]] if len(inner.classes_) == 2 else chances


def vote(tape: Tape, model: Any) -> Any:
    """VotingClassifier: by the mean of the probabilities, or by the count of the labels."""
    weights = _weights(model)
    total: Any = None
    for estimator, weight in zip(model.estimators_, weights, strict=True):
        if model.voting == "soft":
            chance = _probabilities(tape, estimator) * weight
        else:
            label = _vector(tape.part(estimator)[0])
            chance = np.equal(label[:, None].to("f"), np.arange(len(model.classes_))).to("f") * weight
        total = chance if total is None else total + chance
    label = label_of(tape, model.classes_, total.argmax())
    return (label, total / sum(weights)) if model.voting == "soft" else (label, total)


def mean_vote(tape: Tape, model: Any) -> Expression:
    return _mean(tape, model, _weights(model))


def _weights(model: Any) -> list[float]:
    """Those of the estimators that vote."""
    if model.weights is None:
        return [1.0] * len(model.estimators_)
    given = zip(model.estimators, model.weights, strict=True)
    return [float(weight) for (_, kind), weight in given if kind != "drop"]


def _mean(tape: Tape, model: Any, weights: list[float]) -> Expression:
    """Of the numbers of its estimators."""
    total: Any = None
    for estimator, weight in zip(model.estimators_, weights, strict=True):
        number = _matrix(tape.part(estimator)[-1], 1) * weight
        total = number if total is None else total + number
    return total / sum(weights)


def stacked(tape: Tape, model: Any) -> Any:
    """StackingClassifier and StackingRegressor: what the estimators say is what the last one reads."""
    columns = []
    for estimator, method in zip(model.estimators_, model.stack_method_, strict=True):
        if method == "predict_proba":
            chances = _probabilities(tape, estimator)
            columns.append(chances[:, [1]] if chances.shape[1] == 2 else chances)
        elif method == "decision_function":
            columns.append(_decision(tape, estimator))
        else:
            columns.append(_matrix(tape.part(estimator)[0].to("f"), 1))
    if model.passthrough:
        columns.append(tape.merged())
    given = tape.concat(columns)
    parts = tape.part(model.final_estimator_, given)
    if not hasattr(model, "classes_"):
        return _matrix(parts[-1], 1)
    index = _vector(parts[0]).to("i") if parts[0].kind != "O" else None
    label = _vector(parts[0]) if index is None else label_of(tape, model.classes_, index)
    if len(model.classes_) == 2 and not hasattr(model, "predict_proba"):
        return label, tape.last_column(parts[-1])
    return label, _matrix(parts[-1], len(model.classes_))


def one_against_rest(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """OneVsRestClassifier with one label for each record: the class that is surest, of equal ones the last."""
    scores, chances = [], []
    for estimator in model.estimators_:
        chances.append(_probabilities(tape, estimator)[:, [1]])
        scores.append(_decision(tape, estimator) if hasattr(estimator, "decision_function") else chances[-1])
    if len(scores) == 1:
        threshold = 0.0 if hasattr(model.estimators_[0], "decision_function") else 0.5
        positive: Expression = np.where(scores[0][:, 0] > threshold, 1, 0)
        return label_of(tape, model.classes_, positive.to("i")), tape.concat([1.0 - chances[0], chances[0]])
    together, last = tape.concat(chances), len(scores) - 1
    sums = together.sum(axis=1, keepdims=True)
    index = last - tape.concat(scores[::-1]).argmax()
    return label_of(tape, model.classes_, index), together / np.where(sums == 0, 1.0, sums)


def bagged_classes(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """BaggingClassifier on all columns: the mean of the probabilities, or the share of the votes."""
    total: Any = None
    count = len(model.classes_)
    for estimator in model.estimators_:
        known = [int(number) for number in estimator.classes_]
        if hasattr(estimator, "predict_proba"):
            chance = _probabilities(tape, estimator)
            if len(known) < count:  # its sample had no record of the others
                columns = {number: chance[:, [place]] for place, number in enumerate(known)}
                chance = tape.concat([columns.get(number, chance[:, [0]] * 0.0) for number in range(count)])
        else:
            chance = np.equal(_vector(tape.part(estimator)[0])[:, None].to("f"), np.arange(count)).to("f")
        total = chance if total is None else total + chance
    mean = total / float(len(model.estimators_))
    return label_of(tape, model.classes_, mean.argmax()), mean


def bagged_numbers(tape: Tape, model: Any) -> Expression:
    """BaggingRegressor on all columns: the mean."""
    return _mean(tape, model, [1.0] * len(model.estimators_))


def multi_output_numbers(tape: Tape, model: Any) -> Expression:
    """MultiOutputRegressor: a number for each target."""
    return tape.concat([_matrix(tape.part(estimator)[-1], 1) for estimator in model.estimators_])


def output_code(tape: Tape, model: Any) -> Expression:
    """OutputCodeClassifier: the class whose code is nearest to what the estimators say."""
    said = []
    for estimator in model.estimators_:
        if type(estimator).__name__ == "_ConstantPredictor":  # a column of the code book that is the same for all
            said.append(tape.merged()[:, [0]] * 0.0 + float(np.ravel(estimator.y_)[0]))
        elif hasattr(estimator, "decision_function"):
            said.append(_decision(tape, estimator))
        else:
            said.append(_probabilities(tape, estimator)[:, [1]])
    distances = squared_distances(tape.concat(said), np.asarray(model.code_book_, dtype=np.float64))
    return label_of(tape, model.classes_, (distances * -1.0).argmax())


def multi_output(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """MultiOutputClassifier: a label for each target [N, targets], and probabilities [targets, N, classes]."""
    answers = []
    for estimator in model.estimators_:
        parts = tape.part(estimator)
        answers.append((_matrix(parts[0], 1), _matrix(parts[-1], len(estimator.classes_))))
    return side_by_side(tape, answers)
