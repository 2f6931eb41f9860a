"""The pages about the system and its keys."""

import re
from pathlib import Path

import pytest
from service import Api, running
from sqlalchemy import update

from batchserve import keys
from batchserve.access import Scope
from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.settings import Settings

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


def database_of(own_api: Api) -> Database:
    database: Database = own_api.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    return database


def signed_in(own_api: Api, scope: Scope, tenant: str = "acme") -> str:
    """The text of a new key, with which the client is signed in."""
    with database_of(own_api).write() as connection:
        _, text = keys.create(connection, f"{tenant.replace('*', 'all')}-{scope}", scope, tenant, 1.0)
    assert own_api.http.post("/sign-in", data={"key": text}).status_code in (200, 303)
    return text


def said(html: str) -> str:
    """The text of a page, without its navigation."""
    main = re.search(r"<main.*</main>", html, re.DOTALL)
    assert main is not None
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", main[0]))


def token(own_api: Api) -> str:
    found = re.search(r"token=(\w+)", own_api.http.get("/").text)
    assert found is not None
    return found[1]


def test_the_system_page_shows_health_queue_and_settings(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    own_api.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    text = own_api.http.get("/system").text
    assert re.search(r"<dt>database</dt><dd class=\"good\">ok</dd>", text)
    assert re.search(r"<dt>queued</dt><dd><a [^>]+>1</a>", text)
    assert "longest wait of default" in text
    assert "BATCHSERVE_CHUNK_TIMEOUT" in text
    assert '<td class="value">600.0</td>' in text
    assert "No job is running." in text


@pytest.mark.parametrize(
    ("address", "entry"),
    [
        ("/", "New job"),
        ("/jobs", "Jobs"),
        ("/schedules", "Schedules"),
        ("/models", "Models"),
        ("/system", "System"),
        ("/system/quotas", "System"),
        ("/webhooks", "System"),
        ("/keys", "System"),
    ],
)
def test_the_navigation_marks_the_entry_of_the_page(own_api: Api, address: str, entry: str) -> None:
    signed_in(own_api, Scope.ADMIN, tenant="*")
    assert re.findall(r'aria-current="page">([^<]+)<', own_api.http.get(address).text) == [entry]


def test_a_running_job_is_shown_with_its_worker(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, processes=1) as own_api:
        own_api.register("iris", iris_onnx)
        job = own_api.run(CSV, "iris")
        with database_of(own_api).write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(state="running", lease_until=2e9))
        text = own_api.http.get("/system").text
        assert job["attempts"][0]["worker"] in text
        assert f'href="/jobs/{job["id"]}"' in text


def test_users_see_no_settings_and_no_keys(own_api: Api) -> None:
    signed_in(own_api, Scope.USER)
    assert "BATCHSERVE_" not in own_api.http.get("/system").text
    assert own_api.http.get("/keys").status_code == 403
    assert own_api.http.post(f"/keys?token={token(own_api)}", data={"name": "x", "scope": "admin"}).status_code == 403
    assert own_api.http.post(f"/keys/1/revoke?token={token(own_api)}").status_code == 403


def test_users_see_the_waits_of_their_own_tenant_alone(own_api: Api, iris_onnx: Path) -> None:
    own_api.register("iris", iris_onnx)
    own_api.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    signed_in(own_api, Scope.USER)
    assert "longest wait of" not in own_api.http.get("/system").text


def test_admins_create_and_revoke_keys(own_api: Api) -> None:
    signed_in(own_api, Scope.ADMIN)
    made = own_api.http.post(f"/keys?token={token(own_api)}", data={"name": "night", "scope": "user", "tenant": "acme"})
    text = re.search(r"<pre>(bs_\w+)</pre>", made.text)
    assert text is not None
    headers = {"authorization": f"Bearer {text[1]}"}
    assert own_api.http.get("/v1/jobs", headers=headers).status_code == 200
    assert text[1] not in own_api.http.get("/keys").text
    number = re.search(
        r"/keys/(\d+)/revoke\?token=\w+\"><button class=\"plain\" aria-label=\"Revoke night\"",
        own_api.http.get("/keys").text,
    )
    assert number is not None
    own_api.http.post(f"/keys/{number[1]}/revoke?token={token(own_api)}")
    assert own_api.http.get("/v1/jobs", headers=headers).status_code == 401


