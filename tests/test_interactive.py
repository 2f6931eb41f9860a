"""Interactive processes: the event loop waits for none of them, and each call is lost alone."""

import asyncio
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

import calls
import pytest
import uvloop
from selection import quick_first
from waiting import is_alive, until

from batchserve.allowance import Allowance, allowance
from batchserve.engines import Interactive, open_engine, open_interactive
from batchserve.errors import InvalidInput, OutOfMemory, ScoringCrashed, ScoringTimeout, Unavailable
from batchserve.service.calls import Calls
from batchserve.service.turns import Lane, Place
from batchserve.settings import Settings

SECONDS = 30.0
LONG = 20 * 2**20
"""Bytes of a message that no pipe holds."""

Scenario = Callable[[Interactive], Awaitable[None]]
Playing = Callable[[Scenario], None]


def play_on(new_loop: Callable[[], asyncio.AbstractEventLoop], folder: Path, scenario: Scenario) -> None:
    async def opened() -> None:
        settings = Settings(storage=str(folder), process_memory=512 * 2**20)
        with closing(open_interactive(settings)) as processes:
            await scenario(processes)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(opened())


@pytest.fixture
def play(tmp_path: Path) -> Playing:
    """Plays a scenario with interactive processes, on the loop of the server."""
    return partial(play_on, uvloop.new_event_loop, tmp_path)


@asynccontextmanager
async def beside(running: Awaitable[Any]) -> AsyncIterator[asyncio.Future[Any]]:
    """A call in progress, cancelled at the end."""
    task = asyncio.ensure_future(running)
    await asyncio.sleep(0)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def appeared(path: Path) -> int:
    """The ID of the process that wrote itself there."""
    await asyncio.to_thread(until, lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())  # noqa: ASYNC240 - a few bytes


# --- results ---


