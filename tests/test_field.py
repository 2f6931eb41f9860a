"""Estimators of the whole field, as people train them: each converts and scores as the original, or is refused.

docs/models.md has the outcome of each; `python -m field --write` in tests/ makes that table.
"""

import pytest
from field.scored import outcome
from field.table import GROUPS, documented, row

QUICK = {
    "LogisticRegression",
    "LinearDiscriminantAnalysis, two classes",
    "TunedThresholdClassifierCV",
    "RegressorChain",
    "TransformedTargetRegressor, log1p",
    "Birch",
    "FastICA",
    "SplineTransformer",
    "FunctionTransformer, its own function",
}
"""The others run with the slow tests."""

ALL = [
    pytest.param(group, name, marks=[] if name in QUICK else [pytest.mark.slow])
    for group, cases in GROUPS.items()
    for name in cases
]


@pytest.mark.parametrize(("group", "name"), ALL)
def test_an_estimator_scores_as_it_did_or_is_refused_as_documented(group: str, name: str) -> None:
    assert row(name, outcome(GROUPS[group][name])) in documented()


def test_every_estimator_that_is_tried_is_in_the_documented_table_and_most_convert() -> None:
    rows = [line for line in documented() if line.startswith("| ")]
    names = {line.split(" | ")[0].removeprefix("| ") for line in rows}
    assert {name for cases in GROUPS.values() for name in cases} <= names
    assert sum(line.endswith("| equal |") for line in rows) / len(rows) > 0.9
