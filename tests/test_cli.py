"""The command line against a real server, each command as a process at least once: output, errors and exit codes."""

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pandas as pd
import polars as pl
import postgres
import pytest
import typer
from commands import Run, Service, clean_environment, in_a_process, in_this_process, on_terminal
from sklearn.linear_model import LogisticRegression

from batchserve import __version__
from batchserve.cli.server import is_loopback, settings_of
from batchserve.cli.terminal import duration
from batchserve.client import Client, JobFailed
from batchserve.errors import InvalidOptions
from batchserve.secrets import take_from_files

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def run(server: str, tmp_path: Path) -> Run:
    """Runs `batchserve` with these arguments in the process of the test, in an empty folder."""
    return partial(in_this_process, tmp_path, BATCHSERVE_URL=server)


@pytest.fixture
def process(server: str, tmp_path: Path) -> Run:
    """The same in a process of its own."""
    return partial(in_a_process, tmp_path, BATCHSERVE_URL=server)


@pytest.fixture
def alone(tmp_path: Path) -> Run:
    """Runs `batchserve` in the process of the test, in an empty folder, without a server."""
    return partial(in_this_process, tmp_path, BATCHSERVE_URL=NOBODY)


@pytest.fixture
def process_alone(tmp_path: Path) -> Run:
    """The same in a process of its own."""
    return partial(in_a_process, tmp_path, BATCHSERVE_URL=NOBODY)


@pytest.fixture(scope="module")
def iris_model(server: str, iris_onnx: Path) -> str:
    with Client(server) as client:
        return client.models.add(iris_onnx, name="iris").name


def put_off(iris_csv: Path, server: str) -> str:
    """The id of a job that starts in 2099."""
    with Client(server) as client:
        return client.submit(iris_csv, model="iris", run_after="2099-01-01T00:00:00Z", reuse=False).id


# Without a server


def test_help_names_every_command(process_alone: Run) -> None:
    done = process_alone("--help")
    assert done.returncode == 0
    commands = ["demo", "serve", "worker", "migrate", "doctor", "predict", "jobs", "models", "convert", "version"]
    assert [name for name in commands if f" {name} " not in done.stdout] == []


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from batchserve.cli import app; "
        "print([m for m in ('polars', 'numpy', 'pandas', 'onnxruntime', 'sklearn', 'sqlalchemy', 'fastapi') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict"],
        ["predict", "no-such.csv", "--model", "iris"],
        ["predict", "-", "--model", "iris", "--timeout", "soon"],
        ["predict", "-", "--model", "iris", "--json"],
        ["predict", "-", "--model", "iris", "--top-k", "0"],
        ["jobs", "list", "--state", "lost"],
        ["jobs", "list", "--sort", "size"],
        ["models", "rm", "iris"],
        ["models", "add", "no-such.onnx"],
        ["no-such-command"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_writes_nothing_to_stdout(arguments: list[str], alone: Run) -> None:
    done = alone(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Error" in done.stderr


def test_without_a_server_the_error_has_its_address_and_how_to_start_one(process_alone: Run, iris_csv: Path) -> None:
    done = process_alone("predict", iris_csv, "--model", "iris")
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"no response from {NOBODY}" in done.stderr
    assert "batchserve serve" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 - this is refused
def test_serve_refuses_an_address_that_others_can_reach(host: str, alone: Run, tmp_path: Path) -> None:
    done = alone("serve", "--host", host)
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_serve_drives_no_hosts_of_a_cluster_and_serves_without_them(
    alone: Run, start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path
) -> None:
    nowhere = "ray://127.0.0.1:1"
    done = alone("serve", BATCHSERVE_ENGINE=nowhere)
    assert done.returncode == 2
    assert "--no-worker" in done.stderr
    with start_server(tmp_path, "--no-worker", BATCHSERVE_ENGINE=nowhere) as url:
        assert url.startswith("http://127.0.0.1:")  # and it is ready


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("::", False)])
def test_loopback_addresses_are_recognized(host: str, *, local: bool) -> None:
    assert is_loopback(host) is local


