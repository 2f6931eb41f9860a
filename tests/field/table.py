"""The table of estimators in docs/models.md: its groups, its rows."""

from pathlib import Path

from field.cases import (
    BOOSTED,
    CLASSIFIERS,
    CLUSTERERS_AND_OUTLIERS,
    DECOMPOSITIONS_AND_SELECTORS,
    META,
    OTHERS,
    PREPROCESSING,
    REGRESSORS,
    WORDS,
    Cases,
)
from field.refused import refusal

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- estimators: begin -->", "<!-- estimators: end -->"
REFUSED_BEGIN, REFUSED_END = "<!-- refusals: begin -->", "<!-- refusals: end -->"

GROUPS: dict[str, Cases] = {
    "classifier": CLASSIFIERS,
    "of several estimators": META,
    "regressor": REGRESSORS,
    "boosted trees": BOOSTED,
    "CatBoost, statsmodels": OTHERS,
    "clusters, outliers": CLUSTERERS_AND_OUTLIERS,
    "decomposition, selection": DECOMPOSITIONS_AND_SELECTORS,
    "preprocessing": PREPROCESSING,
    "text": WORDS,
}


def row(name: str, outcome: str) -> str:
    return f"| {name} | {outcome.replace('|', '/')} |"


def refused_row(name: str) -> str:
    return f"| {name} | {refusal(name).replace('|', '/')} |"


def documented(begin: str = BEGIN, end: str = END) -> set[str]:
    """The rows of a table as the page has them."""
    text = DOCS.read_text(encoding="utf-8")
    return set(text.partition(begin)[2].partition(end)[0].splitlines())
