"""Estimators that are a few lines of linear algebra: projections, kernels, distances, mixtures of constants."""

from typing import Any

import numpy as np
from onnx import TensorProto

from batchserve.conversion.converters.tape import EXAMPLES, Expression, Tape, Untraceable, Value
from batchserve.conversion.sample import Array
from batchserve.errors import ConversionFailed


def label_of(tape: Tape, classes: Any, index: Expression) -> Expression:
    """The class at each index [N]."""
    classes = np.asarray(classes)
    table = tape.constant(classes if classes.dtype.kind in "OUS" else classes.astype(np.int64))
    return tape.node("Gather", table, index, example=table.example[index.example], axis=0)


def squared_distances(x: Expression, points: Array) -> Expression:
    """[N, points]: Euclidean, squared; around the mean of the points, where float32 loses least."""
    centre = points.mean(axis=0)
    x, points = x - centre, points - centre
    cross = x @ (-2 * points.T)
    return np.maximum(cross + (points**2).sum(axis=1) + (x * x).sum(axis=1, keepdims=True), 0.0)


def kernel(x: Expression, points: Array, name: str, gamma: Any, degree: Any, coef0: Any) -> Expression:
    """[N, points]: one of scikit-learn's pairwise kernels."""
    gamma = 1.0 / points.shape[1] if gamma is None else float(gamma)
    coef0 = 1.0 if coef0 is None else float(coef0)
    match name:
        case "linear":
            return x @ points.T
        case "rbf":
            return np.exp(squared_distances(x, points) * -gamma)
        case "poly" | "polynomial":
            return (x @ points.T * gamma + coef0) ** float(3 if degree is None else degree)
        case "sigmoid":
            return np.tanh(x @ points.T * gamma + coef0)
        case "cosine":
            length = np.sqrt((x * x).sum(axis=1, keepdims=True))
            return x @ (points / np.linalg.norm(points, axis=1, keepdims=True)).T / np.maximum(length, 1e-30)
    raise ConversionFailed(
        f"The kernel {name!r} has no ONNX converter. Use kernel='rbf', 'linear', 'poly', 'sigmoid' or 'cosine'."
    )


def projection(tape: Tape, model: Any) -> Expression:
    """Transformers that are a matrix and a mean."""
    x = tape.merged()
    match type(model).__name__:
        case "FastICA":
            centred = x - model.mean_ if getattr(model, "whiten", True) else x
            return centred @ model.components_.T
        case "FactorAnalysis":
            scaled = model.components_ / model.noise_variance_
            covariance = np.linalg.inv(np.eye(len(model.components_)) + scaled @ model.components_.T)
            return (x - model.mean_) @ (scaled.T @ covariance)
        case "SparseRandomProjection":
            components = model.components_
            return x @ np.asarray(components.todense() if hasattr(components, "todense") else components).T
    raise AssertionError(type(model))


