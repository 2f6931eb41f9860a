"""From a file to a file: the service next to the limit and to what people use instead."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import polars as pl

from benchmarks import data, environments, nginx, processes, service
from benchmarks import peers as peer_scripts
from benchmarks.environments import Unavailable
from benchmarks.http import fetch, send
from benchmarks.results import MB, Measurement

LIMIT = Path(__file__).with_name("limit.py")
SCRIPTS = Path(peer_scripts.__file__).parent
MILLION = 1_000_000
SIZES = {
    10_000: "10 thousand rows",
    100_000: "100 thousand rows",
    MILLION: "1 million rows",
    10 * MILLION: "10 million rows",
}
PEER_TIMEOUT = 300.0
FEW = 10_000
"""Rows below which the peers are left out: trials of the harness."""
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
        """Of the result, as the service calls it."""
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
    """A script that scores a file in an environment of its own.

    `most`: the most rows that it is given by input suffix; for more, its time is that of `most`, extrapolated.
    `pinned`: with the project's versions. `remote`: files travel over HTTP, as in our whole job.
    """

    name: str
    script: str
    requirements: tuple[str, ...]
    most: Mapping[str, int]
    pickled: bool = False
    pinned: bool = True
    remote: bool = False
    paths: tuple[str, ...] = tuple(path.title for path in PATHS)


SKLEARN = ("joblib", "pandas", "pyarrow", "scikit-learn")
ONNX = ("numpy", "onnxruntime", "polars", "pyarrow")
# pandas needs some fifteen times the size of NDJSON in memory.
WHOLE = {".csv": 10 * MILLION, ".jsonl": MILLION, ".parquet": 10 * MILLION}
CHUNKED = dict.fromkeys(WHOLE, MILLION)
FIRST = (PATHS[0].title,)
SCRIPT_PEERS = (
    Peer("pandas + joblib", "pandas_joblib.py", SKLEARN, WHOLE, pickled=True),
    Peer("pandas in chunks", "pandas_chunks.py", SKLEARN, CHUNKED, pickled=True),
    Peer("polars + onnxruntime", "polars_onnxruntime.py", ONNX, WHOLE),
    Peer("naive, row by row", "naive.py", ONNX, {".csv": 100_000}, paths=FIRST),
)
SYSTEM_PEERS = (
    Peer("Ray Data", "ray_data.py", ("ray[data]==2.60.0", "onnxruntime"), {".csv": MILLION}, pinned=False, paths=FIRST),
    Peer(
        "MLServer", "mlserver_infer.py", ("mlserver==1.7.1", "onnxruntime"), {".csv": 100_000},
        pinned=False, remote=True, paths=FIRST,
    ),
    Peer(
        "BentoML", "bentoml_task.py", ("bentoml==1.4.39", "onnxruntime", "polars"), {".csv": MILLION},
        pinned=False, remote=True, paths=FIRST,
    ),
)  # fmt: skip
LIMIT_REQUIREMENTS = ("duckdb==2.0.0", "numpy", "onnx", "onnxruntime", "polars", "pyarrow")


@dataclass
class Bench:
    """How thoroughly, where, and what was told meanwhile."""

    folder: Path
    repeats: int
    peer_repeats: int
    peers: tuple[Peer, ...]
    say: Callable[[str], None]
    unavailable: dict[str, str] = field(default_factory=dict)

    def without(self, name: str, error: Unavailable) -> None:
        self.unavailable[name] = str(error)
        self.say(f"{name}: {error}")


@dataclass
class Timings:
    """Seconds of every repeat and the peak memory in bytes."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    largest: int = 0
    """Peak memory in bytes of the process that took most."""

    def add(self, seconds: float, peak: int = 0, largest: int = 0) -> None:
        self.seconds.append(seconds)
        self.peak = max(self.peak, peak)
        self.largest = max(self.largest, largest)

    @property
    def median(self) -> float:
        return median(self.seconds)


def measure(bench: Bench, path: TablePath, rows: int) -> Iterator[Measurement]:
    """Everything about one path at one size, interleaved: each repeat runs every program once."""
    source = data.table(bench.folder, path.kind, path.source, rows)
    model = data.model(bench.folder, path.model)
    python = environments.python_with(bench.folder, "limit", LIMIT_REQUIREMENTS, pinned=True)
    ours, whole, call, floor, transfer = Timings(), Timings(), Timings(), Timings(), Timings()
    theirs: dict[Peer, Timings] = {}
    with TemporaryDirectory(dir=bench.folder) as name, _nginx(bench, Path(name)) as web:
        folder = Path(name)
        result = folder / f"ours{path.target}"
        with _warm(bench, path, model, folder) as server:
            for repeat in range(bench.repeats):
                bench.say(f"{path.title}, {_size(rows)}: run {repeat + 1} of {bench.repeats}")
                reference = folder / f"limit{path.target}"
                taken, peaks = processes.timed_script(
                    python, LIMIT, model.graph, source, reference, timeout=PEER_TIMEOUT
                )
                floor.add(taken, peaks.together)
                if web:
                    transfer.add(taken + _transfers(web, source, reference))
                with processes.watched(server.pid) as peaks:
                    steps = service.three_calls(server.url, path.model, source, result, path.format)
                    call.add(service.one_call(server.url, path.model, source, result, path.format))
                ours.add(steps.predict, peaks.together, peaks.largest)
                whole.add(steps.together)
                if repeat == 0:
                    _check_equal(reference, result)
                if repeat < bench.peer_repeats:
                    _run_peers(bench, path, rows, model, folder, theirs)
    yield from _compared(f"{path.title}, {_size(rows)}", rows, ours, whole, call, floor, transfer)
    yield from _against(path, rows, ours, whole, theirs)


