"""Admission: which models are accepted, how they are repaired, and what is measured by running them."""

import io
import json
import pickle
import warnings
import zipfile
from functools import partial
from typing import Any

import numpy as np
import onnx
import polars as pl
import pytest
from lightgbm import LGBMClassifier
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType as FloatInput
from skl2onnx.common.data_types import StringTensorType as TextInput
from sklearn.cluster import KMeans
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.svm import SVC

from batchserve import admission
from batchserve.admission import Admitted, admit
from batchserve.domain import AdmissionStep, Signature
from batchserve.errors import ModelRefused, OutOfMemory, ScoringFailed
from batchserve.inference.binding import bind
from batchserve.inference.inputs import build_inputs
from batchserve.inference.outputs import ResultSchema, check_count
from batchserve.inference.session import Sessions, open_session

IRIS, SPECIES = load_iris(return_X_y=True)
IRIS = IRIS.astype(np.float32)
OPSETS = {"": 17, "ai.onnx.ml": 3}


def converted(estimator: Any, types: Any = None, **options: Any) -> ModelProto:
    """A trained estimator as ONNX. Warnings of the converter do not matter here."""
    sample = IRIS[:1] if types is None else None
    chosen = {id(estimator): options} if options else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: ModelProto = to_onnx(estimator, sample, initial_types=types, target_opset=OPSETS, options=chosen)
    return model


def fitted(estimator: Any, target: Any = SPECIES, **options: Any) -> bytes:
    """The estimator, trained on iris, as ONNX."""
    return bytes(converted(estimator.fit(IRIS, target), **options).SerializeToString())


def written(graph: str, opset: str = '"":17') -> ModelProto:
    """A model in ONNX's textual form."""
    model: ModelProto = parser.parse_model(f"<ir_version: 8, opset_import: [{opset}]> {graph}")
    return model


def admit_written(graph: str, opset: str = '"":17') -> Admitted:
    return admit(written(graph, opset).SerializeToString())


def scored(admitted: Admitted, records: pl.DataFrame | dict[str, np.ndarray], top_k: int | None = None) -> pl.DataFrame:
    """The result columns for these records; an array without a name is that of the first input."""
    signature = admitted.signature
    if isinstance(records, dict):
        records = {name or signature.inputs[0].name: array for name, array in records.items()}
    binding = bind(signature, records.columns) if isinstance(records, pl.DataFrame) else None
    inputs, bad, _ = build_inputs(signature, binding, records)
    arrays = {name: array for name, array in inputs.items() if isinstance(array, np.ndarray)}
    outputs = open_session(admitted.model, signature.threads).run(arrays)
    check_count(outputs, len(bad))
    frame = ResultSchema(signature, top_k).frame(outputs)
    assert dict(frame.schema) == ResultSchema(signature, top_k).columns
    return frame


