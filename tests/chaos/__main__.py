"""Runs the service under kill -9 for a while and reports what was lost. Exit status 0: nothing."""

import argparse
import random
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import graphs
import httpx2

from chaos.audit import Verdict, audit, check_database, wait_for_all
from chaos.clients import MODEL, run_clients
from chaos.history import History
from chaos.site import KINDS, Site

CLIENTS = 16


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long clients work and processes are killed")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of inputs and kills")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the services end with this process
    say(f"seed {arguments.seed}: {arguments.seconds:g} s, {CLIENTS} clients; again with --seed {arguments.seed}")
    folder = Path(tempfile.mkdtemp(prefix="batchserve-chaos-"))
    verdict, site = run(folder, arguments.seconds, arguments.seed)
    for sentence in verdict.sentences[:50]:
        say(sentence)
    say("kills: " + ", ".join(f"{site.kills[kind]} of a {kind}" for kind in KINDS))
    states = ", ".join(f"{count} {state}" for state, count in sorted(verdict.states.items()))
    say(f"jobs: {states}, in {verdict.attempts} attempts; {verdict.records} records compared")
    if verdict.is_good:
        shutil.rmtree(folder)
    else:
        say(f"all of it is kept in {folder}")
    say(
        f"acknowledged {verdict.acknowledged}, kills {site.kills.total()}, lost {verdict.lost}, "
        f"duplicated {verdict.duplicated}, stuck {verdict.stuck}"
    )
    return 0 if verdict.is_good else 1


def run(folder: Path, seconds: float, seed: int) -> tuple[Verdict, Site]:
    """The data of the service is in `folder`/service, the history in `folder`."""
    (folder / "service").mkdir()
    site = Site(folder / "service")
    history = History(folder / "history.jsonl")
    verdict = Verdict()
    try:
        site.start()
        site.wait_until_ready()
        model = graphs.busy()
        httpx2.put(f"{site.url}/v1/models/{MODEL}", content=model, timeout=60).raise_for_status()
        run_clients(CLIENTS, seed, site.url, history, seconds, partial(site.disturb, seed=seed))
        site.wait_until_ready()
        wait_for_all(site.url, max(60.0, seconds / 2), verdict)
        audit(site.url, history.path, verdict)
    finally:
        history.close()
        site.stop()
    check_database(site.database, verdict)
    return verdict, site


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