def growth(measured: Iterable[Measurement]) -> Iterator[Measurement]:
    """How time and memory grow from 1 to 10 million rows."""
    found = {measurement.name: measurement for measurement in measured}
    for path in PATHS:
        names = [f"{path.title}, {SIZES[rows]}: queued -> completed / limit" for rows in (10 * MILLION, MILLION)]
        if all(name in found for name in names):
            big, small = (found[name] for name in names)
            yield Measurement(f"{path.title}: seconds at 10 million rows / at 1 million", big.ours, small.ours, "s")
            title = f"{path.title}: peak memory at 10 million rows / at 1 million"
            yield Measurement(title, (big.our_peak or 0) / MB, (small.our_peak or 0) / MB, "MB")


def _compared(
    title: str, rows: int, ours: Timings, whole: Timings, call: Timings, floor: Timings, transfer: Timings
) -> Iterator[Measurement]:
    peaks = ours.peak, floor.peak
    yield Measurement(f"{title}: queued -> completed / limit", ours.median, floor.median, "s", *peaks)
    if transfer.seconds:
        for name, timings in {"upload, predict, download": whole, "one call, download": call}.items():
            yield Measurement(f"{title}: {name} / limit over HTTP", timings.median, transfer.median, "s")
    if rows >= MILLION:
        yield Measurement(f"{title}: peak memory / 900 MB", ours.peak / MB, MEMORY_GOAL / MB, "MB")
        yield Measurement(f"{title}: largest process / 600 MB", ours.largest / MB, PROCESS_GOAL / MB, "MB")


def _against(
    path: TablePath, rows: int, ours: Timings, whole: Timings, theirs: Mapping[Peer, Timings]
) -> Iterator[Measurement]:
    for peer, timings in theirs.items():
        most = min(rows, peer.most[path.source])
        speeds = rows / (whole if peer.remote else ours).median, most / timings.median
        told = f" (from {_size(most)})" if most < rows else ""
        title = f"{path.title}, {_size(rows)}: speed / {peer.name}{told}"
        yield Measurement(title, *speeds, "rows/s", ours.peak, timings.peak)


@contextmanager
def _warm(bench: Bench, path: TablePath, model: data.Model, folder: Path) -> Iterator[processes.Server]:
    """A server whose scoring processes have loaded the model."""
    home = folder / "server"
    home.mkdir()
    with processes.batchserve(home) as server:
        service.register(server.url, path.model, model.graph)
        small = data.table(bench.folder, path.kind, path.source, 1000)
        for _ in range(3):
            service.three_calls(server.url, path.model, small, folder / "warm", path.format)
        yield server


@contextmanager
def _nginx(bench: Bench, folder: Path) -> Iterator[str | None]:
    try:
        program = environments.nginx(bench.folder)
    except Unavailable as error:
        bench.without("nginx", error)
        yield None
        return
    with nginx.serving(program, folder / "nginx") as url:
        yield url


def _transfers(web: str, source: Path, result: Path) -> float:
    """Seconds of nginx for the same bytes: PUT of the input, GET of the result."""
    send(f"{web}/result", "PUT", result)
    started = time.perf_counter()
    send(f"{web}/input", "PUT", source)
    fetch(f"{web}/result", result.with_name("fetched"))
    return time.perf_counter() - started


def _run_peers(
    bench: Bench, path: TablePath, rows: int, model: data.Model, folder: Path, theirs: dict[Peer, Timings]
) -> None:
    for peer in bench.peers:
        if peer.name in bench.unavailable or path.title not in peer.paths or rows < FEW:
            continue
        source = data.table(bench.folder, path.kind, path.source, min(rows, peer.most[path.source]))
        script = SCRIPTS / peer.script
        target = folder / f"{script.stem}{path.target}"
        chosen = model.pickled if peer.pickled else model.graph
        environment = "sklearn" if peer.pickled else script.stem
        try:
            python = environments.python_with(bench.folder, environment, peer.requirements, pinned=peer.pinned)
        except Unavailable as error:
            bench.without(peer.name, error)
            continue
        try:
            taken, peaks = processes.timed_script(python, script, chosen, source, target, timeout=PEER_TIMEOUT)
        except Unavailable as error:
            bench.without(f"{peer.name}, {path.title}, {_size(rows)}", error)
        else:
            theirs.setdefault(peer, Timings()).add(taken, peaks.together)


def _check_equal(expected: Path, got: Path) -> None:
    """The service's result has the rows and the labels of the limit's. Raises Unavailable."""
    scan: dict[str, Callable[[Path], pl.LazyFrame]]
    scan = {".csv": pl.scan_csv, ".jsonl": pl.scan_ndjson, ".parquet": pl.scan_parquet}
    summed = pl.len().alias("rows"), pl.col("id", "prediction").cast(pl.Int64).sum()
    sums = [scan[got.suffix](path).select(*summed).collect().row(0) for path in (expected, got)]
    if sums[0] != sums[1]:
        raise Unavailable(f"rows, ids and labels add up to {sums[1]}, the limit's to {sums[0]}")


def _size(rows: int) -> str:
    return SIZES.get(rows, f"{rows} rows")
