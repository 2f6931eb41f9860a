"""The harness of the benchmarks measures what it says; how fast anything is, is not tested here."""

import json
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from benchmarks import chart, data, paths, processes
from benchmarks.environments import Unavailable
from benchmarks.goals import GOALS, goal_of
from benchmarks.results import Measurement, as_markdown

ROOT = Path(__file__).resolve().parent.parent
ROWS = 2000
MIB = 2**20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def program(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(source)
    return path


def test_a_goal_is_met_on_its_own_side_only() -> None:
    slow = Measurement("CSV -> LR -> CSV, 1 million rows: queued -> completed / limit", 1.3, 1.0, "s")
    quick = Measurement("CSV -> LR -> CSV, 1 million rows: queued -> completed / limit", 1.2, 1.0, "s")
    behind = Measurement("CSV -> LR -> CSV, 1 million rows: speed / Ray Data", 14, 1, "rows/s")
    ahead = Measurement("CSV -> LR -> CSV, 1 million rows: speed / Ray Data", 16, 1, "rows/s")
    assert [m.missed for m in (slow, quick, behind, ahead)] == [True, False, True, False]
    assert slow.as_json() == {
        "name": slow.name, "ours": 1.3, "reference": 1.0, "ratio": 1.3, "goal": 1.25, "met": False,
    }  # fmt: skip


def test_a_missed_stretch_goal_is_no_failure() -> None:
    wish = Measurement("CSV -> LR -> CSV, 1 million rows: one call, download / limit over HTTP", 1.1, 1.0, "s")
    assert wish.met is False
    assert not wish.missed


def test_a_forest_has_the_tighter_goal() -> None:
    forest = goal_of("CSV -> 100-tree forest -> Parquet, 10 million rows: queued -> completed / limit")
    assert forest is not None
    assert forest.ratio == 1.1


def test_what_has_no_goal_is_shown_and_never_missed() -> None:
    small = Measurement("CSV -> LR -> CSV, 10 thousand rows: queued -> completed / limit", 3, 1, "s")
    assert small.as_json()["goal"] is None
    assert not small.missed
    assert "3.00" in as_markdown([small])


def test_growth_compares_ten_million_rows_with_one_million() -> None:
    title = "CSV -> LR -> CSV, {}: queued -> completed / limit"
    measured = [
        Measurement(title.format("1 million rows"), 0.5, 0.4, "s", our_peak=400 * MIB),
        Measurement(title.format("10 million rows"), 6.0, 4.0, "s", our_peak=480 * MIB),
    ]
    assert [(m.ratio, m.missed) for m in paths.growth(measured)] == [(12.0, True), (1.2, True)]


def test_memory_is_that_of_a_script_and_its_children_together(tmp_path: Path) -> None:
    source = "held = bytearray(100 * 2**20); import time; time.sleep(1)"
    started = program(
        tmp_path,
        f"import subprocess, sys\n{source.partition(';')[0]}\n"
        f"subprocess.run([sys.executable, '-c', {source!r}], check=True)\nprint('said'); print(0.5)",
    )
    seconds, peaks = processes.timed_script(Path(sys.executable), started, timeout=30)
    assert seconds == 0.5
    assert 200 * MIB < peaks.together < 300 * MIB


def test_a_script_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    source = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    before = time.monotonic()
    with pytest.raises(Unavailable, match="more than 1 s"):
        processes.timed_script(Path(sys.executable), program(tmp_path, source), timeout=1)
    assert time.monotonic() - before < 20
    assert not [
        entry for entry in Path("/proc").glob("[0-9]*/cmdline") if child.encode() in _read(entry)
    ]  # fmt: skip


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_script_that_fails_is_reported_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ended with 1: ValueError: no such thing"):
        processes.timed_script(Path(sys.executable), program(tmp_path, "raise ValueError('no such thing')"), timeout=30)


EVERY_PATH = [
    pytest.param(path, id=path.title, marks=[pytest.mark.slow] if number else [])
    for number, path in enumerate(paths.PATHS)
]


@pytest.mark.parametrize("path", EVERY_PATH)
def test_the_scripts_of_users_agree_with_each_other(folder: Path, path: paths.TablePath) -> None:
    model = data.model(folder, path.model)
    source = data.table(folder, path.kind, path.source, ROWS)
    results = []
    for peer in paths.SCRIPT_PEERS:
        if path.title in peer.paths:
            target = folder / f"{peer.script}{path.target}"
            chosen = model.pickled if peer.pickled else model.graph
            processes.timed_script(
                Path(sys.executable), paths.SCRIPTS / peer.script, chosen, source, target, timeout=60
            )
            results.append(read(target))
    assert results[0].height == ROWS
    assert results[0]["prediction"].n_unique() == 3
    for result in results[1:]:
        assert_frame_equal(result, results[0], check_dtypes=False, abs_tol=1e-5)


def read(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    return pl.read_csv(path) if path.suffix == ".csv" else pl.read_ndjson(path)


def test_a_chart_has_a_bar_for_every_figure() -> None:
    groups = {"CSV -> LR": {"limit": 1.0, "ours": 0.8}, "a < b & c": {"limit": 1.0}}
    drawn = ElementTree.fromstring(chart.bars("Speed", groups, ["limit", "ours"]))  # noqa: S314
    bars = drawn.findall("{http://www.w3.org/2000/svg}rect")[1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([widths[0], 0.8 * widths[0], widths[0]])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmarks_run_and_tell_by_their_exit_code_what_is_missed(tmp_path: Path) -> None:
    """With environments made anew: it needs a package index, and nginx or Debian's package of it."""
    written = tmp_path / "bench.json"
    options = ["--rows", str(ROWS), "--repeats", "1", "--seconds", "0.3", "--folder", tmp_path, "--json", written]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert written.exists(), done.stderr
    measured = json.loads(written.read_text())
    names = {entry["name"] for entry in measured}
    assert {f"{path.title}, {ROWS} rows: queued -> completed / limit" for path in paths.PATHS} <= names, done.stderr
    assert "status polls, idle: requests per second / bare Starlette route" in names
    for entry in measured:
        assert entry["ratio"] == pytest.approx(entry["ours"] / entry["reference"], rel=2e-3)
    stretch = {goal.pattern for goal in GOALS if goal.stretch}
    missed = [
        entry
        for entry in measured
        if entry["met"] is False and goal_of(entry["name"]).pattern not in stretch  # type: ignore[union-attr]
    ]
    assert done.returncode == bool(missed), done.stderr
