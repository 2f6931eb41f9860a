"""The sessions of a process: models that are loaded once for many chunks."""

from batchserve.allowance import allowance
from batchserve.domain import ModelVersion
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Session
from batchserve.inference.session import Sessions
from batchserve.scoring.artifacts import read_artifact
from batchserve.scoring.inputs import storage_at

_sessions = Sessions(capacity=1)
"""The models that this process keeps loaded, up to its limit."""


def session_for(storage: str, model: ModelVersion) -> Session:
    """The model of a version, loaded from this storage unless it is kept, with the threads that it may have here.

    Raises ScoringFailed where the settings of this host do not name the provider that its admission chose.
    """

    def load() -> bytes:
        return read_artifact(storage_at(storage), model.digest)

    allowed = allowance()
    signature = model.signature
    if signature.provider not in allowed.providers:
        raise ScoringFailed(
            f"version {model.version} of {model.name} was admitted on {signature.provider!r}, and BATCHSERVE_PROVIDERS "
            f"of this host names {','.join(allowed.providers)}: add it there, or delete the version and register the "
            "model again"
        )
    _sessions.capacity = allowed.sessions
    threads = min(signature.threads, allowed.threads or signature.threads)
    return _sessions.get(model.digest, threads, load, signature.kernel, signature.provider)


def keep_only(session: Session) -> bool:
    """Unloads all other models. Whether there were any."""
    return _sessions.keep_only(session)
