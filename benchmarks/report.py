"""docs/benchmarks.md and its chart, from the results of one or several runs."""

import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import truediv
from pathlib import Path

from benchmarks import buckets, chart, environments, history, images, online, paths
from benchmarks.goals import GOALS, Goal, goal_of
from benchmarks.paths import LIMIT_REQUIREMENTS, MILLION, PATHS, SCRIPT_PEERS, SIZES, SYSTEM_PEERS, TablePath
from benchmarks.results import MB, Gap, Measurement, Results, Runs, figure, ratio_text, spread

NOTES = Path(__file__).with_name("notes.md")
LIBRARIES = (
    "batchserve", "numba", "numpy", "onnxruntime", "orjson", "polars", "pyarrow", "sqlalchemy", "starlette", "uvicorn",
)  # fmt: skip
VERSUS = re.compile(r"speed / (?P<peer>.+?)(?: \(from (?P<most>.+)\))?")
REMOTE = {peer.name for peer in SYSTEM_PEERS if peer.remote}
OVER_HTTP = {
    "upload, predict, download": "**batchserve**, three calls",
    "one call, download": "**batchserve**, one call",
}
TEXT = """\
# Benchmarks

batchserve compared with the limit of one machine, and with alternatives. All figures were measured by the harness of
the project, [benchmarks/](../benchmarks), and can be reproduced:

```bash
make bench         # 5 minutes: 1 million rows, the scripts, small jobs; exits with 1 when a goal is missed
make bench-full    # 45 minutes, 25 GB of disk: all sizes and alternatives; writes this page
```

`.venv/bin/python -m benchmarks --help` shows how to measure parts of it.

![Rows per second of batchserve, of the limit and of alternatives](benchmarks.svg)

## How to read it

- Every **ratio** compares two medians of one run of the harness on one machine, whose programs run alternately. The
  least and the greatest value of their single runs are given as well, in brackets or in a column. Seconds differ from
  machine to machine; ratios should differ little: [Over machines and dates](#over-machines-and-dates) shows how much.
- Where a goal is a **fixed number**, such as 4 ms, its figure is also compared with something that was measured in the
  same run: a lone sync (an append of 4 KiB that is synced to this disk alone), or a bare Starlette route.
- The **limit** of a path is the best known pipeline inside one process, without any service: one thread reads, two
  score with ONNX Runtime, one writes, all overlapped, the result synced to disk
  ([benchmarks/limit.py](../benchmarks/limit.py)). **Over HTTP**, nginx's PUT of the input and GET of the result are
  added.
- **Queued -> completed** is the time from the predict call to the completed job; the input is already stored. Scripts
  start with their input on disk as well. MLServer and BentoML, which receive their input over HTTP, are compared with
  the whole job: upload, predict, wait, download.
- Imports, the loading of models and the start of servers are excluded for all programs.
- **CPU seconds** are the user and system time of all processes of a program in the seconds next to them, without that
  of the client and of nginx.
- **Peak memory** is the resident memory of all processes of a program together; shared pages count once.
- The input is an id and 20 floats (with strings: 10 floats and 3 columns of words). The models distinguish three
  classes: logistic regression (LR), the same after a scaler and one-hot encoding (pipeline with strings), a random
  forest of 100 trees 12 deep, histogram gradient boosting of 100 rounds.
- **Images** are test images of CIFAR-10, PNG files in a ZIP archive, resized to 224 x 224 for ResNet-18 with random
  weights of a fixed seed. Their limit decodes and scores in as many processes as there are cores
  ([benchmarks/image_limit.py](../benchmarks/image_limit.py)); decoding alone and the network alone are measured too.

## Machine

{machine}

## Goals

{goals}

## Missed goals

{missed}

## Files

Rows from a file to a file; seconds are medians of the runs in the last column. "From 1 million rows" is measured
there and extrapolated, because more would take too long or too much memory (see [the alternatives](#the-alternatives)).

{files}

## Images

{images}

## Online predictions

One flower of iris. First the model alone, inside one process: a logistic regression and a forest of 10 trees, in ONNX
Runtime and in scikit-learn. Then one JSON record over HTTP on a kept connection, next to a bare Starlette route on the
same server that hands the values to the same graph in its own process. The difference is the cost of what that route
does not do: the record is matched with the model's columns and checked, its response has the names and digits of a
job's result, and all of it happens in a separate scoring process.

{online}

## Small jobs, polls, transfers

Each figure of small jobs, polls and online predictions is the median of short loads, between which the other programs
have theirs. A **lone sync** is an append of 4 KiB, synced alone, to the disk of the server. The **syncs of a job** are
the calls of fsync and fdatasync in all processes of the server, counted by strace, divided by the jobs. With **2 ms
more for each sync**, a library loaded before the C library ([benchmarks/slow_sync.c](../benchmarks/slow_sync.c)) waits
in these calls. **With a key**, the server has an admin key and that of a tenant, and every request is the tenant's;
the server without has none.

{small}

## Inputs in a bucket

A million records of ten float32, or a thousand images of 5.5 KB, in a bucket of SeaweedFS: the requests of the plan,
those of a chunk after the first one of a process, and the bytes of all chunks next to those of the columns that they
take. A proxy counts them; they do not depend on the machine, and the service should not exceed those expected.

{buckets}

## Growth

Seconds from 1 to 10 million rows. Memory from 3 million rows, where every scoring process has reached its peak, to the
largest size: from there on it should not grow. `make bench` measures neither of these sizes, so growth is judged here
only, by `make bench-full`.

{growth}

## Over machines and dates

The ratios of all runs in [benchmarks/history.jsonl](../benchmarks/history.jsonl), which `make bench-full` and
`--history` extend by the figures, the date, the revision and the machine of each run.

{history}

## The alternatives

Each runs in a separate environment, in the way that its documentation recommends; the scripts are in
[benchmarks/peers/](../benchmarks/peers).

{alternatives}
"""


