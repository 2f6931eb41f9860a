"""The webhooks of a server, as `client.webhooks`: where it sends the ends of jobs to."""

import builtins
import json
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from batchserve.client.data import bytes_content
from batchserve.client.transport import Request, Transport, each_now, now, query, segment

__all__ = ["AsyncWebhooks", "Delivery", "Webhook", "Webhooks"]

_PAGE = 200


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook. `data` is the whole description."""

    data: Mapping[str, Any]
    secret: str | None = field(default=None, repr=False)
    """By which its requests are signed: only of one that was just created."""

    @property
    def id(self) -> str:
        return str(self.data["id"])

    @property
    def url(self) -> str:
        return str(self.data["url"])

    @property
    def events(self) -> list[str]:
        """Types of events, or families such as `job.*`."""
        return list(self.data["events"])

    @property
    def enabled(self) -> bool:
        return bool(self.data["enabled"])


@dataclass(frozen=True, slots=True)
class Delivery:
    """An event that was, or is to be, sent. `data` is the whole description."""

    data: Mapping[str, Any]

    @property
    def id(self) -> str:
        """The `webhook-id` of its requests."""
        return str(self.data["id"])

    @property
    def event(self) -> str:
        return str(self.data["event"])

    @property
    def state(self) -> str:
        """pending, delivered or given-up."""
        return str(self.data["state"])

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its attempts: `number`, `at`, `seconds`, `status`, `response` and `error`; of one that was shown alone."""
        return list(self.data.get("log") or ())


class AsyncWebhooks:
    """Webhooks, awaited. In the place of an ID, `jobs` stands for the addresses on the jobs of the tenant."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(self, url: str, events: Sequence[str] | None = None, *, description: str = "") -> Webhook:
        """A new webhook with its secret, which no later answer shows. `events`: types of events, `job.*` by default."""
        body = {"url": url, "description": description, **({} if events is None else {"events": list(events)})}
        data = await self._send("POST", "", body)
        return Webhook(data, data.pop("secret"))

    async def get(self, id: str) -> Webhook:
        return Webhook(await self._send("GET", _path(id)))

    async def list(self) -> "builtins.list[Webhook]":
        """All webhooks, the oldest first."""
        return [Webhook(data) for data in (await self._send("GET", ""))["webhooks"]]

    async def change(
        self,
        id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """What is not given stays as it is."""
        asked = {"url": url, "events": events, "description": description, "enabled": enabled}
        body = {name: value for name, value in asked.items() if value is not None}
        return Webhook(await self._send("PATCH", _path(id), body))

    async def delete(self, id: str) -> None:
        """Removes a webhook with its deliveries."""
        await self._send("DELETE", _path(id))

    async def rotate(self, id: str, *, overlap: float | None = None) -> str:
        """A new secret. For `overlap` seconds, a day by default, requests are signed by the earlier one, too."""
        body = {} if overlap is None else {"overlap": overlap}
        return str((await self._send("POST", f"{_path(id)}/rotate", body))["secret"])

    async def test(self, id: str) -> Delivery:
        """Sends a `webhook.test` event. `delivery` shows what came of it."""
        return Delivery(await self._send("POST", f"{_path(id)}/test"))

    async def deliveries(self, id: str, *, state: str | None = None) -> AsyncGenerator[Delivery]:
        """All deliveries, newest first; further pages are fetched on demand."""
        after = None
        while True:
            params = query({"state": state, "limit": _PAGE, "after": after})
            page = await self._send("GET", f"{_path(id)}/deliveries", params=params)
            for data in page["deliveries"]:
                yield Delivery(data)
            after = page.get("next")
            if after is None:
                return

    async def delivery(self, id: str, delivery_id: str) -> Delivery:
        """A delivery with its attempts."""
        return Delivery(await self._send("GET", f"{_path(id)}/deliveries{_path(delivery_id)}"))

    async def redeliver(self, id: str, delivery_id: str) -> Delivery:
        """Sends a delivery again, under the same ID."""
        return Delivery(await self._send("POST", f"{_path(id)}/deliveries{_path(delivery_id)}/redeliver"))

    async def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, params: Mapping[str, Any] | None = None
    ) -> Any:
        content = None if body is None else bytes_content(json.dumps(body).encode(), "application/json")
        request = Request(method=method, path=f"/v1/webhooks{path}", params=params or {}, content=content)
        return await self._transport.json(request)


class Webhooks:
    """Webhooks. In the place of an ID, `jobs` stands for the addresses on the jobs of the tenant."""

    def __init__(self, twin: AsyncWebhooks) -> None:
        self._twin = twin

    def create(self, url: str, events: Sequence[str] | None = None, *, description: str = "") -> Webhook:
        """A new webhook with its secret, which no later answer shows. `events`: types of events, `job.*` by default."""
        return now(self._twin.create(url, events, description=description))

    def get(self, id: str) -> Webhook:
        return now(self._twin.get(id))

    def list(self) -> "builtins.list[Webhook]":
        """All webhooks, the oldest first."""
        return now(self._twin.list())

    def change(
        self,
        id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        description: str | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """What is not given stays as it is."""
        return now(self._twin.change(id, url=url, events=events, description=description, enabled=enabled))

    def delete(self, id: str) -> None:
        """Removes a webhook with its deliveries."""
        now(self._twin.delete(id))

    def rotate(self, id: str, *, overlap: float | None = None) -> str:
        """A new secret. For `overlap` seconds, a day by default, requests are signed by the earlier one, too."""
        return now(self._twin.rotate(id, overlap=overlap))

    def test(self, id: str) -> Delivery:
        """Sends a `webhook.test` event. `delivery` shows what came of it."""
        return now(self._twin.test(id))

    def deliveries(self, id: str, *, state: str | None = None) -> Iterator[Delivery]:
        """All deliveries, newest first; further pages are fetched on demand."""
        return each_now(self._twin.deliveries(id, state=state))

    def delivery(self, id: str, delivery_id: str) -> Delivery:
        """A delivery with its attempts."""
        return now(self._twin.delivery(id, delivery_id))

    def redeliver(self, id: str, delivery_id: str) -> Delivery:
        """Sends a delivery again, under the same ID."""
        return now(self._twin.redeliver(id, delivery_id))


def _path(id: str) -> str:
    return f"/{segment(id)}"
