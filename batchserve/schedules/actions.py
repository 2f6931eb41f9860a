"""What ticks queue: one job by its request, or all inputs that wait in state uploaded."""

import asyncio
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchserve import intake, registry
from batchserve.domain import STEM, ModelVersion
from batchserve.engines import open_interactive
from batchserve.errors import BatchserveError
from batchserve.options import PredictOptions
from batchserve.quotas.account import Added, charge
from batchserve.recurring import ActionKind, TickState
from batchserve.runtime import Runtime
from batchserve.schedules.claim import Actions, Claim, is_passing, reason
from batchserve.scoring.checks import check_inputs
from batchserve.storage.locations import root_of
from batchserve.submission import Submission, create
from batchserve.uploaded import Collected, each_checked, queue_uploaded
from batchserve.webhooks.endpoints import require_secret

__all__ = ["JobAction", "UploadedAction", "actions_of"]


def actions_of(runtime: Runtime) -> Actions:
    return {ActionKind.JOB: JobAction(runtime), ActionKind.UPLOADED: UploadedAction(runtime)}


@dataclass(frozen=True, slots=True)
class JobAction:
    """Queues one job over inputs that are read in place, in the transaction that ends the tick."""

    runtime: Runtime

    def check(self, tenant: str, request: Mapping[str, Any]) -> None:
        """Whether its inputs exist is known at its tick."""
        asked, settings = intake.JobRequest.model_validate(request), self.runtime.settings
        intake.require_connections(settings, tenant, asked)
        for url in asked.input.urls or ():
            root_of(url, settings.inputs_of(tenant))
        if asked.output is not None and asked.output.url is not None:
            root_of(asked.output.url.replace(STEM, "x"), settings.outputs_of(tenant))
        _require_usable(self.runtime, tenant, asked)

    def run(self, tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        asked, database = intake.JobRequest.model_validate(request), self.runtime.database
        model = _model_of(self.runtime, asked)
        submission = intake.prepare(self.runtime.settings, tenant, model, asked, claim.tick.at).submission
        with database.write() as connection:
            now = database.moment(connection).wall
            create(connection, submission, now)
            claim.queued(connection, [submission.job_id])
            charge(connection, tenant, Added(queues=True), now)


@dataclass(frozen=True, slots=True)
class UploadedAction:
    """Queues all inputs that wait in state uploaded. They are checked in a scoring process of their own, which starts
    when there is one, so that no client waits for them."""

    runtime: Runtime

    def check(self, tenant: str, request: Mapping[str, Any]) -> None:
        _require_usable(self.runtime, tenant, PredictOptions.model_validate(request))

    def run(self, tenant: str, request: Mapping[str, Any], claim: Claim) -> None:
        options = PredictOptions.model_validate(request)
        model = _model_of(self.runtime, options)
        collected = asyncio.run(self._queue(tenant, options, model, claim))
        count, refused = len(collected.states) + claim.tick.jobs, collected.refused
        if refused:
            # One that may pass comes first: then the tick is tried again, and goes on with what is left.
            job_id, problem = min(refused.items(), key=lambda item: not is_passing(item[1]))
            several = f"{len(refused):,} inputs stay uploaded, among them that"
            which = "an input stays uploaded, that" if len(refused) == 1 else several
            message = f"{which} of job {job_id}: {problem.detail}"
            if is_passing(problem):
                raise type(problem)(message, errors=problem.errors, **problem.extra)
            claim.end(TickState.QUEUED if count else TickState.FAILED, reason(problem.code, message))
        elif count:
            claim.end(TickState.QUEUED)
        else:
            claim.end(TickState.SKIPPED, reason("nothing-uploaded", f"no input waits for the model {model.name}"))

    async def _queue(self, tenant: str, options: PredictOptions, model: ModelVersion, claim: Claim) -> Collected:
        settings = self.runtime.settings
        with closing(open_interactive(settings)) as processes:

            async def check(some: list[Submission]) -> list[BatchserveError | None]:
                inputs = [(submission.source(settings.storage), submission.options) for submission in some]
                return await processes.run(check_inputs, inputs, model, seconds=settings.online_timeout)

            checked = partial(each_checked, check)
            database = self.runtime.database
            return await queue_uploaded(database, tenant, model, options.submission, checked, note=claim.note)


def _require_usable(runtime: Runtime, tenant: str, options: PredictOptions) -> None:
    """Raises what `_model_of` does, and InvalidOptions for a webhook that the tenant has no secret for."""
    _model_of(runtime, options)
    if options.webhook is not None:
        with runtime.database.read() as connection:
            require_secret(connection, tenant)


def _model_of(runtime: Runtime, options: PredictOptions) -> ModelVersion:
    """Raises ModelNotFound, and InvalidOptions for a webhook or a retention that the settings do not allow."""
    options.require_allowed(runtime.settings)
    with runtime.database.read() as connection:
        return registry.resolve(connection, options.model)
