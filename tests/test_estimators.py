"""Estimators of many kinds, end to end: converted, admitted, and scored from a table as by the server.

For any signature of the graph, the result must equal the predictions of the estimator for the same records.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from field.scored import as_matrix, assert_near
from selection import quick_of
from sklearn import datasets
from sklearn.base import is_regressor
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.compose import make_column_transformer
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.feature_selection import SelectKBest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    BayesianRidge,
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    Perceptron,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
from sklearn.naive_bayes import BernoulliNB, GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, SVR, LinearSVC, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from batchserve.admission import admit
from batchserve.conversion import convert
from batchserve.inference.binding import bind
from batchserve.inference.inputs import build_inputs
from batchserve.inference.outputs import ResultSchema, check_count
from batchserve.inference.session import open_session

"""Relative to max(1, |expected|)."""

Case = tuple[Any, pd.DataFrame]
"""A fitted estimator and the records to score."""


def fitted(model: Any, load: Callable[..., Any], names: bool = False, rows: int = 400) -> Case:
    """An estimator fitted to one of scikit-learn's data sets, in the precision of ONNX."""
    data = load(as_frame=True)
    x, y = data.data.astype("float32").head(rows), data.target.head(rows)
    return model.fit(x, data.target_names[y] if names else y), x


def standardized(model: Any) -> Any:
    return make_pipeline(StandardScaler(), model)


def iris(model: Any) -> Case:
    return fitted(model, datasets.load_iris, names=True)


def wine(model: Any) -> Case:
    return fitted(model, datasets.load_wine, names=True)


def cancer(model: Any) -> Case:
    return fitted(model, datasets.load_breast_cancer)


def digits(model: Any) -> Case:
    return fitted(model, datasets.load_digits)


def diabetes(model: Any) -> Case:
    return fitted(model, datasets.load_diabetes)


def several(model: Any) -> Case:
    """Two numbers to predict."""
    _, x = diabetes(LinearRegression())
    return model.fit(x, np.stack([x["bmi"] * 3 + x["bp"], x["s5"] - x["age"]], axis=1)), x


def labelled_twice(model: Any) -> Case:
    """Two classes to predict, one of three and one of two."""
    _, x = wine(GaussianNB())
    y = datasets.load_wine().target
    return model.fit(x, np.stack([y, y % 2], axis=1)), x


def texts(*steps: Any) -> Case:
    random = np.random.default_rng(0)
    words = {"sport": ["Goal", "team", "match", "Win"], "food": ["Salt", "soup", "bread", "Pan"]}
    topics = random.choice(list(words), 200)
    lines = [" ".join(random.choice([*words[topic], "the", "a"], 6)) for topic in topics]
    return make_pipeline(*steps).fit(lines, topics), pd.DataFrame({"line": lines})


def mixed(*steps: Any) -> Case:
    """Numbers with holes, texts, integers and booleans."""
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "Air Time": random.normal(120, 30, 400).astype("float32"),
            "carrier": random.choice(["AA", "UA", "ÖS"], 400),
            "month": random.integers(1, 13, 400),
            "weekend": random.random(400) < 2 / 7,
            "unused": pd.Timestamp("2013-01-01"),
        }
    )
    frame.loc[::9, "Air Time"] = np.nan
    frame["origin"] = frame["carrier"].where(frame["month"] != 2)
    late = (frame["month"] > 6) & (frame["carrier"] != "AA") | (frame["Air Time"] > 150)
    return make_pipeline(*steps).fit(frame, np.where(late, "late", "on time")), frame


NUMBERS = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
ONE_HOT = OneHotEncoder(handle_unknown="ignore")
COLUMNS = make_column_transformer((NUMBERS, ["Air Time", "weekend"]), (ONE_HOT, ["carrier", "month"]))
FILLED = make_column_transformer(
    (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder()), ["origin"]), (NUMBERS, ["month"])
)
ORDINAL = make_column_transformer(
    (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), ["carrier"]),
    ("passthrough", ["Air Time", "month", "weekend"]),
)


