"""The pages of models: what is known of each version, its registration and removal, and one record in a form."""

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
import numpy as np
import onnx
import pandas as pd
import pytest
from pages import shown, text_of
from PIL import Image
from selection import quick_first
from service import Api, running
from sklearn.linear_model import LogisticRegression

from batchserve import keys
from batchserve.access import Scope
from batchserve.conversion import convert
from batchserve.domain import AdmissionStep
from batchserve.web import admissions

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path, people_onnx: bytes) -> Iterator[Api]:
    """A service with the models iris and people."""
    with running(tmp_path_factory.mktemp("models"), worker=False) as api:
        api.register("iris", iris_onnx)
        api.register("people", people_onnx)
        yield api


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory, iris: pd.DataFrame) -> Iterator[Api]:
    """A service with three versions of a model: another column, then another class, then the same."""
    wide, narrow = iris.iloc[:, :3], iris.iloc[:, :2]
    classes = np.where(iris.iloc[:, 2] > 2.5, "long", "short")
    three = np.where(iris.iloc[:, 2] > 5, "huge", classes)
    with running(tmp_path_factory.mktemp("versions"), worker=False) as api:
        for frame, labels, c in ((narrow, classes, 100), (wide, three, 100), (wide, three, 200)):
            api.register("size", convert(LogisticRegression(max_iter=10_000, C=c).fit(frame, labels), frame).onnx)
        yield api


def sent(api: Api, model: bytes, name: str = "", filename: str = "model.onnx", **how: Any) -> httpx2.Response:
    """The answer to the form of registering."""
    return api.http.post("/models", data={"name": name}, files={"file": (filename, model)}, **how)


def signed_in(api: Api, scope: Scope) -> str:
    """A session with a key of this scope; returns the token of its forms."""
    database = api.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    with database.write() as connection:
        _, text = keys.create(connection, f"of-{scope}", scope, "acme", 1.0)
    assert api.http.post("/sign-in", data={"key": text}).status_code == 200
    found = re.search(r"sign-out\?token=(\w+)", api.http.get("/models").text)
    assert found is not None
    return found[1]


def model_of(text: str, **metadata: str) -> bytes:
    graph = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, value in metadata.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = name.replace("_", "."), value
    return bytes(graph.SerializeToString())


# --- what is known of a version --------------------------------------------------------------------------------------


def test_the_list_has_the_newest_version_of_each_model(versions: Api) -> None:
    page = shown(versions, "/models")
    assert '<a href="/models/size">size</a></th><td>classification</td> <td class="number">3</td>' in page


def test_a_version_shows_its_signature_its_labels_its_parity_and_its_speed(models: Api) -> None:
    page = shown(models, "/models/iris")
    assert "<h1>iris@1</h1>" in page
    assert '<th scope="row">petal width (cm)</th><td>float32</td><td>not allowed</td>' in page
    assert '<th scope="row">probability_setosa</th><td>Float32</td>' in page
    assert "setosa, versicolor, virginica" in page
    assert "with its original: 0 label flips in 150 records" in page
    body = models.http.get("/v1/models/iris").json()
    assert f"{body['records_per_second']:,.0f} records/s" in page
    assert f"{body['batch']:,} records in a run" in page
    assert body["digest"] in page


def test_a_column_shows_which_values_it_takes(models: Api) -> None:
    page = shown(models, "/models/people")
    assert '<th scope="row">age</th><td>float32</td><td>allowed</td>' in page
    assert '<th scope="row">city</th><td>string</td><td>not allowed</td><td>Bern, Biel, Genf</td>' in page


def test_each_version_shows_what_it_changes_against_the_one_before(versions: Api) -> None:
    page = shown(versions, "/models/size", version="2")
    assert "<h1>size@2</h1>" in page
    second, first = page.index("takes also petal length (cm) (float32)"), page.rindex("size?version=1")
    assert page.index("the same columns, results and labels") < second < first
    assert "gives also probability_huge (Float32)" in page
    assert "knows also huge" in page
    assert 'size?version=2" aria-current' in page


@pytest.mark.parametrize(
    "report", quick_first(['{"rows": "many"}', "{", "[]", '{"rows": 1, "label_flips": 0, "tolerance": []}'], 1)
)
def test_a_parity_report_that_is_none_is_not_shown(own_api: Api, report: str) -> None:
    text = "g (float[N] x) => (float[N] y) { y = Add(x, x) }"
    own_api.register("odd", model_of(text, batchserve_parity=report))
    assert "<h2>Parity</h2>" not in shown(own_api, "/models/odd")


