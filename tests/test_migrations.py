"""The schema: made by migrations, equal to the tables, checked before anything runs; and the pragmas of SQLite."""

import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from conftest import sqlite_address
from postgres import Server
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import IntegrityError, OperationalError

from batchserve.db import connect, migrate
from batchserve.db.connect import Database
from batchserve.db.tables import metadata
from batchserve.errors import SchemaOutdated, SchemaTooNew, SchemaTooOld, Unavailable
from batchserve.jobs import queries

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of every kind."""
    if request.param == "sqlite":
        return sqlite_address(tmp_path)
    server: Server = request.getfixturevalue("postgres_server")
    return server.empty()


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    with closing(Database(empty_url)) as opened:
        yield opened


def set_version(database: Database, version: str) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})


def tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


# --- the schema ---


def test_an_empty_database_gets_all_tables(empty: Database) -> None:
    assert migrate.current_version(empty) is None
    assert migrate.upgrade(empty) == (None, migrate.newest_version())
    migrate.check(empty)
    with empty.read() as connection:
        assert tables(connection) == {*metadata.tables, "alembic_version"}


def test_a_second_upgrade_changes_nothing(empty: Database, tmp_path: Path) -> None:
    migrate.upgrade(empty)
    files = sorted(tmp_path.iterdir())
    assert migrate.upgrade(empty) == (migrate.newest_version(), migrate.newest_version())
    assert sorted(tmp_path.iterdir()) == files


def test_processes_that_start_together_upgrade_once(empty_url: str) -> None:
    barrier = threading.Barrier(4)
    failures: list[BaseException] = []

    def start() -> None:
        database = Database(empty_url)
        try:
            barrier.wait(10)
            migrate.upgrade(database)
            migrate.check(database)
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            failures.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_the_migrations_make_the_tables_of_the_code(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_the_migrations_name_constraints_and_defaults_as_the_code_does(sqlite: Database, tmp_path: Path) -> None:
    """Alembic compares neither on SQLite: names that differ would break a later migration on one of the two."""
    made = create_engine(f"sqlite:///{tmp_path / 'made.db'}")
    metadata.create_all(made)
    with sqlite.read() as migrated, made.connect() as created:
        for table in metadata.tables:
            there, here = inspect(migrated), inspect(created)
            assert there.get_pk_constraint(table) == here.get_pk_constraint(table)
            assert there.get_foreign_keys(table) == here.get_foreign_keys(table)
            assert there.get_unique_constraints(table) == here.get_unique_constraints(table)
            assert list(map(as_text, there.get_indexes(table))) == list(map(as_text, here.get_indexes(table)))
            assert [str(column) for column in there.get_columns(table)] == [
                str(column) for column in here.get_columns(table)
            ]
    made.dispose()


def as_text(index: Any) -> dict[str, Any]:
    """An index, whose condition compares as a text."""
    return {**index, "dialect_options": {name: str(value) for name, value in index["dialect_options"].items()}}


@pytest.mark.slow
def test_alembic_upgrades_and_downgrades_by_its_own_command(tmp_path: Path) -> None:
    """`alembic upgrade head`, as those who write migrations run it."""
    environment = {"BATCHSERVE_STORAGE": str(tmp_path), "PATH": ""}
    seen = []
    for steps in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
        command = [sys.executable, "-m", "alembic", *steps]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)
        database = Database(f"sqlite:///{tmp_path / 'batchserve.db'}")
        with database.read() as connection:
            seen.append(tables(connection) - {"alembic_version"})
        database.close()
    assert seen == [set(metadata.tables), set(metadata.tables), set()]


# --- other versions ---


def test_an_outdated_database_is_refused_with_the_command_to_run(empty: Database) -> None:
    with pytest.raises(SchemaOutdated, match=r"schema none, this release needs .*`batchserve migrate`"):
        migrate.check(empty)


def test_a_newer_database_is_refused_with_the_command_to_run(database: Database) -> None:
    set_version(database, "9999")
    for action in (migrate.check, migrate.upgrade):
        with pytest.raises(SchemaTooNew, match=r"schema 9999, newer .*`pip install --upgrade batchserve`"):
            action(database)
    assert migrate.current_version(database) == "9999"


@pytest.mark.parametrize("version", ["0001", "0002", "0003", "0004"])
def test_a_database_from_before_the_first_release_is_refused_with_what_to_do(empty: Database, version: str) -> None:
    """Its tables differ even if their names are equal: nothing of such a database is read or changed."""
    with empty.write() as connection:
        connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)"))
        connection.execute(text("INSERT INTO alembic_version VALUES (:version)"), {"version": version})
        connection.execute(text("CREATE TABLE jobs (id VARCHAR(36) NOT NULL)"))
    for action in (migrate.check, migrate.upgrade):
        with pytest.raises(SchemaTooOld, match=rf"schema {version}, .*cannot be carried over.*BATCHSERVE_STORAGE"):
            action(empty)
    with empty.read() as connection:
        assert tables(connection) == {"alembic_version", "jobs"}
    assert migrate.current_version(empty) == version


def test_later_versions_never_reuse_the_name_of_a_refused_one(empty: Database) -> None:
    migrate.upgrade(empty)
    assert int(migrate.newest_version()) > 4


def test_a_sqlite_file_is_copied_before_it_is_changed(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite.write() as connection:
        connection.execute(text("INSERT INTO idempotency_keys VALUES ('k', 'f', 'job', 201, 1.0, 'default', NULL)"))
    before = migrate.newest_version()
    release_next_version(tmp_path, monkeypatch, 'op.execute("DELETE FROM idempotency_keys")')
    with pytest.raises(SchemaOutdated, match=f"schema {before}, this release needs 9000"):
        migrate.check(sqlite)
    assert migrate.upgrade(sqlite) == (before, "9000")
    with sqlite.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM idempotency_keys")) == 0
    (copy,) = tmp_path.glob(f"batchserve.db.before-{before}-*")
    kept = sqlite3.connect(copy)
    assert kept.execute("SELECT key, job_id FROM idempotency_keys").fetchall() == [("k", "job")]
    assert kept.execute("SELECT version_num FROM alembic_version").fetchall() == [(before,)]
    kept.close()


def test_a_migration_that_fails_changes_nothing(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = migrate.newest_version()
    release_next_version(tmp_path, monkeypatch, 'op.execute("DROP TABLE chunks"); op.execute("DROP TABLE none")')
    with pytest.raises(OperationalError, match="no such table: none"):
        migrate.upgrade(sqlite)
    assert migrate.current_version(sqlite) == before
    with sqlite.read() as connection:
        assert "chunks" in tables(connection)


def release_next_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Makes this the next release, with one more migration."""
    package = tmp_path / "batchserve"
    shutil.copytree(ROOT / "migrations", package / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "migrations" / "versions" / "9000_next.py").write_text(
        f'from alembic import op\nrevision = "9000"\ndown_revision = "{migrate.newest_version()}"\n'
        f"def upgrade():\n    {change}\n"
    )
    monkeypatch.setattr(migrate, "_PACKAGE", package)  # where a wheel has its migrations


