"""The variables that begin with BATCHSERVE_: misspelt ones are refused, and the settings in force can be seen."""

import json
from pathlib import Path

import pytest
from commands import Done, in_a_process, in_this_process
from pydantic import ValidationError

from batchserve.settings import Settings
from batchserve.variables import require_known

FIELDS = Settings.model_fields
COMMANDS = [
    ("serve", "--port", "0"),
    ("worker",),
    ("migrate",),
    ("config",),
    ("doctor",),
    ("mend",),
    ("audit",),
    ("backup", "there"),
    ("restore", "."),
    ("migrate-to", "--to-storage", "there", "--to-database", "sqlite:///there.db"),
    ("keys", "create", "night"),
    ("keys", "list"),
    ("keys", "revoke", "1"),
    ("demo",),
]
"""Every command that reads settings."""


def told(done: Done) -> str:
    """What was said, without the frame and the line breaks of a terminal."""
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: "-".join(arguments[:2]))
def test_a_misspelt_variable_stops_every_command_that_reads_settings(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    done = in_this_process(tmp_path, *arguments, BATCHSERVE_LAESE="60")
    assert done.returncode == 2, done.stderr
    assert "BATCHSERVE_LAESE in the environment is not a setting: the nearest name is BATCHSERVE_LEASE" in told(done)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_and_a_worker_end_before_they_touch_anything(tmp_path: Path) -> None:
    for command in (["serve", "--port", "0"], ["worker"]):
        done = in_a_process(tmp_path, *command, BATCHSERVE_PROCESES="2")
        assert done.returncode == 2
        assert "the nearest name is BATCHSERVE_PROCESSES" in told(done)
        assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_line_of_the_file_is_named_with_its_place(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BATCHSERVE_CHUNK_BITES=1000\nOTHER=1\n")
    done = in_this_process(tmp_path, "config")
    assert done.returncode == 2
    assert "BATCHSERVE_CHUNK_BITES in .env is not a setting: the nearest name is BATCHSERVE_CHUNK_BYTES" in told(done)


def test_a_file_of_a_value_is_not_ignored_where_it_would_not_be_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BATCHSERVE_DATABASE_FILE=/run/secrets/database\n")
    done = in_this_process(tmp_path, "config")
    assert done.returncode == 2
    assert "BATCHSERVE_DATABASE_FILE in .env: a variable that names a file is read from the environment" in told(done)


def test_all_misspelt_variables_are_named_at_once_and_no_value_is_shown(tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "config", BATCHSERVE_DATABSE="postgresql://me:hidden@db/x", batchserve_pol="1")
    assert done.returncode == 2
    assert "BATCHSERVE_DATABSE in the environment is not a setting: the nearest name is BATCHSERVE_DATABASE" in told(
        done
    )
    assert "batchserve_pol in the environment is not a setting: the nearest name is BATCHSERVE_POLL" in told(done)
    assert "hidden" not in done.stderr


def test_programs_that_read_settings_themselves_are_refused_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHSERVE_LAESE", "60")
    with pytest.raises(ValidationError, match="the nearest name is BATCHSERVE_LEASE") as caught:
        Settings(database="postgresql://me:hidden@db/x")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATCHSERVE_LEASE", "60"),
        ("batchserve_lease", "60"),
        ("BATCHSERVE_DATABASE_FILE", "/run/secrets/database"),
        ("BATCHSERVE_URL", "http://127.0.0.1:8000"),
        ("BATCHSERVE_API_KEY", "bs_x"),
        ("BATCHSERVE_API_KEY_FILE", "/run/secrets/key"),
        ("BATCHSERVE_X_NIGHT", "1"),
        ("OTHER_LAESE", "1"),
        # Kubernetes, beside Services with the names batchserve and batchserve-worker
        ("BATCHSERVE_SERVICE_HOST", "10.0.0.1"),
        ("BATCHSERVE_SERVICE_PORT", "8000"),
        ("BATCHSERVE_SERVICE_PORT_HTTP", "8000"),
        ("BATCHSERVE_PORT", "tcp://10.0.0.1:8000"),
        ("BATCHSERVE_PORT_8000_TCP", "tcp://10.0.0.1:8000"),
        ("BATCHSERVE_PORT_8000_TCP_ADDR", "10.0.0.1"),
        ("BATCHSERVE_PORT_8000_TCP_PORT", "8000"),
        ("BATCHSERVE_PORT_8000_TCP_PROTO", "tcp"),
        ("BATCHSERVE_WORKER_SERVICE_HOST", "10.0.0.2"),
        ("BATCHSERVE_WORKER_PORT", "udp://10.0.0.2:8000"),
    ],
)
def test_variables_that_somebody_reads_are_known(name: str, value: str) -> None:
    require_known({name: value}, {}, FIELDS)


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("BATCHSERVE_PORT", "9000", "BATCHSERVE_POLL"),  # there is the option --port
        ("BATCHSERVE_LAESE_FILE", "/run/secrets/lease", "BATCHSERVE_LEASE_FILE"),
        ("BATCHSERVE_APIKEY", "bs_x", "BATCHSERVE_API_KEY"),
        ("BATCHSERVE_X", "1", ""),
        ("BATCHSERVE_", "", ""),
    ],
)
def test_variables_that_nobody_reads_are_refused(name: str, value: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} in the environment is not a setting: the nearest name is {nearest}"):
        require_known({name: value}, {}, FIELDS)