def operators(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def roles(signature: Signature) -> list[str]:
    return [output.role for output in signature.outputs]


# --- scikit-learn's graphs ---


def test_a_zipmap_is_stripped_and_its_labels_are_kept() -> None:
    names = np.array(["setosa", "versicolor", "virginica"])
    estimator = LogisticRegression(max_iter=500).fit(IRIS, names[SPECIES])
    plain = converted(estimator)
    assert "ZipMap" in operators(plain)
    admitted = admit(plain.SerializeToString())
    assert "ZipMap" not in operators(onnx.load_model_from_string(admitted.model))
    frame = scored(admitted, {"": IRIS})
    assert frame.columns == ["prediction", "probability_setosa", "probability_versicolor", "probability_virginica"]
    assert frame["prediction"].to_list() == estimator.predict(IRIS).tolist()
    np.testing.assert_allclose(frame[:, 1:].to_numpy(), estimator.predict_proba(IRIS), atol=1e-5)
    assert admitted.metadata["producer"].startswith("skl2onnx")
    assert admitted.signature.mode == "rows"


def test_each_step_is_told_as_it_begins() -> None:
    steps: list[AdmissionStep] = []
    admit(fitted(LogisticRegression(max_iter=500)), tell=steps.append)
    assert steps == [AdmissionStep.CHECK, AdmissionStep.RUN, AdmissionStep.MEASURE]
    steps.clear()
    with pytest.raises(ModelRefused):
        admit(b"no graph", tell=steps.append)
    assert steps == [AdmissionStep.CHECK]


def test_class_labels_come_from_the_classifier_when_there_is_no_zipmap() -> None:
    admitted = admit(fitted(LogisticRegression(max_iter=500), SPECIES * 10, zipmap=False))
    frame = scored(admitted, {"": IRIS}, top_k=1)
    assert frame.columns == ["prediction", "label_1", "probability_1"]
    assert frame["label_1"].to_list() == frame["prediction"].to_list()
    assert set(frame["label_1"].to_list()) == {0, 10, 20}


def test_decision_values_are_scores_and_not_probabilities() -> None:
    admitted = admit(fitted(SVC(), zipmap=False))
    assert roles(admitted.signature) == ["label", "scores"]
    assert list(ResultSchema(admitted.signature).columns) == ["prediction", "score_0", "score_1", "score_2"]


def test_clusterings_and_outlier_detectors_are_distinguished() -> None:
    clusters = admit(fitted(KMeans(3, n_init=1, random_state=0))).signature
    assert clusters.task == "clustering"
    assert list(ResultSchema(clusters).columns) == ["prediction", "score_0", "score_1", "score_2"]
    outliers = admit(fitted(IsolationForest(n_estimators=5, random_state=0))).signature
    assert outliers.task == "outliers"
    assert list(ResultSchema(outliers).columns) == ["prediction", "score"]


def test_a_regressor_gives_a_prediction_for_each_target() -> None:
    targets = IRIS[:, :2]
    admitted = admit(fitted(LinearRegression(), targets))
    assert admitted.signature.task == "regression"
    frame = scored(admitted, {"": IRIS})
    assert frame.columns == ["prediction_1", "prediction_2"]
    np.testing.assert_allclose(frame.to_numpy(), targets, atol=1e-3)


def test_targets_that_a_network_stacks_are_reshaped_to_columns() -> None:
    estimator = MLPRegressor(hidden_layer_sizes=(8,), max_iter=500, solver="lbfgs", random_state=0)
    admitted = admit(fitted(estimator, IRIS[:, :3]))
    assert admitted.signature.outputs[0].shape == (None, 3)
    np.testing.assert_allclose(scored(admitted, {"": IRIS}).to_numpy(), estimator.predict(IRIS), atol=1e-4)
    assert any("reshaped" in note for note in admitted.signature.notes)


def test_labels_on_axis_1_are_moved_to_axis_0() -> None:
    estimator = QuadraticDiscriminantAnalysis()
    admitted = admit(fitted(estimator, SPECIES, zipmap=False))
    assert scored(admitted, {"": IRIS})["prediction"].to_list() == estimator.predict(IRIS).tolist()


def test_several_targets_give_one_group_of_columns_each() -> None:
    targets = np.c_[SPECIES, SPECIES % 2]
    estimator = MultiOutputClassifier(LogisticRegression(max_iter=500))
    admitted = admit(fitted(estimator, targets))
    frame = scored(admitted, {"": IRIS})
    assert frame.columns == [
        *("prediction_1", "prediction_2"),
        *("probability_1_0", "probability_1_1", "probability_1_2"),
        *("probability_2_0", "probability_2_1"),
    ]
    np.testing.assert_array_equal(frame[:, :2].to_numpy(), estimator.predict(IRIS))
    np.testing.assert_allclose(frame[:, 5:].to_numpy(), estimator.predict_proba(IRIS)[1], atol=1e-5)


def test_a_forest_with_several_targets_is_split_by_target() -> None:
    estimator = RandomForestClassifier(5, random_state=0)
    admitted = admit(fitted(estimator, np.c_[SPECIES, (SPECIES + 1) % 3], zipmap=False))
    frame = scored(admitted, {"": IRIS})
    second = frame.select("probability_2_0", "probability_2_1", "probability_2_2").to_numpy()
    # A value within rounding of a threshold takes another branch in float32.
    assert np.isclose(second, estimator.predict_proba(IRIS)[1], atol=1e-5).mean() > 0.98


def test_one_probability_for_each_of_several_labels_is_named_by_target() -> None:
    estimator = MLPClassifier(hidden_layer_sizes=(8,), max_iter=500, solver="lbfgs", random_state=0)
    admitted = admit(fitted(estimator, np.c_[SPECIES == 0, IRIS[:, 0] > 5.5, SPECIES == 2].astype(int), zipmap=False))
    assert list(ResultSchema(admitted.signature).columns) == [
        *("prediction_1", "prediction_2", "prediction_3"),
        *("probability_1", "probability_2", "probability_3"),
    ]


def test_the_measured_shape_counts_where_the_declared_one_is_wrong() -> None:
    estimator: Any = LGBMClassifier(n_estimators=3, verbose=-1).fit(IRIS, SPECIES)
    model = convert_lightgbm(estimator, initial_types=[("X", FloatTensorType([None, 4]))], zipmap=False)
    label = model.graph.output[0]
    assert [size.dim_value for size in label.type.tensor_type.shape.dim] == [1]
    admitted = admit(model.SerializeToString())
    assert admitted.signature.outputs[0].shape == (None,)
    assert admitted.signature.mode == "rows"
    assert scored(admitted, {"": IRIS})["prediction"].to_list() == estimator.predict(IRIS).tolist()


def test_a_pipeline_of_mixed_columns_takes_its_columns_by_name() -> None:
    table = pl.DataFrame({"age": [20.0, 30.0, 40.0, 50.0], "City_Name": ["Ulm", "Bonn", "Ulm", "Bonn"]})
    pipeline = make_pipeline(
        make_column_transformer((SimpleImputer(), ["age"]), (OneHotEncoder(), ["City_Name"])), LogisticRegression()
    )
    pipeline.fit(table.to_pandas(), [0, 1, 0, 1])
    types = [("age", FloatInput([None, 1])), ("City_Name", TextInput([None, 1]))]
    model = converted(pipeline, types, zipmap=False)
    admitted = admit(model.SerializeToString())
    age, city = admitted.signature.columns
    assert (age.name, age.dtype, age.nullable) == ("age", "float32", True)
    assert (city.name, city.dtype, city.nullable) == ("City_Name", "string", False)
    assert admitted.signature.sample[0]["City_Name"] in {"Ulm", "Bonn"}
    frame = scored(admitted, table.rename({"City_Name": "City Name"}).select("City Name", "age"))
    assert frame["prediction"].to_list() == [0, 1, 0, 1]


def test_the_locale_of_a_text_model_is_repaired_with_a_note() -> None:
    texts = ["good film", "bad film", "good book", "bad book"]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, [1, 0, 1, 0])
    model = converted(pipeline, [("text", TextInput([None, 1]))], zipmap=False)
    assert "StringNormalizer" in operators(model)
    admitted = admit(model.SerializeToString())
    assert b"C.UTF-8" in admitted.model
    assert any("C.UTF-8" in note for note in admitted.signature.notes)
    assert scored(admitted, pl.DataFrame({"text": texts}))["prediction"].to_list() == [1, 0, 1, 0]


