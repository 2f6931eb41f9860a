"""Estimators as people train them, by the kind of their work."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import (
    DBSCAN,
    AffinityPropagation,
    AgglomerativeClustering,
    Birch,
    BisectingKMeans,
    KMeans,
    MeanShift,
    MiniBatchKMeans,
)
from sklearn.compose import TransformedTargetRegressor, make_column_selector, make_column_transformer
from sklearn.covariance import EllipticEnvelope
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import (
    NMF,
    PCA,
    FactorAnalysis,
    FastICA,
    IncrementalPCA,
    KernelPCA,
    LatentDirichletAllocation,
    TruncatedSVD,
)
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import (
    AdaBoostClassifier,
    AdaBoostRegressor,
    BaggingClassifier,
    BaggingRegressor,
    ExtraTreesClassifier,
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    RandomTreesEmbedding,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 - lets IterativeImputer be imported
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.feature_selection import (
    RFE,
    RFECV,
    SelectFromModel,
    SelectKBest,
    SequentialFeatureSelector,
    VarianceThreshold,
)
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, Matern, RationalQuadratic, WhiteKernel
from sklearn.impute import IterativeImputer, KNNImputer, MissingIndicator, SimpleImputer
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import (
    ARDRegression,
    BayesianRidge,
    ElasticNet,
    ElasticNetCV,
    GammaRegressor,
    HuberRegressor,
    Lars,
    Lasso,
    LassoCV,
    LassoLarsIC,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    OrthogonalMatchingPursuit,
    Perceptron,
    PoissonRegressor,
    QuantileRegressor,
    RANSACRegressor,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    RidgeCV,
    SGDClassifier,
    SGDOneClassSVM,
    SGDRegressor,
    TheilSenRegressor,
    TweedieRegressor,
)
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.model_selection import FixedThresholdClassifier, GridSearchCV, TunedThresholdClassifierCV
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier, OutputCodeClassifier
from sklearn.multioutput import ClassifierChain, MultiOutputClassifier, MultiOutputRegressor, RegressorChain
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, ComplementNB, GaussianNB, MultinomialNB
from sklearn.neighbors import (
    KNeighborsClassifier,
    KNeighborsRegressor,
    LocalOutlierFactor,
    NearestCentroid,
    NeighborhoodComponentsAnalysis,
    RadiusNeighborsClassifier,
    RadiusNeighborsRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.random_projection import GaussianRandomProjection, SparseRandomProjection
from sklearn.svm import SVC, SVR, LinearSVC, LinearSVR, NuSVC, NuSVR, OneClassSVM
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor, ExtraTreeClassifier

from field.data import (
    Case,
    cancer,
    cancer_bool,
    categorical,
    categorical_classes,
    categorical_numbers,
    codes,
    counts,
    diabetes,
    digits,
    gaps,
    iris,
    load,
    mixed,
    mixed_numbers,
    ranked,
    seeded,
    standardized,
    texts,
    two_labels,
    two_numbers,
    wine,
    yes_and_no,
)

Cases = dict[str, Callable[[], Case]]

NUMBERS = make_column_selector(dtype_include=["number", "bool"])
TEXTS = make_column_selector(dtype_exclude=["number", "bool"])


def log_and_ratio(x: np.ndarray) -> np.ndarray:
    """A function of one's own, of NumPy's operations."""
    return np.column_stack([np.log(x[:, 0] + 1), x[:, 1] / x[:, 2], np.clip(x[:, 3], 0, 1)])


def scaled_forest() -> Any:
    return standardized(seeded(RandomForestClassifier, n_estimators=9))


CLASSIFIERS: Cases = {
    "LogisticRegression": lambda: iris(standardized(LogisticRegression())),
    "LogisticRegression, labels False and True": lambda: cancer_bool(standardized(LogisticRegression())),
    "LogisticRegressionCV": lambda: cancer(
        standardized(LogisticRegressionCV(Cs=3, cv=2, use_legacy_attributes=False, scoring="accuracy"))
    ),
    "RidgeClassifier": lambda: wine(standardized(RidgeClassifier())),
    "RidgeClassifierCV": lambda: cancer(standardized(RidgeClassifierCV())),
    "SGDClassifier, log loss": lambda: cancer(standardized(seeded(SGDClassifier, loss="log_loss"))),
    "SGDClassifier, hinge": lambda: wine(standardized(seeded(SGDClassifier))),
    "Perceptron": lambda: iris(standardized(seeded(Perceptron))),
    "LinearDiscriminantAnalysis": lambda: wine(LinearDiscriminantAnalysis()),
    "LinearDiscriminantAnalysis, two classes": lambda: cancer(LinearDiscriminantAnalysis()),
    "QuadraticDiscriminantAnalysis": lambda: iris(QuadraticDiscriminantAnalysis()),
    "LinearSVC": lambda: wine(standardized(seeded(LinearSVC))),
    "SVC": lambda: cancer(standardized(SVC())),
    "SVC, three classes": lambda: wine(standardized(SVC())),
    "NuSVC": lambda: wine(standardized(NuSVC())),
    "KNeighborsClassifier": lambda: wine(standardized(KNeighborsClassifier())),
    "KNeighborsClassifier, weights by distance": lambda: iris(KNeighborsClassifier(weights="distance")),
    "RadiusNeighborsClassifier": lambda: iris(standardized(RadiusNeighborsClassifier(radius=3))),
    "NearestCentroid": lambda: iris(NearestCentroid()),
    "GaussianNB": lambda: iris(GaussianNB()),
    "BernoulliNB": lambda: digits(BernoulliNB(binarize=8)),
    "MultinomialNB": lambda: digits(MultinomialNB()),
    "ComplementNB": lambda: digits(ComplementNB()),
    "CategoricalNB": lambda: codes(CategoricalNB()),
    "DecisionTreeClassifier": lambda: wine(seeded(DecisionTreeClassifier)),
    "ExtraTreeClassifier": lambda: wine(seeded(ExtraTreeClassifier)),
    "RandomForestClassifier": lambda: cancer(seeded(RandomForestClassifier, n_estimators=20)),
    "RandomForestClassifier, labels False and True": lambda: cancer_bool(
        seeded(RandomForestClassifier, n_estimators=9)
    ),
    "RandomForestClassifier, missing values": lambda: gaps(seeded(RandomForestClassifier, n_estimators=20)),
    "DecisionTreeClassifier, missing values": lambda: gaps(seeded(DecisionTreeClassifier)),
    "ExtraTreesClassifier": lambda: iris(seeded(ExtraTreesClassifier, n_estimators=20)),
    "GradientBoostingClassifier": lambda: wine(seeded(GradientBoostingClassifier, n_estimators=10)),
    "HistGradientBoostingClassifier": lambda: cancer(seeded(HistGradientBoostingClassifier, max_iter=20)),
    "HistGradientBoostingClassifier, three classes": lambda: wine(seeded(HistGradientBoostingClassifier, max_iter=10)),
    "AdaBoostClassifier": lambda: iris(seeded(AdaBoostClassifier, n_estimators=10)),
    "BaggingClassifier": lambda: wine(seeded(BaggingClassifier, n_estimators=5)),
    "MLPClassifier": lambda: iris(standardized(seeded(MLPClassifier, max_iter=1000))),
    "GaussianProcessClassifier": lambda: iris(standardized(seeded(GaussianProcessClassifier))),
    "GaussianProcessClassifier, two classes": lambda: cancer(standardized(seeded(GaussianProcessClassifier))),
    "GaussianProcessClassifier, a sum of kernels": lambda: iris(
        seeded(
            GaussianProcessClassifier,
            kernel=2.0 * Matern([1, 2, 1, 2]) + WhiteKernel() + RationalQuadratic(),
            optimizer=None,
        )
    ),
    "DummyClassifier": lambda: iris(DummyClassifier(strategy="prior")),
}

META: Cases = {
    "CalibratedClassifierCV, sigmoid": lambda: wine(CalibratedClassifierCV(standardized(LinearSVC()), cv=2)),
    "CalibratedClassifierCV of a forest, missing values": lambda: gaps(
        CalibratedClassifierCV(seeded(RandomForestClassifier, n_estimators=5), cv=2)
    ),
    "CalibratedClassifierCV, isotonic": lambda: cancer(
        CalibratedClassifierCV(seeded(RandomForestClassifier, n_estimators=5), method="isotonic", cv=2)
    ),
    "StackingClassifier": lambda: wine(
        StackingClassifier([("a", GaussianNB()), ("b", standardized(LogisticRegression()))], cv=2)
    ),
    "VotingClassifier, soft": lambda: wine(
        VotingClassifier([("a", GaussianNB()), ("b", standardized(LogisticRegression()))], voting="soft")
    ),
    "VotingClassifier, hard": lambda: iris(
        VotingClassifier([("a", GaussianNB()), ("b", LogisticRegression(max_iter=500)), ("c", SVC())])
    ),
    "OneVsRestClassifier": lambda: iris(OneVsRestClassifier(LogisticRegression(max_iter=500))),
    "OneVsRestClassifier, several labels": lambda: yes_and_no(standardized(OneVsRestClassifier(LogisticRegression()))),
    "OneVsOneClassifier": lambda: wine(standardized(OneVsOneClassifier(LogisticRegression()))),
    "OutputCodeClassifier": lambda: iris(seeded(OutputCodeClassifier, estimator=LogisticRegression(max_iter=500))),
    "GridSearchCV": lambda: iris(GridSearchCV(standardized(SVC()), {"svc__C": [1, 5]}, cv=2)),
    "FixedThresholdClassifier": lambda: cancer(
        FixedThresholdClassifier(standardized(LogisticRegression()), threshold=0.9)
    ),
    "FixedThresholdClassifier, decision_function": lambda: cancer(
        FixedThresholdClassifier(standardized(LinearSVC()), threshold=0.7)
    ),
    "TunedThresholdClassifierCV": lambda: cancer(
        TunedThresholdClassifierCV(standardized(LogisticRegression()), scoring="precision", cv=2)
    ),
    "MultiOutputClassifier": lambda: two_labels(MultiOutputClassifier(standardized(LogisticRegression()))),
    "RandomForestClassifier, several targets": lambda: two_labels(seeded(RandomForestClassifier, n_estimators=5)),
    "DecisionTreeClassifier, several labels": lambda: yes_and_no(seeded(DecisionTreeClassifier, max_depth=2)),
    "ClassifierChain": lambda: yes_and_no(standardized(ClassifierChain(LogisticRegression(), order=[2, 0, 1]))),
    "ClassifierChain, forests": lambda: yes_and_no(
        seeded(ClassifierChain, estimator=seeded(RandomForestClassifier, n_estimators=5))
    ),
    "KNeighborsClassifier, several labels": lambda: yes_and_no(standardized(KNeighborsClassifier())),
    "MLPClassifier, several labels": lambda: yes_and_no(standardized(seeded(MLPClassifier, max_iter=500))),
    "MultiOutputRegressor": lambda: two_numbers(
        MultiOutputRegressor(seeded(GradientBoostingRegressor, n_estimators=5))
    ),
    "RegressorChain": lambda: two_numbers(RegressorChain(Ridge(), order=[1, 0])),
    "StackingRegressor": lambda: diabetes(StackingRegressor([("a", Ridge()), ("b", LinearRegression())], cv=2)),
    "VotingClassifier of LightGBM and XGBoost": lambda: wine(
        VotingClassifier(
            [
                (
                    "a",
                    pytest.importorskip("lightgbm").LGBMClassifier(
                        boosting_type="rf", bagging_fraction=0.5, bagging_freq=1, n_estimators=9, verbose=-1
                    ),
                ),
                ("b", pytest.importorskip("xgboost").XGBClassifier(booster="dart", n_estimators=9)),
            ],
            voting="soft",
        )
    ),
    "VotingClassifier, scaled forests": lambda: wine(
        VotingClassifier([("a", scaled_forest()), ("b", standardized(LogisticRegression()))], voting="soft")
    ),
    "StackingClassifier, scaled forests": lambda: iris(
        StackingClassifier([("a", scaled_forest()), ("b", standardized(SVC()))], cv=2)
    ),
    "CalibratedClassifierCV, scaled forest": lambda: wine(CalibratedClassifierCV(scaled_forest(), cv=2)),
    "BaggingClassifier, scaled trees": lambda: iris(
        seeded(BaggingClassifier, estimator=standardized(DecisionTreeClassifier()))
    ),
    "OneVsRestClassifier, scaled forests": lambda: iris(OneVsRestClassifier(scaled_forest())),
    "SelectKBest, scaled forest": lambda: wine(make_pipeline(SelectKBest(k=3), scaled_forest())),
    "PolynomialFeatures, scaled forest": lambda: iris(make_pipeline(PolynomialFeatures(), scaled_forest())),
    "VotingRegressor": lambda: diabetes(VotingRegressor([("a", Ridge()), ("b", LinearRegression())])),
    "TransformedTargetRegressor, log1p": lambda: diabetes(
        TransformedTargetRegressor(LinearRegression(), func=np.log1p, inverse_func=np.expm1)
    ),
    "TransformedTargetRegressor, QuantileTransformer": lambda: diabetes(
        TransformedTargetRegressor(Ridge(), transformer=QuantileTransformer(n_quantiles=50))
    ),
    "TransformedTargetRegressor, StandardScaler": lambda: diabetes(
        TransformedTargetRegressor(SVR(), transformer=StandardScaler())
    ),
}

REGRESSORS: Cases = {
    "LinearRegression": lambda: diabetes(LinearRegression()),
    "LinearRegression, several targets": lambda: two_numbers(LinearRegression()),
    "Ridge": lambda: diabetes(Ridge()),
    "RidgeCV": lambda: diabetes(RidgeCV()),
    "Lasso": lambda: diabetes(Lasso()),
    "LassoCV": lambda: diabetes(LassoCV(cv=2)),
    "ElasticNet": lambda: diabetes(ElasticNet(alpha=0.01)),
    "ElasticNetCV": lambda: diabetes(ElasticNetCV(cv=2)),
    "Lars": lambda: diabetes(Lars()),
    "LassoLarsIC": lambda: diabetes(LassoLarsIC()),
    "OrthogonalMatchingPursuit": lambda: diabetes(OrthogonalMatchingPursuit()),
    "BayesianRidge": lambda: diabetes(BayesianRidge()),
    "ARDRegression": lambda: diabetes(ARDRegression()),
    "HuberRegressor": lambda: diabetes(HuberRegressor(max_iter=1000)),
    "RANSACRegressor": lambda: diabetes(seeded(RANSACRegressor)),
    "TheilSenRegressor": lambda: diabetes(seeded(TheilSenRegressor, max_subpopulation=500)),
    "QuantileRegressor": lambda: diabetes(QuantileRegressor(alpha=0.01)),
    "SGDRegressor": lambda: diabetes(standardized(seeded(SGDRegressor))),
    "PoissonRegressor": lambda: counts(PoissonRegressor()),
    "GammaRegressor": lambda: diabetes(GammaRegressor()),
    "TweedieRegressor": lambda: diabetes(TweedieRegressor(power=1.5)),
    "KernelRidge": lambda: diabetes(KernelRidge(kernel="rbf")),
    "SVR": lambda: diabetes(standardized(SVR())),
    "LinearSVR": lambda: diabetes(standardized(seeded(LinearSVR))),
    "NuSVR": lambda: diabetes(standardized(NuSVR())),
    "KNeighborsRegressor": lambda: diabetes(KNeighborsRegressor()),
    "KNeighborsRegressor, weights by distance": lambda: diabetes(KNeighborsRegressor(weights="distance", p=1)),
    "RadiusNeighborsRegressor": lambda: diabetes(RadiusNeighborsRegressor(radius=0.2)),
    "GaussianProcessRegressor": lambda: diabetes(GaussianProcessRegressor(RBF() + WhiteKernel(), normalize_y=True)),
    "MLPRegressor": lambda: diabetes(standardized(seeded(MLPRegressor, max_iter=500))),
    "DecisionTreeRegressor": lambda: diabetes(seeded(DecisionTreeRegressor, max_depth=6)),
    "RandomForestRegressor": lambda: diabetes(seeded(RandomForestRegressor, n_estimators=20)),
    "RandomForestRegressor, several targets": lambda: two_numbers(seeded(RandomForestRegressor, n_estimators=5)),
    "RandomForestRegressor, missing values": lambda: gaps(seeded(RandomForestRegressor, n_estimators=20)),
    "RandomForestRegressor, missing values, several targets": lambda: gaps(
        seeded(RandomForestRegressor, n_estimators=5), targets=2
    ),
    "ExtraTreesRegressor": lambda: diabetes(seeded(ExtraTreesRegressor, n_estimators=20)),
    "GradientBoostingRegressor": lambda: diabetes(seeded(GradientBoostingRegressor, n_estimators=20)),
    "HistGradientBoostingRegressor": lambda: diabetes(seeded(HistGradientBoostingRegressor, max_iter=20)),
    "HistGradientBoostingRegressor, Poisson": lambda: counts(
        seeded(HistGradientBoostingRegressor, max_iter=20, loss="poisson")
    ),
    "HistGradientBoostingRegressor, gamma": lambda: diabetes(
        seeded(HistGradientBoostingRegressor, max_iter=20, loss="gamma")
    ),
    "HistGradientBoostingRegressor, quantile": lambda: diabetes(
        seeded(HistGradientBoostingRegressor, max_iter=20, loss="quantile", quantile=0.9)
    ),
    "AdaBoostRegressor": lambda: diabetes(seeded(AdaBoostRegressor, n_estimators=10)),
    "BaggingRegressor": lambda: diabetes(seeded(BaggingRegressor, n_estimators=5)),
    "PLSRegression": lambda: two_numbers(PLSRegression()),
    "DummyRegressor": lambda: diabetes(DummyRegressor()),
}

CLUSTERERS_AND_OUTLIERS: Cases = {
    "KMeans": lambda: iris(seeded(KMeans, n_clusters=3, n_init=1)),
    "MiniBatchKMeans": lambda: wine(standardized(seeded(MiniBatchKMeans, n_clusters=3, n_init=1))),
    "BisectingKMeans": lambda: wine(standardized(seeded(BisectingKMeans, n_clusters=4))),
    "GaussianMixture": lambda: iris(seeded(GaussianMixture, n_components=3)),
    "BayesianGaussianMixture": lambda: iris(seeded(BayesianGaussianMixture, n_components=3)),
    "MeanShift": lambda: iris(MeanShift()),
    "AffinityPropagation": lambda: iris(seeded(AffinityPropagation)),
    "Birch": lambda: iris(Birch(n_clusters=3)),
    "DBSCAN": lambda: iris(DBSCAN()),
    "AgglomerativeClustering": lambda: iris(AgglomerativeClustering()),
    "IsolationForest": lambda: wine(seeded(IsolationForest, n_estimators=20)),
    "OneClassSVM": lambda: wine(standardized(OneClassSVM())),
    "SGDOneClassSVM": lambda: wine(standardized(seeded(SGDOneClassSVM))),
    "LocalOutlierFactor": lambda: wine(standardized(LocalOutlierFactor(novelty=True))),
    "EllipticEnvelope": lambda: wine(standardized(seeded(EllipticEnvelope))),
}

DECOMPOSITIONS_AND_SELECTORS: Cases = {
    "PCA": lambda: wine(standardized(PCA(3))),
    "PCA, whitened": lambda: wine(standardized(PCA(3, whiten=True))),
    "IncrementalPCA": lambda: wine(standardized(IncrementalPCA(3))),
    "KernelPCA": lambda: wine(standardized(KernelPCA(3, kernel="rbf"))),
    "TruncatedSVD": lambda: wine(standardized(seeded(TruncatedSVD, n_components=3))),
    "FastICA": lambda: wine(standardized(seeded(FastICA, n_components=3))),
    "FactorAnalysis": lambda: wine(standardized(FactorAnalysis(3))),
    "NMF": lambda: digits(seeded(NMF, n_components=3)),
    "LatentDirichletAllocation": lambda: digits(seeded(LatentDirichletAllocation, n_components=3)),
    "GaussianRandomProjection": lambda: wine(standardized(seeded(GaussianRandomProjection, n_components=3))),
    "SparseRandomProjection": lambda: wine(standardized(seeded(SparseRandomProjection, n_components=3))),
    "Nystroem": lambda: wine(standardized(make_pipeline(seeded(Nystroem, n_components=20), LogisticRegression()))),
    "RBFSampler": lambda: wine(standardized(make_pipeline(seeded(RBFSampler, n_components=20), LogisticRegression()))),
    "NeighborhoodComponentsAnalysis": lambda: wine(
        standardized(make_pipeline(seeded(NeighborhoodComponentsAnalysis, max_iter=10), KNeighborsClassifier()))
    ),
    "RandomTreesEmbedding, sparse": lambda: wine(
        make_pipeline(seeded(RandomTreesEmbedding, n_estimators=20), LogisticRegression())
    ),
    "RandomTreesEmbedding": lambda: wine(
        make_pipeline(seeded(RandomTreesEmbedding, n_estimators=5, sparse_output=False), LogisticRegression())
    ),
    "LinearDiscriminantAnalysis as a transformer": lambda: wine(
        make_pipeline(LinearDiscriminantAnalysis(n_components=2), KNeighborsClassifier())
    ),
    "KMeans as a transformer": lambda: wine(
        standardized(make_pipeline(seeded(KMeans, n_clusters=5, n_init=1), LogisticRegression()))
    ),
    "SelectKBest": lambda: diabetes(make_pipeline(SelectKBest(k=3), LinearRegression())),
    "VarianceThreshold, the first column alone": lambda: wine(
        make_pipeline(
            make_column_transformer(("passthrough", ["alcohol"]), (Normalizer(), ["ash"])),
            VarianceThreshold(0.1),
            seeded(DecisionTreeClassifier, max_depth=3),
        )
    ),
    "SelectFromModel": lambda: wine(
        make_pipeline(SelectFromModel(seeded(ExtraTreesClassifier, n_estimators=5)), seeded(DecisionTreeClassifier))
    ),
    "RFE": lambda: diabetes(make_pipeline(RFE(Ridge(), n_features_to_select=3), Ridge())),
    "RFECV": lambda: diabetes(make_pipeline(RFECV(Ridge(), cv=2), Ridge())),
    "SequentialFeatureSelector": lambda: diabetes(
        make_pipeline(SequentialFeatureSelector(Ridge(), n_features_to_select=2, cv=2), Ridge())
    ),
    "VarianceThreshold": lambda: wine(make_pipeline(VarianceThreshold(0.1), GaussianNB())),
    "FeatureUnion": lambda: wine(
        make_pipeline(FeatureUnion([("pca", PCA(2)), ("best", SelectKBest(k=2))]), GaussianNB())
    ),
}

ONE_HOT = OneHotEncoder(handle_unknown="ignore")
ONE_HOT_DENSE = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
FILLED = SimpleImputer(strategy="median")

PREPROCESSING: Cases = {
    "StandardScaler": lambda: wine(StandardScaler()),
    "MinMaxScaler": lambda: wine(make_pipeline(MinMaxScaler(clip=True), LogisticRegression())),
    "MaxAbsScaler": lambda: wine(make_pipeline(MaxAbsScaler(), LogisticRegression())),
    "RobustScaler": lambda: wine(make_pipeline(RobustScaler(), LogisticRegression())),
    "Normalizer": lambda: iris(Normalizer()),
    "Binarizer": lambda: digits(make_pipeline(Binarizer(threshold=8), BernoulliNB())),
    "PowerTransformer, Yeo-Johnson": lambda: wine(make_pipeline(PowerTransformer(), LogisticRegression())),
    "PowerTransformer, Box-Cox": lambda: wine(make_pipeline(PowerTransformer("box-cox"), LogisticRegression())),
    "QuantileTransformer": lambda: wine(make_pipeline(QuantileTransformer(n_quantiles=50), LogisticRegression())),
    "QuantileTransformer, normal": lambda: wine(
        make_pipeline(QuantileTransformer(n_quantiles=50, output_distribution="normal"), LogisticRegression())
    ),
    "PolynomialFeatures": lambda: diabetes(make_pipeline(PolynomialFeatures(2), Ridge())),
    "SplineTransformer": lambda: diabetes(make_pipeline(SplineTransformer(), Ridge())),
    "SplineTransformer, periodic": lambda: diabetes(
        make_pipeline(SplineTransformer(extrapolation="periodic", n_knots=4), Ridge())
    ),
    "KBinsDiscretizer, onehot": lambda: iris(
        make_pipeline(KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf"), LogisticRegression())
    ),
    "KBinsDiscretizer, onehot-dense": lambda: iris(
        make_pipeline(KBinsDiscretizer(3, encode="onehot-dense", quantile_method="linear"), LogisticRegression())
    ),
    "KBinsDiscretizer, ordinal": lambda: iris(
        make_pipeline(KBinsDiscretizer(4, encode="ordinal", strategy="uniform"), seeded(DecisionTreeClassifier))
    ),
    "FunctionTransformer, log1p": lambda: wine(
        make_pipeline(FunctionTransformer(np.log1p), LogisticRegression(max_iter=500))
    ),
    "FunctionTransformer, sqrt": lambda: wine(
        make_pipeline(FunctionTransformer(np.sqrt), LogisticRegression(max_iter=500))
    ),
    "FunctionTransformer, its own function": lambda: digits(
        make_pipeline(MinMaxScaler((1, 2)), FunctionTransformer(log_and_ratio), LogisticRegression(max_iter=500))
    ),
    "FunctionTransformer, None": lambda: iris(make_pipeline(FunctionTransformer(), GaussianNB())),
    "KNNImputer": lambda: mixed(
        make_pipeline(make_column_transformer((KNNImputer(), ["distance km", "weight"])), GaussianNB())
    ),
    "IterativeImputer": lambda: mixed(
        make_pipeline(make_column_transformer((seeded(IterativeImputer), ["distance km", "month"])), GaussianNB())
    ),
    "SimpleImputer with an indicator": lambda: mixed(
        make_pipeline(
            make_column_transformer((SimpleImputer(add_indicator=True), ["distance km", "month"])), GaussianNB()
        )
    ),
    "MissingIndicator beside an imputer": lambda: gaps(
        make_pipeline(FeatureUnion([("filled", FILLED), ("missing", MissingIndicator())]), LogisticRegression())
    ),
    "OneHotEncoder and SimpleImputer": lambda: mixed(
        make_pipeline(
            make_column_transformer((make_pipeline(FILLED, StandardScaler()), NUMBERS), (ONE_HOT, TEXTS)),
            LogisticRegression(),
        )
    ),
    "ColumnTransformer behind set_output": lambda: mixed(
        make_pipeline(
            make_column_transformer(
                (FILLED, ["distance km", "month"]), (ONE_HOT_DENSE, TEXTS), verbose_feature_names_out=False
            ).set_output(transform="pandas"),
            make_column_transformer((StandardScaler(), ["month", "distance km"]), remainder="passthrough"),
            LogisticRegression(max_iter=500),
        )
    ),
    "Pipeline with passthrough": lambda: mixed(
        make_pipeline(
            make_column_transformer((FILLED, NUMBERS)),
            "passthrough",
            FeatureUnion([("same", "passthrough"), ("none", "drop"), ("best", SelectKBest(k=1))]),
            None,
            LogisticRegression(max_iter=500),
        )
    ),
    "OneHotEncoder, drop first": lambda: mixed(
        make_pipeline(
            make_column_transformer((FILLED, NUMBERS), (OneHotEncoder(drop="first"), TEXTS)),
            LogisticRegression(max_iter=500),
        )
    ),
    "OneHotEncoder, rare categories": lambda: mixed(
        make_pipeline(
            make_column_transformer(
                (FILLED, NUMBERS), (OneHotEncoder(min_frequency=0.2, handle_unknown="infrequent_if_exist"), TEXTS)
            ),
            seeded(RandomForestClassifier, n_estimators=5),
        )
    ),
    "OneHotEncoder, no category is rare": lambda: mixed(
        make_pipeline(
            make_column_transformer(
                (FILLED, ["distance km"]),
                (OneHotEncoder(handle_unknown="infrequent_if_exist", min_frequency=2), ["city", "month"]),
            ),
            LogisticRegression(max_iter=500),
        )
    ),
    "OneHotEncoder, rare categories of one column": lambda: mixed(
        make_pipeline(
            make_column_transformer((OneHotEncoder(max_categories=2, handle_unknown="ignore"), ["plan"])),
            LogisticRegression(),
        )
    ),
    "OrdinalEncoder": lambda: mixed(
        make_pipeline(
            make_column_transformer(
                (OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1), TEXTS), remainder="passthrough"
            ),
            seeded(HistGradientBoostingClassifier, max_iter=10),
        )
    ),
    "TargetEncoder": lambda: mixed_numbers(
        make_pipeline(
            make_column_transformer((seeded(TargetEncoder, cv=2), TEXTS), (FILLED, NUMBERS)),
            seeded(RandomForestRegressor, n_estimators=5),
        )
    ),
}


def dicts(model: Any) -> Case:
    """Records that are dicts; a table has their keys as its columns."""
    random = np.random.default_rng(0)
    rooms, city = random.integers(1, 6, 200), random.choice(["Graz", "Wien", "Linz"], 200)
    records = [{"city": str(place), "rooms": float(count)} for place, count in zip(city, rooms, strict=True)]
    return model.fit(records, rooms * 2 + (city == "Wien") > 7), records


WORDS: Cases = {
    "DictVectorizer": lambda: dicts(make_pipeline(DictVectorizer(), LogisticRegression())),
    "DictVectorizer, sparse=False": lambda: dicts(
        make_pipeline(DictVectorizer(sparse=False), seeded(RandomForestClassifier, n_estimators=5))
    ),
    "TfidfVectorizer": lambda: texts(TfidfVectorizer(), LogisticRegression()),
    "TfidfVectorizer, sublinear_tf": lambda: texts(TfidfVectorizer(sublinear_tf=True), LogisticRegression()),
    "TfidfVectorizer, pairs of words": lambda: texts(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LinearSVC()),
    "TfidfVectorizer, stop words": lambda: texts(TfidfVectorizer(stop_words="english"), ComplementNB()),
    "TfidfVectorizer, pairs of words without stop words": lambda: texts(
        TfidfVectorizer(stop_words="english", ngram_range=(1, 2)), LinearSVC()
    ),
    "TfidfVectorizer, char": lambda: texts(TfidfVectorizer(analyzer="char", ngram_range=(1, 3)), LinearSVC()),
    "TfidfVectorizer, char_wb": lambda: texts(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 3)), LinearSVC()),
    "CountVectorizer": lambda: texts(CountVectorizer(), MultinomialNB()),
    "CountVectorizer, binary": lambda: texts(CountVectorizer(binary=True), BernoulliNB()),
    "HashingVectorizer": lambda: texts(HashingVectorizer(n_features=64), LogisticRegression()),
    "TruncatedSVD of words": lambda: texts(
        TfidfVectorizer(), seeded(TruncatedSVD, n_components=3), LogisticRegression()
    ),
}


def lightgbm(kind: str, fit: Callable[..., Case], **options: Any) -> Callable[[], Case]:
    package = pytest.importorskip("lightgbm")
    return lambda: fit(getattr(package, kind)(n_estimators=15, verbose=-1, n_jobs=1, **options))


def xgboost(kind: str, fit: Callable[..., Case], **options: Any) -> Callable[[], Case]:
    package = pytest.importorskip("xgboost")
    return lambda: fit(getattr(package, kind)(n_estimators=15, n_jobs=1, max_depth=4, **options))


def boosters(case: Callable[[], Case]) -> Case:
    """The Booster of an estimator, as its own file stores it."""
    model, frame = case()
    return getattr(model, "booster_", None) or model.get_booster(), frame


BOOSTED: Cases = {
    "HistGradientBoostingClassifier, categorical_features='from_dtype'": lambda: categorical(
        seeded(HistGradientBoostingClassifier, max_iter=20, categorical_features="from_dtype")
    ),
    "HistGradientBoostingClassifier, categories, three classes": lambda: categorical_classes(
        seeded(HistGradientBoostingClassifier, max_iter=10, categorical_features="from_dtype")
    ),
    "HistGradientBoostingClassifier, categorical_features by name": lambda: mixed(
        seeded(HistGradientBoostingClassifier, max_iter=20, categorical_features=["city", "plan"])
    ),
    "HistGradientBoostingRegressor, categorical_features by number": lambda: codes(
        seeded(HistGradientBoostingRegressor, max_iter=20, categorical_features=[0, 2])
    ),
    "HistGradientBoostingRegressor, categories and gamma": lambda: categorical(
        seeded(HistGradientBoostingRegressor, max_iter=20, loss="gamma", categorical_features="from_dtype"), number=True
    ),
    "LGBMClassifier": lightgbm("LGBMClassifier", cancer),
    "LGBMClassifier, three classes": lightgbm("LGBMClassifier", wine),
    "LGBMClassifier, pandas categories": lightgbm("LGBMClassifier", categorical, min_data_per_group=5),
    "LGBMClassifier, pandas categories, three classes": lightgbm("LGBMClassifier", categorical_classes),
    "LGBMClassifier, dart": lightgbm("LGBMClassifier", cancer, boosting_type="dart"),
    "LGBMRegressor": lightgbm("LGBMRegressor", diabetes),
    "LGBMRegressor, pandas categories": lightgbm("LGBMRegressor", categorical_numbers, min_data_per_group=5),
    "LGBMRegressor, Poisson": lightgbm("LGBMRegressor", counts, objective="poisson"),
    "LGBMRegressor, quantile": lightgbm("LGBMRegressor", diabetes, objective="quantile", alpha=0.9),
    "LGBMRegressor, mape": lightgbm("LGBMRegressor", counts, objective="mape"),
    "LGBMRegressor, zero_as_missing": lightgbm("LGBMRegressor", codes, zero_as_missing=True),
    "LGBMRegressor, rf": lightgbm("LGBMRegressor", diabetes, boosting_type="rf", bagging_fraction=0.5, bagging_freq=1),
    "LGBMClassifier, rf": lightgbm("LGBMClassifier", wine, boosting_type="rf", bagging_fraction=0.5, bagging_freq=1),
    "LGBMClassifier, rf, two classes": lightgbm(
        "LGBMClassifier", cancer, boosting_type="rf", bagging_fraction=0.5, bagging_freq=1
    ),
    "LGBMRegressor, rf, Poisson": lightgbm(
        "LGBMRegressor", counts, boosting_type="rf", objective="poisson", bagging_fraction=0.5, bagging_freq=1
    ),
    "LGBMClassifier, multiclassova": lightgbm("LGBMClassifier", wine, objective="multiclassova"),
    "LGBMRanker": lightgbm("LGBMRanker", ranked),
    "lightgbm.Booster, binary": lambda: boosters(lightgbm("LGBMClassifier", cancer)),
    "lightgbm.Booster, multiclass": lambda: boosters(lightgbm("LGBMClassifier", wine)),
    "lightgbm.Booster, pandas categories": lambda: boosters(lightgbm("LGBMRegressor", categorical_numbers)),
    "lightgbm.Booster, Tweedie": lambda: boosters(lightgbm("LGBMRegressor", counts, objective="tweedie")),
    "XGBClassifier": xgboost("XGBClassifier", cancer),
    "XGBClassifier, three classes": xgboost("XGBClassifier", wine),
    "XGBClassifier, enable_categorical": xgboost("XGBClassifier", categorical, enable_categorical=True),
    "XGBRegressor": xgboost("XGBRegressor", diabetes),
    "XGBRegressor, Poisson": xgboost("XGBRegressor", counts, objective="count:poisson"),
    "XGBRegressor, enable_categorical": xgboost(
        "XGBRegressor", categorical_numbers, enable_categorical=True, max_cat_to_onehot=1
    ),
    "XGBRegressor, dart, in a pipeline": xgboost(
        "XGBRegressor", lambda model: diabetes(make_pipeline(SelectKBest(k=5), model)), booster="dart", rate_drop=0.3
    ),
    "XGBRegressor, gblinear": xgboost("XGBRegressor", diabetes, booster="gblinear"),
    "XGBClassifier, gblinear, three classes": xgboost("XGBClassifier", wine, booster="gblinear"),
    "XGBRegressor, several targets": xgboost("XGBRegressor", two_numbers),
    "XGBRegressor, several quantiles": xgboost(
        "XGBRegressor", diabetes, objective="reg:quantileerror", quantile_alpha=np.array([0.1, 0.5, 0.9])
    ),
    "XGBRegressor, Cox": xgboost("XGBRegressor", diabetes, objective="survival:cox"),
    "XGBClassifier, several labels": xgboost("XGBClassifier", yes_and_no),
    "XGBClassifier, missing=-1": xgboost("XGBClassifier", cancer, missing=-1.0),
    "XGBRanker": xgboost("XGBRanker", ranked),
    "XGBRFClassifier": xgboost("XGBRFClassifier", cancer),
    "XGBClassifier behind a sparse OneHotEncoder": xgboost(
        "XGBClassifier",
        lambda model: codes(make_pipeline(OneHotEncoder(), model)),
    ),
    "xgboost.Booster, binary": lambda: boosters(xgboost("XGBClassifier", cancer)),
    "xgboost.Booster, multiclass": lambda: boosters(xgboost("XGBClassifier", wine)),
    "xgboost.Booster, enable_categorical": lambda: boosters(
        xgboost("XGBRegressor", categorical_numbers, enable_categorical=True)
    ),
    "xgboost.Booster, gamma": lambda: boosters(xgboost("XGBRegressor", diabetes, objective="reg:gamma")),
}


def catboost(kind: str, fit: Callable[..., Case], **options: Any) -> Callable[[], Case]:
    def case() -> Case:
        package = pytest.importorskip("catboost")
        kinds = getattr(package, kind)
        return fit(kinds(iterations=20, depth=4, verbose=0, thread_count=1, allow_writing_files=False, **options))

    return case


def statsmodels(fit: Callable[[Any, Any, Any], Any], two: bool = False) -> Callable[[], Case]:
    def case() -> Case:
        package = pytest.importorskip("statsmodels.api")
        x, y, _ = load("diabetes")
        exog = package.add_constant(x[["bmi", "bp", "s5"]])
        return fit(package, (y > 140).astype(int) if two else y, exog), exog

    return case


OTHERS: Cases = {
    "CatBoostClassifier": catboost("CatBoostClassifier", cancer),
    "CatBoostClassifier, three classes, texts": catboost("CatBoostClassifier", iris),
    "CatBoostRegressor": catboost("CatBoostRegressor", diabetes),
    "CatBoostRegressor, Lossguide": catboost("CatBoostRegressor", diabetes, grow_policy="Lossguide"),
    "CatBoostRegressor, Poisson": catboost("CatBoostRegressor", counts, loss_function="Poisson"),
    "CatBoostClassifier, cat_features": catboost("CatBoostClassifier", categorical, cat_features=["city", "plan"]),
    "statsmodels OLS": statsmodels(lambda sm, y, x: sm.OLS(y, x).fit()),
    "statsmodels Logit": statsmodels(lambda sm, y, x: sm.Logit(y, x).fit(disp=0), two=True),
    "statsmodels GLM, binomial": statsmodels(
        lambda sm, y, x: sm.GLM(y, x, family=sm.families.Binomial()).fit(), two=True
    ),
    "statsmodels GLM, Poisson": statsmodels(lambda sm, y, x: sm.GLM(y, x, family=sm.families.Poisson()).fit()),
    "statsmodels GLM, gamma": statsmodels(
        lambda sm, y, x: sm.GLM(y, x, family=sm.families.Gamma(sm.families.links.Log())).fit()
    ),
}
