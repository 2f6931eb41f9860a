import asyncio
import gzip
import hashlib
import io
import pickle
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
from calls import double, pid_after
from onnx import TensorProto
from service import Api, ok, problem, running
from sklearn.linear_model import LogisticRegression

from batchserve.errors import Unavailable
from batchserve.runtime import Runtime
from batchserve.service.calls import Calls
from batchserve.service.turns import Lane, Place
from batchserve.settings import Settings
from batchserve.storage import Piece, Stored
from batchserve.storage.local import LocalStorage

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
TEXT = '<ir_version: 8, opset_import: ["": 17]> '
DOUBLE = "g (float[N, 1] x) => (float[N, 1] y) { y = Add(x, x) }"
ROW = {"sepal length (cm)": 5.1, "sepal width (cm)": 3.5, "petal length (cm)": 1.4, "petal width (cm)": 0.2}


def graph(text: str = DOUBLE) -> onnx.ModelProto:
    return onnx.parser.parse_model(TEXT + text)


def numbered(number: int) -> bytes:
    """Models that give the same predictions and differ in their bytes."""
    model = graph()
    model.doc_string = f"number {number}"
    return bytes(model.SerializeToString())


# --- registering -----------------------------------------------------------------------------------------------------


def test_a_model_is_registered_once_and_its_next_bytes_are_a_version(api: Api) -> None:
    answer = api.http.put("/v1/models/versions", content=numbered(1))
    first = ok(answer, 201)
    assert answer.headers["location"] == first["links"]["self"] == "/v1/models/versions/versions/1"
    assert (first["version"], first["bytes"]) == (1, len(numbered(1)))
    again = api.http.put("/v1/models/versions", content=numbered(1))
    assert ok(again, 200) == first
    assert again.headers["location"] == first["links"]["self"]
    second = ok(api.http.put("/v1/models/versions", content=numbered(2)), 201)
    assert (second["version"], second["digest"] != first["digest"]) == (2, True)
    assert ok(api.http.get("/v1/models/versions")) == second
    assert ok(api.http.get("/v1/models/versions@1")) == first
    assert ok(api.http.get("/v1/models/versions/versions/1")) == first
    assert ok(api.http.get("/v1/models/versions/versions"))["models"] == [second, first]
    listed = {model["name"]: model for model in ok(api.http.get("/v1/models"))["models"]}
    assert listed["versions"] == second
    assert list(listed) == sorted(listed)


def test_models_are_listed_in_pages_and_by_a_part_of_their_name(api: Api) -> None:
    for name in ("paged-a", "paged-b", "Paged-c"):
        ok(api.http.put(f"/v1/models/{name}", content=numbered(21)), 201)
    ok(api.http.put("/v1/models/paged-a", content=numbered(22)), 201)
    whole = ok(api.http.get("/v1/models"))
    assert whole["next"] is None
    names = [model["name"] for model in whole["models"]]
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = ok(api.http.get("/v1/models", params={"limit": 2, **after}))
        seen += [model["name"] for model in page["models"]]
        if page["next"] is None:
            break
        assert page["next"] == seen[-1]
        after = {"after": page["next"]}
    assert seen == names
    found = ok(api.http.get("/v1/models", params={"q": "PAGED-"}))["models"]
    assert {(model["name"], model["version"]) for model in found} == {("paged-a", 2), ("paged-b", 1), ("Paged-c", 1)}
    assert ok(api.http.get("/v1/models", params={"q": "%"}))["models"] == []
    for query in ("limit=0", "limit=201", "name=x", "q=a%00"):
        problem(api.http.get(f"/v1/models?{query}"), 422, "invalid-options")


