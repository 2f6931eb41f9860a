"""Options of online requests and of checks, as query parameters."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from batchserve.domain import ReadOptions
from batchserve.values import Columns, Inputs, Plain, TopK


class FitOptions(BaseModel):
    """How the columns of an input fill those of a model, as query parameters."""

    model_config = ConfigDict(extra="forbid")

    columns: Columns = None
    inputs: Inputs = None


class ValidateOptions(FitOptions):
    """How to read the records of an online request, as query parameters."""

    delimiter: str | None = Field(
        None, description="Of a CSV: `,`, `;`, `tab` or `|`. Default: recognised.", examples=[";"], max_length=8
    )
    decimal: str | None = Field(
        None, description="Decimal mark of a CSV: `.` (default) or `,`.", examples=[","], max_length=8
    )
    encoding: str | None = Field(
        None,
        description="Of a text: `utf-8` (default), `latin-1`, `windows-1252`, `utf-16` and others.",
        examples=["windows-1252"],
        max_length=32,
    )
    sheet: Annotated[str, Plain] | None = Field(
        None, description="Of an Excel workbook: the first one by default.", examples=["Sheet1"], max_length=256
    )

    @property
    def read(self) -> ReadOptions:
        return ReadOptions(self.delimiter, self.decimal, self.encoding, self.sheet)


class OnlineOptions(ValidateOptions):
    """How to predict online, as query parameters."""

    top_k: TopK = None


def query_parameters(options: type[BaseModel]) -> list[dict[str, Any]]:
    """Options as query parameters of the OpenAPI document, with lists and mappings as text."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {"type": "string"} if name in _TEXTS else schema,
            "description": schema.get("description", ""),
        }
        for name, schema in options.model_json_schema()["properties"].items()
    ]


_TEXTS = ("columns", "inputs", "metadata", "passthrough")