def test_a_port_that_is_taken_is_named(server: str, process_alone: Run) -> None:
    port = server.rpartition(":")[2]
    done = process_alone("serve", "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_invalid_setting_is_named(alone: Run) -> None:
    done = alone("serve", BATCHSERVE_PROCESSES="many")
    assert done.returncode == 2
    assert "BATCHSERVE_PROCESSES" in done.stderr


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HEARTBEAT", "16", "BATCHSERVE_HEARTBEAT: 16 s is too long for a BATCHSERVE_LEASE of 30 s"),
        (
            "STORAGE",
            "s3://bucket/jobs",
            "BATCHSERVE_DATABASE: the storage s3://bucket/jobs is not a folder",
        ),
        ("LOG_FORMAT", "xml", "BATCHSERVE_LOG_FORMAT: Input should be 'auto', 'console' or 'json'"),
        ("LOG_LEVEL", "loud", "BATCHSERVE_LOG_LEVEL: Input should be 'debug', 'info', 'warning' or 'error'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_valid_values(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BATCHSERVE_{name}", value)
    with pytest.raises(typer.BadParameter) as caught:
        settings_of(None, None)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("15m", 900), ("2h", 7200), ("1 d", 86400)])
def test_durations_have_units(text: str, seconds: float) -> None:
    assert duration(text) == seconds


def test_migrate_creates_the_schema_and_does_nothing_the_second_time(process_alone: Run, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'own.db'}"
    first, second = (json.loads(process_alone("migrate", "--database", url, "--json").stdout) for _ in range(2))
    assert first["before"] is None
    assert second == {"before": first["after"], "after": first["after"]}


