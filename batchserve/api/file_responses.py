"""Responses that are files, as the OpenAPI document describes them."""

from collections.abc import Mapping
from typing import Any

from batchserve.api import examples
from batchserve.api.deps import PROBLEMS
from batchserve.formats import FORMATS, RESULT_FORMATS
from batchserve.formats.protocol import Format

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_TEXT = {"schema": {"type": "string"}}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "text/csv": {
        **_TEXT,
        "example": "prediction,probability_setosa,probability_versicolor\nsetosa,0.98,0.02\n",
    },
    "application/x-ndjson": {**_TEXT, "example": '{"prediction":"setosa","probability_setosa":0.98}\n'},
    "application/json": {
        "schema": {"type": ["array", "object"], "additionalProperties": True, "items": {}},
        "example": [{"prediction": "setosa", "probability_setosa": 0.98}],
    },
}


def _responses(formats: Mapping[str, Format]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that gives a file of one of these formats, texts first."""
    content = _EXAMPLES | {format.media_type: _BINARY for format in formats.values() if not format.is_text}
    return {
        200: {"description": "The file, with ETag, Repr-Digest and ranges.", "content": content},
        206: {"description": "The requested range."},
        304: {"description": "The client has it already (If-None-Match)."},
        307: {"description": "The object store serves it at the Location (redirect=true)."},
        **PROBLEMS,
    }


FILE = _responses(RESULT_FORMATS)
INPUT_FILE = _responses(FORMATS)
FAILED_RECORDS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One line for each error of a record.",
        "content": {
            "application/x-ndjson": {**_TEXT, "example": examples.ERRORS},
            "text/csv": {**_TEXT, "example": examples.ERRORS_CSV},
        },
    },
    **PROBLEMS,
}
