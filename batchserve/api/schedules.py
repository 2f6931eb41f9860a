"""/v1/schedules: requests that are repeated at the times of a cron text."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import audit, idempotency
from batchserve.access import Action, Caller
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object, require_space
from batchserve.api.deps import PROBLEMS, IdempotencyKey, ServiceDep, bare_key, parsed, replayed
from batchserve.api.schemas.schedules import (
    RunRequest,
    ScheduleBody,
    ScheduleList,
    ScheduleRequest,
    State,
    TickBody,
    TickList,
    schedule_body,
    tick_body,
    tick_list,
    zone_or_utc,
)
from batchserve.cron import next_after, zone_of
from batchserve.idempotency import KeyedRequest
from batchserve.recurring import Schedule, Tick, TickState
from batchserve.schedules.claim import reason
from batchserve.schedules.definition import Definition
from batchserve.schedules.scheduler import Scheduler
from batchserve.service import Service
from batchserve.timetable import schedules, ticks
from batchserve.values import Cursor

router = APIRouter(tags=["schedules"])

Reference = Annotated[str, Path(max_length=64, description="The ID of the schedule, or its name.")]
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": ScheduleRequest.model_json_schema()}},
    }
}
_RUN = {"requestBody": {"required": False, "content": {"application/json": {"schema": RunRequest.model_json_schema()}}}}
_EQUAL: dict[int | str, dict[str, Any]] = {
    200: {"model": ScheduleBody, "description": "An equal schedule of this name exists already."}
}


def scheduler_of(request: Request) -> Scheduler:
    scheduler: Scheduler = request.app.state.scheduler
    return scheduler


@router.head("/v1/schedules", include_in_schema=False)
@router.get(
    "/v1/schedules", response_model=ScheduleList, responses=PROBLEMS, operation_id="list_schedules",
    summary="List schedules, in the order of their creation",
)  # fmt: skip
async def list_schedules(
    service: ServiceDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[Cursor | None, Query(description="`next` of the page before.")] = None,
) -> Response:
    return _answer(
        await service.calls.read(caller.tenant, lambda: read_schedules(service, caller.tenant, after, limit))
    )


@router.post(
    "/v1/schedules", status_code=201, response_model=ScheduleBody, responses={**_EQUAL, **PROBLEMS},
    operation_id="create_schedule", summary="Create a schedule", openapi_extra=_BODY,
)  # fmt: skip
async def create_schedule(request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Its request is checked as its next tick would have it. Whether inputs exist is known at a tick only."""
    asked = parsed(ScheduleRequest, await json_object(request, service.runtime.settings)).definition()
    scheduler = scheduler_of(request)
    made, is_new = await run_in_threadpool(_create, service, scheduler, caller, asked)
    scheduler.look()
    body = await run_in_threadpool(schedule_body, made)
    return _answer(body, 201 if is_new else 200, {"location": body.links["self"]})


@router.head("/v1/schedules/{schedule_id}", include_in_schema=False)
@router.get(
    "/v1/schedules/{schedule_id}", response_model=ScheduleBody, responses=PROBLEMS, operation_id="get_schedule",
    summary="Show a schedule, with its next five times",
)  # fmt: skip
async def get_schedule(schedule_id: Reference, service: ServiceDep, caller: CallerDep) -> Response:
    return _answer(await service.calls.read(caller.tenant, lambda: read_schedule(service, caller.tenant, schedule_id)))


