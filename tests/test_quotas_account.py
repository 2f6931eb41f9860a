"""The account of bytes of a tenant is what lies in its storage and rows, whatever was stored, shared and removed."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import in_this_process
from service import Api, emptied, ok, running
from sqlalchemy import delete, func, select, text, update

from batchserve.access import Caller, Quota
from batchserve.db.connect import Database
from batchserve.db.tables import accounts, contents, quotas
from batchserve.direct import Direct
from batchserve.domain import DirectUpload
from batchserve.jobs import uploads
from batchserve.quotas import account, limits
from batchserve.quotas.account import Added, charge, differing, usage_of
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.inspection import find_unreadable, inspect_accounts, mend_unreadable
from batchserve.upkeep.retention import expire
from batchserve.upkeep.sweep import sweep

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
DAY = 86400.0
FOLDERS = ("inputs", "results")


def rows(count: int, first: float = 5.1) -> str:
    return HEADER + f"{first},3.5,1.4,0.2\n" * count


class Site:
    def __init__(self, api: Api) -> None:
        self.api, self.http = api, api.http
        self.database, self.storage = Database(api.settings.database_url), open_storage(api.settings.storage)

    def limit(self, **given: Any) -> None:
        ok(self.http.put("/v1/quotas/default", json=given))

    def kept(self) -> int:
        """The bytes of the account."""
        with self.database.read() as connection:
            kept = connection.scalar(select(accounts.c.bytes).where(accounts.c.tenant == "default"))
        assert isinstance(kept, int)
        return kept

    def stored(self) -> int:
        """The bytes that are there, by the storage and the rows of contents."""
        home = Path(self.api.settings.storage)
        files = [Path(at) / name for folder in FOLDERS for at, _, names in os.walk(home / folder) for name in names]
        there = sum(file.stat().st_size for file in files)
        with self.database.read() as connection:
            return there + int(connection.scalar(select(func.sum(func.length(contents.c.content)))) or 0)

    def later(self, days: float) -> float:
        with self.database.read() as connection:
            return self.database.moment(connection).wall + days * DAY

    def expire(self, days: float, **keep: Any) -> None:
        expire(self.database, self.storage, Settings(storage=self.api.settings.storage, **keep), self.later(days))


@pytest.fixture(scope="module")
def service(
    database_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path
) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("kept")
    with running(folder, chunk_records=100, inline_bytes=1000, **database_settings) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def site(service: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A service whose small objects are in rows; its account is kept from the first upload on."""
    monkeypatch.setattr(account, "SETTLES", 0.0)
    site = Site(service)
    site.limit(bytes=10**12, jobs=1000, rows_per_day=10**9)
    site.api.upload(rows(1))
    yield site
    site.database.close()
    emptied(service)


class Changes:
    """What clients and retention do, by chance."""

    def __init__(self, site: Site) -> None:
        self.site, self.chance = site, random.Random(7)
        self.jobs: list[str] = [job["id"] for job in ok(site.http.get("/v1/jobs"))["jobs"]]

    def body(self) -> str:
        good = rows(self.chance.choice((1, 3, 150)), self.chance.choice((5.1, 5.2, 5.3)))
        return good + ("5.1,tall,1.4,0.2\n" if self.chance.random() < 0.3 else "")

    def upload(self) -> None:
        self.jobs.append(self.site.api.upload(self.body())["id"])

    def run(self) -> None:
        self.jobs.append(self.site.api.run(self.body(), "iris", reuse=self.chance.random() < 0.5)["id"])

    def predict(self) -> None:
        params = {"model": "iris", "top_k": self.chance.choice((1, 2)), "reuse": self.chance.random() < 0.5}
        path = f"/v1/predict/{self.chance.choice(self.jobs)}"
        answer = self.site.http.post(path, params=params, headers={"prefer": "wait=30"})
        if answer.is_success:
            self.jobs.append(answer.json()["id"])

    def retry(self) -> None:
        answer = self.site.http.post(f"/v1/jobs/{self.chance.choice(self.jobs)}/retry", json={"rows": "failed"})
        if answer.is_success:
            self.jobs.append(self.site.api.finished(answer.json()["id"])["id"])

    def remove(self) -> None:
        self.site.http.delete(f"/v1/jobs/{self.chance.choice(self.jobs)}")

    def drop_inputs(self) -> None:
        self.site.expire(2, keep_inputs="1d")

    def expire_all(self) -> None:
        self.site.expire(2, keep_results="1d")


