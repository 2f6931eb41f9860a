"""The models of a run: flowers, people, counts, arrays with a value that all records share, and images."""

from functools import cache

import numpy as np
import onnx.helper
import onnx.parser
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from batchserve.conversion import convert

COLUMNS = ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")
_ARRAYS = """
<ir_version: 8, opset_import: ["" : 17]>
arrays (float[N, 2, 3] x, float threshold) => (float[N] mean, bool[N] above)
{
    mean = ReduceMean <axes = [1, 2], keepdims = 0> (x)
    above = Greater (mean, threshold)
}
"""
_COUNTS = """
<ir_version: 8, opset_import: ["" : 17]>
counts (float[N, 1] age, int64[N, 1] visits) => (float[N, 1] sum)
{
    number = Cast <to = 1> (visits)
    sum = Add (age, number)
}
"""
_PICTURES = """
<ir_version: 8, opset_import: ["" : 17]>
pictures (float[N, 1, 4, 4] x) => (float[N] mean)
{
    mean = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x)
}
"""


@cache
def flowers() -> tuple[tuple[tuple[float, ...], str], ...]:
    """The measures of a flower, and the prediction of the model for it."""
    frame, _, classifier = _iris()
    said = classifier.predict(frame)
    return tuple((tuple(map(float, row)), str(label)) for row, label in zip(frame.to_numpy(), said, strict=True))


@cache
def registered() -> dict[str, bytes]:
    frame, _, classifier = _iris()
    pictures = onnx.parser.parse_model(_PICTURES)
    onnx.helper.set_model_props(
        pictures, {"batchserve.image": '{"resize": "stretch", "size": [4, 4], "order": "gray"}'}
    )
    return {
        "iris": convert(classifier, frame).onnx,
        "people": _people(),
        "arrays": onnx.parser.parse_model(_ARRAYS).SerializeToString(),
        "counts": onnx.parser.parse_model(_COUNTS).SerializeToString(),
        "pictures": pictures.SerializeToString(),
    }


@cache
def _iris() -> tuple[pd.DataFrame, np.ndarray, LogisticRegression]:
    data = load_iris(as_frame=True)
    names = data.target_names[data.target]
    return data.data, names, make_pipeline(StandardScaler(), LogisticRegression()).fit(data.data, names)


def _people() -> bytes:
    """Age may be missing, city is a text, visits are integers."""
    people = pd.DataFrame(
        {
            "age": [20.0 + i % 50 if i % 9 else float("nan") for i in range(240)],
            "city": [("Bern", "Biel", "Genf")[i % 3] for i in range(240)],
            "visits": [(7 * i) % 12 for i in range(240)],
        }
    )
    regular = ["regular" if visits > 5 else "rare" for visits in people["visits"]]
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["age"]),
        (OneHotEncoder(handle_unknown="ignore"), ["city"]),
        ("passthrough", ["visits"]),
    )
    return convert(make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(people, regular), people).onnx