@router.put(
    "/v1/schedules/{schedule_id}", response_model=ScheduleBody, responses=PROBLEMS, operation_id="change_schedule",
    summary="Replace the definition of a schedule", openapi_extra=_BODY,
)  # fmt: skip
async def change_schedule(schedule_id: Reference, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Its history stays, and it stays paused or active. Its next time is computed anew."""
    await run_in_threadpool(_found, service, caller.tenant, schedule_id)
    asked = parsed(ScheduleRequest, await json_object(request, service.runtime.settings)).definition()
    scheduler = scheduler_of(request)
    changed = await run_in_threadpool(_change, service, scheduler, caller, schedule_id, asked)
    scheduler.look()
    return _answer(await run_in_threadpool(read_schedule, service, caller.tenant, changed.id))


@router.delete(
    "/v1/schedules/{schedule_id}", status_code=204, responses=PROBLEMS, operation_id="delete_schedule",
    summary="Delete a schedule with its history",
)  # fmt: skip
async def delete_schedule(schedule_id: Reference, service: ServiceDep, caller: CallerDep) -> Response:
    """Its jobs stay."""

    def delete(connection: Connection, schedule: Schedule, _now: float) -> bool:
        schedules.delete_one(connection, schedule)
        return True

    await run_in_threadpool(_changed, service, caller, schedule_id, Action.DELETE, delete)
    return Response(status_code=204)


@router.post(
    "/v1/schedules/{schedule_id}/pause", response_model=ScheduleBody, responses=PROBLEMS,
    operation_id="pause_schedule", summary="Pause a schedule",
)  # fmt: skip
async def pause_schedule(schedule_id: Reference, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Ticks that wait are skipped. Jobs that are queued continue."""
    return _answer(await run_in_threadpool(pause, service, scheduler_of(request), caller, schedule_id))


@router.post(
    "/v1/schedules/{schedule_id}/resume", response_model=ScheduleBody, responses=PROBLEMS,
    operation_id="resume_schedule", summary="Resume a paused schedule",
)  # fmt: skip
async def resume_schedule(schedule_id: Reference, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """What was due while it was paused is not caught up."""
    return _answer(await run_in_threadpool(resume, service, scheduler_of(request), caller, schedule_id))


@router.post(
    "/v1/schedules/{schedule_id}/run", status_code=202, response_model=TickBody, responses=PROBLEMS,
    operation_id="run_schedule", summary="Run a schedule now", openapi_extra=_RUN,
)  # fmt: skip
async def run_schedule(
    schedule_id: Reference,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Also a paused one, and whatever runs. The response is the tick with its job, or with the reason why there is
    none."""
    found = await run_in_threadpool(_found, service, caller.tenant, schedule_id)
    at = parsed(RunRequest, await json_object(request, service.runtime.settings)).at
    key = bare_key(idempotency_key)
    keyed = KeyedRequest(caller.tenant, key, idempotency.fingerprint("run-schedule", found.id, str(at)))
    with service.only_one(caller.tenant, key):
        if (answer := await replayed(service, keyed)) is not None:
            return answer
        body = await run_in_threadpool(
            run, service, scheduler_of(request), caller, found.id, at.timestamp() if at else None, keyed
        )
    return _answer(body, 202)


@router.head("/v1/schedules/{schedule_id}/ticks", include_in_schema=False)
@router.get(
    "/v1/schedules/{schedule_id}/ticks", response_model=TickList, responses=PROBLEMS, operation_id="list_ticks",
    summary="List the ticks of a schedule, newest first",
)  # fmt: skip
async def list_ticks(
    schedule_id: Reference,
    service: ServiceDep,
    caller: CallerDep,
    state: State | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[int | None, Query(description="`next` of the page before.", ge=1, lt=2**31)] = None,
) -> Response:
    """Each with its jobs and their states, or with the reason why nothing was queued."""
    wanted = None if state is None else TickState(state)
    return _answer(
        await service.calls.read(
            caller.tenant, lambda: read_ticks(service, caller.tenant, schedule_id, wanted, after, limit)
        )
    )


# --- for callers in a thread -----------------------------------------------------------------------------------------


def read_schedules(service: Service, tenant: str, after: str | None, limit: int) -> ScheduleList:
    with service.runtime.database.read() as connection:
        found, following = schedules.list_page(connection, tenant, after=after, limit=limit)
        last = ticks.last_of_several(connection, [schedule.id for schedule in found])
        its_jobs = ticks.jobs_of(connection, [tick.id for tick in last.values()])

    def body(schedule: Schedule) -> ScheduleBody:
        tick = last.get(schedule.id)
        return schedule_body(schedule, tick, its_jobs.get(tick.id) if tick else None)

    return ScheduleList(schedules=[body(schedule) for schedule in found], next=following)


def read_schedule(service: Service, tenant: str, reference: str) -> ScheduleBody:
    """Raises ScheduleNotFound."""
    with service.runtime.database.read() as connection:
        schedule = schedules.find(connection, reference, tenant)
        tick = ticks.last_of_several(connection, [schedule.id]).get(schedule.id)
        its_jobs = ticks.jobs_of(connection, [tick.id]) if tick else {}
    return schedule_body(schedule, tick, its_jobs.get(tick.id) if tick else None)


def read_ticks(
    service: Service, tenant: str, reference: str, state: TickState | None, after: int | None, limit: int
) -> TickList:
    """Raises ScheduleNotFound."""
    with service.runtime.database.read() as connection:
        schedule = schedules.find(connection, reference, tenant)
        found, following = ticks.list_page(connection, schedule.id, state=state, after=after, limit=limit)
        its_jobs = ticks.jobs_of(connection, [tick.id for tick in found])
    return tick_list(schedule, found, its_jobs, following)


def pause(service: Service, scheduler: Scheduler, caller: Caller, reference: str) -> ScheduleBody:
    """Raises ScheduleNotFound."""

    def pause(connection: Connection, schedule: Schedule, now: float) -> bool:
        scheduler.firing.plan_due(connection, schedule, now)
        is_new = schedules.pause_if_active(connection, schedule, now)
        ticks.end_pending(connection, schedule, now, reason("paused", "the schedule was paused"))
        return is_new

    schedule = _changed(service, caller, reference, Action.PAUSE, pause)
    return read_schedule(service, caller.tenant, schedule.id)


def resume(service: Service, scheduler: Scheduler, caller: Caller, reference: str) -> ScheduleBody:
    """Raises ScheduleNotFound."""

    def resume(connection: Connection, schedule: Schedule, now: float) -> bool:
        next_at = next_after(schedule.cron, zone_of(schedule.time_zone), now)
        return schedules.resume_if_paused(connection, schedule, next_at, now)

    schedule = _changed(service, caller, reference, Action.RESUME, resume)
    scheduler.look()
    return read_schedule(service, caller.tenant, schedule.id)


def run(
    service: Service,
    scheduler: Scheduler,
    caller: Caller,
    reference: str,
    at: float | None = None,
    keyed: KeyedRequest | None = None,
) -> TickBody:
    """The tick of a run on request, after its first try. Raises ScheduleNotFound."""
    require_space(service.runtime)
    database = service.runtime.database
    with database.write() as connection:
        schedule = schedules.find(connection, reference, caller.tenant)
        tick = scheduler.firing.begin_run(connection, schedule, at)
        audit.note_schedule(connection, caller, Action.RUN, schedule.name, schedule.tenant, tick.created_at)
        zone = zone_or_utc(schedule)
        if keyed is not None:
            body = tick_body(tick, None, zone).model_dump_json()
            keyed.remember(connection, None, 202, database.moment(connection).wall, body)
    scheduler.firing.act(schedule, tick)
    scheduler.look()
    with database.read() as connection:
        ended: Tick = ticks.get(connection, tick.id) or tick
        return tick_body(ended, ticks.jobs_of(connection, [tick.id]).get(tick.id), zone)


def _create(service: Service, scheduler: Scheduler, caller: Caller, asked: Definition) -> tuple[Schedule, bool]:
    """The schedule, and whether it is new: an equal one of this name is what a repeated request has created."""
    require_space(service.runtime)
    database = service.runtime.database
    with database.read() as connection:
        now = database.moment(connection).wall
    _check(asked, caller.home, scheduler, now)
    with database.write() as connection:
        made = asked.schedule(caller.home, database.moment(connection).wall)
        before = schedules.find_named(connection, made.name, made.tenant)
        if before is not None and before.definition == made.definition:
            return before, False
        schedules.create(connection, made)
        audit.note_schedule(connection, caller, Action.CREATE, made.name, made.tenant, made.created_at)
    return made, True


def _change(service: Service, scheduler: Scheduler, caller: Caller, reference: str, asked: Definition) -> Schedule:
    """Raises ScheduleNotFound and Conflict."""
    database = service.runtime.database
    with database.read() as connection:
        now, before = database.moment(connection).wall, schedules.find(connection, reference, caller.tenant)
    _check(asked, before.tenant, scheduler, now)
    with database.write() as connection:
        now = database.moment(connection).wall
        before = schedules.find(connection, before.id, caller.tenant, locked=True)
        changed = asked.schedule(before.tenant, now, before)
        if changed.definition != before.definition:
            scheduler.firing.plan_due(connection, before, now)
            schedules.replace(connection, changed)
            audit.note_schedule(connection, caller, Action.CHANGE, changed.name, changed.tenant, now)
    return changed


def _changed(
    service: Service,
    caller: Caller,
    reference: str,
    action: Action,
    change: Callable[[Connection, Schedule, float], bool],
) -> Schedule:
    """The schedule as it was; `change` returns whether it had an effect, which is recorded. Raises ScheduleNotFound."""
    database = service.runtime.database

    def work(connection: Connection) -> Schedule:
        now = database.moment(connection).wall
        schedule = schedules.find(connection, reference, caller.tenant, locked=True)
        if change(connection, schedule, now):
            audit.note_schedule(connection, caller, action, schedule.name, schedule.tenant, now)
        return schedule

    return database.write_freeing(work)


def _found(service: Service, tenant: str, reference: str) -> Schedule:
    """Raises ScheduleNotFound."""
    with service.runtime.database.read() as connection:
        return schedules.find(connection, reference, tenant)


def _check(asked: Definition, tenant: str, scheduler: Scheduler, now: float) -> None:
    """Raises RequestValidationError for faults inside of the request of a schedule, and what `check` raises."""
    try:
        asked.check(tenant, scheduler.actions, now)
    except ValidationError as error:
        faults = [{**fault, "loc": ("request", *fault["loc"])} for fault in error.errors()]
        raise RequestValidationError(faults) from None


def _answer(body: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(), status, dict(headers or {}), media_type="application/json")