# --- missing values ---


def test_a_linear_model_needs_every_value() -> None:
    assert not admit(fitted(LogisticRegression(max_iter=500))).signature.inputs[0].nullable


def test_trees_take_missing_values() -> None:
    admitted = admit(fitted(HistGradientBoostingClassifier(max_iter=3), SPECIES, zipmap=False))
    assert admitted.signature.inputs[0].nullable


def test_only_the_imputed_columns_are_nullable() -> None:
    table = pl.DataFrame({"a": [1.0, 2.0, 3.0], "b": [1.0, 0.0, 1.0]}).to_pandas()
    pipeline = make_pipeline(
        make_column_transformer((SimpleImputer(), ["a"]), ("passthrough", ["b"])), LogisticRegression()
    ).fit(table, [0, 1, 0])
    types = [("a", FloatInput([None, 1])), ("b", FloatInput([None, 1]))]
    model = converted(pipeline, types, zipmap=False)
    admitted = admit(model.SerializeToString())
    assert [column.nullable for column in admitted.signature.columns] == [True, False]


def test_a_number_made_of_nan_by_accident_does_not_make_a_column_nullable() -> None:
    admitted = admit_written("g (float[N,2] x) => (bool[N,2] y) { y = Greater(x, x) }")
    assert not admitted.signature.inputs[0].nullable


# --- batching modes ---


def test_a_graph_for_a_fixed_number_of_records_runs_in_that_batch() -> None:
    signature = admit_written("g (float[4,2] x) => (float[4,2] y) { y = Neg(x) }").signature
    assert (signature.mode, signature.batch) == ("fixed", 4)


def test_a_graph_that_accepts_only_one_number_of_records_is_detected() -> None:
    graph = "g (float[N,2] x) => (float[M,2] y) { s = Constant<value=int64[2]{8,2}>() y = Reshape(x, s) }"
    signature = admit_written(graph).signature
    assert (signature.mode, signature.batch) == ("fixed", 8)


def test_a_graph_that_mixes_records_runs_whole() -> None:
    signature = admit_written("g (float[N,2] x) => (float[N,2] y) { y = Softmax<axis=0>(x) }").signature
    assert signature.mode == "whole"
    assert any("in one run" in note for note in signature.notes)


