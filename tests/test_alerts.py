"""The dashboard and the alerts ask for series that there are, and each alert fires when it should."""

import json
import re
from pathlib import Path

import pytest
import yaml
from exposed import SERIES, samples_of
from promql import Query
from promtool import Promtool
from service import Api

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OF_TARGETS = {"instance", "job"}
"""Labels that Prometheus adds."""
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
BOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "batchserve.json").read_text())
QUERIES = {
    **{rule["alert"]: rule["expr"] for rule in ALERTS},
    **{f"{panel['title']} {t['refId']}": t["expr"] for panel in BOARD["panels"] for t in panel["targets"]},
}


@pytest.mark.parametrize("text", QUERIES.values(), ids=QUERIES)
def test_a_query_names_series_and_labels_that_there_are(text: str, api: Api) -> None:
    samples = samples_of(api.http.get("/metrics").text)
    query = Query(text)
    assert query.selectors
    labels = OF_TARGETS | {"le"}
    for selector in query.selectors:
        its_labels = OF_TARGETS
        if selector.name in SERIES:
            its_labels = OF_TARGETS | {*SERIES[selector.name].labels, "le"}
        else:
            assert selector.name == "up" or selector.name in {sample.name for sample in samples}, selector.name
        assert {label for label, *_ in selector.matchers} <= its_labels, selector
        labels |= its_labels
        shown = [sample for sample in samples if sample.name == selector.name]
        for label, operator, value in selector.matchers:
            if label in ("state", "outcome", "stage", "pool", "cause") and operator in ("=", "=~"):
                values = {sample.labels[label] for sample in shown}
                assert all(part in values for part in value.split("|")), (selector, values)
    assert query.grouped <= labels


def test_each_query_for_the_service_takes_the_maximum_and_none_for_a_process_does() -> None:
    """What every process shows is not added up, and what each counts is not lost."""
    for name, text in QUERIES.items():
        for selector in Query(text).selectors:
            family = SERIES.get(selector.name)
            if family is None or family.kind in ("gauge", "info"):
                continue
            inner = text[: text.index(selector.name)]
            taken = re.findall(r"(sum|max|min|count|topk)\b[^()]*(?:\([^()]*\)\s*)?\(", inner)
            assert taken[-1] == ("max" if family.of == "service" else "sum"), name


def test_promtool_reads_every_query(promtool: Promtool, tmp_path: Path) -> None:
    promtool.run("check", "rules", DEPLOY / "prometheus" / "alerts.yml")
    rules = [{"record": f"query_{number}", "expr": text} for number, text in enumerate(QUERIES.values())]
    recorded = tmp_path / "queries.yml"
    recorded.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    promtool.run("check", "rules", recorded)


def test_promtool_reads_the_configuration(promtool: Promtool) -> None:
    promtool.run("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_each_alert_fires_when_it_should_and_is_silent_when_it_should_not(promtool: Promtool) -> None:
    rules = yaml.safe_load((ROOT / "tests" / "alerts.yml").read_text())
    assert [test["name"] for test in rules["tests"]] == [rule["alert"] for rule in ALERTS]
    for test in rules["tests"]:
        expected = [entry["exp_samples"] for entry in test["promql_expr_test"]]
        assert [] in expected
        assert [{"labels": f'{{alertname="{test["name"]}"}}', "value": 1}] in expected
    promtool.run("test", "rules", ROOT / "tests" / "alerts.yml")


def test_each_alert_has_a_severity_a_summary_and_what_to_do() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("## Alerts")[2]
    listed = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", page, re.MULTILINE)
    assert listed == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["runbook"] == "docs/metrics.md#alerts"
