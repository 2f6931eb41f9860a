"""Small CSVs and JSONs of plain numbers are scored without a table, many in one run: with the same results, to the
byte.
"""

import json
import random
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pandas as pd
import polars as pl
import pytest
from selection import quick_of
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from batchserve.admission import admit
from batchserve.conversion import convert
from batchserve.domain import Chunk, ChunkLimits, Dialect, ModelVersion, Options, Signature
from batchserve.errors import BatchserveError
from batchserve.inference.inputs import Inputs
from batchserve.inference.kernels import Session
from batchserve.inference.run import VARIES, RunResult, run, varies
from batchserve.scoring import plain_records
from batchserve.scoring.checks import check_input
from batchserve.scoring.direct import DirectItem, DirectTask, score_directly
from batchserve.scoring.inputs import Input
from batchserve.scoring.plain_csv import read_plain
from batchserve.scoring.plain_json import read_json
from batchserve.scoring.planning import PlanTask
from batchserve.scoring.small import Small, SmallTask, score_small
from batchserve.storage import model_key, open_storage

NAMES = ("a", "b", "c")
CSV = Options("csv")
GRAPHS = {
    # Inputs in columns of their own, and outputs of several types.
    "columns": """g (float[N, 1] b, float[N] a) => (float[N, 1] sum, int64[N, 1] whole, double[N, 1] wide, bool[N] big)
    {
        one = Constant <value = int64[1] {1}> ()
        column = Unsqueeze (a, one)
        sum = Add (b, column)
        whole = Cast <to = 7> (sum)
        wide = Cast <to = 11> (sum)
        big = Greater (a, a)
    }""",
    "logs": "g (float[N, 1] a) => (float[N, 1] log) { log = Log (a) }",
    "signs": "g (float[N, 1] a) => (float[N, 1] inverse) { inverse = Reciprocal (a) }",
    "threshold": "g (float[N, 2] x, float limit) => (bool[N, 2] above) { above = Greater (x, limit) }",
    "texts": """g (int64[N, 1] a) => (string[N, 1] text) {
        text = Cast <to = 8> (a)
    }""",
}


def graph(text: str, columns: dict[str, str] | None = None) -> bytes:
    """`columns`: names and types of those of the input x."""
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]> ' + text)
    if columns:
        named = [{"name": name, "dtype": dtype, "input": "x"} for name, dtype in columns.items()]
        onnx.helper.set_model_props(model, {"batchserve.columns": json.dumps(named)})
    return bytes(model.SerializeToString())


def doubling(kind: str, dtype: str) -> bytes:
    return graph(f"g ({kind}[N, 3] x) => ({kind}[N, 3] y) {{ y = Add (x, x) }}", dict.fromkeys(NAMES, dtype))


def estimators() -> dict[str, bytes]:
    flowers = load_iris()
    frame = pd.DataFrame(flowers.data[:, :3], columns=NAMES)
    names = flowers.target_names[flowers.target]
    odd = pd.Series(names).map({"setosa": 'a,"b"', "versicolor": "plain", "virginica": " "})
    holes = frame.mask(np.random.default_rng(0).random(frame.shape) < 0.1)
    kinds = pd.DataFrame({"a": frame.a, "kind": names})
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["kind"]), remainder="passthrough")
    fitted = {
        "logistic": (LogisticRegression(max_iter=500).fit(frame, flowers.target), frame),
        "woods": (RandomForestClassifier(5, random_state=0).fit(frame, names), frame),
        "odd labels": (RandomForestClassifier(5, random_state=0).fit(frame, odd), frame),
        "truth": (LogisticRegression(max_iter=500).fit(frame, flowers.target == 1), frame),
        "boosted": (HistGradientBoostingClassifier(max_iter=5).fit(holes, flowers.target), holes),
        "linear": (LinearRegression().fit(frame, frame.a), frame),
        "kinds": (make_pipeline(encoder, LogisticRegression(max_iter=500)).fit(kinds, flowers.target), kinds),
    }
    return {name: convert(estimator, sample).onnx for name, (estimator, sample) in fitted.items()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DirectTask]:
    """Models of all kinds, each with the plain options."""
    models = estimators() | {name: graph(text) for name, text in GRAPHS.items()}
    models |= {"floats": doubling("float", "float32"), "doubles": doubling("double", "float64")}
    models |= {"longs": doubling("int64", "int64"), "ints": doubling("int32", "int32")}
    models |= {"halves": doubling("float16", "float16")}
    models |= {"unnamed": graph("g (float[N, 3] x) => (float[N, 3] y) { y = Add (x, x) }")}
    models |= {"any": graph("g (float[N, k] x) => (float[N, k] y) { y = Add (x, x) }")}
    home = tmp_path_factory.mktemp("plain")
    storage = open_storage(str(home))
    found = {}
    for number, (name, content) in enumerate(models.items()):
        admitted = admit(content)
        with storage.create(model_key(f"{number:064}")) as writer:
            writer.write(admitted.model)
            writer.commit()
        version = ModelVersion(number, name, 1, f"{number:064}", len(content), admitted.signature)
        found[name] = DirectTask(version, CSV, ChunkLimits(), 2**16)
    Home.address = str(home)
    return found