def test_a_graph_whose_rows_do_not_follow_the_records_is_refused() -> None:
    with pytest.raises(ModelRefused, match=r"'y' has shape \[1, 2\] for 2 records"):
        admit_written("g (float[N,2] x) => (float[1,2] y) { y = ReduceMean<axes=[0]>(x) }")


def test_an_output_that_is_not_about_records_is_left_out() -> None:
    graph = "g (float[N,2] x) => (float[N,2] y, float[2] w) { y = Neg(x) w = Constant<value=float[2]{1,2}>() }"
    admitted = admit_written(graph)
    assert [output.name for output in admitted.signature.outputs] == ["y"]
    assert any("'w'" in note for note in admitted.signature.notes)


def test_a_scalar_input_is_shared_by_all_records() -> None:
    admitted = admit_written("g (float[N,2] x, float t) => (float[N,2] y) { y = Mul(x, t) }")
    x, t = admitted.signature.inputs
    assert (x.per_record, t.per_record) == (True, False)
    frame = scored(admitted, pl.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0], "t": [10.0, 10.0]}))
    assert frame.rows() == [(10.0, 30.0), (20.0, 40.0)]


def test_free_dimensions_of_an_image_input_are_guessed_for_the_probe() -> None:
    graph = "g (float[N,3,H,W] image) => (float[N,3,1,1] y) { y = GlobalAveragePool(image) }"
    signature = admit_written(graph).signature
    assert signature.inputs[0].shape == (None, 3, None, None)
    assert signature.inputs[0].columns is None
    assert signature.mode == "rows"


def test_a_size_that_the_probe_guessed_stays_dynamic() -> None:
    admitted = admit_written("g (float[N,K] x) => (float[N,K] y) { y = Neg(x) }")
    assert admitted.signature.outputs[0].shape == (None, None)
    frame = scored(admitted, pl.DataFrame({"a": [1.0], "b": [2.0], "c": [3.0]}))
    assert frame.to_dict(as_series=False) == {"y": [[-1.0, -2.0, -3.0]]}


def test_batch_and_threads_are_measured() -> None:
    signature = admit(fitted(LogisticRegression(max_iter=500))).signature
    assert signature.batch in {64, 1024, 4096, 16384}
    assert signature.threads in {1, 2}
    assert signature.records_per_second is not None
    assert signature.records_per_second > 1000


def test_large_records_are_measured_in_small_batches_only() -> None:
    graph = "g (float[N,3,512,512] x) => (float[N,3,1,1] y) { y = GlobalAveragePool(x) }"
    assert admit_written(graph).signature.batch <= 16  # 3 MiB a record, 64 MiB in all


# --- metadata ---


def with_metadata(model: ModelProto, **entries: Any) -> bytes:
    helper.set_model_props(model, {f"batchserve.{key}": json.dumps(value) for key, value in entries.items()})
    return bytes(model.SerializeToString())


def test_metadata_names_columns_labels_and_task() -> None:
    model = written("g (float[N,2] x) => (float[N,2] y) { y = Softmax<axis=1>(x) }")
    data = with_metadata(
        model,
        columns=[
            {"name": "height (m)", "dtype": "float32", "input": "x"},
            {"name": "ok", "dtype": "bool", "input": "x"},
        ],
        labels=["no", "yes"],
        task="classification",
        sample=[{"height (m)": 1.5, "ok": True}, {"height (m)": None, "ok": False}],
    )
    admitted = admit(data)
    assert [(column.name, column.dtype) for column in admitted.signature.columns] == [
        ("height (m)", "float32"),
        ("ok", "bool"),
    ]
    assert admitted.signature.sample[0] == {"height (m)": 1.5, "ok": True}
    assert admitted.metadata["batchserve.labels"] == '["no", "yes"]'
    frame = scored(admitted, pl.DataFrame({"ok": [True], "height (m)": [1.0]}))
    assert frame.columns == ["probability_no", "probability_yes"]
    assert frame.row(0) == (0.5, 0.5)


def test_labels_and_targets_of_several_outputs_come_from_metadata() -> None:
    estimator = MultiOutputClassifier(LogisticRegression(max_iter=500)).fit(IRIS, np.c_[SPECIES, SPECIES % 2])
    model = converted(estimator)
    data = with_metadata(model, labels=[["a", "b", "c"], ["even", "odd"]], targets=["kind", "parity"])
    assert list(ResultSchema(admit(data).signature).columns) == [
        *("prediction_kind", "prediction_parity"),
        *("probability_kind_a", "probability_kind_b", "probability_kind_c"),
        *("probability_parity_even", "probability_parity_odd"),
    ]


