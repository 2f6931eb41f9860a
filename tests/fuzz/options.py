"""Options, headers and paths of every type and extreme."""

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fuzz.case import Case, Headers, Step, query
from fuzz.models import COLUMNS

_HEADER = ",".join(("id", *COLUMNS))
BODY = f"{_HEADER}\n0,5.1,3.5,1.4,0.2\n1,wide,3.5,1.4,0.2\n2,6.1,2.9,4.7,1.4\n".encode()
NAMES = (
    "model", "format", "passthrough", "columns", "key", "on_row_error", "max_errors", "top_k", "inputs", "reuse",
    "priority", "run_after", "metadata", "delimiter", "decimal", "encoding", "filename", "wait", "state", "limit",
    "after", "q", "partial", "csv_escape", "rows", "webhook", "expires_in", "tenant", "unknown", "",
)  # fmt: skip
SENSIBLE: dict[str, tuple[Any, ...]] = {
    "model": ("iris", "iris@1", "people", "arrays"),
    "format": ("csv", "jsonl", "json", "parquet", "arrow", "arrows", "npy", "npz"),
    "passthrough": ("all", "none", "unused", ["id"]),
    "columns": (list(COLUMNS), {COLUMNS[0]: "id"}),
    "key": ("id",),
    "on_row_error": ("continue", "fail"),
    "max_errors": (1, 2, 0.5, 1.0),
    "top_k": (1, 2, 3),
    "inputs": ({"threshold": 1}, {"threshold": 0.5}),
    "reuse": (True, False),
    "priority": (-100, 0, 100),
    "run_after": ("2020-01-01T00:00:00Z", "2040-01-01T00:00:00+02:00"),
    "expires_in": ("7d", 3600, "12h"),
    "metadata": ({"night": "1"}, {}),
    "delimiter": (",", "tab", ";", "|"),
    "decimal": (".", ","),
    "encoding": ("utf-8", "latin-1", "utf-16"),
    "wait": (0, 0.1),
    "limit": (1, 200),
}
NUMBERS = ("inf", "-inf", "nan", "Infinity", "1e400", "-1e400", "1e308", "5e-324", "-0.0", "-1", "0", "0.5", "1.5",
           "2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616",
           "9" * 400, "1_000", " 1 ", "٣", "0x10", "1e5")  # fmt: skip
TIMES = ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00-23:59", "9999-12-31T23:59:59Z",
         "9999-12-31T23:59:59.999999-23:59", "9999-12-31T23:59:59.999999+23:59", "1969-12-31T23:59:59Z",
         "1582-10-10T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-20T24:00:00Z", "2026-11-20T02:00:60Z",
         "1e18", "-1e18", "253402300800", "-62135596801", "2026-11-20", "2200-01-01T00:00:00Z")  # fmt: skip
TEXTS = ("", " ", "\0", "a\0b", "\ud800", "a\udfffb", "\u202e", "\u2028", "\ufffe", "😀" * 50, "x" * 5000, "é" * 300,
         "../../etc/passwd", "' OR 1=1 --", "%", "%25", "[", "{", "[]", "{}", "null", "true", "[" * 3000, '{"a":' * 500,
         '["id","id"]', '{"a":"\\ud800"}', '{"a":NaN}', '{"a":1e400}', '{"":""}', '{"threshold":1e39}',
         '{"threshold":NaN}', '{"threshold":[1,2]}', '{"threshold":null}', '{"threshold":"\\ud800"}',
         '{"threshold":' + "9" * 400 + "}", "iris@0", "iris@99999999999999999999", "iris@", "@", "a=b;c", "\r\n", "\t",
         "*", "\x7f", "\x1b[31m", "2026-11-20T02:00:00Z")  # fmt: skip
# As JSON text, including values that json.dumps cannot write.
LITERALS = ("null", "true", "false", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e308", "-0.0", "1.5", "-1",
            "0", "1", "2", "9223372036854775808", "-9223372036854775809", "9" * 400, "[]", "{}", "[[]]", "[null]",
            "[1,2]", '[""]', '{"":""}', '{"a":null}', '{"a":{"b":[1]}}', '""', '"\\u0000"', '"\\ud800"', '["\\ud800"]',
            '{"\\ud800":"x"}', '{"x":"\\ud800"}', '{"x":"\\u0000"}', "[" * 200 + "]" * 200, '{"threshold":NaN}',
            '{"threshold":1e400}', '{"threshold":"\\ud800"}', '{"threshold":[[1]]}', '{"threshold":1e39}',
            '{"threshold":true}', '{"threshold":"x"}')  # fmt: skip
