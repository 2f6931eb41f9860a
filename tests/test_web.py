"""The pages, as a browser without scripts asks for them."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest
from commands import in_a_process
from pages import shown
from service import Api

from batchserve import keys
from batchserve.access import Scope

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


# --- the list --------------------------------------------------------------------------------------------------------


def test_a_dropped_file_becomes_a_job_that_is_shown(own_api: Api) -> None:
    files = {"file": ("flowers.csv", CSV)}
    answer = own_api.http.post("/upload", files=files, follow_redirects=False)
    assert answer.status_code == 303
    assert "flowers.csv" in shown(own_api, answer.headers["location"])
    assert "flowers.csv" in shown(own_api, "/jobs")
    assert "flowers.csv" in shown(own_api, "/")


def test_jobs_are_found_by_words_and_qualifiers(own_api: Api) -> None:
    own_api.http.post("/upload", files={"file": ("flowers.csv", CSV)})
    for found in ("flowers", "state:uploaded", "state:failed,uploaded since:1h flowers", "until:2999-01-01"):
        assert "flowers.csv" in shown(own_api, f"/jobs?q={found}"), found
    for other in ("state:failed", "model:iris", "wine", "until:2020-01-01", "since:2999-01-01T10:00"):
        assert "flowers.csv" not in shown(own_api, f"/jobs?q={other}"), other


def test_a_list_is_sorted_by_qualifiers_on_all_its_pages(own_api: Api) -> None:
    for number in range(53):
        own_api.http.post(own_api.upload(CSV, filename=f"file-{number:02}.csv")["links"]["cancel"])
    for search, first, last in (("order:asc", 0, 52), ("sort:finished", 52, 0), ("finished-since:1d order:asc", 0, 52)):
        page = shown(own_api, f"/jobs?q={search}")
        assert re.findall(r"file-(\d\d)\.csv</a>", page)[0] == f"{first:02}"
        assert ("Finished</th>" in page) == ("finished" in search)
        following = re.search(r'rel="next" href="([^"]+)"', page)
        assert following is not None
        assert (
            re.findall(r"file-(\d\d)\.csv</a>", shown(own_api, following[1].replace("&amp;", "&")))[-1] == f"{last:02}"
        )
    assert "There are no jobs yet" not in shown(own_api, "/jobs?q=finished-until:1d")


def test_states_and_times_are_chosen_by_links_that_keep_the_other_words(own_api: Api) -> None:
    own_api.upload(CSV, filename="flowers.csv")
    page = shown(own_api, "/jobs?q=flowers state:failed since:1h")
    for link in (
        "flowers%20since%3A1h",
        "flowers%20since%3A1h%20state%3Auploaded",
        "flowers%20state%3Afailed%20since%3A7d",
        "flowers%20state%3Afailed",
    ):
        assert f'href="/jobs?q={link}"' in page
    assert "flowers.csv" in shown(own_api, "/jobs?q=flowers%20since%3A1h%20state%3Auploaded")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("state:done", "there is no state &#39;done&#39;; the states are uploaded, queued"),
        ("since:yesterday", "expected an age such as 30min, 12h or 7d, or a date"),
        ("model:a@b", "expected a name, or name@version"),
        ("sort:size", "sort:size: expected created or finished"),
        ("order:up", "order:up: expected desc or asc"),
        ("sort:created finished-since:1d", "sort:created: expected finished, with finished-since:1d"),
    ],
)
def test_a_qualifier_that_is_not_understood_is_told(own_api: Api, text: str, told: str) -> None:
    assert told in shown(own_api, f"/jobs?q={text}", 422)


def test_older_jobs_are_a_page_further(own_api: Api) -> None:
    for number in range(51):
        own_api.upload(CSV, filename=f"file-{number}.csv")
    first = shown(own_api, "/jobs")
    assert "file-50.csv" in first
    assert "file-0.csv" not in first
    older = re.search(r'rel="next" href="([^"]+)"', first)
    assert older is not None
    assert "file-0.csv" in shown(own_api, older[1].replace("&amp;", "&"))


# --- several at a time -----------------------------------------------------------------------------------------------


def test_selected_jobs_are_deleted_after_a_confirmation(own_api: Api) -> None:
    jobs = [own_api.upload(CSV)["id"] for _ in range(3)]
    asked = own_api.http.post("/jobs", data={"job": jobs[:2], "action": "delete"})
    assert "Delete 2 jobs?" in asked.text
    assert len(own_api.http.get("/v1/jobs").json()["jobs"]) == 3
    own_api.http.post("/jobs", data={"job": jobs[:2], "action": "delete", "confirmed": "yes"})
    assert [job["id"] for job in own_api.http.get("/v1/jobs").json()["jobs"]] == jobs[2:]


def test_selected_jobs_are_cancelled_and_retried(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    answer = own_api.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    job_id = answer.json()["id"]
    own_api.http.post("/jobs", data={"job": [job_id], "action": "cancel"})
    assert own_api.job(job_id)["state"] == "cancelled"
    own_api.http.post("/jobs", data={"job": [job_id], "action": "retry"})
    assert own_api.job(job_id)["state"] == "queued"


def test_a_job_that_cannot_be_changed_is_named_and_the_others_are_changed(own_api: Api) -> None:
    job_id = own_api.upload(CSV)["id"]
    answer = own_api.http.post("/jobs", data={"job": ["gone", job_id], "action": "delete", "confirmed": "yes"})
    assert answer.status_code == 409
    assert "no job &#39;gone&#39;" in answer.text
    assert own_api.http.get(f"/v1/jobs/{job_id}").status_code == 404


# --- keys ------------------------------------------------------------------------------------------------------------


def with_key(api: Api, scope: Scope = Scope.USER, tenant: str = "acme") -> str:
    database = api.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    with database.write() as connection:
        _, text = keys.create(connection, f"{tenant}-{scope}", scope, tenant, 1.0)
    return text


def test_with_keys_in_force_a_page_leads_to_the_form_for_a_key(own_api: Api) -> None:
    key = with_key(own_api)
    answer = own_api.http.get("/jobs", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=/jobs")
    wrong = own_api.http.post("/sign-in?next=/jobs", data={"key": "bs_wrong"})
    assert wrong.status_code == 401
    assert "not an API key" in wrong.text
    right = own_api.http.post("/sign-in?next=/jobs", data={"key": key}, follow_redirects=False)
    assert (right.status_code, right.headers["location"]) == (303, "/jobs")
    cookie = right.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "Sign out" in shown(own_api, "/jobs")
    token = re.search(r"sign-out\?token=(\w+)", shown(own_api, "/jobs"))
    assert token is not None
    own_api.http.post(f"/sign-out?token={token[1]}")
    assert own_api.http.get("/jobs", follow_redirects=False).status_code == 303


@pytest.mark.slow
def test_a_page_is_told_of_changes_until_its_key_is_revoked(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    key = in_a_process(tmp_path, "keys", "create", "ada").stdout.strip()
    with start_server(tmp_path) as url, httpx2.Client(base_url=url, timeout=30) as http:
        http.post("/sign-in", data={"key": key})
        with http.stream("GET", "/jobs/changes") as stream:
            lines = stream.iter_lines()
            for name in ("first.csv", "second.csv"):
                headers = {"authorization": f"Bearer {key}"}
                httpx2.post(f"{url}/v1/upload", content=CSV, params={"filename": name}, headers=headers)
                assert next(line for line in lines if line) == "event: change"
                assert next(lines) == "data:"
            in_a_process(tmp_path, "keys", "revoke", "ada")
            assert set(lines) <= {"", "event: change", "data:"}  # it ends


def test_the_cookie_of_pages_is_no_key_for_the_api(own_api: Api) -> None:
    own_api.http.post("/sign-in", data={"key": with_key(own_api)})
    assert own_api.http.get("/v1/jobs").status_code == 401


def test_a_form_without_the_token_of_its_session_changes_nothing(own_api: Api) -> None:
    own_api.http.post("/sign-in", data={"key": with_key(own_api)})
    answer = own_api.http.post("/upload", files={"file": ("flowers.csv", CSV)})
    assert answer.status_code == 403
    assert "this form is of another session" in answer.text
    assert "flowers.csv" not in shown(own_api, "/jobs")


def test_a_reader_sees_jobs_and_changes_nothing(own_api: Api) -> None:
    user, reader = with_key(own_api), with_key(own_api, Scope.READER)
    headers = {"authorization": f"Bearer {user}"}
    job = own_api.http.post("/v1/upload?filename=flowers.csv", content=CSV, headers=headers).json()
    own_api.http.post("/sign-in", data={"key": reader})
    page = shown(own_api, "/jobs")
    assert "flowers.csv" in page
    token = re.search(r"\?token=(\w+)", page)
    assert token is not None
    for path, form in (
        ("/upload", {}),
        ("/jobs", {"job": job["id"], "action": "delete", "confirmed": "yes"}),
        ("/jobs", {"job": job["id"], "action": "cancel"}),
    ):
        answer = own_api.http.post(f"{path}?token={token[1]}", data=form)
        assert answer.status_code == 403, path
        assert "the scope reader" in answer.text
    assert own_api.http.get(job["links"]["self"], headers=headers).json()["state"] == "uploaded"
    own_api.http.post(f"/sign-out?token={token[1]}")
    assert own_api.http.get("/jobs", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("target", ["https://example.org", "//example.org", "/\\example.org", "jobs", "/a\nb"])
def test_after_the_sign_in_no_other_site_is_shown(own_api: Api, target: str) -> None:
    key = with_key(own_api)
    answer = own_api.http.post("/sign-in", params={"next": target}, data={"key": key}, follow_redirects=False)
    assert answer.headers["location"] == "/"


def test_a_reader_sees_pages_without_what_changes_something(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    job_id = own_api.upload(CSV, filename="flowers.csv")["id"]
    own_api.http.post("/sign-in", data={"key": with_key(own_api, Scope.READER, "default")})
    for path in ("/", "/jobs", f"/jobs/{job_id}", "/models", "/models/iris", "/system"):
        changing = set(re.findall(r'<form method="post" action="([^"?]+)', shown(own_api, path)))
        assert changing <= {"/sign-out", "/jobs"}, path
        assert not re.search(r"Cancel|Delete|Upload<|Start<|Register<", shown(own_api, path)), path
    token = re.search(r"sign-out\?token=(\w+)", shown(own_api, "/"))
    assert token is not None
    for path in ("/jobs", "/upload", f"/jobs/{job_id}/cancel", f"/jobs/{job_id}/delete", f"/jobs/{job_id}/predict"):
        assert own_api.http.post(f"{path}?token={token[1]}").status_code == 403, path


def test_tenants_see_their_own_jobs(own_api: Api) -> None:
    acme, umbrella = with_key(own_api, tenant="acme"), with_key(own_api, tenant="umbrella")
    headers = {"authorization": f"Bearer {umbrella}"}
    job = own_api.http.post("/v1/upload?filename=secret.csv", content=CSV, headers=headers).json()
    own_api.http.post("/sign-in", data={"key": acme})
    assert "secret.csv" not in shown(own_api, "/jobs")
    shown(own_api, f"/jobs/{job['id']}", 404)
    assert "uploaded <b>0</b>" in shown(own_api, "/jobs")


# --- protection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/jobs", "/sign-in", "/static/style.css"])
def test_pages_run_no_foreign_script_and_are_in_no_frame(own_api: Api, path: str) -> None:
    headers = own_api.http.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/jobs", "/upload", "/sign-in"])
def test_a_page_from_elsewhere_neither_reads_nor_posts(own_api: Api, path: str) -> None:
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert own_api.http.get(path, headers=headers).status_code == 403
        assert own_api.http.post(path, headers=headers).status_code == 403
    assert own_api.http.get(path, headers={"host": "evil.example"}).status_code == 421


def test_markup_in_a_name_is_text(own_api: Api) -> None:
    own_api.upload(CSV, filename="<script>alert(1)</script>.csv")
    page = shown(own_api, "/jobs")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.csv" in page
    assert "<script>alert" not in page
