"""How long the wall clock has agreed with the monotonic clock; retention depends on it.

Rows and files are dated by the wall clock, which may jump by years. So nothing is removed by age before the two clocks
have agreed for that long: until then a date may precede a jump. After that, everything dated before the jump is old
enough, even with a date in the future.
"""

from sqlalchemy import Connection, insert, select, update

from batchserve.db.connect import Moment, lock
from batchserve.db.tables import clock

TOLERANCE = 60.0
"""Seconds by which the clocks may diverge between two readings: clocks are adjusted."""
_LONGEST_OFF = 7 * 86400.0
"""Seconds between two boots of the host for which the wall clock is trusted."""
_NOTED = 600.0


def settled_for(connection: Connection, now: Moment) -> float:
    """Seconds for which the clocks have agreed, by the readings so far; to be called often, in a write transaction. A
    new database trusts the wall clock."""
    row = connection.execute(select(clock)).mappings().one_or_none()
    if row is None:  # rare: only then may another transaction be the first one, too
        lock(connection, "clock")
        row = connection.execute(select(clock)).mappings().one_or_none()
    if row is None:
        values = {"boot": now.clock, "steady": now.steady, "wall": now.wall, "counted": now.wall, "settled": 0.0}
        connection.execute(insert(clock).values(id=1, **values))
        return now.wall
    passed = now.wall - row["wall"]
    same_boot = row["boot"] == now.clock
    elapsed = max(0.0, now.steady - row["steady"] if same_boot else min(passed, _LONGEST_OFF))
    counted = row["counted"] + elapsed
    settled = row["settled"] if abs(passed - elapsed) <= TOLERANCE else counted
    if settled != row["settled"] or not same_boot or elapsed > _NOTED:  # rarely: each commit invalidates caches
        values = {"boot": now.clock, "steady": now.steady, "wall": now.wall, "counted": counted, "settled": settled}
        connection.execute(update(clock).values(values))
    return float(counted - settled)