@pytest.mark.parametrize("path", ["/models/gone", "/models/iris?version=9", "/models/iris?version=x"])
def test_a_version_that_is_not_there_is_a_page_that_says_so(models: Api, path: str) -> None:
    for address in (path, path.replace("?", "/try?")):
        answer = models.http.get(address)
        assert answer.status_code == 404
        assert "no model" in answer.text


# --- registering -----------------------------------------------------------------------------------------------------


def test_a_file_is_registered_and_shows_what_admission_found(own_api: Api, iris_onnx: Path) -> None:
    assert "Register a model" in shown(own_api, "/models")
    answer = sent(own_api, iris_onnx.read_bytes(), "flowers", follow_redirects=False)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/models/flowers?version=1&admitted=new#admission"
    page = shown(own_api, answer.headers["location"])
    assert "Version 1 is registered." in page
    assert "it takes 4 columns by name and gives 4" in page
    assert own_api.http.get("/v1/models/flowers").json()["version"] == 1
    again = sent(own_api, iris_onnx.read_bytes(), "flowers")
    assert "These bytes were registered before: they are version 1." in again.text


def test_the_step_of_a_registration_is_told_while_it_lasts(own_api: Api) -> None:
    # A run takes some 20 ms, so that its speed is measured for a second: no poll falls beside that step.
    slow = model_of(
        "g (float[N] x) => (float[N] y) {"
        " shape = Constant<value = int64[2] {800, 800}>() some = ReduceMax<keepdims = 0>(x) nothing = Sub(some, some)"
        " square = Expand(nothing, shape) product = MatMul(square, square) zero = ReduceMax<keepdims = 0>(product)"
        " y = Add(x, zero) }"
    )
    progress, told = f"/models/admissions/{uuid4()}", []
    with ThreadPoolExecutor(1) as pool:
        params = {"token": "", "admission": progress.rpartition("/")[2]}
        registered = pool.submit(sent, own_api, slow, "slow", params=params)
        while not registered.done():
            if (step := own_api.http.get(progress).json()["step"]) not in told:
                told.append(step)
    assert registered.result().status_code == 200
    assert [step for step in told if step] == [step for step in AdmissionStep if step in told]
    assert AdmissionStep.MEASURE in told
    assert own_api.http.get(progress).json() == {"step": None}
    assert own_api.http.get("/models/admissions/no-id").status_code == 404


def test_a_registration_whose_steps_cannot_be_noted_is_admitted(
    own_api: Api, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admissions, "TemporaryDirectory", lambda prefix: Path("/dev/null/none").touch())  # noqa: ARG005
    params = {"token": "", "admission": str(uuid4())}
    assert sent(own_api, iris_onnx.read_bytes(), "flowers", params=params).status_code == 200
    monkeypatch.undo()
    with ThreadPoolExecutor(2) as pool:  # of a page that sends its form twice
        both = [pool.submit(sent, own_api, iris_onnx.read_bytes(), name, params=params) for name in ("a", "b")]
        assert [answer.result().status_code for answer in both] == [200, 200]


def test_without_a_name_a_model_is_called_like_its_file(own_api: Api, iris_onnx: Path) -> None:
    answer = sent(own_api, iris_onnx.read_bytes(), filename="iris.v2.onnx", follow_redirects=False)
    assert answer.headers["location"].startswith("/models/iris.v2?version=1")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("fine", b"\x80\x04\x95 a pickle", "ONNX"),
        ("a name", b"", "a model&#39;s name has letters"),
        ("fine", b"", "the body is empty"),
    ],
)
def test_a_refused_file_is_told_why_with_the_form(own_api: Api, name: str, content: bytes, told: str) -> None:
    answer = sent(own_api, content, name)
    assert answer.status_code == 422
    assert told in answer.text
    assert f'value="{name}"' in answer.text
    assert own_api.http.get("/v1/models").json()["models"] == []


def test_a_form_without_a_file_registers_nothing(own_api: Api) -> None:
    assert own_api.http.post("/models", data={"name": "x"}).status_code == 400
    none = own_api.http.post("/models", files={"name": (None, "x")})
    assert none.status_code == 422
    assert "the form needs one file" in none.text