def test_a_model_lists_its_inputs_and_outputs(api: Api) -> None:
    model = ok(api.http.get("/v1/models/people"))
    assert (model["task"], model["labels"], model["mode"]) == ("classification", ["rare", "regular"], "rows")
    assert [(column["name"], column["dtype"], column["nullable"]) for column in model["columns"]] == [
        ("age", "float32", True),
        ("city", "string", False),
        ("visits", "float32", False),
    ]
    assert model["result_columns"] == {
        "prediction": "String",
        "probability_rare": "Float32",
        "probability_regular": "Float32",
    }
    assert model["batch"] >= 1
    assert model["records_per_second"] > 0
    assert set(model["sample"][0]) == {"age", "city", "visits"}
    assert model["metadata"]["batchserve.parity"]["passed"] is True
    assert ok(api.http.post(model["links"]["predict"], json=model["sample"]))["errors"] == []


@pytest.mark.parametrize("text", [r'{"a": "\ud800"}', "NaN", "[1e999]", "[" * 2000, "no JSON"])
def test_metadata_that_json_cannot_represent_is_shown_as_its_text(api: Api, text: str) -> None:
    graph = onnx.load_model_from_string(numbered(11))
    onnx.helper.set_model_props(graph, {"batchserve.remark": text})
    answer = api.http.put("/v1/models/remarked", content=graph.SerializeToString())
    assert answer.status_code == 201, answer.text
    assert ok(api.http.get("/v1/models/remarked"))["metadata"] == {"batchserve.remark": text}
    listed = ok(api.http.get("/v1/models"))["models"]
    assert {"batchserve.remark": text} in [model["metadata"] for model in listed]


def test_two_equal_registrations_at_once_give_one_version(api: Api) -> None:
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(api.http.put("/v1/models/twice", content=numbered(3))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.json()["version"] for answer in answers} == {1}
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert len(ok(api.http.get("/v1/models/twice/versions"))["models"]) == 1