# --- SQLite ---


def test_every_connection_is_durable_and_checks_its_references(sqlite: Database) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    with sqlite.read() as first, sqlite.read() as second, sqlite.write() as third:
        for connection in (first, second, third):
            found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in wanted}
            assert found == wanted


def test_a_row_that_refers_to_nothing_is_refused(database: Database) -> None:
    row = "INSERT INTO attempts (job_id, number, worker, started_at) VALUES ('none', 1, 'w', 1.0)"
    with pytest.raises(IntegrityError), database.write() as connection:
        connection.execute(text(row))


def test_a_write_that_reads_first_sees_no_concurrent_change(sqlite: Database) -> None:
    """Without BEGIN IMMEDIATE, one of two such transactions fails at once, whatever the busy timeout."""
    with sqlite.write() as connection:
        connection.execute(text("CREATE TABLE counter (value INTEGER)"))
        connection.execute(text("INSERT INTO counter VALUES (0)"))

    def count() -> None:
        for _ in range(50):
            with sqlite.write() as connection:
                value = connection.scalar(text("SELECT value FROM counter"))
                connection.execute(text("UPDATE counter SET value = :value"), {"value": value + 1})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite.read() as connection:
        assert connection.scalar(text("SELECT value FROM counter")) == 200


def test_a_reader_sees_one_snapshot(database: Database) -> None:
    count = text("SELECT count(*) FROM models")
    with database.read() as reader:
        assert reader.scalar(count) == 0
        with database.write() as writer:
            writer.execute(
                text(
                    "INSERT INTO models (name, version, digest, bytes, signature, metadata, created_at) "
                    "VALUES ('m', 1, 'd', 1, '{}', '{}', 1.0)"
                )
            )
        assert reader.scalar(count) == 0
    with database.read() as reader:
        assert reader.scalar(count) == 1


def test_a_database_that_stays_locked_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "BUSY_TIMEOUT_MS", 50)
    database, other = (Database(f"sqlite:///{tmp_path / 'batchserve.db'}") for _ in range(2))
    migrate.upgrade(database)
    with other.write(), pytest.raises(Unavailable, match="does not respond"), database.write():
        pass
    with database.write(), pytest.raises(Unavailable, match="is busy"), database.write():
        pass
    with database.write() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
    database.close()
    other.close()


def test_the_missing_folder_of_a_database_is_created(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'a' / 'b' / 'batchserve.db'}")
    migrate.upgrade(database)
    assert (tmp_path / "a" / "b" / "batchserve.db").exists()
    database.close()


def test_an_equal_job_is_found_by_its_digest_not_among_all_jobs_of_the_tenant(sqlite: Database) -> None:
    asked: list[str] = []
    with sqlite.read() as connection:
        driver: Any = connection.connection.driver_connection
        driver.set_trace_callback(asked.append)  # statements with their values
        queries.find_equal(connection, "0" * 64)
        driver.set_trace_callback(None)
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked[-1]}").all()
    assert any("(tenant=? AND request_digest=?)" in step[-1] for step in plan)
    assert not any("SCAN jobs" in step[-1] for step in plan)