class Home:
    address = ""


def item(content: bytes, dialect: Dialect = Dialect(), format: str = "csv") -> DirectItem:  # noqa: B008 - it is frozen
    return DirectItem(Input(Home.address, "rows/inputs/x", format, dialect, content), "job")


def by_tables(task: DirectTask, one: DirectItem) -> Small | BatchserveError | None:
    """The outcome on the road that takes every input."""
    try:
        check_input(one.input, task.model, task.options)
    except BatchserveError as refused:
        return refused
    plan = PlanTask(one.input, None, task.limits, most=2)
    small = SmallTask(plan, one.job_id, 1, task.model, task.options, task.inline_bytes, is_stored=False)
    try:
        done = score_small(small)
    except Exception:  # noqa: BLE001 - the worker ends the job with it
        return None
    return done if isinstance(done, Small) else None


def told(outcome: Small | BatchserveError | None) -> object:
    """All of an outcome but the time that it took."""
    if isinstance(outcome, BatchserveError):
        return type(outcome), str(outcome), outcome.errors, outcome.extra
    if outcome is None:
        return None
    facts = {name: fact for name, fact in outcome.scored.facts.items() if name != "model_seconds"}
    return outcome.planned, replace(outcome.scored, facts={}), facts, outcome.result, dict(outcome.contents)


def is_plain(task: DirectTask, one: DirectItem) -> bool:
    assert one.input.content is not None
    if one.input.format != "csv":
        return read_json(one.input.content, one.input.format, task.model, task.options) is not None
    return read_plain(one.input.content, one.input.dialect, task.model, task.options) is not None


def assert_same(task: DirectTask, items: list[DirectItem]) -> None:
    """Alone and in a group of all of them, the outcome is that of the road that takes every input."""
    wanted = [told(by_tables(task, one)) for one in items]
    for one, outcome in zip(items, wanted, strict=True):
        assert told(score_directly(task, [one])[0]) == outcome, one.input.content
    for one, outcome, together in zip(items, wanted, score_directly(task, items), strict=True):
        assert told(together) == outcome, one.input.content


