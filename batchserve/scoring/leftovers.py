"""What a killed attempt at a job has left where its results are written, in folders that the service never sweeps."""

import re
from collections.abc import Iterable
from functools import partial
from urllib.parse import quote

from batchserve.domain import AttemptTarget
from batchserve.storage.locations import remove_left

__all__ = ["remove_leftovers"]


def remove_leftovers(target: AttemptTarget, urls: Iterable[str]) -> None:
    """Removes the unfinished files of this attempt and of earlier ones, beside the results at `urls`. A later attempt
    may be under way, if this one has lost its lease."""
    is_left = partial(_is_left, re.compile(rf"\.partial-{re.escape(target.job_id)}-([0-9]+)-[0-9a-f]+"), target.attempt)
    if target.partition_by is not None:
        remove_left(target.url, target.root, is_left, f"{quote(target.partition_by, safe='')}=")
        return
    for folder in {url.rpartition("/")[0] for url in urls}:
        remove_left(f"{folder}/", target.root, is_left)


def _is_left(pattern: re.Pattern[str], attempt: int, name: str) -> bool:
    found = pattern.fullmatch(name)
    return found is not None and int(found[1]) <= attempt
