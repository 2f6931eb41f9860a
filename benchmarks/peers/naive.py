"""The naive design: the csv module, the model loaded for each job, one row at a time.

usage: python naive.py MODEL.onnx INPUT.csv OUTPUT.csv
"""

import csv
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from stopwatch import Stopwatch

if __name__ == "__main__":
    model, source, target = sys.argv[1:]
    watch = Stopwatch()
    session = onnxruntime.InferenceSession(model)
    name = session.get_inputs()[0].name
    with Path(source).open(newline="") as read, Path(target).open("w", newline="") as written:
        rows, out = csv.DictReader(read), csv.writer(written)
        out.writerow(["id", "prediction", "probability_0", "probability_1", "probability_2"])
        for row in rows:
            key = row.pop("id")
            label, scores = session.run(None, {name: np.array([list(row.values())], np.float32)})
            out.writerow([key, label[0], *scores[0]])
    print(watch)