HEADERS: dict[str, tuple[str, ...]] = {
    "prefer": ("wait=1", "wait=0", "wait=-1", "wait=99999999999999999999", "wait=nan", "wait=", "wait=²", "wait=٣",
               "wait=\"1\"", ",,,", "wait=1;x=\"", "respond-async"),
    "idempotency-key": ("", '""', "a", "x" * 255, "x" * 256, '"a"', "\xff\xfe", "a,b", "\x01"),
    "content-type": ("text/csv", "application/json", "application/json; charset=utf-16", "multipart/form-data",
                     "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 300, ";", "a/b/c",
                     "*/*",
                     "text/csv; charset=klingon", "image/png", "application/x-www-form-urlencoded", "\xff", "x" * 4000,
                     'multipart/form-data; boundary="\xe9"', "multipart/form-data; boundary=edge; boundary=other"),
    "content-encoding": ("gzip", "zstd", "br", "gzip, gzip", "identity", "", "GZIP", "x-gzip", ",", "gzip;q=1"),
    "content-digest": ("sha-256=:AAAA:", "sha-256=", "sha-256=:=:", "md5=:AAAA:", "sha-256=:\xff:", ",", "sha-256"),
    "repr-digest": ("sha-256=:" + "A" * 43 + "=:", "sha-512=:AAAA:", "::"),
    "content-disposition": ('attachment; filename="a.csv"', "attachment; filename*=UTF-8''%ff%fe", "filename",
                            "attachment; filename*=klingon''x", "attachment; filename=" + "x" * 3000,
                            "attachment; filename*=UTF-8''%ed%a0%80", "attachment; filename=\"\\\"", ";;;=",
                            "attachment; filename*=utf-8'", "attachment; filename=\"\xff\x80\""),
    "accept": ("application/json", "text/csv;q=nan", "*/*;q=-1", "q=1", ";", "text/*;q=0", "application/x-npy",
    "," * 500,
               "text/csv;q=2", "\xff", "text/csv;q=0.0001"),
    "range": ("bytes=0-0", "bytes=-1", "bytes=5-2", "bytes=0-", "bytes=-0", "bytes=99999999999999999999-", "bytes=",
              "bytes=0-0,0-0", "bytes=0-1,3-4,-1", "lines=0-1", "bytes=a-b", "bytes=²-", "bytes=0-" + "9" * 400,
              "bytes=" + "0-0," * 300, "bytes=--1", "bytes=٣-٤".encode().decode("latin-1")),
    "if-range": ('"x"', 'W/"x"', "Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 99 Nov 99999 99:99:99 GMT", "x", "\xff"),
    "if-none-match": ("*", '"x"', 'W/"x", "y"', '"', ",", "x" * 3000, "\xff", '"a" "b"'),
    "if-match": ("*", '"x"', 'W/"x"', '"x", "y"', "", '"'),
    "if-modified-since": ("Sun, 06 Nov 1994 08:49:37 GMT", "Thu, 01 Jan 0001 00:00:00 GMT", "nan", "-1",
                          "Fri, 31 Dec 9999 23:59:59 -9999"),
    "if-unmodified-since": ("Sun, 06 Nov 1994 08:49:37 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "x",
                            "Mon, 01 Jan 0001 00:00:00 +2359"),
    "last-event-id": ("", "queued-x", "x" * 3000, "\xff", "completed-0000000000000000"),
    "authorization": ("Bearer", "Bearer ", "Bearer \xff", "Basic YTpi", "bs_x", "Bearer " + "x" * 5000),
    "expect": ("100-continue", "200-ok"),
    "x-forwarded-for": ("127.0.0.1", "\xff"),
    "cookie": ("a=b", "=" * 2000),
    "te": ("trailers",),
    "upgrade": ("h2c", "websocket"),
}  # fmt: skip
ON_JOBS = (
    ("GET", "/v1/jobs/{job}"), ("GET", "/v1/download/{job}"), ("GET", "/v1/download/{job}/errors"),
    ("GET", "/v1/download/{job}/input"), ("HEAD", "/v1/download/{job}"), ("GET", "/v1/jobs/{job}/events"),
    ("POST", "/v1/jobs/{job}/cancel"), ("POST", "/v1/jobs/{job}/retry"), ("DELETE", "/v1/jobs/{job}"),
    ("POST", "/v1/predict/{job}"), ("HEAD", "/v1/download/{job}/input"),
)  # fmt: skip
OTHERS = (
    ("GET", "/v1/jobs"), ("POST", "/v1/predict"), ("POST", "/v1/upload"), ("PUT", "/v1/upload"),
    ("POST", "/v1/models/iris/predict"), ("POST", "/v1/models/arrays/predict"), ("POST", "/v1/models/iris/validate"),
    ("GET", "/v1/models"), ("GET", "/v1/models/iris"), ("GET", "/v1/models/iris/versions"),
    ("GET", "/v1/models/iris/versions/1"), ("GET", "/metrics"), ("GET", "/readyz"), ("GET", "/openapi.json"),
    ("GET", "/docs"), ("GET", "/"),
)  # fmt: skip
ENOUGH = 0.3
"""Seconds for which an event stream is read."""


