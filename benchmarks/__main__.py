"""A whole job through the server next to the script that it replaces, on the same file in the same run.

usage: python -m benchmarks [--rows N] [--folder DIR]
"""

import argparse
import tempfile
import time
from pathlib import Path

import polars as pl
from rich.console import Console
from rich.table import Table

from batchserve import Client
from benchmarks import data, peers
from benchmarks.processes import MIB, Peaks, serving, timed_script, watched

PANDAS = Path(peers.__file__).parent / "pandas_joblib.py"


def main() -> None:
    arguments = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    arguments.add_argument("--rows", type=int, default=1_000_000)
    arguments.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "batchserve-benchmarks")
    chosen = arguments.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"preparing {chosen.rows:,} rows in {chosen.folder}")
    pickled, graph = data.logistic_regression(chosen.folder)
    table = data.csv(chosen.folder, chosen.rows)

    seconds, peaks = _job(graph, table)
    theirs, their_peaks = timed_script(PANDAS, str(pickled), str(table), str(chosen.folder / "pandas.csv"))

    shown = Table("", "seconds", "rows/s", "peak MiB", title=f"CSV -> logistic regression -> CSV, {chosen.rows:,} rows")
    for name, spent in seconds.items():
        shown.add_row(name, f"{spent:.2f}", f"{chosen.rows / spent:,.0f}", "")
    for name in ("server", "scoring process"):
        shown.add_row(f"  {name}, the largest", "", "", f"{peaks.named(name) / MIB:.0f}")
    shown.add_row("  all our processes", "", "", f"{peaks.together / MIB:.0f}")
    shown.add_row(
        "pandas + joblib script", f"{theirs:.2f}", f"{chosen.rows / theirs:,.0f}", f"{their_peaks.together / MIB:.0f}"
    )
    console.print(shown)
    console.print(f"the script takes {theirs / seconds['queued -> completed']:.1f} x our queued -> completed")


def _job(graph: Path, table: Path) -> tuple[dict[str, float], Peaks]:
    """Seconds of each step of one job over HTTP, and the memory of all processes meanwhile."""
    with tempfile.TemporaryDirectory(dir=table.parent) as folder, serving(Path(folder)) as server:
        with Client(server.url, timeout=600) as client, watched(server.pid) as peaks:
            client.models.add(graph, name="logistic")
            moments = [time.perf_counter()]
            uploaded = client.upload(table)
            moments.append(time.perf_counter())
            job = client.submit(uploaded, model="logistic")
            job.wait()
            moments.append(time.perf_counter())
            result = job.result().save(Path(folder) / "result.csv")
            moments.append(time.perf_counter())
            rows = pl.scan_csv(result).select(pl.len()).collect().item()
            if rows != job.rows["total"]:
                raise SystemExit(f"the result has {rows} rows, the input {job.rows['total']}")
        steps = ("upload (durable)", "queued -> completed", "download")
        seconds = {name: moments[index + 1] - moments[index] for index, name in enumerate(steps)}
        return {**seconds, "whole job over HTTP": moments[-1] - moments[0]}, peaks


if __name__ == "__main__":
    main()
