"""The fuzz program: its counts and judgements, and a short run; `make fuzz SECONDS=600` is the long one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from fuzz import judge
from fuzz.account import UNREADABLE, count, rows_of
from fuzz.case import Case, Claim, Step, from_json
from fuzz.generate import KINDS, MAKERS, next_case
from fuzz.wire import Answer


@pytest.mark.parametrize(
    ("format", "data", "records"),
    [
        ("csv", b"a,b\n1,2\n3,4", 2),
        ("csv", b"a,b\r\n1,2\r\n\r\n3,4\r\n", 2),
        ("csv", b'a,b\n"1\n\n2",3\n4,"5 ""x"""\n', 2),
        ("csv", b'a,b\n1,x"y\n3,4\n', 2),
        ("csv", b'a,b\n1,"2\n3,4\n', UNREADABLE),
        ("csv", b'a,b\n1,"2\n3,"4\n', None),
        ("csv", b'a,b\n"1"x,2\n', None),
        ("csv", b"a,b\r1,2\r", None),
        ("csv", b'a,b\r"1",2\r', None),
        ("csv", b"a,b\n", 0),
        ("jsonl", b'{"a":1}\n\n \t\n{"a":2', 2),
        ("json", b'[{"a":1},[2]]', 2),
        ("json", b'{"data":[1,2,3],"x":1}', 3),
        ("json", b'{"a":1}', 1),
        ("json", b"[1,2", None),
        ("json", b"[NaN]", None),
        ("json", b"[" * 100_000, None),
        ("npy", b"\x93NUMPY\x01\x00", None),
        ("png", b"", 1),
        ("parquet", b"", None),
    ],
)
def test_records_are_counted_without_the_product_and_only_where_the_count_is_certain(
    format: str, data: bytes, records: int | None
) -> None:
    assert count(format, data) == records


def test_a_failed_record_alone_in_its_line_of_a_csv_result_is_counted() -> None:
    assert rows_of("csv", b"mean\n1.0\n\n2.0\n") == [{"mean": "1.0"}, {}, {"mean": "2.0"}]


@pytest.mark.parametrize("make", [make for _, make, _ in MAKERS], ids=[make.__name__ for _, make, _ in MAKERS])
def test_a_case_follows_from_its_seed_and_is_kept_whole_in_a_file(make: Callable[[Random], Case]) -> None:
    for seed in range(30):
        case = make(Random(seed))
        assert make(Random(seed)) == case
        assert from_json(case.to_json()) == case


def test_every_kind_of_case_is_made() -> None:
    random = Random(1)
    kinds = {next_case(random).kind for _ in range(400)}
    assert kinds == set(KINDS)
    assert {next_case(random, ("http",)).kind for _ in range(20)} == {"http"}


def problem(status: int, code: str, **headers: str) -> Answer:
    body = json.dumps({"status": status, "code": code, "detail": "x"}).encode()
    return Answer(status, {"content-type": "application/problem+json", **headers}, body)


GET = Step("GET", "/v1/jobs")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (problem(422, "invalid-options"), []),
        (problem(503, "unavailable", **{"retry-after": "1"}), []),
        (problem(503, "unavailable"), ["503 unavailable"]),
        (problem(500, "internal-error"), ["500 internal-error"]),
        (Answer(400, {"content-type": "text/plain"}, b"no"), ["400 without a problem: text/plain b'no'"]),
        (Answer(0, failure="timeout"), ["no answer (timeout)"]),
        (Answer(200, {"content-type": "application/json"}, b'{"a": NaN}'),
         ["the JSON of the answer cannot be read: NaN"]),
        (Answer(200, {"content-type": "application/json"}, b'{"errors": [{"code": "internal-error"}]}'),
         ["a record's error is internal-error: None"]),
        (Answer(200, {}, b"Traceback (most recent call last)"), ["the answer tells 'Traceback (most'"]),
    ],
)  # fmt: skip
def test_an_answer_is_judged(answer: Answer, said: list[str]) -> None:
    assert list(judge.of_answer(GET, answer)) == said


def finished(total: int, ok: int, failed: int) -> dict[str, object]:
    return {"state": "completed", "rows": {"total": total, "ok": ok, "failed": failed}, "error": None,
            "input": {"format": "csv"}, "result": {"rows": total, "format": "jsonl"}}  # fmt: skip


SENT = b"id,x\n0,1\n1,tall\n2,3\n"
RESULT = b'{"id":0,"prediction":"a"}\n{"id":1,"prediction":null}\n{"id":2,"prediction":"b"}\n'
ERRORS = b'{"record":1,"code":"wrong-type"}\n'
KNOWN = Case("known", (), Claim(3, (1,), {"0": "a", "2": "b"}))


@pytest.mark.parametrize(
    ("job", "sent", "result", "errors", "said"),
    [
        (finished(3, 2, 1), SENT, RESULT, ERRORS, ""),
        (finished(3, 2, 0), SENT, RESULT, ERRORS, "does not add up"),
        (finished(2, 1, 1), SENT, RESULT, ERRORS, "2 records by the job, 3 were sent"),
        (finished(3, 2, 1), SENT + b"3,4\n", RESULT, ERRORS, "4 in the csv input"),
        (finished(3, 2, 1), SENT + b'3,"4\n', RESULT, ERRORS, "within quotation marks"),
        (finished(3, 2, 1), SENT, RESULT.replace(b'"b"', b'"a"'), ERRORS, "'b' is right"),
        (finished(3, 2, 1), SENT, RESULT.replace(b"null", b'"a"'), ERRORS, "failed and has an answer"),
        (finished(3, 2, 1), SENT, RESULT[:26], ERRORS, "1 rows in the jsonl result"),
        (finished(3, 2, 1), SENT, RESULT, ERRORS.replace(b"1", b"2"), "records [1] had to fail"),
        (finished(3, 2, 1), SENT, RESULT, b"", "0 records in the errors"),
        ({"state": "failed", "error": {"code": "internal-error"}}, SENT, b"", b"", "failed by internal-error"),
        ({"state": "failed", "error": {"code": "invalid-input"}}, SENT, b"", b"", "its records are good"),
    ],
)  # fmt: skip
def test_a_wrong_account_of_a_job_is_found(
    job: dict[str, object], sent: bytes, result: bytes, errors: bytes, said: str
) -> None:
    sentences = list(judge.of_job(KNOWN, job, sent, Answer(200, {}, result), Answer(200, {}, errors)))
    assert any(said in sentence for sentence in sentences) if said else not sentences, sentences


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_server_under_odd_requests_has_no_fault_and_accounts_for_every_record(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "fuzz", "--seconds", "20", "--seed", "9", "--keep", str(tmp_path / "findings")],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, last = ended.stdout.splitlines() or [""]
    counts = re.fullmatch(
        r"cases (\d+), small jobs (\d+), servers 1, growth -?\d+ MiB, requests (\d+), findings 0", last
    )
    assert counts is not None, ended.stdout + ended.stderr
    assert ended.returncode == 0
    assert int(counts[1]) > 50
    assert int(counts[2]) > 2