PLAIN = {
    "an index without a name": b",a,b,c\n7,1,2,3\n8,4,5,6\n",
    "lines that end with a delimiter": b"a,b,c,\n1,2,3,\n",
    "a record": b"a,b,c\n1.5,2.25,-3\n",
    "no newline at the end": b"a,b,c\n1.5,2,3",
    "several records": b"a,b,c\n1,2,3\n4,5,6\n7.5,8e2,9E-1\n",
    "CRLF": b"a,b,c\r\n1,2,3\r\n4,5,6\r\n",
    "CRLF but at the end": b"a,b,c\r\n1,2,3\r\n4,5,6",
    "a byte order mark": b"\xef\xbb\xbfa,b,c\n1,2,3\n",
    "another order": b"c,a,b\n1,2,3\n",
    "another order and texts": b"id,c,x,a,b,note\nr1,1,9,2,3,fine\nr2,4,9,5,6,not so fine\n",
    "names with signs": "ä,a,b,c\nx,1,2,3\n".encode(),
    "texts of other alphabets": "id,a,b,c\n日本語,1,2,3\n🌻,4,5,6\n".encode(),
    "an empty text": b"id,a,b,c\n,1,2,3\n",
    "an empty text at the end": b"a,b,c,id\n1,2,3,\n4,5,6,x\n",
    "integers in the middle of two float32s": b"a,b,c\n16777217,-16777219,9007199254740991\n",
    "integers beyond float64": b"a,b,c\n9007199254740993,123456789012345678901234567890,-9223372036854775808\n",
    "zeros": b"a,b,c\n0,0.0,-0.0\n0e5,0.000,0\n",
    "a number like no float32": b"a,b,c\n0.1,3.3333333333333333333333333333333,123456789012.5\n",
    "texts like comments, nulls and formulas": b"id,a,b,c\n#x,1,2,3\nnull,1,2,3\nNA,1,2,3\n=1+1,1,2,3\n'x,1,2,3\n",
    "a name of an output": b"prediction,y_0,a,b,c\n1,2,1,2,3\n",
}
OTHERS = {
    "nothing": b"",
    "a header alone": b"a,b,c\n",
    "a header without an end": b"a,b,c",
    "nothing but lines": b"\n\n\n",
    "a blank line": b"a,b,c\n1,2,3\n\n4,5,6\n",
    "a blank line at the end": b"a,b,c\n1,2,3\n\n",
    "a blank line before": b"\na,b,c\n1,2,3\n",
    "a field too many": b"a,b,c\n1,2,3,4\n",
    "a field that lacks": b"a,b,c\n1,2\n",
    "a field moved to the next line": b"a,b,c\n1,2\n3,4,5,6\n",
    "a missing number": b"a,b,c\n1,,3\n4,5,6\n",
    "a quoted number": b'a,b,c\n1,"2",3\n',
    "a quoted text": b'id,a,b,c\n"x,y",1,2,3\n',
    "a quoted name": b'"a",b,c\n1,2,3\n',
    "a quotation mark in a text": b'id,a,b,c\nx"y,1,2,3\n',
    "CR alone": b"a,b,c\r1,2,3\r",
    "CR in a record": b"a,b,c\n1,2\r,3\n",
    "CR at the end": b"a,b,c\n1,2,3\r",
    "a plus sign": b"a,b,c\n+1,2,3\n",
    "a leading zero": b"a,b,c\n007,2,3\n",
    "no digit before the point": b"a,b,c\n.5,2,3\n",
    "no digit after the point": b"a,b,c\n5.,2,3\n",
    "an underscore": b"a,b,c\n1_000,2,3\n",
    "hexadecimal": b"a,b,c\n0x10,2,3\n",
    "no numbers": b"a,b,c\nnan,inf,-Infinity\n",
    "NaN among numbers": b"a,b,c\nNaN,1,2\n1,2,3\n",
    "truth values": b"a,b,c\ntrue,false,1\n1,2,3\n",
    "truth values as pandas writes them": b"a,b,c\nTrue,False,True\nFalse,True,False\n",
    "truth values before a text": b"a,b,c\nTrue,1,1\nx,2,3\n",
    "words of JSON": b"a,b,c\nnull,[1],{}\n1,2,3\n",
    "a blank before a number": b"a,b,c\n 1,2,3\n",
    "a blank after a number": b"a,b,c\n1,2 ,3\n",
    "a text with a blank before": b"id,a,b,c\nx,1,2,3\n y,1,2,3\n",
    "a text with a blank after": b"id,a,b,c\nx ,1,2,3\n",
    "a tab in a text": b"id,a,b,c\nx\ty,1,2,3\n",
    "a text that is no UTF-8": b"id,a,b,c\nx\xff,1,2,3\n",
    "a text that is no UTF-8 in a record of many": b"id,a,b,c\nok,1,2,3\nx\xff,1,2,3\n",
    "a byte order mark below the header": b"id,a,b,c\n\xef\xbb\xbfx,1,2,3\n",
    "NUL": b"id,a,b,c\nx\0,1,2,3\n",
    "a name twice": b"a,a,b,c\n1,1,2,3\n",
    "no name between others": b"a,,b,c\n1,2,3,4\n",
    "a line that tells the delimiter": b"sep=,\na,b,c\n1,2,3\n",
    "a column of the model that lacks": b"a,b\n1,2\n",
    "no column of the model": b"x,y\n1,2\n",
    "a large number": b"a,b,c\n1e39,2,3\n1,2,3\n",
    "a number beyond all": b"a,b,c\n1e999,2,3\n1,2,3\n",
    "the largest float32": b"a,b,c\n3.4028235e38,2,3\n",
    "almost zero": b"a,b,c\n1e-40,2,3\n",
    "a middle of two float32s": b"a,b,c\n16777217.0,2,3\n",
    "next to a middle": b"a,b,c\n16777217.0000000001,2,3\n",
    "just above a middle": b"a,b,c\n1.00000017881393432617187500001,2,3\n",
    "a negative zero without a point": b"a,b,c\n-0,2,3\n",
    "points and commas": b"a,b,c\n1.000,00,2\n",
    "UTF-16": "a,b,c\n1,2,3\n".encode("utf-16"),
}
EVERY = PLAIN | OTHERS
MODELS = (
    *("logistic", "woods", "truth", "boosted", "linear", "kinds", "floats", "doubles", "longs", "ints", "halves"),
    *("unnamed", "any", *GRAPHS),
)
BY_DEFAULT = {"boosted", "columns", "longs"}
"""Numbers that may be missing, several inputs and outputs, integers."""
PLAIN_MODELS = {*MODELS} - {"kinds", "halves", "threshold", "any"}


@pytest.mark.parametrize("name", quick_of(MODELS, BY_DEFAULT))
def test_every_input_has_one_outcome_on_both_roads(tasks: dict[str, DirectTask], name: str) -> None:
    assert_same(tasks[name], [item(content) for content in EVERY.values()])


@pytest.mark.parametrize("title", PLAIN)
def test_plain_inputs_take_the_short_road(tasks: dict[str, DirectTask], title: str) -> None:
    assert is_plain(tasks["floats"], item(PLAIN[title]))


@pytest.mark.parametrize("title", OTHERS)
def test_other_inputs_do_not(tasks: dict[str, DirectTask], title: str) -> None:
    assert not is_plain(tasks["floats"], item(OTHERS[title]))


GAPS = (b"a,b,c\n1,,3\n,5,\n,,\n7,8,9\n", b"a,b,c,id\n,1,2,\n3,,,x\n", b"x,c,b,a\n,,,\n,1,2,3\n", b"a,b,c\n,,\n")


