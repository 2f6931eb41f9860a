"""The goals of the project on two cores, each a ratio of two figures of one run, or of one to a fixed number."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal for the measurements whose name matches the pattern; the first goal that matches counts.

    `ratio` is ours / reference. A stretch goal is shown, but missing it is not a failure. If the reference is a fixed
    number, `measured` is the one of the same run with which the figure is compared as well.
    """

    pattern: str
    ratio: float
    direction: Literal["at most", "at least"]
    title: str
    stretch: bool = False
    measured: str = ""

    def met(self, ratio: float) -> bool:
        return ratio <= self.ratio if self.direction == "at most" else ratio >= self.ratio

    def __str__(self) -> str:
        return f"{self.direction} {self.ratio:g}{' (stretch)' if self.stretch else ''}"


SYNC = "a lone sync"
ROUTE = "bare Starlette route"
ONLINE = "bare Starlette with ONNX Runtime"
GOALS = (
    # Seconds next to the limit: where scoring dominates, the service may add less.
    Goal(
        "*100-tree forest*million rows: queued -> completed / limit", 1.10, "at most",
        "queued -> completed / limit, where scoring dominates",
    ),
    Goal(
        "CSV -> LR*million rows: queued -> completed / limit", 0.8, "at most",
        "queued -> completed / limit, CSV -> LR",
    ),
    Goal("NDJSON*million rows: queued -> completed / limit", 0.9, "at most", "queued -> completed / limit, NDJSON"),
    Goal("*million rows: queued -> completed / limit", 1.25, "at most", "queued -> completed / limit"),
    Goal(
        "CSV -> LR*million rows: upload, predict, download / limit over HTTP", 1.1, "at most",
        "whole job, three calls / limit over HTTP, CSV -> LR",
    ),
    Goal(
        "*million rows: upload, predict, download / limit over HTTP", 1.25, "at most",
        "whole job, three calls / limit over HTTP",
    ),
    Goal(
        "*million rows: one call, download / limit over HTTP", 1.0, "at most",
        "whole job, one call / limit over HTTP", stretch=True,
    ),
    Goal(
        "images*10 thousand images: queued -> completed / limit", 1.10, "at most",
        "queued -> completed / limit, images",
    ),
    Goal(
        "images*10 thousand images: queued -> completed / slower of decoding and network", 1.15, "at most",
        "queued -> completed / the slower of decoding alone and the network alone",
    ),
    # Rows per second compared with alternatives.
    Goal(
        "CSV -> LR -> CSV*million rows: speed / pandas + joblib", 9, "at least",
        "speed / pandas + joblib, CSV -> LR -> CSV",
    ),
    Goal(
        "Parquet -> LR -> Parquet*million rows: speed / pandas + joblib", 4, "at least",
        "speed / pandas + joblib, Parquet -> LR -> Parquet",
    ),
    Goal("*100-tree forest*million rows: speed / pandas + joblib", 3, "at least", "speed / pandas + joblib, forest"),
    Goal("Ray, * rows: speed / Ray Data on the same cluster", 3, "at least", "speed on Ray / Ray Data, same cluster"),
    Goal(
        "Ray, * rows: queued -> completed / local engine", 1.25, "at most", "queued -> completed on Ray / local engine",
        stretch=True,
    ),
    Goal("* 1 million rows: speed / Ray Data*", 15, "at least", "speed / Ray Data, 1 million rows"),
    Goal("* 1 million rows: speed / MLServer*", 15, "at least", "speed / MLServer, 1 million rows"),
    Goal("* 1 million rows: speed / BentoML*", 15, "at least", "speed / BentoML, 1 million rows"),
    Goal("* rows: speed / *", 1, "at least", "speed / any alternative at any other size or path"),
    # Memory of all processes together, and growth with the input.
    Goal("*million rows: peak memory / 900 MB", 1, "at most", "peak memory of all processes / 900 MB"),
    Goal("*million rows: largest process / 600 MB", 1, "at most", "peak memory of the largest process / 600 MB"),
    Goal("*: peak memory at * rows / at 3 million", 1.1, "at most", "peak memory, the largest size / 3 million rows"),
    Goal("*: seconds at 10 million rows / at 1 million", 10.5, "at most", "seconds, 10 / 1 million rows"),
    # Online predictions, small jobs, polls, transfers.
    Goal(
        "*: * per second with a key / without", 0.97, "at least",
        "small jobs, polls, online: per second with a key / without",
    ),
    Goal(
        "online, 1 row, 1 client: median / 0.5 ms", 1, "at most", "online prediction of 1 row: median / 0.5 ms",
        measured=ONLINE,
    ),
    Goal("online, 1 row, 1 client: median / bare*", 3, "at most", "online prediction of 1 row: median / bare route"),
    Goal(
        "online, 1 row, 8 clients: requests per second / 4,000", 1, "at least",
        "online predictions of 8 clients: requests/s / 4,000", measured=ONLINE,
    ),
    Goal(
        "online, 1 row, 8 clients: requests per second / bare*", 0.7, "at least",
        "online predictions of 8 clients: requests/s / bare route",
    ),
    Goal(
        "online, 1 row, *: one run in ONNX Runtime / scikit-learn *", 1, "at most",
        "1 row, one run in ONNX Runtime / scikit-learn",
    ),
    Goal(
        "small job, 1 row: median of upload, predict, download / 4 ms", 1, "at most",
        "small job of 1 row, three calls: median / 4 ms", measured=SYNC,
    ),
    Goal(
        "small job, 100 rows: median of upload, predict, download / 5 ms", 1, "at most",
        "small job of 100 rows, three calls: median / 5 ms", measured=SYNC,
    ),
    Goal(
        "small jobs, 16 clients, 1 row, upload, predict, download: jobs per second / 800", 1, "at least",
        "small jobs of 1 row, 16 clients: jobs/s / 800", measured=ROUTE,
    ),
    Goal(
        "small jobs, 16 clients, 100 rows, upload, predict, download: jobs per second / 500", 1, "at least",
        "small jobs of 100 rows, 16 clients: jobs/s / 500", measured=ROUTE,
    ),
    Goal(
        "small jobs, 16 clients, 1 row, upload, predict, download: CPU of a job / 1.5 ms", 1, "at most",
        "small jobs of 1 row, 16 clients: CPU of a job / 1.5 ms", measured=ROUTE,
    ),
    Goal("small job, 1 row, *: syncs of a job / 2.1", 1, "at most", "small job of 1 row: syncs / 2.1"),
    Goal(
        "small jobs, 16 clients, 1 row, *: syncs of a job / 0.6", 1, "at most",
        "small jobs of 1 row, 16 clients: syncs of a job / 0.6",
    ),
    Goal(
        "small jobs, 16 clients, 1 row, *, 2 ms more for each sync: jobs per second / 600", 1, "at least",
        "small jobs of 1 row, 16 clients, 2 ms more for each sync: jobs/s / 600", measured="lone syncs per second",
    ),
    Goal(
        "status polls*: requests per second / bare Starlette route", 0.6, "at least",
        "status polls: requests/s / bare Starlette route",
    ),
    Goal(
        "status polls, a big job runs: P99 / 5 ms", 1, "at most", "status polls while a big job runs: P99 / 5 ms",
        measured=ROUTE,
    ),
    Goal(
        "PostgreSQL, *: jobs per second / SQLite", 0.7, "at least", "small jobs on PostgreSQL: jobs/s / SQLite",
        stretch=True,
    ),
    Goal("PostgreSQL, *: requests per second / SQLite", 0.5, "at least",
        "status polls on PostgreSQL: requests/s / SQLite", stretch=True,
    ),
    Goal("S3, *: requests of the plan / *", 1, "at most", "input in a bucket: requests of the plan / those expected"),
    Goal("S3, *: requests of a chunk / *", 1, "at most", "input in a bucket: requests of a chunk / those expected"),
    Goal(
        "S3, *: bytes of all chunks / those taken", 1.3, "at most",
        "input in a bucket: bytes of all chunks / those taken",
    ),
    Goal("upload: MB/s / nginx PUT", 0.8, "at least", "upload: MB/s / nginx PUT"),
    Goal("download: MB/s / nginx GET", 0.8, "at least", "download: MB/s / nginx sendfile"),
)  # fmt: skip


def goal_of(name: str) -> Goal | None:
    return next((goal for goal in GOALS if fnmatchcase(name, goal.pattern)), None)
