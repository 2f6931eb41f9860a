"""Leftovers of killed processes are removed when they are old, and nothing else is."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import Api, ok, running
from waiting import until

from batchserve.db import migrate
from batchserve.db.connect import Database
from batchserve.storage import Storage, open_storage
from batchserve.upkeep.sweep import SweepReport, sweep

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
HOUR = 3600.0
NOBODY = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"


class Site:
    """A storage and its database, a day later."""

    def __init__(self, api: Api) -> None:
        self.api = api
        self.storage: Storage = open_storage(api.settings.storage)
        self.database = Database(api.settings.database_url)
        newest = api.http.get("/v1/jobs", params={"limit": 1}).json()["jobs"][0]
        self.moment = (Path(api.settings.storage) / "inputs" / newest["id"]).stat().st_mtime

    def put(self, *keys: str) -> None:
        for key in keys:
            self.storage.compose(key, [b"left behind"])

    def sweep(self, hours: float = 24) -> SweepReport:
        return sweep(self.database, self.storage, HOUR, self.moment + hours * HOUR)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service that keeps nothing in rows, which have no leftovers."""
    with running(tmp_path_factory.mktemp("swept"), inline_bytes=0, chunk_records=100) as swept:
        swept.register("iris", iris_onnx)
        yield swept


@pytest.fixture
def job(api: Api) -> dict[str, Any]:
    return api.run(CSV, "iris")


@pytest.fixture
def site(api: Api, job: dict[str, Any]) -> Iterator[Site]:
    assert job["state"] == "completed"
    found = Site(api)
    found.sweep()  # leftovers of other tests
    yield found
    found.database.close()


def test_objects_that_no_row_references_are_removed(site: Site, job: dict[str, Any]) -> None:
    before = site.api.stored()
    left = [
        *("uploads/01", "uploads/01.onnx"),
        *("conversions/0f/000", f"inputs/{NOBODY}"),
        *(f"parts/{NOBODY}/000-1", f"parts/{job['id']}/000000000000000-1"),
        *(f"results/{NOBODY}-1", f"results/{job['id']}-2", f"results/{job['id']}-2.errors"),
    ]
    site.put(*left)
    partial = Path(site.api.settings.storage) / "results" / ".partial-0f"
    partial.write_bytes(b"half")
    assert site.sweep() == SweepReport(partials=1, uploads=2, conversions=1, inputs=1, parts=2, results=3)
    assert site.api.stored() == before
    assert site.sweep().total == 0


def test_objects_that_rows_reference_stay(site: Site) -> None:
    failed = CSV + b"5.1,3.5,1.4,0.2\n" * 120 + b",,,\n"
    jobs = [
        site.api.upload(CSV),
        site.api.run(failed, "iris"),  # its parts are for a retry of the failed records
        site.api.run(failed, "iris", on_row_error="fail"),  # its parts are for a partial result
    ]
    assert [job["state"] for job in jobs] == ["uploaded", "completed", "failed"]
    until(lambda: not any("/.partial" in key for key in site.api.stored()))  # of chunks that were not stopped
    before = site.api.stored()
    assert sum(key.startswith("parts/") for key in before) >= 3
    assert site.sweep() == SweepReport()
    assert site.api.stored() == before
    again = ok(site.api.http.post(f"{jobs[1]['links']['self']}/retry", json={"rows": "failed"}), 202)
    assert site.api.finished(again["id"])["state"] == "completed"


def test_a_result_that_another_job_reuses_stays(site: Site) -> None:
    body = CSV + b"6.3,3.3,6.0,2.5\n"
    first = site.api.run(body, "iris")
    second = site.api.run(body, "iris", reuse=True)
    assert second["reused_from"] == first["id"]
    assert site.api.http.delete(first["links"]["self"]).status_code == 204
    site.sweep()
    assert site.api.result(second).text.count("\n") == 3


def test_recent_objects_stay(site: Site) -> None:
    left = [f"inputs/{NOBODY}", f"parts/{NOBODY}/000-1", "uploads/01", f"results/{NOBODY}-1"]
    site.put(*left)
    assert site.sweep(hours=0.9) == SweepReport()
    assert site.api.stored().issuperset(left)
    assert site.sweep(hours=24).total == 4


@pytest.mark.sqlite
def test_a_new_database_at_the_address_of_an_old_storage_does_not_empty_it(tmp_path: Path, site: Site) -> None:
    """Its first job is younger than all objects in the storage."""
    folder = Path(site.api.settings.storage)
    older = f"inputs/{NOBODY}"
    site.put(older)
    os.utime(folder / older, (1000, 1000))
    assert site.sweep() == SweepReport()
    assert older in site.api.stored()
    (folder / older).unlink()
    site.put(f"inputs/{NOBODY}", "uploads/01")
    empty = Database(f"sqlite:///{tmp_path / 'batchserve.db'}")
    migrate.upgrade(empty)
    before = site.api.stored()
    assert sweep(empty, site.storage, HOUR, site.moment + 24 * HOUR) == SweepReport()
    assert site.api.stored() == before
    empty.close()
    assert site.sweep().total == 2
