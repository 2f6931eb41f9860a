"""Scoring processes: their results, their isolation, and when they end."""

import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path

import calls
import pytest
from ray_hosts import Cluster
from selection import quick_first
from waiting import is_alive, until

from batchserve.allowance import Allowance, allowance
from batchserve.engines import Call, Engine, open_engine
from batchserve.errors import InvalidInput, InvalidOptions, OutOfMemory, ScoringCrashed, ScoringTimeout, Unavailable
from batchserve.scoring.chunks import warm_up
from batchserve.settings import Settings

TIMEOUT = 30.0


Opened = Callable[..., AbstractContextManager[Engine]]
"""An engine with these settings, closed at the end."""


def local_engine(folder: Path, **settings: int) -> AbstractContextManager[Engine]:
    return closing(open_engine(Settings(storage=str(folder), **settings)))  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def opened(request: pytest.FixtureRequest) -> Opened:
    """How an engine of each kind is opened; a new kind is added here."""
    if request.param == "local":
        return local_engine
    cluster: Cluster = request.getfixturevalue("ray_cluster")
    return cluster.engine


@pytest.fixture(scope="module")
def engine(opened: Opened, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine of two processes; tests leave no call in progress."""
    with opened(tmp_path_factory.mktemp("engine"), processes=2, process_memory=512 * 2**20) as engine:
        yield engine


def is_written(path: Path) -> bool:
    return path.exists() and path.read_text() != ""


# --- results ---


def test_a_call_gives_the_value_of_its_function(engine: Engine) -> None:
    started = [engine.submit(calls.double, number, timeout=TIMEOUT) for number in range(20)]
    assert [call.future.result(TIMEOUT) for call in started] == [2 * number for number in range(20)]


def test_a_batchserve_error_comes_back_complete(engine: Engine) -> None:
    call = engine.submit(calls.refuse, "row 3 has no é", timeout=TIMEOUT)
    with pytest.raises(InvalidInput) as raised:
        call.future.result(TIMEOUT)
    assert raised.value.detail == "row 3 has no é"
    assert raised.value.errors == [{"row": 3, "column": "é"}]
    assert raised.value.extra == {"records": 7}


def test_any_other_error_comes_back_as_it_was(engine: Engine) -> None:
    with pytest.raises(KeyError, match="nothing"):
        engine.submit(calls.fail, "nothing", timeout=TIMEOUT).future.result(TIMEOUT)


def test_an_error_that_cannot_be_rebuilt_affects_no_other_call(engine: Engine) -> None:
    beside = engine.submit(calls.pid_after, 0.4, timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match="Stubborn: this and that"):
        engine.submit(calls.fail_stubbornly, timeout=TIMEOUT).future.result(TIMEOUT)
    assert beside.future.result(TIMEOUT) > 0
    assert engine.submit(calls.double, 1, timeout=TIMEOUT).future.result(TIMEOUT) == 2


def test_calls_run_concurrently_in_as_many_processes_as_configured(engine: Engine) -> None:
    assert engine.capacity == 2
    started = [engine.submit(calls.pid_after, 0.3, timeout=TIMEOUT) for _ in range(6)]
    processes = {call.future.result(TIMEOUT) for call in started}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_the_processes_of_jobs_are_nicer_than_the_server(tmp_path: Path) -> None:
    with local_engine(tmp_path, processes=1) as engine:
        assert engine.submit(calls.niceness, timeout=TIMEOUT).future.result(TIMEOUT) == min(os.nice(0) + 10, 19)


def test_a_scoring_process_has_the_allowance_of_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    settings = {"sessions": 3, "image_pixels": 1000, "process_memory": 2**30}
    with local_engine(tmp_path, processes=2, **settings) as engine:
        given = engine.submit(allowance, timeout=TIMEOUT).future.result(TIMEOUT)
    assert given == Allowance(3, 1000, threads=3, memory=2**30)


def test_a_scoring_process_imports_nothing_that_only_the_server_needs(opened: Opened, tmp_path: Path) -> None:
    heavy = "fastapi", "onnx", "pydantic", "sqlalchemy", "typer"
    with opened(tmp_path, processes=1) as engine:
        engine.submit(warm_up, timeout=TIMEOUT).future.result(TIMEOUT)
        imported = engine.submit(eval, "set(__import__('sys').modules)", timeout=TIMEOUT).future.result(TIMEOUT)
    assert "polars" in imported
    assert not imported.intersection(heavy)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can retain and trim freed memory")
def test_the_processes_of_jobs_keep_freed_memory_until_it_is_given_back(engine: Engine) -> None:
    size = 48 * 2**20
    kept = engine.submit(calls.kept_after_freeing, size, False, timeout=TIMEOUT).future.result(TIMEOUT)
    returned = engine.submit(calls.kept_after_freeing, size, True, timeout=TIMEOUT).future.result(TIMEOUT)
    assert kept > size / 2 > returned


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptions, match="'bogus'"):
        open_engine(Settings(storage=str(tmp_path), engine="bogus"))


# --- isolation of calls ---


@pytest.mark.parametrize(
    ("function", "argument", "cause"),
    quick_first(
        [
            (calls.leave, 3, "exit code 3"),
            (calls.die, signal.SIGSEGV, "signal SIGSEGV"),
            (calls.die, signal.SIGKILL, "signal SIGKILL"),
        ],
        1,
    ),
)
def test_a_process_that_dies_ends_only_its_own_call(
    engine: Engine, function: Callable[[int], None], argument: int, cause: str
) -> None:
    beside = engine.submit(calls.pid_after, 0.4, timeout=TIMEOUT)
    crashing = engine.submit(function, int(argument), timeout=TIMEOUT)
    behind = [engine.submit(calls.double, number, timeout=TIMEOUT) for number in range(5)]
    with pytest.raises(ScoringCrashed, match=cause):
        crashing.future.result(TIMEOUT)
    assert beside.future.result(TIMEOUT) > 0
    assert [call.future.result(TIMEOUT) for call in behind] == [0, 2, 4, 6, 8]


def test_a_signal_without_a_name_is_reported_by_its_number(engine: Engine) -> None:
    with pytest.raises(ScoringCrashed, match="by signal 40"):
        engine.submit(calls.die, 40, timeout=TIMEOUT).future.result(TIMEOUT)
    assert engine.submit(calls.double, 4, timeout=TIMEOUT).future.result(TIMEOUT) == 8


def test_a_process_that_cannot_be_started_ends_its_call_and_the_next_one_runs(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with local_engine(tmp_path, processes=1) as engine:
        free = os.dup(0)  # the lowest number that is not in use
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            failing = engine.submit(calls.double, 1, timeout=TIMEOUT)
            with pytest.raises(ScoringCrashed, match="no scoring process could be used"):
                failing.future.result(TIMEOUT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert engine.submit(calls.double, 4, timeout=TIMEOUT).future.result(TIMEOUT) == 8


@pytest.mark.slow
def test_a_late_kill_affects_no_other_call(engine: Engine) -> None:
    for _ in range(20):
        killed = engine.submit(calls.pid_after, 0.05, timeout=TIMEOUT)
        beside = [engine.submit(calls.double, number, timeout=TIMEOUT) for number in range(4)]
        time.sleep(0.05)
        killed.kill()
        assert [call.future.result(TIMEOUT) for call in beside] == [0, 2, 4, 6]


def test_an_urgent_call_runs_before_those_in_the_queue(opened: Opened, tmp_path: Path) -> None:
    with opened(tmp_path, processes=1) as engine:
        order: list[str] = []
        engine.submit(calls.appear, tmp_path / "running", 0.3, timeout=TIMEOUT)
        until(lambda: is_written(tmp_path / "running"))
        started = [("waiting", engine.submit(calls.pid_after, 0.0, timeout=TIMEOUT)) for _ in range(3)]
        started += [("urgent", engine.submit(calls.pid_after, 0.0, timeout=TIMEOUT, urgent=True))]
        for name, call in started:
            call.future.add_done_callback(partial(lambda name, _: order.append(name), name))
        for _, call in started:
            call.future.result(TIMEOUT)
    assert order == ["urgent", "waiting", "waiting", "waiting"]


def test_an_idle_process_that_is_killed_is_replaced(engine: Engine) -> None:
    """For example by the system when memory is short."""
    started = [engine.submit(calls.pid_after, 0.3, timeout=TIMEOUT) for _ in range(2)]
    idle = {call.future.result(TIMEOUT) for call in started}
    for pid in idle:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    for _ in idle:
        assert engine.submit(calls.double, 4, timeout=TIMEOUT).future.result(TIMEOUT) == 8


def test_a_call_that_takes_too_long_is_killed(engine: Engine, tmp_path: Path) -> None:
    call = engine.submit(calls.appear, tmp_path / "slow", 60.0, timeout=0.5)
    behind = engine.submit(calls.double, 4, timeout=TIMEOUT)
    with pytest.raises(ScoringTimeout, match=r"longer than 0.5 s"):
        call.future.result(TIMEOUT)
    pid = int((tmp_path / "slow").read_text())
    until(lambda: not is_alive(pid))
    assert behind.future.result(TIMEOUT) == 8


def test_the_time_in_the_queue_does_not_count(engine: Engine) -> None:
    for call in [engine.submit(calls.pid_after, 0.3, timeout=TIMEOUT) for _ in range(2)]:
        call.future.result(TIMEOUT)  # both processes have started, which may take as long on a busy host
    started = [engine.submit(calls.pid_after, 0.5, timeout=1.5) for _ in range(8)]
    assert len([call.future.result(TIMEOUT) for call in started]) == 8


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_a_call_may_not_take_more_memory_than_the_limit(engine: Engine) -> None:
    assert engine.submit(calls.allocate, 64 * 2**20, timeout=TIMEOUT).future.result(TIMEOUT) == 64 * 2**20
    with pytest.raises((OutOfMemory, ScoringCrashed)):
        engine.submit(calls.allocate, 2**30, timeout=TIMEOUT).future.result(TIMEOUT)
    assert engine.submit(calls.double, 1, timeout=TIMEOUT).future.result(TIMEOUT) == 2


# --- killing ---


def test_a_killed_call_ends_with_its_process(engine: Engine, tmp_path: Path) -> None:
    started = [engine.submit(calls.appear, tmp_path / str(number), 60.0, timeout=TIMEOUT) for number in range(2)]
    until(lambda: all(is_written(tmp_path / str(number)) for number in range(2)))
    doomed, spared = (int((tmp_path / str(number)).read_text()) for number in range(2))
    started[0].kill()
    with pytest.raises(CancelledError):
        started[0].future.result(TIMEOUT)
    until(lambda: not is_alive(doomed))
    assert is_alive(spared)
    started[1].kill()
    with pytest.raises(CancelledError):
        started[1].future.result(TIMEOUT)
    assert engine.submit(calls.double, 1, timeout=TIMEOUT).future.result(TIMEOUT) == 2


def test_a_killed_call_in_the_queue_never_starts(engine: Engine, tmp_path: Path) -> None:
    busy = [engine.submit(calls.pid_after, 1.0, timeout=TIMEOUT) for _ in range(2)]
    queued = [engine.submit(calls.appear, tmp_path / str(number), 0.0, timeout=TIMEOUT) for number in range(6)]
    for call in queued[:5]:
        call.kill()
        with pytest.raises(CancelledError):
            call.future.result(TIMEOUT)
    assert all(call.future.result(TIMEOUT) for call in busy)
    queued[5].future.result(TIMEOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "5.done"]


def test_a_call_that_is_done_can_be_killed_without_harm(engine: Engine) -> None:
    call = engine.submit(calls.double, 3, timeout=TIMEOUT)
    assert call.future.result(TIMEOUT) == 6
    call.kill()
    assert call.future.result(TIMEOUT) == 6


# --- ends ---


def test_closing_ends_every_call_and_process(opened: Opened, tmp_path: Path) -> None:
    with opened(tmp_path, processes=1) as engine:
        started: list[Call[None]] = [
            engine.submit(calls.appear, tmp_path / str(number), 60.0, timeout=TIMEOUT) for number in range(3)
        ]
        until(lambda: is_written(tmp_path / "0"))
    pid = int((tmp_path / "0").read_text())
    until(lambda: not is_alive(pid))
    for call in started:
        with pytest.raises(CancelledError):
            call.future.result(TIMEOUT)
    with pytest.raises(Unavailable):
        engine.submit(calls.double, 1, timeout=TIMEOUT)


@contextmanager
def engine_elsewhere(folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    """A process like a server with one call in each pool, and the IDs of the processes that run them."""
    command = [sys.executable, str(Path(calls.__file__)), str(folder)]
    with subprocess.Popen(command, start_new_session=True) as process:
        files = [folder / "batch", folder / "interactive"]
        try:
            until(lambda: all(map(is_written, files)))
            yield process, [int(file.read_text()) for file in files]
        finally:
            process.kill()


def test_scoring_processes_die_with_a_server_that_was_killed(tmp_path: Path) -> None:
    with engine_elsewhere(tmp_path) as (process, children):
        assert all(map(is_alive, children))
        process.kill()
        until(lambda: not any(map(is_alive, children)), 5.0)
    assert not list(tmp_path.glob("*.done"))


def test_ctrl_c_on_a_terminal_leaves_scoring_processes_alone(tmp_path: Path) -> None:
    """The signal goes to the whole process group; the server decides whether chunks are finished."""
    with engine_elsewhere(tmp_path) as (process, children):
        os.killpg(process.pid, signal.SIGINT)
        until((tmp_path / "interrupted").exists)
        time.sleep(0.5)
        assert all(map(is_alive, children))
        assert process.poll() is None


@pytest.mark.parametrize(("cores", "processes", "threads"), [(2, 2, 1), (8, 2, 4), (8, 3, 2), (2, 8, 1)])
def test_processes_that_all_work_share_the_cores_among_their_threads(
    cores: int, processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert Settings(processes=processes).process_threads == threads
