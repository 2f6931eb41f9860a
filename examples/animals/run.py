"""img2feat: features of a convolutional network, then a logistic regression; in one graph that takes image files."""

import argparse
import io
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import batchserve
from batchserve import Client
from batchserve.conversion.img2feat import import_torchvision, load_cnn
from examples.cifar10 import CLASSES, images, labels

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--images", type=int, default=1_000, help="to score, of the 10,000 test images of CIFAR-10")
parser.add_argument("--train", type=int, default=2_000, help="to train on, of the 50,000 others")
chosen = parser.parse_args()

# 1. The network. img2feat downloads weights that were trained on ImageNet. To run without that download, this example
#    uses random weights from a seed: the features are worse, and all else is the same. With it: load_cnn("alexnet").
torch.manual_seed(0)
torch.save(import_torchvision().models.alexnet(weights=None).state_dict(), "alexnet.pth")
cnn = load_cnn("alexnet", weights=Path("alexnet.pth"))

# 2. Train as with img2feat: features of BGR images, standardized, then a logistic regression.
known, known_classes = images("train", chosen.train)[..., ::-1], labels("train", chosen.train)
started = time.perf_counter()
features = cnn(list(known))
print(f"Features of {len(known):,} images: {len(known) / (time.perf_counter() - started):.0f} images/s in PyTorch")
scaler = StandardScaler().fit(features)
classifier = LogisticRegression(C=0.01, max_iter=1_000).fit(scaler.transform(features), known_classes)

# 3. One graph of all three steps. It declares how images are prepared, and is compared on some before it is written.
conversion = batchserve.export_img2feat(
    cnn, classifier, scaler.mean_, scaler.scale_, CLASSES, "animals.onnx", images=list(known[:100])
)
print(f"Exported: {conversion.report.label_flips} of {conversion.report.rows} labels differ")

# 4. The input: a zip of PNG files, in folders or not.
new, new_classes = images("test", chosen.images), labels("test", chosen.images)
with zipfile.ZipFile("animals.zip", "w") as archive:
    for number, pixels in enumerate(new):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        archive.writestr(f"{number // 1_000}/{number:05}.png", file.getvalue())

with Client() as client:
    client.models.add("animals.onnx", name="animals")

    # 5. The server decodes, resizes and normalizes. It has neither torch nor OpenCV.
    job = client.submit("animals.zip", model="animals", format="parquet").wait()
    scored = job.result().to_polars()
    print(f"Scored {len(scored):,} images at {job.data['rows_per_s']:.0f} a second")
    print(scored.head(3).select("file", "prediction", "probability_cat", "probability_ship"))

# 6. As good as the original, image by image.
new_features = scaler.transform(cnn(list(new[..., ::-1])))
expected, probabilities = classifier.predict(new_features), classifier.predict_proba(new_features)
served = np.array([CLASSES.index(name) for name in scored["prediction"]])
accuracy, original = np.mean(served == new_classes), np.mean(expected == new_classes)
difference = np.abs(scored.select(f"probability_{name}" for name in CLASSES).to_numpy() - probabilities).max()
print(f"Accuracy served {accuracy:.2%}, in img2feat and scikit-learn {original:.2%} (by chance: 10 %)")
print(f"Probabilities differ by at most {difference:.0e}")
assert scored["file"].to_list() == [f"{number // 1_000}/{number:05}.png" for number in range(len(new))]
assert job.rows["failed"] == 0
assert (served == expected).all()
assert difference < 1e-5