@pytest.mark.parametrize("content", GAPS)
def test_missing_numbers_are_plain_where_the_model_answers_them(tasks: dict[str, DirectTask], content: bytes) -> None:
    assert is_plain(tasks["boosted"], item(content))
    assert not is_plain(tasks["logistic"], item(content))
    for name in ("boosted", "logistic", "floats", "longs"):
        for passthrough in ("unused", "all"):
            assert_same(replace(tasks[name], options=Options("csv", passthrough)), [item(content)])


def test_a_blank_line_is_no_missing_number(tasks: dict[str, DirectTask]) -> None:
    model = tasks["logs"].model
    [tensor] = model.signature.inputs
    [column] = tensor.columns or ()
    tensor = replace(tensor, columns=(replace(column, nullable=True),))
    task = replace(tasks["logs"], model=replace(model, signature=replace(model.signature, inputs=(tensor,))))
    contents = [b"a\n1\n\n2\n", b"a\n\n", b"a\n1\n\n", b"a,x\n1,\n,\n2,y\n"]
    assert not any(is_plain(task, item(content)) for content in contents)
    assert_same(task, [item(content) for content in contents])


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_numbers_take_the_short_road(tasks: dict[str, DirectTask], name: str) -> None:
    columns = [column.name for column in tasks[name].model.signature.columns] or list(NAMES)
    content = f"{','.join(columns)}\n{','.join('1' for _ in columns)}\n".encode()
    assert is_plain(tasks[name], item(content)) == (name in PLAIN_MODELS)


OPTIONS = [
    *(Options("csv", passthrough) for passthrough in ("unused", "all", "none", ("c", "id"), ("b",), ("nowhere",))),
    *(Options("csv", passthrough, key="id") for passthrough in ("unused", "all", "none")),
    *(Options("csv", key=key) for key in ("a", "c", "nowhere")),
    *(Options("csv", columns=columns) for columns in (("c", "b", "a"), ("a", "b"), {"a": "b", "b": "a"}, {"x": "a"})),
    *(Options("csv", "all", columns={"a": name}) for name in ("id", "c", "nowhere")),
    Options("csv", max_errors=0.5),
    Options("csv", on_row_error="fail"),
    Options("csv", top_k=2),
    Options("csv", inputs={"limit": 2.5}),
    Options("csv", inputs={"limit": "x"}),
    *(Options(format) for format in ("jsonl", "json", "parquet", "arrow", "npy", "npz")),
]


@pytest.mark.parametrize("name", quick_of(MODELS, BY_DEFAULT))
def test_every_option_has_one_outcome_on_both_roads(tasks: dict[str, DirectTask], name: str) -> None:
    contents = [
        b"id,a,b,c\n7,1.5,2,3\n8,4,5,6\n",
        b"a,x,b,c,id\n1,9,2,3,r 1\n4,9,5,6,\n",
        b"c,b,a,id,prediction,input_prediction\n1,2,3,k,p,q\n",
        b"a,b,c\n1,2,3\n",
        b"a,b\n1,2\n",
    ]
    for options in OPTIONS:
        assert_same(replace(tasks[name], options=options), [item(content) for content in contents])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("decimal", [".", ","])
@pytest.mark.parametrize("name", quick_of(["logistic", "floats", "woods", "columns"], {"woods", "columns"}))
def test_every_dialect_has_one_outcome_on_both_roads(
    tasks: dict[str, DirectTask], name: str, delimiter: str, decimal: str
) -> None:
    texts = ["id,a,b,c\nx,1.5,2,3\n", "a,b,c\n1.5,2,3\n1,2,3\n", "a;b;c\n1,5;2;3\n", "id;a;b;c\nx,y;1;2;3\n"]
    texts += [text.replace(",", ";") for text in texts] + [text.replace(",", delimiter) for text in texts]
    for passthrough in ("unused", "all"):
        task = replace(tasks[name], options=Options("csv", passthrough))
        assert_same(task, [item(text.encode(), Dialect(delimiter, decimal=decimal)) for text in texts])


def test_another_delimiter_is_plain(tasks: dict[str, DirectTask]) -> None:
    content = b"id;a;b;c\nx,y;1.5;2;3\n"
    assert is_plain(tasks["floats"], item(content, Dialect(";")))
    [small] = score_directly(tasks["floats"], [item(content, Dialect(";"))])
    assert isinstance(small, Small)
    assert next(iter(small.contents.values())) == b"id;y_0;y_1;y_2\nx,y;3.0;4.0;6.0\n"


def number(random_: random.Random) -> str:
    """A number as files have them."""
    value = random_.choice([random_.uniform(-9, 9), random_.gauss(0, 1) * 10.0 ** random_.randint(-12, 12)])
    kind = random_.randrange(8)
    if kind < 3:
        return str(random_.randint(-99, 99))
    if kind < 5:
        return str(round(value, random_.randrange(6)))
    return random_.choice([repr(value), f"{value:.6g}", f"{value:.17g}", f"{value:.3e}", f"{value:f}"])


