"""An uploaded artifact is admitted in a limited process."""

from contextlib import suppress
from pathlib import Path

from batchserve.domain import AdmissionStep, Signature
from batchserve.inference.session import trim_heap
from batchserve.scoring.inputs import storage_at


def admit_model(storage: str, key: str, steps: Path | None = None) -> tuple[Signature, dict[str, str], str]:
    """Admits an uploaded artifact and stores the repaired graph under `key` + `.onnx`; returns its signature, metadata
    and digest. `steps`: a file of this host that has the step that is under way."""
    from batchserve.admission import admit  # imports onnx, which no other call needs

    def tell(step: AdmissionStep) -> None:
        if steps is not None:
            with suppress(OSError):  # of no importance for the model
                begun = steps.with_suffix(".begun")
                begun.write_text(step)
                begun.replace(steps)  # a reader sees a whole step

    store = storage_at(storage)
    with store.open(key) as source:
        admitted = admit(source.read(), tell=tell)
    tell(AdmissionStep.STORE)
    mended = f"{key}.onnx"
    with store.create(mended) as writer:
        writer.write(admitted.model)
        writer.commit()
    answer = admitted.signature, admitted.metadata, mended
    del admitted
    trim_heap()
    return answer
