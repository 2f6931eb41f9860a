"""The rows of a result on their way into a table: values, kills, outages, and what is left behind."""

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from zoneinfo import ZoneInfo

import graphs
import polars as pl
import postgres
import psycopg
import pytest
from bench import Bench, opened, rows_of
from hand import HandEngine
from sqlalchemy import update
from table_kills import When, forking
from uuid_utils import uuid7
from waiting import until
from warehouse import Warehouse

from batchserve.db.tables import jobs
from batchserve.domain import Dialect, JobState, TableTarget
from batchserve.errors import LocationRefused, TableMismatch, Unavailable
from batchserve.formats import get_format
from batchserve.formats.protocol import Part
from batchserve.jobs import requests
from batchserve.postgres import Place
from batchserve.postgres.load import Piece, drop_staging, load, staging_of
from batchserve.scoring.assembly import AssembleTask, assemble_result
from batchserve.settings import Settings
from batchserve.storage.local import LocalStorage
from batchserve.upkeep.staging import sweep_staging

pytestmark = pytest.mark.postgres

TARGET = TableTarget("warehouse", "public", "t")


def put(warehouse: Warehouse, *frames: pl.DataFrame, target: TableTarget = TARGET, user: str = "postgres") -> str:
    """Loads frames as the chunks of a job, and returns its ID."""
    job_id, starts = str(uuid7()), accumulate((frame.height for frame in frames), initial=0)
    of_piece = dict(zip(starts, frames, strict=False))
    load(
        warehouse.place(user),
        target,
        job_id,
        dict(frames[0].schema),
        [Piece(start, frame.height) for start, frame in of_piece.items()],
        lambda piece: of_piece[piece.first],
    )
    return job_id


# --- values ---

NAN, INFINITE = float("nan"), float("inf")
MOMENT = datetime.fromisoformat("2026-11-30T20:05:07.123456")
TEXTS = ["a", "", None, "NULL", 'q"u', "a,b", "l\nm", "\r", "a\n\\.\nb", "\\N", "é\U0001f600", " s "]


@pytest.mark.parametrize(
    ("kind", "column", "values"),
    [
        (pl.Boolean(), "boolean", [True, False, None]),
        (pl.Int64(), "bigint", [-(2**63), 2**63 - 1, None]),
        (pl.Int64(), "integer", [-(2**31), 2**31 - 1, None]),
        (pl.Int64(), "smallint", [7, None]),
        (pl.Int32(), "double precision", [-(2**31), 2**31 - 1]),
        (pl.UInt64(), "numeric", [2**64 - 1, None]),
        (pl.UInt8(), "smallint", [0, 255]),
        (pl.Float32(), "real", [0.1, -0.0, NAN, INFINITE, -INFINITE, 1.17549435e-38, 3.4028235e38, None]),
        (pl.Float32(), "double precision", [0.1, NAN, INFINITE, 3.4028235e38, None]),
        (pl.Float64(), "double precision", [0.1, -0.0, NAN, INFINITE, -INFINITE, 5e-324, 1.7976931348623157e308, None]),
        (pl.String(), "text", TEXTS),
        (pl.String(), "varchar(9)", ["é" * 9, "", None]),
        (pl.String(), "json", ['{"b": 1, "a":  [null]}', None]),
        (pl.Binary(), "bytea", [b"\x00\xff\\", b"", None]),
        (pl.Date(), "date", [date(1, 1, 1), date(9999, 12, 31), None]),
        (pl.Datetime("us"), "timestamp", [MOMENT, MOMENT.replace(year=1), None]),
        (pl.Datetime("ms"), "timestamp", [MOMENT.replace(microsecond=120000), None]),
        (pl.Datetime("ns"), "timestamp", [MOMENT, None]),
        (pl.Datetime("us", "UTC"), "timestamptz", [MOMENT.replace(tzinfo=UTC), None]),
        (pl.Datetime("us", "Europe/Zurich"), "timestamptz", [MOMENT.replace(tzinfo=UTC), None]),
        (pl.Time(), "time", [time(0), time(23, 59, 59, 999999), None]),
        (pl.Decimal(10, 2), "numeric", [Decimal("12345678.90"), Decimal("-0.01"), None]),
        (pl.Decimal(10, 2), "numeric(12, 4)", [Decimal("12345678.90"), None]),
        (pl.List(pl.Float32()), "real[]", [[0.1, NAN, None], [], None, [INFINITE]]),
        (pl.List(pl.Float32()), "double precision[]", [[0.1], []]),
        (pl.List(pl.Int64()), "bigint[]", [[2**63 - 1, None], [], None]),
        (pl.List(pl.Boolean()), "boolean[]", [[True, None, False]]),
        (pl.List(pl.String()), "text[]", [['a"\\', "", None, "NULL", "{,}", "l\nm"], [], None]),
        (pl.Array(pl.Float64(), 2), "double precision[]", [[0.1, NAN], None]),
        (pl.Null(), "integer", [None, None]),
    ],
)
def test_each_value_comes_back_as_it_was(
    warehouse: Warehouse, kind: pl.DataType, column: str, values: list[Any]
) -> None:
    warehouse(f"CREATE TABLE t (n int, v {column})")
    series = pl.Series("v", values, dtype=kind)
    put(warehouse, pl.DataFrame([pl.Series("n", range(len(values)), dtype=pl.Int32), series]))
    found = [value for (value,) in warehouse("SELECT v FROM t ORDER BY n", binary=True)]
    assert repr(found) == repr(as_read(series, column))


