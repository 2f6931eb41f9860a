"""The reserve of disk space that deletes and cancels may use. On disks that are really full: faults/test_reserve.py."""

from pathlib import Path

import pytest
from service import problem, running
from sqlalchemy import Connection

from batchserve.db import reserve
from batchserve.db.connect import Database
from batchserve.errors import InsufficientStorage
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.backup import back_up

CSV = "a,b\n1,2\n"


def size(database: Database) -> int:
    path = Path(database.url.removeprefix("sqlite:///"))
    return path.with_name("batchserve.db-reserve").stat().st_size


def test_a_reserve_is_made_at_the_start_and_takes_its_space(tmp_path: Path) -> None:
    with running(tmp_path, worker=False):
        status = (tmp_path / "batchserve.db-reserve").stat()
    assert reserve.LEAST <= status.st_size <= reserve.MOST
    assert status.st_blocks * 512 >= status.st_size


def test_writes_that_free_space_get_more_and_more_of_the_reserve_which_is_refilled(sqlite: Database) -> None:
    assert sqlite.refill_reserve()
    whole, seen = size(sqlite), []

    def delete(_: Connection) -> str:
        seen.append(size(sqlite))
        if seen[-1] > whole // 2:
            raise InsufficientStorage("full")
        return "deleted"

    assert sqlite.write_freeing(delete) == "deleted"
    assert seen[:2] == [whole, whole - reserve.LEAST // 2]
    assert seen == sorted(seen, reverse=True)
    assert size(sqlite) == whole


def test_a_disk_that_stays_full_raises_and_the_reserve_is_taken_back(sqlite: Database) -> None:
    assert sqlite.refill_reserve()
    whole, seen = size(sqlite), []

    def delete(_: Connection) -> None:
        seen.append(size(sqlite))
        raise InsufficientStorage("full")

    with pytest.raises(InsufficientStorage):
        sqlite.write_freeing(delete)
    assert (seen[0], seen[-1]) == (whole, 0)
    assert size(sqlite) == whole


def test_other_writers_never_touch_the_reserve(sqlite: Database) -> None:
    assert sqlite.refill_reserve()
    whole = size(sqlite)
    with pytest.raises(InsufficientStorage), sqlite.write():
        raise InsufficientStorage("full")
    assert size(sqlite) == whole


def test_requests_that_need_space_are_refused_while_the_reserve_is_not_refilled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, worker=False) as api:
        job = api.upload(CSV)
        (tmp_path / "batchserve.db-reserve").write_bytes(b"")
        with monkeypatch.context() as patched:
            patched.setattr(reserve, "_take", lambda *_: False)  # no space for it
            problem(api.http.post("/v1/upload", content=CSV), 507, "insufficient-storage")
            problem(api.http.put("/v1/models/iris", content=b"onnx"), 507, "insufficient-storage")
            assert api.http.delete(job["links"]["self"]).status_code == 204
        assert api.upload(CSV)["state"] == "uploaded"


def test_a_backup_leaves_the_reserve_out(tmp_path: Path) -> None:
    with running(tmp_path / "storage", worker=False) as api:
        api.upload(CSV)
        database = Database(Settings(storage=str(tmp_path / "storage")).database_url)
        back_up(database, open_storage(api.settings.storage), tmp_path / "backup")
        database.close()
    assert not [path for path in (tmp_path / "backup").rglob("*") if "reserve" in path.name]
