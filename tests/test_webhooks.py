"""Deliveries of webhooks: written with the end of a job, claimed by one process, tried again, and given up."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import postgres
import pytest
from exposed import values_of
from openai import OpenAI
from openai.types.webhooks import BatchCancelledWebhookEvent
from receivers import Received, Receiver, receiving
from sqlalchemy import Connection, select, text
from standardwebhooks import Webhook as Verifier
from waiting import until

from batchserve import audit
from batchserve.access import EVERY_TENANT, Action, Caller, Scope
from batchserve.db import tables
from batchserve.db.connect import Database, Moment
from batchserve.db.lasting import driver_of
from batchserve.domain import Dialect, StoredInput
from batchserve.errors import Conflict, InvalidOptions, Unavailable, WebhookNotFound
from batchserve.jobs import requests
from batchserve.metrics import Metrics
from batchserve.settings import Settings, networks_of
from batchserve.storage import open_storage
from batchserve.upkeep.backup import back_up, restore
from batchserve.upkeep.inspection import find_unreadable, inspect_webhooks, mend_unreadable
from batchserve.upkeep.move import move
from batchserve.upkeep.retention import forget
from batchserve.webhooks import deliveries, endpoints, room
from batchserve.webhooks.deliverer import Deliverer
from batchserve.webhooks.deliveries import PAUSES, Claimed, Outcome
from batchserve.webhooks.outgoing import Outgoing
from batchserve.webhooks.room import Room
from batchserve.webhooks.terms import GONE, JOBS, Delivery, DeliveryState, Endpoint

DAY = 86400.0
URL = "https://example.com/hook"
ADA = Caller("red", Scope.USER, "ada")
LEASE = 45.0
COUNT = 251
"""Of deliveries: more than are deleted in two transactions."""
FAILED, DONE, LEFT = Outcome(0.1, 500, "oops"), Outcome(0.1, 204), Outcome(0.1, 410)


class Hand:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.passed, self.jumped, self.clock = 0.0, 0.0, "boot"

    def __call__(self, _: Connection) -> Moment:
        return self.now

    @property
    def now(self) -> Moment:
        return Moment(1e9 + self.passed + self.jumped, 100.0 + self.passed, self.clock)


@pytest.fixture
def hand() -> Hand:
    return Hand()


def endpoint(database: Database, *filters: str, tenant: str = "red", url: str = URL) -> Endpoint:
    with database.write() as connection:
        return endpoints.create(connection, tenant, url, filters or ["job.*"], "", 1e9, ADA)[0]


def end(database: Database, job_id: str = "1", tenant: str = "red", webhook: str | None = None) -> None:
    """A job is uploaded and cancelled, which is its end."""
    with database.write() as connection:
        create(connection, job_id, tenant, webhook)
        requests.request_cancel(connection, job_id, 1e9)


def create(connection: Connection, job_id: str, tenant: str = "red", webhook: str | None = None) -> None:
    stored = StoredInput(f"inputs/{job_id}", "csv", Dialect(), 150, "b" * 64)
    requests.create(connection, job_id, [stored], None, 1e9, tenant)
    if webhook is not None:
        connection.execute(tables.jobs.update().where(tables.jobs.c.id == job_id).values(webhook=webhook))


def sent(database: Database, to: str, tenant: str = "red", **wanted: Any) -> list[Delivery]:
    """The deliveries to an endpoint, the oldest first."""
    with database.read() as connection:
        return deliveries.list_page(connection, to, tenant, **wanted)[::-1]


def claim(database: Database, hand: Hand, room: Room | None = None) -> list[Claimed]:
    with database.write() as connection:
        return deliveries.claim(connection, hand.now, LEASE, room or Room())


def is_due(database: Database, hand: Hand) -> bool:
    with database.read() as connection:
        return deliveries.find_due(connection, hand.now, Room())


def record(database: Database, hand: Hand, claimed: Claimed, outcome: Outcome) -> DeliveryState | None:
    with database.write() as connection:
        return deliveries.record(connection, claimed, outcome, hand.now)


def get(database: Database, to: Endpoint) -> Endpoint:
    with database.read() as connection:
        return endpoints.get(connection, to.id, to.tenant)


# --- the outbox ------------------------------------------------------------------------------------------------------


def test_the_end_of_a_job_is_sent_to_each_endpoint_of_its_tenant_that_asks_for_it(database: Database) -> None:
    all_ends, this_end = endpoint(database), endpoint(database, "job.cancelled", "batch.*")
    other_ends, of_others = endpoint(database, "job.completed", "batch.failed"), endpoint(database, tenant="blue")
    end(database)
    assert [one.event for one in sent(database, all_ends.id)] == ["job.cancelled"]
    assert [one.event for one in sent(database, this_end.id)] == ["job.cancelled", "batch.cancelled"]
    assert sent(database, other_ends.id) == []
    assert sent(database, of_others.id, "blue") == []
    ids = [one.id for to in (all_ends, this_end) for one in sent(database, to.id)]
    assert len(set(ids)) == 3


def test_the_end_of_a_job_is_sent_to_its_own_address(database: Database) -> None:
    end(database, "1", webhook="https://example.com/own")
    end(database, "2", tenant="blue", webhook="https://example.com/blue")
    end(database, "3")
    (own,) = sent(database, JOBS)
    assert (own.event, own.url, own.job_id, own.endpoint_id) == ("job.cancelled", "https://example.com/own", "1", None)
    assert [one.job_id for one in sent(database, JOBS, EVERY_TENANT)] == ["1", "2"]


def test_an_event_is_small_and_says_what_ended_how(database: Database) -> None:
    to = endpoint(database)
    end(database)
    event = orjson.loads(sent(database, to.id)[0].body)
    assert (event["type"], event["timestamp"]) == ("job.cancelled", "2001-09-09T01:46:40Z")
    assert event["data"] == {
        "id": "1",
        "tenant": "red",
        "state": "cancelled",
        "model": None,
        "rows": {"total": None, "ok": 0, "failed": 0},
        "error": None,
        "reused_from": None,
        "metadata": {},
        "links": {"self": "/v1/jobs/1", "result": "/v1/download/1", "errors": "/v1/download/1/errors"},
    }


def test_a_damaged_address_or_endpoint_does_not_prevent_the_end(database: Database) -> None:
    to, damaged = endpoint(database), endpoint(database)
    with database.write() as connection:
        create(connection, "1", webhook="no address")
        connection.execute(text("UPDATE webhook_endpoints SET events = '7' WHERE id = :id"), {"id": damaged.id})
        requests.request_cancel(connection, "1", 1e9)
    assert len(sent(database, to.id)) == 1
    assert sent(database, damaged.id) == []
    assert len(sent(database, JOBS)) == 1


def test_a_delivery_is_in_the_transaction_of_the_end(database: Database) -> None:
    to = endpoint(database)

    def end_and_fail() -> None:
        with database.write() as connection:
            create(connection, "1")
            requests.request_cancel(connection, "1", 1e9)
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError):
        end_and_fail()
    assert sent(database, to.id) == []
    end(database)
    assert len(sent(database, to.id)) == 1


def test_deleting_the_job_loses_no_delivery(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    with database.write() as connection:
        requests.delete_if_not_running(connection, "1")
    (claimed,) = claim(database, hand)
    assert claimed.id == sent(database, to.id)[0].id


def test_where_nobody_asked_an_end_executes_no_further_statement(sqlite: Database) -> None:
    def statements(job_id: str, tenant: str) -> list[str]:
        found: list[str] = []
        with sqlite.write() as connection:
            create(connection, job_id, tenant)
            driver_of(connection).set_trace_callback(found.append)
            requests.request_cancel(connection, job_id, 1e9)
            driver_of(connection).set_trace_callback(None)
        return found

    def about_webhooks(executed: list[str]) -> list[str]:
        return [statement for statement in executed if "webhook_" in statement]

    before = statements("1", "blue")
    endpoint(sqlite)
    after = statements("2", "blue")
    assert len(after) == len(before)
    assert len(about_webhooks(after)) == 1, "the statement that ends the job"
    assert len(about_webhooks(statements("3", "red"))) > 1


def test_a_disabled_endpoint_gets_nothing_and_what_was_on_its_way_is_given_up(database: Database) -> None:
    to = endpoint(database)
    end(database, "1")
    with database.write() as connection:
        endpoints.change(connection, to.id, "red", {"enabled": False}, 1e9, ADA)
    end(database, "2")
    assert [(one.job_id, one.state) for one in sent(database, to.id)] == [("1", DeliveryState.GIVEN_UP)]
    with database.write() as connection, pytest.raises(Conflict, match="disabled"):
        deliveries.add_test(connection, to.id, "red", 1e9)
    with database.write() as connection:
        endpoints.change(connection, to.id, "red", {"enabled": True}, 1e9, ADA)
    end(database, "3")
    assert [one.job_id for one in sent(database, to.id)] == ["1", "3"]


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_delivery_is_claimed_once_until_its_lease_has_passed_and_then_under_the_same_id(
    database: Database, hand: Hand
) -> None:
    endpoint(database)
    end(database)
    (first,) = claim(database, hand)
    assert claim(database, hand) == []
    hand.passed += LEASE - 1
    assert claim(database, hand) == []
    hand.passed += 2
    (second,) = claim(database, hand)
    assert (first.id, first.attempt, second.id, second.attempt) == (first.id, 1, first.id, 2)
    assert (second.url, second.body, second.secrets) == (URL, first.body, first.secrets)


def test_a_lease_of_another_boot_has_passed(database: Database, hand: Hand) -> None:
    endpoint(database)
    end(database)
    (first,) = claim(database, hand)
    hand.clock = "another boot"
    (second,) = claim(database, hand)
    assert (second.id, second.attempt) == (first.id, 2)


@pytest.mark.parametrize("jump", [-400 * DAY, 400 * DAY])
def test_a_wall_clock_that_jumps_changes_no_pause(database: Database, hand: Hand, jump: float) -> None:
    endpoint(database)
    end(database)
    (first,) = claim(database, hand)
    record(database, hand, first, FAILED)
    hand.jumped += jump
    hand.passed += 0.7 * PAUSES[0]
    assert claim(database, hand) == []
    hand.passed += PAUSES[0]
    assert len(claim(database, hand)) == 1


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_processes_that_claim_at_the_same_time_get_different_deliveries(database: Database, hand: Hand) -> None:
    for number in range(24):
        endpoint(database, tenant=f"tenant-{number}")
        end(database, str(number), tenant=f"tenant-{number}")
    barrier = threading.Barrier(4)

    def claims() -> list[str]:
        with database.write() as connection:
            barrier.wait(30)
            return [claimed.id for claimed in deliveries.claim(connection, hand.now, LEASE, Room())]

    with ThreadPoolExecutor(4) as threads:
        found = [one for done in [threads.submit(claims) for _ in range(4)] for one in done.result()]
    assert found
    assert len(found) == len(set(found))
    while more := claim(database, hand):
        found += [claimed.id for claimed in more]
    assert len(found) == len(set(found)) == 24


def test_few_attempts_at_a_time_are_made_to_one_target_and_for_one_tenant(database: Database, hand: Hand) -> None:
    slow = endpoint(database)
    for number in range(100):
        end(database, f"slow-{number}")
    others = [endpoint(database, "job.failed") for _ in range(5)]
    healthy = endpoint(database, tenant="blue")
    end(database, "healthy", tenant="blue")
    with database.write() as connection:
        for other in others:
            deliveries.add_test(connection, other.id, "red", 1e9)
    under_way: list[Claimed] = []
    while more := claim(database, hand, Room(under_way)):
        under_way += more
    targets = [claimed.target for claimed in under_way]
    assert targets.count(slow.id) == room.OF_TARGET
    assert sum(claimed.tenant == "red" for claimed in under_way) == room.OF_TENANT
    assert healthy.id in targets


def test_what_has_failed_leaves_room_for_what_has_not(database: Database, hand: Hand) -> None:
    failing = [endpoint(database, tenant=f"tenant-{number}") for number in range(12)]
    for number in range(12):
        end(database, str(number), tenant=f"tenant-{number}")
    while first := claim(database, hand):
        for claimed in first:
            record(database, hand, claimed, FAILED)
    hand.passed += 2 * PAUSES[0]
    under_way: list[Claimed] = []
    while more := claim(database, hand, Room(under_way)):
        under_way += more
    assert len(under_way) == room.SLOW
    fresh = endpoint(database, tenant="blue")
    end(database, "fresh", tenant="blue")
    assert [claimed.target for claimed in claim(database, hand, Room(under_way))] == [fresh.id]
    with database.write() as connection:  # the first attempt at an event for an endpoint that fails
        deliveries.add_test(connection, failing[11].id, "tenant-11", 1e9)
    assert claim(database, hand, Room(under_way)) == []


# --- what comes of an attempt ----------------------------------------------------------------------------------------


def test_a_success_ends_a_delivery(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    (claimed,) = claim(database, hand)
    assert record(database, hand, claimed, DONE) is DeliveryState.DELIVERED
    hand.passed += 2 * DAY
    assert claim(database, hand) == []
    (found,) = sent(database, to.id)
    assert (found.state, found.attempts, found.ended_at) == (DeliveryState.DELIVERED, 1, 1e9)
    with database.read() as connection:
        (attempt,) = deliveries.attempts_of(connection, found.id)
    assert (attempt.number, attempt.status, attempt.seconds, attempt.error) == (1, 204, 0.1, None)


def test_failures_are_repeated_over_about_a_day_with_jitter_and_then_given_up(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    waits: list[list[float]] = []
    for job in range(4):
        end(database, str(job))
    ended = 0
    begun: dict[str, list[float]] = {}
    while ended < 4:
        for claimed in claim(database, hand) if is_due(database, hand) else ():
            begun.setdefault(claimed.id, []).append(hand.passed)
            ended += record(database, hand, claimed, FAILED) is DeliveryState.GIVEN_UP
        hand.passed += 1.0 if hand.passed < 300 else 60.0
    for moments in begun.values():
        assert len(moments) == len(PAUSES) + 1
        waits.append([after - before for before, after in pairwise(moments)])
        assert 0.75 * DAY < moments[-1] - moments[0] < 1.25 * DAY
        for waited, pause in zip(waits[-1], PAUSES, strict=True):
            assert 0.8 * pause <= waited <= 1.2 * pause + 61
    assert len({tuple(found) for found in waits}) == 4, "without jitter all would be tried together"
    assert {one.state for one in sent(database, to.id)} == {DeliveryState.GIVEN_UP}
    assert get(database, to).failing_since is not None
    hand.passed += 2 * DAY
    assert claim(database, hand) == []


def test_a_failure_is_visible_at_the_endpoint_until_a_success(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    (claimed,) = claim(database, hand)
    record(database, hand, claimed, FAILED)
    since = get(database, to).failing_since
    assert since == hand.now.wall
    hand.passed += 2 * PAUSES[0]
    (claimed,) = claim(database, hand)
    record(database, hand, claimed, Outcome(1.0, error="no response within 15 s"))
    assert get(database, to).failing_since == since
    hand.passed += 2 * PAUSES[1]
    (claimed,) = claim(database, hand)
    record(database, hand, claimed, DONE)
    assert get(database, to).failing_since is None


def test_410_disables_the_endpoint_and_gives_up_what_is_on_its_way(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    for number in range(3):
        end(database, str(number))
    claimed = claim(database, hand)[0]
    assert record(database, hand, claimed, LEFT) is DeliveryState.GIVEN_UP
    found = get(database, to)
    assert (found.enabled, found.reason) == (False, GONE)
    assert {one.state for one in sent(database, to.id)} == {DeliveryState.GIVEN_UP}
    end(database, "4")
    assert len(sent(database, to.id)) == 3
    with database.write() as connection:
        enabled = endpoints.change(connection, to.id, "red", {"enabled": True}, 1e9, ADA)
    assert (enabled.enabled, enabled.reason, enabled.failing_since) == (True, None, None)


def test_410_of_an_address_on_a_job_gives_up_its_delivery_alone(database: Database, hand: Hand) -> None:
    for number in range(2):
        end(database, str(number), webhook=f"https://host-{number}.example/")
    first, second = claim(database, hand)
    assert record(database, hand, first, LEFT) is DeliveryState.GIVEN_UP
    assert record(database, hand, second, DONE) is DeliveryState.DELIVERED


def test_a_late_success_counts_and_a_late_failure_does_not(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database, "1")
    (late,) = claim(database, hand)
    hand.passed += LEASE + 1
    (current,) = claim(database, hand)
    assert record(database, hand, late, FAILED) is DeliveryState.PENDING
    hand.passed += LEASE - 2
    assert claim(database, hand) == [], "the failure of an earlier attempt has changed when the current one is due"
    assert record(database, hand, current, DONE) is DeliveryState.DELIVERED
    end(database, "2")
    (late,) = claim(database, hand)
    hand.passed += LEASE + 1
    (current,) = claim(database, hand)
    assert record(database, hand, late, DONE) is DeliveryState.DELIVERED
    assert record(database, hand, current, FAILED) is DeliveryState.DELIVERED
    assert {one.state for one in sent(database, to.id)} == {DeliveryState.DELIVERED}


def test_what_comes_of_an_attempt_at_a_deleted_delivery_is_forgotten(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    (claimed,) = claim(database, hand)
    with database.write() as connection:
        endpoints.delete_endpoint(connection, to.id, "red", 1e9, ADA)
    assert record(database, hand, claimed, DONE) is None
    with database.read() as connection:
        assert connection.execute(select(tables.webhook_deliveries)).all() == []
        assert connection.execute(select(tables.webhook_secrets)).all() == []


def test_what_is_put_back_is_due_at_once_for_any_process(database: Database, hand: Hand) -> None:
    endpoint(database)
    end(database)
    (claimed,) = claim(database, hand)
    with database.write() as connection:
        deliveries.put_back(connection, claimed)
    (again,) = claim(database, hand)
    assert again.id == claimed.id


def test_a_delivery_is_sent_again_under_its_id_with_as_many_attempts(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    (claimed,) = claim(database, hand)
    record(database, hand, claimed, DONE)
    with database.write() as connection:
        again = deliveries.send_again(connection, to.id, claimed.id, "red")
    assert (again.id, again.state, again.ended_at) == (claimed.id, DeliveryState.PENDING, None)
    tried = 0
    while True:
        due = claim(database, hand)
        for one in due:
            assert (one.id, one.body) == (claimed.id, claimed.body)
            tried += 1
            if record(database, hand, one, FAILED) is DeliveryState.GIVEN_UP:
                assert tried == len(PAUSES) + 1
                return
        hand.passed += 600.0


def test_the_latest_attempts_of_a_delivery_are_kept(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    end(database)
    for _ in range(60):
        (claimed,) = claim(database, hand)
        record(database, hand, claimed, DONE)
        with database.write() as connection:
            deliveries.send_again(connection, to.id, claimed.id, "red")
    with database.read() as connection:
        kept = deliveries.attempts_of(connection, sent(database, to.id)[0].id)
    assert [attempt.number for attempt in kept] == list(range(11, 61))


# --- secrets ---------------------------------------------------------------------------------------------------------


def rotate(database: Database, of: str, overlap: float, now: float, tenant: str = "red") -> str:
    with database.write() as connection:
        return endpoints.rotate(connection, of, tenant, overlap, now, ADA)[0]


def test_while_secrets_overlap_requests_are_signed_by_both(database: Database, hand: Hand) -> None:
    with database.write() as connection:
        to, first = endpoints.create(connection, "red", URL, ["job.*"], "", 1e9, ADA)
    second = rotate(database, to.id, DAY, 1e9)
    for passed, expected in ((0.0, [second, first]), (DAY - 1, [second, first]), (DAY + 1, [second])):
        hand.passed = passed
        end(database, f"after {passed}")
        (claimed,) = claim(database, hand)
        assert claimed.secrets == expected
        record(database, hand, claimed, DONE)
    third = rotate(database, to.id, 0, hand.now.wall)
    end(database, "at once")
    assert claim(database, hand)[0].secrets == [third]


def test_no_more_than_a_few_secrets_are_valid_at_a_time(database: Database, hand: Hand) -> None:
    to = endpoint(database)
    rotated = [rotate(database, to.id, DAY, 1e9 + number) for number in range(10)]
    end(database)
    (claimed,) = claim(database, hand)
    assert claimed.secrets == rotated[: -endpoints.MOST_SECRETS - 1 : -1]


def test_the_addresses_on_jobs_have_the_secret_of_their_tenant(database: Database, hand: Hand) -> None:
    with database.write() as connection, pytest.raises(InvalidOptions, match="has no secret"):
        endpoints.require_secret(connection, "red")
    red, blue = rotate(database, JOBS, DAY, 1e9), rotate(database, JOBS, DAY, 1e9, tenant="blue")
    to = endpoint(database)
    with database.write() as connection:
        endpoints.require_secret(connection, "red")
    end(database, "1", webhook=URL)
    end(database, "2", tenant="blue", webhook=URL)
    own = {(claimed.tenant, claimed.endpoint_id): list(claimed.secrets) for claimed in claim(database, hand)}
    assert own["red", None] == [red]
    assert own["blue", None] == [blue]
    assert own["red", to.id] not in ([red], [blue])


# --- tenants, the audit log, upkeep ----------------------------------------------------------------------------------


def test_another_tenants_webhook_looks_exactly_like_a_missing_one(database: Database) -> None:
    to = endpoint(database)
    end(database)
    (delivery,) = sent(database, to.id)
    blue = Caller("blue", Scope.ADMIN, "bea")
    with database.write() as connection:
        for act in (
            lambda id: endpoints.get(connection, id, "blue"),
            lambda id: endpoints.change(connection, id, "blue", {"enabled": False}, 1e9, blue),
            lambda id: endpoints.delete_endpoint(connection, id, "blue", 1e9, blue),
            lambda id: endpoints.rotate(connection, id, "blue", DAY, 1e9, blue),
            lambda id: deliveries.add_test(connection, id, "blue", 1e9),
            lambda id: deliveries.get(connection, id, delivery.id, "blue"),
            lambda id: deliveries.send_again(connection, id, delivery.id, "blue"),
        ):
            told = []
            for id in (to.id, "none", "a\0b"):
                with pytest.raises(WebhookNotFound) as error:
                    act(id)
                told.append(str(error.value).replace(repr(id), "ID"))
            assert told[0] == told[1] == told[2]
    assert sent(database, to.id, "blue") == []
    assert len(sent(database, to.id, EVERY_TENANT)) == 1


def test_each_change_is_in_the_audit_log_and_what_changes_nothing_is_not(database: Database) -> None:
    to = endpoint(database)
    with database.write() as connection:
        endpoints.change(connection, to.id, "red", {"description": "night"}, 2.0, ADA)
        endpoints.change(connection, to.id, "red", {"description": "night", "enabled": True}, 3.0, ADA)
        endpoints.rotate(connection, to.id, "red", DAY, 4.0, ADA)
        endpoints.rotate(connection, JOBS, "red", DAY, 5.0, ADA)
        endpoints.delete_endpoint(connection, to.id, "red", 6.0, ADA)
    with database.read() as connection:
        found = [(entry.key, entry.action, entry.kind, entry.subject) for entry in audit.list_page(connection)][::-1]
    actions = [Action.CREATE, Action.CHANGE, Action.ROTATE, Action.ROTATE, Action.DELETE]
    subjects = [to.id, to.id, to.id, JOBS, to.id]
    assert found == [("ada", action, "webhook", subject) for action, subject in zip(actions, subjects, strict=True)]


def test_a_tenant_has_a_limited_number_of_endpoints(database: Database) -> None:
    for _ in range(endpoints.MOST_ENDPOINTS):
        endpoint(database)
    with pytest.raises(Conflict, match="already"):
        endpoint(database)
    endpoint(database, tenant="blue")


def test_deliveries_are_listed_in_pages_newest_first(database: Database) -> None:
    to = endpoint(database)
    for number in range(7):
        end(database, str(number))
    with database.read() as connection:
        first = deliveries.list_page(connection, to.id, "red", limit=3)
        second = deliveries.list_page(connection, to.id, "red", after=first[-1].id, limit=3)
        third = deliveries.list_page(connection, to.id, "red", after=second[-1].id, limit=3)
    assert [[one.job_id for one in page] for page in (first, second, third)] == [list("654"), list("321"), ["0"]]


@pytest.mark.parametrize(
    ("keep", "settled", "left"),
    [("30d", 1e9, 0), (None, 1e9, COUNT - 1), ("30d", 29 * DAY, COUNT - 1), ("100d", 1e9, COUNT - 1)],
)
def test_deliveries_that_ended_are_kept_for_their_time(
    keep: str | None, settled: float, left: int, database: Database, hand: Hand, tmp_path: Any
) -> None:
    to = endpoint(database)
    with database.write() as connection:
        for number in range(COUNT):
            create(connection, str(number))
            requests.request_cancel(connection, str(number), 1e9)
    (claimed, *_) = claim(database, hand)
    record(database, hand, claimed, DONE)
    with database.write() as connection:
        done = {"state": DeliveryState.DELIVERED, "ended_at": 1e9}
        connection.execute(
            tables.webhook_deliveries.update().where(tables.webhook_deliveries.c.job_id != "7").values(done)
        )
    settings = Settings(storage=str(tmp_path), keep_webhooks=keep)
    forget(database, settings, hand.now.wall + 31 * DAY, settled)
    with database.read() as connection:
        found = deliveries.list_page(connection, to.id, "red", limit=1000)
        attempts = connection.execute(select(tables.webhook_attempts)).all()
    assert len(found) == left + 1, "one is pending, and stays"
    assert bool(attempts) is bool(left)


def test_unreadable_rows_hide_no_other_and_are_found_and_removed(database: Database, hand: Hand, tmp_path: Any) -> None:
    to, bad = endpoint(database), endpoint(database, "job.failed")
    for number in range(3):
        end(database, str(number))
    (claimed, *_) = claim(database, hand)
    record(database, hand, claimed, DONE)
    with database.write() as connection:
        connection.execute(text("UPDATE webhook_deliveries SET state = 'lost' WHERE job_id = '1'"))
        connection.execute(text("UPDATE webhook_endpoints SET events = '7' WHERE id = :id"), {"id": bad.id})
        connection.execute(text("UPDATE webhook_attempts SET seconds = -1e300"))
    with database.read() as connection:
        assert [one.id for one in endpoints.list_all(connection, "red")] == [to.id]
        assert deliveries.attempts_of(connection, claimed.id) == []
    assert [one.job_id for one in sent(database, to.id)] == ["0", "2"]
    found = list(find_unreadable(database))
    assert {row.table for row in found} == {"webhook_endpoints", "webhook_deliveries", "webhook_attempts"}
    assert all("batchserve mend" in row.fault.mend for row in found)
    mend_unreadable(database, open_storage(str(tmp_path)))
    assert list(find_unreadable(database)) == []
    assert [one.job_id for one in sent(database, to.id)] == ["0", "2"]


def test_doctor_finds_endpoints_that_fail_and_deliveries_that_no_worker_tries(database: Database) -> None:
    assert inspect_webhooks(database, patience=3600.0) == []
    to = endpoint(database)  # and its deliveries, of 2001
    end(database)
    with database.write() as connection:
        connection.execute(text("UPDATE webhook_endpoints SET failing_since = 1e9"))
    failing, waiting = inspect_webhooks(database, patience=3600.0)
    assert (failing.place, failing.found) == (f"webhook {to.id}", "none since 2001-09-09T01:46:40+00:00")
    assert waiting.found.startswith("1 that no worker has tried")


def test_a_backup_takes_webhooks_along_and_what_was_on_its_way(sqlite: Database, hand: Hand, tmp_path: Path) -> None:
    with sqlite.write() as connection:
        to, secret = endpoints.create(connection, "red", URL, ["job.*"], "", 1e9, ADA)
    end(sqlite)
    (before,) = claim(sqlite, hand)
    back_up(sqlite, open_storage(str(tmp_path / "storage")), tmp_path / "backup")
    restored = tmp_path / "restored" / "batchserve.db"
    restore(tmp_path / "backup", open_storage(str(restored.parent)), restored)
    hand.clock = "another host"
    with closing(Database(f"sqlite:///{restored}")) as database:
        (after,) = claim(database, hand)
        assert (after.id, after.body, after.secrets) == (before.id, before.body, [secret])
        assert get(database, to) == to


@pytest.mark.postgres
def test_a_move_takes_webhooks_along_and_what_was_on_its_way(
    sqlite: Database, hand: Hand, postgres_server: postgres.Server, tmp_path: Path
) -> None:
    to = endpoint(sqlite)
    end(sqlite)
    (before,) = claim(sqlite, hand)
    storage, place = open_storage(str(tmp_path / "storage")), open_storage(str(tmp_path / "place"))
    with closing(Database(postgres_server.empty())) as target:
        move(sqlite, storage, target, place)
        hand.clock = "database"
        (after,) = claim(target, hand)
        assert (after.id, after.body, after.secrets) == (before.id, before.body, before.secrets)
        with target.write() as connection:
            endpoints.rotate(connection, to.id, "red", DAY, 1e9, ADA)  # its number follows those that were moved
    with pytest.raises(Unavailable, match="was moved"):
        claim(sqlite, hand)


# --- over a network --------------------------------------------------------------------------------------------------


@contextmanager
def delivering(database: Database, **settings: Any) -> Iterator[Deliverer]:
    """A process that delivers, to loopback as well."""
    chosen = Settings(**{"storage": "unused", "poll": 0.05, "webhook_networks": "127.0.0.0/8", **settings})
    deliverer, ended = Deliverer(database, chosen, database.moment), threading.Event()
    thread = threading.Thread(target=deliverer.run, args=[ended])
    thread.start()
    try:
        yield deliverer
    finally:
        ended.set()
        deliverer.wake()
        thread.join()


def to_receiver(database: Database, receiver: Receiver, *filters: str, tenant: str = "red") -> tuple[str, str]:
    """The ID and the secret of an endpoint."""
    with database.write() as connection:
        made, secret = endpoints.create(connection, tenant, receiver.url, filters or ["job.*"], "", 1e9, ADA)
    return made.id, secret


def verified(request: Received, secret: str) -> dict[str, Any]:
    found: dict[str, Any] = Verifier(secret).verify(request.body, dict(request.headers))
    return found


def test_receivers_verify_what_they_get_by_the_library_of_standard_webhooks(database: Database) -> None:
    with receiving() as receiver, delivering(database) as deliverer:
        to, secret = to_receiver(database, receiver)
        end(database)
        deliverer.wake()
        (request,) = receiver.wait(1)
    event = verified(request, secret)
    assert (event["type"], event["data"]["id"]) == ("job.cancelled", "1")
    assert request.id == sent(database, to)[0].id
    with pytest.raises(Exception, match="signature"):
        Verifier("whsec_" + "A" * 44).verify(request.body, dict(request.headers))


def test_events_of_batches_are_taken_by_the_client_of_openai(database: Database) -> None:
    with receiving() as receiver, delivering(database):
        _, secret = to_receiver(database, receiver, "batch.*")
        end(database)
        (request,) = receiver.wait(1)
    client = OpenAI(api_key="unused", webhook_secret=secret)
    event: Any = client.webhooks.unwrap(request.body, dict(request.headers))
    assert isinstance(event, BatchCancelledWebhookEvent)
    assert (event.type, event.data.id, event.object) == ("batch.cancelled", "1", "event")
    assert event.created_at == 1_000_000_000
    client.close()


def test_a_request_has_a_signature_of_each_valid_secret(database: Database) -> None:
    with receiving() as receiver, delivering(database):
        to, first = to_receiver(database, receiver)
        with database.write() as connection:
            now = database.moment(connection).wall
            second, until_ = endpoints.rotate(connection, to, "red", DAY, now, ADA)
        assert until_ == now + DAY
        end(database)
        (request,) = receiver.wait(1)
    assert verified(request, first) == verified(request, second)


def test_a_failed_delivery_comes_again_with_the_same_id_and_a_new_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "PAUSES", (1.2,) * 5)
    answers: list[Any] = [500, 429, (200, {}, b"thanks")]
    with receiving(lambda _: answers.pop(0)) as receiver, delivering(database):
        to, secret = to_receiver(database, receiver)
        end(database)
        found = receiver.wait(3)
        until(lambda: sent(database, to)[0].state is DeliveryState.DELIVERED)
    assert len({request.id for request in found}) == 1
    assert len({request.body for request in found}) == 1
    times = [int(request.headers["webhook-timestamp"]) for request in found]
    assert times == sorted(times)
    assert times[0] < times[-1]
    for request in found:
        verified(request, secret)
    with database.read() as connection:
        log = deliveries.attempts_of(connection, found[0].id)
    assert [(attempt.number, attempt.status, attempt.response) for attempt in log] == [
        (1, 500, ""), (2, 429, ""), (3, 200, "thanks"),
    ]  # fmt: skip


def test_redirects_count_as_failures_that_say_so(database: Database) -> None:
    with receiving(lambda _: (301, {"location": "/other"}, b"")) as receiver, delivering(database):
        to, _ = to_receiver(database, receiver)
        end(database)
        receiver.wait(1)
        until(lambda: bool(log_of(database, to)))
    (attempt,) = log_of(database, to)
    assert attempt.status == 301
    assert "redirects are not followed" in str(attempt.error)
    assert [request.path for request in receiver.requests] == ["/hook"]


def log_of(database: Database, to: str) -> list[Any]:
    with database.read() as connection:
        (delivery,) = deliveries.list_page(connection, to, "red")
        return deliveries.attempts_of(connection, delivery.id)


def test_receivers_that_hang_delay_no_others(database: Database) -> None:
    released = threading.Event()

    def hang(_: Received) -> int:
        released.wait(60)
        return 204

    with receiving(hang) as hanging, receiving() as quick, delivering(database, webhook_timeout=30):
        for _ in range(3):
            to_receiver(database, hanging)
        for number in range(10):
            end(database, f"hanging-{number}")
        hanging.wait(room.OF_TENANT)
        to_receiver(database, quick, tenant="blue")
        for number in range(10):
            end(database, f"quick-{number}", tenant="blue")
        assert len(quick.wait(10)) == 10
        assert len(hanging.requests) == room.OF_TENANT
        released.set()
        hanging.wait(30)


def test_a_process_that_stops_breaks_off_its_attempts_and_the_next_makes_them_at_once(database: Database) -> None:
    released = threading.Event()

    def hang_once(_: Received) -> int:
        if len(receiver.requests) == 1:
            released.wait(60)
        return 204

    with receiving(hang_once) as receiver:
        to, _ = to_receiver(database, receiver)
        end(database)
        with delivering(database, webhook_timeout=60):
            receiver.wait(1)
        released.set()
        with delivering(database, webhook_timeout=60):  # whose lease would be three minutes
            first, second = receiver.wait(2, 30)
            until(lambda: sent(database, to)[0].state is DeliveryState.DELIVERED)
    assert first.id == second.id


def test_a_delivery_without_a_secret_is_not_sent(database: Database, hand: Hand) -> None:
    with receiving() as receiver:
        to, _ = to_receiver(database, receiver)
        end(database)
        with database.write() as connection:
            connection.execute(text("DELETE FROM webhook_secrets"))
        chosen = Settings(storage="unused", webhook_networks="127.0.0.0/8")
        metrics = Metrics()
        deliverer = Deliverer(database, chosen, hand, Outgoing(networks_of("127.0.0.0/8"), 5.0), metrics)
        assert deliverer.dispatch() == 1
        deliverer.join()
    assert values_of(metrics.collect())["batchserve_webhook_attempts_total{failed}"] == 1
    assert "there is no secret" in str(log_of(database, to)[0].error)
    assert receiver.requests == []


def test_attempts_are_counted_by_outcome(database: Database, hand: Hand) -> None:
    metrics = Metrics()
    with receiving() as receiver:
        to_receiver(database, receiver)
        end(database)
        chosen = Settings(storage="unused", webhook_networks="127.0.0.0/8")
        deliverer = Deliverer(database, chosen, hand, Outgoing(networks_of("127.0.0.0/8"), 5.0), metrics)
        assert deliverer.dispatch() == 1
        deliverer.join()
    found = values_of(metrics.collect())
    counts = [
        found[f"batchserve_webhook_attempts_total{{{outcome}}}"] for outcome in ("delivered", "failed", "given-up")
    ]
    assert counts == [1, 0, 0]


def test_the_receiver_of_the_documentation_takes_what_is_sent(database: Database) -> None:
    page = (Path(__file__).parent.parent / "docs" / "webhooks.md").read_text()
    found = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with database.write() as connection:
        url = f"http://127.0.0.1:{port}/hook"
        _, secret = endpoints.create(connection, "red", url, ["job.*"], "", 1e9, ADA)
    command = [sys.executable, "-c", found[1].replace("9000", str(port))]
    environment = {**os.environ, "WEBHOOK_SECRET": secret}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            until(lambda: is_open(port), 30)
            with delivering(database):
                end(database)
                assert process.stdout is not None
                message_id, kind, *_ = process.stdout.readline().split()
                assert kind == "job.cancelled"
                (delivery,) = sent(database, endpoint_of(database))
                assert delivery.id == message_id
                until(lambda: sent(database, endpoint_of(database))[0].state is DeliveryState.DELIVERED)
        finally:
            process.kill()


def endpoint_of(database: Database) -> str:
    """The only one."""
    with database.read() as connection:
        return endpoints.list_all(connection, "red")[0].id


def is_open(port: int) -> bool:
    with closing(socket.socket()) as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0