ODD = [
    "",
    " ",
    "+1",
    "-0",
    "1e39",
    "1e-46",
    "nan",
    "inf",
    '"1"',
    "16777217",
    "9007199254740993",
    "1_0",
    "0x1",
    "é",
    "\r",
]


def table(random_: random.Random, names: list[str]) -> bytes:
    passing = random_.sample(["id", "note", "prediction", "y_0", "log"], random_.randrange(3))
    columns = random_.sample([*names, *passing], len(names) + len(passing))
    lines = [",".join(columns)]
    odd = random_.choice([0, 0, 0.05])
    for _ in range(random_.choice([1, 1, 2, 5, 130])):
        texts = [number(random_) if name in names or random_.random() < 0.5 else f"t {name}" for name in columns]
        lines.append(",".join(random_.choice(ODD) if random_.random() < odd else text for text in texts))
    return (random_.choice(["\n", "\n", "\r\n"]).join(lines) + random_.choice(["\n", ""])).encode()


def damaged(random_: random.Random, content: bytes) -> bytes:
    """The content with a byte removed, replaced or added."""
    at = random_.randrange(len(content))
    byte = bytes([random_.choice(b'\n\r,"; \t0-+.eE[]{}:x\xff\xe9\x00')])
    return content[:at] + random_.choice([b"", byte]) + content[at + random_.randrange(2) :]


@pytest.mark.parametrize(("seed", "tables"), quick_of([(0, 2), *((seed, 12) for seed in range(4))], {(0, 2)}))
def test_random_tables_have_one_outcome_on_both_roads(tasks: dict[str, DirectTask], seed: int, tables: int) -> None:
    check_random(tasks, random.Random(seed), tables)


def check_random(tasks: dict[str, DirectTask], random_: random.Random, tables: int) -> None:
    plain = 0
    for name in MODELS:
        names = [column.name for column in tasks[name].model.signature.columns] or list(NAMES)
        options: Any = random_.choice(
            [CSV, CSV, Options("csv", "all"), Options("csv", "none"), random_.choice(OPTIONS)]
        )
        task = replace(tasks[name], options=options)
        contents = [table(random_, names) for _ in range(tables)]
        contents += [damaged(random_, content) for content in contents for _ in range(2)]
        items = [item(content) for content in contents]
        plain += sum(is_plain(task, one) for one in items)
        assert_same(task, items)
    assert plain > 0


# Numbers


def texts_of(random_: np.random.Generator, many: int) -> dict[str, list[str]]:
    """So many spellings of numbers of each kind."""
    normal = random_.standard_normal(many) * 10.0 ** random_.integers(-6, 6, many)
    singles = random_.integers(0, 2**32, many, dtype=np.uint32).view(np.float32)
    singles = singles[np.isfinite(singles)]
    lower = singles[np.abs(singles) < 1e38]
    upper = np.nextafter(lower, np.float32(np.inf))
    middles = (lower.astype(float) + upper) / 2
    digits = [f"{a}{b:018}.{c:018}" for a, b, c in random_.integers(1, 10**9, (many, 3)).tolist()]
    near = [f"{middle:.30e}" for middle in middles]
    return {
        "as Python writes them": list(map(repr, normal.tolist())),
        "as numpy writes float32": list(map(str, normal.astype(np.float32))),
        "six digits": [f"{value:.6g}" for value in normal],
        "seventeen digits": [f"{value:.17g}" for value in normal],
        "exponents": [f"{value:.3e}" for value in normal * 10.0 ** random_.integers(-30, 30, many)],
        "of all float32s": [repr(value) for value in singles.astype(float).tolist()],
        "middles of two float32s": [repr(value) for value in middles.tolist()],
        "middles in full": near,
        "just above middles": [text.replace("e", "0000001e") for text in near],
        "next to middles": [
            repr(v) for v in np.nextafter(middles, random_.choice([-np.inf, np.inf], many)[: len(middles)]).tolist()
        ],
        "integers": list(map(str, random_.integers(-(2**62), 2**62, many).tolist())),
        "small integers": list(map(str, random_.integers(-(2**26), 2**26, many).tolist())),
        "many digits": digits,
        "huge and tiny": [
            f"{a}e{b}" for a, b in zip(random_.integers(-99, 99, many), random_.integers(-400, 400, many), strict=True)
        ],
    }


@pytest.mark.parametrize(("name", "kind"), [("signs", pl.Float32()), ("wide", pl.Float64())])
def test_numbers_are_those_of_the_other_road_bit_by_bit(
    tasks: dict[str, DirectTask], name: str, kind: pl.DataType
) -> None:
    task = tasks["signs"]
    if name == "wide":
        [tensor] = task.model.signature.inputs
        [column] = tensor.columns or ()
        wide = replace(tensor, dtype="float64", columns=(replace(column, dtype="float64"),))
        task = replace(task, model=replace(task.model, signature=replace(task.model.signature, inputs=(wide,))))
    check_numbers(task, kind, np.random.default_rng(1), 4000)


