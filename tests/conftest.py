"""Shared fixtures: databases, a real server process, and a real model with its data."""

import gc
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import browsers
import httpx2
import pandas as pd
import postgres
import promtool as promtools
import pytest
import ray_hosts
import ray_servers
import seaweed
from namespaces import NoNamespaces
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from warehouse import Warehouse

from batchserve.conversion import convert
from batchserve.db import migrate
from batchserve.db.connect import Database

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytest_plugins = ["service"]  # the fixtures of the API
collect_ignore = [] if find_spec("torch") else ["test_torch.py"]  # its environment: make test-torch

START_TIMEOUT = 60.0

gc.disable()  # until the tests are collected: all that this makes stays, and each search for garbage would pass over it


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on-postgres", action="store_true", help="give services without a database one on PostgreSQL")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On PostgreSQL, tests of SQLite alone do not run; nor do those that run on both by themselves, once more."""
    if config.getoption("--on-postgres"):
        chosen = [item for item in items if not {"sqlite", "database_url"} & {*_fixtures(item), *item.keywords}]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def _fixtures(item: pytest.Item) -> list[str]:
    return item.fixturenames if isinstance(item, pytest.Function) else []


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """A server on a free port with all its data in `folder` and one scoring process, unless the environment says
    otherwise; yields its address when it is ready."""
    log = folder / "server.log"
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
    own |= postgres.chosen_environment(folder / "storage")
    command = [sys.executable, "-m", "batchserve", "serve", "--port", "0", *arguments]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(
            command, cwd=folder, stderr=stderr, env=own | {"BATCHSERVE_PROCESSES": "1"} | environment
        ) as process,
    ):
        try:
            yield _ready_address(process, log)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                raise AssertionError(f"the server did not stop:\n{log.read_text()}") from None


def _ready_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(r" at (http://\S+) ", log.read_text())
        if found is not None and _is_ready(found[1]):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5.0).is_success
    except httpx2.TransportError:
        return False


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[str]]:
    """`serving`, for tests that need a separate server: a folder, arguments of `serve`, settings."""
    return serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that all tests share."""
    with serving(tmp_path_factory.mktemp("server"), BATCHSERVE_PROCESSES="2") as url:
        yield url


@pytest.fixture(scope="session")
def iris() -> pd.DataFrame:
    """150 flowers with four measures."""
    frame: pd.DataFrame = load_iris(as_frame=True).data
    return frame


@pytest.fixture(scope="session")
def iris_onnx(iris: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of flowers with named classes, converted with its columns."""
    names = load_iris().target_names[load_iris().target]
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(iris, names)
    path = tmp_path_factory.mktemp("models") / "iris.onnx"
    convert(model, iris, path)
    return path


@pytest.fixture(scope="session")
def iris_csv(iris: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "iris.csv"
    iris.to_csv(path, index=False)
    return path


T = TypeVar("T")


def shared(
    opened: AbstractContextManager[T], missing: type[Exception], excused: tuple[type[Exception], ...] = ()
) -> Iterator[T]:
    """What all tests share. Tests are skipped where it is missing, which continuous integration excuses as little as
    possible."""
    try:
        with opened as made:
            yield made
    except (missing, *excused) as error:
        if os.environ.get("CI") == "true" and not isinstance(error, excused):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Server]:
    """A PostgreSQL server that all tests share. Continuous integration fails without one."""
    yield from shared(postgres.serving(), postgres.NoServer)


@pytest.fixture
def own_server(request: pytest.FixtureRequest) -> Iterator[postgres.Server]:
    """A server that only this test uses, and may stop."""
    request.getfixturevalue("postgres_server")  # skips, or fails, where there is none
    with postgres.serving() as server:
        yield server


@pytest.fixture
def warehouse(postgres_server: postgres.Server) -> Iterator["Warehouse"]:
    """A database of others on it."""
    with postgres_server.apart() as address, closing(Warehouse(address)) as opened:
        yield opened


@pytest.fixture(scope="session", autouse=True)
def _default_database(request: pytest.FixtureRequest) -> None:
    """Of services that a test starts without naming a database: see the option."""
    if request.config.getoption("--on-postgres"):
        postgres.chosen = request.getfixturevalue("postgres_server")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[seaweed.Server]:
    """An S3 server that all tests share. Continuous integration fails without one."""
    yield from shared(seaweed.serving(), seaweed.NoServer)


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """A Chromium that all tests share. Continuous integration fails without one."""
    yield from shared(browsers.running(), browsers.NoBrowser)


@pytest.fixture(scope="session")
def promtool() -> Iterator[promtools.Promtool]:
    """Continuous integration fails without it."""
    yield from shared(promtools.found(), promtools.NoPromtool)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[ray_hosts.Cluster]:
    """A Ray cluster of two hosts that all tests share; they run on the first one. Continuous integration fails without
    one, where it may make network namespaces."""
    yield from shared(ray_hosts.joined(), ray_hosts.NoCluster, excused=(NoNamespaces,))


@pytest.fixture(scope="session")
def servers(ray_cluster: ray_hosts.Cluster) -> Iterator[ray_servers.Servers]:
    """A database and an object store for it. A test may end them, and starts them again."""
    yield from shared(ray_servers.serving(ray_cluster), ray_servers.NoServers)


@pytest.fixture
def s3_address(s3_server: seaweed.Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty storage on it, and the environment by which this process and its children reach it."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.new_address()


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with this release's schema: copying it takes a millisecond, migrating one takes 200."""
    folder = tmp_path_factory.mktemp("template")
    with closing(Database(sqlite_address(folder))) as made:
        migrate.upgrade(made)
    return folder / "batchserve.db"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path) -> str:
    """The address of a database with this release's schema; a test that uses it runs on every kind of database."""
    if request.param == "sqlite":
        shutil.copy(sqlite_template, tmp_path)
        return sqlite_address(tmp_path)
    server: postgres.Server = request.getfixturevalue("postgres_server")
    return server.migrated()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with this release's schema and no rows, of every kind."""
    with closing(Database(database_url)) as opened:
        yield opened


@pytest.fixture
def sqlite(sqlite_template: Path, tmp_path: Path) -> Iterator[Database]:
    """The same on SQLite, for behaviour that only SQLite has."""
    shutil.copy(sqlite_template, tmp_path)
    with closing(Database(sqlite_address(tmp_path))) as opened:
        yield opened


def sqlite_address(folder: Path) -> str:
    return f"sqlite:///{folder / 'batchserve.db'}"
