"""The audit log: everything that is cancelled, retried, deleted, registered, created or revoked, and by which key."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import in_this_process
from service import Api, ok, problem, running
from sqlalchemy import insert, text

from batchserve import audit, keys
from batchserve.access import EVERY_TENANT, NO_KEY, Action, Caller, Scope
from batchserve.db import tables
from batchserve.db.connect import Database
from batchserve.errors import Conflict
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.inspection import find_unreadable, mend_unreadable
from batchserve.upkeep.retention import forget

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
ONE_FAILS = f"{CSV}5.1,tall,1.4,0.2\n"
DAY = 86400.0
ADA = Caller("red", Scope.USER, "ada")

Told = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Site:
    """A service, and the headers of each of its keys."""

    api: Api
    headers: dict[str, dict[str, str]]

    def send(self, key: str, method: str, path: str, status: int, **request: Any) -> Any:
        headers = self.headers.get(key, {}) | {"prefer": "wait=30"}
        answer = self.api.http.request(method, path, headers=headers, **request)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def told(self, key: str) -> list[Told]:
        """Tenant, key, action, kind and subject of the entries that a key sees, the oldest first."""
        entries = self.send(key, "GET", "/v1/audit", 200, params={"limit": 200})["entries"]
        return [
            tuple(entry[name] for name in ("tenant", "key", "action", "kind", "subject")) for entry in entries[::-1]
        ]

    def since(self, before: list[Told], key: str = "operator") -> list[Told]:
        return self.told(key)[len(before) :]


MADE = {
    "operator": (Scope.ADMIN, EVERY_TENANT),
    "red-admin": (Scope.ADMIN, "red"),
    "red-user": (Scope.USER, "red"),
    "red-reader": (Scope.READER, "red"),
    "blue-user": (Scope.USER, "blue"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Site]:
    with running(tmp_path_factory.mktemp("audit")) as api:
        api.register("iris", iris_onnx)
        with closing(Database(api.settings.database_url)) as database, database.write() as connection:
            texts = {
                name: keys.create(connection, name, scope, tenant, database.moment(connection).wall)[1]
                for name, (scope, tenant) in MADE.items()
            }
        yield Site(api, {name: {"authorization": f"Bearer {key}"} for name, key in texts.items()})


def uploaded(site: Site, key: str) -> str:
    job_id: str = site.send(key, "POST", "/v1/upload", 201, content=CSV)["id"]
    return job_id


def finished(site: Site, key: str, body: str = CSV) -> str:
    params = {"model": "iris", "reuse": "false"}
    job_id: str = site.send(key, "POST", "/v1/predict", 200, content=body, params=params)["id"]
    return job_id


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_each_change_of_a_job_is_recorded_with_its_key(site: Site) -> None:
    before = site.told("operator")
    first, failing = uploaded(site, "red-user"), finished(site, "red-user", ONE_FAILS)
    site.send("red-user", "POST", f"/v1/jobs/{first}/cancel", 202)
    site.send("red-admin", "DELETE", f"/v1/jobs/{first}", 204)
    site.send("red-user", "POST", f"/v1/jobs/{failing}/retry", 202, json={"rows": "failed"})
    assert site.since(before) == [
        ("red", "red-user", "cancel", "job", first),
        ("red", "red-admin", "delete", "job", first),
        ("red", "red-user", "retry", "job", failing),
    ]


def test_a_cancelled_job_that_is_retried_is_recorded(site: Site) -> None:
    params = {"model": "iris", "run_after": "2999-01-01T00:00:00Z"}
    queued = site.api.http.post("/v1/predict", content=CSV, params=params, headers=site.headers["red-user"])
    job_id = ok(queued, 202)["id"]
    site.send("red-user", "POST", f"/v1/jobs/{job_id}/cancel", 202)
    before = site.told("operator")
    headers = site.headers["red-user"] | {"idempotency-key": "once"}
    for _ in range(2):
        assert site.api.http.post(f"/v1/jobs/{job_id}/retry", headers=headers).status_code == 202
    assert site.since(before) == [("red", "red-user", "retry", "job", job_id)]


def test_what_an_operator_does_is_told_to_the_tenant_of_the_job(site: Site) -> None:
    job_id = uploaded(site, "red-user")
    before = site.told("red-admin")
    site.send("operator", "DELETE", f"/v1/jobs/{job_id}", 204)
    assert site.since(before, "red-admin") == [("red", "operator", "delete", "job", job_id)]


def test_registering_and_removing_a_version_is_recorded_for_all_tenants(site: Site, petals_onnx: bytes) -> None:
    before = site.told("red-admin")
    for status in (201, 200):  # the second time nothing is registered
        site.send("operator", "PUT", "/v1/models/petals", status, content=petals_onnx)
    site.send("red-admin", "DELETE", "/v1/models/petals/versions/1", 204)
    assert site.since(before, "red-admin") == [
        (EVERY_TENANT, "operator", "register", "model", "petals@1"),
        (EVERY_TENANT, "red-admin", "delete", "model", "petals@1"),
    ]


def test_what_has_no_effect_is_not_recorded(site: Site) -> None:
    done, fresh = finished(site, "red-user"), uploaded(site, "red-user")
    before = site.told("operator")
    site.send("red-user", "POST", f"/v1/jobs/{done}/cancel", 202)
    site.send("red-user", "POST", f"/v1/jobs/{done}/retry", 409)
    site.send("red-user", "POST", f"/v1/jobs/{done}/retry", 409, json={"rows": "failed"})
    site.send("red-reader", "DELETE", f"/v1/jobs/{done}", 403)
    site.send("blue-user", "DELETE", f"/v1/jobs/{done}", 404)
    site.send("operator", "DELETE", "/v1/models/iris/versions/9", 404)
    refused = site.api.http.delete(f"/v1/jobs/{done}", headers=site.headers["red-user"] | {"if-match": '"other"'})
    problem(refused, 412, "precondition-failed")
    assert site.since(before) == []
    for _ in range(2):
        site.send("red-user", "POST", f"/v1/jobs/{fresh}/cancel", 202)
    assert len(site.since(before)) == 1


def test_a_page_records_the_key_of_its_session(site: Site) -> None:
    first, second = uploaded(site, "red-user"), uploaded(site, "red-user")
    key = site.headers["red-user"]["authorization"].removeprefix("Bearer ")
    site.api.http.post("/sign-in", data={"key": key})
    page = site.api.http.get("/jobs").text
    token = page.partition("?token=")[2].partition('"')[0]
    before = site.told("operator")
    for action, job_id in (("cancel", first), ("delete", second)):
        form = {"job": job_id, "action": action, "confirmed": "yes"}
        assert site.api.http.post(f"/jobs?token={token}", data=form, follow_redirects=False).status_code == 303
    assert site.since(before) == [
        ("red", "red-user", "cancel", "job", first),
        ("red", "red-user", "delete", "job", second),
    ]


def test_without_keys_what_is_done_is_recorded_without_a_name(tmp_path: Path) -> None:
    with running(tmp_path, worker=False) as api:
        open_site = Site(api, {})
        job_id = uploaded(open_site, "")
        open_site.send("", "DELETE", f"/v1/jobs/{job_id}", 204)
        assert open_site.told("") == [("default", NO_KEY, "delete", "job", job_id)]


def test_creating_and_revoking_keys_is_recorded(database: Database) -> None:
    with database.write() as connection:
        keys.create(connection, "night", Scope.USER, "red", 5.0)
        keys.create(connection, "ops", Scope.ADMIN, EVERY_TENANT, 6.0)
        keys.revoke(connection, "night", 7.0)
    with database.read() as connection:
        found = [(entry.at, entry.tenant, entry.action, entry.subject) for entry in audit.list_page(connection)]
    assert found == [
        (7.0, "red", Action.REVOKE, "night"),
        (6.0, EVERY_TENANT, Action.CREATE, "ops"),
        (5.0, "red", Action.CREATE, "night"),
    ]


def test_an_entry_is_in_the_transaction_of_what_it_records(database: Database) -> None:
    def create_twice() -> None:
        with database.write() as connection:
            keys.create(connection, "night", Scope.USER, "red", 5.0)
            keys.create(connection, "night", Scope.USER, "red", 6.0)

    with pytest.raises(Conflict):
        create_twice()
    with database.read() as connection:
        assert audit.list_page(connection) == []


# --- who sees it -----------------------------------------------------------------------------------------------------


def test_the_log_is_for_admin_keys_and_each_sees_its_tenant(site: Site) -> None:
    for key in ("red-user", "red-reader"):
        problem(site.api.http.get("/v1/audit", headers=site.headers[key]), 403, "forbidden")
    for key in ("blue-user", "red-user"):
        site.send(key, "DELETE", f"/v1/jobs/{uploaded(site, key)}", 204)
    assert {tenant for tenant, *_ in site.told("red-admin")} == {"red", EVERY_TENANT}
    assert {tenant for tenant, *_ in site.told("operator")} == {"red", "blue", EVERY_TENANT}


def test_the_log_is_listed_in_pages_newest_first(database: Database) -> None:
    with database.write() as connection:
        for number in range(7):
            audit.note_job(connection, ADA, Action.DELETE, str(number), "red" if number % 2 else "blue", float(number))
    with database.read() as connection:
        first = audit.list_page(connection, limit=3)
        second = audit.list_page(connection, after=first[-1].id, limit=3)
        rest = audit.list_page(connection, after=second[-1].id, limit=3)
        of_red = audit.list_page(connection, "red", limit=2)
    assert [[entry.subject for entry in page] for page in (first, second, rest)] == [list("654"), list("321"), ["0"]]
    assert [entry.subject for entry in of_red] == ["5", "3"]


def test_a_page_of_the_log_names_the_next_until_the_last(site: Site) -> None:
    count = len(site.told("operator"))
    seen: list[int] = []
    after: dict[str, int] = {}
    while True:
        answer = site.send("operator", "GET", "/v1/audit", 200, params={"limit": 2, **after})
        seen += [entry["id"] for entry in answer["entries"]]
        if answer["next"] is None:
            break
        assert answer["next"] == seen[-1]
        after = {"after": answer["next"]}
    assert len(seen) == count
    assert seen == sorted(seen, reverse=True)
    for refused in ({"limit": 0}, {"limit": 201}, {"after": 0}, {"after": "x"}, {"after": 2**31}, {"before": 1}):
        problem(
            site.api.http.get("/v1/audit", params=refused, headers=site.headers["operator"]), 422, "invalid-options"
        )


def test_the_log_is_filtered(site: Site) -> None:
    job_id = uploaded(site, "red-user")
    site.send("red-user", "DELETE", f"/v1/jobs/{job_id}", 204)

    def told(**query: str) -> list[dict[str, Any]]:
        answer = site.send("operator", "GET", "/v1/audit", 200, params={"limit": 200, **query})
        entries: list[dict[str, Any]] = answer["entries"]
        return entries

    (entry,) = told(subject=job_id)
    assert (entry["action"], entry["kind"], entry["key"]) == ("delete", "job", "red-user")
    assert entry in told(action="cancel,delete", kind="job", key="red-user", since="1h")
    assert {one["action"] for one in told(action="delete")} == {"delete"}
    assert {one["kind"] for one in told(kind="key")} == {"key"}
    assert told(subject=job_id, action="cancel") == told(since="2999-01-01") == told(until="1000d") == []
    for query in ({"action": "stop"}, {"kind": "page"}, {"since": "soon"}, {"until": "x"}, {"subject": "a\0b"}):
        problem(site.api.http.get("/v1/audit", params=query, headers=site.headers["operator"]), 422, "invalid-options")


def test_the_command_lists_the_log(site: Site) -> None:
    job_id = uploaded(site, "red-user")
    site.send("red-user", "DELETE", f"/v1/jobs/{job_id}", 204)
    folder = Path(site.api.settings.storage)
    own = {"BATCHSERVE_STORAGE": str(folder), "BATCHSERVE_DATABASE": site.api.settings.database_url}
    lines = in_this_process(folder, "audit", "-n", "2", **own).stdout.splitlines()
    assert lines[0].split("\t")[1:] == ["red", "red-user", "delete", "job", job_id]
    assert len(lines) == 2
    for words in (("--subject", job_id), ("--key", "red-user", "--action", "delete", "--since", "1h", "-n", "1")):
        assert in_this_process(folder, "audit", *words, **own).stdout.splitlines() == lines[:1]
    assert in_this_process(folder, "audit", "--until", "1000d", **own).stdout == ""
    told = in_this_process(folder, "audit", "--tenant", "blue", "--json", **own).stdout
    assert '"key": "-",\n    "action": "create",\n    "kind": "key",\n    "subject": "blue-user"' in told
    assert '"subject": "iris@1"' in told
    assert job_id not in told


# --- upkeep ----------------------------------------------------------------------------------------------------------


def filled(database: Database, count: int, since: float) -> float:
    """Now, after that many entries, a day apart."""
    entry = {"tenant": "red", "key": "ada", "action": "delete", "kind": "job"}
    with database.write() as connection:
        rows = [{**entry, "at": since + DAY * number, "subject": str(number)} for number in range(count)]
        connection.execute(insert(tables.audit), rows)
    return since + DAY * count


@pytest.mark.parametrize(
    ("keep", "settled", "left"), [("30d", 1e9, 30), (None, 1e9, 400), ("30d", 29 * DAY, 400), ("1000d", 1e9, 400)]
)
def test_entries_are_kept_for_their_time(
    keep: str | None, settled: float, left: int, database: Database, tmp_path: Path
) -> None:
    now = filled(database, 400, 1e9)
    settings = Settings(storage=str(tmp_path), keep_audit=keep)
    forget(database, settings, now, settled)
    with database.read() as connection:
        found = audit.list_page(connection, limit=1000)
    assert len(found) == left
    assert found[0].subject == "399"


def test_a_year_is_kept_by_default() -> None:
    assert Settings().keep_audit == 365 * DAY


def test_an_entry_that_cannot_be_read_hides_no_other_and_is_found(database: Database, tmp_path: Path) -> None:
    filled(database, 4, 1e9)
    with database.write() as connection:
        connection.execute(text("UPDATE audit SET action = 'none' WHERE subject IN ('1', '2')"))
    with database.read() as connection:
        assert [entry.subject for entry in audit.list_page(connection, limit=2)] == ["3", "0"]
    assert [row.table for row in find_unreadable(database)] == ["audit", "audit"]
    assert all("batchserve mend" in row.fault.mend for row in find_unreadable(database))
    mend_unreadable(database, open_storage(str(tmp_path)))
    assert list(find_unreadable(database)) == []


def test_ids_are_never_reused(sqlite: Database) -> None:
    filled(sqlite, 3, 1e9)
    with sqlite.write() as connection:
        connection.execute(text("DELETE FROM audit"))
    filled(sqlite, 1, 1e9)
    with sqlite.read() as connection:
        assert audit.list_page(connection)[0].id == 4


def test_the_document_shows_an_entry_as_it_is(site: Site) -> None:
    document = ok(site.api.http.get("/openapi.json"))
    example = document["components"]["schemas"]["AuditList"]["example"]
    answer = site.send("operator", "GET", "/v1/audit", 200)
    assert example.keys() == answer.keys()
    assert example["entries"][0].keys() == answer["entries"][0].keys()
