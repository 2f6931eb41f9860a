"""From a table and a scikit-learn pipeline to probabilities, and what happens to data that does not fit."""

import numpy as np
import polars as pl
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import batchserve
from batchserve import Client
from batchserve.errors import SchemaMismatch

# 1. Train as usual.
iris = load_iris(as_frame=True)
flowers, species = iris.data, iris.target_names[iris.target]
model = make_pipeline(StandardScaler(), LogisticRegression()).fit(flowers, species)

# 2. Convert to ONNX: the server never unpickles. The report compares both on the sample.
conversion = batchserve.convert(model, flowers, "iris.onnx")
print(f"Converted: {conversion.report.label_flips} of {conversion.report.rows} labels differ")

with Client() as client:
    # 3. Register. The server checks the graph, runs it and measures it.
    registered = client.models.add("iris.onnx", name="iris")
    print(f"Registered {registered.name}@{registered.version}: {[column['name'] for column in registered.columns]}")

    # 4. Predict: a DataFrame comes back as a DataFrame, row for row. A path or a list of records would do as well.
    scored = client.predict(flowers, model="iris")
    print(f"\nPredicted {len(scored)} flowers:\n{scored.iloc[[0, 75, 149]].round(4).to_string()}")
    served = scored[[f"probability_{name}" for name in model.classes_]].to_numpy()
    difference = np.abs(served - model.predict_proba(flowers)).max()
    print(f"Probabilities differ from scikit-learn's by at most {difference:.0e}")
    assert (scored["prediction"] == model.predict(flowers)).all()
    assert difference < 1e-6

    # 5. A table that does not fit is refused before anything runs; the error names the columns.
    renamed = flowers.rename(columns={"petal width (cm)": "petal widht (cm)"})
    try:
        client.predict(renamed, model="iris")
    except SchemaMismatch as refused:
        print(f"\nRefused: {refused}")
    else:
        raise AssertionError("a misspelt column was accepted")

    # ... unless you say which column is meant.
    again = client.predict(renamed, model="iris", columns={"petal width (cm)": "petal widht (cm)"})
    assert (again["prediction"] == scored["prediction"]).all()

    # 6. A record that does not fit does not stop the job: its row is empty, and the errors list has the reason.
    rows = pl.DataFrame(
        {
            "plant": ["p1", "p2", "p3", "p4"],
            "sepal length (cm)": ["5.1", "6.3", "5.8", "7.1"],
            "sepal width (cm)": ["3.5", "tall", None, "3.0"],
            "petal length (cm)": ["1.4", "4.9", "5.1", "5.9"],
            "petal width (cm)": ["0.2", "1.5", "1.9", "2.1"],
        }
    )
    job = client.submit(rows, model="iris", key="plant").wait()
    result = job.result().to_polars()
    print(f"\n{job.rows['ok']} rows scored, {job.rows['failed']} failed:\n{result.select('plant', 'prediction')}")
    for error in job.errors():
        print(f"{error['key']}: {error['code']}: {error['message']}")
    assert result["prediction"].to_list() == ["setosa", None, None, "virginica"]
    assert [error["code"] for error in job.errors()] == ["wrong-type", "missing-value"]