@pytest.mark.slow
def test_the_account_is_what_is_stored_after_any_sequence_of_changes(site: Site) -> None:
    changes = Changes(site)
    often = [changes.upload, changes.run, changes.run, changes.predict, changes.predict, changes.retry]
    often += [changes.remove, changes.remove]
    for number in range(60):
        act = changes.chance.choice([changes.drop_inputs, changes.expire_all] if number % 15 == 14 else often)
        act()
        assert site.kept() == site.stored(), (number, act.__name__)
        with site.database.read() as connection:
            assert differing(connection) == [], (number, act.__name__)
    changes.expire_all()
    assert (site.kept(), site.stored()) == (0, 0)


def test_objects_that_jobs_share_are_counted_once_and_given_back_with_the_last(site: Site) -> None:
    before = site.kept()
    first = site.api.run(rows(150), "iris")
    taken = site.kept() - before
    assert taken == len(rows(150)) + first["result"]["bytes"]
    shared = ok(site.http.post("/v1/predict", content=rows(150), params={"model": "iris"}), 200)
    assert shared["reused_from"] == first["id"]
    assert site.kept() - before == taken + len(rows(150))
    other = ok(site.http.post(f"/v1/predict/{first['id']}", params={"model": "iris", "top_k": 1}), 202)
    other = site.api.finished(other["id"])
    assert site.kept() - before == taken + len(rows(150)) + other["result"]["bytes"]
    for job in (first, other, shared):
        assert site.http.delete(job["links"]["self"]).status_code == 204
        assert site.kept() == site.stored()
    assert site.kept() == before


def test_a_sweep_changes_no_account(site: Site) -> None:
    with site.storage.create("inputs/orphan") as writer:
        writer.write(b"1234")
        writer.commit()
    before = site.kept()
    assert sweep(site.database, site.storage, 3600.0, site.later(2)).total == 1
    assert site.kept() == before == site.stored()


def test_borrowed_inputs_are_not_counted(site: Site) -> None:
    before = site.kept()
    job = site.api.upload(rows(3))
    with site.database.write() as connection:
        change = text("UPDATE inputs SET owned = NOT owned WHERE job_id = :id")
        connection.execute(change, {"id": job["id"]})
        assert account.count_bytes(connection, "default") == before
        connection.execute(change, {"id": job["id"]})
        assert account.count_bytes(connection, "default") == before + len(rows(3))


def test_what_is_written_without_the_api_is_counted_and_not_limited(site: Site, tmp_path: Path) -> None:
    site.limit(bytes=1, jobs=0)
    file = tmp_path / "flowers.csv"
    file.write_text(rows(3))
    before = site.kept()
    with site.database.read() as connection:
        assert differing(connection) == []
    Direct(site.database, site.storage).submit(file, "iris")
    assert site.kept() >= before + len(rows(3))
    with site.database.read() as connection:
        assert differing(connection) == []


def test_announced_bytes_of_a_direct_upload_are_counted_until_it_ends(database: Database) -> None:
    with database.write() as connection:
        now = database.moment(connection).wall
        limits.set_limits(connection, Quota("red", bytes=1000), now, Caller())
    for number, ended in enumerate((True, False)):
        upload = DirectUpload(str(number), "red", 400, now + 10)
        with database.write() as connection:
            uploads.begin(connection, upload)
            charge(connection, "red", Added(400), now + number * account.SETTLES)
        with database.read() as connection:
            assert usage_of(connection, "red", now).bytes == 400
        with database.write() as connection:
            if ended:
                uploads.end(connection, upload.id)
            else:
                assert [one.id for one in uploads.end_expired(connection, now + 20, 10)] == ["1"]
        with database.read() as connection:
            assert usage_of(connection, "red", now).bytes == 0
            assert differing(connection) == []


