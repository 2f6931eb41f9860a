"""The search of the list of jobs: words, and qualifiers such as `state:failed model:churn since:1d`."""

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from batchserve.domain import JobState
from batchserve.jobs.queries import ALL_JOBS, JobFilter

__all__ = ["Search", "parse"]

_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_AGO = re.compile(r"(\d{1,6})(s|min|m|h|d|w)")
_REFERENCE = re.compile(r"[^@]+(@[0-9]{1,9})?")
_STATES = ", ".join(JobState)
QUALIFIERS = ("state", "model", "since", "until")


@dataclass(frozen=True, slots=True)
class Search:
    """What a text asks for."""

    text: str
    wanted: JobFilter = ALL_JOBS
    problem: str | None = None
    """What of it cannot be understood; then nothing is searched."""

    def with_only(self, name: str, value: str | None) -> str:
        """The text with this value of a qualifier and no other; None: without the qualifier."""
        words = [word for word in self.text.split() if not word.startswith(f"{name}:")]
        return " ".join([*words, *([f"{name}:{value}"] if value else [])])

    def has(self, name: str, value: str | None) -> bool:
        """Whether it has just this value of a qualifier; None: none."""
        found = [word for word in self.text.split() if word.startswith(f"{name}:")]
        return found == ([f"{name}:{value}"] if value else [])


def parse(text: str, now: float) -> Search:
    """`now`: seconds since the epoch, from which `since:1d` counts back."""
    wanted, words = ALL_JOBS, []
    for word in text.split():
        name, colon, value = word.partition(":")
        if not colon or name not in QUALIFIERS:
            words.append(word)
            continue
        try:
            wanted = _qualified(wanted, name, value, now)
        except ValueError as error:
            return Search(text, problem=f"{word}: {error}")
    return Search(text, replace(wanted, search=" ".join(words) or None))


def _qualified(wanted: JobFilter, name: str, value: str, now: float) -> JobFilter:
    """Raises ValueError."""
    if name == "state":
        unknown = sorted(set(value.split(",")) - set(JobState))
        if unknown:
            raise ValueError(f"there is no state {unknown[0]!r}; the states are {_STATES}")
        return replace(wanted, states=(*wanted.states, *map(JobState, value.split(","))))
    if name == "model":
        if not _REFERENCE.fullmatch(value):
            raise ValueError("expected a name, or name@version with a number")
        return replace(wanted, model=value)
    return replace(wanted, since=_moment(value, now)) if name == "since" else replace(wanted, until=_moment(value, now))


def _moment(value: str, now: float) -> float:
    """Raises ValueError."""
    if found := _AGO.fullmatch(value):
        return now - int(found[1]) * _SECONDS[found[2]]
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("expected an age such as 30min, 12h or 7d, or a date such as 2026-11-30") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
