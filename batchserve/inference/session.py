"""The only module that uses ONNX Runtime: loads admitted graphs and runs them."""

import ctypes
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np

from batchserve.allowance import allowance, out_of_memory
from batchserve.domain import Kernel
from batchserve.errors import ScoringFailed
from batchserve.inference.kernels import Arrays, Session

# Its Linux wheels send telemetry unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as states

__all__ = ["OnnxSession", "Sessions", "open_session", "trim_heap"]

_FAILURES = (
    *(states.Fail, states.InvalidArgument, states.InvalidGraph, states.InvalidProtobuf, states.NoSuchFile),
    *(states.NotImplemented, states.RuntimeException, states.EPFail, states.NoModel, states.EngineError),
    *(RuntimeError, ValueError, TypeError, IndexError),
)
_GIVEN = re.compile(r"(seq\()?tensor\((float16|float|double|u?int(8|16|32|64)|bool|string)\)\)?")
_MEMORY = re.compile(r"bad_alloc|[Ff]ailed to allocate memory|AllocateRawInternal|out of memory")
_SIZE = re.compile(r"buffer of size (\d+)")
_NOISE = (
    re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : "),
    re.compile(r"Load model from .*? failed:"),
    # "/build/core/gather.h:110 void onnxruntime::Gather::Compute(...) const " is meaningless to a user.
    re.compile(r"(?:/[\w.+-]+)+\.(?:cc|h|cpp|hpp|cu):\d+ (?:[^\n]*?\)(?: const)?(?:::<lambda\(\)>)? )?"),
    re.compile(r"(?:/[\w.+-]+){2,}"),
)


class OnnxSession:
    """A Session of ONNX Runtime."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._outputs: list[str] = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """See Session. A sequence of tensors gives one entry for each: `name_0`, `name_1` and so on."""
        if self._session is None:
            raise ScoringFailed("the session is closed")
        try:
            values = self._session.run(self._outputs, inputs)
        except MemoryError as error:
            raise out_of_memory("the model", allowance()) from error
        except _FAILURES as error:
            raise _translate(error) from error
        outputs: Arrays = {}
        for name, value in zip(self._outputs, values, strict=True):
            outputs.update(_flatten(name, value))
        return outputs

    def close(self) -> None:
        self._session = None


def open_session(
    model: bytes | Path, threads: int = 1, kernel: Kernel = "onnxruntime", provider: str = "cpu"
) -> Session:
    """Loads a model to be run with that many intra-op threads. Raises ScoringFailed and OutOfMemory.

    A host that lacks the kernel asked for takes ONNX Runtime, which runs everything. One that lacks the execution
    provider raises ScoringFailed: another one would give other last digits.
    """
    try:
        return (_open_trees(model) if kernel == "trees" else None) or _open_onnx(model, threads, provider)
    except MemoryError as error:
        raise out_of_memory("the model", allowance()) from error
    except _FAILURES as error:
        raise _translate(error) from error


def _open_trees(model: bytes | Path) -> Session | None:
    from batchserve.inference.kernels.trees import load_trees, open_trees  # with onnx, which few processes need

    ensemble = load_trees(model.read_bytes() if isinstance(model, Path) else model)
    return open_trees(ensemble) if ensemble else None


def _open_onnx(model: bytes | Path, threads: int, provider: str) -> Session:
    named = _provider_of_this_build(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # A spinning thread halves the speed of everything else on the machine.
    # The arena would keep what one record took: after a run that failed for memory, the limit would stay used up.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Admission puts all tensors into the graph: remaining references to files are dangling.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
    options.log_severity_level = 4  # failures come as exceptions; 3 would print each of them as well
    source = str(model) if isinstance(model, Path) else model
    chosen = [(named, _PROVIDER_OPTIONS.get(named, {}))]
    session = onnxruntime.InferenceSession(source, options, providers=chosen)
    if session.get_providers()[0] != named:  # ONNX Runtime falls back to the processor without an error
        raise ScoringFailed(f"ONNX Runtime cannot start {provider!r} on this host")
    for output in session.get_outputs():
        # Its bytes of other types would look like numbers.
        if not _GIVEN.fullmatch(output.type):
            raise ScoringFailed(f"output {output.name!r} is {output.type}, which is not supported")
    return OnnxSession(session)


def _provider_of_this_build(provider: str) -> str:
    """The name that ONNX Runtime has for it. Raises ScoringFailed."""
    built: list[str] = onnxruntime.get_available_providers()
    there = {name.removesuffix("ExecutionProvider").lower(): name for name in built}
    if provider not in there:
        raise ScoringFailed(
            f"this build of ONNX Runtime has no provider {provider!r}; it has {', '.join(sorted(there))}"
        )
    return there[provider]


_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
"""TF32 has 10 bits of a float32's 23: its answers differ from the processor's by a thousandth."""


class Sessions:
    """The sessions used last, at most `capacity` of them: loading a forest of 10 MB takes longer than 10,000 rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sessions: OrderedDict[tuple[str, int, Kernel, str], Session] = OrderedDict()
        self._lock = Lock()

    def get(
        self,
        digest: str,
        threads: int,
        load: Callable[[], bytes | Path],
        kernel: Kernel = "onnxruntime",
        provider: str = "cpu",
    ) -> Session:
        """The session of the artifact with this digest; `load` is called when it is not here yet."""
        key = digest, threads, kernel, provider
        with self._lock:
            if key not in self._sessions:
                # Others are evicted first, so that there are never more models in memory than the limit. A session that
                # another thread still runs lives until that run ends.
                while self._sessions and len(self._sessions) >= self.capacity:
                    self._sessions.popitem(last=False)
                self._sessions[key] = open_session(load(), threads, kernel, provider)
                trim_heap()
            self._sessions.move_to_end(key)
            return self._sessions[key]

    def keep_only(self, session: Session) -> bool:
        """Evicts all other sessions. Returns whether there were any."""
        with self._lock:
            others = [key for key, held in self._sessions.items() if held is not session]
            for key in others:
                del self._sessions[key]
            return bool(others)


def trim_heap() -> None:
    """Returns free heap memory to the system: reading a graph temporarily takes several times its size, and glibc would
    keep that memory in every process that loads the model."""
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _flatten(name: str, value: object) -> Arrays:
    if isinstance(value, np.ndarray):
        return {name: value}
    if isinstance(value, list) and all(isinstance(item, np.ndarray) for item in value):
        return {f"{name}_{index}": item for index, item in enumerate(value)}
    raise ScoringFailed(f"output {name!r} is neither a tensor nor a sequence of tensors")


def _translate(error: Exception) -> ScoringFailed:
    message = str(error)
    if _MEMORY.search(message):
        size = _SIZE.search(message)
        return out_of_memory("the model", allowance(), int(size[1]) if size else None)
    for noise in _NOISE:
        message = noise.sub("", message)
    return ScoringFailed(" ".join(message.split())[:1000])
