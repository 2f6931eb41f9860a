"""Networks: a fused pipeline predicts like its parts, and a graph declares its images and classes."""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import polars as pl
import pytest
from PIL import Image
from selection import quick_first
from service import Api, problem, running
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from typer.testing import CliRunner

import batchserve
from batchserve.cli import app
from batchserve.conversion import annotate
from batchserve.conversion.conversion import with_facts
from batchserve.conversion.fuse import fuse
from batchserve.errors import ConversionFailed, ParityFailed
from batchserve.inference.session import open_session

SIZE = networks.SIZE
STRETCHED = {
    "resize": "stretch",
    "size": [SIZE, SIZE],
    "antialias": False,
    "order": "bgr",
    "scale": 1 / 255,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "reverse": True,
}
"""The preset of img2feat, for smaller images."""
NAMES = ("temple", "flower")


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """48 parts of scikit-learn's two photographs, uint8 [96, 96, 3] in RGB: the size that the networks take."""
    random = np.random.default_rng(0)
    corners = zip(random.integers(0, 427 - SIZE, 48), random.integers(0, 640 - SIZE, 48), strict=True)
    pages = load_sample_images().images
    return [pages[i % 2][top : top + SIZE, left : left + SIZE] for i, (top, left) in enumerate(corners)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("networks")) as api:
        yield api


def archive(images: list[np.ndarray]) -> bytes:
    """A zip of PNG files, which are lossless."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as files:
        for number, image in enumerate(images):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            files.writestr(f"photographs/{number:03}.png", png.getvalue())
    return target.getvalue()


def prepared(images: list[np.ndarray]) -> np.ndarray:
    """float32 [n, 3, 96, 96]: what img2feat hands to its network, which counts the channels from blue, and turns them
    round only then."""
    blue_first = np.stack(images)[:, :, :, ::-1]
    normal = (blue_first / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return normal.transpose(0, 3, 1, 2)[:, ::-1].astype(np.float32)


def features_of(network: onnx.ModelProto, tensor: np.ndarray) -> np.ndarray:
    (features,) = open_session(network.SerializeToString()).run({"image": tensor}).values()
    return features.reshape(len(tensor), -1)


def facts(model: bytes) -> dict[str, Any]:
    """The `batchserve.*` metadata, without the prefix."""
    graph = onnx.load_model_from_string(model)
    return {entry.key.removeprefix("batchserve."): json.loads(entry.value) for entry in graph.metadata_props}


def fitted(features: np.ndarray, classes: np.ndarray) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features, classes)


# --- a network and an estimator as one graph -------------------------------------------------------------------------


@pytest.mark.parametrize("topology", quick_first([networks.resnet18, networks.alexnet, networks.vgg11], 1))
def test_a_job_on_a_zip_of_images_answers_like_the_network_and_scikit_learn(
    service: Api, photographs: list[np.ndarray], topology: Callable[[], onnx.ModelProto]
) -> None:
    network = topology()
    features = features_of(network, prepared(photographs))
    classes = np.array([3, 7])[np.arange(len(photographs)) % 2]  # not 0 and 1: a class is not its place
    estimator = fitted(features, classes)
    conversion = fuse(network, estimator, photographs, features, image=STRETCHED, labels=NAMES)
    service.register(topology.__name__, conversion.onnx)

    job = service.run(archive(photographs), topology.__name__, format="jsonl")

    result = pl.read_ndjson(service.result(job).content)
    assert (job["state"], job["rows"]["failed"]) == ("completed", 0)
    assert result["prediction"].to_list() == [
        {3: "temple", 7: "flower"}[label] for label in estimator.predict(features)
    ]
    got = result.select("probability_temple", "probability_flower").to_numpy()
    np.testing.assert_allclose(got, estimator.predict_proba(features), atol=1e-5)
    assert conversion.report.label_flips == 0
    assert max(difference.max_absolute for difference in conversion.report.differences) <= 1e-5


def test_a_fused_graph_declares_its_inputs_and_outputs(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.arange(48) % 2)
    conversion = fuse(network, estimator, photographs, features, image=STRETCHED, labels=NAMES, packages=["numpy"])
    written = facts(conversion.onnx)
    assert written["image"].items() >= ({"input": "image"} | STRETCHED).items()
    assert (written["task"], written["labels"]) == ("classification", list(NAMES))
    assert written["versions"].keys() == {"onnx", "scikit-learn", "skl2onnx", "numpy"}
    assert written["parity"]["rows"] == 48
    assert [(column.name, column.dtype) for column in conversion.columns] == [("image", "image")]
    graph = onnx.load_model_from_string(conversion.onnx)
    onnx.checker.check_model(graph, full_check=True)
    assert [entry.name for entry in graph.graph.input] == ["image"]


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_a_network_of_any_operator_set_is_fused(photographs: list[np.ndarray], opset: int) -> None:
    network = networks.resnet18(opset)
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.arange(48) % 2)
    assert fuse(network, estimator, photographs, features, image=STRETCHED).report.passed


def test_classes_that_are_texts_are_renamed_too_and_without_names_they_stay(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.array(["a", "b"])[np.arange(48) % 2])
    tensor = prepared(photographs)
    for labels, expected in ((NAMES, NAMES), (None, ("a", "b"))):
        graph = fuse(network, estimator, photographs, features, image=STRETCHED, labels=labels).onnx
        answers = open_session(graph).run({"image": tensor})["label"]
        assert answers.tolist() == [expected[label == "b"] for label in estimator.predict(features)]
        assert facts(graph)["labels"] == list(expected)


def test_a_regressor_and_a_machine_without_probabilities_are_fused(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    regressor = Ridge().fit(features, np.arange(48.0))
    conversion = fuse(network, regressor, photographs, features, image=STRETCHED)
    assert (conversion.task, facts(conversion.onnx).get("labels")) == ("regression", None)
    machine = make_pipeline(StandardScaler(), LinearSVC()).fit(features, np.arange(48) % 3)
    assert fuse(network, machine, photographs, features, image=STRETCHED, labels="abc").report.label_flips == 0


def test_a_search_is_fused_as_its_best_estimator(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    search = GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}).fit(features, np.arange(48) % 2)
    assert fuse(network, search, photographs, features, image=STRETCHED, labels=NAMES).report.label_flips == 0


def test_features_that_the_network_does_not_give_fail_the_verification(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.arange(48) % 2)
    wrong = STRETCHED | {"order": "rgb"}
    with pytest.raises(ParityFailed, match="DISAGREES"):
        fuse(network, estimator, photographs, features, image=wrong)


def test_names_that_do_not_fit_the_classes_are_refused(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.arange(48) % 2)
    with pytest.raises(ConversionFailed, match="2 values for each record, and 3 labels were given: 'a', 'b', 'c'"):
        fuse(network, estimator, photographs, features, image=STRETCHED, labels="abc")
    with pytest.raises(ConversionFailed, match="for a classifier with one target"):
        fuse(network, Ridge().fit(features, np.arange(48.0)), photographs, features, image=STRETCHED, labels="ab")


def test_images_that_do_not_fit_the_network_are_refused(photographs: list[np.ndarray]) -> None:
    network = networks.alexnet()
    features = features_of(network, prepared(photographs))
    estimator = fitted(features, np.arange(48) % 2)
    with pytest.raises(ConversionFailed, match=r"are \[N, 3, 224, 224\], but input 'image' is \[N, 3, 96, 96\]"):
        fuse(network, estimator, photographs, features, image="img2feat")


# --- annotating a network in ONNX ------------------------------------------------------------------------------------

SCORES = {"scale": 1 / 255, "resize": "stretch", "size": [SIZE, SIZE]}


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A network that gives scores of 100 classes, as a file without metadata."""
    path = tmp_path / "network.onnx"
    onnx.save(networks.classifier(100), path)
    return path