def test_only_an_admin_key_registers_and_deletes(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    token = signed_in(own_api, Scope.USER)
    page = shown(own_api, "/models")
    assert "needs an admin key" in page
    assert 'action="/models?' not in page
    assert "Delete…" not in shown(own_api, "/models/iris")
    assert sent(own_api, iris_onnx.read_bytes(), "other", params={"token": token}).status_code == 403
    delete = "/models/iris/versions/1/delete"
    assert own_api.http.post(delete, params={"token": token}, data={"confirmed": "yes"}).status_code == 403
    assert "iris@1" in shown(own_api, "/models/iris")
    token = signed_in(own_api, Scope.ADMIN)
    assert sent(own_api, iris_onnx.read_bytes(), "other").status_code == 403  # without the token
    assert sent(own_api, iris_onnx.read_bytes(), "other", params={"token": token}).status_code == 200
    assert own_api.http.post(delete, params={"token": token}, data={"confirmed": "yes"}).status_code == 200
    assert own_api.http.get("/models/iris").status_code == 404


def test_a_version_is_deleted_after_a_confirmation(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    asked = own_api.http.post("/models/iris/versions/1/delete")
    assert "Delete iris@1?" in asked.text
    assert "iris@1" in shown(own_api, "/models/iris")
    deleted = own_api.http.post("/models/iris/versions/1/delete", data={"confirmed": "yes"})
    assert "No model is registered yet." in deleted.text


def test_a_version_that_a_job_uses_is_not_deleted(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    own_api.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    answer = own_api.http.post("/models/iris/versions/1/delete", data={"confirmed": "yes"})
    assert answer.status_code == 409
    assert "iris@1 is used by 1 unfinished job(s)" in answer.text


# --- one record ------------------------------------------------------------------------------------------------------

FLOWER = {
    "column.sepal length (cm)": "6.7",
    "column.sepal width (cm)": "3",
    "column.petal length (cm)": "5.2",
    "column.petal width (cm)": "2.3",
}


def test_the_form_has_a_field_for_each_column_with_the_values_of_a_sample(models: Api) -> None:
    page = shown(models, "/models/people/try")
    for name, dtype in (("age", "float32, may be empty"), ("city", "string"), ("visits", "float32")):
        assert f"{name} <small>{dtype}</small></label>" in page
    sample = models.http.get("/v1/models/people").json()["sample"][0]
    assert f'name="column.city" type="text" value="{sample["city"]}"' in page
    assert '<option value="Genf"></option>' in page
    assert "<h2>Prediction</h2>" not in page


def test_a_record_has_the_answer_of_the_api(models: Api) -> None:
    page = shown(models, "/models/iris/try", **FLOWER)
    values = {name.removeprefix("column."): float(value) for name, value in FLOWER.items()}
    row = models.http.post("/v1/models/iris/predict", json=values).json()["prediction"][0]
    assert f"<dt>prediction</dt><dd>{row['prediction']}</dd>" in page
    shares = [
        (label, float(share)) for label, share in re.findall(r'row">(\w+)</th><td><meter [^>]*value="([^"]+)"', page)
    ]
    assert dict(shares) == {label: row[f"probability_{label}"] for label in ("setosa", "versicolor", "virginica")}
    assert shares == sorted(shares, key=lambda share: -share[1])
    assert 'name="column.petal width (cm)" type="text" inputmode="decimal" value="2.3"' in page


def test_the_answer_alone_is_given_where_only_that_is_asked_for(models: Api) -> None:
    answer = models.http.get("/models/iris/try", params=FLOWER, headers={"hx-target": "answer"})
    assert "<h2>Prediction</h2>" in answer.text
    assert "<form" not in answer.text


def test_a_value_of_the_wrong_type_and_one_that_is_missing_are_named(models: Api) -> None:
    wrong = models.http.get("/models/iris/try", params=FLOWER | {"column.sepal width (cm)": "wide"})
    assert wrong.status_code == 422
    assert "column &#39;sepal width (cm)&#39;: expected float32, got &#39;wide&#39;" in wrong.text
    assert 'value="wide"' in wrong.text
    assert "sepal width (cm): " in shown(models, "/models/iris/try", **FLOWER | {"column.sepal width (cm)": ""})
    assert "<h2>Prediction</h2>" in shown(
        models, "/models/people/try", **{"column.age": "", "column.city": "Bern", "column.visits": "3"}
    )


def test_an_older_version_answers_where_it_is_named(versions: Api) -> None:
    page = shown(versions, "/models/size/try", version="1")
    assert "size@1" in page
    assert "petal length" not in page


def test_an_array_is_written_as_json(own_api: Api) -> None:
    own_api.register("double", model_of("g (float[N, 2, 2] x) => (float[N, 2, 2] y) { y = Add(x, x) }"))
    page = shown(own_api, "/models/double/try")
    assert 'name="column.x" rows="3" class="code" spellcheck="false">[[0,0],[0,0]]</textarea>' in page
    page = shown(own_api, "/models/double/try", **{"column.x": "[[1, 2], [3, 4]]"})
    assert "<dt>y</dt><dd>[[2.0,4.0],[6.0,8.0]]</dd>" in page
    wrong = own_api.http.get("/models/double/try", params={"column.x": "[1, 2"})
    assert wrong.status_code == 422


@pytest.mark.slow
def test_many_fields_are_sent_in_the_body(own_api: Api) -> None:
    frame = pd.DataFrame({f"c{number}": [0.0, 1.0, 2.0] for number in range(100)})
    own_api.register("wide", convert(LogisticRegression().fit(frame, ["a", "b", "c"]), frame).onnx)
    assert '<form class="columns" method="post"' in shown(own_api, "/models/wide/try")
    fields = {f"column.{name}": "2" for name in frame.columns}
    assert "<dt>prediction</dt><dd>c</dd>" in own_api.http.post("/models/wide/try", data=fields).text


def test_an_image_is_sent_as_a_file(own_api: Api) -> None:
    own_api.register(
        "hues",
        model_of(
            "g (float[N, 3, 4, 4] image) => (float[N, 3] hue) {"
            "hue = ReduceMean <axes = [2, 3], keepdims = 0> (image) }",
            batchserve_image='{"resize": "stretch", "size": [4, 4]}',
        ),
    )
    assert 'name="file" type="file" accept="image/*"' in shown(own_api, "/models/hues/try")
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), (10, 20, 30), np.uint8)).save(file, "PNG")
    answer = own_api.http.post("/models/hues/try", files={"file": ("a.png", file.getvalue())})
    assert answer.status_code == 200
    assert "<dt>hue_1</dt><dd>20</dd>" in answer.text
    broken = own_api.http.post("/models/hues/try", files={"file": ("a.png", file.getvalue()[:40])})
    assert "<h2>Prediction</h2>" not in broken.text
    assert 'role="alert"' in broken.text


