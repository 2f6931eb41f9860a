"""Calls that differ in one argument travel together: what waits while the processes work goes in one message."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchserve.engines import Interactive
from batchserve.errors import BatchserveError
from batchserve.service.turns import Place, Turn, Turns

__all__ = ["GROUP_BYTES", "GROUP_ITEMS", "GroupFailed", "Grouped", "Groups"]

GROUP_ITEMS = 64
"""Most items of a group."""
GROUP_BYTES = 2**20
"""Most bytes of the items of a group; a longer item travels alone."""

_QUICK = 0.002
"""Seconds that an item waits for the end of a run of its kind before it asks for another process."""

Grouped = Callable[[Any, list[Any]], Sequence[Any]]
"""A module-level function of what calls share and of an item of each. Returns for each item a value, or the
BatchserveError that its caller gets."""


class GroupFailed(Exception):
    """A run of several items failed as a whole: which of them is at fault is unknown."""


@dataclass(eq=False, slots=True)
class _Item:
    place: Place
    value: Any
    size: int
    seconds: float
    outcome: "asyncio.Future[Any]"
    timer: asyncio.TimerHandle | None = None
    group: "_Group | None" = None
    """The group that it runs in; None while it waits."""


@dataclass(eq=False, slots=True)
class _Group:
    """Items in one run."""

    items: list[_Item]
    task: "asyncio.Task[None] | None" = None


@dataclass(eq=False, slots=True)
class _Line:
    """The waiting items for one function and one shared argument, and a turn asked for each place among them."""

    function: Grouped
    shared: Any
    waiting: dict[Place, deque[_Item]] = field(default_factory=dict)
    turns: dict[Place, Turn] = field(default_factory=dict)
    running: int = 0
    """Runs in progress."""
    look: asyncio.Handle | None = None
    """When turns are asked for, if no run of this line ends before."""

    def taken(self, first: Place) -> list[_Item]:
        """Removes the items of the next group: one of each place in turn, beginning with this one."""
        taken: list[_Item] = []
        size = 0
        places = deque([first, *(place for place in self.waiting if place != first)])
        while places:
            place = places.popleft()
            queue = self.waiting[place]
            if taken and (len(taken) >= GROUP_ITEMS or size + queue[0].size > GROUP_BYTES):
                break
            item = queue.popleft()
            taken.append(item)
            size += item.size
            del self.waiting[place]
            if queue:
                self.waiting[place] = queue  # behind those that had no item in this group
                places.append(place)
        return taken

    def stop_looking(self) -> None:
        if self.look is not None:
            self.look.cancel()
            self.look = None

    def remove(self, item: _Item) -> None:
        queue = self.waiting[item.place]
        queue.remove(item)
        if not queue:
            del self.waiting[item.place]


class Groups:
    """Groups of items over interactive processes. Each place with waiting items asks for turns as for any other call;
    whichever comes first takes items of all places along, so no place waits longer than it would alone."""

    def __init__(
        self, processes: Interactive, turns: Turns, patience: float, busy: Callable[[Place], BatchserveError]
    ) -> None:
        """`busy`: the error of an item that has waited for `patience` seconds."""
        self._processes, self._turns, self._patience, self._busy = processes, turns, patience, busy
        self._loop = asyncio.get_running_loop()
        self._lines: list[_Line] = []

    async def outcome(
        self, place: Place, function: Grouped, shared: object, value: object, *, size: int, seconds: float
    ) -> Any:
        """The outcome of an item, which is cancelled with its caller. Raises GroupFailed when a run of several items
        failed, and what the run of one raises."""
        loop = self._loop
        item = _Item(place, value, size, seconds, loop.create_future())
        line = self._line(function, shared)
        if (queue := line.waiting.get(place)) is not None:
            queue.append(item)
        else:
            line.waiting[place] = deque((item,))
            if line.look is None:
                # Not at once: with those that the loop has received together, or that come until a quick run ends.
                later = loop.call_later(_QUICK, self._look, line) if line.running else loop.call_soon(self._look, line)
                line.look = later
        if line.look is None:
            self._limit(line, item)
        try:
            return await item.outcome
        except asyncio.CancelledError:
            if item.outcome.cancelled():
                self._leave(line, item)
            raise

    def _line(self, function: Grouped, shared: object) -> _Line:
        for line in self._lines:
            if line.function is function and (line.shared is shared or line.shared == shared):
                return line
        line = _Line(function, shared)
        self._lines.append(line)
        return line

    def _look(self, line: _Line) -> None:
        """Asks for a turn of each place with items that wait."""
        line.stop_looking()
        for place in list(line.waiting):
            self._ask(line, place)
        for queue in line.waiting.values():
            for item in queue:
                self._limit(line, item)

    def _limit(self, line: _Line, item: _Item) -> None:
        """From now on the item waits for `patience` seconds."""
        if item.timer is None:
            item.timer = self._loop.call_later(self._patience, self._give_up, line, item)

    def _ask(self, line: _Line, place: Place) -> None:
        """Asks for a turn of this place, if it has items that wait and no turn that was asked for."""
        if place in line.turns or place not in line.waiting:
            return
        turn = line.turns[place] = self._turns.ask(place)
        if turn.has_come:
            self._begin(line, turn)
        else:
            turn.then(lambda: self._begin(line, turn))

    def _begin(self, line: _Line, turn: Turn) -> None:
        """A turn of the line has come: the next group runs."""
        line.turns.pop(turn.place, None)
        if turn.place not in line.waiting:
            turn.end()  # its items have gone with those of another place
            return
        group = _Group(line.taken(turn.place))
        for item in group.items:
            item.group = group
            if item.timer is not None:
                item.timer.cancel()
        line.running += 1
        group.task = self._loop.create_task(self._run(line, group, turn))
        self._settle(line)
        self._ask(line, turn.place)

    async def _run(self, line: _Line, group: _Group, turn: Turn) -> None:
        items = group.items
        outcomes: Sequence[object]
        try:
            values, seconds = [item.value for item in items], max(item.seconds for item in items)
            outcomes = await self._processes.run(line.function, line.shared, values, seconds=seconds)
            if len(outcomes) != len(items):
                raise RuntimeError(f"{line.function.__name__} gave {len(outcomes)} outcomes for {len(items)} items")
        except asyncio.CancelledError:
            for item in items:
                item.outcome.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - the callers get it
            outcomes = [error if len(items) == 1 else GroupFailed() for _ in items]
        finally:
            line.running -= 1
            turn.end()
            self._look(line)  # first of all: a process works while the callers get their outcomes
            self._settle(line)
        for item, outcome in zip(items, outcomes, strict=True):
            _end(item, outcome)

    def _leave(self, line: _Line, item: _Item) -> None:
        """The caller of an item is gone. A group without callers is killed."""
        if item.group is None:
            self._drop(line, item)
        elif item.group.task is not None and all(other.outcome.cancelled() for other in item.group.items):
            item.group.task.cancel()

    def _give_up(self, line: _Line, item: _Item) -> None:
        self._drop(line, item)
        _end(item, self._busy(item.place))

    def _drop(self, line: _Line, item: _Item) -> None:
        """Removes an item that waits."""
        if item.timer is not None:
            item.timer.cancel()
        line.remove(item)
        self._settle(line)

    def _settle(self, line: _Line) -> None:
        """Ends the turns that no item waits for any more, and forgets an empty line."""
        if line.turns:
            for place in line.turns.keys() - line.waiting.keys():
                line.turns.pop(place).end()
        if not line.waiting:
            line.stop_looking()  # or it would ask for items that come later
            if not line.running and line in self._lines:
                self._lines.remove(line)


def _end(item: _Item, outcome: object) -> None:
    if item.outcome.done():
        return  # its caller is gone
    if isinstance(outcome, Exception):
        item.outcome.set_exception(outcome)
    else:
        item.outcome.set_result(outcome)
