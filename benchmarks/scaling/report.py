"""The figures as a page: costs, what saturates first, a check of the simulation, and simulated clusters."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import ceil

from benchmarks import history
from benchmarks.results import MB, figure
from benchmarks.scaling.chunks import Dispatch
from benchmarks.scaling.simulation import PARTS, Cluster, Costs, simulate
from benchmarks.scaling.sites import Measured, Site

__all__ = ["page"]

SLOW = 1.0
"""Seconds of a chunk of a slower model, which is simulated as well."""
HOSTS = (1, 10, 30, 100, 300, 1000)
SPLITS = ((1, 1), (8, 1), (8, 2), (8, 4))
"""Jobs and drivers."""
JOBS = 8
"""Of which one is assembled while others are scored."""
BUSY = 0.5
"""Load average of a machine on which something else runs."""
PAYS = 0.9
"""Share of the time with one driver below which a second one pays."""


def page(found: Measured, rows: int, hosts: int) -> str:
    """Markdown. `rows`, `hosts`: of the simulated runs."""
    parts = (_conditions(found), *_costs(found), *_limits(found), *_check(found), *_clusters(found, rows, hosts))
    return "\n\n".join(parts)


def _conditions(found: Measured) -> str:
    sizes = found.sizes
    busy = ", so **the machine was busy**: these costs are upper bounds" if found.load > BUSY else ""
    when = f"Measured on {datetime.now(UTC):%-d %B %Y} by `python -m benchmarks.scaling` on {history.processor()}"
    job = f"{sizes.rows:,} rows of 21 columns, Parquet to Parquet, logistic regression, {sizes.processes} processes"
    missing = [f"Not measured: {what}: {reason}." for what, reason in found.missing.items()]
    return "\n".join([f"{when}; load average before: {found.load:.1f}{busy}. The job: {job}.", *missing])


# --- costs ---


def _costs(found: Measured) -> Iterator[str]:
    yield "### Milliseconds of a chunk"
    rows = {
        "claim of a job": [site.database.claim for site in found.sites],
        "plan, in a scoring process": [site.chunks.plan for site in found.sites],
        "plan of CSV, which is read for it": [site.text.plan for site in found.sites],
        "plan, in the database": [site.database.plan for site in found.sites],
        "read of its input": [site.chunks.read for site in found.sites],
        "scoring and encoding": [site.chunks.score for site in found.sites],
        "write of its part": [site.chunks.write for site in found.sites],
        "commit": [site.database.commit for site in found.sites],
        "driver, with commit and plan": [site.database.driver for site in found.sites],
        "assembly of its part": [site.chunks.assemble for site in found.sites],
    }
    yield _table(["", *(site.name for site in found.sites)], ([name, *map(_ms, cells)] for name, cells in rows.items()))
    sizes = "; ".join(
        f"of {kind.format}: {kind.chunks} of {kind.input_bytes / MB:.1f} MB, parts of {kind.part_bytes / MB:.1f} MB"
        for kind in (found.sites[0].chunks, found.sites[0].text)
    )
    yield f"Chunks {sizes}."
    yield "### A call that does nothing"
    yield _table(
        ["engine", "calls per second", "driver's CPU, ms", "round trip, ms"],
        ([name, figure(each.calls), _ms(each.cpu), _ms(each.round_trip)] for name, each in _engines(found)),
    )


def _engines(found: Measured) -> list[tuple[str, Dispatch]]:
    return [("local", found.local), *([("Ray, 2 hosts", found.ray)] if found.ray else [])]


def _limits(found: Measured) -> Iterator[str]:
    yield "### What saturates first"
    columns = {
        f"{site.name}, {engine}": _limits_of(site, site.costs(dispatch), found.sizes.processes)
        for site in found.sites
        for engine, dispatch in _engines(found)
    }
    names = list(next(iter(columns.values())))
    yield _table(["", *columns], ([name, *(column[name] for column in columns.values())] for name in names))


def _limits_of(site: Site, costs: Costs, processes: int) -> dict[str, str]:
    """By their names."""
    process = costs.read + costs.score + costs.write
    driver = 1 / (costs.driver + costs.commit)
    return {
        "chunks per second of a driver": figure(driver),
        "chunks per second that are planned of a job": figure(1 / costs.plan),
        "commits per second of the database": figure(costs.commits),
        "parts per second of an assembly": figure(1 / costs.assemble),
        f"MB/s of the storage with {processes} processes": figure(_throughput(site, processes) / MB),
        "processes that a driver keeps busy with this model": figure(driver * process),
        f"processes that a driver keeps busy with chunks of {SLOW:g} s": figure(driver * SLOW),
        "processes that the database keeps busy with this model": figure(costs.commits * process),
    }


def _throughput(site: Site, processes: int) -> float:
    """Bytes per second that the storage moved for the measured processes; it may move more for more of them."""
    costs = site.chunks
    return processes * (costs.input_bytes + costs.part_bytes) / (costs.read + costs.write)


# --- the simulation ---


def _check(found: Measured) -> Iterator[str]:
    yield "### Simulated and measured"
    rows = []
    for site in found.sites:
        seconds = sorted(site.seconds)
        middle = seconds[len(seconds) // 2]
        predicted = site.predicted(found.local, found.sizes.processes)
        spread = f"{seconds[0]:.2f} … {seconds[-1]:.2f}"
        rows.append(
            [site.name, f"{predicted:.2f}", f"{middle:.2f}", spread, f"{100 * (predicted / middle - 1):+.0f} %"]
        )
    yield _table(["", "simulated, s", "measured, s", "runs", "error"], rows)


def _clusters(found: Measured, rows: int, hosts: int) -> Iterator[str]:
    site = found.sites[-1]
    name, dispatch = _engines(found)[-1]
    costs, per_chunk = site.costs(dispatch), found.sizes.rows / site.chunks.chunks
    chunks, processes = ceil(rows / per_chunk), found.sizes.processes
    slow = replace(costs, score=SLOW)
    yield f"### {rows:,} rows on {hosts} hosts"
    yield (
        f"{chunks:,} chunks of {per_chunk:,.0f} rows, {processes} processes on each host, {site.name}, engine {name}. "
        "Several jobs have equal shares of the rows, and drivers equal shares of the jobs."
    )
    runs = []
    for title, each, bandwidth in (
        ("this storage", costs, _throughput(site, processes)),
        ("a storage that serves each host as fast", costs, None),
        (f"the same, chunks of {SLOW:g} s", slow, None),
    ):
        for jobs, drivers in SPLITS:
            run = simulate(chunks, each, Cluster(hosts, processes, jobs, drivers, bandwidth))
            times = figure(run.seconds), figure(rows / run.seconds)
            shares = [f"{100 * share:.0f} %" for share in run.shares.values()]
            runs.append([title, f"{jobs}, {drivers}", *times, *shares, run.bottleneck])
    yield _table(["", "jobs, drivers", "seconds", "rows/s", *PARTS, "busiest"], runs)
    yield f"### A second driver for {JOBS} jobs"
    yield _second_driver(chunks, processes, {"this model": costs, f"chunks of {SLOW:g} s": slow})


def _second_driver(chunks: int, processes: int, models: dict[str, Costs]) -> str:
    """The simulated times by the number of hosts, with a storage that limits nothing."""
    lines = []
    for title, costs in models.items():
        for hosts in HOSTS:
            one, two = (simulate(chunks, costs, Cluster(hosts, processes, JOBS, drivers)) for drivers in (1, 2))
            times = figure(one.seconds), f"{100 * one.shares['driver']:.0f} %", figure(two.seconds)
            lines.append([title, str(hosts), *times, "yes" if two.seconds < PAYS * one.seconds else "no"])
    return _table(["", "hosts", "1 driver, s", "it is busy", "2 drivers, s", "the second pays"], lines)


# --- text ---


def _ms(seconds: float) -> str:
    return figure(1000 * seconds)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
