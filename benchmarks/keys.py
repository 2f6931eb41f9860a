"""What keys and tenants in force cost: the same loads to a server that has keys, and to one without."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import data, load, online, processes, service
from benchmarks.environments import Unavailable
from benchmarks.http import latencies, request, run
from benchmarks.load import CLIENTS, NO_HEADERS
from benchmarks.paths import Bench
from benchmarks.results import Measurement, Runs

TITLE = "keys and tenants in force"
ROUNDS = 14
"""Short loads of each server in turn, each as often first as second, because a difference of 3 % counts."""
SHARE = 12
"""A load takes this part of the seconds of other loads."""
MODELS = {"logistic": "logistic", "iris": "logistic regression"}


@dataclass(frozen=True, slots=True)
class Api:
    """A server with its models, and the headers of a user's requests."""

    url: str
    headers: Mapping[str, str]

    def jobs(self, content: bytes, seconds: float) -> float:
        done = load.jobs(self.url, content, load.three_calls, seconds=seconds, clients=CLIENTS, headers=self.headers)
        return load.per_second(done)

    def calls(self, method: str, target: str, body: bytes, seconds: float, clients: int) -> float:
        wanted = request(method, target, body, {**online.JSON, **self.headers})
        return load.per_second(run(latencies(self.url, wanted, seconds=seconds, clients=clients)), clients)


def measure(bench: Bench, *, seconds: float) -> Iterator[Measurement]:
    """`seconds`: of each load, of which those here take a part."""
    source = data.table(bench.folder, "numbers", ".csv", 1)
    graph = data.model(bench.folder, load.MODEL).graph
    with TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        iris = online.train("logistic regression", folder).graph
        homes = folder / "keyed", folder / "open"
        for home in homes:
            home.mkdir()
        admin, user = create_key(homes[0], "ada", "--scope", "admin"), create_key(homes[0], "sam", "--tenant", "sales")
        with processes.batchserve(homes[0]) as keyed, processes.batchserve(homes[1]) as plain:
            for url, headers in ((keyed.url, admin), (plain.url, NO_HEADERS)):
                service.register(url, load.MODEL, graph, headers)
                service.register(url, "iris", iris, headers)
            apis = Api(keyed.url, user), Api(plain.url, NO_HEADERS)
            yield from _compared(bench, apis, source, seconds / SHARE)


def create_key(home: Path, name: str, *options: str) -> dict[str, str]:
    """The header of a new key of the server in that folder. Raises Unavailable."""
    command = [sys.executable, "-m", "batchserve", "keys", "create", name, "--json", *options]
    done = subprocess.run(command, cwd=home, env=processes.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"no key was created: {done.stderr[-500:]}")
    return {"authorization": f"Bearer {json.loads(done.stdout)['key']}"}


def _compared(bench: Bench, apis: tuple[Api, Api], source: Path, seconds: float) -> Iterator[Measurement]:
    content, record = source.read_bytes(), online.flower()
    waiting = {api.url: service.upload(api.url, source, api.headers) for api in apis}
    kinds: dict[str, tuple[str, Callable[[Api], float]]] = {
        f"small jobs, {CLIENTS} clients, 1 row, upload, predict, download: jobs per second": (
            "jobs/s", lambda api: api.jobs(content, seconds),
        ),
        "status polls, idle: requests per second": (
            "req/s", lambda api: api.calls("GET", f"/v1/jobs/{waiting[api.url]}", b"", seconds, CLIENTS),
        ),
        f"{online.PREFIX}{online.CLIENTS} clients: requests per second": (
            "req/s", lambda api: api.calls("POST", "/v1/models/iris/predict", record, seconds, online.CLIENTS),
        ),
    }  # fmt: skip
    for name, (unit, rate) in kinds.items():
        bench.say(f"with a key and without: {name}")
        rates = Runs(), Runs()
        for api in apis:
            rate(api)  # all processes are warm then
        for number in range(ROUNDS):
            both = list(zip(rates, apis, strict=True))
            for runs, api in reversed(both) if number % 2 else both:
                runs.add(rate(api))
        yield Measurement.of(f"{name} with a key / without", *rates, unit)