_SWEPT_TEXTS = ("", "\0", "\ud800", "[", "{}", "null", "x" * 5000, "[" * 3000, '{"a":"\\ud800"}', '{"a":NaN}',
                '{"":""}', '["\\ud800"]', '{"threshold":NaN}', '{"threshold":1e400}',
                "iris@99999999999999999999")  # fmt: skip
_SWEPT_LITERALS = ("null", "NaN", "Infinity", "1e400", "-1e400", "9" * 400, "9223372036854775808", "true", '"\\ud800"',
                   '["\\ud800"]', '{"a":"\\ud800"}', '"\\u0000"', '{"threshold":1e400}', "[[]]")  # fmt: skip
_OPTIONS = ("format", "passthrough", "columns", "key", "on_row_error", "inputs", "metadata", "model")
_NUMERIC = ("max_errors", "priority", "top_k")
_IN_ONE = 4
"""The number of values in one case: the checks after all of them take as long as one value."""


def sweep() -> Iterator[Case]:
    """Each option with each of its extremes, in queries and in bodies."""
    extremes = [(name, value) for name in _NUMERIC for value in NUMBERS] + [("run_after", time) for time in TIMES]
    extremes += [(name, value) for name in (*_OPTIONS, "delimiter", "filename") for value in _SWEPT_TEXTS]
    for few in batched(extremes):
        asked = [query([("model", "iris"), ("reuse", "false"), pair]) for pair in few]
        steps = [Step("POST", f"/v1/predict?{one}", (), BODY, "blue") for one in asked]
        yield Case("options", (*steps, *_aftermath("blue")), note="query")
    online = [("inputs", value) for value in _SWEPT_TEXTS] + [("top_k", value) for value in NUMBERS]
    record = b'{"x": [[1, 2, 3], [4, 5, 6]]}'
    typed = (("content-type", "application/json"),)
    for few in batched(online):
        asked = [query([pair]) for pair in few]
        steps = [Step("POST", f"/v1/models/arrays/predict?{one}", typed, record, "red") for one in asked]
        yield Case("options", tuple(steps), note="online")
    literals = [(name, value) for name in (*_NUMERIC, *_OPTIONS, "run_after", "reuse") for value in _SWEPT_LITERALS]
    for few in batched([*literals, *(("run_after", json.dumps(time)) for time in TIMES)]):
        steps = []
        for name, value in few:
            options = {"model": '"iris"', "reuse": "false", name: value}
            body = "{" + ", ".join(f'"{key}": {literal}' for key, literal in options.items()) + "}"
            steps.append(Step("POST", "/v1/upload", (), BODY, "red", must=(201,)))
            steps.append(Step("POST", "/v1/predict/{job}", typed, body.encode(), "red"))
        yield Case("options", (*steps, *_aftermath("red")), note="body")


def batched(values: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    yield from (values[at : at + _IN_ONE] for at in range(0, len(values), _IN_ONE))


def in_query(random: Random) -> Case:
    """An input and options in one call, then checks of what the options may have damaged."""
    tenant = random.choice(("blue", "red"))
    steps = []
    for _ in range(_IN_ONE):
        chosen = [("model", "iris"), *_pairs(random, NAMES[1:13], _text)]
        if random.random() < 0.15:
            chosen = _pairs(random, NAMES, _text)
        steps.append(Step("POST", f"/v1/predict?{query(chosen)}", _headers(random), BODY, tenant))
    return Case("options", (*steps, *_aftermath(tenant)), note="query")


def in_body(random: Random) -> Case:
    tenant = random.choice(("blue", "red"))
    literal: dict[str, str] = dict(_pairs(random, NAMES, _literal))
    if random.random() < 0.8:
        literal["model"] = '"iris"'
    body = "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in literal.items()) + "}"
    if random.random() < 0.05:
        body = random.choice(LITERALS)
    target = "/v1/predict/{job}" if random.random() < 0.9 else "/v1/jobs/predict"
    typed: Headers = (("content-type", "application/json"), *_headers(random))
    steps = (
        Step("POST", "/v1/upload", (), BODY, tenant, must=(201,)),
        Step("POST", target, typed, body.encode(), tenant),
        *_aftermath(tenant),
    )
    return Case("options", steps, note="body")