def test_two_outputs_of_one_column_name_are_told_apart_by_the_names_of_the_outputs() -> None:
    graph = """g (float[N,2] x) => (float[N,2] z, float[N,2] y, float[N] y_0) {
        z = Neg(x) y = Abs(x) axis = Constant<value=int64[1]{1}>() y_0 = ReduceSum<keepdims=0>(x, axis) }"""
    signature = admit_written(graph).signature
    assert list(ResultSchema(signature).columns) == ["z_0", "z_1", "y_y_0", "y_y_1", "y_0_y_0"]


def test_columns_that_do_not_fill_the_input_are_refused() -> None:
    model = written("g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }")
    with pytest.raises(ModelRefused, match="names 1 columns"):
        admit(with_metadata(model, columns=[{"name": "a", "dtype": "float32", "input": "x"}]))


def test_metadata_of_another_shape_is_refused() -> None:
    model = written("g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }")
    with pytest.raises(ModelRefused, match=r"batchserve\.labels must be a list, got dict"):
        admit(with_metadata(model, labels={"a": 1}))


# --- refused models ---


NEG = "g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps({"a": 1}), "a Python pickle"),
        (b"\x1f\x8b\x08 joblib", "gzip"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"", "0 bytes"),
        (b"not a model at all", "of another format"),
        (b"PK\x03\x04 broken", "zip archive cannot be read"),
    ],
)
def test_a_file_that_is_not_a_model_is_refused_by_its_type(data: bytes, reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason):
        admit(data)


def external(name: str, location: str, length: int | None = None) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    if length is not None:
        tensor.external_data.add(key="length", value=str(length))
    return tensor


def with_external_initializer() -> ModelProto:
    model = written("g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 1}> { y = Add(x, w) }")
    model.graph.initializer[0].CopyFrom(external("w", "weights.bin"))
    return model


def with_external_attribute() -> ModelProto:
    model = written("g (float[N,2] x) => (float[N,2] y) { w = Constant<value=float[2]{1,1}>() y = Add(x, w) }")
    model.graph.node[0].attribute[0].t.CopyFrom(external("w", "weights.bin"))
    return model


def with_external_subgraph() -> ModelProto:
    model = written(
        "g (float[N,2] x, bool c) => (float[N,2] y) { y = If(c) <"
        "then_branch = a () => (float[N,2] p) { v = Constant<value=float[2]{1,1}>() p = Add(x, v) },"
        "else_branch = b () => (float[N,2] q) { q = Neg(x) }> }"
    )
    branch = next(entry for entry in model.graph.node[0].attribute if entry.name == "then_branch").g
    del branch.node[0]
    branch.initializer.append(external("v", "weights.bin"))
    return model


def with_external_function() -> ModelProto:
    model = written(
        "g (float[N,2] x) => (float[N,2] y) { y = own.f(x) } "
        '<domain: "own", opset_import: ["":17]> f (a) => (b) { w = Constant<value=float[2]{1,1}>() b = Add(a, w) }',
        '"":17, "own":1',
    )
    model.functions[0].node[0].attribute[0].t.CopyFrom(external("w", "weights.bin"))
    return model


EXTERNAL = [with_external_initializer, with_external_attribute, with_external_subgraph, with_external_function]


@pytest.mark.parametrize("make", EXTERNAL)
def test_data_outside_of_the_model_is_refused_wherever_it_is_referenced(make: Any) -> None:
    with pytest.raises(ModelRefused, match="outside of the model"):
        admit(make().SerializeToString())


def test_a_sparse_initializer_may_not_point_outside_either() -> None:
    model = written(NEG)
    model.graph.sparse_initializer.add().values.CopyFrom(external("s", "/etc/passwd"))
    with pytest.raises(ModelRefused, match="outside of the model"):
        admit(model.SerializeToString())


@pytest.mark.parametrize(
    ("operator", "opset"),
    [
        ("com.microsoft.EPContext(x)", '"":17, "com.microsoft":1'),
        ("evil.Op(x)", '"":17, "evil":1'),
        ("ai.onnx.preview.training.Adam(x)", '"":17, "ai.onnx.preview.training":1'),
    ],
)
def test_foreign_operators_are_refused(operator: str, opset: str) -> None:
    model = written(NEG, opset)
    model.graph.node[0].domain, _, model.graph.node[0].op_type = operator.removesuffix("(x)").rpartition(".")
    with pytest.raises(ModelRefused, match="is not supported"):
        admit(model.SerializeToString())