def write(docs: Path, results: Results, folder: Path, recorded: Path) -> None:
    """`docs`/benchmarks.md and `docs`/benchmarks.svg.

    `folder`: where the environments of the peers are; `recorded`: the history.
    """
    results.add(paths.growth(results.measured))
    grown = [entry for entry in results.measured if " rows / at " in entry.name]
    photographs = [entry for entry in results.measured if entry.name.startswith(images.TITLE)]
    rows = [entry for entry in results.measured if entry.name.startswith(online.PREFIX)]
    stored = [entry for entry in results.measured if entry.name.startswith(f"{buckets.TITLE}, ")]
    shown = (*photographs, *rows, *stored)
    small = [entry for entry in results.measured if not _of_a_path(entry.name) and entry not in shown]
    text = TEXT.format(
        machine=_machine(),
        goals=_goals(results),
        missed=_missed(results),
        files="\n\n".join(_files(results)) or "Not measured.",
        images=_figures(photographs),
        online=_figures(rows),
        small=_figures(small),
        buckets=_figures(stored),
        growth=_figures(grown),
        history=_history(results, history.read(recorded)),
        alternatives=_alternatives(folder, results.gaps),
    )
    (docs / "benchmarks.md").write_text(text, encoding="utf-8")
    (docs / "benchmarks.svg").write_text(_chart(results), encoding="utf-8")


def _machine() -> str:
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows = [
        ("processor", history.processor()),
        ("cores", str(os.cpu_count())),
        ("memory", f"{memory:.0f} GB"),
        ("system", f"{system}, kernel {platform.release()}"),
        ("Python", platform.python_version()),
        ("libraries", ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)),
    ]
    return _table(("", ""), rows, "--")


