"""Many files at once, on the command line and in Python: a result for each, and a run continues where another ended."""

import asyncio
import gzip
import json
import os
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import onnx
import pandas as pd
import polars as pl
import pytest
from commands import Done, Run, in_this_process, on_terminal

from batchserve import AsyncClient, Client
from batchserve.api.files import input_stem
from batchserve.client import ConnectionFailed, FilesFailed, Job, JobError, JobFailed
from batchserve.client.inputs import find_inputs
from batchserve.client.ledger import LEDGER, Entry, FileBytes, Ledger, bytes_of
from batchserve.client.names import safe_name, stem_of
from batchserve.errors import InvalidInput

ROWS = 10


@pytest.fixture
def run(server: str, tmp_path: Path) -> Run:
    """Runs `batchserve` with these arguments in the process of the test, in an empty folder."""
    return partial(in_this_process, tmp_path, BATCHSERVE_URL=server)


@pytest.fixture(scope="module", autouse=True)
def _models(server: str, iris_onnx: Path, reviews_onnx: bytes) -> None:
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris")
        client.models.add(reviews_onnx, name="reviews")


@pytest.fixture
def client(server: str) -> Iterator[Client]:
    with Client(server) as client:
        yield client


class Tables:
    """Files of flowers in a folder, no two of them equal, and the jobs that were made of them."""

    def __init__(self, folder: Path, iris: pd.DataFrame, client: Client) -> None:
        self.folder, self._iris, self._client = folder, iris, client
        self.tag = uuid.uuid4().hex
        self._made = 0

    def write(self, *names: str, broken: int | None = None) -> None:
        for name in names:
            self._made += 1
            frame = self._iris.sample(ROWS, random_state=self._made).astype(object)
            if broken is not None:
                frame.iloc[broken, 1] = "tall"
            frame.insert(0, "flower", [f"{self.tag}-{self._made}-{row}" for row in range(ROWS)])
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".parquet"):
                frame.astype(dict.fromkeys(self._iris, float)).to_parquet(path)
            elif name.endswith(".gz"):
                path.write_bytes(gzip.compress(frame.to_csv(index=False).encode(), mtime=0))
            else:
                frame.to_csv(path, index=False)

    @property
    def options(self) -> list[str]:
        """Those by which the jobs are found."""
        return ["--model", "iris", "--metadata", f"tag={self.tag}"]

    def jobs(self) -> list[Job]:
        return list(self._client.jobs.list(q=self.tag))

    def flowers(self, name: str) -> list[str]:
        path = self.folder / name
        frame = pd.read_parquet(path) if name.endswith(".parquet") else pd.read_csv(path)
        flowers: list[str] = frame["flower"].tolist()
        return flowers


@pytest.fixture
def tables(tmp_path: Path, iris: pd.DataFrame, client: Client) -> Tables:
    return Tables(tmp_path / "in", iris, client)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def states(done: Done) -> dict[str, str]:
    """The state of each file, by its name."""
    return {Path(file).name: state for file, state, *_ in (line.split("\t") for line in done.stdout.splitlines())}


def result_of(path: Path) -> list[str]:
    content = path.read_bytes()  # polars takes some names for patterns
    frame = pl.read_parquet(content) if path.suffix == ".parquet" else pl.read_csv(content)
    assert frame["prediction"].null_count() == 0
    flowers: list[str] = frame["flower"].to_list()
    return flowers


# --- a result for each file ------------------------------------------------------------------------------------------


