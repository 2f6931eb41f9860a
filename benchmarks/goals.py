"""What the project wants to reach on two cores: every goal is a ratio of two figures of one run."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


@dataclass(frozen=True, slots=True)
class Goal:
    """For measurements whose name matches the pattern; the first goal that matches counts.

    `ratio` is ours / reference. A stretch goal is shown, and its miss is no failure.
    """

    pattern: str
    ratio: float
    direction: Literal["at most", "at least"]
    stretch: bool = False

    def met(self, ratio: float) -> bool:
        return ratio <= self.ratio if self.direction == "at most" else ratio >= self.ratio

    def __str__(self) -> str:
        return f"{self.direction} {self.ratio:g}{' (stretch)' if self.stretch else ''}"


GOALS = (
    # Seconds next to the limit: where scoring dominates, the service may add less.
    Goal("*100-tree forest*million rows: queued -> completed / limit", 1.10, "at most"),
    Goal("*million rows: queued -> completed / limit", 1.25, "at most"),
    Goal("*million rows: upload, predict, download / limit over HTTP", 1.25, "at most"),
    Goal("*million rows: one call, download / limit over HTTP", 1.0, "at most", stretch=True),
    # Rows per second next to what people use instead.
    Goal("CSV -> LR -> CSV*million rows: speed / pandas + joblib", 7, "at least"),
    Goal("Parquet -> LR -> Parquet*million rows: speed / pandas + joblib", 4, "at least"),
    Goal("*100-tree forest*million rows: speed / pandas + joblib", 3, "at least"),
    Goal("*million rows: speed / Ray Data*", 15, "at least"),
    Goal("*million rows: speed / MLServer*", 15, "at least"),
    Goal("*million rows: speed / BentoML*", 15, "at least"),
    Goal("*million rows: speed / *", 1, "at least"),
    # Memory of all processes together, and growth with the input.
    Goal("*million rows: peak memory / 900 MB", 1, "at most"),
    Goal("*million rows: largest process / 600 MB", 1, "at most"),
    Goal("*: peak memory at 10 million rows / at 1 million", 1.1, "at most"),
    Goal("*: seconds at 10 million rows / at 1 million", 10.5, "at most"),
    # Small jobs, polls, transfers.
    Goal("small job, 1 row: median of upload, predict, download / 15 ms", 1, "at most"),
    Goal("small jobs, 16 clients*: jobs per second / 300", 1, "at least"),
    Goal("status polls*: requests per second / bare Starlette route", 0.6, "at least"),
    Goal("status polls, a big job runs: P99 / 5 ms", 1, "at most"),
    Goal("upload: MB/s / nginx PUT", 0.8, "at least"),
    Goal("download: MB/s / nginx GET", 0.8, "at least"),
)


def goal_of(name: str) -> Goal | None:
    return next((goal for goal in GOALS if fnmatchcase(name, goal.pattern)), None)
