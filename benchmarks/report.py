"""docs/benchmarks.md and its chart."""

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks import chart
from benchmarks.paths import MILLION, PATHS, SIZES
from benchmarks.results import Measurement, as_markdown

LIBRARIES = ("batchserve", "numpy", "onnxruntime", "polars", "pyarrow", "scikit-learn", "uvicorn", "starlette")
SERIES = ("limit", "batchserve", "polars + onnxruntime", "pandas + joblib", "pandas in chunks")
TEXT = """# Benchmarks

Written by `make bench-full`; `make bench` measures the most important of them in about five minutes. Every figure is a
ratio of two medians of one run on one machine, its programs interleaved. On another machine the seconds differ; the
ratios should not by much.

![Speed of the service and of what people use instead, as a share of the limit](benchmarks.svg)

- The **limit** of a path is the best pipeline inside one process: one thread reads, two score with ONNX Runtime, one
  writes, all overlapped, the result synced to disk ([benchmarks/limit.py](../benchmarks/limit.py)). **Over HTTP**,
  nginx's PUT of the input and GET of the result are added.
- **Queued -> completed** is what the client waits for from the predict call on; the input is already stored. The
  scripts start with their input on disk as well; MLServer and BentoML, whose input travels, are compared with our whole
  job.
- Imports, the loading of models and the start of servers are not counted, for nobody.
- **Peak** is the resident memory of all processes of a program together, shared pages counted in each.
- A goal that is not met is printed **no**. A stretch goal is a wish.
- Images are not measured yet.

{machine}

{sections}
"""


def write(docs: Path, measurements: Sequence[Measurement], unavailable: Mapping[str, str], settings: str) -> None:
    """`docs`/benchmarks.md and `docs`/benchmarks.svg."""
    machine = (
        f"{os.cpu_count()} cores ({_processor()}), {_memory()}, Python {platform.python_version()}, {settings}.\n\n"
    )
    machine += "\n".join(f"- {name} {version(name)}" for name in LIBRARIES)
    sections = [f"## {title}\n\n{as_markdown(rows)}" for title, rows in _sections(measurements)]
    if unavailable:
        lines = "\n".join(f"- {name}: {reason.splitlines()[-1]}" for name, reason in unavailable.items())
        sections.append(f"## Not measured\n\n{lines}")
    (docs / "benchmarks.md").write_text(TEXT.format(machine=machine, sections="\n\n".join(sections)))
    (docs / "benchmarks.svg").write_text(_chart(measurements))


def _sections(measurements: Iterable[Measurement]) -> list[tuple[str, list[Measurement]]]:
    found: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        title = next(
            (path.title for path in PATHS if measurement.name.startswith(path.title)), "Small jobs and transfers"
        )
        found.setdefault(title, []).append(measurement)
    return list(found.items())


def _chart(measurements: Sequence[Measurement]) -> str:
    """Rows per second as a share of the limit's, at 1 million rows."""
    groups: dict[str, dict[str, float]] = {}
    for path in PATHS:
        title = f"{path.title}, {SIZES[MILLION]}"
        ratios = {m.name.removeprefix(f"{title}: "): m.ratio for m in measurements if m.name.startswith(title)}
        if "queued -> completed / limit" in ratios:
            ours = 1 / ratios["queued -> completed / limit"]
            peers = {name: ours / ratios[f"speed / {name}"] for name in SERIES[2:] if f"speed / {name}" in ratios}
            groups[path.title] = {"limit": 1.0, "batchserve": ours} | peers
    return chart.bars("Rows per second as a share of the limit, 1 million rows", groups, SERIES)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB of memory"