def _goals(results: Results) -> str:
    rows = []
    for goal in GOALS:
        entries = [entry for entry in results.entries.values() if goal_of(entry.name) is goal]
        if entries:
            rows.append(_goal_row(goal, entries, results))
    return _table(("ratio", "goal", "measured", "met", "ratio to one measured in the run"), rows, "-::::")


def _goal_row(goal: Goal, entries: Sequence[Measurement | Gap], results: Results) -> tuple[str, ...]:
    ratios = [entry.ratio for entry in entries if isinstance(entry, Measurement)]
    met = sum(goal.met(ratio) for ratio in ratios)
    failed = sum(isinstance(entry, Gap) and entry.ours for entry in entries)
    count = len(ratios) + failed
    shown = "" if count == 0 else "yes" if met == count else "**no**" if met == 0 else f"**{met} of {count}**"
    return goal.title, str(goal), _between(ratios) or "not measured", shown, _relative(goal, entries, results)


def _relative(goal: Goal, entries: Sequence[Measurement | Gap], results: Results) -> str:
    """The ratios of the same figures to `goal.measured`, if they were measured."""
    names = [f"{entry.name.rpartition(' / ')[0]} / {goal.measured}" for entry in entries]
    found = [entry.ratio for name in names if isinstance(entry := results.entries.get(name), Measurement)]
    return f"{_between(found)} / {goal.measured}" if found else ""


def _between(ratios: Sequence[float]) -> str:
    """The least and the greatest, or the only one."""
    ends = (min(ratios), max(ratios)) if ratios else ()
    return " … ".join(dict.fromkeys(map(ratio_text, ends)))


def _missed(results: Results) -> str:
    """The missed goals, and the notes about their causes."""
    rows = [
        (entry.name, "failed" if isinstance(entry, Gap) else ratio_text(entry.ratio), str(goal_of(entry.name) or ""))
        for entry in results.missed
    ]
    table = _table(("", "ratio", "goal"), rows, "-::") if rows else "Every goal is met."
    return f"{table}\n\n{NOTES.read_text(encoding='utf-8')}".strip()


def _files(results: Results) -> Iterable[str]:
    for path in PATHS:
        sizes = dict.fromkeys(
            entry.name.removeprefix(f"{path.title}, ").partition(":")[0]
            for entry in results.measured
            if entry.name.startswith(f"{path.title}, ")
        )
        if sizes:
            yield "\n\n".join([f"### {path.title}", *(_programs(results, path, size) for size in sizes)])


def _programs(results: Results, path: TablePath, size: str) -> str:
    """All programs that were measured on this path at this size: first from file to file, then over HTTP."""
    title = f"{path.title}, {size}: "
    found = {entry.name.removeprefix(title): entry for entry in results.measured if entry.name.startswith(title)}
    rows = paths.rows_of(size)
    local: list[tuple[str, ...]] = []
    http: list[tuple[str, ...]] = []
    if floor := found.get("queued -> completed / limit"):
        local.append(_program("limit", rows, _theirs(floor)))
        local.append(_program("**batchserve**", rows, _ours(floor)))
    for what, entry in found.items():
        if match := VERSUS.fullmatch(what):
            name = match["peer"] + (f", from {match['most']}" if match["most"] else "")
            row = _program(name, rows, _theirs(entry).each(partial(truediv, rows)))
            (http if match["peer"] in REMOTE else local).append(row)
    for what, name in reversed(OVER_HTTP.items()):
        if job := found.get(f"{what} / limit over HTTP"):
            http.insert(0, _program(name, rows, _ours(job)))
    if whole := found.get("upload, predict, download / limit over HTTP"):
        http.insert(0, _program("limit and nginx", rows, _theirs(whole)))
    heading = ("seconds", "least … greatest", "rows/s", "CPU seconds", "peak memory, MB", "runs")
    tables = [_table((size[0].upper() + size[1:], *heading), local, "-::::::")]
    if http:
        tables.append(_table((f"{size[0].upper()}{size[1:]}, over HTTP", *heading), http, "-::::::"))
    return "\n\n".join(tables)


