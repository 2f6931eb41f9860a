"""One record for a model, in a form that is made from its signature, and what the model answers."""

import base64
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from fastapi import Request, Response
from starlette.routing import Route

from batchserve.api.auth import caller_of
from batchserve.api.bodies import Body
from batchserve.api.deps import service_of
from batchserve.api.forms import is_form, only_file, open_form
from batchserve.api.models import predict_records
from batchserve.domain import Column, Domain, ModelVersion, OutputTensor, Signature
from batchserve.errors import BatchserveError
from batchserve.inference.outputs import ResultSchema, column_names
from batchserve.web.forms import Fields, read_fields
from batchserve.web.models import reference_of
from batchserve.web.pages import page

__all__ = ["ROUTES"]

_COLUMN = "column."
"""Beginning of the names of fields, before that of the column."""
_IN_ADDRESS = 64
"""Most fields of a form whose values are in the address of the page."""
_BARS = 20
"""Most classes that are shown, the most probable ones."""
_MADE_UP = 64
"""Most values of an array of zeros that a form begins with."""


@dataclass(frozen=True, slots=True)
class Question:
    """A field of the form."""

    name: str
    """Of the column or array."""
    dtype: str
    kind: Literal["number", "text", "truth", "array", "image"]
    value: str
    choices: tuple[str, ...] = ()
    """Some of the values that it takes."""
    is_optional: bool = False

    @property
    def field(self) -> str:
        return f"{_COLUMN}{self.name}"


@dataclass(frozen=True, slots=True)
class Bars:
    """The probabilities of classes, the largest first."""

    title: str
    shares: tuple[tuple[str, float], ...]
    more: int
    """Classes that are not among them."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model answers to one record, or why it does not."""

    values: Mapping[str, str]
    bars: tuple[Bars, ...]
    milliseconds: float
    faults: tuple[str, ...]


async def show(request: Request) -> Response:
    """The form; once it has values, with the answer to them. Few values are in the address, many or an image in the
    body of a POST."""
    service = service_of(request)
    model = await service.resolve_model(reference_of(request))
    sample = model.signature.sample[0] if model.signature.sample else {}
    questions = list({question.name: question for question in _questions(model.signature, sample)}.values())
    reply, problem, status = None, None, 200
    record: dict[str, Any] = {}
    fields = Fields([])
    try:
        if request.method == "POST" and is_form(request.headers.get("content-type")):
            fields, record = await _with_image(request, questions)
        else:
            fields = await read_fields(request) if request.method == "POST" else _of_address(request)
        if request.method == "POST" or fields.below(_COLUMN):
            record |= _record(questions, fields)
            answer = await predict_records(model.reference, [record], request, service, caller_of(request))
            faults = tuple(
                f"{error.column}: {error.message}" if error.column else error.message for error in answer.errors
            )
            [row] = orjson.loads(answer.records)
            reply = _reply(model, row, faults, answer.inference_ms)
    except BatchserveError as refused:
        problem, status = refused.detail, refused.status
    is_part = request.headers.get("hx-target") == "answer"
    filled = {question.field: fields.first(question.field) for question in questions} if fields.below(_COLUMN) else {}
    return page(
        request, "_answer.html" if is_part else "try.html", status, model=model, questions=questions, filled=filled,
        reply=reply, problem=problem, has_image=_has_image(questions),
        in_address=len(questions) <= _IN_ADDRESS and not _has_image(questions),
    )  # fmt: skip


def _of_address(request: Request) -> Fields:
    return Fields(request.query_params.multi_items())


async def _with_image(request: Request, questions: list[Question]) -> tuple[Fields, dict[str, Any]]:
    """The fields of a form with a file, and the file as the value of the column that takes images."""
    service = service_of(request)
    body = Body(request, service.runtime.settings, service.runtime.settings.online_bytes)
    async with open_form(request.headers["content-type"], body, service.runtime.storage) as form:
        file = only_file(form, "a record has one image")
        content = b"".join([block async for block in body.decoded(form.blocks(file))])
        fields = Fields(list(form.fields.items()))
    encoded = base64.b64encode(content).decode()
    return fields, {question.name: encoded for question in questions if question.kind == "image"}


