"""Facts about the rows of chunks, besides their counts, and how those of several chunks add up."""

from collections.abc import Mapping
from typing import Any


def merge_facts(*known: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the facts of several chunks: numbers are added, lists united in order, objects merged entry by entry; of
    other values the last one counts."""
    merged: dict[str, Any] = {}
    for facts in known:
        for name, value in facts.items():
            merged[name] = _merged(merged[name], value) if name in merged else value
    return merged


def _merged(first: Any, second: Any) -> Any:
    match first, second:
        case dict(), dict():
            return merge_facts(first, second)
        case list(), list():
            return [*first, *(entry for entry in second if entry not in first)]
        case (bool(), _) | (_, bool()):
            return second
        case (int() | float(), int() | float()):
            return first + second
    return second