def test_the_command_line_annotates_a_network_with_its_images_and_classes(
    service: Api, network: Path, photographs: list[np.ndarray], tmp_path: Path
) -> None:
    classes = [f"class {number}" for number in range(100)]
    (tmp_path / "labels.txt").write_text("\n".join(classes) + "\n")
    target = tmp_path / "named.onnx"
    done = run(network, "--image", json.dumps(SCORES), "--labels", tmp_path / "labels.txt", "-o", target)
    assert done.exit_code == 0, done.output
    service.register("named", target)

    tensor = (np.stack(photographs) / 255).transpose(0, 3, 1, 2).astype(np.float32)
    scores = features_of(onnx.load(network), tensor)
    job = service.run(archive(photographs), "named", format="jsonl", top_k=2)
    ranked = pl.read_ndjson(service.result(job).content)
    order = np.argsort(-scores, axis=1)
    assert ranked["label_1"].to_list() == [classes[best] for best in order[:, 0]]
    assert ranked["label_2"].to_list() == [classes[best] for best in order[:, 1]]
    np.testing.assert_allclose(ranked["score_1"], scores.max(axis=1), atol=1e-5)

    job = service.run(archive(photographs), "named", format="jsonl")
    whole = pl.read_ndjson(service.result(job).content)
    np.testing.assert_allclose(whole["score"].to_list(), scores, atol=1e-5)
    assert service.http.get("/v1/models/named").json()["task"] == "classification"


