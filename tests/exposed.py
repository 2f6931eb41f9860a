"""The series of /metrics, as a test compares them."""

from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from batchserve.metrics import FAMILIES

__all__ = ["SERIES", "samples_of", "values_in", "values_of"]

_SUFFIXES = {"histogram": ("_bucket", "_sum", "_count")}
SERIES = {family.name + suffix: family for family in FAMILIES for suffix in _SUFFIXES.get(family.kind, ("",))}
"""The family of each series by its name."""


def samples_of(text: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def values_in(text: str) -> dict[str, float]:
    """Each by its name and the values of its labels: `batchserve_jobs{completed}`."""
    return _values(samples_of(text))


def values_of(metrics: Iterable[Metric]) -> dict[str, float]:
    """The same of what a process has counted."""
    return _values(sample for metric in metrics for sample in metric.samples)


def _values(samples: Iterable[Sample]) -> dict[str, float]:
    return {sample.name + _labels_of(sample): sample.value for sample in samples}


def _labels_of(sample: Sample) -> str:
    """The values, in the order of the family; the bound of a bucket is the last."""
    family = SERIES.get(sample.name)
    names = sample.labels if family is None else (*family.labels, "le")
    values = [sample.labels[name] for name in names if name in sample.labels]
    return f"{{{','.join(values)}}}" if values else ""
