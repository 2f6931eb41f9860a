"""What runs add to the accounts of tenants with a quota: rows as they are planned, results as they are published.

Rows beyond the quota fail the job, and nothing of the transaction stays; a retry goes on from there. A result is kept
even if it exceeds the quota of bytes: what was accepted is done.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Connection

from batchserve.domain import Chunk, Result, ScoredChunk, StoredInput
from batchserve.jobs import execution, plan
from batchserve.quotas.account import Added, charge, charge_if_limited, stored_bytes
from batchserve.quotas.limits import Limits
from batchserve.worker.clock import Clock

__all__ = ["Metering"]


class Metering:
    """The transitions of a worker that charge. Their quotas are read within the transaction, at most once a second."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits, self._clock = limits, clock

    def read(self, connection: Connection, job_id: str, attempt: int, tenant: str, stored: StoredInput) -> None:
        """As `keep_input_if_mine`. Raises QuotaExceeded and StorageQuotaExceeded."""
        if execution.keep_input_if_mine(connection, job_id, attempt, stored):
            now = self._clock.moment(connection).wall
            charge_if_limited(self._limits, connection, tenant, Added(stored.bytes or 0), now)

    def plan(
        self,
        connection: Connection,
        job_id: str,
        attempt: int,
        tenant: str,
        planned: Sequence[Chunk],
        complete: bool,
    ) -> None:
        """As `add_chunks_if_mine`. Raises QuotaExceeded."""
        rows = sum(chunk.records for chunk in planned)
        added = plan.add_chunks_if_mine(connection, job_id, attempt, planned, complete)
        if added:
            now = self._clock.moment(connection).wall
            charge_if_limited(self._limits, connection, tenant, Added(rows=rows), now)

    def complete(
        self,
        connection: Connection,
        job_id: str,
        attempt: int,
        tenant: str,
        result: Result,
        facts: Mapping[str, Any],
        now: float,
        *,
        only: ScoredChunk | None = None,
        small: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        """As `complete_if_mine`. Raises QuotaExceeded for the rows of a job that was done in one call."""
        ended = execution.complete_if_mine(connection, job_id, attempt, result, facts, now, only=only, small=small)
        if ended and self._limits.of_in(connection, tenant) is not None:
            if only is not None:
                charge(connection, tenant, Added(rows=only.chunk.records), now)
            charge(connection, tenant, Added(stored_bytes(result)), now, is_enforced=False)