def test_softmax_turns_scores_into_probabilities(
    service: Api, network: Path, photographs: list[np.ndarray], tmp_path: Path
) -> None:
    target = tmp_path / "sure.onnx"
    (tmp_path / "labels.json").write_text(json.dumps(list(range(100))))
    done = run(network, "--image", json.dumps(SCORES), "--labels", tmp_path / "labels.json", "--softmax", "-o", target)
    assert done.exit_code == 0, done.output
    service.register("sure", target)
    job = service.run(archive(photographs[:3]), "sure", format="jsonl")
    result = pl.read_ndjson(service.result(job).content)
    np.testing.assert_allclose(result["probability"].list.sum(), 1, atol=1e-5)
    job = service.run(archive(photographs[:3]), "sure", format="jsonl", top_k=1)
    assert pl.read_ndjson(service.result(job).content).columns == ["file", "label_1", "probability_1"]


def test_scores_of_classes_without_names_are_not_ranked(
    service: Api, network: Path, photographs: list[np.ndarray]
) -> None:
    service.register("nameless", annotate(network, image=SCORES))
    assert service.http.get("/v1/models/nameless").json()["result_columns"].keys() == {"scores"}
    options = {"model": "nameless", "format": "jsonl", "top_k": "1"}
    answer = service.http.post("/v1/predict", content=archive(photographs[:2]), params=options)
    refused = problem(answer, 422, "invalid-options")
    assert "no probabilities, and no scores of named classes" in refused["detail"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "imagnet"], "no preset 'imagnet' for images, only 'imagenet', 'img2feat'"),
        (["--image", '{"sise": [1, 1]}'], "unknown field 'sise'"),
        (["--image", '{"size": [96'], "is not JSON"),
        (["--image", '{"input": "pixels"}'], "no input 'pixels'; it has 'image'"),
        (["--image", "imagenet"], r"are \[N, 3, 224, 224\], but input 'image' is \[N, 3, 96, 96\]"),
        (["--image", "img2feat:resnet18", "--weights", "none.pth"], "does not exist"),
        (["--weights", "NETWORK"], "goes with --image"),
        (["--labels", "NETWORK"], "cannot be read as text"),
    ],
)
def test_invalid_arguments_are_refused(network: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    target = tmp_path / "out.onnx"
    done = run(network, *(str(network) if text == "NETWORK" else text for text in arguments), "-o", target)
    assert done.exit_code != 0
    said = " ".join((done.output + str(done.exception)).replace("│", " ").split())
    assert re.search(message, said), said
    assert not target.exists()


def test_labels_must_be_as_many_as_the_values(network: Path) -> None:
    with pytest.raises(ConversionFailed, match="'scores' has 100 values for each record, and 2 labels were given"):
        annotate(network, labels=NAMES)


def test_a_network_in_several_files_becomes_one(network: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart" / "network.onnx"
    apart.parent.mkdir()
    onnx.save(onnx.load(network), apart, save_as_external_data=True, location="weights.bin", size_threshold=0)
    bundle = tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as files:
        for path in apart.parent.iterdir():
            files.write(path, path.name)
    tensor = np.random.default_rng(0).standard_normal((2, 3, SIZE, SIZE), dtype=np.float32)
    expected = features_of(onnx.load(network), tensor)
    for source in (apart, bundle):
        whole = onnx.load_model_from_string(annotate(source, image=SCORES))
        np.testing.assert_array_equal(features_of(whole, tensor), expected)


def test_existing_metadata_of_a_graph_is_kept(network: Path) -> None:
    graph = with_facts(onnx.load(network), {"targets": ["kind"], "labels": ["old"]})
    onnx.save(graph, network)
    written = facts(annotate(network, labels=range(100)))
    assert (written["targets"], written["labels"][:2]) == (["kind"], ["0", "1"])


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_an_export_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConversionFailed, match=r"needs torch.*pip install 'batchserve\[torch\]'"):
        batchserve.export_torch(object(), np.zeros((2, 3)))
    with pytest.raises(ConversionFailed, match=r"needs torch.*pip install 'batchserve\[img2feat\]'"):
        batchserve.export_img2feat(object(), LogisticRegression())
    for arguments in (["net.pt", "--image", "imagenet"], ["head.joblib", "--image", "img2feat:resnet18"]):
        (tmp_path / arguments[0]).write_bytes(b"")
        done = run(tmp_path / arguments[0], *arguments[1:])
        assert isinstance(done.exception, ConversionFailed)
        assert "Install it with: pip install" in str(done.exception)
