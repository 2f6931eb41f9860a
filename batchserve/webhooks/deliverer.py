"""Sends deliveries, in threads of their own: jobs wait for none of them.

One thread claims what is due, as far as there is room (`room`), and a thread for each attempt sends it.
"""

import threading
import time
from collections.abc import Callable
from functools import partial

from sqlalchemy import Connection

from batchserve.db.connect import Database, Moment
from batchserve.errors import BatchserveError, Unavailable
from batchserve.logs import get_logger
from batchserve.metrics import Metrics
from batchserve.settings import Settings, networks_of
from batchserve.webhooks import deliveries
from batchserve.webhooks.addresses import target_of
from batchserve.webhooks.deliveries import Claimed, Outcome
from batchserve.webhooks.outgoing import Aborted, NotSent, Outgoing
from batchserve.webhooks.room import Room
from batchserve.webhooks.signing import headers_of
from batchserve.webhooks.terms import DeliveryState

__all__ = ["Deliverer"]

log = get_logger()

_LEASE = 3
"""Time limits of an attempt after which a delivery is due again whose process has not said what came of it."""
_LONGEST_PAUSE = 30.0
"""Seconds between two tries while the database does not respond, or is closed."""


class Deliverer:
    """Delivers what is due until it is ended. Any number of processes may do so on one database."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        moment: Callable[[Connection], Moment],
        outgoing: Outgoing | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """`moment`: now, by the clocks that all users of the database share."""
        self._database, self._poll, self._moment = database, settings.poll, moment
        self._metrics = metrics or Metrics()
        self._lease = _LEASE * settings.webhook_timeout
        self._stopping = threading.Event()
        self._outgoing = outgoing or Outgoing(
            networks_of(settings.webhook_networks), settings.webhook_timeout, is_stopping=self._stopping.is_set
        )
        self._woken = threading.Event()
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, int], Claimed] = {}
        self._threads: set[threading.Thread] = set()

    def wake(self) -> None:
        """Signals a new delivery, or the end. Safe from any thread, and cheap."""
        self._woken.set()

    def run(self, ended: threading.Event) -> None:
        """Runs until `ended` is set, and `wake` called. Attempts under way are broken off then, and are made again by
        the next process."""
        pause = 0.0
        while not ended.is_set():
            try:
                while self.dispatch():
                    pass
                pause = 0.0
            except Unavailable as error:
                pause = min(_LONGEST_PAUSE, max(self._poll, 2 * pause))
                log.warning("Webhooks wait for the database", action="webhook_wait", detail=error.detail)
            except Exception:
                pause = min(_LONGEST_PAUSE, max(self._poll, 2 * pause))
                log.exception("Webhooks continue after an error", action="webhook_error")
            self._woken.wait(pause or self._poll)
            self._woken.clear()
        self._stopping.set()
        self.join()

    def dispatch(self) -> int:
        """Claims what is due and may be attempted now, and starts an attempt at each; returns how many."""
        with self._lock:
            room = Room(self._under_way.values())
        if room.left <= 0:
            return 0
        with self._database.read() as connection:
            if not deliveries.find_due(connection, self._moment(connection), room):
                return 0
        with self._database.write() as connection:
            claimed = deliveries.claim(connection, self._moment(connection), self._lease, room)
        for one in claimed:
            self._start(one)
        return len(claimed)

    def join(self) -> None:
        """Waits for the ends of the attempts under way."""
        while threads := self._running():
            for thread in threads:
                thread.join()

    def _running(self) -> list[threading.Thread]:
        with self._lock:
            return list(self._threads)

    # --- attempts, in their threads ---

    def _start(self, claimed: Claimed) -> None:
        thread = threading.Thread(target=self._attempt, args=[claimed], name="webhook", daemon=True)
        with self._lock:
            self._under_way[claimed.id, claimed.attempt] = claimed
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # there are too many: the lease passes, and it is due again
            self._forget(claimed, thread)
            raise

    def _attempt(self, claimed: Claimed) -> None:
        try:
            self._deliver(claimed)
        except Unavailable as error:  # when the lease has passed, it is sent again
            log.warning("The outcome of a webhook is unknown", action="webhook_wait", delivery=claimed.id,
                        detail=error.detail)  # fmt: skip
        except Exception:
            log.exception("A webhook has met an error", action="webhook_error", delivery=claimed.id)
        finally:
            self._forget(claimed, threading.current_thread())
            self.wake()

    def _forget(self, claimed: Claimed, thread: threading.Thread) -> None:
        with self._lock:
            del self._under_way[claimed.id, claimed.attempt]
            self._threads.discard(thread)

    def _deliver(self, claimed: Claimed) -> None:
        try:
            outcome = self._outcome(claimed)
        except Aborted:
            self._database.write_freeing(lambda connection: deliveries.put_back(connection, claimed))
            return
        state = self._database.write_freeing(partial(self._recorded, claimed, outcome))
        told = {"delivery": claimed.id, "type": claimed.event, "attempt": claimed.attempt, "status": outcome.status}
        where = {"target": target_of(claimed.url), "seconds": round(outcome.seconds, 3), "error": outcome.error}
        if outcome.is_delivered:
            self._metrics.count_webhook("delivered")
            log.info("Webhook is delivered", action="webhook_deliver", **told, **where)
        elif state is DeliveryState.GIVEN_UP:
            self._metrics.count_webhook("given-up")
            log.error("Webhook is given up", action="webhook_give_up", **told, **where)
        else:
            self._metrics.count_webhook("failed")
            log.warning("Webhook is not delivered yet", action="webhook_fail", **told, **where)

    def _recorded(self, claimed: Claimed, outcome: Outcome, connection: Connection) -> DeliveryState | None:
        return deliveries.record(connection, claimed, outcome, self._moment(connection))

    def _outcome(self, claimed: Claimed) -> Outcome:
        """Raises Aborted."""
        if not claimed.secrets:
            return Outcome(0.0, error="there is no secret to sign it with: rotate it")
        body = claimed.body.encode()
        headers = headers_of(claimed.id, int(claimed.at), body, claimed.secrets)
        began = time.monotonic()
        try:
            answer = self._outgoing.post(claimed.url, headers, body)
        except (NotSent, BatchserveError) as error:
            return Outcome(time.monotonic() - began, error=str(error))
        error_of_status = None
        if 300 <= answer.status < 400:
            error_of_status = "redirects are not followed: change the URL"
        return Outcome(time.monotonic() - began, answer.status, answer.beginning, error_of_status)
