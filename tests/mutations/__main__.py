"""Removes one mechanism at a time, in a copy of the project, and checks that a test fails for each.

`make test-mutations` tries all of them and exits with 1 when the removal of one fails no test. In tests/,
`python -m mutations TEXT` tries those whose name contains this text, `--from TEXT` the first such one and all behind
it; `--write` writes the rows of those that were tried into the table of docs/promises.md.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutations.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs" / "promises.md"
COPIED = ("batchserve", "benchmarks", "migrations", "tests", "docs", "pyproject.toml", "README.md", "CHANGELOG.md")
SECONDS = 300.0
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?:\[| - |$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    mutant: Mutant
    noticed_by: str
    """The test that failed; empty when none did."""
    seconds: float


def main() -> None:
    asked = argparse.ArgumentParser(prog="mutations", description=__doc__.partition("\n")[0])
    asked.add_argument("text", nargs="?", default="", help="only mechanisms with this text")
    asked.add_argument(
        "--from", dest="begin", default="", metavar="TEXT", help="the first with this text, and the rest"
    )
    asked.add_argument("--write", action="store_true", help="write the table into docs/promises.md")
    given = asked.parse_args()
    begin = next(place for place, mutant in enumerate(MUTANTS) if given.begin in mutant.mechanism)
    chosen = [mutant for mutant in MUTANTS[begin:] if given.text in mutant.mechanism]
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        _copy_project(copy)
        outcomes = [_try(mutant, copy) for mutant in chosen]
    survivors = [outcome.mutant.mechanism for outcome in outcomes if not outcome.noticed_by]
    if given.write:
        _write_table(outcomes)
    print(f"{len(outcomes)} mechanisms taken out, {len(survivors)} not noticed {survivors or ''}")
    raise SystemExit(1 if survivors or not outcomes else 0)


def _copy_project(target: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)


def _try(mutant: Mutant, copy: Path) -> Outcome:
    """Raises ValueError when the text to replace is not in its file exactly once: the list is out of date."""
    file = copy / mutant.file
    whole = file.read_text()
    if (found := whole.count(mutant.before)) != 1:
        raise ValueError(
            f"{mutant.mechanism}: expected {mutant.before!r} once in {mutant.file}, found it {found} times"
        )
    file.write_text(whole.replace(mutant.before, mutant.after))
    began = time.monotonic()
    try:
        noticed_by = _failing_test(mutant, copy)
    finally:
        file.write_text(whole)
    seconds = time.monotonic() - began
    print(f"{'noticed ' if noticed_by else 'SURVIVED'} {seconds:5.1f} s  {mutant.mechanism}: {noticed_by}", flush=True)
    return Outcome(mutant, noticed_by, seconds)


def _failing_test(mutant: Mutant, copy: Path) -> str:
    tests = [test for test in mutant.tests if (copy / test.partition("::")[0]).exists()]
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--timeout",
        "60",
        "-m",
        "postgres and not slow" if mutant.on_postgres else "not faults and not torch and not postgres",
    ]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {"PYTHONPATH": str(copy), "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"}
    try:
        ended = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS:g} s"
    if ended.returncode == 0:
        return ""
    if found := _FAILED.findall(ended.stdout):
        return str(found[0]).rpartition("/")[2]
    raise RuntimeError(f"{mutant.mechanism}: pytest could not run:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")


def _write_table(outcomes: list[Outcome]) -> None:
    """The rows of those that were not tried stay, as long as they are in the list."""
    text = DOCS.read_text()
    before = text.partition(BEGIN)[2].partition(END)[0].splitlines()[4:]
    told = dict(line.strip("| ").split(" | ", 1) for line in before if line)
    for outcome in outcomes:
        told[outcome.mutant.mechanism] = f"`{outcome.noticed_by}`" if outcome.noticed_by else "nothing"
    rows = [f"| {name} | {told[name]} |" for mutant in MUTANTS if (name := mutant.mechanism) in told]
    table = "\n".join([BEGIN, "", "| taken out | noticed by |", "|---|---|", *rows, "", END])
    DOCS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