def check_numbers(task: DirectTask, kind: pl.DataType, random_: np.random.Generator, many: int) -> dict[str, float]:
    shares = {}
    for title, texts in texts_of(random_, many).items():
        body = "\n".join(["a", *texts, ""]).encode()
        wanted = pl.read_csv(body, schema={"a": kind})["a"].to_numpy()
        plain = 0
        size = 1 if "middles" in title or "huge" in title else 8
        for start in range(0, len(texts), size):
            some = "\n".join(["a", *texts[start : start + size], ""]).encode()
            read = read_plain(some, Dialect(), task.model, CSV)
            if read is not None:
                plain += read.chunk.records
                [array] = read.inputs.values()
                assert array[:, 0].tobytes() == wanted[start : start + size].tobytes(), some
        shares[title] = plain / len(texts)
    assert shares["as Python writes them"] > 0.9
    return shares


# NDJSON

LINES = Options("jsonl")
PLAIN_LINES = {
    "a record": b'{"a":1.5,"b":2,"c":3}\n',
    "no newline at the end": b'{"a":1.5,"b":2,"c":3}',
    "several records": b'{"a":1.5,"b":2,"c":3}\n{"a":4,"b":5,"c":-6e2}\n',
    "CRLF": b'{"a":1.5,"b":2,"c":3}\r\n{"a":4,"b":5,"c":6}\r\n',
    "blanks": b' {"a" : 1.5,\t"b":2,"c":3 } \n{"a":4,"b":5,"c":6}\n',
    "another order and texts": '{"id":"","c":1,"b":2,"x":true,"a":3}\n{"x":null,"id":"é","a":3,"b":1,"c":2}\n'.encode(),
    "a name of an output of others": b'{"a":1,"b":2,"c":3,"prediction":4}\n',
    "integers and other numbers that pass through": b'{"a":1,"b":2,"c":3,"n":4}\n{"a":1,"b":2,"c":3,"n":4.5}\n',
    "a hundred records": b"".join(b'{"a":%d,"b":2,"c":3}\n' % number for number in range(100)),
}
OTHER_LINES = {
    "nothing": b"",
    "more than a hundred records": b"".join(b'{"a":%d,"b":2,"c":3}\n' % number for number in range(101)),
    "a blank line": b'{"a":1,"b":2,"c":3}\n\n{"a":1,"b":2,"c":3}\n',
    "a blank line at the end": b'{"a":1,"b":2,"c":3}\n\n',
    "two records in a line": b'{"a":1,"b":2,"c":3},{"a":1,"b":2,"c":3}\n',
    "a record in two lines": b'{"a":1,"b":2,\n"c":3}\n',
    "two records in a line and one in two": b'{"a":1,"b":2,"c":3},{"a":1,"b":2,"c":3}\n{"a":1,"b":2\n"c":3}\n',
    "a key that lacks": b'{"a":1,"b":2,"c":3}\n{"a":1,"b":2}\n',
    "a key more": b'{"a":1,"b":2,"c":3}\n{"a":1,"b":2,"c":3,"d":4}\n',
    "a key twice": b'{"a":1,"b":2,"c":3,"a":4}\n',
    "a byte order mark": b'\xef\xbb\xbf{"a":1,"b":2,"c":3}\n',
    "a text for the model": b'{"a":"1","b":2,"c":3}\n',
    "a null for the model": b'{"a":null,"b":2,"c":3}\n{"a":1,"b":2,"c":3}\n',
    "a truth value for the model": b'{"a":true,"b":2,"c":3}\n{"a":1,"b":2,"c":3}\n',
    "a truth value before a text": b'{"a":true,"b":2,"c":3}\n{"a":"x","b":2,"c":3}\n{"a":"True","b":2,"c":3}\n',
    "an array": b"[1,2,3]\n",
    "NaN": b'{"a":NaN,"b":2,"c":3}\n',
    "a large number": b'{"a":1e39,"b":2,"c":3}\n{"a":1,"b":2,"c":3}\n',
    "bytes that are no UTF-8": b'{"a":1,"b":2,"c":3,"id":"\xff"}\n',
    "CR between records": b'{"a":1,"b":2,"c":3}\r{"a":1,"b":2,"c":3}\n',
    "a text with a colon": b'{"a":1,"b":2,"c":3,"id":"x:y"}\n',
}


def lines(content: bytes) -> DirectItem:
    return item(content, format="jsonl")


@pytest.mark.parametrize("name", quick_of(MODELS, BY_DEFAULT))
def test_every_ndjson_has_one_outcome_on_both_roads(tasks: dict[str, DirectTask], name: str) -> None:
    every = [lines(content) for content in (PLAIN_LINES | OTHER_LINES).values()]
    assert_same(replace(tasks[name], options=LINES), every)
    for options in OPTIONS:
        options = replace(options, format="jsonl")
        some = [lines(PLAIN_LINES[title]) for title in ("a record", "another order and texts", "CRLF")]
        assert_same(replace(tasks[name], options=options), some)


