"""Text in, text and sentiment out: TF-IDF and logistic regression on real film reviews."""

import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import batchserve
from batchserve import Client
from examples.reviews import reviews

# 1. Train on 10,000 reviews and test on 5,000 others. The text is a column, named as in the files to be scored.
table = reviews()
train, test = table[:10_000], table[10_000:15_000]
model = make_pipeline(
    make_column_transformer((TfidfVectorizer(max_features=20_000), "text")),
    LogisticRegression(C=3),
)
model.fit(train[["text"]], train["sentiment"])

# 2. Convert: the graph splits texts into words itself, so the client sends only the text.
conversion = batchserve.convert(model, test[["text"]].head(500), "sentiment.onnx")
print(f"Converted: {conversion.report.label_flips} of {conversion.report.rows} labels differ")

# 3. The input is a CSV: long texts with quotes and commas in them.
test[["source", "text"]].to_csv("reviews.csv", index=False)

with Client() as client:
    client.models.add("sentiment.onnx", name="sentiment")

    # 4. Text in, text and sentiment out: `passthrough` names the columns that are copied to the result.
    job = client.submit("reviews.csv", model="sentiment", passthrough=["text"], format="parquet").wait()
    scored = job.result().to_polars()
    print(f"\nScored {len(scored):,} reviews at {job.data['rows_per_s']:,.0f} a second: {scored.columns}")
    for row in scored.select("prediction", "probability_positive", "text").head(3).rows():
        print(f"{row[0]:9} {row[1]:.2f}  {row[2][:80]!r}")

    # 5. The served predictions equal those of the trained model.
    expected = model.predict(test[["text"]])
    served = scored["prediction"].to_numpy()
    accuracy, expected_accuracy = np.mean(served == test["sentiment"]), np.mean(expected == test["sentiment"])
    print(f"\nAccuracy served {accuracy:.2%}, in scikit-learn {expected_accuracy:.2%}")
    assert scored["text"].to_list() == test["text"].to_list()
    assert (served == expected).all()
    assert accuracy > 0.8

    # 6. One text, at once.
    [answer] = client.models.predict("sentiment", [{"text": "A wonderful film, and the best cast in years."}])
    print(f"{answer['text']!r} is {answer['prediction']} ({answer['probability_positive']:.2f})")
    assert answer["prediction"] == "positive"