def discriminant(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """LinearDiscriminantAnalysis as a classifier."""
    scores = tape.merged() @ model.coef_.T + model.intercept_
    if len(model.classes_) == 2:
        second = sigmoid(scores[:, [0]])
        probabilities = tape.concat([1.0 - second, second])
        index = (scores[:, 0] > 0).to("i")
        return label_of(tape, model.classes_, index), probabilities
    return label_of(tape, model.classes_, scores.argmax()), softmax(tape, scores)


def stochastic_gradient(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """SGDClassifier: the label by the scores, of which rounded probabilities would make equal ones. In float64, because
    the weights of numbers that are not scaled are large, and scores of -100 and -101 tell classes apart."""
    x, weights = tape.wide_merged(), np.asarray(model.coef_, np.float64).T
    # Behind a text its width may not be known.
    product = tape.node("MatMul", x, tape.constant(weights, "d"), example=np.ones((EXAMPLES, weights.shape[1])))
    shift = tape.constant(np.reshape(model.intercept_, (1, -1)), "d")
    scores = tape.node("Add", product, shift, example=product.example)
    if len(model.classes_) == 2:
        negative = tape.node("Neg", scores, example=scores.example)
        scores = tape.node("Concat", negative, scores, example=np.repeat(scores.example, 2, axis=1), axis=1)
    label = label_of(tape, model.classes_, scores.argmax())
    raw = tape.container.get_options(model, {"raw_scores": False})["raw_scores"]
    if not raw and model.loss == "log_loss":
        scores = _shares_of_sigmoids(tape, scores) if len(model.classes_) > 2 else sigmoid(scores)
    elif not raw and model.loss == "modified_huber":
        scores = _shares_of_halves(tape, scores)
    return label, tape.node("Cast", scores, example=scores.example.astype(np.float32), to=TensorProto.FLOAT)


def _shares_of_sigmoids(tape: Tape, scores: Value) -> Value:
    """Sigmoids that are divided by their sum, as SciPy computes them: 0 only where the exponential is infinite."""
    one, example = tape.constant([[1.0]], "d"), scores.example
    large = tape.node("Exp", tape.node("Neg", scores, example=example), example=example)
    return _shares(tape, tape.node("Div", one, tape.node("Add", large, one, example=example), example=example))


def _shares_of_halves(tape: Tape, scores: Value) -> Value:
    """(score + 1) / 2 within 0 and 1, divided by their sum; all equal where each is 0."""
    one, example = tape.constant([[1.0]], "d"), scores.example
    clipped = tape.node("Max", scores, tape.constant([[-1.0]], "d"), example=example)
    clipped = tape.node("Min", clipped, one, example=example)
    raised = tape.node("Add", clipped, one, example=example)
    return _shares(tape, raised)


def _shares(tape: Tape, parts: Value) -> Value:
    """Divided by their sum; all equal where each is 0."""
    total, example = parts.sum(axis=1, keepdims=True), parts.example
    some = tape.node("Greater", total, tape.constant([[0.0]], "d"), example=total.example > 0)
    parts = tape.node("Where", some, parts, tape.constant([[1.0]], "d"), example=example)
    return tape.node("Div", parts, parts.sum(axis=1, keepdims=True), example=example)


def has_chances_or_more_classes(model: Any) -> bool:
    """The sign of one score is left to skl2onnx."""
    return len(model.classes_) > 2 or hasattr(model, "predict_proba")


def naive_bayes(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    """MultinomialNB and ComplementNB. Only differences between the classes count, which float32 keeps best around 0."""
    weights = model.feature_log_prob_
    if np.isfinite(weights).all():
        weights = weights - weights.mean(axis=0)
    likelihood = tape.merged() @ weights.T
    if type(model).__name__ == "MultinomialNB" or len(model.classes_) == 1:
        likelihood = likelihood + model.class_log_prior_
    return label_of(tape, model.classes_, likelihood.argmax()), softmax(tape, likelihood)


def transformed(tape: Tape, model: Any) -> Expression:
    """A discriminant analysis or a clusterer within a pipeline: its axes, or the distance to each centre."""
    x, estimator = tape.merged(), model.estimator
    if type(estimator).__name__ != "LinearDiscriminantAnalysis":
        centres = getattr(estimator, "cluster_centers_", None)
        return np.sqrt(squared_distances(x, estimator.subcluster_centers_ if centres is None else centres))
    width = estimator.transform(np.ones((1, estimator.n_features_in_))).shape[1]
    if estimator.solver == "svd":
        x = x - estimator.xbar_
    return x @ estimator.scalings_[:, :width]


def sigmoid(x: Expression) -> Expression:
    return x.tape.node("Sigmoid", x, example=x.example)


def softmax(tape: Tape, x: Expression) -> Expression:
    return tape.node("Softmax", x, example=x.example, axis=1)


def nearest_centroid(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    if model.metric != "euclidean":
        raise ConversionFailed(
            f"NearestCentroid(metric={model.metric!r}) has no ONNX converter. Use metric='euclidean'."
        )
    x = tape.merged()
    scale = np.where(model.within_class_std_dev_ == 0, 1.0, model.within_class_std_dev_)
    scores = 2 * np.log(model.class_prior_) - squared_distances(x / scale, model.centroids_ / scale)
    uniform = np.isclose(model.class_prior_, 1 / len(model.classes_)).all()
    plain = uniform and model.shrink_threshold is None
    chosen = squared_distances(x, model.centroids_) * -1.0 if plain else scores
    return label_of(tape, model.classes_, chosen.argmax()), softmax(tape, scores)


def kernel_ridge(tape: Tape, model: Any) -> Expression:
    points = np.asarray(model.X_fit_)
    similar = kernel(tape.merged(), points, model.kernel, model.gamma, model.degree, model.coef0)
    return similar @ np.asarray(model.dual_coef_).reshape(len(points), -1)


def nystroem(tape: Tape, model: Any) -> Expression:
    similar = kernel(tape.merged(), model.components_, model.kernel, model.gamma, model.degree, model.coef0)
    return similar @ model.normalization_.T


def rbf_sampler(tape: Tape, model: Any) -> Expression:
    waves = tape.merged() @ model.random_weights_ + model.random_offset_
    return np.cos(waves) * float(np.sqrt(2.0 / model.n_components))


def nearest_point(tape: Tape, model: Any) -> Expression:
    """Clusterers that give the label of the nearest of some points."""
    x = tape.merged()
    match type(model).__name__:
        case "Birch":
            points, labels = model.subcluster_centers_, model.subcluster_labels_
        case "BisectingKMeans":
            return bisecting(tape, model, x)
        case _:
            points, labels = model.cluster_centers_, np.arange(len(model.cluster_centers_))
    distances = squared_distances(x, np.asarray(points))
    label = label_of(tape, labels, (distances * -1.0).argmax())
    return (label, np.sqrt(distances)) if hasattr(model, "transform") else label


def bisecting(tape: Tape, model: Any, x: Expression) -> tuple[Expression, Expression]:
    """Walks down the tree of halves: at each the nearer of two centres."""
    mean = getattr(model, "_X_mean", 0.0)

    def walk(node: Any) -> Expression:
        if node.left is None:
            return tape.constant(np.array([node.label], dtype=np.int64))
        pair = np.vstack([node.left.center, node.right.center]) + mean
        distances = squared_distances(x, pair)
        return np.where(distances[:, 0] <= distances[:, 1], walk(node.left), walk(node.right))

    label = walk(model._bisecting_tree)
    return label, np.sqrt(squared_distances(x, model.cluster_centers_))


def elliptic_envelope(tape: Tape, model: Any) -> tuple[Expression, Expression]:
    centred = tape.merged() - model.location_
    distances = (centred @ model.get_precision() * centred).sum(axis=1, keepdims=True)
    scores = -distances - float(model.offset_)
    inside = (scores[:, 0] >= 0).to("i")
    return inside * 2 - 1, scores


def radius_neighbours(tape: Tape, model: Any) -> Any:
    if model.effective_metric_ != "euclidean" or model.weights != "uniform":
        raise ConversionFailed(
            f"{type(model).__name__} converts with a Euclidean metric and weights='uniform'; "
            "use these, or a KNeighbors estimator."
        )
    near = (squared_distances(tape.merged(), np.asarray(model._fit_X)) <= float(model.radius) ** 2).to("f")
    count = near.sum(axis=1, keepdims=True)
    targets = np.asarray(model._y)
    if not hasattr(model, "classes_"):
        return near @ targets.reshape(len(targets), -1) / count
    if isinstance(model.classes_, list) or model.outlier_label is not None:
        raise ConversionFailed(
            "RadiusNeighborsClassifier converts with one target and outlier_label=None; use KNeighborsClassifier."
        )
    shares = near @ np.eye(len(model.classes_))[targets.reshape(-1)] / count
    return label_of(tape, model.classes_, shares.argmax()), shares


def constant(tape: Tape, model: Any) -> Any:
    """DummyClassifier and DummyRegressor."""
    x = tape.variables[0]
    first = tape.node("Shape", Value(tape, x.full_name, np.zeros(1)), example=np.array([7]), start=0, end=1)
    if hasattr(model, "classes_"):
        if model.strategy not in ("prior", "most_frequent", "constant"):
            raise ConversionFailed(
                f"DummyClassifier(strategy={model.strategy!r}) draws its answers at random. Use strategy='prior'."
            )
        if isinstance(model.classes_, list):
            raise Untraceable("it has several targets")
        row = model.predict_proba(np.zeros((1, model.n_features_in_)))[0]
        index = int(np.flatnonzero(model.classes_ == model.predict(np.zeros((1, model.n_features_in_)))[0])[0])
        many = _repeated(tape, np.array([index]), first)[:, 0]
        return label_of(tape, model.classes_, many), _repeated(tape, row.astype(np.float32), first)
    return _repeated(tape, model.constant_.reshape(-1).astype(np.float32), first)


def _repeated(tape: Tape, row: Array, count: Expression) -> Expression:
    width = tape.constant(np.array([len(row)], dtype=np.int64))
    shape = tape.node("Concat", count, width, example=np.array([7, len(row)]), axis=0)
    return tape.node("Expand", tape.constant(row[None]), shape, example=np.repeat(row[None], 7, axis=0))
