"""Calls that wait for the same function and argument go in one run, within bounds, in turn, and each fails alone."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import calls
import pytest
import uvloop
from selection import quick_first

from batchserve.engines import open_interactive
from batchserve.errors import BadRequest, InvalidInput, ScoringCrashed, ScoringTimeout, Unavailable
from batchserve.service import groups
from batchserve.service.calls import Calls
from batchserve.service.groups import GROUP_BYTES, GROUP_ITEMS
from batchserve.service.turns import Lane, Place
from batchserve.settings import Settings

T = TypeVar("T")

A, B, C = (Place(tenant, Lane.ONLINE) for tenant in "abc")


def named(shared: str, items: list[str]) -> list[str]:
    return [f"{shared}{item}" for item in items]


def named_as_well(shared: str, items: list[str]) -> list[str]:
    return named(shared, items)


class Held:
    """Interactive processes, each of whose runs ends when the test says so."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.runs: list[tuple[str, list[str]]] = []
        self.cancelled = 0
        self._ends: list[asyncio.Future[None]] = []

    async def run(self, function: Callable[..., T], *args: Any, seconds: float) -> T:  # noqa: ARG002
        self.runs.append(args)
        end = asyncio.get_running_loop().create_future()
        self._ends.append(end)
        try:
            await end
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return function(*args)

    def close(self) -> None:
        """There is nothing to end."""

    async def end(self, *numbers: int) -> None:
        for number in numbers:
            self._ends[number].set_result(None)
        await settled()

    async def end_all(self) -> None:
        while left := [number for number, end in enumerate(self._ends) if not end.done()]:
            await self.end(*left)


async def working(fair: Calls, item: str = "0") -> "asyncio.Task[str]":
    """An item in a run that has begun."""
    task = joined(fair, A, item)
    await settled()
    return task


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def joined(
    fair: Calls, place: Place, item: str, shared: str = "x", size: int = 1, function: Any = named, leaving: Any = None
) -> "asyncio.Task[str]":
    return asyncio.ensure_future(fair.together(place, function, shared, item, size=size, seconds=30.0, leaving=leaving))


def with_held(capacity: int, scenario: Callable[[Held, Calls], Awaitable[None]], patience: float = 10.0) -> None:
    async def opened() -> None:
        held = Held(capacity)
        await scenario(held, Calls(held, most=1000, patience=patience))

    asyncio.run(opened())


# --- what goes together ---


def test_items_that_wait_while_a_process_works_go_in_one_run() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        asked = [await working(fair, "1"), *(joined(fair, A, item) for item in "234")]
        await settled()
        assert held.runs == [("x", ["1"])]
        await held.end(0)
        assert held.runs == [("x", ["1"]), ("x", ["2", "3", "4"])]
        await held.end(1)
        assert [task.result() for task in asked] == ["x1", "x2", "x3", "x4"]

    with_held(1, scenario)


def test_items_for_another_argument_or_function_have_another_run() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        asked = [await working(fair)]
        asked += [joined(fair, A, "1"), joined(fair, A, "2", shared="y"), joined(fair, A, "3", function=named_as_well)]
        asked += [joined(fair, A, "4", shared="x"[:]), joined(fair, A, "5", shared="y")]
        await settled()
        await held.end_all()
        assert held.runs[0] == ("x", ["0"])
        assert sorted(held.runs[1:]) == [("x", ["1", "4"]), ("x", ["3"]), ("y", ["2", "5"])]
        assert [task.result() for task in asked] == ["x0", "x1", "y2", "x3", "x4", "y5"]

    with_held(1, scenario)


def test_a_group_has_a_bounded_number_of_items() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        asked = [await working(fair)]
        asked += [joined(fair, A, str(item)) for item in range(1, 2 * GROUP_ITEMS + 2)]
        await settled()
        await held.end_all()
        assert [len(items) for _, items in held.runs] == [1, GROUP_ITEMS, GROUP_ITEMS, 1]
        assert [task.result() for task in asked] == [f"x{item}" for item in range(2 * GROUP_ITEMS + 2)]

    with_held(1, scenario)


def test_a_group_has_a_bounded_number_of_bytes_and_a_longer_item_goes_alone() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        await working(fair)
        for item, size in (("1", GROUP_BYTES - 1), ("2", 1), ("3", 1), ("4", 2 * GROUP_BYTES), ("5", 1)):
            joined(fair, A, item, size=size)
        await settled()
        await held.end_all()
        assert [items for _, items in held.runs] == [["0"], ["1", "2"], ["3"], ["4"], ["5"]]

    with_held(1, scenario)


@pytest.mark.slow
def test_an_item_waits_for_the_run_before_it_however_long_others_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_QUICK", 2.0)

    async def scenario(held: Held, fair: Calls) -> None:
        await working(fair, "1")
        joined(fair, A, "2")
        await asyncio.sleep(1.0)
        await held.end(0)
        joined(fair, A, "3")
        await asyncio.sleep(1.3)  # the time of the second item is over, that of the third is not
        assert [items for _, items in held.runs] == [["1"], ["2"]]
        await asyncio.sleep(1.0)
        assert [items for _, items in held.runs][2:] == [["3"]]
        await held.end_all()

    with_held(3, scenario)


def test_items_that_arrive_together_go_together() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        asked = [joined(fair, A, item) for item in "123"]
        await settled()
        assert held.runs == [("x", ["1", "2", "3"])]
        await held.end_all()
        assert [task.result() for task in asked] == ["x1", "x2", "x3"]

    with_held(3, scenario)


