"""What many do instead: read the whole file with pandas, predict with the pickled estimator, write the whole file.

usage: python pandas_joblib.py MODEL.joblib INPUT.csv OUTPUT.csv
"""

import sys

import joblib
import pandas as pd

model_path, input_path, output_path = sys.argv[1:]
model = joblib.load(model_path)
frame = pd.read_csv(input_path)
features = frame[list(model.feature_names_in_)]
result = frame.drop(columns=list(model.feature_names_in_))
result["prediction"] = model.predict(features)
probabilities = model.predict_proba(features)
for index, label in enumerate(model.classes_):
    result[f"probability_{label}"] = probabilities[:, index]
result.to_csv(output_path, index=False)
