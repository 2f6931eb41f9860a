"""From a file to a file: the service compared with the limit and with alternatives."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl

from benchmarks import data, environments, nginx, processes, service
from benchmarks import peers as peer_scripts
from benchmarks.environments import Unavailable
from benchmarks.http import fetch, send
from benchmarks.peers.stopwatch import cpu_seconds
from benchmarks.results import MB, Gap, Measurement, Runs

LIMIT = Path(__file__).with_name("limit.py")
SCRIPTS = Path(peer_scripts.__file__).parent
MILLION = 1_000_000
SIZES = {
    10_000: "10 thousand rows",
    100_000: "100 thousand rows",
    MILLION: "1 million rows",
    3 * MILLION: "3 million rows",
    10 * MILLION: "10 million rows",
}
PLATEAU = 3 * MILLION
"""Rows from which memory should no longer grow: every scoring process has scored chunks enough to reach its peak.

At this size, which only shows growth, the peers are left out.
"""
PEER_TIMEOUT = 170.0
LIMIT_TIMEOUT = 300.0
FEW = 10_000
"""Below this number of rows, which only trials of the harness use, the peers are left out."""
WARMING = 100_000
"""Rows of the jobs before the measured ones: so many that every scoring process gets a chunk and loads the model."""
MEMORY_GOAL = 900 * MB
PROCESS_GOAL = 600 * MB


@dataclass(frozen=True, slots=True)
class TablePath:
    title: str
    model: str
    kind: str
    source: str
    target: str

    @property
    def format(self) -> str:
        """The format of the result, as named by the service."""
        return self.target.removeprefix(".")


PATHS = (
    TablePath("CSV -> LR -> CSV", "logistic", "numbers", ".csv", ".csv"),
    TablePath("CSV -> pipeline with strings -> CSV", "pipeline", "mixed", ".csv", ".csv"),
    TablePath("NDJSON -> LR -> NDJSON", "logistic", "numbers", ".jsonl", ".jsonl"),
    TablePath("Parquet -> LR -> Parquet", "logistic", "numbers", ".parquet", ".parquet"),
    TablePath("CSV -> 100-tree forest -> Parquet", "forest", "numbers", ".csv", ".parquet"),
    TablePath("Parquet -> gradient boosting -> Parquet", "boosting", "numbers", ".parquet", ".parquet"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """A script that scores a file in a separate environment.

    `most`: the largest number of rows that it is run with on a path; for more rows, its time is extrapolated.
    `pinned`: with the project's versions. `remote`: files travel over HTTP, as in our whole job.
    """

    name: str
    about: str
    script: str
    requirements: tuple[str, ...]
    most: Mapping[str, int]
    pickled: bool = False
    pinned: bool = True
    remote: bool = False

    @property
    def environment(self) -> str:
        return "sklearn" if self.pickled else "onnx" if self.pinned else Path(self.script).stem


CSV, STRINGS, NDJSON, PARQUET, FOREST, BOOSTING = (path.title for path in PATHS)
EVERYWHERE = dict.fromkeys((CSV, STRINGS, NDJSON, PARQUET, FOREST, BOOSTING), 10 * MILLION)
SKLEARN = ("joblib", "pandas", "pyarrow", "scikit-learn")
ONNX = ("numpy", "onnxruntime", "polars", "pyarrow")
SCRIPT_PEERS = (
    Peer(
        "pandas + joblib", "the whole file, the pickled estimator; 10 million records of NDJSON would need 40 GB",
        "pandas_joblib.py", SKLEARN, EVERYWHERE | {NDJSON: MILLION}, pickled=True,
    ),
    Peer(
        "pandas in chunks", "the same, 100,000 rows at a time; its time is linear, so 1 million rows suffice",
        "pandas_chunks.py", SKLEARN, dict.fromkeys(EVERYWHERE, MILLION), pickled=True,
    ),
    Peer(
        "polars + onnxruntime",
        "the whole file, one call of ONNX Runtime; 10 million rows with strings would need 25 GB",
        "polars_onnxruntime.py", ONNX, EVERYWHERE | {STRINGS: MILLION},
    ),
    Peer(
        "naive, row by row", "the csv module, the model loaded for the job, a call for each row",
        "naive.py", ONNX, {CSV: 100_000},
    ),
)  # fmt: skip
SYSTEM_PEERS = (
    Peer(
        "Ray Data", "`read_csv`, `map_batches` with an actor that holds the ONNX session, `write_csv`",
        "ray_data.py", ("ray[data]==2.60.0", "onnxruntime"), {CSV: 10 * MILLION}, pinned=False,
    ),
    Peer(
        "MLServer", "`mlserver infer` with V2 requests of 1,000 rows to a server with the ONNX model",
        "mlserver_infer.py", ("mlserver==1.7.1", "onnxruntime"), {CSV: MILLION}, pinned=False, remote=True,
    ),
    Peer(
        "BentoML", "the file to a task endpoint, its status polled, the rows back as JSON",
        "bentoml_task.py", ("bentoml==1.4.39", "onnxruntime", "polars"), {CSV: MILLION}, pinned=False, remote=True,
    ),
)  # fmt: skip
LIMIT_REQUIREMENTS = ("duckdb==2.0.0", "numpy", "onnx", "onnxruntime", "polars", "pyarrow")


@dataclass
class Bench:
    """How thoroughly to measure, where, and the messages of the run.

    Without `repeats` all programs run three times; above 1 million rows ours and the limit twice, the peers once.
    Unless `thorough`, the peers run once at any size.
    """

    folder: Path
    peers: tuple[Peer, ...]
    say: Callable[[str], None]
    repeats: int | None = None
    thorough: bool = False
    unavailable: dict[str, str] = field(default_factory=dict)
    """The reason why a peer has no environment, by its name."""

    def our_repeats(self, rows: int) -> int:
        return self.repeats or (3 if rows <= MILLION else 2)

    def peer_repeats(self, rows: int) -> int:
        return self.our_repeats(rows) if self.thorough and rows <= MILLION else 1


def measure(bench: Bench, path: TablePath, rows: int) -> Iterator[Measurement | Gap]:
    """All measurements of one path at one size, interleaved: each repeat runs every program once.

    Raises Unavailable when the service or the limit fails.
    """
    title = f"{path.title}, {size(rows)}"
    source = data.table(bench.folder, path.kind, path.source, rows)
    model = data.model(bench.folder, path.model)
    python = environments.python_with(bench.folder, "limit", LIMIT_REQUIREMENTS, pinned=True)
    ours, whole, call, floor, transfer = Runs(), Runs(), Runs(), Runs(), Runs()
    theirs: dict[Peer, Runs] = {}
    failed: dict[Peer, str] = {}
    with TemporaryDirectory(dir=bench.folder) as name, nginx.available(bench.folder, bench.say) as web:
        folder = Path(name)
        result = folder / f"ours{path.target}"
        with _warm(bench, path, model, folder) as server:
            used = partial(cpu_seconds, server.pid)
            for repeat in range(bench.our_repeats(rows)):
                bench.say(f"{title}: run {repeat + 1} of {bench.our_repeats(rows)}")
                reference = folder / f"limit{path.target}"
                os.sync()  # writes of one program must not slow down the next one
                taken = processes.timed_script(python, LIMIT, model.graph, source, reference, timeout=LIMIT_TIMEOUT)
                floor.add(taken.seconds, peak=taken.peaks.together, cpu=taken.cpu)
                if web:
                    transfer.add(taken.seconds + transferred(web, source, reference))
                os.sync()
                with processes.watched(server.pid) as peaks:
                    steps = service.three_calls(server.url, path.model, source, result, path.format, used=used)
                    at_once, cpu = service.one_call(server.url, path.model, source, result, path.format, used=used)
                ours.add(steps.predict, peak=peaks.together, largest=peaks.largest, cpu=steps.predict_cpu)
                whole.add(steps.together, cpu=steps.cpu)
                call.add(at_once, cpu=cpu)
                if repeat == 0:
                    check_equal(reference, result)
                if repeat < bench.peer_repeats(rows):
                    _run_peers(bench, path, rows, model, folder, theirs, failed)
    yield from _compared(title, rows, ours, whole, call, floor, transfer)
    yield from _against(path, rows, ours, whole, theirs)
    for peer, error in failed.items():
        if peer not in theirs:
            bench.say(f"{peer.name}: {error}")
            yield Gap(_versus(path, rows, peer), error)


def growth(measured: Iterable[Measurement]) -> Iterator[Measurement]:
    """How time grows from 1 to 10 million rows, and memory from 3 million to the largest size that was measured.

    Nothing of a path where those sizes were not measured.
    """
    found = list(measured)
    for path in PATHS:
        ours = _by_size(path, found)
        if {MILLION, 10 * MILLION} <= ours.keys():
            title = f"{path.title}: seconds at 10 million rows / at 1 million"
            yield Measurement(title, ours[10 * MILLION].ours, ours[MILLION].ours, "s")
        largest = max(ours, default=0)
        if PLATEAU in ours and largest > PLATEAU:
            title = f"{path.title}: peak memory at {size(largest)} / at 3 million"
            peak, plateau = ((ours[rows].our_peak or 0) / MB for rows in (largest, PLATEAU))
            yield Measurement(title, peak, plateau, "MB")


def _by_size(path: TablePath, measured: Iterable[Measurement]) -> dict[int, Measurement]:
    """The measurement of the service next to the limit, by the number of rows."""
    pattern = re.compile(rf"{re.escape(path.title)}, (.+): queued -> completed / limit")
    return {rows_of(match[1]): entry for entry in measured if (match := pattern.fullmatch(entry.name))}


def _compared(
    title: str, rows: int, ours: Runs, whole: Runs, call: Runs, floor: Runs, transfer: Runs
) -> Iterator[Measurement | Gap]:
    yield Measurement.of(f"{title}: queued -> completed / limit", ours, floor, "s")
    for name, runs in {"upload, predict, download": whole, "one call, download": call}.items():
        versus = f"{title}: {name} / limit over HTTP"
        if transfer.values:
            yield Measurement.of(versus, runs, transfer, "s")
        else:
            yield Gap(versus, "there is no nginx")
    if rows >= MILLION:
        yield Measurement(f"{title}: peak memory / 900 MB", ours.peak / MB, MEMORY_GOAL / MB, "MB")
        yield Measurement(f"{title}: largest process / 600 MB", ours.largest / MB, PROCESS_GOAL / MB, "MB")


def _against(path: TablePath, rows: int, ours: Runs, whole: Runs, theirs: Mapping[Peer, Runs]) -> Iterator[Measurement]:
    for peer, runs in theirs.items():
        speed = (whole if peer.remote else ours).each(partial(truediv, rows))
        their_speed = runs.each(partial(truediv, min(rows, peer.most[path.title])))
        yield Measurement.of(_versus(path, rows, peer), speed, their_speed, "rows/s")


def _versus(path: TablePath, rows: int, peer: Peer) -> str:
    most = peer.most[path.title]
    return f"{path.title}, {size(rows)}: speed / {peer.name}{f' (from {size(most)})' if most < rows else ''}"


@contextmanager
def _warm(bench: Bench, path: TablePath, model: data.Model, folder: Path) -> Iterator[processes.Server]:
    """A server whose scoring processes have loaded the model."""
    home = folder / "server"
    home.mkdir()
    with processes.batchserve(home) as server:
        try:
            service.register(server.url, path.model, model.graph)
            chunks = data.table(bench.folder, path.kind, path.source, WARMING)
            for _ in range(3):
                service.three_calls(server.url, path.model, chunks, folder / "warm", path.format)
            yield server
        except Unavailable:
            bench.say((home / "server.log").read_text()[-4000:])
            raise


def transferred(web: str, source: Path, result: Path) -> float:
    """Seconds of nginx for the same bytes: PUT of the input, GET of the result."""
    send(f"{web}/result", "PUT", result)
    started = time.perf_counter()
    send(f"{web}/input", "PUT", source)
    fetch(f"{web}/result", result.with_name("fetched"))
    return time.perf_counter() - started


def _run_peers(
    bench: Bench,
    path: TablePath,
    rows: int,
    model: data.Model,
    folder: Path,
    theirs: dict[Peer, Runs],
    failed: dict[Peer, str],
) -> None:
    for peer in bench.peers:
        if path.title not in peer.most or peer in failed or rows < FEW or rows == PLATEAU:
            continue
        source = data.table(bench.folder, path.kind, path.source, min(rows, peer.most[path.title]))
        script = SCRIPTS / peer.script
        target = folder / f"{script.stem}{path.target}"
        chosen = model.pickled if peer.pickled else model.graph
        try:
            python = _python(bench, peer)
            os.sync()
            taken = processes.timed_script(python, script, chosen, source, target, timeout=PEER_TIMEOUT)
        except Unavailable as error:
            failed[peer] = str(error)
        else:
            theirs.setdefault(peer, Runs()).add(taken.seconds, peak=taken.peaks.together, cpu=taken.cpu)


def _python(bench: Bench, peer: Peer) -> Path:
    """An environment that cannot be installed is tried only once. Raises Unavailable."""
    if peer.name in bench.unavailable:
        raise Unavailable(bench.unavailable[peer.name])
    try:
        return environments.python_with(bench.folder, peer.environment, peer.requirements, pinned=peer.pinned)
    except Unavailable as error:
        bench.unavailable[peer.name] = f"it does not install: {error}"
        raise Unavailable(bench.unavailable[peer.name]) from error


def check_equal(expected: Path, got: Path) -> None:
    """Checks that the result of the service has the rows and labels of the limit's. Raises Unavailable."""
    scan: dict[str, Callable[[Path], pl.LazyFrame]]
    scan = {".csv": pl.scan_csv, ".jsonl": pl.scan_ndjson, ".parquet": pl.scan_parquet}
    summed = pl.len().alias("rows"), pl.col("id", "prediction").cast(pl.Int64).sum()
    sums = [scan[got.suffix](path).select(*summed).collect().row(0) for path in (expected, got)]
    if sums[0] != sums[1]:
        raise Unavailable(f"rows, ids and labels add up to {sums[1]}, the limit's to {sums[0]}")


def size(rows: int) -> str:
    """The name of a number of rows, such as `3 million rows`."""
    named = f"{rows // MILLION} million rows" if rows and rows % MILLION == 0 else f"{rows} rows"
    return SIZES.get(rows, named)


def rows_of(size: str) -> int:
    """The number of rows with this name."""
    count, _, unit = size.removesuffix(" rows").partition(" ")
    return int(count) * {"": 1, "thousand": 1000, "million": MILLION}[unit]