def test_an_account_is_kept_only_after_the_transactions_that_do_not_know_of_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.http.delete("/v1/quotas/default").status_code == 204
    monkeypatch.setattr(account, "SETTLES", 120.0)
    site.limit(bytes=10**9)
    site.api.upload(rows(1))
    with site.database.write() as connection:
        assert connection.scalar(select(accounts.c.bytes)) is None
        connection.execute(update(accounts).values(since=accounts.c.since - 121))
    job = site.api.upload(rows(2))
    assert site.kept() == site.stored() > 0
    assert site.http.delete(job["links"]["self"]).status_code == 204
    assert site.kept() == site.stored()


def test_an_account_ends_with_its_quota_and_begins_anew(site: Site) -> None:
    assert site.http.delete("/v1/quotas/default").status_code == 204
    site.api.upload(rows(5))
    with site.database.read() as connection:
        assert connection.scalars(select(accounts.c.tenant)).all() == []
    site.limit(bytes=10**9)
    site.api.upload(rows(6))
    assert site.kept() == site.stored()


def test_doctor_finds_an_account_that_differs_and_its_command_counts_it_anew(site: Site, tmp_path: Path) -> None:
    with site.database.write() as connection:
        connection.execute(update(accounts).values(bytes=accounts.c.bytes + 5))
    (fault,) = inspect_accounts(site.database)
    assert (fault.place, fault.mend) == ("account of the tenant default", "batchserve quotas recount default")
    own = {"BATCHSERVE_STORAGE": site.api.settings.storage, "BATCHSERVE_DATABASE": site.api.settings.database_url}
    told = in_this_process(tmp_path, "doctor", "--json", **own).stdout
    assert "account of the tenant default" in told
    done = in_this_process(tmp_path, *fault.mend.split()[1:], **own)
    assert done.returncode == 0, done.stderr
    assert inspect_accounts(site.database) == []
    done = in_this_process(tmp_path, "quotas", "recount", "nobody", **own)
    assert "has no account" in done.stderr


@pytest.mark.sqlite
def test_the_account_of_a_backup_is_what_the_backup_holds(
    tmp_path: Path, iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "SETTLES", 0.0)
    with running(tmp_path / "old", inline_bytes=1000) as api:
        api.register("iris", iris_onnx)
        ok(api.http.put("/v1/quotas/default", json={"bytes": 10**9}))
        api.run(rows(150), "iris")
        api.upload(rows(1))
        own = {"BATCHSERVE_STORAGE": str(tmp_path / "old")}
        assert in_this_process(tmp_path, "backup", tmp_path / "copy", **own).returncode == 0
    new = {"BATCHSERVE_STORAGE": str(tmp_path / "new")}
    assert in_this_process(tmp_path, "restore", tmp_path / "copy", **new).returncode == 0
    shutil.rmtree(tmp_path / "old")
    with running(tmp_path / "new") as api:
        site = Site(api)
        assert inspect_accounts(site.database) == []
        assert site.kept() == site.stored() > len(rows(150))
        api.upload(rows(2))
        assert site.kept() == site.stored()
        site.database.close()


def test_a_quota_that_cannot_be_read_limits_nobody_and_is_found(sqlite: Database, tmp_path: Path) -> None:
    with sqlite.write() as connection:
        limits.set_limits(connection, Quota("red", jobs=1), 1.0, Caller())
        connection.execute(text("UPDATE quotas SET jobs = 'many'"))
    with sqlite.read() as connection:
        assert limits.find_for(connection, "red") is None
    (found,) = find_unreadable(sqlite)
    assert found.table == "quotas"
    assert "batchserve mend" in found.fault.mend
    mend_unreadable(sqlite, open_storage(str(tmp_path)))
    assert list(find_unreadable(sqlite)) == []
    with sqlite.read() as connection:
        assert connection.execute(select(quotas)).all() == []


def test_the_bytes_of_other_tenants_are_not_counted(database: Database) -> None:
    with database.write() as connection:
        now = database.moment(connection).wall
        for tenant, size in (("red", 3), ("blue", 5)):
            uploads.begin(connection, DirectUpload(tenant, tenant, size, now))
    with database.read() as connection:
        assert [usage_of(connection, tenant, now).bytes for tenant in ("red", "blue", "green")] == [3, 5, 0]
    with database.write() as connection:
        connection.execute(delete(accounts))
        charge(connection, "red", Added(10**6), now)  # it has no quota
    with database.read() as connection:
        assert connection.execute(select(accounts)).all() == []