def test_an_item_does_not_wait_for_a_long_run_while_a_process_is_free() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        for item in "12":
            joined(fair, A, item)
            await asyncio.sleep(0.05)
        assert held.runs == [("x", ["1"]), ("x", ["2"])]
        await held.end_all()

    with_held(3, scenario)


# --- fairness ---


def test_a_group_takes_an_item_of_each_tenant_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_QUICK", 2.0)  # no place asks for a turn before the run ends

    async def scenario(held: Held, fair: Calls) -> None:
        await working(fair, "a0")
        for number in range(GROUP_ITEMS + 10):
            joined(fair, A, f"a{number + 1}")
        for place, item in ((B, "b1"), (B, "b2"), (C, "c1")):
            joined(fair, place, item)
        await settled()
        await held.end(0)
        _, items = held.runs[1]
        assert items[:7] == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        assert len(items) == GROUP_ITEMS
        await held.end_all()

    with_held(1, scenario)


def test_many_items_of_a_tenant_leave_a_process_to_others() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        for item in range(3 * GROUP_ITEMS):
            joined(fair, A, f"a{item}")
            await asyncio.sleep(0 if item else 0.01)
        await asyncio.sleep(0.05)
        assert len(held.runs) == 2  # and the third process is left to others
        joined(fair, B, "b1", shared="y")
        await settled()
        assert held.runs[2] == ("y", ["b1"])
        await held.end_all()

    with_held(3, scenario)


def test_a_call_of_another_tenant_comes_after_one_group_of_a_flood() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        await working(fair)
        for item in range(10 * GROUP_ITEMS):
            joined(fair, A, f"a{item}")
        await asyncio.sleep(0.05)
        other = asyncio.ensure_future(fair.run(B, named, "y", ["b"], seconds=30.0))
        await settled()
        await held.end(0)
        assert held.runs[1] == ("y", ["b"])
        await held.end_all()
        assert other.result() == ["yb"]

    with_held(1, scenario)


# --- who leaves ---


def test_an_item_that_waits_too_long_is_told_so_and_is_not_run() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        first, late = await working(fair, "1"), joined(fair, A, "2")
        with pytest.raises(Unavailable, match=r"free for 0\.05 s"):
            await late
        await held.end(0)
        assert first.result() == "x1"
        assert len(held.runs) == 1
        again = joined(fair, A, "3")
        await settled()
        await held.end_all()
        assert again.result() == "x3"

    with_held(1, scenario, patience=0.05)


def test_a_cancelled_item_leaves_its_group_and_the_last_one_ends_the_run() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        first, *rest = [await working(fair, "1"), *(joined(fair, A, item) for item in "2345")]
        await settled()
        rest[3].cancel()  # while it waits
        await held.end(0)
        assert held.runs[1] == ("x", ["2", "3", "4"])
        rest[0].cancel()
        await settled()
        assert held.cancelled == 0
        rest[1].cancel()
        rest[2].cancel()
        await settled()
        assert held.cancelled == 1
        assert first.result() == "x1"
        after = joined(fair, A, "6")
        await settled()
        await held.end_all()
        assert after.result() == "x6"

    with_held(1, scenario)


def test_a_group_ends_for_a_client_that_disconnects_and_goes_on_for_the_others() -> None:
    async def scenario(held: Held, fair: Calls) -> None:
        async def gone() -> None:
            """The client has disconnected."""

        await working(fair)
        leaving, staying = joined(fair, A, "1", leaving=gone), joined(fair, A, "2")
        await settled()
        await held.end(0)
        with pytest.raises(BadRequest, match="disconnected"):
            await leaving
        await held.end(1)
        assert staying.result() == "x2"

    with_held(1, scenario)


# --- failures ---


def in_processes(scenario: Callable[[Calls], Awaitable[None]], folder: Path) -> None:
    async def opened() -> None:
        with closing(open_interactive(Settings(storage=str(folder)))) as processes:
            await scenario(Calls(processes, most=64, patience=60.0))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(opened())


def runs(folder: Path) -> list[int]:
    """The sizes of the runs, in order."""
    files = sorted(folder.iterdir(), key=lambda path: int(path.name))
    return [int(path.read_text()) for path in files]


@pytest.mark.parametrize(
    ("item", "error"),
    quick_first([("die", ScoringCrashed), (-1, InvalidInput), ("raise", KeyError), ("stall", ScoringTimeout)], 3),
)
def test_one_item_of_a_group_fails_alone(tmp_path: Path, item: str | int, error: type[Exception]) -> None:
    async def scenario(fair: Calls) -> None:
        def ask(value: int | str) -> "asyncio.Task[int]":
            seconds = 4.0 if item == "stall" else 60.0
            return asyncio.ensure_future(
                fair.together(A, calls.doubled_together, tmp_path, value, size=1, seconds=seconds)
            )

        started = [fair.run(A, calls.pid_after, 0.5, seconds=60.0) for _ in range(2)]
        assert len(set(await asyncio.gather(*started))) == 2
        first = [ask(1)]
        await asyncio.sleep(0.05)  # both processes that a tenant gets are busy
        first += [ask(2)]
        await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(*first, *map(ask, [3, item, 4]), return_exceptions=True)
        assert outcomes[:3] + outcomes[4:] == [2, 4, 6, 8]
        assert isinstance(outcomes[3], error)
        assert 3 in runs(tmp_path)

    in_processes(scenario, tmp_path / "storage")