def test_a_foreign_operator_inside_a_function_is_refused() -> None:
    model = with_external_function()
    model.functions[0].node[0].CopyFrom(helper.make_node("EPContext", [], ["w"], domain="com.microsoft"))
    with pytest.raises(ModelRefused, match="EPContext"):
        admit(model.SerializeToString())


def test_functions_of_the_model_itself_run() -> None:
    model = written(
        'g (float[N,2] x) => (float[N,2] y) { y = own.f(x) } <domain: "own", opset_import: ["":17]> '
        "f (a) => (b) { b = Neg(a) }",
        '"":17, "own":1',
    )
    assert admit(model.SerializeToString()).signature.mode == "rows"


@pytest.mark.parametrize("opset", ['"":99', '"":17, "ai.onnx.ml":99'])
def test_an_operator_set_that_is_too_new_is_refused_by_onnx_runtime(opset: str) -> None:
    with pytest.raises(ModelRefused, match=r"ONNX Runtime refuses the model: .*[Oo]pset"):
        admit(written(NEG, opset).SerializeToString())


def test_an_old_operator_set_that_onnx_runtime_runs_is_admitted() -> None:
    assert [output.name for output in admit_written(NEG, '"":6').signature.outputs] == ["y"]


def test_a_newer_file_format_is_lowered_with_a_note() -> None:
    model = written(NEG)
    model.ir_version = 14
    admitted = admit(model.SerializeToString())
    assert onnx.load_model_from_string(admitted.model).ir_version == 13
    assert any("IR 14" in note for note in admitted.signature.notes)


def test_an_input_of_a_type_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(ModelRefused, match="COMPLEX64"):
        admit_written("g (complex64[N] x) => (complex64[N] y) { y = Identity(x) }")


def test_a_model_without_inputs_is_refused() -> None:
    with pytest.raises(ModelRefused, match="no inputs"):
        admit_written("g () => (float[2] y) { y = Constant<value=float[2]{1,2}>() }")


def test_a_model_that_does_not_load_is_refused_with_the_reason_and_no_path() -> None:
    with pytest.raises(ModelRefused, match="NoSuchOperator") as caught:
        admit_written("g (float[N,2] x) => (float[N,2] y) { y = NoSuchOperator(x) }")
    assert "/" not in caught.value.detail


def test_a_model_that_asks_for_too_much_memory_is_refused() -> None:
    graph = (
        "g (float[N,2] x) => (float[M] y) { s = Constant<value=int64[1]{200000000000000}>() y = ConstantOfShape(s) }"
    )
    with pytest.raises(ModelRefused, match=r"more memory than the system gives, with as few records"):
        admit_written(graph)


# --- bundles ---


def bundle(model: ModelProto, files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", model.SerializeToString())
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


WEIGHTS = np.array([10, 20], dtype=np.float32).tobytes()


@pytest.mark.parametrize("make", EXTERNAL)
def test_a_bundle_contains_the_external_data(make: Any) -> None:
    admitted = admit(bundle(make(), {"weights.bin": WEIGHTS}))
    inputs = {"x": np.zeros((1, 2), np.float32)}
    if "c" in [tensor.name for tensor in admitted.signature.inputs]:
        inputs["c"] = np.array(True)
    assert open_session(admitted.model).run(inputs)["y"].tolist() == [[10, 20]]


def test_a_bundle_whose_directory_begins_before_the_file_is_refused() -> None:
    data = bytearray(bundle(EXTERNAL[0](), {"weights.bin": WEIGHTS}))
    end = data.rindex(b"PK\x05\x06")
    data[end + 12 : end + 16] = (2**31).to_bytes(4, "little")  # bytes of the directory
    with pytest.raises(ModelRefused, match="the zip archive cannot be read"):
        admit(bytes(data))


def test_the_manifest_of_a_bundle_is_metadata() -> None:
    manifest = json.dumps({"labels": ["no", "yes"]}).encode()
    model = written("g (float[N,2] x) => (float[N,2] y) { y = Softmax<axis=1>(x) }")
    admitted = admit(bundle(model, {"batchserve.json": manifest}))
    assert list(ResultSchema(admitted.signature).columns) == ["probability_no", "probability_yes"]


@pytest.mark.parametrize("name", ["../weights.bin", "/etc/weights.bin", "a/weights.bin", "a\\b", "..", "C:weights"])
def test_a_bundle_member_without_a_plain_name_is_refused(name: str) -> None:
    with pytest.raises(ModelRefused, match="only plain file names"):
        admit(bundle(written(NEG), {name: b""}))


def test_a_nul_in_the_name_of_a_bundle_member_is_refused() -> None:
    data = bundle(written(NEG), {"weights_bin": b""}).replace(b"weights_bin", b"weights\0bin")
    with pytest.raises(ModelRefused, match=r"only plain file names|cannot be read"):
        admit(data)


def test_a_link_in_a_bundle_is_refused() -> None:
    stream = io.BytesIO(bundle(written(NEG), {}))
    with zipfile.ZipFile(stream, "a") as archive:
        link = zipfile.ZipInfo("weights.bin")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelRefused, match="link"):
        admit(stream.getvalue())


