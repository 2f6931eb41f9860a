"""A few plain records are scored without a table, many requests in one run: with the same answers, to the byte."""

import random
from collections.abc import Iterator
from typing import Any

import onnx.parser
import orjson
import pandas as pd
import pytest
from selection import quick_first
from service import Api
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier

from batchserve import registry
from batchserve.conversion import convert
from batchserve.db.connect import Database
from batchserve.domain import Dialect, ModelVersion, Options
from batchserve.errors import BatchserveError
from batchserve.formats import sniff
from batchserve.scoring import plain_records
from batchserve.scoring.online import (
    Online,
    OnlineAnswer,
    OnlineBody,
    OnlineModel,
    OnlineTask,
    predict_online,
    predict_together,
)
from batchserve.scoring.sessions import session_for

NAMES = ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")
FLOWER = dict(zip(NAMES, (5.1, 3.5, 1.4, 0.2), strict=True))
OPTIONS = Options("jsonl", "all")
MODELS = ("iris", "woods", "columns", "logs")


@pytest.fixture(scope="module")
def shared(api: Api, iris: pd.DataFrame) -> Iterator[dict[str, OnlineModel]]:
    """Models that take numbers by name: one matrix, trees with names as labels, an input for each column, and one whose
    answer may be no number or infinite."""
    names = load_iris().target_names[load_iris().target]
    api.register("woods", convert(RandomForestClassifier(5, random_state=0).fit(iris, names), iris).onnx)
    graphs = {
        "columns": """g (float[N, 1] a, float[N] b) => (float[N, 1] sum, int64[N, 1] whole, double[N, 1] wide) {
            one = Constant <value = int64[1] {1}> ()
            column = Unsqueeze (b, one)
            sum = Add (a, column)
            whole = Cast <to = 7> (sum)
            wide = Cast <to = 11> (sum)
        }""",
        "logs": "g (float[N, 1] a) => (float[N, 1] log) { log = Log (a) }",
    }
    for name, graph in graphs.items():
        model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + graph)
        api.register(name, bytes(model.SerializeToString()))
    database = Database(api.settings.database_url)
    with database.read() as connection:
        models = {name: registry.resolve(connection, name) for name in MODELS}
    yield {name: OnlineModel(api.settings.storage, model, OPTIONS, 1000) for name, model in models.items()}
    database.close()


def task(shared: OnlineModel, body: OnlineBody) -> OnlineTask:
    return OnlineTask(shared, *body, Dialect())


def alone(shared: OnlineModel, body: OnlineBody) -> Online | BatchserveError:
    """The answer of the road that takes every request."""
    try:
        return predict_online(task(shared, body))
    except BatchserveError as error:
        return error


def told(answer: OnlineAnswer | BatchserveError) -> object:
    """All of an answer but the time that it took."""
    if isinstance(answer, BatchserveError):
        return type(answer), str(answer), answer.errors, answer.extra
    records, errors, _ = answer
    return records, errors


def sent(body: bytes, media_type: str | None = None) -> OnlineBody | None:
    """A body as its format is recognised; None: it is refused at once, or travels with no other."""
    try:
        format, _ = sniff(body, media_type, None)
    except BatchserveError:
        return None
    return (body, format.name) if format.name in ("json", "jsonl") else None


def is_plain(shared: OnlineModel, body: OnlineBody) -> bool:
    plan = plain_records.plan_of(shared.model.signature, shared.options)
    records = plain_records.parsed(*body, shared.records)
    return plan is not None and records is not None and plain_records.values_of(plan, records) is not None


def row(**other: Any) -> dict[str, Any]:
    return {**FLOWER, **other}