def _has_image(questions: list[Question]) -> bool:
    return any(question.kind == "image" for question in questions)


# --- the form --------------------------------------------------------------------------------------------------------


def _questions(signature: Signature, sample: Mapping[str, Any]) -> Iterator[Question]:
    for tensor in signature.inputs:
        if tensor.columns is None:
            value = sample.get(tensor.name, _zeros(tensor.shape[1:]) if tensor.dtype != "string" else "")
            text = value if isinstance(value, str) else orjson.dumps(value).decode()
            sizes = ", ".join("N" if size is None else str(size) for size in tensor.shape[1:])
            yield Question(tensor.name, f"{tensor.dtype} [{sizes}]", "array", text, (), tensor.nullable)
            continue
        domains = tensor.domains or (Domain(),) * len(tensor.columns)
        for column, domain in zip(tensor.columns, domains, strict=True):
            yield _question(column, domain, sample.get(column.name))


def _question(column: Column, domain: Domain, value: Any) -> Question:
    if column.dtype == "image":
        return Question(column.name, "image", "image", "")
    kind: Literal["number", "text", "truth"] = "number"
    if column.dtype in ("string", "bool"):
        kind = "text" if column.dtype == "string" else "truth"
    text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    choices = tuple(map(str, domain.categories.some)) if domain.categories else ()
    return Question(column.name, column.dtype, kind, text, choices, column.nullable)


def _zeros(shape: tuple[int | None, ...]) -> Any:
    """An array of zeros; "" where it would be large, or its size is free."""
    sizes = [size for size in shape if size is not None]
    if len(sizes) < len(shape) or math.prod(sizes) > _MADE_UP:
        return ""
    value: Any = 0
    for size in reversed(sizes):
        value = [value] * size
    return value


def _record(questions: list[Question], fields: Fields) -> dict[str, Any]:
    """The record as JSON has it. What is no number stays a text, so that it is refused by name."""
    return {q.name: _value(q, fields.first(q.field)) for q in questions if q.kind != "image"}


def _value(question: Question, text: str) -> Any:
    if question.kind == "text":
        return None if text == "" and question.is_optional else text
    if not text.strip():
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


# --- the answer ------------------------------------------------------------------------------------------------------


def _reply(model: ModelVersion, row: Mapping[str, Any], faults: tuple[str, ...], milliseconds: float) -> Reply:
    if faults:
        return Reply({}, (), milliseconds, faults)
    signature = model.signature
    bars = tuple(bar for output in signature.outputs if (bar := _bars(signature, output, row)) is not None)
    drawn = {name for output in signature.outputs if output.role == "probabilities"
             for name in column_names(signature, output)}  # fmt: skip
    names = [name for name in ResultSchema(signature).columns if name not in drawn or not bars]
    return Reply({name: _text(row[name]) for name in names}, bars, milliseconds, ())


def _bars(signature: Signature, output: OutputTensor, row: Mapping[str, Any]) -> Bars | None:
    if output.role != "probabilities":
        return None
    names = column_names(signature, output)
    values = row[names[0]] if len(names) == 1 else [row[name] for name in names]
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return None
    labels = output.labels if len(output.labels) == len(values) else tuple(map(str, range(len(values))))
    shares = sorted(zip(labels, values, strict=True), key=lambda share: -share[1])
    title = f"Probability of {output.group}" if output.group else "Probability"
    return Bars(title, tuple(shares[:_BARS]), max(0, len(shares) - _BARS))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    return text if len(text) <= 2000 else f"{text[:2000]}…"


ROUTES = [Route("/models/{name}/try", show, methods=["GET", "POST"])]
