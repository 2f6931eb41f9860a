"""The pages about the system and its keys."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from service import Api, running
from sqlalchemy import update

from batchserve import keys
from batchserve.access import Scope
from batchserve.db.connect import Database
from batchserve.db.tables import jobs
from batchserve.settings import Settings
from batchserve.web.system import settings_in_force

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Api]:
    with running(tmp_path, worker=False) as api:
        yield api


def database_of(site: Api) -> Database:
    database: Database = site.http.app.state.service.runtime.database  # type: ignore[attr-defined]
    return database


def signed_in(site: Api, scope: Scope, tenant: str = "acme") -> str:
    """The text of a new key, with which the client is signed in."""
    with database_of(site).write() as connection:
        _, text = keys.create(connection, f"{tenant.replace('*', 'all')}-{scope}", scope, tenant, 1.0)
    assert site.http.post("/sign-in", data={"key": text}).status_code in (200, 303)
    return text


def token(site: Api) -> str:
    found = re.search(r"token=(\w+)", site.http.get("/").text)
    assert found is not None
    return found[1]


def test_the_system_page_shows_health_queue_and_settings(site: Api, iris_onnx: Path) -> None:
    site.register("iris", iris_onnx)
    site.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    text = site.http.get("/system").text
    assert re.search(r"<dt>database</dt><dd class=\"good\">ok</dd>", text)
    assert re.search(r"<dt>queued</dt><dd><a [^>]+>1</a>", text)
    assert "longest wait of default" in text
    assert "BATCHSERVE_CHUNK_TIMEOUT" in text
    assert '<td class="value">600.0</td>' in text
    assert "No job runs." in text


def test_a_running_job_is_shown_with_its_worker(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, processes=1) as site:
        site.register("iris", iris_onnx)
        job = site.run(CSV, "iris")
        with database_of(site).write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == job["id"]).values(state="running", lease_until=2e9))
        text = site.http.get("/system").text
        assert job["attempts"][0]["worker"] in text
        assert f'href="/jobs/{job["id"]}"' in text


def test_users_see_no_settings_and_no_keys(site: Api) -> None:
    signed_in(site, Scope.USER)
    assert "BATCHSERVE_" not in site.http.get("/system").text
    assert site.http.get("/keys").status_code == 403
    assert site.http.post(f"/keys?token={token(site)}", data={"name": "x", "scope": "admin"}).status_code == 403
    assert site.http.post(f"/keys/1/revoke?token={token(site)}").status_code == 403


def test_users_see_the_waits_of_their_own_tenant_alone(site: Api, iris_onnx: Path) -> None:
    site.register("iris", iris_onnx)
    site.http.post("/v1/predict?model=iris&priority=-1", content=CSV)
    signed_in(site, Scope.USER)
    assert "longest wait of" not in site.http.get("/system").text


def test_admins_create_and_revoke_keys(site: Api) -> None:
    signed_in(site, Scope.ADMIN)
    made = site.http.post(f"/keys?token={token(site)}", data={"name": "night", "scope": "user", "tenant": "acme"})
    text = re.search(r"<pre>(bs_\w+)</pre>", made.text)
    assert text is not None
    headers = {"authorization": f"Bearer {text[1]}"}
    assert site.http.get("/v1/jobs", headers=headers).status_code == 200
    assert text[1] not in site.http.get("/keys").text
    number = re.search(
        r"/keys/(\d+)/revoke\?token=\w+\"><button class=\"plain\" aria-label=\"Revoke night\"",
        site.http.get("/keys").text,
    )
    assert number is not None
    site.http.post(f"/keys/{number[1]}/revoke?token={token(site)}")
    assert site.http.get("/v1/jobs", headers=headers).status_code == 401


def test_admins_of_a_tenant_administer_its_keys_alone(site: Api) -> None:
    signed_in(site, Scope.ADMIN, tenant="umbrella")
    signed_in(site, Scope.ADMIN, tenant="acme")
    page = site.http.get("/keys").text
    assert "acme-admin" in page
    assert "umbrella" not in page
    for tenant in ("umbrella", "*"):
        fields = {"name": "mine", "scope": "admin", "tenant": tenant}
        assert site.http.post(f"/keys?token={token(site)}", data=fields).status_code == 403
    assert site.http.post(f"/keys/1/revoke?token={token(site)}").status_code == 403
    with database_of(site).read() as connection:
        assert [(key.name, key.revoked_at) for key in keys.list_all(connection)] == [
            ("umbrella-admin", None),
            ("acme-admin", None),
        ]


def test_the_audit_log_shows_who_did_what(site: Api) -> None:
    job = site.upload(CSV)
    signed_in(site, Scope.ADMIN, tenant="*")
    site.http.post(f"/jobs?token={token(site)}", data={"job": job["id"], "action": "delete", "confirmed": "yes"})
    site.http.post(f"/keys?token={token(site)}", data={"name": "night", "scope": "user", "tenant": "acme"})
    text = re.sub(r"\s+|<[^>]+>", " ", site.http.get("/system/audit").text)
    text = re.sub(r" +", " ", text)
    assert f"all-admin default delete job {job['id']}" in text
    assert "all-admin acme create key night" in text


def test_the_audit_log_goes_on_a_page_further(site: Api) -> None:
    with database_of(site).write() as connection:
        for number in range(101):
            keys.create(connection, f"key-{number}", Scope.USER, "acme", 1.0)
    signed_in(site, Scope.ADMIN)
    first = site.http.get("/system/audit").text
    assert "key-100" in first
    assert "key-0<" not in first
    older = re.search(r"/system/audit\?after=\d+", first)
    assert older is not None
    assert "key-0<" in site.http.get(older[0]).text
    assert site.http.get("/system/audit?after=x").status_code == 422


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"name": "", "scope": "user"}, "a name has letters, digits"),
        ({"name": "a b", "scope": "user"}, "a name has letters, digits"),
        ({"name": "x", "scope": "root"}, "scope: expected"),
        ({"name": "x", "scope": "user", "tenant": "*"}, "only an admin key may see every tenant"),
    ],
)
def test_a_key_that_cannot_be_is_refused_with_the_reason(site: Api, fields: dict[str, str], told: str) -> None:
    answer = site.http.post("/keys", data=fields)
    assert answer.status_code == 422
    assert told in answer.text
    assert site.http.get("/v1/jobs").status_code == 200  # there is still no key


def test_passwords_in_settings_are_hidden() -> None:

    settings = Settings(storage="s3://bucket", database="postgresql://me:secret@db/batchserve")
    shown = {variable: value for variable, value, _, _ in settings_in_force(settings)}
    assert shown["BATCHSERVE_DATABASE"] == "postgresql://me:***@db/batchserve"
    assert "secret" not in str(shown)
