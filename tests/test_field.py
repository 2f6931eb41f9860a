"""Estimators of the whole field, as people train them: each converts and scores as the original, or is refused.

docs/models.md has the outcome of each; `python -m field --write` in tests/ makes that table.
"""

import pytest
from field.refused import REFUSED
from field.scored import outcome
from field.table import GROUPS, REFUSED_BEGIN, REFUSED_END, documented, refused_row, row
from selection import quick_of

QUICK = {
    "LogisticRegression",
    "Birch",
    "FastICA",
    "lightgbm.Booster, pandas categories",
    "LGBMClassifier, rf",
    "MissingIndicator beside an imputer",
    "XGBClassifier, enable_categorical",
    "XGBRegressor, dart, in a pipeline",
    "XGBRegressor, several targets",
    "CatBoostClassifier",
    "ColumnTransformer behind set_output",
    "Pipeline with passthrough",
    "DictVectorizer",
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", quick_of(REFUSED, REFUSED.keys() - {"LatentDirichletAllocation"}))
def test_a_refusal_names_the_cause_and_the_way_out_as_documented(name: str) -> None:
    assert refused_row(name) in documented(REFUSED_BEGIN, REFUSED_END)