def test_two_bundle_members_with_one_name_are_refused() -> None:
    stream = io.BytesIO(bundle(written(NEG), {"weights.bin": b"1"}))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("weights.bin", b"2")
    with pytest.raises(ModelRefused, match="two members"):
        admit(stream.getvalue())


def test_a_bundle_that_grows_too_much_is_refused() -> None:
    with pytest.raises(ModelRefused, match="grows more than 50 times"):
        admit(bundle(written(NEG), {"zeros.bin": bytes(80 * 2**20)}))


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "elsewhere.bin", "*/_ORT_MEM_ADDR_/*"])
def test_a_tensor_that_points_out_of_the_bundle_is_refused(location: str) -> None:
    model = with_external_initializer()
    model.graph.initializer[0].CopyFrom(external("w", location))
    with pytest.raises(ModelRefused, match="not in the zip archive"):
        admit(bundle(model, {"weights.bin": WEIGHTS}))


def test_a_tensor_that_does_not_fit_its_file_is_refused() -> None:
    model = with_external_initializer()
    model.graph.initializer[0].CopyFrom(external("w", "weights.bin", length=4000))
    with pytest.raises(ModelRefused, match="needs 8 bytes and takes 4000"):
        admit(bundle(model, {"weights.bin": WEIGHTS}))


def test_a_bundle_needs_exactly_one_model() -> None:
    with pytest.raises(ModelRefused, match=r"one \.onnx file, got 2"):
        admit(bundle(written(NEG), {"other.onnx": b"x"}))


# --- sessions ---


def test_a_failed_run_says_why_without_paths() -> None:
    graph = "g (float[N,2] x, int64[N] i) => (float[N,2] y) { y = Gather<axis=0>(x, i) }"
    session = open_session(written(graph).SerializeToString())
    with pytest.raises(ScoringFailed, match="idx=9 must be within") as caught:
        session.run({"x": np.zeros((2, 2), np.float32), "i": np.array([0, 9])})
    assert "/" not in caught.value.detail


def test_an_allocation_that_fails_is_out_of_memory() -> None:
    graph = "g (int64[1] s) => (float[M] y) { y = ConstantOfShape(s) }"
    session = open_session(written(graph).SerializeToString())
    with pytest.raises(OutOfMemory):
        session.run({"s": np.array([10**14])})


def test_a_session_never_reads_tensors_from_the_working_directory(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(WEIGHTS)
    with pytest.raises(ScoringFailed):
        open_session(with_external_initializer().SerializeToString())


def test_the_least_recently_used_session_is_closed() -> None:
    loads: list[str] = []

    def load(name: str) -> bytes:
        loads.append(name)
        model = written("g (float[N,2] x) => (float[N,2] y) <float[2] w = {1, 1}> { y = Mul(x, w) }")
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full(2, ord(name), np.float32), "w"))
        return bytes(model.SerializeToString())

    sessions = Sessions(2)
    for name in ("a", "b", "a", "c", "a", "b"):
        outputs = sessions.get(name, 1, partial(load, name)).run({"x": np.ones((1, 2), np.float32)})
        assert outputs["y"].tolist() == [[ord(name)] * 2]
    assert loads == ["a", "b", "c", "b"]
    sessions.get("b", 2, lambda: load("b"))
    assert loads[-2:] == ["b", "b"]


# --- unsupported types and invalid texts -----------------------------------------------------------------------------


def value(name: str, kind: int) -> onnx.ValueInfoProto:
    """The declaration of a matrix of two columns, of any type, existing or not."""
    entry = onnx.ValueInfoProto(name=name)
    entry.type.tensor_type.elem_type = kind
    for size in ("N", 2):
        dimension = entry.type.tensor_type.shape.dim.add()
        setattr(dimension, "dim_param" if isinstance(size, str) else "dim_value", size)
    return entry


