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
from namespaces import NoNamespaces
from ray_hosts import NoCluster

from chaos import NOT_HERE
from chaos.audit import Verdict, audit, wait_for_all
from chaos.clients import MODEL, run_clients
from chaos.cluster_site import ClusterSite
from chaos.history import History
from chaos.inputs import Input
from chaos.nightly import Nightly, nightly
from chaos.ray_site import RaySite
from chaos.site import Site

CLIENTS = 16
SITES: dict[str | None, type[Site] | type[ClusterSite]] = {None: Site, "workers": ClusterSite, "ray": RaySite}


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long clients work and processes are killed")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32), help="of inputs and kills")
    parser.add_argument(
        "--cluster", nargs="?", choices=("workers", "ray"), const="workers",
        help="on PostgreSQL and an object store, which are killed, too; `ray`: with the hosts of a Ray cluster",
    )  # fmt: skip
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the services end with this process
    say(f"seed {arguments.seed}: {arguments.seconds:g} s, {CLIENTS} clients; again with --seed {arguments.seed}")
    folder = Path(tempfile.mkdtemp(prefix="batchserve-chaos-"))
    try:
        verdict, kills = run(folder, arguments.seconds, arguments.seed, SITES[arguments.cluster])
    except (NoCluster, NoNamespaces) as error:
        sys.exit(f"{NOT_HERE}: {error}")
    for sentence in verdict.sentences[:50]:
        say(sentence)
    say("kills: " + ", ".join(f"{kind} {count}" for kind, count in kills.items()))
    states = ", ".join(f"{count} {state}" for state, count in sorted(verdict.states.items()))
    say(f"jobs: {states}, in {verdict.attempts} attempts; {verdict.records} records compared")
    if verdict.ticks:
        say(f"ticks: {verdict.ticks}; webhooks: {verdict.events} events in {verdict.requests} requests")
    if verdict.is_good:
        shutil.rmtree(folder)
    else:
        say(f"all of it is kept in {folder}")
    say(
        f"acknowledged {verdict.acknowledged}, kills {sum(kills.values())}, lost {verdict.lost}, "
        f"duplicated {verdict.duplicated}, stuck {verdict.stuck}"
    )
    return 0 if verdict.is_good else 1


def run(
    folder: Path, seconds: float, seed: int, kind: type[Site] | type[ClusterSite] = Site
) -> tuple[Verdict, dict[str, int]]:
    """The verdict, and how often each kind of process was killed. The data of the service is in `folder`/service, the
    history in `folder`."""
    (folder / "service").mkdir()
    site = kind(folder / "service")
    history = History(folder / "history.jsonl")
    verdict = Verdict()
    try:
        site.start()
        site.wait_until_ready()
        model = graphs.busy()
        httpx2.put(f"{site.url}/v1/models/{MODEL}", content=model, timeout=60).raise_for_status()
        with nightly(site.url, site.inputs, MODEL) as nights:
            run_clients(CLIENTS, seed, site.url, site.inputs, history, seconds, partial(site.disturb, seed=seed))
            site.wait_until_ready()
            check(site, nights, history.path, max(site.patience, seconds / 2), verdict)
    finally:
        history.close()
        site.stop()
    site.check(verdict)
    return verdict, {name: site.kills[name] for name in site.kinds}


def check(site: Site | ClusterSite, nights: Nightly | None, path: Path, patience: float, verdict: Verdict) -> None:
    """Waits for the end of everything, and compares it with the history."""
    others: dict[str, tuple[str, Input]] = {}
    if nights is not None:
        nights.wait(patience, verdict, site.start_missing)
    wait_for_all(site.url, patience, verdict, site.start_missing)
    if nights is not None:
        others = nights.audit_ticks(path, verdict)
        nights.wait_for_deliveries(patience, verdict, site.start_missing)
    found = audit(site.url, path, verdict, others)
    if nights is not None:
        nights.audit_events(found, verdict)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
