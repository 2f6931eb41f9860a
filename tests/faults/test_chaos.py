"""The chaos run, short; `make chaos SECONDS=600` is the long one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chaos import NOT_HERE

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("seconds", "where"),
    [(20, ()), (20, ("--cluster",)), (60, ("--cluster", "ray"))],
    ids=["one host", "cluster", "Ray"],
)
def test_nothing_acknowledged_is_lost_doubled_or_stuck_while_processes_are_killed(
    seconds: int, where: tuple[str, ...]
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "chaos", "--seconds", str(seconds), *where],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.stderr.startswith(NOT_HERE):
        pytest.skip(ended.stderr)
    *_, last = ended.stdout.splitlines() or [""]
    counts = re.fullmatch(r"acknowledged (\d+), kills (\d+), lost 0, duplicated 0, stuck 0", last)
    assert counts is not None, ended.stdout + ended.stderr
    assert ended.returncode == 0
    assert int(counts[1]) > 20
    assert int(counts[2]) > 3