def test_doctor_finds_no_fault_in_a_fresh_folder(process_alone: Run) -> None:
    done = process_alone("doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 0
    assert {name: finding["status"] for name, finding in findings.items() if name != "free space"} == dict.fromkeys(
        ("packages", "storage", "database", "database file", "rows", "stored bytes", "orphans", "jobs", "webhooks",
         "quotas", "clock", "memory", "scoring", "server"), "ok"
    )  # fmt: skip
    assert "scored" in findings["scoring"]["detail"]


def test_doctor_fails_where_nothing_can_be_written(alone: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = alone("doctor", "--json", "--storage", "file/storage")
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == 1
    assert findings["storage"]["status"] == "fail"
    assert findings["storage"]["advice"]


def test_doctor_detects_a_running_server(run: Run, server: str) -> None:
    done = run("doctor", "--json")
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert findings["server"]["detail"] == f"ready at {server}"


def test_convert_writes_a_model_and_reports_parity(
    process_alone: Run, tmp_path: Path, iris: pd.DataFrame, iris_csv: Path
) -> None:
    species = np.repeat(["setosa", "versicolor", "virginica"], 50)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(LogisticRegression(max_iter=500).fit(iris, species)))
    done = process_alone("convert", "model.pkl", "--sample", iris_csv, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["passed"] is True
    assert report["label_flips"] == 0
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_convert_fails_above_the_tolerance_and_writes_nothing(
    alone: Run, tmp_path: Path, iris: pd.DataFrame, iris_csv: Path
) -> None:
    species = np.repeat([0, 1, 2], 50)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(LogisticRegression(max_iter=500).fit(iris, species)))
    done = alone("convert", "model.pkl", "--sample", iris_csv, "--tolerance", "1e-12")
    assert done.returncode == 1
    assert "1.0e-12" in done.stdout
    assert not (tmp_path / "model.onnx").exists()


def test_convert_reports_what_is_wrong_with_the_option_image(alone: Run, iris_onnx: Path) -> None:
    absent = alone("convert", iris_onnx, "--image", "@absent.json", "-o", "out.onnx")
    assert (absent.returncode, "there is no file 'absent.json'" in absent.stderr) == (2, True)
    network = alone("convert", iris_onnx, "--image", "img2feat:resnet18", "-o", "out.onnx")
    assert (network.returncode, "goes before a pickled classifier" in network.stderr) == (2, True)


# With a server


@pytest.mark.usefixtures("iris_model")
def test_predict_saves_the_result_next_to_the_input(run: Run, tmp_path: Path, iris_csv: Path) -> None:
    (tmp_path / "night.csv").write_bytes(iris_csv.read_bytes())
    done = run("predict", "night.csv", "--model", "iris")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "150 rows, 150 ok, 0 failed" in done.stderr
    assert "night.predictions.csv" in done.stderr
    assert pl.read_csv(tmp_path / "night.predictions.csv")["prediction"][0] == "setosa"


@pytest.mark.usefixtures("iris_model")
def test_predict_queues_all_uploads_and_reports_the_refused_ones(run: Run, server: str, iris_csv: Path) -> None:
    with Client(server) as client:
        for job in list(client.jobs.list(state="uploaded")):
            job.delete()
        ids = [client.upload(iris_csv).id for _ in range(2)]
        done = run("predict", "--all-uploaded", "--model", "iris", "--wait", "--top-k", "1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ids
        assert "2 jobs completed, 0 did not" in done.stderr
        assert {client.jobs.get(job_id).state for job_id in ids} == {"completed"}
        wrong = client.upload(b"a,b\n1,2\n").id
    told = run("predict", "--all-uploaded", "--model", "iris", "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["refused"][0]["id"] == wrong
    assert f"Job {wrong} stays uploaded: " in told.stderr
    assert "'petal width (cm)'" in told.stderr
    assert run("predict", "new.csv", "--all-uploaded", "--model", "iris").returncode == 2


@pytest.mark.usefixtures("iris_model")
def test_values_of_all_records_are_a_json_object(run: Run, iris_csv: Path) -> None:
    refused = run("predict", iris_csv, "--model", "iris", "--inputs", '{"limit": 1}')
    assert refused.returncode == 1
    assert "'limit' is not an input of the model" in refused.stderr


@pytest.mark.usefixtures("iris_model")
def test_predict_works_in_a_pipe(process: Run, iris_csv: Path) -> None:
    done = process("predict", "-", "--model", "iris@1", "--format", "jsonl", input=iris_csv.read_text())
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 150
    assert records[0]["prediction"] == "setosa"


@pytest.mark.usefixtures("iris_model")
def test_decimal_commas_are_read_by_command_and_client(
    run: Run, server: str, tmp_path: Path, iris: pd.DataFrame
) -> None:
    iris.to_csv(tmp_path / "a.csv", index=False, sep=";", decimal=",")
    done = run("predict", "a.csv", "--model", "iris", "--decimal", ",", "--passthrough", "all")
    assert done.returncode == 0, done.stderr
    result = pd.read_csv(tmp_path / "a.predictions.csv", sep=";", decimal=",")
    assert result[list(iris)].equals(iris)
    assert result["probability_setosa"].between(0, 1).all()
    with Client(server) as client:
        job = client.submit(client.upload(tmp_path / "a.csv", decimal=","), model="iris").wait()
        assert (job.state, job.rows["ok"]) == ("completed", 150)


@pytest.mark.usefixtures("iris_model")
def test_the_suffix_of_the_output_chooses_its_format(run: Run, tmp_path: Path, iris_csv: Path) -> None:
    done = run("predict", iris_csv, "--model", "iris", "-o", "out.parquet", "--passthrough", "all", "--json")
    job = json.loads(done.stdout)
    assert job["state"] == "completed"
    assert job["options"]["format"] == "parquet"
    assert pl.read_parquet(tmp_path / "out.parquet").width > 4


def test_predict_takes_a_folder_of_images_or_several_of_them(
    run: Run, tmp_path: Path, server: str, reviews_onnx: bytes
) -> None:
    """The model scores the names of the files."""
    with Client(server) as client:
        client.models.add(reviews_onnx, name="reviews")
    for name in ("photos/b/2.png", "photos/1.jpg", "photos/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n")
    options = ("--model", "reviews", "--columns", "file", "--passthrough", "file")
    for files, saved, keys in (
        (["photos/"], "photos.predictions.jsonl", ["1.jpg", "b/2.png"]),
        (["photos/b/2.png", "photos/1.jpg"], "photos/b/2.predictions.jsonl", ["b/2.png", "1.jpg"]),
    ):
        done = run("predict", *files, *options)
        assert done.returncode == 0, done.stderr
        assert "2 rows, 2 ok, 0 failed" in done.stderr
        assert pl.read_ndjson(tmp_path / saved)["file"].to_list() == keys
    refused = run("predict", "photos/1.jpg", "photos/notes.txt", *options)
    assert refused.returncode == 1
    assert "'photos/notes.txt' would be a job each, and 'photos/1.jpg' one job of images" in refused.stderr
    missing = run("predict", "photos/1.jpg", "photos/3.jpg", *options)
    assert missing.returncode == 2
    assert "there is no file 'photos/3.jpg'" in missing.stderr
    both = run("predict", "photos/1.jpg", "photos", *options)
    assert both.returncode == 1
    assert "the images in 'photos' are one job" in both.stderr


@pytest.mark.usefixtures("iris_model")
def test_a_job_can_be_followed_by_its_id(run: Run, iris_csv: Path) -> None:
    started = run("predict", iris_csv, "--model", "iris", "--no-wait")
    job_id = started.stdout.strip()
    watched = run("jobs", "watch", job_id)
    shown: dict[str, Any] = json.loads(run("jobs", "show", job_id, "--json").stdout)
    downloaded = run("jobs", "download", job_id, "--format", "jsonl")
    assert f"batchserve jobs watch {job_id}" in started.stderr
    assert watched.returncode == 0, watched.stderr
    assert shown["state"] == "completed"
    assert len(downloaded.stdout.splitlines()) == 150
    assert job_id in run("jobs", "list").stdout
    assert run("jobs", "rm", job_id).returncode == 0
    gone = run("jobs", "show", job_id)
    assert gone.returncode == 1
    assert gone.stdout == ""


@pytest.mark.usefixtures("iris_model")
def test_lists_are_tab_separated_without_a_terminal(run: Run, iris_csv: Path) -> None:
    run("predict", iris_csv, "--model", "iris", "-o", "out.csv")
    rows = [line.split("\t") for line in run("jobs", "list", "--state", "completed").stdout.splitlines()]
    assert {len(row) for row in rows} == {7}
    assert {row[1] for row in rows} == {"completed"}
    assert "iris" in [line.split("\t")[0] for line in run("models", "list").stdout.splitlines()]


@pytest.mark.usefixtures("iris_model")
def test_a_list_is_filtered_sorted_and_counted(run: Run, iris_csv: Path) -> None:
    for _ in range(2):
        run("predict", iris_csv, "--model", "iris", "--metadata", "batch=of-the-command", "--no-reuse", "-o", "out.csv")
    mark = ("--search", "of-the-command")

    def ids(*words: str) -> list[str]:
        return [line.split("\t")[0] for line in run("jobs", "list", *mark, *words).stdout.splitlines()]

    listed = ids()
    assert len(listed) == 2
    assert ids("--sort", "finished", "--order", "asc", "--state", "completed", "--state", "failed") == listed[::-1]
    assert ids("--since", "1h", "--until", "2999-01-01", "--finished-since", "1d") == listed
    assert run("jobs", "list", *mark, "--finished-until", "1h", "--count").stdout == "0\n"
    assert run("jobs", "list", *mark, "--count").stdout == "2\n"
    refused = run("jobs", "list", "--since", "soon")
    assert refused.returncode == 1
    assert "since: expected an age such as 30min, 12h or 7d" in refused.stderr
    assert [line.split("\t")[0] for line in run("models", "list", "--search", "iri").stdout.splitlines()] == ["iris"]


@pytest.mark.usefixtures("iris_model")
def test_a_job_that_fails_exits_with_3_and_its_errors_can_be_read(run: Run, tmp_path: Path, iris: pd.DataFrame) -> None:
    bad = iris.astype(object)
    bad.iloc[3, 2] = "long"
    bad.to_csv(tmp_path / "bad.csv", index=False)
    done = run("predict", "bad.csv", "--model", "iris", "--on-row-error", "fail", "-o", "out.csv")
    assert done.returncode == 3, done.stderr
    assert "on_row_error" in done.stderr
    assert not (tmp_path / "out.csv").exists()
    job_id = run("jobs", "list", "--state", "failed").stdout.split("\t")[0]
    (error,) = json.loads(run("jobs", "download", job_id, "--errors").stdout)
    assert (error["record"], error["column"]) == (3, "petal length (cm)")


@pytest.mark.usefixtures("iris_model")
def test_a_job_of_which_no_row_was_scored_exits_with_7_and_its_errors_can_be_read(
    run: Run, server: str, tmp_path: Path, iris: pd.DataFrame
) -> None:
    iris.assign(**{iris.columns[0]: ""}).to_csv(tmp_path / "bad.csv", index=False)
    done = run("predict", "bad.csv", "--model", "iris", "-o", "out.csv")
    assert done.returncode == 7, done.stderr
    assert "none of the 150 records could be scored" in done.stderr
    assert not (tmp_path / "out.csv").exists()
    with Client(server) as client:
        job = next(iter(client.jobs.list(state="failed")))
        assert len(job.errors()) == 150
        with pytest.raises(JobFailed) as caught:
            job.wait()
    assert caught.value.reason == "no-row-scored"
    assert run("jobs", "watch", job.id).returncode == 7


@pytest.mark.usefixtures("iris_model")
def test_failed_rows_are_counted_and_the_command_to_see_them_is_printed(
    run: Run, tmp_path: Path, iris: pd.DataFrame
) -> None:
    bad = iris.astype(object)
    bad.iloc[3, 2] = "long"
    bad.to_csv(tmp_path / "bad.csv", index=False)
    done = run("predict", "bad.csv", "--model", "iris", "-o", "out.csv")
    assert done.returncode == 0, done.stderr
    assert "150 rows, 149 ok, 1 failed" in done.stderr
    assert "--errors" in done.stderr


@pytest.mark.usefixtures("iris_model")
def test_waiting_too_long_exits_with_5_and_a_cancelled_job_with_6(run: Run, iris_csv: Path, server: str) -> None:
    job_id = put_off(iris_csv, server)
    late = run("jobs", "watch", job_id, "--timeout", "1s")
    assert late.returncode == 5
    assert "continues" in late.stderr
    assert f"batchserve jobs watch {job_id}" in late.stderr
    assert run("jobs", "cancel", job_id).returncode == 0
    assert run("jobs", "watch", job_id).returncode == 6
    assert json.loads(run("jobs", "retry", job_id, "--json").stdout)["id"] == job_id


@pytest.mark.usefixtures("iris_model")
@pytest.mark.parametrize("command", ["watch", "predict"])
def test_ctrl_c_exits_with_130_and_shows_below_the_bar_how_to_follow_the_job(
    run: Run, tmp_path: Path, iris_csv: Path, server: str, command: str
) -> None:
    if command == "watch":
        job_id = put_off(iris_csv, server)
        arguments = ["jobs", "watch", job_id]
    else:
        arguments = ["predict", str(iris_csv), "-m", "iris", "--run-after", "2099-01-01T00:00:00Z", "--no-reuse"]
    code, shown = on_terminal(arguments, tmp_path, server, "queued", signal.SIGINT)
    assert code == 130
    assert "Traceback" not in shown
    last = [line.strip() for line in shown.splitlines() if line.strip()][-1]
    found = re.search(r"batchserve jobs watch ([0-9a-f-]{36})$", last)
    assert found, shown
    assert json.loads(run("jobs", "show", found[1], "--json").stdout)["state"] == "queued"
    assert run("jobs", "cancel", found[1]).returncode == 0


@pytest.mark.usefixtures("iris_model")
def test_ids_are_whole_in_tables_of_80_columns_and_their_beginnings_name_jobs(
    run: Run, tmp_path: Path, iris_csv: Path, server: str
) -> None:
    job_id = put_off(iris_csv, server)
    code, shown = on_terminal(["jobs", "list"], tmp_path, server, "", None)
    assert code == 0
    assert job_id in shown
    beginning = job_id[:-1]
    assert json.loads(run("jobs", "show", beginning, "--json").stdout)["id"] == job_id
    assert f"Job {job_id} is cancelled" in run("jobs", "cancel", beginning).stderr
    assert f"Job {job_id} is removed" in run("jobs", "rm", beginning).stderr
    missing = run("jobs", "show", beginning)
    assert missing.returncode == 1
    assert f"there is no job whose id begins with '{beginning}'" in missing.stderr
    ids = [put_off(iris_csv, server) for _ in range(2)]
    several = run("jobs", "show", ids[0][:2])
    assert several.returncode == 2
    assert all(job_id in several.stderr for job_id in ids)
    run("jobs", "rm", *ids)


@pytest.mark.usefixtures("iris_model")
def test_a_folder_for_the_output_gets_the_result_under_its_own_name(run: Run, tmp_path: Path, iris_csv: Path) -> None:
    done = run("predict", iris_csv, "-m", "iris", "-o", "results/")
    assert done.returncode == 0, done.stderr
    assert len(pl.read_csv(tmp_path / "results" / f"{iris_csv.stem}.predictions.csv")) == 150
    again = run("predict", iris_csv, "-m", "iris", "-o", "results", "--format", "parquet")
    assert again.returncode == 0, again.stderr
    assert len(pl.read_parquet(tmp_path / "results" / f"{iris_csv.stem}.predictions.parquet")) == 150
    assert run("predict", "-", "-m", "iris", "-o", "results/", input="a\n1\n").returncode == 2


@pytest.mark.usefixtures("iris_model")
def test_predict_has_the_options_of_the_api(run: Run, iris_csv: Path) -> None:
    options = ["--key", "petal length (cm)", "--max-errors", "0.5", "--priority", "3", "--no-reuse"]
    options += ["--metadata", "night=2026-11-29", "--metadata", "sum=1+1=2", "--run-after", "2099-01-01T00:00:00Z"]
    done = run("predict", iris_csv, "-m", "iris", "--no-wait", "--json", *options)
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert job["metadata"] == {"night": "2026-11-29", "sum": "1+1=2"}
    chosen = {name: job["options"][name] for name in ("key", "max_errors", "priority", "run_after")}
    assert chosen == {
        "key": "petal length (cm)",
        "max_errors": 0.5,
        "priority": 3,
        "run_after": "2099-01-01T00:00:00Z",
    }
    run("jobs", "rm", job["id"])
    assert run("predict", iris_csv, "-m", "iris", "--metadata", "night").returncode == 2


def test_with_json_an_error_is_json_too(run: Run) -> None:
    done = run("jobs", "show", "0" * 36, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "job-not-found"
    assert "Error:" in done.stderr


def test_version_and_help_have_their_usual_options(run: Run, process: Run) -> None:
    assert process("--version").stdout.split() == ["batchserve", __version__]
    assert "Usage" in run("-h").stdout
    assert "--metadata" in run("predict", "-h").stdout


@pytest.mark.usefixtures("iris_model")
def test_columns_may_be_renamed_and_the_command_to_copy_is_printed_last(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("sepal length (cm),sepal width (cm),petal length (cm),width\n5.1,3.5,1.4,wide\n")
    columns = '{"petal width (cm)": "width"}'
    refused = run("predict", "one.csv", "--model", "iris", "--columns", columns)
    assert "column width: expected float32" in " ".join(refused.stderr.split())
    (tmp_path / "one.csv").write_text("sepal length (cm),sepal width (cm),petal length (cm),width\n5,3,1,.2\n5,3,,2\n")
    done = run("predict", "one.csv", "--model", "iris", "--columns", columns)
    assert "2 rows, 1 ok, 1 failed" in done.stderr
    said = " ".join(done.stderr.split())
    assert "Result: one.predictions.csv Why rows failed: batchserve jobs download" in said
    assert said.endswith("--errors")
    wrong = run("predict", "one.csv", "--model", "iris", "--columns", "{")
    assert (wrong.returncode, "expected A,B or JSON" in wrong.stderr) == (2, True)


def test_a_model_of_arrays_shows_their_shapes(run: Run, tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2, 3] block, float[N] number) => (float[N, 2, 3] y)'
        "{ y = Identity (block) }"
    )
    onnx.save(graph, tmp_path / "blocks.onnx")
    added = run("models", "add", "blocks.onnx")
    assert added.stderr.startswith("Model blocks@1 takes "), added.stderr
    assert "block float32 [N, 2, 3]" in added.stderr
    assert "takes block\tfloat32 [N, 2, 3]" in run("models", "show", "blocks").stdout.splitlines()


def test_a_model_is_added_shown_and_removed(run: Run, process: Run, iris_onnx: Path) -> None:
    added = process("models", "add", iris_onnx, "--name", "passing", "--json")
    model = json.loads(added.stdout)
    assert (model["name"], model["version"]) == ("passing", 1)
    assert "petal width (cm)" in run("models", "show", "passing").stdout
    assert run("models", "rm", "passing@1").returncode == 0
    assert run("models", "show", "passing").returncode == 1


@pytest.mark.usefixtures("iris_model")
def test_an_input_that_does_not_fit_is_refused_with_the_columns_at_fault(run: Run) -> None:
    done = run("predict", "-", "--model", "iris", input="a,b\n1,2\n")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "petal width (cm)" in done.stderr


@pytest.mark.slow
def test_a_worker_process_runs_the_jobs_of_a_server_without_one(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path, iris_onnx: Path, iris_csv: Path
) -> None:
    with start_server(tmp_path, "--no-worker") as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        job = client.submit(iris_csv, model="iris")
        time.sleep(0.3)
        assert job.refresh().state == "queued"
        command = [sys.executable, "-m", "batchserve", "worker"]
        own = clean_environment() | postgres.chosen_environment(tmp_path / "storage")
        with subprocess.Popen(command, cwd=tmp_path, env=own) as worker:
            try:
                assert job.wait(timeout=60).rows["ok"] == 150
            finally:
                worker.terminate()
                assert worker.wait(30) == 0


@pytest.mark.slow
def test_the_demo_scores_every_row_and_leaves_its_files(process_alone: Run) -> None:
    done = process_alone("demo", "--rows", "20000", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["rows_in"], facts["rows_out"], facts["rows_ok"], facts["rows_failed"]) == (20_000, 20_000, 20_000, 0)
    assert pl.read_csv(facts["files"]["predictions"]).height == 20_000
    assert f"/v1/download/{facts['job']['id']}" in done.stderr
    assert done.stderr.endswith(f"\n  http://127.0.0.1:8000/jobs/{facts['job']['id']}\n")


@pytest.mark.slow
def test_the_demo_leaves_its_server_running_on_request(tmp_path: Path) -> None:
    left = Service(tmp_path, "demo", "--rows", "20000", "--keep", "--json")
    page = left.wait_for(r"\n  (http://127\.0\.0\.1:\d+/jobs/\S+)\n")[1]
    assert "flights.csv" in httpx2.get(page).text
    assert left.end(signal.SIGINT) == 0


# --- secrets in files ------------------------------------------------------------------------------------------------


def test_a_setting_may_be_in_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "database"
    secret.write_text(f"sqlite:///{tmp_path}/elsewhere.db\n")
    done = in_a_process(tmp_path, "migrate", BATCHSERVE_DATABASE_FILE=str(secret))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere.db").exists()


def test_keys_of_an_object_store_may_be_in_files_and_names_of_aws_keep_their_meaning(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("hush\r\n")
    given = {"AWS_SECRET_ACCESS_KEY_FILE": str(secret), "AWS_WEB_IDENTITY_TOKEN_FILE": "/nowhere", "OTHER_FILE": "/x"}
    environment = dict(given)
    take_from_files(environment)
    assert environment == given | {"AWS_SECRET_ACCESS_KEY": "hush"}


def test_a_file_of_a_setting_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    done = in_a_process(tmp_path, "migrate", BATCHSERVE_DATABASE_FILE=str(tmp_path / "gone"))
    assert done.returncode == 1
    assert "BATCHSERVE_DATABASE_FILE names" in done.stderr
    assert "No such file" in done.stderr


def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidOptions, match="both BATCHSERVE_POLL and BATCHSERVE_POLL_FILE are set"):
        take_from_files({"BATCHSERVE_POLL": "1", "BATCHSERVE_POLL_FILE": str(tmp_path)})
