"""Inputs whose correct counts are known, because they are generated from records whose outcome is known."""

import json
from collections.abc import Mapping
from random import Random
from typing import Any

import polars as pl

from fuzz.case import Case, Claim, Step, query
from fuzz.models import COLUMNS, flowers
from fuzz.seeds import TABLES, table, wrapped

Record = dict[str, Any]
MOST_RECORDS = 350
MOST_ONLINE = 100
TEXT_FAULTS = ("text", "missing", "large", "larger")
LINE_FAULTS: Mapping[str, tuple[str, ...]] = {
    "csv": ("fewer fields", "more fields", "not UTF-8", "quotation mark"),
    "jsonl": ("no JSON", "no object", "doubled key", "half a character"),
    "json": (),
}
TYPED_FAULTS = ("missing", "NaN", "large")


def known(random: Random) -> Case:
    """Flowers in order, some of them damaged; the result has each in its place."""
    format = random.choice(TABLES)
    online = random.random() < 0.2
    total = random.choice((1, 2, 7, 99, 100, 101, random.randint(3, MOST_RECORDS)))
    total = min(total, MOST_ONLINE) if online else total
    records, faults = _records(random, format, total)
    data, note, refusable = _written(random, format, records, faults)
    answers = {str(place): label for place, label in enumerate(_labels(records)) if place not in faults}
    total += note == "empty key"  # one more record
    known_total = None if note == "unclosed quotation mark" else total
    claim = Claim(known_total, None if refusable else tuple(sorted(faults)), {} if refusable else answers, refusable)
    headers, body = wrapped(random, format, data)
    noted = f"{format} {note}".strip() + f": {kinds(faults)}"
    if online:
        step = Step("POST", "/v1/models/iris/predict", headers, body, random.choice(("blue", "red")))
        return Case("known", (step,), claim, noted)
    options = {"model": "iris", "reuse": "false", "passthrough": "id", "format": random.choice(TABLES)}
    return Case("known", _delivery(random, headers, body, options), claim, noted)


_VISITS = {
    "csv": (
        ("3", "3.0", " 3 ", "-0"),
        ("3.5", "1e300", "9223372036854775808", "-9223372036854775809", "x", "", "1e400"),
    ),
    "json": (("3", "3.0", '"3"'), ("3.5", "1e300", "9223372036854775808", '"x"', "null", "[1]", "{}")),
    "frame": ((3.0, 0.0, -4.0), (3.5, 1e300, None, float("nan"), float("inf"))),
}
_AGES = {
    "csv": (("31", "1e38"), ("1e39", "-1e39", "old", "")),
    "json": (("31", "1e38"), ("1e39", "-1e39", '"old"', "[1]", "null")),
    "frame": ((31.0, 1e38), (1e39, -1e39, None)),
}


