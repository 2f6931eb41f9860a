"""Bodies about models and online calls, and how they are made from the domain."""

from dataclasses import asdict
from datetime import datetime
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field

from batchserve.api import examples
from batchserve.api.schemas.times import time_of
from batchserve.domain import Column, InputTensor, ModelVersion, OutputTensor
from batchserve.inference.outputs import ResultSchema


class ModelReference(BaseModel):
    name: str
    version: int
    digest: str


class ColumnBody(BaseModel):
    name: str
    dtype: str
    nullable: bool = Field(description="Whether the model handles missing values itself.")


class TensorBody(BaseModel):
    name: str
    dtype: str
    shape: list[int | None]


class ModelInputBody(TensorBody):
    columns: list[str] | None = Field(
        description="The columns that fill it, by name. null: an array, or columns without names in their order."
    )


class ResultChangesBody(BaseModel):
    before: int = Field(description="The version before.")
    added: dict[str, str] = Field(description="Columns that are new, with their types.")
    removed: dict[str, str] = Field(description="Columns that are gone, with their types.")
    retyped: dict[str, tuple[str, str]] = Field(description="Columns with another type: the one before, the one now.")


class ModelBody(BaseModel):
    """A model version: its inputs, its outputs, how it runs."""

    model_config = ConfigDict(json_schema_extra={"example": examples.MODEL})

    name: str
    version: int
    digest: str
    bytes: int
    task: str
    columns: list[ColumnBody] = Field(description="Columns taken from a table, by name. Empty: any, in file order.")
    inputs: list[ModelInputBody]
    outputs: list[TensorBody]
    result_columns: dict[str, str] = Field(description="Columns that the result adds, with their types.")
    labels: list[str]
    mode: str
    batch: int
    threads: int
    provider: str
    records_per_second: float | None
    notes: list[str]
    changes: ResultChangesBody | None = Field(
        default=None, description="How its result columns differ from those of the version before. null: they do not."
    )
    sample: list[dict[str, Any]]
    metadata: dict[str, Any]
    created_at: datetime
    links: dict[str, str]


class ModelList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.MODELS})

    models: list[ModelBody]
    next: str | None = Field(None, description="Value of `after` for the next page; null on the last one.")


class OnlineBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.ONLINE})

    prediction: list[dict[str, Any]] = Field(description="Each record with the outputs of the model, in order.")
    errors: list[dict[str, Any]] = Field(description="Of records that could not be scored; those hold nulls.")
    model: ModelReference
    inference_ms: float = Field(description="Time of the model alone, without reading and decoding.")


class ValidationBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.VALIDATION})

    valid: bool
    errors: list[dict[str, Any]]
    model: ModelReference


def model_body(model: ModelVersion) -> ModelBody:
    signature = model.signature
    labels = next((output.labels for output in signature.outputs if output.labels), ())
    link = f"/v1/models/{model.name}/versions/{model.version}"
    return ModelBody(
        name=model.name,
        version=model.version,
        digest=model.digest,
        bytes=model.bytes,
        task=signature.task,
        columns=[_column(column) for column in signature.columns],
        inputs=[_input(tensor) for tensor in signature.inputs],
        outputs=[_tensor(tensor) for tensor in signature.outputs],
        result_columns={name: str(kind) for name, kind in ResultSchema(signature).columns.items()},
        labels=list(labels),
        mode=signature.mode,
        batch=signature.batch,
        threads=signature.threads,
        provider=signature.provider,
        records_per_second=signature.records_per_second,
        notes=list(signature.notes),
        changes=ResultChangesBody(**asdict(signature.changes)) if signature.changes else None,
        sample=list(signature.sample),
        metadata={name: _maybe_json(text) for name, text in model.metadata.items()},
        created_at=time_of(model.created_at),
        links={
            "self": link,
            "versions": f"/v1/models/{model.name}/versions",
            "predict": f"/v1/models/{model.name}/predict",
            "validate": f"/v1/models/{model.name}/validate",
        },
    )


def model_reference(model: ModelVersion) -> ModelReference:
    return ModelReference(name=model.name, version=model.version, digest=model.digest)


def _column(column: Column) -> ColumnBody:
    return ColumnBody(name=column.name, dtype=column.dtype, nullable=column.nullable)


def _input(tensor: InputTensor) -> ModelInputBody:
    names = None if tensor.columns is None else [column.name for column in tensor.columns]
    return ModelInputBody(name=tensor.name, dtype=tensor.dtype, shape=list(tensor.shape), columns=names)


def _tensor(tensor: OutputTensor) -> TensorBody:
    return TensorBody(name=tensor.name, dtype=tensor.dtype, shape=list(tensor.shape))


def _maybe_json(text: str) -> Any:
    try:
        return orjson.loads(text)  # which refuses values that a response cannot hold, such as lone surrogates
    except ValueError:
        return text
