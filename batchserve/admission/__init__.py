"""Decides which models are admitted, makes them load and run well, and infers their signature."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import ModelProto

from batchserve.admission.bundle import MAX_MODEL_BYTES, is_bundle, unpack
from batchserve.admission.graph import check_graph, lower_ir_version, mend_locales, parse, strip_zipmaps
from batchserve.admission.memory import known_need
from batchserve.admission.probe import Tell, describe
from batchserve.allowance import allowance, out_of_memory
from batchserve.domain import AdmissionStep, Signature
from batchserve.errors import BatchserveError, ModelRefused, OutOfMemory, ScoringFailed

__all__ = ["Admitted", "admit"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A model to store and run, whose bytes may differ from the upload."""

    model: bytes
    signature: Signature
    metadata: dict[str, str]
    """The raw `batchserve.*` entries of the graph, and `producer`."""


def _tell_nobody(step: AdmissionStep) -> None:
    """The default."""


def admit(data: bytes, *, tuned: bool = True, tell: Tell = _tell_nobody) -> Admitted:
    """Admits an ONNX model, or a zip archive of one with its external tensors and a `batchserve.json`.

    Raises ModelRefused with the reason. The graph is run, and may be hostile: call this in a process whose time and
    memory are limited. Nothing is unbounded before the first session. `tuned`: whether its speed is measured.
    `tell` is called as each step begins.
    """
    try:
        return _admit(data, tuned, tell)
    except (MemoryError, OutOfMemory) as error:
        known = error if isinstance(error, OutOfMemory) else out_of_memory("the model", allowance())
        raise ModelRefused(known.detail) from error
    except ScoringFailed as error:
        raise ModelRefused(f"ONNX Runtime refuses the model: {error.detail}") from error
    except BatchserveError:
        raise
    except Exception as error:
        # Whatever a graph of strangers leads numpy, onnx or this code into, it is the graph that is refused.
        raise ModelRefused(f"the model cannot be examined: {type(error).__name__}: {str(error)[:200]}") from error


def _admit(data: bytes, tuned: bool, tell: Tell) -> Admitted:
    tell(AdmissionStep.CHECK)
    if len(data) > MAX_MODEL_BYTES:
        raise ModelRefused(f"the model has {len(data):,} bytes; at most {MAX_MODEL_BYTES:,} are accepted")
    model = unpack(data) if is_bundle(data) else parse(data)
    check_graph(model)
    labels = strip_zipmaps(model)
    notes = [*lower_ir_version(model), *mend_locales(model)]
    try:
        content, signature = _describe(model, labels, notes, tuned, tell)
    except OutOfMemory as error:
        raise ModelRefused(f"{error.detail}, with as few records as it takes in a run.{known_need(model)}") from error
    return Admitted(content, signature, _metadata(model))


def _describe(
    model: ModelProto, labels: Mapping[str, tuple[str, ...]], notes: list[str], tuned: bool, tell: Tell
) -> tuple[bytes, Signature]:
    """See `describe`, on the first provider of this process on which the model answers as on the processor. Notes say
    why it does not on others. Raises what the last one raises."""
    tell(AdmissionStep.RUN)
    *preferred, last = allowance().providers
    for provider in preferred:
        copied = ModelProto()
        copied.CopyFrom(model)
        try:
            return describe(copied, labels, list(notes), tell, tuned=tuned, provider=provider)
        except BatchserveError as error:
            notes.append(f"Not run on {provider}: {error.detail}")
    return describe(model, labels, notes, tell, tuned=tuned, provider=last)


def _metadata(model: ModelProto) -> dict[str, str]:
    metadata = {
        entry.key: entry.value
        for entry in model.metadata_props
        # The signature has the domains, and categories may be many.
        if entry.key.startswith("batchserve.") and entry.key != "batchserve.domains"
    }
    producer = f"{model.producer_name} {model.producer_version}".strip()
    return metadata | ({"producer": producer} if producer else {})