def test_an_image_is_sent_with_the_values_of_the_other_columns(own_api: Api) -> None:
    own_api.register(
        "weighted",
        model_of(
            "g (float[N, 3, 4, 4] image, float[N] weight) => (float[N, 3] hue) {"
            "mean = ReduceMean <axes = [2, 3], keepdims = 0> (image) "
            "axes = Constant <value_ints = [1]> () column = Unsqueeze(weight, axes) hue = Mul(mean, column) }",
            batchserve_image='{"resize": "stretch", "size": [4, 4]}',
        ),
    )
    page = shown(own_api, "/models/weighted/try")
    name = re.search(r'name="(column\.[^"]+)"', page)
    assert name is not None
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7, 3), (10, 20, 30), np.uint8)).save(file, "PNG")
    files = {"file": ("a.png", file.getvalue())}
    answer = own_api.http.post("/models/weighted/try", data={name[1]: "2"}, files=files)
    assert "<dt>hue_2</dt><dd>60</dd>" in answer.text


def test_a_form_of_one_record_needs_the_token_of_its_session_and_no_admin_key(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    token = signed_in(own_api, Scope.USER)
    assert "<h2>Prediction</h2>" in shown(own_api, "/models/iris/try", **FLOWER)
    assert own_api.http.post("/models/iris/try", data=FLOWER).status_code == 403
    assert own_api.http.post("/models/iris/try", params={"token": token}, data=FLOWER).status_code == 200


# --- protection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/models", "/models/iris", "/models/iris/try"])
def test_the_pages_of_models_run_no_foreign_script_and_answer_no_other_site(models: Api, path: str) -> None:
    policy = models.http.get(path).headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert models.http.get(path, headers=headers).status_code == 403
        assert models.http.post(path, headers=headers).status_code == 403


def test_markup_in_a_signature_is_text(own_api: Api) -> None:
    frame = pd.DataFrame({"<b>bold</b>": [0.0, 1.0, 2.0], "plain": [1.0, 2.0, 0.0]})
    own_api.register("odd", convert(LogisticRegression().fit(frame, ["<i>", "b", "c"]), frame).onnx)
    for path in ("/models/odd", "/models/odd/try?column.plain=1&column.%3Cb%3Ebold%3C%2Fb%3E=%22%3E"):
        page = shown(own_api, path) if "?" not in path else text_of(own_api.http.get(path).text)
        assert "&lt;b&gt;bold&lt;/b&gt;" in page
        assert "<b>bold" not in page
        assert "<i>" not in page
