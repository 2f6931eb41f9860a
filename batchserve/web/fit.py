"""How an uploaded input fits a model, and what a job would do, before anything is queued."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import orjson
from fastapi import BackgroundTasks, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve import registry
from batchserve.api import problems
from batchserve.api.auth import caller_of
from batchserve.api.deps import own_job, predict_options, read_body, service_of
from batchserve.api.predict import predict_stored
from batchserve.domain import JobState, ModelVersion, Signature, StoredInput
from batchserve.errors import BatchserveError, ModelNotFound
from batchserve.formats import RESULT_FORMATS
from batchserve.jobs import contents
from batchserve.scoring.dry_run import Beginning, DryRun, Filled, dry_run, survey
from batchserve.scoring.inputs import Input
from batchserve.service import Service
from batchserve.service.turns import Lane
from batchserve.submission import default_format, default_options
from batchserve.web.forms import Fields, read_fields
from batchserve.web.pages import page, see

__all__ = ["ROUTES", "Fit", "fit_of"]

_COMPARED = 100
"""Most models that an input is compared with, to show which it fits."""
_LISTED = 200
"""Most columns that are listed."""
_OPTIONS = ("format", "passthrough", "key", "on_row_error", "max_errors", "top_k", "expires_in")
_COLUMN, _SHARED = "column.", "input."
"""Beginnings of fields: which column fills one of the model, and the value of an input that all records share."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What the page of an uploaded input shows."""

    fields: Fields
    """As they were filled in."""
    formats: tuple[str, ...] = tuple(RESULT_FORMATS)
    candidates: dict[str, bool | None] = field(default_factory=dict)
    """The models that may be chosen, and whether the input fits; None: that was not found out."""
    beginning: Beginning | None = None
    share: float | None = 1.0
    """The bytes of all inputs of the job, relative to those of the first; None: not known."""
    model: ModelVersion | None = None
    format: str = ""
    """Of the result by default."""
    run: DryRun | None = None
    problem: str | None = None
    """Of the input or the options."""

    @property
    def may_start(self) -> bool:
        return self.run is not None and self.run.problem is None

    @property
    def filled(self) -> tuple[Filled, ...]:
        """Those at fault first where they are too many to list."""
        filled = self.run.filled if self.run else ()
        return filled if len(filled) <= _LISTED else tuple(sorted(filled, key=lambda one: one.fault is None))[:_LISTED]

    @property
    def columns(self) -> list[str]:
        """The first of the input, to choose from."""
        return [name for name in self.beginning.columns if name][:_LISTED] if self.beginning else []

    @property
    def shared(self) -> list[str]:
        """The inputs that take one value for all records."""
        return [tensor.name for tensor in self.model.signature.inputs if not tensor.per_record] if self.model else []

    @property
    def is_ranked(self) -> bool:
        """Whether the model may have classes to rank."""
        outputs = self.model.signature.outputs if self.model else ()
        return any(output.role in ("probabilities", "scores") for output in outputs)

    @property
    def has_options(self) -> bool:
        """Whether some are not those by default."""
        usual = {"format": self.format, "passthrough": "unused", "on_row_error": "continue"}
        return any(self.fields.first(name) not in ("", usual.get(name)) for name in _OPTIONS)

    @property
    def records(self) -> float | None:
        """Of all inputs."""
        return self._of_all(self.run.answers.all_records) if self.run and self.run.answers else None

    @property
    def result_bytes(self) -> float | None:
        return self._of_all(self.run.answers.result_bytes) if self.run and self.run.answers else None

    @property
    def seconds(self) -> float | None:
        """Time in the model, at its measured speed."""
        rate = self.model.signature.records_per_second if self.model else None
        return self.records / rate if self.records is not None and rate else None

    def _of_all(self, number: int) -> float | None:
        return None if self.share is None else number * self.share


async def fit_of(request: Request, job_id: str, fields: Fields | None = None) -> Fit:
    """`fields`: those of the form; None: those in the address. Raises JobNotFound."""
    service, tenant = service_of(request), caller_of(request).tenant
    fit = Fit(fields or Fields(request.query_params.multi_items()))
    job, inputs = await service.runtime.database.fetch(lambda connection: contents.get_with_inputs(connection, job_id))
    task = Input.of(service.runtime.settings.storage, inputs[0])
    try:
        fit, obvious = await _surveyed(service, tenant, task, inputs, fit)
    except BatchserveError as error:
        return replace(fit, problem=error.detail)
    reference = fit.fields.first("model") or (job.model.reference if job.model else obvious)
    if not reference:
        return fit
    try:
        model = await service.resolve_model(reference)
    except ModelNotFound as error:
        return replace(fit, problem=error.detail)
    candidates = fit.candidates if model.reference in fit.candidates else {model.reference: None, **fit.candidates}
    fit = replace(fit, candidates=candidates, model=model, format=default_format(inputs[0].format, model))
    try:
        options = (
            predict_options(service, _given(fit.fields, model)).submission(job.tenant, job_id, inputs, model).options
        )
        with service.calls.place(tenant, Lane.ONLINE) as place:
            seconds = service.runtime.settings.online_timeout
            run = await service.calls.run(place, dry_run, task, model, options, seconds=seconds)
    except (BatchserveError, RequestValidationError) as error:
        return replace(fit, problem=_detail(request, error))
    return replace(fit, run=run)