FIRST = NAMES[0]
PLAIN: dict[str, Any] = {
    "a record": [row()],
    "an object alone": row(),
    "several records": [row(**{FIRST: value}) for value in (4.5, 5.0, 6.25)],
    "integers": [row(**{FIRST: 5})],
    "integers and other numbers": [row(**{FIRST: value}) for value in (5, 5.5, 6)],
    "an integer beyond float32": [row(**{FIRST: 2**24 + 1})],
    "the last exact integer": [row(**{FIRST: 2**53}), row(**{FIRST: -(2**53)})],
    "an integer that passes through": [row(id=2**63 - 1), row(id=-(2**63))],
    "a middle of two float32s": [row(**{FIRST: 1.00000005960464477539})],
    "tiny and large numbers": [row(**{FIRST: value}) for value in (5e-324, 1e-45, -0.0, 1e18, 123456789012.5)],
    "texts": [row(id="x"), row(id='«é»\n\t\\"\u0000 \U0001f33b')],
    "truth values": [row(ok=True), row(ok=False)],
    "nulls that pass through": [row(id=None), row(id=7)],
    "nothing but nulls that pass through": [row(id=None), row(id=None)],
    "numbers and nulls that pass through": [row(id=1), row(id=None), row(id=2.5)],
    "another order of keys": [dict(reversed(FLOWER.items()))],
    "orders that differ": [row(id=1), dict(reversed(row(id=2).items()))],
    "keys of other alphabets": [row(**{"Länge 🌻": 1, "ключ": "a"})],
    "a hundred records": [row(id=number) for number in range(100)],
}
OTHERS: dict[str, Any] = {
    "more than a hundred records": [row(id=number) for number in range(101)],
    "a null for the model": [row(), row(**{FIRST: None})],
    "a text for the model": [row(), row(**{FIRST: "5.5"})],
    "a truth value for the model": [row(), row(**{FIRST: True})],
    "a truth value before a text": [row(**{FIRST: True}), row(**{FIRST: "x"}), row(**{FIRST: "False"})],
    "an integer that is rounded": [row(**{FIRST: 2**53 + 1})],
    "integers that are rounded among others": [row(**{FIRST: 2**60 + 1}), row(**{FIRST: 0.5})],
    "an integer beyond 64 bits": [row(id=2**63), row(id=2**64 - 1)],
    "a number beyond float32": [row(**{FIRST: 1e39}), row()],
    "a large number that passes through": [row(id=1e20)],
    "values of several types": [row(id=1), row(id="1"), row(id=True)],
    "truth values and integers": [row(id=1), row(id=True)],
    "arrays and objects": [row(id=[1, 2]), row(id={"a": 1})],
    "a key that is missing": [row(id=1), row()],
    "a key of the model that is missing": [row(), {**FLOWER, FIRST: 1.0} | {}, {k: FLOWER[k] for k in NAMES[1:]}],
    "no key of the model": [{"x": 1}],
    "a text with a colon": [row(id="a:b")],
    "a name of an output": [row(prediction="x", sum=1)],
    "a name without letters": [row(**{" ": 1})],
    "wrapped records": {"data": [row()]},
    "records that are arrays": [list(FLOWER.values())],
    "no records": [],
    "nothing that is a record": [5, "x", None],
    "nothing but nulls": [dict.fromkeys(FLOWER)],
}
TEXTS: dict[str, bytes] = {
    "a key twice": orjson.dumps(row())[:-1] + b',"sepal width (cm)":9}',
    "a passing key twice": b'[{"a":1,"b":2,"x":1,"x":2}]',
    "NDJSON": orjson.dumps(row()) + b"\n" + orjson.dumps(row()) + b"\n",
    "an object over several lines": orjson.dumps(row(), option=orjson.OPT_INDENT_2),
    "records over several lines": orjson.dumps([row(), row()], option=orjson.OPT_INDENT_2),
    "a byte order mark": b"\xef\xbb\xbf" + orjson.dumps([row()]),
    "NaN": orjson.dumps([row()]).replace(b"5.1", b"NaN"),
    "infinity": orjson.dumps([row()]).replace(b"5.1", b"1e999"),
    "a leading zero": orjson.dumps([row()]).replace(b"5.1", b"05.1"),
    "zeros and exponents": orjson.dumps([row()]).replace(b"5.1", b"-0").replace(b"3.5", b"0.35E1"),
    "a lone surrogate": orjson.dumps([row(id="x")]).replace(b'"x"', rb'"\ud83c"'),
    "escaped characters": orjson.dumps([row(id="x")]).replace(b'"x"', rb'"\u00e9\ud83c\udf3b\/"'),
    "an escaped key": orjson.dumps([row()]).replace(b'"sepal', rb'"\u0073epal'),
    "a comma too many": orjson.dumps([row()])[:-1] + b",]",
    "an end that is missing": orjson.dumps([row()])[:-1],
    "more than a document": orjson.dumps([row()]) + b"[]",
    "blanks around": b" \n\t " + orjson.dumps([row()]) + b" \r\n ",
    "an object and blanks around": b"\n" + orjson.dumps(row()) + b"\r\n\n",
    "a control character": orjson.dumps([row(id="x")]).replace(b"x", b"\x01"),
}


def bodies(names: tuple[str, ...]) -> dict[str, bytes]:
    """All of these bodies, with these names for the columns of the model."""
    found = {title: orjson.dumps(body, option=orjson.OPT_PASSTHROUGH_SUBCLASS) for title, body in PLAIN.items()}
    found |= {title: orjson.dumps(body) for title, body in OTHERS.items()} | TEXTS
    for title, body in found.items():
        for old, new in zip(NAMES, names, strict=False):
            body = body.replace(old.encode(), new.encode())
        found[title] = body
    return found


def columns_of(shared: OnlineModel) -> tuple[str, ...]:
    return tuple(column.name for column in shared.model.signature.columns)


