"""Hosts that Ray's autoscaler starts because a worker asks for them: its provider for tests starts them as further
raylets of one host."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import Service
from conftest import shared
from namespaces import Namespace, NoNamespaces, inside, network
from ray_hosts import PORT, NoCluster
from waiting import until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

KINDS: dict[str, dict[str, Any]] = {
    "head": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "plain": {"resources": {"CPU": 8, "object_store_memory": 80_000_000}, "node_config": {}, "max_workers": 3},
    "scoring": {
        "resources": {"CPU": 1, "GPU": 1, "scoring": 1, "object_store_memory": 80_000_000},
        "node_config": {},
        "max_workers": 3,
    },
}
"""The kinds of hosts that there are, and how many of each may be started."""
RULES: dict[str, Any] = {
    "cluster_name": "scaled",
    "max_workers": 6,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": KINDS,
    "head_node_type": "head",
    "idle_timeout_minutes": 0.05,
    "upscaling_speed": 1.0,
    "file_mounts_sync_continuously": False,
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("initialization_commands", "setup_commands", "cluster_synced_files", "rsync_exclude")},
    **{name: [] for name in ("head_setup_commands", "worker_setup_commands", "rsync_filter")},
    **{name: [] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
}


@contextmanager
def scaling(environment: dict[str, str]) -> Iterator[Namespace]:
    """The host of a head that starts others when they are asked for. Raises NoCluster and NoNamespaces."""
    if find_spec("ray") is None:
        raise NoCluster("Ray is not installed: make test-ray")
    with (
        tempfile.TemporaryDirectory(prefix="bsray", dir="/tmp", ignore_cleanup_errors=True) as name,
        network("a") as made,
    ):
        host, rules = made.hosts["a"], Path(name, "rules.json")
        rules.write_text(json.dumps(RULES))
        command = (
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--head", f"--port={PORT}", "--num-cpus=0",
            f"--autoscaling-config={rules}", f"--temp-dir={name}", "--object-store-memory=80000000",
            "--include-dashboard=false", "--disable-usage-stats",
        )  # fmt: skip
        own = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        with Path(name, "log").open("wb") as log:
            process = subprocess.Popen(
                host.command(*command), env=os.environ | environment | own, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        try:
            until(lambda: "Ray runtime started" in Path(name, "log").read_text() or process.poll() is not None, 90.0)
            assert process.poll() is None, Path(name, "log").read_text()
            yield host
        finally:
            host.stop()
            process.wait(10)


@pytest.fixture(scope="module")
def token() -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "BATCHSERVE_PROCESSES": "1"}


@pytest.fixture(scope="module")
def head(token: dict[str, str]) -> Iterator[Namespace]:
    yield from shared(scaling(token), NoCluster, excused=(NoNamespaces,))


def raylets(host: Namespace) -> int:
    return len(host.processes("raylet/raylet"))


def test_a_worker_has_the_hosts_that_it_asks_for_until_it_ends(
    head: Namespace, token: dict[str, str], tmp_path: Path
) -> None:
    settings = token | {
        "BATCHSERVE_STORAGE": str(tmp_path),
        "BATCHSERVE_ENGINE": f"ray://{head.address}:{PORT}",
        "BATCHSERVE_RAY_RESERVED": '{"CPU": 1, "GPU": 1, "scoring": 1}',
        "BATCHSERVE_RAY_HOSTS": "2",
        "BATCHSERVE_LOG_FORMAT": "json",
    }
    until(lambda: raylets(head) == 1)  # for a moment, a process that it starts looks like itself
    with inside(head):
        worker = Service(tmp_path, "worker", settings=settings)
        try:
            until(lambda: worker.log.read_text().count('"host_join"') >= 2, 120.0)
            assert raylets(head) >= 3
            assert worker.end(signal.SIGTERM) == 0
            until(lambda: raylets(head) == 1, 120.0)
        finally:
            worker.end()
