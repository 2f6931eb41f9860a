"""The harness of the benchmarks measures correctly; speed itself is not tested here."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from starlette.testclient import TestClient
from waiting import until

from benchmarks import bare, chart, data, history, paths, processes, report
from benchmarks.environments import Unavailable
from benchmarks.goals import GOALS, goal_of
from benchmarks.results import Gap, Measurement, Results

ROOT = Path(__file__).resolve().parent.parent
ROWS = 2000
MIB = 2**20
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


def program(tmp_path: Path, source: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(source)
    return path


def test_a_goal_is_met_on_its_own_side_only() -> None:
    slow = Measurement("CSV -> LR -> CSV, 1 million rows: queued -> completed / limit", 1.3, 1.0, "s")
    quick = Measurement("CSV -> LR -> CSV, 1 million rows: queued -> completed / limit", 0.7, 1.0, "s")
    behind = Measurement("CSV -> LR -> CSV, 1 million rows: speed / Ray Data", 14, 1, "rows/s")
    ahead = Measurement("CSV -> LR -> CSV, 1 million rows: speed / Ray Data", 16, 1, "rows/s")
    assert [m.missed for m in (slow, quick, behind, ahead)] == [True, False, True, False]


def test_a_missed_stretch_goal_is_not_a_failure() -> None:
    wish = Measurement("CSV -> LR -> CSV, 1 million rows: one call, download / limit over HTTP", 1.1, 1.0, "s")
    assert wish.met is False
    assert not wish.missed


def test_a_forest_has_the_tighter_goal() -> None:
    forest = goal_of("CSV -> 100-tree forest -> Parquet, 10 million rows: queued -> completed / limit")
    assert forest is not None
    assert forest.ratio == 1.1


def test_a_measurement_without_a_goal_is_shown_and_never_missed() -> None:
    small = Measurement("CSV -> LR -> CSV, 10 thousand rows: queued -> completed / limit", 3, 1, "s")
    assert small.as_json()["goal"] is None
    assert not small.missed
    assert "3.00" in small.cells()


def test_the_goal_is_fifteen_times_at_one_million_rows_and_not_slower_elsewhere() -> None:
    names = [f"CSV -> LR -> CSV, {size}: speed / BentoML" for size in paths.SIZES.values()]
    goals = {name: goal.ratio for name in names if (goal := goal_of(name))}
    assert goals == dict(zip(names, [1, 1, 15, 1], strict=True))


def test_every_goal_is_that_of_a_measurement_in_the_code() -> None:
    """The names in a goal are those that the harness uses."""
    written = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py") if path.name != "goals.py")
    for goal in GOALS:
        compared = goal.pattern.strip("*").rpartition(" / ")[2]
        peers = [peer.name for peer in (*paths.SCRIPT_PEERS, *paths.SYSTEM_PEERS)]
        assert compared.strip("*") in [*peers, ""] or compared in written, goal.pattern


def test_a_file_of_figures_is_a_list_with_goals_and_whether_they_are_met(tmp_path: Path) -> None:
    title = "CSV -> LR -> CSV, 1 million rows:"
    results = Results()
    results.add(
        [
            Measurement(f"{title} queued -> completed / limit", 1.3, 1.0, "s", 400 * MIB, None, 3, 3),
            Measurement("online, 1 row: mean / bare Starlette route", 1.0, 0.5, "ms"),
            Gap(f"{title} speed / Ray Data", "it does not install"),
            Gap("NDJSON -> LR -> NDJSON, 1 million rows: queued -> completed / limit", "the job failed", ours=True),
        ]
    )
    results.write(tmp_path / "bench.json")
    written = json.loads((tmp_path / "bench.json").read_text())
    asked = ("name", "ours", "reference", "ratio", "goal", "met")
    assert [tuple(entry[name] for name in asked) for entry in written] == [
        (f"{title} queued -> completed / limit", 1.3, 1.0, 1.3, 0.8, False),
        ("online, 1 row: mean / bare Starlette route", 1.0, 0.5, 2.0, None, None),
        (f"{title} speed / Ray Data", None, None, None, 15, None),
        ("NDJSON -> LR -> NDJSON, 1 million rows: queued -> completed / limit", None, None, None, 0.9, False),
    ]
    assert [entry.name.partition(",")[0] for entry in results.missed] == ["CSV -> LR -> CSV", "NDJSON -> LR -> NDJSON"]
    assert Results.read([tmp_path / "bench.json"]) == results


def test_a_history_gets_a_line_for_each_figure_with_machine_and_revision(tmp_path: Path) -> None:
    results, path = Results(), tmp_path / "history.jsonl"
    results.add([Measurement("online, 1 row: mean / bare Starlette route", 1.0, 0.5, "ms"), Gap("images", "none here")])
    history.append(results, path)
    history.append(results, path)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second
    assert (first["name"], first["ratio"], first["unit"]) == ("online, 1 row: mean / bare Starlette route", 2.0, "ms")
    assert first["machine"].endswith(" cores")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", first["at"])
    assert first["revision"]


def test_a_page_is_made_of_the_figures_of_several_runs(tmp_path: Path) -> None:
    first, second = Results(), Results()
    title = "CSV -> LR -> CSV, {}: queued -> completed / limit"
    lost = title.format("10 million rows")
    first.add(
        [
            Measurement(title.format("1 million rows"), 0.5, 0.4, "s", 400 * MIB, 300 * MIB, 3, 3),
            Measurement("CSV -> LR -> CSV, 1 million rows: speed / MLServer", 1e6, 4e4, "rows/s"),
            Gap("CSV -> LR -> CSV, 1 million rows: speed / Ray Data", "it does not install: no such wheel"),
            Gap(lost, "broken off", ours=True),
            Measurement("online, 1 row, 1 client: median / 0.5 ms", 0.0123, 0.5, "ms"),
        ]
    )
    second.add([Measurement(lost, 6.0, 4.0, "s", 480 * MIB, 300 * MIB, 2, 2)])
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    first.write(files[0])
    second.write(files[1])
    report.write(tmp_path, Results.read(files), tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert (
        "| CSV -> LR -> CSV: seconds at 10 million rows / at 1 million | 6 s | 0.5 s | 12.00 | at most 10.5 | no |"
        in page
    )
    assert "| **batchserve** | 0.5 | 2,000,000 | 419 | 3 |" in page
    assert "| limit | 4 | 2,500,000 | 315 | 2 |" in page
    assert "| MLServer | 25 | 40,000 |" in page
    assert "- CSV -> LR -> CSV, 1 million rows: speed / Ray Data: it does not install: no such wheel" in page
    assert "broken off" not in page
    online = "| online, 1 row, 1 client: median / 0.5 ms | 0.0123 ms | 0.5 ms | 0.0246 | at most 1 | yes |"
    assert online in page.partition("## Online predictions")[2].partition("\n## ")[0]
    assert page.count(online) == 1
    assert report.NOTES.read_text().strip() in page.partition("## Missed goals")[2].partition("\n## ")[0]
    drawn = ElementTree.parse(tmp_path / "benchmarks.svg").getroot()  # noqa: S314
    assert {"limit", "batchserve", "MLServer (HTTP)"} <= {text.text for text in drawn.iter(f"{SVG}text")}


@pytest.mark.slow
def test_a_path_that_fails_is_recorded_and_makes_the_run_fail(tmp_path: Path) -> None:
    (tmp_path / "numbers-2000.partial").mkdir()  # where the input would be made
    written = tmp_path / "bench.json"
    options = ["--only", "Parquet -> LR", "--rows", ROWS, "--folder", tmp_path, "--json", written]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    (entry,) = json.loads(written.read_text())
    assert entry["name"] == "Parquet -> LR -> Parquet, 2000 rows: queued -> completed / limit"
    assert entry["met"] is False
    assert "IsADirectoryError" in entry["error"]


def test_growth_compares_ten_million_rows_with_one_million() -> None:
    title = "CSV -> LR -> CSV, {}: queued -> completed / limit"
    measured = [
        Measurement(title.format("1 million rows"), 0.5, 0.4, "s", our_peak=400 * MIB),
        Measurement(title.format("10 million rows"), 6.0, 4.0, "s", our_peak=480 * MIB),
    ]
    assert [(m.ratio, m.missed) for m in paths.growth(measured)] == [(12.0, True), (1.2, True)]


@pytest.mark.slow
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


@pytest.mark.slow
def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    started = program(
        tmp_path,
        "import mmap, os, time\n"
        "held = mmap.mmap(-1, 100 * 2**20)\n"
        "for at in range(0, len(held), 4096): held[at] = 1\n"
        "child = os.fork()\n"
        "for at in range(0, len(held), 4096): held[at]\n"
        "time.sleep(1)\n"
        "if child: print(0.5)",
    )
    _, peaks = processes.timed_script(Path(sys.executable), started, timeout=30)
    assert 100 * MIB < peaks.together < 150 * MIB


@pytest.mark.slow
def test_a_script_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    child = f"import time; time.sleep(60); {str(tmp_path)!r}"
    source = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    before = time.monotonic()
    with pytest.raises(Unavailable, match="more than 1 s"):
        processes.timed_script(Path(sys.executable), program(tmp_path, source), timeout=1)
    assert time.monotonic() - before < 20
    until(lambda: not any(child.encode() in _read(entry) for entry in Path("/proc").glob("[0-9]*/cmdline")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_script_that_fails_is_reported_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="ended with 1: ValueError: no such thing"):
        processes.timed_script(Path(sys.executable), program(tmp_path, "raise ValueError('no such thing')"), timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("path", paths.PATHS, ids=lambda path: path.title)
def test_the_scripts_of_users_agree_with_each_other(folder: Path, path: paths.TablePath) -> None:
    model = data.model(folder, path.model)
    source = data.table(folder, path.kind, path.source, ROWS)
    results = []
    for peer in paths.SCRIPT_PEERS:
        if path.title in peer.most:
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


def test_the_floor_of_online_predictions_answers_as_the_model_does(
    iris_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(bare.MODEL, str(iris_onnx))
    with TestClient(bare.app) as client:
        answer = client.post("/predict", json=[{"a": 5.1, "b": 3.5, "c": 1.4, "d": 0.2}]).json()
    (record,) = answer["prediction"]
    assert (record["a"], record["prediction"]) == (5.1, "setosa")
    assert sum(record["probabilities"]) == pytest.approx(1)


def test_a_chart_has_a_bar_for_every_figure() -> None:
    groups = {"CSV -> LR": {"ours": 0.8, "limit": 1.0}, "a < b & c": {"limit": 7.0}}
    drawn = ElementTree.fromstring(chart.bars("Speed", groups, "ours"))  # noqa: S314
    bars = drawn.findall(f"{SVG}rect")[1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([0.8 * widths[1], widths[1], widths[1]])
    assert [bar.attrib["class"] for bar in bars] == ["ours", "theirs", "theirs"]
    assert "a < b & c" in [text.text for text in drawn.findall(f"{SVG}text")]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_exit_code_of_the_benchmarks_reports_missed_goals(tmp_path: Path) -> None:
    """With new environments: it needs a package index, and nginx or its Debian package."""
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
        assert "error" not in entry, entry["error"]
        assert entry["ratio"] == pytest.approx(entry["ours"] / entry["reference"], rel=2e-3)
    stretch = {goal.pattern for goal in GOALS if goal.stretch}
    missed = [
        entry
        for entry in measured
        if entry["met"] is False and goal_of(entry["name"]).pattern not in stretch  # type: ignore[union-attr]
    ]
    assert done.returncode == bool(missed), done.stderr