@pytest.mark.parametrize("title", PLAIN_LINES)
def test_plain_records_take_the_short_road(tasks: dict[str, DirectTask], title: str) -> None:
    assert is_plain(replace(tasks["floats"], options=LINES), lines(PLAIN_LINES[title]))


@pytest.mark.parametrize("title", OTHER_LINES)
def test_other_records_do_not(tasks: dict[str, DirectTask], title: str) -> None:
    assert not is_plain(replace(tasks["floats"], options=LINES), lines(OTHER_LINES[title]))


ARRAYS = {
    "an array": b'[{"a":1.5,"b":2,"c":3},{"a":4,"b":5,"c":-6e2}]',
    "an array of one": b'[{"a":1.5,"b":2,"c":3}]\n',
    "blanks": b' \r\n[ {"a" : 1.5,\t"b":2,"c":3 }\n,\n\n{"a":4,"b":5,"c":6} ]\t\n ',
    "an object": b'{"a":1.5,"b":2,"c":3}',
    "an object and blanks": b' \n{"a":1.5,\n"b":2,"c":3} \n',
    "brackets in texts": b'[{"id":"]","a":1.5,"b":2,"c":3},{"id":"[","a":4,"b":5,"c":6}]',
    "an object with brackets": b'{"id":"]","a":1.5,"b":2,"c":3}',
    "a key that wraps arrays": b'{"data":5,"a":1.5,"b":2,"c":3}',
}
OTHER_ARRAYS = {
    "nothing": b"",
    "no records": b"[]",
    "no array": b"7",
    "arrays": b"[[1,2,3]]",
    "wrapped records": b'{"data":[{"a":1,"b":2,"c":3}]}',
    "a comma too many": b'[{"a":1,"b":2,"c":3},]',
    "more behind": b'[{"a":1,"b":2,"c":3}]]',
    "no end": b'[{"a":1,"b":2,"c":3}',
    "a byte order mark": b'\xef\xbb\xbf[{"a":1,"b":2,"c":3}]',
    "NDJSON": b'{"a":1,"b":2,"c":3}\n{"a":1,"b":2,"c":3}\n',
}


@pytest.mark.parametrize("name", quick_of(MODELS, BY_DEFAULT))
@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_every_json_has_one_outcome_on_both_roads(tasks: dict[str, DirectTask], name: str, format: str) -> None:
    contents = [*(ARRAYS | OTHER_ARRAYS).values()]
    contents += [b"[%b]" % content.removesuffix(b"\n").replace(b"\n", b",") for content in OTHER_LINES.values()]
    every = [item(content, format="json") for content in contents]
    assert_same(replace(tasks[name], options=Options(format)), every)
    assert_same(replace(tasks[name], options=Options(format, "all", key="a")), every)


@pytest.mark.parametrize("title", ARRAYS)
def test_plain_arrays_take_the_short_road(tasks: dict[str, DirectTask], title: str) -> None:
    for format in ("json", "jsonl"):
        assert is_plain(replace(tasks["floats"], options=Options(format)), item(ARRAYS[title], format="json"))


@pytest.mark.parametrize("title", OTHER_ARRAYS)
def test_other_arrays_do_not(tasks: dict[str, DirectTask], title: str) -> None:
    assert not is_plain(replace(tasks["floats"], options=Options("json")), item(OTHER_ARRAYS[title], format="json"))


def test_records_for_another_format_or_with_options_for_columns_take_the_other_road(
    tasks: dict[str, DirectTask],
) -> None:
    record = lines(PLAIN_LINES["a record"])
    for options in (CSV, Options("parquet"), replace(LINES, columns={"a": "b"}), replace(LINES, top_k=1)):
        task = replace(tasks["floats"], options=options)
        assert not is_plain(task, record)
        assert_same(task, [record])


def value(random_: random.Random) -> str:
    """A value as clients write it, and now and then an odd one."""
    if random_.random() < 0.9:
        return number(random_)
    return random_.choice(
        ["null", "true", '"7"', '"a:b"', str(2**53 + 1), str(2**63), "-0", "1e39", "[1]", "01", '"é"']
    )


@pytest.mark.parametrize("seed", range(2))
def test_random_records_have_one_outcome_on_both_roads(tasks: dict[str, DirectTask], seed: int) -> None:
    random_ = random.Random(seed)
    plain = 0
    for name in MODELS:
        names = [column.name for column in tasks[name].model.signature.columns] or list(NAMES)
        options = replace(random_.choice([LINES, LINES, *OPTIONS]), format="jsonl")
        task = replace(tasks[name], options=options)
        contents = []
        for _ in range(8):
            keys = [*names, *random_.sample(["id", "note", "prediction", "y_0"], random_.randrange(3))]
            is_odd, records = random_.random() < 0.4, []
            for _ in range(random_.choice([1, 1, 2, 5])):
                own = [value(random_) if is_odd else str(round(random_.uniform(0, 9), 2)) for _ in keys]
                records.append("{" + ",".join(f'"{key}":{text}' for key, text in zip(keys, own, strict=True)) + "}")
            contents.append("\n".join([*records, ""]).encode())
        contents += [damaged(random_, content) for content in contents]
        plain += sum(is_plain(task, lines(content)) for content in contents)
        assert_same(task, [lines(content) for content in contents])
    assert plain > 0


