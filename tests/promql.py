"""What a query of Prometheus names: its series with their matchers, and the labels by which it groups."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Query", "Selector"]

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[a-zA-Z_:][\w:]*|\d[\w.]*|=~|!~|!=|==|>=|<=|\S')
_AGGREGATIONS = {"sum", "min", "max", "avg", "count", "topk", "bottomk", "quantile", "stddev", "group"}
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_WORDS = {"and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Selector:
    """A series that is selected."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]
    """Label, operator and value."""


@dataclass
class Query:
    text: str
    selectors: list[Selector] = field(default_factory=list)
    grouped: set[str] = field(default_factory=set)
    """Labels of a grouping."""

    def __post_init__(self) -> None:
        tokens = iter([*_TOKEN.findall(self.text), ""])
        token = next(tokens)
        while token:
            following = next(tokens, "")
            if token in _GROUPING:
                self.grouped |= {word for word in _until(tokens, ")") if word != ","}
                following = next(tokens, "")
            elif re.match(r"[a-zA-Z_:]", token) and token not in _AGGREGATIONS | _WORDS and following != "(":
                matchers: tuple[tuple[str, str, str], ...] = ()
                if following == "{":
                    matchers = tuple(_matchers(list(_until(tokens, "}"))))
                    following = next(tokens, "")
                self.selectors.append(Selector(token, matchers))
            token = following


def _until(tokens: Iterator[str], end: str) -> Iterator[str]:
    for token in tokens:
        if token == end:
            return
        yield token


def _matchers(words: list[str]) -> Iterator[tuple[str, str, str]]:
    parts = [word for word in words if word != ","]
    for label, operator, value in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        yield label, operator, value[1:-1].replace("\\\\", "\\")
