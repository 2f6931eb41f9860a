"""Every system call by which a step writes to the disk is once the last one of its process, and once fails."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import postgres
import pytest

from faults import steps
from faults.processes import Ended, Fault, Step, disk_calls, take, take_traced, why_not_traced

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

KILL, IO_ERROR, FULL = "signal=KILL", "error=EIO", "error=ENOSPC"


@dataclass
class Scene:
    """A storage before a step, and its state after the step without faults."""

    step: str
    storage: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Those of the undisturbed end."""
    contents: set[str] = field(default_factory=set)
    """Digests of all objects before and after."""
    before: dict[str, dict[str, Any]] = field(default_factory=dict)

    def faults(self, effect: str) -> list[Fault]:
        calls = [(call, number) for call, number in self.calls if effect != FULL or call not in ("unlink", "rmdir")]
        return [Fault(call, number, effect) for call, number in calls]

    def take(self, fault: Fault | None) -> tuple[Ended, Ended]:
        """Runs the step on a copy of the storage; returns what it reported, and what a restart finds."""
        name = f"{fault.call}-{fault.number}" if fault else "undisturbed"
        copy = self.storage.with_name(f"{self.storage.name}-{name}")
        postgres.copy_installation(self.storage, copy)
        try:
            return take_traced(self.step, copy, fault, **self.arguments), take("recover", copy)
        finally:
            postgres.remove_installation(copy)


SCENES = ("upload", "chunks", "publish", "small", "delete")
SCENES_IN_ROWS = ("upload-in-row", "small-in-row", "direct", "together")
"""Their only calls are those of an embedded database."""
IN_ROWS = {"settings": {"inline_bytes": 2**16}}


@pytest.fixture(
    scope="module", params=[*SCENES, *(pytest.param(name, marks=pytest.mark.sqlite) for name in SCENES_IN_ROWS)]
)
def scene(request: pytest.FixtureRequest, fast_folder: Path, iris_onnx: Path) -> Iterator[Scene]:
    if (reason := why_not_traced()) is not None:
        pytest.skip(reason)
    storage = fast_folder / request.param
    made = _scene(request.param, storage, str(iris_onnx))
    known = take("recover", _copied(storage, "before"))
    ended, undisturbed = made.take(None)
    assert ended.is_done, ended
    made.calls = disk_calls(ended.trace, storage.parent)
    made.jobs, made.before = undisturbed.the("jobs")["jobs"], known.the("jobs")["jobs"]
    made.contents = {*known.the("visible")["objects"].values(), *undisturbed.the("visible")["objects"].values()}
    yield made
    shutil.rmtree(storage)


def _scene(name: str, storage: Path, model: str) -> Scene:
    match name:
        case "upload":
            take("prepare", storage, model=model)
            return Scene("upload", storage)
        case "chunks":
            take("prepare", storage, model=model, content=steps.FLAWED)
        case "upload-in-row":
            take("prepare", storage, model=model)
            return Scene("upload", storage, IN_ROWS)
        case "direct":
            take("prepare", storage, model=model)
            return Scene("score", storage, IN_ROWS)
        case "together":
            take("prepare", storage, model=model)
            return Scene("submit_together", storage, IN_ROWS)
        case "small-in-row":
            take("prepare", storage, model=model, content=steps.SHORT, **IN_ROWS)
            return Scene("run", storage, IN_ROWS)
        case "small":
            take("prepare", storage, model=model, content=steps.SHORT)
        case "publish":
            take("prepare", storage, model=model, content=steps.LONG)
            assert not Step("run", storage, dies_before="assemble_result").begin().end().is_done
            take("rescue", storage)
        case "delete":
            job = take("prepare", storage, model=model, content=steps.FLAWED, is_run=True).the("queued")
            return Scene("delete", storage, {"job_id": job["id"]})
    return Scene("run", storage)


def _copied(storage: Path, name: str) -> Path:
    copy = storage.with_name(f"{storage.name}-{name}")
    postgres.copy_installation(storage, copy)
    return copy