def as_read(series: pl.Series, column: str) -> list[Any]:
    """What psycopg gives for these values."""
    found: list[Any] = series.to_list()
    if column == "json":
        found = [text and json.loads(text) for text in found]
    elif series.dtype == pl.Int32():
        found = [float(value) for value in found]
    elif series.dtype == pl.UInt64():
        found = [value and Decimal(value) for value in found]
    elif column == "numeric(12, 4)":
        found = [value and value.quantize(Decimal("0.0001")) for value in found]
    elif isinstance(series.dtype, pl.Datetime) and series.dtype.time_zone:
        found = [moment and moment.astimezone(ZoneInfo("Etc/UTC")) for moment in found]
    return found


@pytest.mark.parametrize(
    ("kind", "column", "values", "said"),
    [
        (pl.Int64(), "smallint", [1, 70000], "column 'v': value \"70000\" is out of range"),
        (pl.Int64(), "double precision", [1], "'v' of the result is Int64; found double precision"),
        (pl.Int32(), "real", [1], "found real"),
        (pl.Float64(), "real", [0.5], "found real, which does not hold all of its values exactly"),
        (pl.Float64(), "numeric(5,2)", [0.125], "found numeric(5,2)"),
        (pl.Decimal(10, 4), "numeric(10,2)", [Decimal("0.125")], "found numeric(10,2)"),
        (pl.Decimal(12, 2), "numeric(5,2)", [Decimal("12345.00")], "column 'v': numeric field overflow"),
        (pl.String(), "integer", ["5"], "found integer"),
        (pl.String(), "char(3)", ["a"], "found character(3)"),
        (pl.String(), "text", ["a\0b"], "'v' has a text with the character NUL"),
        (pl.List(pl.String()), "text[]", [["a\0b"]], "'v' has a text with the character NUL"),
        (pl.String(), "varchar(2)", ["ab "], "longer than the 2 characters"),
        (pl.String(), "uuid", ["x"], "column 'v': invalid input syntax for type uuid"),
        (pl.Datetime("us"), "timestamptz", [MOMENT], "found timestamp with time zone"),
        (pl.Datetime("us"), "timestamp(3)", [MOMENT], "found timestamp(3) without time zone"),
        (pl.Datetime("us", "UTC"), "timestamp", [MOMENT], "found timestamp without time zone"),
        (pl.Datetime("ns"), "timestamp", None, "'v' has times below a microsecond"),
        (pl.List(pl.Float64()), "double precision", [[1.0]], "found double precision"),
        (pl.Float64(), "double precision[]", [1.0], "found double precision[]"),
        (pl.List(pl.List(pl.Int64())), "bigint[]", [[[1]]], "'v' of the result is List(List(Int64))"),
        (pl.Struct({"a": pl.Int64()}), "json", [{"a": 1}], "'v' of the result is Struct"),
        (pl.Float64(), "double precision NOT NULL", [1.0, None], "column 'v': null value"),
    ],
)
def test_a_value_that_a_column_cannot_hold_is_named_and_nothing_is_visible(
    warehouse: Warehouse, kind: pl.DataType, column: str, values: list[Any] | None, said: str
) -> None:
    warehouse(f"CREATE TABLE t (v {column})")
    series = pl.Series("v", [1], dtype=pl.Int64).cast(kind) if values is None else pl.Series("v", values, dtype=kind)
    with pytest.raises(TableMismatch) as raised:
        put(warehouse, series.to_frame())
    assert said in str(raised.value)
    assert warehouse("SELECT count(*) FROM t") == [(0,)]


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32])
def test_a_name_that_no_column_can_have_is_refused(warehouse: Warehouse, name: str) -> None:
    with pytest.raises(TableMismatch, match="cannot name a column"):
        put(warehouse, pl.DataFrame({name: [1]}))


