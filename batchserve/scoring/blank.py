"""Files of text formats with neither columns nor records: nights without data leave them behind."""

from contextlib import suppress

import orjson

from batchserve.scoring.inputs import Input

_LONGEST = 2**16
_BOM = b"\xef\xbb\xbf"


def is_blank(input: Input) -> bool:
    """Whether an input has no byte besides white space, or is an empty list of JSON."""
    if input.format not in ("csv", "jsonl", "json"):
        return False
    with input.reading() as source:
        data = source.read(_LONGEST).removeprefix(_BOM).strip()
    if not data:
        return True
    if input.format == "json":
        with suppress(orjson.JSONDecodeError):
            return orjson.loads(data) in ([], {"data": []})
    return False
