"""Counters of the whole service that never decrease: ends of jobs and their rows.

They are counted from the rows of jobs, which costs the path of a job nothing. What leaves those rows (a job that is
deleted or expires, a stopped one that is retried) is noted here, in the same transaction. Amounts are only added, so
that concurrent transactions do not wait for each other; `fold` sums them up.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sqlalchemy import BigInteger, Connection, case, delete, func, insert, select
from sqlalchemy.sql import ColumnElement

from batchserve.db.connect import lock
from batchserve.db.tables import jobs, totals
from batchserve.jobs.statements import ENDED

__all__ = ["JobTotals", "add", "count_all", "fold", "note_gone"]

_FOLDED = 500
"""Most amounts that one transaction sums up."""


@dataclass(frozen=True, slots=True)
class JobTotals:
    """The stored jobs, and the counters."""

    by_state: Mapping[str, int]
    ended: Mapping[str, int]
    """By outcome."""
    rows_ok: int
    rows_failed: int


def count_all(connection: Connection) -> JobTotals:
    """Of one snapshot."""
    by_state, scored = _count(connection)
    noted = {name: int(amount) for name, amount in connection.execute(_NOTED).all()}
    return JobTotals(
        by_state=by_state,
        ended={state.value: by_state.get(state, 0) + noted.get(state, 0) for state in ENDED},
        rows_ok=scored["rows_ok"] + noted.get("rows_ok", 0),
        rows_failed=scored["rows_failed"] + noted.get("rows_failed", 0),
    )


def note_gone(connection: Connection, job_ids: Collection[str], *, with_rows: bool) -> None:
    """Notes what these jobs count for, before they leave their end state; `with_rows`: before they are deleted. Of
    locked rows, or rows whose state is a guard of the change."""
    if not job_ids:
        return
    by_state, scored = _count(connection, jobs.c.id.in_(job_ids))
    ended = {state.value: by_state.get(state, 0) for state in ENDED}
    add(connection, ended | scored if with_rows else ended)


def add(connection: Connection, amounts: Mapping[str, int]) -> None:
    """Adds to counters, in the transaction of what they count."""
    noted = [{"name": str(name), "amount": amount} for name, amount in amounts.items() if amount]
    if noted:
        connection.execute(insert(totals), noted)


def fold(connection: Connection) -> bool:
    """Replaces the oldest amounts by their sums. Returns whether there are more."""
    lock(connection, "totals")
    found = connection.execute(select(totals).order_by(totals.c.id).limit(_FOLDED)).mappings().all()
    sums: dict[str, int] = {}
    for row in found:
        sums[row["name"]] = sums.get(row["name"], 0) + row["amount"]
    if len(sums) == len(found):
        return False
    # By their IDs: one that another transaction has added meanwhile may have a lower ID than the last of these.
    connection.execute(delete(totals).where(totals.c.id.in_([row["id"] for row in found])))
    add(connection, sums)
    return len(found) == _FOLDED


def _count(connection: Connection, *guards: ColumnElement[bool]) -> tuple[dict[str, int], dict[str, int]]:
    """The number of jobs by state, and their rows by outcome."""
    by_state = {row["state"]: row["jobs"] for row in connection.execute(_BY_STATE.where(*guards)).mappings()}
    rows = connection.execute(_ROWS.where(*guards)).mappings().one()
    return by_state, {name: int(amount or 0) for name, amount in rows.items()}


def _scored(name: str) -> ColumnElement[int]:
    """Without those of reused results, and without impossible numbers, with which a sum would overflow."""
    counts = jobs.c[name]
    counted = (jobs.c.reused_from.is_(None)) & counts.between(0, 2**48)
    return func.sum(case((counted, counts), else_=0), type_=BigInteger()).label(name)


# Two statements: of one, SQLite would read the rows of the table in the order of an index, which takes longer.
_BY_STATE = select(jobs.c.state, func.count().label("jobs")).group_by(jobs.c.state)
_ROWS = select(_scored("rows_ok"), _scored("rows_failed"))
_NOTED = select(totals.c.name, func.sum(totals.c.amount)).group_by(totals.c.name)