def test_odd_names_of_columns_and_tables_stay_as_they_are(warehouse: Warehouse) -> None:
    names = ['a"b', "a%s", "batchserve_chunk", "select", "A", "a", "é" * 31]
    target = TableTarget("warehouse", "public", 'T"; DROP TABLE t; --')
    put(warehouse, pl.DataFrame({name: [1, 2] for name in names}), target=target)
    put(warehouse, pl.DataFrame({name: [3] for name in reversed(names)}), target=target)
    (table,) = warehouse("SELECT relname FROM pg_class WHERE relname LIKE 'T%'")
    assert table == (target.table,)
    quoted = '"' + target.table.replace('"', '""') + '"'
    found = warehouse(f'SELECT "a%s", batchserve_chunk, "{"é" * 31}" FROM {quoted} ORDER BY 1')  # noqa: S608
    assert found == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]


def test_a_trigger_that_leaves_rows_out_is_noticed(warehouse: Warehouse) -> None:
    warehouse("CREATE TABLE t (v int)")
    body = "BEGIN IF NEW.v = 2 THEN RETURN NULL; END IF; RETURN NEW; END"
    warehouse(f"CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS '{body}'")
    warehouse("CREATE TRIGGER skip BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION skip()")
    with pytest.raises(TableMismatch, match="took 2 of 3 rows"):
        put(warehouse, pl.DataFrame({"v": [1, 2, 3]}))
    assert warehouse("SELECT count(*) FROM t") == [(0,)]


def test_a_partitioned_table_takes_rows(warehouse: Warehouse) -> None:
    warehouse("CREATE TABLE t (v int) PARTITION BY RANGE (v)")
    warehouse("CREATE TABLE t1 PARTITION OF t FOR VALUES FROM (0) TO (2); CREATE TABLE t2 PARTITION OF t DEFAULT")
    put(warehouse, pl.DataFrame({"v": [1, 2, 3]}))
    assert warehouse("SELECT count(*) FROM t2") == [(2,)]


# --- rights ---