def _ours(entry: Measurement) -> Runs:
    runs = list(entry.our_runs or (entry.ours,))
    return Runs(runs, entry.our_peak or 0, cpu=_known(entry.our_cpu), middle=entry.ours)


def _theirs(entry: Measurement) -> Runs:
    runs = list(entry.reference_runs or (entry.reference,))
    return Runs(runs, entry.reference_peak or 0, cpu=_known(entry.reference_cpu), middle=entry.reference)


def _known(cpu: float | None) -> list[float]:
    return [] if cpu is None else [cpu]


def _program(name: str, rows: int, runs: Runs) -> tuple[str, ...]:
    cpu = "" if runs.median_cpu is None else figure(runs.median_cpu)
    peak = f"{runs.peak / MB:,.0f}" if runs.peak else ""
    shown = figure(runs.median), spread(runs.values), figure(rows / runs.median)
    return name, *shown, cpu, peak, str(len(runs.values))


def _figures(measurements: Iterable[Measurement]) -> str:
    rows = [tuple(measurement.cells()[:6]) for measurement in measurements]
    return _table(("", "ours", "reference", "ratio", "goal", "met"), rows, "-:::::") if rows else "Not measured."


def _history(results: Results, past: Mapping[str, history.Past]) -> str:
    """A line for each figure of these results that was recorded."""
    rows = [
        (name, str(found.runs), str(found.machines), _between((found.least, found.greatest)),
         f"{ratio_text(found.newest)}, {found.at}")
        for name in results.entries
        if (found := past.get(name))
    ]  # fmt: skip
    return _table(("", "runs", "machines", "ratios", "newest"), rows, "-::::") if rows else "Nothing was recorded."


def _alternatives(folder: Path, gaps: Iterable[Gap]) -> str:
    rows = []
    for peer in (*SCRIPT_PEERS, *SYSTEM_PEERS):
        installed = environments.versions(folder, peer.environment, peer.requirements, pinned=peer.pinned)
        rows.append((peer.name, peer.about, _named(installed)))
    limit = environments.versions(folder, "limit", LIMIT_REQUIREMENTS, pinned=True)
    rows.append(("limit", "the best pipeline in one process, see above", _named(limit)))
    text = _table(("", "does", "versions"), rows, "---")
    failures = [f"- {gap.name}: {gap.error.strip().splitlines()[-1]}" for gap in gaps]
    return "\n".join([text, "", "Not measured:", "", *failures]) if failures else text


def _named(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items()) or "not installed"


def _chart(results: Results) -> str:
    """Rows per second at 1 million rows, or at the largest size that was measured."""
    found = {entry.name: entry for entry in results.measured}
    groups: dict[str, dict[str, float]] = {}
    for path in PATHS:
        title = f"{path.title}, {SIZES[MILLION]}: "
        if floor := found.get(f"{title}queued -> completed / limit"):
            speeds = {"batchserve": MILLION / floor.ours, "limit": MILLION / floor.reference}
            for name, entry in found.items():
                match = VERSUS.fullmatch(name.removeprefix(title))
                if match and name.startswith(title):
                    speeds[match["peer"] + (" (HTTP)" if match["peer"] in REMOTE else "")] = entry.reference
            groups[path.title] = speeds
    return chart.bars(
        "Rows per second from file to file, 1 million rows (each path with its own scale)",
        groups,
        ours="batchserve",
        shown=figure,
    )


def _of_a_path(name: str) -> bool:
    return any(name.startswith(path.title) for path in PATHS)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> str:
    """Markdown. `sides`: for each column `:` where it is a column of figures, else `-`."""
    ruler = "|".join("---:" if side == ":" else "---" for side in sides)
    lines = [f"| {' | '.join(heading)} |", f"|{ruler}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(absent)"
