"""Models run on the preferred provider of ONNX Runtime on which they answer as on the processor, and keep it.

Where there is no GPU, "azure" stands for another provider: the builds of PyPI have it, and it leaves every operator to
the processor.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from service import Api, ok, running
from sklearn.linear_model import LogisticRegression

from batchserve.admission import admit
from batchserve.admission.probe_inputs import Feed
from batchserve.admission.providers import with_parity
from batchserve.allowance import Allowance, allow
from batchserve.conversion import convert
from batchserve.domain import Signature
from batchserve.errors import ModelRefused
from batchserve.inference.session import open_session
from batchserve.settings import Settings

X = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
TABLE = "x0,x1,x2\n" + "".join(f"{a},{b},{c}\n" for a, b, c in X)


@pytest.fixture(scope="module")
def model() -> bytes:
    return convert(LogisticRegression().fit(X, X[:, 0] > 0), X).onnx


def described(model: bytes, *names: str) -> Signature:
    allow(Allowance(providers=names))
    try:
        return admit(model).signature
    finally:
        allow(Allowance())


def test_a_model_runs_on_the_preferred_provider_with_its_difference_from_the_processor(model: bytes) -> None:
    signature = described(model, "azure", "cpu")
    assert signature.provider == "azure"
    assert any("Runs on azure; its numbers differ from those of the processor by at most 0.0e+00" in note
               for note in signature.notes)  # fmt: skip


def test_a_provider_that_this_build_lacks_gives_way_to_the_next_with_a_note(model: bytes) -> None:
    signature = described(model, "cuda", "cpu")
    assert signature.provider == "cpu"
    assert any(
        "Not run on cuda: this build of ONNX Runtime has no provider 'cuda'; it has" in n for n in signature.notes
    )


def test_a_model_is_refused_where_the_only_provider_is_missing(model: bytes) -> None:
    with pytest.raises(ModelRefused, match="has no provider 'cuda'; it has azure, cpu"):
        described(model, "cuda")


def added(number: float, kind: int = TensorProto.FLOAT) -> bytes:
    """A graph that adds a number to each value."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "n"], ["y"])],
        "added",
        [helper.make_tensor_value_info("x", kind, [None, 2])],
        [helper.make_tensor_value_info("y", kind, [None, 2])],
        [helper.make_tensor("n", kind, [1], [number])],
    )
    made: bytes = helper.make_model(
        graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]
    ).SerializeToString()
    return made


@pytest.mark.parametrize(
    ("kind", "number", "reason"),
    [
        (TensorProto.FLOAT, 0.01, "its output 'y' differs by 1.0e-02 from that of the processor"),
        (TensorProto.FLOAT, float("nan"), "its output 'y' differs by inf"),
        (TensorProto.INT64, 1, "its output 'y' has other values than on the processor"),
    ],
)
def test_a_provider_that_answers_otherwise_is_refused_for_the_model(kind: int, number: float, reason: str) -> None:
    """The other answers come from another graph."""
    here, there = added(0, kind), added(number, kind)
    signature = replace(admit(here).signature, provider="azure")
    values = np.zeros((3, 2), helper.tensor_dtype_to_np_dtype(kind))
    with pytest.raises(ModelRefused, match=reason):
        with_parity(signature, open_session(there), here, Feed({"x": values}))
    fine = with_parity(
        signature, open_session(added(1e-5 if kind == TensorProto.FLOAT else 0, kind)), here, Feed({"x": values})
    )
    assert "Runs on azure" in fine.notes[-1]


def test_the_names_of_providers_are_checked_at_the_start() -> None:
    assert Settings(providers="CUDA, cpu").execution_providers == ("cuda", "cpu")
    for wrong in ("", "cuda,", "cuda,cuda", "CUDAExecutionProvider:0"):
        with pytest.raises(ValueError, match="expected names such as 'cuda,cpu'"):
            Settings(providers=wrong)


def noted(job: dict[str, Any]) -> bool:
    return "scored on azure" in job["notes"]


@pytest.mark.slow
def test_a_job_says_on_which_provider_it_ran_and_a_host_without_it_does_not_score_it(
    tmp_path: Path, model: bytes
) -> None:
    with running(tmp_path, providers="azure,cpu") as api:
        assert api.register("m", model)["provider"] == "azure"
        assert noted(api.run(TABLE, "m"))
        assert noted(api.run(TABLE, "m", passthrough="all"))
    with running(tmp_path, providers="azure,cpu", direct_seconds=0, inline_bytes=0) as api:
        assert noted(api.run(TABLE, "m"))
    with running(tmp_path) as api:
        job = queued(api)
        assert job["state"] == "failed"
        assert "version 1 of m was admitted on 'azure', and BATCHSERVE_PROVIDERS of this host names cpu" in str(
            job["error"]
        )
        assert api.http.delete("/v1/models/m/versions/1").status_code == 204
        assert api.register("m", model)["provider"] == "cpu"
        assert api.run(TABLE, "m")["notes"] == []


def queued(api: Api) -> dict[str, Any]:
    answer = api.http.post("/v1/predict", content=TABLE, params={"model": "m", "reuse": False})
    job: dict[str, Any] = ok(answer, 202)
    return api.finished(str(job["id"]))
