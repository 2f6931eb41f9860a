"""An uploaded artifact is admitted in a limited process."""

from batchserve.domain import Signature
from batchserve.inference.session import trim_heap
from batchserve.scoring.inputs import storage_at


def admit_model(storage: str, key: str) -> tuple[Signature, dict[str, str], str]:
    """Admits an uploaded artifact and stores the repaired graph under `key` + `.onnx`; returns its signature, metadata
    and digest."""
    from batchserve.admission import admit  # imports onnx, which no other call needs

    store = storage_at(storage)
    with store.open(key) as source:
        admitted = admit(source.read())
    mended = f"{key}.onnx"
    with store.create(mended) as writer:
        writer.write(admitted.model)
        writer.commit()
    answer = admitted.signature, admitted.metadata, mended
    del admitted
    trim_heap()
    return answer