def casting(source: onnx.ValueInfoProto, target: onnx.ValueInfoProto) -> bytes:
    node = helper.make_node("Cast", ["x"], ["y"], to=target.type.tensor_type.elem_type or TensorProto.FLOAT)
    model = helper.make_model(
        helper.make_graph([node], "g", [source], [target]), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    return bytes(model.SerializeToString())


UNKNOWN = [
    *(kind for kind in TensorProto.DataType.values() if not 1 <= kind <= 13 and kind), 29, 99, -1, 2**31 - 1,
]  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_element_types_that_no_file_can_hold_are_refused_with_their_place(kind: int) -> None:
    named = kind in TensorProto.DataType.values()
    said = TensorProto.DataType.Name(kind) if named else f"type {kind}, which is not an ONNX type"
    with pytest.raises(ModelRefused, match=f"input 'x' has elements of {said}"):
        admit(casting(value("x", kind), value("y", TensorProto.FLOAT)))
    with pytest.raises(ModelRefused, match=f"output 'y' has elements of {said}"):
        admit(casting(value("x", TensorProto.FLOAT), value("y", kind)))


def test_an_output_of_unknown_elements_that_is_not_declared_is_refused() -> None:
    model = onnx.load_model_from_string(casting(value("x", TensorProto.FLOAT), value("y", TensorProto.FLOAT8E4M3FN)))
    model.graph.output[0].ClearField("type")
    with pytest.raises(ModelRefused, match=r"output 'y' is tensor\(float8e4m3fn\), which is not supported"):
        admit(model.SerializeToString())


@pytest.mark.parametrize("kind", ["sequence_type", "map_type", "optional_type", "sparse_tensor_type", "no type"])
def test_a_value_that_is_not_a_tensor_is_refused_with_its_place_and_kind(kind: str) -> None:
    other = onnx.ValueInfoProto(name="x")
    if kind != "no type":
        getattr(other.type, kind).SetInParent()
    with pytest.raises(ModelRefused, match=f"input 'x' .*{kind}"):
        admit(casting(other, value("y", TensorProto.FLOAT)))
    if kind not in ("no type", "sequence_type"):
        other.name = "y"
        with pytest.raises(ModelRefused, match=f"output 'y' .*{kind}"):
            admit(casting(value("x", TensorProto.FLOAT), other))


def test_an_impossible_shape_is_refused() -> None:
    wide = value("x", TensorProto.FLOAT)
    wide.type.tensor_type.shape.dim[1].dim_value = 2**62
    with pytest.raises(ModelRefused, match=r"input 'x' has the shape .*: more than"):
        admit(casting(wide, value("y", TensorProto.FLOAT)))


def test_an_input_of_more_axes_than_an_array_can_have_is_refused() -> None:
    wide = casting(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 303), value("y", TensorProto.FLOAT))
    with pytest.raises(ModelRefused, match="input 'x' has 303 axes, and at most 60 are taken"):
        admit(wide)


def test_any_error_that_a_model_causes_refuses_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("an array of 303 axes")

    monkeypatch.setattr(admission, "describe", broken)
    with pytest.raises(ModelRefused, match="the model cannot be examined: ValueError: an array of 303 axes"):
        admit(casting(value("x", TensorProto.FLOAT), value("y", TensorProto.FLOAT)))


def test_a_zipmap_without_an_output_is_refused() -> None:
    node = helper.make_node("ZipMap", ["x"], [], domain="ai.onnx.ml", classlabels_int64s=[1, 2])
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT)], [value("y", TensorProto.FLOAT)])
    with pytest.raises(ModelRefused):
        admit(helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 3)]).SerializeToString())


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    node = helper.make_node("Elu", ["x"], ["y"], alpha=0.5)
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT)], [value("y", TensorProto.FLOAT)])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    assert admit(data).signature.inputs
    with pytest.raises(ModelRefused, match=r"AttributeProto.name, is not UTF-8: b'alph\\xff'"):
        admit(data.replace(b"alpha", b"alph\xff"))


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("columns", '[{"name":"\\ud800","dtype":"float32","input":"x"}]', "a lone surrogate"),
        ("labels", '["a", {"b": ["\\udfff"]}]', "a lone surrogate"),
        ("task", '"\\ud800"', "a lone surrogate"),
        ("columns", '[{"name":" ","dtype":"float32","input":"x"}]', "empty name"),
    ],
)
def test_metadata_that_json_cannot_represent_is_refused(key: str, text: str, said: str) -> None:
    model = onnx.load_model_from_string(casting(value("x", TensorProto.FLOAT), value("y", TensorProto.FLOAT)))
    helper.set_model_props(model, {f"batchserve.{key}": text})
    with pytest.raises(ModelRefused, match=said):
        admit(model.SerializeToString())
