"""A lone sync: what this disk takes to make a small append durable, which is the floor of every durable answer.

Started as a script: python lone_sync.py FOLDER prints the median in seconds.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryFile

APPENDED = 4096
"""Bytes of one append: a page of a journal."""
TIMES = 50


def seconds(folder: Path) -> float:
    """The median of TIMES appends to a new file in `folder`, each synced alone."""
    taken = []
    with TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(TIMES):
            started = time.perf_counter()
            file.write(bytes(APPENDED))
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - started)
    return median(taken)


if __name__ == "__main__":
    print(f"{seconds(Path(sys.argv[1])):.7f}")
