"""Patterns of addresses, component by component: `*`, `?` and `[...]` within a name, `**` for any number of folders."""

import fnmatch
import re
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["ANY_FOLDERS", "all_match", "is_pattern", "literal", "matches", "plain"]

ANY_FOLDERS = "**"
_MAGIC = re.compile(r"[*?[]")
_ESCAPED = re.compile(r"\[([*?[])\]")
"""As `glob.escape` writes a character that is no pattern."""


def is_pattern(part: str) -> bool:
    return _MAGIC.search(_ESCAPED.sub("", part)) is not None


def literal(part: str) -> str:
    """A part without a pattern, as the name that it is."""
    return _ESCAPED.sub(r"\1", part) if "[" in part else part


@lru_cache(maxsize=256)
def _pattern(part: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(part))


def matches(name: str, part: str) -> bool:
    return (not name.startswith(".") or part.startswith(".")) and _pattern(part).match(name) is not None


def all_match(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the components of a key match those of a pattern, as `plain` gives it."""
    places = {0}  # where in the pattern the next name may be: all at once, or a repeated ** would be tried in every way
    for name in names:
        places |= {place + 1 for place in places if place < len(parts) and parts[place] == ANY_FOLDERS}
        places = {
            place + (part != ANY_FOLDERS)
            for place in places
            if place < len(parts) and _fits(name, part := parts[place])
        }
    return len(parts) in places


def _fits(name: str, part: str) -> bool:
    if part == ANY_FOLDERS:
        return not name.startswith(".")
    return matches(name, part) if is_pattern(part) else name == literal(part)


def plain(parts: Sequence[str]) -> tuple[str, ...]:
    """The same pattern without a ** that follows on another, or is the last."""
    kept = [part for before, part in zip(("", *parts), parts, strict=False) if (before, part) != (ANY_FOLDERS,) * 2]
    return (*kept, "*") if kept[-1:] == [ANY_FOLDERS] else tuple(kept)