# Groups


def test_chunks_are_those_that_planning_gives(tasks: dict[str, DirectTask]) -> None:
    content = b"\xef\xbb\xbfa,b,c\r\n1,2,3\r\n4,5,6"
    read = read_plain(content, Dialect(), tasks["floats"].model, CSV)
    assert read is not None
    assert read.chunk == Chunk(0, 2, 10, len(content))
    for limits in (ChunkLimits(records=2), ChunkLimits(records=1), ChunkLimits(bytes=12), ChunkLimits(bytes=11)):
        assert_same(replace(tasks["floats"], limits=limits), [item(content)])


def test_a_result_that_is_not_small_is_left_to_the_worker(tasks: dict[str, DirectTask]) -> None:
    task = replace(tasks["floats"], inline_bytes=40)
    short, long = item(b"a,b,c\n1,2,3\n"), item(b"a,b,c\n1,2,3\n4,5,6\n7,8,9\n")
    assert is_plain(task, long)
    assert_same(task, [short, long])
    assert [outcome is None for outcome in score_directly(task, [short, long])] == [False, True]


def test_an_answer_that_is_no_number_affects_its_own_input_only(tasks: dict[str, DirectTask]) -> None:
    contents = [f"a\n1.5\n{value}\n".encode() for value in ("2.5", "-1.0", "0.0", "3")]
    assert all(is_plain(tasks["logs"], item(content)) for content in contents)
    assert_same(tasks["logs"], [item(content) for content in contents])


def test_an_answer_that_is_to_be_finite_affects_its_own_input_only(tasks: dict[str, DirectTask]) -> None:
    model = tasks["logs"].model
    outputs = tuple(replace(output, finite=True) for output in model.signature.outputs)
    task = replace(tasks["logs"], model=replace(model, signature=replace(model.signature, outputs=outputs)))
    assert_same(task, [item(b"a\n1.5\n%b\n" % number) for number in (b"2.5", b"-1.0", b"0.0")])
    task = replace(task, options=LINES)
    items = [lines(b'{"a":1.5}\n{"a":%b}\n' % number) for number in (b"2.5", b"-1.0", b"0.0")]
    assert all(is_plain(task, one) for one in items)
    assert_same(task, items)


def test_inputs_of_several_headers_and_dialects_go_in_one_run(
    tasks: dict[str, DirectTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks["logistic"]
    items = [item(b"a,b,c\n1,2,3\n4,5,6\n"), item(b"c;id;b;a\n3;9;2;1\n", Dialect(";")), item(b"a,b,c\n1,,3\n")]
    assert_same(task, items)
    ran: list[int] = []

    def counted(session: Session, signature: Signature, inputs: Inputs, records: int, *rest: Any) -> RunResult:
        ran.append(records)
        return run(session, signature, inputs, records, *rest)

    monkeypatch.setattr("batchserve.scoring.direct.run", counted)
    score_directly(task, items)
    assert ran == [3]


def test_a_model_that_fails_is_left_to_the_worker(tasks: dict[str, DirectTask]) -> None:
    model = replace(tasks["floats"].model, digest="f" * 64)
    items = [item(b"a,b,c\n1,2,3\n"), item(b"a,b\n1,2\n")]
    task = replace(tasks["floats"], model=model)
    assert_same(task, items)
    assert score_directly(task, items)[0] is None


def test_a_model_whose_answers_depend_on_others_scores_each_input_by_itself(tasks: dict[str, DirectTask]) -> None:
    model = tasks["floats"].model
    signature = replace(model.signature, notes=(VARIES,))
    assert varies(signature)
    task = replace(tasks["floats"], model=replace(model, signature=signature))
    assert not is_plain(task, item(b"a,b,c\n1,2,3\n"))
    assert plain_records.plan_of(model.signature, CSV) is not None
    assert plain_records.plan_of(signature, CSV) is None


def test_labels_that_need_quotation_marks_get_them(tasks: dict[str, DirectTask]) -> None:
    items = [item(f"a,b,c\n{line}\n".encode()) for line in ("5,3,1", "6,3,4", "6,3,6")]
    assert all(is_plain(tasks["odd labels"], one) for one in items)
    assert_same(tasks["odd labels"], items)


def test_inputs_in_files_take_the_other_road(tasks: dict[str, DirectTask]) -> None:
    record = item(b"a,b,c\n1,2,3\n")
    absent = replace(record, input=replace(record.input, content=None))
    with pytest.raises(FileNotFoundError):
        score_directly(tasks["floats"], [absent])
