"""Single values of requests, checked as they are parsed."""

import json
import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MAX_NAME = 4096
MAX_NAMES = 16_384
MAX_REFERENCE = 256


def plain_text(text: str) -> str:
    """A text that can be stored and returned. Raises ValueError for NUL and for lone surrogates."""
    if "\0" in text:
        raise ValueError("expected a text without the character NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("expected a text of whole characters, got a lone surrogate") from None
    return text


Plain = AfterValidator(plain_text)
Name = Annotated[str, Field(max_length=MAX_NAME), Plain]
"""Name of a column or of a model input."""

OF_IDS = re.compile(r"[0-9A-Fa-f-]{1,36}")
"""An ID, or the beginning of one."""


def cursor_of_ids(text: str) -> str:
    """The ID, or the beginning of one, behind which a list continues. Raises ValueError for any other text."""
    if not OF_IDS.fullmatch(text):
        raise ValueError(f"expected `next` of a page of the same list, got {text!r}")
    return text


Cursor = Annotated[str, Field(max_length=64), AfterValidator(cursor_of_ids)]


def no_truth(value: Any) -> Any:
    """Any other value as it came: JSON tells `true` from 1, and a limit of `true` is a mistake. Raises ValueError.

    For field_validator, before the type: in the annotation of a field its bounds would be missing in the schema.
    """
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def comma_list(value: Any) -> Any:
    """Query parameters carry lists as `a,b` and everything else as JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return parsed_json(value)
    return [part.strip() for part in value.split(",")]


def parsed_json(value: Any) -> Any:
    """What a text of JSON says; any other value as it came."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _scalar(value: Any) -> Any:
    """One fault for a value of none of the types, instead of one for each type."""
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("expected a finite number, a text, true or false")
    return plain_text(value) if isinstance(value, str) else value


Shared = Annotated[
    bool
    | Annotated[int, Field(ge=-(2**63), lt=2**64)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=65_536), Plain],
    BeforeValidator(_scalar),
]
"""A JSON value that all records share: at most 64 bits, and finite."""

Columns = Annotated[
    Annotated[list[Name], Field(max_length=MAX_NAMES)]
    | Annotated[dict[Name, Name], Field(max_length=MAX_NAMES)]
    | None,
    BeforeValidator(comma_list, json_schema_input_type=str | list[str] | dict[str, str] | None),
    Field(
        description="For a model that does not name its columns: which to take, in order. "
        "A mapping says under which name the file has a column of the model."
    ),
]
TopK = Annotated[
    int | None, Field(ge=1, lt=2**31, description="Only the k most probable classes, as label_1, probability_1 ...")
]
Inputs = Annotated[
    Annotated[dict[Name, Shared], Field(max_length=1024)] | None,
    BeforeValidator(parsed_json, json_schema_input_type=dict[str, Shared] | str | None),
    Field(description="Values of model inputs that all records share.", examples=[{"threshold": 0.5}]),
]