def _everywhere(scene: Scene, effect: str, tried: Counter[str], name: str) -> list[tuple[Fault, Ended, Ended]]:
    """Runs the step once for each of its calls, with a fault at that call."""
    faults = scene.faults(effect)
    if not faults:
        pytest.skip("this step writes nothing itself: its database is on a server")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = [(fault, *both) for fault, both in zip(faults, pool.map(scene.take, faults), strict=True)]
    met = [entry for entry in ended if entry[1].met_its_fault]
    # The number of writes to SQLite's log differs by one or two from run to run; by more where it depends on time which
    # of several calls share a transaction.
    least = 0.5 if scene.step == "submit_together" else 0.9
    assert len(met) >= least * len(faults) > (5 if postgres.chosen is None else 3), (
        f"{len(met)} of {len(faults)} faults"
    )
    tried[f"{name} ({scene.storage.name})"] += len(met)
    return met


def test_a_kill_at_any_call_loses_nothing_that_was_acknowledged(scene: Scene, tried: Counter[str]) -> None:
    for fault, ended, recovered in _everywhere(scene, KILL, tried, "kills"):
        _require_nothing_lost(scene, ended, recovered, str(fault))


@pytest.mark.parametrize("effect", [IO_ERROR, FULL], ids=["EIO", "ENOSPC"])
def test_a_call_that_fails_is_reported_and_the_next_try_succeeds(
    scene: Scene, effect: str, tried: Counter[str]
) -> None:
    for fault, ended, recovered in _everywhere(scene, effect, tried, f"{effect}s"):
        assert ended.is_done, f"{fault}: {ended}"
        for refused in ended.all("refused"):
            assert refused["type"] == "application/problem+json", fault
            assert refused["status"] in ((500, 503) if effect == IO_ERROR else (503, 507)), f"{fault}: {refused}"
        assert not ended.all("failed"), f"{fault}: a job waits for the storage"
        _require_no_sync_again(ended.trace, str(fault))
        _require_nothing_lost(scene, ended, recovered, str(fault))


def _require_nothing_lost(scene: Scene, ended: Ended, recovered: Ended, fault: str) -> None:
    integrity = recovered.the("integrity")
    assert (integrity["says"], integrity["foreign_keys"]) == (["ok"], 0), fault
    half = {key for key, sha256 in recovered.the("visible")["objects"].items() if sha256 not in scene.contents}
    assert not half, f"{fault}: {half} hold bytes that were never written"

    found, after = recovered.the("found")["jobs"], recovered.the("jobs")["jobs"]
    for job_id, job in found.items():
        assert (job["result"] is not None) == (job["state"] == "completed"), f"{fault}: {job_id} {job}"
    deleted = {event["id"] for event in ended.all("deleted")}
    deleting = {scene.arguments["job_id"]} if scene.step == "delete" else set()
    kept = scene.before.keys() - deleting | {event["id"] for event in ended.all("uploaded")}
    assert kept <= found.keys() == after.keys(), fault
    assert not deleted & found.keys(), fault

    finished = [job for job in scene.jobs.values() if job["state"] == "completed"]
    for job_id, job in after.items():
        if job_id in scene.before:  # the same end, to the byte
            assert job == scene.jobs.get(job_id, scene.before[job_id]), f"{fault}: {job_id}"
        else:
            sha256 = {event["sha256"] for event in ended.all("uploaded") if event["id"] == job_id}
            assert sha256 <= {job["input"]}, fault
            assert job in finished or (job["state"], job["result"]) == ("uploaded", None), f"{fault}: {job_id} {job}"
    queued = {event["id"] for event in ended.all("queued")}
    assert all(after[job_id]["state"] == "completed" for job_id in queued), fault
    _require_no_orphans(recovered, after, fault)


def _require_no_orphans(recovered: Ended, after: dict[str, dict[str, Any]], fault: str) -> None:
    """Checks that each object left after the sweep belongs to a job, or is the model."""
    for name in recovered.the("files")["names"]:
        kind, _, rest = name.partition("/")
        owner = re.match(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", rest)
        assert ".partial-" not in name, f"{fault}: {name}"
        assert not rest or kind == "models" or (owner is not None and owner[0] in after), f"{fault}: {name}"


def _require_no_sync_again(trace: list[str], fault: str) -> None:
    """No object is synced again after a failed sync. SQLite's log may be, as it is rewritten from that point on."""
    failed: set[str] = set()
    for line in trace:
        if (synced := re.search(r"f(?:data)?sync\(\d+<(.*/\.partial-\w+)>", line)) is not None:
            assert synced[1] not in failed, f"{fault}: {line}"
            if "(INJECTED)" in line:
                failed.add(synced[1])
