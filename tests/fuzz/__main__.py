"""Sends odd and hostile requests to a server for a while, and reports broken promises. Exit status 0: none."""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from random import SystemRandom

from fuzz.case import from_json
from fuzz.generate import KINDS
from fuzz.models import registered
from fuzz.player import Found
from fuzz.round import THREADS, Round

SHORTEST = 5.0
"""Seconds that are worth another server."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long cases are sent")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**32), help="of all cases")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="these kinds of cases; default: all")
    parser.add_argument("--keep", type=Path, help="where cases with findings are kept; default: a temporary folder")
    parser.add_argument("--replay", type=Path, help="send the case of this file again, to a fresh server")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends with this process
    work = Path(tempfile.mkdtemp(prefix="batchserve-fuzz-"))
    found = Found(arguments.keep or work / "findings", arguments.seed)
    registered()  # made once, before the time begins
    try:
        if arguments.replay:
            kept = json.loads(arguments.replay.read_text())
            cases = [from_json(json.dumps(case)) for case in kept.get("cases") or [kept["case"]]]
            Round(work / "replay", found).replay(cases)
            return report(found, "")
        print(f"seed {arguments.seed}: {arguments.seconds:g} s, {THREADS} threads; again with --seed {arguments.seed}")
        sys.stdout.flush()
        summary = run(work, found, arguments.seconds, arguments.only)
        return report(found, summary)
    finally:
        for folder in work.glob("[0-9]*" if not found.faults else "nothing"):
            shutil.rmtree(folder, ignore_errors=True)
        if not found.faults:
            shutil.rmtree(work, ignore_errors=True)


def run(work: Path, found: Found, seconds: float, kinds: Collection[str]) -> str:
    """A server that is stuck is replaced by a new one, so that one fault does not hide the others."""
    rounds: list[Round] = []
    left = seconds
    while not rounds or left > SHORTEST:
        rounds.append(Round(work / str(len(rounds) + 1), found, kinds))
        began = time.monotonic()
        rounds[-1].run(left, f"{found.seed}-{len(rounds)}")
        left -= time.monotonic() - began if rounds[-1].stopped.is_set() else left
    canaries, played = sum(one.canaries for one in rounds), sum(one.played for one in rounds)
    growth = max(one.growth for one in rounds) / 2**20
    return f"cases {played}, small jobs {canaries}, servers {len(rounds)}, growth {growth:.0f} MiB, "


def report(found: Found, summary: str) -> int:
    for fault, count in found.faults.most_common():
        print(f"FOUND {count} x {fault}\n      {found.examples[fault][:600]}")
    print("answers: " + ", ".join(f"{count} x {status or 'none'}" for status, count in sorted(found.statuses.items())))
    print("cases: " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items())))
    print("jobs: " + ", ".join(f"{count} {end}" for end, count in sorted(found.ends.items())))
    if found.faults:
        print(f"kept in {found.folder}; again: python -m fuzz --replay FILE")
    print(f"{summary}requests {found.statuses.total()}, findings {found.faults.total()}")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