def test_a_folder_of_tables_gives_a_result_for_each_under_its_name(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.parquet", "deep/er/c.2026.11.csv.gz")
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 0, done.stderr
    results = {
        "a.csv": "a.predictions.csv",
        "b.parquet": "b.predictions.parquet",
        "deep/er/c.2026.11.csv.gz": "deep/er/c.2026.11.predictions.csv",
    }
    assert names_in(tmp_path / "out") == {*results.values(), LEDGER}
    for name, result in results.items():
        assert result_of(tmp_path / "out" / result) == tables.flowers(name), name
    assert set(states(done).values()) == {"completed"}
    assert "3 files by iris@1: 3 completed. 30 rows, 30 ok, 0 failed. Results: out" in done.stderr
    assert len(tables.jobs()) == 3


def test_named_files_are_a_job_each_and_named_once_however_often_they_are_given(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("x/a.csv", "y/b.csv")
    done = run("predict", "in/x/a.csv", "in/y/b.csv", "in/y", "-o", "out/", "--json", *tables.options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["model"] == "iris@1"
    assert [(file["file"], file["state"], file["rows"]) for file in told["files"]] == [
        ("in/x/a.csv", "completed", {"total": 10, "ok": 10, "failed": 0}),
        ("in/y/b.csv", "completed", {"total": 10, "ok": 10, "failed": 0}),
    ]
    assert [file["result"] for file in told["files"]] == ["out/a.predictions.csv", "out/b.predictions.csv"]
    assert {file["job"] for file in told["files"]} == {job.id for job in tables.jobs()}
    assert names_in(tmp_path / "out") == {"a.predictions.csv", "b.predictions.csv", LEDGER}


ODD = [
    "with space.csv", "snow ☃ é.csv", "100%25.csv", "-dash.csv", "a.b.c.csv", "quote\"'`$HOME.csv", "[red]x[/].csv",
    "tab\tand\nline.csv", os.fsdecode(b"caf\xe9.csv"), f"{'n' * 200}.csv",
]  # fmt: skip


def test_odd_names_of_files_are_kept(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write(*ODD)
    done = run("predict", "in", "-o", "out", "--json", *tables.options)
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "out") == {f"{name.removesuffix('.csv')}.predictions.csv" for name in ODD} | {LEDGER}
    for name in ODD:
        assert result_of(tmp_path / "out" / f"{name.removesuffix('.csv')}.predictions.csv") == tables.flowers(name)
    assert "unchanged" in run("predict", "in", "-o", "out", *tables.options).stdout
    assert len(tables.jobs()) == len(ODD)


def test_control_characters_of_a_name_are_escaped_in_a_list(run: Run, tables: Tables) -> None:
    tables.write("n\nl.csv", "e\x1b[31mt\t.csv", "ü 1.csv")
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 0, done.stderr
    assert set(states(done)) == {"n\\nl.csv", "e\\x1b[31mt\\t.csv", "ü 1.csv"}


def test_a_name_that_begins_with_a_dash_is_given_behind_two(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("-a.csv", "-b.csv")
    done = run("predict", "-o", "out", *tables.options, "--", *(f"-{name}.csv" for name in "ab"))
    assert done.returncode == 2  # they are in another folder
    (tmp_path / "in" / "-a.csv").rename(tmp_path / "-a.csv")
    (tmp_path / "in" / "-b.csv").rename(tmp_path / "-b.csv")
    done = run("predict", "-o", "out", *tables.options, "--", "-a.csv", "-b.csv")
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "out") == {"-a.predictions.csv", "-b.predictions.csv", LEDGER}


def test_two_files_whose_results_would_have_one_name_are_refused_before_anything_is_sent(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "a.parquet", "b.csv", "other/b.csv")
    for paths, both in (
        ("in", ("in/a.csv", "in/a.parquet")),
        ("in/b.csv in/other/b.csv", ("in/b.csv", "in/other/b.csv")),
    ):
        done = run("predict", *paths.split(), "-o", "out", *tables.options)
        assert done.returncode == 1
        assert f"the results of '{both[0]}' and '{both[1]}' would have one name" in done.stderr
    assert tables.jobs() == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ([], "name a folder for them with -o"),
        (["-o", "-"], "need a folder, got '-'"),
        (["-o", "out.csv"], "need a folder, got 'out.csv'"),
        (["-o", "in/a.csv"], "need a folder, got 'in/a.csv'"),
    ],
)
def test_several_results_need_a_folder(run: Run, tables: Tables, output: list[str], said: str) -> None:
    tables.write("a.csv", "b.csv")
    done = run("predict", "in", *output, *tables.options)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert tables.jobs() == []


def test_tables_among_images_are_refused_with_one_of_each(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    (tmp_path / "in" / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 1
    assert "'in/a.csv' and 1 more would be a job each, and 'in/photo.png' one job of images" in done.stderr
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "README.txt").write_text("no table")
    done = run("predict", "none", "-o", "out", *tables.options)
    assert done.returncode == 1
    assert "there are no tables and no images in 'none'" in done.stderr


def test_what_is_no_input_is_named_and_what_cannot_be_read_fails_alone(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "elsewhere/linked.csv", ".hidden.csv", ".hidden/x.csv", "~$book.csv")
    folder = tables.folder
    (folder / "elsewhere").rename(tmp_path / "elsewhere")
    (folder / "link.csv").symlink_to(tmp_path / "elsewhere" / "linked.csv")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.csv").symlink_to(tmp_path / "nowhere.csv")
    (folder / "README.txt").write_text("no table")
    (folder / "empty.csv").touch()
    os.mkfifo(folder / "pipe.csv")
    done = run("predict", "in", "-o", "out", "--json", *tables.options)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert {Path(one["file"]).name: one["reason"] for one in told["left_out"]} == {
        ".hidden.csv": "hidden",
        ".hidden": "hidden",
        "~$book.csv": "hidden",
        "README.txt": "its suffix is not that of a table or an image",
        "folder": "a link to a folder: name it to have its files scored",
        "pipe.csv": "not a regular file",
    }
    assert "Left out: in/README.txt (its suffix is not that of a table or an image)" in done.stderr
    failed = {Path(file["file"]).name: file["error"]["message"] for file in told["files"] if file["error"]}
    assert failed == {
        "empty.csv": "the file is empty: expected a header or records, got 0 bytes",
        "gone.csv": "the file is a link to nothing",
    }
    assert "in/gone.csv: the file is a link to nothing" in done.stderr
    assert names_in(tmp_path / "out") == {"a.predictions.csv", "link.predictions.csv", LEDGER}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_fails_alone(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    (tmp_path / "in" / "b.csv").chmod(0)
    done = run("predict", "in", "-o", "out", *tables.options)
    assert (done.returncode, states(done)) == (1, {"a.csv": "completed", "b.csv": "failed"})
    assert "Permission denied" in done.stderr


def test_a_file_whose_result_would_have_too_long_a_name_fails_alone(run: Run, tmp_path: Path, tables: Tables) -> None:
    long = f"{'n' * 240}.csv"
    tables.write(long, *(f"z{number}.csv" for number in range(9)))
    for state in ("completed", "unchanged"):
        done = run("predict", tables.folder, "-o", tmp_path / "out", *tables.options)
        assert done.returncode == 1
        assert states(done) == {long: "failed"} | {f"z{number}.csv": state for number in range(9)}
        assert "File name too long" in done.stderr


def test_a_folder_of_images_stays_one_job_and_names_what_it_leaves_out(run: Run, tmp_path: Path) -> None:
    for name in ("photos/b/2.png", "photos/1.jpg", "photos/notes.txt", "photos/more.zip"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    columns = ("--model", "reviews", "--columns", "file", "--passthrough", "file")
    done = run("predict", "photos", "-o", "out/", *columns)
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "out") == {"photos.predictions.jsonl"}
    assert "Left out: photos/notes.txt" in done.stderr
    assert "Left out: photos/more.zip (an archive next to images)" in done.stderr


# --- files that fail -------------------------------------------------------------------------------------------------


def test_a_bad_file_does_not_stop_the_others_and_the_worst_error_gives_the_code(
    run: Run, tmp_path: Path, tables: Tables, iris: pd.DataFrame
) -> None:
    tables.write("good.csv", "last.csv")
    tables.write("one.csv", broken=3)
    iris.iloc[:ROWS].assign(**{iris.columns[0]: ""}).to_csv(tables.folder / "hopeless.csv", index=False)
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 7, done.stderr
    expected = {"good.csv": "completed", "last.csv": "completed", "one.csv": "completed", "hopeless.csv": "failed"}
    assert states(done) == expected
    assert "in/hopeless.csv: job " in done.stderr
    assert "4 files by iris@1: 3 completed, 1 failed. 30 rows, 29 ok, 1 failed" in done.stderr
    (error,) = [json.loads(line) for line in (tmp_path / "out" / "one.errors.jsonl").read_text().splitlines()]
    assert (error["record"], error["column"]) == (3, iris.columns[1])
    assert names_in(tmp_path / "out") == {
        "good.predictions.csv", "last.predictions.csv", "one.predictions.csv", "one.errors.jsonl", LEDGER,
    }  # fmt: skip
    (tables.folder / "bad.csv").write_text("a,b\n1,2\n")
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 1
    assert states(done) == expected | {
        "good.csv": "unchanged", "last.csv": "unchanged", "one.csv": "unchanged", "bad.csv": "failed",
    }  # fmt: skip
    assert "in/bad.csv: " in done.stderr
    assert "petal width (cm)" in done.stderr
    tables.write("bad.csv", "hopeless.csv", "one.csv")
    done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 0, done.stderr
    assert names_in(tmp_path / "out") == {
        f"{name}.predictions.csv" for name in ("bad", "good", "hopeless", "last", "one")
    } | {LEDGER}


def test_an_earlier_result_stays_when_its_changed_file_fails_and_is_said_to_be_earlier(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv")
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    before = (tmp_path / "out" / "a.predictions.csv").read_bytes()
    (tables.folder / "a.csv").write_text("a,b\n1,2\n")
    for _ in range(2):
        done = run("predict", "in", "-o", "out", *tables.options)
        assert (done.returncode, states(done)) == (1, {"a.csv": "failed", "b.csv": "unchanged"})
        assert "out/a.predictions.csv is an earlier result" in done.stderr
        assert (tmp_path / "out" / "a.predictions.csv").read_bytes() == before


def test_a_time_that_is_over_leaves_the_jobs_to_the_next_run(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    done = run(
        "predict", "in", "-o", "out", "--timeout", "0.5s", "--run-after", "2099-01-01T00:00:00Z", *tables.options
    )
    assert (done.returncode, states(done)) == (5, {"a.csv": "unfinished", "b.csv": "unfinished"})
    assert names_in(tmp_path / "out") == {LEDGER}
    jobs = tables.jobs()
    assert {job.state for job in jobs} == {"queued"}
    for job in jobs:
        job.cancel()
        job.delete()
    done = run("predict", "in", "-o", "out", *tables.options)
    assert (done.returncode, states(done)) == (0, {"a.csv": "completed", "b.csv": "completed"})


# --- it continues where it was ---------------------------------------------------------------------------------------


def test_only_a_file_that_has_changed_is_sent_again_even_if_size_and_time_are_the_same(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv", "c.csv")
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    again = run("predict", "in", "-o", "out", *tables.options)
    assert (again.returncode, set(states(again).values()), len(tables.jobs())) == (0, {"unchanged"}, 3)
    assert "30 rows, 30 ok, 0 failed" in again.stderr
    path = tables.folder / "a.csv"
    status, content = path.stat(), path.read_text()
    path.write_text(content.replace(tables.tag, tables.tag[::-1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    changed = run("predict", "in", "-o", "out", *tables.options)
    assert states(changed) == {"a.csv": "completed", "b.csv": "unchanged", "c.csv": "unchanged"}
    assert result_of(tmp_path / "out" / "a.predictions.csv") == tables.flowers("a.csv")
    assert len(tables.jobs()) == 4


def test_a_newer_model_and_other_options_are_noticed(
    run: Run, tmp_path: Path, tables: Tables, client: Client, iris_onnx: Path
) -> None:
    model = onnx.load(iris_onnx)
    name = f"moving-{tables.tag}"
    client.models.add(iris_onnx, name=name)
    tables.write("a.csv", "b.csv")
    call = partial(run, "predict", "in", "-o", "out", "--json", "--metadata", f"tag={tables.tag}")
    assert call("-m", name).returncode == 0
    model.doc_string = "another one"
    client.models.add(model.SerializeToString(), name=name)
    moved = json.loads(call("-m", name).stdout)
    assert (moved["model"], {file["state"] for file in moved["files"]}) == (f"{name}@2", {"completed"})
    assert moved["notes"] == [f"2 results are of {name}@1: {name}@2 scores the inputs again"]
    assert {job.model for job in tables.jobs()} == {f"{name}@1", f"{name}@2"}
    assert {file["state"] for file in json.loads(call("-m", f"{name}@2").stdout)["files"]} == {"unchanged"}
    other = json.loads(call("-m", name, "--passthrough", "none").stdout)
    assert {file["state"] for file in other["files"]} == {"completed"}
    assert "flower" not in pl.read_csv(tmp_path / "out" / "a.predictions.csv").columns


def test_a_result_that_was_damaged_or_removed_is_fetched_again_and_not_scored_again(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv")
    tables.write("c.csv", broken=1)
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out") - {LEDGER}}
    damaged, errors = tmp_path / "out" / "a.predictions.csv", tmp_path / "out" / "c.errors.jsonl"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    errors.unlink()
    done = run("predict", "in", "-o", "out", *tables.options)
    assert states(done) == {"a.csv": "completed", "b.csv": "unchanged", "c.csv": "completed"}
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out") - {LEDGER}} == before
    assert len(tables.jobs()) == 3


def test_results_that_were_copied_elsewhere_are_known_there(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    (tmp_path / "copy").mkdir()
    for name in names_in(tmp_path / "out"):
        (tmp_path / "copy" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    for job in tables.jobs():
        job.delete()
    done = run("predict", "in", "-o", "copy", *tables.options)
    assert (done.returncode, set(states(done).values())) == (0, {"unchanged"})
    assert tables.jobs() == []


def test_without_waiting_the_next_run_saves_the_results(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    sent = run("predict", "in", "-o", "out", "--no-wait", *tables.options)
    assert (sent.returncode, set(states(sent).values())) == (0, {"submitted"})
    assert names_in(tmp_path / "out") == {LEDGER}
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    assert names_in(tmp_path / "out") == {"a.predictions.csv", "b.predictions.csv", LEDGER}
    assert len(tables.jobs()) == 2


def test_a_cancelled_job_is_resumed_and_a_deleted_one_is_sent_again(run: Run, tables: Tables) -> None:
    tables.write("a.csv", "b.csv")
    late = ("--run-after", "2099-01-01T00:00:00Z")
    assert run("predict", "in", "-o", "out", "--no-wait", *late, *tables.options).returncode == 0
    first, second = sorted(tables.jobs(), key=lambda job: str(job.data["input"]["filename"]))
    first.cancel()
    second.cancel()
    second.delete()
    done = run("predict", "in", "-o", "out", "--timeout", "1s", *tables.options)
    # The job of a.csv still waits for its time; b.csv has a new one, without one.
    assert (done.returncode, states(done)) == (5, {"a.csv": "unfinished", "b.csv": "completed"})
    assert first.refresh().state == "queued"
    first.cancel()
    first.delete()
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0


def test_a_key_whose_job_was_deleted_is_replaced(run: Run, tmp_path: Path, tables: Tables) -> None:
    """The run before was killed after its request and before the answer."""
    tables.write("a.csv", "b.csv")
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    for job in tables.jobs():
        job.delete()
    with Ledger.opened(tmp_path / "out") as ledger:
        for name in ("a.csv", "b.csv"):
            entry = ledger.get(name)
            assert entry is not None
            ledger.put(name, Entry(entry.input, entry.model, entry.asked, entry.key))
    done = run("predict", "in", "-o", "out", *tables.options)
    assert (done.returncode, set(states(done).values())) == (0, {"completed"})


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_runs(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv")
    with Ledger.opened(tmp_path / "out"):
        done = run("predict", "in", "-o", "out", *tables.options)
    assert done.returncode == 1
    assert "another run predicts into 'out'" in done.stderr
    assert tables.jobs() == []


def test_results_below_the_inputs_do_not_become_inputs(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv")
    tables.write("b.csv", broken=2)
    for output in ("in/out", "in"):
        assert run("predict", "in", "-o", output, *tables.options).returncode == 0
        done = run("predict", "in", "-o", output, *tables.options)
        assert {name: state for name, state in states(done).items() if "predictions" not in name} == {
            "a.csv": "unchanged", "b.csv": "unchanged",
        }  # fmt: skip
        assert "a.predictions.csv (a result)" in done.stderr
        for path in (tmp_path / "in" / "out").glob("*"):
            path.unlink()


def test_results_next_to_their_inputs_are_left_out_and_are_inputs_elsewhere(run: Run, tables: Tables) -> None:
    """Results by one command are no inputs of the next one, unless their folder is named: for another model."""
    tables.write("a.csv", "b.csv")
    tables.write("c.csv", broken=2)
    for name in ("a", "c"):
        assert run("predict", f"in/{name}.csv", "-m", "iris", "--passthrough", "all").returncode == 0
    done = run("predict", "in", "-o", "out", *tables.options, "--passthrough", "all")
    assert (done.returncode, set(states(done))) == (0, {"a.csv", "b.csv", "c.csv"})
    assert "Left out: in/a.predictions.csv (a result)" in done.stderr
    again = run("predict", "out", "-o", "second", *tables.options)
    assert set(states(again)) == {"a.predictions.csv", "b.predictions.csv", "c.predictions.csv"}
    assert "Left out: out/c.errors.jsonl (a result)" in again.stderr


def test_a_log_that_a_power_cut_has_damaged_loses_only_the_damaged_lines(
    run: Run, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv")
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    log = tmp_path / "out" / LEDGER
    kept = [line for line in log.read_bytes().splitlines(keepends=True) if b'"a.csv"' in line]
    log.write_bytes(b"".join(kept) + b"\0\0\0\n[]\n{}\n" + kept[-1][:40])
    done = run("predict", "in", "-o", "out", *tables.options)
    assert states(done) == {"a.csv": "unchanged", "b.csv": "completed"}
    assert set(states(run("predict", "in", "-o", "out", *tables.options)).values()) == {"unchanged"}


def test_a_file_that_has_just_changed_is_read_again_whatever_its_status_says(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a\n1\n")
    assert bytes_of(path).status is None
    os.utime(path, (1e9, 1e9))
    known = bytes_of(path)
    assert known.status is not None
    stale = FileBytes("0" * 64, known.status)
    assert bytes_of(path, stale) is stale  # it is not read
    path.write_text("a\n2\n")
    os.utime(path, (1e9, 1e9))
    assert bytes_of(path, known).sha256 != known.sha256


# --- what happens meanwhile ------------------------------------------------------------------------------------------


class Meddling(httpx2.HTTPTransport):
    """Calls `meddle` with each request before it is sent, which may raise an error of the connection."""

    def __init__(self, meddle: Any) -> None:
        super().__init__()
        self._meddle = meddle

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self._meddle(request)
        return super().handle_request(request)


def test_a_file_that_changes_between_two_reads_is_read_again(server: str, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv")
    path = tables.folder / "a.csv"
    changes = [path.read_text().replace(tables.tag, tables.tag[::-1])]

    def change(request: httpx2.Request) -> None:
        if request.method == "POST" and changes:
            path.write_text(changes.pop())

    with Client(server, transport=Meddling(change)) as client:
        for state in ("completed", "unchanged"):
            report = client.predict_files(tables.folder, "iris", tmp_path / "out", metadata={"tag": tables.tag})
            assert [file.state for file in report.files] == [state]
    assert result_of(tmp_path / "out" / "a.predictions.csv") == tables.flowers("a.csv")
    assert len(tables.jobs()) == 1


def test_an_outage_of_the_network_is_waited_for_and_no_file_is_sent_twice(
    server: str, tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write(*(f"{number}.csv" for number in range(6)))
    monkeypatch.setattr("batchserve.client.many.pause_before", lambda *_: 0.01)
    monkeypatch.setattr("batchserve.client.transport.pause_before", lambda *_: 0.01)
    requests = iter(range(10**6))

    def fail(request: httpx2.Request) -> None:
        if next(requests) % 10 in range(3, 9) and request.url.path != "/v1/models/iris":
            raise httpx2.ConnectError("the network is away")

    with Client(server, transport=Meddling(fail)) as client:
        report = client.predict_files(tables.folder, "iris", tmp_path / "out", metadata={"tag": tables.tag})
    assert {file.state for file in report.files} == {"completed"}
    assert len(tables.jobs()) == 6


class Deaf(httpx2.HTTPTransport):
    """Loses the first answers to POSTs, which the server has given."""

    def __init__(self, lost: int) -> None:
        super().__init__()
        self._lost = iter(range(lost))

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        if request.method == "POST" and next(self._lost, None) is not None:
            response.read()
            raise httpx2.ReadError("the answer was lost")
        return response


def test_an_answer_that_is_lost_makes_no_second_job(
    server: str, tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write("a.csv", "b.csv")
    monkeypatch.setattr("batchserve.client.many.pause_before", lambda *_: 0.01)
    with Client(server, transport=Deaf(5), max_retries=0) as client:
        report = client.predict_files(
            tables.folder, "iris", tmp_path / "out", metadata={"tag": tables.tag}, in_flight=1
        )
    assert [file.state for file in report.files] == ["completed", "completed"]
    assert len(tables.jobs()) == 2


def test_a_result_is_synced_before_it_has_its_name_and_its_folder_behind(
    client: Client, tmp_path: Path, iris_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    sync, target = os.fsync, tmp_path / "out" / "a.csv"

    def note(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().suffix, target.exists()))
        sync(descriptor)

    job = client.submit(iris_csv, "iris").wait()
    target.parent.mkdir()
    monkeypatch.setattr("batchserve.client.writing.os.fsync", note)
    job.result().save(target)
    assert synced == [(".part", False), ("", True)]


def test_a_server_that_stays_away_ends_the_run_and_what_is_done_is_kept(
    server: str, run: Run, tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write(*(f"{number}.csv" for number in range(4)))
    for module in ("many", "transport"):
        monkeypatch.setattr(f"batchserve.client.{module}.pause_before", lambda *_: 0.01)
    monkeypatch.setattr("batchserve.client.many._PATIENCE", 0.1)
    results = []

    def fail(request: httpx2.Request) -> None:
        if request.url.path.startswith("/v1/download/"):
            results.append(request)
        elif results and request.method == "POST":
            raise httpx2.ConnectError("the network is away")

    options: dict[str, Any] = {"metadata": {"tag": tables.tag}, "in_flight": 1}
    with Client(server, transport=Meddling(fail)) as client, pytest.raises(ConnectionFailed):
        client.predict_files(tables.folder, "iris", tmp_path / "out", **options)
    assert names_in(tmp_path / "out") == {"0.predictions.csv", LEDGER}
    done = run("predict", "in", "-o", "out", *tables.options)
    assert states(done) == {"0.csv": "unchanged", **{f"{number}.csv": "completed" for number in range(1, 4)}}
    assert len(tables.jobs()) == 4


def test_a_refused_key_ends_the_run_at_once(run: Run, tmp_path: Path, tables: Tables) -> None:
    tables.write(*(f"{number}.csv" for number in range(30)))
    sent = []

    def refuse(request: httpx2.Request) -> httpx2.Response:
        if request.method == "GET":
            facts = {"name": "iris", "version": 1, "digest": "0" * 64}
            return httpx2.Response(200, json=facts)
        sent.append(request.read())
        return httpx2.Response(401, json={"code": "unauthorized", "detail": "the key is revoked"})

    with Client("http://server", transport=httpx2.MockTransport(refuse)) as client:
        with pytest.raises(Exception, match="the key is revoked") as caught:
            client.predict_files(tables.folder, "iris", tmp_path / "out")
        assert type(caught.value).__name__ == "AuthenticationFailed"
    assert len(sent) <= 8
    no_server = run("predict", "in", "-o", "out", "-m", "iris", BATCHSERVE_URL="http://127.0.0.1:9")
    assert no_server.returncode == 1
    assert "To continue, run the same command again" in no_server.stderr


# --- in Python -------------------------------------------------------------------------------------------------------


def test_python_gives_a_report_and_raises_when_a_file_has_failed(
    client: Client, tmp_path: Path, tables: Tables, iris: pd.DataFrame
) -> None:
    tables.write("a.csv")
    tables.write("b.csv", broken=2)
    report = client.predict_files([tables.folder / "a.csv", str(tables.folder / "b.csv")], "iris", tmp_path / "out")
    assert (report.model, report.rows, report.rows_failed, report.failed) == ("iris@1", 20, 1, [])
    assert [file.result for file in report.files] == [tmp_path / "out" / f"{name}.predictions.csv" for name in "ab"]
    assert report.files[1].errors == tmp_path / "out" / "b.errors.jsonl"
    iris.iloc[:ROWS].assign(**{iris.columns[0]: ""}).to_csv(tables.folder / "c.csv", index=False)
    with pytest.raises(FilesFailed, match="1 of 3 files failed") as caught:
        client.predict_files(tables.folder, "iris", tmp_path / "out")
    (failed,) = caught.value.report.failed
    assert isinstance(failed.error, JobFailed)
    assert isinstance(failed.error, JobError)
    assert len(failed.error.job.errors()) == ROWS  # type: ignore[attr-defined]
    assert caught.value.errors[0]["file"] == str(tables.folder / "c.csv")


def test_the_asynchronous_client_predicts_files_in_the_same_way(server: str, tmp_path: Path, tables: Tables) -> None:
    tables.write(*(f"{number}.csv" for number in range(12)))

    async def both() -> list[set[str]]:
        async with AsyncClient(server) as client:
            reports = [
                await client.predict_files(tables.folder, "iris", tmp_path / "out", metadata={"tag": tables.tag})
                for _ in range(2)
            ]
            with pytest.raises(InvalidInput, match="there is no file"):
                await client.predict_files(["nowhere.csv"], "iris", tmp_path / "out")
            (tables.folder / "bad.csv").write_text("a\n1\n")
            with pytest.raises(FilesFailed):
                await client.predict_files(tables.folder, "iris", tmp_path / "out")
        return [{file.state for file in report.files} for report in reports]

    assert asyncio.run(both()) == [{"completed"}, {"unchanged"}]
    assert len(names_in(tmp_path / "out")) == 13
    assert len(tables.jobs()) == 12


def test_images_are_found_as_one_job(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    assert find_inputs([tmp_path]).images == tmp_path
    assert find_inputs([tmp_path / "a.png"]).images == tmp_path / "a.png"


# --- on a terminal ---------------------------------------------------------------------------------------------------


def test_one_bar_shows_all_files(server: str, tmp_path: Path, tables: Tables) -> None:
    tables.write("a.csv", "b.csv", "c.csv")
    code, shown = on_terminal(["predict", "in", "-o", "out", *tables.options], tmp_path, server, "", None)
    assert code == 0, shown
    assert "3/3 files, 30 rows" in shown
    assert "upload" not in shown


def test_ctrl_c_ends_a_run_that_the_same_command_continues(
    run: Run, server: str, tmp_path: Path, tables: Tables
) -> None:
    tables.write("a.csv", "b.csv")
    late = ["--run-after", "2099-01-01T00:00:00Z"]
    arguments = ["predict", "in", "-o", "out", *late, *tables.options]
    code, shown = on_terminal(arguments, tmp_path, server, "0/2 files", 2)
    assert code == 130, shown
    assert "Traceback" not in shown
    assert "run the same command again" in " ".join(shown.split())
    for job in tables.jobs():
        job.cancel()
        job.delete()
    assert run("predict", "in", "-o", "out", *tables.options).returncode == 0
    assert names_in(tmp_path / "out") == {"a.predictions.csv", "b.predictions.csv", LEDGER}


# --- upload ----------------------------------------------------------------------------------------------------------


def test_upload_prints_an_id_for_each_file(run: Run, client: Client, tables: Tables) -> None:
    tables.write("a.csv", "deep/b.csv")
    (tables.folder / "empty.csv").touch()
    done = run("upload", "in")
    ids = done.stdout.split()
    assert done.returncode == 1
    assert [client.jobs.get(id).data["input"]["filename"] for id in ids] == ["a.csv", "b.csv"]
    assert {client.jobs.get(id).state for id in ids} == {"uploaded"}
    assert "in/empty.csv: the file is empty" in done.stderr
    assert "2 inputs uploaded, 1 failed" in done.stderr
    for id in ids:
        client.jobs.delete(id)
    told = json.loads(run("upload", "in/a.csv", "in/deep", "--json").stdout)
    assert [one["file"] for one in told["jobs"]] == ["in/a.csv", "in/deep/b.csv"]
    for one in told["jobs"]:
        client.jobs.delete(one["job"]["id"])


def test_upload_takes_stdin_and_a_folder_of_images(run: Run, client: Client, tmp_path: Path) -> None:
    piped = run("upload", "-", "--delimiter", ";", input="a;b\n1;2\n")
    assert piped.returncode == 0, piped.stderr
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    photos = run("upload", "photos")
    assert photos.returncode == 0, photos.stderr
    (first,), (second,) = piped.stdout.split(), photos.stdout.split()
    assert client.jobs.get(second).data["input"]["filename"] == "photos.zip"
    for id in (first, second):
        client.jobs.delete(id)
    assert run("upload", "nothing.csv").returncode == 2


# --- names of results ------------------------------------------------------------------------------------------------


def test_a_result_is_saved_into_a_folder_under_the_name_of_its_input(
    run: Run, client: Client, tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.write("night 7.csv.gz")
    job = client.submit(tables.folder / "night 7.csv.gz", "iris").wait()
    assert run("jobs", "download", job.id, "-o", "got/").returncode == 0
    assert run("jobs", "download", job.id, "-o", "got", "--format", "parquet").returncode == 0
    assert names_in(tmp_path / "got") == {"night 7.predictions.csv", "night 7.predictions.parquet"}
    monkeypatch.chdir(tmp_path / "got")
    assert job.result("jsonl").save() == Path("night 7.predictions.jsonl")
    saved = client.predict(tables.folder / "night 7.csv.gz", "iris", output=f"{tmp_path}/new/")
    assert saved == tmp_path / "new" / "night 7.predictions.csv"


@pytest.mark.parametrize(
    ("filename", "saved"),
    [
        ("../../evil.csv", "evil.predictions.csv"),
        ("C:\\data\\evil.csv", "evil.predictions.csv"),
        ("..", None),
        ("x/", None),
        ("a.b.csv", "a.b.predictions.csv"),
    ],
)
def test_no_name_of_an_input_leads_out_of_the_folder(
    server: str, client: Client, tmp_path: Path, iris_csv: Path, filename: str, saved: str | None
) -> None:
    params = {"model": "iris", "filename": filename}
    id = httpx2.post(f"{server}/v1/predict", params=params, content=iris_csv.read_bytes()).json()["id"]
    job = client.jobs.get(id).wait()
    path = job.result().save(tmp_path)
    assert path.parent == tmp_path
    assert path.name == saved or (saved is None and path.name == f"{job.id}.csv")


@pytest.mark.parametrize(
    "name", [*ODD[:-3], "a.csv.gz", "b.parquet.zst", ".gz", ".csv", "a", "a.", "x/y.csv", "x\\y.csv"]
)
def test_server_and_client_name_results_by_one_rule(name: str) -> None:
    own = safe_name(name)
    assert own is not None
    assert input_stem(name) == stem_of(own)
