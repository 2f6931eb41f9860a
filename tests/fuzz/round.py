"""One server under cases from several threads, while small jobs of known bytes show that the others are served."""

import json
import re
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz import judge
from fuzz.case import Case, Claim, Step, query
from fuzz.generate import KINDS, next_case, swept
from fuzz.models import COLUMNS, flowers
from fuzz.player import Found, Player, is_for_later
from fuzz.site import TENANTS, Site

THREADS = 4
CANARY_PAUSE = 1.0
CANARY_SECONDS = 30.0
GROWTH = 200 * 2**20
"""Bytes that the server may grow by, once it is warm."""
WARM = 0.3
"""The share of the time after which the server is warm."""
SWEPT = 0.5
"""The share of cases that are taken from the sweep, until all of them were sent."""
FEW_CASES = 100
"""With fewer cases a server is not warm, and its growth is not meaningful."""


@dataclass
class Round:
    folder: Path
    found: Found
    kinds: Collection[str] = KINDS
    stopped: threading.Event = field(default_factory=threading.Event)
    canaries: int = 0
    played: int = 0
    growth: int = 0
    _results: dict[str, bytes] = field(default_factory=dict)
    _sweep: Iterator[Case] = field(default_factory=lambda: iter(()))
    _recent: deque[Case] = field(default_factory=lambda: deque(maxlen=40))

    def run(self, seconds: float, name: str) -> None:
        """Returns when the time is over, or when no case makes progress any more."""
        site = Site(self.folder)
        try:
            site.open()
            player = Player(site, self.found)
            end = time.monotonic() + seconds
            self._sweep = iter(swept(Random(name)) if "options" in self.kinds else ())
            with ThreadPoolExecutor(THREADS + 1) as pool:
                randoms = [Random(f"{name}-{number}") for number in range(THREADS)]
                sending = [pool.submit(self._send_cases, player, random, end) for random in randoms]
                sending.append(pool.submit(self._send_canaries, player, end))
                warm = self._warmed(site, seconds)
            for thread in sending:
                thread.result()  # an error of this program is not a fault of the server, and not a success either
            if warm is not None and site.runs:
                self.growth = site.resident() - warm
            self._finish(player)
        finally:
            if not site.close():
                self.found.add(f"the server does not stop: {site.service.process.returncode}", at="server")

    def replay(self, cases: list[Case]) -> None:
        site = Site(self.folder)
        try:
            site.open()
            player = Player(site, self.found)
            for case in cases:
                answers = player.play(case)
                for step, answer in zip(case.steps, answers, strict=False):
                    print(
                        f"{step.method} {step.target[:200]} -> {answer.status} {answer.failure} {answer.body[:600]!r}"
                    )
            self._canary(player, TENANTS[0])
            self._finish(player)
        finally:
            site.close()

    def _send_cases(self, player: Player, random: Random, end: float) -> None:
        while time.monotonic() < end and not self.stopped.is_set():
            case = (next(self._sweep, None) if random.random() < SWEPT else None) or next_case(random, self.kinds)
            self._recent.append(case)
            player.play(case)
            self.played += 1

    def _warmed(self, site: Site, seconds: float) -> int | None:
        """The memory of the server when it is warm."""
        self.stopped.wait(seconds * WARM)
        return site.resident() if site.runs and self.played >= FEW_CASES else None

    def _send_canaries(self, player: Player, end: float) -> None:
        number = 0
        while time.monotonic() < end and not self.stopped.is_set():
            self._canary(player, TENANTS[number % len(TENANTS)])
            number += 1
            self.stopped.wait(CANARY_PAUSE)

    def _canary(self, player: Player, tenant: str) -> None:
        """A small job of known records, which must end and give the same bytes each time."""
        case = canary(tenant)
        answer = player.play(case)[0]
        job = judge.parsed(answer.body) or {}
        if answer.status == 503:
            return
        if answer.status != 200 or job.get("state") != "completed":
            self._stick(
                f"a small job of {tenant} is not done in {CANARY_SECONDS:g} s: {answer.status} {job.get('state')}"
            )
            return
        result = player.send(case, Step("GET", job["links"]["result"], tenant=tenant), job["id"])
        first = self._results.setdefault("result", result.body)
        if result.body != first:
            self.found.add(
                f"the result of a small job has other bytes than the first: {result.body[:200]!r}", case, "canary"
            )
        self.canaries += 1

    def _stick(self, sentence: str) -> None:
        self.found.add(sentence, at="canary")
        self.found.folder.mkdir(parents=True, exist_ok=True)
        recent = [json.loads(case.to_json()) for case in tuple(self._recent)]
        path = self.found.folder / f"before-{self.folder.name}-stuck.json"
        path.write_text(json.dumps({"seed": self.found.seed, "finding": sentence, "cases": recent}, indent=1))
        self.stopped.set()

    def _finish(self, player: Player) -> None:
        site = player.site
        if not site.runs:
            self.found.add(f"the server has died: {site.service.log.read_text(errors='replace')[-2000:]}", at="server")
            return
        if not self.stopped.is_set():
            player.finish(60.0)
        self._list_all(player)
        if self.growth > GROWTH:
            self.found.add(f"the server has grown by {self.growth / 2**20:.0f} MiB", at="memory")
        for line in site.faults_in_log():
            self.found.add(_summary(line), at="log")
        for sentence in site.examined():
            self.found.add(sentence, at="doctor")

    def _list_all(self, player: Player) -> None:
        """Reads the list page by page; no job may be left that should have ended."""
        for tenant in TENANTS:
            after = ""
            while True:
                asked = query({"limit": "200", **({"after": after} if after else {})})
                step = Step("GET", f"/v1/jobs?{asked}", tenant=tenant, must=(200,))
                page = judge.parsed(player.send(Case("lists", (step,)), step, "").body) or {}
                for job in page.get("jobs", ()):
                    if job["state"] in ("queued", "running") and not is_for_later(job):
                        self.found.add(f"a job is {job['state']} after the end: {job['id']}", at="stuck")
                after = page.get("next") or ""
                if not after:
                    break


def canary(tenant: str) -> Case:
    chosen = flowers()[::15]
    rows = [",".join(map(str, (place, *row))) for place, (row, _) in enumerate(chosen)]
    body = "\n".join([",".join(("id", *COLUMNS)), *rows]).encode()
    asked = query({"model": "iris", "reuse": "false", "priority": "100"})
    headers = (("prefer", f"wait={CANARY_SECONDS:.0f}"),)
    step = Step("POST", f"/v1/predict?{asked}", headers, body, tenant)
    return Case("canary", (step,), Claim(len(rows), (), {str(n): label for n, (_, label) in enumerate(chosen)}))


def _summary(line: str) -> str:
    """The exception at the end of a traceback, which is one line of JSON, and the place in our code that raised it."""
    try:
        text = str(json.loads(line).get("exception") or line)
    except ValueError:
        text = line
    places = re.findall(r'/(batchserve/[\w/]+\.py", line \d+)', text)
    return f"{text.strip().rpartition(chr(10))[2][:200]}\n{' '.join(places[-6:])}"