def counts(random: Random) -> Case:
    """Integers beyond their range, or missing, and floats that are too large."""
    format = random.choice(TABLES)
    family = format if format == "csv" else "json" if format in ("json", "jsonl") else "frame"
    total = random.randint(2, MOST_RECORDS)
    faulty = set(random.sample(range(1, total), random.randint(0, min(12, total // 3))))
    rows = []
    for place in range(total):
        in_age = random.random() < 0.5
        age = random.choice(_AGES[family][place in faulty and in_age])
        rows.append((age, random.choice(_VISITS[family][place in faulty and not in_age])))
    if family == "csv":
        data = "\n".join(["age,visits", *(",".join(map(str, row)) for row in rows)]).encode()
    elif family == "json":
        lines = [f'{{"age": {age}, "visits": {visits}}}' for age, visits in rows]
        data = ("\n".join(lines) if format == "jsonl" else f"[{','.join(lines)}]").encode()
    else:
        frame = pl.DataFrame(rows, schema={"age": pl.Float64, "visits": pl.Float64}, orient="row")
        data = table(frame, format)
    headers, body = wrapped(random, format, data)
    options = {"model": "counts", "reuse": "false", "format": random.choice(TABLES)}
    return Case(
        "known", _delivery(random, headers, body, options), Claim(total, tuple(sorted(faulty))), f"counts {format}"
    )


def kinds(faults: Mapping[int, str]) -> str:
    """For readers: the faults in this input."""
    return "+".join(sorted(set(faults.values())))


def _delivery(random: Random, headers: Any, body: bytes, options: Mapping[str, str]) -> tuple[Step, ...]:
    tenant = random.choice(("blue", "red"))
    if random.random() < 0.7:
        wait = (*headers, ("prefer", "wait=5"))
        return (Step("POST", f"/v1/predict?{query(options)}", wait, body, tenant),)
    return (
        Step("POST", "/v1/upload", headers, body, tenant, must=(201,)),
        Step("POST", f"/v1/predict/{{job}}?{query(options)}", (("prefer", "wait=5"),), b"", tenant),
    )


def _records(random: Random, format: str, total: int) -> tuple[list[Record], dict[int, str]]:
    """Records by id, and the faults of some of them; the first record and most others are good."""
    chosen = [random.randrange(len(flowers())) for _ in range(total)]
    records = [
        {"id": place, **dict(zip(COLUMNS, flowers()[flower][0], strict=True)), "_flower": flower}
        for place, flower in enumerate(chosen)
    ]
    choices = (*TEXT_FAULTS, *LINE_FAULTS[format]) if format in LINE_FAULTS else TYPED_FAULTS
    faulty = random.sample(range(1, total), random.randint(0, min(12, total // 3)))
    picked = random.sample(choices, min(2, len(choices)))
    return records, {place: random.choice(picked) for place in faulty}


def _labels(records: list[Record]) -> list[str]:
    return [flowers()[record["_flower"]][1] for record in records]


def _written(random: Random, format: str, records: list[Record], faults: Mapping[int, str]) -> tuple[bytes, str, bool]:
    """The file, its oddity as a whole, and whether it may be refused for that."""
    if format == "csv":
        return _csv(random, records, faults)
    if format in ("jsonl", "json"):
        return _json(random, format, records, faults)
    frame = pl.DataFrame([{name: record[name] for name in ("id", *COLUMNS)} for record in records])
    values = frame[COLUMNS[1]].to_list()
    spoiled: dict[str, float | None] = {"missing": None, "NaN": float("nan"), "large": 1e39}
    for place, fault in faults.items():
        values[place] = spoiled[fault]
    return table(frame.with_columns(pl.Series(COLUMNS[1], values, pl.Float64)), format), "", False


def _csv(random: Random, records: list[Record], faults: Mapping[int, str]) -> tuple[bytes, str, bool]:
    quotes, spaces, blanks = random.random() < 0.2, random.random() < 0.1, random.random() < 0.2
    noted = random.random() < 0.2
    header = ",".join(("id", *COLUMNS, *(("note",) if noted else ())))
    lines = [header.encode()]
    spoiled = {"text": "tall", "missing": "", "large": random.choice(("1e39", "-1e39")), "larger": "1e400"}
    for place, record in enumerate(records):
        fields = [str(record["id"]), *(repr(record[name]) for name in COLUMNS)]
        fault = faults.get(place)
        fields[2] = spoiled.get(fault or "", fields[2])
        if spaces:
            fields = [f" {field} " if field and number else field for number, field in enumerate(fields)]
        if quotes and fault != "missing":
            fields = [f'"{field}"' for field in fields]
        if noted:
            fields.append('"a ""word"",\nand more"')
        lines.append(_csv_line(fields, fault))
        if blanks and random.random() < 0.1:
            lines.append(b"")
    end = random.choice((b"\n", b"\n", b"\n", b"\r\n"))
    data = end.join(lines) + (end if random.random() < 0.7 else b"")
    if random.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    odd = random.random()
    if odd < 0.08:
        return _unclosed(random, data, end), "unclosed quotation mark", True
    if odd < 0.12 and not noted:
        return data.replace(b"\r\n", b"\n").replace(b"\n", b"\r"), "carriage returns", True
    return data, "", False


def _csv_line(fields: list[str], fault: str | None) -> bytes:
    if fault == "fewer fields":
        return ",".join(fields[:-1]).encode()
    if fault == "more fields":
        return ",".join([*fields, "1"]).encode()
    if fault == "quotation mark":
        fields[2] = '"4.1"x'
    line = ",".join(fields).encode()
    return line.replace(b",", b",\xff\xfe", 1) if fault == "not UTF-8" else line


def _unclosed(random: Random, data: bytes, end: bytes) -> bytes:
    """A quotation mark before a field of the last records that is never closed; no other comes after it."""
    lines = data.replace(b'"', b"").split(end)
    at = random.randrange(len(lines) // 2, len(lines)) if len(lines) > 2 else len(lines) - 1
    lines[max(at, 1) if len(lines) > 1 else 0] += b',"open'
    return end.join(lines)


def _json(random: Random, format: str, records: list[Record], faults: Mapping[int, str]) -> tuple[bytes, str, bool]:
    spoiled = {"text": '"tall"', "missing": "null", "large": "1e39", "larger": "1e400"}
    lines = []
    for place, record in enumerate(records):
        values = {name: json.dumps(record[name]) for name in ("id", *COLUMNS)}
        fault = faults.get(place, "")
        values[COLUMNS[1]] = spoiled.get(fault, values[COLUMNS[1]])
        line = "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in values.items()) + "}"
        lines.append(_json_line(line, fault))
        if format == "jsonl" and random.random() < 0.02:
            lines.append(random.choice(("", "  ", "\t", " \r")))
    if format == "jsonl":
        if random.random() < 0.05:
            lines.insert(random.randint(1, len(lines)), '{"": 1}')
            return "\n".join(lines).encode(), "empty key", True
        return "\n".join(lines).encode() + (b"\n" if random.random() < 0.7 else b""), "", False
    between = random.choice((",", ",\n", " ,\r\n "))
    whole = f"[{between.join(lines)}]"
    if random.random() < 0.3:
        whole = f'{{"data": {whole}, "note": "of the night"}}'
    # A number beyond all floats is not JSON for some readers: then the whole array is refused.
    return whole.encode(), "", "larger" in faults.values()


def _json_line(line: str, fault: str) -> str:
    if fault == "no JSON":
        return line[:-1]
    if fault == "no object":
        return '"a text"'
    if fault == "doubled key":
        return line[:-1] + ', "id": 1}'
    if fault == "half a character":
        return line[:-1] + ', "note": "\\ud800"}'
    return line