# --- batchserve config -----------------------------------------------------------------------------------------------


def shown(done: Done) -> dict[str, tuple[object, str]]:
    assert done.returncode == 0, done.stderr
    return {each["variable"]: (each["value"], each["source"]) for each in json.loads(done.stdout)}


def test_config_shows_each_setting_with_its_source(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BATCHSERVE_LEASE=60\nBATCHSERVE_POLL=7\n")
    (tmp_path / "secret").write_text("postgresql://me:hidden@db/jobs?sslpassword=hidden&connect_timeout=5\n")
    done = in_a_process(
        tmp_path, "config", "--json", "--storage", "s3://bucket/prefix",
        BATCHSERVE_POLL="3", BATCHSERVE_RAY_RESERVED='{"GPU": 1}', BATCHSERVE_DATABASE_FILE="secret",
    )  # fmt: skip
    found = shown(done)
    assert list(found) == [f"BATCHSERVE_{name.upper()}" for name in FIELDS]
    assert found["BATCHSERVE_LEASE"] == (60.0, ".env")
    assert found["BATCHSERVE_POLL"] == (3.0, "environment")  # which comes before the file
    assert found["BATCHSERVE_STORAGE"] == ("s3://bucket/prefix", "command line")
    assert found["BATCHSERVE_RAY_RESERVED"] == ({"GPU": 1.0}, "environment")
    assert found["BATCHSERVE_GRACE"] == (20.0, "default")
    assert found["BATCHSERVE_KEEP_ROWS"] == (None, "default")
    assert found["BATCHSERVE_DATABASE"] == (
        "postgresql://me:***@db/jobs?sslpassword=***&connect_timeout=5",
        "BATCHSERVE_DATABASE_FILE",
    )
    assert "hidden" not in done.stdout + done.stderr


def test_config_is_a_table_without_passwords(tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "config", BATCHSERVE_DATABASE="postgresql+psycopg://me:hid/den@db/jobs")
    lines = dict(line.split("\t", 1) for line in done.stdout.splitlines())
    assert lines["BATCHSERVE_DATABASE"] == "postgresql+psycopg://me:***@db/jobs\tenvironment"
    assert lines["BATCHSERVE_RAY_RESERVED"] == '{"CPU": 1.0}\tdefault'
    assert lines["BATCHSERVE_KEEP_ROWS"] == "\tdefault"
    assert list(tmp_path.iterdir()) == []


def test_config_reports_an_invalid_value_as_a_server_would(tmp_path: Path) -> None:
    done = in_this_process(tmp_path, "config", BATCHSERVE_PROCESSES="many")
    assert done.returncode == 2
    assert "BATCHSERVE_PROCESSES: " in done.stderr


def test_an_address_without_a_password_is_shown_as_it_is(tmp_path: Path) -> None:
    for address in ("sqlite:////data/a@b:c.db", "postgresql://db:5432/jobs", "postgresql://me@db/jobs"):
        done = in_this_process(tmp_path, "config", "--json", "--database", address)
        assert shown(done)["BATCHSERVE_DATABASE"] == (address, "command line")
