"""Classifiers of Gaussian processes: kernels of scikit-learn, and the chance that a process gives a class."""

from typing import Any

import numpy as np

from batchserve.conversion.converters.algebra import label_of, squared_distances
from batchserve.conversion.converters.tape import Expression, Tape
from batchserve.conversion.sample import Array
from batchserve.errors import ConversionFailed

_STEPS, _WEIGHTS = np.polynomial.legendre.leggauss(5)


def gaussian_process(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """One process for two classes; for more, one for each class against the others."""
    if model.multi_class != "one_vs_rest" and len(model.classes_) > 2:
        raise ConversionFailed(
            f"GaussianProcessClassifier(multi_class={model.multi_class!r}) has no ONNX converter. "
            "Use multi_class='one_vs_rest'."
        )
    x = tape.merged()
    inner = model.base_estimator_
    if len(model.classes_) == 2:
        chance = _chance(tape, inner, x)
        # The label is by the sign of the latent mean, of which the chance is one half at zero.
        both = tape.concat([1.0 - chance, chance])
        return label_of(tape, model.classes_, both.argmax()), both
    chances = tape.concat([_chance(tape, process, x) for process in inner.estimators_])
    shares = chances / np.maximum(chances.sum(axis=1, keepdims=True), 1e-30)
    return label_of(tape, model.classes_, chances.argmax()), shares


def _chance(tape: Tape, process: Any, x: Expression) -> Expression:
    """[N, 1]: of the second class, as `predict_proba` of scikit-learn approximates the logistic integral."""
    similar, own = _kernel(process.kernel_, x, process.X_train_)
    mean = similar @ (process.y_train_ - process.pi_).reshape(-1, 1)
    root = np.linalg.inv(process.L_) * process.W_sr_
    explained = similar @ root.T
    variance = np.maximum(own - (explained * explained).sum(axis=1, keepdims=True), 0.0)
    return _squashed(tape, mean, variance)


def _squashed(tape: Tape, mean: Expression, variance: Expression) -> Expression:
    """The sum of `COEFS` * (1 + erf(slope * mean)) / 2, where slope is `LAMBDAS` / sqrt(1 + 2 variance `LAMBDAS`^2).

    The coefficients are thousands of both signs, and float32 would lose four digits: so the differences of the error
    functions to one of them are integrated, which are small.
    """
    from sklearn.gaussian_process._gpc import COEFS, LAMBDAS

    factors, weights = np.asarray(LAMBDAS).ravel(), np.asarray(COEFS).ravel()
    middle = float(factors[np.argmax(np.abs(weights))])
    below = 2.0 * middle**2 * variance + 1.0
    base = middle / np.sqrt(below)
    total = tape.node("Erf", base * mean, example=mean.example) * float(weights.sum())
    for factor, weight in zip(factors.tolist(), weights.tolist(), strict=True):
        if factor == middle:
            continue
        this = 2.0 * factor**2 * variance + 1.0
        slope = factor / np.sqrt(this)
        half = (factor**2 - middle**2) / (this * below) / (slope + base) * mean * 0.5
        centre = (slope + base) * 0.5 * mean
        for step, share in zip(_STEPS.tolist(), _WEIGHTS.tolist(), strict=True):
            at = centre + half * step
            total = total + half * np.exp(at * at * -1.0) * (share * weight * 2 / float(np.sqrt(np.pi)))
    return (total + float(weights.sum())) * 0.5


def _kernel(kernel: Any, x: Expression, points: Array) -> tuple[Expression, Any]:
    """[N, points], and the kernel of each record with itself: a number, or [N, 1]."""
    kind = type(kernel).__name__
    match kind:
        case "Sum" | "Product":
            (one, own), (two, other) = _kernel(kernel.k1, x, points), _kernel(kernel.k2, x, points)
            return (one + two, own + other) if kind == "Sum" else (one * two, own * other)
        case "Exponentiation":
            inner, own = _kernel(kernel.kernel, x, points)
            return inner ** float(kernel.exponent), own ** float(kernel.exponent)
        case "ConstantKernel":
            return x[:, [0]] * np.zeros((1, len(points))) + float(kernel.constant_value), float(kernel.constant_value)
        case "WhiteKernel":
            return x[:, [0]] * np.zeros((1, len(points))), float(kernel.noise_level)
        case "DotProduct":
            square = float(kernel.sigma_0) ** 2
            return x @ points.T + square, (x * x).sum(axis=1, keepdims=True) + square
        case "RBF" | "Matern":
            squares = squared_distances(x / kernel.length_scale, points / kernel.length_scale)
            return _of_distance(squares, getattr(kernel, "nu", np.inf)), 1.0
        case "RationalQuadratic":
            scale = 2.0 * float(kernel.alpha) * float(kernel.length_scale) ** 2
            return (squared_distances(x, points) / scale + 1.0) ** -float(kernel.alpha), 1.0
    raise ConversionFailed(
        f"The kernel {kind} of a Gaussian process has no ONNX converter. Use RBF, Matern, RationalQuadratic, "
        "DotProduct, ConstantKernel and WhiteKernel, and sums and products of them."
    )


def _of_distance(squares: Expression, nu: float) -> Expression:
    if nu == np.inf:
        return np.exp(squares * -0.5)
    distance = np.sqrt(squares) * float(np.sqrt(2 * nu))
    match nu:
        case 0.5:
            return np.exp(distance * -1.0)
        case 1.5:
            return (distance + 1.0) * np.exp(distance * -1.0)
        case 2.5:
            return (distance + distance * distance * (1 / 3) + 1.0) * np.exp(distance * -1.0)
    raise ConversionFailed(f"Matern(nu={nu}) has no ONNX converter. Use nu=0.5, 1.5, 2.5 or np.inf.")
