"""The disk's share of small jobs: the syncs of a job, and jobs on a disk whose syncs take longer."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import data, environments, load, lone_sync, processes, service
from benchmarks.environments import Unavailable
from benchmarks.load import CLIENTS, MODEL, ROUNDS
from benchmarks.paths import Bench
from benchmarks.results import Gap, Measurement, Runs

TITLE = "syncs of small jobs"
JOB = "upload, predict, download"
ALONE = f"small job, 1 row, {JOB}: syncs of a job / 2.1"
MANY = f"small jobs, {CLIENTS} clients, 1 row, {JOB}: syncs of a job / 0.6"
COUNTED = {ALONE: (1, 2.1), MANY: (CLIENTS, 0.6)}
"""The clients of each load, and the goal: syncs of one job."""
SLOW = f"small jobs, {CLIENTS} clients, 1 row, {JOB}, 2 ms more for each sync: jobs per second"
SLOW_GOAL = 600
ADDED = 0.002
"""Seconds that every sync takes longer there."""
SETTLED = 0.3
"""Seconds after a load until its last syncs are written to the trace."""
TRACER = ("strace", "-D", "-f", "-qqq", "--seccomp-bpf", "--signal=none", "--trace=fsync,fdatasync")
"""The traced server stays a child of this process, and runs at full speed except for its syncs."""
CALL = re.compile(rb"\b(?:fsync|fdatasync)\(")
SLOWER = Path(__file__).with_name("slow_sync.c")


def measure(bench: Bench, *, seconds: float) -> Iterator[Measurement | Gap]:
    """`seconds`: of each load."""
    content = data.table(bench.folder, "numbers", ".csv", 1).read_bytes()
    model = data.model(bench.folder, MODEL)
    with TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        bench.say("syncs of a small job")
        try:
            tracer = traced(folder / "trace")
        except Unavailable as error:
            yield from (Gap(name, str(error)) for name in COUNTED)
        else:
            yield from _counted(folder, tracer, model, content, seconds)
        bench.say("small jobs, 2 ms more for each sync")
        try:
            library = compiled(folder)
            lone_sync_with(library, folder)
        except Unavailable as error:
            yield Gap(f"{SLOW} / {SLOW_GOAL}", str(error))
        else:
            yield from _slow(folder, library, model, content, seconds)


def traced(trace: Path) -> tuple[str, ...]:
    """The beginning of a command whose syncs are to be written to `trace`. Raises Unavailable when none would be."""
    if not shutil.which(TRACER[0]):
        raise Unavailable("strace is not installed")
    tracer = (*TRACER, f"--output={trace}")
    probe = f"import os; os.fsync(os.open({str(trace.with_suffix('.probe'))!r}, os.O_CREAT | os.O_RDWR))"
    done = subprocess.run([*tracer, sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    time.sleep(SETTLED)
    if done.returncode or count(trace) != 1:
        raise Unavailable(f"strace counts no syncs here: {environments.last_line(done.stderr)}")
    return tracer


def count(trace: Path) -> int:
    """The syncs in a trace. One that another thread interrupted has two lines, of which the first counts."""
    return len(CALL.findall(trace.read_bytes())) if trace.exists() else 0


def compiled(folder: Path) -> Path:
    """The library that makes syncs slower by ADDED, in `folder`. Raises Unavailable without a C compiler."""
    library = folder / "slow_sync.so"
    added = f"-DMICROSECONDS={ADDED * 1e6:.0f}"
    environments.run(["cc", "-shared", "-fPIC", "-O2", added, str(SLOWER), "-o", str(library), "-ldl"], folder)
    return library


def lone_sync_with(library: Path, folder: Path) -> float:
    """The seconds of a lone sync with the library. Raises Unavailable when the library has no effect."""
    command = [sys.executable, lone_sync.__file__, str(folder)]
    own = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    if done.returncode or float(done.stdout) < ADDED:
        raise Unavailable(f"LD_PRELOAD has no effect here: {environments.last_line(done.stderr) or done.stdout}")
    return float(done.stdout)


def _counted(
    folder: Path, tracer: Sequence[str], model: data.Model, content: bytes, seconds: float
) -> Iterator[Measurement]:
    home, trace = folder / "traced", folder / "trace"
    home.mkdir()
    with processes.batchserve(home, tracer) as server:
        service.register(server.url, MODEL, model.graph)
        load.jobs(server.url, content, load.three_calls, seconds=seconds / ROUNDS, clients=CLIENTS)
        for name, (clients, goal) in COUNTED.items():
            syncs = Runs()
            for _ in range(ROUNDS):
                time.sleep(SETTLED)
                before = count(trace)
                done = load.jobs(server.url, content, load.three_calls, seconds=seconds / ROUNDS, clients=clients)
                time.sleep(SETTLED)
                syncs.add((count(trace) - before) / len(done))
            yield Measurement.of(name, syncs, goal, "syncs")


def _slow(folder: Path, library: Path, model: data.Model, content: bytes, seconds: float) -> Iterator[Measurement]:
    home, rates, alone = folder / "slow", Runs(), Runs()
    home.mkdir()
    with processes.batchserve(home, LD_PRELOAD=str(library)) as server:
        service.register(server.url, MODEL, model.graph)
        load.jobs(server.url, content, load.three_calls, seconds=seconds / ROUNDS, clients=CLIENTS)
        for _ in range(ROUNDS):
            done = load.jobs(server.url, content, load.three_calls, seconds=seconds / ROUNDS, clients=CLIENTS)
            rates.add(load.per_second(done))
            alone.add(1 / lone_sync_with(library, folder))
    yield Measurement.of(f"{SLOW} / {SLOW_GOAL}", rates, SLOW_GOAL, "jobs/s")
    yield Measurement.of(f"{SLOW} / lone syncs per second", rates, alone, "1/s")
