"""The figures of all runs, as lines of JSON, to compare them over time on each machine."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.results import Measurement, Results

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def append(results: Results, path: Path) -> None:
    """Adds a line for each measurement. Ratios compare across machines; seconds only on one of the same name."""
    run = {
        "at": f"{datetime.now(UTC):%Y-%m-%d}",
        "revision": _revision(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }
    with path.open("a") as file:
        for entry in results.entries.values():
            if isinstance(entry, Measurement):
                figures = entry.as_json()
                line = run | {name: figures[name] for name in ("name", "ours", "reference", "ratio", "unit")}
                file.write(json.dumps(line) + "\n")


def _revision() -> str:
    """The revision of the measured code, marked if it has uncommitted changes."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