def lightgbm(kind: str, load: Callable[[Any], Case]) -> Case:
    package = pytest.importorskip("lightgbm")
    return load(getattr(package, kind)(n_estimators=10, verbose=-1, n_jobs=1))


def xgboost(kind: str, load: Callable[[Any], Case]) -> Case:
    package = pytest.importorskip("xgboost")
    return load(getattr(package, kind)(n_estimators=10, n_jobs=1))


def seeded(kind: Callable[..., Any], **options: Any) -> Any:
    return kind(random_state=0, **options)


CASES: dict[str, Callable[[], Case]] = {
    # One matrix, label and probabilities.
    "logistic regression": lambda: iris(standardized(LogisticRegression())),
    "logistic regression, two classes": lambda: cancer(standardized(LogisticRegression())),
    "naive bayes": lambda: iris(GaussianNB()),
    "bernoulli naive bayes": lambda: digits(BernoulliNB(binarize=8)),
    "linear discriminant, three classes": lambda: wine(LinearDiscriminantAnalysis()),
    "quadratic discriminant": lambda: iris(QuadraticDiscriminantAnalysis()),
    "decision tree": lambda: wine(seeded(DecisionTreeClassifier)),
    "random forest": lambda: digits(seeded(RandomForestClassifier, n_estimators=10)),
    "gradient boosting": lambda: cancer(seeded(GradientBoostingClassifier, n_estimators=10)),
    "hist gradient boosting": lambda: cancer(seeded(HistGradientBoostingClassifier, max_iter=10)),
    "ada boost": lambda: iris(seeded(AdaBoostClassifier, n_estimators=5)),
    "neighbours, raw": lambda: wine(KNeighborsClassifier()),
    "neighbours by distance": lambda: iris(KNeighborsClassifier(weights="distance")),
    "neighbours by distance, scaled": lambda: wine(standardized(KNeighborsClassifier(weights="distance"))),
    "neighbours, manhattan": lambda: wine(standardized(KNeighborsClassifier(p=1, weights="distance"))),
    "neighbours, chebyshev": lambda: cancer(KNeighborsClassifier(metric="chebyshev", weights="distance")),
    "neighbours, minkowski": lambda: wine(standardized(KNeighborsClassifier(p=3))),
    "neighbours, cosine": lambda: digits(KNeighborsClassifier(metric="cosine", weights="distance")),
    "neighbours behind axes": lambda: wine(make_pipeline(StandardScaler(), PCA(5), KNeighborsClassifier(3))),
    "neighbours in a vote": lambda: wine(
        standardized(
            VotingClassifier([("a", KNeighborsClassifier(weights="distance")), ("b", GaussianNB())], voting="soft")
        )
    ),
    "bagging": lambda: wine(seeded(BaggingClassifier, n_estimators=5)),
    # Trees behind arithmetic: values of the sample lie at their splits.
    "scaled, forest": lambda: iris(standardized(seeded(RandomForestClassifier, n_estimators=50))),
    "scaled, regression forest": lambda: diabetes(standardized(seeded(RandomForestRegressor, n_estimators=20))),
    "scaled, gradient boosting": lambda: iris(standardized(seeded(GradientBoostingClassifier, n_estimators=20))),
    "scaled to a range, xgboost": lambda: xgboost(
        "XGBRegressor", lambda model: diabetes(make_pipeline(MinMaxScaler(clip=True), model))
    ),
    "scaled by quartiles, xgboost": lambda: xgboost(
        "XGBRegressor", lambda model: diabetes(make_pipeline(RobustScaler(), model))
    ),
    "filled and scaled, forest": lambda: iris(
        make_pipeline(SimpleImputer(), MaxAbsScaler(), StandardScaler(), seeded(RandomForestClassifier))
    ),
    "mixed columns scaled, many trees": lambda: mixed(COLUMNS, seeded(RandomForestClassifier, n_estimators=50)),
    "mixed columns, a part scaled": lambda: mixed(
        make_column_transformer((NUMBERS, ["Air Time"]), (ONE_HOT, ["carrier"]), ("passthrough", ["month", "weekend"])),
        seeded(RandomForestClassifier, n_estimators=50),
    ),
    "multi-layer perceptron": lambda: iris(standardized(seeded(MLPClassifier, max_iter=1000))),
    "one versus rest": lambda: iris(OneVsRestClassifier(LogisticRegression(max_iter=500))),
    "calibrated": lambda: wine(CalibratedClassifierCV(GaussianNB(), cv=2)),
    "soft vote": lambda: wine(
        VotingClassifier([("a", GaussianNB()), ("b", standardized(LogisticRegression()))], voting="soft")
    ),
    "stack": lambda: wine(StackingClassifier([("a", GaussianNB()), ("b", standardized(LogisticRegression()))], cv=2)),
    "grid search": lambda: iris(GridSearchCV(standardized(SVC()), {"svc__C": [1, 5]}, cv=2)),
    "lightgbm classifier": lambda: lightgbm("LGBMClassifier", wine),
    "xgboost classifier": lambda: xgboost("XGBClassifier", lambda model: fitted(model, datasets.load_wine)),
    # Label and scores.
    "linear svc": lambda: wine(standardized(seeded(LinearSVC))),
    "linear svc, two classes": lambda: cancer(standardized(seeded(LinearSVC))),
    "svc, two classes": lambda: cancer(standardized(SVC())),
    "ridge classifier": lambda: cancer(standardized(RidgeClassifier())),
    "perceptron": lambda: iris(standardized(seeded(Perceptron))),
    "stochastic gradient": lambda: cancer(standardized(seeded(SGDClassifier))),
    "k-means": lambda: iris(seeded(KMeans, n_clusters=3, n_init=1)),
    "mini-batch k-means": lambda: wine(standardized(seeded(MiniBatchKMeans, n_clusters=3, n_init=1))),
    "gaussian mixture": lambda: iris(seeded(GaussianMixture, n_components=2)),
    "isolation forest": lambda: wine(seeded(IsolationForest, n_estimators=10)),
    "one-class svm": lambda: wine(standardized(OneClassSVM())),
    # Numbers.
    "linear regression": lambda: diabetes(LinearRegression()),
    "ridge": lambda: diabetes(Ridge()),
    "elastic net": lambda: diabetes(ElasticNet(alpha=0.01)),
    "bayesian ridge": lambda: diabetes(BayesianRidge()),
    "poisson": lambda: diabetes(PoissonRegressor()),
    "regression tree": lambda: diabetes(seeded(DecisionTreeRegressor, max_depth=5)),
    "regression forest": lambda: diabetes(seeded(RandomForestRegressor, n_estimators=10)),
    "extra trees": lambda: diabetes(seeded(ExtraTreesRegressor, n_estimators=10)),
    "boosted regression": lambda: diabetes(seeded(GradientBoostingRegressor, n_estimators=10)),
    "hist boosted regression": lambda: diabetes(seeded(HistGradientBoostingRegressor, max_iter=10)),
    "support vector regression": lambda: diabetes(standardized(SVR())),
    "neighbours regression": lambda: diabetes(KNeighborsRegressor()),
    "neighbours by distance, regression": lambda: diabetes(standardized(KNeighborsRegressor(weights="distance"))),
    "neighbours by distance, two targets": lambda: several(KNeighborsRegressor(weights="distance", metric="manhattan")),
    "mean of regressors": lambda: diabetes(VotingRegressor([("a", Ridge()), ("b", LinearRegression())])),
    "gaussian process": lambda: diabetes(GaussianProcessRegressor(RBF(), alpha=1.0)),
    "lightgbm regressor": lambda: lightgbm("LGBMRegressor", diabetes),
    "xgboost regressor behind a scaler": lambda: xgboost("XGBRegressor", lambda model: diabetes(standardized(model))),
    "robust scaler and polynomials": lambda: diabetes(make_pipeline(RobustScaler(), PolynomialFeatures(2), Ridge())),
    "selected columns": lambda: diabetes(make_pipeline(SelectKBest(k=3), MinMaxScaler(), LinearRegression())),
    # Several targets.
    "several numbers, linear": lambda: several(LinearRegression()),
    "several numbers, forest": lambda: several(seeded(RandomForestRegressor, n_estimators=5)),
    "several numbers, perceptron": lambda: several(seeded(MLPRegressor, hidden_layer_sizes=(8,), max_iter=1000)),
    "several numbers, one model each": lambda: several(MultiOutputRegressor(Ridge())),
    "several numbers, least squares": lambda: several(PLSRegression()),
    "several labels, one model each": lambda: labelled_twice(MultiOutputClassifier(GaussianNB())),
    "several labels, forest": lambda: labelled_twice(seeded(RandomForestClassifier, n_estimators=5)),
    # Transformers.
    "principal components": lambda: wine(standardized(PCA(3))),
    "normalizer": lambda: iris(Normalizer()),
    "bins": lambda: iris(KBinsDiscretizer(3, encode="ordinal", quantile_method="averaged_inverted_cdf")),
    "wide transform": lambda: digits(FeatureUnion([("raw", MinMaxScaler()), ("pca", PCA(8))])),
    # Texts.
    "tf-idf": lambda: texts(TfidfVectorizer(), LogisticRegression()),
    "word pairs": lambda: texts(CountVectorizer(ngram_range=(1, 2)), LogisticRegression()),
    "letters": lambda: texts(TfidfVectorizer(analyzer="char", ngram_range=(1, 2)), LinearSVC()),
    "topics": lambda: texts(TfidfVectorizer(), seeded(TruncatedSVD, n_components=3), seeded(DecisionTreeClassifier)),
    # Columns of several types.
    "mixed columns": lambda: mixed(COLUMNS, LogisticRegression()),
    "mixed columns, forest": lambda: mixed(COLUMNS, seeded(RandomForestClassifier, n_estimators=5)),
    "mixed columns, missing texts filled": lambda: mixed(FILLED, LogisticRegression()),
    "mixed columns, missing values routed": lambda: mixed(ORDINAL, seeded(HistGradientBoostingClassifier, max_iter=10)),
}


