"""The pages about webhooks."""

import re
from html import unescape

import pytest
from service import Api, ok
from test_web_system import signed_in, token

from batchserve.access import Scope

URL = "https://hooks.example/night"


def words(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def create(own_api: Api, **fields: object) -> str:
    """The path of the page of a new webhook."""
    answer = own_api.http.post("/webhooks", data={"url": URL, "event": ["job.*"], **fields})
    assert answer.status_code == 200, answer.text
    found = re.findall(r'href="(/webhooks/[0-9a-f-]{36})"', answer.text)
    return str(found[-1])


def test_a_webhook_is_created_and_its_secret_shown_once(own_api: Api) -> None:
    assert "There are no webhooks yet." in own_api.http.get("/webhooks").text
    answer = own_api.http.post("/webhooks", data={"url": URL, "event": ["job.failed", "batch.*"], "description": "<b>"})
    secret = re.search(r"<pre>(whsec_\S+)</pre>", answer.text)
    assert secret is not None
    text = own_api.http.get("/webhooks").text
    assert secret[1] not in text
    assert "job.failed, batch.* enabled default <b>" in words(text)
    assert "<b>" not in text
    assert ok(own_api.http.get("/v1/webhooks"))["webhooks"][0]["events"] == ["job.failed", "batch.*"]


def test_a_webhook_is_tried_disabled_changed_and_deleted(own_api: Api) -> None:
    path = create(own_api)
    tried = own_api.http.post(f"{path}/test")
    assert "webhook.test" in words(tried.text)
    assert "None yet." in tried.text
    assert '"type": "webhook.test"' in unescape(tried.text)
    assert "webhook.test" in own_api.http.get(path).text
    assert "Nothing has been sent." in own_api.http.get(f"{path}?state=delivered").text
    own_api.http.post(path, data={"url": f"{URL}/other", "event": "job.failed", "description": "night"})
    text = words(own_api.http.get(path).text)
    assert f"address {URL}/other events job.failed state enabled description night" in text
    own_api.http.post(path, data={"enabled": "false"})
    text = own_api.http.get(path).text
    assert "state disabled" in words(text)
    assert "Send a test event" not in text
    assert "given-up" in text
    own_api.http.post(path, data={"enabled": "true"})
    delivery = re.search(rf"{path}/deliveries/[0-9a-f-]{{36}}", own_api.http.get(path).text)
    assert delivery is not None
    again = own_api.http.post(f"{delivery[0]}/redeliver")
    assert "state pending" in words(again.text)
    rotated = own_api.http.post(f"{path}/rotate").text
    assert "<pre>whsec_" in rotated
    own_api.http.post(f"{path}/delete")
    assert own_api.http.get(path).status_code == 404


def test_a_change_clears_what_is_left_empty(own_api: Api) -> None:
    path = create(own_api, description="night")
    answer = own_api.http.post(path, data={"url": URL, "description": "night"})
    assert answer.status_code == 422
    assert "events" in answer.text
    own_api.http.post(path, data={"url": URL, "event": "job.failed", "description": ""})
    changed = ok(own_api.http.get(f"/v1{path}"))
    assert (changed["description"], changed["events"], changed["enabled"]) == ("", ["job.failed"], True)
    own_api.http.post(path, data={"enabled": "false"})
    changed = ok(own_api.http.get(f"/v1{path}"))
    assert (changed["url"], changed["events"], changed["enabled"]) == (URL, ["job.failed"], False)


def test_the_secret_of_the_addresses_on_jobs_is_made_on_the_page(own_api: Api) -> None:
    assert "<pre>whsec_" in own_api.http.post("/webhooks/jobs/rotate").text
    assert "Addresses on jobs" in own_api.http.get("/webhooks/jobs").text


def test_deliveries_go_on_a_page_further(own_api: Api) -> None:
    path = create(own_api)
    for _ in range(51):
        own_api.http.post(f"/v1{path}/test")
    first = own_api.http.get(path).text
    older = re.search(rf'href="({path}\?state=&amp;after=[0-9a-f-]+)"', first)
    assert older is not None
    assert len(re.findall(f"{path}/deliveries/", own_api.http.get(unescape(older[1])).text)) == 1
    for refused in ("state=lost", "after=%00", "after=" + "x" * 65):
        assert own_api.http.get(f"{path}?{refused}").status_code == 422


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"url": "http://example.com/", "event": "job.*"}, "expected https"),
        ({"url": URL}, "events"),
        ({"url": URL, "event": "job.started"}, "expected one of"),
        ({"url": "", "event": "job.*"}, "url"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_with_the_reason(own_api: Api, fields: dict[str, str], told: str) -> None:
    answer = own_api.http.post("/webhooks", data=fields)
    assert answer.status_code == 422
    assert told in answer.text


def test_readers_see_webhooks_and_change_none(own_api: Api) -> None:
    path = create(own_api)
    signed_in(own_api, Scope.READER, tenant="default")
    for page in ("/webhooks", path):
        text = own_api.http.get(page).text
        assert URL in text
        assert not re.search(r'<form[^>]+action="/webhooks', text)
    for action in ("", "/test", "/rotate", "/delete"):
        assert own_api.http.post(f"{path}{action}?token={token(own_api)}").status_code == 403
    signed_in(own_api, Scope.ADMIN, tenant="acme")
    assert own_api.http.get(path).status_code == 404
    assert URL not in own_api.http.get("/webhooks").text


def test_the_system_page_leads_to_the_webhooks(own_api: Api) -> None:
    assert 'href="/webhooks"' in own_api.http.get("/system").text
