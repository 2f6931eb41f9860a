"""Interactive calls are served in turn: no call of a tenant delays another tenant."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import onnx.parser
import pytest
from postgres import address_of
from service import ok, problem

from batchserve import keys
from batchserve.access import Scope
from batchserve.db.connect import Database
from batchserve.errors import TooManyRequests
from batchserve.service.turns import Lane, Place, Turn, Turns


def ask(turns: Turns, calls: str) -> list[Turn]:
    """A turn for each letter, the tenant; a capital letter is a check."""
    return [turns.ask(Place(letter.lower(), Lane.CHECK if letter.isupper() else Lane.ONLINE)) for letter in calls]


def come(asked: list[Turn]) -> str:
    """`+` for each turn that has come, `.` for the others."""
    return "".join("+" if turn.has_come else "." for turn in asked)


def order(turns: Turns, calls: str) -> list[int]:
    """The order in which these calls run, when each ends before the next one."""
    asked = ask(turns, calls)
    running = [index for index, turn in enumerate(asked) if turn.has_come]
    ended: list[int] = []
    while running:
        before = come(asked)
        ended.append(running.pop(0))
        asked[ended[-1]].end()
        running += [index for index, turn in enumerate(asked) if turn.has_come and before[index] == "."]
    return ended


def test_a_tenant_never_takes_the_last_slot() -> None:
    turns = Turns(3, 64)
    asked = ask(turns, "aaAb")
    assert come(asked) == "++.+"
    asked[3].end()
    assert come(asked) == "++.+"  # that slot is left to others
    asked[0].end()
    assert come(asked) == "++++"


def test_tenants_take_turns_and_each_goes_in_order() -> None:
    assert order(Turns(1, 64), "aaaabbbc") == [0, 4, 7, 1, 5, 2, 6, 3]
    assert order(Turns(2, 64), "aaaabbbc") == [0, 4, 7, 1, 5, 2, 6, 3]


def test_the_tenant_with_the_fewest_running_calls_comes_first() -> None:
    asked = ask(Turns(3, 64), "aabbc")
    assert come(asked) == "+++.."
    asked[0].end()
    assert come(asked) == "+++.+"


def test_the_checks_of_a_tenant_come_before_its_other_calls() -> None:
    assert order(Turns(1, 64), "aaaAbA") == [0, 4, 3, 5, 1, 2]


def test_a_turn_that_ended_no_longer_counts_however_often_it_is_ended() -> None:
    turns = Turns(1, 64)
    first, left, last = ask(turns, "aaa")
    left.end()
    for _ in range(2):
        first.end()
    assert come([first, left, last]) == "+.+"
    assert come(ask(turns, "b")) == "."
    last.end()
    assert come(ask(turns, "c")) == "."


def test_what_waits_for_a_turn_may_end_it_and_ask_for_another_when_it_comes() -> None:
    turns = Turns(1, 64)
    first, second, third = ask(turns, "aba")
    asked: list[Turn] = []

    def act() -> None:
        second.end()
        asked.extend(ask(turns, "b"))

    second.then(act)
    first.end()
    assert come([second, third, *asked]) == "++."
    third.end()
    assert come(asked) == "+"


def test_the_calls_of_a_tenant_in_progress_are_limited() -> None:
    turns = Turns(1, 2)
    with turns.place("a", Lane.ONLINE), turns.place("b", Lane.ONLINE), turns.place("a", Lane.CHECK):
        with (
            turns.place("a", Lane.ONLINE),
            pytest.raises(TooManyRequests, match="2 online predictions of tenant 'a'"),
            turns.place("a", Lane.ONLINE),
        ):
            pass
        with turns.place("a", Lane.ONLINE):
            pass


# --- a server ---------------------------------------------------------------------------------------------------------


def patient_onnx() -> bytes:
    """y = -x or x, after as many steps as x says."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N, 1] x) => (float[N, 1] y) {
            steps = ReduceMax <keepdims = 0> (x)
            trips = Cast <to = 7> (steps)
            always = Constant <value = bool {1}> ()
            y = Loop (trips, always, x) <body = b (int64 i, bool on, float[N, 1] a) => (bool more, float[N, 1] c) {
                more = Identity(on)
                c = Neg(a)
            }>
        }"""
    )
    return bytes(model.SerializeToString())


FOR_EVER = 1e12


@dataclass(frozen=True)
class Shared:
    """A server with the model `patient`, and the keys of tenants a and b."""

    url: str
    a: dict[str, str]
    b: dict[str, str]

    def online(self, key: dict[str, str], steps: float = 1) -> httpx2.Response:
        records = [{"x": steps}]
        return httpx2.post(f"{self.url}/v1/models/patient/predict", json=records, headers=key, timeout=90)

    def job(self, key: dict[str, str], wait: int) -> Any:
        """A finished job of one row."""
        headers = {**key, "content-type": "text/csv", "prefer": f"wait={wait}"}
        query: dict[str, str | bool] = {"model": "patient", "reuse": False}
        return ok(httpx2.post(f"{self.url}/v1/predict", params=query, content="x\n2\n", headers=headers, timeout=90))

    def begun(self, key: dict[str, str]) -> socket.socket:
        """The connection of an online prediction that never ends."""
        body = json.dumps([{"x": FOR_EVER}])
        head = {**key, "host": "localhost", "content-type": "application/json", "content-length": str(len(body))}
        lines = ["POST /v1/models/patient/predict HTTP/1.1", *(f"{name}: {value}" for name, value in head.items())]
        address = urlsplit(self.url)
        connection = socket.create_connection((address.hostname, address.port), timeout=60)
        connection.sendall("\r\n".join([*lines, "", body]).encode())
        return connection

    def refused(self, key: dict[str, str]) -> httpx2.Response:
        """The response to a call beyond the limit; until then calls are sent, and their clients disconnect."""
        deadline = time.monotonic() + 30
        while (answer := self.online(key)).status_code != 429:
            assert time.monotonic() < deadline, answer.text
        return answer


def answered(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, start_server: Callable[..., AbstractContextManager[str]]
) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    settings = {"ONLINE_CALLS": "4", "ONLINE_TIMEOUT": "60", "ONLINE_WAIT": "20", "FREE_BYTES": "0"}
    with start_server(folder, **{f"BATCHSERVE_{name}": value for name, value in settings.items()}) as url:
        ok(httpx2.put(f"{url}/v1/models/patient", content=patient_onnx(), timeout=60), 201)
        database = Database(address_of(folder / "storage"))
        with database.write() as connection:
            made = [keys.create(connection, name, Scope.USER, name, time.time())[1] for name in "ab"]
        database.close()
        yield Shared(url, *({"authorization": f"Bearer {key}"} for key in made))


@pytest.mark.slow
@pytest.mark.alone
def test_slow_calls_of_a_tenant_delay_no_other_and_end_when_their_clients_disconnect(shared: Shared) -> None:
    with ExitStack() as open_:
        endless = [open_.enter_context(shared.begun(shared.a)) for _ in range(4)]
        answer = shared.refused(shared.a)
        problem(answer, 429, "too-many-requests")
        assert answer.headers["retry-after"] == "1"
        assert shared.job(shared.b, wait=60)["state"] == "completed"
        assert ok(shared.online(shared.b))["prediction"] == [{"x": 1, "y": -1.0}]
        assert not any(answered(connection) for connection in endless)  # all that while
    deadline = time.monotonic() + 30
    while (answer := shared.online(shared.a)).status_code == 429:  # until their disconnects are noticed
        assert time.monotonic() < deadline
    ok(answer)
    assert shared.job(shared.a, wait=60)["state"] == "completed"
