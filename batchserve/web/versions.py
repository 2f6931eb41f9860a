"""What pages say about a version of a model beyond its body: its parity report, and what it changes."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, Field, ValidationError

from batchserve.api.schemas.models import model_body
from batchserve.domain import Domain, ModelVersion

__all__ = ["Parity", "differences", "domain_text", "parity_of"]

_NAMED = 10
"""Most names in a sentence."""


class _Difference(BaseModel):
    output: str
    method: str
    max_relative: float | None = None
    """None: not finite."""
    mean_relative: float | None = None


class Parity(BaseModel):
    """The report of a conversion that is in the metadata of its graph, where anything may be."""

    rows: int
    label_flips: int
    tolerance: float
    passed: bool
    values_tried: int = 0
    differences: list[_Difference] = Field(default_factory=list, max_length=1000)
    notes: list[str] = Field(default_factory=list, max_length=1000)


def parity_of(model: ModelVersion) -> Parity | None:
    """None where the graph has no report."""
    try:
        return Parity.model_validate_json(model.metadata.get("batchserve.parity", ""))
    except ValidationError:
        return None


def domain_text(domain: Domain) -> str:
    """The values that a column takes, where that is known."""
    if domain.categories is not None:
        known = domain.categories
        some = ", ".join(str(value) for value in known.some[:_NAMED])
        return f"{some}, and {known.count - len(known.some[:_NAMED]):,} more" if known.count > _NAMED else some
    words = ["whole numbers"] if domain.whole else []
    words += [f"at least {domain.low:g}"] if domain.low is not None else []
    words += [f"at most {domain.high:g}"] if domain.high is not None else []
    return ", ".join(words)


def differences(now: ModelVersion, before: ModelVersion) -> list[str]:
    """What a version changes against the one before it, in sentences; [] where users see no change."""
    new, old = model_body(now), model_body(before)
    said = [f"is {new.task}, was {old.task}"] if new.task != old.task else []
    said += _changed("takes", {c.name: c.dtype for c in old.columns}, {c.name: c.dtype for c in new.columns})
    arrays = [
        {one.name: f"{one.dtype} {one.shape}" for one in body.inputs if one.columns is None} for body in (old, new)
    ]
    said += _changed("takes", *arrays)
    said += _changed("gives", old.result_columns, new.result_columns)
    return said + _changed("knows", dict.fromkeys(old.labels, ""), dict.fromkeys(new.labels, ""))


def _changed(verb: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    added = [_named(name, kind) for name, kind in new.items() if name not in old]
    removed = [_named(name, kind) for name, kind in old.items() if name not in new]
    said = [f"{verb} also {_listed(added)}"] if added else []
    said += [f"no longer {verb} {_listed(removed)}"] if removed else []
    retyped = [f"{name} as {new[name]} instead of {old[name]}" for name in new if old.get(name, new[name]) != new[name]]
    return said + ([f"{verb} {_listed(retyped)}"] if retyped else [])


def _named(name: str, kind: str) -> str:
    return f"{name} ({kind})" if kind else name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"
