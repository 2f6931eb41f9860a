"""Between tables and tensors: binding, type checks, building inputs, and the columns of a result."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from batchserve.domain import Column, InputTensor, OutputTensor, RowError, Signature
from batchserve.errors import InvalidOptions, SchemaMismatch, ScoringFailed
from batchserve.formats.protocol import ArrayType, Records
from batchserve.formats.schema import polars_type
from batchserve.inference.binding import Binding, bind, bind_arrays
from batchserve.inference.inputs import build_inputs, check_types
from batchserve.inference.outputs import ResultSchema, check_count

MATRIX = Signature((InputTensor("X", "float32", (None, 3)),), ())
MIXED = Signature(
    (
        InputTensor("age", "float32", (None, 1), (Column("age", "float32"),)),
        InputTensor("City_Name", "string", (None, 1), (Column("City_Name", "string"),)),
        InputTensor("visits", "int64", (None,), (Column("visits", "int64"),)),
    ),
    (),
)
NAMED = Signature(
    (
        InputTensor(
            "X",
            "float32",
            (None, 3),
            (Column("a", "float32"), Column("b", "float32", nullable=True), Column("c", "bool")),
        ),
    ),
    (),
)


def classifier(labels: tuple[str, ...] = ("cat", "dog", "owl"), label: str = "string") -> Signature:
    return Signature(
        MATRIX.inputs,
        (
            OutputTensor("label", "string" if label == "string" else "int64", (None,), "label"),
            OutputTensor("probabilities", "float32", (None, len(labels)), "probabilities", labels),
        ),
        task="classification",
    )


def built(
    signature: Signature, binding: Binding | None, records: Records
) -> tuple[dict[str, np.ndarray], np.ndarray, list[RowError]]:
    """`build_inputs`, for inputs that are arrays."""
    inputs, bad, errors = build_inputs(signature, binding, records)
    return {name: array for name, array in inputs.items() if isinstance(array, np.ndarray)}, bad, errors


# --- bind ---


def test_columns_are_found_by_name_whatever_their_order() -> None:
    binding = bind(MIXED, ["visits", "extra", "City_Name", "age"])
    assert binding.sources == {"age": ("age",), "City_Name": ("City_Name",), "visits": ("visits",)}
    assert binding.types == {"age": "float32", "City_Name": "string", "visits": "int64"}
    assert set(binding.used) == {"age", "City_Name", "visits"}


def test_a_space_counts_as_an_underscore() -> None:
    assert bind(MIXED, ["age", "City Name", "visits"]).sources["City_Name"] == ("City Name",)


def test_an_exact_name_takes_precedence_over_a_similar_one() -> None:
    assert bind(MIXED, ["age", "City Name", "City_Name", "visits"]).sources["City_Name"] == ("City_Name",)


def test_two_columns_with_similar_names_fill_nothing() -> None:
    with pytest.raises(SchemaMismatch, match="lacks 'City_Name'"):
        bind(MIXED, ["age", "City Name", "City-Name", "visits"])


def test_each_missing_column_is_listed_with_its_type_and_close_names() -> None:
    with pytest.raises(SchemaMismatch) as caught:
        bind(MIXED, ["Age", "town", "visits"])
    errors = caught.value.errors
    assert [error["column"] for error in errors] == ["age", "City_Name"]
    assert [error["expected"] for error in errors] == ["float32", "string"]
    assert "'Age'" in errors[0]["message"]


def test_other_columns_than_the_missing_one_are_named_only_where_there_are_any() -> None:
    with pytest.raises(SchemaMismatch, match=r"it lacks 'c'\Z"):
        bind(NAMED, ["a", "b"])
    with pytest.raises(
        SchemaMismatch, match=r"it lacks 'c'; the model does not take its 'd'\. Pass columns to map them"
    ):
        bind(NAMED, ["a", "b", "d"])


def test_a_value_for_all_records_that_is_missing_may_come_as_an_option() -> None:
    threshold = InputTensor("threshold", "float32", (), (Column("threshold", "float32"),), per_record=False)
    with pytest.raises(
        SchemaMismatch, match=r"lacks 'threshold'.*The option inputs gives values that all records share"
    ):
        bind(Signature((*NAMED.inputs, threshold), ()), ["a", "b", "c"])


def test_a_duplicate_column_name_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="'age'"):
        bind(MIXED, ["age", "City_Name", "visits", "age"])


def test_a_matrix_without_names_takes_all_columns_in_file_order() -> None:
    assert bind(MATRIX, ["p", "q", "r"]).sources == {"X": ("p", "q", "r")}


def test_a_wrong_number_of_columns_is_refused_with_both_numbers() -> None:
    with pytest.raises(SchemaMismatch, match=r"takes 3 columns .* has 4 .*'id', 'p'.*Pass columns"):
        bind(MATRIX, ["id", "p", "q", "r"])


def test_a_list_of_columns_chooses_and_orders_them() -> None:
    assert bind(MATRIX, ["id", "p", "q", "r"], ["r", "p", "q"]).sources == {"X": ("r", "p", "q")}


def test_a_list_with_an_unknown_column_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="no 'z'"):
        bind(MATRIX, ["p", "q", "r"], ["p", "q", "z"])


def test_a_list_with_a_repeated_column_is_refused() -> None:
    with pytest.raises(InvalidOptions, match="more than once"):
        bind(MATRIX, ["p", "q", "r"], ["p", "q", "q"])


def test_a_list_does_not_change_what_names_mean() -> None:
    binding = bind(MIXED, ["age", "City_Name", "visits", "id"], ["visits", "City_Name", "age"])
    assert binding.sources == {"age": ("age",), "City_Name": ("City_Name",), "visits": ("visits",)}


def test_a_mapping_renames_columns() -> None:
    binding = bind(MIXED, ["years", "City_Name", "visits"], {"age": "years"})
    assert binding.sources["age"] == ("years",)
    assert binding.types["years"] == "float32"


def test_a_mapping_of_an_unknown_model_column_is_refused() -> None:
    with pytest.raises(InvalidOptions, match="no column 'size'"):
        bind(MIXED, ["age", "City_Name", "visits"], {"size": "age"})


def test_a_mapping_to_an_absent_column_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="no 'years'"):
        bind(MIXED, ["age", "City_Name", "visits"], {"age": "years"})


def test_a_mapping_for_a_model_without_names_asks_for_a_list() -> None:
    with pytest.raises(InvalidOptions, match="pass a list"):
        bind(MATRIX, ["p", "q", "r"], {"x": "p"})


def test_one_listed_column_fills_a_model_of_one_column() -> None:
    signature = Signature((InputTensor("float_input", "float32", (None, 1), (Column("float_input", "float32"),)),), ())
    assert bind(signature, ["id", "income"], ["income"]).sources == {"float_input": ("income",)}
    with pytest.raises(SchemaMismatch):
        bind(signature, ["income"])


def test_two_matrices_share_the_columns_that_no_name_takes() -> None:
    signature = Signature((*MATRIX.inputs, InputTensor("Y", "float32", (None, 2)), MIXED.inputs[0]), ())
    binding = bind(signature, ["a", "b", "age", "c", "d", "e"])
    assert binding.sources == {"X": ("a", "b", "c"), "Y": ("d", "e"), "age": ("age",)}


def test_an_input_of_rank_four_asks_for_arrays() -> None:
    with pytest.raises(SchemaMismatch, match=r"\[3, 8, 8\].*npy"):
        bind(Signature((InputTensor("image", "float32", (None, 3, 8, 8)),), ()), ["a"])


# --- check_types ---


def test_a_typed_column_that_can_never_be_cast_is_refused_at_once() -> None:
    columns: dict[str, pl.DataType | None] = {
        "age": pl.List(pl.Float64()),
        "City_Name": pl.Int64(),
        "visits": pl.Date(),
    }
    sample = pl.DataFrame(schema={name: kind for name, kind in columns.items() if kind is not None})
    with pytest.raises(SchemaMismatch) as caught:
        check_types(MIXED, bind(MIXED, list(columns)), columns, sample)
    assert [error["column"] for error in caught.value.errors] == ["age", "visits"]


def test_text_where_no_value_fits_is_refused_with_an_example() -> None:
    sample = pl.DataFrame({"age": [None, "old", "young"], "City_Name": ["A", "B", "C"], "visits": ["1", "x", "2"]})
    with pytest.raises(SchemaMismatch, match="'old'") as caught:
        check_types(MIXED, bind(MIXED, sample.columns), dict.fromkeys(sample.columns), sample)
    assert [(error["column"], error["row"], error["expected"]) for error in caught.value.errors] == [
        ("age", 1, "float32")
    ]


def test_an_empty_sample_column_passes() -> None:
    sample = pl.DataFrame({"age": ["", None], "City_Name": ["A", "B"], "visits": ["1", "2"]})
    check_types(MIXED, bind(MIXED, sample.columns), dict.fromkeys(sample.columns), sample)


def test_arrays_are_checked_for_shape_before_anything_runs() -> None:
    with pytest.raises(SchemaMismatch, match=r"\[N, 3\], got \[5, 4\]"):
        check_types(MATRIX, None, {}, {"X": np.zeros((5, 4), np.float32)})


# --- build_inputs from tables ---


def test_a_matrix_holds_the_columns_in_order_as_float32() -> None:
    table = pl.DataFrame({"r": [3.0, 6.0], "p": [1, 4], "q": ["2", "5"]})
    inputs, bad, errors = built(MATRIX, bind(MATRIX, table.columns, ["p", "q", "r"]), table)
    assert inputs["X"].dtype == np.float32
    assert inputs["X"].flags.c_contiguous
    assert inputs["X"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not bad.any()
    assert errors == []


def test_inputs_of_a_column_each_get_their_shapes_and_types() -> None:
    table = pl.DataFrame({"age": [30.5, 41.0], "City Name": ["Ulm", "Bonn"], "visits": [2, 3]})
    inputs, _, _ = built(MIXED, bind(MIXED, table.columns), table)
    assert inputs["age"].shape == (2, 1)
    assert inputs["City_Name"].tolist() == [["Ulm"], ["Bonn"]]
    assert inputs["City_Name"].dtype == object
    assert inputs["visits"].shape == (2,)
    assert inputs["visits"].dtype == np.int64


def test_repeated_strings_stay_in_place() -> None:
    cities = [f"city {index % 7}" for index in range(1000)]
    table = pl.DataFrame({"age": [1.0] * 1000, "City_Name": cities, "visits": [1] * 1000})
    inputs, _, _ = built(MIXED, bind(MIXED, table.columns), table)
    assert inputs["City_Name"][:, 0].tolist() == cities


def test_a_missing_value_is_an_error_of_its_record_and_spares_the_others() -> None:
    table = pl.DataFrame({"age": [1.0, None, 3.0, 4.0], "City_Name": ["A", "B", None, "D"], "visits": [1, None, 3, 4]})
    inputs, bad, errors = built(MIXED, bind(MIXED, table.columns), table)
    assert bad.tolist() == [False, True, True, False]
    assert [(error.record, error.code, error.column) for error in errors] == [
        (1, "missing-value", "age"),
        (2, "missing-value", "City_Name"),
    ]
    assert inputs["visits"].tolist() == [1, 0, 3, 4]
    assert inputs["City_Name"][2, 0] == ""


def test_nan_counts_as_missing() -> None:
    table = pl.DataFrame({"p": [1.0, float("nan")], "q": [1.0, 2.0], "r": [1.0, float("inf")]})
    _, bad, errors = built(MATRIX, bind(MATRIX, table.columns), table)
    assert bad.tolist() == [False, True]
    assert errors[0].column == "p"


def test_a_missing_value_in_a_nullable_column_reaches_the_model_as_nan() -> None:
    table = pl.DataFrame({"a": [1.0, 2.0], "b": [None, float("nan")], "c": [True, False]})
    inputs, bad, errors = built(NAMED, bind(NAMED, table.columns), table)
    assert np.isnan(inputs["X"][:, 1]).all()
    assert inputs["X"][:, 2].tolist() == [1, 0]
    assert not bad.any()
    assert errors == []


def test_booleans_in_a_matrix_may_be_missing_like_numbers() -> None:
    table = pl.DataFrame({"a": [1.0, 2.0], "b": [1.0, 1.0], "c": [None, True]})
    _, bad, errors = built(NAMED, bind(NAMED, table.columns), table)
    assert bad.tolist() == [True, False]
    assert errors[0].column == "c"


def test_a_missing_text_in_a_nullable_column_reaches_the_model_as_empty() -> None:
    signature = Signature((InputTensor("t", "string", (None, 1), (Column("t", "string", nullable=True),)),), ())
    table = pl.DataFrame({"t": ["a", None]})
    inputs, bad, _ = built(signature, bind(signature, table.columns), table)
    assert inputs["t"].tolist() == [["a"], [""]]
    assert not bad.any()


def test_a_value_of_a_wrong_type_gives_one_error_for_its_record() -> None:
    table = pl.DataFrame({"p": ["1", "x"], "q": [1.0, None], "r": [1.0, 2.0]})
    _, bad, errors = built(MATRIX, bind(MATRIX, table.columns), table)
    assert bad.tolist() == [False, True]
    assert [(error.record, error.code) for error in errors] == [(1, "wrong-type")]


def test_a_table_without_records_gives_empty_inputs() -> None:
    table = pl.DataFrame(schema={"age": pl.Float32(), "City_Name": pl.String(), "visits": pl.Int64()})
    inputs, bad, errors = built(MIXED, bind(MIXED, table.columns), table)
    assert [array.shape for array in inputs.values()] == [(0, 1), (0, 1), (0,)]
    assert len(bad) == 0
    assert errors == []


def test_a_scalar_input_takes_the_one_value_of_its_column() -> None:
    scalar = InputTensor("rate", "int64", (), (Column("rate", "int64"),), per_record=False)
    signature = Signature((*MATRIX.inputs, scalar), ())
    table = pl.DataFrame({"p": [1.0, 2.0], "q": [1.0, 2.0], "r": [1.0, 2.0], "rate": [16, 16]})
    inputs, _, _ = built(signature, bind(signature, table.columns), table)
    assert inputs["rate"].shape == ()
    assert inputs["rate"] == 16
    with pytest.raises(SchemaMismatch, match="one value for all records"):
        built(signature, bind(signature, table.columns), table.with_columns(rate=pl.Series([16, 8])))


# --- build_inputs from arrays ---


def test_an_array_is_cast_to_the_type_of_its_input() -> None:
    inputs, bad, _ = built(MATRIX, None, {"X": np.arange(6, dtype=np.float64).reshape(2, 3)})
    assert inputs["X"].dtype == np.float32
    assert inputs["X"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bad.tolist() == [False, False]


def test_arrays_are_found_by_the_name_of_the_input() -> None:
    arrays = {
        "visits": np.array([1, 2], dtype=np.int32),
        "age": np.array([1.0, 2.0], dtype=np.float32),
        "City_Name": np.array(["A", "B"]),
    }
    inputs, _, _ = built(MIXED, None, arrays)
    assert inputs["age"].shape == (2, 1)
    assert inputs["City_Name"].dtype == object
    assert inputs["visits"].dtype == np.int64


def test_arrays_of_other_names_are_refused() -> None:
    message = (
        r"takes the arrays 'age' \(float32 \[N, 1\]\), 'City_Name' \(string \[N, 1\]\), 'visits' \(int64 \[N\]\), "
        r"and the input has the array 'age' \(float32 \[2\]\)"
    )
    with pytest.raises(SchemaMismatch, match=message):
        bind_arrays(MIXED, {"age": ArrayType(np.dtype(np.float32), (2,))})


def test_one_array_without_a_name_fills_one_input_alone() -> None:
    array = {"": ArrayType(np.dtype(np.float32), (2, 3))}
    assert bind_arrays(MATRIX, array).arrays == {"X": ""}
    with pytest.raises(SchemaMismatch, match=r"has one array without a name \(float32 \[2, 3\]\). Send an npz"):
        bind_arrays(MIXED, array)


def test_an_array_of_another_kind_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="expected int64, got float64") as caught:
        built(Signature(MIXED.inputs[2:], ()), None, {"visits": np.zeros(2)})
    assert caught.value.extra == {"expected": "int64", "got": "float64"}


def test_an_integer_that_would_wrap_around_is_an_error_of_its_record() -> None:
    signature = Signature((InputTensor("x", "uint8", (None, 2)),), ())
    inputs, _, _ = built(signature, None, {"x": np.array([[0, 255]])})
    assert inputs["x"].dtype == np.uint8
    arrays = {"x": np.array([[0, 255], [0, 256], [-1, 7]])}
    check_types(signature, None, {}, arrays)
    inputs, bad, errors = built(signature, None, arrays)
    assert inputs["x"][0].tolist() == [0, 255]
    assert bad.tolist() == [False, True, True]
    assert [(error.record, error.code, error.message) for error in errors] == [
        (1, "wrong-type", "expected uint8, got 256"),
        (2, "wrong-type", "expected uint8, got -1"),
    ]
    with pytest.raises(SchemaMismatch, match="column 'x': expected uint8, got 256 in record 0"):
        check_types(signature, None, {}, {"x": np.array([[0, 256]])})


def test_nan_in_an_array_is_an_error_of_its_record_unless_the_model_takes_it() -> None:
    array = np.array([[1, 2, 3], [1, np.nan, 3]], dtype=np.float32)
    _, bad, errors = built(MATRIX, None, {"X": array})
    assert bad.tolist() == [False, True]
    assert errors[0].record == 1
    tolerant = Signature((replace(MATRIX.inputs[0], nullable=True),), ())
    assert not built(tolerant, None, {"X": array})[1].any()
    assert not built(NAMED, None, {NAMED.inputs[0].name: array})[1].any()  # the column at fault is nullable


# --- outputs ---


def assert_types_agree(signature: Signature, frame: pl.DataFrame, top_k: int | None = None) -> None:
    assert dict(frame.schema) == ResultSchema(signature, top_k).columns


def test_a_classifier_gives_a_prediction_and_a_probability_for_each_class() -> None:
    outputs = {
        "label": np.array(["dog", "cat"], dtype=object),
        "probabilities": np.array([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]], dtype=np.float32),
    }
    frame = ResultSchema(classifier()).frame(outputs)
    assert frame.columns == ["prediction", "probability_cat", "probability_dog", "probability_owl"]
    assert frame["prediction"].to_list() == ["dog", "cat"]
    assert frame["probability_dog"].dtype == pl.Float32()
    assert frame["probability_dog"].to_list() == pytest.approx([0.7, 0.3])
    assert_types_agree(classifier(), frame)


def test_top_k_gives_the_most_probable_classes_in_order() -> None:
    signature = classifier(("5", "6", "7"), label="int64")
    outputs = {
        "label": np.array([6, 5]),
        "probabilities": np.array([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]], dtype=np.float32),
    }
    frame = ResultSchema(signature, top_k=2).frame(outputs)
    assert frame.columns == ["prediction", "label_1", "probability_1", "label_2", "probability_2"]
    assert frame["label_1"].to_list() == [6, 5]
    assert frame["label_2"].to_list() == [5, 7]
    assert frame["probability_2"].to_list() == pytest.approx([0.2, 0.3])
    assert_types_agree(signature, frame, 2)


def test_top_k_beyond_the_classes_or_without_probabilities_is_refused() -> None:
    with pytest.raises(InvalidOptions, match="has 3 classes, got 4"):
        ResultSchema(classifier(), 4)
    with pytest.raises(InvalidOptions, match="no probabilities"):
        ResultSchema(Signature(MATRIX.inputs, classifier().outputs[:1]), 1)
    with pytest.raises(InvalidOptions, match="at least 1"):
        ResultSchema(classifier(), 0)


def test_a_regressor_gives_one_prediction_or_one_for_each_target() -> None:
    single = Signature(MATRIX.inputs, (OutputTensor("variable", "float32", (None, 1)),), task="regression")
    frame = ResultSchema(single).frame({"variable": np.array([[1.5], [2.5]], dtype=np.float32)})
    assert frame.to_dict(as_series=False) == {"prediction": [1.5, 2.5]}
    several = replace(single, outputs=(OutputTensor("variable", "float32", (None, 2), labels=("1", "2")),))
    assert list(ResultSchema(several).columns) == ["prediction_1", "prediction_2"]


def test_scores_are_named_by_class_and_a_single_score_is_not() -> None:
    outputs = (
        OutputTensor("label", "int64", (None, 1), "label"),
        OutputTensor("scores", "float32", (None, 1), "scores"),
    )
    signature = Signature(MATRIX.inputs, outputs, task="outliers")
    frame = ResultSchema(signature).frame(
        {"label": np.array([[1], [-1]]), "scores": np.array([[0.5], [-0.5]], np.float32)}
    )
    assert frame.to_dict(as_series=False) == {"prediction": [1, -1], "score": [0.5, -0.5]}
    named = replace(signature, outputs=(outputs[0], OutputTensor("s", "float32", (None, 2), "scores", ("a", "b"))))
    assert list(ResultSchema(named).columns) == ["prediction", "score_a", "score_b"]


def test_other_outputs_keep_their_name_and_wide_ones_become_lists() -> None:
    outputs = (
        OutputTensor("embedding", "float32", (None, 2)),
        OutputTensor("wide", "float32", (None, 65)),
        OutputTensor("boxes", "float32", (None, 2, 3)),
        OutputTensor("words", "string", (None, 1, 2)),
    )
    signature = Signature(MATRIX.inputs, outputs)
    arrays = {
        "embedding": np.zeros((2, 2), np.float32),
        "wide": np.ones((2, 65), np.float32),
        "boxes": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "words": np.array([[["a", "b"]], [["c", "d"]]], dtype=object),
    }
    frame = ResultSchema(signature).frame(arrays)
    assert frame.columns == ["embedding_0", "embedding_1", "wide", "boxes", "words"]
    assert frame["boxes"].to_list()[1] == [[6, 7, 8], [9, 10, 11]]
    assert frame["words"].to_list() == [[["a", "b"]], [["c", "d"]]]
    assert_types_agree(signature, frame)
    empty = ResultSchema(signature).frame({name: array[:0] for name, array in arrays.items()})
    assert empty.height == 0
    assert_types_agree(signature, empty)


def test_each_target_of_a_multi_output_model_gets_a_group_of_columns() -> None:
    signature = Signature(
        MATRIX.inputs,
        (
            OutputTensor("label", "int64", (None, 2), "label", ("colour", "size")),
            OutputTensor("p_0", "float32", (None, 2), "probabilities", ("red", "blue"), group="colour"),
            OutputTensor("p_1", "float32", (None, 2), "probabilities", group="size"),
        ),
        task="classification",
    )
    assert list(ResultSchema(signature).columns) == [
        "prediction_colour",
        "prediction_size",
        "probability_colour_red",
        "probability_colour_blue",
        "probability_size_0",
        "probability_size_1",
    ]
    assert "label_colour_1" in ResultSchema(signature, 1).columns


def test_every_dtype_of_an_output_has_a_column_type() -> None:
    output = OutputTensor("y", "float16", (None,))
    frame = ResultSchema(Signature((), (output,))).frame({"y": np.array([1, 2], dtype=np.float16)})
    assert frame["y"].dtype == polars_type("float16")


def test_an_output_with_another_count_of_rows_is_refused() -> None:
    check_count({"y": np.zeros((3, 2))}, 3)
    with pytest.raises(ScoringFailed, match="'y' has 2 rows for 3 records"):
        check_count({"y": np.zeros(2)}, 3)
    with pytest.raises(ScoringFailed, match="'y' has 0 rows"):
        check_count({"y": np.array(1.0)}, 3)
