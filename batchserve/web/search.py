"""The search of the list of jobs: words, and qualifiers such as `state:failed model:churn since:1d`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchserve.api.schemas.filters import Direction, moment_of
from batchserve.domain import JobState
from batchserve.jobs.lists import ALL_JOBS, NEWEST, JobFilter, JobOrder, SortKey

__all__ = ["Search", "parse"]

_REFERENCE = re.compile(r"[^@]+(@[0-9]{1,9})?")
_STATES = ", ".join(JobState)
_TIMES = ("since", "until", "finished-since", "finished-until")
QUALIFIERS = ("state", "model", "sort", "order", *_TIMES)


@dataclass(frozen=True, slots=True)
class Search:
    """What a text asks for."""

    text: str
    wanted: JobFilter = ALL_JOBS
    order: JobOrder = NEWEST
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
    wanted, words, finished, direction = ALL_JOBS, [], None, Direction.DESC
    by: SortKey | None = None
    for word in text.split():
        name, colon, value = word.partition(":")
        if not colon or name not in QUALIFIERS:
            words.append(word)
            continue
        try:
            if name == "sort":
                by = SortKey(_one_of(value, list(SortKey)))
            elif name == "order":
                direction = Direction(_one_of(value, list(Direction)))
            else:
                wanted = _qualified(wanted, name, value, now)
        except ValueError as error:
            return Search(text, problem=f"{word}: {error}")
        if name.startswith("finished"):
            finished = word
    if finished is not None and by is SortKey.CREATED:
        return Search(text, problem=f"sort:created: expected finished, with {finished}")
    order = JobOrder(by or (SortKey.FINISHED if finished else SortKey.CREATED), direction is Direction.ASC)
    return Search(text, replace(wanted, search=" ".join(words) or None), order)


def _one_of(value: str, known: Sequence[str]) -> str:
    """Raises ValueError."""
    if value not in known:
        raise ValueError(f"expected {' or '.join(known)}")
    return value


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
    moment = moment_of(value, now)
    match name:
        case "since":
            return replace(wanted, since=moment)
        case "until":
            return replace(wanted, until=moment)
        case "finished-since":
            return replace(wanted, finished_since=moment)
    return replace(wanted, finished_until=moment)