@pytest.mark.parametrize("name", quick_first(MODELS, 2))
def test_every_body_has_one_answer_on_both_roads(shared: dict[str, OnlineModel], name: str) -> None:
    model = shared[name]
    given = [
        body
        for text in bodies(columns_of(model)).values()
        for media_type in (None, "application/json", "application/x-ndjson")
        if (body := sent(text, media_type)) is not None
    ]
    for body in given:
        [answer] = predict_together(model.pickled, [body])
        assert told(answer) == told(alone(model, body)), body
    # And in a group of all of them.
    for answer, body in zip(predict_together(model.pickled, given), given, strict=True):
        assert told(answer) == told(alone(model, body)), body


@pytest.mark.parametrize("title", PLAIN)
def test_plain_records_take_the_short_road(shared: dict[str, OnlineModel], title: str) -> None:
    body = sent(orjson.dumps(PLAIN[title]))
    assert body is not None
    assert is_plain(shared["iris"], body)
    assert task(shared["iris"], body).may_travel


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_numbers_answer_plain_records_in_one_run(shared: dict[str, OnlineModel], name: str) -> None:
    model = shared[name]
    plan = plain_records.plan_of(model.model.signature, OPTIONS)
    assert plan is not None
    session = session_for(model.storage, model.model)
    requests = [[dict.fromkeys(plan.names, value)] for value in (0.5, 1.5, 4)]
    answered = plain_records.score_plain(session, plan, [*requests[:2], None, requests[2]], lambda: False)
    assert [body is not None for body in answered.bodies] == [True, True, False, True]


@pytest.mark.parametrize("title", OTHERS)
def test_other_records_do_not(shared: dict[str, OnlineModel], title: str) -> None:
    body = sent(orjson.dumps(OTHERS[title]))
    assert body is None or not is_plain(shared["columns" if title == "a name of an output" else "iris"], body)


def value_of(random_: random.Random) -> Any:
    """A value as clients send them, and now and then an odd one."""
    kind = random_.random()
    if kind < 0.5:
        return round(random_.uniform(0, 9), random_.randrange(8))
    if kind < 0.7:
        return random_.choice([random_.uniform(-1e6, 1e6), random_.gauss(0, 1) * 10.0 ** random_.randint(-50, 50)])
    if kind < 0.9:
        return random_.randint(-1000, 1000)
    return random_.choice([None, True, "7", "a:b", 2**53 + 1, 2**63, 2**70, -0.0, 1e39, 1e300, [1], {}, "é"])


@pytest.mark.parametrize("seed", quick_first(range(6), 2))
def test_random_records_have_one_answer_on_both_roads(shared: dict[str, OnlineModel], seed: int) -> None:
    random_ = random.Random(seed)
    for name in MODELS:
        model = shared[name]
        given = []
        for _ in range(40):
            passing = random_.sample(["id", "note", "prediction", "sum", "log"], random_.randrange(3))
            keys = [*columns_of(model), *passing]
            odd = random_.random() < 0.4
            records = [
                {key: value_of(random_) if odd else round(random_.uniform(0, 9), 2) for key in keys}
                for _ in range(random_.choice([1, 1, 1, 2, 5]))
            ]
            body = sent(orjson.dumps(records) if all(fits(record) for record in records) else b"[]")
            given += [body] if body else []
        assert any(is_plain(model, body) for body in given)
        for answer, body in zip(predict_together(model.pickled, given), given, strict=True):
            assert told(answer) == told(alone(model, body)), body


def fits(record: dict[str, Any]) -> bool:
    """Whether orjson writes it."""
    return all(type(value) is not int or -(2**63) <= value < 2**64 for value in record.values())


def test_an_answer_that_is_no_number_fails_its_record_only(shared: dict[str, OnlineModel]) -> None:
    values = [1.0, -1.0, 0.0, 2.5]
    given = [(orjson.dumps([{"a": value}, {"a": 1.5}]), "json") for value in values]
    answers = predict_together(shared["logs"].pickled, given)
    assert [told(answer) for answer in answers] == [told(alone(shared["logs"], body)) for body in given]


def test_a_model_that_does_not_take_plain_numbers_gets_no_short_road(shared: dict[str, OnlineModel], api: Api) -> None:
    database = Database(api.settings.database_url)
    with database.read() as connection:
        people: ModelVersion = registry.resolve(connection, "people")
    database.close()
    assert plain_records.plan_of(people.signature, OPTIONS) is None
    iris = shared["iris"].model.signature
    assert plain_records.plan_of(iris, Options("jsonl", "all", top_k=1)) is None
    assert plain_records.plan_of(iris, Options("jsonl", "all", (("x", "y"),))) is None  # type: ignore[arg-type]
