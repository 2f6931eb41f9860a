import difflib
import re
from collections.abc import Iterator
from typing import Any

import pytest
from service import Api, ok, problem

from website import openapi

JOB = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"
UNKNOWN = {
    "job_id": JOB, "upload_id": JOB, "schedule_id": JOB, "name": "unknown", "version": "1", "webhook_id": JOB,
    "delivery_id": JOB, "tenant": "unknown",
}  # fmt: skip
TEXT = ("application/json", "application/x-ndjson", "text/csv", "text/plain", "text/event-stream")


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    found: dict[str, Any] = ok(api.http.get("/openapi.json"))
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path and description of every operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema, or what it refers to."""
    for choice in [schema, *schema.get("anyOf", [])]:
        if "$ref" in choice:
            found: dict[str, Any] = document["components"]["schemas"][choice["$ref"].rpartition("/")[2]]
            return found
    return schema


def shows(document: dict[str, Any], content: dict[str, Any]) -> bool:
    schema = resolved(document, content.get("schema", {}))
    return any(word in place for place in (content, schema) for word in ("example", "examples"))


def test_every_operation_has_a_name_a_summary_and_a_tag(document: dict[str, Any]) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(names)) == len(names)
    assert {"upload", "predict", "download", "get_job", "register_model", "predict_online", "get_liveness"} <= set(
        names
    )
    tags = {tag["name"] for tag in document["tags"]}
    for method, path, operation in operations(document):
        assert operation["summary"], (method, path)
        assert set(operation["tags"]) <= tags, (method, path)
        assert len(operation["tags"]) == 1, (method, path)


def test_every_text_body_has_an_example(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
            assert media_type not in TEXT or shows(document, content), (method, path, media_type)
        for status, response in operation["responses"].items():
            for media_type, content in response.get("content", {}).items():
                assert media_type not in TEXT or shows(document, content), (method, path, status, media_type)


def test_every_operation_says_that_it_answers_with_problems(document: dict[str, Any]) -> None:
    reference = {"schema": {"$ref": "#/components/schemas/Problem"}}
    for method, path, operation in operations(document):
        if operation["tags"] != ["health"]:
            for status in ("4XX", "5XX"):
                assert operation["responses"][status]["content"] == {"application/problem+json": reference}, (
                    method, path,
                )  # fmt: skip
    assert {"type", "code", "title", "status", "detail"} <= set(
        document["components"]["schemas"]["Problem"]["required"]
    )


def test_every_answer_of_an_operation_has_a_schema_and_those_that_succeed_have_one_type(
    document: dict[str, Any],
) -> None:
    """From a choice of types, a generated client would make a type that its user has to take apart."""
    for method, path, operation in operations(document):
        types = set()
        for status, answer in operation["responses"].items():
            if status in ("204", "206", "304", "307"):  # a range is of the file that 200 describes
                assert "content" not in answer, (method, path, status)
                continue
            assert answer["content"], (method, path, status)
            for media_type, content in answer["content"].items():
                schema = content.get("schema") or content.get("itemSchema")
                assert schema, (method, path, status, media_type)
                assert not {"anyOf", "oneOf"} & schema.keys(), (method, path, status)
                if status.startswith("2") and "$ref" in schema:
                    types.add(schema["$ref"])
        assert len(types) <= 1, (method, path, types)


def test_operations_are_named_by_words_in_small_letters(document: dict[str, Any]) -> None:
    for _, _, operation in operations(document):
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", operation["operationId"])


def test_the_committed_document_is_that_of_the_code() -> None:
    committed = openapi.PATH.read_text(encoding="utf-8")
    changes = difflib.unified_diff(
        committed.splitlines(), openapi.document().splitlines(), "committed", "code", lineterm=""
    )
    shown = "\n".join(list(changes)[:60])
    assert not shown, f"docs/openapi.json has changed; write it by `python -m website` and commit it:\n{shown}"


def test_no_reference_of_the_document_is_dead(document: dict[str, Any]) -> None:
    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                yield value["$ref"]
            value = list(value.values())
        if isinstance(value, list):
            for child in value:
                yield from references(child)

    found = set(references(document))
    assert found
    for reference in found:
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference


def test_the_example_of_a_job_has_the_shape_of_a_job(api: Api, document: dict[str, Any]) -> None:
    def shape(value: Any) -> Any:
        """The names of the existing fields; the document leaves out null fields."""
        if isinstance(value, dict):
            return {name: shape(child) for name, child in value.items() if child is not None}
        return type(value).__name__

    body = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
    job = api.run(body, "iris", metadata='{"night": "x"}', filename="flowers.csv")
    assert shape(document["components"]["schemas"]["JobBody"]["example"]) == shape(job)
    model = ok(api.http.get("/v1/models/iris"))
    example = document["components"]["schemas"]["ModelBody"]["example"]
    assert shape({**example, "metadata": {}}) == shape({**model, "metadata": {}})
    online = ok(api.http.post("/v1/models/iris/predict", content=body))
    assert shape(document["components"]["schemas"]["OnlineBody"]["example"]) == shape(online)


def test_every_operation_answers_an_unknown_id_with_a_problem(api: Api, document: dict[str, Any]) -> None:
    asked = 0
    for method, path, operation in operations(document):
        if "{" not in path or operation["operationId"] in ("register_model", "set_quota"):
            continue
        query = {"model": "iris"} if operation["operationId"] == "predict" else {}
        answer = api.http.request(method, path.format(**UNKNOWN), params=query)
        codes = {
            "{job_id}": "job-not-found",
            "{upload_id}": "upload-not-found",
            "{schedule_id}": "schedule-not-found",
            "{webhook_id}": "webhook-not-found",
            "{tenant}": "not-found",
        }
        problem(answer, 404, next((code for name, code in codes.items() if name in path), "model-not-found"))
        asked += 1
    assert asked >= 14


@pytest.mark.slow
def test_every_operation_survives_parameters_of_any_kind(api: Api, document: dict[str, Any]) -> None:
    hostile = [
        "",
        "0",
        "-1",
        "9" * 40,
        "nan",
        "null",
        "true",
        "\u202e",
        "a\x00b",
        "' OR 1=1 --",
        "{",
        "[]",
        "%",
        "😀" * 50,
    ]
    for method, path, operation in operations(document):
        names = [entry["name"] for entry in operation.get("parameters", []) if entry["in"] == "query"]
        for value in hostile:
            for name in names:
                answer = api.http.request(method, path.format(**UNKNOWN), params={name: value})
                assert answer.status_code < 500, (method, path, name, value, answer.text)
                if answer.status_code >= 400:
                    assert answer.headers["content-type"] == "application/problem+json"


def test_hostile_path_segments_are_not_found_or_refused(api: Api, document: dict[str, Any]) -> None:
    for method, path, _ in operations(document):
        if "{" in path and method != "PUT":
            for segment in ("%2e%2e%2f%2e%2e%2fetc%2fpasswd", "%00", "%ff%fe", "a%0d%0ab", "'--", "x" * 5000):
                url = path.format(**dict.fromkeys(UNKNOWN, segment))
                answer = api.http.request(method, url, params={"model": "iris"})
                assert answer.status_code in (404, 405, 422), (method, url, answer.text)
                assert answer.headers["content-type"] == "application/problem+json"
                assert "root:" not in answer.text


def test_the_documentation_page_answers(api: Api) -> None:
    page = api.http.get("/docs")
    assert page.status_code == 200
    assert "/openapi.json" in page.text
    assert api.http.get("/redoc").status_code == 404


def test_the_swagger_page_needs_no_other_host(api: Api) -> None:
    page = api.http.get("/docs").text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert addresses
    for address in addresses:
        assert address.startswith("/docs/static/"), address
        assert api.http.get(address).status_code == 200, address
    assert "//" not in page.replace("<!DOCTYPE", "")


def test_a_response_with_a_job_or_a_model_links_to_its_operations(api: Api, document: dict[str, Any]) -> None:
    found = {operation["operationId"]: (method, path) for method, path, operation in operations(document)}
    linked = {
        operation["operationId"]: {
            name for response in operation["responses"].values() for name in response.get("links", {})
        }
        for _, _, operation in operations(document)
    }
    on_jobs = {name for name, (_, path) in found.items() if "{job_id}" in path}
    on_models = {name for name, (_, path) in found.items() if "{name}" in path} - {"register_model"}
    for name in ("upload", "upload_and_predict", "predict", "get_job", "list_jobs", "cancel_job", "retry_job"):
        assert linked[name] == on_jobs, name
    for name in ("register_model", "get_model", "get_version"):
        assert linked[name] == on_models, name
    body = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
    bodies = {"upload": api.run(body, "iris"), "list_jobs": ok(api.http.get("/v1/jobs")),
              "get_model": ok(api.http.get("/v1/models/iris"))}  # fmt: skip
    for name, answered in bodies.items():
        for target, link in links_of(document, name).items():
            method, path = found[target]
            values = {parameter: at(answered, expression) for parameter, expression in link["parameters"].items()}
            url = path.format(**values)
            if method == "GET":
                assert api.http.get(url).is_success, url


def links_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    for _, _, operation in operations(document):
        if operation["operationId"] == name:
            return {target: link for response in operation["responses"].values()
                    for target, link in response.get("links", {}).items()}  # fmt: skip
    raise AssertionError(name)


def at(body: Any, expression: str) -> Any:
    """What a runtime expression of OpenAPI means."""
    for part in expression.removeprefix("$response.body#/").split("/"):
        body = body[int(part)] if isinstance(body, list) else body[part]
    return body
