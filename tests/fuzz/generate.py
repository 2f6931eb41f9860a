"""Generates the next case of a thread from its random numbers only."""

from collections.abc import Callable, Collection
from random import Random

from fuzz import damage, options
from fuzz.case import Case, Claim, Step, query
from fuzz.known import counts, known
from fuzz.mutate import mutate
from fuzz.seeds import Seed, seeds, wrapped

ONLINE = 4
"""The number of damaged inputs in one case, where each takes only one request."""


def spoiled(random: Random) -> Case:
    """An input whose bytes are damaged, before or after it is compressed or wrapped."""
    seed = random.choice(seeds())
    delimiter = "tab" if seed.format == "tsv" else ","
    data = seed.data
    around = random.random() < 0.15
    if not around:
        data = mutate(random, data, random.choice(seeds()).data)
    headers, body = wrapped(random, seed.format, data)
    if around:
        body = mutate(random, body, random.choice(seeds()).data)
    if random.random() < 0.05:
        headers = (("content-type", random.choice(("text/csv", "application/json", "image/png", "application/zip"))),)
    claim = Claim(refusable=True, delimiter=delimiter)
    tenant = random.choice(("blue", "red"))
    way = random.random()
    if way < 0.25:
        target = f"/v1/models/{seed.model}/{random.choice(('predict', 'predict', 'validate'))}"
        more = [wrapped(random, seed.format, mutate(random, seed.data, data)) for _ in range(ONLINE - 1)]
        steps = tuple(Step("POST", target, *sent, tenant) for sent in ((headers, body), *more))
        return Case("inputs", steps, claim, _note(seed))
    chosen = {"model": seed.model, "reuse": "false"}
    if random.random() < 0.5:
        chosen["passthrough"] = random.choice(("all", "none"))
        chosen["format"] = random.choice(("csv", "jsonl", "json", "parquet", "arrow", "arrows", "npz"))
    if way < 0.85:
        first = (Step("POST", f"/v1/predict?{query(chosen)}", (*headers, ("prefer", "wait=5")), body, tenant),)
        return Case("inputs", first, claim, _note(seed))
    steps = (
        Step("POST", "/v1/upload", headers, body, tenant),
        Step("POST", f"/v1/predict/{{job}}?{query(chosen)}", (("prefer", "wait=5"),), b"", tenant),
    )
    return Case("inputs", steps, claim, _note(seed))


def _note(seed: Seed) -> str:
    return f"{seed.model} {seed.format}"


def foreign(random: Random) -> Case:
    """The job of one tenant, requested by the other on every route."""
    owner, other = random.choice((("blue", "red"), ("red", "blue")))
    chosen = {"model": "iris", "reuse": random.choice(("true", "false")), "metadata": '{"mine": "secret"}'}
    steps = [Step("POST", f"/v1/predict?{query(chosen)}", (("prefer", "wait=5"),), options.BODY, owner)]
    for method, path in random.sample(options.ON_JOBS, 4):
        steps.append(Step(method, path, (), b"", other, must=(404,)))
    steps.append(Step("GET", f"/v1/jobs?{query({'q': 'secret', 'limit': '5'})}", (), b"", other, must=(200,)))
    steps.append(Step("GET", "/v1/jobs/{job}", (), b"", "", must=(401,)))
    steps.append(Step("GET", "/v1/jobs/{job}", (), b"", owner, must=(200,)))
    return Case("tenants", tuple(steps))


