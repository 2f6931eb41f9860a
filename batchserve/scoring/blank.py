"""Files of text formats with neither columns nor records: nights without data leave them behind."""

from contextlib import suppress

import orjson

from batchserve.scoring.inputs import Input

_BLOCK = 2**16
_BOM = b"\xef\xbb\xbf"


def is_blank(input: Input) -> bool:
    """Whether an input has no byte besides white space, or is an empty list of JSON."""
    if input.format not in ("csv", "jsonl", "json"):
        return False
    data = b""
    with input.reading() as source:
        while not data and (block := source.read(_BLOCK)):
            data = block.removeprefix(_BOM).strip()
        is_whole = not source.read(1)
    if data and is_whole and input.format == "json":
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(data) in ([], {"data": []})
    return not data
