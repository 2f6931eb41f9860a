"""The table of estimators in docs/models.md: its groups, its rows."""

from pathlib import Path

from field.cases import (
    CLASSIFIERS,
    CLUSTERERS_AND_OUTLIERS,
    DECOMPOSITIONS_AND_SELECTORS,
    META,
    PREPROCESSING,
    REGRESSORS,
    WORDS,
    Cases,
)

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- estimators: begin -->", "<!-- estimators: end -->"

GROUPS: dict[str, Cases] = {
    "classifier": CLASSIFIERS,
    "of several estimators": META,
    "regressor": REGRESSORS,
    "clusters, outliers": CLUSTERERS_AND_OUTLIERS,
    "decomposition, selection": DECOMPOSITIONS_AND_SELECTORS,
    "preprocessing": PREPROCESSING,
    "text": WORDS,
}


def row(name: str, outcome: str) -> str:
    return f"| {name} | {outcome.replace('|', '/')} |"


def documented() -> set[str]:
    """The rows of the table as the page has them."""
    text = DOCS.read_text(encoding="utf-8")
    return set(text.partition(BEGIN)[2].partition(END)[0].splitlines())