def test_a_model_may_come_compressed_or_as_a_bundle(api: Api) -> None:
    assert ok(api.http.put("/v1/models/packed", content=gzip.compress(numbered(4))), 201)["bytes"] == len(numbered(4))
    model = graph("g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="weights.bin")
    weights = model.graph.initializer[0].raw_data or b"\x00\x00\x80?\x00\x00\x00@"
    model.graph.initializer[0].CopyFrom(outside)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("model.onnx", model.SerializeToString())
        members.writestr("weights.bin", weights)
    ok(api.http.put("/v1/models/bundle", content=archive.getvalue()), 201)
    answer = ok(api.http.post("/v1/models/bundle/predict?columns=a,b", content=b"a,b\n3,4\n"))
    assert list(answer["prediction"][0].values())[-2:] == [3.0, 8.0]


@pytest.mark.parametrize("name", ["a b", "-a", ".hidden", "a%00b", "ä", "a@1", "x" * 129, "%2e%2e", "a:b"])
def test_a_name_has_letters_digits_and_few_signs(api: Api, name: str) -> None:
    with api.unchanged():
        body = problem(api.http.put(f"/v1/models/{name}", content=numbered(5)), 422, "invalid-options")
        assert "letters, digits" in body["detail"]


@pytest.mark.parametrize(
    "path",
    ["rose", "iris@7", "iris@x", "rose/versions", "iris/versions/7", "iris/versions/99999999999999999999", "a%00b"],
)
def test_an_unknown_model_or_version_is_not_found(api: Api, path: str) -> None:
    problem(api.http.get(f"/v1/models/{path}"), 404, "model-not-found")


def test_the_versions_of_a_pinned_name_are_those_of_the_model(api: Api) -> None:
    assert api.http.get("/v1/models/iris@1/versions").json() == api.http.get("/v1/models/iris/versions").json()


@pytest.mark.parametrize("path", ["rose/versions/1", "iris/versions/7"])
def test_an_unknown_version_cannot_be_deleted(api: Api, path: str) -> None:
    problem(api.http.delete(f"/v1/models/{path}"), 404, "model-not-found")


def test_a_version_is_deleted_with_its_artifact_and_its_number_is_not_reused(api: Api) -> None:
    before = api.stored()
    for number in (6, 7):
        ok(api.http.put("/v1/models/going", content=numbered(number)), 201)
    assert len(api.stored() - before) == 2
    assert api.http.delete("/v1/models/going/versions/2").status_code == 204
    problem(api.http.get("/v1/models/going@2"), 404, "model-not-found")
    assert ok(api.http.get("/v1/models/going"))["version"] == 1
    assert ok(api.http.put("/v1/models/going", content=numbered(7)), 201)["version"] == 3
    for version in (1, 3):
        assert api.http.delete(f"/v1/models/going/versions/{version}").status_code == 204
    problem(api.http.get("/v1/models/going"), 404, "model-not-found")
    problem(api.http.get("/v1/models/going/versions"), 404, "model-not-found")
    assert api.stored() == before


def test_an_artifact_that_another_model_shares_stays(api: Api) -> None:
    for name in ("mine", "yours"):
        ok(api.http.put(f"/v1/models/{name}", content=numbered(8)), 201)
    assert api.http.delete("/v1/models/mine/versions/1").status_code == 204
    answer = ok(api.http.post("/v1/models/yours/predict", content=b"x\n4\n"))
    assert list(answer["prediction"][0].values())[-1] == 8.0


def test_a_version_whose_artifact_is_lost_is_admitted_again(api: Api) -> None:
    version = ok(api.http.put("/v1/models/lost", content=numbered(20)), 201)
    artifact = Path(api.settings.storage) / "models" / f"{version['digest']}.onnx"
    artifact.unlink()
    assert ok(api.http.put("/v1/models/lost", content=numbered(20))) == version
    assert artifact.exists()
    assert ok(api.http.post("/v1/models/lost/predict", content=b"x\n4\n"))["errors"] == []


def test_bytes_that_are_registered_while_their_last_version_is_deleted_are_kept(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is removed when the registration has stored it again, but not yet its row."""
    with running(tmp_path, worker=False, database=database_url) as api:
        removed_late(api, monkeypatch)


def removed_late(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = ok(api.http.put("/v1/models/turning", content=numbered(21)), 201)["digest"]
    artifact = Path(api.settings.storage) / "models" / f"{digest}.onnx"
    stored, answers = threading.Event(), []
    delete, compose = LocalStorage.delete, LocalStorage.compose

    def delete_late(storage: LocalStorage, key: str) -> None:
        if key == f"models/{digest}.onnx":
            register.start()
            assert stored.wait(20)
            time.sleep(0.5)
        delete(storage, key)

    def compose_and_tell(storage: LocalStorage, key: str, pieces: Iterable[Piece]) -> Stored:
        composed = compose(storage, key, pieces)
        if key == f"models/{digest}.onnx":
            stored.set()
        return composed

    monkeypatch.setattr(LocalStorage, "delete", delete_late)
    monkeypatch.setattr(LocalStorage, "compose", compose_and_tell)
    register = threading.Thread(target=lambda: answers.append(api.http.put("/v1/models/turning", content=numbered(21))))
    assert api.http.delete("/v1/models/turning/versions/1").status_code == 204
    register.join()
    monkeypatch.undo()
    assert ok(answers[0], 201)["version"] == 2
    assert artifact.exists()
    assert ok(api.http.post("/v1/models/turning/predict", content=b"x\n4\n"))["errors"] == []


def test_a_version_in_use_is_not_deleted(idle_api: Api, iris_onnx: Path) -> None:
    idle_api.register("used", iris_onnx)
    job = ok(idle_api.http.post("/v1/predict?model=used&reuse=false", content=CSV), 202)
    with idle_api.unchanged():
        answer = idle_api.http.delete("/v1/models/used/versions/1")
        assert "1 unfinished job" in problem(answer, 409, "model-in-use")["detail"]
    ok(idle_api.http.post(job["links"]["cancel"]), 202)
    assert idle_api.http.delete("/v1/models/used/versions/1").status_code == 204
    assert idle_api.job(job["id"])["model"]["name"] == "used"


def test_a_form_with_one_file_registers_it(idle_api: Api, iris_onnx: Path) -> None:
    model = iris_onnx.read_bytes()
    answer = idle_api.http.put(
        "/v1/models/sent-as-form", files={"file": ("iris.onnx", model)}, data={"note": "x" * 100}
    )
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == hashlib.sha256(model).hexdigest()
    two = idle_api.http.put("/v1/models/sent-as-form", files=[("file", ("a.onnx", model)), ("file", ("b.onnx", model))])
    assert "expected a form with one file, got 2" in problem(two, 422, "invalid-options")["detail"]
    long = idle_api.http.put("/v1/models/sent-as-form", files={"file": ("a.onnx", model)}, data={"note": "x" * 300_000})
    assert "may have 262,144 bytes in all" in problem(long, 400, "bad-request")["detail"]


# --- refused models --------------------------------------------------------------------------------------------------


def external(location: str) -> bytes:
    model = graph("g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value=location)
    model.graph.initializer[0].CopyFrom(outside)
    return bytes(model.SerializeToString())


def foreign() -> bytes:
    model = graph()
    model.opset_import.add(domain="evil", version=1)
    model.graph.node[0].domain = "evil"
    return bytes(model.SerializeToString())


def greedy() -> bytes:
    """A graph of about a hundred bytes that asks for 2 GB."""
    size = "s = Constant <value = int64[1] {500000000}> ()"
    model = graph(
        f"g (float[N, 1] x) => (float[N, 1] y) {{ {size} z = ConstantOfShape(s) t = ReduceSum(z) y = Add(x, t) }}"
    )
    content = bytes(model.SerializeToString())
    assert len(content) < 200
    return content


def endless() -> bytes:
    return bytes(
        graph(
            """g (float[N, 1] x) => (float[N, 1] y) {
                trips = Constant <value = int64 {9223372036854775807}> ()
                always = Constant <value = bool {1}> ()
                y = Loop (trips, always, x) <body = b (int64 i, bool on, float[N, 1] a) => (bool more, float[N, 1] c) {
                    more = Identity(on)
                    c = Neg(a)
                }>
            }"""
        ).SerializeToString()
    )


REFUSED = {
    "empty": (b"", "empty"),
    "text": (b"hello, I am no model", "ONNX"),
    "pickle": (pickle.dumps(LogisticRegression()), "pickle"),
    "malformed": (numbered(9)[:-7], "ONNX"),
    "external": (external("weights.bin"), "outside of the model"),
    "external-path": (external("../../../../etc/passwd"), "outside of the model"),
    "foreign": (foreign(), "evil"),
    "no-inputs": (
        bytes(graph("g () => (float[1] y) { y = Constant <value = float[1] {1}> () }").SerializeToString()),
        "",
    ),
    "greedy": (greedy(), "memory"),
    "zip": (b"PK\x05\x06" + bytes(18), "model"),
    "broken-zip": (b"PK\x03\x04" + bytes(40), ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_that_is_refused_leaves_nothing_and_says_why(api: Api, what: str) -> None:
    content, named = REFUSED[what]
    with api.unchanged():
        body = problem(api.http.put("/v1/models/refused", content=content), 422, "model-refused")
        assert named in body["detail"]
        problem(api.http.get("/v1/models/refused"), 404, "model-not-found")
    assert api.run(CSV, "iris")["state"] == "completed"


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[Api]:
    """A service with a time limit of eight seconds for a registration: a call that waits for its end is told from one
    that a busy machine delays."""
    with running(tmp_path, admission_timeout=8.0, online_wait=60.0, processes=1) as api:
        ok(api.http.put("/v1/models/double", content=numbered(10)), 201)  # starts the processes
        yield api


@pytest.mark.slow
def test_an_endless_registration_ends_within_its_time_limit_and_others_continue(hurried: Api) -> None:
    waiting = threading.Event()
    answers: list[float] = []

    def ask() -> None:
        while not waiting.is_set():
            began = time.monotonic()
            ok(hurried.http.get("/livez"))
            ok(hurried.http.post("/v1/models/double/predict", content=b"x\n4\n"))
            answers.append(time.monotonic() - began)
            time.sleep(0.2)

    other = threading.Thread(target=ask)
    other.start()
    began = time.monotonic()
    with hurried.unchanged():
        answer = hurried.http.put("/v1/models/endless", content=endless())
        took = time.monotonic() - began
        waiting.set()
        other.join()
        assert "8 s" in problem(answer, 422, "model-refused")["detail"]
    assert took > 7.5
    assert len(answers) > 2
    assert max(answers) < 6
    assert hurried.run("x\n4\n", "double")["rows"]["ok"] == 1
    ok(hurried.http.put("/v1/models/double", content=numbered(11)), 201)


@pytest.mark.slow
def test_registrations_leave_a_process_for_other_calls(hurried: Api) -> None:
    """Three endless registrations run one at a time; online predictions are answered meanwhile."""
    with ThreadPoolExecutor(3) as pool:
        began = time.monotonic()
        endings = [pool.submit(hurried.http.put, f"/v1/models/endless-{n}", content=endless()) for n in range(3)]
        times = []
        while time.monotonic() - began < 12:
            asked = time.monotonic()
            ok(hurried.http.post("/v1/models/double/predict", content=b"x\n4\n"))
            times.append(time.monotonic() - asked)
            time.sleep(0.1)
        answers = [ending.result() for ending in endings]
    assert max(times) < 6
    for answer in answers:
        problem(answer, 422, "model-refused")
    assert time.monotonic() - began > 23  # one after the other


@pytest.mark.slow
def test_a_registration_that_waits_too_long_gets_503_with_retry_after(tmp_path: Path) -> None:
    with running(tmp_path, admission_timeout=15.0, online_wait=1.0) as api, ThreadPoolExecutor(1) as pool:
        first = pool.submit(api.http.put, "/v1/models/endless", content=endless())
        time.sleep(0.5)
        began = time.monotonic()
        answer = api.http.put("/v1/models/double", content=numbered(22))
        assert 0.8 < time.monotonic() - began < 10
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "5"
        problem(first.result(), 422, "model-refused")
        ok(api.http.put("/v1/models/double", content=numbered(22)), 201)


@pytest.mark.slow
def test_a_call_that_waits_too_long_for_a_process_is_unavailable(tmp_path: Path) -> None:
    settings = Settings(storage=str(tmp_path), online_wait=0.5)

    async def call_three() -> list[int | BaseException]:
        with Runtime.open(settings) as runtime:
            calls = Calls(runtime.interactive, most=64, patience=settings.online_wait)
            place = Place("default", Lane.ONLINE)
            await calls.run(place, double, 1, seconds=60)  # starts the processes
            long = [asyncio.create_task(calls.run(place, pid_after, 10.0, seconds=40)) for _ in range(2)]
            await asyncio.sleep(0.2)
            began = time.monotonic()
            with pytest.raises(Unavailable, match=r"free for 0\.5 s"):
                await calls.run(place, double, 2, seconds=0.5)
            assert 0.4 < time.monotonic() - began < 8
            pids = await asyncio.gather(*long, return_exceptions=True)
            assert await calls.run(place, double, 3, seconds=40) == 6
            return pids

    pids = asyncio.run(call_three())
    assert all(isinstance(pid, int) for pid in pids)  # the other calls continued


def test_a_model_longer_than_the_limit_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, worker=False, model_bytes=50) as api, api.unchanged():
        problem(api.http.put("/v1/models/long", content=numbered(12)), 413, "payload-too-large")
        problem(api.http.put("/v1/models/long", content=iter([numbered(12)])), 413, "payload-too-large")
