"""How many attempts a process makes at a time, and where: what works waits for what hangs no longer than an attempt may
take."""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

__all__ = ["AT_ONCE", "OF_TARGET", "OF_TENANT", "SLOW", "Room"]

AT_ONCE = 8
"""Attempts of a process at a time."""
OF_TARGET, OF_TENANT, SLOW = 2, 6, 4
"""Of these, the most to one target, for one tenant, and to what has failed before."""


class Sent(Protocol):
    """What counts of an attempt."""

    @property
    def target(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def is_slow(self) -> bool: ...


class Room:
    """What is left of the limits beside the attempts under way."""

    def __init__(self, under_way: Iterable[Sent] = ()) -> None:
        self.left, self._slow = AT_ONCE, 0
        self._targets: Counter[str] = Counter()
        self._tenants: Counter[str] = Counter()
        for one in under_way:
            self._count(one.target, one.tenant, is_slow=one.is_slow)

    def take(self, target: str, tenant: str, *, is_slow: bool) -> bool:
        """Counts one more attempt, if there is room for it."""
        is_full = self.left <= 0 or target in self.full_targets or tenant in self.full_tenants
        if is_full or (is_slow and self.is_slow_full):
            return False
        self._count(target, tenant, is_slow=is_slow)
        return True

    @property
    def full_targets(self) -> list[str]:
        return [target for target, count in self._targets.items() if count >= OF_TARGET]

    @property
    def full_tenants(self) -> list[str]:
        return [tenant for tenant, count in self._tenants.items() if count >= OF_TENANT]

    @property
    def is_slow_full(self) -> bool:
        return self._slow >= SLOW

    def _count(self, target: str, tenant: str, *, is_slow: bool) -> None:
        self.left -= 1
        self._targets[target] += 1
        self._tenants[tenant] += 1
        self._slow += is_slow