async def _surveyed(
    service: Service, tenant: str, task: Input, inputs: Sequence[StoredInput], fit: Fit
) -> tuple[Fit, str | None]:
    """With the beginning of the input and the models to choose from; and the model that is obvious, if one is."""

    def newest() -> list[ModelVersion]:
        with service.runtime.database.read() as connection:
            return registry.newest_versions(connection)

    models = await service.calls.read(tenant, newest)
    compared = [(model, default_options(task.format, model)) for model in models[:_COMPARED]]
    with service.calls.place(tenant, Lane.CHECK) as place:
        seconds = service.runtime.settings.online_timeout
        beginning, used = await service.calls.run(place, survey, task, compared, seconds=seconds)
    counts = {model.reference: count for (model, _), count in zip(compared, used, strict=True)}
    candidates = {model.reference: None for model in models} | {
        name: count is not None for name, count in counts.items()
    }
    return replace(fit, candidates=candidates, beginning=beginning, share=_share(inputs)), _obvious(counts, len(models))


def _share(inputs: Sequence[StoredInput]) -> float | None:
    """The bytes of all, relative to those of the first; None where some are not known."""
    if len(inputs) == 1:
        return 1.0
    sizes = [one.bytes for one in inputs]
    return sum(size or 0 for size in sizes) / sizes[0] if sizes[0] and None not in sizes else None


def _obvious(counts: dict[str, int | None], models: int) -> str | None:
    """The only model there is, or the one that uses more columns of the input than each other that fits."""
    if models == 1:
        return next(iter(counts))
    most = max((count for count in counts.values() if count is not None), default=None)
    best = [reference for reference, count in counts.items() if count is not None and count == most]
    return best[0] if len(best) == 1 else None


def _given(fields: Fields, model: ModelVersion | None) -> dict[str, Any]:
    """The options as `PredictOptions` has them; without a field, or with an empty one, that option is not given."""
    given: dict[str, Any] = {name: value for name in _OPTIONS if (value := fields.first(name).strip())}
    if reference := fields.first("model") or (model.reference if model else ""):
        given["model"] = reference
    if columns := fields.below(_COLUMN):
        given["columns"] = columns
    if shared := fields.below(_SHARED):
        given["inputs"] = {
            name: _value(text, name, model.signature if model else None) for name, text in shared.items()
        }
    return given


def _value(text: str, name: str, signature: Signature | None) -> Any:
    """The value that a text says: a number, true or false, or the text itself."""
    dtypes = {tensor.name: tensor.dtype for tensor in signature.inputs} if signature else {}
    try:
        return text if dtypes.get(name) == "string" else orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _detail(request: Request, error: BatchserveError | RequestValidationError) -> str:
    detail: str = orjson.loads(bytes(problems.problem_of(request, error).body))["detail"]
    return detail


# --- routes ----------------------------------------------------------------------------------------------------------


async def change(request: Request) -> Response:
    """The form again, for what was changed in it; the address of the page becomes that of this state."""
    job_id = await own_job(request.path_params["job_id"], request)
    body = await read_body(service_of(request), job_id)
    if body.state is not JobState.UPLOADED:  # it was started elsewhere
        return see(request, f"/jobs/{job_id}")
    answer = page(request, "_fit_form.html", job=body, fit=await fit_of(request, job_id))
    chosen = [(name, value) for name, value in request.query_params.multi_items() if value]
    answer.headers["hx-replace-url"] = f"/jobs/{job_id}?{urlencode(chosen)}"
    return answer


async def start(request: Request) -> Response:
    """Predicts as `POST /v1/predict/{job_id}` does, and shows the job. What is refused is shown with the form."""
    job_id = await own_job(request.path_params["job_id"], request)
    fields, service, background = await read_fields(request), service_of(request), BackgroundTasks()
    try:
        reference = fields.first("model")
        model = await service.resolve_model(reference) if reference else None
        given = _given(fields, model)
        answer = await predict_stored(job_id, given, request, service, caller_of(request), background)
    except (BatchserveError, RequestValidationError) as error:
        status = error.status if isinstance(error, BatchserveError) else 422
        body = await read_body(service, job_id)
        fit = replace(await fit_of(request, job_id, fields), problem=_detail(request, error))
        return page(request, "not_started.html", status, job=body, fit=fit)
    return RedirectResponse(f"/jobs/{orjson.loads(bytes(answer.body))['id']}", 303, background=background)


ROUTES = [Route("/jobs/{job_id}/fit", change), Route("/jobs/{job_id}/predict", start, methods=["POST"])]
