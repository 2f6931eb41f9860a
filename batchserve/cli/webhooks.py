"""`batchserve webhooks ...`: where the server sends the ends of jobs to."""

import sys
from typing import Annotated

import typer
from rich.markup import escape

from batchserve.cli.terminal import AsJson, duration, moment, print_facts, print_json, print_rows, say
from batchserve.client import Client, Delivery, Webhook

app = typer.Typer(help="Webhooks: where the server sends the ends of jobs to.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(metavar="ID|jobs", help="The webhook, or jobs: the addresses on jobs.")]
OwnId = Annotated[str, typer.Argument(metavar="ID", help="The webhook.")]
DeliveryId = Annotated[str, typer.Argument(metavar="DELIVERY", help="The delivery.")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", "-e", metavar="TYPE", help="Such as job.failed, job.* or batch.*; may be repeated."),
]
Description = Annotated[str | None, typer.Option(help="For people.")]


@app.command("list")
def list_webhooks(as_json: AsJson = False) -> None:
    """List the webhooks of the tenant."""
    with Client() as client:
        webhooks = client.webhooks.list()
    if as_json:
        print_json([webhook.data for webhook in webhooks])
        return
    print_rows(
        ("id", "url", "events", "state", "description"),
        [
            (webhook.id, webhook.url, ", ".join(webhook.events), _state(webhook), webhook.data["description"])
            for webhook in webhooks
        ],
    )


@app.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to send events.")],
    events: Events = None,
    description: Description = None,
    as_json: AsJson = False,
) -> None:
    """Create a webhook and print its secret, only this once."""
    with Client() as client:
        webhook = client.webhooks.create(url, events, description=description or "")
    if as_json:
        print_json({**webhook.data, "secret": webhook.secret})
    else:
        sys.stdout.write(f"{webhook.secret}\n")
    say(f"Webhook {webhook.id} sends {escape(', '.join(webhook.events))} to {escape(webhook.url)}.")
    say(f"Keep the secret: it is not shown again. Try it: [bold]batchserve webhooks test {webhook.id}[/]")


@app.command()
def show(webhook_id: OwnId, as_json: AsJson = False) -> None:
    """Show a webhook."""
    with Client() as client:
        webhook = client.webhooks.get(webhook_id)
    if as_json:
        print_json(webhook.data)
        return
    print_facts(
        {
            "webhook": webhook.id,
            "url": webhook.url,
            "events": ", ".join(webhook.events),
            "state": _state(webhook),
            "failing since": moment(webhook.data["failing_since"]),
            "description": webhook.data["description"] or None,
            "tenant": webhook.data["tenant"],
            "created": moment(webhook.data["created_at"]),
        }
    )


@app.command("set")
def change(
    webhook_id: OwnId,
    url: Annotated[str | None, typer.Option(help="Where to send events.")] = None,
    events: Events = None,
    description: Description = None,
    enabled: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Whether it gets events; disabled, it loses them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change, disable or enable a webhook."""
    with Client() as client:
        webhook = client.webhooks.change(webhook_id, url=url, events=events, description=description, enabled=enabled)
    if as_json:
        print_json(webhook.data)
    say(f"Webhook {webhook.id} is {_state(webhook)}: {escape(', '.join(webhook.events))} to {escape(webhook.url)}.")


@app.command("rm")
def remove(webhook_id: OwnId) -> None:
    """Remove a webhook with its deliveries."""
    with Client() as client:
        client.webhooks.delete(webhook_id)
    say(f"Webhook {escape(webhook_id)} is removed.")


@app.command()
def rotate(
    webhook_id: Id,
    overlap: Annotated[
        float | None,
        typer.Option(
            parser=duration, metavar="DURATION", help="How long the earlier secret is valid, too: 24h by default."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replace the secret of a webhook, or of the addresses on jobs, and print it, only this once."""
    with Client() as client:
        secret = client.webhooks.rotate(webhook_id, overlap=overlap)
    if as_json:
        print_json({"secret": secret})
    else:
        sys.stdout.write(f"{secret}\n")
    say("Keep the secret: it is not shown again.")


@app.command("test")
def send_test(webhook_id: OwnId, as_json: AsJson = False) -> None:
    """Send a test event."""
    with Client() as client:
        delivery = client.webhooks.test(webhook_id)
    _tell_sent(webhook_id, delivery, as_json=as_json)


@app.command()
def deliveries(
    webhook_id: Id,
    state: Annotated[str | None, typer.Option(metavar="pending|delivered|given-up", help="Only these.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most deliveries to list.")] = 30,
    as_json: AsJson = False,
) -> None:
    """List what was sent, newest first."""
    found: list[Delivery] = []
    with Client() as client:
        for delivery in client.webhooks.deliveries(webhook_id, state=state):
            found.append(delivery)
            if len(found) == limit:
                break
    if as_json:
        print_json([delivery.data for delivery in found])
        return
    print_rows(
        ("id", "event", "job", "state", "attempts", "created"),
        [
            (
                delivery.id,
                delivery.event,
                delivery.data["job"],
                delivery.state,
                delivery.data["attempts"],
                moment(delivery.data["created_at"]),
            )
            for delivery in found
        ],
    )


@app.command()
def delivery(webhook_id: Id, delivery_id: DeliveryId, as_json: AsJson = False) -> None:
    """Show the attempts at a delivery: when, how long, and what came back."""
    with Client() as client:
        found = client.webhooks.delivery(webhook_id, delivery_id)
    if as_json:
        print_json(found.data)
        return
    print_rows(
        ("attempt", "at", "seconds", "status", "response"),
        [
            (
                attempt["number"],
                moment(attempt["at"]),
                attempt["seconds"],
                attempt["status"],
                " ".join((attempt["error"] or attempt["response"]).split()),
            )
            for attempt in found.log
        ],
    )


@app.command()
def redeliver(webhook_id: Id, delivery_id: DeliveryId, as_json: AsJson = False) -> None:
    """Send a delivery again, under the same ID."""
    with Client() as client:
        sent = client.webhooks.redeliver(webhook_id, delivery_id)
    _tell_sent(webhook_id, sent, as_json=as_json)


def _state(webhook: Webhook) -> str:
    if webhook.enabled:
        return "failing" if webhook.data["failing_since"] else "enabled"
    return f"disabled ({webhook.data['reason']})" if webhook.data["reason"] else "disabled"


def _tell_sent(webhook_id: str, sent: Delivery, *, as_json: bool) -> None:
    if as_json:
        print_json(sent.data)
    else:
        sys.stdout.write(f"{sent.id}\n")
    say(f"What came of it: [bold]batchserve webhooks delivery {escape(webhook_id)} {sent.id}[/]")
