"""How long the wall clock has run along with the clock that nobody sets: what is kept for a time is removed by it.

Rows and files are dated by the wall clock, which may jump by years. So nothing is removed for its age before the two
clocks have agreed for that long: until then a date may be of the time before a jump. After that, whatever was dated
before the jump is old enough, also what is dated in the future.
"""

from sqlalchemy import Connection, insert, select, update

from batchserve.db.connect import Moment, lock
from batchserve.db.tables import clock

TOLERANCE = 60.0
"""Seconds by which the clocks may differ from one look to the next: clocks are adjusted."""
_LONGEST_OFF = 7 * 86400.0
"""Seconds between two boots of the host that the wall clock is believed."""
_NOTED = 600.0


def settled_for(connection: Connection, now: Moment) -> float:
    """Seconds for which the clocks have agreed, as far as the looks so far tell; to be asked often, in a write
    transaction. A new database believes the wall clock."""
    row = connection.execute(select(clock)).mappings().one_or_none()
    if row is None:  # nearly never: only then may another transaction be the first one as well
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
    if (
        settled != row["settled"] or not same_boot or elapsed > _NOTED
    ):  # seldom: each commit ends what is kept in memory
        values = {"boot": now.clock, "steady": now.steady, "wall": now.wall, "counted": counted, "settled": settled}
        connection.execute(update(clock).values(values))
    return float(counted - settled)