def on_job(random: Random) -> Case:
    """A finished or delayed job, requested in odd ways."""
    tenant = random.choice(("blue", "red"))
    options = {"model": "iris", "reuse": "false"}
    if random.random() < 0.2:
        options["run_after"] = "2040-01-01T00:00:00Z"
    steps = [Step("POST", f"/v1/predict?{query(options)}", (("prefer", "wait=5"),), BODY, tenant)]
    for _ in range(random.randint(1, 4)):
        method, path = random.choice(ON_JOBS)
        if random.random() < 0.05:
            method = random.choice(("BREW", "PATCH", "OPTIONS", "TRACE", "get", "PUT", "PROPFIND"))
        chosen = _pairs(random, NAMES, _text)
        body = random.choice(LITERALS).encode() if method == "POST" and random.random() < 0.3 else b""
        if path.endswith("retry") and random.random() < 0.5:
            body = random.choice(
                (b'{"rows":"failed"}', b'{"rows":"unfinished"}', b'{"rows":null}', b'{"rows":["failed"]}')
            )
        typed: Headers = (("content-type", "application/json"),) if body else ()
        target = f"{path}?{query(chosen)}" if random.random() < 0.7 else path
        headers = typed + _headers(random)
        steps.append(Step(method, target, headers, body, tenant, seconds=ENOUGH if path.endswith("events") else 0.0))
    return Case("options", (*steps, *_aftermath(tenant)), note="job")


def elsewhere(random: Random) -> Case:
    """Any route with any options, existing or not."""
    tenant = random.choice(("blue", "red", "admin", ""))
    method, path = random.choice(OTHERS)
    if random.random() < 0.15:
        segment = query([("", random.choice(TEXTS)[:200])]).removeprefix("=")
        path = random.choice(("/v1/jobs/{0}", "/v1/models/{0}", "/v1/models/{0}/predict", "/v1/download/{0}", "/{0}",
                              "/v1/models/iris/versions/{0}", "/v1/{0}/x",
                              "/v1/jobs/{0}/cancel")).format(segment)  # fmt: skip
    if random.random() < 0.1:
        method = random.choice(("BREW", "PATCH", "OPTIONS", "TRACE", "get", "HEAD", "DELETE", "POST"))
    if random.random() < 0.1:
        path += random.choice(("/", "//", "/..", "/%2e%2e", "/%00", "?", "#x", "%"))
    chosen = _pairs(random, NAMES, _text)
    if path == "/v1/predict":
        chosen.insert(0, ("model", "iris"))
    body = b""
    if method in ("POST", "PUT"):
        odd = f'[{{"{COLUMNS[0]}": {random.choice(LITERALS)}}}]'.encode()
        body = random.choice((BODY, b"", odd, random.choice(LITERALS).encode()))
    headers = _headers(random)
    if path.startswith("/v1/models") and random.random() < 0.5:
        headers = (("content-type", "application/json"), *headers)
    step = Step(method, f"{path}?{query(chosen)}" if random.random() < 0.7 else path, headers, body, tenant)
    return Case("options", (step, *_aftermath("blue")), note="route")


def _aftermath(tenant: str) -> tuple[Step, ...]:
    """After any request, the lists of the tenant must be readable."""
    return (
        Step("GET", "/v1/jobs?limit=5", tenant=tenant, must=(200,)),
        Step("GET", "/v1/jobs?state=queued&limit=5", tenant=tenant, must=(200,)),
    )


def _pairs(random: Random, names: tuple[str, ...], value: Callable[[Random, str], str]) -> list[tuple[str, str]]:
    chosen = random.sample(names, random.choice((0, 1, 1, 1, 2, 2, 3)))
    return [(name, value(random, name)) for name in chosen]


def _text(random: Random, name: str) -> str:
    if name in SENSIBLE and random.random() < 0.45:
        chosen = random.choice(SENSIBLE[name])
        return chosen if isinstance(chosen, str) else json.dumps(chosen)
    likely = {"run_after": TIMES, "max_errors": NUMBERS, "top_k": NUMBERS, "priority": NUMBERS, "wait": NUMBERS[:13]}
    if name in likely and random.random() < 0.8:
        return random.choice(likely[name])
    return random.choice(random.choice((NUMBERS, TIMES, TEXTS, TEXTS)))


def _literal(random: Random, name: str) -> str:
    if name in SENSIBLE and random.random() < 0.4:
        return json.dumps(random.choice(SENSIBLE[name]))
    if name == "run_after" and random.random() < 0.8:
        return json.dumps(random.choice(TIMES))
    return random.choice(LITERALS) if random.random() < 0.7 else json.dumps(random.choice((*TEXTS, *TIMES, *NUMBERS)))


def _headers(random: Random) -> Headers:
    if random.random() < 0.6:
        return ()
    names = random.sample(sorted(HEADERS), random.choice((1, 1, 2)))
    return tuple((name, random.choice(HEADERS[name]).encode("latin-1", "replace").decode("latin-1")) for name in names)
