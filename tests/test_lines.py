"""Counting newlines cuts an input as looking for its records does."""

import io
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchserve.domain import Chunk, ChunkLimits
from batchserve.errors import InvalidInput
from batchserve.formats import get_format, lines

CSV = ["1,2", "", " ", ",", "1,2\r", "\r", "1,\r2", '"1",2', '1,"2', '"a\nb",2', '"', "é,x", "x" * 70, "1,2" * 30]
JSON = ['{"a":1}', "", " ", '{"a":1}\r', "\r", '{"a":1}\r{"a":2}', ' {"a":1}', "[1]", '{"a":"\\n"}', "x" * 70, "{}"]
PLAIN = {"csv": ["1,2", "x" * 70, ",", "é,x"], "jsonl": ['{"a":1}', "{" + "x" * 70, "{}"]}

texts = st.tuples(
    st.one_of(
        *(
            st.tuples(st.just(name), st.lists(st.sampled_from(kinds), max_size=60))
            for name, kinds in (("csv", CSV), ("jsonl", JSON), *PLAIN.items(), *PLAIN.items())
        )
    ),
    st.booleans(),
)
limits = st.builds(ChunkLimits, bytes=st.integers(1, 500), records=st.integers(1, 12))


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    """However small the input, in blocks of a few bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_FEWEST_RECORDS", 0)
        patch.setattr(lines, "FEWEST_BYTES", 0)
        patch.setattr(lines, "_BLOCK", 150)
        yield


def cut(name: str, data: bytes, after: Chunk | None, given: ChunkLimits) -> list[Chunk] | str:
    try:
        return list(get_format(name).plan(io.BytesIO(data), after, given))
    except InvalidInput as error:
        return str(error)


def by_records(name: str, data: bytes, after: Chunk | None, given: ChunkLimits) -> list[Chunk] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "fast_counter", lambda: None)
        return cut(name, data, after, given)


@given(texts, limits)
@settings(max_examples=600, deadline=None)
def test_an_input_is_cut_as_by_its_records(text: tuple[tuple[str, list[str]], bool], given: ChunkLimits) -> None:
    (name, rows), ended = text
    data = "\n".join([*(["a,b"] if name == "csv" else []), *rows]).encode() + (b"\n" if ended else b"")
    slow = by_records(name, data, None, given)
    assert cut(name, data, None, given) == slow
    if isinstance(slow, list) and slow[0].records:
        for after in slow:
            assert cut(name, data, after, given) == by_records(name, data, after, given)


@pytest.mark.parametrize("name", ["csv", "jsonl"])
def test_a_plain_input_is_cut_by_counting_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "cut", None)  # a call would fail
    line = {"csv": "1,2", "jsonl": '{"a": 1}'}[name]
    data = ("a,b\n" if name == "csv" else "") + f"{line}\n" * 1000
    chunks = list(get_format(name).plan(io.BytesIO(data.encode()), None, ChunkLimits(bytes=333)))
    assert sum(chunk.records for chunk in chunks) == 1000
    assert len(chunks) == -(-1000 // (333 // (len(line) + 1)))


def test_a_quoted_newline_far_behind_does_not_end_a_record() -> None:
    rows = ["1,2\n"] * 1000 + ['"3\n4",5\n'] + ["1,2\n"] * 10
    chunks = list(get_format("csv").plan(io.BytesIO("".join(["a,b\n", *rows]).encode()), None, ChunkLimits(bytes=333)))
    assert sum(chunk.records for chunk in chunks) == 1011


def test_a_source_that_gives_little_at_a_time_is_counted_too() -> None:
    class Slow(io.BytesIO):
        def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
            return super().readinto(memoryview(buffer)[:7])

    data = b"a,b\n" + b"1,2\n" * 500
    plan = get_format("csv").plan
    assert list(plan(Slow(data), None, ChunkLimits())) == list(plan(io.BytesIO(data), None, ChunkLimits()))


def test_a_large_input_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK", 4 * 2**20)
    fetched: list[int] = []

    class Counted(io.BytesIO):
        def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
            fetched.append(super().readinto(buffer))
            return fetched[-1]

    data = b"a,b\n" + b"1.5,2.5\n" * 2_000_000
    source: BinaryIO = Counted(data)
    monkeypatch.setattr(lines, "_FEWEST_RECORDS", 10_000)
    chunks = list(islice(get_format("csv").plan(source, None, ChunkLimits(records=100_000)), 30))
    assert [chunk.records for chunk in chunks] == [100_000] * 20
    assert sum(fetched) <= len(data)
    assert np.diff([chunk.stop for chunk in chunks]).tolist() == [800_000] * 19
    assert lines.fast_counter() is not None