QUICK = (
    *(
        "logistic regression",
        "several labels, forest",
        "mixed columns, missing texts filled",
        "tf-idf",
        "scaled, forest",
    ),
)
"""The others run with the slow tests."""


@pytest.mark.parametrize("name", quick_of(CASES, QUICK))
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_table_is_scored_as_the_estimator_would(name: str) -> None:
    model, frame = CASES[name]()
    table = pl.DataFrame(frame.astype(object).where(frame.notna(), None).to_dict("list"))
    result = score_as_the_server(convert(model, frame).onnx, table)
    assert len(result) == len(frame)
    x = frame["line"].tolist() if "line" in frame else frame
    labels = [column for column in result.columns if column.startswith("prediction")]
    if not is_about_numbers(model):
        expected = np.asarray(model.predict(x)).reshape(len(frame), -1)
        assert np.array_equal(result.select(labels).to_numpy().astype(str), expected.astype(str))
        result = result.drop(labels)
    assert_near(as_matrix(result), numbers_of(model, x))


def score_as_the_server(graph: bytes, table: pl.DataFrame) -> pl.DataFrame:
    admitted = admit(graph)
    signature = admitted.signature
    binding = bind(signature, table.columns)
    inputs, failed, errors = build_inputs(signature, binding, table)
    assert not failed.any()
    assert not errors
    arrays = {name: array for name, array in inputs.items() if isinstance(array, np.ndarray)}
    outputs = open_session(admitted.model, signature.threads).run(arrays)
    check_count(outputs, len(table))
    return ResultSchema(signature).frame(outputs)


def is_about_numbers(model: Any) -> bool:
    return is_regressor(model) or not hasattr(model, "predict")


def numbers_of(model: Any, x: Any) -> np.ndarray[Any, Any]:
    """The numeric predictions of the estimator, as [n, k]."""
    methods = ["predict"] if is_about_numbers(model) and hasattr(model, "predict") else []
    methods += ["predict_proba", "decision_function", "transform"]
    numbers = getattr(model, next(method for method in methods if hasattr(model, method)))(x)
    numbers = numbers if isinstance(numbers, list) else [numbers]
    return np.column_stack([np.asarray(target, dtype=np.float64) for target in numbers])