_LINES = (
    b"GET / HTTP/1.1\r\n", b"GET /v1/jobs HTTP/1.1\r\n", b"POST /v1/upload HTTP/1.1\r\n", b"GET  / HTTP/1.1\r\n",
    b"GET / HTTP/9.9\r\n", b"GET /\r\n", b"\r\n\r\n", b"G\0T / HTTP/1.1\r\n", b"GET http://evil.example/ HTTP/1.1\r\n",
    b"GET * HTTP/1.1\r\n", b"CONNECT a:1 HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\n",
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n", b"\x16\x03\x01\x02\0\x01\0",
    b"POST /v1/predict?model=iris HTTP/1.0\r\n",
    b"OPTIONS * HTTP/1.1\r\n", b"GET /v1/jobs?q=%zz HTTP/1.1\r\n", b"HEAD /v1/models HTTP/1.1\r\n",
)  # fmt: skip
_HEADS = (
    b"host: 127.0.0.1\r\n", b"host: evil.example\r\n", b"host:\r\n", b"host: a\r\nhost: b\r\n", b"host: [::1\r\n",
    b"host: \xff\r\n", b"authorization: Bearer {key}\r\n", b"authorization: Bearer {key}\r\n",
    b"authorization: Bearer {key}\r\n", b"content-length: 5\r\n", b"content-length: -1\r\n",
    b"content-length: 5, 5\r\n",
    b"content-length: 4\r\ncontent-length: 5\r\n", b"content-length: 99999999999999999999\r\n",
    b"content-length: \xb2\r\n",
    b"content-length: 1000000\r\n", b"transfer-encoding: chunked\r\n",
    b"transfer-encoding: chunked\r\ncontent-length: 3\r\n",
    b"transfer-encoding: gzip, chunked\r\n", b"transfer-encoding: x\r\n", b" folded: x\r\n", b"no colon\r\n",
    b": empty\r\n",
    b"x y: z\r\n", b"x: a\0b\r\n", b"x: " + b"y" * 70_000 + b"\r\n", b"a: b\r\n" * 300, b"expect: 100-continue\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n",
    b"content-type: multipart/form-data; boundary=edge\r\n", b"content-encoding: gzip\r\n",
)  # fmt: skip
_BODIES = (
    b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffff\r\nx", b"-1\r\nx\r\n",
    b"5;x=" + b"y" * 9000 + b"\r\nhello\r\n",
    b"zz\r\n", b"0\r\nx: y\r\n\r\n", b"0\r\n" + b"t: u\r\n" * 500 + b"\r\n", b"--edge\r\n" + b"a: b\r\n" * 50,
    b"--edge--",
    b"\x1f\x8b\x08\0\0\0\0\0", b"0\r\n\r\nGET /livez HTTP/1.1\r\nhost: a\r\n\r\n" * 20,
)  # fmt: skip


def malformed(random: Random) -> Case:
    """HTTP that is invalid or contradicts itself; the client may disconnect early."""
    head = random.choice(_LINES) + b"".join(random.sample(_HEADS, random.randint(1, 4)))
    whole = head + (b"\r\n" if random.random() < 0.9 else b"") + random.choice(_BODIES)
    if random.random() < 0.2:
        whole = mutate(random, whole, random.choice(_BODIES) + b"x")
    if random.random() < 0.2:
        whole = whole[: random.randint(1, len(whole))]
    cut = random.randint(0, len(whole))
    pieces = (whole[:cut], whole[cut:]) if random.random() < 0.3 else (whole,)
    return Case("http", (Step("", "", raw=tuple(filter(None, pieces)) or (b"x",)),))


MAKERS: tuple[tuple[str, Callable[[Random], Case], int], ...] = (
    ("known", known, 22), ("known", counts, 6), ("inputs", spoiled, 34), ("options", options.in_query, 9),
    ("options", options.in_body, 9),
    ("options", options.on_job, 9), ("options", options.elsewhere, 9), ("tenants", foreign, 3), ("http", malformed, 3),
    ("models", damage.damaged, 4),
)  # fmt: skip
KINDS = tuple(dict.fromkeys(kind for kind, *_ in MAKERS))


def swept(random: Random) -> list[Case]:
    """Each option with each of its extremes, in any order."""
    cases = list(options.sweep())
    random.shuffle(cases)
    return cases


def next_case(random: Random, kinds: Collection[str] = KINDS) -> Case:
    chosen = [(make, weight) for kind, make, weight in MAKERS if kind in kinds]
    return random.choices([make for make, _ in chosen], [weight for _, weight in chosen])[0](random)