def test_admins_of_a_tenant_administer_its_keys_alone(own_api: Api) -> None:
    signed_in(own_api, Scope.ADMIN, tenant="umbrella")
    signed_in(own_api, Scope.ADMIN, tenant="acme")
    page = own_api.http.get("/keys").text
    assert "acme-admin" in page
    assert "umbrella" not in page
    for tenant in ("umbrella", "*"):
        fields = {"name": "mine", "scope": "admin", "tenant": tenant}
        assert own_api.http.post(f"/keys?token={token(own_api)}", data=fields).status_code == 403
    foreign, unknown = (own_api.http.post(f"/keys/{key}/revoke?token={token(own_api)}") for key in (1, 77))
    for answer in (foreign, unknown):
        assert answer.status_code == 404
        assert "there is no valid key" in answer.text
        assert "umbrella" not in answer.text
    with database_of(own_api).read() as connection:
        assert [(key.name, key.revoked_at) for key in keys.list_all(connection)] == [
            ("umbrella-admin", None),
            ("acme-admin", None),
        ]


def test_of_a_name_that_a_key_of_another_tenant_has_only_that_is_told(own_api: Api) -> None:
    signed_in(own_api, Scope.USER, tenant="umbrella")
    signed_in(own_api, Scope.ADMIN, tenant="acme")
    for name, told in (("umbrella-user", "is not free: choose another one"), ("acme-admin", "revoke it first")):
        answer = own_api.http.post(f"/keys?token={token(own_api)}", data={"name": name, "scope": "user"})
        assert answer.status_code == 409
        assert told in answer.text
        assert ("revoke" in said(answer.text)) == (name == "acme-admin")


def test_the_audit_log_shows_who_did_what(own_api: Api) -> None:
    job = own_api.upload(CSV)
    signed_in(own_api, Scope.ADMIN, tenant="*")
    own_api.http.post(f"/jobs?token={token(own_api)}", data={"job": job["id"], "action": "delete", "confirmed": "yes"})
    own_api.http.post(f"/keys?token={token(own_api)}", data={"name": "night", "scope": "user", "tenant": "acme"})
    text = re.sub(r"\s+|<[^>]+>", " ", own_api.http.get("/system/audit").text)
    text = re.sub(r" +", " ", text)
    assert f"all-admin default delete job {job['id']}" in text
    assert "all-admin acme create key night" in text


def test_the_audit_log_goes_on_a_page_further(own_api: Api) -> None:
    with database_of(own_api).write() as connection:
        for number in range(101):
            keys.create(connection, f"key-{number}", Scope.USER, "acme", 1.0)
    signed_in(own_api, Scope.ADMIN)
    first = own_api.http.get("/system/audit").text
    assert "key-100" in first
    assert "key-0<" not in first
    older = re.search(r"/system/audit\?after=\d+", first)
    assert older is not None
    assert "key-0<" in own_api.http.get(older[0]).text
    assert own_api.http.get("/system/audit?after=x").status_code == 422


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": "", "scope": "user"}, "a name has letters, digits"),
        ({"name": "a b", "scope": "user"}, "a name has letters, digits"),
        ({"name": "x", "scope": "root"}, "scope: expected"),
        ({"name": "x", "scope": "user", "tenant": "*"}, "only an admin key may see every tenant"),
    ],
)
def test_a_key_that_cannot_be_is_refused_with_the_reason(own_api: Api, fields: dict[str, str], told: str) -> None:
    answer = own_api.http.post("/keys", data=fields)
    assert answer.status_code == 422
    assert told in answer.text
    assert own_api.http.get("/v1/jobs").status_code == 200  # there is still no key


def test_passwords_in_settings_are_hidden() -> None:

    settings = Settings(storage="s3://bucket", database="postgresql://me:secret@db/batchserve")
    shown = {setting.variable: setting.value for setting in settings.in_force()}
    assert shown["BATCHSERVE_DATABASE"] == "postgresql://me:***@db/batchserve"
    assert "secret" not in str(shown)