@pytest.fixture
def scorer(warehouse: Warehouse) -> Iterator[str]:
    """A user who may insert into t, and has a schema for the ledger and for staging."""
    name = f"scorer_{uuid7().hex[-8:]}"
    warehouse("CREATE TABLE t (v int)")
    warehouse(f"CREATE ROLE {name} LOGIN; CREATE SCHEMA work AUTHORIZATION {name}")
    warehouse(
        f"ALTER ROLE {name} SET search_path = work; GRANT INSERT ON t TO {name}; GRANT USAGE ON SCHEMA public TO {name}"
    )
    yield name
    warehouse(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_user_needs_to_insert_and_a_schema_of_its_own(warehouse: Warehouse, scorer: str) -> None:
    put(warehouse, pl.DataFrame({"v": [1]}), user=scorer)
    assert warehouse("SELECT count(*) FROM t") == [(1,)]
    assert warehouse("SELECT target, mode, rows FROM work.batchserve_jobs") == [("public.t", "append", 1)]


def test_what_a_user_may_not_is_refused_by_name(warehouse: Warehouse, scorer: str) -> None:
    with pytest.raises(LocationRefused, match="permission denied for table t"):
        put(warehouse, pl.DataFrame({"v": [1]}), target=replace(TARGET, mode="replace"), user=scorer)
    with pytest.raises(LocationRefused, match="permission denied for schema public"):
        put(warehouse, pl.DataFrame({"v": [1]}), target=replace(TARGET, table="new"), user=scorer)
    warehouse(f"ALTER ROLE {scorer} SET search_path = nowhere")
    with pytest.raises(LocationRefused, match="names no schema"):
        put(warehouse, pl.DataFrame({"v": [1]}), user=scorer)
    with pytest.raises(LocationRefused, match='role "nobody_at_all" does not exist'):
        put(warehouse, pl.DataFrame({"v": [1]}), user="nobody_at_all")
    assert warehouse("SELECT count(*) FROM t") == [(0,)]


def test_a_database_that_is_missing_is_refused_and_one_out_of_reach_is_waited_for(warehouse: Warehouse) -> None:
    missing = Place("warehouse", warehouse.address.replace("/test_", "/missing_"))
    with pytest.raises(LocationRefused, match="does not exist"):
        load(missing, TARGET, "j", {}, [], lambda _: pl.DataFrame())
    for away in ("postgresql://postgres@127.0.0.1:9/x", f"{warehouse.address}&port=9"):
        with pytest.raises(Unavailable, match=r"warehouse\.public\.t: the database does not respond"):
            load(Place("warehouse", away), TARGET, "j", {}, [], lambda _: pl.DataFrame())


# --- exactly once ---


@pytest.fixture
def task(tmp_path: Path, warehouse: Warehouse) -> AssembleTask:
    """The end of a job of three chunks."""
    store, parts = LocalStorage(str(tmp_path / "store")), []
    for first in (0, 40, 80):
        content = get_format("parquet").write(pl.DataFrame({"v": range(first, first + 40)}))
        with store.create(f"parts/x/{first}") as writer:
            writer.write(content)
            writer.commit()
        parts.append(Part(f"parts/x/{first}", len(content), 40))
    return AssembleTask(
        store.address, str(uuid7()), 1, "parquet", Dialect(), tuple(parts), (), table=TARGET, place=warehouse.place()
    )


def repeated(task: AssembleTask) -> None:
    """Runs it as a job does that waits while the session of its killed attempt is not over."""

    def is_done() -> bool:
        try:
            assemble_result(task)
        except Unavailable as error:
            assert "an earlier attempt" in error.detail  # noqa: PT017
            return False
        return True

    until(is_done)


def rows(warehouse: Warehouse, table: str = "t") -> list[int]:
    if warehouse(f"SELECT to_regclass('{table}') IS NULL") == [(True,)]:
        return []
    return [value for (value,) in warehouse(f"SELECT v FROM {table} ORDER BY v")]  # noqa: S608


def test_a_job_that_is_assembled_again_adds_no_row(warehouse: Warehouse, task: AssembleTask) -> None:
    for attempt in (1, 2, 3):
        assemble_result(replace(task, attempt=attempt))
    assert rows(warehouse) == list(range(120))
    assert warehouse("SELECT job_id, rows FROM batchserve_jobs") == [(task.job_id, 120)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["append", "replace"])
@pytest.mark.parametrize("when", ["before", "sent", "after"])
def test_a_kill_at_any_exchange_loses_doubles_and_half_shows_no_row(
    warehouse: Warehouse, task: AssembleTask, when: When, mode: Literal["append", "replace"]
) -> None:
    before, number, code = [1000] if mode == "append" else [], 0, -signal.SIGKILL
    with forking() as killed:
        while code == -signal.SIGKILL:
            number += 1
            table = f"t{number}"
            own = replace(task, job_id=str(uuid7()), table=replace(TARGET, table=table, mode=mode))
            warehouse(f"CREATE TABLE {table} AS SELECT 1000::bigint AS v")
            code = killed(own, number, when)
            assert rows(warehouse, table) in ([1000], [*range(120), *before]), number
            repeated(own)
            repeated(own)
            assert rows(warehouse, table) == [*range(120), *before], number
    assert code == 0
    assert number > 25
    assert warehouse.staging() == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load waits for a lock for a tenth of a second."""
    monkeypatch.setattr("batchserve.postgres.connection._LOCK_TIMEOUT", "100ms")


@contextmanager
def held(warehouse: Warehouse, mode: str = "SHARE") -> Iterator[None]:
    """Keeps others from writing to the table t, which is made."""
    warehouse("CREATE TABLE IF NOT EXISTS t (v bigint)")
    with psycopg.connect(warehouse.address) as other:
        other.execute(f"LOCK TABLE t IN {mode} MODE".encode())
        yield


def staged(warehouse: Warehouse, task: AssembleTask) -> str:
    """Runs it up to the end of its copies; returns the name of the staging table."""
    with held(warehouse), pytest.raises(Unavailable, match="lock timeout"):
        assemble_result(task)
    name = staging_of(task.job_id)
    assert warehouse(f"SELECT count(*) FROM {name}") == [(120,)]  # noqa: S608
    return name


@pytest.mark.usefixtures("quick")
def test_a_crash_of_the_server_which_empties_the_staging_loses_no_row(
    own_server: postgres.Server, task: AssembleTask
) -> None:
    with closing(Warehouse(own_server.empty())) as warehouse:
        task = replace(task, place=warehouse.place())
        name = staged(warehouse, task)
    own_server.stop()
    with pytest.raises(Unavailable, match="does not respond"):
        assemble_result(task)
    own_server.start()
    with closing(Warehouse(warehouse.address)) as warehouse:
        assert warehouse(f"SELECT count(*) FROM {name}") == [(0,)]  # noqa: S608
        repeated(task)
        assert rows(warehouse) == list(range(120))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM {} WHERE v = 50",
        "INSERT INTO {0} SELECT * FROM {0} WHERE batchserve_chunk = 40",
        "UPDATE {} SET batchserve_chunk = 0 WHERE batchserve_chunk = 40",
        "INSERT INTO {} VALUES (999, 7)",
        "TRUNCATE {}",
        "DROP TABLE {}",
        "ALTER TABLE {} ALTER v TYPE int",
    ],
)
def test_whatever_is_in_the_staging_table_the_rows_are_those_of_the_result(
    warehouse: Warehouse, task: AssembleTask, change: str
) -> None:
    warehouse(change.format(staged(warehouse, task)))
    repeated(task)
    assert rows(warehouse) == list(range(120))


def test_rows_that_change_between_the_copies_and_the_end_are_noticed(warehouse: Warehouse, task: AssembleTask) -> None:
    name = staging_of(task.job_id)
    with ThreadPoolExecutor(1) as threads, held(warehouse):
        ended = threads.submit(assemble_result, task)
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"
        until(lambda: warehouse(waits) == [(1,)])
        warehouse(f"INSERT INTO {name} VALUES (40, 7)")  # noqa: S608
    with pytest.raises(Unavailable, match="copied again"):
        ended.result(30)
    assert rows(warehouse) == []
    repeated(task)
    assert rows(warehouse) == list(range(120))


def test_a_table_that_is_changed_between_the_copies_and_the_end_takes_no_row_as_it_was(
    warehouse: Warehouse, task: AssembleTask
) -> None:
    with psycopg.connect(warehouse.address) as other, ThreadPoolExecutor(1) as threads:
        warehouse("CREATE TABLE t (v bigint)")
        other.execute("LOCK TABLE t IN SHARE MODE")
        ended = threads.submit(assemble_result, task)
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 't'::regclass"
        until(lambda: warehouse(waits) == [(1,)])
        other.execute("ALTER TABLE t ALTER v TYPE smallint")
        other.commit()
        with pytest.raises(Unavailable, match="was changed"):
            ended.result(30)
    repeated(task)
    assert rows(warehouse) == list(range(120))


@pytest.mark.usefixtures("quick")
def test_chunks_that_are_copied_are_not_copied_again(warehouse: Warehouse) -> None:
    frames = {first: pl.DataFrame({"v": [first, first + 1]}) for first in (0, 2)}
    read: list[int] = []

    def reading(piece: Piece) -> pl.DataFrame:
        read.append(piece.first)
        return frames[piece.first]

    given = warehouse.place(), TARGET, str(uuid7()), dict(frames[0].schema), [Piece(0, 2), Piece(2, 2)], reading
    with held(warehouse), pytest.raises(Unavailable):
        load(*given)
    load(*given)
    assert (read, rows(warehouse)) == ([0, 2], [0, 1, 2, 3])


@pytest.mark.usefixtures("quick")
def test_a_table_that_others_hold_is_waited_for(warehouse: Warehouse, task: AssembleTask) -> None:
    staged(warehouse, task)
    assert rows(warehouse) == []
    assemble_result(task)
    assert rows(warehouse) == list(range(120))


def test_readers_see_the_old_rows_until_all_new_ones_are_there(warehouse: Warehouse, task: AssembleTask) -> None:
    assemble_result(task)
    with psycopg.connect(warehouse.address) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        assert reader.execute("SELECT count(*) FROM t").fetchone() == (120,)
        assemble_result(replace(task, job_id=str(uuid7()), table=replace(TARGET, mode="replace"), parts=task.parts[:1]))
        assert reader.execute("SELECT count(*) FROM t").fetchone() == (120,)
    assert rows(warehouse) == list(range(40))


@pytest.mark.slow
def test_two_jobs_that_replace_a_table_at_once_leave_the_rows_of_one(warehouse: Warehouse, task: AssembleTask) -> None:
    processes = get_context("spawn")
    own = [
        replace(task, job_id=str(uuid7()), table=replace(TARGET, mode="replace"), parts=task.parts[:parts])
        for parts in (1, 2, 3, 1, 2, 3)
    ]
    running = [processes.Process(target=repeated, args=(one,)) for one in own]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert rows(warehouse) in [list(range(40 * parts)) for parts in (1, 2, 3)]


# --- jobs ---


@pytest.fixture
def bench(database_url: str, tmp_path: Path, warehouse: Warehouse) -> Iterator[Bench]:
    tables = {"default": {"warehouse": warehouse.address}}
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10, tables=tables) as bench:
        yield bench


RESULT = TableTarget("warehouse", "public", "result")


def submitted(bench: Bench, *, rows: int = 25) -> str:
    model = bench.register("busy", graphs.busy())
    return bench.submit(model, rows_of(*range(rows)), format="parquet", table=RESULT)


def results(warehouse: Warehouse) -> list[str]:
    return [name for (name,) in warehouse("SELECT id FROM result ORDER BY length(id), id")]


def test_an_end_that_is_lost_after_the_commit_in_the_table_is_repeated_without_doubling(
    bench: Bench, warehouse: Warehouse
) -> None:
    job_id = submitted(bench)
    first = bench.by_hand()
    calls = first.chunks()
    while not any(call.function is assemble_result for call in calls):
        for call in calls:
            call.run()
        calls = first.calls()
    (call,) = calls
    call.function(*call.args)  # its outcome is lost with the worker
    assert len(results(warehouse)) == 25
    second = bench.by_hand()
    second.calls()  # it has just begun, and lets others renew their leases
    second.clock.advance(120)
    second.work()
    job = bench.get(job_id)
    assert (job.state, job.attempt) == (JobState.COMPLETED, 2)
    assert results(warehouse) == [f"r{number}" for number in range(25)]


def test_a_job_waits_for_a_database_that_is_away(
    own_server: postgres.Server, sqlite_template: Path, tmp_path: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path)
    with closing(Warehouse(own_server.empty())) as warehouse:
        tables = {"*": {"warehouse": warehouse.address}}
    url = f"sqlite:///{tmp_path / 'batchserve.db'}"
    with opened(url, tmp_path / "store", HandEngine(), chunk_records=10, tables=tables) as bench:
        job_id, worker = submitted(bench), bench.by_hand()
        own_server.stop()
        calls = worker.chunks()
        for _ in range(6):
            for call in calls:
                call.run()
            calls = worker.calls()
        job = bench.get(job_id)
        assert (job.state, job.reason) == (JobState.RUNNING, "unavailable")
        own_server.start()
        worker.work(*calls)
        assert (bench.get(job_id).state, bench.get(job_id).reason) == (JobState.COMPLETED, None)
    with closing(Warehouse(warehouse.address)) as warehouse:
        assert len(results(warehouse)) == 25


def test_a_job_whose_database_is_no_longer_named_fails_by_name(bench: Bench) -> None:
    job_id = submitted(bench)
    bench.by_hand(tables={}).work()
    job = bench.get(job_id)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "location-refused"
    assert "'warehouse' is not a database that this tenant may use" in job.error["message"]


# --- leftovers ---


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("end", "is_kept"), [("running", True), ("failed", False), ("cancelled", False), ("deleted", False)]
)
def test_the_staging_of_a_job_that_has_ended_is_swept(
    bench: Bench, warehouse: Warehouse, task: AssembleTask, end: str, is_kept: bool
) -> None:
    job_id = submitted(bench)
    staged(warehouse, replace(task, job_id=job_id))
    now, week = time_now(), 8 * 86400.0
    if end == "deleted":
        with bench.database.write() as connection:
            requests.delete_if_not_running(connection, job_id)
        assert sweep_staging(bench.database, bench.runtime.settings, now) == 0  # another service may know it
        now += week
    elif end != "running":
        with bench.database.write() as connection:
            connection.execute(update(jobs).values(state=end))
    assert sweep_staging(bench.database, bench.runtime.settings, now) == (0 if is_kept else 1)
    assert warehouse.staging() == ([job_id] if is_kept else [])


def test_a_job_under_way_keeps_its_staging_whatever_a_sweep_thinks(warehouse: Warehouse, task: AssembleTask) -> None:
    with ThreadPoolExecutor(1) as threads, held(warehouse):
        ended = threads.submit(assemble_result, task)
        until(lambda: warehouse.staging() == [task.job_id])
        assert drop_staging(warehouse.place(), [task.job_id]) == 0
    ended.result(30)
    assert rows(warehouse) == list(range(120))


def test_a_sweep_goes_on_without_a_database_that_is_away(
    bench: Bench, warehouse: Warehouse, capfd: pytest.CaptureFixture[str]
) -> None:
    tables = {"a": {"x": "postgresql://me:hush@127.0.0.1:9/x"}, "default": {"warehouse": warehouse.address}}
    settings = Settings(storage=bench.runtime.settings.storage, tables=tables)
    assert sweep_staging(bench.database, settings, time_now()) == 0
    told = "".join(capfd.readouterr())
    assert "left to the next sweep" in told
    assert "hush" not in told


def time_now() -> float:
    return datetime.now(UTC).timestamp()