def test_a_call_gives_the_value_of_its_function(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        running = [processes.run(calls.double, number, seconds=SECONDS) for number in range(20)]
        assert await asyncio.gather(*running) == [2 * number for number in range(20)]

    play(scenario)


def test_errors_come_back_complete_and_end_no_process(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        first = await processes.run(calls.pid_after, 0.0, seconds=SECONDS)
        with pytest.raises(InvalidInput) as raised:
            await processes.run(calls.refuse, "row 3 has no é", seconds=SECONDS)
        assert raised.value.errors == [{"row": 3, "column": "é"}]
        with pytest.raises(KeyError, match="nothing"):
            await processes.run(calls.fail, "nothing", seconds=SECONDS)
        with pytest.raises(RuntimeError, match="Stubborn: this and that"):
            await processes.run(calls.fail_stubbornly, seconds=SECONDS)
        assert await processes.run(calls.pid_after, 0.0, seconds=SECONDS) == first

    play(scenario)


def test_calls_one_after_the_other_share_a_process(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        calm = [await processes.run(calls.pid_after, 0.0, seconds=SECONDS) for _ in "1234"]
        assert len(set(calm)) == 1
        crowd = [processes.run(calls.pid_after, 0.5, seconds=SECONDS) for _ in range(4)]
        assert len(set(await asyncio.gather(*crowd)) | set(calm)) == processes.capacity

    play(scenario)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_long_messages_arrive_whole_in_both_directions(
    new_loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    async def scenario(processes: Interactive) -> None:
        for size in (0, 1, 16_384, 70_000, LONG):
            content = os.urandom(size)
            assert await processes.run(bytes, content, seconds=SECONDS) == content

    play_on(new_loop, tmp_path, scenario)


def test_an_interactive_process_has_the_niceness_of_the_server_and_the_allowance_of_its_host(tmp_path: Path) -> None:
    settings = Settings(storage=str(tmp_path), sessions=3, image_pixels=1000, process_memory=2**30)

    async def scenario() -> None:
        with closing(open_interactive(settings)) as processes:
            assert await processes.run(calls.niceness, seconds=SECONDS) == os.nice(0)
            assert await processes.run(allowance, seconds=SECONDS) == Allowance(3, 1000, threads=None, memory=2**30)

    asyncio.run(scenario())


def test_an_interactive_call_does_not_wait_for_the_chunks_of_jobs(play: Playing, tmp_path: Path) -> None:
    async def scenario(processes: Interactive) -> None:
        await processes.run(calls.double, 0, seconds=SECONDS)  # the process has started
        with closing(open_engine(Settings(storage=str(tmp_path), processes=2))) as engine:
            for _ in range(10):
                engine.submit(calls.pid_after, 60.0, timeout=SECONDS)
            started = time.monotonic()
            assert await processes.run(calls.double, 21, seconds=SECONDS) == 42
            assert time.monotonic() - started < 20.0

    play(scenario)


# --- isolation of calls ---


@pytest.mark.parametrize(
    ("function", "arguments", "cause"),
    quick_first(
        [
            (calls.die, (int(signal.SIGSEGV),), "by signal SIGSEGV"),
            (calls.answer_half, (0.2,), "with exit code 3"),
            (calls.answer_rubbish, (), "cannot be read"),
            (calls.hang_up, (), "by signal SIGKILL"),
            (calls.die, (int(signal.SIGKILL),), "by signal SIGKILL"),
            (calls.leave, (3,), "with exit code 3"),
        ],
        3,
    ),
)
def test_a_process_that_dies_ends_only_its_own_call(
    play: Playing, function: Callable[..., None], arguments: tuple[Any, ...], cause: str
) -> None:
    async def scenario(processes: Interactive) -> None:
        async with beside(processes.run(calls.pid_after, 0.4, seconds=SECONDS)) as other:
            with pytest.raises(ScoringCrashed, match=cause):
                await processes.run(function, *arguments, seconds=SECONDS)
            assert await processes.run(calls.double, 4, seconds=SECONDS) == 8
            assert await other > 0

    play(scenario)


def test_what_a_process_sends_between_two_calls_is_not_the_answer_to_the_next(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        pid = await processes.run(calls.pid_after, 0.0, seconds=SECONDS)
        assert await processes.run(calls.answer_twice, "first", seconds=SECONDS) == "first"
        await asyncio.to_thread(until, lambda: not is_alive(pid))
        assert await processes.run(calls.double, 4, seconds=SECONDS) == 8

    play(scenario)


@pytest.mark.parametrize(("function", "arguments"), [(time.sleep, (60.0,)), (calls.answer_half, (60.0,))])
def test_a_call_that_takes_too_long_is_killed(
    play: Playing, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    async def scenario(processes: Interactive) -> None:
        pid = await processes.run(calls.pid_after, 0.0, seconds=SECONDS)
        with pytest.raises(ScoringTimeout, match=r"longer than 0.3 s"):
            await processes.run(function, *arguments, seconds=0.3)
        await asyncio.to_thread(until, lambda: not is_alive(pid))
        assert await processes.run(calls.double, 4, seconds=SECONDS) == 8

    play(scenario)


def test_a_process_that_stops_reading_delays_no_other_call(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        pid = await processes.run(calls.pid_after, 0.0, seconds=SECONDS)
        os.kill(pid, signal.SIGSTOP)
        async with beside(processes.run(calls.length, bytes(LONG), seconds=SECONDS)) as stalled:
            assert await processes.run(calls.length, bytes(LONG), seconds=SECONDS) == LONG
            assert not stalled.done()
            os.kill(pid, signal.SIGCONT)
            assert await stalled == LONG

    play(scenario)


def test_a_process_that_stops_reading_is_killed_when_its_call_takes_too_long(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        pid = await processes.run(calls.pid_after, 0.0, seconds=SECONDS)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(ScoringTimeout):
            await processes.run(calls.length, bytes(LONG), seconds=1.0)
        await asyncio.to_thread(until, lambda: not is_alive(pid))
        assert await processes.run(calls.length, bytes(LONG), seconds=SECONDS) == LONG

    play(scenario)


def test_an_idle_process_that_is_killed_is_replaced(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        os.kill(await processes.run(calls.pid_after, 0.0, seconds=SECONDS), signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert await processes.run(calls.double, 4, seconds=SECONDS) == 8

    play(scenario)


def test_a_call_may_not_take_more_memory_than_the_limit(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        with pytest.raises((OutOfMemory, ScoringCrashed)):
            await processes.run(calls.allocate, 2**30, seconds=SECONDS)
        assert await processes.run(calls.double, 1, seconds=SECONDS) == 2

    play(scenario)


def test_a_process_that_cannot_be_started_ends_its_call_and_the_next_one_runs(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        await asyncio.to_thread(time.sleep, 0)  # the executor has its thread
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)  # the lowest number that is not in use
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            with pytest.raises(ScoringCrashed, match="no scoring process could be used"):
                await processes.run(calls.double, 1, seconds=SECONDS)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await processes.run(calls.double, 4, seconds=SECONDS) == 8

    play(scenario)


# --- killing and closing ---


def test_a_cancelled_call_ends_with_its_process_and_no_other_does(play: Playing, tmp_path: Path) -> None:
    async def scenario(processes: Interactive) -> None:
        async with beside(processes.run(calls.appear, tmp_path / "spared", 60.0, seconds=SECONDS)):
            spared = await appeared(tmp_path / "spared")
            async with beside(processes.run(calls.appear, tmp_path / "doomed", 60.0, seconds=SECONDS)):
                doomed = await appeared(tmp_path / "doomed")
            await asyncio.to_thread(until, lambda: not is_alive(doomed))
            assert is_alive(spared)
            assert await processes.run(calls.double, 1, seconds=SECONDS) == 2

    play(scenario)


def test_a_process_whose_call_was_cancelled_while_it_started_serves_the_next_one(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        async with beside(processes.run(calls.double, 1, seconds=SECONDS)) as call:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert await processes.run(calls.double, 4, seconds=SECONDS) == 8

    play(scenario)


def test_closing_ends_every_call_and_process(play: Playing, tmp_path: Path) -> None:
    async def scenario(processes: Interactive) -> None:
        running = [
            asyncio.ensure_future(processes.run(calls.appear, tmp_path / str(number), 60.0, seconds=SECONDS))
            for number in range(processes.capacity + 2)
        ]
        pids = [await appeared(tmp_path / str(number)) for number in range(processes.capacity)]
        processes.close()
        assert not any(map(is_alive, pids))
        ended = await asyncio.gather(*running, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError | Unavailable) for one in ended), ended
        with pytest.raises(Unavailable):
            await processes.run(calls.double, 1, seconds=SECONDS)

    play(scenario)


# --- fair calls over them ---


def test_a_thread_may_call_while_the_loop_serves_others(play: Playing) -> None:
    async def scenario(processes: Interactive) -> None:
        fair, place = Calls(processes, most=64, patience=10.0), Place("a", Lane.LONG)

        def from_thread() -> int:
            return fair.run_from_thread(place, calls.double, 21, seconds=SECONDS)

        assert await asyncio.gather(*(asyncio.to_thread(from_thread) for _ in range(2))) == [42, 42]
        with pytest.raises(KeyError):
            await asyncio.to_thread(fair.run_from_thread, place, calls.fail, "nothing", seconds=SECONDS)

    play(scenario)
